"""Files of pretrained models are taken from their own folder alone."""

from pathlib import Path

import pytest
import torch

from tasks.weights import files_digest, model_files
from unclip.errors import CheckpointError
from unclip.systems.system import ClipFiles, StackFiles, save_stack
from unclip.training import checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose tokenizer is a link to a secret beside it."""
    (tmp_path / "id_rsa").write_text("a secret")
    made = tmp_path / "clip"
    made.mkdir()
    (made / "open_clip_config.json").write_text("{}")
    (made / "merges.txt").symlink_to("../id_rsa")
    return made


def test_a_link_out_of_the_folder_is_no_file_of_a_model(folder: Path) -> None:
    for read in (model_files, files_digest):
        with pytest.raises(CheckpointError, match=r"merges\.txt: a link to .*id_rsa, outside"):
            read(folder)
    (folder / "merges.txt").unlink()
    (folder / "merges.txt").symlink_to("open_clip_config.json")
    assert [path.name for path in model_files(folder)] == ["merges.txt", "open_clip_config.json"]


def test_it_is_not_published_with_a_stack(folder: Path, tmp_path: Path) -> None:
    checkpoints.save(f"{tmp_path}/prior", {"model": {"a": torch.zeros(1)}}, {"kind": "prior"})
    stack = StackFiles("unclip", {"prior": f"{tmp_path}/prior"}, ClipFiles(f"local-dir:{folder}"))
    with pytest.raises(CheckpointError, match=r"merges\.txt: a link"):
        save_stack(f"{tmp_path}/stack", stack)
    assert not [path for path in tmp_path.rglob("stack/**/*") if path.is_file() and path.read_text() == "a secret"]
