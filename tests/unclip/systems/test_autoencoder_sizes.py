"""Sizes of autoencoders: counts of parameters, factors, and the memory of their training."""

import io
from typing import Any

import pytest
import torch
from PIL import Image

from tests.unclip.systems.sized import num_parameters
from tests.unclip.training.test_memory import LiveMemory, kept_bytes, saved_bytes
from unclip.config import load, to_dict
from unclip.models import clip as clip_models
from unclip.models.autoencoder import Autoencoder
from unclip.models.perceptual import ClipDistance, LpipsDistance, PerceptualDistance
from unclip.models.text import TextShape
from unclip.systems.autoencoder import AUTOENCODER, AutoencoderStageConfig
from unclip.systems.autoencoder.part import AutoencoderObjective
from unclip.systems.autoencoder.sizes import DEMO_KL, DEMO_VQ, MODEL_SIZES
from unclip.systems.part import Shapes
from unclip.training import memory, parallel
from unclip.training.memory import TrainingSetup
from unclip.training.precision import Precision, autocast

SHAPES = Shapes(1, TextShape(1, 1, 1), "unclip-demo")
ADVERSARIAL = load(
    AutoencoderStageConfig,
    {
        "model": to_dict(DEMO_VQ.model) | {"patch_size": 1, "channel_mult": (1, 2), "channels": 32, "image_size": 32},
        "discriminator": {"weight": 0.5, "model": {"channels": 32}},
        "perceptual": {"weight": 0.0},
    },
)
STAGES = {"demo_kl": DEMO_KL, "demo_vq": DEMO_VQ, "adversarial": ADVERSARIAL}
PERCEPTUAL = {
    network: load(
        AutoencoderStageConfig,
        {
            "model": to_dict(DEMO_KL.model) | {"channels": 32, "image_size": 32},
            "discriminator": {"weight": 0.5, "model": {"channels": 16, "num_layers": 2}},
            "perceptual": {"weight": 1.0, "network": network, "weights": "vgg.safetensors"},
        },
    )
    for network in ("clip", "lpips")
}
SAMPLES = 5


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_sizes_have_their_numbers_of_parameters(name: str) -> None:
    size = MODEL_SIZES[name]
    with torch.device("meta"):
        assert num_parameters(Autoencoder(size.stage.model)) == size.num_parameters
    assert load(AutoencoderStageConfig, to_dict(size.stage)) == size.stage


def test_papers_sizes_are_theirs() -> None:
    """83.7 M parameters of Stable Diffusion's autoencoder, and the factors and codes of the papers."""
    assert round(MODEL_SIZES["stable_diffusion"].num_parameters / 1e6, 1) == 83.7
    models = {name: size.stage.model for name, size in MODEL_SIZES.items()}
    found = {name: (model.factor, model.latent_size, model.bottleneck) for name, model in models.items()}
    assert found == {
        "demo_kl": (4, 16, "kl"),
        "demo_vq": (8, 8, "vq"),
        "base_kl": (8, 32, "kl"),
        "base_vq": (16, 16, "vq"),
        "stable_diffusion": (8, 32, "kl"),
        "vqgan_1024": (16, 16, "vq"),
        "vqgan_16384": (16, 16, "vq"),
        "dalle": (8, 32, "gumbel"),
    }
    assert [models[name].codebook_size for name in ("vqgan_1024", "vqgan_16384", "dalle")] == [1024, 16384, 8192]


