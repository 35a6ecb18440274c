"""The house rules, checked: hooks are documented, called once and tested; imports point down; plugins stay plugins."""

import ast
import inspect
import json
import re
import subprocess
import sys
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

import vqzoo
import vqzoo.ops
from vqzoo import hookspecs
from vqzoo.manager import all_hooks, make_manager
from vqzoo.sources import available, offered_hooks

ROOT = Path(__file__).resolve().parent.parent
HOST = sorted((ROOT / "vqzoo").rglob("*.py"))
PLUGINS = sorted(path for path in (ROOT / "plugins").glob("*.py") if path.name != "__init__.py")
HOOKS = [hook.name for hook in all_hooks(make_manager({}))]

LAYERS = (
    "errors", "files", "weights", "lpips", "plugin", "codebook", "ops", "hookspecs", "caller", "sources", "manager", "answers",
    "instance", "networks",
    "features", "discriminators", "data", "evaluation", "recipe",
    "tokenizer", "monitor", "sharding", "pictures", "checkpoint", "folder", "interrupt", "stage", "guard", "tally", "state",
    "prepare", "memory", "trainer", "explain", "scoring", "doctor", "testing", "bench", "scaffold", "cli", "__main__",
)
"""The modules of vqzoo from the ground up: each imports only from those before it."""

PACKAGES = ("bench", "doctor", "evaluation", "ops", "testing")
"""Layers of several files, which import one another."""

FORBIDDEN = ("accelerate", "torch.distributed", "torch.nn.parallel", "vqzoo_plugins", "plugins", "pluggy")
"""What no plugin imports: processes are the host's business, and plugins never meet."""


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


@cache
def parse(path):
    return ast.parse(path.read_text())


def imports(path):
    """Return every import of a file, wherever it stands, as (module, name or None), relative ones resolved."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found += [(module, alias.name) for alias in node.names]
    return found


def inside(module, package):
    return module == package or module.startswith(package + ".")


def layers_used(path):
    """Return the modules of vqzoo that a file of vqzoo imports, by the first name below vqzoo."""
    for module, name in imports(path):
        if module == "vqzoo":
            yield name if name in LAYERS else "__init__"
        elif inside(module, "vqzoo"):
            yield module.split(".")[1]


def layer(path):
    return path.relative_to(ROOT / "vqzoo").with_suffix("").parts[0]


def calls(hook):
    """Return each call of a hook in the host, with its place: `hooks.NAME(…)` or `….hooks.NAME(…)`."""
    for path in HOST:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == hook:
                owner = node.func.value
                if getattr(owner, "id", getattr(owner, "attr", None)) in ("hooks", "hook"):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


# ---- hooks


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_says_what_to_return_or_do_and_when_it_is_called(hook):
    text = inspect.getdoc(getattr(hookspecs, hook))
    assert re.match(r"(Return|Choose|Change|Prepare) .+?\.(\s|$)", text, re.DOTALL), text
    assert re.search(r"\bCalled\b", text), f"{hook} does not say when it is called"


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_called_at_exactly_one_place_of_the_host(hook):
    assert len(list(calls(hook))) == 1, [place for place, _ in calls(hook)]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_given_every_argument_of_its_specification(hook):
    ((_, call),) = calls(hook)
    wanted = set(inspect.signature(getattr(hookspecs, hook)).parameters)
    assert not call.args and {keyword.arg for keyword in call.keywords} == wanted


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_named_in_a_test(hook):
    tests = [path for path in (ROOT / "tests").glob("test_*.py") if path != Path(__file__).resolve()]
    assert any(re.search(rf"\b{hook}\b", path.read_text()) for path in tests)


def test_every_public_function_of_hookspecs_is_a_hook_and_no_required_one_is_missing():
    functions = [node.name for node in parse(ROOT / "vqzoo" / "hookspecs.py").body if isinstance(node, ast.FunctionDef)]
    assert functions == HOOKS and set(hookspecs.REQUIRED) <= set(HOOKS)


# ---- imports


@by_name(HOST)
def test_the_host_never_imports_its_plugins(path):
    bad = [module for module, _ in imports(path) if inside(module, "vqzoo_plugins") or inside(module, "plugins")]
    assert not bad


@by_name([path for path in HOST if path.name != "__init__.py" or path.parent.name in PACKAGES])
def test_imports_of_the_host_point_down(path):
    own = layer(path)
    assert own in LAYERS, f"{own}: say in LAYERS where this module stands"
    used = set(layers_used(path)) - ({own} if own in PACKAGES else set())
    assert "__init__" not in used, "the host imports from its modules, not from the public face"
    above = {name for name in used if LAYERS.index(name) >= LAYERS.index(own)}
    assert not above, f"{own} imports {above}, which stand above it"


def test_the_layers_are_those_that_exist():
    assert set(LAYERS) == {layer(path) for path in HOST} - {"__init__"}


@by_name(PLUGINS)
def test_a_plugin_imports_public_names_and_third_parties_only(path):
    public = {"vqzoo": set(vqzoo.__all__), "vqzoo.ops": set(vqzoo.ops.__all__)}
    for module, name in imports(path):
        assert not any(inside(f"{module}.{name}" if name else module, package) for package in FORBIDDEN), module
        if inside(module, "vqzoo"):
            assert module in public and name in public[module], f"{module}.{name} is not public"


@by_name(PLUGINS)
def test_a_plugin_reaches_for_no_process_group_by_attribute(path):
    chains = {ast.unparse(node) for node in ast.walk(parse(path)) if isinstance(node, ast.Attribute)}
    assert not any(chain.startswith(("torch.distributed", "vqzoo.trainer")) for chain in chains)


@pytest.mark.parametrize("package", [vqzoo, vqzoo.ops])
def test_public_names_exist_and_are_sorted(package):
    assert all(hasattr(package, name) for name in package.__all__)
    assert sorted(package.__all__) == list(package.__all__)
    assert all(getattr(package, name).__doc__ for name in package.__all__ if name != "hookimpl")


HEAVY = ("timm", "accelerate", "torchvision", "torchmetrics", "skimage", "tensorboard", "omegaconf")


LIGHT = f"""
import sys
from vqzoo import cli
for arguments in ["--help"], ["run", "--help"], ["plugins"]:
    try:
        status = cli.main(arguments)
    except SystemExit as end:
        status = end.code
    print("RESULT", *arguments, status, *[name for name in {HEAVY!r} if name in sys.modules])
