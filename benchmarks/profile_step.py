"""Profile the steady training step of a recipe: a table by part, one by operator, and all of it as JSON in the last line.

python benchmarks/profile_step.py RECIPE [--steps 20] [--warm-up 5] [--rows 15] [key=value ...]

The first stage is profiled, without its epochs' ends and its log. Parts are timed without the profiler, on the device's own
clock where it has one, each without the parts inside it; operators in as many further steps under torch.profiler.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vqzoo import UserError
from vqzoo.evaluation.report import hardware
from vqzoo.recipe import load_recipe
from vqzoo.trainer import Trainer

STEADY = ("epochs=1000", "epoch_steps=1000000", "log.steps=1000000")
"""What keeps epochs' ends and the log out of a profile; keys set by hand come after these."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--rows", type=int, default=15, help="operators in the table")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    try:
        recipe = load_recipe(options.recipe, [*STEADY, *options.overrides])
        with tempfile.TemporaryDirectory() as folder:
            job = Trainer(recipe, f"{folder}/run")
            result = Profile(job, options.warm_up, options.steps).run()
    except UserError as error:
        parser.error(str(error))
    for group in ("parts", "operators"):
        print(table(group, dict(list(result[group].items())[: options.rows]), result["step_ms"]))
    card = {"bench": "profile_step", "recipe": options.recipe, "overrides": options.overrides,
            "hardware": hardware(job.device, 1), "torch": str(torch.__version__), "threads": torch.get_num_threads()}
    print(json.dumps({**card, **result}))
    return 0


class Enough(Exception):
    """Ends a run whose profile is complete."""


class Profile:
    """Count a job's steps: first the warm-up, then the timed ones, then those of which torch.profiler sees the operators."""

    def __init__(self, job: Trainer, warm_up: int, steps: int):
        self.job, self.warm_up, self.steps = job, warm_up, steps
        self.parts = Parts(job.device)
        self.operators = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + (job.device.type == "cuda")])
        self.walls: list[float] = []

    def run(self) -> dict[str, Any]:
        """Return milliseconds per step: the median step, the mean of each part, and of each operator by itself."""
        job = self.job
        step, job._step = job._step, self.step
        self._step = self.parts.timed(step, "rest of the step")
        self._watch()
        try:
            job.run()
        except Enough:
            pass
        on_device = job.device.type == "cuda"
        times = {e.key: (e.self_device_time_total if on_device else e.self_cpu_time_total) / 1e3 / self.steps
                 for e in self.operators.key_averages()}
        return {"step_ms": sorted(self.walls)[len(self.walls) // 2] * 1e3, "steps": self.steps,
                "parts": self.parts.means(self.steps), "operators": dict(sorted(times.items(), key=lambda x: -x[1])[:40])}

    def step(self, *arguments: Any) -> bool:
        """Stand in for the trainer's step."""
        done = self.job.counters.step - self.warm_up
        if done in (0, self.steps):
            self.parts.wait()
            self.parts.spans, self.kept = [], self.parts.spans
            self.began = time.perf_counter()
        if done == self.steps:
            self.operators.start()
        answer = self._step(*arguments)
        if 0 <= done < self.steps:
            self.parts.wait()
            self.walls.append(time.perf_counter() - self.began)
            self.began = time.perf_counter()
        if done + 1 == 2 * self.steps:
            self.operators.stop()
            self.parts.spans = self.kept
            raise Enough
        return answer

    def _watch(self) -> None:
        job, parts, tokenizer = self.job, self.parts, self.job.tokenizer
        job.train_batches = parts.over(job.train_batches, "wait for data")
        for owner, name, part in (
            (tokenizer, "latents", "encoder"), (tokenizer, "_quantize", "quantizer hooks"), (tokenizer, "forward", "decoder"),
            (tokenizer, "reconstruction_losses", "reconstruction losses"), (job.accelerator, "backward", "backward"),
            (job, "_discriminator_step", "discriminator"), (job, "_apply", "optimizer"), (job, "_update_ema", "average"),
            (job, "_refresh", "refresh and counts"),
        ):
            setattr(owner, name, parts.timed(getattr(owner, name), part))


class Parts:
    """Time nested parts of a step, each without those inside it; what the discriminator's step does is all its own."""

    def __init__(self, device: torch.device):
        self.device, self.open = device, []
        self.spans: list[tuple[str, str | None, Any, Any]] = []  # part, the part around it, begin, end

    def timed(self, function: Callable, part: str) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            around = self.open[-1] if self.open else None
            if around == "discriminator":
                return function(*arguments, **options)
            self.open.append(part)
            begin = self.now()
            try:
                return function(*arguments, **options)
            finally:
                self.open.pop()
                self.spans.append((part, around, begin, self.now()))

        return call

    def over(self, batches: Iterator, part: str) -> Iterator:
        take = self.timed(lambda: next(batches), part)
        try:
            while True:
                yield take()
        finally:
            batches.close()

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def means(self, steps: int) -> dict[str, float]:
        """Return milliseconds per step of each part, the largest first."""
        self.wait()
        sums: dict[str, float] = defaultdict(float)
        for part, around, begin, end in self.spans:
            length = begin.elapsed_time(end) if self.device.type == "cuda" else (end - begin) * 1e3
            sums[part] += length
            if around is not None:
                sums[around] -= length
        return {part: total / steps for part, total in sorted(sums.items(), key=lambda item: -item[1])}


def table(title: str, rows: dict[str, float], step: float) -> str:
    """Return milliseconds per step and shares of it, as Markdown."""
    lines = [f"| {title} | ms per step | share |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {time:.3f} | {time / step:.1%} |" for name, time in rows.items()), ""])


if __name__ == "__main__":
    sys.exit(main())
