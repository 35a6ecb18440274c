"""The dense loss that lets every code follow a moving encoder, without the matrix of all weights."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqzoo.ops.nearest import check_widths, exact_float32

# Floats in one of the two buffers of rows x codes: near a cache's size on a CPU, many rows per launch on a GPU.
BUDGETS = {"cpu": 2**21, "cuda": 2**25}

# Vectorised exp slows down several times where it underflows, and products of denormals slow the matrix product after
# it: stop just before and write zeros instead.
LOWEST_EXPONENT = -80.0
LOWEST_WEIGHT = 2e-35  # just above exp(LOWEST_EXPONENT)


def nonstationary_loss(latents: Tensor, vectors: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """Return how far the codes that latents [M, D] did not choose are from them, weighted by nearness: a 0-dim loss.

    1/(M·D) Σ_i Σ_{j≠q_i} p_ij d_ij with d_ij = |z_i - c_j|² and p = softmax_j(-d_ij / temperature), a constant, over all
    of `vectors` [K, D]; `indices` [M] holds the winners q, whose share of p is dropped and not redistributed. The
    gradient goes to `vectors` alone. The mean is over this process. Source: NSVQ, arXiv 2606.11363, eq. 9 and 10.
    """
    check_widths(latents, vectors)
    if indices.shape != latents.shape[:1]:
        raise ValueError(f"indices must be [M] = [{len(latents)}], not {list(indices.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if not torch.is_grad_enabled():
        vectors = vectors.detach()  # autograd.Function would report that a gradient is needed
    return _Nonstationary.apply(vectors, latents.detach(), indices.detach(), temperature)


class _Nonstationary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vectors: Tensor, latents: Tensor, indices: Tensor, temperature: float) -> Tensor:
        with exact_float32(latents.device):
            loss, gradient = _stream(latents, vectors.float(), indices, temperature, ctx.needs_input_grad[0])
        if gradient is not None:
            ctx.save_for_backward(gradient.to(vectors.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None, None


def _stream(latents: Tensor, vectors: Tensor, indices: Tensor, temperature: float, differentiate: bool):
    """Return the loss [] and, if asked for, its gradient to vectors [K, D], one chunk of latents at a time.

    With P the weights p without the winners': gradient = 2/(M·D) (diag(Pᵀ1) C - Pᵀ Z).
    """
    (count, width), size = latents.shape, len(vectors)
    mean = vectors.mean(0)
    centred = vectors - mean  # distances are the same, and keep more digits
    norms = centred.square().sum(1)
    masses, pulls = centred.new_zeros(size), torch.zeros_like(centred) if differentiate else None
    budget = BUDGETS.get(latents.device.type, BUDGETS["cpu"])
    rows = max(1, min(count, budget // size))
    buffers = centred.new_empty(2, rows, size)
    losses = []
    for tile, winners in zip(latents.split(rows), indices.split(rows), strict=True):
        tile = tile.float() - mean
        scores, weights = buffers[:, : len(tile)]
        torch.addmm(norms, tile, centred.t(), alpha=-2, out=scores)
        loss, total = _weigh(scores, weights, tile.square().sum(1), winners, temperature)
        losses.append(loss)
        if differentiate:
            masses.addmv_(weights.t(), 1 / total)
            pulls.addmm_(weights.t(), tile / total[:, None])
    elements = max(1, count * width)
    loss = torch.cat(losses).sum() / elements
    return loss, (centred * masses[:, None]).sub_(pulls).mul_(2 / elements) if differentiate else None


def _weigh(scores: Tensor, weights: Tensor, squares: Tensor, winners: Tensor, temperature: float):
    """Fill `weights` [n, K] with softmax numerators, zero for winners; return losses [n] and denominators [n].

    `scores` [n, K], which is overwritten, holds |c|² - 2 z·c and `squares` [n] the missing |z|².
    """
    lowest = scores.amin(1)
    scores.sub_(lowest[:, None])
    torch.mul(scores, -1 / temperature, out=weights).clamp_(min=LOWEST_EXPONENT).exp_()
    torch.threshold_(weights, LOWEST_WEIGHT, 0.0)
    winners = winners[:, None].long()
    own = weights.gather(1, winners)[:, 0]
    others = weights.scatter_(1, winners, 0.0).sum(1)  # not 1 - p of the winner, which cancels
    total = others + own
    nearest = (lowest + squares).clamp_(min=0)
    return (scores.mul_(weights).sum(1) + nearest * others) / total, total
