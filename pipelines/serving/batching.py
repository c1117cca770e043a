"""Batches of jobs from all clients."""

import asyncio
import collections
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipelines.serving.jobs import Job, Progress, Sampled

Run = Callable[[Sequence[Job], Callable[[Progress], None]], list[Sampled]]
"""Samples jobs with equal keys as one batch, in a thread; calls its argument after every step."""


class Abandoned(Exception):
    """No client waits for the batch any more."""


@dataclasses.dataclass(eq=False)
class _Waiting:
    job: Job
    since: float
    events: "asyncio.Queue[Progress | Sampled | BaseException]"
    is_given_up: bool = False


class Batcher:
    """Queue of jobs. Batches run one after the other; while one runs, the next gathers.

    The job that came first is always in the next batch, with as many others of its key as fit.
    """

    def __init__(self, run: Run, max_images: int, wait_seconds: float) -> None:
        """Args:
        max_images: images of a batch, fewer if the jobs' `max_batch` says so; a job with more of them is a batch of its own.
        wait_seconds: time that a job waits for others if nothing else runs.
        """
        self._run, self._max_images, self._wait_seconds = run, max_images, wait_seconds
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "sampling")
        self._loop: asyncio.Task[None] | None = None

    async def sample(self, job: Job) -> AsyncIterator[Progress | Sampled]:
        """Queue a job; yield its events. Closing the iterator takes the job out of the queue."""
        waiting = _Waiting(job, time.monotonic(), asyncio.Queue())
        self._queue.append(waiting)
        self._arrival.set()
        if self._loop is None:
            self._loop = asyncio.create_task(self._run_batches())
        try:
            while True:
                event = await waiting.events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Sampled):
                    return
        finally:
            waiting.is_given_up = True
            if waiting in self._queue:
                self._queue.remove(waiting)

    async def _run_batches(self) -> None:
        while True:
            while not self._queue:
                self._arrival.clear()
                await self._arrival.wait()
            while self._queue and not self._is_due():
                self._arrival.clear()
                rest = self._queue[0].since + self._wait_seconds - time.monotonic()
                try:
                    await asyncio.wait_for(self._arrival.wait(), max(rest, 0))
                except TimeoutError:
                    break
            if batch := self._take():
                await self._sample(batch)

    def _is_due(self) -> bool:
        first = self._queue[0]
        images = sum(each.job.num for each in self._queue if each.job.key == first.job.key)
        return images >= self._most(first) or time.monotonic() - first.since >= self._wait_seconds

    def _most(self, first: _Waiting) -> int:
        """Images of a batch of jobs like the first; their settings are equal."""
        return min(self._max_images, first.job.max_batch or self._max_images)

    def _take(self) -> list[_Waiting]:
        """Take the next batch out of the queue."""
        batch: list[_Waiting] = []
        images = 0
        for waiting in list(self._queue):
            if not batch or (waiting.job.key == batch[0].job.key and images + waiting.job.num <= self._most(batch[0])):
                batch.append(waiting)
                images += waiting.job.num
                self._queue.remove(waiting)
        return batch

    async def _sample(self, batch: Sequence[_Waiting]) -> None:
        loop = asyncio.get_running_loop()

        def tell(progress: Progress) -> None:
            if all(each.is_given_up for each in batch):
                raise Abandoned
            for each in batch:
                loop.call_soon_threadsafe(each.events.put_nowait, progress)

        jobs = [each.job for each in batch]
        try:
            results: Sequence[Sampled | BaseException] = await loop.run_in_executor(self._thread, self._run, jobs, tell)
        except Exception as error:
            if len(batch) > 1:  # a job that cannot be sampled fails alone
                for each in batch:
                    if not each.is_given_up:
                        await self._sample([each])
                return
            results = [error]
        for each, result in zip(batch, results, strict=True):
            each.events.put_nowait(result)
