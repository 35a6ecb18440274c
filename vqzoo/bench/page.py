"""The report as one HTML page that runs nothing and asks for nothing: no script, no font, no picture from elsewhere."""

import base64
import re
from html import escape
from typing import TYPE_CHECKING

from vqzoo.bench.figures import Figure, Strip, png
from vqzoo.bench.statistics import BETTER, WITHIN, WORSE
from vqzoo.bench.tables import Table, failed

if TYPE_CHECKING:
    from vqzoo.bench.report import Content

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --paper: #ffffff; --line: #d9dde2; --raised: #f5f6f8;
  --better: #00694c; --worse: #a33a00; --warn: #8a5a00; --warn-paper: #fff6e0; --shade: #1b1f2433; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #9aa4b0; --paper: #14171a; --line: #343a41;
  --raised: #1d2125; --better: #5fd0a5; --worse: #ff9a63; --warn: #f0c060; --warn-paper: #2b2413; --shade: #e4e7eb33; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 3rem 0 .75rem; padding-top: .9rem; border-top: 1px solid var(--line); font-weight: 650; }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; font-weight: 650; }
p, ul, figcaption { max-width: 46rem; margin: .5rem 0; }
.about { font-size: 1.1rem; color: var(--soft); }
.warning { background: var(--warn-paper); border-left: 4px solid var(--warn); padding: .6rem .9rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .9rem 1.5rem; margin: 1.75rem 0 0; }
.facts div { min-width: 0; }
dt, .scroll caption, figcaption, .label, thead th { font-size: .875rem; color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .75rem 0;
  background: linear-gradient(to left, var(--paper) 50%, transparent) right / 3rem local
  no-repeat, linear-gradient(to left, var(--shade), transparent) right / 1rem no-repeat; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums lining-nums; font-size: .9375rem; }
caption { text-align: left; padding-bottom: .5rem; }
caption span { position: sticky; left: 0; display: block; width: max-content; max-width: min(46rem, calc(100vw - 2.5rem)); }
th, td { padding: .4rem .75rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child { padding-left: 0; position: sticky; left: 0; background: var(--paper); }
thead th { white-space: normal; max-width: 9rem; vertical-align: bottom; font-weight: 600;
  border-bottom: 1.5px solid var(--soft); }
tbody th { font-weight: 600; white-space: normal; max-width: 11rem; }
.number { text-align: right; }
.wide { white-space: normal; min-width: min(20rem, 60vw); overflow-wrap: anywhere; }
tbody tr:hover > * { background: var(--raised); }
code { font-size: .925em; }
.soft { color: var(--soft); }
.better { color: var(--better); font-weight: 600; }
.worse { color: var(--worse); font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr)); gap: .5rem 2rem; }
figure { margin: 0; min-width: 0; }
.figures .broad { grid-column: 1 / -1; }
figure svg { display: block; width: 100%; min-width: 30rem; height: auto; }
.broad svg { min-width: 46rem; }
.strips { min-width: 38rem; }
.strips img { display: block; width: 100%; height: auto; border-radius: 3px; }
.label { margin: .7rem 0 .2rem; max-width: none; position: sticky; left: 0; width: max-content; }
.label b { color: var(--ink); font-weight: 600; }
details { margin: .75rem 0; }
summary { cursor: pointer; }
pre { overflow-x: auto; background: var(--raised); padding: .75rem 1rem; font-size: .8125rem; line-height: 1.45;
  border-radius: 4px; }
