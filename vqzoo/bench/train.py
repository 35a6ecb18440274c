"""Suites that train: plan the cells, run those that are not done, and report."""

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from vqzoo.bench import report, workers
from vqzoo.bench.cells import (
    RESULTS,
    Cell,
    Row,
    initial_network,
    is_done,
    key_of,
    label,
    plan,
    read_rows,
    row_of,
    write_rows,
)
from vqzoo.bench.speed import quantizer_times
from vqzoo.bench.suite import Suite
from vqzoo.errors import Interrupted, UserError
from vqzoo.evaluation.report import hardware, to_json, written
from vqzoo.files import write_text
from vqzoo.recipe import Recipe

SPEED, LENGTHS = "speed.json", "lengths.json"
SHORT, LONG = 1, 3
"""Steps of an epoch in the two runs that tell how long a step takes; what both have beside steps cancels out."""


def train(suite: Suite, options: argparse.Namespace) -> int:
    """Run a suite's cells into a folder, or go on there, and write its report; return 1 if a cell failed."""
    out = Path(options.out or f"runs/bench/{suite.name}{'-quick' if suite.quick else ''}")
    bench = Bench(suite, options, out)
    with bench.locked():
        bench.run()
        bench.measure()
        print(bench.report())
    return int(any(row["status"] == "failed" for row in bench.rows))


