"""SimVQ (arXiv 2411.02038): every code is a learned linear image of a frozen random vector."""

from dataclasses import dataclass

import torch
from torch import nn

from vqzoo import Codebook, Plugin, Quantized, check_weights, hookimpl
from vqzoo.ops import embedding_losses, nearest_codes, straight_through


class LinearCodebook(Codebook):
    """Hold a constant table [K, D] ~ N(0, 1/D) and the linear map, with bias, that turns it into the codes."""

    def __init__(self, size: int, width: int):
        super().__init__(size, width)
        self.register_buffer("table", torch.randn(size, width) * width**-0.5)
        self.linear = nn.Linear(width, width)

    def compute_vectors(self):
        return self.linear(self.table)

    def write(self, rows, vectors):
        """Solve for the table's rows whose image is nearest to the wanted vectors."""
        wanted = (vectors - self.linear.bias).double()
        solution = torch.linalg.lstsq(self.linear.weight.double().cpu(), wanted.T.cpu()).solution
        self.table[rows] = solution.T.to(self.table)


class SimVQ(Plugin):
    """SimVQ: one linear map moves the whole codebook whichever code wins, so no code is left behind."""

    @dataclass
    class Config:
        codebook_weight: float = 1.0
        commitment_weight: float = 0.25

        def __post_init__(self):
            check_weights(self, "codebook_weight", "commitment_weight")

    @hookimpl
    def make_codebook(self, size, width):
        return LinearCodebook(size, width)

    @hookimpl
    def quantize(self, latents, codebook):
        indices, _ = nearest_codes(latents.flatten(0, 1), codebook.vectors())
        indices = indices.view(latents.shape[:2])
        return Quantized(codebook.lookup(indices), indices)

    @hookimpl
    def straight_through(self, latents, codes):
        return straight_through(latents, codes)

    @hookimpl
    def embedding_loss(self, latents, codes):
        return embedding_losses(latents, codes, self.config.codebook_weight, self.config.commitment_weight)
