"""GLIDE's networks and guidance against independent code, written from the papers in float64, one sample at a time.

Sources: Nichol et al. 2022 (GLIDE), sections 2 and 4; Dhariwal & Nichol 2021 (ADM), section 3 and appendix; Ho et al. 2020;
Nichol & Dhariwal 2021; Song et al. 2021; Dosovitskiy et al. 2021; Radford et al. 2021.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.unclip.systems.tiny_stacks import calm_variances, fill_zeros
from unclip.config import load, to_dict
from unclip.diffusion import guidance
from unclip.diffusion.process import Denoised, DiffusionConfig, GaussianDiffusion
from unclip.errors import ConfigError, ShapeError
from unclip.models.glide import Glide, GlideConfig
from unclip.models.noised_clip import NoisedClip, NoisedClipConfig
from unclip.models.small_images import Captions, ImageSampling, known_region
from unclip.models.text import TextShape, TextTransformerConfig
from unclip.models.unet import UNetConfig

UNET = UNetConfig(
    16, 8, channel_mult=(1, 2, 2), num_res_blocks=2, attention_resolutions=(8, 4), head_channels=4, norm_groups=4
)
SHAPE = TextShape(length=6, width=7, vocab_size=40)
TEXT = TextTransformerConfig(width=12, depth=2, num_heads=3)
LEARNED = DiffusionConfig(schedule="linear", variance="learned_range")
TOKENS = torch.tensor([[39, 5, 7, 38, 0, 0], [39, 0, 9, 11, 12, 38], [39, 38, 0, 0, 0, 0]])  # two of them are padded
EMPTY = torch.tensor([[39, 38, 0, 0, 0, 0]])
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def new_glide(**changes: Any) -> Glide:
    torch.manual_seed(0)
    model = fill_zeros(Glide(GlideConfig(UNET, TEXT, **{"diffusion": LEARNED, **changes}), SHAPE))
    model.text.set_null(EMPTY)
    if model.config.diffusion.variance == "learned_range":
        calm_variances(model.unet.output[-1])
    return model


def images(count: int = 3, channels: int = 3, size: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


# Reference: plain functions of a dictionary of weights


class Weights:
    """Weights in float64 by the path of their module."""

    def __init__(self, model: torch.nn.Module, path: str = "") -> None:
        self.tensors = {name: value.double() for name, value in model.state_dict().items()}
        self.path = path

    def __truediv__(self, name: object) -> "Weights":
        inner = object.__new__(Weights)
        inner.tensors, inner.path = self.tensors, f"{self.path}{name}."
        return inner

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.path + name]

    def __contains__(self, name: str) -> bool:
        return any(each.startswith(self.path + name) for each in self.tensors)

    def linear(self, x: Tensor) -> Tensor:
        product = torch.einsum("...i,oi->...o", x, self["weight"])
        return product + self["bias"] if "bias" in self else product

    def conv(self, x: Tensor) -> Tensor:
        """[C, H, W] -> [O, H, W], zero-padded."""
        kernel = self["weight"]
        side = kernel.shape[-1]
        padded = F.pad(x, [side // 2] * 4)
        windows = padded.unfold(1, side, 1).unfold(2, side, 1)  # [C, H, W, side, side]
        return torch.einsum("chwij,ocij->ohw", windows, kernel) + self["bias"][:, None, None]

    def layer_norm(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self["weight"] + self["bias"]

    def group_norm(self, x: Tensor, groups: int) -> Tensor:
        """x [C, H, W]."""
        rows = x.reshape(groups, -1)
        centred = rows - rows.mean(1, keepdim=True)
        normed = (centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
        return normed * self["weight"][:, None, None] + self["bias"][:, None, None]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """q [Q, D]; k, v [K, D] -> [Q, D]."""
    width = q.shape[1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width)
        weights = (scores - scores.max()).exp()
        outputs.append(weights / weights.sum(1, keepdim=True) @ v[:, part])
    return torch.cat(outputs, dim=1)


def sinusoids(t: int, width: int) -> Tensor:
    frequencies = [10_000 ** (-index / (width // 2)) for index in range(width // 2)]
    angles = [t * frequency for frequency in frequencies]
    return torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float64)


def time_mlp(w: Weights, t: int, width: int) -> Tensor:
    hidden = silu((w / "layers" / 0).linear(sinusoids(t, width)))
    return (w / "layers" / 2).linear(hidden)


def transformer(w: Weights, x: Tensor, depth: int, heads: int) -> Tensor:
    """Pre-norm blocks over x [L, D], in which all tokens see each other."""
    for index in range(depth):
        block = w / "blocks" / index
        q, k, v = (block / "to_qkv").linear((block / "attention_norm").layer_norm(x)).chunk(3, dim=1)
        x = x + (block / "to_out").linear(attend(q, k, v, heads))
        hidden = gelu((block / "mlp" / 0).linear((block / "mlp_norm").layer_norm(x)))
        x = x + (block / "mlp" / 2).linear(hidden)
    return (w / "norm").layer_norm(x)


def encode(w: Weights, tokens: Tensor) -> Tensor:
    """Last states [K, D] of one caption's K tokens, without padding. GLIDE, section 4.1."""
    length = max(index for index, token in enumerate(tokens.tolist()) if token) + 1
    x = torch.stack([w["embedding.weight"][token] for token in tokens[:length].tolist()]) + w["positions"][:length]
    return transformer(w, x, TEXT.depth, TEXT.num_heads)


