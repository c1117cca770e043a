"""Imagen's parts while they train, and its stack: files, captions, guidance, noise levels, known pixels and start images."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.unclip.interop.test_t5 import write as write_t5
from tests.unclip.systems.tiny_stacks import fill_zeros
from unclip.config import to_dict
from unclip.diffusion.process import DiffusionConfig
from unclip.errors import CheckpointError, ConfigError, InputError, ShapeError
from unclip.interop import t5
from unclip.models import clip as clip_models
from unclip.models.clip import Clip
from unclip.models.efficient_unet import EfficientUNetConfig
from unclip.models.imagen import (
    Imagen,
    ImagenConfig,
    ImagenSampling,
    TextUpsampler,
    TextUpsamplerConfig,
    TextUpsamplerSampling,
)
from unclip.models.text_states import ClipTextEncoder, TextEncoder, to_bytes
from unclip.models.unet import UNetConfig
from unclip.systems.imagen.generator import IMAGEN, ImagenObjective, ImagenStageConfig
from unclip.systems.imagen.stack import ImagenStack, ImagenStackSampling
from unclip.systems.imagen.super_resolution import TEXT_UPSAMPLER, TextUpsamplerObjective, TextUpsamplerStageConfig
from unclip.systems.inpainting import inpaint, num_steps
from unclip.systems.system import ClipFiles, StackFiles, load_system, sample_captions, save_stack
from unclip.systems.text_encoder import save_t5
from unclip.training import checkpoints
from unclip.training.precision import autocast

UNET = UNetConfig(8, 8, (1, 2), 1, attention_resolutions=(4,), head_channels=8, norm_groups=4)
EFFICIENT = EfficientUNetConfig(8, 8, (1, 2), (1, 1), ("none", "full"), num_heads=2, norm_groups=4)
DIFFUSION = DiffusionConfig(prediction_type="v")
CONFIG = ImagenConfig(UNET, context_dim=8, pooling_heads=2, diffusion=DIFFUSION)
UPSAMPLER = TextUpsamplerConfig(
    EFFICIENT, low_res_size=8, scale=2, max_noise_level=500, context_dim=8, pooling_heads=2, diffusion=DIFFUSION
)
SAMPLING = ImagenStackSampling(
    imagen=ImagenSampling(num_steps=4, guidance_scale=2.0),
    upsamplers={"16": TextUpsamplerSampling(num_steps=2)},
    precision="fp32",
)
CAPTIONS = ["a red circle", "a blue star", "a green square at the left"]
COLOURS = ["red", "green", "blue", "yellow", "white", "black", "purple", "orange"]

Objective = ImagenObjective | TextUpsamplerObjective


@pytest.fixture(scope="module")
def clip() -> Clip:
    torch.manual_seed(0)
    return Clip(clip_models.create("unclip-demo", None), "unclip-demo")


@pytest.fixture(scope="module")
def rows(clip: Clip) -> dict[str, list[Any]]:
    """Eight images of one colour each, with captions of different lengths."""
    jpegs = []
    for colour in COLOURS:
        file = io.BytesIO()
        Image.new("RGB", (16, 16), colour).save(file, "JPEG", quality=95)
        jpegs.append(file.getvalue())
    states = ClipTextEncoder(clip).encode([" ".join(["very"] * n + [colour]) for n, colour in enumerate(COLOURS)])
    return {"jpg": jpegs, "states": to_bytes(states), "length": states.length.tolist()}


def build_base(rows: dict[str, list[Any]], **changes: Any) -> ImagenObjective:
    torch.manual_seed(0)
    return ImagenObjective(dataclasses.replace(CONFIG, **changes), rows, ImagenSampling(num_steps=2))


def build_upsampler(rows: dict[str, list[Any]], **changes: Any) -> TextUpsamplerObjective:
    torch.manual_seed(0)
    config = dataclasses.replace(UPSAMPLER, **changes)
    return TextUpsamplerObjective(config, rows, TextUpsamplerSampling(num_steps=2))


BUILDERS: list[Callable[..., Objective]] = [build_base, build_upsampler]


# Training


class Recorder(torch.nn.Module):
    """Network that records its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, ...]] = []

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        self.calls.append(given)
        return given[0]


