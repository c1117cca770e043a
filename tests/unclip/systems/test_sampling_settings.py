"""Sampling settings of a stack: each has its documented effect on the images, and docs/sampling.md lists them all."""

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tests.unclip.systems import tiny_stacks
from unclip.config import load, override, to_dict
from unclip.data import RowReader, Source
from unclip.diffusion.sampling import DiffusionSampling
from unclip.downscaling import shrink
from unclip.errors import ConfigError, InputError, ShapeError
from unclip.models.decoder import DecoderSampling
from unclip.models.image_denoiser import ImageDenoiserSampling
from unclip.models.prior import PriorSampling
from unclip.models.small_images import NO_CAPTIONS, Captions
from unclip.models.text import caption_features
from unclip.models.upsampler import UpsamplerConfig, UpsamplerSampling
from unclip.systems.glide.stack import GlideSampling
from unclip.systems.imagen.stack import ImagenStackSampling
from unclip.systems.latent_diffusion import LatentDiffusionSampling
from unclip.systems.stable_unclip import StableUnclipSampling
from unclip.systems.system import load_model, sample_captions, seeded
from unclip.systems.unclip.decoder import DecoderObjective
from unclip.systems.unclip.prior import PriorObjective
from unclip.systems.unclip.sampling import SamplingConfig
from unclip.systems.unclip.stack import Stack
from unclip.systems.upsampler import UPSAMPLER, UpsamplerObjective
from unclip.training import checkpoints, trainer
from unclip.training.settings import TrainerConfig

DOCS = Path(__file__).resolve().parents[3] / "docs" / "sampling.md"
CAPTIONS = ["a red circle", "a blue star"]
BASE = to_dict(
    SamplingConfig(
        prior=PriorSampling(num_steps=3, guidance_scale=2.0),
        decoder=DecoderSampling(num_steps=4),
        upsamplers={"16": UpsamplerSampling(num_steps=4)},
        precision="fp32",
    )
)


@pytest.fixture(scope="module")
def stack() -> Stack:
    """A stack of 8 and 16 pixels with measured scores, whose upsampler is conditioned on the noise level."""
    stack = tiny_stacks.tiny_stack(upsampler={"max_noise_level": 300})
    for model in (stack.prior, stack.decoder, *stack.upsamplers):
        model.measured = {"mean_squared_score": 1 / (1 - 0.5 * model.diffusion.alphas_cumprod)}
        model.requires_grad_(False)
    return stack


def settings(*assignments: str) -> SamplingConfig:
    values = BASE
    for assignment in assignments:
        values = override(values, assignment)
    return load(SamplingConfig, values)


def images(stack: Stack, *assignments: str, seed: int = 0, **inputs: Any) -> Tensor:
    return sample_captions(stack, CAPTIONS, sampling=settings(*assignments), seed=seed, **inputs)


@pytest.mark.parametrize(
    "assignments",
    [
        *(
            (f"{part}.sampler={name}",)
            for part in ("prior", "decoder", "upsamplers.16")
            for name in ("heun", "analytic_dpm")
        ),
        *((f"{part}.num_steps=5",) for part in ("prior", "decoder", "upsamplers.16")),
        ("prior.sampler=ddim",),
        *((f"{part}.sampler=ddim", f"{part}.eta=0.5") for part in ("prior", "decoder", "upsamplers.16")),
        *((f"{part}.guidance_scale=3.0",) for part in ("prior", "decoder")),
        *((f"{part}.guidance_interval=[0.0,0.5]",) for part in ("prior", "decoder")),
        *((f"{part}.guidance_rescale=1.0",) for part in ("prior", "decoder")),
        *((f"{part}.thresholding=none",) for part in ("decoder", "upsamplers.16")),
        *((f"{part}.thresholding=dynamic",) for part in ("decoder", "upsamplers.16")),
        *((f"{part}.threshold=0.3",) for part in ("prior", "decoder", "upsamplers.16")),
        ("prior.num_candidates=4",),
        ("decoder.text_guidance_scale=3.0",),
        ("decoder.clip_guidance_scale=5.0",),
        ("upsamplers.16.noise_level=200",),
        ("image_embedding=text_embedding",),
        ("image_embedding=none",),
        ("decoder.reads_captions=false",),
    ],
    ids=",".join,
)
def test_a_setting_changes_the_images(stack: Stack, assignments: tuple[str, ...]) -> None:
    before, after = images(stack), images(stack, *assignments)
    assert after.isfinite().all() and (before - after).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    assert torch.equal(images(stack, *assignments), after)


