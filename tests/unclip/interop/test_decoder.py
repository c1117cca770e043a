"""Export and import of decoders and upsamplers: diffusers' classes and ours compute the same with the same weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unclip.diffusion import samplers
from unclip.diffusion.process import DiffusionConfig
from unclip.errors import CheckpointError, ConfigError, InputError
from unclip.interop.decoder import export_decoder, export_upsampler, import_decoder, import_upsampler
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.embeddings import EmbeddingStatistics
from unclip.models.text import CaptionFeatures, TextShape
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig

EMBEDDING_DIM, LENGTH = 12, 5
UNET = UNetConfig(
    16, 8, (1, 2, 3), num_res_blocks=2, attention_resolutions=(8, 4), head_channels=4, norm_groups=4, dropout=0.1
)
KARLO_LIKE: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (8, 16, 24),
    "norm_num_groups": 4,
}


def randomize(model: torch.nn.Module) -> Any:
    """Set all weights to random numbers, including those that start as zeros or ones, different in every layer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def texts(batch: int, seed: int = 0) -> CaptionFeatures:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LENGTH + 1, (batch, 1), generator=generator)
    return CaptionFeatures(
        torch.randn(batch, LENGTH, EMBEDDING_DIM, generator=generator),
        torch.arange(LENGTH) < lengths,
        torch.randn(batch, EMBEDDING_DIM, generator=generator),
    )


def new_decoder(**changes: Any) -> Decoder:
    config = DecoderConfig(**{"unet": UNET, "context_dim": 20, "text": "clip", **changes})
    decoder = randomize(Decoder(config, EMBEDDING_DIM, TextShape(LENGTH, EMBEDDING_DIM, 30)))
    statistics = EmbeddingStatistics.of(torch.randn(50, EMBEDDING_DIM) * 0.05 + 0.02)
    decoder.statistics.load_state_dict(statistics.state_dict())
    decoder.text.set_null(texts(1, seed=9))
    return decoder


def karlo_like_decoder() -> Any:
    from diffusers import UNet2DConditionModel

    return randomize(
        UNet2DConditionModel(
            **KARLO_LIKE,
            out_channels=6,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            cross_attention_dim=20,
            class_embed_type="identity",
            attention_head_dim=4,
            resnet_time_scale_shift="scale_shift",
        )
    )


def text_projection() -> type:
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    return UnCLIPTextProjModel


@torch.no_grad()
def step_of_diffusers(
    unet: Any, projection: Any, x_t, t, image_embedding, text: CaptionFeatures, null_text
) -> list[Any]:
    """Outputs of diffusers' decoder in a guided step of UnCLIPPipeline: unconditional, then conditional."""
    batch = len(x_t)
    both = [
        torch.cat([null.expand_as(given), given]) for null, given in zip(null_text, text, strict=True)
    ]  # the empty caption, then the caption
    context, time = projection(
        image_embeddings=image_embedding,
        prompt_embeds=both[2],
        text_encoder_hidden_states=both[0],
        do_classifier_free_guidance=True,
    )
    mask = torch.nn.functional.pad(both[1], (projection.config.clip_extra_context_tokens, 0), value=True)
    output = unet(
        torch.cat([x_t, x_t]), torch.cat([t, t]), context, class_labels=time, attention_mask=mask, return_dict=False
    )[0]
    return list(output.split(batch))


