"""Models that a server offers, kept up to date with what is published."""

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.serving.jobs import Loaded, Sampler
from tasks.store import Store
from unclip.errors import InputError


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
    at: float


def find_published(storage: str, wanted: Sequence[str]) -> list[Published]:
    """Stacks to serve: those that are named, or all champions of a storage, the last published first.

    Raises:
        InputError: nothing was published, or a name is unknown.
    """
    from pipelines.published import find_stack
    from pipelines.storage import open_storage

    known = _recorded(open_storage(storage))
    if not wanted:
        find_stack(storage, None)  # says what to do if there is none
        return known
    found = []
    for name in wanted:
        folder = str(Path(find_stack(storage, name)).resolve())
        match = [each for each in known if str(Path(each.stack).resolve()) == folder]
        at = Path(folder, "stack.json").stat().st_mtime
        found.append(
            dataclasses.replace(match[0], aliases=(*match[0].aliases, name))
            if match
            else Published(name, (), folder, at)
        )
    return found


def _recorded(store: Store) -> list[Published]:
    """Champions of a storage, from its records; the last published first."""
    found = []
    for file in store.list("published"):
        record = store.read_json("published", file)
        name = file.removesuffix(".json")
        version = record.get("version")
        identity = f"{name}/{version}" if version is not None else f"{name}/{record['digest'][:12]}"
        found.append(Published(identity, (name, f"{name}@champion"), str(record["stack"]), record["at"]))
    return sorted(found, key=lambda each: -each.at)


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
    created = int(published.at)
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

    def __init__(self, sampler: Sampler, storage: str, wanted: Sequence[str]) -> None:
        self._sampler, self._storage, self._wanted = sampler, storage, wanted
        self._published: list[Published] = []
        self.served: list[Model] = []
        self.refreshed_at = 0.0
        self.problem: str | None = None
        """Reason why the last refresh did not succeed."""

    async def refresh(self) -> None:
        """Look at what is published. New stacks are loaded beside the old ones, then take their place.

        Raises:
            UnclipError: there is none, or it cannot be loaded; the models stay as they are.
        """
        published = await asyncio.to_thread(find_published, self._storage, self._wanted)
        if published != self._published:
            known = {model.stack: model for model in self.served}
            served = []
            for each in published:
                model = known.get(each.stack) or await load_model(self._sampler, each)
                served.append(dataclasses.replace(model, id=each.id, aliases=each.aliases))
            self.served, self._published = served, published
        self.refreshed_at = time.monotonic()

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
