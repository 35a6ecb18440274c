"""`vqzoo eval`: measure a tokenizer, a folder of reconstructions or a folder of samples, and write what was found."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vqzoo.data import DataConfig, Folder, ImageDataset, Key, eval_batches, list_images, stamp, to_images
from vqzoo.errors import UserError
from vqzoo.evaluation import CROPS, EvaluateConfig
from vqzoo.evaluation.config import PER_IMAGE
from vqzoo.evaluation.evaluate import Evaluator, Keep, Result
from vqzoo.evaluation.pictures import PairedFolders, sample_folder
from vqzoo.evaluation.protocols import Pair
from vqzoo.evaluation.reference import published
from vqzoo.evaluation.report import (
    card,
    data_card,
    hardware,
    table,
    to_json,
    versions_of_metrics,
    worst,
    write_table,
)
from vqzoo.ops import gather_names
from vqzoo.recipe import parse_overrides
from vqzoo.tokenizer import CONFIG, WEIGHTS, Tokenizer
from vqzoo.weights import sha256

WORST = 8
"""Images that the picture of the worst shows."""

TILE = 256
"""The longest side of one of them, in pixels."""


@dataclass
class Scored:
    """Carry a result, what the card says beside it, each image's name, and a way to see a pair again."""

    result: Result
    about: dict[str, Any]
    names: list[str]
    again: Callable[[int], tuple[Tensor, Tensor]] | None = None


def score(options: argparse.Namespace) -> None:
    """Measure a tokenizer, a folder of reconstructions or of samples; print, and write what was asked for."""
    if options.batch_size < 1:
        raise UserError(f"--batch-size: {options.batch_size} is less than 1")
    config = configured(options)
    for name in ("json", "csv", "save_images"):
        _check_place(getattr(options, name), f"--{name.replace('_', '-')}", options)
    if options.csv and not set(config.metrics) & set(PER_IMAGE):
        raise UserError(f"--csv: none of the metrics is of single images; ask for one of {', '.join(PER_IMAGE)}")
    began = time.monotonic()
    state = PartialState(cpu=not torch.cuda.is_available())
    evaluator = Evaluator(config, state.device, prefix="")
    if evaluator.missing and state.is_main_process:
        print(f"vqzoo: {', '.join(evaluator.missing)} will be missing, since weights are; the rest comes", file=sys.stderr)
    scored = (_samples if not evaluator.protocol.paired else _tokenizer if _is_tokenizer(options.what) else _pictures)(
        options, evaluator, state
    )
    if not state.is_main_process:
        return
    result = scored.result
    sizes = scored.about["resolution"]
    size = "x".join(map(str, sizes)) + " pixels" if isinstance(sizes, list) else "each at its own size"
    print(f"\n  {len(result.positions)} images, {size}, protocol {config.protocol}\n")
    print(table(result.metrics, result.missing))
    for note in result.notes:
        print(f"vqzoo: {note}", file=sys.stderr)
    for name in result.left_out:
        print(f"vqzoo: {name} does not decode and was left out", file=sys.stderr)
    how = card(evaluator, result, **scored.about, seconds=time.monotonic() - began,
               hardware=hardware(state.device, state.num_processes),
               versions=versions_of_metrics())
    if options.json:
        _write(options.json, "--json", lambda file: file.write_text(to_json(
            {"metrics": result.metrics, "missing": result.missing, "usage_curve": result.usage_curve, "card": how})))
    if options.csv:
        _write_csv(Path(options.csv), scored)
    if config.metrics and not {evaluator.name_of(name) for name in config.metrics} & set(result.metrics):
        raise UserError("nothing that was asked for could be measured, as said above")


def configured(options: argparse.Namespace) -> EvaluateConfig:
    """Return what `key=value` overrides, and the options that are shorter, make of the defaults."""
    overrides = list(options.overrides)
    said = {override.partition("=")[0].strip() for override in overrides}
    if useless := said & {"epochs", "images", "best"}:
        raise UserError(f"{min(useless)}: is a matter of training; `vqzoo eval` measures all images once")
    for name, value in (("protocol", options.protocol), ("metrics", options.metrics)):
        if value is not None and name in said:
            raise UserError(f"--{name} and {name}= say the same thing; leave one out")
    if options.protocol is not None:
        overrides.append(f"protocol={options.protocol}")
    if options.metrics is not None:
        overrides.append(f"metrics=[{options.metrics.strip('[] ')}]")
    elif "metrics" not in said and options.protocol in ("adm-gfid",):
        overrides.append("metrics=[gfid]")
    elif "metrics" not in said and os.path.isdir(options.what) and not _is_tokenizer(options.what):
        overrides.append("metrics=[psnr,ssim]")  # a folder of pictures has no codes
    schema = OmegaConf.structured(EvaluateConfig)
    raw = parse_overrides(overrides, schema)
    try:
        return OmegaConf.to_object(OmegaConf.merge(schema, raw))
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


