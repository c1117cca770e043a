"""Small networks of the parts that sample latents, tokens or Imagen's images, with rows to train them on.

The trainer's promises are shown for each of them, in `test_promises`. Processes from a fork server import this module.
"""

import dataclasses
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from tests.unclip.systems import latent_parts, tiny_tokens
from tests.unclip.training.trained_on_workers import End, Recorder, settings
from unclip.data import Batch, RowReader, Source, half_bytes
from unclip.diffusion.process import DiffusionConfig
from unclip.evaluation import scenes
from unclip.models.clip import Clip
from unclip.models.discriminator import DiscriminatorConfig
from unclip.models.efficient_unet import EfficientUNetConfig
from unclip.models.imagen import ImagenConfig, ImagenSampling, TextUpsamplerConfig, TextUpsamplerSampling
from unclip.models.patch_transformer import PatchTransformerConfig
from unclip.models.text_states import ClipTextEncoder, to_bytes
from unclip.models.unet import UNetConfig
from unclip.systems.autoencoder.part import AutoencoderObjective, PerceptualConfig
from unclip.systems.imagen.generator import ImagenObjective
from unclip.systems.imagen.super_resolution import TextUpsamplerObjective
from unclip.systems.parti import VIT_VQGAN
from unclip.training import trainer
from unclip.training.objective import Objective
from unclip.training.parallel import ALONE, Workers

NUM_ROWS = 32
STEPS = 4
"""Steps of 16 samples; checkpoints after the second and the last one."""
STOP = End(before_step=3, kill=None)
SHORT = {
    "num_samples": 16 * STEPS,
    "checkpoint_samples": 32,
    "micro_batch_size": 8,
    "validation_rows": 8,
    "adam_eps": 1e-5,
}
"""Biases of keys have no gradient but rounding errors, which Adam's usual epsilon would make as large as any."""

_MANY_TIMESTEPS = DiffusionConfig(prediction_type="v")
_FEW_TIMESTEPS = DiffusionConfig(num_timesteps=10, prediction_type="v")
"""The finished model is measured at fewer timesteps."""


@dataclasses.dataclass(frozen=True)
class SmallPart:
    """Part of a system, or a kind of one."""

    rows: Callable[[int], Batch]
    """Number of rows -> as many rows that differ, without keys."""
    objective: Callable[[Batch, bool], Objective]
    """Rows for previews, and whether the network is to memorise sixteen rows: it is then wider, without dropout, and
    tokens and latents always have their captions -> objective."""


@functools.cache
def clip() -> Clip:
    return latent_parts.tiny_clip()


# Latents and tokens


def _latent_rows(num_rows: int) -> Batch:
    """Latents of a few even areas, as those of images are smooth, and captions that differ in every word."""
    areas = np.random.default_rng(1).normal(size=(num_rows, 4, 2, 2)).repeat(4, axis=2).repeat(4, axis=3)
    std, mean = (np.array(values)[:, None, None] for values in (latent_parts.STD, latent_parts.MEAN))
    tokens = clip().tokenize([" ".join([str(number)] * 10) for number in range(num_rows)])
    return {
        "latent": [half_bytes(latent) for latent in areas * std + mean],
        "tokens": [each.int().numpy() for each in tokens],
        "image_embedding": latent_parts.rows(clip(), num_rows)["image_embedding"],
    }