@pytest.mark.parametrize(
    ("assignments", "others"),
    [
        (("decoder.guidance_interval=[0.9991,0.9992]",), ("decoder.guidance_scale=1.0",)),
        (("prior.sampler=ddim", "prior.eta=1.0"), ()),  # ancestral sampling
        (("decoder.threshold=1.0", "decoder.threshold_quantile=0.5"), ()),  # the range of images
        (("upsamplers.16.thresholding=none", "upsamplers.16.threshold=0.1"), ("upsamplers.16.thresholding=none",)),
        (("prior.threshold=3.0",), ()),  # the prior's own clip_range
    ],
    ids=lambda assignments: ",".join(assignments),
)
def test_equivalent_settings_give_the_same_images(
    stack: Stack, assignments: tuple[str, ...], others: tuple[str, ...]
) -> None:
    torch.testing.assert_close(images(stack, *assignments), images(stack, *others), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("decoder.eta=2", "decoder.eta: got 2.0, expected 0 to 1"),
        ("prior.eta=0.5", "prior.eta: got 0.5, expected 0 with the sampler ddpm"),
        ("decoder.strength=1.5", "decoder.strength: got 1.5, expected 0 to 1"),
        ("decoder.clip_guidance_scale=-1", "decoder.clip_guidance_scale: got -1.0"),
        ("upsamplers.16.guidance_scale=2", r"upsamplers\.16\.guidance_scale: got 2\.0, expected no guidance"),
    ],
)
def test_errors_name_the_part_of_an_impossible_setting(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(assignment)


def test_an_upsampler_refuses_noise_levels_that_it_was_not_trained_with(stack: Stack) -> None:
    with pytest.raises(ConfigError, match="noise_level: got 301, expected at least 0, at most 300"):
        images(stack, "upsamplers.16.noise_level=301")


def test_the_decoder_samples_without_the_prior_and_without_captions(stack: Stack) -> None:
    """The rows of Ramesh et al. 2022, figure 8: embeddings and captions are what they are without these settings."""
    captions = stack.captions(CAPTIONS, settings())
    sources = {"text_embedding": stack.embed_text(CAPTIONS), "none": stack.decoder.null_image_embedding(2)}
    for source, embedding in sources.items():
        for reads, given in (("true", captions), ("false", NO_CAPTIONS)):
            found = images(stack, f"image_embedding={source}", f"decoder.reads_captions={reads}", seed=3)
            expected = stack.decode(embedding, settings(), seeded(stack.device, 3 * 1_000_003), given)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    nothing = ("image_embedding=none", "decoder.reads_captions=false")
    unguided = images(stack, *nothing, "decoder.guidance_scale=1.0", seed=3)
    torch.testing.assert_close(images(stack, *nothing, seed=3), unguided, rtol=0, atol=1e-4)  # nothing to guide by


def test_a_text_embedding_in_the_priors_place_has_the_scale_of_image_embeddings() -> None:
    stack = tiny_stacks.tiny_stack(clip=tiny_stacks.tiny_clip(image_embeddings="raw"))
    found = stack.embed_captions(CAPTIONS, settings("image_embedding=text_embedding"), torch.Generator())
    assert torch.equal(found, caption_features(stack.clip, stack.clip.tokenize(CAPTIONS)).text_embedding)
    torch.testing.assert_close(F.normalize(found, dim=1), stack.embed_text(CAPTIONS))
    assert (found.norm(dim=1) - 1).abs().min() > 0.1


# ----------------------------------------------------------------------------------------------- negative captions


def test_an_empty_negative_caption_changes_nothing(stack: Stack) -> None:
    assert torch.allclose(images(stack, negative=["", ""]), images(stack), atol=1e-5)
    one, other = images(stack, negative=["a green cross", ""])[:], images(stack)
    assert not torch.allclose(one[0], other[0], atol=1e-3) and torch.allclose(one[1], other[1], atol=1e-5)


def test_guidance_leads_away_from_the_negative_caption(stack: Stack) -> None:
    """Check x0 = x0(negative) + scale (x0(caption) - x0(negative)) for both the prior and the decoder."""
    text, negative = (
        caption_features(stack.clip, stack.clip.tokenize([words] * 2)) for words in ("a red circle", "a green cross")
    )
    t, x_t = torch.full((2,), 600), torch.randn(2, tiny_stacks.EMBEDDING_DIM)
    free = PriorSampling(guidance_scale=3, thresholding="none")
    prior = {
        words: stack.prior.denoiser(*words, PriorSampling(thresholding="none"))(x_t, t).x0 for words in (text, negative)
    }
    found = stack.prior.denoiser(*text, free, negative)(x_t, t).x0
    torch.testing.assert_close(found, prior[negative] + 3 * (prior[text] - prior[negative]), rtol=1e-4, atol=1e-4)

    decoder, x_t, drop = stack.decoder, torch.randn(2, 3, 8, 8), torch.ones(2, dtype=torch.bool)
    embedding = torch.randn(2, tiny_stacks.EMBEDDING_DIM)

    def x0(caption: Any, image_drop: Tensor | None = None) -> Tensor:
        return decoder.diffusion.predict_x0(x_t, t, decoder(x_t, t, embedding, image_drop, caption))

    away, both = x0(negative, drop), x0(text)
    guided = DecoderSampling(guidance_scale=3, thresholding="none")
    found = decoder.denoiser(embedding, guided, Captions(text, negative))(x_t, t).x0
    torch.testing.assert_close(found, away + 3 * (both - away), rtol=1e-4, atol=1e-4)
    two = dataclasses.replace(guided, text_guidance_scale=5.0)
    image_alone = x0(negative)
    expected = away + 3 * (image_alone - away) + 5 * (both - image_alone)
    found = decoder.denoiser(embedding, two, Captions(text, negative))(x_t, t).x0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_negative_caption_without_guidance_is_refused(stack: Stack) -> None:
    unguided = ("prior.guidance_scale=1.0", "decoder.guidance_scale=1.0")
    with pytest.raises(InputError, match="negative: got 'red', but nothing that reads captions is guided"):
        images(stack, *unguided, negative=["red", "red"])
    assert images(stack, unguided[0], negative=["red", "red"]).isfinite().all()
    without_prior = (
        "image_embedding=text_embedding",
        "decoder.guidance_scale=1.0",
    )  # the prior is guided, but not used
    with pytest.raises(InputError, match="nothing that reads captions is guided"):
        images(stack, *without_prior, negative=["red", "red"])
    with pytest.raises(ShapeError, match="got 1 negative captions for 2 captions"):
        stack.sample(CAPTIONS, settings(), torch.Generator(), negative=["red"])


# ------------------------------------------------------------------------------------------------- image to image


def test_higher_strength_moves_further_from_the_start_image() -> None:
    stack = tiny_stacks.tiny_stack()
    given = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
    start = F.interpolate(given, 16, mode="bilinear").expand(2, -1, -1, -1)
    low_res = shrink(start, 8)
    seen: list[Tensor] = []
    hook = stack.upsamplers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))

    def distance(strength: float) -> float:
        """Mean distance of the decoder's images from the start images."""
        seen.clear()
        images(stack, f"decoder.strength={strength}", start=start)
        return float((seen[0] - low_res).abs().mean())

    distances = [distance(strength) for strength in (0.0, 0.1, 0.5, 1.0)]
    hook.remove()
    assert distances[0] == 0 and 0 < distances[1] < distances[2]
    assert torch.equal(images(stack, "decoder.strength=1.0", start=start), images(stack))
    assert not torch.equal(images(stack, "decoder.strength=0.5", start=start), images(stack))
    with pytest.raises(ShapeError, match="start images"):
        images(stack, start=start[..., :8])


