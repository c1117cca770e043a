"""Folders of configuration and weights as diffusers and transformers write them: safetensors and JSON, read with bounds.

Nothing is unpickled, no code of a folder is run, and no file outside of it is opened.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.errors import CheckpointError
from unclip.training.objective import Tensors

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"

MAX_TEXT_BYTES = 64 * 2**20
"""Largest JSON or text file that is read; the largest that is needed, a tokenizer, has about 3 MB."""


def read_text(path: Path) -> str:
    """A text file's content.

    Raises:
        CheckpointError: it is missing, no file, too large or no UTF-8; names it.
    """
    try:
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise CheckpointError(
                f"{path}: got {size:,} bytes, expected at most {MAX_TEXT_BYTES:,}. The file is damaged."
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}. Copy the whole folder again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: as `read_text`, or it holds something else.
    """
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON: {error}. The file is damaged.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got a {type(content).__name__}, expected a JSON object. The file is damaged.")
    return content


def read_weights(folder: Path, name: str) -> Tensors:
    """Tensors of one safetensors file or of the shards that its index names, floating ones in float32.

    Args:
        name: `DIFFUSERS_WEIGHTS` or `TRANSFORMERS_WEIGHTS`.

    Raises:
        CheckpointError: files are missing or damaged, or an index names files elsewhere; names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    shards = {name}
    index = folder / f"{name}.index.json"
    if index.is_file():
        places = read_json(index).get("weight_map")
        shards = set(places.values()) if isinstance(places, dict) else set()
        if not shards or any(not isinstance(shard, str) or Path(shard).name != shard for shard in shards):
            raise CheckpointError(f"{index}: expected a weight_map to files in the same folder. The file is damaged.")
    tensors: Tensors = {}
    for shard in sorted(shards):
        try:
            tensors |= load_file(str(folder / shard))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder / shard}: cannot be read: {error}. Weights must be whole and safetensors; pickles are not read."
            ) from error
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def check_depth(where: str | Path, settings: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a number of layers that the weights cannot have, before so many are built.

    Raises:
        CheckpointError: settings[name], where there is one, is not a positive number up to that of the tensors.
    """
    depth = settings.get(name, 1)
    counts = depth if isinstance(depth, list) else [depth]
    if not all(isinstance(count, int) and 1 <= count <= len(tensors) for count in counts):
        raise CheckpointError(
            f"{where}: got {name} = {depth!r} for {len(tensors)} tensors, expected a number of layers. The file is damaged."
        )


def write(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> None:
    """Write `config.json` and weights in float32; the same content gives the same bytes.

    Args:
        folder: made if missing.
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
