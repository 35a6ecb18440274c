"""The drift laboratory: what a moving encoder does to a codebook, and which methods keep up; on a CPU, in minutes.

    python benchmarks/drift.py toy        a cloud of 2-D points translates, shrinks, expands; no encoder (arXiv 2602.18896)
    python benchmarks/drift.py control    a trained autoencoder, a k-means codebook, then training (arXiv 2606.11363, A.3)

A method is an installed plugin or several joined by +, as in `vq+nsvq`. `key=value` changes the experiment's recipe in
benchmarks/drift/, the fields of plugins included. Tables, figures and results.jsonl go to --out. The encoder's learning rate as
stress is the suite `drift` of `vqzoo bench`.
"""

import argparse
import datetime
import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from vqzoo import Codebook, NonFiniteError, PluginError, Progress, Quantized, UserError
from vqzoo.evaluation.report import hardware
from vqzoo.manager import Hooks, make_manager
from vqzoo.ops import code_usage
from vqzoo.recipe import Recipe, load_recipe, versions
from vqzoo.sources import find, offered_hooks
from vqzoo.stage import make_optimizer, set_learning_rate
from vqzoo.tokenizer import make_plugin

RECIPES = Path(__file__).with_suffix("")
BESIDE = {"toy": (), "control": ("continuous", "kmeans", "pixel")}
"""The plugins of each experiment that belong to no method."""

METHODS = {"toy": "vq,simvq,vq+nsvq,simvq+nsvq", "control": "vq,vq+nsvq"}
SET_HERE = ("seed", "plugins", "stages")
"""Keys that the experiments themselves set."""

FRAMES = 60
GREY = "0.75"


# ---- the toy: a method's own hooks on points instead of latents

MOTIONS = {"translate": ((0, 1), (8, 1)), "shrink": ((0, 1), (0, 0.1)), "expand": ((0, 0.1), (0, 1))}
"""First and last (x of the centre, standard deviation) of the cloud."""

SETTLES, RESTS = 0.2, 0.8
"""The shares of a run after which the cloud begins to move and rests again."""


@dataclass
class Frame:
    """Carry a moment of a toy run: points [M, 2], vectors [K, 2], used [K] and the step."""

    points: Tensor
    vectors: Tensor
    used: Tensor
    step: int


