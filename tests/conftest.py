"""Fixtures that several test files share."""

import gc
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import plugins_for_tests
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from vqzoo import sources
from vqzoo.recipe import load_recipe


@pytest.fixture(scope="session", autouse=True)
def alone(tmp_path_factory):
    """Download nothing, and leave nothing in the user's cache; what a test launches does not either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VQZOO_OFFLINE", "1")
        patch.setenv("VQZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def small_photos(tmp_path_factory):
    """A folder of smooth 40x40 pictures: 16 in train, 7 in val."""
    root, rng = tmp_path_factory.mktemp("small_photos"), np.random.default_rng(0)
    for split, number in (("train", 16), ("val", 7)):
        (root / split).mkdir()
        for index in range(number):
            blocks = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            blocks.resize((40, 40), Image.Resampling.BICUBIC).save(root / split / f"{index:02}.png")
    return root


@pytest.fixture(scope="module")
def tiny_runs():
    """Make whole runs possible and fast in this process: test plugins, on CPU, one thread, little garbage to search."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    AcceleratorState._reset_state(True)  # accelerate holds one device and precision per process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(sources, "entry_points", plugins_for_tests.with_test_plugins)
        yield
    AcceleratorState._reset_state(True)
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture
def cells_here(monkeypatch):
    """Run the cells of suites in this process, as if there were no GPU, and do not time their codebooks."""
    from vqzoo import cli
    from vqzoo.bench import train, workers

    def run(cells, places, plugin_files, ended):
        for cell in cells:
            recipe = cell.lay_down()
            with (cell.folder / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
                status = cli.main(["run", str(recipe), "--out", str(cell.folder / "run"), "--resume", "auto"])
            ended(cell, workers._error(cell, status), 0.1)

    monkeypatch.setattr(workers, "run", run)
    monkeypatch.setattr(workers, "_gpus", list)
    monkeypatch.setattr(train, "quantizer_times", lambda recipes, *_, **__: {
        name: {"ms": 1.0 + number, "ratio": 1.0, "ratio_low": 0.9, "ratio_high": 1.1, "bytes": 1}
        for number, name in enumerate(recipes)})


@pytest.fixture
def listeners():
    """The probe's listeners of one test, by hook."""
    yield plugins_for_tests.Probe.listeners
    plugins_for_tests.Probe.listeners.clear()


@pytest.fixture(scope="module")
def recipe(tiny_runs, small_photos, tmp_path_factory):
    """Load a recipe's text with overrides."""
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"

    def load(text, *overrides):
        path.write_text(text.replace("ROOT", str(small_photos)))
        return load_recipe(str(path), list(overrides))

    return load
