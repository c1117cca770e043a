from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tasks import rows, tables
from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Call, Failure, Run, execute
from tasks.stages.curate import (
    CurateConfig,
    ProbeConfig,
    curate,
    out_of_bounds,
    pin_probes,
)
from tasks.stages.embed import SCHEMA
from tasks.store import Store
from tasks.tracking import Tracker
from unclip.errors import ConfigError, InputError
from unclip.training import checkpoints

NUM_ROWS, WIDTH = 40, 8


@pytest.fixture
def embedded(tmp_path: Path) -> Artifact:
    """40 embedded pairs, every tenth held out, and one row that failed earlier."""
    embeddings = F.normalize(torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1)
    embeddings[7] = embeddings[3]
    keys = [f"k{index:02d}" for index in range(NUM_ROWS)]
    table = {
        "key": keys,
        "caption": keys,
        "image_embedding": list(embeddings.numpy()),
        "text_embedding": list(embeddings.numpy()),
        "clip_score": np.linspace(0, 0.39, NUM_ROWS),
        "tokens": [[1]] * NUM_ROWS,
    }
    uri = f"{tmp_path}/embeddings/x"
    version = tables.append_files(uri, [tables.write_part(uri, "a", pa.table(table, schema=SCHEMA))], SCHEMA)
    selection = {
        "key": [*keys, "z"],
        "position": list(range(NUM_ROWS + 1)),
        "status": ["kept"] * NUM_ROWS + ["failed"],
        "reason": [None] * NUM_ROWS + ["http_404"],
        "split": ["holdout" if index % 10 == 0 else "train" for index in range(NUM_ROWS)] + [None],
    }
    tables.write_file(f"{tmp_path}/selection.parquet", pa.table(selection))
    facts = {"selection": f"{tmp_path}/selection.parquet", "embeddings": uri, "embeddings_version": version}
    facts |= {"images": "images", "images_version": 0}
    return Artifact("embed", "f", uri, "digest", facts, 1.0)


def run_curate(tmp_path: Path, embedded: Artifact, config: CurateConfig) -> Artifact | Failure:
    run = Run("r", "p", str(tmp_path), Tracker("", ""), "")
    return execute(Call(curate, config), run, [embedded])


def outcome(artifact: Artifact | Failure) -> dict[str, Any]:
    assert isinstance(artifact, Artifact), artifact
    selection = tables.read_file(artifact.uri)
    facts = artifact.facts
    assert facts["rows"] == rows.count(selection)["rows"]
    assert facts["rows"]["in"] == NUM_ROWS + 1 == sum(facts["rows"][name] for name in ("kept", "dropped", "failed"))
    return {row["key"]: row["reason"] for row in selection.to_pylist() if row["reason"]}


def test_limits_drop_rows_with_a_reason_and_all_rows_keep_their_scores(tmp_path: Path, embedded: Artifact) -> None:
    weight = torch.zeros(1, WIDTH)
    weight[0, 0] = 1.0
    save_file({"weight": weight}, tmp_path / "first.safetensors")
    probe = ProbeConfig("first", str(tmp_path / "first.safetensors"), maximum=0.3)
    config = pin_probes(CurateConfig(min_clip_score=0.095, max_clip_score=0.385, probes=(probe,)))
    artifact = run_curate(tmp_path, embedded, config)
    found = outcome(artifact)
    embeddings = tables.read(embedded.uri).column("image_embedding").to_pylist()
    expected = {"z": "http_404"} | {f"k{i:02d}": "first_high" for i in range(NUM_ROWS) if embeddings[i][0] > 0.3}
    expected |= {f"k{index:02d}": "clip_score_low" for index in range(10)} | {"k39": "clip_score_high"}
    assert found == expected and "first_high" in found.values()
    snapshot = Snapshot.of(artifact.facts)
    scores = tables.read_file(snapshot.scores)
    assert scores.num_rows == NUM_ROWS and scores.column_names == ["key", "clip_score", "first"]
    assert np.allclose(scores["first"].to_numpy(), [e[0] for e in embeddings])
    assert not set(snapshot.keys("train") + snapshot.keys("holdout")) & expected.keys()
    assert Store(str(tmp_path)).list("snapshots")


def test_without_limits_everything_is_kept(tmp_path: Path, embedded: Artifact) -> None:
    assert outcome(run_curate(tmp_path, embedded, CurateConfig())) == {"z": "http_404"}


