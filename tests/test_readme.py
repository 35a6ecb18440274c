"""README's first screen is true: its plugin trains, its commands run, its table is the zoo."""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import vqzoo
from vqzoo import cli, sources
from vqzoo.evaluation.report import table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TINY = """
epochs: 1
epoch_steps: 2
data: {name: photos, resolution: [32, 32], batch_size: 8, workers: 0}
encoder: {stride: 4, args: {width: 8, mult: [1], blocks: 1, patch: 4}}
decoder: {args: {width: 8, mult: [1], blocks: 1, patch: 4}}
codebook: {size: 16, width: 8}
log: {images: 2, drift_images: 2}
"""


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(start):
    return [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines() if line.startswith(start)]


def test_the_plugin_of_the_readme_trains(tmp_path):
    source = next(block for block in blocks("python") if "hookimpl" in block)
    body = [line for line in source.split('"""')[-1].splitlines() if line.strip()]
    assert len(body) <= 15
    (tmp_path / "cosine.py").write_text(source)
    recipe = tmp_path / "cosine.yaml"
    plugins = re.search(r"plugins: \{vq: \{\}, cosine: \{\}, pixel: \{\}\}", README)
    recipe.write_text(TINY + plugins.group())
    with sources.also([str(tmp_path / "cosine.py")]):
        assert cli.main(["run", str(recipe), "--out", str(tmp_path / "run")]) == 0
        assert vqzoo.Tokenizer.from_pretrained(tmp_path / "run").hooks.providers("quantize") == ["cosine"]


def test_the_commands_of_the_readme_run_in_their_order(tmp_path, monkeypatch, capsys, cells_here, small_photos):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "halves").symlink_to(small_photos)
    (tmp_path / "base.yaml").write_text(TINY + "plugins: {pixel: {}}\n")
    (tmp_path / "suite.yaml").write_text("base: base.yaml\njoins: {plugins: {vq: {}}}\nvariants: {vq: {plugins: {vq: {}}}}\n")
    (tmp_path / "tiny.yaml").write_text(TINY + "plugins: {vq: {}, nsvq: {}, pixel: {}}\n")
    (tmp_path / "cosine.py").write_text(next(block for block in blocks("python") if "hookimpl" in block))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 50), "teal").save(tmp_path / "photos" / "teal.png")
    names = {"bench SUITE [--quick] [--data DIR] [--plugins A,B] [--seeds N] [key=value ...] [--out DIR]":
             "bench suite.yaml --data halves --plugins vq,ema --seeds 1 --out bench ema=0.5",
             "[RECIPE]": "tiny.yaml", "RECIPE": "tiny.yaml", "[key=value ...]": "seed=1", "[--out DIR]": "--out run",
             "[--resume auto]": "--resume auto", "[--insist]": "",
             "[--json]": "--json", "RUN_OR_TOKENIZER_OR_FOLDER": "run", "RUN_OR_TOKENIZER": "run",
             "--data DIR": "--data photos",
             "[--json FILE]": "--json scores.json", "[--csv FILE]": "--csv scores.csv",
             "[--save-images DIR]": "", "[--protocol NAME]": "--protocol simvq",
             "[--metrics psnr,ssim]": "--metrics psnr,ssim", "A.json B.json": "scores.json run/metrics.json",
             "[--mixed]": "--mixed", "list|fetch|verify": "list", "[NAME ...]": "", "[--dir DIR]": "",
             "IMAGES...": "photos/teal.png", "--out DIR": "--out decoded",
             "check-plugin cosine": "check-plugin cosine --only indices_are_in_range",
             "check-plugin PLUGIN": "check-plugin vq --only indices_are_in_range",
             "new-plugin NAME": "new-plugin mine", "compose [--plugins A,B]": "compose --plugins vq,pixel"}
    lines = commands("vqzoo ")
    lines = [line for line in lines if "fd.name" not in line]  # which needs a file of weights
    assert [line.split()[1] for line in lines] == [
        "check-plugin", "run", "new-plugin", "run", "check", "eval", "compare", "weights", "encode", "decode", "plugins",
        "new-plugin", "check-plugin", "bench", "bench", "doctor"]
    for line in lines:
        for placeholder, value in names.items():
            line = line.replace(placeholder, value)
        assert cli.main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert {"recipe.yaml", "metrics.json", "reconstructions.png", "tensorboard", "checkpoints", "tokenizer", "best"} == {
        path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")
    }
    assert (tmp_path / "vqzoo-cosine" / "vqzoo_cosine.py").is_file() and (tmp_path / "vqzoo-mine" / "pyproject.toml").is_file()
    assert (tmp_path / "scores.json").is_file() and (tmp_path / "decoded" / "teal.png").is_file()


