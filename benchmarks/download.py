"""Images per second from URLs to Parquet: the download stage against `download` of img2dataset.

    python -m benchmarks.download

Both fetch the same list from the same local server with the same settings and two processes. Each round starts both from
scratch, one after the other, so other load on the machine affects them alike. Each round yields two figures:

    warm     without startup. Ours: the stage including the table commit, on workers that have downloaded before.
             img2dataset's pool lives for one call, so time runs from the start of its first to the end of its last shard.
    whole    from program start to the end of the download: imports, Ray or pool, reading the list, all images.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import measure

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
NUM_DISTINCT_IMAGES = 300


@dataclasses.dataclass(frozen=True)
class Settings:
    """Download settings of both contenders."""

    address: str
    """host:port of the server."""
    urls: str
    """Parquet file with the columns url and caption."""
    num_images: int
    """Rows on the list."""
    folder: str
    """Empty folder for the results."""
    image_size: int
    """Length of the shorter side of stored images, in pixels."""
    shard_size: int
    """Images in one task."""
    threads: int
    """URLs that one process fetches concurrently."""
    processes: int = 2
    """Shards in parallel."""
    jpeg_quality: int = 95
    """JPEG quality of stored images."""
    timeout_seconds: int = 10
    """Timeout of one URL."""


def download_ours(settings: Settings) -> dict[str, float]:
    """Download the list twice, cold and warm, each time into an empty storage folder; runs in its own process."""
    started = time.monotonic()
    os.environ |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}  # for Ray's workers
    import ray

    from tasks.stage import Artifact, Call, Run, Stage, execute
    from tasks.stages.download import DownloadConfig, download
    from tasks.stages.ingest import IngestConfig, ingest
    from tasks.tracking import Tracker

    def run_stage(stage: Stage, config: object, folder: str, *parents: Artifact) -> Artifact:
        result = execute(Call(stage, config), Run("benchmark", "benchmark", folder, Tracker("", ""), "0"), parents)
        assert isinstance(result, Artifact), result
        assert result.facts["rows"]["kept"] == settings.num_images, result.facts
        return result

    imported = time.monotonic()
    config = DownloadConfig(
        image_size=settings.image_size,
        jpeg_quality=settings.jpeg_quality,
        chroma_subsampling="4:2:0",  # fixed in img2dataset
        shard_size=settings.shard_size,
        num_threads=settings.threads,
        timeout_seconds=settings.timeout_seconds,
        allow_hosts=(settings.address,),
    )
    ray.init(num_cpus=settings.processes, include_dashboard=False, log_to_driver=False)
    cold_pairs = run_stage(ingest, IngestConfig(settings.urls), f"{settings.folder}/cold")
    run_stage(download, config, f"{settings.folder}/cold", cold_pairs)
    whole = time.monotonic() - started
    warm_pairs = run_stage(ingest, IngestConfig(settings.urls), f"{settings.folder}/warm")
    before = time.monotonic()
    run_stage(download, config, f"{settings.folder}/warm", warm_pairs)
    warm = time.monotonic() - before
    ray.shutdown()
    return {"whole": whole, "warm": warm, "import": imported - started}


def download_theirs(settings: Settings) -> dict[str, float]:
    """Run img2dataset as its users call it; runs in its own process."""
    started = time.monotonic()
    os.environ |= {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    import img2dataset

    imported = time.monotonic()
    img2dataset.download(
        url_list=settings.urls,
        input_format="parquet",
        url_col="url",
        caption_col="caption",
        output_folder=f"{settings.folder}/img2dataset",
        output_format="parquet",
        processes_count=settings.processes,
        thread_count=settings.threads,
        number_sample_per_shard=settings.shard_size,
        image_size=settings.image_size,
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
        encode_quality=settings.jpeg_quality,
        compute_hash="sha256",
        extract_exif=False,  # as in our stage
        timeout=settings.timeout_seconds,
        retries=1,
        enable_wandb=False,
    )
    whole = time.monotonic() - started
    shards = [json.loads(path.read_text()) for path in Path(settings.folder, "img2dataset").glob("*_stats.json")]
    succeeded = sum(shard["successes"] for shard in shards)
    assert succeeded == settings.num_images, f"{succeeded} of {settings.num_images} images"
    warm = max(shard["end_time"] for shard in shards) - min(shard["start_time"] for shard in shards)
    return {"whole": whole, "warm": warm, "import": imported - started}


CONTENDERS = {"unclip": download_ours, "img2dataset": download_theirs}


def our_variables() -> dict[str, str]:
    """Environment variables of the processes of `unclip run`."""
    from pipelines.cluster import KEEP_WORKERS, WORKER_ENVIRONMENT  # slow to import, and the contenders need it not

    return WORKER_ENVIRONMENT | dict([KEEP_WORKERS])


def run_contender(name: str, settings: Settings) -> dict[str, float]:
    """Return the figures of one contender in images per second, its import in seconds and its peak memory in MB."""
    with tempfile.TemporaryDirectory(prefix="unclip-benchmark-") as folder:
        settings = dataclasses.replace(settings, folder=folder)
        command = [
            sys.executable,
            "-m",
            "benchmarks.download",
            "--side",
            name,
            json.dumps(dataclasses.asdict(settings)),
        ]
        result = Path(folder, "result.json")
        environment = os.environ | (our_variables() if name == "unclip" else {})
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        with measure.TreeMemory(process.pid) as memory:
            _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"{name}: ended with {process.returncode}:\n{errors[-3000:]}")
        seconds = json.loads(result.read_text())
    speeds = {figure: settings.num_images / seconds[figure] for figure in ("warm", "whole")}
    return {**speeds, "import": seconds["import"], "pss": memory.pss, "rss": memory.rss}


@contextlib.contextmanager
def server(images: list[bytes]) -> Iterator[str]:
    """Serve images at /0.jpg, /1.jpg, ... (numbers wrap around) from a separate process; yield its host:port."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(images, theirs), daemon=True)
    process.start()
    try:
        yield f"{HOST}:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def _serve(images: list[bytes], connection: Connection) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            request = (await reader.readuntil(b"\r\n\r\n")).split(maxsplit=2)[1]
            number = request.strip(b"/").removesuffix(b".jpg")
            status, body = (b"200 OK", images[int(number) % len(images)]) if number.isdigit() else (b"404 No", b"")
            head = b"HTTP/1.1 %b\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
            writer.write(head % (status, len(body)) + body)
            await writer.drain()
        writer.close()

    async def listen() -> None:
        listener = await asyncio.start_server(answer, HOST, 0, backlog=1024)
        connection.send(listener.sockets[0].getsockname()[1])
        await listener.serve_forever()

    asyncio.run(listen())


