"""The diffusion prior: inputs, invariants and learning."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unclip.diffusion.process import DiffusionConfig
from unclip.errors import ConfigError, InputError
from unclip.models import clip
from unclip.models.clip import Clip
from unclip.models.embeddings import EmbeddingStatistics
from unclip.models.layers import kept_tokens
from unclip.models.prior import (
    BASE_PRIOR,
    DALLE2_PRIOR,
    KARLO_PRIOR,
    SMALL_PRIOR,
    DiffusionPrior,
    PriorConfig,
    PriorSampling,
)
from unclip.models.text import CaptionFeatures
from unclip.systems.system import load_model
from unclip.systems.unclip.prior import PRIOR, PriorObjective
from unclip.training import checkpoints, parallel

SMALL = {"width": 16, "depth": 2, "num_heads": 2}
VARIANTS = [
    {},
    {"text_norm": "layer", "norm_in": True},
    {"self_conditioning": True, "text_norm": "unit", "normalization": "scale"},
]


def build(**changes: Any) -> DiffusionPrior:
    torch.manual_seed(0)
    prior = DiffusionPrior(PriorConfig(**{**SMALL, **changes}), embedding_dim=6, text_width=5, text_length=7)
    prior.statistics.load_state_dict({"mean": torch.linspace(-1, 1, 6), "std": torch.linspace(0.1, 2, 6)})
    mask = torch.arange(7)[None] < 2
    prior.text.set_null(CaptionFeatures(torch.randn(1, 7, 5), mask, torch.randn(1, 6)))
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # every path matters
    return prior.eval()


def text(batch: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "text_encodings": torch.randn(batch, 7, 5, generator=generator),
        "text_mask": torch.arange(7) < torch.tensor([[4], [7], [2]])[:batch],
        "text_embedding": torch.randn(batch, 6, generator=generator),
    }


def inputs() -> dict[str, torch.Tensor]:
    x_t = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    return {"x_t": x_t, "t": torch.tensor([1, 500, 999]), **text()}


@pytest.fixture(scope="module")
def frozen_clip() -> Clip:
    torch.manual_seed(0)
    return Clip(clip.create("unclip-demo", None), "unclip-demo")


@pytest.mark.parametrize("changes", VARIANTS)
def test_tokens_have_the_papers_order_and_attend_only_to_earlier_ones(changes: dict) -> None:
    """Text encodings, text embedding, timestep, noised image embedding, [x0 estimate,] query."""
    prior, seen = build(**changes), {}
    prior.transformer.blocks[0].register_forward_hook(lambda module, given, output: seen.update(x=given[0], y=output))
    given = inputs()
    estimate = {"x0_estimate": torch.zeros(3, 6)} if "self_conditioning" in changes else {}
    prior(**given, **estimate)
    before = seen["x"], seen["y"]
    order = ["text_encodings", "text_embedding", "t", "x_t", *estimate]
    assert before[0].shape[1] == len(prior.positions) == 7 + len(order[1:]) + 1
    for number, name in enumerate(order):
        changed = {**given, **estimate}
        # a constant shift would be removed by a layer norm, so change each element differently
        changed[name] = changed[name] - 1 if name == "t" else changed[name] + torch.rand(changed[name].shape)
        prior(**changed)
        first = 0 if name == "text_encodings" else 6 + number
        last = 7 if name == "text_encodings" else 7 + number
        differs = [(old != new).any(dim=2).any(dim=0) for old, new in zip(before, seen.values(), strict=True)]
        assert differs[0].nonzero().flatten().tolist() == list(range(first, last)), name
        assert not differs[1][:first].any(), f"earlier tokens attend to {name}"
        assert differs[1][-1], f"the query does not attend to {name}"


@torch.no_grad()
def test_dropping_text_uses_the_empty_caption_and_keeps_the_noised_embedding() -> None:
    prior, given = build(), inputs()
    dropped = prior(**given, drop=torch.tensor([True, False, True]))
    null = prior.text
    empty = {
        "text_encodings": null.null_encodings.expand(3, -1, -1),
        "text_mask": null.null_mask.expand(3, -1),
        "text_embedding": null.null_embedding.expand(3, -1),
    }
    torch.testing.assert_close(dropped[::2], prior(**{**given, **empty})[::2])
    torch.testing.assert_close(dropped[1], prior(**given)[1])
    moved = prior(**{**given, "x_t": given["x_t"] + 1}, drop=torch.ones(3, dtype=torch.bool))
    assert ((moved - dropped)[::2].abs() > 1e-3).any(dim=1).all()


@pytest.mark.parametrize("changes", VARIANTS)
def test_skipping_padding_changes_neither_prediction_nor_gradients(changes: dict) -> None:
    prior, given, seen = build(**changes), inputs(), []
    drop = torch.tensor([False, False, True])  # captions of 4 and 7 tokens, and the empty one of 2
    kept = prior.text.kept_tokens(given["text_mask"], drop, len(prior.positions))
    assert len(kept) == 4 + 7 + 2 + 3 * (len(prior.positions) - 7)
    prior.transformer.blocks[0].register_forward_hook(lambda module, arguments, output: seen.append(arguments[0].shape))
    gradients = []
    for options in ({}, {"kept": kept}):
        prediction = prior(**given, drop=drop, **options)
        prediction.square().sum().backward()
        gradients.append({name: value.grad for name, value in prior.named_parameters() if value.grad is not None})
        prior.zero_grad(set_to_none=True)
        seen.append(prediction.detach())
    shape, padded, packed_shape, packed = seen
    assert (shape, packed_shape) == ((3, len(prior.positions), 16), (len(kept), 16))
    torch.testing.assert_close(packed, padded)
    torch.testing.assert_close(gradients[1], gradients[0])


@torch.no_grad()
def test_kept_tokens_return_to_their_positions() -> None:
    transformer = build().transformer
    keep = torch.tensor([[True, True, False, True], [True, False, False, True]])
    x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    found = transformer(x, keep, kept=kept_tokens(keep))
    torch.testing.assert_close(found[keep], transformer(x, keep)[keep])
    assert not found[~keep].any()


def test_training_skips_padding(frozen_clip: Clip) -> None:
    """Padding is skipped for captions and for the empty caption that replaces a dropped one."""
    objective = PriorObjective(PriorConfig(**SMALL, cond_drop_prob=0.5), frozen_clip, EmbeddingStatistics.empty(64))
    tokens = frozen_clip.tokenize(["a large red circle", "a star"] * 8)
    seen: list[int] = []
    objective.model.transformer.blocks[0].register_forward_hook(
        lambda module, given, output: seen.append(len(given[0]))
    )
    tensors = {"tokens": tokens, "image_embedding": torch.randn(16, 64)}
    objective.loss(objective.model, tensors, torch.Generator().manual_seed(0)).backward()
    lengths = {
        caption: int((frozen_clip.tokenize([caption]) != 0).sum()) for caption in ("a large red circle", "a star", "")
    }
    assert 16 * (lengths[""] + 4) < seen[0] < 8 * (lengths["a large red circle"] + lengths["a star"] + 2 * 4)


@pytest.mark.slow  # compiling takes a minute
def test_a_compiled_block_accepts_any_number_of_tokens() -> None:
    eager, compiled = build(), build()
    parallel.compile_blocks(compiled)
    torch._dynamo.utils.counters.clear()
    for seed, lengths in enumerate(([4, 7, 2], [1, 1, 1], [7, 7, 7], [2, 3, 5])):
        given = {**inputs(), "text_mask": torch.arange(7) < torch.tensor(lengths)[:, None]}
        drop = torch.rand(3, generator=torch.Generator().manual_seed(seed)) < 0.3
        kept = eager.text.kept_tokens(given["text_mask"], drop, len(eager.positions))
        predictions = [prior(**given, drop=drop, kept=kept) for prior in (eager, compiled)]
        torch.testing.assert_close(predictions[1], predictions[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the last block and the others


@pytest.mark.parametrize("changes", VARIANTS[:2])
@torch.no_grad()
def test_processing_the_text_once_gives_the_same_predictions(changes: dict) -> None:
    prior, given = build(**changes), inputs()
    for dropped in (False, True):
        drop = torch.full((3,), dropped)
        predict = prior.predictor(**text(), drop=drop)
        for t in (999, 500, 0):
            given["t"] = torch.full((3,), t)
            torch.testing.assert_close(predict(given["x_t"], given["t"]), prior(**given, drop=drop), atol=1e-5, rtol=0)
            given["x_t"] = given["x_t"] * 0.9


@torch.no_grad()
def test_guidance_extrapolates_from_the_empty_caption_before_clamping() -> None:
    prior, given = build(clip_range=None), inputs()
    prediction, null = prior(**given), prior(**given, drop=torch.ones(3, dtype=torch.bool))
    expected = null + 3.0 * (prediction - null)
    calls = {"x_t": given["x_t"], "t": given["t"]}
    torch.testing.assert_close(
        denoised_x0(prior.denoiser(**text(), settings=PriorSampling(guidance_scale=3)), **calls),
        expected,
        atol=1e-5,
        rtol=0,
    )
    limit = expected.abs().median().item()
    bounded = build(clip_range=limit).denoiser(**text(), settings=PriorSampling(guidance_scale=3))
    torch.testing.assert_close(denoised_x0(bounded, **calls), expected.clamp(-limit, limit), atol=1e-5, rtol=0)


def denoised_x0(denoise: Any, **calls: torch.Tensor) -> torch.Tensor:
    return denoise(*calls.values()).x0  # type: ignore[no-any-return]


@pytest.mark.parametrize("prediction_type", ["x0", "eps", "v"])
@torch.no_grad()
def test_self_conditioning_reads_the_x0_of_the_previous_step(prediction_type: str) -> None:
    """The input is x0 even if the network predicts noise or velocity."""
    prior = build(self_conditioning=True, diffusion=DiffusionConfig(prediction_type=prediction_type), clip_range=2.0)  # type: ignore[arg-type]
    given, predict = inputs(), prior.predictor(**text())
    x_t, t = given["x_t"], torch.full((3,), 700)
    first = predict(x_t, t)
    torch.testing.assert_close(first, prior(x_t, t, **text()), atol=1e-5, rtol=0)
    x0 = prior.diffusion.predict_x0(x_t, t, first).clamp(-2, 2)
    torch.testing.assert_close(predict(x_t, t), prior(x_t, t, **text(), x0_estimate=x0), atol=1e-5, rtol=0)


def test_self_conditioning_is_trained_on_half_of_the_samples(frozen_clip: Clip) -> None:
    statistics = EmbeddingStatistics.of(torch.randn(100, 64))
    config = PriorConfig(
        **SMALL, self_conditioning=True, clip_range=0.05, diffusion=DiffusionConfig(prediction_type="eps")
    )
    objective, estimates = PriorObjective(config, frozen_clip, statistics), []

    def network(*arguments: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        if len(arguments) > 6:  # the first call has no estimate and computes one
            estimates.append(arguments[6])
        return objective.model(*arguments, **options)

    network.training = True  # type: ignore[attr-defined]

    rows = make_rows(frozen_clip, 400)
    for _ in range(2):
        loss = objective.loss(network, objective.prepare(rows), torch.Generator().manual_seed(3))  # type: ignore[arg-type]
    first, again = estimates
    assert torch.equal(first, again), "the choice does not follow the generator"
    given = first.any(dim=1)
    assert 0.4 < given.float().mean() < 0.6
    assert first.abs().max() <= 0.05 and not first.requires_grad
    loss.backward()
    assert objective.model.from_x0_estimate.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_one_self_conditioning_coin_can_decide_for_a_whole_batch(frozen_clip: Clip) -> None:
    config = PriorConfig(**SMALL, self_conditioning=True, self_conditioning_coin="batch")
    objective, calls = PriorObjective(config, frozen_clip, EmbeddingStatistics.of(torch.randn(100, 64))), []

    def network(*arguments: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        calls[-1].append(arguments[6] if len(arguments) > 6 else None)
        return objective.model(*arguments, **options)

    network.training = True  # type: ignore[attr-defined]
    tensors = objective.prepare(make_rows(frozen_clip, 8))
    for seed in range(40):
        calls.append([])
        objective.loss(network, tensors, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    with_estimate = [each for each in calls if len(each) == 2]
    assert 10 < len(with_estimate) < 30
    assert all(estimate.any(dim=1).all() for _, estimate in with_estimate), "some samples got no estimate"
    assert all(each == [None] for each in calls if len(each) == 1), "a pass without an estimate costs one call"


@torch.no_grad()
def test_the_noised_embedding_can_be_dropped_too_and_guidance_then_leads_away_from_neither() -> None:
    """As `image_cond_drop_prob` of DALLE2-pytorch: a learned embedding replaces the noised one."""
    prior, given, drop = build(image_drop_prob=0.1, clip_range=None), inputs(), torch.tensor([True, False, True])
    null = prior.null_image_embedding.expand(3, -1)
    expected = torch.where(drop[:, None], prior(**{**given, "x_t": null}), prior(**given))
    torch.testing.assert_close(prior(**given, image_drop=drop), expected)
    all_dropped = torch.ones(3, dtype=torch.bool)
    neither = prior(**{**given, "x_t": null}, drop=all_dropped)
    found = denoised_x0(
        prior.denoiser(**text(), settings=PriorSampling(guidance_scale=3)), x_t=given["x_t"], t=given["t"]
    )
    torch.testing.assert_close(found, neither + 3 * (prior(**given) - neither), atol=1e-5, rtol=0)
    assert build().null_image_embedding is None


def test_training_drops_noised_embeddings_independently_of_the_text(frozen_clip: Clip) -> None:
    config = PriorConfig(**SMALL, cond_drop_prob=0.3, image_drop_prob=0.6)
    objective, drops = PriorObjective(config, frozen_clip, EmbeddingStatistics.of(torch.randn(100, 64))), []
    objective.model.register_forward_hook(lambda module, given, output: drops.append((given[5], given[8])))
    objective.loss(
        objective.model, objective.prepare(make_rows(frozen_clip, 600)), torch.Generator().manual_seed(0)
    ).backward()
    [(text_drop, image_drop)] = drops
    assert text_drop.float().mean() == pytest.approx(0.3, abs=0.06)
    assert image_drop.float().mean() == pytest.approx(0.6, abs=0.06)
    assert (text_drop & image_drop).float().mean() == pytest.approx(0.18, abs=0.05)
    assert objective.model.null_image_embedding.grad.abs().sum() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("normalization", ["standardise", "scale"])
def test_a_clamped_norm_leaves_only_the_direction_to_be_learned(frozen_clip: Clip, normalization: Any) -> None:
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(1000, 64) + 0.3, dim=1)
    statistics = EmbeddingStatistics.of(embeddings)
    rows, losses = make_rows(frozen_clip, 8), []
    for clamp_norm in (True, False):
        config = PriorConfig(**SMALL, clamp_norm=clamp_norm, normalization=normalization)
        objective = PriorObjective(config, frozen_clip, statistics)
        prior, caption = objective.model, features(frozen_clip, rows)
        for _ in range(2):
            predicted = prior.statistics.denormalize(prior(torch.randn(8, 64), torch.arange(8) * 100, *caption))
            is_unit = torch.allclose(predicted.norm(dim=1), torch.ones(8), atol=2e-3)
            assert is_unit == clamp_norm
            losses.append(objective.loss(prior, objective.prepare(rows), torch.Generator().manual_seed(0)).item())
            with torch.no_grad():  # the same directions in CLIP's scale, with other lengths
                shift, scale = prior.statistics.affine()
                prior.to_image_embedding.weight *= 3.0
                prior.to_image_embedding.bias.copy_(3.0 * prior.to_image_embedding.bias + 2.0 * shift / scale)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[3] != pytest.approx(losses[2], rel=0.1)


@torch.no_grad()
def test_a_clamped_norm_holds_at_every_sampling_step() -> None:
    prior, x_t, t = build(clamp_norm=True), inputs()["x_t"], torch.full((3,), 700)
    guided = prior.denoiser(**text(), settings=PriorSampling(guidance_scale=4))
    norm = (prior.statistics.mean.square() + prior.statistics.std.square()).sum().sqrt()
    found = prior.statistics.denormalize(denoised_x0(guided, x_t=x_t, t=t))
    torch.testing.assert_close(found.norm(dim=1), norm.expand(3))


@pytest.mark.parametrize("changes", [{}, {"self_conditioning": True}])
@torch.no_grad()
def test_a_prior_without_text_encodings_reads_the_text_embedding_alone(changes: dict) -> None:
    prior, given = build(text_encodings=False, **changes), inputs()
    expected, other = prior(**given), build(text_encodings=False, **changes)
    assert len(prior.positions) == 4 + len(changes) and "text.from_text_encodings.weight" not in prior.state_dict()
    unread = {"text_encodings": given["text_encodings"] + 1, "text_mask": ~given["text_mask"]}
    assert torch.equal(other(**{**given, **unread}), expected)
    assert not torch.allclose(prior(**{**given, "text_embedding": given["text_embedding"] + 1}), expected)
    drop = torch.tensor([False, False, True])
    kept = prior.text.kept_tokens(given["text_mask"], drop, len(prior.positions))
    torch.testing.assert_close(prior(**given, drop=drop, kept=kept), prior(**given, drop=drop))
    predict = prior.predictor(**text(), drop=drop)
    torch.testing.assert_close(predict(given["x_t"], given["t"]), prior(**given, drop=drop), atol=1e-5, rtol=0)


def make_rows(frozen_clip: Clip, count: int) -> dict[str, list[Any]]:
    captions = [f"picture {index}" for index in range(count)]
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(count, frozen_clip.embedding_dim, generator=generator), dim=1)
    tokens = frozen_clip.tokenize(captions)
    similarity = (embeddings * frozen_clip.encode_text(tokens).text_embedding).sum(dim=1)
    return {
        "key": captions,
        "tokens": list(tokens.float().numpy()),  # the table reader returns lists of numbers as floats
        "image_embedding": list(embeddings.numpy()),
        "clip_score": similarity.tolist(),
    }


def train(objective: Any, rows: dict[str, list[Any]], num_steps: int, learning_rate: float) -> list[float]:
    optimizer = torch.optim.AdamW(objective.model.parameters(), learning_rate, weight_decay=0.0)
    tensors, losses = objective.prepare(rows), []
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, 2 * (1 - step / num_steps))
        optimizer.zero_grad()
        loss = objective.loss(objective.model.train(), tensors, torch.Generator().manual_seed(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    objective.model.eval()
    return losses


def features(frozen_clip: Clip, rows: dict[str, list[Any]]) -> tuple[torch.Tensor, ...]:
    found = frozen_clip.encode_text(frozen_clip.tokenize(rows["key"]))
    return found.text_encodings, found.text_mask, found.text_projection


@pytest.mark.parametrize("normalization", ["standardise", "scale"])
def test_it_overfits_sixteen_samples(frozen_clip: Clip, normalization: Any) -> None:
    rows = make_rows(frozen_clip, 16)
    embeddings = torch.from_numpy(np.stack(rows["image_embedding"]))
    config = PriorConfig(width=64, depth=2, num_heads=2, normalization=normalization)
    torch.manual_seed(0)
    objective = PriorObjective(config, frozen_clip, EmbeddingStatistics.of(embeddings))
    original = copy.deepcopy(rows)
    train(objective, rows, 200, 5e-3)
    assert all(
        (old == new).all() for old, new in zip(original["image_embedding"], rows["image_embedding"], strict=True)
    )
    generator = torch.Generator().manual_seed(0)
    samples = objective.model.sample(
        *features(frozen_clip, rows), PriorSampling(num_steps=16, guidance_scale=1.5), generator=generator
    )
    similarity = F.normalize(samples, dim=1) @ embeddings.T
    assert similarity.argmax(dim=1).tolist() == list(range(16))
    assert similarity.diag().mean() > 0.9


def test_a_restored_prior_gives_the_same_samples(tmp_path: Path, frozen_clip: Clip) -> None:
    rows = make_rows(frozen_clip, 4)
    objective = PriorObjective(PriorConfig(**SMALL), frozen_clip, EmbeddingStatistics.of(torch.randn(50, 64)))
    facts = {**objective.facts(), "samples_seen": 1}
    checkpoints.save(str(tmp_path), {"model": objective.model.state_dict()}, facts)
    loaded = load_model(str(tmp_path), (PRIOR,))
    samples = [
        model.eval().sample(
            *features(frozen_clip, rows),
            PriorSampling(num_steps=3, guidance_scale=2),
            generator=torch.manual_seed(5),
        )
        for model in (objective.model, loaded)
    ]
    assert torch.equal(*samples)
    null = frozen_clip.encode_text(frozen_clip.tokenize([""]))
    assert torch.equal(loaded.text.null_embedding, null.text_projection[0])  # type: ignore[union-attr]
    assert torch.equal(loaded.text.null_mask, null.text_mask[0])  # type: ignore[union-attr]


@pytest.mark.parametrize("num_candidates", [1, 2, 5])
@torch.no_grad()
def test_sampling_accepts_any_number_of_captions_and_candidates(num_candidates: int) -> None:
    prior = build()
    for size in (1, 3):
        samples = prior.sample(
            **text(size),
            settings=PriorSampling(num_candidates=num_candidates, num_steps=2),
            generator=torch.manual_seed(0),
        )
        assert samples.shape == (size, 6) and samples.isfinite().all()
    # one step from noise returns the denoiser's x0 in CLIP's scale
    single = prior.sample(
        **text(),
        settings=PriorSampling(num_candidates=1, num_steps=1),
        generator=torch.Generator().manual_seed(4),
    )
    noise = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))
    x0 = prior(noise, torch.full((3,), 999), **text()).clamp(-10, 10)
    torch.testing.assert_close(single, prior.statistics.denormalize(x0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("text_norm", "tolerance"), [("unit", 1e-5), ("layer", 1e-2), ("none", None)])
@torch.no_grad()
def test_text_norm_controls_the_effect_of_the_text_projections_norm(text_norm: str, tolerance: float | None) -> None:
    prior, given = build(text_norm=text_norm), inputs()
    change = prior(**{**given, "text_embedding": 7 * given["text_embedding"]}) - prior(**given)
    assert change.abs().max() <= tolerance if tolerance is not None else change.abs().max() > 0.05


@torch.no_grad()
def test_timestep_embeddings_stay_distinct_under_autocast() -> None:
    prior = build()
    t = torch.arange(1000)
    with torch.autocast("cpu", torch.bfloat16):
        embedded = prior.from_timestep(t)
    assert len(embedded.unique(dim=0)) == 1000


def test_the_clip_of_the_training_is_recognised_whatever_the_padding_holds(frozen_clip: Clip) -> None:
    """Padding is never read, and stacks trained before captions were shortened store other values there."""
    objective = PriorObjective(PriorConfig(**SMALL), frozen_clip, EmbeddingStatistics.of(torch.randn(100, 64)))
    null = objective.model.text
    null.null_encodings[~null.null_mask] = 1.0
    assert null.knows(frozen_clip)
    null.null_encodings[null.null_mask] += 1.0
    assert not null.knows(frozen_clip)


def test_the_loss_drops_text_only_by_the_generator(frozen_clip: Clip) -> None:
    statistics = EmbeddingStatistics.of(torch.randn(100, 64))
    objective, drops = PriorObjective(PriorConfig(**SMALL, cond_drop_prob=0.3), frozen_clip, statistics), []

    def network(*arguments: torch.Tensor) -> torch.Tensor:
        drops.append(arguments[5])
        return objective.model(*arguments)

    network.training = True  # type: ignore[attr-defined]

    tensors = objective.prepare(make_rows(frozen_clip, 500))
    for seed in (1, 1, 2):
        objective.loss(network, tensors, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    assert torch.equal(drops[0], drops[1]) and not torch.equal(drops[0], drops[2])
    assert 0.2 < drops[0].float().mean() < 0.4


def test_the_loss_uses_the_weighting_of_the_diffusion(frozen_clip: Clip) -> None:
    """For x0 the weight is the signal-to-noise ratio of each sample's timestep, clamped by min-SNR (Hang et al. 2023, eq. 6)."""
    statistics = EmbeddingStatistics.of(torch.randn(100, 64))
    timesteps: list[torch.Tensor] = []
    losses = []
    for weighting in ("none", "min_snr"):
        torch.manual_seed(0)
        diffusion = DiffusionConfig(prediction_type="x0", loss_weighting=weighting)  # type: ignore[arg-type]
        objective = PriorObjective(PriorConfig(**SMALL, diffusion=diffusion), frozen_clip, statistics)

        def network(x_t: torch.Tensor, t: torch.Tensor, *others: Any) -> torch.Tensor:
            timesteps.append(t)
            return torch.zeros_like(x_t)

        network.training = True  # type: ignore[attr-defined]

        tensors = objective.prepare(make_rows(frozen_clip, 8))
        losses.append(objective.loss(network, tensors, torch.Generator().manual_seed(1)))  # type: ignore[arg-type]
        x0 = objective.model.statistics.normalize(tensors["image_embedding"])
    alphas_cumprod = objective.model.diffusion.alphas_cumprod[timesteps[0]]
    weight = (alphas_cumprod / (1 - alphas_cumprod)).clamp(max=5.0).float()
    squared_error = x0.square().mean(dim=1)
    torch.testing.assert_close(losses[0], squared_error.mean())
    torch.testing.assert_close(losses[1], (weight * squared_error).mean())


