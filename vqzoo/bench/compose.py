"""The composition matrix: every two hooks of every two plugins are trained together, or somebody says why they cannot be."""

import argparse
import io
import itertools
import json
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vqzoo import hookspecs
from vqzoo.bench.clock import quiet
from vqzoo.bench.suite import Suite
from vqzoo.data import DataConfig
from vqzoo.errors import Interrupted, MissingWeights, UserError, suggestion
from vqzoo.evaluation import EvaluateConfig
from vqzoo.evaluation.report import to_json
from vqzoo.hookspecs import DOORS, REQUIRED
from vqzoo.instance import make_plugin
from vqzoo.plugin import Plugin, hookimpl
from vqzoo.recipe import (
    CheckpointConfig,
    CodebookConfig,
    DecoderConfig,
    EncoderConfig,
    LogConfig,
    OptimConfig,
    Recipe,
    StageConfig,
    parse_overrides,
    versions,
)
from vqzoo.sources import SPECS, also, available, find, offered_hooks, refused
from vqzoo.testing.reference import REFERENCE, Reference
from vqzoo.tokenizer import Tokenizer
from vqzoo.trainer import Trainer

SEED = 0
SIDE, STRIDE, WIDTH = 32, 8, 8
"""Pixels of an image's side, such that a usual discriminator has a logit to give, and of a token's; the width of a code."""

SIZES = (64, 256, 1000, 1024, 4096, 16384, 65536)
"""Numbers of codes; a cell takes the first that its codebook can have."""

SECONDS = 60
"""Seconds after which a cell hangs."""

HOOKS = tuple(hook for hook in SPECS if hook not in DOORS)
"""The hooks that stages ask, in the order in which a run meets them."""

ADVERSARIAL = ("make_discriminator", "discriminator_loss")

TRAINS, REFUSED, SURPRISE = "trains", "refused", "SURPRISE"

FRAME = "bench_frame"


class Enough(UserError):
    """A cell has trained as long as it should."""


class Frame(Plugin):
    """Frame: a cell's end, after an epoch of both stages and one evaluation."""

    @hookimpl
    def stage_transition(self, progress):
        if progress.epoch:
            raise Enough


class Hang(BaseException):
    """A cell takes longer than it may; no plugin's `except Exception` keeps it."""


@dataclass(frozen=True)
class Provider:
    """One hook of one plugin; kind is "provides", "yields" or "wraps"."""

    plugin: str
    hook: str
    kind: str = "provides"

    def __str__(self) -> str:
        return f"{self.plugin}:{self.hook}"


@dataclass
class Cell:
    """What became of two providers; `when` is "wiring", "start" (before the first step) or "training"."""

    one: Provider
    other: Provider
    outcome: str = TRAINS
    when: str = ""
    error: str = ""
    reason: str = ""
    plugins: dict[str, Any] = field(default_factory=dict)
    hooks: dict[str, list[str]] = field(default_factory=dict)
    codes: int = 0
    seconds: float = 0.0


def compose(suite: Suite, options: argparse.Namespace) -> int:
    """Print the matrix of all pairs and return the exit status: 1 if one of them is a surprise."""
    names = options.plugins or ",".join(suite.variants) or None
    given = [f"{name}.{key}={json.dumps(value)}" for name, fields in suite.config.fields.items()
             for key, value in fields.items() if not names or name in names.split(",")]
    fields, unusable = _chosen(names, [*given, *options.overrides])
    for name, reason in unusable.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    began = time.monotonic()
    kept = Kept(Path(options.out) if options.out else None, {"seed": SEED, "versions": versions([*fields]), "fields": fields})
    with quiet(), also(classes={REFERENCE: Reference, FRAME: Frame}):
        matrix = Matrix(fields)
        cells = list(_told(matrix.cells(kept), len(matrix.pairs)))
    print(rendered(matrix.providers, cells, time.monotonic() - began, shutil.get_terminal_size((140, 40)).columns))
    if options.json:
        content = {"seed": SEED, "versions": versions([*fields]), "left_out": unusable, "fields": fields,
                   "seconds": time.monotonic() - began, "providers": [asdict(p) for p in matrix.providers],
                   "cells": [asdict(cell) for cell in cells]}
        try:
            Path(options.json).write_text(to_json(content))
        except OSError as error:
            raise UserError(f"--json: {options.json} cannot be written: {error}") from error
    return int(any(cell.outcome == SURPRISE for cell in cells))


