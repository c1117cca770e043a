import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tasks import ranges, rows, tables
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
from tests.tasks.datasets import key, write_folder, write_images
from unclip.errors import ConfigError, InputError
from unclip.training import checkpoints

NUM_ROWS, WIDTH = 40, 8
FAILED = "f" * 32


@pytest.fixture
def embedded(tmp_path: Path, num_ranges: int, cluster: None) -> Artifact:
    """40 embedded pairs, every tenth held out, and one row that failed earlier."""
    embeddings = F.normalize(torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1)
    embeddings[7] = embeddings[3]
    keys = [key(index) for index in range(NUM_ROWS)]
    table = {
        "key": keys,
        "caption": [f"caption {index // 2}" for index in range(NUM_ROWS)],
        "image_embedding": list(embeddings.numpy()),
        "text_embedding": list(embeddings.numpy()),
        "clip_score": np.linspace(0, 0.39, NUM_ROWS),
        "tokens": [[1]] * NUM_ROWS,
        "tokens_lost": [0] * NUM_ROWS,
    }
    uri = f"{tmp_path}/embeddings/x"
    version = tables.append_files(uri, [tables.write_part(uri, "a", pa.table(table, schema=SCHEMA))], SCHEMA)
    images = [{"key": each, "status": "ok", "jpg": b""} for each in keys]
    facts = write_images(str(tmp_path), images[:25], images[25:])
    selection = {
        "key": [*keys, FAILED],
        "position": list(range(NUM_ROWS + 1)),
        "status": ["kept"] * NUM_ROWS + ["failed"],
        "reason": [None] * NUM_ROWS + ["http_404"],
        "split": ["holdout" if index % 10 == 0 else "train" for index in range(NUM_ROWS)] + [None],
    }
    pairs = {"key": keys, "caption": table["caption"], "status": ["kept"] * NUM_ROWS}
    facts |= {"selection": write_folder(f"{tmp_path}/selection", pa.table(selection), num_ranges)}
    facts |= {"pairs": write_folder(f"{tmp_path}/pairs", pa.table(pairs), num_ranges)}
    facts |= {"embeddings": uri, "embeddings_version": version}
    return Artifact("embed", "f", uri, "digest", facts, 1.0)


@pytest.fixture
def num_ranges() -> int:
    return 1


def run_curate(tmp_path: Path, embedded: Artifact, config: CurateConfig) -> Artifact | Failure:
    run = Run("r", "p", str(tmp_path), Tracker("", ""), "")
    return execute(Call(curate, config), run, [embedded])


def outcome(artifact: Artifact | Failure) -> dict[str, Any]:
    assert isinstance(artifact, Artifact), artifact
    selection = ranges.read_all(artifact.uri)
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
    expected = {FAILED: "http_404"} | {key(i): "first_high" for i in range(NUM_ROWS) if embeddings[i][0] > 0.3}
    expected |= {key(index): "clip_score_low" for index in range(10)} | {key(39): "clip_score_high"}
    assert found == expected and "first_high" in found.values()
    snapshot = Snapshot.of(artifact.facts)
    scores = ranges.read_all(snapshot.scores)
    assert scores.num_rows == NUM_ROWS and scores.column_names[:3] == ["key", "clip_score", "first"]
    assert np.allclose(scores["first"].to_numpy(), [e[0] for e in embeddings])
    kept = snapshot.open_places("train", "holdout")
    assert set(kept.keys(np.arange(len(kept)))) == {key(i) for i in range(NUM_ROWS)} - expected.keys()
    assert Store(str(tmp_path)).list("snapshots")


def test_without_limits_everything_is_kept(tmp_path: Path, embedded: Artifact) -> None:
    assert outcome(run_curate(tmp_path, embedded, CurateConfig())) == {FAILED: "http_404"}


def test_f102_embeddings_of_an_earlier_release_have_no_number_of_lost_tokens(
    tmp_path: Path, embedded: Artifact
) -> None:
    for uri in tables.files(embedded.uri):
        tables.write_file(uri, tables.read_file(uri).drop_columns("tokens_lost"))
    artifact = run_curate(tmp_path, embedded, CurateConfig())
    assert outcome(artifact) == {FAILED: "http_404"}
    assert ranges.read_all(Snapshot.of(artifact.facts).scores)["tokens_lost"].null_count == NUM_ROWS  # type: ignore[union-attr]


def test_f74_of_repeated_embeddings_those_committed_first_count(tmp_path: Path, embedded: Artifact) -> None:
    late = tables.read(embedded.uri).slice(5, 10)
    late = late.set_column(late.column_names.index("clip_score"), "clip_score", pa.array([1.0] * 10, pa.float32()))
    version = tables.append_files(embedded.uri, [tables.write_part(embedded.uri, "0-late", late)], SCHEMA)
    twice = dataclasses.replace(embedded, facts={**embedded.facts, "embeddings_version": version})
    artifact = run_curate(tmp_path, twice, CurateConfig())
    assert outcome(artifact) == {FAILED: "http_404"}
    scores = ranges.read_all(Snapshot.of(artifact.facts).scores)  # type: ignore[union-attr]
    assert np.allclose(scores["clip_score"].to_numpy(), np.linspace(0, 0.39, NUM_ROWS))


def test_semantic_duplicates_keep_the_smallest_key(tmp_path: Path, embedded: Artifact) -> None:
    found = outcome(run_curate(tmp_path, embedded, CurateConfig(semantic_distance=0.001)))
    assert found == {FAILED: "http_404", key(7): "semantic_duplicate"}
    # a row that is dropped anyway has no duplicates
    artifact = run_curate(tmp_path, embedded, CurateConfig(semantic_distance=0.001, min_clip_score=0.035))
    assert key(7) not in outcome(artifact)


