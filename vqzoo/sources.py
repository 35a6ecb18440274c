"""Finding plugins: what is installed, what is given by hand, and why some of it cannot be used."""

import difflib
import hashlib
import importlib
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, is_dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from vqzoo import hookspecs
from vqzoo.errors import UserError, suggestion
from vqzoo.plugin import CONTRACT, Plugin

GROUP = "vqzoo"

ALLOW, DENY = "VQZOO_ALLOW_PLUGINS", "VQZOO_DENY_PLUGINS"
"""Environment variables: patterns, separated by commas, of plugins' names or of their distributions'.

If the first is set, no other plugin is imported, and none if it is empty; what the second names is not imported in any case.
Names and patterns are compared as pip compares names: case, `-`, `_` and `.` make no difference.
"""

SPECS = {name: tuple(inspect.signature(value).parameters)
         for name, value in vars(hookspecs).items() if inspect.isfunction(value) and hasattr(value, "vqzoo_spec")}
"""The arguments of each hook, in the order of hookspecs.py."""

_given: "list[Source]" = []
"""What is given by hand, inside `also`."""


@dataclass(frozen=True)
class Source:
    """Say where a plugin comes from, without importing it: a module, or else a file or a class given by hand."""

    name: str
    module: str
    attribute: str
    distribution: str
    version: str
    given: Path | type[Plugin] | None = None

    @property
    def place(self) -> str:
        """Where the plugin comes from, in words."""
        return str(self.given) if isinstance(self.given, Path) else f"{self.distribution} {self.version}".strip()

    def load(self) -> type[Plugin]:
        """Import the module and return its plugin class; a UserError says whatever keeps it from being used."""
        kind = self.given if inspect.isclass(self.given) else self._class(self._import())
        if problem := misfit(kind):
            raise UserError(f"{self._said()}: {problem}")
        return kind

    def _import(self) -> ModuleType:
        try:
            return importlib.import_module(self.module) if self.given is None else _import_file(self.module, self.given)
        except ModuleNotFoundError as error:
            if error.name is None or f"{self.module}.".startswith(f"{error.name}."):
                raise UserError(f"{self._said()} cannot be imported: {error}") from error
            raise UserError(f"{self._said()} needs the module {error.name!r}, which is not installed; install what has it, "
                            "perhaps as an extra of that distribution") from error
        except SyntaxError as error:
            raise UserError(f"{self._said()} cannot be imported: {error.filename}:{error.lineno}: {error.msg}") from error
        except (Exception, SystemExit) as error:
            raise UserError(f"{self._said()} cannot be imported: {error!r}") from error

    def _class(self, module: ModuleType) -> type[Plugin]:
        if self.attribute:
            found = [getattr(module, self.attribute, None)]
        else:
            found = [x for x in vars(module).values() if inspect.isclass(x) and x.__module__ == module.__name__]
        classes = [x for x in found if inspect.isclass(x) and issubclass(x, Plugin)]
        if len(classes) != 1:
            where = "it" if isinstance(self.given, Path) else self.module
            raise UserError(f"{self._said()}: {where} must define one subclass of vqzoo.Plugin, and has {len(classes)}")
        return classes[0]

    def _said(self) -> str:
        return f"plugin {self.name!r} ({self.place})"


def _import_file(module: str, path: Path) -> ModuleType:
    """Import a file under a module's name that no other has, so that it hides nothing."""
    if module not in sys.modules:
        spec = spec_from_file_location(module, path, loader=_AsWritten(module, str(path)))
        sys.modules[module] = made = module_from_spec(spec)
        try:
            spec.loader.exec_module(made)
        except BaseException:
            del sys.modules[module]
            raise
    return sys.modules[module]


class _AsWritten(SourceFileLoader):
    """Load a file as it stands, never the bytecode beside it, which may be of what it was within the same second before."""

    def path_stats(self, path: str) -> dict[str, Any]:
        raise OSError("no bytecode is asked for")


# What fits


