"""The doctor: what this machine has, what a recipe would meet on it, and the way out of what is wrong."""

import gc
import hashlib
import io
import math
import os
import platform
import shutil
import sys
import tempfile
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from packaging.requirements import Requirement
from PIL import Image
from torch.utils import collect_env
from tqdm import tqdm

from vqzoo import weights
from vqzoo.data import (
    DataConfig,
    Folder,
    ImageDataset,
    StreamDataset,
    covering,
    decode,
    eval_batches,
    make_dataset,
    train_batches,
)
from vqzoo.errors import (
    DataError,
    Interrupted,
    LostError,
    NonFiniteError,
    OutOfMemory,
    PluginError,
    StorageError,
    UserError,
)
from vqzoo.memory import Memory, advice, gib, is_shortage, predict_memory
from vqzoo.monitor import memory
from vqzoo.ops import nearest_codes, use
from vqzoo.ops.backends import triton_reason
from vqzoo.plugin import Plugin, hookimpl
from vqzoo.prepare import build, check_compiler, make_accelerator, prepare
from vqzoo.recipe import CheckpointConfig, GuardConfig, LogConfig, Recipe, load_recipe
from vqzoo.sources import ALLOW, DENY, also, available, offered_hooks, refused
from vqzoo.tokenizer import Tokenizer
from vqzoo.trainer import Trainer

MOST_DECODED = 2000
"""Images of a split that are decoded; of more, that many at even distances."""

SCAN_SECONDS, HASH_SECONDS, READ_SECONDS, STEP_SECONDS = 60.0, 60.0, 5.0, 120.0
"""Seconds for decoding a split, for hashing files, for reading batches; and after which no further stage is tried."""

MOST_NAMED = 5
"""Files that a finding names."""

LITTLE_SHARED = 2**28
"""Bytes of shared memory below which worker processes may fail: a container has a quarter of that by default."""

PACKAGES = ("vqzoo", "torch", "torchvision", "timm", "accelerate", "torchmetrics", "pluggy", "omegaconf", "safetensors")

VARIABLES = {
    ALLOW: "no other plugin is imported",
    DENY: "these plugins are not imported",
    "VQZOO_OFFLINE": "nothing is downloaded, unless it is 0",
    "VQZOO_WEIGHTS": "the folder of published weights",
    "VQZOO_CACHE": "the folder of reference statistics",
    "TORCH_HOME": "torch hub's cache, where weights lie unless VQZOO_WEIGHTS says otherwise",
    "HF_HOME": "the cache of timm's weights",
    "HF_HUB_OFFLINE": "timm downloads nothing, unless it is 0",
    "CUDA_VISIBLE_DEVICES": "the GPUs that torch may see",
    "OMP_NUM_THREADS": "torch's threads on the CPU",
    "TRITON_INTERPRET": "Triton's kernels run on the CPU, which is slow and for tests",
    "ACCELERATE_USE_FSDP": "the launcher shards; the recipe must say shard=true",
    "ACCELERATE_MIXED_PRECISION": "of the launcher; the recipe's precision counts",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "of the launcher; the recipe's accumulate counts",
}
"""Environment variables that make a difference, and what they do."""

STOPWATCH = "doctor_stopwatch"

EPOCH = 2
"""Steps of each stage in a dry run."""

EXPECTED = (DataError, LostError, NonFiniteError, OutOfMemory, PluginError, StorageError, UserError)


