"""Saving and loading of complete, verified checkpoints and models.

A checkpoint is a folder of safetensors and JSON files. Its `manifest.json` is written last and holds the sha256 of every
file. A folder without a manifest is not a checkpoint; one with files that do not match is damaged and never loaded. Nothing
is unpickled.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unclip import files, foreign
from unclip.errors import CheckpointError

MANIFEST = "manifest.json"
_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*[.](safetensors|json)")
"""A file of a checkpoint, or of a folder in it."""


def save(folder: str, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> str:
    """Write one checkpoint or model.

    Args:
        folder: URI; created if missing.
        tensors: file stem -> name -> tensor.
        facts: JSON values needed to use the tensors.

    Returns:
        Digest of the contents; equal tensors and facts give equal digests.
    """
    from safetensors.torch import save as serialize

    hashes = {}
    contents = {f"{stem}.safetensors": serialize(_contiguous(group)) for stem, group in tensors.items()}
    contents["facts.json"] = json.dumps(facts, indent=2, sort_keys=True).encode()
    for name, data in contents.items():
        files.write(f"{folder}/{name}", data)
        hashes[name] = files.sha256(data)
    files.write_json(f"{folder}/{MANIFEST}", {"sha256": hashes})
    return digest(folder)


def digest(folder: str) -> str:
    """Digest of a saved checkpoint or model, read from its manifest."""
    return digest_of(read_hashes(folder))


def digest_of(hashes: Mapping[str, str]) -> str:
    """Combine the sha256 of several files, by name, into one digest."""
    return files.sha256(json.dumps(hashes, sort_keys=True).encode())


def read_verified(folder: str, name: str, hashes: Mapping[str, str]) -> bytes:
    """Read a file and compare its sha256 with the manifest.

    Raises:
        CheckpointError: the sha256 differs, JSON is too large, or the name leads out of the folder.
    """
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"{folder}: its manifest has {foreign.shorten(name)}, which is no file in it. Copy the whole folder again."
        )
    if name.endswith(".json"):
        _check_size(f"{folder}/{name}")
    data = files.read(f"{folder}/{name}")
    if files.sha256(data) != hashes[name]:
        raise CheckpointError(f"{folder}/{name}: the sha256 differs from the manifest. The file is damaged.")
    return data


def load(folder: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Load and verify the tensors and facts of a checkpoint.

    Raises:
        CheckpointError: there is no manifest, or a file is missing, is too large, does not match its hash or is elsewhere.
    """
    from safetensors.torch import load as deserialize

    if not files.exists(f"{folder}/{MANIFEST}"):
        raise CheckpointError(f"{folder}: no {MANIFEST}, so this is not a complete checkpoint. Name another one.")
    tensors: dict[str, dict[str, Tensor]] = {}
    facts: dict[str, Any] = {}
    try:
        hashes = read_hashes(folder)
        for name in hashes:
            data = read_verified(folder, name, hashes)
            if name.endswith(".safetensors"):
                tensors[name.removesuffix(".safetensors")] = deserialize(data)
            else:
                facts = json.loads(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}. The checkpoint is damaged.") from error
    return tensors, facts


def load_group(folder: str, stem: str) -> dict[str, Tensor]:
    """Load and verify the tensors of one file of a checkpoint alone; empty if the checkpoint has no such file.

    Raises:
        CheckpointError: the file does not match its hash.
    """
    from safetensors.torch import load as deserialize

    name, hashes = f"{stem}.safetensors", read_hashes(folder)
    return deserialize(read_verified(folder, name, hashes)) if name in hashes else {}


def read_hashes(folder: str) -> dict[str, str]:
    """Name -> sha256 of the files of a checkpoint, from its manifest.

    Raises:
        CheckpointError: the manifest is too large.
    """
    _check_size(f"{folder}/{MANIFEST}")
    hashes: dict[str, str] = files.read_json(f"{folder}/{MANIFEST}")["sha256"]
    return hashes


def _check_size(uri: str) -> None:
    """Refuse a JSON file that is larger than any checkpoint's, or a link to a device, whose size is 0."""
    path, size = files.to_path(uri), files.size_of(uri)
    if size > foreign.MAX_TEXT_BYTES or (path is not None and path.exists() and not path.is_file()):
        raise CheckpointError(
            f"{uri}: got {size:,} bytes, expected a file of at most {foreign.MAX_TEXT_BYTES:,}. Copy it again."
        )


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors requires row-major tensors that share no memory
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
