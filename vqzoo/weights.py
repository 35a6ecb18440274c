"""Weights that others published: where each file comes from, and how it is found, fetched and read."""

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor, nn

from vqzoo.errors import UserError

TIMEOUT = 20.0
"""Seconds without an answer after which a download is given up."""


@dataclass(frozen=True)
class Source:
    """Say where a file comes from, its size in MiB, and the first digits of its SHA-256."""

    url: str
    mib: int
    sha256: str

    @property
    def file(self) -> Path:
        """The place of the file in torch hub's cache."""
        return Path(torch.hub.get_dir(), "checkpoints", self.url.rpartition("/")[2]).absolute()


SOURCES = {
    "vgg16": Source("https://download.pytorch.org/models/vgg16-397923af.pth", 528, "397923af"),
    "alexnet": Source("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", 233, "7be5be79"),
    "squeezenet1_1": Source("https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth", 5, "b8a52dc0"),
}
"""The files that built-in plugins ask for, by the name of torchvision's network."""


def load_published(module: nn.Module, name: str, path: str | None, key: str, prefix: str = "") -> None:
    """Fill a module with the tensors called prefix + its own names, as float32; the others of the file are left.

    `name` is one of SOURCES. The file is the one at `path` if given, else the one in torch hub's cache, else it is downloaded
    there. Raises a UserError that begins with `key`, under which a recipe sets the path, and says what is missing and
    where it may go.
    """
    file = fetch(SOURCES[name], key) if path is None else Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{key}: no file {path!r}; give the path of torchvision's {name} weights, or null to have them "
                        f"from {SOURCES[name].url}")
    found = read_weights(file, key)
    wanted = module.state_dict()
    wrong = [prefix + n for n, value in wanted.items() if prefix + n not in found or found[prefix + n].shape != value.shape]
    if wrong:
        raise UserError(f"{key}: {file} does not hold the weights of torchvision's {name}: {len(wrong)} of {len(wanted)} "
                        f"tensors are missing or of another shape, {wrong[0]} for one")
    module.load_state_dict({n: found[prefix + n].float() for n in wanted}, assign=True)


def fetch(source: Source, key: str) -> Path:
    """Return a published file's place in torch hub's cache; if it is not there, it is downloaded, by one process for all."""
    file = source.file
    if file.is_file():
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"), _timeout():
            if not file.is_file():
                print(f"downloading {source.url} ({source.mib} MiB) to {file}", file=sys.stderr, flush=True)
                torch.hub.download_url_to_file(source.url, str(file), source.sha256, progress=sys.stderr.isatty())
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: a file of another SHA-256
        raise UserError(
            f"{key}: {file.name} ({source.mib} MiB, SHA-256 {source.sha256}…) is not at hand and could not be downloaded: "
            f"{error}; get it from {source.url} and put it at {file}, or anywhere and set {key}=PATH"
        ) from error
    return file


@contextmanager
def _timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def read_weights(file: Path, key: str) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, or of a state dict saved by torch; nothing in it is executed."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is something else makes the readers raise
        text = str(error).partition("\n")[0]
        raise UserError(f"{key}: {file} cannot be read as a .safetensors file or a state dict: {text}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{key}: {file} holds no state dict, which maps names to tensors")
    return found
