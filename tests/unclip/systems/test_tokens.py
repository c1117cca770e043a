"""DALL·E and Parti while they train, and their stacks: losses, files, candidates, guidance, sizes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import load
from tests.unclip.systems import tiny_tokens
from tests.unclip.systems.sized import count_parameters
from tests.unclip.systems.tiny_tokens import CAPTIONS, KINDS, PARTS
from unclip.errors import CheckpointError, ConfigError, InputError, ShapeError
from unclip.models.clip import Clip
from unclip.models.text import TextShape
from unclip.systems.dalle import MODEL_SIZES as DALLE_SIZES
from unclip.systems.part import Shapes
from unclip.systems.parti import MODEL_SIZES as PARTI_SIZES
from unclip.systems.system import load_model, load_system, sample_captions, sample_together
from unclip.systems.tokens import TokenObjective, TokenStack
from unclip.training import checkpoints, memory

SHAPES = Shapes(64, TextShape(24, 96, 49408))


@pytest.fixture(scope="module")
def clip() -> Clip:
    return tiny_tokens.demo_clip()


@pytest.fixture(scope="module", params=KINDS)
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, clip: Clip) -> TokenStack:
    folder = tiny_tokens.publish(tmp_path_factory.mktemp(request.param), request.param, clip)
    system: Any = load_system(folder)
    assert isinstance(system, TokenStack)
    return system


# -------------------------------------------------------------------------------------------------- training


def test_the_loss_of_dalle_is_an_eighth_that_of_the_text(clip: Clip) -> None:
    objective = tiny_tokens.objective("dalle", clip, cond_drop_prob=0.0)
    tensors = objective.prepare(tiny_tokens.rows(clip))
    loss = objective.loss(objective.model, tensors, torch.Generator().manual_seed(0))
    text, image = objective.model(tensors["tokens"], tensors["codes"]).mean(dim=0)
    torch.testing.assert_close(loss, text / 8 + image * 7 / 8)
    metrics = objective.metrics(training=True)
    assert metrics["text_loss"] == pytest.approx(text.item()) and metrics["image_loss"] == pytest.approx(image.item())
    assert metrics["relative_loss"] == pytest.approx(image.item() / torch.tensor(12.0).log().item())
    assert objective.metrics(training=True) == {} and objective.metrics(training=False) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_do_not_depend_on_the_micro_batches(kind: str, clip: Clip) -> None:
    objective = tiny_tokens.objective(kind, clip, cond_drop_prob=0.0)
    tensors = objective.prepare(tiny_tokens.rows(clip))
    whole = objective.loss(objective.model, tensors, torch.Generator())
    parts = [{name: value[first : first + 4] for name, value in tensors.items()} for first in range(0, 16, 4)]
    mean = torch.stack([objective.loss(objective.model, part, torch.Generator()) for part in parts]).mean()
    torch.testing.assert_close(whole, mean)


@pytest.mark.parametrize("kind", KINDS)
def test_it_overfits_sixteen_rows_and_is_restored_from_a_checkpoint(kind: str, clip: Clip, tmp_path: Path) -> None:
    objective = tiny_tokens.objective(kind, clip, width=48, cond_drop_prob=0.0)
    tensors = objective.prepare(tiny_tokens.rows(clip))
    optimizer = torch.optim.AdamW(objective.model.parameters(), 5e-3)
    for step in range(120):
        optimizer.zero_grad()
        loss = objective.loss(objective.model, tensors, torch.Generator().manual_seed(step))
        loss.backward()
        optimizer.step()
    assert objective.metrics(training=True)["relative_loss"] < 0.9  # of all steps
    assert loss.item() < 0.15
    state, facts = objective.model.state_dict(), {**objective.facts(), "samples_seen": 1}
    checkpoints.save(str(tmp_path), {"model": state}, facts)
    restored: Any = load_model(str(tmp_path), (PARTS[kind],))
    settings = getattr(tiny_tokens.sampling(kind, temperature=0, num_candidates=1, guidance_scale=1.0), kind)
    assert torch.equal(restored.sample(tensors["tokens"], settings), tensors["codes"])
    preview = objective.preview(restored)
    assert preview.shape == (4, 3, 16, 16) and preview.abs().max() <= 1
    assert torch.isfinite(preview).all()


def test_dalle_learns_the_tokens_of_a_discrete_vae(clip: Clip) -> None:
    """The autoencoder of its paper has the bottleneck gumbel."""
    autoencoder = tiny_tokens.autoencoder(bottleneck="gumbel")
    given = tiny_tokens.rows(clip)
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = autoencoder.tokens(images)
    assert len(codes.unique()) > 2
    given["codes"] = list(codes.int().numpy())
    preview = {name: values[:2] for name, values in given.items()}
    captions = tiny_tokens.text_tokens(clip)
    model = tiny_tokens.model("dalle", clip.text_length, cond_drop_prob=0.0)
    objective = TokenObjective("dalle", model, clip, autoencoder, captions, preview)
    tensors = objective.prepare(given)
    assert torch.equal(tensors["codes"].long(), codes)
    optimizer, losses = torch.optim.AdamW(objective.model.parameters(), 5e-3), []
    for step in range(40):
        optimizer.zero_grad()
        loss = objective.loss(objective.model, tensors, torch.Generator().manual_seed(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    shown = objective.preview(objective.model)
    torch.testing.assert_close(shown[:2], autoencoder.decode_tokens(codes[:2]).clamp(-1, 1), atol=1e-5, rtol=0)


def test_a_model_for_other_codes_is_refused(clip: Clip) -> None:
    with pytest.raises(ConfigError, match=r"dalle\.model\.codebook_size: got 13, expected 12, that of the autoencoder"):
        tiny_tokens.objective("dalle", clip, codebook_size=13)
    with pytest.raises(ConfigError, match=r"parti\.model\.grid_size: got 8, expected 4"):
        tiny_tokens.objective("parti", clip, grid_size=8)
    given = tiny_tokens.rows(clip)
    continuous = tiny_tokens.autoencoder(bottleneck="kl")
    with pytest.raises(ConfigError, match=r"dalle: got an autoencoder without tokens \(kl\)"):
        TokenObjective("dalle", tiny_tokens.model("dalle"), clip, continuous, tiny_tokens.text_tokens(clip), given)


# -------------------------------------------------------------------------------------------------- sampling


def test_the_candidate_that_clip_scores_highest_is_kept(stack: TokenStack) -> None:
    sampling = stack.sampling
    candidates = stack.sample_candidates(CAPTIONS, sampling, torch.Generator().manual_seed(5))
    assert candidates.shape == (3, 3, 3, 16, 16) and len(candidates.flatten(0, 1).unique(dim=0)) == 9
    images = stack.sample(CAPTIONS, sampling, torch.Generator().manual_seed(5))
    text = stack.clip.encode_text(stack.clip.tokenize(CAPTIONS)).text_embedding.double()
    for caption in range(3):
        embeddings = stack.clip.embed_images(stack.clip.resize(candidates[caption])).double()
        cosines = embeddings @ text[caption]
        assert torch.equal(images[caption], candidates[caption, cosines.argmax()])
        torch.testing.assert_close(
            stack.score(candidates[caption : caption + 1], CAPTIONS[caption : caption + 1])[0].double(), cosines
        )


def test_more_candidates_match_their_captions_better(stack: TokenStack) -> None:
    def mean_score(num_candidates: int) -> float:
        settings = dataclasses.replace(getattr(stack.sampling, stack.name), num_candidates=num_candidates)
        sampling = dataclasses.replace(stack.sampling, **{stack.name: settings})
        images = stack.sample(CAPTIONS, sampling, torch.Generator().manual_seed(5))
        return stack.score(images[:, None], CAPTIONS).mean().item()

    assert mean_score(8) > mean_score(1)


def test_the_same_seed_gives_the_same_images(stack: TokenStack) -> None:
    first, again, other = (sample_captions(stack, CAPTIONS, seed=seed) for seed in (1, 1, 2))
    assert first.shape == (3, 3, 16, 16) and torch.equal(first, again) and not torch.equal(first, other)


def test_an_image_does_not_depend_on_the_requests_in_its_batch(stack: TokenStack) -> None:
    alone = [sample_captions(stack, CAPTIONS[:1], seed=7), sample_captions(stack, CAPTIONS[1:], seed=8)]
    together = sample_together(stack, CAPTIONS, [(7, 1), (8, 2)], sampling=stack.sampling)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    padded = dataclasses.replace(stack.sampling, batch_size=4, pad_batches=True)
    alone = [sample_captions(stack, CAPTIONS[:1], seed=7, sampling=padded)]
    alone += [sample_captions(stack, CAPTIONS[1:], seed=8, sampling=padded)]
    together = sample_together(stack, CAPTIONS, [(7, 1), (8, 2)], sampling=padded)
    assert torch.equal(together, torch.cat(alone))


def test_guidance_and_negative_captions_change_the_images(stack: TokenStack) -> None:
    def sample(scale: float, negative: list[str] | None = None) -> torch.Tensor:
        settings = dataclasses.replace(getattr(stack.sampling, stack.name), guidance_scale=scale)
        sampling = dataclasses.replace(stack.sampling, **{stack.name: settings})
        return sample_captions(stack, CAPTIONS, seed=1, sampling=sampling, negative=negative)

    plain, guided = sample(1.0), sample(20.0)
    assert not torch.equal(plain, guided)
    assert not torch.equal(guided, sample(20.0, ["a large yellow square"] * 3))
    assert torch.equal(guided, sample(20.0, [""] * 3))
    with pytest.raises(InputError, match="nothing that reads captions is guided"):
        sample(1.0, [""] * 3)
    with pytest.raises(ShapeError, match="got 2 negative captions for 3 captions"):
        stack.sample(CAPTIONS, stack.sampling, torch.Generator(), negative=["", ""])


def test_parts_of_other_stacks_are_refused(stack: TokenStack, clip: Clip) -> None:
    name, sampling = stack.name, stack.sampling
    with pytest.raises(CheckpointError, match=rf"{name}\.model\.codebook_size: got 12, expected 8"):
        TokenStack(name, clip, tiny_tokens.autoencoder(codebook_size=8), stack.model, sampling)
    with pytest.raises(CheckpointError, match=f"{name}: was trained with a CLIP other than this one"):
        TokenStack(name, clip, stack.autoencoder, tiny_tokens.model(name, text_length=20), sampling)
    with pytest.raises(CheckpointError, match=f"{name}: was trained with a CLIP other than this one"):
        TokenStack(name, clip, stack.autoencoder, tiny_tokens.model(name), sampling)  # its empty caption is all zeros


# ------------------------------------------------------------------------------------------------------ sizes

COUNTS = {
    "dalle": {"demo": 2_038_528, "base": 369_534_976, "dalle": 12_290_991_872},
    "parti": {
        "demo": 3_049_088,
        "base": 385_979_392,
        "parti_750m": 789_099_520,
        "parti_3b": 3_088_140_288,
        "parti_20b": 20_539_961_344,
    },
}
"""Parameters of the Transformer by system and size, with that CLIP's tokenizer."""
SIZES = {"dalle": DALLE_SIZES, "parti": PARTI_SIZES}
ALL_SIZES = [(kind, size) for kind in KINDS for size in SIZES[kind]]