# -------------------------------------------------------------------------------------------------- CLIP guidance


def test_clip_guidance_follows_the_gradient_of_the_similarity(stack: Stack) -> None:
    """Check that eps moves by -scale sqrt(1 - alphas_cumprod) times the gradient with respect to x_t."""
    decoder, t = stack.decoder, torch.full((2,), 300)
    x_t, embedding = torch.randn(2, 3, 8, 8), torch.randn(2, tiny_stacks.EMBEDDING_DIM)
    steering = stack.captions(CAPTIONS, settings("decoder.clip_guidance_scale=1.0"))
    assert steering.caption_similarity is not None and stack.captions(CAPTIONS, settings()).caption_similarity is None
    cosine = F.cosine_similarity(
        stack.clip.embed_images(stack.clip.resize(x_t.clamp(-1, 1))), stack.embed_text(CAPTIONS), dim=1
    )
    torch.testing.assert_close(steering.caption_similarity(x_t.clamp(-1, 1)), cosine)

    def eps(scale: float) -> Tensor:
        values = DecoderSampling(clip_guidance_scale=scale, thresholding="none")
        return decoder.diffusion.eps_from_x0(x_t, t, decoder.denoiser(embedding, values, steering)(x_t, t).x0)

    x = x_t.clone().requires_grad_()
    x0 = decoder.diffusion.predict_x0(x, t, decoder(x, t, embedding, text=steering.text)).clamp(-1, 1)
    (gradient,) = torch.autograd.grad(steering.caption_similarity(x0).sum(), x)
    sigma = (1 - decoder.diffusion.alphas_cumprod[300]).sqrt().float()
    torch.testing.assert_close(eps(40.0) - eps(0.0), -40 * sigma * gradient, rtol=1e-3, atol=1e-4)
    assert (gradient.abs().amax(dim=(1, 2, 3)) > 1e-5).all()