@pytest.mark.parametrize("build", BUILDERS)
def test_a_tenth_of_the_captions_is_dropped(build: Callable[..., Objective], rows: dict[str, list[Any]]) -> None:
    trained, recorder = build(rows), Recorder()
    tensors = trained.prepare(rows)
    for seed in range(100):
        trained.loss(recorder, tensors, torch.Generator().manual_seed(seed))
    shares = torch.stack([call[-1] for call in recorder.calls]).float()
    assert shares.mean() == pytest.approx(0.1, abs=0.04) and (shares.std(dim=1) > 0).any()
    for states, length in ((call[-3], call[-2]) for call in recorder.calls):
        assert torch.equal(states, tensors["states"]) and length.tolist() == rows["length"]


def test_each_image_is_noised_to_a_level_that_the_upsampler_is_told(rows: dict[str, list[Any]]) -> None:
    trained, recorder = build_upsampler(rows), Recorder()
    tensors = trained.prepare(rows)
    for seed in range(50):
        trained.loss(recorder, tensors, torch.Generator().manual_seed(seed))
    levels = torch.stack([call[3] for call in recorder.calls])  # [50, 8]
    assert levels.min() >= 0 and levels.max() <= 500 and (levels.float().std(dim=1) > 0).all()
    assert levels.float().mean() == pytest.approx(250, abs=30)
    low_res = torch.stack([call[2] for call in recorder.calls])
    grain = low_res.std(dim=(3, 4)).mean(dim=2)  # the images have one colour, so only noise varies
    expected = (1 - trained.model.diffusion.alphas_cumprod[levels]).sqrt()
    torch.testing.assert_close(grain, expected.float(), rtol=0.3, atol=0.03)
    unaware = build_upsampler(rows, max_noise_level=0)
    unaware.loss(recorder, tensors, torch.Generator().manual_seed(0))
    assert recorder.calls[-1][3] is None and unaware.model.noise_level_embedding is None


@pytest.mark.parametrize(("build", "part"), [(build_base, IMAGEN), (build_upsampler, TEXT_UPSAMPLER)])
def test_every_parameter_is_trained_and_the_model_is_built_again_from_its_facts(
    build: Callable[..., Objective], part: Any, rows: dict[str, list[Any]]
) -> None:
    trained = build(rows, diffusion=DiffusionConfig(variance="learned_range"))
    fill_zeros(trained.model).train()
    tensors = trained.prepare(rows)
    with autocast("bf16", torch.device("cpu")):
        trained.loss(trained.model, tensors, torch.Generator().manual_seed(0)).backward()
    assert [name for name, parameter in trained.model.named_parameters() if parameter.grad is None] == []
    again = part.build(trained.facts()).eval()
    again.load_state_dict(trained.model.state_dict())
    small = {name: value[:2] for name, value in tensors.items()}
    calls: list[Any] = []
    with trained.model.eval().register_forward_pre_hook(lambda _, given: calls.append(given)):
        trained.loss(trained.model, small, torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(*calls[0]), trained.model(*calls[0]))
    shown = trained.preview(trained.model)
    size = trained.model.config.unet.image_size if isinstance(trained, ImagenObjective) else 16
    assert shown.shape == (16, 3, size, size) and shown.isfinite().all()
    score = trained.measure(trained.model, small, torch.Generator().manual_seed(0))["mean_squared_score"]
    assert score.shape == (1000,) and score.isfinite().all()


def test_settings_that_do_not_fit_are_refused() -> None:
    for cls, changes, message in (
        (ImagenConfig, {"unet": UNetConfig(8, 8, (1, 2), norm_groups=4)}, "unet.attention_resolutions"),
        (ImagenConfig, {"context_dim": 9}, "pooling_heads: got 8, expected a divisor of context_dim, 9"),
        (ImagenConfig, {"text_drop_prob": 1.0}, "text_drop_prob"),
        (TextUpsamplerConfig, {"max_noise_level": 1000}, "max_noise_level: got 1000"),
        (TextUpsamplerConfig, {"low_res_size": 50}, "unet.image_size: got 256"),
        (TextUpsamplerConfig, {"low_res_size": 65, "scale": 4}, "unet.channel_mult.*as 260 is no multiple of 16"),
        (ImagenSampling, {"clip_guidance_scale": 1.0}, "clip_guidance_scale: got 1.0, expected 0"),
        (TextUpsamplerSampling, {"noise_level": -1}, "noise_level: got -1"),
        (ImagenStageConfig, {"preview": ImagenSampling("analytic_dpm")}, "preview.sampler"),
        (TextUpsamplerStageConfig, {"preview": TextUpsamplerSampling("analytic_dpm")}, "preview.sampler"),
    ):
        with pytest.raises(ConfigError, match=message):
            cls(**changes)  # type: ignore[operator]


# The stack


