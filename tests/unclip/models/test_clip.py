import dataclasses
import functools
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unclip import foreign
from unclip.errors import CheckpointError, ConfigError
from unclip.models import clip
from unclip.models.clip import Clip

MODEL = "unclip-demo"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    clip.save(clip.create(MODEL, None), MODEL, folder)
    return folder


@pytest.fixture(scope="module")
def loaded(saved: Path) -> Clip:
    return Clip.load(f"local-dir:{saved}")


def test_a_saved_model_loads_through_open_clip(saved: Path, loaded: Clip) -> None:
    again = Clip.load(f"local-dir:{saved}")
    images, tokens = torch.rand(2, 3, 64, 64) * 2 - 1, loaded.tokenize(["a red circle", "a star"])
    assert torch.equal(again.embed_images(again.resize(images)), loaded.embed_images(loaded.resize(images)))
    assert torch.equal(again.encode_text(tokens).text_embedding, loaded.encode_text(tokens).text_embedding)


def test_embeddings_have_unit_norm_and_encodings_have_the_text_length(loaded: Clip) -> None:
    text = loaded.encode_text(loaded.tokenize(["a red circle", "a small yellow star on a purple background"]))
    assert text.text_embedding.shape == (2, loaded.embedding_dim)
    assert text.text_encodings.shape == (2, loaded.text_length, loaded.text_width)
    torch.testing.assert_close(text.text_embedding.norm(dim=1), torch.ones(2))
    assert text.text_mask.sum(dim=1).tolist() == [5, 10]  # words, start and end token


def test_text_features_match_open_clip(loaded: Clip) -> None:
    tokens = loaded.tokenize(["a red circle on a white background"])
    text = loaded.encode_text(tokens)
    expected = torch.nn.functional.normalize(loaded.model.encode_text(tokens), dim=-1)
    torch.testing.assert_close(text.text_embedding, expected)
    at_end = text.text_encodings[0, tokens[0].argmax()] @ loaded.model.text_projection
    torch.testing.assert_close(torch.nn.functional.normalize(at_end, dim=-1), expected[0], atol=1e-5, rtol=1e-4)


LENGTHS = [0, 1, 3, 12, 13, 14, 15, 22, 40]
"""Words per caption; with start and end tokens, some fill a multiple of LENGTH_STEP, and some exceed the context."""


def test_short_captions_are_encoded_shortened_with_the_same_result(loaded: Clip) -> None:
    captions = [" ".join(["star"] * length) for length in LENGTHS]
    tokens = loaded.tokenize(captions)
    whole = loaded.model.forward_intermediates(
        text=tokens, text_indices=1, normalize=False, normalize_intermediates=True
    )
    seen: list[int] = []
    with loaded.model.transformer.resblocks[0].register_forward_hook(lambda *call: seen.append(call[1][0].shape[1])):
        text = loaded.encode_text(tokens)
    assert seen == [16, 24], "two groups: up to 16 tokens, and up to the context length of 24"
    assert text.text_mask.sum(dim=1).tolist() == [min(length + 2, 24) for length in LENGTHS]
    kept = text.text_mask
    torch.testing.assert_close(text.text_encodings[kept], whole["text_intermediates"][-1][kept])
    torch.testing.assert_close(text.text_projection, whole["text_features"])
    assert not text.text_encodings[kept.sum(dim=1) <= 16, 16:].any()


@pytest.mark.parametrize(("text_pool_type", "no_causal_mask"), [("last", False), ("argmax", True)])
def test_captions_are_encoded_at_full_length_if_padding_matters(text_pool_type: str, no_causal_mask: bool) -> None:
    import open_clip

    config = open_clip.get_model_config("ViT-S-32-alt")
    text_cfg = {"width": 16, "heads": 2, "layers": 1, "pool_type": text_pool_type, "no_causal_mask": no_causal_mask}
    torch.manual_seed(0)
    model = open_clip.model.CLIP(8, config["vision_cfg"] | {"width": 64, "layers": 1}, text_cfg)
    open_clip.model.set_model_preprocess_cfg(model, {**vars(open_clip.transform.PreprocessCfg()), "size": 64})
    frozen = Clip(model, "ViT-S-32-alt")
    tokens = frozen.tokenize(["a star", "a large red circle"])
    whole = model.forward_intermediates(text=tokens, text_indices=1, normalize=False, normalize_intermediates=True)
    text = frozen.encode_text(tokens)
    torch.testing.assert_close(text.text_projection, whole["text_features"])
    torch.testing.assert_close(text.text_encodings, whole["text_intermediates"][-1])


