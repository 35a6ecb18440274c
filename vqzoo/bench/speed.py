"""What speed suites measure: the codebook's part of a training step, beside peers and bare matrix products, and whole steps."""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vqzoo.bench import peers
from vqzoo.bench.clock import (
    RATIOS,
    Conditions,
    Seconds,
    apart,
    circumstances,
    fit,
    laps,
    number,
    paired,
    quiet,
    resident,
    summarise,
    table,
)
from vqzoo.bench.suite import Suite
from vqzoo.data import Batch, DataConfig
from vqzoo.errors import UserError, suggestion
from vqzoo.evaluation import EvaluateConfig
from vqzoo.monitor import Drift, Monitor
from vqzoo.ops import use
from vqzoo.pictures import Pictures
from vqzoo.recipe import DecoderConfig, EncoderConfig, Recipe, load_recipe, plain, to_yaml, versions
from vqzoo.sources import Source, also, available
from vqzoo.testing.reference import picture
from vqzoo.trainer import Trainer

STEP, ENCODE = ("forward", "backward", "refresh"), "encode"
"""The parts of the codebook's share of a training step, and what evaluation does with codes."""

PARTS = (ENCODE, *STEP)

ROUNDS, QUICK_ROUNDS, FEWER = 20, 10, 5
"""The least number of rounds, in the short form, and where whole steps are timed or times are only fitted."""

TEMPERATURE = 0.35
"""NSVQ's, at which dense losses are timed."""

AXES = {"n": "tokens of a batch", "k": "codes", "d": "width"}

NOTES = {
    "latents": "Gaussian, with the standard deviation of the codes where the encoder's channels are the codes' own, else 1",
    "forward": "from the encoder's output to the decoder's input: the codebook's maps, quantize, straight_through, losses",
    "backward": "of the embedding losses and of a Gaussian gradient to the decoder's input, to codebook and encoder's output",
    "refresh": "the count of codes and refresh_codes, within an epoch; peers that refresh codes do so in their forward",
    "encode": "evaluation: from the encoder's output to indices",
    "bytes": "the most that forward, backward and refresh hold beyond weights and latents, gradients included; measured in a "
             "process of its own, on a GPU by its allocator",
    "time": "medians; on a CPU the processor's time on one thread, torch.set_num_threads(1), on a GPU the device's; ratios are "
            "taken round by round, with 5 and 95 %",
}

SEARCH_FLOOR, LOSS_FLOOR = "GEMM 2NKD", "GEMM 4NKD"
"""The bare matrix products of a search and of a dense loss."""

Found = dict[str, Any]
Floors = dict[str, tuple[Callable, tuple[int, int], tuple]]


# A trainer that is ready for steps


def begun(recipe: Recipe, out: Path) -> Trainer:
    """Return a trainer at the beginning of its first stage, set up as a run is, that takes no images of its own."""
    trainer = Trainer(recipe, out)
    trainer.drift, trainer.pictures = Drift(trainer.fixed), Pictures(trainer.fixed)
    trainer.monitor = Monitor(out, 1, 0, 0, enabled=False)
    trainer._begin_stage()
    trainer.train_batches.close()
    return trainer


def trainer_step(recipe: Recipe, out: Path) -> Callable[[Tensor], None]:
    """Return the trainer's own step on images [B, 3, H, W] (uint8) that are on the device already."""
    return partial(trained, begun(recipe, out))


def trained(trainer: Trainer, images: Tensor) -> None:
    trainer._step([Batch(images, torch.arange(len(images)), [])], False)


def several(step: Callable[[Tensor], None], images: Tensor, count: int) -> None:
    """Take steps on batches [M, B, 3, H, W] in turn."""
    for index in range(count):
        step(images[index % len(images)])


