"""The DAG as data: its stages, their states and its diagrams. Nothing here executes a stage."""

import dataclasses
import io
from collections.abc import Callable, Mapping
from typing import Any

from tasks.lock import TABLES, lock
from tasks.stage import Artifact, Run, Stage, find_artifact
from tasks.store import Store

COLOURS = {"cached": "#d5ecd4", "to run": "#fdeab6", "done": "#d5ecd4", "failed": "#f5c0c0", "skipped": "#e4e4e4"}


@dataclasses.dataclass(frozen=True)
class Node:
    """One stage of a DAG."""

    stage: Stage
    config: Any
    section: tuple[str, ...]
    """Path of the stage's settings within the pipeline's settings."""
    parents: tuple[str, ...]
    ray_node: Any
    """Ray DAG node; `execute` runs the stage after its parents."""


@dataclasses.dataclass(frozen=True)
class State:
    """State of a stage: up to date or to be run."""

    label: str
    """"cached" or "to run"."""
    why: str
    """Reason, for people."""
    artifact: Artifact | None = None
    lock: str | None = None
    """Name of the lock that the stage needs in order to run, if it is known yet; see `tasks.lock`."""


Dag = Mapping[str, Node]
"""Nodes by stage name, parents first."""


class Binder:
    """Adds stages to a DAG, each with its section of the configuration."""

    def __init__(self, config: Any, run: Run) -> None:
        self.config, self.run = config, run
        self.nodes: dict[str, Node] = {}
        self._names: dict[int, str] = {}

    def __call__(self, stage: Stage, *parents: Any) -> Any:
        """Add stage `x`, configured by `config.x`."""
        return self._place(stage, (stage.name,), parents)

    def each(self, stage: Stage, *parents: Any) -> tuple[Any, ...]:
        """Add stage `x` once per section of `config.xs`, as `x-a`, `x-b` and so on."""
        keys = getattr(self.config, f"{stage.name}s")
        return tuple(self._place(stage.member(key), (f"{stage.name}s", key), parents) for key in keys)

    def _place(self, stage: Stage, section: tuple[str, ...], parents: tuple[Any, ...]) -> Any:
        stage_config = _section(self.config, section)
        ray_node = stage.bind(self.run, stage_config, *parents)
        parent_names = tuple(self._names[id(parent)] for parent in parents)
        self.nodes[stage.name] = Node(stage, stage_config, section, parent_names, ray_node)
        self._names[id(ray_node)] = stage.name
        return ray_node


