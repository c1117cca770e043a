"""Systems that sample an image token by token: their objective, and the stack from captions to images.

A model of tokens reads a caption, the decoder of an autoencoder turns its tokens into an image, and CLIP chooses among several
images of a caption. Sources: Ramesh et al. 2021 (DALL·E), section 2; Yu et al. 2022 (Parti), section 2.

Letters: B batch, C candidates, L text tokens, N image tokens, S resolution.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import added, load, to_dict
from unclip.data import Batch
from unclip.errors import CheckpointError, ConfigError
from unclip.models.autoencoder import Autoencoder
from unclip.models.clip import Clip
from unclip.models.image_tokens import ImageTokenModel
from unclip.models.token_transformer import TokenSampling
from unclip.systems.autoencoder import AUTOENCODER, AutoencoderStageConfig
from unclip.systems.captions import check_clip, check_negative
from unclip.systems.part import Part, Shapes, TrainingInputs
from unclip.systems.system import StackFiles, SystemSpec, check_batch_size, load_model, sampling_of
from unclip.training import parallel
from unclip.training.batches import stack_rows
from unclip.training.diffusion_loss import bernoulli, device_of
from unclip.training.memory import Network, example_flags, example_indices
from unclip.training.objective import Tensors
from unclip.training.precision import Precision, autocast
from unclip.training.settings import TrainerConfig

NUM_COUNTED = 65_536
"""Training captions that the text vocabulary is made of."""
COLUMNS = {"latents": ("codes",), "embeddings": ("tokens",)}

PREVIEW = TokenSampling(num_candidates=1)
"""Sampling settings of previews; they are not guided, as not every model can be."""
DEMO_TRAINER = TrainerConfig(
    num_samples=64_000,
    batch_size=32,
    learning_rate=1e-3,
    warmup_samples=2_000,
    weight_decay=0.05,
    beta2=0.95,
    ema_decay=0.99,
    checkpoint_samples=10_000,
)
"""Training in minutes on two CPUs."""


class TokenObjective:
    """Cross-entropy of the tokens of images, given their captions; and of the captions, if the model predicts them."""

    def __init__(
        self,
        kind: str,
        model: ImageTokenModel,
        clip: Clip,
        autoencoder: Autoencoder,
        captions: Tensor,
        preview: Batch,
        preview_sampling: TokenSampling = PREVIEW,
    ) -> None:
        """Args:
            kind: name of the part.
            clip: gives the tokenizer.
            autoencoder: frozen; it made the codes, and decodes those of the previews.
            captions: tokens [N, L] of training rows, for the text vocabulary.

        Raises:
            ConfigError: the model is for other codes than the autoencoder's.
        """
        self.kind, self.model, self.config = kind, model, model.config
        _check_codes(kind, model, autoencoder, ConfigError)
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.model.set_null(clip.tokenize([""]))
        self.model.vocabulary.fit(captions)
        self.sample_size = {"tokens": model.text_length + self.config.num_image_tokens}
        self.state: Tensors = {}
        self._losses: dict[bool, list[Tensor]] = {True: [], False: []}  # keyed by network.training
        self._preview, self._preview_sampling = self.prepare(preview), preview_sampling

    def prepare(self, batch: Batch) -> Tensors:
        return {
            "tokens": stack_rows(batch["tokens"]).long(),  # [B, L]
            "codes": stack_rows(batch["codes"]).long(),  # [B, N]
        }

    def loss(self, network: nn.Module, tensors: Tensors, generator: torch.Generator) -> Tensor:
        drop = (
            bernoulli(tensors["tokens"], self.config.cond_drop_prob, generator) if self.config.cond_drop_prob else None
        )
        losses: Tensor = network(tensors["tokens"], tensors["codes"], drop).float().mean(dim=0)  # [number of losses]
        self._losses[network.training].append(losses.detach())
        return (losses * losses.new_tensor(self.model.loss_weights)).sum()

    def metrics(self, training: bool) -> dict[str, float]:
        """Cross-entropy of the image tokens, and of the text tokens if they are predicted, in nats for each; dropped captions
        count as 0. `relative_loss` is that of the image tokens divided by that of equal probabilities."""
        losses, self._losses[training] = self._losses[training], []
        if not losses:
            return {}
        stacked = torch.stack(losses)  # [batches, number of losses]
        sums = torch.cat([stacked.sum(dim=0), stacked.new_tensor([len(losses)])])
        *totals, number = (parallel.all_reduce_sum(sums) if training else sums).tolist()
        means = {name: total / number for name, total in zip(self.model.loss_names, totals, strict=True)}
        return {
            **{f"{name}_loss": mean for name, mean in means.items()},
            "relative_loss": means["image"] / math.log(self.config.codebook_size),
        }

    def preview(self, model: nn.Module) -> Tensor:
        """The reconstructions of images, then samples from their captions."""
        device = device_of(model)
        generator = torch.Generator(device).manual_seed(0)
        tokens = self._preview["tokens"].to(device)
        codes = model.sample(tokens, self._preview_sampling, generator=generator)  # type: ignore[operator]
        both = torch.cat([self._preview["codes"].to(device), codes])
        return self.autoencoder.to(device).decode_tokens(both).float().clamp(-1, 1).cpu()

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "config": to_dict(self.config), "text_length": self.model.text_length}


def token_part(
    name: str, help: str, section: type, config: type, model: Callable[[Any, int], ImageTokenModel]
) -> Part[Any]:
    """Part that trains a model of image tokens.

    Args:
        section: class of its settings; has the fields `model`, `trainer` and `preview`.
        config: class of `model`.
        model: builds the network from its settings and L.
    """

    def build(facts: Mapping[str, Any]) -> nn.Module:
        return model(load(config, facts["config"]), facts["text_length"])

    def objective(settings: Any, inputs: TrainingInputs) -> TokenObjective:
        clip = inputs.clip()
        autoencoder = load_model(inputs.model("autoencoder"), (AUTOENCODER,))
        captions = inputs.sample_rows("embeddings", ("tokens",), NUM_COUNTED)["tokens"]
        return TokenObjective(
            name,
            model(settings.model, clip.text_length),
            clip,
            autoencoder,  # type: ignore[arg-type]
            stack_rows(captions).long(),
            inputs.preview_rows(),
            settings.preview,
        )

    def network(settings: Any, shapes: Shapes) -> Network:
        length, num_codes = shapes.text.length, settings.model.num_image_tokens

        def inputs(batch: int) -> tuple[Any, ...]:
            return example_indices(batch, length), example_indices(batch, num_codes), example_flags(batch)

        return Network(lambda: model(settings.model, length), inputs)

    return Part(
        name=name,
        help=help,
        config=section,
        build=build,
        objective=objective,
        reads=lambda _: COLUMNS,
        network=network,
        needs=("clip", "autoencoder", "latents"),
        shows_rows=True,
    )


@dataclasses.dataclass(frozen=True)
class TokenStackSampling:
    """Sampling settings of a system of image tokens; the system adds a section for its model."""

    batch_size: int = 64
    """Captions sampled together, each with all its candidates."""
    precision: Precision = "fp32"
    """Precision of the networks. In lower precision, the logits of a caption depend a little on the others in its batch, so that
    now and then another token is drawn."""
    pad_batches: bool = added(False)
    """Fill every batch up to `batch_size`. Then an image depends on its caption, seed and settings alone, bit for bit."""

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)


class TokenStack(nn.Module):
    """CLIP, an autoencoder and a model of its tokens: captions to images."""

    def __init__(self, name: str, clip: Clip, autoencoder: Autoencoder, model: ImageTokenModel, sampling: Any) -> None:
        """Args:
            name: name of the model, and of its section in the sampling settings.

        Raises:
            CheckpointError: the model was trained with another tokenizer or autoencoder.
        """
        super().__init__()
        check_clip(clip, {name: model})
        _check_codes(name, model, autoencoder, CheckpointError)
        self.name, self.clip, self.autoencoder, self.model = name, clip, autoencoder, model
        self.sampling = sampling

    @property
    def image_size(self) -> int:
        """S, resolution of the system's images, pixels."""
        return self.autoencoder.config.image_size

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @torch.no_grad()
    def sample(
        self,
        captions: Sequence[str],
        sampling: Any,
        generator: torch.Generator,
        *,
        negative: Sequence[str] | None = None,
    ) -> Tensor:
        """Sample one image for each caption, the best of its candidates, [len(captions), 3, S, S] in [-1, 1].

        Args:
            negative: captions to guide away from.

        Raises:
            InputError: there are negative captions, but no guidance.
            ShapeError: there is another number of negative captions.
        """
        candidates = self.sample_candidates(captions, sampling, generator, negative=negative)  # [B, C, 3, S, S]
        if candidates.shape[1] == 1:
            return candidates[:, 0]
        return candidates[torch.arange(len(candidates)), self.score(candidates, captions).argmax(dim=1)]

    @torch.no_grad()
    def sample_candidates(
        self,
        captions: Sequence[str],
        sampling: Any,
        generator: torch.Generator,
        *,
        negative: Sequence[str] | None = None,
    ) -> Tensor:
        """Sample all candidates for each caption, [B, C, 3, S, S] in [-1, 1]; see `sample`."""
        settings: TokenSampling = getattr(sampling, self.name)
        away_from = None
        if negative is not None:
            check_negative(negative, captions, [settings.guidance_scale], f"{self.name}.guidance_scale")
            away_from = self._tokenize(negative)
        with autocast(sampling.precision, self.device):
            codes = self.model.sample(self._tokenize(captions), settings, negative=away_from, generator=generator)
            images = torch.cat(list(map(self.autoencoder.decode_tokens, _parts(codes, len(captions)))))
        return images.float().clamp(-1, 1).view(len(captions), -1, *images.shape[1:])

    @torch.no_grad()
    def score(self, candidates: Tensor, captions: Sequence[str]) -> Tensor:
        """CLIP's cosine [B, C] of images [B, C, 3, S, S] in [-1, 1] and captions.

        Source: Ramesh et al. 2021, section 2.6.
        """
        parts = _parts(candidates.flatten(0, 1), len(captions))
        embeddings = torch.cat([self.clip.embed_images(self.clip.resize(part)) for part in parts])  # [B * C, E]
        text_embedding = self.clip.encode_text(self._tokenize(captions)).text_embedding  # [B, E]
        return F.cosine_similarity(embeddings.view(*candidates.shape[:2], -1), text_embedding[:, None], dim=2)

    def _tokenize(self, captions: Sequence[str]) -> Tensor:
        return self.clip.tokenize(list(captions)).to(self.device)  # [B, L]


