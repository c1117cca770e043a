"""Export of stacks of stable_unclip: diffusers' StableUnCLIPPipeline samples the same latents from the same noise."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unclip.interop.test_decoder import randomize
from tests.unclip.interop.test_stable_diffusion import AUTOENCODER, CAPTIONS, DIFFUSION, NEGATIVE, UNET, noise
from tests.unclip.systems.tiny_stacks import EMBEDDING_DIM, LENGTH, add_noise, tiny_stack
from unclip.diffusion import samplers
from unclip.errors import InputError
from unclip.interop.stable_unclip import export_stack
from unclip.models.autoencoder import Autoencoder
from unclip.models.autoregressive_prior import AutoregressivePrior
from unclip.models.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from unclip.models.prior import DiffusionPrior, PriorSampling
from unclip.models.text import TextShape, caption_features
from unclip.systems.stable_unclip import StableUnclipStack

LEVEL = 300


def stack() -> StableUnclipStack:
    unclip = tiny_stack()
    torch.manual_seed(0)
    config = LatentDiffusionConfig(
        UNET, context_dim=EMBEDDING_DIM, reads_image_embedding=True, max_noise_level=999, diffusion=DIFFUSION
    )
    generator = add_noise(LatentDiffusion(config, EMBEDDING_DIM, TextShape(LENGTH, EMBEDDING_DIM, 49408)))
    generator.set_statistics(torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 0.5, 2.0, 4.0]))
    generator.image.statistics.load_state_dict(unclip.prior.statistics.state_dict())
    generator.text.set_null(caption_features(unclip.clip, unclip.clip.tokenize([""]), reads_padding=True))
    return StableUnclipStack(unclip.clip, unclip.prior, generator, randomize(Autoencoder(AUTOENCODER)))


@torch.no_grad()
def our_samples(ours: StableUnclipStack, scale: float, timesteps: list[int]) -> torch.Tensor:
    """Normalised latents [B, D, s, s], from noise in the order in which the pipeline draws it."""
    model, random = ours.generator, torch.Generator().manual_seed(3)
    assert isinstance(ours.prior, DiffusionPrior) and model.image is not None
    settings = PriorSampling(sampler="ddpm", num_steps=5, guidance_scale=4.0, num_candidates=1)
    embedding = ours.prior.sample(
        *caption_features(ours.clip, ours.clip.tokenize(CAPTIONS)), settings, generator=random
    )
    level = torch.full((2,), LEVEL)
    normalised = model.image.statistics.normalize(embedding)
    noised = model.diffusion.q_sample(normalised, level, torch.randn(normalised.shape, generator=random))
    text, negative = ours.read_captions(CAPTIONS), ours.read_captions(NEGATIVE)
    everything = torch.ones(2, dtype=torch.bool)

    def predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        given = model(x_t, t, text, None, noised, None, level)
        neither = model(x_t, t, negative, None, noised, everything, level)
        return neither + scale * (given - neither)  # type: ignore[no-any-return]

    return samplers.ddim(model.diffusion, model.diffusion.denoiser(predict), noise(), timesteps)


def load(folder: Path, ours: StableUnclipStack) -> Any:
    from diffusers import StableUnCLIPPipeline

    pipeline = StableUnCLIPPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(ours.prior, DiffusionPrior)  # see `with_float64_tables` in test_pipeline.py
    pipeline.prior_scheduler.betas = ours.prior.diffusion.betas
    pipeline.prior_scheduler.alphas_cumprod = ours.prior.diffusion.alphas_cumprod
    return pipeline


def test_diffusers_samples_the_same_latents_as_we_do(tmp_path: Path) -> None:
    ours = stack()
    notes = export_stack(ours, tmp_path / "exported")
    assert len(notes) == 1 and "noise_level 0" in notes[0]
    pipeline = load(tmp_path / "exported", ours)
    for scale in (1.0, 3.0):
        with torch.no_grad():
            found = pipeline(
                CAPTIONS,
                negative_prompt=NEGATIVE,
                height=16,
                width=16,
                prior_num_inference_steps=5,
                prior_guidance_scale=4.0,
                num_inference_steps=5,
                guidance_scale=scale,
                noise_level=LEVEL,
                latents=noise(),
                generator=torch.Generator().manual_seed(3),
                output_type="latent",
            ).images
        expected = our_samples(ours, scale, pipeline.scheduler.timesteps.tolist())
        assert expected.std() > 0.1 and not torch.allclose(expected[0], expected[1], atol=0.1)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_stacks_that_the_pipeline_cannot_represent_are_refused(tmp_path: Path) -> None:
    ours = stack()
    ours.__dict__["_modules"]["prior"] = object.__new__(AutoregressivePrior)
    with pytest.raises(InputError, match="got an autoregressive prior"):
        export_stack(ours, tmp_path / "exported")
    assert not list(tmp_path.iterdir())
