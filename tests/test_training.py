"""Whole runs in one process: what they leave, what stages do to weights and moments, and how they stop and go on."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from PIL import Image
from plugins_for_tests import Probe
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vqzoo import NonFiniteError, UserError, checkpoint, cli, trainer
from vqzoo.recipe import OptimConfig, load_recipe
from vqzoo.stage import learning_rate_factor
from vqzoo.trainer import Trainer

pytestmark = pytest.mark.usefixtures("listeners")
STEPS_PER_EPOCH = 2  # 16 images in batches of 8
COMMON = """
ema: 0.9
data: {root: ROOT, resolution: [32, 32], batch_size: 8, eval_batch_size: 4, workers: 0}
encoder: {name: vqgan_encoder, stride: 4, args: {width: 8, mult: [1, 2], blocks: 1, patch: 2}}
decoder: {name: conv, args: {width: 8, mult: [1, 2], blocks: 1, patch: 2}}
codebook: {size: 32, width: 8}
optim: {lr: 2e-3}
log: {steps: 100, images: 2, drift_images: 2}
evaluate: {epochs: 100}
checkpoint: {keep: 100}
"""
VQ = COMMON + """
epochs: 2
plugins: {vq: {}, pixel: {}, probe: {}}
"""
THREE_STAGES = COMMON + """
epochs: 5
plugins: {probe: {}, BASE: {}, nsvq: {replace_after: 0, temperature: 0.1}, pixel: {l1: 1.0, l2: 0.1}}
hooks: {embedding_loss: [BASE, nsvq, probe]}
stages:
  - {name: joint, epochs: 2}
  - name: warm-up
    epochs: 1
    freeze: ["encoder.*"]
    hooks: {embedding_loss: [BASE, probe], refresh_codes: [probe], stage_transition: []}
  - name: refine
    freeze: ["encoder.*"]
    hooks: {embedding_loss: [BASE, probe], refresh_codes: [probe], stage_transition: []}
"""
NSVQ = THREE_STAGES.replace("BASE", "vq")
SIMVQ = THREE_STAGES.replace("BASE", "simvq")
ADVERSARIAL = COMMON + """
epochs: 4
plugins: {probe: {}, vq: {}, nsvq: {replace_after: 0}, pixel: {}, adversary: {}}
discriminator_optim: {lr: 1e-3}
stages:
  - {name: joint, epochs: 2}
  - {name: pause, epochs: 1, freeze: ["encoder.*"],
     hooks: {embedding_loss: [vq], stage_transition: [], reconstruction_loss: [pixel], discriminator_loss: []}}
  - {name: refine, freeze: ["encoder.*"], hooks: {embedding_loss: [vq], stage_transition: []}}
"""


def state(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def unequal(one, other):
    """Return the names of tensors that are not bit-equal."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def exported(out):
    return load_file(out / "tokenizer" / "model.safetensors")


def checkpoint_at(out, step):
    return checkpoint.load(out / "checkpoints" / f"step_{step:09d}")[0]


def events(out):
    found = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return found.Reload()


def run(recipe, out, **how):
    return Trainer(recipe, out, **how).run()


# ---- a whole run, and what it leaves


class Finished:
    """A run of NSVQ's three stages, with what a probe saw on the way."""

    def __init__(self, recipe, out):
        self.recipe, self.out = recipe, out
        self.entered = []
        self.losses = []
        trainer = Trainer(recipe, out)  # which asks the hooks once, to see that they answer
        Probe.listeners.update(enter_stage=self.enter, embedding_loss=self.look)
        self.result = trainer.run()
        self.last = self.snapshot(trainer.tokenizer)
        Probe.listeners.clear()

    def enter(self, leaving, entering, tokenizer, batches, result):
        if leaving is None:
            self.fixed = next(batches)
        self.entered.append((leaving, entering, self.snapshot(tokenizer)))

    def look(self, result, progress, latents, **_):
        self.losses.append((progress.stage, set(result), latents.requires_grad))

    def snapshot(self, tokenizer):
        tokenizer.eval()
        with torch.no_grad():
            return {**state(tokenizer), "latents": tokenizer.latents(self.fixed)[0]}


@pytest.fixture(scope="module", params=["nsvq", "simvq_nsvq"])
def finished(request, recipe, tmp_path_factory):
    text = {"nsvq": NSVQ, "simvq_nsvq": SIMVQ}[request.param]
    tiny = recipe(text, "log.steps=1", "evaluate.epochs=2", "optim.schedule=cosine", "optim.warmup_steps=2")
    return Finished(tiny, tmp_path_factory.mktemp(request.param) / "run")


