"""The plugin under test, and what is made of it: plugins, recipes, tokenizers, images."""

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqzoo.data import DataConfig
from vqzoo.errors import UserError
from vqzoo.evaluation import EvaluateConfig
from vqzoo.hookspecs import REQUIRED
from vqzoo.instance import make_plugin
from vqzoo.plugin import Plugin
from vqzoo.prepare import build
from vqzoo.recipe import (
    CheckpointConfig,
    CodebookConfig,
    DecoderConfig,
    EncoderConfig,
    LogConfig,
    OptimConfig,
    Recipe,
    StageConfig,
    plain,
)
from vqzoo.sources import SPECS, also, available, find, offered_hooks, refused
from vqzoo.testing.reference import REFERENCE, Reference, pictures
from vqzoo.tokenizer import Tokenizer

STRIDE, BATCH, EPOCH = 8, 4, 2
"""Pixels of a token's side, images of a step, steps of an epoch."""

NETWORK = {"width": 8, "mult": [1], "blocks": 0, "patch": STRIDE}
"""The smallest encoder and decoder that there are."""

ONE_OF = tuple(name for name in SPECS if name in (*REQUIRED, "make_discriminator", "discriminator_loss")
               and name != "reconstruction_loss")
"""The hooks of which a stage has one provider."""


class Untestable(UserError):
    """Of the plugin under test, no tokenizer can be made at all."""


