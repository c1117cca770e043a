"""Summary of a run: printed on the console for people, and written to `summary.json` for programs."""

import contextlib
import html
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pipelines.dataset import PipelineConfig
from tasks.published import CHALLENGER
from tasks.rows import by_frequency
from tasks.stage import Artifact
from tasks.store import DEFAULT_ROOT, Store
from tasks.tracking import PREVIEWS
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
        summary |= {name: facts[name] for name in ("metrics", "intervals")}
        summary["accuracy"] = facts["accuracy"].get("heldout", {})
        summary["accuracy_unseen"] = facts["accuracy"].get("unseen", {})
    if "publish" in artifacts:
        summary["stack"] = artifacts["publish"].uri
        facts = artifacts["publish"].facts
        summary["registered"] = {key: facts.get(key) for key in ("name", "alias", "version", "reason")}
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
    store.check_links()
    files.delete(f"{folder}/{seals.MANIFEST}")  # after a kill, files are not covered rather than damaged
    if merged != before:
        store.write_json(merged, *path)
    if "report" in artifacts:
        page = files.read(artifacts["report"].uri)
        if merged.get("registered"):
            published = f"</h1>\n<p>{html.escape(_published(merged['registered']))}</p>"
            page = page.replace(b"</h1>", published.encode(), 1)
        files.write(f"{folder}/report.html", page)
    if "evaluate" in artifacts:
        for name, uri in artifacts["evaluate"].facts["images"].items():
            files.write(f"{folder}/{name}.png", files.read(uri))
        _copy_previews(artifacts["evaluate"].uri, folder)
    seals.cover(folder)


def _copy_previews(evaluation: str, folder: str) -> None:
    """Copy the images of an evaluation that show rows, and the rows' keys, unless a takedown has deleted them."""
    files.delete(f"{folder}/{PREVIEWS}")
    for name in files.names(f"{evaluation}/{PREVIEWS}"):
        files.write(f"{folder}/{PREVIEWS}/{name}", files.read(f"{evaluation}/{PREVIEWS}/{name}"))


def print_summary(summary: Mapping[str, Any], store: Store, config: PipelineConfig, name: str | None = None) -> None:
    """Print the summary of a run; `name` as for `write_results`."""
    name = name or summary["pipeline"]
    lines = [""]
    if "rows" in summary:
        rows = summary["rows"]
        lines.append(
            f"rows       {rows['in']:,} in = {rows['kept']:,} kept + {rows['dropped']:,} dropped + {rows['failed']:,} failed"
        )
        lines += [f"           {count:>7,}  {reason}" for reason, count in by_frequency(summary["reasons"])]
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
        with_captions = f"{PREVIEWS}/heldout.png"  # until a takedown of one of their rows
        image = with_captions if store.exists("results", name, with_captions) else "heldout.png"
        lines.append(f"images     {store.uri('results', name, image)}")
    if "report" in summary["seconds"]:
        lines.append(f"report     {store.uri('results', name, 'report.html')}")
    lines.append(f"summary    {store.uri('results', name, 'summary.json')}")
    if registered := summary.get("registered"):
        lines.append(f"published  {_published(registered)}")
    storage = "" if Path(config.storage) == Path(DEFAULT_ROOT) else f" --storage {shlex.quote(config.storage)}"
    lines.append(f"browse     unclip ui{storage}")
    if "stack" in summary:
        model = ""
        if registered and registered["alias"] == CHALLENGER:
            challenger = f"{registered['name']}@{CHALLENGER}"
            lines.append(f"promote    unclip models promote {challenger}{storage}")
            model = f" --model {challenger}"
        caption = '"a small yellow star on a purple background"'
        lines.append(f"sample     unclip sample {caption}{model}{storage} --out grid.png")
    print("\n".join(lines), flush=True)


def _published(registered: Mapping[str, Any]) -> str:
    """Sentence on what became of the published version."""
    version = registered["version"]
    label = registered["name"] if version is None else f"{registered['name']}/{version}"
    return f"{label} is the {registered['alias']}: {registered.get('reason') or 'published'}"
