"""The figures of a report: quality against cost, curves of training, metrics along the axis, and reconstructions."""

import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vqzoo.bench.statistics import FEWEST, by_seed, direction, dominated, estimate
from vqzoo.bench.suite import Suite
from vqzoo.bench.tables import Row, at, columns, label, of, plain_label, points, value

INK, PAPER, GROUND = "#123456", "#fedcba", "#fedcbb"
"""Colours that stand for those of the page on which a figure is put, and for the figure's own ground."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")
"""Okabe's and Ito's, but for black, which is the baseline's, and yellow."""

MARKERS, DASHES = "osD^vPX*", ("-", "--", ":", "-.")

NO_MATPLOTLIB = "The figures need matplotlib, which is not installed: pip install 'vqzoo[bench]', then make the report again."


@dataclass
class Figure:
    """A drawing as SVG, whose colours are to be replaced by the page's, with what it shows in words."""

    name: str
    title: str
    svg: str
    caption: str

    def on(self, ink: str, paper: str, ground: str) -> str:
        """Return the drawing in a page's colours."""
        return self.svg.replace(INK, ink).replace(PAPER, paper).replace(GROUND, ground)


@dataclass
class Strip:
    """A row of pictures of the same images; `said` stands where there are none."""

    label: str
    picture: Image.Image | None
    said: str = ""


def draw(suite: Suite, rows: list[Row], speed: dict | None, comparable: bool = True) -> list[Figure]:
    """Return the figures for which there are numbers; one of what is not comparable says so, and marks nothing as dominated."""
    import matplotlib

    rows = [row for row in rows if row["status"] == "finished"]
    style = {"svg.fonttype": "none", "svg.hashsalt": "vqzoo", "text.parse_math": False, "text.color": INK,
             "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": INK,
             "grid.alpha": 0.15, "axes.grid": True, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
             "figure.facecolor": GROUND, "axes.facecolor": "none", "legend.frameon": False, "lines.linewidth": 1.6,
             "axes.titlesize": 10, "axes.linewidth": 0.8}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **style, "backend": "svg"}):
        drawn = [_quality_and_time(suite, rows, speed, comparable), _quality_and_bits(suite, rows, comparable),
                 *(_curve(suite, rows, name) for name in suite.config.curves), _along(suite, rows)]
    mark = "" if comparable else "Not comparable, as said above. "
    return [replace(figure, caption=mark + figure.caption) for figure in drawn if figure]


# Quality and cost


def _quality_and_time(suite: Suite, rows: list[Row], speed: dict | None, comparable: bool) -> Figure | None:
    times = {name: found for name, found in ((speed or {}).get("variants") or {}).items() if "failed" not in found}

    def cost(variant: str, point: str | None) -> tuple[float, float, float] | None:
        found = times.get(variant if point is None else f"{variant} @ {point}") or times.get(variant)
        if not found:
            return None
        low, high = (found["ms"] * found[side] / found["ratio"] if found.get(side) and found.get("ratio") else found["ms"]
                     for side in ("ratio_low", "ratio_high"))
        return found["ms"], low, high

    return _costs(suite, rows, comparable, cost, "quality_and_time", "quantizer's time",
                  "time of the quantizer's part of a training step (ms)", True)


def _quality_and_bits(suite: Suite, rows: list[Row], comparable: bool) -> Figure | None:
    def cost(variant: str, point: str | None) -> tuple[float, float, float] | None:
        found = estimate(by_seed(of(at(rows, point), variant), "bits_per_token").values())
        half = found.half or 0.0
        return None if found.mean is None else (found.mean, found.mean - half, found.mean + half)

    return _costs(suite, rows, comparable, cost, "quality_and_bits", "bits per token", "bits per token", False)


