"""Writing files: whole or not at all, and on the disk when it is said."""

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(f".partial_{path.name}")
    partial.write_text(text)
    flush(partial)
    partial.rename(path)
    flush(path.parent)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a file of tensors; an OSError, as for any file, if that is impossible."""
    try:
        save_file(tensors, path, metadata)
    except OSError:
        raise
    except Exception as error:  # safetensors has errors of its own, for a full disk too
        raise OSError(f"{path}: {error}") from error
    flush(path)


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, survive the machine's end."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
