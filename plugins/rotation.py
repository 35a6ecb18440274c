"""The rotation trick (arXiv 2410.06424): gradients pass the codebook as if each latent had been rotated onto its code."""

import torch

from vqzoo import Plugin, hookimpl

LEAST, SMALLEST_SUM = 1e-6, 1e-4
"""Lengths below which a vector has no direction, and below which two unit vectors count as opposite."""


class Rotation(Plugin):
    """Rotation trick: a straight-through estimator whose gradient turns and scales as the latent must to become its code.

    The decoder sees the code q itself; of its gradient g the latent e gets |q|/|e| · Rᵀ g, where R = I - 2 r rᵀ + 2 q̂ êᵀ,
    with r the direction of ê + q̂, rotates ê onto q̂. A zero vector has no direction: there it is the plain estimator. Of
    opposite vectors r is undefined, and its term is left out: R is then the reflection that takes ê to q̂. List it beside
    `vq`, or route `straight_through` to it.
    """

    @hookimpl
    def straight_through(self, latents, codes):
        codes = codes.detach()
        turned = turn(latents, codes)
        return codes + (turned - turned.detach())


def turn(latents, codes):
    """Return |q|/|e| · R e of latents e [..., D] and codes q [..., D]; R and the scale are constants to the gradient."""
    with torch.no_grad():
        lengths, wanted = latents.norm(dim=-1, keepdim=True), codes.norm(dim=-1, keepdim=True)
        sources, targets = latents / lengths.clamp(min=LEAST), codes / wanted.clamp(min=LEAST)
        middles = sources + targets
        sizes = middles.norm(dim=-1, keepdim=True)
        middles = torch.where(sizes > SMALLEST_SUM, middles / sizes, 0)
        scales = wanted / lengths.clamp(min=LEAST)
        directed = (lengths > LEAST) & (wanted > LEAST)
    turned = latents - 2 * middles * dot(middles, latents) + 2 * targets * dot(sources, latents)
    return torch.where(directed, scales * turned, latents)


def dot(one, other):
    """Return the inner products [..., 1] of vectors [..., D]."""
    return (one * other).sum(-1, keepdim=True)
