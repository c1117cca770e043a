import hashlib
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tasks import ranges, rows
from tasks.find_duplicates import KeepCaptions
from tasks.near_duplicates import near_duplicates
from tasks.stage import Artifact, Call, Failure, Run, execute
from tasks.stages.dedup import DedupConfig, dedup, splits
from tasks.stages.filter import FilterConfig, apply_filters, filter
from tasks.tracking import Tracker
from tests.tasks.datasets import write_folder, write_images
from unclip.errors import ConfigError

CAPTION = "a red circle"


def pairs_of(*captions: str) -> pa.Table:
    """One kept pair per caption, then a dropped row with the key of a kept row, and a failed row."""
    listed = [(f"k{i}", caption, "kept", None) for i, caption in enumerate(captions)]
    listed += [("k0", captions[0], "dropped", "duplicate_row"), ("k1", "", "failed", "no_url")]
    columns = zip(*((position, *row) for position, row in enumerate(listed)), strict=True)
    table = pa.table(dict(zip(("position", "key", "caption", "status", "reason"), map(list, columns), strict=True)))
    table = table.append_column("expected_sha256", pa.nulls(table.num_rows, pa.string()))
    return table.sort_by([("key", "ascending"), ("position", "ascending")])


def hex_key(name: str) -> str:
    return f"{int(name[1:]):032x}"


def images_of(*sizes: tuple[int, int] | None) -> pa.Table:
    return pa.table(
        {
            "key": [f"k{i}" for i in range(len(sizes))],
            "sha256": [f"{i:064x}" for i in range(len(sizes))],
            "status": ["ok" if size else "failed" for size in sizes],
            "reason": pa.array([None if size else "http_404" for size in sizes], pa.string()),
            "original_width": pa.array([size and size[0] for size in sizes], pa.int32()),
            "original_height": pa.array([size and size[1] for size in sizes], pa.int32()),
        }
    )


def reasons(selection: pa.Table) -> dict[int, str | None]:
    facts = rows.count(selection)
    assert (
        facts["rows"]["in"] == selection.num_rows == sum(facts["rows"][name] for name in ("kept", "dropped", "failed"))
    )
    return dict(zip(selection["position"].to_pylist(), selection["reason"].to_pylist(), strict=True))


def test_filter_gives_every_row_its_first_reason() -> None:
    captions = (CAPTION, CAPTION, CAPTION, CAPTION, "red", ("word " * 61).strip(), ("word " * 60).strip(), CAPTION)
    sizes = ((32, 96), None, (31, 400), (300, 99), (64, 64), (64, 64), (64, 64), (64, 64))
    selection = apply_filters(pairs_of(*captions), images_of(*sizes), FilterConfig())
    assert reasons(selection) == {
        0: None, 1: "http_404", 2: "too_small", 3: "bad_aspect", 4: "caption_too_short", 5: "caption_too_long", 6: None,
        7: None, 8: "duplicate_row", 9: "no_url",
    }  # fmt: skip
    assert selection.schema.names == ["key", "position", "status", "reason"]
    assert rows.count(selection)["rows"] == {"in": 10, "kept": 3, "dropped": 5, "failed": 2}


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((1, 1), "too_small"),
        ((3, 3), "too_small"),
        ((1, 10_000), "too_small"),
        ((32, 97), "bad_aspect"),
        ((32, 96), None),
    ],
)
def test_f21_unusable_sizes_are_dropped(size: tuple[int, int], reason: str | None) -> None:
    for size_or_rotated in (size, size[::-1]):
        selection = apply_filters(pairs_of(CAPTION, CAPTION), images_of(size_or_rotated, (64, 64)), FilterConfig())
        assert reasons(selection)[0] == reason and reasons(selection)[1] is None


def test_f26_filter_that_keeps_nothing_fails_with_the_reasons(tmp_path: Path) -> None:
    images = [{**row, "key": hex_key(row["key"])} for row in images_of((8, 8), None).to_pylist()]
    pairs = pairs_of(CAPTION, CAPTION)
    pairs = pairs.set_column(1, "key", pa.array([hex_key(key) for key in pairs["key"].to_pylist()]))
    facts = {**write_images(str(tmp_path), images), "pairs": write_folder(f"{tmp_path}/pairs", pairs)}
    run = Run("r1", "test", str(tmp_path), Tracker("", ""), "0")
    result = execute(Call(filter, FilterConfig()), run, [Artifact("download", "f", "", "d", facts, 0.0)])
    assert isinstance(result, Failure)
    assert "none of 4 rows is kept (duplicate_row 1, http_404 1, no_url 1, too_small 1)" in result.message


