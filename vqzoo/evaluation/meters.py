"""Meters: each takes batches on every process and gives its numbers over all of them, in the order of the images."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vqzoo.codebook import Codebook
from vqzoo.evaluation.distances import SUBSET, Moments, frechet_distance, kernel_distance, precision_recall
from vqzoo.evaluation.networks import full_float32
from vqzoo.evaluation.pixels import LEAST_SIDE, decibels, ms_ssim, squared_error, ssim, ssim_uniform
from vqzoo.evaluation.protocols import GAUSSIAN, Pair, Protocol
from vqzoo.lpips import LPIPSDistance
from vqzoo.ops import all_reduce_sum, code_usage, gather_names, gather_ragged, gather_rows, perplexity, usage

CHUNK = 8
"""Images that go through a network at once on a CPU: with more, fresh memory takes as long as the arithmetic."""


class ImageMeter:
    """Measure each image by itself: a column per metric, a row per image."""

    def __init__(self, metrics: list[str], lpips: dict[str, LPIPSDistance], protocol: Protocol, device: torch.device):
        self.lpips, self.protocol, self.device = lpips, protocol, device
        self.columns: dict[str, list[Tensor]] = {name: [] for name in metrics}
        self.too_small: dict[str, str] = {}

    def add(self, pair: Pair) -> None:
        for name, column in self.columns.items():
            column.append(self._measure(name, pair).double())

    def _measure(self, name: str, pair: Pair) -> Tensor:
        height, width = pair.images.shape[-2:]
        least = self.lpips[name].smallest if name in self.lpips else LEAST_SIDE if name == "ms_ssim" else 1
        if min(height, width) < least:
            self.too_small[name] = f"it needs images of {least} pixels or more and gets {height}x{width}"
            return torch.full((len(pair.images),), torch.nan, device=self.device)
        if name in self.lpips:
            images, reconstructions = pair.lpips()
            with full_float32(self.device):
                return self.lpips[name](reconstructions, images)
        measure = {"psnr": squared_error, "ms_ssim": ms_ssim,
                   "ssim": ssim if self.protocol.ssim == GAUSSIAN else ssim_uniform}[name]
        return measure(*pair.levels)

    def results(self, order: Tensor) -> tuple[dict[str, float], dict[str, str], dict[str, list[float]]]:
        """Return the metrics, what is missing and why, and each image's values; `order` sorts the gathered rows."""
        missing = dict(said.split("\t") for said in gather_names([f"{name}\t{why}" for name, why in self.too_small.items()]))
        metrics, table = {}, {}
        for name, column in self.columns.items():
            values = gather_ragged(torch.cat(column) if column else torch.zeros(0, dtype=torch.float64, device=self.device))
            if name in missing:
                continue
            values = values[order].cpu()
            finish = decibels if name == "psnr" else None
            batch = 1 if name in self.lpips else self.protocol.batch
            metrics[name] = pooled(values, batch, finish)
            table[name] = (decibels(values) if finish else values).tolist()
        return metrics, missing, table


def pooled(values: Tensor, batch: int, finish: Callable[[Tensor], Tensor] | None = None) -> float:
    """Return the mean over batches of the mean [n] of each, which goes through `finish` before; NaN of nothing."""
    if not len(values):
        return math.nan
    means = values if batch == 1 else torch.stack([part.mean() for part in values.split(batch)])
    return float((finish(means) if finish else means).mean())