class Findings:
    """Print findings as they come; `problems` counts those that are wrong. The same error is told once."""

    def __init__(self):
        self.problems = self.notes = 0
        self._told: set[str] = set()

    def section(self, title: str) -> None:
        print(f"\n{title}", flush=True)

    def ok(self, text: str) -> None:
        self._say("ok", text)

    def note(self, text: str) -> None:
        self.notes += 1
        self._say("note", text)

    def wrong(self, text: str) -> None:
        self.problems += 1
        self._say("WRONG", text)

    def _say(self, mark: str, text: str) -> None:
        width = max(60, shutil.get_terminal_size((128, 40)).columns)
        for number, line in enumerate(text.splitlines() or [""]):
            head = f"  {mark:<7}" if not number else " " * 9
            print(textwrap.fill(line, width, initial_indent=head, subsequent_indent=" " * 9, break_long_words=False,
                                break_on_hyphens=False), flush=True)

    @contextmanager
    def examining(self, what: str) -> Iterator[None]:
        """Make a finding of whatever the block raises, so that the rest is examined all the same."""
        try:
            yield
        except Interrupted as error:
            raise Interrupted("a signal; of a dry run nothing is kept", error.status - 128) from error
        except EXPECTED as error:
            if str(error) not in self._told:
                self.wrong(f"{what}: {error}")
            self._told.add(str(error))
        except Exception as error:  # of any library, of a device
            self.wrong(f"{what} cannot be examined: {type(error).__name__}: {error}")


