"""Stage `filter`: drop pairs that are useless or not allowed for training; every input row gets a status and a reason.

A filter is a reason and a function that selects the rows to drop. `FILTERS` lists them in order; a row gets the first reason
that applies, and later filters do not see it.
"""

import dataclasses
import functools
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks import generations, ranges, rows, tables
from tasks.captions import count_words, split_words
from tasks.dataflow import exchange, run_all
from tasks.generations import Generation, Layer, Sums
from tasks.index import find_newest, index_files, index_identity, read_index
from tasks.ranges import KeyRange
from tasks.stage import Artifact, Output, Pinning, StageContext, stage
from tasks.untrusted import domains
from tasks.untrusted.normalise import MAX_CAPTION_CHARACTERS
from unclip import files
from unclip.config import fingerprint, nearest, require, to_dict
from unclip.errors import ConfigError, InputError
from unclip.messages import reason_of

LISTS = ("blocked_words", "blocked_domains", "blocked_hashes")
MIN_WORDS_FOR_LANGUAGE = 4  # with fewer words, language identification is unreliable
# Default-ignorable code points: soft hyphens, zero-width spaces and joiners, variation selectors, tags, fillers.
_IGNORABLE = (
    r"[\x{ad}\x{34f}\x{61c}\x{115f}\x{1160}\x{17b4}\x{17b5}\x{180b}-\x{180f}\x{200b}-\x{200f}\x{202a}-\x{202e}"
    r"\x{2060}-\x{206f}\x{3164}\x{fe00}-\x{fe0f}\x{feff}\x{ffa0}\x{fff0}-\x{fff8}\x{1bca0}-\x{1bca3}"
    r"\x{1d173}-\x{1d17a}\x{e0000}-\x{e0fff}]"
)


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    min_side: int = 32
    """Smallest allowed shorter side of the original, in pixels."""
    max_aspect_ratio: float = 3.0
    """Largest allowed ratio of the longer to the shorter side of the original."""
    min_caption_words: int = 2
    """Smallest allowed number of words: those between spaces; characters in scripts without spaces, such as Chinese."""
    max_caption_words: int = 60
    """Largest allowed number of words, counted like `min_caption_words`; CLIP reads about 60."""
    min_caption_characters: int = 1
    """Smallest allowed number of characters, including spaces."""
    max_caption_characters: int = MAX_CAPTION_CHARACTERS
    """Largest allowed number of characters, including spaces."""
    languages: tuple[str, ...] = ()
    """ISO 639 codes of the allowed caption languages, such as "en"; empty allows all. Captions under 4 words pass."""
    max_caption_repeats: int | None = None
    """Largest number of rows that may share a caption, ignoring case and digits; None is unlimited."""
    blocked_words: str | None = None
    """File of forbidden words and phrases, one per line; matches whole words and ignores case."""
    blocked_domains: str | None = None
    """File of domains, one per line; blocks them and all their subdomains. A leading dot blocks a suffix, such as ".io"."""
    blocked_hashes: str | None = None
    """File of image hashes, one per line: the sha256 of the original file, or a perceptual hash (16 hex digits)."""
    digest: str | None = None
    """sha256 of the list files, filled in by the pipeline so that a changed file causes a new run; None skips the check."""

    def __post_init__(self) -> None:
        require(self.min_side >= 1, "min_side", self.min_side, "at least 1")
        require(self.max_aspect_ratio >= 1, "max_aspect_ratio", self.max_aspect_ratio, "at least 1")
        for unit in ("words", "characters"):
            least, most = getattr(self, f"min_caption_{unit}"), getattr(self, f"max_caption_{unit}")
            require(least >= 1, f"min_caption_{unit}", least, "at least 1")
            require(most >= least, f"max_caption_{unit}", most, f"at least min_caption_{unit}")
        for code in self.languages:
            require(re.fullmatch("[a-z]{2,3}", code) is not None, "languages", code, "ISO 639 codes such as 'en'")
        repeats = self.max_caption_repeats
        require(repeats is None or repeats >= 1, "max_caption_repeats", repeats, "at least 1, or none")
        for name in LISTS:
            require(getattr(self, name) != "", name, "", "a file, or none")

    def limits(self) -> dict[str, tuple[float | None, float | None]]:
        """Smallest and largest value that is kept, for each measure with limits."""
        return {
            "shorter_side": (self.min_side, None),
            "aspect_ratio": (None, self.max_aspect_ratio),
            "caption_words": (self.min_caption_words, self.max_caption_words),
            "caption_characters": (self.min_caption_characters, self.max_caption_characters),
        }


