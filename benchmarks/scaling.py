"""A scaling model on paper: the bytes that each collective of a training step moves, against its compute, on many GPUs.

python benchmarks/scaling.py [RECIPE] [--gpus 8,64,1024] [--images 32] [--stage joint] [--asks latents,indices] [key=value ...]
python benchmarks/scaling.py --check

Every time of a GPU is predicted: no GPU was used, and all that it rests on is an option of this script, with its source. Bytes
are those of COLLECTIVES, which `--check` holds against what two real processes send (gloo on a CPU), call by call. FLOPs
are counted on one image on the meta device; those of the quantizer are 2NKD for the search and 6NKD for the dense loss. The
batch is fixed (the recipe's, shared by all GPUs) or grows with them (`--images` on each). Efficiency is the speed of a GPU
beside that of one alone, which has the whole batch or as many images. The last line is one JSON document.

Not in the model: data loading, stragglers, congestion, what a collective takes from the compute beside it, GPUs that few images
do not fill, losses of other plugins than lpips and gan, gan's penalties and the gradients behind its adaptive weight,
evaluations beyond their codes, checkpoints beyond their collectives.
"""

import argparse
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import EntryPoint, entry_points
from math import ceil, log2
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from kernels import numbers, words
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vqzoo import Plugin, UserError, hookimpl, sources
from vqzoo.bench.clock import number, processor, table, threads_for
from vqzoo.evaluation.report import hardware
from vqzoo.lpips import NETWORKS
from vqzoo.plugin import Progress
from vqzoo.prepare import enter, make_discriminator
from vqzoo.recipe import Recipe, load_recipe, versions
from vqzoo.tokenizer import Tokenizer
from vqzoo.trainer import ASKED, Trainer

BUCKETS = (1 << 20, 25 << 20)
"""Bytes of DDP's first bucket and of each other one (torch.nn.parallel.DistributedDataParallel's defaults)."""

UPDATE = 60
"""Bytes of memory traffic for a parameter in a step: 28 of Adam, 12 of the average, 4 of the norm, 16 of DDP's buckets."""

COPIED, REST = 2, 150
"""Operators beside the networks': for each gradient in a bucket, and all others."""

ASSUMED: dict[str, tuple[float, str]] = {
    "tflops": (395.0, "TFLOP/s achieved in bfloat16: half of the 790 reported of GEMMs on an H200, whose cores are an H100's"),
    "float32": (0.5, "share of these that float32 achieves, as TF32: the features of lpips"),
    "hbm": (2.7, "TB/s of GPU memory achieved: 80% of an H100's 3.35"),
    "launch": (5.0, "µs of the host for an operator in eager mode; 0 for CUDA graphs"),
    "node": (8, "GPUs in a node"),
    "nvlink": (360.0, "GB/s each way of a GPU inside its node: 80% of an H100's NVLink, 450"),
    "infiniband": (40.0, "GB/s each way of a network card: 80% of 400 Gb/s"),
    "cards": (8, "network cards of a node that a collective uses at once: one for each GPU; 1 is a single ring over all GPUs"),
    "hop": (1.0, "µs of a hop inside a node, rounded up from NCCL's own model of protocol LL (src/graph/tuning.cc)"),
    "hop_between": (5.0, "µs of a hop between nodes, from the same table"),
    "start": (5.0, "µs of a collective before its first hop, from the same table"),
    "hop_host": (25.0, "µs of a hop of gloo between hosts by TCP; --check measures it inside this machine"),
    "host": (1.0, "GB/s of gloo between hosts by TCP"),
}
"""What predicted times rest on: the option, its default, and what that is."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="nsvq_imagenet128")
    parser.add_argument("--gpus", type=numbers, default=[8, 64, 1024], metavar="NUMBER[,NUMBER]")
    parser.add_argument("--images", type=int, default=32, help="on each GPU, where the batch grows: 128 on 4, as in the paper")
    parser.add_argument("--stage", help="of which all collectives are shown; the first by default")
    parser.add_argument("--asks", type=words, default=[], help="as if a refresh asked for latents, indices or both")
    for name, (default, said) in ASSUMED.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{said} (assumed)")
    parser.add_argument("--check", type=words, nargs="?", const=list(CHECKED), metavar="RECIPE[,RECIPE]",
                        help=f"hold the bytes against two processes; of {', '.join(CHECKED)}")
    parser.add_argument("--json", type=Path, help="append the last line to this file")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    if options.record:
        return record(options)
    try:
        found = check(options) if options.check else model(options)
    except UserError as error:
        parser.error(str(error))
    here = {**hardware(torch.device("cpu"), found["processes"]), "cpu": processor()}
    row = {**found, "date": str(date.today()), "hardware": here, "versions": versions([])}
    line = json.dumps(row, allow_nan=False)
    print(line)
    if options.json:
        with options.json.open("a") as file:
            file.write(line + "\n")
    return 0 if found.get("agrees", True) else 1


# ---- what a step sends

Key = tuple[str, str, int]
"""A call's kind, type and elements."""


