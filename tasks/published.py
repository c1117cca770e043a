"""Records of published models: for each name its versions, the champion, the challenger, and the champions before.

`published/NAME.json` has the facts of the champion at its top, where releases before promotion had those of the last stack, and
reads such a record as that of a champion. Versions are told apart by the digest of their stack. So the record stays right when
MLflow is down, is another server with other version numbers, or when the storage is copied.
"""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tasks.lock import lock, result_lock
from tasks.references import Folder, folders_in
from tasks.store import Store
from unclip import files
from unclip.config import fingerprint
from unclip.errors import DamagedError, InputError
from unclip.messages import without_credentials

FOLDER = "published"
SCORES = "scores"
"""Folder of a storage with the scores of stacks that were candidates or champions; see `tasks.promotion`."""
CHAMPION, CHALLENGER = "champion", "challenger"
"""Aliases in MLflow's registry."""
NAME = r"[\w.-]+"
WAIT_SECONDS = 600.0
"""Time to wait for another process that changes the record of the same name; it takes seconds."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published version."""

    stack: str
    """Folder of the stack; "" if it is in MLflow's registry only."""
    digest: str
    """Digest of the stack's content."""
    at: float
    """Time at which it was published, or last became champion; seconds since 1970."""
    version: str | None = None
    """Number in MLflow's registry; None if MLflow did not accept it."""
    system: str | None = None
    snapshot: str | None = None
    """Digest of the dataset version that its parts were trained on."""
    pipeline: str | None = None
    run: str | None = None
    """Run of the pipeline that published it."""
    image_size: int | None = None
    """Resolution of its images, pixels."""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Metrics of held-out captions."""
    stages: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Fingerprint of each stage that it was made of, by stage."""
    reason: str | None = None
    """Why it became champion or challenger, last."""

    @property
    def label(self) -> str:
        """Version, or the first digits of the digest if MLflow did not accept it."""
        return self.version or self.digest[:8]

    @property
    def scores(self) -> str:
        """Start of the names of its files in the folder `SCORES`; a digest need not be a name."""
        return fingerprint(self.digest)[:16]

    @property
    def publisher(self) -> Folder | None:
        """Stage that published it; None for an imported stack."""
        return next((folder for folder, _ in folders_in(self.stack)), None)


@dataclasses.dataclass(frozen=True)
class Record:
    """All published versions of one name."""

    name: str
    versions: tuple[Entry, ...] = ()
    """In the order in which they were published first."""
    champion: Entry | None = None
    challenger: Entry | None = None
    former: tuple[str, ...] = ()
    """Digests of the champions before, oldest first."""
    is_ahead: bool = False
    """MLflow did not follow the last change, so that its aliases are those before."""

    def find(self, digest: str) -> Entry | None:
        return next((entry for entry in self.versions if entry.digest == digest), None)

    def named(self, label: str) -> Entry | None:
        """Version with this number, or else with this beginning of its digest, of at least six digits."""
        numbered = [entry for entry in self.versions if entry.version == label]
        if numbered or len(label) < 6:
            return numbered[-1] if numbered else None
        found = [entry for entry in self.versions if entry.digest.startswith(label.lower())]
        return found[0] if len(found) == 1 else None

    def aliases_of(self, entry: Entry) -> tuple[str, ...]:
        both = {CHAMPION: self.champion, CHALLENGER: self.challenger}
        return tuple(alias for alias, other in both.items() if other is not None and other.digest == entry.digest)

    def needed(self) -> list[Entry]:
        """Versions whose stacks must stay: champion, challenger, and the champions that a rollback returns to."""
        digests = {*self.former, *(each.digest for each in (self.champion, self.challenger) if each is not None)}
        return [entry for entry in self.versions if entry.digest in digests]

    def with_version(self, entry: Entry) -> "Record":
        """Add a version, or replace what is known of it."""
        others = [other for other in self.versions if other.digest != entry.digest]
        place = next((place for place, other in enumerate(self.versions) if other.digest == entry.digest), len(others))
        versions = (*others[:place], entry, *others[place:])

        def renewed(other: Entry | None) -> Entry | None:
            return entry if other is not None and other.digest == entry.digest else other

        return dataclasses.replace(
            self, versions=versions, champion=renewed(self.champion), challenger=renewed(self.challenger)
        )

    def promote(self, entry: Entry, reason: str) -> "Record":
        """Make a version the champion; the one before becomes the newest of the former champions."""
        entry = dataclasses.replace(entry, at=time.time(), reason=reason)
        former = [digest for digest in self.former if digest != entry.digest]
        if self.champion is not None and self.champion.digest != entry.digest:
            former.append(self.champion.digest)
        challenger = self.challenger if self.challenger and self.challenger.digest != entry.digest else None
        record = dataclasses.replace(self, champion=entry, challenger=challenger, former=tuple(former))
        return record.with_version(entry)

    def challenge(self, entry: Entry, reason: str) -> "Record":
        """Make a version the challenger, in the place of the one before."""
        entry = dataclasses.replace(entry, reason=reason)
        return dataclasses.replace(self, challenger=entry).with_version(entry)

    def roll_back(self, reason: str) -> "Record":
        """Make the champion before the champion again; again, the one before that.

        Raises:
            InputError: there was no other champion.
        """
        entry = self.find(self.former[-1]) if self.former else None
        if entry is None:
            raise InputError(
                f"{self.name}: has had no champion before. `unclip models list` shows its versions, and "
                f"`unclip models promote {self.name}/VERSION` makes one the champion."
            )
        record = self
        if self.champion is not None:
            why = f"was the champion until it was rolled back to version {entry.label}"
            record = record.with_version(dataclasses.replace(self.champion, reason=why))
        entry = dataclasses.replace(entry, at=time.time(), reason=reason)
        challenger = self.challenger if self.challenger and self.challenger.digest != entry.digest else None
        record = dataclasses.replace(record, champion=entry, challenger=challenger, former=self.former[:-1])
        return record.with_version(entry)