def deduplicate(
    folder: Path, hashes: Mapping[str, tuple[str | None, ...]], distance: int, order: int = 0
) -> dict[str, str | None]:
    """Reasons after the stage `dedup`, by name; hashes are sha256, phash and, if it is known, colour."""
    names = list(hashes)
    random.Random(order).shuffle(names)
    keys = {name: f"{ord(name):02x}" * 16 for name in names}
    images = []
    for name in names:
        sha256, phash, colour = (*hashes[name], None)[:3]
        digest = hashlib.sha256(str(sha256).encode()).hexdigest()
        images.append(
            {"key": keys[name], "url": name, "status": "ok", "sha256": digest, "phash": phash, "colour": colour}
        )
    root = str(folder / f"{distance}-{order}")
    facts = {**write_images(root, images), "images_digest": "i", "pairs": ""}
    listed: dict[str, Any] = {"key": [*keys.values(), keys["a"]], "position": range(len(keys) + 1)}
    listed |= {"status": ["kept"] * len(keys) + ["dropped"], "reason": [None] * len(keys) + ["duplicate_row"]}
    selection = write_folder(
        f"{root}/filtered", pa.table(listed).sort_by([("key", "ascending"), ("position", "ascending")])
    )
    run = Run("r1", "test", root, Tracker("", ""), "0")
    result = execute(Call(dedup, DedupConfig(distance)), run, [Artifact("filter", "f", selection, "d", facts, 0.0)])
    assert isinstance(result, Artifact), result
    found = ranges.read_all(result.uri)
    assert reasons(found)[len(keys)] == "duplicate_row"
    by_key = {row["key"]: row["reason"] for row in found.to_pylist() if row["position"] < len(keys)}
    return {name: by_key[keys[name]] for name in names}


HASHES = {
    "a": ("s1", "00000000000000ff"),
    "b": ("s1", "00000000000000ff"),  # the same bytes as a
    "c": ("s2", "00000000000000ff"),  # looks the same
    "d": ("s3", "80000000000000fe"),  # two bits away
    "e": ("s4", "ffffffff00000000"),
    "f": ("s5", None),  # of one colour
    "g": ("s6", None),  # of one colour, other bytes
    "h": ("s5", None),  # the same bytes as f
}


@pytest.mark.parametrize("order", range(3))
def test_dedup_keeps_the_smallest_key_in_any_order(tmp_path: Path, order: int) -> None:
    exact = {"b": "duplicate_image", "h": "duplicate_image"}
    unique = dict.fromkeys("acdefg")
    assert deduplicate(tmp_path, HASHES, -1, order) == unique | exact
    assert deduplicate(tmp_path, HASHES, 0, order) == unique | exact | {"c": "near_duplicate"}
    assert deduplicate(tmp_path, HASHES, 1, order) == unique | exact | {"c": "near_duplicate"}
    assert deduplicate(tmp_path, HASHES, 2, order) == unique | exact | {"c": "near_duplicate", "d": "near_duplicate"}


def test_twins_of_another_colour_are_kept(tmp_path: Path) -> None:
    shape = "00000000000000ff"
    arrows = {
        "a": ("s1", shape, "e0e0f8"),  # blue on a light background
        "b": ("s2", shape, "f8ede8"),  # pink
        "c": ("s3", shape, "e1dff4"),  # the first again, within the tolerance
        "d": ("s4", "00000000000000fe", "f5ede8"),  # one bit from the second, in its colour
        "e": ("s5", shape, "e8e0f8"),  # two cells of red from the first
        "f": ("s6", shape, None),  # from before colours were stored
    }
    unique = dict.fromkeys("abde")
    twins = {"c": "near_duplicate", "f": "near_duplicate"}
    assert deduplicate(tmp_path, arrows, 0) == unique | twins
    assert deduplicate(tmp_path, arrows, 1) == unique | twins | {"d": "near_duplicate"}
    unknown = {**arrows, "0": ("s7", shape, None)}  # agrees with all
    assert deduplicate(tmp_path / "unknown", unknown, 0) == {"0": None, "d": None} | dict.fromkeys(
        "abcef", "near_duplicate"
    )