# What is measured


def _is_tokenizer(what: str) -> bool:
    """Tell a run or a tokenizer from a folder of pictures, which has neither configuration nor recipe."""
    folder = Path(what)
    found = any(os.path.isfile(folder / name) for name in (CONFIG, f"tokenizer/{CONFIG}", "recipe.yaml"))
    if not found and not (os.path.isdir(folder) and list_images(folder)):
        raise UserError(f"{what}: neither an exported tokenizer (config.json and model.safetensors) nor a finished run nor a "
                        "folder of pictures")
    return found


def _tokenizer(options: argparse.Namespace, evaluator: Evaluator, state: PartialState) -> Scored:
    tokenizer = Tokenizer.from_pretrained(options.what).to(state.device)
    resolution = list(tokenizer.config.resolution)
    config = DataConfig(root=options.data, resolution=resolution, eval_batch_size=options.batch_size)
    dataset = ImageDataset(Folder(_folder(options.data), "--data"), config)
    dataset.crop = CROPS[evaluator.protocol.crop]
    for note in dataset.notes if state.is_main_process else ():
        print(f"vqzoo: {note}", file=sys.stderr)
    batches = eval_batches(config, dataset, state.process_index, state.num_processes)
    shown = _shown(batches, -(-len(dataset) // (options.batch_size * state.num_processes)), state)
    result = evaluator.tokenizer(tokenizer, shown, stamp(dataset), _saver(options.save_images, dataset.source.names))

    @torch.no_grad()
    def again(position: int) -> tuple[Tensor, Tensor]:
        levels = dataset[Key(position, position)][0][None]
        pair = Pair(levels.to(state.device), tokenizer(to_images(levels, state.device)).reconstructions, evaluator.protocol)
        return tuple(x[0].byte().cpu() for x in pair.levels)

    about = {"tokenizer": options.what, "tokenizer_sha256": _sha256(options.what)}
    return Scored(result, data_card(options.data, dataset, resolution) | about, dataset.source.names, again)


def _pictures(options: argparse.Namespace, evaluator: Evaluator, state: PartialState) -> Scored:
    pairs = PairedFolders(Path(options.what), _folder(options.data), evaluator.protocol, options.partial)
    left_out: list[str] = []
    if state.is_main_process and pairs.left:
        print(f"vqzoo: {pairs.left} images have no reconstruction and are not counted", file=sys.stderr)
    batches = pairs.batches(options.batch_size, DataConfig.workers, left_out, state.process_index, state.num_processes)
    result = evaluator.pictures(_shown(batches, None, state), left_out, _saver(options.save_images, pairs.names))
    dataset, fitted = ImageDataset(pairs.images, DataConfig()), len(gather_names(pairs.fitted))
    if fitted and state.is_main_process:
        print(f"vqzoo: {fitted} images have another size than their reconstructions and were resized and cropped to it, as the "
              "protocol does", file=sys.stderr)
    about = data_card(options.data, dataset, None) | {
        "reconstructions": options.what, "rounding": "none: images and reconstructions are 8-bit files",
        "images_without_reconstruction": pairs.left, "images_fitted_to_reconstructions": fitted,
    }
    return Scored(result, about, pairs.names, lambda position: pairs[position][:2])


def _samples(options: argparse.Namespace, evaluator: Evaluator, state: PartialState) -> Scored:
    if _is_tokenizer(options.what):
        raise UserError(f"protocol: {evaluator.config.protocol} compares a folder of samples with a reference set, and "
                        f"{options.what} is a tokenizer; decode samples into a folder first, or choose another protocol")
    if options.save_images or options.csv:
        raise UserError(f"protocol: {evaluator.config.protocol} measures no image by itself; leave --save-images and --csv out")
    protocol = evaluator.protocol
    samples = sample_folder(Path(options.what), "SAMPLES", None, protocol, options.batch_size)
    if options.data.endswith(".npz"):
        against = published(options.data)
        about = {"data": options.data, "fingerprint": sha256(Path(options.data)), "resolution": list(samples.resolution)}
    else:
        references = sample_folder(_folder(options.data), "--data", samples.resolution, protocol, options.batch_size)
        against, about = _each(references, options, state), data_card(options.data, references, list(samples.resolution))
    result = evaluator.samples(_shown(_each(samples, options, state), None, state), against)
    return Scored(result, about | {"samples": options.what}, samples.source.names)


def _each(dataset: ImageDataset, options: argparse.Namespace, state: PartialState) -> Iterator:
    config = DataConfig(resolution=list(dataset.resolution), eval_batch_size=options.batch_size)
    return eval_batches(config, dataset, state.process_index, state.num_processes)


def _shown(batches: Iterator, total: int | None, state: PartialState) -> Iterator:
    pause = (0.1, 0.0) if sys.stderr.isatty() else (30.0, 30.0)  # seconds; a log needs few lines
    return tqdm(batches, total=total, unit="batch", mininterval=pause[0], delay=pause[1], disable=not state.is_main_process)


def _folder(path: str) -> Path:
    if not os.path.isdir(path):
        raise UserError(f"--data: {path} is not a folder")
    return Path(path)


# What is written


def _saver(folder: str | None, names: list[str]) -> Keep | None:
    """Return what writes each reconstruction as a PNG under its image's path; nothing without a folder."""
    if not folder:
        return None
    files: dict[Path, str] = {}
    for name in names:
        if (other := files.setdefault((Path(folder) / name).with_suffix(".png"), name)) != name:
            raise UserError(f"--save-images: what is made of {other} and of {name} would be one file; rename an image")
    made = list(files)

    def save(pair: Pair, positions: Tensor) -> None:
        for position, levels in zip(positions.tolist(), pair.levels[1].byte().cpu(), strict=True):
            file = made[position]
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                _image(levels).save(file)
            except OSError as error:
                raise UserError(f"--save-images: {file} cannot be written: {error}") from error

    return save


def _write_csv(file: Path, scored: Scored) -> None:
    """Write the table of images, and beside it a picture of the worst above what was made of them."""
    if not scored.result.table:
        raise UserError("--csv: none of the metrics of single images could be measured")
    _write(str(file), "--csv", lambda file: write_table(file, scored.result, scored.names))
    metric, positions = worst(scored.result, WORST)
    picture = file.with_name(f"{file.stem}_worst.png")
    _write(str(picture), "--csv", lambda file: _columns([scored.again(position) for position in positions]).save(file))
    worst_names = ", ".join(scored.names[position] for position in positions)
    print(f"\n  each image    {file}\n  the worst     {picture}: by {metric}, the worst first: {worst_names}")


def _columns(pairs: list[tuple[Tensor, Tensor]]) -> Image.Image:
    """Lay pairs out side by side, images above reconstructions, large ones reduced."""
    tiles = [tuple(_image(levels) for levels in pair) for pair in pairs]
    for tile in (tile for both in tiles for tile in both):
        tile.thumbnail((TILE, TILE))
    width, height = sum(image.width for image, _ in tiles), max(image.height for image, _ in tiles)
    canvas, left = Image.new("RGB", (width, 2 * height), "white"), 0
    for image, reconstruction in tiles:
        canvas.paste(image, (left, height - image.height))
        canvas.paste(reconstruction, (left, height))
        left += image.width
    return canvas


def _image(levels: Tensor) -> Image.Image:
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def _check_place(path: str | None, key: str, options: argparse.Namespace) -> None:
    """Find out before a long evaluation whether a file can be written, and not among the pictures that are measured."""
    if path is None:
        return
    for pictures in (options.data, *([] if _is_tokenizer(options.what) else [options.what])):
        if key != "--json" and Path(path).resolve().is_relative_to(Path(pictures).resolve()):
            raise UserError(f"{key}: {path} lies in {pictures}, whose pictures are measured; name another place")
    if key == "--save-images":
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        new = not os.path.exists(path)
        with open(path, "a"):
            pass
        if new:
            Path(path).unlink(missing_ok=True)  # another process may have been here
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be written: {error}") from error


def _write(path: str, key: str, write: Callable[[Path], Any]) -> None:
    try:
        write(Path(path))
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be written: {error}") from error


def _sha256(what: str) -> str:
    folder = Path(what)
    return sha256((folder / "tokenizer" if (folder / "tokenizer" / CONFIG).is_file() else folder) / WEIGHTS)