@dataclasses.dataclass(frozen=True)
class Filter:
    """A reason to drop rows."""

    reason: str
    """See `tasks.rows`."""
    drops: Callable[[pa.Table, FilterConfig], Any]
    """Function that returns the mask of rows to drop, with null as false; None if the settings turn the filter off."""


def _pin(config: FilterConfig, _: Pinning) -> FilterConfig:
    return dataclasses.replace(config, digest=check_settings(config))


@stage("filter", version=5, pin=_pin)
def filter(context: StageContext, config: FilterConfig, download: Artifact) -> Output:
    """Drop pairs with an unsuitable image size or caption, and pairs on a block list.

    Rows that an earlier refresh has judged are not judged again, unless the settings limit how many share a caption.
    """
    if config.digest and check_settings(config) != config.digest:
        raise InputError("filter: a block list has changed since this run was planned. Run the same command again.")
    facts = download.facts
    pairs, index = facts["pairs"], index_files(facts["images"], facts["index_version"])
    changes = _find_changes(context, config, facts)
    if changes is not None:
        folder = changes.layer.folder
        apply_changes = functools.partial(_filter_changes, pairs, index, changes, config)
        sums, changed = changes.layer.finish(run_all(apply_changes, changes.layer.key_ranges()))
    else:
        folder, key_ranges, changed = f"{context.folder}/selection", ranges.ranges(ranges.range_count(pairs)), 0
        boilerplate = _write_boilerplate(pairs, key_ranges, f"{context.intermediate}/boilerplate", config)
        apply = functools.partial(_filter_range, pairs, index, boilerplate, folder, config)
        sums = Sums.total(run_all(apply, key_ranges))
    counts = sums.counts
    if not counts["rows"][rows.KEPT]:
        raise InputError(
            f"filter: none of {counts['rows']['in']:,} rows is kept ({rows.top_reasons(counts)}). "
            f"Check the list of URLs, or loosen the settings of [filter]."
        )
    context.tracker.metrics(counts["rows"])
    read = {name: facts[name] for name in ("pairs", "images", "index_version")}
    identities = [index_identity(facts["images"])]
    generation = Generation(context.folder, _settings(config), folder, read, sums, changed, identities=identities)
    generations.save(context, generation)
    digest = fingerprint(sums.hex_digest, download.digest)
    passed_on = {name: facts[name] for name in facts if name.startswith(("images", "index")) or name == "pairs"}
    return Output(folder, digest, {**counts, **passed_on, "layers": ranges.layers(folder)[:-1]})


@dataclasses.dataclass(frozen=True)
class _Changes:
    """Layers of the list and files of the index since an earlier generation."""

    layer: Layer
    pairs: Sequence[str]
    index: Sequence[str]


def _settings(config: FilterConfig) -> str:
    return fingerprint(filter.version, to_dict(config))


def _find_changes(context: StageContext, config: FilterConfig, facts: Mapping[str, Any]) -> _Changes | None:
    """Find an earlier selection to continue, and what has changed since; None if there is none, or if much has."""
    if config.max_caption_repeats is not None:  # new rows may change the verdict on all rows with their caption
        return None
    images, found = facts["images"], ranges.layers(facts["pairs"])

    def layers_known(earlier: Generation) -> tuple[int, int] | None:
        pairs, version = earlier.read["pairs"], earlier.read["index_version"]
        is_earlier = pairs in found and earlier.read["images"] == images and version <= facts["index_version"]
        return (found.index(pairs), version) if is_earlier else None

    earlier = generations.find(context.store, "filter", _settings(config), layers_known, [index_identity(images)])
    if earlier is None:
        return None
    pairs = found[found.index(earlier.read["pairs"]) + 1 :]
    known = set(index_files(images, earlier.read["index_version"]))
    index = [uri for uri in index_files(images, facts["index_version"]) if uri not in known]
    uris = [*index, *(uri for folder in pairs for uri in ranges.range_files(folder))]
    if earlier.begins_anew(sum(map(tables.num_rows, uris))):
        return None
    return _Changes(Layer.on(earlier, context, "selection", earlier.read["pairs"]), pairs, index)


