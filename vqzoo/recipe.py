"""Recipes: what a run is, as YAML checked against dataclasses before anything else happens."""

import math
import os
import platform
import re
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vqzoo.data import DataConfig
from vqzoo.errors import UserError, suggestion
from vqzoo.evaluation import METRICS, PROTOCOLS, EvaluateConfig, check
from vqzoo.instance import blame_field
from vqzoo.ops import BACKENDS, PRECISIONS
from vqzoo.sources import available, find

PLAIN = re.compile(r"\$\{[^${}:]*\}")
"""An interpolation that names another key, as opposed to a resolver, `${name:...}`."""

HARMLESS = ("accumulate", "checkpoint", "data.bad_files", "data.eval_batch_size", "data.root", "data.workers", "evaluate",
            "guard", "log", "ops.backend", "shard", "versions")
"""The keys whose change alters nothing of what a run trains, or no more than another number of processes does.

That the images below data.root are the same is seen to.
"""

POLICIES = ("stop", "skip", "rollback")

RENAMED = {"log.evaluate_epochs": "evaluate.epochs"}


@dataclass
class EncoderConfig:
    """Any timm model by name; stride chooses the token grid; args go to timm."""

    name: str = "vqgan_encoder"
    stride: int = 8
    pretrained: bool | str = False
    batch_norm: str = "train"
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class DecoderConfig:
    name: str = "conv"
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class CodebookConfig:
    size: int = 1024
    width: int = 64


@dataclass
class OptimConfig:
    """Adam or AdamW; scale multiplies the learning rate of parameters whose name matches a pattern (last match wins)."""

    name: str = "adam"
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    clip: float | None = None
    schedule: str = "constant"
    warmup_steps: int = 0
    scale: dict[str, float] = field(default_factory=dict)


@dataclass
class StageConfig:
    """A part of the run: at most `epochs` long (the last stage: the rest), with its own frozen names and hooks."""

    name: str = "train"
    epochs: int | None = None
    freeze: list[str] = field(default_factory=list)
    hooks: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class LogConfig:
    """Steps between TensorBoard entries; images pictured, images on which drift is measured.

    collapse is the usage of the codes that an epoch could reach, below which a run warns; 0 never does.
    """

    steps: int = 50
    images: int = 8
    drift_images: int = 32
    collapse: float = 0.1


@dataclass
class OpsConfig:
    """What does the operations' work (auto, chunked, eager or triton) and whether exactly or fast: see vqzoo.ops.use."""

    backend: str = "auto"
    precision: str = "exact"


@dataclass
class CheckpointConfig:
    """Epochs between checkpoints, and steps, if any; the last `keep` stay, and with keep_best that of the best evaluation."""

    epochs: int = 1
    steps: int | None = None
    keep: int = 2
    keep_best: bool = True


@dataclass
class GuardConfig:
    """What becomes of an update that is not finite, or whose losses are `spike` times the usual ones, if that is set.

    stop ends the run before the update, skip takes another batch, rollback goes back to the last checkpoint and on with
    other batches. More than `most` skips in a row, or rollbacks to one checkpoint, end the run.
    """

    policy: str = "stop"
    spike: float | None = None
    most: int = 10


@dataclass
class Recipe:
    """A whole run; `vqzoo run` trains it, `vqzoo check` explains it."""

    seed: int = 0
    epochs: int = 1
    epoch_steps: int | None = None
    accumulate: int = 1
    precision: str = "no"
    compile: bool = False
    shard: bool = False
    ema: float = 0.999
    init_from: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    ops: OpsConfig = field(default_factory=OpsConfig)
    plugins: dict[str, Any] = field(default_factory=dict)
    hooks: dict[str, list[str]] = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    discriminator_optim: OptimConfig = field(default_factory=OptimConfig)
    stages: list[StageConfig] = field(default_factory=lambda: [StageConfig()])
    log: LogConfig = field(default_factory=LogConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    versions: dict[str, str] = field(default_factory=dict)


def shipped() -> dict[str, Path]:
    """Return the recipes that come with vqzoo, by name."""
    spec = find_spec("vqzoo_recipes")
    folders = [Path(path) for path in (spec.submodule_search_locations if spec else None) or [] if Path(path).is_dir()]
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in folders
        for path in sorted(folder.rglob("*.yaml"))
    }


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given as a path or by a shipped recipe's name."""
    if os.path.isfile(name):  # unlike Path.is_file, also for a name that is too long
        return Path(name)
    recipes = shipped()
    if name in recipes:
        return recipes[name]
    raise UserError(f"recipe {name!r}: no such file, and no shipped recipe of that name; {suggestion(name, recipes)}")


