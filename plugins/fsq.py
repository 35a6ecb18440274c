"""Finite scalar quantization (arXiv 2309.15505): a few bounded channels, each rounded to a few levels; nothing is learned."""

from dataclasses import dataclass, field
from math import log, prod

import torch
from torch import nn

from vqzoo import Codebook, Plugin, Quantized, hookimpl
from vqzoo.ops import straight_through

MARGIN = 1e-3
"""The share by which the bound exceeds the outermost levels, so that rounding reaches them."""

RECOMMENDED = ([8, 6, 5], [8, 5, 5, 5], [7, 5, 5, 5, 5], [8, 8, 8, 6, 5], [8, 8, 8, 5, 5, 5])


class Grid(Codebook):
    """Compute the codes (n - s) / s, n in 0 … L - 1 in each channel, and lead there by a linear map and a bound, and back.

    s is ⌊L/2⌋, or (L - 1)/2 if `symmetric`, which differs for an even L alone. The first channel has an index's lowest digit.
    """

    replaceable = False

    def __init__(self, size: int, width: int, levels: list[int], symmetric: bool):
        super().__init__(size, len(levels), encoder_width=width, decoder_width=width)
        project = width != len(levels)
        self.enter = nn.Linear(width, len(levels)) if project else nn.Identity()
        self.leave = nn.Linear(len(levels), width) if project else nn.Identity()
        self.register_buffer("levels", torch.tensor(levels))
        last = self.levels - 1
        self.register_buffer("scale", last / 2 if symmetric else (self.levels // 2).float())
        half = last / 2 if symmetric else last * (1 + MARGIN) / 2
        off = half.new_zeros(len(levels)) if symmetric else (1 - self.levels % 2) / 2
        for name, value in (("shift", (off / half).atanh()), ("gain", half / self.scale), ("drop", off / self.scale)):
            self.register_buffer(name, value, persistent=False)

    def from_encoder(self, features):
        return (self.enter(features) + self.shift).tanh() * self.gain - self.drop

    def to_decoder(self, codes):
        return self.leave(codes)

    @property
    def places(self):
        """What one step of each channel's n counts in an index."""
        return self.levels.cumprod(0) // self.levels

    def nearest(self, latents):
        """Return the indices [...] of the codes nearest to latents [..., D]."""
        digits = (latents.detach() * self.scale + self.scale).round().long()
        return (digits.clamp(min=0).minimum(self.levels - 1) * self.places).sum(-1)

    def lookup(self, indices):
        digits = indices[..., None] // self.places % self.levels
        return (digits - self.scale) / self.scale

    def compute_vectors(self):
        return self.lookup(torch.arange(self.size, device=self.levels.device))


class FSQ(Plugin):
    """FSQ: bounds few channels and rounds each to its number of levels; no losses, no search, no dead codes to revive.

    Each of `levels` is one channel, and their product is the recipe's codebook.size; linear maps, `codebook.enter` and `leave`,
    lead from codebook.width there and back, unless that is their number. A channel of L levels is b(z)/⌊L/2⌋ rounded to whole
    b, where b(z) = tanh(z + shift) · half - off, whose slope the gradient keeps; an even L has a level more below zero than
    above. `symmetric` is the variant of arXiv 2411.19842, tanh z rounded to L levels from -1 to 1, the only one for L = 2.
    """

    @dataclass
    class Config:
        levels: list[int] = field(default_factory=lambda: [8, 5, 5, 5])
        symmetric: bool = False

        def __post_init__(self):
            least = 2 if self.symmetric else 3
            if not self.levels or min(self.levels) < least:
                way = "" if self.symmetric else ", or 2 if symmetric: true"
                raise ValueError(f"levels: {list(self.levels)} must be channels of at least {least} levels each{way}")

    def companions(self):
        return {"quantize": ("make_codebook",)}

    @hookimpl
    def make_codebook(self, size, width):
        levels = list(self.config.levels)
        if prod(levels) != size:
            near = min(RECOMMENDED, key=lambda some: abs(log(prod(some) / size)))
            raise ValueError(f"size {size} is not the product of plugins.fsq.levels {levels}, which is {prod(levels)}; "
                             f"set codebook.size={prod(levels)}, or other levels: near {size} the recommended ones are {near}, "
                             f"with codebook.size={prod(near)}")
        return Grid(size, width, levels, self.config.symmetric)

    @hookimpl
    def quantize(self, latents, codebook):
        indices = codebook.nearest(latents)
        return Quantized(codebook.lookup(indices), indices)

    @hookimpl
    def straight_through(self, latents, codes):
        return straight_through(latents, codes)

    @hookimpl
    def embedding_loss(self):
        return {}
