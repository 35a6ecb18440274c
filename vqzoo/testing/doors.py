"""Checks of data sets and metrics that a plugin offers."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vqzoo.data import Offered
from vqzoo.instance import through_door
from vqzoo.testing.check import check, fail
from vqzoo.testing.subject import Subject

MOST = 64
"""Images of a split that are looked at."""

SPLITS = ("train", "val")
DATA, METRIC = ("make_dataset",), ("make_metric",)


@check("A split cannot be read: return for \"train\" and for \"val\" a sequence with a length, of Pillow images or of paths of "
       "image files.", DATA)
def both_splits_have_images(subject: Subject) -> None:
    for split in SPLITS:
        images = _images(subject, split)
        if not len(images):
            fail(f"{split} has no image")
        for index in _some(images):
            try:
                image = images.image(index)
            except Exception as error:  # Pillow's decoders raise nearly anything
                fail(f"{split}[{index}] is no image: {error!r}")
            if min(image.size) < 1:
                fail(f"{split}[{index}] has {image.width}x{image.height} pixels")


@check("What is measured was trained on: let \"train\" and \"val\" share no image.", DATA)
def splits_share_no_image(subject: Subject) -> None:
    seen: list[dict[Any, str]] = []
    for split in SPLITS:
        images = _images(subject, split)
        seen.append({_pixels(images, index): images.name(index) for index in _some(images)})
        if isinstance(images.images[0], str | Path):
            seen[-1] |= {Path(images.images[index]).resolve(): images.name(index) for index in range(len(images))}
    if shared := seen[0].keys() & seen[1].keys():
        same = next(iter(shared))
        fail(f"{len(shared)} images are in both, {seen[0][same]} of train and {seen[1][same]} of val for one")


@check("A run that goes on sees other images: let the same index give the same image and name, whatever was asked before and "
       "in each data set that is made; list folders in sorted order.", DATA)
def images_are_the_same_each_time(subject: Subject) -> None:
    for split in SPLITS:
        one, other = _images(subject, split), _images(subject, split)
        if len(one) != len(other):
            fail(f"{split} has {len(one)} images and then {len(other)}")
        first = [(one.name(index), _pixels(one, index)) for index in _some(one)]
        for which, again in (("again", one), ("of a second data set", other)):
            found = {index: (again.name(index), _pixels(again, index)) for index in reversed(_some(again))}
            for index, wanted in zip(_some(one), first, strict=True):
                if found[index] != wanted:
                    part = "name" if found[index][0] != wanted[0] else "image"
                    fail(f"{split}[{index}] {which} has another {part}")


@check("Worker processes cannot read the images: keep no open file, lambda or lock in the sequence, so that pickle takes it.",
       DATA)
def images_go_to_workers(subject: Subject) -> None:
    for split in SPLITS:
        images = _images(subject, split)
        other = Offered(_pickled(images.images, f"the sequence of {split}"), subject.name)
        if len(other) != len(images) or _pixels(other, 0) != _pixels(images, 0):
            fail(f"{split} is another one after pickle")


@check("A metric's result cannot be told: return a torchmetrics.Metric whose update takes reconstructions and images [B, 3, H, "
       "W] in [0, 1] and whose compute gives a number or a dict of numbers.", METRIC)
def metric_gives_numbers(subject: Subject) -> None:
    metric = _metric(subject)
    if not isinstance(metric, nn.Module):
        fail(f"{type(metric).__name__} where a torchmetrics.Metric, a module, is expected")
    if lacking := [name for name in ("update", "compute", "reset") if not callable(getattr(metric, name, None))]:
        fail(f"{type(metric).__name__} without {', '.join(lacking)}")
    found = _result(metric, *_pairs(subject))
    if not found or not all(np.isfinite(list(found.values()))):
        fail(f"{found}")


@check("The result depends on how images come in batches: sum over images and count them in update, and divide in compute.",
       METRIC)
def metric_takes_any_batches(subject: Subject) -> None:
    made, images = _pairs(subject)
    whole = _result(_metric(subject), made, images)
    for sizes in ([2, 2], [1, 3], [1, 1, 1, 1]):
        metric = _metric(subject)
        for one, other in zip(made.split(sizes), images.split(sizes), strict=True):
            metric.update(one, other)
        for name, value in _numbers(metric.compute()).items():
            if not np.isclose(value, whole[name], rtol=1e-3, atol=1e-5):
                fail(f"{value:.6g} of batches of {sizes} and {whole[name]:.6g} of one batch of 4{f' ({name})' if name else ''}")


@check("A second evaluation counts the images of the first: let reset forget all that update has seen (add_state does so).",
       METRIC)
def metric_forgets_at_reset(subject: Subject) -> None:
    made, images = _pairs(subject)
    metric = _metric(subject)
    first = _result(metric, made, images)
    metric.reset()
    _result(metric, images.flip(0), made)
    metric.reset()
    again = _result(metric, made, images)
    if again != first:
        fail(f"{again} after reset and {first} before")


@check("The metric is another one after pickle, or cannot be pickled: keep its state in add_state, no lambda or open file.",
       METRIC)
def metric_survives_pickle(subject: Subject) -> None:
    made, images = _pairs(subject)
    metric = _metric(subject)
    metric.update(made[:2], images[:2])
    other = _pickled(metric, "the metric")
    results = [_result(one, made[2:], images[2:]) for one in (metric, other)]
    if results[0] != results[1]:
        fail(f"{results[1]} after pickle and {results[0]} without")


def _images(subject: Subject, split: str) -> Offered:
    return Offered(_through(subject, "make_dataset", split=split), subject.name)


def _through(subject: Subject, door: str, **arguments: str) -> Any:
    return getattr(through_door(door, subject.name, subject.fields, f"plugins.{subject.name}"), door)(**arguments)


def _some(images: Offered) -> range:
    """Return the indices of some images, at even distances."""
    return range(0, len(images), max(1, len(images) // MOST))


def _pixels(images: Offered, index: int) -> tuple[tuple[int, int], bytes]:
    image: Image.Image = images.image(index)
    return image.size, image.tobytes()


def _metric(subject: Subject) -> Any:
    return _through(subject, "make_metric")


def _pairs(subject: Subject) -> tuple[Tensor, Tensor]:
    """Return reconstructions and images [4, 3, H, W] in [0, 1], rounded to 8 bits."""
    images = subject.images()
    made = (images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    return tuple((part * 127.5 + 127.5).round() / 255 for part in (made, images))


def _result(metric: Any, made: Tensor, images: Tensor) -> dict[str, float]:
    metric.update(made, images)
    return _numbers(metric.compute())


def _numbers(found: Any) -> dict[str, float]:
    try:
        return {str(name): float(value) for name, value in (found.items() if isinstance(found, dict) else [("", found)])}
    except (TypeError, ValueError, RuntimeError):
        fail(f"compute gives {type(found).__name__} where a number or a dict of numbers is expected")


def _pickled(value: Any, what: str) -> Any:
    try:
        return pickle.loads(pickle.dumps(value))
    except Exception as error:  # whatever its parts raise
        fail(f"{what} cannot be pickled: {error!r}")