def _latents(kind: str, **unet: Any) -> SmallPart:
    """Args: unet: settings of the U-Net that differ; one with spatial Transformers reads the states of CLIP."""
    config = latent_parts.CONFIGS[kind].model

    def objective(memorises: bool) -> Objective:
        changes: dict[str, Any] = {"text": "clip", "context_dim": clip().text_width} if unet else {}
        if memorises:
            size = {"channels": 32}
            changes |= {"text_drop_prob": 0.0, "image_drop_prob": 0.0}
        else:
            size = {"dropout": 0.1}
            changes |= {"diffusion": _FEW_TIMESTEPS, "max_noise_level": config.max_noise_level // 100}
        return latent_parts.objective(kind, clip(), unet=dataclasses.replace(config.unet, **size, **unet), **changes)

    return SmallPart(_latent_rows, lambda _, memorises: objective(memorises))


def _token_rows(num_rows: int) -> Batch:
    return tiny_tokens.rows(clip(), num_rows)


def _tokens(kind: str) -> SmallPart:
    def objective(memorises: bool) -> Objective:
        changes = {"width": 48, "cond_drop_prob": 0.0} if memorises else {"dropout": 0.1}
        return tiny_tokens.objective(kind, clip(), **changes)

    return SmallPart(_token_rows, lambda _, memorises: objective(memorises))


# Images


def _image_rows(num_rows: int) -> Batch:
    """Scenes, as random pixels fit into no bottleneck, with the states of captions of different lengths."""
    rng, jpegs = np.random.default_rng(0), [io.BytesIO() for _ in range(num_rows)]
    for jpeg in jpegs:
        Image.fromarray(scenes.render(scenes.random_scene(rng), rng, 16)).save(jpeg, "JPEG", quality=95)
    captions = [" ".join(["very"] * (number % 5) + [f"image {number}"]) for number in range(num_rows)]
    states = ClipTextEncoder(clip()).encode(captions)
    jpeg_bytes = [jpeg.getvalue() for jpeg in jpegs]
    return {"jpg": jpeg_bytes, "states": to_bytes(states), "length": states.length.tolist()}


def _imagen(rows: Batch, memorises: bool) -> Objective:
    channels = 48 if memorises else 8
    unet = UNetConfig(8, channels, (1, 2), 1, attention_resolutions=(4,), head_channels=8, norm_groups=4)
    config = ImagenConfig(unet, context_dim=channels, pooling_heads=2, diffusion=_MANY_TIMESTEPS)
    if not memorises:
        config = dataclasses.replace(config, unet=dataclasses.replace(unet, dropout=0.1), diffusion=_FEW_TIMESTEPS)
    return ImagenObjective(config, rows, ImagenSampling(num_steps=2))


def _super_resolution(rows: Batch, memorises: bool) -> Objective:
    channels = 32 if memorises else 8
    unet = EfficientUNetConfig(16, channels, (1, 2), (1, 1), ("none", "full"), num_heads=2, norm_groups=4)
    sizes = {"low_res_size": 8, "scale": 2, "context_dim": channels, "pooling_heads": 2}
    if memorises:
        config = TextUpsamplerConfig(unet, max_noise_level=500, diffusion=_MANY_TIMESTEPS, **sizes)
    else:
        unet = dataclasses.replace(unet, dropout=0.1)
        config = TextUpsamplerConfig(unet, max_noise_level=5, diffusion=_FEW_TIMESTEPS, **sizes)
    return TextUpsamplerObjective(config, rows, TextUpsamplerSampling(num_steps=2))


def _vit_vqgan(rows: Batch, memorises: bool) -> Objective:
    """ViT-VQGAN's settings with a small network, and a discriminator that starts before the last step."""
    model = dataclasses.replace(
        VIT_VQGAN.model,
        image_size=16,
        latent_channels=4,
        codebook_size=256 if memorises else 24,
        transformer=PatchTransformerConfig(patch_size=4, width=96 if memorises else 16, depth=2, num_heads=2),
    )
    discriminator = dataclasses.replace(
        VIT_VQGAN.discriminator,
        weight=0.0 if memorises else 0.1,
        start_samples=32,
        model=DiscriminatorConfig(channels=8, num_layers=2, norm_groups=4),
    )
    config = dataclasses.replace(VIT_VQGAN, model=model, perceptual=PerceptualConfig(0.0), discriminator=discriminator)
    return AutoencoderObjective(config, rows)


PARTS = {
    "latent_diffusion": _latents("latent_diffusion"),
    "stable_diffusion": _latents(
        "latent_diffusion",
        attention="spatial_transformer",
        num_heads=2,
        resampling="convolution",
        scale_shift_norm=False,
    ),
    "stable_unclip": _latents("stable_unclip"),
    "imagen": SmallPart(_image_rows, _imagen),
    "super_resolution": SmallPart(_image_rows, _super_resolution),
    "vit_vqgan": SmallPart(_image_rows, _vit_vqgan),
    "dalle": _tokens("dalle"),
    "parti": _tokens("parti"),
}


def reader(folder: Path, name: str, num_rows: int = NUM_ROWS) -> RowReader:
    """Reader of rows of a part, which it writes if there are none yet."""
    path, keys = folder / "rows.parquet", [f"{index:02d}" for index in range(num_rows)]
    if not path.exists():
        pq.write_table(pa.table({"key": keys, **PARTS[name].rows(num_rows)}), path, row_group_size=8)
    columns = tuple(column for column in pq.read_schema(path).names if column != "key")
    return RowReader.of_keys([Source((str(path),), columns)], keys)


def objective(name: str, rows: RowReader, memorises: bool = False) -> Objective:
    """Objective of a part with the same weights at each call, which shows two of the rows as previews."""
    torch.manual_seed(0)
    return PARTS[name].objective(rows.read(np.arange(2)), memorises)


def run(
    folder: Path, name: str, run_name: str, workers: Workers = ALONE, end: End | None = None, **changes: Any
) -> None:
    """Train a part in `folder`/RUN_NAME, or resume there; write the losses to RUN_NAME.jsonl in `folder`."""
    rows = reader(folder, name)
    monitor = Recorder(folder / f"{run_name}.jsonl", workers.rank, end)
    config = settings(**{**SHORT, **changes})
    try:
        trainer.train(objective(name, rows), rows, config, f"{folder}/{run_name}", monitor, workers, rows)
    except trainer.StoppedError:
        assert end is not None


Job = tuple[str, str, dict[str, Any]]
"""Part, name of its training, and changed settings."""


def run_rank_of_two(rank: int, folder: str, jobs: list[Job]) -> None:
    """Run trainings, each in the folder of its part, as one of two ranks."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    for part, run_name, changes in jobs:
        run(Path(folder) / part, part, run_name, Workers(rank, 2), **changes)
    torch.distributed.destroy_process_group()