def _filter_range(
    pairs: str, index: Sequence[str], boilerplate: str | None, folder: str, config: FilterConfig, key_range: KeyRange
) -> Sums:
    """Write the selection of one range; returns its sums."""
    repeated = (
        None
        if boilerplate is None
        else tables.read_file(ranges.range_uri(boilerplate, key_range))["caption"].combine_chunks()
    )
    images = read_index(index, key_range, _COLUMNS)
    selection = apply_filters(ranges.read_range(pairs, key_range), images, config, repeated)
    ranges.write_range(folder, key_range, selection)
    return Sums.of(selection)


def _filter_changes(
    pairs: str, index: Sequence[str], changes: _Changes, config: FilterConfig, key_range: KeyRange
) -> tuple[Sums, Sums]:
    """Write the selection of the rows of one range that are new in the list or in the index; see `Layer.write`."""
    images = read_index(changes.index, key_range, ["key"])
    listed = ranges.read_layers(changes.pairs, key_range) if changes.pairs else ranges.find_rows(pairs, [])
    others = images["key"].filter(pc.invert(pc.is_in(images["key"], value_set=listed["key"].combine_chunks())))
    known = changes.layer.known(key_range, others)  # the table may have rows of other lists
    listed = pa.concat_tables([listed, ranges.find_rows(pairs, known.to_pylist())]) if len(known) else listed
    kept = pc.unique(listed.filter(pc.equal(listed["status"], rows.KEPT))["key"].combine_chunks())
    images = find_newest(index, changes.index, key_range, kept, _COLUMNS)
    return changes.layer.write(key_range, apply_filters(listed, images, config))


_COLUMNS = ["key", "status", "reason", "original_width", "original_height", "sha256", "phash", "redirect_hosts"]


def check_settings(config: FilterConfig) -> str | None:
    """Check the languages and every line of the list files.

    Returns:
        sha256 of the list files; None if there are none.

    Raises:
        ConfigError: an unsupported language.
        InputError: a list file is missing, empty or damaged; names the line.
    """
    if config.languages:
        _check_languages(config.languages)
    digest, any_list = hashlib.sha256(), False
    for name, parse in (("blocked_words", _phrase), ("blocked_domains", _domain), ("blocked_hashes", _hash)):
        path = getattr(config, name)
        if path is not None:
            any_list = True
            _entries(name, path, parse)
            digest.update(f"{name}\0".encode() + hashlib.sha256(_read(name, path)).digest())
    return digest.hexdigest() if any_list else None


def apply_filters(
    pairs: pa.Table, images: pa.Table, config: FilterConfig, boilerplate: pa.Array | None = None
) -> pa.Table:
    """Apply the filters; returns key, position, status, reason for every row of the list, sorted by key, then position.

    Args:
        pairs: output of ingest: key, position, url, caption, status, reason, expected_sha256.
        images: output of download: key, status, reason, original_width, original_height, sha256, phash, redirect_hosts.
        boilerplate: captions that too many rows share, according to `bare_captions`; None if the settings do not limit them.
    """
    found = images.rename_columns({"status": "image_status", "reason": "image_reason"})
    repeated = pa.nulls(pairs.num_rows, pa.bool_())
    if boilerplate is not None:
        repeated = pc.is_in(bare_captions(pairs["caption"]), value_set=boilerplate)
    table = pairs.append_column("is_boilerplate", repeated).join(found, "key", join_type="left outer")
    table = table.sort_by([("key", "ascending"), ("position", "ascending")])
    not_fetched = pc.and_(pc.equal(table["status"], rows.KEPT), pc.not_equal(table["image_status"], "ok"))
    not_fetched = pc.fill_null(not_fetched, False)
    # The list may have gained a hash after the image was fetched.
    mismatched = pc.and_(pc.equal(table["status"], rows.KEPT), pc.not_equal(table["sha256"], table["expected_sha256"]))
    mismatched = pc.fill_null(mismatched, False)
    status = pc.if_else(pc.or_(not_fetched, mismatched), rows.FAILED, table["status"])
    reason = pc.if_else(not_fetched, table["image_reason"], pc.if_else(mismatched, "hash_mismatch", table["reason"]))

    indices = np.flatnonzero(pc.equal(status, rows.KEPT).to_numpy())
    remaining = table.take(indices)
    verdicts = np.full(table.num_rows, -1)  # index of the filter that drops the row
    for index, each in enumerate(FILTERS):
        to_drop = each.drops(remaining, config)
        if to_drop is not None:
            matched = np.asarray(pc.fill_null(to_drop, False), bool)
            verdicts[indices[matched]] = index
            indices, remaining = indices[~matched], remaining.filter(pa.array(~matched))
    reasons = pa.array([each.reason for each in FILTERS])
    dropped = pa.array(verdicts >= 0)
    status = pc.if_else(dropped, rows.DROPPED, status)
    reason = pc.if_else(dropped, reasons.take(pa.array(verdicts.clip(0))), reason)
    return pa.table({"key": table["key"], "position": table["position"], "status": status, "reason": reason})


