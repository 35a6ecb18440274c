"""The trainer: one loop, in order. It asks hooks wherever a method could differ, and decides nothing about codebooks."""

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from vqzoo import checkpoint
from vqzoo.data import Batch, StreamDataset, eval_batches, stamp, to_images, train_batches
from vqzoo.errors import NonFiniteError, PluginError, UserError
from vqzoo.evaluation import better
from vqzoo.evaluation.evaluate import Result
from vqzoo.evaluation.report import card, data_card, hardware, to_json, versions_of_metrics
from vqzoo.monitor import Drift, Monitor, memory, panel, save_picture
from vqzoo.ops import all_reduce_sum, code_usage, gather_names, gather_rows, perplexity, usage, use
from vqzoo.plugin import Progress
from vqzoo.prepare import enter, prepare
from vqzoo.recipe import Recipe, changes, load_recipe, to_yaml, versions
from vqzoo.stage import Guard, Moments, flat, longest, make_optimizer, nested, set_learning_rate, take_moments
from vqzoo.tokenizer import Output, Tokenizer

MOST_SKIPPED = 50
"""Optimizer steps in a row that the fp16 scaler may skip before the run stops."""

ASYNCHRONOUS = ("cuda",)
"""Kinds of device for which the host must not wait within a step."""


@dataclass
class Counters:
    """Where a run is; every number of it is in a checkpoint."""

    step: int = 0
    batches: int = 0
    epoch: int = 0
    stage: int = 0
    step_in_stage: int = 0
    epoch_in_stage: int = 0
    skipped: int = 0
    discriminator_skipped: int = 0
    seconds: float = 0.0
    losses: list[str] = field(default_factory=list)
    transitions: list[dict[str, Any]] = field(default_factory=list)
    files_left_out: list[str] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """Train a recipe into a folder. Everything that can be wrong is found by the constructor, before training."""

    def __init__(self, recipe: Recipe, out: str | Path, resume: bool = False):
        self.recipe, self.out, self.resume = recipe, Path(out), resume
        saved = self._find_checkpoint(resume)
        ready = prepare(_without_weights(recipe) if saved else recipe)
        self.accelerator, self.kept, self.evaluator = ready.accelerator, ready.kept, ready.evaluator
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.train_data, self.val_data = ready.train_data, ready.val_data
        self.steps_per_epoch = ready.steps_per_epoch
        self.steps = self.steps_per_epoch * recipe.epochs
        self.counters = Counters()
        self.last_of_all: Result | None = None
        self.pictures_before: dict[str, Tensor] = {}
        self.moments: Moments = {}
        self.discriminator_moments: Moments = {}
        self.tokenizer = ready.tokenizer.to(self.device)
        self.discriminator = ready.discriminator if ready.discriminator is None else ready.discriminator.to(self.device)
        judges = () if self.discriminator is None else self.discriminator.parameters()
        self.discriminator_parameters = [parameter for parameter in judges if parameter.requires_grad]
        self.ema = deepcopy(self.tokenizer).eval().requires_grad_(False) if recipe.ema else self.tokenizer
        self.code_ages = torch.zeros(self.tokenizer.codebook.size, dtype=torch.int64, device=self.device)
        # accelerate's gradient scaler must itself read on the host whether it skips, and would not see a fused step skip
        self.fused = recipe.precision != "fp16"
        self.guard = Guard(self.device, deferred=self.fused and self.device.type in ASYNCHRONOUS)
        self._compile()
        self.saved = saved
        if saved:
            self._restore(saved)
        self.fixed = self._fixed_images()
        self.train_batches = self._training_stream()
        self._claim_folder()

    def _compile(self) -> None:
        """Have the networks compiled when they first train, if the recipe wants it; hooks and averages stay as they are."""
        if not self.recipe.compile:
            return
        self.tokenizer.compile_networks()
        if self.discriminator is not None:
            self.discriminator.compile(dynamic=False)

    def _find_checkpoint(self, resume: bool) -> Path | None:
        """Return the checkpoint to continue from; a UserError if the folder cannot be this run's."""
        begun = self.out / "recipe.yaml"
        try:
            if not begun.exists():
                foreign = self.out.is_dir() and any(not path.name.startswith(".") for path in self.out.iterdir())
                if foreign:
                    raise UserError(f"--out: {self.out} is not empty and holds no run; name a new folder")
                return None
        except OSError as error:
            raise UserError(f"--out: {self.out} cannot be used: {error}") from error
        if not resume:
            raise UserError(f"{self.out} already holds a run; name another folder with --out, or continue it with --resume")
        then = load_recipe(str(begun))
        if not then.versions:
            raise UserError(f"--out: {begun} was not written by a run; name a new folder")
        if changed := changes(then, self.recipe):
            raise UserError(f"{self.out} was begun with another recipe and cannot be resumed with this one:\n  "
                            + "\n  ".join(changed))
        return checkpoint.latest(self.out / "checkpoints")

    def _claim_folder(self) -> None:
        """Make the run's folders and write the resolved recipe; a UserError on every process if that is impossible."""
        self.accelerator.wait_for_everyone()  # every process has looked before the main one writes
        problem = ""
        try:
            if self.main:
                for name in ("checkpoints", "tensorboard"):
                    (self.out / name).mkdir(parents=True, exist_ok=True)
                if not (self.out / "recipe.yaml").exists():
                    recipe = replace(self.recipe, versions=versions(list(self.recipe.plugins)))
                    checkpoint.write_text(self.out / "recipe.yaml", to_yaml(recipe))
        except OSError as error:
            problem = f": {error}"
        if all_reduce_sum(torch.tensor(float(bool(problem)), device=self.device)):
            raise UserError(f"--out: {self.out} cannot be written{problem}")

    def _training_stream(self) -> Iterator[Batch]:
        """Return the run's batches; the first is read now, so that unreadable data is found before training."""
        recipe = self.recipe
        start = self.counters.batches * recipe.data.batch_size
        stream = train_batches(recipe.data, self.train_data, recipe.seed, start, self.accelerator.process_index,
                               self.accelerator.num_processes, recipe.accumulate)
        return _after(next(stream), stream)

    # ---- the run

    def run(self) -> dict[str, Any]:
        """Train to the end, evaluate, export, and return what metrics.json holds."""
        self.drift = Drift(self.fixed[: self.recipe.log.drift_images])
        self.pictured = self.fixed[: self.recipe.log.images]
        shape = self.pictured.shape
        self.pictures_before = {name: x for name, x in self.pictures_before.items() if x.shape == shape}
        self.monitor = Monitor(self.out / "tensorboard", self.steps, self.counters.step, self.saved is not None, self.main)
        self.began = time.monotonic() - self.counters.seconds
        try:
            with use(self.recipe.ops.backend, self.recipe.ops.precision):
                return self._run()
        finally:
            self.monitor.close()
            self.train_batches.close()

    def _run(self) -> dict[str, Any]:
        """Train all epochs, with what the operations use as the recipe has it."""
        self.monitor.text("recipe", to_yaml(self.recipe))
        if self.resume and not self.saved:
            self.monitor.say(f"{self.out} holds no checkpoint to resume from: starting afresh")
        if self.saved:
            self.monitor.say(f"resumed from {self.saved}", self.counters.step)
        for name, why in self.evaluator.missing.items():
            self.monitor.say(f"evaluate.metrics: {name} will be missing: {why}")
        if self.kept and not self.saved:
            self.monitor.say(f"init_from {self.recipe.init_from} has no fitting tensor for {', '.join(self.kept)}", 0)
        self._begin_stage(resumed=self.saved is not None)
        while self.counters.epoch < self.recipe.epochs:
            self._train_epoch()
            self._end_epoch()
        return self._finish()

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
            with torch.no_grad():
                self.tokenizer.hooks.enter_stage(
                    leaving=leaving, entering=self.stage, tokenizer=self.tokenizer, batches=batches,
                    generator=self._generator(1),
                )
        self._make_optimizers()
        self._follow_replaced()
        self._checked_gradients: list[nn.Module] = []
        self._reset_epoch()

    def _preparation_batches(self) -> Iterator[Batch]:
        """Yield training images beside the run's own stream, which must not move."""
        recipe = self.recipe
        stream = train_batches(replace(recipe.data, workers=0), self.train_data, recipe.seed, 0,
                               self.accelerator.process_index, self.accelerator.num_processes, recipe.accumulate)
        try:
            yield from stream
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
        take_moments(self.tokenizer, self.optimizer, self.moments)
        if self.discriminator is not None:
            take_moments(self.discriminator, self.discriminator_optimizer, self.discriminator_moments)

    # ---- an epoch

    def _reset_epoch(self) -> None:
        codes = self.tokenizer.codebook.size
        self.epoch_counts = torch.zeros(codes, dtype=torch.int64, device=self.device)
        self.epoch_losses: dict[str, Tensor] = {}
        self.recent_losses: dict[str, Tensor] = {}
        self.recent_steps, self.replaced, self.logged_at = 0, 0, time.monotonic()

    def _train_epoch(self) -> None:
        done, bad = 0, []
        while done < self.steps_per_epoch:
            batches = [next(self.train_batches) for _ in range(self.recipe.accumulate)]
            bad += [name for batch in batches for name in batch.bad]
            ends = done + 1 == self.steps_per_epoch
            if self._step(batches, ends):
                done += 1
                self._log(done)
        self._report_bad(bad)

    def _progress(self, ends_epoch: bool = False) -> Progress:
        c = self.counters
        return Progress(c.step, c.epoch, self.stage, c.step_in_stage, c.epoch_in_stage, self.steps_per_epoch,
                        ends_epoch=ends_epoch)

    def _step(self, batches: list[Batch], ends_epoch: bool) -> bool:
        """Do one optimizer step of tokenizer and discriminator; False if the fp16 scaler skipped it."""
        counters, recipe = self.counters, self.recipe
        progress = self._progress(ends_epoch)
        torch.manual_seed(_mix(recipe.seed, counters.batches, self.accelerator.process_index))
        counters.batches += 1
        self.rate = set_learning_rate(self.optimizer, recipe.optim, counters.step, self.steps)
        done = self._tokenizer_step(batches, progress)
        if done is None:
            return False
        losses, outputs, images = done
        if self.discriminator is not None and self.tokenizer.hooks.providers("discriminator_loss"):
            losses = merge_losses(losses, self._discriminator_step(images, outputs, progress))
        self._add_losses(losses)
        if ends_epoch or (counters.step + 1) % recipe.log.steps == 0:
            self.guard.check()
        with torch.no_grad():
            self._update_ema()
            self._refresh(outputs, progress)
        counters.step += 1
        counters.step_in_stage += 1
        return True

    def _tokenizer_step(self, batches: list[Batch], progress: Progress):
        """Return the losses, the outputs and the images of all micro-batches, or None for a skipped step."""
        losses: dict[str, Tensor] = {}
        outputs, images = [], []
        self._train_discriminator(False)
        for number, batch in enumerate(batches):
            images.append(to_images(batch.images, self.device))
            with self._no_sync_but_last(self.model, number), self.accelerator.autocast():
                output = self.model(images[-1], progress)
                found = merge_losses(output.losses, *self.tokenizer.reconstruction_losses(
                    images[-1], output.reconstructions, self.discriminator, progress))
            with self._no_sync_but_last(self.model, number):  # backward under autocast would recast what ran in float32
                self.accelerator.backward(sum(found.values()) / self.recipe.accumulate)
            for name, value in found.items():
                losses[name] = losses.get(name, 0) + value.detach() / self.recipe.accumulate
            outputs.append(output.detached())
        self._check_every_parameter_has_a_gradient(self.tokenizer)
        self._picture_before(list(losses))
        if not self._apply(self.optimizer, self.tokenizer, self.recipe.optim.clip, losses):
            return None
        return losses, outputs, images

    def _discriminator_step(self, images: list[Tensor], outputs: list[Output], progress: Progress) -> dict[str, Tensor]:
        config = self.recipe.discriminator_optim
        self._train_discriminator(True)
        set_learning_rate(self.discriminator_optimizer, config, self.counters.step, self.steps)
        losses: dict[str, Tensor] = {}
        for number, (real, output) in enumerate(zip(images, outputs, strict=True)):
            with self._no_sync_but_last(self.discriminator_model, number), self.accelerator.autocast():
                found = self.tokenizer.discriminator_losses(real, output.reconstructions, self.discriminator_model, progress)
                if not found:
                    self.discriminator_optimizer.zero_grad()
                    return {}
            with self._no_sync_but_last(self.discriminator_model, number):
                self.accelerator.backward(sum(found.values()) / self.recipe.accumulate)
            for name, value in found.items():
                losses[name] = losses.get(name, 0) + value.detach() / self.recipe.accumulate
        self._check_every_parameter_has_a_gradient(self.discriminator)
        self._apply(self.discriminator_optimizer, self.discriminator, config.clip, losses)
        return losses

    def _no_sync_but_last(self, model: nn.Module, number: int) -> Any:
        last = number == self.recipe.accumulate - 1
        return nullcontext() if last else self.accelerator.no_sync(model)

    def _apply(self, optimizer: Any, module: nn.Module, clip: float | None, losses: dict[str, Tensor]) -> bool:
        """Clip and step unless anything is not finite; False if the fp16 scaler skipped the step."""
        self.accelerator.unscale_gradients(optimizer)
        named = {name: p for name, p in module.named_parameters() if p.grad is not None}
        norms = torch._foreach_norm([p.grad for p in named.values()])
        if clip is not None:
            nn.utils.clip_grads_with_norm_(named.values(), clip, torch.linalg.vector_norm(torch.stack(norms)))
        judged = {} if self.recipe.precision == "fp16" else dict(zip(named, norms, strict=True))
        where = f"step {self.counters.step} (epoch {self.counters.epoch}, stage {self.stage!r})"
        spared = "nothing" if module is self.tokenizer else "the discriminator was not updated, the tokenizer"
        self.guard.judge(where, losses, judged, f"{spared} was updated")
        optimizer.step()
        skipped = optimizer.step_was_skipped
        optimizer.zero_grad()
        self._count_skipped("skipped" if optimizer is self.optimizer else "discriminator_skipped", skipped)
        return not skipped

    def _count_skipped(self, counter: str, skipped: bool) -> None:
        in_a_row = getattr(self.counters, counter) + 1 if skipped else 0
        setattr(self.counters, counter, in_a_row)
        if in_a_row > MOST_SKIPPED:
            raise NonFiniteError(f"step {self.counters.step}: the fp16 scaler skipped {MOST_SKIPPED} steps in a row "
                                 f"({counter}); gradients overflow at any scale: lower the learning rate or use bf16")

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

    def _add_losses(self, losses: dict[str, Tensor]) -> None:
        for sums in (self.epoch_losses, self.recent_losses):
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.double()

    @torch.no_grad()
    def _update_ema(self) -> None:
        """Move the averaged weights; early on by more, so that a short run is not scored on its first weights."""
        if self.ema is self.tokenizer:
            return
        decay = min(self.recipe.ema, (1 + self.counters.step) / (10 + self.counters.step))
        # A step of SGD on |average - weights|²/2: as fast as a lerp, and unlike that it can stop on the device.
        torch._fused_sgd_(
            list(self.ema.parameters()), list(self.tokenizer.parameters()), [], lr=1 - decay, weight_decay=1.0, maximize=True,
            momentum=0.0, dampening=0.0, nesterov=False, is_first_step=False, found_inf=self.guard.stopped,
        )

    @torch.no_grad()
    def _averaged(self) -> Tokenizer:
        """Return the tokenizer of averaged weights, with the buffers as they are now."""
        if self.ema is not self.tokenizer:
            torch._foreach_copy_(list(self.ema.buffers()), list(self.tokenizer.buffers()))
        return self.ema

    # ---- the codebook outside gradient descent

    def _refresh(self, outputs: list[Output], progress: Progress) -> None:
        hooks, codebook = self.tokenizer.hooks, self.tokenizer.codebook
        counts = self._counts(outputs)
        if counts is not None:
            self.epoch_counts += counts
            self.code_ages.add_(1).masked_fill_(counts > 0, 0)
        if not hooks.providers("refresh_codes"):
            return
        if progress.ends_epoch:
            progress = replace(progress, means=MappingProxyType(self._means(self.epoch_losses, self.steps_per_epoch)))
        asked = {name: hooks.asks_for("refresh_codes", name) for name in ("latents", "indices", "extras")}
        with self.guard.held(self._refreshed()):
            replaced = hooks.refresh_codes(
                codebook=codebook,
                latents=_joined([o.latents for o in outputs]) if asked["latents"] else None,
                indices=_joined([o.indices for o in outputs]) if asked["indices"] and counts is not None else None,
                counts=counts, epoch_counts=self.epoch_counts,
                extras={k: torch.cat([o.extras[k] for o in outputs]) for k in outputs[0].extras} if asked["extras"] else {},
                progress=progress, generator=self._generator(2),
            )
            self._follow_replaced()
        self.replaced = sum((number for number in replaced if number is not None), self.replaced)

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
        return all_reduce_sum(sum(code_usage(o.indices, self.tokenizer.codebook.size) for o in outputs))

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

    def _means(self, sums: dict[str, Tensor], steps: int) -> dict[str, float]:
        """Return the mean of each loss over steps and processes; called by every process."""
        if not sums:
            return {}
        joined = torch.stack([torch.as_tensor(value, device=self.device) for value in sums.values()])
        means = all_reduce_sum(joined) / (steps * self.accelerator.num_processes)
        return dict(zip(sums, means.tolist(), strict=True))

    def _end_epoch(self) -> None:
        counters = self.counters
        reason = self._stage_is_over()
        self._report_epoch()
        counters.epoch += 1
        counters.epoch_in_stage += 1
        counters.seconds = time.monotonic() - self.began
        if reason and counters.stage + 1 < len(self.recipe.stages) and counters.epoch < self.recipe.epochs:
            self._change_stage(reason)
        else:
            self._reset_epoch()
        if counters.epoch % self.recipe.checkpoint.epochs == 0 or counters.epoch == self.recipe.epochs:
            self._save()

    def _stage_is_over(self) -> str | None:
        """Return why the stage ends with this epoch, or None."""
        counters = self.counters
        progress = replace(self._progress(True), means=MappingProxyType(self._means(self.epoch_losses, self.steps_per_epoch)))
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
        self._begin_stage()

    def _report_bad(self, names: list[str]) -> None:
        for name in gather_names(names):
            if name not in self.counters.files_left_out:
                self.counters.files_left_out.append(name)
                self.monitor.say(f"{name} does not decode and is left out", self.counters.step)

    def _log(self, done: int) -> None:
        counters, log = self.counters, self.recipe.log
        self.monitor.advance(counters.step)
        self.recent_steps += 1
        if counters.step % log.steps and done < self.steps_per_epoch:
            return
        losses = self._means(self.recent_losses, self.recent_steps)
        reports = self.tokenizer.report(self._progress())
        seconds = time.monotonic() - self.logged_at
        if self.main:
            share = float(usage(self.epoch_counts)) if self.epoch_counts.any() else None
            self.monitor.show(self.stage, counters.step, losses, share)
            self.monitor.scalars(losses, counters.step, "loss")
            speed = self.recent_steps * self.recipe.data.batch_size / seconds
            train = {"learning_rate": self.rate, "images_per_second": speed, **memory(self.device)}
            self.monitor.scalars(train, counters.step, "train")
            if share is not None:
                self.monitor.scalars(self._ages(), counters.step, "codes")
            self.monitor.scalars(reports, counters.step, "report")
            if counters.step % log.steps == 0:  # a change means something over equal intervals only
                self.monitor.scalars(self.drift.measure(self.tokenizer), counters.step, "drift")
        self.recent_losses, self.recent_steps, self.logged_at = {}, 0, time.monotonic()

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
        counters, recipe = self.counters, self.recipe
        step, epoch = counters.step, counters.epoch + 1
        if self.epoch_counts.any():
            codes = {"usage": float(usage(self.epoch_counts)), "perplexity": float(perplexity(self.epoch_counts)),
                     "replaced": int(self.replaced)}
            self.monitor.scalars(codes, step, "codes")
            self.monitor.codes(self.epoch_counts, self.code_ages, step)
        if epoch % recipe.evaluate.epochs and epoch != recipe.epochs:
            return
        found, images = self._evaluate(recipe.evaluate.images), recipe.evaluate.images
        whole = not isinstance(self.val_data, StreamDataset) and (images is None or images >= len(self.val_data))
        self.last_of_all = found if whole and epoch == recipe.epochs else None
        self.monitor.scalars(found.metrics, step, "held_out")
        self._keep_best(found.metrics)
        if self.main and epoch < recipe.epochs:  # the last pictures are made at the end
            self._show_pictures()

    def _evaluate(self, limit: int | None = None) -> Result:
        batches = eval_batches(self.recipe.data, self.val_data, self.accelerator.process_index,
                               self.accelerator.num_processes, limit)
        return self.evaluator.tokenizer(self._averaged(), batches, stamp(self.val_data, limit))

    def _keep_best(self, metrics: dict[str, float]) -> None:
        """Export the tokenizer to `best` if it is better than at any evaluation before; the last is what is reported."""
        config = self.recipe.evaluate
        candidates = [self.evaluator.name_of(name) for name in ([config.best] if config.best else config.metrics)]
        chosen = next((name for name in candidates if name in metrics), "")
        value = metrics.get(chosen, math.nan)
        if not better(chosen, value, self.counters.best.get("value")):
            return
        self.counters.best = {"metric": chosen, "value": value, "step": self.counters.step,
                              "epoch": self.counters.epoch + 1, "images": metrics["images"]}
        if self.main:
            self._averaged().save_pretrained(self.out / "best")

    def _picture_before(self, names: list[str]) -> None:
        """Keep the pictures as they are when a loss joins: the adversarial one, above all.

        Until the stage ends, a loss is thought to be there even in steps that do without.
        """
        counters = self.counters
        joined = [name for name in names if name not in counters.losses] if counters.losses else []
        if not counters.step_in_stage:
            self.pictures_before = {name: picture for name, picture in self.pictures_before.items() if name in names}
            counters.losses = []
        if joined:
            self.guard.check()
            before = self._reconstructions()
            self.pictures_before |= {name: before for name in joined}
        counters.losses = list(dict.fromkeys([*counters.losses, *names]))

    @torch.no_grad()
    def _reconstructions(self) -> Tensor:
        """Return what the averaged weights make of the pictured images."""
        average, mode = self._averaged(), self.ema.training
        reconstructions = average.eval()(self.pictured).reconstructions
        average.train(mode)
        return reconstructions

    def _show_pictures(self) -> Tensor:
        """Write the panel of images and reconstructions, which is returned, and one that compares with before a loss joined."""
        now, step = self._reconstructions(), self.counters.step
        picture = panel(self.pictured, now)
        self.monitor.picture("reconstructions", picture, step)
        for name, before in self.pictures_before.items():
            self.monitor.picture(f"image_before_now/{name}", panel(self.pictured, before, now), step)
        return picture

    # ---- what is kept

    def _save(self) -> None:
        if self.main:
            self._take_moments()
            tensors = {
                "tokenizer": self.tokenizer.state_dict(),
                "average": self._averaged().state_dict(),
                "optimizer": flat(self.moments),
                "codes": {"age": self.code_ages},
                "pictures_before": self.pictures_before,
            }
            if self.discriminator is not None:
                tensors["discriminator"] = self.discriminator.state_dict()
                tensors["discriminator_optimizer"] = flat(self.discriminator_moments)
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
            state = {"counters": vars(self.counters), "scaler": scaler, "versions": versions(list(self.recipe.plugins))}
            folder = self.out / "checkpoints"
            checkpoint.save(folder, self.counters.step, tensors, state, self.recipe.checkpoint.keep)
        self.accelerator.wait_for_everyone()

    def _restore(self, path: Path) -> None:
        tensors, state = checkpoint.load(path)
        try:
            self.counters = Counters(**state["counters"])
            self.code_ages = tensors["codes"]["age"].to(self.device)
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: its state is not of this version of vqzoo: {error}") from error
        self.tokenizer.load_state_dict(tensors["tokenizer"])
        if self.ema is not self.tokenizer:
            self.ema.load_state_dict(tensors["average"])
        self.moments = nested(tensors["optimizer"])
        if self.discriminator is not None:
            self.discriminator.load_state_dict(tensors["discriminator"])
            self.discriminator_moments = nested(tensors["discriminator_optimizer"])
        self.pictures_before = {name: x.to(self.device) for name, x in tensors["pictures_before"].items()}
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

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
                "files_left_out": counters.files_left_out, "best": counters.best, "finished": True,
            },
            "card": card(
                self.evaluator, found,
                **data_card(recipe.data.name, self.val_data, recipe.data.resolution),
                split=recipe.data.val,
                weights=f"moving average, decay {recipe.ema}" if recipe.ema else "as trained",
                seed=recipe.seed,
                hardware=hardware(self.device, self.accelerator.num_processes),
                versions=versions_of_metrics() | versions(list(recipe.plugins)),
            ),
        }
        if self.main:
            checkpoint.write_text(self.out / "metrics.json", to_json(result))
            save_picture(self._show_pictures(), self.out / "reconstructions.png")
            self._averaged().save_pretrained(self.out / "tokenizer")
            self.monitor.scalars(found.metrics, counters.step, "final")
            for images, share in found.usage_curve:  # the axis is images, not steps
                self.monitor.scalars({"usage_against_images": share}, images, "final")
        self.accelerator.wait_for_everyone()
        return result


def merge_losses(*found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the losses of all hooks; a name that two use, or a value that is no 0-dim tensor, is a PluginError."""
    merged: dict[str, Tensor] = {}
    for losses in found:
        for name, value in losses.items():
            if name in merged:
                raise PluginError(f"two hooks return a loss called {name!r}; give one another name")
            if not isinstance(value, Tensor) or value.dim():
                what = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise PluginError(f"loss {name!r} is {what} where a 0-dim tensor is expected")
            merged[name] = value
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


def _joined(parts: list[Tensor]) -> Tensor:
    """Join [b, N, ...] of all micro-batches and processes, in sample order, into [M, ...]."""
    return torch.cat([gather_rows(part.detach().flatten(0, 1)) for part in parts])


def _mix(*numbers: int) -> int:
    """Make one 63-bit seed of several numbers, the same on every machine."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


