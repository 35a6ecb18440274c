"""LPIPS (arXiv 1801.03924): the distance of images in the features of a classifier, weighted as people judged."""

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from vqzoo import Frozen, Plugin, UserError, check_weights, hookimpl, load_published

NETWORKS = {
    "alex": ("alexnet", (1, 4, 7, 9, 11), 31),
    "squeeze": ("squeezenet1_1", (1, 4, 7, 9, 10, 11, 12), 17),
    "vgg": ("vgg16", (3, 8, 15, 22, 29), 16),
}
"""torchvision's name, the layers whose outputs are compared, and the least side of an image, in pixels."""


class Distance(nn.Module):
    """Return the LPIPS distances [B] of reconstructions and images [B, 3, H, W] in [-1, 1]; neither is clamped.

    The judged weights of the features are those of version 0.1, as torchmetrics ships them.
    """

    def __init__(self, network: str, weights: str | None):
        import torchvision  # deferred, since it is slow to load

        super().__init__()
        self.name = network
        name, self.layers, self.smallest = NETWORKS[network]
        with torch.device("meta"):
            self.backbone = getattr(torchvision.models, name)(weights=None).features[: self.layers[-1] + 1]
        load_published(self.backbone, name, weights, "plugins.lpips.weights", "features.")
        folder = Path(find_spec("torchmetrics").origin).parent  # importing it takes seconds
        heads = torch.load(folder / f"functional/image/lpips_models/{network}.pth", map_location="cpu", weights_only=True)
        for number in range(len(self.layers)):
            self.register_buffer(f"head{number}", heads[f"lin{number}.model.1.weight"])
        for key, value in (("shift", (-0.030, -0.088, -0.188)), ("scale", (0.458, 0.448, 0.450))):
            self.register_buffer(key, torch.tensor(value).view(3, 1, 1))

    def forward(self, reconstructions, images):
        if min(images.shape[-2:]) < self.smallest:
            raise UserError(f"plugins.lpips.network: {self.name} needs images of {self.smallest} pixels or more and gets "
                            f"{images.shape[-2]}x{images.shape[-1]}; choose another network or a larger data.resolution")
        with torch.no_grad():
            wanted = self.features(images)
        distances = 0
        for number, (made, aim) in enumerate(zip(self.features(reconstructions), wanted, strict=True)):
            weighted = (made - aim).square() * getattr(self, f"head{number}")[0]
            distances = distances + weighted.sum(1).mean((1, 2))
        return distances

    def features(self, images):
        """Return the chosen layers' outputs [B, C, h, w], of unit length over channels."""
        x, found = (images - self.shift) / self.scale, []
        for number, layer in enumerate(self.backbone):
            x = layer(x)
            if number in self.layers:
                feature = x.float()  # bfloat16 would drown the differences of unit features in its rounding
                # eps inside the root, or a position without any activation would have an infinite gradient
                found.append(feature / (feature.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return found


class LPIPS(Plugin):
    """LPIPS loss: weighted mean over the batch of the learned perceptual distance of images and reconstructions.

    network is vgg, alex or squeeze. weights is the path of torchvision's file for it (a .pth or .safetensors state dict of the
    classifier); null takes it from torch hub's cache or downloads it there. float32 whatever the recipe's precision, unless
    `bf16` lets the convolutions run in bfloat16: that moved the loss by less than 0.1% and an image's gradient by 15 to 45% of
    its length (on a CPU, networks with random weights). `compile` runs the network by torch.compile.
    """

    @dataclass
    class Config:
        network: str = "vgg"
        weight: float = 1.0
        weights: str | None = None
        bf16: bool = False
        compile: bool = False

        def __post_init__(self):
            check_weights(self, "weight")
            if self.network not in NETWORKS:
                raise ValueError(f"network: {self.network!r} is no network of LPIPS; choices: {', '.join(NETWORKS)}")

    def __init__(self, config):
        super().__init__(config)
        self._distance = Frozen(partial(Distance, config.network, config.weights), config.bf16, config.compile)

    def loss_names(self):
        return ("lpips",)

    @hookimpl
    def reconstruction_loss(self, images, reconstructions):
        with torch.autocast(images.device.type, enabled=False):
            return {"lpips": self.config.weight * self._distance(reconstructions.float(), images.float()).mean()}