def load_recipe(name: str, overrides: list[str] | None = None, over: dict[str, dict] | None = None) -> Recipe:
    """Read a recipe and what it extends, apply `key=value` overrides (`stages[0].epochs=3` too), and check it all.

    `over` holds what is laid over the file, one after the other and before the overrides, as if each extended the one before;
    its keys are the names by which a message calls them.

    `extends: NAME` in a file puts another recipe below it, a path relative to that file or a shipped recipe's name: mappings
    are joined key by key, the base's keys first, anything else is replaced, lists too, and `key: null` takes back what the
    base says of the key. Raises UserError naming the file and the full key.
    """
    files = _files(find_recipe(name))
    for place, content in (over or {}).items():
        refuse_resolvers(content, place)
        files[Path(place)] = content
    raw = _joined(files)
    for override in overrides or []:
        _override(raw, override)
    try:
        return _checked(raw)
    except UserError as error:
        raise UserError(f"{_culprit(files, str(error))}: {error}") from error


def _checked(raw: DictConfig) -> Recipe:
    """Return the recipe of raw YAML, every key, type and range checked, those of plugins included."""
    try:
        recipe = _typed(raw)
    except OmegaConfBaseException as error:
        raise _refusal(error) from error
    _check_values(recipe)
    return recipe


def _typed(raw: DictConfig) -> Recipe:
    schema = OmegaConf.structured(Recipe)
    if OmegaConf.is_interpolation(raw, "plugins") or not isinstance(raw.get("plugins") or {}, DictConfig | dict):
        raise UserError("plugins: must map each plugin's name to its fields, as in `vq: {}`")
    raw.plugins = raw.get("plugins") or {}
    for plugin in list(raw.plugins):
        raw.plugins[plugin] = {} if raw.plugins[plugin] is None else raw.plugins[plugin]
        schema.plugins[plugin] = OmegaConf.structured(find(str(plugin)).load().Config)
    check_keys(raw, schema)
    merged = OmegaConf.merge(schema, raw)
    for plugin, config in merged.plugins.items():
        try:
            OmegaConf.to_object(config)
        except OmegaConfBaseException:
            raise
        except (ValueError, TypeError) as error:  # the plugin's own __post_init__
            raise UserError(blame_field(plugin, config, error)) from error
    if merged.precision == "False":
        merged.precision = "no"  # YAML reads a bare no as a boolean
    return OmegaConf.to_object(merged)


def _refusal(error: OmegaConfBaseException, where: str = "") -> UserError:
    key = ".".join(part for part in (where, error.full_key) if part)
    return UserError(f"{key}{': ' if key else ''}{str(error).splitlines()[0]}")


def _files(path: Path) -> dict[Path, dict]:
    """Read a recipe and what it extends; the file that extends no other comes first."""
    files: dict[Path, dict] = {}
    while path is not None:
        content = _read(path)
        base = _base(content, path)
        files = {path: content, **files}
        if base is not None and base.resolve() in [file.resolve() for file in files]:
            raise UserError(f"{path}: extends: {base} extends this file in turn; one of them must stand alone")
        path = base
    return files


def _base(content: dict, path: Path) -> Path | None:
    """Take `extends` out of a file's content and return the file that it names."""
    if "extends" not in content:
        return None
    name, recipes = content.pop("extends"), shipped()
    if not isinstance(name, str):
        raise UserError(f"{path}: extends: {name!r} is not a name; give another recipe's path, relative to this file, or a "
                        f"shipped recipe's name; {suggestion(str(name), recipes)}")
    beside = os.path.join(path.parent, name)
    if os.path.isfile(beside):
        return Path(beside)
    if name in recipes:
        return recipes[name]
    raise UserError(f"{path}: extends: {name!r}: no such file, relative to this one, and no shipped recipe of that name; "
                    f"{suggestion(name, recipes)}")


