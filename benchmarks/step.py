"""A whole training step: the trainer's against SimVQ's structure change by change, and NSVQ's against SimVQ's in the trainer.

python benchmarks/step.py structure [--batch 64] [--resolution 128] [--k 65536] [--gan] [--skip compile] [key=value ...]
python benchmarks/step.py nsvq      [the same]

Everyone has the same network, losses, learning rate and images, which are noise in uint8 on the device. SimVQ's structure
(arXiv 2411.02038; its public code's, written anew) searches by all of |z|² + |c|² - 2 z·c, counts codes in Python, follows the
weights' average parameter by parameter, has Adam as it comes, fp16 on a GPU, and a discriminator that takes gradients in the
generator's step too; the rungs change one thing after another. key=value goes to the trainer's recipe. Rounds, ratios and the
last line are those of kernels.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from kernels import add_common, emit, numbers, with_threads
from kernels import words as words_of
from PIL import Image
from torch import Tensor

from vqzoo.bench import peers, speed
from vqzoo.bench.clock import clock, number, paired, resident, summarise, table, threads_for
from vqzoo.bench.speed import several, trainer_step
from vqzoo.data import to_images
from vqzoo.discriminators import PatchDiscriminator
from vqzoo.ops import discriminator_loss, embedding_losses, generator_loss, nearest_codes, straight_through
from vqzoo.prepare import build
from vqzoo.recipe import Recipe, load_recipe

OURS, STRUCTURE = peers.OURS, "SimVQ's structure"
CHANGES = {
    "usage": "usage without a loop",
    "search": "streamed search",
    "optimizer": "fused Adam, foreach average",
    "bf16": "bf16 for fp16",
    "discriminator": "discriminator frozen in the generator's step",
    "channels_last": "channels_last",
    "compile": "compiled encoder and decoder",
}
"""What each rung changes beside all those before it."""

METHODS = {"simvq": ("simvq",), "nsvq": ("vq", "nsvq"), "vq": ("vq",)}
GOALS = {"structure": 2.0, "time": 1.03, "memory": 1.02}
"""On a GPU: images/s over SimVQ's structure at least, NSVQ's step over SimVQ's at most."""

Step = Callable[[Tensor], None]


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"  # the trainer's own choice
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "no")
    return with_threads(options, __file__, arguments)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="structure|nsvq")
    for run in (structure, nsvq, peak):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run, name=run.__name__)
        for key, default in (("batch", 64), ("resolution", 128), ("k", 65536), ("d", 128), ("stride", 8), ("width", 128),
                             ("blocks", 2), ("patch", 1), ("steps", 10), ("warmup", 3)):
            command.add_argument(f"--{key}", type=int, default=default)
        command.add_argument("--mult", type=numbers, default=[1, 2, 2, 4])
        command.add_argument("--gan", action="store_true", help="with a PatchGAN discriminator")
        command.add_argument("--precision", choices=("no", "bf16"), help="by default bf16 on a GPU, no on a CPU")
        command.add_argument("--skip", type=words_of, default=[], help=f"rungs to leave out, of {', '.join(CHANGES)}")
        command.add_argument("--method", help=argparse.SUPPRESS)
        command.add_argument("overrides", nargs="*", metavar="key=value")
        add_common(command)
    return parser.parse_args(arguments)


# ---- the subcommands


def structure(options: argparse.Namespace) -> dict:
    """Time the trainer's SimVQ step against SimVQ's structure and the rungs between them."""
    found = compare(options, [*rungs(options), OURS], OURS, (STRUCTURE, OURS))
    speedup = {key: found["methods"][STRUCTURE][key] for key in ("ratio", "ratio_low", "ratio_high")}
    print(f"images/s over SimVQ's structure: {number(speedup['ratio'], 2)} (goal on a GPU: {GOALS['structure']})")
    return emit(options, **found, speedup=speedup)


def nsvq(options: argparse.Namespace) -> dict:
    """Time NSVQ's step against SimVQ's, and vanilla VQ's for a third, all in the trainer."""
    found = compare(options, list(METHODS), "simvq", ("nsvq", "simvq"))
    time, memory = found["methods"]["nsvq"]["ratio"], found["memory"]["nsvq"] / found["memory"]["simvq"]
    print(f"NSVQ / SimVQ: time {number(time, 3)} (goal on a GPU: {GOALS['time']}), "
          f"peak memory {number(memory, 3)} (goal on a GPU: {GOALS['memory']})")
    return emit(options, **found, time_ratio=time, memory_ratio=memory)


