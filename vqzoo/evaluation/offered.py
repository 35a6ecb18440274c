"""Metrics that plugins offer, beside the host's own."""

from typing import Any

import torch
from torch import Tensor, nn

from vqzoo.caller import kind_of
from vqzoo.errors import PluginError, UserError
from vqzoo.evaluation.config import METRICS, EvaluateConfig
from vqzoo.instance import through_door


class OfferedMetric:
    """Hold the metric that a plugin's make_metric gave: a torchmetrics.Metric of reconstructions and images in [0, 1]."""

    def __init__(self, name: str, fields: Any, key: str, device: torch.device):
        hooks = through_door("make_metric", name, fields, key)
        self.name, self.said = name, hooks.served("make_metric")
        self.metric = hooks.answer("make_metric", hooks.make_metric(), nn.Module).to(device)
        if lacking := [part for part in ("update", "compute", "reset") if not callable(getattr(self.metric, part, None))]:
            raise PluginError(f"{self.said}, returned {kind_of(self.metric)} without {', '.join(lacking)} where a "
                              "torchmetrics.Metric is expected")

    @property
    def higher_is_better(self) -> bool | None:
        return getattr(self.metric, "higher_is_better", None)

    @property
    def keeps_lists(self) -> bool:
        """Whether torchmetrics gathers lists, of which a process without images has none and knows neither shape nor type."""
        states = (getattr(part, "metric_state", {}) for part in self.metric.modules())
        return any(isinstance(value, list) for state in states for value in state.values())

    def add(self, images: Tensor, reconstructions: Tensor) -> None:
        """Add pairs [B, 3, H, W] as levels 0 to 255."""
        try:
            self.metric.update(reconstructions / 255, images / 255)
        except Exception as error:
            raise PluginError(f"{self.said}: the metric's update raised {type(error).__name__}: {error}") from error

    def results(self) -> dict[str, float]:
        """Return the metric over all processes by name; each process calls it."""
        try:
            found = self.metric.compute()
        except Exception as error:
            raise PluginError(f"{self.said}: the metric's compute raised {type(error).__name__}: {error}") from error
        values = {f"{self.name}_{key}": v for key, v in found.items()} if isinstance(found, dict) else {self.name: found}
        try:
            return {name: float(value) for name, value in values.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise PluginError(f"{self.said}: the metric's compute gave {kind_of(found)} where a number, or a dict of numbers, "
                              "is expected") from error


def offered_metrics(config: EvaluateConfig, device: torch.device, prefix: str) -> dict[str, OfferedMetric]:
    """Make the metrics of a configuration that are not the host's own."""
    names = [name for name in config.metrics if name not in METRICS]
    found = {name: OfferedMetric(name, config.args.get(name, {}), f"{prefix}args.{name}", device) for name in names}
    if config.best in found and found[config.best].higher_is_better is None:
        raise UserError(f"{prefix}best: {config.best!r} does not say which of its values are better (higher_is_better)")
    return found
