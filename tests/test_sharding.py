"""Encoder and decoder in pieces on two processes train what they train whole, stop, go on, and leave the same checkpoints.

As a script, started on each process by a launcher (`test_sharding.py FOLDER`), this goes through the scenarios.

Accelerate shards on GPUs only; here it is told that gloo's processes have some, and does what it does there. What CPUs cannot
show: NCCL, streams and their overlap, that memory falls, SyncBatchNorm, `found_inf` of a step that is not waited for.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from plugins_for_tests import Probe, rank, with_test_plugins
from safetensors.torch import load_file, save_file
from scenarios import job
from test_processes import PROCESSES, environment, free_port
from test_resume import LAST, WHOLE, assert_same_end, at, second_time
from test_training import assert_equal_up_to_rounding, checkpoint_at, exported, run

from vqzoo import Interrupted, UserError, checkpoint, sources
from vqzoo.recipe import load_recipe
from vqzoo.sharding import local
from vqzoo.trainer import Trainer

pytestmark = pytest.mark.usefixtures("tiny_runs")
LONGEST = 400  # seconds, on a machine with much else to do
# small steps, so that rounding flips no assignment; norms that are clipped; two batches of held-out images for one process,
# and one for the other
OTHER = {"BASE": "vq", "lr: 2e-3": "lr: 2e-4", "clip: 1.0": "clip: 0.1", "eval_batch_size: 4": "eval_batch_size: 3"}
RECIPE = functools.reduce(lambda text, change: text.replace(*change), OTHER.items(), WHOLE)
SHORT = ["epochs=2", "stages=[{name: refine}]"]
END = 6  # of a short run
WITHIN, STOPPED = 4, 5  # the step within an epoch in which a run is told to stop, and that after which it does
BAD = 4  # the batch that is not finite, after a checkpoint


# ---- what each process does


def pretend_gpus():
    """Let accelerate think of GPUs, of which it asks nothing but whether it should shard."""
    AcceleratorState._reset_state()
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU


def whole(folder):
    job(folder, "recipe", "whole").run()


def sharded(folder):
    pretend_gpus()
    trainer = job(folder, "recipe", "sharded", "shard=true")
    networks = (trainer.tokenizer.encoder, trainer.tokenizer.decoder, trainer.ema.encoder, trainer.ema.decoder)
    parameters = [parameter for network in networks for parameter in network.parameters()]
    held = {"here": sum(local(p).numel() for p in parameters), "all": sum(p.numel() for p in parameters)}
    (folder / f"held_{rank()}.json").write_text(json.dumps(held))
    trainer.run()
    save_file(trainer.tokenizer.codebook.state_dict(), folder / f"codebook_{rank()}.safetensors")


def signalled(folder):
    """Let the second process alone receive SIGTERM amid the accumulation of a step."""
    trainer = job(folder, "recipe", "signalled", "shard=true")
    if rank() == 1:
        Probe.listeners["quantize"] = second_time(at(WITHIN, lambda: signal.raise_signal(signal.SIGTERM)))
    trainer.run()


def resumed(folder):
    if rank() == 0:
        shutil.copytree(folder / "signalled", folder / "resumed")
    torch.distributed.barrier()
    job(folder, "recipe", "resumed", "shard=true", resume="auto").run()


def widened_whole(folder):
    job(folder, "recipe", "widened_whole", *SHORT, resume="auto").run()


def widened(folder):
    """Go on in pieces from what one process has begun whole."""
    job(folder, "recipe", "widened", "shard=true", *SHORT, resume="auto").run()


def poison(trainer):
    """Let the second process meet a loss that is not finite, once."""
    def listen(result, **_):
        return [{"l1": result[0]["l1"] * torch.nan}] if rank() == 1 and trainer.counters.batches == BAD + 1 else None

    Probe.listeners["reconstruction_loss"] = listen
    trainer.run()


def rolled_whole(folder):
    poison(job(folder, "recipe", "rolled_whole", "guard.policy=rollback", *SHORT))


def rolled(folder):
    poison(job(folder, "recipe", "rolled", "shard=true", "guard.policy=rollback", *SHORT))


def evaluated(folder):
    """Receive SIGTERM in the evaluation of an epoch that no checkpoint ends, of weights that are not averaged."""
    trainer = job(folder, "recipe", "evaluated", "shard=true", "ema=0", "evaluate.epochs=1", "log.steps=9",
                  "checkpoint.epochs=9", "checkpoint.steps=null", *SHORT)
    Probe.listeners["quantize"] = lambda progress, **_: None if progress else signal.raise_signal(signal.SIGTERM)
    trainer.run()


def exhausted(folder):
    """Let the second process run out of memory, and the first wait for it."""
    def allocate():
        raise torch.OutOfMemoryError("out of memory")

    trainer = job(folder, "recipe", "exhausted", "shard=true")
    if rank() == 1:
        Probe.listeners["quantize"] = at(1, allocate)
    trainer.run()


SCENARIOS = [whole, widened_whole, rolled_whole, sharded, signalled, resumed, widened, rolled, evaluated, exhausted]


def main(folder):
    sources.entry_points = with_test_plugins
    torch.cuda.is_available = lambda: False
    for scenario in SCENARIOS:
        ended = {"type": None}
        try:
            scenario(folder)
        except Exception as error:
            ended = {"type": type(error).__name__, "text": str(error)}
        Probe.listeners.clear()
        (folder / f"{scenario.__name__}_{rank()}.json").write_text(json.dumps(ended))


# ---- what came of it


class Launched:
    """The folder in which two processes have gone through the scenarios; one process has begun, and will go on, beside."""

    def __init__(self, folder, photos):
        self.folder = folder
        (folder / "recipe.yaml").write_text(RECIPE.replace("ROOT", str(photos)))
        begun = Trainer(self.recipe(*SHORT), folder / "widened")
        Probe.listeners["quantize"] = at(WITHIN, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            begun.run()
        Probe.listeners.clear()
        shutil.copytree(folder / "widened", folder / "widened_whole")
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={PROCESSES}", "--master_addr=127.0.0.1",
                   f"--master_port={free_port()}", __file__, str(folder)]
        self.done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LONGEST)
        assert self.done.returncode == 0, self.done.stderr[-5000:]

    def recipe(self, *overrides):
        return load_recipe(str(self.folder / "recipe.yaml"), list(overrides))

    def read(self, name):
        return [json.loads((self.folder / f"{name}_{number}.json").read_text()) for number in range(PROCESSES)]

    def run(self, name):
        """Return the folder of a run that has ended well on both processes."""
        assert self.read(name) == PROCESSES * [{"type": None}]
        return self.folder / name


@pytest.fixture(scope="module")
def launched(tiny_runs, small_photos, tmp_path_factory):
    return Launched(tmp_path_factory.mktemp("launched"), small_photos)


def test_two_sharded_processes_train_what_whole_ones_do_up_to_rounding(launched):
    sharded, whole = launched.run("sharded"), launched.run("whole")
    for step, _ in checkpoint.complete(whole / "checkpoints"):
        assert_equal_up_to_rounding(checkpoint_at(whole, step), checkpoint_at(sharded, step), step)
    metrics = [json.loads((out / "metrics.json").read_text())["metrics"] for out in (sharded, whole)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3)
    torch.testing.assert_close(exported(sharded), exported(whole), rtol=1e-3, atol=1e-4)
    sizes = [{name: value.sum() for name, value in checkpoint_at(out, LAST)["optimizer"].items() if name.endswith("_sq")}
             for out in (sharded, whole)]
    torch.testing.assert_close(*sizes, rtol=1e-3, atol=1e-12)  # Adam's steps would not show that gradients are scaled


def test_each_process_holds_half_of_the_networks_and_the_whole_codebook_bit_for_bit(launched):
    launched.run("sharded")
    for held in launched.read("held"):
        assert 0.45 < held["here"] / held["all"] < 0.55
    first, second = (load_file(launched.folder / f"codebook_{number}.safetensors") for number in range(PROCESSES))
    assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_sharded_run_stops_within_an_epoch_and_goes_on_bit_for_bit(launched):
    for ended in launched.read("signalled"):
        assert ended["type"] == "Interrupted" and f"SIGTERM at step {STOPPED}: saved" in ended["text"]
    assert next(checkpoint.complete(launched.folder / "signalled" / "checkpoints"))[0] == STOPPED
    assert_same_end(launched.run("resumed"), launched.run("sharded"))


def test_a_stop_in_an_evaluation_saves_the_moments_of_weights_that_are_gathered(launched):
    assert [ended["type"] for ended in launched.read("evaluated")] == PROCESSES * ["Interrupted"]
    saved = checkpoint_at(launched.folder / "evaluated", END // 2)
    moments = {name.removesuffix("/exp_avg") for name in saved["optimizer"]}
    assert moments >= {name for name in saved["tokenizer"] if name.startswith(("encoder.", "decoder."))}


def test_one_whole_process_goes_on_with_what_two_sharded_ones_began(launched, capsys):
    out = launched.folder / "narrowed"
    shutil.copytree(launched.folder / "signalled", out)
    run(launched.recipe(), out, resume="auto")
    assert "changed: shard: True → False" in capsys.readouterr().err
    assert_equal_up_to_rounding(checkpoint_at(launched.run("whole"), LAST), checkpoint_at(out, LAST), LAST)


def test_two_sharded_processes_go_on_with_what_a_whole_one_began(launched):
    out = launched.run("widened")
    assert "changed: shard: False → True" in launched.done.stderr
    assert_equal_up_to_rounding(checkpoint_at(launched.run("widened_whole"), END), checkpoint_at(out, END), END)


def test_a_sharded_run_rolls_back_from_a_bad_update_as_whole_ones_do(launched):
    sharded, whole = launched.run("rolled"), launched.run("rolled_whole")
    events = [json.loads((out / "metrics.json").read_text())["run"]["rollbacks"] for out in (sharded, whole)]
    assert [[(event["batch"], event["to"]) for event in found] for found in events] == 2 * [[(BAD, BAD)]]
    reports = sorted((sharded / "failures").rglob("report_rank*.json"))
    assert [json.loads(path.read_text())["tensors_not_finite"] for path in reports] == PROCESSES * [[]]
    assert_equal_up_to_rounding(checkpoint_at(whole, END), checkpoint_at(sharded, END), END)


@pytest.mark.parametrize("variable, overrides, said", [
    ("", ["shard=true"], "shard: true will not do here; accelerate shards between processes on GPUs"),
    ("", ["shard=true", "precision=fp16"], "shard: True will not do; .* set precision to bf16 or no"),
    ("true", ["shard=false"], "shard: false, but the launcher chose FSDP .ACCELERATE_USE_FSDP.; set shard=true, or launch"),
])
def test_where_accelerate_would_not_shard_or_nobody_asked_it_to_a_run_is_refused(
    recipe, tmp_path, monkeypatch, variable, overrides, said
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", variable or "false")
    with pytest.raises(UserError, match=said):
        Trainer(recipe(RECIPE, *overrides), tmp_path / "run")
    assert os.environ["ACCELERATE_USE_FSDP"] == (variable or "false") and not (tmp_path / "run").exists()


def test_a_sharded_process_out_of_memory_says_so_while_the_others_wait(launched):
    ended = launched.read("exhausted")[1]
    assert ended["type"] == "OutOfMemory" and "activations of a micro-batch" in ended["text"]


if __name__ == "__main__":
    os.environ["VQZOO_OFFLINE"] = "1"
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
