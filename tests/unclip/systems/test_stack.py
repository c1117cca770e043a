"""Stacks with several upsamplers, one or none: each upsampler enlarges the images of the one before."""

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unclip.damage import flipped
from tests.unclip.interop.test_mutated_settings import CHANGES, DELETE, changed, places
from tests.unclip.systems import tiny_stacks
from tests.unclip.systems.tiny_stacks import SAMPLING, fitting, with_sampling
from unclip.config import load, override, to_dict
from unclip.downscaling import shrink_known
from unclip.errors import CheckpointError, ConfigError, UnclipError
from unclip.files import sha256
from unclip.models.prior import PriorConfig
from unclip.systems.inpainting import inpaint, num_steps
from unclip.systems.system import (
    ClipFiles,
    StackFiles,
    load_built,
    load_model,
    load_system,
    sample_captions,
    save_stack,
    seal,
)
from unclip.systems.unclip import manipulations
from unclip.systems.unclip.prior import PRIOR
from unclip.systems.unclip.sampling import SamplingConfig, UpsamplerSampling
from unclip.systems.unclip.stack import PARTS, Stack
from unclip.training import checkpoints

CAPTIONS = ["a red circle", "a blue star"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published stack of 8, 16 and 32 pixels."""
    return tiny_stacks.publish(tmp_path_factory.mktemp("stack"), num_upsamplers=2)


@pytest.fixture(scope="module")
def stack(folder: Path) -> Stack:
    return load_system(folder)


def describe(folder: Path, facts: object) -> None:
    """Write another `stack.json` and seal the stack again, as its publisher can."""
    (folder / "stack.json").write_text(json.dumps(facts))
    seal(str(folder), [path.name for path in folder.iterdir() if path.is_dir()])


def with_upsamplers(stack: Stack, *numbers: int) -> Stack:
    return Stack(stack.clip, stack.prior, stack.decoder, [stack.upsamplers[number] for number in numbers])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(("numbers", "resolution"), [((), 8), ((0,), 16), ((0, 1), 32)])
def test_images_have_the_resolution_of_the_last_upsampler(
    stack: Stack, numbers: tuple[int, ...], resolution: int
) -> None:
    shorter = with_upsamplers(stack, *numbers)
    samples = sample_captions(shorter, CAPTIONS, seed=1, sampling=fitting(SAMPLING, shorter))
    assert shorter.image_size == resolution and samples.shape == (2, 3, resolution, resolution)
    assert samples.isfinite().all()
    assert not torch.allclose(samples[0], samples[1], atol=1e-2)


def test_each_upsampler_enlarges_the_images_of_the_one_before(stack: Stack) -> None:
    low_res = torch.rand(2, 3, 8, 8, generator=generator()) * 2 - 1
    shared = generator()
    expected = low_res
    for upsampler, steps in zip(stack.upsamplers, (2, 3), strict=True):
        expected = upsampler.sample(expected, UpsamplerSampling(sampler="ddpm", num_steps=steps), generator=shared)
    sampling = with_sampling({"upsamplers.16.sampler": "ddpm", "upsamplers.32.sampler": "ddpm"})
    assert torch.equal(stack.upsample(low_res, sampling, generator()), expected)
    first = stack.upsamplers[0].sample(low_res, UpsamplerSampling(sampler="ddpm", num_steps=2), generator=generator())
    assert torch.equal(with_upsamplers(stack, 0).upsample(low_res, sampling, generator()), first)
    assert torch.equal(with_upsamplers(stack).upsample(low_res, sampling, generator()), low_res)


def test_a_clip_other_than_that_of_the_training_is_refused() -> None:
    stack, other = tiny_stacks.tiny_stack(), tiny_stacks.tiny_clip()
    with torch.no_grad():
        other.model.ln_final.weight.mul_(1.5)
    with_other = tiny_stacks.tiny_stack(clip=other)
    pairs = (("prior", stack.prior, with_other.decoder), ("decoder", with_other.prior, stack.decoder))
    for name, prior, decoder in pairs:
        with pytest.raises(CheckpointError, match=f"{name}: was trained with a CLIP other than this one"):
            Stack(other, prior, decoder)
    without_text = tiny_stacks.tiny_stack(decoder={"text": "none"}).decoder
    assert Stack(other, with_other.prior, without_text).clip is other


def test_upsamplers_without_settings_use_the_number_of_steps_of_the_paper(stack: Stack) -> None:
    assert [each.num_steps for each in stack.upsampler_sampling(SamplingConfig())] == [27, 15]
    assert [each.num_steps for each in stack.upsampler_sampling(SAMPLING)] == [2, 3]
    only_the_second = SamplingConfig(upsamplers={"32": UpsamplerSampling(num_steps=4)})
    assert [each.num_steps for each in stack.upsampler_sampling(only_the_second)] == [27, 4]
    with pytest.raises(ConfigError, match="num_steps: got 0, expected 1 to 100000"):
        UpsamplerSampling(num_steps=0)


def test_inpainting_holds_known_pixels_in_every_upsampler(stack: Stack) -> None:
    images = torch.rand(2, 3, 32, 32, generator=generator()) * 2 - 1
    known = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    known[..., :16] = True
    steps: list[int] = []
    samples = inpaint(stack, images, known, CAPTIONS, seed=1, sampling=SAMPLING, progress=steps.append)
    assert torch.equal(samples[..., :16], images[..., :16]) and not torch.equal(samples[..., 16:], images[..., 16:])
    assert sum(steps) == num_steps(stack, SAMPLING, 2) == 6 + 2 + 3
    for part in ("decoder", "upsamplers.16", "upsamplers.32"):  # none of which knows masks
        once = load(SamplingConfig, override(to_dict(SAMPLING), f"{part}.num_resamplings=1"))
        assert not torch.equal(inpaint(stack, images, known, CAPTIONS, seed=1, sampling=once), samples)
    # the second upsampler gets an image whose known half is that of the given image
    seen: list[torch.Tensor] = []
    hook = stack.upsamplers[1].register_forward_pre_hook(lambda _, given: seen.append(given[2]))
    inpaint(stack, images, known, CAPTIONS, seed=1, sampling=SAMPLING)
    hook.remove()
    small, small_known = shrink_known(images, known, 16)
    assert small_known[..., :8].all() and not small_known[..., 8:].any()
    assert seen and all(torch.allclose(low_res[..., :8], small[..., :8], atol=1e-6) for low_res in seen)


def test_frames_of_a_row_share_the_noise_of_every_upsampler(stack: Stack) -> None:
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=generator()), 32, mode="bicubic")
    steps: list[int] = []
    settings = with_sampling({"upsamplers.16.sampler": "ddim", "upsamplers.32.sampler": "ddim"})
    row = manipulations.interpolate(stack, image, image, [0.0, 1.0], sampling=settings, progress=steps.append)
    assert row.shape == (1, 2, 3, 32, 32) and torch.allclose(row[:, 0], row[:, 1], atol=1e-4)
    assert sum(steps) == num_steps(stack, settings, 2, 2)


def test_upsamplers_that_do_not_fit_each_other_are_refused(stack: Stack, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"^upsampler-32: got images of 8 pixels from the decoder, .* the 16 pixels that"
    ):
        with_upsamplers(stack, 1)
    with pytest.raises(
        CheckpointError, match=r"^upsampler-16: got images of 16 pixels from upsampler-16, .* the 8 pixels that"
    ):
        with_upsamplers(stack, 0, 0)
    shutil.copytree(folder, tmp_path / "stack")
    facts = json.loads((folder / "stack.json").read_text())
    assert facts["parts"] == ["prior", "decoder", "upsampler-16", "upsampler-32"]
    describe(tmp_path / "stack", facts | {"parts": ["prior", "decoder", "upsampler-32"]})
    with pytest.raises(CheckpointError, match="upsampler-32: got images of 8 pixels from the decoder"):
        load_system(tmp_path / "stack")
    describe(tmp_path / "stack", facts | {"parts": ["prior"]})
    with pytest.raises(CheckpointError, match="got prior, expected a CLIP, a prior and a decoder"):
        load_system(tmp_path / "stack")
    earlier = {"clip": facts["clip"], "sampling": {"prior_steps": 3}, "upsamplers": facts["parts"][2:]}
    (tmp_path / "stack" / "stack.json").write_text(json.dumps(earlier))
    with pytest.raises(CheckpointError, match="an earlier version published this stack"):
        load_system(tmp_path / "stack")


def copy_of(folder: Path, destination: Path) -> Path:
    """Copy a stack by hard links: tests must replace files, not write into them."""
    shutil.copytree(folder, destination, copy_function=os.link)
    return destination


def replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def test_f52_a_flipped_bit_in_any_file_of_a_stack_is_found(folder: Path, tmp_path: Path) -> None:
    copied = copy_of(folder, tmp_path / "stack")
    files = [path for path in sorted(copied.rglob("*")) if path.is_file()]
    assert len(files) > 15 and copied / "clip" / "open_clip_model.safetensors" in files
    for number, path in enumerate(files):
        data = path.read_bytes()
        replace(path, flipped(data, 8 * (number * 7919 % len(data)) + number % 8))
        with pytest.raises(CheckpointError, match=re.escape(str(path.parent))):
            load_system(copied)
        replace(path, data)
    (copied / "clip" / "other.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"differ from those of its manifest: other\.safetensors"):
        load_system(copied)


def test_a_clip_given_by_a_weights_file_is_part_of_the_stack(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    shutil.copy(folder / "clip" / "open_clip_model.safetensors", weights)
    parts = {name: f"{folder}/{name}" for name in ("prior", "decoder", "upsampler-16", "upsampler-32")}
    save_stack(f"{tmp_path}/stack", StackFiles("unclip", parts, ClipFiles(tiny_stacks.ARCHITECTURE, str(weights))))
    weights.unlink()
    loaded, expected = load_system(tmp_path / "stack"), load_system(folder)
    assert torch.equal(loaded.embed_text(CAPTIONS), expected.embed_text(CAPTIONS))


def test_f52_a_stack_of_an_earlier_version_asks_to_be_published_again(folder: Path, tmp_path: Path) -> None:
    copied = copy_of(folder, tmp_path / "stack")
    (copied / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json, because an earlier version .* Publish it again"):
        load_system(copied)


PLACES = {
    "parts": ["../decoder", "/etc", "..", ".", "decoder/../../x", "hf-hub:someone/else", "", 3, None, "decoder\0"],
    "clip": [
        {"model": "hf-hub:someone/else"},
        {"model": "local-dir:/somewhere"},
        {"model": "local-dir:clip/../../clip"},
        {"model": "local-dir:"},
        {"model": "ViT-B-32", "pretrained": "/somewhere/weights.pt"},
        {"model": "ViT-B-32", "pretrained": "weights.pt"},
        {"model": "local-dir:clip", "trust_remote_code": True},
        "hf-hub:someone/else",
        {},
    ],
    "system": ["os", "../unclip", 1, None, "unclip.systems.clip"],
    "sampling": [[], {"prior": {"num_steps": 1e400}}, {"prior": {"run": "code"}}, {"batch_size": "many"}],
}


@pytest.mark.parametrize("key", PLACES)
def test_f49_a_stack_names_only_what_is_in_its_folder(folder: Path, tmp_path: Path, key: str) -> None:
    copied = copy_of(folder, tmp_path / "stack")
    facts = json.loads((folder / "stack.json").read_text())
    shutil.copytree(folder / "decoder", tmp_path / "decoder")  # what the paths lead to is there
    (copied / "stack.json").unlink()
    for value in PLACES[key]:
        describe(copied, {**facts, key: ["prior", "decoder", value] if key == "parts" else value})
        with pytest.raises(UnclipError):
            load_system(copied)
    describe(copied, {**facts, "modules": ["evil"]})
    with pytest.raises(CheckpointError, match="got 'modules', which is not allowed here"):
        load_system(copied)


@pytest.mark.parametrize("name", ["decoder", "decoder/model.safetensors", "clip/open_clip_model.safetensors"])
def test_f49_a_link_that_leaves_the_stack_is_not_followed(folder: Path, tmp_path: Path, name: str) -> None:
    copied = copy_of(folder, tmp_path / "stack")
    (copied / name).rename(tmp_path / "outside")
    (copied / name).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="outside of the stack"):
        load_system(copied)


ATTEMPTS: list[str] = []
"""Network events of this process, while `recording` is set."""
recording = False


def record(event: str, arguments: tuple[object, ...]) -> None:
    if recording and event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        ATTEMPTS.append(f"{event} {arguments[1:]}")


@pytest.mark.parametrize("part", ["prior", "upsampler-16"])
def test_f53_wrong_facts_of_a_part_are_refused_in_our_words_or_do_not_matter(
    folder: Path, tmp_path: Path, part: str
) -> None:
    copied = copy_of(folder / part, tmp_path / part)
    facts = json.loads((copied / "facts.json").read_text())
    manifest = json.loads((copied / "manifest.json").read_text())
    kinds, refused = [DELETE, *CHANGES], 0
    for number, place in enumerate(places(facts)):
        data = json.dumps(changed(facts, place, kinds[number % len(kinds)])).encode()
        replace(copied / "facts.json", data)
        manifest["sha256"]["facts.json"] = sha256(data)
        replace(copied / "manifest.json", json.dumps(manifest).encode())
        try:
            load_model(str(copied), PARTS)
        except UnclipError:
            refused += 1
    assert number > 20 and refused > number / 3


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("batch_size", 10**9, "batch_size: got 1000000000, expected 1 to 4096"),
        ("prior.num_candidates", 10**9, "num_candidates: got 1000000000, expected 1 to 1024"),
        ("decoder.num_steps", 10**9, "num_steps: got 1000000000, expected 1 to 100000"),
    ],
)
def test_published_sampling_settings_are_limited(
    folder: Path, tmp_path: Path, setting: str, value: int, message: str
) -> None:
    copied = shutil.copytree(folder, tmp_path / "stack")
    facts = json.loads((copied / "stack.json").read_text())
    describe(copied, facts | {"sampling": override(facts["sampling"], f"{setting}={value}")})
    with pytest.raises(CheckpointError, match=message):
        load_system(copied)


def test_a_stack_does_not_decide_that_batches_are_padded(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "stack")
    facts = json.loads((copied / "stack.json").read_text())
    describe(copied, facts | {"sampling": facts["sampling"] | {"batch_size": 4096, "pad_batches": True}})
    stack: Stack = load_system(copied)
    assert (stack.sampling.batch_size, stack.sampling.pad_batches) == (4096, False)


@pytest.mark.parametrize(
    ("width", "depth", "message"),
    [
        (4096, 2, "the weights do not fit the prior"),
        (65536, 1, "the weights do not fit the prior"),
        (8, 65536, "the settings have more layers than 1 tensors hold"),
    ],
)
def test_a_network_of_other_sizes_than_its_weights_is_not_allocated(
    tmp_path: Path, width: int, depth: int, message: str
) -> None:
    config = to_dict(PriorConfig(width=width, depth=depth, num_heads=1))
    shapes = {"embedding_dim": 8, "text_width": 8, "text_length": 4}
    facts = {"kind": "prior", "config": config, "samples_seen": 1, **shapes}
    checkpoints.save(str(tmp_path), {"model": {"a": torch.zeros(1)}}, facts)
    devices = []

    def build(facts: Mapping[str, Any]) -> torch.nn.Module:
        devices.append(torch.empty(0).device.type)
        return PRIOR.build(facts)

    with pytest.raises(CheckpointError, match=message):
        load_built(str(tmp_path), {"prior": build})
    assert devices == ["meta"]


def test_f49_loading_a_stack_uses_no_network(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sys.addaudithook(record)
    monkeypatch.setattr(sys.modules[__name__], "recording", True)
    with pytest.raises(OSError):  # the hook sees attempts
        socket.create_connection(("127.0.0.1", 9), timeout=0.2)
    assert ATTEMPTS
    ATTEMPTS.clear()
    load_system(folder)
    copied = copy_of(folder, tmp_path / "stack")
    facts = json.loads((folder / "stack.json").read_text())
    (copied / "stack.json").unlink()
    describe(copied, facts | {"clip": {"model": "RN50", "pretrained": "yfcc15m"}})
    with pytest.raises(CheckpointError, match=r"RN50.* Fetch its CLIP once: python -c"):
        load_system(copied)
    assert not ATTEMPTS


def test_the_order_of_the_parts_survives_storing() -> None:
    """Stored objects have sorted keys, and 1024 sorts before 256."""
    names = ("prior", "decoder", "upsampler-256", "upsampler-1024")
    stack = StackFiles(
        "unclip", {name: f"/models/{name}" for name in names}, ClipFiles("ViT-L-14"), None, {"batch_size": 2}
    )
    stored = json.loads(json.dumps(stack.facts(), sort_keys=True))
    assert StackFiles.of(stored) == stack and tuple(StackFiles.of(stored).models) == names


def test_settings_for_an_upsampler_that_is_not_there_are_refused(stack: Stack) -> None:
    with pytest.raises(ConfigError, match=r"upsamplers\.64: got '64', expected an upsampler of the stack: 16, 32"):
        sample_captions(stack, CAPTIONS, sampling=SamplingConfig(upsamplers={"64": UpsamplerSampling()}))
