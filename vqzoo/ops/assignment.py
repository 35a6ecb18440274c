"""Soft assignments p = softmax_k(-|z - c_k|² / temperature), as statistics of them and not as a matrix."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqzoo.ops.backends import check_widths, exact_float32

ROWS = 2**23
"""Floats of latents x codes at a time, in each of about four buffers."""


def soft_assignments(latents: Tensor, vectors: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the mean over latents [M, D] of their assignment's entropy in nats, 0-dim, and their mean assignment [K].

    Both carry gradients to latents and `vectors` [K, D]; K·M scores are computed twice and never kept. The batch's own
    entropy is that of the mean assignment, which a plugin averages over processes first (`all_reduce_sum`).
    """
    check_widths(latents, vectors)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if not len(latents):
        raise ValueError("no latents [0, D] have no mean assignment")
    return _SoftAssignments.apply(latents, vectors, float(temperature))


class _SoftAssignments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latents: Tensor, vectors: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(latents, vectors)
        ctx.temperature = temperature
        entropy, mean = vectors.new_zeros((), dtype=torch.float64), vectors.new_zeros(len(vectors), dtype=torch.float32)
        with exact_float32(latents.device):
            for _, _, logs in _tiles(latents, vectors, temperature):
                shares = logs.exp()
                entropy -= _products(shares, logs).sum(dtype=torch.float64)
                mean += shares.sum(0)
        return (entropy / len(latents)).float(), mean / len(latents)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_entropy: Tensor, of_mean: Tensor):
        latents, vectors = ctx.saved_tensors
        to_latents, to_vectors = torch.zeros_like(latents, dtype=torch.float32), torch.zeros_like(vectors, dtype=torch.float32)
        with exact_float32(latents.device):
            middle = vectors.float().mean(0)
            for rows, tile, logs in _tiles(latents, vectors, ctx.temperature):
                shares = logs.exp()
                wanted = of_mean - of_entropy * logs.clamp_(min=torch.finfo(torch.float32).min)  # less a constant
                pulls = shares * (wanted - _products(shares, wanted)[:, None])
                to_latents[rows] = pulls @ (vectors.float() - middle)
                to_vectors += pulls.t() @ tile - (vectors.float() - middle) * pulls.sum(0)[:, None]
        scale = 2 / (ctx.temperature * len(latents))
        return (to_latents * scale).to(latents.dtype), (to_vectors * scale).to(vectors.dtype), None


def _tiles(latents: Tensor, vectors: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield which rows a tile of latents [n, D] holds, the tile, centred as the codes are, and its log assignments [n, K]."""
    vectors = vectors.float()
    middle = vectors.mean(0)
    codes = vectors - middle
    bias, size = codes.square().sum(1) / -temperature, max(1, ROWS // len(vectors))
    for start in range(0, len(latents), size):
        rows = slice(start, start + size)
        tile = latents[rows].float() - middle
        yield rows, tile, torch.addmm(bias, tile, codes.t(), alpha=2 / temperature).log_softmax(1)


def _products(shares: Tensor, values: Tensor) -> Tensor:
    """Return Σ_k shares · values [n]; a share of zero counts for nothing, whatever its logarithm."""
    return torch.where(shares > 0, shares * values, 0).sum(1)
