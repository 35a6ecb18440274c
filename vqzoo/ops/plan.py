"""What the operations on codes would use, said without doing it."""

from dataclasses import dataclass

import torch

from vqzoo.ops import nearest, nonstationary
from vqzoo.ops.backends import WIDEST, resolve, settle


@dataclass
class Plan:
    """Say which backend does an operation, in how many bytes beside its inputs and its results."""

    operation: str
    backend: str
    bytes: int


def plan(device: torch.device, count: int, size: int, width: int) -> list[Plan]:
    """Return what `nearest_codes` and `nonstationary_loss` with its gradient would use for [M, D] latents and [K, D] codes.

    A ValueError says why a backend that was asked for cannot work.
    """
    backend, exact = settle(None, None)
    names = [resolve(backend, device, count, size, width, WIDEST[kind])
             for kind in ("search", "exact loss" if exact else "fast loss")]
    return [Plan("nearest_codes", names[0], _search(names[0], device.type, count, size, width)),
            Plan("nonstationary_loss", names[1], _loss(names[1], device.type, count, size, width))]


def _search(backend: str, device: str, count: int, size: int, width: int) -> int:
    if backend == "eager":
        return 8 * count * size * (width + 1)
    if backend == "triton":  # bfloat16 operands, minima of 32 codes
        return 2 * (count + size) * width + min(4 * count * size // 32, 2**26)
    rows, columns = nearest.TILES.get(device, nearest.TILES["cpu"])
    group, rows = nearest.group_of(size), min(rows, count)
    scan = 4 * rows * (min(columns, size) + size // group) + 12 * rows * group * width
    return 4 * size * (width + 2) + 8 * size + scan


def _loss(backend: str, device: str, count: int, size: int, width: int) -> int:
    if backend == "eager":
        return 8 * count * size * (width + 2)
    if backend == "triton":  # three bfloat16 pieces of each operand
        return 6 * (count + size) * width
    rows, columns = nonstationary.TILES.get(device, nonstationary.TILES["cpu"])
    rows = min(rows, count)
    columns = min(columns, size)
    every = rows * columns * -(-size // columns)
    return 4 * (rows * columns + (every if every <= nonstationary.MOST else rows * columns) + size * (width + 2))
