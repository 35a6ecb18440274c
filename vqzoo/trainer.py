"""The trainer: one loop, in order. It asks hooks wherever a method could differ, and decides nothing about codebooks."""

import hashlib
import math
import random
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vqzoo import checkpoint, sharding, state
from vqzoo.data import Batch, StreamDataset, content, eval_batches, stamp, to_images, train_batches
from vqzoo.errors import (
    LOST,
    DataError,
    Interrupted,
    LostError,
    NonFiniteError,
    OutOfMemory,
    PluginError,
    StorageError,
    UserError,
)
from vqzoo.evaluation.evaluate import Result
from vqzoo.evaluation.report import card, data_card, hardware, to_json, versions_of_metrics
from vqzoo.files import write_text
from vqzoo.folder import RunFolder
from vqzoo.guard import BadUpdate, Guard, Update, keep_evidence
from vqzoo.interrupt import StopSignals
from vqzoo.memory import advice, is_shortage
from vqzoo.monitor import Drift, Monitor, memory, save_picture
from vqzoo.ops import all_reduce_sum, code_usage, gather_names, gather_rows, perplexity, usage, use
from vqzoo.ops.collective import Agreement, differing, from_main
from vqzoo.pictures import Pictures
from vqzoo.plugin import Progress
from vqzoo.prepare import enter, make_accelerator, prepare
from vqzoo.recipe import Recipe, named_plugins, to_yaml, versions
from vqzoo.stage import Moments, longest, make_optimizer, set_learning_rate, take_moments
from vqzoo.state import Counters
from vqzoo.tally import Tally
from vqzoo.tokenizer import Output, Tokenizer

MOST_SKIPPED = 50
"""Optimizer steps in a row that the fp16 scaler may skip before the run stops."""

ASYNCHRONOUS = ("cuda",)
"""Kinds of device for which the host must not wait within a step."""

ASKED = 64
"""Processes that ask one another in each step whether to stop; of twice as many, it is every second step, and so on."""

UNREADABLE = 255
"""The wish to stop, beyond all signals' numbers, of a process that cannot read its images."""


