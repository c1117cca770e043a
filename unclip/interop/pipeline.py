"""Whole stacks: export to and import from folders of diffusers' UnCLIPPipeline and UnCLIPImageVariationPipeline. Diffusers
itself is not needed.

    model_index.json                                          class of the pipeline and of each part
    prior/, prior_scheduler/                                  text to image only (`unclip.interop.prior`)
    text_proj/, decoder/, decoder_scheduler/                  (`unclip.interop.decoder`)
    super_res_first/, super_res_last/, super_res_scheduler/   the upsampler; written twice if it is a single network
    text_encoder/, tokenizer/                                 (`unclip.interop.clip`)
    image_encoder/, feature_extractor/                        for variations; also with text to image if CLIP allows it
    upsampler-1024/{unet,scheduler}/                          the second upsampler, which neither pipeline supports

Exact: with the sampler "ddpm" in every part, one candidate (`PIPELINE_SAMPLING`) and a generator of the same seed, the
pipeline and `Stack` draw the same noise and sample the same image, up to the rounding of the pipeline's tables: it keeps
alphas_cumprod in float32, in which 1 - alphas_cumprod has three correct digits at t = 0, and this moves up to a third of the
pixels by more than 1/255. Statistics of embeddings are folded into weights. Fixed variances become learned variances with
constant outputs, because the pipeline cannot guide a decoder without them. Learned variances agree within their valid range,
in which networks learn to stay; outside it, they are clamped here, but extrapolated by the pipeline.

A stack must be trained with these settings; all others are refused:

    CLIP         a plain CLIP whose text encoder has the width of its embeddings: any ViT-B, -L or -H of open_clip
    prior        diffusion; text_norm "none" or "layer", text_encodings, no self_conditioning, image_drop_prob or clamp_norm
    decoder      text "clip", no inpainting
    upsampler    one; max_noise_level 0
    all three    schedule "cosine" without zero_terminal_snr, prediction_type "eps" or "x0", in [-1, 1]

A pipeline's folder stores no samplers, numbers of steps, guidance scales or numbers of candidates. The pipeline tokenizes
captions without open_clip's repairs (`unclip.interop.clip`).

Versions of diffusers have UnCLIPTextProjModel in different modules, and 0.38 and later cannot load what they save. Layouts:
"current" for 0.38 and later; "hub" for 0.37 and earlier, as in published pipelines; "portable" for both, with a Python file
in `text_proj/` that 0.38 and later run only with trust_remote_code. Import reads all three and runs no code.

Letters: B batch, S resolution of an image.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from unclip import foreign
from unclip.config import require, to_dict
from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.sampling import DiffusionSampling
from unclip.errors import CheckpointError, ConfigError, InputError
from unclip.interop import clip as clips
from unclip.interop import decoder as decoders
from unclip.interop import folders, schedulers
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
"""Versions of diffusers that can load the folder; see the module."""

_TEXT_PROJECTION: dict[Layout, str] = {
    "current": "diffusers.pipelines.deprecated.unclip.text_proj",
    "portable": "unclip",
    "hub": "unclip",
}
"""Module of UnCLIPTextProjModel that model_index.json names."""

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
"""Pipeline -> its parts except text_proj -> library and class."""

Network = TypeVar("Network", Decoder, Upsampler)

PIPELINE_SAMPLING = SamplingConfig(
    prior=PriorSampling(sampler="ddpm", num_steps=25, guidance_scale=4.0, num_candidates=1),
    decoder=DecoderSampling(sampler="ddpm", num_steps=25, guidance_scale=8.0),
)
PIPELINE_UPSAMPLER_SAMPLING = UpsamplerSampling(sampler="ddpm", num_steps=7)
"""Defaults of UnCLIPPipeline, and the sampling settings of imported stacks."""


class ImportedStack(NamedTuple):
    """Contents of a pipeline's folder."""

    stack: Stack
    clip_config: dict[str, Any]
    """CLIP's architecture in open_clip's format."""
    upsampler_1024: Upsampler | None
    """The second upsampler, if there is one."""


