"""Filters of the stage `filter`: rows that each drops and keeps, and its settings."""

import dataclasses
import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.config import load
from pipelines.prepare import prepare
from tasks import ranges, rows, tables
from tasks.index import update_index
from tasks.stage import Artifact, Call, Failure, Run, execute
from tasks.stages.filter import (
    FILTERS,
    FilterConfig,
    apply_filters,
    check_settings,
    count_captions,
    filter,
    frequent_captions,
)
from tasks.store import Store
from tasks.tracking import Tracker
from unclip.errors import ConfigError, InputError

FINE = "a small red circle on a blue ground"
SHA, PHASH = "ab" * 32, "0123456789abcdef"


def verdicts(config: FilterConfig, captions: list[str] | None = None, **columns: list[Any]) -> list[str | None]:
    """Reason of each row; the rows are valid except for the given captions or columns."""
    (count,) = {len(values) for values in [*columns.values(), *([captions] if captions is not None else [])]}
    keys = [f"k{index:06}" for index in range(count)]
    pairs = {"position": range(count), "key": keys, "url": ["https://example.org/a.jpg"] * count}
    pairs |= {"caption": captions or [FINE] * count, "status": ["kept"] * count, "reason": pa.nulls(count, pa.string())}
    pairs |= {"expected_sha256": pa.nulls(count, pa.string())}
    images = {"key": keys, "status": ["ok"] * count, "reason": pa.nulls(count, pa.string())}
    images |= {"original_width": [64] * count, "original_height": [64] * count}
    images |= {"sha256": ["00" * 32] * count, "phash": pa.nulls(count, pa.string())}
    images |= {"redirect_hosts": pa.nulls(count, pa.string())}
    for name, values in columns.items():
        (pairs if name in pairs else images)[name] = values
    repeats, counted = config.max_caption_repeats, count_captions(pa.chunked_array([pairs["caption"]], pa.string()))
    boilerplate = None if repeats is None else frequent_captions(counted, repeats)
    selection = apply_filters(pa.table(pairs), pa.table(images), config, boilerplate)
    facts = rows.count(selection)
    assert facts["rows"]["in"] == count == facts["rows"]["kept"] + facts["rows"]["dropped"] + facts["rows"]["failed"]
    return selection["reason"].to_pylist()


def test_t9_a_hash_added_to_the_list_later_is_checked() -> None:
    expected = [None, SHA, "00" * 32]
    assert verdicts(FilterConfig(), expected_sha256=expected) == [None, "hash_mismatch", None]


def dropped(config: FilterConfig, captions: list[str]) -> set[str]:
    """Captions that are dropped when all rows are filtered together."""
    return {caption for caption, reason in zip(captions, verdicts(config, captions), strict=True) if reason}


def listed(folder: Path, *lines: str) -> str:
    path = folder / "list.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_every_filter_has_its_own_reason() -> None:
    reasons = [each.reason for each in FILTERS]
    assert len(set(reasons)) == len(reasons) and all(map(rows.is_reason, reasons))


def test_the_defaults_disable_the_optional_filters() -> None:
    captions = [FINE] * 50 + ["круг", "一只小狗在公园里奔跑", "x y"]
    assert verdicts(FilterConfig(), captions) == [None] * 50 + ["caption_too_short", None, None]


def test_caption_characters() -> None:
    config = FilterConfig(min_caption_words=1, min_caption_characters=3, max_caption_characters=6)
    assert verdicts(config, ["ab", "a b", "äöü", "🎈🎈", "abc de", "abc def"]) == [
        "caption_too_few_characters", None, None, "caption_too_few_characters", None, "caption_too_many_characters",
    ]  # fmt: skip


def test_languages_are_identified_from_four_words_on() -> None:
    english, german, russian = (
        FINE,
        "Ein kleiner Hund läuft über die grüne Wiese",
        "Маленькая собака бежит по зелёному лугу",
    )
    chinese, short = "一只 小狗在公园里奔跑", "ein kleiner Hund"
    captions = [english, german, russian, chinese, short, english]
    assert dropped(FilterConfig(languages=("en",)), captions) == {german, russian, chinese}
    assert dropped(FilterConfig(languages=("de", "ru")), captions) == {english, chinese}
    assert dropped(FilterConfig(languages=("zh",)), captions) == {english, german, russian}
    assert verdicts(FilterConfig(languages=("de",)), captions)[::5] == ["other_language", "other_language"]
    assert verdicts(FilterConfig(languages=("en",)), [short]) == [None]


