"""Model folders in the format of diffusers and transformers: JSON and safetensors, read with size limits.

Nothing is unpickled, no code in a folder is run, and no file outside the folder is opened. `unclip.foreign` reads the JSON.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip import files, foreign
from unclip.errors import CheckpointError, InputError
from unclip.training.objective import Tensors

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"


def read_weights(folder: Path, name: str, is_wanted: Callable[[str], bool] = lambda _: True) -> Tensors:
    """Read the tensors of one safetensors file, or of the shards listed in its index; floating-point ones as float32.

    Args:
        name: `DIFFUSERS_WEIGHTS` or `TRANSFORMERS_WEIGHTS`.
        is_wanted: tells from the name of a tensor if it is read.

    Raises:
        CheckpointError: files are missing, damaged or links out of the folder, or the index lists files in other folders; names
            the file.
    """
    from safetensors import SafetensorError, safe_open

    shards = {name}
    index = folder / f"{name}.index.json"
    if index.is_file():
        weight_map = foreign.read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or any(not isinstance(shard, str) or Path(shard).name != shard for shard in names):
            raise CheckpointError(f"{index}: expected a weight_map to files in the same folder. The file is damaged.")
        shards = set(names)
    tensors: Tensors = {}
    for shard in sorted(shards):
        foreign.check_link(folder / shard)
        try:
            with safe_open(str(folder / shard), framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys() if is_wanted(key)}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder / shard}: cannot be read: {error}. Weights must be complete safetensors files; pickles are not read."
            ) from error
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def check_depth(where: str | Path, settings: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a number of layers larger than the weights allow, before the network is built.

    Raises:
        CheckpointError: settings[name], if given, is not a positive number of at most the number of tensors.
    """
    depth = settings.get(name, 1)
    counts = depth if isinstance(depth, list) else [depth]
    if not all(type(count) is int and 1 <= count <= len(tensors) for count in counts):
        raise CheckpointError(
            f"{where}: got {name} = {depth!r} for {len(tensors)} tensors, expected a number of layers from 1 to "
            f"{len(tensors)}. The file is damaged."
        )


def write(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> None:
    """Write `config.json` and weights in float32; the same content gives the same bytes.

    Args:
        folder: created if missing.
        name: `DIFFUSERS_WEIGHTS` or `TRANSFORMERS_WEIGHTS`.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().cpu().to(torch.float32).contiguous().clone() for key, value in tensors.items()}
    save_file(weights, str(folder / name), metadata={"format": "pt"})
    write_json(folder / "config.json", settings)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_index(
    folder: Path,
    pipeline: str,
    parts: Mapping[str, tuple[str, str]],
    others: Mapping[str, Any] | None = None,
    version: str = "0.38.0",
) -> None:
    """Write model_index.json, which names the class of a pipeline and of each part.

    Args:
        parts: part -> library and class.
        others: further entries.
        version: version of diffusers whose layout the folder has.
    """
    index = {name: list(part) for name, part in parts.items()}
    write_json(
        folder / "model_index.json", index | {"_class_name": pipeline, "_diffusers_version": version, **(others or {})}
    )


def check_new(folder: Path) -> None:
    """Check that a folder can be written.

    Raises:
        InputError: it is a file, or holds files.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder}: got a file or a folder with files, expected a new or empty one. Name another folder."
        )


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Scratch folder that becomes `folder`, new or empty, at the end; if an error is raised, nothing is written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        os.replace(scratch, folder)
        files.sync_folder(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
