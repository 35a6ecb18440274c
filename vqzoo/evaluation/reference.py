"""Statistics of reference sets: cached, so that a set is sent through a network once, or published by others."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vqzoo.errors import UserError
from vqzoo.evaluation.distances import Moments
from vqzoo.evaluation.protocols import Protocol
from vqzoo.ops import broadcast

PARTS = ("count", "sum", "products")
LARGEST = 2**26  # bytes; sigma has half of that


def folder() -> Path:
    """Return the folder of cached statistics: VQZOO_CACHE/statistics, by default ~/.cache/vqzoo/statistics."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("VQZOO_CACHE") or Path(home, "vqzoo"), "statistics").expanduser()


def place(stamp: str, protocol: Protocol, network: nn.Module) -> Path:
    """Return the file for the statistics of the set that `stamp` identifies, by all that they depend on."""
    said = [stamp, protocol.crop, protocol.rounding, protocol.inception, network.card]
    return folder() / f"{hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]}.safetensors"


def load(file: Path, width: int, device: torch.device) -> Moments | None:
    """Return cached statistics, if the first process has them: every process calls this and gets them, or none does."""
    found = None
    try:
        tensors = load_file(file) if file.is_file() else {}
        fitting = [list(tensors[part].shape) for part in PARTS] == [[1], [width], [width, width]] if tensors else False
        found = Moments(*(tensors[part].to(device) for part in PARTS)) if fitting else None
    except Exception:  # a damaged file is no statistics; they are computed again and it is replaced
        found = None
    if not broadcast(torch.tensor(float(found is not None), device=device)):
        return None
    blank = found or Moments.empty(width, device)
    return Moments(*(broadcast(getattr(blank, part)) for part in PARTS))


def save(file: Path, moments: Moments) -> None:
    """Keep statistics; a cache that cannot be written is none."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        save_file({part: getattr(moments, part).cpu().contiguous() for part in PARTS}, partial)
        partial.replace(file)
    except OSError:
        pass


def published(path: str) -> Moments:
    """Read the `mu` and `sigma` of an .npz file, as reference sets of generative models are published."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if any(file.zip.getinfo(f"{name}.npy").file_size > LARGEST for name in ("mu", "sigma")):
                raise ValueError("mu and sigma are far larger than Inception's (decompression bomb)")
            mean, covariance = (torch.from_numpy(np.asarray(file[name], dtype=np.float64)) for name in ("mu", "sigma"))
    except Exception as error:  # whatever NumPy makes of a file that is something else
        raise UserError(f"--data: {path} is no .npz file with mu and sigma: {error}") from error
    if mean.shape != (2048,) or covariance.shape != (2048, 2048):
        raise UserError(f"--data: {path}: mu {list(mean.shape)} and sigma {list(covariance.shape)} are not [2048] and "
                        "[2048, 2048], the moments of Inception's features")
    return Moments.known(mean, covariance)