class Kept:
    """The cells of a folder's results.jsonl, tried as they would be now; nothing is kept without a folder."""

    def __init__(self, out: Path | None, made: dict[str, Any]):
        self.file, self.made = out and out / "results.jsonl", to_json(made)
        self.cells: dict[tuple[Provider, Provider], Cell] = {}
        if out is None:
            return
        try:
            out.mkdir(parents=True, exist_ok=True)
            text = self.file.read_text() if self.file.exists() else ""
            whole = text[: text.rfind("\n") + 1]
            if whole != text:  # the end of a line that was cut off
                self.file.write_text(whole)
            for line in whole.splitlines():
                row = json.loads(line)
                if to_json(row.pop("made")) == self.made:
                    cell = Cell(Provider(**row.pop("one")), Provider(**row.pop("other")), **row)
                    self.cells[cell.one, cell.other] = cell
        except OSError as error:
            raise UserError(f"--out: {out} cannot be used: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.file}: not what `vqzoo bench compose` writes: {error!r}; name another folder") from error

    def add(self, cell: Cell) -> None:
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps({"made": json.loads(self.made), **asdict(cell)}) + "\n")


# What is tried


def _chosen(names: str | None, overrides: list[str]) -> tuple[dict[str, dict], dict[str, str]]:
    """Return the fields of each plugin to try that are not its defaults, and why others cannot be tried."""
    wanted = [find(name.strip()) for name in names.split(",")] if names else list(available().values())
    kinds: dict[str, type[Plugin]] = {}
    unusable = {} if names else refused()
    for source in wanted:
        try:
            kinds[source.name] = source.load()
        except UserError as error:
            if names:
                raise
            unusable[source.name] = str(error)
    for override in overrides:
        name = override.partition(".")[0]
        if name not in kinds:
            raise UserError(f"{override!r}: {name!r} is not among the plugins to try; {suggestion(name, kinds)}")
    schema = OmegaConf.create({name: OmegaConf.structured(kind.Config) for name, kind in kinds.items()})
    found = OmegaConf.to_container(parse_overrides(overrides, schema))
    return {name: found.get(name, {}) for name in kinds}, unusable


class Matrix:
    """All pairs of providers that a stage could bind at once, and the recipes that bind them."""

    def __init__(self, fields: dict[str, dict]):
        self.fields = fields
        self.companions: dict[str, dict[str, tuple[str, ...]]] = {}
        self.offers = {name: offered_hooks(find(name).load()) for name in fields}
        self.providers = [Provider(name, hook, offers[hook]) for hook in HOOKS for name, offers in self.offers.items()
                          if hook in offers]
        self.pairs = [pair for pair in itertools.combinations(self.providers, 2) if _compatible(*pair)]
        self.sizes: dict[str, int] = {}

    def cells(self, kept: Kept) -> Iterator[Cell]:
        """Try one pair after the other that is not kept already."""
        for pair in self.pairs:
            if pair in kept.cells:
                yield kept.cells[pair]
                continue
            began = time.monotonic()
            cell = Cell(*pair)
            with _outcome(cell):
                recipe = self.recipe(pair)
                cell.plugins, cell.hooks, cell.codes = recipe.plugins, recipe.hooks, recipe.codebook.size
                _train(recipe, cell)
            cell.seconds = round(time.monotonic() - began, 3)
            kept.add(cell)
            yield cell

    def recipe(self, pair: Iterable[Provider]) -> Recipe:
        """Return a tiny recipe in which a pair serves its hooks, with its companions, and the reference what is left open."""
        pair = list(pair)
        routes = self._routes(pair)
        names = dict.fromkeys([REFERENCE, FRAME, *(provider.plugin for provider in pair)])
        recipe = _recipe({name: self.fields.get(name, {}) for name in names}, routes)
        recipe.codebook.size = self._size(routes["make_codebook"][0])
        return recipe

    def _routes(self, pair: list[Provider]) -> dict[str, list[str]]:
        """Return who serves which hook; what one of the pair needs, the other keeps if it is its own."""
        claims = list(pair)
        for claim in claims:  # which grows
            for hook in self._companions(claim.plugin).get(claim.hook, ()):
                if _free(hook, claims) and hook in self.offers[claim.plugin]:
                    claims.append(Provider(claim.plugin, hook, self.offers[claim.plugin][hook]))
        adversarial = any(hook in self.offers[provider.plugin] for provider in pair for hook in ADVERSARIAL)
        rest = dict.fromkeys(REQUIRED, REFERENCE)
        rest |= dict.fromkeys(ADVERSARIAL, REFERENCE) if adversarial else {}
        routes: dict[str, list[str]] = {}
        for hook in HOOKS:
            names = [claim.plugin for claim in claims if claim.hook == hook]
            served = any(claim.hook == hook and claim.kind != "wraps" for claim in claims)
            routes[hook] = names if served or hook not in rest else [rest[hook], *names]
        routes["stage_transition"].append(FRAME)
        return routes

    def _companions(self, name: str) -> dict[str, tuple[str, ...]]:
        if name not in self.companions:
            self.companions[name] = make_plugin(name, self.fields[name]).companions()
        return self.companions[name]

    def _size(self, name: str) -> int:
        """Return the first of SIZES that the codebook of a plugin can have, or the first of all if none can be."""
        if name not in self.sizes:
            self.sizes[name] = next((size for size in SIZES if self._takes(name, size)), SIZES[0])
        return self.sizes[name]

    def _takes(self, name: str, size: int) -> bool:
        recipe = _recipe({name: self.fields.get(name, {})}, {"make_codebook": [name]})
        recipe.codebook.size = size
        try:
            Tokenizer.from_recipe(recipe)
        except UserError as error:
            return not str(error).startswith("codebook: ")
        except Exception:  # which the cell will show
            pass
        return True


