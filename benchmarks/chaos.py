"""Healthy images per second among hostile servers, against the same healthy images alone.

    python -m benchmarks.chaos

The hostile list has, besides its healthy rows, 10 % tarpits (they accept a connection and never answer), 10 % names whose
name servers do not answer, 5 % resets, 1 % scan bombs (small JPEGs that take seconds to decode) and 1 % bodies over max_bytes.
Bombs, large bodies and resets come from sites that serve healthy images as well. Both lists are fetched by the download
stage, each in a program of its own after a short list that starts the workers. Every row's outcome is checked.

All servers are on this machine, on addresses in 127.0.1.0/24 that count as public here. In the workers, names end in `.test`;
a look-up of `*.hangN.test` takes 20 seconds to fail, as that of a system whose name servers do not answer.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import measure

ROOT = Path(__file__).resolve().parent.parent
NUM_DISTINCT_IMAGES = 300
MAX_BYTES = 2_000_000
HANG_SECONDS = 20.0
SHARES = {"tarpit": 0.1, "dead_name": 0.1, "reset": 0.05, "bomb": 0.01, "large": 0.01}
"""Kind of hostile row -> its share of the list."""
EXPECTED: dict[str, set[str | None]] = {
    "image": {None},
    "tarpit": {"timeout", "site_unreachable"},
    "dead_name": {"dns_timeout", "site_unreachable"},
    "reset": {"connect_error"},
    "bomb": {"too_many_scans"},
    "large": {"too_large"},
}
"""Kind of row -> the reasons that it may have."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """One download."""

    num_rows: int
    """Rows of the hostile list."""
    hostile: bool
    """Fetch the hostile list; else its healthy rows alone."""
    num_sites: int
    """Healthy sites."""
    num_tarpits: int
    """Sites that are tarpits; half of them have no robots.txt either."""
    num_domains: int
    """Domains whose name servers do not answer; each row has a host of its own."""
    shard_size: int
    threads: int
    processes: int
    image_size: int
    port: int = 0
    folder: str = ""
    """Empty folder for the results."""


def urls(settings: Settings) -> list[str]:
    """Rows in random order, the same for the same settings."""
    rng = random.Random(0)
    kinds = [kind for kind, share in SHARES.items() for _ in range(round(settings.num_rows * share))]
    kinds += ["image"] * (settings.num_rows - len(kinds))
    rng.shuffle(kinds)
    listed = []
    for number, kind in enumerate(kinds):
        if kind == "dead_name":
            host = f"host{number}.hang{rng.randrange(settings.num_domains)}.test"
        elif kind == "tarpit":
            host = f"site{settings.num_sites + rng.randrange(settings.num_tarpits)}.test"
        else:
            host = f"site{rng.randrange(settings.num_sites)}.test"
        if settings.hostile or kind == "image":
            listed.append(f"http://{host}:{settings.port}/{kind}/{number}.jpg")
    return listed


def address(site: int) -> str:
    return f"127.0.1.{site + 1}"


def prepare_worker() -> None:
    """Let the workers' names lead to this machine, whose addresses in 127.0.1.0/24 count as public."""
    look_up = socket.getaddrinfo

    def resolve(host: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(host, str) and host.endswith(".test"):
            label = host.split(".")[-2]
            if label.startswith("hang"):
                time.sleep(HANG_SECONDS)
                raise socket.gaierror(socket.EAI_AGAIN, "no answer")
            host = address(int(label.removeprefix("site")))
        return look_up(host, *rest, **options)

    socket.getaddrinfo = resolve
    from tasks.untrusted import fetch

    is_public = fetch.is_public
    fetch.is_public = lambda address: address.startswith("127.0.1.") or is_public(address)


def download(settings: Settings) -> dict[str, Any]:
    """Download a list; runs in its own process. Returns the seconds and, for each kind, the rows with each reason."""
    os.environ |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}  # for Ray's workers
    import ray

    from pipelines.cluster import KEEP_WORKERS
    from tasks import tables
    from tasks.stage import Artifact, Call, Run, Stage, execute
    from tasks.stages.download import DownloadConfig
    from tasks.stages.download import download as download_stage
    from tasks.stages.ingest import IngestConfig, ingest
    from tasks.tracking import Tracker

    def run_stage(stage: Stage, config: object, folder: str, *parents: Artifact) -> Artifact:
        result = execute(Call(stage, config), Run("benchmark", "benchmark", folder, Tracker("", ""), "0"), parents)
        assert isinstance(result, Artifact), result
        return result

    def fetch_list(listed: list[str], name: str) -> tuple[Artifact, float]:
        path, storage = f"{settings.folder}/{name}.parquet", f"{settings.folder}/{name}"
        captions = [f"an image of noise, number {number}" for number in range(len(listed))]
        pq.write_table(pa.table({"url": listed, "caption": captions}), path)
        pairs = run_stage(ingest, IngestConfig(path), storage)
        started = time.monotonic()
        images = run_stage(download_stage, config, storage, pairs)
        return images, time.monotonic() - started

    config = DownloadConfig(
        image_size=settings.image_size,
        shard_size=settings.shard_size,
        num_threads=settings.threads,
        max_bytes=MAX_BYTES,
        allow_ports=(settings.port,),
    )
    os.environ.setdefault(*KEEP_WORKERS)  # as in `unclip run`
    hook = {"worker_process_setup_hook": prepare_worker}
    ray.init(num_cpus=settings.processes, include_dashboard=False, log_to_driver=False, runtime_env=hook)
    listed = urls(settings)
    fetch_list([url for url in listed if "/image/" in url][: 8 * settings.processes], "warm")
    images, seconds = fetch_list(listed, "measured")
    table = tables.read(images.uri, columns=["key", "url", "reason"])
    ray.shutdown()
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for url, reason in zip(table["url"].to_pylist(), table["reason"].to_pylist(), strict=True):
        counts[url.split("/")[3]][str(reason)] += 1
    balance = images.facts["rows"]
    assert table.num_rows == len(listed) == balance["in"] == balance["kept"] + balance["failed"], balance
    return {"seconds": seconds, "counts": counts}