@dataclass(frozen=True)
class Setting:
    """Say what decides a stage's traffic: sizes in elements, images of a process in a step, the steps between rare calls.

    `checked` are the tensors that must be equal everywhere, `tensors` those that the stage trains.
    """

    stage: str
    processes: int
    images: int
    accumulate: int
    tokenizer: int
    discriminator: int
    weights: tuple[int, ...]
    last_layer: int
    codes: int
    width: int
    tokens: int
    losses: int
    checked: int
    tensors: int
    judged: bool
    adaptive: bool
    lecam: bool
    refreshes: bool
    asks: frozenset[str]
    steps: dict[str, int]

    def gathered(self, name: str, elements: int) -> list[int]:
        """Return the elements of each call that gathers what a refresh asks for: a call for each micro-batch."""
        latents = self.images // self.accumulate * self.tokens
        return [latents * elements] * self.accumulate if name in self.asks else []

    def period(self, every: str) -> int:
        """Return the steps from one call to the next."""
        return {"step": 1, "agreement": max(1, self.processes // ASKED), **self.steps}[every]

    def due(self, every: str, step: int) -> bool:
        """Tell whether a call comes in step `step` of a run, from 0, or between it and the next."""
        if every != "agreement" and step < 0:
            return False
        ends = every == "log" and (step + 1) % self.steps["epoch"] == 0
        return ends or (step + 1) % self.period(every) == 0


@dataclass(frozen=True)
class Collective:
    """Say of a collective how often it comes, and the elements that a process gives to each of its calls.

    `hidden` names the network whose backward hides it; `host` says that it is gloo's, which no device waits for.
    """

    kind: str
    dtype: str
    every: str
    elements: Callable[[Setting], list[int]]
    hidden: str = ""
    host: bool = False

    def keys(self, setting: Setting) -> list[Key]:
        return [(self.kind, self.dtype, number) for number in self.elements(setting)]

    def sizes(self, setting: Setting) -> list[int]:
        """Return the bytes that a process gives to each call."""
        return [in_bytes(*key) for key in self.keys(setting)]


NOBODY = len(pickle.dumps([]))
"""Bytes of a list without a name."""

COLLECTIVES = {
    "gradients of the tokenizer": Collective("all_reduce", "float32", "step", lambda s: [s.tokenizer], hidden="tokenizer"),
    "gradients of the discriminator": Collective(
        "all_reduce", "float32", "step", lambda s: [s.discriminator] * s.judged, hidden="discriminator"),
    "verdicts on updates": Collective("all_reduce", "float64", "step", lambda s: [2] * (1 + s.judged)),
    "counts of codes": Collective("all_reduce", "int64", "step", lambda s: [s.codes]),
    "gan's adaptive weight": Collective(
        "all_reduce", "float32", "step", lambda s: [1, 2 * s.last_layer] * s.accumulate * s.adaptive),
    "gan's averages for lecam": Collective("all_reduce", "float32", "step", lambda s: [3] * s.accumulate * s.lecam),
    "latents for a refresh": Collective("all_gather", "float32", "step", lambda s: s.gathered("latents", s.width)),
    "indices for a refresh": Collective("all_gather", "int64", "step", lambda s: s.gathered("indices", 1)),
    "agreement to go on": Collective("all_reduce", "int64", "agreement", lambda s: [1], host=True),
    "losses in the log": Collective("all_reduce", "float64", "log", lambda s: [s.losses + 1]),
    "checksums in the log": Collective("all_gather", "int64", "log", lambda s: [s.checked]),
    "losses of an epoch": Collective("all_reduce", "float64", "epoch", lambda s: [s.losses + 1] * (1 + s.refreshes)),
    "bad files, how many bytes": Collective("all_gather", "int64", "epoch", lambda s: [1]),
    "bad files": Collective("all_gather", "uint8", "epoch", lambda s: [NOBODY]),
    "a checkpoint's losses": Collective("all_gather", "float64", "checkpoint", lambda s: [s.losses, 0]),
    "a checkpoint's bad files, bytes": Collective("all_gather", "int64", "checkpoint", lambda s: [1]),
    "a checkpoint's bad files": Collective("all_gather", "uint8", "checkpoint", lambda s: [NOBODY]),
    "an evaluation's codes": Collective("all_reduce", "int64", "evaluation", lambda s: [s.codes]),
    "an evaluation's first images": Collective("all_gather", "int64", "evaluation", lambda s: [s.codes]),
    "weights for a stage": Collective("broadcast", "float32", "stage", lambda s: list(s.weights)),
}
"""The collectives of training: each line is a prediction, and `--check` its proof."""

ASIDE = {
    "DDP itself": "torch/nn/parallel/distributed.py",
    "evaluation": "vqzoo/evaluation/",
    "barriers": "barrier",
    "whether an evaluation is the best": "_keep_best",
    "the results": "_write_results",
}
"""What the check adds up without a prediction of each call, by a part of its place: none of it is in a step's own way."""


class Networks:
    """Build a recipe's networks once; say of each stage what it sends and what it computes."""

    def __init__(self, recipe: Recipe, asks: list[str]):
        if not recipe.epoch_steps:
            raise UserError("epoch_steps: the model opens no data and cannot know an epoch's steps; set epoch_steps=NUMBER")
        if unknown := {*asks} - {"latents", "indices"}:
            raise UserError(f"--asks: {', '.join(sorted(unknown))} is never gathered; choices: indices, latents")
        torch.manual_seed(recipe.seed)
        self.recipe, self.asks = recipe, asks
        self.tokenizer = Tokenizer.from_recipe(recipe)
        enter(self.tokenizer, recipe, 0)
        self.discriminator = make_discriminator(self.tokenizer, recipe)
        self.all = [module for module in (self.tokenizer, self.discriminator) if module is not None]
        self.settings = [self._setting(number) for number in range(len(recipe.stages))]
        for module in self.all:
            module.to("meta")

    def _setting(self, number: int) -> Setting:
        """Return what a stage sends if one process has the whole batch."""
        recipe, tokenizer = self.recipe, self.tokenizer
        enter(tokenizer, recipe, number)
        hooks, stage = tokenizer.hooks, recipe.stages[number]
        losses = tokenizer.rehearse(Progress(2**40, 2**40, stage.name, 2**40, 2**40, 1))
        for hook in ("reconstruction_loss", "discriminator_loss"):
            losses |= {name for plugin in hooks.plugins(hook) for name in plugin.loss_names()}
        gan = [tokenizer.plugins["gan"].config] if "gan" in hooks.providers("reconstruction_loss") else []
        judged, refreshes = (bool(hooks.providers(hook)) for hook in ("discriminator_loss", "refresh_codes"))
        asks = {name for name in ("latents", "indices") if hooks.asks_for("refresh_codes", name)}
        epochs = stage.epochs or recipe.epochs - sum(other.epochs or 0 for other in recipe.stages)
        steps = recipe.epoch_steps
        return Setting(
            stage=stage.name, processes=1, images=recipe.data.batch_size, accumulate=recipe.accumulate,
            tokenizer=numel(trainable(tokenizer)), discriminator=numel(trainable(self.discriminator)),
            weights=tuple(numel(module.parameters()) for module in self.all),
            last_layer=tokenizer.decoder.last_layer.numel(), codes=tokenizer.codebook.size,
            width=tokenizer.codebook.encoder_width, tokens=tokenizer.grid[0] * tokenizer.grid[1], losses=len(losses),
            judged=judged, adaptive=any(config.adaptive for config in gan),
            lecam=any(config.lecam for config in gan), refreshes=refreshes, asks=frozenset({*asks, *self.asks}),
            checked=len(tokenizer.codebook.state_dict()) + len(tokenizer.plugins.state_dict()),
            tensors=len(trainable(tokenizer)) + len(trainable(self.discriminator)) * judged,
            steps={"log": recipe.log.steps, "epoch": steps, "stage": max(1, epochs) * steps,
                   "evaluation": recipe.evaluate.epochs * steps, "checkpoint": recipe.checkpoint.epochs * steps},
        )

    def work(self, number: int) -> "Work":
        """Count what a stage computes for one image."""
        enter(self.tokenizer.train(), self.recipe, number)
        hooks, setting, work = self.tokenizer.hooks, self.settings[number], Work()
        images = torch.empty(1, 3, *self.recipe.data.resolution, device="meta")
        made = images.clone().requires_grad_()
        work.count("encoder and decoder", lambda: autoencode(self.tokenizer, images), self.tokenizer, "tokenizer")
        square = float(setting.tokens * setting.codes * self.tokenizer.codebook.width)
        work.flops["nearest codes"] = 2 * square
        if "nsvq" in hooks.providers("embedding_loss"):
            work.flops["dense loss"] = 6 * square
        if "lpips" in hooks.providers("reconstruction_loss"):
            network = lpips_network(self.tokenizer.plugins["lpips"].config.network)
            work.count("lpips", lambda: network(images).sum() + network(made).sum())
        if "gan" in hooks.providers("reconstruction_loss"):
            self.discriminator.train().requires_grad_(False)
            work.count("adversarial loss", lambda: added(self.discriminator(made)))
            self.discriminator.requires_grad_(True)
        if setting.judged:
            work.count("discriminator", lambda: added(self.discriminator(images)) + added(self.discriminator(images.clone())),
                       self.discriminator, "discriminator")
        return work


def trainable(module: nn.Module | None) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad] if module is not None else []


def numel(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


# ---- what a step computes


@dataclass
class Work:
    """Hold what a step computes for one image: FLOPs by part, operators, and the backward of each network that trains.

    `ready` has of each gradient, in the backward's order, the share of the backward done by then and the elements.
    """

    flops: dict[str, float] = field(default_factory=dict)
    operators: int = 0
    backward: dict[str, float] = field(default_factory=dict)
    ready: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    def count(self, part: str, loss: Callable[[], Tensor], network: nn.Module | None = None, name: str = "") -> None:
        """Run a loss forward and backward, counting."""
        done: list[tuple[int, int]] = []
        with FlopCounterMode(display=False) as flops, Operators() as operators:
            trained = trainable(network)
            hooks = [p.register_post_accumulate_grad_hook(lambda p: done.append((flops.get_total_flops(), p.numel())))
                     for p in trained]
            value = loss()
            forward = flops.get_total_flops()
            value.backward()
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
        self.flops[part] = float(flops.get_total_flops())
        self.operators += operators.number
        if name:
            self.backward[name] = self.flops[part] - forward
            self.ready[name] = [((moment - forward) / max(1.0, self.backward[name]), elements) for moment, elements in done]


def operators_of(work: Work, setting: Setting) -> int:
    """Return about how many operators a step launches."""
    copied = COPIED * setting.tensors if setting.processes > 1 else 0
    return work.operators * setting.accumulate + copied + REST


class Operators(TorchDispatchMode):
    """Count the operators that launch something."""

    number = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.number += not function.is_view
        return function(*arguments, **(options or {}))


def autoencode(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """Return a loss that reaches encoder, codebook and decoder as a step's losses do; nothing is searched."""
    latents, grid = tokenizer.latents(images)
    codes = tokenizer.codebook.compute_vectors()[torch.zeros(latents.shape[:2], dtype=torch.int64, device=images.device)]
    seen = latents + (codes - latents).detach()
    made = tokenizer.decoder(seen.transpose(1, 2).unflatten(2, grid))
    return made.sum() + (codes - latents).square().sum()


def lpips_network(name: str) -> nn.Module:
    """Return LPIPS's features on the meta device, where they need no weights."""
    import torchvision

    function, layers, _ = NETWORKS[name]
    with torch.device("meta"):
        return getattr(torchvision.models, function)(weights=None).features[: layers[-1] + 1].requires_grad_(False)


def added(logits: Any) -> Tensor:
    return logits.sum() if isinstance(logits, Tensor) else sum(part.sum() for part in logits)


# ---- how long it takes


class Machine:
    """Predict times in seconds from what is assumed."""

    def __init__(self, options: dict[str, Any]):
        self.assumed = {name: options[name] for name in ASSUMED}

    def __getattr__(self, name: str) -> float:
        return self.assumed[name]

    def collective(self, kind: str, size: float, processes: int, host: bool = False) -> float:
        """Return how long a collective takes to which each process gives `size` bytes: a ring's time, or a tree's if less."""
        if processes == 1:
            return 0.0
        turns, sent = (2 if kind == "all_reduce" else 1), on_the_wire(kind, size, processes)
        if host:  # gloo knows no tree
            return 1e-6 * self.hop_host * turns * (processes - 1) + sent / (1e9 * self.host)
        nodes, inside = ceil(processes / self.node), min(processes, self.node)
        speed = 1e9 * (self.nvlink if nodes == 1 else min(self.nvlink, self.infiniband * self.cards))
        between = turns * (nodes - 1)
        hops = between * self.hop_between + (turns * (processes - 1) - between) * self.hop
        ways = [1e-6 * hops + sent / speed]
        if kind == "all_reduce":  # a tree reaches 90% of the bandwidth, by NCCL's model
            hops = 2 * ((inside - 1) * self.hop + log2(nodes) * self.hop_between)
            ways.append(1e-6 * hops + 2 * size / (0.9 * speed))
        return 1e-6 * self.start + min(ways)

    def gradients(self, work: Work, setting: Setting, network: str) -> tuple[float, float]:
        """Return how long all buckets take, and how much of that comes after the backward of the last micro-batch."""
        backward = setting.images / setting.accumulate * work.backward[network] / (1e12 * self.tflops)
        whole = end = 0.0
        for share, elements in buckets(work.ready[network]):
            length = self.collective("all_reduce", 4 * elements, setting.processes)
            whole, end = whole + length, max(end, share * backward) + length
        return whole, max(0.0, end - backward)

    def compute(self, work: Work, images: float) -> float:
        rates = {"lpips": self.float32}
        return images * sum(flops / rates.get(part, 1.0) for part, flops in work.flops.items()) / (1e12 * self.tflops)

    def update(self, setting: Setting) -> float:
        return UPDATE * (setting.tokenizer + setting.discriminator * setting.judged) / (1e12 * self.hbm)

    def launching(self, work: Work, setting: Setting) -> float:
        return 1e-6 * self.launch * operators_of(work, setting)


def on_the_wire(kind: str, size: float, processes: int) -> float:
    """Return the bytes that each process sends in a ring."""
    return size * {"all_reduce": 2 * (processes - 1) / processes, "all_gather": processes - 1, "broadcast": 1}[kind]


def buckets(ready: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Lay gradients out as DDP does once it has seen their order; a bucket is ready with the last of its gradients."""
    found: list[tuple[float, int]] = []
    elements = 0
    for share, more in ready:
        elements += more
        if 4 * elements >= BUCKETS[bool(found)]:
            found.append((share, elements))
            elements = 0
    return [*found, (ready[-1][0], elements)] if elements else found


def predict(machine: Machine, work: Work, setting: Setting) -> dict[str, Any]:
    """Return a step as one process among many sees it: milliseconds and megabytes, each collective by itself."""
    parts = {"compute": machine.compute(work, setting.images), "update": machine.update(setting)}
    host, rows = machine.launching(work, setting), {}
    for name, collective in COLLECTIVES.items():
        sizes, steps = collective.sizes(setting), setting.period(collective.every)
        if not sizes:
            continue
        if collective.hidden:
            taken, exposed = machine.gradients(work, setting, collective.hidden)
        else:
            taken = sum(machine.collective(collective.kind, size, setting.processes, collective.host) for size in sizes) / steps
            exposed = 0.0 if collective.host else taken
        host += taken * collective.host
        parts[name] = exposed
        sent = sum(on_the_wire(collective.kind, size, setting.processes) for size in sizes)
        rows[name] = {"every": f"{steps} steps" if steps > 1 else "step", "calls": len(sizes) / steps, "ms": 1e3 * taken,
                      "exposed_ms": 1e3 * exposed, "mb": sum(sizes) / steps / 1e6, "mb_sent": sent / steps / 1e6}
    exposed, device = sum(row["exposed_ms"] for row in rows.values()), sum(parts.values())
    parts["waiting for the host"] = max(0.0, host - device)
    step, batch = max(device, host), setting.images * setting.processes
    return {"images_per_gpu": setting.images, "batch": batch, "step_ms": 1e3 * step, "images_per_second": batch / step,
            "compute_ms": 1e3 * parts["compute"], "update_ms": 1e3 * parts["update"], "exposed_ms": exposed,
            "host_ms": 1e3 * host, "largest": max(parts, key=parts.get),
            "largest_collective": max(rows, key=lambda name: rows[name]["exposed_ms"]), "collectives": rows}


def regimes(machine: Machine, work: Work, setting: Setting, gpus: int, images: int) -> dict[str, Any]:
    """Predict a stage on so many GPUs with the recipe's batch, and with `images` on each of them."""
    batch, parts = setting.images, gpus * setting.accumulate
    if batch % parts:
        why = f"it would take {parts} at least" if batch < parts else f"{parts} parts would not be equal"
        fixed = {"impossible": f"a batch of {batch} images for {gpus} GPUs: {why}"}
    else:
        fixed = predict(machine, work, replace(setting, processes=gpus, images=batch // gpus))
        fixed["efficiency"] = predict(machine, work, setting)["step_ms"] / gpus / fixed["step_ms"]
    alone = replace(setting, images=images)
    grown = predict(machine, work, replace(alone, processes=gpus))
    grown["efficiency"] = predict(machine, work, alone)["step_ms"] / grown["step_ms"]
    return {"fixed_batch": fixed, "fixed_images": grown}


def model(options: argparse.Namespace) -> dict[str, Any]:
    """Predict every stage of a recipe for each number of GPUs."""
    given = ([options.recipe] if "=" in options.recipe else []) + options.overrides
    recipe = load_recipe("nsvq_imagenet128" if "=" in options.recipe else options.recipe, given)
    names = [stage.name for stage in recipe.stages]
    shown = options.stage or names[0]
    if shown not in names:
        raise UserError(f"--stage: there is no stage {shown!r}; choices: {', '.join(names)}")
    networks, machine = Networks(recipe, options.asks), Machine(vars(options))
    stages = {name: (networks.work(number), networks.settings[number]) for number, name in enumerate(names)}
    found = {name: {str(gpus): regimes(machine, *stage, gpus, options.images) for gpus in options.gpus}
             for name, stage in stages.items()}
    for gpus in options.gpus:
        describe(gpus, shown, found[shown][str(gpus)])
    summarise(found)
    doubt = sensitivity(machine, *stages[shown], options)
    work = {name: {"gflop_per_image": {part: flops / 1e9 for part, flops in work.flops.items()},
                   "operators": operators_of(work, setting), "tokenizer_parameters": setting.tokenizer,
                   "discriminator_parameters": setting.discriminator * setting.judged,
                   "buckets_mb": [4 * count / 1e6 for _, count in buckets(work.ready["tokenizer"])]}
            for name, (work, setting) in stages.items()}
    return {"bench": "scaling", "predicted": True, "note": "every time and efficiency is predicted: no GPU was used",
            "recipe": options.recipe, "overrides": given, "asks": options.asks, "processes": 1, "work": work, "stages": found,
            "sensitivity": doubt,
            "assumed": {name: {"value": machine.assumed[name], "what": said} for name, (_, said) in ASSUMED.items()}}


def sensitivity(machine: Machine, work: Work, setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Return, and print, the efficiencies should an assumption be wrong by a factor of two, or a refresh ask for latents."""

    def efficiencies(machine: Machine, setting: Setting) -> dict[str, float | None]:
        both = {gpus: regimes(machine, work, setting, gpus, options.images) for gpus in options.gpus}
        return {f"{regime} {gpus}": found[regime].get("efficiency") for regime in ("fixed_batch", "fixed_images")
                for gpus, found in both.items()}

    cases = {"as assumed": efficiencies(machine, setting),
             "a refresh asks for latents": efficiencies(machine, replace(setting, asks=setting.asks | {"latents"}))}
    for name, factor in ((name, factor) for name in ASSUMED if name != "node" for factor in (0.5, 2)):
        if (name, factor) != ("cards", 2):
            changed = Machine({**machine.assumed, name: machine.assumed[name] * factor})
            cases[f"{name} x {factor:g}"] = efficiencies(changed, setting)
    cases["cards: 1"] = efficiencies(Machine({**machine.assumed, "cards": 1}), setting)
    base = cases["as assumed"]
    rows = [[name, *("-" if value is None else f"{value:.1%}" for value in case.values())] for name, case in cases.items()
            if name == "as assumed" or any(value is not None and abs(value - base[key]) > 0.005 for key, value in case.items())]
    print(f"\nefficiency of stage {setting.stage}, PREDICTED, where it depends by more than 0.5% on what is assumed")
    print(table(["", *(key.replace("_", " ") for key in base)], rows))
    return cases


def describe(gpus: int, stage: str, found: dict[str, Any]) -> None:
    """Print what is predicted for a number of GPUs."""
    fixed, grown = found["fixed_batch"], found["fixed_images"]
    print(f"\n{gpus} GPUs, stage {stage}, PREDICTED per step and GPU: no GPU was used")
    rows = []
    for name, row in grown["collectives"].items():
        exposed = [number(one["collectives"][name]["exposed_ms"], 3) if "collectives" in one else "-" for one in (fixed, grown)]
        rows.append([name, row["every"], f"{row['calls']:.3g}", f"{row['mb']:.3g}", f"{row['mb_sent']:.3g}",
                     number(row["ms"], 3), *exposed])
    print(table(["collective", "every", "calls", "MB", "MB sent", "ms", "exposed: fixed batch", "fixed images"], rows))
    for name, one in (("fixed batch", fixed), ("fixed images", grown)):
        print(f"{name}: " + (f"impossible: {one['impossible']}" if "impossible" in one else sentence(one)))


def sentence(one: dict[str, Any]) -> str:
    return (f"{one['batch']} images, {one['images_per_gpu']} on a GPU: compute {one['compute_ms']:.2f} ms, update "
            f"{one['update_ms']:.2f}, exposed collectives {one['exposed_ms']:.2f}; the host beside it {one['host_ms']:.2f}; a "
            f"step {one['step_ms']:.2f} ms, {one['images_per_second']:,.0f} images/s, efficiency {one['efficiency']:.1%}; "
            f"largest: {one['largest']}; of the collectives: {one['largest_collective']}")


def summarise(found: dict[str, dict[str, Any]]) -> None:
    """Print the efficiency of every stage."""
    print("\nefficiency and what is largest, PREDICTED")
    rows = []
    for stage, by_gpus in found.items():
        for gpus, both in by_gpus.items():
            cells = [[f"{one['efficiency']:.1%}", one["largest"]] if "efficiency" in one else ["impossible", ""]
                     for one in both.values()]
            rows.append([stage, gpus, *cells[0], *cells[1]])
    print(table(["stage", "GPUs", "fixed batch", "largest", "fixed images", "largest"], rows))


# ---- the check with two processes

CHECKED: dict[str, dict[str, Any]] = {
    "tiny": {
        "data": {"resolution": [32, 32], "batch_size": 4},
        "encoder": {"stride": 4, "args": {"width": 8, "mult": [1, 2], "blocks": 1, "patch": 2}},
        "decoder": {"args": {"width": 8, "mult": [1, 2], "blocks": 1, "patch": 2}},
        "codebook": {"size": 32, "width": 8},
        "plugins": {"vq": {}, "nsvq": {"replace_after": 0}, "pixel": {}, "gan": {"layers": 1, "width": 8, "ramp": {"*": 0}}},
    },
    "larger": {
        "accumulate": 2,
        "data": {"resolution": [64, 64], "batch_size": 8},
        "encoder": {"stride": 8, "args": {"width": 32, "mult": [1, 2, 4], "blocks": 1, "patch": 2}},
        "decoder": {"args": {"width": 32, "mult": [1, 2, 4], "blocks": 1, "patch": 2}},
        "codebook": {"size": 8192, "width": 64},
        "plugins": {"asking": {}, "vq": {}, "nsvq": {"replace_after": 0}, "pixel": {"l2": 1.0},
                    "gan": {"layers": 2, "width": 32, "ramp": {"*": 0}, "adaptive": True, "lecam": 0.1}},
    },
}
"""Recipes that are checked; the larger one has everything that is optional.

Its adaptive weight takes two gradients more than the model's MFLOP have.
"""

STAGES = {
    "epochs": 3, "epoch_steps": 4, "ema": 0.9, "log": {"steps": 3, "images": 1, "drift_images": 1},
    "evaluate": {"epochs": 3, "metrics": ["psnr", "usage"]}, "checkpoint": {"epochs": 3},
    "stages": [
        {"name": "joint", "epochs": 1},
        {"name": "warm-up", "epochs": 1, "freeze": ["encoder.*"],
         "hooks": {"embedding_loss": ["vq"], "refresh_codes": [], "stage_transition": [], "reconstruction_loss": ["pixel"],
                   "discriminator_loss": []}},
        {"name": "refine", "freeze": ["encoder.*"],
         "hooks": {"embedding_loss": ["vq"], "refresh_codes": [], "stage_transition": []}},
    ],
}
"""NSVQ's three stages, an epoch each."""


class Asking(Plugin):
    """Ask for all that a refresh may see, and refresh nothing."""

    @hookimpl
    def refresh_codes(self, latents, indices):
        return 0


def with_asking(group: str) -> list[EntryPoint]:
    """Stand in for `vqzoo.sources.entry_points`."""
    return [*entry_points(group=group), EntryPoint("asking", "scaling:Asking", group)]


class Recorder(TorchDispatchMode):
    """Record the collectives of this process, DDP's too: the step, kind, type, elements given to it, and its place."""

    KINDS = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "allgather_": "all_gather",
             "broadcast_": "broadcast"}

    def __init__(self):
        super().__init__()
        self.step, self.calls, self.steps = -1, [], []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            given = [x for x in tree_leaves(arguments[1 if "allgather" in name else 0]) if isinstance(x, Tensor)]
            dtype = str(given[0].dtype).removeprefix("torch.")
            self.calls.append([self.step, self.KINDS.get(name, name), dtype, numel(given), place(name)])
        elif self.steps and not function.is_view:
            self.steps[-1][0] += 1
        return function(*arguments, **(options or {}))

    def follow(self, job: Trainer) -> None:
        """Count a trainer's steps and the operators of each, or FLOPs in an epoch's last step: counting them launches more."""
        step = job._step

        def counted(*arguments: Any) -> Any:
            self.step += 1
            self.steps.append([0, None])
            if (self.step + 1) % job.steps_per_epoch:
                return step(*arguments)
            with FlopCounterMode(display=False) as flops:
                done = step(*arguments)
            self.steps[-1][1] = flops.get_total_flops()
            return done

        job._step = counted


def place(name: str) -> str:
    """Return the functions that led to a collective, the outermost first: vqzoo's, the plugins' and torch's own."""
    found, frame = [name], sys._getframe(2)
    while frame is not None:
        file = Path(frame.f_code.co_filename).as_posix()
        for part in ("/vqzoo/", "/plugins/", "/torch/nn/parallel/", "/torch/autograd/"):
            if part in file:
                found.append(f"{part[1:]}{file.split(part)[-1]}:{frame.f_code.co_name}")
        frame = frame.f_back
    return " > ".join(reversed(found))


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Hold the predicted calls against those of two processes, and time gloo on this machine."""
    with tempfile.TemporaryDirectory() as folder, asking():
        recipes = {name: written(name, Path(folder)) for name in options.check}
        launch(Path(folder), options.check)
        first, second = (json.loads(record_of(Path(folder), rank).read_text()) for rank in range(2))
        found = {name: compare(recipe, **first["recipes"][name]) for name, recipe in recipes.items()}
    for name, result in found.items():
        if first["recipes"][name]["calls"] != second["recipes"][name]["calls"]:
            result["differences"].append("the two processes did not call the same")
        describe_check(name, result)
    here = gloo(first["seconds"])
    print(f"\nMEASURED on this machine's CPU: an all-reduce of gloo's, 2 processes: 1 element "
          f"{here['all_reduce_1_element_us']:.0f} µs, 4 MiB {here['all_reduce_4_mib_ms']:.2f} ms; so a hop is "
          f"{here['hop_us']:.0f} µs, the bandwidth {here['gb_per_s']:.2f} GB/s")
    agrees = not any(result["differences"] for result in found.values())
    return {"bench": "scaling_check", "predicted": False, "note": "two processes, gloo, CPU", "processes": 2, "agrees": agrees,
            "recipes": found, "gloo_on_this_machine": here}


@contextmanager
def asking() -> Iterator[None]:
    """Have the plugin above found like any that is installed."""
    before, sources.entry_points = sources.entry_points, with_asking
    try:
        yield
    finally:
        sources.entry_points = before


def written(name: str, folder: Path) -> Recipe:
    """Write a recipe of the check and its pictures into a folder, if they are not there, and return it."""
    if name not in CHECKED:
        raise UserError(f"--check: there is no recipe {name!r}; choices: {', '.join(CHECKED)}")
    path = folder / f"{name}.yaml"
    if not path.exists():
        for split in ("train", "val"):
            (folder / split).mkdir(exist_ok=True)
            for index in range(4):
                Image.new("RGB", (64, 64), (60 * index, 128, 200)).save(folder / split / f"{index}.png")
        content = STAGES | CHECKED[name]
        content["data"] = content["data"] | {"root": str(folder), "eval_batch_size": 2, "workers": 0}
        path.write_text(json.dumps(content))
    return load_recipe(str(path))


def launch(folder: Path, names: list[str]) -> None:
    """Have two processes record recipes; a RuntimeError with what they said if one ends without its record."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {**os.environ, **threads_for("1"), "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, __file__, "--record", str(folder), "--check", ",".join(names)]
    started = []
    for rank in range(2):
        with (folder / f"said{rank}").open("w") as said:
            mine = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(command, env=mine, stdout=subprocess.DEVNULL, stderr=said))
    failed = running = True
    while running:
        time.sleep(0.1)
        running = any(process.poll() is None for process in started)
        failed = any(process.poll() is not None and not record_of(folder, n).exists() for n, process in enumerate(started))
        if failed:  # the other would wait for it
            break
    for process in started:
        process.kill()
        process.wait()
    if failed:
        said = "\n".join((folder / f"said{rank}").read_text() for rank in range(2))
        raise RuntimeError(f"a process of the check failed:\n{said}")


def record_of(folder: Path, rank: int) -> Path:
    return folder / f"record{rank}.json"


def record(options: argparse.Namespace) -> int:
    """Train each recipe in this process, one of two, and write down what it called."""
    found: dict[str, Any] = {}
    with asking():
        for name in options.check:
            with Recorder() as recorder:
                job = Trainer(written(name, options.record), options.record / f"run_{name}")
                recorder.follow(job)
                job.run()
            found[name] = {"calls": recorder.calls, "steps": recorder.steps}
    seconds = {elements: timed(torch.zeros(elements)) for elements in (1, 1 << 20)}
    record_of(options.record, dist.get_rank()).write_text(json.dumps({"recipes": found, "seconds": seconds}))
    dist.destroy_process_group()
    return 0


def timed(tensor: Tensor, rounds: int = 50) -> float:
    """Return the median seconds of an all-reduce."""
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[rounds // 2]


def gloo(seconds: dict[str, float]) -> dict[str, float]:
    """Return the time of a hop and the bandwidth: between 2 processes a ring has 2 hops, and sends what it is given once."""
    small, large = seconds["1"], seconds[str(1 << 20)]
    return {"all_reduce_1_element_us": 1e6 * small, "all_reduce_4_mib_ms": 1e3 * large, "hop_us": 1e6 * small / 2,
            "gb_per_s": (4 << 20) / max(1e-9, large - small) / 1e9}


def compare(recipe: Recipe, calls: list[list], steps: list[list]) -> dict[str, Any]:
    """Return each collective's calls as predicted and as recorded, each interval's bytes by both, and every difference."""
    with asking():
        networks = Networks(recipe, [])
    settings = [replace(setting, processes=2, images=recipe.data.batch_size // 2) for setting in networks.settings]
    rows: dict[str, Counter] = {}
    aside: dict[str, Counter] = {}
    intervals, differences = [], []
    for step in range(-1, len(steps)):
        predicted, left = expected(recipe, settings, step), recorded(calls, step)
        both = [sum(in_bytes(*key) for _, key in predicted), 0]
        for name, key in predicted:
            found = next((call for call in left if tuple(call[:3]) == key), None)
            if found:
                left.remove(found)
            else:
                differences.append(f"step {step}: {name}: {' '.join(map(str, key))} was predicted and did not come")
            row = rows.setdefault(name, Counter())
            row.update(predicted=1, recorded=int(found is not None), bytes=in_bytes(*key) if found else 0)
            both[1] += in_bytes(*key) if found else 0
        for *key, where in left:
            if name := "before the first step" if step < 0 else put_aside(where):
                aside.setdefault(name, Counter()).update(calls=1, bytes=in_bytes(*key))
            else:
                both[1] += in_bytes(*key)
                differences.append(f"step {step}: {' '.join(map(str, key))} was not predicted: {where}")
        intervals.append(both)
    return {"collectives": rows, "aside": aside, "bytes": intervals, "differences": differences,
            "stages": [of_stage(networks, settings, number, calls, steps) for number in range(len(settings))]}


def expected(recipe: Recipe, settings: list[Setting], step: int) -> list[tuple[str, Key]]:
    """Return name and key of each call that is predicted from the beginning of a step (-1: of all) to that of the next."""
    more = step + 1 < recipe.epochs * recipe.epoch_steps
    now, after = (settings[min(len(settings) - 1, max(0, number) // recipe.epoch_steps)] for number in (step, step + 1))
    due = {"stage": more and (step < 0 or now is not after), "agreement": more and now.due("agreement", step)}
    return [(name, key) for name, collective in COLLECTIVES.items()
            if due.get(collective.every, step >= 0 and now.due(collective.every, step))
            for key in collective.keys(after if collective.every == "stage" else now)]


def recorded(calls: list[list], step: int) -> list[list]:
    """Return the calls of an interval, the buckets of a backward in one, and last what may be put aside."""
    found: dict[Any, list] = {}
    for at, kind, dtype, elements, where in calls:
        if at == step:
            whole = found.setdefault(where if in_backward(where) else len(found), [kind, dtype, 0, where])
            whole[2] += elements
    return sorted(found.values(), key=lambda call: bool(put_aside(call[3])))


def in_backward(where: str) -> bool:
    """Tell whether DDP made a call for a bucket: then nothing of ours is between torch's backward and the call."""
    return where.split(" > ")[-2:-1] == ["torch/autograd/graph.py:_engine_run_backward"]


def put_aside(where: str) -> str:
    return next((name for name, part in ASIDE.items() if part in where), "")


def in_bytes(kind: str, dtype: str, elements: int) -> int:
    return 0 if kind == "barrier" else elements * getattr(torch, dtype).itemsize


def of_stage(networks: Networks, settings: list[Setting], number: int, calls: list[list], steps: list[list]) -> dict[str, Any]:
    """Return what a stage's step computes and launches: as the model has it, and as recorded.

    Recorded are the FLOPs of the stage's last step, without a CPU's search and dense loss, and the rest of its leanest, but for
    the first, in which DDP does not know the gradients' order yet.
    """
    setting, work, end = settings[number], networks.work(number), (number + 1) * networks.recipe.epoch_steps
    step = min(range(end - networks.recipe.epoch_steps + 1, end - 1), key=lambda step: steps[step][0])
    flops = sum(flops for part, flops in work.flops.items() if part not in ("nearest codes", "dense loss"))
    found = sum(at == step and in_backward(where) for at, *_, where in calls)
    return {"stage": setting.stage, "network_mflop": [flops * setting.images / 1e6, steps[end - 1][1] / 1e6],
            "operators": [operators_of(work, setting), steps[step][0]],
            "buckets": [sum(len(buckets(ready)) for ready in work.ready.values()), found]}


def describe_check(name: str, result: dict[str, Any]) -> None:
    """Print what was predicted for a recipe and what was recorded of it."""
    print(f"\n{name}: what a process gives to each collective, PREDICTED and RECORDED of 2 processes (gloo, CPU)")
    rows = [[collective, str(row["predicted"]), str(row["recorded"]), f"{row['bytes']:,}"]
            for collective, row in result["collectives"].items()]
    print(table(["collective", "calls predicted", "calls recorded", "bytes recorded"], rows))
    for where, row in result["aside"].items():
        print(f"aside, {where}: {row['calls']} calls, {row['bytes']:,} bytes")
    equal = sum(predicted == found for predicted, found in result["bytes"])
    print(f"bytes are as predicted in {equal} of {len(result['bytes'])} intervals from step to step")
    rows = [[stage["stage"], *(f"{value:,.6g}" for key in ("network_mflop", "operators", "buckets") for value in stage[key])]
            for stage in result["stages"]]
    print(table(["a step of", "MFLOP predicted", "recorded", "operators predicted", "recorded", "buckets predicted",
                 "recorded"], rows))
    print("\n".join(result["differences"]) or "no difference")


if __name__ == "__main__":
    sys.exit(main())