def test_a_run_leaves_its_artefacts(finished):
    assert {path.name for path in finished.out.iterdir()} == {
        ".lock", "recipe.yaml", "metrics.json", "reconstructions.png", "tensorboard", "checkpoints", "tokenizer", "best"
    }
    assert {path.name for path in (finished.out / "tokenizer").iterdir()} == {"config.json", "model.safetensors"}
    assert [path.name for path in sorted((finished.out / "checkpoints").iterdir())] == [
        f"step_{step:09d}" for step in (2, 4, 6, 8, 10)
    ]
    with Image.open(finished.out / "reconstructions.png") as picture:
        assert picture.size == (2 * 32, 2 * 32)  # two held-out images above their reconstructions


def test_metrics_json_has_its_structure(finished):
    content = json.loads((finished.out / "metrics.json").read_text())
    assert content == json.loads(json.dumps(finished.result))
    assert set(content) == {"metrics", "missing", "usage_curve", "run", "card"} and content["missing"] == {}
    assert content["usage_curve"][-1] == [7, pytest.approx(content["metrics"]["usage"])]
    metrics = content["metrics"]
    assert set(metrics) == {
        "psnr", "ssim", "usage", "perplexity", "entropy", "codebook_size", "tokens_per_image", "bits_per_token", "images"
    }
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["codebook_size"] == 32 and metrics["bits_per_token"] == 5
    assert metrics["tokens_per_image"] == 64 and metrics["images"] == 7
    assert 1 / 32 <= metrics["usage"] <= 1 and 1 <= metrics["perplexity"] <= 32 * metrics["usage"] + 1e-3
    assert {"step", "stage", "transitions", "images_per_second", "seconds"} <= set(content["run"])
    assert content["run"]["step"] == 10 and content["run"]["stage"] == "refine"
    assert [(t["step"], t["from"], t["to"]) for t in content["run"]["transitions"]] == [
        (4, "joint", "warm-up"), (6, "warm-up", "refine")
    ]
    assert [t["reason"] for t in content["run"]["transitions"]] == ["its 2 epochs are over", "its 1 epochs are over"]


def test_the_resolved_recipe_reloads_to_an_equal_one(finished):
    again = load_recipe(str(finished.out / "recipe.yaml"))
    assert {"vqzoo", "torch", "plugin nsvq", "plugin probe"} <= set(again.versions)
    assert replace(again, versions={}) == finished.recipe


def test_tensorboard_has_what_is_promised(finished):
    found = events(finished.out)
    scalars, steps = set(found.Tags()["scalars"]), list(range(1, 11))
    assert {
        "loss/codebook", "loss/commitment", "loss/nonstationary", "loss/l1", "loss/l2", "train/learning_rate",
        "train/images_per_second", "train/peak_mib", "codes/usage", "codes/perplexity", "codes/dead", "codes/replaced",
        "held_out/psnr", "drift/encoder_drift", "drift/assignment_churn",
    } <= scalars
    assert found.Tags()["histograms"] == ["codes/log10_of_1_plus_assignments", "codes/age"]
    assert len(found.Images("reconstructions")) == 3  # after epochs 2 and 4 and at the end
    text = " ".join(e.tensor_proto.string_val[0].decode() for e in found.Tensors("events/text_summary"))
    assert "joint → warm-up" in text and "warm-up → refine" in text
    assert [e.step for e in found.Scalars("loss/l1")] == steps
    assert all(math.isfinite(e.value) for tag in scalars for e in found.Scalars(tag))
    rates = [e.value for e in found.Scalars("train/learning_rate")]
    cosine = [(1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)]
    assert rates == pytest.approx([1e-3, 2e-3] + [2e-3 * factor for factor in cosine])


def test_losses_of_the_encoder_end_with_the_freeze(finished):
    found = events(finished.out)
    for tag in ("loss/commitment", "loss/nonstationary"):
        assert [e.step for e in found.Scalars(tag)] == [1, 2, 3, 4]
    assert [e.step for e in found.Scalars("loss/codebook")] == list(range(1, 11))
    trained = [(names, moves) for stage, names, moves in finished.losses if stage == "joint"]
    frozen = [(names, moves) for stage, names, moves in finished.losses if stage != "joint"]
    assert trained == 4 * [({"codebook", "commitment", "nonstationary"}, True)]
    assert frozen == 6 * [({"codebook"}, False)]


