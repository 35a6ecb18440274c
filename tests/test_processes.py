"""Two real processes (gloo on CPU) do what one does, and end alike when something is wrong."""

import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import COMMON, assert_equal_up_to_rounding, checkpoint_at, events

from vqzoo import checkpoint
from vqzoo.cli import main
from vqzoo.recipe import load_recipe
from vqzoo.trainer import Trainer

STEPS = 6
PROCESSES = 2
LONGEST = 150  # seconds, on a machine with much else to do
COMMAND = Path(__file__).with_name("plugins_for_tests.py")
RECIPE = COMMON.replace("eval_batch_size: 4", "eval_batch_size: 2") + """
epochs: 6
epoch_steps: 1  # shorter than the data, so that some codes are not used
plugins:
  vq: {}
  nsvq: {replace_after: 0, noise: 0.05}
  pixel: {}
  gan: {layers: 1, width: 8, norm: group, r1: 1.0, ramp: {refine: 2}}
  kmeans: {latents_per_code: 2, iterations: 1}
  recorder: {}
hooks: {embedding_loss: [vq, nsvq]}
stages:
  - {name: joint, epochs: 2}
  - name: warm-up
    epochs: 2
    freeze: ["encoder.*"]
    hooks: {embedding_loss: [vq], stage_transition: [], reconstruction_loss: [pixel, recorder], discriminator_loss: []}
  - {name: refine, freeze: ["encoder.*"], hooks: {embedding_loss: [vq], stage_transition: []}}
"""
# small steps, so that rounding flips no assignment
OVERRIDES = ["optim.lr=2e-4", "codebook.size=256", "optim.clip=1.0", "optim.schedule=cosine", "optim.warmup_steps=2",
             "log.steps=1"]
OFFERED = """
from torchmetrics.image import PeakSignalNoiseRatio

from vqzoo import Plugin, hookimpl


class Decibels(Plugin):
    @hookimpl
    def make_metric(self):
        return PeakSignalNoiseRatio(data_range=1.0)
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def launch(arguments):
    """Run the command line as a user does, by torch's launcher."""
    launcher = ["torch.distributed.run", f"--nproc_per_node={PROCESSES}", "--master_addr=127.0.0.1",
                f"--master_port={free_port()}"]
    command = [sys.executable, "-m", *launcher, str(COMMAND), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LONGEST)
    assert done.returncode == 0, done.stderr
    return done


