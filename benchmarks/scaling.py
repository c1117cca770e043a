"""Cost of a row at growing sizes: every data stage, and the readers of the three parts, on synthetic datasets.

    python -m benchmarks.scaling --out scaling.json --plot docs/scaling.png
    python -m benchmarks.scaling --rows 10000,100000 --skew --peers

Datasets have small real images under random hashes, written through the tables' own code (`benchmarks.synthetic`). Every step
runs in a process of its own, after a small dataset, with a Ray of two workers that have imported its stage. What is measured:

    us/row   wall time of the step for each row of the list; of a reader, for each row that it reads
    CPU      time of all its processes for each row, in microseconds
    MB       largest process: resident memory without the object store, which is limited to 2 GB

Downloads have no network here: "refused hosts" plans, fetches and commits all rows, but every host is a private address, which
is refused before a connection; "nothing new" compares a list with a table that has all its images. Embedding has no CLIP
here: the table is written as the stage would, and what is measured is what the stage does beside the forward pass, finding
and reading images ("reading images") and comparing rows with a table ("nothing new").

`--skew` compares uneven datasets with an even one of the same size, `--peers` stages with scripts that hold all in memory. Both
take turns, and a ratio is the median of the rounds' own.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.scaling_steps import READERS, SCRIPTS, STEPS, Figures, run_step, start_ray, warm_up
from benchmarks.synthetic import SKEWS, Dataset, Skew
from unclip import files

ROOT = Path(__file__).resolve().parent.parent
BASE_ROWS = 100_000
"""Size with which larger ones are compared."""
TEN_MILLION = 10_000_000
MAX_RATIO, MAX_MEGABYTES, MAX_SKEW, MIN_PEER = 1.25, 2048, 2.0, 0.5
INGEST_ROWS_PER_SECOND, DECODER_ROWS_PER_SECOND, DECODER_SHARE = 100_000, 20_000, 0.5
SKEWED_STEPS: Mapping[Skew, str] = {
    "site": "download, refused hosts",
    "caption": "filter",
    "hash": "dedup",
    "colours": "dedup",
    "bytes": "dedup",
    "copies": "curate, semantic",
    "dense": "curate, semantic",
}
"""Kind of uneven dataset -> step that is compared on it."""
READER_ROUNDS = 3
"""Least rounds of a reader, which takes a second, and waits for the disk in its first round."""
NEEDED = (
    "write list", "ingest", "write images", "download, nothing new", "filter", "dedup", "write embeddings",
    "embed, nothing new",
)  # fmt: skip
"""Steps whose results later ones need."""


@dataclasses.dataclass(frozen=True)
class Point:
    """Measurements of one step at one size."""

    step: str
    size: int
    """Rows of the list."""
    figures: Figures
    megabytes: float | None
    """Memory of the largest process; None if it was not measured."""


def run_isolated(name: str, data: Dataset, rounds: int = 1) -> Point:
    """Run a step in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="unclip-step-") as folder:
        result = Path(folder, "result.json")
        order = json.dumps({"name": name, "data": dataclasses.asdict(data), "rounds": rounds, "result": str(result)})
        command = [sys.executable, "-m", "benchmarks.scaling", "--step", order]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        with measure.LargestProcess(process.pid, 0.2) as memory:
            _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"{name} at {data.rows:,} rows: ended with {process.returncode}:\n{errors[-4000:]}")
        return Point(name, data.rows, Figures(**json.loads(result.read_text())), memory.megabytes)


def run_ordered(order: Mapping[str, Any]) -> None:
    """Run the step that `run_isolated` asks for in this process."""
    step = STEPS.get(order["name"])
    if step and step.module:
        start_ray(step.module)
    data = Dataset(**order["data"])
    warm_up(order["name"], data)
    figures = run_step(order["name"], data, order["rounds"])
    Path(order["result"]).write_text(json.dumps(dataclasses.asdict(figures)))


def measure_size(data: Dataset, rounds: int, isolated: bool = True) -> Iterator[Point]:
    """Yield the measurements of all steps at one size.

    Args:
        rounds: repetitions of each step, of which the median counts.
        isolated: run each step in a process of its own, which also measures memory; otherwise Ray must be running.
    """
    for name, step in STEPS.items():
        if step.needs_images and not data.has_images:
            continue
        repeated = 1 if step.is_setup else max(rounds, READER_ROUNDS if name in READERS else 1)
        point = (
            run_isolated(name, data, repeated)
            if isolated
            else Point(name, data.rows, run_step(name, data, repeated), None)
        )
        if not step.is_setup:
            yield point