@pytest.mark.parametrize("name", ["stable_diffusion", "vqgan_16384"])
def test_papers_sizes_are_those_of_diffusers(name: str) -> None:
    from diffusers import AutoencoderKL, VQModel

    model = MODEL_SIZES[name].stage.model
    levels = len(model.channel_mult)
    settings: dict[str, Any] = {
        "block_out_channels": tuple(model.widths),
        "layers_per_block": model.num_res_blocks,
        "latent_channels": model.latent_channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    with torch.device("meta"):
        if name == "stable_diffusion":
            theirs = AutoencoderKL(**settings)
        else:
            settings["down_block_types"] = ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",)
            settings["up_block_types"] = ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4
            theirs = VQModel(**settings, num_vq_embeddings=model.codebook_size)
    assert num_parameters(theirs) == MODEL_SIZES[name].num_parameters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", STAGES)
def test_a_forward_pass_saves_the_planned_memory(name: str, precision: Precision) -> None:
    network = AUTOENCODER.network(STAGES[name], SHAPES)
    plan = memory.measure(name, network, "cpu", precision)
    model = network.build().to(memory_format=torch.channels_last)
    assert plan.parameters == num_parameters(model)
    inputs = network.inputs(SAMPLES)
    assert saved_bytes(model, inputs, precision) == pytest.approx(plan.activations.at(SAMPLES, False), rel=0.1)
    parallel.checkpoint_activations(model)
    assert saved_bytes(model, inputs, precision) == pytest.approx(plan.activations.checkpointed.at(SAMPLES), rel=0.1)


@pytest.mark.parametrize("name", STAGES)
def test_the_peak_of_a_step_is_within_the_reserve_of_the_plan(name: str) -> None:
    network, training = AUTOENCODER.network(STAGES[name], SHAPES), TrainingSetup()
    plan = memory.measure(name, network, "cpu", "bf16")
    model = network.build()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # from an earlier micro-batch
    inputs = network.inputs(SAMPLES)
    with LiveMemory() as live:
        with autocast("bf16", torch.device("cpu")):
            loss = model(*inputs).float().square().mean()
        loss.backward()
    peak = plan.states(training).total + live.peak
    planned = plan.at(SAMPLES, training)
    assert planned * 0.9 < peak < planned / (1 - memory.RESERVE)


def objective_of(network: str) -> tuple[AutoencoderObjective, PerceptualDistance]:
    """Training with a frozen network of random weights."""
    distance: PerceptualDistance
    if network == "clip":
        distance = ClipDistance(clip_models.create("unclip-demo", None))
    else:
        distance = LpipsDistance.outline().to_empty(device="cpu")
        for parameter in distance.parameters():
            torch.nn.init.normal_(parameter, std=0.01)
    jpeg = io.BytesIO()
    Image.new("RGB", (32, 32)).save(jpeg, "JPEG")
    return AutoencoderObjective(PERCEPTUAL[network], {"jpg": [jpeg.getvalue()]}, distance), distance


@pytest.mark.parametrize(("network", "precision"), [("clip", "fp32"), ("clip", "bf16"), ("lpips", "fp32")])
def test_a_training_with_a_perceptual_loss_takes_the_planned_memory(network: str, precision: Precision) -> None:
    plan = memory.measure(network, AUTOENCODER.network(PERCEPTUAL[network], SHAPES), "cpu", precision)
    objective, distance = objective_of(network)
    model, training = objective.model.train(), TrainingSetup()
    assert plan.parameters == num_parameters(model) and plan.frozen_bytes == 4 * num_parameters(distance)
    tensors, generator = {"images": torch.rand(SAMPLES, 3, 32, 32) * 2 - 1}, torch.Generator()
    kept = kept_bytes(
        lambda: objective.loss(model, tensors, generator), [*model.parameters(), *distance.parameters()], precision
    )
    assert kept == pytest.approx(plan.activations.at(SAMPLES, False), rel=0.1)
    assert plan.activations.frozen.at(SAMPLES) > 0.2 * kept
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # from an earlier micro-batch
    with LiveMemory() as live:
        with autocast(precision, torch.device("cpu")):
            loss = objective.loss(model, tensors, generator)
        loss.backward()
    planned = plan.at(SAMPLES, training)
    assert planned * 0.9 < plan.states(training).total + live.peak < planned / (1 - memory.RESERVE)
