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
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch

from vqzoo.bench import peers
from vqzoo.bench.clock import Conditions, circumstances, fit, number, resident, table, threads_for
from vqzoo.bench.peers import DATA, MODULES, OURS, Cell, Method, describe, obstacle, rivals

HEADLINE = (16384, 65536, 128)
GOALS = {"search": 128e6, "loss": 300e6}
"""Bytes beyond inputs and gradient that the operations may take at that N, K and D."""


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
        cells.append(peers.search_cell(conditions(options), search_methods(options), *size))
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
        cells.append(peers.loss_cell(conditions(options), loss_methods(options), options.temperature, *size))
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


def conditions(options: argparse.Namespace) -> Conditions:
    return Conditions(options.device, options.rounds, options.seed, options.threads, options.free)


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


# ---- memory


def needed(options: argparse.Namespace, kind: str, name: str, method: Method, size: tuple[int, int, int]) -> dict:
    """Return the bytes that a method holds beyond inputs and gradient: measured, or computed where it does not fit."""
    for why, what in obstacle(conditions(options), method, size):
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


# ---- what is told


def emit(options: argparse.Namespace, **content: Any) -> dict:
    """Print a benchmark's numbers, and how they were made, as one line of JSON; append it to a file if wanted."""
    said = {key: value for key, value in vars(options).items() if key not in ("run", "json", "name") and value is not None}
    row = {"benchmark": options.name, "options": said, **content, **circumstances(options.device, MODULES)}
    line = json.dumps(row, allow_nan=False)
    print(line)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        with options.json.open("a") as file:
            file.write(line + "\n")
    return row


if __name__ == "__main__":
    sys.exit(main())