def run_apart(settings: Settings) -> dict[str, Any]:
    """Run one download in a program of its own; returns its healthy images per second, and the rows of each kind."""
    with tempfile.TemporaryDirectory(prefix="unclip-benchmark-") as folder:
        settings = dataclasses.replace(settings, folder=folder)
        command = [sys.executable, "-m", "benchmarks.chaos", "--side", json.dumps(dataclasses.asdict(settings))]
        ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if ended.returncode:
            raise SystemExit(f"the download ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
        result = json.loads(Path(folder, "result.json").read_text())
    counts = result["counts"]
    unexpected = {kind: found for kind, found in counts.items() if not set(found) <= {*map(str, EXPECTED[kind])}}
    if unexpected:
        raise SystemExit(f"unexpected reasons: {unexpected}")
    healthy = counts["image"].get("None", 0)
    return {"speed": healthy / result["seconds"], "seconds": result["seconds"], "counts": counts}


def scan_bomb() -> bytes:
    """Return a small progressive JPEG of 49 megapixels with many scans, each of which costs a pass over all coefficients."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (7000, 7000), 128).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 200 + data[-2:]


@contextlib.contextmanager
def server(settings: Settings, images: list[bytes]) -> Iterator[int]:
    """Serve all sites from a separate process; yield their port."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(settings, images, scan_bomb(), theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def _serve(settings: Settings, images: list[bytes], bomb: bytes, connection: Connection) -> None:
    tarpits = {address(settings.num_sites + number): number for number in range(settings.num_tarpits)}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            path = (await reader.readuntil(b"\r\n\r\n")).split(maxsplit=2)[1].decode()
            kind, _, name = path.strip("/").partition("/")
            tarpit = tarpits.get(writer.get_extra_info("sockname")[0])
            if kind == "tarpit" or (tarpit is not None and tarpit % 2):
                await reader.read()  # until the client gives up
            elif kind == "reset":
                writer.transport.abort()
            else:
                bodies = {"bomb": bomb, "large": bytes(MAX_BYTES + 1)}
                if kind == "image":
                    bodies[kind] = images[int(name.removesuffix(".jpg")) % len(images)]
                body = bodies.get(kind, b"")  # none for robots.txt and .well-known/tdmrep.json
                status = b"200 OK" if kind in bodies else b"404 Not Found"
                writer.write(b"HTTP/1.1 %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(body)))
                writer.write(body)
                await writer.drain()
        writer.close()

    async def listen() -> None:
        hosts = [address(site) for site in range(settings.num_sites + settings.num_tarpits)]
        listener = await asyncio.start_server(answer, hosts[0], 0, backlog=1024)
        port = listener.sockets[0].getsockname()[1]
        await asyncio.start_server(answer, hosts[1:], port, backlog=1024)
        connection.send(port)
        await listener.serve_forever()

    asyncio.run(listen())


def report(rounds: dict[str, list[dict[str, Any]]]) -> None:
    """Print the outcomes of the last round, the speeds and their ratio."""
    for kind, reasons in rounds["hostile"][-1]["counts"].items():
        print(
            f"{kind:10} {sum(reasons.values()):7,}  "
            + ", ".join(f"{name} {number:,}" for name, number in reasons.items())
        )
    speeds = {name: [result["speed"] for result in results] for name, results in rounds.items()}
    print()
    for name, figures in speeds.items():
        seconds = statistics.median(result["seconds"] for result in rounds[name])
        print(f"{name:10} {measure.describe(figures):>26} healthy images/s, {seconds:.0f} s")
    print(f"{'share':10} {measure.median_ratio(speeds['hostile'], speeds['clean']):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000, help="rows of the hostile list")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of both lists")
    parser.add_argument("--sites", type=int, default=40, help="healthy sites")
    parser.add_argument("--tarpits", type=int, default=6, help="sites that are tarpits")
    parser.add_argument("--domains", type=int, default=6, help="domains whose name servers do not answer")
    parser.add_argument("--shard-size", type=int, default=500, help="rows in one task")
    parser.add_argument("--threads", type=int, default=16, help="URLs that one task fetches concurrently")
    parser.add_argument("--processes", type=int, default=2, help="CPUs of the cluster")
    parser.add_argument(
        "--image-size", type=int, default=256, help="length of the shorter side of stored images, in pixels"
    )
    parser.add_argument("--side", metavar="SETTINGS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        settings = Settings(**json.loads(arguments.side))
        Path(settings.folder, "result.json").write_text(json.dumps(download(settings)))
        return

    print(measure.machine("ray", "img2dataset", "pillow"))
    print(f"{arguments.rows:,} rows, {arguments.rounds} rounds, {vars(arguments)}\n", flush=True)
    settings = Settings(
        num_rows=arguments.rows,
        hostile=True,
        num_sites=arguments.sites,
        num_tarpits=arguments.tarpits,
        num_domains=arguments.domains,
        shard_size=arguments.shard_size,
        threads=arguments.threads,
        processes=arguments.processes,
        image_size=arguments.image_size,
    )
    with server(settings, measure.photographs(NUM_DISTINCT_IMAGES)) as port:
        settings = dataclasses.replace(settings, port=port)
        contenders = {
            name: lambda hostile=hostile: run_apart(dataclasses.replace(settings, hostile=hostile))
            for name, hostile in (("clean", False), ("hostile", True))
        }
        report(measure.interleave(contenders, arguments.rounds))


if __name__ == "__main__":
    main()