def diagnose(name: str | None, overrides: list[str]) -> int:
    """Print what is found and return the exit status: 1 if anything is wrong.

    A UserError if there is no such recipe, and in one of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"doctor: WORLD_SIZE={os.environ['WORLD_SIZE']}: it examines one process; start it without a launcher")
    recipe = load_recipe(name, overrides) if name is not None else None
    found = Findings()
    for title, examine in MACHINE.items():
        found.section(title)
        with found.examining(title):
            examine(found)
    if recipe is not None:
        _recipe(found, recipe)
    some = "nothing is wrong" if not found.problems else f"{found.problems} problem{'s' if found.problems > 1 else ''}"
    print(f"\n{some}, {found.notes} note{'' if found.notes == 1 else 's'}")
    return int(found.problems > 0)


# The machine


def _versions(found: Findings) -> None:
    said = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            said.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            said.append(f"{name} not installed")
    found.ok(", ".join(said))
    for problem in _unmet():
        found.wrong(problem)


def _unmet() -> Iterator[str]:
    """Say which requirements of this vqzoo the installed packages do not meet."""
    try:
        lines = requires("vqzoo") or []
    except PackageNotFoundError:
        return
    for wanted in map(Requirement, lines):
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        way = f"vqzoo needs {wanted.name}{wanted.specifier}; run: pip install '{wanted.name}{wanted.specifier}'"
        try:
            if not wanted.specifier.contains(version(wanted.name), prereleases=True):
                yield f"{wanted.name} {version(wanted.name)} is out of date: {way}"
        except PackageNotFoundError:
            yield f"{wanted.name} is not installed: {way}"


def _devices(found: Findings) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if usable:
        for number in range(torch.cuda.device_count()):
            about, free = torch.cuda.get_device_properties(number), torch.cuda.mem_get_info(number)[0]
            found.ok(f"GPU {number}: {about.name}, {gib(about.total_memory)}, {gib(free)} of it free, compute capability "
                     f"{about.major}.{about.minor}")
        found.ok(f"CUDA {torch.version.cuda or torch.version.hip} of torch, driver {_driver() or 'unknown'}")
        if torch.cuda.device_count() > 1:
            found.note("`vqzoo run` uses one GPU; `accelerate launch -m vqzoo run RECIPE` uses all")
    elif Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        why = "it is built for CPUs" if not torch.version.cuda else "no reason is given"
        why = str(said[0].message).partition("\n")[0] if said else why
        found.wrong(f"there is an NVIDIA GPU that torch {torch.__version__} cannot use: {why}; install a driver for CUDA "
                    f"{torch.version.cuda or '(any)'} or a build of torch for the driver that is there (pytorch.org)")
    else:
        found.note("no GPU that torch can use; the CPU trains")


def _driver() -> str | None:
    """Return the version of NVIDIA's driver, as torch's own report of an environment has it."""
    return collect_env.get_nvidia_driver_version(collect_env.run)


def _processor(found: Findings) -> None:
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found.ok(f"CPU: {os.cpu_count()} cores, {mine} of them for this process, {torch.get_num_threads()} threads of torch, "
             f"{gib(_memory_there())} of memory, {gib(_memory_free())} of it free")
    if torch.get_num_threads() > mine:
        found.note(f"torch's {torch.get_num_threads()} threads hinder one another on {mine} cores; set OMP_NUM_THREADS={mine}")


def _memory_there() -> int:
    """Return the bytes that this machine, or the container that this is, may use."""
    limits = [psutil.virtual_memory().total]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # no such limit
            continue
    return min(limits)


def _memory_free() -> int:
    return min(psutil.virtual_memory().available, _memory_there())


def _precisions(found: Findings) -> None:
    if torch.cuda.is_available():
        (found.ok if torch.cuda.is_bf16_supported() else found.note)(
            f"precision bf16: {'yes' if torch.cuda.is_bf16_supported() else 'no, this GPU lacks it; use fp16'}; fp16: yes")
    else:
        found.ok(f"precision bf16: yes, slow where the CPU lacks it ({torch.backends.cpu.get_cpu_capability()}); fp16: on GPUs")


def _compiler(found: Findings) -> None:
    try:
        check_compiler(_device())
        found.ok("compile: torch.compile works")
    except UserError as error:
        found.note(str(error))


def _triton(found: Findings) -> None:
    device = _device()
    if reason := triton_reason(device.type):
        found.ok(f"ops.backend: chunked; triton does not work here: {reason}")
        return
    latents, vectors = torch.randn(64, 8, device=device), torch.randn(32, 8, device=device)
    indices, wanted = (nearest_codes(latents, vectors, backend=name)[0] for name in ("triton", "eager"))
    if torch.equal(indices, wanted):
        found.ok("ops.backend: triton works")
    else:
        found.wrong("ops.backend: triton finds other codes than the plain formula; set ops.backend=chunked, and report it")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _storage(found: Findings) -> None:
    found.ok(f"disk: {gib(shutil.disk_usage('.').free)} free in {Path.cwd()}")
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < LITTLE_SHARED:
        found.note(f"shared memory: {shared} has {size / 2**20:.0f} MiB, which worker processes need for their batches; start "
                   "the container with --shm-size=2g, or set data.workers=0")


def _machine(found: Findings) -> None:
    for examine in (_versions, _devices, _processor, _precisions, _compiler, _triton, _storage):
        with found.examining(examine.__name__.strip("_")):
            examine(found)


def _plugins(found: Findings) -> None:
    fine = []
    for name, source in available().items():
        try:
            kind = source.load()
            kind.Config()
            fine.append(name if offered_hooks(kind) else f"{name} (offers no hook)")
        except UserError as error:
            found.wrong(f"{error}; or uninstall it, or name it in {DENY}")
        except Exception as error:  # of a class that cannot even be described
            found.wrong(f"plugin {name!r} ({source.place}): {error!r}; uninstall it, or name it in {DENY}")
    for name, reason in refused().items():
        excluded = reason.startswith((ALLOW, DENY))
        (found.note if excluded else found.wrong)(f"plugin {name!r} cannot be used: {reason}")
    places: dict[str, list[str]] = {}
    for name in fine:
        source = available()[name.partition(" ")[0]]
        places.setdefault(source.place, []).append(name)
    for place, names in places.items():
        found.ok(f"{len(names)} of {place}: {', '.join(names)}")


def _weights(found: Findings) -> None:
    missing = [f"{name} (for {source.use})" for name, source in weights.SOURCES.items() if not source.file.is_file()]
    if missing:
        found.note(f"not in {weights.folder()}: {', '.join(missing)}; `vqzoo weights fetch NAME` gets one, `weights list` "
                   "says from where")
    for name, source in weights.SOURCES.items():
        if not source.file.is_file():
            continue
        if (size := source.file.stat().st_size) != source.bytes:
            found.wrong(f"{name}: {source.file} has {size:,} bytes where {source.bytes:,} were published; delete it and run "
                        f"`vqzoo weights fetch {name}`")
        else:
            found.ok(f"{name} is here, for {source.use}: {source.file}")


def _environment(found: Findings) -> None:
    for name in (name for name in VARIABLES if name in os.environ):
        found.ok(f"{name}={os.environ[name]}: {VARIABLES[name]}")
    others = [name for name in os.environ if name.startswith("VQZOO_") and name not in VARIABLES]
    for name in others:
        found.note(f"{name}={os.environ[name]}: nobody reads it; known are {', '.join(n for n in VARIABLES if 'VQZOO' in n)}")
    if not others and not any(name in os.environ for name in VARIABLES):
        found.ok("none of the variables that make a difference is set")


def _processes(found: Findings) -> None:
    if not Path(default_config_file).is_file():
        found.ok("one process; there is no configuration of accelerate's, so `accelerate launch` takes every GPU, or one CPU "
                 "process")
        return
    config = load_config_from_file(default_config_file)
    found.ok(f"one process here; `accelerate launch` would start {config.num_processes}, as {default_config_file} says "
             f"({getattr(config.distributed_type, 'value', config.distributed_type)})")
    if str(config.mixed_precision or "no") != "no":
        found.note(f"accelerate's configuration says mixed_precision {config.mixed_precision}; the recipe's precision counts")


MACHINE = {"machine": _machine, "plugins": _plugins, "published weights": _weights, "environment": _environment,
           "processes": _processes}
"""What is examined without a recipe."""


# The recipe


def _recipe(found: Findings, recipe: Recipe) -> None:
    """Examine a recipe; where one thing is wrong, whatever does not depend on it is examined all the same."""
    found.section("recipe")
    ready, tokenizer, accelerator = None, None, None
    with found.examining("recipe"), _short_memory():
        accelerator = make_accelerator(recipe)
        ready = prepare(recipe, accelerator)
        found.ok("all that `vqzoo check` checks")
        for name, why in ready.evaluator.missing.items():
            found.wrong(f"evaluate.metrics: {name} will be missing: {why}")
    if ready is None and accelerator is not None:
        with found.examining("recipe"), _short_memory():
            tokenizer = build(recipe)
            found.ok("its networks and plugins fit together")
    found.section("data")
    images = _data(found, recipe, {} if ready is None else {"train": ready.train_data, "val": ready.val_data})
    found.section("memory and speed")
    tokenizer = ready.tokenizer if ready else tokenizer
    if tokenizer is not None:
        with found.examining("memory"):
            _memory(found, recipe, tokenizer, accelerator)
    if ready is None:
        found.note("no step can be tried before that is mended")
        return
    steps, held_out = ready.steps_per_epoch, _length(ready.val_data)
    del ready, tokenizer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with found.examining("dry run"), _short_memory():
        _dry_run(found, recipe, steps, held_out, images)


@contextmanager
def _short_memory() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        raise OutOfMemory(f"memory is short: {str(error).partition(chr(10))[0] or type(error).__name__}; less data.batch_size, "
                          "a larger accumulate, a smaller network") from error


def _length(dataset: ImageDataset | StreamDataset) -> int | None:
    return None if isinstance(dataset, StreamDataset) else len(dataset)


def _memory(found: Findings, recipe: Recipe, tokenizer: Tokenizer, accelerator: Accelerator) -> None:
    """Compare what a step and the checkpoints are predicted to need with what there is."""
    predicted, device = predict_memory(tokenizer, recipe), accelerator.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _memory_free()
    needed = predicted.states + predicted.activations
    said = (f"{gib(needed)} predicted: {gib(predicted.states)} of weights, gradients, moments and average, "
            f"{gib(predicted.activations)} of activations, without losses' and discriminators' own; {gib(free)} are free")
    if needed > free:
        error = MemoryError(f"{gib(needed)} are predicted and {gib(free)} are free on {device}")
        found.wrong(advice(recipe, tokenizer, accelerator, error))
    else:
        (found.note if needed > 0.8 * free else found.ok)(said)
    _room(found, recipe, predicted)


def _room(found: Findings, recipe: Recipe, predicted: Memory) -> None:
    """Compare the checkpoints that stay, and the one being written, with the room on the disk."""
    count = recipe.checkpoint.keep + recipe.checkpoint.keep_best + 1
    needed, free = predicted.states * count, shutil.disk_usage(".").free
    said = f"{count} checkpoints need up to {gib(needed)}, and {Path.cwd()} has {gib(free)} free"
    if needed > free:
        found.wrong(f"{said}; set checkpoint.keep lower, or give a folder with room by --out")
    else:
        found.ok(said)


# The images


@dataclass
class Looked:
    """What was seen of a split's images: sizes (width, height), formats and modes of files, and what does not decode."""

    count: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    kinds: Counter = field(default_factory=Counter)
    broken: dict[str, str] = field(default_factory=dict)
    pixels: dict[str, str] = field(default_factory=dict)
    """A hash of the pixels by name, of images that are no files in a folder."""