def _compatible(one: Provider, other: Provider) -> bool:
    """Tell whether a stage could bind both: two hooks, a wrapper and what it wraps, or one hook of many answers."""
    if one.plugin == other.plugin and one.hook == other.hook:
        return False
    several = not getattr(hookspecs, one.hook).vqzoo_spec["firstresult"]
    return one.hook != other.hook or several or "wraps" in (one.kind, other.kind)


def _free(hook: str, claims: list[Provider]) -> bool:
    return not any(claim.hook == hook and claim.kind != "wraps" for claim in claims)


def _recipe(plugins: dict[str, Any], routes: dict[str, list[str]]) -> Recipe:
    """Return a recipe of two stages, of which the second freezes the encoder, with an epoch of two steps each."""
    network = {"width": 4, "mult": [1], "blocks": 1, "patch": STRIDE}
    frozen = StageConfig("frozen", freeze=["encoder.*"], hooks={"stage_transition": [FRAME]})
    return Recipe(
        seed=SEED, epochs=3, epoch_steps=2, ema=0.9, plugins=plugins, hooks=routes,
        data=DataConfig(REFERENCE, resolution=[SIDE, SIDE], batch_size=4, eval_batch_size=4, workers=0,
                        args={"height": SIDE, "width": SIDE}),
        encoder=EncoderConfig(stride=STRIDE, args=network), decoder=DecoderConfig(args=network),
        codebook=CodebookConfig(width=WIDTH), optim=OptimConfig(lr=1e-3),
        stages=[StageConfig("open", epochs=1), frozen], log=LogConfig(steps=2, images=1, drift_images=1),
        evaluate=EvaluateConfig(metrics=[], epochs=2, images=4), checkpoint=CheckpointConfig(epochs=100, keep_best=False),
    )


# Trying


def _train(recipe: Recipe, cell: Cell) -> None:
    """Train a cell's recipe; whatever it raises is the cell's outcome."""
    cell.when = "wiring"
    with tempfile.TemporaryDirectory() as folder, _limit(SECONDS), redirect_stderr(io.StringIO()):
        trainer = Trainer(recipe, Path(folder, "run"))
        try:
            cell.when = "start"
            trainer.run()
        finally:
            cell.when = "training" if trainer.counters.batches else "start"


@contextmanager
def _outcome(cell: Cell) -> Iterator[None]:
    """Write down what a block does: it refuses, trains long enough, or surprises."""
    try:
        yield
    except Enough:
        return
    except Interrupted as error:
        raise Interrupted("a signal; the matrix is shown when all pairs have been tried; with --out, those tried are kept",
                          error.status - 128) from error
    except UserError as error:
        _note(cell, REFUSED if cell.when != "training" else SURPRISE, error)
    except Hang:
        _note(cell, SURPRISE, TimeoutError(f"not done after {SECONDS} seconds"))
    except (Exception, SystemExit) as error:
        _note(cell, SURPRISE, error)
    else:
        _note(cell, SURPRISE, RuntimeError("the run ended before its time"))


def _note(cell: Cell, outcome: str, error: BaseException) -> None:
    said = str(error).strip()
    if isinstance(error, MissingWeights):
        said = f"weights: {said}"
    if outcome == SURPRISE and isinstance(error, UserError):
        said = f"said in the middle of the run, and not before it: {said}"
    cell.outcome, cell.error, cell.reason = outcome, type(error).__name__, said or repr(error)


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise Hang in the block after so many seconds, where a signal can: in the main thread of a Unix process."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def hang(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _told(cells: Iterator[Cell], count: int) -> Iterator[Cell]:
    """Pass cells on, and say from time to time how far this is."""
    began = said = time.monotonic()
    surprises = 0
    for number, cell in enumerate(cells, 1):
        surprises += cell.outcome == SURPRISE
        if (now := time.monotonic()) - said > 10 or number == count:
            print(f"{number} of {count} pairs, {surprises} surprises, {now - began:.0f} s", file=sys.stderr, flush=True)
            said = now
        yield cell


