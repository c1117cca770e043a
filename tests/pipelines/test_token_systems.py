"""Pipelines of the systems that sample tokens: settings, sizes, and a run from images to published stacks."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.config import load
from pipelines.pipeline import compose, find_pipeline
from pipelines.workload import workload
from tests.pipelines.command_line import call, call_apart, call_json
from unclip.config import without_operational
from unclip.errors import ConfigError
from unclip.systems.dalle import MODEL_SIZES as DALLE_SIZES
from unclip.systems.parti import MODEL_SIZES as PARTI_SIZES

SYSTEMS = ["dalle", "parti"]
ALL_SIZES = [*(("dalle", size) for size in DALLE_SIZES), *(("parti", size) for size in PARTI_SIZES)]


def test_the_systems_of_the_demo_share_an_autoencoder_and_its_tokens() -> None:
    dalle, parti, unclip = (compose(load("demo", system=name)) for name in (*SYSTEMS, "unclip"))
    for name in ("autoencoder", "latents", "clip", "download", "curate"):
        assert without_operational(dalle[name].config) == without_operational(parti[name].config), name
    assert without_operational(dalle["download"].config) == without_operational(unclip["download"].config)
    assert [name for name, node in dalle.items() if node.stage.part is not None] == ["autoencoder", "dalle"]
    assert dalle["dalle"].parents == ("curate", "clip", "autoencoder", "latents")
    assert parti["evaluate"].parents == ("curate", "clip", "clip", "autoencoder", "parti")


@pytest.mark.parametrize(("system", "size"), ALL_SIZES)
def test_a_run_has_the_tokens_of_its_autoencoder(system: str, size: str) -> None:
    config: Any = load("text_to_image", None, ("ingest.urls=unknown", f"model_size={size}"), system=system)
    model, autoencoder = getattr(config, system).model, config.autoencoder.model
    assert (model.grid_size, model.codebook_size) == (autoencoder.latent_size, autoencoder.codebook_size)
    assert config.download.image_size >= autoencoder.image_size
    assert (config.latents.min_reconstruction_accuracy is None) == (size != "demo")


@pytest.mark.parametrize("system", SYSTEMS)
def test_without_a_size_the_autoencoder_has_tokens(system: str) -> None:
    config: Any = load("text_to_image", None, ("ingest.urls=unknown", "model_size=none"), system=system)
    assert config.autoencoder.model.bottleneck == "vq" and getattr(config, system).model.grid_size == 32


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("autoencoder.model.bottleneck=kl", r"autoencoder\.model\.bottleneck: got 'kl', expected vq or gumbel"),
        ("SYSTEM.model.codebook_size=7", r"codebook_size: got 7, expected \d+, that of the autoencoder"),
        ("SYSTEM.model.grid_size=7", r"grid_size: got 7, expected 8, that of the autoencoder"),
        ("autoencoder=3", "autoencoder: got 3, expected a section"),
        ("evaluate.sampling.SYSTEM.top_p=2", "top_p: got 2"),
        ("evaluate.sampling.batch_size=0", "batch_size: got 0"),
        (
            "download.image_size=32",
            "image_size: got 32, expected at least 64, the output resolution of the autoencoder",
        ),
        ("model_size=dalle2", "model_size: got 'dalle2'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(system: str, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("demo", None, (change.replace("SYSTEM", system),), system=system)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_comparison_shows_what_the_choice_among_candidates_is_worth(system: str) -> None:
    [(key, variant)] = find_pipeline(system).variants.items()
    assert key == "one_candidate" and variant.applies(load("demo", system=system))
    alone: Any = load("demo", None, variant.assignments, system=system)
    assert getattr(alone.evaluate.sampling, system).num_candidates == 1 and not variant.applies(alone)


def test_work_counts_every_candidate_and_both_branches_of_guidance() -> None:
    one, eight, guided = (
        workload(
            load("demo", None, [f"evaluate.sampling.dalle.{change}" for change in changes], system="dalle")
        ).caption_flops
        for changes in (
            ("num_candidates=1", "guidance_scale=1"),
            ("num_candidates=8", "guidance_scale=1"),
            ("num_candidates=8", "guidance_scale=2"),
        )
    )
    per_candidate = (eight - one) / 7
    assert guided - eight == pytest.approx(8 * per_candidate)
    trained = workload(load("demo", system="dalle")).trainings
    assert {each.name: each.after for each in trained} == {"autoencoder": (), "dalle": ("autoencoder", "latents")}
    flops = next(each.flops_per_sample for each in trained if each.name == "dalle")
    assert per_candidate == pytest.approx(flops / 3)


SMALLER = """\
[scenes]
num_images = 60
broken = 0
port = 8823

[clip]
trainer.num_samples = 128

[resources]
embed.num_workers = 1
evaluate.num_workers = 1

[evaluate]
num_captions = 8
"""


@pytest.mark.slow
def test_both_systems_run_on_one_autoencoder_from_a_list_to_samples(tmp_path: Path) -> None:
    storage, out, run_file = tmp_path / "storage", tmp_path / "grid.png", tmp_path / "smaller.toml"
    run_file.write_text(SMALLER)
    for system in SYSTEMS:
        options = ("tiny", "--system", system, "--config", run_file, "--storage", storage)
        result = call_apart("run", *options)
        assert result.returncode == 0, result.stdout + result.stderr
        document = call_json("plan", *options)
        assert {stage["state"] for stage in document["stages"]} == {"cached"}
        result = call(
            "sample", "a blue star", "--num", 2, "--model", f"{system}-tiny", "--out", out, "--storage", storage
        )
        assert result.returncode == 0 and out.exists(), result.stderr
    for stage, count in {"embed": 1, "autoencoder": 1, "latents": 1, "dalle": 1, "parti": 1, "evaluate": 2}.items():
        assert len(list((storage / "stages" / stage).glob("*.json"))) == count, stage
    assert call("verify", "--storage", storage).returncode == 0
