"""`vqzoo new-plugin` lays down a distribution that installs, keeps the contract and trains."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from vqzoo import cli, sources
from vqzoo.recipe import load_recipe
from vqzoo.scaffold import LAYOUT, TEMPLATE

TINY = ["epochs=1", "epoch_steps=2", "data.resolution=[32, 32]", "encoder.args.width=8", "decoder.args.width=8",
        "codebook.size=16", "log.images=2", "log.drift_images=2", "optim.warmup_steps=0"]

QUICK = "cosine or types_fit or codes_are_those"
"""The tests of the distribution that are run here; the others are those of the suite on any search."""


def lay_down(folder, name="my_vq"):
    assert cli.main(["new-plugin", name, "--dir", str(folder)]) == 0
    return folder / f"vqzoo-{name}"


def test_what_is_laid_down_installs_is_listed_and_passes_its_tests(tmp_path, monkeypatch, capsys):
    folder, site = lay_down(tmp_path / "new" / "place"), tmp_path / "site"
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(folder)], check=True, timeout=120)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "pytest", "-k", QUICK], env=environment, cwd=folder, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.syspath_prepend(str(site))
    capsys.readouterr()
    assert cli.main(["plugins", "--json"]) == 0
    (listed,) = [row for row in json.loads(capsys.readouterr().out) if row["name"] == "my_vq"]
    assert listed["problem"] is None and listed["hooks"] == {"quantize": "provides"} and listed["config"] == {"noise": 0.0}
    assert listed["distribution"].replace("_", "-") == "vqzoo-my-vq"
    sys.modules.pop("vqzoo_my_vq")


def test_its_recipe_trains_its_search_on_the_codebook_of_simvq(tmp_path, tiny_runs, monkeypatch):
    folder = lay_down(tmp_path)
    mine = EntryPoint("my_vq", "vqzoo_my_vq", sources.GROUP)
    monkeypatch.setattr(sources, "entry_points", lambda group: [*entry_points(group=group), mine])
    monkeypatch.syspath_prepend(str(folder))
    recipe = load_recipe(str(folder / "my_vq.yaml"))
    assert recipe.hooks == {"quantize": ["my_vq"]} and recipe.data.name == "photos"
    out = tmp_path / "run"
    assert cli.main(["run", str(folder / "my_vq.yaml"), *TINY, "plugins.my_vq.noise=0.1", "--out", str(out)]) == 0
    kept = json.loads((out / "tokenizer" / "config.json").read_text())
    assert kept["hooks"] == {"make_codebook": ["simvq"], "quantize": ["my_vq"]}
    sys.modules.pop("vqzoo_my_vq")


def test_a_file_begins_as_the_house_has_it_and_no_placeholder_is_left(tmp_path):
    folder = lay_down(tmp_path)
    texts = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert set(texts) == {"pyproject.toml", "vqzoo_my_vq.py", "tests/test_my_vq.py", "my_vq.yaml", "README.md", ".gitignore"}
    assert not any("$" in text for text in texts.values())
    for path in ("vqzoo_my_vq.py", "tests/test_my_vq.py"):
        compile(texts[path], path, "exec")
        assert texts[path].startswith('"""')
    assert "class MyVq(Plugin):" in texts["vqzoo_my_vq.py"]
    header = [line for line in texts["my_vq.yaml"].splitlines() if line.startswith("# ")]
    assert [line.split(":")[0] for line in header[1:5]] == ["# command", "# hardware", "# time", "# expected"]
    for lines in ('name = "vqzoo-my_vq"', 'dependencies = ["vqzoo"]', '[project.entry-points.vqzoo]\nmy_vq = "vqzoo_my_vq"'):
        assert f"\n{lines}\n" in texts["pyproject.toml"]


def test_it_says_what_to_do_next(tmp_path, capsys):
    folder = lay_down(tmp_path)
    said = capsys.readouterr().out
    for words in (f"cd {folder}", "pip install -e '.[test]'", "vqzoo plugins", "pytest", "vqzoo check-plugin my_vq",
                  "vqzoo run my_vq.yaml"):
        assert f"  {words}" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [("Mine", "such as mine"), ("my-vq", "such as my_vq"), ("MyVQ", "such as my_vq"), ("9", "begins with a letter"),
     ("", "begins with a letter"), ("a/b", "such as a_b"), ("class", "means something else"), ("yes", "means something else"),
     ("keys", "means something else"), ("table", "means something else"), ("vq", "uninstall"),
     ("plugins", "vqzoo_plugins is installed")],
)
def test_a_name_that_will_not_do_is_refused_with_the_reason(name, words, tmp_path, capsys):
    assert cli.main(["new-plugin", name, "--dir", str(tmp_path)]) == 2
    assert repr(name) in (said := capsys.readouterr().err) and words in said
    assert not list(tmp_path.iterdir())


def test_a_name_that_several_plugins_share_is_refused(tmp_path, capsys, monkeypatch):
    twice = [EntryPoint("twin", f"module{number}", sources.GROUP) for number in range(2)]
    monkeypatch.setattr(sources, "entry_points", lambda group: twice)
    assert cli.main(["new-plugin", "twin", "--dir", str(tmp_path)]) == 2
    assert "uninstall" in capsys.readouterr().err


def test_a_folder_that_is_there_is_left_alone(tmp_path, capsys):
    (tmp_path / "vqzoo-mine").mkdir()
    assert cli.main(["new-plugin", "mine", "--dir", str(tmp_path)]) == 2
    assert f"{tmp_path / 'vqzoo-mine'} is there already" in capsys.readouterr().err
    assert not list((tmp_path / "vqzoo-mine").iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["new-plugin", "mine", "--dir", str(tmp_path / "file")]) == 2
    assert f"{tmp_path / 'file' / 'vqzoo-mine'} cannot be written" in capsys.readouterr().err


def test_the_template_is_what_the_layout_names_and_is_shipped():
    assert {path.name for path in TEMPLATE.iterdir()} == set(LAYOUT)
    data = (Path(__file__).parents[1] / "setup.cfg").read_text().split("[options.package_data]")[1]
    assert "vqzoo = template/*.in" in data.split("[")[0] and all(name.endswith(".in") for name in LAYOUT)
