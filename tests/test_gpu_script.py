"""benchmarks/gpu.sh, as far as a CPU can tell: its suites wire, and a part of it trains and leaves JSON."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vqzoo.bench.cells import plan, read_rows
from vqzoo.bench.suite import load_suite
from vqzoo.prepare import build, enter

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.sh"
TINY = ["epochs=2", "data.batch_size=2", "data.resolution=[32,32]", "data.workers=0", "codebook={size: 16, width: 8}",
        "precision=no", "encoder.args.width=8", "decoder.args.width=8", "plugins.gan.layers=1", "plugins.gan.width=8",
        "log.images=2"]


def test_methods_are_compared_at_the_papers_size(small_photos, tmp_path):
    for quick, width, steps in ((False, 128, 2100), (True, 64, 1050)):
        cells = plan(load_suite("headline", quick=quick, seeds=1), [], str(small_photos), tmp_path, {})
        recipes = {cell.variant: cell.recipe for cell in cells}
        assert list(recipes) == ["vq", "simvq", "nsvq", "simvq_nsvq"]
        for method, recipe in recipes.items():
            assert (recipe.codebook.size, recipe.codebook.width, recipe.encoder.args["width"]) == (65536, 128, width)
            assert recipe.epochs * recipe.epoch_steps == steps
            assert "lpips" not in recipe.plugins and ("nsvq" in recipe.plugins) == ("nsvq" in method)


@pytest.mark.parametrize("variant", ["vq", "simvq", "nsvq", "simvq_nsvq"])
def test_every_stage_of_a_method_wires(variant, small_photos, tmp_path):
    words = [word for word in TINY if not word.startswith("epochs")]
    (cell,) = plan(load_suite("headline", variant, seeds=1), words, str(small_photos), tmp_path, {})
    tokenizer = build(cell.recipe)
    for number, stage in enumerate(cell.recipe.stages):
        enter(tokenizer, cell.recipe, number)
        assert any(p.requires_grad for p in tokenizer.encoder.parameters()) == (not stage.freeze)
    assert tokenizer.hooks.providers("discriminator_loss") == ["gan"]  # which is there at the end


def test_the_script_trains_and_leaves_its_results(small_photos, tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "DATA": str(small_photos), "CUDA_VISIBLE_DEVICES": "",
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), "headline", "--plugins", "simvq", "--seeds", "1", "--steps", "2", *TINY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(tmp_path / "out" / "headline.jsonl")
    assert row["status"] == "finished" and row["values"]["steps"] == 2 and row["values"]["images"] == 7
    assert "simvq" in (tmp_path / "out" / "headline.html").read_text()


def test_the_script_says_how_to_use_it(tmp_path):
    done = subprocess.run(["bash", str(SCRIPT), "trian"], env={**os.environ, "OUT": str(tmp_path / "out")},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "gpu.sh check" in done.stdout and not (tmp_path / "out").exists()
