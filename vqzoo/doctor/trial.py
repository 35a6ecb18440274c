"""The trial: two steps of each stage in a folder that does not stay, and how long the whole recipe would take."""

import io
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vqzoo.data import eval_batches
from vqzoo.doctor.findings import Findings
from vqzoo.errors import NonFiniteError, UserError
from vqzoo.monitor import memory
from vqzoo.ops import use
from vqzoo.plugin import Plugin, hookimpl
from vqzoo.recipe import CheckpointConfig, GuardConfig, LogConfig, Recipe
from vqzoo.sources import also
from vqzoo.trainer import Trainer

STEP_SECONDS = 120.0
"""Seconds after which no further stage is tried."""

EPOCH = 2
"""Steps of each stage."""

STOPWATCH = "doctor_stopwatch"


class Enough(UserError):
    """The steps that were to be timed are done."""


def _stopwatch(marks: list[tuple[str, int, float]], last: str) -> type[Plugin]:
    """Return a plugin that notes when a step is done, as (stage, step in the stage, time), and ends the dry run."""
    ends = time.monotonic() + STEP_SECONDS

    class Stopwatch(Plugin):
        """Stopwatch: when steps are done."""

        @hookimpl
        def report(self, progress):
            now = time.monotonic()
            marks.append((progress.stage, progress.step_in_stage, now))
            if progress.step_in_stage == EPOCH and (progress.stage == last or now > ends):
                raise Enough
            return {}

    return Stopwatch


def _shortened(recipe: Recipe) -> Recipe:
    """Return a recipe that trains two steps of each stage, times them, and measures or keeps nothing."""
    never = 2**31

    def timed(hooks: dict[str, list[str]]) -> dict[str, list[str]]:
        return {**hooks, "report": [*hooks["report"], STOPWATCH]} if "report" in hooks else hooks

    stages = [replace(stage, epochs=1, hooks=timed(stage.hooks)) for stage in recipe.stages]
    stages[-1] = replace(stages[-1], epochs=None)
    return replace(
        recipe, epochs=len(stages), epoch_steps=EPOCH, stages=stages, hooks=timed(recipe.hooks),
        plugins={**recipe.plugins, STOPWATCH: {}}, log=LogConfig(steps=1, images=1, drift_images=1, collapse=0.0),
        evaluate=replace(recipe.evaluate, epochs=never), checkpoint=CheckpointConfig(epochs=never, keep_best=False),
        guard=GuardConfig(),
    )


@dataclass
class Speed:
    """What a dry run took: seconds of a step by stage, seconds to evaluate an image, MiB at the peak."""

    steps: dict[str, float]
    image: float
    peak: float


def dry_run(found: Findings, recipe: Recipe, steps: int, held_out: int | None, reading: float | None) -> None:
    """Train two steps of each stage in a folder that does not stay, and say how long the whole would take."""
    errors = io.StringIO()
    try:
        with tempfile.TemporaryDirectory(prefix="vqzoo_doctor_") as folder, redirect_stderr(errors):
            speed = _timed(recipe, Path(folder, "run"))
    except NonFiniteError as error:
        found.wrong(f"{error}. A run would stop here: lower optim.lr, set optim.clip, use precision=no or bf16, or look at the "
                    "plugin whose loss it is")
        return
    for line in errors.getvalue().splitlines():
        if "no gradient reaches" in line:
            found.note(line)
    said = ", ".join(f"{stage} {_time(seconds)}" for stage, seconds in speed.steps.items())
    where = "GPU memory" if torch.cuda.is_available() else "memory of this process"
    found.ok(f"{EPOCH} steps of each stage train; the second takes: {said}; {speed.peak:,.0f} MiB of {where} at the peak")
    missed = [stage.name for stage in recipe.stages if stage.name not in speed.steps]
    if missed:
        found.note(f"stages {', '.join(missed)} were not tried, for want of time ({STEP_SECONDS:.0f} s)")
    needed = recipe.data.batch_size / min(speed.steps.values())
    if reading is not None and reading < needed:
        found.note(f"reading gives {reading:,.0f} images per second, and training could take {needed:,.0f}; to read faster: "
                   "more data.workers, data.draft=true for large JPEGs, images of about the resolution's size")
    _whole(found, recipe, steps, held_out, speed)


def _timed(recipe: Recipe, folder: Path) -> Speed:
    """Train and time the steps of a recipe, and evaluate one batch."""
    marks: list[tuple[str, int, float]] = []
    with also(classes={STOPWATCH: _stopwatch(marks, recipe.stages[-1].name)}):
        trainer = Trainer(_shortened(recipe), folder)
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.device)
        marks[:] = [(recipe.stages[0].name, 0, time.monotonic())]
        try:
            trainer.run()
        except Enough:
            pass
        began, count = time.monotonic(), recipe.data.eval_batch_size
        with use(recipe.ops.backend, recipe.ops.precision):
            batches = eval_batches(recipe.data, trainer.val_data, limit=count)
            images = trainer.evaluator.tokenizer(trainer.averaged(), batches).metrics["images"]
        image = (time.monotonic() - began) / max(1, images)
    return Speed(_seconds(marks), image, memory(trainer.device)["peak_mib"])


def _seconds(marks: list[tuple[str, int, float]]) -> dict[str, float]:
    """Return the seconds of each stage's second step."""
    return {stage: later - earlier for (_, _, earlier), (stage, step, later) in zip(marks, marks[1:], strict=False)
            if step == EPOCH}


def _whole(found: Findings, recipe: Recipe, steps: int, held_out: int | None, speed: Speed) -> None:
    """Say how long the whole recipe would take."""
    known = list(speed.steps.values())
    rest = recipe.epochs - sum(stage.epochs or 0 for stage in recipe.stages)
    training = sum((rest if stage.epochs is None else stage.epochs) * steps * speed.steps.get(stage.name, known[-1])
                   for stage in recipe.stages)
    images = held_out or recipe.evaluate.images or 0
    each = min(images, recipe.evaluate.images or images)
    measuring = (recipe.epochs // recipe.evaluate.epochs * each + images) * speed.image
    found.ok(f"the whole recipe, {recipe.epochs} epochs of {steps} steps: roughly {_time(training + measuring)} here, "
             f"{_time(measuring)} of it to evaluate; a guess by one step of each stage: a machine gets faster as it warms up, "
             "losses join later, stages end early")


def _time(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
