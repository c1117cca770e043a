"""The networks and samplers of ADM against code that is written here from the paper, and against exact denoisers.

Source: Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis": section 3 and Table 4 (network), section 4 and
algorithms 1 and 2 (classifier guidance).
"""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.unclip.systems.tiny_stacks import add_noise
from unclip.diffusion import guidance, samplers
from unclip.diffusion.process import Denoised, DiffusionConfig, GaussianDiffusion
from unclip.errors import ConfigError
from unclip.models.classifier import Classifier, ClassifierConfig, log_probability
from unclip.models.image_denoiser import ImageDenoiser, ImageDenoiserConfig, ImageDenoiserSampling
from unclip.models.unet import UNetConfig

NUM_CLASSES = 3
UNET = UNetConfig(
    16,
    channels=8,
    channel_mult=(1, 2, 2),
    num_res_blocks=2,
    attention_resolutions=(8, 4),
    head_channels=4,
    norm_groups=4,
)
DIFFUSION = DiffusionConfig(20, schedule="linear", variance="learned_range")
LABEL = torch.tensor([0, 2, 1, 3])
"""The last has no class."""


@pytest.fixture(scope="module")
def denoiser() -> ImageDenoiser:
    torch.manual_seed(0)
    return add_noise(ImageDenoiser(ImageDenoiserConfig(UNET, diffusion=DIFFUSION), NUM_CLASSES), 0.1)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(1)
    return add_noise(Classifier(ClassifierConfig(UNET, DIFFUSION), NUM_CLASSES), 0.1)


# The networks, from the paper


class Paper:
    """ADM's layers as plain functions of the weights of a network, which are found by their names."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def linear(self, name: str, h: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", h, self.weights[f"{name}.weight"]) + self.weights[f"{name}.bias"]

    def conv(self, name: str, h: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(h, weight, self.weights[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(self, name: str, h: Tensor) -> Tensor:
        grouped = h.reshape(len(h), UNET.norm_groups, -1)
        mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, keepdim=True, unbiased=False)
        h = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(h.shape)
        return h * self.weights[f"{name}.weight"][:, None, None] + self.weights[f"{name}.bias"][:, None, None]

    def time(self, name: str, t: Tensor) -> Tensor:
        half = UNET.channels // 2
        angles = t[:, None] * torch.tensor([10_000 ** (-index / half) for index in range(half)])
        h = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.linear(f"{name}.layers.2", silu(self.linear(f"{name}.layers.0", h)))

    def block(
        self, name: str, h: Tensor, embedding: Tensor, resample: Callable[[Tensor], Tensor] = lambda h: h
    ) -> Tensor:
        """BigGAN's residual block, with adaptive group normalisation: AdaGN(h, y) = y_s GroupNorm(h) + y_b."""
        scale, shift = self.linear(f"{name}.time", silu(embedding))[:, :, None, None].chunk(2, dim=1)
        inner = self.conv(f"{name}.conv1", resample(silu(self.norm(f"{name}.norm1", h))))
        inner = self.conv(f"{name}.conv2", silu((1 + scale) * self.norm(f"{name}.norm2", inner) + shift))
        h = resample(h)
        return inner + (self.conv(f"{name}.skip", h) if f"{name}.skip.weight" in self.weights else h)

    def attention(self, name: str, h: Tensor) -> Tensor:
        batch, width, height, _ = h.shape
        pixels = self.norm(f"{name}.norm", h).flatten(2).permute(0, 2, 1)
        attended = heads(self.linear(f"{name}.to_qkv", pixels))
        return h + self.linear(f"{name}.to_out", attended).permute(0, 2, 1).reshape(batch, width, height, height)


def silu(h: Tensor) -> Tensor:
    return h / (1 + (-h).exp())


def heads(qkv: Tensor) -> Tensor:
    """Multi-head attention of [B, L, 3 C], with heads of a constant number of channels (section 3.1)."""
    parts = []
    for q, k, v in zip(*(each.split(UNET.head_channels, dim=2) for each in qkv.chunk(3, dim=2)), strict=True):
        scores = torch.einsum("bqc,bkc->bqk", q, k) / math.sqrt(UNET.head_channels)
        parts.append(torch.einsum("bqk,bkc->bqc", scores.exp() / scores.exp().sum(2, keepdim=True), v))
    return torch.cat(parts, dim=2)


