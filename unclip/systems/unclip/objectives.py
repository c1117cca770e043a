"""What is trained, one small class each: a model, how rows become tensors, the loss, and something to look at.

The trainer knows none of them; a new model is one more class here. What an objective learns besides its model, it keeps in
`state`, which the trainer saves with its checkpoints.
"""

import concurrent.futures
import contextlib
import functools
import math
import os
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unclip.config import to_dict
from unclip.data import Batch, decode_image
from unclip.diffusion.process import GaussianDiffusion, Predict, augment_condition
from unclip.models import clip as clip_models
from unclip.models.autoregressive_prior import AutoregressivePrior, AutoregressivePriorConfig
from unclip.models.decoder import Decoder, DecoderConfig, known_region, random_masks
from unclip.models.degradations import degrade, shrink
from unclip.models.embeddings import EmbeddingQuantizer, EmbeddingStatistics
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.text import Text, TextShape, caption_features, read_captions
from unclip.models.upsampler import Upsampler, UpsamplerConfig
from unclip.training import parallel
from unclip.training.objective import Tensors
from unclip.training.timesteps import TimestepLosses, UniformTimesteps, timestep_sampler


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
        self.process = _Process(self.model.diffusion)
        self.state = self.process.timesteps.state

    def prepare(self, batch: Batch) -> Tensors:
        return {
            "tokens": _stack(batch["tokens"]).long(),  # [B, L]
            "image_embedding": _stack(batch["image_embedding"]),  # [B, E]
        }

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        diffusion, config = self.model.diffusion, self.model.config
        text = caption_features(self.clip, tensors["tokens"])
        x0 = self.model.statistics.normalize(tensors["image_embedding"])  # [B, E]
        draw = self.process.draw(x0, generator, network.training)
        drop = _bernoulli(x0, config.cond_drop_prob, generator)
        kept = self.model.text.kept_tokens(text.text_mask, drop, len(self.model.positions))  # [N]
        x0_estimate = None
        if config.self_conditioning:
            x_t = diffusion.q_sample(x0, draw.t, draw.noise)
            with torch.no_grad():
                estimate = self.model.estimate_x0(x_t, draw.t, network(x_t, draw.t, *text, drop, kept=kept))
            # Half of the time there is an estimate to start from. Source: Chen et al. 2023 (Analog Bits), section 2.2
            x0_estimate = torch.where(_bernoulli(x0, 0.5, generator)[:, None], estimate, 0.0)  # [B, E]

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            return network(x_t, t, *text, drop, x0_estimate, kept)  # type: ignore[no-any-return]

        return self.process.mean_loss(predict, x0, draw)

    def metrics(self, training: bool) -> dict[str, float]:
        return self.process.take(training)

    def preview(self, model: nn.Module) -> None:
        return None  # an embedding is nothing to look at

    def facts(self) -> dict[str, Any]:
        return {"kind": "prior", "config": to_dict(self.model.config), **_clip_facts(self.clip)}


class AutoregressivePriorObjective:
    """Cross-entropy of the image embedding's buckets. Source: Ramesh et al. 2022, section 2.2."""

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
        self.losses: dict[bool, list[Tensor]] = {True: [], False: []}  # in training and out of it

    def prepare(self, batch: Batch) -> Tensors:
        return {
            "tokens": _stack(batch["tokens"]).long(),  # [B, L]
            "image_embedding": _stack(batch["image_embedding"]),  # [B, E]
            "similarity": torch.tensor(batch["clip_score"], dtype=torch.float32),  # [B]
        }

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        quantizer = self.model.quantizer
        text = caption_features(self.clip, tensors["tokens"])
        buckets = quantizer.encode(tensors["image_embedding"])  # [B, K]
        similarity = quantizer.encode_similarity(tensors["similarity"])  # [B]
        drop = _bernoulli(tensors["similarity"], self.model.config.cond_drop_prob, generator)
        kept = self.model.text.kept_tokens(text.text_mask, drop, len(self.model.positions))  # [N]
        logits = network(buckets, similarity, *text, drop, kept)  # [B, K, num_buckets]
        loss = F.cross_entropy(logits.float().flatten(0, 1), buckets.flatten())
        self.losses[network.training].append(loss.detach())
        return loss

    def metrics(self, training: bool) -> dict[str, float]:
        """The loss beside that of giving every bucket the same probability."""
        losses, self.losses[training] = self.losses[training], []
        if not losses:
            return {}
        sums = torch.stack([torch.stack(losses).sum(), torch.tensor(len(losses), device=losses[0].device)])
        loss, number = (parallel.total(sums) if training else sums).tolist()
        return {"relative_loss": loss / number / math.log(self.model.config.num_buckets)}

    def preview(self, model: nn.Module) -> None:
        return None

    def facts(self) -> dict[str, Any]:
        facts = {"kind": "autoregressive_prior", "config": to_dict(self.model.config), **_clip_facts(self.clip)}
        return {**facts, "num_components": self.model.quantizer.num_components}