def test_a_frozen_encoder_stands_still_and_the_rest_moves(finished):
    assert [(a, b) for a, b, _ in finished.entered] == [(None, "joint"), ("joint", "warm-up"), ("warm-up", "refine")]
    start, warm_up, refine = (snapshot for *_, snapshot in finished.entered)
    joint = unequal(start, warm_up)
    assert "latents" in joint and any(name.startswith("encoder.") for name in joint)
    for before, after in ((warm_up, refine), (refine, finished.last)):
        moved = unequal(before, after)
        assert not [name for name in moved if name.startswith("encoder.") or name == "latents"]
        assert any(name.startswith("codebook.") for name in moved)
        assert {n for n in before if n.startswith("decoder.") and n.endswith("weight")} <= set(moved)
        assert "codebook.table" not in moved


@pytest.mark.fault(39)
def test_the_export_is_the_average_and_reproduces_the_metrics(finished):
    saved = checkpoint_at(finished.out, 10)
    export = exported(finished.out)
    assert not unequal(export, {name: saved["average"][name] for name in export})
    assert any(not torch.equal(export[name], saved["tokenizer"][name]) for name in export)
    out = finished.out.parent / "eval.json"
    root = Path(finished.recipe.data.root)
    assert cli.main(["eval", str(finished.out), "--data", str(root / "val"), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["metrics"] == pytest.approx(finished.result["metrics"], rel=1e-5)


def test_a_photo_recipe_trains_from_the_built_in_images(recipe, tmp_path):
    result = run(recipe(VQ, "data.name=photos", "epochs=1", "epoch_steps=2"), tmp_path / "run")
    assert result["run"]["step"] == 2 and result["metrics"]["images"] > 7 and math.isfinite(result["metrics"]["psnr"])


# ---- when a stage ends


def test_a_plateau_ends_the_first_stage_and_the_last_takes_the_rest(recipe, tmp_path, small_photos):
    for split in ("train", "val"):  # one picture again and again, and nothing learnt: the commitment loss stays as it is
        (tmp_path / "same" / split).mkdir(parents=True)
        for number in range(8):
            with Image.open(small_photos / "train" / "00.png") as image:
                image.resize((32, 32)).save(tmp_path / "same" / split / f"{number}.png")
    tiny = recipe(NSVQ, f"data.root={tmp_path / 'same'}", "optim.lr=1e-30", "epochs=12", "stages[0].epochs=8",
                  "plugins.nsvq.patience=2", "plugins.nsvq.replace_after=100")
    result = run(tiny, tmp_path / "run")
    joint, warm_up = result["run"]["transitions"]
    assert (joint["epoch"], joint["from"]) == (3, "joint")  # one minimum, and two epochs without a new one
    assert joint["reason"] == "no new minimum of the commitment loss in 2 epochs"
    assert warm_up["epoch"] == 4
    assert (result["run"]["epoch"], result["run"]["step"], result["run"]["stage"]) == (12, 12, "refine")


def test_any_plugin_may_end_a_stage_and_none_ends_the_last(recipe, tmp_path, listeners):
    seen = []

    def enough(stage, progress, result):
        seen.append((stage, progress.epoch, progress.step, progress.ends_epoch))
        assert progress.means["l1"] > 0
        return "the probe has seen enough"

    listeners["stage_transition"] = enough
    tiny = recipe(VQ, "epochs=4", "stages=[{name: a, epochs: 2}, {name: b}]")
    transitions = run(tiny, tmp_path / "run")["run"]["transitions"]
    assert [(t["epoch"], t["reason"]) for t in transitions] == [(1, "the probe has seen enough")]
    assert seen == [("a", 0, 2, True), ("b", 1, 4, True), ("b", 2, 6, True), ("b", 3, 8, True)]


# ---- the discriminator


@pytest.fixture(scope="module")
def adversarial(recipe, tmp_path_factory):
    """A run with a discriminator, and what the probe saw: gradients, and the discriminator's weights at each step."""
    out, seen = tmp_path_factory.mktemp("adversarial") / "run", []
    tiny = recipe(ADVERSARIAL)
    job = Trainer(tiny, out)

    def before_discriminator_step(reconstructions, discriminator, progress, **_):
        assert discriminator is job.discriminator_model and not reconstructions.requires_grad
        seen.append(("discriminator", progress.stage, _with_gradient(discriminator), state(discriminator)))

    def after_both(**_):
        grads = _with_gradient(job.tokenizer) + _with_gradient(job.discriminator)
        seen.append(("refresh", job.stage, grads, state(job.discriminator)))

    def entering(entering, **_):
        seen.append(("enter", entering, [], state(job.discriminator)))

    Probe.listeners.update(discriminator_loss=before_discriminator_step, refresh_codes=after_both, enter_stage=entering)
    result = job.run()
    Probe.listeners.clear()
    return out, seen, result


def _with_gradient(module):
    return [name for name, parameter in module.named_parameters() if parameter.grad is not None]


def test_generator_and_discriminator_steps_leave_each_other_no_gradient(adversarial):
    _, seen, _ = adversarial
    assert [kind for kind, *_ in seen].count("discriminator") == 6 and [kind for kind, *_ in seen].count("refresh") == 8
    assert [(kind, grads) for kind, _, grads, _ in seen if grads] == []


def test_the_discriminator_has_its_own_optimizer_and_survives_transitions(adversarial):
    out, seen, _ = adversarial
    for before, after in itertools.pairwise(seen):
        moved = unequal(before[3], after[3])
        assert moved if (before[0], after[0]) == ("discriminator", "refresh") else not moved
    steps = {1: 2, 2: 4, 3: 4, 4: 6}  # epoch: steps of the discriminator's Adam; the second stage does without
    for epoch, expected in steps.items():
        saved = checkpoint_at(out, epoch * STEPS_PER_EPOCH)
        counts = {int(v) for name, v in saved["discriminator_optimizer"].items() if name.endswith("/step")}
        assert counts == {expected}
    paused, before = (checkpoint_at(out, step)["discriminator_optimizer"] for step in (6, 4))
    assert not unequal(paused, before) and len(before) == 3 * 4
    assert not unequal(checkpoint_at(out, 8)["discriminator"], seen[-1][3])


def test_adversarial_losses_are_logged_only_where_they_are_routed(adversarial):
    out, _, result = adversarial
    found = events(out)
    for tag in ("loss/adversarial", "loss/discriminator"):
        assert [e.step for e in found.Scalars(tag)] == [2, 4, 8]  # epochs' ends
    assert math.isfinite(result["metrics"]["psnr"])


# ---- accumulation


def watch_steps(listeners):
    """Record what refresh_codes is given at each step."""
    seen = []

    def record(codebook, latents, indices, counts, epoch_counts, progress, result):
        seen.append({"latents": latents, "indices": indices, "counts": counts, "epoch": epoch_counts.clone(),
                     "vectors": codebook.vectors().clone()})

    listeners["refresh_codes"] = record
    return seen


ACCUMULATED = {
    "vq": (VQ, "stages=[{name: a, epochs: 1}, {name: b, freeze: [encoder.*]}]"),
    "simvq": (VQ.replace("vq:", "simvq:"), "stages=[{name: a, epochs: 1}, {name: b, freeze: [encoder.*]}]"),
    "nsvq": (NSVQ, "epochs=3", "stages[0].epochs=1"),
    "adversarial": (ADVERSARIAL, "plugins.adversary.adaptive=false", "epochs=3", "stages[0].epochs=1"),
}


@pytest.mark.parametrize("method", ACCUMULATED)
def test_accumulated_micro_batches_equal_one_batch(recipe, tmp_path, listeners, method):
    runs = {}
    for parts in (1, 4):
        seen = watch_steps(listeners)
        words = ["optim.clip=1.0", f"accumulate={parts}", "seed=1"]  # with seed 0, a latent is as near to two codes as rounding
        job = Trainer(recipe(*ACCUMULATED[method], *words), tmp_path / str(parts))
        job.run()
        runs[parts] = seen, checkpoint_at(job.out, job.steps)
    for whole, parted in zip(runs[1][0], runs[4][0], strict=True):
        for key in ("indices", "counts", "epoch"):
            assert torch.equal(whole[key], parted[key])
        for key in ("latents", "vectors"):
            torch.testing.assert_close(whole[key], parted[key], rtol=0, atol=5e-5)
    if "nsvq" in ACCUMULATED[method][0]:
        assert (runs[1][0][1]["epoch"] == 0).any()  # so codes were replaced at the end of the first epoch, and alike
    assert_equal_up_to_rounding(runs[1][1], runs[4][1], len(runs[1][0]))


def assert_equal_up_to_rounding(one, other, steps):
    """Compare two checkpoints, except where Adam turns a gradient that is nothing but rounding into whole steps."""
    for kind in ("tokenizer", "average"):
        compared = 0
        for name, value in one[kind].items():
            squares = one["optimizer"].get(f"{name}/exp_avg_sq")
            real = torch.ones_like(value, dtype=bool) if squares is None else (squares / (1 - 0.999**steps)).sqrt() > 1e-6
            compared += int(real.sum())
            torch.testing.assert_close(value[real], other[kind][name][real], rtol=1e-4, atol=1e-5)
        assert compared > 0.95 * sum(value.numel() for value in one[kind].values())
    if "discriminator" in one:
        torch.testing.assert_close(one["discriminator"], other["discriminator"], rtol=1e-4, atol=1e-5)


# ---- moments, averages, learning rates


def test_moments_carry_over_by_name_and_rest_while_frozen(recipe, tmp_path):
    tiny = recipe(VQ, "epochs=3", "stages=[{name: a, epochs: 1}, {name: b, epochs: 1, freeze: ['encoder.*']}, {name: c}]")
    run(tiny, tmp_path / "run")
    a, b, c = (checkpoint_at(tmp_path / "run", step)["optimizer"] for step in (2, 4, 6))
    counts = [{part: {int(v) for name, v in saved.items() if name.startswith(part) and name.endswith("/step")}
               for part in ("encoder", "decoder", "codebook")} for saved in (a, b, c)]
    assert counts == [
        {"encoder": {2}, "decoder": {2}, "codebook": {2}},
        {"encoder": {2}, "decoder": {4}, "codebook": {4}},
        {"encoder": {4}, "decoder": {6}, "codebook": {6}},
    ]
    assert not [name for name in unequal(a, b) if name.startswith("encoder")]
    for name in (n for n in b if n.startswith("encoder") and n.endswith("exp_avg_sq")):  # it went on from these
        assert (c[name] >= b[name] * 0.999**2 * (1 - 1e-5)).all()


def test_replaced_codes_lose_their_moments_and_enter_the_average(recipe, tmp_path, listeners):
    job = Trainer(recipe(NSVQ, "codebook.size=64"), tmp_path / "run")
    dead = []

    def before_replacement(codebook, epoch_counts, progress, **_):
        if progress.ends_epoch and progress.stage == "joint":
            rows = (epoch_counts == 0).nonzero().squeeze(1)
            moments = job.optimizer.optimizer.state[codebook.weight]
            assert (moments["exp_avg"][rows] != 0).all() and (moments["exp_avg_sq"][rows] != 0).all()
            dead.append((rows, codebook.weight[rows].clone()))

    def after_replacement(stage, **_):
        rows, old = dead[-1]
        weight = job.tokenizer.codebook.weight
        moments = job.optimizer.optimizer.state[weight]
        kept = torch.ones(len(weight), dtype=bool).index_fill(0, rows, False)
        for key in ("exp_avg", "exp_avg_sq"):
            assert (moments[key][rows] == 0).all() and (moments[key][kept] != 0).all()
        assert (weight[rows] != old).any(1).all()
        assert torch.equal(job.ema.codebook.weight[rows], weight[rows])
        assert not torch.equal(job.ema.codebook.weight[kept], weight[kept])

    listeners.update(refresh_codes=before_replacement, stage_transition=after_replacement)
    job.run()
    assert [len(rows) > 0 for rows, _ in dead] == [True, True]
    logged = events(job.out).Scalars("codes/replaced")
    assert [e.value for e in logged] == [*(len(rows) for rows, _ in dead), 0, 0, 0]


def average_by_hand(decay):
    """Follow a weight's moving average in float64; the first steps weigh more."""
    average = None

    def follow(weight, step):
        nonlocal average
        now = weight.detach().double()
        share = min(decay, (1 + step) / (10 + step))
        average = now.clone() if average is None else share * average + (1 - share) * now
        return average

    return follow


@pytest.mark.fault(19)
@pytest.mark.parametrize("skipped", [set(), {1, 2, 5}], ids=["no skips", "skips"])
def test_average_schedule_refresh_and_steps_wait_for_skipped_steps(recipe, tmp_path, listeners, monkeypatch, skipped):
    calls = itertools.count()
    step = AcceleratedOptimizer.step

    def maybe(self, closure=None):
        self.overflowed = next(calls) in skipped
        if not self.overflowed:
            step(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", maybe)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: self.overflowed))
    job = Trainer(recipe(VQ, "epochs=3", "ema=0.15", "optim.schedule=linear", "log.steps=1"), tmp_path / "run")
    follow, steps = average_by_hand(0.15), []
    follow(job.tokenizer.decoder.last_layer, 0)

    def after(progress, **_):
        expected = follow(job.tokenizer.decoder.last_layer, progress.step)
        torch.testing.assert_close(job.ema.decoder.last_layer.double(), expected, rtol=1e-6, atol=1e-7)
        steps.append((progress.step, progress.step_in_stage, progress.ends_epoch))

    listeners["refresh_codes"] = after
    result = job.run()
    assert steps == [(n, n, n % 2 == 1) for n in range(6)] and result["run"]["step"] == 6
    assert job.counters.batches == 6 + len(skipped) and job.counters.skipped == 0
    rates = [e.value for e in events(job.out).Scalars("train/learning_rate")]
    assert rates == pytest.approx([2e-3 * (1 - n / 6) for n in range(6)])


@pytest.mark.fault(19)
def test_too_many_skipped_steps_stop_the_run(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "MOST_SKIPPED", 3)
    monkeypatch.setattr(AcceleratedOptimizer, "step", lambda self, closure=None: None)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", True)
    job = Trainer(recipe(VQ), tmp_path / "run")
    with pytest.raises(NonFiniteError, match="step 0: the fp16 scaler skipped 3 steps in a row"):
        job.run()
    assert job.counters.batches == 4 and job.counters.step == 0


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, {0: 1, 50: 1, 99: 1}),
        ("constant", 20, {0: 1 / 20, 9: 1 / 2, 19: 1, 20: 1, 99: 1}),
        ("linear", 0, {0: 1, 50: 1 / 2, 99: 1 / 100}),
        ("linear", 20, {0: 1 / 20, 19: 1, 20: 1, 60: 1 / 2, 99: 1 / 80}),
        ("cosine", 0, {0: 1, 25: (1 + math.sqrt(0.5)) / 2, 50: 1 / 2, 99: math.sin(math.pi / 200) ** 2, 100: 0}),
        ("cosine", 20, {0: 1 / 20, 19: 1, 20: 1, 60: 1 / 2, 100: 0}),
    ],
)
def test_learning_rate_schedules(schedule, warmup, expected):
    config = OptimConfig(schedule=schedule, warmup_steps=warmup)
    assert {step: learning_rate_factor(config, step, 100) for step in expected} == pytest.approx(expected)


