"""What is measured, by which protocol, and how often in training."""

import difflib
import math
from dataclasses import dataclass, field
from typing import Any

from vqzoo.errors import UserError, suggestion
from vqzoo.evaluation.protocols import PROTOCOLS
from vqzoo.sources import available, offering

PER_IMAGE = ("psnr", "ssim", "ms_ssim", "lpips_alex", "lpips_squeeze", "lpips_vgg")
OF_CODES = ("usage", "perplexity", "entropy", "bits_per_token")
OF_INCEPTION = ("rfid", "kid", "precision", "recall")
OF_FD = ("fd", "fd_kid", "fd_precision", "fd_recall")
METRICS = (*PER_IMAGE, *OF_CODES, *OF_INCEPTION, *OF_FD, "gfid")
UNPAIRED = ("gfid", *OF_INCEPTION[1:], *OF_FD)
"""The metrics of samples, which are reconstructions of no image: gfid is what rfid is of reconstructions."""

ONE_SIDED = (*PER_IMAGE, *OF_CODES, "rfid", "gfid")
"""Metrics of reconstructions alone, or of samples alone."""

LOWER_IS_BETTER = ("lpips", "rfid", "gfid", "kid", "fd")
"""The first parts of the names of metrics of which less is better; of all others more is."""


@dataclass
class FeaturesConfig:
    """Name any timm network for fd, fd_kid, fd_precision and fd_recall; `size` of its input in pixels, null for the images'."""

    name: str | None = None
    pretrained: bool | str = True
    size: int | None = 224
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return the network's name as metrics carry it, which says so where nothing was learned."""
        return f"{self.name}" if self.pretrained else f"{self.name}_random"


@dataclass
class EvaluateConfig:
    """Say what is measured on held-out images; in training every so many epochs, on so many of them (null: all).

    A metric may be a plugin's, by the plugin's name, whose fields are then args.NAME. The tokenizer that has been the best by
    one metric, by default the first, is kept beside the last.
    """

    protocol: str = "vqzoo"
    metrics: list[str] = field(default_factory=lambda: ["psnr", "ssim", *OF_CODES])
    args: dict[str, Any] = field(default_factory=dict)
    fd: FeaturesConfig = field(default_factory=FeaturesConfig)
    epochs: int = 1
    images: int | None = 256
    best: str | None = None


def check(config: EvaluateConfig, prefix: str = "evaluate.") -> None:
    """Raise a UserError naming the full key, which begins with `prefix`, of what cannot be."""
    if config.protocol not in PROTOCOLS:
        raise UserError(f"{prefix}protocol: {config.protocol!r} is unknown; {suggestion(config.protocol, PROTOCOLS)}")
    for name in config.metrics:
        if name not in METRICS and name not in available():
            choices = [*METRICS, *offering("make_metric")]
            near = difflib.get_close_matches(name.lower(), choices, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"{prefix}metrics: {name!r} is no metric; {hint}metrics: {', '.join(choices)}")
        if (name in UNPAIRED if PROTOCOLS[config.protocol].paired else name not in UNPAIRED) and name in ONE_SIDED:
            raise UserError(f"{prefix}metrics: {name!r} cannot be measured by protocol {config.protocol!r}, which is of "
                            f"{'reconstructions' if PROTOCOLS[config.protocol].paired else 'samples'}")
    for name in config.args:
        if name not in config.metrics or name in METRICS:
            raise UserError(f"{prefix}args.{name}: {name!r} is no plugin's metric among {prefix}metrics")
    wanted = [name for name in config.metrics if name in OF_FD]
    if wanted and not config.fd.name:
        raise UserError(f"{prefix}fd.name: {', '.join(wanted)} needs a network; name one of timm's, as in "
                        f"{prefix}fd.name=vit_large_patch14_dinov2.lvd142m")
    if config.best is not None and config.best not in config.metrics:
        raise UserError(f"{prefix}best: {config.best!r} is not in {prefix}metrics; {suggestion(config.best, config.metrics)}")
    for name, value in (("epochs", config.epochs), ("images", config.images), ("fd.size", config.fd.size)):
        if value is not None and value < 1:
            raise UserError(f"{prefix}{name}: {value!r} will not do; it must be at least 1")


def better(name: str, value: float, than: float | None) -> bool:
    """Tell whether a metric's value is better than another, or the first that is a number."""
    if math.isnan(value):
        return False
    lower = name.startswith(LOWER_IS_BETTER) and not name.startswith(("fd_precision", "fd_recall"))
    return than is None or (value < than if lower else value > than)
