"""Feature maps of timm networks for losses and discriminators, and networks that are no part of the tokenizer."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vqzoo.errors import UserError


class Features(nn.Module):
    """Return feature maps [B, C, h, w] of images [B, 3, H, W] in [-1, 1], by any timm network.

    `layers` are indices into the network's feature_info, negative from its end, () for all; the maps come from shallow to
    deep whatever their order. `pretrained` and `args` are as an encoder's: True or a path; mean and std, the rest goes to
    timm. Frozen, the network takes no gradient and stays in evaluation. `channels` and `reductions` are those of the maps.
    Raises UserError naming `key`.network, .pretrained or .args, or `key`.`field` for the layers.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[int] = (),
        pretrained: bool | str = False,
        args: dict | None = None,
        frozen: bool = True,
        key: str = "plugins.perceptual",
        field: str = "layers",
    ):
        # Deferred, so that a plugin's import does not load timm.
        from vqzoo.networks import make_timm_model, normalisation

        super().__init__()
        self.name, self.frozen, self.key, self.field = name, frozen, key, field
        self.model = make_timm_model(name, pretrained, args or {}, key=key, field="network")
        if not hasattr(self.model, "forward_intermediates"):
            raise UserError(f"{key}.network: {name} gives no features in this timm; a newer timm may, another network will")
        info = list(self.model.feature_info)
        chosen = self._choose(layers, len(info))
        self.channels = [info[layer]["num_chs"] for layer in chosen]
        self.reductions = [info[layer]["reduction"] for layer in chosen]
        if hasattr(self.model, "prune_intermediate_layers"):
            chosen = self.model.prune_intermediate_layers(chosen, prune_norm=True)
        self.layers = list(chosen)
        for part, value in normalisation(self.model).items():
            self.register_buffer(part, value, persistent=False)
        if frozen:
            self.requires_grad_(False)
        self.train()
        self._fitting: set[tuple[int, int]] = set()

    def _choose(self, layers: Sequence[int], number: int) -> list[int]:
        """Return the wanted indices from 0, sorted."""
        for layer in layers:
            if not -number <= layer < number:
                raise UserError(f"{self.key}.{self.field}: {layer} is none of {self.name}'s features; they are 0 to "
                                f"{number - 1}, or -1 to {-number} from the end")
        return sorted({layer % number for layer in layers or range(number)})

    def train(self, mode: bool = True) -> "Features":
        """Set the training mode, which a frozen network never enters."""
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> list[Tensor]:
        size = tuple(images.shape[-2:])
        try:
            features = self.model.forward_intermediates(
                (images * 0.5 + 0.5 - self.mean) / self.std, indices=self.layers, output_fmt="NCHW", stop_early=True,
                intermediates_only=True,
            )
        except (AssertionError, RuntimeError, ValueError) as error:  # what timm and torch raise for a size that cannot be
            if size in self._fitting or isinstance(error, torch.OutOfMemoryError):
                raise
            height, width = size
            raise UserError(
                f"{self.key}.network: {self.name} cannot process batches of {len(images)} and {height}x{width}: {error}; where "
                f"the network knows it, {self.key}.args: {{dynamic_img_size: true}} or {{img_size: [{height}, {width}]}} mends "
                "this, else choose another network or data.resolution"
            ) from error
        self._fitting.add(size)
        return features


class Frozen:
    """Hold a network that is no part of the tokenizer, such as a loss's: call it like the network.

    `make` returns the network, and is asked at the first call. The network takes no gradient itself and stays in evaluation;
    it is in no state_dict and no list of parameters, a copy of its owner shares it, and it moves to the device of a call's
    first argument. A plugin keeps it under a name that begins with an underscore: it is no state. `bf16` runs it under
    autocast in bfloat16, whatever is around it, and `compile` by torch.compile.
    """

    def __init__(self, make: Callable[[], nn.Module], bf16: bool = False, compile: bool = False):
        self.make, self.bf16, self.compile = make, bf16, compile
        self.network: nn.Module | None = None
        self.device = torch.device("cpu")

    def __call__(self, first: Tensor, *others: Any, **options: Any) -> Any:
        if self.network is None:
            from vqzoo.networks import channels_last  # deferred, so that a plugin's import does not load timm

            with torch.random.fork_rng(devices=[]):  # a resumed run makes it at another step
                self.network = channels_last(self.make().eval().requires_grad_(False))
            self._run = compiled(self.network) if self.compile else self.network
        if self.device != first.device:
            self.network.to(first.device)
            self.device = first.device
        with torch.autocast(first.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            return self._run(first, *others, **options)

    def __deepcopy__(self, memo: dict) -> "Frozen":
        return self

    def __reduce__(self) -> tuple:
        return Frozen, (self.make, self.bf16, self.compile)


def compiled(network: nn.Module) -> Callable:
    """Return what torch.compile makes of a network, for each size of its input by itself; state_dicts do not change."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # an adaptive weight goes backward through a graph that is needed again
    return torch.compile(network, dynamic=False)
