"""Latent diffusion: captions to latents of an autoencoder, and these to images.

The training and the sampling of latents are shared with `unclip.systems.stable_unclip`.

Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models".

Letters: B batch, D latent channels, s latent size, L text tokens, E CLIP embedding width, S resolution of the images.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unclip.config import load, operational, require, to_dict
from unclip.data import Batch
from unclip.diffusion.samplers import OnStep, undisturbed
from unclip.diffusion.sampling import Known, require_preview_sampler
from unclip.errors import CheckpointError, ConfigError
from unclip.models.autoencoder import Autoencoder
from unclip.models.clip import Clip
from unclip.models.embeddings import EmbeddingStatistics
from unclip.models.latent_diffusion import (
    Conditions,
    LatentDiffusion,
    LatentDiffusionConfig,
    LatentSampling,
    known_latents,
)
from unclip.models.small_images import known_part
from unclip.models.text import Text, TextShape, read_captions
from unclip.models.upsampler import Upsampler
from unclip.systems.autoencoder import AUTOENCODER
from unclip.systems.captions import check_clip, check_negative
from unclip.systems.part import Part, Shapes, TrainingInputs
from unclip.systems.system import StackFiles, SystemSpec, load_model, sampling_of
from unclip.systems.upsampler import UPSAMPLER, UpsampledSampling, UpsampledSystem
from unclip.training import checkpoints
from unclip.training.batches import stack_halves, stack_rows
from unclip.training.diffusion_loss import DiffusionLoss, bernoulli, device_of, measure_scores
from unclip.training.memory import Network, example_features, example_flags, example_indices
from unclip.training.objective import Tensors
from unclip.training.precision import autocast
from unclip.training.settings import TrainerConfig


@dataclasses.dataclass(frozen=True)
class LatentDiffusionStageConfig:
    model: LatentDiffusionConfig = LatentDiffusionConfig()
    """The network and its diffusion process."""
    trainer: TrainerConfig = TrainerConfig()
    """Training settings."""
    text_learning_rate: float = 1.0
    """Learning rate of a text Transformer that is trained with the network, as a factor of the trainer's."""
    preview: LatentSampling = operational(LatentSampling(num_steps=25))
    """Sampling settings of the previews."""

    def __post_init__(self) -> None:
        require(self.text_learning_rate > 0, "text_learning_rate", self.text_learning_rate, "a positive number")
        require_preview_sampler(self.preview)


