"""Engine: samples jobs with the stacks that it has loaded."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.serving.batching import Batcher
from pipelines.serving.jobs import Job, Loaded, Progress, Sampled
from unclip import config, imaging
from unclip.systems import inpainting
from unclip.systems.inpainting import UpsampledSystem, counting
from unclip.systems.rows import RowGenerators
from unclip.systems.system import (
    ChecksCaptions,
    System,
    find_system,
    load_stack,
    read_stack,
    sample_together,
    seeded,
)
from unclip.systems.unclip import manipulations
from unclip.systems.unclip.stack import Stack

Tell = Callable[[Progress], None]


class Engine:
    """Loaded stacks and the queue in front of them; a `jobs.Sampler`."""

    def __init__(self, max_images: int, wait_seconds: float, device: str = "cpu") -> None:
        """Args:
        max_images, wait_seconds: as for `Batcher`.
        device: device to sample on.
        """
        self._device = torch.device(device)
        self._loaded: dict[str, tuple[System, type]] = {}
        self._lock = threading.Lock()
        self._batcher = Batcher(self._run, max_images, wait_seconds)

    async def sample(self, job: Job) -> AsyncIterator[Progress | Sampled]:
        async with contextlib.aclosing(self._batcher.sample(job)) as events:  # type: ignore[type-var]
            async for event in events:
                yield event

    async def load(self, stack: str) -> Loaded:
        system, _ = await asyncio.to_thread(self._system, stack)
        return Loaded(system.image_size, isinstance(system, Stack), isinstance(system, UpsampledSystem))

    async def keep(self, stacks: Collection[str]) -> None:
        for folder in set(self._loaded) - set(stacks):
            self._loaded.pop(folder, None)

    def _system(self, folder: str) -> tuple[System, type]:
        """Loaded system of a stack, and the class of its sampling settings."""
        loaded = self._loaded.get(folder)  # without the lock: loading another stack holds up no batch
        if loaded is not None:
            return loaded
        with self._lock:
            if folder not in self._loaded:
                stack = read_stack(folder)
                self._loaded[folder] = load_stack(stack).to(self._device), find_system(stack.system).sampling
            return self._loaded[folder]

    def _run(self, jobs: Sequence[Job], tell: Tell) -> list[Sampled]:
        system, settings = self._system(jobs[0].stack)
        sampling: Any = config.load(settings, json.loads(jobs[0].settings))
        started = time.perf_counter()
        images = _SAMPLE[jobs[0].kind](system, sampling, jobs, tell)
        seconds = time.perf_counter() - started
        pngs = iter([imaging.png(pixels) for pixels in imaging.to_uint8(images)])
        total = sum(job.num for job in jobs)
        return [Sampled(tuple(next(pngs) for _ in range(job.num)), total, len(jobs), seconds) for job in jobs]


def _generate(system: System, sampling: Any, jobs: Sequence[Job], tell: Tell) -> Tensor:
    captions = [job.caption for job in jobs for _ in range(job.num)]
    if isinstance(system, ChecksCaptions):
        system.check_captions(captions)
    inputs: dict[str, Any] = {}
    if jobs[0].negative is not None:
        inputs["negative"] = [job.negative for job in jobs for _ in range(job.num)]
    if isinstance(system, UpsampledSystem):
        inputs["on_step"] = counting(_counter(inpainting.num_steps(system, sampling, 1), tell))
    seeds = [(job.seed, job.num) for job in jobs]
    return sample_together(system, captions, seeds, sampling=sampling, **inputs)


def _edit(system: System, sampling: Any, jobs: Sequence[Job], tell: Tell) -> Tensor:
    assert isinstance(system, UpsampledSystem)
    generators = [seeded(system.device, job.seed) for job in jobs]
    negative = [job.negative or "" for job in jobs for _ in range(job.num)]
    with RowGenerators(generators, [job.num for job in jobs]) as rows:
        return inpainting.inpaint(
            system,
            torch.cat([_image(job).expand(job.num, -1, -1, -1) for job in jobs]),
            torch.cat([torch.from_numpy(job.known)[None, None].expand(job.num, -1, -1, -1) for job in jobs]),
            [job.caption for job in jobs for _ in range(job.num)],
            negative=None if jobs[0].negative is None else negative,
            generator=rows.generator,
            sampling=sampling,
            progress=_counter(inpainting.num_steps(system, sampling, 1), tell),
        )


def _vary(system: System, sampling: Any, jobs: Sequence[Job], tell: Tell) -> Tensor:
    assert isinstance(system, Stack)
    [job] = jobs
    progress = _counter(inpainting.num_steps(system, sampling, job.num), tell)
    return manipulations.variations(system, _image(job), job.num, seed=job.seed, sampling=sampling, progress=progress)[
        0
    ]


def _interpolate(system: System, sampling: Any, jobs: Sequence[Job], tell: Tell) -> Tensor:
    assert isinstance(system, Stack)
    [job] = jobs
    progress = _counter(inpainting.num_steps(system, sampling, job.num, 2), tell)
    thetas = [index / (job.num - 1) for index in range(job.num)]
    return manipulations.interpolate(
        system, _image(job), _image(job, 1), thetas, seed=job.seed, sampling=sampling, progress=progress
    )[0]


_SAMPLE: dict[str, Callable[[Any, Any, Sequence[Job], Tell], Tensor]] = {
    "generations": _generate,
    "edits": _edit,
    "variations": _vary,
    "interpolations": _interpolate,
}


def _image(job: Job, number: int = 0) -> Tensor:
    return imaging.from_uint8(job.images[number][None])


def _counter(steps: int, tell: Tell) -> inpainting.Progress:
    done = 0

    def count(number: int) -> None:
        nonlocal done
        done += number
        tell(Progress(done, steps))

    return count