def test_the_language_model_is_loaded_only_when_needed() -> None:
    script = "import sys, tasks.stages.filter; print({'py3langid', 'tldextract'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "set()\n"
    )


def test_captions_shared_by_too_many_rows_are_boilerplate() -> None:
    photos = ["Photo 1 of 12", "photo 2 of 12", "PHOTO 33 OF 120", "photo of"]
    other = [FINE, FINE, "photo of me"]
    assert dropped(FilterConfig(max_caption_repeats=3), photos + other) == set(photos)
    assert dropped(FilterConfig(max_caption_repeats=4), photos + other) == set()
    assert dropped(FilterConfig(max_caption_repeats=1), photos + other) == {*photos, FINE}


def test_boilerplate_counts_all_rows_kept_or_not() -> None:
    captions, config = [FINE, FINE, FINE], FilterConfig(max_caption_repeats=2)
    assert verdicts(config, captions, original_width=[64, 8, 8], original_height=[64, 8, 8]) == [
        "boilerplate", "too_small", "too_small",
    ]  # fmt: skip


def test_blocked_words_match_whole_words_in_any_case(tmp_path: Path) -> None:
    path = listed(
        tmp_path, "# what we do not want", "", "Stock", "getty images", "größe", "don't", "小狗", "  c++ code "
    )
    bad = {
        "a stock photo", "a photo, STOCK!", "stock", "(stock) of cars", "from Getty  Images now", "GETTY-IMAGES 2020",
        "in GRÖSSE xl größe", "I DON'T know", "公园里的小狗在奔跑", "some C code",
    }  # fmt: skip
    good = {
        "a stocking photo", "livestock on grass", "getty museum images", "images getty", "großes haus", "don of t",
        "小 猫狗", "code c", "ends with getty", "images starts",
    }  # fmt: skip
    config = FilterConfig(min_caption_words=1, blocked_words=path)
    captions = sorted(bad | good)  # "ends with getty" and "images starts" must not join across rows
    assert dropped(config, captions) == bad
    assert dropped(config, ["ends with getty", "images starts"]) == set()
    assert verdicts(config, ["a stock photo", "!!! ..."]) == ["blocked_word", None]
    assert verdicts(config, ["...", "!"]) == [None, None]


def test_a_phrase_longer_than_any_caption_matches_nothing(tmp_path: Path) -> None:
    config = FilterConfig(blocked_words=listed(tmp_path, "one two three four five six seven"))
    assert verdicts(config, ["one two", "three four five"]) == [None, None]


def test_blocked_domains_block_all_subdomains(tmp_path: Path) -> None:
    path = listed(
        tmp_path, "example.co.uk", "cdn.Example.org", ".io", "bücher.example", "192.0.2.7", "# done", "[2001:db8::1]"
    )
    expected = {
        "https://example.co.uk/a.jpg": True,
        "https://img.example.co.uk:8080/a.jpg": True,
        "https://a.b.example.co.uk./a.jpg": True,
        "https://badexample.co.uk/a.jpg": False,
        "https://co.uk/a.jpg": False,
        "https://other.co.uk/example.co.uk": False,
        "https://other.co.uk?example.co.uk": False,
        "https://cdn.example.org/a.jpg": True,
        "https://x.cdn.example.org/a.jpg": True,
        "https://example.org/a.jpg": False,
        "https://anything.io/a.jpg": True,
        "https://io.example.com/a.jpg": False,
        "https://bücher.example/a.jpg": True,
        "https://www.xn--bcher-kva.example/a.jpg": True,
        "http://192.0.2.7/a.jpg": True,
        "http://192.0.2.70/a.jpg": False,
        "http://[2001:db8::1]:80/a.jpg": True,
        "http://[2001:db8::2]/a.jpg": False,
    }
    found = verdicts(FilterConfig(blocked_domains=path), url=list(expected))
    assert dict(zip(expected, found, strict=True)) == {
        url: "blocked_domain" if blocked else None for url, blocked in expected.items()
    }


def test_f58_blocked_domains_see_every_host_that_a_redirect_led_to(tmp_path: Path) -> None:
    hosts = [
        "fine.example",
        "cdn.blocked.example",
        "fine.example blocked.example other.example",
        None,
        "notblocked.example",
    ]
    config = FilterConfig(blocked_domains=listed(tmp_path, "Blocked.example"))
    assert verdicts(config, redirect_hosts=hosts) == [None, "blocked_domain", "blocked_domain", None, None]
    assert verdicts(config, redirect_hosts=[None, None, "a"]) == [None] * 3
    assert verdicts(config, [FINE, FINE]) == [None, None]