def ranks(arguments):
    """Run each process without a launcher that would end one for the other; return their (exit status, stderr)."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(PROCESSES)}
    started = [
        subprocess.Popen([sys.executable, str(COMMAND), *arguments], text=True, stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE, env=environment(**where, RANK=str(rank), LOCAL_RANK=str(rank)))
        for rank in range(PROCESSES)
    ]
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline and any(process.poll() is None for process in started):
        time.sleep(0.1)
    for process in started:
        process.kill()  # a process that hangs shows by its status, -9
    return [(process.communicate()[1], process.returncode)[::-1] for process in started]


class Runs:
    """The same recipe run by two processes, with two micro-batches each, and by one."""

    def __init__(self, folder, photos):
        self.recipe, self.two, self.one = folder / "recipe.yaml", folder / "two", folder / "one"
        self.recipe.write_text(RECIPE.replace("ROOT", str(photos)))
        for name in ("seen_by_two", "seen_by_one"):
            (folder / name).mkdir()
        self.by_two = [*OVERRIDES, "accumulate=2", f"plugins.recorder.folder={folder / 'seen_by_two'}"]
        self.launched = launch(["run", str(self.recipe), *self.by_two, "--out", str(self.two)])
        by_one = [*OVERRIDES, f"plugins.recorder.folder={folder / 'seen_by_one'}"]
        Trainer(load_recipe(str(self.recipe), by_one), self.one).run()
        self.first, self.second = (self.seen(folder / "seen_by_two", rank) for rank in range(PROCESSES))
        self.alone = self.seen(folder / "seen_by_one", 0)

    def seen(self, folder, rank):
        return [load_file(folder / f"rank{rank}_step{step}.safetensors") for step in range(STEPS)]

    def metrics(self, out):
        return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def runs(tiny_runs, small_photos, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("processes"), small_photos)


def test_both_processes_hold_the_same_codebook_bit_for_bit(runs):
    for first, second in zip(runs.first, runs.second, strict=True):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert torch.equal(value, second[key]), key
    saved = checkpoint_at(runs.two, STEPS)["tokenizer"]["codebook.weight"]
    assert torch.equal(saved, runs.first[-1]["vectors"])


def test_replacement_happened_and_was_the_same(runs):
    replaced = [[e.value for e in events(out).Scalars("codes/replaced")] for out in (runs.two, runs.one)]
    dead = [int((step["epoch_counts"] == 0).sum()) for step in runs.first]
    assert dead[1] > 0
    assert replaced[0] == replaced[1] == dead


def test_hooks_see_the_whole_step_in_sample_order(runs):
    for two, one in zip(runs.first, runs.alone, strict=True):
        assert one["latents"].shape == (8 * 64, 8) and one["counts"].sum() == 8 * 64
        for key in ("indices", "counts", "epoch_counts"):
            assert torch.equal(two[key], one[key]), key
        for key in ("latents", "vectors", "means"):
            torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5)
    assert [len(step["means"]) for step in runs.first] == [7, 7, 2, 2, 5, 5]


def test_the_result_is_that_of_one_process_up_to_rounding(runs):
    assert_equal_up_to_rounding(checkpoint_at(runs.one, STEPS), checkpoint_at(runs.two, STEPS), STEPS)


@pytest.mark.fault(27)
def test_the_learning_rate_curve_is_that_of_one_process(runs):
    two, one = ([(e.step, e.value) for e in events(out).Scalars("train/learning_rate")] for out in (runs.two, runs.one))
    assert two == one and len(one) == STEPS


@pytest.mark.fault(23, 27, 36)
def test_metrics_count_each_held_out_image_once(runs):
    two, one = runs.metrics(runs.two), runs.metrics(runs.one)
    assert two["metrics"]["images"] == 7  # batches of 2: four images for one process, three for the other
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-3)
    assert two["run"]["transitions"] == one["run"]["transitions"] and two["run"]["step"] == STEPS
    assert (two["card"]["hardware"]["processes"], one["card"]["hardware"]["processes"]) == (2, 1)


@pytest.mark.fault(36)
def test_an_evaluation_by_two_processes_is_that_of_one(runs, small_photos, tmp_path):
    metrics = "metrics=[psnr,ssim,usage,perplexity,fd,fd_kid,fd_precision,fd_recall,decibels]"
    fd = ["fd.name=resnet10t", "fd.pretrained=false", "fd.size=32"]
    (tmp_path / "decibels.py").write_text(OFFERED)
    command = ["eval", str(runs.one), metrics, *fd, "--data", str(small_photos / "val"), "--batch-size", "2", "--plugin-file",
               str(tmp_path / "decibels.py")]
    for name, run in (("two", launch), ("one", main)):
        run([*command, "--json", str(tmp_path / f"{name}.json"), "--csv", str(tmp_path / f"{name}.csv")])
    two, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two", "one"))
    assert two["metrics"]["images"] == 7 and two["card"]["hardware"]["processes"] == 2
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5) and one["metrics"]["fd_resnet10t_random"] > 0
    assert 5 < one["metrics"]["decibels"] < 50
    assert two["usage_curve"] == one["usage_curve"] and two["card"]["pixels_sha256"] == one["card"]["pixels_sha256"]
    assert (tmp_path / "two.csv").read_text() == (tmp_path / "one.csv").read_text()


def test_only_the_main_process_reports(runs):
    assert runs.launched.stdout.count("held-out images after") == 1
    assert runs.launched.stderr.count("stage joint → warm-up") == 1
    assert len(list((runs.two / "tensorboard").glob("events.*"))) == 1


def test_an_adaptive_regularised_discriminator_in_bf16_leaves_both_processes_equal(runs, tmp_path):
    gan = ["adaptive=true", "lecam=0.1", "gradient_penalty=1", "norm=batch"]
    arguments = [*runs.by_two, "precision=bf16", "log.steps=1", f"plugins.recorder.folder={tmp_path}"]
    launch(["run", str(runs.recipe), *arguments, *(f"plugins.gan.{key}" for key in gan), "--out", str(tmp_path / "run")])
    for step in range(STEPS):
        first, second = (load_file(tmp_path / f"rank{rank}_step{step}.safetensors") for rank in range(PROCESSES))
        assert all(torch.equal(value, second[key]) for key, value in first.items())
    found = events(tmp_path / "run")
    for name in ("loss/adversarial", "loss/lecam", "loss/r1", "loss/gradient_penalty", "report/adversarial_weight"):
        assert all(math.isfinite(e.value) for e in found.Scalars(name)), name
    assert found.Scalars("report/adversarial_weight")[-1].value > 0


@pytest.mark.fault(40)
def test_a_process_that_is_lost_ends_the_other_with_advice(runs, tmp_path):
    dying = ["plugins.recorder.dying_rank=1", "plugins.recorder.dying_step=2", f"plugins.recorder.folder={tmp_path}"]
    (first, said), (second, _) = ranks(["run", str(runs.recipe), *OVERRIDES, *dying, "--out", str(tmp_path / "run")])
    assert (first, second) == (1, -9), said
    assert "LostError: step 2 (epoch 2, stage 'warm-up'): a device or another process is lost: " in said
    assert "the checkpoint of step 2 is whole" in said and "--resume auto" in said
    checkpoint.verify(tmp_path / "run" / "checkpoints" / "step_000000002")


def test_a_mistake_ends_both_processes_with_status_2(runs):
    for status, said in ranks(["run", str(runs.recipe), *runs.by_two, "--out", str(runs.two)]):
        assert status == 2, said
        assert "already holds a run" in said and "Traceback" not in said


def test_a_loss_that_is_not_finite_on_one_process_ends_both_before_the_update(runs, tmp_path):
    poisoned = [f"plugins.recorder.folder={tmp_path}", "plugins.recorder.poisoned_rank=1", "plugins.recorder.poisoned_step=1"]
    (first, said_by_first), (second, said_by_second) = ranks(
        ["run", str(runs.recipe), *OVERRIDES, *poisoned, "--out", str(tmp_path / "run")]
    )
    assert (first, second) == (1, 1), said_by_first + said_by_second
    for said in (said_by_first, said_by_second):  # the first knows what went wrong on the second
        assert "NonFiniteError: step 1 (epoch 1, stage 'joint'): loss 'l1' of reconstruction_loss" in said
    assert {path.name for path in tmp_path.glob("rank*")} == {f"rank{rank}_step0.safetensors" for rank in range(PROCESSES)}
