"""What a suite's rows say: for the terminal, as Markdown and as one HTML page; rows that cannot be compared are refused."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vqzoo.bench import figures
from vqzoo.bench.page import page
from vqzoo.bench.statistics import direction
from vqzoo.bench.suite import BASE, Suite
from vqzoo.bench.tables import (
    Row,
    Table,
    at,
    cell_name,
    columns,
    differences,
    failed,
    label,
    last_line,
    machine,
    measured,
    plain_label,
    speeds,
)
from vqzoo.errors import UserError
from vqzoo.files import write_text

ANYWHERE = ("protocol", "hardware", "version", "network")
"""The first words of what must be alike in all rows, not only in those of one point of the axis."""


@dataclass
class Content:
    """What a report says, in order, before it is laid out."""

    title: str
    about: str
    warnings: list[str]
    facts: dict[str, str]
    tables: list[Table]
    speed: Table | None
    details: list[Table]
    failures: list[Row]
    missing: list[str]
    method: list[str]

    def errors(self) -> list[tuple[str, str]]:
        """Return the cells that failed, by name, and the whole of each error."""
        return [(cell_name(row), row.get("error") or "no text") for row in self.failures]


# What cannot be compared


def check_mixture(rows: list[Row], mixed: bool = False) -> list[str]:
    """Return what finished rows differ in, such that they cannot be compared; a UserError unless `mixed`.

    Data and budget may be what an axis is about: they are compared among the rows of one point.
    """
    found = list(_differing(rows))
    if found and not mixed:
        key = found[0]
        said = {}
        for row in _finished(rows):
            said.setdefault(_conditions(row).get(key), []).append(cell_name(row))
        where = "; ".join(f"{value} ({_some(cells)})" for value, cells in said.items() if value is not None)
        more = f" (and in {', '.join(found[1:])})" if found[1:] else ""
        raise UserError(f"these rows cannot be compared: they differ in {key}{more}: {where}; run the cells anew alike, into a "
                        "folder of their own, or give --mixed to have tables that say so")
    return found


def _finished(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == "finished"]


def _differing(rows: list[Row]) -> dict[str, None]:
    """Return the keys of conditions of which two rows have two values, in order."""
    seen: dict[tuple, set[str]] = {}
    for row in _finished(rows):
        for key, value in _conditions(row).items():
            place = None if key.startswith(ANYWHERE) else row.get("point")
            seen.setdefault((key, place), set()).add(value)
    found = dict.fromkeys(key for (key, _), values in seen.items() if len(values) > 1)
    if {"protocol", "data", "resolution"} & found.keys():
        found.pop("pixels", None)  # which follow from them
    return found


def _conditions(row: Row) -> dict[str, str]:
    """Return what must be alike, as text, without what the row does not say."""
    card, versions = row.get("card") or {}, row.get("versions") or {}
    data = [str(part) for part in (card.get("data"), card.get("fingerprint")) if part is not None]
    found = {"protocol": card.get("protocol"), "data": " ".join(data) or None, "resolution": _size(card.get("resolution")),
             "images": card.get("images"), "pixels": _short(card.get("pixels_sha256")),
             **{f"network of {name}": _short(said) for name, said in (card.get("networks") or {}).items()},
             **{f"hardware {name}": said for name, said in (row.get("hardware") or {}).items()},
             **{f"version of {name}": said for name, said in versions.items()
                if name in ("vqzoo", "torch") or name.startswith("plugin ")},
             "training images": (row.get("data") or {}).get("train"), "budget": _budget(row),
             "images per step": (row.get("budget") or {}).get("batch_size")}
    return {key: str(value) for key, value in found.items() if value is not None}


def _budget(row: Row) -> str | None:
    """Return what a cell was to spend: seconds, or else steps."""
    budget = row.get("budget") or {}
    if budget.get("seconds") is not None:
        return f"{budget['seconds']:g} seconds of training"
    if budget.get("steps") is None and budget.get("epochs") and budget.get("epoch_steps"):
        budget = {"steps": budget["epochs"] * budget["epoch_steps"]}
    return next((f"{budget[unit]:,} {unit}" for unit in ("steps", "epochs") if budget.get(unit) is not None), None)


def _size(resolution: Any) -> str | None:
    return "×".join(map(str, resolution)) if isinstance(resolution, list | tuple) else resolution


def _short(said: Any) -> str | None:
    if isinstance(said, dict):
        said = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return said and str(said)[:12]


def _some(names: list[str], between: str = ", ", most: int = 4) -> str:
    return between.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# What a report says


def content(suite: Suite, rows: list[Row], speed: dict | None, differing: list[str]) -> Content:
    """Gather what a report says, `differing` being what check_mixture found."""
    values = {key: {variant: ", ".join(dict.fromkeys(
        said for row in _finished(rows) if row["variant"] == variant and (said := _conditions(row).get(key))))
        for variant in suite.variants} for key in differing}
    warnings = [f"Not comparable: the rows differ in {', '.join(differing)}. No verdict is given."] if differing else []
    if suite.quick is not None:
        warnings.append(f"Short form of the suite: {suite.quick or 'it does not say what it leaves out'}")
    if unequal := _beginnings(suite, rows):
        warnings.append(unequal)
    details = [] if differing else differences(suite, rows)
    failures = [row for row in rows if row["status"] != "finished"]
    return Content(suite.name, " ".join(suite.config.about.split()), warnings, _facts(suite, rows),
                   measured(suite, rows, values), speeds(suite, speed), details, failures, _missing(suite, rows),
                   _method(suite, rows, details))


def _beginnings(suite: Suite, rows: list[Row]) -> str | None:
    """Say which variants began with other networks than the baseline, or else the first, with the same seed."""
    others: dict[str, None] = {}
    for point in {row.get("point"): None for row in rows}:
        first: dict[int, str] = {}
        for row in sorted(at(rows, point), key=lambda row: row["variant"] != suite.baseline):
            begun = row.get("initial_network")
            if begun and first.setdefault(row["seed"], begun) != begun:
                others[row["variant"]] = None
    if not others:
        return None
    return (f"The networks began differently: with the same seed, the encoder and decoder of {', '.join(others)} had other "
            "initial weights than the rest, so that their pairs share no beginning.")


def _facts(suite: Suite, rows: list[Row]) -> dict[str, str]:
    """Return what was compared on what, in words; where rows differ, all that they say."""
    def said(*keys: str, form=str, between: str = ", ") -> str:
        found = []
        for row in rows:
            inner: Any = row
            for key in keys:
                inner = inner.get(key) if isinstance(inner, dict) else None
            if inner is not None and form(inner) not in found:
                found.append(form(inner))
        return _some(found, between)

    bases = {(variant or {}).get(BASE) or suite.config.base: None for variant in suite.variants.values()}
    network = [", ".join(filter(None, (said("recipe", part, "name"), said("recipe", part, "stride", form="stride {}".format))))
               for part in ("encoder", "decoder")]
    size, width = said("recipe", "codebook", "size", form="{:,}".format), said("recipe", "codebook", "width")
    budgets = _some(list(dict.fromkeys(filter(None, map(_budget, rows)))))
    made = sorted({row["values"]["steps"] for row in _finished(rows) if row["values"].get("steps") is not None})
    steps = f"{made[0]:,}" + (f" to {made[-1]:,}" if made[1:] else "") + " steps" if made else ""
    if "seconds" in budgets:
        took = [row["values"]["seconds"] for row in _finished(rows) if row["values"].get("seconds") is not None]
        steps += f", which took {min(took):,.0f} to {max(took):,.0f} s with evaluation" if took else ""
    versions = {name: None for row in rows for name in row.get("versions") or {}}
    dates = sorted({str(row["date"])[:10] for row in rows if row.get("date")})
    facts = {
        "Recipe": _some(list(filter(None, bases))),
        "Data": " ".join(filter(None, (said("card", "data"), said("card", "fingerprint", form="(fingerprint {})".format)))),
        "Evaluated on": ", ".join(filter(None, (said("card", "images", form="{:,} images".format),
                                                said("card", "resolution", form=_pixels)))),
        "Protocol": said("card", "protocol"),
        "Encoder": network[0], "Decoder": network[1],
        "Codebook": ", ".join(filter(None, (f"{size} codes" if size else "", f"width {width}" if width else ""))),
        "Batch": said("recipe", "data", "batch_size", form="{} images".format),
        "Budget per cell": budgets + (f" ({steps} made)" if steps and steps != budgets else ""),
        "Seeds": f"{len({row['seed'] for row in rows})}",
        "Learning rate": said("recipe", "optim", "lr"),
        "Weights evaluated": said("card", "weights"),
        "Hardware": said("hardware", form=machine, between="; "),
        "Versions": ", ".join(f"{name} {said('versions', name)}" for name in versions
                              if not said("versions", name).startswith("vqzoo ")),
        "Date": " to ".join(dates[::len(dates) - 1] if len(dates) > 1 else dates),
    }
    return {key: text for key, text in facts.items() if text}


def _pixels(resolution: Any) -> str:
    return f"{_size(resolution)} pixels" if isinstance(resolution, list | tuple) else f"{resolution}"


def _missing(suite: Suite, rows: list[Row]) -> list[str]:
    """Say which metrics rows lack, and why."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for row in _finished(rows):
        for name, why in (row.get("missing") or {}).items():
            lacking.setdefault((name, why), []).append(row["variant"])
    found, alike = len(_finished(rows)), {}
    for (name, why), who in lacking.items():
        where = "all rows" if len(who) == found else _some(list(dict.fromkeys(who)))
        alike.setdefault((why, where), []).append(plain_label(name))
    lines = [f"{', '.join(names)}: {why} ({where})" for (why, where), names in alike.items()]
    told = {name for name, _ in lacking}
    silent = [name for name in suite.config.columns if found and name not in (*columns(suite, rows), *told)]
    return lines + [f"{plain_label(name)}: no row has it, and none says why" for name in silent]