def _joined(files: dict[Path, dict]) -> DictConfig:
    """Lay files over one another, the base first; the versions of a base are not those of this run."""
    joined: dict = {}
    for number, (path, content) in enumerate(files.items()):
        joined.pop("versions", None)
        own, known = (found if isinstance(found, dict) else {} for found in (content.get("plugins"), joined.get("plugins")))
        for name in (name for name, value in own.items() if number and value is None and name not in known):
            raise UserError(f"{path}: plugins.{name}: null would take {name!r} back, which the base does not have; write "
                            f"{name}: {{}} to add it")
        joined = _over(joined, content)
    return OmegaConf.create(joined)


def _over(base: dict, own: dict) -> dict:
    """Return base with own laid over it: mappings key by key, anything else whole; null takes back what base says."""
    joined = dict(base)
    for key, value in own.items():
        if value is None and key in base:
            del joined[key]
        else:
            both = isinstance(base.get(key), dict) and isinstance(value, dict)
            joined[key] = _over(base[key], value) if both else value
    return joined


def _culprit(files: dict[Path, dict], complaint: str) -> Path:
    """Return the first of the files with which the complaint arises; the last if it takes them all or an override."""
    *bases, last = files
    for number, path in enumerate(bases, 1):
        try:
            _checked(_joined(dict(list(files.items())[:number])))
        except UserError as error:
            if str(error) == complaint:
                return path
    return last


def _read(path: Path) -> dict:
    """Return the content of one file, interpolations as they stand."""
    try:
        raw = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as plain YAML: {error}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_refusal(error)}") from error
    if not isinstance(raw, DictConfig):
        raise UserError(f"{path}: a recipe is a mapping of keys, not {type(raw).__name__}")
    content = OmegaConf.to_container(raw)
    refuse_resolvers(content, str(path))
    return content


def refuse_resolvers(value: Any, where: str, key: str = "") -> None:
    """Raise UserError for `${name:...}` anywhere in a value: it could read the environment of whoever loads a file."""
    if isinstance(value, dict):
        for part, item in value.items():
            refuse_resolvers(item, where, f"{key}.{part}" if key else str(part))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            refuse_resolvers(item, where, f"{key}[{number}]")
    elif isinstance(value, str):
        left, text = None, value
        while left != text:  # from the innermost interpolation outwards
            left, text = text, PLAIN.sub("_", text)
        if "${" in left:
            raise UserError(f"{where}: {key}: {value!r} is not allowed; ${{...}} may name another key and nothing else")


def parse_overrides(overrides: list[str], schema: DictConfig) -> DictConfig:
    """Return `key=value` overrides as keys that a schema has; a UserError names another."""
    raw = OmegaConf.create({})
    for override in overrides:
        _override(raw, override)
    check_keys(raw, schema)
    return raw


def _override(raw: DictConfig, override: str) -> None:
    """Set one key; a mapping or a list replaces what was there."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{override!r} is not an override; write key=value, as in optim.lr=1e-4 or stages[0].epochs=3")
    if key.strip() == "extends":
        raise UserError(f"override {override!r}: extends stands in a recipe's file, not among overrides")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
        refuse_resolvers(value, f"override {override!r}", key)
        _check_index(raw, key, override)
        if text.strip() == "null" and re.fullmatch(r"plugins\.[^.\[]+", key.strip()):  # as in a file that extends another
            raw.get("plugins", {}).pop(key.strip().partition(".")[2], None)
            return
        OmegaConf.update(raw, key, value, merge=False)
    except (OmegaConfBaseException, YAMLError, IndexError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"override {override!r}: {str(error).splitlines()[0]}") from error


def _check_index(raw: DictConfig, key: str, override: str) -> None:
    """Refuse an item of a list that the recipe does not set, out of which OmegaConf would make a mapping."""
    item = re.match(r"(.+?)\[\d+\]", key)
    if item and not isinstance(OmegaConf.select(raw, item[1]), ListConfig):
        raise UserError(f"override {override!r}: {item[1]}: the recipe sets no such list; set it whole, as in {item[1]}=[...]")


def check_keys(raw: Any, schema: Any, where: str = "") -> None:
    """Refuse keys that the dataclasses do not have, with the full key and the nearest one, and what is no list or mapping."""
    if _shape(schema) != _shape(raw) and _shape(schema):
        raise UserError(f"{where}: {plain(raw)!r} where {_shape(schema)} is expected")
    if isinstance(raw, ListConfig) and where == "stages":
        for number in range(len(raw)):
            _check_stage(raw, number)
    if not isinstance(schema, DictConfig):
        return
    for key in raw:
        full = f"{where}.{key}" if where else str(key)
        if key in schema.keys():  # noqa: SIM118 - `in schema` does not know a field without a default
            if not any(OmegaConf.is_missing(one, key) for one in (raw, schema)) and not OmegaConf.is_interpolation(raw, key):
                check_keys(raw[key], schema[key], full)
        elif is_dataclass(OmegaConf.get_type(schema)):
            choices = [*map(str, schema), *(["extends"] if "stages" in schema else [])]
            hint = f"it is {RENAMED[full]} now" if full in RENAMED else suggestion(str(key), choices)
            raise UserError(f"{full}: unknown key; {hint}")


def _check_stage(stages: ListConfig, number: int) -> None:
    """Check one stage by itself, since OmegaConf's own message does not say which it was."""
    where, schema = f"stages[{number}]", OmegaConf.structured(StageConfig)
    check_keys(stages[number], schema, where)
    try:
        OmegaConf.merge(schema, stages[number])
    except OmegaConfBaseException as error:
        raise _refusal(error, where) from error