def names(store: Store) -> list[str]:
    """Names that stacks of a storage were published under."""
    return [name.removesuffix(".json") for name in store.list(FOLDER) if name.endswith(".json")]


def read(store: Store, name: str) -> Record:
    """Record of a name; one without versions if nothing was published under it.

    Raises:
        DamagedError: the file is damaged, or has a stack outside of the storage.
    """
    if not store.exists(FOLDER, f"{name}.json"):
        return Record(name)
    document = store.read_json(FOLDER, f"{name}.json")
    champion = _entry(document) if document.get("stack") is not None else None
    record = Record(
        name,
        tuple(map(_entry, document.get("versions", ()))),
        champion,
        _entry(document["challenger"]) if document.get("challenger") else None,
        tuple(document.get("former", ())),
        bool(document.get("is_ahead")),
    )
    for each in filter(None, (record.champion, record.challenger, *record.versions)):
        _check_stack(store, name, each.stack)
    for entry in (record.champion, record.challenger):  # of an earlier release, which had no versions
        if entry is not None and record.find(entry.digest) is None:
            record = record.with_version(entry)
    return record


def read_all(store: Store) -> list[Record]:
    """Records of all names."""
    return [read(store, name) for name in names(store)]


def write(store: Store, record: Record) -> None:
    document = {} if record.champion is None else dataclasses.asdict(record.champion)
    document |= {
        "challenger": None if record.challenger is None else dataclasses.asdict(record.challenger),
        "versions": [dataclasses.asdict(entry) for entry in record.versions],
        "former": list(record.former),
        "is_ahead": record.is_ahead,
    }
    store.write_json(document, FOLDER, f"{record.name}.json")


def commit(store: Store, record: Record, follow: Callable[[Record], Record | None]) -> Record:
    """Write a changed record, and again once MLflow has followed it: a kill between the two leaves a record that counts.

    Args:
        follow: gives MLflow's registry the aliases of a record, and returns the record; None if MLflow does not answer.
    """
    record = dataclasses.replace(record, is_ahead=True)
    write(store, record)
    followed = follow(record)
    if followed is None:
        return record
    write(store, followed)
    return followed


@contextlib.contextmanager
def changing(store: Store, name: str) -> Iterator[Record]:
    """Hold the record of a name for a change, so that of two promotions at once one comes first.

    Raises:
        AlreadyRunningError: another process holds it for minutes.
    """
    with lock(store, result_lock("promotion", fingerprint(name)), WAIT_SECONDS):
        yield read(store, name)


def check_name(name: str, where: str) -> None:
    """Raises:
    InputError: no model can have this name.
    """
    if not re.fullmatch(NAME, name):
        raise InputError(f"{where}: got {name[:500]!r}, expected letters, digits, dots, dashes and underscores.")


def _check_stack(store: Store, name: str, stack: Any) -> None:
    """Refuse a stack outside of the storage: a copied record could name any server by it, and any folder.

    Parameters of a URI (`?endpoint_override=...`) choose the server too.
    """
    root, below = f"{store.root}/", str(stack).removeprefix(f"{store.root}/")
    has_parameters = not store.is_local and re.search(r"[?#]", below)
    if stack != "" and (not str(stack).startswith(root) or has_parameters or not files.is_below(below)):
        raise DamagedError(
            f"{store.uri(FOLDER, f'{name}.json')}: got the stack {without_credentials(str(stack))[:500]}, expected a folder in "
            f"{store.root}. The record was changed by hand, or is of another storage: remove it, and publish or import the "
            "stack again."
        )


def _entry(values: Mapping[str, Any]) -> Entry:
    known = {field.name for field in dataclasses.fields(Entry)}
    given = {name: value for name, value in values.items() if name in known}
    return Entry(**{"digest": "", "at": 0.0, **given})
