"""Checks of what a plugin says of itself, and of where it keeps its state."""

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from vqzoo.codebook import Codebook
from vqzoo.instance import make_plugin
from vqzoo.recipe import plain
from vqzoo.sources import SPECS
from vqzoo.testing.check import IMAGES, RUN, check, fail
from vqzoo.testing.passage import EARLY, LATE, ask, changed, judge_of
from vqzoo.testing.subject import Subject
from vqzoo.testing.training import Training

LONGEST = 150
"""Characters of a docstring's first line."""

KINDS = (bool, int, float, str, type(None), tuple, list, set, dict)
"""What a plain attribute may be to be compared."""


@check("`vqzoo plugins` shows the first line of the class's docstring: write one that says what the method is.")
def docstring_has_a_summary(subject: Subject) -> None:
    first = (subject.kind.__doc__ or "").strip().partition("\n")[0]
    if not 10 <= len(first) <= LONGEST:
        fail(f"a first line of {len(first)} characters where 10 to {LONGEST} are expected: {first!r}")


@check("A recipe may leave out every field: make Config a dataclass (@dataclass) in which each has a default.")
def config_has_defaults(subject: Subject) -> None:
    kind = subject.kind.Config
    if not is_dataclass(kind):
        fail("Config is no dataclass")
    named = {name for base in kind.__mro__ for name in vars(base).get("__annotations__", {})}
    if lacking := named - {one.name for one in fields(kind)}:
        fail(f"no fields of the dataclass: {', '.join(sorted(lacking))}; does its class lack @dataclass?")
    try:
        kind()
    except TypeError as error:
        fail(f"{error}")


@check("A recipe is YAML and a tokenizer's config.json is JSON: let Config's fields be numbers, strings, booleans, None, and "
       "lists and dicts of them, annotated with these types.")
def config_is_plain_data(subject: Subject) -> None:
    try:
        OmegaConf.structured(subject.kind.Config)
    except Exception as error:  # of annotations, OmegaConf's own and others
        fail(f"OmegaConf takes none of it: {error!r}")
    config = plain(subject.make().config)
    try:
        back = json.loads(json.dumps(config))
    except (TypeError, ValueError) as error:
        fail(f"{config}: {error}")
    if plain(make_plugin(subject.name, back).config) != config:
        fail(f"{config} is another configuration after it was written and read")


@check("`companions` maps hooks of this plugin to others of its own that must be bound with them: name no hook that it does "
       "not offer.")
def companions_are_its_own_hooks(subject: Subject) -> None:
    companions = subject.make().companions()
    if not isinstance(companions, dict) or any(isinstance(needed, str) for needed in companions.values()):
        fail(f"{companions!r} where a dict of tuples of names is expected")
    for name in (name for hook, needed in companions.items() for name in (hook, *needed)):
        if name not in subject.offered:
            known = "which it does not offer" if name in SPECS else "which is no hook"
            fail(f"{name!r}, {known}; it offers {', '.join(subject.offered)}")


@check("`named_stages` maps fields to the stages of which they speak, so that a recipe's typing error is found: name fields "
       "of Config, each with a tuple of stages.")
def named_stages_are_of_its_fields(subject: Subject) -> None:
    plugin = subject.make()
    stages, known = plugin.named_stages(), {one.name for one in fields(plugin.config)}
    for key, names in stages.items():
        if key not in known:
            fail(f"{key!r} is no field; fields: {', '.join(sorted(known)) or 'none'}")
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            fail(f"{key}: {names!r} where a tuple of names is expected")


class Means(dict):
    """Mean losses of an epoch that remember which were read."""

    def __init__(self, names: tuple[str, ...]):
        super().__init__(dict.fromkeys(names, 1.0))
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> float:
        self.read.add(name)
        return super().get(name, 1.0)

    def get(self, name: str, default: Any = None) -> float:
        return self[name]

    def __contains__(self, name: object) -> bool:
        self.read.add(str(name))
        return True


@check("A stage in which nobody returns a loss that stage_transition reads is refused when the recipe is wired, if "
       "`watched_losses` names it: name each.", ("stage_transition",))
