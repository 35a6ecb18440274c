"""Pixel losses: mean absolute and mean squared error of the reconstruction."""

from dataclasses import dataclass

import torch.nn.functional as F

from vqzoo import Plugin, check_weights, hookimpl


class Pixel(Plugin):
    """Pixel loss: weighted L1 and L2 between images and reconstructions, means over all elements."""

    @dataclass
    class Config:
        l1: float = 1.0
        l2: float = 0.0

        def __post_init__(self):
            check_weights(self, "l1", "l2")
            if not self.l1 + self.l2:
                raise ValueError(f"l1: {self.l1!r} with l2: {self.l2!r} leaves no loss; one of them must be positive")

    def loss_names(self):
        return tuple(name for name, weight in (("l1", self.config.l1), ("l2", self.config.l2)) if weight)

    @hookimpl
    def reconstruction_loss(self, images, reconstructions):
        losses = {}
        if self.config.l1:
            losses["l1"] = self.config.l1 * F.l1_loss(reconstructions, images)
        if self.config.l2:
            losses["l2"] = self.config.l2 * F.mse_loss(reconstructions, images)
        return losses
