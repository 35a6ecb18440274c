"""What an evaluation leaves: the card that says how, the table for the terminal, the comparison, the table of images."""

import csv
import hashlib
import json
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vqzoo.data import ImageDataset, StreamDataset, fingerprint
from vqzoo.errors import UserError

if TYPE_CHECKING:  # what reads results need not load networks
    from vqzoo.evaluation.evaluate import Evaluator, Result

FORMS = {"psnr": "{:.2f} dB", "ssim": "{:.4f}", "ms_ssim": "{:.4f}", "lpips": "{:.4f}", "rfid": "{:.3f}", "gfid": "{:.3f}",
         "kid": "{:.6f}", "fd_kid": "{:.6f}", "fd": "{:.3f}", "precision": "{:.4f}", "recall": "{:.4f}",
         "fd_precision": "{:.4f}", "fd_recall": "{:.4f}", "usage": "{:.1%}", "perplexity": "{:,.1f}",
         "entropy": "{:.3f} bits", "bits_per_token": "{:g} bits"}
"""How values are written, by the first part of a metric's name; others are whole numbers."""


def card(evaluator: "Evaluator", result: "Result", **more: Any) -> dict[str, Any]:
    """Say how numbers were made, so that they can be compared or refused."""
    return {"protocol": evaluator.config.protocol, **evaluator.protocol.card(), "images": len(result.positions),
            "pixels_sha256": result.pixels, "networks": result.networks, "files_left_out": result.left_out,
            "notes": result.notes, **more}


def data_card(name: str, dataset: ImageDataset | StreamDataset, resolution: list[int] | None) -> dict[str, Any]:
    """Name the set of images; the fingerprint is of names and sizes of files."""
    return {"data": name, "fingerprint": fingerprint(dataset), "resolution": list(resolution) if resolution else "each its own"}


def versions_of_metrics() -> dict[str, str]:
    """Return the versions of what measures."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("vqzoo", "timm", "torchmetrics", "torch-fidelity", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware(device: torch.device, processes: int) -> dict[str, Any]:
    """Name the device, the processes and the cores."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "processes": processes, "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def to_json(content: Any) -> str:
    """Return strict JSON, in which an infinite or undefined number is the text "inf", "-inf" or "nan"."""
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content


def written(name: str, value: float | str) -> str:
    """Write a metric's value with the digits and the unit that it has."""
    parts = name.split("_")
    forms = (FORMS["_".join(parts[:count])] for count in range(len(parts), 0, -1) if "_".join(parts[:count]) in FORMS)
    value = float(value) if isinstance(value, str) else value
    return next(forms, "{:,.0f}" if float(value).is_integer() else "{:.6g}").format(value)


def table(metrics: dict[str, float], missing: dict[str, str] | None = None) -> str:
    """Lay metrics out as two aligned columns for the terminal, and say below what is missing and why."""
    rows = [(name, written(name, value)) for name, value in metrics.items()]
    because: dict[str, list[str]] = {}
    for name, why in (missing or {}).items():
        because.setdefault(why, []).append(name)
    widths = [max((len(row[side]) for row in rows), default=0) for side in (0, 1)]
    lines = [f"  {name:<{widths[0]}}  {value:>{widths[1]}}" for name, value in rows]
    return "\n".join([*lines, *(f"  missing: {', '.join(names)}: {why}" for why, names in because.items())])


# Comparison


def compare(paths: list[str], mixed: bool = False) -> str:
    """Return the metrics of JSON files side by side, as a Markdown table; a row per file.

    Raises a UserError where the files follow several protocols, show other images or used other weights, unless `mixed`,
    and then the table says so.
    """
    results = {path: read(path) for path in paths}
    if not results:
        return ""
    differences = _differences([result["card"] for result in results.values()])
    if differences and not mixed:
        said = "; ".join(f"{key}: {', '.join(values)}" for key, values in differences.items())
        raise UserError(f"these numbers cannot be compared: {said}; evaluate them alike, or give --mixed to "
                        "have a table that says so")
    names = [name for result in results.values() for name in result["metrics"] if name not in differences]
    names = list(dict.fromkeys(names))
    head = ["results", *differences, *names]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for path, result in results.items():
        metrics = result["metrics"]
        cells = [path, *(_short(_pick(result["card"], key)) for key in differences)]
        cells += [written(name, metrics[name]) if name in metrics else "–" for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    if differences:
        lines.append(f"\nNot comparable: the rows differ in {', '.join(differences)}.")
    return "\n".join(lines)


def read(path: str) -> dict[str, Any]:
    """Read what `vqzoo eval --json` or a run wrote, given the file or the run's folder."""
    file = Path(path, "metrics.json") if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_text())
        if isinstance(content["card"], dict) and isinstance(content["metrics"], dict):
            content["card"]["protocol"]
            return content
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{file}: not what `vqzoo eval --json` or a run of this version writes: it has no card that names a "
                    "protocol; evaluate again")


def _differences(cards: list[dict]) -> dict[str, list[str]]:
    keys = ["protocol", "fingerprint", "resolution", "images", "pixels_sha256"]
    keys += [f"network of {name}" for card in cards for name in card.get("networks", {})]
    found = {}
    for key in dict.fromkeys(keys):
        values = list(dict.fromkeys(_short(_pick(card, key)) for card in cards if _pick(card, key) is not None))
        if len(values) > 1:
            found[key] = values
    if "protocol" in found or "fingerprint" in found:
        found.pop("pixels_sha256", None)  # which follows from them
    return found


def _pick(card: dict, key: str) -> Any:
    name = key.removeprefix("network of ")
    said = card.get("networks", {}).get(name) if name != key else card.get(key)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest() if isinstance(said, dict) else said


def _short(value: Any) -> str:
    text = "–" if value is None else "x".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


# Each image


def write_table(file: Path, result: "Result", names: list[str]) -> None:
    """Write the table of images as CSV: a row per image, in the order of the images."""
    columns = list(result.table)
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", *columns])
        for number, position in enumerate(result.positions):
            writer.writerow([names[position], *(f"{result.table[column][number]:.6g}" for column in columns)])


def worst(result: "Result", count: int) -> tuple[str, list[int]]:
    """Return the first metric of the table, and the positions of the images that are the worst by it, the worst first."""
    from vqzoo.evaluation.config import better

    name = next(iter(result.table))
    sign = 1.0 if better(name, 1.0, 0.0) else -1.0
    values = [sign * value if not math.isnan(value) else -math.inf for value in result.table[name]]
    order = sorted(range(len(values)), key=values.__getitem__)[:count]
    return name, [result.positions[number] for number in order]
