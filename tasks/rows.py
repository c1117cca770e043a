"""Status and reason of a row: one closed vocabulary for all stages that process the list of pairs.

No row disappears: after every stage, rows in = kept + dropped + failed. A failed row could not be obtained; a dropped row
was obtained but is not wanted.
"""

import collections
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any

if typing.TYPE_CHECKING:  # processes that decode images need the reasons, but no tables
    import pyarrow as pa

KEPT, DROPPED, FAILED = "kept", "dropped", "failed"

REASONS: Mapping[str, str] = {
    "no_url": "the row has no URL",
    "bad_url": "not a valid URL: expected http or https with a host and without a password",
    "bad_hash": "the expected hash is not a sha256 of 64 hex digits",
    "bad_quotes": "a quote opens a field and is not closed, or text follows where it closes (CSV, TSV)",
    "bad_row": "not an object with texts (JSON lines), or another number of fields than the header (CSV, TSV)",
    "no_caption": "the row has no caption",
    "duplicate_row": "the same URL with the same caption occurs earlier in the list",
    "no_file": "the local file does not exist or cannot be read",
    "blocked_path": "the local file, or what it links to, is not below ingest.local_root",
    "blocked_address": "the URL or a redirect leads to a non-public network",
    "blocked_port": "the port is not among download.allow_ports",
    "dns_error": "the host has no address",
    "dns_timeout": "the name server did not answer within dns_timeout_seconds",
    "connect_error": "the connection failed or was closed, or the certificate is invalid",
    "timeout": "not received within the time limit for one URL",
    "site_unreachable": "not asked, since too many requests to the site timed out or could not connect (site_seconds)",
    "too_large": "more bytes than max_bytes",
    "redirect_limit": "more redirects than max_redirects",
    "insecure_redirect": "a redirect from https to http",
    "robots_disallowed": "the host's robots.txt forbids it",
    "robots_unreachable": "the host's robots.txt or tdmrep.json cannot be fetched or parsed, which counts as forbidden",
    "short_body": "fewer bytes than the server announced",
    "empty_body": "an empty response",
    "bad_encoding": "a compressed response, although the request forbids it",
    "opted_out": "the server opts the image out of AI use (X-Robots-Tag, TDMRep, Content-Usage, Content-Signal)",
    "fetch_error": "the response is not HTTP, or another error while fetching",
    "not_an_image": "not a JPEG, PNG, WebP, GIF or AVIF",
    "decode_error": "a damaged image",
    "decode_crash": "the image crashed the process that decoded it",
    "decode_timeout": "decoding exceeded the time limit for one image",
    "decode_memory": "decoding exceeded the memory limit for one image",
    "decode_budget": "earlier images of the site took long to decode and have used up site_decode_seconds",
    "too_many_pixels": "more pixels than max_pixels",
    "too_many_scans": "a JPEG of more scans than any camera or program writes, which take long to decode",
    "too_small": "the shorter side has fewer pixels than min_side",
    "bad_aspect": "the aspect ratio exceeds max_aspect_ratio",
    "caption_too_short": "fewer words than min_caption_words",
    "caption_too_long": "more words than max_caption_words",
    "caption_too_few_characters": "fewer characters than min_caption_characters",
    "caption_too_many_characters": "more characters than max_caption_characters",
    "other_language": "the caption is in none of the languages",
    "boilerplate": "more than max_caption_repeats rows have this caption, ignoring case and digits",
    "blocked_word": "the caption contains a word or phrase of blocked_words",
    "blocked_domain": "the URL is on a host of blocked_domains",
    "blocked_hash": "the image is in blocked_hashes",
    "duplicate_image": "the same bytes as a kept image",
    "near_duplicate": "looks like a kept image",
    "hash_mismatch": "the sha256 differs from the one in the list",
    "content_changed": "the image has changed since the row was first fetched",
    "semantic_duplicate": "the CLIP embedding is close to that of a kept image",
    "clip_score_low": "the CLIP score of image and caption is below min_clip_score",
    "clip_score_high": "the CLIP score is above max_clip_score, for example because the image shows the caption as text",
    "taken_down": "removed on request (unclip takedown)",
}
"""Reason -> description. There are also `http_<code>`: the server answered with that status; and `<name>_low`,
`<name>_high`: the probe of that name scored below its minimum or above its maximum."""

DUPLICATES = ("duplicate_row", "duplicate_image", "near_duplicate", "semantic_duplicate")
"""Reasons of rows that are dropped as copies of other rows."""