def _costs(suite: Suite, rows: list[Row], comparable: bool, cost: Callable, name: str, against: str, axis: str,
           logarithmic: bool) -> Figure | None:
    """Draw quality against a cost of each variant at each point, those of a variant joined."""
    from matplotlib.figure import Figure as Canvas

    metric = suite.config.quality
    canvas = Canvas(figsize=(6, 3.9), layout="constrained")
    axes, marks, spending = canvas.add_subplot(), [], set()
    behind = _behind(suite, rows, cost, metric) if comparable else set()
    for variant in suite.variants:
        colour, marker, _ = _look(suite, variant)
        path = []
        for point in points(suite):
            found, spent = estimate(by_seed(of(at(rows, point), variant), metric).values()), cost(variant, point)
            if found.mean is None or spent is None:
                continue
            x, low, high = spent
            y = found.mean * _scale(metric)
            path.append((x, y))
            axes.errorbar(x, y, found.half and found.half * _scale(metric), [[max(0.0, x - low)], [max(0.0, high - x)]],
                          fmt="none", ecolor=colour, elinewidth=1, alpha=0.6)
            axes.plot(x, y, marker, color=colour, markersize=7, markeredgewidth=1.4,
                      markerfacecolor=PAPER if (variant, point) in behind else colour)
            spending.add(x)
        if len(path) > 1:
            axes.plot(*zip(*path, strict=True), color=colour, alpha=0.5)
        if path:
            marks.append((variant, *path[-1]))
            axes.plot([], [], marker, color=colour, label=variant)
    if len(spending) < 2:
        return None
    if logarithmic:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
    axes.set_xlabel(axis)
    axes.set_ylabel(_unit(metric))
    axes.margins(0.12)
    if not _name(canvas, axes, marks):
        _legend(canvas, [axes])
    what = plain_label(metric)
    caption = (f"{what}, mean over seeds with its 95% interval, against {against}." + (
        " Hollow: another variant costs no more and is better outside the noise (paired t-test at 5%, each pair by itself)."
        if behind else " No variant is shown to be behind another outside the noise." if comparable and direction(metric)
        else "") + (f" Lines join the points of {suite.config.axis or 'the axis'}." if suite.points else ""))
    return Figure(name, f"{what} and {against}", _svg(canvas, name), caption)


def _behind(suite: Suite, rows: list[Row], cost: Callable, metric: str) -> set[tuple[str, str | None]]:
    """Return the variants that are behind another; what quantizes nothing is no rival of quantizers."""
    found = set()
    for point in points(suite):
        here = {variant: by_seed(of(at(rows, point), variant), metric) for variant in suite.variants}
        discrete = {variant for variant in here if by_seed(of(at(rows, point), variant), "codebook_size")}
        here = {variant: found if variant in discrete or not discrete else {} for variant, found in here.items()}
        spent = {variant: cost(variant, point)[0] for variant in here if here[variant] and cost(variant, point)}
        found |= {(variant, point) for variant in dominated(here, spent, metric)}
    return found


def _name(canvas: Any, axes: Any, marks: list[tuple[str, float, float]]) -> bool:
    """Write each variant's name beside its mark, unless two would overlap."""
    canvas.draw_without_rendering()
    point = canvas.dpi / 72
    places: list[tuple[bool, float, float, float]] = []
    for text, x, y in marks:
        across, height = axes.transData.transform((x, y))
        long = (len(text) * 6.2 + 16) * point
        right = across + long < canvas.bbox.width
        places.append((right, height, *((across, across + long) if right else (across - long, across))))
    for place, (_, height, begin, end) in enumerate(places):
        for _, other, start, stop in places[:place]:
            if abs(height - other) < 12 * point and begin < stop and start < end:
                return False
    for (text, x, y), (right, *_) in zip(marks, places, strict=True):
        axes.annotate(text, (x, y), (9 if right else -9, 0), textcoords="offset points", ha="left" if right else "right",
                      va="center", fontsize=9, annotation_clip=False)
    return True


# Curves and the axis


