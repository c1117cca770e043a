"""Planned memory against memory measured with real tensors on the CPU."""

import contextlib
import dataclasses
import functools
import os
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.unclip.systems.sized import networks, shapes
from unclip.errors import ConfigError
from unclip.models.dalle import DalleConfig
from unclip.models.discriminator import DiscriminatorConfig
from unclip.models.layers import CausalTransformer, Conv3x3
from unclip.models.parti import PartiConfig
from unclip.models.patch_transformer import PatchTransformerConfig
from unclip.systems.autoencoder import AUTOENCODER
from unclip.systems.autoencoder.part import PerceptualConfig
from unclip.systems.dalle import DALLE, DalleStageConfig
from unclip.systems.imagen.generator import IMAGEN
from unclip.systems.imagen.sizes import MODEL_SIZES as IMAGEN_SIZES
from unclip.systems.imagen.super_resolution import TEXT_UPSAMPLER
from unclip.systems.latent_diffusion import LATENT_DIFFUSION
from unclip.systems.latent_sizes import LATENT_DIFFUSION_SIZES, STABLE_UNCLIP_SIZES
from unclip.systems.parti import PARTI, VIT_VQGAN, PartiStageConfig
from unclip.systems.stable_unclip import STABLE_UNCLIP
from unclip.systems.unclip.sizes import MODEL_SIZES
from unclip.training import memory, parallel
from unclip.training.flops import flops_per_sample, peak_of
from unclip.training.memory import Activations, Bytes, ModelMemory, TrainingSetup
from unclip.training.precision import Precision, autocast

CPU = torch.device("cpu")
SHALLOW = MODEL_SIZES["demo"]
# Eight blocks: with fewer, temporaries would be more than a tenth of the memory.
PRIOR = dataclasses.replace(SHALLOW.prior, model=dataclasses.replace(SHALLOW.prior.model, depth=8))
DEMO = networks(dataclasses.replace(SHALLOW, prior=PRIOR))
DEMO["latent_diffusion"] = LATENT_DIFFUSION.network(LATENT_DIFFUSION_SIZES["demo"].generator, shapes(SHALLOW))
DEMO["stable_unclip"] = STABLE_UNCLIP.network(STABLE_UNCLIP_SIZES["demo"].generator, shapes(SHALLOW))
SMALL_UNET = dataclasses.replace(
    LATENT_DIFFUSION_SIZES["demo"].generator.model.unet,
    attention="spatial_transformer",
    num_heads=4,
    resampling="convolution",
    scale_shift_norm=False,
)
STABLE_DIFFUSION = dataclasses.replace(
    LATENT_DIFFUSION_SIZES["demo"].generator,
    model=dataclasses.replace(
        LATENT_DIFFUSION_SIZES["demo"].generator.model,
        unet=SMALL_UNET,
        text="clip",
        context_dim=shapes(SHALLOW).text.width,
    ),
)
DEMO["stable_diffusion"] = LATENT_DIFFUSION.network(STABLE_DIFFUSION, shapes(SHALLOW))
DEMO["imagen"] = IMAGEN.network(IMAGEN_SIZES["demo"].imagen, shapes(SHALLOW))
DEMO["super_resolution"] = TEXT_UPSAMPLER.network(IMAGEN_SIZES["demo"].upsamplers[0], shapes(SHALLOW))
SMALL_VIT = dataclasses.replace(
    VIT_VQGAN.model,
    image_size=32,
    latent_channels=8,
    codebook_size=256,
    transformer=PatchTransformerConfig(patch_size=4, width=96, depth=6, num_heads=3),
)
SMALL_DISCRIMINATOR = dataclasses.replace(VIT_VQGAN.discriminator, model=DiscriminatorConfig(8, 2, 4))
DEMO["vit_vqgan"] = AUTOENCODER.network(
    # the frozen network of a perceptual loss is measured in test_autoencoder_sizes
    dataclasses.replace(
        VIT_VQGAN, model=SMALL_VIT, discriminator=SMALL_DISCRIMINATOR, perceptual=PerceptualConfig(0.0)
    ),
    shapes(SHALLOW),
)
TOKENS: dict[str, Any] = {
    "width": 96,
    "depth": 6,
    "num_heads": 3,
    "text_vocab_size": 128,
    "grid_size": 8,
    "codebook_size": 256,
}
DEMO["dalle"] = DALLE.network(DalleStageConfig(DalleConfig(**TOKENS)), shapes(SHALLOW))
DEMO["parti"] = PARTI.network(PartiStageConfig(PartiConfig(**TOKENS, encoder_depth=2)), shapes(SHALLOW))
SAMPLES = 5


