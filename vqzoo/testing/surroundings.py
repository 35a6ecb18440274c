"""What is around a check while it runs."""

import gc
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch


@contextmanager
def undisturbed() -> Iterator[None]:
    """Give back what draws at random, and threads, as they were; download nothing."""
    state, threads = (torch.get_rng_state(), np.random.get_state(), random.getstate()), torch.get_num_threads()
    frozen = gc.get_freeze_count()
    torch.set_num_threads(1)  # for tensors as small as these, more are slower
    gc.freeze()  # or else whole libraries are searched for garbage, again and again
    try:
        with mock.patch.dict(os.environ, {"VQZOO_OFFLINE": "1"}), torch.enable_grad():
            yield
    finally:
        if not frozen:
            gc.unfreeze()
        torch.set_num_threads(threads)
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])
