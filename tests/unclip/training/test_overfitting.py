"""Overfitting test: it passes models that learn, and diagnoses those that do not."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from tests.unclip.training import trained_on_workers
from unclip.data import RowReader, Source
from unclip.errors import ConfigError
from unclip.systems.upsampler import UpsamplerObjective
from unclip.training import overfitting, trainer
from unclip.training.settings import TrainerConfig


def reader(folder: Path) -> RowReader:
    """Reader of four images of one colour each."""
    path, jpegs = folder / "colours.parquet", [io.BytesIO() for _ in range(4)]
    for jpeg, colour in zip(jpegs, ("red", "green", "blue", "yellow"), strict=True):
        Image.new("RGB", (16, 16), colour).save(jpeg, "JPEG")
    pq.write_table(pa.table({"key": list("0123"), "jpg": [jpeg.getvalue() for jpeg in jpegs]}), path)
    return RowReader.of_keys([Source((str(path),), ("jpg",))], list("0123"))


def diagnose(folder: Path, objective: UpsamplerObjective) -> overfitting.Diagnosis:
    rows = reader(folder)
    diagnosis = overfitting.Diagnosis()
    config = overfitting.settings(TrainerConfig(precision="fp32"), num_rows=4)
    trainer.train(objective, rows, config, str(folder / "run"), diagnosis)
    return diagnosis


def upsampler(folder: Path) -> UpsamplerObjective:
    torch.manual_seed(0)
    return UpsamplerObjective(trained_on_workers.MODEL, reader(folder).read(np.array([0])))


def test_a_model_that_learns_passes(tmp_path: Path) -> None:
    diagnosis = diagnose(tmp_path, upsampler(tmp_path))
    assert diagnosis.has_memorised, diagnosis.relative_losses
    assert "memorised" in diagnosis.verdict and len(diagnosis.relative_losses) == 8


def test_a_model_without_gradients_is_diagnosed(tmp_path: Path) -> None:
    class Detached(UpsamplerObjective):
        def loss(self, network: nn.Module, tensors, generator):
            loss = super().loss(network, tensors, generator)
            return loss.detach() + 0 * sum(parameter.sum() for parameter in network.parameters())

    torch.manual_seed(0)
    diagnosis = diagnose(tmp_path, Detached(trained_on_workers.MODEL, reader(tmp_path).read(np.array([0]))))
    assert not diagnosis.has_memorised and diagnosis.verdict.startswith("No gradient reaches the weights")


@pytest.mark.parametrize(
    ("losses", "beginning"),
    [
        ([1.0, 0.99, 1.0], "The model learns nothing"),
        ([0.5, 0.48, 0.49], "The model stopped learning"),
        ([0.9, 0.6, 0.4], "The model learns, but slowly"),
        ([0.9, 0.2, 0.1], "The model has memorised the rows"),
    ],
)
def test_verdicts(losses: list[float], beginning: str) -> None:
    diagnosis = overfitting.Diagnosis()
    for loss in losses:
        diagnosis.metrics({"relative_loss": loss, "gradient_norm": 1.0}, 0)
    assert diagnosis.verdict.startswith(beginning)


def test_an_objective_without_relative_loss_is_rejected() -> None:
    diagnosis = overfitting.Diagnosis()
    diagnosis.metrics({"loss": 1.0, "gradient_norm": 1.0}, 0)
    with pytest.raises(ConfigError, match="no relative_loss"):
        _ = diagnosis.verdict
