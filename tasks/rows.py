"""What became of a row: its status and the reason, one closed vocabulary for all stages that handle the list of pairs.

No row disappears: after every stage, rows in = kept + dropped + failed. "Failed" is what could not be had, "dropped" what
was had and is not wanted.
"""

import re
import typing
from collections.abc import Mapping
from typing import Any

if typing.TYPE_CHECKING:  # the processes that decode pictures know the reasons and need no tables
    import pyarrow as pa

KEPT, DROPPED, FAILED = "kept", "dropped", "failed"

REASONS: Mapping[str, str] = {
    "no_url": "the row has no URL",
    "bad_url": "not a URL that can be fetched: http or https with a host, without a password",
    "bad_hash": "the expected hash is no sha256 of 64 hex digits",
    "no_caption": "the row has no caption",
    "duplicate_row": "the same URL with the same caption is on the list before",
    "blocked_address": "the URL, or where it redirects, is on a network that is not public",
    "dns_error": "the host has no address",
    "connect_error": "no connection, or the server or its certificate broke it off",
    "timeout": "not there within the time for one URL",
    "too_large": "more bytes than max_bytes",
    "redirect_limit": "more redirects than max_redirects",
    "insecure_redirect": "a redirect from https to http",
    "robots_disallowed": "the host's robots.txt forbids it",
    "robots_unreachable": "the host's robots.txt cannot be had or read, which counts as forbidden",
    "short_body": "fewer bytes than the server announced",
    "empty_body": "no bytes",
    "bad_encoding": "compressed for the way, though the request forbids it",
    "opted_out": "the server asks not to use the picture for AI (X-Robots-Tag, TDM-Reservation, Content-Usage, Content-Signal)",
    "fetch_error": "an answer that is not HTTP, or another failure while fetching",
    "not_an_image": "not a JPEG, PNG, WebP or GIF",
    "decode_error": "a damaged picture",
    "decode_crash": "the process that decoded the picture died of it",
    "decode_timeout": "decoding took more than the time for one picture",
    "decode_memory": "decoding took more than the memory for one picture",
    "too_many_pixels": "more pixels than max_pixels",
    "too_small": "a side shorter than min_side",
    "bad_aspect": "one side longer than max_aspect_ratio times the other",
    "caption_too_short": "fewer words than min_caption_words",
    "caption_too_long": "more words than max_caption_words",
    "caption_too_few_characters": "fewer characters than min_caption_characters",
    "caption_too_many_characters": "more characters than max_caption_characters",
    "other_language": "the caption is in none of the languages",
    "boilerplate": "more than max_caption_repeats rows have this caption, but for case and digits",
    "blocked_word": "the caption has a word or phrase of blocked_words",
    "blocked_domain": "the URL is on a host of blocked_domains",
    "blocked_hash": "the picture is on blocked_hashes",
    "duplicate_image": "the same bytes as a picture that is kept",
    "near_duplicate": "looks like a picture that is kept",
    "hash_mismatch": "not the picture whose sha256 the list gives",
    "content_changed": "not the picture that was there when the row was first fetched",
    "semantic_duplicate": "CLIP sees the same as in a picture that is kept",
    "clip_score_low": "CLIP finds less than min_clip_score of the caption in the picture",
    "clip_score_high": "CLIP finds more than max_clip_score of the caption in the picture, such as the caption's own text",
    "taken_down": "somebody asked for it to be removed (unclip takedown)",
}
"""Every reason, in words for people. Beside these there are `http_<code>`: the server answered with that status; and
`<name>_low`, `<name>_high`: the probe of that name scored below its minimum or above its maximum."""

DUPLICATES = ("duplicate_row", "duplicate_image", "near_duplicate", "semantic_duplicate")
"""Reasons of rows that are dropped as copies of another."""


class RowFault(Exception):
    """A row that cannot be used; never ends a stage."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def is_reason(reason: str) -> bool:
    return reason in REASONS or re.fullmatch(r"http_\d{3}|[a-z0-9_]+_(low|high)", reason) is not None


def meaning(reason: str) -> str:
    """A reason in words."""
    if reason.startswith("http_"):
        return f"the server answered with status {reason.removeprefix('http_')}"
    name, _, side = reason.rpartition("_")
    fallback = f"the probe {name} scored {'below its minimum' if side == 'low' else 'above its maximum'}"
    return REASONS.get(reason, fallback)


def drop(selection: "pa.Table", reasons: Mapping[str, str]) -> "pa.Table":
    """The selection with kept rows of some keys dropped.

    Args:
        selection: key, position, status, reason and perhaps split, which is null for rows that are not kept.
        reasons: key -> why it is dropped.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    why = pa.table({"key": pa.array(reasons, pa.string()), "why": pa.array(reasons.values(), pa.string())})
    table = selection.join(why, "key", join_type="left outer")
    table = table.sort_by([("key", "ascending"), ("position", "ascending")])
    hit = pc.and_(pc.is_valid(table.column("why")), pc.equal(table.column("status"), KEPT))
    changed = {
        "status": pc.if_else(hit, DROPPED, table["status"]),
        "reason": pc.if_else(hit, table["why"], table["reason"]),
    }
    if "split" in table.column_names:
        changed["split"] = pc.if_else(hit, None, table["split"])
    return pa.table({name: changed.get(name, table[name]) for name in selection.column_names})


def count(table: "pa.Table") -> dict[str, Any]:
    """The balance of a table with `status` and `reason`, as a stage's facts: {"rows": {...}, "reasons": {...}}."""
    statuses = _tally(table.column("status"))
    rows = {"in": table.num_rows} | {status: statuses.pop(status, 0) for status in (KEPT, DROPPED, FAILED)}
    assert not statuses, f"statuses out of the vocabulary: {statuses}"
    reasons = _tally(table.column("reason"))
    unexplained = reasons.pop(None, 0)
    assert unexplained == rows[KEPT], f"{unexplained} rows without a reason, but {rows[KEPT]} kept"
    assert all(map(is_reason, reasons)), f"reasons out of the vocabulary: {sorted(reasons)}"
    return {"rows": rows, "reasons": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))}


def top_reasons(facts: Mapping[str, Any], limit: int = 5) -> str:
    """The most frequent reasons for a message: `no_caption 12, http_404 3`."""
    return ", ".join(f"{reason} {number:,}" for reason, number in list(facts["reasons"].items())[:limit])


def _tally(column: "pa.ChunkedArray") -> dict[Any, int]:
    return {item["values"]: item["counts"] for item in column.value_counts().to_pylist()}


def fates(table: "pa.Table") -> dict[str, str]:
    """Key -> kept, or the reason; a key that is kept once is kept.

    Args:
        table: key, status, reason.
    """
    found: dict[str, str] = {}
    for key, status, reason in zip(*(table[name].to_pylist() for name in ("key", "status", "reason")), strict=True):
        if status == KEPT:
            found[key] = KEPT
        else:
            found.setdefault(key, reason)
    return found
