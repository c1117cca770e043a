"""Training in samples per second: our prior, decoder and network of latents against those of others, and our data loading.

    python -m benchmarks.training
    python -m benchmarks.training --device cuda --size base --compile

A step is complete: forward and backward pass, gradient clipping, fused AdamW, EMA. Ours is the trainer's own loop. The
others train as documented: DALLE2-pytorch through its `DiffusionPrior` and `Decoder` with ema-pytorch, diffusers as in its
Kandinsky 2.2 scripts with `EMAModel`. All use the same batch size, image size, tokens and precision, plain squared error as
loss, a batch in memory, and parameter counts within 5 %; no CLIP runs. Each contender trains in its own process, is warm,
and waits while the others take their turn. The network of latents reads the text tokens of CLIP; `UNet2DConditionModel` has the
same layers.

The loading benchmark reads Parquet and decodes images for the same decoder, which then also trains on what it loads.

Letters: B batch, L text tokens, E CLIP embedding width, S image size.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import itertools
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from unclip.background import usable_cpus
from unclip.data import Batch, RowReader, Source
from unclip.diffusion.process import DiffusionConfig
from unclip.models.autoencoder import Autoencoder, AutoencoderConfig
from unclip.models.clip import TextFeatures
from unclip.models.decoder import NUM_IMAGE_TOKENS, DecoderConfig
from unclip.models.embeddings import EmbeddingStatistics
from unclip.models.latent_diffusion import LatentDiffusionConfig
from unclip.models.prior import PriorConfig
from unclip.models.unet import UNetConfig
from unclip.systems.latent_diffusion import LatentDiffusionObjective, LatentDiffusionStageConfig
from unclip.systems.unclip.decoder import DecoderObjective
from unclip.systems.unclip.prior import PriorObjective
from unclip.training import trainer
from unclip.training.batches import decoded
from unclip.training.flops import peak_of
from unclip.training.parallel import Workers
from unclip.training.precision import autocast
from unclip.training.settings import TrainerConfig

TEXT_LENGTH = 77
LATENT_CHANNELS = 4
HEAD_WIDTH = 64
WARM_UP_STEPS = 3
LEARNING_RATE, CLIP_NORM = 1e-4, 1.0
PROFILED = 14
"""Number of operators of a profile to print."""
GOALS = {"prior": 1.3, "decoder": 1.3, "latents": 1.3, "loading": 5.0}

MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
"""Settings of the pipeline's workers; here all contenders use them."""

PEERS = {"DALLE2-pytorch": ("dalle2_pytorch", "dalle2-pytorch"), "diffusers": ("diffusers", "diffusers")}
"""Name -> module, and its name for pip."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Models of equal size for all contenders; the fields for DALLE2-pytorch balance its different architecture."""

    prior: PriorConfig
    prior_ff_mult: float
    """DALLE2-pytorch only: its heads share keys and values, and its MLPs are gated."""
    prior_batch_size: int
    unet: UNetConfig
    unet_dim: int
    """DALLE2-pytorch only: channels of the first level."""
    unet_num_resnet_blocks: int
    """DALLE2-pytorch only: residual blocks beyond the one that every level has."""
    context_dim: int
    decoder_batch_size: int
    embedding_dim: int
    """E; for the prior also the width of the text encodings, since DALLE2-pytorch has only one width."""


