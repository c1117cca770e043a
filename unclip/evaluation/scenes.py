"""Procedural images with exactly known content, their captions, and a measurement of that content from pixels.

A scene is one object on a plain background ("a small yellow star at the top on a purple background"), or two in a
relation ("a small red circle left of a small blue square on white"). `parse_caption` inverts `caption`, `measure`
inverts `render`, so a text-to-image model trained on scenes is scored from its pixels alone, without a learned judge.

Letters in shapes: H, W image; S = 64, the size at which images are measured; V vertices; R templates.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from unclip.errors import InputError

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Pixels = NDArray[np.uint8]
Words = dict[str, tuple[str, ...]]  # meaning -> synonyms
Variant = Literal["single", "relations"]

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {"red": (215, 30, 40), "green": (35, 155, 70), "blue": (30, 90, 230), "yellow": (250, 225, 60)}
BACKGROUNDS = {"purple": (140, 40, 170), "white": (245, 245, 245), "black": (15, 15, 15)}
_RGB = COLOURS | BACKGROUNDS  # pairwise at least 130 of 255 apart
SIZES = ("small", "large")
PLACES = ("left", "right", "top", "bottom", "center")
RELATIONS = ("left of", "right of", "above", "below")

UNSEEN: frozenset[tuple[str, str]] = frozenset(
    {("circle", "blue"), ("square", "yellow"), ("triangle", "red"), ("star", "green"), ("cross", "blue")}
)
"""(shape, colour) pairs kept out of training data, to test if a model combines attributes it has seen only separately."""

# Lengths are fractions of the image size.
_EXTENT = {"small": 0.42, "large": 0.70}  # longest side of the object's bounding box
_SHIFT = {"small": 0.26, "large": 0.11}  # from the image centre to the object's, except for the place "center"
# Directions are (x, y), y downward; for a relation, that of the first object.
_DIRECTION = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "center": (0, 0)}
_RELATION_DIRECTION = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True)
class SceneObject:
    """One object in an image: values of `SHAPES`, `COLOURS` and `SIZES`."""

    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """Content of an image: one object and a place, or two and a relation; a measured scene may have no object."""

    objects: tuple[SceneObject, ...]
    background: str
    """A key of `BACKGROUNDS`."""
    place: str | None
    """A value of `PLACES`; None if it is not named, or for two objects."""
    relation: str | None
    """A value of `RELATIONS`, from the first object to the second; None for one object."""


def random_scene(rng: np.random.Generator, *, variant: Variant = "single", unseen: bool | None = False) -> Scene:
    """Draw a random scene. Two objects always differ in shape and colour, so that swapped attributes are noticed.

    Args:
        rng: the only source of randomness.
        variant: "single" is one object and a place; "relations" is two small objects and a relation.
        unseen: False excludes the `UNSEEN` pairs, True takes the first object, and only it, from them, None allows all pairs.
    """
    pairs = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    allowed = [pair for pair in pairs if unseen is None or (pair in UNSEEN) is unseen]
    shape, colour = allowed[rng.integers(len(allowed))]
    background = str(rng.choice(list(BACKGROUNDS)))
    if variant == "single":
        first = SceneObject(shape, colour, str(rng.choice(SIZES)))
        return Scene((first,), background, str(rng.choice(PLACES)), None)
    others = [
        (s, c) for s, c in pairs
        if s != shape and c != colour and (unseen is None or (s, c) not in UNSEEN)
    ]  # fmt: skip
    second = SceneObject(*others[rng.integers(len(others))], "small")
    return Scene((SceneObject(shape, colour, "small"), second), background, None, str(rng.choice(RELATIONS)))


# ---------------------------------------------------------------------------------------------------- drawing


def render(scene: Scene, rng: np.random.Generator, image_size: int) -> Pixels:
    """Render a scene, antialiased, with a little jitter of colour, size, place and angle.

    Args:
        scene: one object, centered if it has no place, or two objects with a relation.
        rng: the source of the jitter; the same state and arguments give the same image.
        image_size: height and width in pixels.

    Returns:
        [image_size, image_size, 3] uint8.

    Raises:
        InputError: the number of objects does not fit the relation.
    """
    if len(scene.objects) != (1 if scene.relation is None else 2):
        raise InputError(f"scene: got {scene}, expected one object, or two objects and a relation.")
    canvas = np.broadcast_to(_jittered_colour(scene.background, rng), (image_size, image_size, 3))
    for index, item in enumerate(scene.objects):
        if scene.relation is None:
            direction = np.array(_DIRECTION[scene.place or "center"])
            centre = 0.5 + _SHIFT[item.size] * direction + rng.uniform(-0.015, 0.015, 2)
        else:
            direction = np.array(_RELATION_DIRECTION[scene.relation]) * (1 if index == 0 else -1)
            reach = np.where(direction == 0, 0.08, 0.03)  # each object stays within its half
            centre = 0.5 + 0.25 * direction + rng.uniform(-reach, reach)
        extent = _EXTENT[item.size] * rng.uniform(0.95, 1.05)
        outline = _outline(item.shape, degrees=rng.uniform(-6, 6))
        cover = _coverage((centre + extent * outline) * image_size, image_size)[..., None]
        canvas = canvas + cover * (_jittered_colour(item.colour, rng) - canvas)
    return np.rint(canvas).astype(np.uint8)


def _jittered_colour(name: str, rng: np.random.Generator) -> Floats:
    return np.clip(np.array(_RGB[name]) + rng.uniform(-8, 8, 3), 0, 255)


def _outline(shape: str, degrees: float) -> Floats:
    """Return the rotated outline of a shape, [V, 2] as (x, y): centred on 0, with a bounding box whose longest side is 1."""
    if shape == "circle":
        vertices = _on_circle(40)
    elif shape == "square":
        vertices = np.array([(-1.0, -1), (1, -1), (1, 1), (-1, 1)])
    elif shape == "triangle":
        vertices = np.array([(0.0, -1), (1, 1), (-1, 1)])
    elif shape == "star":
        vertices = _on_circle(10) * np.where(np.arange(10) % 2, 0.45, 1.0)[:, None]
    else:
        arm = np.array([(-1 / 3, -1), (1 / 3, -1), (1 / 3, -1 / 3)])
        vertices = np.concatenate([arm @ _rotation(90 * quarter) for quarter in range(4)])
    vertices = vertices @ _rotation(degrees)
    low, high = vertices.min(0), vertices.max(0)
    return np.asarray((vertices - (low + high) / 2) / (high - low).max())


def _on_circle(num_vertices: int) -> Floats:
    angle = np.arange(num_vertices) * (2 * np.pi / num_vertices)
    return np.stack([np.sin(angle), -np.cos(angle)], axis=1)  # the first vertex is at the top


def _rotation(degrees: float) -> Floats:
    """Return the [2, 2] matrix that rotates row vectors (x, y), y downward, clockwise."""
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([(cos, sin), (-sin, cos)])


def _coverage(vertices: Floats, image_size: int, samples: int = 4) -> Floats:
    """Compute the fraction of each pixel that a polygon covers: exact along rows, with `samples` scan lines per pixel.

    Args:
        vertices: [V, 2] (x, y) in pixels, in order along the outline.
        image_size: height and width in pixels.

    Returns:
        [image_size, image_size] in [0, 1].
    """
    right_edge = np.arange(1, image_size + 1)
    cover = np.zeros((image_size * samples, image_size))
    for (x0, y0), (x1, y1) in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
        first, last = np.clip(np.ceil(np.array([y0, y1]) * samples - 0.5), 0, image_size * samples).astype(int)
        lines = np.arange(min(first, last), max(first, last))
        if len(lines):
            x = x0 + ((lines + 0.5) / samples - y0) * ((x1 - x0) / (y1 - y0))
            cover[lines[0] : lines[-1] + 1] += np.sign(y0 - y1) * np.clip(right_edge - x[:, None], 0, 1)
    return np.asarray(np.abs(cover).reshape(image_size, samples, image_size).mean(1))


# --------------------------------------------------------------------------------------------------- captions

_SIZE_WORDS: Words = {"small": ("small", "tiny", "little"), "large": ("large", "big", "huge")}
_PLACE_WORDS: Words = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "center": ("in the center", "in the middle"),
}
_RELATION_WORDS: Words = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
# {object} is "small red circle" or "small red circle left of a tiny blue star", {place} is "" or " at the top".
_TEMPLATES = (
    "a {object}{place} on a {background} background",
    "a {object}{place} on {background}",
    "a {object}{place}, {background} background",
    "a {object} on a {background} background{place}",
    "a {object} is shown{place} against {background}",
    "{background} background with a {object}{place}",
    "a {background} background and a {object}{place}",
    "there is a {object}{place}, the background is {background}",
    "a picture of a {object}{place} on a {background} background",
    "a drawing of a {object}{place} against a {background} background",
    "an image with a {background} background and a {object}{place}",
    "on a {background} background there is a {object}{place}",
)


def caption(scene: Scene, rng: np.random.Generator, *, with_place: bool | None = None) -> str:
    """Describe a scene in one of many wordings, in lower case.

    Args:
        scene: as for `render`.
        rng: chooses template and synonyms.
        with_place: True names the place, False omits it, None names it half of the time if there is one.

    Raises:
        InputError: `with_place` is True and the scene has no place.
    """
    if with_place and scene.place is None:
        raise InputError(f"with_place: got True for a scene without a place ({scene}), expected False or None.")
    phrases = [f"{rng.choice(_SIZE_WORDS[o.size])} {o.colour} {o.shape}" for o in scene.objects]
    named = scene.place is not None and (rng.random() < 0.5 if with_place is None else with_place)
    place = f" {rng.choice(_PLACE_WORDS[scene.place])}" if named and scene.place else ""
    if scene.relation is not None:
        phrases.insert(1, f" {rng.choice(_RELATION_WORDS[scene.relation])} a ")
    return _TEMPLATES[rng.integers(len(_TEMPLATES))].format(
        object="".join(phrases),
        place=place,
        background=scene.background,
    )


def parse_caption(text: str) -> Scene | None:
    """Return the scene that a caption describes; None for a text that `caption` cannot produce.

    Case, spacing and a final full stop do not matter. The place is None if the text names none.
    """
    text = re.sub(r"\s+", " ", text.lower()).strip(" .")
    for pattern in _patterns():
        if found := pattern.fullmatch(text):
            word = found.groupdict()
            place = _meaning(_PLACE_WORDS, word["place"]) if word["place"] else None
            relation = _meaning(_RELATION_WORDS, word["relation"]) if word["relation"] else None
            objects = tuple(
                SceneObject(word[f"shape{i}"], word[f"colour{i}"], _meaning(_SIZE_WORDS, word[f"size{i}"]))
                for i in range(2 if relation else 1)
            )
            return None if place and relation else Scene(objects, word["background"], place, relation)
    return None


def _meaning(words: Words, phrase: str) -> str:
    return next(meaning for meaning, synonyms in words.items() if phrase in synonyms)


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    """Return one pattern per template, with a named group for each variable word."""

    def group(name: str, words: Words) -> str:
        return f"(?P<{name}>{'|'.join(word for synonyms in words.values() for word in synonyms)})"

    def object_pattern(i: int) -> str:
        size, colours, shapes = group(f"size{i}", _SIZE_WORDS), "|".join(COLOURS), "|".join(SHAPES)
        return f"{size} (?P<colour{i}>{colours}) (?P<shape{i}>{shapes})"

    parts = {
        "object": f"{object_pattern(0)}(?: {group('relation', _RELATION_WORDS)} a {object_pattern(1)})?",
        "place": f"(?: {group('place', _PLACE_WORDS)})?",
        "background": f"(?P<background>{'|'.join(BACKGROUNDS)})",
    }
    return tuple(re.compile(template.format(**parts)) for template in _TEMPLATES)


# -------------------------------------------------------------------------------------------------- measuring

_MEASURED_SIZE = 64  # pixels; images are measured at this size
_FRAME = 20  # pixels; silhouettes are compared at this size
_MIN_CONTRAST = 45.0  # of 255, in RGB; the minimum between an object and the background


def measure(image: Pixels, *, num_objects: int = 1, relation: str | None = None) -> Scene:
    """Read a scene from the pixels of any image: rendered, compressed, noisy, blurred or generated.

    Only the layout is given in advance, so a wrong image is measured as it is. With a relation, the image is split
    into halves and each object is searched in its own half. Objects that are not found are omitted. Found objects get
    the nearest colour and the most similar shape, however different.

    Args:
        image: [H, W, 3] uint8, of any size.
        num_objects: 1, or 2 with a relation.
        relation: one of `RELATIONS`, which determines the half of the first object; None for one object.

    Raises:
        InputError: the image is not [H, W, 3] uint8, or `num_objects` does not fit `relation`.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"image: got {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3].")
    if not ((num_objects == 1 and relation is None) or (num_objects == 2 and relation in RELATIONS)):
        raise InputError(f"relation: got {relation!r} for {num_objects} objects, expected None for 1, "
                         f"one of {', '.join(RELATIONS)} for 2.")  # fmt: skip
    rows, columns = (_resampling(length, 0, length, _MEASURED_SIZE) for length in image.shape[:2])
    pixels = np.einsum("yh,hwc,xw->yxc", rows, image.astype(np.float64), columns, optimize=True)  # [S, S, 3]
    border = np.ones((_MEASURED_SIZE, _MEASURED_SIZE), bool)
    border[2:-2, 2:-2] = False
    background = np.median(pixels[border], axis=0)
    found = [_find_object(pixels, background, half) for half in _halves(relation)]
    objects = tuple(item for item, _ in filter(None, found))
    place = found[0][1] if relation is None and found[0] else None
    return Scene(objects, _nearest_colour(background), place, relation)


