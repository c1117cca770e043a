"""Models that a server offers, kept up to date with what is published."""

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.serving.jobs import Loaded, Sampler
from unclip.errors import InputError

KEEP_SECONDS = 300.0
"""Time that a stack stays loaded after another has taken its place."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A stack that is loaded and answers requests."""

    id: str
    """`name/version`, or what the server was started with if no version is known."""
    aliases: tuple[str, ...]
    """Other names of it in requests."""
    stack: str
    """Local folder."""
    created: int
    """Time of publication, seconds since 1970."""
    system: str
    loaded: Loaded
    values: Mapping[str, Any]
    """Published sampling settings."""
    shortcuts: Mapping[str, str]
    """Parameter of a request -> the sampling setting that it sets."""
    inputs: tuple[str, ...]
    """Inputs of its system besides captions."""

    @property
    def supports(self) -> list[str]:
        found = ["generations"]
        found += ["variations", "interpolations"] if self.loaded.has_variations else []
        found += ["edits"] if self.loaded.has_edits else []
        return [
            *found,
            *(["negative_prompt"] if "negative" in self.inputs else []),
            *sorted({"steps", "guidance_scale"} & self.shortcuts.keys()),
        ]

    def setting(self, parameter: str) -> Any:
        """Published value of a parameter; None if the system does not have it."""
        path = self.shortcuts.get(parameter)
        if path is None:
            return None
        value: Any = self.values
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def describe(self) -> dict[str, Any]:
        """Entry of `GET /v1/models`."""
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "unclip",
            "aliases": list(self.aliases),
            "system": self.system,
            "image_size": self.loaded.image_size,
            "supports": self.supports,
            "defaults": {name: self.setting(name) for name in ("steps", "guidance_scale")},
        }


@dataclasses.dataclass(frozen=True)
class Published:
    """A stack that is to be served."""

    id: str
    aliases: tuple[str, ...]
    stack: str


def find_published(storage: str, wanted: Sequence[str]) -> list[Published]:
    """Stacks to serve: those that are named, or the champions and challengers of a storage, the last promoted first.

    Raises:
        InputError: nothing was published, or a name is unknown.
    """
    from pipelines.published import Found, find_model, has_stack
    from pipelines.storage import open_storage
    from tasks import published

    found: list[tuple[Found, set[str]]]
    if wanted:
        found = [(find_model(storage, name), {name}) for name in wanted]
    else:
        default = find_model(storage, None)
        found = [(default, set())]
        for record in published.read_all(open_storage(storage)):
            for entry in (record.champion, record.challenger):
                if entry is not None and has_stack(entry) and entry.stack != default.folder:
                    aliases = record.aliases_of(entry)
                    found.append((Found(entry.stack, record.name, entry.version, aliases, entry.digest), set()))
    served: list[Published] = []
    for each, names in found:
        name = each.name or Path(each.folder).name
        label = each.version or (each.digest or "")[:8]
        names |= {f"{name}@{alias}" for alias in each.aliases}
        if published.CHAMPION in each.aliases or each.name is None:
            names.add(name)
        served.append(Published(f"{name}/{label}" if label else name, tuple(sorted(names)), each.folder))
    return served


async def load_model(sampler: Sampler, published: Published) -> Model:
    """Load a stack into the sampler, and read what requests need to know.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    from unclip import config
    from unclip.systems.system import find_system, read_stack, sampling_of

    def describe() -> tuple[Any, Any]:
        stack = read_stack(published.stack)
        spec = find_system(stack.system)
        return spec, config.to_dict(sampling_of(stack, spec.sampling))

    loaded = await sampler.load(published.stack)
    spec, values = await asyncio.to_thread(describe)
    created = int(Path(published.stack, "stack.json").stat().st_mtime)
    return Model(
        published.id,
        published.aliases,
        published.stack,
        created,
        spec.name,
        loaded,
        values,
        spec.shortcuts,
        spec.inputs,
    )


class Models:
    """Models by the names that requests may use. The first one is the default."""

    def __init__(self, sampler: Sampler, storage: str, wanted: Sequence[str] = ()) -> None:
        """Args:
        wanted: models as `--model` takes them; none for the champions and challengers of the storage.
        """
        self._sampler, self._storage, self._wanted = sampler, storage, wanted
        self._seen: object = None
        self._switched_at: float | None = None
        self.served: list[Model] = []

    async def refresh(self) -> None:
        """Look at the records of what is published. New stacks are loaded beside the old ones, then take their place.

        Raises:
            UnclipError: there is none, or it cannot be loaded; the models stay as they are.
        """
        seen = await asyncio.to_thread(_records, self._storage)
        if seen == self._seen and self.served:
            await self._unload()
            return
        known = {model.stack: model for model in self.served}
        served = []
        for each in await asyncio.to_thread(find_published, self._storage, self._wanted):
            model = known.get(each.stack) or await load_model(self._sampler, each)
            served.append(dataclasses.replace(model, id=each.id, aliases=each.aliases))
        self.served, self._seen, self._switched_at = served, seen, time.monotonic()

    async def _unload(self) -> None:
        """Unload stacks that are not served any more, once no request can need them."""
        if self._switched_at is not None and time.monotonic() - self._switched_at > KEEP_SECONDS:
            await self._sampler.keep([model.stack for model in self.served])
            self._switched_at = None

    def find(self, name: str | None) -> Model:
        """Model of a name that a request gives; None for the default.

        Raises:
            InputError: it is not served.
        """
        for model in self.served:
            if name is None or name == model.id or name in model.aliases:
                return model
        names = ", ".join(model.id for model in self.served)
        raise InputError(f"model: got {ascii(name)[:80]}, which is not served here. Served are {names}.")


def _records(storage: str) -> object:
    """Records of what is published; none if there is no storage, which named models do not need."""
    from tasks import published
    from tasks.store import Store

    return published.read_all(Store(storage))
