"""Systems, which turn captions into images with trained parts; and stacks, the folders that systems are published as.

    stack/stack.json        the system's name, its parts in order, its CLIP, its sampling settings
          <part>/           one folder for each part: safetensors under a manifest
          clip/             CLIP, unless it is one of open_clip's pretrained models, under a manifest
          statistics/       statistics of the image embeddings that the stack was trained on, under a manifest
          manifest.json     sha256 of stack.json and of the manifests of all folders; written last

Loading a stack reads no file outside its folder, checks every file, and uses no network: a pretrained CLIP is taken from
open_clip's cache.

A system of this library is a module or package in `unclip.systems` that defines `SYSTEM`. Another package adds a system by an
entry point in the group `unclip.systems` that refers to a `SystemSpec`. A stack refers to its system by name only; no code is
ever imported from its folder.

Letters: B batch, S resolution.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import os
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unclip import config, files, foreign
from unclip.entry_points import entry_points
from unclip.errors import CheckpointError, ConfigError, DamagedError
from unclip.models import clip as clip_models
from unclip.models.clip import Clip, ImageEmbeddings
from unclip.scratch import scratch_folder
from unclip.systems.part import Part
from unclip.systems.rows import RowGenerators
from unclip.training import checkpoints

Input = Literal["negative", "start"]
"""Inputs that some systems take besides captions; see `System.sample`."""

ENTRY_POINTS = "unclip.systems"
LARGEST_BATCH = 4096
"""Most captions sampled together."""


class Sampling(Protocol):
    """Sampling settings of a system: a frozen dataclass with the fields below and a section for each part that has some."""

    @property
    def batch_size(self) -> int:
        """Captions sampled together."""


def check_batch_size(batch_size: int) -> None:
    """Check the `batch_size` of sampling settings.

    Raises:
        ConfigError: it is not 1 to `LARGEST_BATCH`.
    """
    config.require(1 <= batch_size <= LARGEST_BATCH, "batch_size", batch_size, f"1 to {LARGEST_BATCH}")


class System(Protocol):
    """A loaded system."""

    sampling: Any
    """Default sampling settings, of the class that its `SystemSpec` names."""

    @property
    def image_size(self) -> int:
        """S, resolution of its images, pixels."""

    @property
    def device(self) -> torch.device:
        """Device of its weights."""

    def to(self, device: torch.device) -> Self:
        """Move the system to a device."""

    def sample(self, captions: Sequence[str], sampling: Any, generator: torch.Generator) -> Tensor:
        """Sample one batch of images, [len(captions), 3, S, S] in [-1, 1], on the system's device.

        Args:
            sampling: settings, of the system's own class.
            generator: source of all randomness, on the system's device.

        If its `SystemSpec` lists more inputs, the system takes them by keyword, one for each caption: `negative`, captions to
        guide away from; `start`, images [len(captions), 3, S, S] in [-1, 1] to start from, on any device.
        """


@runtime_checkable
class ChecksCaptions(Protocol):
    """System that cannot sample every caption."""

    def check_captions(self, captions: Sequence[str]) -> None:
        """Check captions before they are sampled; an evaluation, which must go on, does not.

        Raises:
            InputError: a caption cannot be sampled; says which can.
        """


@runtime_checkable
class EmbedsCaptions(Protocol):
    """System that samples an image embedding for each caption before the image."""

    def sample_embeddings(self, captions: Sequence[str], sampling: Any, generator: torch.Generator) -> Tensor | None:
        """Sample the embeddings [len(captions), E] that `sample` makes images of, given the same generator.

        Returns:
            None if these settings sample none.
        """

    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Text embeddings [len(captions), E] of the system's CLIP, unit norm."""


@runtime_checkable
class Reconstructs(Protocol):
    """System that samples images like given ones, from their embeddings."""

    def reconstruct(self, images: Tensor, sampling: Any, generator: torch.Generator) -> Tensor:
        """Sample an image for each of the images [B, 3, H, W] in [-1, 1] from its embedding: [B, 3, S, S]."""


@dataclasses.dataclass(frozen=True)
class ClipFiles:
    """CLIP of a stack."""

    model: str
    """Name known to open_clip, or "local-dir:" and the path of a folder."""
    pretrained: str | None = None
    """Tag or weights file, if the model is given by name."""
    image_embeddings: ImageEmbeddings = "unit"
    """Scale of its image embeddings."""

    def load(self) -> Clip:
        """Load the model; a folder with a manifest must hold the files of the manifest and no others.

        Raises:
            CheckpointError: a file is missing, damaged or unknown, or open_clip could not load the model.
        """
        if self.model.startswith("local-dir:"):
            _verify_files(self.model.removeprefix("local-dir:"))
        return Clip.load(self.model, self.pretrained, self.image_embeddings)


