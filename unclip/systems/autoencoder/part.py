"""The autoencoder as a part: reconstruction, perceptual and adversarial losses of images, and the training of its codebook."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip import files
from unclip.config import added, load, require, to_dict
from unclip.data import Batch
from unclip.errors import InputError
from unclip.models import clip as clip_models
from unclip.models.autoencoder import AdversarialAutoencoder, Autoencoder, AutoencoderConfig, Judged, Reconstruction
from unclip.models.discriminator import DiscriminatorConfig, adaptive_weight, hinge_loss
from unclip.models.perceptual import ClipDistance, LpipsDistance, PerceptualDistance
from unclip.models.quantisers import VectorQuantiser
from unclip.systems.part import Part, Shapes, TrainingInputs
from unclip.training import parallel
from unclip.training.batches import load_images
from unclip.training.codebooks import CodebookConfig, CodebookLearner, CodeUse
from unclip.training.diffusion_loss import device_of
from unclip.training.memory import Network, example_images
from unclip.training.objective import Tensors
from unclip.training.settings import TrainerConfig

GRADIENT_SCALE = 2.0**14
"""Factor of losses while their gradients with respect to images are computed, so that they do not vanish in fp16."""


@dataclasses.dataclass(frozen=True)
class PerceptualConfig:
    weight: float = 1.0
    """Weight of the perceptual distance; 0 for none."""
    network: Literal["clip", "lpips"] = "clip"
    """Network whose features are compared: the frozen CLIP of the dataset, or LPIPS."""
    weights: str | None = None
    """Weights of LPIPS: path of a file that safetensors.torch.save_model wrote of lpips.LPIPS(net="vgg"), on every worker."""
    digest: str | None = added(None)
    """sha256 of that file, filled in by the pipeline so that other weights cause a new training."""

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, "at least 0")
        fits = self.network == "clip" or self.weights is not None
        require(fits, "weights", self.weights, "the path of a safetensors file for network = 'lpips'")

    @property
    def file(self) -> Path | None:
        """File of the weights that are read; None if there is none."""
        if not self.weight or self.network != "lpips":
            return None
        return Path(str(self.weights)).expanduser().resolve()


@dataclasses.dataclass(frozen=True)
class LatentsConfig:
    """Terms that shape the latents."""

    kl_weight: float = 1e-6
    """Weight of the KL divergence of kl and gumbel, in nats per value of the image. Source: Rombach et al. 2022, appendix G
    (1e-6); Ramesh et al. 2021, appendix A.2 (6.6)."""
    kl_warmup_samples: int = 0
    """Samples over which that weight grows from 0; cosine. Source: Ramesh et al. 2021, appendix A.2."""
    last_temperature: float = 1 / 16
    """Temperature of the Gumbel-softmax at the end of its schedule, which starts at 1."""
    temperature_samples: int = 0
    """Samples over which the temperature falls; cosine. 0 for the last temperature from the start."""

    def __post_init__(self) -> None:
        for name in ("kl_weight", "kl_warmup_samples", "temperature_samples"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(0 < self.last_temperature <= 1, "last_temperature", self.last_temperature, "above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    weight: float = 0.0
    """Weight of the discriminator's verdict in the loss of the autoencoder; 0 for no discriminator."""
    adaptive: bool = True
    """Multiply the weight by the ratio of the gradients of the two losses in the decoder's last layer."""
    start_samples: int = 0
    """Samples of training before the discriminator starts."""
    learning_rate_factor: float = 1.0
    """Factor of the learning rate of the discriminator."""
    model: DiscriminatorConfig = DiscriminatorConfig()
    """The discriminator."""

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, "at least 0")
        require(self.start_samples >= 0, "start_samples", self.start_samples, "at least 0")
        factor = self.learning_rate_factor
        require(factor > 0, "learning_rate_factor", factor, "above 0")


@dataclasses.dataclass(frozen=True)
class AutoencoderStageConfig:
    model: AutoencoderConfig = AutoencoderConfig()
    """The network."""
    perceptual: PerceptualConfig = PerceptualConfig()
    """The perceptual loss."""
    latents: LatentsConfig = LatentsConfig()
    """Terms of the loss that shape the latents."""
    codebook: CodebookConfig = CodebookConfig()
    """Training of the codebook of vq."""
    discriminator: AdversarialConfig = AdversarialConfig()
    """The adversarial loss."""
    trainer: TrainerConfig = TrainerConfig()
    """Training settings."""


