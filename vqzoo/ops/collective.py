"""Sums, gathers and broadcasts over processes that are the identity on one."""

import torch
import torch.distributed as dist
from torch import Tensor


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