def _shape(value: Any) -> str | None:
    if isinstance(value, BaseContainer):
        return "a mapping" if isinstance(value, DictConfig) else "a list"
    return None


def _check_values(recipe: Recipe) -> None:
    def refuse(key: str, value: Any, rule: str) -> None:
        raise UserError(f"{key}: {value!r} will not do; {rule}")

    for key in ("epochs", "accumulate", "codebook.size", "codebook.width", "encoder.stride", "data.batch_size",
                "data.eval_batch_size", "log.steps", "log.images", "log.drift_images",
                "checkpoint.epochs", "checkpoint.keep", "guard.most"):
        value = recipe
        for part in key.split("."):
            value = getattr(value, part)
        if value < 1:
            refuse(key, value, "it must be at least 1")
    if not 0 <= recipe.seed < 2**63:
        refuse("seed", recipe.seed, "it must be in [0, 2**63)")
    if recipe.epoch_steps is not None and recipe.epoch_steps < 1:
        refuse("epoch_steps", recipe.epoch_steps, "it must be at least 1, or null for one pass over the data")
    if recipe.checkpoint.steps is not None and recipe.checkpoint.steps < 1:
        refuse("checkpoint.steps", recipe.checkpoint.steps, "it must be at least 1, or null for none within an epoch")
    if recipe.guard.policy not in POLICIES:
        refuse("guard.policy", recipe.guard.policy, suggestion(recipe.guard.policy, POLICIES))
    if recipe.guard.spike is not None and not recipe.guard.spike > 1:
        refuse("guard.spike", recipe.guard.spike, "it must be more than 1, as in 100, or null for any size of loss")
    if not 0 <= recipe.log.collapse <= 1:
        refuse("log.collapse", recipe.log.collapse, "it must be a share in [0, 1]; 0 switches the warning off")
    if not 0 <= recipe.ema < 1:
        refuse("ema", recipe.ema, "it must be in [0, 1); 0 switches it off")
    if recipe.precision not in ("no", "bf16", "fp16"):
        refuse("precision", recipe.precision, suggestion(recipe.precision, ("no", "bf16", "fp16")))
    if recipe.shard and recipe.precision == "fp16":
        refuse("shard", True, "accelerate's gradient scaler takes no gradients in pieces; set precision to bf16 or no")
    for key, choices in (("backend", BACKENDS), ("precision", PRECISIONS)):
        if (value := getattr(recipe.ops, key)) not in choices:
            refuse(f"ops.{key}", value, suggestion(value, choices))
    for key, optim in (("optim", recipe.optim), ("discriminator_optim", recipe.discriminator_optim)):
        _check_optim(optim, key, refuse)
    _check_stages(recipe, refuse)
    check(recipe.evaluate)
    if not PROTOCOLS[recipe.evaluate.protocol].paired:
        refuse("evaluate.protocol", recipe.evaluate.protocol, "it compares a folder of samples with a reference set, by `vqzoo "
               "eval`; reconstructions are measured by the others")