def noise(batch: int, resolution: Iterable[int], seed: int, device: str) -> Tensor:
    """Return 4 batches of images [4, B, 3, H, W] (uint8) on the device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (4, batch, 3, *resolution), dtype=torch.uint8, generator=generator).to(device)


def at_hand(recipe: Recipe, folder: Path) -> Recipe:
    """Return a recipe whose trainer opens a picture in a folder, evaluates nothing and ends no epoch."""
    height, width = recipe.data.resolution
    for split in ("train", "val"):
        if not (file := folder / f"{width}x{height}" / split / "picture.png").exists():
            file.parent.mkdir(parents=True)
            picture(0, height, width).save(file)
    data = DataConfig("folder", root=str(file.parent.parent), resolution=[height, width], workers=0,
                      batch_size=max(1, recipe.data.batch_size // recipe.accumulate))
    return replace(recipe, epoch_steps=10**6, accumulate=1, shard=False, init_from=None, data=data, versions={},
                   evaluate=EvaluateConfig(metrics=[]), log=replace(recipe.log, images=1, drift_images=1))


# What is timed: calls one right after the other


@dataclass
class Work:
    """Carry calls that are timed one right after the other, by the names of the parts, and what puts gradients away before."""

    parts: dict[str, Callable[[], Any]]
    reset: Callable[[], None] = lambda: None
    size: dict[str, int] = field(default_factory=dict)

    def laps(self, device: str) -> dict[str, tuple]:
        """Return the seconds of each part."""
        self.reset()
        return dict(zip(self.parts, laps(device, list(self.parts.values())), strict=True))

    def step(self) -> None:
        """Do the parts of a training step alone."""
        self.reset()
        for name, part in self.parts.items():
            if name != ENCODE:
                part()


class Quantizing:
    """What a recipe's plugins do with codes in a training step: the trainer's step on features in the encoder's place."""

    def __init__(self, recipe: Recipe, out: Path, seed: int):
        stride, small = recipe.encoder.stride, {"width": 4, "mult": [1], "blocks": 1, "patch": recipe.encoder.stride}
        stages = [replace(stage, freeze=[pattern for pattern in stage.freeze if pattern.startswith(("codebook", "plugins"))])
                  for stage in recipe.stages]
        recipe = replace(recipe, encoder=EncoderConfig(stride=stride, args=small), decoder=DecoderConfig(args=small),
                         compile=False, stages=stages, optim=replace(recipe.optim, scale={}))
        self.recipe, self.trainer = recipe, begun(recipe, out)
        self.tokenizer = tokenizer = self.trainer.tokenizer
        self.progress, grid, codebook = self.trainer._progress(), tokenizer.grid, tokenizer.codebook
        tokenizer.encoder, tokenizer.decoder = nn.Identity(), nn.Identity()
        generator = torch.Generator().manual_seed(seed)
        shapes = [(recipe.data.batch_size, channels, *grid) for channels in (codebook.encoder_width, codebook.decoder_width)]
        features, gradient = (torch.randn(shape, generator=generator) for shape in shapes)
        with torch.no_grad():
            own = codebook.encoder_width == codebook.width
            features *= codebook.vectors().std().item() if own and codebook.size > 1 else 1.0
        self.features = features.to(self.trainer.device).requires_grad_()
        self.gradient = gradient.to(self.trainer.device) / gradient.numel()

    def forward(self) -> None:
        """Go from the encoder's output to the decoder's input, with the embedding losses."""
        with use(self.recipe.ops.backend, self.recipe.ops.precision), self.trainer.accelerator.autocast():
            self.output = self.trainer.model(self.features, self.progress)

    def backward(self) -> None:
        """Go back from the embedding losses and from the decoder's input."""
        with use(self.recipe.ops.backend, self.recipe.ops.precision):
            roots = [*((loss, None) for loss in self.output.losses.values()), (self.output.reconstructions, self.gradient)]
            roots = [(root, gradient) for root, gradient in roots if root.requires_grad]
            torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])

    def refresh(self) -> None:
        """Count the codes and let plugins change them."""
        with torch.no_grad(), use(self.recipe.ops.backend, self.recipe.ops.precision):
            self.trainer._refresh([self.output.detached()], self.progress)

    def encode(self) -> Tensor:
        """Return the indices of the features, as evaluation finds them."""
        with use(self.recipe.ops.backend, self.recipe.ops.precision):
            return self.tokenizer.encode(self.features)

    def reset(self) -> None:
        """Put away the gradients of the last step, as the optimizer does."""
        self.output = self.features.grad = None
        for parameter in self.tokenizer.parameters():
            parameter.grad = None

    def work(self) -> Work:
        """Return the parts, each of which has been done once; without indices nothing is encoded."""
        parts = {name: getattr(self, name) for name in STEP}
        made = Work(parts, self.reset)
        made.step()
        if self.output.indices is not None:
            self.encode()
            made.parts = {ENCODE: self.encode, **parts}
        codebook, (batch, _, height, width) = self.tokenizer.codebook, self.features.shape
        made.size = {"n": batch * height * width, "k": codebook.size, "d": self.recipe.codebook.width}
        return made