def _section(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = config[name] if isinstance(config, Mapping) else getattr(config, name)
    return config


def with_section(config: Any, path: tuple[str, ...], section: Any) -> Any:
    """Return a copy of the settings with the section at this path replaced."""
    if not path:
        return section
    inner = with_section(_section(config, path[:1]), path[1:], section)
    if isinstance(config, Mapping):
        return {**config, path[0]: inner}
    return dataclasses.replace(config, **{path[0]: inner})


def compose(pipeline: Callable[[Binder], Any], config: Any, run: Run) -> Dag:
    """Build the DAG of a pipeline."""
    binder = Binder(config, run)
    pipeline(binder)
    return binder.nodes


def up_to(dag: Dag, last: str) -> Dag:
    """Return the subgraph of `last` and its ancestors."""
    needed = {last}
    for name in reversed(list(dag)):
        if name in needed:
            needed |= set(dag[name].parents)
    return {name: node for name, node in dag.items() if name in needed}


def states(dag: Dag, store: Store) -> dict[str, State]:
    """Return the state of each stage, and the reason for it, as a run would find them now."""
    found: dict[str, State] = {}
    for name, node in dag.items():
        waiting = [parent for parent in node.parents if found[parent].artifact is None]
        if waiting:
            known_lock = None if node.stage.reads_snapshot else TABLES  # another name has the fingerprint in it
            found[name] = State("to run", f"after {', '.join(waiting)}", lock=known_lock)
            continue
        parents = [artifact.digest for parent in node.parents if (artifact := found[parent].artifact)]
        stage_fingerprint = node.stage.fingerprint(node.config, parents, store)
        artifact = find_artifact(store, name, stage_fingerprint)
        if artifact:
            found[name] = State("cached", f"made in {artifact.seconds:.0f} s", artifact)
        else:
            ran_before = bool(store.list("stages", name))
            why = "its settings or inputs changed" if ran_before else "never ran here"
            found[name] = State("to run", f"{why} ({stage_fingerprint[:8]})", lock=node.stage.lock(stage_fingerprint))
    return found


def identities(dag: Dag, store: Store) -> dict[str, str]:
    """Identity of what each stage makes: its settings and those of all stages before it. It is known before any of them ran."""
    found: dict[str, str] = {}
    for name, node in dag.items():
        found[name] = node.stage.fingerprint(node.config, [found[parent] for parent in node.parents], store)
    return found


def refuse_if_in_use(states: Mapping[str, State], store: Store) -> None:
    """Check that no other process makes what a run would make, before anything starts.

    Stages take the same locks again while they work, and wait then.

    Raises:
        AlreadyRunningError: another run or a takedown is at work.
    """
    for name in dict.fromkeys(state.lock for state in states.values() if state.lock):
        with lock(store, name):
            pass


def mermaid(dag: Dag, labels: Mapping[str, str] | None = None) -> str:
    """Render the DAG as Mermaid text; `labels` (stage -> state) set the colours."""
    lines = ["flowchart LR"]
    lines += [f"    {parent} --> {name}" for name, node in dag.items() for parent in dict.fromkeys(node.parents)]
    for name, label in (labels or {}).items():
        lines.append(f"    style {name} fill:{COLOURS.get(label, '#ffffff')}")
    return "\n".join(lines) + "\n"


def render_png(dag: Dag, labels: Mapping[str, str] | None = None) -> bytes:
    """Render the DAG as a PNG, with stages in columns by their distance from the first."""
    from matplotlib.figure import Figure

    depth: dict[str, int] = {}
    for name, node in dag.items():
        depth[name] = 1 + max((depth[parent] for parent in node.parents), default=-1)
    columns: dict[int, list[str]] = {}
    for name, column in depth.items():
        columns.setdefault(column, []).append(name)
    place = {
        name: (column * 1.7, (len(members) - 1) / 2 - row)
        for column, members in columns.items()
        for row, name in enumerate(members)
    }
    tallest = max(4, *(len(members) for members in columns.values()))
    figure = Figure(figsize=(1.5 * len(columns), 0.8 * tallest), dpi=110, layout="constrained")
    axes = figure.subplots()
    boxes: dict[str, Any] = {}
    for name, (x, y) in place.items():
        colour = COLOURS.get((labels or {}).get(name, ""), "#eef2f8")
        box = {"boxstyle": "round,pad=0.45", "fc": colour, "ec": "#666666"}
        boxes[name] = axes.text(x, y, name, ha="center", va="center", fontsize=10, bbox=box, zorder=4).get_bbox_patch()
    for name, node in dag.items():
        for parent in dict.fromkeys(node.parents):
            bend = "arc3,rad=-0.25" if depth[name] - depth[parent] > 1 else "arc3"
            arrow = {"arrowstyle": "-|>", "color": "#888888", "connectionstyle": bend}
            ends = {"patchA": boxes[parent], "patchB": boxes[name], "shrinkA": 2, "shrinkB": 2}
            axes.annotate("", xy=place[name], xytext=place[parent], arrowprops=arrow | ends)
    axes.set_xlim(-0.9, max(x for x, _ in place.values()) + 0.9)
    axes.set_ylim(0.1 - tallest / 2, tallest / 2 - 0.1)
    axes.axis("off")
    buffer = io.BytesIO()
    figure.draw_without_rendering()  # arrows need the positions of the boxes
    figure.savefig(buffer)
    return buffer.getvalue()
