"""Suites: what a benchmark compares, as YAML checked against dataclasses before anything else happens."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vqzoo.errors import UserError, suggestion
from vqzoo.recipe import check_keys, refuse_resolvers
from vqzoo.sources import available

KINDS = ("train", "compose", "speed")

MATCHES = ("codebook_size", "bits_per_token", "tokens_per_image")
"""In what the variants of a table may be said to be alike."""

POINT = "at"
"""The key of a variant that says what it changes at the points of the suite's axis."""

BASE = "base"
"""The key of a variant that stands on another recipe than the suite's."""


@dataclass
class GroupConfig:
    """A table of the report: its variants, and the metric in which they are alike, if any."""

    variants: list[str] = field(default_factory=list)
    match: str | None = None


@dataclass
class BudgetConfig:
    """What every cell may spend: steps, or seconds of training on the device that trains them."""

    steps: int | None = None
    seconds: float | None = None


@dataclass
class QuickConfig:
    """The short form: what it leaves out, in words, and what of the suite it replaces; `recipe` is laid over the suite's."""

    leaves_out: str = ""
    variants: list[str] | None = None
    points: list[str] | None = None
    seeds: int | None = None
    budget: BudgetConfig | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, list[int]] | None = None


@dataclass
class SuiteConfig:
    """A suite's file.

    A cell is a variant at a point of the axis with a seed. Over its recipe, `base`, is laid what `recipe`, the variant, the
    point, and the variant's `at` of that point say, in this order, each as a recipe that extends another. `joins` is laid under
    a plugin that `--plugins` adds by name. `columns` are the metrics shown, of the evaluation or of `curves`, the TensorBoard
    scalars whose mean over the run is kept.
    """

    kind: str = "train"
    about: str = ""
    base: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, Any] = field(default_factory=dict)
    joins: dict[str, Any] = field(default_factory=dict)
    axis: str | None = None
    points: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    baseline: str | None = None
    seeds: int = 3
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    metrics: list[str] | None = None
    protocol: str | None = None
    columns: list[str] = field(default_factory=lambda: ["psnr", "ssim", "usage", "perplexity", "bits_per_token"])
    curves: list[str] = field(default_factory=lambda: ["codes/usage"])
    quality: str = "psnr"
    fields: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)
    quick: QuickConfig | None = None


@dataclass(frozen=True)
class Group:
    """A table as it is to be shown: its variants, and every metric in which it claims that they are alike."""

    variants: list[str]
    matches: list[str]


@dataclass
class Suite:
    """A suite as it is to be run: its file's content, with what the short form and the command line made of it."""

    name: str
    path: Path
    config: SuiteConfig
    variants: dict[str, dict]
    points: dict[str, dict]
    seeds: int
    budget: BudgetConfig
    laid: dict[str, dict]
    sizes: dict[str, list[int]]
    quick: str | None = None

    def recipe_of(self, variant: str, point: str | None) -> tuple[str, dict[str, dict]]:
        """Return the recipe that a cell stands on, and what is laid over it, by the names that messages give it."""
        own = {key: value for key, value in self.variants[variant].items() if key not in (POINT, BASE)}
        base = self.variants[variant].get(BASE, self.config.base)
        beside = self.path.parent / base
        laid = {**self.laid, f"variants.{variant}": own}
        if point is not None:
            laid[f"points.{point}"] = self.points[point]
            laid[f"variants.{variant}.{POINT}.{point}"] = self.variants[variant].get(POINT, {}).get(point, {})
        return (str(beside) if beside.is_file() else base,
                {f"{self.path}: {place}": content for place, content in laid.items() if content})

    @property
    def baseline(self) -> str:
        """Return the variant to which the others are compared: the suite's, or the first if that is not run."""
        return self.config.baseline if self.config.baseline in self.variants else next(iter(self.variants))

    def tables(self) -> dict[str, Group]:
        """Return the report's tables, each with those of its variants that are run; one of all where the suite names none.

        Who joins is in every table whose variants are alike in something. Two tables of the same variants are one, and there is
        none of one variant alone beside others.
        """
        known = {name for group in self.config.groups.values() for name in group.variants}
        joining = [name for name in self.variants if name not in known]
        alike = any(group.match for group in self.config.groups.values())
        titles: dict[tuple[str, ...], list[str]] = {}
        for title, group in self.config.groups.items():
            names = [name for name in group.variants if name in self.variants]
            names += joining if group.match or not alike else []
            titles.setdefault(tuple(names), []).append(title)
        found = {", ".join(said): Group(list(names), [match for title in said if (match := self.config.groups[title].match)])
                 for names, said in titles.items()}
        for least in (2, 1):
            if tables := {title: group for title, group in found.items() if len(group.variants) >= least}:
                return tables
        return {"": Group(list(self.variants), [])}


