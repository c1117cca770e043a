"""What is planned is what is held: measured on real tensors, on the CPU."""

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.unclip.systems.sized import networks, shapes
from unclip.errors import ConfigError
from unclip.models.layers import CausalTransformer
from unclip.systems.unclip.sizes import MODEL_SIZES
from unclip.training import memory, parallel
from unclip.training.flops import flops_per_sample
from unclip.training.memory import Activations, Bytes, ModelMemory, TrainingSetup
from unclip.training.precision import Precision, autocast

CPU = torch.device("cpu")
SHALLOW = MODEL_SIZES["demo"]
# Eight blocks: of few, what is there for a moment would be more than a tenth of all.
PRIOR = dataclasses.replace(SHALLOW.prior, model=dataclasses.replace(SHALLOW.prior.model, depth=8))
DEMO = networks(dataclasses.replace(SHALLOW, prior=PRIOR))
SAMPLES = 5


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def saved_bytes(model: nn.Module, inputs: tuple[Any, ...], precision: Precision) -> int:
    """Of distinct storages that autograd keeps for a real backward pass, weights aside."""
    own = {storage(parameter) for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if storage(tensor) not in own:
            kept[storage(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(precision, CPU):
        model(*inputs).float().square().mean()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", DEMO)
def test_a_forward_pass_keeps_what_is_planned(name: str, precision: Precision) -> None:
    plan = memory.measure(name, DEMO[name], "cpu", precision)
    model = DEMO[name].build().to(memory_format=torch.channels_last)
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters())
    inputs = DEMO[name].inputs(SAMPLES)
    assert saved_bytes(model, inputs, precision) == pytest.approx(plan.activations.at(SAMPLES, False), rel=0.05)
    parallel.checkpoint_activations(model)
    assert saved_bytes(model, inputs, precision) == pytest.approx(plan.activations.between.at(SAMPLES), rel=0.05)


@pytest.mark.parametrize("name", ["prior", "autoregressive_prior"])
def test_without_padding_priors_keep_less_than_is_planned_and_never_more(name: str) -> None:
    model, inputs = DEMO[name].build(), DEMO[name].inputs(SAMPLES)
    more = (None,) if name == "prior" else ()  # no x0 estimate
    tokens = torch.arange(SAMPLES * len(model.positions)).view(SAMPLES, -1)
    mask = next(
        value for value in inputs if isinstance(value, Tensor) and value.shape[1:] == model.text.null_mask.shape
    )
    short = torch.cat([tokens[:, :2], tokens[:, mask.shape[1] :]], dim=1)  # captions of two tokens
    planned = saved_bytes(model, inputs, "fp32")
    assert saved_bytes(model, (*inputs, *more, tokens.flatten()), "fp32") <= 1.01 * planned
    assert saved_bytes(model, (*inputs, *more, short.flatten()), "fp32") < 0.9 * planned


class Live(TorchDispatchMode):
    """Follows the bytes of all tensors that are made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                held = tensor.untyped_storage()
                if held._cdata not in self.sizes:
                    self.sizes[held._cdata] = held.nbytes()
                    weakref.finalize(held, self.sizes.pop, held._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return results


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["prior", "decoder", "upsampler-64"])
def test_a_step_at_its_peak_is_within_the_reserve_of_the_plan(name: str, checkpointing: bool) -> None:
    training = TrainingSetup(checkpointing=checkpointing)
    plan = memory.measure(name, DEMO[name], "cpu", "bf16")
    model = DEMO[name].build()
    if checkpointing:
        parallel.checkpoint_activations(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # of an earlier micro-batch
    inputs = DEMO[name].inputs(SAMPLES)
    with Live() as live:
        with autocast("bf16", CPU):
            loss = model(*inputs).float().square().mean()
        loss.backward()
    peak = plan.states(training).total + live.peak
    available = plan.at(SAMPLES, training) / (1 - memory.RESERVE)
    assert plan.at(SAMPLES, training) * 0.95 < peak < available


def test_on_a_gpu_a_transformer_block_keeps_what_the_closed_form_says() -> None:
    """And no scores of attention; there is no GPU to compare with."""
    small = MODEL_SIZES["small"]
    plan = memory.measure("prior", networks(small)["prior"])
    width, length = small.prior.model.width, shapes(small).text.length + 4
    # bf16: normed x, q, k, v, attended, normed x, GELU's four-fold input and output; float32: x in the middle
    block = (2 * (1 + 3 + 1 + 1 + 4 + 4) + 4) * width * length
    last = 2 * (1 + 3) * width * length  # works for one token: normed x, q, k and v alone are as long
    blocks = [*[block] * 11, last]
    assert [each.per_sample for each in plan.activations.inside] == pytest.approx(blocks, rel=0.05)
    again = 4 * width * length  # x as it is given
    assert plan.activations.whole.per_sample == pytest.approx(sum(blocks) + 12 * again, rel=0.05)


def test_the_largest_preset_is_planned_without_its_memory() -> None:
    plan = {name: memory.measure(name, network) for name, network in networks(MODEL_SIZES["dalle2"]).items()}
    assert list(plan) == ["prior", "autoregressive_prior", "decoder", "upsampler-256", "upsampler-1024"]
    counts = MODEL_SIZES["dalle2"].num_parameters
    found = [plan[name].parameters for name in ("prior", "decoder", "upsampler-256", "upsampler-1024")]
    assert found == [counts.prior, counts.decoder, *counts.upsamplers]
    decoder = plan["decoder"]
    assert not any(decoder.largest_micro_batch(TrainingSetup(8, "ddp", each), 80) for each in (False, True))
    kept, again = (decoder.largest_micro_batch(TrainingSetup(8, "fsdp", each), 80) for each in (False, True))
    assert 1 < kept < again
    for training, number in ((TrainingSetup(8, "fsdp"), kept), (TrainingSetup(8, "fsdp", True), again)):
        assert decoder.at(number, training) <= 72 * memory.GIB < decoder.at(number + 1, training)
    # bf16 copies of all weights, which are float32
    assert decoder.activations.whole.fixed == pytest.approx(2 * counts.decoder, rel=0.05)


def test_what_each_gpu_holds() -> None:
    activations = Activations(Bytes(200, 10), Bytes(0, 1), (Bytes(20, 2), Bytes(10, 4)))
    model = ModelMemory("model", 100, 10, 30, activations, 0.0)
    alone, whole = model.states(TrainingSetup()), model.states(TrainingSetup(2))
    assert (alone.weights, alone.gradients, alone.moments, alone.average, alone.exchange) == (400, 400, 800, 400, 0)
    assert model.states(TrainingSetup(1, "fsdp")) == alone
    assert whole.total == alone.total + 400  # DDP's own copy of the gradients
    shards = model.states(TrainingSetup(4, "fsdp"))
    assert (shards.weights, shards.gradients, shards.moments, shards.average) == (100, 100, 200, 100)
    assert shards.exchange == 2 * 4 * (10 + 2 * 30)
    several = model.states(TrainingSetup(4, "fsdp", accumulates=True))
    assert several.total == shards.total + 300
    assert activations.at(3, checkpointing=False) == 230
    assert activations.at(3, checkpointing=True) == 3 + 200  # the forward pass's copies of weights
    assert activations.at(100, checkpointing=True) == 100 + 410  # the second block
    assert model.largest_micro_batch(TrainingSetup(), 1e-9) == 0
    assert model.largest_micro_batch(TrainingSetup(), 80) == memory.MOST_SAMPLES


def test_an_unknown_precision() -> None:
    with pytest.raises(ConfigError, match="precision: got 'auto'"):
        memory.measure("prior", DEMO["prior"], precision="auto")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_those_of_the_closed_form(device: str) -> None:
    width, depth, length = 16, 3, 7
    with torch.device(device):
        assert flops_per_sample(nn.Linear(8, 5), torch.zeros(4, 8)) == 3 * 2 * 8 * 5
        model, x = CausalTransformer(width, depth, num_heads=2), torch.zeros(4, length, width)
        keep = torch.ones(4, length, dtype=torch.bool)
        found = flops_per_sample(model, x, keep)
        packed = flops_per_sample(model, x, keep, kept=torch.arange(10))
    products = 2 * 12 * width**2  # of a token with qkv, output and MLP
    attention = 2 * 2 * length * width  # of a token with scores and values
    assert found == 3 * depth * length * (products + attention)
    assert packed == 3 * depth * (10 / 4 * products + length * attention), "what is not computed is not counted"


def test_the_plan_counts_flops_of_a_real_model() -> None:
    plan = memory.measure("decoder", DEMO["decoder"])
    assert plan.flops_per_sample == flops_per_sample(DEMO["decoder"].build(), *DEMO["decoder"].inputs(2))