class DecoderObjective:
    """The diffusion loss of small pictures given their CLIP embedding and, where configured, their caption."""

    def __init__(
        self,
        config: DecoderConfig,
        statistics: EmbeddingStatistics,
        preview: Batch,
        clip: clip_models.Clip | None = None,
    ) -> None:
        """Args: clip: its tokenizer, and where `config.text` is "clip" its text encoder; None where no text is read."""
        embedding_dim = len(statistics.mean)
        statistics.check("decoder")
        clip = None if config.text == "none" else clip
        self.config, self.clip = config, clip
        shape = None if clip is None else TextShape(clip.text_length, clip.text_width, clip.vocab_size)
        self.model: Decoder = Decoder(config, embedding_dim, shape).to(memory_format=torch.channels_last)
        self.model.statistics.load_state_dict(statistics.state_dict())
        if clip is not None and self.model.text is not None:
            self.model.text.set_null(read_captions(config.text, clip, clip.tokenize([""])))  # type: ignore[arg-type]
        self.process = _Process(self.model.diffusion)
        self.sample_size = {"pixels": config.unet.image_size**2}
        self.state = self.process.timesteps.state
        self._preview = self.prepare(preview)

    @staticmethod
    def columns(config: DecoderConfig) -> tuple[str, ...]:
        """Columns of the embeddings table that a decoder is trained on, besides the pictures."""
        return ("image_embedding",) if config.text == "none" else ("image_embedding", "tokens")

    def prepare(self, batch: Batch) -> Tensors:
        tensors = {
            "images": load_images(batch["jpg"], self.config.unet.image_size),  # [B, 3, S, S]
            "image_embedding": _stack(batch["image_embedding"]),  # [B, E]
        }
        if self.config.text != "none":
            tensors["tokens"] = _stack(batch["tokens"]).long()  # [B, L]
        return tensors

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        x0, config = tensors["images"], self.config
        draw = self.process.draw(x0, generator, network.training)
        image_drop = _bernoulli(x0, config.image_drop_prob, generator)
        text = self._text(tensors)
        text_drop = None if text is None else _bernoulli(x0, config.text_drop_prob, generator)
        known = known_region(x0, random_masks(len(x0), x0.shape[-1], generator)) if config.inpainting else None

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            return network(x_t, t, tensors["image_embedding"], image_drop, text, text_drop, known)  # type: ignore[no-any-return]

        return self.process.mean_loss(predict, x0, draw)

    def metrics(self, training: bool) -> dict[str, float]:
        return self.process.take(training)

    def preview(self, model: nn.Module) -> Tensor:
        """The originals, then samples from their embeddings."""
        generator = torch.Generator(_device(model)).manual_seed(0)
        tensors = {name: value.to(_device(model)) for name, value in self._preview.items()}
        samples = model.sample(  # type: ignore[operator]
            tensors["image_embedding"],
            text=self._text(tensors),
            num_steps=25,
            guidance_scale=2.0,
            generator=generator,
        )
        return torch.cat([self._preview["images"], samples.cpu()])

    def facts(self) -> dict[str, Any]:
        return {
            "kind": "decoder",
            "config": to_dict(self.config),
            "embedding_dim": len(self.model.statistics.mean),
            "text_shape": None if self.model.text_shape is None else to_dict(self.model.text_shape),
        }

    def _text(self, tensors: Tensors) -> Text | None:
        return None if self.clip is None else read_captions(self.config.text, self.clip, tensors["tokens"])


