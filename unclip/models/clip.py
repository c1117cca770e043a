"""CLIP by open_clip: any of its models, frozen, behind the three functions that the stack needs.

A model is named as open_clip names it ("ViT-L-14" with a `pretrained` tag or weights file, "hf-hub:org/name",
"local-dir:/folder") or is one of the small architectures in `open_clip_models/`, to be trained from scratch.

Letters: B batch, S side of CLIP's input, L text tokens, W text width, E embedding width.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import nearest
from unclip.errors import CheckpointError, ConfigError, InputError

OWN_ARCHITECTURES = Path(__file__).parent / "open_clip_models"

_NEEDS_TRANSFORMERS = (
    "clip.model: got {!r}, whose text is read by the package transformers, which is not installed. "
    "Install the extra that has it, unclip[interop], on every node, or name another model."
)

LENGTH_STEP = 16
"""Captions whose lengths are in the same multiple of it are read together."""

ImageEmbeddings = Literal["unit", "raw", "none"]
"""What image embeddings are: of unit norm, as everything that is trained here; the projection as it is, as published unCLIP
decoders read it (`unclip.interop`); or none, where a stack was imported without an image encoder."""


class TextFeatures(NamedTuple):
    """A batch of captions as CLIP sees it."""

    text_embedding: Tensor
    """[B, E] float32, unit norm."""
    text_encodings: Tensor
    """[B, L, W] float32, the text encoder's last hidden states after its final norm."""
    text_mask: Tensor
    """[B, L] bool, True = keep."""
    text_projection: Tensor
    """[B, E] float32, the text embedding before it is brought to unit norm; transformers calls it text_embeds."""


def check_name(model: str, pretrained: str | None) -> None:
    """Check a model's name without loading anything.

    Raises:
        ConfigError: open_clip does not know the model, or a package, folder or weights file that it needs is missing.
    """
    if model.startswith("hf-hub:"):
        return
    if model.startswith("local-dir:"):
        config = Path(model.removeprefix("local-dir:"), "open_clip_config.json")
        if not config.is_file():
            raise ConfigError(
                f"clip.model: got {model!r}, but {config} does not exist. Name a folder saved by open_clip."
            )
        return
    if model not in architectures():
        raise ConfigError(
            f"clip.model: got {model!r}, which open_clip does not know. {nearest(model, architectures())}"
        )
    text = json.loads(architectures()[model].read_text()).get("text_cfg", {})
    if {"hf_tokenizer_name", "hf_model_name"} & text.keys() and importlib.util.find_spec("transformers") is None:
        raise ConfigError(_NEEDS_TRANSFORMERS.format(model))
    looks_like_path = pretrained is not None and ("/" in pretrained or "." in pretrained)
    if looks_like_path and not Path(str(pretrained)).is_file():
        raise ConfigError(f"clip.pretrained: {pretrained!r} does not exist. Name a weights file or a tag of open_clip.")


def architectures() -> dict[str, Path]:
    """Models that open_clip and this library know: name -> file of its architecture."""
    spec = importlib.util.find_spec("open_clip")  # finding a package does not import it
    folders = [OWN_ARCHITECTURES]
    if spec is not None and spec.submodule_search_locations:
        folders.append(Path(spec.submodule_search_locations[0], "model_configs"))
    return {path.stem: path for folder in folders for path in folder.glob("*.json")}


def create(model: str, pretrained: str | None) -> nn.Module:
    """The open_clip model itself, on the CPU; its architecture alone when `pretrained` is None and the name needs no more.

    Raises:
        CheckpointError: open_clip could not load it; the message is open_clip's.
    """
    import open_clip

    open_clip.add_model_config(OWN_ARCHITECTURES)
    try:
        return open_clip.create_model(model, pretrained=pretrained, weights_only=True)  # type: ignore[no-any-return]
    except (RuntimeError, ValueError, FileNotFoundError) as error:
        raise CheckpointError(f"clip: open_clip could not load {model!r} ({pretrained!r}): {error}") from error