def test_clip_guidance_needs_a_caption(stack: Stack) -> None:
    with pytest.raises(ConfigError, match="clip_guidance_scale: got 2, expected 0 if no caption is given"):
        stack.decoder.denoiser(torch.randn(1, tiny_stacks.EMBEDDING_DIM), DecoderSampling(clip_guidance_scale=2))


# ------------------------------------------------------------------------------- the mean squared score of Analytic-DPM


def jpeg(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (value, 255 - value, 100)).save(file, "JPEG")
    return file.getvalue()


def train_upsampler(folder: Path) -> str:
    """Train on 32 samples; return the digest of the training."""
    rows = [jpeg(8 * index) for index in range(32)]
    keys = [f"{index:02d}" for index in range(32)]
    pq.write_table(pa.table({"key": keys, "jpg": rows}), folder / "rows.parquet")
    torch.manual_seed(0)
    config = UpsamplerConfig(tiny_stacks.SMALLEST, low_res_size=8, scale=2)
    objective = UpsamplerObjective(config, {"jpg": rows[:2]})
    reader = RowReader.of_keys([Source((str(folder / "rows.parquet"),), ("jpg",))], keys)
    training = TrainerConfig(num_samples=32, batch_size=16, precision="fp32")
    return trainer.train(objective, reader, training, str(folder / "run"))


