"""What makes a step fast and must change nothing else: no waiting for the device, fused optimizers, compiled networks."""

import json
import shutil
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vqzoo import NonFiniteError, UserError, checkpoint, trainer
from vqzoo.guard import Guard, Update
from vqzoo.plugin import Progress
from vqzoo.prepare import check_compiler
from vqzoo.recipe import OptimConfig
from vqzoo.stage import make_optimizer, take_moments
from vqzoo.trainer import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import profile_step

GPU = torch.cuda.is_available()  # asked before other tests pretend that there is none
pytestmark = pytest.mark.usefixtures("listeners")
TINY = """
epochs: 2
ema: 0.9
data: {root: ROOT, resolution: [32, 32], batch_size: 4, eval_batch_size: 4, workers: 0}
encoder: {name: vqgan_encoder, stride: 4, args: {width: 8, mult: [1, 2], blocks: 1, patch: 2}}
decoder: {name: conv, args: {width: 8, mult: [1, 2], blocks: 1, patch: 2}}
codebook: {size: 32, width: 8}
optim: {lr: 2e-3, clip: 1.0}
log: {steps: 100, images: 2, drift_images: 2}
evaluate: {epochs: 100}
checkpoint: {keep: 100}
"""
PLAIN = TINY + "plugins: {BASE: {}, nsvq: {replace_after: 0}, pixel: {}, probe: {}}"
ADVERSARIAL = TINY + "plugins: {vq: {}, pixel: {}, gan: {layers: 1, width: 8, adaptive: true, lecam: 0.1}, probe: {}}"


def tensors(job):
    """Return copies of all that a bad update must leave alone: weights, averages, codes, moments, step counts."""
    found = {f"ema.{key}": value for key, value in job.ema.named_parameters()}  # its buffers are copied when it is looked at
    for name, module in (("tokenizer", job.tokenizer), ("discriminator", job.discriminator)):
        found |= {f"{name}.{key}": value for key, value in module.state_dict().items()} if module is not None else {}
    for name in ("optimizer", "discriminator_optimizer"):
        states = getattr(job, name).optimizer.state.values() if getattr(job, name, None) is not None else ()
        found |= {f"{name}.{n}.{key}": value for n, state in enumerate(states) for key, value in state.items()}
    return {key: value.detach().clone() for key, value in found.items()}


# ---- nothing is waited for


@pytest.fixture
def deferred(monkeypatch):
    monkeypatch.setattr(trainer, "ASYNCHRONOUS", ("cpu",))


def poison(reconstructions, result, kind):
    if kind == "loss":
        return [{**result[0], "l1": result[0]["l1"] * torch.nan}, *result[1:]]
    zero = (reconstructions - reconstructions.detach()).square().sum()
    return [*result, {"root": zero.sqrt()}]  # its value is 0, its slope infinite


@pytest.mark.parametrize("log_steps", [100, 3])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("base", ["vq", "simvq"])
def test_a_verdict_read_late_has_let_nothing_through(recipe, tmp_path, listeners, deferred, base, kind, log_steps):
    job = Trainer(recipe(PLAIN.replace("BASE", base), f"log.steps={log_steps}"), tmp_path / "run")
    job.steps_per_epoch, bad = 6, 8  # within the second epoch; read at its end, or at the first entry of the log
    before, steps = {}, []

    def listen(result, progress, reconstructions, **_):
        steps.append(progress.step)
        if progress.step == bad:
            before.update(tensors(job))
            return poison(reconstructions, result, kind)
        return None

    def smooth(codebook, progress, **_):  # a refresh at each step, as a moving average is
        rows = torch.arange(4)
        codebook.replace_(rows, codebook.vectors()[rows] * 0.99, smooth=progress.step % 2 == 0)

    listeners.update(reconstruction_loss=listen, refresh_codes=smooth)
    term = "loss 'l1' of .*" if kind == "loss" else r"gradient of \S+, gradient of \S+, gradient of \S+"
    with pytest.raises(NonFiniteError, match=rf"^step 8 \(epoch 1, stage 'train'\): {term} is not finite; nothing was upd"):
        job.run()
    assert steps[-1] == (8 if log_steps == 3 else 11)
    after = tensors(job)
    assert before.keys() == after.keys()
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000000006"]


def test_a_discriminator_that_is_not_finite_stops_both_networks(recipe, tmp_path, listeners, deferred, monkeypatch):
    job = Trainer(recipe(ADVERSARIAL), tmp_path / "run")
    job.steps_per_epoch, found = 6, []
    original = job._discriminator_step

    def step(images, outputs, progress):
        if progress.step == 3:
            found.append(tensors(job))  # the tokenizer took its step already
            images = [image * torch.nan for image in images]
        return original(images, outputs, progress)

    monkeypatch.setattr(job, "_discriminator_step", step)
    with pytest.raises(NonFiniteError, match="^step 3 .*loss 'discriminator' .*'lecam' .* is not .*; the discriminator was"):
        job.run()
    after = tensors(job)
    moved = [name for name in after if not torch.equal(found[0][name], after[name])]
    assert all("running" in name or "num_batches" in name or "plugins.gan" in name for name in moved), moved


