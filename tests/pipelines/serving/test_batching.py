"""The queue of jobs: what is sampled together, and in which order."""

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Sequence

import pytest

from pipelines.serving.batching import Abandoned, Batcher
from pipelines.serving.jobs import Job, Progress, Sampled
from unclip.errors import InputError

RED = Job("stack", "generations", "{}", num=1, seed=0, caption="red")


class Runs:
    """Batches that ran; each waits until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[Job]] = []
        self.go = threading.Event()
        self.go.set()
        self.is_abandoned = False

    def __call__(self, jobs: Sequence[Job], tell: Callable[[Progress], None]) -> list[Sampled]:
        self.batches.append(list(jobs))
        if any(job.caption == "bad" for job in jobs):
            raise InputError("caption: cannot be sampled")
        assert self.go.wait(10)
        try:
            tell(Progress(1, 1))
        except Abandoned:
            self.is_abandoned = True
            raise
        total = sum(job.num for job in jobs)
        return [Sampled((str(job.seed).encode(),) * job.num, total, len(jobs), 0.0) for job in jobs]


async def sample(batcher: Batcher, job: Job) -> Sampled:
    async with contextlib.aclosing(batcher.sample(job)) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Sampled):
                return event
    raise AssertionError("no images")


def seeded_jobs(*seeds: int, job: Job = RED) -> list[Job]:
    return [dataclasses.replace(job, seed=seed) for seed in seeds]


def test_jobs_of_one_key_are_sampled_together_up_to_the_limit() -> None:
    runs = Runs()

    async def main() -> list[Sampled]:
        batcher = Batcher(runs, max_images=4, wait_seconds=0.2)
        jobs = seeded_jobs(1, 2, 3, 4, 5)
        return await asyncio.gather(*(sample(batcher, job) for job in jobs))

    results = asyncio.run(main())
    assert [len(batch) for batch in runs.batches] == [4, 1]
    assert [result.pngs for result in results] == [(str(seed).encode(),) for seed in range(1, 6)]
    assert [result.batch_size for result in results] == [4, 4, 4, 4, 1]


def test_a_batch_has_no_more_images_than_the_stack_samples_at_once() -> None:
    runs = Runs()

    async def main() -> None:
        batcher = Batcher(runs, max_images=8, wait_seconds=0.2)
        jobs = seeded_jobs(1, 2, 3, 4, 5, job=dataclasses.replace(RED, max_batch=2))
        await asyncio.gather(*(sample(batcher, job) for job in jobs))

    asyncio.run(main())
    assert [len(batch) for batch in runs.batches] == [2, 2, 1]


@pytest.mark.parametrize("change", [{"stack": "b"}, {"settings": "[]"}, {"negative": "grey"}, {"kind": "edits"}])
def test_jobs_that_differ_are_not_sampled_together(change: dict[str, str]) -> None:
    runs = Runs()

    async def main() -> None:
        batcher = Batcher(runs, max_images=8, wait_seconds=0.05)
        other = dataclasses.replace(RED, **change)  # type: ignore[arg-type]
        await asyncio.gather(*(sample(batcher, job) for job in (*seeded_jobs(1, 2), other, *seeded_jobs(3))))

    asyncio.run(main())
    assert [len(batch) for batch in runs.batches] == [3, 1]


def test_variations_of_one_job_are_a_batch_of_their_own() -> None:
    runs = Runs()

    async def main() -> None:
        batcher = Batcher(runs, max_images=8, wait_seconds=0.05)
        jobs = seeded_jobs(1, 2, job=dataclasses.replace(RED, kind="variations"))
        await asyncio.gather(*(sample(batcher, job) for job in jobs))

    asyncio.run(main())
    assert [len(batch) for batch in runs.batches] == [1, 1]


def test_the_first_job_is_in_the_next_batch_whatever_comes_after_it() -> None:
    """A busy key does not starve another; a job larger than a batch is one of its own."""
    runs = Runs()
    runs.go.clear()

    async def main() -> None:
        batcher = Batcher(runs, max_images=2, wait_seconds=0)
        blue, large = dataclasses.replace(RED, settings="blue"), dataclasses.replace(RED, num=5, seed=9)
        tasks = [asyncio.create_task(sample(batcher, RED))]
        while not runs.batches:
            await asyncio.sleep(0.01)
        for job in (*seeded_jobs(1), blue, *seeded_jobs(2, 3), large, *seeded_jobs(4)):
            tasks.append(asyncio.create_task(sample(batcher, job)))
            await asyncio.sleep(0)
        runs.go.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert [[job.settings if job.settings == "blue" else job.seed for job in batch] for batch in runs.batches] == [
        [0],
        [1, 2],
        ["blue"],
        [3, 4],
        [9],
    ]


def test_f163_a_job_that_cannot_be_sampled_fails_alone() -> None:
    runs = Runs()

    async def main() -> list[Sampled | BaseException]:
        batcher = Batcher(runs, max_images=8, wait_seconds=0.05)
        jobs = [*seeded_jobs(1), dataclasses.replace(RED, caption="bad"), *seeded_jobs(2)]
        return await asyncio.gather(*(sample(batcher, job) for job in jobs), return_exceptions=True)

    first, failed, second = asyncio.run(main())
    assert isinstance(failed, InputError)
    assert isinstance(first, Sampled) and isinstance(second, Sampled)
    assert (first.pngs, second.pngs) == ((b"1",), (b"2",))


def test_f164_jobs_that_are_given_up_are_not_sampled() -> None:
    """One that waits leaves the queue; a batch that runs stops at the next step, if nobody waits for it."""
    runs = Runs()
    runs.go.clear()

    async def main() -> None:
        batcher = Batcher(runs, max_images=1, wait_seconds=0)
        running, waiting = (asyncio.create_task(sample(batcher, job)) for job in seeded_jobs(1, 2))
        while not runs.batches:
            await asyncio.sleep(0.01)
        for task in (running, waiting):
            task.cancel()
        await asyncio.wait((running, waiting))
        runs.go.set()
        assert (await sample(batcher, seeded_jobs(3)[0])).pngs == (b"3",)

    asyncio.run(main())
    assert [[job.seed for job in batch] for batch in runs.batches] == [[1], [3]]
    assert runs.is_abandoned