def compare(options: argparse.Namespace, names: list[str], base: str, weighed: tuple[str, ...]) -> dict:
    """Time steps by name, measure the peak memory of some, and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        images = noise(options)
        steps = {name: make(options, name, Path(folder)) for name in names}
        for step in steps.values():
            several(step, images, options.warmup)
        calls = {name: partial(several, step, images, options.steps) for name, step in steps.items()}
        calls[f"{base} again"] = calls[base]
        seconds = paired(calls, options.rounds, options.seed, partial(clock, options.device))
    found = summarise(seconds, base, 0 if options.threads == 1 else 1)
    del steps, step, calls
    memory = {name: peak_of(options, name) for name in weighed}
    rows = []
    for name, x in found.items():
        x |= {"step_ms": x["ms"] / options.steps, "images_per_second": 1e3 * options.batch * options.steps / x["ms"]}
        rows.append([name, number(x["step_ms"], 1), number(x["images_per_second"], 2),
                     f"{x['ratio']:.3f} ({x['ratio_low']:.3f}-{x['ratio_high']:.3f})",
                     number(memory[name] / 1e6, 0) if name in memory else ""])
    print(table(["step", "ms", "images/s", f"time / {base} (5-95 %)", "peak MB"], rows))
    return {"methods": found, "rounds": len(seconds[base]), "memory": memory}


def peak(options: argparse.Namespace) -> None:
    """Print the most bytes that one kind of step holds, its network and optimizer included; for a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        images = noise(options)
        before = resident(options.device, fresh=True)
        several(make(options, options.method, Path(folder)), images, 3)
        print(resident(options.device) - before)


def peak_of(options: argparse.Namespace, name: str) -> int:
    kept = [f"--{key}={getattr(options, key)}" for key in ("batch", "resolution", "k", "d", "stride", "width", "blocks",
                                                           "patch", "threads", "seed", "precision")]
    command = [sys.executable, __file__, "peak", f"--method={name}", f"--mult={','.join(map(str, options.mult))}", *kept,
               *(["--gan"] if options.gan else []), *options.overrides]
    environment = {**os.environ, **threads_for(str(options.threads))}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


# ---- what takes steps


def noise(options: argparse.Namespace) -> Tensor:
    """Return 4 batches of images [4, B, 3, H, W] (uint8) on the device."""
    return speed.noise(options.batch, [options.resolution] * 2, options.seed, options.device)


def make(options: argparse.Namespace, name: str, folder: Path) -> Step:
    """Make a step by its name: a rung, ours, or a method in the trainer."""
    if name in rungs(options):
        return Structure(recipe_of(options, METHODS["simvq"], folder), rungs(options)[name], options)
    return trainer_step(recipe_of(options, METHODS.get(name, METHODS["simvq"]), folder), folder / name)


