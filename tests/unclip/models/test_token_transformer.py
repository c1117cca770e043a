"""Transformers of image tokens: inputs, causality, losses, sampling and sizes."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.errors import ConfigError
from unclip.models.dalle import Dalle, DalleConfig
from unclip.models.parti import Parti, PartiConfig
from unclip.models.token_transformer import (
    TextVocabulary,
    TokenSampling,
    TokenTransformerConfig,
    draw_tokens,
    filter_logits,
    mean_cross_entropy,
)

SMALL: dict[str, Any] = {
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "text_vocab_size": 8,
    "grid_size": 3,
    "codebook_size": 10,
}
START, END = 5, 6
TOKENS = torch.tensor([[5, 7, 9, 6, 0, 0], [5, 8, 6, 0, 0, 0], [5, 11, 7, 9, 8, 6]])  # zeros are padding
NULL = torch.tensor([[START, END, 0, 0, 0, 0]])
KINDS = ["dalle", "parti"]


def build(kind: str, **changes: Any) -> Dalle | Parti:
    torch.manual_seed(0)
    settings = {**SMALL, "cond_drop_prob": 0.1, **changes}
    if kind == "dalle":
        model: Dalle | Parti = Dalle(DalleConfig(**settings), TOKENS.shape[1])
    else:
        model = Parti(PartiConfig(encoder_depth=2, **settings), TOKENS.shape[1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.vocabulary.fit(TOKENS)
    model.set_null(NULL)
    return model.eval()


def image_logits(model: Dalle | Parti, tokens: Tensor, codes: Tensor, drop: Tensor | None = None) -> Tensor:
    logits = model.logits(tokens, codes, drop)
    return logits if isinstance(logits, Tensor) else logits.image


def random_codes(batch: int = 3) -> Tensor:
    return torch.randint(SMALL["codebook_size"], (batch, 9), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_token_is_predicted_from_the_text_and_the_tokens_before_it(kind: str) -> None:
    model, codes = build(kind), random_codes()
    expected = image_logits(model, TOKENS, codes)
    assert expected.shape == (3, 9, 10)
    for place in range(9):
        changed = codes.clone()
        changed[:, place] = (changed[:, place] + 1) % 10
        difference = (image_logits(model, TOKENS, changed) - expected).abs().amax(dim=2)  # [B, N]
        assert not difference[:, : place + 1].any(), "a token depends on itself or on a later one"
        assert (difference[:, place + 1 :] > 1e-4).all(), "a token does not depend on an earlier one"
    other_text = TOKENS.clone()
    other_text[:, 1] = 9
    changed_rows = TOKENS[:, 1] != 9
    difference = (image_logits(model, other_text, codes) - expected).abs().amax(dim=2)
    assert (difference[changed_rows] > 1e-4).all()


@torch.no_grad()
def test_dalle_predicts_each_text_token_from_those_before_it() -> None:
    model, codes = build("dalle"), random_codes()
    assert isinstance(model, Dalle)
    expected = model.logits(TOKENS, codes).text
    assert expected.shape == (3, 5, 8)
    for place in range(1, 6):
        changed = TOKENS.clone()
        changed[2, place] = 7 if TOKENS[2, place] != 7 else 9
        difference = (model.logits(changed, codes).text - expected)[2].abs().amax(dim=1)  # [L - 1]
        assert not difference[:place].any() and (difference[place:] > 1e-4).all()
    assert torch.equal(model.logits(TOKENS, (codes + 1) % 10).text, expected), "text depends on the image after it"


@torch.no_grad()
def test_every_position_without_text_has_a_padding_token_of_its_own() -> None:
    model, codes = build("dalle"), random_codes()
    assert isinstance(model, Dalle)
    expected = image_logits(model, TOKENS, codes)
    for place in range(1, 6):
        before = model.padding[place].clone()
        model.padding[place] += torch.randn(16)  # a constant would not pass the layer norm
        is_changed = ((image_logits(model, TOKENS, codes) - expected).abs() > 1e-4).any(dim=2).any(dim=1)
        assert is_changed.tolist() == (TOKENS[:, place] == 0).tolist(), place
        model.padding[place] = before


@torch.no_grad()
def test_parti_never_reads_padding() -> None:
    model, codes = build("parti"), random_codes()
    assert isinstance(model, Parti)
    expected = image_logits(model, TOKENS, codes)
    model.text_positions[4:] += torch.randn(2, 16)
    difference = (image_logits(model, TOKENS, codes) - expected).abs().amax(dim=(1, 2))
    assert difference[:2].max() < 1e-6 and difference[2] > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_dropped_text_is_the_empty_caption(kind: str) -> None:
    model, codes = build(kind), random_codes()
    drop = torch.tensor([True, False, True])
    empty = torch.where(drop[:, None], NULL, TOKENS)
    assert torch.equal(image_logits(model, TOKENS, codes, drop), image_logits(model, empty, codes))


@torch.no_grad()
def test_losses_are_mean_cross_entropies_without_padding_and_dropped_text() -> None:
    model, codes = build("dalle"), random_codes()
    assert isinstance(model, Dalle)
    drop = torch.tensor([False, True, False])
    losses, logits = model(TOKENS, codes, drop), model.logits(TOKENS, codes, drop)
    index = model.vocabulary(TOKENS)
    for row, length in enumerate((4, 3, 6)):
        image = F.cross_entropy(logits.image[row], codes[row])
        text = F.cross_entropy(logits.text[row, : length - 1], index[row, 1:length])
        expected = torch.stack([torch.zeros(()) if drop[row] else text, image])
        torch.testing.assert_close(losses[row], expected)
    assert model.loss_weights == (0.125, 0.875)
    parti = build("parti")
    expected = F.cross_entropy(parti.logits(TOKENS, codes).transpose(1, 2), codes, reduction="none").mean(dim=1)  # type: ignore[union-attr]
    torch.testing.assert_close(parti(TOKENS, codes)[:, 0], expected)


def test_a_row_without_tokens_has_no_loss() -> None:
    logits, targets = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    losses = mean_cross_entropy(logits, targets, torch.tensor([[True, True, False], [False] * 3]))
    torch.testing.assert_close(losses[0], F.cross_entropy(logits[0, :2], targets[0, :2]))
    assert losses[1] == 0


# ------------------------------------------------------------------------------------------------ vocabulary


def test_the_vocabulary_holds_the_most_frequent_tokens() -> None:
    vocabulary = TextVocabulary(4)
    vocabulary.fit(torch.tensor([[50, 7, 7, 9, 0], [50, 0, 8, 9, 0], [50, 9, 0, 0, 0]]))
    # 50 and 9 occur three times, 7 twice; 8 and the 0 inside a caption once
    assert vocabulary.ids.tolist() == [7, 9, 50]
    assert vocabulary(torch.tensor([[7, 8, 9, 50, 0, 49_407]])).tolist() == [[0, 3, 1, 2, 3, 3]]


def test_a_vocabulary_larger_than_the_tokens_knows_all_of_them() -> None:
    vocabulary = TextVocabulary(100)
    vocabulary.fit(TOKENS)
    index = vocabulary(TOKENS[TOKENS > 0])
    assert index.max() < 6 and len(index.unique()) == 6
    assert vocabulary(torch.tensor([[10]])).item() == 99


# -------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("guidance_scale", "temperature", "top_k", "top_p"),
    [(1.0, 1.0, 0, 1.0), (1.0, 0.0, 0, 1.0), (2.5, 0.7, 4, 1.0), (1.5, 1.0, 0, 0.8)],
)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_sampling_is_the_same_with_and_without_a_cache(
    kind: str, guidance_scale: float, temperature: float, top_k: int, top_p: float
) -> None:
    model = build(kind)
    settings = TokenSampling(temperature, top_k, top_p, guidance_scale, num_candidates=2)
    seen: list[Tensor] = []
    model.to_logits.register_forward_hook(lambda module, arguments, output: seen.append(output))
    sampled = model.sample(TOKENS, settings, generator=torch.Generator().manual_seed(7))
    cached = torch.stack(seen, dim=1)[:6]  # [B * candidates, N, K], those given the captions
    generator, tokens = torch.Generator().manual_seed(7), TOKENS.repeat_interleave(2, dim=0)
    codes = torch.zeros(6, 9, dtype=torch.int64)
    drop = torch.ones(6, dtype=torch.bool)
    for place in range(9):
        conditional = image_logits(model, tokens, codes)[:, place]
        torch.testing.assert_close(cached[:, place], conditional, atol=1e-5, rtol=1e-5)
        null = image_logits(model, tokens, codes, drop)[:, place]
        logits = null + guidance_scale * (conditional - null)
        codes[:, place] = draw_tokens(logits, settings, generator)
    assert torch.equal(sampled, codes)
    assert len(codes.unique(dim=0)) > (1 if temperature == 0 else 3)


@pytest.mark.parametrize("kind", KINDS)
def test_negative_captions_take_the_place_of_the_empty_one(kind: str) -> None:
    model, settings = build(kind), TokenSampling(temperature=0, guidance_scale=3.0, num_candidates=1)
    plain = model.sample(TOKENS, settings)
    assert torch.equal(model.sample(TOKENS, settings, negative=NULL.expand(3, -1)), plain)
    assert not torch.equal(model.sample(TOKENS, settings, negative=TOKENS.flip(0)), plain)
    unguided = dataclasses.replace(settings, guidance_scale=1.0)
    # a caption that is guided away from itself is not guided at all
    assert torch.equal(model.sample(TOKENS, settings, negative=TOKENS), model.sample(TOKENS, unguided))


def kept_by_definition(logits: list[float], top_k: int, top_p: float) -> set[int]:
    """Tokens that may be drawn, from the definitions of top-k and top-p in float64, one token at a time."""
    order = sorted(range(len(logits)), key=lambda index: -logits[index])
    if top_k:
        order = order[:top_k]
    weights = np.exp(np.array([logits[index] for index in order], dtype=np.float64))
    weights /= weights.sum()
    kept, total = set(), 0.0
    for index, weight in zip(order, weights, strict=True):
        kept.add(index)
        total += weight
        if total >= top_p:
            break
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 3, 20, 50])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.77, 1.0])
def test_filtered_logits_are_those_of_the_definitions(top_k: int, top_p: float) -> None:
    logits = 2 * torch.randn(40, 20, generator=torch.Generator().manual_seed(3))
    filtered = filter_logits(logits, top_k, top_p)
    for row, before in zip(filtered, logits, strict=True):
        kept = kept_by_definition(before.tolist(), top_k, top_p)
        assert set(row.isfinite().nonzero()[:, 0].tolist()) == kept
        assert torch.equal(row[row.isfinite()], before[row.isfinite()])


def test_tokens_are_drawn_with_the_probabilities_of_the_logits() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    settings = TokenSampling(temperature=0.5, top_k=3)
    drawn = draw_tokens(logits.expand(40_000, 4), settings, torch.Generator().manual_seed(0))
    expected = torch.tensor([2.0, 0.0, -torch.inf, 4.0]).softmax(dim=0)
    torch.testing.assert_close(drawn.bincount(minlength=4) / 40_000, expected, atol=0.01, rtol=0)
    assert draw_tokens(logits[None], TokenSampling(temperature=0)).item() == 3


# ---------------------------------------------------------------------------------------------- settings, sizes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "num_heads: got 3, expected a divisor of width 16"),
        ({"depth": 0}, "depth: got 0"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
        ({"cond_drop_prob": -0.1}, "cond_drop_prob: got -0.1"),
        ({"codebook_size": 1}, "codebook_size: got 1"),
        ({"text_vocab_size": 1}, "text_vocab_size: got 1"),
        ({"grid_size": 0}, "grid_size: got 0"),
    ],
)
def test_impossible_networks_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenTransformerConfig(**{**SMALL, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"guidance_scale": -1.0}, "guidance_scale: got -1.0"),
        ({"num_candidates": 0}, "num_candidates: got 0"),
        ({"num_candidates": 1025}, "num_candidates: got 1025, expected 1 to 1024"),
    ],
)
def test_impossible_sampling_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenSampling(**settings)


def test_impossible_weights_of_the_text_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"text_loss_weight: got 1\.0"):
        DalleConfig(text_loss_weight=1.0)
    with pytest.raises(ConfigError, match="encoder_depth: got 0"):
        PartiConfig(encoder_depth=0)
