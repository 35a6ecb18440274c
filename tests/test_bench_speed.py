"""Speed suites at toy size: what is timed is a training step's, who fails or is missing is named, and the JSON has it all."""

import json
import os
import sys
from argparse import Namespace

import pytest
import torch

from vqzoo import Plugin, UserError, hookimpl, sources
from vqzoo.bench import clock, peers, speed
from vqzoo.bench.clock import Conditions
from vqzoo.bench.suite import load_suite

TINY = """
epochs: 1
data: {name: folder, root: NOWHERE, resolution: [16, 16], batch_size: 3, workers: 0}
encoder: {stride: 4, args: {width: 8, mult: [1], blocks: 1, patch: 4}}
decoder: {args: {width: 8, mult: [1], blocks: 1, patch: 4}}
codebook: {size: 24, width: 6}
plugins: {pixel: {}}
"""
N, K, D = 3 * 16, 24, 6

SUITE = """
kind: speed
base: tiny.yaml
baseline: vq
joins: {plugins: {vq: {}}}
variants:
  vq: {plugins: {vq: {init: normal}}}
  fsq: {plugins: {fsq: {levels: [6, 4]}}}
  late: {plugins: {vq: {}, late: {}}}
  nobody: {plugins: {a_plugin_that_is_not_there: {}}}
sizes: {n: [96], k: [48]}
quick: {leaves_out: nearly all, variants: [vq], sizes: {n: [], k: [], d: []}}
"""


class Late(Plugin):
    """Late: breaks on the second image of a batch, which no rehearsal has."""

    @hookimpl
    def quantize(self, latents, codebook):
        raise ArithmeticError("too late")


@pytest.fixture(autouse=True)
def brief(tiny_runs, monkeypatch):
    for name in ("ROUNDS", "QUICK_ROUNDS", "FEWER"):
        monkeypatch.setattr(speed, name, 2)
    monkeypatch.setattr(clock, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(speed, "apart", lambda device, *call: 12_345)


@pytest.fixture
def quantizing(recipe, tmp_path):
    def make(plugins, *overrides):
        made = recipe(TINY, *(f"plugins.{plugin}" for plugin in plugins), *overrides)
        return speed.Quantizing(speed.at_hand(made, tmp_path), tmp_path / "run", 0)

    return make


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "tiny_speed.yaml").write_text(SUITE)
    with sources.also(classes={"late": Late}):
        yield lambda **how: load_suite(str(tmp_path / "tiny_speed.yaml"), **how)


def told(capsys, suite, *overrides, out=None):
    status = speed.speed(suite, Namespace(overrides=list(overrides), out=out))
    shown = capsys.readouterr().out
    return status, shown, json.loads(shown.splitlines()[-1])


# ---- what is timed


def test_the_gradients_are_those_of_a_training_step(quantizing):
    made = quantizing(["vq={init: normal, commitment_weight: 0.5}", "nsvq={weight: 0}"])
    made.work().step()
    latents = made.features.detach()
    codes = made.output.codes.transpose(1, 2).unflatten(2, latents.shape[2:]).detach()
    assert torch.allclose(codes, made.output.reconstructions.detach(), atol=1e-6) and not torch.allclose(codes, latents)
    through = made.gradient + 0.5 * 2 * (latents - codes) / latents.numel()
    assert torch.allclose(made.features.grad, through, atol=1e-9)
    assert made.tokenizer.codebook.weight.grad.abs().sum() > 0
    made.reset()
    assert made.features.grad is made.tokenizer.codebook.weight.grad is None


def test_a_refresh_moves_codes_and_counts_them(quantizing):
    made = quantizing(["vq={}", "ema={}"])
    work = made.work()
    before, counts = made.tokenizer.codebook.table.clone(), made.trainer.tally.counts.clone()
    made.forward()
    made.backward()
    assert torch.equal(before, made.tokenizer.codebook.table)
    work.parts["refresh"]()
    assert not torch.equal(before, made.tokenizer.codebook.table)
    assert (made.trainer.tally.counts - counts).sum() == N


def test_features_have_the_scale_of_the_codes_where_they_share_a_space(quantizing, tmp_path):
    made = quantizing(["vq={init: uniform}"])
    assert made.features.std().item() == pytest.approx(1 / K / 3**0.5, rel=0.2)


def test_encoding_is_evaluations_and_missing_where_nothing_is_discrete(quantizing):
    work = quantizing(["vq={}"]).work()
    assert list(work.parts) == ["encode", "forward", "backward", "refresh"] and work.size == {"n": N, "k": K, "d": D}
    assert work.parts["encode"]().shape == (3, 4, 4)


