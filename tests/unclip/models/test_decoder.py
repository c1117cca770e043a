"""Conditioning of the decoder and the upsamplers: read and dropped on every path, and independent per sample."""

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.unclip.systems.tiny_stacks import fill_zeros
from unclip.config import to_dict
from unclip.diffusion import samplers
from unclip.diffusion.process import DiffusionConfig
from unclip.errors import ConfigError, ShapeError
from unclip.models import unet
from unclip.models.clip import Clip, create, text_mask
from unclip.models.decoder import NUM_IMAGE_TOKENS, Decoder, DecoderConfig
from unclip.models.degradations import DegradationConfig
from unclip.models.embeddings import EmbeddingStatistics
from unclip.models.layers import Conv3x3, attention
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.small_images import Captions, known_region, random_masks
from unclip.models.text import CaptionFeatures, TextShape, TextTransformer, TextTransformerConfig, caption_features
from unclip.models.unet import ContextAttention, ResBlock, UNet, UNetConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig
from unclip.systems.unclip.decoder import DECODER, DecoderObjective
from unclip.systems.unclip.sampling import DecoderSampling, SamplingConfig, UpsamplerSampling
from unclip.systems.unclip.stack import Stack
from unclip.systems.upsampler import UpsamplerObjective
from unclip.training.batches import load_images
from unclip.training.precision import autocast

UNET = UNetConfig(
    16, channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(8,), head_channels=8, norm_groups=4
)
CONVOLUTIONAL = UNetConfig(16, channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4)
SHAPE = TextShape(length=5, width=7, vocab_size=40)
TINY_TEXT = TextTransformerConfig(width=8, depth=2, num_heads=2)


def caption(kind: str, batch: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    if kind == "transformer":
        return torch.randint(1, 40, (batch, 5), generator=generator)
    return CaptionFeatures(
        torch.randn(batch, 5, 7, generator=generator),
        torch.arange(5).expand(batch, 5) < 4,
        torch.randn(batch, 6, generator=generator),
    )


def new_decoder(text: str, **changes: Any) -> Decoder:
    config = DecoderConfig(UNET, context_dim=8, text=text, text_transformer=TINY_TEXT, **changes)
    decoder = fill_zeros(Decoder(config, embedding_dim=6, text_shape=SHAPE))
    if decoder.text is not None:
        decoder.text.set_null(caption(text, 1, seed=9))
    return decoder


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, 3, 16, 16, generator=generator),
        torch.tensor([10, 500, 900])[:batch],
        torch.randn(batch, 6, generator=generator),
    )


def changed(first: torch.Tensor, second: torch.Tensor) -> list[bool]:
    """Per sample, True if the two tensors differ."""
    return ((first - second).flatten(1).abs().amax(dim=1) > 1e-6).tolist()


@pytest.mark.parametrize("text", ["clip", "transformer"])
@torch.no_grad()
def test_captions_are_read_on_both_paths_and_dropped_on_both(text: str) -> None:
    decoder = new_decoder(text)
    batch = inputs()
    expected = decoder(*batch, None, caption(text, 3))
    assert all(changed(decoder(*batch, None, caption(text, 3, seed=1)), expected))
    drop = torch.tensor([True, False, True])
    dropped, other = (decoder(*batch, None, caption(text, 3, seed), drop) for seed in (0, 1))
    assert changed(dropped, expected) == [True, False, True]
    assert changed(other, dropped) == [False, True, False]
    # dropping the caption, the empty caption and no caption are all the same
    assert changed(dropped, decoder(*batch, None, decoder.text.null(3))) == [False, True, False]
    assert not any(changed(decoder(*batch), decoder(*batch, None, caption(text, 3), torch.ones(3, dtype=torch.bool))))
    for path in (decoder.text.to_time, decoder.text.to_context):
        weight = path.weight.clone()
        path.weight.zero_()
        assert all(changed(decoder(*batch, None, caption(text, 3)), expected)), "this path is not read"
        path.weight.copy_(weight)


@torch.no_grad()
def test_image_embeddings_and_captions_are_dropped_independently() -> None:
    decoder = new_decoder("clip")
    x_t, t, embedding = inputs()
    drop = torch.ones(3, dtype=torch.bool)
    image_alone = decoder(x_t, t, embedding, None, caption("clip", 3), drop)
    assert all(changed(decoder(x_t, t, embedding + 1, None, caption("clip", 3), drop), image_alone))
    text_alone = decoder(x_t, t, embedding, drop, caption("clip", 3))
    assert not any(changed(decoder(x_t, t, embedding + 1, drop, caption("clip", 3)), text_alone))
    assert all(changed(decoder(x_t, t, embedding, drop, caption("clip", 3, seed=1)), text_alone))