def _quantizing(recipe: Recipe, out: Path, seed: int) -> Work:
    return Quantizing(recipe, out, seed).work()


def _peer(method: peers.Method, shape: tuple[int, ...], size: int, how: Conditions) -> Work:
    """Return the parts of a module's training step, each of which has been done once."""
    generator = torch.Generator().manual_seed(how.seed)
    features, gradient = (torch.randn(shape, generator=generator).to(how.device) for _ in range(2))
    features, gradient = (features * shape[1] ** -0.5).requires_grad_(), gradient / gradient.numel()
    module, made = method.make(features, size), []

    def forward() -> None:
        made[:] = module(features)

    def backward() -> None:
        quantized, _, loss = made
        torch.autograd.backward([loss.sum(), quantized], [None, gradient])

    def reset() -> None:
        made.clear()
        features.grad = None
        module.zero_grad()

    batch, width, *grid = shape
    work = Work({"forward": forward, "backward": backward}, reset, {"n": batch * math.prod(grid), "k": size, "d": width})
    work.step()
    return work


def _floor(gemm: Callable, tiling: tuple[int, int], size: tuple[int, int, int], how: Conditions, more: tuple) -> Work:
    """Return a bare matrix product at a size."""
    call = gemm(*tiling, *peers.inputs("gauss", *size, how.seed, how.device), *more)
    call()
    return Work({STEP[0]: call}, size=dict(zip(AXES, size, strict=True)))


# Memory, in a process of its own


def peak_of_quantizing(text: str, given: list[Source], seed: int) -> int:
    """Return the bytes that the codebook's part of a recipe's step holds at most beyond weights and features."""
    with _rebuilt(text, given) as (recipe, folder):
        made = Quantizing(recipe, folder, seed)
        work = made.work()
        return _peak(made.trainer.device.type, work)


def peak_of_training(text: str, given: list[Source], seed: int) -> int:
    """Return the bytes that a recipe's whole step holds at most beyond weights, moments and images."""
    with _rebuilt(text, given) as (recipe, folder):
        trainer = begun(recipe, folder)
        return _peak(trainer.device.type, _training(trainer, seed, 1))


def peak_of_peer(name: str, shape: tuple[int, ...], size: int, how: Conditions) -> int:
    """Return the bytes that a peer's training step holds at most beyond weights and features."""
    with quiet():
        return _peak(how.device, _peer(peers.quantizers()[name], shape, size, how))


@contextmanager
def _rebuilt(text: str, given: list[Source]) -> Iterator[tuple[Recipe, Path]]:
    files = [str(source.given) for source in given if isinstance(source.given, Path)]
    classes = {source.name: source.given for source in given if not isinstance(source.given, Path)}
    with quiet(), also(files, classes), tempfile.TemporaryDirectory() as folder:
        (file := Path(folder, "recipe.yaml")).write_text(text)
        yield load_recipe(str(file)), Path(folder, "run")


def _peak(device: str, work: Work) -> int:
    work.reset()
    before = resident(device, fresh=True)
    work.step()
    return max(0, resident(device) - before)


def _sent(recipe: Recipe, how: Conditions) -> tuple[str, list[Source], int]:
    """Return a recipe as another process can take it, with the plugins that are given by hand here."""
    here = how.device == "cuda"
    return to_yaml(recipe), [] if here else [source for source in available().values() if source.given], how.seed


# Time, side by side


