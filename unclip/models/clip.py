"""CLIP models of open_clip, frozen: image embeddings, text features and image preprocessing.

A model has open_clip's name ("ViT-L-14" with a `pretrained` tag or weights file, "hf-hub:org/name", "local-dir:/folder"),
or is one of the small architectures in `open_clip_models/`, to be trained from scratch. The configuration of a folder or a
repository may hold the settings of `ModelSettings` only: none that name a tokenizer or its arguments, with which open_clip
would run code of the folder or load other models.

Letters: B batch, S image size of CLIP's input, L text tokens, W text width, E embedding width.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip import foreign
from unclip.config import nearest, require
from unclip.errors import CheckpointError, ConfigError, InputError

OWN_ARCHITECTURES = Path(__file__).parent / "open_clip_models"

_NEEDS_TRANSFORMERS = (
    "clip.model: got {!r}, which reads text with the package transformers, but it is not installed. "
    "Install the extra unclip[interop] on every node, or name another model."
)

_FOREIGN_TEXT_TOWER = (
    "clip.model: got {!r}, whose text tower is {}, a network of another library. Name a model whose text tower is "
    "open_clip's own, such as 'ViT-L-14' or 'ViT-B-16-SigLIP'."
)

LONGEST_CAPTION = 4098
"""Tokens that hold nearly any caption: ingest keeps 1,000 characters, each of at most four bytes, and a token has at least one
byte. A tokenizer that normalises captions first may make some longer."""
LENGTH_STEP = 16
"""Captions are encoded together if their lengths round up to the same multiple of this."""

ImageEmbeddings = Literal["unit", "raw", "none"]
"""Kind of image embeddings: unit norm, used by all models trained here; the raw projection, read by published unCLIP
decoders (`unclip.interop`); or none, if a stack was imported without an image encoder."""


class TextFeatures(NamedTuple):
    """CLIP's features of a batch of captions."""

    text_embedding: Tensor
    """[B, E] float32, unit norm."""
    text_encodings: Tensor
    """[B, L, W] float32, the text encoder's last hidden states after its final norm."""
    text_mask: Tensor
    """[B, L] bool, True = keep."""
    text_projection: Tensor
    """[B, E] float32, the text embedding before normalisation to unit norm; transformers calls it text_embeds."""


_Rate = Annotated[float, foreign.Range(0, 1)]
_Ratio = Annotated[float, foreign.Range(0.01, 100)]
_Triple = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class _Activation:
    approximate: Literal["none", "tanh"] = "none"


@dataclasses.dataclass(frozen=True)
class _Norm:
    eps: Annotated[float, foreign.Range(1e-12, 1)] = 1e-5


@dataclasses.dataclass(frozen=True)
class _Block:
    """Settings of Transformer blocks."""

    mlp_ratio: _Ratio = 4.0
    ls_init_value: float | None = None
    final_ln_after_pool: bool = False
    output_tokens: bool = False
    act_kwargs: _Activation | None = None
    norm_kwargs: _Norm | None = None
    block_type: Literal["default", "custom"] | None = None
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False


