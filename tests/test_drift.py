"""The instruments of drift against plain recomputation, the plugins around them, and the laboratory in miniature."""

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vqzoo import Codebook, Table, Tokenizer, UserError, checkpoint, monitor
from vqzoo.monitor import Drift
from vqzoo.prepare import build
from vqzoo.trainer import Trainer

pytestmark = pytest.mark.usefixtures("listeners")
COMMON = """
epochs: 3
data: {root: ROOT, resolution: [32, 32], batch_size: 8, eval_batch_size: 4, workers: 0}
encoder: {name: vqgan_encoder, stride: 4, args: {width: 8, mult: [1, 2], blocks: 1, patch: 2}}
decoder: {name: conv, args: {width: 8, mult: [1, 2], blocks: 1, patch: 2}}
codebook: {size: 48, width: 8}
optim: {lr: 2e-3}
log: {steps: 1, images: 2, drift_images: 3}
evaluate: {epochs: 100}
"""
VQ = COMMON + "plugins: {vq: {}, nsvq: {replace_after: 1}, pixel: {}, probe: {}}\n"
CONTINUOUS = COMMON + "plugins: {vq: {}, continuous: {}, pixel: {}, probe: {}}\n"
STEPS_PER_EPOCH = 2  # 16 images in batches of 8


def run(recipe, out, **how):
    trainer = Trainer(recipe, out, **how)
    return trainer, trainer.run()


def curves(out):
    found = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def pictures(seed=5):
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def shake(tokenizer):
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


# ---- Drift


@pytest.mark.parametrize("method", ["vq", "simvq"])
@pytest.mark.parametrize("most", [10_000, 10])
def test_every_instrument_equals_its_plain_recomputation(recipe, method, most, monkeypatch):
    monkeypatch.setattr(monitor, "MOST_CODES", most)
    tokenizer = build(recipe(VQ.replace(" {vq:", f" {{{method}:"))).eval()
    images, seen, found, vectors = pictures(), [], [], []
    drift = Drift(images)
    for _ in range(2):
        with torch.no_grad():
            seen.append(tokenizer(images))
            vectors.append(tokenizer.codebook.vectors().double().clone())
        found.append(drift.measure(tokenizer))
        shake(tokenizer)
    chosen = torch.arange(0, 48, 1 if most > 48 else 5)  # 48 codes, of which at most 10
    assert set(found[0]) == {"usage_fixed", "codebook_lag", "codebook_lag_unused"}
    for output, numbers, codes in zip(seen, found, vectors, strict=True):
        distances = torch.cdist(codes, output.latents.flatten(0, 1).double()).amin(1)[chosen]
        unused = torch.tensor([code not in output.indices for code in chosen])
        assert numbers["usage_fixed"] == pytest.approx(len(output.indices.unique()) / 48)
        assert numbers["codebook_lag"] == pytest.approx(float(distances.mean()), rel=1e-5)
        assert numbers["codebook_lag_unused"] == pytest.approx(float(distances[unused].mean()), rel=1e-5)
    moved = (seen[1].latents - seen[0].latents).double().square().mean().sqrt()
    assert found[1]["encoder_drift"] == pytest.approx(float(moved), rel=1e-5) and moved > 1e-3
    assert found[1]["assignment_churn"] == pytest.approx(float((seen[1].indices != seen[0].indices).double().mean()))
    assert found[1]["codebook_lag"] != found[0]["codebook_lag"]


def test_measuring_leaves_tokenizer_modes_and_random_state_as_they_were(recipe):
    tokenizer = build(recipe(VQ)).train()
    tokenizer.freeze(["encoder.*"])
    modes = [module.training for module in tokenizer.modules()]
    before, random = copy.deepcopy(tokenizer.state_dict()), torch.get_rng_state()
    drift = Drift(pictures())
    assert drift.measure(tokenizer) and drift.measure(tokenizer)["encoder_drift"] == 0
    assert [module.training for module in tokenizer.modules()] == modes and True in modes and False in modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())
    assert all(parameter.grad is None for parameter in tokenizer.parameters())


