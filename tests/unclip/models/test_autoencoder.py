"""Autoencoders and their bottlenecks."""

import dataclasses
import math
import re
from typing import Any

import pytest
import torch

from unclip.errors import ConfigError, ShapeError
from unclip.models.autoencoder import AdversarialAutoencoder, Autoencoder, AutoencoderConfig, Bottleneck
from unclip.models.discriminator import DiscriminatorConfig
from unclip.models.quantisers import GumbelQuantiser, KlBottleneck, VectorQuantiser, nearest_codes

CONFIG = AutoencoderConfig(16, 1, 8, (1, 2), 1, (), True, 4, 3, "kl", codebook_size=10)
KINDS: tuple[Bottleneck, ...] = ("kl", "vq", "gumbel")


def autoencoder(**changes: Any) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(dataclasses.replace(CONFIG, **changes)).eval()


def images(batch: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"patch_size": 2}, {"channel_mult": (1,), "attention_resolutions": (16,)}])
@torch.no_grad()
def test_images_become_latents_and_images_again(kind: Bottleneck, changes: dict[str, Any]) -> None:
    model = autoencoder(bottleneck=kind, **changes)
    size = model.config.latent_size
    assert size * model.config.factor == 16
    latents = model.encode(images())
    assert latents.shape == (3, 3, size, size) and torch.equal(latents, model.encode(images()))
    assert model.decode(latents).shape == (3, 3, 16, 16)
    assert torch.equal(model(images()).images, model.decode(latents))
    larger = model.encode(images(2, 32))
    assert larger.shape == (2, 3, 2 * size, 2 * size) and model.decode(larger).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("kind", ["vq", "gumbel"])
@torch.no_grad()
def test_tokens_are_the_latents(kind: Bottleneck) -> None:
    model = autoencoder(bottleneck=kind)
    tokens, latents = model.tokens(images()), model.encode(images())
    assert tokens.shape == (3, 64) and tokens.dtype == torch.int64 and 0 <= tokens.min() <= tokens.max() < 10
    codebook = model.bottleneck.codebook
    assert torch.equal(codebook[tokens].transpose(1, 2).view(3, 3, 8, 8), latents), "row by row"
    assert torch.equal(model.decode_tokens(tokens), model.decode(latents))


def test_wrong_inputs_are_named() -> None:
    model = autoencoder()
    with pytest.raises(
        ShapeError, match=r"got images \(1, 3, 15, 16\), expected \[B, 3, H, W\] with H and W multiples of 2"
    ):
        model.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ShapeError, match=r"got latents \(1, 4, 8, 8\)"):
        model.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ConfigError, match="bottleneck = 'kl', which has no codes"):
        model.tokens(images())
    tokens = autoencoder(bottleneck="vq")
    for shape in ((1, 3), (4,)):
        with pytest.raises(ShapeError, match=rf"got {re.escape(str(shape))}, expected \[B, s \* s\]"):
            tokens.decode_tokens(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ShapeError, match="codes from 0 to 10, expected 0 to 9"):
        tokens.decode_tokens(torch.tensor([[0, 1, 2, 10]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 17}, "image_size: got 17, expected a multiple of 2"),
        ({"channel_mult": ()}, "at least one level"),
        ({"norm_groups": 3}, "multiples of norm_groups, 3"),
        (
            {"attention_resolutions": (4,)},
            r"attention_resolutions: got 4, expected resolutions of the levels, \[16, 8\]",
        ),
        ({"codebook_size": 1}, "codebook_size: got 1"),
        ({"patch_size": 0}, "patch_size: got 0"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ConfigError, match=r"discriminator\.num_layers: got 3"):
        AdversarialAutoencoder(CONFIG, DiscriminatorConfig(8, 3))


def test_samples_of_the_posterior_have_its_mean_and_deviation() -> None:
    moments = torch.randn(2, 6, 4, 4)
    noise = torch.randn(4000, 2, 3, 4, 4)
    samples = torch.stack([KlBottleneck()(moments, each).latents for each in noise])
    mean, log_variance = moments.chunk(2, dim=1)
    torch.testing.assert_close(samples.mean(dim=0), mean, atol=0.2, rtol=0)
    torch.testing.assert_close(samples.std(dim=0), (log_variance / 2).exp(), atol=0.1, rtol=0.06)
    assert torch.equal(KlBottleneck()(moments).latents, mean)


def test_the_divergence_of_a_standard_normal_is_zero_and_otherwise_that_of_torch() -> None:
    assert KlBottleneck()(torch.zeros(1, 2, 3, 3)).penalty.item() == 0
    moments = torch.randn(2, 6, 4, 4)
    mean, log_variance = moments.chunk(2, dim=1)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(KlBottleneck()(moments).penalty, expected)
    extreme = KlBottleneck()(torch.full((1, 2, 1, 1), 1e4), torch.ones(1, 1, 1, 1))
    assert extreme.penalty.isfinite().all() and extreme.latents.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 1e-3, 100.0])