@dataclasses.dataclass(frozen=True)
class StackFiles:
    """Files to load a system from: those of a published stack, or of the stages that trained its parts."""

    system: str
    """Name of the system."""
    models: Mapping[str, str]
    """Stage of each part -> URI of its model folder, in the order of the system's DAG."""
    clip: ClipFiles | None = None
    """CLIP, if the system reads captions or images through one."""
    statistics: str | None = None
    """URI of the statistics of the training rows' image embeddings."""
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Default sampling settings; missing ones take the system's defaults."""

    def facts(self) -> dict[str, Any]:
        """JSON values; the models are a list, since their order counts and stored objects have sorted keys."""
        return {**dataclasses.asdict(self), "models": [[stage, folder] for stage, folder in self.models.items()]}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "StackFiles":
        """Build from the result of `facts`."""
        clip = facts["clip"]
        return cls(**{**facts, "models": dict(facts["models"]), "clip": None if clip is None else ClipFiles(**clip)})


@dataclasses.dataclass(frozen=True)
class SystemSpec:
    """Description of a system."""

    name: str
    """Name in run files and stacks."""
    parts: tuple[Part[Any], ...]
    """Its kinds of trained network; a system may have several networks of one kind."""
    sampling: type
    """Class of its sampling settings; see `Sampling`."""
    load: Callable[[StackFiles], System]
    """Loads the system."""
    shortcuts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Option of `unclip sample` -> the sampling setting it sets, such as steps -> decoder.num_steps."""
    inputs: tuple[Input, ...] = ()
    """Inputs that its `sample` takes besides captions."""
    reconstructs: bool = False
    """The system is `Reconstructs`."""


def system_names() -> list[str]:
    """All systems that can be loaded, sorted."""
    here = importlib.import_module(__package__)
    found = [module.name for module in pkgutil.iter_modules(here.__path__)]
    own = [name for name in found if hasattr(importlib.import_module(f"{__package__}.{name}"), "SYSTEM")]
    return sorted({*own, *entry_points(ENTRY_POINTS)})


def find_system(name: str) -> SystemSpec:
    """Find a system by its name.

    Raises:
        ConfigError: there is none; suggests the nearest name.
    """
    if re.fullmatch(r"[a-z][a-z0-9_]*", name):
        if importlib.util.find_spec(f"{__package__}.{name}") is not None:
            spec = getattr(importlib.import_module(f"{__package__}.{name}"), "SYSTEM", None)
            if isinstance(spec, SystemSpec):
                return spec
        if point := entry_points(ENTRY_POINTS).get(name):
            loaded: SystemSpec = point.load()
            return loaded
    raise ConfigError(f"system: got {name!r}, which is not a known system. {config.nearest(name, system_names())}")


def load_model(folder: str, parts: Iterable[Part[Any]]) -> nn.Module:
    """Load a model that the trainer saved, in evaluation mode.

    Args:
        folder: URI of a `model/` folder.
        parts: parts that the model may be.

    Raises:
        CheckpointError: the model is damaged, untrained, another part, or of another version.
    """
    return load_built(folder, {kind: part.build for part in parts for kind in part.saved_kinds})


def load_built(folder: str, builders: Mapping[str, Callable[[Mapping[str, Any]], nn.Module]]) -> nn.Module:
    """Load a saved model like `load_model`.

    Args:
        builders: kind of model -> function that builds the network, without weights, from the facts saved with it.

    Raises:
        CheckpointError: as for `load_model`.
    """
    tensors, facts = checkpoints.load(folder)
    kind = facts.get("kind")
    if not isinstance(kind, str) or kind not in builders:
        raise CheckpointError(f"{folder}: got a model of kind {foreign.shorten(kind)}, expected {', '.join(builders)}.")
    if not facts.get("samples_seen") and not facts.get("imported"):
        raise CheckpointError(f"{folder}: this {kind} was never trained, so it would sample noise. Train it first.")
    weights = sum(tensor.numel() for tensor in tensors.get("model", {}).values())
    sizes = {name: value for name, value in facts.items() if name != "samples_seen"}
    for name, value in foreign.numbers(sizes, "facts"):
        if not abs(value) <= max(2**16, weights):
            raise CheckpointError(f"{folder}: got {name} = {value:g} for {weights:,} weights. The file is damaged.")
    try:
        outline = {name: tensor.to("meta") for name, tensor in tensors["model"].items()}
        with torch.device("meta"), _LimitedCalls(len(outline)):
            builders[kind](facts).load_state_dict(outline)  # compares names and shapes before anything is allocated
        model = builders[kind](facts)
        model.load_state_dict(tensors["model"])
        model.measured = tensors.get("measured", {})  # type: ignore[assignment]
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{folder}: the weights do not fit the {kind}: {foreign.first_lines(error)}") from error
    return model.eval().requires_grad_(False)


class _LimitedCalls(TorchFunctionMode):
    """Limit of the calls of torch in a `with` block, such as those that build far more layers than there are weights for."""

    PER_TENSOR, OTHERS = 100, 1000  # networks of this library make about 10 for each of their tensors

    def __init__(self, num_tensors: int) -> None:
        super().__init__()
        self.num_tensors, self.left = num_tensors, self.PER_TENSOR * num_tensors + self.OTHERS

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"the settings have more layers than {self.num_tensors} tensors hold")
        return function(*args, **(kwargs or {}))


def load_system(folder: str | Path) -> System:
    """Load a published stack from a local folder.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit each other.
    """
    return load_stack(read_stack(folder))


def load_stack(stack: StackFiles) -> System:
    """Load a stack that `read_stack` has read, without a network.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit each other.
    """
    with clip_models.offline():
        return find_system(stack.system).load(stack)


@dataclasses.dataclass(frozen=True)
class _Description:
    """Content of stack.json."""

    system: str
    parts: tuple[str, ...]
    clip: ClipFiles | None
    sampling: dict[str, Any]
    checksum: str | None = None
    """See `files.write_json`. The manifest has the digest of the whole file."""


def read_stack(folder: str | Path) -> StackFiles:
    """Read `stack.json` of a local folder without loading any model.

    Raises:
        CheckpointError: the file is missing, damaged or names other places, or an earlier version wrote it.
    """
    root = Path(folder)
    path = root / "stack.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no stack.json, so no stack was published here. Run `unclip run` first.")
    facts = foreign.read_json(path)
    if "system" not in facts or not (root / checkpoints.MANIFEST).is_file():
        raise CheckpointError(
            f"{path}: has no system or no {checkpoints.MANIFEST}, because an earlier version published this stack. Publish it "
            "again with `unclip run`, which keeps its trained models, or import it again under another name."
        )
    description = foreign.read(_Description, facts, path)
    clip = description.clip
    names = [*description.parts, *(name for name in ("clip", "statistics") if (root / name).exists())]
    if clip is not None:
        _check_clip_name(path, clip, is_here="clip" in names)
        clip = dataclasses.replace(clip, model=clip.model.replace("local-dir:", f"local-dir:{folder}/"))
    for name in names:
        _check_inside(root, name)
    _verify_manifests(root, names)
    models = {name: f"{folder}/{name}" for name in description.parts}
    statistics = f"{folder}/statistics" if "statistics" in names else None
    sampling = description.sampling
    if "pad_batches" in sampling:  # who samples decides whether one caption costs a full batch
        sampling = {**sampling, "pad_batches": False}
    return StackFiles(description.system, models, clip, statistics, sampling)


def save_stack(folder: str, stack: StackFiles) -> None:
    """Gather the files of a system into one folder that `load_system` reads; its manifest is written last.

    Args:
        folder: URI of the new stack.
        stack: files to copy, except models whose URI is already in `folder`.
    """
    copied = dict(stack.models)
    clip = stack.clip
    with scratch_folder("clip") as scratch:
        if clip is not None and not clip_models.is_named(clip.model, clip.pretrained):
            if clip.model.startswith("local-dir:"):
                copied["clip"] = clip.model.removeprefix("local-dir:")
            else:
                clip_models.save_pretrained(clip.model, clip.pretrained, scratch)
                copied["clip"] = str(scratch)
            clip = dataclasses.replace(clip, model="local-dir:clip", pretrained=None)
        if stack.statistics is not None:
            copied["statistics"] = stack.statistics
        for name, source in copied.items():
            _copy(source, f"{folder}/{name}")
    description = {
        "system": stack.system,
        "parts": list(stack.models),
        "clip": None if clip is None else dataclasses.asdict(clip),
        "sampling": dict(stack.sampling),
    }
    files.write_json(f"{folder}/stack.json", description)
    seal(folder, list(copied))


def seal(folder: str, names: Iterable[str]) -> None:
    """Write the manifest of a stack: sha256 of its `stack.json`, and of the manifests of the folders in it."""
    contents = ["stack.json", *(f"{name}/{checkpoints.MANIFEST}" for name in names)]
    hashes = {name: files.sha256(files.read(f"{folder}/{name}")) for name in contents}
    files.write_json(f"{folder}/{checkpoints.MANIFEST}", {"sha256": hashes})


def _copy(source: str, destination: str) -> None:
    """Copy the files of a folder, unless it is the same folder, and write a manifest if it has none.

    Raises:
        CheckpointError: a file is a link out of the folder.
    """
    names, hashes = files.names(source), {}
    if path := files.to_path(source):
        for name in names:
            foreign.check_link(path / name)
    for name in names if source != destination or checkpoints.MANIFEST not in names else ():
        hashes[name] = files.digest(f"{source}/{name}")
        if source != destination:
            files.copy(f"{source}/{name}", f"{destination}/{name}")
    if checkpoints.MANIFEST not in names:
        files.write_json(f"{destination}/{checkpoints.MANIFEST}", {"sha256": hashes})


def _check_clip_name(path: Path, clip: ClipFiles, is_here: bool) -> None:
    """Refuse a CLIP that is neither in the folder of the stack nor one of open_clip's pretrained models."""
    if clip.model == "local-dir:clip":
        is_known = is_here and clip.pretrained is None
    else:
        is_known = clip_models.is_named(clip.model, clip.pretrained)
    if not is_known:
        raise CheckpointError(
            f"{path}: got a CLIP {clip.model!r} ({clip.pretrained!r}), expected local-dir:clip, the folder in the stack, or a "
            "model of open_clip by its name and tag, as a stack reads no file of others. Publish the stack again."
        )


