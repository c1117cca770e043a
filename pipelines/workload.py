"""Facts of a configuration that hours and bytes follow from: samples, FLOPs and parameters, counted without weights."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pipelines.dag import Dag
from pipelines.dataset import PipelineConfig
from pipelines.estimate import ENCODINGS, EncodingWork, TrainingWork, Workload
from pipelines.pipeline import compose
from pipelines.quantities import number
from pipelines.shipped_rates import CAPTION_TOKENS, CODE_BYTES, FLOAT32_SPEED, HALF_BYTES, T5_SIZES
from tasks.semantic import NUM_SEARCHED_CLUSTERS
from tasks.stages.evaluate import prompt_groups
from tasks.stages.latents import LatentsConfig
from tasks.stages.text_encoder import TextEncoderConfig
from unclip.config import require
from unclip.interop import t5
from unclip.models import clip as clip_models
from unclip.models.autoencoder import Autoencoder, AutoencoderConfig
from unclip.models.t5 import T5Settings, T5TextEncoder
from unclip.systems.clip import ClipObjective
from unclip.systems.part import Shapes
from unclip.training.flops import flops_of, flops_per_sample
from unclip.training.memory import Compute, count
from unclip.training.settings import TrainerConfig


def workload(config: PipelineConfig) -> Workload:
    """Count the work of a pipeline.

    Raises:
        CheckpointError: the folder of the text encoder has no readable configuration.
        ConfigError: the configuration of CLIP is not on this machine; or the sizes of a T5 are unknown, or transformers, which
            builds it, is not installed.
        InputError: the file of prompts cannot be read.
    """
    dag = compose(config)
    clip = clip_models.shape_of(config.clip.model)
    clip_compute = _count_clip(config.clip.model)
    shapes = Shapes.of(config.clip.model)
    counted = {
        name: count(node.stage.part.network(node.config, shapes))
        for name, node in dag.items()
        if node.stage.part is not None
    }
    evaluate: Any = config.evaluate
    clip_training = None
    if config.clip.is_trained_from_scratch:
        # the second copy of the weights is in open_clip's own format
        clip_training = _training("clip", config.clip.trainer, clip_compute, ClipObjective.columns, num_models=2)
    curate = config.curate
    return Workload(
        image_size=config.download.image_size,
        chroma_subsampling=config.download.chroma_subsampling,
        embedding_dim=clip.embedding_dim,
        clip_flops=clip_compute.flops_per_sample / 3,
        clip_parameters=clip_compute.parameters,
        clip_speed=FLOAT32_SPEED["matrix product"] if config.embed.precision == "fp32" else 1,
        holdout=config.dedup.holdout,
        trainings=tuple(_part_training(name, dag, compute) for name, compute in counted.items()),
        num_captions=evaluate.num_captions
        + evaluate.num_unseen
        + evaluate.num_relations
        + evaluate.num_repeated * evaluate.num_repeats
        + evaluate.num_reconstructed
        + sum(map(len, prompt_groups(evaluate).values())),
        caption_flops=sum(_sampling_flops(name, compute, evaluate.sampling) for name, compute in counted.items()),
        sampling_batch=evaluate.sampling.batch_size,
        clip_training=clip_training,
        compared=0 if curate.semantic_distance is None else NUM_SEARCHED_CLUSTERS * curate.cluster_size,
        num_probes=len(curate.probes),
        encodings=tuple(_encodings(config.clip.model, dag)),
    )


def _encodings(clip: str, dag: Dag) -> Iterator[EncodingWork]:
    """Stages that encode all kept rows.

    Args:
        clip: model of CLIP.
    """
    if "latents" in dag:
        yield _latents(dag["autoencoder"].config.model, dag["latents"].config)
    if "text_states" in dag:
        yield _text_states(clip, dag["text_encoder"].config if "text_encoder" in dag else None)


def _latents(model: AutoencoderConfig, config: LatentsConfig) -> EncodingWork:
    with torch.device("meta"):
        network = Autoencoder(model)
        images = torch.zeros(1, 3, model.image_size, model.image_size)
    positions, each = model.latent_size**2, float(HALF_BYTES)
    encode, column, values, unit = network.encode, "latent", model.latent_channels * positions, "numbers"
    if model.has_codes:
        encode, column, values, unit, each = network.tokens, "codes", positions, "codes", CODE_BYTES
    products = "convolution" if model.transformer is None else "matrix product"
    return EncodingWork(
        name="latents",
        unit="images",
        flops=flops_of(encode, images),
        reads="jpg",
        stores=column,
        value_bytes=values * each,
        formula=f"{number(values)} {unit} x {number(each)} B",
        speed=FLOAT32_SPEED[products] if config.precision == "fp32" else 1,
        after=("autoencoder",),
    )


def _text_states(clip: str, encoder: TextEncoderConfig | None) -> EncodingWork:
    """Encoding of captions of full length, which is that of the longest in a batch; stored is the mean length.

    Args:
        encoder: settings of a T5; None encodes with CLIP.
    """
    shape = clip_models.shape_of(clip)
    length, width = shape.text_length, shape.text_width
    network: Any
    if encoder is None:
        network = clip_models.outline(clip)
        with torch.device("meta"):
            tokens = torch.zeros(1, length, dtype=torch.int64)
        flops = flops_of(network.encode_text, tokens)
    else:
        settings = _t5_settings(encoder)
        length, width = encoder.max_length, settings.d_model
        with torch.device("meta"):
            network = T5TextEncoder(settings, 0, length).encoder
            tokens = torch.zeros(1, length, dtype=torch.int64)
        flops = flops_of(network, input_ids=tokens)
    mean = min(CAPTION_TOKENS, length)
    return EncodingWork(
        name="text_states",
        unit=f"captions of {length} tokens",
        flops=flops,
        reads="caption",
        stores="states",
        value_bytes=HALF_BYTES * mean * width,
        formula=f"{mean} tokens on average x {number(width)} numbers x {HALF_BYTES} B",
        speed=FLOAT32_SPEED["matrix product"],
    )


def _t5_settings(config: TextEncoderConfig) -> T5Settings:
    """Settings of a T5 in a folder; those of the T5 v1.1 of the same width if it is on the hub.

    Raises:
        CheckpointError: the folder has no readable configuration.
        ConfigError: T5 v1.1 has no such width.
    """
    if config.folder is not None:
        return t5.read_settings(config.folder)
    expected = (
        f"{', '.join(map(str, T5_SIZES))}, those of T5 v1.1, for an estimate; or download the T5 and name its folder"
    )
    require(config.width in T5_SIZES, "text_encoder.width", config.width, expected)
    assert config.width is not None
    layers, heads, inner = T5_SIZES[config.width]
    return T5Settings(
        d_model=config.width, d_ff=inner, num_layers=layers, num_heads=heads, feed_forward_proj="gated-gelu"
    )


def _part_training(name: str, dag: Dag, compute: Compute) -> TrainingWork:
    part, config = dag[name].stage.part, dag[name].config
    assert part is not None
    columns = tuple(dict.fromkeys(column for table in part.reads(config).values() for column in table))
    after = tuple(parent for parent in dag[name].parents if dag[parent].stage.part is not None or parent in ENCODINGS)
    return _training(name, config.trainer, compute, columns, after)


def _training(
    name: str,
    trainer: TrainerConfig,
    compute: Compute,
    columns: tuple[str, ...],
    after: tuple[str, ...] = (),
    num_models: int = 1,
) -> TrainingWork:
    return TrainingWork(
        name=name,
        num_samples=trainer.num_samples,
        batch_size=trainer.batch_size,
        flops_per_sample=compute.flops_per_sample,
        parameters=compute.parameters,
        num_checkpoints=trainer.keep_checkpoints,
        columns=columns,
        after=after,
        num_models=num_models,
    )


def _sampling_flops(name: str, compute: Compute, sampling: Any) -> float:
    """FLOPs of a part to sample one caption: one forward pass a step, and another with each guidance scale.

    The settings of stage `x` are `sampling.x`, those of `x-a` are `sampling.xs["a"]`; missing ones count as one pass.
    """
    name, _, key = name.partition("-")
    members = getattr(sampling, f"{name}s", {}) if key else None
    settings = members.get(key) if isinstance(members, Mapping) else getattr(sampling, name, None)
    scales = (getattr(settings, "guidance_scale", 1.0), getattr(settings, "text_guidance_scale", None))
    passes = 1 + (scales[0] != 1) + (scales[1] is not None)
    calls = getattr(settings, "num_steps", 1) * getattr(settings, "num_candidates", 1) * passes
    return float(calls * compute.flops_per_sample / 3)


def _count_clip(model: str) -> Compute:
    """Parameters and training FLOPs of a CLIP, on one image and a caption of full length."""
    network = clip_models.outline(model)
    size = clip_models.input_size(network)
    with torch.device("meta"):
        images = torch.zeros(1, 3, size, size)
        tokens = torch.zeros(1, clip_models.shape_of(model).text_length, dtype=torch.int64)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Compute(parameters, flops_per_sample(network, images, tokens))
