"""Nodes of a cluster, and what they offer to tasks: resources, and labels that say what their role is allowed to do."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

EGRESS = "unclip/egress"
"""Label of nodes; `public` if they reach the internet. In a cluster without this label, all do."""


@dataclasses.dataclass(frozen=True)
class Node:
    amounts: Mapping[str, float]
    """Resources by their names in Ray, used ones included."""
    labels: Mapping[str, str]

    def offers(self, amounts: Mapping[str, float], labels: Mapping[str, str]) -> bool:
        """Return True if one process with these needs can run here."""
        has_resources = all(self.amounts.get(name, 0) >= amount for name, amount in amounts.items())
        return has_resources and labels.items() <= self.labels.items()


def alive() -> list[Node]:
    """Nodes of the cluster that this process is connected to."""
    import ray

    found = ray.nodes()  # type: ignore[no-untyped-call]
    return [Node(node["Resources"], node["Labels"]) for node in found if node["Alive"]]


def egress_labels(nodes: Sequence[Node]) -> dict[str, str]:
    """Labels that a task needs to reach the internet on one of these nodes."""
    return {EGRESS: "public"} if any(EGRESS in node.labels for node in nodes) else {}


def with_egress() -> dict[str, Any]:
    """Options of Ray tasks that reach the internet; a cluster that the first task will start has this machine alone."""
    import ray

    return {"label_selector": egress_labels(alive()) if ray.is_initialized() else {}}