def rounds_for(rows: int) -> int:
    """Rounds of each step by default: large sizes take long, and vary less."""
    return 3 if rows <= BASE_ROWS else 1


def build(data: Dataset, name: str) -> None:
    """Run the steps whose results a step needs."""
    for earlier in itertools.takewhile(lambda other: other != name, STEPS):
        if earlier in NEEDED:
            run_isolated(earlier, data)


def compare_skews(root: str, rows: int, width: int, rounds: int) -> dict[str, float]:
    """Time uneven datasets against an even one; returns the ratio of each kind and step."""
    even = Dataset(f"{root}/even", rows, width, has_images=False)
    build(even, "curate, semantic")
    ratios = {}
    for skew, name in SKEWED_STEPS.items():
        uneven = dataclasses.replace(even, root=f"{root}/{skew}", skew=skew)
        build(uneven, name)
        figures = measure.interleave(
            {kind: functools.partial(_seconds, name, data) for kind, data in (("uneven", uneven), ("even", even))},
            rounds,
        )
        ratio = measure.median_ratio(figures["uneven"], figures["even"])
        ratios[f"{SKEWS[skew]}: {name}"] = ratio
        seconds = f"{statistics.median(figures['uneven']):6.1f} s, even {statistics.median(figures['even']):6.1f} s"
        print(f"{SKEWS[skew] + ': ' + name:78} {seconds}  {verdict(ratio, most=MAX_SKEW)}", flush=True)
        files.delete(uneven.root)
    return ratios


def compare_scripts(data: Dataset, rounds: int) -> dict[str, float]:
    """Time stages against scripts that hold all rows in memory; returns the script's time as a share of the stage's."""
    ratios = {}
    for script in SCRIPTS:
        name = script.removesuffix(" by script")
        points = measure.interleave(
            {
                "stage": functools.partial(run_isolated, name, data),
                "script": functools.partial(run_isolated, script, data),
            },
            rounds,
        )
        seconds = {side: [point.figures.seconds for point in found] for side, found in points.items()}
        ratios[name] = measure.median_ratio(seconds["script"], seconds["stage"])
        shown = [
            f"{side} {statistics.median(seconds[side]):.1f} s, {max(point.megabytes or 0 for point in found):,.0f} MB"
            for side, found in points.items()
        ]
        print(f"{name} of {data.rows:,} rows: {'; '.join(shown)}  {verdict(ratios[name], least=MIN_PEER)}", flush=True)
    return ratios


def _seconds(name: str, data: Dataset) -> float:
    return run_isolated(name, data).figures.seconds


def verdict(value: float, *, least: float | None = None, most: float | None = None) -> str:
    """Describe a number and its goal."""
    is_met = (least is None or value >= least) and (most is None or value <= most)
    goal = f"at least {least:,g}" if least is not None else f"at most {most:,g}"
    return f"{value:,.2f} ({goal}: {'met' if is_met else 'MISSED'})"


def report(points: Sequence[Point]) -> None:
    """Print the cost of a row by step and size, and the goals that the sizes allow to judge."""
    sizes = sorted({point.size for point in points})
    by_step = {name: {p.size: p for p in points if p.step == name} for name in STEPS}
    print(
        f"\n{'us/row (CPU)':24}", *(f"{size:>20,}" for size in sizes), f"{'ratio (CPU)':>14} {'rows/s':>10} {'MB':>7}"
    )
    for name, found in by_step.items():
        if not found:
            continue
        cells = [f"{_cost(found[size]):9,.1f} ({_cpu(found[size]):8,.1f})" if size in found else "" for size in sizes]
        largest, base = found[max(found)], found.get(BASE_ROWS)
        ratio = ""
        if base is not None and largest is not base:
            ratio = f"{_cost(largest) / _cost(base):.2f} ({_cpu(largest) / max(_cpu(base), 1e-9):.2f})"
        memory = max((point.megabytes or 0 for point in found.values()), default=0)
        print(
            f"{name:24}",
            *(f"{cell:>20}" for cell in cells),
            f"{ratio:>14} {1e6 / _cost(largest):>10,.0f} {memory:>7,.0f}",
        )

    print()
    largest_size = max(sizes)
    rates = {name: 1e6 / _cost(found[max(found)]) for name, found in by_step.items() if found}
    print(f"largest process, MB: {verdict(max(p.megabytes or 0 for p in points), most=MAX_MEGABYTES)}")
    print(f"ingest, rows/s: {verdict(rates['ingest'], least=INGEST_ROWS_PER_SECOND)}")
    ratios = {
        name: _cost(found[max(found)]) / _cost(found[BASE_ROWS])
        for name, found in by_step.items()
        if BASE_ROWS in found and max(found) > BASE_ROWS and name != "opening a reader"
    }
    if ratios:
        worst = max(ratios, key=ratios.__getitem__)
        print(f"cost of a row at {largest_size:,} rows, times that at {BASE_ROWS:,}: worst is {worst}, "
              f"{verdict(ratios[worst], most=MAX_RATIO)}")  # fmt: skip
    decoder, images = "decoder's reader", "upsampler's reader"
    if decoder in rates:
        print(f"decoder's reader, rows/s: {verdict(rates[decoder], least=DECODER_ROWS_PER_SECOND)}")
        print(
            f"decoder's reader, share of images alone: {verdict(rates[decoder] / rates[images], least=DECODER_SHARE)}"
        )


