"""Finding plugins, and binding the hooks of a stage to the plugins that serve them."""

import importlib
import inspect
import os
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import pluggy
from pluggy import HookImpl

from vqzoo import hookspecs
from vqzoo.caller import Caller, is_one, kind_of, served_by, wraps
from vqzoo.errors import PluginError, UserError, suggestion
from vqzoo.hookspecs import REQUIRED
from vqzoo.plugin import Plugin

GROUP = "vqzoo"

ALLOW, DENY = "VQZOO_ALLOW_PLUGINS", "VQZOO_DENY_PLUGINS"
"""Environment variables: patterns, separated by commas, of plugins' names or of their distributions'.

If the first is set, no other plugin is imported, and none if it is empty; what the second names is not imported in any case.
Names and patterns are compared as pip compares names: case, `-`, `_` and `.` make no difference.
"""


@dataclass(frozen=True)
class Source:
    """Say where a plugin comes from, without importing it."""

    name: str
    module: str
    attribute: str
    distribution: str
    version: str

    def load(self) -> type[Plugin]:
        """Import the module and return its plugin class."""
        try:
            module = importlib.import_module(self.module)
        except Exception as error:
            raise UserError(f"plugin {self.name!r} ({self.distribution}) cannot be imported: {error!r}") from error
        if self.attribute:
            found = [getattr(module, self.attribute, None)]
        else:
            found = [x for x in vars(module).values() if inspect.isclass(x) and x.__module__ == module.__name__]
        classes = [x for x in found if inspect.isclass(x) and issubclass(x, Plugin)]
        if len(classes) != 1:
            raise UserError(
                f"plugin {self.name!r} ({self.distribution}): {self.module} must define one subclass of vqzoo.Plugin, "
                f"and has {len(classes)}"
            )
        return classes[0]


def available() -> dict[str, Source]:
    """Return every installed plugin by name that the environment lets in, found by entry point and not yet imported.

    An entry point of group "vqzoo" names a class (`package.module:Class`), a module with one plugin class, or a package,
    each of whose modules is then a plugin. Two plugins of one name are a UserError.
    """
    sources: dict[str, Source] = {}
    for source, variable in _installed():
        if variable:
            continue
        other = sources.setdefault(source.name, source)
        if (other.module, other.attribute) != (source.module, source.attribute):
            raise UserError(
                f"two installed plugins are called {source.name!r}: {other.module} of {other.distribution} and "
                f"{source.module} of {source.distribution}; uninstall one, or name its distribution in {DENY}"
            )
    return sources


def excluded() -> dict[str, str]:
    """Return the installed plugins that the environment shuts out, by name, each with the variable that does it."""
    return {source.name: variable for source, variable in _installed() if variable}


def _installed() -> Iterator[tuple[Source, str]]:
    """Yield every installed plugin and the variable that excludes it, if one does."""
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        for source in _sources(entry):
            yield source, _excluding(source)


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
    where = (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "")
    if entry.attr:
        return [Source(entry.name, entry.module, entry.attr, *where)]
    try:
        spec = _locate(entry.module)
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


def find(name: str) -> Source:
    """Return the installed plugin of that name; a UserError with the nearest choice, or with what excludes it, otherwise."""
    sources = available()
    if name in sources:
        return sources[name]
    if variable := excluded().get(name):
        raise UserError(
            f"plugins.{name}: {name!r} is installed, but {variable}={os.environ[variable]!r} excludes it; if you trust it, "
            f"{'add its name there' if variable == ALLOW else 'take it off that list'}, else take it out of the recipe"
        )
    raise UserError(
        f"plugins.{name}: no installed plugin is called {name!r}; {suggestion(name, sources)}; "
        f"a third party's is installed with pip (often as vqzoo-{name})"
    )