def res_block(w: Weights, x: Tensor, time: Tensor, config: UNetConfig, resample: str) -> Tensor:
    """ADM: up- or downsampling inside the block, adaptive group norm (appendix: scale and shift by the embedding)."""

    def resize(h: Tensor) -> Tensor:
        if resample == "down":
            return (h[:, ::2, ::2] + h[:, 1::2, ::2] + h[:, ::2, 1::2] + h[:, 1::2, 1::2]) / 4
        return h.repeat_interleave(2, 1).repeat_interleave(2, 2) if resample == "up" else h

    h = (w / "conv1").conv(resize(silu((w / "norm1").group_norm(x, config.norm_groups))))
    scale, shift = (w / "time").linear(silu(time)).chunk(2)
    h = (w / "norm2").group_norm(h, config.norm_groups) * (1 + scale[:, None, None]) + shift[:, None, None]
    h = (w / "conv2").conv(silu(h))
    x = resize(x)
    return ((w / "skip").conv(x) if "skip.weight" in w else x) + h


def attention_block(w: Weights, x: Tensor, text: Tensor, config: UNetConfig) -> Tensor:
    """Self-attention whose keys and values are those of the text, projected for this layer, and of the pixels."""
    channels, height, width = x.shape
    pixels = (w / "norm").group_norm(x, config.norm_groups).reshape(channels, -1).T
    q, k, v = (w / "to_qkv").linear(pixels).chunk(3, dim=1)
    text_k, text_v = (w / "context_to_kv").linear(text).chunk(2, dim=1)
    heads = channels // config.head_channels
    attended = attend(q, torch.cat([text_k, k]), torch.cat([text_v, v]), heads)
    return x + (w / "to_out").linear(attended).T.reshape(channels, height, width)


