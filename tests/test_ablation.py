"""The phase ablation's bench: its rows differ in what they say, and its Fréchet distance is one."""

import importlib.util
from pathlib import Path

import pytest

from vqzoo.recipe import difference, load_recipe, plain

BENCH = Path(__file__).resolve().parent.parent / "benchmarks" / "ablation.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("ablation", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("row, base, keys", [
    ("joint", "full", {"stages", "plugins.gan.ramp.refine"}),
    ("joint_refine", "full", {"stages"}),
    ("joint_warm_up", "full", {"stages", "plugins.gan.ramp.refine"}),
    ("dense", "joint", {"hooks.refresh_codes"}),
    ("neither", "joint", {"hooks.refresh_codes", "hooks.embedding_loss", "hooks.stage_transition"}),
])
def test_two_rows_differ_only_in_what_the_row_says(bench, row, base, keys):
    one, other = (plain(load_recipe(str(BENCH.with_suffix("") / f"{name}.yaml"))) for name in (row, base))
    assert {line.split(":")[0] for line in difference(one, other)} == keys
    assert set(bench.ROWS) == {path.stem for path in BENCH.with_suffix("").glob("*.yaml")}


def test_stages_of_all_rows_are_the_full_rows(bench):
    full = load_recipe(str(BENCH.with_suffix("") / "full.yaml")).stages
    for row in ("joint_refine", "joint_warm_up"):
        mine = load_recipe(str(BENCH.with_suffix("") / f"{row}.yaml")).stages
        for stage in mine:
            (same,) = [other for other in full if other.name == stage.name]
            assert (stage.freeze, stage.hooks) == (same.freeze, same.hooks)
            assert stage.epochs in (same.epochs, None)


def test_the_table_gives_mean_and_standard_deviation(bench):
    rows = [{"row": "full", "metrics": {"usage": usage, "perplexity": 5.0, "psnr": 20.0, "ssim": 0.5, "fd_x": 3.0}}
            for usage in (0.9, 1.0)]
    assert "| full | 2 | 95 ± 7.07 | 5 ± 0 | 20 ± 0 | 50 ± 0 | 3 ± 0 |" in bench.table(rows)


def test_a_tiny_bench_runs_and_does_not_run_again_what_is_finished(bench, small_photos, tmp_path, capsys):
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "weights.safetensors")
    tiny = ["epoch_steps=1", "epochs=3", "stages[0].epochs=1", "stages[1].epochs=1", "encoder.args.width=8",
            "decoder.args.width=8", "data.batch_size=2", "codebook.size=16", "log.images=2", "log.drift_images=2"]
    arguments = ["--data", str(small_photos), "--features", "resnet10t", "--weights", str(tmp_path / "weights.safetensors"),
                 "--rows", "full", "--seeds", "1", "--jobs", "1", "--out", str(tmp_path / "out"), *tiny]
    assert bench.main(arguments) == 0
    assert "| full | 1 |" in capsys.readouterr().out
    (result,) = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert str(small_photos) not in result and "fd_resnet10t" in result and "torch" in result
    written = (tmp_path / "out" / "full-0" / "metrics.json").stat().st_mtime_ns
    assert bench.main(arguments) == 0
    assert (tmp_path / "out" / "full-0" / "metrics.json").stat().st_mtime_ns == written
    with pytest.raises(SystemExit):  # what is there was made by another recipe
        bench.main([*arguments, "optim.lr=3e-4"])
    assert "optim.lr: 0.001 → 0.0003" in capsys.readouterr().err