def config_of(kind: str, size: str) -> Any:
    return load("text_to_image", None, ["ingest.urls=unknown", f"system={kind}", f"model_size={size}"])


def count(kind: str, size: str) -> int:
    return count_parameters(PARTS[kind].network(getattr(config_of(kind, size), kind), SHAPES))


@pytest.mark.parametrize(("kind", "size"), ALL_SIZES)
def test_sizes_have_the_number_of_parameters_in_the_table(kind: str, size: str) -> None:
    assert count(kind, size) == COUNTS[kind][size]


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        ("dalle", "dalle", 12e9),
        ("parti", "base", 350e6),
        ("parti", "parti_750m", 750e6),
        ("parti", "parti_3b", 3e9),
        ("parti", "parti_20b", 20e9),
    ],
)
def test_the_papers_sizes_have_the_papers_number_of_parameters(kind: str, size: str, expected: float) -> None:
    assert count(kind, size) == pytest.approx(expected, rel=0.11)  # the embeddings are a tenth of the smallest


def test_dalle_has_the_sizes_of_its_paper() -> None:
    config = config_of("dalle", "dalle")
    model, trainer = config.dalle.model, config.dalle.trainer
    assert (model.depth, model.num_heads, model.width // model.num_heads) == (64, 62, 64)
    assert (model.text_vocab_size, model.codebook_size, model.num_image_tokens) == (16_384, 8192, 1024)
    assert (trainer.batch_size, trainer.num_samples) == (1024, 430_000 * 1024)


@pytest.mark.parametrize(("kind", "size"), [("dalle", "base"), ("parti", "base")])
def test_flops_are_those_of_the_weights_and_tokens(kind: str, size: str) -> None:
    config = getattr(config_of(kind, size), kind)
    text_length = 256
    counted = memory.count(PARTS[kind].network(config, Shapes(1024, TextShape(text_length, 1024, 49408))))
    # 2 FLOPs a weight and token forward and 4 backward; embeddings need none, and attention is extra
    width, depth, num_codes = config.model.width, config.model.depth, config.model.num_image_tokens
    if kind == "dalle":
        products = 12 * width**2 * depth * (text_length + num_codes - 1)
        products += width * config.model.text_vocab_size * (text_length - 1)
    else:
        # self-attention, MLP, and the queries and outputs of the attention to the text; then keys and values of the text
        products = 14 * width**2 * depth * num_codes + 2 * width**2 * depth * text_length
        products += 12 * width**2 * config.model.encoder_depth * text_length
    products += width * config.model.codebook_size * num_codes
    assert 6 * products <= counted.flops_per_sample <= 1.2 * 6 * products
