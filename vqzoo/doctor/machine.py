"""The machine: packages, GPUs, processor, memory, precisions, compiler, kernels and storage."""

import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from torch.utils import collect_env

from vqzoo.doctor.findings import Findings
from vqzoo.errors import UserError
from vqzoo.memory import gib
from vqzoo.ops import nearest_codes
from vqzoo.ops.backends import triton_reason
from vqzoo.prepare import check_compiler

LITTLE_SHARED = 2**28
"""Bytes of shared memory below which worker processes may fail: a container has a quarter of that by default."""

PACKAGES = ("vqzoo", "torch", "torchvision", "timm", "accelerate", "torchmetrics", "pluggy", "omegaconf", "safetensors")


def examine_machine(found: Findings) -> None:
    """Say what there is to compute with, and whether it works."""
    for examine in (_versions, _devices, _processor, _precisions, _compiler, _triton, _storage):
        with found.examining(examine.__name__.strip("_")):
            examine(found)


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
        driver = collect_env.get_nvidia_driver_version(collect_env.run) or "unknown"
        found.ok(f"CUDA {torch.version.cuda or torch.version.hip} of torch, driver {driver}")
        if torch.cuda.device_count() > 1:
            found.note("`vqzoo run` uses one GPU; `accelerate launch -m vqzoo run RECIPE` uses all")
    elif Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        why = "it is built for CPUs" if not torch.version.cuda else "no reason is given"
        why = str(said[0].message).partition("\n")[0] if said else why
        found.wrong(f"there is an NVIDIA GPU that torch {torch.__version__} cannot use: {why}; install a driver for CUDA "
                    f"{torch.version.cuda or '(any)'} or a build of torch for the driver that is there (pytorch.org)")
    else:
        found.note("no GPU that torch can use; the CPU trains")


def _processor(found: Findings) -> None:
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found.ok(f"CPU: {os.cpu_count()} cores, {mine} of them for this process, {torch.get_num_threads()} threads of torch, "
             f"{gib(_memory_there())} of memory, {gib(memory_free())} of it free")
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


def memory_free() -> int:
    """Return the bytes of memory that are free, of those that this process may use."""
    return min(psutil.virtual_memory().available, _memory_there())


def _precisions(found: Findings) -> None:
    if not torch.cuda.is_available():
        found.ok(f"precision bf16: yes, slow where the CPU lacks it ({torch.backends.cpu.get_cpu_capability()}); fp16: on GPUs")
    elif torch.cuda.is_bf16_supported():
        found.ok("precision bf16: yes; fp16: yes")
    else:
        found.note("precision bf16: no, this GPU lacks it; use fp16; fp16: yes")


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