def make_manager(plugins: Mapping[str, Plugin]) -> pluggy.PluginManager:
    """Register a run's plugins, in such an order that the recipe's first is called first."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    for name in reversed(list(plugins)):
        try:
            manager.register(plugins[name], name=name)
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            hooks = [h.name for h in all_hooks(manager)]
            raise UserError(f"plugin {name!r} does not fit the hooks: {error}; hooks: {', '.join(hooks)}") from error
    return manager


def all_hooks(manager: pluggy.PluginManager) -> list[pluggy.HookCaller]:
    """Return the hooks in the order of hookspecs.py."""
    names = [n for n, value in vars(hookspecs).items() if inspect.isfunction(value) and hasattr(value, "vqzoo_spec")]
    return [getattr(manager.hook, name) for name in names]


class Hooks:
    """Hooks, each bound to who serves it: all of them for a stage of training, or those that `serve` names.

    `routing` maps a hook's name to the plugins that may serve it, wrappers included; `keys` says where in the recipe that
    stands, if not under `hooks`. Raises UserError, naming the key, for an unknown hook or plugin, two rivals, and a
    `required` hook that nobody serves. A hook outside `serve` is bound to nobody.
    """

    def __init__(
        self,
        manager: pluggy.PluginManager,
        routing: Mapping[str, Iterable[str]],
        keys: Mapping[str, str] = MappingProxyType({}),
        serve: Iterable[str] | None = None,
        required: Iterable[str] = REQUIRED,
    ):
        self._callers: dict[str, Any] = {}
        self._bound: dict[str, list[HookImpl]] = {}
        hooks = {hook.name: hook for hook in all_hooks(manager)}
        order = [name for name, _ in manager.list_name_plugin()][::-1]
        for name in routing:
            if name not in hooks:
                raise UserError(f"{keys.get(name, f'hooks.{name}')}: there is no such hook; {suggestion(name, hooks)}")
        for name, hook in hooks.items():
            chosen = []
            if serve is None or name in serve:
                router = _Router(hook, keys.get(name, f"hooks.{name}"), order)
                chosen = router.choose(None if name not in routing else list(routing[name]), name in required)
            self._bound[name] = sorted(chosen, key=lambda impl: order.index(impl.plugin_name))
            self._callers[name] = Caller(manager, hook, self._bound[name])

    def providers(self, name: str) -> list[str]:
        """Return the names of the plugins bound to a hook, wrappers included, in the recipe's order."""
        return [impl.plugin_name for impl in self._bound[name]]

    def plugins(self, name: str) -> list[Plugin]:
        """Return the plugins bound to a hook."""
        return [impl.plugin for impl in self._bound[name]]

    def asks_for(self, name: str, argument: str) -> bool:
        """Tell whether any bound implementation of a hook names this argument."""
        return any(argument in impl.argnames for impl in self._bound[name])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._callers:
            raise AttributeError(name)
        return self._callers[name]

    def served(self, name: str, number: int | None = None) -> str:
        """Return the words with which an error begins: the hook, and who serves it.

        `number` counts the answers to a "many" hook from 0; its giver alone is named, unless a wrapper came between.
        """
        bound = self._bound[name]
        return served_by(name, bound if number is None or any(map(wraps, bound)) else bound[number : number + 1])

    def answer(self, name: str, value: Any, kind: type) -> Any:
        """Return what a "one" hook answered, or raise PluginError if it is not of that kind."""
        if isinstance(value, kind):
            return value
        raise PluginError(f"{self.served(name)}, returned {kind_of(value)} where {kind.__name__} is expected")


class _Router:
    """Decide who serves one hook."""

    def __init__(self, hook: pluggy.HookCaller, key: str, order: list[str]):
        self.hook, self.key, self.order = hook, key, order
        self.impls = {impl.plugin_name: impl for impl in hook.get_hookimpls()}
        self.single = is_one(hook)

    def choose(self, routed: list[str] | None, required: bool) -> list[HookImpl]:
        impls = list(self.impls.values()) if routed is None else [self._named(name) for name in routed]
        wrappers = [impl for impl in impls if wraps(impl)]
        providers = [impl for impl in impls if impl not in wrappers]
        if self.single and routed is None:
            providers = [impl for impl in providers if not impl.trylast] or providers
        if self.single and len(providers) > 1:
            raise UserError(f"{self.key}: {self._names(providers)} all offer {self.hook.name}; name one here, "
                            f"as in {self.key}=[{providers[0].plugin_name}]")
        if not providers and wrappers and (routed or required):
            raise UserError(f"{self.key}: {self._names(wrappers)} only wraps what another returns; {self._offers()}")
        if not providers and required and not (routed == [] and self.hook.name == "embedding_loss"):
            raise UserError(f"{self.key}: nobody serves {self.hook.name}; {self._offers()}")
        return providers + (wrappers if providers else [])

    def _named(self, name: str) -> HookImpl:
        if name not in self.order:
            raise UserError(f"{self.key}: {name!r} is not among this recipe's plugins; {suggestion(name, self.order)}")
        if name not in self.impls:
            raise UserError(f"{self.key}: {name!r} does not offer {self.hook.name}; {self._offers()}")
        return self.impls[name]

    def _names(self, impls: list[HookImpl]) -> str:
        return " and ".join(sorted((impl.plugin_name for impl in impls), key=self.order.index))

    def _offers(self) -> str:
        """Name who offers the hook: among the recipe's plugins, else among all that are installed."""
        here = [name for name, impl in self.impls.items() if not impl.wrapper]
        if here:
            return f"of this recipe's plugins these offer it: {', '.join(here)}"
        offers = [name for name, source in available().items() if _can_serve(source, self.hook.name)]
        return f"add one of these plugins, which offer it: {', '.join(offers) or 'none is installed'}"


def _can_serve(source: Source, hook: str) -> bool:
    try:
        return offered_hooks(source.load()).get(hook) in ("provides", "yields")
    except UserError:  # a plugin that cannot be imported must not hide the message about another
        return False


def offered_hooks(plugin: type[Plugin]) -> dict[str, str]:
    """Return the hooks that a plugin class implements, each with "provides", "yields" (trylast) or "wraps"."""
    offers = {}
    for name, member in inspect.getmembers(plugin, inspect.isfunction):
        options = getattr(member, "vqzoo_impl", None)
        if options:
            kind = "wraps" if options["wrapper"] else "yields" if options["trylast"] else "provides"
            offers[options["specname"] or name] = kind
    return offers
