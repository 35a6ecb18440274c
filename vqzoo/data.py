"""Images: where they come from, in which order they are seen, and what becomes of files that do not decode."""

import atexit
import ctypes
import functools
import hashlib
import importlib.resources
import importlib.util
import os
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, count
from multiprocessing import active_children
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from vqzoo.caller import kind_of
from vqzoo.errors import DataError, PluginError, UserError, suggestion
from vqzoo.instance import through_door
from vqzoo.sources import available, offering

EpsImagePlugin.gs_binary = False  # PostScript is a program; no file, whatever its name, may have Ghostscript run one

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
PHOTO_SIDE = 600  # photos whose shorter side exceeds it are halved
TILE = 96  # pixels; larger only where the resolution is
HELD_OUT = 5  # every fifth tile is for evaluation
TIMM = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow-datasets", "wds": "webdataset", "torch": None}
STUCK = 600  # seconds after which workers that give nothing are an error
WATCH = 2  # seconds between two looks at whether the workers live
MOST_NAMED = 3  # files that a note names
SET_PARENT_DEATH_SIGNAL = 1  # prctl's, of Linux


@dataclass
class DataConfig:
    """Say which images to use; `folder`, `photos` (8 photographs in scikit-image, cut into tiles), a plugin's name, or timm's.

    timm's names start with hfds/, torch/ (random access), hfids/, tfds/ or wds/ (streams, see `StreamDataset`).
    """

    name: str = "folder"
    root: str | None = None
    train: str = "train"  # sub-folder or split; "." is the root itself
    val: str = "val"
    resolution: list[int] = field(default_factory=lambda: [128, 128])  # [height, width]
    resize: int | None = None  # shorter side before the training crop; null: what just covers it, own scale for photos
    flip: bool = False
    draft: bool = False  # training JPEGs are decoded at 1/2, 1/4 or 1/8 where that covers the crop: faster, other pixels
    batch_size: int = 32  # per optimizer step, over all processes and micro-batches
    eval_batch_size: int = 32
    workers: int = 2
    bad_files: int = 100  # more files than this that do not decode are an error
    args: dict[str, Any] = field(default_factory=dict)  # the fields of a plugin's data set


@dataclass
class Batch:
    """Hold images [b, 3, H, W] (uint8), their positions [b] (int64), and the names of files that did not decode.

    A training batch is full, and `bad` has the names not reported before. An evaluation batch lacks the images in
    `bad` and may be empty.
    """

    images: Tensor
    positions: Tensor
    bad: list[str]


class Key(NamedTuple):
    """Ask a dataset for one sample: a random crop drawn from (seed, position), or the centre crop without a seed."""

    index: int
    position: int
    seed: int | None = None


# Pixels


