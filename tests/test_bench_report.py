"""A suite's report: its statistics are scipy's, noise is not ranked, mixtures are refused, and the page needs nobody."""

import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from vqzoo.bench import figures, report, statistics, tables
from vqzoo.bench.suite import BudgetConfig, GroupConfig, Suite, SuiteConfig
from vqzoo.errors import UserError

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ALIEN = "<script>alert('x')</script>"
QUALITY = {"vq": [19.0, 19.5, 18.8], "ema": [20.1, 20.5, 19.9], "simvq": [19.4, 19.2, 19.6], "broken": [17.0, 17.4, math.nan],
           ALIEN: [18.0, 18.4]}


def make_suite(**more):
    variants = {name: {} for name in more.pop("variants", QUALITY)}
    config = SuiteConfig(**{"about": "Five <b>variants</b>.", "base": "tiny", "variants": variants, "baseline": "vq",
                            "columns": ["psnr", "rfid", "usage", "bits_per_token"], **more})
    points = {name: {} for name in config.points}
    return Suite("toy", Path("toy.yaml"), config, variants, points, 3, BudgetConfig(steps=600), {}, {}, None)


def make_row(variant, seed, values, point=None, **more):
    return {"suite": "toy", "variant": variant, "point": point, "seed": seed, "status": "finished", "error": None,
            "missing": {}, "values": {"usage": 0.5, "bits_per_token": 10.0, "codebook_size": 1024, **values},
            "curves": {"codes/usage": [[10, 0.1], [20, 0.3 + seed / 10]]},
            "card": {"protocol": "vqzoo", "data": "photos/val", "fingerprint": "ab", "resolution": [64, 64], "images": 7},
            "hardware": {"device": "cpu", "processes": 1, "threads": 1, "cores": 2, "jobs": 2},
            "versions": {"torch": "2.6", "vqzoo": "0.1"}, "budget": {"epochs": 6, "epoch_steps": 100},
            "recipe": {"encoder": {"name": "conv", "stride": 8}}, "initial_network": f"network of seed {seed}",
            "date": "2026-01-02", "folder": f"cells/{variant.strip('</>')}-{point}-{seed}", **more}


def make_rows(quality=QUALITY, **more):
    """Return a row of each value, NaN as text as JSON has it."""
    return [make_row(variant, seed, {"psnr": "nan" if math.isnan(value) else value}, **more)
            for variant, values in quality.items() for seed, value in enumerate(values)]


def failed_row(variant, seed):
    return make_row(variant, seed, {}) | {"status": "failed", "values": {}, "curves": {}, "card": {},
                                          "error": f"Traceback\n  {ALIEN}\nValueError: a | b {ALIEN}"}


# ---- statistics


def test_a_mean_has_students_interval_and_what_is_not_finite_is_counted():
    values = [19.0, 19.5, 18.8, 19.4]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    found = statistics.estimate([*values, math.nan, math.inf])
    assert found.mean == pytest.approx(np.mean(values)) and found.half == pytest.approx((high - low) / 2)
    assert (found.count, found.lost) == (4, 2)
    assert statistics.estimate([1.0, 2.0]) == statistics.Estimate(1.5, None, 2)
    assert statistics.estimate([math.inf]) == statistics.Estimate(None, None, 0, 1)


def test_differences_are_of_the_seeds_that_both_have_and_tested_in_pairs():
    one, base = {0: 20.1, 1: 20.5, 2: 19.9, 7: 3.0}, {2: 18.8, 0: 19.0, 1: 19.5, 9: 50.0}
    found = statistics.difference(one, base)
    test = stats.ttest_rel([one[seed] for seed in (0, 1, 2)], [base[seed] for seed in (0, 1, 2)])
    assert found.p == pytest.approx(test.pvalue) and found.estimate.count == 3
    low, high = test.confidence_interval(0.95)
    assert found.estimate.mean - found.estimate.half == pytest.approx(low)
    assert found.estimate.mean + found.estimate.half == pytest.approx(high)


def test_holms_correction_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0] and statistics.holm([]) == []


