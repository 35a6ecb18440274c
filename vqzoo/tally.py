"""The tally: what an epoch has added up so far, of which nothing may be lost when a run stops within it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vqzoo.ops import all_reduce_sum, gather_rows


@dataclass
class Tally:
    """Hold the codes' assignments over all processes, and sums of losses of this one.

    counts [K] int64 and losses are since the epoch's start; recent losses, over recent_steps, since the last entry in the log.
    """

    counts: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    recent: dict[str, Tensor] = field(default_factory=dict)
    recent_steps: int = 0
    replaced: int = 0

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add a step's losses."""
        for sums in (self.losses, self.recent):
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.double()
        self.recent_steps += 1

    def means(self, steps: int) -> dict[str, float]:
        """Return the mean of each loss over the steps of an epoch and all processes; called by every process."""
        return _means(self.losses, steps)

    def take_recent(self) -> dict[str, float]:
        """Return the mean of each loss since the last call, over all processes; called by every process."""
        means = _means(self.recent, self.recent_steps)
        self.recent, self.recent_steps = {}, 0
        return means

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it as tensors, the sums [P, L] of each of the processes; called by every process."""
        parts = {"counts": self.counts}
        for kind, sums in (("losses", self.losses), ("recent", self.recent)):
            parts[kind] = gather_rows(_row(sums, self.counts.device)[None])
        return parts

    def state(self) -> dict[str, Any]:
        """Return what goes with the tensors: names and numbers."""
        return {"losses": list(self.losses), "recent": list(self.recent), "recent_steps": self.recent_steps,
                "replaced": int(self.replaced)}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], state: dict[str, Any], rank: int, processes: int) -> "Tally":
        """Return what `tensors` and `state` gave, for one of as many processes or of another number."""
        sums = {}
        for kind in ("losses", "recent"):
            rows = tensors[kind]
            row = rows[rank] if len(rows) == processes else rows.mean(0)
            sums[kind] = dict(zip(state[kind], row, strict=True))
        return cls(tensors["counts"], sums["losses"], sums["recent"], state["recent_steps"], state["replaced"])


def _row(sums: dict[str, Tensor], device: torch.device) -> Tensor:
    return torch.stack([torch.as_tensor(value, device=device) for value in sums.values()]) if sums else torch.zeros(
        0, dtype=torch.float64, device=device)


def _means(sums: dict[str, Tensor], steps: int) -> dict[str, float]:
    if not sums:
        return {}
    device = next(iter(sums.values())).device
    total = all_reduce_sum(torch.cat([_row(sums, device), torch.ones(1, dtype=torch.float64, device=device)]))
    return dict(zip(sums, (total[:-1] / (steps * total[-1])).tolist(), strict=True))
