"""Retrieval: recall of images by sampled embeddings, and of captions by images."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from unclip.errors import NonFiniteError, ShapeError
from unclip.evaluation import retrieval
from unclip.evaluation.retrieval import match, r_precision, score_embeddings


def test_scores_of_embeddings() -> None:
    true = torch.eye(4)
    sampled = torch.tensor([[2.0, 0, 0, 0], [0.5, 0.4, 0, 0], [0.2, 0.3, 0.1, 0], [0, 0, 0, 9.0]])
    scores = score_embeddings(sampled, true, ranks=(1, 2, 3))
    assert {name: scores[name] for name in ("recall_at_1", "recall_at_2", "recall_at_3")} == {
        "recall_at_1": 0.5,
        "recall_at_2": 0.75,
        "recall_at_3": 1.0,
    }
    unit = F.normalize(sampled, dim=1)
    assert scores["cosine"] == pytest.approx(unit.diag().mean().item(), rel=1e-6)
    others = unit[~torch.eye(4, dtype=torch.bool)].mean()
    assert scores["gap"] == pytest.approx((unit.diag().mean() - others).item(), rel=1e-6)
    with pytest.raises(ShapeError, match="embeddings: got"):
        score_embeddings(sampled, true[:3])


def test_f134_recall_counts_ties_in_random_order() -> None:
    """Oracle: the share of all orders of the tied images in which the own image is among the first k."""
    true = F.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    for sampled in (torch.zeros(40, 8), torch.ones(40, 8) * 0.3):
        scores = score_embeddings(sampled, true)
        assert [scores[f"recall_at_{k}"] for k in (1, 5, 10)] == pytest.approx([1 / 40, 5 / 40, 10 / 40]), scores
    assert score_embeddings(true, true, ranks=(1,))["recall_at_1"] == 1
    # The first three images are equal: a perfect prior tells their captions' images apart by chance alone.
    twins = true.clone()
    twins[:3] = twins[0]
    orders = list(itertools.permutations(range(3)))
    by_chance = [sum(order.index(0) < k for order in orders) / len(orders) for k in (1, 2)]
    scores = score_embeddings(twins * 3, twins, ranks=(1, 2))
    expected = [(37 + 3 * chance) / 40 for chance in by_chance]
    assert [scores["recall_at_1"], scores["recall_at_2"]] == pytest.approx(expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_f134_embeddings_that_are_not_finite_have_no_score(value: float) -> None:
    embeddings = torch.eye(4)
    broken = embeddings.clone()
    broken[2, 1] = value
    with pytest.raises(NonFiniteError, match="got 1 of 4 sampled ones"):
        score_embeddings(broken, embeddings)
    with pytest.raises(NonFiniteError, match="got 1 of 4 true ones"):
        score_embeddings(embeddings, broken)


def test_scores_of_single_captions_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(50, 6, generator=generator)
    sampled = true + torch.randn(50, 6, generator=generator)
    found = match(sampled, true, ranks=(1, 5))
    assert all(each.rows.shape == (50,) and each.is_per_image for each in found.values())
    cosines = F.normalize(sampled.double(), dim=1) @ F.normalize(true.double(), dim=1).T
    rank = (cosines > cosines.diag()[:, None]).sum(dim=1)
    assert torch.equal(found["recall_at_5"].rows, (rank < 5).double())
    assert torch.allclose(found["cosine"].rows, cosines.diag(), rtol=0, atol=1e-12)
    monkeypatch.setattr(retrieval, "_BLOCK", 7)
    blocked = match(sampled, true, ranks=(1, 5))
    assert {name: each.value for name, each in blocked.items()} == pytest.approx(
        {name: each.value for name, each in found.items()}, rel=1e-12
    )


def test_r_precision_of_few_captions_is_that_of_all_captions() -> None:
    """Oracle: the nearest of all different captions, since these are fewer than the candidates."""
    generator = torch.Generator().manual_seed(0)
    different = F.normalize(torch.randn(30, 6, generator=generator), dim=1)
    number = torch.randint(30, (80,), generator=generator)
    captions = [f"caption {index}" for index in number.tolist()]
    images = F.normalize(different[number] + 0.5 * torch.randn(80, 6, generator=generator), dim=1)
    found = r_precision(captions, images, different[number])
    present = different[number.unique()]
    expected = (images @ present.T).argmax(dim=1) == torch.searchsorted(number.unique(), number)
    assert found is not None and torch.equal(found, expected.double()) and 0.2 < found.mean() < 1


def test_r_precision_counts_a_hundred_candidates_and_ties_by_chance() -> None:
    captions = [f"caption {index}" for index in range(500)]
    text = F.normalize(torch.randn(500, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    perfect = r_precision(captions, text, text)
    assert perfect is not None and perfect.eq(1).all()
    equal = r_precision(captions, text[:1].expand(500, -1), text[:1].expand(500, -1))
    assert equal is not None and torch.allclose(equal, torch.full((500,), 0.01))
    images = F.normalize(torch.randn(500, 16, generator=torch.Generator().manual_seed(2)), dim=1)
    by_chance = r_precision(captions, images, text)
    assert by_chance is not None and by_chance.mean() == pytest.approx(0.01, abs=0.015)
    assert torch.equal(by_chance, r_precision(captions, images, text))  # type: ignore[arg-type]
    assert r_precision(["a"] * 5, images[:5], text[:5]) is None