@pytest.mark.parametrize("metric, sign", [
    ("psnr", 1), ("lpips_vgg", -1), ("rfid", -1), ("fd_resnet10t", -1), ("fd_precision", 1), ("usage", 1), ("perplexity", 0),
    ("bits_per_token", 0), ("codes/usage", 0)])
def test_a_metric_has_the_direction_that_the_evaluation_gives_it_or_none(metric, sign):
    assert statistics.direction(metric) == sign
    far = {"one": statistics.difference(dict(enumerate([5.0, 5.1, 5.2])), dict(enumerate([1.0, 1.11, 1.2])))}
    assert statistics.judged(far, metric)["one"].verdict == {1: "better", -1: "worse", 0: None}[sign]


def test_a_difference_without_spread_is_no_verdict_and_none_at_all_is_within_noise():
    base = {0: 0.1, 1: 0.2, 2: 0.3}
    higher = statistics.difference({seed: value + 0.7 for seed, value in base.items()}, base)
    constant = statistics.judged({"one": higher}, "usage")["one"]
    assert constant.p is None and constant.verdict is None and constant.said == statistics.CONSTANT
    assert constant.estimate.mean == pytest.approx(0.7) and constant.estimate.half == 0
    assert statistics.judged({"one": statistics.difference(base, dict(base))}, "usage")["one"].verdict == "within noise"


def test_correction_for_many_variants_can_turn_a_verdict():
    base = dict(enumerate([1.0, 2.0, 3.0, 4.0]))
    near = statistics.difference(dict(enumerate([1.5, 2.9, 3.2, 5.1])), base)
    assert 0.025 < near.p < 0.05
    noise = statistics.difference(dict(enumerate([1.5, 1.5, 3.5, 3.6])), base)
    assert statistics.judged({"near": near}, "psnr")["near"].verdict == "better"
    both = statistics.judged({"near": near, "noise": noise}, "psnr")
    assert [both[name].verdict for name in both] == ["within noise"] * 2


def test_dominated_is_only_what_is_behind_outside_the_noise():
    quality = {name: dict(enumerate(values)) for name, values in QUALITY.items()}
    cost = {"vq": 2.0, "ema": 1.0, "simvq": 1.0, "broken": 0.5}
    assert statistics.dominated(quality, cost, "psnr") == {"vq"}  # simvq's mean is lower than ema's, within noise
    assert statistics.dominated(quality, cost | {"ema": 3.0}, "psnr") == set()


# ---- tables


def table_of(suite, rows, place=0):
    table = tables.measured(suite, rows, {})[place]
    return {line[0]: dict(zip(table.head, line, strict=True)) for line in table.rows}, " ".join(table.notes)


def test_a_table_says_better_only_outside_the_noise_and_nothing_of_two_pairs():
    lines, notes = table_of(make_suite(), [*make_rows(), failed_row(ALIEN, 2)])
    assert {name: line["verdict"] for name, line in lines.items()} == {
        "vq": "baseline", "ema": "better", "simvq": "within noise", "broken": "2 pairs of seeds", ALIEN: "2 pairs of seeds"}
    assert lines["vq"]["PSNR ↑"] == "19.10 ± 0.90 dB" and lines["ema"]["difference to vq"] == "+1.07 ± 0.14 dB"
    assert lines["broken"]["PSNR ↑"] == "17.20 dB * †" and "PSNR of broken 1 of 3" in notes
    assert lines[ALIEN]["seeds"] == "2 (1 failed)" and lines["vq"]["usage ↑"] == "50.0%"
    assert "rFID ↓" not in lines["vq"]  # which no row has


@pytest.mark.parametrize("name, found, decimals, text", [
    ("usage", statistics.Estimate(0.1034, 0.0123, 3), 1, "10.3 ± 1.2%"),
    ("perplexity", statistics.Estimate(1577.3, 36.2, 3), 0, "1,577 ± 36"),
    ("psnr", statistics.Estimate(-0.5, 0.001, 3), 2, "−0.50 ± <0.01 dB"),
    ("bits_per_token", statistics.Estimate(13.97, 0.0, 3), None, "13.97 bits"),
    ("ssim", statistics.Estimate(None, None, 0), 2, "–"),
])
def test_values_are_written_as_an_evaluation_writes_them(name, found, decimals, text):
    assert tables.number(name, found, decimals) == text