def reference(model: Glide, x_t: Tensor, t: int, tokens: Tensor) -> Tensor:
    """Output [C, S, S] of GLIDE for one sample x_t [3 or 7, S, S], in float64."""
    config, w = model.config.unet, Weights(model)
    text = encode(w / "text", tokens)  # [K, D]
    unet = w / "unet"
    time = time_mlp(unet / "time_embedding", t, config.channels) + (w / "text" / "to_time").linear(text[-1])

    def step(path: Weights, h: Tensor, resample: str) -> Tensor:
        h = res_block(path / "block", h, time, config, resample)
        return attention_block(path / "attend", h, text, config) if "attend" in path else h

    levels = len(config.channel_mult)
    h = (unet / "input").conv(x_t.double())
    skips, index = [h], 0
    for level in range(levels):
        for resample in ["none"] * config.num_res_blocks + ["down"] * (level < levels - 1):
            h = step(unet / "down" / index, h, resample)
            skips.append(h)
            index += 1
    h = step(unet / "middle" / 0, h, "none")
    h = res_block(unet / "middle" / 1, h, time, config, "none")
    index = 0
    for level in reversed(range(levels)):
        for _ in range(config.num_res_blocks + 1):
            h = step(unet / "up" / index, torch.cat([h, skips.pop()]), "none")
            index += 1
        if level:
            h = step(unet / "up" / index, h, "up")
            index += 1
    h = silu((unet / "output" / 0).group_norm(h, config.norm_groups))
    return (unet / "output" / 2).conv(h)


def reference_noised_clip(model: NoisedClip, x_t: Tensor, t: int) -> Tensor:
    """Unit-norm embedding [E] of one noised image."""
    config, w = model.config, Weights(model)
    side, size = config.patch_size, config.image_size
    kernel, bias = (w / "patches")["weight"], (w / "patches")["bias"]
    tokens = [time_mlp(w / "time_embedding", t, config.width)]
    for y in range(0, size, side):
        for x in range(0, size, side):
            patch = x_t[:, y : y + side, x : x + side].double()
            tokens.append((kernel * patch).sum(dim=(1, 2, 3)) + bias)
    states = (w / "norm_in").layer_norm(torch.stack(tokens) + w["positions"])
    embedding = (w / "projection").linear(transformer(w, states, config.depth, config.num_heads)[0])
    return embedding / embedding.square().sum().sqrt()


# Networks


@torch.no_grad()
def test_the_network_is_that_of_the_papers() -> None:
    model, x_t, t = new_glide(), images(), [3, 500, 999]
    found = model(x_t, torch.tensor(t), TOKENS)
    expected = torch.stack([reference(model, *row) for row in zip(x_t, t, TOKENS, strict=True)])
    assert expected.std() > 0.1
    torch.testing.assert_close(found.double(), expected, **CLOSE)
    dropped = model(x_t, torch.tensor(t), TOKENS, torch.tensor([True, False, False]))
    torch.testing.assert_close(dropped[0].double(), reference(model, x_t[0], t[0], EMPTY[0]), **CLOSE)
    assert torch.equal(dropped[1:], found[1:])


@torch.no_grad()
def test_the_inpainting_network_reads_the_known_pixels_and_their_mask() -> None:
    model, x_t, t = new_glide(inpainting=True), images(), torch.tensor([3, 500, 999])
    mask = torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    mask[:, :, 4:9] = True
    known = known_region(images(seed=2), mask)
    assert not known[:, :, :4].any() and known[:, 3, 4:9].eq(1).all()
    found = model(x_t, t, TOKENS, known=known)
    expected = [
        reference(model, torch.cat(row[:2]), *row[2:]) for row in zip(x_t, known, t.tolist(), TOKENS, strict=True)
    ]
    torch.testing.assert_close(found.double(), torch.stack(expected), **CLOSE)
    torch.testing.assert_close(model(x_t, t, TOKENS), model(x_t, t, TOKENS, known=torch.zeros_like(known)))
    with pytest.raises(ShapeError, match="glide: got known pixels, expected none"):
        new_glide()(x_t, t, TOKENS, known=known)


