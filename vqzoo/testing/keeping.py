"""Checks of what is kept: in a state_dict, in a copy, in an export, in the checkpoints of a run."""

import copy
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load, save
from torch import Tensor

from vqzoo import checkpoint
from vqzoo.testing.check import CODEBOOK, RUN, check, fail
from vqzoo.testing.passage import changed, same, state_of
from vqzoo.testing.subject import Subject
from vqzoo.testing.training import Training
from vqzoo.tokenizer import Tokenizer
from vqzoo.trainer import Trainer


@check("A state_dict does not hold all that decides what comes next: keep counters, flags and statistics in persistent "
       "buffers, whose shape does not change.", RUN)
def state_dict_holds_everything(subject: Subject) -> None:
    first = Training(subject, subject.tokenizer()).begin()
    for _ in range(3):
        first.step()
    second = Training(subject, _other(subject)).go_on(first)
    for one, other in ((first.tokenizer, second.tokenizer), (first.discriminator, second.discriminator)):
        if one is not None:
            kept = {name: value.contiguous().clone() for name, value in one.state_dict().items()}
            other.load_state_dict(load(save(kept)))
    if lost := changed(state_of(first.tokenizer), state_of(second.tokenizer)):
        fail(f"{', '.join(sorted(lost))}: not the same after state_dict, safetensors and load_state_dict")
    images = subject.images(first=50)
    shown = [_evaluate(training.tokenizer, images) for training in (first, second)]
    if not same(*shown):
        fail("evaluation of the loaded one gives other images")
    for step in range(3):
        losses = [training.step() for training in (first, second)]
        if apart := changed(*losses) or changed(state_of(first.tokenizer), state_of(second.tokenizer)):
            fail(f"{', '.join(sorted(apart))}: not the same in training step {step + 1} after the loading")


@check("A copy, such as the average of weights that the host keeps, shares something with its original: keep no tensor outside "
       "parameters and buffers, nor in a class or a module.", RUN)
def copies_are_independent(subject: Subject) -> None:
    training = Training(subject, subject.tokenizer()).begin()
    training.step()
    before, images = state_of(training.tokenizer), subject.images(first=50)
    shown = _evaluate(training.tokenizer, images)
    other = Training(subject, copy.deepcopy(training.tokenizer)).go_on(training)
    for _ in range(3):
        other.step()
    if moved := changed(before, state_of(training.tokenizer)):
        fail(f"training a copy changed {', '.join(sorted(moved))} of the original")
    if not same(shown, _evaluate(training.tokenizer, images)):
        fail("training a copy changed what the original makes of an image")


@check("A tokenizer that is exported and loaded gives other indices or images: what encoding and decoding need must lie in "
       "parameters and persistent buffers of the codebook and of the plugin that serves quantize.", CODEBOOK)
def export_keeps_the_indices(subject: Subject) -> None:
    training = Training(subject, subject.tokenizer()).begin()
    for _ in range(2):
        training.step()
    tokenizer, images = training.tokenizer, subject.images(first=50)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(Path(folder) / "tokenizer")
        loaded = Tokenizer.from_pretrained(Path(folder) / "tokenizer")
    found, again = (_quantized(one, images) for one in (tokenizer, loaded))
    if not same(found[0], again[0]):
        fail("the loaded one gives other indices")
    if not same(found[1], again[1]):
        fail("the loaded one gives other images")


@check("A run that was stopped does not go on as it would have: draw at random from the generator that a hook is given, or "
       "from torch's own, which the host seeds for each step; keep what counts in buffers.", RUN)
def a_run_goes_on_bit_for_bit(subject: Subject) -> None:
    recipe = subject.recipe()
    with tempfile.TemporaryDirectory() as folder, _on_cpu(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        whole, other = Path(folder) / "whole", Path(folder) / "resumed"
        Trainer(recipe, whole).run()
        steps = sorted(step for step, _ in checkpoint.complete(whole / "checkpoints"))
        Trainer(replace(recipe), other, resume=whole / "checkpoints" / f"step_{steps[0]:09d}").run()
        ends = [checkpoint.load(out / "checkpoints" / f"step_{steps[-1]:09d}")[0] for out in (whole, other)]
    apart = [f"{kind}: {name}" for kind in ends[0] for name in sorted(changed(ends[0][kind], ends[1][kind]))]
    if apart:
        fail(f"of {steps[-1]} steps, those after step {steps[0]} end with another {', '.join(apart[:8])}")


def _other(subject: Subject) -> Tokenizer:
    """Return a tokenizer like the subject's, of other random weights."""
    torch.manual_seed(99)
    recipe = subject.recipe()
    tokenizer = Tokenizer.from_recipe(recipe)
    tokenizer.wire(recipe.hooks, {})
    return tokenizer


@torch.no_grad()
def _evaluate(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """Return what a tokenizer makes of images in evaluation."""
    mode = tokenizer.training
    made = tokenizer.eval()(images).reconstructions
    tokenizer.train(mode)
    return made


@torch.no_grad()
def _quantized(tokenizer: Tokenizer, images: Tensor) -> tuple[Tensor | None, Tensor]:
    output = tokenizer.eval()(images)
    return output.indices, output.reconstructions


@contextmanager
def _on_cpu() -> Iterator[None]:
    """Let runs begin anew on a CPU in this process, whatever accelerate has been told in it before."""
    states = (AcceleratorState, PartialState, GradientState)
    before = [dict(state._shared_state) for state in states]
    try:
        with mock.patch.object(torch.cuda, "is_available", return_value=False):
            for state in states:
                state._shared_state.clear()
            yield
    finally:
        for state, shared in zip(states, before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(shared)
