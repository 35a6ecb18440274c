"""Kill a run at random moments, again and again, and see that nothing is lost: a campaign of SIGKILL with a seed.

    python benchmarks/kills.py --kills 100 [--seed 0] [--limit 1800] [--recipe FILE] [--folder DIR] [--json FILE]

A run without interruption comes first. Then the same run is started with `--resume auto`, killed after a random time, started
again, and so on; every other kill waits for a checkpoint that is being written. After each kill the newest checkpoint must be
whole and no older than the one before. A run that gets to its end must be the uninterrupted one, bit for bit: tensors, state,
metrics, TensorBoard's curves. Only processes that the campaign started are killed. The last line is one JSON document.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vqzoo import checkpoint, cli
from vqzoo.evaluation.report import hardware, versions_of_metrics

TIMES = ("train/images_per_second", "train/peak_mib")
RECIPE = Path(__file__).with_name("kills") / "tiny.yaml"


class Campaign:
    """Start, kill and compare runs of one recipe below one folder."""

    def __init__(self, arguments: list[str], folder: Path, seed: int, longest: float):
        self.arguments, self.folder, self.random = arguments, folder, random.Random(seed)
        self.whole, self.killed = folder / "whole", folder / "killed"
        self.longest = longest
        self.amid_writing, self.kills, self.ends, self.lost = 0, 0, 0, []

    def start(self, out: Path) -> int:
        """Begin or continue a run in a process of its own, forked so that nothing is imported again."""
        if process := os.fork():
            return process
        log = os.open(self.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        try:
            status = cli.main(["run", *self.arguments, "--out", str(out), "--resume", "auto"])
        finally:
            sys.stderr.flush()
            os._exit(status)

    def uninterrupted(self) -> float:
        """Make the run to compare with; return its seconds."""
        began = time.monotonic()
        if os.waitpid(self.start(self.whole), 0)[1]:
            raise SystemExit(f"the run without interruption failed: see {self.folder / 'log.txt'}")
        return time.monotonic() - began

    def kill_once(self) -> bool:
        """Let the run go on and kill it; False if it came to its end before."""
        before, self.left = self.newest(), self.unfinished()
        process, wait = self.start(self.killed), self.random.uniform(0, self.longest)
        amid = self.kills % 2 == 1
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline or (amid and not self.writing() and time.monotonic() < deadline + 30):
            if os.waitpid(process, os.WNOHANG)[0]:
                self.end()
                return False
            time.sleep(0.0005)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        self.kills += 1
        self.amid_writing += self.writing()
        after = self.newest()
        if after < before:
            raise SystemExit(f"a checkpoint was lost: the newest is of step {after}, and was of {before}")
        self.lost.append(after - before)
        return True

    def writing(self) -> bool:
        """Tell whether a checkpoint is being written, or was when the run was killed."""
        return bool(self.unfinished() - self.left)

    def unfinished(self) -> set[tuple[str, int]]:
        """Return name and time of each checkpoint that is not finished; one may be left from an earlier kill."""
        found = set()
        for path in checkpoint.unfinished(self.killed / "checkpoints"):
            with suppress(FileNotFoundError):  # finished meanwhile
                found.add((path.name, path.stat().st_mtime_ns))
        return found

    def newest(self) -> int:
        """Return the step of the newest checkpoint, which must be whole; 0 without one."""
        for step, path in checkpoint.complete(self.killed / "checkpoints"):
            checkpoint.verify(path)
            return step
        return 0

    def end(self) -> None:
        """Compare a run that came to its end, and clear the place for the next."""
        difference = compare(self.killed, self.whole)
        if difference:
            raise SystemExit(f"after {self.kills} kills the run is not the uninterrupted one: {difference}; see {self.folder}")
        self.ends += 1
        shutil.rmtree(self.killed)


def compare(one: Path, other: Path) -> str:
    """Return what differs between two finished runs; nothing, if they are the same bit for bit."""
    ends = []
    for out in (one, other):
        step, path = next(checkpoint.complete(out / "checkpoints"))
        tensors, manifest = checkpoint.load(path)
        state = manifest["state"]
        state["counters"].pop("seconds")
        for tag in TIMES:
            state["record"].pop(tag, None)
        metrics = json.loads((out / "metrics.json").read_text())["metrics"]
        ends.append({"step": step, "state": state, "metrics": metrics, "curves": curves(out), **flat(tensors),
                     **load_file(out / "tokenizer" / "model.safetensors")})
    names = ends[0].keys() | ends[1].keys()
    return ", ".join(sorted(name for name in names if not same(*(end.get(name) for end in ends))))


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) else one == other


def flat(tensors: checkpoint.Tensors) -> dict[str, torch.Tensor]:
    return {f"{kind}/{name}": value for kind, content in tensors.items() for name, value in content.items()}


def curves(out: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"] if tag not in TIMES}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1800, help="seconds after which no further run is started")
    parser.add_argument("--longest", type=float, default=8, help="a run is killed at most so many seconds after its start")
    parser.add_argument("--recipe", default=str(RECIPE))
    parser.add_argument("--folder", help="where the runs lie; by default a temporary folder, which goes when all is well")
    parser.add_argument("--json", help="also append the result to this file")
    options, overrides = parser.parse_known_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # that a run was restarted is no news here
    folder = Path(options.folder or tempfile.mkdtemp(prefix="vqzoo_kills_"))
    folder.mkdir(parents=True, exist_ok=True)
    campaign = Campaign([options.recipe, *overrides], folder, options.seed, options.longest)
    began, seconds = time.monotonic(), campaign.uninterrupted()
    while campaign.kills < options.kills and time.monotonic() - began < options.limit:
        if campaign.kill_once() and campaign.kills % 10 == 0:
            print(f"{campaign.kills} kills, {campaign.ends} runs ended", file=sys.stderr, flush=True)
    while campaign.killed.exists():  # the last one may go to its end
        os.waitpid(campaign.start(campaign.killed), 0)
        campaign.end()
    result = {"bench": "kills", "recipe": Path(options.recipe).name, "overrides": overrides, "seed": options.seed,
              "kills": campaign.kills, "amid_a_checkpoint": campaign.amid_writing, "ends_equal_bit_for_bit": campaign.ends,
              "kills_without_a_new_checkpoint": campaign.lost.count(0), "seconds": round(time.monotonic() - began, 1),
              "seconds_uninterrupted": round(seconds, 1), "hardware": hardware(torch.device("cpu"), 1),
              "versions": versions_of_metrics() | {"torch": str(torch.__version__)}}
    if not options.folder:
        shutil.rmtree(folder)
    if options.json:
        with open(options.json, "a") as file:
            file.write(json.dumps(result) + "\n")
    print(json.dumps(result))
    return 0 if campaign.kills >= options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