class RowFault(Exception):
    """Raised for a row that cannot be used; never ends a stage."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def is_reason(reason: str) -> bool:
    return reason in REASONS or re.fullmatch(r"http_\d{3}|[a-z0-9_]+_(low|high)", reason) is not None


def meaning(reason: str) -> str:
    """Description of a reason."""
    if reason.startswith("http_"):
        return f"the server answered with status {reason.removeprefix('http_')}"
    name, _, bound = reason.rpartition("_")
    fallback = f"the probe {name} scored {'below its minimum' if bound == 'low' else 'above its maximum'}"
    return REASONS.get(reason, fallback)


def drop(selection: "pa.Table", reasons: "pa.Table") -> "pa.Table":
    """Drop the kept rows of some keys from a selection.

    Args:
        selection: key, position, status, reason and optionally split, which is null for rows that are not kept.
        reasons: key, reason to drop it; each key once.
    """
    import pyarrow.compute as pc

    table = selection.join(reasons.select(["key", "reason"]).rename_columns(["key", "new_reason"]), "key")
    table = table.sort_by([("key", "ascending"), ("position", "ascending")])
    is_dropped = pc.and_(pc.is_valid(table.column("new_reason")), pc.equal(table.column("status"), KEPT))
    changed = {
        "status": pc.if_else(is_dropped, DROPPED, table["status"]),
        "reason": pc.if_else(is_dropped, table["new_reason"], table["reason"]),
    }
    if "split" in table.column_names:
        changed["split"] = pc.if_else(is_dropped, None, table["split"])
    return table.from_arrays(
        [changed.get(name, table[name]) for name in selection.column_names], selection.column_names
    )


def undrop(selection: "pa.Table", reasons: Iterable[str]) -> "pa.Table":
    """Rows as they were before those with some reasons were dropped.

    Args:
        selection: status, reason and maybe others.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    was_dropped = pc.is_in(selection["reason"], value_set=pa.array(list(reasons), pa.string()))
    changed = {
        "status": pc.if_else(was_dropped, KEPT, selection["status"]),
        "reason": pc.if_else(was_dropped, pa.scalar(None, pa.string()), selection["reason"]),
    }
    names = selection.column_names
    return selection.from_arrays([changed.get(name, selection[name]) for name in names], names)


def count(table: "pa.Table") -> dict[str, Any]:
    """Count the statuses and reasons of a table, as a stage's facts: {"rows": {...}, "reasons": {...}}."""
    statuses = _tally(table.column("status"))
    rows = {"in": table.num_rows} | {status: statuses.pop(status, 0) for status in (KEPT, DROPPED, FAILED)}
    assert not statuses, f"statuses outside the vocabulary: {statuses}"
    reasons = _tally(table.column("reason"))
    unexplained = reasons.pop(None, 0)
    assert unexplained == rows[KEPT], f"{unexplained} rows without a reason, but {rows[KEPT]} kept"
    assert all(map(is_reason, reasons)), f"reasons outside the vocabulary: {sorted(reasons)}"
    return {"rows": rows, "reasons": reasons}


def add_counts(counts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up the results of `count` for parts of a table."""
    rows: collections.Counter[str] = collections.Counter(dict.fromkeys(("in", KEPT, DROPPED, FAILED), 0))
    reasons: collections.Counter[str] = collections.Counter()
    for part in counts:
        rows.update(part["rows"])
        reasons.update(part["reasons"])
    return {"rows": dict(rows), "reasons": dict(reasons)}


def subtract_counts(counts: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of a table without some of its rows."""
    rows, reasons = (collections.Counter(counts[name]) for name in ("rows", "reasons"))
    rows.subtract(others["rows"])
    reasons.subtract(others["reasons"])
    assert min([*rows.values(), *reasons.values()]) >= 0, f"{others} is not part of {counts}"
    return {"rows": dict(rows), "reasons": dict(+reasons)}


def top_reasons(facts: Mapping[str, Any], limit: int = 5) -> str:
    """Most frequent reasons, for a message: `no_caption 12, http_404 3`."""
    return ", ".join(f"{reason} {number:,}" for reason, number in by_frequency(facts["reasons"])[:limit])


def by_frequency(reasons: Mapping[str, int]) -> list[tuple[str, int]]:
    """Reasons and their rows, the most frequent first; facts that were stored have lost this order."""
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))


def _tally(column: "pa.ChunkedArray") -> dict[Any, int]:
    return {item["values"]: item["counts"] for item in column.value_counts().to_pylist()}


def fates(table: "pa.Table") -> "pa.Table":
    """Key and fate, "kept" or the reason, of each key; a key with any kept row is kept, else its first row counts.

    Args:
        table: key, status, reason, sorted by key.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    kept = pc.equal(table["status"], KEPT)
    fate = pc.if_else(kept, KEPT, table["reason"].cast(pa.string())).combine_chunks()
    keys = table["key"].combine_chunks()
    changes = pc.not_equal(keys.slice(1), keys.slice(0, max(0, len(keys) - 1))).to_numpy(zero_copy_only=False)
    starts = np.flatnonzero(np.append(len(keys) > 0, changes))
    is_kept = pa.array(np.maximum.reduceat(kept.to_numpy(), starts) if len(starts) else [], pa.bool_())
    return pa.table({"key": keys.take(starts), "fate": pc.if_else(is_kept, KEPT, fate.take(starts))})