def _unet(image_size: int, channels: int, num_res_blocks: int) -> UNetConfig:
    attention_resolutions = (image_size // 2, image_size // 4, image_size // 8)
    return UNetConfig(image_size, channels, (1, 2, 3, 4), num_res_blocks, attention_resolutions, HEAD_WIDTH)


SIZES = {
    # 20 M parameters each, for CPUs
    "small": Size(PriorConfig(512, 6, 8), 3.0, 16, _unet(32, 64, 1), 64, 1, 256, 16, embedding_dim=512),
    # 208 M and 110 M, for GPUs
    "base": Size(PriorConfig(1024, 16, 16), 3.25, 256, _unet(64, 128, 2), 144, 2, 512, 128, embedding_dim=1024),
}


@dataclasses.dataclass(frozen=True)
class Training:
    """One contender; `run` trains one step for each batch."""

    run: Callable[[Generator[Batch, None, None]], object]
    batches: Iterator[Batch]
    batch_size: int
    network: nn.Module | None = None
    """Module with the parameters; None if nothing is trained."""
    loss: Callable[[], Tensor] | None = None
    """Loss of the batch in memory."""
    preparing: "Stopwatch | None" = None
    """Measures the decoding of images, if that is part of a step."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """Properties of a contender, reported before the first step."""

    parameters: int
    flops: float
    """FLOPs of a sample's forward and backward pass."""
    batch_size: int
    device: str


@dataclasses.dataclass(frozen=True)
class Turn:
    """Measurements of some steps of one contender."""

    samples_per_second: float
    waiting: float
    """Share of the time spent waiting for rows."""
    preparing: float
    """Share of the time spent preparing rows that have arrived."""
    operators: dict[str, float]
    """Shares of the time by torch operator, largest first; empty without `--profile`."""


class Stopwatch:
    """A context that adds up the seconds spent inside it."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self._started


class PrecomputedText(nn.Module):
    """A stand-in for a frozen CLIP that returns precomputed features, as the others receive them."""

    text_length, vocab_size = TEXT_LENGTH, 49_408

    def __init__(self, text: TextFeatures) -> None:
        super().__init__()
        self.text = text
        self.embedding_dim, self.text_width = text.text_embedding.shape[1], text.text_encodings.shape[2]

    def tokenize(self, captions: list[str]) -> Tensor:
        return torch.zeros(len(captions), TEXT_LENGTH, dtype=torch.long)

    def encode_text(self, tokens: Tensor, encodes_padding: bool = False) -> TextFeatures:
        return TextFeatures(*(feature[: len(tokens)] for feature in self.text))


class InMemory:
    """A RowReader over given batches."""

    def __init__(self, batches: Generator[Batch, None, None]) -> None:
        self._batches = batches

    def batches(self, prepare: Callable[[Batch], Any], **_: object) -> Generator[Any, None, None]:
        return (prepare(batch) for batch in self._batches)


def captions(size: Size, batch_size: int, device: torch.device) -> TextFeatures:
    """Return random features of captions of different lengths, zero at padding."""
    mask = torch.arange(TEXT_LENGTH) < torch.randint(8, TEXT_LENGTH, (batch_size, 1))  # [B, L]
    encodings = torch.randn(batch_size, TEXT_LENGTH, size.embedding_dim) * mask[:, :, None]  # [B, L, E]
    projection = torch.randn(batch_size, size.embedding_dim)  # [B, E]
    features = (F.normalize(projection, dim=1), encodings, mask, projection)
    return TextFeatures(*(feature.to(device) for feature in features))


def image_embeddings(size: Size, count: int) -> Tensor:
    return F.normalize(torch.randn(count, size.embedding_dim), dim=1)


def images(size: Size, batch_size: int) -> Tensor:
    image_size = size.unet.image_size
    return torch.rand(batch_size, 3, image_size, image_size) * 2 - 1


def same_rows(batch_size: int) -> Iterator[Batch]:
    return itertools.repeat({"key": [""] * batch_size})


# Ours


def our_prior(size: Size, arguments: argparse.Namespace) -> Training:
    device, batch_size = torch.device(arguments.device), arguments.batch_size or size.prior_batch_size
    statistics = EmbeddingStatistics.of(image_embeddings(size, 1000))
    text: Any = PrecomputedText(captions(size, batch_size, device))
    objective = PriorObjective(size.prior, text, statistics)
    tokens = text.tokenize([""] * batch_size).to(device)
    tensors = {"tokens": tokens, "image_embedding": image_embeddings(size, batch_size).to(device)}
    return ours(objective, tensors, batch_size, arguments)


def our_decoder(size: Size, arguments: argparse.Namespace) -> Training:
    device, batch_size = torch.device(arguments.device), arguments.batch_size or size.decoder_batch_size
    objective = new_decoder(size)
    tensors = {"images": images(size, batch_size), "image_embedding": image_embeddings(size, batch_size)}
    return ours(objective, {name: value.to(device) for name, value in tensors.items()}, batch_size, arguments)


def new_decoder(size: Size) -> DecoderObjective:
    """Create a decoder without captions, since the U-Nets of the others also get only the image embedding."""
    statistics = EmbeddingStatistics.of(image_embeddings(size, 1000))
    black: dict[str, list[Any]] = {
        "jpg": [_jpeg(np.zeros((8, 8, 3), np.uint8))],
        "image_embedding": [np.zeros(size.embedding_dim, np.float32)],
    }
    return DecoderObjective(DecoderConfig(size.unet, size.context_dim), statistics, black)


def our_latents(size: Size, arguments: argparse.Namespace) -> Training:
    device, batch_size = torch.device(arguments.device), arguments.batch_size or size.decoder_batch_size
    shape = (LATENT_CHANNELS, size.unet.image_size, size.unet.image_size)
    facts = {"latent_shape": shape, "mean": [0.0] * LATENT_CHANNELS, "std": [1.0] * LATENT_CHANNELS}
    text: Any = PrecomputedText(captions(size, batch_size, device))
    config = LatentDiffusionConfig(
        size.unet, LATENT_CHANNELS, size.context_dim, diffusion=DiffusionConfig(schedule="linear")
    )
    unused = Autoencoder(
        AutoencoderConfig(size.unet.image_size, channels=32, channel_mult=(1,), attention_resolutions=())
    )
    black: dict[str, list[Any]] = {"latent": [bytes(2 * math.prod(shape))], "tokens": [np.zeros(TEXT_LENGTH, np.int64)]}
    statistics = EmbeddingStatistics.of(image_embeddings(size, 1000))
    objective = LatentDiffusionObjective(
        "latent_diffusion", LatentDiffusionStageConfig(config), text, statistics, facts, unused, "", black
    )
    tokens = text.tokenize([""] * batch_size).to(device)
    return ours(
        objective, {"tokens": tokens, "latents": torch.randn(batch_size, *shape, device=device)}, batch_size, arguments
    )


def ours(
    objective: PriorObjective | DecoderObjective | LatentDiffusionObjective,
    tensors: dict[str, Tensor],
    batch_size: int,
    arguments: argparse.Namespace,
) -> Training:
    """Train an objective on tensors in memory."""
    device = torch.device(arguments.device)
    objective.model.to(device)
    objective.prepare = lambda batch: tensors  # type: ignore[method-assign]
    generator = torch.Generator(device).manual_seed(0)
    return Training(
        lambda batches: train(objective, InMemory(batches), batch_size, arguments),
        same_rows(batch_size),
        batch_size,
        objective.model,
        lambda: objective.loss(objective.model, tensors, generator),
    )


def train(objective: Any, reader: Any, batch_size: int, arguments: argparse.Namespace) -> None:
    """Run the trainer's own loop without end."""
    endless = 10**12
    config = TrainerConfig(
        num_samples=endless,
        batch_size=batch_size,
        learning_rate=LEARNING_RATE,
        clip_norm=CLIP_NORM,
        precision=arguments.precision,
        compile=arguments.compile,
        checkpoint_samples=endless,
        log_samples=endless,
    )
    with tempfile.TemporaryDirectory(prefix="unclip-benchmark-") as folder:
        trainer.train(objective, reader, config, folder, workers=Workers(device=torch.device(arguments.device)))


# The others


def dalle2_prior(size: Size, arguments: argparse.Namespace) -> Training:
    from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork
    from ema_pytorch import EMA

    device, batch_size = torch.device(arguments.device), arguments.batch_size or size.prior_batch_size
    network = DiffusionPriorNetwork(
        dim=size.embedding_dim,
        depth=size.prior.depth,
        dim_head=HEAD_WIDTH,
        heads=size.prior.num_heads,
        ff_mult=size.prior_ff_mult,
        max_text_len=TEXT_LENGTH,
    )
    prior = DiffusionPrior(
        network, image_embed_dim=size.embedding_dim, text_cond_drop_prob=0.1, image_cond_drop_prob=0.0
    ).to(device)
    text, image_embedding = captions(size, batch_size, device), image_embeddings(size, batch_size).to(device)

    def loss() -> Tensor:
        image_embed = image_embedding.clone()  # DALLE2-pytorch changes it in place
        return prior(  # type: ignore[no-any-return]
            image_embed=image_embed, text_embed=text.text_embedding, text_encodings=text.text_encodings
        )

    return theirs(prior, network, loss, EMA(prior).update, batch_size, arguments)


def dalle2_decoder(size: Size, arguments: argparse.Namespace) -> Training:
    from dalle2_pytorch import Decoder, Unet
    from ema_pytorch import EMA

    device, batch_size = torch.device(arguments.device), arguments.batch_size or size.decoder_batch_size
    resolutions = [size.unet.image_size // 2**level for level in range(len(size.unet.channel_mult))]
    unet = Unet(
        dim=size.unet_dim,
        image_embed_dim=size.embedding_dim,
        cond_dim=size.context_dim,
        channels=3,
        dim_mults=size.unet.channel_mult,
        num_image_tokens=NUM_IMAGE_TOKENS,
        num_resnet_blocks=size.unet_num_resnet_blocks,
        self_attn=tuple(resolution in size.unet.attention_resolutions for resolution in resolutions),
        cond_on_image_embeds=True,
    )
    decoder = Decoder(unet, image_size=size.unet.image_size, learned_variance=False).to(device)
    pixels, image_embed = images(size, batch_size).to(device) / 2 + 0.5, image_embeddings(size, batch_size).to(device)
    network = decoder.unets[0]

    def loss() -> Tensor:
        return decoder(pixels, image_embed=image_embed, unet_number=1)  # type: ignore[no-any-return]

    return theirs(decoder, network, loss, EMA(network).update, batch_size, arguments)


def diffusers_prior(size: Size, arguments: argparse.Namespace) -> Training:
    from diffusers import DDPMScheduler, PriorTransformer
    from diffusers.training_utils import EMAModel

    device, batch_size = torch.device(arguments.device), arguments.batch_size or size.prior_batch_size
    prior = PriorTransformer(
        num_attention_heads=size.prior.num_heads,
        attention_head_dim=HEAD_WIDTH,
        num_layers=size.prior.depth,
        embedding_dim=size.embedding_dim,
        num_embeddings=TEXT_LENGTH,
    ).to(device)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    ema = EMAModel(prior.parameters(), foreach=True)
    text, image_embedding = captions(size, batch_size, device), image_embeddings(size, batch_size).to(device)

    def loss() -> Tensor:
        x0 = (image_embedding - prior.clip_mean) / prior.clip_std.abs()  # [B, E]
        noise = torch.randn_like(x0)
        t = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), device=device)
        prediction = prior(
            scheduler.add_noise(x0, noise, t),
            timestep=t,
            proj_embedding=text.text_projection,
            encoder_hidden_states=text.text_encodings,
            attention_mask=text.text_mask,
        ).predicted_image_embedding
        return F.mse_loss(prediction.float(), x0)

    return theirs(prior, prior, loss, lambda: ema.step(prior.parameters()), batch_size, arguments)