def report(rounds: dict[str, list[dict[str, float]]]) -> None:
    """Print the medians of all figures, and the ratios."""
    figures = {
        contender: {name: [result[name] for result in results] for name in results[0]}
        for contender, results in rounds.items()
    }
    ours, theirs = figures["unclip"], figures["img2dataset"]
    print(f"{'':24} {'unclip':>24} {'img2dataset':>24}  ratio")
    for name, unit in (("warm", "images/s"), ("whole", "images/s")):
        ratio = measure.median_ratio(ours[name], theirs[name])
        print(
            f"{name + ', ' + unit:24} {measure.describe(ours[name]):>24} {measure.describe(theirs[name]):>24}  {ratio:.2f}"
        )
    labels = {"import": "import, s", "pss": "memory, MB", "rss": "memory incl. shared, MB"}
    for name, label in labels.items():
        numbers = [statistics.median(contender[name]) for contender in (ours, theirs)]
        print(f"{label:24} {numbers[0]:24,.0f} {numbers[1]:24,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=12_000, help="URLs on the list")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both")
    parser.add_argument(
        "--image-size", type=int, default=256, help="length of the shorter side of stored images, in pixels"
    )
    parser.add_argument("--shard-size", type=int, default=500, help="images in one task")
    parser.add_argument("--threads", type=int, default=16, help="URLs that one process fetches concurrently")
    parser.add_argument("--side", nargs=2, metavar=("NAME", "SETTINGS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        settings = Settings(**json.loads(arguments.side[1]))
        result = CONTENDERS[arguments.side[0]](settings)
        Path(settings.folder, "result.json").write_text(json.dumps(result))
        return

    print(measure.machine("ray", "img2dataset", "pillow", "pyarrow"))
    print(f"{arguments.pictures} images of 640x480, {arguments.rounds} rounds, {vars(arguments)}\n", flush=True)
    images = measure.photographs(NUM_DISTINCT_IMAGES)
    with tempfile.TemporaryDirectory(prefix="unclip-benchmark-") as folder, server(images) as address:
        urls = [f"http://{address}/{number}.jpg" for number in range(arguments.pictures)]
        captions = [f"a picture of noise, number {number}" for number in range(arguments.pictures)]
        pq.write_table(pa.table({"url": urls, "caption": captions}), f"{folder}/urls.parquet")
        settings = Settings(
            address=address,
            urls=f"{folder}/urls.parquet",
            num_images=arguments.pictures,
            folder=folder,
            image_size=arguments.image_size,
            shard_size=arguments.shard_size,
            threads=arguments.threads,
        )
        contenders = {name: lambda name=name: run_contender(name, settings) for name in CONTENDERS}
        report(measure.interleave(contenders, arguments.rounds))


if __name__ == "__main__":
    main()
