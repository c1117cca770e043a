"""CLIP's image encoder for noised images as a part, for CLIP guidance."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import load, to_dict
from unclip.data import Batch
from unclip.models.noised_clip import NoisedClip, NoisedClipConfig
from unclip.systems.part import Part, Shapes, TrainingInputs
from unclip.training.batches import load_images, stack_rows
from unclip.training.memory import Network, example_images, example_indices
from unclip.training.objective import Tensors
from unclip.training.parallel import ALONE, Workers
from unclip.training.settings import TrainerConfig
from unclip.training.timesteps import TimestepAccuracies


@dataclasses.dataclass(frozen=True)
class NoisedClipStageConfig:
    model: NoisedClipConfig = NoisedClipConfig()
    """The network, and the diffusion process of the model to guide."""
    trainer: TrainerConfig = TrainerConfig()
    """Training settings."""


class NoisedClipObjective:
    """CLIP's contrastive loss between noised images and the frozen CLIP's embeddings of their captions.

    Source: Nichol et al. 2022 (GLIDE), section 4.4; Radford et al. 2021, figure 3.
    """

    columns: Mapping[str, tuple[str, ...]] = {"images": ("jpg",), "embeddings": ("text_embedding",)}

    def __init__(self, config: NoisedClipConfig, embedding_dim: int, workers: Workers = ALONE) -> None:
        from open_clip.loss import ClipLoss

        self.config = config
        self.model = NoisedClip(config, embedding_dim)
        self.clip_loss = ClipLoss(
            rank=workers.rank, world_size=workers.world_size, local_loss=True, gather_with_grad=True
        )
        self.own_loss = ClipLoss()  # of held-out rows, which rank 0 reads alone
        self.sample_size = {"pixels": config.image_size**2}
        self.state: Tensors = {}
        num_timesteps = config.diffusion.num_timesteps
        self._accuracies = {training: TimestepAccuracies(num_timesteps) for training in (True, False)}

    def prepare(self, batch: Batch) -> Tensors:
        return {
            "images": load_images(batch["jpg"], self.config.image_size),  # [B, 3, S, S]
            "text_embedding": stack_rows(batch["text_embedding"]),  # [B, E], unit norm
        }

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        x0, diffusion = tensors["images"], self.model.diffusion
        t = torch.randint(diffusion.num_timesteps, (len(x0),), generator=generator, device=x0.device)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        embedding = network(diffusion.q_sample(x0, t, noise), t)  # [B, E], with the temperature
        text_embedding = tensors["text_embedding"].to(embedding.dtype)
        self._add_accuracy(network.training, t, embedding.detach() @ text_embedding.T)
        clip_loss = self.clip_loss if network.training else self.own_loss
        return clip_loss(embedding, text_embedding, 1.0)  # type: ignore[no-any-return]

    def metrics(self, training: bool) -> dict[str, float]:
        """Loss and accuracy of choosing the caption of a noised image among those of its micro-batch."""
        return self._accuracies[training].take(all_ranks=training)

    def _add_accuracy(self, training: bool, t: Tensor, logits: Tensor) -> None:
        """Add logits [B, B] of images and captions."""
        own = torch.arange(len(logits), device=logits.device)
        losses = F.cross_entropy(logits, own, reduction="none")  # [B]
        blind = torch.full_like(losses, math.log(len(logits)))
        self._accuracies[training].add(t, losses, logits.argmax(dim=1) == own, blind)

    def preview(self, model: nn.Module) -> None:
        return None

    def facts(self) -> dict[str, Any]:
        return {
            "kind": "noised_clip",
            "config": to_dict(self.config),
            "embedding_dim": self.model.embedding_dim,
        }


def _build(facts: Mapping[str, Any]) -> NoisedClip:
    return NoisedClip(load(NoisedClipConfig, facts["config"]), facts["embedding_dim"])


def _objective(config: NoisedClipStageConfig, inputs: TrainingInputs) -> NoisedClipObjective:
    return NoisedClipObjective(config.model, len(inputs.statistics().mean), inputs.workers)


def _network(config: NoisedClipStageConfig, shapes: Shapes) -> Network:
    model, dim = config.model, shapes.embedding_dim
    return Network(
        lambda: NoisedClip(model, dim),
        lambda batch: (example_images(batch, model.image_size), example_indices(batch)),
    )


NOISED_CLIP = Part(
    name="noised_clip",
    help="Train CLIP's image encoder for noised images.",
    config=NoisedClipStageConfig,
    build=_build,
    objective=_objective,
    reads=lambda _: NoisedClipObjective.columns,
    network=_network,
    needs=(),
)