def _parts(rows: Tensor, size: int) -> list[Tensor]:
    """Parts of a batch, so that networks of pixels see no more images at once than without candidates."""
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def load_stack(files: StackFiles, part: Part[Any], sampling: type) -> TokenStack:
    """Load CLIP, the autoencoder and the model of its tokens.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit each other.
    """
    if files.clip is None or not {"autoencoder", part.name} <= files.models.keys():
        found = ", ".join(files.models)
        raise CheckpointError(f"stack: got {found}, expected a CLIP, an autoencoder and a part {part.name}.")
    autoencoder: Any = load_model(files.models["autoencoder"], (AUTOENCODER,))
    model: Any = load_model(files.models[part.name], (part,))
    return TokenStack(part.name, files.clip.load(), autoencoder, model, sampling_of(files, sampling))


def token_system(part: Part[Any], sampling: type) -> SystemSpec:
    """Description of a system of image tokens, which has the name of its model's part.

    Args:
        sampling: class of its sampling settings, with a section of that name.
    """
    return SystemSpec(
        name=part.name,
        parts=(AUTOENCODER, part),
        sampling=sampling,
        load=lambda files: load_stack(files, part, sampling),
        shortcuts={"guidance_scale": f"{part.name}.guidance_scale"},
        inputs=("negative",),
    )