def _cost(point: Point) -> float:
    return point.figures.microseconds_per_row


def _cpu(point: Point) -> float:
    return point.figures.cpu_seconds / max(1, point.figures.rows) * 1e6


def plot(points: Sequence[Point], path: str) -> None:
    """Draw the cost of a row by size, a line for each step, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5.5), sharex=True)
    for panel, title, is_reader in zip(panels, ("Data stages", "Readers"), (False, True), strict=True):
        for name in STEPS:
            line = sorted((p.size, _cost(p)) for p in points if p.step == name and p.step != "opening a reader")
            if line and (name in READERS) == is_reader:
                style = "-" if len(panel.lines) < len(pyplot.rcParams["axes.prop_cycle"]) else "--"  # colours repeat
                panel.plot(*zip(*line, strict=True), style, marker="o", label=name)
        panel.set(xscale="log", yscale="log", title=title, xlabel="rows of the list", ylabel="microseconds per row")
        panel.grid(True, which="both", alpha=0.3)
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10000,100000,1000000", help="sizes, separated by commas")
    parser.add_argument("--ten-million", action="store_true", help="also ten million rows, without images (an hour)")
    parser.add_argument("--width", type=int, default=Dataset.width, help="length of the embeddings")
    parser.add_argument("--rounds", type=int, help="rounds of each step; by default 3, and 1 above 100,000 rows")
    parser.add_argument("--skew", action="store_true", help="also uneven datasets")
    parser.add_argument("--skew-rows", type=int, default=200_000, help="rows of those; half of them are alike")
    parser.add_argument(
        "--peers", action="store_true", help="also scripts that hold all rows in memory, at the largest size"
    )
    parser.add_argument("--folder", help="folder for the datasets; by default a temporary one")
    parser.add_argument("--out", help="JSON file for all numbers")
    parser.add_argument("--plot", help="image file for the plot")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        return run_ordered(json.loads(arguments.step))

    sizes = [int(size) for size in arguments.rows.split(",") if size]
    machine = measure.machine("ray", "pyarrow", "deltalake", "torch")
    print(machine)
    print(f"{vars(arguments)}\n", flush=True)
    if arguments.folder:
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine, "settings": vars(arguments)}
    points: list[Point] = []
    for size in [*sizes, *([TEN_MILLION] if arguments.ten_million else [])]:
        with tempfile.TemporaryDirectory(prefix="unclip-scaling-", dir=arguments.folder) as folder:
            data = Dataset(f"{folder}/data", size, arguments.width, has_images=size < TEN_MILLION)
            for point in measure_size(data, arguments.rounds or rounds_for(size)):
                points.append(point)
                print(f"{size:>12,} {point.step:24} {_cost(point):10,.1f} us/row, {_cpu(point):10,.1f} us CPU/row, "
                      f"{point.megabytes or 0:6,.0f} MB", flush=True)  # fmt: skip
            if arguments.peers and size == max(sizes):
                results["peers"] = compare_scripts(data, arguments.rounds or 3)
    if arguments.skew:
        with tempfile.TemporaryDirectory(prefix="unclip-skew-", dir=arguments.folder) as folder:
            results["skew"] = compare_skews(folder, arguments.skew_rows, arguments.width, arguments.rounds or 3)
    if points:
        report(points)
        results["points"] = [dataclasses.asdict(point) for point in points]
    if arguments.plot:
        plot(points, arguments.plot)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
