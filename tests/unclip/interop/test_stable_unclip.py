"""Export and import of stacks of stable_unclip: diffusers' StableUnCLIPPipeline samples the same latents from the same noise."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unclip.interop.test_decoder import randomize
from tests.unclip.interop.test_stable_diffusion import AUTOENCODER, CAPTIONS, DIFFUSION, NEGATIVE, UNET, noise
from tests.unclip.systems.sized import shapes
from tests.unclip.systems.tiny_stacks import EMBEDDING_DIM, LENGTH, add_noise, tiny_stack
from unclip.diffusion import samplers
from unclip.errors import CheckpointError, ConfigError, InputError
from unclip.interop.latent_diffusion import check_exportable
from unclip.interop.stable_unclip import PIPELINE_SAMPLING, export_stack, import_stack, save_imported
from unclip.models.autoencoder import Autoencoder, AutoencoderConfig
from unclip.models.autoregressive_prior import AutoregressivePrior
from unclip.models.clip import shape_of
from unclip.models.latent_diffusion import LatentDiffusion, LatentDiffusionConfig, LatentSampling
from unclip.models.prior import DiffusionPrior, PriorSampling
from unclip.models.text import TextShape, caption_features
from unclip.models.unet import UNetConfig
from unclip.systems.latent_sizes import STABLE_UNCLIP_SIZES
from unclip.systems.stable_unclip import STABLE_UNCLIP, StableUnclipSampling, StableUnclipStack
from unclip.systems.system import load_system

LEVEL = 300


CONFIG = LatentDiffusionConfig(
    UNET, context_dim=EMBEDDING_DIM, reads_image_embedding=True, max_noise_level=999, diffusion=DIFFUSION
)


def stack(
    config: LatentDiffusionConfig = CONFIG,
    autoencoder: AutoencoderConfig = AUTOENCODER,
    prior: dict[str, Any] | None = None,
) -> StableUnclipStack:
    """Args: prior: settings of the prior that differ."""
    unclip = tiny_stack(prior=prior)
    torch.manual_seed(0)
    generator = add_noise(LatentDiffusion(config, EMBEDDING_DIM, TextShape(LENGTH, EMBEDDING_DIM, 49408)))
    generator.set_statistics(torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 0.5, 2.0, 4.0]))
    generator.image.statistics.load_state_dict(unclip.prior.statistics.state_dict())
    generator.text.set_null(caption_features(unclip.clip, unclip.clip.tokenize([""]), reads_padding=True))
    return StableUnclipStack(unclip.clip, unclip.prior, generator, randomize(Autoencoder(autoencoder)))


def shallow(unet: UNetConfig) -> UNetConfig:
    """The layout of a U-Net, with few channels and an eighth of the resolution."""
    resolutions = tuple(resolution // 8 for resolution in unet.attention_resolutions)
    return dataclasses.replace(
        unet, image_size=unet.image_size // 8, attention_resolutions=resolutions, channels=8, norm_groups=4
    )


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


def test_diffusers_samples_the_same_latents_and_images_as_we_do(tmp_path: Path) -> None:
    ours = stack()
    notes = export_stack(ours, tmp_path / "exported")
    assert len(notes) == 1 and "noise_level 0" in notes[0]
    pipeline = load(tmp_path / "exported", ours)
    for scale in (1.0, 3.0):
        with torch.no_grad():
            found, images = (
                pipeline(
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
                    output_type=kind,
                ).images
                for kind in ("latent", "np")
            )
        expected = our_samples(ours, scale, pipeline.scheduler.timesteps.tolist())
        assert expected.std() > 0.1 and not torch.allclose(expected[0], expected[1], atol=0.1)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            decoded = ours.autoencoder.decode(ours.generator.denormalize(expected))
        shown = torch.from_numpy(images).permute(0, 3, 1, 2)  # [B, 3, S, S] in [0, 1]
        assert shown.std() > 0.05
        torch.testing.assert_close(shown, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)


def test_an_imported_stack_samples_what_the_exported_one_does(tmp_path: Path) -> None:
    ours = stack()
    export_stack(ours, tmp_path / "exported")
    save_imported(import_stack(tmp_path / "exported"), tmp_path / "imported")
    again = load_system(tmp_path / "imported")
    assert isinstance(again, StableUnclipStack) and again.sampling == PIPELINE_SAMPLING
    assert again.clip.image_embeddings == "none" and not again.upsamplers
    settings = StableUnclipSampling(
        prior=PriorSampling(sampler="ddpm", num_steps=5, guidance_scale=4.0, num_candidates=1),
        stable_unclip=LatentSampling(num_steps=5, guidance_scale=3.0, noise_level=LEVEL),
        precision="fp32",
    )
    images = [
        each.sample(CAPTIONS, settings, torch.Generator().manual_seed(1), negative=NEGATIVE) for each in (ours, again)
    ]
    assert images[0].std() > 0.1 and not torch.allclose(images[0][0], images[0][1], atol=0.1)
    torch.testing.assert_close(images[0], images[1], atol=1e-4, rtol=1e-4)
    export_stack(again, tmp_path / "back")
    for path in sorted((tmp_path / "exported").rglob("*.safetensors")):
        tensors, others = load_file(path), load_file(tmp_path / "back" / path.relative_to(tmp_path / "exported"))
        torch.testing.assert_close(others, tensors, atol=1e-5, rtol=1e-5)


def test_the_size_stable_diffusion_is_exported(tmp_path: Path) -> None:
    """Its settings in all that does not multiply weights; the network itself is checked without its weights."""
    size = STABLE_UNCLIP_SIZES["stable_diffusion"]
    network = STABLE_UNCLIP.network(size.generator, shapes(size))  # type: ignore[arg-type]
    with torch.device("meta"):
        check_exportable(network.build())  # type: ignore[arg-type]
    config = dataclasses.replace(
        size.generator.model, unet=shallow(size.generator.model.unet), context_dim=EMBEDDING_DIM
    )
    autoencoder = dataclasses.replace(size.autoencoder.model, image_size=64, channels=8, norm_groups=4)
    prior = vars(size.prior.prior.model) | {"width": 32, "depth": 2, "num_heads": 4}
    assert size.prior.prior.kind == "diffusion" and shape_of(size.clip).embedding_dim == shape_of(size.clip).text_width
    ours = stack(config, autoencoder, prior)
    export_stack(ours, tmp_path / "exported")
    imported = import_stack(tmp_path / "exported").stack
    assert imported.generator.config.unet == config.unet and imported.generator.config.diffusion == config.diffusion


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_pipeline_that_a_stack_cannot_represent_is_not_imported(tmp_path: Path) -> None:
    export_stack(stack(), tmp_path / "exported")
    normalizer, encoder = "image_normalizer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
    weights = load_file(tmp_path / "exported" / encoder)
    name = next(name for name in weights if name.endswith("final_layer_norm.weight"))
    for number, (message, spoil) in enumerate(
        {
            "expected a StableUnCLIPPipeline": lambda at: change(at / "model_index.json", _class_name="UnCLIPPipeline"),
            "got prior = .* expected a PriorTransformer": lambda at: change(at / "model_index.json", prior=["a", "b"]),
            "expected the text encoder of one CLIP in both": lambda at: save_file(
                weights | {name: weights[name] + 1}, at / encoder
            ),
            "than in scheduler/": lambda at: change(
                at / "image_noising_scheduler/scheduler_config.json", beta_schedule="squaredcos_cap_v2"
            ),
            "expected mean and std of": lambda at: save_file({"mean": torch.zeros(1, 3)}, at / normalizer),
            "statistics": lambda at: save_file(
                {"mean": torch.zeros(1, EMBEDDING_DIM), "std": torch.full((1, EMBEDDING_DIM), 2.0)}, at / normalizer
            ),
            "prior_scheduler.beta_schedule: got 'linear'": lambda at: change(
                at / "prior_scheduler/scheduler_config.json", beta_schedule="linear"
            ),
        }.items()
    ):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "exported", folder)
        spoil(folder)
        with pytest.raises((CheckpointError, ConfigError), match=message):
            import_stack(folder)


def test_stacks_that_the_pipeline_cannot_represent_are_refused(tmp_path: Path) -> None:
    ours = stack()
    ours.__dict__["_modules"]["prior"] = object.__new__(AutoregressivePrior)
    with pytest.raises(InputError, match="got an autoregressive prior"):
        export_stack(ours, tmp_path / "exported")
    assert not list(tmp_path.iterdir())