def test_training_measures_the_scores_that_analytic_dpm_needs(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        digests.append(train_upsampler(tmp_path / name))
    assert digests[0] == digests[1]
    folder = f"{tmp_path}/one/run/model"
    model: Any = load_model(folder, (UPSAMPLER,))
    score = model.measured["mean_squared_score"]
    assert score.shape == (1000,) and score.isfinite().all() and (score >= 0).all()

    def sample(sampler: Any) -> Tensor:
        values = UpsamplerSampling(sampler=sampler, num_steps=4)
        return model.sample(torch.zeros(1, 3, 8, 8), values, generator=torch.Generator().manual_seed(0))

    assert sample("analytic_dpm").isfinite().all() and not torch.equal(sample("analytic_dpm"), sample("ddpm"))
    # a model saved by an earlier version, without the measurement
    tensors, facts = checkpoints.load(folder)
    checkpoints.save(f"{tmp_path}/before", {"model": tensors["model"]}, facts)
    before: Any = load_model(f"{tmp_path}/before", (UPSAMPLER,))
    with pytest.raises(ConfigError, match=r"'analytic_dpm'.* Train it again"):
        before.sample(torch.zeros(1, 3, 8, 8), UpsamplerSampling(sampler="analytic_dpm"))


def test_priors_and_decoders_measure_the_scores_too(stack: Stack) -> None:
    clip, statistics = stack.clip, stack.decoder.statistics
    batch = {
        "tokens": list(clip.tokenize(CAPTIONS).numpy()),
        "image_embedding": list(torch.randn(2, tiny_stacks.EMBEDDING_DIM).numpy()),
        "jpg": [jpeg(0), jpeg(200)],
    }
    config = dataclasses.replace(stack.decoder.config, text="clip")
    objectives = [
        PriorObjective(stack.prior.config, clip, statistics),
        DecoderObjective(config, statistics, batch, clip),
    ]
    for objective, trained in zip(objectives, (stack.prior, stack.decoder), strict=True):
        tensors = objective.prepare(batch)
        one, other = (
            objective.measure(trained, tensors, torch.Generator().manual_seed(seed))["mean_squared_score"]
            for seed in (0, 0)
        )
        assert one.shape == (1000,) and one.isfinite().all() and torch.equal(one, other)
        # at the noisiest timestep, x_t is almost pure noise, whose score has a mean square of 1
        assert float(one[0]) > 0 and float(one[-1]) == pytest.approx(1, abs=1.0)


# ------------------------------------------------------------------------------------------------------- previews


def test_previews_follow_their_settings(stack: Stack) -> None:
    batch = {
        "image_embedding": [torch.randn(tiny_stacks.EMBEDDING_DIM).numpy()],
        "jpg": [jpeg(0)],
        "tokens": [[1] * 10],
    }
    without_text = dataclasses.replace(stack.decoder.config, text="none")
    previews = []
    for preview in (DecoderSampling(num_steps=2), DecoderSampling(num_steps=2, guidance_scale=1.0)):
        objective = DecoderObjective(without_text, stack.decoder.statistics, batch, preview_sampling=preview)
        tiny_stacks.add_noise(objective.model)
        previews.append(objective.preview(objective.model))
        assert torch.equal(
            previews[-1][1:],
            objective.model.sample(
                torch.tensor(batch["image_embedding"][0])[None], preview, generator=torch.Generator().manual_seed(0)
            ),
        )
    assert not torch.equal(*previews)


# ----------------------------------------------------------------------------------------------------------- docs


def documented(section: str) -> dict[str, Any]:
    """Names and defaults in a section's table."""
    [text] = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \| (.+?) \| (.*?)\|$", text, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| `", text, re.MULTILINE))

    def value(word: str) -> Any:
        try:
            return json.loads(word)
        except ValueError:
            return None if word == "none" else word

    return {name: value(default) for name, default, _, _ in rows}


def test_the_docs_list_all_settings_with_their_defaults() -> None:
    shared = to_dict(DiffusionSampling())
    assert documented("Every part") == shared
    for section, part in {
        "`prior`": PriorSampling(),
        "`decoder`": DecoderSampling(),
        "`glide`": GlideSampling().glide,
        "`imagen`": ImagenStackSampling().imagen,
        "`latent_diffusion`": LatentDiffusionSampling().latent_diffusion,
        "`stable_unclip`": StableUnclipSampling().stable_unclip,
        "`denoiser`": ImageDenoiserSampling(),
        "`upsamplers.64`": UpsamplerSampling(),
    }.items():
        own = {name: value for name, value in to_dict(part).items() if name not in shared or value != shared[name]}
        assert documented(section) == own, section
    stack_settings = to_dict(SamplingConfig())
    own = ("batch_size", "precision", "pad_batches", "image_embedding")
    assert documented("The stack") == {name: stack_settings[name] for name in own}
    assert stack_settings.keys() == {"prior", "decoder", "upsamplers", *own}
