"""What the hooks of a tokenizer must return; whoever returns something else is named by a PluginError."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vqzoo.caller import kind_of
from vqzoo.codebook import Codebook
from vqzoo.errors import PluginError
from vqzoo.manager import Hooks
from vqzoo.plugin import Quantized


def check_quantized(hooks: Hooks, found: Any, latents: Tensor, width: int) -> Quantized:
    """Return what quantize returned for latents [B, N, D]."""
    hooks.answer("quantize", found, Quantized)
    tokens, device = tuple(latents.shape[:2]), latents.device
    _check_tensor(hooks, "quantize", "codes", found.codes, (*tokens, width), torch.float32, device)
    if found.indices is not None:
        _check_tensor(hooks, "quantize", "indices", found.indices, tokens, torch.int64, device, more=1)
    for name, extra in found.extras.items():
        if not isinstance(extra, Tensor) or extra.shape[:1] != tokens[:1] or extra.device != device:
            raise PluginError(f"{hooks.served('quantize')}, returned as extra {name!r} {kind_of(extra)} where a tensor "
                              f"[{tokens[0]}, ...] on {device} is expected")
    return found


def check_entered(hooks: Hooks, latents: Any, features: Tensor) -> Tensor:
    """Return the latents that a codebook made of the encoder's features [B, N, ...]; waits for the device."""
    wide = latents.shape[2:3] if isinstance(latents, Tensor) else features.shape[2:]
    shape = (*features.shape[:2], *(wide or features.shape[2:]))
    _check_tensor(hooks, "make_codebook", "from_encoder", latents, shape, torch.float32, features.device)
    check_finite(hooks, "make_codebook", {"from_encoder": latents})
    return latents


def check_left(hooks: Hooks, given: Any, codes: Tensor, width: int) -> None:
    """Refuse what a codebook makes of codes [B, N, D] for the decoder, if it is not [B, N, width]; waits for the device."""
    _check_tensor(hooks, "make_codebook", "to_decoder", given, (*codes.shape[:2], width), torch.float32, codes.device)
    check_finite(hooks, "make_codebook", {"to_decoder": given})


def check_seen(hooks: Hooks, found: Any, codes: Tensor) -> Tensor:
    """Return what straight_through returned for codes [B, N, D]."""
    seen = hooks.answer("straight_through", found, Tensor)
    _check_tensor(hooks, "straight_through", "a tensor", seen, tuple(codes.shape), codes.dtype, codes.device)
    return seen


def check_losses(hooks: Hooks, hook: str, found: Any, device: torch.device, number: int | None = None) -> dict[str, Tensor]:
    """Return the losses that a hook returned, on `device`; `number` counts the answers of several plugins."""
    for name, loss in hooks.answer(hook, found, dict).items():
        if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point() or loss.device != device:
            raise PluginError(f"{hooks.served(hook, number)}, returned as loss {name!r} {kind_of(loss)} where a 0-dim "
                              f"floating-point tensor on {device} is expected")
    return found


def check_vectors(hooks: Hooks, codebook: Codebook) -> None:
    """Refuse a codebook whose vectors are not as many finite ones of width D as it says; waits for the device."""
    vectors, size = codebook.vectors(), (codebook.rows, codebook.width)
    _check_tensor(hooks, "make_codebook", "vectors", vectors, size, torch.float32, vectors.device)
    check_finite(hooks, "make_codebook", {"vectors": vectors})


def check_finite(hooks: Hooks, hook: str, values: Mapping[str, Tensor]) -> None:
    """Refuse values that are not finite; waits for the device."""
    for name, value in values.items():
        if not value.isfinite().all():
            raise PluginError(f"{hooks.served(hook)}, returned {name} with NaN or infinity where finite numbers are expected")


def check_range(hooks: Hooks, found: Quantized, size: int) -> None:
    """Refuse indices of codes that there are not; waits for the device."""
    least, most = (0, 0) if found.indices is None else (int(index) for index in found.indices.aminmax())
    if least < 0 or most >= size:
        raise PluginError(f"{hooks.served('quantize')}, returned indices {least} … {most} where [0, {size}) is expected")


def check_same(hooks: Hooks, one: Quantized, other: Quantized) -> None:
    """Refuse two unlike answers of quantize in evaluation; waits for the device."""
    if torch.equal(one.codes, other.codes) and (one.indices is None or torch.equal(one.indices, other.indices)):
        return
    raise PluginError(f"{hooks.served('quantize')}, returned two answers for the same latents in evaluation, where it must "
                      "depend on latents and codebook only")


def _check_tensor(
    hooks: Hooks,
    hook: str,
    name: str,
    value: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    more: int = 0,
) -> None:
    """Refuse a value that is no tensor of this shape, which `more` dimensions may follow."""
    if not isinstance(value, Tensor):
        problem = f"{kind_of(value)} as {name} where a tensor is expected"
    elif tuple(value.shape[: len(shape)]) != shape or value.dim() > len(shape) + more:
        wanted = f"{list(shape)}{' or one dimension more' if more else ''}"
        problem = f"{name} {list(value.shape)} where {wanted} is expected"
    elif value.dtype != dtype:
        problem = f"{name} of {value.dtype} where {dtype} is expected"
    elif value.device != device:
        problem = f"{name} on {value.device} where {device} is expected"
    else:
        return
    raise PluginError(f"{hooks.served(hook)}, returned {problem}")
