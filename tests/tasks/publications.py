"""Publications of versions with given scores, as the stage `publish` makes them, but without sampling."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tasks import promotion, published, tables
from tasks.promotion import PromotionConfig
from tasks.published import Entry, Record
from tasks.stage import Artifact, Run, StageContext
from tasks.store import Store
from tasks.tracking import Listing, Tracker

CAPTIONS = 256
UNTRACKED = Tracker("", "")


def scores(seed: int, *rates: float, count: int = CAPTIONS) -> list[pa.Table]:
    """Scores of models that get a caption right with these rates. Models fail at the same hard captions, as real ones do."""
    rng = np.random.default_rng(seed)
    difficulty = rng.random(count)
    tables_of = []
    for rate in rates:
        luck = 0.7 * difficulty + 0.3 * rng.random(count)
        right = luck < np.quantile(luck, rate)
        values = {"accuracy.all": right, "clip_score": 0.8 + 0.1 * right + rng.normal(0, 0.02, count)}
        columns = {name: pa.array(each.astype(np.float32)) for name, each in values.items()}
        captions = pa.array([f"caption {number}" for number in range(count)])
        tables_of.append(pa.table({"group": ["heldout"] * count, "caption": captions, **columns}))
    return tables_of


@dataclasses.dataclass(frozen=True)
class Storage:
    """Storage in which versions with given scores are published, without sampling: their scores are there."""

    store: Store
    config: PromotionConfig = PromotionConfig()
    tracker: Tracker = UNTRACKED
    name: str = "model"

    def publish(
        self, digest: str, table: pa.Table, register: Callable[[Mapping[str, str]], str | None] | None = None
    ) -> promotion.Outcome:
        """Publish a version, as the stage does."""
        run = Run("r", "tiny", self.store.root, self.tracker, "")
        context = StageContext(run, "publish", digest * 4, self.store, self.tracker, Path())
        uri = self.store.uri("artifacts", "evaluate", digest * 4, "scores.parquet")
        tables.write_file(uri, table)
        metrics = {name: float(np.nanmean(table[name])) for name in ("accuracy.all", "clip_score")}
        measured_by = {"model": "ViT-B-32", "pretrained": None, "image_embeddings": "unit", "digest": "c"}
        facts: dict[str, Any] = {
            "scores": uri,
            "seed": 0,
            "batch_size": 16,
            "image_size": 64,
            "measured_by": measured_by,
        }
        evaluation = Artifact("evaluate", digest * 4, "", "", {**facts, "metrics": {"heldout": metrics}}, 1.0)
        stack = self.store.uri("artifacts", "publish", digest * 4, "stack")
        self.store.write_json({}, "artifacts", "publish", digest * 4, "stack", "stack.json")
        entry = Entry(stack, digest, time.time(), image_size=64, metrics=metrics)
        register = register or (lambda tags: self.tracker.register(stack, self.name, Listing(tags=tags)))
        return promotion.publish(context, self.name, self.config, entry, evaluation, register)

    def record(self) -> Record:
        return published.read(self.store, self.name)


A, B, C, D = (letter * 16 for letter in "abcd")