def diffusers_decoder(size: Size, arguments: argparse.Namespace) -> Training:
    from diffusers.models.embeddings import ImageProjection

    device, batch_size = torch.device(arguments.device), arguments.batch_size or size.decoder_batch_size
    unet = diffusers_unet(
        size, 3, addition_embed_type="image", encoder_hid_dim_type="image_proj", encoder_hid_dim=size.embedding_dim
    )
    unet.encoder_hid_proj = ImageProjection(size.embedding_dim, size.context_dim, NUM_IMAGE_TOKENS)  # 32 without this
    given = {"image_embeds": image_embeddings(size, batch_size).to(device)}
    x0 = images(size, batch_size).to(device)
    return diffusers_training(unet.to(device), "squaredcos_cap_v2", x0, arguments, added_cond_kwargs=given)


def diffusers_latents(size: Size, arguments: argparse.Namespace) -> Training:
    device, batch_size = torch.device(arguments.device), arguments.batch_size or size.decoder_batch_size
    unet = diffusers_unet(
        size,
        LATENT_CHANNELS,
        encoder_hid_dim_type="text_proj",
        encoder_hid_dim=size.embedding_dim,
        class_embed_type="simple_projection",  # of CLIP's text embedding, as ours has it
        projection_class_embeddings_input_dim=size.embedding_dim,
    ).to(device)
    text = captions(size, batch_size, device)
    given = {"class_labels": text.text_embedding, "encoder_attention_mask": text.text_mask}
    x0 = torch.randn(batch_size, LATENT_CHANNELS, size.unet.image_size, size.unet.image_size, device=device)
    return diffusers_training(unet, "linear", x0, arguments, text.text_encodings, **given)


