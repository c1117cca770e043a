import dataclasses
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines import config, dag
from pipelines.cluster import worker_resources
from pipelines.commands.train import trained_models
from pipelines.pipeline import compose
from pipelines.prepare import prepare
from pipelines.preset import pipeline_names, results_name
from tasks.stage import Run
from tasks.stages.publish import PublishConfig
from tasks.tracking import Tracker
from unclip.config import to_dict, without_operational
from unclip.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", pipeline_names())
def test_every_preset_makes_a_pipeline(name: str) -> None:
    composed = compose(config.load(name, None, ["ingest.urls=pairs.parquet"]))
    assert next(iter(composed)) == "ingest" and list(composed)[-1] == "publish"
    assert set(dag.up_to(composed, "report")) == {
        "ingest",
        "download",
        "filter",
        "dedup",
        "clip",
        "embed",
        "curate",
        "report",
    }
    models = trained_models(composed)
    assert models == {
        "demo": ["prior", "decoder", "upsampler-64"],
        "text_to_image": ["prior", "decoder", "upsampler-256"],
        "tiny": ["prior", "decoder", "upsampler-32", "upsampler-64"],
    }.get(name)
    assert all("curate" in composed[model].parents for model in models)
    assert not any(set(models) & set(composed[model].parents) for model in models)
    for last in ("evaluate", "publish"):
        assert [parent for parent in composed[last].parents if parent in models] == models


def load_with(*assignments: str) -> config.PipelineConfig:
    return config.load("text_to_image", None, ["ingest.urls=pairs.parquet", *assignments])


ADDED = (
    "prior.model.diffusion.loss=l1",
    "decoder.model.diffusion.loss=huber",
    "upsamplers.256.model.diffusion.loss=l1",
    "prior.model.self_conditioning_coin=batch",
    "prior.model.image_drop_prob=0.1",
    "prior.model.clamp_norm=true",
    "prior.model.text_encodings=false",
    "prior.autoregressive.text_encodings=false",
    "evaluate.sampling.prior.best_by=cosine",
    "evaluate.sampling.image_embedding=text_embedding",
    "evaluate.sampling.decoder.reads_captions=false",
)
"""Settings of diffusion models that were added after the first trainings."""


@pytest.mark.parametrize("assignment", ADDED)
def test_settings_added_later_count_only_if_they_are_changed(assignment: str) -> None:
    """Run files reach them, and what was trained before they existed stays trained."""
    path, _, value = assignment.partition("=")
    before, after = without_operational(load_with()), without_operational(load_with(assignment))
    *sections, name = path.split(".")
    for section in sections:
        before, after = before[section], after[section]
    assert name not in before and str(after[name]).lower() == value
    documents = [(ROOT / "docs" / document).read_text() for document in ("training.md", "sampling.md")]
    assert any(f"{name}`" in document for document in documents)


