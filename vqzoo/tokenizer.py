"""The tokenizer: images to indices and back, with the hooks of one stage bound to it."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file
from torch import Tensor, nn

from vqzoo.answers import (
    check_entered,
    check_finite,
    check_left,
    check_losses,
    check_quantized,
    check_range,
    check_same,
    check_seen,
    check_vectors,
)
from vqzoo.caller import kind_of
from vqzoo.codebook import Codebook
from vqzoo.errors import PluginError, UserError, suggestion
from vqzoo.features import compiled
from vqzoo.files import write_tensors, write_text
from vqzoo.hookspecs import ONCE
from vqzoo.instance import make_plugin
from vqzoo.manager import Hooks, make_manager
from vqzoo.networks import Encoder, drawn_apart, make_decoder
from vqzoo.plugin import Progress, Quantized
from vqzoo.recipe import (
    CodebookConfig,
    DecoderConfig,
    EncoderConfig,
    Recipe,
    plain,
    refuse_resolvers,
    versions,
)
from vqzoo.sources import offered_hooks

CONFIG, WEIGHTS = "config.json", "model.safetensors"

INFERENCE = ("make_codebook", "quantize")
"""The hooks without which images cannot be turned into indices and back."""


@dataclass
class TokenizerConfig:
    """What a tokenizer is made of; the content of config.json."""

    resolution: list[int]
    encoder: EncoderConfig
    decoder: DecoderConfig
    codebook: CodebookConfig
    plugins: dict[str, Any] = field(default_factory=dict)
    hooks: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Output:
    """Carry one forward: reconstructions [B, 3, H, W], latents and codes [B, N, D], indices [B, N] or [B, N, Q] or None.

    checks tell of each part of a training forward, in order, whether it is finite: 0-dim bools on the device, by name.
    """

    reconstructions: Tensor
    latents: Tensor
    codes: Tensor
    indices: Tensor | None
    extras: dict[str, Tensor]
    losses: dict[str, Tensor]
    checks: dict[str, Tensor] = field(default_factory=dict)

    def detached(self) -> "Output":
        """Return the same values without their graph, the losses and the checks."""
        extras = {name: value.detach() for name, value in self.extras.items()}
        return Output(self.reconstructions.detach(), self.latents.detach(), self.codes.detach(), self.indices, extras, {})


class Tokenizer(nn.Module):
    """Encode images into indices and decode them, by an encoder, a codebook, a decoder and the plugins of a recipe."""

    def __init__(self, config: TokenizerConfig, serve: Iterable[str] = INFERENCE):
        super().__init__()
        self.config = config
        self._compiled: dict[str, Callable] = {}
        # Each part draws apart, so that recipes of one seed have the same networks whatever their codebooks and plugins draw.
        with drawn_apart():
            try:
                self.plugins = nn.ModuleDict({name: make_plugin(name, c) for name, c in config.plugins.items()})
            except KeyError as error:
                raise UserError(f"plugins: a plugin cannot have this name: {error}") from error
        self._wire(dict(config.hooks), {}, tuple(serve))
        with drawn_apart():
            self.codebook = self._make_codebook(config.codebook)
        encoder, resolution = config.encoder, tuple(config.resolution)
        with drawn_apart():
            self.encoder = Encoder(encoder.name, self.codebook.encoder_width, encoder.stride, resolution, encoder.pretrained,
                                   encoder.args, encoder.batch_norm)
        with drawn_apart():
            self.decoder = make_decoder(config.decoder.name, self.codebook.decoder_width, encoder.stride, resolution,
                                        config.decoder.args)
        self._trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        self._frozen: list[str] = []

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> "Tokenizer":
        """Build the untrained tokenizer of a recipe; only the hooks that are asked once are bound yet."""
        config = TokenizerConfig(
            list(recipe.data.resolution), recipe.encoder, recipe.decoder, recipe.codebook, recipe.plugins, recipe.hooks
        )
        return cls(config, ONCE)

    def _make_codebook(self, config: CodebookConfig) -> Codebook:
        try:
            codebook = self.hooks.make_codebook(size=config.size, width=config.width)
        except PluginError as error:
            if isinstance(error.__cause__, ValueError):
                raise UserError(f"codebook: {error.__cause__}") from error
            raise
        return self.hooks.answer("make_codebook", codebook, Codebook)

    # ---- wiring

    def wire(self, hooks: Mapping[str, list[str]], keys: Mapping[str, str]) -> None:
        """Bind all hooks for a stage; `keys` says where in the recipe a hook is routed, if not under `hooks`."""
        self._wire(dict(hooks), dict(keys), None)
        writers = self.hooks.providers("refresh_codes")
        if writers and not self.codebook.replaceable:
            raise UserError(f"{keys.get('refresh_codes', 'hooks.refresh_codes')}: {', '.join(writers)} would overwrite codes, "
                            f"but {type(self.codebook).__name__} is implicit; route it away with refresh_codes: []")

    def _wire(self, hooks: dict[str, list[str]], keys: dict[str, str], serve: tuple[str, ...] | None) -> None:
        self._wiring = (hooks, keys, serve)
        self.hooks = Hooks(make_manager(self.plugins), hooks, keys, serve)

    def freeze(self, patterns: Iterable[str], key: str = "freeze") -> None:
        """Freeze what the patterns name, buffers too; everything else that can be trained is trained."""
        patterns = list(patterns)
        frozen = {name for name, _ in self._tensors("") if any(fnmatch(name, pattern) for pattern in patterns)}
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in frozen):
                parts = [f"{name}.*" for name, child in self.named_children() if list(child.parameters())]
                raise UserError(f"{key}: {pattern!r} matches no parameter; {suggestion(pattern, parts)}")
        writers = self.hooks.providers("refresh_codes")
        codes = {name for name, tensor in self._tensors("codebook") if tensor.shape[:1] == (self.codebook.rows,)}
        if writers and codes & frozen:
            raise UserError(f"{key}: the codebook is to be frozen, but refresh_codes of {', '.join(writers)} "
                            "overwrites it; set hooks.refresh_codes: [] in this stage")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self._trainable and name not in frozen)
            if name in frozen:
                parameter.grad = None  # with a zero gradient, Adam's momentum would still move it
        inside = {name: {full for full, _ in self._tensors(name)} for name, _ in self.named_modules() if name}
        self._frozen = [name for name, tensors in inside.items() if tensors and tensors <= frozen]
        self.train(self.training)

    def _tensors(self, module: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the full name of each parameter and buffer of a submodule."""
        part = self.get_submodule(module)
        yield from part.named_parameters(prefix=module)
        yield from part.named_buffers(prefix=module)

    def rehearse(self, progress: Progress) -> set[str]:
        """Quantize made-up latents, as a training step would and as evaluation; return the names of the embedding losses.

        A plugin that breaks the contract is found here, before training. No buffer and no random state changes.
        """
        grid = self.grid
        before = [buffer.clone() for buffer in self.buffers()]
        with torch.random.fork_rng(devices=[]):
            features = torch.randn(1, grid[0] * grid[1], self.codebook.encoder_width)
            features.requires_grad_(any(p.requires_grad for p in self.encoder.parameters()))
            self.train()
            with self.codebook.one_forward():
                check_vectors(self.hooks, self.codebook)
                latents = check_entered(self.hooks, self._enter(features), features)
                found, seen, losses = self._quantize(latents, grid, progress)
                given = self._leave(seen)
            evaluated = [self._evaluate(latents, grid) for _ in range(2)]
        for quantized in (found, *evaluated):
            check_finite(self.hooks, "quantize", {"codes": quantized.codes})
            check_range(self.hooks, quantized, self.codebook.size)
        check_same(self.hooks, *evaluated)
        check_finite(self.hooks, "straight_through", {"a tensor": seen})
        check_left(self.hooks, given, seen, self.codebook.decoder_width)
        check_finite(self.hooks, "embedding_loss", {f"loss {name!r}": loss for name, loss in losses.items()})
        for buffer, value in zip(self.buffers(), before, strict=True):
            buffer.copy_(value)
        return set(losses)

    @torch.no_grad()
    def _evaluate(self, latents: Tensor, grid: tuple[int, int]) -> Quantized:
        """Quantize latents as evaluation does."""
        with _evaluating(self), self.codebook.one_forward():
            return self._quantize(latents, grid, None)[0]

    @torch.no_grad()
    def rehearse_networks(self) -> None:
        """Send one blank image through encoder and decoder; a UserError if they cannot process the resolution."""
        images = torch.zeros(1, 3, *self.config.resolution)
        with _evaluating(self):
            for key, network, given, wanted in (
                ("encoder", self.encoder, images, (1, self.codebook.encoder_width, *self.grid)),
                ("decoder", self.decoder, torch.zeros(1, self.codebook.decoder_width, *self.grid), tuple(images.shape)),
            ):
                name = getattr(self.config, key).name
                try:
                    made = tuple(network(given).shape)
                except UserError:
                    raise
                except Exception as error:  # whatever a network of any library raises
                    raise UserError(f"{key}: {name} cannot process {list(given.shape)}: {error}; see {key}.args") from error
                if made != wanted:
                    raise UserError(f"{key}: {name} makes {list(made)} of {list(given.shape)} where {list(wanted)} is expected")

    @property
    def grid(self) -> tuple[int, int]:
        """The token grid (h, w) at the resolution of the configuration."""
        height, width = self.config.resolution
        return height // self.config.encoder.stride, width // self.config.encoder.stride

    def train(self, mode: bool = True) -> "Tokenizer":
        """Switch to training, except for frozen parts: their statistics must stand still too."""
        super().train(mode)
        for name in self._frozen if mode else []:
            self.get_submodule(name).eval()
        return self

    def __getstate__(self) -> dict:
        # Bound hooks can be neither copied nor pickled, and a copy must call its own plugins and networks.
        return {**{key: value for key, value in self.__dict__.items() if key != "hooks"}, "_compiled": {}}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._wire(*self._wiring)

    def compile_networks(self) -> None:
        """Compile encoder and decoder for training; in evaluation they run as they are, on images of any size."""
        # Beside the modules and not in their place, which would give every tensor of a checkpoint another name.
        self._compiled = {name: compiled(getattr(self, name)) for name in ("encoder", "decoder")}

    def _network(self, name: str) -> Callable:
        return self._compiled[name] if self.training and self._compiled else getattr(self, name)

    # ---- the path from images to images

    def forward(self, images: Tensor, progress: Progress | None = None) -> Output:
        """Reconstruct images [B, 3, H, W] in [-1, 1]; with the embedding losses when in training mode."""
        with self.codebook.one_forward():
            latents, grid = self.latents(images)
            quantized, seen, losses = self._quantize(latents, grid, progress)
            given = self._leave(seen)
        reconstructions = self._network("decoder")(_to_map(given, grid)).float()
        checks = self._checks(latents, quantized.codes, seen, reconstructions) if self.training else {}
        return Output(reconstructions, latents, quantized.codes, quantized.indices, quantized.extras, losses, checks)

    def _checks(self, latents: Tensor, codes: Tensor, seen: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """Tell of each part of a forward, in order, whether it is finite: whether its sum is, which costs one pass."""
        quantize, estimator = (", ".join(self.hooks.providers(hook)) for hook in ("quantize", "straight_through"))
        parts = {"latents of the encoder": latents, f"codes of quantize ({quantize})": codes,
                 f"answer of straight_through ({estimator})": seen, "reconstructions of the decoder": reconstructions}
        sums = torch.stack([part.detach().sum() for part in parts.values()])
        return dict(zip(parts, sums.isfinite().unbind(), strict=True))

    def latents(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the latents [B, N, D] of images [B, 3, H, W], in float32, and their grid (h, w)."""
        features = self._network("encoder")(images)
        return self._enter(features.flatten(2).transpose(1, 2)), (features.shape[2], features.shape[3])

    def _enter(self, features: Tensor) -> Tensor:
        """Lead what the encoder gives [B, N, ...] to where it is quantized."""
        with _without_autocast(features.device):
            return self.codebook.from_encoder(features.float())

    def _leave(self, codes: Tensor) -> Tensor:
        """Lead codes [B, N, D] to what the decoder sees."""
        with _without_autocast(codes.device):
            return self.codebook.to_decoder(codes)

    def _quantize(self, latents: Tensor, grid: tuple[int, int], progress: Progress | None):
        """Return what quantize gave, what the decoder sees, and the embedding losses."""
        hooks, codebook = self.hooks, self.codebook
        with _without_autocast(latents.device):
            found = hooks.quantize(latents=latents, codebook=codebook, grid=grid, progress=progress)
            check_quantized(hooks, found, latents, codebook.width)
            if not self.training:
                return found, found.codes, {}
            seen = hooks.straight_through(latents=latents, codes=found.codes, extras=found.extras)
            check_seen(hooks, seen, found.codes)
            if not hooks.providers("embedding_loss"):
                return found, seen, {}
            losses = hooks.embedding_loss(
                latents=latents, codes=found.codes, indices=found.indices, extras=found.extras, codebook=codebook,
                progress=progress,
            )
            return found, seen, check_losses(hooks, "embedding_loss", losses, latents.device)

    def reconstruction_losses(
        self, images: Tensor, reconstructions: Tensor, discriminator: nn.Module | None, progress: Progress
    ) -> list[dict[str, Tensor]]:
        """Return the losses on reconstructions [B, 3, H, W], of each plugin that has any."""
        hooks = self.hooks
        found = hooks.reconstruction_loss(
            images=images, reconstructions=reconstructions, discriminator=discriminator,
            last_layer=self.decoder.last_layer, progress=progress,
        )
        return [check_losses(hooks, "reconstruction_loss", found[n], images.device, n) for n in range(len(found))]

    def discriminator_losses(
        self, images: Tensor, reconstructions: Tensor, discriminator: nn.Module, progress: Progress
    ) -> dict[str, Tensor]:
        """Return the discriminator's losses on images and detached reconstructions [B, 3, H, W]."""
        hooks = self.hooks
        found = hooks.discriminator_loss(
            images=images, reconstructions=reconstructions, discriminator=discriminator, progress=progress
        )
        return check_losses(hooks, "discriminator_loss", found, images.device)

    @torch.no_grad()
    def report(self, progress: Progress) -> dict[str, float]:
        """Return the numbers that plugins report; a name that two use, or a value that is no number, is a PluginError."""
        merged: dict[str, float] = {}
        for number, numbers in enumerate(self.hooks.report(progress=progress)):
            for name, value in numbers.items():
                if name in merged:
                    raise PluginError(f"{self.hooks.served('report', number)}, returned the number {name!r}, as another plugin "
                                      "does; give one another name")
                try:
                    merged[name] = float(value)
                except (TypeError, ValueError, RuntimeError) as error:
                    raise PluginError(f"{self.hooks.served('report', number)}, returned as number {name!r} {kind_of(value)} "
                                      "where a number or a 0-dim tensor is expected") from error
        return merged

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the indices [B, h, w] or [B, h, w, Q] of images [B, 3, H, W] in [-1, 1], as evaluation sees them."""
        with _evaluating(self):
            indices, grid = self._encode(images)
        if indices is None:
            raise UserError("this tokenizer is not discrete: its method gives no indices")
        return indices.unflatten(1, grid)

    def _encode(self, images: Tensor) -> tuple[Tensor | None, tuple[int, int]]:
        with self.codebook.one_forward():
            latents, grid = self.latents(images)
            return self._quantize(latents, grid, None)[0].indices, grid

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Return the images [B, 3, H, W] of indices [B, h, w] or [B, h, w, Q]; not clamped, as from `forward`."""
        if indices.dim() not in (3, 4) or indices.is_floating_point() or indices.is_complex() or 0 in indices.shape[1:]:
            raise ValueError(f"indices must be integers [B, h, w] or [B, h, w, Q], not {indices.dtype} {list(indices.shape)}")
        indices = indices.long()  # unsigned types know no minimum
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.codebook.size:
            raise ValueError(f"indices must be in [0, {self.codebook.size}), not {int(indices.min())} … {int(indices.max())}")
        grid = (indices.shape[1], indices.shape[2])
        with _evaluating(self):
            codes = self.codebook.lookup(indices.flatten(1, 2))
            if codes.shape[2:] != (self.codebook.width,):
                raise ValueError(f"indices {list(indices.shape)} have another number of codes per token than this tokenizer's")
            return self.decoder(_to_map(self._leave(codes), grid)).float()

    # ---- the exported form

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors: all that encoding and decoding need, and no more.

        Complete or not there at all. Of a folder that exists, these two files alone are replaced; a UserError if it is
        neither empty nor a tokenizer.
        """
        folder = Path(folder).resolve()
        _check_target(folder)
        hooks = {name: self.hooks.providers(name) for name in INFERENCE}
        # a plugin without hooks is there for what its module registers, an encoder of timm's for example
        kept = [name for name, plugin in self.plugins.items()
                if any(name in names for names in hooks.values()) or not offered_hooks(type(plugin))]
        config = plain(self.config)
        config["encoder"] |= {"pretrained": False, **plain(self.encoder.portable())}
        config["plugins"] = {name: config["plugins"][name] for name in kept}
        config["hooks"] = hooks
        config["versions"] = versions(kept)
        partial = folder.parent / f".partial_{folder.name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            write_tensors(partial / WEIGHTS, self._release_state(kept), {"format": "pt", "library": "vqzoo"})
            write_text(partial / CONFIG, json.dumps(config, indent=2) + "\n")
            _publish(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _release_state(self, plugins: list[str]) -> dict[str, Tensor]:
        def kept(name: str) -> bool:
            return not name.startswith("plugins.") or name.split(".")[1] in plugins

        # cloned, since safetensors refuses tensors that share memory
        return {n: t.detach().cpu().contiguous().clone() for n, t in self.state_dict().items() if kept(n)}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Load an exported tokenizer, or the one in a run's folder, in evaluation mode; every tensor must fit.

        It may be a stranger's: no other file is opened, whatever the configuration names, and no code runs but that of
        installed plugins.
        """
        folder = Path(folder)
        folder = folder / "tokenizer" if os.path.isfile(folder / "tokenizer" / CONFIG) else folder
        config_file, weights = folder / CONFIG, folder / WEIGHTS
        if not os.path.isfile(config_file) or not os.path.isfile(weights):
            raise UserError(f"{folder}: neither an exported tokenizer (config.json and model.safetensors) nor a finished run")
        try:
            tokenizer = cls(_read_config(config_file))
        except UserError as error:
            raise UserError(f"{config_file}: {str(error).removeprefix(f'{config_file}: ')}") from error
        except (MemoryError, RuntimeError) as error:  # of sizes that this machine has no memory for
            text = (str(error) or repr(error)).partition("\n")[0]
            raise UserError(f"{config_file}: no tokenizer can be made of it: {text}") from error
        try:
            tokenizer.load_state_dict(load_file(weights))
        except Exception as error:
            raise UserError(f"{weights}: does not fit {config_file.name}: {error}") from error
        return tokenizer.eval().requires_grad_(False)


def _check_target(folder: Path) -> None:
    """Refuse to export into a file or into somebody else's folder."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file is in the place of the tokenizer's folder; name another one")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            _read_config(folder / CONFIG)
        except (UserError, OSError) as error:
            raise UserError(f"{folder}: holds something else than a tokenizer and is left alone; name another") from error


def _publish(partial: Path, folder: Path) -> None:
    """Move a complete export into place."""
    if not folder.exists():
        partial.rename(folder)
        return
    for name in (WEIGHTS, CONFIG):
        (partial / name).replace(folder / name)


def _read_config(path: Path) -> TokenizerConfig:
    """Read a configuration, which may be a stranger's: it names no other file, and its numbers are possible ones."""
    try:
        content = json.loads(path.read_text())
        content.pop("versions", None)
        refuse_resolvers(content, str(path))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TokenizerConfig), content))
    except (ValueError, TypeError, AttributeError, RecursionError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not a tokenizer's configuration: {str(error).splitlines()[0]}") from error
    if ":" in config.encoder.name:
        raise UserError(f"{path}: encoder.name: {config.encoder.name!r} names a hub or another folder, which is not opened; "
                        "give timm's name of the architecture")
    config.encoder.pretrained = False
    config.encoder.args.pop("checkpoint_path", None)  # timm would load this file too
    if len(config.resolution) != 2 or min(config.resolution) < 1:
        raise UserError(f"{path}: resolution: {config.resolution!r} will not do; it must be [height, width] in pixels")
    numbers = {"encoder.stride": config.encoder.stride, "codebook.size": config.codebook.size,
               "codebook.width": config.codebook.width}
    for key, value in numbers.items():
        if not 1 <= value < 2**31:
            raise UserError(f"{path}: {key}: {value!r} will not do; it must be in [1, 2**31)")
    return config


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Compute in float32 inside this block, on devices that would do otherwise."""
    known = torch.amp.is_autocast_available(device.type)  # "meta", on which sizes are found out, is no such device
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lay tokens [B, N, D] out as [B, D, h, w]."""
    return tokens.transpose(1, 2).unflatten(2, grid).contiguous()


class _evaluating:
    """Hold a tokenizer in evaluation mode for the length of a block."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __enter__(self) -> None:
        self.mode = self.tokenizer.training
        self.tokenizer.eval()

    def __exit__(self, *_: Any) -> None:
        self.tokenizer.train(self.mode)