def _check_inside(root: Path, name: str) -> None:
    """Refuse a folder, or a file in it, that is not inside the stack."""
    folder = root / name
    is_name = re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name) is not None
    if not is_name or not folder.is_dir():
        raise CheckpointError(
            f"{root}/stack.json: got a part {name!r}, expected the name of a folder in the stack. The file is damaged."
        )
    for path in (folder, *folder.rglob("*")):
        if not files.is_inside(path, root):
            raise CheckpointError(
                f"{path}: a link to {os.path.realpath(path)}, outside of the stack. Copy the whole stack again."
            )


def _verify_manifests(root: Path, names: Iterable[str]) -> None:
    path = root / checkpoints.MANIFEST
    hashes = _read_manifest(path)
    for name in ("stack.json", *(f"{name}/{checkpoints.MANIFEST}" for name in names)):
        if name not in hashes or not (root / name).is_file():
            raise CheckpointError(f"{path}: lacks {name}, or the stack does. Copy the whole stack again.")
        checkpoints.read_verified(str(root), name, hashes)


@dataclasses.dataclass(frozen=True)
class _Manifest:
    sha256: dict[str, str]
    checksum: str | None = None


def _read_manifest(path: Path) -> dict[str, str]:
    """Name -> sha256 of the files of a folder."""
    hashes = foreign.read(_Manifest, foreign.read_json(path), path).sha256
    try:
        files.read_json(str(path))
    except DamagedError as error:
        raise CheckpointError(str(error)) from None
    return hashes