@torch.no_grad()
def test_the_noised_image_encoder_is_a_vision_transformer_with_the_timestep_as_its_class_token() -> None:
    torch.manual_seed(0)
    model = NoisedClip(NoisedClipConfig(image_size=8, patch_size=4, width=12, depth=2, num_heads=3), 5).eval()
    x_t, t = images(size=8), [3, 500, 999]
    expected = torch.stack([reference_noised_clip(model, *row) for row in zip(x_t, t, strict=True)])
    torch.testing.assert_close(model.embed(x_t, torch.tensor(t)).double(), expected, **CLOSE)
    logits = model(x_t, torch.tensor(t)).double()
    torch.testing.assert_close(logits, expected / 0.07, **CLOSE)
    model.log_scale.fill_(10.0)
    torch.testing.assert_close(model(x_t, torch.tensor(t)).double(), expected * 100, **CLOSE)


# Samplers with guidance


class Schedule:
    """The linear schedule, respaced to the given timesteps. Ho et al. 2020, section 4; Nichol & Dhariwal 2021, eq. 19."""

    def __init__(self, timesteps: list[int]) -> None:
        product, self.alpha_bar = 1.0, {-1: 1.0}
        for t in range(1000):
            product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
            self.alpha_bar[t] = product
        self.steps = list(zip(timesteps, [*timesteps[1:], -1], strict=True))


