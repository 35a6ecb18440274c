"""Making a plugin of its class and of the fields that a recipe sets."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vqzoo.errors import PluginError, UserError
from vqzoo.hookspecs import DOORS
from vqzoo.manager import Hooks, make_manager
from vqzoo.plugin import Plugin
from vqzoo.sources import find, offered_hooks


def make_plugin(name: str, config: Any, key: str = "") -> Plugin:
    """Make a plugin from its Config, or from a plain dict of its fields; `key` says where these stand, if not in `plugins`."""
    source = find(name)
    kind = source.load()
    if not isinstance(config, kind.Config):
        try:
            config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind.Config), config or {}))
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise UserError(blame_field(name, (f.name for f in fields(kind.Config)), error, key)) from error
    try:
        return kind(config)
    except (UserError, PluginError, MemoryError):
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"plugin {name!r} ({source.place}) needs the module {error.name!r}, which is not installed; install "
                        "what has it, perhaps as an extra of that distribution") from error
    except Exception as error:
        raise PluginError(f"plugin {name!r} ({source.place}) cannot be made: {error!r}") from error


def blame_field(plugin: str, names: Iterable[str], error: Exception, key: str = "") -> str:
    """Return what is wrong with a plugin's fields, under the full key if the error begins with the name of one."""
    text, key = str(error).partition("\n")[0], key or f"plugins.{plugin}"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        text = f"{error.full_key}: {text}"
    return f"{key}.{text}" if text.partition(":")[0] in set(names) else f"{key}: {text}"


def through_door(door: str, name: str, config: Any, key: str) -> Hooks:
    """Return the hooks that reach one plugin through one of DOORS; `key` says where its fields stand."""
    offers = offered_hooks(find(name).load())
    if door not in DOORS or door not in offers:
        raise UserError(f"{key}: the plugin {name!r} does not offer {door}; it offers {', '.join(offers) or 'nothing'}")
    return Hooks(make_manager({name: make_plugin(name, config, key)}), {}, serve=[door], required=[door])
