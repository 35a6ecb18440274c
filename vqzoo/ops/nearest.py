"""The nearest code of each latent, without the matrix of all distances."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Latents and codes in one tile of scores; a GPU needs larger tiles to outlast their launches.
TILES = {"cpu": (1024, 4096), "cuda": (4096, 16384)}


@torch.no_grad()
def nearest_codes(latents: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest of `vectors` [K, D] to each of `latents` [M, D]: indices [M] and squared distances [M].

    Works in float32 whatever the inputs and the autocast; memory beyond the inputs is O(M + K·D). The lowest index wins
    among equal codes. A latent that is not finite gets some valid index. Nothing here has a gradient.
    """
    check_widths(latents, vectors)
    rows, columns = TILES.get(latents.device.type, TILES["cpu"])
    rows, columns = max(1, min(rows, len(latents))), min(columns, len(vectors))
    with exact_float32(latents.device):
        vectors = vectors.float()
        keys = torch.cat([_keys(tile) for tile in vectors.split(columns)])
        copies = keys.sort(stable=True)
        mean = vectors.mean(0)
        centred = vectors - mean
        norms = centred.square().sum(1)
        scores = centred.new_empty(rows, columns)
        indices, distances = [], []
        for tile in latents.split(rows):
            tile = tile.float()
            found = _scan(tile - mean, centred, norms, scores)
            earliest = copies.indices[torch.searchsorted(copies.values, keys[found])]
            same = (vectors[earliest] == vectors[found]).all(1)
            indices.append(torch.where(same, earliest, found))
            distances.append((tile - vectors[found]).square_().sum(1))
    return torch.cat(indices), torch.cat(distances)


def _scan(latents: Tensor, vectors: Tensor, norms: Tensor, scores: Tensor) -> Tensor:
    """Return the index of the smallest score of each row [n], tile by tile of codes in the buffer `scores`.

    The score is |c|² - 2 z·c: the term |z|² is the same for every code and would only cost digits.
    """
    columns = scores.shape[1]
    best = latents.new_full((len(latents),), torch.inf)
    index = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
    for start in range(0, len(vectors), columns):
        codes = vectors[start : start + columns]
        tile = scores[: len(latents), : len(codes)]
        torch.addmm(norms[start : start + columns], latents, codes.t(), alpha=-2, out=tile)
        lowest, position = tile.min(1)
        closer = lowest < best
        best = torch.where(closer, lowest, best)
        index = torch.where(closer, position + start, index)
    return index


def _keys(vectors: Tensor) -> Tensor:
    """Hash each row [n, D] to an integer [n]; equal rows have equal keys.

    A matrix product may round equal codes differently by their place in it, so ties cannot be told from scores.
    Integer sums are exact in any order. The weights are splitmix64's.
    """
    weights = torch.arange(1, vectors.shape[1] + 1, device=vectors.device) * -0x61C8864680B583EB
    weights = (weights ^ (weights >> 30)) * -0x40A7B892E31B1A47
    weights = (weights ^ (weights >> 27)) * -0x6B2FB644ECCEEE15
    bits = (vectors + 0.0).view(torch.int32)  # adding zero turns -0.0, which equals 0.0, into its bits
    return (bits * weights).sum(1)


def check_widths(latents: Tensor, vectors: Tensor) -> None:
    """Raise ValueError unless the arguments are [M, D] and [K, D] with K of at least one."""
    if latents.ndim != 2 or vectors.ndim != 2 or latents.shape[1] != vectors.shape[1]:
        raise ValueError(f"latents [M, D] and vectors [K, D] differ: {list(latents.shape)} and {list(vectors.shape)}")
    if len(vectors) == 0:
        raise ValueError(f"vectors has no codes: {list(vectors.shape)}")


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Switch off autocast and every shortened float32 matrix product (TF32, bfloat16) on the device."""
    with torch.autocast(device.type, enabled=False):
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch < 2.9
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
            return
        backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
        before, backend.fp32_precision = backend.fp32_precision, "ieee"
        try:
            yield
        finally:
            backend.fp32_precision = before
