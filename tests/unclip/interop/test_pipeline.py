"""Export and import of whole stacks: diffusers' unCLIP pipelines sample the same images from the same noise."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unclip.systems.tiny_stacks import (
    EMBEDDING_DIM,
    LENGTH,
    RESOLUTION,
    add_noise,
    calm_variances,
    tiny_clip,
    tiny_stack,
)
from unclip.diffusion import samplers
from unclip.diffusion.process import DiffusionConfig
from unclip.errors import CheckpointError, ConfigError, InputError
from unclip.interop.clip import export_text
from unclip.interop.pipeline import export_stack, import_stack, pipeline_sampling, save_imported
from unclip.models.autoregressive_prior import AutoregressivePrior, AutoregressivePriorConfig
from unclip.models.clip import Clip, create
from unclip.models.text import CaptionFeatures
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig
from unclip.systems.system import load_model, load_system, sample_batch, sample_captions
from unclip.systems.unclip.sampling import SamplingConfig
from unclip.systems.unclip.stack import Stack
from unclip.systems.upsampler import UPSAMPLER

CAPTIONS = ["a red cat!", "two dogs and a very long caption that is cut off"]
STEPS = (5, 5, 3)


def load(folder: Path, class_name: str = "UnCLIPPipeline", **arguments: Any) -> Any:
    import diffusers

    pipeline = getattr(diffusers, class_name).from_pretrained(str(folder), **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_float64_tables(pipeline: Any, stack: Stack) -> Any:
    """Give the pipeline's schedulers alphas_cumprod in float64, as ours: in float32, 1 - alphas_cumprod has three correct
    digits at t = 0, and untrained networks amplify the error."""
    for name, model in (("prior", stack.prior), ("decoder", stack.decoder), ("super_res", stack.upsamplers[0])):
        scheduler = getattr(pipeline, f"{name}_scheduler", None)
        if scheduler is not None:
            scheduler.betas = model.diffusion.betas  # type: ignore[union-attr]
            scheduler.alphas_cumprod = model.diffusion.alphas_cumprod  # type: ignore[union-attr]
            scheduler.alphas = 1 - scheduler.betas
    return pipeline


def sampling(scales: tuple[float, float]) -> SamplingConfig:
    """Our sampling settings, equal to those of `pipeline_samples`."""
    pipeline = pipeline_sampling(16)
    return SamplingConfig(
        prior=dataclasses.replace(pipeline.prior, num_steps=STEPS[0], guidance_scale=scales[0]),
        decoder=dataclasses.replace(pipeline.decoder, num_steps=STEPS[1], guidance_scale=scales[1]),
        upsamplers={"16": dataclasses.replace(pipeline.upsamplers["16"], num_steps=STEPS[2])},
        precision="fp32",
    )


def stack_samples(stack: Stack, scales: tuple[float, float]) -> torch.Tensor:
    """[B, 3, H, W] in [0, 1]."""
    return (sample_batch(stack, CAPTIONS, 3, seed=0, sampling=sampling(scales)) / 2 + 0.5).clamp(0, 1)


def pipeline_samples(pipeline: Any, scales: tuple[float, float]) -> torch.Tensor:
    """[B, 3, H, W] in [0, 1]."""
    images = pipeline(
        CAPTIONS,
        prior_num_inference_steps=STEPS[0],
        decoder_num_inference_steps=STEPS[1],
        super_res_num_inference_steps=STEPS[2],
        prior_guidance_scale=scales[0],
        decoder_guidance_scale=scales[1],
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


VARIANTS: list[dict[str, Any]] = [
    {},
    {
        "prior": {"text_norm": "layer", "norm_in": True, "normalization": "scale", "clip_range": None},
        "decoder": {"diffusion": DiffusionConfig(prediction_type="x0", variance="learned_range")},
        "upsampler": {"diffusion": DiffusionConfig(variance="learned_range")},
    },
    {
        "decoder": {"diffusion": DiffusionConfig(variance="fixed_large")},
        "upsampler": {
            "diffusion": DiffusionConfig(prediction_type="x0", variance="fixed_large"),
            "last_step_unet": True,
        },
    },
]


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_diffusers_samples_the_same_images_as_we_do(tmp_path: Path, variant: int) -> None:
    """Compare images from the same captions and generator: equal within rounding with our tables of alphas_cumprod, and on
    average with the pipeline's own."""
    stack = tiny_stack(**VARIANTS[variant])
    notes = export_stack(stack, tmp_path / "exported")
    assert len(notes) == 1
    assert (
        "decoder.sampler ddim (pipeline: ddpm), decoder.num_steps 50 (pipeline: 25), decoder.guidance_scale 2.0 "
        "(pipeline: 8.0)" in notes[0]
    )
    pipeline = load(tmp_path / "exported")
    for scales in ((4.0, 8.0), (1.0, 1.0)):
        expected = stack_samples(stack, scales)
        assert expected.std() > 0.1 and not torch.allclose(expected[0], expected[1], atol=0.1)
        if variant == 0:
            assert (pipeline_samples(pipeline, scales) - expected).abs().mean() < 0.01
    with_float64_tables(pipeline, stack)
    for scales in ((4.0, 8.0), (1.0, 1.0)):
        torch.testing.assert_close(pipeline_samples(pipeline, scales), stack_samples(stack, scales), atol=2e-3, rtol=0)


