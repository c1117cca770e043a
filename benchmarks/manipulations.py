"""Effect of manipulations on images with known content, measured from pixels.

    python -m benchmarks.manipulations --storage unclip-data --out pictures

Needs a stack trained on scenes, such as the demo's. Prints a table and writes a grid for each manipulation.
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
from unclip.systems.inpainting import inpaint
from unclip.systems.system import load_system
from unclip.systems.unclip import manipulations
from unclip.systems.unclip.stack import Stack

THETAS = tuple(index / 8 for index in range(9))
EDIT_THETA = 0.375
"""Middle of the paper's range, 0.25 to 0.5. At 0.25 not all of the demo's colours change; at 0.5 objects begin to move."""
SHOWN = 6  # rows of each grid


class Result(NamedTuple):
    numbers: dict[str, float]
    """Shares of correct results; levels are out of 255."""
    grid: Tensor
    """[N, 3, S, S], examples."""
    columns: int


def reconstruction(stack: Stack, num: int, seed: int = 0) -> Result:
    """Invert images and sample them again: measured scenes must stay the same."""
    originals = [scenes.random_scene(_rng(seed, index)) for index in range(num)]
    images = render(originals, stack.image_size, seed)
    again = manipulations.draw(stack, manipulations.invert(stack, images))
    same = [
        all(scenes.score(scenes.measure(after), scenes.measure(before)).values())
        for before, after in zip(imaging.to_uint8(images), imaging.to_uint8(again), strict=True)
    ]
    pairs = torch.stack([images, again], dim=1)[:SHOWN].flatten(0, 1)
    error = float((images - again).abs().mean()) * 127.5  # including the upsamplers' share
    return Result({"the same in all attributes": float(np.mean(same)), "levels of difference": error}, pairs, 2)


def text_diff(stack: Stack, num: int, seed: int = 0) -> Result:
    """Edit red objects to blue: colour must change, shape and place must not."""
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
        [scenes.caption(scene, _rng(seed, index), with_place=True) for index, scene in enumerate(group)]
        for group in (before, after)
    )  # same wording except for the colour
    thetas = (0.0, EDIT_THETA)
    sampled = manipulations.text_diff(stack, images, captions, base_captions, thetas)
    found = [scenes.measure(pixels) for pixels in imaging.to_uint8(sampled[:, 1])]
    scores = [scenes.score(measured, expected) for measured, expected in zip(found, after, strict=True)]
    numbers = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    kept = [score["colour"] and score["shape"] and score["place"] for score in scores]
    row = torch.cat([images[:, None], sampled], dim=1)[:SHOWN]
    return Result({**numbers, "colour, shape and place": float(np.mean(kept))}, row.flatten(0, 1), len(thetas) + 1)


def interpolation(stack: Stack, num: int, seed: int = 0) -> Result:
    """Interpolate between scenes that differ in one attribute, which must change monotonically."""
    numbers, rows = {}, []
    for name in ("place", "size", "background"):
        ends = [_pair(name, _rng(seed, index)) for index in range(num)]
        first, second = (render([pair[end] for pair in ends], stack.image_size, seed) for end in (0, 1))
        sampled = manipulations.interpolate(stack, first, second, THETAS)  # [B, N, 3, S, S]
        placement = metrics.placement(sampled.flatten(0, 1))
        moving = {"place": placement.centre[:, 0], "size": placement.area, "background": placement.background}[name]
        numbers[f"{name} moves one way"] = float(metrics.monotone(moving.reshape(num, -1)).mean())
        rows.append(sampled[: SHOWN // 3].flatten(0, 1))
    return Result(numbers, torch.cat(rows), len(THETAS))


def inpainting(stack: Stack, num: int, seed: int = 0) -> Result:
    """Repaint the half with the object: known pixels must stay, and the new object must match the caption."""
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
    sampled = inpaint(stack, images, known, captions, seed=seed)
    scores = [
        scenes.score(scenes.measure(pixels), scene)
        for pixels, scene in zip(imaging.to_uint8(sampled), after, strict=True)
    ]
    numbers = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    same = np.asarray(imaging.to_uint8(sampled) == imaging.to_uint8(images))[:, :, edge:].all()
    seam = (sampled[..., edge] - sampled[..., edge - 1]).abs().mean() * 127.5  # levels of 255
    numbers |= {"known pixels are the same": float(same), "levels at the seam": float(seam)}
    holes = torch.where(known, images, torch.tensor(0.5))
    return Result(numbers, torch.stack([images, holes, sampled], dim=1)[:SHOWN].flatten(0, 1), 3)


MEASUREMENTS = {
    "reconstruction": reconstruction,
    "text_diff": text_diff,
    "interpolation": interpolation,
    "inpainting": inpainting,
}


def render(shown: Sequence[Scene], image_size: int, seed: int) -> Tensor:
    """Render scenes as images [B, 3, S, S] in [-1, 1]."""
    rendered = np.stack([scenes.render(scene, _rng(seed, index), image_size) for index, scene in enumerate(shown)])
    return torch.from_numpy(rendered).permute(0, 3, 1, 2).float() / 127.5 - 1


def _pair(name: str, rng: np.random.Generator) -> tuple[Scene, Scene]:
    """Return two scenes that differ only in place, size or background."""
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
    parser.add_argument("--num", type=int, default=100, help="images, or pairs of images, per measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder for the grids")
    parser.add_argument("--only", choices=MEASUREMENTS, help="measure only this manipulation")
    arguments = parser.parse_args()
    stack = load_system(find_stack(arguments.storage, None))
    if not isinstance(stack, Stack):
        parser.error(f"--storage: got a stack of another system than unclip in {arguments.storage}")
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