def test_decimals_follow_the_smallest_interval_up_to_the_metrics_own():
    assert tables.digits("psnr", [0.3, 0.00001, 0.0, None]) == 2 and tables.digits("psnr", [3.0]) == 1
    assert tables.digits("usage", [0.024]) == 1 and tables.digits("perplexity", [36.0]) == 0
    assert tables.digits("psnr", [None]) is None


def test_a_table_that_claims_a_match_is_checked_against_its_rows():
    suite = make_suite(groups={"codes": GroupConfig([*QUALITY], "codebook_size"),
                               "bits": GroupConfig(["vq", "ema"], "bits_per_token")})
    rows = make_rows()
    assert "Alike in codebook size: 1,024." in table_of(suite, rows)[1]
    for row in rows:
        if row["variant"] == "ema":
            row["values"]["bits_per_token"] = 40.0
    notes = table_of(suite, rows, 1)[1]
    assert "Not alike in bits per token: ema 40 bits; the others 10 bits." in notes and "Alike in bits" not in notes
    same = make_suite(groups={"codes": GroupConfig([*QUALITY], "codebook_size"),
                              "bits": GroupConfig([*QUALITY], "bits_per_token")})
    notes = table_of(same, rows)[1]  # one table, and both claims are checked
    assert "Alike in codebook size: 1,024." in notes and "Not alike in bits per token: ema 40 bits" in notes


def test_networks_that_began_differently_are_said_and_no_common_start_is_claimed():
    rows = make_rows()
    said = report.content(make_suite(), rows, None, [])
    assert not said.warnings and any("same encoder and decoder" in line for line in said.method)
    for row in rows:
        if row["variant"] == "ema":
            row["initial_network"] = "another"
    said = report.content(make_suite(), rows, None, [])
    assert "decoder of ema had other" in said.warnings[0] and not any("same encoder" in line for line in said.method)


def test_each_point_of_an_axis_has_its_table_and_its_own_pairs():
    suite = make_suite(variants=["vq", "ema"], axis="codes", points={"256": {}, "1024": {}})
    rows = make_rows({"vq": QUALITY["vq"], "ema": QUALITY["ema"]}, point="256") + make_rows(
        {"vq": QUALITY["ema"], "ema": QUALITY["simvq"]}, point="1024")
    found = tables.measured(suite, rows, {})
    assert [table.title for table in found] == ["codes 256", "codes 1024"]
    assert [table_of(suite, rows, place)[0]["ema"]["verdict"] for place in (0, 1)] == ["better", "within noise"]
    drawn = {figure.name: figure for figure in figures.draw(suite, rows, None)}
    assert {"along_the_axis", "curve_codes_usage"} == drawn.keys()  # all have the same bits, so there is no figure against them
    assert "codes 1024" in drawn["curve_codes_usage"].svg


# ---- mixtures


@pytest.mark.parametrize("change, key", [
    ({"hardware": {"device": "cpu", "threads": 4}}, "hardware threads"), ({"versions": {"torch": "2.7"}}, "version of torch"),
    ({"budget": {"epochs": 7, "epoch_steps": 100}}, "budget"), ({"budget": {"seconds": 9.0}}, "budget"),
    ({"card": {"protocol": "simvq"}}, "protocol"), ({"card": {"resolution": [128, 128]}}, "resolution"),
    ({"card": {"images": 8}}, "images"), ({"card": {"data": "photos/val", "fingerprint": "cd"}}, "data")])
