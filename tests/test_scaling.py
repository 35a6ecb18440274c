"""The scaling model: its bytes are those of two real processes, its FLOPs those of a real step, its times what was assumed."""

import io
import json
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import scaling

pytestmark = pytest.mark.usefixtures("tiny_runs")
AS_ASSUMED = {name: default for name, (default, _) in scaling.ASSUMED.items()}


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def tiny(tiny_runs, tmp_path_factory):
    """The tiny recipe of the check and its networks."""
    recipe = scaling.written("tiny", tmp_path_factory.mktemp("scaling"))
    return recipe, scaling.Networks(recipe, [])


def calls_of(recipe, networks, processes=2):
    """The calls of a run that does exactly what is predicted."""
    settings = [replace(one, processes=processes, images=recipe.data.batch_size // processes) for one in networks.settings]
    return [[step, *key, "vqzoo/trainer.py:_step > all_reduce"] for step in range(-1, recipe.epochs * recipe.epoch_steps)
            for _, key in scaling.expected(recipe, settings, step)]


def steps_of(recipe):
    return [[1, 0] for _ in range(recipe.epochs * recipe.epoch_steps)]


# ---- the headline


@pytest.fixture(scope="module")
def headline(tiny_runs):
    with redirect_stdout(io.StringIO()) as printed:
        assert scaling.main([]) == 0
    shown, line = printed.getvalue().rstrip().rsplit("\n", 1)
    return json.loads(line), shown


def test_all_three_sizes_are_predicted_and_called_so(headline):
    row, shown = headline
    assert row["predicted"] and "no GPU was used" in row["note"]
    assert list(row["stages"]) == ["joint", "warm-up", "refine"]
    for stage in row["stages"].values():
        assert list(stage) == ["8", "64", "1024"]
        grown = [both["fixed_images"]["efficiency"] for both in stage.values()]
        assert 1 > grown[0] > grown[1] > grown[2] > 0.5
    for gpus in (8, 64, 1024):
        assert f"{gpus} GPUs, stage joint, PREDICTED" in shown
    assert set(row["assumed"]) == set(scaling.ASSUMED) and row["hardware"]["cpu"] and row["versions"]["torch"]


def test_a_batch_smaller_than_the_number_of_gpus_is_impossible(headline):
    row, shown = headline
    joint = row["stages"]["joint"]
    assert (joint["8"]["fixed_batch"]["images_per_gpu"], joint["64"]["fixed_batch"]["images_per_gpu"]) == (16, 2)
    assert joint["1024"]["fixed_batch"] == {"impossible": "a batch of 128 images for 1024 GPUs: it would take 1024 at least"}
    assert "fixed batch: impossible: a batch of 128" in shown
    assert joint["1024"]["fixed_images"]["batch"] == 32 * 1024


def test_the_gradients_are_every_trained_parameter_and_nothing_frozen(headline):
    row, _ = headline
    sent = {stage: row["stages"][stage]["8"]["fixed_images"]["collectives"] for stage in row["stages"]}
    parameters = {stage: row["work"][stage]["tokenizer_parameters"] for stage in row["work"]}
    assert parameters["joint"] > parameters["warm-up"] == parameters["refine"] > 65536 * 128
    for stage, rows in sent.items():
        assert rows["gradients of the tokenizer"]["mb"] == pytest.approx(4e-6 * parameters[stage])
        assert rows["gradients of the tokenizer"]["mb_sent"] == pytest.approx(4e-6 * parameters[stage] * 2 * 7 / 8)
        assert sum(row["work"][stage]["buckets_mb"]) == pytest.approx(4e-6 * parameters[stage])
    assert "gradients of the discriminator" not in sent["warm-up"] and "gradients of the discriminator" in sent["refine"]
    assert sent["joint"]["counts of codes"]["mb"] == pytest.approx(65536 * 8e-6)


def test_a_refresh_that_asks_for_latents_costs_what_all_processes_hold(headline, capsys):
    row, _ = headline
    assert "latents for a refresh" not in row["stages"]["joint"]["1024"]["fixed_images"]["collectives"]
    assert scaling.main(["--asks", "latents", "--gpus", "1024", "--stage", "warm-up"]) == 0
    asked = last_line(capsys)["stages"]["joint"]["1024"]["fixed_images"]
    latents = 32 * 256 * 128 * 4
    assert asked["collectives"]["latents for a refresh"]["mb_sent"] == pytest.approx(1023 * latents / 1e6)
    assert asked["efficiency"] < row["stages"]["joint"]["1024"]["fixed_images"]["efficiency"] - 0.1


@pytest.mark.parametrize(("arguments", "said"), [
    (["--stage", "late"], "there is no stage 'late'; choices: joint, warm-up, refine"),
    (["--asks", "codes"], "codes is never gathered"),
    (["epoch_steps=null"], "set epoch_steps=NUMBER"),
    (["--check", "huge"], "there is no recipe 'huge'"),
])
def test_a_mistake_is_named(capsys, arguments, said):
    with pytest.raises(SystemExit) as left:
        scaling.main(arguments)
    assert left.value.code == 2 and said in capsys.readouterr().err


# ---- times


def test_a_collective_takes_the_hops_and_bytes_of_a_ring_or_a_tree():
    machine = scaling.Machine(AS_ASSUMED | {"start": 0, "hop": 1, "hop_between": 10, "nvlink": 100.0, "infiniband": 5.0})
    ring = 14e-6 + 2 * 7 / 8 * 1e9 / 100e9
    assert machine.collective("all_reduce", 1e9, 8) == pytest.approx(ring)
    assert machine.collective("all_gather", 1e9, 8) == pytest.approx(7e-6 + 7e9 / 100e9)
    assert machine.collective("all_reduce", 8, 1024) == pytest.approx(2 * (7 * 1 + 7 * 10) * 1e-6, rel=1e-3)  # a tree
    assert machine.collective("all_gather", 8e6, 16) == pytest.approx(24e-6 + 15 * 8e6 / 40e9)  # eight cards of 5 GB/s
    assert machine.collective("all_reduce", 1e9, 1) == 0


def test_a_hop_of_the_host_counts_for_every_process():
    machine = scaling.Machine(AS_ASSUMED | {"hop_host": 100})
    assert machine.collective("all_reduce", 8, 1024, host=True) == pytest.approx(2 * 1023 * 1e-4, rel=1e-3)


def test_gradients_hide_behind_the_backward_but_for_what_is_ready_last(tiny):
    _, networks = tiny
    machine = scaling.Machine(AS_ASSUMED | {"tflops": 1e-12, "start": 0, "hop": 0, "hop_between": 0, "nvlink": 1.0})
    setting = replace(networks.settings[0], processes=2, images=1, accumulate=1)
    gradient = 300_000_000  # elements: 1.2 seconds at 1 GB/s
    for ready, backward, exposed in (([(0.5, gradient), (1.0, gradient)], 10.0, 1.2), ([(0.5, gradient)], 10.0, 0.0),
                                     ([(0.0, gradient), (1.0, gradient)], 0.5, 1.9)):
        work = scaling.Work(backward={"tokenizer": backward}, ready={"tokenizer": ready})
        assert machine.gradients(work, setting, "tokenizer") == pytest.approx((1.2 * len(ready), exposed))


def test_buckets_are_those_of_torch():
    sizes = [3_000, 200_000, 100_000, 7_000_000, 5, 9_000_000, 6_553_600, 1]
    parameters = [torch.empty(size, device="meta") for size in sizes]
    torchs, _ = dist._compute_bucket_assignment_by_size(parameters, list(scaling.BUCKETS))
    ours = scaling.buckets([(number / len(sizes), size) for number, size in enumerate(sizes, 1)])
    assert [elements for _, elements in ours] == [sum(sizes[number] for number in bucket) for bucket in torchs]


# ---- the check


def test_two_processes_send_what_the_model_says_and_a_step_computes_it(capsys):
    assert scaling.main(["--check", "tiny"]) == 0
    row = last_line(capsys)
    tiny = row["recipes"]["tiny"]
    assert row["agrees"] and tiny["differences"] == [] and not row["predicted"]
    assert len(tiny["bytes"]) == 13 and all(predicted == found > 0 for predicted, found in tiny["bytes"])
    calls = tiny["collectives"]
    assert calls["gradients of the tokenizer"]["recorded"] == 12 and calls["gradients of the discriminator"]["recorded"] == 8
    assert all(counts["predicted"] == counts["recorded"] for counts in calls.values())
    for stage in tiny["stages"]:
        predicted, found = stage["network_mflop"]
        assert predicted == pytest.approx(found, rel=1e-9) and found > 0
        assert stage["buckets"][0] == stage["buckets"][1]
        assert 0.5 < stage["operators"][0] / stage["operators"][1] < 2
    assert row["gloo_on_this_machine"]["hop_us"] > 0


def test_a_call_more_or_less_than_predicted_is_named_with_its_place(tiny):
    recipe, networks = tiny
    calls = calls_of(recipe, networks)
    assert scaling.compare(recipe, calls, steps_of(recipe))["differences"] == []
    missing = next(number for number, call in enumerate(calls) if call[:4] == [5, "all_reduce", "int64", 32])
    more = [5, "all_gather", "float32", 77, "vqzoo/trainer.py:_step > plugins/new.py:refresh_codes > _allgather_base_"]
    found = scaling.compare(recipe, [*calls[:missing], more, *calls[missing + 1 :]], steps_of(recipe))
    assert found["differences"] == [
        "step 5: counts of codes: all_reduce int64 32 was predicted and did not come",
        "step 5: all_gather float32 77 was not predicted: vqzoo/trainer.py:_step > plugins/new.py:refresh_codes > "
        "_allgather_base_",
    ]
    assert [one - other for one, other in found["bytes"]] == [0] * 6 + [32 * 8 - 77 * 4] + [0] * 6


def test_the_buckets_of_a_backward_count_as_one_call():
    backward = "vqzoo/trainer.py:_tokenizer_step > torch/autograd/graph.py:_engine_run_backward > allreduce_"
    mine = "torch/autograd/graph.py:_engine_run_backward > vqzoo/ops/collective.py:backward > allreduce_"
    calls = [[0, "all_reduce", "float32", size, backward] for size in (10, 20)] + [[0, "all_reduce", "float32", 3, mine]] * 2
    assert sorted(call[2] for call in scaling.recorded(calls, 0)) == [3, 3, 30]
