"""Filter: which pairs are worth training on, judged by size and caption; every input row gets a status and a reason."""

import dataclasses

import pyarrow as pa
import pyarrow.compute as pc

from tasks import rows, tables
from tasks.stage import Artifact, Output, StageContext, stage
from unclip.config import fingerprint, require
from unclip.errors import InputError


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    min_side: int = 32
    """Pixels of the original's smaller side."""
    max_aspect_ratio: float = 3.0
    """Longer side of the original divided by the shorter."""
    min_caption_words: int = 2
    """Words between spaces."""
    max_caption_words: int = 60
    """Words between spaces; CLIP reads about 60."""

    def __post_init__(self) -> None:
        require(self.min_side >= 1, "min_side", self.min_side, "at least 1")
        require(self.max_aspect_ratio >= 1, "max_aspect_ratio", self.max_aspect_ratio, "at least 1")
        require(self.min_caption_words >= 1, "min_caption_words", self.min_caption_words, "at least 1")
        require(
            self.max_caption_words >= self.min_caption_words,
            "max_caption_words",
            self.max_caption_words,
            "at least min_caption_words",
        )

    def limits(self) -> dict[str, tuple[float | None, float | None]]:
        """Smallest and largest value that is kept, for each measure that has limits."""
        return {
            "shorter_side": (self.min_side, None),
            "aspect_ratio": (None, self.max_aspect_ratio),
            "caption_words": (self.min_caption_words, self.max_caption_words),
        }


@stage("filter", version=1)
def filter(context: StageContext, config: FilterConfig, download: Artifact) -> Output:
    """Drop pairs whose picture is too small or too long, or whose caption is too short or too long."""
    facts = download.facts
    pairs = tables.read_file(facts["pairs"])
    columns = ["key", "status", "reason", "original_width", "original_height"]
    images = tables.read(facts["images"], facts["images_version"], columns)
    selection = judge(pairs, images, config)
    counts = rows.count(selection)
    if not counts["rows"][rows.KEPT]:
        raise InputError(
            f"filter: none of {selection.num_rows:,} rows is kept ({rows.top_reasons(counts)}). "
            f"Check the list of URLs, or loosen the settings of [filter]."
        )
    uri = f"{context.folder}/selection.parquet"
    tables.write_file(uri, selection)
    context.tracker.metrics(counts["rows"])
    digest = fingerprint(tables.content_digest(selection.drop_columns("position")), download.digest)
    passed_on = {name: facts[name] for name in facts if name.startswith("images") or name == "pairs"}
    return Output(uri, digest, {**counts, **passed_on})


def judge(pairs: pa.Table, images: pa.Table, config: FilterConfig) -> pa.Table:
    """One row (key, position, status, reason) for every row of the list, sorted by key, then position."""
    found = images.rename_columns({"status": "image_status", "reason": "image_reason"})
    table = pairs.join(found, "key", join_type="left outer")
    table = table.sort_by([("key", "ascending"), ("position", "ascending")])
    width, height = table.column("original_width"), table.column("original_height")
    longer, shorter = pc.max_element_wise(width, height), pc.min_element_wise(width, height)
    words = pc.list_value_length(pc.utf8_split_whitespace(table.column("caption")))
    status, reason = table.column("status"), table.column("reason")
    for verdict, why, applies in (
        (rows.FAILED, table.column("image_reason"), pc.not_equal(table.column("image_status"), "ok")),
        (rows.DROPPED, "too_small", pc.less(shorter, config.min_side)),
        (
            rows.DROPPED,
            "bad_aspect",
            pc.greater(pc.divide(pc.cast(longer, "double"), shorter), config.max_aspect_ratio),
        ),
        (rows.DROPPED, "caption_too_short", pc.less(words, config.min_caption_words)),
        (rows.DROPPED, "caption_too_long", pc.greater(words, config.max_caption_words)),
    ):
        hit = pc.and_(pc.equal(status, rows.KEPT), pc.fill_null(applies, False))
        status, reason = pc.if_else(hit, verdict, status), pc.if_else(hit, why, reason)
    return pa.table({"key": table["key"], "position": table["position"], "status": status, "reason": reason})
