"""A miniature of the trainer: its steps in their order, without files, guards and moments."""

import random
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from vqzoo.ops import all_reduce_sum, code_usage, gather_rows
from vqzoo.plugin import Progress
from vqzoo.testing.passage import ask, judge_of
from vqzoo.testing.subject import EPOCH, Subject
from vqzoo.tokenizer import Output, Tokenizer
from vqzoo.trainer import merge_losses

RATE = 1e-2


class Training:
    """Train a tokenizer of a subject by plain gradient descent; each process of `processes` has images of its own.

    `reached` has the names of parameters that a gradient has reached, `losses` those of the last step.
    """

    def __init__(self, subject: Subject, tokenizer: Tokenizer, rank: int = 0, processes: int = 1):
        self.subject, self.tokenizer, self.rank, self.processes = subject, tokenizer, rank, processes
        self.steps, self.reached = 0, set()
        self.losses: dict[str, Tensor] = {}
        self.sums: dict[str, float] = {}
        self.counts = torch.zeros(tokenizer.codebook.rows, dtype=torch.int64)
        seed(0)
        self.discriminator = judge_of(tokenizer)
        self.judging = [] if self.discriminator is None else [p for p in self.discriminator.parameters() if p.requires_grad]
        self.optimizers = [torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=RATE)
                           for module in (tokenizer, self.discriminator) if module is not None and _trainable(module)]

    def begin(self) -> "Training":
        """Enter the first stage."""
        seed(1 + self.rank)
        with torch.no_grad():
            ask(self.tokenizer.eval(), "enter_stage", entering=self.subject.stages[0], tokenizer=self.tokenizer,
                batches=self.subject.batches(100 * self.rank), generator=torch.Generator().manual_seed(1))
        self.tokenizer.train().codebook.take_replaced()
        return self

    def go_on(self, other: "Training") -> "Training":
        """Take over where another training is, but not what its tokenizer and discriminator hold."""
        self.steps, self.sums, self.counts = other.steps, dict(other.sums), other.counts.clone()
        return self

    def progress(self, means: Mapping[str, float] = MappingProxyType({})) -> Progress:
        """Return where the training is, as hooks are told."""
        done, ends = self.steps, self.steps % EPOCH == EPOCH - 1
        return Progress(done, done // EPOCH, self.subject.stages[0], done, done // EPOCH, EPOCH, means, ends)

    def step(self, images: Tensor | None = None) -> dict[str, Tensor]:
        """Do one step of everything and return its losses; at an epoch's end, ask whether the stage is over."""
        images = self.subject.images(first=8 * self.steps + 4 * self.rank) if images is None else images
        seed(7 * self.steps + self.rank)
        progress = self.progress()
        output = self._tokenizer_step(images, progress)
        self._discriminator_step(images, output, progress)
        with torch.no_grad():
            self._refresh(output, progress)
            if progress.ends_epoch:
                progress = replace(progress, means=self._means())
                ask(self.tokenizer, "stage_transition", stage=progress.stage, progress=progress)
                self.sums, self.counts = {}, torch.zeros_like(self.counts)
        self.steps += 1
        self.tokenizer.report(self.progress())
        return self.losses

    def _tokenizer_step(self, images: Tensor, progress: Progress) -> Output:
        tokenizer = self.tokenizer.train()
        if self.discriminator is not None:
            self.discriminator.train()
            self._judge(False)
        output = tokenizer(images, progress)
        self.losses = merge_losses(output.losses, *tokenizer.reconstruction_losses(
            images, output.reconstructions, self.discriminator, progress))
        sum(self.losses.values()).backward()
        self._apply(self.optimizers[0], tokenizer)
        return output.detached()

    def _discriminator_step(self, images: Tensor, output: Output, progress: Progress) -> None:
        if self.discriminator is None or not self.tokenizer.hooks.providers("discriminator_loss"):
            return
        self._judge(True)
        losses = self.tokenizer.discriminator_losses(images, output.reconstructions, self.discriminator, progress)
        self.losses = merge_losses(self.losses, losses)
        if losses and len(self.optimizers) > 1:
            sum(losses.values()).backward()
            self._apply(self.optimizers[1], self.discriminator)

    def _judge(self, mode: bool) -> None:
        for parameter in self.judging:
            parameter.requires_grad_(mode)

    def _apply(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                parameter.grad = all_reduce_sum(parameter.grad) / self.processes
                self.reached.add(name)
        optimizer.step()
        optimizer.zero_grad()

    def _means(self) -> Mapping[str, float]:
        """Return the epoch's mean of each loss, the same on all processes."""
        return MappingProxyType({name: total / EPOCH for name, total in self.sums.items()})

    def _refresh(self, output: Output, progress: Progress) -> None:
        tokenizer, codebook = self.tokenizer, self.tokenizer.codebook
        for name, loss in self.losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(all_reduce_sum(loss.detach().clone())) / self.processes
        indices, counts = None, None
        if output.indices is not None:
            counts = all_reduce_sum(code_usage(codebook.rows_of(output.indices), codebook.rows))
            self.counts += counts
            indices = gather_rows(output.indices.flatten(0, 1))
        if not tokenizer.hooks.providers("refresh_codes"):
            return
        progress = replace(progress, means=self._means()) if progress.ends_epoch else progress
        ask(tokenizer, "refresh_codes", codebook=codebook, latents=gather_rows(output.latents.flatten(0, 1)), indices=indices,
            counts=counts, epoch_counts=self.counts, extras=output.extras, progress=progress,
            generator=torch.Generator().manual_seed(3 + self.steps))
        codebook.take_replaced()


def seed(number: int) -> None:
    """Make all that draws at random a function of one number."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def _trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