def test_exporting_an_imported_stack_gives_the_same_bytes(tmp_path: Path) -> None:
    upsampler_1024 = add_noise(Upsampler(UpsamplerConfig(UNetConfig(16, 8, (1, 2), 1, norm_groups=4), low_res_size=16)))
    stack = tiny_stack(upsampler={"last_step_unet": True})
    export_stack(stack, tmp_path / "once", upsampler_1024=upsampler_1024)
    imported = import_stack(tmp_path / "once")
    torch.testing.assert_close(
        stack_samples(imported.stack, (4.0, 8.0)), stack_samples(stack, (4.0, 8.0)), atol=1e-3, rtol=0
    )
    assert imported.stack.upsamplers[0].config.last_step_unet
    assert imported.upsampler_1024 is not None and imported.upsampler_1024.config.output_size == 64

    save_imported(imported, tmp_path / "stack")  # and through our own file format
    loaded = load_system(tmp_path / "stack")
    assert loaded.sampling.prior.guidance_scale == 4 and loaded.clip.image_embeddings == "unit"
    assert torch.equal(stack_samples(loaded, (4.0, 8.0)), stack_samples(imported.stack, (4.0, 8.0)))
    assert sample_captions(loaded, CAPTIONS[:1]).shape == (1, 3, 16, 16)
    second: Any = load_model(str(tmp_path / "stack" / "upsampler-64"), (UPSAMPLER,))
    export_stack(loaded, tmp_path / "twice", upsampler_1024=second)
    files = [path.relative_to(tmp_path / "once") for path in (tmp_path / "once").rglob("*") if path.is_file()]
    assert len(files) == 26
    for file in files:
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes(), file


