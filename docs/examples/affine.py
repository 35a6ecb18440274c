"""make_codebook: a table whose codes share one scale and one shift (after arXiv 2305.08842)."""

import torch
from torch import nn

from vqzoo import Codebook, Plugin, hookimpl


class AffineTable(Codebook):
    """Hold a table [K, D] ~ N(0, 1) and the scale and shift [D] that all its codes share, so that none is left behind."""

    def __init__(self, size, width):
        super().__init__(size, width)
        self.table = nn.Parameter(torch.randn(size, width))
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def compute_vectors(self):
        return self.shift + self.scale * self.table

    def write(self, rows, vectors):
        self.table[rows] = (vectors - self.shift) / self.scale

    def row_parameters(self):
        return (self.table,)


class Affine(Plugin):
    """Affine codebook: all codes share a scale and a shift, and follow the encoder together."""

    @hookimpl
    def make_codebook(self, size, width):
        return AffineTable(size, width)