class UpsamplerObjective:
    """The diffusion loss of crops of pictures given the same crops at low resolution."""

    columns = ("jpg",)

    def __init__(self, config: UpsamplerConfig, preview: Batch) -> None:
        self.config = config
        self.model: Upsampler = Upsampler(config).to(memory_format=torch.channels_last)
        self.process = _Process(self.model.diffusion)
        self.sample_size = {"pixels": config.unet.image_size**2}
        self.state = self.process.timesteps.state
        self._preview = self.prepare(preview)["images"]

    def prepare(self, batch: Batch) -> Tensors:
        return {"images": load_images(batch["jpg"], self.config.output_size)}  # [B, 3, S, S]

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        x0, low_res = self._crops(tensors["images"], generator)
        level = None
        if self.config.max_noise_level > 0:
            levels = (0, self.config.max_noise_level)
            low_res, level = augment_condition(self.model.diffusion, low_res, levels, generator)
        draw = self.process.draw(x0, generator, network.training)
        return self.process.mean_loss(lambda x_t, t: network(x_t, t, low_res, level), x0, draw)

    def metrics(self, training: bool) -> dict[str, float]:
        return self.process.take(training)

    def preview(self, model: nn.Module) -> Tensor:
        """The originals, then their small versions upsampled."""
        generator = torch.Generator(_device(model)).manual_seed(0)
        low_res = shrink(self._preview, self.config.low_res_size).to(_device(model))
        samples = model.sample(low_res, num_steps=15, generator=generator)  # type: ignore[operator]
        return torch.cat([self._preview, samples.cpu()])

    def facts(self) -> dict[str, Any]:
        return {"kind": "upsampler", "config": to_dict(self.config)}

    def _crops(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random window of each picture and of its degraded small version: [B, 3, S, S], [B, 3, S / scale, S / scale].

        Small versions are made of whole pictures, so that a crop's edges look as they do at full size.
        """
        scale, crop = self.config.scale, self.config.unet.image_size // self.config.scale
        low_res = degrade(images, self.config.low_res_size, self.config.degradation, generator)
        offsets = torch.randint(
            self.config.low_res_size - crop + 1, (2, len(images)), generator=generator, device=images.device
        ).tolist()
        corners = list(zip(*offsets, strict=True))
        high = [
            image[:, scale * y : scale * (y + crop), scale * x : scale * (x + crop)]
            for image, (y, x) in zip(images, corners, strict=True)
        ]
        low = [image[:, y : y + crop, x : x + crop] for image, (y, x) in zip(low_res, corners, strict=True)]
        return torch.stack(high), torch.stack(low)


class ClipObjective:
    """CLIP's contrastive loss, open_clip's own. Source: Radford et al. 2021, figure 3."""

    columns = ("caption", "jpg")

    def __init__(self, name: str, rank: int = 0, world_size: int = 1) -> None:
        import open_clip

        self.name = name
        self.model = clip_models.create(name, None)
        self.tokenizer = clip_models.tokenizer(name)
        self.side = clip_models.input_side(self.model)
        self.clip_loss = open_clip.ClipLoss(rank=rank, world_size=world_size, local_loss=True, gather_with_grad=True)
        self.sample_size = {"pixels": self.side**2}
        self.state: Tensors = {}

    def prepare(self, batch: Batch) -> Tensors:
        images = load_images(batch["jpg"], self.side)
        return {"images": clip_models.prepare(self.model, images), "tokens": self.tokenizer(batch["caption"])}

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        # open_clip's attention calls the fused kernel, which is slow on CPUs in bf16; see layers.attention
        on_cpu = tensors["images"].device.type == "cpu"
        with sdpa_kernel(SDPBackend.MATH) if on_cpu else contextlib.nullcontext():
            image_features, text_features, logit_scale = network(tensors["images"], tensors["tokens"])[:3]
        # the temperature of the paper: never above 100
        logit_scale = logit_scale.clamp(max=100)
        return self.clip_loss(image_features.float(), text_features.float(), logit_scale)  # type: ignore[no-any-return]

    def metrics(self, training: bool) -> dict[str, float]:
        return {}

    def preview(self, model: nn.Module) -> None:
        return None

    def facts(self) -> dict[str, Any]:
        return {"kind": "clip", "model": self.name}


class _Draw(NamedTuple):
    """What a batch of a diffusion loss is computed with."""

    t: Tensor
    """Timestep of each sample, [B]."""
    weight: Tensor
    """Of each sample's loss, [B]."""
    noise: Tensor
    """Like x0."""
    training: bool


class _Process:
    """The diffusion process of an objective: which timesteps it trains, and what the losses there were."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self.diffusion = diffusion
        self.timesteps = timestep_sampler(diffusion.config)
        self.uniform = UniformTimesteps(diffusion.config.num_timesteps)
        self.losses = {training: TimestepLosses(diffusion.config.num_timesteps) for training in (True, False)}

    def draw(self, x0: Tensor, generator: torch.Generator, training: bool) -> _Draw:
        """Outside of training timesteps are uniform, and nothing is learned from their losses."""
        t, weight = (self.timesteps if training else self.uniform).draw(len(x0), generator)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        return _Draw(t, weight, noise, training)

    def mean_loss(self, predict: Predict, x0: Tensor, draw: _Draw) -> Tensor:
        """The loss of a batch from those of its samples; timesteps learn from them as they are."""
        losses = self.diffusion.loss(predict, x0, draw.t, draw.noise)  # [B]
        if draw.training:
            self.timesteps.update(draw.t, losses)
        with torch.no_grad():
            zeros = x0.new_zeros(()).expand(
                len(x0), self.diffusion.config.outputs_per_channel * x0.shape[1], *x0.shape[2:]
            )
            loss_of_zeros = self.diffusion.loss(lambda *_: zeros, x0, draw.t, draw.noise)
        self.losses[draw.training].add(draw.t, losses.detach(), loss_of_zeros)
        return (draw.weight * losses).mean()

    def take(self, training: bool) -> dict[str, float]:
        return self.losses[training].take(of_all_workers=training)


def load_images(encoded: list[bytes], side: int) -> Tensor:
    """Stored JPEGs as float32 [B, 3, side, side] in [-1, 1], their central squares."""
    pixels = np.stack(list(_decoders().map(lambda data: decode_image(data, side), encoded)))  # [B, side, side, 3] uint8
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@functools.cache
def _decoders() -> concurrent.futures.ThreadPoolExecutor:
    """Pillow decodes without holding the interpreter."""
    return concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="decode")


def _clip_facts(clip: clip_models.Clip) -> dict[str, int]:
    return {"embedding_dim": clip.embedding_dim, "text_width": clip.text_width, "text_length": clip.text_length}


def _stack(rows: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack(rows))


def _bernoulli(x0: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    return torch.rand(x0.shape[:1], generator=generator, device=x0.device) < probability


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