class AutoencoderObjective:
    """Mean absolute error, perceptual distance, the penalty of the bottleneck and, after its start, the discriminator's verdict.

    Autoencoder and discriminator learn in the same step. The discriminator reads the reconstructions once: its own loss flows to
    its weights, and the gradient of its verdict with respect to the reconstructions flows on to the autoencoder alone.

    Source: Esser et al. 2021, section 3.1; Rombach et al. 2022, appendix G.
    """

    def __init__(
        self,
        config: AutoencoderStageConfig,
        preview: Batch,
        distance: PerceptualDistance | None = None,
        device: torch.device = parallel.ALONE.device,
    ) -> None:
        """Args:
        distance: perceptual distance; None if its weight is 0.
        device: device of the training.
        """
        self.config, self.distance = config, distance
        model, adversarial = config.model, config.discriminator
        self.model: Autoencoder = (
            AdversarialAutoencoder(model, adversarial.model) if adversarial.weight else Autoencoder(model)
        ).to(memory_format=torch.channels_last)
        self.sample_size = {"pixels": model.image_size**2}
        self.samples_seen = torch.zeros((), dtype=torch.int64)  # on the CPU, as schedules read it in every micro-batch
        self.state: Tensors = {"samples_seen": self.samples_seen}
        self.learner: CodebookLearner | None = None
        bottleneck = self.model.bottleneck
        if isinstance(bottleneck, VectorQuantiser):
            bottleneck.commitment_weight = config.codebook.commitment_weight
            bottleneck.codebook.requires_grad_(config.codebook.updates == "loss")
            self.learner = CodebookLearner(config.codebook, model.codebook_size, model.latent_channels, device)
            self.state |= self.learner.state
        self.use = {training: CodeUse(model.codebook_size) for training in (True, False)}
        self._num_samples = 0  # of the step's micro-batches
        self._sums: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
        self._preview = self.prepare(preview)
        if distance is not None:
            distance.to(device)

    @property
    def learning_rate_factors(self) -> Mapping[str, float]:
        adversarial = self.config.discriminator
        return {"discriminator": adversarial.learning_rate_factor} if adversarial.weight else {}

    def prepare(self, batch: Batch) -> Tensors:
        return {"images": load_images(batch["jpg"], self.config.model.image_size)}  # [B, 3, S, S]

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        images, training = tensors["images"], network.training
        samples_seen, adversarial = int(self.samples_seen), self.config.discriminator
        noise = self.model.draw_noise(len(images), generator) if training else None
        if adversarial.weight:
            judges = training and samples_seen >= adversarial.start_samples
            judged: Judged = network(images, noise, self._temperature(samples_seen), judges)
        else:
            judged = Judged(network(images, noise, self._temperature(samples_seen)))
        found = judged.reconstruction
        penalty = self._penalty_weight(samples_seen) * found.penalty.mean()
        self._record(training, images, found)
        if judged.copies is None:
            loss = self._content_loss(found.images.float(), images, training)
        else:
            loss = self._adversarial_loss(judged, images)
        if training:
            self._num_samples += len(images)
            if self.learner is not None and found.codes is not None and found.errors is not None:
                self.learner.add(found.encodings, found.codes, found.errors, generator)
        return loss + penalty

    def learn(self, step_taken: bool) -> None:
        count = parallel.all_reduce_sum(torch.tensor(self._num_samples, device=device_of(self.model)))
        self._num_samples = 0
        if step_taken:
            self.samples_seen += count.cpu()
        bottleneck = self.model.bottleneck
        if self.learner is not None and isinstance(bottleneck, VectorQuantiser):
            self.learner.learn(step_taken, bottleneck.codebook)

    def metrics(self, training: bool) -> dict[str, float]:
        """Terms of the loss, the spread of the latents, and the use of the codes. `relative_loss` is the absolute error divided
        by that of the mean colour."""
        sums, self._sums[training] = self._sums[training], {}
        if not sums:
            return {}
        stacked = torch.stack(list(sums.values()))  # [M, 2]
        totals = (parallel.all_reduce_sum(stacked) if training else stacked).tolist()
        values = {name: total / count for name, (total, count) in zip(sums, totals, strict=True)}
        values["latent_std"] = max(0.0, values.pop("latent_square") - values.pop("latent_mean") ** 2) ** 0.5
        values["relative_loss"] = values["l1"] / max(values.pop("l1_of_mean"), 1e-12)
        return {**values, **self.use[training].take(all_ranks=training)}

    def preview(self, model: nn.Module) -> Tensor:
        """The original images, then their reconstructions."""
        images = self._preview["images"].to(device_of(model))
        reconstructed = model.decode(model.encode(images)).float()  # type: ignore[operator]
        return torch.cat([images, reconstructed.clamp(-1, 1)]).cpu()

    def facts(self) -> dict[str, Any]:
        return {"kind": "autoencoder", "config": to_dict(self.config.model)}

    def _content_loss(self, reconstructed: Tensor, images: Tensor, training: bool) -> Tensor:
        """Mean absolute error and perceptual distance of reconstructions, both [B, 3, S, S]."""
        loss = (reconstructed - images).abs().mean()
        self._add(training, "l1", loss)
        if self.distance is not None:
            distance = self.distance(reconstructed, images).mean()
            self._add(training, "perceptual", distance)
            loss = loss + self.config.perceptual.weight * distance
        return loss

    def _adversarial_loss(self, judged: Judged, images: Tensor) -> Tensor:
        """Content loss, the discriminator's loss, and its verdict on the reconstructions.

        The content loss and the verdict reach the autoencoder as one gradient of the reconstructions, so that their adaptive
        weight costs no second pass.
        """
        found, copies, logits = judged
        assert copies is not None and logits is not None
        real, fake = logits.chunk(2)  # 2 x [B, 1, h, h]
        reconstructed = found.images.float()
        leaf = reconstructed.detach().requires_grad_()
        content = self._content_loss(leaf, images, True)
        verdict = -fake.mean()
        [content_gradient] = torch.autograd.grad(content * GRADIENT_SCALE, leaf)
        [verdict_gradient] = torch.autograd.grad(verdict * GRADIENT_SCALE, copies, retain_graph=True)
        content_gradient, verdict_gradient = content_gradient / GRADIENT_SCALE, verdict_gradient / GRADIENT_SCALE
        adversarial = self.config.discriminator
        weight = reconstructed.new_tensor(adversarial.weight)
        if adversarial.adaptive:
            layer, patch = self.model.decoder.output, self.model.decoder.patch_size
            gradients = [F.pixel_unshuffle(each, patch) for each in (content_gradient, verdict_gradient)]
            weight = weight * adaptive_weight(found.last_hidden, layer.kernel_size[0], *gradients)
        hinge = hinge_loss(real, fake)
        with torch.no_grad():
            for name, value in {
                "discriminator_loss": hinge,
                "logits_of_images": real.mean(),
                "logits_of_reconstructions": fake.mean(),
                "adversarial_weight": weight,
            }.items():
                self._add(True, name, value)
        passed = (reconstructed * (content_gradient + weight * verdict_gradient)).sum()
        # the value of the terms, with the gradient of `passed`
        return (content + weight * verdict).detach() + (passed - passed.detach()) + hinge

    def _temperature(self, samples_seen: int) -> float:
        latents = self.config.latents
        return _anneal(1.0, latents.last_temperature, samples_seen, latents.temperature_samples)

    def _penalty_weight(self, samples_seen: int) -> float:
        """Weight of the bottleneck's penalty [B]."""
        latents, model = self.config.latents, self.config.model
        if model.bottleneck == "vq":
            return 1.0
        weight = _anneal(0.0, latents.kl_weight, samples_seen, latents.kl_warmup_samples)
        return weight / (3 * model.image_size**2)

    @torch.no_grad()
    def _record(self, training: bool, images: Tensor, found: Reconstruction) -> None:
        self._add(training, "penalty", found.penalty.mean())
        self._add(training, "latent_mean", found.encodings.mean())
        self._add(training, "latent_square", found.encodings.square().mean())
        colour = images.mean(dim=(0, 2, 3), keepdim=True)  # [1, 3, 1, 1]
        self._add(training, "l1_of_mean", (images - colour).abs().mean())
        if found.codes is not None:
            self.use[training].add(found.codes)

    def _add(self, training: bool, name: str, value: Tensor) -> None:
        """Add a value to the mean with this name."""
        sums = self._sums[training]
        value = torch.stack([value.detach().float(), torch.ones_like(value, dtype=torch.float32)])
        sums[name] = sums[name] + value if name in sums else value


