"""What a plugin is made of: its base class and the two records that hooks exchange."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, ClassVar

import pluggy
from torch import Tensor, nn

hookimpl = pluggy.HookimplMarker("vqzoo")
"""Marks a plugin's method as an implementation of the hook of that name (see `vqzoo.hookspecs`)."""

CONTRACT = "1.0"
"""The version of the contract with plugins: MAJOR.MINOR.

MINOR grows when a hook, an argument or a public name is added, which no plugin notices; MAJOR grows when anything that a plugin
may rely on is taken away or means something else, and not before one release has warned of it. The contract is: the hooks of
`vqzoo.hookspecs` and their arguments, the names of `vqzoo` and `vqzoo.ops`, the entry points, the checks of `vqzoo.testing`.
"""


class Plugin(nn.Module):
    """Answers hooks for one method.

    A plugin lives inside the tokenizer, so everything that must survive a checkpoint is a parameter or a buffer:
    counters are 0-dim buffers, never plain attributes. Its fields in a recipe are those of the nested dataclass Config,
    whose `__post_init__` may raise ValueError for values that cannot work, with a text that begins with the field's name
    and a colon. The methods below are optional declarations, read when a recipe is wired.
    """

    contract: ClassVar[str] = "1.0"
    """The version of the contract (`vqzoo.CONTRACT`) that the class needs: the first one, unless it uses what came later."""

    @dataclass
    class Config:
        """The fields that a recipe may set under `plugins.NAME`."""

    def __init__(self, config: "Plugin.Config"):
        super().__init__()
        self.config = config

    def companions(self) -> dict[str, tuple[str, ...]]:
        """Map hooks of this plugin to others of its own that must be bound with them; wiring refuses the one without the other.

        A loss that reads `extras` needs its own `quantize`, a search that needs its own kind of codebook `make_codebook`.
        """
        return {}

    def loss_names(self) -> tuple[str, ...]:
        """Name the losses of `reconstruction_loss` and `discriminator_loss` that another plugin may watch."""
        return ()

    def named_stages(self) -> dict[str, tuple[str, ...]]:
        """Map fields to the stages, or patterns of their names, of which they speak; wiring refuses one that nobody has."""
        return {}

    def watched_losses(self) -> tuple[str, ...]:
        """Name the losses whose epoch means `stage_transition` reads; wiring refuses a stage in which nobody returns one."""
        return ()


def check_weights(config: Any, *names: str) -> None:
    """Raise ValueError for a field of a plugin's Config that is negative, infinite or NaN."""
    for name in names:
        value = getattr(config, name)
        if not (isfinite(value) and value >= 0):
            raise ValueError(f"{name}: {value!r} must be a finite number, not negative")


@dataclass
class Quantized:
    """Carry what `quantize` returns.

    codes [B, N, D] are the chosen vectors, float32; indices [B, N] or [B, N, Q] int64, or None if not discrete; extras
    are tensors [B, ...] that a method hands on to its own other hooks.
    """

    codes: Tensor
    indices: Tensor | None
    extras: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Say where in the run a hook is called.

    step counts optimizer steps completed since the run's start, step_in_stage those of this stage; epoch and
    epoch_in_stage count epochs completed before the present one. ends_epoch says that a step is the last of its epoch;
    then, in `refresh_codes` and `stage_transition`, means holds each loss's mean over the epoch and all processes.
    """

    step: int
    epoch: int
    stage: str
    step_in_stage: int
    epoch_in_stage: int
    steps_per_epoch: int
    means: Mapping[str, float] = field(default_factory=dict)
    ends_epoch: bool = False
