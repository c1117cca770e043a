"""Benefits of the parts of the stack, on the demo: priors, guidance, learned variances, and the prior with the decoder."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from benchmarks import ablation
from pipelines.config import load
from tasks.snapshots import Snapshot
from tasks.stage import Artifact
from unclip.data import Places, RowReader
from unclip.diffusion.process import GaussianDiffusion, VarianceType
from unclip.evaluation import retrieval
from unclip.models.decoder import Decoder
from unclip.systems.system import load_model
from unclip.systems.unclip.decoder import DECODER, DecoderObjective
from unclip.systems.unclip.stack import Stack
from unclip.training import trainer
from unclip.training.batches import load_images

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

NUM_DECODER_SAMPLES = 10_000
NUM_BOUND_IMAGES = 32
"""Number of images for measuring the variational bound."""


class Trained(NamedTuple):
    base: dict[str, Artifact]
    others: dict[str, Artifact]
    heldout: ablation.Heldout

    def stack(self, **others: Artifact) -> Stack:
        return ablation.load_stack(self.base, **others)


@pytest.fixture(scope="module")
def trained(demo: Path) -> Trained:
    ablation.train("demo", str(demo))
    base, others = (ablation.artifacts("demo", str(demo), settings) for settings in (ablation.BASE, ablation.OTHERS))
    return Trained(base, others, ablation.load_heldout(base, 256, ablation.load_stack(base).image_size))


def test_both_priors_are_closer_to_the_images_than_the_text_embedding(trained: Trained) -> None:
    assert trained.base["curate"] == trained.others["curate"]  # the same table
    diffusion, autoregressive = trained.stack(), trained.stack(prior=trained.others["prior"])
    text = diffusion.embed_text(trained.heldout.captions)
    baseline = retrieval.score_embeddings(text, trained.heldout.image_embedding)
    for stack in (diffusion, autoregressive):
        scores = ablation.score_prior(stack, trained.heldout)
        print(type(stack.prior).__name__, scores, "text embedding", baseline)
        assert scores["cosine"] > baseline["cosine"]


def test_guidance_follows_captions_better(trained: Trained) -> None:
    accuracy = []
    for guidance_scale in (1.0, trained.stack().sampling.decoder.guidance_scale):
        stack = trained.stack()
        decoder = dataclasses.replace(stack.sampling.decoder, guidance_scale=guidance_scale)
        stack.sampling = dataclasses.replace(stack.sampling, decoder=decoder)
        result = ablation.draw(stack, ablation.ways(stack, trained.heldout)[ablation.PRIOR], trained.heldout)
        print(guidance_scale, result.scenes.accuracy(), result.all_correct())
        accuracy.append(result.all_correct())
    assert accuracy[1] > accuracy[0]


def test_a_learned_variance_codes_images_in_fewer_bits(trained: Trained, tmp_path: Path) -> None:
    """One network's mean is used with every variance, as two trainings differ more in their means than in these bits.

    Half of the range is what a network that has not learned its variances would predict.
    """
    snapshot = Snapshot.of(trained.base["curate"].facts)
    sources = (snapshot.source("images", "jpg"), snapshot.source("embeddings", "image_embedding"))
    training = RowReader(sources, snapshot.open_places("train"))
    held_out = Places([snapshot.heldout_rows().slice(0, NUM_BOUND_IMAGES)])
    rows = RowReader(sources, held_out).read(np.arange(NUM_BOUND_IMAGES))
    settings = load("demo").decoder
    learns = dataclasses.replace(settings.model.diffusion, variance="learned_range")
    torch.manual_seed(0)
    objective = DecoderObjective(
        dataclasses.replace(settings.model, diffusion=learns), snapshot.load_statistics(), rows
    )
    config = dataclasses.replace(settings.trainer, num_samples=NUM_DECODER_SAMPLES)
    trainer.train(objective, training, config, str(tmp_path))
    decoder = load_model(str(tmp_path / "model"), (DECODER,))
    assert isinstance(decoder, Decoder)

    images = load_images(rows["jpg"], settings.model.unet.image_size)  # [B, 3, S, S]
    embedding = torch.from_numpy(np.stack(rows["image_embedding"]))  # [B, E]
    outputs: dict[
        int, torch.Tensor
    ] = {}  # by timestep: the noise, and so the network's output, is that of all variances

    def bits(variance: VarianceType, fraction: float | None = None) -> torch.Tensor:
        """[B], with the network's fraction of the range, or a constant one."""
        diffusion = GaussianDiffusion(dataclasses.replace(learns, variance=variance))

        def predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            timestep = int(t[0])
            if timestep not in outputs:
                outputs[timestep] = decoder(x_t, t, embedding)
            mean, own = outputs[timestep].chunk(2, dim=1)
            if variance != "learned_range":
                return mean
            return torch.cat([mean, own if fraction is None else torch.full_like(own, 2 * fraction - 1)], dim=1)

        return diffusion.bits_per_dim(predict, images, generator=torch.Generator().manual_seed(0)).total

    learned = bits("learned_range")
    others = {
        "fixed_small": bits("fixed_small"),
        "fixed_large": bits("fixed_large"),
        "half": bits("learned_range", 0.5),
    }
    print("learned", learned.mean().item())
    for name, other in others.items():
        saved = other - learned  # [B]
        standard_error = saved.std().item() / len(saved) ** 0.5
        print(name, other.mean().item(), "saved", saved.mean().item(), "standard error", standard_error)
        assert saved.mean().item() > 3 * standard_error, name


def test_the_prior_improves_the_samples(trained: Trained) -> None:
    """Ramesh et al. 2022, section 5.1: captions alone are worst, then text embeddings in place of image embeddings.

    This holds for caption accuracy. The Fréchet distance of a few hundred images is not smaller with the prior.
    """
    stack = trained.stack(decoder=trained.others["decoder"])
    ways = ablation.ways(stack, trained.heldout)
    results = {
        name: ablation.draw(stack, ways[name], trained.heldout)
        for name in (ablation.ALONE, ablation.TEXT, ablation.PRIOR)
    }
    for name, one in results.items():
        print(name, one.scenes.accuracy(), one.all_correct(), one.clip_score, one.frechet_distance)
    alone, text, prior = (one.all_correct() for one in results.values())
    assert alone < text < prior
