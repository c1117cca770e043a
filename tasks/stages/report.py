"""Stage `report`: a page on a dataset version: kept rows, dropped rows and the reasons; opens from disk without a network.

Each range of keys is summarised in a task of its own (`tasks.report_summary`), and the page (`tasks.report_page`) is made of
the sum of the summaries (`tasks.summaries`), which is kept beside it. The page of a later refresh is made of the same sum
after the rows that have changed since are subtracted and added; it is the page that all rows would give. Keys are hashes, so
the kept rows with the smallest keys are a random sample, the same one whenever the page is made.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from tasks import generations, host_counts, ranges, tables
from tasks.dataflow import run_all
from tasks.duplicates import Earlier, Winner, find_winners
from tasks.generations import Generation, Sums
from tasks.index import index_identity
from tasks.new_duplicates import Lookups
from tasks.report_page import NUM_DOMAINS, Found, Limit, lists_of, render, shown_duplicates
from tasks.report_summary import Changes, Tables, hosts_uri, summarise_changes, summarise_range
from tasks.stage import Artifact, Output, Pinning, StageContext, stage
from tasks.store import Store
from tasks.summaries import SortedList, Summary, Totals
from unclip import files
from unclip.config import fingerprint, require, to_dict

_SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    num_pictures: int = 24
    """Number of kept rows shown."""
    num_at_edges: int = 8
    """Number of rows shown on either side of each threshold."""
    num_clusters: int = 12
    """Number of duplicates per reason, shown beside the kept row."""

    limits: tuple[Limit, ...] = ()
    """Thresholds of [filter] and [curate], filled in by the pipeline."""

    def __post_init__(self) -> None:
        for name in ("num_pictures", "num_at_edges", "num_clusters"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")

    def lists(self) -> dict[str, SortedList]:
        """Lists of rows that the page shows, by name."""
        return lists_of(self.limits, self.num_pictures, self.num_at_edges, self.num_clusters)


def _pin(config: ReportConfig, pinning: Pinning) -> ReportConfig:
    """Fill in the limits of [filter] and [curate]."""
    limits = {**pinning.config.filter.limits(), **pinning.config.curate.limits()}
    return dataclasses.replace(config, limits=tuple(Limit(name, *pair) for name, pair in limits.items()))


@stage("report", version=3, pin=_pin, shows_rows=True)
def report(context: StageContext, config: ReportConfig, dataset: Artifact) -> Output:
    """Write the page on the dataset: totals, reasons, domains, distributions, and images at every threshold.

    Only rows that have changed since the page of an earlier refresh are read, and those that are shown.
    """
    facts, read, lists = dataset.facts, Tables.of(dataset.facts), config.lists()
    continued = _find_changes(context, config, read)
    found = None if continued is None else _continue(context, lists, *continued, _lookups(context.store, facts))
    if found is None:
        found = summarise(read, lists, f"{context.folder}/hosts", context.intermediate)
    page = render(context.run.pipeline, facts, config.limits, lists, found)
    uri = f"{context.folder}/report.html"
    files.write(uri, page.encode())
    winners = {key: None if winner is None else list(winner) for key, winner in found.winners.items()}
    files.write_json(f"{context.folder}/{_SUMMARY}", {"summary": found.summary.document(), "winners": winners})
    counts = {name: facts[name] for name in ("rows", "reasons")}
    generation = Generation(
        context.folder,
        _settings(config),
        read.selection,
        dataclasses.asdict(read),
        Sums(counts, 0),
        0,  # a summary has no layers
        {"hosts": found.hosts},
        [index_identity(read.images)],
    )
    generations.save(context, generation)
    context.tracker.bytes(page.encode(), "report.html")
    return Output(uri, files.sha256(page.encode()))


def _settings(config: ReportConfig) -> str:
    return fingerprint(report.version, to_dict(config))


def _find_changes(context: StageContext, config: ReportConfig, now: Tables) -> tuple[Generation, Changes] | None:
    """Find an earlier page to continue, and what has changed since; None if there is none, or if much has."""
    layers = {name: ranges.layers(getattr(now, name)) for name in ("selection", "pairs", "scores")}

    def layers_known(earlier: Generation) -> int | None:
        before = Tables(**earlier.read)
        is_earlier = before.selection in layers["selection"][:-1] and before.images == now.images
        is_earlier = is_earlier and all(getattr(before, name) in found for name, found in layers.items())
        is_whole = host_counts.num_files(earlier.others["hosts"]) is not None
        is_whole = is_whole and files.exists(f"{earlier.folder}/{_SUMMARY}")
        return layers["selection"].index(before.selection) if is_earlier and is_whole else None

    earlier = generations.find(context.store, "report", _settings(config), layers_known, [index_identity(now.images)])
    if earlier is None:
        return None
    before, described = Tables(**earlier.read), now.described()
    since = {name: found[found.index(getattr(before, name)) + 1 :] for name, found in layers.items()}
    if earlier.begins_anew(
        sum(tables.num_rows(uri) for folder in since["selection"] for uri in ranges.range_files(folder))
    ):
        return None
    known = set(before.described())
    if not all(map(files.exists, known.difference(described))):  # earlier sizes of images are read from them
        return None
    new = [uri for uri in described if uri not in known]
    return earlier, Changes(before, now, **since, described=described, new=new)


def summarise(read: Tables, lists: Mapping[str, SortedList], hosts: str, scratch: str) -> Found:
    """Summarise all rows.

    Args:
        hosts: folder for the counts of hosts.
        scratch: folder for intermediate files.
    """
    key_ranges, described = read.key_ranges(), read.described()
    summarise_one = functools.partial(summarise_range, read, described, lists, scratch)
    summary = Summary.total(run_all(summarise_one, key_ranges), lists)
    uris = [hosts_uri(scratch, key_range) for key_range in key_ranges]
    num_hosts, top = host_counts.write_counts(hosts, uris, len(key_ranges), NUM_DOMAINS)
    return Found(summary, hosts, num_hosts, top, _winners(read, described, shown_duplicates(summary, lists)))


def _lookups(store: Store, facts: Mapping[str, Any]) -> Lookups | None:
    """Look-ups of the rows that `dedup` has compared; None if it has none, or if some are missing."""
    selection = facts.get("selection", "")
    generation = generations.read(store, selection.rpartition("/")[0]) if selection else None
    folders = generation.others["lookups"] if generation else []
    if not folders:
        return None
    found = Lookups(folders, ranges.range_count(selection), bool(files.names(f"{folders[0]}/looks")))
    return found if found.is_whole() else None


def _continue(
    context: StageContext,
    lists: Mapping[str, SortedList],
    earlier: Generation,
    changes: Changes,
    lookups: Lookups | None,
) -> Found | None:
    """Summarise all rows, of which only changed ones are read; None if too few rows of a list are known."""
    stored = files.read_json(f"{earlier.folder}/{_SUMMARY}")
    before, scratch = Summary.of_document(stored["summary"]), context.intermediate
    winners: dict[str, Winner | None] = {
        key: None if winner is None else (winner[0], winner[1], winner[2]) for key, winner in stored["winners"].items()
    }
    watched = {key for examples in before.examples.values() for _, key in examples.rows}
    watched |= winners.keys() | {winner[2] for winner in winners.values() if winner}
    key_ranges = changes.now.key_ranges()
    keys = pa.array(sorted(watched), pa.string())
    parts = run_all(functools.partial(summarise_changes, changes, lists, scratch, keys), key_ranges)
    changed = frozenset().union(*(part.watched for part in parts))
    totals = before.totals.plus(Totals.total(part.before for part in parts), -1)
    new, examples = Summary.total([part.now for part in parts], lists), {}
    for name, each in lists.items():
        replaced = before.examples[name].replace(changed, new.examples[name], each.capacity, each.num_shown)
        if replaced is None:
            return None
        examples[name] = replaced
    summary = Summary(totals.plus(new.totals), examples)
    hosts, earlier_hosts = f"{context.folder}/hosts-since-{earlier.name}", earlier.others["hosts"]
    count, uris = host_counts.num_files(earlier_hosts), [hosts_uri(scratch, key_range) for key_range in key_ranges]
    assert count is not None
    num_hosts, top = host_counts.write_counts(hosts, uris, count, NUM_DOMAINS, earlier_hosts)
    left = {
        key: winner
        for key, winner in winners.items()
        if key not in changed and (winner is None or winner[2] not in changed)
    }
    known = Earlier(left, changes.selection, changes.new, lookups)
    duplicates = shown_duplicates(summary, lists)
    return Found(summary, hosts, num_hosts, top, _winners(changes.now, changes.described, duplicates, known))


def _winners(
    read: Tables, described: Sequence[str], duplicates: Mapping[str, str], earlier: Earlier | None = None
) -> dict[str, Winner | None]:
    embeddings = tables.files(read.embeddings, read.embeddings_version)
    found = find_winners(duplicates, read.selection, described, embeddings, earlier)
    return {key: found.get(key) for key in duplicates}
