"""Suites that train: what they refuse, what they run again and what not, and that all variants begin alike."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from vqzoo import Interrupted, UserError, cli
from vqzoo.bench import train, workers
from vqzoo.bench.cells import initial_network, plan, read_rows
from vqzoo.bench.suite import load_suite, shipped
from vqzoo.recipe import load_recipe

SUITE = """
about: tiny
base: tiny.yaml
baseline: vq
joins: {plugins: {vq: {}}}
variants:
  vq: {plugins: {vq: {}}}
  simvq: {plugins: {simvq: {}}}
groups:
  alike: {match: codebook_size, variants: [vq, simvq]}
metrics: [psnr, usage]
columns: [psnr, usage]
seeds: 1
budget: {steps: 4}
quick: {leaves_out: half of it, budget: {steps: 2}, variants: [vq]}
"""
BASE = """
epochs: 2
ema: 0.9
data: {name: photos, resolution: [32, 32], batch_size: 4, workers: 0}
encoder: {stride: 8, args: {width: 4, mult: [1], blocks: 1, patch: 8}}
decoder: {args: {width: 4, mult: [1], blocks: 1, patch: 8}}
codebook: {size: 16, width: 4}
plugins: {pixel: {}}
log: {steps: 2, images: 2, drift_images: 2}
evaluate: {epochs: 2, images: 4}
checkpoint: {keep_best: false}
"""
MINE = '''
from vqzoo import Plugin, hookimpl


class Mine(Plugin):
    """Mine: an estimator of one's own."""

    @hookimpl
    def straight_through(self, latents, codes):
        return latents + (codes - latents).detach()