class Toy:
    """A method at work on clouds of points, driven as the trainer drives it."""

    def __init__(self, recipe: Recipe, motion: str):
        self.recipe, self.motion = recipe, motion
        self.steps = recipe.epochs * recipe.epoch_steps
        self.generator = torch.Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)
        plugins = {name: make_plugin(name, config) for name, config in recipe.plugins.items()}
        self.hooks = Hooks(make_manager(plugins), recipe.hooks, required=("make_codebook", "quantize", "embedding_loss"))
        made = self.hooks.make_codebook(size=recipe.codebook.size, width=recipe.codebook.width)
        self.codebook = self.hooks.answer("make_codebook", made, Codebook)
        if (self.codebook.width, self.codebook.encoder_width) != (2, 2):
            raise UserError(f"toy: its points have 2 coordinates; {'+'.join(plugins)} wants {self.codebook.encoder_width}")
        self.optimizer = make_optimizer(nn.ModuleDict({**plugins, "codebook": self.codebook}), recipe.optim, {})
        self.begin_epoch()
        self.enter()

    def begin_epoch(self) -> None:
        self.counts = torch.zeros(self.codebook.size, dtype=torch.int64)
        self.sums: dict[str, float] = {}

    @torch.no_grad()
    def enter(self) -> None:
        """Let plugins start the codebook: each image of the stand-in is a cloud, and its latents are the points."""
        tokenizer = SimpleNamespace(codebook=self.codebook, latents=lambda images: (images, (1, images.shape[1])))
        self.hooks.enter_stage(leaving=None, entering="train", tokenizer=tokenizer,
                               batches=iter(lambda: self.points(0)[None], None), generator=self.generator)
        self.codebook.take_replaced()

    def points(self, step: int) -> Tensor:
        """Draw the cloud [M, 2] of a step."""
        moved = min(1.0, max(0.0, (step / self.steps - SETTLES) / (RESTS - SETTLES)))
        centre, deviation = (a + moved * (b - a) for a, b in zip(*MOTIONS[self.motion], strict=True))
        cloud = torch.randn(self.recipe.data.batch_size, 2, generator=self.generator)
        return cloud * deviation + torch.tensor([centre, 0.0])

    def step(self, step: int) -> Frame:
        """Train on one cloud; return what was seen before the update, with the codes of the cloud in `codes`."""
        length = self.recipe.epoch_steps
        epoch, ends = step // length, (step + 1) % length == 0
        progress = Progress(step, epoch, "train", step, epoch, length, ends_epoch=ends)
        points = self.points(step)
        with self.codebook.one_forward():
            vectors = self.codebook.vectors().detach().clone()
            found = self.hooks.quantize(latents=points[None], codebook=self.codebook, grid=(1, len(points)), progress=progress)
            found = self.hooks.answer("quantize", found, Quantized)
            if found.indices is None:
                raise UserError(f"toy: {'+'.join(self.recipe.plugins)} gives no indices, so no code is used or unused")
            losses = self.hooks.embedding_loss(
                latents=points[None], codes=found.codes, indices=found.indices, extras=found.extras,
                codebook=self.codebook, progress=progress,
            )
        set_learning_rate(self.optimizer, self.recipe.optim, step, self.steps)
        self.optimizer.zero_grad()
        if trained := [loss for loss in losses.values() if loss.requires_grad]:
            sum(trained).backward()
            self.optimizer.step()
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(loss.detach()) / length
        counts = code_usage(found.indices, self.codebook.size)
        self.refresh(points, found, counts, replace(progress, means=dict(self.sums)) if ends else progress)
        self.error = float((points - found.codes.detach()[0]).square().sum(1).mean())
        return Frame(points, vectors, counts > 0, step)

    @torch.no_grad()
    def refresh(self, points: Tensor, found: Quantized, counts: Tensor, progress: Progress) -> None:
        """Let plugins change codes, and clear the moments of those that they replaced."""
        self.counts += counts
        self.hooks.refresh_codes(
            codebook=self.codebook, latents=points, indices=found.indices[0], counts=counts, epoch_counts=self.counts,
            extras={name: value.detach() for name, value in found.extras.items()}, progress=progress, generator=self.generator,
        )
        for rows in (rows for rows, smooth in self.codebook.take_replaced() if not smooth):
            for parameter in self.codebook.row_parameters():
                for value in self.optimizer.state.get(parameter, {}).values():
                    if value.shape == parameter.shape:
                        value[rows] = 0
        if progress.ends_epoch:
            self.begin_epoch()

    def run(self) -> tuple[dict[str, list[float]], list[Frame]]:
        """Return the curves by name, and the frames of an animation."""
        curves: dict[str, list[float]] = {"used_codes": [], "error": [], "unused_distance": []}
        frames = []
        for step in range(self.steps):
            frame = self.step(step)
            unused = (frame.vectors - frame.points.mean(0)).norm(dim=1)[~frame.used]
            for name, value in zip(curves, (int(frame.used.sum()), self.error, float(unused.mean())), strict=True):
                curves[name].append(value)  # the mean of no unused code is NaN
            if step % max(1, self.steps // FRAMES) == 0 or step + 1 == self.steps:
                frames.append(frame)
        return curves, frames


def toy(lab: "Lab") -> None:
    """Run every method on every motion."""
    curves, rows = {}, []
    for motion, method, seed in lab.each(MOTIONS, lab.methods, range(lab.seeds)):
        recipe = lab.recipe(method, seed)
        found, frames = Toy(recipe, motion).run()
        curves.setdefault((method, motion), []).append(found)
        steps = recipe.epochs * recipe.epoch_steps
        begin, end = int(SETTLES * steps), int(RESTS * steps)
        values = {f"{name}_{when}": mean(part) for name, curve in found.items()
                  for when, part in (("moving", curve[begin:end]), ("end", curve[-recipe.epoch_steps :]))}
        rows.append(lab.row(recipe, {"motion": motion, "method": method}, values))
        if seed == 0:
            lab.animate(frames, f"toy_{method}_{motion}", f"{method}: {motion}")
    lab.report(rows, ("motion", "method"))
    lab.draw_toy(curves)


# ---- the control: whole runs, read back from TensorBoard


def control(lab: "Lab") -> None:
    """Train every method on the k-means codes of an autoencoder that was trained without a quantizer."""
    rows, curves = [], {}
    for method, seed in lab.each(lab.methods, range(lab.seeds)):
        recipe = lab.recipe(method, seed)
        before, after = recipe.stages
        recipe = replace(recipe, stages=[before, replace(after, hooks={**routes(method), **after.hooks})])
        whole = lab.train(recipe, f"{method}_seed{seed}")
        usage = whole.get("drift/usage_fixed") or {0: math.nan}  # which has no value before there are codes
        first = min(usage)
        found = {tag: {step - first + 1: v for step, v in curve.items() if step >= first} for tag, curve in whole.items()}
        curves.setdefault(method, []).append(found)
        values = {
            "usage_first": usage[first], "usage_lowest": min(usage.values()), "usage_last": last(usage),
            "lag_last": last(found.get("drift/codebook_lag")), "psnr_last": last(found.get("final/psnr")),
            "psnr_autoencoder": last(whole.get("held_out/psnr"), before=first),
        }
        rows.append(lab.row(recipe, {"method": method}, values))
    lab.report(rows, ("method",))
    lab.draw_control(curves)


def routes(method: str) -> dict[str, list[str]]:
    """Route to a method the hooks that `continuous` would take, as wiring would without it."""
    offers = {name: offered_hooks(find(name).load()) for name in method.split("+")}
    found = {}
    for hook in ("quantize", "straight_through", "embedding_loss"):
        kinds = {name: offered.get(hook) for name, offered in offers.items()}
        rank = "provides" if "provides" in kinds.values() else "yields"
        found[hook] = [name for name, kind in kinds.items() if kind in (rank, "wraps")]
    return found


def read_scalars(run: Path) -> dict[str, dict[int, float]]:
    """Return the curves of a run as TensorBoard has them: tag, step, value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def mean(values: Any) -> float:
    """Return the mean of what is not NaN of a curve, or NaN."""
    values = list(values.values()) if isinstance(values, dict) else values or []
    kept = [value for value in values if not math.isnan(value)]
    return statistics.fmean(kept) if kept else math.nan


def last(curve: dict[int, float] | None, before: float = math.inf) -> float:
    """Return the last value of a curve that lies before a step, or NaN."""
    values = [value for step, value in (curve or {}).items() if step < before]
    return values[-1] if values else math.nan


# ---- what every experiment needs


class Lab:
    """Hold what the command line said, and write what an experiment found into one folder."""

    def __init__(self, options: argparse.Namespace, out: Path):
        self.options, self.out, self.plt = options, out, pyplot()
        self.methods, self.seeds = options.methods.split(","), options.seeds
        for method in self.methods:  # a mistake is found before the first run
            self.recipe(method, 0)
        out.mkdir(parents=True, exist_ok=True)

    def recipe(self, method: str, seed: int) -> Recipe:
        """Return the experiment's recipe with the plugins of a method."""
        options, path = self.options, RECIPES / f"{self.options.experiment}.yaml"
        names, known = method.split("+"), load_recipe(str(path)).plugins
        data = [] if options.data is None else ["data.name=folder", f"data.root={options.data}"]
        missing = [f"plugins.{name}={{}}" for name in names if name not in known]
        recipe = load_recipe(str(path), [*missing, *data, *options.overrides])
        kept = dict.fromkeys((*names, *BESIDE[options.experiment]))
        return replace(recipe, seed=seed, plugins={name: recipe.plugins[name] for name in kept})

    def each(self, *ranges: Any) -> Iterator[tuple]:
        """Yield each combination, and say on stderr where the experiment is."""
        cases = list(product(*ranges))
        for number, case in enumerate(cases, 1):
            words = ", ".join(map(str, case))
            print(f"[{number}/{len(cases)}] {self.options.experiment}: {words}", file=sys.stderr, flush=True)
            yield case

    def train(self, recipe: Recipe, name: str) -> dict[str, dict[int, float]]:
        """Train a run and return its curves; those of one that diverges end early."""
        from vqzoo.trainer import Trainer

        try:
            Trainer(recipe, self.out / name).run()
        except NonFiniteError as error:
            print(f"{name} diverged: {error}", file=sys.stderr)
        return read_scalars(self.out / name)

    def row(self, recipe: Recipe, case: dict[str, Any], values: dict[str, float]) -> dict[str, Any]:
        """Append a run's numbers, and how they were made, to results.jsonl."""
        device = torch.device("cuda" if torch.cuda.is_available() and self.options.experiment != "toy" else "cpu")
        values = {name: None if math.isnan(value) else value for name, value in values.items()}
        row = {
            "experiment": self.options.experiment, **case, "seed": recipe.seed, **values, "date": str(datetime.date.today()),
            "data": "points" if self.options.experiment == "toy" else Path(self.options.data or recipe.data.name).name,
            "overrides": self.options.overrides, "hardware": hardware(device, 1), "versions": versions(list(recipe.plugins)),
        }
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        return {**case, **values}

    def report(self, rows: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
        """Print and write a table: the mean over seeds ± the standard deviation."""
        groups: dict[tuple, list[dict]] = {}
        for row in rows:
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
        names = [*keys, *(name for name in rows[0] if name not in keys)]
        lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for case, members in groups.items():
            cells = [*map(str, case), *(spread([row[name] for row in members]) for name in names[len(keys) :])]
            lines.append(f"| {' | '.join(cells)} |")
        text = "\n".join([*lines, "", f"Mean over {self.seeds} seed(s) ± standard deviation; (n of m): n have a value."]) + "\n"
        (self.out / "table.md").write_text(text)
        print(text)

    # ---- figures

    def band(self, axis: Any, x: list[float], curves: list[list[float]], label: str, **style: Any) -> None:
        """Draw the mean of curves of one length, and their range."""
        values = torch.tensor(curves, dtype=torch.float64)
        shown = values.nanmean(0)
        (line,) = axis.plot(x, shown, label=label, **style)
        low, high = (torch.where(values.isnan(), fill, values) for fill in (torch.inf, -torch.inf))
        low, high = (torch.where(shown.isnan(), torch.nan, v) for v in (low.amin(0), high.amax(0)))
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)

    def save(self, figure: Any, axes: Any, title: str) -> None:
        axes = list(axes)
        for axis in axes:
            axis.grid(color=GREY, linewidth=0.4)
            axis.spines[["top", "right"]].set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        several = f"line: mean of {self.seeds} seeds, band: their range" if self.seeds > 1 else "one seed"
        figure.suptitle(f"{title} ({several})", fontsize="medium")
        path = self.out / f"{self.options.experiment}.png"
        figure.savefig(path, dpi=130)
        self.plt.close(figure)
        print(path)

    def draw_toy(self, curves: dict[tuple[str, str], list[dict[str, list[float]]]]) -> None:
        """Draw a column per motion and a row per measure."""
        labels = {"used_codes": "codes used by a batch", "error": "mean squared distance\nto the code",
                  "unused_distance": "distance of unused codes\nto the mean of the data"}
        figure, axes = self.plt.subplots(3, len(MOTIONS), figsize=(11, 8), sharex=True, sharey="row", layout="constrained")
        for (method, motion), runs in curves.items():
            for name, axis in zip(labels, axes[:, list(MOTIONS).index(motion)], strict=True):
                smooth = [running_mean(run[name]) for run in runs]
                self.band(axis, list(range(len(smooth[0]))), smooth, method)
        for column, motion in enumerate(MOTIONS):
            steps = len(next(iter(curves.values()))[0]["error"])
            axes[0, column].set_title(motion)
            axes[2, column].set_xlabel("step; the cloud moves in the grey part")
            axes[1, column].set_yscale("log")
            axes[2, column].set_yscale("log")
            for axis in axes[:, column]:
                axis.axvspan(SETTLES * steps, RESTS * steps, color=GREY, alpha=0.25, linewidth=0)
        for axis, label in zip(axes[:, 0], labels.values(), strict=True):
            axis.set_ylabel(label)
        self.save(figure, axes.flat, f"{len(curves) // len(MOTIONS)} methods follow a moving cloud")

    def animate(self, frames: list[Frame], name: str, title: str) -> None:
        """Write a GIF: points grey, used codes blue, unused ones red. Pillow alone, since matplotlib takes seconds for it."""
        everywhere = torch.cat([frame.points for frame in frames])
        low, side = everywhere.amin(0) - 0.3, 480
        scale = (side / (everywhere.amax(0) + 0.3 - low)).min()
        height = 20 + int(scale * (everywhere.amax(0)[1] + 0.3 - low[1]))

        def dot(pen: ImageDraw.ImageDraw, at: Tensor, radius: float, **colours: str) -> None:
            x, y = ((at - low) * scale).tolist()
            pen.ellipse((x - radius, height - y - radius, x + radius, height - y + radius), **colours)

        pictures = []
        for frame in frames:
            pictures.append(Image.new("RGB", (side, height), "white"))
            pen = ImageDraw.Draw(pictures[-1])
            for point in frame.points:
                dot(pen, point, 1.5, fill="#b8b8b8")
            for vector, used in zip(frame.vectors, frame.used.tolist(), strict=True):
                dot(pen, vector, 5, fill="#1f77b4" if used else "#d62728", outline="black")
            used = f"{int(frame.used.sum())} of {len(frame.used)} codes used (blue)"
            pen.text((6, 4), f"{title}   step {frame.step}   {used}", fill="black")
        pictures[0].save(self.out / f"{name}.gif", save_all=True, append_images=pictures[1:], duration=80, loop=0)

    def draw_control(self, curves: dict[str, list[dict[str, dict[int, float]]]]) -> None:
        """Draw usage, lag and drift over the steps since the codebook began as the k-means centres."""
        labels = {"drift/usage_fixed": "usage on fixed images", "drift/codebook_lag": "codebook lag (unused codes dashed)",
                  "drift/encoder_drift": "encoder drift per logging interval"}
        figure, axes = self.plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
        for (tag, label), axis in zip(labels.items(), axes, strict=True):
            for number, (method, runs) in enumerate(curves.items()):
                for shown, style in ((tag, "-"), (f"{tag}_unused", "--")):
                    steps = sorted({step for run in runs for step in run.get(shown, ())})
                    values = [[run.get(shown, {}).get(step, math.nan) for step in steps] for run in runs]
                    if steps:
                        self.band(axis, steps, values, method if style == "-" else "_", color=f"C{number}", linestyle=style)
                epochs = sorted({step for run in runs for step in run.get("codes/usage", ())})
                if tag == "drift/usage_fixed" and epochs:
                    values = [[run["codes/usage"].get(step, math.nan) for step in epochs] for run in runs]
                    axis.plot(epochs, torch.tensor(values).nanmean(0), "o", color=f"C{number}", label=f"{method}, whole epoch")
            axis.set(xlabel="step since the k-means start", ylabel=label)
        self.save(figure, axes, "After a k-means start")


def spread(values: list[float | None]) -> str:
    """Return mean ± standard deviation, and of how many seeds if not of all; or a dash."""
    kept = [value for value in values if value is not None]
    if not kept:
        return "–"
    deviation = f" ± {statistics.stdev(kept):.2g}" if len(kept) > 1 else ""
    return f"{statistics.fmean(kept):.4g}{deviation}" + (f" ({len(kept)} of {len(values)})" if len(kept) < len(values) else "")


def running_mean(curve: list[float], length: int = 10) -> list[float]:
    """Return the mean of the last `length` values that are not NaN, at each of them; NaN where there is none."""
    return [mean(curve[max(0, end - length) : end]) for end in range(1, len(curve) + 1)]


def pyplot() -> Any:
    """Import matplotlib without a window; a UserError if it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"the figures need matplotlib: pip install 'vqzoo[bench]' ({error})") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=list(BESIDE))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change the experiment's recipe")
    parser.add_argument("--methods", help="plugins joined by +, methods by commas")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 (default: 3)")
    parser.add_argument("--data", help="a folder with train/ and val/ (default: photos inside scikit-image)")
    parser.add_argument("--out", help="a new or empty folder (default: runs/drift_EXPERIMENT)")
    options = parser.parse_intermixed_args(arguments)
    options.methods = options.methods or METHODS[options.experiment]
    if options.seeds < 1:
        raise UserError(f"--seeds: {options.seeds} must be at least 1")
    for key in SET_HERE:
        if any(word.startswith((f"{key}=", f"{key}[")) for word in options.overrides):
            raise UserError(f"{key}: the experiment sets this itself; see --seeds and --methods")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run an experiment; 0, or 2 for a user's mistake, which is explained."""
    try:
        options = parse(arguments)
        out = Path(options.out or f"runs/drift_{options.experiment}")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out: {out} is not an empty folder; name a new one")
        {"toy": toy, "control": control}[options.experiment](Lab(options, out))
    except (UserError, PluginError) as error:
        print(f"drift: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