def guided_eps(
    model: Glide, x_t: Tensor, t: int, tokens: Tensor, negative: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Classifier-free guidance of GLIDE, section 2.3, and the conditional network's variance fraction."""
    conditional = torch.stack([reference(model, x, t, row) for x, row in zip(x_t, tokens, strict=True)])
    empty = torch.stack([reference(model, x, t, row) for x, row in zip(x_t, negative, strict=True)])
    eps, fraction = conditional.chunk(2, dim=1)
    null = empty.chunk(2, dim=1)[0]
    return null + scale * (eps - null), (fraction + 1) / 2


TIMESTEPS = [349, 262, 174, 87, 0]
"""Timesteps of 5 steps over a strength of 0.35. From pure noise, an untrained network's samples grow a hundredfold, and so do
the rounding errors of float32."""


def noised_start(schedule: Schedule) -> Tensor:
    alpha_bar = schedule.alpha_bar[TIMESTEPS[0]]
    return math.sqrt(alpha_bar) * images(2, seed=4).double() + math.sqrt(1 - alpha_bar) * images(2).double()


@pytest.mark.parametrize("negative", [False, True])
@torch.no_grad()
def test_ddpm_with_classifier_free_guidance_is_that_of_the_papers(negative: bool) -> None:
    model, scale = new_glide(), 3.0
    pushed_away = TOKENS[1:].flip(0) if negative else EMPTY.expand(2, -1)
    found = model.sample(
        Captions(TOKENS[:2], pushed_away if negative else None),
        ImageSampling("ddpm", 5, guidance_scale=scale, thresholding="none", strength=0.35),
        start=images(2, seed=4),
        x_T=images(2),
        generator=torch.Generator().manual_seed(7),
    )
    noise, schedule = torch.Generator().manual_seed(7), Schedule(TIMESTEPS)
    x = noised_start(schedule)
    for t, t_next in schedule.steps:
        here, after = schedule.alpha_bar[t], schedule.alpha_bar[t_next]
        beta = 1 - here / after
        eps, fraction = guided_eps(model, x, t, TOKENS[:2], pushed_away, scale)
        x = (x - beta / math.sqrt(1 - here) * eps) / math.sqrt(1 - beta)  # Ho et al. 2020, eq. 11
        if t_next >= 0:
            posterior = beta * (1 - after) / (1 - here)
            log_variance = fraction * math.log(beta) + (1 - fraction) * math.log(posterior)  # Nichol & Dhariwal, eq. 15
            x = x + (log_variance / 2).exp() * torch.randn(x.shape, generator=noise)
    assert x.std() > 0.3
    torch.testing.assert_close(found.double(), x, **CLOSE)


@torch.no_grad()
def test_ddim_with_both_kinds_of_guidance_is_that_of_the_papers() -> None:
    """CLIP guidance shifts eps by its gradient: GLIDE, section 2.4, in the form of Dhariwal & Nichol 2021, algorithm 2."""
    model, scale, clip_scale = new_glide(), 3.0, 0.5
    gradient = images(2, seed=5) * 0.1

    def similarity(x_t: Tensor, t: Tensor) -> Tensor:
        return ((1 + t[:, None, None, None] / 1000) * gradient * x_t).sum(dim=(1, 2, 3))

    found = model.sample(
        Captions(TOKENS[:2], noised_similarity=similarity),
        ImageSampling(
            "ddim", 5, guidance_scale=scale, clip_guidance_scale=clip_scale, thresholding="none", strength=0.35
        ),
        start=images(2, seed=4),
        x_T=images(2),
    )
    schedule = Schedule(TIMESTEPS)
    x = noised_start(schedule)
    for t, t_next in schedule.steps:
        here, after = schedule.alpha_bar[t], schedule.alpha_bar[t_next]
        eps, _ = guided_eps(model, x, t, TOKENS[:2], EMPTY.expand(2, -1), scale)
        eps = eps - clip_scale * math.sqrt(1 - here) * (1 + t / 1000) * gradient.double()
        x0 = (x - math.sqrt(1 - here) * eps) / math.sqrt(here)
        x = math.sqrt(after) * x0 + math.sqrt(1 - after) * eps  # Song et al. 2021, eq. 12
    torch.testing.assert_close(found.double(), x, **CLOSE)


def test_clip_guidance_shifts_the_mean_by_the_gradient_times_the_variance() -> None:
    """GLIDE, section 2.4: the mean moves by s Sigma times the gradient. Shifting eps divides this by sqrt(alpha), which is 1
    up to a hundredth when all steps are taken."""
    diffusion = GaussianDiffusion(DiffusionConfig(schedule="linear"))
    x_t, x0, gradient = images(2), images(2, seed=2), images(2, seed=3)
    for timestep in (1, 10, 500, 999):
        t = torch.full((2,), timestep)
        plain = Denoised(x0)
        guided = guidance.classifier(
            diffusion, lambda *_, plain=plain: plain, lambda x, _: (gradient * x).sum(dim=(1, 2, 3)), 2.0
        )(x_t, t)
        moved = diffusion.q_posterior(guided.x0, x_t, t).mean - diffusion.q_posterior(x0, x_t, t).mean
        beta = 1e-4 + (0.02 - 1e-4) * timestep / 999
        torch.testing.assert_close(moved, 2 * beta * gradient / math.sqrt(1 - beta), rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_captions_are_read_once_for_all_steps() -> None:
    model, seen = new_glide(), []
    model.text.register_forward_hook(lambda *_: seen.append(1))
    model.sample(Captions(TOKENS), ImageSampling(num_steps=4, guidance_scale=2), generator=torch.Generator())
    assert len(seen) == 2  # captions, and empty captions


def test_settings_are_checked_and_survive_a_round_trip() -> None:
    config = GlideConfig(UNET, TEXT, text_drop_prob=0.3, inpainting=True, diffusion=LEARNED)
    assert load(GlideConfig, to_dict(config)) == config
    noised_clip = NoisedClipConfig(32, 8, 64, 2, 4, LEARNED)
    assert load(NoisedClipConfig, to_dict(noised_clip)) == noised_clip
    with pytest.raises(ConfigError, match=r"text_drop_prob: got 1\.0"):
        GlideConfig(text_drop_prob=1.0)
    with pytest.raises(ConfigError, match="attention_resolutions"):
        GlideConfig(UNetConfig())
    with pytest.raises(ConfigError, match="patch_size: got 5, expected a divisor of image_size 64"):
        NoisedClipConfig(patch_size=5)
    with pytest.raises(ConfigError, match=r"clip_guidance_scale: got 1\.0, expected 0 if no caption is given"):
        new_glide().sample(Captions(TOKENS), ImageSampling(num_steps=1, clip_guidance_scale=1.0))
