"""Evaluation: how well a tokenizer reconstructs held-out images, and how it uses its codes."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from vqzoo.data import Batch, ImageDataset, StreamDataset, fingerprint, to_images
from vqzoo.ops import all_reduce_sum, code_usage, gather_names, perplexity, usage
from vqzoo.tokenizer import Tokenizer

PROTOCOL = {
    "crop": "shorter side resized to cover the resolution, centre crop",
    "rounding": "clamped to [-1, 1], rounded to 8 bits",
    "psnr": "per image, then mean",
    "ssim": "Gaussian window 11, sigma 1.5, edges reflected, on 8-bit values, per image, then mean",
    "usage": "share of codes hit at least once over all evaluated images",
    "perplexity": "exp of the entropy (nats) of the codes over all evaluated images",
}
"""How the numbers of `evaluate` are made; part of every metric card."""


def to_bytes(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as the 8-bit values [0, 255] that a file would hold, in float32; clamped and rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round()


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each image [B] from 8-bit values; infinite for equal images."""
    error = (images - reconstructions).double().square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error)


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the structural similarity of each image [B] from 8-bit values (Gaussian window 11, sigma 1.5, edges reflected).

    What torchmetrics computes, in float64: in float32 the variance of bright even areas drowns in rounding, so that equal
    images may miss 1 by 0.001. scikit-image leaves out the 5 pixels at each edge.
    """
    one, other = images.double(), reconstructions.double()
    mean_one, mean_other = _blur(one), _blur(other)
    variances = _blur(one * one) - mean_one**2 + _blur(other * other) - mean_other**2
    covariance = _blur(one * other) - mean_one * mean_other
    means = (2 * mean_one * mean_other + 2.55**2) / (mean_one**2 + mean_other**2 + 2.55**2)
    return (means * (2 * covariance + 7.65**2) / (variances + 7.65**2)).flatten(1).mean(1)


def _blur(images: Tensor) -> Tensor:
    height, width = (_gaussian(side).to(images.device) for side in images.shape[-2:])
    return height @ images @ width.T


def _gaussian(side: int) -> Tensor:
    """Return the matrix [side, side] that blurs a line of pixels: 11 taps, sigma 1.5, reflected at the ends."""
    taps = torch.arange(-5, 6)
    weights = (-(taps**2) / (2 * 1.5**2)).double().exp()
    period = max(1, 2 * side - 2)
    source = (torch.arange(side)[:, None] + taps).remainder(period)
    rows = (weights / weights.sum()).expand(side, -1)
    return torch.zeros(side, side, dtype=torch.float64).scatter_add_(1, source.minimum(period - source), rows)


class Evaluation:
    """Add up a tokenizer's results batch by batch; every process may hold a part of the images."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device):
        self.tokenizer, self.device = tokenizer, device
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.counts = torch.zeros(tokenizer.codebook.size, dtype=torch.int64, device=device)
        self.tokens, self.depth, self.discrete = 0, 1, True
        self.bad: list[str] = []

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Reconstruct a batch and add its results."""
        self.bad += batch.bad
        if not len(batch.images):
            return
        images = to_images(batch.images, self.device)
        output = self.tokenizer(images)
        one, other = to_bytes(images), to_bytes(output.reconstructions)
        values = torch.stack([psnr(one, other).sum(), ssim(one, other).sum(), one.new_tensor(len(images)).double()])
        self.sums += values
        self.tokens = output.latents.shape[1]
        self.discrete = output.indices is not None
        if self.discrete:
            self.depth = output.indices[0, 0].numel()
            self.counts += code_usage(output.indices, len(self.counts))

    def results(self) -> Iterator[tuple[str, float]]:
        """Yield each metric's name and value, over all processes; called by every process."""
        total_psnr, total_ssim, count = all_reduce_sum(self.sums).tolist()
        counts = all_reduce_sum(self.counts)
        yield "psnr", total_psnr / count if count else math.nan
        yield "ssim", total_ssim / count if count else math.nan
        if self.discrete:
            yield "usage", float(usage(counts))
            yield "perplexity", float(perplexity(counts))
            yield "codebook_size", len(counts)
            yield "bits_per_token", self.depth * math.log2(len(counts))
        yield "tokens_per_image", self.tokens
        yield "images", int(count)


def evaluate(tokenizer: Tokenizer, batches: Iterable[Batch], device: torch.device) -> tuple[dict[str, float], list[str]]:
    """Return the metrics of a tokenizer over batches of held-out images, and the names of files that did not decode."""
    mode = tokenizer.training
    tokenizer.eval()
    evaluation = Evaluation(tokenizer, device)
    for batch in batches:
        evaluation.add(batch)
    tokenizer.train(mode)
    return dict(evaluation.results()), gather_names(evaluation.bad)


def to_json(content: Any) -> str:
    """Return strict JSON, in which an infinite or undefined number is the text "inf", "-inf" or "nan"."""
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content


def card(name: str, dataset: ImageDataset | StreamDataset, resolution: list[int], bad: list[str]) -> dict[str, Any]:
    """Say how numbers were made, so that they can be compared or refused."""
    return {**PROTOCOL, "data": name, "fingerprint": fingerprint(dataset), "resolution": list(resolution),
            "files_left_out": bad}


def hardware(device: torch.device, processes: int) -> dict[str, Any]:
    """Name the device, the processes and the cores."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "processes": processes, "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def table(metrics: dict[str, float]) -> str:
    """Lay metrics out as two aligned columns for the terminal."""
    units = {"psnr": " dB", "bits_per_token": " bits"}
    forms = {"usage": "{:.1%}", "psnr": "{:.2f}", "ssim": "{:.4f}", "perplexity": "{:,.1f}", "bits_per_token": "{:g}"}
    rows = [(name.replace("_", " "), forms.get(name, "{:,}").format(value) + units.get(name, ""))
            for name, value in metrics.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value:>12}" for name, value in rows)
