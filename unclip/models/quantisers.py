"""Bottlenecks of autoencoders: a diagonal Gaussian, the nearest of K learned vectors, and the Gumbel-softmax over K vectors.

Sources: Kingma & Welling 2014, "Auto-Encoding Variational Bayes"; van den Oord et al. 2017, "Neural Discrete Representation
Learning"; Jang et al. 2017, "Categorical Reparameterization with Gumbel-Softmax".

Everything here is computed in float32, whatever the precision of the networks, as codes and divergences depend on small
differences. Letters: B batch, D latent channels, s latent size, K codes, N = B s s vectors.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.models.layers import without_autocast

LOG_VARIANCES = (-30.0, 20.0)
"""Range of the log-variances of the posterior, as in the published networks."""


class Squeezed(NamedTuple):
    """Encodings after a bottleneck."""

    latents: Tensor
    """[B, D, s, s] float32, input of the decoder."""
    penalty: Tensor
    """[B] float32; see the bottleneck."""
    encodings: Tensor
    """[B, D, s, s] float32; see `Reconstruction`."""
    codes: Tensor | None = None
    """[B, s * s] int64, row by row; None without a codebook."""
    errors: Tensor | None = None
    """[B, s * s] float32, detached: squared distance of each encoding to its code (vq); None of the others."""


class KlBottleneck(nn.Module):
    """Diagonal Gaussian. Its penalty is the KL divergence from the standard normal, in nats, summed over an image's latents.

    Source: Kingma & Welling 2014, appendix B.
    """

    def forward(self, moments: Tensor, noise: Tensor | None = None, temperature: float = 1.0) -> Squeezed:
        """Args:
        moments: [B, 2 D, s, s], means and log-variances.
        noise: [B, D, s, s] standard normal; None gives the mean.
        temperature: not used.
        """
        mean, log_variance = moments.float().chunk(2, dim=1)  # 2 x [B, D, s, s]
        log_variance = log_variance.clamp(*LOG_VARIANCES)
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3))  # [B]
        latents = mean if noise is None else torch.addcmul(mean, (0.5 * log_variance).exp(), noise)
        return Squeezed(latents, divergence, mean)


class VectorQuantiser(nn.Module):
    """Nearest code, with gradients straight through. Its penalty is the codebook loss plus `commitment_weight` times the
    commitment loss, each a mean square over an image's latents.

    Source: van den Oord et al. 2017, eq. 3.
    """

    def __init__(self, num_codes: int, dim: int, commitment_weight: float = 0.25) -> None:
        super().__init__()
        self.commitment_weight = commitment_weight
        """Beta."""
        self.codebook = nn.Parameter(torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes))  # [K, D]

    def forward(self, encodings: Tensor, noise: Tensor | None = None, temperature: float = 1.0) -> Squeezed:
        """Args:
        encodings: [B, D, s, s].
        noise, temperature: not used.
        """
        encodings = encodings.float()
        batch, depth, height, width = encodings.shape
        rows = encodings.permute(0, 2, 3, 1).reshape(-1, depth)  # [N, D]
        codes = nearest_codes(rows.detach(), self.codebook.detach())  # [N]
        chosen = F.embedding(codes, self.codebook).view(batch, height, width, depth).permute(0, 3, 1, 2)  # [B, D, s, s]
        squares = (chosen.detach() - encodings).square()  # [B, D, s, s]
        penalty = self.commitment_weight * squares.mean(dim=(1, 2, 3))  # [B]
        if self.codebook.requires_grad:  # otherwise the codes follow the encodings in another way
            penalty = penalty + (chosen - encodings.detach()).square().mean(dim=(1, 2, 3))
        latents: Tensor = _StraightThrough.apply(chosen, encodings)
        errors = squares.detach().sum(dim=1).flatten(1)  # [B, ss]
        return Squeezed(latents, penalty, encodings, codes.view(batch, -1), errors)

    def vectors(self, codes: Tensor) -> Tensor:
        """Vectors [..., D] of codes [...]."""
        return F.embedding(codes, self.codebook)


class _StraightThrough(torch.autograd.Function):
    """The first argument, with its gradient given to the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, receiver: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def nearest_codes(rows: Tensor, codebook: Tensor) -> Tensor:
    """Index [N] int64 of the code [K, D] nearest to each row [N, D], both float32; of equally near ones, the first.

    One matrix product and one pass over its result: |row|^2 is the same for all codes, so it is left out.
    """
    with without_autocast(rows.device):
        half_square = codebook.square().sum(dim=1) / 2  # [K]
        return torch.addmm(half_square, rows, codebook.T, alpha=-1).argmin(dim=1)


class GumbelQuantiser(nn.Module):
    """Relaxed choice of a code. Its penalty is the KL divergence of the codes' distribution from the uniform one, in nats,
    summed over an image's positions.

    Source: Ramesh et al. 2021, section 2.1 and appendix A.2; Jang et al. 2017, eq. 2.
    """

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(num_codes, dim))  # [K, D]

    def forward(self, logits: Tensor, noise: Tensor | None = None, temperature: float = 1.0) -> Squeezed:
        """Args:
        logits: [B, K, s, s].
        noise: [B, K, s, s] standard Gumbel; None takes the likeliest code.
        temperature: of the relaxation; towards 0, it is a choice of one code.
        """
        logits = logits.float()
        batch, num_codes, height, width = logits.shape
        log_probabilities = logits.log_softmax(dim=1)
        divergence = (log_probabilities.exp() * (log_probabilities + math.log(num_codes))).sum(dim=(1, 2, 3))  # [B]
        codes = logits.argmax(dim=1)  # [B, s, s]
        likeliest = self.vectors(codes).permute(0, 3, 1, 2)  # [B, D, s, s]
        latents = likeliest
        if noise is not None:
            weights = ((logits + noise) / temperature).softmax(dim=1)  # [B, K, s, s]
            with without_autocast(logits.device):
                mixed = weights.permute(0, 2, 3, 1).reshape(-1, num_codes) @ self.codebook  # [N, D]
            latents = mixed.view(batch, height, width, -1).permute(0, 3, 1, 2)
        return Squeezed(latents, divergence, likeliest, codes.flatten(1))

    def vectors(self, codes: Tensor) -> Tensor:
        """Vectors [..., D] of codes [...]."""
        return F.embedding(codes, self.codebook)