def publish(folder: Path, encoder: TextEncoder, clip: Clip) -> Path:
    """Write a stack of 8 and 16 pixels to `folder`/stack."""
    torch.manual_seed(0)
    parts = {
        "imagen": (Imagen(CONFIG, encoder.text_width), {"kind": "imagen", "config": to_dict(CONFIG)}),
        "upsampler-16": (
            TextUpsampler(UPSAMPLER, encoder.text_width),
            {"kind": "text_upsampler", "config": to_dict(UPSAMPLER)},
        ),
    }
    for name, (model, facts) in parts.items():
        facts |= {"samples_seen": 1, "text_width": encoder.text_width}
        checkpoints.save(f"{folder}/{name}", {"model": fill_zeros(model).state_dict()}, facts)
    models, files = {name: f"{folder}/{name}" for name in parts}, None
    if isinstance(encoder, ClipTextEncoder):
        clip_models.save(clip.model, "unclip-demo", folder / "clip")
        files = ClipFiles(f"local-dir:{folder}/clip")
    else:
        save_t5(f"{folder}/text_encoder", encoder)  # type: ignore[arg-type]
        models = {"text_encoder": f"{folder}/text_encoder", **models}
    save_stack(f"{folder}/stack", StackFiles("imagen", models, files, None, to_dict(SAMPLING)))
    return folder / "stack"


