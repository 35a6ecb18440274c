"""Running the checks on a plugin."""

import difflib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from vqzoo.errors import MissingWeights, UserError
from vqzoo.plugin import Plugin
from vqzoo.testing import declarations, devices, doors, edges, gradients, keeping, processes, quantizers, refreshing, together
from vqzoo.testing.check import EXPECTED, FAILED, OK, RUN, SKIPPED, Check, CheckFailed, Result, Skipped
from vqzoo.testing.subject import Subject, Untestable
from vqzoo.testing.surroundings import undisturbed

MODULES = (declarations, quantizers, gradients, edges, devices, keeping, refreshing, doors, together, processes)

CHECKS: tuple[Check, ...] = tuple(one for module in MODULES for one in vars(module).values() if isinstance(one, Check))
"""Every check, in the order in which they are made."""

BY_NAME = {one.name: one for one in CHECKS}


def check_plugin(
    plugin: str | type[Plugin] | Subject,
    config: Any = None,
    *,
    size: int = Subject.size,
    width: int = Subject.width,
    resolution: tuple[int, int] = Subject.resolution,
    expected_failures: Mapping[str, str] | None = None,
    only: Iterable[str] = (),
) -> list[Result]:
    """Make all checks that concern a plugin and return their results; CheckFailed lists those that fail.

    plugin is an installed plugin's name or a class, config its fields; size and width are those of the codebook, and
    resolution [height, width] that of the images, in pixels. expected_failures maps a check's name to the reason for which
    it may fail; if it does not, that is a failure as well. only names the checks to make. Raises UserError for names that
    no check has, and for a plugin that cannot be tried.
    """
    subject = plugin if isinstance(plugin, Subject) else Subject(plugin, config, size, width, tuple(resolution))
    results = list(run_checks(subject, expected_failures or {}, only))
    if failed := [result for result in results if result.outcome == FAILED]:
        raise CheckFailed(subject.title, failed)
    return results


def parametrize_with_checks(
    plugins: Iterable[str | type[Plugin] | tuple | Subject], expected_failures: Mapping[str, str] | None = None
) -> Callable:
    """Return pytest's parametrisation of a test by all checks that concern these plugins; its argument `check` is called.

    A plugin is a name, a class, a (plugin, config) or a Subject. An expected failure is a strict xfail with the reason given.
    """
    import pytest

    expected = _known(expected_failures or {}, "expected_failures")
    cases = []
    for plugin in plugins:
        subject = plugin if isinstance(plugin, Subject) else Subject(*plugin if isinstance(plugin, tuple) else (plugin,))
        for one in concerned(subject):
            marks = [pytest.mark.xfail(strict=True, reason=expected[one.name])] if one.name in expected else []
            cases.append(pytest.param(_Case(one, subject), id=f"{subject.title}-{one.name}", marks=marks))
    return pytest.mark.parametrize("check", cases)


class _Case:
    """One check of one plugin, called by a test."""

    def __init__(self, one: Check, subject: Subject):
        self.one, self.subject = one, subject

    def __call__(self) -> None:
        import pytest

        result = run_check(self.one, self.subject)
        if result.outcome == SKIPPED:
            pytest.skip(result.seen)
        if result.outcome == FAILED:
            raise CheckFailed(self.subject.title, [result])


def concerned(subject: Subject) -> list[Check]:
    """Return the checks that concern what a plugin offers."""
    return [one for one in CHECKS if one.concerns(subject.offered)]


def run_checks(
    subject: Subject,
    expected: Mapping[str, str],
    only: Iterable[str] = (),
    begin: Callable[[Check], None] = lambda one: None,
) -> Iterator[Result]:
    """Yield the result of each check that concerns a subject, or of those that `only` names; `begin` hears of it before."""
    expected, chosen = _known(expected, "expected_failures"), list(_known(dict.fromkeys(only), "only"))
    checks = concerned(subject)
    for name in chosen:
        if BY_NAME[name] not in checks:
            raise UserError(f"only: {name} concerns {', '.join(BY_NAME[name].hooks)}, and {subject.title} offers "
                            f"{', '.join(subject.offered) or 'nothing'}")
    _refuse_untestable(subject)
    for one in (one for one in checks if not chosen or one.name in chosen):
        begin(one)
        result = run_check(one, subject)
        if one.name not in expected:
            yield result
        elif result.outcome == FAILED:
            yield Result(one, EXPECTED, expected[one.name], result.seconds)
        else:
            seen = f"it does not fail, as expected_failures says ({expected[one.name]}): take it off that list"
            yield Result(one, FAILED, seen, result.seconds)


def _refuse_untestable(subject: Subject) -> None:
    """Raise UserError for fields that cannot be, and for a codebook of a size that cannot be."""
    with undisturbed(), subject.within():
        if subject.fields:
            subject.make()
        if set(RUN) & set(subject.offered):
            try:
                subject.tokenizer()
            except Untestable:
                raise
            except Exception:  # which the checks find, too, and say better
                pass


def run_check(one: Check, subject: Subject) -> Result:
    """Make one check of a subject; a UserError says that the plugin cannot be tried at all."""
    began, outcome, seen = time.monotonic(), OK, ""
    with undisturbed(), subject.within():
        try:
            one.function(subject)
        except (Skipped, MissingWeights) as error:
            outcome, seen = SKIPPED, str(error)
        except Untestable:
            raise
        except Exception as error:  # of whatever the plugin does
            outcome, seen = FAILED, str(error) if str(error) else repr(error)
    return Result(one, outcome, seen, time.monotonic() - began)


def _known(names: Mapping[str, str], key: str) -> Mapping[str, str]:
    for name in names:
        if name not in BY_NAME:
            near = difflib.get_close_matches(name, BY_NAME, n=3)
            raise UserError(f"{key}: there is no check {name!r}; {f'did you mean {near[0]!r}? ' if near else ''}`vqzoo "
                            "check-plugin NAME --list` lists them")
    return names
