"""make_discriminator and discriminator_loss: an adversary of one's own, and what the tokenizer gets of it."""

from dataclasses import dataclass

from torch import nn

from vqzoo import Plugin, check_weights, hookimpl
from vqzoo.ops import discriminator_loss, generator_loss


class Judge(Plugin):
    """Judge: a small convolutional discriminator with a hinge loss, on squares of 8x8 pixels."""

    @dataclass
    class Config:
        weight: float = 0.1
        start: int = 0

        def __post_init__(self):
            check_weights(self, "weight", "start")

    def loss_names(self):
        return ("judge_generator", "judge")

    @hookimpl
    def make_discriminator(self):
        return nn.Sequential(nn.Conv2d(3, 32, 8, stride=4), nn.LeakyReLU(0.2), nn.Conv2d(32, 1, 1))

    @hookimpl
    def discriminator_loss(self, images, reconstructions, discriminator):
        return {"judge": discriminator_loss("hinge", discriminator(images), discriminator(reconstructions))}

    @hookimpl(wrapper=True)
    def reconstruction_loss(self, reconstructions, discriminator, progress):
        losses = yield
        if progress.step < self.config.start:
            return losses
        return [*losses, {"judge_generator": self.config.weight * generator_loss("hinge", discriminator(reconstructions))}]