class ClipShape(NamedTuple):
    """Sizes of a CLIP's outputs."""

    embedding_dim: int
    """E."""
    text_length: int
    """L."""
    text_width: int
    """W."""
    vocab_size: int


def shape_of(model: str) -> ClipShape:
    """Sizes of a model's outputs, from its configuration alone.

    Raises:
        ConfigError: the model's configuration is on the network, or it does not give its sizes.
    """
    path = model.removeprefix("local-dir:")
    if path != model:
        facts = json.loads(Path(path, "open_clip_config.json").read_text())["model_cfg"]
    else:
        import open_clip

        open_clip.add_model_config(OWN_ARCHITECTURES)
        facts = open_clip.get_model_config(model)
    text = (facts or {}).get("text_cfg", {})
    if not {"context_length", "vocab_size", "width"} <= text.keys():
        raise ConfigError(
            f"clip.model: got {model!r}, whose configuration does not give its sizes here. Name an architecture of open_clip, "
            "or a folder saved by it."
        )
    return ClipShape(facts["embed_dim"], text["context_length"], text["width"], text["vocab_size"])


def tokenizer(model: str) -> Any:
    """open_clip's tokenizer for a model.

    Raises:
        ConfigError: the tokenizer is one of transformers, which is not installed.
    """
    import open_clip

    open_clip.add_model_config(OWN_ARCHITECTURES)
    try:
        return open_clip.get_tokenizer(model)
    except ImportError as error:
        raise ConfigError(_NEEDS_TRANSFORMERS.format(model)) from error


class Clip(nn.Module):
    """A frozen open_clip model: never trains, never leaves evaluation mode."""

    def __init__(self, model: Any, name: str, image_embeddings: ImageEmbeddings = "unit") -> None:
        super().__init__()
        import open_clip

        self.image_embeddings = image_embeddings
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer(name)
        self.preprocess = open_clip.transform.image_transform_v2(
            open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg), is_train=False
        )
        self.train(False)

    @classmethod
    def load(cls, model: str, pretrained: str | None = None, image_embeddings: ImageEmbeddings = "unit") -> "Clip":
        return cls(create(model, pretrained), model, image_embeddings)

    def train(self, mode: bool = True) -> "Clip":
        """Frozen: stays in evaluation mode, also when a module that holds it is put in training mode."""
        return super().train(False)

    @property
    def embedding_dim(self) -> int:
        return int(self.model.text_projection.shape[-1])

    @property
    def text_width(self) -> int:
        return int(self.model.ln_final.normalized_shape[0])

    @property
    def text_length(self) -> int:
        return int(self.model.context_length)

    @property
    def vocab_size(self) -> int:
        return int(self.model.vocab_size)

    def tokenize(self, captions: list[str]) -> Tensor:
        """[B, L] int64; captions that are too long are cut."""
        return self.tokenizer(captions, context_length=self.text_length)  # type: ignore[no-any-return]

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Image embeddings [B, E] float32 of images [B, 3, S, S] preprocessed by `preprocess` or `resize`; of unit norm
        unless `image_embeddings` says otherwise.

        Raises:
            InputError: this CLIP was imported without an image encoder.
        """
        return self.encode_images(images)

    def encode_images(self, images: Tensor) -> Tensor:
        """As `embed_images`, and differentiable in the images, for CLIP guidance.

        Raises:
            InputError: this CLIP was imported without an image encoder.
        """
        if self.image_embeddings == "none":
            raise InputError(
                "clip: got a picture, but this CLIP was imported without an image encoder. Import it together with the "
                "folder of the pipeline for image variations."
            )
        embedding = self.model.encode_image(images).float()  # [B, E]
        return F.normalize(embedding, dim=-1) if self.image_embeddings == "unit" else embedding

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> TextFeatures:
        """All that the prior reads of a caption; tokens [B, L]. Encodings of padding are zero where it need not be read.

        Most captions are a fraction of L. Where no token is affected by those after it, captions of about the same length
        are read together, and only as far as they go.
        """
        mask = text_mask(tokens)  # [B, L]
        lengths = self._lengths_to_read(mask)  # [B]
        text_encodings = torch.zeros(*tokens.shape, self.text_width, device=tokens.device)  # [B, L, W]
        text_projection = torch.zeros(len(tokens), self.embedding_dim, device=tokens.device)  # [B, E]
        for length in sorted(set(lengths.tolist())):
            rows = (lengths == length).nonzero()[:, 0]
            text_encodings[rows, :length], text_projection[rows] = self._read(tokens[rows, :length])
        return TextFeatures(F.normalize(text_projection, dim=-1), text_encodings, mask, text_projection)

    def _lengths_to_read(self, mask: Tensor) -> Tensor:
        """How many tokens of each caption suffice, [B] int64, in steps of `LENGTH_STEP`."""
        length = mask.shape[1]
        causal = self.model.attn_mask is not None and self.model.text_pool_type in ("argmax", "eos")
        kept = mask.sum(dim=1) if causal else torch.full((len(mask),), length, device=mask.device)
        return (kept + LENGTH_STEP - 1).div(LENGTH_STEP, rounding_mode="floor").mul(LENGTH_STEP).clamp(max=length)

    def _read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, l] int64, l <= L -> encodings [B, l, W] and projections [B, E], float32."""
        length = tokens.shape[1]
        shortened = {"model.positional_embedding": self.model.positional_embedding[:length]}
        if self.model.attn_mask is not None:
            shortened["model.attn_mask"] = self.model.attn_mask[:length, :length]
        output = torch.func.functional_call(_TextEncoder(self.model), shortened, (tokens,))
        return output["text_intermediates"][-1].float(), output["text_features"].float()

    def resize(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] as this model wants them: [B, 3, S, S], its own mean and standard deviation."""
        return prepare(self.model, images)


class _TextEncoder(nn.Module):
    """The part of an open_clip model that is called with captions, as `functional_call` wants it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        return self.model.forward_intermediates(  # type: ignore[no-any-return]
            text=tokens, text_indices=1, normalize=False, normalize_intermediates=True
        )


