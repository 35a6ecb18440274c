"""A plain plugin that serves whatever the plugin under test leaves open."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from vqzoo.codebook import Table
from vqzoo.ops import discriminator_loss, embedding_losses, nearest_codes, straight_through
from vqzoo.plugin import Plugin, Quantized, hookimpl

REFERENCE = "suite_reference"
"""The name under which the reference takes part."""


class Reference(Plugin):
    """Reference: a table of codes, the nearest one, squared errors, and a discriminator of one convolution; yields always."""

    @dataclass
    class Config:
        height: int = 32
        width: int = 48

    @hookimpl(trylast=True)
    def make_codebook(self, size, width):
        return Table(size, width, "normal")

    @hookimpl(trylast=True)
    def quantize(self, latents, codebook):
        indices = nearest_codes(latents.flatten(0, 1), codebook.vectors())[0].view(latents.shape[:2])
        return Quantized(codebook.lookup(indices), indices)

    @hookimpl(trylast=True)
    def straight_through(self, latents, codes):
        return straight_through(latents, codes)

    @hookimpl(trylast=True)
    def embedding_loss(self, latents, codes):
        return embedding_losses(latents, codes, 1.0, 0.25)

    @hookimpl(trylast=True)
    def reconstruction_loss(self, images, reconstructions):
        return {REFERENCE: (images - reconstructions).square().mean()}

    @hookimpl(trylast=True)
    def make_discriminator(self):
        return nn.Conv2d(3, 1, 4, stride=4)

    @hookimpl(trylast=True)
    def discriminator_loss(self, images, reconstructions, discriminator):
        return {f"{REFERENCE}_judge": discriminator_loss("hinge", discriminator(images), discriminator(reconstructions))}

    @hookimpl(trylast=True)
    def make_dataset(self, split):
        first = {"train": 0, "val": 1000}[split]
        return [picture(first + number, self.config.height, self.config.width) for number in range(8)]


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Return a smooth picture that a seed alone decides."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def pictures(count: int, height: int, width: int, first: int = 0) -> torch.Tensor:
    """Return `count` such pictures as images [count, 3, height, width] in [-1, 1]."""
    levels = np.stack([np.asarray(picture(first + number, height, width)) for number in range(count)])
    return torch.from_numpy(levels).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)
