"""The efficient U-Net: sizes, skips, resolutions at which it computes, text and gradients."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.unclip.systems.tiny_stacks import fill_zeros
from unclip.errors import ConfigError
from unclip.models.efficient_unet import SCALE, EfficientUNet, EfficientUNetConfig, Level, ScaledResBlock, TextAttention
from unclip.models.unet import ResBlock

CONFIG = EfficientUNetConfig(16, 8, (1, 2), (1, 2), ("none", "full"), num_heads=2, norm_groups=4)
CONTEXT = 6


def network(config: EfficientUNetConfig = CONFIG) -> EfficientUNet:
    torch.manual_seed(0)
    return fill_zeros(EfficientUNet(config, 6, 3, CONTEXT))  # type: ignore[no-any-return]


def inputs(batch: int = 2, size: int = 16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 6, size, size, generator=generator)
    vector = torch.randn(batch, CONFIG.time_dim, generator=generator)
    context = torch.randn(batch, 5, CONTEXT, generator=generator)
    return x, torch.arange(batch), vector, context, torch.tensor([[True] * 3 + [False] * 2] * batch)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("attention", ["none", "text", "full"])
def test_predictions_have_the_size_of_the_images(attention: str) -> None:
    config = dataclasses.replace(CONFIG, attention=("none", attention))
    for size in (16, 24):  # trained on crops, applied to larger images
        assert network(config)(*inputs(size=size)).shape == (2, 3, size, size)


def test_the_paper_s_network_has_most_of_its_parameters_at_the_lowest_resolution() -> None:
    """Figures A.27 to A.29 by hand, for the configuration of appendix F.2."""
    config = EfficientUNetConfig()
    with torch.device("meta"):
        unet = EfficientUNet(config, 6, 3, 1024)
    time = config.time_dim
    assert time == 512
    for level, (width, blocks) in enumerate(zip((128, 256, 512, 1024), (2, 4, 8, 8), strict=True)):
        convolutions, norms = 2 * (9 * width**2 + width), 4 * width
        of_block = convolutions + norms + time * 2 * width + 2 * width
        attention = 0
        if level == 3:  # q, k and v twice as wide as the level, from pixels, and k and v from text
            attention = 2 * width + (width + 1) * 2 * width + (width + 1) * 4 * width
            attention += (1024 + 1) * 4 * width + (2 * width + 1) * width
        assert count(unet.down[level]) == count(unet.up[level]) == blocks * of_block + attention
        above = (128, 128, 256, 512)[level]
        assert count(unet.downsample[level]) == 9 * above * width + width
        assert count(unet.upsample[level]) == 9 * above * width + above
    lowest = count(unet.down[3]) + count(unet.up[3])
    assert lowest / count(unet) > 0.7


def test_levels_compute_after_downsampling_and_before_upsampling() -> None:
    """Only the first and the last convolution work at the resolution of the image."""
    unet, seen = network(), {}
    for name, module in unet.named_modules():
        if isinstance(module, Level):
            module.register_forward_hook(lambda _, given, __, name=name: seen.update({name: given[0].shape[-1]}))
    unet(*inputs())
    assert seen == {"down.0": 8, "down.1": 4, "up.1": 4, "up.0": 8}


def test_sums_keep_the_variance_of_independent_features() -> None:
    block, plain = ScaledResBlock(CONFIG.block, 8, 8), ResBlock(CONFIG.block, 8, 8)
    plain.load_state_dict(fill_zeros(block).state_dict())
    x, time = torch.randn(2, 8, 4, 4), torch.randn(2, CONFIG.time_dim)
    torch.testing.assert_close(block(x, time), plain.eval()(x, time) / 2**0.5)
    attention = TextAttention(CONFIG, 8, CONTEXT, reads_pixels=True)
    context = torch.randn(2, 5, CONTEXT)
    torch.testing.assert_close(attention(x, context), x / 2**0.5)  # its last layer starts as zeros


def test_skips_are_added_and_scaled() -> None:
    """With levels that return zeros, the last layer reads the first convolution alone, scaled."""
    unet, seen = network(), []
    for level in [*unet.down, *unet.up]:
        level.register_forward_hook(lambda _, given, output: torch.zeros_like(output))
    for upsample in unet.upsample:
        nn.init.zeros_(upsample.bias)
    unet.output.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    x, *others = inputs()
    unet(x, *others)
    torch.testing.assert_close(seen[0], unet.input(x) * SCALE)


@pytest.mark.parametrize("attention", ["text", "full"])
def test_attention_reads_the_text_but_not_its_padding(attention: str) -> None:
    unet = network(dataclasses.replace(CONFIG, attention=("none", attention)))
    x, t, vector, context, mask = inputs()
    with torch.no_grad():
        expected = unet(x, t, vector, context, mask)
        padding, word = context.clone(), context.clone()
        padding[:, 3:] += 1
        word[:, 0] += 1
        assert torch.equal(unet(x, t, vector, padding, mask), expected)
        assert not torch.allclose(unet(x, t, vector, word, mask), expected, atol=1e-4)
        torch.testing.assert_close(unet(x, t, vector, context[:, :3], None), expected, rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient() -> None:
    unet = network(dataclasses.replace(CONFIG, attention=("text", "full"))).train()
    unet(*inputs()).square().mean().backward()
    assert [name for name, each in unet.named_parameters() if each.grad is None or not each.grad.any()] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, "image_size: got 18, expected a multiple of 4"),
        ({"num_res_blocks": (1,)}, r"num_res_blocks: got \(1,\), expected 2 values"),
        ({"attention": ("none",)}, r"attention: got \('none',\), expected 2 values"),
        ({"num_res_blocks": (1, 0)}, "num_res_blocks"),
        ({"num_heads": 3}, "num_heads: got 3, expected a divisor of 32"),
        ({"norm_groups": 16}, "norm_groups: got 16, expected a divisor of 8"),
        ({"channel_mult": (), "num_res_blocks": (), "attention": ()}, "at least one level"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **changes)