def _too_small(table: pa.Table, config: FilterConfig) -> Any:
    return pc.less(pc.min_element_wise(table["original_width"], table["original_height"]), config.min_side)


def _bad_aspect(table: pa.Table, config: FilterConfig) -> Any:
    width, height = (table[name].cast("double") for name in ("original_width", "original_height"))
    ratio = pc.divide(pc.max_element_wise(width, height), pc.min_element_wise(width, height))
    return pc.greater(ratio, config.max_aspect_ratio)


def _caption_too_short(table: pa.Table, config: FilterConfig) -> Any:
    return pc.less(count_words(table["caption"]), config.min_caption_words)


def _caption_too_long(table: pa.Table, config: FilterConfig) -> Any:
    return pc.greater(count_words(table["caption"]), config.max_caption_words)


def _too_few_characters(table: pa.Table, config: FilterConfig) -> Any:
    return pc.less(pc.utf8_length(table["caption"]), config.min_caption_characters)


def _too_many_characters(table: pa.Table, config: FilterConfig) -> Any:
    return pc.greater(pc.utf8_length(table["caption"]), config.max_caption_characters)


def _boilerplate(table: pa.Table, config: FilterConfig) -> Any:
    return None if config.max_caption_repeats is None else table["is_boilerplate"]


def _blocked_word(table: pa.Table, config: FilterConfig) -> Any:
    """Mask of captions that contain a blocked phrase, as sequences of words of letters and digits in their usual form."""
    if config.blocked_words is None:
        return None
    phrases = _entries("blocked_words", config.blocked_words, _phrase)
    words = split_words(_folded(table["caption"]))
    all_words, indices = pc.list_flatten(words), pc.list_parent_indices(words).to_numpy()
    matched = np.zeros(table.num_rows, bool)
    for length in {phrase.count(" ") + 1 for phrase in phrases}:
        starts = max(0, len(all_words) - length + 1)
        runs = [all_words.slice(offset, starts) for offset in range(length)]
        contains_phrase = pc.is_in(pc.binary_join_element_wise(*runs, " "), value_set=pa.array(phrases, pa.string()))
        ends = indices[length - 1 : length - 1 + starts]
        matched[ends[contains_phrase.to_numpy(zero_copy_only=False) & (indices[:starts] == ends)]] = True
    return pa.array(matched)


def _other_language(table: pa.Table, config: FilterConfig) -> Any:
    if not config.languages:
        return None
    long_enough = pc.greater_equal(pc.list_value_length(split_words(table["caption"])), MIN_WORDS_FOR_LANGUAGE)
    captions = pc.if_else(long_enough, table["caption"], None).combine_chunks().dictionary_encode()
    classify = _identifier().classify
    mismatched = [classify(caption)[0] not in config.languages for caption in captions.dictionary.to_pylist()]
    return pa.array(mismatched, pa.bool_()).take(captions.indices)