def test_an_exclamation_mark_is_a_word_not_padding(loaded: Clip) -> None:
    assert loaded.encode_text(loaded.tokenize(["wow! a star"])).text_mask.sum() == 6


def test_long_captions_are_truncated(loaded: Clip) -> None:
    assert loaded.tokenize(["word " * 500]).shape == (1, loaded.text_length)


def test_f102_lost_tokens_are_counted_whatever_a_tokenizer_makes_of_a_caption(
    loaded: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip, "LONGEST_CAPTION", loaded.text_length + 3)  # as if captions became longer
    captions = ["a " * count for count in (3, loaded.text_length - 1, loaded.text_length + 1, 999)]
    lost = loaded.count_lost(captions, loaded.tokenize(captions))
    assert lost.tolist() == [0, 1, 3, 1001 - loaded.text_length]


def test_clip_never_trains(loaded: Clip) -> None:
    holder = torch.nn.Sequential(loaded)
    holder.train()
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-23", "openai", "Did you mean 'ViT-B-"),
        ("local-dir:/nowhere", None, "open_clip_config.json does not exist"),
        ("ViT-B-32", "/nowhere/weights.pt", "'/nowhere/weights.pt' does not exist"),
        ("ViT-L-14-CLIPA", "/nowhere/weights.pt", "a stack cannot hold a model with a tokenizer of transformers"),
    ],
)
def test_names_are_checked_without_loading(model: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        clip.check_name(model, pretrained)
    clip.check_name("hf-hub:anything/goes", None)
    clip.check_name("ViT-B-32", "openai")


def test_a_model_that_needs_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    clip.check_name("ViT-L-14-CLIPA", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"'ViT-L-14-CLIPA'.*unclip\[interop\]"):
        clip.check_name("ViT-L-14-CLIPA", None)
    with pytest.raises(ConfigError, match=r"'ViT-L-14-CLIPA'.*unclip\[interop\]"):  # also when only loading reveals it
        clip.tokenizer("ViT-L-14-CLIPA")
    clip.check_name("ViT-B-32", "openai")


def write_settings(saved: Path, folder: Path, place: tuple[str, ...], value: object) -> None:
    """Write the settings of a saved CLIP, with another value at one place."""
    configuration = json.loads((saved / "open_clip_config.json").read_text())
    inner = configuration["model_cfg"]
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (folder / "open_clip_config.json").write_text(json.dumps(configuration))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("text_cfg", "hf_tokenizer_name"), "bert-base-uncased", "got 'hf_tokenizer_name', which is not allowed here"),
        (("text_cfg", "hf_model_name"), "roberta-base", "got 'hf_model_name', which is not allowed here"),
        (
            ("text_cfg", "tokenizer_kwargs"),
            {"clean": "canonicalize"},
            "got 'tokenizer_kwargs', which is not allowed here",
        ),
        (("text_cfg", "context_length"), 10**8, "context_length = 100000000, expected int from 1 to"),
        (("text_cfg", "layers"), 10**5, "layers = 100000, expected int from 1 to 512"),
        (("text_cfg", "width"), "wide", "width = 'wide', expected int"),
        (("text_cfg", "act_kwargs"), {"module": "os"}, "got 'module', which is not allowed here"),
        (("vision_cfg", "timm_model_name"), "hf-hub:someone/else", "timm_model_name: got 'hf-hub:someone/else'"),
        (("vision_cfg", "timm_model_pretrained"), True, "timm_model_pretrained = True, expected False"),
        (("custom_text",), "coca", "custom_text = 'coca', expected"),
        (("multimodal_cfg",), {}, "got 'multimodal_cfg', which is not allowed here"),
        (("embed_dim",), None, "embed_dim = None, expected int"),
        (("text_cfg",), [], r"text_cfg: got \[\], expected an object"),
    ],
)
def test_f49_settings_of_a_folder_are_those_of_a_plain_clip(
    saved: Path, tmp_path: Path, place: tuple[str, ...], value: object, message: str
) -> None:
    write_settings(saved, tmp_path, place, value)
    for use in (clip.shape_of, clip.tokenizer, clip.outline, Clip.load):
        with pytest.raises(CheckpointError, match=message):
            use(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("place", "value"),
    [(("text_cfg", "vocab_size"), 2**22), (("text_cfg", "width"), 3 * 2**20), (("embed_dim",), 2**22)],
)
def test_settings_of_more_weights_than_the_file_holds_are_refused_before_the_network_is_built(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[str, ...], value: int
) -> None:
    import open_clip

    write_settings(saved, tmp_path, place, value)
    (tmp_path / "open_clip_model.safetensors").write_bytes((saved / "open_clip_model.safetensors").read_bytes())
    devices = []
    build = open_clip.model.CLIP.__init__

    def spy(*arguments: object, **others: object) -> None:
        devices.append(torch.empty(0).device.type)
        build(*arguments, **others)

    monkeypatch.setattr(open_clip.model.CLIP, "__init__", spy)
    with pytest.raises(
        CheckpointError, match=r"open_clip_model.safetensors: got at most [\d,]+ weights, expected the [\d,]+ of"
    ):
        clip.create(f"local-dir:{tmp_path}", None)
    assert devices == ["meta"]


