"""Sums, gathers and broadcasts over processes that are the identity on one."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vqzoo.errors import UserError

PART, MIX = 1 << 22, 0x5851F42D4C957F2D
"""A checksum's elements at a time, which bound its memory, and the odd number that mixes them (Knuth's MMIX)."""


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes; the gradient is summed over them too.

    Every process must call it, and run backward through it, in the same order.
    """
    return _Sum.apply(tensor) if _processes() > 1 else tensor


@torch.no_grad()
def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate the rows [M, ...] of all processes in the order of their ranks: [M·processes, ...], no gradient.

    M must be the same on every process.
    """
    if _processes() == 1:
        return tensor.detach()
    rows = tensor.new_empty(len(tensor) * _processes(), *tensor.shape[1:])
    dist.all_gather_into_tensor(rows, tensor.contiguous())
    return rows


@torch.no_grad()
def gather_ragged(tensor: Tensor) -> Tensor:
    """Concatenate the rows of all processes, as `gather_rows` does, where each may have another number of them."""
    if _processes() == 1:
        return tensor.detach()
    counts = gather_rows(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    most = max(1, *counts)
    padded = tensor.new_zeros(most, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    rows = gather_rows(padded).split(most)
    return torch.cat([part[:count] for part, count in zip(rows, counts, strict=True)])


@torch.no_grad()
def broadcast(tensor: Tensor) -> Tensor:
    """Return the first process's tensor on every process, no gradient."""
    if _processes() == 1:
        return tensor.detach()
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(copy, src=0)
    return copy


def gather_names(names: list[str]) -> list[str]:
    """Join the lists of names of all processes, in the order of their ranks."""
    if _processes() == 1:
        return names
    lists: list[list[str]] = [[] for _ in range(_processes())]
    dist.all_gather_object(lists, names)
    return [name for found in lists for name in found]


def from_main(find: Callable[[], Any]) -> Any:
    """Return on every process what `find` returns on the first; an error there is a UserError on all the others."""
    if _processes() == 1:
        return find()
    found: list[Any] = [None, None]
    problem = None
    if dist.get_rank() == 0:
        try:
            found[0] = find()
        except Exception as error:  # any other left here alone would leave the rest waiting
            problem, found[1] = error, str(error) or type(error).__name__
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise problem or UserError(found[1])
    return found[0]


@torch.no_grad()
def differing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors whose bits are not the same on all processes, the order of the elements included."""
    if _processes() == 1 or not tensors:
        return []
    sums = gather_rows(torch.stack([_checksum(tensor) for tensor in tensors.values()])[None])
    equal = (sums == sums[0]).all(0).tolist()
    return [name for name, same in zip(tensors, equal, strict=True) if not same]


def _checksum(tensor: Tensor) -> Tensor:
    """Return a 0-dim int64 that depends on every bit of a tensor and on its place; stays on the device."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in tensor.detach().contiguous().view(kind).flatten().split(PART):
        places = torch.arange(1, 2 * len(part), 2, device=part.device)  # odd, so that no bit is lost
        total = total * MIX + (part.long() * places * MIX).sum()
    return total


class Agreement:
    """Let every process know what the others wish, on the host: no device is waited for.

    Made by all processes together, and asked by all together.
    """

    def __init__(self):
        several = _processes() > 1
        self._group = dist.new_group(backend="gloo") if several and dist.get_backend() != "gloo" else None

    def largest(self, wish: int) -> int:
        """Return the largest of all processes' wishes."""
        if _processes() == 1:
            return wish
        wishes = torch.tensor(wish)
        dist.all_reduce(wishes, op=dist.ReduceOp.MAX, group=self._group)
        return int(wishes)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient)


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
