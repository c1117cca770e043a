"""U-Nets with spatial Transformers. `tests/unclip/interop/test_latent_diffusion.py` compares them with diffusers."""

import dataclasses

import pytest
import torch

from tests.unclip.systems.tiny_stacks import fill_zeros
from unclip.config import fingerprint, without_operational
from unclip.errors import ConfigError
from unclip.models.classifier import ClassifierConfig
from unclip.models.spatial_transformer import SpatialTransformer
from unclip.models.unet import UNet, UNetConfig

UNET = UNetConfig(
    8,
    8,
    (1, 2),
    1,
    attention_resolutions=(4,),
    norm_groups=4,
    attention="spatial_transformer",
    num_heads=2,
    resampling="convolution",
)


def test_the_settings_of_other_networks_have_the_fingerprints_that_they_had() -> None:
    values = without_operational(UNetConfig())
    assert not {"attention", "num_heads", "resampling"} & set(values)
    assert fingerprint(values) != fingerprint(without_operational(UNET))


def test_it_starts_as_the_identity_and_reads_all_tokens_that_the_mask_keeps() -> None:
    torch.manual_seed(0)
    block = SpatialTransformer(16, 12, num_heads=2, norm_groups=4)
    x, context = torch.randn(2, 16, 4, 4), torch.randn(2, 5, 12)
    assert torch.equal(block(x, context), x)
    fill_zeros(block)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    found = block(x, context, mask)
    torch.testing.assert_close(found[0], block(x, context)[0])
    torch.testing.assert_close(found[1:], block(x[1:], context[1:, :2]))
    assert not torch.allclose(found[1], block(x, context)[1], atol=1e-4)
    assert not torch.allclose(block(x.flip(3), context).flip(3), x, atol=1e-2)


def test_every_weight_of_the_network_is_trained() -> None:
    unet = fill_zeros(UNet(UNET, 4, 4, context_dim=12))
    unet(torch.randn(2, 4, 8, 8), torch.tensor([0, 9]), None, torch.randn(2, 5, 12)).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in unet.parameters())


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="attention: got 'spatial_transformer', expected joint"):
        UNet(UNET, 4, 4)
    with pytest.raises(ConfigError, match="num_heads: got 3, expected a divisor of 16"):
        dataclasses.replace(UNET, num_heads=3)
    with pytest.raises(ConfigError, match=r"unet\.attention: got 'spatial_transformer', expected joint"):
        ClassifierConfig(dataclasses.replace(UNET, head_channels=8))