def _data(found: Findings, recipe: Recipe, datasets: dict[str, Any]) -> float | None:
    """Look at the images of both splits, opened already or not, and return how many per second can be read for training."""
    for split in ("train", "val") if not datasets else ():
        with found.examining(f"data.{split}"):
            datasets[split] = make_dataset(recipe.data, split)
    if not datasets:
        found.note("there are no images to look at")
        return None
    pixels = {}
    for split, dataset in datasets.items():
        with found.examining(f"data.{split}"):
            if isinstance(dataset, StreamDataset):
                _look_at_stream(found, recipe.data, dataset)
            else:
                pixels[split] = _scan(found, recipe, split, dataset)
    with found.examining("duplicates"):
        _duplicates(found, datasets, pixels)
    speed = None
    with found.examining("reading"):
        if "train" in datasets:
            speed = _reading_speed(recipe, datasets["train"])
            found.ok(f"reading: about {speed:,.0f} training images per second with data.workers={recipe.data.workers}")
    return speed


def _look_at_stream(found: Findings, config: DataConfig, dataset: StreamDataset) -> None:
    with closing(eval_batches(replace(config, workers=0), dataset, limit=config.eval_batch_size)) as batches:
        count = sum(len(batch.images) for batch in batches)
    if not count:
        raise UserError(f"{dataset.name} gives no images")
    found.note(f"{dataset.name} is a stream, and gives images; how many there are, of which sizes, whether some are broken or "
               "there twice, nobody has looked")