@torch.no_grad()
def check_equal(decoder: Decoder, unet: Any, projection: Any) -> None:
    x_t, t = torch.randn(3, 3, 16, 16), torch.tensor([0, 500, 999])
    image_embedding, text, null_text = torch.randn(3, EMBEDDING_DIM) * 0.05, texts(3), texts(1, seed=9)
    unconditional, conditional = step_of_diffusers(unet, projection, x_t, t, image_embedding, text, null_text)
    drop = torch.ones(3, dtype=torch.bool)
    assert conditional.std() > 0.1 and not torch.allclose(conditional, unconditional, atol=1e-2)
    ours = decoder(x_t, t, image_embedding, None, text)
    torch.testing.assert_close(ours, conditional, atol=1e-4, rtol=1e-4)
    ours = decoder(x_t, t, image_embedding, drop, text, drop)
    torch.testing.assert_close(ours, unconditional, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale_shift_norm", [True, False])
def test_diffusers_computes_the_same_as_an_exported_decoder(tmp_path: Path, scale_shift_norm: bool) -> None:
    from diffusers import UNet2DConditionModel

    decoder = new_decoder(unet=dataclasses.replace(UNET, scale_shift_norm=scale_shift_norm))
    export_decoder(decoder, tmp_path)
    unet, unet_info = UNet2DConditionModel.from_pretrained(tmp_path / "decoder", output_loading_info=True)
    projection, info = text_projection().from_pretrained(tmp_path / "text_proj", output_loading_info=True)
    assert not any(unet_info.values()) and not any(info.values())
    check_equal(decoder, unet.eval(), projection.eval())


@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_an_imported_decoder_computes_the_same_as_diffusers(tmp_path: Path, max_shard_size: str) -> None:
    from diffusers import UnCLIPScheduler

    unet = karlo_like_decoder()
    projection = randomize(
        text_projection()(clip_embeddings_dim=EMBEDDING_DIM, time_embed_dim=32, cross_attention_dim=20)
    )
    unet.save_pretrained(tmp_path / "decoder", max_shard_size=max_shard_size)
    projection.save_pretrained(tmp_path / "text_proj")
    UnCLIPScheduler(variance_type="learned_range").save_pretrained(tmp_path / "decoder_scheduler")
    sharded = (tmp_path / "decoder" / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert sharded == (max_shard_size == "20KB")
    decoder = import_decoder(tmp_path, texts(1, seed=9))
    assert decoder.config.diffusion.variance == "learned_range"
    check_equal(decoder, unet, projection)


@torch.no_grad()
def test_an_exported_decoder_is_imported_unchanged(tmp_path: Path) -> None:
    decoder = new_decoder()
    export_decoder(decoder, tmp_path)
    x_t, t, image_embedding = torch.randn(2, 3, 16, 16), torch.tensor([3, 900]), torch.randn(2, EMBEDDING_DIM) * 0.05
    expected = decoder(x_t, t, image_embedding, torch.tensor([True, False]), texts(2), torch.tensor([False, True]))
    for statistics in (None, decoder.statistics):  # left in the weights, or taken out of them
        again = import_decoder(tmp_path, texts(1, seed=9), statistics=statistics)
        result = again(x_t, t, image_embedding, torch.tensor([True, False]), texts(2), torch.tensor([False, True]))
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert again.config.unet == decoder.config.unet
    torch.testing.assert_close(again.null_embedding, decoder.null_embedding, atol=1e-5, rtol=1e-4)
    assert all(parameter.requires_grad for parameter in again.parameters())


def karlo_like_upsampler(**changes: Any) -> Any:
    from diffusers import UNet2DModel

    settings = KARLO_LIKE | {"in_channels": 6, "out_channels": 3, "sample_size": 32, "add_attention": False} | changes
    return randomize(
        UNet2DModel(
            **settings,
            down_block_types=("ResnetDownsampleBlock2D",) * 3,
            up_block_types=("ResnetUpsampleBlock2D",) * 3,
        )
    )


@pytest.mark.parametrize("scale_shift", ["default", "scale_shift"])
@torch.no_grad()
def test_an_imported_upsampler_computes_the_same_as_diffusers(tmp_path: Path, scale_shift: str) -> None:
    theirs = karlo_like_upsampler(resnet_time_scale_shift=scale_shift)
    theirs.save_pretrained(tmp_path)
    ours = import_upsampler(tmp_path, crop_size=16)
    assert ours.config.output_size == 32 and ours.config.unet.image_size == 16
    x_t, t, low_res = torch.randn(2, 3, 32, 32), torch.tensor([0, 999]), torch.randn(2, 3, 8, 8)
    enlarged = torch.nn.functional.interpolate(low_res, size=(32, 32), mode="bicubic", antialias=True)
    expected = theirs(torch.cat([x_t, enlarged], dim=1), t).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x_t, t, low_res), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale_shift_norm", [True, False])
@pytest.mark.parametrize("max_noise_level", [0, 300])
@torch.no_grad()
def test_diffusers_computes_the_same_as_an_exported_upsampler(
    tmp_path: Path, scale_shift_norm: bool, max_noise_level: int
) -> None:
    from diffusers import UNet2DModel

    network = UNetConfig(16, 8, (1, 2, 3), 2, norm_groups=4, scale_shift_norm=scale_shift_norm)
    ours = randomize(Upsampler(UpsamplerConfig(network, low_res_size=8, max_noise_level=max_noise_level)))
    export_upsampler(ours, tmp_path / "all")
    theirs, info = UNet2DModel.from_pretrained(tmp_path / "all", output_loading_info=True)
    assert not any(info.values())
    x_t, t, low_res = torch.randn(2, 3, 32, 32), torch.tensor([10, 800]), torch.randn(2, 3, 8, 8)
    enlarged = torch.nn.functional.interpolate(low_res, size=(32, 32), mode="bicubic", antialias=True)
    six_channels = torch.cat([x_t, enlarged], dim=1)
    level = torch.tensor([10, 250])
    labels = {"class_labels": level} if max_noise_level else {}
    expected = ours(x_t, t, low_res, level)
    torch.testing.assert_close(theirs.eval()(six_channels, t, **labels).sample, expected, atol=1e-4, rtol=1e-4)
    again = import_upsampler(tmp_path / "all", crop_size=16)
    torch.testing.assert_close(again(x_t, t, low_res, level), expected)
    assert again.config == ours.config
    if max_noise_level:  # for pipelines without noise levels, one level is fixed
        export_upsampler(ours, tmp_path / "one", noise_level=25)
        fixed = UNet2DModel.from_pretrained(tmp_path / "one").eval()
        level = torch.full((2,), 25)
        torch.testing.assert_close(fixed(six_channels, t).sample, ours(x_t, t, low_res, level), atol=1e-4, rtol=1e-4)
    else:
        with pytest.raises(ConfigError, match="noise_level"):
            export_upsampler(ours, tmp_path / "one", noise_level=25)


def test_decoders_that_diffusers_cannot_represent_are_refused(tmp_path: Path) -> None:
    for changes in ({"text": "none"}, {"text": "transformer"}, {"inpainting": True}):
        config = DecoderConfig(**{"unet": UNET, "text": "clip", **changes})
        with pytest.raises(InputError, match="expected text = 'clip' without inpainting"):
            export_decoder(Decoder(config, EMBEDDING_DIM, TextShape(LENGTH, EMBEDDING_DIM, 30)), tmp_path)
    with pytest.raises(InputError, match="text width 7 and embedding width 12"):
        export_decoder(Decoder(DecoderConfig(UNET, text="clip"), 12, TextShape(LENGTH, 7, 30)), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn = 'gelu', expected 'silu'"),
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"down_block_types": ["DownBlock2D"] * 3}, "mirrored blocks of the types"),
        ({"layers_per_block": 3}, "the weights do not fit their config.json"),
        ({"layers_per_block": [2, 2, 2]}, r"layers_per_block = \[2, 2, 2\], expected int"),
        ({"_class_name": "UNet2DConditionModel"}, "got a UNet2DConditionModel, expected a UNet2DModel"),
        ({"sample_size": None}, "sample_size missing"),
    ],
)
def test_folders_of_other_networks_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    network = UNetConfig(16, 8, (1, 2, 3), 2, norm_groups=4)
    export_upsampler(Upsampler(UpsamplerConfig(network, low_res_size=4)), tmp_path)
    path = tmp_path / "config.json"
    changed = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))
    with pytest.raises(CheckpointError, match=message):
        import_upsampler(tmp_path)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@torch.no_grad()
