"""The prior as a part, of either kind: from captions to CLIP image embeddings."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import load, to_dict
from unclip.data import Batch
from unclip.models import clip as clip_models
from unclip.models.autoregressive_prior import AutoregressivePrior, AutoregressivePriorConfig
from unclip.models.embeddings import EmbeddingQuantizer, EmbeddingStatistics
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.text import caption_features
from unclip.systems.part import Part, Shapes, TrainingInputs
from unclip.training import parallel
from unclip.training.batches import stack_rows
from unclip.training.diffusion_loss import DiffusionLoss, bernoulli, measure_scores
from unclip.training.memory import Network, example_features, example_flags, example_indices
from unclip.training.objective import Tensors
from unclip.training.settings import TrainerConfig

NUM_QUANTIZED = 65_536
"""Training rows that the buckets of the autoregressive prior are fitted to."""
COMPONENTS = 319 / 1024
"""Ratio of principal components to dimensions that a memory plan assumes: the paper's (section 2.2)."""


@dataclasses.dataclass(frozen=True)
class PriorStageConfig:
    kind: Literal["diffusion", "autoregressive"] = "diffusion"
    """Choice of one of the paper's two priors."""
    model: PriorConfig = PriorConfig()
    """Network and diffusion process of the diffusion prior."""
    autoregressive: AutoregressivePriorConfig = AutoregressivePriorConfig()
    """Network and buckets of the autoregressive prior."""
    trainer: TrainerConfig = TrainerConfig()
    """Training settings."""