class Bench:
    """A suite at work in a folder: results.jsonl has a line per cell, whichever call of the command it came from."""

    def __init__(self, suite: Suite, options: argparse.Namespace, out: Path):
        self.suite, self.options, self.out = suite, options, out
        self.places = workers.Places.of(options.jobs)
        device = torch.device("cuda" if self.places.gpus else "cpu")
        self.hardware = hardware(device, 1) | {"threads": self.places.threads, "jobs": self.places.jobs}
        self.cells = self._plan({})
        self.rows = self._read(out / RESULTS)
        self.others = [row for path in options.also for row in self._read(Path(path), must_be=True)]
        alien = {row["suite"] for row in [*self.rows, *self.others]} - {suite.name}
        if alien:
            raise UserError(f"{out}: holds results of the suite {', '.join(alien)}; name another folder with --out")

    def locked(self) -> FileLock:
        """Make the folder, and keep it for this process."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.out / ".lock", timeout=0)
            lock.acquire()
        except Timeout as error:
            raise UserError(f"--out: {self.out} is in use by another `vqzoo bench`") from error
        except OSError as error:
            raise UserError(f"--out: {self.out} cannot be used: {error}") from error
        return lock

    def _read(self, path: Path, must_be: bool = False) -> list[Row]:
        path = path / RESULTS if path.is_dir() else path
        if must_be and not path.exists():
            raise UserError(f"--also: {path}: no such file")
        return read_rows(path)

    def _plan(self, lengths: dict[str, int]) -> list[Cell]:
        return plan(self.suite, self.options.overrides, self.options.data, self.out, lengths)

    # ---- running

    def run(self) -> None:
        """Run the cells that are not done; what is known is in results.jsonl after each."""
        if self.suite.budget.seconds is not None:
            self.cells = self._plan(self._lengths())
        known = {key_of(row): row for row in self.rows}
        todo = [cell for cell in self.cells if not is_done(cell, known.get(cell.key))]
        self._refuse_mixture([row for row in self.rows if row["status"] == "finished"], todo)
        self.total, self.done, self.spent = len(self.cells), len(self.cells) - len(todo), 0.0
        if self.done:
            self._say(f"{self.done} of {self.total} cells are done already")
        self.began, self.todo = time.monotonic(), len(todo)
        workers.run(todo, self.places, self.options.plugin_file, self._ended)

    def _refuse_mixture(self, rows: list[Row], todo: list[Cell]) -> None:
        """Refuse to add cells of this machine to those of another."""
        for row in rows if todo and not self.options.mixed else []:
            if row["hardware"] != self.hardware:
                raise UserError(f"{self.out}: {key_of(row)[0]} ran on {row['hardware']}, and this is {self.hardware}, so what "
                                "they take cannot be compared; name another folder with --out, or give --mixed to have it "
                                "marked")

    def _ended(self, cell: Cell, error: str | None, seconds: float) -> None:
        try:
            network = initial_network(cell.recipe)
        except Exception:  # which the cell has said itself
            network = None
        try:
            row = row_of(cell, self.suite, self.hardware, network, error)
        except (OSError, ValueError, KeyError) as problem:
            row = row_of(cell, self.suite, self.hardware, network, f"its results cannot be read: {problem!r}")
        kept = [other for other in self.rows if key_of(other) != cell.key]
        self.rows = sorted([*kept, row], key=self._place)
        write_rows(self.out / RESULTS, self.rows)
        self.done += 1
        self._hparams(row)
        left = (time.monotonic() - self.began) / (self.done - (self.total - self.todo)) * (self.total - self.done)
        self._say(f"[{self.done}/{self.total}] {cell.name}: {_summary(row)}, {seconds:.0f} s; {left / 60:.0f} min left")

    def _place(self, row: Row) -> tuple:
        order = [*self.suite.config.variants, *self.suite.variants]
        points = list(self.suite.config.points)
        return (order.index(row["variant"]) if row["variant"] in order else len(order),
                points.index(row["point"]) if row["point"] in points else -1, row["seed"])

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    # ---- a budget of seconds

    def _lengths(self) -> dict[str, int]:
        """Return the steps of an epoch with which each variant takes the budget's seconds; measured once for a folder."""
        path = self.out / LENGTHS
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if any(entry["hardware"] != self.hardware for entry in found.values()):
            raise UserError(f"{path}: steps were timed on other hardware; name another folder with --out")
        for cell in self.cells:
            name = label(cell.variant, cell.point)
            if name not in found:
                seconds = self._step_seconds(cell)
                steps = max(1, round(self.suite.budget.seconds / seconds / cell.recipe.epochs))
                found[name] = {"step_seconds": seconds, "epoch_steps": steps, "hardware": self.hardware}
                self._say(f"{name}: {seconds:.3f} s a step, {steps * cell.recipe.epochs} steps in "
                          f"{self.suite.budget.seconds:g} s")
                write_text(path, to_json(found))
        return {name: entry["epoch_steps"] for name, entry in found.items()}

    def _step_seconds(self, cell: Cell) -> float:
        """Return the seconds of a step over the whole of a run, from a short and a longer one."""
        seconds = []
        with tempfile.TemporaryDirectory() as folder:
            for length in (SHORT, LONG):
                recipe = replace(cell.recipe, epoch_steps=length)
                trial = replace(cell, recipe=recipe, folder=Path(folder, str(length)))
                workers.run([trial], replace(self.places, jobs=1), self.options.plugin_file, _must_work)
                seconds.append(json.loads((trial.folder / "run" / "metrics.json").read_text())["run"]["seconds"])
        return max(1e-4, (seconds[1] - seconds[0]) / ((LONG - SHORT) * cell.recipe.epochs))

    # ---- what the codebook's part takes

    def measure(self) -> None:
        """Time the codebook's part of every variant's step side by side; once for a folder and its variants."""
        recipes: dict[str, Recipe] = {label(cell.variant, cell.point): cell.recipe for cell in reversed(self.cells)}
        base = label(self.suite.baseline, next(iter(self.suite.points), None))
        recipes = {name: recipes[name] for name in sorted(recipes, key=lambda name: name != base)}
        path = self.out / SPEED
        self.speed = json.loads(path.read_text()) if path.exists() else {}
        machine = {**self.hardware, "threads": 1, "jobs": 1}
        if self.speed.get("hardware") == machine and recipes.keys() <= self.speed["variants"].keys():
            return
        self._say("timing the codebook's part of a step, all variants side by side")
        device = torch.device("cuda" if self.places.gpus else "cpu")
        try:
            found = quantizer_times(recipes, device, rounds=5, seed=0)
        except (Interrupted, UserError):
            raise
        except Exception as error:  # the cells stand without it
            self._say(f"the codebook's part cannot be timed: {error!r}")
            return
        self.speed = {"hardware": machine, "baseline": base, "variants": found}
        write_text(path, to_json(self.speed))

    # ---- telling

    def report(self) -> str:
        """Write the reports and TensorBoard's table, and return the tables for the terminal."""
        rows = [*self.rows, *self.others]
        known = self.suite.variants
        for row in rows:
            known.setdefault(row["variant"], {})
        order = [*self.suite.config.variants, *known]
        self.suite.variants = {name: known[name] for name in dict.fromkeys(order) if name in known}
        text = report.write(self.suite, rows, self.speed, self.out, self.options.mixed)
        places = [f"  {name:<12} {self.out / file}" for name, file in (
            ("report", "report.html"), ("the same", "report.md"), ("all numbers", RESULTS), ("TensorBoard", "tensorboard"))]
        return "\n".join([text, "", *places])

    def _hparams(self, row: Row) -> None:
        """Write a cell into TensorBoard's table of hyperparameters."""
        from torch.utils.tensorboard.summary import hparams, scalar
        from torch.utils.tensorboard.writer import FileWriter

        folder = self.out / "tensorboard" / Path(row["folder"]).name
        shutil.rmtree(folder, ignore_errors=True)
        recipe, values = row["recipe"], {f"final/{key}": float(value) for key, value in row["values"].items()}
        told = {"variant": row["variant"], "point": str(row["point"]), "seed": row["seed"], "status": row["status"],
                "plugins": "+".join(recipe["plugins"]), "codebook.size": recipe["codebook"]["size"],
                "codebook.width": recipe["codebook"]["width"], "optim.lr": recipe["optim"]["lr"],
                "steps": recipe["epochs"] * (recipe["epoch_steps"] or 0)}
        writer = FileWriter(str(folder))
        try:
            for summary in [*hparams(told, values), *(scalar(tag, value) for tag, value in values.items())]:
                writer.add_summary(summary)
        finally:
            writer.close()


def _must_work(cell: Cell, error: str | None, seconds: float) -> None:
    if error:
        raise UserError(f"{cell.name}: fails, so its steps cannot be timed:\n{error}")


def _summary(row: Row) -> str:
    if row["status"] == "failed":
        return f"FAILED: {row['error'].splitlines()[-1]}"
    shown = [name for name in ("psnr", "usage") if name in row["values"]]
    return ", ".join(f"{name} {written(name, row['values'][name])}" for name in shown)