def misfit(kind: type[Plugin]) -> str | None:
    """Say why a plugin class does not fit this version of the contract; None if it does."""
    needed = str(kind.contract)
    if not re.fullmatch(r"\d+\.\d+", needed):
        return f"contract = {kind.contract!r} is no version of the contract, as {CONTRACT!r} is"
    (major, minor), (own_major, own_minor) = (tuple(map(int, version.split("."))) for version in (needed, CONTRACT))
    if (major, minor) > (own_major, own_minor):
        return f"needs version {needed} of the contract with plugins, and this vqzoo has {CONTRACT}; upgrade vqzoo"
    if major < own_major:
        return f"is made for version {needed} of the contract with plugins, and this vqzoo has {CONTRACT}; upgrade the plugin"
    if not is_dataclass(kind.Config):
        return "its Config is no dataclass; decorate it with @dataclass"
    problems = (_method_misfit(name, method) for name, method in inspect.getmembers(kind, inspect.isfunction))
    return next(filter(None, problems), None)


def _method_misfit(name: str, method: Any) -> str | None:
    """Say why a method is no implementation of a hook although it is meant to be one."""
    options = getattr(method, "vqzoo_impl", None)
    if options is None:
        named = name in SPECS
        return f"its method {name} has a hook's name; mark it with @hookimpl, or call it something else" if named else None
    hook = options["specname"] or name
    if hook not in SPECS:
        return f"it implements {hook!r}, and there is no such hook; {suggestion(hook, SPECS)}"
    first, *parameters = [*inspect.signature(method).parameters.values()] or [None]
    if first is None or first.name in SPECS[hook]:
        return f"its {hook} is a method, whose first argument is self"
    for parameter in parameters:
        if parameter.name not in SPECS[hook]:
            near = difflib.get_close_matches(parameter.name, SPECS[hook], n=1)
            return (f"its {hook} asks for {parameter.name!r}, which that hook does not give; "
                    f"{f'did you mean {near[0]!r}? ' if near else ''}arguments: {', '.join(SPECS[hook]) or 'none'}")
        if parameter.default is not parameter.empty:
            return f"the argument {parameter.name!r} of its {hook} has a default, and would always have that; take it away"
    if options["wrapper"] and not inspect.isgeneratorfunction(method):
        return f"its {hook} is marked as a wrapper and does not yield; write `result = yield`, or drop wrapper=True"
    return None


def offered_hooks(plugin: type[Plugin]) -> dict[str, str]:
    """Return the hooks that a plugin class implements, each with "provides", "yields" (trylast) or "wraps"."""
    offers = {}
    for name, member in inspect.getmembers(plugin, inspect.isfunction):
        options = getattr(member, "vqzoo_impl", None)
        if options:
            kind = "wraps" if options["wrapper"] else "yields" if options["trylast"] else "provides"
            offers[options["specname"] or name] = kind
    return offers


# What there is


def available() -> dict[str, Source]:
    """Return every plugin by name that can be told from the others and that the environment lets in, not yet imported.

    An entry point of group "vqzoo" names a class (`package.module:Class`), a module with one plugin class, or a package,
    each of whose modules is then a plugin. `refused` has the others.
    """
    return _census()[0]


def refused() -> dict[str, str]:
    """Return why there are plugins that may not be used, by name: the environment excludes one, or several have the name."""
    return _census()[1]


def _census() -> tuple[dict[str, Source], dict[str, str]]:
    admitted: dict[str, list[Source]] = {}
    reasons: dict[str, str] = {}
    for source in _installed():
        others = admitted.setdefault(source.name, [])
        if variable := _excluding(source):
            way = "add its name there" if variable == ALLOW else "take it off that list"
            reasons[source.name] = f"{variable}={os.environ[variable]!r} excludes it; if you trust it, {way}"
        elif (source.module, source.attribute) not in [(other.module, other.attribute) for other in others]:
            others.append(source)
    for name, sources in admitted.items():
        if len(sources) > 1:
            places = " and ".join(f"{source.module or source.attribute} of {source.place}" for source in sources)
            reasons[name] = f"several have this name: {places}; uninstall all but one, or name its distribution in {DENY}"
    return {name: sources[0] for name, sources in admitted.items() if len(sources) == 1}, reasons