def test_f59_blocked_domains_are_compared_in_one_spelling(tmp_path: Path) -> None:
    config = FilterConfig(blocked_domains=listed(tmp_path, "straße.example", "ｅvil。example"))
    urls = [
        "http://xn--strae-oqa.example/",
        "http://STRAẞE.example./",
        "http://strasse.example/",
        "http://ｅvil.example/",
    ]
    assert verdicts(config, url=urls) == ["blocked_domain", "blocked_domain", None, "blocked_domain"]


def test_f59_letters_of_other_widths_and_invisible_ones_do_not_hide_a_blocked_word(tmp_path: Path) -> None:
    config = FilterConfig(min_caption_words=1, blocked_words=listed(tmp_path, "stock photo", "café", "ＷＩＤＥ"))
    hidden = [
        "a st\u200bock pho\u00adto", "a \uff53\uff54\uff4f\uff43\uff4b photo", "a sto\u2060ck \ufeffphoto", "a s\u034ftock photo",
        "a 𝐬𝐭𝐨𝐜𝐤 photo", "a st\ufe0fock photo\U000e0041", "ca\u200bfe\u200b\u0301 noir", "a wide cat", "s\u3164tock photo",
    ]  # fmt: skip
    assert verdicts(config, hidden) == ["blocked_word"] * len(hidden)
    assert verdicts(config, ["a stockphoto", "a stock\u3000cat", "سگ می\u200cدود در پارک", FINE]) == [None] * 4


def test_t11_blocked_hashes_are_sha256_or_perceptual_hashes(tmp_path: Path) -> None:
    config = FilterConfig(blocked_hashes=listed(tmp_path, SHA.upper(), PHASH, "ff" * 8))
    other = "cd" * 32
    reasons = verdicts(config, sha256=[SHA, other, other, other], phash=[None, PHASH, None, "0" * 16])
    assert reasons == ["blocked_hash", "blocked_hash", None, None]
    # What must not be used is counted as such, whatever else is wrong with it.
    assert verdicts(config, sha256=[SHA], original_width=[1]) == ["blocked_hash"]


def test_filters_accept_empty_tables(tmp_path: Path) -> None:
    paths = {"blocked_words": "stock photo", "blocked_domains": "example.net", "blocked_hashes": SHA}
    for name, line in paths.items():
        (tmp_path / name).write_text(line)
    lists = {name: str(tmp_path / name) for name in paths}
    config = FilterConfig(**lists, languages=("en",), max_caption_repeats=1)  # type: ignore[arg-type]
    assert verdicts(config, sha256=[SHA, SHA]) == ["blocked_hash", "blocked_hash"]
    assert verdicts(config, original_width=[1, 2]) == ["too_small", "too_small"]


@pytest.mark.parametrize(
    ("setting", "content", "message"),
    [
        ("blocked_words", b"fine\n\n...\n", r"list.txt, line 3: got '\.\.\.', expected a word or phrase"),
        ("blocked_words", b"fine\nbl\xf6d\n", r"list.txt, line 2: not UTF-8 text"),
        ("blocked_domains", b"a.org\nhttps://b.org\n", r"line 2: got 'https://b.org', expected a domain such as"),
        ("blocked_domains", b"a.org/x", r"line 1: got 'a.org/x', expected a domain"),
        ("blocked_domains", b"a b.org", r"line 1: .* expected a domain"),
        ("blocked_domains", b"co.uk", r"line 1: got 'co.uk', a suffix that many sites share; write .co.uk to block"),
        ("blocked_hashes", b"0123456789abcdeg", r"line 1: .* expected 64 hex digits \(sha256\) or 16"),
        ("blocked_hashes", SHA.encode()[:-1], r"line 1: .* expected 64 hex digits"),
        ("blocked_words", b"", r"list.txt has no entries"),
        ("blocked_hashes", b"# only\n# comments\n", r"list.txt has no entries"),
    ],
)
def test_a_damaged_list_is_named_with_its_line(tmp_path: Path, setting: str, content: bytes, message: str) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"filter\.{setting}: .*{message}"):
        check_settings(FilterConfig(**{setting: str(path)}))  # type: ignore[arg-type]


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none.txt", "does not exist"), (tmp_path, "cannot be read")):
        with pytest.raises(InputError, match=rf"filter\.blocked_hashes: {path} {message}"):
            check_settings(FilterConfig(blocked_hashes=str(path)))


