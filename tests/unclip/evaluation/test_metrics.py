"""Distances between embeddings, compared with closed forms; scores of scenes; features of batches."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.unclip.systems import tiny_stacks
from unclip import imaging
from unclip.errors import NonFiniteError, ShapeError
from unclip.evaluation import scenes
from unclip.evaluation.metrics import (
    LABELS,
    Features,
    Sampled,
    caption_diversity,
    concatenate,
    extract_features,
    frechet_distance,
    scene_accuracy,
    scene_binding,
    score_embeddings,
    score_scenes,
    values_of,
)


def gaussian(count: int, mean: torch.Tensor, covariance: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Return embeddings [count, E] with exactly this sample mean and covariance."""
    draws = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws = draws - draws.mean(dim=0)
    white = draws @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(draws.T))).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_with_common_axes() -> None:
    """|m1 - m2|^2 + the sum of (s1 - s2)^2 over standard deviations."""
    axes = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    stds = torch.tensor([[0.1, 0.5, 1.0, 2.0, 3.0], [0.2, 0.4, 1.5, 0.1, 3.0]], dtype=torch.float64)
    means = torch.tensor([[0.0, 1, 2, 3, 4], [1.0, 1, 1, 1, 1]], dtype=torch.float64)
    first, second = (gaussian(40 + n, means[n], axes * stds[n] ** 2 @ axes.T, seed=n) for n in (0, 1))
    expected = (means[0] - means[1]).square().sum() + (stds[0] - stds[1]).square().sum()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_gaussians_with_different_axes() -> None:
    """In two dimensions tr (C1 C2)^(1/2) = (tr C1 C2 + 2 (det C1 C2)^(1/2))^(1/2)."""
    covariances = torch.tensor([[[2.0, 0.8], [0.8, 1.0]], [[0.5, -0.3], [-0.3, 0.7]]], dtype=torch.float64)
    product = covariances[0] @ covariances[1]
    cross = math.sqrt(product.trace() + 2 * math.sqrt(product.det()))
    expected = covariances[0].trace() + covariances[1].trace() - 2 * cross
    first, second = (gaussian(30, torch.zeros(2, dtype=torch.float64), covariances[n], seed=n) for n in (0, 1))
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_fewer_embeddings_than_dimensions() -> None:
    few = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(few, few.flip(0)) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(few, few + 0.5) == pytest.approx(64 * 0.25, rel=1e-6)
    with pytest.raises(ShapeError, match="embeddings: got"):
        frechet_distance(few, few[:, :3])
    with pytest.raises(ShapeError, match="embeddings: got"):
        frechet_distance(few, few[:1])


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
def test_f134_what_is_not_finite_has_no_score(value: float) -> None:
    embeddings = torch.eye(4)
    broken = embeddings.clone()
    broken[2, 1] = value
    with pytest.raises(NonFiniteError, match="got 1 of 4 sampled ones"):
        score_embeddings(broken, embeddings)
    with pytest.raises(NonFiniteError, match="got 1 of 4 true ones"):
        score_embeddings(embeddings, broken)
    images = render(RED_CIRCLE, WRONG)
    images[1, 0, 0, 0] = value
    with pytest.raises(NonFiniteError, match=f"not finite for '{WRONG}'"):
        extract_features(tiny_stacks.tiny_clip(), images, [RED_CIRCLE, WRONG])


RED_CIRCLE = "a large red circle at the top on a white background"
WRONG = "a small blue circle at the top on a white background"
TWO = "a small red circle left of a small blue square on a black background"


def render(*captions: str | None) -> torch.Tensor:
    """Images of the scenes that captions describe; white for None."""
    found = [scenes.parse_caption(caption) if caption else None for caption in captions]
    rendered = [
        scenes.render(scene, np.random.default_rng(0), 64) if scene else np.full((64, 64, 3), 245, np.uint8)
        for scene in found
    ]
    return imaging.from_uint8(np.stack(rendered))


def test_scores_of_scenes() -> None:
    captions = [RED_CIRCLE, RED_CIRCLE, RED_CIRCLE, TWO]
    scores = score_scenes(render(RED_CIRCLE, WRONG, None, TWO), captions)
    assert scores is not None
    assert scores.accuracy() == {"colour": 0.5, "background": 1.0, "size": 0.5, "shape": 0.75, "place": 2 / 3}
    assert scores.all_correct() == [True, False, False, True]
    circle, square = LABELS["shape"].index("circle"), LABELS["shape"].index("square")
    assert scores.confusion("shape")[circle].tolist() == [3, 0, 0, 0, 0, 1], "the last column counts missing objects"
    assert scores.confusion("shape")[square].sum() == 0, "only first objects are counted"
    assert scores.confusion("colour")[list(scenes.COLOURS).index("red")].tolist() == [2, 0, 1, 0, 1]
    assert scores.confusion("size").tolist() == [[1, 0, 0], [1, 1, 1]]
    unplaced = score_scenes(render(TWO), [TWO])
    assert unplaced is not None and "place" not in unplaced.accuracy()
    assert score_scenes(render(TWO, TWO), [TWO, "a photograph of a harbour"]) is None