def _method(suite: Suite, rows: list[Row], details: list[Table]) -> list[str]:
    """Say how the numbers of the tables were made."""
    quality = plain_label(suite.config.quality)
    lines = [
        "Each value is the mean over the seeds that finished, ± the half width of its 95% interval by Student's t; without "
        "one, all seeds gave the same. Fewer than three seeds give no interval and no verdict.",
        "Variants stand in the suite's order. What lies within noise is not ranked: so few seeds cannot tell it apart, which "
        "does not make it equal.",
    ]
    if details:
        lines.insert(1, (
            f"Differences are paired: a variant and the baseline with the same seed. The verdict on {quality} comes from the "
            "paired t-test at 5%, its p-values corrected by Holm's method for the variants of the table; the intervals are not "
            "corrected."))
        lines.append("A verdict is about these seeds' noise alone: other data, budgets or hyperparameters may turn it.")
        same = [row.get("initial_network") for row in _finished(rows)]
        if all(same) and not _beginnings(suite, rows):
            lines.append("With the same seed all variants began with the same encoder and decoder, the layers next to the "
                         "codebook aside.")
    undirected = [label(name) for name in columns(suite, rows) if not direction(name)]
    if undirected:
        lines.append(f"Of these, neither more nor less is better in itself: {'; '.join(undirected)}.")
    return lines