def _scan(found: Findings, recipe: Recipe, split: str, dataset: ImageDataset) -> dict[str, str]:
    """Decode a split's images, or a sample, say what they are like, and return the hashes of the pixels."""
    length = len(dataset)
    count = min(length, MOST_DECODED)
    seen = _look(dataset, [number * length // count for number in range(count)], f"decoding {split}")
    whole = seen.count == length
    looked = "all decoded" if whole else f"of which {seen.count:,} at even distances were decoded"
    if seen.count < count:
        looked = f"of which the first {seen.count:,} of {count:,} at even distances were decoded in {SCAN_SECONDS:.0f} s"
    found.ok(f"{split}: {length:,} images, {looked}" + (f"; {_listed(seen.kinds)}" if seen.kinds else ""))
    for note in dataset.notes:
        found.note(note)
    if seen.broken:
        named = [f"{name} ({reason})" for name, reason in seen.broken.items()]
        found.wrong(f"{split}: {len(seen.broken)} of {seen.count:,} images do not decode: {_some(named)}; mend or remove them "
                    f"(a run leaves out up to data.bad_files={recipe.data.bad_files})")
    if seen.sizes:
        _sizes(found, recipe, split, dataset, seen.sizes)
    if split == "train":
        _enough(found, recipe, length)
    return seen.pixels


def _look(dataset: ImageDataset, indices: list[int], what: str) -> Looked:
    """Decode images until all are done or the time is over."""
    seen, ends = Looked(), time.monotonic() + SCAN_SECONDS
    for index in _shown(indices, what):
        if time.monotonic() > ends:
            break
        seen.count += 1
        source = dataset.source
        try:
            if isinstance(source, Folder):
                path = source.root / source.names[index]
                with Image.open(path) as opened:
                    kind = f"{opened.format} {opened.mode}"
                image = decode(path)
                seen.kinds[kind] += 1
            else:
                image = source.image(index)
                seen.pixels[dataset.name(index)] = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
            seen.sizes.append(image.size)
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            seen.broken[dataset.name(index)] = f"{type(error).__name__}: {error}"
    return seen


def _sizes(found: Findings, recipe: Recipe, split: str, dataset: ImageDataset, sizes: list[tuple[int, int]]) -> None:
    ordered = sorted(sizes, key=math.prod)
    picked = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
    least, middle, most = (f"{width}x{height}" for width, height in picked)
    found.ok(f"{split}: width x height from {least} over {middle} (the median) to {most} pixels")
    height, width = recipe.data.resolution
    shorter = dataset.resize if split == "train" else None
    small = sum(covering(size, (height, width), shorter)[0] > size[1] for size in sizes)
    if small:
        wanted = f"{width}x{height} pixels" + (f" with a shorter side of {shorter}" if shorter else "")
        found.note(f"{split}: {small:,} of {len(sizes):,} images are smaller than {wanted} and are enlarged, which blurs them; "
                   "take larger ones, or a smaller data.resolution")


def _enough(found: Findings, recipe: Recipe, images: int) -> None:
    if images < recipe.data.batch_size:
        found.note(f"train: {images} images are less than one batch (data.batch_size={recipe.data.batch_size}), in which some "
                   "come twice")
    tokens = images * math.prod(side // recipe.encoder.stride for side in recipe.data.resolution)
    if tokens < recipe.codebook.size:
        found.note(f"train: all images together have {tokens:,} tokens for {recipe.codebook.size:,} codes, of which the rest "
                   "cannot be used; take a smaller codebook.size, or more images")


def _duplicates(found: Findings, datasets: dict[str, Any], pixels: dict[str, dict[str, str]]) -> None:
    """Say which images are there twice, and which of those train and evaluate."""
    folders = {split: dataset.source for split, dataset in datasets.items()
               if isinstance(dataset, ImageDataset) and isinstance(dataset.source, Folder)}
    alike, left = _equal_files(folders)
    for split, hashes in pixels.items():
        for name, digest in hashes.items():
            alike.setdefault(digest, []).append((split, name))
    groups = [group for group in alike.values() if len(group) > 1]
    both = [group for group in groups if len({split for split, _ in group}) > 1]
    for split in datasets:
        inside = [group for group in groups if {one for one, _ in group} == {split}]
        if inside:
            found.note(f"{split}: {sum(len(group) - 1 for group in inside)} images are there more than once: "
                       f"{_some(map(_same, inside))}; remove the copies")
    if both:
        found.wrong(f"{len(both)} images are in train and in val: {_some(map(_same, both))}; what is trained on cannot be "
                    "evaluated on: remove them from one of the two")
    if left:
        found.note(f"duplicates: {left:,} files were not compared with others, for want of time ({HASH_SECONDS:.0f} s)")
    elif not groups and (folders or any(pixels.values())):
        found.ok("no two images are the same" if folders else "no two of the images looked at are the same")


def _equal_files(folders: dict[str, Folder]) -> tuple[dict[str, list[tuple[str, str]]], int]:
    """Return the files of splits by the hash of their bytes, where another has the same size; and how many were not read."""
    sizes: dict[int, list[tuple[str, str, Path]]] = {}
    smallest = sorted(folders.items(), key=lambda item: len(item[1]))  # so that it is known when the time is over
    listed = [(split, source.name(number), source.root / name) for split, source in smallest
              for number, name in enumerate(source.names)]
    ends, left = time.monotonic() + HASH_SECONDS, 0
    for split, name, path in listed:
        if time.monotonic() > ends:
            left += 1
        else:
            sizes.setdefault(path.stat().st_size, []).append((split, name, path))
    groups = [group for group in sizes.values() if len(group) > 1]
    groups.sort(key=lambda group: len({split for split, *_ in group}), reverse=True)  # first those that may leak
    files = [file for group in groups for file in group]
    alike: dict[str, list[tuple[str, str]]] = {}
    for number, (split, name, path) in enumerate(_shown(files, "comparing")):
        if time.monotonic() > ends:
            return alike, left + len(files) - number
        alike.setdefault(weights.sha256(path), []).append((split, name))
    return alike, left


def _shown(items: list[Any], what: str) -> Iterable[Any]:
    """Show on a terminal how far a loop is."""
    return tqdm(items, what, leave=False, disable=not sys.stderr.isatty())


def _same(group: list[tuple[str, str]]) -> str:
    return " = ".join(f"{split}/{name}" for split, name in sorted(group)[:3]) + (" = ..." if len(group) > 3 else "")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED])}{more}"


