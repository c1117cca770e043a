"""Export and import of networks of latents: diffusers' UNet2DConditionModel and ours compute the same with the same weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unclip.interop.test_decoder import randomize
from unclip.diffusion.process import DiffusionConfig
from unclip.errors import CheckpointError, InputError, UnclipError
from unclip.interop import unet as unets
from unclip.interop.latent_diffusion import export_latent_diffusion, import_latent_diffusion
from unclip.models.embeddings import EmbeddingStatistics
from unclip.models.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from unclip.models.layers import timestep_embedding
from unclip.models.text import CaptionFeatures, TextShape
from unclip.models.unet import UNetConfig
from unclip.systems.latent_sizes import LATENT_DIFFUSION_SIZES

LENGTH, WIDTH, EMBEDDING_DIM = 5, 12, 10
UNET = UNetConfig(
    16,
    8,
    (1, 2, 3),
    num_res_blocks=2,
    attention_resolutions=(16, 8),
    norm_groups=4,
    scale_shift_norm=False,
    attention="spatial_transformer",
    num_heads=2,
    resampling="convolution",
)
DIFFUSION = DiffusionConfig(schedule="scaled_linear")
THEIRS: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (8, 16, 24),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}


def texts(batch: int, seed: int = 0) -> CaptionFeatures:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, LENGTH, WIDTH, generator=generator)
    mask = torch.ones(batch, LENGTH, dtype=torch.bool)
    return CaptionFeatures(states, mask, torch.randn(batch, EMBEDDING_DIM, generator=generator))


def network(unet: UNetConfig = UNET, **changes: Any) -> LatentDiffusion:
    config = LatentDiffusionConfig(unet, **{"context_dim": WIDTH, "diffusion": DIFFUSION, **changes})
    model = randomize(LatentDiffusion(config, EMBEDDING_DIM, TextShape(LENGTH, WIDTH, 0)))
    if config.reads_padding:
        model.text.set_null(texts(1, seed=9))
    assert isinstance(model, LatentDiffusion)
    return model


@torch.no_grad()
def check_equal(ours: LatentDiffusion, theirs: Any) -> None:
    """Predictions are those of diffusers, and depend on every input."""
    generator = torch.Generator().manual_seed(0)
    x_t, t, text = torch.randn(3, 4, 16, 16, generator=generator), torch.tensor([0, 500, 999]), texts(3)
    found = ours(x_t, t, text)
    expected = theirs(x_t, t, text.text_encodings).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    dropped = ours(x_t, t, text, torch.tensor([True, False, True]))
    torch.testing.assert_close(dropped[1], found[1], atol=1e-4, rtol=1e-4)
    null = ours.text.null_encodings.expand(3, -1, -1)  # type: ignore[union-attr]
    torch.testing.assert_close(dropped[::2], theirs(x_t, t, null).sample[::2], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(dropped[0], found[0], atol=1e-3)
    assert not torch.allclose(ours(x_t, t.flip(0), text), found, atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_heads": None, "head_channels": 4}, {"scale_shift_norm": True, "attention_resolutions": (4,)}],
)
def test_diffusers_computes_the_same_as_an_exported_network(tmp_path: Path, changes: dict[str, Any]) -> None:
    from diffusers import UNet2DConditionModel

    ours = network(dataclasses.replace(UNET, **changes))
    export_latent_diffusion(ours, tmp_path)
    theirs, info = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    check_equal(ours, theirs.eval())
    again = import_latent_diffusion(tmp_path, texts(1, seed=9), diffusion=DIFFUSION)
    assert again.config == ours.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "unet"),
    [
        ({}, {}),
        ({"use_linear_projection": True, "upcast_attention": True, "dropout": 0.1}, {"dropout": 0.1}),
        ({"attention_head_dim": (2, 4, 6)}, {"num_heads": None, "head_channels": 4}),
        ({"attention_head_dim": (2, 2, 2)}, {}),
    ],
)
def test_an_imported_network_computes_the_same_as_diffusers(
    tmp_path: Path, changes: dict[str, Any], unet: dict[str, Any]
) -> None:
    from diffusers import UNet2DConditionModel

    theirs = randomize(UNet2DConditionModel(**{**THEIRS, **changes}))
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    ours = import_latent_diffusion(tmp_path, texts(1, seed=9), diffusion=DIFFUSION, latent_std=5.0)
    assert ours.config.unet == dataclasses.replace(UNET, **unet)
    assert torch.equal(ours.latent_std, torch.full((4,), 5.0)) and not ours.latent_mean.any()
    check_equal(ours, theirs)


def test_the_size_stable_diffusion_has_the_weights_of_the_published_network() -> None:
    """UNet2DConditionModel with the settings of Stable Diffusion 1: 859,520,964 parameters of the same names and shapes."""
    from diffusers import UNet2DConditionModel

    config = LATENT_DIFFUSION_SIZES["stable_diffusion"].generator.model
    with torch.device("meta"):
        theirs = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        ours = LatentDiffusion(config, 768, TextShape(77, 768, 49408))
    found, expected = unets.to_theirs(ours.unet), theirs.state_dict()
    assert sum(parameter.numel() for parameter in ours.parameters()) == 859_520_964
    assert {name: value.numel() for name, value in found.items()} == {
        name: value.numel() for name, value in expected.items()
    }
    assert [name for name, value in found.items() if value.squeeze().shape != expected[name].squeeze().shape] == []


@torch.no_grad()
def test_image_embeddings_are_class_labels_of_diffusers(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    ours = network(reads_image_embedding=True, max_noise_level=999)
    statistics = EmbeddingStatistics.of(torch.randn(50, EMBEDDING_DIM) * 0.3 + 0.1)
    assert ours.image is not None
    ours.image.statistics.load_state_dict(statistics.state_dict())
    export_latent_diffusion(ours, tmp_path)
    theirs, info = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    again = import_latent_diffusion(tmp_path, texts(1, seed=9), diffusion=DIFFUSION, statistics=statistics)
    assert again.config == ours.config
    x_t, t, text = torch.randn(3, 4, 16, 16), torch.tensor([0, 500, 999]), texts(3)
    level, drop = torch.tensor([0, 7, 300]), torch.tensor([False, True, False])
    embedding = torch.randn(3, EMBEDDING_DIM) * 0.3
    labels = torch.cat([embedding, timestep_embedding(level, EMBEDDING_DIM)], dim=1).masked_fill(drop[:, None], 0)
    expected = theirs(x_t, t, text.text_encodings, class_labels=labels).sample
    for model in (ours, again):
        found = model(x_t, t, text, None, statistics.normalize(embedding), drop, level)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[1], model(x_t, t, text)[1], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(found[2], model(x_t, t, text)[2], atol=1e-3)
    with pytest.raises(CheckpointError, match=r"expected \('projection', 14\)"):
        import_latent_diffusion(tmp_path, texts(1), diffusion=DIFFUSION, statistics=EmbeddingStatistics.empty(7))


@pytest.mark.parametrize(
    ("unet", "changes", "message"),
    [
        ({"attention": "joint"}, {}, r"unet\.attention = 'joint', expected 'spatial_transformer'"),
        ({"resampling": "residual"}, {}, r"unet\.resampling = 'residual', expected 'convolution'"),
        ({}, {"text": "transformer"}, "text = 'transformer', expected 'clip'"),
    ],
)
def test_networks_that_diffusers_cannot_represent_are_refused(
    tmp_path: Path, unet: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export_latent_diffusion(network(dataclasses.replace(UNET, **unet), **changes), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "got a UNet2DModel, expected a UNet2DConditionModel"),
        (
            {"class_embed_type": "projection"},
            "class_embed_type = 'projection' .* this pipeline has no image embeddings",
        ),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type = 'text_time'"),
        ({"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers_per_block = "),
        ({"only_cross_attention": True}, "only_cross_attention = True"),
        ({"dual_cross_attention": True}, "dual_cross_attention = True"),
        ({"num_attention_heads": 4}, "num_attention_heads = 4"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type = 'UNetMidBlock2D'"),
        ({"norm_eps": 1e-6}, "norm_eps = 1e-06"),
        ({"attention_head_dim": [2, 4, 8]}, "attention_head_dim = "),
        ({"attention_head_dim": [2, 2]}, "attention_head_dim = "),
        ({"attention_head_dim": 3}, "num_heads: got 3"),
        ({"cross_attention_dim": 16}, "cross_attention_dim = 16"),
        ({"in_channels": 9}, r"got \(9, 4\) channels"),
        ({"out_channels": 8}, r"got \(4, 8\) channels"),
        ({"block_out_channels": [8, 16]}, "mirrored blocks"),
        ({"block_out_channels": [8, 16, 20]}, "expected multiples of the first"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "mirrored blocks"),
        ({"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}, "attention_resolutions"),
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 3}, "down_block_types = "),
        (
            {
                "block_out_channels": [8] * 20_000,
                "down_block_types": ["DownBlock2D"] * 20_000,
                "up_block_types": ["UpBlock2D"] * 20_000,
            },
            "at most 15",
        ),
        ({"layers_per_block": 400}, "layers_per_block = 400"),
        ({"layers_per_block": [2, 2, 2]}, "layers_per_block = "),
        ({"layers_per_block": 1}, "do not fit"),
        ({"sample_size": 18}, "image_size: got 18"),
        ({"norm_num_groups": 3}, "norm_groups: got 3"),
    ],
)
def test_wrong_settings_are_refused_by_name(
    exported: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / weights).hardlink_to(exported / weights)
    settings = json.loads((exported / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(CheckpointError, match=message):
        import_latent_diffusion(tmp_path, texts(1), diffusion=DIFFUSION)


def test_any_single_value_may_be_wrong(exported: Path) -> None:
    """The import says so in our words, or the value does not matter."""
    path = exported / "config.json"
    content, refused = json.loads(path.read_text()), 0
    wrong: list[Any] = ["wide", -1, 10**9, None, {"value": 1}, 0, True, 2.5, [], 3, [[]]]
    for name in content:
        for value in wrong:
            path.write_text(json.dumps(content | {name: value}))
            try:
                import_latent_diffusion(exported, texts(1), diffusion=DIFFUSION)
            except UnclipError as error:
                refused += 1
                assert len(str(error)) < 5000
    path.write_text(json.dumps(content))
    assert refused > len(content) * len(wrong) / 2


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents") / "unet"
    export_latent_diffusion(network(), folder)
    return folder