def test_clip_stays_frozen_while_the_prior_trains(frozen_clip: Clip) -> None:
    objective = PriorObjective(PriorConfig(**SMALL), frozen_clip, EmbeddingStatistics.of(torch.randn(9, 64)))
    before = {name: value.clone() for name, value in frozen_clip.state_dict().items()}
    train(objective, make_rows(frozen_clip, 4), 2, 1e-2)
    assert not frozen_clip.training
    assert all(torch.equal(value, before[name]) for name, value in frozen_clip.state_dict().items())
    assert not any(name.startswith("clip") for name, _ in objective.model.named_parameters())


def test_statistics_are_saved_but_not_trained_and_must_be_valid(frozen_clip: Clip) -> None:
    prior = build()
    assert {"statistics.mean", "statistics.std"} <= prior.state_dict().keys()
    assert not any("statistics" in name or "null" in name for name, _ in prior.named_parameters())
    constant = torch.ones(20, 64)  # a dimension that never varies
    objective = PriorObjective(PriorConfig(**SMALL), frozen_clip, EmbeddingStatistics.of(constant))
    loss = objective.loss(
        objective.model, objective.prepare(make_rows(frozen_clip, 4)), torch.Generator().manual_seed(0)
    )
    assert loss.isfinite()
    for broken in (torch.zeros(64), torch.full((64,), torch.nan)):
        with pytest.raises(InputError, match="never given its statistics"):
            PriorObjective(PriorConfig(**SMALL), frozen_clip, EmbeddingStatistics(torch.zeros(64), broken))


