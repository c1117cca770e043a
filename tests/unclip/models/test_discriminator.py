"""The discriminator, its loss and its adaptive weight against derivations in float64."""

import numpy as np
import pytest
import torch

from unclip.errors import ConfigError
from unclip.models.discriminator import (
    LARGEST_ADAPTIVE_WEIGHT,
    SLOPE,
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    hinge_loss,
)


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """Convolution of x [B, C_in, H, W] with a 4 x 4 kernel and one row of zeros around, by its definition."""
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (4, 4), axis=(2, 3))[:, :, ::stride, ::stride]
    return np.einsum("bchwij,ocij->bohw", windows, weight) + bias[:, None, None]


def normalise(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    batch, channels, height, width = x.shape
    grouped = x.reshape(batch, groups, -1)
    centred = grouped - grouped.mean(axis=2, keepdims=True)
    grouped = centred / np.sqrt(centred.var(axis=2, keepdims=True) + 1e-5)
    return grouped.reshape(batch, channels, height, width) * weight[:, None, None] + bias[:, None, None]


def test_logits_are_those_of_a_derivation_in_float64() -> None:
    torch.manual_seed(0)
    model = Discriminator(DiscriminatorConfig(8, 2, norm_groups=4))
    weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    h = images.double().numpy()
    for layer, stride in enumerate((2, 2, 1)):
        name = f"layers.{layer}"
        h = convolve(h, weights[f"{name}.conv.weight"], weights[f"{name}.conv.bias"], stride)
        if layer:
            h = normalise(h, 4, weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"])
        h = np.where(h > 0, h, SLOPE * h)
    expected = convolve(h, weights["output.weight"], weights["output.bias"], 1)
    found = model(images)
    assert found.shape == (2, 1, 6, 6) and expected.std() > 0.01
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-5)


def test_the_logits_of_an_image_depend_on_no_other_image() -> None:
    model, images = Discriminator(DiscriminatorConfig(8, 1)), torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]), atol=1e-5, rtol=1e-5)


def test_the_published_discriminator_has_its_size() -> None:
    """64 channels and three layers that halve the resolution; logits of patches of 70 pixels. Source: Isola et al. 2017."""
    model = Discriminator(DiscriminatorConfig())
    convolutions = [(3, 64), (64, 128), (128, 256), (256, 512), (512, 1)]
    expected = sum(16 * one * other + other for one, other in convolutions) + 2 * (128 + 256 + 512)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert model(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1, 2, 2), "the smallest image"


def test_the_hinge_loss_is_that_of_a_derivation_in_float64() -> None:
    real, fake = torch.randn(4, 1, 5, 5) * 2, torch.randn(4, 1, 5, 5) * 2
    expected = 0.5 * (np.maximum(0, 1 - real.double().numpy()).mean() + np.maximum(0, 1 + fake.double().numpy()).mean())
    assert hinge_loss(real, fake).item() == pytest.approx(expected, rel=1e-6)
    assert hinge_loss(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -3.0])).item() == 0
    assert hinge_loss(torch.zeros(3), torch.zeros(3)).item() == 1


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_in_the_last_layer() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(6, 3, 3, padding=1).double()
    hidden = torch.randn(4, 6, 8, 8, dtype=torch.float64)
    images = layer(hidden)
    terms = [(images - 0.3).abs().mean(), images.square().mean() * 0.1]
    lengths = [torch.autograd.grad(term, layer.weight, retain_graph=True)[0].norm() for term in terms]
    gradients = [torch.autograd.grad(term, images, retain_graph=True)[0] for term in terms]
    found = adaptive_weight(hidden, 3, *gradients)
    assert found.item() == pytest.approx((lengths[0] / (lengths[1] + 1e-4)).item(), rel=1e-5)
    nothing = torch.zeros_like(gradients[0])
    assert adaptive_weight(hidden, 3, gradients[0] * 1e9, nothing).item() == LARGEST_ADAPTIVE_WEIGHT
    assert adaptive_weight(hidden, 3, nothing, nothing).item() == 0


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="channels: got 12, expected a multiple of norm_groups, 8"):
        DiscriminatorConfig(12)
    with pytest.raises(ConfigError, match="num_layers: got 0"):
        DiscriminatorConfig(num_layers=0)
