"""Render the README's tables of results from the files in benchmarks/results: `make docs`.

In the README, what stands between `<!-- table: NAME -->` and `<!-- end -->` is what TABLES[NAME] returns. A table of what
`vqzoo bench` measured is one entry: `"NAME": suite("FILE.jsonl", ["psnr", "usage"], "vq")`.
"""

import json
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from vqzoo.bench.report import check_mixture
from vqzoo.bench.suite import load_suite
from vqzoo.bench.tables import Table, measured
from vqzoo.errors import UserError
from vqzoo.evaluation.report import written

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SUITES = ROOT / "benchmarks" / "suites"

END = "<!-- end -->"
MARK = re.compile(rf"(?P<begin><!-- table: (?P<name>.*?) -->).*?(?P<end>{END}|<!-- table:|\Z)", re.DOTALL)
WIDTH = 128
"""The most characters of a line that is no table's."""

LITERATURE = "literature.jsonl"

PUBLISHED = {"rfid": "{:.2f}", "lpips": "{:.2f}", "psnr": "{:.2f} dB", "ssim": "{:.3f}", "usage": "{:.1%}"}
"""The metrics of papers, with the digits that papers give."""

ABLATION = {
    "neither": "joint stage without dense loss and replacement: vanilla VQ",
    "dense": "with the dense loss",
    "joint": "with dense loss and replacement",
    "joint_warm_up": "then warm-up on a frozen encoder, no GAN",
    "joint_refine": "then refining on a frozen encoder, no warm-up",
    "full": "all three phases",
}
"""What trains in each row of the ablation."""

KERNELS = {
    "ours": ("ours", "ours"),
    "ours, `fast`": ("ours, fast", "ours, fast"),
    "ours, `chunked`": ("ours, chunked", "ours, chunked"),
    "the products alone, in bf16: the floor": ("bf16 product", "bf16 products"),
    "`torch.cdist` and `argmin`; the dense formula with autograd": ("cdist, argmin", "dense autograd"),
    "SimVQ's form": ("SimVQ's form", None),
    "SimVQ's form, autocast": ("SimVQ's form, autocast", None),
    "SimVQ's form, compiled": ("SimVQ's form, compiled", None),
}
"""The rows of the table of kernels: what the file calls their search and their dense loss."""


# Files and Markdown