def export_stack(
    stack: Stack,
    folder: str | Path,
    *,
    layout: Layout = "current",
    image_variation: bool = False,
    upsampler_1024: Upsampler | None = None,
) -> list[str]:
    """Write a stack as a folder that diffusers can load and sample from; the folder is written completely or not at all.

    Args:
        folder: new or empty folder.
        layout: versions of diffusers that can load it; see the module.
        image_variation: if true, write an UnCLIPImageVariationPipeline, from images to images, not an UnCLIPPipeline.
        upsampler_1024: second upsampler, written beside the pipeline.

    Returns:
        Notes for the user on what the folder does not contain.

    Raises:
        InputError, ConfigError: the pipeline cannot represent the stack, or the folder is not empty. Nothing is written.
    """
    require(layout in get_args(Layout), "layout", layout, " or ".join(map(repr, get_args(Layout))))
    folders.check_new(Path(folder))
    check_exportable(stack, upsampler_1024)
    with folders.written_whole(Path(folder)) as scratch:
        return _write_parts(stack, scratch, layout, image_variation, upsampler_1024)


def check_exportable(stack: Stack, upsampler_1024: Upsampler | None = None) -> None:
    """Check that the pipelines can represent a stack, before anything is written.

    Raises:
        ConfigError, InputError: they cannot; names the first such setting, and the value to train with instead. The exports
            of prior, decoder and CLIP make further checks.
    """
    if not isinstance(stack.prior, DiffusionPrior):
        raise InputError(
            "export: got an autoregressive prior, expected prior.kind = 'diffusion', as diffusers supports nothing else."
        )
    if stack.prior.config.diffusion.variance != "fixed_small":
        variance = stack.prior.config.diffusion.variance
        raise _unsupported("prior.diffusion.variance", variance, "'fixed_small'")
    if len(stack.upsamplers) != 1:
        names = ", ".join(upsampler.config.name for upsampler in stack.upsamplers) or "none"
        raise InputError(
            f"export: got {names}, expected one upsampler, as diffusers' pipelines support exactly one. Publish a stack with "
            "the first upsampler only, and pass the second one as upsampler_1024."
        )
    upsampler, resolution = stack.upsamplers[0].config, stack.decoder.config.unet.image_size
    _check_process("prior", stack.prior.config.diffusion)
    _check_process("decoder", stack.decoder.config.diffusion)
    _check_process("upsampler", upsampler.diffusion)
    if upsampler.max_noise_level:
        raise _unsupported(
            "upsampler.max_noise_level",
            upsampler.max_noise_level,
            "0 because the pipeline does not noise low-resolution images",
        )
    unet, length = stack.decoder.config.unet, stack.clip.text_length
    middle = resolution // 2 ** (len(unet.channel_mult) - 1)  # the middle block has attention, too
    if any(each**2 == length + NUM_IMAGE_TOKENS for each in {*unet.attention_resolutions, middle}):
        # diffusers would take a context mask of this length for a mask of the pixels
        raise _unsupported(
            "the CLIP's context length",
            length,
            f"a length that plus {NUM_IMAGE_TOKENS} is not the number of pixels at an attention resolution",
        )
    if upsampler_1024 is not None:
        _scheduler_1024(upsampler_1024.config.diffusion)
        if upsampler_1024.config.low_res_size != upsampler.output_size or upsampler_1024.config.last_step_unet:
            got = upsampler_1024.config.low_res_size
            raise _unsupported("upsampler_1024.low_res_size", got, f"the first upsampler's {upsampler.output_size}")


