"""The search and the dense loss against their own matrix products and against other people's: time, memory, exactness.

python benchmarks/kernels.py search [--n 16384] [--k 65536] [--d 128] [--data gauss,vqgan] [--rounds 5] [--threads 1]
python benchmarks/kernels.py sweep  [--n 4096,16384] [--k 1024,8192,65536] [--d 8,32,64,128]
python benchmarks/kernels.py loss   [--n 4096] [--temperature 0.35]
python benchmarks/kernels.py memory [--n 16384]

In a round every method runs once, in random order, ours twice; a ratio is taken round by round, so that what disturbs a round
disturbs both its sides. On one thread a time is the processor's, on several it is the wall's, on a GPU the device's. A table
comes first; the last line is JSON, which --json FILE keeps. Peers come with the extra `bench`; who is missing is named.
"""

import argparse
import ctypes
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from peers import DATA, MODULES, OURS, Method

AGAIN = f"{OURS} again"
HEADLINE = (16384, 65536, 128)
GOALS = {"search": 128e6, "loss": 300e6}
"""Bytes beyond inputs and gradient that the operations may take at that N, K and D."""

LEAST_SECONDS, MOST_ROUNDS = 2.0, 25
"""More rounds are run than asked for until this much time has passed, since short calls are disturbed the most."""

Cell = dict[str, Any]
Seconds = tuple[float, float, float]
"""The processor's, the wall's, and of the processor's those that the system took: mostly to hand out fresh memory."""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    return with_threads(options, __file__, arguments)


def with_threads(options: argparse.Namespace, script: str, arguments: list[str]) -> int:
    """Run what the options ask for, in another process where this one has been started with other threads."""
    threads = str(options.threads)
    if os.environ.get("OMP_NUM_THREADS") != threads:  # libraries look once, as they load
        command = [sys.executable, script, *arguments]
        return subprocess.run(command, env={**os.environ, **threads_for(threads)}).returncode
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.run(options)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="search|sweep|loss|memory")
    for run, n, k, d in ((search, "16384", "65536", "128"), (sweep, "4096,16384", "1024,8192,65536", "8,32,64,128"),
                         (loss, "4096", "65536", "128"), (memory, "16384", "65536", "128"), (measure, None, None, None)):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run, name=run.__name__)
        for axis, default in (("n", n), ("k", k), ("d", d)):
            command.add_argument(f"--{axis}", type=numbers, default=default, metavar="NUMBER[,NUMBER]")
        command.add_argument("--data", type=words, default="gauss", help=f"of {', '.join(DATA)}")
        command.add_argument("--methods", type=words, default=[], help="names from the table; all by default")
        command.add_argument("--temperature", type=float, default=0.35)
        command.add_argument("--backend", help="of ours")
        command.add_argument("--precision", help="of ours")
        command.add_argument("--free", type=float, help="gigabytes that a method may take; what the machine has by default")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        add_common(command)
    return parser.parse_args(arguments)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add what every benchmark of operations and steps can be told."""
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="append the last line to this file")


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def words(text: str) -> list[str]:
    return text.split(",")


# ---- the subcommands


def search(options: argparse.Namespace) -> dict:
    """Time every search at each size and count its flips; the record is printed last."""
    return emit(options, cells=search_cells(options))


def search_cells(options: argparse.Namespace) -> list[Cell]:
    cells = []
    for size in sizes(options):
        cells.append(search_cell(options, *size))
        print(describe(cells[-1], "flips"), flush=True)
    return cells


def sweep(options: argparse.Namespace) -> dict:
    """Search at all sizes of a grid, then fit each method's time to a power of N, K and D."""
    cells = search_cells(options)
    exponents = {name: fit([(cell["n"], cell["k"], cell["d"], found["ms"]) for cell in cells
                            if "ms" in (found := cell["methods"].get(name, {}))]) for name in cells[0]["methods"]}
    print(table(["method", "N", "K", "D", "R²"], [[name, *(number(fitted[axis], 2) for axis in ("n", "k", "d", "r2"))]
                                                  for name, fitted in exponents.items()]))
    faster = [[cell["n"], cell["k"], cell["d"], cell["data"], name, round(found["ratio"], 3)] for cell in cells
              for name, found in rivals(cell) if found["ratio"] < 1]
    print("faster than ours: " + ("; ".join(f"{name} at N={n} K={k} D={d} {data} ({ratio:.2f} of our time)"
                                            for n, k, d, data, name, ratio in faster) or "nobody"))
    return emit(options, cells=cells, exponents=exponents, faster=faster)


