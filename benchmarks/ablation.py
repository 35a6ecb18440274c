"""NSVQ's six-row phase ablation (arXiv 2606.11363, Table 3) at a size for CPUs: every row with every seed, then one table.

python benchmarks/ablation.py --data FOLDER --weights FILE [--features NAME] [--seeds 3] [--jobs 2] [--out DIR] [key=value ...]

FOLDER holds train/ and val/; FILE has the weights of the timm network whose features serve the perceptual loss and the Fréchet
distance, which is therefore no rFID. A cell that is finished is not run again, so an interrupted bench goes on where it was.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from vqzoo import UserError
from vqzoo.recipe import Recipe, differences, load_recipe, plain

ROWS = ("neither", "dense", "joint", "joint_warm_up", "joint_refine", "full")
HERE = Path(__file__).parent / "ablation"
FEATURES = {"mobilenetv2_100": {"pad_type": "same", "mean": [0.5] * 3, "std": [0.5] * 3}}
"""Arguments of networks whose weights come from elsewhere than timm."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder with train/ and val/")
    parser.add_argument("--features", default="mobilenetv2_100", help="a timm network")
    parser.add_argument("--weights", required=True, help="the file of its weights")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at a time, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        cells = [Cell(row, seed, options) for seed in range(options.seeds) for row in options.rows.split(",")]
        todo = [cell for cell in cells if not cell.finished()]
    except UserError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(cells), initial=len(cells) - len(todo), unit="run") as bar:
        for _ in pool.map(Cell.run, todo):
            bar.update()
    results = [cell.result() for cell in cells if cell.finished()]
    (options.out / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    print(table(results))
    failed = [cell.name for cell in cells if not cell.finished()]
    if failed:
        print(f"failed: {', '.join(failed)}; see their .log files in {options.out}", file=sys.stderr)
    return bool(failed)


class Cell:
    """One row with one seed."""

    def __init__(self, row: str, seed: int, options: argparse.Namespace):
        self.row, self.seed, self.name = row, seed, f"{row}-{seed}"
        self.out = options.out / self.name
        args = json.dumps(FEATURES.get(options.features, {}))
        self.overrides = [
            f"seed={seed}", f"data.root={options.data}", f"plugins.perceptual.network={options.features}",
            f"plugins.perceptual.pretrained={options.weights}", f"plugins.perceptual.args={args}",
            "evaluate.metrics=[psnr,ssim,usage,perplexity,fd]", f"evaluate.fd.name={options.features}", "evaluate.fd.size=null",
            f"evaluate.fd.pretrained={options.weights}", f"evaluate.fd.args={args}", *options.overrides,
        ]
        self.recipe: Recipe = load_recipe(str(HERE / f"{row}.yaml"), self.overrides)

    def finished(self) -> bool:
        if not (self.out / "metrics.json").exists():
            return False
        if changed := differences(plain(load_recipe(str(self.out / "recipe.yaml"))), plain(self.recipe))[0]:
            raise UserError(f"{self.out} holds the run of another recipe; name another --out:\n  " + "\n  ".join(changed))
        return True

    def run(self) -> None:
        command = [sys.executable, "-m", "vqzoo", "run", str(HERE / f"{self.row}.yaml"), *self.overrides, "--resume", "auto",
                   "--out", str(self.out)]
        with open(f"{self.out}.log", "w") as log:
            subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def result(self) -> dict:
        """Return the run's numbers and its recipe."""
        found = json.loads((self.out / "metrics.json").read_text())
        recipe = plain(self.recipe)
        recipe["data"].pop("root")  # where the data lie says nothing about them; the card has their fingerprint
        recipe["plugins"]["perceptual"].pop("pretrained")
        recipe["evaluate"]["fd"].pop("pretrained")
        return {"bench": "ablation", "row": self.row, "seed": self.seed, **found, "recipe": recipe}


def table(results: list[dict]) -> str:
    """Return mean ± standard deviation over seeds of each row's metrics, as Markdown."""
    frechet = next((name for name in results[0]["metrics"] if name.startswith("fd_")), "") if results else ""
    names = {"usage": 100, "perplexity": 1, "psnr": 1, "ssim": 100, frechet: 1}
    lines = [f"| row | seeds | usage % | perplexity | PSNR dB | SSIM % | {frechet.replace('_', ' ')} |", "|---" * 7 + "|"]
    for row in dict.fromkeys(result["row"] for result in results):
        found = [result["metrics"] for result in results if result["row"] == row]
        cells = []
        for name, scale in names.items():
            values = torch.tensor([scale * metrics[name] for metrics in found], dtype=torch.float64)
            spread = f" ± {values.std():.3g}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.4g}{spread}")
        lines.append(f"| {row} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
