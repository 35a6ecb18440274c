"""The documentation is true: every block runs, every output is what came, every hook has text, arguments and an example."""

import functools
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from PIL import Image

from vqzoo import UserError, cli, hookspecs, sources
from vqzoo.bench.suite import load_suite
from vqzoo.recipe import load_recipe
from vqzoo.testing import Subject
from vqzoo.testing.suite import concerned, run_checks

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))

MARK = re.compile(r"# (?P<file>\S+\.(py|yaml))(: in the place of its last (?P<lines>\d+) lines)?\n")
"""The first line of a block that is a file, or that replaces the end of one."""

SMALL = {
    "vqzoo run": ["epochs=2", "epoch_steps=2", "data.batch_size=4", "data.workers=0", "optim.warmup_steps=1"],
    "vqzoo run quickstart": ["epochs=1", "stages=[{name: train}]", "data.resolution=[32, 32]", "decoder.args.width=16"],
    "vqzoo check-plugin": ["--only", "docstring_has_a_summary", "--only", "refresh_takes_any_counts"],
}
"""What is added to commands, so that they take no time."""

SLOW = ("processes_stay_equal", "compiled_networks_train_alike", "a_run_goes_on_bit_for_bit", "it_works_beside_other_plugins",
        "memory_stays_flat")
"""The checks that take longest, which examples pass as well, but not here."""

NUMBER = r"-?\d[\d,.]*(e-?\d+)?"

sys.path.insert(0, str(DOCS))  # as for the script
spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
generate = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = generate
spec.loader.exec_module(generate)

tables = sys.modules["tables"]

EXAMPLES = generate.examples()


def blocks(page):
    """Return a page's blocks as (language, content, line)."""
    text = page.read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(match[1], match[2], text.count("\n", 0, match.start()) + 1) for match in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_block_that_nothing_runs_is_the_output_of_commands(page):
    languages = [language for language, _, _ in blocks(page)]
    assert page.read_text().count("```") == 2 * len(languages)
    assert set(languages) <= {"python", "yaml", "sh", "text"}
    assert all(languages[number - 1] == "sh" for number, language in enumerate(languages) if language == "text")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_the_documentation_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        target = DOCS / path if path else page
        assert target.exists(), path
        headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE) if anchor else []
        assert not anchor or anchor in headings, f"{path}#{anchor}"


def test_the_index_has_every_page():
    index = (DOCS / "README.md").read_text()
    assert all(f"]({page.name})" in index for page in PAGES if page.name != "README.md")


# ---- what is written from the code


def test_the_generated_pages_are_up_to_date():
    for path, text in generate.pages().items():
        assert path.read_text() == text, f"{path.name} is not what the code says: make docs"


def test_make_docs_is_what_writes_them():
    assert re.search(r"^docs: .*\n\t\.venv/bin/python docs/generate.py$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("hook", sources.SPECS)
def test_a_hook_has_its_text_its_arguments_and_an_example(hook):
    section = (DOCS / "hooks.md").read_text().split(f"\n## {hook}\n")[1].split("\n## ")[0]
    assert f"`{hook}({', '.join(sources.SPECS[hook])})`" in section
    assert getattr(hookspecs, hook).__doc__.split("\n")[0] in section
    assert set(sources.SPECS[hook]) <= set(generate.ARGUMENTS)
    assert [example.name for example in EXAMPLES if hook in example.hooks and f"examples/{example.name}.py" in section]


def test_no_argument_is_explained_that_no_hook_gives():
    assert set(generate.ARGUMENTS) == {name for arguments in sources.SPECS.values() for name in arguments}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_shows_the_hooks_that_it_says_and_keeps_the_contract(example, monkeypatch):
    monkeypatch.setattr(sources, "entry_points", functools.cache(entry_points))
    with sources.also(files=[str(example.path)]):
        subject = Subject(example.name)
        assert set(example.hooks) <= set(subject.offered)
        names = [one.name for one in concerned(subject) if one.name not in SLOW]
        failed = [str(result) for result in run_checks(subject, {}, names) if result.outcome not in ("ok", "skipped")]
    assert not failed


# ---- the README's tables, from the files of results


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Return a copy of the folder of results that tables are made of."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    return shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.png"))


