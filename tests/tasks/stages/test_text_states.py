"""Text states and the text encoder's stage: bytes in the table, what a training reads, and encoders that are refused."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks import tables
from tasks.snapshots import Snapshot
from tasks.stage import Artifact, Call, Failure, Pinning, Resources, Run, execute
from tasks.stages.text_encoder import TextEncoderConfig, text_encoder
from tasks.stages.text_states import SCHEMA, StatesEncoder, TextStatesConfig, text_states
from tasks.stages.train import TablesRead
from tasks.store import Store
from tasks.tracking import Tracker
from tests.tasks.test_derived import dataset_of, write_rows
from tests.unclip.interop.test_t5 import write as write_t5
from unclip.data import RowReader
from unclip.errors import CheckpointError, ConfigError
from unclip.interop import t5
from unclip.models.text_states import TextStates, from_bytes
from unclip.systems.text_encoder import load_t5

WIDTH = 16


def run(call: Call, store: Store, *parents: Artifact) -> Artifact:
    resources = {"text_states": Resources(1, 1)}
    result = execute(call, Run("r", "p", store.root, Tracker("", ""), "", resources), parents)
    assert not isinstance(result, Failure), result.message
    return result


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "storage"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("t5"))


def pinned(config: TextEncoderConfig, store: Store) -> TextEncoderConfig:
    assert text_encoder.pin is not None
    return text_encoder.pin(config, Pinning(store, None))  # type: ignore[no-any-return]


class Words:
    """Text encoder of one state for each word; logs the captions."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def encode(self, captions: Sequence[str]) -> TextStates:
        self.calls.append(list(captions))
        length = torch.tensor([len(caption.split()) for caption in captions])
        return TextStates(torch.ones(len(captions), int(length.max()), 2) * length[:, None, None], length)


def test_equal_captions_are_encoded_once_and_rows_keep_their_order() -> None:
    words = Words()
    found = StatesEncoder(words).encode({"caption": ["a b", "c", "a b", "d e f"]})
    assert words.calls == [["a b", "c", "d e f"]]
    assert found["length"] == [2, 1, 2, 3] and [len(each) for each in found["states"]] == [8, 4, 8, 12]
    assert from_bytes(found["states"], found["length"]).states[:, 0, 0].tolist() == [2, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_the_table_holds_the_states_of_all_kept_captions_without_padding(folder: Path, store: Store) -> None:
    encoder = run(Call(text_encoder, pinned(TextEncoderConfig(f"local-dir:{folder}", 8), store)), store)
    assert encoder.facts["text_width"] == WIDTH
    dataset = dataset_of(store, write_rows(store), range(20), "one")
    made = run(Call(text_states, TextStatesConfig(batch_size=3)), store, dataset, encoder)
    assert made.facts["derived_now"] == 20
    snapshot, loaded, num_bytes = Snapshot.of(dataset.facts), load_t5(encoder.uri), 0
    read = TablesRead.of(snapshot, {"text_states": made})
    for split in ("train", "holdout"):
        sources = read.source("text_states", "states", "length"), read.source("images", "caption")
        reader = RowReader(sources, read.open_places(split))  # type: ignore[arg-type]
        rows = reader.read(np.arange(len(reader)))
        found, expected = from_bytes(rows["states"], rows["length"]), loaded.encode(rows["caption"])
        assert torch.equal(found.length, expected.length)
        for row, length in enumerate(found.length.tolist()):
            torch.testing.assert_close(
                found.states[row, :length], expected.states[row, :length], rtol=2e-3, atol=2e-3
            )  # batches of other sizes round differently
        num_bytes += sum(map(len, rows["states"]))
    stored = [tables.read_file(uri, ["states", "length"]) for uri in tables.files(made.uri)]
    assert tables.read_file(tables.files(made.uri)[0]).schema.names == SCHEMA.names
    lengths = sum(sum(each["length"].to_pylist()) for each in stored)
    assert (
        sum(len(state) for each in stored for state in each["states"].to_pylist()) == 2 * WIDTH * lengths == num_bytes
    )
    grown = dataset_of(store, snapshot_images(dataset), range(24), "two")
    assert run(Call(text_states, TextStatesConfig(batch_size=3)), store, grown, encoder).facts["derived_now"] == 4


def snapshot_images(dataset: Artifact) -> dict[str, Any]:
    """The dataset's images table, as `write_rows` describes it."""
    return {name: dataset.facts["snapshot"][name] for name in ("images", "images_version", "index_version")}


def test_files_that_change_after_planning_are_refused(tmp_path: Path, store: Store) -> None:
    folder = write_t5(tmp_path)
    config = pinned(TextEncoderConfig(f"local-dir:{folder}"), store)
    assert config.digest and config != pinned(TextEncoderConfig(f"local-dir:{write_t5(tmp_path, 'relu')}"), store)
    result = execute(Call(text_encoder, config), Run("r", "p", store.root, Tracker("", ""), ""), [])
    assert isinstance(result, Failure) and "has changed since this run was planned" in result.message
    wide = dataclasses.replace(pinned(TextEncoderConfig(f"local-dir:{folder}"), store), width=99)
    result = execute(Call(text_encoder, wide), Run("r", "p", store.root, Tracker("", ""), ""), [])
    assert isinstance(result, Failure) and "text_encoder.width: got 99, expected 16" in result.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "t5-small"}, "name: got 't5-small', expected \"clip\""),
        ({"name": "local-dir:"}, "name: got 'local-dir:'"),
        ({"name": "hf-hub:google/../t5", "width": 8}, "name: got 'hf-hub:google/../t5'"),
        ({"name": "hf-hub:google/t5-v1_1-xxl"}, "width: got None, expected that of the states of hf-hub:google"),
        ({"max_length": 1}, "max_length: got 1"),
    ],
)
def test_names_that_are_none_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextEncoderConfig(**changes)


def test_a_folder_without_a_model_is_refused_before_the_run(tmp_path: Path, store: Store) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read"):
        pinned(TextEncoderConfig(f"local-dir:{tmp_path}"), store)
    assert TextEncoderConfig().states_width() is None
    assert TextEncoderConfig(f"local-dir:{write_t5(tmp_path)}").states_width() == t5.read_settings(tmp_path).d_model
