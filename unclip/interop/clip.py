"""open_clip models: lossless export to and import from transformers' folders. Transformers itself is not needed.

    text_encoder/       CLIPTextModelWithProjection
    tokenizer/          CLIPTokenizer, from open_clip's own byte-pair encoding
    image_encoder/      CLIPVisionModelWithProjection
    feature_extractor/  CLIPImageProcessor

Text: the same tokens give the same projection and the same hidden states after the final norm. Tokens agree except that
open_clip first repairs captions (mojibake, HTML entities, curly quotes) and transformers' CLIPTokenizer does not. Padding is
"<|endoftext|>" in transformers and 0 in open_clip, which has no effect: no token attends to a later one, and nothing reads
padding. It cannot be token 0 in transformers, which is "!": the tokenizer would read every "!" of a caption as padding.

Images: models trained here read unit-norm image embeddings, but diffusers' pipelines give their decoder the unnormalised
projection p. So the exported encoder has one extra layer, which normalises. Its attention adds nothing. Its second norm and
first matrix are the model's last norm and projection, used twice, as p and -p, since gelu(p) - gelu(-p) = p undoes the
activation. Its output is GAIN * B p, with orthonormal columns B of sum zero, and outweighs the residual x. The last norm then
divides B p by its length, and the last projection removes B. The residual leaves an error below |x| / (GAIN |p|) in a unit
embedding, about 2e-4 for OpenAI's CLIPs. Import removes the extra layer. An encoder without it belongs to a stack with
unnormalised embeddings ("raw"), such as Karlo's.

Refused: towers other than plain CLIP Transformers (ResNets, timm, layer scale, other pooling); other models' tokenizers.

Letters: L text tokens, W width of a tower, E embedding width.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from unclip import foreign
from unclip.errors import CheckpointError, InputError
from unclip.interop import folders
from unclip.interop.folders import TRANSFORMERS_WEIGHTS
from unclip.models.clip import Clip, ImageEmbeddings
from unclip.training.objective import Tensors

GAIN = 2.0**14
"""Factor by which the normalising layer outweighs the residual; larger is more exact, until float16 overflows."""

_TEXT = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_VISION = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_BLOCK = {
    "ln_1.{}": ("layer_norm1.{}",),
    "attn.in_proj_{}": ("self_attn.q_proj.{}", "self_attn.k_proj.{}", "self_attn.v_proj.{}"),
    "attn.out_proj.{}": ("self_attn.out_proj.{}",),
    "ln_2.{}": ("layer_norm2.{}",),
    "mlp.c_fc.{}": ("mlp.fc1.{}",),
    "mlp.c_proj.{}": ("mlp.fc2.{}",),
}
"""open_clip's parameters of a block -> transformers' parameters; several if open_clip's are fused."""

_ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELU": "gelu"}
_START, END = "<|startoftext|>", "<|endoftext|>"


class _Tower(NamedTuple):
    """Names of a tower's parameters in open_clip and in transformers."""

    names: dict[str, str]
    blocks: str
    their_blocks: str
    projection: str
    their_projection: str


_TEXT_TOWER = _Tower(
    _TEXT, "transformer.resblocks", "text_model.encoder.layers", "text_projection", "text_projection.weight"
)
_VISION_TOWER = _Tower(
    _VISION, "visual.transformer.resblocks", "vision_model.encoder.layers", "visual.proj", "visual_projection.weight"
)


