"""Checkpoints that are all there or do not exist, and models that say what they are.

A checkpoint is a folder of safetensors and JSON files with a `manifest.json`, written last, that holds the sha256 of every
file. A folder without a manifest is not a checkpoint; one whose files do not match is damaged and never loaded. Nothing is
ever unpickled.
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unclip import files
from unclip.errors import CheckpointError

MANIFEST = "manifest.json"


def save(folder: str, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> str:
    """Write one checkpoint or model.

    Args:
        folder: URI; made if missing.
        tensors: file stem -> name -> tensor.
        facts: anything JSON that is needed to use the tensors.

    Returns:
        Digest of the content: the same tensors and facts give the same digest.
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
    """Digest of a saved checkpoint or model, from its manifest."""
    return digest_of(files.read_json(f"{folder}/{MANIFEST}")["sha256"])


def digest_of(hashes: Mapping[str, str]) -> str:
    """One digest for the sha256 of several files, by name."""
    return files.sha256(json.dumps(hashes, sort_keys=True).encode())


def read_verified(folder: str, name: str, hashes: Mapping[str, str]) -> bytes:
    """A file whose sha256 is that of the manifest.

    Raises:
        CheckpointError: it is another.
    """
    data = files.read(f"{folder}/{name}")
    if files.sha256(data) != hashes[name]:
        raise CheckpointError(f"{folder}/{name}: the sha256 is not the manifest's. The file is damaged.")
    return data


def load(folder: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors and facts of a checkpoint, verified.

    Raises:
        CheckpointError: no manifest, or a file that is missing or does not match its hash.
    """
    from safetensors.torch import load as deserialize

    if not files.exists(f"{folder}/{MANIFEST}"):
        raise CheckpointError(f"{folder}: no {MANIFEST}, so this is not a complete checkpoint. Name another one.")
    tensors: dict[str, dict[str, Tensor]] = {}
    facts: dict[str, Any] = {}
    try:
        hashes = files.read_json(f"{folder}/{MANIFEST}")["sha256"]
        for name in hashes:
            data = read_verified(folder, name, hashes)
            if name.endswith(".safetensors"):
                tensors[name.removesuffix(".safetensors")] = deserialize(data)
            else:
                facts = json.loads(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}. The checkpoint is damaged.") from error
    return tensors, facts


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors wants row-major tensors that share no memory
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