def _anneal(first: float, last: float, samples_seen: int, samples: int) -> float:
    """Value between first and last after some samples of a cosine schedule over `samples`."""
    progress = min(1.0, samples_seen / samples) if samples else 1.0
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def _build(facts: Mapping[str, Any]) -> Autoencoder:
    model = Autoencoder(load(AutoencoderConfig, facts["config"]))
    model.register_load_state_dict_pre_hook(_drop_discriminator)  # type: ignore[no-untyped-call]
    return model


def _drop_discriminator(_: nn.Module, state: dict[str, Tensor], *__: Any) -> None:
    """Weights of a discriminator are for training only."""
    for name in [name for name in state if name.startswith("discriminator.")]:
        del state[name]


def _pin(config: AutoencoderStageConfig) -> AutoencoderStageConfig:
    """Make the path of LPIPS absolute, since workers run elsewhere, and pin the file."""
    perceptual, file = config.perceptual, config.perceptual.file
    if file is None:
        return config
    require(file.is_file(), "perceptual.weights", str(file), "an existing file of the weights of LPIPS")
    LpipsDistance.load(file)
    pinned = dataclasses.replace(perceptual, weights=str(file), digest=files.digest(str(file)))
    return dataclasses.replace(config, perceptual=pinned)


def _objective(config: AutoencoderStageConfig, inputs: TrainingInputs) -> AutoencoderObjective:
    perceptual, file = config.perceptual, config.perceptual.file
    distance: PerceptualDistance | None = None
    if file is not None:
        distance = LpipsDistance.load(file)
        if perceptual.digest and files.digest(str(file)) != perceptual.digest:
            raise InputError(
                f"perceptual.weights: {file} is not the file that this run was planned with. Copy that file to every worker, "
                "or run the same command again."
            )
    elif perceptual.weight:
        distance = ClipDistance(inputs.clip().model)
    return AutoencoderObjective(config, inputs.preview_rows(), distance, inputs.workers.device)


