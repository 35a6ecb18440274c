"""Fixtures that several test files share."""

import numpy as np
import pytest
from PIL import Image


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
