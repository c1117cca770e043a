"""Facts of a configuration that hours and bytes follow from: samples, FLOPs and parameters, counted without weights."""

from collections.abc import Mapping
from typing import Any

import torch

from pipelines.dag import Dag
from pipelines.dataset import PipelineConfig
from pipelines.estimate import TrainingWork, Workload
from pipelines.pipeline import compose
from tasks.semantic import NUM_SEARCHED_CLUSTERS
from tasks.stages.evaluate import prompt_groups
from unclip.models import clip as clip_models
from unclip.models.text import TextShape
from unclip.systems.clip import ClipObjective
from unclip.systems.part import Shapes
from unclip.training.flops import flops_per_sample
from unclip.training.memory import Compute, count
from unclip.training.settings import TrainerConfig


def workload(config: PipelineConfig) -> Workload:
    """Count the work of a pipeline.

    Raises:
        ConfigError: the configuration of CLIP is not on this machine.
        InputError: the file of prompts cannot be read.
    """
    dag = compose(config)
    clip = clip_models.shape_of(config.clip.model)
    clip_compute = _count_clip(config.clip.model)
    shapes = Shapes(clip.embedding_dim, TextShape(clip.text_length, clip.text_width, clip.vocab_size))
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
    )


def _part_training(name: str, dag: Dag, compute: Compute) -> TrainingWork:
    part, config = dag[name].stage.part, dag[name].config
    assert part is not None
    columns = tuple(dict.fromkeys(column for table in part.reads(config).values() for column in table))
    after = tuple(parent for parent in dag[name].parents if dag[parent].stage.part is not None)
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