def rows(file: str) -> list[dict[str, Any]]:
    """Return the rows of a file of results; a UserError names one that is missing or cannot be read."""
    try:
        return [json.loads(line) for line in (RESULTS / file).read_text().splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise UserError(f"benchmarks/results/{file}: no such file; a table of the README is made of it") from error
    except ValueError as error:
        raise UserError(f"benchmarks/results/{file}: cannot be read as lines of JSON: {error}") from error


def piped(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    head, *lines = [list(line) for line in (head, *lines)]
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(line)} |" for line in lines)])


def filled(text: str) -> str:
    """Return a paragraph in lines that are not too long."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def rendered(text: str) -> str:
    """Return a page with its tables as the files say; a UserError names a mark that has no table or no end."""
    def render(found: re.Match) -> str:
        name = found["name"]
        if name not in TABLES:
            raise UserError(f"README.md: docs/tables.py has no table {name!r}; it has {', '.join(TABLES)}")
        if found["end"] != END:
            raise UserError(f"README.md: <!-- table: {name} --> has no {END}")
        return f"{found['begin']}\n{TABLES[name]()}\n{found['end']}"

    return MARK.sub(render, text)


# Tables of one file each


def photos128() -> str:
    """Return the four recipes on 128×128 photos."""
    found = [(row["recipe"], row["metrics"]) for row in rows("2026-11-23_photos128_cpu.jsonl")]
    return piped(["recipe", "usage", "perplexity", "PSNR", "SSIM"],
                 ([f"`{recipe}`", f"{of['usage']:.1%}", f"{of['perplexity']:,.0f}", f"{of['psnr']:.2f} dB", f"{of['ssim']:.3f}"]
                  for recipe, of in found))


def ablation() -> str:
    """Return NSVQ's parts one by one: mean ± standard deviation over the seeds."""
    forms = {"usage": "{:.1%}", "perplexity": "{:.0f}", "psnr": "{:.2f} dB", "ssim": "{:.3f}",
             "frechet_mobilenetv2_100": "{:.0f}"}
    found: dict[str, list[dict]] = {}
    for row in rows("2026-11-23_ablation_cpu.jsonl"):
        found.setdefault(row["row"], []).append(row["metrics"])

    def spread(name: str, values: list[float]) -> str:
        mean, deviation = (forms[name].format(number(values)) for number in (fmean, stdev))
        unit = mean.lstrip("0123456789.")
        return f"{mean.removesuffix(unit)} ± {deviation}"

    return piped(["row", "what trains", "usage", "perplexity", "PSNR", "SSIM", "Fréchet"],
                 ([f"`{row}`", ABLATION[row], *(spread(name, [one[name] for one in metrics]) for name in forms)]
                  for row, metrics in found.items()))


def protocols() -> str:
    """Return the same tokenizers by three protocols."""
    forms = {"psnr": "{:.2f}", "ssim": "{:.3f}", "fd_mobilenetv2_100": "{:.0f}"}
    found: dict[str, dict[str, dict]] = {}
    for row in rows("2026-11-24_protocols_cpu.jsonl"):
        found.setdefault(row["recipe"].removeprefix("photos128_"), {})[row["protocol"]] = row["metrics"]
    others = ["simvq's", "taming's"]
    return piped(["`photos128_`", "PSNR", *others, "SSIM", *others, "FD", *others],
                 ([recipe, *(form.format(by[protocol][name]) for name, form in forms.items()
                             for protocol in ("vqzoo", "simvq", "taming"))] for recipe, by in found.items()))


def compose() -> str:
    """Return a sentence on the pairs of plugins' hooks."""
    file = "2026-11-26_compose_cpu.jsonl"
    (found,) = rows(file)
    said = found["outcomes"]
    return filled(
        f"Of [all {found['pairs']} pairs](benchmarks/results/{file}) of two plugins' hooks, {said['trains']} train and "
        f"{said['refused']} are refused before the first step, each with its reason (`vqzoo bench compose`).")


# Kernels


def kernels() -> str:
    """Return times and memory of search and dense loss at one size, with other ways measured beside them."""
    file = "2026-11-26_kernels_time_h200.jsonl"
    (found,) = rows(file)
    search, loss = found["time_search"][0]["methods"], found["time_loss"][0]["methods"]
    count, size, width = found["time_search"][0]["size"]
    temperature = found["time_loss"][0]["temperature"]
    about = filled(
        f"{found['hardware']['device']}, {count:,} latents, {size:,} codes, width {width}, temperature {temperature} "
        f"([times](benchmarks/results/{file})): medians of rounds in random order, in brackets the 5th to 95th percentile of "
        "the ratio to ours; memory above the inputs; the loss with its gradient; wrong: choices unlike the exact search's.")
    table = piped(["way", "search", "to ours", "MiB", "wrong", "dense loss", "to ours", "MiB"],
                  ([way, *_timed(search.get(first)), _wrong(search.get(first)), *_timed(loss.get(second))]
                   for way, (first, second) in KERNELS.items()))
    low, high = search["ours again"]["ratio_5_95"]
    said = filled(
        f"Ours timed twice differs by a factor of {low:.2f} to {high:.2f} in the search, so smaller differences there say "
        f"nothing. The floor is not reached: the search takes {_times(search, 'ours', 'bf16 product')} times as long as its "
        f"product in bf16, the exact dense loss {_times(loss, 'ours', 'bf16 products')} times its products in bf16 and "
        f"{_times(loss, 'ours', 'tf32 products')} times those in tf32, the `fast` one "
        f"{_times(loss, 'ours, fast', 'bf16 products')} times those in bf16.")
    return f"{about}\n\n{table}\n\n{said}"


def _times(methods: dict[str, dict], one: str, other: str) -> str:
    """Say how many times as long one method takes as another."""
    return f"{methods[one]['ms'] / methods[other]['ms']:.1f}"


def _timed(cell: dict | None) -> list[str]:
    if cell is None:
        return ["", "", ""]
    if "failed" in cell:
        return ["failed", "", ""]
    low, high = cell["ratio_5_95"]
    spread = f" ({low:.2f} to {high:.2f})" if low < high else ""
    return [f"{cell['ms']:.2f} ms", f"{cell['ratio']:.2f}{spread}", f"{cell['peak_mib']:,.0f}"]


def _wrong(cell: dict | None) -> str:
    return f"{cell['wrong']:,}" if cell and "wrong" in cell else ""


def kernels_sizes() -> str:
    """Return the times over the number of codes, and how many times the floor that is."""
    (found,) = rows("2026-11-26_kernels_time_h200.jsonl")
    count, size, width = found["time_search"][0]["size"]
    cells = {size: (found["time_search"][0]["methods"], found["time_loss"][0]["methods"])}
    cells |= {each["size"][1]: (each["search"], each["loss"]) for each in found["time_sizes"]
              if each["size"][0] == count and each["size"][2] == width}
    ways = {"search": (0, "ours", "bf16 product"), "dense loss": (1, "ours", "bf16 products"),
            "dense loss, `fast`": (1, "ours, fast", "bf16 products")}

    def cell(size: int, place: int, way: str, floor: str) -> str:
        methods = cells[size][place]
        return f"{methods[way]['ms']:.2f} ms ({_times(methods, way, floor)})"

    return piped(["codes (times the floor)", *(f"{size:,}" for size in sorted(cells))],
                 ([name, *(cell(size, *way) for size in sorted(cells))] for name, way in ways.items()))


def kernels_check() -> str:
    """Return a sentence on the checks of the kernels against float64."""
    file = "2026-11-26_kernels_check_h200.jsonl"
    (found,) = rows(file)
    parts = search, loss, races, headline = [found[f"check_{name}"] for name in ("search", "loss", "races", "headline")]
    failed = sum(not each["passed"] for part in parts for each in part)
    *sizes, largest = (f"{each['size']:,}" for each in headline)
    return filled(
        f"[Checked](benchmarks/results/{file}) on one {found['hardware']['device']} against float64: {len(search)} searches "
        f"and {len(loss)} losses of many sizes and kinds of inputs, and samples of searches among {', '.join(sizes)} and "
        f"{largest} codes; {len(races)} operations run 20 times for the same bits: "
        f"{f'{failed} failed' if failed else 'all passed'}.")


# What papers say


def literature() -> str:
    """Return what papers say of methods that have a recipe here, and in a column of its own what was measured on that data.

    What was measured is a row of any file of results with a recipe, data and metrics, as those of `photos128` have them.
    """
    published = [row for row in rows(LITERATURE) if row["recipes"]]
    own = [row for file in sorted(RESULTS.glob("*.jsonl")) if file.name != LITERATURE for row in rows(file.name)]
    about = filled(f"Published for {published[0]['data'].replace('x', '×')}, not measured by us ([more rows]"
                   f"(benchmarks/results/{LITERATURE})):")
    head = ["method", "codes", "source", *(f"published {_name(name)}" for name in PUBLISHED), "measured here"]
    lines = []
    for row in published:
        number, _, place = row["source"].removeprefix("arXiv:").partition(" ")
        here = [mine["metrics"] for mine in own if str(mine.get("data")).startswith(row["data"])
                and mine.get("recipe") in row["recipes"] and mine["metrics"].get("codebook_size") == row["codebook_size"]]
        values = row["values"]
        lines.append([row["method"], f"{row['codebook_size']:,}", f"[{number}](https://arxiv.org/abs/{number}), {place}",
                      *(form.format(values[name]).replace(".0%", "%") if name in values else ""
                        for name, form in PUBLISHED.items()),
                      "; ".join(_measured(metrics) for metrics in here) or "not yet"])
    return f"{about}\n\n{piped(head, lines)}"


def _name(metric: str) -> str:
    return {"rfid": "rFID", "usage": "usage"}.get(metric, metric.upper())


def _measured(metrics: dict[str, float]) -> str:
    """Write what was measured of the metrics of papers; LPIPS has its network in its name."""
    return ", ".join(f"{name} {written(name, value)}" for name, value in metrics.items() if name.split("_")[0] in PUBLISHED)


# What `vqzoo bench` measured


def suite(file: str, columns: list[str], baseline: str, group: str | None = None) -> Callable[[], str]:
    """Return what renders a suite's results: mean ± 95% interval, paired differences to the baseline, and verdicts.

    The suite is the file of benchmarks/suites that the rows name; `group` is the one of its tables that is wanted.
    """
    def render() -> str:
        found = rows(file)
        where = f"benchmarks/results/{file}"
        check_mixture(found)
        names = {row["suite"] for row in found}
        if len(names) != 1:
            raise UserError(f"{where}: rows of one suite are wanted, not of {', '.join(sorted(names)) or 'none'}")
        whole = load_suite(str(SUITES / f"{names.pop()}.yaml"))
        variants = [row["variant"] for row in found]
        if baseline not in variants:
            raise UserError(f"{where}: no row of the baseline {baseline!r}")
        variants = sorted(dict.fromkeys(variants), key=[*whole.variants, *variants].index)
        points = {row["point"] for row in found}
        part = replace(whole, config=replace(whole.config, columns=columns, baseline=baseline),
                       variants=dict.fromkeys(variants, {}), points={name: {} for name in whole.points if name in points},
                       seeds=len({row["seed"] for row in found}))
        tables = [table for table in measured(part, found, {}) if group is None or table.title.partition(", ")[0] == group]
        if not tables:
            raise UserError(f"{where}: the suite has no table {group!r}; it has {', '.join(map(repr, part.tables()))}")
        return "\n\n".join(text for table in tables for text in _laid(table, titled=len(tables) > 1))

    return render


def _laid(table: Table, titled: bool) -> list[str]:
    """Return a table of a report in Markdown, and the notes on it."""
    safe = [[cell.replace("*", r"\*").replace("<", "&lt;").replace("|", r"\|") for cell in line]
            for line in (table.head, *table.rows, [table.title], table.notes)]
    head, *lines, (title,), notes = safe
    return [*([f"**{title}**"] if titled and title else []), piped(head, lines), *([filled(" ".join(notes))] if notes else [])]


TABLES: dict[str, Callable[[], str]] = {
    "quantizers": suite("2026-11-26_quantizers_cpu.jsonl", ["psnr", "ssim", "usage", "perplexity"], "vq", "10 bits per token"),
    "quantizers_gpu": suite("2026-11-26_quantizers_h200.jsonl", ["psnr", "ssim", "usage", "perplexity"], "vq", "1,024 codes"),
    "photos128": photos128,
    "ablation": ablation,
    "protocols": protocols,
    "compose": compose,
    "kernels": kernels,
    "kernels_sizes": kernels_sizes,
    "kernels_check": kernels_check,
    "literature": literature,
}
"""What renders each table of the README."""
