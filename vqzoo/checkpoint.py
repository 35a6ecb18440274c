"""Checkpoints: tensors in safetensors and the rest in one JSON manifest; complete, checksummed, or not there at all.

A checkpoint is a folder whose manifest says what it is: its step, stage, recipe and versions, and the size and SHA-256 of
each file, its own included. Names and clocks decide nothing. Reading one runs no code.
"""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from vqzoo.errors import UserError
from vqzoo.files import flush, write_tensors, write_text

MANIFEST = "manifest.json"
FORMAT = 1

Tensors = dict[str, dict[str, Tensor]]
"""The tensors of a checkpoint by file, without its ending, and name."""


def save(folder: Path, tensors: Tensors, manifest: dict[str, Any], keep: int, best: int | None = None) -> Path:
    """Write a checkpoint of step `manifest["step"]`; then drop all but the last `keep` and that of step `best`.

    It is written under a hidden name, flushed to disk and renamed; what is dropped is dropped afterwards. An OSError leaves
    everything as it was.
    """
    target = folder / f"step_{manifest['step']:09d}"
    partial = folder / f".partial_{target.name}"
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    try:
        partial.mkdir()
        files = {}
        for name, content in tensors.items():
            path = partial / f"{name}.safetensors"
            write_tensors(path, content)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        whole = {"format": FORMAT, **manifest, "files": files}
        write_text(partial / MANIFEST, json.dumps({**whole, "sha256": _signature(whole)}, indent=2) + "\n")
        _rename(partial, target)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _drop(folder, keep, best, manifest["step"])
    return target


def _rename(partial: Path, target: Path) -> None:
    """Put a complete checkpoint in its place; one of the same step makes way without ever being half there."""
    if target.exists():
        old = target.with_name(f".old_{target.name}")
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(target)
    flush(target.parent)


def _clear(folder: Path) -> None:
    """Clear away what was never finished, and what made way for another."""
    for name in (".partial_step_*", ".old_step_*"):
        for path in folder.glob(name):
            shutil.rmtree(path, ignore_errors=True)


def _drop(folder: Path, keep: int, best: int | None, last: int) -> None:
    """Drop all but the last checkpoints up to that of step `last`; what has other names or is of later steps is left alone."""
    own = [(step, path) for step, path in complete(folder) if path.name == f"step_{step:09d}" and step <= last]
    for _, path in (found for found in own[keep:] if found[0] != best):
        gone = path.with_name(f".old_{path.name}")  # what is cut off from here on is no damaged checkpoint, and cleared later
        with suppress(OSError):
            path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def copy(path: Path, folder: Path) -> None:
    """Copy a checkpoint into another folder, whole or not at all."""
    target = folder / f"step_{read(path)['step']:09d}"
    partial = folder / f".partial_{target.name}"
    _clear(folder)
    shutil.copytree(path, partial)
    for file in (*partial.iterdir(), partial):
        flush(file)
    _rename(partial, target)


def complete(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield step and path of each checkpoint in a folder, the most steps first; what has no valid manifest is none."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            step = read(path)["step"]
        except UserError:
            continue
        found.append((step, path.name == f"step_{step:09d}", path))
    yield from ((step, path) for step, _, path in sorted(found, reverse=True))


def unfinished(folder: Path) -> list[Path]:
    """Return what is left of checkpoints whose writing was cut off; the next one that is written clears it away."""
    return sorted(folder.glob(".partial_step_*")) if folder.is_dir() else []


def damaged(folder: Path) -> dict[Path, str]:
    """Return what is wrong with each folder that was a checkpoint; strangers' files are none."""
    problems = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and not path.name.startswith(".") and (path.match("step_*") or (path / MANIFEST).exists()):
            try:
                read(path)
            except UserError as error:
                problems[path] = str(error)
    return problems


def read(path: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest; a UserError says what is wrong with it."""
    file = path / MANIFEST
    if path.name.startswith(".") or not file.is_file():
        raise UserError(f"{path}: not a checkpoint: there is no {MANIFEST}")
    try:
        manifest = json.loads(file.read_text())
        signature = manifest.pop("sha256")
        if manifest["format"] != FORMAT:
            raise UserError(f"{file}: of format {manifest['format']!r}, and this version of vqzoo reads {FORMAT}")
        if _signature(manifest) != signature:
            raise ValueError("its checksum is another")
        _check(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: damaged: {error!r}") from error
    return manifest


def _check(manifest: dict[str, Any]) -> None:
    """Refuse a manifest, a stranger's perhaps, that names files elsewhere."""
    kinds = {"step": int, "recipe": dict, "state": dict, "versions": dict, "files": dict}
    if not all(isinstance(manifest[key], kind) for key, kind in kinds.items()):
        raise ValueError("step, recipe, state or versions are not there")
    for name, about in manifest["files"].items():
        if Path(name).name != name or not name.endswith(".safetensors") or not isinstance(about["bytes"], int):
            raise ValueError(f"{name!r} is not the name of a file of tensors")


def verify(path: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest after reading all of its files; a UserError names the first that is damaged."""
    manifest = read(path)
    for name, about in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{file}: missing")
        if file.stat().st_size != about["bytes"]:
            raise UserError(f"{file}: damaged: {file.stat().st_size} bytes where {about['bytes']} were written")
        if _sha256(file) != about["sha256"]:
            raise UserError(f"{file}: damaged: its checksum is another")
    return manifest


def load(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors and the manifest of a checkpoint that `verify` has found whole."""
    manifest = read(path)
    try:
        return {Path(name).stem: load_file(path / name) for name in manifest["files"]}, manifest
    except Exception as error:  # safetensors and the file system raise what they like
        raise UserError(f"{path}: cannot be read: {error}") from error


class Writer:
    """Write checkpoints beside the training, which waits for the copy to the host's memory and no longer.

    A checkpoint that cannot be written is an `error` for the caller to take; those before it are untouched.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None

    def save(self, tensors: Tensors, manifest: dict[str, Any], keep: int, best: int | None) -> None:
        """Copy the tensors and start to write them, once the checkpoint before is written."""
        self.wait()
        copies = {name: {key: value.detach().to("cpu", copy=True).contiguous() for key, value in content.items()}
                  for name, content in tensors.items()}
        arguments = (copies, json.loads(json.dumps(manifest)), keep, best)  # a copy of the manifest, too
        self._thread = threading.Thread(target=self._save, args=arguments, name="checkpoint")
        self._thread.start()

    def _save(self, *arguments: Any) -> None:
        try:
            save(self.folder, *arguments)
        except Exception as error:
            self.error = error

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_error(self) -> Exception | None:
        """Return why the last checkpoint could not be written, once."""
        error, self.error = self.error, None
        return error


def _signature(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
