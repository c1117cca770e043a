"""Codebooks that learn beside the loss: moving averages, dead codes, and the statistics of use."""

import math

import numpy as np
import pytest
import torch

from unclip.errors import ConfigError
from unclip.models.quantisers import VectorQuantiser
from unclip.training.codebooks import CodebookConfig, CodebookLearner, CodeUse

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learner(num_codes: int = 6, dim: int = 3, **settings: object) -> tuple[CodebookLearner, torch.Tensor]:
    """A learner, and a codebook [K, D]."""
    codebook = torch.randn(num_codes, dim, generator=generator(9))
    return CodebookLearner(CodebookConfig(**settings), num_codes, dim, CPU), codebook  # type: ignore[arg-type]


def encodings(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=generator(seed))


def codes_of(values: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest codes [B, ss], and squared distances to them."""
    rows = values.permute(0, 2, 3, 1).flatten(1, 2)  # [B, ss, D]
    distances = torch.cdist(rows, codebook[None]) ** 2
    return distances.argmin(dim=2), distances.min(dim=2).values


def test_codes_follow_the_moving_averages_of_their_encodings() -> None:
    """Oracle: van den Oord et al. 2017, eq. 6 to 8, in float64."""
    averages, codebook = learner(decay=0.9, restart_below=0.0)
    use, totals, expected = np.zeros(6), np.zeros((6, 3)), codebook.double().numpy().copy()
    for step in range(5):
        for micro_batch in range(2):
            values = encodings(10 * step + micro_batch)
            averages.add(values, *codes_of(values, codebook), generator())
        counts, sums = np.zeros(6), np.zeros((6, 3))
        for micro_batch in range(2):
            values = encodings(10 * step + micro_batch)
            codes = codes_of(values, torch.from_numpy(expected).float())[0].flatten().numpy()
            for code, row in zip(codes, values.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy(), strict=True):
                counts[code] += 1
                sums[code] += row
        use, totals = 0.9 * use + 0.1 * counts, 0.9 * totals + 0.1 * sums
        expected = np.where(use[:, None] > 0, totals / np.maximum(use[:, None], 1e-12), expected)
        averages.learn(True, codebook)
        np.testing.assert_allclose(codebook.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(averages.state["use"].numpy(), use, atol=1e-4)


@pytest.mark.parametrize("updates", ["ema", "loss"])
def test_dead_codes_get_the_vectors_of_badly_coded_encodings(updates: str) -> None:
    averages, codebook = learner(num_codes=40, updates=updates, restart_below=0.1)
    codebook[:3] = torch.randn(3, 3, generator=generator(1))
    codebook[3:] = 1e3  # no encoding is near them
    before, values = codebook.clone(), encodings(0)
    averages.add(values, *codes_of(values, codebook), generator(2))
    averages.learn(True, codebook)
    rows = values.permute(0, 2, 3, 1).reshape(-1, 3)
    restarted = codebook[3 : 3 + 3]  # a sixteenth of the codes, rounded up
    distances = torch.cdist(restarted.double(), rows.double()).min(dim=1)
    assert distances.values.max() == 0, "not an encoding"
    assert len(distances.indices.unique()) == 3, "an encoding twice"
    assert (codebook[6:] == 1e3).all(), "more codes than allowed"
    assert torch.equal(codebook[:3], before[:3]) == (updates == "loss")
    assert (averages.state["use"] > 0)[:6].all() and (averages.state["use"] == 0)[6:].all()


def test_encodings_far_from_their_codes_are_likelier_to_become_codes() -> None:
    far = 0
    for seed in range(50):
        averages, codebook = learner(num_codes=2, dim=1, updates="loss")
        codebook[:] = torch.tensor([[0.0], [1e6]])
        values = torch.zeros(1, 1, 4, 4)
        values[0, 0, 1, 2] = 3.0
        averages.add(values, *codes_of(values, codebook), generator(seed))
        averages.learn(True, codebook)
        far += codebook[1].item() == 3.0
    assert far >= 45


def test_a_step_that_is_not_taken_teaches_nothing() -> None:
    averages, codebook = learner()
    before = codebook.clone()
    averages.add(encodings(0), *codes_of(encodings(0), codebook), generator())
    averages.learn(False, codebook)
    averages.learn(True, codebook)
    assert torch.equal(codebook, before) and averages.state["use"].sum() == 0


def test_restarts_find_clusters_from_any_start() -> None:
    """Sixteen codes find at least eight of ten clusters, nine of which are rare; without restarts, fewer."""
    centres = torch.randn(10, 4, generator=generator(3)) * 5
    shares = torch.tensor([0.55, *[0.05] * 9])

    def num_found(start: int, restart_below: float) -> int:
        quantiser = VectorQuantiser(16, 4).requires_grad_(False)
        quantiser.codebook.uniform_(-1 / 16, 1 / 16, generator=generator(start))
        averages = CodebookLearner(CodebookConfig(decay=0.8, restart_below=restart_below), 16, 4, CPU)
        for step in range(60):
            members = torch.multinomial(shares, 512, replacement=True, generator=generator(step))
            noise = torch.randn(512, 4, generator=generator(1000 + step)) * 0.05
            values = (centres[members] + noise).view(8, 8, 8, 4).permute(0, 3, 1, 2)
            found = quantiser(values)
            averages.add(values, found.codes, found.errors, generator(step))
            averages.learn(True, quantiser.codebook)
        return int((torch.cdist(centres, quantiser.codebook).min(dim=1).values < 0.1).sum())

    with_restarts = [num_found(start, 0.1) for start in range(5)]
    assert min(with_restarts) >= 8
    assert sum(num_found(start, 0.0) for start in range(5)) < sum(with_restarts)


def test_use_and_perplexity_are_those_of_the_counts() -> None:
    use = CodeUse(8)
    assert use.take() == {}
    use.add(torch.tensor([[0, 1], [2, 3]]))
    assert use.take() == {"code_use": 0.5, "perplexity": pytest.approx(4)}
    use.add(torch.tensor([0, 0, 0]))
    use.add(torch.tensor([5]))
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert use.take() == {"code_use": 0.25, "perplexity": pytest.approx(expected)}


def test_wrong_settings_are_named() -> None:
    for name in ("decay", "restart_below"):
        with pytest.raises(ConfigError, match=f"{name}: got 1.0, expected at least 0 and below 1"):
            CodebookConfig(**{name: 1.0})  # type: ignore[arg-type]