def _blocked_domain(table: pa.Table, config: FilterConfig) -> Any:
    """Mask of rows with the host of their URL, or one that a redirect led to, on or below a blocked domain."""
    if config.blocked_domains is None:
        return None
    blocked = set(_entries("blocked_domains", config.blocked_domains, _domain))
    authority = pc.struct_field(pc.extract_regex(table["url"], r"^[a-z]+://(?P<host>\[[^\]]*\]|[^/:?#]*)"), "host")
    hosts = authority.combine_chunks().dictionary_encode()
    matched = [_is_below(_ascii_host(host), blocked) for host in hosts.dictionary.to_pylist()]
    is_listed = pa.array(matched, pa.bool_()).take(hosts.indices)
    redirects = table["redirect_hosts"].combine_chunks().dictionary_encode()
    matched = [any(_is_below(host, blocked) for host in each.split()) for each in redirects.dictionary.to_pylist()]
    return pc.or_(is_listed, pa.array(matched, pa.bool_()).take(redirects.indices).fill_null(False))


def _blocked_hash(table: pa.Table, config: FilterConfig) -> Any:
    if config.blocked_hashes is None:
        return None
    hashes = pa.array(_entries("blocked_hashes", config.blocked_hashes, _hash), pa.string())
    return pc.or_(*(pc.is_in(table[name], value_set=hashes) for name in ("sha256", "phash")))


FILTERS = (
    Filter("blocked_hash", _blocked_hash),
    Filter("blocked_domain", _blocked_domain),
    Filter("too_small", _too_small),
    Filter("bad_aspect", _bad_aspect),
    Filter("caption_too_short", _caption_too_short),
    Filter("caption_too_long", _caption_too_long),
    Filter("caption_too_few_characters", _too_few_characters),
    Filter("caption_too_many_characters", _too_many_characters),
    Filter("blocked_word", _blocked_word),
    Filter("boilerplate", _boilerplate),
    Filter("other_language", _other_language),  # last: it takes 40 microseconds per caption
)
"""Filters in order of precedence: first the block lists for images, then the cheap filters."""


def _folded(captions: pa.ChunkedArray) -> pa.ChunkedArray:
    """Captions in NFKC, so without full-width and other variants of letters, and without characters that are not shown."""
    shown = pc.replace_substring_regex(captions, _IGNORABLE, "")
    return pc.replace_substring_regex(pc.utf8_normalize(shown, form="NFKC"), _IGNORABLE, "")


def bare_captions(captions: pa.ChunkedArray) -> pa.ChunkedArray:
    """Captions in lower case, without digits and with single spaces."""
    bare = pc.replace_substring_regex(pc.utf8_lower(captions), r"\pN+", "")
    return pc.fill_null(pc.utf8_trim_whitespace(pc.replace_substring_regex(bare, r"\s+", " ")), "")


def _write_boilerplate(pairs: str, key_ranges: Sequence[KeyRange], folder: str, config: FilterConfig) -> str | None:
    """Write for each key range its captions that more than `max_caption_repeats` rows of the whole list share.

    Counts all rows, kept or not, so that the count of a caption does not change when a link breaks. Captions are counted
    where they are and then by the hash of the caption; then each range gets its own frequent ones back.
    """
    if config.max_caption_repeats is None:
        return None
    count = len(key_ranges)
    totals, frequent = f"{folder}/totals", functools.partial(_write_frequent, folder, config.max_caption_repeats)
    exchange(functools.partial(_captions_by_hash, pairs, count), key_ranges, count, frequent)
    exchange(
        functools.partial(_captions_by_range, totals, count),
        list(range(count)),
        count,
        functools.partial(_write_own, folder, count),
    )
    return folder


def frequent_captions(counted: pa.Table, max_repeats: int) -> pa.Array:
    """Captions that more than `max_repeats` rows have, from a table of caption and rows."""
    totals = counted.group_by("caption").aggregate([("rows", "sum")])
    return totals.filter(pc.greater(totals["rows_sum"], max_repeats))["caption"].combine_chunks()


def count_captions(captions: pa.ChunkedArray) -> pa.Table:
    """Table of the distinct bare captions and the number of their rows."""
    counts = bare_captions(captions).value_counts()
    return pa.table({"caption": counts.field("values"), "rows": counts.field("counts")})


def _captions_by_hash(pairs: str, count: int, key_range: KeyRange) -> list[pa.Table]:
    table = count_captions(ranges.read_range(pairs, key_range, ["key", "caption"])["caption"])
    texts = table["caption"].cast(pa.binary()).to_pylist()
    hashes = np.fromiter((zlib.crc32(text) for text in texts), np.int64, len(texts))
    table = table.append_column("range", pa.repeat(pa.scalar(key_range.index, pa.int32()), table.num_rows))
    return ranges.split(table, hashes % count, count)


