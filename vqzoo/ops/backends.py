"""Which code does an operation's work, on which device, in how many bytes: the same names and results whatever is chosen."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from vqzoo.errors import suggestion

BACKENDS = ("auto", "chunked", "eager", "triton")
PRECISIONS = ("exact", "fast")

WIDEST = {"search": 512, "exact loss": 128, "fast loss": 256}
"""The width D of codes up to which there are Triton kernels that keep their operands on the chip."""

EAGER_ELEMENTS = 2**14
"""Products of M, K and D up to which the plain formula is the fastest and its memory is nothing."""

_defaults = {"backend": "auto", "precision": "exact"}


@contextmanager
def use(backend: str = "auto", precision: str = "exact") -> Iterator[None]:
    """Set what operations use inside the block where a call does not say; `fast` may choose a code that is not the nearest.

    A block replaces the whole of one around it. auto takes `triton` on a GPU that has it, the plain `eager` formula for tiny
    sizes, else `chunked`.
    Raises ValueError for unknown names.
    """
    before = dict(_defaults)
    _defaults.update(backend=known(backend, BACKENDS, "backend"), precision=known(precision, PRECISIONS, "precision"))
    try:
        yield
    finally:
        _defaults.update(before)


def settle(backend: str | None, precision: str | None) -> tuple[str, bool]:
    """Return the backend's name, "auto" included, and whether results must be exact."""
    backend = _defaults["backend"] if backend is None else known(backend, BACKENDS, "backend")
    precision = _defaults["precision"] if precision is None else known(precision, PRECISIONS, "precision")
    return backend, precision == "exact"


def known(name: str, choices: tuple[str, ...], what: str) -> str:
    """Return a name that is among the choices; a ValueError lists them."""
    if name not in choices:
        raise ValueError(f"{what}: {name!r} is unknown; {suggestion(str(name), choices)}")
    return name


def resolve(backend: str, device: torch.device, count: int, size: int, width: int, widest: int) -> str:
    """Return the backend that "auto" means for [M, D] latents and [K, D] codes; a ValueError if a named one cannot work.

    `widest` is the D up to which Triton has a kernel for the operation.
    """
    if backend != "triton" and device.type != "cuda":
        small = count * size * width <= EAGER_ELEMENTS
        return backend if backend != "auto" else "eager" if small else "chunked"
    reason = triton_reason(device.type)
    if reason is None and width > widest:
        reason = f"its kernel for this operation and precision takes codes of width {widest} at most, not {width}"
    if backend == "triton" and reason:
        raise ValueError(f"backend: 'triton' cannot work on {device.type}: {reason}; choose auto or chunked")
    if backend != "auto":
        return backend
    return "chunked" if reason else "triton"


@cache
def triton_reason(device: str) -> str | None:
    """Return why Triton's kernels cannot run on a type of device, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if device == "cuda":
        return None if torch.cuda.get_device_capability() >= (8, 0) else "it needs compute capability 8.0 (Ampere) or later"
    return None if os.environ.get("TRITON_INTERPRET") == "1" else "it needs an NVIDIA GPU"


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