def sizes(loaded: config.PipelineConfig) -> list[tuple[str, int, int]]:
    return [(name, each.model.low_res_size, each.model.scale) for name, each in loaded.upsamplers.items()]


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        ((), [("256", 64, 4)]),
        (("upsamplers.1024.trainer.num_samples=640",), [("256", 64, 4), ("1024", 256, 4)]),
        (("upsamplers.128.trainer.seed=1",), [("128", 64, 2), ("256", 128, 2)]),
        (("upsamplers.256=none", "upsamplers.512={}"), [("512", 64, 8)]),
        (("upsamplers.256.model.low_res_size=64", "upsamplers.256.model.scale=4"), [("256", 64, 4)]),
        (("decoder.model.unet.image_size=32", "decoder.model.unet.attention_resolutions=[8]"), [("256", 32, 8)]),
        (("upsamplers={}",), []),
    ],
)
def test_upsamplers_are_named_by_output_resolution_and_chained(
    assignments: tuple[str, ...], expected: list[tuple[str, int, int]]
) -> None:
    loaded = load_with(*assignments)
    assert sizes(loaded) == expected
    stages = [f"upsampler-{name}" for name, *_ in expected]
    composed = compose(loaded)
    assert [name for name in composed if name.startswith("upsampler")] == stages
    assert composed["publish"].parents[-len(stages) - 1 :] == ("decoder", *stages)
    assert list(to_dict(loaded)["upsamplers"]) == [name for name, *_ in expected]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("upsamplers.large.trainer.seed=1", "upsamplers.large: got 'large', expected its output resolution"),
        ("upsamplers.model.scale=2", "upsamplers.model: got 'model', expected its output resolution"),
        ("upsamplers.0256={}", "upsamplers.0256: got '0256'"),
        (
            "upsamplers.64={}",
            "upsamplers.64: got 64, expected a multiple of 64, the output resolution of the decoder",
        ),
        ("upsamplers.1000={}", "upsamplers.1000: got 1000, expected a multiple of 256, .* of upsampler-256"),
        (
            "upsamplers.256.model.scale=2",
            r"upsamplers.256.model.scale: got 2, expected 4, since the decoder outputs 64",
        ),
        (
            "upsamplers.1024.model.low_res_size=64",
            r"1024.model.low_res_size: got 64, expected 256, since upsampler-256 outputs",
        ),
        (
            "download.image_size=64",
            "download.image_size: got 64, expected at least 256, the output resolution of upsampler-256",
        ),
        ("download.image_size=many", "download.image_size: got 'many', expected int"),
        ("download=3", "download: got 3, expected a section"),
        ("upsamplers.256.trainer.sed=1", "upsamplers.256.trainer.sed: unknown setting. Did you mean 'seed'?"),
        ("upsamplers.256=3", "upsamplers.256: got 3, expected a section with model, trainer"),
        ("upsamplers.256.model=3", "upsamplers.256.model: got 3, expected a section with unet"),
        ("upsamplers=3", "upsamplers: got 3, expected a section of named sections"),
        ("upsampler.trainer.seed=1", "upsampler: unknown setting. Did you mean 'upsamplers'?"),
        ("decoder=3", "decoder: got 3, expected a section"),
        ("decoder.model.unet.image_size=many", "decoder.model.unet.image_size: got 'many', expected int"),
        ("resources.upsamplers.265.num_workers=2", "resources.upsamplers.265: no such upsampler. Did you mean '256'?"),
    ],
)
def test_inconsistent_resolutions_are_refused_by_name(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^.*{message}"):
        load_with(assignment)


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        ((), 256),
        (("upsamplers.1024={}",), 1024),
        (("upsamplers={}",), 64),
        (("upsamplers={}", "decoder.model.unet.image_size=32", "decoder.model.unet.attention_resolutions=[8]"), 64),
        (("upsamplers.512={}", "download.image_size=768"), 768),
    ],
)
def test_images_are_stored_large_enough_for_the_last_model(assignments: tuple[str, ...], expected: int) -> None:
    assert load_with(*assignments).download.image_size == expected


def test_every_upsampler_can_have_its_own_resources() -> None:
    resources = load_with("upsamplers.1024={}", "resources.upsamplers.1024.num_workers=3").resources
    assert resources.of("upsampler-1024").num_workers == 3 and resources.of("upsampler-256").num_workers == 1


def test_the_run_file_for_kubernetes_is_valid(tmp_path: Path) -> None:
    [run_file] = [
        document["data"]["run.toml"]
        for document in yaml.safe_load_all((ROOT / "infra" / "kubernetes" / "config.yaml").read_text())
        if "run.toml" in document["data"]
    ]
    (tmp_path / "run.toml").write_text(run_file)
    with pytest.raises(ConfigError, match=r"/models/.* does not exist"):  # it exists on the cluster
        config.load("text_to_image", str(tmp_path / "run.toml"))
    loaded = config.load("text_to_image", str(tmp_path / "run.toml"), ["clip.pretrained=openai"])
    assert loaded.storage == "/data/unclip" and loaded.ingest.urls == "/data/pairs.parquet"