'''


@pytest.fixture
def suite(tmp_path):
    """Return the path of a tiny suite."""
    (tmp_path / "tiny.yaml").write_text(BASE)
    (tmp_path / "suite.yaml").write_text(SUITE)
    return tmp_path / "suite.yaml"


@pytest.fixture
def here(tiny_runs, cells_here):
    """Run cells in this process, as if on a machine without a GPU."""


def bench(*words):
    return cli.main(["bench", *map(str, words)])


def rows(out):
    return {(row["variant"], row["seed"]): row for row in read_rows(out / "results.jsonl")}


# ---- suites are data


@pytest.mark.parametrize(("name", "quick"), [(name, True) for name in sorted(shipped())] + [("quantizers", False)])
def test_every_cell_of_a_shipped_suite_has_a_recipe(name, quick, small_photos, tmp_path):
    suite = load_suite(name, quick=quick)
    assert load_suite(name).quick is None
    assert suite.config.about and (suite.quick is None) == (not quick)
    if suite.config.kind == "train":
        cells = plan(suite, [], str(small_photos), tmp_path, {})
        assert len(cells) == len(suite.variants) * max(1, len(suite.points)) * suite.seeds
        assert len({cell.folder for cell in cells}) == len(cells)
        for title, table in suite.tables().items():
            sizes = {cell.recipe.codebook.size for cell in cells if cell.variant in table.variants and cell.point is None}
            assert "codebook_size" not in table.matches or len(sizes) == 1, title
        steps = {cell.recipe.epochs * (cell.recipe.epoch_steps or 0) for cell in cells if not suite.points}
        assert len(steps) <= 1


def test_the_suite_of_quantizers_has_every_plugin_that_serves_a_codebook(tmp_path):
    from vqzoo.sources import available, offered_hooks

    hooks = {"make_codebook", "quantize", "straight_through", "embedding_loss", "refresh_codes"}
    wanted = {name for name, source in available().items()
              if source.distribution == "vqzoo" and hooks & set(offered_hooks(source.load()))} | {"kmeans"}
    used = {plugin for cell in plan(load_suite("quantizers"), [], None, tmp_path, {}) for plugin in cell.recipe.plugins}
    assert wanted <= used


@pytest.mark.parametrize(("text", "named"), [
    ("kind: race", "kind: 'race'"),
    ("variants: {vq: 3}", "variants.vq"),
    ("varants: {}", "varants: unknown key"),
    ("baseline: nope", "baseline: there is no variant 'nope'"),
    ("groups: {all: {variants: [vq, nope]}}", "groups.all.variants"),
    ("budget: {steps: 0}", "budget: steps 0"),
    ("budget: {steps: 2, seconds: 3}", "two budgets"),
    ("seeds: none", "seeds"),
    ("variants: {vq: {plugins: {vq: {}}, at: {big: {}}}}", "variants.vq.at.big"),
    ("quick: {points: [big]}", "quick.points"),
    ("base: '${oc.env:HOME}'", "not allowed"),
    ("base: nowhere.yaml", "nowhere.yaml"),
    ("variants: {}", "variants: names none"),
    ("variants: {vq: {base: 3}}", "variants.vq.base"),
    ("variants: {vq: {seed: 3}}", "variants.vq.seed"),
    ("variants: {vq: {at: 3}}", "variants.vq.at"),
    ("{axis: x, points: {a: 3}}", "points.a"),
    ("points: {a: {}}", "axis and points"),
    ("groups: {all: {match: codes, variants: [vq]}}", "groups.all.match"),
    ("columns: [psnr, usge]", "columns: 'usge' is not measured"),
    ("joins: {plugins: [vq]}", "joins.plugins"),
    ("quality: pnsr", "quality: 'pnsr' is not measured"),
    ("variants: {vq: {plugins: {vq: {weigth: 3}}}}", "variants.vq"),
    ("budget: {steps: 3}", "3 steps do not divide into the 2 epochs"),
    ("metrics: [psnrr]", "psnrr"),
    ("- a list", "a suite is a mapping"),
    ("a: [", "plain YAML"),
])
def test_a_mistake_in_a_suite_is_named_before_anything_runs(suite, tmp_path, capsys, text, named):
    import yaml

    try:
        content = {**yaml.safe_load(SUITE), **yaml.safe_load(text)}
        if "variants" in content and set(content["variants"]) != {"vq", "simvq"}:
            content.pop("groups")
        content.pop("quick") if "quick" not in text else None
    except (TypeError, yaml.YAMLError, ValueError):
        content = None
    suite.write_text(yaml.safe_dump(content) if content else text)
    assert bench(suite, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert named in said and ("suite.yaml" in said or "budget" in said)
    assert not (tmp_path / "out" / "cells").exists()


@pytest.mark.parametrize(("words", "named"), [
    (["seed=3"], "see --seeds"),
    (["epoch_steps=3"], "see --steps or --seconds"),
    (["--plugins", "vq,nope"], "'nope' is neither a variant of the suite nor an installed plugin"),
    (["--seeds", "0"], "seeds: 0"),
    (["--steps", "2", "--seconds", "3"], "two budgets"),
    (["--also", "nowhere.jsonl"], "nowhere.jsonl"),
    (["codebook.sise=3"], "codebook.sise"),
    (["--json", "x"], "--json"),
    (["--jobs", "0"], "--jobs"),
    (["--baseline", "nope"], "--baseline: 'nope'"),
    (["--seconds", "inf"], "finite"),
])
def test_a_mistake_on_the_command_line_is_named(suite, tmp_path, capsys, words, named):
    assert bench(suite, "--out", tmp_path / "out", *words) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "out" / "cells").exists()


def test_a_suite_without_a_short_form_says_so(suite, capsys):
    suite.write_text(SUITE.replace("quick:", "# quick:"))
    assert bench(suite, "--quick") == 2 and "--quick" in capsys.readouterr().err


def test_what_is_laid_over_comes_in_the_order_that_is_promised(suite, tmp_path):
    suite.write_text(SUITE + """
recipe: {codebook: {size: 17, width: 5}, optim: {lr: 0.5}}
axis: codes
points: {few: {codebook: {size: 18}}, many: {codebook: {size: 19}}}
""")
    suite.write_text(suite.read_text().replace("simvq: {plugins: {simvq: {}}}", "simvq: {plugins: {simvq: {}}, "
                                               "optim: {lr: 0.25}, at: {many: {codebook: {size: 20}}}}"))
    cells = {(cell.variant, cell.point): cell.recipe for cell in plan(load_suite(str(suite)), ["ema=0.5"], None, tmp_path, {})}
    assert {key: recipe.codebook.size for key, recipe in cells.items()} == {
        ("vq", "few"): 18, ("vq", "many"): 19, ("simvq", "few"): 18, ("simvq", "many"): 20}
    assert {recipe.codebook.width for recipe in cells.values()} == {5} and cells["vq", "few"].ema == 0.5
    assert (cells["vq", "few"].optim.lr, cells["simvq", "few"].optim.lr) == (0.5, 0.25)


# ---- alike at the start


@pytest.mark.parametrize("quantizer", ["simvq: {}", "fsq: {levels: [4, 4]}", "residual: {depth: 2}",
                                       "factorized: {dimension: 3}, vq: {}"])
def test_all_variants_of_a_seed_begin_with_the_same_network(tmp_path, quantizer):
    def network(plugins, seed=0):
        (tmp_path / "one.yaml").write_text(BASE.replace("pixel: {}", f"pixel: {{}}, {plugins}"))
        return initial_network(load_recipe(str(tmp_path / "one.yaml"), [f"seed={seed}"]))

    assert network(quantizer) == network("vq: {}") != network("vq: {}", seed=1)


# ---- running


def test_a_suite_runs_is_not_run_again_and_takes_in_who_joins(suite, here, tmp_path, capsys):
    out = tmp_path / "out"
    assert bench(suite, "--out", out) == 0
    first = capsys.readouterr()
    assert "[2/2]" in first.err and "PSNR" in first.out
    found = rows(out)
    assert set(found) == {("vq", 0), ("simvq", 0)}
    row = found["simvq", 0]
    assert row["status"] == "finished" and row["values"]["steps"] == 4 and row["curves"]["codes/usage"]
    assert row["card"]["protocol"] == "vqzoo" and row["hardware"]["jobs"] and "torch" in row["versions"]
    assert row["initial_network"] == found["vq", 0]["initial_network"] and len(row["recipe_sha256"]) == 64
    assert {"report.md", "report.html", "results.jsonl", "speed.json", "tensorboard"} <= {path.name for path in out.iterdir()}
    (tmp_path / "mine.py").write_text(MINE)
    before = (out / "cells" / "vq-0" / "log.txt").stat().st_mtime_ns
    assert bench(suite, "--out", out, "--plugins", "vq,mine", "--plugin-file", tmp_path / "mine.py") == 0
    again = capsys.readouterr()
    assert "1 of 2 cells are done already" in again.err and before == (out / "cells" / "vq-0" / "log.txt").stat().st_mtime_ns
    assert set(rows(out)) == {("vq", 0), ("simvq", 0), ("mine", 0)}
    assert all(name in again.out and name in (out / "report.md").read_text() for name in ("simvq", "mine"))
    assert bench(suite, "--out", out, "--baseline", "simvq") == 0 and "difference to simvq" in capsys.readouterr().out
    assert rows(out)["mine", 0]["recipe"]["plugins"].keys() == {"pixel", "vq", "mine"}
    assert bench(suite, "--out", out, "optim.lr=0.5") == 2  # another recipe
    assert "optim.lr" in capsys.readouterr().err


def test_a_cell_that_fails_is_shown_and_stops_no_other(suite, here, tmp_path, capsys):
    (tmp_path / "faulty.py").write_text(MINE.replace("Mine", "Faulty").replace(
        "return latents + (codes - latents).detach()", "assert not latents.requires_grad, 'at odds'\n        return codes"))
    out = tmp_path / "out"
    assert bench(suite, "--out", out, "--plugins", "faulty,vq", "--plugin-file", tmp_path / "faulty.py") == 1
    said = capsys.readouterr()
    assert "FAILED" in said.err and "at odds" in said.out
    assert rows(out)["faulty", 0]["status"] == "failed" and rows(out)["vq", 0]["status"] == "finished"
    assert "at odds" in rows(out)["faulty", 0]["error"] and "at odds" in (out / "report.md").read_text()
    # Mended, it goes on; and what is changed once more runs again, since its results are of other code.
    for text in (MINE.replace("Mine", "Faulty"), MINE.replace("Mine", "Faulty") + "# changed"):
        (tmp_path / "faulty.py").write_text(text)
        assert bench(suite, "--out", out, "--plugins", "faulty,vq", "--plugin-file", tmp_path / "faulty.py") == 0
        version = hashlib.sha256(text.encode()).hexdigest()[:12]
        assert version in rows(out)["faulty", 0]["versions"]["plugin faulty"] and rows(out)["faulty", 0]["status"] == "finished"
    assert "its plugin has changed, so it runs again" in capsys.readouterr().err


def test_seeds_of_two_versions_of_a_plugin_are_not_averaged(suite, here, tmp_path, capsys):
    words = ["--out", tmp_path / "out", "--plugins", "mine", "--plugin-file", tmp_path / "mine.py"]
    (tmp_path / "mine.py").write_text(MINE)
    assert bench(suite, *words, "--seeds", "2") == 0
    (tmp_path / "mine.py").write_text(MINE + "# changed")
    assert bench(suite, *words) == 2 and "version of plugin mine" in capsys.readouterr().err
    assert bench(suite, *words, "--seeds", "2") == 0


def test_who_joins_is_in_the_tables_that_compare_alike_and_two_of_the_same_are_one(tmp_path):
    tables = load_suite("quantizers", "vq,simvq,rotation+ema,continuous").tables()
    assert {title: group.variants for title, group in tables.items()} == {
        "1,024 codes, 10 bits per token": ["vq", "simvq", "rotation+ema"], "no quantization": ["vq", "continuous"]}
    assert tables["1,024 codes, 10 bits per token"].matches == ["codebook_size", "bits_per_token"]
    assert list(load_suite("quantizers").tables()) == ["1,024 codes", "10 bits per token", "no quantization"]
    assert load_suite("quantizers", "vq").tables()["1,024 codes, 10 bits per token, no quantization"].variants == ["vq"]


@pytest.mark.parametrize("words", [["optim.lr=0.5"], ["evaluate.images=2"], ["--data", "OTHER"], ["log.steps=1"]])
def test_a_result_that_was_made_otherwise_is_not_shown_as_this_one(suite, here, small_photos, tmp_path, capsys, words):
    (tmp_path / "other").mkdir()
    for split in ("train", "val"):
        (tmp_path / "other" / split).symlink_to(small_photos / split)
    (tmp_path / "fewer").mkdir()
    for split in ("train", "val"):
        (tmp_path / "fewer" / split).mkdir()
        for file in sorted((small_photos / split).iterdir())[: 12 if split == "train" else None]:
            (tmp_path / "fewer" / split / file.name).symlink_to(file)
    given = ["--data", tmp_path / "other"] if "OTHER" in words else []
    assert bench(suite, "--out", tmp_path / "out", "--plugins", "vq", *given) == 0
    words = [tmp_path / "fewer" if word == "OTHER" else word for word in words]
    assert bench(suite, "--out", tmp_path / "out", *words) == 2
    assert "vq, seed 0 was made otherwise" in capsys.readouterr().err and set(rows(tmp_path / "out")) == {("vq", 0)}


def test_results_beside_which_others_were_trained_otherwise_are_refused(suite, here, tmp_path, capsys):
    assert bench(suite, "--out", tmp_path / "a", "--plugins", "vq", "optim.lr=0.5") == 0
    assert bench(suite, "--out", tmp_path / "b", "--plugins", "simvq", "--also", tmp_path / "a") == 2
    assert "--also: vq was trained otherwise" in capsys.readouterr().err
    assert bench(suite, "--out", tmp_path / "b", "--plugins", "simvq", "--also", tmp_path / "a", "--mixed") == 0


def test_two_cells_do_not_share_a_folder(suite, tmp_path, capsys):
    text = SUITE.replace("simvq: {plugins: {simvq: {}}}", "vq-1: {plugins: {simvq: {}}}").replace("[vq, simvq]", "[vq]")
    suite.write_text(text + "axis: x\npoints: {2: {}, 1-2: {}}\n")
    assert bench(suite, "--out", tmp_path / "out") == 2
    assert "would share the folder vq-1-2-0" in capsys.readouterr().err


def test_an_interrupted_suite_saves_and_goes_on(suite, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "vqzoo", "bench", str(suite), "--out", str(out), "--jobs", "1", "--plugins", "vq",
               "--steps", "40000"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    log, end = out / "cells" / "vq-0" / "log.txt", time.monotonic() + 60
    while time.monotonic() < end and not (log.exists() and "/40000" in log.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "goes on" in said, said
    assert list((out / "cells" / "vq-0" / "run" / "checkpoints").glob("step_*"))  # it was saved
    assert not (out / "results.jsonl").exists()


def test_what_has_ended_before_an_interruption_is_reported(suite, here, monkeypatch, tmp_path, capsys):
    run = workers.run

    def interrupted(cells, *more):
        run(cells[:1], *more)
        raise Interrupted("a signal", signal.SIGTERM)

    monkeypatch.setattr(workers, "run", interrupted)
    assert bench(suite, "--out", tmp_path / "out") == 143
    assert "report.html tells of the 1 cells that have ended" in capsys.readouterr().err
    assert "vq" in (tmp_path / "out" / "report.md").read_text() and set(rows(tmp_path / "out")) == {("vq", 0)}


def test_a_folder_is_kept_for_one_bench_and_free_after_it(suite, here, monkeypatch, tmp_path, capsys):
    out, measure = tmp_path / "out", train.Bench.measure

    def beside(self):
        assert bench(suite, "--out", out) == 2
        measure(self)

    monkeypatch.setattr(train.Bench, "measure", beside)
    assert bench(suite, "--out", out, "--plugins", "vq") == 0
    assert "in use by another" in capsys.readouterr().err
    monkeypatch.setattr(train.Bench, "measure", measure)
    assert bench(suite, "--out", out, "--plugins", "vq") == 0


def test_another_machines_cells_are_refused_or_marked(suite, here, tmp_path, capsys):
    out = tmp_path / "out"
    assert bench(suite, "--out", out, "--plugins", "vq") == 0
    (row,) = read_rows(out / "results.jsonl")
    row["hardware"]["device"] = "another"
    (out / "results.jsonl").write_text(json.dumps(row) + "\n")
    capsys.readouterr()
    assert bench(suite, "--out", out) == 2
    assert "another" in capsys.readouterr().err
    other = tmp_path / "other"
    assert bench(suite, "--out", other, "--plugins", "simvq", "--also", out) == 2
    assert "--mixed" in capsys.readouterr().err and (other / "results.jsonl").exists()  # nothing is lost
    assert bench(suite, "--out", other, "--plugins", "simvq", "--also", out, "--mixed") == 0
    assert "another" in (other / "report.md").read_text()


def test_a_budget_of_seconds_becomes_steps_that_are_timed_once_for_a_recipe(suite, here, monkeypatch, tmp_path):
    timed = []
    monkeypatch.setattr(train.Bench, "_step_seconds", lambda self, cell: timed.append(cell.variant) or
                        {"vq": 0.5, "simvq": 1.0}[cell.variant])
    for _ in range(2):
        assert bench(suite, "--out", tmp_path / "out", "--seconds", "4") == 0
    assert timed == ["vq", "simvq"]
    found = rows(tmp_path / "out")
    assert (found["vq", 0]["values"]["steps"], found["simvq", 0]["values"]["steps"]) == (8, 4)
    assert found["vq", 0]["budget"]["seconds"] == 4
    assert bench(suite, "--out", tmp_path / "out", "--seconds", "8") == 2  # 16 steps are not 8, and were timed already
    assert bench(suite, "--out", tmp_path / "other", "--seconds", "8", "optim.lr=0.5", "--plugins", "vq") == 0
    assert timed == ["vq", "simvq", "vq"]


def test_one_whose_steps_cannot_be_timed_is_a_failed_cell(suite, here, monkeypatch, tmp_path, capsys):
    def seconds(self, cell):
        if cell.variant == "vq":
            raise train.Failed("at odds")
        return 1.0

    monkeypatch.setattr(train.Bench, "_step_seconds", seconds)
    assert bench(suite, "--out", tmp_path / "out", "--seconds", "4") == 1
    found = rows(tmp_path / "out")
    assert (found["vq", 0]["status"], found["vq", 0]["error"], found["simvq", 0]["status"]) == ("failed", "at odds", "finished")
    assert "at odds" in capsys.readouterr().out


def test_steps_are_timed_by_two_runs(suite, here, tmp_path):
    options = SimpleNamespace(overrides=[], data=None, also=[], mixed=False, plugin_file=[])
    chosen = load_suite(str(suite), "vq")
    (cell,) = plan(chosen, [], None, tmp_path / "out", {})
    seconds = train.Bench(chosen, options, tmp_path / "out", [cell], workers.Places(2, 1, []))._step_seconds(cell)
    assert 1e-4 <= seconds < 5


def test_a_folder_of_another_suite_or_in_use_is_refused(suite, here, tmp_path, capsys):
    out = tmp_path / "out"
    assert bench(suite, "--out", out, "--plugins", "vq") == 0
    (tmp_path / "second.yaml").write_text(SUITE)
    assert bench(tmp_path / "second.yaml", "--out", out) == 2 and "suite" in capsys.readouterr().err
    (out / "results.jsonl").write_text("{}\n")
    assert bench(suite, "--out", out) == 2 and "results.jsonl" in capsys.readouterr().err


def test_tensorboard_has_a_table_of_hyperparameters(suite, here, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert bench(suite, "--out", tmp_path / "out", "--plugins", "simvq") == 0
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard" / "simvq-0")).Reload()
    assert "final/psnr" in events.Tags()["scalars"]
    assert any("hparams" in tag for tag in events.summary_metadata)


# ---- places


def test_cells_take_gpus_in_turn_and_share_the_cores(monkeypatch):
    monkeypatch.setattr(workers, "_gpus", lambda: ["3", "5"])
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(8)))
    assert workers.Places.of(None) == workers.Places(2, 4, ["3", "5"])
    assert workers.Places.of(4) == workers.Places(4, 2, ["3", "5"])
    monkeypatch.setattr(workers, "_gpus", lambda: [])
    assert workers.Places.of(None) == workers.Places(8, 1, [])


def test_the_end_of_a_log_is_a_traceback_or_the_message(tmp_path):
    (tmp_path / "log").write_text("step 1\nvqzoo: old\nstep 2\nTraceback (most recent call last):\n  x\nValueError: no\n")
    assert workers.last_lines(tmp_path / "log").startswith("Traceback")
    (tmp_path / "log").write_text("step 1\nvqzoo: NonFiniteError: loss\n")
    assert workers.last_lines(tmp_path / "log") == "vqzoo: NonFiniteError: loss"
    assert workers.last_lines(Path(tmp_path / "none")) == ""


def test_a_user_error_in_a_suite_is_one(tmp_path):
    with pytest.raises(UserError, match="no shipped suite"):
        load_suite("quantiser")