def score(measured: Scene, expected: Scene) -> dict[str, bool]:
    """Compare the attributes of a measured scene, over all its objects; a missing object makes its attributes wrong.

    Returns:
        Keys "colour", "background", "size", "shape", and "place" if `expected` names one.
    """
    complete = len(measured.objects) == len(expected.objects)
    pairs = list(zip(measured.objects, expected.objects, strict=False))
    right = {
        "colour": complete and all(got.colour == want.colour for got, want in pairs),
        "background": measured.background == expected.background,
        "size": complete and all(got.size == want.size for got, want in pairs),
        "shape": complete and all(got.shape == want.shape for got, want in pairs),
    }
    return right if expected.place is None else right | {"place": measured.place == expected.place}


def _halves(relation: str | None) -> list[tuple[slice, slice]]:
    """Return the region of each object, as slices (rows, columns) of [S, S]."""
    if relation is None:
        return [(slice(None), slice(None))]
    near, far = slice(0, _MEASURED_SIZE // 2), slice(_MEASURED_SIZE // 2, _MEASURED_SIZE)
    x, y = _RELATION_DIRECTION[relation]
    halves = [(slice(None), near), (slice(None), far)] if x else [(near, slice(None)), (far, slice(None))]
    return halves if x + y < 0 else halves[::-1]


def _find_object(pixels: Floats, background: Floats, half: tuple[slice, slice]) -> tuple[SceneObject, str] | None:
    """Find the object in a part of an image; return it with its place in the whole image, or None.

    Args:
        pixels: [S, S, 3] in [0, 255].
        background: [3], background colour.
        half: slices of the rows and columns to search.
    """
    visible = np.zeros((_MEASURED_SIZE, _MEASURED_SIZE), bool)
    visible[half] = True
    contrast = np.linalg.norm(pixels - background, axis=2) * visible  # [S, S]
    smooth = _blur(3.0)
    y, x = np.unravel_index(np.argmax(smooth @ contrast @ smooth.T), contrast.shape)  # deep inside the object
    colour = np.median(pixels[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3].reshape(-1, 3), axis=0)
    step = colour - background
    if np.linalg.norm(step) < _MIN_CONTRAST:
        return None
    alpha = np.clip((pixels - background) @ step / (step @ step), 0, 1) * visible  # [S, S], 1 inside the object
    mask = _component(alpha > 0.5, int(y), int(x))
    inside = mask & ~_dilate(~mask)
    if not inside.any():
        return None
    top, bottom, left, right = _box(mask)
    size = "large" if max(bottom - top, right - left) > _MEASURED_SIZE * sum(_EXTENT.values()) / 2 else "small"
    templates, shapes = _templates()
    silhouette = _silhouette(alpha * _dilate(_dilate(mask)))
    shape = shapes[np.argmin(((templates - silhouette) ** 2).sum(1))]
    colour_name = _nearest_colour(np.median(pixels[inside], axis=0))
    offset_x, offset_y = (left + right) / 2 / _MEASURED_SIZE - 0.5, (top + bottom) / 2 / _MEASURED_SIZE - 0.5
    if max(abs(offset_x), abs(offset_y)) < _SHIFT[size] / 2:
        place = "center"
    elif abs(offset_x) > abs(offset_y):
        place = "left" if offset_x < 0 else "right"
    else:
        place = "top" if offset_y < 0 else "bottom"
    return SceneObject(shape, colour_name, size), place


def _nearest_colour(colour: Floats) -> str:
    """Return the name in `COLOURS` or `BACKGROUNDS` of the colour nearest to [3] RGB."""
    return min(_RGB, key=lambda name: float(np.linalg.norm(colour - np.array(_RGB[name]))))


def _component(mask: Mask, y: int, x: int) -> Mask:
    """Return the 4-connected component of [S, S] `mask` that contains the pixel (y, x)."""
    part = np.zeros_like(mask)
    part[y, x] = mask[y, x]
    while (dilated := _dilate(part) & mask).sum() > part.sum():
        part = dilated
    return part


def _dilate(mask: Mask) -> Mask:
    """Dilate `mask` by its 4-neighbours."""
    dilated = mask.copy()
    dilated[1:] |= mask[:-1]
    dilated[:-1] |= mask[1:]
    dilated[:, 1:] |= mask[:, :-1]
    dilated[:, :-1] |= mask[:, 1:]
    return dilated


def _box(mask: Mask) -> tuple[int, int, int, int]:
    """Return the bounding box (top, bottom, left, right) of a non-empty mask; bottom and right are exclusive."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(ys[0]), int(ys[-1]) + 1, int(xs[0]), int(xs[-1]) + 1


def _silhouette(alpha: Floats) -> Floats:
    """Crop the [S, S] opacity of one object to its bounding box with a margin; return [_FRAME * _FRAME]."""
    top, bottom, left, right = _box(alpha > 0.5)
    reach = 0.6 * max(bottom - top, right - left)
    y, x = (top + bottom) / 2, (left + right) / 2
    rows = _resampling(_MEASURED_SIZE, y - reach, y + reach, _FRAME)
    columns = _resampling(_MEASURED_SIZE, x - reach, x + reach, _FRAME)
    return (rows @ alpha @ columns.T).reshape(-1)


@cache
def _templates() -> tuple[Floats, tuple[str, ...]]:
    """Return silhouettes of all shapes in several sizes, angles and blurs, [R, _FRAME * _FRAME], and their shapes."""
    silhouettes, shapes = [], []
    for shape in SHAPES:
        for degrees in (-8, -4, 0, 4, 8):
            for extent in _EXTENT.values():
                cover = _coverage((0.5 + extent * _outline(shape, degrees)) * _MEASURED_SIZE, _MEASURED_SIZE)
                for sigma in (0.5, 1.0, 2.0, 3.0):
                    silhouettes.append(_silhouette(_blur(sigma) @ cover @ _blur(sigma).T))
                    shapes.append(shape)
    return np.stack(silhouettes), tuple(shapes)


@cache
def _blur(sigma: float) -> Floats:
    """Return the [S, S] matrix that blurs along one axis; sigma in pixels."""
    position = np.arange(_MEASURED_SIZE)
    weights = np.exp(-0.5 * ((position[:, None] - position) / sigma) ** 2)
    return np.asarray(weights / weights.sum(1, keepdims=True))


def _resampling(length: int, start: float, stop: float, num: int) -> Floats:
    """Return the [num, length] matrix that resamples one axis from start to stop (pixels): bilinear, antialiased."""
    scale = (stop - start) / num
    centres = start + (np.arange(num) + 0.5) * scale - 0.5
    distance = np.abs(np.clip(centres, 0, length - 1)[:, None] - np.arange(length))
    weights = np.clip(1 - distance / max(scale, 1.0), 0, None)
    return np.asarray(weights / weights.sum(1, keepdims=True))