def rungs(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return what each rung has changed; those that change nothing here are left out."""
    useless = {*options.skip, *(() if options.gan else ["discriminator"]), *(() if options.device == "cuda" else ["bf16"])}
    changes = [change for change in CHANGES if change not in useless]
    return {STRUCTURE: [], **{f"+ {CHANGES[change]}": changes[: number + 1] for number, change in enumerate(changes)}}


def recipe_of(options: argparse.Namespace, method: tuple[str, ...], folder: Path) -> Recipe:
    """Write a recipe of the wanted sizes, and a picture or two that its trainer can open, into a folder."""
    for split in ("train", "val"):
        (folder / split).mkdir(exist_ok=True)
        Image.new("RGB", (options.resolution, options.resolution), "grey").save(folder / split / "grey.png")
    args = {"width": options.width, "mult": options.mult, "blocks": options.blocks, "patch": options.patch}
    content = {
        "seed": options.seed, "epochs": 2, "epoch_steps": 10**6, "precision": options.precision,
        "data": {"root": str(folder), "resolution": [options.resolution] * 2, "batch_size": options.batch, "workers": 0},
        "encoder": {"stride": options.stride, "args": args}, "decoder": {"args": args},
        "codebook": {"size": options.k, "width": options.d}, "plugins": dict.fromkeys((*method, "pixel"), {}),
        "optim": {"lr": 1e-4, "betas": [0.5, 0.9]}, "discriminator_optim": {"lr": 1e-4, "betas": [0.5, 0.9]},
        "log": {"images": 1, "drift_images": 1},
    }
    if options.gan:
        content["plugins"]["gan"] = {"weight": 0.1, "ramp": {"*": 0}}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(content))
    return load_recipe(str(path), options.overrides)


class Structure:
    """Take SimVQ's training step as its public code is structured, but for the changes."""

    def __init__(self, recipe: Recipe, changes: list[str], options: argparse.Namespace):
        self.changes, self.device, self.decay = changes, torch.device(options.device), recipe.ema
        tokenizer = build(recipe).to(self.device).train()
        self.encoder, self.decoder, self.codebook = tokenizer.encoder, tokenizer.decoder, tokenizer.codebook
        self.discriminator = PatchDiscriminator().to(self.device) if options.gan else None
        if "channels_last" in changes:
            for module in (self.encoder, self.decoder, *([self.discriminator] if options.gan else [])):
                module.to(memory_format=torch.channels_last)
        if "compile" in changes:
            self.encoder.compile()
            self.decoder.compile()
        self.parameters = [p for p in tokenizer.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        half = torch.bfloat16 if "bf16" in changes or options.device == "cpu" else torch.float16
        self.type = None if options.device == "cpu" and options.precision == "no" else half
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.type == torch.float16)
        self.optimizer = self.make_optimizer(self.parameters, recipe.optim)
        if self.discriminator is not None:
            self.judge_optimizer = self.make_optimizer(self.discriminator.parameters(), recipe.discriminator_optim)
        size = self.codebook.size
        self.used = torch.zeros(size, dtype=torch.bool, device=self.device) if "usage" in changes else [0] * size

    def make_optimizer(self, parameters, config) -> torch.optim.Adam:
        fused = {"fused": True} if "optimizer" in self.changes else {}
        return torch.optim.Adam(parameters, lr=config.lr, betas=tuple(config.betas), **fused)

    def __call__(self, images: Tensor) -> None:
        images = to_images(images, self.device)
        if "channels_last" in self.changes:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.autocast():
            latents = self.encoder(images)
            seen, loss, indices = self.quantize(latents)
            reconstructions = self.decoder(seen)
            loss = loss + F.l1_loss(reconstructions, images)
            if self.discriminator is not None:
                self.discriminator.requires_grad_("discriminator" not in self.changes)
                loss = loss + 0.1 * generator_loss("non-saturating", self.discriminator(reconstructions))
        self.count(indices)
        self.update(self.optimizer, loss)
        if self.discriminator is not None:
            self.judge(images, reconstructions.detach())
        self.follow()

    def autocast(self):
        return nullcontext() if self.type is None else torch.autocast(self.device.type, self.type)

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the decoder sees [B, D, h, w], the embedding loss and the indices [B·h·w]."""
        tokens = latents.permute(0, 2, 3, 1)
        rows, vectors = tokens.flatten(0, 2), self.codebook.linear(self.codebook.table)
        with torch.no_grad():
            if "search" in self.changes:
                indices = nearest_codes(rows, vectors)[0]
            else:
                indices = peers.expanded_distances(rows, vectors).argmin(1)
        codes = vectors[indices].view(tokens.shape)
        losses = embedding_losses(tokens, codes, 1.0, 0.25)
        return straight_through(tokens, codes).permute(0, 3, 1, 2).contiguous(), sum(losses.values()), indices

    def count(self, indices: Tensor) -> None:
        """Note which codes are used, and which share of them."""
        if "usage" in self.changes:
            self.used[indices] = True
            return
        for index in indices.unique():
            self.used[index] = 1
        self.share = torch.tensor(sum(self.used) / len(self.used))

    def update(self, optimizer: torch.optim.Adam, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()

    def judge(self, images: Tensor, reconstructions: Tensor) -> None:
        """Train the discriminator; what the generator's step left in its gradients is dropped."""
        self.discriminator.requires_grad_(True).zero_grad()
        with self.autocast():
            loss = discriminator_loss("hinge", self.discriminator(images), self.discriminator(reconstructions))
        self.update(self.judge_optimizer, loss)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average of the weights."""
        if "optimizer" in self.changes:
            torch._foreach_lerp_(self.average, self.parameters, 1 - self.decay)
            return
        for mine, theirs in zip(self.average, self.parameters, strict=True):
            mine.sub_((1 - self.decay) * (mine - theirs))


if __name__ == "__main__":
    sys.exit(main())
