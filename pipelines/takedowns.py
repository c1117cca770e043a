"""Recorded takedowns, carried out by whoever holds the lock of the tables."""

from collections.abc import Iterable, Mapping

from pipelines.console import say
from pipelines.records import tracking_uris_of
from tasks import tombstones
from tasks.lineage.takedown import Ledger, carry_out, read_ledger
from tasks.lock import TABLES, lock
from tasks.store import Store


def carry_out_recorded(store: Store, wait: float = 0.0, named: Iterable[str | None] = ()) -> dict[str, Ledger]:
    """Carry out all recorded requests; returns their ledgers by id.

    Args:
        wait: seconds to wait for another owner of the tables, which may carry them out itself.
        named: MLflow tracking URIs that the operator has named; see `tracking_uris_of`.

    Raises:
        AlreadyRunningError: another process still holds the lock of the tables.
    """
    if not tombstones.recorded(store):
        return {}
    with lock(store, TABLES, wait):
        requests = tombstones.recorded(store)
        if not requests:
            return {}
        uris = tracking_uris_of(store, named)
        return {request.id: carry_out(store, request, uris.named, uris.unnamed) for request in requests}


def carry_out_request(
    store: Store, request: tombstones.Request, wait: float = 0.0, named: Iterable[str | None] = ()
) -> Ledger:
    """Carry out all recorded requests and return the ledger of one, which another process may have carried out meanwhile.

    Raises:
        AlreadyRunningError: another process still holds the lock of the tables after `wait` seconds.
    """
    return carry_out_recorded(store, wait, named).get(request.id) or read_ledger(store, request)


def print_carried_out(store: Store, ledgers: Mapping[str, Ledger]) -> None:
    """Say which recorded requests a run has carried out."""
    for name, ledger in ledgers.items():
        uri, what = store.uri("takedowns", f"{name}.json"), ", ".join(ledger.requests[:3])
        say(f"takedown carried out ({what}): {len(ledger.keys):,} rows; ledger written to {uri}")
        if ledger.traces.remaining or ledger.traces.unanswered:
            say(f"    its ledger names MLflow runs or servers that are not done; repeat the takedown of {what}")