def _curve(suite: Suite, rows: list[Row], name: str) -> Figure | None:
    """Draw a curve of training, a panel for each point: the mean over seeds, and their range as a band."""
    shown = [point for point in points(suite) if any(row.get("curves", {}).get(name) for row in at(rows, point))]
    if not shown:
        return None
    panels, canvas = _panels(len(shown))
    for axes, point in zip(panels, shown, strict=True):
        for variant in suite.variants:
            curves = [row["curves"][name] for row in of(at(rows, point), variant) if row.get("curves", {}).get(name)]
            if not curves:
                continue
            colour, _, dash = _look(suite, variant)
            steps, heights = _together([[(x, float(y) * _scale(name)) for x, y in curve] for curve in curves])
            axes.plot(steps, heights.mean(0), color=colour, linestyle=dash, label=variant)
            axes.fill_between(steps, heights.min(0), heights.max(0), color=colour, alpha=0.15, linewidth=0)
        if point is not None:
            axes.set_title(f"{suite.config.axis or 'point'} {point}")
        axes.set_xlabel("step")
        axes.set_ylabel(_unit(name))
    _legend(canvas, panels)
    return Figure(f"curve_{re.sub(r'[^a-z0-9]+', '_', name.lower())}", f"{name} over training",
                  _svg(canvas, name), f"{name} over training: the mean over seeds, and as a band the range of the seeds.")