def change(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def test_a_number_of_the_readme_that_was_changed_by_hand_is_stale():
    readme = (ROOT / "README.md").read_text()
    assert generate.pages()[ROOT / "README.md"] == readme
    for number in ("19.14 dB", "10.3 ± 2.3%", "18.65", "545 pairs", "11.30 ms", "166.24 ms", "168", "2.39"):
        assert tables.rendered(readme.replace(number, "9", 1)) == readme, number


def test_each_table_has_its_mark_and_its_lines_are_not_too_long():
    readme = (ROOT / "README.md").read_text()
    assert sorted(re.findall("<!-- table: (.*) -->", readme)) == sorted(tables.TABLES)
    assert readme.count("<!-- end -->") == len(tables.TABLES)
    for name, render in tables.TABLES.items():
        assert all(len(line) <= 140 for line in render().splitlines() if not line.startswith("|")), name


@pytest.mark.parametrize(("text", "said"), [
    ("<!-- table: nothing -->\n<!-- end -->", "'nothing'; it has quantizers"),
    ("<!-- table: photos128 -->\n", "<!-- table: photos128 --> has no <!-- end -->"),
    ("<!-- table: photos128 -->\n<!-- table: compose -->\n<!-- end -->", "<!-- table: photos128 --> has no <!-- end -->"),
])
def test_a_mark_without_a_table_or_an_end_is_an_error_that_names_it(text, said):
    with pytest.raises(UserError, match=re.escape(said)):
        tables.rendered(text)


def test_a_file_that_is_missing_or_broken_is_an_error_that_names_it(results):
    file = results / "2026-11-23_photos128_cpu.jsonl"
    file.write_text("{")
    with pytest.raises(UserError, match=f"{file.name}: cannot be read"):
        tables.rendered("<!-- table: photos128 --><!-- end -->")
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name}: no such file"):
        tables.rendered("<!-- table: photos128 --><!-- end -->")


@pytest.mark.parametrize(("name", "file", "old", "new", "shown"), [
    ("photos128", "2026-11-23_photos128_cpu", '"psnr": 19.1413280044319', '"psnr": 12.345', "| 12.35 dB |"),
    ("ablation", "2026-11-23_ablation_cpu", '"perplexity": 94.62822723388672', '"perplexity": 394.6', "182 ± 184 |"),
    ("protocols", "2026-11-24_protocols_cpu", '"ssim": 0.43761049549351316', '"ssim": 0.1234', "| 0.123 |"),
    ("compose", "2026-11-26_compose_cpu", '"trains": 451', '"trains": 450', " 450 train "),
    ("kernels", "2026-11-26_kernels_time_h200", '"wrong": 87', '"wrong": 1234', "| 1,234 |"),
    ("kernels_sizes", "2026-11-26_kernels_time_h200", '"ms": 1.9192479848861694', '"ms": 3.0', "3.00 ms (3.0)"),
    ("kernels_check", "2026-11-26_kernels_check_h200", '"passed": true', '"passed": false', "1 failed"),
    ("literature", "literature", '"rfid": 3.74', '"rfid": 3.75', "| 3.75 |"),
])
def test_a_number_of_a_table_is_the_files(name, file, old, new, shown, results):
    assert shown not in " ".join(tables.TABLES[name]().split())
    change(results / f"{file}.jsonl", old, new)
    assert shown in " ".join(tables.TABLES[name]().split())


