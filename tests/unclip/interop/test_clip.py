"""Export and import of CLIPs: transformers' classes and open_clip compute the same for the same captions and images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.unclip.systems.tiny_stacks import EMBEDDING_DIM, LENGTH, add_noise, tiny_clip
from unclip.errors import CheckpointError, InputError
from unclip.interop.clip import export_images, export_text, import_clip
from unclip.models.clip import Clip, create

CAPTIONS = ["", "a Red   cat!", "wow!! it's 100% naïve ☕ " + "long " * 30, "don't <|b|> ₂ 3rd", "!"]


@torch.no_grad()
def check_text(clip: Clip, folder: Path, theirs: Any) -> None:
    """Check tokens, masks, hidden states and projections, computed as in UnCLIPPipeline."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoded = tokenizer(
        CAPTIONS, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    tokens = clip.tokenize(CAPTIONS)
    text = clip.encode_text(tokens)
    assert torch.equal(encoded.attention_mask.bool(), text.text_mask)
    assert torch.equal(encoded.input_ids[text.text_mask], tokens[text.text_mask])
    output = theirs(encoded.input_ids)
    torch.testing.assert_close(output.text_embeds, text.text_projection, atol=1e-4, rtol=1e-4)
    kept = text.text_mask
    torch.testing.assert_close(output.last_hidden_state[kept], text.text_encodings[kept], atol=1e-4, rtol=1e-4)


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("image_embeddings", ["unit", "raw"])
@torch.no_grad()
def test_transformers_computes_what_open_clip_computes(tmp_path: Path, quick_gelu: bool, image_embeddings: Any) -> None:
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    clip = tiny_clip(quick_gelu, image_embeddings)
    export_text(clip, tmp_path)
    export_images(clip, tmp_path)
    text, info = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    vision, other = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "image_encoder", output_loading_info=True)
    assert not any(info.values()) and not any(other.values())
    check_text(clip, tmp_path, text.eval())
    expected = clip.embed_images(images())
    torch.testing.assert_close(vision.eval()(images()).image_embeds, expected, atol=1e-4, rtol=0)
    assert torch.allclose(expected.norm(dim=1), torch.ones(3)) == (image_embeddings == "unit")
    if image_embeddings == "unit":  # the normalising layer does not overflow in half precision
        half = vision.half()(images().half()).image_embeds.float()
        torch.testing.assert_close(half, expected, atol=0.02, rtol=0)


def test_exporting_an_imported_clip_gives_the_same_bytes(tmp_path: Path) -> None:
    clip = tiny_clip()
    export_text(clip, tmp_path / "once")
    export_images(clip, tmp_path / "once")
    again, config = import_clip(tmp_path / "once")
    assert config["vision_cfg"]["layers"] == 2 and again.image_embeddings == "unit"
    for name, value in clip.model.state_dict().items():  # the normalising layer was removed
        assert name == "logit_scale" or torch.equal(again.model.state_dict()[name], value), name
    torch.testing.assert_close(again.embed_images(images()), clip.embed_images(images()))
    export_text(again, tmp_path / "twice")
    export_images(again, tmp_path / "twice")
    files = [path.relative_to(tmp_path / "once") for path in (tmp_path / "once").rglob("*") if path.is_file()]
    assert len(files) == 9
    for file in files:
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes(), file


@pytest.mark.parametrize(("hidden_act", "eos_token_id"), [("quick_gelu", 2), ("gelu", 49407)])
@torch.no_grad()
def test_open_clip_computes_what_transformers_computes(tmp_path: Path, hidden_act: str, eos_token_id: int) -> None:
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    sizes = {
        "projection_dim": EMBEDDING_DIM,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "hidden_act": hidden_act,
    }
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=EMBEDDING_DIM,
            intermediate_size=40,
            max_position_embeddings=LENGTH,
            eos_token_id=eos_token_id,
            **sizes,
        )
    )
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(hidden_size=24, intermediate_size=96, image_size=32, patch_size=8, **sizes)
    )
    add_noise(text, 0.1).save_pretrained(tmp_path / "text_encoder")
    add_noise(vision, 0.1)
    export_text(tiny_clip(), tmp_path / "ours")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "ours" / "tokenizer")
    tokenizer.save_pretrained(tmp_path / "tokenizer")  # as transformers itself writes it
    export_images(tiny_clip(), tmp_path)  # for its feature_extractor
    vision.save_pretrained(tmp_path / "image_encoder")
    clip, _ = import_clip(tmp_path)
    assert clip.image_embeddings == "raw"
    check_text(clip, tmp_path, text)
    torch.testing.assert_close(clip.embed_images(images()), vision(images()).image_embeds, atol=1e-4, rtol=1e-4)


