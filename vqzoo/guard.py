"""The guard: every update is judged before it is made, and what is not finite stays out of the weights."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqzoo.data import Batch
from vqzoo.errors import NonFiniteError
from vqzoo.files import write_tensors
from vqzoo.ops import all_reduce_sum, gather_names
from vqzoo.sharding import local

USUAL = 100
"""Updates over which the usual size of the losses is averaged."""

UNKNOWN = 20
"""Updates after which the usual size of the losses is known well enough to see a spike."""

MOST_EVIDENCE = 10
"""Bad updates of which a run keeps evidence."""


@dataclass(frozen=True)
class Update:
    """Say which update is judged: that of optimizer step `step`, made of batch `batch`, and what a bad one leaves undone."""

    step: int
    batch: int
    where: str
    spared: str
    watched: bool = False
    """Whether its losses are watched for spikes."""


@dataclass
class Verdict:
    """Say of an update which of its terms were finite [T], and, over all processes, the bad terms and the losses' size [2]."""

    update: Update
    terms: list[str]
    finite: Tensor
    facts: Tensor


class BadUpdate(NonFiniteError):
    """An update that was not made: something of it is not finite, or its losses are a spike."""

    def __init__(self, text: str, update: Update, terms: list[str]):
        super().__init__(text)
        self.update, self.terms = update, terms


class Guard:
    """Judge updates.

    A host that waited for each verdict would let an accelerator run dry. `deferred`, it reads them in `check` alone, and
    until then the device itself holds everything back: `stopped`, a 0-dim 1.0 from the first bad update on, is what a fused
    optimizer takes as its `found_inf`, and `held` undoes other changes. Otherwise `judge` raises at once. `spike`, which
    cannot be deferred, is how many times the usual sum of the losses' magnitudes an update may have.
    """

    def __init__(self, device: torch.device, deferred: bool, spike: float | None = None, processes: int = 1):
        self.stopped, self.deferred = torch.zeros((), device=device), deferred
        self.spike, self.processes = spike, processes
        self.usual, self.seen = 0.0, 0
        self._unread: list[Verdict] = []

    def judge(
        self, update: Update, losses: Mapping[str, Tensor], norms: Mapping[str, Tensor], checks: Mapping[str, Tensor]
    ) -> None:
        """Judge an update by its losses, the norms of its gradients, and checks (0-dim bools), on all processes.

        The keys of losses and checks are what is said of them, in the order in which they came about.
        """
        finite = torch.isfinite(torch.stack([*losses.values(), *norms.values()]))
        finite = torch.cat([torch.stack([*checks.values()]), finite]) if checks else finite
        size = torch.stack([*losses.values()]).double().abs().sum().nan_to_num()
        facts = all_reduce_sum(torch.stack([(~finite).any().double(), size]))
        self.stopped.copy_((self.stopped + facts[0]).clamp(max=1))
        terms = [*checks, *losses, *(f"gradient of {name}" for name in norms)]
        self._unread.append(Verdict(update, terms, finite, facts))
        if not self.deferred:
            self.check()

    def check(self) -> None:
        """Raise BadUpdate for the first bad update, on all processes; waits for the device."""
        verdicts, self._unread = self._unread, []
        facts = torch.stack([verdict.facts for verdict in verdicts]).tolist() if verdicts else []
        for verdict, (bad, size) in zip(verdicts, facts, strict=True):
            if bad:
                self._refuse(verdict)
            if self.spike and verdict.update.watched:
                self._compare(verdict.update, size / self.processes)

    def _refuse(self, verdict: Verdict) -> None:
        """Raise for what is not finite; the processes tell one another what it was."""
        found = [term for term, finite in zip(verdict.terms, verdict.finite.tolist(), strict=True) if not finite]
        causes = [term for term in found if not term.startswith("gradient")]
        found = list(dict.fromkeys(gather_names(causes or found[:3])))
        named = ", ".join([name for name in found if not name.startswith("gradient")][:3] or found[:3])
        raise BadUpdate(f"{verdict.update.where}: {named} is not finite; {verdict.update.spared}", verdict.update, found)

    def _compare(self, update: Update, size: float) -> None:
        """Raise for a spike; else let the usual size follow."""
        if self.seen >= UNKNOWN and size > self.spike * self.usual:
            raise BadUpdate(f"{update.where}: the losses are a spike: their magnitudes sum to {size:.4g}, and usually to "
                            f"{self.usual:.4g} (guard.spike: {self.spike:g} times); {update.spared}", update, ["spike"])
        self.seen += 1
        self.usual += (size - self.usual) / min(self.seen, USUAL)

    def forget(self) -> None:
        """Begin to learn the usual size anew, as where a stage brings other losses."""
        self.usual, self.seen = 0.0, 0

    def forgive(self) -> None:
        """Let updates be made again after a bad one was dealt with."""
        self.stopped.zero_()

    @contextmanager
    def held(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Undo on the device what a block does to tensors, should an update before it have been bad."""
        tensors = list(tensors) if self.deferred else []
        before = [tensor.clone() for tensor in tensors]
        yield
        for tensor, value in zip(tensors, before, strict=True):
            torch.where(self.stopped > 0, value, tensor, out=tensor)


def keep_evidence(
    folder: Path, bad: BadUpdate, rank: int, batches: list[Batch], modules: Mapping[str, nn.Module], about: dict[str, Any],
    recipe: str,
) -> Path | None:
    """Write what is needed to see a bad update again: each process's images, the recipe, and a report; None beyond ten.

    folder/step_N_batch_M has batch_rankR.safetensors with images [B, 3, H, W] uint8 and positions [B], report_rankR.json and
    recipe.yaml.
    """
    place = folder / f"step_{bad.update.step:09d}_batch_{bad.update.batch:09d}"
    if not place.exists() and len(list(folder.glob("step_*"))) >= MOST_EVIDENCE:
        return None
    place.mkdir(parents=True, exist_ok=True)
    if batches:
        parts = {"images": [batch.images for batch in batches], "positions": [batch.positions for batch in batches]}
        joined = {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}
        write_tensors(place / f"batch_rank{rank}.safetensors", joined)
    broken = [f"{whose}.{name}" for whose, module in modules.items() for name, tensor in module.state_dict().items()
              if tensor.is_floating_point() and not local(tensor).isfinite().all()]
    report = {"step": bad.update.step, "batch": bad.update.batch, "what": str(bad), "terms": bad.terms,
              "tensors_not_finite": broken, **about}
    (place / f"report_rank{rank}.json").write_text(json.dumps(report, indent=2) + "\n")
    if rank == 0:
        (place / "recipe.yaml").write_text(recipe)
    return place
