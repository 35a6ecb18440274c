"""Distances of pixels: functions of images [B, 3, H, W] and their reconstructions, as levels 0 to 255, that give [B]."""

import torch
from torch import Tensor
from torch.nn import functional as F

SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""The exponents of MS-SSIM's five scales, from the finest on (Wang, Simoncelli and Bovik, 2003)."""

LEAST_SIDE = 176
"""Pixels that MS-SSIM needs: a window of 11 at the coarsest scale."""


def squared_error(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the mean squared error of each image."""
    return (images - reconstructions).double().square().flatten(1).mean(1)


def decibels(error: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of mean squared errors; infinite where there is none."""
    return 10 * torch.log10(255**2 / error)


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB; infinite for equal images."""
    return decibels(squared_error(images, reconstructions))


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the structural similarity (Gaussian window 11, sigma 1.5, edges reflected).

    What torchmetrics computes, in float64: in float32 the variance of bright even areas drowns in rounding, so that equal
    images may miss 1 by 0.001. scikit-image leaves out the 5 pixels at each edge.
    """
    return _similarities(images.double(), reconstructions.double(), _gaussian(), reflect=True)[0]


def ssim_uniform(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the structural similarity by scikit-image's defaults: even window 7, sample covariance, no edges.

    An image with a side under 7 gives NaN.
    """
    window = torch.full((7,), 1 / 7, dtype=torch.float64)
    return _similarities(images.double(), reconstructions.double(), window, reflect=False, sample=True)[0]


def ms_ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the structural similarity over five scales, each half as fine as the one before; NaN under 176 pixels.

    As in the paper and in TensorFlow, a Gaussian window 11, sigma 1.5, counts where it lies inside the image; torchmetrics
    leaves the edges out of contrast and structure alone, which moves it by some 0.001.
    """
    one, other, product = images.double(), reconstructions.double(), 1.0
    if min(images.shape[-2:]) < LEAST_SIDE:
        return torch.full((len(images),), torch.nan, dtype=torch.float64, device=images.device)
    for number, exponent in enumerate(SCALES, 1):
        whole, contrast = _similarities(one, other, _gaussian(), reflect=False)
        # A negative similarity has no fractional power; TensorFlow takes it for nothing.
        product = product * (whole if number == len(SCALES) else contrast).clamp(min=0) ** exponent
        one, other = F.avg_pool2d(one, 2), F.avg_pool2d(other, 2)
    return product


def _similarities(
    one: Tensor, other: Tensor, window: Tensor, reflect: bool, sample: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the means [B] of the similarity and of its contrast and structure alone.

    At the edges, images are reflected, or what lies there does not count; with `sample`, variances are those of samples.
    """
    height, width = (_blurring(side, window, reflect).to(one.device) for side in one.shape[-2:])

    def blur(images: Tensor) -> Tensor:
        return height @ images @ width.T

    unbiased = len(window) ** 2 / (len(window) ** 2 - 1) if sample else 1.0
    mean_one, mean_other = blur(one), blur(other)
    variances = (blur(one * one) - mean_one**2 + blur(other * other) - mean_other**2) * unbiased
    covariance = (blur(one * other) - mean_one * mean_other) * unbiased
    contrast = (2 * covariance + 7.65**2) / (variances + 7.65**2)
    whole = (2 * mean_one * mean_other + 2.55**2) / (mean_one**2 + mean_other**2 + 2.55**2) * contrast
    return whole.flatten(1).mean(1), contrast.flatten(1).mean(1)


def _gaussian() -> Tensor:
    """Return 11 taps of a Gaussian of sigma 1.5, which sum to 1."""
    weights = (-(torch.arange(-5, 6) ** 2) / (2 * 1.5**2)).double().exp()
    return weights / weights.sum()


def _blurring(side: int, window: Tensor, reflect: bool) -> Tensor:
    """Return the matrix that blurs a line of pixels: [side, side] with reflected ends, else [side - window + 1, side]."""
    reach = len(window) // 2
    if not reflect:
        rows = max(0, side - 2 * reach)
        source = torch.arange(rows)[:, None] + torch.arange(len(window))
    else:
        rows, period = side, max(1, 2 * side - 2)
        source = (torch.arange(side)[:, None] + torch.arange(-reach, reach + 1)).remainder(period)
        source = source.minimum(period - source)
    return torch.zeros(rows, side, dtype=torch.float64).scatter_add_(1, source, window.expand(rows, -1))
