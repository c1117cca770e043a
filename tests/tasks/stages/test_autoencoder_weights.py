"""The weights of LPIPS are pinned before a training of an autoencoder starts."""

import dataclasses
from pathlib import Path

import pytest

from pipelines.config import load
from pipelines.prepare import prepare
from tasks.stage import Pinning
from tasks.stages.train import train
from tasks.store import Store
from tests.unclip.models.test_perceptual import write_lpips
from tests.unclip.training.test_batches import jpegs
from unclip.config import without_operational
from unclip.data import Batch
from unclip.errors import CheckpointError, ConfigError, InputError
from unclip.models.perceptual import LpipsDistance
from unclip.systems.autoencoder import AUTOENCODER, AutoencoderStageConfig
from unclip.systems.autoencoder.part import AutoencoderObjective, PerceptualConfig
from unclip.systems.autoencoder.sizes import DEMO_KL
from unclip.training.parallel import ALONE

STORE = Store("unused")


def lpips(weights: str | Path, weight: float = 1.0) -> AutoencoderStageConfig:
    return dataclasses.replace(DEMO_KL, perceptual=PerceptualConfig(weight, "lpips", str(weights)))


def pinned(config: AutoencoderStageConfig) -> AutoencoderStageConfig:
    pin = train(AUTOENCODER).pin
    assert pin is not None
    return pin(config, Pinning(STORE, None))  # type: ignore[no-any-return]


def fingerprint(config: AutoencoderStageConfig) -> str:
    return train(AUTOENCODER).fingerprint(config, [], STORE)


def test_another_file_at_the_same_path_is_another_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_lpips(tmp_path / "vgg.safetensors")
    first = pinned(lpips("vgg.safetensors"))
    assert first.perceptual.weights == str(file) and pinned(first) == first
    write_lpips(file, seed=1)
    second = pinned(lpips("vgg.safetensors"))
    assert second.perceptual.weights == str(file) and fingerprint(second) != fingerprint(first)

    class Inputs:
        workers = ALONE

        def preview_rows(self) -> Batch:
            return {"jpg": jpegs(1)}

    with pytest.raises(InputError, match=r"vgg\.safetensors is not the file that this run was planned with"):
        AUTOENCODER.objective(first, Inputs())  # type: ignore[arg-type]
    objective = AUTOENCODER.objective(second, Inputs())  # type: ignore[arg-type]
    assert isinstance(objective, AutoencoderObjective) and isinstance(objective.distance, LpipsDistance)


def test_a_file_that_is_missing_or_another_fails_before_the_start(tmp_path: Path) -> None:
    file = tmp_path / "vgg.safetensors"
    assignments = ["autoencoder.perceptual.weight=1", "autoencoder.perceptual.network=lpips"]
    assignments.append(f"autoencoder.perceptual.weights={file}")
    config = load("tiny", None, assignments, str(tmp_path / "storage"), system="latent_diffusion")
    with pytest.raises(
        ConfigError, match=rf"^autoencoder\.perceptual\.weights: got '{file}', expected an existing file"
    ):
        prepare(config, read_only=True)
    file.write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"perceptual\.weights: .* pickles are not read"):
        prepare(config, read_only=True)


def test_without_lpips_the_fingerprint_has_no_digest_and_no_file_is_read() -> None:
    for config in (AutoencoderStageConfig(), lpips("missing.safetensors", weight=0.0)):
        assert pinned(config) == config
        assert without_operational(config)["perceptual"].keys() == {"weight", "network", "weights"}
    changed = dataclasses.replace(PerceptualConfig(), digest="x")
    assert "digest" in without_operational(changed)
