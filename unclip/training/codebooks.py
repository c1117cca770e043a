"""Training of a codebook besides the loss: moving averages of the encodings of each code, and new vectors for dead codes.

All ranks and micro-batches of a step see the same codebook; it changes at the end of the step, from the encodings of all of
them, in rank order.

Source: van den Oord et al. 2017, appendix A.1 (moving averages); Dhariwal et al. 2020, "Jukebox", section 3.1 (dead codes).

Letters: B batch, D length of a code's vector, s latent size, K codes, N = B s s encodings.
"""

import dataclasses
from typing import Literal

import torch
import torch.distributed
from torch import Tensor

from unclip.config import require
from unclip.training import parallel
from unclip.training.objective import Tensors

RESTARTED = 16
"""At most one of so many codes restarts from a micro-batch, so that the next ones go to what is badly coded then."""


@dataclasses.dataclass(frozen=True)
class CodebookConfig:
    updates: Literal["ema", "loss"] = "ema"
    """Codes follow moving averages of their encodings (ema), or the gradient of the codebook loss (loss)."""
    decay: float = 0.99
    """Decay of the moving averages, and of the use of each code."""
    commitment_weight: float = 0.25
    """Beta, weight of the commitment loss."""
    restart_below: float = 0.1
    """Codes used less than this fraction of the mean use are dead: they get the vectors of random encodings, most likely of badly
    coded ones. At the start all codes are dead. 0 for never."""

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, "decay", self.decay, "at least 0 and below 1")
        require(self.commitment_weight >= 0, "commitment_weight", self.commitment_weight, "at least 0")
        require(0 <= self.restart_below < 1, "restart_below", self.restart_below, "at least 0 and below 1")


class CodebookLearner:
    """Moving averages of a codebook, which learn from the encodings of a step."""

    def __init__(self, config: CodebookConfig, num_codes: int, dim: int, device: torch.device) -> None:
        self.config = config
        self.state: Tensors = {"use": torch.zeros(num_codes, device=device)}
        """`use` [K], moving average of the encodings of each code in a step; `totals` [K, D], that of their sums."""
        if config.updates == "ema":
            self.state["totals"] = torch.zeros(num_codes, dim, device=device)
        self._unlearned: list[tuple[Tensor, Tensor]] = []  # sums and candidates of the step's micro-batches

    @torch.no_grad()
    def add(self, encodings: Tensor, codes: Tensor, errors: Tensor, generator: torch.Generator) -> None:
        """Record the encodings of a micro-batch.

        Args:
            encodings: [B, D, s, s] float32.
            codes: [B, s * s] int64, their codes.
            errors: [B, s * s] float32, squared distances to their codes' vectors.
            generator: source of all randomness, on the same device.
        """
        num_codes = len(self.state["use"])
        rows = encodings.permute(0, 2, 3, 1).flatten(0, 2)  # [N, D]
        codes = codes.flatten()  # [N]
        # one column for the number of encodings and, for moving averages, D for their sum
        sums = torch.bincount(codes, minlength=num_codes).to(rows.dtype)[:, None]  # [K, 1]
        if "totals" in self.state:
            sums = torch.cat([sums, torch.zeros_like(self.state["totals"]).index_add_(0, codes, rows)], dim=1)
        count = min(-(-num_codes // RESTARTED), len(rows))
        weights = errors.flatten() + errors.mean() * 1e-3 + 1e-12  # [N], all above 0
        chosen = torch.multinomial(weights, count, generator=generator)  # without replacement
        self._unlearned.append((sums, rows[chosen]))

    @torch.no_grad()
    def learn(self, step_taken: bool, codebook: Tensor) -> None:
        """Update the averages and the codebook [K, D], which may be sharded, from a step; see `objective.Learning`."""
        unlearned, self._unlearned = self._unlearned, []
        if not step_taken or not unlearned:
            return
        sums = parallel.all_reduce_sum(torch.stack([sums for sums, _ in unlearned]).sum(dim=0))  # [K, 1 + D] or [K, 1]
        candidates = _all_gather(torch.cat([rows for _, rows in unlearned]))  # [M, D]
        use, totals = self.state["use"], self.state.get("totals")
        use.lerp_(sums[:, 0], 1 - self.config.decay)
        mean = use.mean()
        is_dead = use < self.config.restart_below * mean  # [K]
        number = is_dead.cumsum(0) - 1  # [K], of each dead code
        is_dead &= number < len(candidates)
        given = candidates[number.clamp(0, len(candidates) - 1)]  # [K, D]
        shard, start = parallel.local_shard(codebook), parallel.offset(codebook)[0]
        own = slice(start, start + len(shard))
        if totals is None:
            vectors = shard
        else:
            totals.lerp_(sums[:, 1:], 1 - self.config.decay)
            is_used = (use > 0)[own, None]
            vectors = torch.where(is_used, totals[own] / use[own, None].clamp(min=1e-12), shard)
            totals.copy_(torch.where(is_dead[:, None], given * mean, totals))
        shard.copy_(torch.where(is_dead[own, None], given[own], vectors))
        use.copy_(torch.where(is_dead, mean, use))


class CodeUse:
    """Share of the codes that are used, and the perplexity of their distribution."""

    def __init__(self, num_codes: int) -> None:
        self.num_codes = num_codes
        self._counts: Tensor | None = None  # [K]

    def add(self, codes: Tensor) -> None:
        """Count codes, int64 of any shape."""
        counts = torch.bincount(codes.flatten(), minlength=self.num_codes)
        self._counts = counts if self._counts is None else self._counts + counts

    def take(self, all_ranks: bool = False) -> dict[str, float]:
        """Return and reset `code_use`, from 0 to 1, and `perplexity`, from 1 to K, since the last call.

        Args:
            all_ranks: combine the codes of all ranks; all of them must call it.
        """
        if self._counts is None:
            return {}
        counts, self._counts = self._counts, None
        counts = (parallel.all_reduce_sum(counts) if all_ranks else counts).double()
        probabilities = counts / counts.sum()
        entropy = -torch.special.xlogy(probabilities, probabilities).sum()
        return {"code_use": float((counts > 0).double().mean()), "perplexity": float(entropy.exp())}


def _all_gather(rows: Tensor) -> Tensor:
    """Rows [M, D] of all ranks, in rank order."""
    if not torch.distributed.is_initialized():
        return rows
    gathered = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, rows)
    return torch.cat(gathered)
