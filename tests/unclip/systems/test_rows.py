"""Requests that are sampled together get the noise of their own seeds."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unclip.systems.tiny_stacks import tiny_stack
from unclip.config import load, override, to_dict
from unclip.systems.rows import RowGenerators, UnsplitError
from unclip.systems.system import sample_captions, sample_together, seeded

CPU = torch.device("cpu")
DRAWS: dict[str, Any] = {
    "randn, a shape": lambda rows, generator: torch.randn((rows, 3, 5), generator=generator),
    "randn, numbers": lambda rows, generator: torch.randn(rows, 7, generator=generator, dtype=torch.float64),
    "rand": lambda rows, generator: torch.rand(torch.Size([rows]), generator=generator),
    "randint": lambda rows, generator: torch.randint(3, 90, (rows, 2), generator=generator),
    "multinomial of each row": lambda rows, generator: torch.multinomial(
        torch.arange(1.0, rows * 4 + 1).view(rows, 4).sin().abs(), 2, generator=generator
    ),
    "multinomial of one distribution": lambda rows, generator: torch.multinomial(
        torch.arange(1.0, 50.0), rows, replacement=True, generator=generator
    ),
}


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("name", DRAWS)
def test_each_request_draws_its_own_rows(name: str, factor: int) -> None:
    """Also if each row is drawn several times, as for the candidates of a prior, and in every later draw."""
    counts, seeds = [1, 3, 2], [5, 2**63 + 1, 5]
    with RowGenerators([seeded(CPU, seed) for seed in seeds], counts) as rows:
        together = [DRAWS[name](6 * factor, rows.generator) for _ in range(2)]
    first = 0
    for seed, count in zip(seeds, counts, strict=True):
        generator = seeded(CPU, seed)
        own = slice(first * factor, (first + count) * factor)
        for drawn in together:
            if name != "multinomial of each row":  # whose weights depend on the row
                assert torch.equal(drawn[own], DRAWS[name](count * factor, generator))
        first += count
    assert not torch.equal(together[0], together[1])


def test_rows_of_a_distribution_each_are_drawn_with_their_own_weights() -> None:
    weights = torch.rand(5, 9)
    with RowGenerators([seeded(CPU, 1), seeded(CPU, 2)], [2, 3]) as rows:
        drawn = torch.multinomial(weights, 4, generator=rows.generator)
    assert torch.equal(drawn[:2], torch.multinomial(weights[:2], 4, generator=seeded(CPU, 1)))
    assert torch.equal(drawn[2:], torch.multinomial(weights[2:], 4, generator=seeded(CPU, 2)))


def test_other_draws_are_untouched_and_unknown_ones_refused() -> None:
    with RowGenerators([seeded(CPU, 1), seeded(CPU, 2)], [1, 1]) as rows:
        assert torch.equal(torch.randn(3, generator=seeded(CPU, 4)), torch.randn(3, generator=seeded(CPU, 4)))
        assert torch.zeros(3).shape == (3,)
        with pytest.raises(UnsplitError, match="randperm"):
            torch.randperm(4, generator=rows.generator)
        with pytest.raises(UnsplitError, match="draws 3 rows"):
            torch.randn(3, 4, generator=rows.generator)


def test_a_single_request_draws_in_any_way() -> None:
    """So a system whose draws cannot be split is sampled one request at a time."""
    with RowGenerators([seeded(CPU, 1)], [2]) as rows:
        drawn = torch.randperm(9, generator=rows.generator), torch.randn(3, generator=rows.generator)
    generator = seeded(CPU, 1)
    assert torch.equal(drawn[0], torch.randperm(9, generator=generator))
    assert torch.equal(drawn[1], torch.randn(3, generator=generator))


def sampled_both_ways(stack: Any, sampling: Any) -> tuple[Tensor, Tensor]:
    """Images of three requests, each sampled alone and all sampled together."""
    requests = [("a red circle", 3, 2), ("a blue star", 4, 1), ("a red circle", 5, 3)]
    alone = [sample_captions(stack, [caption] * num, seed=seed, sampling=sampling) for caption, seed, num in requests]
    captions = [caption for caption, _, num in requests for _ in range(num)]
    together = sample_together(stack, captions, [(seed, num) for _, seed, num in requests], sampling=sampling)
    return torch.cat(alone), together


ANCESTRAL = ("prior.num_steps=3", "decoder.num_steps=4", "decoder.sampler=ddpm")


def changed(sampling: Any, *assignments: str) -> Any:
    values = to_dict(sampling)
    for assignment in assignments:
        values = override(values, assignment)
    return load(type(sampling), values)


def test_images_of_a_batch_are_those_of_their_seeds() -> None:
    """With ancestral samplers, which draw noise at every step, several candidates of the prior and an upsampler."""
    stack = tiny_stack()
    alone, together = sampled_both_ways(stack, changed(stack.sampling, *ANCESTRAL, "precision=fp32"))
    assert (alone - together).abs().max() < 2e-3
    assert (alone[0] - alone[2]).abs().max() > 0.1 < (alone[0] - alone[1]).abs().max()  # they differ from each other


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_in_batches_that_are_filled_up_an_image_is_equal_bit_for_bit(precision: str) -> None:
    stack = tiny_stack()
    settings = (*ANCESTRAL, f"precision={precision}", "pad_batches=true", "batch_size=8")
    alone, together = sampled_both_ways(stack, changed(stack.sampling, *settings))
    assert torch.equal(alone, together)
    unpadded, _ = sampled_both_ways(stack, changed(stack.sampling, *settings[:-2]))
    assert alone.shape == unpadded.shape and (alone - unpadded).abs().max() < 0.2  # the same noise, rounded differently


def test_inputs_besides_captions_are_filled_up_too() -> None:
    stack = tiny_stack()
    settings = (*ANCESTRAL, "precision=fp32", "decoder.guidance_scale=2", "batch_size=5")
    start = torch.rand(2, 3, stack.image_size, stack.image_size) * 2 - 1
    unpadded, padded = (
        sample_captions(
            stack,
            ["a red circle", "a blue star"],
            sampling=changed(stack.sampling, *settings, f"pad_batches={is_padded}"),
            negative=["a circle", "a star"],
            start=start,
        )
        for is_padded in ("false", "true")
    )
    assert padded.shape == unpadded.shape and (padded - unpadded).abs().max() < 2e-3