def find(name: str) -> Source:
    """Return the plugin of that name; a UserError with the nearest choice, or with what keeps it out, otherwise."""
    sources, reasons = _census()
    if name in sources:
        return sources[name]
    if name in reasons:
        raise UserError(f"plugins.{name}: {name!r} is installed, but {reasons[name]}")
    raise UserError(f"plugins.{name}: no installed plugin is called {name!r}; one in a file of yours is given by --plugin-file "
                    f"{name}.py, a third party's is installed with pip (often as vqzoo-{name}); {suggestion(name, sources)}")


def offering(hook: str) -> list[str]:
    """Return the names of the available plugins that provide a hook; one that cannot be imported offers nothing."""
    def offers(source: Source) -> bool:
        try:
            return offered_hooks(source.load()).get(hook) in ("provides", "yields")
        except UserError:
            return False

    return [name for name, source in available().items() if offers(source)]


@contextmanager
def also(files: Iterable[str] = (), classes: Mapping[str, type[Plugin]] | None = None) -> Iterator[None]:
    """Make plugins available inside this block that are not installed: files, each under its stem, and classes.

    Only who runs a program says so; a recipe never does.
    """
    before = len(_given)
    try:
        _given.extend(_from_file(file) for file in files)
        _given.extend(Source(name, kind.__module__, kind.__qualname__, "a class given by hand", "", kind)
                      for name, kind in (classes or {}).items())
        yield
    finally:
        del _given[before:]


def _from_file(file: str) -> Source:
    path = Path(file).resolve()
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise UserError(f"--plugin-file: {file!r}: the plugin has the name of its file, which must be one of a Python module, "
                        "such as my_vq.py")
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise UserError(f"--plugin-file: {file!r} cannot be read: {error.strerror}") from error
    return Source(path.stem, f"vqzoo_plugin_file_{digest}_{path.stem}", "", path.name, digest, path)


def _installed() -> Iterator[Source]:
    """Yield every plugin, what is given by hand included."""
    folders = tuple((folder, os.stat(folder).st_mtime_ns) for folder in sys.path if os.path.isdir(folder))
    for entry in _entries(entry_points, folders):
        yield from _sources(entry)
    yield from _given


@lru_cache(maxsize=1)
def _entries(find: Callable, folders: tuple[tuple[str, int], ...]) -> list[EntryPoint]:
    """Return the entry points; found once, since that reads every installed distribution, and again if one has come or gone."""
    return sorted(find(group=GROUP), key=lambda entry: (entry.name, entry.value))


def _excluding(source: Source) -> str:
    names = [_canonical(source.name), _canonical(source.distribution)]

    def lists(variable: str) -> bool:
        patterns = [_canonical(pattern.strip()) for pattern in os.environ.get(variable, "").split(",")]
        return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)

    if lists(DENY):
        return DENY
    return ALLOW if ALLOW in os.environ and not lists(ALLOW) else ""


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _sources(entry: EntryPoint) -> list[Source]:
    where = ("unknown", "")
    with suppress(Exception):  # metadata that are gone or damaged name nobody
        where = (entry.dist.name or "unknown", entry.dist.version or "")
    try:
        if entry.attr:
            return [Source(entry.name, entry.module, entry.attr, *where)]
        spec = _locate(entry.module)
    except AttributeError:  # its value names no module at all, and this is said when it is used
        return [Source(entry.name, entry.value, "", *where)]
    except Exception:  # whatever is wrong with one plugin is said when it is used
        spec = None
    if spec is None or spec.submodule_search_locations is None:
        return [Source(entry.name, entry.module, "", *where)]
    modules = sorted(m.name for m in pkgutil.iter_modules(spec.submodule_search_locations))
    return [Source(name, f"{entry.module}.{name}", "", *where) for name in modules if not name.startswith("_")]


def _locate(module: str) -> ModuleSpec | None:
    """Find a module without importing the packages around it, as importlib's find_spec would."""
    package, *inner = module.split(".")
    spec = find_spec(package)
    for name in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        package = f"{package}.{name}"
        spec = PathFinder.find_spec(package, spec.submodule_search_locations)
    return spec
