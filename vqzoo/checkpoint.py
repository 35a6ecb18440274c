"""Checkpoints: tensors in safetensors and counters in JSON, complete or not there at all."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from vqzoo.errors import UserError

MANIFEST = "state.json"


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint of named tensor files and a JSON state; then drop all but the last `keep`.

    Written under a temporary name, flushed, and renamed: a folder without the prefix "." is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, partial = folder / f"step_{step:09d}", folder / f".partial_{step:09d}"
    for old in folder.glob(".partial_*"):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir()
    hashes = {}
    for name, content in tensors.items():
        path = partial / f"{name}.safetensors"
        save_file({key: value.detach().cpu().contiguous().clone() for key, value in content.items()}, path)
        hashes[path.name] = _sha256(path)
        _flush(path)
    manifest = partial / MANIFEST
    manifest.write_text(json.dumps({**state, "step": step, "sha256": hashes}, indent=2) + "\n")
    _flush(manifest)
    _flush(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _flush(folder)
    for _, old in _complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def latest(folder: Path) -> Path | None:
    """Return the complete checkpoint with the most steps, as its manifest says."""
    found = _complete(folder)
    return found[-1][1] if found else None


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint; a UserError names a file that is missing or damaged."""
    try:
        state = json.loads((path / MANIFEST).read_text())
        hashes = dict(state["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"not a checkpoint's state: {error!r}; remove {path} to use an earlier one"
        raise UserError(f"{path / MANIFEST}: {problem}") from error
    tensors = {}
    for name, expected in hashes.items():
        file = path / name
        if not file.is_file() or _sha256(file) != expected:
            raise UserError(f"{file}: missing or damaged; remove {path} to continue from an earlier checkpoint")
        tensors[file.stem] = load_file(file)
    return tensors, state


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(f".partial_{path.name}")
    partial.write_text(text)
    _flush(partial)
    partial.rename(path)


def _complete(folder: Path) -> list[tuple[int, Path]]:
    found = []
    for path in folder.glob("step_*") if folder.is_dir() else []:
        try:
            found.append((int(json.loads((path / MANIFEST).read_text())["step"]), path))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
