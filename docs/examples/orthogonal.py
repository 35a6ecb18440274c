"""embedding_loss: a term beside those of whoever serves the hook, by a wrapper."""

from dataclasses import dataclass

import torch.nn.functional as F

from vqzoo import Plugin, check_weights, hookimpl


class Orthogonal(Plugin):
    """Orthogonal codes: weight times the mean squared cosine of all pairs of codes; wraps anyone's embedding loss."""

    @dataclass
    class Config:
        weight: float = 0.1

        def __post_init__(self):
            check_weights(self, "weight")

    @hookimpl(wrapper=True)
    def embedding_loss(self, codebook):
        losses = yield
        directions = F.normalize(codebook.vectors(), dim=1)
        products = directions.T @ directions  # [D, D], whose squares add up to those of all K·K cosines
        return {**losses, "orthogonal": self.config.weight * products.square().sum() / len(directions) ** 2}