def diffusers_unet(size: Size, channels: int, **conditions: Any) -> Any:
    """U-Net whose self-attention reads context tokens too, as ours does."""
    from diffusers import UNet2DConditionModel

    num_attentive = len(size.unet.channel_mult) - 1
    return UNet2DConditionModel(
        sample_size=size.unet.image_size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=size.unet.num_res_blocks,
        block_out_channels=[size.unet.channels * multiple for multiple in size.unet.channel_mult],
        down_block_types=["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * num_attentive,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=["SimpleCrossAttnUpBlock2D"] * num_attentive + ["ResnetUpsampleBlock2D"],
        attention_head_dim=HEAD_WIDTH,
        cross_attention_dim=size.context_dim,
        resnet_time_scale_shift="scale_shift",
        **conditions,
    )


def diffusers_training(
    unet: Any,
    schedule: str,
    x0: Tensor,
    arguments: argparse.Namespace,
    context: Tensor | None = None,
    **conditions: Any,
) -> Training:
    """Train a U-Net to predict the noise."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    scheduler = DDPMScheduler(beta_schedule=schedule)
    ema = EMAModel(unet.parameters(), foreach=True)

    def loss() -> Tensor:
        noise = torch.randn_like(x0)
        t = torch.randint(scheduler.config.num_train_timesteps, (len(x0),), device=x0.device)
        x_t = scheduler.add_noise(x0, noise, t)
        return F.mse_loss(unet(x_t, t, context, **conditions).sample.float(), noise)

    return theirs(unet, unet, loss, lambda: ema.step(unet.parameters()), len(x0), arguments)


def theirs(
    trained: nn.Module,
    network: nn.Module,
    loss: Callable[[], Tensor],
    update_ema: Callable[[], None],
    batch_size: int,
    arguments: argparse.Namespace,
) -> Training:
    """Run the loop that all training scripts share.

    Args:
        trained: module with the parameters.
        network: module to compile with `--compile`.
        update_ema: updates the EMA weights.
    """
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def run(batches: Iterator[Batch]) -> None:
        if arguments.compile:
            network.compile()
        for _ in batches:
            with autocast(arguments.precision, torch.device(arguments.device)):
                value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained.parameters(), CLIP_NORM)
            value.item()  # every script logs it
            optimizer.step()
            optimizer.zero_grad()
            update_ema()

    return Training(run, same_rows(batch_size), batch_size, trained.train(), loss)


# Loading


def write_rows(size: Size, arguments: argparse.Namespace) -> None:
    """Write images and image embeddings like the pipeline: one table each, with 1,000 rows per row group."""
    from PIL import Image

    encoded = []
    shorter = arguments.stored_size
    for data in measure.photographs(min(arguments.pictures, 100)):
        shrunk = (round(shorter * measure.PHOTO_WIDTH / measure.PHOTO_HEIGHT), shorter)
        encoded.append(_jpeg(np.asarray(Image.open(io.BytesIO(data)).resize(shrunk))))
    keys = [f"{number:032x}" for number in range(arguments.pictures)]
    # Bytes after the end of a JPEG are ignored; these make every picture another one.
    jpegs = [encoded[number % len(encoded)] + number.to_bytes(8, "big") for number in range(arguments.pictures)]
    embeddings = pa.array(list(image_embeddings(size, arguments.pictures).numpy()), pa.list_(pa.float32()))
    for name, column in (("jpg", pa.array(jpegs, pa.binary())), ("image_embedding", embeddings)):
        table = pa.table({"key": keys, name: column})
        pq.write_table(table, f"{arguments.folder}/{name}.parquet", row_group_size=1000)


def open_rows(size: Size, arguments: argparse.Namespace) -> tuple[RowReader, int]:
    """Open a reader of the rows that `write_rows` wrote; return it with the batch size."""
    columns = {"images": "jpg", "embeddings": "image_embedding"}
    sources = [Source((f"{arguments.folder}/{name}.parquet",), (name,), table) for table, name in columns.items()]
    keys = [f"{number:032x}" for number in range(arguments.pictures)]
    return RowReader.of_keys(sources, keys), arguments.batch_size or size.decoder_batch_size


def loading(size: Size, arguments: argparse.Namespace) -> Training:
    """Load and prepare rows without training; every image is decoded, as in a first epoch."""
    reader, batch_size = open_rows(size, arguments)
    objective, preparing = new_decoder(size), Stopwatch()

    def run(batches: Iterator[Batch]) -> None:
        for batch in batches:
            decoded.cache_clear()
            with preparing:
                objective.prepare(batch)

    rows = reader.batches(seed=0, samples_seen=0, batch_size=batch_size)
    return Training(run, rows, batch_size, preparing=preparing)


def training_on_rows(size: Size, arguments: argparse.Namespace) -> Training:
    """Train the decoder on rows that it loads."""
    reader, batch_size = open_rows(size, arguments)
    objective, preparing = new_decoder(size), Stopwatch()
    prepare = objective.prepare

    def timed(batch: Batch) -> dict[str, Tensor]:
        with preparing:
            return prepare(batch)

    objective.prepare = timed  # type: ignore[method-assign]
    return Training(
        lambda batches: train(objective, InMemory(batches), batch_size, arguments),
        reader.batches(seed=0, samples_seen=0, batch_size=batch_size),
        batch_size,
        preparing=preparing,
    )


PARTS: dict[str, dict[str, Callable[[Size, argparse.Namespace], Training]]] = {
    "prior": {"unclip": our_prior, "DALLE2-pytorch": dalle2_prior, "diffusers": diffusers_prior},
    "decoder": {"unclip": our_decoder, "DALLE2-pytorch": dalle2_decoder, "diffusers": diffusers_decoder},
    "latents": {"unclip": our_latents, "diffusers": diffusers_latents},
    "loading": {"loading alone": loading, "training": training_on_rows},
}
"""Contenders by part; the first is ours, with which the others are compared."""


# Turns


def serve(part: str, name: str, arguments: argparse.Namespace, connection: Connection) -> None:
    """Train one contender, some steps per request; runs in its own process."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    training = PARTS[part][name](SIZES[arguments.size], arguments)
    connection.send(describe(training, arguments))
    with contextlib.suppress(EOFError):  # no more requests
        training.run(turns(training, arguments, connection))


def turns(training: Training, arguments: argparse.Namespace, connection: Connection) -> Generator[Batch, None, None]:
    """Yield batches for the requested steps; reply when the next batch is requested, since all steps are done then."""
    waiting, preparing = Stopwatch(), training.preparing or Stopwatch()
    while True:
        num_steps = connection.recv()
        started = time.monotonic()
        waiting.seconds = preparing.seconds = 0.0
        with torch.profiler.profile() if arguments.profile else contextlib.nullcontext() as profile:
            for _ in range(num_steps):
                with waiting:
                    batch = next(training.batches)
                yield batch
            if arguments.device != "cpu":
                torch.cuda.synchronize()
            seconds = time.monotonic() - started
        samples = num_steps * training.batch_size
        shares = operators(profile) if profile else {}
        connection.send(Turn(samples / seconds, waiting.seconds / seconds, preparing.seconds / seconds, shares))


def operators(profile: torch.profiler.profile) -> dict[str, float]:
    """Return shares of the time by operator, largest first; device time if there is any, else CPU time."""
    events = profile.key_averages()
    times = {event.key: event.self_device_time_total for event in events}
    if not any(times.values()):
        times = {event.key: event.self_cpu_time_total for event in events}
    total = sum(times.values())
    return {key: spent / total for key, spent in sorted(times.items(), key=lambda item: -item[1])}


def describe(training: Training, arguments: argparse.Namespace) -> Facts:
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if training.network is None or training.loss is None:
        return Facts(0, 0.0, training.batch_size, name)
    parameters = sum(parameter.numel() for parameter in training.network.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad(), autocast(arguments.precision, device):
        training.loss()
    return Facts(parameters, 3 * counter.get_total_flops() / training.batch_size, training.batch_size, name)


class Contender:
    """The process that trains one contender."""

    def __init__(self, part: str, name: str, arguments: argparse.Namespace) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, other = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(part, name, arguments, other), daemon=True)
        self._process.start()
        other.close()
        self.facts: Facts = self._connection.recv()
        self.turn(WARM_UP_STEPS)

    def turn(self, num_steps: int) -> Turn:
        self._connection.send(num_steps)
        return self._connection.recv()  # type: ignore[no-any-return]

    def peak_memory(self) -> float:
        """Return the peak resident memory in MB."""
        assert self._process.pid is not None
        return measure.peak_rss(self._process.pid)

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=60)
        self._process.kill()