def _verify_files(folder: str) -> None:
    """Compare the files of a folder with its manifest, if it has one."""
    path = Path(folder, checkpoints.MANIFEST)
    if not path.is_file():
        return
    hashes = _read_manifest(path)
    found = {each.name for each in Path(folder).iterdir()} - {checkpoints.MANIFEST}
    if found != set(hashes):
        different = ", ".join(sorted(found ^ set(hashes)))
        raise CheckpointError(f"{folder}: got files that differ from those of its manifest: {different}.")
    for name in sorted(hashes):
        with open(Path(folder, name), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != hashes[name]:
            raise CheckpointError(f"{folder}/{name}: the sha256 differs from the manifest. The file is damaged.")


def sampling_of(stack: StackFiles, cls: type) -> Any:
    """Read a stack's default sampling settings.

    Raises:
        CheckpointError: they do not fit this class, as when an earlier version wrote them.
    """
    try:
        return config.load(cls, stack.sampling)
    except ConfigError as error:
        raise CheckpointError(
            f"stack.json: its sampling settings cannot be read: {error} Publish it again with `unclip run`."
        ) from error


def seeded(device: torch.device, seed: int) -> torch.Generator:
    """Random generator with a seed of any size, which counts modulo 2^64, and for torch's CPU generator modulo 2^32."""
    return torch.Generator(device).manual_seed((seed + 2**63) % 2**64 - 2**63)  # torch refuses some above 2^63


def batch_generator(system: System, number: int, seed: int) -> torch.Generator:
    """Source of the randomness of batch `number` of `sample_captions`."""
    return seeded(system.device, seed * 1_000_003 + number)


@torch.no_grad()
def sample_batch(
    system: System, captions: Sequence[str], number: int, *, seed: int, sampling: Any, **inputs: Any
) -> Tensor:
    """Sample batch `number` of `sample_captions` on its own: [len(captions), 3, S, S] on the CPU."""
    return _sample_requests(
        system, captions, [(batch_generator(system, number, seed), len(captions))], sampling, inputs
    )


@torch.no_grad()
def sample_together(
    system: System, captions: Sequence[str], seeds: Sequence[tuple[int, int]], *, sampling: Any, **inputs: Any
) -> Tensor:
    """Sample several requests in one batch: [len(captions), 3, S, S] on the CPU.

    The images of a request are those of `sample_captions` with its captions and its seed: their noise is equal, bit for bit, and
    matrix products in batches of another size round differently. With `pad_batches` there is no other size, and the images are
    equal, bit for bit.

    Args:
        captions: those of all requests, one after the other.
        seeds: seed and number of captions of each request, at most `sampling.batch_size`.
        inputs: as for `System.sample`, one for each caption.
    """
    requests = [(seeded(system.device, seed * 1_000_003), count) for seed, count in seeds]
    return _sample_requests(system, captions, requests, sampling, inputs)


def _sample_requests(
    system: System,
    captions: Sequence[str],
    requests: Sequence[tuple[torch.Generator, int]],
    sampling: Any,
    inputs: Mapping[str, Any],
) -> Tensor:
    """Sample one batch whose rows draw from the generators of their requests; fill it up if the settings say so.

    Args:
        requests: source of the randomness and number of captions of each.
    """
    padding = sampling.batch_size - len(captions) if getattr(sampling, "pad_batches", False) else 0
    if padding > 0:
        captions, inputs = (
            _repeat_last(captions, padding),
            {name: _repeat_last(inputs[name], padding) for name in inputs},
        )
        requests = [*requests, (seeded(system.device, 0), padding)]
    sample: Callable[..., Tensor] = system.sample
    with RowGenerators([generator for generator, _ in requests], [count for _, count in requests]) as rows:
        images = sample(captions, sampling, rows.generator, **inputs)
    return images[: len(images) - max(padding, 0)].cpu()


def _repeat_last(values: Any, times: int) -> Any:
    """Repeat the last row of an input that has a row for each caption; other inputs, such as hooks, stay as they are."""
    if isinstance(values, Tensor):
        return torch.cat([values, values[-1:].expand(times, *values.shape[1:])])
    return [*values, *[values[-1]] * times] if isinstance(values, Sequence) else values


def sample_captions(
    system: System,
    captions: Sequence[str],
    *,
    seed: int = 0,
    sampling: Any = None,
    negative: Sequence[str] | None = None,
    start: Tensor | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Sample one image for each caption.

    Args:
        captions: any number; sampled in batches.
        seed: the same captions, seed and settings give the same images on the same machine.
        sampling: None uses the settings published with the stack.
        negative: a caption to guide away from for each caption; only for systems with this input.
        start: [len(captions), 3, S, S] in [-1, 1], images to start from; only for systems with this input.
        progress: called after each batch with the number of images in it.

    Returns:
        [len(captions), 3, S, S] float32 in [-1, 1], on the CPU.

    Raises:
        InputError: the system cannot sample a caption; see `ChecksCaptions`.
    """
    if isinstance(system, ChecksCaptions):
        system.check_captions(captions)
    settings = sampling or system.sampling
    given: dict[Input, Any] = {"negative": negative, "start": start}
    images = []
    for number, first in enumerate(range(0, len(captions), settings.batch_size)):
        batch = slice(first, first + settings.batch_size)
        inputs = {name: values[batch] for name, values in given.items() if values is not None}
        images.append(sample_batch(system, captions[batch], number, seed=seed, sampling=settings, **inputs))
        progress(len(captions[batch]))
    return torch.cat(images)
