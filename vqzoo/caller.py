"""Calling a hook, and laying to the plugin what goes wrong in it."""

import inspect
import traceback
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pluggy
import torch
from pluggy import HookImpl
from torch import Tensor

from vqzoo.codebook import Codebook
from vqzoo.errors import LOST, SHORT, DataError, NonFiniteError, PluginError, PluginRaised, UserError

UNCHANGED = (UserError, PluginError, NonFiniteError, DataError, MemoryError, torch.OutOfMemoryError)
"""What comes out of a hook as it is: it names the culprit already, or is no plugin's fault."""

ANSWERS = {
    "reconstruction_loss": (lambda answer: isinstance(answer, dict), "dict"),
    "report": (lambda answer: isinstance(answer, dict), "dict"),
    "refresh_codes": (lambda answer: answer is None or _is_count(answer), "an integer or None"),
    "stage_transition": (
        lambda answer: answer is None or isinstance(answer, bool | str) or getattr(answer, "ndim", 1) == 0,
        "True, a reason in words or None",
    ),
    "enter_stage": (lambda answer: True, ""),
}
"""What a provider of a "many" hook may return, and in words."""


class Caller:
    """Call a hook; whoever of those bound to it raises, changes an argument or fails to answer is named by a PluginError.

    Providers of a "many" hook that nobody wraps are called one by one, so that each answers for itself.
    """

    def __init__(self, manager: pluggy.PluginManager, hook: pluggy.HookCaller, bound: list[HookImpl]):
        self.name, self.many = hook.name, not is_one(hook)
        self.apart = self.many and not any(map(wraps, bound))
        self.groups = []
        for group in [[impl] for impl in bound] if self.apart else [bound]:
            others = [impl.plugin for impl in hook.get_hookimpls() if impl not in group]
            self.groups.append((group, manager.subset_hook_caller(hook.name, others)))

    def __call__(self, **arguments: Any) -> Any:
        if not self.many:
            return self._ask(*self.groups[0], arguments)
        return [answer for group, call in self.groups for answer in self._checked(group, self._ask(group, call, arguments))]

    def _ask(self, group: list[HookImpl], call: pluggy.HookCaller, arguments: dict[str, Any]) -> Any:
        # A tensor counts its changes in place, on the host: no device is waited for.
        watched = [(argument, part, tensor, tensor._version) for argument, part, tensor in self._watched(arguments)]
        try:
            answer = call(**arguments)
        except UNCHANGED:
            raise
        except (Exception, SystemExit) as error:
            if any(words in str(error) for words in (*SHORT, *LOST)):  # which is no plugin's fault
                raise
            raise PluginRaised(f"{_blame(self.name, group, error)}: {error}") from error
        for argument, part, tensor, version in watched:
            if tensor._version != version:
                takers = [impl for impl in group if argument in impl.argnames] or group
                way = ("codes change in refresh_codes and enter_stage alone, by codebook.replace_" if argument == "codebook"
                       else "work on a copy")
                raise PluginError(f"{served_by(self.name, takers)}, changed its argument {argument}{part} in place; {way}")
        return answer

    def _watched(self, arguments: dict[str, Any]) -> Iterator[tuple[str, str, Tensor]]:
        """Yield the tensors that an implementation may only read: each with its argument and its part of that."""
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                parts = (("", value),)
            elif isinstance(value, dict):
                parts = ((f"[{key!r}]", item) for key, item in value.items() if isinstance(item, Tensor))
            elif isinstance(value, Codebook) and self.name != "refresh_codes":
                codes = ((key, buffer) for key, buffer in value.named_buffers() if buffer.shape[:1] == (value.rows,))
                parts = ((f".{key}", tensor) for key, tensor in (*value.named_parameters(), *codes))
            else:
                continue
            yield from ((name, part, tensor) for part, tensor in parts if not tensor.is_inference())  # that counts nothing

    def _checked(self, group: list[HookImpl], answers: Any) -> list[Any]:
        """Return the answers to a "many" hook, of which pluggy has left out each None."""
        if not isinstance(answers, list):
            raise PluginError(f"{served_by(self.name, group)}, returned {kind_of(answers)} where list is expected, since a "
                              "wrapper returns the answers of all")
        fits, expected = ANSWERS[self.name]
        for answer in answers or ([None] if self.apart else []):
            if not fits(answer):
                raise PluginError(f"{served_by(self.name, group)}, returned {kind_of(answer)} where {expected} is expected")
        return answers


def is_one(hook: pluggy.HookCaller) -> bool:
    """Tell whether a hook has one provider only."""
    return bool(hook.spec and hook.spec.opts.get("firstresult"))


def wraps(impl: HookImpl) -> bool:
    """Tell whether an implementation wraps others."""
    return impl.wrapper or impl.hookwrapper


def served_by(hook: str, impls: list[HookImpl]) -> str:
    """Return the words with which an error about a hook begins."""
    return f"hook {hook}, served by {' and '.join(impl.plugin_name for impl in impls)}"


def kind_of(value: Any) -> str:
    """Name what was returned, as an error does."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype} on {value.device}"
    return "None" if value is None else type(value).__name__


def _is_count(answer: Any) -> bool:
    if isinstance(answer, Tensor):
        return not (answer.dim() or answer.is_floating_point() or answer.is_complex())
    return isinstance(answer, Integral)


def _blame(hook: str, group: list[HookImpl], error: Exception) -> str:
    """Say whose implementation raised, the innermost that the traceback passes or else any of them, and in which line."""
    found = group
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = [impl for impl in group if _runs(impl, frame)] or found
    files = [code.co_filename for code in map(_code, found) if code is not None]
    lines = [entry for entry in traceback.extract_tb(error.__traceback__) if entry.filename in files]
    place = f" at {Path(lines[-1].filename).name}:{lines[-1].lineno}" if lines else ""
    return f"{served_by(hook, found)}, raised {type(error).__name__}{place}"


def _runs(impl: HookImpl, frame: FrameType) -> bool:
    return frame.f_code is _code(impl) and any(value is impl.plugin for value in frame.f_locals.values())


def _code(impl: HookImpl) -> CodeType | None:
    """Return the code of an implementation, below its decorators."""
    return getattr(inspect.unwrap(impl.function), "__code__", None)
