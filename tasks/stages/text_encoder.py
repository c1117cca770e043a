"""Stage `text_encoder`: a frozen T5 that reads captions, in place of CLIP's text encoder."""

import dataclasses
import re
from pathlib import Path

from tasks.stage import Output, Pinning, StageContext, stage
from tasks.weights import LOCAL, files_digest
from unclip.config import require
from unclip.errors import ConfigError, InputError
from unclip.interop import t5
from unclip.models.t5 import NEEDS_TRANSFORMERS
from unclip.systems.text_encoder import save_t5

CLIP = "clip"
HUB = "hf-hub:"
"""Prefix of a model's name that is a repository on the Hugging Face hub."""


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    name: str = CLIP
    """Frozen text encoder: "clip" for that of the run's CLIP, or a T5 in the format of transformers, "local-dir:/folder" or
    "hf-hub:org/name", which downloads it. Its weights must be safetensors, and its tokenizer a `tokenizer.json`."""
    max_length: int = 128
    """Tokens of the longest caption that a T5 reads; longer captions are truncated."""
    width: int | None = None
    """Width of a T5's states, for `unclip plan train`; None reads it from the folder. Needed for names of the hub."""
    digest: str | None = None
    """sha256 of a folder's files, filled in by the pipeline so that other weights cause a new run."""

    def __post_init__(self) -> None:
        is_known = self.name == CLIP or self.folder is not None or re.fullmatch(f"{HUB}[\\w.-]+/[\\w.-]+", self.name)
        require(bool(is_known), "name", self.name, f'"{CLIP}", "{LOCAL}/folder" or "{HUB}org/name"')
        require(self.max_length >= 2, "max_length", self.max_length, "at least 2")
        require(self.width is None or self.width >= 1, "width", self.width, "at least 1, or none")
        needs_width = self.name.startswith(HUB) and self.width is None
        require(not needs_width, "width", self.width, f"that of the states of {self.name}, such as 4096 for a T5-XXL")

    @property
    def folder(self) -> Path | None:
        """Folder that the settings name."""
        is_local = self.name.startswith(LOCAL) and self.name != LOCAL
        return Path(self.name.removeprefix(LOCAL)).expanduser().resolve() if is_local else None

    def states_width(self) -> int | None:
        """Width of the states; None for those of CLIP.

        Raises:
            CheckpointError: the folder has no readable configuration.
        """
        return self.width if self.folder is None else t5.read_settings(self.folder).d_model


def _pin(config: TextEncoderConfig, pinning: Pinning) -> TextEncoderConfig:
    """Make the path absolute, since workers run elsewhere, and pin the files."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(NEEDS_TRANSFORMERS.format(config.name)) from error
    if config.folder is None:
        return config
    t5.read_settings(config.folder)
    return dataclasses.replace(config, name=f"{LOCAL}{config.folder}", digest=files_digest(config.folder))


@stage("text_encoder", version=1, pin=_pin, reads_snapshot=True)
def text_encoder(context: StageContext, config: TextEncoderConfig) -> Output:
    """Copy a pretrained T5 encoder, so that stacks can hold it."""
    folder = config.folder
    if folder is None:
        folder = _download(context, config.name.removeprefix(HUB))
    elif config.digest and files_digest(folder) != config.digest:
        raise InputError(f"{folder}: has changed since this run was planned. Run the same command again.")
    encoder = t5.read(folder, config.max_length)
    expected = f"{encoder.text_width}, the d_model of its config.json, or none"
    require(config.width in (None, encoder.text_width), "text_encoder.width", config.width, expected)
    saved = f"{context.folder}/model"
    digest = save_t5(saved, encoder)
    return Output(saved, digest, {"text_width": encoder.text_width, "source": config.name})


def _download(context: StageContext, name: str) -> Path:
    """Download the files of a repository that are read: JSON and safetensors, no code."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            name,
            local_dir=context.scratch / "t5",
            allow_patterns=[*t5.FILES, t5.SHARDS],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"text_encoder.name: {HUB}{name} cannot be downloaded: {str(error).splitlines()[0]} Check the name, or download it "
            f"elsewhere and name the folder: {LOCAL}/folder."
        ) from error
    return Path(found)
