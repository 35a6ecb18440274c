"""How a codebook is used: counts, perplexity and share of codes hit."""

import torch
from torch import Tensor


def code_usage(indices: Tensor, size: int) -> Tensor:
    """Count how often each of `size` codes occurs in integer `indices` of any shape: [K] int64.

    Raises ValueError for an index outside 0..size-1; on an accelerator, where looking would wait for the device, the
    device itself asserts.
    """
    flat = indices.detach().reshape(-1).long()
    if flat.device.type == "cpu" and len(flat):
        low, high = flat.aminmax()
        if low < 0 or high >= size:
            raise ValueError(f"indices {int(low)}..{int(high)} are outside a codebook of size {size}")
    counts = torch.zeros(size, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))


def code_sums(latents: Tensor, indices: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the sum of the latents [M, D] that chose each code, [K, D] float32, and how many did [K], from `indices` [M].

    What k-means and moving averages need; no one-hot matrix is built. Sums over a GPU's threads come in any order.
    """
    sums = torch.zeros(size, latents.shape[1], device=latents.device)
    return sums.index_add_(0, indices, latents.detach().float()), code_usage(indices, size)


def perplexity(counts: Tensor) -> Tensor:
    """Return exp(-Σ p log p) of the shares p of `counts` [K]: 1 to K, or 0 where nothing was counted."""
    total = counts.sum()
    shares = counts / total
    return torch.where(total > 0, torch.special.entr(shares).sum().exp(), 0.0)


def usage(counts: Tensor) -> Tensor:
    """Return the share of codes that were hit at least once, from `counts` [K]: 0 to 1."""
    return (counts > 0).float().mean()