def import_stack(folder: str | Path, *, image_variation: str | Path | None = None) -> ImportedStack:
    """Read a stack from the folder of an UnCLIPPipeline, such as Karlo or the output of `export_stack`.

    The stack does not standardise embeddings, because the folder's weights already do; compute new statistics for further
    training.

    Args:
        folder: local folder; nothing is downloaded.
        image_variation: folder of an UnCLIPImageVariationPipeline with an image encoder; None looks for one in `folder`.
            Without an image encoder, the stack cannot embed images.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit each other; names them.
        ConfigError, InputError: our stacks do not support the settings.
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
            f"{folder}: got embeddings of different widths: {widths}. These parts are not from the same stack."
        )
    stack = Stack(clip, prior, decoder.eval(), [upsampler.eval()])
    stack.sampling = pipeline_sampling(upsampler.config.output_size)
    upsampler_1024 = None
    if (folder / "upsampler-1024").is_dir():
        upsampler_1024 = _import_upsampler_1024(folder / "upsampler-1024", upsampler.config.output_size).eval()
    return ImportedStack(stack.requires_grad_(False), clip_config, upsampler_1024)


def save_imported(imported: ImportedStack, folder: str | Path) -> None:
    """Write an imported stack as a local folder that `load_system` reads; `stack.json` is written last.

    The second upsampler, if there is one, is written into the same folder under its own name, for `load_model`: as
    `upsampler-1024/` if its resolution is 1024.
    """
    stack = imported.stack
    prior, decoder = stack.prior, stack.decoder
    assert isinstance(prior, DiffusionPrior), "diffusers has no other"
    priors.save_prior(prior, stack.clip, "UnCLIPPipeline", f"{folder}/prior")
    text_shape = None if decoder.text_shape is None else to_dict(decoder.text_shape)
    facts: dict[str, dict[str, Any]] = {
        "decoder": {"kind": "decoder", "embedding_dim": stack.clip.embedding_dim, "text_shape": text_shape},
    }
    models: dict[str, Any] = {"decoder": decoder}
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
    """Write all files of a pipeline, model_index.json last; return notes for the user."""
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
        notes.append(f"The folder has no image encoder, which text to image does not need. {error}")
    scheduler = decoders.scheduler_config(upsampler.config.diffusion)
    folders.write_json(folder / "super_res_scheduler" / decoders.SCHEDULER, scheduler)
    if upsampler_1024 is not None:
        decoders.export_upsampler(upsampler_1024, folder / "upsampler-1024" / "unet")
        scheduler = _scheduler_1024(upsampler_1024.config.diffusion)
        folders.write_json(folder / "upsampler-1024" / "scheduler" / decoders.SCHEDULER, scheduler)
        notes.append("The second upsampler is in upsampler-1024. The pipeline does not use it.")
    if layout == "portable":
        (folder / "text_proj" / "unclip.py").write_text(_PORTABLE_MODULE, "utf-8")
    parts = _PARTS[class_name] | {"text_proj": (_TEXT_PROJECTION[layout], "UnCLIPTextProjModel")}
    folders.write_index(folder, class_name, parts, version=_VERSION[layout])
    return notes


def pipeline_sampling(resolution: int) -> SamplingConfig:
    """`PIPELINE_SAMPLING` with its upsampler's settings, by the resolution of its images."""
    return dataclasses.replace(PIPELINE_SAMPLING, upsamplers={str(resolution): PIPELINE_UPSAMPLER_SAMPLING})


def _sampling_notes(stack: Stack) -> list[str]:
    """Notes for the user on sampling settings that differ from the pipeline's defaults."""
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
        f"{part}.{name} {getattr(own, name)} (pipeline: {getattr(theirs[part], name)})"
        for part, own in ours.items()
        for name in names
        if hasattr(own, name) and getattr(own, name) != getattr(theirs[part], name)
    ]
    if not different:
        return []
    return [
        f"Not stored in the folder: {', '.join(different)}. Pass steps and guidance scales when you call the pipeline; its "
        "sampler is always ddpm, and it samples only one candidate."
    ]


