"""Stop and go on: after any interruption a run ends bit for bit as it would have, and nothing that was kept is lost."""

import functools
import json
import random
import signal

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import COMMON, Stop, checkpoint_at, events, exported, run, unequal

from vqzoo import checkpoint
from vqzoo.errors import Interrupted
from vqzoo.trainer import Trainer

pytestmark = pytest.mark.usefixtures("listeners")
STEPS, LAST = 3, 12  # of an epoch, of the run
# everything that keeps state: moments and averages, ages, a plateau, averages of logits, a stage that ends within the run
CHANGED = {
    "log: {steps: 100": "log: {steps: 2",
    "evaluate: {epochs: 100}": "evaluate: {epochs: 2}",
    "optim: {lr: 2e-3}": "optim: {lr: 2e-3, schedule: cosine, warmup_steps: 2, clip: 1.0}",
    "checkpoint: {keep: 100}": "checkpoint: {steps: 2, keep: 100}",
}
WHOLE = functools.reduce(lambda text, change: text.replace(*change), CHANGED.items(), COMMON) + """
epochs: 4
epoch_steps: 3
accumulate: 2
plugins:
  probe: {}
  BASE: {}
  nsvq: {replace_after: 0, noise: 0.05}
  pixel: {}
  gan: {layers: 1, width: 8, norm: group, lecam: 0.1, r1: 1.0, adaptive: true, ramp: {refine: 2}}
  kmeans: {latents_per_code: 2, iterations: 1}
hooks: {embedding_loss: [BASE, nsvq]}
discriminator_optim: {lr: 1e-3}
stages:
  - {name: joint, epochs: 2}
  - {name: refine, freeze: ["encoder.*"], hooks: {embedding_loss: [BASE], stage_transition: []}}
"""
METHODS = {"vq": WHOLE.replace("BASE", "vq"), "simvq": WHOLE.replace("BASE", "simvq")}
TIMES = ("train/images_per_second", "train/peak_mib")


def curves(out):
    """Return every scalar of TensorBoard, as (step, value), but those that measure the machine."""
    found = events(out)
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"] if tag not in TIMES}


def state_of(out, step=LAST):
    manifest = checkpoint.verify(out / "checkpoints" / f"step_{step:09d}")
    state = manifest["state"]
    state["counters"].pop("seconds")
    for tag in TIMES:
        state["record"].pop(tag, None)
    return state


def assert_same_end(out, whole):
    """Compare two runs: tensors and counters of the last checkpoint, export, metrics, and what TensorBoard shows."""
    mine, theirs = checkpoint_at(out, LAST), checkpoint_at(whole, LAST)
    assert mine.keys() == theirs.keys()
    for kind in mine:
        assert not unequal(mine[kind], theirs[kind]), kind
    assert state_of(out) == state_of(whole)
    assert not unequal(exported(out), exported(whole))
    one, other = (json.loads((folder / "metrics.json").read_text()) for folder in (out, whole))
    assert one["metrics"] == other["metrics"] and one["run"]["transitions"] == other["run"]["transitions"]
    assert curves(out) == curves(whole)