# The terminal and Markdown


def terminal(said: Content) -> str:
    """Return the tables as aligned text, and below them what failed and what is missing."""
    parts = [*said.warnings]
    for table in [*said.tables, *([said.speed] if said.speed else [])]:
        parts.append("\n".join([*([table.title] if table.title else []), *_aligned(table), *table.notes]))
    parts += [f"failed: {cell_name(row)}: {last_line(row.get('error') or '')}" for row in said.failures]
    parts += [f"missing: {line}" for line in said.missing]
    return "\n\n".join(parts)


def _aligned(table: Table) -> Iterable[str]:
    lines = [table.head, *table.rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(table.head))]
    for line in lines:
        yield "  " + "  ".join(text.ljust(width) if place in table.words else text.rjust(width)
                               for place, (text, width) in enumerate(zip(line, widths, strict=True))).rstrip()


def markdown(said: Content, drawn: Iterable[figures.Figure] = (), note: str = "",
             sheets: Iterable[tuple[str, str]] = ()) -> str:
    """Return the report as Markdown, with links to the files of figures and of `sheets` of reconstructions, by their titles."""
    parts = [f"# {_safe(said.title)}", _safe(said.about, code=True), *(f"> {_safe(line, code=True)}" for line in said.warnings),
             "\n".join(f"- {key}: {_safe(text)}" for key, text in said.facts.items()), "## Results"]
    for table in [*said.tables, *([said.speed] if said.speed else [])]:
        parts += _piped(table)
    if note:
        parts.append(_safe(note))
    for figure in drawn:
        parts += [f"![{_safe(figure.title)}](figures/{figure.name}.svg)", _safe(figure.caption)]
    for title, file in sheets:
        parts += [f"## {_safe(title)}", f"![{_safe(title)}]({file})"]
    if said.details:
        parts += ["## Differences to the baseline", *(part for table in said.details for part in _piped(table))]
    if said.failures:
        parts += ["## Failed cells", *_piped(failed(said.failures))]
        parts += [f"{_safe(cell)}:\n\n" + "\n".join(f"    {line}" for line in error.splitlines())
                  for cell, error in said.errors()]
    if said.missing:
        parts += ["## Missing metrics", "\n".join(f"- {_safe(line)}" for line in said.missing)]
    parts += ["## How the numbers were made", "\n".join(f"- {_safe(line)}" for line in said.method)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _piped(table: Table) -> list[str]:
    rule = "|" + "".join("---|" if place in table.words else "--:|" for place in range(len(table.head)))
    lines = ["| " + " | ".join(map(_safe, line)) + " |" for line in (table.head, *table.rows)]
    notes = [" ".join(map(_safe, table.notes))] if table.notes else []
    return [*([f"### {_safe(table.title)}"] if table.title else []), *notes, "\n".join([lines[0], rule, *lines[1:]])]


def _safe(text: str, code: bool = False) -> str:
    """Return text that Markdown shows as it is, in one line; but what stands in backticks may be `code`."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\*\[\]|])" if code else r"([\\`*\[\]|])", r"\\\1", text)


# Files


def write(suite: Suite, rows: list[Row], speed: dict | None, out: Path, mixed: bool = False) -> str:
    """Write report.md, with its figures beside it, and report.html into a folder; return the text for the terminal."""
    rows = _once(rows)
    suite = _with_all(suite, rows)
    differing = check_mixture(rows, mixed)
    said = content(suite, rows, speed, differing)
    try:
        drawn, note = figures.draw(suite, rows, speed, not differing), ""
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        drawn, note = [], figures.NO_MATPLOTLIB
    strips = {_place("Reconstructions", suite, point): shown for point, shown in figures.strips(suite, rows, out).items()}
    try:
        sheets = _files(out / "figures", drawn, strips)
        write_text(out / "report.md", _clean(markdown(said, drawn, note, sheets)))
        write_text(out / "report.html", _clean(page(said, drawn, note, strips)))
    except OSError as error:
        raise UserError(f"{out}: the report cannot be written: {error}") from error
    return _clean("\n\n".join(filter(None, [terminal(said), note])))


def _once(rows: list[Row]) -> list[Row]:
    """Return a row for each cell, a finished one if there is one; a UserError if two are there with other values."""
    kept: dict[str, Row] = {}
    for row in rows:
        other = kept.get(cell_name(row))
        if other and other["status"] == row["status"] == "finished" and other["values"] != row["values"]:
            raise UserError(f"{cell_name(row)}: there are two results of this cell, with different values; leave one of the "
                            "files out")
        if other is None or other["status"] != "finished":
            kept[cell_name(row)] = row
    return list(kept.values())


def _with_all(suite: Suite, rows: list[Row]) -> Suite:
    """Return a suite that has whatever variant and point rows are of, in the order of its file."""
    variants = {**suite.variants, **{row["variant"]: {} for row in rows if row["variant"] not in suite.variants}}
    known = {**suite.points, **{row["point"]: {} for row in rows if row.get("point") not in (None, *suite.points)}}
    ordered = {name: known[name] for name in [*map(str, suite.config.points), *known] if name in known}
    return replace(suite, variants=variants, points=ordered)


def _files(folder: Path, drawn: list, strips: dict[str, list]) -> list[tuple[str, str]]:
    """Write what report.md shows into a folder beside it; return the titles and links of the reconstructions."""
    if drawn or strips:
        folder.mkdir(exist_ok=True)
    for figure in drawn:
        write_text(folder / f"{figure.name}.svg", _clean(figure.on("#222222", "#ffffff", "#ffffff")) + "\n")
    sheets = []
    for place, (title, shown) in enumerate(strips.items()):
        name = f"reconstructions{f'_{place}' if place else ''}.png"
        (folder / name).write_bytes(figures.png(figures.sheet(shown)))
        sheets.append((title, f"{folder.name}/{name}"))
    return sheets


def _clean(text: str) -> str:
    """Return text without characters that steer a terminal or cannot be written."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def _place(title: str, suite: Suite, point: str | None) -> str:
    return title + (f", {suite.config.axis or 'point'} {point}" if point is not None else "")