def test_images_are_prepared_alike(tmp_path: Path) -> None:
    """Compare up to the rounding of resized pixels to 256 levels; crops of an odd number of rows may differ by one row."""
    from transformers import CLIPImageProcessor

    clip = tiny_clip()
    export_images(clip, tmp_path)
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "feature_extractor")
    waves = np.sin(np.arange(64 * 48 * 3) / 7).reshape(48, 64, 3) * 127 + 128
    image = Image.fromarray(waves.astype(np.uint8)).resize((44, 32))
    theirs = processor(images=image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(theirs, clip.preprocess(image), atol=0.02, rtol=0)


def test_without_an_image_encoder_no_image_is_embedded(tmp_path: Path) -> None:
    export_text(tiny_clip(), tmp_path)
    clip, _ = import_clip(tmp_path)
    assert torch.equal(clip.encode_text(clip.tokenize(["a"])).text_mask.sum(), torch.tensor(3))
    with pytest.raises(InputError, match="imported without an image encoder"):
        clip.embed_images(torch.zeros(1, 3, 1, 1))
    with pytest.raises(InputError, match="imported without an image encoder"):
        export_images(clip, tmp_path)


def test_towers_that_transformers_does_not_support_are_refused(tmp_path: Path) -> None:
    residual = Clip(create("unclip-demo", None), "unclip-demo")
    with pytest.raises(InputError, match="vision tower is a ModifiedResNet"):
        export_images(residual, tmp_path)
    vision = tiny_clip(vision_cfg={"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8})
    with pytest.raises(InputError, match="vision tower of width 16 for embeddings of width 16"):
        export_images(vision, tmp_path)
    scaled = {"context_length": LENGTH, "width": 16, "heads": 2, "layers": 1, "ls_init_value": 0.1}
    with pytest.raises(InputError, match="text tower is a CLIP"):
        export_text(tiny_clip(text_cfg=scaled), tmp_path)
    other = tiny_clip()
    other.tokenizer = other.tokenizer.__class__(clean="canonicalize")
    with pytest.raises(InputError, match="tokenizer SimpleTokenizer"):
        export_text(other, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ("text_encoder/config.json", {"num_hidden_layers": 3}, r"do not fit config\.json: 16 missing"),
        ("text_encoder/config.json", {"num_attention_heads": 3}, "do not fit"),
        ("text_encoder/config.json", {"hidden_size": "wide"}, "hidden_size = 'wide'"),
        (
            "text_encoder/config.json",
            {"vocab_size": 10**9, "eos_token_id": 2},
            "vocab_size = 1000000000, expected int from 1",
        ),
        ("text_encoder/config.json", {"max_position_embeddings": 5000}, "expected int from 1 to 4,096"),
        ("image_encoder/config.json", {"hidden_size": 20_000}, "hidden_size = 20000, expected int from 1 to 16,384"),
        ("image_encoder/config.json", {"hidden_act": "gelu"}, "Take both encoders from one CLIP"),
        ("feature_extractor/preprocessor_config.json", {"resample": 0}, "expected resample 2 or 3"),
        ("tokenizer/vocab.json", {"new": 49408}, "not CLIP's own"),
    ],
)
def test_folders_of_other_models_are_refused(tmp_path: Path, file: str, change: dict[str, Any], message: str) -> None:
    export_text(tiny_clip(), tmp_path)
    export_images(tiny_clip(), tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        import_clip(tmp_path)


def replace_weights(path: Path, **shapes: tuple[int, ...]) -> None:
    """Replace tensors of a file by zeros of other shapes; names have "__" for "."."""
    tensors = load_file(path)
    save_file(tensors | {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}, path)


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the tensors that are made on the CPU so far, ascending."""
    asked = [0]

    def recorded(make: Any) -> Any:
        def wrapper(*sizes: Any, **options: Any) -> torch.Tensor:
            result: torch.Tensor = make(*sizes, **options)
            if result.device.type == "cpu":
                asked.append(max(asked[-1], result.numel()))
            return result

        return wrapper

    for name in ("eye", "zeros", "ones"):
        monkeypatch.setattr(torch, name, recorded(getattr(torch, name)))
    return asked


def test_no_projection_is_made_for_a_width_that_the_weights_do_not_have(tmp_path: Path, largest: list[int]) -> None:
    export_text(tiny_clip(), tmp_path, with_projection=False)
    path = tmp_path / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 5000}))
    with pytest.raises(
        CheckpointError, match=r"do not fit config.json: got an out_proj.weight \(16, 16\), expected \(5000"
    ):
        import_clip(tmp_path, with_projection=False)
    replace_weights(path.parent / "model.safetensors", text_model__final_layer_norm__weight=(5000,))
    with pytest.raises(CheckpointError, match=r"do not fit config\.json"):
        import_clip(tmp_path, with_projection=False)
    assert largest[-1] < 5000**2


LAST = "vision_model__encoder__layers__2__"
"""Layer that `export_images` adds to the two of `tiny_clip`."""


@pytest.mark.parametrize(
    "shapes",
    [
        {f"{LAST}mlp__fc2__weight": (3000, 128), "visual_projection__weight": (EMBEDDING_DIM, 3000)},
        {f"{LAST}layer_norm2__weight": (3,)},
        {f"{LAST}self_attn__q_proj__weight": (3,)},
        {f"{LAST}mlp__fc1__weight": ()},
        {"visual_projection__weight": (2, 2, 2)},
    ],
)
def test_a_normalising_layer_of_other_shapes_is_not_built(
    tmp_path: Path, largest: list[int], shapes: dict[str, tuple[int, ...]]
) -> None:
    export_text(tiny_clip(), tmp_path)
    export_images(tiny_clip(), tmp_path)
    replace_weights(tmp_path / "image_encoder" / "model.safetensors", **shapes)
    largest[:] = [0]
    with pytest.raises(CheckpointError, match="do not fit"):
        import_clip(tmp_path)
    assert largest[-1] < 3000**2
