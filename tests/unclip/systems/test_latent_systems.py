"""Latent diffusion and stable unCLIP: their training, and their stacks from files to images."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.unclip.systems import latent_parts
from tests.unclip.systems.latent_parts import (
    CONFIGS,
    FACTS,
    MEAN,
    SAMPLING,
    STD,
    objective,
    publish,
    rows,
    tiny_autoencoder,
)
from unclip.data import RowReader, Source
from unclip.errors import CheckpointError, ConfigError, InputError, ShapeError
from unclip.models import clip as clip_models
from unclip.models.clip import Clip
from unclip.models.latent_diffusion import LatentDiffusion
from unclip.models.text import caption_features
from unclip.systems.captions import check_clip
from unclip.systems.inpainting import inpaint
from unclip.systems.latent_diffusion import LATENT_DIFFUSION, LatentDiffusionStack, LatentSystem
from unclip.systems.stable_unclip import STABLE_UNCLIP, StableUnclipStack
from unclip.systems.system import find_system, load_model, load_system, sample_captions, sample_together
from unclip.training import checkpoints, trainer
from unclip.training.settings import TrainerConfig

KINDS = ("latent_diffusion", "stable_unclip")
CAPTIONS = ["a red circle", "a blue star", "a green square"]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return latent_parts.tiny_clip()


@pytest.fixture(scope="module", params=KINDS)
def stack(request: pytest.FixtureRequest, clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> LatentSystem:
    folder = tmp_path_factory.mktemp(request.param)
    publish(request.param, folder, clip)
    loaded = load_system(folder / "stack")
    assert isinstance(loaded, LatentSystem)
    return loaded


def kind_of(stack: LatentSystem) -> str:
    return "stable_unclip" if isinstance(stack, StableUnclipStack) else "latent_diffusion"


def with_settings(stack: LatentSystem, **changes: Any) -> Any:
    """Sampling settings with some of the network of latents changed."""
    kind = kind_of(stack)
    sampling = SAMPLING[kind]
    return dataclasses.replace(sampling, **{kind: dataclasses.replace(getattr(sampling, kind), **changes)})


def reader(folder: Path, clip: Clip) -> RowReader:
    """Reader of eight rows, as if both tables were one."""
    table = pa.table(rows(clip))
    pq.write_table(table, folder / "rows.parquet")
    source = Source((f"{folder}/rows.parquet",), ("latent", "tokens", "image_embedding"))
    return RowReader.of_keys((source,), table["key"].to_pylist())


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_training_is_loaded_with_the_scale_of_the_latents(tmp_path: Path, clip: Clip, kind: str) -> None:
    settings = TrainerConfig(num_samples=16, batch_size=8, precision="fp32")
    trainer.train(objective(kind, clip), reader(tmp_path, clip), settings, f"{tmp_path}/run")
    part = {"latent_diffusion": LATENT_DIFFUSION, "stable_unclip": STABLE_UNCLIP}[kind]
    loaded = load_model(f"{tmp_path}/run/model", (part,))
    assert isinstance(loaded, LatentDiffusion) and loaded.autoencoder_digest == "d1"
    assert torch.equal(loaded.latent_mean, torch.tensor(MEAN)) and torch.equal(loaded.latent_std, torch.tensor(STD))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_latents_of_unit_variance(clip: Clip, kind: str) -> None:
    trained = objective(kind, clip)
    tensors = trained.prepare(rows(clip, 64))
    latents = trained.model.normalize(tensors["latents"])
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.05
    assert latents.std(dim=(0, 2, 3)) == pytest.approx(torch.ones(4), abs=0.05)
    torch.testing.assert_close(trained.model.denormalize(latents), tensors["latents"])
    loss = trained.loss(trained.model, tensors, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(1, abs=0.15), "the variance of v: an untrained network predicts zeros"


def test_the_preview_shows_reconstructions_and_samples(clip: Clip) -> None:
    for kind in KINDS:
        trained = objective(kind, clip)
        images = trained.preview(trained.model)
        latents = trained.prepare(rows(clip, 2))["latents"]
        expected = tiny_autoencoder().decode(latents).clamp(-1, 1)
        torch.testing.assert_close(images[:2], expected)
        assert images.shape == (4, 3, 16, 16) and images.isfinite().all()


def test_latents_of_another_shape_are_refused(clip: Clip) -> None:
    with pytest.raises(ConfigError, match=r"latent_channels 3 .* expected 4 and 8"):
        objective("latent_diffusion", clip, latent_channels=3)
    assert CONFIGS["latent_diffusion"].model.latent_shape == tuple(FACTS["latent_shape"])  # type: ignore[arg-type]


def test_samples_are_those_of_their_captions_seeds_and_settings(stack: LatentSystem) -> None:
    sampling = SAMPLING[kind_of(stack)]
    assert stack.sampling == sampling and stack.image_size == 16
    images = sample_captions(stack, CAPTIONS, seed=1)
    assert images.shape == (3, 3, 16, 16) and images.abs().max() <= 1
    assert torch.equal(images, sample_captions(stack, CAPTIONS, seed=1))
    assert not torch.allclose(images, sample_captions(stack, CAPTIONS[::-1], seed=1), atol=1e-3)
    assert not torch.allclose(images, sample_captions(stack, CAPTIONS, seed=2), atol=1e-3)
    unguided = sample_captions(stack, CAPTIONS, seed=1, sampling=with_settings(stack, guidance_scale=1.0))
    assert not torch.allclose(images, unguided, atol=1e-3)
    together = sample_together(stack, CAPTIONS, [(1, 1), (7, 2)], sampling=sampling)
    torch.testing.assert_close(together[:1], sample_captions(stack, CAPTIONS[:1], seed=1), atol=1e-4, rtol=1e-4)


def test_negative_captions_change_samples_if_something_is_guided(stack: LatentSystem) -> None:
    images = sample_captions(stack, CAPTIONS, seed=1)
    negative = sample_captions(stack, CAPTIONS, seed=1, negative=["a white cross"] * 3)
    assert not torch.allclose(images, negative, atol=1e-3)
    unguided = with_settings(stack, guidance_scale=1.0)
    with pytest.raises(InputError, match="nothing that reads captions is guided"):
        sample_captions(stack, CAPTIONS, negative=["a"] * 3, sampling=unguided)
    with pytest.raises(ShapeError, match="2 negative captions for 3"):
        stack.sample(CAPTIONS, stack.sampling, torch.Generator(), negative=["a", "b"])


def test_a_start_image_is_kept_as_far_as_its_strength_says(stack: LatentSystem) -> None:
    start = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    same = sample_captions(stack, CAPTIONS, start=start, sampling=with_settings(stack, strength=0.0))
    reconstructed = stack.autoencoder.decode(stack.autoencoder.encode(start)).clamp(-1, 1)
    torch.testing.assert_close(same, reconstructed, atol=1e-4, rtol=1e-4)
    ignored = sample_captions(stack, CAPTIONS, start=start, sampling=with_settings(stack, strength=1.0))
    assert torch.equal(ignored, sample_captions(stack, CAPTIONS))


def test_known_pixels_are_returned_bit_for_bit_and_known_latents_are_kept(stack: LatentSystem) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    known = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    known[:, :, 3:9, 3:9] = False
    found = inpaint(stack, images, known, CAPTIONS[:2], sampling=with_settings(stack, num_resamplings=2))
    assert torch.equal(torch.where(known, found, 0), torch.where(known, images, 0))
    assert not torch.equal(found, images)
    everything = inpaint(stack, images, torch.ones_like(known), CAPTIONS[:2])
    assert torch.equal(everything, images)


def test_stable_unclip_samples_embeddings_and_reconstructs_images(clip: Clip, tmp_path: Path) -> None:
    publish("stable_unclip", tmp_path, clip)
    stack = load_system(tmp_path / "stack")
    assert isinstance(stack, StableUnclipStack) and find_system("stable_unclip").reconstructs
    sampling = stack.sampling
    one, other = (stack.sample_embeddings(CAPTIONS, sampling, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.shape == (3, clip.embedding_dim) and torch.equal(one, other)
    images = torch.rand(2, 3, 20, 20) * 2 - 1
    clean, again, noised = (
        stack.reconstruct(images, with_settings(stack, noise_level=level), torch.Generator().manual_seed(3))
        for level in (0, 0, 300)
    )
    assert clean.shape == (2, 3, 16, 16) and torch.equal(clean, again) and not torch.allclose(clean, noised, atol=1e-3)
    with pytest.raises(ConfigError, match="noise_level: got 501, expected at most 500"):
        stack.reconstruct(images, with_settings(stack, noise_level=501), torch.Generator())


def test_parts_that_do_not_fit_each_other_are_refused(clip: Clip, tmp_path: Path) -> None:
    files = publish("latent_diffusion", tmp_path, clip)
    other = tiny_autoencoder().state_dict()
    facts = {"kind": "autoencoder", "config": dataclasses.asdict(latent_parts.AUTOENCODER), "samples_seen": 2}
    checkpoints.save(f"{tmp_path}/other", {"model": other}, facts)
    models = {**files.models, "autoencoder": f"{tmp_path}/other"}
    with pytest.raises(CheckpointError, match="was trained on latents of the autoencoder"):
        LatentDiffusionStack.load(dataclasses.replace(files, models=models))
    del models["autoencoder"]
    with pytest.raises(CheckpointError, match="expected a CLIP and latent_diffusion, autoencoder"):
        LatentDiffusionStack.load(dataclasses.replace(files, models=models))
    generator = objective("latent_diffusion", clip).model
    larger = dataclasses.replace(latent_parts.AUTOENCODER, image_size=32)
    with pytest.raises(CheckpointError, match=r"samples latents \(4, 8, 8\), but the autoencoder's are \(4, 16, 16\)"):
        LatentDiffusionStack(clip, generator, type(tiny_autoencoder())(larger))


@pytest.mark.parametrize(
    ("kind", "part", "name"),
    [
        ("latent_diffusion", "generator", "null_tokens"),
        ("stable_unclip", "generator", "null_embedding"),
        ("stable_unclip", "prior", "null_embedding"),
    ],
)
def test_parts_that_were_trained_with_another_clip_are_refused(
    kind: str, part: str, name: str, clip: Clip, tmp_path: Path
) -> None:
    publish(kind, tmp_path, clip)
    stack: Any = load_system(tmp_path / "stack")
    getattr(getattr(stack, part).text, name)[1] += 1
    parts = [stack.prior] if kind == "stable_unclip" else []
    expected = kind if part == "generator" else part
    with pytest.raises(CheckpointError, match=f"^{expected}: was trained with a CLIP other than this one"):
        type(stack)(stack.clip, *parts, stack.generator, stack.autoencoder)


def test_conditions_that_a_network_does_not_read_are_refused(clip: Clip) -> None:
    x_t, t = torch.zeros(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64)
    tokens = clip.tokenize(CAPTIONS[:2])
    with pytest.raises(ShapeError, match="got image embeddings, expected none"):
        objective("latent_diffusion", clip).model(x_t, t, tokens, image_embedding=torch.zeros(2, clip.embedding_dim))
    silent = objective("stable_unclip", clip, text="none").model
    with pytest.raises(ShapeError, match="got captions, expected none"):
        silent(x_t, t, tokens)
    assert np.isfinite(silent(x_t, t).detach().numpy()).all()
    with pytest.raises(ConfigError, match="reads no image embedding"):
        dataclasses.replace(CONFIGS["latent_diffusion"].model, text="none")


@pytest.mark.parametrize("kind", KINDS)
def test_spatial_transformers_read_the_states_of_all_tokens_as_they_are(clip: Clip, kind: str, tmp_path: Path) -> None:
    unet = dataclasses.replace(CONFIGS[kind].model.unet, attention="spatial_transformer", resampling="convolution")
    changes = {"unet": unet, "text": "clip", "context_dim": clip.text_width}
    trained = objective(kind, clip, **changes)
    tensors = trained.prepare(rows(clip))
    loss = trained.loss(trained.model, tensors, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(1, abs=0.3)
    assert not [name for name, _ in trained.model.named_parameters() if name.startswith("text.")]
    assert trained.model.text is not None and trained.model.text.null_mask.all()
    features = caption_features(clip, clip.tokenize(CAPTIONS), reads_padding=True)
    plain = caption_features(clip, clip.tokenize(CAPTIONS))
    kept = plain.text_mask
    torch.testing.assert_close(features.text_encodings[kept], plain.text_encodings[kept], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features.text_embedding, plain.text_embedding, atol=1e-4, rtol=1e-4)
    assert features.text_encodings[~kept].abs().amin(dim=0).max() > 0 and features.text_mask.all()

    checkpoints.save(f"{tmp_path}/model", {"model": trained.model.state_dict()}, trained.facts() | {"samples_seen": 1})
    part = {"latent_diffusion": LATENT_DIFFUSION, "stable_unclip": STABLE_UNCLIP}[kind]
    loaded = load_model(f"{tmp_path}/model", (part,))
    check_clip(clip, {kind: loaded})
    torch.manual_seed(1)
    other = Clip(clip_models.create("unclip-demo", None), "unclip-demo")
    with pytest.raises(CheckpointError, match="was trained with a CLIP other than this one"):
        check_clip(other, {kind: loaded})
    with pytest.raises(ConfigError, match=f"context_dim: got 7, expected {clip.text_width}"):
        objective(kind, clip, **{**changes, "context_dim": 7})