def test_training_does_not_depend_on_how_often_drift_is_measured(recipe, tmp_path):
    weights = [run(recipe(VQ, f"log.steps={steps}"), tmp_path / str(steps))[0].tokenizer.state_dict() for steps in (1, 100)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class Outputs:
    """Stands for a tokenizer that gives these latents and indices."""

    training = False

    def __init__(self, latents, indices, codebook):
        self.output, self.codebook = SimpleNamespace(latents=latents, indices=indices), codebook

    def __call__(self, images):
        return self.output

    def eval(self):
        pass

    train = __call__


class Fixed(Codebook):
    replaceable = False

    def compute_vectors(self):
        return torch.eye(self.size, self.width)


@pytest.mark.parametrize(("depth", "width", "codebook", "expected"), [
    (0, 4, Table(6, 4), {"usage_fixed", "codebook_lag", "codebook_lag_unused"}),
    (2, 4, Table(6, 4), {"usage_fixed"}),  # a latent is several codes' sum
    (0, 4, Fixed(6, 4), {"usage_fixed"}),  # codes that cannot move
    (0, 3, Table(6, 4), {"usage_fixed"}),  # latents live in another space
    (None, 4, Table(6, 4), set()),
], ids=["plain", "several codes", "implicit", "other width", "not discrete"])
def test_only_what_has_a_meaning_is_measured(depth, width, codebook, expected):
    indices = None if depth is None else torch.tensor([[0, 1, 1]]) if not depth else torch.tensor([[[0, 1], [1, 2], [2, 2]]])
    found = Drift(None).measure(Outputs(torch.randn(1, 3, width), indices, codebook))
    assert set(found) == expected
    if indices is not None:
        assert found["usage_fixed"] == pytest.approx(len(indices.unique()) / 6)


def test_where_every_code_is_used_none_has_an_unused_lag():
    found = Drift(None).measure(Outputs(torch.randn(1, 3, 4), torch.tensor([[0, 1, 1]]), Table(2, 4)))
    assert set(found) == {"usage_fixed", "codebook_lag"} and found["usage_fixed"] == 1


def test_churn_waits_when_the_number_of_codes_per_token_changes():
    drift, latents = Drift(None), torch.zeros(1, 3, 4)
    drift.measure(Outputs(latents, torch.zeros(1, 3, dtype=torch.int64), Table(6, 4)))
    found = drift.measure(Outputs(latents, torch.zeros(1, 3, 2, dtype=torch.int64), Table(6, 4)))
    assert "assignment_churn" not in found and found["encoder_drift"] == 0


# ---- the age of codes


class Ages:
    """Recompute from the counts of each step how long ago each code was assigned."""

    def __init__(self, listeners, replacing=lambda progress, codebook: ()):
        self.history, self.replacing = [torch.zeros(48, dtype=torch.int64)], replacing
        listeners["refresh_codes"] = self.look

    def look(self, codebook, counts, progress, **_):
        age = torch.tensor([0 if count else old + 1 for old, count in zip(self.history[-1].tolist(), counts, strict=True)])
        age[list(self.replacing(progress, codebook))] = 0
        self.history.append(age)


def never_replacing(text):
    return text.replace("nsvq: {replace_after: 1}", "nsvq: {replace_after: 100}")


def test_the_age_of_codes_is_that_of_a_plain_count(recipe, tmp_path, listeners):
    ages = Ages(listeners)
    trainer, _ = run(recipe(never_replacing(VQ)), tmp_path / "run")
    assert trainer.code_ages.dtype == torch.int64 and torch.equal(trainer.code_ages, ages.history[-1])
    assert ages.history[-1].max() > STEPS_PER_EPOCH > ages.history[-1].min()
    found = curves(tmp_path / "run")
    accumulator = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"histograms": 0})
    events = accumulator.Reload().Histograms("codes/age")
    assert [event.step for event in events] == [2, 4, 6]
    assert [event.histogram_value.sum for event in events] == [int(ages.history[step].sum()) for step in (2, 4, 6)]
    for step, age in enumerate(ages.history[1:], 1):
        assert found["codes/mean_age"][step] == pytest.approx(float(age.double().mean()))
        assert found["codes/older_than_an_epoch"][step] == pytest.approx(float((age > STEPS_PER_EPOCH).double().mean()))


