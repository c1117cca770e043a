from pathlib import Path

import pytest
import torch

from unclip.errors import CheckpointError
from unclip.training import checkpoints


def tensors(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"a": torch.full((3, 2), value).t(), "b": torch.tensor(2, dtype=torch.int64)}}


def test_saved_tensors_and_facts_are_loaded(tmp_path: Path) -> None:
    digest = checkpoints.save(str(tmp_path / "x"), tensors(), {"kind": "test"})
    loaded, facts = checkpoints.load(str(tmp_path / "x"))
    assert facts == {"kind": "test"}
    assert torch.equal(loaded["model"]["a"], tensors()["model"]["a"]) and loaded["model"]["b"] == 2
    assert checkpoints.save(str(tmp_path / "y"), tensors(), {"kind": "test"}) == digest
    assert checkpoints.save(str(tmp_path / "z"), tensors(2.0), {"kind": "test"}) != digest


def test_a_folder_without_a_manifest_is_not_a_checkpoint(tmp_path: Path) -> None:
    checkpoints.save(str(tmp_path), tensors(), {})
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        checkpoints.load(str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "facts.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damage_is_detected(tmp_path: Path, name: str, damage: str) -> None:
    checkpoints.save(str(tmp_path), tensors(), {"kind": "test"})
    path = tmp_path / name
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else data[:-4] + bytes([data[-4] ^ 1]) + data[-3:])
    with pytest.raises(CheckpointError, match=r"damaged|no manifest"):
        checkpoints.load(str(tmp_path))