# What is shown


def rendered(providers: list[Provider], cells: list[Cell], seconds: float, width: int) -> str:
    """Return the matrix as text, with the reasons of its refusals and surprises below."""
    names = {provider.plugin for provider in providers}
    letters = dict(zip(_grouped(cells, REFUSED, names), _letters(), strict=False))
    marks = {TRAINS: "·", SURPRISE: "!"}
    found = {}
    for cell in cells:
        mark = marks.get(cell.outcome) or letters[_alike(cell, names)]
        found[cell.one, cell.other] = found[cell.other, cell.one] = mark
    counts = {outcome: sum(cell.outcome == outcome for cell in cells) for outcome in (TRAINS, REFUSED, SURPRISE)}
    lines = [
        f"{len(providers)} hooks of {len(names)} plugins, {len(cells)} pairs, seed {SEED}, {seconds:.0f} s",
        f"  ·  {counts[TRAINS]} train",
        f"  a  {counts[REFUSED]} are refused before the first step; each letter is a reason below",
        f"  !  {counts[SURPRISE]} are a SURPRISE: NaN, an exception, no end, a refusal in the middle",
        "", *_grid(providers, found),
    ]
    return "\n".join([*lines, *_reasons(cells, REFUSED, names, letters, width), *_reasons(cells, SURPRISE, names, {}, width)])


def _grid(providers: list[Provider], found: dict[tuple[Provider, Provider], str]) -> list[str]:
    """Return a row for each provider, with a cell for each provider above it; a gap stands between hooks."""
    label = max(len(name) for name in HOOKS) + 2
    plugin = max((len(provider.plugin) for provider in providers), default=0)
    digits = [str(number) for number in range(1, len(providers) + 1)]
    rows = []
    for place in (-2, -1):
        numbers = [number[place] if len(number) >= -place else " " for number in digits]
        rows.append(" " * (label + plugin + 5) + _spaced(numbers, providers))
    for number, provider in enumerate(providers):
        first = not number or providers[number - 1].hook != provider.hook
        marks = [found.get((provider, other), " ") for other in providers[:number]]
        head = f"{provider.hook if first else '':<{label}}{provider.plugin:<{plugin}}  {number + 1:>2} "
        rows.append((head + _spaced(marks, providers)).rstrip())
    return rows


def _spaced(marks: list[str], providers: list[Provider]) -> str:
    line = ""
    for number, mark in enumerate(marks):
        gap = number and providers[number].hook != providers[number - 1].hook
        line += f"{'  ' if gap else ' '}{mark}"
    return line


def _reasons(cells: list[Cell], outcome: str, names: set[str], letters: dict[str, str], width: int) -> list[str]:
    """Say why cells are refused, or what surprised; alike reasons once, with how many there are and the pairs."""
    lines = []
    for key, group in _grouped(cells, outcome, names).items():
        cell = group[0]
        pairs = f"{cell.one} × {cell.other}" if outcome == REFUSED else _pairs(group)
        said = cell.reason if outcome == REFUSED else f"{cell.error} in {cell.when}: {cell.reason}"
        head = f"  {letters.get(key, '!')}  {len(group):>3}  "
        text = f"{' '.join(said.split())} [{pairs}{', ...' if outcome == REFUSED and len(group) > 1 else ''}]"
        lines += textwrap.wrap(text, max(width, 60), initial_indent=head, subsequent_indent=" " * len(head))
    return ["", f"{outcome}, how many and why", *lines] if lines else []


def _pairs(cells: list[Cell]) -> str:
    """Name the pairs of cells, each provider of the side that has the fewer once."""
    pairs = [(str(cell.one), str(cell.other)) for cell in cells]
    side = int(len({one for one, _ in pairs}) > len({other for _, other in pairs}))
    partners: dict[str, list[str]] = {}
    for pair in pairs:
        partners.setdefault(pair[side], []).append(pair[1 - side])
    return "; ".join(f"{name} × {', '.join(others)}" for name, others in partners.items())


def _grouped(cells: list[Cell], outcome: str, names: set[str]) -> dict[str, list[Cell]]:
    """Return the cells of an outcome by reasons that differ in more than names and numbers, the most frequent first."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.outcome == outcome:
            groups.setdefault(_alike(cell, names), []).append(cell)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _alike(cell: Cell, names: set[str]) -> str:
    known = sorted({*names, REFERENCE, FRAME}, key=len, reverse=True)
    text = re.sub(rf"(?<![\w.])({'|'.join(map(re.escape, known))})(?!\w)", "NAME", cell.reason)
    return f"{cell.error} {re.sub(r'[0-9.]+', '#', text)}"


def _letters() -> Iterator[str]:
    yield from "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    yield from itertools.repeat("?")