@pytest.mark.parametrize("num_ranges", [1, 4])
def test_f97_captions_of_an_image_are_kept_or_dropped_together(tmp_path: Path, embedded: Artifact) -> None:
    """Rows 3, 4, 5 show one image, rows 7, 30, 31 another with the same meaning, rows 10 and 11 a third."""
    images = [
        {3: "a", 4: "a", 5: "a", 7: "b", 30: "b", 31: "b", 10: "c", 11: "c"}.get(row, f"{row}") for row in range(40)
    ]
    listed = [
        {"key": key(row), "status": "ok", "jpg": b"", "sha256": hashlib.sha256(image.encode()).hexdigest()}
        for row, image in enumerate(images)
    ]
    source = dataclasses.replace(
        embedded, facts={**embedded.facts, **write_images(f"{tmp_path}/c", listed), "other_captions": 5}
    )
    uri = f"{tmp_path}/c/embeddings/x"
    table = tables.read_file(tables.files(embedded.uri)[0])
    same = {4: 3, 5: 3, 30: 7, 31: 7, 11: 10}
    table = table.set_column(
        2, SCHEMA.field("image_embedding"), table["image_embedding"].take([same.get(row, row) for row in range(40)])
    )
    source.facts["embeddings_version"] = tables.append_files(uri, [tables.write_part(uri, "a", table)], SCHEMA)
    source.facts["embeddings"] = uri
    found = outcome(run_curate(tmp_path, source, CurateConfig(semantic_distance=0.001)))
    assert found == {FAILED: "http_404"} | {key(row): "semantic_duplicate" for row in (7, 30, 31)}
    # Row 3 is out of bounds, so row 4 is the first.
    found = outcome(run_curate(tmp_path, source, CurateConfig(semantic_distance=0.001, min_clip_score=0.035)))
    low = {key(row): "clip_score_low" for row in range(4)}
    assert found == {FAILED: "http_404"} | low | {key(row): "semantic_duplicate" for row in (7, 30, 31)}


@pytest.mark.parametrize("limits", [{}, {"min_clip_score": 0.1}, {"max_clip_score": 0.9}])
def test_f26_a_score_that_is_not_finite_drops_its_row(limits: dict[str, float]) -> None:
    scores = pa.table({"key": list("abcd"), "clip_score": [float("nan"), 0.5, float("inf"), float("-inf")]})
    expected = {"a": "clip_score_low", "c": "clip_score_high", "d": "clip_score_low"}
    found = out_of_bounds(scores, CurateConfig(**limits))  # type: ignore[arg-type]
    assert dict(zip(found["key"].to_pylist(), found["reason"].to_pylist(), strict=True)) == expected


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
    train = snapshot.open_places("train")
    kept = [each in set(train.keys(np.arange(len(train)))) for each in table["key"].to_pylist()]
    values = torch.tensor(table["image_embedding"].to_pylist(), dtype=torch.float64)[torch.tensor(kept)]
    assert torch.allclose(snapshot.load_statistics().mean.double(), values.mean(0), atol=1e-6)
    pca = checkpoints.load(snapshot.statistics)[0]["pca"]
    components, explained = pca["components"].double(), pca["explained_variance_ratio"].double()
    assert torch.allclose(components @ components.T, torch.eye(WIDTH, dtype=torch.float64), atol=1e-5)
    variances = ((values - values.mean(0)) @ components.T).var(dim=0)
    assert torch.allclose(variances / variances.sum(), explained, atol=1e-5)
    assert (explained.diff() <= 0).all() and abs(float(explained.sum()) - 1) < 1e-5


@pytest.mark.parametrize("num_ranges", [1, 4])
def test_held_out_rows_know_whether_their_caption_is_trained_on(tmp_path: Path, embedded: Artifact) -> None:
    artifact = run_curate(tmp_path, embedded, CurateConfig(max_clip_score=0.305))  # drops rows 31 and later
    assert isinstance(artifact, Artifact), artifact
    rows = Snapshot.of(artifact.facts).heldout_rows()
    assert rows["key"].to_pylist() == [key(index) for index in (0, 10, 20, 30)]
    assert rows["caption"].to_pylist() == ["caption 0", "caption 5", "caption 10", "caption 15"]
    assert rows["is_trained_on"].to_pylist() == [True, True, True, False], "row 31, with the caption of 30, is dropped"
    assert rows["images_file"].to_pylist() == [0, 0, 0, 1] and rows["images_row"].to_pylist() == [0, 10, 20, 5]
    assert rows["embeddings_row"].to_pylist() == [0, 10, 20, 30]


def test_results_are_the_same_in_any_number_of_ranges(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, cluster: None
) -> None:
    digests, kept = set(), []
    for count in (1, 8):
        folder = tmp_path_factory.mktemp("curate")
        source = embedded.__wrapped__(folder, count, cluster)  # type: ignore[attr-defined]
        artifact = run_curate(folder, source, CurateConfig(semantic_distance=0.001, min_clip_score=0.05))
        assert isinstance(artifact, Artifact), artifact
        digests.add(artifact.digest)
        snapshot = Snapshot.of(artifact.facts)
        places = snapshot.open_places("train", "holdout")
        columns = [places.column(name, np.arange(len(places))).tolist() for name in ("images_file", "images_row")]
        kept.append([ranges.read_all(artifact.uri), places.keys(np.arange(len(places))), *columns])
        kept[-1].append(snapshot.load_statistics().mean.tolist())
    assert len(digests) == 1 and kept[0] == kept[1]


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
