"""Plugins that give images or metrics: reached by name, made with their own fields, and named when they break the contract."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import RECIPE, call, succeed
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio

from vqzoo import Plugin, PluginError, UserError, hookimpl
from vqzoo.data import DataConfig, crop_val, eval_batches, from_image, make_dataset, train_batches
from vqzoo.evaluation import EvaluateConfig
from vqzoo.evaluation.evaluate import Evaluator
from vqzoo.recipe import load_recipe
from vqzoo.sources import also
from vqzoo.trainer import Trainer


class Stripes(Plugin):
    """Stripes: pictures of stripes, made and not read."""

    @dataclass
    class Config:
        count: int = 12
        broken: int = -1

        def __post_init__(self):
            if self.count < 0:
                raise ValueError(f"count: {self.count} is negative")

    @hookimpl
    def make_dataset(self, split):
        return Pictures(self.config.count, split, self.config.broken)


class Pictures:
    def __init__(self, count, split, broken):
        self.count, self.shift, self.broken = count, split == "val", broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == self.broken:
            raise OSError("it is torn")
        columns = (np.arange(40) + self.shift) * (index + 1) * 16 % 256
        return Image.fromarray(np.broadcast_to(columns.astype(np.uint8), (40, 40)).copy())


class Named(Pictures):
    def name(self, index):
        return f"stripes of {index + 1}"


class Paths(Plugin):
    """Paths: a list of files."""

    @dataclass
    class Config:
        root: str = ""

    @hookimpl
    def make_dataset(self, split):
        from pathlib import Path
        return sorted((Path(self.config.root) / split).iterdir())


class Edges(Plugin):
    """Edges: mean absolute error of the differences of neighbouring columns."""

    @dataclass
    class Config:
        scale: float = 1.0
        answer: str = "number"

    @hookimpl
    def make_metric(self):
        return EdgeError(self.config.scale, self.config.answer)


class EdgeError(Metric):
    higher_is_better = False

    def __init__(self, scale, answer):
        super().__init__()
        self.scale, self.answer = scale, answer
        self.add_state("total", torch.tensor(0.0), "sum")
        self.add_state("count", torch.tensor(0), "sum")

    def update(self, reconstructions, images):
        assert 0 <= reconstructions.min() and reconstructions.max() <= 1 and images.dtype == torch.float32
        if self.answer == "fails":
            raise RuntimeError("no edges here")
        error = (reconstructions.diff(dim=3) - images.diff(dim=3)).abs()
        self.total += error.sum()
        self.count += error.numel()

    def compute(self):
        mean = self.scale * self.total / self.count
        return {"dict": {"mean": mean, "count": self.count}, "text": "good", "number": mean}.get(self.answer, mean)


class Decibels(Plugin):
    """Decibels: torchmetrics' own PSNR, of all pixels at once."""

    @hookimpl
    def make_metric(self):
        return PeakSignalNoiseRatio(data_range=1.0)


class NoMetric(Plugin):
    """NoMetric: gives something else."""

    @hookimpl
    def make_metric(self):
        return torch.nn.Linear(2, 2)


class Gathering(Metric):
    def __init__(self):
        super().__init__()
        self.add_state("errors", [], "cat")

    def update(self, reconstructions, images):
        self.errors.append((reconstructions - images).flatten(2).mean(2))

    def compute(self):
        return torch.cat(list(self.errors)).mean()


class Lists(Plugin):
    """Lists: a metric that keeps what it has seen."""

    @hookimpl
    def make_metric(self):
        return Gathering()


class Doorless(Plugin):
    """Doorless: offers no door, and must not be made to find that out."""

    def __init__(self, config):
        raise AssertionError("made")


DOORS = {"stripes": Stripes, "paths": Paths, "edges": Edges, "decibels": Decibels, "nometric": NoMetric, "lists": Lists,
         "doorless": Doorless}


@pytest.fixture(autouse=True)
def installed():
    with also(classes=DOORS):
        yield


def config(name="stripes", **more):
    return DataConfig(name=name, resolution=[32, 32], batch_size=4, eval_batch_size=4, workers=0, **more)


# ---- data sets


