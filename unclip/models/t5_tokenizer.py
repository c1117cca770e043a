"""T5's tokenizer, from the `tokenizer.json` of a folder or stack: only what published T5s have is read, and built anew.

The package tokenizers would do whatever a file says: rewrite captions with any regular expression, or make them longer at every
step. So the file is data for this module. It may hold SentencePiece's normaliser, spaces as "▁", a Unigram model and an
end-of-sequence token, as T5, T5 v1.1, Flan-T5 and mT5 have.

Source: Kudo & Richardson 2018, "SentencePiece: A simple and language independent subword tokenizer".
"""

import base64
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from unclip import foreign
from unclip.config import require
from unclip.errors import CheckpointError

WHERE = "tokenizer.json"
END = "</s>"
LONGEST_PIECE = 256
"""Characters of a token; SentencePiece's have at most 16."""
LONGEST_REPLACEMENT = 128
"""Bytes by which the normaliser may replace a character; NFKC has at most 33."""
_TEMPLATE = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": END, "type_id": 0}}]


@dataclasses.dataclass(frozen=True)
class _Precompiled:
    type: Literal["Precompiled"]
    precompiled_charsmap: str

    def build(self) -> Any:
        from tokenizers import normalizers

        content = base64.b64decode(self.precompiled_charsmap, validate=True)
        start = 4 + int.from_bytes(
            content[:4], "little"
        )  # a number of bytes, a trie of that size, strings that end with 0
        longest = max(map(len, content[start:].split(b"\0")))
        expected = f"replacements of at most {LONGEST_REPLACEMENT} bytes"
        require(longest <= LONGEST_REPLACEMENT, "precompiled_charsmap", f"{longest} bytes", expected)
        return normalizers.Precompiled(content)


@dataclasses.dataclass(frozen=True)
class _Strip:
    type: Literal["Strip"]
    strip_left: bool = True
    strip_right: bool = True

    def build(self) -> Any:
        from tokenizers import normalizers

        return normalizers.Strip(left=self.strip_left, right=self.strip_right)


@dataclasses.dataclass(frozen=True)
class _Spaces:
    Regex: Literal[" {2,}"]


@dataclasses.dataclass(frozen=True)
class _Replace:
    type: Literal["Replace"]
    pattern: _Spaces
    content: Literal["▁", " "]

    def build(self) -> Any:
        from tokenizers import Regex, normalizers

        return normalizers.Replace(Regex(self.pattern.Regex), self.content)


@dataclasses.dataclass(frozen=True)
class _WhitespaceSplit:
    type: Literal["WhitespaceSplit"]

    def build(self) -> Any:
        from tokenizers import pre_tokenizers

        return pre_tokenizers.WhitespaceSplit()


@dataclasses.dataclass(frozen=True)
class _Metaspace:
    type: Literal["Metaspace"]
    replacement: Literal["▁"] = "▁"
    str_rep: Literal["▁"] = "▁"
    add_prefix_space: Literal[True] = True
    prepend_scheme: Literal["always", "first", "never"] = "always"
    split: bool = True

    def build(self) -> Any:
        from tokenizers import pre_tokenizers

        return pre_tokenizers.Metaspace("▁", prepend_scheme=self.prepend_scheme, split=self.split)


@dataclasses.dataclass(frozen=True)
class _EndToken:
    ids: tuple[int]
    id: Literal["</s>"] = "</s>"
    tokens: tuple[Literal["</s>"]] = ("</s>",)


@dataclasses.dataclass(frozen=True)
class _Template:
    type: Literal["TemplateProcessing"]
    single: Any
    special_tokens: dict[str, _EndToken]
    pair: Any = None
    """Not used."""

    def __post_init__(self) -> None:
        require(self.single == _TEMPLATE, "single", foreign.shorten(self.single), f"A {END}")
        require(END in self.special_tokens, "special_tokens", list(self.special_tokens), END)


