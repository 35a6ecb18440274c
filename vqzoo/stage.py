"""What a stage needs beyond its hooks: an optimizer, whose moments outlive it, its guard, and the learning rate."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from vqzoo.errors import NonFiniteError, UserError, suggestion
from vqzoo.ops import all_reduce_sum
from vqzoo.recipe import OptimConfig, Recipe, StageConfig

Moments = dict[str, dict[str, Tensor]]
"""An optimizer's state by parameter name; it carries over to the next stage's optimizer and into checkpoints."""


def stage_hooks(recipe: Recipe, stage: StageConfig) -> dict[str, list[str]]:
    """Return the routing of a stage: the recipe's, with the stage's own in place of it hook by hook."""
    return {**recipe.hooks, **stage.hooks}


def longest(recipe: Recipe, number: int, epoch: int) -> int:
    """Return how many epochs a stage may last that begins after `epoch` epochs."""
    own = recipe.stages[number].epochs
    return recipe.epochs - epoch if own is None else own


def check_scale(config: OptimConfig, names: list[str], key: str = "optim.scale") -> None:
    """Refuse a learning-rate pattern that names no parameter."""
    for pattern in config.scale:
        if not any(fnmatch(name, pattern) for name in names):
            parts = sorted({f"{name.split('.')[0]}.*" for name in names})
            raise UserError(f"{key}: {pattern!r} matches no parameter; {suggestion(pattern, parts)}")


def make_optimizer(module: nn.Module, config: OptimConfig, moments: Moments, fused: bool = True) -> torch.optim.Optimizer:
    """Make the optimizer of the parameters that now take gradients, continuing from their moments.

    `fused` updates all parameters in one pass; under accelerate's gradient scaler, a fused optimizer would hide its skips.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        scales = [scale for pattern, scale in config.scale.items() if fnmatch(name, pattern)]
        groups.setdefault(scales[-1] if scales else 1.0, []).append(parameter)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    optimizer = kind(
        [{"params": parameters, "scale": scale} for scale, parameters in groups.items()],
        lr=config.lr, betas=tuple(config.betas), weight_decay=config.weight_decay, fused=fused,
    )
    for name, parameter in named.items():
        if name in moments:
            optimizer.state[parameter] = {key: _placed(key, value, parameter, fused) for key, value in moments[name].items()}
    return optimizer


def _placed(key: str, value: Tensor, parameter: nn.Parameter, fused: bool) -> Tensor:
    """Return a part of an optimizer's state where its kernel reads it: a moment has its parameter's device and strides."""
    if key == "step":
        return value.to(parameter.device if fused else "cpu")
    return torch.empty_like(parameter).copy_(value)


def take_moments(module: nn.Module, optimizer: torch.optim.Optimizer, moments: Moments) -> None:
    """Store an optimizer's state by parameter name; what belongs to frozen parameters is kept as it was."""
    for name, parameter in module.named_parameters():
        if parameter in optimizer.state:
            moments[name] = dict(optimizer.state[parameter])


@dataclass
class Verdict:
    """Say of one update which of its terms were finite [T], and on how many processes one was not []."""

    where: str
    terms: list[str]
    finite: Tensor
    bad: Tensor
    spared: str


class Guard:
    """Keep what is not finite out of the weights: every update is judged before it is made.

    A host that waited for each verdict would let an accelerator run dry. `deferred`, it reads them in `check` alone, and
    until then the device itself holds everything back: `stopped`, a 0-dim 1.0 from the first bad update on, is what a fused
    optimizer takes as its `found_inf`, and `held` undoes other changes. Otherwise `judge` raises at once.
    """

    def __init__(self, device: torch.device, deferred: bool):
        self.stopped, self.deferred = torch.zeros((), device=device), deferred
        self._unread: list[Verdict] = []

    def judge(self, where: str, losses: dict[str, Tensor], norms: dict[str, Tensor], spared: str) -> None:
        """Judge an update by its losses and by the norms of its gradients, on all processes."""
        finite = torch.stack([torch.isfinite(value) for value in (*losses.values(), *norms.values())])
        bad = all_reduce_sum((~finite).any().float())
        self.stopped.copy_((self.stopped + bad).clamp(max=1))
        terms = [*(f"loss {name!r}" for name in losses), *(f"gradient of {name}" for name in norms)]
        self._unread.append(Verdict(where, terms, finite, bad, spared))
        if not self.deferred:
            self.check()

    def check(self) -> None:
        """Raise NonFiniteError for the first bad update; waits for the device."""
        verdicts, self._unread = self._unread, []
        bad = torch.stack([verdict.bad for verdict in verdicts]).tolist() if verdicts else []
        for verdict in (verdict for verdict, processes in zip(verdicts, bad, strict=True) if processes):
            found = [term for term, finite in zip(verdict.terms, verdict.finite.tolist(), strict=True) if not finite]
            losses = [term for term in found if term.startswith("loss")]
            named = ", ".join(losses or found[:3]) or "a value on another process"
            raise NonFiniteError(f"{verdict.where}: {named} is not finite; {verdict.spared}")

    @contextmanager
    def held(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Undo on the device what a block does to tensors, should an update before it have been bad."""
        tensors = list(tensors) if self.deferred else []
        before = [tensor.clone() for tensor in tensors]
        yield
        for tensor, value in zip(tensors, before, strict=True):
            torch.where(self.stopped > 0, value, tensor, out=tensor)


def learning_rate_factor(config: OptimConfig, step: int, steps: int) -> float:
    """Return what multiplies the learning rate of optimizer step `step` (from 0) of a run of `steps`."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    done = min(1.0, max(0, step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.schedule]
    return warmup * decay


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, steps: int) -> float:
    """Set every group's learning rate for a step and return the unscaled one."""
    rate = config.lr * learning_rate_factor(config, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    return rate


def flat(moments: Moments) -> dict[str, Tensor]:
    """Return moments as one level of tensors, as a file of tensors wants them; `nested` takes it back."""
    return {f"{name}/{key}": value for name, state in moments.items() for key, value in state.items()}


def nested(flat: dict[str, Tensor]) -> Moments:
    """Return the moments of which `flat` made one level."""
    moments: Moments = {}
    for full, value in flat.items():
        name, _, key = full.rpartition("/")
        moments.setdefault(name, {})[key] = value
    return moments