def test_a_plugins_pictures_are_trained_and_evaluated_on():
    train, val = (make_dataset(config(), split) for split in ("train", "val"))
    assert len(train) == 12 and train.name(3) == "stripes/train[3]"
    batch = next(train_batches(config(), train, 0, 0, 0, 1, 1))
    assert batch.images.shape == (4, 3, 32, 32) and batch.images.dtype == torch.uint8 and not batch.bad
    batches = list(eval_batches(config(), val))
    wanted = from_image(crop_val(Pictures(12, "val", -1)[5].convert("RGB"), (32, 32)))
    assert torch.equal(batches[1].images[1], wanted) and sum(len(b.images) for b in batches) == 12


def test_several_workers_read_a_plugins_pictures():
    chosen = config()
    chosen.workers = 2
    one, two = (list(eval_batches(c, make_dataset(c, "val"))) for c in (config(), chosen))
    assert all(torch.equal(a.images, b.images) for a, b in zip(one, two, strict=True))


def test_a_picture_that_a_plugin_cannot_give_is_left_out_by_name(monkeypatch):
    monkeypatch.setattr(Stripes, "make_dataset", hookimpl(lambda self, split: Named(12, split, self.config.broken)))
    val = make_dataset(config(args={"broken": 2}), "val")
    batches = list(eval_batches(config(), val))
    assert [name for batch in batches for name in batch.bad] == ["stripes of 3"]
    assert sum(len(batch.images) for batch in batches) == 11


def test_paths_are_read_as_files_of_a_folder_are(small_photos):
    mine = make_dataset(config("paths", args={"root": str(small_photos)}), "val")
    folder = make_dataset(config("folder", root=str(small_photos)), "val")
    for a, b in zip(eval_batches(config(), mine), eval_batches(config(), folder), strict=True):
        assert torch.equal(a.images, b.images)


@pytest.mark.parametrize("change, told", [
    ({"args": {"cuont": 3}}, "data.args: .*cuont"),
    ({"args": {"count": -1}}, "data.args.count: -1 is negative"),
    ({"args": {"count": 0}}, "data.name: the train images of 'stripes' are none"),
    ({"name": "edges"}, "data.args: the plugin 'edges' does not offer make_dataset; it offers make_metric"),
    ({"name": "doorless"}, "the plugin 'doorless' does not offer make_dataset; it offers nothing"),
    ({"name": "strypes"}, "did you mean 'stripes'"),
    ({"name": "photos", "args": {"count": 3}}, "data.args: photos takes none"),
])
def test_a_data_set_that_cannot_be_is_told(change, told):
    with pytest.raises(UserError, match=told):
        make_dataset(config(**change), "train")


def test_a_data_set_without_a_length_is_the_plugins_fault(monkeypatch):
    monkeypatch.setattr(Stripes, "make_dataset", hookimpl(lambda self, split: iter([])))
    with pytest.raises(PluginError, match="hook make_dataset, served by stripes, returned list_iterator"):
        make_dataset(config(), "train")


# ---- metrics