def loss(options: argparse.Namespace) -> dict:
    """Time every dense loss with its gradient at each size, and measure both errors."""
    cells = []
    for size in sizes(options):
        cells.append(loss_cell(options, *size))
        print(describe(cells[-1], "loss_error", "gradient_error"), flush=True)
    return emit(options, cells=cells)


def memory(options: argparse.Namespace) -> dict:
    """Measure the most memory that each method holds beyond inputs and gradient, each in a process of its own."""
    cells = []
    for n, k, d in product(options.n, options.k, options.d):
        for kind, methods in (("search", search_methods(options)), ("loss", loss_methods(options))):
            found = {name: needed(options, kind, name, method, (n, k, d)) for name, method in methods.items()
                     if "GEMM" not in name}
            cells.append({"operation": kind, "n": n, "k": k, "d": d, "methods": found})
            rows = [[name, *([number(x["bytes"] / 1e6, 1), x["how"]] if "bytes" in x else ["", *x.values()])]
                    for name, x in found.items()]
            print(f"\n{kind}, N={n} K={k} D={d}\n" + table(["method", "MB", ""], rows))
            if (n, k, d) == HEADLINE and "bytes" in found[OURS]:
                print(f"goal: {GOALS[kind] / 1e6:.0f} MB, {'met' if found[OURS]['bytes'] <= GOALS[kind] else 'MISSED'}")
    return emit(options, cells=cells)


# ---- one size


def sizes(options: argparse.Namespace) -> list[tuple[int, int, int, str]]:
    return [(n, k, d, data) for data, k, d, n in product(options.data, options.k, options.d, options.n)]


def search_methods(options: argparse.Namespace) -> dict[str, Method]:
    found = peers.search_methods(options.device, backend=options.backend, precision=options.precision)
    return chosen(found, options)


def loss_methods(options: argparse.Namespace) -> dict[str, Method]:
    found = peers.loss_methods(options.device, backend=options.backend, precision=options.precision)
    return chosen(found, options)


def chosen(methods: dict[str, Method], options: argparse.Namespace) -> dict[str, Method]:
    wanted = options.methods
    return {name: method for name, method in methods.items() if not wanted or name in (OURS, *wanted)}


@torch.no_grad()
def search_cell(options: argparse.Namespace, n: int, k: int, d: int, data: str) -> Cell:
    latents, vectors = peers.inputs(data, n, k, d, options.seed, options.device)
    nearest = peers.nearest_in_float64(latents, vectors)

    def judge(indices: torch.Tensor) -> dict[str, float]:
        return {"flips": peers.flips(indices, nearest, latents, vectors)}

    return cell(options, search_methods(options), (n, k, d, data), judge, latents, vectors)


