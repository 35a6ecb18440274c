"""The recipe: what a run of it would meet here, from its checks over images and memory to two steps on trial."""

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from vqzoo.data import StreamDataset
from vqzoo.doctor.findings import Findings
from vqzoo.doctor.images import examine_images
from vqzoo.doctor.machine import memory_free
from vqzoo.doctor.trial import dry_run
from vqzoo.errors import OutOfMemory
from vqzoo.memory import Memory, advice, gib, is_shortage, predict_memory
from vqzoo.prepare import build, make_accelerator, prepare
from vqzoo.recipe import Recipe
from vqzoo.tokenizer import Tokenizer


def examine_recipe(found: Findings, recipe: Recipe) -> None:
    """Examine a recipe; where one thing is wrong, whatever does not depend on it is examined all the same."""
    found.section("recipe")
    ready = tokenizer = accelerator = None
    with found.examining("recipe"), _short_memory():
        accelerator = make_accelerator(recipe)
        ready = prepare(recipe, accelerator)
        found.ok("all that `vqzoo check` checks")
        for name, why in ready.evaluator.missing.items():
            found.wrong(f"evaluate.metrics: {name} will be missing: {why}")
    if ready is None and accelerator is not None:
        with found.examining("recipe"), _short_memory():
            tokenizer = build(recipe)
            found.ok("its networks and plugins fit together")
    found.section("data")
    reading = examine_images(found, recipe, {} if ready is None else {"train": ready.train_data, "val": ready.val_data})
    found.section("memory and speed")
    tokenizer = ready.tokenizer if ready else tokenizer
    if tokenizer is not None:
        with found.examining("memory"):
            _memory(found, recipe, tokenizer, accelerator)
    if ready is None:
        found.note("no step can be tried before that is mended")
        return
    steps, held_out = ready.steps_per_epoch, None if isinstance(ready.val_data, StreamDataset) else len(ready.val_data)
    del ready, tokenizer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with found.examining("dry run"), _short_memory():
        dry_run(found, recipe, steps, held_out, reading)


@contextmanager
def _short_memory() -> Iterator[None]:
    """Make an OutOfMemory, with what to turn, of a device's error that says that memory is short."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        raise OutOfMemory(f"memory is short: {str(error).partition(chr(10))[0] or type(error).__name__}; less data.batch_size, "
                          "a larger accumulate, a smaller network") from error


def _memory(found: Findings, recipe: Recipe, tokenizer: Tokenizer, accelerator: Accelerator) -> None:
    """Compare what a step and the checkpoints are predicted to need with what there is."""
    predicted, device = predict_memory(tokenizer, recipe), accelerator.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory_free()
    needed = predicted.states + predicted.activations
    said = (f"{gib(needed)} predicted: {gib(predicted.states)} of weights, gradients, moments and average, "
            f"{gib(predicted.activations)} of activations, without losses' and discriminators' own; {gib(free)} are free")
    if needed > free:
        error = MemoryError(f"{gib(needed)} are predicted and {gib(free)} are free on {device}")
        found.wrong(advice(recipe, tokenizer, accelerator, error))
    else:
        (found.note if needed > 0.8 * free else found.ok)(said)
    _room(found, recipe, predicted)


def _room(found: Findings, recipe: Recipe, predicted: Memory) -> None:
    """Compare the checkpoints that stay, and the one being written, with the room on the disk."""
    count = recipe.checkpoint.keep + recipe.checkpoint.keep_best + 1
    needed, free = predicted.states * count, shutil.disk_usage(".").free
    said = f"{count} checkpoints need up to {gib(needed)}, and {Path.cwd()} has {gib(free)} free"
    if needed > free:
        found.wrong(f"{said}; set checkpoint.keep lower, or give a folder with room by --out")
    else:
        found.ok(said)
