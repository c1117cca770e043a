"""CLIP itself, trained on the dataset's pairs if no pretrained one is given."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unclip.data import Batch
from unclip.models import clip as clip_models
from unclip.training.batches import load_images
from unclip.training.objective import Tensors


class ClipObjective:
    """CLIP's contrastive loss, as open_clip implements it, or SigLIP's for models with a bias of the logits.

    Source: Radford et al. 2021, figure 3; Zhai et al. 2023 (SigLIP), algorithm 1.
    """

    columns = ("caption", "jpg")

    def __init__(self, name: str, rank: int = 0, world_size: int = 1) -> None:
        from open_clip.loss import ClipLoss, SigLipLoss

        self.name = name
        self.model = clip_models.create(name, None)
        self.tokenizer = clip_models.tokenizer(name)
        self.image_size = clip_models.input_size(self.model)
        self.clip_loss = (
            ClipLoss(rank=rank, world_size=world_size, local_loss=True, gather_with_grad=True)
            if getattr(self.model, "logit_bias", None) is None
            else SigLipLoss(rank=rank, world_size=world_size)
        )
        self.sample_size = {"pixels": self.image_size**2}
        self.state: Tensors = {}

    def prepare(self, batch: Batch) -> Tensors:
        images = load_images(batch["jpg"], self.image_size)
        return {"images": clip_models.prepare(self.model, images), "tokens": self.tokenizer(batch["caption"])}

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        # open_clip's attention uses the fused kernel, which is slow on CPUs in bf16; see layers.attention
        on_cpu = tensors["images"].device.type == "cpu"
        with sdpa_kernel(SDPBackend.MATH) if on_cpu else contextlib.nullcontext():
            image_features, text_features, logit_scale, *bias = network(tensors["images"], tensors["tokens"])
        # as in the paper, the logits are scaled by at most 100
        logit_scale = logit_scale.clamp(max=100)
        return self.clip_loss(image_features.float(), text_features.float(), logit_scale, *bias)  # type: ignore[no-any-return]

    def metrics(self, training: bool) -> dict[str, float]:
        return {}

    def preview(self, model: nn.Module) -> None:
        return None

    def facts(self) -> dict[str, Any]:
        return {"kind": "clip", "model": self.name}
