"""Stage `clip`: the frozen CLIP that computes all embeddings, either pretrained or trained on the pairs."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from tasks.places import open_places
from tasks.stage import Artifact, Output, Pinning, StageContext, stage
from tasks.training import Training, pin_trainer, run_training
from tasks.weights import LOCAL, files_digest, model_files
from unclip import files
from unclip.config import added, require
from unclip.data import Source
from unclip.errors import ConfigError, InputError
from unclip.models import clip as clip_models
from unclip.models.clip import Clip, check_name
from unclip.training import checkpoints
from unclip.training.settings import TrainerConfig


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    model: str = "ViT-L-14"
    """Any open_clip model: a name, "hf-hub:org/name" or "local-dir:/folder"."""
    pretrained: str | None = "openai"
    """Tag or weights file for a model given by name; None trains the model from scratch on the pairs."""
    trainer: TrainerConfig = TrainerConfig()
    """Training settings, if the model is trained from scratch."""
    digest: str | None = added(None)
    """sha256 of the weights' file or folder, filled in by the pipeline so that other weights cause a new run;
    None skips the check."""

    def __post_init__(self) -> None:
        require(bool(self.model), "model", self.model, "the name of an open_clip model")
        try:
            check_name(self.model, self.pretrained)
        except ConfigError as error:
            raise ConfigError(str(error).removeprefix("clip.")) from None

    @property
    def weights(self) -> Path | None:
        """Weights' file, or folder with weights, that the settings name; None for names that open_clip finds itself."""
        if self.model.startswith(LOCAL):
            return Path(self.model.removeprefix(LOCAL)).expanduser().resolve()
        is_path = clip_models.is_path(self.pretrained)
        return Path(str(self.pretrained)).expanduser().resolve() if is_path else None

    @property
    def is_trained_from_scratch(self) -> bool:
        return self.pretrained is None and ":" not in self.model


def _pin(config: ClipConfig, pinning: Pinning) -> ClipConfig:
    """Check the tag; make the path of the weights absolute, since workers run elsewhere, and pin their content."""
    config = pin_trainer(config, pinning)
    if config.weights is None:
        if config.pretrained is not None and ":" not in config.model:
            clip_models.check_tag(config.model, config.pretrained)
        return config
    digest = files_digest(config.weights)
    if config.model.startswith(LOCAL):
        return dataclasses.replace(config, model=f"{LOCAL}{config.weights}", digest=digest)
    return dataclasses.replace(config, pretrained=str(config.weights), digest=digest)


@stage("clip", version=1, has_workers=True, pin=_pin, reads_snapshot=True)
def clip(context: StageContext, config: ClipConfig, dedup: Artifact) -> Output:
    """Load a pretrained CLIP, or train one on the kept pairs, and freeze it."""
    if not config.is_trained_from_scratch:
        return _take(context, config)

    from tasks import tables
    from unclip.systems.clip import ClipObjective

    context.log_dataset(dedup.digest, dedup.uri, {"rows": dedup.facts["rows"]})
    images, version = dedup.facts["images"], dedup.facts["images_version"]
    name, places = config.model, dedup.facts["places"]
    training = Training(
        build=lambda workers: ClipObjective(name, workers.rank, workers.world_size),
        sources=(Source(tuple(tables.files(images, version)), ClipObjective.columns),),
        places=lambda: open_places(places, "train"),
        config=config.trainer,
        selection=dedup.uri,
    )
    trained, digest = run_training(context, training)
    folder = f"{context.folder}/open_clip"
    _save_as_open_clip(context.scratch, trained, name, folder)
    return Output(folder, digest, {"model": f"{LOCAL}{folder}", "pretrained": None, "architecture": name})


def _take(context: StageContext, config: ClipConfig) -> Output:
    """Load a pretrained model. Weights that the settings name by path are copied, so that a stack can hold them.

    Raises:
        InputError: the weights have changed since the run was planned.
    """
    loaded = Clip.load(config.model, config.pretrained)
    digest = _weights_digest(loaded)
    if config.weights is None:
        return Output(config.model, digest, {"model": config.model, "pretrained": config.pretrained})
    if config.digest and files_digest(config.weights) != config.digest:
        raise InputError(f"{config.weights}: has changed since this run was planned. Run the same command again.")
    folder = f"{context.folder}/open_clip"
    if config.weights.is_dir():
        _copy(config.weights, folder)
    else:
        clip_models.save(loaded.model, config.model, context.scratch / "open_clip")
        _copy(context.scratch / "open_clip", folder)
    return Output(folder, digest, {"model": f"{LOCAL}{folder}", "pretrained": None, "architecture": config.model})


def _copy(source: Path, folder: str) -> None:
    for path in model_files(source):
        files.write(f"{folder}/{path.name}", path.read_bytes())


def _save_as_open_clip(scratch: Path, trained: str, name: str, folder: str) -> None:
    """Convert the trainer's model to a folder in open_clip's own format."""
    model = clip_models.create(name, None)
    model.load_state_dict(checkpoints.load(trained)[0]["model"])
    clip_models.save(model, name, scratch / "open_clip")
    weights = f"{trained}/model.safetensors"
    digest = files.digest(weights)
    for path in model_files(scratch / "open_clip"):
        if files.digest(str(path)) == digest:  # then it takes no space
            files.copy(weights, f"{folder}/{path.name}")
        else:
            files.write(f"{folder}/{path.name}", path.read_bytes())


def _weights_digest(model: Any) -> str:
    """sha256 of the names and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()