def _together(curves: list[list[tuple[float, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps that all curves span, and the curves' heights there, [curves, steps]."""
    sides = [np.array(curve, dtype=float).T for curve in curves]
    low, high = max(x[0] for x, _ in sides), min(x[-1] for x, _ in sides)
    steps = np.unique(np.concatenate([x for x, _ in sides]))
    steps = steps[(steps >= low) & (steps <= high)]
    return steps, np.stack([np.interp(steps, x, y) for x, y in sides])


def _along(suite: Suite, rows: list[Row]) -> Figure | None:
    """Draw each column along the axis, a panel for each."""
    names = columns(suite, rows)
    if len(suite.points) < 2 or not names:
        return None
    try:
        places = {point: float(point) for point in suite.points}
        logarithmic = min(places.values()) > 0
    except ValueError:
        places, logarithmic = {point: float(place) for place, point in enumerate(suite.points)}, False
    numeric = logarithmic or all(point == f"{place:g}" for point, place in places.items())
    panels, canvas = _panels(len(names))
    for axes, name in zip(panels, names, strict=True):
        for variant in suite.variants:
            colour, marker, dash = _look(suite, variant)
            found = [(places[point], estimate(by_seed(of(at(rows, point), variant), name).values())) for point in suite.points]
            found = sorted((x, each.mean * _scale(name), (each.half or 0.0) * _scale(name)) for x, each in found
                           if each.mean is not None)
            if found:
                x, y, half = zip(*found, strict=True)
                axes.errorbar(x, y, half, color=colour, marker=marker, markersize=4, linestyle=dash, elinewidth=1,
                              label=variant)
        if logarithmic:
            axes.set_xscale("log", base=2)
        axes.minorticks_off()
        axes.set_xticks(list(places.values()), [f"{place:g}" if numeric else point for point, place in places.items()])
        axes.set_xlabel(suite.config.axis or "point")
        axes.set_title(_unit(name))
    _legend(canvas, panels)
    axis = suite.config.axis or "the axis"
    return Figure("along_the_axis", f"Along {axis}", _svg(canvas, "axis"), f"Each column along {axis}: means over seeds with "
                  f"their 95% intervals, where there are {FEWEST} seeds or more.")


# Drawing


def _look(suite: Suite, variant: str) -> tuple[str, str, str]:
    """Return a variant's colour, marker and dashes; the baseline has the colour of text."""
    place = [name for name in suite.variants if name != suite.baseline].index(variant) if variant != suite.baseline else -1
    if place < 0:
        return INK, "o", "-"
    return (COLOURS[place % len(COLOURS)], MARKERS[(place + 1) % len(MARKERS)],
            DASHES[place // len(COLOURS) % len(DASHES)])


def _panels(count: int) -> tuple[list[Any], Any]:
    """Return axes in as many panels, two or three beside one another, with a place at the right for names."""
    from matplotlib.figure import Figure as Canvas

    wide = 2 if count in (2, 4) else min(3, count)
    high = -(-count // wide)
    canvas = Canvas(figsize=(6 if wide == 1 else 10, 3.9 if wide == 1 else 2.7 * high + 0.3), layout="constrained")
    return list(canvas.subplots(high, wide, squeeze=False).flat)[:count], canvas


def _legend(canvas: Any, panels: list[Any]) -> None:
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    canvas.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=9)
    for axes in canvas.axes:
        if axes not in panels:
            axes.set_visible(False)


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axis.set_minor_formatter(NullFormatter())


def _scale(name: str) -> float:
    return 100.0 if value(name, 1.0).endswith("%") else 1.0


def _unit(name: str) -> str:
    unit = re.sub(r"^[-\d.,e+]+", "", value(name, 1.0)).strip()
    text = label(name).removesuffix(", mean of the run") if "/" in name else label(name)
    return f"{text} ({unit})" if unit and unit not in text else text


def _svg(canvas: Any, salt: str) -> str:
    """Return the drawing as an element of a page: no prologue, no metadata, no fonts of its own, names that no other has."""
    stream = io.StringIO()
    canvas.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"(font(?:-family)?: ?[^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1system-ui, 'DejaVu Sans', sans-serif", text)
    prefix = re.sub(r"\W+", "-", salt)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'xlink:href="#{prefix}-')
    return text.strip()


# Reconstructions


def strips(suite: Suite, rows: list[Row], out: Path) -> dict[str | None, list[Strip]]:
    """Return at each point the originals and below them each variant's reconstructions of the lowest finished seed.

    Where a variant was shown other originals than the first, its own stand above it and say so.
    """
    found: dict[str | None, list[Strip]] = {}
    for point in points(suite):
        shown: list[Strip] = []
        originals = None
        for variant in suite.variants:
            done = [row for row in of(at(rows, point), variant) if row["status"] == "finished"]
            done.sort(key=lambda row: row["seed"])
            if not done:
                continue
            picture, why = _halves(out / str(done[0].get("folder")) / "run" / "reconstructions.png")
            if picture is None:
                shown.append(Strip(variant, None, why))
                continue
            above, below = picture
            if originals is None:
                originals = above
                shown.insert(0, Strip("originals", above))
            elif above.size != originals.size or above.tobytes() != originals.tobytes():
                shown.append(Strip("originals", above, f"{variant} was shown other images than those above"))
            shown.append(Strip(f"{variant}, seed {done[0]['seed']}", below))
        if originals is not None:
            found[point] = shown
    return found


def _halves(file: Path) -> tuple[tuple[Image.Image, Image.Image] | None, str]:
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except OSError as error:
        return None, f"no picture: {error.strerror or 'it cannot be read'}"
    half = picture.height // 2
    return (picture.crop((0, 0, picture.width, half)), picture.crop((0, half, picture.width, 2 * half))), ""


def png(picture: Image.Image) -> bytes:
    """Return a picture as the bytes of a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def sheet(strips: Iterable[Strip]) -> Image.Image:
    """Return the rows of pictures as one, each below its name."""
    strips = list(strips)
    font, line = ImageFont.load_default(14), 24
    width = max(strip.picture.width for strip in strips if strip.picture)
    height = sum(line + (strip.picture.height if strip.picture else 0) for strip in strips)
    whole = Image.new("RGB", (width, height), "white")
    brush, top = ImageDraw.Draw(whole), 0
    for strip in strips:
        brush.text((2, top + 3), strip.label + (f": {strip.said}" if strip.said else ""), fill="#222222", font=font)
        top += line
        if strip.picture:
            whole.paste(strip.picture, (0, top))
            top += strip.picture.height
    return whole
