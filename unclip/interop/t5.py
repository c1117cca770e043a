"""T5 encoders in the format of transformers: `config.json`, safetensors, `tokenizer.json`.

Of the whole model only the encoder's weights are read. Nothing is unpickled, no code in the folder is run, and no file outside
the folder is opened.
"""

from pathlib import Path

import torch

from unclip import foreign
from unclip.errors import CheckpointError
from unclip.interop import folders
from unclip.models.t5 import T5Settings, T5TextEncoder

FILES = ("config.json", "tokenizer.json", folders.TRANSFORMERS_WEIGHTS, f"{folders.TRANSFORMERS_WEIGHTS}.index.json")
"""Files that are read, besides the shards of the weights."""
SHARDS = "model-*.safetensors"
"""Pattern of the names of the shards."""
_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
"""Names of the token embeddings, of which files have one or both."""


def read_settings(folder: Path) -> T5Settings:
    """Read `config.json`.

    Raises:
        CheckpointError: it is missing or damaged, or that of another model.
    """
    path = folder / "config.json"
    return foreign.read(T5Settings, foreign.read_json(path), path, ignore_others=True)


def read(folder: Path, max_length: int) -> T5TextEncoder:
    """Read a T5 encoder from the folder of a whole T5 or of its encoder.

    Args:
        max_length: tokens of the longest caption.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit each other; names the file.
        ConfigError: transformers is not installed.
    """
    settings = read_settings(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path}: missing. Save it once with transformers: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)."
        )
    tokenizer = foreign.read_text(path).encode()
    weights = folders.read_weights(folder, folders.TRANSFORMERS_WEIGHTS, _is_of_encoder)
    where = folder / "config.json"
    folders.check_depth(where, {"num_layers": settings.num_layers}, "num_layers", weights)
    found = [weights.pop(name) for name in _EMBEDDINGS if name in weights]
    if not found:
        raise CheckpointError(f"{folder}: lacks {_EMBEDDINGS[0]}, the token embeddings. The files are damaged.")
    expected = (settings.vocab_size, settings.d_model)
    if tuple(found[0].shape) != expected:
        raise CheckpointError(
            f"{folder}: got token embeddings {tuple(found[0].shape)}, expected {expected} as in "
            "config.json. Take both from one model."
        )
    tensors = {name.removeprefix("encoder."): tensor for name, tensor in weights.items()}
    with torch.device("meta"):
        encoder = T5TextEncoder(settings, len(tokenizer), max_length)
    try:
        encoder.encoder.load_state_dict({**tensors, "embed_tokens.weight": found[0]}, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the weights do not fit config.json: {foreign.first_lines(error)}") from error
    encoder.tokenizer_file = torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
    encoder.requires_grad_(False)
    _ = encoder.tokenizer  # raises if it is damaged
    return encoder


def _is_of_encoder(name: str) -> bool:
    return name in _EMBEDDINGS or name.startswith(("encoder.block.", "encoder.final_layer_norm."))
