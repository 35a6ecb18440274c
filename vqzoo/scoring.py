"""`vqzoo eval`: measure a tokenizer, a folder of reconstructions or a folder of samples, and write what was found."""

import argparse
import os
import sys
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
from vqzoo.weights import OFFLINE, sha256

WORST = 8
"""Images that the picture of the worst shows."""


@dataclass
class Scored:
    """Carry a result, what the card says beside it, each image's name, and a way to see a pair again."""

    result: Result
    about: dict[str, Any]
    names: list[str]
    again: Callable[[int], tuple[Tensor, Tensor]] | None = None


def score(options: argparse.Namespace) -> None:
    """Measure a tokenizer, a folder of reconstructions or of samples; print, and write what was asked for."""
    if options.offline:
        os.environ.update({OFFLINE: "1", "HF_HUB_OFFLINE": "1"})
    if options.batch_size < 1:
        raise UserError(f"--batch-size: {options.batch_size} is less than 1")
    config = configured(options)
    for name in ("json", "csv"):
        _check_place(getattr(options, name), f"--{name}")
    state = PartialState(cpu=not torch.cuda.is_available())
    evaluator = Evaluator(config, state.device, prefix="")
    for name, why in evaluator.missing.items():
        print(f"vqzoo: {name} will be missing: {why}", file=sys.stderr)
    scored = (_samples if not evaluator.protocol.paired else _tokenizer if _is_tokenizer(options.what) else _pictures)(
        options, evaluator, state
    )
    if not state.is_main_process:
        return
    result = scored.result
    print(table(result.metrics, result.missing))
    for name in result.left_out:
        print(f"vqzoo: {name} does not decode and was left out", file=sys.stderr)
    how = card(evaluator, result, **scored.about, hardware=hardware(state.device, state.num_processes),
               versions=versions_of_metrics())
    if options.json:
        _write(options.json, "--json", lambda file: file.write_text(to_json(
            {"metrics": result.metrics, "missing": result.missing, "usage_curve": result.usage_curve, "card": how})))
    if options.csv:
        _write_csv(Path(options.csv), scored)


def configured(options: argparse.Namespace) -> EvaluateConfig:
    """Return what `key=value` overrides, and the options that are shorter, make of the defaults."""
    overrides = list(options.overrides)
    if options.protocol:
        overrides.append(f"protocol={options.protocol}")
    if options.metrics:
        overrides.append(f"metrics=[{options.metrics}]")
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
    if not folder.is_dir():
        raise UserError(f"{what}: not a folder; name a run, an exported tokenizer or a folder of reconstructions")
    found = any((folder / name).is_file() for name in (CONFIG, f"tokenizer/{CONFIG}", "recipe.yaml"))
    if not found and not list_images(folder):
        raise UserError(f"{what}: neither an exported tokenizer (config.json and model.safetensors) nor a finished run, and "
                        "there are no pictures below it")
    return found


def _tokenizer(options: argparse.Namespace, evaluator: Evaluator, state: PartialState) -> Scored:
    tokenizer = Tokenizer.from_pretrained(options.what).to(state.device)
    resolution = list(tokenizer.config.resolution)
    config = DataConfig(root=options.data, resolution=resolution, eval_batch_size=options.batch_size)
    dataset = ImageDataset(Folder(_folder(options.data), "--data"), config)
    dataset.crop = CROPS[evaluator.protocol.crop]
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
    batches = pairs.batches(options.batch_size, DataConfig.workers, left_out, state.process_index, state.num_processes)
    result = evaluator.pictures(_shown(batches, None, state), left_out, _saver(options.save_images, pairs.names))
    dataset = ImageDataset(pairs.images, DataConfig())
    about = data_card(options.data, dataset, None) | {
        "reconstructions": options.what, "rounding": "none: images and reconstructions are 8-bit files",
        "images_without_reconstruction": len(pairs.images) - len(pairs),
        "images_cropped_to_reconstructions": len(gather_names(pairs.cropped)),
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
        against, about = published(options.data), {"data": options.data, "fingerprint": sha256(Path(options.data))}
    else:
        references = sample_folder(_folder(options.data), "--data", samples.resolution, protocol, options.batch_size)
        against, about = _each(references, options, state), data_card(options.data, references, samples.resolution)
    result = evaluator.samples(_shown(_each(samples, options, state), None, state), against)
    return Scored(result, about | {"samples": options.what}, samples.source.names)


def _each(dataset: ImageDataset, options: argparse.Namespace, state: PartialState) -> Iterator:
    config = DataConfig(resolution=list(dataset.resolution), eval_batch_size=options.batch_size)
    return eval_batches(config, dataset, state.process_index, state.num_processes)


def _shown(batches: Iterator, total: int | None, state: PartialState) -> Iterator:
    return tqdm(batches, total=total, unit="batch", disable=None if state.is_main_process else True)


def _folder(path: str) -> Path:
    if not Path(path).is_dir():
        raise UserError(f"--data: {path} is not a folder")
    return Path(path)


# What is written


def _saver(folder: str | None, names: list[str]) -> Keep | None:
    """Return what writes each reconstruction as a PNG under its image's path; nothing without a folder."""
    if not folder:
        return None
    root = Path(folder)

    def save(pair: Pair, positions: Tensor) -> None:
        for position, levels in zip(positions.tolist(), pair.levels[1].byte().cpu(), strict=True):
            file = (root / names[position]).with_suffix(".png")
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                _image(levels).save(file)
            except OSError as error:
                raise UserError(f"--save-images: {file} cannot be written: {error}") from error

    return save


def _write_csv(file: Path, scored: Scored) -> None:
    """Write the table of images, and beside it a picture of the worst above what was made of them."""
    if not scored.result.table:
        raise UserError("--csv: none of the metrics is of single images; ask for psnr, ssim, ms_ssim or an lpips")
    _write(str(file), "--csv", lambda file: write_table(file, scored.result, scored.names))
    metric, positions = worst(scored.result, WORST)
    picture = file.with_name(f"{file.stem}_worst.png")
    _write(str(picture), "--csv", lambda file: _columns([scored.again(position) for position in positions]).save(file))
    print(f"\n  each image          {file}\n  the worst by {metric:<6} {picture}")


def _columns(pairs: list[tuple[Tensor, Tensor]]) -> Image.Image:
    """Lay pairs out side by side, images above reconstructions, each at its own size."""
    width, height = sum(image.shape[2] for image, _ in pairs), max(image.shape[1] for image, _ in pairs)
    canvas, left = Image.new("RGB", (max(1, width), 2 * height), "white"), 0
    for image, reconstruction in pairs:
        canvas.paste(_image(image), (left, height - image.shape[1]))
        canvas.paste(_image(reconstruction), (left, height))
        left += image.shape[2]
    return canvas


def _image(levels: Tensor) -> Image.Image:
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def _check_place(path: str | None, key: str) -> None:
    """Find out before a long evaluation whether a file can be written."""
    if path is None:
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a"):
            pass
        if not Path(path).stat().st_size:
            Path(path).unlink()
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
