"""One passage from what the encoder gives to what the decoder sees, hook by hook, each answer checked as the host does."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vqzoo.answers import check_losses, check_quantized, check_seen
from vqzoo.codebook import Codebook
from vqzoo.ops import code_usage
from vqzoo.plugin import Progress, Quantized
from vqzoo.sources import SPECS
from vqzoo.tokenizer import Tokenizer

EARLY = Progress(0, 0, "train", 0, 0, 2)
LATE = Progress(2**20, 2**19, "train", 2**20, 2**19, 2)
"""The first step of a run, and one that is later than any warm-up, in no epoch's last step."""


@dataclass
class Passage:
    """Carry features [B, N, E], latents and codes [B, N, D], what straight_through and then to_decoder made, and losses."""

    features: Tensor
    latents: Tensor
    found: Quantized
    seen: Tensor
    given: Tensor
    losses: dict[str, Tensor]

    def backward(self) -> None:
        """Send gradients from the losses and, at random, from what the decoder sees."""
        pull = torch.randn(self.given.shape, generator=torch.Generator().manual_seed(1)).to(self.given.device)
        total = (self.given * pull).mean() + sum(self.losses.values())
        if total.requires_grad:
            total.backward()


def ask(tokenizer: Tokenizer, hook: str, /, **arguments: Any) -> Any:
    """Ask a hook of a tokenizer; arguments that are not given are None, and extras {}."""
    return getattr(tokenizer.hooks, hook)(**dict.fromkeys(SPECS[hook]) | ({"extras": {}} if "extras" in SPECS[hook] else {})
                                          | arguments)


def passed(tokenizer: Tokenizer, features: Tensor, grid: tuple[int, int], progress: Progress = LATE) -> Passage:
    """Take features [B, N, E] through the hooks of a training forward."""
    with tokenizer.codebook.one_forward():
        return from_latents(tokenizer, features, tokenizer.codebook.from_encoder(features), grid, progress)


def from_latents(
    tokenizer: Tokenizer, features: Tensor, latents: Tensor, grid: tuple[int, int], progress: Progress = LATE
) -> Passage:
    """Take latents [B, N, D] through the hooks of a training forward."""
    hooks, codebook = tokenizer.hooks, tokenizer.codebook
    found = ask(tokenizer, "quantize", latents=latents, codebook=codebook, grid=grid, progress=progress)
    check_quantized(hooks, found, latents, codebook.width)
    seen = ask(tokenizer, "straight_through", latents=latents, codes=found.codes, extras=found.extras)
    check_seen(hooks, seen, found.codes)
    losses = check_losses(hooks, "embedding_loss", ask(
        tokenizer, "embedding_loss", latents=latents, codes=found.codes, indices=found.indices, extras=found.extras,
        codebook=codebook, progress=progress), latents.device)
    return Passage(features, latents, found, seen, codebook.to_decoder(seen), losses)


@torch.no_grad()
def evaluated(tokenizer: Tokenizer, latents: Tensor, grid: tuple[int, int]) -> Quantized:
    """Quantize latents [B, N, D] as evaluation does."""
    mode = tokenizer.training
    tokenizer.eval()
    try:
        found = ask(tokenizer, "quantize", latents=latents, codebook=tokenizer.codebook, grid=grid)
        return check_quantized(tokenizer.hooks, found, latents, tokenizer.codebook.width)
    finally:
        tokenizer.train(mode)


def of_step(tokenizer: Tokenizer, latents: Tensor, found: Quantized) -> dict[str, Any]:
    """Return what refresh_codes is told of a step, the only one of its epoch, but for progress and generator."""
    codebook, indices = tokenizer.codebook, found.indices
    told = {"codebook": codebook, "latents": latents.detach().flatten(0, 1),
            "extras": {name: value.detach() for name, value in found.extras.items()}}
    if indices is None:
        return told | {"epoch_counts": torch.zeros(codebook.rows, dtype=torch.int64, device=latents.device)}
    counts = code_usage(codebook.rows_of(indices), codebook.rows)
    return told | {"indices": indices.flatten(0, 1), "counts": counts, "epoch_counts": counts.clone()}


def at_end(tokenizer: Tokenizer, progress: Progress = LATE) -> Progress:
    """Return the progress of an epoch's last step, with a mean for each loss that is watched."""
    watched = {name: 0.5 for plugin in tokenizer.plugins.values() for name in plugin.watched_losses()}
    return replace(progress, ends_epoch=True, means=watched)


def weights_of(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Return all parameters, and the codes, by name."""
    return {**{name: p.detach() for name, p in tokenizer.named_parameters()}, "codes": tokenizer.codebook.vectors().detach()}


def judge_of(tokenizer: Tokenizer) -> nn.Module | None:
    """Make the discriminator, if anybody serves one."""
    return ask(tokenizer, "make_discriminator") if tokenizer.hooks.providers("make_discriminator") else None


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers, those that are not saved too, by name."""
    return {name: value.detach().clone() for name, value in (*module.named_parameters(), *module.named_buffers())}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that are not bit for bit the same, or are in one of the two alone."""
    return [name for name in before.keys() | after.keys() if name not in before or name not in after
            or not same(before[name], after[name])]


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Tell whether two tensors are equal, NaN to NaN."""
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and one.dtype == other.dtype and bool(torch.allclose(one, other, 0, 0, equal_nan=True))


def out_of_range(found: Quantized, codebook: Codebook) -> str | None:
    """Say which indices name no code, if any do."""
    if found.indices is None or not found.indices.numel():
        return None
    least, most = (int(index) for index in found.indices.aminmax())
    return None if 0 <= least and most < codebook.size else f"indices {least} … {most} where [0, {codebook.size}) is expected"


def not_finite(values: dict[str, Tensor]) -> list[str]:
    """Return the names of values that are not finite."""
    return [name for name, value in values.items() if not value.isfinite().all()]
