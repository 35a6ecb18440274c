"""Cells: a variant at a point with a seed, its recipe, and what its run left."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch

from vqzoo.bench.suite import Suite
from vqzoo.errors import UserError
from vqzoo.files import write_text
from vqzoo.prepare import build
from vqzoo.recipe import Recipe, differences, load_recipe, named_plugins, plain, to_yaml, versions

RESULTS = "results.jsonl"
SET_HERE = {"seed": "--seeds", "epoch_steps": "--steps or --seconds"}
"""Keys of a recipe that are the suite's to set, and where."""

PEAK = "train/peak_mib"
"""The curve whose largest value is the memory of a cell."""

NEXT_TO_CODES = ("head.", "conv_in.0.", "embed.")
"""The layers of encoder and decoder whose shape follows the codebook's width."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of a suite; `folder` holds its recipe, its log and the folder of its run."""

    variant: str
    point: str | None
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def key(self) -> tuple[str, str | None, int]:
        return self.variant, self.point, self.seed

    @property
    def name(self) -> str:
        return f"{self.variant}{f' at {self.point}' if self.point is not None else ''}, seed {self.seed}"

    def lay_down(self) -> Path:
        """Write the recipe for the process that runs it, and return its file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "recipe.yaml", to_yaml(self.recipe))
        return self.folder / "recipe.yaml"


def plan(suite: Suite, overrides: Iterable[str], data: str | None, out: Path, lengths: dict[str, int]) -> list[Cell]:
    """Return every cell with its recipe, all variants of a seed before the next; a UserError names a mistake before any run.

    `lengths` are the steps of an epoch by a variant and point, where the budget is one of seconds.
    """
    given = [] if data is None else ["data.name=folder", f"data.root={json.dumps(data)}"]
    for key, where in SET_HERE.items():
        if any(word.partition("=")[0].strip() == key for word in overrides):
            raise UserError(f"{key}: a suite sets this itself; see {where}")
    if suite.config.metrics is not None:
        given.append(f"evaluate.metrics={json.dumps(suite.config.metrics)}")
    if suite.config.protocol is not None:
        given.append(f"evaluate.protocol={suite.config.protocol}")
    recipes = {}
    for variant, point in product(suite.variants, suite.points or [None]):
        base, over = suite.recipe_of(variant, point)
        try:
            recipe = load_recipe(base, [*given, *overrides], over)
        except UserError as error:
            raise UserError(f"{suite.path}: {label(variant, point)}: {str(error).removeprefix(f'{suite.path}: ')}") from error
        length = lengths.get(label(variant, point)) or _epoch_steps(suite, recipe)
        recipes[variant, point] = replace(recipe, epoch_steps=length)
    return [Cell(variant, point, seed, replace(recipe, seed=seed), out / "cells" / _folder(variant, point, seed))
            for seed in range(suite.seeds) for (variant, point), recipe in recipes.items()]


def _folder(variant: str, point: str | None, seed: int) -> str:
    return "-".join(part for part in (variant, point, str(seed)) if part is not None).replace("/", "_")


def label(variant: str, point: str | None) -> str:
    """Name a variant at a point."""
    return variant if point is None else f"{variant} @ {point}"


def _epoch_steps(suite: Suite, recipe: Recipe) -> int | None:
    """Return the steps of an epoch that make up the budget."""
    steps = suite.budget.steps
    if steps is None:
        return recipe.epoch_steps
    if steps % recipe.epochs:
        raise UserError(f"budget: {steps} steps do not divide into the {recipe.epochs} epochs of the recipe; take "
                        f"{max(1, steps // recipe.epochs) * recipe.epochs}")
    return steps // recipe.epochs


def initial_network(recipe: Recipe) -> str:
    """Return a hash of encoder and decoder as a run begins with them, but for the layers next to the codebook."""
    tokenizer, digest = build(recipe), hashlib.sha256()
    for module in (tokenizer.encoder, tokenizer.decoder):
        for name, value in module.state_dict().items():
            if not name.startswith(NEXT_TO_CODES):
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Rows


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a results.jsonl, none if there is none."""
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as lines of JSON: {error}") from error
    for row in rows:
        if not isinstance(row, dict) or not {"suite", "variant", "point", "seed", "status", "values"} <= row.keys():
            raise UserError(f"{path}: not what `vqzoo bench` writes: a line lacks the keys of a cell")
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write all rows, whole or not at all."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def key_of(row: Row) -> tuple[str, str | None, int]:
    return row["variant"], row["point"], row["seed"]


def is_done(cell: Cell, row: Row | None) -> bool:
    """Tell whether a row is the finished cell; a UserError if it is one of another recipe.

    What a failed one of another recipe left is removed.
    """
    if row is None:
        return False
    changed = differences(row["recipe"], public(cell.recipe))[0]
    if changed and row["status"] == "finished":
        raise UserError(f"{cell.folder.parent.parent}: its results of {cell.name} are of another recipe; name another folder "
                        "with --out:\n  " + "\n  ".join(changed))
    if changed:
        shutil.rmtree(cell.folder, ignore_errors=True)
    return row["status"] == "finished"


def public(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as JSON has it, without where the images lie, which says nothing about them."""
    found = json.loads(json.dumps(plain(recipe)))
    found["data"].pop("root")
    found.pop("versions")
    return found


def row_of(cell: Cell, suite: Suite, hardware: dict[str, Any], network: str | None, error: str | None) -> Row:
    """Return the row of a cell that has ended."""
    recipe = public(cell.recipe)
    row = {
        "suite": suite.name, "variant": cell.variant, "point": cell.point, "seed": cell.seed,
        "status": "failed" if error else "finished", "error": error, "values": {}, "missing": {}, "curves": {}, "card": {},
        "hardware": hardware, "versions": versions(named_plugins(cell.recipe)), "budget": _budget(suite, cell.recipe),
        "recipe_sha256": hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(), "recipe": recipe,
        "initial_network": network, "date": str(date.today()), "folder": f"cells/{cell.folder.name}",
    }
    if error is None:
        found = json.loads((cell.folder / "run" / "metrics.json").read_text())
        card = {key: value for key, value in found["card"].items() if key not in ("hardware", "versions", "seed")}
        curves = read_curves(cell.folder / "run" / "tensorboard", [*suite.config.curves, PEAK])
        peak = curves.pop(PEAK, [])
        run = {"seconds": found["run"]["seconds"], "images_per_second": found["run"]["images_per_second"],
               "steps": found["run"]["step"], "peak_mib": max((value for _, value in peak), default=None)}
        means = {tag: sum(value for _, value in curve) / len(curve) for tag, curve in curves.items() if curve}
        values = {**found["metrics"], **means, **{key: value for key, value in run.items() if value is not None}}
        row |= {"values": values, "missing": found["missing"], "curves": curves, "card": card}
    return row


def _budget(suite: Suite, recipe: Recipe) -> dict[str, Any]:
    found = {} if suite.budget.seconds is None else {"seconds": suite.budget.seconds}
    return {**found, "epochs": recipe.epochs, "epoch_steps": recipe.epoch_steps}


def read_curves(folder: Path, tags: Iterable[str]) -> dict[str, list[list[float]]]:
    """Return TensorBoard's scalars of a run as steps and values that are finite, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    known = events.Tags()["scalars"]
    return {tag: [[event.step, event.value] for event in events.Scalars(tag) if event.value - event.value == 0]
            for tag in tags if tag in known}
