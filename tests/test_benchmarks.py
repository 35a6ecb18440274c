"""The benchmarks at toy size: they run, name what is missing or too large, and what they compare is the same thing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqzoo.bench import clock, peers

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def scripts(tiny_runs):
    """Let the scripts find each other as they do when run, in one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def kernels(monkeypatch):
    import kernels

    monkeypatch.setattr(clock, "LEAST_SECONDS", 0.0)
    return kernels


@pytest.fixture
def step():
    import step

    return step


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# ---- kernels


@pytest.mark.parametrize("data", ["gauss", "trained", "unit", "vqgan", "offset"])
def test_search_is_exact_and_says_how_it_was_measured(kernels, capsys, tmp_path, data):
    arguments = ["search", "--n", "70", "--k", "130", "--d", "8", "--rounds", "3", "--data", data]
    assert kernels.main([*arguments, "--json", str(tmp_path / "out" / "log.jsonl")]) == 0
    row = last_line(capsys)
    (cell,) = row["cells"]
    assert (cell["n"], cell["k"], cell["d"], cell["data"], cell["rounds"]) == (70, 130, 8, data, 3)
    methods = cell["methods"]
    assert methods["vqzoo"]["flips"] == 0 and methods["vqzoo"]["ratio"] == 1
    timed = {name: found for name, found in methods.items() if "ms" in found}
    assert {"vqzoo", "vqzoo again", "cdist", "SimVQ's expansion", cell["floor"]} <= timed.keys()
    assert all(0 < x["ratio_low"] <= x["ratio"] <= x["ratio_high"] for x in timed.values())
    assert "GEMM" in cell["floor"] and cell["to_floor"][0] > 0
    assert row["hardware"]["cpu"] and row["hardware"]["threads"] == 1 and row["versions"]["torch"] == torch.__version__
    assert json.loads((tmp_path / "out" / "log.jsonl").read_text()) == row


def test_flips_of_the_expanded_form_are_found(kernels):
    latents, vectors = peers.inputs("vqgan", 300, 4096, 16, 0, "cpu")
    nearest = peers.nearest_in_float64(latents, vectors)
    direct = torch.cat([(tile[:, None].double() - vectors.double()).square().sum(2).argmin(1) for tile in latents.split(50)])
    assert peers.flips(nearest, direct, latents, vectors) == peers.flips(direct, nearest, latents, vectors) == 0
    vectors = vectors / 1000  # now |z|² leaves few digits for the rest
    nearest = peers.nearest_in_float64(latents, vectors)
    expanded = peers.expanded_distances(latents, vectors).argmin(1)
    assert peers.flips(expanded, nearest, latents, vectors) > 100
    wrong = nearest.clone()
    wrong[:3] = (nearest[:3] + 1) % 4096
    assert peers.flips(wrong, nearest, latents, vectors) == 3


def test_every_installed_peer_finds_the_nearest_code():
    latents, vectors = peers.inputs("gauss", 40, 60, 8, 0, "cpu")
    nearest = peers.nearest_in_float64(latents, vectors)
    for name, method in peers.search_methods("cpu").items():
        if not method.missing():
            found = method.make(latents, vectors)()
            assert (found is None) == ("GEMM" in name)
            assert found is None or torch.equal(found, nearest), name


def test_a_peer_that_is_missing_or_too_large_is_named(kernels, capsys, monkeypatch):
    for module in peers.MODULES.values():
        monkeypatch.setitem(sys.modules, module, None)
    kernels.main(["search", "--n", "2000", "--k", "3000", "--d", "4", "--rounds", "1", "--free", "0.05",
                  "--methods", "faiss,lucidrains VQ,SimVQ's expansion,cdist"])
    shown = capsys.readouterr().out
    methods = json.loads(shown.splitlines()[-1])["cells"][0]["methods"]
    assert methods["faiss"] == {"missing": "faiss-cpu is not installed"}
    assert methods["lucidrains VQ"] == {"missing": "vector-quantize-pytorch is not installed"}
    assert methods["SimVQ's expansion"] == {"skipped": "needs 0.07 GB, 0.05 GB are free"}
    assert methods["cdist"]["ms"] > 0
    assert "faiss-cpu is not installed" in shown and "needs 0.07 GB" in shown


