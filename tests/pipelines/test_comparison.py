"""Comparisons: their entries and budgets, and the tables and figures made of results. No stage runs here."""

import dataclasses
import math
import re
import shlex
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from pipelines import comparison_page as page
from pipelines.commands import compare
from pipelines.comparison import CAPTIONS as CAPTION_SETTINGS
from pipelines.comparison import (
    REAL,
    Comparison,
    Entry,
    Row,
    Sweep,
    Training,
    equalise,
    error_of,
    find_entries,
    trainings,
    with_one_dataset,
)
from pipelines.dag import with_section
from pipelines.dataset import DatasetResources
from pipelines.pipeline import compose, find_pipeline
from pipelines.systems.unclip import UnclipConfig
from tasks.store import Store
from tasks.verification import survey
from tests.pipelines.command_line import assert_alike, documented
from unclip import imaging
from unclip.config import without_operational
from unclip.errors import ConfigError, InputError, StageError

CAPTIONS = ["a small red circle on white", "a costs $5 and b costs $6"]


def unclip_entries(*names: str, **options: Any) -> list[Entry]:
    return find_entries("tiny", None, ["scenes.port=8767"], None, names, **options)


def settings(entry: Entry, stage: str) -> Any:
    return without_operational(compose(entry.config)[stage].config)


def test_variants_differ_from_their_system_in_their_settings_only() -> None:
    system, text, other = unclip_entries("unclip", "unclip/text_embedding", "unclip/autoregressive")
    assert isinstance(text.config, UnclipConfig) and isinstance(other.config, UnclipConfig)
    assert text.config.evaluate.sampling.image_embedding == "text_embedding"
    assert other.config.prior.kind == "autoregressive" and other.title == "unclip, autoregressive prior"
    differ = {
        name: [settings(entry, name) != settings(system, name) for entry in (text, other)]
        for name in compose(system.config)
    }
    assert {name for name, (of_text, _) in differ.items() if of_text} == {"evaluate"}
    assert {name for name, (_, of_other) in differ.items() if of_other} == {"prior"}


def test_given_settings_do_not_undo_a_variant() -> None:
    given = ["evaluate.sampling.image_embedding=prior", "systems.unclip.prior.kind=diffusion"]
    text, other = find_entries("tiny", None, given, None, ("unclip/text_embedding", "unclip/autoregressive"))
    assert isinstance(text.config, UnclipConfig) and isinstance(other.config, UnclipConfig)
    assert text.config.evaluate.sampling.image_embedding == "text_embedding"
    assert other.config.prior.kind == "autoregressive"


def test_all_variants_that_apply_follow_their_system() -> None:
    names = [entry.name for entry in unclip_entries()]
    assert names[0] == "unclip", "the system of the preset"
    assert names[1:3] == ["unclip/text_embedding", "unclip/autoregressive"]
    assert "unclip/no_caption" not in names, "the decoder of tiny reads no captions"
    assert "ddpm/linear" not in names, "trained only if it is named"
    entries = find_entries("tiny", None, ["systems.unclip.decoder.model.text=clip"], None)
    names = [entry.name for entry in entries]
    assert "unclip/no_caption" in names and "unclip/captions" not in names
    for system in {entry.config.system for entry in entries}:
        for key in find_pipeline(system).variants:
            assert re.fullmatch(r"[a-z0-9_]+", key)


def test_variants_are_completed_after_their_system() -> None:
    context = click.Context(compare.compare)
    option = next(each for each in compare.compare.params if each.name == "systems")

    def completed(start: str) -> list[str]:
        return [item.value for item in option.shell_complete(context, start)]

    assert completed("unclip,gl") == ["unclip,glide"]
    assert completed("unclip,glide/") == ["unclip,glide/clip_guidance", "unclip,glide/inpainting"]
    assert completed("unclip,nothing/") == []


