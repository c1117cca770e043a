"""Classes of captions."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from unclip.errors import ConfigError, InputError
from unclip.evaluation import scenes
from unclip.systems import classes
from unclip.systems.classes import SCENE_CLASSES, Classes, ClassesConfig, find_classes


def inputs(captions: list[str]) -> Any:
    """Training inputs that hold these captions."""

    def sample_rows(table: str, columns: tuple[str, ...], count: int) -> dict[str, list[str]]:
        assert (table, columns) == ("embeddings", ("caption",))
        return {"caption": captions[:count]}

    return SimpleNamespace(sample_rows=sample_rows)


def test_a_caption_belongs_to_the_first_class_whose_words_occur_in_it() -> None:
    found = Classes(["Red Circle", "circle", "sea-lion", "lion", "café"])
    captions = ["a small RED circle.", "circle of a red thing", "blue circle", "a lion at sea", "a lion", "Café", "no"]
    assert [found.find(caption) for caption in captions] == [0, 0, 1, 2, 3, 4, None]
    assert found.labels(captions).tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert found.find("redcircle") is None and found.find("") is None


def test_a_caption_that_is_the_name_of_a_class_belongs_to_it() -> None:
    """ImageNet has a crane and a crane."""
    found = Classes(["crane", "crane bird"])
    assert [found.find(caption) for caption in ("Crane, bird", "crane", "bird crane")] == [1, 0, 0]


def test_the_class_of_a_scene_is_the_colour_and_shape_of_its_object() -> None:
    rng, found = np.random.default_rng(0), Classes(SCENE_CLASSES)
    assert len(found) == 20
    for _ in range(200):
        scene = scenes.random_scene(rng, unseen=None)
        name = found.names[found.find(scenes.caption(scene, rng)) or 0]
        assert name == f"{scene.objects[0].colour} {scene.objects[0].shape}"


def test_captions_without_a_class_are_refused_with_the_classes() -> None:
    found = Classes(["red circle", "blue star"])
    found.check(["a red circle", "a blue star"])
    Classes().check(["anything"])
    with pytest.raises(InputError, match=r"got 'a red star', which belongs to no class .* red circle, blue star"):
        found.check(["a red circle", "a red star"])
    many = Classes([f"class {number}" for number in range(100)])
    with pytest.raises(InputError, match="class 39 and 60 more"):
        many.check(["a dog"])


@pytest.mark.parametrize("names", [["red circle", "Circle, red?", "Red-circle"], ["a", "!"]])
def test_classes_are_told_apart_by_their_words(names: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"names: got '(Red-circle|!)'"):
        Classes(names)


def test_every_distinct_caption_can_be_a_class() -> None:
    config = ClassesConfig("captions")
    found = find_classes(config, inputs(["dog", "cat", "Dog", "cat", "!!"]))
    assert [found.find(caption) for caption in ("CAT", "dog", "bird")] == [0, 1, None] and len(found) == 2
    with pytest.raises(ConfigError, match=r"there are 1 distinct captions, expected 2 to"):
        find_classes(config, inputs(["dog", "dog"]))
    with pytest.raises(ConfigError, match=r"2,001 distinct captions.* set classes.source to 'names'"):
        find_classes(config, inputs([f"caption {number}" for number in range(classes.MAX_FOUND + 1)]))


def test_classes_must_fit_the_captions() -> None:
    config = ClassesConfig("names", ("dog", "cat"))
    assert find_classes(config, inputs(["a bird", "a cat"])).names == ("dog", "cat")
    with pytest.raises(ConfigError, match="none of 2 captions, such as 'a bird'"):
        find_classes(config, inputs(["a bird", "a fish"]))
    assert len(find_classes(ClassesConfig(), inputs([]))) == 0


def test_settings_are_checked() -> None:
    for source, names in (("names", ()), ("names", ("one",)), ("scenes", ("a", "b"))):
        with pytest.raises(ConfigError, match="names: got"):
            ClassesConfig(source, names)  # type: ignore[arg-type]
