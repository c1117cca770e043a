"""Required properties of the paper's models, tested on models of a few thousand weights."""

import pytest
import torch
import torch.nn.functional as F

from tests.unclip.systems.tiny_stacks import fill_zeros
from unclip.errors import ConfigError, ShapeError
from unclip.models.decoder import Decoder, DecoderConfig, DecoderSampling
from unclip.models.embeddings import EmbeddingStatistics
from unclip.models.layers import timestep_embedding
from unclip.models.prior import DiffusionPrior, PriorConfig, PriorSampling, best_candidate
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig, UpsamplerSampling

UNET = UNetConfig(
    16, channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(8,), head_channels=8, norm_groups=4
)
CONVOLUTIONAL = UNetConfig(16, channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4)


@pytest.fixture
def prior() -> DiffusionPrior:
    return fill_zeros(
        DiffusionPrior(PriorConfig(width=16, depth=2, num_heads=2), embedding_dim=6, text_width=5, text_length=7)
    )


def prior_inputs(batch: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x_t": torch.randn(batch, 6, generator=generator),
        "t": torch.tensor([1, 500, 999])[:batch],
        "text_encodings": torch.randn(batch, 7, 5, generator=generator),
        "text_mask": torch.arange(7).expand(batch, 7) < 4,
        "text_embedding": torch.randn(batch, 6, generator=generator),
    }


@torch.no_grad()
def test_prior_reads_all_inputs_except_padding(prior: DiffusionPrior) -> None:
    inputs = prior_inputs()
    expected = prior(**inputs)
    assert expected.shape == (3, 6)
    for name in ("x_t", "text_encodings", "text_embedding"):
        changed = {**inputs, name: inputs[name] + 1}
        assert not torch.allclose(prior(**changed), expected), name
    assert not torch.allclose(prior(**{**inputs, "t": inputs["t"] - 1}), expected)
    padding = inputs["text_encodings"].clone()
    padding[:, 4:] = 1e4
    torch.testing.assert_close(prior(**{**inputs, "text_encodings": padding}), expected)


@torch.no_grad()
def test_prior_without_text_sees_only_the_noised_embedding(prior: DiffusionPrior) -> None:
    inputs = prior_inputs()
    drop = torch.tensor([True, False, True])
    dropped = prior(**inputs, drop=drop)
    changed = {**inputs, "text_encodings": inputs["text_encodings"] + 1, "text_embedding": inputs["text_embedding"] + 1}
    same = (prior(**changed, drop=drop) - dropped).abs().amax(dim=1) < 1e-6
    assert same.tolist() == [True, False, True]
    assert not torch.allclose(prior(**{**inputs, "x_t": inputs["x_t"] + 1}, drop=drop), dropped)


@torch.no_grad()
def test_prior_is_finite_for_a_fully_masked_caption(prior: DiffusionPrior) -> None:
    inputs = prior_inputs()
    inputs["text_mask"] = torch.zeros_like(inputs["text_mask"])
    assert prior(**inputs).isfinite().all()


