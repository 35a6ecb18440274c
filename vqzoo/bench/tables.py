"""The tables of a report: what each variant measured, and how it differs from the baseline, as text to be laid out."""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from vqzoo.bench.statistics import FEWEST, Difference, Estimate, by_seed, difference, direction, estimate, judged
from vqzoo.bench.suite import Group, Suite
from vqzoo.evaluation.report import written

Row = dict[str, Any]

NAMES = {"psnr": "PSNR", "ssim": "SSIM", "ms": "MS", "lpips": "LPIPS", "rfid": "rFID", "gfid": "gFID", "kid": "KID", "fd": "FD"}
ABSENT, FEW, LOST = "–", "*", "†"
"""What stands in a cell: no value, a mean of fewer values than an interval needs, a mean without what is no finite number."""


@dataclass
class Table:
    """A table with sentences about it; `words` are the columns that hold words, all others hold numbers."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    words: tuple[int, ...] = (0,)


def plain_label(name: str) -> str:
    """Return a metric's name as it is usually written; a name with a slash is a curve's, whose mean over the run is meant."""
    where, _, metric = name.rpartition("/")
    words = " ".join(NAMES.get(word, word) for word in metric.split("_"))
    return f"{where}/{words}, mean of the run" if where else words


def label(name: str) -> str:
    """Return a metric's name with an arrow to where better is."""
    return plain_label(name) + {1: " ↑", 0: "", -1: " ↓"}[direction(name)]


# Numbers


def value(name: str, number: float) -> str:
    """Write a metric's value, or the value of a curve, as an evaluation does."""
    return written(name.rpartition("/")[2], number)


def digits(name: str, halves: list[float | None], more: int = 0) -> int | None:
    """Return the decimals of a column: two digits of the smallest interval, at most the metric's own and `more`."""
    sizes = [half * _scale(name) for half in halves if half]
    own = len(re.match(r"[\d.]+", value(name, 0.123456789))[0].partition(".")[2])
    return max(0, min(own + more, 1 - math.floor(math.log10(min(sizes))))) if sizes else None


def number(name: str, found: Estimate, decimals: int | None, signed: bool = False) -> str:
    """Write a mean, or a difference, which is `signed`, with its interval; a mark says that something is left out.

    Where all values are the same there is no interval to write.
    """
    if found.mean is None:
        return f"not finite {LOST}" if found.lost else ABSENT
    scale, text = _scale(name), value(name, found.mean)
    unit = re.sub(r"^[-\d.,e+]+", "", text)
    mean = text.removesuffix(unit) if decimals is None else f"{found.mean * scale:,.{decimals}f}"
    if signed:
        mean, unit = "+" + mean if found.mean > 0 else mean, " points" if unit == "%" else unit
    if found.half:
        half = f"{found.half * scale:,.{decimals}f}"
        mean += f" ± {half}" if float(half.replace(",", "")) else f" ± <{10.0 ** -decimals:.{decimals}f}"
    return mean.replace("-", "−") + unit + (f" {FEW}" if found.half is None else "") + (f" {LOST}" if found.lost else "")


def _scale(name: str) -> float:
    return 100.0 if value(name, 1.0).endswith("%") else 1.0


# Tables


def at(rows: list[Row], point: str | None) -> list[Row]:
    """Return the rows of a point."""
    return [row for row in rows if row.get("point") == point]


def of(rows: list[Row], variant: str) -> list[Row]:
    """Return the rows of a variant."""
    return [row for row in rows if row["variant"] == variant]


def points(suite: Suite) -> list[str | None]:
    """Return the points of the axis, or the one of a suite without."""
    return [*suite.points] or [None]


def columns(suite: Suite, rows: list[Row]) -> list[str]:
    """Return the metrics shown that any row has."""
    return [name for name in suite.config.columns if any(by_seed([row], name) for row in rows)]


def comparisons(suite: Suite, rows: list[Row], variants: list[str], name: str) -> dict[str, Difference]:
    """Return the differences of the variants at one point to the baseline among them, or to the first of them."""
    base = reference(suite, variants)
    measured = {variant: by_seed(of(rows, variant), name) for variant in variants}
    return judged({variant: difference(measured[variant], measured[base]) for variant in variants if variant != base}, name)