def halve(h: Tensor) -> Tensor:
    return (h[:, :, ::2, ::2] + h[:, :, 1::2, ::2] + h[:, :, ::2, 1::2] + h[:, :, 1::2, 1::2]) / 4


def double(h: Tensor) -> Tensor:
    return h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def paper_denoiser(weights: dict[str, Tensor], x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
    net = Paper(weights)
    embedding = net.time("unet.time_embedding", t) + weights["class_embedding.weight"][label]
    h = net.conv("unet.input", x_t)
    skips, resolution, number = [h], UNET.image_size, 0
    for level in range(len(UNET.channel_mult)):
        for _ in range(UNET.num_res_blocks):
            h = net.block(f"unet.down.{number}.block", h, embedding)
            if resolution in UNET.attention_resolutions:
                h = net.attention(f"unet.down.{number}.attend", h)
            skips.append(h)
            number += 1
        if level < len(UNET.channel_mult) - 1:
            h = net.block(f"unet.down.{number}.block", h, embedding, halve)
            skips.append(h)
            number, resolution = number + 1, resolution // 2
    h = net.attention("unet.middle.0.attend", net.block("unet.middle.0.block", h, embedding))
    h = net.block("unet.middle.1", h, embedding)
    number = 0
    for level in reversed(range(len(UNET.channel_mult))):
        for _ in range(UNET.num_res_blocks + 1):
            h = net.block(f"unet.up.{number}.block", torch.cat([h, skips.pop()], dim=1), embedding)
            if resolution in UNET.attention_resolutions:
                h = net.attention(f"unet.up.{number}.attend", h)
            number += 1
        if level > 0:
            h = net.block(f"unet.up.{number}.block", h, embedding, double)
            number, resolution = number + 1, resolution * 2
    return net.conv("unet.output.2", silu(net.norm("unet.output.0", h)))


def paper_classifier(weights: dict[str, Tensor], x_t: Tensor, t: Tensor) -> Tensor:
    net = Paper(weights)
    embedding = net.time("time_embedding", t)
    h = net.conv("input", x_t)
    resolution, number = UNET.image_size, 0
    for level in range(len(UNET.channel_mult)):
        for _ in range(UNET.num_res_blocks):
            h = net.block(f"blocks.{number}", h, embedding)
            number += 1
            if resolution in UNET.attention_resolutions:
                h = net.attention(f"blocks.{number}", h)
                number += 1
        if level < len(UNET.channel_mult) - 1:
            h = net.block(f"blocks.{number}", h, embedding, halve)
            number, resolution = number + 1, resolution // 2
    h = net.block(f"blocks.{number}", h, embedding)
    h = net.block(f"blocks.{number + 2}", net.attention(f"blocks.{number + 1}", h), embedding)
    pixels = silu(net.norm("norm", h)).flatten(2).permute(0, 2, 1)
    tokens = torch.cat([pixels.mean(1, keepdim=True), pixels], dim=1) + weights["output.positions"]
    return net.linear("output.to_logits", heads(net.linear("output.to_qkv", tokens))[:, 0])


@torch.no_grad()
def test_the_networks_are_those_of_the_paper(denoiser: ImageDenoiser, classifier: Classifier) -> None:
    x_t, t = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 7, 12, 19])
    predicted = denoiser(x_t, t, LABEL)
    assert predicted.std() > 0.1
    torch.testing.assert_close(predicted, paper_denoiser(denoiser.state_dict(), x_t, t, LABEL), atol=1e-5, rtol=1e-5)
    logits = classifier(x_t, t)
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, paper_classifier(classifier.state_dict(), x_t, t), atol=1e-5, rtol=1e-5)


# Its samplers, from the paper