@dataclass(frozen=True)
class Subject:
    """Name a plugin, installed or a class, with its fields and the codebook and images on which it is to be tested.

    The defaults do for most; a method that takes certain sizes only says one: `Subject("mine", size=1000)`. `resolution` is
    [height, width] in pixels, multiples of 8; a token stands for 8x8.
    """

    plugin: str | type[Plugin]
    config: Any = None
    size: int = 32
    width: int = 8
    resolution: tuple[int, int] = (32, 48)

    @property
    def title(self) -> str:
        """What the plugin is called in reports."""
        return self.plugin if isinstance(self.plugin, str) else self.plugin.__name__.lower()

    @cached_property
    def name(self) -> str:
        """The plugin's name in recipes, which for a class is one that no plugin has."""
        name = self.title
        while not isinstance(self.plugin, str) and (name in available() or name in refused()):
            name += "_"
        return name

    @contextmanager
    def within(self) -> Iterator[None]:
        """Make the plugin and the reference available in this block."""
        own = {} if isinstance(self.plugin, str) else {self.name: self.plugin}
        with also(classes={**own, REFERENCE: Reference}):
            yield

    @cached_property
    def kind(self) -> type[Plugin]:
        """The plugin's class, which fits the contract, or a UserError says why not."""
        name = self.name
        with self.within():
            return find(name).load()

    @cached_property
    def offered(self) -> dict[str, str]:
        """The hooks that the plugin offers, each with "provides", "yields" or "wraps"."""
        return offered_hooks(self.kind)

    def provides(self, hook: str) -> bool:
        """Tell whether the plugin can serve a hook by itself."""
        return self.offered.get(hook) in ("provides", "yields")

    def asks_for(self, hook: str, argument: str) -> bool:
        """Tell whether the plugin's implementation of a hook names an argument."""
        names = [name for name, method in inspect.getmembers(self.kind, inspect.isfunction)
                 if hook == ((getattr(method, "vqzoo_impl", None) or {}).get("specname") or name)]
        return any(argument in inspect.signature(getattr(self.kind, name)).parameters for name in names)

    @property
    def fields(self) -> dict[str, Any]:
        """The plugin's fields as a recipe has them."""
        return plain(self.config or {})

    def make(self) -> Plugin:
        """Make the plugin."""
        return make_plugin(self.name, self.fields)

    # ---- recipes and tokenizers

    @property
    def judged(self) -> bool:
        """Whether there is a discriminator."""
        return bool({"make_discriminator", "discriminator_loss"} & set(self.offered)) or self.asks_for(
            "reconstruction_loss", "discriminator")

    @cached_property
    def stages(self) -> list[str]:
        """The stages of which the plugin's fields speak, without wildcards."""
        patterns = [pattern for names in self.make().named_stages().values() for pattern in names]
        return list(dict.fromkeys(pattern.replace("*", "") or "train" for pattern in patterns)) or ["train"]

    def recipe(self, *others: str) -> Recipe:
        """Return a recipe of the plugin, of other installed ones, and of the reference for what they leave open.

        Where two could serve a hook, the first does.
        """
        names = [self.name, *others, REFERENCE]
        offers = {name: self.offered if name == self.name else offered_hooks(find(name).load()) for name in names}
        hooks = {hook: _routed(hook, offers) for hook in ONE_OF}
        if not self.judged and not any("discriminator_loss" in offers[name] for name in others):
            hooks |= {"make_discriminator": [], "discriminator_loss": []}
        height, width = self.resolution
        return Recipe(
            epochs=max(2, len(self.stages)), epoch_steps=EPOCH, ema=0.0,
            data=DataConfig(name=REFERENCE, resolution=[height, width], batch_size=BATCH, eval_batch_size=BATCH, workers=0,
                            args={"height": height, "width": width}),
            encoder=EncoderConfig("vqgan_encoder", STRIDE, args=dict(NETWORK)), decoder=DecoderConfig("conv", dict(NETWORK)),
            codebook=CodebookConfig(self.size, self.width), plugins={name: {} for name in names} | {self.name: self.fields},
            hooks=hooks, optim=OptimConfig(lr=1e-3),
            stages=[StageConfig(stage, 1) for stage in self.stages[:-1]] + [StageConfig(self.stages[-1])],
            log=LogConfig(steps=2, images=1, drift_images=1, collapse=0.0),
            evaluate=EvaluateConfig(metrics=["psnr"], epochs=1000), checkpoint=CheckpointConfig(steps=1, keep=100),
        )

    @property
    def refusal(self) -> str | None:
        """Why make_codebook makes no codebook of this size and width, if it does not."""
        try:
            self.tokenizer()
        except Untestable as error:
            return str(error.__cause__).removeprefix("codebook: ")
        return None

    @cached_property
    def _template(self) -> Tokenizer:
        recipe = self.recipe()
        torch.manual_seed(0)
        try:
            tokenizer = Tokenizer.from_recipe(recipe)
        except UserError as error:
            if not str(error).startswith("codebook: "):
                raise
            raise Untestable(f"{self.title}: there can be no tokenizer of {self.size} codes of width {self.width} to test it "
                            f"with ({error}); if it takes certain sizes only, say one: size=, width=, resolution= in Python, "
                            "codebook.size=, codebook.width=, data.resolution= for `vqzoo check-plugin`") from error
        tokenizer.wire(recipe.hooks, {})
        return tokenizer

    def tokenizer(self) -> Tokenizer:
        """Return a tokenizer of random weights, the same each time, in training mode."""
        return copy.deepcopy(self._template).train()

    def with_others(self, *others: str) -> Tokenizer:
        """Return a tokenizer in which other installed plugins take part; a UserError says why that cannot be."""
        return build(self.recipe(*others)).train()

    def of(self, **changes: Any) -> "Subject":
        """Return the same plugin with another size, width or resolution."""
        other = replace(self, **changes)
        vars(other)["name"] = self.name  # which is taken by now, inside of `within`
        return other

    # ---- what it is given

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.resolution
        return height // STRIDE, width // STRIDE

    def images(self, count: int = BATCH, first: int = 0) -> Tensor:
        """Return images [count, 3, H, W], always the same."""
        return pictures(count, *self.resolution, first)

    def batches(self, first: int = 0) -> Iterator[Tensor]:
        """Yield images without an end, as `enter_stage` is given them."""
        return (self.images(first=number) for number in itertools.count(first, BATCH))

    def features(self, tokenizer: Tokenizer, count: int = BATCH, seed: int = 0) -> Tensor:
        """Return what an encoder could give [count, N, E] of N(0, 1)."""
        height, width = self.grid
        shape = (count, height * width, tokenizer.codebook.encoder_width)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _routed(hook: str, offers: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return who serves a hook: the first that provides it, and all that wrap it."""
    providers = [name for name, offered in offers.items() if offered.get(hook) in ("provides", "yields")]
    return providers[:1] + [name for name, offered in offers.items() if offered.get(hook) == "wraps"]


def place_of(kind: type[Plugin]) -> Path | None:
    """Return the file in which a class is written."""
    try:
        return Path(inspect.getfile(kind)).resolve()
    except (OSError, TypeError):
        return None