def with_learned_range(model: Network) -> Network:
    """Convert a model with a fixed variance to one with learned variances; return a model that learns them as it is.

    The network's new outputs are constant: the end of the range that equals the fixed variance.

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
    """Upsampler with the network of the last step; the upsampler itself if it has only one network."""
    if upsampler.last_unet is None:
        return upsampler
    with torch.device("meta"):
        last = Upsampler(dataclasses.replace(upsampler.config, last_step_unet=False))
    last.unet.load_state_dict(upsampler.last_unet.state_dict(), assign=True)
    return last


def _unsupported(setting: str, got: object, expected: str) -> ConfigError:
    return ConfigError(
        f"{setting}: got {got!r}, expected {expected}, as diffusers supports nothing else. Train with that setting to export."
    )


def _check_process(name: str, process: DiffusionConfig) -> None:
    """Check that UnCLIPScheduler supports a process."""
    if process.schedule != "cosine":
        raise _unsupported(f"{name}.diffusion.schedule", process.schedule, "'cosine'")
    if process.zero_terminal_snr:
        raise _unsupported(f"{name}.diffusion.zero_terminal_snr", True, "false")
    if process.prediction_type == "v":
        raise _unsupported(f"{name}.diffusion.prediction_type", "v", "'eps' or 'x0'")


def _scheduler_1024(process: DiffusionConfig) -> dict[str, Any]:
    """Settings of the second upsampler's scheduler: a DDPMScheduler, which supports all processes, or for learned variances,
    which it cannot respace, an UnCLIPScheduler."""
    if process.variance == "learned_range":
        _check_process("upsampler_1024", process)
        return decoders.scheduler_config(process)
    return schedulers.describe(process) | {
        "_class_name": "DDPMScheduler",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "timestep_spacing": "linspace",
        "variance_type": process.variance,
    }


def _check_index(folder: Path, class_name: str) -> None:
    """Check that a folder holds a pipeline of this class with all its parts."""
    index = foreign.read_json(folder / "model_index.json")
    found = index.get("_class_name")
    if found != class_name:
        raise CheckpointError(
            f"{folder}/model_index.json: got a {str(found)[:100]}, expected a {class_name}. Import the folder of the "
            "text-to-image pipeline; that of the image variation pipeline is optional and passed as image_variation."
        )
    expected = {**{name: part[1] for name, part in _PARTS[class_name].items()}, "text_proj": "UnCLIPTextProjModel"}
    for name, part in expected.items():
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] != part:
            old = part == "CLIPImageProcessor" and isinstance(entry, list) and entry[-1:] == ["CLIPFeatureExtractor"]
            fast = part == "CLIPTokenizer" and isinstance(entry, list) and entry[-1:] == ["CLIPTokenizerFast"]
            if not old and not fast:
                raise CheckpointError(
                    f"{folder}/model_index.json: got {name} = {foreign.shorten(entry)}, expected a {part}."
                )


def _import_upsampler(folder: Path, low_res_size: int) -> Upsampler:
    process = decoders.diffusion_config(folder / "super_res_scheduler")
    first, last = folder / "super_res_first", folder / "super_res_last"
    scale = _scale(first, low_res_size)
    upsampler, other = (decoders.import_upsampler(part, scale=scale, diffusion=process) for part in (first, last))
    if upsampler.config != other.config or upsampler.noise_level_embedding is not None:
        raise CheckpointError(
            f"{last}/config.json: expected the same settings as in {first}/config.json, and no class_embed_type, as the "
            "pipeline never passes class labels."
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


@dataclasses.dataclass(frozen=True)
class _Scheduler1024:
    """Settings of the second upsampler's scheduler that are read; all must be those of `_scheduler_1024`."""

    num_train_timesteps: foreign.Timesteps = 1000
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = "squaredcos_cap_v2"
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    rescale_betas_zero_snr: bool = False
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"


@dataclasses.dataclass(frozen=True)
class _Resolution:
    sample_size: foreign.Resolution


def _import_upsampler_1024(folder: Path, low_res_size: int) -> Upsampler:
    path = folder / "scheduler" / decoders.SCHEDULER
    settings = foreign.read_json(path)
    scheduler = foreign.read(_Scheduler1024, settings, path, ignore_others=True)
    schedules = {theirs: ours for ours, theirs in schedulers.SCHEDULES.items()}
    predictions = {theirs: ours for ours, theirs in schedulers.PREDICTION_TYPES.items()}
    process = DiffusionConfig(
        num_timesteps=scheduler.num_train_timesteps,
        schedule=schedules[scheduler.beta_schedule],
        prediction_type=predictions[scheduler.prediction_type],
        zero_terminal_snr=scheduler.rescale_betas_zero_snr,
        variance=scheduler.variance_type,
    )
    if {name: settings.get(name) for name in _scheduler_1024(process)} != _scheduler_1024(process):
        raise CheckpointError(f"{path}: expected the scheduler of an upsampler that was exported by this library.")
    unet = folder / "unet"
    return decoders.import_upsampler(unet, scale=_scale(unet, low_res_size), diffusion=process)


def _scale(folder: Path, low_res_size: int) -> int:
    path = folder / "config.json"
    size = foreign.read(_Resolution, foreign.read_json(path), path, ignore_others=True).sample_size
    if size % low_res_size or size <= low_res_size:
        raise CheckpointError(
            f"{path}: got sample_size = {size!r}, expected a multiple of the {low_res_size} pixels of its input."
        )
    return size // low_res_size


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())
