"""Pipelines of the systems that sample small images from classes, or from nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import load
from pipelines.pipeline import compose
from tests.pipelines.command_line import call, call_apart, call_json
from unclip.config import without_operational
from unclip.errors import ConfigError
from unclip.systems import cascaded_diffusion, ddpm, guided_diffusion
from unclip.systems.classifier import CLASSIFIER
from unclip.systems.denoiser import DENOISER

SCENES = ("ingest.urls=pairs",)


def trained(config: Any) -> list[str]:
    return [name for name, node in compose(config).items() if node.stage.part is not None]


def test_guided_diffusion_shares_classes_and_noise_between_its_parts_and_the_upsampler_with_unclip() -> None:
    config: Any = load("demo", system="guided_diffusion")
    assert trained(config) == ["denoiser", "classifier", "upsampler-64"]
    assert config.classes.source == config.denoiser.classes.source == config.classifier.classes.source == "scenes"
    upsampler = load("demo").upsamplers["64"]  # type: ignore[attr-defined]
    assert without_operational(config.upsamplers["64"]) == without_operational(upsampler)
    sampling = config.evaluate.sampling
    assert (sampling.denoiser.num_steps, sampling.denoiser.classifier_scale) == (25, 1.0)
    changes = ("denoiser.model.diffusion.schedule=linear", "denoiser.model.diffusion.num_timesteps=500")
    config = load(
        "demo", None, (*changes, 'classes={source="names", names=["red", "blue"]}'), system="guided_diffusion"
    )
    process = config.classifier.model.diffusion
    assert (process.schedule, process.num_timesteps) == ("linear", 500)
    assert config.denoiser.classes.names == config.classifier.classes.names == ("red", "blue")


@pytest.mark.parametrize(
    ("system", "change", "message"),
    [
        ("guided_diffusion", "classes.source=none", r"classes\.source: got 'none', expected captions, scenes or names"),
        ("guided_diffusion", "classifier.classes.source=captions", "expected nothing here, but the section classes"),
        (
            "guided_diffusion",
            "classifier.model.diffusion.num_timesteps=500",
            r"^classifier\.model\.diffusion\.num_timesteps: got 500, expected 1000, as in denoiser\.model\.diffusion",
        ),
        ("guided_diffusion", "classifier.model.diffusion.schedule=linear", "schedule: got 'linear', expected 'cosine'"),
        ("guided_diffusion", "classes=scenes", "classes: got 'scenes', expected a section"),
        ("guided_diffusion", "model_size=dalle2", "model_size: got 'dalle2'"),
        (
            "unclip",
            "upsamplers.64.classes.source=scenes",
            r"^upsamplers\.64\.classes: got 'scenes', expected none, since",
        ),
        ("ddpm", "upsamplers.64.classes.source=scenes", "this system has no classes"),
        ("guided_diffusion", "upsamplers.64.classes.source=captions", "got 'captions', expected none or scenes"),
        ("ddpm", "denoiser.classes.source=scenes", "captions do not count in this system"),
        ("ddpm", "evaluate.sampling.denoiser.classifier_scale=1", "this system has no classifier"),
        ("ddpm", "classes.source=scenes", "classes: unknown setting"),
        ("ddpm", "resources.classifier.num_workers=2", r"resources\.classifier: unknown setting"),
        ("cascaded_diffusion", "resources.classifier.num_workers=2", r"resources\.classifier: unknown setting"),
    ],
)
def test_settings_that_do_not_fit_the_system_are_refused(system: str, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("demo", None, (change,), system=system)


def test_ddpm_and_improved_ddpm_are_settings_of_one_system() -> None:
    config: Any = load("text_to_image", None, (*SCENES, "model_size=small"), system="ddpm")
    assert trained(config) == ["denoiser"]
    assert config.denoiser.model.diffusion == ddpm.DDPM and config.denoiser.measures_bits_per_dim
    improved = load("text_to_image", None, (*SCENES, "model_size=base"), system="ddpm")
    assert improved.denoiser.model.diffusion == ddpm.IMPROVED_DDPM  # type: ignore[attr-defined]
    bound = ("denoiser.model.diffusion.vlb_only=true", "denoiser.model.diffusion.timestep_sampling=loss_aware")
    assert load("demo", None, bound, system="ddpm").denoiser.model.diffusion.vlb_only  # type: ignore[attr-defined]


def test_the_size_base_has_the_published_number_of_weights() -> None:
    """Dhariwal & Nichol 2021, Tables 11 and 12, for 64 pixels: 296 M and, for the classifier, 65 M."""
    config: Any = load("text_to_image", None, (*SCENES, "model_size=base"), system="guided_diffusion")
    counts = {}
    with torch.device("meta"):
        for part in (DENOISER, CLASSIFIER):
            network = part.network(getattr(config, part.name), None).build()  # type: ignore[arg-type]
            counts[part.name] = round(sum(each.numel() for each in network.parameters()) / 1e6)
    assert counts == {"denoiser": 296, "classifier": 65}


def test_cascaded_diffusion_shares_its_denoiser_with_guided_diffusion() -> None:
    config: Any = load("demo", system="cascaded_diffusion")
    assert trained(config) == ["denoiser", "upsampler-64"]
    other: Any = load("demo", system="guided_diffusion")
    assert without_operational(config.denoiser) == without_operational(other.denoiser)
    upsampler = config.upsamplers["64"]
    assert upsampler.classes == config.denoiser.classes == config.classes and config.classes.source == "scenes"
    assert upsampler.model.max_noise_level == 300 and config.evaluate.sampling.upsamplers["64"].noise_level == 100
    small: Any = load("text_to_image", None, (*SCENES, "model_size=small"), system="cascaded_diffusion")
    assert [each.model.low_res_size for each in small.upsamplers.values()] == [32, 64]
    assert [each.model.reads_blur for each in small.upsamplers.values()] == [False, True]
    change = ("evaluate.sampling.upsamplers.64.blur_sigma=0.5",)
    with pytest.raises(
        ConfigError, match=r"blur_sigma: got 0\.5, expected at most 0, the strongest blur that its network"
    ):
        load("demo", None, change, system="cascaded_diffusion")


def test_all_sizes_give_a_pipeline() -> None:
    for module in (guided_diffusion, ddpm, cascaded_diffusion):
        for size in module.MODEL_SIZES:
            assert trained(load("text_to_image", None, (*SCENES, f"model_size={size}"), system=module.SYSTEM.name))


SMALLER = """\
[scenes]
num_images = 80
broken = 0
port = 8769