def karlo_like(folder: Path) -> Any:
    """Build a pipeline of diffusers' own classes with random weights, and save it in the layout of published pipelines."""
    from diffusers import PriorTransformer, UnCLIPPipeline, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    export_text(tiny_clip(), folder / "tokens")
    blocks = {"sample_size": RESOLUTION, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
    upsampler = blocks | {
        "sample_size": 16,
        "in_channels": 6,
        "out_channels": 3,
        "add_attention": False,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    }
    parts: dict[str, Any] = {
        "prior": PriorTransformer(4, 6, 2, embedding_dim=EMBEDDING_DIM, num_embeddings=LENGTH),
        "text_proj": UnCLIPTextProjModel(clip_embeddings_dim=EMBEDDING_DIM, time_embed_dim=32, cross_attention_dim=12),
        "decoder": UNet2DConditionModel(
            **blocks,
            in_channels=3,
            out_channels=6,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            cross_attention_dim=12,
            class_embed_type="identity",
            attention_head_dim=4,
            resnet_time_scale_shift="scale_shift",
        ),
        "super_res_first": UNet2DModel(**upsampler),
        "super_res_last": UNet2DModel(**upsampler),
        "text_encoder": CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=EMBEDDING_DIM,
                intermediate_size=4 * EMBEDDING_DIM,
                projection_dim=EMBEDDING_DIM,
                num_attention_heads=2,
                num_hidden_layers=2,
                max_position_embeddings=LENGTH,
            )
        ),
    }
    for seed, part in enumerate(parts.values()):
        add_noise(part, 0.15, seed)
    with torch.no_grad():
        parts["prior"].clip_std.copy_(torch.rand(1, EMBEDDING_DIM) + 0.5)
    calm_variances(parts["decoder"].conv_out)
    parts |= {
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokens" / "tokenizer"),
        "prior_scheduler": UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": UnCLIPScheduler(),
    }
    index: dict[str, Any] = {"_class_name": "UnCLIPPipeline", "_diffusers_version": "0.15.0.dev0"}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        library = "transformers" if name in ("tokenizer", "text_encoder") else "diffusers"
        index[name] = ["unclip" if name == "text_proj" else library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    pipeline = UnCLIPPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_we_sample_the_same_images_as_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    pipeline = karlo_like(tmp_path)
    stack = import_stack(tmp_path).stack
    assert stack.upsamplers[0].config.last_step_unet and stack.prior.config.clip_range == 5.0  # type: ignore[union-attr]
    assert stack.clip.image_embeddings == "none"
    assert stack.decoder.config.diffusion.variance == "learned_range"
    with_float64_tables(pipeline, stack)
    expected = pipeline_samples(pipeline, (4.0, 8.0))
    assert expected.std() > 0.1
    torch.testing.assert_close(stack_samples(stack, (4.0, 8.0)), expected, atol=2e-3, rtol=0)
    notes = export_stack(stack, tmp_path / "again")  # diffusers 0.38 and later load this one, but not the original
    assert len(notes) == 1 and "no image encoder" in notes[0]
    again = with_float64_tables(load(tmp_path / "again"), stack)
    torch.testing.assert_close(pipeline_samples(again, (4.0, 8.0)), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("image_embeddings", ["unit", "raw"])
def test_diffusers_samples_the_same_variations_as_we_do(tmp_path: Path, image_embeddings: Any) -> None:
    """Compare variations, for stacks with unit-norm and with raw image embeddings."""
    from PIL import Image

    stack = tiny_stack(clip=tiny_clip(image_embeddings=image_embeddings))
    export_stack(stack, tmp_path / "exported", image_variation=True)
    assert not (tmp_path / "exported" / "prior").exists()
    pipeline = with_float64_tables(load(tmp_path / "exported", "UnCLIPImageVariationPipeline"), stack)
    image = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    settings = {"decoder_num_inference_steps": 5, "super_res_num_inference_steps": 3, "decoder_guidance_scale": 3.0}
    theirs = pipeline(image, 2, generator=torch.Generator().manual_seed(5), output_type="np", **settings).images
    embedding = stack.clip.embed_images(stack.clip.preprocess(image)[None]).expand(2, -1)
    with torch.no_grad():
        ours = stack.decode(embedding, sampling((1.0, 3.0)), torch.Generator().manual_seed(5))
    ours = (ours / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(torch.from_numpy(theirs).permute(0, 3, 1, 2), ours, atol=5e-3, rtol=0)

    with pytest.raises(CheckpointError, match="got a UnCLIPImageVariationPipeline, expected a UnCLIPPipeline"):
        import_stack(tmp_path / "exported")
    export_stack(stack, tmp_path / "text")
    for name in ("image_encoder", "feature_extractor"):
        (tmp_path / "text" / name).rename(tmp_path / name)
    imported = import_stack(tmp_path / "text", image_variation=tmp_path / "exported").stack
    assert imported.clip.image_embeddings == image_embeddings
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        imported.clip.embed_images(pixels), stack.clip.embed_images(pixels), atol=1e-5, rtol=1e-5
    )


@contextlib.contextmanager
def older_diffusers() -> Iterator[None]:
    """Let diffusers find the module where 0.37 and earlier had it."""
    import diffusers.pipelines
    from diffusers.pipelines.deprecated import unclip as moved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers.pipelines, "unclip", moved, raising=False)
        patch.setitem(sys.modules, "diffusers.pipelines.unclip", moved)
        yield


def test_other_layouts_load_in_the_versions_they_are_for(tmp_path: Path) -> None:
    stack = tiny_stack()
    expected = stack_samples(stack, (4.0, 8.0))
    export_stack(stack, tmp_path / "hub", layout="hub")
    export_stack(stack, tmp_path / "portable", layout="portable")
    with pytest.raises(ValueError, match="unclip"):  # this version cannot load pipelines in the published layout
        load(tmp_path / "hub")
    with older_diffusers():
        pipeline = with_float64_tables(load(tmp_path / "hub"), stack)
    torch.testing.assert_close(pipeline_samples(pipeline, (4.0, 8.0)), expected, atol=2e-3, rtol=0)
    pipeline = with_float64_tables(load(tmp_path / "portable", trust_remote_code=True), stack)
    torch.testing.assert_close(pipeline_samples(pipeline, (4.0, 8.0)), expected, atol=2e-3, rtol=0)
    # import runs no code in a folder
    (tmp_path / "portable" / "text_proj" / "unclip.py").write_text("raise SystemExit('run')")
    for layout in ("hub", "portable"):
        imported = import_stack(tmp_path / layout).stack
        torch.testing.assert_close(stack_samples(imported, (4.0, 8.0)), expected, atol=1e-3, rtol=0)
    with pytest.raises(ConfigError, match="layout: got 'new'"):
        export_stack(stack, tmp_path / "new", layout="new")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "process",
    [
        DiffusionConfig(schedule="linear"),
        DiffusionConfig(prediction_type="v", zero_terminal_snr=True, variance="fixed_large"),
        DiffusionConfig(variance="learned_range"),
    ],
)
@torch.no_grad()
def test_the_second_upsampler_is_exported_with_its_own_scheduler(tmp_path: Path, process: DiffusionConfig) -> None:
    import diffusers

    stack = tiny_stack()
    network = UNetConfig(16, 8, (1, 2), 1, norm_groups=4)
    ours = add_noise(Upsampler(UpsamplerConfig(network, low_res_size=16, scale=2, diffusion=process)))
    calm_variances(ours.unet.output[-1])
    notes = export_stack(stack, tmp_path / "exported", upsampler_1024=ours)
    assert "upsampler-1024" in notes[-1]
    folder = tmp_path / "exported" / "upsampler-1024"
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet").eval()
    class_name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    scheduler = getattr(diffusers, class_name).from_pretrained(folder / "scheduler")
    low_res = torch.rand(2, 3, 16, 16) * 2 - 1
    enlarged = torch.nn.functional.interpolate(low_res, size=(32, 32), mode="bicubic", antialias=True)

    generator = torch.Generator().manual_seed(0)
    x_t = noise = torch.randn(2, 3, 32, 32, generator=generator)
    scheduler.betas, scheduler.alphas_cumprod = ours.diffusion.betas, ours.diffusion.alphas_cumprod
    scheduler.alphas = 1 - scheduler.betas
    scheduler.set_timesteps(6)
    for index, t in enumerate(scheduler.timesteps):
        last = index + 1 == len(scheduler.timesteps)
        following = {"prev_timestep": None if last else scheduler.timesteps[index + 1]}
        arguments = following if class_name == "UnCLIPScheduler" else {}
        x_t = scheduler.step(
            unet(torch.cat([x_t, enlarged], dim=1).float(), t).sample, t, x_t, generator=generator, **arguments
        ).prev_sample
    generator = torch.Generator().manual_seed(0)
    torch.randn(2, 3, 32, 32, generator=generator)
    expected = samplers.ddpm(ours.diffusion, ours.denoiser(low_res), noise, 6, generator)
    torch.testing.assert_close(x_t.float(), expected, atol=2e-3, rtol=0)
    again = import_stack(tmp_path / "exported").upsampler_1024
    assert again is not None and again.config.diffusion == process


