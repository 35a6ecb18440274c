"""benchmarks/gpu.sh, as far as a CPU can tell: its recipes wire, and a part of it trains and leaves JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vqzoo.prepare import build, enter
from vqzoo.recipe import load_recipe

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = ["epoch_steps=1", "epochs=3", "stages[0].epochs=1", "stages[1].epochs=1", "encoder.args.width=8", "precision=no",
        "decoder.args.width=8", "data.batch_size=2", "data.resolution=[32,32]", "data.workers=0",
        "codebook={size: 16, width: 8}", "plugins.gan.layers=1", "plugins.gan.width=8", "log.images=2", "log.drift_images=2"]


@pytest.mark.parametrize("method", ["vq", "simvq", "nsvq", "simvq_nsvq"])
def test_a_method_is_compared_at_the_papers_size(method):
    path = str(BENCHMARKS / "gpu" / f"{method}.yaml")
    recipe = load_recipe(path)
    assert (recipe.codebook.size, recipe.codebook.width, recipe.epochs * recipe.epoch_steps) == (65536, 128, 2100)
    assert "lpips" not in recipe.plugins and ("nsvq" in recipe.plugins) == ("nsvq" in method)
    recipe = load_recipe(path, [word for word in TINY if len(recipe.stages) > 1 or not word.startswith("stages")])
    tokenizer = build(recipe)
    for number in range(len(recipe.stages)):
        enter(tokenizer, recipe, number)


def test_the_script_trains_and_leaves_its_results(small_photos, tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path), "DATA": str(small_photos), "CUDA_VISIBLE_DEVICES": "",
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "train", "nsvq", *TINY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "nsvq.json").read_text())["run"]["step"] == 3 and (tmp_path / "nsvq.png").exists()
    assert json.loads((tmp_path / "nsvq_eval.json").read_text())["metrics"]["images"] == 7


def test_the_script_says_how_to_use_it(tmp_path):
    done = subprocess.run(["bash", str(BENCHMARKS / "gpu.sh"), "trian"], env={**os.environ, "OUT": str(tmp_path / "out")},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "gpu.sh check" in done.stdout and not (tmp_path / "out").exists()
