"""Discriminators: PatchGAN, and small heads on the features of any timm network."""

import math

from torch import Tensor, nn

from vqzoo.errors import UserError
from vqzoo.features import Features


class PatchDiscriminator(nn.Module):
    """Judge overlapping patches of an image (PatchGAN, arXiv 1611.07004): [B, 3, H, W] → logits [B, 1, h, w].

    `layers` convolutions halve the image; two more keep its size. norm "batch" takes the statistics of each forward on
    each process, as the lineage does; "group" depends on neither the batch nor the number of processes.
    """

    def __init__(self, layers: int = 3, width: int = 64, norm: str = "batch"):
        super().__init__()
        widths = [width * min(2**level, 8) for level in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, layers + 1):
            stride = 2 if level < layers else 1
            parts += [nn.Conv2d(widths[level - 1], widths[level], 4, stride, 1, bias=norm == "none")]
            parts += [*_norm(norm, widths[level]), nn.LeakyReLU(0.2)]
        self.model = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.smallest = 3 * 2**layers
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < self.smallest:
            height, width = images.shape[-2:]
            raise UserError(f"plugins.gan.layers: this many halvings need images of {self.smallest} pixels or more, and get "
                            f"{height}x{width}; use fewer layers or a larger data.resolution")
        return self.model(images)


class FeatureDiscriminator(nn.Module):
    """Judge the feature maps of a frozen or trained timm network by a small head each: [B, 3, H, W] → a list of logits."""

    def __init__(self, features: Features, width: int = 64, norm: str = "group"):
        super().__init__()
        self.features = features
        self.heads = nn.ModuleList(_head(channels, width, norm) for channels in features.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [head(feature) for head, feature in zip(self.heads, self.features(images), strict=True)]


def _head(channels: int, width: int, norm: str) -> nn.Sequential:
    judge = nn.Conv2d(width, 1, 3, padding=1)
    return nn.Sequential(nn.Conv2d(channels, width, 1), *_norm(norm, width), nn.LeakyReLU(0.2), judge)


def _norm(norm: str, channels: int) -> list[nn.Module]:
    if norm == "batch":
        return [nn.BatchNorm2d(channels)]
    return [nn.GroupNorm(math.gcd(32, channels), channels)] if norm == "group" else []


def _initialise(module: nn.Module) -> None:
    """Draw weights as pix2pix does."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
