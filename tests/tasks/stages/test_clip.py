"""The stage `clip` with weights that the settings name by path."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tasks.stage import Artifact, Call, Pinning, Run, execute
from tasks.stages.clip import ClipConfig, clip
from tasks.store import Store
from tasks.tracking import Tracker
from unclip.config import without_operational
from unclip.models import clip as clip_models
from unclip.models.clip import Clip

MODEL = "unclip-demo"
DEDUP = Artifact("dedup", "", "", "digest", {}, 0.0)


def write_weights(path: Path, seed: int) -> Clip:
    torch.manual_seed(seed)
    model = clip_models.create(MODEL, None)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return Clip(model, MODEL)


def pinned(config: ClipConfig) -> Any:
    assert clip.pin is not None
    return clip.pin(config, Pinning(Store("unused"), None))


def run(storage: Path, config: ClipConfig) -> Any:
    return execute(Call(clip, config), Run("run", "pipeline", str(storage), Tracker("", ""), "0"), [DEDUP])


def features(model: Clip) -> torch.Tensor:
    return model.encode_text(model.tokenize(["a red circle"])).text_embedding


def test_other_weights_at_the_same_path_are_another_model(tmp_path: Path) -> None:
    write_weights(tmp_path / "weights.safetensors", 0)
    config = ClipConfig(MODEL, str(tmp_path / "weights.safetensors"))
    before = pinned(config)
    assert pinned(config) == before
    write_weights(tmp_path / "weights.safetensors", 1)
    assert without_operational(pinned(config)) != without_operational(before)
    result = run(tmp_path / "storage", before)
    assert not isinstance(result, Artifact) and "has changed since this run was planned" in result.message


def test_a_folder_of_weights_counts_with_all_its_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip_models.save(clip_models.create(MODEL, None), MODEL, tmp_path / "model")
    config = ClipConfig(f"local-dir:{tmp_path}/model", None)
    before = pinned(config)
    (tmp_path / "model" / "notes.md").write_text("not read by open_clip")
    assert pinned(config) == before
    settings = tmp_path / "model" / "open_clip_config.json"
    settings.write_text(settings.read_text().replace("bicubic", "bilinear"))
    assert pinned(config) != before


def test_weights_are_copied_so_that_their_file_may_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = write_weights(tmp_path / "folder" / "weights.safetensors", 0)
    monkeypatch.chdir(tmp_path)
    config = pinned(ClipConfig(MODEL, "folder/weights.safetensors"))
    assert config.pretrained == f"{tmp_path}/folder/weights.safetensors"
    artifact = run(tmp_path / "storage", config)
    assert isinstance(artifact, Artifact), artifact.message
    (tmp_path / "folder" / "weights.safetensors").unlink()
    monkeypatch.chdir("/")
    loaded = Clip.load(artifact.facts["model"], artifact.facts["pretrained"])
    torch.testing.assert_close(features(loaded), features(given))


def test_settings_without_paths_have_the_fingerprint_that_they_always_had() -> None:
    assert "digest" not in without_operational(ClipConfig(MODEL, None))
    assert pinned(ClipConfig(MODEL, None)) == ClipConfig(MODEL, None)
    assert "digest" in without_operational(dataclasses.replace(ClipConfig(MODEL, None), digest="x"))
