"""Sizes of the presets: the paper's where they are the paper's, and the demo's as its run file has them."""

import json
import tomllib
from pathlib import Path

import pytest
from unclip.systems.unclip.presets import PRESETS, ParameterCounts, count_parameters

from unclip import config
from unclip.models.autoregressive_prior import AutoregressivePriorConfig
from unclip.models.decoder import DecoderConfig
from unclip.models.prior import PriorConfig
from unclip.models.text import TextTransformer
from unclip.models.upsampler import Upsampler, UpsamplerConfig

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_come_to_what_the_table_says(name: str) -> None:
    preset = PRESETS[name]
    upsamplers = tuple(count_parameters(lambda c=each: Upsampler(c)) for each in preset.upsamplers)
    counts = ParameterCounts(count_parameters(preset.build_prior), count_parameters(preset.build_decoder), upsamplers)
    assert counts == preset.num_parameters
    sides = [preset.decoder.unet.image_size, *(each.output_size for each in preset.upsamplers)]
    assert sides[:-1] == [each.low_res_size for each in preset.upsamplers]


def test_dalle2_is_table_3() -> None:
    preset = PRESETS["dalle2"]
    counts = preset.num_parameters
    assert counts.decoder == pytest.approx(3.5e9, rel=0.05)
    assert counts.upsamplers[0] == pytest.approx(700e6, rel=0.05)
    # The table gives one digit, and its own widths and depths come to 1.23 B and 282 M.
    assert f"{counts.prior:.0e}" == f"{1e9:.0e}" and f"{counts.upsamplers[1]:.0e}" == f"{300e6:.0e}"
    text = preset.decoder.text_transformer
    assert (preset.text_shape.length, text.width, text.depth, text.num_heads) == (256, 2048, 24, 32)
    assert preset.decoder.unet.attention_resolutions == (32, 16, 8) and preset.decoder.unet.head_channels == 64
    assert [each.output_size for each in preset.upsamplers] == [256, 1024]
    assert all(4 * each.unet.image_size == each.output_size for each in preset.upsamplers)  # crops of a quarter
    assert [each.degradation.kind for each in preset.upsamplers] == ["blur", "bsr"]
    assert [each.diffusion.schedule for each in preset.upsamplers] == ["cosine", "linear"]


def test_the_trained_text_transformer_is_a_third_of_the_decoder() -> None:
    preset = PRESETS["dalle2"]
    text = count_parameters(
        lambda: TextTransformer(preset.decoder.text_transformer, preset.text_shape, preset.decoder.context_dim, 2048)
    )
    assert text == pytest.approx(1.3e9, rel=0.02)


def test_the_demo_preset_is_the_demos_run_file() -> None:
    run = tomllib.loads((ROOT / "pipelines" / "presets" / "demo.toml").read_text())
    demo = PRESETS["demo"]
    assert config.load(PriorConfig, run["prior"]["model"]) == demo.prior
    assert config.load(AutoregressivePriorConfig, run["prior"]["autoregressive"]) == demo.autoregressive_prior
    assert config.load(DecoderConfig, run["decoder"]["model"]) == demo.decoder
    for section, upsampler in zip(run["upsamplers"].values(), demo.upsamplers, strict=True):
        sizes = {"low_res_size": demo.decoder.unet.image_size, "scale": 4}  # of which the sections say nothing
        assert config.load(UpsamplerConfig, section["model"] | sizes) == upsampler
    assert list(run["upsamplers"]) == ["64"] == [str(upsampler.output_size) for upsampler in demo.upsamplers]
    assert run["clip"]["model"] == "unclip-demo"
    clip = json.loads((ROOT / "unclip" / "models" / "open_clip_models" / "unclip-demo.json").read_text())
    assert clip["embed_dim"] == demo.embedding_dim
    text = clip["text_cfg"]
    assert (text["context_length"], text["width"], text["vocab_size"]) == (
        demo.text_shape.length,
        demo.text_shape.width,
        demo.text_shape.vocab_size,
    )
