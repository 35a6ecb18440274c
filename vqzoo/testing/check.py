"""What a check is, and what comes of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from vqzoo.hookspecs import DOORS
from vqzoo.sources import SPECS

OK, FAILED, SKIPPED, EXPECTED = "ok", "failed", "skipped", "expected"
"""What comes of a check; the last is a failure that was announced."""

CODEBOOK = ("make_codebook", "quantize", "straight_through", "embedding_loss")
"""The hooks that every forward asks, and the one that makes the codebook."""

IMAGES = ("reconstruction_loss", "make_discriminator", "discriminator_loss")
"""The hooks that judge reconstructions."""

RUN = tuple(name for name in SPECS if name not in DOORS)
"""The hooks that a run asks."""


@dataclass(frozen=True)
class Check:
    """Say one thing that a plugin does: `name` says what, `sentence` what is wrong where it does not, and how to mend it.

    It concerns a plugin that offers one of `hooks`, every plugin if there are none.
    """

    name: str
    sentence: str
    hooks: tuple[str, ...]
    function: Callable[[Any], None]

    def concerns(self, offered: Iterable[str]) -> bool:
        """Tell whether a plugin that offers these hooks is to be checked."""
        return not self.hooks or any(hook in self.hooks for hook in offered)


@dataclass(frozen=True)
class Result:
    """Say what came of a check: `outcome` is ok, failed, skipped or expected, `seen` what was seen or why."""

    check: Check
    outcome: str
    seen: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        said = f"{self.check.sentence}\n    seen: " if self.outcome == FAILED else ""
        return f"{self.check.name}: {said}{self.seen}"


class CheckFailed(AssertionError):
    """Checks failed: the text has each one's name, what the plugin's author can do about it, and what was seen."""

    def __init__(self, name: str, failed: list[Result]):
        super().__init__("\n".join([f"{name} fails {len(failed)} of the checks of vqzoo.testing:", *map(str, failed)]))
        self.failed = failed


class Skipped(Exception):
    """A check cannot be done; the text says why."""


def check(sentence: str, hooks: tuple[str, ...] = ()) -> Callable[[Callable[[Any], None]], Check]:
    """Make a check, called like the function, of a function that raises if the subject fails."""
    return lambda function: Check(function.__name__, sentence, hooks, function)


def fail(seen: str) -> NoReturn:
    """Let the check that is running fail, and say what was seen."""
    raise AssertionError(seen)
