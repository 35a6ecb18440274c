"""Suites that train: plan the cells, run those that are not done, and report."""

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout

from vqzoo.bench import report, workers
from vqzoo.bench.cells import (
    RESULTS,
    Cell,
    Row,
    differing,
    initial_network,
    key_of,
    label,
    of_plugins,
    plan,
    public,
    read_rows,
    row_of,
    waiting,
    write_rows,
)
from vqzoo.bench.speed import quantizer_times
from vqzoo.bench.suite import Suite
from vqzoo.bench.tables import last_line
from vqzoo.errors import Interrupted, PluginError, UserError
from vqzoo.evaluation.report import hardware, to_json, written
from vqzoo.files import write_text
from vqzoo.recipe import load_recipe

SPEED, LENGTHS = "speed.json", "lengths.json"
SHORT, LONG = 1, 3
"""Steps of an epoch in the two runs that tell how long a step takes; what both have beside steps cancels out."""

OF_A_QUANTIZER = ("plugins", "hooks", "stages", "codebook")
"""The keys of a recipe in which variants differ by their nature."""


def train(suite: Suite, options: argparse.Namespace) -> int:
    """Run a suite's cells into a folder, or go on there, and write its report; return 1 if a cell failed."""
    out = Path(options.out or f"runs/bench/{suite.name}{'-quick' if suite.quick else ''}")
    cells = plan(suite, options.overrides, options.data, out, {})  # a mistake is told before there is a folder
    places = workers.Places.of(options.jobs)
    with _locked(out):
        bench = Bench(suite, options, out, cells, places)
        try:
            bench.run()
        except Interrupted:
            if bench.rows:
                bench.report()
                bench.say(f"{out / 'report.html'} tells of the {len(bench.rows)} cells that have ended")
            raise
        bench.measure()
        for text in bench.report():
            print(text)
    return int(any(row["status"] == "failed" for row in bench.rows))


