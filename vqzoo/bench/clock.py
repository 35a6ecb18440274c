"""How things are timed beside one another, how their memory is measured, and how both are told."""

import ctypes
import gc
import multiprocessing
import platform
import random
import re
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

LEAST_SECONDS, MOST_ROUNDS = 2.0, 25
"""More rounds are run than asked for until this much time has passed, since short calls are disturbed the most."""

RATIOS = ("ratio", "ratio_low", "ratio_high")

Seconds = tuple[float, float, float]
"""The processor's, the wall's, and of the processor's those that the system took: mostly to hand out fresh memory."""


@dataclass(frozen=True)
class Conditions:
    """Say how calls are timed: where, in how many rounds at least, with which seed, and in how many free gigabytes."""

    device: str = "cpu"
    rounds: int = 5
    seed: int = 0
    threads: int = 1
    free: float | None = None

    @property
    def kind(self) -> int:
        """Whose seconds count: the processor's (0) on one thread, else the wall's (1)."""
        return 0 if self.threads == 1 else 1

    def available(self) -> float:
        """Return the bytes that a call may take, leaving a fifth to others."""
        if self.free is not None:
            return self.free * 1e9
        if self.device == "cuda":
            return 0.8 * torch.cuda.mem_get_info()[0]
        kilobytes = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
        return 0.8 * 1024 * int(kilobytes[1])


# Time


@contextmanager
def quiet() -> Iterator[None]:
    """Use one thread on the host, and keep what is loaded already out of the garbage collector's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


def paired(calls: dict[str, Any], rounds: int, seed: int, clock: Callable) -> dict[str, list[Any]]:
    """Run every call once a round, in random order; return what the clock says of each round by name."""
    order, shuffle, began = list(calls), random.Random(seed).shuffle, time.perf_counter()
    seconds: dict[str, list[Any]] = {name: [] for name in calls}
    for done in range(max(rounds, MOST_ROUNDS)):
        if done >= rounds and time.perf_counter() - began > LEAST_SECONDS:
            break
        shuffle(order)
        for name in order:
            seconds[name].append(clock(calls[name]))
    return seconds


def clock(device: str, call: Callable) -> Seconds:
    """Return the seconds of a call; on a GPU the device's stand for the processor's and the wall's."""
    return laps(device, [call])[0]


def laps(device: str, calls: Sequence[Callable]) -> list[Seconds]:
    """Return the seconds of each of several calls, made one right after the other."""
    if device == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        torch.empty(2**28, dtype=torch.uint8, device=device).zero_()  # nothing of the last call is left in the cache
        events[0].record()
        for call, event in zip(calls, events[1:], strict=True):
            call()
            event.record()
        events[-1].synchronize()
        took = [begin.elapsed_time(end) / 1e3 for begin, end in zip(events, events[1:], strict=False)]
        return [(seconds, seconds, 0.0) for seconds in took]
    found, before = [], _reading()
    for call in calls:
        call()
        after = _reading()
        found.append(tuple(now - then for now, then in zip(after, before, strict=True)))
        before = after
    return found


def _reading() -> Seconds:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, time.perf_counter(), used.ru_stime


def summarise(seconds: dict[str, list[Seconds]], base: str, kind: int) -> dict[str, dict[str, float]]:
    """Return each call's median times in ms and its ratio to `base` round by round: median, 5 and 95 %.

    kind 0 compares the processor's seconds, 1 the wall's.
    """
    found = {}
    for name, times in seconds.items():
        cpu, wall, system = (1e3 * np.median(times, axis=0)).tolist()
        ratios = [one[kind] / other[kind] for one, other in zip(times, seconds[base], strict=True)]
        figures = dict(zip(RATIOS, np.quantile(ratios, [0.5, 0.05, 0.95]).tolist(), strict=True))
        found[name] = {"ms": (cpu, wall)[kind], "cpu_ms": cpu, "wall_ms": wall, "system_ms": system, **figures}
    return found


def fit(points: list[tuple[float, float, float, float]]) -> dict[str, float | None]:
    """Fit ms = a · N^n · K^k · D^d to (N, K, D, ms) by least squares of logarithms; None along an axis that does not vary.

    Through as many points as there are unknowns every power law goes, so that r2 is None too.
    """
    logs = np.log(np.array(points, dtype=float).reshape(-1, 4))
    axes = [axis for axis in range(3) if len(logs) and np.ptp(logs[:, axis]) > 0]
    found: dict[str, float | None] = dict.fromkeys(("n", "k", "d", "r2"))
    if len(logs) <= len(axes) or not axes:
        return found
    matrix = np.column_stack([logs[:, axes], np.ones(len(logs))])
    solution = np.linalg.lstsq(matrix, logs[:, 3], rcond=None)[0]
    rest, spread = logs[:, 3] - matrix @ solution, logs[:, 3] - logs[:, 3].mean()
    found.update({"nkd"[axis]: float(power) for axis, power in zip(axes, solution, strict=False)})
    found["r2"] = float(1 - rest @ rest / (spread @ spread)) if spread.any() and len(logs) > len(solution) else None
    return found


# Memory


def resident(device: str, fresh: bool = False) -> int:
    """Return the peak of memory in bytes, or what is held now with a fresh start of the peak."""
    if device == "cuda":
        if fresh:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if fresh:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps would hide as much of the peak
        Path("/proc/self/clear_refs").write_text("5")
    name = "VmRSS" if fresh else "VmHWM"
    return 1024 * int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def apart(device: str, function: Callable, *arguments: Any) -> Any:
    """Return what a module's function returns in a process of its own, or in this one on a GPU, which keeps its own books."""
    if device == "cuda":
        return function(*arguments)
    context = multiprocessing.get_context("forkserver")  # after a backward, torch does none in a mere fork
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


# What is told


def number(value: float | None, digits: int | None) -> str:
    """Write a number with so many digits after the point, or with three that count; nothing for None."""
    return "" if value is None else f"{value:.3g}" if digits is None else f"{value:.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Lay rows out in aligned columns; a row may end early."""
    full = [head, *rows]
    widths = [max(len(row[column]) for row in full if len(row) == len(head)) for column in range(len(head))]
    widths[0] = max(len(row[0]) for row in full)
    lines = [[cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in
              enumerate(zip(row, widths, strict=False))] for row in full]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def circumstances(device: str, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Return the date, the hardware and the versions of vqzoo, of what it stands on and of packages."""
    from vqzoo.evaluation.report import hardware  # seconds, which a process that measures memory need not spend
    from vqzoo.recipe import versions

    found = versions([])
    for name in ("numpy", "triton", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {"date": str(date.today()), "hardware": {**hardware(torch.device(device), 1), "cpu": processor()},
            "versions": found}


def processor() -> str:
    """Return the processor's model."""
    path = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    return named[1] if named else platform.processor()


def threads_for(threads: str) -> dict[str, str]:
    """Return the environment in which libraries start so many threads."""
    return {name: threads for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
