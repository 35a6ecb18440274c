"""Protocols: how images become the numbers that a metric compares, as data, so that no two of them are mixed unawares."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vqzoo.data import center, covering, crop_val, from_image, to_bytes, to_images


def crop_unfiltered(image: Image.Image, resolution: tuple[int, int]) -> Image.Image:
    """Resize as OpenCV's bilinear filter does, which takes no mean of the pixels between, and keep the centre.

    OpenCV computes in fixed point, so that a level may differ from its own by one.
    """
    size = covering(image.size, resolution)
    if size != image.size[::-1]:
        levels = F.interpolate(from_image(image)[None].float(), size, mode="bilinear", align_corners=False)
        image = Image.fromarray(levels[0].round().byte().permute(1, 2, 0).numpy())
    return center(image, resolution)


def crop_halving(image: Image.Image, resolution: tuple[int, int]) -> Image.Image:
    """Halve by means of 2x2 pixels as long as twice the size is covered, then resize by a bicubic filter, keep the centre."""
    while min(image.width / resolution[1], image.height / resolution[0]) >= 2:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    height, width = covering(image.size, resolution)
    return center(image.resize((width, height), Image.Resampling.BICUBIC), resolution)


CROPS: dict[str, Callable[[Image.Image, tuple[int, int]], Image.Image]] = {
    "shorter side resized to cover the resolution (Pillow's bicubic, antialiased), centre crop": crop_val,
    "shorter side resized to cover the resolution (bilinear, not antialiased), centre crop": crop_unfiltered,
    "halved by box filter while twice the resolution is covered, then Pillow's bicubic, centre crop": crop_halving,
}
"""Ways to bring an image to the resolution; an image that has it already is not resampled by any."""

COVER, UNFILTERED, HALVING = CROPS
ROUND, TRUNCATE = "clamped to [-1, 1], rounded to 8 bits", "clamped to [-1, 1], truncated to 8 bits, images too"
GAUSSIAN = "Gaussian window 11, sigma 1.5, edges reflected"
UNIFORM = "scikit-image's default: even window 7, sample covariance, no edges"
LEVELS, FLOAT = "8-bit levels", "floating point, clamped to [-1, 1]"


@dataclass(frozen=True)
class Protocol:
    """Say how numbers are made.

    `batch` images are pooled: their mean squared error gives one PSNR, and the metric is the mean over batches, the last of
    which counts as much as any. An unpaired protocol compares a folder of samples with a reference set.
    """

    crop: str
    rounding: str
    batch: int
    ssim: str
    lpips: str
    inception: str
    resizing: str
    source: str
    paired: bool = True

    def card(self) -> dict[str, str]:
        """Return the protocol's part of a metric card."""
        mean = "per image, then mean" if self.batch == 1 else f"per batch of {self.batch}, then mean over batches"
        said = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("batch", "paired")}
        psnr = "of 8-bit levels, " + (mean if self.batch == 1 else f"of the mean error {mean}")
        return {**said, "psnr": psnr, "ssim": f"{self.ssim}, of 8-bit levels, {mean}", "lpips": f"of {self.lpips}, then mean",
                "inception": f"of {self.inception}", "usage": "share of codes hit at least once over all evaluated images",
                "perplexity": "exp of the entropy (nats) of the codes over all evaluated images"}


PROTOCOLS = {
    "vqzoo": Protocol(COVER, ROUND, 1, GAUSSIAN, LEVELS, LEVELS, "tensorflow", "ours"),
    "simvq": Protocol(UNFILTERED, TRUNCATE, 64, UNIFORM, FLOAT, FLOAT, "pytorch",
                      "evaluation.py of github.com/youngsheen/SimVQ, whose default batch is 64"),
    "taming": Protocol(UNFILTERED, TRUNCATE, 1, UNIFORM, LEVELS, LEVELS, "tensorflow",
                       "pictures as github.com/CompVis/taming-transformers saves them, scored by torch-fidelity; PSNR, SSIM "
                       "and LPIPS, which it does not publish, are of the same pictures"),
    "adm-gfid": Protocol(HALVING, TRUNCATE, 1, GAUSSIAN, LEVELS, LEVELS, "tensorflow",
                         "evaluator of github.com/openai/guided-diffusion: samples against a reference set", paired=False),
}


@dataclass
class Pair:
    """Hold images and reconstructions [B, 3, H, W] as a protocol sees them.

    `images` are 8-bit; reconstructions are what a decoder gives, in [-1, 1] or beyond, or 8-bit out of files, and then
    nothing is rounded again.
    """

    images: Tensor
    reconstructions: Tensor
    protocol: Protocol

    @cached_property
    def levels(self) -> tuple[Tensor, Tensor]:
        """Return both as the 8-bit levels 0 to 255 that PSNR and SSIM compare, in float32."""
        if self.reconstructions.dtype == torch.uint8:
            return self.images.float(), self.reconstructions.float()
        if self.protocol.rounding == ROUND:
            return self.images.float(), to_bytes(self.reconstructions)
        return truncated(signed(self.images)), truncated(self.reconstructions)

    @cached_property
    def floats(self) -> tuple[Tensor, Tensor]:
        """Return both in [-1, 1], not rounded."""
        images = to_images(self.images, self.images.device)
        if self.reconstructions.dtype == torch.uint8:
            return images, to_images(self.reconstructions, images.device)
        return images, self.reconstructions.clamp(-1, 1)

    def lpips(self) -> tuple[Tensor, Tensor]:
        """Return both in [-1, 1]."""
        return self.floats if self.protocol.lpips == FLOAT else tuple(x / 127.5 - 1 for x in self.levels)

    def features(self) -> tuple[Tensor, Tensor]:
        """Return both as the levels 0 to 255, perhaps between two, of which networks give features."""
        return tuple((x + 1) * 127.5 for x in self.floats) if self.protocol.inception == FLOAT else self.levels


def signed(levels: Tensor) -> Tensor:
    """Return 8-bit levels in [-1, 1] as NumPy computes u / 127.5 - 1 before it becomes float32."""
    return (levels.double() / 127.5 - 1).float()


def truncated(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as the levels that a cast to uint8 leaves, clamped before; a level may lose one on the way."""
    return ((images.clamp(-1, 1) + 1) / 2 * 255).floor()