@torch.no_grad()
def test_padding_is_not_read() -> None:
    decoder, batch = new_decoder("clip"), inputs()
    text = caption("clip", 3)
    expected = decoder(*batch, None, text)
    padded = text.text_encodings.clone()
    padded[:, 4:] = 1e3
    torch.testing.assert_close(decoder(*batch, None, text._replace(text_encodings=padded)), expected)

    decoder, tokens = new_decoder("transformer"), caption("transformer", 3)
    tokens[:, 1] = 0  # a word, because other words follow
    tokens[:, 4] = 0  # padding
    assert text_mask(tokens).tolist() == [[True, True, True, True, False]] * 3
    assert text_mask(torch.zeros(1, 3, dtype=torch.int64)).tolist() == [[True, False, False]]
    expected = decoder(*batch, None, tokens)
    decoder.text.positions[4] += 10
    torch.testing.assert_close(decoder(*batch, None, tokens), expected)
    tokens[:, 1] = 7
    assert all(changed(decoder(*batch, None, tokens), expected))


@torch.no_grad()
def test_every_attention_layer_reads_the_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def recorded(q, k, v, mask=None):
        seen.append((q.shape[2], k.shape[2], mask.shape[-1]))
        return attention(q, k, v, mask)

    decoder = new_decoder("clip")
    monkeypatch.setattr(unet, "attention", recorded)
    decoder(*inputs(), None, caption("clip", 3))
    assert len(seen) == 4  # one going down, one in the middle, two going up
    assert {keys - queries for queries, keys, _ in seen} == {NUM_IMAGE_TOKENS + 5}
    assert all(keys == length for _, keys, length in seen)


@torch.no_grad()
def test_attention_matches_torchs_multihead_attention() -> None:
    config = dataclasses.replace(UNET, head_channels=4)
    layer = fill_zeros(ContextAttention(config, 8, 0))
    torch.nn.init.normal_(layer.to_out.weight)
    x = torch.randn(2, 8, 3, 3)
    pixels = layer.norm(x).flatten(2).transpose(1, 2)
    reference = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    reference.in_proj_weight.copy_(layer.to_qkv.weight)
    reference.in_proj_bias.copy_(layer.to_qkv.bias)
    reference.out_proj.weight.copy_(layer.to_out.weight)
    reference.out_proj.bias.copy_(layer.to_out.bias)
    expected = x + reference(pixels, pixels, pixels)[0].transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x, None), expected)


@pytest.mark.parametrize("height, width", [(1, 1), (4, 4), (5, 3), (8, 8), (6, 7), (9, 9)])
def test_bf16_convolutions_match_float64_up_to_rounding(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Conv3x3, "HAS_TILES", True)  # even on a CPU without tiles
    torch.manual_seed(0)
    layer = Conv3x3(16, 8).to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, height, width).to(memory_format=torch.channels_last).bfloat16().requires_grad_()
    with torch.profiler.profile() as profile, torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert any(event.key == "aten::addmm" for event in profile.key_averages()) == (width <= 4)
    assert (y.grad_fn.name() == "_ShortRowsBackward") == (width <= 8)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    gradient = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, layer.weight, layer.bias], gradient)
    exact = [value.detach().bfloat16().double().requires_grad_() for value in (x, layer.weight, layer.bias)]
    expected = F.conv2d(*exact, padding=1)
    torch.testing.assert_close(y.double(), expected, rtol=0.01, atol=0.01)
    for ours, reference in zip(found, torch.autograd.grad(expected, exact, gradient.double()), strict=True):
        # sums of many products are rounded to their own size, by torch on CPUs without bf16 instructions more than once
        torch.testing.assert_close(ours.double(), reference, rtol=0.02, atol=0.01 * float(reference.abs().max()))


@pytest.mark.parametrize("resample", ["none", "down", "up"])
def test_residual_blocks_pass_their_input_dtype_to_convolutions(resample: unet.Resample) -> None:
    block, seen = ResBlock(UNET, 8, 8, resample), []
    for convolution in (block.conv1, block.conv2):
        convolution.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    for dtype in (torch.bfloat16, torch.float32):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert block(torch.randn(2, 8, 4, 4, dtype=dtype), torch.randn(2, UNET.time_dim)).dtype == dtype
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2


