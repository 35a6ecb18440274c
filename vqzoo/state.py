"""The state of a run: all that a checkpoint holds, and so all that a run which goes on has of the one before."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vqzoo import checkpoint
from vqzoo.data import StreamDataset
from vqzoo.errors import UserError
from vqzoo.recipe import named_plugins, plain, versions
from vqzoo.sharding import full, load
from vqzoo.stage import flat, nested
from vqzoo.tally import Tally


@dataclass
class Counters:
    """Where a run is; batches counts what was read, skipped steps included, and skipped counts skips in a row."""

    step: int = 0
    batches: int = 0
    epoch: int = 0
    stage: int = 0
    step_in_epoch: int = 0
    step_in_stage: int = 0
    epoch_in_stage: int = 0
    skipped: int = 0
    discriminator_skipped: int = 0
    seconds: float = 0.0
    losses: list[str] = field(default_factory=list)
    transitions: list[dict[str, Any]] = field(default_factory=list)
    files_left_out: list[str] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    collapsed: bool = False


def tensors(trainer: Any, epoch: dict[str, Tensor]) -> checkpoint.Tensors:
    """Return every tensor of a Trainer's run, with those of the epoch's tally, by file and name.

    All processes must call it; the main one alone gets them, whole ones whatever is sharded.
    """
    seen = {"latents": trainer.drift.latents, "indices": trainer.drift.indices}
    found = {
        "tokenizer": trainer.tokenizer.state_dict(),
        "optimizer": flat(trainer.moments),
        "codes": {"age": trainer.code_ages},
        "epoch": epoch,
        "drift": {name: value for name, value in seen.items() if value is not None},
        "pictures_before": trainer.pictures.before,
    }
    if trainer.ema is not trainer.tokenizer:
        found["average"] = trainer.averaged().state_dict()
    if trainer.discriminator is not None:
        found["discriminator"] = trainer.discriminator.state_dict()
        found["discriminator_optimizer"] = flat(trainer.discriminator_moments)
    return {name: full(content, trainer.main) for name, content in found.items()}


def manifest(trainer: Any) -> dict[str, Any]:
    """Return what a checkpoint of a Trainer's run says beside the tensors."""
    counters, recipe, scaler = trainer.counters, trainer.recipe, trainer.accelerator.scaler
    state = {
        "counters": vars(counters),
        "epoch": trainer.tally.state(),
        "record": trainer.record,
        "usual_loss": [trainer.guard.usual, trainer.guard.seen],
        "scaler": {} if scaler is None else scaler.state_dict(),
    }
    return {
        "step": counters.step, "epoch": counters.epoch, "stage": trainer.stage, "processes": trainer.processes,
        "images": trainer.content, "recipe": plain(replace(recipe, versions={})), "versions": versions(named_plugins(recipe)),
        "state": state,
    }


def restore(trainer: Any, path: Path) -> None:
    """Give a Trainer everything that a checkpoint holds; a UserError if it does not fit."""
    found, about = checkpoint.load(path)
    try:
        _take(trainer, found, about["state"])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:  # of another codebook, say
        raise UserError(f"--resume: {path} does not fit this recipe: {error}") from error


def _counters(values: dict[str, Any], stages: int) -> Counters:
    """Return counters of a checkpoint, a stranger's perhaps: each of its kind, none negative."""
    counters = Counters(**values)
    for one in fields(Counters):
        value = getattr(counters, one.name)
        kind = type(getattr(Counters(), one.name))
        if type(value) is not kind or (kind in (int, float) and value < 0):
            raise ValueError(f"{one.name} is {value!r}")
    if counters.stage >= stages:
        raise ValueError(f"stage {counters.stage} is none of {stages}")
    return counters


def _take(trainer: Any, found: checkpoint.Tensors, state: dict[str, Any]) -> None:
    def placed(kind: str) -> dict[str, Tensor]:
        return {name: value.to(trainer.device) for name, value in found[kind].items()}

    trainer.counters = _counters(state["counters"], len(trainer.recipe.stages))
    load(trainer.tokenizer, found["tokenizer"])
    if trainer.ema is not trainer.tokenizer:
        load(trainer.ema, found["average"])
    trainer.moments = nested(found["optimizer"])
    if trainer.discriminator is not None:
        trainer.discriminator.load_state_dict(found["discriminator"])
        trainer.discriminator_moments = nested(found["discriminator_optimizer"])
    if trainer.accelerator.scaler is not None and state["scaler"]:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    trainer.code_ages = placed("codes")["age"]
    trainer.tally = Tally.restore(placed("epoch"), state["epoch"], trainer.rank, trainer.processes)
    drift = placed("drift")
    if all(len(seen) == len(trainer.drift.images) for seen in drift.values()):
        trainer.drift.latents, trainer.drift.indices = drift.get("latents"), drift.get("indices")
    trainer.pictures.take(placed("pictures_before"))
    trainer.record = state["record"] if trainer.main else {}
    trainer.guard.usual, trainer.guard.seen = state["usual_loss"]
    if not isinstance(trainer.train_data, StreamDataset):
        trainer.train_data.recall(trainer.counters.files_left_out)