def watched_losses_are_those_it_reads(subject: Subject) -> None:
    tokenizer = subject.tokenizer()
    watched = tokenizer.plugins[subject.name].watched_losses()
    if isinstance(watched, str):
        fail(f"{watched!r} where a tuple of names is expected")
    means = Means(tuple(watched))
    for progress in (EARLY, LATE):
        told = replace(progress, means=means, ends_epoch=True)
        ask(tokenizer, "stage_transition", stage=progress.stage, progress=told)
    if unsaid := means.read - set(watched):
        fail(f"it reads {', '.join(sorted(unsaid))} of progress.means and watches {', '.join(watched) or 'none'}")


@check("Another plugin that watches a loss by its name waits for it: let `loss_names` name losses that reconstruction_loss or "
       "discriminator_loss returns with these fields.", IMAGES)
def loss_names_are_those_it_returns(subject: Subject) -> None:
    tokenizer, images = subject.tokenizer(), subject.images(2)
    promised, returned = tokenizer.plugins[subject.name].loss_names(), set()
    if isinstance(promised, str):
        fail(f"{promised!r} where a tuple of names is expected")
    judge, reconstructions = judge_of(tokenizer), tokenizer(images, LATE).reconstructions
    for progress in (EARLY, LATE):
        for losses in tokenizer.reconstruction_losses(images, reconstructions, judge, progress):
            returned |= set(losses)
        if tokenizer.hooks.providers("discriminator_loss"):
            returned |= set(tokenizer.discriminator_losses(images, reconstructions.detach(), judge, progress))
    if missing := [name for name in promised if name not in returned]:
        fail(f"{', '.join(missing)} came neither early nor late; returned were {', '.join(sorted(returned))}")


@check("What is kept anywhere else does not survive a checkpoint, does not move to a GPU and is not copied: keep tensors, "
       "counters and flags that matter in parameters and (persistent) buffers, and leave get_extra_state alone.", RUN)
def state_is_in_parameters_and_buffers(subject: Subject) -> None:
    tokenizer = subject.tokenizer()
    modules = {"plugin": tokenizer.plugins[subject.name]}
    if subject.provides("make_codebook"):
        modules["codebook"] = tokenizer.codebook
    for name, value in _attributes(modules):
        if any(isinstance(part, torch.Tensor) for part in _parts(value)):
            fail(f"{name} is a plain attribute and holds a tensor; register_buffer makes a buffer of it")
    for name, module in _all_modules(modules):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            fail(f"{name} has a get_extra_state of its own, which safetensors does not take")
    before, lost = dict(_compared(modules)), _unsaved(modules)
    training = Training(subject, tokenizer).begin()
    for _ in range(4):
        training.step()
    if moved := changed(lost, _unsaved(modules)):
        fail(f"the buffer {', '.join(moved)} has persistent=False, so that a checkpoint lacks it, and training changes it")
    after = dict(_compared(modules))
    for name in [name for name in after if name not in before or after[name] != before[name]]:
        counts = isinstance(after[name], int | float) and not isinstance(after[name], bool)
        if name.rpartition(".")[2].startswith("_") and not counts:
            continue  # what is remembered for a while, as for a report
        fail(f"training changes the plain attribute {name} from {before.get(name, 'nothing')} to {after[name]}")


def _all_modules(modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for part, module in modules.items():
        for name, inner in module.named_modules():
            yield f"{part}.{name}" if name else part, inner


def _attributes(modules: dict[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """Yield the plain attributes of modules, the host's own left out."""
    own = {*vars(nn.Module()), *vars(Codebook(1, 1)), "config"}
    for place, module in _all_modules(modules):
        for name, value in vars(module).items():
            if name not in own:
                yield f"{place}.{name}", value


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple | set) else [value]


def _compared(modules: dict[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that can be compared: plain values, and that there is a tensor."""
    for name, value in _attributes(modules):
        if any(isinstance(part, torch.Tensor) for part in _parts(value)):
            yield name, "a tensor"
        elif isinstance(value, KINDS):
            yield name, repr(value) if isinstance(value, list | dict | set) else value


def _unsaved(modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Return copies of the buffers that a state_dict leaves out."""
    return {f"{part}.{name}": buffer.clone() for part, module in modules.items() for name, buffer in module.named_buffers()
            if name not in module.state_dict()}