def _check_optim(optim: OptimConfig, key: str, refuse: Any) -> None:
    if optim.name not in ("adam", "adamw"):
        refuse(f"{key}.name", optim.name, suggestion(optim.name, ("adam", "adamw")))
    if optim.schedule not in ("constant", "cosine", "linear"):
        refuse(f"{key}.schedule", optim.schedule, suggestion(optim.schedule, ("constant", "cosine", "linear")))
    if not 0 < optim.lr < math.inf:
        refuse(f"{key}.lr", optim.lr, "it must be positive")
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        refuse(f"{key}.betas", optim.betas, "it must be two numbers in [0, 1)")
    if not 0 <= optim.weight_decay < math.inf:
        refuse(f"{key}.weight_decay", optim.weight_decay, "it must not be negative")
    if optim.clip is not None and not optim.clip > 0:
        refuse(f"{key}.clip", optim.clip, "it must be positive, or null for no clipping")
    if optim.warmup_steps < 0:
        refuse(f"{key}.warmup_steps", optim.warmup_steps, "it must not be negative")
    for pattern, scale in optim.scale.items():
        if not isinstance(scale, float) or not 0 <= scale < math.inf:
            refuse(f"{key}.scale", {pattern: scale}, "it must map patterns to factors that are not negative")


def _check_stages(recipe: Recipe, refuse: Any) -> None:
    if not recipe.stages:
        refuse("stages", [], "name at least one stage, or leave the key out")
    names = [stage.name for stage in recipe.stages]
    if len(set(names)) < len(names):
        refuse("stages", names, "each stage needs a name of its own")
    for number, stage in enumerate(recipe.stages[:-1]):
        if stage.epochs is None or stage.epochs < 1:
            refuse(f"stages[{number}].epochs", stage.epochs, "every stage but the last needs its greatest length in epochs")
    if recipe.stages[-1].epochs is not None:
        refuse(f"stages[{len(names) - 1}].epochs", recipe.stages[-1].epochs, "the last stage takes the rest of `epochs`")
    used = sum(stage.epochs or 0 for stage in recipe.stages[:-1])
    if used >= recipe.epochs:
        refuse("epochs", recipe.epochs, f"the stages before the last may take {used}, so the last would get none")


def plain(config: Any) -> Any:
    """Return a recipe or a part of one as dicts, lists and scalars, as YAML and JSON have them."""
    if is_dataclass(config):
        return {f.name: plain(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, dict):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    if isinstance(config, Enum):
        return config.name
    return str(config) if isinstance(config, Path) else config


def to_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML that `load_recipe` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(recipe)))


def named_plugins(recipe: Recipe) -> list[str]:
    """Return every plugin that a recipe names: those of the tokenizer, and those that give images or metrics."""
    others = [name for name in (recipe.data.name, *recipe.evaluate.metrics) if name not in METRICS and name in available()]
    return list(dict.fromkeys([*recipe.plugins, *others]))


def versions(plugins: list[str]) -> dict[str, str]:
    """Return the versions of vqzoo, its main dependencies and the named plugins' distributions."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("vqzoo", "timm", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    for name in plugins:
        source = find(name)
        found[f"plugin {name}"] = f"{source.distribution} {source.version}"
    return found


def difference(one: Any, other: Any, key: str = "") -> list[str]:
    """Return the full keys in which two plain recipes differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(k for k in other if k not in one)]
        return [line for k in keys for line in difference(one.get(k), other.get(k), f"{key}.{k}" if key else str(k))]
    return [] if one == other or one != one and other != other else [f"{key}: {one!r} → {other!r}"]  # NaN is NaN


def differences(then: Any, now: Any) -> tuple[list[str], list[str]]:
    """Return what differs between two plain recipes, as `difference` does: what alters a run, and what does not."""
    matters, harmless = [], []
    for line in difference(then, now):
        key = line.partition(": ")[0]
        longer = key == "epochs" and now["epochs"] > then["epochs"]
        known = any(key == one or key.startswith(f"{one}.") for one in HARMLESS)
        (harmless if longer or known else matters).append(line)
    return matters, harmless