def paper_gradient(weights: dict[str, Tensor], x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
    x = x_t.clone().requires_grad_()
    chosen = paper_classifier(weights, x, t).log_softmax(dim=1)[torch.arange(len(x)), label]
    (gradient,) = torch.autograd.grad(chosen.sum(), x)
    return gradient


def calmed(model: Any, last: str) -> Any:
    """Copy of an untrained network with small outputs, so that 1 / sqrt(alpha_bar) does not magnify its rounding."""
    model = copy.deepcopy(model)
    for parameter in model.get_submodule(last).parameters():
        parameter.data *= 0.05
    return model


def paper_sample(
    denoiser: ImageDenoiser,
    classifier: Classifier,
    x: Tensor,
    label: Tensor,
    steps: list[int],
    scale: float,
    noises: list[Tensor],
) -> Tensor:
    """Algorithm 1 with one noise for each step, algorithm 2 without any, on a subsequence of the timesteps; x0 is clamped, as
    networks without training need it."""
    betas = torch.linspace(1e-4 * 50, 0.02 * 50, 20, dtype=torch.float64).clamp(max=0.999)  # T = 20, not 1,000
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    for index, step in enumerate(steps):
        now = alpha_bar[step]
        later = alpha_bar[steps[index + 1]] if index + 1 < len(steps) else torch.ones((), dtype=torch.float64)
        t = torch.full((len(x),), step)
        with torch.no_grad():
            eps, v = paper_denoiser(denoiser.state_dict(), x, t, label).double().chunk(2, dim=1)
        gradient = scale * paper_gradient(classifier.state_dict(), x, t, label).double()
        if not noises:
            eps = eps - (1 - now).sqrt() * gradient
        x0 = ((x - (1 - now).sqrt() * eps) / now.sqrt()).clamp(-1, 1)
        eps = (x - now.sqrt() * x0) / (1 - now).sqrt()
        if noises:
            beta = 1 - now / later
            smallest = beta * (1 - later) / (1 - now)
            share = ((v + 1) / 2).clamp(0, 1)
            variance = (share * beta.log() + (1 - share) * smallest.log()).exp() if later < 1 else torch.zeros_like(x0)
            mean = (x - beta / (1 - now).sqrt() * eps) / (1 - beta).sqrt()
            x = (mean + variance * gradient + variance.sqrt() * noises[index]).float()
        else:
            x = (later.sqrt() * x0 + (1 - later).sqrt() * eps).float()
    return x


@pytest.mark.parametrize(("num_steps", "steps"), [(20, list(range(20))), (5, [0, 5, 10, 14, 19])])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_samplers_are_algorithms_1_and_2(
    denoiser: ImageDenoiser, classifier: Classifier, sampler: str, num_steps: int, steps: list[int]
) -> None:
    denoiser, classifier = calmed(denoiser, "unet.output.2"), calmed(classifier, "output.to_logits")
    x_T, label = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)), LABEL[:2]
    generator = torch.Generator().manual_seed(4)
    noises = [torch.randn(x_T.shape, generator=generator) for _ in steps] if sampler == "ddpm" else []
    expected = paper_sample(denoiser, classifier, x_T, label, steps[::-1], 20.0, noises)
    settings = ImageDenoiserSampling(sampler, num_steps, classifier_scale=20.0)  # type: ignore[arg-type]
    target = log_probability(classifier, label)
    generator = torch.Generator().manual_seed(4)
    samples = denoiser.sample(2, label, settings, target, x_T=x_T, generator=generator)
    torch.testing.assert_close(samples, expected, atol=1e-5, rtol=1e-5)
    plain = denoiser.sample(2, label, settings, x_T=x_T, generator=torch.Generator().manual_seed(4))
    assert (plain - samples).abs().max() > 0.01


# Exact denoisers


IMAGES = torch.stack([torch.linspace(-1, 0.5, 12), torch.linspace(0.8, -0.7, 12)]).double().view(2, 3, 2, 2)
PRIOR = torch.tensor([0.7, 0.3]).double()