def test_learning_rates_are_scaled_by_pattern_and_the_last_match_wins(recipe, tmp_path, listeners):
    scale = "optim.scale={'encoder.*': 5, 'codebook.*': 0.5, '*.bias': 0.1}"
    job = Trainer(recipe(VQ, scale, "optim.warmup_steps=4", "epochs=1"), tmp_path / "run")
    names = {parameter: name for name, parameter in job.tokenizer.named_parameters()}
    rates = []

    def look(**_):
        rates.append({names[p]: g["lr"] for g in job.optimizer.param_groups for p in g["params"]})

    listeners["refresh_codes"] = look
    job.run()
    for step, found in enumerate(rates):
        assert found.keys() == set(names.values())
        for name, rate in found.items():
            part = 0.1 if name.endswith(".bias") else {"encoder": 5, "codebook": 0.5}.get(name.split(".")[0], 1)
            assert rate == pytest.approx(2e-3 * (step + 1) / 4 * part)
    with pytest.raises(UserError, match=r"optim.scale: 'encodr\.\*' matches no parameter; did you mean 'encoder\.\*'"):
        Trainer(recipe(VQ, "optim.scale={'encodr.*': 5}"), tmp_path / "other")


def test_without_an_average_the_weights_themselves_are_exported(recipe, tmp_path):
    job = Trainer(recipe(VQ, "ema=0", "epochs=1"), tmp_path / "run")
    result = job.run()
    export = exported(job.out)
    assert not unequal(export, {name: tensor for name, tensor in state(job.tokenizer).items() if name in export})
    assert result["card"]["weights"] == "as trained"