"""


def test_helping_and_listing_plugins_load_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert results == ["RESULT --help 0", "RESULT run --help 0", "RESULT plugins 0"]
    assert all(f"\n{path.stem}  (" in "\n" + done.stdout for path in PLUGINS)


# ---- plugins


@by_name(PLUGINS)
def test_a_plugin_is_one_short_file_with_one_class(path):
    name = path.stem
    assert len(path.read_text().splitlines()) < 150
    sources = available()
    assert name in sources and sources[name].module == f"vqzoo_plugins.{name}"
    kind = sources[name].load()
    classes = [node.name for node in parse(path).body if isinstance(node, ast.ClassDef)]
    assert classes.count(kind.__name__) == 1
    assert offered_hooks(kind).keys() <= set(HOOKS) and offered_hooks(kind)


@by_name(PLUGINS)
def test_a_plugin_can_be_listed_its_fields_have_defaults_and_it_can_be_made(path):
    kind = available()[path.stem].load()
    assert is_dataclass(kind.Config)
    config = asdict(kind.Config())
    assert json.loads(json.dumps(config)) == config
    made = kind(kind.Config())
    assert isinstance(made, vqzoo.Plugin) and isinstance(made.loss_names(), tuple)
    first = (kind.__doc__ or "").strip().splitlines()[0]
    assert 20 <= len(first) <= 150 and re.match(r"[\w -]+: .*", first), first
    assert inspect.getdoc(sys.modules[kind.__module__])


@by_name(PLUGINS)
def test_a_plugin_keeps_its_state_in_parameters_and_buffers(path):
    kind = available()[path.stem].load()
    made = kind(kind.Config())
    own = {name for name, value in vars(made).items() if not name.startswith("_")} - {"config", "training"}
    assert not own, f"{own} would not survive a checkpoint"
    assert all(isinstance(value, torch.Tensor) for value in made.state_dict().values())


def test_the_modules_of_the_package_are_the_built_in_plugins():
    names = {name for name, source in available().items() if source.module.startswith("vqzoo_plugins.")}
    assert names == {path.stem for path in PLUGINS}
    assert [node for node in parse(ROOT / "plugins" / "__init__.py").body if not isinstance(node, ast.Expr)] == []


# ---- files


SOURCES = [*HOST, *PLUGINS, *sorted((ROOT / "tests").glob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]


@by_name(SOURCES)
def test_a_file_is_named_after_its_concept(path):
    assert path.stem not in ("utils", "util", "helpers", "misc", "common")


@by_name([*HOST, *PLUGINS])
def test_a_file_begins_by_saying_what_it_is(path):
    assert ast.get_docstring(parse(path))


@by_name([*HOST, *PLUGINS])
def test_functions_stay_short(path):
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > 60}
    assert not long