def test_a_sweep_fits_exponents_and_names_who_is_faster(kernels, capsys):
    kernels.main(["sweep", "--n", "32,64", "--k", "64,128", "--d", "4,8", "--rounds", "2", "--methods", "cdist"])
    shown = capsys.readouterr().out
    row = json.loads(shown.splitlines()[-1])
    assert len(row["cells"]) == 8 and set(row["exponents"]) == {"vqzoo", "vqzoo again", "cdist"}
    assert all(set(powers) == {"n", "k", "d", "r2"} and powers["r2"] <= 1 for powers in row["exponents"].values())
    slower = [cell for cell in row["cells"] if cell["methods"]["cdist"]["ratio"] < 1]
    assert len(row["faster"]) == len(slower) and ("nobody" in shown) == (not slower)


def test_exponents_of_an_exact_power_law():
    points = [(n, k, d, 3e-7 * n**0.9 * k**1.1 * d**0.5) for n in (10, 100) for k in (7, 70, 700) for d in (8, 16)]
    assert clock.fit(points) == pytest.approx({"n": 0.9, "k": 1.1, "d": 0.5, "r2": 1.0})
    found = clock.fit([(n, 7, 8, n**2.0) for n in (1, 10, 100)])
    assert found == {"n": pytest.approx(2), "k": None, "d": None, "r2": pytest.approx(1)}
    assert clock.fit([(1, 1, 1, 5.0)]) == {"n": None, "k": None, "d": None, "r2": None}
    rough = [(n, 7, 8, n * (1 + 0.5 * (-1) ** i)) for i, n in enumerate((1, 2, 4, 8))]
    assert clock.fit(rough)["r2"] < 0.95


def test_ratios_are_taken_round_by_round():
    seconds = {"base": [(1.0, 1.0, 0.0), (10.0, 1.0, 0.0), (2.0, 1.0, 0.0)],
               "other": [(2.0, 3.0, 0.5), (20.0, 3.0, 0.7), (4.0, 6.0, 0.6)]}
    assert clock.summarise(seconds, "base", 0)["other"] == pytest.approx(
        {"ms": 4000, "cpu_ms": 4000, "wall_ms": 3000, "system_ms": 600, "ratio": 2, "ratio_low": 2, "ratio_high": 2})
    assert clock.summarise(seconds, "base", 1)["other"]["ratio"] == 3


def test_all_dense_losses_are_the_same_loss(kernels, capsys):
    kernels.main(["loss", "--n", "50", "--k", "90", "--d", "8", "--rounds", "1"])
    (cell,) = last_line(capsys)["cells"]
    judged = {name: found for name, found in cell["methods"].items() if "loss_error" in found}
    assert set(judged) == {"vqzoo", "dense autograd", "older blocks", "older rows x K x D", "checkpointed rows"}
    for name, found in judged.items():
        assert found["loss_error"] < 1e-6 and found["gradient_error"] < 5e-6, name


def test_the_reference_of_the_loss_is_autograds():
    latents, vectors = (x.double() for x in peers.inputs("gauss", 30, 40, 6, 0, "cpu"))
    indices, codes = peers.nearest_in_float64(latents, vectors), vectors.clone().requires_grad_()
    loss = peers.dense(latents, codes, indices, 0.35)
    loss.backward()
    for found, true in zip(peers.loss_in_float64(latents, vectors, indices, 0.35, rows=7), (loss.detach(), codes.grad),
                           strict=True):
        assert peers.relative_error(found, true) < 1e-12


def test_memory_is_measured_in_a_process_of_its_own_or_computed(kernels):
    options = kernels.parse(["memory", "--free", "0.41"])
    expansion = kernels.needed(options, "search", "SimVQ's expansion", peers.search_methods("cpu")["SimVQ's expansion"],
                               (4096, 8192, 4))
    assert expansion["how"] == "measured" and 0.9 < expansion["bytes"] / (12 * 4096 * 8192) < 1.2
    dense = kernels.needed(options, "loss", "dense autograd", peers.loss_methods("cpu")["dense autograd"], (4096, 8192, 4))
    assert dense == {"bytes": 13 * 4096 * 8192, "how": "computed: needs 0.44 GB, 0.41 GB are free"}


def test_memory_of_every_method_is_in_the_table_and_held_against_the_goal(kernels, capsys, monkeypatch):
    asked = []

    def run(command, **how):
        asked.append((command[command.index("--methods") + 1], how["env"]["OMP_NUM_THREADS"]))
        return subprocess.CompletedProcess(command, 0, stdout="200000000\n")

    monkeypatch.setattr(kernels.subprocess, "run", run)
    kernels.main(["memory", "--methods", "SimVQ's expansion,dense autograd", "--free", "1"])
    shown = capsys.readouterr().out
    search, loss = json.loads(shown.splitlines()[-1])["cells"]
    assert asked == [("search,vqzoo", "1"), ("loss,vqzoo", "1")]
    assert search["methods"]["SimVQ's expansion"]["bytes"] == 12 * 16384 * 65536 and "12884.9  computed" in shown
    assert loss["methods"]["vqzoo"] == {"bytes": 200000000, "how": "measured"}
    assert "goal: 128 MB, MISSED" in shown and "goal: 300 MB, met" in shown