[upsamplers]
32 = "none"

[resources]
embed.num_workers = 1
evaluate.num_workers = 1

[evaluate]
num_captions = 8
"""


@pytest.mark.slow
def test_all_systems_run_on_one_dataset_from_a_list_to_samples(tmp_path: Path) -> None:
    storage, out, run_file = tmp_path / "storage", tmp_path / "grid.png", tmp_path / "smaller.toml"
    run_file.write_text(SMALLER)
    captions = {"guided_diffusion": "red circle", "cascaded_diffusion": "a blue star", "ddpm": "anything"}
    for system, caption in captions.items():
        options = ("tiny", "--system", system, "--config", run_file, "--storage", storage)
        result = call_apart("run", *options)
        assert result.returncode == 0, result.stdout + result.stderr
        document = call_json("plan", *options)
        assert {stage["state"] for stage in document["stages"]} == {"cached"}
        result = call("sample", caption, "--num", 2, "--model", f"{system}-tiny", "--out", out, "--storage", storage)
        assert result.returncode == 0 and out.exists(), result.stderr
    # the denoiser of both class-conditional systems is one, and so is the upsampler of the others
    for stage, count in {"embed": 1, "denoiser": 2, "classifier": 1, "upsampler-64": 2, "evaluate": 3}.items():
        assert len(list((storage / "stages" / stage).glob("*.json"))) == count, stage
    result = call("sample", "a dog", "--model", "guided_diffusion-tiny", "--out", out, "--storage", storage)
    assert (
        result.returncode == 2 and "belongs to no class of this model" in result.stderr and "blue star" in result.stderr
    )