def test_prior_keeps_the_best_candidate(prior: DiffusionPrior) -> None:
    prior.statistics.load_state_dict({"mean": torch.arange(6.0), "std": torch.full((6,), 2.0)})
    text = {name: value for name, value in prior_inputs().items() if name.startswith("text")}

    def similarity(num_candidates: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        samples = prior.sample(
            **text, settings=PriorSampling(num_candidates=num_candidates, num_steps=3), generator=generator
        )
        assert samples.shape == (3, 6)
        return (samples * text["text_embedding"]).sum(dim=1)

    assert similarity(64).mean() > similarity(1).mean()
    assert torch.equal(similarity(2), similarity(2))


def test_the_best_candidate_by_cosine_is_not_the_longest() -> None:
    """The first has the largest dot product, 3 against 2; the second the largest cosine, 1 against 0.6."""
    text_embedding = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    candidates = torch.tensor([[[3.0, 4.0], [2.0, 0.0], [0.1, 0.3]], [[4.0, 3.0], [0.0, 2.0], [0.3, 0.1]]])
    assert best_candidate(candidates, text_embedding).tolist() == [[3, 4], [4, 3]]
    for scale in (1.0, 0.01):
        assert best_candidate(candidates, scale * text_embedding, "cosine").tolist() == [[2, 0], [0, 2]]


def test_priors_choose_their_candidates_by_the_score_of_the_settings(prior: DiffusionPrior) -> None:
    prior.statistics.load_state_dict({"mean": torch.arange(6.0), "std": torch.full((6,), 2.0)})
    text = {name: value for name, value in prior_inputs().items() if name.startswith("text")}
    dot, cosine = (
        prior.sample(
            **text,
            settings=PriorSampling(num_candidates=32, num_steps=3, best_by=best_by),  # type: ignore[arg-type]
            generator=torch.Generator().manual_seed(0),
        )
        for best_by in ("dot_product", "cosine")
    )
    similarity = [F.cosine_similarity(each, text["text_embedding"]) for each in (dot, cosine)]
    assert (similarity[1] >= similarity[0]).all() and (similarity[1] > similarity[0]).any()


@pytest.fixture
def decoder() -> Decoder:
    return fill_zeros(Decoder(DecoderConfig(UNET, context_dim=8), embedding_dim=6))


@torch.no_grad()
def test_decoder_sees_the_embedding_on_both_paths(decoder: Decoder) -> None:
    x_t, t = torch.randn(2, 3, 16, 16), torch.tensor([10, 900])
    embedding = torch.randn(2, 6)
    expected = decoder(x_t, t, embedding)
    assert expected.shape == x_t.shape
    assert not torch.allclose(decoder(x_t, t, embedding + 1), expected)
    for path in (decoder.to_time, decoder.to_tokens):
        weight = path.weight.clone()
        path.weight.zero_()
        assert not torch.allclose(decoder(x_t, t, embedding), expected), "this path is not read"
        path.weight.copy_(weight)


@torch.no_grad()
def test_decoder_without_the_embedding_does_not_depend_on_it(decoder: Decoder) -> None:
    x_t, t, drop = torch.randn(2, 3, 16, 16), torch.tensor([10, 900]), torch.tensor([True, True])
    first, second = (decoder(x_t, t, torch.randn(2, 6), drop) for _ in range(2))
    torch.testing.assert_close(first, second)


def test_decoder_samples_are_images_and_follow_the_seed(decoder: Decoder) -> None:
    embedding = torch.randn(2, 6)
    first, second = (
        decoder.sample(embedding, DecoderSampling(num_steps=3), generator=torch.Generator().manual_seed(seed))
        for seed in (5, 5)
    )
    assert first.shape == (2, 3, 16, 16) and first.abs().max() <= 1
    assert torch.equal(first, second)


@pytest.fixture
def upsampler() -> Upsampler:
    return fill_zeros(Upsampler(UpsamplerConfig(CONVOLUTIONAL, low_res_size=8, scale=4)))


@torch.no_grad()
def test_upsampler_works_at_any_size(upsampler: Upsampler) -> None:
    assert upsampler.config.output_size == 32
    assert upsampler.sample(torch.zeros(1, 3, 8, 8), UpsamplerSampling(num_steps=2)).shape == (1, 3, 32, 32)
    assert upsampler.sample(torch.zeros(1, 3, 12, 12), UpsamplerSampling(num_steps=2)).shape == (1, 3, 48, 48)


@torch.no_grad()
def test_upsampler_reads_the_low_resolution_image(upsampler: Upsampler) -> None:
    x_t, t = torch.randn(1, 3, 16, 16), torch.tensor([500])
    assert not torch.allclose(upsampler(x_t, t, torch.ones(1, 3, 4, 4)), upsampler(x_t, t, -torch.ones(1, 3, 4, 4)))


def test_upsampler_has_no_attention() -> None:
    with pytest.raises(ConfigError, match="attention_resolutions"):
        UpsamplerConfig(UNET)


def test_statistics_standardise_and_invert() -> None:
    embeddings = torch.randn(500, 4) * torch.tensor([0.1, 1.0, 5.0, 0.0]) + 3
    statistics = EmbeddingStatistics.of(embeddings)
    normalized = statistics.normalize(embeddings)
    torch.testing.assert_close(normalized[:, :3].std(dim=0), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(statistics.denormalize(normalized), embeddings)
    with pytest.raises(ShapeError, match="at least 2 rows"):
        EmbeddingStatistics.of(embeddings[:1])


def test_timestep_embeddings_stay_distinct_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        embedding = timestep_embedding(torch.arange(1000), 32)
    assert embedding.dtype == torch.float32
    assert len(embedding.unique(dim=0)) == 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 18}, "image_size: got 18"),
        ({"attention_resolutions": (7,)}, "attention_resolutions: got 7"),
        ({"norm_groups": 5}, "norm_groups: got 5"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
    ],
)
def test_invalid_networks_are_rejected_before_they_are_built(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UNetConfig(**{"image_size": 16, "channels": 8, "channel_mult": (1, 2, 2), "norm_groups": 4, **settings})
