"""T5 encoders from folders of transformers: states, truncation, and files that are refused."""

import json
import sys
from pathlib import Path

import pytest
import torch

from unclip.errors import CheckpointError, ConfigError
from unclip.interop import t5
from unclip.models.t5 import T5TextEncoder
from unclip.systems.text_encoder import load_t5, save_t5

CAPTIONS = ["a red circle", "circle", "a red a red a red a red"]
WORDS = ["<pad>", "</s>", "<unk>", "▁a", "▁red", "▁circle"]


def write(folder: Path, kind: str = "gated-gelu", whole: bool = True) -> Path:
    """Write a tiny T5 with random weights, or its encoder alone, and a tokenizer of `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = (T5ForConditionalGeneration if whole else T5EncoderModel)(T5Config(**sizes, feed_forward_proj=kind))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in WORDS], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize(("kind", "whole"), [("gated-gelu", True), ("relu", False)])
def test_states_are_those_of_transformers(tmp_path: Path, kind: str, whole: bool) -> None:
    from transformers import T5EncoderModel

    folder = write(tmp_path, kind, whole)
    encoder, reference = t5.read(folder, max_length=6), T5EncoderModel.from_pretrained(folder).eval()
    found = encoder.encode(CAPTIONS)
    ids = [[3, 4, 5, 1], [5, 1], [3, 4, 3, 4, 3, 1]]  # the last is cut and keeps its end
    assert found.length.tolist() == [4, 2, 6] and encoder.text_width == found.states.shape[2] == 16
    for row, tokens in enumerate(ids):
        with torch.no_grad():
            states = reference(input_ids=torch.tensor([tokens])).last_hidden_state[0]
            exact = encoder.encoder(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        torch.testing.assert_close(exact, states, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.states[row, : len(tokens)], states, rtol=1e-3, atol=1e-3)  # half precision
        assert not found.states[row, len(tokens) :].any()


def test_a_saved_encoder_is_loaded_without_its_folder(folder: Path, tmp_path: Path) -> None:
    encoder = t5.read(folder, max_length=6)
    digest = save_t5(f"{tmp_path}/saved", encoder)
    loaded = load_t5(f"{tmp_path}/saved")
    assert not loaded.train().training and not any(each.requires_grad for each in loaded.parameters())
    for one, other in zip(loaded.encode(CAPTIONS), encoder.encode(CAPTIONS), strict=True):
        assert torch.equal(one, other)
    assert save_t5(f"{tmp_path}/again", t5.read(folder, max_length=6)) == digest
    with pytest.raises(CheckpointError, match="kind 't5', expected imagen"):
        from unclip.systems.imagen.generator import IMAGEN
        from unclip.systems.system import load_model

        load_model(f"{tmp_path}/saved", (IMAGEN,))


def copied(folder: Path, into: Path) -> Path:
    for path in folder.iterdir():
        (into / path.name).write_bytes(path.read_bytes())
    return into


def with_setting(path: Path, name: str, value: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model_type", "bert", "model_type = 'bert', expected 't5'"),
        ("feed_forward_proj", "os.system", "feed_forward_proj = 'os.system'"),
        ("d_model", 2**30, "d_model = 1073741824"),
        ("num_layers", 400, "num_layers = 400 for"),
        ("num_layers", 1, "the weights do not fit config.json"),
        ("d_ff", 31, "the weights do not fit config.json"),
        ("vocab_size", 41, r"token embeddings \(40, 16\), expected \(41, 16\)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    folder: Path, tmp_path: Path, name: str, value: object, message: str
) -> None:
    with_setting(copied(folder, tmp_path) / "config.json", name, value)
    with pytest.raises(CheckpointError, match=message):
        t5.read(tmp_path, 6)


def test_settings_that_name_code_are_not_read(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path)
    with_setting(tmp_path / "config.json", "auto_map", {"AutoModel": "evil.Model"})
    (tmp_path / "evil.py").write_text("raise SystemExit(3)")
    assert isinstance(t5.read(tmp_path, 6), T5TextEncoder)


def test_damaged_and_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path)
    for name, content, message in (
        ("tokenizer.json", b'{"model": 3}', "tokenizer.json: model: got 3, expected an object"),
        ("model.safetensors", b"PK pickle", "model.safetensors: cannot be read.*pickles are not read"),
        ("config.json", b"[]", "config.json: got a list"),
    ):
        original = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            t5.read(tmp_path, 6)
        (tmp_path / name).unlink()
        with pytest.raises(CheckpointError, match=name):
            t5.read(tmp_path, 6)
        (tmp_path / name).write_bytes(original)
    with_setting(tmp_path / "config.json", "vocab_size", 40)
    assert t5.read(tmp_path, 6).encode(["a"]).length.tolist() == [2]


def test_a_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] += [[f"word{number}", -1.0] for number in range(6, 60)]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="got 60 tokens, expected at most 40"):
        t5.read(tmp_path, 6)


def test_without_transformers_the_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"unclip\[interop\]"):
        t5.read(folder, 6)