class SideBySide:
    """Works that are timed in the same rounds, the first of them twice, and what became of those that cannot be."""

    def __init__(self, how: Conditions):
        self.how = how
        self.works: dict[str, Work] = {}
        self.found: dict[str, Found] = {}

    def add(self, name: str, make: Callable[[], Work], *peak: Any) -> None:
        """Take part, with the memory that `peak`, a function and its arguments, finds; whatever goes wrong is kept."""
        try:
            self.works[name] = work = make()
        except Exception as error:  # of any plugin or peer
            self.found[name] = {"failed": _said(error)}
            return
        self.found[name] = dict(work.size)
        if not peak:
            return
        try:
            self.found[name]["bytes"] = apart(self.how.device, *peak)
        except Exception as error:  # of another process or system, too
            self.found[name] |= {"bytes": None, "memory": f"not measured: {_said(error)}"}

    def times(self) -> dict[str, Found]:
        """Return what is found of each name: median times, and ratios to the first that works and to bare matrix products."""
        if not self.works:
            return self.found
        base, kind = next(iter(self.works)), self.how.kind
        self.works[again := f"{base} again"] = self.works[base]
        self.found = {base: {}, again: {key: self.found[base][key] for key in self.works[base].size}, **self.found}
        rounds = paired(self.works, self.how.rounds, self.how.seed, lambda work: work.laps(self.how.device))
        steps = {name: [_step(lap) for lap in laps] for name, laps in rounds.items()}
        encodes = {name: [lap[ENCODE] for lap in laps] for name, laps in rounds.items() if ENCODE in laps[0]}
        for name, figures in summarise(steps, base, kind).items():
            medians = {part: 1e3 * median(lap[part][kind] for lap in rounds[name]) for part in rounds[name][0]}
            self.found[name] |= {**figures, "parts": medians, "rounds": len(rounds[name])}
        for key, seconds in (("step_to", steps), ("encode_to", encodes)):
            for floor in (name for name in steps if "GEMM" in name):
                for name, figures in summarise({**seconds, floor: steps[floor]}, floor, kind).items():
                    if name in seconds:
                        self.found[name].setdefault(key, {})[floor] = [figures[ratio] for ratio in RATIOS]
        return self.found


def _step(lap: dict[str, Seconds]) -> Seconds:
    """Return the seconds of a training step's parts together."""
    return tuple(sum(values) for values in zip(*(seconds for part, seconds in lap.items() if part != ENCODE), strict=True))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# The codebook's part of a step


def quantizer_times(recipes: dict[str, Recipe], device: str | torch.device, rounds: int, seed: int) -> dict[str, Found]:
    """Time what recipes do with codes in a training step, side by side; see NOTES for what the numbers are.

    Ratios are to the first recipe that works, which is measured again under the name "… again". The trainer chooses the device,
    which is a GPU where there is one.
    """
    return _quantizer_times(recipes, Conditions(torch.device(device).type, rounds, seed))


def _quantizer_times(recipes: dict[str, Recipe], how: Conditions, floors: Floors | None = None,
                     memory: bool = True) -> dict[str, Found]:
    """Do the same, where floors are named with them and with peers, at the first recipe's size in the same rounds."""
    beside, first = SideBySide(how), next(iter(recipes.values()))
    size, shape = size_of(first), shape_of(first)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        for number, (name, recipe) in enumerate(recipes.items()):
            recipe = at_hand(recipe, Path(folder))
            beside.add(name, partial(_quantizing, recipe, Path(folder, str(number)), how.seed),
                       *((peak_of_quantizing, *_sent(recipe, how)) if memory else ()))
        for name, method in peers.quantizers().items() if floors else ():
            if obstacles := dict(peers.obstacle(how, method, size)):
                beside.found[name] = obstacles
                continue
            beside.add(name, partial(_peer, method, shape, size[1], how),
                       *((peak_of_peer, name, shape, size[1], how) if memory else ()))
        for name, (gemm, tiling, more) in (floors or {}).items():
            beside.add(name, partial(_floor, gemm, tiling, size, how, more))
        return beside.times()


