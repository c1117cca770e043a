from pathlib import Path

import pytest
import torch

from unclip import files, foreign
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


@pytest.mark.parametrize(
    "name", ["../secret.json", "a/../../secret.json", "/dev/zero", "a/b/c.json", "secret", "..", "\n.json"]
)
def test_a_manifest_names_files_of_its_folder_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.json").write_text("{}")
    folder = tmp_path / "x"
    (folder / "a").mkdir(parents=True)
    for digest in (files.sha256(b"{}"), "0" * 64):
        files.write_json(f"{folder}/manifest.json", {"sha256": {name: digest}})
        with pytest.raises(CheckpointError, match="which is no file in it"):
            checkpoints.load(str(folder))


def test_facts_are_read_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(content: bytes) -> None:
        (tmp_path / "facts.json").write_bytes(content)
        files.write_json(f"{tmp_path}/manifest.json", {"sha256": {"facts.json": files.sha256(content)}})

    write(b"[" * 200_000 + b"]" * 200_000)
    with pytest.raises(CheckpointError, match="recursion"):
        checkpoints.load(str(tmp_path))
    monkeypatch.setattr(foreign, "MAX_TEXT_BYTES", 1000)
    write(b" " * 1001)
    with pytest.raises(CheckpointError, match=r"facts\.json: got 1,001 bytes"):
        checkpoints.load(str(tmp_path))
    (tmp_path / "facts.json").unlink()
    (tmp_path / "facts.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"facts\.json: got 0 bytes"):
        checkpoints.load(str(tmp_path))