@pytest.mark.parametrize("distance", range(8))
def test_near_duplicates_equal_a_brute_force_search(distance: int) -> None:
    rng, count = random.Random(distance), 2000 if distance in (3, 5, 7) else 300  # many are searched by bands
    centres = [rng.getrandbits(64) for _ in range(40)]
    hashes = [
        rng.choice(centres) ^ sum(1 << bit for bit in rng.sample(range(64), rng.randrange(10))) for _ in range(count)
    ]
    expected = {j for j in range(len(hashes)) if any((hashes[i] ^ hashes[j]).bit_count() <= distance for i in range(j))}
    found = near_duplicates(np.array(hashes, np.uint64), distance)
    assert set(np.flatnonzero(found).tolist()) == expected
    for few in ([], [1]):
        assert not near_duplicates(np.array(few, np.uint64), distance).any()


def test_invalid_settings_raise() -> None:
    for distance in (-2, 8):
        with pytest.raises(ConfigError, match="phash_distance"):
            DedupConfig(distance)
    for settings in ({"min_side": 0}, {"max_aspect_ratio": 0.5}, {"min_caption_words": 9, "max_caption_words": 8}):
        with pytest.raises(ConfigError):
            FilterConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_ranges", [1, 4])
@pytest.mark.parametrize(("captions", "num_kept"), [("url", 200), ("image", 300), ("one", 40)])
def test_f97_all_captions_of_an_image_are_kept_on_one_side_of_the_split(
    tmp_path: Path, captions: KeepCaptions, num_kept: int, num_ranges: int
) -> None:
    """40 images of 5 captions, of which 20 have 5 more at another URL."""
    pairs = [(image, f"/{image}") for image in range(40) for _ in range(5)]
    pairs += [(image, f"/{image}-copy") for image in range(20) for _ in range(5)]
    keys = [hashlib.sha256(f"{captions}{number}".encode()).hexdigest()[:32] for number in range(len(pairs))]
    digests = [hashlib.sha256(str(image).encode()).hexdigest() for image, _ in pairs]
    phashes = [f"{1 << image:016x}" for image, _ in pairs]
    rows_of = zip(keys, pairs, digests, phashes, strict=True)
    images = [
        {"key": key, "url": url, "status": "ok", "sha256": digest, "phash": phash, "colour": f"{6 * image:02x}0000"}
        for key, (image, url), digest, phash in rows_of
    ]
    facts = {**write_images(str(tmp_path), images), "images_digest": "i", "pairs": ""}
    listed = {"key": keys, "position": range(300), "status": ["kept"] * 300, "reason": pa.nulls(300, pa.string())}
    selection = write_folder(f"{tmp_path}/filtered", pa.table(listed), num_ranges)
    config = DedupConfig(0, captions, holdout=0.5)
    run = Run("r1", "test", str(tmp_path), Tracker("", ""), "0")
    result = execute(Call(dedup, config), run, [Artifact("filter", "f", selection, "d", facts, 0.0)])
    assert isinstance(result, Artifact), result
    rows_found = {row["key"]: row for row in ranges.read_all(result.uri).to_pylist()}
    kept = {key: image for key, (image, _) in zip(keys, pairs, strict=True) if rows_found[key]["status"] == "kept"}
    assert len(kept) == num_kept == result.facts["rows"]["kept"] and result.facts["rows"]["in"] == 300
    assert result.facts["other_captions"] == num_kept - 40
    splits_of = {image: {rows_found[key]["split"] for key in kept if kept[key] == image} for image in range(40)}
    assert sorted(map(len, splits_of.values())) == [1] * 40 and len(set().union(*splits_of.values())) == 2
    urls = {image: {pairs[keys.index(key)][1] for key in kept if kept[key] == image} for image in range(40)}
    assert captions == "image" or max(map(len, urls.values())) == 1, "of several URLs, one is kept"


def test_a_row_never_changes_its_split() -> None:
    keys = [f"{index * 2**32 // 1000:08x}" for index in range(1000)]
    status = ["kept" if index % 10 else "dropped" for index in range(1000)]

    def splits_of(count: int, holdout: float) -> list[str | None]:
        return splits(pa.table({"key": keys[:count], "status": status[:count]}), holdout).to_pylist()

    assert splits_of(1000, 0.1)[:500] == splits_of(500, 0.1)  # a longer list moves no row
    counts = {split: splits_of(1000, 0.1).count(split) for split in ("train", "holdout", None)}
    assert counts == {"train": 810, "holdout": 90, None: 100}
    assert {a for a, b in zip(splits_of(1000, 0.2), splits_of(1000, 0.1), strict=True) if b == "holdout"} == {"holdout"}