def measured(*names, **more):
    evaluator = Evaluator(EvaluateConfig(metrics=list(names), **more), torch.device("cpu"))
    images = torch.randint(0, 256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    made = (images.float() * 0.9).round().byte()
    pairs = [(images[a:b], made[a:b], torch.arange(a, b)) for a, b in ((0, 2), (2, 5))]
    return evaluator, images.double() / 255, made.double() / 255, evaluator.pictures(pairs, []), evaluator.pictures(pairs, [])


def test_a_plugins_metric_stands_beside_the_others_and_is_begun_anew_each_time():
    _, images, made, one, again = measured("psnr", "edges", "decibels", args={"edges": {"scale": 2.0}})
    edges = 2 * (made.diff(dim=3) - images.diff(dim=3)).abs().mean()
    assert abs(one.metrics["edges"] - edges) < 1e-6 and one.metrics == again.metrics
    assert abs(one.metrics["decibels"] + 10 * (made - images).square().mean().log10()) < 1e-4


def test_a_metric_may_give_several_numbers():
    *_, result, _ = measured("edges", args={"edges": {"answer": "dict"}})
    assert result.metrics["edges_count"] == 5 * 3 * 32 * 31 and 0 < result.metrics["edges_mean"] < 1


def test_which_value_is_better_is_the_metrics_business():
    evaluator, *_ = measured("edges", "decibels")
    assert evaluator.better("edges", 1.0, 2.0) and not evaluator.better("edges", 2.0, 1.0)
    assert evaluator.better("decibels", 2.0, 1.0) and evaluator.better("edges", 2.0, None)
    assert not evaluator.better("edges", float("nan"), None)


@pytest.mark.parametrize("more, told", [
    ({"metrics": ["edgse"]}, "evaluate.metrics: 'edgse' is no metric; did you mean 'edges'?.*decibels"),
    ({"metrics": ["stripes"]}, "the plugin 'stripes' does not offer make_metric; it offers make_dataset"),
    ({"metrics": ["edges"], "args": {"edges": {"sclae": 1}}}, "evaluate.args.edges: .*sclae"),
    ({"metrics": ["psnr"], "args": {"edges": {}}}, "evaluate.args.edges: 'edges' is no plugin's metric among"),
    ({"metrics": ["psnr"], "args": {"psnr": {}}}, "evaluate.args.psnr"),
])
def test_a_metric_that_cannot_be_is_told(more, told):
    with pytest.raises(UserError, match=told):
        Evaluator(EvaluateConfig(**more), torch.device("cpu"))


def test_the_best_is_not_chosen_by_a_metric_that_has_no_better(monkeypatch):
    monkeypatch.setattr(EdgeError, "higher_is_better", None)
    with pytest.raises(UserError, match="evaluate.best: 'edges' does not say which"):
        Evaluator(EvaluateConfig(metrics=["edges"], best="edges"), torch.device("cpu"))
    evaluator = Evaluator(EvaluateConfig(metrics=["edges", "psnr"]), torch.device("cpu"))
    assert not evaluator.better("edges", 1.0, None)


@pytest.mark.parametrize("name, answer, told", [
    ("edges", "fails", "make_metric, served by edges: the metric's update raised RuntimeError: no edges here"),
    ("edges", "text", "make_metric, served by edges: the metric's compute gave str where a number"),
    ("nometric", None, "make_metric, served by nometric, returned Linear without update, compute, reset"),
])
def test_a_metric_that_breaks_the_contract_is_named(name, answer, told):
    with pytest.raises(PluginError, match=told):
        measured(name, args={name: {"answer": answer}} if answer else {})


# ---- both, in a run


def test_a_run_is_of_a_plugins_images_and_measured_by_a_plugins_metric(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("root: ROOT", "name: stripes, args: {count: 8}")
                    + "evaluate: {metrics: [psnr, edges], args: {edges: {scale: 2.0}}, best: edges}\n")
    out = tmp_path / "run"
    done = succeed("run", path, "--out", out)
    found = json.loads((out / "metrics.json").read_text())
    assert found["card"]["data"] == "stripes" and 0 < found["metrics"]["edges"] < 1 and "edges" in done.out
    assert found["run"]["best"]["metric"] == "edges"
    assert {"plugin stripes", "plugin edges"} <= found["card"]["versions"].keys()
    root = tmp_path / "pictures"
    root.mkdir()
    for index in range(3):
        Pictures(9, "val", -1)[index].save(root / f"{index}.png")
    text = succeed("eval", out, "--data", root, "metrics=[edges,psnr]", "args.edges.scale=3").out
    assert "edges" in text and "psnr" in text


@pytest.mark.parametrize("override, told", [
    ("hooks.make_metric=[edges]", "hooks.make_metric: no stage asks this hook"),
    ("hooks.make_metrc=[edges]", "hooks.make_metrc: there is no such hook"),
])
def test_a_door_is_not_routed(tmp_path, small_photos, override, told):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("ROOT", str(small_photos)))
    done = call("check", path, override)
    assert done.code == 2 and told in done.err


def test_a_metric_of_lists_is_missing_where_a_process_has_no_images_since_torchmetrics_cannot_gather_them():
    evaluator, _, _, result, _ = measured("lists", "decibels")
    assert "lists" in result.metrics and not result.missing
    nothing = evaluator.pictures([], [])
    assert "a process without images" in nothing.missing["lists"] and list(nothing.missing) == ["lists"]


@pytest.mark.parametrize("role", ["training", "held-out"])
def test_images_that_differ_between_processes_are_refused_before_they_would_wait_for_each_other(
    role, tmp_path, small_photos, monkeypatch
):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("ROOT", str(small_photos)))
    calls = []

    def gather(names):
        calls.append(names)
        return [*names, "{'images': 3}"] if len(calls) == ("training", "held-out").index(role) + 1 else names

    monkeypatch.setattr("vqzoo.trainer.gather_names", gather)
    with pytest.raises(UserError, match=f"the {role} images are not the same on every process: .*'images': 3"):
        Trainer(load_recipe(str(path)), tmp_path / "run")