class _WithDiscriminator(nn.Module):
    """The network and what autograd keeps for the discriminator's loss, as one output, for the memory plan."""

    def __init__(self, config: AutoencoderStageConfig) -> None:
        super().__init__()
        self.judges = config.discriminator.weight > 0
        self.model = (
            AdversarialAutoencoder(config.model, config.discriminator.model)
            if self.judges
            else Autoencoder(config.model)
        )

    def forward(self, images: Tensor, noise: Tensor | None) -> Tensor:
        if not self.judges:
            found: Reconstruction = self.model(images, noise)
            return found.images
        judged: Judged = self.model(images, noise, judges=True)
        assert judged.logits is not None
        return torch.cat([judged.reconstruction.images.flatten(), judged.logits.flatten()])


class _WithPerception(nn.Module):
    """The perceptual distance of the images in the output of `_WithDiscriminator`, for the memory plan."""

    def __init__(self, distance: PerceptualDistance) -> None:
        super().__init__()
        self.distance = distance

    def forward(self, output: Tensor, images: Tensor, _: Tensor | None) -> Tensor:
        reconstructed = output.flatten()[: images.numel()].view(images.shape)
        return self.distance(reconstructed.float(), images)  # type: ignore[no-any-return]


def _network(config: AutoencoderStageConfig, shapes: Shapes) -> Network:
    model, perceptual = config.model, config.perceptual
    channels = {"kl": model.latent_channels, "gumbel": model.codebook_size, "vq": 0}[model.bottleneck]

    def inputs(batch: int) -> tuple[Any, ...]:
        noise = torch.zeros(batch, channels, model.latent_size, model.latent_size) if channels else None
        return example_images(batch, model.image_size), noise

    def frozen() -> nn.Module:
        if perceptual.network == "lpips":
            return _WithPerception(LpipsDistance.outline())
        assert shapes.clip is not None, "the perceptual loss reads a CLIP without a name"
        return _WithPerception(ClipDistance(clip_models.outline(shapes.clip)))

    return Network(lambda: _WithDiscriminator(config), inputs, frozen if perceptual.weight else None)


AUTOENCODER = Part(
    name="autoencoder",
    help="Train the autoencoder: from images to latents or tokens, and back.",
    config=AutoencoderStageConfig,
    build=_build,
    objective=_objective,
    reads=lambda _: {"images": ("jpg",)},
    network=_network,
    pin=_pin,
    shows_rows=True,
)
