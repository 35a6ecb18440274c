"""stage_transition: end a stage when it has done its work."""

from dataclasses import dataclass

from vqzoo import Plugin, check_weights, hookimpl


class Enough(Plugin):
    """Enough: a stage is over when the epoch mean of the commitment loss is below a bound."""

    @dataclass
    class Config:
        commitment: float = 0.01

        def __post_init__(self):
            check_weights(self, "commitment")

    def watched_losses(self):
        return ("commitment",)

    @hookimpl
    def stage_transition(self, progress):
        found = progress.means["commitment"]
        return f"a commitment loss of {found:.3g}" if found < self.config.commitment else None
