"""Folders of pictures that any tool made: reconstructions, paired with their images by name, and samples."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vqzoo.data import DataConfig, Folder, ImageDataset, decode, from_image, read
from vqzoo.errors import UserError
from vqzoo.evaluation.protocols import CROPS, Protocol


class PairedFolders(Dataset):
    """Pair the reconstructions below one folder with the images below another, by relative path without its ending.

    An image of another size than its reconstruction is cropped to it as the protocol crops. Raises a UserError naming
    what has no partner, unless `partial` allows images without a reconstruction.
    """

    def __init__(self, reconstructions: Path, images: Path, protocol: Protocol, partial: bool = False):
        self.made, self.images = Folder(reconstructions, "RECONSTRUCTIONS"), Folder(images, "--data")
        self.crop = CROPS[protocol.crop]
        made, known = _stems(self.made), _stems(self.images)
        if lonely := sorted(set(made) - set(known)):
            raise UserError(f"{reconstructions}: {_some(lonely)} of its {len(made)} pictures have no image of that name below "
                            f"{images}; pairs have the same path and name, whatever its ending")
        if (left := sorted(set(known) - set(made))) and not partial:
            raise UserError(f"{reconstructions}: {_some(left)} of the {len(known)} images below {images} have no "
                            "reconstruction; with --partial the others are measured, and the card says how many")
        self.stems = sorted(made)
        self.files = [(known[stem], made[stem]) for stem in self.stems]
        self.fitted: list[str] = []
        self.left = len(known) - len(made)
        self.names = [known[stem] for stem in self.stems]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | None, Tensor | None, int, bool]:
        try:
            image, made = (decode(folder.root / name) for folder, name in
                           zip((self.images, self.made), self.files[index], strict=True))
        except Exception:  # Pillow's decoders raise nearly anything on damaged files
            return None, None, index, False
        fitted = image.size != made.size
        if fitted:
            image = self.crop(image, (made.height, made.width))
        return from_image(image), from_image(made), index, fitted

    def batches(self, size: int, workers: int, left_out: list[str], process: int = 0,
                processes: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield images and reconstructions [b, 3, H, W] of one size, and their positions [b]; names it leaves out are added."""
        mine = range(process, len(self), processes)
        held: list[tuple[Tensor, Tensor, int]] = []
        with closing(read(self, min(workers, len(mine)), sampler=mine, batch_size=None)) as pairs:
            for image, made, index, fitted in pairs:
                if image is None:
                    left_out.append(self.stems[index])
                    continue
                self.fitted += [self.stems[index]] * fitted
                if held and (len(held) == size or held[0][0].shape != image.shape):
                    yield _stacked(held)
                    held = []
                held.append((image, made, int(index)))
        if held:
            yield _stacked(held)


def sample_folder(root: Path, key: str, resolution: list[int] | None, protocol: Protocol, batch_size: int) -> ImageDataset:
    """Open a folder of pictures that belong to no images; a resolution [height, width] is what they are cropped to."""
    folder = Folder(root, key)
    if resolution is None:
        sizes: dict[tuple[int, int], str] = {}
        for name in folder.names:
            try:
                with Image.open(root / name) as picture:
                    sizes.setdefault(picture.size, name)
            except Exception:  # what does not decode is left out by name when it is read
                continue
        if not sizes:
            raise UserError(f"{root}: none of its {len(folder)} pictures can be read")
        if len(sizes) > 1:
            said = ", ".join(f"{name} {width}x{height}" for (width, height), name in list(sizes.items())[:3])
            raise UserError(f"{root}: samples are of {len(sizes)} sizes ({said}); a reference set is compared at one")
        ((width, height),) = sizes
        resolution = [height, width]
    dataset = ImageDataset(folder, DataConfig(resolution=resolution, eval_batch_size=batch_size))
    dataset.crop = CROPS[protocol.crop]
    return dataset


def _stacked(held: list[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    images, made, positions = zip(*held, strict=True)
    return torch.stack(images), torch.stack(made), torch.tensor(positions)


def _stems(folder: Folder) -> dict[str, str]:
    """Return the names of a folder's files by their paths without endings; a UserError where two would be one."""
    found: dict[str, str] = {}
    for name in folder.names:
        stem = name.rpartition(".")[0]
        if stem in found:
            raise UserError(f"{folder.root}: {found[stem]} and {name} would both be {stem}; keep one")
        found[stem] = name
    return found


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