def test_a_replaced_code_is_new_and_a_smoothly_moved_one_is_not(recipe, tmp_path, listeners):
    def replacing(progress, codebook):
        rows = torch.arange(40, 48)
        if progress.step == 3:
            codebook.replace_(rows, torch.full((8, 8), 9.0))
            return rows.tolist()
        codebook.replace_(torch.arange(48), codebook.vectors().detach().clone(), smooth=True)
        return ()

    ages = Ages(listeners, replacing)
    trainer, _ = run(recipe(never_replacing(VQ)), tmp_path / "run")
    assert torch.equal(trainer.code_ages, ages.history[-1])
    assert trainer.code_ages[40:].tolist() == 8 * [2]  # six steps, replaced at the end of the fourth, far from all latents


def test_a_resumed_run_knows_the_age_of_its_codes(recipe, tmp_path, listeners):
    whole, _ = run(recipe(never_replacing(VQ)), tmp_path / "whole")

    def stop(progress, **_):
        if progress and progress.step == 5:
            raise KeyboardInterrupt

    listeners["quantize"] = stop
    with pytest.raises(KeyboardInterrupt):
        run(recipe(never_replacing(VQ)), tmp_path / "run")
    listeners.clear()
    resumed, _ = run(recipe(never_replacing(VQ)), tmp_path / "run", resume="auto")
    assert torch.equal(resumed.code_ages, whole.code_ages) and whole.code_ages.max() > STEPS_PER_EPOCH
    for name in ("whole", "run"):
        saved = checkpoint.load(tmp_path / name / "checkpoints" / "step_000000006")[0]["codes"]["age"]
        assert torch.equal(saved, whole.code_ages)
    one, other = curves(tmp_path / "whole"), curves(tmp_path / "run")
    assert one["codes/mean_age"] == other["codes/mean_age"]


# ---- continuous


def test_continuous_hands_the_latents_through(recipe):
    tokenizer = build(recipe(CONTINUOUS)).train()
    assert tokenizer.hooks.providers("make_codebook") == ["vq"]
    output = tokenizer(pictures())
    assert output.indices is None and output.losses == {} and torch.equal(output.codes, output.latents)
    output.reconstructions.square().mean().backward()
    assert all(parameter.grad is not None for parameter in tokenizer.encoder.parameters())
    assert tokenizer.codebook.weight.grad is None
    assert torch.equal(tokenizer.eval()(pictures()).reconstructions, output.reconstructions)


def test_a_continuous_run_logs_reconstruction_and_drift_and_nothing_of_codes(recipe, tmp_path):
    text = CONTINUOUS.replace(", probe: {}", "") + "stages: [{name: train, freeze: ['codebook.*']}]\n"
    trainer, result = run(recipe(text), tmp_path / "run")
    assert "usage" not in result["metrics"] and result["metrics"]["psnr"] > 0
    found = curves(tmp_path / "run")
    assert {"loss/l1", "drift/encoder_drift"} <= set(found)
    assert not [tag for tag in found if tag.startswith("codes/") or tag in ("drift/usage_fixed", "drift/codebook_lag")]
    assert not trainer.code_ages.any()
    loaded = Tokenizer.from_pretrained(tmp_path / "run")
    with pytest.raises(UserError, match="not discrete"):
        loaded.encode(pictures())
    assert loaded(pictures()).reconstructions.isfinite().all()


# ---- kmeans at a stage's start


@pytest.mark.parametrize(("stage", "moves"), [
    (None, [True, False]), ("one", [True, False]), ("two", [False, True]), ("three", [False, False])
])
def test_kmeans_starts_the_stage_that_it_names_or_the_first(stage, moves):
    kind = importlib.import_module("vqzoo_plugins.kmeans").KMeans
    made = kind(kind.Config(stage=stage, latents_per_code=4, iterations=1))
    tokenizer = SimpleNamespace(codebook=Table(4, 2), latents=lambda images: (images, None))
    found = []
    for leaving, entering in ((None, "one"), ("one", "two")):
        made.enter_stage(leaving, entering, tokenizer, iter(lambda: torch.randn(1, 20, 2), None), torch.Generator())
        found.append(bool(tokenizer.codebook.take_replaced()))
    assert found == moves


