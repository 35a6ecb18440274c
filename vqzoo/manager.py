"""Binding the hooks of a stage to the plugins that serve them."""

import inspect
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import pluggy
from pluggy import HookImpl

from vqzoo import hookspecs
from vqzoo.caller import Caller, is_one, kind_of, served_by, wraps
from vqzoo.errors import PluginError, UserError, suggestion
from vqzoo.hookspecs import DOORS, REQUIRED
from vqzoo.plugin import Plugin
from vqzoo.sources import GROUP, offering


class _Manager(pluggy.PluginManager):
    """Look for implementations among a class's marked methods alone; a module has hundreds of other attributes."""

    def __init__(self):
        super().__init__(GROUP)
        self._marked: dict[type, set[str]] = {}

    def parse_hookimpl_opts(self, plugin: Plugin, name: str) -> Any:
        kind = type(plugin)
        if kind not in self._marked:
            members = inspect.getmembers(kind, callable)
            self._marked[kind] = {found for found, member in members if hasattr(member, "vqzoo_impl")}
        return super().parse_hookimpl_opts(plugin, name) if name in self._marked[kind] else None


def make_manager(plugins: Mapping[str, Plugin]) -> pluggy.PluginManager:
    """Register a run's plugins, in such an order that the recipe's first is called first."""
    manager = _Manager()
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
    `required` hook that nobody serves, and a plugin's hook without its companions. A hook outside `serve` is bound to nobody,
    and no stage serves DOORS.
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
        served = set(hooks) - set(DOORS) if serve is None else set(serve)
        keys = {name: keys.get(name, f"hooks.{name}") for name in (*hooks, *routing)}
        for name in routing:
            if name not in hooks:
                raise UserError(f"{keys[name]}: there is no such hook; {suggestion(name, set(hooks) - set(DOORS))}")
            if name in DOORS:
                raise UserError(f"{keys[name]}: no stage asks this hook; its plugin is named in data.name or evaluate.metrics")
        for name, hook in hooks.items():
            chosen = []
            if name in served:
                router = _Router(hook, keys[name], order)
                chosen = router.choose(None if name not in routing else list(routing[name]), name in required)
            self._bound[name] = sorted(chosen, key=lambda impl: order.index(impl.plugin_name))
            self._callers[name] = Caller(manager, hook, self._bound[name])
        self._check_companions(served, keys)

    def _check_companions(self, served: set[str], keys: Mapping[str, str]) -> None:
        """Refuse a plugin's hook that is bound without another that it needs."""
        plugins = {impl.plugin_name: impl.plugin for bound in self._bound.values() for impl in bound}
        for name, plugin in plugins.items():
            for hook, needed in plugin.companions().items():
                for other in needed if name in self.providers(hook) else ():
                    if other in served and name not in self.providers(other):
                        raise UserError(f"{keys[hook]}: {hook} of {name} needs {other} of {name}, which "
                                        f"{' and '.join(self.providers(other)) or 'nobody'} serves here; route both to {name}, "
                                        "or neither")

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
        return f"add one of these plugins, which offer it: {', '.join(offering(self.hook.name)) or 'none is installed'}"