@pytest.mark.parametrize(
    "has_tiles, training, dtype",
    [(True, True, torch.float32), (False, True, torch.bfloat16), (True, False, torch.bfloat16)],
)
def test_other_convolutions_use_torch(
    has_tiles: bool, training: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Conv3x3, "HAS_TILES", has_tiles)
    layer, x = Conv3x3(16, 8).to(dtype).train(training), torch.randn(2, 16, 4, 4, dtype=dtype)
    assert layer(x).grad_fn.name() == "ConvolutionBackward0"
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))


def test_bf16_attention_matches_float64_up_to_rounding() -> None:
    q, k, v = (torch.randn(2, 3, length, 64).bfloat16().requires_grad_() for length in (5, 9, 9))
    mask = torch.rand(2, 1, 1, 9) < 0.7
    mask[..., 0] = True
    y = attention(q, k, v, mask)
    gradient = torch.randn_like(y)
    exact = [value.detach().double().requires_grad_() for value in (q, k, v)]
    expected = F.scaled_dot_product_attention(*exact, attn_mask=mask)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.02)
    found = torch.autograd.grad(y, [q, k, v], gradient)
    for ours, reference in zip(found, torch.autograd.grad(expected, exact, gradient.double()), strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=0.03, atol=0.03)


def test_the_middle_has_attention_if_the_network_does() -> None:
    network = UNet(dataclasses.replace(UNET, attention_resolutions=(16,), head_channels=4), 3, 3)
    assert network.middle[0].attend is not None and network.down[2].attend is None
    assert all(step.attend is None for step in UNet(CONVOLUTIONAL, 3, 3).modules() if isinstance(step, unet.UNetBlock))
    with pytest.raises(ConfigError, match="head_channels: got 16, expected a divisor of 24"):
        UNetConfig(16, 8, (2, 3), attention_resolutions=(16,), head_channels=16, norm_groups=4)


@pytest.mark.parametrize("text_guidance_scale", [None, 3.0])
@torch.no_grad()
def test_guidance_pushes_away_from_the_unconditional_prediction(text_guidance_scale: float | None) -> None:
    decoder = new_decoder("clip", diffusion=DiffusionConfig(variance="learned_range"))
    x_t, t, embedding = inputs()
    text, drop = caption("clip", 3), torch.ones(3, dtype=torch.bool)

    def x0(*conditions: Any) -> torch.Tensor:
        return decoder.diffusion.predict_x0(x_t, t, decoder(x_t, t, embedding, *conditions)[:, :3])

    both, image_alone, neither = x0(None, text), x0(None, text, drop), x0(drop, text, drop)
    expected = neither + 2 * (both - neither)
    if text_guidance_scale is not None:
        expected = neither + 2 * (image_alone - neither) + text_guidance_scale * (both - image_alone)
    settings = DecoderSampling(guidance_scale=2, text_guidance_scale=text_guidance_scale)
    denoised = decoder.denoiser(embedding, settings, Captions(text))(x_t, t)
    torch.testing.assert_close(denoised.x0, expected.clamp(-1, 1), atol=1e-4, rtol=1e-4)
    assert denoised.variance_fraction is not None


@torch.no_grad()
def test_a_decoder_rejects_inputs_that_it_does_not_read() -> None:
    decoder, batch = new_decoder("none"), inputs()
    with pytest.raises(ShapeError, match="got captions, expected none"):
        decoder(*batch, None, caption("clip", 3))
    with pytest.raises(ShapeError, match="got known pixels, expected none"):
        decoder(*batch, known=torch.zeros(3, 4, 16, 16))
    with pytest.raises(ConfigError, match="text_shape: got None, expected one for text 'clip'"):
        Decoder(DecoderConfig(UNET, text="clip"), 6)


def test_masks_are_independent_per_sample_and_follow_the_generator() -> None:
    masks, again = (random_masks(400, 16, torch.Generator().manual_seed(0)) for _ in range(2))
    assert masks.shape == (400, 1, 16, 16) and masks.dtype == torch.bool and torch.equal(masks, again)
    known = masks.float().mean(dim=(1, 2, 3))
    assert 0.15 < (known == 0).float().mean() < 0.4  # nothing known: sampled from scratch
    assert 0.2 < known.mean() < 0.6 and len(known.unique()) > 30
    images = torch.randn(400, 3, 16, 16)
    region = known_region(images, masks)
    assert torch.equal(region[:, 3:], masks.float())
    assert torch.equal(region[:, :3] != 0, masks.expand(-1, 3, -1, -1))


