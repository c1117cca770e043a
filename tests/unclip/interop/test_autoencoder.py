"""Export and import of autoencoders: diffusers' classes and ours compute the same with the same weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unclip.interop.test_decoder import randomize
from unclip.errors import CheckpointError, ConfigError, InputError, UnclipError
from unclip.interop.autoencoder import Scaling, export_autoencoder, import_autoencoder
from unclip.models.autoencoder import Autoencoder, AutoencoderConfig, Bottleneck
from unclip.models.patch_transformer import PatchTransformerConfig
from unclip.models.quantisers import KlBottleneck, VectorQuantiser

SIZES: dict[str, Any] = {
    "block_out_channels": (8, 16, 24),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "sample_size": 32,
    "latent_channels": 4,
}
CONFIGS: dict[Bottleneck, AutoencoderConfig] = {
    bottleneck: AutoencoderConfig(
        32, 1, 8, (1, 2, 3), 2, (8,) if bottleneck == "vq" else (), True, 4, 4, bottleneck, codebook_size=40
    )
    for bottleneck in ("kl", "vq")
}


def theirs(bottleneck: Bottleneck, **changes: Any) -> Any:
    from diffusers import AutoencoderKL, VQModel

    plain = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    if bottleneck == "kl":
        return randomize(AutoencoderKL(**SIZES, **plain, **changes))
    attending = {
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
    }
    return randomize(VQModel(**SIZES, **attending, num_vq_embeddings=40, **changes))


@torch.no_grad()
def check_equal(ours: Autoencoder, other: Any) -> None:
    """Encodings, codes, penalties and images are those of diffusers."""
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    found = ours(images)
    if ours.config.bottleneck == "kl":
        posterior = other.encode(images).latent_dist
        assert posterior.mode().std() > 0.1 and posterior.logvar.std() > 0.1
        torch.testing.assert_close(ours.encode(images), posterior.mode(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.penalty, posterior.kl(), atol=1e-5, rtol=1e-5)
        noise = torch.randn(posterior.mean.shape)
        sampled = ours.bottleneck(ours._encode(images), noise).latents
        torch.testing.assert_close(sampled, posterior.mean + posterior.std * noise, atol=1e-5, rtol=1e-5)
        latents = posterior.mode()
        expected = other.decode(latents).sample
    else:
        encodings = other.encode(images).latents
        latents, penalty, (_, _, codes) = other.quantize(encodings)
        assert len(codes.unique()) > 5
        torch.testing.assert_close(found.encodings, encodings, atol=1e-5, rtol=1e-5)
        assert torch.equal(ours.tokens(images).flatten(), codes)
        torch.testing.assert_close(ours.encode(images), latents, atol=1e-5, rtol=1e-5)
        assert isinstance(ours.bottleneck, VectorQuantiser) and ours.bottleneck.commitment_weight == 0.25
        torch.testing.assert_close(found.penalty.mean(), penalty, atol=1e-5, rtol=1e-5)  # equal without gradients
        expected = other.decode(encodings).sample
        torch.testing.assert_close(ours.decode_tokens(codes.view(3, -1)), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1
    torch.testing.assert_close(found.images, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(latents), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bottleneck", CONFIGS)
def test_diffusers_computes_the_same_as_an_exported_autoencoder(tmp_path: Path, bottleneck: Bottleneck) -> None:
    from diffusers import AutoencoderKL, VQModel

    ours = randomize(Autoencoder(CONFIGS[bottleneck]))
    export_autoencoder(ours, tmp_path, Scaling(0.5))
    cls: Any = AutoencoderKL if bottleneck == "kl" else VQModel
    other, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and other.config.scaling_factor == 0.5
    check_equal(ours, other.eval())


@pytest.mark.parametrize("bottleneck", CONFIGS)
def test_an_imported_autoencoder_computes_the_same_as_diffusers(tmp_path: Path, bottleneck: Bottleneck) -> None:
    other = theirs(bottleneck, scaling_factor=0.3)
    other.save_pretrained(tmp_path)
    ours, scaling = import_autoencoder(tmp_path)
    assert dataclasses.replace(ours.config, codebook_size=40) == CONFIGS[bottleneck]
    assert scaling == Scaling(0.3, 0.0)
    check_equal(ours, other)


def test_attention_under_its_former_names_is_imported(tmp_path: Path) -> None:
    """As in the published folders of Stable Diffusion 1."""
    other = theirs("kl", shift_factor=0.1)
    other.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in load_file(path).items():
        for new, old in former.items():
            name = name.replace(f".{new}.", f".{old}.")
        tensors[name] = value
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    ours, scaling = import_autoencoder(tmp_path)
    assert scaling == Scaling(0.18215, 0.1)
    check_equal(ours, other)


def test_penalties_and_their_gradients_are_those_of_diffusers() -> None:
    """VQModel itself has the weights of the two losses the other way round; its quantiser can have them in the paper's order."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, VectorQuantizer

    generator = torch.Generator().manual_seed(0)
    encodings = torch.randn(3, 5, 4, 4, generator=generator, requires_grad=True)
    quantiser, other = VectorQuantiser(20, 5, commitment_weight=0.4), VectorQuantizer(20, 5, beta=0.4, legacy=False)
    with torch.no_grad():
        quantiser.codebook.copy_(torch.randn(20, 5, generator=generator))
        other.embedding.weight.copy_(quantiser.codebook)
    weights = torch.randn(3, 5, 4, 4, generator=generator)
    found, (latents, penalty, _) = quantiser(encodings), other(encodings)
    torch.testing.assert_close(found.penalty.mean(), penalty, atol=1e-6, rtol=1e-5)
    ours = torch.autograd.grad((found.latents * weights).sum() + found.penalty.mean(), [encodings, quantiser.codebook])
    expected = torch.autograd.grad((latents * weights).sum() + penalty, [encodings, other.embedding.weight])
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)

    moments = torch.randn(3, 10, 4, 4, generator=generator, requires_grad=True)
    divergence = KlBottleneck()(moments).penalty
    expected_divergence = DiagonalGaussianDistribution(moments).kl()
    torch.testing.assert_close(divergence, expected_divergence, atol=1e-5, rtol=1e-5)
    ours = torch.autograd.grad(divergence.sum(), moments)
    torch.testing.assert_close(ours, torch.autograd.grad(expected_divergence.sum(), moments), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"bottleneck": "gumbel"}, {"patch_size": 2}, {"transformer": PatchTransformerConfig(8, 16, 1, 2)}]
)
def test_what_diffusers_cannot_represent_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    autoencoder = Autoencoder(AutoencoderConfig(**{**CONFIGS["kl"].__dict__, "codebook_size": 8, **changes}))
    with pytest.raises(InputError, match="expected 'kl' or 'vq' and patch_size = 1"):
        export_autoencoder(autoencoder, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_scalings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scaling\.factor: got 0"):
        export_autoencoder(Autoencoder(CONFIGS["kl"]), tmp_path, Scaling(0.0))
    with pytest.raises(ConfigError, match=r"scaling\.shift: got 0\.1"):
        export_autoencoder(Autoencoder(CONFIGS["vq"]), tmp_path, Scaling(1.0, 0.1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ({"_class_name": ["VQModel"]}, "VQModel"),
        ({"norm_type": "spatial"}, "norm_type = 'spatial'"),
        ({"vq_embed_dim": 8}, "vq_embed_dim = 8"),
        ({"block_out_channels": [8, 16, 20]}, "expected multiples of the first"),
        ({"block_out_channels": [8, 16]}, "as many numbers of channels"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "mirrored blocks"),
        (
            {
                "block_out_channels": [8] * 20_000,
                "down_block_types": ["DownEncoderBlock2D"] * 20_000,
                "up_block_types": ["UpDecoderBlock2D"] * 20_000,
            },
            "got 20,000 blocks, expected at most 16",
        ),
        ({"layers_per_block": 400}, "layers_per_block = 400"),
        ({"layers_per_block": 1}, "do not fit"),
        ({"num_vq_embeddings": 30}, "do not fit"),
        ({"latent_channels": 10**9}, "latent_channels = 1000000000"),
        ({"norm_num_groups": 3}, "cannot be built here"),
        ({"sample_size": 34}, "cannot be built here"),
        ({"scaling_factor": 0}, "scaling_factor = 0"),
        ({"scaling_factor": "0.1"}, "scaling_factor = '0.1'"),
    ],
)
def test_wrong_settings_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    export_autoencoder(Autoencoder(CONFIGS["vq"]), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        import_autoencoder(tmp_path)


def test_any_single_value_may_be_wrong(tmp_path: Path) -> None:
    """The import says so in our words, or the value does not matter."""
    export_autoencoder(Autoencoder(CONFIGS["vq"]), tmp_path)
    path = tmp_path / "config.json"
    content, refused = json.loads(path.read_text()), 0
    wrong: list[Any] = ["wide", -1, 10**9, None, {"value": 1}, 0, True, 2.5, [], 3, [[]]]
    for name in content:
        for value in wrong:
            path.write_text(json.dumps(content | {name: value}))
            try:
                import_autoencoder(tmp_path)
            except UnclipError as error:
                refused += 1
                assert len(str(error)) < 5000
    assert refused > len(content) * len(wrong) / 2


def test_foreign_weights_are_refused(tmp_path: Path) -> None:
    export_autoencoder(Autoencoder(CONFIGS["kl"]), tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"decoder.extra.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"1 unknown, such as decoder\.extra\.weight"):
        import_autoencoder(tmp_path)
    save_file(tensors | {"quant_conv.bias": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="do not fit"):
        import_autoencoder(tmp_path)
    path.write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="pickles are not read"):
        import_autoencoder(tmp_path)
