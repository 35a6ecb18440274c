"""The images: what can be seen of both splits within a minute or two, and how fast they can be read."""

import hashlib
import math
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from PIL import Image
from tqdm import tqdm

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
from vqzoo.doctor.copies import tell_copies
from vqzoo.doctor.findings import Findings, some
from vqzoo.errors import UserError
from vqzoo.recipe import Recipe

MOST_DECODED = 2000
"""Images of a split that are decoded; of more, that many at even distances."""

SCAN_SECONDS, READ_SECONDS = 60.0, 5.0
"""Seconds for decoding a split, and for reading batches."""


@dataclass
class Looked:
    """What was seen of a split's images: sizes (width, height), formats and modes of files, and what does not decode."""

    count: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    kinds: Counter = field(default_factory=Counter)
    broken: dict[str, str] = field(default_factory=dict)
    pixels: dict[str, str] = field(default_factory=dict)
    """A hash of the pixels by name, of images that are no files in a folder."""


def examine_images(found: Findings, recipe: Recipe, datasets: dict[str, Any]) -> float | None:
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
        tell_copies(found, datasets, pixels)
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
    looked = "all decoded" if count == length else f"of which {count:,} at even distances were decoded"
    if seen.count < count:
        looked = f"of which the first {seen.count:,} of {count:,} at even distances were decoded in {SCAN_SECONDS:.0f} s"
    kinds = ", ".join(f"{files:,} {kind}" for kind, files in seen.kinds.most_common())
    found.ok(f"{split}: {length:,} images, {looked}" + (f"; {kinds}" if kinds else ""))
    for note in dataset.notes:
        found.note(note)
    if seen.broken:
        named = [f"{name} ({reason})" for name, reason in seen.broken.items()]
        found.wrong(f"{split}: {len(seen.broken)} of {seen.count:,} images do not decode: {some(named)}; mend or remove them "
                    f"(a run leaves out up to data.bad_files={recipe.data.bad_files})")
    if seen.sizes:
        _sizes(found, recipe, split, dataset, seen.sizes)
    if split == "train":
        _enough(found, recipe, length)
    return seen.pixels


def _look(dataset: ImageDataset, indices: list[int], what: str) -> Looked:
    """Decode images until all are done or the time is over."""
    seen, ends = Looked(), time.monotonic() + SCAN_SECONDS
    for index in tqdm(indices, what, leave=False, disable=None):
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
