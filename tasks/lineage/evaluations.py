"""Held-out rows in the files of evaluations: captions beside scores, and references, which takedowns remove."""

import pyarrow as pa
import pyarrow.compute as pc

from tasks import tables
from tasks.store import Store
from unclip import files, seals

EVALUATE = "evaluate"
SCORES = "scores.parquet"
"""Scores of single images in the folder of an evaluation, with the captions and keys of held-out rows."""
REFERENCE = "reference"
"""Name under which references are stored; see `tasks.reference`."""
KEYS = "keys.parquet"
"""Keys of the rows of a reference."""


def blank_captions(folder: str, keys: frozenset[str]) -> None:
    """Blank the captions of rows in the scores of an evaluation; the rows stay, since their positions give the noise."""
    uri, wanted = f"{folder}/{SCORES}", pa.array(sorted(keys), pa.string())
    if not files.exists(uri) or not len(wanted) or not tables.has_keys(uri, wanted):
        return
    scores = tables.read_file(uri)
    is_gone = pc.fill_null(pc.is_in(scores["key"], value_set=wanted), False)
    position = scores.column_names.index("caption")
    blanked = scores.set_column(position, "caption", pc.if_else(is_gone, "", scores["caption"]))
    if not blanked.equals(scores):
        with seals.changing(folder, SCORES):
            tables.write_file(uri, blanked)


def holds_rows(folder: str, keys: frozenset[str]) -> bool:
    """Return True if a reference has one of the rows; one whose rows are not known counts as having them."""
    uri = f"{folder}/{KEYS}"
    return not files.exists(uri) or (bool(keys) and tables.has_keys(uri, pa.array(sorted(keys), pa.string())))


def delete_reference(store: Store, name: str) -> None:
    """Delete a reference, its record first."""
    files.delete(store.uri("stages", REFERENCE, f"{name}.json"))
    files.delete(store.uri("artifacts", REFERENCE, name))


def remove_rows(store: Store, keys: frozenset[str]) -> None:
    """Blank the captions of rows in all scores, and delete the references that hold one of them; evaluations make them anew."""
    for name in store.list("artifacts", EVALUATE):
        blank_captions(store.uri("artifacts", EVALUATE, name), keys)
    for name in store.list("artifacts", REFERENCE):
        if holds_rows(store.uri("artifacts", REFERENCE, name), keys):
            delete_reference(store, name)