def reference(suite: Suite, variants: list[str]) -> str:
    """Return the variant to which a table's others are compared."""
    return suite.baseline if suite.baseline in variants else variants[0]


def measured(suite: Suite, rows: list[Row], differing: dict[str, dict[str, str]]) -> list[Table]:
    """Return the tables of the suite at each point; `differing` are the variants' values of what makes rows incomparable."""
    return [_measured(suite, at(rows, point), _title(suite, title, point), group, differing)
            for title, group in suite.tables().items() for point in points(suite)]


def _measured(suite: Suite, rows: list[Row], title: str, group: Group, differing: dict[str, dict[str, str]]) -> Table:
    quality, base = suite.config.quality, reference(suite, group.variants)
    names = [quality, *(name for name in columns(suite, rows) if name != quality)]
    estimates = {name: {variant: estimate(by_seed(of(rows, variant), name).values()) for variant in group.variants}
                 for name in names}
    decimals = {name: digits(name, [found.half for found in estimates[name].values()]) for name in names}
    judge = not differing and len(group.variants) > 1
    found = comparisons(suite, rows, group.variants, quality) if judge else {}
    finer = digits(quality, [one.estimate.half for one in found.values()], more=1)
    head = ["variant", "seeds", *differing, label(quality), *([f"difference to {base}", "verdict"] if judge else []),
            *map(label, names[1:])]
    lines = []
    for variant in group.variants:
        line = [variant, _seeds(suite, of(rows, variant))]
        line += [differing[key].get(variant, ABSENT) for key in differing]
        shown = [number(name, estimates[name][variant], decimals[name]) for name in names]
        if judge:
            shown[1:1] = ([ABSENT, "baseline"] if variant == base else
                          [number(quality, found[variant].estimate, finer, signed=True), found[variant].said or "no direction"])
        lines.append(line + shown)
    notes = [f"Not comparable: the rows differ in {', '.join(differing)}."] if differing else []
    notes += [*(_match(rows, group.variants, match, base) for match in group.matches), *_marks(estimates)]
    return Table(title, head, lines, notes, (0, *([head.index("verdict")] if judge else [])))


def _marks(estimates: dict[str, dict[str, Estimate]]) -> list[str]:
    """Say what the marks of a table mean, of the means of each metric by variant."""
    few = any(found.half is None and found.count for column in estimates.values() for found in column.values())
    lost = [f"{plain_label(name)} of {variant} {found.lost} of {found.count + found.lost}"
            for name, column in estimates.items() for variant, found in column.items() if found.lost]
    return [*([f"{FEW} Fewer than {FEWEST} seeds: no interval."] if few else []),
            *([f"{LOST} Without values that are no finite numbers: {', '.join(lost)}."] if lost else [])]


def differences(suite: Suite, rows: list[Row]) -> list[Table]:
    """Return a table of every column's differences to the baseline for each table of the suite at each point."""
    tables = []
    for title, group in suite.tables().items():
        for point in points(suite):
            here, others = at(rows, point), [name for name in group.variants if name != reference(suite, group.variants)]
            lines = []
            for name in columns(suite, here) if others else ():
                found = comparisons(suite, here, group.variants, name)
                if all(one.estimate.mean == 0 for one in found.values()):
                    continue
                decimals = digits(name, [one.estimate.half for one in found.values()], more=1)
                lines += [[label(name), variant, str(one.estimate.count), number(name, one.estimate, decimals, signed=True),
                           _p(one.p), _p(one.corrected), one.said or "no direction"] for variant, one in found.items()
                          if one.estimate.count or one.estimate.lost]
            if lines:
                base = reference(suite, group.variants)
                head = ["metric", "variant", "pairs", f"difference to {base}", "p", "p (Holm)", "verdict"]
                marked = " ".join(line[3] for line in lines)
                notes = [f"{FEW} Fewer than {FEWEST} pairs: no interval."] if FEW in marked else []
                notes += [f"{LOST} Without pairs in which a value is no finite number."] if LOST in marked else []
                tables.append(Table(_title(suite, title, point), head, lines, notes, (0, 1, 6)))
    return tables