def test_without_indices_there_is_nothing_to_encode_with(quantizing):
    work = quantizing(["vq={}", "continuous={}"]).work()
    assert list(work.parts) == ["forward", "backward", "refresh"]


def test_a_stage_that_freezes_the_encoder_and_losses_on_images_are_no_obstacle(quantizing):
    frozen = "stages=[{name: joint, epochs: 1}, {name: frozen, freeze: ['encoder.*'], hooks: {refresh_codes: []}}]"
    made = quantizing(["vq={}"], "epochs=2", frozen, "optim.scale={'encoder.*': 0.1}", "compile=true", "accumulate=3")
    assert made.work().size["n"] == 16  # a micro-batch


# ---- side by side


def test_recipes_are_timed_side_by_side_and_a_broken_one_is_kept_with_its_error(recipe):
    plugins = {"vq": ["vq={}"], "late": ["vq={}", "late={}"], "continuous": ["vq={}", "continuous={}"]}
    with sources.also(classes={"late": Late}):
        recipes = {name: recipe(TINY, *(f"plugins.{one}" for one in them)) for name, them in plugins.items()}
        found = speed.quantizer_times(recipes, "cpu", rounds=3, seed=0)
    assert list(found) == ["vq", "vq again", "late", "continuous"]
    assert found["vq"]["ratio"] == found["vq"]["ratio_low"] == 1 and found["vq again"]["ratio"] > 0
    assert set(found["late"]) == {"failed"} and "late" in found["late"]["failed"] and "too late" in found["late"]["failed"]
    for name in ("vq", "continuous"):
        row = found[name]
        assert row["rounds"] == 3 and row["bytes"] == 12_345 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert all(ms > 0 for ms in row["parts"].values()) and ("encode" in row["parts"]) == (name == "vq")


def test_memory_that_cannot_be_measured_is_no_reason_to_lose_the_times(recipe, monkeypatch):
    def broken(device, function, *arguments):
        raise OSError("no processes left")

    monkeypatch.setattr(speed, "apart", broken)
    row = speed.quantizer_times({"vq": recipe(TINY, "plugins.vq={}")}, "cpu", rounds=1, seed=0)["vq"]
    assert row["bytes"] is None and "no processes left" in row["memory"] and row["ms"] > 0


def test_memory_is_that_of_a_step(recipe, tmp_path):
    with sources.also(classes={"late": Late}):
        made = recipe(TINY, "plugins.vq={}", "data.batch_size=64", "codebook={size: 65536, width: 32}")
        text, given, seed = speed._sent(speed.at_hand(made, tmp_path), Conditions())
        assert [source.name for source in given] == ["late"]  # which the other process must be told
    gradient = 65536 * 32 * 4
    assert gradient < speed.peak_of_quantizing(text, given, seed) < 12 * gradient


def test_what_is_measured_apart_is_in_a_process_of_its_own_and_its_errors_are_here():
    assert clock.apart("cpu", os.getpid) != os.getpid() == clock.apart("cuda", os.getpid)
    with pytest.raises(ValueError):
        clock.apart("cpu", int, "seven")


def test_whole_steps_are_the_trainers(recipe):
    recipes = {name: recipe(TINY, f"plugins.{name}={{}}", "codebook.size=16") for name in ("vq", "simvq")}
    found = speed.training_times(recipes, Conditions(rounds=2), count=2)
    assert list(found) == ["vq", "vq again", "simvq"]
    assert all(row["images_per_second"] == pytest.approx(3000 / row["step_ms"]) for row in found.values())
    assert found["vq"]["step_ms"] == found["vq"]["ms"] / 2 and found["simvq"]["bytes"] == 12_345


@pytest.mark.parametrize("name", list(peers.quantizers()))
def test_a_peer_trains(name):
    method = peers.quantizers()[name]
    if method.missing():
        pytest.skip(f"{method.package} is not installed")
    work = speed._peer(method, (2, 6, 4, 4), 24, Conditions())
    work.step()
    assert list(work.parts) == ["forward", "backward"] and work.size == {"n": 32, "k": 24, "d": 6}


# ---- how times grow


def test_exponents_are_those_of_the_times_along_one_axis_at_a_time(recipe, monkeypatch):
    asked = []

    def times(recipes, how, floors=None, memory=True):
        n, k, d = speed.size_of(recipes["vq"])
        asked.append((n, k, d))
        return {"vq": {"n": n, "k": k, "d": d, "ms": 1e-3 * n * k**0.5 * d**2}, "fixed": {"failed": "no"}}

    monkeypatch.setattr(speed, "_quantizer_times", times)
    recipes = {"vq": recipe(TINY, "plugins.vq={}")}
    centre = times(recipes, None)
    grown = speed.scaling(recipes, {"n": [N, 96, 160], "k": [12, 96], "d": [3, 12]}, Conditions(), {}, centre)
    assert asked == [(N, K, D), (96, K, D), (160, K, D), (N, 12, D), (N, 96, D), (N, K, 3), (N, K, 12)]
    assert grown["exponents"]["vq"] == pytest.approx({"n": 1, "k": 0.5, "d": 2, "r2": 1})
    assert set(grown["exponents"]["fixed"].values()) == {None}