@pytest.mark.parametrize("text", [PLAIN.replace("BASE", "vq"), PLAIN.replace("BASE", "simvq"), ADVERSARIAL])
def test_deferring_changes_no_bit_of_a_run(recipe, tmp_path, monkeypatch, text):
    ended = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(trainer, "ASYNCHRONOUS", devices)
        job = Trainer(recipe(text), tmp_path / f"run{len(devices)}")
        job.run()
        assert job.guard.deferred == bool(devices)
        ended.append(job)
    one, other = (job.tokenizer.state_dict() | job.ema.state_dict() for job in ended)
    assert not [name for name in one if not torch.equal(one[name], other[name])]


class HostReads(TorchDispatchMode):
    """List the operators that make a host wait for its device."""

    WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "_unique", "masked_select", "repeat_interleave")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        boolean = name in ("index", "index_put_", "_index_put_impl_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1])
        if name.startswith(self.WAITING) or boolean:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """List the calls that take a tensor's memory to the host past all operators."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("text", [PLAIN.replace("BASE", "vq"), PLAIN.replace("BASE", "simvq"), ADVERSARIAL],
                         ids=["nsvq", "simvq", "gan"])
def test_a_steady_step_reads_nothing_on_the_host(recipe, tmp_path, monkeypatch, deferred, text):
    job = Trainer(recipe(text), tmp_path / "run")
    job.steps_per_epoch, reads, step = 5, {}, job._step
    monkeypatch.setattr(trainer, "code_usage", lambda indices, size: torch.zeros(size, dtype=torch.int64).scatter_add_(
        0, indices.flatten(), torch.ones_like(indices.flatten())))  # as on a GPU; on a CPU it checks the range

    def watched(batches, ends_epoch):
        with HostReads() as operators, Lists() as calls:
            done = step(batches, ends_epoch)
        reads[job.counters.step] = operators.found + calls.found
        return done

    monkeypatch.setattr(job, "_step", watched)
    job.run()
    assert {number: reads[number] for number in (2, 3, 4, 7, 8, 9)} == dict.fromkeys((2, 3, 4, 7, 8, 9), [])
    assert reads[5] and reads[10]  # an epoch's end reads the verdicts, which shows that such reads are seen


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    AcceleratorState._reset_state(True)
    yield
    torch.cuda.set_sync_debug_mode("default")
    AcceleratorState._reset_state(True)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("text", [PLAIN.replace("BASE", "vq"), PLAIN.replace("BASE", "simvq"), ADVERSARIAL],
                         ids=["nsvq", "simvq", "gan"])
def test_a_gpu_is_never_waited_for_within_a_steady_step(recipe, tmp_path, gpu, text):
    job = Trainer(recipe(text), tmp_path / "run")
    job.steps_per_epoch, step = 6, job._step

    def watched(batches, ends_epoch):
        torch.cuda.set_sync_debug_mode("error" if 2 <= job.counters.step < 5 else "default")
        return step(batches, ends_epoch)

    job._step = watched
    assert job.guard.deferred and job.device.type == "cuda"
    job.run()
    assert job.counters.step == 12


def test_a_guard_names_the_first_bad_update():
    guard, good = Guard(torch.device("cpu"), deferred=True), torch.ones(())
    for step, value in enumerate((good, good * torch.inf, good * torch.nan)):
        update = Update(step, step, f"step {step}", "nothing was updated")
        guard.judge(update, {"loss 'l1'": value}, {"w": value}, {})
    assert guard.stopped == 1
    with pytest.raises(NonFiniteError, match="^step 1: loss 'l1' is not finite; nothing was updated$"):
        guard.check()
    guard.check()  # what was read is forgotten


# ---- the optimizer


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_fused_optimizer_takes_the_steps_of_the_plain_one(name):
    modules, config = [], OptimConfig(name=name, lr=1e-2, weight_decay=0.1)
    for fused in (True, False):
        torch.manual_seed(0)
        module, moments = torch.nn.Conv2d(3, 4, 3), {}
        for _ in range(3):  # each time a new optimizer, which goes on from the moments
            optimizer = make_optimizer(module, config, moments, fused)
            optimizer.zero_grad()
            module(torch.randn(2, 3, 8, 8)).square().mean().backward()
            optimizer.step()
            take_moments(module, optimizer, moments)
        assert moments["weight"]["step"] == 3
        modules.append(module)
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict(), rtol=1e-5, atol=1e-6)


def test_moments_come_back_with_their_parameters_strides():
    module = torch.nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    value = torch.arange(8 * 8 * 9.0).view(8, 8, 3, 3)
    moments = {"weight": {"step": torch.tensor(2.0), "exp_avg": value, "exp_avg_sq": value}}
    state = make_optimizer(module, OptimConfig(), moments).state[module.weight]
    assert state["exp_avg"].stride() == module.weight.stride() and torch.equal(state["exp_avg"], value)


# ---- the profile


def test_the_profile_of_a_step_names_its_parts(small_photos, tmp_path, capsys, tiny_runs):
    (tmp_path / "tiny.yaml").write_text(ADVERSARIAL.replace("ROOT", str(small_photos)).replace(", probe: {}", ""))
    assert profile_step.main([str(tmp_path / "tiny.yaml"), "--steps", "2", "--warm-up", "1", "codebook.size=16"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert {"encoder", "decoder", "quantizer hooks", "backward", "optimizer", "discriminator", "average",
            "refresh and counts", "wait for data", "reconstruction losses", "rest of the step"} == set(found["parts"])
    assert all(time >= 0 for time in found["parts"].values()) and found["steps"] == 2
    assert "aten::convolution_backward" in found["operators"] and "| aten::convolution_backward |" in printed
    assert 0.5 < sum(found["parts"].values()) / found["step_ms"] < 2


# ---- compiled networks


@pytest.fixture
def traced(monkeypatch):
    """Have torch.compile capture graphs of forward and backward as ever, and run them without generating code."""
    compiled, original = [], torch.compile

    def trace(what, **options):
        compiled.append(what)
        return original(what, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", trace)
    torch.compiler.reset()
    yield compiled
    torch.compiler.reset()


COMPILED = ADVERSARIAL.replace("probe: {}", "probe: {}, kmeans: {}").replace("adaptive: true", "adaptive: true, r1: 1.0") + """
stages: [{name: joint, epochs: 1}, {name: refine, freeze: ["encoder.*"]}]
"""


def test_compiled_networks_train_as_others_do(recipe, tmp_path, listeners, traced):
    ended, losses = [], {False: [], True: []}
    for wanted in (False, True):
        job = Trainer(recipe(COMPILED, f"compile={wanted}"), tmp_path / f"{wanted}")
        assert len(traced) == (4 if wanted else 0)  # a trial, encoder, decoder, discriminator
        listeners["refresh_codes"] = lambda wanted=wanted, job=job, **_: losses[wanted].append(
            {name: float(value) for name, value in job.tally.losses.items()})
        job.run()
        listeners.clear()
        ended.append(job)
    assert len(losses[True]) == 8
    for one, other in zip(*losses.values(), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    plain, compiled = (checkpoint.load(job.out / "checkpoints" / "step_000000008")[0] for job in ended)
    for kind in plain:
        assert plain[kind].keys() == compiled[kind].keys()
    frozen = [name for name in plain["tokenizer"] if name.startswith("encoder.")]
    early = checkpoint.load(ended[1].out / "checkpoints" / "step_000000004")[0]["tokenizer"]
    assert not [name for name in frozen if not torch.equal(early[name], compiled["tokenizer"][name])]
    resumed = Trainer(recipe(COMPILED, "compile=true"), tmp_path / "True", resume="auto")
    assert resumed.counters.step == 8 and resumed.tokenizer._compiled


def test_only_training_runs_what_is_compiled(recipe, tmp_path, traced):
    tokenizer = Trainer(recipe(PLAIN.replace("BASE", "vq"), "compile=true"), tmp_path / "run").tokenizer
    images, ran = torch.zeros(2, 3, 32, 32), []
    networks = {name: getattr(tokenizer, name) for name in tokenizer._compiled}
    tokenizer._compiled = {name: lambda x, name=name: ran.append(name) or networks[name](x) for name in networks}
    tokenizer.train()(images, Progress(0, 0, "train", 0, 0, 1))
    assert ran == ["encoder", "decoder"]
    tokenizer.eval()(images)
    tokenizer.decode(tokenizer.encode(images))
    assert ran == ["encoder", "decoder"] and deepcopy(tokenizer)._compiled == {}


def test_a_machine_that_cannot_compile_is_told_before_training(recipe, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("\nno compiler here\nand more")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(UserError, match=r"^compile: torch.compile does not work here: no compiler here; it needs a C\+\+ comp"):
        Trainer(recipe(PLAIN.replace("BASE", "vq"), "compile=true"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_a_machine_with_a_compiler_passes_the_trial():
    check_compiler(torch.device("cpu"))
