"""reconstruction_loss: a loss on images, beside those of other plugins."""

from dataclasses import dataclass

import torch.nn.functional as F

from vqzoo import Plugin, check_weights, hookimpl


class Edges(Plugin):
    """Edge loss: weighted L1 between the differences of neighbouring pixels."""

    @dataclass
    class Config:
        weight: float = 1.0

        def __post_init__(self):
            check_weights(self, "weight")

    def loss_names(self):
        return ("edges",)

    @hookimpl
    def reconstruction_loss(self, images, reconstructions):
        errors = sum(F.l1_loss(reconstructions.diff(dim=dim), images.diff(dim=dim)) for dim in (2, 3))
        return {"edges": self.config.weight * errors}