def test_later_sources_of_settings_win(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('storage = "from-file"\n[prior.trainer]\nseed = 5\nbatch_size = 7\n')
    loaded = config.load("tiny", str(tmp_path / "run.toml"), ["prior.trainer.seed=6"])
    assert (loaded.storage, loaded.prior.trainer.seed, loaded.prior.trainer.batch_size) == ("from-file", 6, 7)
    assert loaded.prior.model.num_heads == 4  # from demo, which tiny extends
    assert config.load("tiny", None, [], "elsewhere").storage == "elsewhere"


def test_the_diagrams_of_the_dag_show_every_stage() -> None:
    composed = compose(config.load("demo"))
    labels = {name: "cached" if name == "ingest" else "to run" for name in composed}
    text = dag.mermaid(composed, labels)
    assert all(name in text for name in composed) and "dedup --> embed" in text
    assert dag.render_png(composed, labels).startswith(b"\x89PNG")
    assert dag.render_png(dag.up_to(composed, "filter")).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["evaluate.sampling.upsamplers.512.num_steps=5"], "upsamplers.512: no such upsampler. Valid names: 64."),
        (["evaluate.sampling.upsamplers.64.noise_level=5"], "noise_level: got 5, expected at most 0"),
        (
            ["prior.model.clip_range=none", "evaluate.sampling.prior.thresholding=dynamic"],
            "thresholding: got 'dynamic', expected static or none",
        ),
        (["decoder.preview.sampler=analytic_dpm"], "decoder.preview.sampler: got 'analytic_dpm'"),
        (["upsamplers.64.preview.sampler=analytic_dpm"], "upsamplers.64.preview.sampler: got 'analytic_dpm'"),
        (["decoder.preview.clip_guidance_scale=1.0"], "preview.clip_guidance_scale: got 1.0, expected 0"),
    ],
)
def test_sampling_that_the_models_do_not_support_is_refused_before_training(
    assignments: list[str], expected: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        config.load("demo", None, assignments)


@pytest.mark.parametrize("name", ["demo", "tiny"])  # sampling settings of a model size, and of a preset
def test_an_upsampler_that_is_left_out_has_no_sampling_settings(name: str) -> None:
    loaded = config.load(name, None, ["upsamplers.64=none"])
    assert "64" not in loaded.upsamplers and loaded.upsamplers.keys() == loaded.evaluate.sampling.upsamplers.keys()  # type: ignore[attr-defined]
    loaded = config.load(name, None, ["upsamplers={}"])
    assert loaded.upsamplers == loaded.evaluate.sampling.upsamplers == {}  # type: ignore[attr-defined]


def test_workers_get_resources_without_importing_the_system(tmp_path: Path) -> None:
    """A task of the dataset half needs no torch."""
    run = Run("id", "demo", str(tmp_path), Tracker("", ""), "0", worker_resources(config.load("demo", None)))
    (tmp_path / "run.pickle").write_bytes(pickle.dumps(run))
    code = (
        "import pickle, sys; run = pickle.load(open(sys.argv[1], 'rb')); print(run.resources['clip'].cpus_per_worker)"
    )
    code += "; assert not {'torch', 'pipelines'} & set(sys.modules)"
    command = [sys.executable, "-c", code, tmp_path / "run.pickle"]
    assert subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout == "2\n"


def test_each_system_has_a_published_model_and_results_of_its_own(tmp_path: Path) -> None:
    loaded = config.load("tiny", None, (), str(tmp_path))
    assert prepare(loaded, read_only=True).publish.name == "unclip-tiny"
    other = dataclasses.replace(loaded, publish=PublishConfig("{system}.{system}"))
    assert prepare(other, read_only=True).publish.name == "unclip.unclip" and PublishConfig().name == "{system}"
    for name in ("{systems}", "a b", ""):
        with pytest.raises(ConfigError, match="name: got"):
            PublishConfig(name)
    assert results_name("tiny", "unclip") == "tiny" and results_name("tiny", "other") == "tiny-other"
