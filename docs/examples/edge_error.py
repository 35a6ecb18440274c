"""make_metric: a number of held-out images."""

from torchmetrics import MeanAbsoluteError

from vqzoo import Plugin, hookimpl


class EdgeDifference(MeanAbsoluteError):
    """Compare the differences of neighbouring pixels."""

    def update(self, reconstructions, images):
        for dim in (2, 3):
            super().update(reconstructions.diff(dim=dim).contiguous(), images.diff(dim=dim).contiguous())


class EdgeError(Plugin):
    """Edge error: mean absolute error of the differences of neighbouring pixels, in [0, 1]; less is better."""

    @hookimpl
    def make_metric(self):
        return EdgeDifference()