def test_rows_that_cannot_be_compared_are_refused_unless_mixed_and_then_marked(change, key):
    rows = make_rows()
    assert report.check_mixture([*rows, failed_row("vq", 0) | {"versions": {"torch": "1"}}]) == []
    rows[4] |= change
    with pytest.raises(UserError, match=rf"differ in {key}.*ema seed 1.*--mixed"):
        report.check_mixture(rows)
    assert report.check_mixture(rows, mixed=True) == [key]
    text = report.terminal(report.content(make_suite(), rows, None, [key]))
    assert f"Not comparable: the rows differ in {key}." in text
    assert "better" not in text and "within noise" not in text
    head = next(line for line in text.splitlines() if "variant" in line)
    assert key in head and "verdict" not in head


def test_points_may_differ_in_data_but_not_in_hardware():
    rows = [make_row("vq", 0, {"psnr": 1.0}, point=point) for point in ("a", "b")]
    rows[1]["card"] = {**rows[1]["card"], "resolution": [128, 128]}
    assert report.check_mixture(rows) == []
    rows[1]["hardware"] = {"device": "another"}
    with pytest.raises(UserError, match="hardware device.*vq @ a seed 0"):
        report.check_mixture(rows)


def test_a_budget_of_seconds_is_compared_as_seconds():
    rows = make_rows({"vq": [1.0]}, budget={"seconds": 60.0, "epoch_steps": 3, "epochs": 2}) + make_rows(
        {"ema": [1.0]}, budget={"seconds": 60.0, "epoch_steps": 9, "epochs": 2})
    assert report.check_mixture(rows) == []


# ---- what is written


