"""Stacks of several upsamplers, of one and of none: each takes the pictures of the one before."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.unclip.systems import tiny_stacks
from tests.unclip.systems.tiny_stacks import SAMPLING, with_sampling
from unclip.errors import CheckpointError, ConfigError
from unclip.systems.system import load_system, sample_captions
from unclip.systems.unclip import manipulations
from unclip.systems.unclip.sampling import SamplingConfig, UpsamplerSampling
from unclip.systems.unclip.stack import Stack

CAPTIONS = ["a red circle", "a blue star"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published stack of 8, 16 and 32 pixels."""
    return tiny_stacks.publish(tmp_path_factory.mktemp("stack"), num_upsamplers=2)


@pytest.fixture(scope="module")
def stack(folder: Path) -> Stack:
    return load_system(folder)


def with_upsamplers(stack: Stack, *numbers: int) -> Stack:
    return Stack(stack.clip, stack.prior, stack.decoder, [stack.upsamplers[number] for number in numbers])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(("numbers", "side"), [((), 8), ((0,), 16), ((0, 1), 32)])
def test_pictures_have_the_size_of_the_last_upsampler(stack: Stack, numbers: tuple[int, ...], side: int) -> None:
    shorter = with_upsamplers(stack, *numbers)
    drawn = sample_captions(shorter, CAPTIONS, seed=1, sampling=SAMPLING)
    assert shorter.image_size == side and drawn.shape == (2, 3, side, side) and drawn.isfinite().all()
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-2)


def test_each_upsampler_works_on_the_pictures_of_the_one_before(stack: Stack) -> None:
    low_res = torch.rand(2, 3, 8, 8, generator=generator()) * 2 - 1
    shared = generator()
    expected = low_res
    for upsampler, num_steps in zip(stack.upsamplers, (2, 3), strict=True):
        expected = upsampler.sample(expected, UpsamplerSampling(sampler="ddpm", num_steps=num_steps), generator=shared)
    sampling = with_sampling({"upsamplers.16.sampler": "ddpm", "upsamplers.32.sampler": "ddpm"})
    assert torch.equal(stack.upsample(low_res, sampling, generator()), expected)
    first = stack.upsamplers[0].sample(low_res, UpsamplerSampling(sampler="ddpm", num_steps=2), generator=generator())
    assert torch.equal(with_upsamplers(stack, 0).upsample(low_res, sampling, generator()), first)
    assert torch.equal(with_upsamplers(stack).upsample(low_res, sampling, generator()), low_res)


def test_another_clip_than_that_of_the_training_is_refused() -> None:
    stack, other = tiny_stacks.tiny_stack(), tiny_stacks.tiny_clip()
    with torch.no_grad():
        other.model.ln_final.weight.mul_(1.5)
    of_other = tiny_stacks.tiny_stack(clip=other)
    for name, prior, decoder in (("prior", stack.prior, of_other.decoder), ("decoder", of_other.prior, stack.decoder)):
        with pytest.raises(CheckpointError, match=f"{name}: was trained with another CLIP than this one"):
            Stack(other, prior, decoder)
    wordless = tiny_stacks.tiny_stack(decoder={"text": "none"}).decoder
    assert Stack(other, of_other.prior, wordless).clip is other


def test_upsamplers_without_settings_take_the_steps_of_the_paper(stack: Stack) -> None:
    assert [each.num_steps for each in stack.upsampler_sampling(SamplingConfig())] == [27, 15]
    assert [each.num_steps for each in stack.upsampler_sampling(SAMPLING)] == [2, 3]
    only_the_second = SamplingConfig(upsamplers={"32": UpsamplerSampling(num_steps=4)})
    assert [each.num_steps for each in stack.upsampler_sampling(only_the_second)] == [27, 4]
    with pytest.raises(ConfigError, match="num_steps: got 0, expected at least 1"):
        UpsamplerSampling(num_steps=0)


def test_inpainting_holds_what_is_known_in_every_upsampler(stack: Stack) -> None:
    images = torch.rand(2, 3, 32, 32, generator=generator()) * 2 - 1
    known = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    known[..., :16] = True
    told: list[int] = []
    drawn = manipulations.inpaint(stack, images, known, CAPTIONS, seed=1, sampling=SAMPLING, progress=told.append)
    assert torch.equal(drawn[..., :16], images[..., :16]) and not torch.equal(drawn[..., 16:], images[..., 16:])
    assert sum(told) == manipulations.num_steps(stack, SAMPLING, 2) == 6 + 2 + 3
    # the second one is shown a picture whose known half is the given one, so what it makes of that half is near
    seen: list[torch.Tensor] = []
    hook = stack.upsamplers[1].register_forward_pre_hook(lambda _, given: seen.append(given[2]))
    manipulations.inpaint(stack, images, known, CAPTIONS, seed=1, sampling=SAMPLING)
    hook.remove()
    half = torch.nn.functional.avg_pool2d(images, 2)[..., :8]
    assert seen and all(torch.allclose(low_res[..., :8], half, atol=1e-6) for low_res in seen)


def test_frames_of_a_row_share_the_noise_of_every_upsampler(stack: Stack) -> None:
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=generator()), 32, mode="bicubic")
    told: list[int] = []
    settings = with_sampling({"upsamplers.16.sampler": "ddim", "upsamplers.32.sampler": "ddim"})
    row = manipulations.interpolate(stack, image, image, [0.0, 1.0], sampling=settings, progress=told.append)
    assert row.shape == (1, 2, 3, 32, 32) and torch.allclose(row[:, 0], row[:, 1], atol=1e-4)
    assert sum(told) == manipulations.num_steps(stack, settings, 2, 2)


def test_upsamplers_that_do_not_chain_are_refused(stack: Stack, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"^upsampler-32: got pictures of 8 pixels from the decoder, .* the 16 that"
    ):
        with_upsamplers(stack, 1)
    with pytest.raises(
        CheckpointError, match=r"^upsampler-16: got pictures of 16 pixels from upsampler-16, .* the 8 that"
    ):
        with_upsamplers(stack, 0, 0)
    shutil.copytree(folder, tmp_path / "stack")
    facts = json.loads((folder / "stack.json").read_text())
    assert facts["parts"] == ["prior", "decoder", "upsampler-16", "upsampler-32"]
    (tmp_path / "stack" / "stack.json").write_text(json.dumps(facts | {"parts": ["prior", "decoder", "upsampler-32"]}))
    with pytest.raises(CheckpointError, match="upsampler-32: got pictures of 8 pixels from the decoder"):
        load_system(tmp_path / "stack")
    (tmp_path / "stack" / "stack.json").write_text(json.dumps(facts | {"parts": ["prior"]}))
    with pytest.raises(CheckpointError, match="got prior, expected a CLIP, a prior and a decoder"):
        load_system(tmp_path / "stack")
    earlier = {"clip": facts["clip"], "sampling": {"prior_steps": 3}, "upsamplers": facts["parts"][2:]}
    (tmp_path / "stack" / "stack.json").write_text(json.dumps(earlier))
    with pytest.raises(CheckpointError, match="an earlier version published this stack"):
        load_system(tmp_path / "stack")
