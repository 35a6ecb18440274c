"""Weights that others published: where each file comes from, and how it is found, fetched and read."""

import hashlib
import os
import socket
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor, nn

from vqzoo.errors import MissingWeights, UserError, suggestion

TIMEOUT = 20.0
"""Seconds without an answer after which a download is given up."""


OFFLINE, FOLDER = "VQZOO_OFFLINE", "VQZOO_WEIGHTS"
"""Environment variables: the first, set to anything but 0, forbids downloads; the second names the folder of weights."""


@dataclass(frozen=True)
class Source:
    """Say where a file comes from, its size in bytes, its SHA-256 and what needs it."""

    url: str
    bytes: int
    sha256: str
    use: str = ""

    @property
    def file(self) -> Path:
        """The place of the file: in the folder that VQZOO_WEIGHTS names, else in torch hub's cache."""
        return folder() / self.url.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.file.name} ({self.bytes:,} bytes, SHA-256 {self.sha256})"


def folder() -> Path:
    """Return the folder of published weights."""
    return Path(os.environ.get(FOLDER) or Path(torch.hub.get_dir(), "checkpoints")).expanduser().absolute()


SOURCES = {
    "inception": Source(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        95_628_359, "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", "rfid, kid, precision, recall, gfid",
    ),
    "alexnet": Source(
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        244_408_911, "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02", "lpips_alex",
    ),
    "vgg16": Source(
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        553_433_881, "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0", "lpips_vgg, the plugin lpips",
    ),
    "squeezenet1_1": Source(
        "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
        4_958_839, "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b", "lpips_squeeze",
    ),
}
"""The files that metrics and built-in plugins ask for; torchvision's go by the name of its network."""


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
    """Return a published file's place; if it is not there and downloads are allowed, one process downloads it for all."""
    file = source.file
    if file.is_file():
        return file
    name = next((name for name, known in SOURCES.items() if known == source), "")
    way_out = (f"get it from {source.url} and put it into {file.parent}, or run `vqzoo weights fetch {name}` where there is "
               "a network")
    if os.environ.get(OFFLINE, "0") != "0":
        raise MissingWeights(f"{key}: {source} is not at hand, and this is offline; {way_out}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"), _timeout():
            if not file.is_file():
                print(f"downloading {source.url} ({source.bytes / 2**20:.0f} MiB) to {file}", file=sys.stderr, flush=True)
                torch.hub.download_url_to_file(source.url, str(file), source.sha256, progress=sys.stderr.isatty())
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: a file of another SHA-256
        raise MissingWeights(f"{key}: {source} is not at hand and could not be downloaded: {error}; {way_out}") from error
    return file


def fault(source: Source) -> str:
    """Return what is wrong with a file that is there: its size or its SHA-256; nothing if it is the published one."""
    size = source.file.stat().st_size
    if size != source.bytes:
        return f"{source.file}: {size:,} bytes where {source.bytes:,} were published"
    found = sha256(source.file)
    return "" if found == source.sha256 else f"{source.file}: SHA-256 {found} where {source.sha256} was published"


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def fetch_verified(source: Source, key: str) -> Path:
    """Return a published file's place, as `fetch` does; a UserError if it is not the file that was published."""
    file = fetch(source, key)
    if problem := fault(source):
        raise UserError(f"{key}: {problem}; delete the file and fetch it again")
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
    refuse_bomb(file, key)
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


def refuse_bomb(file: Path, key: str) -> None:
    """Raise UserError for an archive that unpacks to more than its own size, as none does that torch or NumPy saved."""
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(part.file_size for part in archive.infolist())
    except Exception as error:  # whatever is wrong with it
        raise UserError(f"{key}: {file} cannot be read as an archive: {error}") from error
    if size > file.stat().st_size:
        raise UserError(f"{key}: {file} has {file.stat().st_size:,} bytes and would unpack to {size:,}, which may be a "
                        "decompression bomb; if you trust it, save its tensors again without compression")


def manage(action: str, names: list[str], place: str | None = None) -> None:
    """List, fetch or verify the files of SOURCES, all or those named, in a folder or the default one; say what was found.

    A UserError if a file cannot be had, is not the published one, or is named to be verified and not there.
    """
    if place:
        os.environ[FOLDER] = place
    for name in names:
        if name not in SOURCES:
            raise UserError(f"weights: {name!r} is unknown; {suggestion(name, SOURCES)}")
    if action == "fetch" and not names:
        raise UserError(f"weights fetch: name what to fetch: {', '.join(SOURCES)}")
    wrong = []
    for name in names or SOURCES:
        source = SOURCES[name]
        if action == "fetch":
            print(f"{name}: {fetch_verified(source, name)}")
            continue
        here = source.file.is_file()
        torn = here and source.file.stat().st_size != source.bytes
        problem = fault(source) if torn or (here and action == "verify") else ""
        if action == "verify" and (problem or (names and not here)):
            wrong.append(name)
        print(f"{name}: {problem or ('not here' if not here else 'verified' if action == 'verify' else 'here')}\n"
              f"  file    {source.file}\n  size    {source.bytes:,} bytes\n  sha256  {source.sha256}\n"
              f"  url     {source.url}\n  for     {source.use}")
    if wrong:
        raise UserError(f"weights verify: {', '.join(wrong)}: missing or not what was published, as said above; delete what is "
                        "wrong and run `vqzoo weights fetch NAME`")