def test_known_pixels_are_returned_unchanged() -> None:
    decoder, embedding = new_decoder("none", inpainting=True), inputs()[2]
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    mask = random_masks(3, 16, torch.Generator().manual_seed(5))
    samples = [
        decoder.sample(
            embedding,
            DecoderSampling(num_steps=2, guidance_scale=1),
            known=known_region(given, mask),
            generator=torch.Generator().manual_seed(0),
        )
        for given in (images, -images)
    ]
    keep = mask.expand_as(images)
    assert 0 < keep.float().mean() < 1
    assert torch.equal(samples[0][keep], images[keep]) and torch.equal(samples[1][keep], -images[keep])
    assert not torch.equal(samples[0][~keep], samples[1][~keep])  # the network reads the known pixels


def jpeg(color: tuple[int, int, int], size: int = 16) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), color).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture(scope="module")
def clip() -> Clip:
    torch.manual_seed(0)
    return Clip(create("unclip-demo", None), "unclip-demo")


def rows(clip: Clip, batch: int = 8) -> dict[str, list[Any]]:
    captions = [f"picture number {index}" for index in range(batch)]
    generator = np.random.default_rng(0)
    return {
        "jpg": [jpeg((30 * index, 255 - 30 * index, 128)) for index in range(batch)],
        "image_embedding": list(generator.normal(size=(batch, clip.embedding_dim)).astype(np.float32)),
        "tokens": [tokens.int().numpy() for tokens in clip.tokenize(captions)],
    }


def objective(clip: Clip, **changes: Any) -> DecoderObjective:
    torch.manual_seed(0)
    config = DecoderConfig(**{"unet": UNET, "context_dim": 8, "text_transformer": TINY_TEXT, **changes})
    statistics = EmbeddingStatistics.of(torch.randn(30, clip.embedding_dim))
    return DecoderObjective(config, statistics, rows(clip), clip)


@pytest.mark.parametrize("text", ["none", "clip", "transformer"])
def test_training_drops_conditions_independently_and_by_the_generator(clip: Clip, text: str) -> None:
    trained = objective(clip, text=text, image_drop_prob=0.25, text_drop_prob=0.5)
    tensors = trained.prepare(rows(clip, batch=8))
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, x_t, t, image_embedding, image_drop, text, text_drop, known):
            seen.append((image_drop, text_drop))
            return x_t

    for seed in [*range(60), 0]:
        trained.loss(Recorder(), tensors, torch.Generator().manual_seed(seed))
    image_drops = torch.stack([image_drop for image_drop, _ in seen]).float()
    assert torch.equal(image_drops[0], image_drops[60]) and image_drops[:60].mean() == pytest.approx(0.25, abs=0.06)
    assert (image_drops.std(dim=1) > 0).any()  # samples of a batch differ
    if text == "none":
        assert all(text_drop is None for _, text_drop in seen)
        return
    text_drops = torch.stack([text_drop for _, text_drop in seen]).float()
    assert text_drops[:60].mean() == pytest.approx(0.5, abs=0.07)
    assert (image_drops[:60] * text_drops[:60]).mean() == pytest.approx(0.125, abs=0.05)  # independent of each other


@pytest.mark.parametrize("text", ["clip", "transformer"])
@torch.no_grad()
def test_the_empty_caption_is_saved_with_the_weights(clip: Clip, text: str) -> None:
    trained = objective(clip, text=text)
    model, tokens = trained.model.eval(), clip.tokenize([""])
    features = clip.encode_text(tokens)
    empty: Any = tokens
    if text == "clip":
        empty = CaptionFeatures(features.text_encodings, features.text_mask, features.text_projection)
    x_t, t, embedding = torch.randn(1, 3, 16, 16), torch.tensor([500]), torch.randn(1, clip.embedding_dim)
    torch.testing.assert_close(model(x_t, t, embedding), model(x_t, t, embedding, None, empty))
    again = DECODER.build(trained.facts()).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x_t, t, embedding), model(x_t, t, embedding))


def test_clip_stays_frozen_and_is_not_part_of_the_model(clip: Clip) -> None:
    trained = objective(clip, text="clip")
    trained.model.train()
    loss = trained.loss(trained.model, trained.prepare(rows(clip)), torch.Generator().manual_seed(0))
    loss.backward()
    clip_parameters = {id(parameter) for parameter in clip.parameters()}
    assert not any(module.training for module in clip.model.modules())
    assert not any(parameter.requires_grad for parameter in clip.parameters())
    assert not any(id(parameter) in clip_parameters for parameter in trained.model.parameters())