@pytest.mark.parametrize(
    ("launcher", "module", "processes"),
    [("accelerate ", "accelerate.commands.accelerate_cli", 1), ("torchrun ", "torch.distributed.run", 2)],
)
def test_the_launchers_of_the_readme_launch(launcher, module, processes, tmp_path):
    (line,) = commands(launcher)
    (tmp_path / "tiny.yaml").write_text(TINY + "plugins: {vq: {}, nsvq: {}, pixel: {}}\n")
    words = [sys.executable, "-m", module, *shlex.split(line.replace("RECIPE", "tiny.yaml"))[1:], "--out", "run"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["card"]["hardware"]["processes"] == processes


def test_the_setup_commands_are_what_make_does():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("quickstart", "test"):
        assert f"make {target}" in README and re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    assert "vqzoo run recipes/quickstart.yaml" in makefile and "make test" in (ROOT / ".ci" / "run").read_text()
    assert "pip install -e . && vqzoo run quickstart" in README and "pip install -e '.[test]' && pytest" in README


def test_the_table_is_the_zoo():
    table = README.split("## The zoo")[1].split("\n## ")[0]
    mine = {name for name, source in sources.available().items() if source.distribution == "vqzoo"}
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == mine


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_links_to_files_lead_somewhere(path):
    assert (ROOT / path).exists()


def test_the_table_of_results_is_what_was_recorded():
    (results,) = re.findall(r"\[results\]\(([^)]+)\)", README)
    rows = dict(re.findall(r"^\| `(photos128_\w+)` \| (.*) \|$", README, flags=re.MULTILINE))
    recorded = [json.loads(line) for line in (ROOT / results).read_text().splitlines()]
    assert rows.keys() == {row["recipe"] for row in recorded}
    for row in recorded:
        m = row["metrics"]
        assert rows[row["recipe"]] == f"{m['usage']:.1%} | {m['perplexity']:,.0f} | {m['psnr']:.2f} dB | {m['ssim']:.3f}"


def test_the_table_of_protocols_is_what_was_recorded():
    (results,) = re.findall(r"\[the same tokenizers by three protocols\]\(([^)]+)\)", README)
    found = {}
    for line in (ROOT / results).read_text().splitlines():
        row = json.loads(line)
        assert row["card"]["protocol"] == row["protocol"] and row["metrics"]["images"] == 1505
        found.setdefault(row["recipe"], []).append(row["metrics"])
    forms = {"psnr": "{:.2f}", "ssim": "{:.3f}", "fd_mobilenetv2_100": "{:.0f}"}
    for recipe, metrics in found.items():
        wanted = [form.format(metric[name]) for name, form in forms.items() for metric in metrics]
        assert f"| {recipe.removeprefix('photos128_')} | {' | '.join(wanted)} |" in README, recipe


def test_the_table_that_eval_prints_is_the_one_shown():
    (results,) = re.findall(r"\[the 24 Kodak\nimages\]\(([^)]+)\)", README)
    rows = {row["protocol"]: row["metrics"] for row in map(json.loads, (ROOT / results).read_text().splitlines())}
    (shown,) = blocks("text")
    assert table(rows["vqzoo"]) in shown and "24 images, 128x128 pixels, protocol vqzoo" in shown
    for name, metrics in rows.items():
        assert re.search(rf"{metrics['psnr']:.2f}( dB)? by `{name}`", README)


def test_the_table_of_the_ablation_is_what_was_recorded():
    (results,) = re.findall(r"\[18 runs\]\(([^)]+)\)", README)
    found = {}
    for line in (ROOT / results).read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["row"], []).append(row["metrics"])
    forms = {"usage": "{:.1%}", "perplexity": "{:.0f}", "psnr": "{:.2f}", "ssim": "{:.3f}", "frechet_mobilenetv2_100": "{:.0f}"}
    for row, metrics in found.items():
        (cells,) = re.findall(rf"^\| `{row}` \| [^|]+ \| (.*) \|$", README, flags=re.MULTILINE)
        for cell, (name, form) in zip(cells.split(" | "), forms.items(), strict=True):
            values = [metric[name] for metric in metrics]
            mean, spread = (form.format(x).rstrip("%") for x in (statistics.fmean(values), statistics.stdev(values)))
            assert cell.removesuffix(" dB").removesuffix("%") == f"{mean} ± {spread}", (row, name)