class PriorObjective:
    """Mean squared error of the clean image embedding. Source: Ramesh et al. 2022, eq. 2."""

    columns = ("tokens", "image_embedding")

    def __init__(self, config: PriorConfig, clip: clip_models.Clip, statistics: EmbeddingStatistics) -> None:
        statistics.check("prior")
        self.clip = clip
        self.model = DiffusionPrior(config, clip.embedding_dim, clip.text_width, clip.text_length)
        self.model.statistics.load_state_dict(statistics.state_dict())
        self.model.text.set_null(caption_features(clip, clip.tokenize([""])))
        self.sample_size = {"tokens": len(self.model.positions)}
        self.process = DiffusionLoss(self.model.diffusion)
        self.state = self.process.timesteps.state

    def prepare(self, batch: Batch) -> Tensors:
        return {
            "tokens": stack_rows(batch["tokens"]).long(),  # [B, L]
            "image_embedding": stack_rows(batch["image_embedding"]),  # [B, E]
        }

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        diffusion, config = self.model.diffusion, self.model.config
        text = caption_features(self.clip, tensors["tokens"])
        x0 = self.model.statistics.normalize(tensors["image_embedding"])  # [B, E]
        draw = self.process.draw(x0, generator, network.training)
        drop = bernoulli(x0, config.cond_drop_prob, generator)
        kept = self.model.text.kept_tokens(text.text_mask, drop, len(self.model.positions))  # [N]
        x0_estimate = None
        if config.self_conditioning:
            x_t = diffusion.q_sample(x0, draw.t, draw.noise)
            with torch.no_grad():
                estimate = self.model.estimate_x0(x_t, draw.t, network(x_t, draw.t, *text, drop, kept=kept))
            # Half of the samples get the estimate, the others zeros. Source: Chen et al. 2023 (Analog Bits), section 2.2
            x0_estimate = torch.where(bernoulli(x0, 0.5, generator)[:, None], estimate, 0.0)  # [B, E]

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            return network(x_t, t, *text, drop, x0_estimate, kept)  # type: ignore[no-any-return]

        return self.process.mean_loss(predict, x0, draw)

    def learn(self, step_taken: bool) -> None:
        self.process.learn(step_taken)

    def metrics(self, training: bool) -> dict[str, float]:
        return self.process.take(training)

    def preview(self, model: nn.Module) -> None:
        return None  # an embedding cannot be shown as an image

    def measure(self, model: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensors:
        drop = torch.zeros(len(tensors["tokens"]), dtype=torch.bool, device=generator.device)
        predict = model.predictor(*caption_features(self.clip, tensors["tokens"]), drop)  # type: ignore[operator]
        return measure_scores(
            self.model.diffusion, predict, self.model.statistics.normalize(tensors["image_embedding"]), generator
        )

    def facts(self) -> dict[str, Any]:
        return {"kind": "prior", "config": to_dict(self.model.config), **clip_facts(self.clip)}


class AutoregressivePriorObjective:
    """Cross-entropy of the image embedding's quantized components. Source: Ramesh et al. 2022, section 2.2."""

    columns = ("tokens", "image_embedding", "clip_score")

    def __init__(
        self,
        config: AutoregressivePriorConfig,
        clip: clip_models.Clip,
        statistics: EmbeddingStatistics,
        quantizer: EmbeddingQuantizer,
    ) -> None:
        statistics.check("prior")
        self.clip = clip
        self.model = AutoregressivePrior(
            config, clip.embedding_dim, clip.text_width, clip.text_length, quantizer.num_components
        )
        self.model.statistics.load_state_dict(statistics.state_dict())
        self.model.quantizer.load_state_dict(quantizer.state_dict())
        self.model.text.set_null(caption_features(clip, clip.tokenize([""])))
        self.sample_size = {"tokens": len(self.model.positions)}
        self.state: Tensors = {}
        self.losses: dict[bool, list[Tensor]] = {True: [], False: []}  # keyed by network.training

    def prepare(self, batch: Batch) -> Tensors:
        return {
            "tokens": stack_rows(batch["tokens"]).long(),  # [B, L]
            "image_embedding": stack_rows(batch["image_embedding"]),  # [B, E]
            "similarity": torch.tensor(batch["clip_score"], dtype=torch.float32),  # [B]
        }

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        quantizer = self.model.quantizer
        text = caption_features(self.clip, tensors["tokens"])
        buckets = quantizer.encode(tensors["image_embedding"])  # [B, K]
        similarity = quantizer.encode_similarity(tensors["similarity"])  # [B]
        drop = bernoulli(tensors["similarity"], self.model.config.cond_drop_prob, generator)
        kept = self.model.text.kept_tokens(text.text_mask, drop, len(self.model.positions))  # [N]
        logits = network(buckets, similarity, *text, drop, kept)  # [B, K, num_buckets]
        loss = F.cross_entropy(logits.float().flatten(0, 1), buckets.flatten())
        self.losses[network.training].append(loss.detach())
        return loss

    def metrics(self, training: bool) -> dict[str, float]:
        """Loss relative to that of uniform probabilities over the buckets."""
        losses, self.losses[training] = self.losses[training], []
        if not losses:
            return {}
        sums = torch.stack([torch.stack(losses).sum(), torch.tensor(len(losses), device=losses[0].device)])
        loss, number = (parallel.all_reduce_sum(sums) if training else sums).tolist()
        return {"relative_loss": loss / number / math.log(self.model.config.num_buckets)}

    def preview(self, model: nn.Module) -> None:
        return None

    def facts(self) -> dict[str, Any]:
        facts = {"kind": "autoregressive_prior", "config": to_dict(self.model.config), **clip_facts(self.clip)}
        return {**facts, "num_components": self.model.quantizer.num_components}


def clip_facts(clip: clip_models.Clip) -> dict[str, int]:
    return {"embedding_dim": clip.embedding_dim, "text_width": clip.text_width, "text_length": clip.text_length}


def fit_quantizer(config: AutoregressivePriorConfig, inputs: TrainingInputs) -> EmbeddingQuantizer:
    """Fit buckets to the image embeddings of the first training rows; every worker gets the same result."""
    rows = inputs.sample_rows("embeddings", ("image_embedding", "clip_score"), NUM_QUANTIZED)
    return EmbeddingQuantizer.fit(
        torch.from_numpy(np.stack(rows["image_embedding"])),
        torch.tensor(rows["clip_score"]),
        inputs.statistics(),
        inputs.principal_components(),
        explained=config.explained_variance,
        num_buckets=config.num_buckets,
    )


def _build(facts: Mapping[str, Any]) -> DiffusionPrior | AutoregressivePrior:
    shape = facts["embedding_dim"], facts["text_width"], facts["text_length"]
    if facts["kind"] == "prior":
        return DiffusionPrior(load(PriorConfig, facts["config"]), *shape)
    return AutoregressivePrior(load(AutoregressivePriorConfig, facts["config"]), *shape, facts["num_components"])


def _objective(config: PriorStageConfig, inputs: TrainingInputs) -> PriorObjective | AutoregressivePriorObjective:
    clip, statistics = inputs.clip(), inputs.statistics()
    if config.kind == "diffusion":
        return PriorObjective(config.model, clip, statistics)
    quantizer = fit_quantizer(config.autoregressive, inputs)
    return AutoregressivePriorObjective(config.autoregressive, clip, statistics, quantizer)


def _reads(config: PriorStageConfig) -> Mapping[str, tuple[str, ...]]:
    objective = PriorObjective if config.kind == "diffusion" else AutoregressivePriorObjective
    return {"embeddings": objective.columns}


def _network(config: PriorStageConfig, shapes: Shapes) -> Network:
    dim, text = shapes.embedding_dim, shapes.text
    if config.kind == "diffusion":

        def inputs(batch: int) -> tuple[Any, ...]:
            features = example_features(batch, text, dim)
            return torch.zeros(batch, dim), example_indices(batch), *features, example_flags(batch)

        return Network(lambda: DiffusionPrior(config.model, dim, text.width, text.length), inputs)
    components = round(dim * COMPONENTS)

    def autoregressive_inputs(batch: int) -> tuple[Any, ...]:
        features = example_features(batch, text, dim)
        return example_indices(batch, components), example_indices(batch), *features, example_flags(batch)

    model = config.autoregressive
    return Network(lambda: AutoregressivePrior(model, dim, text.width, text.length, components), autoregressive_inputs)


PRIOR = Part(
    name="prior",
    help="Train the prior: from captions to CLIP image embeddings.",
    config=PriorStageConfig,
    build=_build,
    objective=_objective,
    reads=_reads,
    network=_network,
    kinds=("prior", "autoregressive_prior"),
)
