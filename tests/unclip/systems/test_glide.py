"""GLIDE's parts while they train, and its stack: files, captions, guidance, known pixels and start images."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.unclip.systems.tiny_stacks import fill_zeros
from unclip.config import to_dict
from unclip.diffusion.process import DiffusionConfig
from unclip.errors import CheckpointError, ConfigError, InputError, ShapeError
from unclip.models import clip as clip_models
from unclip.models.clip import Clip
from unclip.models.glide import GlideConfig
from unclip.models.noised_clip import NoisedClip, NoisedClipConfig
from unclip.models.small_images import ImageSampling
from unclip.models.text import TextTransformerConfig
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig, UpsamplerSampling
from unclip.systems.glide.generator import GLIDE, GlideObjective, GlideStageConfig
from unclip.systems.glide.noised_clip import NOISED_CLIP, NoisedClipObjective
from unclip.systems.glide.sizes import MODEL_SIZES
from unclip.systems.glide.stack import GlideSampling, GlideStack
from unclip.systems.inpainting import inpaint, num_steps
from unclip.systems.system import ClipFiles, StackFiles, load_system, sample_captions, save_stack
from unclip.training import checkpoints
from unclip.training.parallel import Workers
from unclip.training.precision import autocast

UNET = UNetConfig(8, 8, (1, 2), 1, attention_resolutions=(4,), head_channels=8, norm_groups=4)
DIFFUSION = DiffusionConfig(prediction_type="v")
CONFIG = GlideConfig(UNET, TextTransformerConfig(16, 1, 2), diffusion=DIFFUSION)
NOISED = NoisedClipConfig(image_size=8, patch_size=4, width=16, depth=1, num_heads=2, diffusion=DIFFUSION)
SAMPLING = GlideSampling(
    glide=ImageSampling(num_steps=4, guidance_scale=2.0),
    upsamplers={"16": UpsamplerSampling(num_steps=2)},
    precision="fp32",
)
CAPTIONS = ["a red circle", "a blue star", "a green square"]


def jpeg(color: tuple[int, int, int], size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), color).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture(scope="module")
def clip() -> Clip:
    torch.manual_seed(0)
    return Clip(clip_models.create("unclip-demo", None), "unclip-demo")


def rows(clip: Clip, batch: int = 8) -> dict[str, list[Any]]:
    generator = np.random.default_rng(0)
    text_embedding = F.normalize(torch.from_numpy(generator.normal(size=(batch, clip.embedding_dim))).float(), dim=-1)
    return {
        "jpg": [jpeg((255 * (index & 1), 255 * (index >> 1 & 1), 255 * (index >> 2 & 1))) for index in range(batch)],
        "tokens": [tokens.int().numpy() for tokens in clip.tokenize([f"image number {n}" for n in range(batch)])],
        "text_embedding": list(text_embedding.numpy()),
    }


def objective(clip: Clip, **changes: Any) -> GlideObjective:
    torch.manual_seed(0)
    return GlideObjective(dataclasses.replace(CONFIG, **changes), clip, rows(clip))


def publish(folder: Path, clip: Clip) -> Path:
    """Write a stack of 8 and 16 pixels with an image encoder for noised images to `folder`/stack."""
    clip_models.save(clip.model, "unclip-demo", folder / "clip")
    upsampler = UpsamplerConfig(UNetConfig(8, 4, (1, 1), 1, norm_groups=2), low_res_size=8, scale=2)
    torch.manual_seed(0)
    noised_clip = NoisedClipObjective(NOISED, clip.embedding_dim)
    parts = {
        "glide": (objective(clip).model, objective(clip).facts()),
        "upsampler-16": (Upsampler(upsampler), {"kind": "upsampler", "config": to_dict(upsampler)}),
        "noised_clip": (noised_clip.model, noised_clip.facts()),
    }
    for name, (model, facts) in parts.items():
        checkpoints.save(f"{folder}/{name}", {"model": fill_zeros(model).state_dict()}, {"samples_seen": 1, **facts})
    models = {name: f"{folder}/{name}" for name in parts}
    files = StackFiles("glide", models, ClipFiles(f"local-dir:{folder}/clip"), None, to_dict(SAMPLING))
    save_stack(f"{folder}/stack", files)
    return folder / "stack"


@pytest.fixture(scope="module")
def stack(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> GlideStack:
    loaded = load_system(publish(tmp_path_factory.mktemp("glide"), clip))
    assert isinstance(loaded, GlideStack)
    return loaded


def sample(stack: GlideStack, captions: list[str] = CAPTIONS, *, seed: int = 1, **changes: Any) -> torch.Tensor:
    """Sample with changed settings of the generator, or other inputs."""
    inputs = {name: changes.pop(name) for name in ("negative", "start") if name in changes}
    sampling = dataclasses.replace(SAMPLING, glide=dataclasses.replace(SAMPLING.glide, **changes))
    return sample_captions(stack, captions, seed=seed, sampling=sampling, **inputs)


# Training


def test_a_fifth_of_the_captions_is_dropped_by_the_generator(clip: Clip) -> None:
    trained = objective(clip)
    tensors, drops = trained.prepare(rows(clip)), []

    class Recorder(torch.nn.Module):
        def forward(self, x_t, t, tokens, text_drop, known):
            assert torch.equal(tokens, tensors["tokens"]) and known is None
            drops.append(text_drop)
            return x_t

    for seed in [*range(100), 0]:
        trained.loss(Recorder(), tensors, torch.Generator().manual_seed(seed))
    assert torch.equal(drops[0], drops[100])
    shares = torch.stack(drops[:100]).float()
    assert shares.mean() == pytest.approx(0.2, abs=0.05) and (shares.std(dim=1) > 0).any()


@pytest.mark.parametrize("inpainting", [False, True])
def test_every_parameter_is_trained_and_the_model_is_built_again_from_its_facts(clip: Clip, inpainting: bool) -> None:
    trained = objective(clip, inpainting=inpainting, diffusion=DiffusionConfig(variance="learned_range"))
    fill_zeros(trained.model).train()
    with autocast("bf16", torch.device("cpu")):
        trained.loss(trained.model, trained.prepare(rows(clip)), torch.Generator().manual_seed(0)).backward()
    assert [name for name, parameter in trained.model.named_parameters() if parameter.grad is None] == []
    again = GLIDE.build(trained.facts()).eval()
    again.load_state_dict(trained.model.state_dict())
    x_t, t, tokens = torch.randn(2, 3, 8, 8), torch.tensor([5, 900]), clip.tokenize(CAPTIONS[:2])
    drop = torch.ones(2, dtype=torch.bool)
    torch.testing.assert_close(again(x_t, t, tokens), trained.model.eval()(x_t, t, tokens))
    torch.testing.assert_close(again(x_t, t, tokens, drop), again(x_t, t, clip.tokenize(["", ""])))


def test_previews_and_scores_are_of_the_captions(clip: Clip) -> None:
    trained = objective(clip)
    shown = trained.preview(fill_zeros(trained.model))
    assert shown.shape == (16, 3, 8, 8) and shown.isfinite().all()
    few = {name: value[:2] for name, value in trained.prepare(rows(clip)).items()}
    score = trained.measure(trained.model, few, torch.Generator().manual_seed(0))["mean_squared_score"]
    assert score.shape == (1000,) and score.isfinite().all()
    for preview in ({"sampler": "analytic_dpm"}, {"clip_guidance_scale": 1.0}):
        with pytest.raises(ConfigError, match=f"preview.{next(iter(preview))}"):
            GlideStageConfig(preview=ImageSampling(**preview))


def test_rank_0_validates_the_image_encoder_without_the_other_ranks(clip: Clip) -> None:
    """There is no process group here, so that anything that waits for another rank fails."""
    trained = NoisedClipObjective(NOISED, clip.embedding_dim, Workers(0, 2))
    tensors, generator = trained.prepare(rows(clip)), torch.Generator().manual_seed(0)
    assert trained.loss(trained.model.eval(), tensors, generator).isfinite()


def test_the_image_encoder_learns_captions_of_noised_images(clip: Clip) -> None:
    """With less noise it is surer, and at pure noise it knows nothing."""
    torch.manual_seed(0)
    trained = NoisedClipObjective(NOISED, clip.embedding_dim)
    tensors = trained.prepare(rows(clip))
    optimizer = torch.optim.AdamW(trained.model.parameters(), lr=5e-3)
    trained.model.train()
    for step in range(100):
        optimizer.zero_grad()
        trained.loss(trained.model, tensors, torch.Generator().manual_seed(step)).backward()
        optimizer.step()
    assert [name for name, parameter in trained.model.named_parameters() if parameter.grad is None] == []
    text, diffusion = tensors["text_embedding"], trained.model.diffusion

    def loss(timestep: int) -> float:
        t = torch.full((64,), timestep)
        noise = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            logits = trained.model(diffusion.q_sample(tensors["images"].repeat(8, 1, 1, 1), t, noise), t) @ text.T
        return F.cross_entropy(logits, torch.arange(8).repeat(8)).item()

    assert loss(0) < 0.3 and loss(0) < loss(700) and loss(999) > 1.0
    logged = trained.metrics(True)
    assert 0 < logged["relative_loss"] < 1 and trained.metrics(True) == {}
    assert logged["accuracy_t_0000_0249"] > logged["accuracy_t_0750_0999"] + 0.1, logged

    again = NOISED_CLIP.build(trained.facts())
    again.load_state_dict(trained.model.state_dict())
    x, t = tensors["images"], torch.zeros(8, dtype=torch.int64)
    torch.testing.assert_close(again.eval().embed(x, t), trained.model.eval().embed(x, t))


@pytest.mark.parametrize(("name", "factor"), [("demo", 0.3), ("glide", 1.0)])
def test_the_text_transformer_of_the_demo_learns_slower(name: str, factor: float) -> None:
    section = MODEL_SIZES[name].glide
    assert section.text_learning_rate == factor
    with pytest.raises(ConfigError, match="text_learning_rate: got 0"):
        dataclasses.replace(section, text_learning_rate=0.0)


# The stack


def test_a_published_stack_samples_captions_and_follows_seed_and_settings(stack: GlideStack) -> None:
    assert stack.sampling == SAMPLING and stack.image_size == 16 and stack.noised_clip is not None
    samples = sample(stack)
    assert samples.shape == (3, 3, 16, 16) and samples.isfinite().all() and samples.abs().max() <= 1
    assert torch.equal(samples, sample(stack)) and not torch.equal(samples, sample(stack, seed=2))
    assert not torch.equal(samples[1:], sample(stack, ["a red circle", "a blue star", "a blue star"])[1:])
    with pytest.raises(ConfigError, match=r"upsamplers\.32: got '32', expected an upsampler of the stack: 16"):
        unknown = dataclasses.replace(SAMPLING, upsamplers={"32": UpsamplerSampling()})
        sample_captions(stack, CAPTIONS, sampling=unknown)


def test_negative_captions_are_guided_away_from(stack: GlideStack) -> None:
    plain = sample(stack)
    assert torch.equal(plain, sample(stack, negative=[""] * 3))
    pushed = sample(stack, negative=["a blue star"] * 3)
    assert not torch.equal(plain[0], pushed[0])
    with pytest.raises(InputError, match=r"negative: got 'a blue star', but nothing that reads captions is guided"):
        sample(stack, negative=["a blue star"] * 3, guidance_scale=1.0)
    with pytest.raises(ShapeError, match="got 1 negative captions for 3"):
        stack.sample(CAPTIONS, SAMPLING, torch.Generator(), negative=[""])


def test_sampling_can_start_from_images(stack: GlideStack) -> None:
    start = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    samples = sample(stack, start=start, strength=0.3)
    assert not torch.equal(samples, sample(stack, start=-start, strength=0.3))
    assert torch.equal(sample(stack, start=start, strength=1.0), sample(stack))
    with pytest.raises(ShapeError, match=r"got start images \(3, 3, 8, 8\), expected \(3, 3, 16, 16\)"):
        sample(stack, start=start[:, :, :8, :8])


@pytest.mark.parametrize(("is_noised", "scales"), [(True, (3.0, 30.0)), (False, (300.0, 3000.0))])
def test_clip_guidance_raises_the_similarity_to_the_captions(
    stack: GlideStack, is_noised: bool, scales: tuple[float, float]
) -> None:
    """The similarity is that of the encoder that guides: for noised images, or the frozen CLIP on the denoised image."""
    guided = GlideStack(stack.clip, stack.glide, (), stack.noised_clip if is_noised else None)
    text = stack.clip.encode_text(stack.clip.tokenize(CAPTIONS)).text_embedding
    encode = stack.noised_clip if is_noised else stack.clip

    def similarity(scale: float) -> torch.Tensor:
        settings = dataclasses.replace(SAMPLING.glide, num_steps=10, clip_guidance_scale=scale)
        sampling = dataclasses.replace(SAMPLING, glide=settings, upsamplers={})
        small = sample_captions(guided, CAPTIONS, seed=1, sampling=sampling)
        with torch.no_grad():
            if isinstance(encode, NoisedClip):
                return (encode.embed(small, torch.zeros(3, dtype=torch.int64)) * text).sum(dim=1)
            return (stack.clip.embed_images(stack.clip.resize(small)) * text).sum(dim=1)

    without, weak, strong = (similarity(scale).mean().item() for scale in (0.0, *scales))
    assert without < weak < strong


def test_parts_that_do_not_fit_each_other_are_refused(stack: GlideStack, clip: Clip) -> None:
    for changes, name in (
        ({"image_size": 16}, "image_size"),
        ({"diffusion": DiffusionConfig(schedule="linear")}, "schedule"),
    ):
        other = NoisedClip(dataclasses.replace(NOISED, **changes), clip.embedding_dim)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=f"noised_clip: got {name}"):
            GlideStack(clip, stack.glide, (), other)
    with pytest.raises(CheckpointError, match="noised_clip: got embedding_dim 5"):
        GlideStack(clip, stack.glide, (), NoisedClip(NOISED, 5))
    with pytest.raises(CheckpointError, match="upsampler-32: got images of 8 pixels from glide"):
        upsampler = UpsamplerConfig(UNetConfig(8, 4, (1, 1), 1, norm_groups=2), low_res_size=16, scale=2)
        GlideStack(clip, stack.glide, [Upsampler(upsampler)])
    untokenized = objective(clip).model
    untokenized.text.null_tokens[1] += 1
    with pytest.raises(CheckpointError, match="this CLIP's tokenizer is another"):
        GlideStack(clip, untokenized)
    with pytest.raises(CheckpointError, match="expected a CLIP and a part glide"):
        GlideStack.load(StackFiles("glide", {}, None))


@pytest.mark.parametrize("reads_known", [True, False])
def test_inpainting_keeps_the_known_pixels_and_follows_the_caption(
    stack: GlideStack, clip: Clip, reads_known: bool
) -> None:
    """With the mask as an input of the network, or with the known pixels put back after every step."""
    if reads_known:
        glide = fill_zeros(objective(clip, inpainting=True).model)
        stack = GlideStack(stack.clip, glide, stack.upsamplers)
        stack.sampling = SAMPLING
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    known = torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    known[..., :8] = True
    steps: list[int] = []
    samples = inpaint(stack, images, known, CAPTIONS, seed=1, progress=steps.append)
    assert sum(steps) == num_steps(stack, SAMPLING, 3) == 4 + 2
    assert torch.equal(samples[..., :8], images[..., :8]) and samples.isfinite().all()
    assert torch.equal(samples, inpaint(stack, images, known, CAPTIONS, seed=1))
    others = (
        inpaint(stack, images, known, CAPTIONS[::-1], seed=1),
        inpaint(stack, images, known, CAPTIONS, seed=1, negative=["a blue star"] * 3),
        inpaint(stack, -images, known, CAPTIONS, seed=1),
    )
    assert not any(torch.equal(samples[0, ..., 8:], other[0, ..., 8:]) for other in others)