def test_computed_positions_and_masks_of_a_folder_are_limited(saved: Path, tmp_path: Path) -> None:
    configuration = json.loads((saved / "open_clip_config.json").read_text())
    vision, text = (configuration["model_cfg"][name] for name in ("vision_cfg", "text_cfg"))
    for section, changes, message in [
        (vision, {"pos_embed_type": "sin_cos_2d", "patch_size": 1, "image_size": 16384}, "image_size: got 16384"),
        (text, {"context_length": 5000}, "context_length = 5000, expected int from 1 to 4,096"),
    ]:
        before = dict(section)
        section |= changes
        (tmp_path / "open_clip_config.json").write_text(json.dumps(configuration))
        with pytest.raises(CheckpointError, match=message):
            clip.outline(f"local-dir:{tmp_path}")
        section.clear()
        section |= before


def test_a_folder_without_weights_is_refused_rather_than_random(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_bytes((saved / "open_clip_config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"got the weights none, expected one file \*.safetensors"):
        clip.create(f"local-dir:{tmp_path}", None)


def test_f49_all_architectures_of_open_clip_with_clips_tokenizer_are_allowed() -> None:
    allowed = []
    for name, path in clip.architectures().items():
        settings = json.loads(path.read_text())
        foreign_text = {"hf_tokenizer_name", "hf_model_name", "tokenizer_kwargs"} & settings["text_cfg"].keys()
        if not foreign_text and "multimodal_cfg" not in settings:
            foreign.read(clip.ModelSettings, settings, name)
            allowed.append(name)
    assert len(allowed) > 50 and {"ViT-L-14", "RN50", "EVA02-B-16", "MobileCLIP-S1", "unclip-demo"} <= set(allowed)


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was_here"),)

    weights = tmp_path / "weights.pt"
    weights.write_bytes(pickle.dumps({"model": Evil()}))
    with pytest.raises((CheckpointError, pickle.UnpicklingError)):
        Clip.load(MODEL, str(weights))
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "model.pth", "weights.pt", "model.safetensors"])
def test_a_folder_with_a_pickle_or_two_files_of_weights_is_refused(saved: Path, tmp_path: Path, name: str) -> None:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    check, load = (functools.partial(use, f"local-dir:{tmp_path}", None) for use in (clip.check_name, clip.create))
    check()
    (tmp_path / name).write_bytes(b"PK")
    for use in (check, load):
        with pytest.raises(CheckpointError, match=f"got the weights .*{name}.* pickles are not read.*save_file"):
            use()


def test_an_archive_that_grows_when_it_is_read_is_refused(saved: Path, tmp_path: Path) -> None:
    weights, grown = tmp_path / "weights.pt", tmp_path / "grown.pt"
    torch.save(load_file(saved / "open_clip_model.safetensors"), weights)
    assert clip.create(MODEL, str(weights)).logit_scale.isfinite()
    with zipfile.ZipFile(weights) as stored, zipfile.ZipFile(grown, "w", zipfile.ZIP_DEFLATED) as deflated:
        for entry in stored.infolist():
            deflated.writestr(entry.filename, stored.read(entry))
    with pytest.raises(CheckpointError, match=r"grown.pt: got an archive with compressed or overlapping entries"):
        clip.create(MODEL, str(grown))
    grown.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"grown.pt: cannot be read"):
        clip.create(MODEL, str(grown))


TOWERS = {
    "SigLIP": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    "EVA": {},
    "without projection": {"proj_type": "none"},
}


