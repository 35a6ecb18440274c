"""The plain straight-through estimator and the two plain embedding losses, shared by every method that uses them."""

import torch.nn.functional as F
from torch import Tensor


def straight_through(latents: Tensor, codes: Tensor) -> Tensor:
    """Return the value of codes [...] with the identity as its gradient to latents [...]; a ValueError if shapes differ."""
    _check_shapes(latents, codes)
    return latents + (codes - latents).detach()


def embedding_losses(latents: Tensor, codes: Tensor, codebook_weight: float, commitment_weight: float) -> dict:
    """Return the weighted mean squared errors "codebook" (moves the codes) and "commitment" (moves the latents).

    Means are over all elements. A term is absent where it would move nothing: its weight is 0, or its side needs no gradient.
    Each side has a weight of its own, so that no flag decides on which of them a β sits (VQ-VAE, eq. 3).
    Raises ValueError if shapes differ.
    """
    _check_shapes(latents, codes)
    losses = {}
    if codebook_weight and codes.requires_grad:
        losses["codebook"] = codebook_weight * F.mse_loss(codes, latents.detach())
    if commitment_weight and latents.requires_grad:
        losses["commitment"] = commitment_weight * F.mse_loss(latents, codes.detach())
    return losses


def _check_shapes(latents: Tensor, codes: Tensor) -> None:
    if latents.shape != codes.shape:
        raise ValueError(f"latents {list(latents.shape)} and codes {list(codes.shape)} must have one shape; where codes have a "
                         "width of their own, the codebook's from_encoder leads latents there")
