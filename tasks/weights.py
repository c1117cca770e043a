"""Files of pretrained models that settings name by path: those that are copied into a storage, and their digests."""

import hashlib
from pathlib import Path

from unclip import foreign

LOCAL = "local-dir:"
"""Prefix of a model's name that is a folder."""
SUFFIXES = {".json", ".safetensors", ".txt", ".model"}
"""Suffixes of the files of a model: its configuration, weights and tokenizer; no pickles."""


def model_files(folder: Path) -> list[Path]:
    """Files of a model in a folder, in order of their names.

    Raises:
        CheckpointError: one is a link out of the folder.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    for path in found:
        foreign.check_link(path)
    return found


def files_digest(source: Path) -> str:
    """sha256 of a file, or of the names and digests of the files in a folder."""
    if source.is_dir():
        parts = [f"{files_digest(path)} {path.name}" for path in model_files(source)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
