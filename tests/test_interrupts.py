"""Signals to real processes, lost workers and random kills: what is asked to stop saves, and what is killed goes on."""

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_processes import COMMAND, LONGEST, PROCESSES, environment, free_port
from test_training import VQ, exported, run, unequal

from vqzoo import DataError, checkpoint
from vqzoo.interrupt import ECHO, StopSignals
from vqzoo.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent


class Started:
    """A process that runs a recipe without an end, of which the lines are read as they come."""

    def __init__(self, folder, photos, *overrides, launcher=()):
        self.out = folder / "run"
        (folder / "recipe.yaml").write_text(VQ.replace("ROOT", str(photos)))
        endless = ["epochs=100000", "log.steps=1", "checkpoint.epochs=100000", *overrides]
        self.process = subprocess.Popen(
            [sys.executable, *launcher, str(COMMAND), "run", str(folder / "recipe.yaml"), *endless, "--out", str(self.out)],
            env=environment(VQZOO_OFFLINE="1"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self.said = ""

    def wait_for(self, text):
        """Read until a line holds the text."""
        for line in self.process.stderr:
            self.said += line
            if text in line:
                return
        pytest.fail(f"it never said {text!r}: {self.said}")

    def end(self):
        """Read what is left to say and return the exit status."""
        self.said += self.process.stderr.read()
        return self.process.wait(timeout=LONGEST)


@pytest.fixture
def started(tmp_path, small_photos):
    begun = []

    def start(*overrides, **how):
        begun.append(Started(tmp_path, small_photos, *overrides, **how))
        return begun[-1]

    yield start
    for one in begun:
        one.process.kill()
        one.process.wait()
        one.process.stderr.close()


def newest(out):
    return next(checkpoint.complete(out / "checkpoints"))[0]


@pytest.mark.fault(4)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_next_step_and_ends_with_its_status(started, number, status):
    job = started()
    job.wait_for("train 3/")
    sent = time.monotonic()
    job.process.send_signal(number)
    assert job.end() == status, job.said
    assert time.monotonic() - sent < 30
    step = newest(job.out)
    assert step >= 3 and f"vqzoo: interrupted by {number.name} at step {step}: saved; --resume auto goes on" in job.said
    assert "Traceback" not in job.said


@pytest.mark.fault(4)
def test_a_second_signal_ends_a_process_that_waits_for_something(started):
    job = started("plugins.sleeper={step: 2, seconds: 300}")
    job.wait_for("asleep")
    job.process.send_signal(signal.SIGTERM)
    time.sleep(ECHO / 4)
    job.process.send_signal(signal.SIGTERM)  # an echo, as launchers send it
    time.sleep(2 * ECHO)
    assert job.process.poll() is None
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 143
    assert "second signal: leaving at once" in job.said


@pytest.mark.fault(5)
def test_a_signal_to_the_launcher_saves_and_ends_all(started):
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={PROCESSES}", "--master_addr=127.0.0.1",
                f"--master_port={free_port()}"]
    job = started(launcher=launcher)
    job.wait_for("train 3/")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() != 0
    assert f"SIGTERM at step {newest(job.out)}: saved" in job.said


@pytest.mark.fault(4)
def test_handlers_are_those_from_before_when_a_run_has_ended():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as signals:
        assert signal.getsignal(signal.SIGTERM) != before[0]
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.fault(4)
def test_a_signal_that_is_ignored_stays_ignored(request):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert not signals.received


@pytest.mark.fault(31)
def test_a_run_whose_worker_dies_saves_and_says_so(recipe, tmp_path, listeners):
    job = Trainer(recipe(VQ, "data.workers=1", "epochs=9", "checkpoint.epochs=99"), tmp_path / "run")
    (worker,) = multiprocessing.active_children()
    listeners["refresh_codes"] = lambda progress, **_: progress.step == 3 and os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="worker"):
        job.run()
    assert newest(tmp_path / "run") >= 4
    listeners.clear()
    run(recipe(VQ, "data.workers=0", "epochs=9"), tmp_path / "run", resume="auto")
    run(recipe(VQ, "epochs=9"), tmp_path / "whole")
    assert not unequal(exported(tmp_path / "run"), exported(tmp_path / "whole"))


@pytest.mark.fault(31)
def test_images_that_are_lost_within_an_evaluation_are_saved_from_too(recipe, tmp_path, monkeypatch):
    job = Trainer(recipe(VQ, "evaluate.epochs=1", "checkpoint.epochs=9"), tmp_path / "run")

    def lost(*_):
        raise DataError("images can no longer be read: a worker died")
        yield

    monkeypatch.setattr("vqzoo.trainer.eval_batches", lost)
    with pytest.raises(DataError, match="a worker died"):
        job.run()
    assert newest(tmp_path / "run") == 2


@pytest.mark.fault(31)
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end workers with their run")
def test_the_workers_of_a_killed_run_end_with_it(started):
    job = started("data.workers=2")
    job.wait_for("train 3/")
    children = Path(f"/proc/{job.process.pid}/task/{job.process.pid}/children").read_text().split()
    assert len(children) >= 2
    job.process.kill()
    job.process.wait()
    ended = time.monotonic() + 3  # torch's own look comes after five seconds
    while any(alive(child) for child in children) and time.monotonic() < ended:
        time.sleep(0.05)
    assert not [child for child in children if alive(child)]


def alive(process):
    """Tell whether a process is there and more than an entry that nobody has read."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.fault(3)
def test_five_kills_lose_nothing(tmp_path):
    script = ROOT / "benchmarks" / "kills.py"
    smaller = ["epochs=3", "epoch_steps=10", "stages[0].epochs=2", "checkpoint.steps=4", "data.workers=0", "evaluate.images=16"]
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "5", "--longest", "5", "--seed", "1", "--folder", str(tmp_path), *smaller],
        env=environment(VQZOO_OFFLINE="1"), capture_output=True, text=True, timeout=2 * LONGEST)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == 5 and result["ends_equal_bit_for_bit"] >= 1


def test_a_campaign_that_finds_a_difference_says_so(recipe, tmp_path):
    spec = importlib.util.spec_from_file_location("kills", ROOT / "benchmarks" / "kills.py")
    kills = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kills)
    run(recipe(VQ), tmp_path / "one")
    run(recipe(VQ), tmp_path / "same")
    run(recipe(VQ, "seed=1"), tmp_path / "other")
    assert kills.compare(tmp_path / "one", tmp_path / "same") == ""
    found = kills.compare(tmp_path / "one", tmp_path / "other")
    assert "codebook.weight" in found and "optimizer/" in found and "metrics" in found and "curves" in found
