"""`vqzoo check-plugin`: the checks in a terminal."""

import argparse
import json
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vqzoo.errors import UserError
from vqzoo.recipe import parse_overrides
from vqzoo.sources import find
from vqzoo.testing.check import FAILED, OK, Check, Result
from vqzoo.testing.subject import Subject
from vqzoo.testing.suite import concerned, run_checks

SIZES = {"codebook.size": "size", "codebook.width": "width", "data.resolution": "resolution"}
"""The keys of a recipe that say on what a plugin is tested; all others are its fields."""

WORDS = {OK: "ok", FAILED: "FAILED"}

WIDTH, INDENT = 110, " " * 11


def check_plugins(options: argparse.Namespace) -> int:
    """Check the plugin that was named and print each result as it comes; return 1 if anything failed, else 0."""
    subject = _subject(options.name, options.overrides)
    print(f"{subject.title} ({find(subject.title).place}) offers {', '.join(subject.offered) or 'nothing'}\n", flush=True)
    if options.list:
        for one in concerned(subject):
            print(one.name)
            print(textwrap.fill(one.sentence, WIDTH, initial_indent="  ", subsequent_indent="  "))
        return 0
    began, results = time.monotonic(), []
    for result in run_checks(subject, {}, options.only, _announce):
        known = {one.seen for one in results if one.seen}
        results.append(result)
        print(_line(result, result.seen in known), flush=True)
    counts = {outcome: sum(result.outcome == outcome for result in results) for outcome in (FAILED, OK)}
    others = len(results) - sum(counts.values())
    made = f"{len(results)} check{'s' * (len(results) != 1)} in {time.monotonic() - began:.0f} s"
    print(f"\n{made}: {counts[OK]} passed, {counts[FAILED]} failed"
          f"{f', {others} skipped' if others else ''}")
    if options.json:
        _write(options.json, subject, results)
    return 1 if counts[FAILED] else 0


def _subject(name: str, overrides: list[str]) -> Subject:
    """Return what is to be tested, by overrides of the plugin's fields and of SIZES."""
    sizes = [word for word in overrides if word.partition("=")[0].strip() in SIZES]
    fields = [word for word in overrides if word not in sizes]
    schema = OmegaConf.create({"codebook": {"size": 0, "width": 0}, "data": {"resolution": [0, 0]}})
    found = parse_overrides(sizes, schema)
    given = {field: OmegaConf.select(found, key) for key, field in SIZES.items() if OmegaConf.select(found, key) is not None}
    if "resolution" in given:
        given["resolution"] = tuple(given["resolution"])
    _check(given)
    config = parse_overrides(fields, OmegaConf.structured(find(name).load().Config)) if fields else {}
    return Subject(name, OmegaConf.to_container(OmegaConf.create(config)), **given)


def _check(given: dict[str, Any]) -> None:
    for key, value in given.items():
        numbers = value if isinstance(value, tuple) else (value,)
        step = 8 if key == "resolution" else 1
        if not all(isinstance(number, int) and number >= 1 and number % step == 0 for number in numbers) or (
            key == "resolution" and len(numbers) != 2
        ):
            wanted = "[height, width] in pixels, multiples of 8" if key == "resolution" else "a positive integer"
            raise UserError(f"{next(full for full, field in SIZES.items() if field == key)}: {value!r} will not do; it must be "
                            f"{wanted}")


def _announce(one: Check) -> None:
    """Show which check is being made, until its result takes the place."""
    if sys.stdout.isatty():
        print(f"  {'...':<8} {one.name}", end="\r", flush=True)


def _line(result: Result, known: bool = False) -> str:
    """Return what is shown of a result; what was seen is not repeated if it is known."""
    head, seen = f"  {WORDS.get(result.outcome, result.outcome):<8} {result.check.name}", "as above" if known else result.seen
    if result.outcome == OK:
        return head
    if result.outcome != FAILED:
        return _filled(f"{head} ({seen})", "")
    return "\n".join([head, _filled(result.check.sentence), _filled(f"seen: {seen}")])


def _filled(text: str, first: str = INDENT) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=INDENT, break_long_words=False,
                         break_on_hyphens=False)


def _write(path: str, subject: Subject, results: list[Result]) -> None:
    content = {
        "plugin": subject.title, "place": find(subject.title).place, "hooks": subject.offered, "config": subject.fields,
        "size": subject.size, "width": subject.width, "resolution": list(subject.resolution),
        "results": [{"check": result.check.name, "outcome": result.outcome, "seen": result.seen,
                     "seconds": round(result.seconds, 3)} for result in results],
    }
    try:
        Path(path).write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--json: {path} cannot be written: {error.strerror}") from error
