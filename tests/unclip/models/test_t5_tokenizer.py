"""Tokenizers of T5: files like those of published T5s are read as their own library reads them, and others refused."""

import base64
import copy
import json
import struct
from typing import Any

import pytest
import torch

from unclip.errors import CheckpointError
from unclip.models.t5 import T5Settings, T5TextEncoder
from unclip.models.t5_tokenizer import LONGEST_REPLACEMENT, build_tokenizer

PIECES = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁star", "st", "ar", "a", "s", "t", "r", "e", "d", "<extra_id_0>"]
CAPTIONS = ["a star", "  a   star  ", "starred </s> a<extra_id_0>", "", "äA<pad>", "a A star AA"]
VOCAB_SIZE = 20


def charsmap(replacement: bytes, target: int = 0) -> str:
    """SentencePiece's map of characters, as in files: it replaces "A" by the string that begins at a place of the strings."""
    trie = [0] * 512  # double array: the unit of a byte is at the byte, that of its value at another 256
    trie[ord("A")] = 256 << 10 | 1 << 8 | ord("A")
    trie[256 ^ ord("A")] = 1 << 31 | target
    content = struct.pack("<I512I", 4 * len(trie), *trie) + replacement + b"\0"
    return base64.b64encode(content).decode()


def precompiled(replacement: bytes, target: int = 0) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": charsmap(replacement, target)}


SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
}
FILE: dict[str, Any] = {
    "version": "1.0",
    "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
    "padding": None,
    "added_tokens": [
        {"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | kind
        for number, name in ((0, "<pad>"), (1, "</s>"), (2, "<unk>"), (14, "<extra_id_0>"))
        for kind in ({"special": True},)
    ],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [precompiled(b"star"), {"type": "Strip", "strip_left": False, "strip_right": True}, SPACES],
    },
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, METASPACE]},
    "post_processor": TEMPLATE,
    "decoder": METASPACE,
    "model": {
        "type": "Unigram",
        "unk_id": 2,
        "vocab": [[piece, -float(number)] for number, piece in enumerate(PIECES)],
        "byte_fallback": False,
    },
}


def changed(**parts: Any) -> dict[str, Any]:
    return copy.deepcopy(FILE) | parts


def with_model(**settings: Any) -> dict[str, Any]:
    return changed(model=FILE["model"] | settings)


def with_template(**settings: Any) -> dict[str, Any]:
    return changed(post_processor=TEMPLATE | settings)


def build(file: dict[str, Any]) -> Any:
    return build_tokenizer(json.dumps(file).encode(), VOCAB_SIZE)


def encoder_of(file: dict[str, Any], max_length: int = 16) -> T5TextEncoder:
    content = json.dumps(file).encode()
    settings = T5Settings(vocab_size=VOCAB_SIZE, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5TextEncoder(settings, len(content), max_length)
    encoder.tokenizer_file = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return encoder


OLD_METASPACE = {"type": "Metaspace", "replacement": "▁", "str_rep": "▁", "add_prefix_space": True}


@pytest.mark.parametrize(
    "file",
    [
        FILE,
        changed(normalizer=None, added_tokens=[]),
        changed(normalizer=precompiled(b"st")),
        changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, OLD_METASPACE]}),
        changed(pre_tokenizer=OLD_METASPACE, normalizer=SPACES | {"content": " "}),
        with_model(vocab=FILE["model"]["vocab"][:10], byte_fallback=True),
    ],
)
def test_files_like_those_of_published_t5s_give_the_tokens_of_their_own_library(file: dict[str, Any]) -> None:
    from tokenizers import Tokenizer

    reference, found = Tokenizer.from_str(json.dumps(file)), build(file)
    reference.no_truncation()
    expected = [each.ids for each in reference.encode_batch(CAPTIONS)]
    assert [each.ids for each in found.encode_batch(CAPTIONS)] == expected
    assert expected[0][-1] == 1 and len(set(map(tuple, expected))) > 3


