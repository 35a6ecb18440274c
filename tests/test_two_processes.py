"""Two real processes, as on two machines, stop, go on, change their number, disagree and fail together, in one launch."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from scenarios import BASES, METHODS
from test_processes import PROCESSES, environment, free_port
from test_resume import WHOLE, assert_same_end, at
from test_training import COMMON, assert_equal_up_to_rounding, checkpoint_at, events, run

from vqzoo import Interrupted, checkpoint
from vqzoo.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("tiny_runs")
LONGEST = 400  # seconds, on a machine with much else to do
# small steps, so that rounding flips no assignment; two stages; networks without BatchNorm
PLAIN = COMMON.replace("lr: 2e-3", "lr: 2e-4, clip: 1.0") + """
epochs: 4
epoch_steps: 1
plugins: {BASE: {}, pixel: {}, probe: {}NSVQ}
log: {steps: 2, images: 2}
stages: [{name: joint, epochs: 2}, {name: refine, freeze: ["encoder.*"], hooks: {stage_transition: []}}]
"""
STEPS = 4


FIELDS = {"nsvq": "{replace_after: 0, noise: 0.05}", "ema": "{decay: 0.9}", "fsq": "{levels: [8, 4]}",
          "residual": "{depth: 2, shared: false}", "entropy": "{temperature: 0.1}", "factorized": "{dimension: 4}"}
BESIDE_VQ = ("nsvq", "ema", "rotation", "entropy", "factorized")


def plain(method):
    beside = f", {method}: {FIELDS.get(method, '{}')}" if method in BESIDE_VQ else ""
    base = "vq" if method in BESIDE_VQ else method
    text = PLAIN.replace("BASE: {}", f"{base}: {FIELDS.get(base, '{}')}").replace("NSVQ", beside)
    text += "hooks: {refresh_codes: []}\n" if method == "fsq" else ""
    text = text.replace("log: {steps: 100, images: 2, drift_images: 2}\n", "")
    return text if method == "nsvq" else text.replace(", hooks: {stage_transition: []}", "")


class Launched:
    """The folder in which two processes have gone through all scenarios, and the runs of one process beside them."""

    def __init__(self, folder, photos):
        self.folder = folder
        averaged = WHOLE.replace("  BASE: {}", "  ema: {decay: 0.9}\n  vq: {}").replace("BASE", "vq")
        texts = {f"whole_{base}": averaged if base == "ema" else WHOLE.replace("BASE", base) for base in BASES}
        texts |= {f"plain_{method}": plain(method) for method in METHODS}
        for name, text in texts.items():
            (folder / f"{name}.yaml").write_text(text.replace("ROOT", str(photos)))
        for method in METHODS:
            run(self.recipe(f"plain_{method}"), folder / f"one_{method}")
        self.stop("widened", 2)
        self.stop("locked", 1)
        shutil.copytree(folder / "widened", folder / "one_stopped")
        with FileLock(folder / "locked" / ".lock"):
            self.said = self.launch()

    def launch(self):
        """Start as many launchers as there are processes, each of which thinks that it is on a machine of its own."""
        port, started = free_port(), []
        for machine in range(PROCESSES):
            launcher = ["torch.distributed.run", f"--nnodes={PROCESSES}", "--nproc_per_node=1", f"--node_rank={machine}",
                        "--master_addr=127.0.0.1", f"--master_port={port}"]
            command = [sys.executable, "-m", *launcher, str(Path(__file__).with_name("scenarios.py")), str(self.folder)]
            started.append(subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True))
        try:
            said = [process.communicate(timeout=LONGEST)[1] for process in started]
        finally:
            for process in started:
                process.kill()
        assert [process.returncode for process in started] == PROCESSES * [0], said[0][-5000:] + said[1][-5000:]
        return said[0]

    def recipe(self, name, *overrides):
        return load_recipe(str(self.folder / f"{name}.yaml"), list(overrides))

    def stop(self, name, step):
        """Let one process begin a run and be told to stop within a step."""
        from plugins_for_tests import Probe

        from vqzoo.trainer import Trainer

        job = Trainer(self.recipe("plain_nsvq" if name == "widened" else "plain_vq"), self.folder / name)
        Probe.listeners["refresh_codes"] = at(step, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            job.run()
        Probe.listeners.clear()

    def ended(self, scenario):
        return [json.loads((self.folder / f"{scenario}_{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def launched(small_photos, tiny_runs, tmp_path_factory):
    return Launched(tmp_path_factory.mktemp("launched"), small_photos)


def steps(out):
    return [step for step, _ in checkpoint.complete(out / "checkpoints")]


@pytest.mark.fault(5)
@pytest.mark.parametrize("base", BASES)
def test_a_signal_to_one_process_saves_and_ends_both(launched, base):
    for ended in launched.ended(f"signalled_{base}"):
        text = "SIGTERM at step 5: saved; --resume auto goes on from there"
        assert ended == {"type": "Interrupted", "status": 143, "text": text}
    assert steps(launched.folder / f"signalled_{base}")[0] == 5


@pytest.mark.fault(1, 2, 5)
@pytest.mark.parametrize("base", BASES)
def test_two_processes_go_on_bit_for_bit(launched, base):
    assert [ended["type"] for kind in ("whole", "resumed") for ended in launched.ended(f"{kind}_{base}")] == 4 * [None]
    assert_same_end(launched.folder / f"resumed_{base}", launched.folder / f"whole_{base}")


@pytest.mark.fault(11)
def test_two_processes_go_on_with_what_one_began(launched):
    assert [ended["type"] for ended in launched.ended("widened")] == 2 * [None]
    assert "1 processes wrote it and 2 go on: the same 8 images a step" in launched.said
    compare_with_one(launched, "widened")


@pytest.mark.fault(11)
def test_one_process_goes_on_with_what_two_began(launched, capsys):
    assert [ended["type"] for ended in launched.ended("narrowed")] == 2 * ["Interrupted"]
    run(launched.recipe("plain_nsvq"), launched.folder / "narrowed", resume="auto")
    assert "2 processes wrote it and 1 go on" in capsys.readouterr().err
    compare_with_one(launched, "narrowed")


def compare_with_one(launched, name):
    whole, mine = (checkpoint_at(launched.folder / folder, STEPS) for folder in ("one_nsvq", name))
    assert_equal_up_to_rounding(whole, mine, STEPS)
    codes = [saved["tokenizer"]["codebook.weight"] for saved in (mine, whole)]
    torch.testing.assert_close(*codes, rtol=1e-4, atol=1e-5)
    rates = [[(e.step, e.value) for e in events(launched.folder / folder).Scalars("train/learning_rate")]
             for folder in ("one_nsvq", name)]
    assert rates[0] == rates[1]


@pytest.mark.fault(27, 28)
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_what_one_does_up_to_rounding(launched, method):
    assert [ended["type"] for ended in launched.ended(f"two_{method}")] == 2 * [None]
    one, two = (checkpoint_at(launched.folder / f"{who}_{method}", STEPS) for who in ("one", "two"))
    assert_equal_up_to_rounding(one, two, STEPS)
    assert torch.equal(one["codes"]["age"], two["codes"]["age"]) or method == "nsvq"


@pytest.mark.fault(28)
def test_codebooks_that_differ_by_one_bit_are_found_and_named(launched):
    for ended in launched.ended("diverged"):
        assert ended["type"] == "PluginError"
        assert "step 2 (epoch" in ended["text"] and "codebook.weight: not the same on all 2 processes" in ended["text"]
        assert "refresh_codes is served by probe" in ended["text"]


@pytest.mark.fault(18)
def test_a_bad_update_of_one_process_is_skipped_by_both(launched):
    assert [ended["type"] for ended in launched.ended("poisoned")] == 2 * [None]
    place = launched.folder / "poisoned" / "failures" / "step_000000001_batch_000000001"
    files = {f"{name}_rank{rank}.{end}" for rank in range(2) for name, end in (("batch", "safetensors"), ("report", "json"))}
    assert {path.name for path in place.iterdir()} == {"recipe.yaml", *files}
    for rank in range(PROCESSES):  # each knows what went wrong on the other
        report = json.loads((place / f"report_rank{rank}.json").read_text())
        assert report["process"] == rank and any("loss 'l1'" in term for term in report["terms"])
    assert steps(launched.folder / "poisoned")[0] == STEPS


@pytest.mark.fault(31)
def test_a_process_without_images_saves_and_ends_both(launched):
    first, second = launched.ended("unreadable")
    assert first["type"] == second["type"] == "DataError"
    assert "another process cannot read its images" in first["text"] and "a worker died" in second["text"]
    assert steps(launched.folder / "unreadable") == [3]


@pytest.mark.fault(16)
def test_a_folder_in_use_is_refused_on_both_processes(launched):
    for ended in launched.ended("locked"):
        assert ended["type"] == "UserError" and "another process is writing to" in ended["text"]