def upsampler_config(**changes: Any) -> UpsamplerConfig:
    return UpsamplerConfig(UNetConfig(16, 8, (1, 2), 1, norm_groups=4), **{"low_res_size": 16, "scale": 2, **changes})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior": {"text_norm": "unit"}}, "text_norm: got 'unit'"),
        ({"prior": {"self_conditioning": True}}, "self_conditioning: got True"),
        (
            {"prior": {"diffusion": DiffusionConfig(prediction_type="x0", variance="fixed_large")}},
            "prior.diffusion.variance: got 'fixed_large'",
        ),
        ({"decoder": {"text": "none"}}, "text = 'none'"),
        ({"decoder": {"text": "transformer"}}, "text = 'transformer'"),
        ({"decoder": {"inpainting": True}}, "inpainting = True"),
        ({"decoder": {"diffusion": DiffusionConfig(schedule="linear")}}, "decoder.diffusion.schedule: got 'linear'"),
        (
            {"decoder": {"diffusion": DiffusionConfig(prediction_type="v")}},
            "decoder.diffusion.prediction_type: got 'v'",
        ),
        (
            {"upsampler": {"diffusion": DiffusionConfig(prediction_type="x0", zero_terminal_snr=True)}},
            "upsampler.diffusion.zero_terminal_snr: got True",
        ),
        ({"upsampler": {"max_noise_level": 100}}, "upsampler.max_noise_level: got 100"),
    ],
)
def test_unsupported_settings_are_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, InputError), match=message):
        export_stack(tiny_stack(**settings), tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_unsupported_stacks_and_existing_folders_are_refused(tmp_path: Path) -> None:
    stack = tiny_stack()
    (tmp_path / "mine").write_text("a file")
    for existing in (tmp_path, tmp_path / "mine"):
        with pytest.raises(InputError, match="expected a new or empty one"):
            export_stack(stack, existing)
    with pytest.raises(ConfigError, match=r"upsampler_1024\.low_res_size: got 8"):
        export_stack(stack, tmp_path / "new", upsampler_1024=Upsampler(upsampler_config(low_res_size=8)))
    for upsamplers, found in (
        ([], "none"),
        ([*stack.upsamplers, Upsampler(upsampler_config())], "upsampler-16, upsampler-32"),
    ):
        with pytest.raises(InputError, match=f"got {found}, expected one upsampler"):
            export_stack(Stack(stack.clip, stack.prior, stack.decoder, upsamplers), tmp_path / "new")
    learned = DiffusionConfig(schedule="linear", variance="learned_range")
    with pytest.raises(ConfigError, match=r"upsampler_1024\.diffusion\.schedule"):
        export_stack(stack, tmp_path / "new", upsampler_1024=Upsampler(upsampler_config(diffusion=learned)))
    text = {"context_length": 12, "vocab_size": 49408, "width": EMBEDDING_DIM, "heads": 2, "layers": 1}
    stack.clip = tiny_clip(text_cfg=text)  # 12 + 4 tokens equal 4x4 pixels
    with pytest.raises(ConfigError, match="context length: got 12"):
        export_stack(stack, tmp_path / "new")
    stack.clip = Clip(create("unclip-demo", None), "unclip-demo")
    with pytest.raises(InputError, match="vision tower is a ModifiedResNet"):
        export_stack(stack, tmp_path / "new", image_variation=True)
    autoregressive = AutoregressivePrior(AutoregressivePriorConfig(width=16, depth=1, num_heads=2), 16, 16, LENGTH, 4)
    stack.prior = autoregressive
    with pytest.raises(InputError, match="autoregressive prior"):
        export_stack(stack, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "exported"
    export_stack(tiny_stack(), folder)
    return folder


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """A copy made of hard links: tests must replace files, not write into them."""
    for path in exported.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(exported)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(exported)).hardlink_to(path)
    return tmp_path


WEIGHTS = "diffusion_pytorch_model.safetensors"
NEEDED = [
    "model_index.json",
    "prior/config.json",
    f"prior/{WEIGHTS}",
    "prior_scheduler/scheduler_config.json",
    "text_proj/config.json",
    f"text_proj/{WEIGHTS}",
    "decoder/config.json",
    f"decoder/{WEIGHTS}",
    "decoder_scheduler/scheduler_config.json",
    "super_res_first/config.json",
    f"super_res_last/{WEIGHTS}",
    "super_res_scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "image_encoder/config.json",
    "image_encoder/model.safetensors",
    "feature_extractor/preprocessor_config.json",
]


@pytest.mark.parametrize("file", NEEDED)
def test_errors_name_missing_and_damaged_files(copied: Path, file: str) -> None:
    content = (copied / file).read_bytes()
    for damage in (None, b"", content[: len(content) // 2]):
        (copied / file).unlink(missing_ok=True)
        if damage is not None:
            (copied / file).write_bytes(damage)
        with pytest.raises(CheckpointError) as error:
            import_stack(copied)
        assert (str(copied / file) if "merges" not in file else str(copied / "tokenizer")) in str(error.value)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("prior/config.json", {"num_layers": 10**9}, "num_layers = 1000000000"),
        ("prior/config.json", {"attention_head_dim": 10**9}, "attention_head_dim = 1000000000, expected int from 1"),
        ("prior/config.json", {"attention_head_dim": 10**6}, "do not fit its config.json"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ("decoder/config.json", {"layers_per_block": 10**9}, "layers_per_block = 1000000000"),
        ("decoder/config.json", {"block_out_channels": [2**40, 2**41]}, "block_out_channels = .*, expected int from 1"),
        ("decoder/config.json", {"block_out_channels": [2**20, 2**21]}, "do not fit|cannot be built"),
        ("model_index.json", {"prior": ["diffusers", "Other"]}, "expected a PriorTransformer"),
        ("model_index.json", {"text_proj": None}, "expected a UnCLIPTextProjModel"),
        ("decoder_scheduler/scheduler_config.json", {"clip_sample_range": 2.0}, "clip_sample_range = 2.0"),
        ("decoder_scheduler/scheduler_config.json", {"_class_name": "DDPMScheduler"}, "_class_name = 'DDPMScheduler'"),
        (
            "decoder_scheduler/scheduler_config.json",
            {"variance_type": "fixed_small_log"},
            "network of 6 output channels, expected 3",
        ),
        ("super_res_scheduler/scheduler_config.json", {"variance_type": "learned_range"}, "do not fit"),
        ("super_res_first/config.json", {"sample_size": 12}, "sample_size = 12, expected a multiple of the 8 pixels"),
        (
            "super_res_last/config.json",
            {"dropout": 0.5},
            "expected the same settings as in .*super_res_first/config.json",
        ),
        ("text_proj/config.json", {"clip_extra_context_tokens": 5}, "clip_extra_context_tokens = 5"),
    ],
)
def test_other_pipelines_are_refused(copied: Path, file: str, change: dict[str, Any], message: str) -> None:
    changed = json.loads((copied / file).read_text()) | change
    (copied / file).unlink()
    (copied / file).write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=message):
        import_stack(copied)


def test_an_index_of_shards_cannot_refer_to_other_folders(copied: Path) -> None:
    (copied / "decoder" / f"{WEIGHTS}.index.json").write_text(
        json.dumps({"weight_map": {"conv_in.weight": f"../text_proj/{WEIGHTS}"}})
    )
    with pytest.raises(CheckpointError, match="files in the same folder"):
        import_stack(copied)


def test_neither_direction_needs_diffusers(tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    export_stack(import_stack(exported).stack, tmp_path / "again")
    assert (tmp_path / "again" / "model_index.json").read_bytes() == (exported / "model_index.json").read_bytes()


def test_the_decoder_gets_the_features_of_the_empty_caption_from_its_clip(exported: Path) -> None:
    stack = import_stack(exported).stack
    null = stack.clip.encode_text(stack.clip.tokenize([""]))
    found: CaptionFeatures = stack.decoder.text.null(1)  # type: ignore[assignment, operator, union-attr]
    assert torch.equal(found.text_embedding, null.text_projection) and torch.equal(found.text_mask, null.text_mask)