def speeds(suite: Suite, speed: dict | None) -> Table | None:
    """Return the table of the quantizers' times and memory, if they were measured."""
    if not speed or not speed.get("variants"):
        return None
    base, lines = speed.get("baseline"), []
    for name, found in speed["variants"].items():
        if "failed" in found:
            lines.append([name, ABSENT, ABSENT, ABSENT, f"failed: {last_line(found['failed'])}"])
            continue
        ratio = f"{found['ratio']:.2f}" if found.get("ratio") is not None else ABSENT
        if found.get("ratio_low") is not None and found.get("ratio_high") is not None and name != base:
            ratio += f" ({found['ratio_low']:.2f} to {found['ratio_high']:.2f})"
        memory = f"{found['bytes'] / 2**20:,.1f} MiB" if found.get("bytes") is not None else ABSENT
        lines.append([name, f"{found['ms']:,.2f} ms", ratio, memory, found.get("memory") or ""])
    notes = ["Time of the codebook's part of a training step, all variants measured side by side on "
             f"{machine(speed.get('hardware') or {})}; ratios with their range from 5 to 95% of the rounds."]
    if f"{base} again" in speed["variants"]:
        notes.append(f"{base} again is the same once more, and shows the noise.")
    head = ["variant", "time", f"ratio to {base}", "memory", "note"]
    if not any(line[-1] for line in lines):
        head, lines = head[:-1], [line[:-1] for line in lines]
    return Table("Time of the quantizer", head, lines, notes, (0, 4))


def machine(hardware: Row) -> str:
    """Name a machine in words."""
    parts = [f"{count} {key if count != 1 else singular}" for key, singular in
             (("processes", "process"), ("threads", "thread"), ("cores", "core"), ("jobs", "job at a time"))
             if (count := hardware.get(key)) is not None]
    return ", ".join([str(hardware.get("device", "unknown device")), *parts]).replace(" jobs", " jobs at a time")


def cell_name(row: Row) -> str:
    """Name a cell by its variant, its point and its seed."""
    return " ".join([row["variant"], *([f"@ {row['point']}"] if row.get("point") is not None else []), f"seed {row['seed']}"])


def last_line(text: str) -> str:
    """Return the line of an error that says what is wrong: vqzoo's own message, or else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("vqzoo: ")]
    return (own or lines or ["no text"])[-1]


def failed(rows: list[Row]) -> Table:
    """Return the table of cells that failed, with the last line of each error."""
    axis = any(row.get("point") is not None for row in rows)
    lines = [[row["variant"], *([str(row.get("point"))] if axis else []), str(row["seed"]), last_line(row.get("error") or "")]
             for row in rows]
    head = ["variant", *(["point"] if axis else []), "seed", "error"]
    return Table("", head, lines, words=(0, 1, 3) if axis else (0, 2))


def _title(suite: Suite, title: str, point: str | None) -> str:
    place = f"{suite.config.axis or 'point'} {point}" if point is not None else ""
    return ", ".join(part for part in (title, place) if part)


def _seeds(suite: Suite, rows: list[Row]) -> str:
    finished = sum(row["status"] == "finished" for row in rows)
    failed = len(rows) - finished
    if finished == suite.seeds:
        return str(finished)
    absent = suite.seeds - len(rows)
    said = [f"{failed} failed"] if failed else []
    said += [f"{absent} not run"] if absent > 0 else []
    return f"{finished} ({', '.join(said)})" if said else str(finished)


def _p(p: float | None) -> str:
    return ABSENT if p is None else "<0.0001" if p < 1e-4 else f"{p:.4f}"


def _match(rows: list[Row], variants: list[str], match: str, base: str) -> str:
    """Say whether the variants are alike in what the table claims."""
    what = plain_label(match)
    said = {}
    for variant in variants:
        values = by_seed(of(rows, variant), match).values()
        said[variant] = ", ".join(sorted({value(match, each) for each in values}))
    known = [text for text in said.values() if text]
    if not known:
        return f"Meant to be alike in {what}, which no row says."
    most = max(Counter(known).values())
    usual = said[base] if known.count(said[base]) == most else Counter(known).most_common(1)[0][0]
    others = [f"{variant} {text}" for variant, text in said.items() if text and text != usual]
    if others:
        return f"Not alike in {what}: {', '.join(others)}; the others {usual}."
    return f"Alike in {what}: {usual}."