class Page(HTMLParser):
    """Gather tags, attributes and text, and hold that elements close in order."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


SPEED = {"hardware": {"device": "cpu", "threads": 1}, "baseline": "vq", "variants": {
    "vq": {"ms": 1.0, "ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0, "bytes": 2**20}, "vq again": {"ms": 1.0, "ratio": 1.0},
    "ema": {"ms": 2.0, "ratio": 2.0, "ratio_low": 1.8, "ratio_high": 2.2, "bytes": None}, "simvq": {"failed": "out of\nluck"}}}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    rows = [*make_rows(missing={"rfid": f"no weights {ALIEN}"}), failed_row(ALIEN, 2)]
    originals = np.random.default_rng(0).integers(0, 256, (8, 32, 3), dtype=np.uint8)
    for row in rows:
        row["values"]["bits_per_token"] = 12.0 if row["variant"] == "simvq" else 10.0
        if row["variant"] in ("vq", "ema", "simvq"):
            folder = out / row["folder"] / "run"
            folder.mkdir(parents=True)
            above = 255 - originals if row["variant"] == "simvq" else originals
            Image.fromarray(np.concatenate([above, originals // 2])).save(folder / "reconstructions.png")
    suite = make_suite()
    suite.quick = "half of the steps"
    text = report.write(suite, rows, SPEED, out)
    return out, text, (suite, rows)


def test_the_page_needs_nothing_from_elsewhere_and_holds_what_it_should(written):
    out, _, _ = written
    text = (out / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and not [a for a in page.attributes if a[1].startswith("on")]
    assert all(value.startswith("data:image/png;base64,") for _, name, value in page.attributes if name == "src")
    assert all(value.startswith("#") for _, name, value in page.attributes if name in ("href", "xlink:href"))
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*[\"']?([^)]*)", text)) and "@import" not in text
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and {value[1:] for _, name, value in page.attributes if name == "href"} <= set(ids)
    assert page.tags.count("svg") == page.tags.count("figure") == page.tags.count("figcaption") == 3
    assert page.tags.count("img") == 5 and all(value for tag, name, value in page.attributes if tag == "img" and name == "alt")
    assert {"title", "caption", "details", "main"} <= set(page.tags)
    assert page.tags.count("th") == sum(name == "scope" for tag, name, _ in page.attributes if tag == "th")
    assert ALIEN in page.text and "<b>" not in text.split("</header>")[0] and "within noise" in page.text
    assert "simvq was shown other images than those above" in page.text and "no picture" in page.text
    assert "Short form of the suite: half of the steps" in page.text and f"rFID: no weights {ALIEN}" in page.text


def test_markdown_shows_text_as_it_is_and_links_to_files_that_exist(written):
    out, text, _ = written
    markdown = (out / "report.md").read_text()
    prose = [line for line in markdown.splitlines() if not line.startswith("    ")]
    assert not any("<script" in line for line in prose)
    assert rf"ValueError: a \| b {ALIEN.replace('<', '&lt;').replace('>', '&gt;')}" in markdown
    assert f"      {ALIEN}" in markdown  # the error whole, indented, and so not markup
    links = re.findall(r"\]\((\S+)\)", markdown)
    assert len(links) == 4 and all((out / link).stat().st_size for link in links)
    first = [line for line in markdown.split("### ")[0].splitlines() if line.startswith("|")]
    assert len(first) == 7 and {len(re.findall(r"(?<!\\)\|", line)) for line in first} == {8}
    assert "ema" in text and "failed: " in text and "missing: rFID" in text and "vq again" in text


def test_a_report_is_the_same_when_written_again(written, tmp_path):
    out, _, (suite, rows) = written
    before = (out / "report.html").read_bytes(), (out / "report.md").read_bytes()
    report.write(suite, rows, SPEED, out)
    assert before == ((out / "report.html").read_bytes(), (out / "report.md").read_bytes())


def test_reports_come_without_matplotlib_and_say_what_to_install(written, tmp_path, monkeypatch):
    _, _, (suite, rows) = written
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = report.write(suite, rows, None, tmp_path)
    assert "pip install 'vqzoo[bench]'" in text and "vqzoo[bench]" in (tmp_path / "report.html").read_text()
    assert Page((tmp_path / "report.html").read_text()).tags.count("svg") == 0


def test_rows_of_which_none_finished_are_reported_as_failures(tmp_path):
    text = report.write(make_suite(variants=["vq", "ema"]), [failed_row("vq", 0), failed_row("ema", 0)], {}, tmp_path)
    assert text.count("failed: ") == 2 and "0 (1 failed, 2 not run)" in text and "0 pairs of seeds" in text
    assert "ValueError: a | b" in text


def test_variants_and_points_that_the_suite_does_not_run_now_are_reported_too(tmp_path):
    suite = make_suite(variants=["vq"])
    text = report.write(suite, make_rows({"vq": QUALITY["vq"], "ema": QUALITY["ema"]}), None, tmp_path)
    assert "better" in text and list(suite.variants) == ["vq"]


def test_a_cell_counts_once_and_two_results_of_it_are_refused(tmp_path):
    suite, rows = make_suite(variants=["vq"]), make_rows({"vq": QUALITY["vq"]})
    assert report.write(suite, [*rows, failed_row("vq", 0)], None, tmp_path) == report.write(suite, rows, None, tmp_path)
    with pytest.raises(UserError, match="vq seed 0: there are two results"):
        report.write(suite, [*rows, make_row("vq", 0, {"psnr": 1.0})], None, tmp_path)


def test_what_steers_a_terminal_is_not_passed_on(tmp_path):
    row = failed_row("vq", 0) | {"error": "\x1b[31mred\x07 \udc80"}
    assert "\x1b" not in report.write(make_suite(variants=["vq"]), [row], None, tmp_path)
    assert "red" in (tmp_path / "report.md").read_text()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine to open the page in")
def test_a_browser_opens_the_page_and_draws_it(written, tmp_path):
    out, _, _ = written
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-quic",
             "--no-first-run", "--disable-component-update", "--disable-sync", "--window-size=400,900",
             f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([BROWSER, *quiet, f"--screenshot={tmp_path / 'page.png'}", "--dump-dom",
                           (out / "report.html").resolve().as_uri()], capture_output=True, text=True, timeout=120)
    page = Page(done.stdout)
    assert done.returncode == 0 and page.tags.count("svg") == 3 and "script" not in page.tags and ALIEN in page.text
    with Image.open(tmp_path / "page.png") as picture:
        colours = picture.convert("RGB").getcolors(2**20)
    assert picture.width == 400 and len(colours) > 50
