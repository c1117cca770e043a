"""Semantic duplicates equal those of comparing each row with all earlier kept rows, in one process and as dataflow."""

import functools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from tasks import ranges, semantic
from tasks.ranges import KeyRange
from tasks.semantic import NUM_SEARCHED_CLUSTERS, _assign, _train, duplicates_in_memory, semantic_duplicates


def brute_force(embeddings: torch.Tensor, distance: float) -> set[int]:
    """Expected result of semantic deduplication: each row compared with all earlier kept rows."""
    similar, kept = (embeddings @ embeddings.T > 1 - distance).numpy(), list[int]()
    for index in range(len(embeddings)):
        if not similar[index, kept].any():
            kept.append(index)
    return set(range(len(embeddings))) - set(kept)


def in_memory(embeddings: torch.Tensor, distance: float, cluster_size: int) -> set[int]:
    return set(np.flatnonzero(duplicates_in_memory(embeddings.numpy(), distance, cluster_size)).tolist())


def with_duplicates(num_originals: int, num_duplicates: int, cosine: float) -> torch.Tensor:
    """Unit vectors [N, 64]; each of the last ones duplicates another at this cosine, in a random direction."""
    generator = torch.Generator().manual_seed(1)
    originals = F.normalize(torch.randn(num_originals, 64, generator=generator), dim=1)
    copied = originals[:num_duplicates]
    orthogonal = torch.randn(num_duplicates, 64, generator=generator)
    orthogonal = F.normalize(orthogonal - (orthogonal * copied).sum(dim=1, keepdim=True) * copied, dim=1)
    return torch.cat([originals, cosine * copied + (1 - cosine**2) ** 0.5 * orthogonal])


def test_duplicates_in_different_clusters_are_found_in_any_order() -> None:
    embeddings = with_duplicates(2400, 600, 0.9)
    homes, visits = _assign(embeddings.numpy(), _train(embeddings.numpy(), 60, 0.12), 0.12, 16)
    assert len(np.unique(homes)) > 50 and visits.shape == (3000, 16) and (visits[:, 0] >= 0).all()
    assert (homes[:600] != homes[2400:]).sum() > 50, "many duplicates are in another cluster"
    found = in_memory(embeddings, 0.12, 50)
    assert found == brute_force(embeddings, 0.12) == set(range(2400, 3000))
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(2))
    shuffled = in_memory(embeddings[order], 0.12, 50)
    assert shuffled == brute_force(embeddings[order], 0.12) == in_memory(embeddings[order], 0.12, 3000)
    # one of every pair is kept, the one that now comes first
    assert len(shuffled) == 600 and {int(order[index]) % 2400 for index in shuffled} == set(range(600))


def test_duplicates_of_duplicates_do_not_count() -> None:
    angles = torch.arange(5) * 0.2  # each is near to its neighbours only: 1 - cos 0.2 = 0.02, 1 - cos 0.4 = 0.08
    chain = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert in_memory(chain, 0.05, 100) == {1, 3}
    generator = torch.Generator().manual_seed(3)
    crowded = F.normalize(torch.randn(1500, 3, generator=generator), dim=1)  # every row is close to another one
    assert in_memory(crowded, 0.01, 1500) == brute_force(crowded, 0.01)
    same = crowded[:1].expand(100, -1)
    assert in_memory(same, 0.01, 5) == set(range(1, 100))


def keyed(embeddings: np.ndarray) -> pa.Table:
    """Rows with keys in the order of the embeddings, so that the first is kept."""
    rng = np.random.default_rng(len(embeddings))
    keys = sorted(rng.bytes(16).hex() for _ in embeddings)
    return pa.table({"key": pa.array(keys, pa.string())})