def test_a_map_of_characters_is_applied() -> None:
    assert build(FILE).encode("A").ids == build(FILE).encode("star").ids == [5, 1]


TEN_TIMES = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            changed(normalizer={"type": "Sequence", "normalizers": [TEN_TIMES] * 6}),
            r"normalizer: got \['Replace', 'Replace'",
        ),
        (
            changed(normalizer={"type": "Sequence", "normalizers": [precompiled(b"AA")] * 2}),
            "each of Precompiled, Strip",
        ),
        (changed(normalizer=TEN_TIMES), "normalizer: pattern: got 'String', which is not allowed"),
        (
            changed(normalizer=SPACES | {"pattern": {"Regex": "(a+)+$"}}),
            r"got Regex = '\(a\+\)\+\$', expected ' \{2,\}'",
        ),
        (changed(normalizer=SPACES | {"content": "a" * 9}), "content = 'aaaaaaaaa', expected '▁' or ' '"),
        (changed(normalizer=precompiled(b"a" * (LONGEST_REPLACEMENT + 1))), "precompiled_charsmap: got '129 bytes'"),
        (changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "?"}), "tokenizer.json: cannot be used"),
        (
            changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
            "tokenizer.json: cannot be used",
        ),
        (changed(normalizer={"type": "Lowercase"}), r"normalizer: got \['Lowercase'\], expected each of"),
        (
            changed(normalizer={"type": "Sequence", "normalizers": 3}),
            "normalizer: got normalizers = 3, expected objects",
        ),
        (changed(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}}), r"pre_tokenizer: got \['Split'\]"),
        (
            with_template(single=TEMPLATE["single"][:1] * 3 + TEMPLATE["single"][1:] * 40),
            "single: got .*expected A </s>",
        ),
        (with_template(special_tokens={"</s>": {"ids": [1] * 40}}), "ids = .*expected a list of 1"),
        (with_template(special_tokens={"</s>": {"ids": [10**8]}}), "</s>: got 100000000, expected the id of </s>"),
        (with_template(special_tokens={}), "special_tokens"),
        (changed(post_processor=None), "post_processor: got None, expected an object"),
        (with_model(type="WordLevel"), "type = 'WordLevel', expected 'Unigram'"),
        (with_model(unk_id=15), "unk_id: got 15"),
        (with_model(vocab=[["<unk>", 0.0], ["a" * 300, 0.0], ["</s>", 0.0]]), "a token of 300 characters"),
        (with_model(vocab=[[f"{number}", 0.0] for number in range(30)]), "got 34 tokens, expected at most 20"),
        (with_model(vocab=[["<pad>", 0.0], ["</s>", 0.0], *[["<unk>", 0.0]] * 30]), "vocab: got 'the id 32'"),
        (
            changed(added_tokens=[{"id": 15 + n, "content": f"<{n}>"} for n in range(9)]),
            "got 24 tokens, expected at most 20",
        ),
    ],
)
def test_files_that_no_published_t5_has_are_refused(file: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        build(file)
    assert str(caught.value).startswith("tokenizer.json")


def test_a_panic_of_the_tokenizer_is_an_error_that_names_the_file() -> None:
    encoder = encoder_of(changed(normalizer=precompiled(b"star", target=2**20)))
    assert encoder.encode(["a star"]).length.tolist() == [3]
    with pytest.raises(CheckpointError, match=r"tokenizer.json: cannot be used: .*The file is damaged"):
        encoder.encode(["a star A"])


def test_captions_are_cut_to_the_longest_length_and_keep_their_end() -> None:
    encoder = encoder_of(FILE, max_length=4)
    assert encoder.encode(["a " * 40, "a", ""]).length.tolist() == [4, 2, 1]
    assert encoder.tokenizer.encode("a " * 40).ids == [4, 4, 4, 1]