def _listed(kinds: Counter) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())


def _reading_speed(recipe: Recipe, dataset: ImageDataset | StreamDataset) -> float:
    """Return the training images per second that the recipe's workers give, once what they read ahead is used up."""
    batches = train_batches(recipe.data, dataset, recipe.seed, accumulate=recipe.accumulate)
    ahead = 1 + 2 * recipe.data.workers
    with closing(batches):
        next(batches)
        began, images = time.monotonic(), 0
        for number, batch in enumerate(islice(batches, 10 * ahead)):
            if number == ahead and time.monotonic() - began < READ_SECONDS:
                began, images = time.monotonic(), 0
            images += len(batch.images)
            if time.monotonic() - began > READ_SECONDS:
                break
    return images / max(time.monotonic() - began, 1e-9)


# The dry run


class Enough(UserError):
    """The steps that were to be timed are done."""


def _stopwatch(marks: list[tuple[str, int, float]], last: str) -> type[Plugin]:
    """Return a plugin that notes when a step is done, as (stage, step in the stage, time), and ends the dry run."""
    ends = time.monotonic() + STEP_SECONDS

    class Stopwatch(Plugin):
        """Stopwatch: when steps are done."""

        @hookimpl
        def report(self, progress):
            now = time.monotonic()
            marks.append((progress.stage, progress.step_in_stage, now))
            done = progress.step_in_stage == EPOCH and (progress.stage == last or now > ends)
            if done:
                raise Enough
            return {}

    return Stopwatch


