"""Whole stacks to and from the folders of diffusers' UnCLIPPipeline and UnCLIPImageVariationPipeline, without diffusers.

    model_index.json                                          the pipeline's class and those of its parts
    prior/, prior_scheduler/                                  text to image only (`unclip.interop.prior`)
    text_proj/, decoder/, decoder_scheduler/                  (`unclip.interop.decoder`)
    super_res_first/, super_res_last/, super_res_scheduler/   the upsampler, twice if it is one network
    text_encoder/, tokenizer/                                 (`unclip.interop.clip`)
    image_encoder/, feature_extractor/                        variations; beside text to image where CLIP allows it
    upsampler-1024/{unet,scheduler}/                          the second upsampler, which neither pipeline has a place for

Exact: with the sampler "ddpm" at every stage, one candidate (`PIPELINE_SAMPLING`) and a generator of the same seed, the
pipeline and `Stack` draw the same noise and the same picture, up to float32 rounding and to the pipeline's table of
alphas_cumprod, which is float32, too, and has three digits at t = 0. Statistics of embeddings go into weights. Fixed variances
become learned ones whose outputs are constant: the pipeline guides no decoder without them. Learned variances agree where
the network keeps to its range, as it learns to; beyond it they are held at the ends here and go on there.

What a stack must be trained with, everything else is refused:

    CLIP         a plain CLIP whose text encoder is as wide as its embeddings: any ViT-B, -L or -H of open_clip
    prior        diffusion; text_norm "none" or "layer", no self_conditioning
    decoder      text "clip", no inpainting
    upsampler    one; max_noise_level 0
    all three    schedule "cosine" without zero_terminal_snr, prediction_type "eps" or "x0", in [-1, 1]

Not part of a pipeline's folder: samplers, numbers of steps, guidance scales, candidates. Captions are tokenized there without
open_clip's repairs (`unclip.interop.clip`).

Versions of diffusers disagree on where UnCLIPTextProjModel is, and what 0.38 and later save they cannot load. Layouts:
"current" for 0.38 and later; "hub" for 0.37 and earlier, as published pipelines have it; "portable" for both, with a Python
file in `text_proj/` that 0.38 and later run only with trust_remote_code. Importing reads all three, and runs no code.

Letters: B batch, S side of a picture.
"""

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from unclip.config import require, to_dict
from unclip.diffusion.process import DiffusionConfig, PredictionType
from unclip.diffusion.sampling import DiffusionSampling
from unclip.errors import CheckpointError, ConfigError, InputError
from unclip.interop import clip as clips
from unclip.interop import decoder as decoders
from unclip.interop import folders
from unclip.interop import prior as priors
from unclip.models.clip import save_with_config
from unclip.models.decoder import NUM_IMAGE_TOKENS, Decoder
from unclip.models.prior import DiffusionPrior
from unclip.models.text import caption_features
from unclip.models.upsampler import Upsampler
from unclip.systems.system import ClipFiles, StackFiles, save_stack
from unclip.systems.unclip.sampling import DecoderSampling, PriorSampling, SamplingConfig, UpsamplerSampling
from unclip.systems.unclip.stack import Stack
from unclip.training import checkpoints

Layout = Literal["current", "portable", "hub"]
"""Which versions of diffusers load it; see the module."""

_TEXT_PROJECTION: dict[Layout, str] = {
    "current": "diffusers.pipelines.deprecated.unclip.text_proj",
    "portable": "unclip",
    "hub": "unclip",
}
"""Where model_index.json says that UnCLIPTextProjModel is."""

_VERSION: dict[Layout, str] = {"current": "0.38.0", "portable": "0.37.1", "hub": "0.37.1"}

_PORTABLE_MODULE = '''"""UnCLIPTextProjModel, from where this version of diffusers has it."""

try:
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel as _Projection
except ImportError:
    from diffusers.pipelines.unclip.text_proj import UnCLIPTextProjModel as _Projection


class UnCLIPTextProjModel(_Projection):
    pass
'''