def test_the_scheduler_takes_the_same_steps_as_our_sampler(tmp_path: Path, variance: Any) -> None:
    from diffusers import UnCLIPScheduler

    decoder = new_decoder(diffusion=DiffusionConfig(variance=variance))
    export_decoder(decoder, tmp_path)
    assert import_decoder(tmp_path, texts(1, seed=9)).config.diffusion == decoder.config.diffusion
    scheduler = UnCLIPScheduler.from_pretrained(tmp_path / "decoder_scheduler")
    image_embedding, text, x_t = torch.randn(1, EMBEDDING_DIM) * 0.05, texts(1), torch.randn(1, 3, 16, 16)

    def predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return decoder(x_t, t, image_embedding, None, text)

    scheduler.set_timesteps(3)
    steps = scheduler.timesteps.tolist()
    denoise = decoder.diffusion.denoiser(predict, clip_range=1.0)
    ours = samplers.ddpm(decoder.diffusion, denoise, x_t, steps, torch.Generator().manual_seed(0))
    theirs, generator = x_t, torch.Generator().manual_seed(0)
    for t, previous in zip(steps, [*steps[1:], None], strict=True):
        output = predict(theirs, torch.tensor([t]))
        theirs = scheduler.step(output, t, theirs, prev_timestep=previous, generator=generator).prev_sample
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("settings", [{"prediction_type": "v"}, {"schedule": "linear"}, {"variance": "fixed_large"}])
def test_processes_that_the_scheduler_does_not_support_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="UnCLIPScheduler supports nothing else"):
        export_decoder(new_decoder(diffusion=DiffusionConfig(**settings)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_scheduler_that_does_not_fit_its_network_is_refused(tmp_path: Path) -> None:
    export_decoder(new_decoder(), tmp_path)
    path = tmp_path / "decoder_scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text())
    for change, message in (
        ({"variance_type": "learned_range"}, "got a network of 3 output channels, expected 6"),
        ({"prediction_type": "v_prediction"}, "prediction_type = 'v_prediction', expected 'epsilon'"),
        ({"_class_name": "DDIMScheduler"}, "got _class_name = 'DDIMScheduler'"),
    ):
        path.write_text(json.dumps(settings | change))
        with pytest.raises(CheckpointError, match=message):
            import_decoder(tmp_path, texts(1, seed=9))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        import_decoder(tmp_path, texts(1, seed=9))
