"""Plugins that only tests use: a probe, a small discriminator, and two that misbehave.

As a script this is the vqzoo command line with these plugins installed, which is how child processes get them.
"""

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import nn

from vqzoo import Plugin, Quantized, hookimpl, sources

CLASSES = {"probe": "Probe", "adversary": "Adversary", "idle": "Idle", "recorder": "Recorder", "rival": "Rival",
           "sleeper": "Sleeper"}


@functools.cache
def with_test_plugins(group: str) -> list[EntryPoint]:
    """Stand in for `vqzoo.sources.entry_points`."""
    mine = [EntryPoint(name, f"plugins_for_tests:{kind}", group) for name, kind in CLASSES.items()]
    return [*entry_points(group=group), *mine]


class Probe(Plugin):
    """Call a test's listener where a hook is called; what a listener of a wrapper returns replaces the result."""

    listeners: ClassVar[dict[str, Callable]] = {}

    @hookimpl(wrapper=True)
    def quantize(self, latents, codebook, progress):
        result = yield
        return tell("quantize", result, latents=latents, codebook=codebook, progress=progress)

    @hookimpl(wrapper=True)
    def embedding_loss(self, latents, codes, progress):
        result = yield
        return tell("embedding_loss", result, latents=latents, codes=codes, progress=progress)

    @hookimpl(wrapper=True)
    def reconstruction_loss(self, images, reconstructions, progress):
        result = yield
        return tell("reconstruction_loss", result, images=images, reconstructions=reconstructions, progress=progress)

    @hookimpl
    def refresh_codes(self, codebook, latents, indices, counts, epoch_counts, progress, generator):
        tell("refresh_codes", None, codebook=codebook, latents=latents, indices=indices, counts=counts,
             epoch_counts=epoch_counts, progress=progress)

    @hookimpl
    def stage_transition(self, stage, progress):
        return tell("stage_transition", None, stage=stage, progress=progress)

    @hookimpl
    def enter_stage(self, leaving, entering, tokenizer, batches):
        tell("enter_stage", None, leaving=leaving, entering=entering, tokenizer=tokenizer, batches=batches)


def tell(hook: str, result: Any, **arguments: Any) -> Any:
    listener = Probe.listeners.get(hook)
    answer = listener(result=result, **arguments) if listener else None
    return result if answer is None else answer


class Adversary(Plugin):
    """A small discriminator with a hinge loss; `adaptive` weighs it as VQGAN does, by gradients at the last layer."""

    @dataclass
    class Config:
        weight: float = 0.1
        adaptive: bool = True

    def loss_names(self):
        return ("adversarial", "discriminator")

    @hookimpl
    def make_discriminator(self):
        return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4, 4))

    @hookimpl
    def discriminator_loss(self, images, reconstructions, discriminator, progress):
        real, fake = discriminator(images), discriminator(reconstructions)
        losses = {"discriminator": (1 - real).relu().mean() + (1 + fake).relu().mean()}
        return tell("discriminator_loss", losses, reconstructions=reconstructions, discriminator=discriminator,
                    progress=progress)

    @hookimpl(wrapper=True)
    def reconstruction_loss(self, reconstructions, discriminator, last_layer):
        losses = yield
        adversarial = -discriminator(reconstructions).mean()
        weight = self.config.weight
        if self.config.adaptive:
            sizes = [torch.autograd.grad(x, last_layer, retain_graph=True)[0].norm() for x in (losses[0]["l1"], adversarial)]
            weight = weight * (sizes[0] / (sizes[1] + 1e-4)).clamp(max=100).detach()
        return [*losses, {"adversarial": weight * adversarial}]


class Rival(Plugin):
    """Offer a search and an estimator, as a third party's method would."""

    @hookimpl
    def quantize(self, latents, codebook):
        indices = torch.cdist(latents.flatten(0, 1), codebook.vectors()).argmin(1).view(latents.shape[:2])
        return Quantized(codebook.lookup(indices), indices)

    @hookimpl
    def straight_through(self, latents, codes):
        return latents + (codes - latents).detach()


class Idle(Plugin):
    """Own a parameter that no loss reaches."""

    def __init__(self, config):
        super().__init__(config)
        self.forgotten = nn.Parameter(torch.ones(3))

    @hookimpl
    def stage_transition(self):
        return None


class Recorder(Plugin):
    """Write down what each process sees at each step; poison the loss of one process at one step, or kill it there."""

    @dataclass
    class Config:
        folder: str = "."
        poisoned_rank: int = -1
        poisoned_step: int = -1
        dying_rank: int = -1
        dying_step: int = -1

    @hookimpl(wrapper=True)
    def reconstruction_loss(self, progress):
        losses = yield
        if (rank(), progress.step) == (self.config.dying_rank, self.config.dying_step):
            os.kill(os.getpid(), signal.SIGKILL)
        if (rank(), progress.step) == (self.config.poisoned_rank, self.config.poisoned_step):
            losses[0]["l1"] = losses[0]["l1"] * torch.nan
        return losses

    @hookimpl
    def refresh_codes(self, codebook, latents, indices, counts, epoch_counts, progress):
        means = torch.tensor([progress.means[name] for name in sorted(progress.means)])
        seen = {"vectors": codebook.vectors(), "latents": latents, "indices": indices, "counts": counts,
                "epoch_counts": epoch_counts, "means": means}
        save_file({key: value.clone() for key, value in seen.items()}, self.path(progress.step))

    def path(self, step):
        return Path(self.config.folder) / f"rank{rank()}_step{step}.safetensors"


class Sleeper(Plugin):
    """Stand still in one step, as a process does that waits for another."""

    @dataclass
    class Config:
        step: int = -1
        seconds: float = 60.0

    @hookimpl
    def refresh_codes(self, progress):
        if progress.step == self.config.step:
            print("asleep", file=sys.stderr, flush=True)
            time.sleep(self.config.seconds)


def rank() -> int:
    return int(os.environ.get("RANK", 0))


if __name__ == "__main__":
    from vqzoo.cli import main

    sources.entry_points = with_test_plugins
    sys.exit(main())