@functools.cache
def plan_of(name: str, precision: Precision) -> ModelMemory:
    return memory.measure(name, DEMO[name], "cpu", precision)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def saved_bytes(model: nn.Module, inputs: tuple[Any, ...], precision: Precision) -> int:
    """Bytes of distinct storages that autograd keeps for a real backward pass, without the weights."""
    return kept_bytes(lambda: model(*inputs).float().square().mean(), model.parameters(), precision)


def kept_bytes(loss: Callable[[], Tensor], weights: Iterable[Tensor], precision: Precision) -> int:
    """Bytes of distinct storages that autograd keeps while a loss is computed, without those of the weights."""
    own = {storage(weight) for weight in weights}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if storage(tensor) not in own:
            kept[storage(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(precision, CPU):
        loss()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", DEMO)
def test_a_forward_pass_saves_the_planned_memory(name: str, precision: Precision) -> None:
    plan = plan_of(name, precision)
    model = DEMO[name].build().to(memory_format=torch.channels_last)
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters())
    inputs = DEMO[name].inputs(SAMPLES)
    assert saved_bytes(model, inputs, precision) == pytest.approx(plan.activations.at(SAMPLES, False), rel=0.05)
    parallel.checkpoint_activations(model)
    assert saved_bytes(model, inputs, precision) == pytest.approx(plan.activations.checkpointed.at(SAMPLES), rel=0.05)


@pytest.mark.parametrize("name", ["prior", "autoregressive_prior"])
def test_priors_without_padding_need_less_than_planned(name: str) -> None:
    model, inputs = DEMO[name].build(), DEMO[name].inputs(SAMPLES)
    extra = (None,) if name == "prior" else ()  # no x0 estimate
    tokens = torch.arange(SAMPLES * len(model.positions)).view(SAMPLES, -1)
    mask = next(
        value for value in inputs if isinstance(value, Tensor) and value.shape[1:] == model.text.null_mask.shape
    )
    short = torch.cat([tokens[:, :2], tokens[:, mask.shape[1] :]], dim=1)  # captions of two tokens
    planned = saved_bytes(model, inputs, "fp32")
    assert saved_bytes(model, (*inputs, *extra, tokens.flatten()), "fp32") <= 1.01 * planned
    assert saved_bytes(model, (*inputs, *extra, short.flatten()), "fp32") < 0.9 * planned


class LiveMemory(TorchDispatchMode):
    """Tracks the bytes of all tensors created while it is active, and not of older ones that operations change in place."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                live = tensor.untyped_storage()
                if live._cdata not in self.sizes and live._cdata not in given:
                    self.sizes[live._cdata] = live.nbytes()
                    weakref.finalize(live, self.sizes.pop, live._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return results


@pytest.mark.parametrize("checkpointing", [False, True])
# The gradient of the embedding of 49,408 tokens in latent_diffusion is as large as all activations of so few samples.
@pytest.mark.parametrize("name", [name for name in DEMO if name != "autoregressive_prior"])
def test_the_peak_of_a_step_is_within_the_reserve_of_the_plan(
    monkeypatch: pytest.MonkeyPatch, name: str, checkpointing: bool
) -> None:
    monkeypatch.setattr(Conv3x3, "HAS_TILES", False)  # as on a GPU, autocast makes and holds all copies of weights
    training = TrainingSetup(checkpointing=checkpointing)
    plan = plan_of(name, "bf16")
    model = DEMO[name].build()
    if checkpointing:
        parallel.checkpoint_activations(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # from an earlier micro-batch
    inputs = DEMO[name].inputs(SAMPLES)
    with LiveMemory() as live:
        with autocast("bf16", CPU):
            loss = model(*inputs).float().square().mean()
        loss.backward()
    peak = plan.states(training).total + live.peak
    available = plan.at(SAMPLES, training) / (1 - memory.RESERVE)
    assert plan.at(SAMPLES, training) * 0.95 < peak < available


def test_on_a_gpu_a_transformer_block_needs_the_memory_of_the_closed_form() -> None:
    """Attention scores are not kept; the test needs no GPU."""
    small = MODEL_SIZES["small"]
    plan = memory.measure("prior", networks(small)["prior"])
    width, length = small.prior.model.width, shapes(small).text.length + 4
    # bf16: normed x, q, k, v, attention output, normed x, GELU's input and output of 4 x width; float32: x between the halves
    block = (2 * (1 + 3 + 1 + 1 + 4 + 4) + 4) * width * length
    last = 2 * (1 + 3) * width * length  # computes one token: only normed x, q, k and v have full length
    blocks = [*[block] * 11, last]
    assert [each.per_sample for each in plan.activations.recomputed] == pytest.approx(blocks, rel=0.05)
    block_input = 4 * width * length  # float32 x
    assert plan.activations.full.per_sample == pytest.approx(sum(blocks) + 12 * block_input, rel=0.05)


def test_the_largest_preset_is_planned_without_allocating_it() -> None:
    plan = {name: memory.measure(name, network) for name, network in networks(MODEL_SIZES["dalle2"]).items()}
    assert list(plan) == ["prior", "autoregressive_prior", "decoder", "upsampler-256", "upsampler-1024"]
    counts = MODEL_SIZES["dalle2"].num_parameters
    found = [plan[name].parameters for name in ("prior", "decoder", "upsampler-256", "upsampler-1024")]
    assert found == [counts.prior, counts.decoder, *counts.upsamplers]
    decoder = plan["decoder"]
    fits_ddp = [
        decoder.largest_micro_batch(TrainingSetup(8, "ddp", checkpointing), 80) for checkpointing in (False, True)
    ]
    assert fits_ddp == [0, 0]
    plain, checkpointed = (
        decoder.largest_micro_batch(TrainingSetup(8, "fsdp", checkpointing), 80) for checkpointing in (False, True)
    )
    assert 1 < plain < checkpointed
    for training, number in ((TrainingSetup(8, "fsdp"), plain), (TrainingSetup(8, "fsdp", True), checkpointed)):
        assert decoder.at(number, training) <= 72 * memory.GIB < decoder.at(number + 1, training)
    # bf16 copies of all float32 weights
    assert decoder.activations.full.fixed == pytest.approx(2 * counts.decoder, rel=0.05)


def test_memory_of_each_gpu() -> None:
    activations = Activations(Bytes(200, 10), Bytes(0, 1), (Bytes(20, 2), Bytes(10, 4)))
    model = ModelMemory("model", 100, 10, 30, 60, activations, 0.0)
    single, ddp = model.states(TrainingSetup()), model.states(TrainingSetup(2))
    assert (single.weights, single.gradients, single.moments, single.average, single.exchange) == (
        400,
        400,
        800,
        400,
        0,
    )
    assert model.states(TrainingSetup(1, "fsdp")) == single
    assert ddp == single
    shards = model.states(TrainingSetup(4, "fsdp"))
    assert (shards.weights, shards.gradients, shards.moments, shards.average) == (100, 100, 200, 100)
    assert shards.exchange == 2 * 4 * (10 + 2 * 30)
    accumulating = model.states(TrainingSetup(4, "fsdp", accumulates=True))
    assert accumulating.total == shards.total + 300
    assert activations.at(3, checkpointing=False) == 230
    assert (
        activations.at(3, checkpointing=True) == 3 + 200
    )  # autocast's copies of weights at the end of the forward pass
    assert activations.at(100, checkpointing=True) == 100 + 410  # the second block
    for num_samples, peak in ((1, 4 * 60), (100, 1200)):  # gradient of the largest parameter, activations
        assert model.at(num_samples, TrainingSetup()) == single.total + peak
    assert model.largest_micro_batch(TrainingSetup(), 1e-9) == 0
    assert model.largest_micro_batch(TrainingSetup(), 80) == memory.MAX_MICRO_BATCH


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures the memory of a process on Linux")
def test_f137_ddp_makes_no_copy_of_the_gradients(tmp_path: Path) -> None:
    """Oracle: the memory that this process gains in two steps of a model of 144 MiB."""
    width, depth = 3072, 4
    model, x = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth))), torch.randn(1, width)
    model(x)  # threads and workspaces
    before = resident_bytes()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        network = parallel.distribute(model, "ddp", parallel.Workers(0, 2))
        for _ in range(2):
            network(x).sum().backward()
        gained = resident_bytes() - before
    finally:
        torch.distributed.destroy_process_group()
    plan = ModelMemory("model", depth * width**2, 0, width**2, width**2, Activations(Bytes(0, 0), Bytes(0, 0), ()), 0.0)
    states = plan.states(TrainingSetup(num_gpus=2))
    assert states.gradients + states.exchange == pytest.approx(gained, rel=0.25)


def test_an_unsupported_precision_is_rejected() -> None:
    with pytest.raises(ConfigError, match="precision: got 'auto'"):
        memory.measure("prior", DEMO["prior"], precision="auto")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_match_the_closed_form(device: str) -> None:
    width, depth, length = 16, 3, 7
    with torch.device(device):
        assert flops_per_sample(nn.Linear(8, 5), torch.zeros(4, 8)) == 3 * 2 * 8 * 5
        model, x = CausalTransformer(width, depth, num_heads=2), torch.zeros(4, length, width)
        keep = torch.ones(4, length, dtype=torch.bool)
        found = flops_per_sample(model, x, keep)
        packed = flops_per_sample(model, x, keep, kept=torch.arange(10))
    products = 2 * 12 * width**2  # per token: qkv, output and MLP
    attention = 2 * 2 * length * width  # per token: scores and values
    assert found == 3 * depth * length * (products + attention)
    assert packed == 3 * depth * (10 / 4 * products + length * attention), "skipped tokens are not counted"


@pytest.mark.parametrize("autocast_type", [None, "cpu"])
@pytest.mark.parametrize("name", ["decoder", "upsampler-64"])
def test_f139_flops_of_u_nets_on_the_meta_device_are_those_on_the_cpu(name: str, autocast_type: str | None) -> None:
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model, inputs = DEMO[name].build(), DEMO[name].inputs(2)
            with contextlib.nullcontext() if autocast_type is None else torch.autocast(autocast_type, torch.bfloat16):
                found.append(flops_per_sample(model, *inputs))
    assert found[0] == found[1] > 0


def test_f139_devices_have_the_peaks_of_their_data_sheets() -> None:
    """Dense bf16, which is half of what the vendors state with sparsity."""
    peaks = {
        "NVIDIA H100 80GB HBM3": 1979 / 2,
        "NVIDIA H100 PCIe": 1513 / 2,
        "NVIDIA H100 NVL": 1671 / 2,
        "NVIDIA H200": 1979 / 2,
        "NVIDIA H200 NVL": 1671 / 2,
        "NVIDIA A100-SXM4-80GB": 624 / 2,
    }
    for name, teraflops in peaks.items():
        assert peak_of(name) == pytest.approx(teraflops * 1e12, rel=1e-3), name
    assert peak_of("NVIDIA GeForce RTX 4090") is None


def test_the_plan_has_the_flops_of_the_real_model() -> None:
    plan = memory.measure("decoder", DEMO["decoder"])
    assert plan.flops_per_sample == flops_per_sample(DEMO["decoder"].build(), *DEMO["decoder"].inputs(2))
