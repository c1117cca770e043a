"""The stages that make a dataset, whole: killed at their commit points, in an object store, grown, and with rows taken down."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import tables
from unclip import clip, files

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--set", "scenes.num_images=40", "--set", "scenes.port=8769"]

pytestmark = pytest.mark.timeout(900)

# What is written last of all makes the others count; each is met before, within and after the write.
COMMITS = [
    "artifacts/ingest/.*/pairs", "images/.*[.]parquet", "images/.*/_delta_log", "artifacts/filter/", "artifacts/dedup/",
    "embeddings/.*[.]parquet", "embeddings/.*/_delta_log", "artifacts/curate/.*/scores", "artifacts/curate/.*/selection",
    "artifacts/curate/.*/statistics/pca", "artifacts/curate/.*/statistics/manifest", "snapshots/.*[.]parquet",
    "snapshots/_delta_log", "artifacts/report/",
    *(f"stages/{name}/" for name in ("ingest", "download", "filter", "dedup", "clip", "embed", "curate", "report")),
]  # fmt: skip
FEW = [
    "within .*images/.*[.]parquet",
    "after .*images/.*/_delta_log",
    "after .*embeddings/.*[.]parquet",
    "before .*snapshots/_delta_log",
]
ALL = [
    f"^{moment} .*{path}"
    for path in COMMITS
    for moment in ("before", "within", "after")
    if moment != "within" or "_log" not in path
]


def unclip(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pipelines", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})


def refresh(storage: object, frozen_clip: str, *options: object, **environment: str) -> str:
    result = unclip(
        "refresh", "tiny", "--storage", storage, "--set", f"clip.model={frozen_clip}", *OPTIONS, *options, **environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def frozen_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny CLIP whose weights nobody trained."""
    import torch

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    clip.save(clip.create("unclip-demo", None), "unclip-demo", folder)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, frozen_clip: str) -> Iterator[Path]:
    storage = tmp_path_factory.mktemp("undisturbed") / "storage"
    refresh(storage, frozen_clip)
    yield storage


def content(storage: object) -> dict[str, Any]:
    """All rows of all tables, as digests, and the digests of all stages; the same whatever happened on the way."""
    found: dict[str, Any] = {}
    for kind in ("images", "embeddings"):
        for name in files.names(f"{storage}/{kind}"):
            table = tables.read(f"{storage}/{kind}/{name}")
            keys = table.column("key").to_pylist()
            assert len(set(keys)) == len(keys), f"{kind}: a row is there twice"
            found[kind] = (name, len(keys), tables.content_digest(table))
    snapshots = tables.history(f"{storage}/snapshots").to_pylist()
    for number, snapshot in enumerate(snapshots):
        for name in ("selection", "scores"):
            found[f"{name} {number}"] = tables.content_digest(tables.read_file(snapshot[name]))
        counts = json.loads(snapshot["rows"])
        assert counts["in"] == counts["kept"] + counts["dropped"] + counts["failed"]
        found[f"counts {number}"] = (counts, json.loads(snapshot["reasons"]))
    for stage in files.names(f"{storage}/stages"):
        records = [
            files.read_json(f"{storage}/stages/{stage}/{name}") for name in files.names(f"{storage}/stages/{stage}")
        ]
        found[stage] = sorted(record["digest"] for record in records)
    return found


def kill_at(points: list[str], storage: Path, frozen_clip: str, armed: Path) -> None:
    """Refresh again and again, each time going down at some of the points, until nothing is armed any more."""
    armed.mkdir()
    for number, point in enumerate(points):
        (armed / f"{number:03d}").write_text(point)
    arguments = ["refresh", "tiny", "--storage", storage, "--set", f"clip.model={frozen_clip}", *OPTIONS]
    for _ in range(len(points) + 1):
        before = set(armed.iterdir())
        result = unclip(*arguments, UNCLIP_FAILPOINTS=str(armed))
        if result.returncode == 0:
            break
        assert set(armed.iterdir()) < before, result.stdout + result.stderr
        assert "run the same command again" in result.stderr, result.stderr
    assert result.returncode == 0 and not list(armed.iterdir()), [path.read_text() for path in armed.iterdir()]


def test_killed_at_a_few_commit_points_it_ends_with_the_same_tables(
    undisturbed: Path, frozen_clip: str, tmp_path: Path
) -> None:
    kill_at(FEW, tmp_path / "storage", frozen_clip, tmp_path / "armed")
    assert content(tmp_path / "storage") == content(undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_every_commit_point_it_ends_with_the_same_tables(
    undisturbed: Path, frozen_clip: str, tmp_path: Path
) -> None:
    kill_at(ALL, tmp_path / "storage", frozen_clip, tmp_path / "armed")
    assert content(tmp_path / "storage") == content(undisturbed)