class Trainer:
    """Train a recipe into a folder. Everything that can be wrong is found by the constructor, before training."""

    def __init__(self, recipe: Recipe, out: str | Path, resume: str | Path = "never", insist: bool = False):
        self.recipe, self.out = recipe, Path(out)
        self.accelerator = make_accelerator(recipe)
        self.folder = RunFolder(self.out, resume, insist)
        try:
            self._make_ready()
        except BaseException:
            self.folder.release()
            raise

    def _make_ready(self) -> None:
        recipe = self.recipe
        self.start = self.folder.find(recipe)
        ready = prepare(_without_weights(recipe) if self.start.path else recipe, self.accelerator)
        self.kept, self.evaluator = ready.kept, ready.evaluator
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.train_data, self.val_data = ready.train_data, ready.val_data
        self.steps_per_epoch = ready.steps_per_epoch
        self.steps = self.steps_per_epoch * recipe.epochs
        self.content = self._agreed_content()
        self.folder.check_images(self.start, self.content)
        self.counters = Counters()
        self.last_of_all: Result | None = None
        self.moments: Moments = {}
        self.discriminator_moments: Moments = {}
        self.tokenizer = ready.tokenizer.to(self.device)
        self.discriminator = ready.discriminator if ready.discriminator is None else ready.discriminator.to(self.device)
        judges = () if self.discriminator is None else self.discriminator.parameters()
        self.discriminator_parameters = [parameter for parameter in judges if parameter.requires_grad]
        self.ema = deepcopy(self.tokenizer).eval().requires_grad_(False) if recipe.ema else self.tokenizer
        for tokenizer in dict.fromkeys([self.tokenizer, self.ema]) if recipe.shard else ():
            sharding.shard([tokenizer.encoder, tokenizer.decoder], self.accelerator)
        self.code_ages = torch.zeros(self.tokenizer.codebook.rows, dtype=torch.int64, device=self.device)
        # accelerate's gradient scaler must itself read on the host whether it skips, and would not see a fused step skip
        self.fused = recipe.precision != "fp16"
        careful = recipe.guard.policy != "stop" or recipe.guard.spike is not None
        deferred = self.fused and not careful and self.device.type in ASYNCHRONOUS
        self.guard = Guard(self.device, deferred, recipe.guard.spike, self.processes)
        self._compile()
        self.fixed = self._fixed_images()
        self.drift = Drift(self.fixed[: recipe.log.drift_images])
        self.pictures = Pictures(self.fixed[: recipe.log.images])
        self.record: dict[str, float] = {}
        self.bad_files: list[str] = []
        self._reset_tally()
        self.saved_step: int | None = self.start.manifest.get("step")  # which is not written twice
        if self.start.path:
            state.restore(self, self.start.path)
        self.train_batches = self._training_stream()
        self.folder.claim(recipe, self.start)

    def _agreed_content(self) -> dict[str, Any]:
        """Return what identifies the training images; a UserError if some process has others, as they would not keep pace."""
        found = [content(data) for data in (self.train_data, self.val_data)]
        for role, mine in zip(("training", "held-out"), found, strict=True):
            if len(all_of := set(gather_names([str(mine)]))) > 1:
                raise UserError(f"data: the {role} images are not the same on every process: {' and '.join(sorted(all_of))}")
        return found[0]

    def _compile(self) -> None:
        """Have the networks compiled when they first train, if the recipe wants it; hooks and averages stay as they are."""
        if not self.recipe.compile:
            return
        self.tokenizer.compile_networks()
        if self.discriminator is not None:
            self.discriminator.compile(dynamic=False)

    def _training_stream(self) -> Iterator[Batch]:
        """Return the run's batches; the first is read now, so that unreadable data is found before training."""
        recipe = self.recipe
        start = self.counters.batches * recipe.data.batch_size
        stream = train_batches(recipe.data, self.train_data, recipe.seed, start, self.accelerator.process_index,
                               self.accelerator.num_processes, recipe.accumulate)
        return _after(next(stream), stream)

    # ---- the run

    def run(self) -> dict[str, Any]:
        """Train to the end, evaluate, export, and return what metrics.json holds.

        SIGTERM and SIGINT end it with Interrupted at the next step boundary, everything saved.
        """
        self.monitor = Monitor(self.out / "tensorboard", self.steps, self.counters.step, self._anew(), self.main)
        self.writer = checkpoint.Writer(self.folder.checkpoints)
        self.agreement = Agreement()
        self.began = time.monotonic() - self.counters.seconds
        try:
            with StopSignals() as self.signals, use(self.recipe.ops.backend, self.recipe.ops.precision):
                return self._run()
        except PluginError as error:
            raise PluginError(f"{self._where()}: {error}") from error
        except (RuntimeError, MemoryError) as error:
            if is_shortage(error):
                said = advice(self.recipe, self._alone(), self.accelerator, error)
                raise OutOfMemory(f"{self._where()}: {said}") from error
            if any(word in str(error) for word in LOST):
                self.writer.wait()
                step = next((step for step, _ in checkpoint.complete(self.folder.checkpoints)), None)
                kept = "there was no checkpoint yet" if step is None else f"the checkpoint of step {step} is whole"
                raise LostError(f"{self._where()}: a device or another process is lost: {str(error).partition(chr(10))[0]}; "
                                f"{kept}; look at what the other processes said, then go on with --resume auto") from error
            raise
        finally:
            self.monitor.close()
            self.train_batches.close()
            self.writer.wait()
            self.folder.release()

    def _alone(self) -> Tokenizer:
        """Return a tokenizer that this process can run while the others do something else."""
        if not self.recipe.shard:
            return self.tokenizer
        tokenizer = Tokenizer.from_recipe(_without_weights(self.recipe))
        enter(tokenizer, self.recipe, self.counters.stage)
        return tokenizer

    def _where(self) -> str:
        return f"step {self.counters.step} (epoch {self.counters.epoch}, stage {self.stage!r})"

    def _run(self) -> dict[str, Any]:
        """Train all epochs, with what the operations use as the recipe has it."""
        resumed = self.start.path is not None
        self.monitor.text("recipe", to_yaml(self.recipe))
        if resumed:
            self._say_resumed()
        for note in (*self.start.notes, *self.train_data.notes, *self.val_data.notes):
            self.monitor.say(note, self.counters.step)
        for name, why in self.evaluator.missing.items():
            self.monitor.say(f"evaluate.metrics: {name} will be missing: {why}")
        if self.kept and not resumed:
            self.monitor.say(f"init_from {self.recipe.init_from} has no fitting tensor for {', '.join(self.kept)}", 0)
        self._begin_stage(resumed)
        while self.counters.epoch < self.recipe.epochs:
            try:
                self._train_epoch()
                self._end_epoch()
            except BadUpdate as bad:
                self._roll_back(bad)
        return self._finish()

    def _say_resumed(self) -> None:
        """Say from where the run goes on, and what is not as it was."""
        counters, then = self.counters, self.start.manifest.get("processes", self.processes)
        self.monitor.say(f"resumed from {self.start.path}", counters.step)
        if then != self.processes:
            self.monitor.say(f"{then} processes wrote it and {self.processes} go on: the same {self.recipe.data.batch_size} "
                             "images a step and the same codebook; sums round differently", counters.step)
        if isinstance(self.train_data, StreamDataset):
            self.monitor.say(f"data.name: {self.recipe.data.name} is a stream, and begins anew", counters.step)
        self._write_record_again()

    def _fixed_images(self) -> Tensor:
        """Return the held-out images on which drift is measured and of which pictures are made."""
        wanted = max(self.recipe.log.drift_images, self.recipe.log.images)
        batches = list(eval_batches(self.recipe.data, self.val_data, limit=wanted))
        images = torch.cat([batch.images for batch in batches])
        if not len(images):
            bad = [name for batch in batches for name in batch.bad]
            raise UserError(f"data.val: none of {len(bad)} images taken from it decodes: {', '.join(bad[:5])}")
        return to_images(images, self.device)

    # ---- stages

    @property
    def stage(self) -> str:
        return self.recipe.stages[self.counters.stage].name

    def _begin_stage(self, resumed: bool = False) -> None:
        """Wire, freeze, let plugins prepare, and make the optimizers; in this order, since DDP looks only once."""
        counters, recipe = self.counters, self.recipe
        enter(self.tokenizer, recipe, counters.stage)
        if self.ema is not self.tokenizer:
            enter(self.ema, recipe, counters.stage)
            self.ema.requires_grad_(False).eval()
        if not resumed:
            leaving = recipe.stages[counters.stage - 1].name if counters.stage else None
            batches = (to_images(batch.images, self.device) for batch in self._preparation_batches())
            self.tokenizer.eval()
            _seed_everything(_mix(recipe.seed, counters.step, counters.stage, self.rank))
            with torch.no_grad(), sharding.whole(self.tokenizer):
                self.tokenizer.hooks.enter_stage(
                    leaving=leaving, entering=self.stage, tokenizer=self.tokenizer, batches=batches,
                    generator=self._generator(1),
                )
        self._make_optimizers()
        self._follow_replaced()
        self._checked_gradients: list[nn.Module] = []
        self.logged_step, self.logged_at = counters.step, time.monotonic()

    def _preparation_batches(self) -> Iterator[Batch]:
        """Yield training images beside the run's own stream, which must not move."""
        recipe = self.recipe
        stream = train_batches(replace(recipe.data, workers=0), self.train_data, recipe.seed, 0,
                               self.accelerator.process_index, self.accelerator.num_processes, recipe.accumulate)
        try:
            for batch in stream:
                self.bad_files += batch.bad
                yield batch
        finally:
            stream.close()

    def _make_optimizers(self) -> None:
        recipe = self.recipe
        optimizer = make_optimizer(self.tokenizer, recipe.optim, self.moments, self.fused)
        self.model, self.optimizer = self._prepared(self.tokenizer, optimizer)
        # Autocast belongs to the training step alone: evaluation and drift are measured in float32.
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.model.train()
        if self.discriminator is not None:
            self._train_discriminator(True)
            self.discriminator.train()
            optimizer = make_optimizer(self.discriminator, recipe.discriminator_optim, self.discriminator_moments, self.fused)
            self.discriminator_model, self.discriminator_optimizer = self._prepared(self.discriminator, optimizer)
            self.accelerator.unwrap_model(self.discriminator_model, keep_fp32_wrapper=False)  # plugins switch autocast off

    def _prepared(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Return a module and its optimizer as accelerate runs them; the optimizer's state is in its place already."""
        if self.guard.deferred:
            optimizer.found_inf = self.guard.stopped
        if self.recipe.shard:
            sharding.same_everywhere(module)
            return module, self.accelerator.prepare_optimizer(optimizer, device_placement=False)
        return self.accelerator.prepare(module, optimizer, device_placement=[True, False])

    def _train_discriminator(self, mode: bool) -> None:
        """Let the discriminator take gradients or not; what its plugin froze stays frozen."""
        for parameter in self.discriminator_parameters:
            parameter.requires_grad_(mode)

    def _leave_stage(self) -> None:
        """Keep the moments and give the bare modules back."""
        self._take_moments()
        self.tokenizer = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.discriminator is not None:
            self.discriminator = self.accelerator.unwrap_model(self.discriminator_model, keep_fp32_wrapper=False)
            self.discriminator_model = self.discriminator_optimizer = None
        self.model = self.optimizer = None
        self.accelerator.free_memory()

    def _take_moments(self) -> None:
        sharding.reshard(self.tokenizer)
        take_moments(self.tokenizer, self.optimizer, self.moments)
        if self.discriminator is not None:
            take_moments(self.discriminator, self.discriminator_optimizer, self.discriminator_moments)

    # ---- an epoch

    def _reset_tally(self) -> None:
        codes = self.tokenizer.codebook.rows
        self.tally = Tally(torch.zeros(codes, dtype=torch.int64, device=self.device))
        self.logged_step, self.logged_at = self.counters.step, time.monotonic()

    def _train_epoch(self) -> None:
        """Train what an epoch still lacks: a resumed one may lack no more than its end."""
        counters = self.counters
        while counters.step_in_epoch < self.steps_per_epoch:
            batches, problem = self._next_batches()
            ends = counters.step_in_epoch + 1 == self.steps_per_epoch
            try:
                self._stop_if_asked(problem)
                self.batches = batches
                done = self._step(batches, ends)
            except BadUpdate as bad:
                self._keep_evidence(bad)
                raise
            if not done:
                continue
            self._log()
            if self._saves(counters.step, ends):
                self._save()
            self._write_record()

    def _saves(self, step: int, ends_epoch: bool) -> bool:
        """Tell whether a checkpoint is due after so many steps; at an epoch's end, it is written before that is dealt with."""
        due, epochs = self.recipe.checkpoint, self.counters.epoch + 1
        whole = ends_epoch and (epochs % due.epochs == 0 or epochs == self.recipe.epochs)
        return whole or bool(due.steps and step % due.steps == 0)

    def _next_batches(self) -> tuple[list[Batch], Exception | None]:
        """Return a step's micro-batches, or why they cannot be read; the other processes must hear of it first."""
        try:
            batches = [next(self.train_batches) for _ in range(self.recipe.accumulate)]
        except (DataError, UserError) as error:  # of workers, or of too many files that do not decode
            return [], error
        self.bad_files += [name for batch in batches for name in batch.bad]
        return batches, None

    def _stop_if_asked(self, problem: Exception | None = None) -> None:
        """Save and leave, all processes together, if one has received a signal or cannot go on; called between two steps."""
        if self.counters.batches % max(1, self.processes // ASKED):
            if problem:  # the rest are not asked now
                raise problem
            return
        wish = self.agreement.largest(UNREADABLE if problem else self.signals.received)
        if not wish:
            return
        self._save()
        self.writer.wait()
        error = self.writer.take_error()
        # nobody leaves before all is written: a launcher ends the others as soon as one has left
        if self.agreement.largest(int(error is not None)):
            raise StorageError(f"{self.folder.checkpoints}: the last checkpoint could not be written: "
                               f"{error or 'see what the main process says'}; those before it are whole")
        if problem:
            raise problem
        if wish == UNREADABLE:
            raise DataError("another process cannot read its images any more; the run was saved")
        name = signal.Signals(wish).name
        raise Interrupted(f"{name} at step {self.counters.step}: saved; --resume auto goes on from there", wish)

    def _progress(self, ends_epoch: bool = False) -> Progress:
        c = self.counters
        return Progress(c.step, c.epoch, self.stage, c.step_in_stage, c.epoch_in_stage, self.steps_per_epoch,
                        ends_epoch=ends_epoch)

    def _step(self, batches: list[Batch], ends_epoch: bool) -> bool:
        """Do one optimizer step of tokenizer and discriminator; False if the fp16 scaler skipped it."""
        counters, recipe = self.counters, self.recipe
        progress = self._progress(ends_epoch)
        _seed_everything(_mix(recipe.seed, counters.batches, self.rank))
        counters.batches += 1
        self.rate = set_learning_rate(self.optimizer, recipe.optim, counters.step, self.steps)
        done = self._tokenizer_step(batches, progress)
        if done is None:
            return False
        losses, outputs, images = done
        if self.discriminator is not None and self.tokenizer.hooks.providers("discriminator_loss"):
            losses = merge_losses(losses, self._discriminator_step(images, outputs, progress))
        self.tally.add(losses)
        if ends_epoch or (counters.step + 1) % recipe.log.steps == 0 or self._saves(counters.step + 1, ends_epoch):
            self.guard.check()
        with torch.no_grad():
            self._update_ema()
            self._refresh(outputs, progress)
        counters.step += 1
        counters.step_in_epoch += 1
        counters.step_in_stage += 1
        return True

    def _tokenizer_step(self, batches: list[Batch], progress: Progress):
        """Return the losses, the outputs and the images of all micro-batches, or None for a skipped step."""
        losses: dict[str, Tensor] = {}
        checks: dict[str, Tensor] = {}
        outputs, images = [], []
        self._train_discriminator(False)
        before = self._moved_by_forward()
        for number, batch in enumerate(batches):
            images.append(to_images(batch.images, self.device))
            with self._no_sync_but_last(self.model, number), self.accelerator.autocast():
                output = self.model(images[-1], progress)
                found = merge_losses(output.losses, *self.tokenizer.reconstruction_losses(
                    images[-1], output.reconstructions, self.discriminator, progress))
            with self._no_sync_but_last(self.model, number):  # backward under autocast would recast what ran in float32
                self.accelerator.backward(sum(found.values()) / self.recipe.accumulate)
            self._add(losses, found)
            for name, fine in output.checks.items():
                checks[name] = checks[name] & fine if name in checks else fine
            outputs.append(output.detached())
        sharding.reshard(self.tokenizer)
        self._check_every_parameter_has_a_gradient(self.tokenizer)
        self._note_losses(list(losses))
        sources = dict.fromkeys(losses, "reconstruction_loss") | dict.fromkeys(output.losses, "embedding_loss")
        if not self._apply(self.optimizer, self.tokenizer, self.recipe.optim.clip, self._told(losses, sources), checks):
            _undo(before)
            return None
        return losses, outputs, images

    def _moved_by_forward(self) -> list[tuple[Tensor, Tensor]]:
        """Return the buffers that a forward may move, with copies, where a skipped step must leave no trace in them."""
        if self.recipe.guard.policy != "skip":
            return []
        modules = (self.tokenizer.encoder, self.tokenizer.decoder, self.tokenizer.plugins, self.discriminator)
        return [(buffer, buffer.clone()) for module in modules if module is not None for buffer in module.buffers()]

    def _add(self, losses: dict[str, Tensor], found: dict[str, Tensor]) -> None:
        for name, value in found.items():
            losses[name] = losses.get(name, 0) + value.detach() / self.recipe.accumulate

    def _told(self, losses: dict[str, Tensor], sources: dict[str, str]) -> dict[str, Tensor]:
        """Return losses by what is to be said of them, should they not be finite: their hook and who serves it."""
        providers = self.tokenizer.hooks.providers
        return {f"loss {name!r} of {sources[name]} ({', '.join(providers(sources[name]))})": value
                for name, value in losses.items()}

    def _discriminator_step(self, images: list[Tensor], outputs: list[Output], progress: Progress) -> dict[str, Tensor]:
        config = self.recipe.discriminator_optim
        self._train_discriminator(True)
        set_learning_rate(self.discriminator_optimizer, config, self.counters.step, self.steps)
        losses: dict[str, Tensor] = {}
        before = self._moved_by_forward()
        for number, (real, output) in enumerate(zip(images, outputs, strict=True)):
            with self._no_sync_but_last(self.discriminator_model, number), self.accelerator.autocast():
                found = self.tokenizer.discriminator_losses(real, output.reconstructions, self.discriminator_model, progress)
                if not found:
                    self.discriminator_optimizer.zero_grad()
                    return {}
            with self._no_sync_but_last(self.discriminator_model, number):
                self.accelerator.backward(sum(found.values()) / self.recipe.accumulate)
            self._add(losses, found)
        self._check_every_parameter_has_a_gradient(self.discriminator)
        told = self._told(losses, dict.fromkeys(losses, "discriminator_loss"))
        done = self._apply(self.discriminator_optimizer, self.discriminator, config.clip, told, {})
        if not done:
            _undo(before)
        return losses if done or self.recipe.precision == "fp16" else {}

    def _no_sync_but_last(self, model: nn.Module, number: int) -> Any:
        last = number == self.recipe.accumulate - 1
        if last:
            return nullcontext()
        return sharding.no_sync(model) if self.recipe.shard else self.accelerator.no_sync(model)

    def _apply(
        self, optimizer: Any, module: nn.Module, clip: float | None, losses: dict[str, Tensor], checks: dict[str, Tensor]
    ) -> bool:
        """Clip and step unless anything is not finite; False if the fp16 scaler or the guard's policy skipped the step."""
        self.accelerator.unscale_gradients(optimizer)
        named = {name: p for name, p in module.named_parameters() if p.grad is not None}
        gradients = [p.grad for p in named.values()]
        if self.recipe.shard:
            sharding.average_gradients(gradients, self.processes)
        norms = sharding.norms(gradients)
        if clip is not None:
            sharding.clip(gradients, clip, torch.linalg.vector_norm(torch.stack(norms)))
        judged = {} if self.recipe.precision == "fp16" else dict(zip(named, norms, strict=True))
        whose = module is self.tokenizer
        spared = "nothing was updated" if whose else "the discriminator was not updated, the tokenizer was updated"
        update = Update(self.counters.step, self.counters.batches - 1, self._where(), spared, watched=whose)
        allowed = self._allowed(update, losses, judged, checks)
        if allowed:
            optimizer.step()
        skipped = not allowed or optimizer.step_was_skipped
        optimizer.zero_grad()
        self._count_skipped("skipped" if whose else "discriminator_skipped", skipped, by_scaler=allowed)
        return not skipped

    def _allowed(
        self, update: Update, losses: dict[str, Tensor], norms: dict[str, Tensor], checks: dict[str, Tensor]
    ) -> bool:
        """Have an update judged; False if it is to be skipped."""
        try:
            self.guard.judge(update, losses, norms, checks)
        except BadUpdate as bad:
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.update()  # which would otherwise be thought to have been asked twice
            if self.recipe.guard.policy != "skip":
                raise
            self._keep_evidence(bad)
            self.monitor.say(f"{bad}; skipped (guard.policy)", self.counters.step)
            self.guard.forgive()
            return False
        return True

    def _count_skipped(self, counter: str, skipped: bool, by_scaler: bool) -> None:
        in_a_row = getattr(self.counters, counter) + 1 if skipped else 0
        setattr(self.counters, counter, in_a_row)
        most = MOST_SKIPPED if by_scaler else self.recipe.guard.most
        if in_a_row > most and by_scaler:
            raise NonFiniteError(f"step {self.counters.step}: the fp16 scaler skipped {most} steps in a row ({counter}); "
                                 "gradients overflow at any scale: lower the learning rate or use bf16")
        if in_a_row > most:
            raise NonFiniteError(f"{self._where()}: more than {most} updates in a row would be skipped ({counter}, "
                                 "guard.most); lower the learning rate, set optim.clip, or look at what failures/ holds")

    def _keep_evidence(self, bad: BadUpdate) -> None:
        """Leave in failures/ what is needed to see a bad update again: its batch, the recipe, the report."""
        counters = self.counters
        modules = {"tokenizer": self.tokenizer} | ({} if self.discriminator is None else {"discriminator": self.discriminator})
        about = {"epoch": counters.epoch, "stage": self.stage, "process": self.rank, "processes": self.processes,
                 "policy": self.recipe.guard.policy, "checkpoint_step": self.saved_step,
                 "versions": versions(named_plugins(self.recipe))}
        try:
            batches = self._batches_of(bad.update)
            place = keep_evidence(self.out / "failures", bad, self.rank, batches, modules, about, to_yaml(self.recipe))
        except (OSError, DataError, UserError) as error:
            self.monitor.say(f"there is no evidence of the bad update in {self.out / 'failures'}: {error}")
        else:
            self.monitor.say(f"evidence of the bad update: {place or 'none is kept beyond what failures/ holds'}")

    def _batches_of(self, update: Update) -> list[Batch]:
        """Return the images of an update: those at hand, or, if it was found out later, read again; none of a stream."""
        if update.batch == self.counters.batches - 1:
            return self.batches
        if isinstance(self.train_data, StreamDataset):
            return []
        start = update.batch * self.recipe.data.batch_size
        with closing(train_batches(replace(self.recipe.data, workers=0), self.train_data, self.recipe.seed, start, self.rank,
                                   self.processes, self.recipe.accumulate)) as stream:
            return [next(stream) for _ in range(self.recipe.accumulate)]

    def _roll_back(self, bad: BadUpdate) -> None:
        """Go back to the last checkpoint and on with other batches, if the policy says so; else raise."""
        guard, counters = self.recipe.guard, self.counters
        if guard.policy != "rollback":
            raise bad
        self.writer.wait()
        start = self.folder.newest()
        step = start.manifest.get("step")
        again = sum(event["to"] == step for event in counters.rollbacks)
        if start.path is None or again >= guard.most:
            why = f"it has been {again} times (guard.most)" if start.path else "there is no checkpoint yet"
            raise NonFiniteError(f"{bad}; it cannot be rolled back: {why}") from bad
        event = {"step": bad.update.step, "batch": bad.update.batch, "to": step, "reason": str(bad)}
        # the bad batch is not seen again; what was found and exported stands
        kept = {name: getattr(counters, name) for name in ("batches", "files_left_out", "best")}
        kept["rollbacks"] = [*counters.rollbacks, event]
        self._leave_stage()
        for module in (self.tokenizer, self.discriminator):
            if module is not None:
                module.zero_grad(set_to_none=True)
        state.restore(self, start.path)
        self.saved_step = step
        vars(self.counters).update(kept)
        self.train_batches.close()
        self.train_batches = self._training_stream()
        self.monitor.rewind(self.counters.step, self._anew())
        self._write_record_again()
        self.monitor.say(f"{bad}; rolled back to step {step} (guard.policy)", step)
        self.guard.forgive()
        self._begin_stage(resumed=True)

    def _check_every_parameter_has_a_gradient(self, module: nn.Module) -> None:
        if module in self._checked_gradients:
            return
        self._checked_gradients.append(module)
        idle = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
        if not idle:
            return
        whose = "" if module is self.tokenizer else " of the discriminator"
        said = (f"stage {self.stage}: no gradient reaches {', '.join(idle[:8])}"
                f"{f' and {len(idle) - 8} more' if len(idle) > 8 else ''}{whose}")
        if self.accelerator.num_processes > 1:  # DDP would leave gradients unreduced now, and fail at the next step
            raise UserError(f"{said}; with several processes, freeze what this stage does not train "
                            f"(stages[{self.counters.stage}].freeze)")
        self.monitor.say(said, self.counters.step)

    @torch.no_grad()
    def _update_ema(self) -> None:
        """Move the averaged weights; early on by more, so that a short run is not scored on its first weights."""
        if self.ema is self.tokenizer:
            return
        decay = min(self.recipe.ema, (1 + self.counters.step) / (10 + self.counters.step))
        # A step of SGD on |average - weights|²/2: as fast as a lerp, and unlike that it can stop on the device.
        torch._fused_sgd_(
            *([sharding.local(p) for p in module.parameters()] for module in (self.ema, self.tokenizer)), [],
            lr=1 - decay, weight_decay=1.0, maximize=True, momentum=0.0, dampening=0.0, nesterov=False, is_first_step=False,
            found_inf=self.guard.stopped,
        )

    @torch.no_grad()
    def averaged(self) -> Tokenizer:
        """Return the tokenizer of averaged weights, with the buffers as they are now."""
        if self.ema is not self.tokenizer:
            torch._foreach_copy_(list(self.ema.buffers()), list(self.tokenizer.buffers()))
        return self.ema

    # ---- the codebook outside gradient descent

    def _refresh(self, outputs: list[Output], progress: Progress) -> None:
        hooks, codebook = self.tokenizer.hooks, self.tokenizer.codebook
        counts = self._counts(outputs)
        if counts is not None:
            self.tally.counts += counts
            self.code_ages.add_(1).masked_fill_(counts > 0, 0)
        if not hooks.providers("refresh_codes"):
            return
        if progress.ends_epoch:
            progress = replace(progress, means=MappingProxyType(self.tally.means(self.steps_per_epoch)))
        asked = {name: hooks.asks_for("refresh_codes", name) for name in ("latents", "indices", "extras")}
        with self.guard.held(self._refreshed()):
            replaced = hooks.refresh_codes(
                codebook=codebook,
                latents=_joined([o.latents for o in outputs]) if asked["latents"] else None,
                indices=_joined([o.indices for o in outputs]) if asked["indices"] and counts is not None else None,
                counts=counts, epoch_counts=self.tally.counts,
                extras={k: torch.cat([o.extras[k] for o in outputs]) for k in outputs[0].extras} if asked["extras"] else {},
                progress=progress, generator=self._generator(2),
            )
            self._follow_replaced()
        self.tally.replaced = sum((number for number in replaced if number is not None), self.tally.replaced)

    def _refreshed(self) -> Iterator[Tensor]:
        """Yield what a refresh may change: the codes, plugins' buffers, the rows' moments and averages."""
        codebook, plugins = self.tokenizer.codebook, self.tokenizer.plugins
        yield from (*codebook.parameters(), *codebook.buffers(), *plugins.buffers())
        yield from self.ema.codebook.parameters() if self.ema is not self.tokenizer else ()
        for parameter in codebook.row_parameters():
            yield from (v for v in self.optimizer.optimizer.state.get(parameter, {}).values() if v.shape == parameter.shape)

    def _counts(self, outputs: list[Output]) -> Tensor | None:
        if outputs[0].indices is None:
            return None
        codebook = self.tokenizer.codebook
        return all_reduce_sum(sum(code_usage(codebook.rows_of(o.indices), codebook.rows) for o in outputs))

    def _follow_replaced(self) -> None:
        """Clear the moments of overwritten rows and give the rows to the weight average."""
        codebook = self.tokenizer.codebook
        state = self.optimizer.optimizer.state
        for rows in (rows for rows, smooth in codebook.take_replaced() if not smooth):
            self.code_ages.index_fill_(0, rows, 0)
            for parameter in codebook.row_parameters():
                for value in state.get(parameter, {}).values():
                    if value.shape == parameter.shape:
                        value.index_fill_(0, rows, 0)
            if self.ema is not self.tokenizer and codebook.row_parameters():
                self.ema.codebook.replace_(rows, codebook.vectors()[rows])
                self.ema.codebook.take_replaced()

    def _generator(self, purpose: int) -> torch.Generator:
        """Make the generator of one hook call: a function of seed and step alone, so it is equal on every process."""
        seed = _mix(self.recipe.seed, self.counters.step, self.counters.stage, purpose)
        return torch.Generator(self.device).manual_seed(seed)

    # ---- an epoch's end

    def _end_epoch(self) -> None:
        """Report the epoch, evaluate, and let the stage end; a run that stops before this is over does all of it again."""
        counters = self.counters
        _seed_everything(_mix(self.recipe.seed, counters.step, self.rank))
        self._report_epoch()
        self._warn_of_collapse()  # only now: whoever goes on from a checkpoint of this evaluation must hear it again
        reason = self._stage_is_over()
        counters.epoch += 1
        counters.epoch_in_stage += 1
        counters.step_in_epoch = 0
        counters.seconds = time.monotonic() - self.began
        self._reset_tally()
        if reason and counters.stage + 1 < len(self.recipe.stages) and counters.epoch < self.recipe.epochs:
            self._change_stage(reason)

    def _stage_is_over(self) -> str | None:
        """Return why the stage ends with this epoch, or None."""
        counters = self.counters
        progress = replace(self._progress(True), means=MappingProxyType(self.tally.means(self.steps_per_epoch)))
        answers = [a for a in self.tokenizer.hooks.stage_transition(stage=self.stage, progress=progress) if a]
        if answers:
            return "; ".join(a if isinstance(a, str) else "a plugin ended it" for a in answers)
        began = counters.epoch - counters.epoch_in_stage
        length = longest(self.recipe, counters.stage, began)
        return f"its {length} epochs are over" if counters.epoch_in_stage + 1 >= length else None

    def _change_stage(self, reason: str) -> None:
        counters = self.counters
        leaving = self.stage
        self._leave_stage()
        counters.stage += 1
        counters.step_in_stage = counters.epoch_in_stage = 0
        event = {"step": counters.step, "epoch": counters.epoch, "from": leaving, "to": self.stage, "reason": reason}
        counters.transitions.append(event)
        self.monitor.say(f"step {counters.step}: stage {leaving} → {self.stage}: {reason}", counters.step)
        self.guard.forget()
        self._begin_stage()

    def _report_bad(self) -> None:
        names, self.bad_files = self.bad_files, []
        new = [name for name in dict.fromkeys(gather_names(names)) if name not in self.counters.files_left_out]
        for name in new:
            self.monitor.say(f"{name} does not decode and is left out", self.counters.step)
        self.counters.files_left_out += new
        if new and not isinstance(self.train_data, StreamDataset):
            self.train_data.recall(new)  # so that data.bad_files counts those of all processes

    def _log(self) -> None:
        """Measure what TensorBoard is to show of this step, if anything, into `record`, by group and name.

        A checkpoint has it too, so that a run which goes on from there shows the same.
        """
        counters, log = self.counters, self.recipe.log
        self.record = {}
        self.monitor.advance(counters.step)
        if counters.step % log.steps and counters.step_in_epoch < self.steps_per_epoch:
            return
        losses = self.tally.take_recent()
        self._report_unsaved()
        reports = self.tokenizer.report(self._progress())
        self._check_processes()
        with sharding.whole(self.tokenizer):  # a change means something over equal intervals only
            drift = {} if not self.main or counters.step % log.steps else self.drift.measure(self.tokenizer)
        if self.main:
            share = float(usage(self.tally.counts)) if self.tally.counts.any() else None
            self.monitor.show(self.stage, counters.step, losses, share)
            seconds = time.monotonic() - self.logged_at
            speed = (counters.step - self.logged_step) * self.recipe.data.batch_size / seconds
            groups = {
                "loss": losses,
                "train": {"learning_rate": self.rate, "images_per_second": speed, **memory(self.device)},
                "codes": {} if share is None else self._ages(),
                "report": reports,
                "drift": drift,
            }
            self.record = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        self.logged_step, self.logged_at = counters.step, time.monotonic()

    def _write_record(self) -> None:
        self.monitor.scalars(self.record, self.counters.step)

    def _write_record_again(self) -> None:
        """Show what was to be shown of the step at which a checkpoint was taken, unless the epoch's end has been, too."""
        if self.counters.step_in_epoch:
            self._write_record()

    def _anew(self) -> int:
        """Return the first step of which TensorBoard shall show what is written from now on, and not what was before."""
        counters = self.counters
        return counters.step + (1 if counters.step and not counters.step_in_epoch else 0)

    def _check_processes(self) -> None:
        """Raise PluginError if the codebook, or what plugins keep, is not bit for bit the same on all processes."""
        tokenizer = self.tokenizer
        parts = {"codebook": tokenizer.codebook, "plugins": tokenizer.plugins}
        tensors = {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
        if unequal := differing(tensors):
            hooks = ", ".join(tokenizer.hooks.providers("refresh_codes")) or "nobody"
            raise PluginError(f"{', '.join(unequal)}: not the same on all {self.processes} processes; what changes it must do "
                              "the same on each, by its generator and global statistics alone (refresh_codes is served by "
                              f"{hooks})")

    def _ages(self) -> dict[str, float]:
        """Return the mean age of the codes, and the share of those older than an epoch.

        The age is in optimizer steps since a code was last assigned or replaced, or since the run began.
        """
        ages = self.code_ages.double()
        older = (ages > self.steps_per_epoch).double()
        mean, share = torch.stack([ages.mean(), older.mean()]).tolist()
        return {"mean_age": mean, "older_than_an_epoch": share}

    def _report_epoch(self) -> None:
        """Write the epoch's usage, and from time to time the metrics and pictures of held-out images."""
        counters, recipe, tally = self.counters, self.recipe, self.tally
        step, epoch = counters.step, counters.epoch + 1
        self._report_bad()
        if tally.counts.any():
            codes = {"usage": float(usage(tally.counts)), "perplexity": float(perplexity(tally.counts)),
                     "replaced": int(tally.replaced)}
            self.monitor.scalars(codes, step, "codes")
            self.monitor.codes(tally.counts, self.code_ages, step)
        if epoch % recipe.evaluate.epochs and epoch != recipe.epochs:
            return
        found, images = self._evaluate(recipe.evaluate.images), recipe.evaluate.images
        whole = not isinstance(self.val_data, StreamDataset) and (images is None or images >= len(self.val_data))
        self.last_of_all = found if whole and epoch == recipe.epochs else None
        self.monitor.scalars(found.metrics, step, "held_out")
        self._keep_best(found.metrics)
        if epoch < recipe.epochs:  # the last pictures are made at the end
            self.pictures.show(self.averaged(), self.monitor, step)

    def _warn_of_collapse(self) -> None:
        """Say so when an epoch uses few of the codes that its latents could have reached, and did not before."""
        codes, assigned = self.tokenizer.codebook.rows, int(self.tally.counts.sum())
        if not assigned:
            return
        share = float(usage(self.tally.counts))
        reached = share / min(1.0, assigned / codes)
        low, before = reached < self.recipe.log.collapse, self.counters.collapsed
        self.counters.collapsed = low
        if low and not before:
            self.monitor.say(
                f"the codebook collapses: this epoch used {share:.2%} of {codes:,} codes, {reached:.1%} of what its "
                f"{assigned:,} tokens could (log.collapse: {self.recipe.log.collapse:g}). What helps: a plugin that renews "
                "dead codes (refresh_codes) or starts them from data (enter_stage; `vqzoo plugins` says who does), a loss on "
                "codes that do not win, a smaller codebook.width, a lower rate for the encoder (optim.scale), a later stage "
                "that freezes it", self.counters.step)

    def _evaluate(self, limit: int | None = None) -> Result:
        batches = eval_batches(self.recipe.data, self.val_data, self.rank, self.processes, limit)
        with sharding.whole(self.averaged()) as averaged:  # no two processes need have as many batches
            return self.evaluator.tokenizer(averaged, self._heedful(batches, limit), stamp(self.val_data, limit))

    def _heedful(self, batches: Iterator[Batch], limit: int | None) -> Iterable[Batch]:
        """Return held-out batches between which a signal is heard; all processes listen equally often, whatever they have."""
        if isinstance(self.val_data, StreamDataset):
            return batches
        images = len(self.val_data) if limit is None else min(limit, len(self.val_data))
        rounds = -(-images // (self.recipe.data.eval_batch_size * self.processes))

        def heeded() -> Iterator[Batch]:
            for _ in range(rounds):
                batch, problem = None, None
                try:
                    batch = next(batches, None)
                except (DataError, UserError) as error:
                    problem = error
                self._stop_if_asked(problem)
                if batch is not None:
                    yield batch

        return heeded()

    def _keep_best(self, metrics: dict[str, float]) -> None:
        """Export the tokenizer to `best` if it is better than at any evaluation before; the last is what is reported."""
        config = self.recipe.evaluate
        candidates = [self.evaluator.name_of(name) for name in ([config.best] if config.best else config.metrics)]
        chosen = next((name for name in candidates if name in metrics), "")
        value = metrics.get(chosen, math.nan)
        measured = {"metric": chosen, "protocol": config.protocol, "images": metrics["images"]}
        before = self.counters.best if measured.items() <= self.counters.best.items() else {}  # else it was another measure
        if not from_main(lambda: self.evaluator.better(chosen, value, before.get("value"))):
            return
        problem = None
        try:
            sharding.export(self.averaged(), self.out / "best", self.main)
        except (OSError, UserError) as error:
            problem = error
            self.monitor.say(f"{self.out / 'best'} cannot be written: {error}", self.counters.step)
        if self.agreement.largest(int(problem is not None)):
            return
        self.counters.best = {**measured, "value": value, "step": self.counters.step, "epoch": self.counters.epoch + 1}
        if self.recipe.checkpoint.keep_best:
            self._save()

    def _note_losses(self, names: list[str]) -> None:
        """Keep the pictures as they are when a loss joins: the adversarial one, above all.

        Until the stage ends, a loss is thought to be there even in steps that do without.
        """
        counters = self.counters
        joined = [name for name in names if name not in counters.losses] if counters.losses else []
        if not counters.step_in_stage:
            self.pictures.forget_all_but(names)
            counters.losses = []
        if joined:
            self.guard.check()
            self.pictures.keep_before(joined, self.averaged())
        counters.losses = list(dict.fromkeys([*counters.losses, *names]))

    # ---- what is kept

    def _save(self) -> None:
        """Have everything that the run is made of written; training waits for the copy to the host alone."""
        counters = self.counters
        if self.saved_step == counters.step:
            return
        self.guard.check()
        self._report_bad()
        self.writer.wait()
        self._report_unsaved()
        tally = self.tally.tensors()
        self.saved_step = counters.step
        self._take_moments()
        tensors = state.tensors(self, tally)
        if not self.main:
            return
        try:
            if self.folder.mend(self.recipe):
                self.monitor.rewind(counters.step, self._anew())
                self.monitor.say(f"somebody has removed {self.out}: it is made again, what was in it is gone", counters.step)
        except (OSError, UserError) as error:
            self.monitor.say(str(error), counters.step)
        self.monitor.flush()  # what was shown up to here must not be lost with what follows
        counters.seconds = time.monotonic() - self.began
        keep, best = self.recipe.checkpoint.keep, counters.best.get("step") if self.recipe.checkpoint.keep_best else None
        self.writer.save(tensors, state.manifest(self), keep, best)

    def _report_unsaved(self) -> None:
        """Say that the last checkpoint could not be written; training goes on all the same."""
        if error := self.writer.take_error():
            self.monitor.say(f"a checkpoint could not be written: {error}; those before it are whole, and the next is tried "
                             "when it is due", self.counters.step)

    def _finish(self) -> dict[str, Any]:
        """Evaluate on all held-out images, and leave metrics.json, the picture and the exported tokenizer."""
        counters, recipe = self.counters, self.recipe
        if self.last_of_all is None:
            self.monitor.say("evaluating on all held-out images")
        found = self.last_of_all or self._evaluate()
        counters.seconds = time.monotonic() - self.began
        seen = counters.step * recipe.data.batch_size
        result = {
            "metrics": found.metrics,
            "missing": found.missing,
            "usage_curve": found.usage_curve,
            "run": {
                "step": counters.step, "epoch": counters.epoch, "stage": self.stage, "transitions": counters.transitions,
                "images_per_second": seen / counters.seconds, "seconds": counters.seconds,
                "files_left_out": counters.files_left_out, "best": counters.best, "rollbacks": counters.rollbacks,
                "finished": True,
            },
            "card": card(
                self.evaluator, found,
                **data_card(recipe.data.name, self.val_data, recipe.data.resolution),
                split=recipe.data.val,
                weights=f"moving average, decay {recipe.ema}" if recipe.ema else "as trained",
                seed=recipe.seed,
                hardware=hardware(self.device, self.accelerator.num_processes),
                versions=versions_of_metrics() | versions(named_plugins(recipe)),
            ),
        }
        self.writer.wait()
        self._report_unsaved()
        self._write_results(result)
        self.monitor.scalars(found.metrics, counters.step, "final")
        self.monitor.curve("usage_against_images", found.usage_curve)
        self.accelerator.wait_for_everyone()
        return result

    def _write_results(self, result: dict[str, Any]) -> None:
        problem = None
        try:
            picture = self.pictures.show(self.averaged(), self.monitor, self.counters.step)
            sharding.export(self.averaged(), self.out / "tokenizer", self.main)
            if self.main:
                save_picture(picture, self.out / "reconstructions.png")
                write_text(self.out / "metrics.json", to_json(result))
        except (OSError, UserError) as error:
            problem = error
        if self.agreement.largest(int(problem is not None)):
            raise StorageError(f"{self.out}: the results cannot be written ({problem or 'see what the main process says'}); "
                               "with room, --resume auto makes them") from problem


def merge_losses(*found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the losses of all hooks; a name that two use is a PluginError."""
    merged: dict[str, Tensor] = {}
    for losses in found:
        if both := merged.keys() & losses.keys():
            raise PluginError(f"two hooks return a loss called {min(both)!r}; give one another name")
        merged |= losses
    return merged


def _without_weights(recipe: Recipe) -> Recipe:
    """Return a recipe that asks for no weights from elsewhere: a checkpoint has them all."""
    return replace(recipe, init_from=None, encoder=replace(recipe.encoder, pretrained=False))


def _after(first: Batch, rest: Iterator[Batch]) -> Iterator[Batch]:
    """Put a batch that was read already back before the rest; closing ends the rest too."""
    try:
        yield first
        yield from rest
    finally:
        rest.close()


def _undo(moved: list[tuple[Tensor, Tensor]]) -> None:
    """Give buffers the values that they had."""
    for buffer, value in moved:
        buffer.copy_(value)


def _joined(parts: list[Tensor]) -> Tensor:
    """Join [b, N, ...] of all micro-batches and processes, in sample order, into [M, ...]."""
    return torch.cat([gather_rows(part.detach().flatten(0, 1)) for part in parts])


def _seed_everything(seed: int) -> None:
    """Make all that draws at random a function of one seed, so that a run which goes on draws as it would have."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _mix(*numbers: int) -> int:
    """Make one 63-bit seed of several numbers, the same on every machine."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


