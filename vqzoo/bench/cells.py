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
from urllib.parse import quote

import torch

from vqzoo.bench.suite import Suite
from vqzoo.data import fingerprint, make_dataset
from vqzoo.errors import StorageError, UserError, suggestion
from vqzoo.evaluation import METRICS
from vqzoo.evaluation.report import to_json
from vqzoo.files import write_text
from vqzoo.prepare import build
from vqzoo.recipe import Recipe, difference, load_recipe, named_plugins, plain, to_yaml, versions
from vqzoo.sources import find

RESULTS, STAMP = "results.jsonl", "cell.json"
SET_HERE = {"seed": "--seeds", "epoch_steps": "--steps or --seconds"}
"""Keys of a recipe that are the suite's to set, and where."""

PEAK = "train/peak_mib"
"""The curve whose largest value is the memory of a cell."""

NEUTRAL = ("data.workers", "data.bad_files", "checkpoint")
"""The keys of a recipe in which cells that are compared may differ: nothing that is shown depends on them."""

OF_A_ROW = {"suite", "variant", "point", "seed", "status", "error", "values", "curves", "card", "hardware", "versions",
            "budget", "recipe", "folder"}
"""What every row has."""

ALWAYS = ("usage", "perplexity", "bits_per_token", "codebook_size", "tokens_per_image", "images", "seconds", "steps",
          "images_per_second", "peak_mib")
"""What a row may have beside the metrics that the recipe asks for."""

LONGEST = 200
"""Characters of a folder's name."""

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
    data: dict[str, str]

    @property
    def key(self) -> tuple[str, str | None, int]:
        return self.variant, self.point, self.seed

    @property
    def name(self) -> str:
        return f"{self.variant}{f' at {self.point}' if self.point is not None else ''}, seed {self.seed}"

    def identity(self) -> dict[str, Any]:
        """Return what makes a result this cell's: its recipe, the versions of its plugins, and its images."""
        return {"recipe": public(self.recipe), "plugins": of_plugins(versions(named_plugins(self.recipe))), "data": self.data}

    def lay_down(self) -> Path:
        """Write the recipe for the process that runs it, and return its file; what another cell left there is removed first."""
        stamp = self.folder / STAMP
        if self.folder.exists() and (not stamp.exists() or changes(json.loads(stamp.read_text()), self)):
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(stamp, to_json(self.identity()))
        write_text(self.folder / "recipe.yaml", to_yaml(self.recipe))
        return self.folder / "recipe.yaml"


def of_plugins(said: dict[str, str]) -> dict[str, str]:
    """Return those of versions that are plugins'."""
    return {key: value for key, value in said.items() if key.startswith("plugin ")}


def differing(one: dict[str, Any], other: dict[str, Any], without: Iterable[str] = ()) -> list[str]:
    """Return in what two recipes differ of what a result may depend on, `without` some keys."""
    lines = difference(one, other)
    return [line for line in lines if not any(line.startswith((f"{key}:", f"{key}.")) for key in (*NEUTRAL, *without))]


def changes(made: dict[str, Any], cell: Cell) -> list[str]:
    """Return in what an identity differs from a cell's."""
    now = cell.identity()
    return differing(made["recipe"], now["recipe"]) + difference(
        {key: made[key] for key in ("plugins", "data")}, {key: now[key] for key in ("plugins", "data")})


def plan(suite: Suite, overrides: Iterable[str], data: str | None, out: Path, lengths: dict[str, int]) -> list[Cell]:
    """Return every cell with its recipe, all variants of a seed before the next; a UserError names a mistake before any run.

    `lengths` are the steps of an epoch by a variant and point, where the budget is one of seconds.
    """
    given = [] if data is None else ["data.name=folder", f"data.root={json.dumps(data, ensure_ascii=False)}"]
    for key, where in SET_HERE.items():
        if any(word.partition("=")[0].strip() == key for word in overrides):
            raise UserError(f"{key}: a suite sets this itself; see {where}")
    if suite.config.metrics is not None:
        given.append(f"evaluate.metrics={json.dumps(suite.config.metrics)}")
    if suite.config.protocol is not None:
        given.append(f"evaluate.protocol={suite.config.protocol}")
    recipes, known = {}, {}
    for variant, point in product(suite.variants, suite.points or [None]):
        base, over = suite.recipe_of(variant, point)
        try:
            recipe = load_recipe(base, [*given, *overrides], over)
            images = _images(recipe, known)
        except UserError as error:
            raise UserError(f"{suite.path}: {label(variant, point)}: {str(error).removeprefix(f'{suite.path}: ')}") from error
        length = lengths.get(label(variant, point)) or _epoch_steps(suite, recipe)
        recipes[variant, point] = replace(recipe, epoch_steps=length), images
        _check_columns(suite, recipe)
    cells = [Cell(variant, point, seed, replace(recipe, seed=seed), out / "cells" / _folder(variant, point, seed), images)
             for seed in range(suite.seeds) for (variant, point), (recipe, images) in recipes.items()]
    _check_folders(cells)
    return cells