@media print { .scroll { overflow: visible; } }
"""

MOST_PIXELS = 1024
"""The width of a row of pictures; small pictures are shown at twice their size."""

BROAD = 500
"""The width in points beyond which a figure has a line of its own."""

SIGNS = {BETTER: "better", WORSE: "worse"}


def page(said: "Content", figures: list[Figure], note: str, strips: dict[str, list[Strip]]) -> str:
    """Return the whole page."""
    parts = [f"<header><h1>{escape(said.title)}</h1>", f'<p class="about">{_prose(said.about)}</p>' if said.about else "",
             *(f'<p class="warning" role="note">{_prose(line)}</p>' for line in said.warnings), _facts(said.facts), "</header>",
             "<h2>Results</h2>", *(_table(table) for table in said.tables)]
    if said.speed:
        parts.append(_table(said.speed))
    if note or figures:
        drawn = "\n".join(map(_figure, figures))
        parts += ["<h2>Figures</h2>", f"<p>{escape(note)}</p>" if note else f'<div class="figures">\n{drawn}\n</div>']
    for title, shown in strips.items():
        parts += [f"<h2>{escape(title)}</h2>", _strips(title, shown)]
    if said.details:
        parts += ["<h2>Differences to the baseline</h2>", "<details><summary>Every column, pair by pair of seeds</summary>",
                  *(_table(table) for table in said.details), "</details>"]
    if said.failures:
        parts += ["<h2>Failed cells</h2>", _table(failed(said.failures)),
                  *(f"<details><summary>The whole error of {escape(cell)}</summary><pre>{escape(error)}</pre></details>"
                    for cell, error in said.errors())]
    if said.missing:
        parts += ["<h2>Missing metrics</h2>", _list(said.missing)]
    parts += ["<h2>How the numbers were made</h2>", _list(said.method)]
    body = "\n".join(part for part in parts if part)
    return ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(said.title)} – vqzoo bench</title>\n<style>{STYLE}</style>\n</head>\n"
            f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n")


def _facts(facts: dict[str, str]) -> str:
    said = "\n".join(f"<div><dt>{escape(key)}</dt><dd>{escape(text)}</dd></div>" for key, text in facts.items())
    return f'<dl class="facts">\n{said}\n</dl>'


def _prose(text: str) -> str:
    """Return text in which what stands in backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _list(lines: list[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>"


def _scroll(name: str, inner: str) -> str:
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">\n{inner}\n</div>'


def _table(table: Table) -> str:
    def classes(place: int) -> str:
        return ' class="number"' if place not in table.words else ""

    head = "".join(f'<th scope="col"{classes(place)}>{escape(text)}</th>' for place, text in enumerate(table.head))
    lines = []
    for line in table.rows:
        cells = "".join(f"<td{_long(text) or classes(place)}>{_value(text)}</td>" for place, text in enumerate(line) if place)
        lines.append(f'<tr><th scope="row">{escape(line[0])}</th>{cells}</tr>')
    notes = f"<caption><span>{escape(' '.join(table.notes))}</span></caption>\n" if table.notes else ""
    body = "\n".join(lines)
    inner = f"<table>\n{notes}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return (f"<h3>{escape(table.title)}</h3>\n" if table.title else "") + _scroll(table.title or "table", inner)


def _long(text: str) -> str:
    return ' class="wide"' if len(text) > 50 else ""


def _value(text: str) -> str:
    """Return a cell's text, in which verdicts stand out and intervals do not."""
    if text in SIGNS:
        return f'<span class="{SIGNS[text]}">{text}</span>'
    if text in (WITHIN, "baseline"):
        return f'<span class="soft">{text}</span>'
    return re.sub(r"( ± (?:&lt;)?[\d.,]+)", r'<span class="soft">\1</span>', escape(text))


def _figure(figure: Figure) -> str:
    drawing = figure.on("currentColor", "var(--paper)", "none")
    size, width = re.search(r'viewBox="0 0 ([\d.]+) [^"]*"', drawing).group(0, 1)
    drawing = re.sub(r"<svg\b[^>]*>", f'<svg {size} style="max-width: {float(width):.0f}pt" role="img" '
                     f'aria-label="{escape(figure.title)}">', drawing, count=1).replace("xlink:href", "href")
    broad = ' class="broad"' if float(width) > BROAD else ""
    return (f"<figure{broad}>\n<h3>{escape(figure.title)}</h3>\n{_scroll(figure.title, drawing)}\n"
            f"<figcaption>{escape(figure.caption)}</figcaption>\n</figure>")


def _strips(title: str, strips: list[Strip]) -> str:
    lines = []
    for strip in strips:
        said = f": {escape(strip.said)}" if strip.said else ""
        lines.append(f'<p class="label"><b>{escape(strip.label)}</b>{said}</p>')
        if strip.picture:
            data = base64.b64encode(png(strip.picture)).decode()
            most = min(MOST_PIXELS, 2 * strip.picture.width)
            lines.append(f'<img alt="{escape(strip.label)}: a row of pictures" style="max-width: {most}px" '
                         f'src="data:image/png;base64,{data}">')
    return _scroll(title, '<div class="strips">\n' + "\n".join(lines) + "\n</div>")
