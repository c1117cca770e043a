"""The autoregressive prior: inputs, sampling and learning."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from unclip.errors import CheckpointError, ConfigError
from unclip.models import clip
from unclip.models.autoregressive_prior import (
    BASE_AUTOREGRESSIVE_PRIOR,
    DALLE2_AUTOREGRESSIVE_PRIOR,
    SMALL_AUTOREGRESSIVE_PRIOR,
    AutoregressivePrior,
    AutoregressivePriorConfig,
)
from unclip.models.clip import Clip
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.embeddings import EmbeddingQuantizer, EmbeddingStatistics, PrincipalComponents
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.text import CaptionFeatures, caption_features
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig
from unclip.systems.system import load_model
from unclip.systems.unclip.prior import PRIOR, AutoregressivePriorObjective
from unclip.systems.unclip.sampling import PriorSampling, SamplingConfig
from unclip.systems.unclip.stack import Stack
from unclip.training import checkpoints

SMALL = {"width": 16, "depth": 2, "num_heads": 2, "num_buckets": 12}


def fit_quantizer(embeddings: torch.Tensor, num_buckets: int) -> EmbeddingQuantizer:
    statistics, principal = EmbeddingStatistics.of(embeddings), PrincipalComponents.of(embeddings)
    similarity = embeddings.mean(dim=1)
    return EmbeddingQuantizer.fit(
        embeddings, similarity, statistics, principal, explained=0.99, num_buckets=num_buckets
    )


def build(**changes: Any) -> AutoregressivePrior:
    torch.manual_seed(0)
    quantizer = fit_quantizer(F.normalize(torch.randn(300, 6), dim=1), 12)
    prior = AutoregressivePrior(AutoregressivePriorConfig(**SMALL, **changes), 6, 5, 7, quantizer.num_components)
    prior.quantizer.load_state_dict(quantizer.state_dict())
    prior.text.set_null(CaptionFeatures(torch.randn(1, 7, 5), torch.arange(7)[None] < 2, torch.randn(1, 6)))
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return prior.eval()


def text(batch: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "text_encodings": torch.randn(batch, 7, 5, generator=generator),
        "text_mask": torch.arange(7) < torch.tensor([[4], [7], [2]])[:batch],
        "text_embedding": torch.randn(batch, 6, generator=generator),
    }


def inputs(prior: AutoregressivePrior) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    buckets = torch.randint(12, (3, prior.quantizer.num_components), generator=generator)
    return {"buckets": buckets, "similarity": torch.tensor([0, 5, 11]), **text()}


@torch.no_grad()
def test_each_component_is_predicted_from_the_text_and_the_components_before_it() -> None:
    prior = build()
    given = inputs(prior)
    expected = prior(**given)
    num_components = prior.quantizer.num_components
    assert expected.shape == (3, num_components, 12)
    for name in ("similarity", "text_encodings", "text_embedding"):
        changed = prior(**{**given, name: given[name] + (1 if name != "similarity" else -given[name] + 3)})
        assert ((changed - expected).abs() > 1e-4).any(dim=2).all(), name
    for position in range(num_components):
        buckets = given["buckets"].clone()
        buckets[:, position] = (buckets[:, position] + 1) % 12
        changed = prior(**{**given, "buckets": buckets}) != expected
        assert not changed[:, : position + 1].any(), "a component depends on itself or on later ones"
        assert position + 1 == num_components or changed[:, position + 1 :].any(dim=2).all()
    padding = given["text_encodings"].clone()
    padding[~given["text_mask"]] = 1e4
    torch.testing.assert_close(prior(**{**given, "text_encodings": padding}), expected)


@torch.no_grad()
def test_without_text_encodings_the_text_embedding_alone_is_read() -> None:
    prior, captions = build(text_encodings=False), text()
    given = inputs(prior)
    expected = prior(**given)
    assert len(prior.positions) == 1 + prior.quantizer.num_components
    unread = {"text_encodings": given["text_encodings"] + 1, "text_mask": ~given["text_mask"]}
    assert torch.equal(prior(**{**given, **unread}), expected)
    assert not torch.allclose(prior(**{**given, "text_embedding": given["text_embedding"] + 1}), expected)
    drop = torch.tensor([False, False, True])
    kept = prior.text.kept_tokens(given["text_mask"], drop, len(prior.positions))
    torch.testing.assert_close(prior(**given, drop=drop, kept=kept), prior(**given, drop=drop))
    samples = [
        prior.sample(**{**captions, **other}, generator=torch.Generator().manual_seed(0))
        for other in ({}, {"text_encodings": captions["text_encodings"] + 1})
    ]
    assert torch.equal(*samples)


@torch.no_grad()
def test_dropping_text_uses_the_empty_caption_and_keeps_the_components() -> None:
    prior = build()
    given, drop = inputs(prior), torch.tensor([True, False, True])
    dropped = prior(**given, drop=drop)
    other_text = {"text_encodings": given["text_encodings"] + 1, "text_embedding": given["text_embedding"] + 1}
    same = (prior(**{**given, **other_text, "similarity": 11 - given["similarity"]}, drop=drop) == dropped).all(
        dim=(1, 2)
    )
    assert same.tolist() == [True, False, True]
    buckets = (given["buckets"] + 1) % 12
    assert ((prior(**{**given, "buckets": buckets}, drop=drop) - dropped)[:, 1:].abs() > 1e-4).any(dim=2).all()


def test_skipping_padding_changes_no_logits() -> None:
    prior, seen = build(), []
    given = inputs(prior)
    drop = torch.tensor([False, False, True])  # captions of 4 and 7 tokens, and the empty one of 2
    kept = prior.text.kept_tokens(given["text_mask"], drop, len(prior.positions))
    assert len(kept) == 4 + 7 + 2 + 3 * (len(prior.positions) - 7)
    prior.transformer.blocks[-1].register_forward_hook(
        lambda module, arguments, output: seen.append(arguments[0].shape)
    )
    torch.testing.assert_close(prior(**given, drop=drop, kept=kept), prior(**given, drop=drop))
    assert seen == [(len(kept), 16), (3, len(prior.positions), 16)]


@pytest.mark.parametrize(("guidance_scale", "temperature"), [(1.0, 1.0), (1.0, 0.0), (2.5, 0.7)])
@torch.no_grad()
def test_sampling_is_the_same_with_and_without_a_cache(guidance_scale: float, temperature: float) -> None:
    prior, captions = build(), text()
    samples = prior.sample(
        **captions,
        settings=PriorSampling(num_candidates=1, temperature=temperature, guidance_scale=guidance_scale),
        generator=torch.Generator().manual_seed(7),
    )
    generator = torch.Generator().manual_seed(7)
    similarity = prior.quantizer.draw_similarity(3, generator)
    buckets = torch.zeros(3, prior.quantizer.num_components, dtype=torch.int64)
    for position in range(prior.quantizer.num_components):
        conditional, null = (
            prior(buckets, similarity, **captions, drop=torch.full((3,), dropped))[:, position]
            for dropped in (False, True)
        )
        logits = null + guidance_scale * (conditional - null)
        if temperature == 0:
            buckets[:, position] = logits.argmax(dim=1)
        else:
            probabilities = (logits / temperature).softmax(dim=1)
            buckets[:, position] = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    torch.testing.assert_close(samples, prior.quantizer.decode(buckets), atol=1e-5, rtol=0)


@torch.no_grad()
def test_cached_logits_equal_those_of_forward() -> None:
    prior = build()
    given = inputs(prior)
    expected = prior(**given)
    # the sequence that `sample` continues bucket by bucket
    cached_sequence = importlib.import_module("unclip.models.autoregressive_prior")._CachedSequence
    sequence = cached_sequence(prior, given["similarity"], list(text().values()), dropped=False)
    last = None
    for position in range(prior.quantizer.num_components):
        torch.testing.assert_close(sequence.next_logits(last), expected[:, position], atol=1e-5, rtol=0)
        last = given["buckets"][:, position]


@torch.no_grad()
def test_the_best_candidate_is_kept() -> None:
    prior, captions = build(), text()

    def similarity(num_candidates: int) -> torch.Tensor:
        samples = prior.sample(
            **captions,
            settings=PriorSampling(num_candidates=num_candidates),
            generator=torch.Generator().manual_seed(0),
        )
        assert samples.shape == (3, 6)
        return (samples * captions["text_embedding"]).sum(dim=1)

    assert similarity(32).mean() > similarity(1).mean()
    assert torch.equal(similarity(2), similarity(2))


@pytest.fixture(scope="module")
def frozen_clip() -> Clip:
    torch.manual_seed(0)
    return Clip(clip.create("unclip-demo", None), "unclip-demo")


def test_it_overfits_sixteen_samples_and_is_restored_from_a_checkpoint(frozen_clip: Clip, tmp_path: Path) -> None:
    torch.manual_seed(0)
    captions = [f"picture {index}" for index in range(16)]
    tokens = frozen_clip.tokenize(captions)
    text_features = frozen_clip.encode_text(tokens)
    embeddings = F.normalize(torch.randn(16, 64), dim=1)
    scores = torch.full((16,), 0.3)  # distinct dot products would identify the images without the captions
    statistics, principal = EmbeddingStatistics.of(embeddings), PrincipalComponents.of(embeddings)
    quantizer = EmbeddingQuantizer.fit(embeddings, scores, statistics, principal, explained=0.99, num_buckets=64)
    config = AutoregressivePriorConfig(width=64, depth=2, num_heads=2, num_buckets=64)
    objective = AutoregressivePriorObjective(config, frozen_clip, statistics, quantizer)
    rows = {"tokens": list(tokens.float().numpy()), "image_embedding": list(embeddings.numpy())}
    tensors = objective.prepare({**rows, "clip_score": scores.tolist()})
    optimizer = torch.optim.AdamW(objective.model.parameters(), 3e-3)
    for step in range(150):
        optimizer.zero_grad()
        loss = objective.loss(objective.model, tensors, torch.Generator().manual_seed(step))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5  # the logarithm of 64 buckets is 4.2; a tenth of the rows have no text

    checkpoints.save(str(tmp_path), {"model": objective.model.state_dict()}, {**objective.facts(), "samples_seen": 1})
    prior: Any = load_model(str(tmp_path), (PRIOR,))
    features = text_features.text_encodings, text_features.text_mask, text_features.text_projection
    samples = prior.sample(
        *features, PriorSampling(temperature=0.3, guidance_scale=1.5), generator=torch.Generator().manual_seed(0)
    )
    nearest = (F.normalize(samples, dim=1) @ embeddings.T).max(dim=1)
    assert nearest.indices.tolist() == list(range(16)) and nearest.values.mean() > 0.95
    assert prior.statistics.digest() == statistics.digest()
    assert prior.quantizer.similarity_counts.sum() == 16


def build_stack(prior: Any, frozen_clip: Clip, decoder_statistics: EmbeddingStatistics) -> Stack:
    unet = UNetConfig(8, channels=4, channel_mult=(1,), num_res_blocks=1, norm_groups=2)
    attentive = dataclasses.replace(unet, attention_resolutions=(8,), head_channels=4)
    decoder = Decoder(DecoderConfig(attentive, context_dim=4), 64)
    decoder.statistics.load_state_dict(decoder_statistics.state_dict())
    return Stack(frozen_clip, prior, decoder, [Upsampler(UpsamplerConfig(unet, low_res_size=8, scale=2))])


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_a_stack_accepts_either_prior_if_the_dataset_is_the_decoders(frozen_clip: Clip, kind: str) -> None:
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(200, 64), dim=1)
    statistics, small = EmbeddingStatistics.of(embeddings), {"width": 16, "depth": 1, "num_heads": 2}
    prior: Any = DiffusionPrior(PriorConfig(**small), 64, frozen_clip.text_width, frozen_clip.text_length)
    if kind == "autoregressive":
        quantizer = fit_quantizer(embeddings, 32)
        settings = AutoregressivePriorConfig(**small, num_buckets=32)
        sizes = 64, frozen_clip.text_width, frozen_clip.text_length, quantizer.num_components
        prior = AutoregressivePrior(settings, *sizes)
        prior.quantizer.load_state_dict(quantizer.state_dict())
    prior.statistics.load_state_dict(statistics.state_dict())
    prior.text.set_null(caption_features(frozen_clip, frozen_clip.tokenize([""])))
    stack = build_stack(prior.eval(), frozen_clip, statistics)
    sampling = SamplingConfig(prior=PriorSampling(num_steps=2, guidance_scale=2.0, temperature=0.5))
    samples = [
        stack.embed_captions(["a star", "a circle"], sampling, torch.Generator().manual_seed(3)) for _ in range(2)
    ]
    assert samples[0].shape == (2, 64) and samples[0].isfinite().all() and torch.equal(*samples)
    with pytest.raises(CheckpointError, match=r"decoder: got embeddings of 64 dimensions .* those of the prior"):
        build_stack(prior, frozen_clip, EmbeddingStatistics.of(embeddings[1:]))


@pytest.mark.parametrize(
    ("config", "sizes", "expected"),
    [
        (DALLE2_AUTOREGRESSIVE_PRIOR, (1024, 1024, 77, 319), 806e6),
        (BASE_AUTOREGRESSIVE_PRIOR, (768, 768, 77, 240), 206e6),
        (SMALL_AUTOREGRESSIVE_PRIOR, (768, 768, 77, 240), 40e6),
    ],
)
def test_presets_have_the_documented_number_of_parameters(
    config: AutoregressivePriorConfig, sizes: tuple[int, int, int, int], expected: float
) -> None:
    with torch.device("meta"):
        prior = AutoregressivePrior(config, *sizes)
    assert sum(parameter.numel() for parameter in prior.parameters()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_buckets": 1}, "num_buckets: got 1"),
        ({"explained_variance": 0.0}, "explained_variance: got 0.0"),
        ({"num_heads": 3}, "num_heads: got 3"),
    ],
)
def test_invalid_priors_are_rejected(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoregressivePriorConfig(**{**SMALL, **settings})