def compare(part: str, arguments: argparse.Namespace) -> None:
    """Measure and print the contenders of a part."""
    names = [name for name in PARTS[part] if name not in PEERS or is_installed(name)]
    with contextlib.ExitStack() as stack:
        contenders = {name: stack.enter_context(contextlib.closing(Contender(part, name, arguments))) for name in names}
        figures = measure.interleave(
            {name: lambda name=name: contenders[name].turn(steps(part, name, arguments)) for name in names},  # type: ignore[misc]
            arguments.rounds,
        )
        memory = {name: contender.peak_memory() for name, contender in contenders.items()}
    facts = {name: contender.facts for name, contender in contenders.items()}
    print(f"\n{part}, batch {facts[names[0]].batch_size}, goal {GOALS[part]}")
    print(f"{'':15} {'samples/s':>24} {'RSS, MB':>8}  {names[0]} is faster by")
    speeds = {name: [turn.samples_per_second for turn in rounds] for name, rounds in figures.items()}
    for name in names:
        ratio = measure.median_ratio(speeds[names[0]], speeds[name])
        line = f"{name:15} {measure.describe(speeds[name]):>24} {memory[name]:8,.0f}  {ratio:.2f}"
        print(line + cost(facts[name], speeds[name]))
        for operator, share in itertools.islice(figures[name][-1].operators.items(), PROFILED):
            print(f"{share:20.1%}  {operator}")
    for name in PARTS[part]:
        if name not in names:
            print(f"{name:15} missing; to measure it too: pip install {PEERS[name][1]}")
    if part == "loading":
        waiting, preparing = (
            statistics.median(getattr(turn, share) for turn in figures["training"])
            for share in ("waiting", "preparing")
        )
        print(f"training waits for rows {waiting:.1%} of the time and decodes images {preparing:.1%}")


