"""Export and import of priors: same weights, same outputs and same samples in diffusers, in both directions."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unclip.diffusion.process import DiffusionConfig
from unclip.errors import CheckpointError, ConfigError, InputError
from unclip.interop import prior as interop
from unclip.models.prior import DiffusionPrior, PriorConfig, PriorSampling
from unclip.models.text import CaptionFeatures

SMALL = {"width": 32, "depth": 2, "num_heads": 4}
VARIANTS = [
    {},
    {"text_norm": "layer", "norm_in": True},
    {"normalization": "scale", "diffusion": DiffusionConfig(prediction_type="eps"), "clip_range": None},
]


def build(embedding_dim: int = 8, text_width: int = 8, **changes: Any) -> DiffusionPrior:
    torch.manual_seed(0)
    prior = DiffusionPrior(PriorConfig(**{**SMALL, "clip_range": 1.5, **changes}), embedding_dim, text_width, 7)
    mean, std = torch.linspace(-1, 1, embedding_dim), torch.linspace(0.1, 2, embedding_dim)
    prior.statistics.load_state_dict({"mean": mean, "std": std})
    if text_width == 8:
        prior.text.set_null(features(1))
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return prior.eval()


def features(batch: int, seed: int = 0) -> CaptionFeatures:
    generator = torch.Generator().manual_seed(seed)
    projection = 3 * torch.randn(batch, 8, generator=generator)  # not of unit norm, like CLIP's own
    text_mask = torch.arange(7) < torch.tensor([[3], [7], [4]])[:batch]
    encodings = torch.randn(batch, 7, 8, generator=generator)
    return CaptionFeatures(encodings, text_mask, projection)


def to_prior_transformer(prior: DiffusionPrior, folder: Path) -> Any:
    from diffusers import PriorTransformer

    interop.export_prior(prior, folder)
    return PriorTransformer.from_pretrained(folder / "prior").eval()


@torch.no_grad()
def assert_same(ours: DiffusionPrior, theirs: Any) -> None:
    text, x_t = features(3, seed=3), torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
    for t in (0, 421, 999):
        expected = theirs(
            x_t,
            timestep=torch.tensor(t),
            proj_embedding=text.text_embedding,
            encoder_hidden_states=text.text_encodings,
            attention_mask=text.text_mask,
        ).predicted_image_embedding
        found = ours(x_t, torch.full((3,), t), text.text_encodings, text.text_mask, text.text_embedding)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    latents = torch.randn(3, 8)
    torch.testing.assert_close(ours.statistics.denormalize(latents), theirs.post_process_latents(latents))


@pytest.mark.parametrize("changes", VARIANTS)
def test_diffusers_loads_an_exported_prior_and_computes_the_same(tmp_path: Path, changes: dict) -> None:
    prior = build(**changes)
    theirs = to_prior_transformer(prior, tmp_path)
    assert_same(prior, theirs)
    again = interop.import_prior(tmp_path, features(1))
    assert_same(again, theirs)
    assert again.config.clip_range == prior.config.clip_range
    assert again.config.diffusion == prior.config.diffusion
    for name, value in prior.state_dict().items():
        if not name.startswith("statistics") or prior.config.normalization == "standardise":
            assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("settings", [{}, {"norm_in_type": "layer", "embedding_proj_norm_type": "layer"}])
def test_a_prior_saved_by_diffusers_is_imported_and_computes_the_same(tmp_path: Path, settings: dict) -> None:
    from diffusers import PriorTransformer, UnCLIPScheduler

    torch.manual_seed(0)
    theirs = PriorTransformer(4, 6, 3, embedding_dim=8, num_embeddings=7, **settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        theirs.clip_std.copy_(torch.rand(1, 8) + 0.5)
    theirs.save_pretrained(tmp_path / "prior")
    UnCLIPScheduler(clip_sample_range=5.0, prediction_type="sample").save_pretrained(tmp_path / "prior_scheduler")
    ours = interop.import_prior(tmp_path, features(1))
    assert_same(ours, theirs)
    assert (ours.config.clip_range, ours.config.width, ours.config.depth) == (5.0, 24, 3)
    torch.testing.assert_close(ours.statistics.std, theirs.clip_std[0])
    weights = interop.to_diffusers(ours)[1]
    assert weights.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in weights.items())


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("prediction_type", ["x0", "eps"])
@pytest.mark.parametrize(("float64_table", "tolerance"), [(True, 1e-4), (False, 3e-3)])
@torch.no_grad()
def test_the_same_noise_gives_the_same_samples(
    tmp_path: Path, prediction_type: Any, guidance_scale: float, float64_table: bool, tolerance: float
) -> None:
    """Compare the sampling loop of diffusers' UnCLIPPipeline, with its own scheduler, to ours.

    They differ only in the scheduler's float32 table, in which 1 - alphas_cumprod has three correct digits at t = 0.
    """
    from diffusers import UnCLIPScheduler

    prior = build(diffusion=DiffusionConfig(prediction_type=prediction_type))
    theirs = to_prior_transformer(prior, tmp_path)
    scheduler = UnCLIPScheduler.from_pretrained(tmp_path / "prior_scheduler")
    if float64_table:
        scheduler.betas, scheduler.alphas_cumprod = prior.diffusion.betas, prior.diffusion.alphas_cumprod
        scheduler.alphas = 1 - scheduler.betas
    text, null = features(3, seed=3), features(1)
    encodings = torch.cat([null.text_encodings.expand(3, -1, -1), text.text_encodings])
    mask = torch.cat([null.text_mask.expand(3, -1), text.text_mask])
    projection = torch.cat([null.text_embedding.expand(3, -1), text.text_embedding])

    generator = torch.Generator().manual_seed(11)
    latents = torch.randn(3, 8, generator=generator)
    scheduler.set_timesteps(12)
    following = [*scheduler.timesteps[1:], None]
    for t, prev_timestep in zip(scheduler.timesteps, following, strict=True):
        predicted = theirs(
            torch.cat([latents] * 2), t, projection, encoder_hidden_states=encodings, attention_mask=mask
        ).predicted_image_embedding
        without, with_text = predicted.chunk(2)
        predicted = without + guidance_scale * (with_text - without)
        latents = scheduler.step(predicted, t, latents, prev_timestep=prev_timestep, generator=generator).prev_sample
    expected = theirs.post_process_latents(latents)

    samples = prior.sample(
        text.text_encodings,
        text.text_mask,
        text.text_embedding,
        PriorSampling(num_candidates=1, num_steps=12, guidance_scale=guidance_scale),
        generator=torch.Generator().manual_seed(11),
    )
    torch.testing.assert_close(samples, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_norm": "unit"}, "text_norm: got 'unit'"),
        ({"self_conditioning": True}, "self_conditioning: got True"),
        ({"image_drop_prob": 0.1}, "image_drop_prob: got 0.1"),
        ({"clamp_norm": True}, "clamp_norm: got True"),
        ({"text_encodings": False}, "text_encodings: got False"),
        ({"diffusion": DiffusionConfig(prediction_type="v")}, "diffusion.prediction_type: got 'v'"),
        ({"diffusion": DiffusionConfig(schedule="linear")}, "diffusion.schedule: got 'linear'"),
        ({"diffusion": DiffusionConfig(variance="fixed_large")}, "diffusion.variance: got 'fixed_large'"),
        (
            {"diffusion": DiffusionConfig(prediction_type="x0", zero_terminal_snr=True)},
            "diffusion.zero_terminal_snr: got True",
        ),
        ({"text_width": 5}, "width of the text encoder: got 5, expected that of its embeddings, 8"),
    ],
)
def test_priors_that_diffusers_cannot_represent_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        interop.export_prior(build(**changes), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("prior", {"added_emb_type": None}, "PriorTransformer.added_emb_type: got None"),
        ("prior", {"embedding_proj_dim": 9}, "PriorTransformer.embedding_proj_dim: got 9"),
        ("prior_scheduler", {"_class_name": "DDIMScheduler"}, "prior_scheduler._class_name: got 'DDIMScheduler'"),
        ("prior_scheduler", {"_class_name": "DDPMScheduler"}, "prior_scheduler.variance_type: got 'fixed_small_log'"),
        ("prior_scheduler", {"variance_type": "learned_range"}, "prior_scheduler.variance_type"),
        ("prior_scheduler", {"rescale_betas_zero_snr": True}, "prior_scheduler.rescale_betas_zero_snr: got True"),
    ],
)
def test_priors_that_are_not_supported_here_are_refused(
    tmp_path: Path, file: str, settings: dict, message: str
) -> None:
    interop.export_prior(build(), tmp_path)
    name = {"prior": "config.json", "prior_scheduler": "scheduler_config.json"}[file]
    changed = {**json.loads((tmp_path / file / name).read_text()), **settings}
    (tmp_path / file / name).write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match=message):
        interop.import_prior(tmp_path, features(1))


def test_missing_statistics_are_refused_in_both_directions(tmp_path: Path) -> None:
    from diffusers import PriorTransformer

    PriorTransformer(2, 4, 1, embedding_dim=8, num_embeddings=7).save_pretrained(tmp_path / "prior")
    (tmp_path / "prior_scheduler").mkdir()
    (tmp_path / "prior_scheduler" / "scheduler_config.json").write_text(json.dumps(interop.KARLO_SCHEDULER))
    with pytest.raises(InputError, match=r"clip_mean and clip_std: .* never given its statistics"):
        interop.import_prior(tmp_path, features(1))
    prior = build()
    prior.statistics.std.fill_(torch.nan)
    with pytest.raises(InputError, match="never given its statistics"):
        interop.to_diffusers(prior)


def test_errors_name_the_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"prior/config[.]json: cannot be read"):
        interop.import_prior(tmp_path, features(1))
    interop.export_prior(build(), tmp_path)
    settings, weights = interop.to_diffusers(build())
    with pytest.raises(CheckpointError, match=r"do not fit its config[.]json"):
        interop.from_diffusers({**settings, "num_layers": 3}, weights, features(1))
    (tmp_path / "prior" / interop.WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model[.]safetensors: cannot be read"):
        interop.import_prior(tmp_path, features(1))


def test_neither_direction_needs_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    interop.export_prior(build(), tmp_path)
    assert interop.import_prior(tmp_path, features(1)).config.width == 32