@pytest.fixture(scope="module", params=METHODS)
def whole(request, recipe, tmp_path_factory):
    """A method's text and the folder of its run without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(recipe(METHODS[request.param]), out)
    return METHODS[request.param], out


def at(step, happen):
    """Return a listener that lets something happen once, when a hook is called in a step."""
    def listener(progress, **_):
        if progress is not None and progress.step == step and not listener.done:
            listener.done = True
            happen()

    listener.done = False
    return listener


def second_time(listener):
    """Return a listener for the second micro-batch of each step."""
    calls = {}

    def every(progress, **more):
        if progress is None:
            return
        calls[progress.step] = calls.get(progress.step, 0) + 1
        if calls[progress.step] == 2:
            listener(progress=progress, **more)

    return every


def crash():
    raise Stop


def terminate():
    signal.raise_signal(signal.SIGTERM)


PLACES = {
    "before the first checkpoint": (0, "quantize"),
    "within an epoch": (4, "quantize"),
    "amid accumulation": (4, "second quantize"),
    "at a stage's end": (5, "refresh_codes"),
    "between the steps of generator and discriminator": (7, "discriminator"),
    "in an evaluation": (6, "evaluation"),
    "in the last step": (11, "refresh_codes"),
}


@pytest.fixture
def interrupt(recipe, listeners, monkeypatch):
    """Run a recipe until something happens at a place."""

    def until(text, out, place, happen, raises, **how):
        job = Trainer(recipe(text), out, **how)
        step, hook = PLACES[place]
        if hook == "discriminator":
            original, listener = job._discriminator_step, at(step, happen)

            def discriminate(images, outputs, progress):
                listener(progress)
                return original(images, outputs, progress)

            job._discriminator_step = discriminate
        elif hook == "evaluation":
            heedful = job._heedful

            def read(batches, limit):
                for batch in heedful(batches, limit):
                    yield batch
                    if job.counters.step == step:
                        happen()

            job._heedful = read
        else:
            listener = at(step, happen)
            listeners[hook.split()[-1]] = second_time(listener) if hook.startswith("second") else listener
        with pytest.raises(raises) as caught:
            job.run()
        listeners.clear()
        return caught.value

    return until


@pytest.mark.fault(38)
def test_tensorboard_shows_one_curve_whatever_the_clock_said(recipe, tmp_path):
    out = tmp_path / "run"
    run(recipe(METHODS["vq"]), out)
    (file,) = (out / "tensorboard").glob("events.*")
    parts = file.name.split(".")
    file.rename(file.with_name(".".join([*parts[:3], "9999999999", *parts[4:]])))  # written when the clock was ahead
    run(recipe(METHODS["vq"], "epochs=5"), out, resume="auto")
    steps = [e.step for e in events(out).Scalars("loss/l1")]
    assert steps == sorted(set(steps)) and steps[-1] == 15
    curve = EventAccumulator(str(out / "tensorboard" / "usage_against_images")).Reload().Scalars("usage_against_images")
    assert [e.step for e in curve] == [1, 2, 4, 7]


@pytest.mark.fault(15)
def test_what_is_drawn_at_random_does_not_depend_on_where_a_run_began(recipe, listeners, tmp_path):
    drawn = {}

    def draw(name):
        def listener(progress, **_):
            if progress is not None:
                numbers = torch.rand(1).item(), np.random.rand(), random.random()
                drawn.setdefault(name, {}).setdefault((progress.step, progress.epoch), []).append(numbers)

        return listener

    ends = {"whole": [], "resumed": []}

    def at_an_end(name):
        return lambda **_: ends[name].append((torch.rand(1).item(), np.random.rand(), random.random())) and None

    listeners.update(quantize=draw("whole"), stage_transition=at_an_end("whole"), enter_stage=at_an_end("whole"))
    run(recipe(METHODS["vq"], "hooks.stage_transition=[probe, nsvq]"), tmp_path / "whole")
    newest = tmp_path / "whole" / "checkpoints" / "step_000000006"  # where a stage ends
    job = Trainer(recipe(METHODS["vq"], "hooks.stage_transition=[probe, nsvq]"), tmp_path / "run", resume=str(newest))
    torch.rand(7), np.random.rand(7), random.random()
    drawn["resumed"] = {}
    listeners.update(quantize=draw("resumed"), stage_transition=at_an_end("resumed"), enter_stage=at_an_end("resumed"))
    job.run()
    assert len(drawn["resumed"]) == 6
    assert ends["resumed"] == ends["whole"][-len(ends["resumed"]):] and len(ends["resumed"]) == 2
    assert all(numbers == drawn["whole"][step] for step, numbers in drawn["resumed"].items() if step[0] > 0)


@pytest.mark.fault(1, 2)
@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_died_ends_like_one_that_did_not(recipe, whole, interrupt, tmp_path, place):
    text, out = whole
    interrupt(text, tmp_path / "run", place, crash, Stop)
    run(recipe(text), tmp_path / "run", resume="auto")
    assert_same_end(tmp_path / "run", out)


@pytest.mark.fault(2, 4)
@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_was_told_to_stop_saves_the_step_and_ends_like_one_that_was_not(recipe, whole, interrupt, tmp_path, place):
    text, out = whole
    before = signal.getsignal(signal.SIGTERM)
    stopped = interrupt(text, tmp_path / "run", place, terminate, Interrupted)
    step = PLACES[place][0] + (0 if place == "in an evaluation" else 1)
    assert stopped.status == 143 and f"SIGTERM at step {step}" in str(stopped)
    assert signal.getsignal(signal.SIGTERM) is before
    newest = next(checkpoint.complete(tmp_path / "run" / "checkpoints"))[0]
    assert newest == step
    run(recipe(text), tmp_path / "run", resume="auto")
    assert_same_end(tmp_path / "run", out)
