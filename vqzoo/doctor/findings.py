"""Findings: what the doctor prints, as it comes, and counts."""

import shutil
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from vqzoo.errors import (
    DataError,
    Interrupted,
    LostError,
    NonFiniteError,
    OutOfMemory,
    PluginError,
    StorageError,
    UserError,
)

EXPECTED = (DataError, LostError, NonFiniteError, OutOfMemory, PluginError, StorageError, UserError)
"""Errors whose text says what is wrong and the way out."""

MOST_NAMED = 5
"""Files that a finding names."""


class Findings:
    """Print findings as they come; `problems` counts those that are wrong. The same error is told once."""

    def __init__(self):
        self.problems = self.notes = 0
        self._told: set[str] = set()

    def section(self, title: str) -> None:
        print(f"\n{title}", flush=True)

    def ok(self, text: str) -> None:
        self._say("ok", text)

    def note(self, text: str) -> None:
        self.notes += 1
        self._say("note", text)

    def wrong(self, text: str) -> None:
        self.problems += 1
        self._say("WRONG", text)

    def _say(self, mark: str, text: str) -> None:
        width = max(60, shutil.get_terminal_size((128, 40)).columns)
        for number, line in enumerate(text.splitlines() or [""]):
            head = f"  {mark:<7}" if not number else " " * 9
            print(textwrap.fill(line, width, initial_indent=head, subsequent_indent=" " * 9, break_long_words=False,
                                break_on_hyphens=False), flush=True)

    @contextmanager
    def examining(self, what: str) -> Iterator[None]:
        """Make a finding of whatever the block raises, so that the rest is examined all the same."""
        try:
            yield
        except Interrupted as error:
            raise Interrupted("a signal; of a dry run nothing is kept", error.status - 128) from error
        except EXPECTED as error:
            if str(error) not in self._told:
                self.wrong(f"{what}: {error}")
            self._told.add(str(error))
        except Exception as error:  # of any library, of a device
            self.wrong(f"{what} cannot be examined: {type(error).__name__}: {error}")


def some(names: Iterable[str]) -> str:
    """Join the first names, and say how many more there are."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED])}{more}"