def _shortened(recipe: Recipe) -> Recipe:
    """Return a recipe that trains two steps of each stage, times them, and measures or keeps nothing."""
    never = 2**31

    def timed(hooks: dict[str, list[str]]) -> dict[str, list[str]]:
        return {**hooks, "report": [*hooks["report"], STOPWATCH]} if "report" in hooks else hooks

    stages = [replace(stage, epochs=1, hooks=timed(stage.hooks)) for stage in recipe.stages]
    stages[-1] = replace(stages[-1], epochs=None)
    return replace(
        recipe, epochs=len(stages), epoch_steps=EPOCH, stages=stages, hooks=timed(recipe.hooks),
        plugins={**recipe.plugins, STOPWATCH: {}}, log=LogConfig(steps=1, images=1, drift_images=1, collapse=0.0),
        evaluate=replace(recipe.evaluate, epochs=never), checkpoint=CheckpointConfig(epochs=never, keep_best=False),
        guard=GuardConfig(),
    )


@dataclass
class Speed:
    """What a dry run took: seconds of a step by stage, seconds to evaluate an image, MiB at the peak."""

    steps: dict[str, float]
    image: float
    peak: float


def _dry_run(found: Findings, recipe: Recipe, steps: int, held_out: int | None, reading: float | None) -> None:
    """Train two steps of each stage in a folder that does not stay, and say how long the whole would take."""
    said = io.StringIO()
    try:
        with tempfile.TemporaryDirectory(prefix="vqzoo_doctor_") as folder, redirect_stderr(said):
            speed = _timed(recipe, Path(folder, "run"))
    except NonFiniteError as error:
        found.wrong(f"{error}. A run would stop here: lower optim.lr, set optim.clip, use precision=no or bf16, or look at the "
                    "plugin whose loss it is")
        return
    for line in said.getvalue().splitlines():
        if "no gradient reaches" in line:
            found.note(line)
    said = ", ".join(f"{stage} {_time(seconds)}" for stage, seconds in speed.steps.items())
    where = "GPU memory" if torch.cuda.is_available() else "memory of this process"
    found.ok(f"{EPOCH} steps of each stage train; the second takes: {said}; {speed.peak:,.0f} MiB of {where} at the peak")
    missed = [stage.name for stage in recipe.stages if stage.name not in speed.steps]
    if missed:
        found.note(f"stages {', '.join(missed)} were not tried, for want of time ({STEP_SECONDS:.0f} s)")
    needed = recipe.data.batch_size / min(speed.steps.values())
    if reading is not None and reading < needed:
        found.note(f"reading gives {reading:,.0f} images per second, and training could take {needed:,.0f}; to read faster: "
                   "more data.workers, data.draft=true for large JPEGs, images of about the resolution's size")
    _whole(found, recipe, steps, held_out, speed)