def custom_text_clip(folder: Path, text: dict[str, object]) -> Clip:
    """Tiny model of open_clip's class CustomTextCLIP, as SigLIP, EVA and MobileCLIP are."""
    import open_clip

    vision = {"image_size": 64, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, **text}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**config)
    open_clip.model.set_model_preprocess_cfg(model, dataclasses.asdict(open_clip.transform.PreprocessCfg(size=64)))
    clip.save_with_config(model, config | {"custom_text": True}, folder)
    return Clip.load(f"local-dir:{folder}")


@pytest.mark.parametrize("tower", TOWERS)
def test_models_with_a_text_tower_of_their_own_give_open_clips_features(tower: str, tmp_path: Path) -> None:
    loaded = custom_text_clip(tmp_path, TOWERS[tower])
    assert type(loaded.model).__name__ == "CustomTextCLIP"
    tokens = loaded.tokenize([" ".join(["star"] * length) for length in (1, 20, 60)])
    text = loaded.encode_text(tokens)
    torch.testing.assert_close(text.text_projection, loaded.model.encode_text(tokens))
    assert text.text_encodings.shape == (3, loaded.text_length, loaded.text_width)
    assert (loaded.embedding_dim, loaded.vocab_size) == (32, 49408)
    whole = loaded.tower.forward_intermediates(tokens, indices=1, normalize_intermediates=True, output_fmt="NLC")
    kept = text.text_mask
    torch.testing.assert_close(text.text_encodings[kept], whole["text_intermediates"][-1][kept])
    images = torch.rand(2, 3, 64, 64)
    expected = torch.nn.functional.normalize(loaded.model.encode_image(images), dim=-1)
    torch.testing.assert_close(loaded.embed_images(images), expected)
    shape = clip.shape_of(f"local-dir:{tmp_path}")
    assert shape == (loaded.embedding_dim, loaded.text_length, loaded.text_width, loaded.vocab_size)


def test_padding_of_other_tokenizers_is_stored_as_zeros_and_encoded_as_itself(tmp_path: Path) -> None:
    class Padding:
        """Tokenizer that pads with 1, as SigLIP's does."""

        pad_token_id = 1

    loaded = custom_text_clip(tmp_path, TOWERS["SigLIP"])
    padded = loaded.tokenize(["a red star"])
    padded[padded == 0] = 1
    clips_own = loaded.tokenizer

    def tokenizer(captions: list[str], context_length: int) -> torch.Tensor:
        tokens: torch.Tensor = clips_own(captions, context_length=context_length)
        return tokens.masked_fill(tokens == 0, 1)

    tokenizer.tokenizer = Padding  # type: ignore[attr-defined]
    loaded.tokenizer = tokenizer
    tokens = loaded.tokenize(["a red star"])
    assert (tokens[0, 5:] == 0).all() and (tokens[0, :5] > 1).all()
    torch.testing.assert_close(loaded.encode_text(tokens).text_projection, loaded.model.encode_text(padded))
    assert loaded.encode_text(tokens).text_mask.sum() == 5


def test_every_name_that_is_accepted_has_a_text_tower_that_can_be_read() -> None:
    import open_clip

    accepted, refused = [], []
    for name in clip.architectures():
        try:
            clip.check_name(name, "tag")
        except ConfigError as error:
            refused.append(name)
            assert "text tower" in str(error)
        else:
            accepted.append(name)
    assert len(accepted) > 130
    assert all("hf_model_name" in open_clip.get_model_config(name)["text_cfg"] for name in refused)
    for name in ("ViT-B-16-SigLIP", "EVA02-B-16", "MobileCLIP-S1", "coca_ViT-B-32"):  # one of each kind
        loaded = Clip.__new__(Clip)
        torch.nn.Module.__init__(loaded)
        loaded.model, loaded.tokenizer = clip.outline(name), None
        tokens = torch.zeros(1, loaded.text_length, dtype=torch.int64, device="meta")
        encodings, projection = loaded._encode_tokens(tokens)
        assert encodings.shape == (1, loaded.text_length, loaded.text_width)
        assert projection.shape == (1, loaded.embedding_dim)


def test_tags_are_checked_and_the_nearest_one_is_named() -> None:
    clip.check_tag("ViT-L-14", "openai")
    with pytest.raises(ConfigError, match=r"no tag 'opanai' of ViT-L-14\. Did you mean 'openai'"):
        clip.check_tag("ViT-L-14", "opanai")
    with pytest.raises(ConfigError, match="open_clip has no weights of it"):
        clip.check_tag(MODEL, "openai")
    for weights in (None, "coca.safetensors"):
        with pytest.raises(ConfigError, match="also writes captions"):
            clip.check_name("coca_ViT-B-32", weights)