def read(table: pa.Table, embeddings: np.ndarray, step: int, part: int) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Every `step`-th row: parts are not key ranges."""
    rows = np.arange(part, len(embeddings), step)
    return table["key"].take(rows), embeddings[rows]


def result(key_range: KeyRange, found: pa.Table) -> pa.Table:
    assert (ranges.of_keys(found["key"], key_range.count) == key_range.index).all()
    assert found["key"].to_pylist() == sorted(set(found["key"].to_pylist()))
    assert set(found["reason"].to_pylist()) <= {"semantic_duplicate"}
    return found


def search(
    embeddings: np.ndarray,
    distance: float,
    cluster_size: int,
    scratch: Path,
    num_parts: int,
    num_partitions: int | None,
    searched_clusters: int = NUM_SEARCHED_CLUSTERS,
) -> set[int]:
    """Indices of the rows that the dataflow drops."""
    table = keyed(embeddings)
    reading = functools.partial(read, table, embeddings, num_parts)
    found = semantic_duplicates(
        reading, range(num_parts), len(embeddings), distance, cluster_size, str(scratch), 4 if num_parts > 1 else 1, result,
        num_partitions=num_partitions, searched_clusters=searched_clusters,
    )  # fmt: skip
    assert not scratch.exists()
    place = {key: index for index, key in enumerate(table["key"].to_pylist())}
    return {place[key] for part in found for key in part["key"].to_pylist()}


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some ten groups in a set of thousands; only the calling process trains and counts groups."""
    monkeypatch.setattr(semantic, "_GROUP_ROWS", 500)


def mixed(seed: int) -> np.ndarray:
    """Clustered unit vectors with copies, chains of copies of copies and a pile of near copies, in random order: [N, 32]."""
    generator = torch.Generator().manual_seed(seed)

    def near(originals: torch.Tensor, noise: float) -> torch.Tensor:
        return F.normalize(originals + noise * torch.randn(originals.shape, generator=generator) / 32**0.5, dim=1)

    topics = F.normalize(torch.randn(40, 32, generator=generator), dim=1)
    originals = near(topics[torch.randint(40, (3000,), generator=generator)], 0.9)
    copies = near(originals[:800], 0.25)
    chains = near(copies[:300], 0.3)
    pile = near(topics[:1].expand(1000, -1), 0.15)
    rows = torch.cat([originals, copies, chains, near(chains, 0.3), pile])
    return rows[torch.randperm(len(rows), generator=generator)].numpy()


def test_groups_decide_together_as_one_process_would(small_groups: None, cluster: None, tmp_path: Path) -> None:
    embeddings = mixed(0)
    expected = brute_force(torch.tensor(embeddings), 0.05)
    assert len(expected) > 1500
    everywhere = 100  # all clusters that may hold a duplicate
    assert search(embeddings, 0.05, 80, tmp_path / "scratch", 4, None, everywhere) == expected
    assert search(embeddings, 0.05, 80, tmp_path / "scratch", 1, 1, everywhere) == expected
    found = search(embeddings, 0.05, 80, tmp_path / "scratch", 3, 2)
    assert len(found ^ expected) <= 0.005 * len(expected), "the nearest clusters hold nearly all duplicates"
    assert search(embeddings, 0.05, 80, tmp_path / "scratch", 1, 16) == found, "partitions do not change the result"


def test_one_group_needs_no_tasks(tmp_path: Path) -> None:
    embeddings = mixed(1)[:2000]
    assert search(embeddings, 0.05, 100, tmp_path / "scratch", 1, None) == in_memory(
        torch.tensor(embeddings), 0.05, 100
    )
    assert search(embeddings[:0], 0.05, 100, tmp_path / "scratch", 1, None) == set()


def test_a_pile_of_near_copies_leaves_its_first_row() -> None:
    """`python -m benchmarks.scaling --skew` shows that it costs no more than different rows."""
    generator = torch.Generator().manual_seed(0)
    even = F.normalize(torch.randn(20_000, 64, generator=generator), dim=1).numpy()
    centre = torch.tensor(even[:1])
    pile = F.normalize(centre + 0.1 * torch.randn(20_000, 64, generator=generator) / 8, dim=1).numpy()
    assert not duplicates_in_memory(even, 0.05, 500).any()
    assert np.flatnonzero(~duplicates_in_memory(pile, 0.05, 500)).tolist() == [0]
    mixed = duplicates_in_memory(np.concatenate([even[:10_000], pile[:10_000]]), 0.05, 500)
    assert not mixed[:10_000].any() and mixed[10_000:].all()
