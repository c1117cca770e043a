"""Pipelines of the systems that sample latents: names, settings, sizes, and a run from images to a published stack."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.config import load
from pipelines.pipeline import compose
from pipelines.preset import full_system_name
from pipelines.workload import workload
from tests.pipelines.command_line import call, call_apart, call_json
from tests.unclip.systems.sized import count_parameters, num_parameters, shapes
from unclip.config import without_operational
from unclip.errors import ConfigError
from unclip.models.autoencoder import Autoencoder
from unclip.systems.latent_diffusion import LATENT_DIFFUSION
from unclip.systems.latent_sizes import LATENT_DIFFUSION_SIZES, STABLE_UNCLIP_SIZES, ParameterCounts
from unclip.systems.stable_unclip import STABLE_UNCLIP

SIZES = [
    *((LATENT_DIFFUSION, "latent_diffusion", name, size) for name, size in LATENT_DIFFUSION_SIZES.items()),
    *((STABLE_UNCLIP, "stable_unclip", name, size) for name, size in STABLE_UNCLIP_SIZES.items()),
]


def trained(config: Any) -> list[str]:
    return [name for name, node in compose(config).items() if node.stage.part is not None]


def test_a_beginning_or_hyphens_name_a_system() -> None:
    found = [load("demo", system=name).system for name in ("latent", "stable-unclip", "unclip", "guided-diffusion")]
    assert found == ["latent_diffusion", "stable_unclip", "unclip", "guided_diffusion"]
    assert full_system_name("nothing") == "nothing" and full_system_name("") == ""
    with pytest.raises(ConfigError, match=r"got 'g', with which glide, guided_diffusion.* begin\. Give more letters"):
        load("demo", system="g")
    change = "systems.stable-unclip.latents.batch_size=3"
    changed: Any = load("demo", None, (change,), system="stable")
    assert changed.latents.batch_size == 3 and load("demo", None, (change,)).system == "unclip"


def test_the_generators_of_the_demo_share_an_autoencoder_and_the_prior_is_that_of_unclip() -> None:
    latent, stable, unclip = (load("demo", system=name) for name in ("latent", "stable", "unclip"))
    assert trained(latent) == ["autoencoder", "latent_diffusion"]
    assert trained(stable) == ["prior", "autoencoder", "stable_unclip"]
    nodes, others, own = compose(latent), compose(stable), compose(unclip)
    for name in ("autoencoder", "latents", "clip", "download"):
        assert without_operational(nodes[name].config) == without_operational(others[name].config), name
    assert without_operational(others["prior"].config) == without_operational(own["prior"].config)
    assert nodes["latent_diffusion"].parents == ("curate", "clip", "autoencoder", "latents")
    assert nodes["evaluate"].parents == ("curate", "clip", "clip", "autoencoder", "latent_diffusion")


@pytest.mark.parametrize(
    ("system", "change", "message"),
    [
        ("latent", "autoencoder.model.bottleneck=vq", r"autoencoder\.model\.bottleneck: got 'vq', expected kl"),
        ("latent", "latent_diffusion.model.latent_channels=3", r"latent_channels: got 3, expected 4, as many as"),
        ("stable", "stable_unclip.model.unet.image_size=8", r"image_size: got 8, expected 16, the size of"),
        ("latent", "latent_diffusion.model.reads_image_embedding=true", "this system has no prior"),
        ("stable", "stable_unclip.model.reads_image_embedding=false", "as the network reads no image embedding"),
        ("latent", "evaluate.sampling.latent_diffusion.noise_level=1", "expected 0, as the generator reads no image"),
        ("stable", "evaluate.sampling.stable_unclip.noise_level=1", "expected at most 0, the max_noise_level"),
        ("latent", "upsamplers.96={}", "got 96, expected a multiple of 64, the output resolution of the autoencoder"),
        ("latent", "model_size=dalle2", "model_size: got 'dalle2'"),
        ("latent", "autoencoder=3", "autoencoder: got 3, expected a section"),
    ],
)
def test_settings_that_do_not_fit_are_refused(system: str, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("demo", None, (change,), system=system)


@pytest.mark.parametrize(("part", "system", "name", "size"), SIZES, ids=[f"{each[1]}-{each[2]}" for each in SIZES])
def test_sizes_have_the_number_of_parameters_in_the_table_and_reach_a_run(
    part: Any, system: str, name: str, size: Any
) -> None:
    clip = shapes(size)
    found = num_parameters(Autoencoder(size.autoencoder.model)), count_parameters(part.network(size.generator, clip))
    assert ParameterCounts(*found) == size.num_parameters
    config: Any = load("text_to_image", None, ("ingest.urls=unknown", f"model_size={name}"), system=system)
    assert config.autoencoder == size.autoencoder and getattr(config, system) == size.generator
    assert config.evaluate.sampling == size.sampling and config.download.image_size >= size.autoencoder.model.image_size
    assert config.latents.min_reconstruction_accuracy == size.min_reconstruction_accuracy


def test_the_autoencoder_of_base_is_that_of_the_paper() -> None:
    """83.65 M parameters: the autoencoder of Rombach et al. 2022 with a factor of 8, as Stable Diffusion has it."""
    assert LATENT_DIFFUSION_SIZES["base"].num_parameters.autoencoder == 83_653_863


def test_the_generator_of_stable_diffusion_has_the_size_of_the_published_network() -> None:
    """859,520,964 parameters: UNet2DConditionModel with the settings of Stable Diffusion 1; its text encoder is not counted."""
    assert LATENT_DIFFUSION_SIZES["stable_diffusion"].num_parameters.generator == 859_520_964


def test_stable_unclip_adds_the_layers_of_the_image_embedding_to_that_generator() -> None:
    """863,128,004 parameters: embedding and noise level, of 768 numbers each, through two layers to the 1,280 of the timestep."""
    size, published = (sizes["stable_diffusion"] for sizes in (STABLE_UNCLIP_SIZES, LATENT_DIFFUSION_SIZES))
    added = (2 * 768 + 1) * 1280 + (1280 + 1) * 1280
    assert size.num_parameters.generator == published.num_parameters.generator + added == 863_128_004
    assert size.autoencoder == published.autoencoder and size.prior.clip == size.clip == published.clip


def test_work_is_counted_and_trainings_wait_for_the_autoencoder() -> None:
    work = workload(load("demo", system="stable"))
    after = {training.name: training.after for training in work.trainings}
    assert after == {"prior": (), "autoencoder": (), "stable_unclip": ("autoencoder", "latents")}
    assert all(training.flops_per_sample > 1e6 for training in work.trainings) and work.caption_flops > 1e6


RUN_FILE = """\
system = "latent"

