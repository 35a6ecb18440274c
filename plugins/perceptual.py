"""A perceptual loss on the features of any timm network: weights of classifiers, of self-supervision, or none."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from vqzoo import Features, Frozen, Plugin, check_weights, hookimpl


class Perceptual(Plugin):
    """Perceptual loss: weighted squared distance of images and reconstructions in the features of any timm network.

    At each position of a layer the features f [C] are scaled to u(f) = f / √(Σ f² + 10⁻⁸), which is arXiv 1801.03924's way; the
    loss is weight · mean over layers of mean over images and positions of Σ (u(f) − u(f'))², so 0 to 4 · weight. It has no
    judged weights and so its numbers are not LPIPS. layers are indices into the network's feature_info, [] for all; the early
    ones see texture, and a network's last is best left out. At weight 1 its
    gradient is tens of times that of an L1 loss of weight 1, hence the default. pretrained and args are as an encoder's: true
    or a path, mean and std, the rest goes to timm. float32 whatever the recipe's precision, unless `bf16` lets the network run
    in bfloat16: that moved the loss by 0.02% and an image's gradient by 41% of its length (on a CPU, mobilenetv2_100 with its
    weights). `compile` runs it by torch.compile.
    """

    @dataclass
    class Config:
        network: str = "mobilenetv2_100"
        layers: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
        pretrained: bool | str = True
        args: dict[str, Any] = field(default_factory=dict)
        weight: float = 0.1
        bf16: bool = False
        compile: bool = False

        def __post_init__(self):
            check_weights(self, "weight")

    def __init__(self, config):
        super().__init__(config)
        make = partial(Features, config.network, config.layers, config.pretrained, config.args)
        self._features = Frozen(make, config.bf16, config.compile)

    def loss_names(self):
        return ("perceptual",)

    @hookimpl
    def reconstruction_loss(self, images, reconstructions):
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                wanted = self._features(images.float())
            made = self._features(reconstructions.float())
            distances = [(unit(m) - unit(w)).square().sum(1).mean() for m, w in zip(made, wanted, strict=True)]
            return {"perceptual": self.config.weight * torch.stack(distances).mean()}


def unit(features):
    """Return features [B, C, h, w] of unit length over channels; eps inside the root keeps the gradient at zero finite."""
    features = features.float()  # bfloat16 would drown the differences of unit features in its rounding
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()