_SHARED = {
    "decoder": ("diffusers", "UNet2DConditionModel"),
    "decoder_scheduler": ("diffusers", "UnCLIPScheduler"),
    "super_res_first": ("diffusers", "UNet2DModel"),
    "super_res_last": ("diffusers", "UNet2DModel"),
    "super_res_scheduler": ("diffusers", "UnCLIPScheduler"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}
_PARTS = {
    "UnCLIPPipeline": {
        **_SHARED,
        "prior": ("diffusers", "PriorTransformer"),
        "prior_scheduler": ("diffusers", "UnCLIPScheduler"),
    },
    "UnCLIPImageVariationPipeline": {
        **_SHARED,
        "feature_extractor": ("transformers", "CLIPImageProcessor"),
        "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    },
}
"""Parts of each pipeline besides text_proj -> library and class."""

_PREDICTION_TYPES: dict[PredictionType, str] = {**decoders.PREDICTION_TYPES, "v": "v_prediction"}

Network = TypeVar("Network", Decoder, Upsampler)

PIPELINE_SAMPLING = SamplingConfig(
    prior=PriorSampling(sampler="ddpm", num_steps=25, guidance_scale=4.0, num_candidates=1),
    decoder=DecoderSampling(sampler="ddpm", num_steps=25, guidance_scale=8.0),
)
PIPELINE_UPSAMPLER_SAMPLING = UpsamplerSampling(sampler="ddpm", num_steps=7)
"""What UnCLIPPipeline does when nothing else is asked for, and how imported stacks draw."""


class ImportedStack(NamedTuple):
    """What a folder of a pipeline holds."""

    stack: Stack
    clip_config: dict[str, Any]
    """CLIP's architecture as open_clip describes it."""
    upsampler_1024: Upsampler | None
    """The second upsampler, where there is one."""


def export_stack(
    stack: Stack,
    folder: str | Path,
    *,
    layout: Layout = "current",
    image_variation: bool = False,
    upsampler_1024: Upsampler | None = None,
) -> list[str]:
    """Write a stack as a folder that diffusers loads and draws with; the folder appears whole or not at all.

    Args:
        folder: new, or empty.
        layout: for which versions of diffusers; see the module.
        image_variation: for UnCLIPImageVariationPipeline, pictures to pictures, instead of UnCLIPPipeline.
        upsampler_1024: the second upsampler, written beside the pipeline.

    Returns:
        Sentences for people about what the folder does not hold.

    Raises:
        InputError, ConfigError: the stack does something that the pipeline cannot do, or the folder holds something.
            Nothing is written.
    """
    require(layout in get_args(Layout), "layout", layout, " or ".join(map(repr, get_args(Layout))))
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: got a folder that holds something, expected a new or empty one. Name another.")
    check_exportable(stack, upsampler_1024)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        notes = _write_parts(stack, scratch, layout, image_variation, upsampler_1024)
        scratch.chmod(0o755)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return notes


def check_exportable(stack: Stack, upsampler_1024: Upsampler | None = None) -> None:
    """Say what of a stack the pipelines cannot do, before anything is written.

    Raises:
        ConfigError, InputError: the first such thing, with the setting to train with instead. What prior, decoder and CLIP
            check themselves when they are written is checked there.
    """
    if not isinstance(stack.prior, DiffusionPrior):
        raise InputError("export: got an autoregressive prior, expected prior.kind = 'diffusion', as diffusers has it.")
    if stack.prior.config.diffusion.variance != "fixed_small":
        variance = stack.prior.config.diffusion.variance
        raise _inexpressible("prior.diffusion.variance", variance, "'fixed_small'")
    if len(stack.upsamplers) != 1:
        names = ", ".join(upsampler.config.name for upsampler in stack.upsamplers) or "none"
        raise InputError(
            f"export: got {names}, expected one upsampler, as diffusers' pipelines run no other number. Publish a stack with "
            "the first alone, and give a second one as the model that is written beside it."
        )
    upsampler, side = stack.upsamplers[0].config, stack.decoder.config.unet.image_size
    _check_process("prior", stack.prior.config.diffusion)
    _check_process("decoder", stack.decoder.config.diffusion)
    _check_process("upsampler", upsampler.diffusion)
    if upsampler.max_noise_level:
        raise _inexpressible(
            "upsampler.max_noise_level", upsampler.max_noise_level, "0: the pipeline noises no pictures"
        )
    unet, length = stack.decoder.config.unet, stack.clip.text_length
    sides = {*unet.attention_resolutions, side // 2 ** (len(unet.channel_mult) - 1)}  # the middle attends, too
    if any(each**2 == length + NUM_IMAGE_TOKENS for each in sides):
        # diffusers tells a mask of the context alone by its length, which is that of the pixels here
        raise _inexpressible(
            "the CLIP's context length", length, "one that with 4 more is no picture's number of pixels"
        )
    if upsampler_1024 is not None:
        _scheduler_1024(upsampler_1024.config.diffusion)
        if upsampler_1024.config.low_res_size != upsampler.output_size or upsampler_1024.config.last_step_unet:
            got = upsampler_1024.config.low_res_size
            raise _inexpressible("upsampler_1024.low_res_size", got, f"the first upsampler's {upsampler.output_size}")


def import_stack(folder: str | Path, *, image_variation: str | Path | None = None) -> ImportedStack:
    """Read a stack from the folder of an UnCLIPPipeline, Karlo's or one of `export_stack`.

    Embeddings are not standardised again, as the folder's weights do it; further training should take new statistics.

    Args:
        folder: local; nothing is fetched.
        image_variation: folder of the UnCLIPImageVariationPipeline beside it, for its image encoder; None to look in
            `folder` itself. Without one, the stack embeds no pictures.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit each other; names them.
        ConfigError, InputError: settings that no stack here has.
    """
    folder = Path(folder)
    _check_index(folder, "UnCLIPPipeline")
    if image_variation is not None:
        _check_index(Path(image_variation), "UnCLIPImageVariationPipeline")
    clip, clip_config = clips.import_clip(folder, image_variation)
    null_text = caption_features(clip, clip.tokenize([""]))
    prior = priors.import_prior(folder, null_text)
    decoder = decoders.import_decoder(folder, null_text)
    upsampler = _import_upsampler(folder, decoder.config.unet.image_size)
    widths = {
        "text_encoder": clip.embedding_dim,
        "prior": len(prior.statistics.mean),
        "text_proj": len(decoder.null_embedding),
    }
    if len(set(widths.values())) > 1 or clip.text_width != clip.embedding_dim:
        raise CheckpointError(
            f"{folder}: got embeddings of different widths: {widths}. These parts are not of one stack."
        )
    stack = Stack(clip, prior, decoder.eval(), [upsampler.eval()])
    stack.sampling = pipeline_sampling(upsampler.config.output_size)
    upsampler_1024 = None
    if (folder / "upsampler-1024").is_dir():
        upsampler_1024 = _import_upsampler_1024(folder / "upsampler-1024", upsampler.config.output_size).eval()
    return ImportedStack(stack.requires_grad_(False), clip_config, upsampler_1024)


def save_imported(imported: ImportedStack, folder: str | Path) -> None:
    """Write an imported stack as the local folder that `Stack.load` reads; `stack.json` is written last.

    The second upsampler, where there is one, is written beside the stack, for `generation.load_model`, under its own name:
    `upsampler-1024/` if that is the side of its pictures.
    """
    stack = imported.stack
    prior, decoder = stack.prior, stack.decoder
    sizes = {"text_width": stack.clip.text_width, "text_length": stack.clip.text_length}
    text_shape = None if decoder.text_shape is None else to_dict(decoder.text_shape)
    facts: dict[str, dict[str, Any]] = {
        "prior": {"kind": "prior", "embedding_dim": stack.clip.embedding_dim, **sizes},
        "decoder": {"kind": "decoder", "embedding_dim": stack.clip.embedding_dim, "text_shape": text_shape},
    }
    models: dict[str, Any] = {"prior": prior, "decoder": decoder}
    names = [upsampler.config.name for upsampler in stack.upsamplers]
    models |= dict(zip(names, stack.upsamplers, strict=True))
    if imported.upsampler_1024 is not None:
        models[imported.upsampler_1024.config.name] = imported.upsampler_1024
    save_with_config(stack.clip.model, imported.clip_config, Path(folder, "clip"))
    for name, model in models.items():
        known = facts.get(name, {"kind": "upsampler"})
        known |= {"config": to_dict(model.config), "imported": "UnCLIPPipeline"}
        checkpoints.save(f"{folder}/{name}", {"model": model.state_dict()}, known)
    clip = ClipFiles(f"local-dir:{folder}/clip", image_embeddings=stack.clip.image_embeddings)
    parts = {name: f"{folder}/{name}" for name in ("prior", "decoder", *names)}
    save_stack(str(folder), StackFiles("unclip", parts, clip, sampling=to_dict(stack.sampling)))


def _write_parts(
    stack: Stack, folder: Path, layout: Layout, image_variation: bool, upsampler_1024: Upsampler | None
) -> list[str]:
    """All files of a pipeline, model_index.json last."""
    notes = _sampling_notes(stack)
    class_name = "UnCLIPImageVariationPipeline" if image_variation else "UnCLIPPipeline"
    if not image_variation and isinstance(stack.prior, DiffusionPrior):
        priors.export_prior(stack.prior, folder)
    decoder, upsampler = with_learned_range(stack.decoder), stack.upsamplers[0]
    decoders.export_decoder(decoder, folder)
    if upsampler.config.diffusion.variance == "fixed_large":
        upsampler = with_learned_range(upsampler)
    decoders.export_upsampler(upsampler, folder / "super_res_first")
    decoders.export_upsampler(_last_step(upsampler), folder / "super_res_last")
    clips.export_text(stack.clip, folder)
    try:
        clips.export_images(stack.clip, folder)
    except InputError as error:
        if image_variation:
            raise
        notes.append(f"There is no image encoder, which text to image does without. {error}")
    scheduler = decoders.scheduler_config(upsampler.config.diffusion)
    folders.write_json(folder / "super_res_scheduler" / decoders.SCHEDULER, scheduler)
    if upsampler_1024 is not None:
        decoders.export_upsampler(upsampler_1024, folder / "upsampler-1024" / "unet")
        scheduler = _scheduler_1024(upsampler_1024.config.diffusion)
        folders.write_json(folder / "upsampler-1024" / "scheduler" / decoders.SCHEDULER, scheduler)
        notes.append("The second upsampler is in upsampler-1024; the pipeline does not run it.")
    if layout == "portable":
        (folder / "text_proj" / "unclip.py").write_text(_PORTABLE_MODULE, "utf-8")
    index: dict[str, Any] = {name: list(part) for name, part in _PARTS[class_name].items()}
    index |= {
        "_class_name": class_name,
        "_diffusers_version": _VERSION[layout],
        "text_proj": [_TEXT_PROJECTION[layout], "UnCLIPTextProjModel"],
    }
    folders.write_json(folder / "model_index.json", index)
    return notes


def pipeline_sampling(resolution: int) -> SamplingConfig:
    """`PIPELINE_SAMPLING` with its upsampler's settings, by the resolution of its images."""
    return dataclasses.replace(PIPELINE_SAMPLING, upsamplers={str(resolution): PIPELINE_UPSAMPLER_SAMPLING})


def _sampling_notes(stack: Stack) -> list[str]:
    """Settings of the stack that the pipeline does not keep."""
    [upsampler] = stack.upsampler_sampling(stack.sampling)
    ours = {"prior": stack.sampling.prior, "decoder": stack.sampling.decoder, "upsampler": upsampler}
    theirs = {
        "prior": PIPELINE_SAMPLING.prior,
        "decoder": PIPELINE_SAMPLING.decoder,
        "upsampler": PIPELINE_UPSAMPLER_SAMPLING,
    }
    first = ("sampler", "num_steps", "guidance_scale", "num_candidates")
    others = (*(field.name for field in dataclasses.fields(DiffusionSampling)), "clip_guidance_scale")
    names = dict.fromkeys((*first, *others))
    different = [
        f"{part}.{name} {getattr(mine, name)} (there {getattr(theirs[part], name)})"
        for part, mine in ours.items()
        for name in names
        if hasattr(mine, name) and getattr(mine, name) != getattr(theirs[part], name)
    ]
    if not different:
        return []
    return [
        f"Not in the folder: {', '.join(different)}. Give steps and guidance scales to the pipeline when it draws; its sampler "
        "is always ddpm, and it takes the first candidate."
    ]


def with_learned_range(model: Network) -> Network:
    """The same model with the variances that it was fixed to as learned ones; the model itself where it learns them.

    The network's new outputs are constant, at that end of the range where the fixed variance lies.

    Source: Nichol & Dhariwal 2021, eq. 15.
    """
    process = model.config.diffusion
    if process.variance == "learned_range":
        return model
    end = {"fixed_small": -1.0, "fixed_large": 1.0}[process.variance]
    config: Any = dataclasses.replace(model.config, diffusion=dataclasses.replace(process, variance="learned_range"))
    state = dict(model.state_dict())
    for name in ("unet.output.2", "last_unet.output.2"):
        if f"{name}.weight" in state:
            weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
            state[f"{name}.weight"] = torch.cat([weight, torch.zeros_like(weight)])
            state[f"{name}.bias"] = torch.cat([bias, torch.full_like(bias, end)])
    with torch.device("meta"):
        learned: Any = (
            Decoder(config, len(model.null_embedding), model.text_shape)
            if isinstance(model, Decoder)
            else Upsampler(config)
        )
    learned.load_state_dict(state, assign=True)
    return learned.train(model.training)  # type: ignore[no-any-return]


def _last_step(upsampler: Upsampler) -> Upsampler:
    """The upsampler of the last step on its own: the same one if there is no second network."""
    if upsampler.last_unet is None:
        return upsampler
    with torch.device("meta"):
        last = Upsampler(dataclasses.replace(upsampler.config, last_step_unet=False))
    last.unet.load_state_dict(upsampler.last_unet.state_dict(), assign=True)
    return last


def _inexpressible(setting: str, got: object, expected: str) -> ConfigError:
    return ConfigError(
        f"{setting}: got {got!r}, expected {expected}, as diffusers has nothing else. Train with that setting to export it."
    )


def _check_process(name: str, process: DiffusionConfig) -> None:
    """Whether UnCLIPScheduler can take the steps of a process."""
    if process.schedule != "cosine":
        raise _inexpressible(f"{name}.diffusion.schedule", process.schedule, "'cosine'")
    if process.zero_terminal_snr:
        raise _inexpressible(f"{name}.diffusion.zero_terminal_snr", True, "false")
    if process.prediction_type == "v":
        raise _inexpressible(f"{name}.diffusion.prediction_type", "v", "'eps' or 'x0'")


def _scheduler_1024(process: DiffusionConfig) -> dict[str, Any]:
    """The same for the second upsampler, whose scheduler may be a DDPMScheduler: that one knows all processes, but respaces
    no learned variances."""
    if process.variance == "learned_range":
        _check_process("upsampler_1024", process)
        return decoders.scheduler_config(process)
    scale = 1000 / process.num_timesteps
    return {
        "_class_name": "DDPMScheduler",
        "beta_schedule": {"cosine": "squaredcos_cap_v2", "linear": "linear"}[process.schedule],
        "beta_start": scale * 1e-4,
        "beta_end": scale * 0.02,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "num_train_timesteps": process.num_timesteps,
        "prediction_type": _PREDICTION_TYPES[process.prediction_type],
        "rescale_betas_zero_snr": process.zero_terminal_snr,
        "timestep_spacing": "linspace",
        "variance_type": process.variance,
    }


def _check_index(folder: Path, class_name: str) -> None:
    """Whether a folder is a pipeline of a class with the parts that it has."""
    index = folders.read_json(folder / "model_index.json")
    found = index.get("_class_name")
    if found != class_name:
        raise CheckpointError(
            f"{folder}/model_index.json: got a {found}, expected a {class_name}. Importing takes the folder of text to image, "
            "and besides, if wanted, that of image variations."
        )
    expected = {**{name: part[1] for name, part in _PARTS[class_name].items()}, "text_proj": "UnCLIPTextProjModel"}
    for name, part in expected.items():
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] != part:
            old = part == "CLIPImageProcessor" and isinstance(entry, list) and entry[-1:] == ["CLIPFeatureExtractor"]
            fast = part == "CLIPTokenizer" and isinstance(entry, list) and entry[-1:] == ["CLIPTokenizerFast"]
            if not old and not fast:
                raise CheckpointError(f"{folder}/model_index.json: got {name} = {entry!r}, expected a {part}.")


def _import_upsampler(folder: Path, low_res_size: int) -> Upsampler:
    process = decoders.diffusion_config(folder / "super_res_scheduler")
    first, last = folder / "super_res_first", folder / "super_res_last"
    scale = _scale(first, low_res_size)
    upsampler, other = (decoders.import_upsampler(part, scale=scale, diffusion=process) for part in (first, last))
    if upsampler.config != other.config or upsampler.noise_level_embedding is not None:
        raise CheckpointError(
            f"{last}/config.json: expected what {first}/config.json has, without class_embed_type, which the pipeline "
            "never gives."
        )
    if _same(upsampler.unet.state_dict(), other.unet.state_dict()):
        return upsampler
    with torch.device("meta"):
        both = Upsampler(dataclasses.replace(upsampler.config, last_step_unet=True))
    states = {"unet": upsampler.unet.state_dict(), "last_unet": other.unet.state_dict()}
    both.load_state_dict(
        {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}, assign=True
    )
    return both


def _import_upsampler_1024(folder: Path, low_res_size: int) -> Upsampler:
    path = folder / "scheduler" / decoders.SCHEDULER
    settings = folders.read_json(path)
    predictions = {theirs: ours for ours, theirs in _PREDICTION_TYPES.items()}
    variance = settings.get("variance_type")
    process = DiffusionConfig(
        num_timesteps=settings.get("num_train_timesteps", 1000),
        schedule="linear" if settings.get("beta_schedule") == "linear" else "cosine",
        prediction_type=predictions.get(settings.get("prediction_type", "epsilon"), "eps"),
        zero_terminal_snr=settings.get("rescale_betas_zero_snr") is True,
        variance=variance if variance in ("fixed_small", "fixed_large", "learned_range") else "fixed_small",
    )
    if {name: settings.get(name) for name in _scheduler_1024(process)} != _scheduler_1024(process):
        raise CheckpointError(f"{path}: expected the scheduler of an upsampler that was exported from here.")
    unet = folder / "unet"
    return decoders.import_upsampler(unet, scale=_scale(unet, low_res_size), diffusion=process)


def _scale(folder: Path, low_res_size: int) -> int:
    side = folders.read_json(folder / "config.json").get("sample_size")
    if not isinstance(side, int) or side % low_res_size or side <= low_res_size:
        raise CheckpointError(
            f"{folder}/config.json: got sample_size = {side!r}, expected a multiple of the {low_res_size} pixels it is given."
        )
    return side // low_res_size


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())
