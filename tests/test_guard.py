"""Bad updates: what is not finite, and spikes, stay out of the weights; the run stops, skips or rolls back, with evidence."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from plugins_for_tests import Probe
from safetensors.torch import load_file
from test_resume import at
from test_training import ADVERSARIAL, VQ, Stop, checkpoint_at, events, exported, run, state, unequal

from vqzoo import Interrupted, NonFiniteError, OutOfMemory, checkpoint, memory
from vqzoo.guard import UNKNOWN
from vqzoo.recipe import load_recipe
from vqzoo.trainer import Trainer

pytestmark = pytest.mark.usefixtures("listeners")


def nan_at(*batches, job):
    """Return a listener that makes the loss of some batches NaN."""
    def listener(result, **_):
        return [{"l1": result[0]["l1"] * torch.nan}] if job.counters.batches - 1 in batches else None

    return listener


# ---- evidence


@pytest.mark.fault(18)
@pytest.mark.parametrize("where", ["an input", "a weight", "a gradient"])
def test_what_is_not_finite_stops_before_the_update_and_leaves_evidence(recipe, tmp_path, listeners, where):
    job = Trainer(recipe(VQ, "checkpoint.steps=1"), tmp_path / "run")
    kept = []

    def spoil(progress, **tensors):
        if progress is None or progress.step != 3:
            return None
        kept.append(state(job.tokenizer))
        if where == "a weight":
            with torch.no_grad():
                job.tokenizer.decoder.last_layer[0] = torch.nan
        return None

    def reconstruct(result, progress, images, reconstructions):
        if progress.step == 3 and where == "an input":
            return [{"l1": (reconstructions - images * torch.inf).abs().mean()}]
        if progress.step == 3 and where == "a gradient":  # the root has the value 0 and an infinite slope
            return [*result, {"root": (reconstructions - reconstructions.detach()).square().sum().sqrt()}]
        return None

    listeners.update(quantize=spoil, reconstruction_loss=reconstruct)
    term = {"an input": r"loss 'l1' of reconstruction_loss \(pixel, probe\)", "a weight": "reconstructions of the decoder",
            "a gradient": "gradient of "}[where]
    with pytest.raises(NonFiniteError, match=rf"^step 3 \(epoch 1, stage 'train'\): {term}.*nothing was updated"):
        job.run()
    after = state(job.tokenizer)
    assert set(unequal(kept[0], after)) <= ({"decoder.last.weight"} | {n for n in after if after[n].isnan().any()})
    place = tmp_path / "run" / "failures" / "step_000000003_batch_000000003"
    batch = load_file(place / "batch_rank0.safetensors")
    assert torch.equal(batch["images"], job.batches[0].images) and torch.equal(batch["positions"], job.batches[0].positions)
    report = json.loads((place / "report_rank0.json").read_text())
    assert (report["step"], report["batch"], report["stage"], report["process"]) == (3, 3, "train", 0)
    assert bool(report["tensors_not_finite"]) == (where == "a weight") and report["terms"]
    assert load_recipe(str(place / "recipe.yaml")) == job.recipe
    checkpoint.verify(tmp_path / "run" / "checkpoints" / "step_000000003")


def test_evidence_that_is_found_late_is_read_again(recipe, tmp_path, listeners, monkeypatch):
    monkeypatch.setattr("vqzoo.trainer.ASYNCHRONOUS", ("cpu",))
    job = Trainer(recipe(VQ, "epoch_steps=4", "checkpoint.epochs=9"), tmp_path / "run")
    listeners["reconstruction_loss"] = nan_at(1, job=job)
    seen = {}
    step = job._step

    def watched(batches, ends):
        seen[job.counters.batches] = batches[0].images
        return step(batches, ends)

    job._step = watched
    with pytest.raises(NonFiniteError, match=r"^step 1 .* nothing was updated"):
        job.run()
    assert len(seen) == 4
    batch = load_file(tmp_path / "run" / "failures" / "step_000000001_batch_000000001" / "batch_rank0.safetensors")
    assert torch.equal(batch["images"], seen[1])


# ---- policies


@pytest.mark.fault(18, 20)
def test_skipping_takes_another_batch_and_leaves_no_trace_of_the_bad_one(recipe, tmp_path, listeners, capsys):
    job = Trainer(recipe(VQ, "guard.policy=skip", "epochs=3"), tmp_path / "run")
    listeners["reconstruction_loss"] = nan_at(1, 2, job=job)
    before, apply = {}, job._allowed

    def allowed(update, *arguments):
        before[update.batch] = state(job.tokenizer)
        return apply(update, *arguments)

    job._allowed = allowed
    result = job.run()
    assert result["run"]["step"] == 6 and job.counters.batches == 8 and job.counters.skipped == 0
    assert not unequal(before[1], before[2]) and not unequal(before[2], before[3]) and unequal(before[3], before[4])
    said = capsys.readouterr().err
    assert said.count("skipped (guard.policy)") == 2
    kept = sorted((tmp_path / "run" / "failures").iterdir())
    assert [path.name for path in kept] == [f"step_000000001_batch_{batch:09d}" for batch in (1, 2)]
    assert [json.loads((path / "report_rank0.json").read_text())["batch"] for path in kept] == [1, 2]


@pytest.mark.fault(20)
def test_skipping_without_end_stops(recipe, tmp_path, listeners):
    job = Trainer(recipe(VQ, "guard.policy=skip", "guard.most=3"), tmp_path / "run")
    listeners["reconstruction_loss"] = nan_at(*range(1, 99), job=job)
    with pytest.raises(NonFiniteError, match=r"step 1 .*more than 3 updates in a row would be skipped \(skipped, guard.most\)"):
        job.run()
    assert job.counters.batches == 5


@pytest.mark.fault(20)
def test_a_bad_discriminator_is_skipped_and_the_tokenizer_goes_on(recipe, tmp_path, listeners):
    job = Trainer(recipe(ADVERSARIAL, "guard.policy=skip"), tmp_path / "run")
    seen = []

    def poison(reconstructions, progress=None, **_):
        if job.counters.step == 1:
            seen.append(state(job.discriminator))
            reconstructions.fill_(torch.nan)
        elif job.counters.step == 2:
            seen.append(state(job.discriminator))

    original = job._discriminator_step

    def step(images, outputs, progress):
        poison(outputs[0].reconstructions)
        return original(images, outputs, progress)

    job._discriminator_step = step
    result = job.run()
    assert result["run"]["step"] == 8 and job.counters.batches == 8
    assert not unequal(*seen)


@pytest.mark.fault(20)
def test_a_skipped_discriminator_keeps_the_statistics_from_before(recipe, tmp_path, listeners):
    gan = VQ.replace("probe: {}", "probe: {}, gan: {layers: 1, width: 8, norm: batch}")
    job = Trainer(recipe(gan, "guard.policy=skip", "discriminator_optim.lr=1e-3", "epochs=3"), tmp_path / "run")
    original = job._discriminator_step

    def step(images, outputs, progress):
        if progress.step == 3:
            outputs[0].reconstructions.fill_(torch.nan)
        return original(images, outputs, progress)

    job._discriminator_step = step
    assert job.run()["run"]["step"] == 6
    assert all(value.isfinite().all() for value in job.discriminator.state_dict().values())


@pytest.mark.fault(20)
def test_rolling_back_returns_to_the_checkpoint_and_avoids_the_batch(recipe, tmp_path, listeners, capsys):
    text = VQ, "guard.policy=rollback", "epochs=3", "checkpoint.epochs=1", "log.steps=1"
    job = Trainer(recipe(*text), tmp_path / "run")
    listeners["reconstruction_loss"] = nan_at(3, job=job)
    result = job.run()
    assert result["run"]["step"] == 6 and job.counters.batches == 8  # batches 2 and 3 are left behind
    (event,) = result["run"]["rollbacks"]
    assert (event["step"], event["batch"], event["to"]) == (3, 3, 2)
    assert "rolled back to step 2" in capsys.readouterr().err
    assert [e.step for e in events(tmp_path / "run").Scalars("loss/l1")] == [1, 2, 3, 4, 5, 6]
    # the same as a run that had seen those batches from the checkpoint on
    other = Trainer(recipe(*text), tmp_path / "other", resume=str(tmp_path / "run" / "checkpoints" / "step_000000004"))
    other.run()
    assert not unequal(exported(tmp_path / "other"), exported(tmp_path / "run"))


@pytest.mark.fault(20)
def test_a_run_killed_after_a_rollback_ends_like_one_that_was_not(recipe, tmp_path, listeners):
    text = VQ, "guard.policy=rollback", "epochs=4"
    for name in ("whole", "killed"):
        job = Trainer(recipe(*text), tmp_path / name)
        poison = nan_at(3, job=job)

        def listener(result, progress, job=job, poison=poison, name=name, **more):
            if name == "killed" and progress.step == 3 and job.counters.batches > 4:
                raise Stop
            return poison(result=result, progress=progress, **more)

        listeners["reconstruction_loss"] = listener
        if name == "whole":
            job.run()
        else:
            with pytest.raises(Stop):
                job.run()
            job = Trainer(recipe(*text), tmp_path / name, resume="auto")
            listeners["reconstruction_loss"] = nan_at(3, job=job)
            job.run()
    assert not unequal(exported(tmp_path / "whole"), exported(tmp_path / "killed"))
    one, other = (checkpoint_at(tmp_path / name, 8) for name in ("whole", "killed"))
    assert not unequal(one["optimizer"], other["optimizer"])


@pytest.mark.fault(20)
@pytest.mark.parametrize(("batches", "says"), [((0,), "there is no checkpoint yet"), (range(3, 99), r"it has been 2 times")])
def test_what_cannot_be_rolled_back_stops(recipe, tmp_path, listeners, batches, says):
    job = Trainer(recipe(VQ, "guard.policy=rollback", "guard.most=2"), tmp_path / "run")
    listeners["reconstruction_loss"] = nan_at(*batches, job=job)
    with pytest.raises(NonFiniteError, match=f"cannot be rolled back: {says}"):
        job.run()


# ---- spikes


def spike_at(step, job, times=1000):
    def listener(result, progress, **_):
        return [{"l1": result[0]["l1"] * times}] if job.counters.batches - 1 == step else None

    return listener


LONG = VQ, "epochs=1", f"epoch_steps={UNKNOWN + 4}", "checkpoint.steps=10", "guard.spike=100"


@pytest.mark.fault(20)
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_spike_is_answered_as_the_policy_says(recipe, tmp_path, listeners, policy, capsys):
    job = Trainer(recipe(*LONG, f"guard.policy={policy}"), tmp_path / "run")
    bad = UNKNOWN + 1
    listeners["reconstruction_loss"] = spike_at(bad, job)
    if policy == "stop":
        with pytest.raises(NonFiniteError, match=rf"step {bad} .*a spike: their magnitudes sum to .*guard.spike: 100 times"):
            job.run()
        assert job.counters.step == bad
    else:
        result = job.run()
        assert result["run"]["step"] == UNKNOWN + 4
        assert job.counters.batches == UNKNOWN + 4 + {"skip": 1, "rollback": bad - 20 + 1}[policy]
        assert "a spike" in capsys.readouterr().err
    assert (tmp_path / "run" / "failures" / f"step_{bad:09d}_batch_{bad:09d}" / "report_rank0.json").exists()


@pytest.mark.fault(20)
def test_the_usual_size_of_the_losses_survives_a_checkpoint(recipe, tmp_path, listeners):
    job = Trainer(recipe(*LONG), tmp_path / "run")
    listeners["quantize"] = at(15, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="SIGTERM"):
        job.run()
    listeners.clear()
    usual = job.guard.usual, job.guard.seen
    job = Trainer(recipe(*LONG), tmp_path / "run", resume="auto")
    assert (job.guard.usual, job.guard.seen) == usual and usual[1] == 16
    listeners["reconstruction_loss"] = spike_at(UNKNOWN + 1, job)
    with pytest.raises(NonFiniteError, match="a spike"):
        job.run()


def test_without_a_wish_no_loss_is_too_large(recipe, tmp_path, listeners):
    job = Trainer(recipe(*LONG, "guard.spike=null"), tmp_path / "run")
    listeners["reconstruction_loss"] = spike_at(UNKNOWN + 1, job)
    assert job.run()["run"]["finished"]


# ---- collapse


@pytest.mark.fault(22)
def test_a_collapse_is_said_once_with_advice_and_again_after_a_recovery(recipe, tmp_path, listeners, capsys):
    used = iter([1, 1, 32, 1])

    def few(result, progress, codebook, **_):
        if progress is None:
            return None
        result.indices = result.indices % few.now
        result.codes = codebook.lookup(result.indices)
        return result

    few.now = next(used)
    listeners["quantize"] = few
    listeners["stage_transition"] = lambda **_: setattr(few, "now", next(used, 1))
    run(recipe(VQ, "epochs=4"), tmp_path / "run")
    said = [line for line in capsys.readouterr().err.splitlines() if "collapses" in line]
    assert len(said) == 2 and "used 3.12% of 32 codes" in said[0] and "refresh_codes" in said[0]
    texts = events(tmp_path / "run").Tensors("events/text_summary")
    assert [e.step for e in texts if b"collapses" in e.tensor_proto.string_val[0]] == [2, 8]


@pytest.mark.fault(22)
def test_a_codebook_too_large_for_an_epoch_is_not_called_collapsed(recipe, tmp_path, capsys):
    run(recipe(VQ, "codebook.size=65536", "plugins.nsvq={}", "epochs=1"), tmp_path / "run")  # of 1,024 tokens
    assert "of what its 1,024 tokens could" not in capsys.readouterr().err


# ---- memory


@pytest.mark.fault(24)
def test_a_shortage_of_memory_says_what_needs_it_and_what_to_turn(recipe, tmp_path, listeners):
    def short(progress, **_):
        if progress is not None and progress.step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    job = Trainer(recipe(VQ), tmp_path / "run")
    listeners["quantize"] = short
    with pytest.raises(OutOfMemory) as caught:
        job.run()
    said = str(caught.value)
    assert said.startswith("step 1 (epoch 0, stage 'train'): out of memory: CUDA out of memory. Tried to allocate 3.00 GiB.")
    assert "largest: activations of a micro-batch" in said and "weights, gradients, moments and average" in said
    for key in ("accumulate=2", "data.batch_size", "ops.backend=chunked", "codebook.size"):
        assert key in said
    assert "GiB  nearest_codes by ops.backend" in said or "by ops.backend" in said


def test_only_shortages_are_taken_for_shortages():
    assert memory.is_shortage(MemoryError()) and memory.is_shortage(torch.OutOfMemoryError("x"))
    assert memory.is_shortage(RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"))
    assert not memory.is_shortage(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert Probe.listeners == {}


SHORT = """
import resource, sys
import vqzoo.trainer
from vqzoo import cli
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.fault(24)
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_in_little_memory_a_huge_codebook_trains_in_chunks_or_ends_in_advice(small_photos, tmp_path, backend):
    text = VQ.replace("ROOT", str(small_photos)).replace(", probe: {}", "")
    (tmp_path / "recipe.yaml").write_text(text)
    huge = ["codebook.size=262144", "codebook.width=4", f"ops.backend={backend}", "epochs=1", "ema=0", "data.batch_size=16"]
    command = [sys.executable, "-c", SHORT, "run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), *huge]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    if backend == "chunked":
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "vqzoo: OutOfMemory: step 0 (epoch 0, stage 'train'): out of memory: " in done.stderr
    assert "largest: " in done.stderr and "by ops.backend eager" in done.stderr and "ops.backend=chunked" in done.stderr