def test_each_setting_that_is_swept_has_a_folder_of_results() -> None:
    settings = ("evaluate.sampling.decoder.num_steps", "evaluate.sampling.prior.num_steps", "guidance_scale")
    names = [compare._folder_name(comparison(row("unclip", 0.9), sweep=Sweep(each, ("1",)))) for each in settings]
    assert len(set(names)) == 3 and names[2] == "demo-sweep-guidance_scale"


def test_the_recorded_command_makes_the_same_rows(tmp_path: Path) -> None:
    given = ["ingest.urls=s3://key:secret@bucket/my list.csv", "dedup.holdout=0.3"]
    options = compare._settings("my run.toml", given)
    [entry] = unclip_entries("unclip/text_embedding")
    result = comparison(row("unclip", 0.9), sweep=Sweep("guidance_scale", ("1", "2")))
    words = compare._command(result, [entry], options)
    store = Store(str(tmp_path))
    store.write_json({"command": words}, "results", "demo-sweep-guidance_scale", "summary.json")
    [remedy] = {item.remedy for item in survey(store) if "results" in item.uri}
    assert shlex.split(remedy.strip("`")) == [
        *("unclip", "compare", "demo", "--systems", "unclip/text_embedding", "--sweep", "guidance_scale=1,2"),
        *("--config", str(Path("my run.toml").absolute()), "--set", "ingest.urls=s3://key@bucket/my list.csv"),
        *("--set", "dedup.holdout=0.3", "--storage", store.root),
    ]


def test_the_documented_row_has_the_keys_of_every_row() -> None:
    assert_alike(row("unclip", 0.9).document(), documented("unclip compare --json")["rows"][0], "a row")


def test_no_training_is_judged_by_the_curve_of_another_network() -> None:
    trained_by_curve: dict[str, list[Any]] = {}
    for entry in find_entries("demo", None, [], None):
        for node in compose(entry.config).values():
            if node.stage.part is not None and (curve := node.config.trainer.reference_curve):
                trained_by_curve.setdefault(curve, []).append(without_operational(node.config))
    assert set(trained_by_curve) == {"demo-prior", "demo-decoder", "demo-upsampler-64"}
    for first, *others in trained_by_curve.values():
        assert others and all(each == first for each in others)


def test_every_entry_samples_the_groups_of_a_comparison() -> None:
    for entry in unclip_entries("unclip", "unclip/text_embedding"):
        found = entry.config.evaluate
        assert (found.num_relations, found.num_repeated, found.num_repeats, found.num_kept) == (4, 2, 4, 6)
        assert (found.num_captions, found.num_unseen) == (16, 4), "as in every evaluation"


def test_a_group_that_every_evaluation_samples_stays_as_it_is() -> None:
    given = ["evaluate.num_repeated=3", "evaluate.num_repeats=5", "evaluate.num_relations=7"]
    [entry] = find_entries("tiny", None, given, None, ("unclip",))
    found = entry.config.evaluate
    assert (found.num_relations, found.num_repeated, found.num_repeats) == (7, 3, 5)


def test_a_sweep_is_one_entry_for_each_value() -> None:
    sweep = Sweep.parse("guidance_scale = 1, 2.5,1")
    assert sweep == Sweep("guidance_scale", ("1", "2.5"))
    entries = unclip_entries("unclip", sweep=sweep)
    assert [(each.value, each.label) for each in entries] == [("1", "unclip, 1"), ("2.5", "unclip, 2.5")]
    assert [each.config.evaluate.sampling.decoder.guidance_scale for each in entries] == [1.0, 2.5]  # type: ignore[attr-defined]
    by_path = unclip_entries("unclip", sweep=Sweep.parse("evaluate.sampling.decoder.guidance_scale=1,2.5"))
    assert [each.config for each in by_path] == [each.config for each in entries]
    for name in compose(entries[0].config):
        assert (settings(entries[0], name) != settings(entries[1], name)) == (name == "evaluate")