def _write_frequent(folder: str, max_repeats: int, output: int, pieces: list[pa.Table]) -> None:
    table = pa.concat_tables(pieces)
    is_frequent = pc.is_in(table["caption"], value_set=frequent_captions(table, max_repeats))
    tables.write_file(f"{folder}/totals/{output:05d}.parquet", table.filter(is_frequent).select(["caption", "range"]))


def _captions_by_range(totals: str, count: int, number: int) -> list[pa.Table]:
    table = tables.read_file(f"{totals}/{number:05d}.parquet")
    return ranges.split(table, table["range"].to_numpy(), count)


def _write_own(folder: str, count: int, output: int, pieces: list[pa.Table]) -> None:
    ranges.write_range(folder, KeyRange(output, count), pa.concat_tables(pieces).select(["caption"]))


@functools.cache
def _identifier() -> Any:
    from py3langid import langid  # loading its model takes a second

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)


def _check_languages(codes: Sequence[str]) -> None:
    known = _identifier().labels
    for code in codes:
        if code not in known:
            raise ConfigError(f"filter.languages: unsupported language {code!r}. {nearest(code, known)}")


def _entries(setting: str, path: str, parse: Callable[[str], str]) -> list[str]:
    """Parsed lines of a list file, without blank lines and lines that begin with "# "."""
    entries, data = [], _read(setting, path)

    def fault(number: int, reason: str) -> InputError:
        return InputError(f"filter.{setting}: {path}, line {number}: {reason}. Correct or remove the line.")

    try:
        lines = files.decode_text(data).split("\n")
    except UnicodeDecodeError as error:
        raise fault(data.count(b"\n", 0, error.start) + 1, "not UTF-8 text") from None
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text and text != "#" and not text.startswith("# "):
            try:
                entries.append(parse(text))
            except ValueError as error:
                raise fault(number, str(error)) from None
    if not entries:
        raise InputError(
            f"filter.{setting}: {path} has no entries. Give a file with one entry per line, or omit the setting."
        )
    return entries


def _read(setting: str, path: str) -> bytes:
    try:
        return files.read(path)
    except FileNotFoundError:
        raise InputError(
            f"filter.{setting}: {path} does not exist. Give a text file with one entry per line."
        ) from None
    except OSError as error:
        reason = reason_of(error)
        raise InputError(f"filter.{setting}: {path} cannot be read: {reason}. Give a text file.") from None


def _phrase(line: str) -> str:
    """Words of a line according to `split_words`, joined by spaces."""
    words = split_words(_folded(pa.chunked_array([[line]]))).to_pylist()[0]
    if not words:
        raise ValueError(f"got {line!r}, expected a word or phrase")
    return " ".join(words)


def _domain(line: str) -> str:
    """Host name in ASCII; with a leading dot, it may be a public suffix such as ".com"."""
    host = _ascii_host(line.removeprefix("."))
    name = r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?"
    if not re.fullmatch(rf"{name}(\.{name})*|\[[0-9a-f:.]+\]", host) or len(host) > 253:
        raise ValueError(f"got {line!r}, expected a domain such as example.org, without a scheme, port or path")
    if not line.startswith(".") and domains.is_public_suffix(host):
        raise ValueError(f"got {line!r}, a suffix that many sites share; write .{host} to block them all")
    return host


def _hash(line: str) -> str:
    if not re.fullmatch("[0-9a-f]{16}|[0-9a-f]{64}", line.lower()):
        raise ValueError(f"got {line!r}, expected 64 hex digits (sha256) or 16 (perceptual hash)")
    return line.lower()


def _ascii_host(host: str) -> str:
    """Host in its canonical spelling; as it is, in lower case, if it is not a host name."""
    try:
        return domains.ascii_host(host)
    except ValueError:
        return host.lower().removesuffix(".")


def _is_below(host: str, domains: set[str]) -> bool:
    """Return True if the host is one of the domains or a subdomain of one."""
    while host not in domains:
        _, dot, host = host.partition(".")
        if not dot:
            return False
    return True
