"""States of text encoders: their form in a table, and the reader of a U-Net."""

import pytest
import torch

from tests.unclip.systems.tiny_stacks import tiny_clip
from unclip.errors import InputError, NonFiniteError
from unclip.models.clip import LENGTH_STEP
from unclip.models.text_states import ClipTextEncoder, StatesReader, TextStates, from_bytes, no_text, to_bytes

WIDTH = 6


def text(*lengths: int, longest: int = 7) -> TextStates:
    generator = torch.Generator().manual_seed(0)
    return TextStates(torch.randn(len(lengths), longest, WIDTH, generator=generator), torch.tensor(lengths))


def test_states_survive_a_table_without_padding() -> None:
    states = text(3, 7, 1)
    stored = to_bytes(states)
    assert [len(each) for each in stored] == [2 * WIDTH * length for length in (3, 7, 1)]
    found = from_bytes(stored, [3, 7, 1])
    assert found.states.shape == (3, LENGTH_STEP, WIDTH) and found.length.tolist() == [3, 7, 1]
    for row, length in enumerate((3, 7, 1)):
        assert torch.equal(found.states[row, :length], states.states[row, :length].half().float())
        assert not found.states[row, length:].any()


def test_states_that_half_precision_cannot_hold_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="half precision"):
        to_bytes(TextStates(torch.full((1, 1, WIDTH), 1e6), torch.tensor([1])))


@pytest.mark.parametrize(
    ("rows", "lengths"), [([b"1234"], [3]), ([b"1234", b"12345678"], [1, 1]), ([b""], [1]), ([b"12"], [0])]
)
def test_bytes_that_are_no_states_are_refused(rows: list[bytes], lengths: list[int]) -> None:
    with pytest.raises(InputError, match=f"text_states: got {len(rows[-1])} bytes for {lengths[-1]} tokens"):
        from_bytes(rows, lengths)


def test_clip_gives_the_states_of_its_text_tower() -> None:
    clip = tiny_clip()
    captions = ["a red circle", "a star", "a large green square at the left of everything else there is"]
    found, features = ClipTextEncoder(clip).encode(captions), clip.encode_text(clip.tokenize(captions))
    assert found.length.tolist() == [5, 4, 10]  # with start and end
    for row, length in enumerate(found.length.tolist()):
        assert torch.equal(found.states[row, :length], features.text_encodings[row, :length].half().float())
    assert ClipTextEncoder(clip).text_width == found.states.shape[2]


def reader() -> StatesReader:
    torch.manual_seed(0)
    return StatesReader(WIDTH, 8, 10, num_heads=2).eval()


def test_the_reader_gives_context_and_a_vector_that_ignore_padding() -> None:
    read, states = reader(), text(3, 7)
    found = read(states)
    assert found.tokens.shape == (2, 7, 8) and found.vector.shape == (2, 10)
    assert found.mask.sum(dim=1).tolist() == [3, 7]
    longer = TextStates(torch.nn.functional.pad(states.states, (0, 0, 0, 4), value=9.0), states.length)
    again = read(longer)
    torch.testing.assert_close(again.vector, found.vector)
    torch.testing.assert_close(again.tokens[:, :7], found.tokens)
    changed = TextStates(states.states.clone(), states.length)
    changed.states[:, 0] += torch.arange(WIDTH)
    assert not torch.allclose(read(changed).vector, found.vector)


def test_the_scale_of_the_states_does_not_count() -> None:
    """The states are normed before anything reads them (section 2.4)."""
    read, states = reader(), text(3, 7)
    scaled = TextStates(30 * states.states, states.length)
    torch.testing.assert_close(read(scaled).vector, read(states).vector, rtol=1e-3, atol=1e-4)


def test_a_dropped_caption_is_one_token_of_zeros() -> None:
    read, states = reader(), text(3, 7)
    drop = torch.tensor([True, False])
    found, none = read(states, drop), read(no_text(states))
    assert found.mask.sum(dim=1).tolist() == [1, 7]
    torch.testing.assert_close(found.vector[0], none.vector[0])
    torch.testing.assert_close(found.tokens[0, 0], none.tokens[0, 0])
    torch.testing.assert_close(found.vector[1], read(states).vector[1])
    dropped = read(text(5, 2), torch.tensor([True, True]))
    torch.testing.assert_close(dropped.vector, none.vector)