def shape_of(recipe: Recipe) -> tuple[int, int, int, int]:
    """Return the shape [B, D, h, w] of a recipe's codes."""
    height, width = (side // recipe.encoder.stride for side in recipe.data.resolution)
    return max(1, recipe.data.batch_size // recipe.accumulate), recipe.codebook.width, height, width


def size_of(recipe: Recipe) -> tuple[int, int, int]:
    """Return a recipe's N, K and D."""
    batch, width, *grid = shape_of(recipe)
    return batch * math.prod(grid), recipe.codebook.size, width


def sized(recipe: Recipe, axis: str, value: int) -> Recipe:
    """Return a recipe with another N, K or D."""
    if axis != "n":
        return replace(recipe, codebook=replace(recipe.codebook, **{{"k": "size", "d": "width"}[axis]: value}))
    one = math.prod(shape_of(recipe)[2:])
    if value % one or not value:
        raise UserError(f"sizes.n: {value} tokens are no whole number of images of {one} tokens")
    return replace(recipe, data=replace(recipe.data, batch_size=value // one * recipe.accumulate))


# Whole steps


def training_times(recipes: dict[str, Recipe], how: Conditions, count: int = 1) -> dict[str, Found]:
    """Time the trainer's own steps on images of noise, `count` at a time, side by side."""
    beside = SideBySide(how)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        for number, (name, recipe) in enumerate(recipes.items()):
            recipe = at_hand(recipe, Path(folder))
            beside.add(name, lambda: _training(begun(recipe, Path(folder, str(number))), how.seed, count),  # noqa: B023
                       peak_of_training, *_sent(recipe, how))
        found = beside.times()
    for row in found.values():
        if "ms" in row:
            row["step_ms"] = row["ms"] / count
            row["images_per_second"] = 1e3 * row["images"] / row["step_ms"]
    return found


def _training(trainer: Trainer, seed: int, count: int) -> Work:
    """Return steps of a trainer on images of noise, of which some have been taken."""
    config, device = trainer.recipe.data, trainer.device.type
    images = noise(config.batch_size, config.resolution, seed, device)
    several(partial(trained, trainer), images, 3)
    return Work({"training": partial(several, partial(trained, trainer), images, count)}, size={"images": config.batch_size})


# Scaling


def scaling(recipes: dict[str, Recipe], sizes: dict[str, list[int]], how: Conditions, floors: Floors,
            centre: dict[str, Found]) -> dict[str, Any]:
    """Time the codebook's part along N, K and D, one at a time from the recipes' own, whose times are known as the centre.

    The times of each name, the centre's among them, are fitted by a power of each.
    """
    own, cells = dict(zip(AXES, size_of(next(iter(recipes.values()))), strict=True)), []
    for axis, value in [(name, value) for name in AXES for value in sizes.get(name, ()) if value != own[name]]:
        point = {**own, axis: value}
        _tell("scaling: " + " ".join(f"{name.upper()}={size}" for name, size in point.items()))
        other = {name: sized(recipe, axis, value) for name, recipe in recipes.items()}
        cells.append({**point, "methods": _quantizer_times(other, how, floors, memory=False)})
    found = {name: [row for rows in (centre, *(cell["methods"] for cell in cells)) if "ms" in (row := rows.get(name, {}))]
             for name in centre}
    exponents = {name: fit([(*(row[axis] for axis in AXES), row["ms"]) for row in rows]) for name, rows in found.items()}
    return {"cells": cells, "exponents": exponents}


# The suite


def speed(suite: Suite, options: argparse.Namespace) -> int:
    """Print what a speed suite measures, as JSON in the last line, which `--out` keeps; return 1 if a variant failed."""
    how = Conditions("cuda" if torch.cuda.is_available() else "cpu", ROUNDS if suite.quick is None else QUICK_ROUNDS)
    for axis in suite.sizes:
        if axis not in AXES:
            raise UserError(f"{suite.path}: sizes.{axis}: unknown; {suggestion(axis, AXES)}")
    began = time.monotonic()
    recipes, failed = _recipes(suite, options.overrides)
    how = replace(how, seed=recipes[suite.baseline].seed)
    said = {"bench": "speed", "suite": suite.name, "quick": suite.quick, "baseline": suite.baseline, "notes": NOTES,
            "overrides": list(options.overrides), "rounds": how.rounds, "seed": how.seed, "threads": how.threads}
    with quiet():
        found = measured(suite, recipes, failed, how)
        said |= circumstances(how.device, peers.MODULES)  # with the threads that there were
    said["versions"] |= versions(list(dict.fromkeys(name for recipe in recipes.values() for name in recipe.plugins)))
    said["recipe"] = plain(recipes[suite.baseline])
    said["variants"] = {name: _differing(recipe) for name, recipe in recipes.items()}
    line = json.dumps({**said, "seconds": round(time.monotonic() - began, 1), **found}, allow_nan=False)
    if options.out:
        _keep(Path(options.out), line)
    print(line)
    return int(any("failed" in row for name, row in found["quantizers"].items() if name in suite.variants))


def _recipes(suite: Suite, overrides: list[str]) -> tuple[dict[str, Recipe], dict[str, Found]]:
    """Return the variants' recipes, the baseline's first, and why others cannot be read."""
    recipes, failed = {}, {}
    for name in dict.fromkeys([suite.baseline, *suite.variants]):
        base, laid = suite.recipe_of(name, None)
        try:
            recipes[name] = load_recipe(base, list(overrides), laid)
        except UserError as error:
            if name == suite.baseline:
                raise
            failed[name] = {"failed": _said(error)}
    return recipes, failed


def measured(suite: Suite, recipes: dict[str, Recipe], failed: dict[str, Found], how: Conditions) -> dict[str, Any]:
    """Measure and print one table after the other."""
    size = size_of(recipes[suite.baseline])
    searches = []
    for data in ("gauss", "vqgan"):
        _tell(f"the search alone, {data}")
        searches.append(peers.search_cell(how, peers.search_methods(how.device), *size, data))
        print(f"\nThe search alone{peers.describe(searches[-1], 'flips')}", flush=True)
    _tell("the dense loss alone")
    losses = {name: method for name, method in peers.loss_methods(how.device).items() if "older" not in name}
    loss = peers.loss_cell(how, losses, TEMPERATURE, *size, "gauss")
    print(f"\nThe dense loss alone, forward and backward{peers.describe(loss, 'loss_error', 'gradient_error')}", flush=True)
    tilings = peers.named_tilings(how.device)
    floors = {SEARCH_FLOOR: (peers.search_gemm, tilings[searches[0]["floor"]], ()),
              LOSS_FLOOR: (peers.loss_gemm, tilings[loss["floor"]], (None, TEMPERATURE))}
    _tell(f"the codebook's part: {', '.join(recipes)}")
    quantizers = {**_quantizer_times(recipes, how, floors), **failed}
    print(_quantizer_table(quantizers, size), flush=True)
    _tell("whole steps")
    fewer = replace(how, rounds=FEWER)
    training = {**training_times(recipes, fewer, 10 if how.device == "cuda" else 1), **failed}
    print(_training_table(training), flush=True)
    grown = scaling(recipes, suite.sizes, fewer, floors, quantizers)
    print(_scaling_table(grown), flush=True)
    return {"size": dict(zip(AXES, size, strict=True)), "quantizers": quantizers, "training": training, "scaling": grown,
            "searches": searches, "loss": loss}


def _differing(recipe: Recipe) -> dict[str, Any]:
    """Return what variants differ in."""
    return {key: plain(getattr(recipe, key)) for key in ("plugins", "hooks", "codebook")}


def _keep(out: Path, line: str) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "results.jsonl").open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error}") from error


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# What is shown


def _quantizer_table(found: dict[str, Found], size: tuple[int, int, int]) -> str:
    head = ["", "codes", *(f"{part} ms" for part in PARTS), "step ms", f"step / {next(iter(found))} (5-95 %)",
            "encode / 2NKD", "step / 2NKD", "MB"]
    rows = []
    for name, row in found.items():
        if "ms" not in row:
            rows.append([name, next(iter(row.values())) if len(row) == 1 else str(row)])
            continue
        to = (row.get(key, {}).get(SEARCH_FLOOR, [None])[0] for key in ("encode_to", "step_to"))
        rows.append([name, str(row["k"]), *(number(row["parts"].get(part), 2) for part in PARTS), number(row["ms"], 2),
                     _ratio(row), *(number(ratio, 2) for ratio in to), _megabytes(row)])
    n, k, d = size
    return f"\nThe codebook's part of a training step, N={n} K={k} D={d}\n{table(head, rows)}"


def _training_table(found: dict[str, Found]) -> str:
    head = ["", "step ms", "images/s", f"time / {next(iter(found))} (5-95 %)", "MB"]
    rows = [[name, number(row["step_ms"], 1), number(row["images_per_second"], 1), _ratio(row), _megabytes(row)]
            if "ms" in row else [name, *row.values()] for name, row in found.items()]
    return f"\nA whole step of the trainer\n{table(head, rows)}"


def _scaling_table(grown: dict[str, Any]) -> str:
    rows = [[name, *(number(powers[axis], 2) for axis in (*AXES, "r2"))] for name, powers in grown["exponents"].items()]
    failed = [f"  {name} at N={cell['n']} K={cell['k']} D={cell['d']}: {row['failed']}" for cell in grown["cells"]
              for name, row in cell["methods"].items() if "failed" in row]
    text = f"\nTime of the codebook's part as a power of\n{table(['', 'N', 'K', 'D', 'R²'], rows)}"
    return "\n".join([text, *(["left out:", *failed] if failed else [])])


def _ratio(row: Found) -> str:
    return f"{row['ratio']:.3f} ({row['ratio_low']:.3f}-{row['ratio_high']:.3f})"


def _megabytes(row: Found) -> str:
    return number(row["bytes"] / 1e6, 1) if row.get("bytes") is not None else ""
