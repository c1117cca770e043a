"""Properties of manipulations that hold for every stack, even an untrained one of a few thousand weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unclip.systems.tiny_stacks import fitting, load_published, with_sampling
from unclip import imaging
from unclip.diffusion import samplers
from unclip.downscaling import shrink
from unclip.errors import ConfigError, InputError, ShapeError
from unclip.evaluation import metrics
from unclip.models.small_images import Captions
from unclip.systems.inpainting import inpaint, num_steps
from unclip.systems.system import sample_captions
from unclip.systems.unclip import manipulations
from unclip.systems.unclip.sampling import SamplingConfig
from unclip.systems.unclip.stack import Stack

RED, BLUE = "a small red circle", "a large blue star"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Stack:
    return load_published(tmp_path_factory.mktemp("stack"))


def images(num: int, resolution: int = 16, seed: int = 0) -> Tensor:
    """Smooth images with 256 levels."""
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.interpolate(torch.rand(num, 3, 4, 4, generator=generator), resolution, mode="bicubic")
    return (smooth.clamp(0, 1) * 255).round() / 127.5 - 1


def low_res(stack: Stack, latents: manipulations.Latents, sampling: SamplingConfig | None = None) -> Tensor:
    """Sample from latents with the decoder alone."""
    settings = (sampling or stack.sampling).decoder
    denoise = stack.decoder.denoiser(latents.image_embedding, settings)
    return samplers.ddim(stack.decoder.diffusion, denoise, latents.x_T, settings.num_steps)


MANIPULATIONS: dict[str, Callable[..., Tensor]] = {
    "variations": lambda stack, x, **options: manipulations.variations(stack, x, 2, **options),
    "noisy variations": lambda stack, x, **options: manipulations.variations(stack, x, 2, eta=0.5, **options),
    "interpolate": lambda stack, x, **options: manipulations.interpolate(stack, x, x.flip(1), [0.2, 0.5], **options),
    "interpolate, fixed": lambda stack, x, **options: manipulations.interpolate(
        stack, x, x.flip(1), [0.2, 0.5], noise="fixed", **options
    ),
    "text_diff": lambda stack, x, **options: manipulations.text_diff(
        stack, x, [BLUE] * len(x), [RED] * len(x), [0.1, 0.3], **options
    ),
    "probe": lambda stack, x, **options: manipulations.probe(stack, x, [1, 8], **options),
}


@pytest.mark.parametrize("name", MANIPULATIONS)
def test_results_depend_on_the_seed_but_not_on_the_rest_of_the_batch(stack: Stack, name: str) -> None:
    together = MANIPULATIONS[name](stack, images(3), seed=5)
    assert together.shape == (3, 2, 3, 16, 16) and together.isfinite().all()
    assert torch.equal(MANIPULATIONS[name](stack, images(3), seed=5), together)
    torch.testing.assert_close(MANIPULATIONS[name](stack, images(3)[1:2], seed=5)[0], together[1], atol=1e-3, rtol=0)
    in_parts = MANIPULATIONS[name](stack, images(3), seed=5, sampling=with_sampling(batch_size=2))
    torch.testing.assert_close(in_parts, together, atol=1e-3, rtol=0)
    assert not torch.allclose(MANIPULATIONS[name](stack, images(3), seed=6), together, atol=1e-2)
    assert not torch.allclose(together[0, 0], together[0, 1], atol=1e-3)


@pytest.mark.parametrize("name", MANIPULATIONS)
def test_inputs_are_not_changed_and_all_steps_are_reported(stack: Stack, name: str) -> None:
    given, steps = images(2), []
    before = given.clone()
    MANIPULATIONS[name](stack, given, progress=steps.append)
    assert torch.equal(given, before)
    inverted = {"noisy variations": 2, "interpolate": 4, "text_diff": 2}.get(name, 0)
    expected = num_steps(stack, with_sampling(batch_size=100), 4, inverted)
    # variations are sampled image by image, so that none depends on the rest of the batch
    assert sum(steps) == (num_steps(stack, stack.sampling, 2, inverted // 2) * 2 if "var" in name else expected)


def test_inverted_images_are_reconstructed(stack: Stack) -> None:
    given = images(3, resolution=40)
    errors = []
    for iterations in (1, 4, 16):
        latents = manipulations.invert(
            stack, given, sampling=with_sampling({"decoder.inversion_iterations": iterations})
        )
        errors.append(float((low_res(stack, latents) - shrink(given, 8)).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3  # half a level of 256 is 4e-3


def test_f139_images_are_inverted_with_the_clamps_of_sampling(stack: Stack) -> None:
    """An inversion without the clamps, which change most pixels of most steps here, leads to other images."""
    clamps = {"decoder.threshold": 0.3, "decoder.inversion_iterations": 8}
    given = 0.25 * images(3)

    def error(**changes: Any) -> float:
        latents = manipulations.invert(stack, given, sampling=with_sampling({**clamps, **changes}))
        return float((low_res(stack, latents, with_sampling(clamps)) - shrink(given, 8)).abs().mean())

    assert error() < error(**{"decoder.thresholding": "none"}) / 2


def test_an_interpolation_starts_and_ends_at_the_images(stack: Stack) -> None:
    first, second = images(2), images(2, seed=1)
    row = manipulations.interpolate(stack, first, second, [0.0, 0.5, 1.0])
    for end, given in ((0, first), (2, second)):
        again = manipulations.draw(stack, manipulations.invert(stack, given))
        torch.testing.assert_close(row[:, end], again, atol=1e-4, rtol=0)
    fixed = manipulations.interpolate(stack, first, second, [0.0, 1.0], noise="fixed")
    variation = manipulations.variations(stack, first, 1)  # the same embedding and noise
    torch.testing.assert_close(fixed[:, :1], variation, atol=1e-4, rtol=0)


def test_a_text_diff_starts_at_the_image(stack: Stack) -> None:
    given = images(2)
    row = manipulations.text_diff(stack, given, [BLUE] * 2, [RED] * 2, [0.0, 0.3])
    again = manipulations.draw(stack, manipulations.invert(stack, given))
    torch.testing.assert_close(row[:, 0], again, atol=1e-4, rtol=0)
    opposite = manipulations.text_diff(stack, given, [RED] * 2, [BLUE] * 2, [0.3])
    assert not torch.allclose(opposite[:, 0], row[:, 1], atol=1e-2)


def test_variations_without_added_noise_reconstruct_the_image(stack: Stack) -> None:
    again = manipulations.draw(stack, manipulations.invert(stack, images(1)))
    torch.testing.assert_close(
        manipulations.variations(stack, images(1), 2, eta=0.0)[0], again.expand(2, -1, -1, -1), atol=1e-4, rtol=0
    )


def test_all_components_give_the_embedding_and_no_components_the_mean(stack: Stack) -> None:
    row = manipulations.probe(stack, images(2), [0, stack.clip.embedding_dim])
    torch.testing.assert_close(row[:, 1:], manipulations.variations(stack, images(2), 1), atol=1e-3, rtol=0)
    torch.testing.assert_close(row[0, 0], row[1, 0], atol=1e-5, rtol=0)
    assert not torch.allclose(row[0, 1], row[1, 1], atol=1e-3)


@pytest.mark.parametrize("inpainting", [False, True])
def test_known_pixels_are_returned_bit_for_bit(tmp_path: Path, inpainting: bool) -> None:
    stack = load_published(tmp_path, inpainting=inpainting)
    given = images(3)
    known = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    known[2, :, :, 3:9] = False
    samples = inpaint(stack, given, known, [RED] * 3, seed=2)
    kept = known.expand_as(given)
    assert torch.equal(samples[kept], given[kept])
    pixels = imaging.to_uint8(samples)[kept.permute(0, 2, 3, 1).numpy()]
    assert (pixels == imaging.to_uint8(given)[kept.permute(0, 2, 3, 1).numpy()]).all()
    assert (samples[~kept] != given[~kept]).float().mean() > 0.9
    assert torch.equal(inpaint(stack, given, known, [RED] * 3, seed=2), samples)
    assert not torch.equal(inpaint(stack, given, known, [RED] * 3, seed=3), samples)
    # the repainted part depends on the known part
    other = inpaint(stack, torch.where(known, given.flip(1), given), known, [RED] * 3, seed=2)
    assert (other[~kept] - samples[~kept]).abs().mean() > 1e-3


@pytest.mark.parametrize("text", ["clip", "transformer"])
def test_decoders_that_read_captions_depend_on_them(tmp_path: Path, text: str) -> None:
    from unclip.models.text import TextTransformerConfig

    small = TextTransformerConfig(width=8, depth=1, num_heads=2)
    stack = load_published(tmp_path, text=text, text_transformer=small)
    samples = []
    for caption in (RED, BLUE):
        generator = torch.Generator().manual_seed(0)
        embedding = torch.ones(1, stack.clip.embedding_dim)
        samples.append(stack.decode(embedding, stack.sampling, generator, Captions(stack.read_captions([caption]))))
    assert not torch.equal(*samples)
    assert manipulations.interpolate(stack, images(1), images(1, seed=1), [0.5]).isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder.sampler": "heun"},
        {"prior.sampler": "ddim"},
        {"upsamplers.16.sampler": "ddpm"},
        {"decoder.num_steps": 4},
    ],
)
def test_sampling_settings_reach_the_samplers(stack: Stack, changes: dict[str, Any]) -> None:
    expected = sample_captions(stack, [RED], seed=1)
    changed = fitting(with_sampling(**changes), stack)
    assert not torch.allclose(sample_captions(stack, [RED], seed=1, sampling=changed), expected, atol=1e-4)


def test_slerp_stays_on_the_sphere_and_returns_its_ends_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.nn.functional.normalize(torch.randn(2, 50, 8, generator=generator), dim=2)
    theta = torch.linspace(0, 1, 50)
    between = manipulations.slerp(a, b, theta)
    torch.testing.assert_close(between.norm(dim=1), torch.ones(50))
    angle, full_angle = ((a * between).sum(1).clamp(-1, 1).acos()), (a * b).sum(1).acos()
    torch.testing.assert_close(angle, theta * full_angle, atol=2e-3, rtol=0)
    assert torch.equal(manipulations.slerp(a, b, torch.zeros(50)), a)
    assert torch.equal(manipulations.slerp(a, b, torch.ones(50)), b)
    torch.testing.assert_close(manipulations.slerp(a, a, theta), a, atol=1e-5, rtol=0)
    assert manipulations.slerp(a, -a, theta).isfinite().all()


def test_impossible_requests_are_refused(stack: Stack) -> None:
    x = images(1)
    with pytest.raises(ConfigError, match=r"theta: got 1.5, expected 0 to 1"):
        manipulations.interpolate(stack, x, x, [0.0, 1.5])
    with pytest.raises(ConfigError, match=r"eta: got -0.1"):
        manipulations.variations(stack, x, 1, eta=-0.1)
    with pytest.raises(ConfigError, match=r"num_components: got 65, expected 0 to 64"):
        manipulations.probe(stack, x, [65])
    with pytest.raises(InputError, match="CLIP sees no difference between 'a' and 'a'"):
        manipulations.text_diff(stack, x, ["a"], ["a"], [0.5])
    with pytest.raises(ShapeError, match=r"expected the same number of each"):
        manipulations.text_diff(stack, x, ["a", "b"], ["c"], [0.5])
    with pytest.raises(ShapeError, match=r"invert: got images \(1, 3, 16, 8\)"):
        manipulations.invert(stack, x[..., :8])
    with pytest.raises(ShapeError, match=r"inpaint: got images"):
        inpaint(stack, x, torch.ones(1, 1, 8, 8, dtype=torch.bool), [RED])
    stack = Stack(stack.clip, stack.prior, stack.decoder, stack.upsamplers)
    with pytest.raises(InputError, match="without principal components"):
        manipulations.probe(stack, x, [1])


def test_placement_finds_the_object() -> None:
    x = torch.full((9, 3, 32, 32), -1.0)
    for index in range(9):
        x[index, :, 8 : 12 + index, 2 * index : 2 * index + 6] = 1.0
    found = metrics.placement(x)
    np.testing.assert_allclose(found.centre[:, 0], (2 * np.arange(9) + 3) / 32)
    np.testing.assert_allclose(found.area, 6 * (4 + np.arange(9)) / 32**2)
    assert (found.background == 0).all() and (metrics.placement(-x).background == 255).all()
    assert (metrics.placement(x[:1] * 0).centre == 0.5).all()


def test_rows_that_reverse_are_not_monotone() -> None:
    rows = [[0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3], [0, 2, 1.8, 3], [1, 1, 1, 1], [0, 5, 5, 3]]
    assert metrics.monotone(np.array(rows)).tolist() == [True, True, False, True, False, False]