def exact_log_probability(diffusion: GaussianDiffusion, x_t: Tensor, t: Tensor) -> Tensor:
    """log p(y | x_t) for data of two images, [B, 2]."""
    alpha_bar = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1, 1)
    distances = (x_t[:, None] - alpha_bar.sqrt() * IMAGES).square().flatten(2).sum(dim=2)
    return (PRIOR.log() - distances / (2 * (1 - alpha_bar.view(-1, 1)))).log_softmax(dim=1)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_a_classifier_guides_the_exact_denoiser_of_two_images_exactly(scale: float) -> None:
    """By Bayes' theorem, scale 1 turns the denoiser of both images into that of one; any other scale extrapolates."""
    diffusion = GaussianDiffusion(DiffusionConfig())
    t = torch.tensor([50, 200, 400, 600, 800])
    labels = torch.tensor([0, 1, 0, 1, 1])
    noise = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    x_t = diffusion.q_sample(IMAGES[[0, 1, 1, 0, 0]], t, noise)

    def unconditional(x_t: Tensor, t: Tensor) -> Denoised:
        return Denoised(torch.einsum("by,ychw->bchw", exact_log_probability(diffusion, x_t, t).exp(), IMAGES))

    def target(x_t: Tensor, t: Tensor) -> Tensor:
        return exact_log_probability(diffusion, x_t, t)[torch.arange(5), labels]

    guided = guidance.classifier(diffusion, unconditional, target, scale)(x_t, t).x0
    without = unconditional(x_t, t).x0
    torch.testing.assert_close(guided, without + scale * (IMAGES[labels] - without), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("by_mean", [True, False])
def test_a_guided_sampler_of_two_images_samples_the_chosen_one(by_mean: bool) -> None:
    """Both algorithms turn the denoiser of both images into a sampler of one, however rare it is."""
    diffusion = GaussianDiffusion(DiffusionConfig(variance="fixed_large"))
    generator = torch.Generator().manual_seed(1)
    x_T = torch.randn(64, 3, 2, 2, generator=generator).double()

    def unconditional(x_t: Tensor, t: Tensor) -> Denoised:
        return Denoised(torch.einsum("by,ychw->bchw", exact_log_probability(diffusion, x_t, t).exp(), IMAGES))

    def target(x_t: Tensor, t: Tensor) -> Tensor:
        return exact_log_probability(diffusion, x_t, t)[:, 1]

    def share(scale: float) -> float:
        if by_mean:
            shift = guidance.gradient(target, scale)
            samples = samplers.ddpm(diffusion, unconditional, x_T, 250, generator, mean_shift=shift)
        else:
            samples = samplers.ddim(diffusion, guidance.classifier(diffusion, unconditional, target, scale), x_T, 25)
        return ((samples - IMAGES[1]).abs().amax(dim=(1, 2, 3)) < 0.1).double().mean().item()

    assert abs(share(0.0) - 0.3) < 0.2
    assert share(1.0) == 1.0


# Settings


@torch.no_grad()
def test_classes_can_be_dropped_and_guided_without_a_classifier(denoiser: ImageDenoiser) -> None:
    x_t, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 9])
    without = denoiser.denoiser(None)(x_t, t).x0
    torch.testing.assert_close(denoiser.denoiser(torch.full((2,), NUM_CLASSES))(x_t, t).x0, without)
    plain = ImageDenoiserSampling(thresholding="none")
    guided = denoiser.denoiser(LABEL[:2], ImageDenoiserSampling(guidance_scale=3.0, thresholding="none"))(x_t, t).x0
    conditional, null = denoiser.denoiser(LABEL[:2], plain)(x_t, t).x0, denoiser.denoiser(None, plain)(x_t, t).x0
    torch.testing.assert_close(guided, null + 3 * (conditional - null))
    for other in (ImageDenoiser(denoiser.config), ImageDenoiser(ImageDenoiserConfig(UNET, class_drop_prob=0.0), 2)):
        with pytest.raises(ConfigError, match=r"guidance_scale: got 3\.0, expected 1 for a network without classes"):
            other.denoiser(None, ImageDenoiserSampling(guidance_scale=3.0))


def test_classifier_guidance_by_means_keeps_to_its_interval(denoiser: ImageDenoiser, classifier: Classifier) -> None:
    x_T, label = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5)), LABEL[:2]
    target = log_probability(classifier, label)

    def sample(interval: tuple[float, float], scale: float = 3.0) -> Tensor:
        settings = ImageDenoiserSampling("ddpm", 10, classifier_scale=scale, guidance_interval=interval)
        return denoiser.sample(2, label, settings, target, x_T=x_T, generator=torch.Generator().manual_seed(6))

    samples = [sample((0.0, 1.0)), sample((0.2, 0.6)), sample((0.0, 1.0), scale=0.0)]
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(samples))
    assert torch.equal(sample((0.51, 0.52)), samples[2])  # no timestep of the sampler is in it