def test_tokens_must_make_whole_images(recipe):
    with pytest.raises(UserError, match="sizes.n: 40 tokens are no whole number of images of 16 tokens"):
        speed.sized(recipe(TINY, "plugins.vq={}"), "n", 40)


def test_as_many_points_as_unknowns_prove_no_power_law():
    assert clock.fit([(1, 1, 1, 2.0), (2, 1, 1, 3.0)])["r2"] is None


# ---- the suite


def test_a_suite_ends_in_json_that_has_it_all_and_fails_for_who_failed(suite, capsys, monkeypatch, tmp_path):
    for module in peers.MODULES.values():
        monkeypatch.setitem(sys.modules, module, None)
    status, shown, row = told(capsys, suite(), "seed=3", out=tmp_path / "out")
    assert status == 1 and json.loads((tmp_path / "out" / "results.jsonl").read_text()) == row
    assert row["size"] == {"n": N, "k": K, "d": D} and (row["baseline"], row["seed"], row["threads"]) == ("vq", 3, 1)
    assert row["hardware"]["threads"] == 1 and row["versions"]["torch"] == torch.__version__
    assert row["versions"]["plugin fsq"] and row["variants"]["fsq"]["plugins"]["fsq"]["levels"] == [6, 4]
    found = row["quantizers"]
    assert {"vq", "vq again", "fsq", "GEMM 2NKD", "GEMM 4NKD"} == {name for name in found if "ms" in found[name]}
    assert found["fsq"]["step_to"]["GEMM 2NKD"][0] > 0 and found["vq"]["encode_to"].keys() == {"GEMM 2NKD", "GEMM 4NKD"}
    assert "too late" in found["late"]["failed"] and "a_plugin_that_is_not_there" in found["nobody"]["failed"]
    assert found["lucidrains SimVQ"] == {"missing": "vector-quantize-pytorch is not installed"}
    assert "too late" in shown and "vector-quantize-pytorch is not installed" in shown and "faiss-cpu is not" in shown
    assert [(cell["n"], cell["k"], cell["d"]) for cell in row["scaling"]["cells"]] == [(96, K, D), (N, 48, D)]
    exponents = row["scaling"]["exponents"]
    assert None not in (exponents["vq"]["n"], exponents["vq"]["k"], exponents["fsq"]["n"]) and exponents["fsq"]["k"] is None
    assert "fsq at N=48 K=48 D=6: UserError: codebook: size 48" in shown
    assert {"vq", "fsq"} <= {name for name, one in row["training"].items() if "images_per_second" in one}
    assert [cell["data"] for cell in row["searches"]] == ["gauss", "vqgan"]
    assert row["loss"]["methods"]["vqzoo"]["loss_error"] < 1e-6


def test_the_short_form_and_a_plugin_that_joins(suite, capsys):
    status, _, row = told(capsys, suite(quick=True, plugins="vq,rotation"))
    assert status == 0 and row["quick"] == "nearly all" and row["scaling"]["cells"] == []
    assert row["quantizers"]["rotation"]["ratio"] > 0
    assert list(row["variants"]["rotation"]["plugins"]) == ["pixel", "vq", "rotation"]


def test_mistakes_are_told(suite, capsys, tmp_path):
    with pytest.raises(UserError, match="codebook.sise: unknown key; did you mean 'size'"):
        told(capsys, suite(), "codebook.sise=3")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out: .*file cannot be written"):
        told(capsys, suite(quick=True), out=tmp_path / "file")
    made = suite()
    made.sizes["m"] = [3]
    with pytest.raises(UserError, match="sizes.m: unknown"):
        told(capsys, made)


def test_who_is_fast_but_not_exact_is_marked():
    def row(ratio, **more):
        return dict.fromkeys(("ms", "cpu_ms", "wall_ms", "system_ms", "ratio", "ratio_low", "ratio_high"), ratio) | more

    methods = {"vqzoo": row(1.0, flips=0), "fast": row(0.5, flips=3), "slow": row(2.0, flips=3), "GEMM": row(0.1)}
    shown = peers.describe({"n": 1, "k": 1, "d": 1, "data": "gauss", "floor": None, "methods": methods}, "flips")
    assert [line.split()[0] for line in shown.splitlines() if "not exact" in line] == ["fast"]
