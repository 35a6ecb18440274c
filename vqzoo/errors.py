"""What goes wrong by a user's hand, said so that the user can mend it."""

import difflib
from collections.abc import Iterable

MOST_NAMED = 16
"""Choices that a message lists."""

LOST = ("CUDA error", "NCCL", "ncclSystemError", "Gloo", "gloo", "Connection closed by peer", "Connection reset by peer")
"""Words in the errors of devices and processes that are gone."""

SHORT = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Words in the errors of a host or a device that has no more memory, beside torch's own class."""


class UserError(Exception):
    """A mistake in a recipe, a file or a command: its text names the key or file, the value and the way out.

    The command line prints the text without a traceback and exits with status 2.
    """


class MissingWeights(UserError):
    """Published weights are not at hand and could not be had: the text names file, size, hash, folder and command."""


class PluginError(Exception):
    """A plugin broke the contract: the text names the plugin, the hook, what came and what was expected."""


class PluginRaised(PluginError):
    """A plugin's implementation of a hook raised; the original error is the cause."""


class NonFiniteError(Exception):
    """A loss or a gradient is NaN or infinite: the text names the term and the step; nothing was updated."""


class DataError(Exception):
    """Images can no longer be read, since a worker died or hangs or a stream broke: the text says what, and what may help."""


class Interrupted(Exception):
    """A signal ended a run between two steps, its state saved; `status` is the exit status, 128 and the signal's number."""

    def __init__(self, text: str, signal: int):
        super().__init__(text)
        self.status = 128 + signal


class StorageError(Exception):
    """What must be kept cannot be written: the text names the file, the reason and what is safe all the same."""


class LostError(Exception):
    """A device or another process is gone in the middle of a run: the text says what was kept and how to go on."""


class OutOfMemory(Exception):
    """Memory is short: the text says which part is predicted to need how much, and which keys make it smaller."""


def suggestion(word: str, choices: Iterable[str]) -> str:
    """Return a clause for an error message: the nearest choice, if one is near, and all of them, or the first of many."""
    names = sorted(choices, key=lambda name: (name.count("/"), name))
    near = difflib.get_close_matches(word, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{hint}choices: {', '.join(names[:MOST_NAMED]) or 'none'}{more}"