def decode(file: Any, cover: tuple[tuple[int, int], int | None] | None = None) -> Image.Image:
    """Decode a path or binary file into RGB, upright; raise whatever Pillow does, or ValueError above its size limit.

    The first frame of an animation; transparency on white; 16-bit grey scaled to 8. With `cover`, a resolution [height,
    width] and a shorter side, libjpeg reduces a JPEG by 2, 4 or 8 as far as it still covers them.
    """
    with Image.open(file) as image:
        limit = Image.MAX_IMAGE_PIXELS
        if limit and image.width * image.height > limit:
            raise ValueError(f"{image.width}x{image.height} pixels exceed the limit of {limit} (decompression bomb)")
        if cover and image.format in ("JPEG", "MPO"):
            _reduce(image, *cover)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def _reduce(image: Image.Image, resolution: tuple[int, int], shorter: int | None) -> None:
    sideways = image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # stored as columns, which are turned after decoding
    height, width = covering(image.size[::-1] if sideways else image.size, resolution, shorter)
    image.draft(None, (height, width) if sideways else (width, height))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of Pillow with a known range to RGB; ValueError for floating point and for more than 16 bits."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        levels = np.asarray(image).astype(np.float64) / 257
        if levels.min() < 0 or levels.max() > 255:
            raise ValueError("integer pixels beyond 16 bits have no known range")
        return Image.fromarray(levels.round().astype(np.uint8)).convert("RGB")
    if image.getbands()[-1] in "Aa" or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def crop_val(image: Image.Image, resolution: tuple[int, int]) -> Image.Image:
    """Resize until the image just covers [height, width] and keep its centre; no resampling where it fits already."""
    height, width = covering(image.size, resolution)
    return _cut(image, (height, width), resolution, (height - resolution[0]) // 2, (width - resolution[1]) // 2)


def center(image: Image.Image, resolution: tuple[int, int]) -> Image.Image:
    """Cut [height, width] out of the middle of an image that covers it."""
    top, left = (image.height - resolution[0]) // 2, (image.width - resolution[1]) // 2
    return image.crop((left, top, left + resolution[1], top + resolution[0]))


def crop_train(
    image: Image.Image, resolution: tuple[int, int], resize: int | None, flip: bool, rng: np.random.Generator
) -> Image.Image:
    """Resize until the image covers [height, width] and its shorter side has `resize` pixels, then crop at random."""
    height, width = covering(image.size, resolution, resize)
    down, right, side = rng.random(3)  # always three, so that `flip` does not move the crops
    top, left = int(down * (height - resolution[0] + 1)), int(right * (width - resolution[1] + 1))
    crop = _cut(image, (height, width), resolution, top, left)
    return ImageOps.mirror(crop) if flip and side < 0.5 else crop


def covering(size: tuple[int, int], resolution: tuple[int, int], shorter: int | None = None) -> tuple[int, int]:
    """Return the [height, width] to which to resize an image of size (width, height), with the aspect kept."""
    width, height = size
    scale = max(resolution[0] / height, resolution[1] / width, (shorter or 0) / min(width, height))
    return max(resolution[0], round(height * scale)), max(resolution[1], round(width * scale))


def _cut(image: Image.Image, size: tuple[int, int], resolution: tuple[int, int], top: int, left: int) -> Image.Image:
    """Resize to `size` [height, width] and crop, computing only the pixels of the crop."""
    down, right = image.height / size[0], image.width / size[1]
    box = (left * right, top * down, (left + resolution[1]) * right, (top + resolution[0]) * down)
    box = (*box[:2], min(box[2], image.width), min(box[3], image.height))  # rounding may overshoot the edge
    return image.resize((resolution[1], resolution[0]), Image.Resampling.BICUBIC, box=box)


def from_image(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 levels [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_images(images: Tensor, device: torch.device | str) -> Tensor:
    """Map uint8 levels [b, 3, H, W] to [-1, 1] on the device; (images + 1) * 127.5, rounded, gives the levels back."""
    return images.to(device, non_blocking=True).float().div_(127.5).sub_(1)


def to_bytes(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as the 8-bit levels [0, 255] that a file would hold, in float32; clamped and rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round()


def load_image(path: str | Path, resolution: tuple[int, int]) -> Tensor:
    """Read one file as evaluation does: uint8 [3, H, W]; UserError when it does not decode."""
    try:
        return from_image(crop_val(decode(path), tuple(resolution)))
    except Exception as error:
        raise UserError(f"{path}: not an image that can be read ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# Sources: each has a length, name(index), image(index, cover) -> RGB, signature(), the lines that identify its content, and
# stamp(), what says that it is the same on this machine, or None; cover is that of `decode`, and a source that decodes nothing
# itself passes by it


class Folder:
    """Read the image files below a folder, at any depth, sorted by relative path."""

    def __init__(self, root: Path, key: str):
        self.root = root
        listed = list(_walk(root))
        self.names = sorted(chain.from_iterable(images for _, images, _ in listed))
        notes = list(_oddities(listed))
        if not self.names:
            looked = f"looked for {', '.join(sorted(EXTENSIONS))} at any depth"
            raise UserError("; ".join([f"{key}: no images below {root}", looked, *notes]))
        self.notes = [f"{key}: {root} has {note}" for note in notes]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index].encode("utf-8", "backslashreplace").decode()  # a file name need not be valid text

    def image(self, index: int, cover: Any = None) -> Image.Image:
        return decode(self.root / self.names[index], cover)

    def signature(self) -> list[str]:
        return [f"{name} {(self.root / name).stat().st_size}" for name in self.names]

    def stamp(self) -> list[str]:
        found = ((name, (self.root / name).stat()) for name in self.names)
        return [f"{name} {about.st_size} {about.st_mtime_ns}" for name, about in found]


def list_images(root: Path) -> list[str]:
    """Return sorted relative paths; hidden and dangling entries are left out, linked folders are followed once."""
    return sorted(chain.from_iterable(images for _, images, _ in _walk(root)))


def _walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield each folder from the root on, "", with its images and its links that lead nowhere, as relative paths."""
    seen, pending = set(), [""]
    while pending:
        folder = pending.pop()
        if (real := os.path.realpath(root / folder)) in seen:
            continue
        seen.add(real)
        images, dangling = [], []
        for entry in _entries(root / folder):
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not os.path.exists(entry.path):
                dangling.append(path)
            elif entry.is_dir():
                pending.append(path)
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS and entry.is_file():
                images.append(path)
        yield folder, images, dangling


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be read ({error.strerror})") from error


def _oddities(listed: list[tuple[str, list[str], list[str]]]) -> Iterator[str]:
    """Say of what `_walk` found what its owner may not have meant."""
    filled = {""}
    for folder, images, _ in listed:
        while images and folder not in filled:
            filled.add(folder)
            folder = _above(folder)
    odd = {
        "links that lead nowhere, which are left out": [link for *_, dangling in listed for link in dangling],
        "folders without an image": [f for f, *_ in listed if f not in filled and _above(f) in filled],
        "names that differ in ending or case alone": [path for _, images, _ in listed for path in _alike(images)],
    }
    for kind, paths in odd.items():
        if paths:
            yield f"{kind} ({len(paths)}): {', '.join(sorted(paths)[:MOST_NAMED])}{', ...' * (len(paths) > MOST_NAMED)}"


def _above(folder: str) -> str:
    return folder.rpartition("/")[0]


def _alike(paths: list[str]) -> list[str]:
    """Return the paths of one folder that would be another's with its ending or case."""
    stems = [os.path.splitext(path)[0].casefold() for path in paths]
    times = Counter(stems) if len(set(stems)) < len(stems) else {}
    return [path for path, stem in zip(paths, stems, strict=True) if times.get(stem, 1) > 1]


class Photos:
    """Cut the photographs inside scikit-image into tiles that share no pixel; every fifth is held out."""

    def __init__(self, held_out: bool, resolution: tuple[int, int], centred: bool):
        self.tiles = []  # (photo, name, left, top, right, bottom)
        tiles = chain.from_iterable(_tiles(photo, resolution) for photo in PHOTOS)
        for number, (photo, name, box) in enumerate(tiles):
            if (number % HELD_OUT == HELD_OUT - 1) == held_out:
                self.tiles.append((photo, name, _centre(box, resolution) if centred else box))

    def __len__(self) -> int:
        return len(self.tiles)

    def name(self, index: int) -> str:
        return self.tiles[index][1]

    def image(self, index: int, cover: Any = None) -> Image.Image:
        photo, _, box = self.tiles[index]
        return _photo(photo).crop(box)

    def signature(self) -> list[str]:
        return [f"{name} {box}" for _, name, box in self.tiles]

    def stamp(self) -> list[str]:
        return self.signature()


@functools.cache
def _photo(name: str) -> Image.Image:
    """Return one photograph, decoded once per process."""
    path = importlib.resources.files("skimage") / "data" / name
    if not path.is_file():
        raise UserError(f"data.name=photos: the installed scikit-image has no {path}; install scikit-image>=0.22")
    image = decode(path)
    return image.reduce(2) if min(image.size) > PHOTO_SIDE else image


def _tiles(photo: str, resolution: tuple[int, int]) -> Iterator[tuple[str, str, tuple[int, int, int, int]]]:
    """Yield (photo, name, box) of each tile; a photo smaller than the resolution is one tile."""
    width, height = _photo(photo).size
    down, right = min(height, max(TILE, resolution[0])), min(width, max(TILE, resolution[1]))
    for row in range(height // down):
        for column in range(width // right):
            box = (column * right, row * down, (column + 1) * right, (row + 1) * down)
            yield photo, f"{Path(photo).stem}[{row},{column}]", box


def _centre(box: tuple[int, int, int, int], resolution: tuple[int, int]) -> tuple[int, int, int, int]:
    """Shrink a box to [height, width] around its centre; a box that is too small stays."""
    left, top, right, bottom = box
    down, over = (bottom - top - resolution[0]) // 2, (right - left - resolution[1]) // 2
    if down < 0 or over < 0:
        return box
    return left + over, top + down, left + over + resolution[1], top + down + resolution[0]


class TimmImages:
    """Read a random-access dataset made by timm; its own retry, which hides decode errors, is passed by."""

    def __init__(self, dataset: Any, name: str):
        self.dataset, self.prefix = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"{self.prefix}[{index}]"

    def image(self, index: int, cover: Any = None) -> Image.Image:
        if not hasattr(self.dataset, "reader"):  # a torchvision dataset
            return to_rgb(self.dataset[index][0])
        with self.dataset.reader[index][0] as file:
            return decode(file, cover)

    def signature(self) -> list[str]:
        return [f"{self.prefix} {len(self)}"]

    def stamp(self) -> None:
        return None


class Offered:
    """Read the images of a plugin's data set: a sequence of Pillow images or of paths."""

    def __init__(self, images: Any, name: str):
        self.images, self.prefix = images, name
        self.named = getattr(images, "name", None)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return str(self.named(index)) if callable(self.named) else f"{self.prefix}[{index}]"

    def image(self, index: int, cover: Any = None) -> Image.Image:
        item = self.images[index]
        return to_rgb(ImageOps.exif_transpose(item)) if isinstance(item, Image.Image) else decode(item, cover)

    def signature(self) -> list[str]:
        return [f"{self.prefix} {len(self)}", *(map(self.name, range(len(self))) if callable(self.named) else ())]

    def stamp(self) -> None:
        return None


# Datasets


class ImageDataset(Dataset):
    """Crop the images of a source; `bad` collects the names of files that did not decode, with the reason.

    Indexed by `Key`: (image or None, position, failures). A training sample that does not decode is replaced by another
    one drawn from (seed, position); an evaluation sample never is, and is cropped by `crop`. `notes` are about the images as
    a whole: what their owner may not have meant, though they can be used.
    """

    def __init__(self, source: Any, config: DataConfig, resize: int | None = None):
        self.source = source
        self.resolution = tuple(config.resolution)
        self.resize, self.flip, self.cap = resize, config.flip, config.bad_files
        self.cover = (self.resolution, resize) if config.draft else None
        self.crop = crop_val
        self.bad: dict[str, str] = {}
        self.notes: list[str] = getattr(source, "notes", [])

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def __getitem__(self, key: Key) -> tuple[Tensor | None, int, dict[str, str]]:
        failures = {}
        for index in self._candidates(key):
            try:
                image = self.source.image(index, None if key.seed is None else self.cover)
                return from_image(self._crop(image, key)), key.position, failures
            except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
                failures[self.name(index)] = _reason(error)
                if len(failures) > self.cap:
                    break
        return None, key.position, failures

    def _candidates(self, key: Key) -> Iterator[int]:
        yield key.index
        if key.seed is not None:
            others = np.random.default_rng((key.seed, 2, key.position)).permutation(len(self))
            yield from (int(index) for index in others if index != key.index)

    def _crop(self, image: Image.Image, key: Key) -> Image.Image:
        if key.seed is None:
            return self.crop(image, self.resolution)
        rng = np.random.default_rng((key.seed, 1, key.position))
        return crop_train(image, self.resolution, self.resize, self.flip, rng)

    def collate(self, samples: list[tuple[Tensor | None, int, dict[str, str]]]) -> tuple[Tensor, Tensor, dict]:
        """Stack the samples that decoded and merge the failures."""
        kept = [(image, position) for image, position, _ in samples if image is not None]
        images = torch.stack([image for image, _ in kept]) if kept else torch.empty(0, 3, *self.resolution).byte()
        failures = {name: reason for sample in samples for name, reason in sample[2].items()}
        return images, torch.tensor([position for _, position in kept], dtype=torch.int64), failures

    def remember(self, failures: dict[str, str]) -> list[str]:
        """Add failures to `bad` and return the new names; UserError above the cap or when nothing decodes."""
        new = [name for name in failures if name not in self.bad]
        self.bad.update(failures)
        if len(self.bad) > self.cap or len(self.bad) >= len(self):
            some = "; ".join(f"{name} ({reason})" for name, reason in list(self.bad.items())[:5])
            raise UserError(
                f"data.bad_files: {len(self.bad)} of {len(self)} files do not decode, but at most {self.cap}, and "
                f"never all, may: {some}; mend or remove them"
            )
        return new

    def recall(self, names: Iterable[str]) -> None:
        """Add names to `bad` that a run has left out before, or another of its processes; the limit counts them too."""
        known = set(names) - set(self.bad)
        present = [name for name in map(self.name, range(len(self))) if name in known] if known else []
        self.remember(dict.fromkeys(present, "did not decode before"))


@dataclass(eq=False)
class StreamDataset(IterableDataset):
    """Crop the images of a timm stream, in the order, shards and handling of bad files of its reader.

    Nothing that `train_batches` says of positions holds: they only count, `start` does not skip, and crops depend on
    the workers. A seed makes it endless, with random crops, unless a pass over it gives nothing.
    """

    stream: Any
    name: str
    config: DataConfig
    seed: int | None = None
    crop: Any = crop_val
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Tensor]:
        resolution, number = tuple(self.config.resolution), -1
        worker = torch.utils.data.get_worker_info()
        for epoch in count():
            self.stream.set_epoch(epoch)
            before = number
            for number, (image, *_) in enumerate(self.stream, start=before + 1):
                if self.seed is None:
                    yield from_image(self.crop(to_rgb(image), resolution))
                    continue
                rng = np.random.default_rng((self.seed, 1, number, worker.id if worker else 0))
                yield from_image(crop_train(to_rgb(image), resolution, self.config.resize, self.config.flip, rng))
            if self.seed is None or number == before:
                return


def fingerprint(dataset: ImageDataset | StreamDataset) -> str:
    """Return a short hash of the names and file sizes; of name, split and length for timm's datasets."""
    return _sha256([dataset.name] if isinstance(dataset, StreamDataset) else sorted(dataset.source.signature()))[:12]


def stamp(dataset: ImageDataset | StreamDataset, limit: int | None = None) -> str | None:
    """Return what identifies the images that evaluation takes from a dataset on this machine; None where nothing does."""
    lines = None if isinstance(dataset, StreamDataset) else dataset.source.stamp()
    if lines is None:
        return None
    return _sha256([*lines, str(dataset.resolution), str(limit), PIL.__version__])


def content(dataset: ImageDataset | StreamDataset) -> dict[str, Any]:
    """Return how many images there are and a hash of their names in order, from memory; both None for a stream.

    A run whose images differ in this does not see the sequence of samples with which it began.
    """
    if isinstance(dataset, StreamDataset):
        return {"images": None, "names": None}
    return {"images": len(dataset), "names": _sha256(map(dataset.name, range(len(dataset))))[:16]}


def _sha256(lines: Iterable[str]) -> str:
    text = "\n".join(lines).encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).hexdigest()


# Choosing a dataset


def make_dataset(config: DataConfig, split: str) -> ImageDataset | StreamDataset:
    """Open the images for the role "train" or "val"; a missing or shared split is a UserError, never a guess."""
    _check(config)
    if split not in ("train", "val"):
        raise ValueError(f"split names a role, train or val, not {split!r}")
    if config.train == config.val:
        raise UserError(f"data.train and data.val are both {config.val!r}: training on the evaluation images")
    known = config.name in ("folder", "photos") or "/" in config.name
    if config.args and known:
        raise UserError(f"data.args: {config.name} takes none; they are the fields of a plugin's data set")
    if config.name == "folder":
        return ImageDataset(Folder(_folder(config, split), f"data.{split}"), config, config.resize)
    if config.name == "photos":
        _refuse_draft(config)
        return _photos(config, split)
    if config.name.partition("/")[0].lower() in TIMM and "/" in config.name:
        return _timm(config, split)
    if config.name in available() and not known:
        return _offered(config, split)
    choices = suggestion(config.name, ["folder", "photos", *offering("make_dataset"), *(f"{prefix}/NAME" for prefix in TIMM)])
    raise UserError(f"data.name: {config.name!r} is unknown; {choices}")


def _check(config: DataConfig) -> None:
    resolution = list(config.resolution)
    if len(resolution) != 2 or min(resolution) < 1:
        raise UserError(f"data.resolution: {resolution} is not [height, width] in positive numbers")
    if config.resize is not None and config.resize < min(resolution):
        raise UserError(f"data.resize: {config.resize} is smaller than data.resolution {resolution}; null fits it")
    for key, least in (("batch_size", 1), ("eval_batch_size", 1), ("workers", 0), ("bad_files", 0)):
        if getattr(config, key) < least:
            raise UserError(f"data.{key}: {getattr(config, key)} is less than {least}")


def _refuse_draft(config: DataConfig) -> None:
    if config.draft:
        raise UserError(f"data.draft: the images of data.name={config.name} are decoded elsewhere, at full size; set "
                        "data.draft=false, or read a folder of JPEGs")


def _folder(config: DataConfig, split: str) -> Path:
    """Return root/<split's folder>; UserError if it is missing or shares images with the other split."""
    if not config.root:
        raise UserError(f"data.root: not set; give the folder of the images, with {config.train}/ and {config.val}/ inside, "
                        "as in data.root=FOLDER")
    root = Path(config.root).expanduser()
    try:
        return _split(config, split, root)
    except OSError as error:
        raise UserError(f"data.root: {root} cannot be read ({error.strerror})") from error


def _split(config: DataConfig, split: str, root: Path) -> Path:
    if not root.is_dir():
        raise UserError(f"data.root: {root} is {'a link that leads nowhere' if root.is_symlink() else 'not a folder'}")
    own, other = (root / getattr(config, role) for role in (("train", "val") if split == "train" else ("val", "train")))
    if not own.is_dir():
        raise UserError(_no_split(root, split, getattr(config, split)))
    real, rival = (Path(os.path.realpath(path)) for path in (own, other))
    if rival.is_dir() and (real == rival or real in rival.parents or rival in real.parents):
        raise UserError(
            f"data.train={config.train} and data.val={config.val} share images in {root}: training on the evaluation "
            "images; name two separate folders"
        )
    return own


def _no_split(root: Path, split: str, name: str) -> str:
    """Say that a split's folder is missing, what is there instead, and what that suggests."""
    inside = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    loose = sum(entry.suffix.lower() in EXTENSIONS for entry in root.iterdir())
    deeper = next((folder for folder in inside if (root / folder / name).is_dir()), None)
    hints = [
        f"{name} is a link that leads nowhere" if (root / name).is_symlink() else "",
        f"{loose} images lie in {root} itself" if loose else "",
        f"{root / deeper} has one: data.root={root / deeper}" if deeper else f"name one with data.{split}=NAME, or make one: "
        "training and evaluation need images of their own",
    ]
    return "; ".join([f"data.{split}: no folder {name!r} in {root}", f"sub-folders: {', '.join(inside) or 'none'}",
                      *filter(None, hints)])


def _photos(config: DataConfig, split: str) -> ImageDataset:
    part = getattr(config, split)
    if part not in ("train", "val"):
        raise UserError(f"data.{split}: photos has no split {part!r}; {suggestion(part, ['train', 'val'])}")
    resolution = tuple(config.resolution)
    # Tiles are used at their own scale by default, in evaluation too, so that both splits look alike.
    resize = config.resize or min(max(TILE, side) for side in resolution)
    source = Photos(part == "val", resolution, centred=split == "val" and config.resize is None)
    return ImageDataset(source, config, resize)


def _offered(config: DataConfig, split: str) -> ImageDataset:
    hooks = through_door("make_dataset", config.name, config.args, "data.args")
    images = hooks.make_dataset(split=split)
    if not hasattr(images, "__len__") or not hasattr(images, "__getitem__"):
        raise PluginError(f"{hooks.served('make_dataset')}, returned {kind_of(images)} where a sequence of images is expected")
    if not len(images):
        raise UserError(f"data.name: the {split} images of {config.name!r} are none")
    return ImageDataset(Offered(images, f"{config.name}/{split}"), config, config.resize)


def _timm(config: DataConfig, role: str) -> ImageDataset | StreamDataset:
    """Open a dataset of timm's, whose factory would fall back to the root or to the test set for an unknown split."""
    prefix, rest = config.name.split("/", 1)
    package, split, root, kind = TIMM[prefix.lower()], getattr(config, role), config.root, rest.lower()
    if package and importlib.util.find_spec(package.replace("-", "_")) is None:
        raise UserError(f"data.name: {config.name!r} needs another package: pip install {package}")
    if prefix.lower() == "wds":
        root = str(_shards(config))
    if prefix.lower() == "tfds" and ":" in rest:
        raise UserError(f"data.name: {config.name!r}: for a namespace, tensorflow-datasets would download and import code; "
                        "name a dataset without one")
    if prefix.lower() == "torch":
        if kind in ("folder", "image_folder"):
            root = str(_folder(config, role))
        else:
            _check_torch_split(config, role, kind)
    from timm.data import create_dataset  # takes seconds, which a worker or another source need not spend

    try:
        dataset = create_dataset(
            config.name,
            root,
            split,
            search_split=False,
            is_training=role == "train",
            download=False,
            batch_size=config.batch_size,
            trust_remote_code=False,
        )
    except Exception as error:  # every reader has its own ways to refuse what the user named
        where = f"{config.name!r}, data.{role}={split}, data.root={config.root}"
        raise UserError(f"data.name: timm cannot open {where}: {_reason(error)}") from error
    name = f"{config.name}/{split}"
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "reader"):
        _refuse_draft(config)
    if isinstance(dataset, IterableDataset):
        return StreamDataset(dataset, name, config)
    if len(dataset) == 0:
        raise UserError(f"data.{role}: {name} has no images")
    return ImageDataset(TimmImages(dataset, name), config, config.resize)


def _shards(config: DataConfig) -> Path:
    """Return the folder of a webdataset's shards; a URL will not do, since webdataset gives `pipe:` to a shell."""
    if not config.root or not Path(config.root).expanduser().is_dir():
        raise UserError(f"data.root: {config.root!r} is no folder; give the one of the shards, on this machine: what a URL "
                        "names, webdataset might run")
    return Path(config.root).expanduser().resolve()  # absolute, so that no shard's name can be a URL either


def _check_torch_split(config: DataConfig, role: str, kind: str) -> None:
    """Refuse split names that timm would take for the test set, and two names for one set."""
    if not config.root:
        raise UserError(f"data.root: not set; give the folder that holds {config.name}")
    if kind in ("inat", "inaturalist", "imagenet"):  # these have splits by name and refuse unknown ones
        return
    sets = {"train": "train", "training": "train"}
    sets |= dict.fromkeys(("val", "valid", "validation", "eval", "evaluation", "test"), "test")
    if (split := getattr(config, role)) not in sets:
        raise UserError(f"data.{role}: {config.name} has no split {split!r}; {suggestion(split, sets)}")
    if sets[split] == sets.get(config.val if role == "train" else config.train):
        raise UserError(
            f"data.train={config.train} and data.val={config.val} are one set of {config.name}: training on the "
            "evaluation images"
        )


# Batches


def train_batches(
    config: DataConfig,
    dataset: ImageDataset | StreamDataset,
    seed: int,
    start: int = 0,
    process: int = 0,
    processes: int = 1,
    accumulate: int = 1,
) -> Iterator[Batch]:
    """Yield this process's micro-batches without end, after `start` samples of the whole run; closing ends the workers.

    A run is one sequence of samples, numbered by position over all processes. Position t belongs to pass t // L, where
    L is the dataset's length without the part that fills no batch; a pass's order depends on (seed, pass), a crop on
    (seed, t), and neither on workers, processes or accumulation. A step's batch is cut into accumulate * processes
    slices: micro-batch a of process r is slice a * processes + r.
    """
    parts = processes * accumulate
    if config.batch_size % parts:
        raise UserError(
            f"data.batch_size: {config.batch_size} is not divisible by {processes} processes x {accumulate} "
            f"accumulated micro-batches = {parts}"
        )
    if start % config.batch_size:
        raise UserError(
            f"data.batch_size: {config.batch_size} does not divide the {start} samples that the run has already seen; "
            "go on with the batch size it began with"
        )
    slices = _slices(config.batch_size, start, process, processes, accumulate)
    if isinstance(dataset, StreamDataset):
        return _stream_batches(config, replace(dataset, seed=seed), slices, config.batch_size // parts)
    keys = _train_keys(slices, len(dataset), config.batch_size, seed)
    samples = read(dataset, config.workers, batch_sampler=keys, collate_fn=dataset.collate)
    return _batches(samples, dataset, True)


def eval_batches(
    config: DataConfig,
    dataset: ImageDataset | StreamDataset,
    process: int = 0,
    processes: int = 1,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Yield each sample once over all processes, ascending by position, which is its index; the tail is included.

    `limit` takes that many samples, evenly spread, since neighbours are often of one class.
    """
    size = config.eval_batch_size
    if isinstance(dataset, StreamDataset):
        return _stream_batches(config, dataset, (range(i * size, (i + 1) * size) for i in count()), size, limit)
    length = len(dataset) if limit is None else min(limit, len(dataset))
    keys = [Key(index, index) for index in (i * len(dataset) // length for i in range(length))]
    shares = [keys[first : first + size] for first in range(0, length, size)][process::processes]
    samples = read(dataset, min(config.workers, len(shares)), batch_sampler=shares, collate_fn=dataset.collate)
    return _batches(samples, dataset, False)


def _slices(batch_size: int, start: int, process: int, processes: int, accumulate: int) -> Iterator[range]:
    """Yield the positions of each micro-batch of this process."""
    size = batch_size // (processes * accumulate)
    for first in count(start, batch_size):
        for micro in range(accumulate):
            begin = first + (micro * processes + process) * size
            yield range(begin, begin + size)


def _train_keys(slices: Iterator[range], length: int, batch_size: int, seed: int) -> Iterator[list[Key]]:
    usable = length // batch_size * batch_size or length

    @functools.lru_cache(maxsize=2)  # a small dataset's batch may span passes
    def order(number: int) -> np.ndarray:
        return np.random.default_rng((seed, 0, number)).permutation(length)

    for positions in slices:
        yield [Key(int(order(position // usable)[position % usable]), position, seed) for position in positions]


def _batches(samples: Iterator[Any], dataset: ImageDataset, training: bool) -> Iterator[Batch]:
    with closing(samples):
        for images, positions, failures in samples:
            new = dataset.remember(failures)
            yield Batch(images, positions, new if training else list(failures))


def _stream_batches(
    config: DataConfig, dataset: StreamDataset, slices: Iterator[range], size: int, limit: int | None = None
) -> Iterator[Batch]:
    workers = config.workers if dataset.seed is not None else 0  # one reader, so that nothing comes twice
    dataset.stream.set_loader_cfg(num_workers=workers)
    with closing(read(dataset, workers, batch_size=size)) as samples:
        for images, positions in zip(samples, slices, strict=False):
            kept = len(images) if limit is None else max(0, min(len(images), limit - positions.start))
            if kept == 0:
                return
            yield Batch(images[:kept], torch.arange(positions.start, positions.start + kept), [])
    if dataset.seed is not None:
        raise UserError(f"data.name: {dataset.name} gives no images")


def read(dataset: Dataset, workers: int, **how: Any) -> Iterator[Any]:
    """Yield what torch's DataLoader gives; DataError when it cannot, as when a worker dies or hangs. Leaves no worker behind.

    A signal to the whole process group does not end workers, so that a run can finish its step and save.
    """
    return _closed_at_exit(_read(dataset, workers, how))


def _read(dataset: Dataset, workers: int, how: dict[str, Any]) -> Iterator[Any]:
    reader, processes, failed, began = None, [], False, time.monotonic()
    try:
        while True:
            try:
                if reader is None:
                    reader, processes = _start(dataset, workers, how)
                item = next(reader)
            except StopIteration:
                return
            except Exception as error:  # of torch, of the system, or of a stream's reader
                silent = str(error).startswith("DataLoader timed out")
                if silent and time.monotonic() - began < STUCK:
                    continue
                if "CUDA error" in str(error):  # of the thread that pins memory: the device is lost, and not an image
                    raise
                failed = True
                raise DataError(f"images can no longer be read: {_what_failed(error, silent, processes)}") from error
            yield item
            began = time.monotonic()
    finally:
        if not failed:
            del reader  # asks the workers to end; one that hangs does not hear that, nor SIGTERM
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join(WATCH)


def _start(dataset: Dataset, workers: int, how: dict[str, Any]) -> tuple[Iterator[Any], list[Any]]:
    """Return a loader's iterator and its worker processes."""
    loader = DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        timeout=WATCH if workers else 0,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # else each loader would advance the global generator
        **how,
    )
    others = active_children()
    with _deaths_seen_by_looking():
        reader = iter(loader)
    return reader, [child for child in active_children() if child not in others]


def _what_failed(error: Exception, silent: bool, processes: list[Any]) -> str:
    if silent:
        return f"no worker gave any for {STUCK} seconds; does the disk or the network that holds them answer?"
    for process in processes:
        process.join(WATCH / 10)  # one that died while it handed something over is known by that before it is gone
    status = next((process.exitcode for process in processes if process.exitcode), None)
    if status is None:
        return _reason(error).strip().splitlines()[-1]  # torch puts a worker's whole traceback into the text, the error last
    how = f"was ended by signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"ended with status {status}"
    return (f"a worker process {how}; if memory or shared memory (/dev/shm) ran short, lower data.workers, now "
            f"{len(processes)}")


@contextmanager
def _deaths_seen_by_looking() -> Iterator[None]:
    """Keep torch from having SIGCHLD raise at whatever line the program is, as in a half-done update, when a worker dies."""
    number = getattr(signal, "SIGCHLD", None)
    before = signal.getsignal(number) if number else None
    try:
        yield
    finally:
        if number and threading.current_thread() is threading.main_thread():
            signal.signal(number, before or signal.SIG_DFL)


def _closed_at_exit(samples: Iterator[Any]) -> Iterator[Any]:
    """Close what was forgotten before Python terminates workers, which ignore that, and waits for them."""

    def close() -> None:
        if (left := reference()) is not None:
            left.close()

    reference = weakref.ref(samples, lambda _: atexit.unregister(close))
    atexit.register(close)
    return samples


def _begin_worker(worker: int) -> None:
    """Let a worker outlive a signal to the whole group, which its run answers by saving, but never its run.

    torch's workers look every few seconds whether their parent lives, but not while they wait for the rest of what it had
    begun to send when it was killed: so Linux is asked to end them with it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
