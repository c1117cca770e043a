"""Scores of scenes, features of batches, and the metrics that are made of them."""

import math

import numpy as np
import pytest
import torch

from tests.unclip.systems import tiny_stacks
from unclip import imaging
from unclip.errors import NonFiniteError, ShapeError
from unclip.evaluation import scenes
from unclip.evaluation.distances import Statistics, frechet, kernel_distance
from unclip.evaluation.intervals import intervals_of
from unclip.evaluation.metrics import (
    LABELS,
    Features,
    Sampled,
    caption_diversity,
    concatenate,
    extract_features,
    measure,
    scene_accuracy,
    scene_binding,
    score_scenes,
    values_of,
)

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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_f134_images_that_are_not_finite_have_no_score(value: float) -> None:
    images = render(RED_CIRCLE, WRONG)
    images[1, 0, 0, 0] = value
    with pytest.raises(NonFiniteError, match=f"not finite for '{WRONG}'"):
        extract_features(tiny_stacks.tiny_clip(), images, [RED_CIRCLE, WRONG])


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

    def features(part: slice) -> Features:
        return Features(embeddings[part], -embeddings[part], score_scenes(images[part], captions[part]))

    batches, whole = [features(slice(0, 2)), features(slice(2, 5))], features(slice(0, 5))
    joined = concatenate(batches, 5)
    assert joined.image_embedding.equal(whole.image_embedding) and joined.text_embedding.equal(whole.text_embedding)
    assert joined.scenes is not None and whole.scenes is not None
    assert all(one.equal(other) for one, other in zip(joined.scenes, whole.scenes, strict=True))
    accuracy = {f"accuracy.{name}": value for name, value in whole.scenes.accuracy().items()}
    accuracy["accuracy.all"] = sum(whole.scenes.all_correct()) / 5
    found = values_of(scene_accuracy(Sampled(captions, joined)))
    assert found == pytest.approx(accuracy)
    without = [batch._replace(scenes=None) for batch in batches]
    for some in ([without[0], batches[1]], [batches[0], without[1]]):
        assert concatenate(some, 5).scenes is None, "as not all captions describe scenes"
    for count in (4, 6):
        with pytest.raises(ShapeError, match=f"got batches of 5 images together, expected {count}"):
            concatenate(batches, count)


def sampled(images: torch.Tensor, captions: list[str], embedding: torch.Tensor | None = None) -> Sampled:
    embedding = torch.eye(len(captions)) if embedding is None else embedding
    return Sampled(captions, Features(embedding, embedding, score_scenes(images, captions)))


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


def test_each_distance_is_named_after_its_features() -> None:
    """Without Inception's features nothing is called FID or KID; without held-out images nothing is measured."""
    embedding, real = torch.randn(20, 4), Statistics.of(torch.randn(30, 4))
    inception, real_inception = torch.randn(20, 6), Statistics.of(torch.randn(30, 6))
    captions = [f"caption {number}" for number in range(20)]
    features = Features(embedding, embedding, None)
    of_clip = {"clip_frechet_distance", "clip_kid", "cmmd"}
    of_clip |= {f"clip_{name}" for name in ("precision", "recall", "density", "coverage")}
    found = set(measure(Sampled(captions, features, real)))
    assert found == of_clip | {"clip_score", "clip_r_precision"}
    measured = measure(Sampled(captions, features._replace(inception=inception), real, real_inception))
    assert set(measured) - found == {"frechet_inception_distance", "kernel_inception_distance"}
    assert measured["frechet_inception_distance"].value == frechet(inception, real_inception).value
    assert measured["kernel_inception_distance"].value == kernel_distance(inception, real_inception).value
    assert measured["clip_kid"].value == kernel_distance(embedding, real).value
    assert set(measure(Sampled(captions, features))) == {"clip_score", "clip_r_precision"}
    single = Features(embedding[:1], embedding[:1], None, inception[:1])
    assert set(measure(Sampled(captions[:1], single, real, real_inception))) == {"clip_score"}
    assert not intervals_of(measure(Sampled(captions[:1], single, real, real_inception)))
