"""Signals: the first asks a run to save and stop, the second ends it at once."""

import os
import signal
import sys
import threading
import time
from types import TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)

ECHO = 1.0
"""Seconds in which a second signal is an echo of the first: a launcher hands on what its whole group has received."""


class StopSignals:
    """While this context lasts, note SIGTERM and SIGINT in `received` instead of dying of them.

    A thread, which runs even while the main one waits for a device or another process, ends the process at the second
    signal. Handlers are restored afterwards; outside the main thread, which alone may set them, nothing is done.
    """

    def __init__(self):
        self.received = 0

    def __enter__(self) -> "StopSignals":
        self._before: dict[int, Any] = {}
        self._write = None
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell's & leave it
                self._before[number] = signal.signal(number, self._note)
        threading.Thread(target=self._watch, args=(self._read,), daemon=True, name="signals").start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if self._write is not None:
            signal.set_wakeup_fd(self._fd_before)
            os.close(self._write)  # which ends the thread

    def _note(self, number: int, frame: Any) -> None:
        self.received = self.received or number

    def _watch(self, read: int) -> None:
        first = None
        with os.fdopen(read, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] not in self._before:  # Python writes every signal here
                    continue
                now = time.monotonic()
                first = first or now
                if now - first > ECHO:
                    said = "vqzoo: second signal: leaving at once; the last complete checkpoint stands"
                    print(said, file=sys.stderr, flush=True)
                    os._exit(128 + number[0])
