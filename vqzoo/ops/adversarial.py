"""Adversarial losses on the logits of a discriminator that returns one map or a list of maps, and gradients of its input."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqzoo.ops.collective import all_reduce_sum

Logits = Tensor | Sequence[Tensor]

GENERATOR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge": lambda fake: -fake,
    "non-saturating": lambda fake: F.softplus(-fake),
    "vanilla": lambda fake: -F.softplus(fake),  # log(1 - σ(D(x̂))), the minimax form, which saturates
}
DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge": lambda margin: F.relu(1 - margin) / 2,
    "non-saturating": lambda margin: F.softplus(-margin),
    "vanilla": lambda margin: F.softplus(-margin) / 2,
}
"""Of the margin: D(x) for images, -D(x̂) for reconstructions."""


def generator_loss(kind: str, fake: Logits) -> Tensor:
    """Return what the generator minimises, of the logits of reconstructions."""
    return _mean(GENERATOR_LOSSES[kind], fake)


def discriminator_loss(kind: str, real: Logits, fake: Logits) -> Tensor:
    """Return what the discriminator minimises, of the logits of images and of reconstructions."""
    loss = DISCRIMINATOR_LOSSES[kind]
    return _mean(loss, real) + _mean(lambda logits: loss(-logits), fake)


def lecam(real: Logits, fake: Logits, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """Return LeCam's squared distance of logits from the moving average of the other side's (arXiv 2104.03310).

    As its authors' code has it, only logits beyond that average count.
    """
    return (_mean(lambda logits: F.relu(logits - mean_fake).square(), real)
            + _mean(lambda logits: F.relu(mean_real - logits).square(), fake))


def mean_logit(logits: Logits) -> Tensor:
    """Return the mean over maps of the mean of each map."""
    return _mean(lambda logits: logits, logits)


def gradient_ratio(one: Tensor, other: Tensor, parameter: Tensor) -> Tensor:
    """Return |∇one| / (|∇other| + 1e-4) at a parameter, of gradients' means over all processes (arXiv 2012.09841, eq. 7)."""
    scale = 4096.0  # or fp16 would lose what is small
    with torch.autocast(parameter.device.type, enabled=False):
        found = [torch.autograd.grad(scale * loss, parameter, retain_graph=True)[0].float() / scale for loss in (one, other)]
    processes = all_reduce_sum(torch.ones((), device=parameter.device))
    sizes = all_reduce_sum(torch.stack(found)).flatten(1).norm(dim=1) / processes
    return sizes[0] / (sizes[1] + 1e-4)


def input_gradient(discriminator: nn.Module, images: Tensor) -> Tensor:
    """Return ∂D/∂x [B, 3·H·W] of images [B, 3, H, W] with its graph, in float32; D(x) is the mean logit of an image."""
    with torch.autocast(images.device.type, enabled=False):
        images = images.detach().float().requires_grad_()
        maps = _maps(discriminator(images))
        total = sum(logits.flatten(1).mean(1).sum() for logits in maps) / len(maps)
        return torch.autograd.grad(total, images, create_graph=True)[0].flatten(1)


def _maps(logits: Logits) -> Sequence[Tensor]:
    return [logits] if isinstance(logits, Tensor) else logits


def _mean(function: Callable[[Tensor], Tensor], logits: Logits) -> Tensor:
    return torch.stack([function(logits.float()).mean() for logits in _maps(logits)]).mean()