def test_a_colour_that_no_object_has_is_counted_as_other() -> None:
    purple = render(RED_CIRCLE)
    purple[:, :, (purple[0, 0] > 0.5) & (purple[0, 1] < 0)] = torch.tensor([140, 40, 170.0])[:, None] / 127.5 - 1
    scores = score_scenes(purple, [RED_CIRCLE])
    assert scores is not None and scores.accuracy()["shape"] == 1
    assert scores.confusion("colour")[list(scenes.COLOURS).index("red")].tolist() == [0, 0, 0, 0, 1]


def test_features_of_batches_are_those_of_all_images() -> None:
    captions = [RED_CIRCLE, WRONG, TWO, RED_CIRCLE, TWO]
    images, embeddings = render(*captions[1:], None), torch.randn(5, 4)

    def measure(part: slice) -> Features:
        return Features(embeddings[part], -embeddings[part], score_scenes(images[part], captions[part]))

    batches, whole = [measure(slice(0, 2)), measure(slice(2, 5))], measure(slice(0, 5))
    joined = concatenate(batches, 5)
    assert joined.image_embedding.equal(whole.image_embedding) and joined.text_embedding.equal(whole.text_embedding)
    assert joined.scenes is not None and whole.scenes is not None
    assert all(one.equal(other) for one, other in zip(joined.scenes, whole.scenes, strict=True))
    accuracy = {f"accuracy.{name}": value for name, value in whole.scenes.accuracy().items()}
    accuracy["accuracy.all"] = sum(whole.scenes.all_correct()) / 5
    found = values_of(scene_accuracy(Sampled(captions, joined, embeddings[:0])))
    assert found == pytest.approx(accuracy)
    without = [batch._replace(scenes=None) for batch in batches]
    for some in ([without[0], batches[1]], [batches[0], without[1]]):
        assert concatenate(some, 5).scenes is None, "as not all captions describe scenes"
    for count in (4, 6):
        with pytest.raises(ShapeError, match=f"got batches of 5 images together, expected {count}"):
            concatenate(batches, count)


def sampled(images: torch.Tensor, captions: list[str], embedding: torch.Tensor | None = None) -> Sampled:
    embedding = torch.eye(len(captions)) if embedding is None else embedding
    return Sampled(captions, Features(embedding, embedding, score_scenes(images, captions)), embedding[:0])


def test_attributes_that_went_to_the_other_object_are_counted_as_swapped() -> None:
    swapped_colour = TWO.replace("red", "x").replace("blue", "red").replace("x", "blue")
    swapped_shape = TWO.replace("circle", "x").replace("square", "circle").replace("x", "square")
    other_colour = TWO.replace("red", "green")
    images = render(TWO, swapped_colour, swapped_shape, other_colour)
    found = values_of(scene_binding(sampled(images, [TWO] * 4)))
    assert found == {"swapped.shape": 0.25, "swapped.colour": 0.25}, (
        "both objects are small, so no sizes can be swapped"
    )
    assert scene_binding(sampled(render(RED_CIRCLE), [RED_CIRCLE])) == {}
    same_colour = TWO.replace("blue", "red")
    assert values_of(scene_binding(sampled(render(same_colour), [same_colour]))) == {"swapped.shape": 0.0}


def test_diversity_at_a_fixed_caption() -> None:
    anywhere = "a small red circle on a white background"
    places = [f"a small red circle {words} on a white background" for words in
              ("on the left", "on the right", "at the top", "at the bottom", "in the center")]  # fmt: skip
    everywhere = values_of(caption_diversity(sampled(render(*places), [anywhere] * 5)))
    assert everywhere == {"pairwise_distance": pytest.approx(1), "place_entropy": pytest.approx(1)}
    same = torch.eye(5)[:1].expand(5, -1)
    assert values_of(caption_diversity(sampled(render(*places[:1] * 5), [anywhere] * 5, same))) == {
        "pairwise_distance": pytest.approx(0, abs=1e-12),
        "place_entropy": pytest.approx(0),
    }
    two_places = values_of(caption_diversity(sampled(render(*places[:2], None, None), [anywhere] * 4)))
    assert two_places["place_entropy"] == pytest.approx(math.log(2) / math.log(5)), (
        "images without an object do not count"
    )
    placed = caption_diversity(sampled(render(*places[:1] * 2), places[:1] * 2))
    assert set(placed) == {"pairwise_distance"}, "a caption that names a place leaves no choice"
    assert caption_diversity(sampled(render(*places), [anywhere] * 4 + [RED_CIRCLE])) == {}, "one caption occurs once"
    half = caption_diversity(
        sampled(render(*places[:2] * 2), [anywhere] * 2 + [places[0]] * 2, torch.eye(4)[[0, 0, 1, 2]])
    )
    assert half["pairwise_distance"].value == pytest.approx(0.5), (
        "the mean over captions; pairs of different captions do not count"
    )