def text_mask(tokens: Tensor) -> Tensor:
    """[B, L] token ids -> [B, L] bool, True = keep, at least the first.

    Id 0 is also a word ("!"): padding is only what follows the last other token.
    """
    kept = (tokens != 0).long().flip(1).cumsum(1).flip(1) > 0
    return kept | (torch.arange(tokens.shape[1], device=tokens.device) == 0)


def input_side(model: Any) -> int:
    """Side S in pixels of the square pictures that an open_clip model sees."""
    size = model.visual.preprocess_cfg["size"]
    return int(size if isinstance(size, int) else size[0])


def prepare(model: Any, images: Tensor) -> Tensor:
    """Resize and standardise a batch of images in [-1, 1] for an open_clip model, on its device."""
    settings = model.visual.preprocess_cfg
    side = input_side(model)
    if images.shape[-2:] != (side, side):
        images = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)
    mean = torch.tensor(settings["mean"], device=images.device).view(3, 1, 1)
    std = torch.tensor(settings["std"], device=images.device).view(3, 1, 1)
    return ((images + 1) / 2 - mean) / std


def save(model: Any, name: str, folder: Path) -> None:
    """Write a model trained from one of our architectures as a folder that open_clip loads as "local-dir:<folder>"."""
    import open_clip

    open_clip.add_model_config(OWN_ARCHITECTURES)
    save_with_config(model, open_clip.get_model_config(name), folder)


def save_with_config(model: Any, model_config: dict[str, Any], folder: Path) -> None:
    """The same for a model of any architecture, described as open_clip describes its own."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": model_config, "preprocess_cfg": dict(model.visual.preprocess_cfg)}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(weights, str(folder / "open_clip_model.safetensors"))