def sections(
    name: str,
    autoencoder: AutoencoderStageConfig,
    model: Any,
    sampling: TokenStackSampling,
    clip: tuple[str, str | None],
    min_reconstruction_accuracy: float | None = None,
) -> dict[str, Any]:
    """Sections of a run file for a model size.

    Args:
        name: section of the model.
        model: settings of the stage that trains the model; its tokens are those of the autoencoder.
        clip: CLIP's architecture and its weights; without weights, it is trained on the pairs.
        min_reconstruction_accuracy: see the stage `latents`; only for procedural images.
    """
    settings = to_dict(model)
    for field in ("grid_size", "codebook_size"):
        del settings["model"][field]  # they follow from the autoencoder
    return {
        "autoencoder": to_dict(autoencoder),
        "latents": {"min_reconstruction_accuracy": min_reconstruction_accuracy},
        name: settings,
        "clip": {"model": clip[0], "pretrained": clip[1]},
        "evaluate": {"sampling": to_dict(sampling)},
    }


def _check_codes(name: str, model: ImageTokenModel, autoencoder: Autoencoder, error: type[Exception]) -> None:
    pairs = {
        "grid_size": (model.config.grid_size, autoencoder.config.latent_size),
        "codebook_size": (model.config.codebook_size, autoencoder.config.codebook_size),
    }
    if not autoencoder.config.has_codes:
        raise error(
            f"{name}: got an autoencoder without tokens ({autoencoder.config.bottleneck}). Set autoencoder.model.bottleneck to "
            "vq or gumbel."
        )
    for field, (got, expected) in pairs.items():
        if got != expected:
            raise error(f"{name}.model.{field}: got {got}, expected {expected}, that of the autoencoder.")
