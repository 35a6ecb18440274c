"""Running cells: each in a process of its own, several at a time where devices allow, and none stops the others."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vqzoo.bench.cells import Cell
from vqzoo.errors import Interrupted, UserError
from vqzoo.interrupt import StopSignals

PR_SET_PDEATHSIG = 1

LAST_LINES = 30
"""Lines of a failed cell's log that are kept."""

PATIENCE = 120.0
"""Seconds that cells have to save and end when they are told to."""

PAUSE = 0.2
"""Seconds between two looks at the processes."""


@dataclass
class Places:
    """Where cells run: how many at a time, the threads of each, and the GPUs that they take in turn."""

    jobs: int
    threads: int
    gpus: list[str]

    @classmethod
    def of(cls, jobs: int | None) -> "Places":
        """Take one cell per GPU, or one per core of a machine without; `jobs` says otherwise."""
        if jobs is not None and jobs < 1:
            raise UserError(f"--jobs: {jobs} will not do; it must be at least 1")
        gpus = _gpus()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jobs = jobs or len(gpus) or cores
        return cls(jobs, max(1, cores // jobs), gpus)


def _gpus() -> list[str]:
    """Return the GPUs as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return given.split(",")[:count] if given else [str(number) for number in range(count)]


def run(cells: list[Cell], places: Places, plugin_files: list[str], ended: Callable[[Cell, str | None, float], None]) -> None:
    """Run cells and call `ended` with each, its error or None, and its seconds; Interrupted when all were told to stop."""
    waiting, running = list(cells), {}
    with StopSignals() as signals:
        try:
            while waiting or running:
                while waiting and len(running) < places.jobs and not signals.received:
                    cell = waiting.pop(0)
                    slot = next(number for number in range(places.jobs) if number not in running)
                    running[slot] = (cell, _start(cell, places, slot, plugin_files), time.monotonic())
                if signals.received:
                    raise Interrupted("a signal; the same command goes on from here", signals.received)
                time.sleep(PAUSE)
                for slot, (cell, process, began) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        ended(cell, _error(cell, process.returncode), time.monotonic() - began)
        finally:
            _stop([process for _, process, _ in running.values()])


def _stop(processes: list[subprocess.Popen]) -> None:
    """Tell processes to save and end, and kill those that do not."""
    if processes:
        print(f"saving {len(processes)} runs that are under way", file=sys.stderr, flush=True)
    for process in processes:
        process.terminate()
    end = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _start(cell: Cell, places: Places, slot: int, plugin_files: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "vqzoo", "run", str(cell.lay_down()), "--out", str(cell.folder / "run")]
    command += ["--resume", "auto", *(word for file in plugin_files for word in ("--plugin-file", file))]
    environment = {**os.environ, **{name: str(places.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}}
    if places.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = places.gpus[slot % len(places.gpus)]
    with (cell.folder / "log.txt").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True,
                                preexec_fn=_die_with_parent if sys.platform == "linux" else None)


def _die_with_parent() -> None:
    """Have the kernel tell this process to save and end when the one that started it is gone, however that ended."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _error(cell: Cell, status: int) -> str | None:
    """Return what a cell that failed said last, or None."""
    if status == 0 and (cell.folder / "run" / "metrics.json").exists():
        return None
    said = last_lines(cell.folder / "log.txt")
    ended = f"ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"{ended}; see {cell.folder / 'log.txt'}\n{said}".strip()


def last_lines(path: Path) -> str:
    """Return a traceback or the message of vqzoo at the end of a log, or its last lines."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    begins = [number for number, line in enumerate(lines) if line.startswith(("Traceback", "vqzoo: "))]
    return "\n".join(lines[begins[-1] if begins else 0:][-LAST_LINES:])