class LatentDiffusionObjective:
    """Diffusion loss of latents, given their captions, image embeddings or both."""

    def __init__(
        self,
        kind: str,
        config: LatentDiffusionStageConfig,
        clip: Clip,
        statistics: EmbeddingStatistics,
        latents: Mapping[str, Any],
        autoencoder: Autoencoder,
        autoencoder_digest: str,
        preview: Batch,
    ) -> None:
        """Args:
            kind: name of the part.
            clip: gives the tokenizer and, if `config.model.text` is "clip", the text encoder.
            statistics: those of the training rows' image embeddings.
            latents: facts of the stage that made the latents: their shape, and their mean and standard deviation by channel.
            autoencoder: decodes previews.

        Raises:
            ConfigError: the network is for latents of another shape.
        """
        model = config.model
        shape = tuple(latents["latent_shape"])
        if shape != model.latent_shape:
            raise ConfigError(
                f"{kind}.model: got latent_channels {model.latent_channels} and unet.image_size {model.unet.image_size}, "
                f"expected {shape[0]} and {shape[1]}, the latents of the autoencoder."
            )
        self.kind, self.config, self.clip, self.digest = kind, model, clip, autoencoder_digest
        self.autoencoder = autoencoder
        text_shape = TextShape.of(clip)
        self.embedding_dim = len(statistics.mean)
        self.model: LatentDiffusion = LatentDiffusion(model, self.embedding_dim, text_shape).to(
            memory_format=torch.channels_last
        )
        self.model.set_statistics(torch.tensor(latents["mean"]), torch.tensor(latents["std"]))
        if self.model.image is not None:
            statistics.check(kind)
            self.model.image.statistics.load_state_dict(statistics.state_dict())
        self.learning_rate_factors: dict[str, float] = {}
        if self.model.text is not None:
            null = read_captions(model.text, clip, clip.tokenize([""]), model.reads_padding)
            self.model.text.set_null(null)  # type: ignore[arg-type]
            if next(self.model.text.parameters(), None) is not None:  # CLIP's states are read without weights
                self.learning_rate_factors["text"] = config.text_learning_rate
        self.process = DiffusionLoss(self.model.diffusion)
        self.sample_size = {"pixels": autoencoder.config.image_size**2}
        self.state = self.process.timesteps.state
        self._preview, self._preview_sampling = self.prepare(preview), config.preview

    @staticmethod
    def reads(config: LatentDiffusionConfig) -> dict[str, tuple[str, ...]]:
        """Columns that it is trained on, by table."""
        columns = ["tokens"] * (config.text != "none") + ["image_embedding"] * config.reads_image_embedding
        return {"latents": ("latent",), "embeddings": tuple(columns)}

    def prepare(self, batch: Batch) -> Tensors:
        tensors = {"latents": stack_halves(batch["latent"], *self.config.latent_shape)}  # [B, D, s, s]
        if self.config.text != "none":
            tensors["tokens"] = stack_rows(batch["tokens"]).long()  # [B, L]
        if self.config.reads_image_embedding:
            tensors["image_embedding"] = stack_rows(batch["image_embedding"])  # [B, E]
        return tensors

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        x0, config = self.model.normalize(tensors["latents"]), self.config
        draw = self.process.draw(x0, generator, network.training)
        text = self._text(tensors)
        text_drop = None if text is None else bernoulli(x0, config.text_drop_prob, generator)
        embedding, image_drop, level = None, None, None
        if config.reads_image_embedding:
            image_drop = bernoulli(x0, config.image_drop_prob, generator)
            levels = (0, config.max_noise_level)
            embedding, level = self.model.noised_embedding(tensors["image_embedding"], levels, generator)

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            return network(x_t, t, text, text_drop, embedding, image_drop, level)  # type: ignore[no-any-return]

        return self.process.mean_loss(predict, x0, draw)

    def learn(self, step_taken: bool) -> None:
        self.process.learn(step_taken)

    def metrics(self, training: bool) -> dict[str, float]:
        return self.process.take(training)

    def preview(self, model: nn.Module) -> Tensor:
        """Images as the autoencoder reconstructs them, then samples from their captions and embeddings."""
        device = device_of(model)
        generator = torch.Generator(device).manual_seed(0)
        tensors = {name: value.to(device) for name, value in self._preview.items()}
        conditions = Conditions(self._text(tensors), None, tensors.get("image_embedding"))
        latents = tensors["latents"]
        samples = model.sample(conditions, len(latents), self._preview_sampling, generator=generator)  # type: ignore[operator]
        with torch.no_grad():
            images = self.autoencoder.to(device).decode(torch.cat([latents, samples]))
        return images.float().clamp(-1, 1).cpu()

    def measure(self, model: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensors:
        text, embedding = self._text(tensors), None
        if self.config.reads_image_embedding:
            embedding, _ = self.model.noised_embedding(tensors["image_embedding"], (0, 0), generator)

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            return model(x_t, t, text, image_embedding=embedding)  # type: ignore[no-any-return]

        x0 = self.model.normalize(tensors["latents"])
        return measure_scores(self.model.diffusion, predict, x0, generator)

    def facts(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "config": to_dict(self.config),
            "embedding_dim": self.embedding_dim,
            "text_shape": None if self.model.text_shape is None else to_dict(self.model.text_shape),
            "autoencoder": self.digest,
        }

    def _text(self, tensors: Tensors) -> Text | None:
        if self.config.text == "none":
            return None
        return read_captions(self.config.text, self.clip, tensors["tokens"], self.config.reads_padding)


def _build(facts: Mapping[str, Any]) -> LatentDiffusion:
    text_shape = load(TextShape, facts["text_shape"]) if facts["text_shape"] else None
    model = LatentDiffusion(load(LatentDiffusionConfig, facts["config"]), facts["embedding_dim"], text_shape)
    model.autoencoder_digest = str(facts["autoencoder"])
    return model


def _network(config: LatentDiffusionStageConfig, shapes: Shapes) -> Network:
    model, dim, text = config.model, shapes.embedding_dim, shapes.text

    def inputs(batch: int) -> tuple[Any, ...]:
        captions: Text | None = None
        if model.text == "transformer":
            captions = example_indices(batch, text.length)
        if model.text == "clip":
            captions = example_features(batch, text, dim)
        text_drop = None if captions is None else example_flags(batch)
        given: tuple[Any, ...] = (torch.zeros(batch, *model.latent_shape), example_indices(batch), captions, text_drop)
        if model.reads_image_embedding:
            given += (torch.zeros(batch, dim), example_flags(batch), example_indices(batch))
        return given

    return Network(lambda: LatentDiffusion(model, dim, text), inputs)


def latent_part(kind: str, description: str, config: type[LatentDiffusionStageConfig]) -> Part[Any]:
    """Part that denoises latents.

    Args:
        config: class of its section, which decides on its conditions.
    """

    def objective(config: LatentDiffusionStageConfig, inputs: TrainingInputs) -> LatentDiffusionObjective:
        folder = inputs.model("autoencoder")
        autoencoder = load_model(folder, (AUTOENCODER,))
        assert isinstance(autoencoder, Autoencoder)
        digest, preview = checkpoints.digest(folder), inputs.preview_rows()
        given = inputs.clip(), inputs.statistics(), inputs.facts("latents")
        return LatentDiffusionObjective(kind, config, *given, autoencoder, digest, preview)

    return Part(
        name=kind,
        help=description,
        config=config,
        build=_build,
        objective=objective,
        reads=lambda config: LatentDiffusionObjective.reads(config.model),
        network=_network,
        needs=("clip", "autoencoder", "latents"),
        shows_rows=True,
    )


LATENT_DIFFUSION = latent_part(
    "latent_diffusion",
    "Train latent diffusion's generator: from captions to latents of the autoencoder.",
    LatentDiffusionStageConfig,
)


class LatentSystem(UpsampledSystem, abc.ABC):
    """A network of latents, the autoencoder that decodes them, and any number of upsamplers."""

    def __init__(
        self,
        name: str,
        clip: Clip,
        generator: LatentDiffusion,
        autoencoder: Autoencoder,
        upsamplers: Sequence[Upsampler],
    ) -> None:
        """Args:
            name: name of the network's part.

        Raises:
            CheckpointError: the network was trained on latents of another shape, or with another CLIP; or an upsampler was
                trained for a resolution other than it gets here.
        """
        super().__init__(autoencoder.config.image_size, "the autoencoder", upsamplers)
        config = autoencoder.config
        shape = (config.latent_channels, config.latent_size, config.latent_size)
        if generator.config.latent_shape != shape:
            raise CheckpointError(
                f"{name}: samples latents {generator.config.latent_shape}, but the autoencoder's are {shape}. Take both from the "
                "same stack."
            )
        check_clip(clip, {name: generator})
        self.clip, self.generator, self.autoencoder = clip, generator, autoencoder

    @abc.abstractmethod
    def settings_of(self, sampling: Any) -> LatentSampling:
        """Sampling settings of the network of latents."""

    def small_steps(self, sampling: Any) -> int:
        return self.settings_of(sampling).num_steps

    @abc.abstractmethod
    def conditions(
        self, captions: Sequence[str], sampling: Any, generator: torch.Generator, negative: Sequence[str] | None = None
    ) -> Conditions:
        """Conditions of the network of latents.

        Raises:
            InputError: there are negative captions, but no part that reads captions is guided.
            ShapeError: the number of negative captions differs from that of the captions.
        """

    @torch.no_grad()
    def sample_small(
        self,
        captions: Sequence[str],
        sampling: Any,
        generator: torch.Generator,
        *,
        negative: Sequence[str] | None = None,
        start: Tensor | None = None,
        known: Tensor | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        """Sample small images; images to start from are noised as latents."""
        conditions = self.conditions(captions, sampling, generator, negative)
        return self.decode_samples(
            conditions, len(captions), sampling, generator, start=start, known=known, on_step=on_step
        )

    def decode_samples(
        self,
        conditions: Conditions,
        batch: int,
        sampling: Any,
        generator: torch.Generator,
        *,
        start: Tensor | None = None,
        known: Tensor | None = None,
        on_step: OnStep = undisturbed,
    ) -> Tensor:
        """Sample latents and decode them to images [batch, 3, S, S] in [-1, 1], at the autoencoder's resolution.

        Args:
            start: [batch, 3, S, S], images to start from.
            known: [batch, 4, S, S] from `known_region`. Latents all of whose pixels are known are kept, and known pixels are
                returned unchanged.
        """
        with autocast(sampling.precision, self.device):
            kept = None
            if known is not None:
                pixels, mask = known_part(known)
                factor = self.autoencoder.config.factor
                kept = Known(self.autoencoder.encode(pixels), known_latents(mask, factor))
            latents = self.generator.sample(
                conditions,
                batch,
                self.settings_of(sampling),
                known=kept,
                start=None if start is None else self.autoencoder.encode(start),
                generator=generator,
                on_step=on_step,
            )
            images = self.autoencoder.decode(latents).float().clamp(-1, 1)
        return images if known is None else torch.where(known[:, 3:] > 0, known[:, :3], images)

    def read_captions(self, captions: Sequence[str]) -> Text | None:
        """Encode captions as the network of latents reads them; None if it reads no captions."""
        config = self.generator.config
        return read_captions(config.text, self.clip, self.tokenize(captions), config.reads_padding)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Tokens [B, L] of captions, on the system's device."""
        return self.clip.tokenize(list(captions)).to(self.device)


def load_latent_parts(
    files: StackFiles, part: Part[Any], *others: str
) -> tuple[LatentDiffusion, Autoencoder, list[Upsampler]]:
    """Load the network of latents, its autoencoder, and the upsamplers of a stack.

    Args:
        others: names of further parts, which the caller loads.

    Raises:
        CheckpointError: files are missing or damaged, or the network was trained on latents of another autoencoder.
    """
    needed = (part.name, "autoencoder", *others)
    if files.clip is None or not set(needed) <= files.models.keys():
        raise CheckpointError(f"stack: got {', '.join(files.models)}, expected a CLIP and {', '.join(needed)}.")
    generator = load_model(files.models[part.name], (part,))
    autoencoder = load_model(files.models["autoencoder"], (AUTOENCODER,))
    assert isinstance(generator, LatentDiffusion) and isinstance(autoencoder, Autoencoder)
    digest = checkpoints.digest(files.models["autoencoder"])
    if generator.autoencoder_digest != digest:
        raise CheckpointError(
            f"{part.name}: was trained on latents of the autoencoder {generator.autoencoder_digest[:8]}, but this one is "
            f"{digest[:8]}. Take both from the same stack."
        )
    folders = [folder for name, folder in files.models.items() if name not in needed]
    upsamplers: list[Any] = [load_model(folder, (UPSAMPLER,)) for folder in folders]
    return generator, autoencoder, upsamplers


SHORTCUTS = ("num_steps", "guidance_scale", "sampler", "eta", "strength")


def shortcuts_of(part: Part[Any]) -> dict[str, str]:
    """Options of `unclip sample` -> sampling settings of the network of latents."""
    return {name.removeprefix("num_"): f"{part.name}.{name}" for name in SHORTCUTS}


@dataclasses.dataclass(frozen=True)
class LatentDiffusionSampling(UpsampledSampling):
    latent_diffusion: LatentSampling = LatentSampling()
    """Settings of the generator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        level = self.latent_diffusion.noise_level
        require(level == 0, "latent_diffusion.noise_level", level, "0, as the generator reads no image embedding")


class LatentDiffusionStack(LatentSystem):
    """The generator of latents from captions, the autoencoder, and CLIP for its tokenizer and its text encoder."""

    def __init__(
        self, clip: Clip, generator: LatentDiffusion, autoencoder: Autoencoder, upsamplers: Sequence[Upsampler] = ()
    ) -> None:
        super().__init__("latent_diffusion", clip, generator, autoencoder, upsamplers)
        self.sampling = LatentDiffusionSampling()

    @classmethod
    def load(cls, files: StackFiles) -> "LatentDiffusionStack":
        """Load CLIP and the parts.

        Raises:
            CheckpointError: files are missing or damaged, or do not fit each other.
        """
        parts = load_latent_parts(files, LATENT_DIFFUSION)
        assert files.clip is not None
        stack = cls(files.clip.load(), *parts)
        stack.sampling = sampling_of(files, LatentDiffusionSampling)
        return stack

    def settings_of(self, sampling: LatentDiffusionSampling) -> LatentSampling:
        return sampling.latent_diffusion

    def conditions(
        self,
        captions: Sequence[str],
        sampling: LatentDiffusionSampling,
        generator: torch.Generator,
        negative: Sequence[str] | None = None,
    ) -> Conditions:
        if negative is None:
            return Conditions(self.read_captions(captions))
        scales = [sampling.latent_diffusion.guidance_scale]
        check_negative(negative, captions, scales, "latent_diffusion.guidance_scale")
        return Conditions(self.read_captions(captions), self.read_captions(negative))


SYSTEM = SystemSpec(
    name="latent_diffusion",
    parts=(LATENT_DIFFUSION, AUTOENCODER, UPSAMPLER),
    sampling=LatentDiffusionSampling,
    load=LatentDiffusionStack.load,
    shortcuts=shortcuts_of(LATENT_DIFFUSION),
    inputs=("negative", "start"),
)