def _check_columns(suite: Suite, recipe: Recipe) -> None:
    """Refuse to show what is not measured; of a plugin's metrics, only it knows the names."""
    metrics = recipe.evaluate.metrics
    measured = [*metrics, *suite.config.curves, *ALWAYS]
    if set(metrics) <= set(METRICS):
        for key, names in (("quality", [suite.config.quality]), ("columns", suite.config.columns)):
            for name in names:
                if not any(name == one or name.startswith(f"{one}_") for one in measured):
                    raise UserError(f"{suite.path}: {key}: {name!r} is not measured; {suggestion(name, measured)}")


def _images(recipe: Recipe, known: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return the fingerprints of the images of each split, which are looked at once."""
    key = to_json(plain(recipe.data))
    if key not in known:
        known[key] = {split: fingerprint(make_dataset(recipe.data, split)) for split in ("train", "val")}
    return known[key]


def _folder(variant: str, point: str | None, seed: int) -> str:
    return "-".join(quote(part, safe="+=, ") for part in (variant, point, str(seed)) if part is not None)


def _check_folders(cells: list[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        if len(cell.folder.name) > LONGEST:
            raise UserError(f"variants: {cell.variant[:40]!r}… is too long a name for a folder")
        other = seen.setdefault(cell.folder.name, cell)
        if other is not cell:
            raise UserError(f"variants: {other.name} and {cell.name} would share the folder {cell.folder.name}; rename one")


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


def initial_network(recipe: Recipe) -> str | None:
    """Return a hash of encoder and decoder as a run begins with them, but for the layers next to the codebook.

    None where a run begins with what another left.
    """
    if recipe.init_from is not None:
        return None
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
        if not isinstance(row, dict) or not row.keys() >= OF_A_ROW:
            raise UserError(f"{path}: not what `vqzoo bench` writes: a line lacks the keys of a cell")
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write all rows, whole or not at all."""
    try:
        write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error}; the runs themselves are in {path.parent / 'cells'}, and the "
                           "same command goes on") from error


def key_of(row: Row) -> tuple[str, str | None, int]:
    return row["variant"], row["point"], row["seed"]


def waiting(cells: list[Cell], rows: list[Row]) -> tuple[list[Cell], list[str]]:
    """Return the cells that are still to be run, and what to say of those that are run again since a plugin's file has changed.

    A UserError if a finished result is of another recipe, other images or another version of an installed plugin.
    """
    known, todo, said = {key_of(row): row for row in rows}, [], []
    for cell in cells:
        row = known.get(cell.key)
        if row is None or row["status"] != "finished":
            todo.append(cell)
            continue
        made = {"recipe": row["recipe"], "plugins": of_plugins(row["versions"]), "data": row.get("data", cell.data)}
        lines = changes(made, cell)
        files = [line for line in lines if _of_a_file(line)]
        if len(files) < len(lines):
            raise UserError(f"{cell.folder.parent.parent}: its result of {cell.name} was made otherwise; name another folder "
                            "with --out:\n  " + "\n  ".join(line for line in lines if line not in files))
        if files:
            todo.append(cell)
            said.append(f"{cell.name}: its plugin has changed, so it runs again: {'; '.join(files)}")
    return todo, said


def _of_a_file(line: str) -> bool:
    """Tell whether a difference is that of a plugin which a file gives, and which its author is still writing."""
    name = line.removeprefix("plugins.plugin ").partition(":")[0]
    return line.startswith("plugins.plugin ") and isinstance(find(name).given, Path)


def public(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as JSON has it, without where the images lie, which says nothing about them."""
    found = json.loads(to_json(plain(recipe)))
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
        "data": cell.data, "initial_network": network, "date": str(date.today()), "folder": f"cells/{cell.folder.name}",
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
        row["hardware"] = {**hardware, "device": found["card"]["hardware"]["device"]}
        row |= {"values": values, "missing": found["missing"], "curves": curves, "card": card}
    return row


def _budget(suite: Suite, recipe: Recipe) -> dict[str, Any]:
    found = {} if suite.budget.seconds is None else {"seconds": suite.budget.seconds}
    return {**found, "epochs": recipe.epochs, "epoch_steps": recipe.epoch_steps,
            "batch_size": recipe.data.batch_size}


def read_curves(folder: Path, tags: Iterable[str]) -> dict[str, list[list[float]]]:
    """Return TensorBoard's scalars of a run as steps and values that are finite, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    known = events.Tags()["scalars"]
    return {tag: [[event.step, event.value] for event in events.Scalars(tag) if event.value - event.value == 0]
            for tag in tags if tag in known}