def shipped() -> dict[str, Path]:
    """Return the suites that come with vqzoo, by name."""
    spec = find_spec("vqzoo_suites")
    folders = [Path(path) for path in (spec.submodule_search_locations if spec else None) or []]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def load_suite(name: str, plugins: str | None = None, seeds: int | None = None, quick: bool = False,
               budget: BudgetConfig | None = None, baseline: str | None = None) -> Suite:
    """Read a suite by its path or a shipped one's name, in its short form or whole; a UserError names file and key.

    `plugins` are the names, joined by commas, of the variants to keep; a name that the suite does not have is an installed
    plugin, or several joined by +, and becomes a variant: the plugins with their defaults on what the suite's `joins` says.
    """
    path = _find(name)
    config = _read(path)
    short = config.quick if quick else None
    if quick and short is None:
        raise UserError(f"--quick: {path} has no short form; take the key=value that you need, and fewer --plugins")
    variants = {key: value or {} for key, value in config.variants.items()}
    if plugins is not None and config.kind != "compose":
        names = [word.strip() for word in plugins.split(",") if word.strip()]
        variants = {name: variants[name] if name in variants else _joining(config, name, variants) for name in names}
        if not names:
            raise UserError("--plugins: names none")
    elif short and short.variants is not None:
        variants = {name: variants.get(name, {}) for name in short.variants}
    points = {str(key): value or {} for key, value in config.points.items()}
    if short and short.points is not None:
        points = {name: points[name] for name in short.points}
    count = seeds if seeds is not None else short.seeds if short and short.seeds is not None else config.seeds
    if count < 1:
        raise UserError(f"seeds: {count} will not do; it must be at least 1")
    if baseline is not None:
        if baseline not in variants:
            raise UserError(f"--baseline: {baseline!r} is not among the variants; {suggestion(baseline, variants)}")
        config.baseline = baseline
    budget = budget or (short.budget if short and short.budget else config.budget)
    _check_budget("--steps or --seconds", budget)
    return Suite(path.stem, path, config, variants, points, count, budget,
                 {"recipe": config.recipe, "quick.recipe": short.recipe if short else {}},
                 {**config.sizes, **((short.sizes or {}) if short else {})}, short and _left_out(short, budget))


def _left_out(short: QuickConfig, budget: BudgetConfig) -> str:
    """Say what a short form leaves out, and if its budget is not its own."""
    own = short.budget is None or budget == short.budget
    return short.leaves_out + ("" if own else f"; but with {budget.steps or budget.seconds:g} "
                               f"{'steps' if budget.steps else 'seconds'} for each run")