def _timed(recipe: Recipe, folder: Path) -> Speed:
    """Train and time the steps of a recipe, and evaluate one batch."""
    marks: list[tuple[str, int, float]] = []
    with also(classes={STOPWATCH: _stopwatch(marks, recipe.stages[-1].name)}):
        trainer = Trainer(_shortened(recipe), folder)
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.device)
        marks[:] = [(recipe.stages[0].name, 0, time.monotonic())]
        try:
            trainer.run()
        except Enough:
            pass
        began, count = time.monotonic(), recipe.data.eval_batch_size
        with use(recipe.ops.backend, recipe.ops.precision):
            batches = eval_batches(recipe.data, trainer.val_data, limit=count)
            images = trainer.evaluator.tokenizer(trainer.averaged(), batches).metrics["images"]
        image = (time.monotonic() - began) / max(1, images)
    return Speed(_seconds(marks), image, memory(trainer.device)["peak_mib"])


def _seconds(marks: list[tuple[str, int, float]]) -> dict[str, float]:
    """Return the seconds of each stage's second step."""
    return {stage: later - earlier for (_, _, earlier), (stage, step, later) in zip(marks, marks[1:], strict=False)
            if step == EPOCH}


def _whole(found: Findings, recipe: Recipe, steps: int, held_out: int | None, speed: Speed) -> None:
    """Say how long the whole recipe would take."""
    known = list(speed.steps.values())
    rest = recipe.epochs - sum(stage.epochs or 0 for stage in recipe.stages)
    training = sum((rest if stage.epochs is None else stage.epochs) * steps * speed.steps.get(stage.name, known[-1])
                   for stage in recipe.stages)
    images = held_out or recipe.evaluate.images or 0
    each = min(images, recipe.evaluate.images or images)
    measuring = (recipe.epochs // recipe.evaluate.epochs * each + images) * speed.image
    found.ok(f"the whole recipe, {recipe.epochs} epochs of {steps} steps: roughly {_time(training + measuring)} here, "
             f"{_time(measuring)} of it to evaluate; a guess by one step of each stage: a machine gets faster as it warms up, "
             "losses join later, stages end early")


def _time(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