def loss_cell(options: argparse.Namespace, n: int, k: int, d: int, data: str) -> Cell:
    latents, vectors = peers.inputs(data, n, k, d, options.seed, options.device)
    indices = peers.nearest_in_float64(latents, vectors)
    true = peers.loss_in_float64(latents, vectors, indices, options.temperature)

    def judge(found: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
        errors = (peers.relative_error(one, other) for one, other in zip(found, true, strict=True))
        return dict(zip(("loss_error", "gradient_error"), errors, strict=True))

    return cell(options, loss_methods(options), (n, k, d, data), judge, latents, vectors, indices, options.temperature)


def cell(options: argparse.Namespace, methods: dict[str, Method], size: tuple, judge: Callable, *arguments: Any) -> Cell:
    """Time all methods that are there and fit, and judge what the first call of each returns."""
    n, k, d, data = size
    found = {name: {why: what} for name, method in methods.items() for why, what in obstacle(options, method, (n, k, d))}
    calls = {name: method.make(*arguments) for name, method in methods.items() if name not in found}
    judged = {name: judge(result) for name, call in calls.items() if (result := call()) is not None}
    calls[AGAIN] = calls[OURS]
    seconds = paired(calls, options.rounds, options.seed, partial(clock, options.device))
    for name, figures in summarise(seconds, OURS, 0 if options.threads == 1 else 1).items():
        found[name] = {**figures, **judged.get(name, {})}
    floor = min((name for name in seconds if "GEMM" in name), key=lambda name: found[name]["ms"], default=None)
    own = None if floor is None else summarise(seconds, floor, 0 if options.threads == 1 else 1)[OURS]
    return {"n": n, "k": k, "d": d, "data": data, "rounds": len(seconds[OURS]), "floor": floor,
            "to_floor": own and [own[key] for key in RATIOS],
            "methods": {name: found[name] for name in (*methods, AGAIN)}}


def obstacle(options: argparse.Namespace, method: Method, size: tuple[int, int, int]) -> Iterable[tuple[str, str]]:
    """Yield why a method cannot run here, if so."""
    if method.missing():
        yield "missing", f"{method.package} is not installed"
    elif options.device == "cuda" and not method.cuda:
        yield "skipped", "it has no GPU"
    elif (needs := method.bytes(*size)) > (free := available(options)):
        yield "skipped", f"needs {needs / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"


def available(options: argparse.Namespace) -> float:
    """Return the bytes that a method may take, leaving a fifth to others."""
    if options.free is not None:
        return options.free * 1e9
    if options.device == "cuda":
        return 0.8 * torch.cuda.mem_get_info()[0]
    kilobytes = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
    return 0.8 * 1024 * int(kilobytes[1])


# ---- time


def paired(calls: dict[str, Callable], rounds: int, seed: int, clock: Callable) -> dict[str, list[Seconds]]:
    """Run every call once a round, in random order; return the seconds of each round by name."""
    order, shuffle, began = list(calls), random.Random(seed).shuffle, time.perf_counter()
    seconds: dict[str, list[Seconds]] = {name: [] for name in calls}
    for done in range(max(rounds, MOST_ROUNDS)):
        if done >= rounds and time.perf_counter() - began > LEAST_SECONDS:
            break
        shuffle(order)
        for name in order:
            seconds[name].append(clock(calls[name]))
    return seconds


def clock(device: str, call: Callable) -> Seconds:
    """Return the seconds of a call; on a GPU the device's stand for the processor's and the wall's."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.empty(2**28, dtype=torch.uint8, device=device).zero_()  # nothing of the last call is left in the cache
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, begin.elapsed_time(end) / 1e3, 0.0
    before, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    call()
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
    system = after.ru_stime - before.ru_stime
    return after.ru_utime - before.ru_utime + system, wall, system


RATIOS = ("ratio", "ratio_low", "ratio_high")


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
    """Fit ms = a · N^n · K^k · D^d to (N, K, D, ms) by least squares of logarithms; None along an axis that does not vary."""
    logs = np.log(np.array(points, dtype=float).reshape(-1, 4))
    axes = [axis for axis in range(3) if len(logs) and np.ptp(logs[:, axis]) > 0]
    found: dict[str, float | None] = dict.fromkeys(("n", "k", "d", "r2"))
    if len(logs) <= len(axes) or not axes:
        return found
    matrix = np.column_stack([logs[:, axes], np.ones(len(logs))])
    solution = np.linalg.lstsq(matrix, logs[:, 3], rcond=None)[0]
    rest, spread = logs[:, 3] - matrix @ solution, logs[:, 3] - logs[:, 3].mean()
    found.update({"nkd"[axis]: float(power) for axis, power in zip(axes, solution, strict=False)})
    found["r2"] = float(1 - rest @ rest / (spread @ spread)) if spread.any() else None
    return found


# ---- memory


def needed(options: argparse.Namespace, kind: str, name: str, method: Method, size: tuple[int, int, int]) -> dict:
    """Return the bytes that a method holds beyond inputs and gradient: measured, or computed where it does not fit."""
    for why, what in obstacle(options, method, size):
        return {why: what} if why == "missing" else {"bytes": method.bytes(*size), "how": f"computed: {what}"}
    command = [sys.executable, __file__, "measure", "--methods", f"{kind},{name}", "--temperature", str(options.temperature),
               "--threads", str(options.threads), "--device", options.device, "--seed", str(options.seed)]
    command += [part for axis, value in zip("nkd", size, strict=True) for part in (f"--{axis}", str(value))]
    command += [part for key in ("backend", "precision") if (value := getattr(options, key))
                for part in (f"--{key}", value)]
    environment = {**os.environ, **threads_for(str(options.threads))}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": f"ended with {done.returncode}; see its error above"}
    return {"bytes": int(done.stdout.split()[-1]), "how": "measured"}


def measure(options: argparse.Namespace) -> None:
    """Print the bytes that one method holds at most, beyond its inputs and a loss's gradient; for a process of its own."""
    kind, name = options.methods
    (n,), (k,), (d,) = options.n, options.k, options.d
    options.methods = [name]
    methods = search_methods(options) if kind == "search" else loss_methods(options)
    calls = []
    for rows, codes in ((min(n, 64), min(k, 64)), (n, k)):  # the small call loads what is loaded once
        latents, vectors = peers.inputs("gauss", rows, codes, d, options.seed, options.device)
        more = () if kind == "search" else (torch.arange(rows, device=options.device) % codes, options.temperature)
        calls.append(methods[name].make(latents, vectors, *more))
        if len(calls) == 1:
            calls[0]()
    before = resident(options.device, fresh=True)
    with torch.set_grad_enabled(kind == "loss"):
        result = calls[-1]()
    peak = resident(options.device) - before
    print(max(0, peak - (4 * k * d if kind == "loss" and result is not None else 0)))


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


def threads_for(threads: str) -> dict[str, str]:
    return {name: threads for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


# ---- what is told


def rivals(cell: Cell) -> list[tuple[str, dict]]:
    """Return the timed methods of a cell that are neither ours nor a bare matrix product."""
    return [(name, found) for name, found in cell["methods"].items()
            if "ms" in found and name not in (OURS, AGAIN) and "GEMM" not in name]


def describe(cell: Cell, *judged: str) -> str:
    """Lay one size out as a table and say how ours stands to its own matrix product."""
    rows = []
    for name, found in cell["methods"].items():
        if "ms" not in found:
            rows.append([name, *found.values()])
            continue
        spread = f"{found['ratio']:.3f} ({found['ratio_low']:.3f}-{found['ratio_high']:.3f})"
        errors = [number(found.get(key), 0 if key == "flips" else None) for key in judged]
        rows.append([name, number(found["cpu_ms"], 1), number(found["wall_ms"], 1), number(found["system_ms"], 1), spread,
                     *errors])
    head = ["method", "cpu ms", "wall ms", "system ms", "time / ours (5-95 %)", *(key.replace("_", " ") for key in judged)]
    text = f"\nN={cell['n']} K={cell['k']} D={cell['d']} {cell['data']}\n{table(head, rows)}"
    if cell["floor"]:
        ratio, low, high = cell["to_floor"]
        text += f"\nours / {cell['floor']}: {ratio:.3f} ({low:.3f}-{high:.3f})"
    return text


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


def emit(options: argparse.Namespace, **content: Any) -> dict:
    """Print a benchmark's numbers, and how they were made, as one line of JSON; append it to a file if wanted."""
    from vqzoo.evaluation.report import hardware  # seconds, which a process that measures memory need not spend

    said = {key: value for key, value in vars(options).items() if key not in ("run", "json", "name") and value is not None}
    row = {"benchmark": options.name, "date": str(date.today()), "options": said, **content,
           "hardware": {**hardware(torch.device(options.device), 1), "cpu": processor()}, "versions": all_versions()}
    line = json.dumps(row, allow_nan=False)
    print(line)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        with options.json.open("a") as file:
            file.write(line + "\n")
    return row


def processor() -> str:
    """Return the processor's model."""
    path = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    return named[1] if named else platform.processor()


def all_versions() -> dict[str, str]:
    """Return the versions of vqzoo, of what it stands on and of the peers."""
    from vqzoo.recipe import versions

    found = versions([])
    for name in ("numpy", "triton", *MODULES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    sys.exit(main())