class CodeMeter:
    """Count the codes of a codebook that a tokenizer chooses, and at which image each is chosen first."""

    def __init__(self, codebook: Codebook, device: torch.device):
        self.codebook, self.device = codebook, device
        self.counts = torch.zeros(codebook.rows, dtype=torch.int64, device=device)
        self.first = torch.full((codebook.rows,), torch.iinfo(torch.int64).max, device=device)
        self.depth = 1

    def add(self, indices: Tensor, positions: Tensor) -> None:
        """Add the indices [B, N] or [B, N, Q] of the images at positions [B]."""
        self.depth = indices[0, 0].numel()
        rows = self.codebook.rows_of(indices)
        self.counts += code_usage(rows, self.codebook.rows)
        flat = rows.flatten(1)
        places = positions.to(self.device)[:, None].expand_as(flat)
        self.first.scatter_reduce_(0, flat.flatten(), places.flatten(), "amin")

    def results(self, positions: Tensor) -> tuple[dict[str, float], list[tuple[int, float]]]:
        """Return the metrics, and the usage after 1, 2, 4, … images; `positions` are those of all images, sorted."""
        counts, first = all_reduce_sum(self.counts), gather_rows(self.first[None]).amin(0)
        effective = float(perplexity(counts))
        seen_at = torch.searchsorted(positions, first).cpu()  # a code that is never chosen comes after all images
        curve = [(images, float((seen_at < images).double().mean())) for images in _milestones(len(positions))]
        metrics = {"usage": float(usage(counts)), "perplexity": effective, "entropy": math.log2(effective or 1.0),
                   "bits_per_token": self.depth * math.log2(self.codebook.size)}
        return metrics, curve


def _milestones(images: int) -> list[int]:
    return [*(2**power for power in range(images.bit_length()) if 2**power < images), images] if images else []


class FeatureMeter:
    """Compare two sets of images, 0 the reference and 1 the others, by a network's features.

    `names` maps frechet, kernel, precision and recall to the names of the metrics that are wanted. Features are kept only for
    the last three; for the first their moments do. `reference` is known already where it is given.
    """

    def __init__(self, network: nn.Module, names: dict[str, str], device: torch.device, reference: Moments | None = None):
        self.network, self.names, self.device, self.known = network, names, device, reference
        self.moments = [Moments.empty(network.width, device) for _ in range(2)]
        self.kept: tuple[list, list] = ([], [])
        self.positions: tuple[list, list] = ([], [])

    @property
    def keeps_features(self) -> bool:
        return bool(set(self.names) - {"frechet"})

    def add(self, which: int, levels: Tensor, positions: Tensor) -> None:
        """Add images [B, 3, H, W] as levels 0 to 255."""
        if which == 0 and self.known is not None and not self.keeps_features:
            return
        at_once = CHUNK if self.device.type == "cpu" else max(1, len(levels))
        with full_float32(self.device):
            features = torch.cat([self.network(part) for part in levels.split(at_once)])
        if "frechet" in self.names:
            self.moments[which].add(features)
        if self.keeps_features:
            self.kept[which].append(features.cpu())
            self.positions[which].append(positions.cpu())

    def reference(self) -> Moments:
        """Return the reference's moments over all processes; called by every process."""
        return self.known or self.moments[0].over_processes()

    def results(self) -> dict[str, float]:
        found: dict[str, Any] = {}
        if "frechet" in self.names:
            reference, others = self.reference(), self.moments[1].over_processes()
            found["frechet"] = frechet_distance(reference, others)
        if self.keeps_features:
            reference, others = (self._features(which) for which in range(2))
            if "kernel" in self.names:
                found["kernel"], found["deviation"] = kernel_distance(others, reference)
            if {"precision", "recall"} & set(self.names):
                found["precision"], found["recall"] = precision_recall(others, reference)
        metrics = {name: found[kind] for kind, name in self.names.items()}
        several = "kernel" in self.names and len(others) > SUBSET  # else each subset is the whole
        return metrics | ({f"{self.names['kernel']}_std": found["deviation"]} if several else {})

    def _features(self, which: int) -> Tensor:
        """Return the features [n, D] of all processes, in the order of their images, so that subsets are the same."""
        kept, positions = self.kept[which], self.positions[which]
        features = torch.cat(kept) if kept else torch.zeros(0, self.network.width)
        order = torch.cat(positions) if positions else torch.zeros(0, dtype=torch.int64)
        features, order = gather_ragged(features.to(self.device)), gather_ragged(order.to(self.device))
        return features[order.argsort()].cpu()
