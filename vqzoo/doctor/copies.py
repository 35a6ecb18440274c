"""Copies: images that are there twice, and those that both train and evaluate."""

import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vqzoo import weights
from vqzoo.data import Folder, ImageDataset
from vqzoo.doctor.findings import Findings, some

HASH_SECONDS = 60.0
"""Seconds for hashing files."""


def tell_copies(found: Findings, datasets: dict[str, Any], pixels: dict[str, dict[str, str]]) -> None:
    """Say which images are there twice, and which of those train and evaluate; `pixels` are hashes by name, by split."""
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
                       f"{some(map(_same, inside))}; remove the copies")
    if both:
        found.wrong(f"{len(both)} images are in train and in val: {some(map(_same, both))}; what is trained on cannot be "
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
    for number, (split, name, path) in enumerate(tqdm(files, "comparing", leave=False, disable=None)):
        if time.monotonic() > ends:
            return alike, left + len(files) - number
        alike.setdefault(weights.sha256(path), []).append((split, name))
    return alike, left


def _same(group: list[tuple[str, str]]) -> str:
    return " = ".join(f"{split}/{name}" for split, name in sorted(group)[:3]) + (" = ..." if len(group) > 3 else "")