def test_published_and_measured_numbers_never_share_a_column(results):
    before = tables.literature().splitlines()
    own = {"recipe": "paper/table1_nsvq", "data": "ImageNet 128x128", "metrics": {"codebook_size": 65536, "rfid": 2.5}}
    others = [{**own, "recipe": "photos128_nsvq"}, {**own, "data": "photos128"}, {**own, "metrics": {"codebook_size": 8192}}]
    (results / "2027-01-01_ours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (own, *others)))
    after = tables.literature().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert changed == [(old, old.replace("not yet", "rfid 2.500")) for old, _ in changed] and len(changed) == 1
    assert changed[0][0].startswith("| NSVQ |") and before[2].split("|")[4].strip() == "published rFID"


def cells(variant, psnr, **more):
    """Return the rows of a variant of the suite `quantizers`, one for each value of PSNR."""
    return [{"suite": "quantizers", "variant": variant, "point": None, "seed": seed, "status": "finished",
             "values": {"psnr": value, "usage": 0.5, "codebook_size": 1024}, **more} for seed, value in enumerate(psnr)]


def test_what_a_suite_measured_becomes_a_table_with_intervals_and_verdicts(results):
    (failed,) = cells("fsq", [0.0], status="failed", error="no")
    rows = [*cells("simvq", [22.0, 22.2, 22.1]), *cells("vq", [20.0, 20.3, 20.1]), *cells("mine", [20.1, 20.2, 20.1]), failed]
    (results / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = tables.suite("cells.jsonl", ["psnr", "usage"], "vq", "1,024 codes")()
    head, _, *lines = [line.strip("| ").split(" | ") for line in shown.splitlines() if line.startswith("|")]
    found = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    difference = next(name for name in head if name.endswith(" to vq"))
    assert list(found) == ["vq", "simvq", "fsq", "mine"] and "Alike in codebook size: 1,024." in shown
    assert found["vq"] == {"variant": "vq", "seeds": "3", "PSNR ↑": "20.13 ± 0.38 dB", "usage ↑": "50.0%", difference: "–",
                           "verdict": "baseline"}
    assert found["simvq"]["PSNR ↑"] == "22.10 ± 0.25 dB" and found["simvq"][difference].startswith("+1.9")
    assert [found[name]["verdict"] for name in ("simvq", "mine")] == ["better", "within noise"]
    assert "1 failed, 2 not run" in found["fsq"]["seeds"] and found["fsq"]["PSNR ↑"] == "–"


def test_what_a_suite_measured_under_several_conditions_or_without_its_baseline_is_no_table(results):
    rows = [*cells("vq", [20.0], card={"protocol": "vqzoo"}), *cells("simvq", [22.0], card={"protocol": "taming"})]
    (results / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="differ in protocol"):
        tables.suite("cells.jsonl", ["psnr"], "vq")()
    (results / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    with pytest.raises(UserError, match=r"cells\.jsonl: no row of the baseline 'simvq'"):
        tables.suite("cells.jsonl", ["psnr"], "simvq")()
    with pytest.raises(UserError, match="has no table 'wrong'; it has '1,024 codes, 10 bits per token"):
        tables.suite("cells.jsonl", ["psnr"], "vq", "wrong")()


# ---- what runs, last, since `tiny_runs` makes the checks above slow


class Reader:
    """Do what a page says, block by block, in a folder of its own."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.site, self.monkeypatch = folder / "reader", folder / "site", monkeypatch
        self.namespace = {"__name__": "__main__"}
        (self.folder / "kodak").mkdir(parents=True)
        for number in range(24):
            Image.new("RGB", (72, 64), (10 * number, 100, 50)).save(self.folder / "kodak" / f"{number:02}.png")
        (self.folder / "docs").symlink_to(DOCS)
        monkeypatch.setattr(sources, "entry_points", functools.cache(entry_points))
        monkeypatch.chdir(self.folder)
        monkeypatch.syspath_prepend(str(self.folder))

    def python(self, content):
        if not self.write(content):
            exec(compile(content, "a block of Python", "exec"), self.namespace)

    def yaml(self, content):
        name = self.write(content)
        assert name, "a recipe begins with the name of its file"
        with sources.also(files=[*map(str, self.folder.glob("*.py")), *(str(example.path) for example in EXAMPLES)]):
            (load_suite if "variants:" in content else load_recipe)(name)

    def write(self, content):
        """Write a block that is a file and return the file's name."""
        if not (mark := MARK.match(content)):
            return None
        path = Path(mark["file"])
        if mark["lines"]:
            kept = path.read_text().splitlines(keepends=True)[: -int(mark["lines"])]
            content = "".join(kept) + content[mark.end() :]
        if path.suffix == ".py":
            compile(content, str(path), "exec")
        path.write_text(content)
        return str(path)

    def sh(self, content, output):
        """Run the commands of a block; one may fail if its output says that it does."""
        came = io.StringIO()
        may_fail = re.search(r"^vqzoo: |^  FAILED ", output or "", flags=re.MULTILINE)
        for line in content.splitlines():
            words = shlex.split(line, comments=True)
            with self.monkeypatch.context() as patch, redirect_stdout(came), redirect_stderr(came):
                while "=" in words[0]:
                    patch.setenv(*words.pop(0).split("=", 1))
                status = getattr(self, f"do_{words[0]}")(words)
            assert not status or may_fail, f"{line}\n{came.getvalue()[-2000:]}"
        self.compare(output or "", came.getvalue())

    def do_vqzoo(self, words):
        added = [] if {"--only", "--list"} & set(words) else list(SMALL.get(" ".join(words[:2]), ()))
        recipe = Path(words[2]) if words[1] == "run" else None
        if recipe and (str(recipe) == "quickstart" or "extends: quickstart" in recipe.read_text()):
            added += SMALL["vqzoo run quickstart"]
        return cli.main([*words[1:], *added])

    def do_cd(self, words):
        self.monkeypatch.chdir(words[1])

    def do_cp(self, words):
        shutil.copy(words[1], words[2])

    def do_pip(self, words):
        assert words == ["pip", "install", "-e", ".[test]"]
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(self.site)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, "."], check=True, timeout=120)
        self.monkeypatch.syspath_prepend(str(self.site))
        self.monkeypatch.setattr(sources, "entry_points", functools.cache(entry_points))

    def do_pytest(self, words):
        environment = {**os.environ, "PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-k", "often or refresh"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        print(done.stdout, done.stderr)
        return done.returncode

    def compare(self, shown, output):
        """Require the lines shown, in their order, to be among those that came; … stands for anything, numbers vary."""
        came = iter(output.splitlines())
        for line in shown.splitlines():
            pattern = re.sub(NUMBER, lambda _: NUMBER, re.escape(line).replace("\\ ", " ").replace("…", ".*"))
            pattern = re.sub(" +", " +", pattern)
            if line.strip(" …"):
                assert any(re.fullmatch(pattern, found.rstrip()) for found in came), f"{line!r} is not in\n{output[-2000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, tiny_runs, cells_here, tmp_path, monkeypatch):
    reader, found = Reader(tmp_path, monkeypatch), blocks(page)
    assert found or page.stem in ("README", "names")
    for number, (language, content, line) in enumerate(found):
        following = found[number + 1][:2] if number + 1 < len(found) else ("", "")
        try:
            if language == "sh":
                reader.sh(content, following[1] if following[0] == "text" else None)
            elif language != "text":
                getattr(reader, language)(content)
        except Exception as error:
            raise AssertionError(f"{page.name}:{line}: {error}") from error
