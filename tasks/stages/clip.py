"""Stage `clip`: the frozen CLIP that computes all embeddings, either pretrained or trained on the pairs."""

import dataclasses
from pathlib import Path
from typing import Any

from tasks.places import open_places
from tasks.stage import Artifact, Output, StageContext, stage
from tasks.training import Training, pin_trainer, run_training
from unclip import files
from unclip.config import require
from unclip.data import Source
from unclip.errors import ConfigError
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

    def __post_init__(self) -> None:
        require(bool(self.model), "model", self.model, "the name of an open_clip model")
        try:
            check_name(self.model, self.pretrained)
        except ConfigError as error:
            raise ConfigError(str(error).removeprefix("clip.")) from None

    @property
    def is_trained_from_scratch(self) -> bool:
        return self.pretrained is None and ":" not in self.model


@stage("clip", version=1, has_workers=True, pin=pin_trainer)
def clip(context: StageContext, config: ClipConfig, dedup: Artifact) -> Output:
    """Load a pretrained CLIP, or train one on the kept pairs, and freeze it."""
    if not config.is_trained_from_scratch:
        digest = _weights_digest(Clip.load(config.model, config.pretrained))
        return Output(config.model, digest, {"model": config.model, "pretrained": config.pretrained})

    from tasks import tables
    from unclip.systems.clip import ClipObjective

    context.tracker.dataset(context.run.pipeline, dedup.digest, dedup.uri, {"rows": dedup.facts["rows"]})
    images, version = dedup.facts["images"], dedup.facts["images_version"]
    name, places = config.model, dedup.facts["places"]
    training = Training(
        build=lambda workers: ClipObjective(name, workers.rank, workers.world_size),
        sources=(Source(tuple(tables.files(images, version)), ClipObjective.columns),),
        places=lambda: open_places(places, "train"),
        config=config.trainer,
    )
    trained, digest = run_training(context, training)
    folder = f"{context.folder}/open_clip"
    _save_as_open_clip(context.scratch, trained, name, folder)
    return Output(folder, digest, {"model": f"local-dir:{folder}", "pretrained": None, "architecture": name})


def _save_as_open_clip(scratch: Path, trained: str, name: str, folder: str) -> None:
    """Convert the trainer's model to a folder in open_clip's own format."""
    from unclip.models import clip as clip_models

    model = clip_models.create(name, None)
    model.load_state_dict(checkpoints.load(trained)[0]["model"])
    clip_models.save(model, name, scratch / "open_clip")
    weights = f"{trained}/model.safetensors"
    for path in sorted((scratch / "open_clip").iterdir()):
        if files.digest(str(path)) == files.digest(weights):  # then it takes no space
            files.copy(weights, f"{folder}/{path.name}")
        else:
            files.write(f"{folder}/{path.name}", path.read_bytes())


def _weights_digest(model: Any) -> str:
    """sha256 of the names and bytes of all weights."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()
