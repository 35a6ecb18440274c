"""make_dataset: images that are in no folder."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from vqzoo import Plugin, hookimpl


class Stripes(Plugin):
    """Stripes: waves of every direction, length and colour, drawn when they are asked for."""

    @dataclass
    class Config:
        images: int = 1000
        side: int = 96

        def __post_init__(self):
            for name in ("images", "side"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name}: {getattr(self, name)!r} must be at least 1")

    @hookimpl
    def make_dataset(self, split):
        return Waves(self.config.images, self.config.side, split)


class Waves:
    """Hold the pictures of a split; each is made from its number alone, so that it is the same in each run."""

    def __init__(self, images, side, split):
        self.images, self.side, self.split = images, side, split

    def __len__(self):
        return self.images

    def __getitem__(self, index):
        rng = np.random.default_rng([index, len(self.split)])
        rows, columns = np.mgrid[: self.side, : self.side] / self.side
        angle, frequency = rng.uniform(0, np.pi), rng.uniform(1, 12)
        wave = np.sin(2 * np.pi * frequency * (rows * np.sin(angle) + columns * np.cos(angle)))
        return Image.fromarray((127.5 + 127.5 * wave[..., None] * rng.uniform(-1, 1, 3)).astype(np.uint8))

    def name(self, index):
        return f"{self.split} wave {index}"