def _locked(out: Path) -> AcquireReturnProxy:
    """Make the folder, and keep it from others until the block that this opens ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        return FileLock(out / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise UserError(f"--out: {out} is in use by another `vqzoo bench`") from error
    except OSError as error:
        raise UserError(f"--out: {out} cannot be used: {error}") from error


class Bench:
    """A suite at work in a folder: results.jsonl has a line per cell, whichever call of the command it came from."""

    def __init__(self, suite: Suite, options: argparse.Namespace, out: Path, cells: list[Cell], places: workers.Places):
        self.suite, self.options, self.out, self.cells, self.places = suite, options, out, cells, places
        self.device = torch.device("cuda" if places.gpus else "cpu")
        self.hardware = hardware(self.device, 1) | {"threads": places.threads, "jobs": places.jobs}
        self.rows = self._read(out / RESULTS, "--out")
        self.speed: dict[str, Any] = {}
        self.untimed: dict[str, str] = {}
        self.others = [row for path in options.also for row in self._read(Path(path), "--also")]
        self._refuse_other_recipes()

    def _read(self, path: Path, option: str) -> list[Row]:
        """Return the rows of a folder or a file, their own folders as they are found from here."""
        path = path / RESULTS if path.is_dir() else path
        if option == "--also" and not path.exists():
            raise UserError(f"--also: {path}: no such file")
        rows = read_rows(path)
        if alien := {str(row["suite"]) for row in rows} - {self.suite.name}:
            raise UserError(f"{option}: {path} holds results of the suite {', '.join(alien)}, not of {self.suite.name}")
        if option == "--also":
            rows = [{**row, "folder": str((path.parent / row["folder"]).resolve())} for row in rows]
        return rows

    def _refuse_other_recipes(self) -> None:
        """Refuse other results whose recipes differ in more than their quantizers from those beside which they are shown."""
        planned = {(cell.variant, cell.point): public(cell.recipe) for cell in self.cells}
        for row in self.others if not self.options.mixed else []:
            mine = planned.get((row["variant"], row["point"]))
            beside = mine or next((recipe for (_, point), recipe in planned.items() if point == row["point"]), None)
            lines = differing(row["recipe"], beside or row["recipe"], ("seed", *(() if mine else OF_A_QUANTIZER)))
            if lines:
                raise UserError(f"--also: {row['variant']} was trained otherwise than what it is shown beside: "
                                f"{'; '.join(lines)}; give --mixed to have one table all the same")

    # ---- running

    def run(self) -> None:
        """Run the cells that are not done; what is known is in results.jsonl after each."""
        if self.suite.budget.seconds is not None:
            self.cells = plan(self.suite, self.options.overrides, self.options.data, self.out, self._lengths())
        todo, said = waiting(self.cells, self.rows)
        self._refuse_mixture([row for row in self.rows if row["status"] == "finished"], todo)
        for text in said:
            self.say(text)
        again = {cell.key for cell in todo}
        self.rows = [row for row in self.rows if key_of(row) not in again]
        todo = [cell for cell in todo if not self._failed_already(cell)]
        self.done = len(self.cells) - len(todo)
        if self.done:
            self.say(f"{self.done} of {len(self.cells)} cells are done already")
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
        row = self._row(cell, error)
        self._keep(row)
        self.done += 1
        left = (time.monotonic() - self.began) / (self.done - (len(self.cells) - self.todo)) * (len(self.cells) - self.done)
        self.say(f"[{self.done}/{len(self.cells)}] {cell.name}: {_summary(row)}, {seconds:.0f} s; {left / 60:.0f} min left")

    def _row(self, cell: Cell, error: str | None) -> Row:
        if error is None:
            try:
                return row_of(cell, self.suite, self.hardware, initial_network(cell.recipe), None)
            except (OSError, ValueError, KeyError, UserError, PluginError) as problem:
                error = f"its results cannot be read: {problem!r}"
        return row_of(cell, self.suite, self.hardware, None, error)

    def _keep(self, row: Row) -> None:
        kept = [other for other in self.rows if key_of(other) != key_of(row)]
        self.rows = sorted([*kept, row], key=self._place)
        write_rows(self.out / RESULTS, self.rows)
        try:
            self._hparams(row)
        except Exception as problem:  # the row is kept, and that is what counts
            self.say(f"TensorBoard: {problem!r}")

    def _place(self, row: Row) -> tuple:
        order = [*self.suite.config.variants, *self.suite.variants]
        points = list(self.suite.config.points)
        return (order.index(row["variant"]) if row["variant"] in order else len(order),
                points.index(row["point"]) if row["point"] in points else -1, row["seed"])

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    # ---- a budget of seconds

    def _lengths(self) -> dict[str, int]:
        """Return the steps of an epoch with which each variant takes the budget's seconds; they are timed once for a recipe."""
        path = self.out / LENGTHS
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        lengths = {}
        for cell in self.cells:
            name, identity = label(cell.variant, cell.point), cell.identity()
            if name in lengths or name in self.untimed:
                continue
            identity["recipe"].pop("seed")
            identity["recipe"].pop("epoch_steps")
            made = json.loads(to_json({**identity, "hardware": self.hardware}))
            if known.get(name, {}).get("made") != made:
                try:
                    known[name] = {"step_seconds": self._step_seconds(cell), "made": made}
                except Failed as error:
                    self.untimed[name] = str(error)
                    continue
                write_text(path, to_json(known))
            seconds = known[name]["step_seconds"]
            lengths[name] = max(1, round(self.suite.budget.seconds / seconds / cell.recipe.epochs))
            self.say(f"{name}: {seconds:.3g} s a step, so {lengths[name] * cell.recipe.epochs:,} steps")
        return lengths

    def _failed_already(self, cell: Cell) -> bool:
        """Keep a cell as failed if its steps could not be timed."""
        error = self.untimed.get(label(cell.variant, cell.point))
        if error:
            self._keep(row_of(cell, self.suite, self.hardware, None, error))
        return bool(error)

    def _step_seconds(self, cell: Cell) -> float:
        """Return the seconds of a step over a whole run, by a short and a longer one, as many at a time as there will be."""
        seconds = []
        with tempfile.TemporaryDirectory() as folder:
            for length in (SHORT, LONG):
                recipe = replace(cell.recipe, epoch_steps=length)
                trials = [replace(cell, recipe=recipe, folder=Path(folder, f"{length}-{number}"))
                          for number in range(self.places.jobs)]
                workers.run(trials, self.places, self.options.plugin_file, _must_work)
                seconds.append(fmean(json.loads((trial.folder / "run" / "metrics.json").read_text())["run"]["seconds"]
                                     for trial in trials))
        steps = [length * cell.recipe.epochs for length in (SHORT, LONG)]
        found = (seconds[1] - seconds[0]) / (steps[1] - steps[0])
        return found if found > 0 else seconds[1] / steps[1]

    # ---- what the codebook's part takes

    def measure(self) -> None:
        """Time the codebook's part of the steps of all that finished, side by side; once for these recipes and plugins."""
        recipes, made = {}, {}
        for row in self.rows:
            name, file = label(row["variant"], row["point"]), self.out / row["folder"] / "recipe.yaml"
            if row["status"] == "finished" and name not in recipes:
                try:
                    recipes[name] = load_recipe(str(file))
                except UserError as error:  # a plugin's file that is not given this time
                    self.say(f"{name} is not timed: {error}")
                    continue
                made[name] = {"recipe": {**row["recipe"], "seed": 0}, "plugins": of_plugins(row["versions"])}
        path = self.out / SPEED
        base = label(self.suite.config.baseline or self.suite.baseline, next(iter(self.suite.points), None))
        machine = {**self.hardware, "threads": 1, "jobs": 1}
        self.speed = json.loads(path.read_text()) if path.exists() else {}
        if not recipes or self.speed.get("hardware") == machine and self.speed["made"] == json.loads(to_json(made)):
            return
        self.say(f"timing the codebook's part of a step, {len(recipes)} side by side")
        base = base if base in recipes else next(iter(recipes))
        try:
            ordered = {name: recipes[name] for name in sorted(recipes, key=lambda name: name != base)}
            found = quantizer_times(ordered, self.device, rounds=5, seed=0)
        except (Interrupted, UserError):
            raise
        except Exception as error:  # the cells stand without it
            self.say(f"the codebook's part cannot be timed: {error!r}")
            return
        self.speed = {"hardware": machine, "baseline": base, "variants": found, "made": made}
        write_text(path, to_json(self.speed))

    # ---- telling

    def report(self) -> tuple[str, str]:
        """Write the reports; return the tables for the terminal, and where everything is."""
        text = report.write(self.suite, [*self.rows, *self.others], self.speed, self.out, self.options.mixed)
        places = [f"  {name:<12} {self.out / file}" for name, file in (
            ("report", "report.html"), ("the same", "report.md"), ("all numbers", RESULTS), ("TensorBoard", "tensorboard"))]
        return text, "\n".join(["", *places])

    def _hparams(self, row: Row) -> None:
        """Write a cell into TensorBoard's table of hyperparameters."""
        from torch.utils.tensorboard.summary import hparams, scalar
        from torch.utils.tensorboard.writer import FileWriter

        folder = self.out / "tensorboard" / Path(row["folder"]).name
        shutil.rmtree(folder, ignore_errors=True)
        recipe, values = row["recipe"], {f"final/{key}": float(value) for key, value in row["values"].items()}
        point = {} if row["point"] is None else {"point": row["point"]}
        told = {"variant": row["variant"], **point, "seed": row["seed"], "status": row["status"],
                "plugins": "+".join(recipe["plugins"]), "codebook.size": recipe["codebook"]["size"],
                "codebook.width": recipe["codebook"]["width"], "optim.lr": recipe["optim"]["lr"],
                "steps": recipe["epochs"] * (recipe["epoch_steps"] or 0)}
        writer = FileWriter(str(folder))
        try:
            for summary in [*hparams(told, values), *(scalar(tag, value) for tag, value in values.items())]:
                writer.add_summary(summary)
        finally:
            writer.close()


class Failed(Exception):
    """A cell cannot even be timed."""


def _must_work(cell: Cell, error: str | None, seconds: float) -> None:
    if error:
        raise Failed(error)


def _summary(row: Row) -> str:
    if row["status"] == "failed":
        return f"FAILED: {last_line(row['error'])}"
    shown = [name for name in ("psnr", "usage") if name in row["values"]]
    return ", ".join(f"{name} {written(name, row['values'][name])}" for name in shown)