# ---- where a run starts, and how long an epoch is


def test_a_run_starts_from_the_weights_of_another(recipe, tmp_path, listeners):
    run(recipe(VQ, "epochs=1"), tmp_path / "first")
    started = []
    listeners["enter_stage"] = lambda tokenizer, **_: started.append(state(tokenizer))
    run(recipe(VQ, f"init_from={tmp_path / 'first'}", "codebook.size=16", "epochs=1", "seed=1"), tmp_path / "second")
    first = exported(tmp_path / "first")
    same = [name for name in first if torch.equal(first[name], started[0][name])]
    assert set(first) - set(same) == {"codebook.weight"} and started[0]["codebook.weight"].shape == (16, 8)
    with pytest.raises(UserError, match="nowhere"):
        Trainer(recipe(VQ, f"init_from={tmp_path / 'nowhere'}"), tmp_path / "third")


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["epoch_steps=1"], 1),
        (["epoch_steps=3"], 3),
        (["data.batch_size=32"], 1),  # twice the images that there are
        (["data.batch_size=6"], 2),  # four images fill no batch
    ],
)
def test_the_length_of_an_epoch(recipe, tmp_path, listeners, overrides, steps):
    seen = []
    listeners["refresh_codes"] = lambda progress, latents, **_: seen.append((progress, len(latents)))
    tiny = recipe(VQ, *overrides)
    assert run(tiny, tmp_path / "run")["run"]["step"] == 2 * steps
    assert [(p.step, p.epoch, p.epoch_in_stage, p.steps_per_epoch, p.ends_epoch) for p, _ in seen] == [
        (n, n // steps, n // steps, steps, n % steps == steps - 1) for n in range(2 * steps)
    ]
    assert {tokens for _, tokens in seen} == {64 * tiny.data.batch_size}


# ---- what is not finite


def poison(kind):
    def listener(result, progress, reconstructions, **_):
        if progress.step != 3:
            return None
        zero = (reconstructions - reconstructions.detach()).square().sum()
        # the root has the value 0 and an infinite slope, which meets a slope of 0
        return [{"l1": result[0]["l1"] * torch.nan}] if kind == "loss" else [*result, {"root": zero.sqrt()}]

    return listener


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_the_update(recipe, tmp_path, listeners, kind):
    job = Trainer(recipe(VQ), tmp_path / "run")
    kept = []

    def everything():
        moments = {str(i): s["exp_avg"].clone() for i, s in enumerate(job.optimizer.optimizer.state.values())}
        return {**state(job.tokenizer), **moments}, state(job.ema)

    listeners["reconstruction_loss"] = poison(kind)
    listeners["refresh_codes"] = lambda progress, **_: kept.append(everything())
    term = "loss 'l1'" if kind == "loss" else r"gradient of \S+, gradient of \S+"
    with pytest.raises(NonFiniteError, match=rf"^step 3 \(epoch 1, stage 'train'\): {term}.* nothing was updated"):
        job.run()
    assert len(kept) == 3 and job.counters.step == 3
    for before, after in zip(kept[-1], everything(), strict=True):
        assert not unequal(before, after)


def test_the_command_reports_a_run_that_is_not_finite(recipe, small_photos, tmp_path, listeners, capsys):
    listeners["reconstruction_loss"] = poison("loss")
    (tmp_path / "recipe.yaml").write_text(VQ.replace("ROOT", str(small_photos)))
    assert cli.main(["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 1
    assert "NonFiniteError: step 3" in capsys.readouterr().err


def test_a_trainable_parameter_without_a_gradient_is_named(recipe, tmp_path, capsys):
    run(recipe(VQ, "plugins.idle={}", "epochs=1"), tmp_path / "run")
    said = [line for line in capsys.readouterr().err.splitlines() if "no gradient reaches" in line]
    assert said == ["stage train: no gradient reaches plugins.idle.forgotten"]


def test_it_stops_several_processes_before_their_first_update(recipe, tmp_path, listeners, monkeypatch):
    job = Trainer(recipe(VQ, "plugins.idle={}"), tmp_path / "run")
    before = state(job.tokenizer)
    pretend = property(lambda self: 2)
    listeners["reconstruction_loss"] = lambda **_: monkeypatch.setattr(type(job.accelerator), "num_processes", pretend)
    with pytest.raises(UserError, match=r"stage train: no gradient reaches plugins.idle.forgotten; .*stages\[0\].freeze"):
        job.run()
    assert not unequal(state(job.tokenizer), before)


def test_a_discriminator_loss_that_is_not_finite_spares_the_discriminator(recipe, tmp_path, listeners, monkeypatch):
    job = Trainer(recipe(ADVERSARIAL), tmp_path / "run")
    before = state(job.discriminator)
    listeners["discriminator_loss"] = lambda result, **_: {"discriminator": result["discriminator"] * torch.nan}
    with pytest.raises(NonFiniteError, match="^step 0 .* loss 'discriminator' of .* is not finite; the discriminator was not"):
        job.run()
    assert not unequal(state(job.discriminator), before)


# ---- precision


@pytest.mark.fault(25)
def test_bf16_leaves_the_quantizer_in_float32(recipe, tmp_path, listeners):
    AcceleratorState._reset_state(True)  # accelerate holds one precision per process
    seen = set()

    def note(hook):
        def listener(result, progress, **tensors):
            dtypes = {name: t.dtype for name, t in tensors.items() if isinstance(t, torch.Tensor)}
            seen.add((hook, progress is not None, torch.is_autocast_enabled("cpu"), *sorted(dtypes.items())))

        return listener

    try:
        job = Trainer(recipe(NSVQ, "precision=bf16", "epochs=3", "stages[0].epochs=1"), tmp_path / "run")
        listeners.update({hook: note(hook) for hook in ("quantize", "embedding_loss", "reconstruction_loss")})
        conv = next(m for m in job.tokenizer.decoder.modules() if isinstance(m, torch.nn.Conv2d))
        low = set()
        conv.register_forward_hook(lambda module, _, output: low.add((module.training, output.dtype)))
        result = job.run()
    finally:
        AcceleratorState._reset_state(True)
    single = torch.float32
    assert seen == {
        ("quantize", True, False, ("latents", single)),
        ("quantize", False, False, ("latents", single)),
        ("embedding_loss", True, False, ("codes", single), ("latents", single)),
        ("reconstruction_loss", True, True, ("images", single), ("reconstructions", single)),
    }
    assert (True, torch.bfloat16) in low
    assert math.isfinite(result["metrics"]["psnr"]) and len(result["run"]["transitions"]) == 2


def test_fp16_is_refused_without_a_gpu(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="precision: 'fp16' needs a GPU"):
        Trainer(recipe(VQ, "precision=fp16"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- stop and go on


class Stop(BaseException):
    """Stands for whatever ends a process; no Exception, which would be laid to the plugin that raised it."""


def stop_in(epoch):
    def listener(progress, **_):
        if progress.epoch == epoch and progress.step % STEPS_PER_EPOCH:
            raise Stop

    return listener


RESUMED = ADVERSARIAL, "plugins.kmeans={}", "optim.schedule=cosine", "epochs=5"


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    return out, run(recipe(*RESUMED), out)


@pytest.fixture
def interrupted(recipe, tmp_path, listeners):
    """Return the folder of a run that stopped within an epoch."""

    def stop(epoch):
        listeners["quantize"] = lambda progress, **_: stop_in(epoch)(progress) if progress else None
        with pytest.raises(Stop):
            run(recipe(*RESUMED), tmp_path / "run")
        listeners.clear()
        return tmp_path / "run"

    return stop


@pytest.mark.parametrize("epoch", [0, 1, 2, 4], ids=["no checkpoint", "in a stage", "at a boundary", "in the last stage"])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(recipe, uninterrupted, interrupted, epoch):
    out = interrupted(epoch)
    saved = [int(path.name[5:]) for path in sorted((out / "checkpoints").glob("*"))]
    assert saved == [2 * n for n in range(1, epoch + 1)]
    result = run(recipe(*RESUMED), out, resume="auto")
    whole_out, whole = uninterrupted
    assert result["metrics"] == whole["metrics"]
    for key in ("step", "epoch", "stage", "transitions"):
        assert result["run"][key] == whole["run"][key]
    assert not unequal(exported(out), exported(whole_out))
    mine, theirs = checkpoint_at(out, 10), checkpoint_at(whole_out, 10)
    assert mine.keys() == theirs.keys()
    for kind in mine:
        assert not unequal(mine[kind], theirs[kind]), kind


def test_a_finished_run_resumes_to_itself(recipe, uninterrupted):
    out, whole = uninterrupted
    assert run(recipe(*RESUMED), out, resume="auto")["metrics"] == whole["metrics"]


def test_a_used_folder_is_refused_unless_the_same_recipe_resumes(recipe, uninterrupted):
    out, _ = uninterrupted
    before = (out / "recipe.yaml").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        Trainer(recipe(*RESUMED), out)
    with pytest.raises(UserError) as caught:
        Trainer(recipe(*RESUMED, "optim.lr=0.1", "plugins.nsvq.noise=0.5"), out, resume="auto")
    assert str(caught.value).splitlines()[1:-1] == ["  plugins.nsvq.noise: 0.001 → 0.5", "  optim.lr: 0.002 → 0.1"]
    assert (out / "recipe.yaml").read_bytes() == before


def test_old_checkpoints_are_dropped(recipe, tmp_path):
    run(recipe(VQ, "epochs=4", "checkpoint.keep=2"), tmp_path / "run")
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step_000000006", "step_000000008"}


# ---- determinism


@pytest.mark.fault(26)
def test_the_seed_decides_everything_and_workers_nothing(recipe, tmp_path):
    runs = {"one": [], "again": [], "workers": ["data.workers=2"], "seed": ["seed=1"]}
    for name, overrides in runs.items():
        run(recipe(NSVQ, "data.flip=true", "epochs=3", "stages[0].epochs=1", *overrides), tmp_path / name)
    one = exported(tmp_path / "one")
    assert not unequal(one, exported(tmp_path / "again"))
    assert not unequal(one, exported(tmp_path / "workers"))
    assert "codebook.weight" in unequal(one, exported(tmp_path / "seed"))
