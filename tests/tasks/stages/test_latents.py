"""The stage that encodes images: latents and codes are those of the autoencoder, and bad reconstructions stop the run."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from tasks import tables
from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Call, Failure, Resources, Run, execute
from tasks.stages.latents import CODES, LATENT, LatentsConfig, Reconstructions, check_reconstructions, latents
from tasks.stages.train import TablesRead
from tasks.store import Store
from tasks.tracking import Tracker
from tests.tasks.datasets import kept_selection, key, write_folder, write_images, write_kept_places
from unclip.config import to_dict
from unclip.data import RowReader
from unclip.errors import ConfigError, InputError, StageError
from unclip.evaluation import scenes
from unclip.models.autoencoder import Autoencoder, AutoencoderConfig
from unclip.training import checkpoints
from unclip.training.batches import load_images, stack_halves, stack_rows

NUM_ROWS = 12
KL = AutoencoderConfig(16, 1, 8, (1, 1), 1, norm_groups=4, middle_attention=False)
VQ = dataclasses.replace(KL, bottleneck="vq", codebook_size=32)


def jpg(caption: str) -> bytes:
    scene = scenes.parse_caption(caption)
    assert scene is not None
    buffer = io.BytesIO()
    Image.fromarray(scenes.render(scene, np.random.default_rng(len(caption)), 64)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def captions() -> list[str]:
    rng = np.random.default_rng(0)
    return [scenes.caption(scenes.random_scene(rng), rng) for _ in range(NUM_ROWS)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "storage"))


@pytest.fixture
def dataset(store: Store) -> Artifact:
    """Snapshot of one file of scenes, every fourth of which is held out."""
    rows = [
        {"key": key(n), "caption": caption, "status": "ok", "jpg": jpg(caption)} for n, caption in enumerate(captions())
    ]
    images = write_images(store.root, rows)
    splits = {key(n): "holdout" if n % 4 == 0 else "train" for n in range(NUM_ROWS)}
    selection = write_folder(f"{store.root}/selection", kept_selection(splits))
    held_out = [n for n in range(NUM_ROWS) if n % 4 == 0]
    heldout = f"{store.root}/heldout.parquet"
    columns = {"key": [key(n) for n in held_out], "caption": [captions()[n] for n in held_out], "split": "holdout"}
    columns |= {"images_file": 0, "images_row": held_out}
    columns |= {name: [value] * len(held_out) for name, value in columns.items() if not isinstance(value, list)}
    tables.write_file(heldout, pa.table(columns))
    names = {field.name: "" for field in dataclasses.fields(Snapshot)}
    snapshot = {**names, **images, "digest": "d1", "selection": selection, "embeddings_version": 0, "heldout": heldout}
    snapshot["places"] = write_kept_places(store.root, selection, images)
    counts = {"in": NUM_ROWS, "kept": NUM_ROWS, "dropped": 0, "failed": 0}
    return Artifact("curate", "f", selection, "d1", {"rows": counts, "snapshot": snapshot}, 0.0)


def autoencoder(store: Store, config: AutoencoderConfig) -> tuple[Autoencoder, Artifact]:
    """Untrained autoencoder, saved as a trained one."""
    torch.manual_seed(0)
    model, folder = Autoencoder(config).eval(), f"{store.root}/model-{config.bottleneck}"
    facts = {"kind": "autoencoder", "config": to_dict(config), "samples_seen": 1}
    checkpoints.save(folder, {"model": model.state_dict()}, facts)
    return model, Artifact("autoencoder", "f", folder, checkpoints.digest(folder), {}, 0.0)


def run_stage(store: Store, dataset: Artifact, trained: Artifact, **settings: Any) -> Artifact | Failure:
    run = Run("r", "p", store.root, Tracker("", ""), "", {"latents": Resources(1, 1)})
    return execute(Call(latents, LatentsConfig(batch_size=5, **settings)), run, [dataset, trained])


def read(dataset: Artifact, artifact: Artifact, column: str) -> dict[str, Any]:
    """Values of a column of the training rows, as a training reads them, and their images."""
    tables_read = TablesRead.of(Snapshot.of(dataset.facts), {"latents": artifact})
    sources = (tables_read.source("latents", column), tables_read.source("images", "jpg"))
    reader = RowReader(sources, tables_read.open_places("train"))
    assert len(reader) == 9
    return reader.read(np.arange(len(reader)))


@pytest.mark.usefixtures("cluster")
def test_latents_and_their_statistics_are_those_of_the_autoencoder(store: Store, dataset: Artifact) -> None:
    model, trained = autoencoder(store, KL)
    artifact = run_stage(store, dataset, trained)
    assert isinstance(artifact, Artifact), artifact
    assert artifact.facts["latent_shape"] == [4, 8, 8] and artifact.facts["encoded_now"] == NUM_ROWS
    assert pa.schema(tables.read(artifact.uri).schema).names == LATENT.names
    batch = read(dataset, artifact, "latent")
    found = stack_halves(batch["latent"], 4, 8, 8)
    with torch.no_grad():
        expected = model.encode(load_images(batch["jpg"], 16))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    by_channel = found.double().transpose(0, 1).flatten(1)  # [D, N s s]
    assert artifact.facts["mean"] == pytest.approx(by_channel.mean(dim=1).tolist(), abs=1e-9)
    assert artifact.facts["std"] == pytest.approx(by_channel.std(dim=1, correction=0).tolist(), abs=1e-9)
    reconstruction = artifact.facts["reconstruction"]
    assert reconstruction["difference"] > 0.1 and set(reconstruction["accuracy"]) == {
        "colour",
        "background",
        "size",
        "shape",
    }

    failed = run_stage(store, dataset, trained, min_reconstruction_accuracy=0.99)
    assert isinstance(failed, Failure) and "No generator of these latents can do better" in failed.message


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_codes_are_those_of_the_autoencoder(store: Store, dataset: Artifact) -> None:
    model, trained = autoencoder(store, VQ)
    artifact = run_stage(store, dataset, trained)
    assert isinstance(artifact, Artifact), artifact
    assert artifact.facts["latent_shape"] == [64] and "mean" not in artifact.facts
    assert tables.columns(artifact.uri) == CODES.names
    batch = read(dataset, artifact, "codes")
    with torch.no_grad():
        expected = model.tokens(load_images(batch["jpg"], 16))
    assert torch.equal(stack_rows(batch["codes"]).long(), expected)


def test_the_gate_names_the_worst_attribute_and_needs_scenes() -> None:
    found = Reconstructions(0.1, {"shape": 0.9, "colour": 1.0}, {"shape": 0.99, "colour": 1.0})
    check_reconstructions(found, LatentsConfig(min_reconstruction_accuracy=0.9))
    check_reconstructions(found, LatentsConfig())
    with pytest.raises(
        StageError, match=r"the shape is right in 0\.900 .* 0\.990 of the originals, expected at least 0\.95"
    ):
        check_reconstructions(found, LatentsConfig(min_reconstruction_accuracy=0.95))
    with pytest.raises(InputError, match="no procedural scenes"):
        check_reconstructions(Reconstructions(0.1, {}, {}), LatentsConfig(min_reconstruction_accuracy=0.95))
    with pytest.raises(ConfigError, match="min_reconstruction_accuracy: got 2, expected 0 to 1"):
        LatentsConfig(min_reconstruction_accuracy=2)
