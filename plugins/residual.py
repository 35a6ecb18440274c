"""Residual quantization: RQ-VAE (arXiv 2203.01941) and, with a table for each level, SoundStream's (arXiv 2107.03312)."""

from dataclasses import dataclass

import torch

from vqzoo import Plugin, Quantized, Table, check_weights, hookimpl
from vqzoo.ops import embedding_losses, nearest_codes, straight_through


class ResidualTable(Table):
    """Hold one table for all levels, or one for each; what `depth` indices name is the sum of their codes."""

    def __init__(self, size: int, width: int, depth: int, shared: bool):
        super().__init__(size, width, tables=1 if shared else depth)
        self.depth = depth

    def levels(self):
        """Return the codes [K, D] of each level."""
        return self.vectors().split(self.size) * (self.depth // self.tables)

    def terms(self, indices):
        """Return the codes [..., Q, D] that indices [..., Q] name."""
        if indices.shape[-1] != self.depth:
            raise ValueError(f"indices {list(indices.shape)} must be [..., {self.depth}]: a token has a code of each level")
        return self.vectors()[self.rows_of(indices)]

    def lookup(self, indices):
        return total(self.terms(indices))


class Residual(Plugin):
    """Residual VQ: each of `depth` codes per token stands for what the sum of those before it leaves; fine detail, few codes.

    All levels share one table as in RQ-VAE, or `shared: false` gives each its own of K codes. The commitment is the mean over
    levels of the mean squared error between latents and the sum so far. So is the codebook loss, in which the levels before
    stand still: each code moves to the residuals that chose it. (RQ-VAE moves its table by a moving average.) Later levels see
    small residuals, and their codes die unless they start from data (`kmeans`) or are replaced (`nsvq`, without its loss).
    """

    @dataclass
    class Config:
        depth: int = 4
        shared: bool = True
        codebook_weight: float = 1.0
        commitment_weight: float = 0.25

        def __post_init__(self):
            check_weights(self, "codebook_weight", "commitment_weight")
            if self.depth < 1:
                raise ValueError(f"depth: {self.depth!r} must be at least 1")

    def companions(self):
        return {"quantize": ("make_codebook",), "embedding_loss": ("quantize",)}

    @hookimpl
    def make_codebook(self, size, width):
        return ResidualTable(size, width, self.config.depth, self.config.shared)

    @hookimpl
    def quantize(self, latents, codebook):
        residuals, found = latents.detach().flatten(0, 1), []
        for vectors in codebook.levels():
            found.append(nearest_codes(residuals, vectors)[0])
            residuals = residuals - vectors[found[-1]].detach()
        indices = torch.stack(found, 1).unflatten(0, latents.shape[:2])
        terms = codebook.terms(indices)
        return Quantized(total(terms), indices, {"terms": terms})

    @hookimpl
    def straight_through(self, latents, codes):
        return straight_through(latents, codes)

    @hookimpl
    def embedding_loss(self, latents, extras):
        terms = extras["terms"]
        sums = terms.cumsum(2).detach() + (terms - terms.detach())  # each level's with a gradient for its own code alone
        latents = latents.unsqueeze(2).expand_as(sums)
        return embedding_losses(latents, sums, self.config.codebook_weight, self.config.commitment_weight)


def total(terms):
    """Return the sum [..., D] of codes [..., Q, D], added level by level, so that its bits are the same wherever it is made."""
    return sum(terms.unbind(-2))
