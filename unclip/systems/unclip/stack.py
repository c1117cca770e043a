"""A trained stack, from its files to pictures. What is done with pictures that exist is in `unclip.systems.unclip.manipulations`.

Letters: B batch, E CLIP embedding width, s side of the decoder's pictures, S side of the last upsampler's.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unclip import config, files
from unclip.config import require
from unclip.diffusion.samplers import OnStep, SamplerName, undisturbed
from unclip.errors import CheckpointError
from unclip.models import embeddings
from unclip.models.autoregressive_prior import AutoregressivePrior, AutoregressivePriorConfig
from unclip.models.clip import Clip, ImageEmbeddings
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.embeddings import PrincipalComponents
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.text import EmptyCaption, Text, TextShape, read_captions
from unclip.models.upsampler import Upsampler, UpsamplerConfig
from unclip.training import checkpoints
from unclip.training.precision import Precision, autocast

BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "prior": lambda facts: DiffusionPrior(
        config.load(PriorConfig, facts["config"]), facts["embedding_dim"], facts["text_width"], facts["text_length"]
    ),
    "autoregressive_prior": lambda facts: AutoregressivePrior(
        config.load(AutoregressivePriorConfig, facts["config"]),
        facts["embedding_dim"],
        facts["text_width"],
        facts["text_length"],
        facts["num_components"],
    ),
    "decoder": lambda facts: Decoder(
        config.load(DecoderConfig, facts["config"]),
        facts["embedding_dim"],
        config.load(TextShape, facts["text_shape"]) if facts["text_shape"] else None,
    ),
    "upsampler": lambda facts: Upsampler(config.load(UpsamplerConfig, facts["config"])),
}
"""How each kind of model is built from the facts saved with its weights."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How pictures are drawn."""

    prior_sampler: SamplerName = "ddpm"
    """Sampler of the diffusion prior."""
    prior_steps: int = 64
    """Sampling steps of the diffusion prior."""
    prior_temperature: float = 1.0
    """Divides the autoregressive prior's logits; 0 takes the likeliest values."""
    prior_guidance_scale: float = 1.0
    """Classifier-free guidance of the prior; 1 = off."""
    num_candidates: int = 2
    """Image embeddings drawn for a caption, of which the best is kept."""
    decoder_sampler: SamplerName = "ddim"
    """Sampler of the decoder."""
    decoder_steps: int = 50
    """Sampling steps of the decoder."""
    guidance_scale: float = 2.0
    """Classifier-free guidance of the decoder; 1 = off."""
    text_guidance_scale: float | None = None
    """Guidance by the caption alone, where the decoder reads it; None guides by picture and caption together."""
    inversion_iterations: int = 1
    """Iterations of each step of an inversion: the more, the closer is the picture that is drawn from what it finds, and
    the less freely it follows a text diff."""
    upsampler_sampler: SamplerName = "ddim"
    """Sampler of the upsamplers."""
    upsampler_steps: tuple[int, ...] = (27, 15)
    """Sampling steps of each upsampler, the smallest pictures first; the last number serves all that follow."""
    batch_size: int = 64
    """Captions that are drawn together."""
    precision: Precision = "auto"
    """Arithmetic of the decoder and the upsamplers."""

    def __post_init__(self) -> None:
        for name in ("prior_steps", "decoder_steps", "num_candidates", "inversion_iterations", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        steps = self.upsampler_steps
        require(min(steps, default=0) >= 1, "upsampler_steps", steps, "at least one number, each at least 1")
        for name in ("prior_temperature", "prior_guidance_scale", "guidance_scale", "text_guidance_scale"):
            require((getattr(self, name) or 0) >= 0, name, getattr(self, name), "at least 0")

    def steps_of_upsamplers(self, num: int) -> tuple[int, ...]:
        """Sampling steps of each of `num` upsamplers."""
        return (*self.upsampler_steps, *[self.upsampler_steps[-1]] * num)[:num]


def load_model(folder: str) -> nn.Module:
    """A model as the trainer saved it, in evaluation mode.

    Args:
        folder: URI of a `model/` folder.

    Raises:
        CheckpointError: damaged, untrained, or made by another version of the model.
    """
    tensors, facts = checkpoints.load(folder)
    if facts.get("kind") not in BUILDERS:
        raise CheckpointError(f"{folder}: got a model of kind {facts.get('kind')!r}, expected {', '.join(BUILDERS)}.")
    if not facts.get("samples_seen") and not facts.get("imported"):
        raise CheckpointError(f"{folder}: this {facts['kind']} was never trained; it would draw noise. Train it first.")
    try:
        model = BUILDERS[facts["kind"]](facts)
        model.load_state_dict(tensors["model"])
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: the weights do not fit the {facts['kind']}: {error}") from error
    return model.eval().requires_grad_(False)


class EmbeddingFacts(NamedTuple):
    """What is known of the image embeddings that a stack was trained on, [E] wide."""

    mean: Tensor
    """[E]."""
    principal: PrincipalComponents
    """Directions in which they vary."""


class Stack(nn.Module):
    """CLIP, prior, decoder and any number of upsamplers, each for the pictures of the one before: text in, pictures out."""

    def __init__(
        self,
        clip: Clip,
        prior: DiffusionPrior | AutoregressivePrior,
        decoder: Decoder,
        upsamplers: Sequence[Upsampler] = (),
    ) -> None:
        """Raises:
        CheckpointError: the prior and the decoder were trained on embeddings of different datasets or CLIPs, or with
            another CLIP than this one, or an upsampler on pictures of another size than it gets here.
        """
        super().__init__()
        embeddings.check_agreement({"prior": prior.statistics, "decoder": decoder.statistics})
        _check_clip(clip, {"prior": prior, "decoder": decoder})
        _check_chain(decoder, upsamplers)
        self.clip, self.prior, self.decoder = clip, prior, decoder
        self.upsamplers: Sequence[Upsampler] = nn.ModuleList(upsamplers)  # type: ignore[assignment]
        self.sampling = SamplingConfig()
        self.dataset: EmbeddingFacts | None = None

    @classmethod
    def load(cls, folder: str | Path) -> "Stack":
        """Load a published stack: a local folder with `stack.json`, and a folder for each model.

        Raises:
            CheckpointError: something is missing, damaged, or does not fit the rest.
        """
        description = Path(folder, "stack.json")
        if not description.is_file():
            raise CheckpointError(f"{folder}: no stack.json, so no stack was published here. Run `unclip run` first.")
        facts = json.loads(description.read_text())
        if "upsamplers" not in facts:
            raise CheckpointError(
                f"{description}: got no list of upsamplers, expected one; an earlier version published this stack. "
                "Publish it anew with `unclip run`."
            )
        named = facts["clip"]["model"].replace("local-dir:", f"local-dir:{folder}/")
        prior, decoder, *upsamplers = (
            load_model(f"{folder}/{name}") for name in ("prior", "decoder", *facts["upsamplers"])
        )
        image_embeddings = facts["clip"].get("image_embeddings", "unit")
        clip = Clip.load(named, facts["clip"]["pretrained"], image_embeddings)
        stack = cls(clip, prior, decoder, upsamplers)  # type: ignore[arg-type]
        stack.sampling = config.load(SamplingConfig, facts["sampling"])
        if Path(folder, "statistics").is_dir():
            tensors, _ = checkpoints.load(f"{folder}/statistics")
            stack.dataset = EmbeddingFacts(tensors["statistics"]["mean"], PrincipalComponents(**tensors["pca"]))
        return stack

    @property
    def image_size(self) -> int:
        """S, side of the pictures that the stack draws, pixels."""
        return (self.decoder.config.unet.image_size, *self.upsampled_sizes)[-1]

    @property
    def upsampled_sizes(self) -> list[int]:
        """Side of each upsampler's pictures, pixels."""
        return [upsampler.config.output_size for upsampler in self.upsamplers]

    @property
    def device(self) -> torch.device:
        return next(self.prior.parameters()).device

    @torch.no_grad()
    def text2image(
        self,
        captions: Sequence[str],
        *,
        seed: int = 0,
        sampling: SamplingConfig | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        """Draw one picture for each caption.

        Args:
            captions: any number; they are drawn in batches.
            seed: the same captions, seed and settings give the same pictures on the same machine.
            sampling: None takes the settings published with the stack.
            progress: told how many pictures have just been finished.

        Returns:
            [len(captions), 3, S, S] float32 in [-1, 1], on the CPU.

        Source: Ramesh et al. 2022, section 2: prior, decoder, upsamplers.
        """
        settings = sampling or self.sampling
        pictures = []
        for number, start in enumerate(range(0, len(captions), settings.batch_size)):
            batch = captions[start : start + settings.batch_size]
            pictures.append(self.draw_batch(batch, number, seed=seed, sampling=settings))
            progress(len(batch))
        return torch.cat(pictures)

    @torch.no_grad()
    def draw_batch(self, captions: Sequence[str], number: int, *, seed: int, sampling: SamplingConfig) -> Tensor:
        """Batch `number` of `text2image`, on its own: [len(captions), 3, S, S]."""
        generator = torch.Generator(self.device).manual_seed(seed * 1_000_003 + number)
        embedding = self.embed_captions(list(captions), sampling, generator)
        return self.decode(embedding, sampling, generator, text=self.read_captions(captions)).cpu()

    def embed_captions(self, captions: list[str], sampling: SamplingConfig, generator: torch.Generator) -> Tensor:
        """Image embeddings [B, E] that the prior draws for captions."""
        text = self.clip.encode_text(self.clip.tokenize(captions).to(self.device))
        draw = (
            functools.partial(self.prior.sample, num_steps=sampling.prior_steps, sampler=sampling.prior_sampler)
            if isinstance(self.prior, DiffusionPrior)
            else functools.partial(self.prior.sample, temperature=sampling.prior_temperature)
        )
        return draw(
            text.text_encodings,
            text.text_mask,
            text.text_projection,
            num_candidates=sampling.num_candidates,
            guidance_scale=sampling.prior_guidance_scale,
            generator=generator,
        )

    def embed_images(self, images: Tensor) -> Tensor:
        """Image embeddings [B, E], as the decoder reads them, of pictures [B, 3, H, W] in [-1, 1]."""
        return self.clip.embed_images(self.clip.resize(images.to(self.device)))

    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """CLIP's unit-norm text embeddings [B, E]."""
        return self.clip.encode_text(self.clip.tokenize(list(captions)).to(self.device)).text_embedding

    def read_captions(self, captions: Sequence[str]) -> Text | None:
        """What the decoder reads of captions besides image embeddings; None where it reads nothing."""
        tokens = self.clip.tokenize(list(captions)).to(self.device)  # [B, L]
        return read_captions(self.decoder.config.text, self.clip, tokens)

    def decode(
        self, image_embedding: Tensor, sampling: SamplingConfig, generator: torch.Generator, text: Text | None = None
    ) -> Tensor:
        """Pictures [B, 3, S, S] at full size for image embeddings [B, E], and captions where the decoder reads them."""
        with autocast(sampling.precision, self.device):
            low_res = self.decoder.sample(
                image_embedding,
                text=text,
                text_guidance_scale=sampling.text_guidance_scale,
                sampler=sampling.decoder_sampler,
                num_steps=sampling.decoder_steps,
                guidance_scale=sampling.guidance_scale,
                generator=generator,
            )
        return self.upsample(low_res, sampling, generator)

    def upsample(
        self,
        low_res: Tensor,
        sampling: SamplingConfig,
        generator: torch.Generator,
        x_T: Sequence[Tensor] | None = None,
        on_step: Sequence[OnStep] | None = None,
    ) -> Tensor:
        """Let the upsamplers work in turn.

        Args:
            low_res: [B, 3, s, s] in [-1, 1], the decoder's pictures.
            x_T: for each upsampler, like its pictures; None draws them from the generator.
            on_step: for each upsampler; None disturbs none.

        Returns:
            [B, 3, S, S] in [-1, 1].
        """
        num = len(self.upsamplers)
        noises: Sequence[Tensor | None] = x_T or [None] * num
        hooks = on_step or [undisturbed] * num
        parts = zip(self.upsamplers, sampling.steps_of_upsamplers(num), noises, hooks, strict=True)
        with autocast(sampling.precision, self.device):
            for upsampler, num_steps, noise, hook in parts:
                low_res = upsampler.sample(
                    low_res,
                    sampler=sampling.upsampler_sampler,
                    num_steps=num_steps,
                    x_T=noise,
                    generator=generator,
                    on_step=hook,
                )
        return low_res


def _check_clip(clip: Clip, models: dict[str, nn.Module]) -> None:
    for name, model in models.items():
        if not all(module.knows(clip) for module in model.modules() if isinstance(module, EmptyCaption)):
            raise CheckpointError(
                f"{name}: was trained with another CLIP than this one, which reads the empty caption differently; it would "
                f"draw something else than what captions say. Take the CLIP and the {name} of one stack."
            )


def _check_chain(decoder: Decoder, upsamplers: Sequence[Upsampler]) -> None:
    side, maker = decoder.config.unet.image_size, "the decoder"
    for upsampler in upsamplers:
        trained_for = upsampler.config.low_res_size
        if trained_for != side:
            raise CheckpointError(
                f"{upsampler.config.name}: got pictures of {side} pixels from {maker}, expected the {trained_for} that it was "
                "trained for. Take models of one stack."
            )
        side, maker = upsampler.config.output_size, upsampler.config.name


def save_stack(
    folder: str,
    models: dict[str, str],
    clip_model: str,
    clip_pretrained: str | None,
    sampling: SamplingConfig,
    image_embeddings: ImageEmbeddings = "unit",
    *,
    upsamplers: Sequence[str],
) -> None:
    """Gather trained models into one folder that `Stack.load` reads; `stack.json` is written last.

    Args:
        folder: URI of the new stack.
        models: name -> URI of the folder to copy; "statistics" are those of the dataset, which PCA probing needs.
        clip_model: open_clip name; "local-dir:clip" for the copied folder "clip".
        image_embeddings: what its image embeddings are.
        upsamplers: names of their folders, the smallest pictures first.
    """
    for name, source in models.items():
        for file in files.names(source):
            files.write(f"{folder}/{name}/{file}", files.read(f"{source}/{file}"))
    description = {
        "clip": {"model": clip_model, "pretrained": clip_pretrained, "image_embeddings": image_embeddings},
        "sampling": config.to_dict(sampling),
        "upsamplers": list(upsamplers),
    }
    files.write_json(f"{folder}/stack.json", description)
