"""The pictures that a run shows: held-out images, what the tokenizer makes of them, and what it made before a loss joined."""

import torch
from torch import Tensor

from vqzoo.monitor import Monitor, panel
from vqzoo.sharding import whole
from vqzoo.tokenizer import Tokenizer


class Pictures:
    """Show the reconstructions of images [B, 3, H, W]; `before` holds those from before each loss joined, by its name."""

    def __init__(self, images: Tensor):
        self.images = images
        self.before: dict[str, Tensor] = {}

    def take(self, before: dict[str, Tensor]) -> None:
        """Take what a checkpoint held, as far as it is of as many images."""
        self.before = {name: x for name, x in before.items() if x.shape == self.images.shape}

    def forget_all_but(self, names: list[str]) -> None:
        """Let go of what was before other losses."""
        self.before = {name: picture for name, picture in self.before.items() if name in names}

    def keep_before(self, names: list[str], tokenizer: Tokenizer) -> None:
        """Keep the pictures as they are now, when losses join."""
        now = self.reconstructions(tokenizer)
        self.before |= dict.fromkeys(names, now)

    @torch.no_grad()
    def reconstructions(self, tokenizer: Tokenizer) -> Tensor:
        """Return what a tokenizer makes of the images, in evaluation mode; all processes must call it."""
        mode = tokenizer.training
        with whole(tokenizer):
            reconstructions = tokenizer.eval()(self.images).reconstructions
        tokenizer.train(mode)
        return reconstructions

    def show(self, tokenizer: Tokenizer, monitor: Monitor, step: int) -> Tensor:
        """Write the panel of images and reconstructions, which is returned, and one that compares with before a loss joined."""
        now = self.reconstructions(tokenizer)
        picture = panel(self.images, now)
        monitor.picture("reconstructions", picture, step)
        for name, before in self.before.items():
            monitor.picture(f"image_before_now/{name}", panel(self.images, before, now), step)
        return picture