@pytest.mark.parametrize(
    ("config", "sizes", "expected"),
    [
        (DALLE2_PRIOR, (1024, 1024, 77), 1_224e6),
        (KARLO_PRIOR, (768, 768, 77), 1_021e6),
        (BASE_PRIOR, (768, 768, 77), 207e6),
        (SMALL_PRIOR, (768, 768, 77), 40e6),
    ],
)
def test_presets_have_the_documented_number_of_parameters(
    config: PriorConfig, sizes: tuple[int, int, int], expected: float
) -> None:
    with torch.device("meta"):
        prior = DiffusionPrior(config, *sizes)
    assert sum(parameter.numel() for parameter in prior.parameters()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "num_heads: got 3"),
        ({"depth": 0}, "depth: got 0"),
        ({"cond_drop_prob": 1.0}, "cond_drop_prob: got 1.0"),
        ({"clip_range": 0.0}, "clip_range: got 0.0"),
        ({"image_drop_prob": 1.0}, "image_drop_prob: got 1.0"),
        (
            {"clamp_norm": True, "diffusion": DiffusionConfig()},
            "diffusion.prediction_type: got 'eps', expected x0 with",
        ),
        ({"diffusion": DiffusionConfig(variance="learned_range")}, "diffusion.variance: got 'learned_range'"),
    ],
)
def test_invalid_priors_are_rejected(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PriorConfig(**{**SMALL, **settings})
