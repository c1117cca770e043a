"""Summary of a run: printed on the console for people, and written to `summary.json` for programs."""

import contextlib
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pipelines.dataset import PipelineConfig
from tasks.stage import Artifact
from tasks.store import DEFAULT_ROOT, Store
from unclip import files, seals
from unclip.errors import DamagedError

ATTRIBUTES = ("colour", "background", "size", "shape", "place")


def summarise(pipeline: str, artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Summarise a finished run from its artifacts alone, so that a run with nothing to do reports the same numbers.

    `artifacts` has the fingerprint of each stage's artifact, so that `unclip gc` keeps what the summary is about.
    """
    summary: dict[str, Any] = {"pipeline": pipeline}
    if "curate" in artifacts:
        facts = artifacts["curate"].facts
        summary |= {"rows": facts["rows"], "reasons": facts["reasons"], "snapshot": facts["snapshot"]["digest"]}
    if lines := artifacts["ingest"].facts.get("lines") if "ingest" in artifacts else None:
        summary["lines"] = lines
    if "evaluate" in artifacts:
        facts = artifacts["evaluate"].facts
        summary["captions"] = facts["captions"]
        summary["evaluated_snapshot"] = summary["snapshot"]
        summary["clip_score"] = facts["clip_score"]
        summary |= {name: facts[name] for name in ("metrics", "intervals") if name in facts}
        summary["accuracy"] = facts["accuracy"].get("heldout", {})
        summary["accuracy_unseen"] = facts["accuracy"].get("unseen", {})
    if "publish" in artifacts:
        summary["stack"] = artifacts["publish"].uri
        summary["registered"] = {key: artifacts["publish"].facts[key] for key in ("name", "alias", "version")}
    summary["seconds"] = {name: artifact.seconds for name, artifact in artifacts.items()}
    summary["artifacts"] = {name: artifact.fingerprint for name, artifact in artifacts.items()}
    return summary


def write_results(
    summary: Mapping[str, Any],
    artifacts: Mapping[str, Artifact],
    store: Store,
    stages: Collection[str],
    name: str | None = None,
) -> None:
    """Write the summary, the report and the sample grids of a run to a folder in `results/`.

    The summary keeps what this run has nothing to say about: after a refresh, the evaluation and the stack of the last run.

    Args:
        stages: names of all stages of the pipeline; the summary forgets others, which it had before.
        name: name of the folder; None takes that of the pipeline.
    """
    path = ("results", name or summary["pipeline"], "summary.json")
    before: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, DamagedError):
        before = store.read_json(*path)
    merged = {**before, **summary}
    for name in ("seconds", "artifacts"):
        kept = {stage: value for stage, value in before.get(name, {}).items() if stage in stages}
        merged[name] = {**kept, **summary[name]}
    folder = store.uri(*path[:-1])
    files.delete(f"{folder}/{seals.MANIFEST}")  # after a kill, files are not covered rather than damaged
    if merged != before:
        store.write_json(merged, *path)
    if "report" in artifacts:
        files.write(f"{folder}/report.html", files.read(artifacts["report"].uri))
    if "evaluate" in artifacts:
        for name, uri in artifacts["evaluate"].facts["images"].items():
            files.write(f"{folder}/{name}.png", files.read(uri))
    seals.cover(folder)


def print_summary(summary: Mapping[str, Any], store: Store, config: PipelineConfig, name: str | None = None) -> None:
    """Print the summary of a run; `name` as for `write_results`."""
    name = name or summary["pipeline"]
    lines = [""]
    if "rows" in summary:
        rows = summary["rows"]
        lines.append(
            f"rows       {rows['in']:,} in = {rows['kept']:,} kept + {rows['dropped']:,} dropped + {rows['failed']:,} failed"
        )
        lines += [
            f"           {count:>7,}  {reason}"
            for reason, count in sorted(summary["reasons"].items(), key=lambda item: -item[1])
        ]
    if found := summary.get("lines"):
        others = " + ".join(f"{found[name]:,} {name}" for name in ("header", "blank", "continued"))
        num_rows = found["in"] - sum(found[name] for name in ("header", "blank", "continued"))
        lines.append(f"lines      {found['in']:,} in text files = {num_rows:,} rows + {others}")
    lines.append("seconds    " + "  ".join(f"{name} {seconds:.0f}" for name, seconds in summary["seconds"].items()))
    if summary.get("accuracy"):
        unseen = summary["accuracy_unseen"]
        captions = summary["captions"]
        lines.append(
            f"accuracy   {'':<12}{captions['heldout']:>5} held-out captions"
            + (f"{captions['unseen']:>6} unseen combinations" if unseen else "")
        )
        for attribute in ATTRIBUTES:
            if attribute in summary["accuracy"]:
                cells = f"           {attribute:<12}{summary['accuracy'][attribute]:>10.3f}"
                lines.append(cells + (f"{unseen[attribute]:>22.3f}" if attribute in unseen else ""))
    elif "clip_score" in summary:
        lines.append(
            "clip score " + "  ".join(f"{group} {score:.3f}" for group, score in summary["clip_score"].items())
        )
    if "captions" in summary:
        lines.append(f"images     {store.uri('results', name, 'heldout.png')}")
    if "report" in summary["seconds"]:
        lines.append(f"report     {store.uri('results', name, 'report.html')}")
    lines.append(f"summary    {store.uri('results', name, 'summary.json')}")
    storage = "" if Path(config.storage) == Path(DEFAULT_ROOT) else f" --storage {shlex.quote(config.storage)}"
    lines.append(f"browse     unclip ui{storage}")
    if "stack" in summary:
        lines.append(f'sample     unclip sample "a small yellow star on a purple background"{storage} --out grid.png')
    print("\n".join(lines), flush=True)