def _find(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    if name in shipped():
        return shipped()[name]
    raise UserError(f"suite {name!r}: no such file, and no shipped suite of that name; {suggestion(name, shipped())}")


def _joining(config: SuiteConfig, name: str, variants: dict[str, Any]) -> dict[str, Any]:
    """Return the variant of plugins that the suite does not name."""
    for plugin in name.split("+"):
        if plugin not in available():
            choices = dict.fromkeys([*variants, *available()])
            raise UserError(f"--plugins: {plugin!r} is neither a variant of the suite nor an installed plugin; "
                            f"{suggestion(plugin, choices)}; a file's needs --plugin-file")
    known = config.joins.get("plugins") or {}
    return {**config.joins, "plugins": {**known, **{plugin: known.get(plugin, {}) for plugin in name.split("+")}}}


def _read(path: Path) -> SuiteConfig:
    try:
        raw = OmegaConf.load(path)
        content = OmegaConf.to_container(raw)
    except (YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read as plain YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a suite is a mapping of keys, not {type(content).__name__}")
    refuse_resolvers(content, str(path))
    content = {**content, **{key: {str(name): value for name, value in content[key].items()}
                             for key in ("variants", "points") if isinstance(content.get(key), dict)}}
    try:
        raw = OmegaConf.create(content)
        check_keys(raw, OmegaConf.structured(SuiteConfig))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SuiteConfig), raw))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key}: {str(error).splitlines()[0]}") from error
    try:
        _check(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config


def _check(config: SuiteConfig) -> None:
    if config.kind not in KINDS:
        raise UserError(f"kind: {config.kind!r} is unknown; {suggestion(config.kind, KINDS)}")
    if not config.variants and config.kind != "compose":
        raise UserError("variants: names none")
    if bool(config.axis) != bool(config.points):
        raise UserError("axis and points: the one names what the others are values of; give both or neither")
    for title, group in config.groups.items():
        if group.match not in (None, *MATCHES):
            raise UserError(f"groups.{title}.match: {group.match!r} is unknown; {suggestion(group.match, MATCHES)}")
    for place, content in _recipes(config):
        if not isinstance(content, dict):
            raise UserError(f"{place}: {content!r} where keys of a recipe are expected")
        if "seed" in content:
            raise UserError(f"{place}.seed: a suite sets this itself; see seeds")
    for name, variant in config.variants.items():
        if not isinstance((variant or {}).get(BASE, ""), str):
            raise UserError(f"variants.{name}.{BASE}: {variant[BASE]!r} is not a recipe's path or name")
        own = (variant or {}).get(POINT) or {}
        for point in own:
            if point not in config.points:
                raise UserError(f"variants.{name}.{POINT}.{point}: no such point; {suggestion(point, config.points)}")
    if not isinstance(config.joins.get("plugins") or {}, dict):
        raise UserError("joins.plugins: must map each plugin's name to its fields")
    named = {f"groups.{title}.variants": group.variants for title, group in config.groups.items()}
    named["baseline"] = [config.baseline] if config.baseline else []
    if config.quick and config.kind != "compose":
        named["quick.variants"] = config.quick.variants or []
    for key, names in named.items():
        for name in names:
            if name not in config.variants:
                raise UserError(f"{key}: there is no variant {name!r}; {suggestion(name, config.variants)}")
    for name in (config.quick.points or []) if config.quick else []:
        if name not in config.points:
            raise UserError(f"quick.points: there is no point {name!r}; {suggestion(name, config.points)}")
    _check_budget("budget", config.budget)
    _check_budget("quick.budget", config.quick.budget if config.quick and config.quick.budget else BudgetConfig())


def _recipes(config: SuiteConfig) -> Iterator[tuple[str, Any]]:
    """Yield every part of a suite that is laid over a recipe, by its place; points become texts."""
    yield from (("recipe", config.recipe), ("joins", config.joins))
    yield "quick.recipe", config.quick.recipe if config.quick else {}
    yield from ((f"points.{name}", {} if content is None else content) for name, content in config.points.items())
    for name, variant in config.variants.items():
        yield f"variants.{name}", {} if variant is None else variant
        if isinstance(variant, dict) and variant.get(POINT) is not None:
            if isinstance(variant[POINT], dict):
                variant[POINT] = {str(point): {} if own is None else own for point, own in variant[POINT].items()}
                yield from ((f"variants.{name}.{POINT}.{point}", own) for point, own in variant[POINT].items())
            else:
                yield f"variants.{name}.{POINT}", variant[POINT]


def _check_budget(key: str, budget: BudgetConfig) -> None:
    for part in fields(BudgetConfig):
        value = getattr(budget, part.name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{key}: {part.name} {value!r} will not do; it must be more than 0, and finite")
    if budget.steps is not None and budget.seconds is not None:
        raise UserError(f"{key}: steps and seconds are two budgets; keep one")
