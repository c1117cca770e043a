"""What manipulations do to pictures whose content is known, read back from pixels.

    python -m benchmarks.manipulations --storage unclip-data --out pictures

Needs a stack that was trained on scenes, such as the demo's. Prints a table, and writes a grid for each manipulation.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.published import find_stack
from tasks.store import DEFAULT_ROOT
from unclip import imaging
from unclip.evaluation import metrics, scenes
from unclip.evaluation.scenes import Scene, SceneObject
from unclip.systems.system import load_system
from unclip.systems.unclip import manipulations
from unclip.systems.unclip.stack import Stack

THETAS = tuple(index / 8 for index in range(9))
EDIT_THETA = 0.5
SHOWN = 6  # rows of each grid


class Result(NamedTuple):
    numbers: dict[str, float]
    """What came out as it should, as shares; levels are of 255."""
    grid: Tensor
    """[N, 3, S, S], some of them."""
    columns: int


def reconstruction(stack: Stack, num: int, seed: int = 0) -> Result:
    """Taken apart and drawn again: scenes are measured as before."""
    drawn_scenes = [scenes.random_scene(_rng(seed, index)) for index in range(num)]
    images = render(drawn_scenes, stack.image_size, seed)
    again = manipulations.draw(stack, manipulations.invert(stack, images))
    right = [
        all(scenes.score(scenes.measure(after), scenes.measure(before)).values())
        for before, after in zip(imaging.to_uint8(images), imaging.to_uint8(again), strict=True)
    ]
    pairs = torch.stack([images, again], dim=1)[:SHOWN].flatten(0, 1)
    error = float((images - again).abs().mean()) * 127.5  # the upsamplers' share included
    return Result({"the same in all attributes": float(np.mean(right)), "levels of difference": error}, pairs, 2)


def text_diff(stack: Stack, num: int, seed: int = 0) -> Result:
    """Red things told to be blue: colour must change, shape and place must not."""
    shapes = [
        name for name in scenes.SHAPES if (name, "blue") not in scenes.UNSEEN and (name, "red") not in scenes.UNSEEN
    ]
    before, after = [], []
    for index in range(num):
        rng = _rng(seed, index)
        scene = scenes.random_scene(rng)
        item = SceneObject(str(rng.choice(shapes)), "red", scene.objects[0].size)
        before.append(dataclasses.replace(scene, objects=(item,)))
        after.append(dataclasses.replace(scene, objects=(dataclasses.replace(item, colour="blue"),)))
    images = render(before, stack.image_size, seed)
    base_captions, captions = (
        [scenes.caption(scene, _rng(seed, index), with_place=True) for index, scene in enumerate(told)]
        for told in (before, after)
    )  # in the same words, but for the colour
    thetas = (0.0, EDIT_THETA)
    drawn = manipulations.text_diff(stack, images, captions, base_captions, thetas)
    found = [scenes.measure(pixels) for pixels in imaging.to_uint8(drawn[:, 1])]
    scores = [scenes.score(measured, expected) for measured, expected in zip(found, after, strict=True)]
    numbers = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    kept = [score["colour"] and score["shape"] and score["place"] for score in scores]
    row = torch.cat([images[:, None], drawn], dim=1)[:SHOWN]
    return Result({**numbers, "colour, shape and place": float(np.mean(kept))}, row.flatten(0, 1), len(thetas) + 1)


def interpolation(stack: Stack, num: int, seed: int = 0) -> Result:
    """Between scenes that differ in one thing, that one must move one way."""
    numbers, rows = {}, []
    for name in ("place", "size", "background"):
        ends = [_pair(name, _rng(seed, index)) for index in range(num)]
        first, second = (render([pair[end] for pair in ends], stack.image_size, seed) for end in (0, 1))
        drawn = manipulations.interpolate(stack, first, second, THETAS)  # [B, N, 3, S, S]
        placement = metrics.placement(drawn.flatten(0, 1))
        moving = {"place": placement.centre[:, 0], "size": placement.area, "background": placement.background}[name]
        numbers[f"{name} moves one way"] = float(metrics.monotone(moving.reshape(num, -1)).mean())
        rows.append(drawn[: SHOWN // 3].flatten(0, 1))
    return Result(numbers, torch.cat(rows), len(THETAS))


def inpainting(stack: Stack, num: int, seed: int = 0) -> Result:
    """The half with the object repainted with another object: what is known stays, what is new is what was asked for."""
    before, after = [], []
    for index in range(num):
        rng = _rng(seed, index)
        one, other = scenes.random_scene(rng), scenes.random_scene(rng)
        small = dataclasses.replace(one.objects[0], size="small"), dataclasses.replace(other.objects[0], size="small")
        before.append(dataclasses.replace(one, objects=small[:1], place="left"))
        after.append(dataclasses.replace(one, objects=small[1:], place="left"))
    images = render(before, stack.image_size, seed)
    edge = round(stack.image_size * 0.625)
    known = torch.zeros(num, 1, *images.shape[2:], dtype=torch.bool)
    known[..., edge:] = True
    captions = [scenes.caption(scene, _rng(0, 0), with_place=True) for scene in after]
    drawn = manipulations.inpaint(stack, images, known, captions, seed=seed)
    scores = [
        scenes.score(scenes.measure(pixels), scene)
        for pixels, scene in zip(imaging.to_uint8(drawn), after, strict=True)
    ]
    numbers = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    same = np.asarray(imaging.to_uint8(drawn) == imaging.to_uint8(images))[:, :, edge:].all()
    seam = (drawn[..., edge] - drawn[..., edge - 1]).abs().mean() * 127.5  # levels of 255
    numbers |= {"known pixels are the same": float(same), "levels at the seam": float(seam)}
    holes = torch.where(known, images, torch.tensor(0.5))
    return Result(numbers, torch.stack([images, holes, drawn], dim=1)[:SHOWN].flatten(0, 1), 3)


MEASUREMENTS = {
    "reconstruction": reconstruction,
    "text_diff": text_diff,
    "interpolation": interpolation,
    "inpainting": inpainting,
}


def render(shown: Sequence[Scene], side: int, seed: int) -> Tensor:
    """Scenes as pictures [B, 3, side, side] in [-1, 1]."""
    drawn = np.stack([scenes.render(scene, _rng(seed, index), side) for index, scene in enumerate(shown)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


def _pair(name: str, rng: np.random.Generator) -> tuple[Scene, Scene]:
    """Two scenes that differ in their place, size or background alone."""
    scene = scenes.random_scene(rng)
    item = scene.objects[0]
    if name == "place":
        return dataclasses.replace(scene, place="left"), dataclasses.replace(scene, place="right")
    if name == "size":
        small, large = (dataclasses.replace(item, size=size) for size in ("small", "large"))
        return tuple(dataclasses.replace(scene, place="center", objects=(one,)) for one in (small, large))  # type: ignore[return-value]
    return dataclasses.replace(scene, background="black"), dataclasses.replace(scene, background="white")


def _rng(seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, index])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default=DEFAULT_ROOT, help="folder of a pipeline that has published a stack")
    parser.add_argument("--num", type=int, default=100, help="pictures, or pairs of them, for each number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder for the grids")
    parser.add_argument("--only", choices=MEASUREMENTS, help="one of the manipulations")
    arguments = parser.parse_args()
    stack = load_system(find_stack(arguments.storage, None))
    for name, measure in MEASUREMENTS.items():
        if arguments.only not in (None, name):
            continue
        result = measure(stack, arguments.num, arguments.seed)
        for label, number in result.numbers.items():
            print(f"{name:<16}{label:<28}{number:>8.3f}", flush=True)
        if arguments.out:
            Path(arguments.out).mkdir(parents=True, exist_ok=True)
            grid = imaging.grid(result.grid, columns=result.columns)
            Path(arguments.out, f"{name}.png").write_bytes(imaging.png(grid))


if __name__ == "__main__":
    main()
