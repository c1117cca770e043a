import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from unclip.errors import InputError
from unclip.evaluation import scenes
from unclip.evaluation.scenes import Scene, SceneObject

VARIANTS: tuple[scenes.Variant, ...] = ("single", "relations")


def scenes_of(variant: scenes.Variant, count: int) -> list[tuple[Scene, np.random.Generator]]:
    rngs = [np.random.default_rng([7, index]) for index in range(count)]
    return [(scenes.random_scene(rng, variant=variant, unseen=None), rng) for rng in rngs]


def accuracy(variant: scenes.Variant, distort) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    for scene, rng in scenes_of(variant, 300):
        image = distort(scenes.render(scene, rng, 64), rng)
        measured = scenes.measure(image, num_objects=len(scene.objects), relation=scene.relation)
        for name, value in scenes.score(measured, scene).items():
            right.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in right.items()}


def jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=60)
    return np.asarray(Image.open(buffer))


def low_resolution(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BOX).resize((64, 64)))


def noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (image + rng.normal(0, 12, image.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("distort", [lambda image, rng: image, jpeg, low_resolution, noise])
def test_measuring_recovers_the_rendered_scene(variant: scenes.Variant, distort) -> None:
    for name, share in accuracy(variant, distort).items():
        assert share >= 0.98, (name, share)


def test_measuring_detects_each_wrong_attribute() -> None:
    """Guards against a measurement that accepts everything, which would pass the test above."""
    rng = np.random.default_rng(0)
    rendered = Scene((SceneObject("star", "yellow", "small"),), "purple", "left", None)
    measured = scenes.measure(scenes.render(rendered, rng, 64))
    for wrong, attribute in (
        (Scene((SceneObject("circle", "yellow", "small"),), "purple", "left", None), "shape"),
        (Scene((SceneObject("star", "red", "small"),), "purple", "left", None), "colour"),
        (Scene((SceneObject("star", "yellow", "large"),), "purple", "left", None), "size"),
        (Scene((SceneObject("star", "yellow", "small"),), "white", "left", None), "background"),
        (Scene((SceneObject("star", "yellow", "small"),), "purple", "right", None), "place"),
    ):
        scores = scenes.score(measured, wrong)
        assert [name for name, right in scores.items() if not right] == [attribute]


@pytest.mark.parametrize("content", ["noise", "plain"])
def test_an_image_without_objects_scores_low(content: str) -> None:
    rng = np.random.default_rng(0)
    hits = []
    for scene, _ in scenes_of("single", 200):
        pixels = rng.integers(0, 256, (64, 64, 3)) if content == "noise" else np.full((64, 64, 3), 245)
        hits.append(all(scenes.score(scenes.measure(pixels.astype(np.uint8)), scene).values()))
    assert np.mean(hits) < 0.02


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_caption_describes_its_scene(variant: scenes.Variant) -> None:
    for scene, rng in scenes_of(variant, 400):
        text = scenes.caption(scene, rng, with_place=variant == "single")
        assert scenes.parse_caption(text) == scene, text
        assert scenes.parse_caption(f"  {text.upper()}. ") == scene


def test_captions_vary() -> None:
    scene = Scene((SceneObject("star", "yellow", "small"),), "purple", "left", None)
    assert len({scenes.caption(scene, np.random.default_rng(seed)) for seed in range(300)}) > 60


@pytest.mark.parametrize(
    "text", ["", "a cat", "a small pink circle on a white background", "a small red circle on a red background"]
)
def test_other_texts_describe_no_scene(text: str) -> None:
    assert scenes.parse_caption(text) is None


def test_the_caption_of_the_readme_describes_a_scene() -> None:
    scene = scenes.parse_caption("a small yellow star on a purple background")
    assert scene == Scene((SceneObject("star", "yellow", "small"),), "purple", None, None)


def test_unseen_pairs_stay_out_of_training_scenes() -> None:
    pairs = Counter()
    for index in range(2000):
        rng = np.random.default_rng(index)
        [thing] = scenes.random_scene(rng).objects
        pairs[thing.shape, thing.colour] += 1
    assert not pairs.keys() & scenes.UNSEEN
    assert len(pairs) == len(scenes.SHAPES) * len(scenes.COLOURS) - len(scenes.UNSEEN)
    [thing] = scenes.random_scene(np.random.default_rng(0), unseen=True).objects
    assert (thing.shape, thing.colour) in scenes.UNSEEN


def test_the_same_seed_renders_the_same_image() -> None:
    scene, _ = scenes_of("single", 1)[0]
    first, second = (scenes.render(scene, np.random.default_rng(3), 48) for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, scenes.render(scene, np.random.default_rng(4), 48))


def test_invalid_images_are_refused() -> None:
    with pytest.raises(InputError, match=r"float64 \[4, 4, 3\]"):
        scenes.measure(np.zeros((4, 4, 3)))
    with pytest.raises(InputError, match="relation"):
        scenes.measure(np.zeros((4, 4, 3), np.uint8), num_objects=2)