@pytest.mark.parametrize("script", ["kernels", "step"])
def test_a_script_starts_itself_anew_with_the_threads_that_it_was_told(script, monkeypatch):
    asked = []
    module = __import__(script)
    monkeypatch.setattr(module.subprocess, "run", lambda command, env: asked.append((command, env["OMP_NUM_THREADS"])) or
                        subprocess.CompletedProcess(command, 7))
    name = "search" if script == "kernels" else "nsvq"
    assert module.main([name, "--threads", "2"]) == 7
    assert asked == [([sys.executable, str(BENCHMARKS / f"{script}.py"), name, "--threads", "2"], "2")]


# ---- the step

TINY = ["--batch", "2", "--resolution", "16", "--k", "24", "--d", "6", "--width", "8", "--mult", "1,1", "--stride", "2",
        "--blocks", "1", "--steps", "1", "--rounds", "2", "--warmup", "1"]


def test_the_structure_and_its_rungs_are_timed_against_the_trainer(step, kernels, capsys, monkeypatch):
    monkeypatch.setattr(step, "peak_of", lambda options, name: {"vqzoo": 10, "SimVQ's structure": 30}[name])
    assert step.main(["structure", *TINY, "--skip", "compile"]) == 0
    row = last_line(capsys)
    methods = row["methods"]
    assert list(methods) == ["SimVQ's structure", "+ usage without a loop", "+ streamed search",
                             "+ fused Adam, foreach average", "+ channels_last", "vqzoo", "vqzoo again"]
    assert all(x["ratio"] > 0 and x["images_per_second"] == pytest.approx(2000 / x["step_ms"]) for x in methods.values())
    assert row["speedup"]["ratio"] == methods["SimVQ's structure"]["ratio"] and row["memory"]["vqzoo"] == 10


@pytest.mark.parametrize("more", [["usage", "search", "optimizer", "channels_last"], []])
@pytest.mark.parametrize("gan", [False, True])
def test_the_structure_trains_what_the_trainer_trains(step, tmp_path, more, gan):
    size = [*TINY[:2], "--resolution", "32", *TINY[4:]]
    options = step.parse(["structure", *size, *(["--gan", "plugins.gan.layers=3"] if gan else [])])
    options.device, options.precision = "cpu", "no"
    recipe = step.recipe_of(options, ("simvq",), tmp_path)
    theirs, mine = step.Structure(recipe, more, options), step.trainer_step(recipe, tmp_path / "run")
    (trainer,) = mine.args
    if gan:
        theirs.discriminator.load_state_dict(trainer.discriminator.state_dict())
    before = [p.detach().clone() for p in theirs.parameters]
    step.several(theirs, step.noise(options), 3)
    step.several(mine, step.noise(options), 3)
    ours = [p for p in trainer.tokenizer.parameters() if p.requires_grad]
    moved = sum((new - old).abs().sum().item() for new, old in zip(theirs.parameters, before, strict=True))
    apart = sum((one - other).abs().sum().item() for one, other in zip(theirs.parameters, ours, strict=True))
    assert moved > 0 and apart < 0.02 * moved
    if gan:
        pairs = zip(theirs.discriminator.parameters(), trainer.discriminator.parameters(), strict=True)
        assert sum((one - other).abs().sum().item() for one, other in pairs) < 0.02 * moved
    used = theirs.used if isinstance(theirs.used, list) else theirs.used.tolist()
    assert [bool(x) for x in used] == (trainer.tally.counts > 0).tolist()


def test_nsvq_is_timed_against_simvq_in_the_trainer(step, kernels, capsys, monkeypatch):
    monkeypatch.setattr(step, "peak_of", lambda options, name: {"simvq": 100, "nsvq": 103}[name])
    step.main(["nsvq", *TINY])
    row = last_line(capsys)
    assert list(row["methods"]) == ["simvq", "nsvq", "vq", "simvq again"]
    assert row["time_ratio"] == row["methods"]["nsvq"]["ratio"] > 0 and row["memory_ratio"] == pytest.approx(1.03)


def test_the_peak_of_a_step_is_measured_in_a_process_of_its_own(step):
    options = step.parse(["nsvq", *TINY, "--batch", "64", "--resolution", "32"])
    options.precision = "no"
    activations = 64 * 8 * 32 * 32 * 4
    assert 4 * activations < step.peak_of(options, "vq") < 100 * activations