@dataclasses.dataclass(frozen=True)
class _Unigram:
    type: Literal["Unigram"]
    vocab: tuple[tuple[str, float], ...]
    unk_id: int
    byte_fallback: bool = False

    def __post_init__(self) -> None:
        longest = max((len(piece) for piece, _ in self.vocab), default=0)
        require(longest <= LONGEST_PIECE, "vocab", f"a token of {longest} characters", f"at most {LONGEST_PIECE}")
        require(0 <= self.unk_id < len(self.vocab), "unk_id", self.unk_id, "the id of a token")

    def build(self) -> Any:
        from tokenizers import models

        return models.Unigram(list(self.vocab), unk_id=self.unk_id, byte_fallback=self.byte_fallback)


@dataclasses.dataclass(frozen=True)
class _AddedToken:
    content: str
    id: int
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False

    def build(self) -> Any:
        from tokenizers import AddedToken

        return AddedToken(**{name: value for name, value in vars(self).items() if name != "id"})


@dataclasses.dataclass(frozen=True)
class _File:
    """Parts of the file that are read: not its padding, truncation and decoder."""

    model: _Unigram
    post_processor: _Template
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    added_tokens: tuple[_AddedToken, ...] = ()


_NORMALISERS = {"Precompiled": _Precompiled, "Strip": _Strip, "Replace": _Replace}
_PRE_TOKENISERS = {"WhitespaceSplit": _WhitespaceSplit, "Metaspace": _Metaspace}


def build_tokenizer(content: bytes, vocab_size: int) -> Any:
    """Build the tokenizer of a file, without padding and truncation.

    Args:
        vocab_size: number of tokens that the network knows.

    Raises:
        CheckpointError: the file is damaged, has parts that no published T5 has, or tokens that the network does not know.
    """
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors

    file = foreign.read(_File, foreign.parse_json(content, WHERE), WHERE, ignore_others=True)
    size = len({piece for piece, _ in file.model.vocab} | {token.content for token in file.added_tokens})
    if size > vocab_size:
        raise CheckpointError(
            f"{WHERE}: got {size:,} tokens, expected at most {vocab_size:,}, the vocabulary of the network. Take both from one "
            "model."
        )
    steps = _steps(file.normalizer, "normalizer", "normalizers", _NORMALISERS)
    splits = _steps(file.pre_tokenizer, "pre_tokenizer", "pretokenizers", _PRE_TOKENISERS)
    with damage_named():
        found = Tokenizer(file.model.build())
        if steps:
            found.normalizer = normalizers.Sequence([step.build() for step in steps])
        if splits:
            found.pre_tokenizer = pre_tokenizers.Sequence([split.build() for split in splits])
        found.add_tokens([token.build() for token in file.added_tokens])
        end, known = file.post_processor.special_tokens[END].ids[0], found.token_to_id(END)
        require(end == known, f"post_processor: {END}", end, f"the id of {END} in the vocabulary, {known}")
        found.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
        largest = max(found.get_vocab().values())
        require(largest < vocab_size, "vocab", f"the id {largest:,}", f"less than {vocab_size:,}, as the network knows")
    return found


def _steps(value: dict[str, Any] | None, name: str, inner: str, kinds: dict[str, type]) -> list[Any]:
    """Steps of a normaliser or pre-tokeniser, of each kind one at most, so that they cannot make a caption longer and longer."""
    where = f"{WHERE}: {name}"
    values = [] if value is None else value.get(inner) if value.get("type") == "Sequence" else [value]
    if not isinstance(values, list) or not all(isinstance(each, dict) for each in values):
        raise CheckpointError(f"{where}: got {inner} = {foreign.shorten(values)}, expected objects.")
    names = [each.get("type") for each in values]
    for kind in names:
        if kind not in kinds or names.count(kind) > 1:
            raise CheckpointError(
                f"{where}: got {foreign.shorten(names)}, expected each of {', '.join(kinds)} once at most, as in the files of "
                "published T5s. Take the tokenizer of one."
            )
    return [foreign.read(kinds[each["type"]], each, where) for each in values]


@contextlib.contextmanager
def damage_named() -> Iterator[None]:
    """Raise what the package tokenizers raises in a `with` block, its panics too, as an error of this library.

    Raises:
        CheckpointError: it raised something.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, MemoryError | CheckpointError):
            raise
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{WHERE}: cannot be used: {str(error).rstrip('.')}. The file is damaged.") from error
