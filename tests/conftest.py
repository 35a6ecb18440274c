"""Fixtures that several test files share."""

import gc

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
