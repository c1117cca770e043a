"""Reference loss curves from a successful run, with which later trainings of a pipeline are compared.

    make demo
    python -m benchmarks.reference_curves --storage unclip-data

Copies the curves from the storage to `unclip/training/reference_curves/`, where `reference_curve = "demo-prior"` finds
them, and plots them.
"""

import argparse
import io
from pathlib import Path

from pipelines import dag as dags
from pipelines.config import load
from pipelines.pipeline import compose
from pipelines.prepare import prepare
from tasks.store import DEFAULT_ROOT, Store
from unclip import files
from unclip.training import curves
from unclip.training.trainer import CURVE


def plot(found: dict[str, curves.Curve]) -> bytes:
    """Plot training and validation losses by samples seen; return a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(found), 2.8), layout="constrained")
    for axes, (name, curve) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for column, style in (("relative_loss", "-"), ("validation_relative_loss", "o--")):
            points = {seen: point[column] for seen, point in curve.items() if column in point}
            axes.plot(list(points), list(points.values()), style, markersize=4, label=column.replace("_", " "))
        axes.set(title=name, xlabel="samples seen", yscale="log")
        axes.locator_params(axis="x", nbins=4)
        axes.grid(which="both", alpha=0.3)
        axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="demo")
    parser.add_argument(
        "--storage", default=DEFAULT_ROOT, help="storage folder of the pipeline, with its trainings finished"
    )
    parser.add_argument("--picture", default="docs/reference_curves.png")
    arguments = parser.parse_args()
    config = prepare(load(arguments.pipeline, None, (), arguments.storage))
    found = {}
    for stage, state in dags.states(compose(config), Store(config.storage)).items():
        uri = f"{state.artifact.uri.rpartition('/')[0]}/{CURVE}" if state.artifact else None
        curve = curves.read(uri) if uri and files.exists(uri) else {}
        if any("relative_loss" in point for point in curve.values()):
            name = f"{arguments.pipeline}-{stage}"
            found[name] = curve
            curves.write(str(curves.REFERENCES / f"{name}.tsv"), curve)
    if not found:
        raise SystemExit(f"{arguments.storage}: no finished training with these settings. Run the pipeline first.")
    Path(arguments.picture).write_bytes(plot(found))
    for name, curve in found.items():
        last = curves.at(curve, "relative_loss", list(curve)[-curves.WINDOW], list(curve)[-1])
        print(f"{name:<20}{len(curve):>5} points, ends at {last:.4f} of the loss of predicting the mean")


if __name__ == "__main__":
    main()