def test_lists_may_have_a_byte_order_mark_and_windows_line_endings(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfstock\r\ngetty images\r\n")
    config = FilterConfig(blocked_words=str(path))
    assert verdicts(config, ["a stock photo", "by getty images", FINE]) == ["blocked_word", "blocked_word", None]


def test_f101_lists_may_be_utf_16(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("stock\n", "utf-16")
    assert dropped(FilterConfig(blocked_words=f"{tmp_path}/list.txt"), ["a stock photo", FINE]) == {"a stock photo"}


@pytest.mark.parametrize(
    "settings",
    [
        {"min_caption_characters": 0},
        {"min_caption_characters": 9, "max_caption_characters": 8},
        {"max_caption_repeats": 0},
        {"languages": ("English",)},
        {"languages": ("EN",)},
        {"blocked_words": ""},
    ],
)
def test_invalid_settings_raise(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(reversed(settings))):
        FilterConfig(**settings)


def test_an_unsupported_language_raises() -> None:
    with pytest.raises(ConfigError, match=r"filter.languages: unsupported language 'xx'\."):
        check_settings(FilterConfig(languages=("en", "xx")))
    assert check_settings(FilterConfig(languages=("en", "de", "zh"))) is None


def test_the_content_of_lists_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    words = Path(listed(tmp_path, "stock"))
    Path(tmp_path, "pairs.csv").write_text("url,caption\nhttps://example.org/a.jpg,a red circle\n")
    assignments = [f"ingest.urls={tmp_path}/pairs.csv", f"filter.blocked_words={words}", 'filter.languages=["en"]']

    def prepared() -> FilterConfig:
        return prepare(load("text_to_image", None, assignments, str(tmp_path / "storage"))).filter

    def fingerprint(config: FilterConfig) -> str:
        return filter.fingerprint(config, [], Store(str(tmp_path)))

    first = prepared()
    assert first.digest and prepared() == first
    words.write_text("stock\nshutter\n")
    second = prepared()
    assert fingerprint(second) != fingerprint(first)
    assert prepare(load("text_to_image", None, assignments[:1], str(tmp_path / "storage"))).filter == FilterConfig()
    # The same lines in a different kind of list are different settings.
    as_domains = FilterConfig(blocked_domains=listed(tmp_path, "example.org"))
    as_words = FilterConfig(blocked_words=as_domains.blocked_domains)
    assert check_settings(as_domains) != check_settings(as_words)


def test_a_list_that_changed_after_planning_fails_the_stage(tmp_path: Path) -> None:
    config = FilterConfig(blocked_words=listed(tmp_path, "stock"))
    config = dataclasses.replace(config, digest=check_settings(config))
    listed(tmp_path, "other")
    run = Run("r1", "test", str(tmp_path), Tracker("", ""), "0")
    result = execute(Call(filter, config), run, [Artifact("download", "f", "", "d", {}, 0.0)])
    assert isinstance(result, Failure) and "a block list has changed since this run was planned" in result.message


def test_the_stage_reads_the_columns_that_its_filters_need(tmp_path: Path) -> None:
    """The stage reads all the columns that the filters need from its parents' tables."""
    from tasks.stages.download import IMAGES
    from tasks.stages.ingest import PAIRS

    keys = [f"{index:032x}" for index in range(3)]
    pairs = [
        {"position": i, "key": key, "url": f"https://h{i}.org/", "caption": FINE, "status": "kept"}
        for i, key in enumerate(keys)
    ]
    images = [{"key": key, "status": "ok", "original_width": 64, "original_height": 64, "sha256": key} for key in keys]
    images[1]["sha256"] = SHA
    folder, table_uri = f"{tmp_path}/pairs", f"{tmp_path}/images/recipe"
    ranges.write_range(folder, ranges.KeyRange(0, 1), pa.Table.from_pylist(pairs, schema=PAIRS))
    part = tables.write_part(table_uri, "part", pa.Table.from_pylist(images, schema=IMAGES))
    version = update_index(table_uri, tables.append_files(table_uri, [part], IMAGES))
    hashes, domains = tmp_path / "hashes.txt", tmp_path / "domains.txt"
    hashes.write_text(SHA)
    domains.write_text("h2.org")
    config = FilterConfig(
        blocked_hashes=str(hashes), blocked_domains=str(domains), languages=("en",), max_caption_repeats=3
    )
    facts = {"pairs": folder, "images": table_uri, "images_version": 0, "index_version": version}
    run = Run("r1", "test", str(tmp_path), Tracker("", ""), "0")
    result = execute(Call(filter, config), run, [Artifact("download", "f", "", "d", facts, 0.0)])
    assert isinstance(result, Artifact), result
    assert ranges.read_all(result.uri)["reason"].to_pylist() == [None, "blocked_hash", "blocked_domain"]
    assert result.facts["rows"] == {"in": 3, "kept": 1, "dropped": 2, "failed": 0}


def test_rows_in_several_chunks_get_the_same_verdicts(tmp_path: Path) -> None:
    """A list in several chunks, as read from Parquet, gives every row the same verdict as alone."""
    captions = [f"{FINE} {'stock' if index % 3 == 0 else 'x'} {index}" for index in range(3000)]
    config = FilterConfig(blocked_words=listed(tmp_path, "stock"), blocked_domains=None)
    path = str(tmp_path / "pairs.parquet")
    keys = [f"{index:05}" for index in range(3000)]
    nulls = pa.nulls(3000, pa.string())
    table = {"position": range(3000), "key": keys, "caption": captions, "status": ["kept"] * 3000, "reason": nulls}
    table["expected_sha256"] = nulls
    tables.write_file(path, pa.table(table))
    images = {"key": keys, "status": ["ok"] * 3000, "reason": nulls, "sha256": nulls}
    images |= {"original_width": [64] * 3000, "original_height": [64] * 3000}
    pairs = pa.concat_tables([tables.read_file(path).slice(0, 1700), tables.read_file(path).slice(1700)])
    reasons = apply_filters(pairs, pa.table(images), config)["reason"].to_pylist()
    assert reasons == ["blocked_word" if index % 3 == 0 else None for index in range(3000)]


@pytest.mark.usefixtures("cluster")
def test_the_selection_is_the_same_in_any_number_of_ranges(tmp_path: Path) -> None:
    """Captions that are frequent over all ranges are boilerplate, and so is each of 10,000 rows with one caption."""
    from tasks.stages.download import IMAGES
    from tasks.stages.ingest import PAIRS

    rng = np.random.default_rng(0)
    numbers = range(12_000)
    keys = sorted(hashlib.md5(str(number).encode()).hexdigest() for number in numbers)
    captions = [
        FINE if number % 6 else f"photo of place {chr(97 + rng.integers(26)) * 2} {number}" for number in numbers
    ]
    pairs = [
        {"position": i, "key": key, "url": "https://h.org/", "caption": captions[i], "status": "kept"}
        for i, key in enumerate(keys)
    ]
    sides = rng.integers(16, 64, (len(keys), 2)).tolist()
    images = [
        {"key": key, "status": "ok", "original_width": width, "original_height": height, "sha256": key}
        for key, (width, height) in zip(keys, sides, strict=True)
    ]
    listed, table_uri = pa.Table.from_pylist(pairs, schema=PAIRS), f"{tmp_path}/images/recipe"
    part = tables.write_part(table_uri, "part", pa.Table.from_pylist(images, schema=IMAGES))
    version = update_index(table_uri, tables.append_files(table_uri, [part], IMAGES))
    selections, digests, counts = [], set(), []
    for count in (1, 4, 16):
        folder = f"{tmp_path}/pairs-{count}"
        for key_range, part in zip(ranges.ranges(count), ranges.split_by_key(listed, count), strict=True):
            ranges.write_range(folder, key_range, part)
        facts = {"pairs": folder, "images": table_uri, "images_version": 0, "index_version": version}
        run = Run(f"r{count}", "test", f"{tmp_path}/{count}", Tracker("", ""), "0")
        config = FilterConfig(max_caption_repeats=75)
        result = execute(Call(filter, config), run, [Artifact("download", "f", "", "d", facts, 0.0)])
        assert isinstance(result, Artifact), result
        selections.append(ranges.read_all(result.uri))
        digests.add(result.digest)
        counts.append(result.facts["reasons"])
    assert selections[0].equals(selections[1]) and selections[0].equals(selections[2])
    assert len(digests) == 1 and counts[0] == counts[1] == counts[2]
    reasons = dict(zip(keys, selections[0]["reason"].to_pylist(), strict=True))
    bare = Counter("photo of place " + caption[15:17] for caption in captions if caption != FINE)
    for key, caption, (width, height) in zip(keys, captions, sides, strict=True):
        is_frequent = caption == FINE or bare["photo of place " + caption[15:17]] > 75
        aspect = max(width, height) / min(width, height)
        expected = "too_small" if min(width, height) < 32 else "bad_aspect" if aspect > 3 else None
        assert reasons[key] == (expected or ("boilerplate" if is_frequent else None))
    assert 5 < sum(count > 75 for count in bare.values()) < 25, "some captions are frequent, others are not"
