"""Words of captions: counted in scripts with and without spaces."""

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tasks.captions import count_words, split_words
from tasks.report_summary import Rows
from tasks.stages.filter import FilterConfig
from tests.tasks.stages.test_filter import verdicts

UNSPACED = {
    "一只猫坐在沙发上": 8, "红色的汽车停在路边。": 9, "公園で遊ぶ犬の写真": 9, "テーブルの上のコーヒー": 11, "แมวนั่งอยู่บนโซฟา": 17,
    "ໝານອນ": 5, "ឆ្កែ": 4, "ခွေး": 4, "བཀྲ་ཤིས": 6, "ㄇㄠ": 2,
}  # fmt: skip
"""Captions with the number of their words."""
SPACED = {
    "a cat's red-white tail - closeup": 6,
    "IMG_1234.jpg": 1,
    "": 0,
    "고양이 두 마리": 3,
    "x\u3000y": 2,
    "круг": 1,
}


def test_f96_captions_without_spaces_are_counted_as_block_lists_count_them() -> None:
    captions = pa.chunked_array([[*UNSPACED, "iPhone 手机壳, red"], list(SPACED)])
    split = pc.list_value_length(split_words(captions)).to_pylist()
    assert count_words(captions).to_pylist() == [*UNSPACED.values(), 5, *SPACED.values()]
    assert split[: len(UNSPACED) + 1] == [*UNSPACED.values(), 5]
    assert verdicts(FilterConfig(), [*UNSPACED]) == [None] * len(UNSPACED)
    assert verdicts(FilterConfig(), ["猫", "猫" * 60, "猫" * 61]) == ["caption_too_short", None, "caption_too_long"]


@pytest.mark.parametrize("captions", [UNSPACED, SPACED])
def test_f96_the_report_shows_the_counts_of_the_filter(captions: dict[str, int]) -> None:
    pairs = pa.table({"key": [f"{number:03}" for number in range(len(captions))], "caption": list(captions)})
    keys = pairs.select(["key"]).slice(0, 0)
    images = keys.append_column("original_width", pa.array([], pa.int32()))
    images = images.append_column("original_height", pa.array([], pa.int32()))
    measured = Rows(keys, pairs, images, keys).measured
    assert measured["caption_words"][1].tolist() == [captions[caption] for caption in captions if caption]
    assert measured["caption_characters"][1].tolist() == [len(caption) for caption in captions if caption]