def test_trainings_side_by_side_take_the_cpus_that_the_comparison_gives_them() -> None:
    [entry] = find_entries(
        "tiny", None, ["comparison.cpus_per_worker=3", "resources.prior.num_workers=2"], None, ["unclip"]
    )
    resources = entry.config.resources
    found = {name: resources.of(name) for name in ("prior", "decoder", "upsampler-32", "clip", "evaluate")}
    assert {name for name, each in found.items() if each.cpus_per_worker == 3} == {"prior", "decoder", "upsampler-32"}
    assert found["prior"].num_workers == 2, "what the comparison does not name stays as it is"
    shared = DatasetResources(cpus_per_worker=2)
    assert shared.with_cpus("painter", 1) == shared, (
        "the resources of another package's system have no field for its part"
    )


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("unclipp",), {}, "system: got 'unclipp'.*Did you mean 'unclip'"),
        (
            ("unclip/text_embeding",),
            {},
            "got unclip/text_embeding, but .* no such variant. Did you mean 'text_embedding'",
        ),
        (
            ("unclip",),
            {"sweep": Sweep("guidance", ("1",))},
            "got 'guidance', .* no such shortcut. Did you mean 'guidance_sc",
        ),
        ((), {"sweep": Sweep("nothing", ("1",))}, "got 'nothing', a setting that no system has"),
        (
            (),
            {"sweep": Sweep("evaluate.sampling.nothing", ("1",))},
            "got 'evaluate.*nothing', a setting that no system has",
        ),
        (
            ("unclip", "ddpm"),
            {"sweep": Sweep("evaluate.sampling.decoder.num_steps", ("1",))},
            "got 'evaluate.sampling.decoder.num_steps', but the system ddpm has no such setting",
        ),
        (("unclip",), {"sweep": Sweep("guidance_scale", ("-1",))}, "^unclip: .*guidance_scale: got -1"),
    ],
)
def test_what_cannot_be_compared_is_refused(names: tuple[str, ...], options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        unclip_entries(*names, **options)


@pytest.mark.parametrize(
    ("setting", "systems"),
    [
        ("evaluate.sampling.decoder.num_steps", {"unclip"}),
        ("evaluate.sampling.denoiser.num_steps", {"ddpm", "guided_diffusion", "cascaded_diffusion"}),
        (
            "upsamplers.64.trainer.batch_size",
            {"unclip", "glide", "ddpm", "guided_diffusion", "cascaded_diffusion", "imagen"},
        ),
        ("upsamplers.32.trainer.batch_size", {"unclip", "ddpm", "guided_diffusion", "cascaded_diffusion"}),
        ("resources.prior.num_workers", {"unclip", "stable_unclip"}),
        ("systems.glide.evaluate.sampling.glide.num_steps", {"glide"}),
    ],
)
def test_a_sweep_by_path_leaves_out_systems_without_the_setting(setting: str, systems: set[str]) -> None:
    given = ["systems.glide.upsamplers.32=none"]
    entries = find_entries("tiny", None, given, None, sweep=Sweep(setting, ("2", "4")))
    assert {entry.name for entry in entries} == systems and len(entries) == 2 * len(systems)
    path = setting.partition(".glide.")[2] or setting
    assert {str(value_at(entry.config, path)) for entry in entries} == {"2", "4"}


def value_at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config


@pytest.mark.parametrize("text", ["guidance_scale", "=1", "guidance_scale=", "guidance_scale=1,,2"])
def test_a_sweep_has_a_setting_and_values(text: str) -> None:
    with pytest.raises(ConfigError, match="expected setting=value,value"):
        Sweep.parse(text)


def test_images_are_stored_for_the_largest_system_and_other_datasets_are_refused() -> None:
    first, second = unclip_entries("unclip", "unclip/text_embedding")
    larger = dataclasses.replace(second.config.download, image_size=128)
    other = dataclasses.replace(second, config=dataclasses.replace(second.config, download=larger))
    assert {each.config.download.image_size for each in with_one_dataset([first, other])} == {128}
    dedup = dataclasses.replace(second.config.dedup, holdout=0.3)
    other = dataclasses.replace(second, config=dataclasses.replace(second.config, dedup=dedup))
    with pytest.raises(ConfigError, match="unclip/text_embedding: its settings of dedup differ from those of unclip"):
        with_one_dataset([first, other])


@pytest.mark.parametrize("setting", CAPTION_SETTINGS)
def test_entries_with_other_captions_or_seeds_are_refused(setting: str) -> None:
    given = ["evaluate.num_repeated=3", f"systems.glide.evaluate.{setting}=9"]
    with pytest.raises(ConfigError, match=rf"^glide: evaluate\.{setting}: got 9, expected \d+, as for unclip"):
        find_entries("tiny", None, given, None, ("unclip", "glide"))


def test_a_sweep_may_change_the_seed_of_all() -> None:
    entries = find_entries("tiny", None, [], None, ("unclip", "glide"), Sweep("evaluate.seed", ("1", "2")))
    assert [each.config.evaluate.seed for each in entries] == [1, 2, 1, 2]


def lengthened(entry: Entry, stage: str, num_samples: int, **trainer: Any) -> Entry:
    node = compose(entry.config)[stage]
    changed = dataclasses.replace(node.config.trainer, num_samples=num_samples, **trainer)
    config = with_section(entry.config, node.section, dataclasses.replace(node.config, trainer=changed))
    return dataclasses.replace(entry, config=config)


def test_trainings_are_made_equal_to_those_of_the_first() -> None:
    [first] = unclip_entries("unclip")
    entries = [first, lengthened(first, "prior", 480), lengthened(first, "upsampler-64", 192)]

    def lengths(entry: Entry) -> dict[str, int]:
        return {each.stage: each.num_samples for each in trainings(entry.config)}

    def flops(entry: Entry) -> float:
        return sum(each.flops for each in trainings(entry.config))

    assert equalise(entries, None) == entries
    by_samples, by_flop = equalise(entries, "samples"), equalise(entries, "flop")
    assert by_samples[:2] == by_flop[:2] == entries[:2], "the first, and one that costs nearly as much"
    assert lengths(by_samples[2]) == lengths(first), "the costliest part"
    assert flops(entries[2]) < 0.9 * flops(first)
    assert flops(by_flop[2]) == pytest.approx(flops(first), rel=0.05), "in whole batches"
    before, after = lengths(entries[2]), lengths(by_flop[2])
    assert all(before[name] < after[name] < 1.25 * before[name] for name in before), "all parts are trained for longer"
    assert after["prior"] % 32 == 0 and after["upsampler-64"] % 16 == 0


def row(name: str, quality: float, value: str | None = None, system: str | None = "unclip") -> Row:
    accuracy = {"accuracy.colour": quality, "accuracy.shape": 0.5}
    heldout = {**accuracy, "clip_score": quality, "clip_frechet_distance": 1 - quality}
    metrics = {"heldout": heldout, "repeated": {"pairwise_distance": 0.1}}
    sizes = (Training("one", 46_000, 1e9, 3_000_000), Training("two", 64_000, 1e8, 800_000)) if system else ()
    images = np.full((2, 4, 4, 3), 200, np.uint8)
    return Row(name, name, system, value, metrics, sizes, 12.0, 0.05, images, [True, False])


def comparison(*rows: Row, sweep: Sweep | None = None) -> Comparison:
    every = [row(REAL, 1.0, system=None), *rows]
    counts = {"heldout": 256, "repeated": 128}
    failures = {"ddpm": "it <failed>\n![x](http://x.example)"}
    return Comparison("demo", "/s", None, sweep, every, CAPTIONS, ["k", "l"], counts, failures, {}, {})


def test_tables_tell_the_best_system_and_what_failed() -> None:
    found = comparison(row("unclip", 0.95), row("other", 0.9))
    text = page.text(found)
    assert re.search(r"^real images +1\.000 +0\.500$", text, re.MULTILINE)
    assert re.search(r"^unclip +0\.950 +0\.500$", text, re.MULTILINE)
    assert re.search(r"^unclip +3\.8M +110k +5\.24e13 +12 +0\.05$", text, re.MULTILINE)
    assert "place" not in text and "unseen combinations" not in text, "columns without a value are left out"
    assert "256 held-out, 128 repeated" in text and max(map(len, text.splitlines()[1:])) < 100
    table = page.markdown(found)
    assert "| real images | 1.000 | 0.500 |" in table, "real images do not compete"
    assert "| unclip | **0.950** | 0.500 |" in table, "what all have distinguishes none"
    assert "**0.0500**" in table and "**0.1000**" not in table, "a smaller distance is better"
    assert r"Failed: ddpm: it \<failed\> \!\[x\]\(http://x.example\)" in table, "messages quote what others wrote"
    html = page.page(found, ["previews/images.png"])
    assert html.count('class="best') == 3 and "it &lt;failed&gt;" in html and 'src="previews/images.png"' in html
    bounds = [dataclasses.replace(row(name, 0.5), bits_per_dim=bits) for name, bits in (("one", 4.6), ("two", 4.7))]
    table = page.markdown(comparison(row("unclip", 0.95), *bounds))
    assert "bits per dimension" in table and "**4.600**" in table and "| 4.700" in table and "bits" not in text
    measured = dataclasses.replace(row("unclip", 0.95), intervals={"heldout": {"clip_score": (0.94, 0.9613)}})
    html = page.page(comparison(measured), [])
    assert html.count("title=") == 1 and '<td title="95 %: 0.940 to 0.961">0.950</td>' in html.replace(
        ' class="start"', ""
    )
    assert measured.document()["intervals"] == {"heldout": {"clip_score": (0.94, 0.9613)}}
    alone = page.markdown(comparison(row("unclip", 0.95)))
    assert "**" not in alone, "one system has no rival"


def num_red(image: np.ndarray) -> int:
    return int(((image[..., 0] > 190) & (image[..., 1] < 60)).sum())


def test_figures_are_images() -> None:
    found = comparison(row("unclip", 0.95), row("other", 0.9))
    small, large = (imaging.from_png(page.draw_images(each)) for each in (comparison(row("unclip", 0.95)), found))
    assert large.shape[1] == small.shape[1] and large.shape[0] > small.shape[0], "a row for each system"
    right = dataclasses.replace(found, rows=[dataclasses.replace(each, correct=[True, True]) for each in found.rows])
    assert num_red(large) > num_red(small) > 0 == num_red(imaging.from_png(page.draw_images(right))), "wrong images"
    assert imaging.from_png(page.draw_table(found)).shape[2] == 3
    sweep = Sweep("evaluate.sampling.x.guidance_scale", ("1", "2"))
    rows = [row(name, 0.9, value) for name in ("unclip", "other") for value in sweep.values]
    assert imaging.from_png(page.draw_sweep(comparison(*rows, sweep=sweep))).ndim == 3
    words = Sweep("sampler", ("ddim", "ddpm"))
    rows = [row("unclip", 0.9, value) for value in words.values]
    assert imaging.from_png(page.draw_sweep(comparison(*rows, sweep=words))).ndim == 3


def test_a_system_without_a_metric_has_a_line_without_points() -> None:
    others = [row("unclip", 0.95, value) for value in ("1", "2")]
    scores = {"heldout": {"clip_score": 0.5}}
    unknown = dict.fromkeys(others[0].metrics["heldout"], math.nan)
    lacking, not_a_number = (
        comparison(Row("ddpm", "ddpm", "ddpm", "1", metrics), *others, sweep=Sweep("x", ("1", "2")))
        for metrics in (scores, {"heldout": unknown | scores["heldout"]})
    )
    assert page.draw_sweep(lacking) == page.draw_sweep(not_a_number)


def test_the_exit_code_is_that_of_the_failures_if_they_agree() -> None:
    one, other = InputError("a"), StageError("b")
    assert error_of({"x": one}).exit_code == InputError.exit_code
    assert error_of({"x": one, "y": other}).exit_code == 1 and str(error_of({"x": one, "y": other})) == "x: a\ny: b"
