"""Retrieval: the rank of what belongs to a caption among what belongs to others, by cosines of embeddings.

Cosines that agree up to rounding are equal, and what is equal counts in random order, on average.

Letters: N captions, D different ones, C candidates, E width of embeddings, B rows of a block.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.errors import NonFiniteError, ShapeError
from unclip.evaluation.intervals import Estimate, mean_of

ROUNDING = 1e-9
"""Cosines that differ by less are equal; far above the rounding of float64, far below the difference of two images."""
ROUNDING_FLOAT32 = 1e-6
NUM_CANDIDATES = 100
"""Captions among which an image's own caption is looked for. Source: Xu et al. 2018, section 4."""
_BLOCK = 128


def score_embeddings(sampled: Tensor, true: Tensor, ranks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Compare image embeddings sampled for captions with the embeddings of the captions' own images.

    Args:
        sampled: [N, E], one for each caption; any norm.
        true: [N, E], those of the captions' images; any norm.
        ranks: values of k for recall.

    Returns:
        `cosine`, the mean over pairs; `gap`, its margin over the mean of all mismatched pairs; `recall_at_<k>`, the share
        of sampled embeddings whose own image is among the k nearest of the N images. Images at equal distances count in
        random order, on average: embeddings that are all zeros have a recall of k / N.

    Raises:
        ShapeError: the shapes are not both [N, E], or N < 2.
        NonFiniteError: an embedding has NaN or infinite values.
    """
    return {name: estimate.value for name, estimate in match(sampled, true, ranks).items()}


def match(sampled: Tensor, true: Tensor, ranks: Sequence[int] = (1, 5, 10)) -> dict[str, Estimate]:
    """Compute `score_embeddings` with a score for each caption; the rows of `gap` are its margins. No N x N matrix is held."""
    if sampled.dim() != 2 or sampled.shape != true.shape or len(sampled) < 2:
        raise ShapeError(
            f"embeddings: got {tuple(sampled.shape)} and {tuple(true.shape)}, expected both [N, E] with N >= 2."
        )
    for name, given in (("sampled", sampled), ("true", true)):
        finite = given.isfinite().all(dim=1)  # [N]
        if not finite.all():
            raise NonFiniteError(
                f"embeddings: got {int((~finite).sum())} of {len(given)} {name} ones that are not finite, expected numbers. "
                "Train the model that made them again with a lower learning rate."
            )
    images, count = F.normalize(true.double(), dim=1), len(true)
    own, others, recalls = [], [], []
    for start in range(0, count, _BLOCK):
        cosines = F.normalize(sampled[start : start + _BLOCK].double(), dim=1) @ images.T  # [B, N]
        own.append(cosines.diagonal(start))
        others.append((cosines.sum(dim=1) - own[-1]) / (count - 1))
        recalls.append(_found(cosines, own[-1], ranks))  # [B, number of ranks]
    cosine = torch.cat(own)
    margin = cosine - torch.cat(others)
    recall = {f"recall_at_{rank}": mean_of(column) for rank, column in zip(ranks, torch.cat(recalls).T, strict=True)}
    return {"cosine": mean_of(cosine), "gap": mean_of(margin), **recall}


def _found(cosines: Tensor, own: Tensor, ranks: Sequence[int], rounding: float = ROUNDING) -> Tensor:
    """Probability [B, number of ranks] that the own one is among the first k of cosines [B, C], which include it."""
    margin = cosines - own[:, None]
    nearer = (margin > rounding).sum(dim=1)  # [B]
    tied = (margin.abs() <= rounding).sum(dim=1)  # [B], at least 1: its own
    return torch.stack([((rank - nearer) / tied).clamp(0, 1) for rank in ranks], dim=1)


def r_precision(captions: Sequence[str], image_embedding: Tensor, text_embedding: Tensor) -> Tensor | None:
    """Find for each image if its own caption is nearest among up to `NUM_CANDIDATES` different captions.

    The others are a seeded choice of the captions of the other images. An image that is as near to n captions as to its own
    scores 1 / (n + 1).

    Args:
        captions: N of them; equal ones are one candidate.
        image_embedding: [N, E], unit norm.
        text_embedding: [N, E], of the captions, unit norm.

    Returns:
        [N] in [0, 1]; None if all captions are equal.

    Source: Xu et al. 2018, section 4; with CLIP's embeddings, Park et al. 2021.
    """
    rows: dict[str, int] = {}
    number = torch.tensor([rows.setdefault(caption, len(rows)) for caption in captions])  # [N]
    if len(rows) < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    # Others are found at the same distances around a circle of the captions in random order.
    order = torch.randperm(len(rows), generator=generator)
    first = torch.full((len(rows),), len(captions)).scatter_reduce(0, number, torch.arange(len(captions)), "amin")
    candidates = torch.empty_like(text_embedding[: len(rows)]).index_copy(0, order, text_embedding[first])  # [D, E]
    steps = 1 + torch.randperm(len(rows) - 1, generator=generator)[: NUM_CANDIDATES - 1]
    around = torch.cat([torch.zeros(1, dtype=torch.int64), steps])  # [C], the own one first
    scores = []
    for start in range(0, len(captions), _BLOCK):
        chosen = (order[number[start : start + _BLOCK], None] + around) % len(rows)  # [B, C]
        cosines = (candidates[chosen] @ image_embedding[start : start + _BLOCK, :, None])[..., 0]  # [B, C]
        scores.append(_found(cosines, cosines[:, 0], (1,), ROUNDING_FLOAT32)[:, 0])
    return torch.cat(scores)
