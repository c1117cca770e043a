"""Images a second of `unclip serve`, with requests of many clients sampled together and one by one; a new champion under load.

    python -m benchmarks.serving STORAGE

STORAGE has a champion; it is copied. Each client sends one request after the other, each with a seed of its own and one of a few
captions. Batches are filled up (`--pad-batches`), so every image must be that of `unclip sample` with the same settings, bit for
bit: all are sampled here once more, in batches of other requests, and some of them alone. Those that are sampled one by one,
without padding, have the same noise and differ by the rounding of matrix products. In the last part a copy of the champion is
promoted meanwhile, and no request may fail.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from base64 import b64decode
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from pipelines.published import find_stack
from tasks import published
from tasks.store import Store
from unclip.config import load, override, to_dict
from unclip.imaging import to_uint8
from unclip.systems.system import find_system, load_system, sample_captions, sample_together

ROOT = Path(__file__).resolve().parent.parent
PORT = 8794
CAPTIONS = ("a large red circle on a blue background", "a small yellow star on a purple background", "a green square")


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers of a server to the requests of all clients."""

    images: dict[int, np.ndarray]
    """Seed -> pixels."""
    models: list[str]
    """Model of each answer, in order of arrival."""
    failures: list[str]
    seconds: float
    waited: list[float]
    """Seconds from each request to its answer."""

    def summary(self) -> dict[str, Any]:
        median, last = np.quantile(self.waited, [0.5, 0.99]).tolist() if self.waited else (None, None)
        rate = len(self.images) / self.seconds
        return {
            "images_per_second": rate,
            "median_seconds": median,
            "p99_seconds": last,
            "failures": len(self.failures),
        }


@contextlib.contextmanager
def serving(storage: Path, log: Path, *options: str) -> Iterator[str]:
    """Run `unclip serve` until the block ends; yield its address."""
    command = [sys.executable, "-m", "pipelines", "serve", "--storage", str(storage), "--port", str(PORT)]
    command += [*options, "--max-requests", "256"]
    address = f"http://127.0.0.1:{PORT}"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 300
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/healthz", timeout=5):
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the server did not start: {log.read_text()[-2000:]}")
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait(60)


async def ask_all(address: str, num_requests: int, num_clients: int, steps: int, publish_at: Any = None) -> Answers:
    """Let clients send requests with the seeds 0, 1, ...; call `publish_at` when a quarter of them are answered."""
    import httpx

    answers = Answers({}, [], [], 0.0, [])
    seeds = iter(range(num_requests))
    started = time.perf_counter()

    async def client() -> None:
        async with httpx.AsyncClient(base_url=address, timeout=300) as http:
            for seed in seeds:
                body = {"prompt": CAPTIONS[seed % len(CAPTIONS)], "seed": seed, "steps": steps}
                sent = time.perf_counter()
                try:
                    response = await http.post("/v1/images/generations", json=body)
                except httpx.HTTPError as error:
                    answers.failures.append(repr(error))
                    continue
                if response.status_code != 200:
                    answers.failures.append(response.text[:300])
                    continue
                answers.waited.append(time.perf_counter() - sent)
                document = response.json()
                answers.models.append(document["model"])
                data = b64decode(document["data"][0]["b64_json"])
                answers.images[seed] = np.asarray(Image.open(io.BytesIO(data))).astype(int)

    async def promote() -> None:
        while publish_at is not None and len(answers.models) < num_requests // 4:
            await asyncio.sleep(0.05)
        if publish_at is not None:
            await asyncio.to_thread(publish_at)

    await asyncio.gather(promote(), *(client() for _ in range(num_clients)))
    return dataclasses.replace(answers, seconds=time.perf_counter() - started)


def promote_copy(storage: Path) -> None:
    """Promote a copy of the champion."""
    store = Store(str(storage))
    [record] = published.read_all(store)
    assert record.champion is not None
    copy = storage / "artifacts" / "copy"
    shutil.copytree(record.champion.stack, copy)
    entry = dataclasses.replace(record.champion, stack=str(copy), digest="c" * 64, version=None)
    published.write(store, record.promote(entry, "a copy"))


def difference(first: Answers, second: Answers) -> dict[str, Any]:
    """Differences of the images of two servers, in grey levels."""
    common = sorted(first.images.keys() & second.images.keys())
    values = np.stack([abs(first.images[seed] - second.images[seed]) for seed in common])
    equal = sum(not each.any() for each in values)
    return {"images": len(common), "equal": equal, "largest": int(values.max()), "share": float((values > 0).mean())}


def compare(answers: Answers, storage: Path, steps: int, batch_size: int, num_alone: int) -> dict[str, Any]:
    """Count the images that equal, in every bit, those that are sampled here: in batches of other requests, and alone."""
    system: Any = load_system(find_stack(str(storage), None))
    values = to_dict(system.sampling) | {"batch_size": batch_size, "pad_batches": True}
    values = override(values, f"{find_system('unclip').shortcuts['steps']}={steps}")
    sampling = load(type(system.sampling), values)

    def count(seeds: Sequence[int], images: Tensor) -> int:
        return sum(
            np.array_equal(answers.images[seed], image) for seed, image in zip(seeds, to_uint8(images), strict=True)
        )

    mixed = sorted(answers.images)
    np.random.default_rng(0).shuffle(mixed)
    equal = equal_alone = 0
    for start in range(0, len(mixed), batch_size):
        seeds = mixed[start : start + batch_size]
        captions = [CAPTIONS[seed % len(CAPTIONS)] for seed in seeds]
        together = sample_together(system, captions, [(seed, 1) for seed in seeds], sampling=sampling)
        equal += count(seeds, together)
    for seed in mixed[:num_alone]:
        equal_alone += count(
            [seed], sample_captions(system, [CAPTIONS[seed % len(CAPTIONS)]], seed=seed, sampling=sampling)
        )
    return {"images": len(mixed), "equal": equal, "alone": min(num_alone, len(mixed)), "equal_alone": equal_alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--alone", type=int, default=20, help="images that are also sampled alone here")
    arguments = parser.parse_args()
    load = (arguments.requests, arguments.clients, arguments.steps)
    with tempfile.TemporaryDirectory() as scratch:
        storage = Path(scratch, "storage")
        shutil.copytree(arguments.storage, storage, symlinks=True)
        sides = {}
        size = str(arguments.max_batch)
        for name, options in (
            ("one by one", ("--max-batch", "1")),
            ("together", ("--max-batch", size, "--pad-batches")),
        ):
            with serving(storage, Path(scratch, "log"), *options) as address:
                asyncio.run(ask_all(address, 4, 2, arguments.steps))  # the first ones load and allocate
                sides[name] = asyncio.run(ask_all(address, *load))
                print(json.dumps({name: sides[name].summary()}), flush=True)
                if name == "together":
                    equality = compare(sides[name], storage, arguments.steps, arguments.max_batch, arguments.alone)
                    swapped = asyncio.run(ask_all(address, *load, publish_at=lambda: promote_copy(storage)))
        alone, together = sides["one by one"], sides["together"]
        print(json.dumps({"ratio": alone.seconds / together.seconds, "as unclip sample": equality}))
        print(json.dumps({"from those sampled one by one": difference(alone, together)}))
        counts = {model: swapped.models.count(model) for model in dict.fromkeys(swapped.models)}
        print(json.dumps({"new champion": {**swapped.summary(), "models": counts}}))
        for failure in (*alone.failures, *together.failures, *swapped.failures)[:5]:
            print(failure)


if __name__ == "__main__":
    main()
