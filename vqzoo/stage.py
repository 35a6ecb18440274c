"""What a stage needs beyond its hooks: an optimizer, whose moments outlive it, and the learning rate."""

import math
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from vqzoo.errors import UserError, suggestion
from vqzoo.recipe import OptimConfig, Recipe, StageConfig
from vqzoo.sharding import like

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
    groups: dict[tuple[float, type], list[nn.Parameter]] = {}  # no kernel takes whole tensors and pieces together
    for name, parameter in named.items():
        scales = [scale for pattern, scale in config.scale.items() if fnmatch(name, pattern)]
        groups.setdefault((scales[-1] if scales else 1.0, type(parameter)), []).append(parameter)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    optimizer = kind(
        [{"params": parameters, "scale": scale} for (scale, _), parameters in groups.items()],
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
    return torch.empty_like(parameter).copy_(like(value, parameter))


def take_moments(module: nn.Module, optimizer: torch.optim.Optimizer, moments: Moments) -> None:
    """Store an optimizer's state by parameter name; what belongs to frozen parameters is kept as it was."""
    for name, parameter in module.named_parameters():
        if parameter in optimizer.state:
            moments[name] = dict(optimizer.state[parameter])


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
