"""The prior's stage: both priors from one table, by a setting."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from tasks import tables
from tasks.places import write_places
from tasks.ranges import KeyRange
from tasks.snapshots import Snapshot, save_statistics
from tasks.stages.embed import SCHEMA
from tasks.stages.train import SnapshotInputs
from tests.tasks.datasets import key
from unclip import config
from unclip.data import RowReader
from unclip.errors import ConfigError
from unclip.models import clip
from unclip.models.autoregressive_prior import AutoregressivePriorConfig
from unclip.models.clip import Clip
from unclip.models.embeddings import Moments
from unclip.models.prior import PriorConfig, PriorSampling
from unclip.systems.system import load_model
from unclip.systems.unclip.prior import (
    PRIOR,
    AutoregressivePriorObjective,
    PriorObjective,
    PriorStageConfig,
    fit_quantizer,
)
from unclip.training import trainer
from unclip.training.parallel import ALONE
from unclip.training.settings import TrainerConfig

NUM_ROWS = 40


@pytest.fixture(scope="module")
def frozen_clip() -> Clip:
    torch.manual_seed(0)
    return Clip(clip.create("unclip-demo", None), "unclip-demo")


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory, frozen_clip: Clip) -> Snapshot:
    folder = tmp_path_factory.mktemp("snapshot")
    keys = [key(index) for index in range(NUM_ROWS)]
    captions = [f"{index} wow !" for index in range(NUM_ROWS)]
    tokens = frozen_clip.tokenize(captions)
    images = F.normalize(torch.randn(NUM_ROWS, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    texts = frozen_clip.encode_text(tokens).text_embedding
    rows = pa.table(
        {
            "key": keys,
            "caption": captions,
            "image_embedding": list(images.numpy()),
            "text_embedding": list(texts.numpy()),
            "clip_score": (images * texts).sum(dim=1).numpy(),
            "tokens": list(tokens.int().numpy()),
            "tokens_lost": [0] * len(tokens),
        },
        schema=SCHEMA,
    )
    table = f"{folder}/embeddings"
    version = tables.append_files(table, [tables.write_part(table, "all", rows)], SCHEMA)
    splits = ["holdout" if index % 4 == 0 else "train" for index in range(NUM_ROWS)]
    train = torch.tensor([split == "train" for split in splits])
    save_statistics(f"{folder}/statistics", Moments.of(images[train]))
    places = pa.table({"key": keys, "split": splits, "images_file": [0] * NUM_ROWS, "images_row": range(NUM_ROWS)})
    for name in ("file", "row"):
        places = places.append_column(f"embeddings_{name}", places[f"images_{name}"])
    write_places(f"{folder}/places", [KeyRange(0, 1)], lambda _: places, 1, NUM_ROWS)
    names = {field.name: "" for field in dataclasses.fields(Snapshot)}
    names |= {"embeddings": table, "places": f"{folder}/places", "statistics": f"{folder}/statistics"}
    return Snapshot(**{**names, "embeddings_version": version})


def inputs(snapshot: Snapshot) -> SnapshotInputs:
    return SnapshotInputs(ALONE, snapshot, (), {})


def test_buckets_are_those_of_the_training_rows(snapshot: Snapshot) -> None:
    quantizer = fit_quantizer(AutoregressivePriorConfig(num_buckets=256), inputs(snapshot))
    reader = RowReader((snapshot.source("embeddings", "image_embedding"),), snapshot.open_places("train"))
    images = torch.tensor([row.tolist() for row in reader.read(np.arange(len(reader)))["image_embedding"]])
    lost = (quantizer.decode(quantizer.encode(images)) - images).square().sum()
    assert lost / (images - images.mean(dim=0)).square().sum() < 0.0101
    assert quantizer.num_components < 30 and quantizer.similarity_counts.sum() == 30
    again = fit_quantizer(AutoregressivePriorConfig(num_buckets=256), inputs(snapshot))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_either_prior_trains_on_the_same_table_and_is_loaded(
    tmp_path: Path, snapshot: Snapshot, frozen_clip: Clip, kind: str
) -> None:
    small: dict[str, Any] = {"width": 16, "depth": 1, "num_heads": 2}
    statistics, objective = snapshot.load_statistics(), None
    if kind == "diffusion":
        objective = PriorObjective(PriorConfig(**small, self_conditioning=True), frozen_clip, statistics)
    else:
        settings = AutoregressivePriorConfig(**small, num_buckets=32)
        quantizer = fit_quantizer(settings, inputs(snapshot))
        objective = AutoregressivePriorObjective(settings, frozen_clip, statistics, quantizer)
    source = snapshot.source("embeddings", *objective.columns)
    assert set(source.columns) <= set(SCHEMA.names)
    reader = RowReader((source,), snapshot.open_places("train"))
    tokens = objective.prepare(reader.read(np.array([0])))["tokens"]
    assert torch.equal(tokens, frozen_clip.tokenize(["1 wow !"])) and tokens.dtype == torch.int64
    trainer.train(objective, reader, TrainerConfig(num_samples=40, batch_size=10), str(tmp_path))
    prior: Any = load_model(f"{tmp_path}/model", (PRIOR,))
    assert prior.statistics.digest() == statistics.digest()
    text = frozen_clip.encode_text(tokens)
    drawn = prior.sample(text.text_encodings, text.text_mask, text.text_projection, PriorSampling(guidance_scale=2))
    assert drawn.shape == (1, 64) and drawn.isfinite().all()


def test_the_kind_is_a_setting() -> None:
    assert config.load(PriorStageConfig, {"kind": "autoregressive"}).autoregressive.num_buckets == 1024
    with pytest.raises(ConfigError, match="Did you mean 'autoregressive'"):
        config.load(PriorStageConfig, {"kind": "auto-regressive"})
