"""Factorised codes on the unit sphere: ViT-VQGAN (arXiv 2110.04627), also known as VQGAN-FC."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vqzoo import Codebook, Plugin, hookimpl


class Sphere(Codebook):
    """Hold a table [K, D] ~ N(0, 1) whose rows of unit length are the codes, and the linear maps from and to the networks."""

    def __init__(self, size: int, width: int, dimension: int, normalize: bool):
        super().__init__(size, dimension, encoder_width=width, decoder_width=width)
        self.normalize = normalize
        self.enter, self.leave = nn.Linear(width, dimension), nn.Linear(dimension, width)
        self.table = nn.Parameter(torch.randn(size, dimension))

    def unit(self, vectors):
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    def from_encoder(self, features):
        return self.unit(self.enter(features))

    def to_decoder(self, codes):
        return self.leave(codes)

    def compute_vectors(self):
        return self.unit(self.table)

    def write(self, rows, vectors):
        """Overwrite rows by vectors, or by the points of the sphere that are nearest to them."""
        self.table[rows] = self.unit(vectors).to(self.table)

    def row_parameters(self):
        return (self.table,)


class Factorized(Plugin):
    """Factorised codes: search in few dimensions, on the unit sphere; for the rest, list it beside `vq` or another method.

    A linear map leads from the encoder's output to `dimension` channels, where latents and codes are scaled to unit length, so
    that squared distances are 2 - 2 cos; another map leads back. Everything between sees the sphere: search, losses,
    replacement. `normalize: false` leaves the lengths as they are. Where a stage freezes the encoder, the map from it,
    `codebook.enter.*`, is to be frozen with it.
    """

    @dataclass
    class Config:
        dimension: int = 8
        normalize: bool = True

        def __post_init__(self):
            if self.dimension < 1 + self.normalize:
                raise ValueError(f"dimension: {self.dimension!r} must be at least {1 + self.normalize}")

    @hookimpl
    def make_codebook(self, size, width):
        return Sphere(size, width, self.config.dimension, self.config.normalize)