@pytest.fixture(scope="module", params=["clip", "t5"])
def stack(request: Any, clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> ImagenStack:
    encoder: TextEncoder = ClipTextEncoder(clip)
    if request.param == "t5":
        encoder = t5.read(write_t5(tmp_path_factory.mktemp("t5")), 12)
    loaded = load_system(publish(tmp_path_factory.mktemp("imagen"), encoder, clip))
    assert isinstance(loaded, ImagenStack)
    return loaded


def sample(stack: ImagenStack, captions: list[str] = CAPTIONS, *, seed: int = 1, **changes: Any) -> torch.Tensor:
    """Sample with changed settings of the base network, or other inputs."""
    inputs = {name: changes.pop(name) for name in ("negative", "start") if name in changes}
    sampling = dataclasses.replace(SAMPLING, imagen=dataclasses.replace(SAMPLING.imagen, **changes))
    return sample_captions(stack, captions, seed=seed, sampling=sampling, **inputs)


def test_a_published_stack_samples_captions_and_follows_seed_and_settings(stack: ImagenStack) -> None:
    assert stack.sampling == SAMPLING and stack.image_size == 16
    samples = sample(stack)
    assert samples.shape == (3, 3, 16, 16) and samples.isfinite().all() and samples.abs().max() <= 1
    assert torch.equal(samples, sample(stack)) and not torch.equal(samples, sample(stack, seed=2))
    others = sample(stack, ["a red circle", "a blue star", "a circle"])
    torch.testing.assert_close(samples[:2], others[:2], rtol=1e-3, atol=1e-4)  # the padding is another
    assert not torch.allclose(samples[2], others[2], atol=1e-3)
    with pytest.raises(ConfigError, match=r"upsamplers\.32: got '32', expected an upsampler of the stack: 16"):
        unknown = dataclasses.replace(SAMPLING, upsamplers={"32": TextUpsamplerSampling()})
        sample_captions(stack, CAPTIONS, sampling=unknown)


def test_both_networks_read_the_caption(stack: ImagenStack) -> None:
    small = torch.zeros(1, 3, 8, 8)

    def enlarge(caption: str) -> torch.Tensor:
        generator, conditions = torch.Generator().manual_seed(0), stack.upsampler_conditions([caption])
        return stack.upsample(small, SAMPLING, generator, conditions=conditions)

    def sample_small(caption: str) -> torch.Tensor:
        return stack.sample_small([caption], SAMPLING, torch.Generator().manual_seed(0))

    for draw in (enlarge, sample_small):
        assert torch.equal(draw("a red circle"), draw("a red circle"))
        assert not torch.allclose(draw("a red circle"), draw("a circle"), atol=1e-3)


def test_captions_are_encoded_once_for_all_networks(stack: ImagenStack, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, encode = [], type(stack.encoder).encode

    def counted(encoder: Any, captions: list[str]) -> Any:
        encoded.append(list(captions))
        return encode(encoder, captions)

    monkeypatch.setattr(type(stack.encoder), "encode", counted)
    first, second = sample(stack, ["a red circle"]), sample(stack, ["a blue star"])
    assert encoded == [["a red circle"], ["a blue star"]] and not torch.equal(first, second)


def test_samples_are_thresholded_dynamically_by_default(stack: ImagenStack) -> None:
    assert ImagenSampling().thresholding == TextUpsamplerSampling().thresholding == "dynamic"
    assert ImagenStackSampling().imagen.thresholding == "dynamic"
    strong = {"guidance_scale": 30.0}
    dynamic, static = sample(stack, **strong), sample(stack, **strong, thresholding="static")
    assert not torch.allclose(dynamic, static, atol=1e-2)
    assert torch.equal(dynamic, sample(stack, **strong, thresholding="dynamic"))


def test_the_noise_level_is_chosen_at_sampling(stack: ImagenStack) -> None:
    small, settings = torch.zeros(3, 3, 8, 8), SAMPLING.upsamplers["16"]

    def enlarge(level: int) -> torch.Tensor:
        chosen = dataclasses.replace(SAMPLING, upsamplers={"16": dataclasses.replace(settings, noise_level=level)})
        generator, conditions = torch.Generator().manual_seed(0), stack.upsampler_conditions(CAPTIONS)
        return stack.upsample(small, chosen, generator, conditions=conditions)

    assert torch.equal(enlarge(300), enlarge(300))
    assert not torch.allclose(enlarge(0), enlarge(300), atol=1e-3)
    with pytest.raises(ConfigError, match="noise_level: got 501, expected at least 0, at most 500"):
        enlarge(501)
    upsampler = stack.upsamplers[0]
    assert isinstance(upsampler, TextUpsampler)
    text = stack.encoder.encode(CAPTIONS)
    given = (torch.zeros(3, 3, 16, 16), torch.zeros(3, dtype=torch.int64), small)
    with torch.no_grad():
        told, other = (upsampler(*given, torch.full((3,), level), *text) for level in (0, 300))
        assert torch.equal(told, upsampler(*given, None, *text)) and not torch.allclose(told, other, atol=1e-4)


def test_negative_captions_are_guided_away_from(stack: ImagenStack) -> None:
    plain = sample(stack)
    pushed = sample(stack, negative=["a circle"] * 3)
    assert not torch.allclose(plain, pushed, atol=1e-3)
    with pytest.raises(InputError, match=r"negative: got 'a circle', but nothing that reads captions is guided"):
        sample(stack, negative=["a circle"] * 3, guidance_scale=1.0)
    with pytest.raises(ShapeError, match="got 1 negative captions for 3"):
        stack.sample(CAPTIONS, SAMPLING, torch.Generator(), negative=[""])


def test_sampling_can_start_from_images(stack: ImagenStack) -> None:
    start = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    samples = sample(stack, start=start, strength=0.3)
    assert not torch.equal(samples, sample(stack, start=-start, strength=0.3))
    assert torch.equal(sample(stack, start=start, strength=1.0), sample(stack))


def test_inpainting_keeps_the_known_pixels_and_follows_the_caption(stack: ImagenStack) -> None:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    known = torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    known[..., :8] = True
    steps: list[int] = []
    samples = inpaint(stack, images, known, CAPTIONS, seed=1, progress=steps.append)
    assert sum(steps) == num_steps(stack, SAMPLING, 3) == 4 + 2
    assert torch.equal(samples[..., :8], images[..., :8]) and samples.isfinite().all()
    others = (inpaint(stack, images, known, ["a circle"] * 3, seed=1), inpaint(stack, -images, known, CAPTIONS, seed=1))
    assert not any(torch.equal(samples[..., 8:], other[..., 8:]) for other in others)


def test_parts_that_do_not_fit_each_other_are_refused(clip: Clip) -> None:
    encoder = ClipTextEncoder(clip)
    width = encoder.text_width
    with pytest.raises(CheckpointError, match=f"imagen: reads text states of width 5, .* have {width}"):
        ImagenStack(encoder, Imagen(CONFIG, 5))
    with pytest.raises(CheckpointError, match="upsampler-16: reads text states of width 5"):
        ImagenStack(encoder, Imagen(CONFIG, width), [TextUpsampler(UPSAMPLER, 5)])
    with pytest.raises(CheckpointError, match="upsampler-32: got images of 8 pixels from imagen"):
        larger = dataclasses.replace(UPSAMPLER, low_res_size=16)
        ImagenStack(encoder, Imagen(CONFIG, width), [TextUpsampler(larger, width)])
    with pytest.raises(CheckpointError, match="neither a CLIP nor a text_encoder"):
        ImagenStack.load(StackFiles("imagen", {"imagen": "nowhere"}, None))