def export_text(clip: Clip, folder: str | Path, *, with_projection: bool = True) -> None:
    """Write `text_encoder/` and `tokenizer/` in a local folder.

    Args:
        with_projection: write the projection to text embeddings too; without it, the class is CLIPTextModel.

    Raises:
        InputError: the text tower or the tokenizer is not that of a plain CLIP; nothing is written.
    """
    settings, tensors = text_to_transformers(clip)
    if not with_projection:
        del tensors[_TEXT_TOWER.their_projection]
        settings["architectures"] = ["CLIPTextModel"]
    _check_tokenizer(clip)
    folders.write(Path(folder, "text_encoder"), settings, tensors, TRANSFORMERS_WEIGHTS)
    vocabulary, merges = _byte_pairs()
    tokenizer = Path(folder, "tokenizer")
    folders.write_json(tokenizer / "vocab.json", vocabulary)
    (tokenizer / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges), "utf-8")
    special = {"bos_token": _START, "eos_token": END, "pad_token": END, "unk_token": END}
    folders.write_json(tokenizer / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": clip.text_length, "do_lower_case": True}
    folders.write_json(tokenizer / "tokenizer_config.json", {**special, **settings})


def export_images(clip: Clip, folder: str | Path) -> None:
    """Write `image_encoder/` and `feature_extractor/` in a local folder.

    Raises:
        InputError: the vision tower or the preprocessing of images is not that of a plain CLIP; nothing is written.
    """
    settings, tensors = vision_to_transformers(clip)
    processor = _image_processor(clip)
    folders.write(Path(folder, "image_encoder"), settings, tensors, TRANSFORMERS_WEIGHTS)
    folders.write_json(Path(folder, "feature_extractor", "preprocessor_config.json"), processor)


def import_clip(
    folder: str | Path, image_folder: str | Path | None = None, *, with_projection: bool = True, prefix: str = ""
) -> tuple[Clip, dict[str, Any]]:
    """Read `text_encoder/` and `tokenizer/` and, if present, `image_encoder/` and `feature_extractor/`.

    Args:
        folder: folder of the pipeline.
        prefix: of the names of the first two, such as "prior_".
        image_folder: folder of the pipeline with the image encoder; None for `folder`.
        with_projection: False reads a CLIPTextModel, and no image encoder: the CLIP encodes the tokens of captions, and its text
            embedding is the last token's state.

    Returns:
        The CLIP, which embeds images only if there is an image encoder, and its architecture in open_clip's format.

    Raises:
        CheckpointError: files are missing or damaged, or describe a model that open_clip does not have.
    """
    folder = Path(folder)
    image_folder = folder if image_folder is None else Path(image_folder)
    text, state = text_from_transformers(folder / f"{prefix}text_encoder", with_projection)
    _check_vocabulary(folder / f"{prefix}tokenizer")
    quick_gelu, embedding_dim = text.pop("quick_gelu"), text.pop("embed_dim")
    preprocess: dict[str, Any] = {}
    image_embeddings: ImageEmbeddings = "none"
    vision: dict[str, Any] = {"image_size": 1, "patch_size": 1, "width": 1, "head_width": 1, "layers": 0}
    if with_projection and (image_folder / "image_encoder").is_dir():
        vision, vision_state, image_embeddings = vision_from_transformers(image_folder / "image_encoder")
        if (vision.pop("quick_gelu"), vision.pop("embed_dim")) != (quick_gelu, embedding_dim):
            raise CheckpointError(
                f"{image_folder / 'image_encoder'}/config.json: expected the activation and projection_dim of the text "
                "encoder. Take both encoders from one CLIP."
            )
        preprocess = _preprocessing(image_folder / "feature_extractor" / "preprocessor_config.json", vision)
        state |= vision_state
    config = {"embed_dim": embedding_dim, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}
    return _build(config, state, preprocess, image_embeddings, folder), config


def check_same_text_tower(folder: str | Path, first: str, second: str) -> None:
    """Check that two text encoders of a pipeline are one, but for the projection, which only the second has.

    Raises:
        CheckpointError: they differ, or cannot be read.
    """
    folder = Path(folder)
    (settings, tensors), (others, theirs) = (
        text_from_transformers(folder / name, with_projection)
        for name, with_projection in ((first, False), (second, True))
    )
    is_same = all(value == others[name] for name, value in settings.items() if name != "embed_dim")
    for name in tensors.keys() - {_TEXT_TOWER.projection} if is_same else ():
        is_same = is_same and name in theirs and torch.equal(tensors[name], theirs[name])
    if not is_same:
        raise CheckpointError(
            f"{folder}: got other settings or weights in {first}/ than in {second}/, expected the text encoder of one CLIP in "
            "both, as a stack has one CLIP. Import another pipeline."
        )


def text_to_transformers(clip: Clip) -> tuple[dict[str, Any], Tensors]:
    """Settings and weights of the CLIPTextModelWithProjection that is equivalent to CLIP's text tower.

    Raises:
        InputError: the tower is not that of a plain CLIP.
    """
    model = clip.model
    pooling = getattr(model, "text_pool_type", None)
    plain = type(model).__name__ == "CLIP" and pooling == "argmax" and model.attn_mask is not None
    width, tensors, settings = _tower_to_theirs(clip, _TEXT_TOWER, plain)
    settings |= {
        "_class": "CLIPTextModelWithProjection",
        "model_type": "clip_text_model",
        "vocab_size": clip.vocab_size,
        "max_position_embeddings": clip.text_length,
        "hidden_size": width,
        "bos_token_id": clip.vocab_size - 2,
        "eos_token_id": clip.vocab_size - 1,
        "pad_token_id": clip.vocab_size - 1,
    }
    return _with_class(settings), tensors


def vision_to_transformers(clip: Clip) -> tuple[dict[str, Any], Tensors]:
    """Settings and weights of the CLIPVisionModelWithProjection that computes this CLIP's image embeddings, "unit" or "raw".

    Raises:
        InputError: the tower is missing, is not that of a plain CLIP, or is too narrow for the normalising layer.
    """
    visual = clip.model.visual
    if clip.image_embeddings == "none":
        raise InputError("export: this CLIP was imported without an image encoder. Import it with one.")
    plain = type(visual).__name__ == "VisionTransformer" and (visual.pool_type, visual.attn_pool) == ("tok", None)
    plain = plain and visual.image_size[0] == visual.image_size[1] and visual.patch_size[0] == visual.patch_size[1]
    width, tensors, settings = _tower_to_theirs(clip, _VISION_TOWER, plain)
    settings |= {
        "_class": "CLIPVisionModelWithProjection",
        "model_type": "clip_vision_model",
        "image_size": visual.image_size[0],
        "patch_size": visual.patch_size[0],
        "num_channels": 3,
        "hidden_size": width,
    }
    if clip.image_embeddings == "unit":
        embedding_dim = settings["projection_dim"]
        if not (embedding_dim < width and 2 * embedding_dim <= settings["intermediate_size"]):
            raise InputError(
                f"export: got a vision tower of width {width} for embeddings of width {embedding_dim}, expected a wider tower, "
                "in which embeddings can be normalised. Train with such a CLIP, for example ViT-L-14."
            )
        tensors = _add_normalisation(tensors, settings["num_hidden_layers"], settings["intermediate_size"])
        settings["num_hidden_layers"] += 1
    return _with_class(settings), tensors


def text_from_transformers(folder: Path, with_projection: bool = True) -> tuple[dict[str, Any], Tensors]:
    """Read a text tower: open_clip's settings (with `quick_gelu` and `embed_dim`) and weights.

    Args:
        with_projection: False for a CLIPTextModel, whose projection becomes the identity.

    Raises:
        CheckpointError: files are missing or damaged, or describe a model that open_clip does not have.
    """
    path = folder / "config.json"
    settings = foreign.read_json(path)
    settings = settings.get("text_config") or settings  # older folders hold the settings of a whole CLIPModel
    tower = foreign.read(_TextSettings, settings, path, ignore_others=True)
    ours = _describe_tower(path, tower)
    if tower.eos_token_id not in (2, tower.vocab_size - 1):
        raise CheckpointError(
            f"{path}: got eos_token_id = {tower.eos_token_id}, expected the last of the vocabulary, {tower.vocab_size - 1}, or 2."
        )
    ours |= {
        "context_length": tower.max_position_embeddings,
        "vocab_size": tower.vocab_size,
        "heads": tower.num_attention_heads,
    }
    tensors = folders.read_weights(folder, TRANSFORMERS_WEIGHTS)
    folders.check_depth(path, settings, "num_hidden_layers", tensors)
    if not with_projection:
        prefix = "text_model."  # which CLIPTextModel has only in files of transformers 4 and earlier
        tensors = {name if name.startswith(prefix) else prefix + name: value for name, value in tensors.items()}
        ours["embed_dim"] = tower.hidden_size
    state = _tower_to_ours(folder, _TEXT_TOWER, ours["layers"], tensors, with_projection)
    if not with_projection:
        width = tower.hidden_size
        found = tuple(state[f"{_TEXT_TOWER.blocks}.0.attn.out_proj.weight"].shape)
        if found != (width, width):
            raise CheckpointError(
                f"{folder / TRANSFORMERS_WEIGHTS}: the weights do not fit config.json: got an out_proj.weight {found}, expected "
                f"{(width, width)}."
            )
        state[_TEXT_TOWER.projection] = torch.eye(width)
    return ours, state


def vision_from_transformers(folder: Path) -> tuple[dict[str, Any], Tensors, ImageEmbeddings]:
    """Read a vision tower: open_clip's settings (with `quick_gelu` and `embed_dim`), weights, and the kind of embeddings.

    Raises:
        CheckpointError: files are missing or damaged, or describe a model that open_clip does not have.
    """
    path = folder / "config.json"
    settings = foreign.read_json(path)
    settings = settings.get("vision_config") or settings
    tower = foreign.read(_VisionSettings, settings, path, ignore_others=True)
    ours = _describe_tower(path, tower)
    ours |= {
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "head_width": tower.hidden_size // tower.num_attention_heads,
    }
    tensors = folders.read_weights(folder, TRANSFORMERS_WEIGHTS)
    folders.check_depth(path, settings, "num_hidden_layers", tensors)
    image_embeddings: ImageEmbeddings = "raw"
    original = _remove_normalisation(tensors, ours["layers"], ours["embed_dim"])
    if original is not None:
        tensors, image_embeddings = original, "unit"
        ours["layers"] -= 1
    return ours, _tower_to_ours(folder, _VISION_TOWER, ours["layers"], tensors), image_embeddings


def _names(tower: _Tower, num_layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Pairs of an open_clip parameter and the transformers' parameters it is made of."""
    for name, theirs in tower.names.items():
        yield name, (theirs,)
    for layer in range(num_layers):
        for name, parts in _BLOCK.items():
            for kind in ("weight", "bias"):
                theirs_of_block = tuple(f"{tower.their_blocks}.{layer}.{part.format(kind)}" for part in parts)
                yield f"{tower.blocks}.{layer}.{name.format(kind)}", theirs_of_block


def _tower_to_theirs(clip: Clip, tower: _Tower, plain: bool) -> tuple[int, Tensors, dict[str, Any]]:
    """Width, weights in transformers' format, and the settings that both kinds of tower have."""
    is_vision = tower is _VISION_TOWER
    name_of_tower = "vision" if is_vision else "text"
    state = {key: value for key, value in clip.model.state_dict().items() if key.startswith("visual.") == is_vision}
    for name in ("logit_scale", "logit_bias"):
        state.pop(name, None)
    tower_module = clip.model.visual if is_vision else clip.model
    blocks: Any = tower_module.transformer.resblocks if plain else ()
    names = dict(_names(tower, len(blocks)))
    activations = {type(block.mlp.gelu).__name__ for block in blocks if getattr(block, "mlp", None) is not None}
    exact = all(getattr(block.mlp.gelu, "approximate", "none") == "none" for block in blocks if hasattr(block, "mlp"))
    if {*names, tower.projection} != set(state) or not (activations and exact and activations <= set(_ACTIVATIONS)):
        raise InputError(
            f"export: got a CLIP whose {name_of_tower} tower is a {type(tower_module).__name__} that transformers' CLIP classes "
            "cannot represent, expected a plain CLIP Transformer. Train with such a CLIP, for example ViT-L-14."
        )
    tensors: Tensors = {}
    for name, theirs in names.items():
        tensors |= zip(theirs, state[name].chunk(len(theirs)), strict=True)
    tensors[tower.their_projection] = state[tower.projection].T
    width, embedding_dim = state[tower.projection].shape
    settings = {
        "hidden_act": _ACTIVATIONS[activations.pop()],
        "intermediate_size": blocks[0].mlp.c_fc.out_features,
        "layer_norm_eps": blocks[0].ln_1.eps,
        "num_attention_heads": blocks[0].attn.num_heads,
        "num_hidden_layers": len(blocks),
        "projection_dim": embedding_dim,
    }
    return width, tensors, settings


def _with_class(settings: dict[str, Any]) -> dict[str, Any]:
    class_name = settings.pop("_class")
    return settings | {"architectures": [class_name], "attention_dropout": 0.0, "torch_dtype": "float32"}


_Width = Annotated[int, foreign.Range(1, 2**14)]
"""Width of a tower, of which some weights have the square."""


@dataclasses.dataclass(frozen=True)
class _TowerSettings:
    """Settings of transformers' CLIP towers that are read; the others belong to training."""

    num_hidden_layers: foreign.Depth = 12
    projection_dim: foreign.Size = 512
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class _TextSettings(_TowerSettings):
    hidden_size: _Width = 512
    intermediate_size: foreign.Size = 2048
    num_attention_heads: foreign.Size = 8
    max_position_embeddings: foreign.Context = 77
    vocab_size: foreign.Size = 49408
    eos_token_id: int = 49407


@dataclasses.dataclass(frozen=True)
class _VisionSettings(_TowerSettings):
    hidden_size: _Width = 768
    intermediate_size: foreign.Size = 3072
    num_attention_heads: foreign.Size = 12
    image_size: foreign.Resolution = 224
    patch_size: foreign.Resolution = 32


_Deviation = Annotated[float, foreign.Range(1e-3, 1e3)]
_Crop = foreign.Resolution | dict[str, foreign.Resolution]


@dataclasses.dataclass(frozen=True)
class _ProcessorSettings:
    """Settings of a CLIPImageProcessor that are read."""

    image_mean: tuple[float, float, float]
    image_std: tuple[_Deviation, _Deviation, _Deviation]
    size: _Crop = dataclasses.field(default_factory=lambda: {"shortest_edge": 224})
    crop_size: _Crop | None = None
    resample: int = 3
    do_center_crop: bool = True
    do_resize: Literal[True] = True
    do_rescale: Literal[True] = True
    do_normalize: bool = True
    rescale_factor: Annotated[float, foreign.Range(0.0039, 0.00393)] = 1 / 255


def _describe_tower(path: Path, tower: _TextSettings | _VisionSettings) -> dict[str, Any]:
    """open_clip's settings of a tower, as far as both kinds have them."""
    if tower.layer_norm_eps != 1e-5:
        raise CheckpointError(
            f"{path}: got layer_norm_eps = {tower.layer_norm_eps!r}, expected 1e-05, as open_clip's CLIP supports nothing else."
        )
    ours: dict[str, Any] = {
        "quick_gelu": tower.hidden_act == "quick_gelu",
        "embed_dim": tower.projection_dim,
        "width": tower.hidden_size,
        "layers": tower.num_hidden_layers,
    }
    if tower.intermediate_size != 4 * tower.hidden_size:
        ours["mlp_ratio"] = (tower.intermediate_size + 0.5) / tower.hidden_size  # open_clip rounds it down
    return ours


def _tower_to_ours(
    folder: Path, tower: _Tower, num_layers: int, tensors: Mapping[str, Tensor], with_projection: bool = True
) -> Tensors:
    names = dict(_names(tower, num_layers))
    expected = {name for theirs in names.values() for name in theirs}
    if with_projection:
        expected.add(tower.their_projection)
    found = {name for name in tensors if not name.endswith("position_ids")}  # index tables in older files
    if expected != found:
        raise CheckpointError(
            f"{folder / TRANSFORMERS_WEIGHTS}: the weights do not fit config.json: {len(expected - found)} missing, "
            f"{len(found - expected)} unknown, such as {min(expected ^ found)}."
        )
    try:
        ours = {name: torch.cat([tensors[part] for part in theirs]) for name, theirs in names.items()}
        if with_projection:
            ours[tower.projection] = tensors[tower.their_projection].t().contiguous()
    except RuntimeError as error:  # shapes; the others are compared when the network is built
        raise CheckpointError(
            f"{folder / TRANSFORMERS_WEIGHTS}: the weights do not fit config.json: {foreign.first_lines(error)}"
        ) from error
    return ours


def _build(
    config: dict[str, Any], state: Tensors, preprocess: dict[str, Any], image_embeddings: ImageEmbeddings, folder: Path
) -> Clip:
    """Build the CLIP of an architecture with its weights; without an image encoder, the vision tower is zero and unused."""
    import open_clip
    from open_clip.transform import PreprocessCfg

    try:
        with torch.device("meta"):
            model = open_clip.model.CLIP(**config)
        if image_embeddings == "none":
            empty = {name: value for name, value in model.state_dict().items() if name.startswith("visual.")}
            state |= {name: torch.zeros(value.shape) for name, value in empty.items()}
        state |= {
            "logit_scale": torch.tensor(math.log(100.0))
        }  # used in training only, and not stored in these folders
        model.load_state_dict(state, assign=True)
    except (RuntimeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{folder}: the weights of text_encoder/ or image_encoder/ do not fit their config.json: {foreign.first_lines(error)}"
        ) from error
    model.attn_mask = torch.full((model.context_length,) * 2, -torch.inf).triu(1)  # causal; not part of the weights
    defaults = {name: value for name, value in vars(PreprocessCfg()).items() if name != "size"}
    open_clip.model.set_model_preprocess_cfg(
        model, {**defaults, "size": config["vision_cfg"]["image_size"], **preprocess}
    )
    return Clip(model, "ViT-B-32", image_embeddings)  # a name for which open_clip returns CLIP's own tokenizer


def _columns(width: int, embedding_dim: int) -> Tensor:
    """Orthonormal columns of sum zero, [W, E] float64: those of the cosine transform without the constant one."""
    place = torch.arange(width, dtype=torch.float64)[:, None] + 0.5
    frequency = torch.arange(1, embedding_dim + 1, dtype=torch.float64)
    return (place * frequency * math.pi / width).cos() * math.sqrt(2 / width)


def _normalisation(width: int, intermediate: int, embedding_dim: int) -> dict[str, Tensor]:
    """Weights of the normalising layer that do not depend on the model, and the last projection."""
    columns = _columns(width, embedding_dim)
    out = torch.zeros(width, intermediate, dtype=torch.float64)
    out[:, : 2 * embedding_dim] = GAIN * torch.cat([columns, -columns], dim=1)
    fixed = {"self_attn.out_proj.weight": torch.zeros(width, width), "self_attn.out_proj.bias": torch.zeros(width)}
    for part in ("q", "k", "v"):
        fixed |= {
            f"self_attn.{part}_proj.weight": torch.zeros(width, width),
            f"self_attn.{part}_proj.bias": torch.zeros(width),
        }
    return fixed | {
        "layer_norm1.weight": torch.ones(width),
        "layer_norm1.bias": torch.zeros(width),
        "mlp.fc1.bias": torch.zeros(intermediate),
        "mlp.fc2.weight": out.float(),
        "mlp.fc2.bias": torch.zeros(width),
        "projection": (columns.T / math.sqrt(width)).float(),
    }


_POST, _PROJECTION = "vision_model.post_layernorm", _VISION_TOWER.their_projection


def _add_normalisation(tensors: Tensors, num_layers: int, intermediate: int) -> Tensors:
    """Add a layer to an image encoder that normalises its embeddings."""
    projection = tensors[_PROJECTION]  # [E, W]
    embedding_dim, width = projection.shape
    fixed = _normalisation(width, intermediate, embedding_dim)
    layer = f"{_VISION_TOWER.their_blocks}.{num_layers}"
    first = torch.zeros(intermediate, width)
    first[: 2 * embedding_dim] = torch.cat([projection, -projection])
    added = {f"{layer}.{name}": value for name, value in fixed.items() if name != "projection"}
    return {
        **tensors,
        **added,
        f"{layer}.layer_norm2.weight": tensors[f"{_POST}.weight"],
        f"{layer}.layer_norm2.bias": tensors[f"{_POST}.bias"],
        f"{layer}.mlp.fc1.weight": first,
        f"{_POST}.weight": torch.ones(width),
        f"{_POST}.bias": torch.zeros(width),
        _PROJECTION: fixed["projection"],
    }


def _remove_normalisation(tensors: Tensors, num_layers: int, embedding_dim: int) -> Tensors | None:
    """Undo `_add_normalisation`; None if the encoder has no such layer."""
    layer = f"{_VISION_TOWER.their_blocks}.{num_layers - 1}."
    last = {name.removeprefix(layer): value for name, value in tensors.items() if name.startswith(layer)}
    out, projection = last.get("mlp.fc2.weight"), tensors.get(_PROJECTION)
    if out is None or projection is None or out.dim() != 2 or 2 * embedding_dim > out.shape[1]:
        return None
    width, intermediate = out.shape
    found = last | {"projection": projection}
    shapes: dict[str, tuple[int, ...]] = {
        "projection": (embedding_dim, width),
        "self_attn.out_proj.weight": (width, width),
        "layer_norm2.weight": (width,),
        "layer_norm2.bias": (width,),
        "mlp.fc1.weight": (intermediate, width),
    }
    if any(name not in found or tuple(found[name].shape) != shape for name, shape in shapes.items()):
        return None  # else what is built below is as large as what the file holds
    expected = _normalisation(width, intermediate, embedding_dim)
    if not all(name in found and torch.equal(found[name], value) for name, value in expected.items()):
        return None
    kept = {name: value for name, value in tensors.items() if not name.startswith(layer)}
    return kept | {
        f"{_POST}.weight": last["layer_norm2.weight"],
        f"{_POST}.bias": last["layer_norm2.bias"],
        _PROJECTION: last["mlp.fc1.weight"][:embedding_dim],
    }


@functools.cache
def _byte_pairs() -> tuple[dict[str, int], list[str]]:
    """Vocabulary and merges of CLIP's tokenizer, with transformers' names of the special tokens."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    names = {tokenizer.sot_token_id: _START, tokenizer.eot_token_id: END}
    vocabulary = {names.get(index, token): index for token, index in tokenizer.encoder.items()}
    return vocabulary, [" ".join(pair) for pair in tokenizer.bpe_ranks]


def _check_tokenizer(clip: Clip) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer: Any = clip.tokenizer
    is_own = isinstance(tokenizer, SimpleTokenizer) and tokenizer.vocab_size == len(_byte_pairs()[0]) == clip.vocab_size
    cleans_alike = is_own and tokenizer.clean_fn("A  a") == "a a" and tokenizer.clean_fn("a.") == "a."
    if not cleans_alike or tokenizer.reduction_fn is not None:
        raise InputError(
            f"export: got the tokenizer {type(tokenizer).__name__} of {clip.vocab_size} tokens, expected CLIP's own. Train "
            "with a CLIP that uses it, for example ViT-L-14."
        )


@dataclasses.dataclass(frozen=True)
class _TokenizerFile:
    model: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _BytePairs:
    vocab: dict[str, int]
    merges: tuple[str | tuple[str, str], ...]


def _check_vocabulary(folder: Path) -> None:
    """Refuse a tokenizer that is not CLIP's own, from `vocab.json` and `merges.txt` or from `tokenizer.json`."""
    if (folder / "vocab.json").is_file():
        vocabulary: Any = foreign.read_json(folder / "vocab.json")
        lines = foreign.read_text(folder / "merges.txt").splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
    else:
        path = folder / "tokenizer.json"
        tokenizer = foreign.read(_TokenizerFile, foreign.read_json(path), path, ignore_others=True)
        found = foreign.read(_BytePairs, tokenizer.model, f"{path}: model", ignore_others=True)
        vocabulary = found.vocab
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in found.merges]
    if (vocabulary, merges) != _byte_pairs():
        raise CheckpointError(
            f"{folder}: got a vocabulary or merges that are not CLIP's own, which open_clip uses. Import another pipeline."
        )


def _image_processor(clip: Clip) -> dict[str, Any]:
    """Settings of the CLIPImageProcessor that prepares images as open_clip does."""
    settings = clip.model.visual.preprocess_cfg
    resolution = clip.model.visual.image_size[0]
    mode, interpolation = settings["resize_mode"], settings["interpolation"]
    if mode not in ("shortest", "squash") or interpolation not in ("bicubic", "bilinear"):
        raise InputError(
            f"export: got images prepared with resize_mode = {mode!r} and interpolation = {interpolation!r}, expected "
            "'shortest' or 'squash' and 'bicubic' or 'bilinear', as CLIPImageProcessor supports nothing else."
        )
    square = {"height": resolution, "width": resolution}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resolution} if mode == "shortest" else square,
        "resample": {"bilinear": 2, "bicubic": 3}[interpolation],
        "do_center_crop": mode == "shortest",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(settings["mean"]),
        "image_std": list(settings["std"]),
    }


def _preprocessing(path: Path, vision: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's settings that prepare images as a CLIPImageProcessor does."""
    settings = foreign.read(_ProcessorSettings, foreign.read_json(path), path, ignore_others=True)
    resolution = vision["image_size"]
    squash = {"height": resolution, "width": resolution}
    if settings.size in (resolution, {"shortest_edge": resolution}) and settings.do_center_crop:
        mode = "shortest"
    elif settings.size == squash:
        mode = "squash"
    else:
        raise CheckpointError(
            f"{path}: got size = {settings.size!r}, expected the {resolution} pixels of image_encoder/config.json."
        )
    interpolation = {2: "bilinear", 3: "bicubic"}.get(settings.resample)
    if interpolation is None or not settings.do_normalize:
        raise CheckpointError(
            f"{path}: got resample = {settings.resample}, do_normalize = {settings.do_normalize}, expected resample 2 or 3 and "
            "do_normalize True, as open_clip supports nothing else."
        )
    mean, std = list(settings.image_mean), list(settings.image_std)
    return {"resize_mode": mode, "interpolation": interpolation, "mean": mean, "std": std}