def is_installed(peer: str) -> bool:
    return importlib.util.find_spec(PEERS[peer][0]) is not None


def steps(part: str, name: str, arguments: argparse.Namespace) -> int:
    """Return the steps of one turn; loading alone needs more of them to be measurable."""
    return int(arguments.steps) * (10 if (part, name) == ("loading", "loading alone") else 1)


def cost(facts: Facts, speeds: list[float]) -> str:
    """Format parameters and FLOPs per sample; on a GPU also FLOP/s."""
    if not facts.parameters:
        return ""
    text = f"  {facts.parameters:,} parameters, {facts.flops / 1e9:.2f} GFLOP per sample"
    if facts.device == "cpu":
        return text
    used = facts.flops * statistics.median(speeds)
    peak = peak_of(facts.device)
    share = f"{used / peak:.1%} of the peak in bf16" if peak else f"the peak of {facts.device} is unknown"
    return f"{text}, {used / 1e12:.0f} TFLOP/s: {share}"


def _jpeg(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="what to compare")
    parser.add_argument("--size", default="small", choices=list(SIZES), help="20 M parameters, or 208 M and 110 M")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all contenders")
    parser.add_argument("--steps", type=int, default=10, help="steps in one round; ema-pytorch updates every tenth")
    parser.add_argument("--batch-size", type=int, default=0, help="samples per step; 0 uses that of --size")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to train")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="precision of all")
    parser.add_argument("--compile", action="store_true", help="compile all networks")
    parser.add_argument("--profile", action="store_true", help="print the time by operator; slows the steps down")
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="CPU threads of each contender")
    parser.add_argument("--pictures", type=int, default=4000, help="rows to load")
    parser.add_argument(
        "--stored-size", type=int, default=256, help="length of the shorter side of stored images, in pixels"
    )
    arguments = parser.parse_args()

    os.environ |= MALLOC
    print(measure.machine("torch", "pyarrow", *(PEERS[peer][1] for peer in PEERS if is_installed(peer))))
    print(vars(arguments), flush=True)
    with tempfile.TemporaryDirectory(prefix="unclip-benchmark-") as arguments.folder:
        if "loading" in arguments.parts:
            write_rows(SIZES[arguments.size], arguments)
        for part in arguments.parts:
            compare(part, arguments)


if __name__ == "__main__":
    main()