def test_semantic_duplicates_keep_the_smallest_key(tmp_path: Path, embedded: Artifact) -> None:
    found = outcome(run_curate(tmp_path, embedded, CurateConfig(semantic_distance=0.001)))
    assert found == {"z": "http_404", "k07": "semantic_duplicate"}
    # a row that is dropped anyway has no duplicates
    artifact = run_curate(tmp_path, embedded, CurateConfig(semantic_distance=0.001, min_clip_score=0.035))
    assert "k07" not in outcome(artifact)


@pytest.mark.parametrize("limits", [{}, {"min_clip_score": 0.1}, {"max_clip_score": 0.9}])
def test_f26_a_score_that_is_not_finite_drops_its_row(limits: dict[str, float]) -> None:
    scores = pa.table({"key": list("abcd"), "clip_score": [float("nan"), 0.5, float("inf"), float("-inf")]})
    expected = {"a": "clip_score_low", "c": "clip_score_high", "d": "clip_score_low"}
    assert out_of_bounds(scores, CurateConfig(**limits)) == expected  # type: ignore[arg-type]


def test_f26_a_threshold_in_the_wrong_unit_is_an_error_that_shows_the_scores(
    tmp_path: Path, embedded: Artifact
) -> None:
    with pytest.raises(ConfigError, match=r"min_clip_score.*28.*a cosine, -1 to 1"):
        CurateConfig(min_clip_score=28.0)
    with pytest.raises(ConfigError, match="minimum"):
        ProbeConfig("first", "x", minimum=float("nan"))
    save_file({"weight": torch.eye(1, WIDTH)}, tmp_path / "first.safetensors")
    probe = ProbeConfig("first", str(tmp_path / "first.safetensors"), minimum=28.0)
    failure = run_curate(tmp_path, embedded, pin_probes(CurateConfig(probes=(probe,))))
    assert isinstance(failure, Failure)
    assert "got 0 pairs to train on, expected at least 2 (first_low 40, http_404 1)" in failure.message
    assert "Quantiles of first: 5 % -" in failure.message and ", 95 % 0." in failure.message
    assert not Path(tmp_path, "snapshots").exists(), "no snapshot is written"


def test_statistics_are_those_of_the_training_rows(tmp_path: Path, embedded: Artifact) -> None:
    artifact = run_curate(tmp_path, embedded, CurateConfig())
    assert isinstance(artifact, Artifact)
    snapshot = Snapshot.of(artifact.facts)
    table = tables.read(embedded.uri)
    kept = [key in set(snapshot.keys("train")) for key in table["key"].to_pylist()]
    values = torch.tensor(table["image_embedding"].to_pylist(), dtype=torch.float64)[torch.tensor(kept)]
    assert torch.allclose(snapshot.load_statistics().mean.double(), values.mean(0), atol=1e-6)
    pca = checkpoints.load(snapshot.statistics)[0]["pca"]
    components, explained = pca["components"].double(), pca["explained_variance_ratio"].double()
    assert torch.allclose(components @ components.T, torch.eye(WIDTH, dtype=torch.float64), atol=1e-5)
    variances = ((values - values.mean(0)) @ components.T).var(dim=0)
    assert torch.allclose(variances / variances.sum(), explained, atol=1e-5)
    assert (explained.diff() <= 0).all() and abs(float(explained.sum()) - 1) < 1e-5


def test_f26_dropping_everything_fails_with_the_reasons(tmp_path: Path, embedded: Artifact) -> None:
    failure = run_curate(tmp_path, embedded, CurateConfig(min_clip_score=0.9))
    assert isinstance(failure, Failure)
    assert "got 0 pairs" in failure.message and "clip_score_low 40" in failure.message


def test_settings_are_checked(tmp_path: Path) -> None:
    for wrong in (
        {"min_clip_score": 2.0},
        {"semantic_distance": 0.0},
        {"cluster_size": 1},
        {"probes": (ProbeConfig("a", "x"), ProbeConfig("a", "y"))},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            CurateConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="maximum"):
        ProbeConfig("a", "x", minimum=2, maximum=1)
    with pytest.raises(InputError, match="does not exist"):
        pin_probes(CurateConfig(probes=(ProbeConfig("a", str(tmp_path / "none.safetensors")),)))
    save_file({"weight": torch.zeros(1, 8)}, tmp_path / "p.safetensors")
    with pytest.raises(ConfigError, match="expected 00"):
        pin_probes(CurateConfig(probes=(ProbeConfig("a", str(tmp_path / "p.safetensors"), digest="00"),)))