@pytest.mark.parametrize("text", ["none", "clip", "transformer"])
def test_every_parameter_is_trained(clip: Clip, text: str) -> None:
    trained = objective(clip, text=text, image_drop_prob=0.5, diffusion=DiffusionConfig(variance="learned_range"))
    fill_zeros(trained.model).train()
    with autocast("bf16", torch.device("cpu")):
        loss = trained.loss(trained.model, trained.prepare(rows(clip)), torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.isfinite()
    assert [name for name, parameter in trained.model.named_parameters() if parameter.grad is None] == []


def train(trained: Any, tensors: dict[str, torch.Tensor], num_steps: int, learning_rate: float) -> float:
    """Train on one batch; returns the mean loss of the last tenth of the steps."""
    trained.model.train()
    optimizer = torch.optim.AdamW(trained.model.parameters(), lr=learning_rate, fused=True)
    losses = []
    for step in range(num_steps):
        loss = trained.loss(trained.model, tensors, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    trained.model.eval()
    return sum(losses[-num_steps // 10 :]) / (num_steps // 10)


def test_inpainting_learns_to_continue_the_known_part(clip: Clip) -> None:
    """Half of a plain image is known and its embedding is zero, so only the known pixels determine the colour."""
    small = dataclasses.replace(UNET, image_size=8, attention_resolutions=(4,))
    trained = objective(clip, unet=small, inpainting=True, diffusion=DiffusionConfig(prediction_type="x0"))
    colors = torch.rand(32, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = colors.expand(-1, -1, 8, 8)
    tensors = {"images": images, "image_embedding": torch.zeros(32, clip.embedding_dim)}
    train(trained, tensors, num_steps=150, learning_rate=5e-3)
    mask = torch.zeros(32, 1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    informed, blind = (
        trained.model.sample(
            tensors["image_embedding"],
            DecoderSampling(num_steps=4, guidance_scale=1),
            known=known,
            generator=torch.Generator().manual_seed(0),
        )[..., 4:]
        for known in (known_region(images, mask), None)
    )
    error, blind_error = ((found - images[..., 4:]).abs().mean().item() for found in (informed, blind))
    assert error < 0.25 and error < blind_error / 2


@torch.no_grad()
def test_an_upsampler_reads_the_noise_level_of_its_input() -> None:
    upsampler = fill_zeros(Upsampler(UpsamplerConfig(CONVOLUTIONAL, low_res_size=4, max_noise_level=400)))
    x_t, t, low_res = torch.randn(2, 3, 16, 16), torch.tensor([500, 500]), torch.rand(2, 3, 4, 4)
    clean, noisy = (upsampler(x_t, t, low_res, torch.tensor([0, level])) for level in (0, 400))
    assert changed(clean, noisy) == [False, True]
    assert not any(changed(clean, upsampler(x_t, t, low_res)))
    original = low_res.clone()
    samples = [
        upsampler.sample(
            low_res,
            UpsamplerSampling(num_steps=2, noise_level=level),
            generator=torch.Generator().manual_seed(0),
        )
        for level in (0, 400, 400)
    ]
    assert (
        all(changed(samples[0], samples[1])) and torch.equal(samples[1], samples[2]) and torch.equal(low_res, original)
    )
    with pytest.raises(ConfigError, match="noise_level: got 401, expected at least 0, at most 400"):
        upsampler.sample(low_res, UpsamplerSampling(noise_level=401))


def test_upsamplers_train_on_crops_of_a_quarter_with_their_own_noise_levels(clip: Clip) -> None:
    config = UpsamplerConfig(
        CONVOLUTIONAL, low_res_size=16, max_noise_level=400, degradation=DegradationConfig(kind="none")
    )
    size = config.output_size
    assert size == 64
    # two channels hold the coordinates of each pixel
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    images = torch.stack([y, x, torch.zeros_like(x)]).expand(8, -1, -1, -1)
    original = images.clone()
    trained = UpsamplerObjective(config, {"jpg": [jpeg((0, 0, 0), size)]})
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, x_t, t, low_res, noise_level, **_):
            seen.append((low_res, noise_level))
            return x_t

    trained.loss(Recorder(), {"images": images}, torch.Generator().manual_seed(0))
    low_res, level = seen[0]
    assert low_res.shape == (8, 3, 4, 4) and len(level.unique()) > 4 and level.max() <= 400
    assert torch.equal(images, original)
    high, low, _ = trained._crops(images, torch.Generator().manual_seed(0))
    assert high.shape == (8, 3, 16, 16) and low.shape == (8, 3, 4, 4)
    assert len({tuple(crop[:2, 0, 0].tolist()) for crop in high}) >= 5  # each image has its own crop
    # Both are the same crop: a pixel further would differ by 0.125.
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(high, 4), low, atol=5e-3, rtol=0)


def test_one_pixel_stripes_of_a_stored_image_average_to_grey() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2] = 255
    file = io.BytesIO()
    Image.fromarray(stripes).save(file, "JPEG", quality=100, subsampling="4:4:4")
    images = load_images([file.getvalue()], 32)
    assert images[:, :, 4:-4, 4:-4].abs().max() < 0.1


@torch.no_grad()
def test_timesteps_stay_distinct_under_autocast() -> None:
    network = fill_zeros(UNet(CONVOLUTIONAL, 3, 3))
    embedded = []
    network.time_embedding.layers.register_forward_pre_hook(lambda _, inputs: embedded.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.zeros(1000, 3, 2, 2), torch.arange(1000))
    assert len(embedded[0].unique(dim=0)) == 1000


def test_sampling_with_a_learned_variance(clip: Clip) -> None:
    trained = objective(clip, diffusion=DiffusionConfig(variance="learned_range"))
    model = trained.model.eval()
    embedding = torch.randn(2, clip.embedding_dim)
    noise = torch.randn(2, 3, 16, 16)
    denoise = model.denoiser(embedding, DecoderSampling(guidance_scale=2))
    samples = samplers.ddpm(model.diffusion, denoise, noise, 3, torch.Generator().manual_seed(0))
    assert samples.shape == (2, 3, 16, 16) and samples.isfinite().all()
    assert to_dict(model.config)["diffusion"]["variance"] == "learned_range"


def test_a_trained_text_transformer_is_bidirectional() -> None:
    text = fill_zeros(TextTransformer(TINY_TEXT, SHAPE, context_dim=8, time_dim=8))
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    later = tokens.clone()
    later[:, 4] = 9
    first, second = text(tokens), text(later)
    assert (first.tokens - second.tokens).abs().amax(dim=2).min() > 1e-6
    assert not torch.allclose(first.vector, second.vector)


@pytest.mark.parametrize("text", ["none", "clip", "transformer"])
@torch.no_grad()
def test_a_stack_passes_captions_to_decoders_that_read_them(clip: Clip, text: str) -> None:
    prior = DiffusionPrior(PriorConfig(16, 1, 2), clip.embedding_dim, clip.text_width, clip.text_length)
    prior.text.set_null(caption_features(clip, clip.tokenize([""])))
    upsampler = fill_zeros(Upsampler(UpsamplerConfig(CONVOLUTIONAL, low_res_size=16)))
    stack = Stack(clip, prior, fill_zeros(objective(clip, text=text).model), [upsampler])
    settings = SamplingConfig(
        decoder=DecoderSampling(num_steps=2), upsamplers={"64": UpsamplerSampling(num_steps=2)}, precision="fp32"
    )
    embedding = torch.randn(1, clip.embedding_dim)
    samples = [
        stack.decode(embedding, settings, torch.Generator().manual_seed(0), text)
        for text in (
            *(Captions(stack.read_captions([words])) for words in ("a red circle", "a blue star", "")),
            Captions(),
        )
    ]
    assert changed(samples[0], samples[1]) == [text != "none"]
    assert not any(changed(samples[2], samples[3]))


@pytest.mark.parametrize("kind", ["none", "blur", "bsr"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_upsamplers_train_in_both_precisions(kind: Any, precision: Any) -> None:
    config = UpsamplerConfig(
        CONVOLUTIONAL, low_res_size=8, max_noise_level=400, degradation=DegradationConfig(kind, blur_prob=1.0)
    )
    trained = UpsamplerObjective(config, {"jpg": [jpeg((0, 100, 200), 32)] * 2})
    tensors = trained.prepare({"jpg": [jpeg((0, 100, 200), 32)] * 2})
    with autocast(precision, torch.device("cpu")):
        loss = trained.loss(trained.model, tensors, torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.isfinite() and any(parameter.grad.any() for parameter in trained.model.parameters())
    with autocast(precision, torch.device("cpu")):
        assert trained.preview(trained.model.eval()).isfinite().all()