def test_the_nearest_code_is_that_of_all_distances(scale: float) -> None:
    rows, codebook = torch.randn(500, 7) * scale, torch.randn(33, 7) * scale
    expected = torch.cdist(rows.double(), codebook.double()).argmin(dim=1)
    assert torch.equal(nearest_codes(rows, codebook), expected)
    assert nearest_codes(torch.ones(1, 2), torch.ones(3, 2)).item() == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_codes(rows, codebook), expected), "codes depend on the precision of the network"


def test_gradients_pass_straight_through_the_choice() -> None:
    quantiser, encodings = VectorQuantiser(10, 3), torch.randn(2, 3, 4, 4, requires_grad=True)
    weights = torch.randn(2, 3, 4, 4)
    found = quantiser(encodings)
    (found.latents * weights).sum().backward()
    assert torch.equal(encodings.grad, weights) and quantiser.codebook.grad is None
    torch.testing.assert_close(found.errors.view(2, 4, 4), (found.latents - encodings).square().sum(dim=1).detach())


def test_a_codebook_that_is_not_learned_from_the_loss_adds_no_loss() -> None:
    quantiser, encodings = VectorQuantiser(10, 3, 0.4), torch.randn(2, 3, 4, 4)
    both = quantiser(encodings).penalty
    quantiser.codebook.requires_grad_(False)
    torch.testing.assert_close(quantiser(encodings).penalty, both * 0.4 / 1.4)


def test_the_gumbel_softmax_draws_codes_by_their_probabilities_and_hardens_with_the_temperature() -> None:
    quantiser, logits = GumbelQuantiser(5, 5), torch.randn(1, 5, 1, 1)
    with torch.no_grad():
        quantiser.codebook.copy_(torch.eye(5))  # latents are the weights of the codes
    model = autoencoder(bottleneck="gumbel", codebook_size=5, latent_channels=5)
    noise = torch.cat([model.draw_noise(200, torch.Generator().manual_seed(seed)) for seed in range(10)])
    noise = noise.permute(0, 2, 3, 1).reshape(-1, 5, 1, 1)  # [128000, K, 1, 1]
    drawn = quantiser(logits.expand(len(noise), -1, -1, -1), noise, 0.01).latents.flatten(1)  # [N, K]
    assert drawn.max(dim=1).values.mean() > 0.98, "a low temperature is a choice"
    shares = torch.bincount(drawn.argmax(dim=1), minlength=5) / len(drawn)
    torch.testing.assert_close(shares, logits.flatten().softmax(0), atol=0.01, rtol=0)
    soft = quantiser(logits, noise[:1], 100.0).latents.flatten()
    torch.testing.assert_close(soft, torch.full((5,), 0.2), atol=0.02, rtol=0)


def test_the_divergence_of_codes_is_that_from_the_uniform_distribution() -> None:
    quantiser = GumbelQuantiser(6, 2)
    torch.testing.assert_close(quantiser(torch.zeros(1, 6, 2, 2)).penalty, torch.zeros(1), atol=1e-6, rtol=0)
    certain = torch.zeros(1, 6, 2, 2)
    certain[:, 3] = 100.0
    found = quantiser(certain)
    assert found.penalty.item() == pytest.approx(4 * math.log(6), rel=1e-5) and (found.codes == 3).all()
    logits = torch.randn(2, 6, 3, 3)
    given = torch.distributions.Categorical(logits=logits.permute(0, 2, 3, 1))
    expected = torch.distributions.kl_divergence(given, torch.distributions.Categorical(torch.ones(6))).sum(dim=(1, 2))
    torch.testing.assert_close(quantiser(logits).penalty, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_drawn_from_the_generator(kind: Bottleneck) -> None:
    model = autoencoder(bottleneck=kind)
    one, two, other = (model.draw_noise(2, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    if kind == "vq":
        assert one is None
    else:
        assert torch.equal(one, two) and not torch.equal(one, other) and one.isfinite().all()
        assert not torch.equal(model(images(2), one).images, model(images(2), other).images)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: Bottleneck) -> None:
    """Also those of a discriminator that has not started, which DDP needs."""
    torch.manual_seed(0)
    model = AdversarialAutoencoder(dataclasses.replace(CONFIG, bottleneck=kind), DiscriminatorConfig(8, 2)).train()
    noise = model.draw_noise(3, torch.Generator().manual_seed(0))
    found = model(images(), noise).reconstruction
    (found.images.square().mean() + found.penalty.mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert name.startswith("discriminator.") == (parameter.grad.abs().max().item() == 0), name