@dataclasses.dataclass(frozen=True)
class _VisionSettings(_Block):
    layers: Annotated[int, foreign.Range(0, 512)] | tuple[foreign.Depth, ...] = 12
    width: foreign.Size = 768
    head_width: foreign.Size = 64
    patch_size: foreign.Resolution | None = 16
    image_size: foreign.Resolution | tuple[foreign.Resolution, foreign.Resolution] = 224
    patch_dropout: _Rate = 0.0
    attentional_pool: bool = False
    attn_pooler_queries: foreign.Size = 256
    attn_pooler_heads: foreign.Size = 8
    no_ln_pre: bool = False
    pos_embed_type: Literal["learnable", "sin_cos_2d"] = "learnable"
    pool_type: Literal["tok", "avg", "none"] = "tok"
    timm_model_name: str | None = None
    timm_model_pretrained: Literal[False] = False
    timm_pool: str = "avg"
    timm_proj: str | None = "linear"
    timm_proj_bias: bool = False
    timm_drop: _Rate = 0.0
    timm_drop_path: _Rate | None = None

    def __post_init__(self) -> None:
        name = self.timm_model_name
        expected = "a network that open_clip's own architectures use"
        require(name is None or name in _timm_networks(), "timm_model_name", name, expected)
        if self.pos_embed_type == "sin_cos_2d":  # which open_clip computes, rather than reads, even for an outline
            side = max(self.image_size) if isinstance(self.image_size, tuple) else self.image_size
            numbers = (side // (self.patch_size or 1)) ** 2 * self.width
            require(numbers <= 2**22, "image_size", self.image_size, f"positions of at most {2**22:,} numbers")


@dataclasses.dataclass(frozen=True)
class _TextSettings(_Block):
    context_length: foreign.Context = 77
    vocab_size: foreign.Size = 49408
    width: foreign.Size = 512
    heads: foreign.Size = 8
    layers: foreign.Depth = 12
    embed_cls: bool = False
    pad_id: int = 0
    eos_id: int = 2
    no_causal_mask: bool = False
    pool_type: Literal["first", "last", "argmax", "eos", "none"] = "argmax"
    proj_bias: bool = False
    proj_type: Literal["linear", "none"] = "linear"


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Settings that the configuration of a model from elsewhere may have: those of the classes CLIP and CustomTextCLIP."""

    embed_dim: foreign.Size
    vision_cfg: _VisionSettings
    text_cfg: _TextSettings
    quick_gelu: bool = False
    custom_text: bool = False
    init_logit_scale: float = 2.6592
    init_logit_bias: float | None = None
    nonscalar_logit_scale: bool = False


@dataclasses.dataclass(frozen=True)
class _Preprocessing:
    size: foreign.Resolution | tuple[foreign.Resolution, foreign.Resolution] = 224
    mode: Literal["RGB"] = "RGB"
    mean: _Triple = (0.0, 0.0, 0.0)
    std: _Triple = (1.0, 1.0, 1.0)
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: Annotated[int, foreign.Range(0, 255)] = 0

    def __post_init__(self) -> None:
        require(all(each > 0 for each in self.std), "std", self.std, "positive numbers")


@dataclasses.dataclass(frozen=True)
class _Configuration:
    """Content of open_clip_config.json."""

    model_cfg: ModelSettings
    preprocess_cfg: _Preprocessing | None = None


@functools.cache
def _timm_networks() -> frozenset[str]:
    """Names of timm's networks in open_clip's own architectures; timm itself would also take names of repositories."""
    found = (json.loads(path.read_text("utf-8")).get("vision_cfg", {}) for path in architectures().values())
    return frozenset(str(each["timm_model_name"]) for each in found if "timm_model_name" in each)


def check_settings(model: str) -> ModelSettings | None:
    """Check the configuration of a model from a folder or repository, before open_clip reads it; None for other models.

    Raises:
        CheckpointError: a setting is unknown, not allowed or out of range; names it.
    """
    kind, _, place = model.partition(":")
    if kind == "local-dir":
        path = Path(place, "open_clip_config.json")
        return foreign.read(_Configuration, foreign.read_json(path), path).model_cfg
    if kind == "hf-hub":
        import open_clip

        return foreign.read(ModelSettings, open_clip.get_model_config(model), model)
    return None


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Load models only from files of this machine, in a `with` block. Pretrained weights must have been fetched before."""
    try:
        from huggingface_hub import constants
    except ImportError:
        yield
        return
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def check_name(model: str, pretrained: str | None) -> None:
    """Check a model's name without loading anything.

    Raises:
        ConfigError: open_clip does not know the model, or a required package, folder or weights file is missing.
        CheckpointError: a folder has settings that are not allowed, or no single file of safetensors.
    """
    if model.startswith("hf-hub:"):
        return
    if model.startswith("local-dir:"):
        config = Path(model.removeprefix("local-dir:"), "open_clip_config.json")
        if not config.is_file():
            raise ConfigError(
                f"clip.model: got {model!r}, but {config} does not exist. Name a folder saved by open_clip."
            )
        check_settings(model)
        _weights_file(config.parent)
        return
    if model not in architectures():
        raise ConfigError(
            f"clip.model: got {model!r}, which open_clip does not know. {nearest(model, architectures())}"
        )
    facts = json.loads(architectures()[model].read_text("utf-8"))
    text = facts.get("text_cfg", {})
    if "hf_model_name" in text:
        raise ConfigError(_FOREIGN_TEXT_TOWER.format(model, text["hf_model_name"]))
    if "hf_tokenizer_name" in text and importlib.util.find_spec("transformers") is None:
        raise ConfigError(_NEEDS_TRANSFORMERS.format(model))
    if is_path(pretrained):
        if "hf_tokenizer_name" in text:
            raise ConfigError(
                f"clip.pretrained: got the file {pretrained!r} for {model}, expected a tag of open_clip, as a stack cannot hold "
                "a model with a tokenizer of transformers. Name a tag, or a model with CLIP's own tokenizer."
            )
        if "multimodal_cfg" in facts:
            raise ConfigError(
                f"clip.pretrained: got the file {pretrained!r} for {model}, expected a tag of open_clip, as a stack cannot hold "
                "a model that also writes captions. Name a tag, or another model."
            )
        if not Path(str(pretrained)).expanduser().is_file():
            raise ConfigError(
                f"clip.pretrained: {pretrained!r} does not exist. Name a weights file or a tag of open_clip."
            )
    elif pretrained is None and "multimodal_cfg" in facts:
        raise ConfigError(
            f"clip.model: got {model!r}, which also writes captions, so it is not trained here. Give a tag of its weights "
            "as clip.pretrained, or name another model."
        )


def is_path(pretrained: str | None) -> bool:
    """Return True if `pretrained` names a file rather than a tag."""
    return pretrained is not None and ("/" in pretrained or "." in pretrained)


def check_tag(model: str, tag: str) -> None:
    """Check that open_clip has weights of one of its models under a tag. Imports open_clip, which takes seconds.

    Raises:
        ConfigError: it has not; names the nearest tag.
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag.lower().replace("-", "_") not in {each.lower().replace("-", "_") for each in tags}:
        hint = nearest(tag, tags) if tags else "open_clip has no weights of it."
        raise ConfigError(f"clip.pretrained: open_clip knows no tag {tag!r} of {model}. {hint}")


def architectures() -> dict[str, Path]:
    """Architecture files of all models known to open_clip and this library, by model name."""
    spec = importlib.util.find_spec("open_clip")  # finding a package does not import it
    folders = [OWN_ARCHITECTURES]
    if spec is not None and spec.submodule_search_locations:
        folders.append(Path(spec.submodule_search_locations[0], "model_configs"))
    return {path.stem: path for folder in folders for path in folder.glob("*.json")}


def is_named(model: str, pretrained: str | None) -> bool:
    """Return True if open_clip or this library knows a model by its name and tag, without a file of others."""
    return model in architectures() and re.fullmatch(r"[A-Za-z0-9_-]+", pretrained or "none") is not None


def create(model: str, pretrained: str | None) -> nn.Module:
    """Create the open_clip model on the CPU; with random weights if `pretrained` is None and the name implies no weights.

    Raises:
        CheckpointError: open_clip could not load the model; includes open_clip's message.
    """
    import open_clip

    open_clip.add_model_config(OWN_ARCHITECTURES)
    check_settings(model)
    try:
        if ":" in model:
            _check_size(model)
        elif pretrained is not None and Path(pretrained).is_file():
            _check_archive(Path(pretrained))
        return open_clip.create_model(model, pretrained=pretrained, weights_only=True)  # type: ignore[no-any-return]
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:  # damaged files make open_clip raise almost any exception
        remedy = ""
        if pretrained is not None and _is_offline():
            code = f"import open_clip; open_clip.create_model({model!r}, {pretrained!r})"
            remedy = f' A stack is loaded without a network. Fetch its CLIP once: python -c "{code}"'
        message = f"clip: open_clip could not load {model!r} ({pretrained!r}): {str(error).rstrip('.')}.{remedy}"
        raise CheckpointError(message) from error


def _check_size(model: str) -> None:
    """Compare the settings of a folder or repository with its file of weights, before anything of their size is allocated.

    Raises:
        CheckpointError: they make a network of far more weights than the file holds.
    """
    from open_clip.pretrained import download_pretrained_from_hf

    kind, _, place = model.partition(":")
    path = Path(download_pretrained_from_hf(place)) if kind == "hf-hub" else _weights_file(Path(place))
    _check_archive(path)
    found = _count_weights(path)
    expected = sum(value.numel() for value in outline(model).state_dict().values())
    if expected > 2 * found:  # open_clip compares the shapes, but for position embeddings, which it resizes
        raise CheckpointError(
            f"{path}: got at most {found:,} weights, expected the {expected:,} of a network with the settings of its "
            "open_clip_config.json. Take both files from one model."
        )


def _count_weights(path: Path) -> int:
    """Number of weights in a file, from its header; of a pickle, the number of its bytes, which is more."""
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return path.stat().st_size
    with safe_open(str(path), framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _weights_file(folder: Path) -> Path:
    """Only file of weights in a folder, which is no pickle.

    Raises:
        CheckpointError: there is none, or another one; says how to convert a pickle.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    if len(found) != 1 or found[0].suffix != ".safetensors":
        names = ", ".join(path.name for path in found) or "none"
        code = "from safetensors.torch import save_file; save_file(torch.load(FILE, weights_only=True), NEW_FILE)"
        raise CheckpointError(
            f"{folder}: got the weights {names}, expected one file *.safetensors, as a folder's pickles are not read. Keep "
            f'open_clip_model.safetensors only. If it is missing, make it: python -c "import torch; {code}"'
        )
    return found[0]


def _check_archive(path: Path) -> None:
    """Refuse a zip archive, such as those of torch.save, whose entries are larger than the file when they are read.

    Raises:
        CheckpointError: an entry is compressed, or entries overlap; names the file.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (
        zipfile.BadZipFile,
        ValueError,
        NotImplementedError,
    ) as error:  # names and versions that Python does not read
        raise CheckpointError(f"{path}: cannot be read: {error}. Copy it again.") from error
    is_stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not is_stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(
            f"{path}: got an archive with compressed or overlapping entries, expected entries that are stored, as torch.save "
            "writes them. Save the weights again with safetensors or torch.save."
        )


def outline(model: str) -> nn.Module:
    """Create the model on the meta device, without weights; for counting, from its configuration only.

    Raises:
        ConfigError: the configuration is not on this machine.
    """
    import open_clip

    shape_of(model)
    logger = logging.getLogger()
    logger.addFilter(_is_no_warning_of_weights)  # open_clip warns that it loads none
    try:
        with torch.device("meta"):
            return open_clip.create_model(model, load_weights=False, device="meta")  # type: ignore[no-any-return]
    finally:
        logger.removeFilter(_is_no_warning_of_weights)


def _is_no_warning_of_weights(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("No pretrained weights loaded")


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
    """Sizes of a model's outputs, from its configuration only.

    Raises:
        ConfigError: the configuration is not on this machine, or it does not give the sizes.
    """
    if settings := check_settings(model):
        sizes = settings.text_cfg
        return ClipShape(settings.embed_dim, sizes.context_length, sizes.width, sizes.vocab_size)
    import open_clip

    open_clip.add_model_config(OWN_ARCHITECTURES)
    facts = open_clip.get_model_config(model)
    text = (facts or {}).get("text_cfg", {})
    if not {"context_length", "vocab_size", "width"} <= text.keys():
        raise ConfigError(
            f"clip.model: got {model!r}, whose sizes are not in a configuration on this machine. "
            "Name an architecture of open_clip, or a folder saved by it."
        )
    return ClipShape(facts["embed_dim"], text["context_length"], text["width"], text["vocab_size"])


def tokenizer(model: str) -> Any:
    """open_clip's tokenizer for a model.

    Raises:
        ConfigError: the tokenizer needs transformers, which is not installed.
    """
    import open_clip

    open_clip.add_model_config(OWN_ARCHITECTURES)
    check_settings(model)
    try:
        return open_clip.get_tokenizer(model)
    except ImportError as error:
        raise ConfigError(_NEEDS_TRANSFORMERS.format(model)) from error


class Clip(nn.Module):
    """A frozen open_clip model; it stays in evaluation mode."""

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
        """Stay in evaluation mode, even if a parent module switches to training mode."""
        return super().train(False)

    @property
    def tower(self) -> Any:
        """Text tower: the model itself in open_clip's class CLIP, a part of it in CustomTextCLIP (SigLIP, EVA) and CoCa."""
        return getattr(self.model, "text", self.model)

    @property
    def embedding_dim(self) -> int:
        projection = self.tower.text_projection
        if projection is None:
            return self.text_width
        return int(projection.out_features if isinstance(projection, nn.Linear) else projection.shape[-1])

    @property
    def text_width(self) -> int:
        return int(self.tower.ln_final.normalized_shape[0])

    @property
    def text_length(self) -> int:
        return int(self.tower.context_length)

    @property
    def vocab_size(self) -> int:
        return int(self.tower.vocab_size)

    @property
    def padding_id(self) -> int:
        """Id with which the tokenizer pads captions: 0 in CLIP's own, another in tokenizers of other libraries."""
        inner = getattr(self.tokenizer, "tokenizer", None)
        return int(getattr(inner, "pad_token_id", 0) or 0)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Token ids [B, L] int64, padded with 0 whatever the tokenizer's own padding is; long captions are truncated."""
        tokens: Tensor = self.tokenizer(captions, context_length=self.text_length)
        return tokens.masked_fill(_is_trailing(tokens, self.padding_id), 0) if self.padding_id else tokens

    def count_lost(self, captions: list[str], tokens: Tensor) -> Tensor:
        """Number of tokens of each caption that `tokenize` has cut off: [B] int64."""
        lost = torch.zeros(len(captions), dtype=torch.long)
        full = torch.nonzero(text_mask(tokens)[:, -1]).flatten().tolist()
        if full:
            length, is_cut = LONGEST_CAPTION, True
            while is_cut:
                whole: Tensor = self.tokenizer([captions[row] for row in full], context_length=length)
                is_used = ~_is_trailing(whole, self.padding_id)
                is_cut = bool(is_used[:, -1].any()) and whole.shape[1] >= length  # else its length is fixed
                length *= 2
            lost[full] = is_used.sum(dim=1) - tokens.shape[1]
        return lost.clamp(min=0)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Image embeddings [B, E] float32 of images [B, 3, S, S] from `preprocess` or `resize`.

        They have unit norm unless `image_embeddings` is "raw".

        Raises:
            InputError: this CLIP was imported without an image encoder.
        """
        return self.encode_images(images)

    def encode_images(self, images: Tensor) -> Tensor:
        """Like `embed_images`, but differentiable in the images, for CLIP guidance.

        Raises:
            InputError: this CLIP was imported without an image encoder.
        """
        if self.image_embeddings == "none":
            raise InputError(
                "clip: got an image, but this CLIP was imported without an image encoder. Import it together with the "
                "folder of the pipeline for image variations."
            )
        embedding = self.model.encode_image(images, normalize=False).float()  # [B, E]
        return F.normalize(embedding, dim=-1) if self.image_embeddings == "unit" else embedding

    @torch.no_grad()
    def encode_text(self, tokens: Tensor, encodes_padding: bool = False) -> TextFeatures:
        """Text features of captions, from tokens [B, L]. Encodings of padding are zero if it was not encoded.

        Most captions are much shorter than L. If attention is causal, captions of similar length are encoded together, and
        only up to that length.

        Args:
            encodes_padding: encode padding too, as repeated end-of-text tokens: the padding of transformers' CLIPTokenizer, which
                Stable Diffusion 1 reads.
        """
        mask = text_mask(tokens)  # [B, L]
        lengths = self._encoded_lengths(mask)  # [B]
        if encodes_padding:
            tokens = tokens.masked_fill(~mask, getattr(self.tokenizer, "eot_token_id", 0))
            lengths = torch.full_like(lengths, tokens.shape[1])
        text_encodings = torch.zeros(*tokens.shape, self.text_width, device=tokens.device)  # [B, L, W]
        text_projection = torch.zeros(len(tokens), self.embedding_dim, device=tokens.device)  # [B, E]
        for length in sorted(set(lengths.tolist())):
            rows = (lengths == length).nonzero()[:, 0]
            text_encodings[rows, :length], text_projection[rows] = self._encode_tokens(tokens[rows, :length])
        return TextFeatures(F.normalize(text_projection, dim=-1), text_encodings, mask, text_projection)

    def _encoded_lengths(self, mask: Tensor) -> Tensor:
        """Number of tokens to encode of each caption, [B] int64, rounded up to a multiple of `LENGTH_STEP`."""
        length = mask.shape[1]
        tower = self.tower
        pool_type = tower.text_pool_type if tower is self.model else tower.pool_type
        ends_at_end = pool_type in ("argmax", "eos") and getattr(tower, "cls_emb", None) is None
        causal = tower.attn_mask is not None and ends_at_end
        kept = mask.sum(dim=1) if causal else torch.full((len(mask),), length, device=mask.device)
        return (kept + LENGTH_STEP - 1).div(LENGTH_STEP, rounding_mode="floor").mul(LENGTH_STEP).clamp(max=length)

    def _encode_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode tokens [B, l] int64, l <= L; returns encodings [B, l, W] and projections [B, E], float32."""
        if self.padding_id:
            tokens = tokens.masked_fill(_is_trailing(tokens, 0), self.padding_id)
        length, tower, shortened = tokens.shape[1], self.tower, {}
        if length < self.text_length:
            shortened["tower.positional_embedding"] = tower.positional_embedding[:length]
            if tower.attn_mask is not None:
                shortened["tower.attn_mask"] = tower.attn_mask[:length, :length]
        output = torch.func.functional_call(_TextEncoder(tower, tower is self.model), shortened, (tokens,))
        return output["text_intermediates"][-1].float(), output["text_features"].float()

    def resize(self, images: Tensor) -> Tensor:
        """Resize and standardise images [B, 3, H, W] in [-1, 1] for this model; returns [B, 3, S, S]."""
        return prepare(self.model, images)


class _TextEncoder(nn.Module):
    """Text tower of an open_clip model, as a module for `functional_call`."""

    def __init__(self, tower: Any, is_whole_model: bool) -> None:
        super().__init__()
        self.tower, self.is_whole_model = tower, is_whole_model

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        options: dict[str, Any] = {"text_indices": 1, "normalize": False}
        if not self.is_whole_model:
            options = {"indices": 1, "output_fmt": "NLC"}
        return self.tower.forward_intermediates(text=tokens, normalize_intermediates=True, **options)  # type: ignore[no-any-return]


def _is_trailing(tokens: Tensor, value: int) -> Tensor:
    """Mask [B, L] of the tokens at the end of each row that equal a value."""
    return (tokens != value).long().flip(1).cumsum(1).flip(1) == 0


def text_mask(tokens: Tensor) -> Tensor:
    """Mask of non-padding tokens: [B, L] token ids -> [B, L] bool, True = keep; the first is always kept.

    Id 0 is also a word ("!"), so only the zeros after the last nonzero token are padding.
    """
    return ~_is_trailing(tokens, 0) | (torch.arange(tokens.shape[1], device=tokens.device) == 0)


def input_size(model: Any) -> int:
    """Image size S of an open_clip model's square input, pixels."""
    size = model.visual.preprocess_cfg["size"]
    return int(size if isinstance(size, int) else size[0])


def prepare(model: Any, images: Tensor) -> Tensor:
    """Resize and standardise a batch of images in [-1, 1] for an open_clip model, of which only `visual` is read."""
    settings = model.visual.preprocess_cfg
    size = input_size(model)
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    mean = torch.tensor(settings["mean"], device=images.device).view(3, 1, 1)
    std = torch.tensor(settings["std"], device=images.device).view(3, 1, 1)
    return ((images + 1) / 2 - mean) / std


def save(model: Any, name: str, folder: Path) -> None:
    """Save a model of one of our architectures to a folder that open_clip loads as "local-dir:<folder>"."""
    import open_clip

    open_clip.add_model_config(OWN_ARCHITECTURES)
    save_with_config(model, open_clip.get_model_config(name), folder)


def save_pretrained(model: str, pretrained: str | None, folder: Path) -> None:
    """Save a model that is given by a repository or a weights file to a folder that needs neither.

    Raises:
        CheckpointError: the folder could not be loaded, because its configuration has a setting that is not allowed there.
    """
    import open_clip

    save_with_config(create(model, pretrained), open_clip.get_model_config(model), folder)
    check_settings(f"local-dir:{folder}")


def save_with_config(model: Any, model_config: dict[str, Any], folder: Path) -> None:
    """Save a model of any architecture like `save`; model_config has the format of open_clip's own."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": model_config, "preprocess_cfg": dict(model.visual.preprocess_cfg)}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(weights, str(folder / "open_clip_model.safetensors"))
