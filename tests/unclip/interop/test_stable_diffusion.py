"""Export and import of stacks: diffusers' StableDiffusionPipeline samples the same latents and images from the same noise."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unclip.interop.test_decoder import randomize
from tests.unclip.systems.tiny_stacks import EMBEDDING_DIM, LENGTH, add_noise, tiny_clip
from unclip.diffusion import samplers
from unclip.diffusion.process import DiffusionConfig
from unclip.errors import CheckpointError, InputError
from unclip.interop.stable_diffusion import PIPELINE_SAMPLING, export_stack, import_stack, save_imported
from unclip.models.autoencoder import Autoencoder, AutoencoderConfig
from unclip.models.latent_diffusion import Conditions, LatentDiffusion, LatentDiffusionConfig, LatentSampling
from unclip.models.text import TextShape, TextTransformerConfig, caption_features
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig
from unclip.systems.latent_diffusion import LatentDiffusionStack
from unclip.systems.system import load_system, sample_captions

CAPTIONS = ["a red cat!", "two dogs and a very long caption that is cut off"]
NEGATIVE = ["", "a blue sky"]
NUM_STEPS = 5
UNET = UNetConfig(
    8,
    8,
    (1, 2),
    1,
    attention_resolutions=(8,),
    norm_groups=4,
    scale_shift_norm=False,
    attention="spatial_transformer",
    num_heads=2,
    resampling="convolution",
)
AUTOENCODER = AutoencoderConfig(16, 1, 8, (1, 2), 1, (), True, 4, 4, "kl")
DIFFUSION = DiffusionConfig(schedule="scaled_linear")


def stack(
    *, mean: list[float], std: list[float], autoencoder: AutoencoderConfig = AUTOENCODER, **changes: Any
) -> LatentDiffusionStack:
    clip = tiny_clip()
    torch.manual_seed(0)
    config = LatentDiffusionConfig(UNET, **{"context_dim": EMBEDDING_DIM, "diffusion": DIFFUSION, **changes})
    generator = add_noise(LatentDiffusion(config, EMBEDDING_DIM, TextShape(LENGTH, EMBEDDING_DIM, 49408)))
    generator.set_statistics(torch.tensor(mean), torch.tensor(std))
    if generator.text is not None:
        tokens = clip.tokenize([""])
        generator.text.set_null(
            tokens if config.text == "transformer" else caption_features(clip, tokens, config.reads_padding)
        )
    return LatentDiffusionStack(clip, generator, randomize(Autoencoder(autoencoder)))


def plain() -> LatentDiffusionStack:
    return stack(mean=[0.0] * 4, std=[4.0] * 4)


def load(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def our_samples(ours: LatentDiffusionStack, scale: float, timesteps: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised latents [B, D, s, s] and images [B, 3, S, S] in [0, 1], at the timesteps of the pipeline."""
    conditions = Conditions(ours.read_captions(CAPTIONS), ours.read_captions(NEGATIVE))
    settings = LatentSampling(guidance_scale=scale, thresholding="none")
    denoiser = ours.generator.denoiser(conditions, 2, settings)
    latents = samplers.ddim(ours.generator.diffusion, denoiser, noise(), timesteps)
    images = ours.autoencoder.decode(ours.generator.denormalize(latents))
    return latents, (images / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def their_samples(pipeline: Any, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = {"guidance_scale": scale, "negative_prompt": NEGATIVE, "num_inference_steps": NUM_STEPS}
    latents = pipeline(CAPTIONS, latents=noise(), output_type="latent", **arguments).images
    images = pipeline(CAPTIONS, latents=noise(), output_type="np", **arguments).images
    return latents, torch.from_numpy(images).permute(0, 3, 1, 2)


@torch.no_grad()
def check_equal(ours: LatentDiffusionStack, pipeline: Any) -> None:
    """Latents, images, and encodings of images are those of the pipeline."""
    for scale in (1.0, 3.0):
        latents, images = their_samples(pipeline, scale)
        expected_latents, expected = our_samples(ours, scale, pipeline.scheduler.timesteps.tolist())
        assert expected_latents.std() > 0.1 and expected.std() > 0.05
        assert not torch.allclose(expected_latents[0], expected_latents[1], atol=0.1)
        torch.testing.assert_close(latents, expected_latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    encoded = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(encoded, ours.generator.normalize(ours.autoencoder.encode(pixels)), atol=1e-4, rtol=1e-4)
    decoded = pipeline.vae.decode(noise() / pipeline.vae.config.scaling_factor).sample  # not clamped
    expected = ours.autoencoder.decode(ours.generator.denormalize(noise()))
    assert expected.std() > 0.1
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("mean", "std", "process", "factor"),
    [
        ([0.0] * 4, [4.0] * 4, DIFFUSION, 0.25),
        ([0.5, -1.0, 0.0, 2.0], [1.0, 0.5, 2.0, 4.0], DiffusionConfig(prediction_type="v"), 1.0),
    ],
)
def test_diffusers_samples_the_same_latents_and_images_as_we_do(
    tmp_path: Path, mean: list[float], std: list[float], process: DiffusionConfig, factor: float
) -> None:
    ours = stack(mean=mean, std=std, diffusion=process)
    notes = export_stack(ours, tmp_path / "exported")
    assert len(notes) == 1 and "guidance_scale 3.0" in notes[0]
    pipeline = load(tmp_path / "exported")
    assert pipeline.vae.config.scaling_factor == factor
    check_equal(ours, pipeline)
    again = import_stack(tmp_path / "exported").stack
    check_equal(again, pipeline)


def test_an_imported_stack_is_saved_loaded_and_exported_with_the_same_bytes(tmp_path: Path) -> None:
    export_stack(plain(), tmp_path / "once")
    imported = import_stack(tmp_path / "once")
    assert imported.notes == [] and imported.stack.clip.image_embeddings == "none"
    save_imported(imported, tmp_path / "saved")
    loaded = load_system(tmp_path / "saved")
    assert isinstance(loaded, LatentDiffusionStack) and loaded.sampling == PIPELINE_SAMPLING
    sampling = dataclasses.replace(loaded.sampling, latent_diffusion=LatentSampling(num_steps=2), precision="fp32")
    images = sample_captions(loaded, CAPTIONS, sampling=sampling)
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()
    torch.testing.assert_close(images, sample_captions(plain(), CAPTIONS, sampling=sampling), atol=1e-3, rtol=0)
    export_stack(loaded, tmp_path / "twice")
    files = [path.relative_to(tmp_path / "once") for path in (tmp_path / "once").rglob("*") if path.is_file()]
    assert len(files) == 12
    for file in files:
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes(), file


def test_a_pipeline_that_diffusers_saved_is_imported(tmp_path: Path) -> None:
    """Parts, names and settings as published folders have them, with another scheduler."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    export_stack(plain(), tmp_path / "exported")
    pipeline = load(tmp_path / "exported")
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "theirs")
    imported = import_stack(tmp_path / "theirs")
    assert isinstance(pipeline, StableDiffusionPipeline) and imported.stack.generator.config.diffusion == DIFFUSION
    check_equal(imported.stack, load(tmp_path / "exported"))


def test_unsupported_stacks_and_existing_folders_are_refused(tmp_path: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=message):
            export_stack(stack(mean=[0.0] * 4, std=[1.0] * 4, **changes), tmp_path / "exported")
        assert not list(tmp_path.iterdir())

    refused("text = 'transformer'", text="transformer", text_transformer=TextTransformerConfig(16, 1, 2))
    refused("variance = 'learned_range'", diffusion=DiffusionConfig(variance="learned_range"))
    vq = dataclasses.replace(AUTOENCODER, bottleneck="vq", codebook_size=8)
    refused("bottleneck = 'vq', expected 'kl'", autoencoder=vq)
    refused("patch_size = 2", autoencoder=dataclasses.replace(AUTOENCODER, patch_size=2, image_size=32))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="expected a new or empty one"):
        export_stack(plain(), tmp_path)


def test_upsamplers_are_left_out_with_a_note(tmp_path: Path) -> None:
    ours = plain()
    network = UNetConfig(16, 8, (1, 2), 1, norm_groups=4)
    upsampler = Upsampler(UpsamplerConfig(unet=network, low_res_size=16, scale=2))
    with_upsampler = LatentDiffusionStack(ours.clip, ours.generator, ours.autoencoder, [upsampler])
    notes = export_stack(with_upsampler, tmp_path / "exported")
    assert "upsampler-32. The pipeline samples 16 pixels" in notes[1]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stable") / "exported"
    export_stack(plain(), folder)
    return folder


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "StableDiffusionXLPipeline"),
        ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]}, "got text_encoder = "),
        ("model_index.json", {"unet": None}, "got unet = None"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name = "),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, r"got betas from 0\.00085 to 0\.02"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas = "),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "prediction_type: got 'eps'"),
        ("tokenizer/tokenizer_config.json", {"pad_token": "!"}, "got pad_token = '!'"),
        ("tokenizer/special_tokens_map.json", {"pad_token": {"content": "!"}}, "got pad_token = '!'"),
        ("text_encoder/config.json", {"hidden_size": 2**21}, "hidden_size = 2097152, expected int from 1 to"),
        ("unet/config.json", {"cross_attention_dim": 17}, "cross_attention_dim = 17"),
        ("vae/config.json", {"shift_factor": 0.5}, "shift_factor 0.5"),
        ("vae/config.json", {"latent_channels": 8}, "do not fit"),
    ],
)
def test_other_pipelines_are_refused(
    exported: Path, tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    for path in exported.rglob("*"):
        copy = tmp_path / path.relative_to(exported)
        copy.mkdir(parents=True, exist_ok=True) if path.is_dir() else copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            copy.hardlink_to(path)
    path = tmp_path / file
    content = json.loads(path.read_text()) | change
    path.unlink()
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        import_stack(tmp_path)