# ---- the laboratory


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def laboratory():
    spec = importlib.util.spec_from_file_location("drift_laboratory", ROOT / "benchmarks" / "drift.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def rows(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_the_toy_leaves_table_figure_animations_and_rows(laboratory, tiny_runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert laboratory.main(["toy", "--methods", "vq+kmeans,simvq+nsvq", "--seeds", "1", "--out", str(out), "epochs=2",
                            "epoch_steps=5", "plugins.nsvq.replace_after=0"]) == 0
    motions, methods = ("translate", "shrink", "expand"), ("vq+kmeans", "simvq+nsvq")
    assert {path.name for path in out.iterdir()} == {
        "toy.png", "table.md", "results.jsonl", *(f"toy_{m}_{motion}.gif" for m in methods for motion in motions)
    }
    found = rows(out)
    assert [(row["motion"], row["method"]) for row in found] == [(motion, method) for motion in motions for method in methods]
    for row in found:
        assert 1 <= row["used_codes_end"] <= 15 and row["error_end"] > 0 and row["seed"] == 0
        assert row["hardware"]["device"] == "cpu" and {"torch", "vqzoo"} <= row["versions"].keys()
    assert (out / "table.md").read_text() in capsys.readouterr().out


def test_the_toy_repeats_itself_and_drives_every_hook_of_a_method(laboratory, tiny_runs, listeners):
    options = laboratory.parse(["toy", "--methods", "probe+vq+nsvq", "epochs=2", "epoch_steps=4", "optim.lr=0.1",
                                "plugins.nsvq.replace_after=0"])
    recipe = laboratory.Lab.recipe(SimpleNamespace(options=options), "probe+vq+nsvq", 3)
    seen = []
    for hook in ("quantize", "embedding_loss", "refresh_codes", "enter_stage"):
        listeners[hook] = lambda hook=hook, **_: seen.append(hook)
    curves = [laboratory.Toy(recipe, "translate").run()[0] for _ in range(2)]
    assert str(curves[0]) == str(curves[1])  # NaN equals itself as text
    assert [seen.count(hook) for hook in ("quantize", "embedding_loss", "refresh_codes", "enter_stage")] == [16, 16, 16, 2]
    other = laboratory.Toy(laboratory.replace(recipe, seed=4), "translate").run()[0]
    assert other["error"] != curves[0]["error"]


@pytest.mark.parametrize(("words", "named"), [
    (["toy", "--methods", "vq+nope"], "nope"),
    (["toy", "--methods", "nsvq"], "make_codebook"),
    (["toy", "--methods", "vq+continuous"], "no indices"),
    (["toy", "codebook.width=3"], "2 coordinates"),
    (["toy", "--seeds", "0"], "--seeds"),
    (["toy", "seed=1"], "seed"),
    (["control", "codebook.sise=3"], "codebook.sise"),
    (["toy", "--out", "FULL"], "FULL"),
])
def test_a_mistake_is_named(laboratory, tiny_runs, words, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "file").touch()
    assert laboratory.main(words) == 2
    assert named in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "FULL").iterdir()] == ["file"]


def test_a_missing_matplotlib_is_named_before_anything_runs(laboratory, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert laboratory.main(["toy", "--out", str(tmp_path / "out")]) == 2
    assert "vqzoo[bench]" in capsys.readouterr().err and not (tmp_path / "out").exists()


SMALL = ("epoch_steps=1", "data.resolution=[32,32]", "data.batch_size=4", "codebook.size=16", "codebook.width=8",
         "encoder.args.width=8", "decoder.args.width=8", "log.steps=1", "log.drift_images=2")


def test_the_control_trains_from_the_centres_of_an_autoencoder(laboratory, tiny_runs, small_photos, tmp_path):
    out = tmp_path / "out"
    assert laboratory.main(["control", "--methods", "simvq+nsvq,vq", "--seeds", "1", "--data", str(small_photos), "--out",
                            str(out), "epochs=14", "plugins.kmeans.latents_per_code=4", *SMALL]) == 0
    for row in rows(out):
        run = curves(out / f"{row['method']}_seed0")
        assert list(run["drift/usage_fixed"]) == [13, 14] and "loss/codebook" in run
        assert min(run["loss/codebook"]) == 13 and len(run["loss/l1"]) == 14
        assert [row["usage_first"], row["usage_last"]] == list(run["drift/usage_fixed"].values())
        assert row["usage_first"] > 0.5  # the centres, not the codebook's start
    assert (out / "control.png").stat().st_size > 10_000