[scenes]
num_images = 60
broken = 0
port = 8822

[clip]  # the model is that of the preset, as all systems share it
trainer.num_samples = 128

[resources]
embed.num_workers = 1
evaluate.num_workers = 1

[evaluate]
num_captions = 8
"""


@pytest.mark.slow
def test_latent_diffusion_is_trained_published_and_sampled(tmp_path: Path) -> None:
    run_file, storage, out = tmp_path / "latent.toml", tmp_path / "storage", tmp_path / "grid.png"
    run_file.write_text(RUN_FILE)
    result = call_apart("run", "tiny", "--config", run_file, "--storage", storage)
    assert result.returncode == 0, result.stdout + result.stderr
    document = call_json("plan", "tiny", "--config", run_file, "--storage", storage)
    assert {stage["state"] for stage in document["stages"]} == {"cached"}
    result = call("sample", "a large red circle on a blue background", "--out", out, "--storage", storage)
    assert result.returncode == 0 and out.exists(), result.stderr
    assert call("verify", "--storage", storage).returncode == 0

    assignment = ("--set", "latents.min_reconstruction_accuracy=1")
    result = call_apart("run", "tiny", "--config", run_file, "--storage", storage, *assignment)
    assert result.returncode != 0 and "No generator of these latents can do better" in result.stdout + result.stderr
