"""What two processes do one after the other in one launch, since starting them takes longer than the runs.

A script, started on each process by a launcher: `scenarios.py FOLDER`, in which recipe files lie. Each scenario trains into
FOLDER/NAME; how it ended stands in FOLDER/NAME_RANK.json as the exception's type, text and status.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from plugins_for_tests import Probe, rank, with_test_plugins

from vqzoo import sources
from vqzoo.recipe import load_recipe
from vqzoo.trainer import Trainer

METHODS = ("vq", "simvq", "nsvq", "ema", "fsq", "rotation", "residual", "entropy", "factorized")
BASES = ("vq", "simvq", "ema")  # of runs with everything else that keeps state


def job(folder, recipe, name, *overrides, **how):
    return Trainer(load_recipe(str(folder / f"{recipe}.yaml"), list(overrides)), folder / name, **how)


def whole(base):
    def scenario(folder):
        job(folder, f"whole_{base}", f"whole_{base}").run()

    return named(f"whole_{base}", scenario)


def signalled(base):
    """Let the second process alone receive SIGTERM amid the accumulation of step 4."""
    def scenario(folder):
        trainer = job(folder, f"whole_{base}", f"signalled_{base}")
        calls = []

        def listen(progress, **_):
            if progress is not None and progress.step == 4 and rank() == 1:
                calls.append(1)
                if len(calls) == 2:
                    signal.raise_signal(signal.SIGTERM)

        Probe.listeners["quantize"] = listen
        trainer.run()

    return named(f"signalled_{base}", scenario)


def resumed(base):
    def scenario(folder):
        if rank() == 0:
            shutil.copytree(folder / f"signalled_{base}", folder / f"resumed_{base}")
        torch.distributed.barrier()
        job(folder, f"whole_{base}", f"resumed_{base}", resume="auto").run()

    return named(f"resumed_{base}", scenario)


def named(name, scenario):
    scenario.__name__ = name
    return scenario


def widened(folder):
    """Go on with two processes from what one has begun."""
    job(folder, "plain_nsvq", "widened", resume="auto").run()


def narrowed(folder):
    """Begin with two processes what one will go on with."""
    trainer = job(folder, "plain_nsvq", "narrowed")
    Probe.listeners["refresh_codes"] = lambda progress, **_: (
        signal.raise_signal(signal.SIGTERM) if progress.step == 2 and rank() == 0 else None)
    trainer.run()


def diverged(folder):
    """Let a plugin change the codebook on one process."""
    trainer = job(folder, "plain_vq", "diverged", "log.steps=1")

    def push(codebook, progress, **_):
        if progress.step == 1 and rank() == 1:
            codebook.weight[3, 2] += 1e-7

    Probe.listeners["refresh_codes"] = push
    trainer.run()


def poisoned(folder):
    """Let the second process meet a gradient that is not finite, and skip the update on both."""
    trainer = job(folder, "plain_vq", "poisoned", "guard.policy=skip")

    def poison(result, progress, **_):
        bad = rank() == 1 and trainer.counters.batches == 2
        return [{"l1": result[0]["l1"] * torch.nan}] if bad else None

    Probe.listeners["reconstruction_loss"] = poison
    trainer.run()


def unreadable(folder):
    """Let the second process lose its images."""
    from vqzoo import DataError

    trainer = job(folder, "plain_vq", "unreadable", "checkpoint.epochs=9")
    batches, lost = trainer._next_batches, ([], DataError("a worker died"))
    trainer._next_batches = lambda: lost if trainer.counters.step == 3 and rank() == 1 else batches()
    trainer.run()


def locked(folder):
    """Open a run that another process, the test's, is writing to."""
    job(folder, "plain_vq", "locked", resume="auto")


SCENARIOS = [
    *(kind(base) for base in BASES for kind in (whole, signalled, resumed)),
    widened, narrowed, diverged, poisoned, unreadable, locked,
]


def method(name):
    def scenario(folder):
        job(folder, f"plain_{name}", f"two_{name}").run()

    return named(f"two_{name}", scenario)


def main(folder):
    sources.entry_points = with_test_plugins
    torch.cuda.is_available = lambda: False
    for scenario in [*SCENARIOS, *map(method, METHODS)]:
        ended = {"type": None}
        try:
            scenario(folder)
        except Exception as error:
            ended = {"type": type(error).__name__, "text": str(error), "status": getattr(error, "status", None)}
        Probe.listeners.clear()
        (folder / f"{scenario.__name__}_{rank()}.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    os.environ["VQZOO_OFFLINE"] = "1"
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
