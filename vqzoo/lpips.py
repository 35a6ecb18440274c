"""LPIPS (arXiv 1801.03924): the distance of images in the features of a classifier, weighted as people judged."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from vqzoo.errors import UserError
from vqzoo.weights import SOURCES, fetch_verified, load_published

NETWORKS = {
    "alex": ("alexnet", (1, 4, 7, 9, 11), 31),
    "squeeze": ("squeezenet1_1", (1, 4, 7, 9, 10, 11, 12), 17),
    "vgg": ("vgg16", (3, 8, 15, 22, 29), 16),
}
"""torchvision's name, the layers whose outputs are compared, and the least side of an image, in pixels."""


class LPIPSDistance(nn.Module):
    """Return the LPIPS distances [B] of reconstructions and images [B, 3, H, W] in [-1, 1]; neither is clamped.

    `network` is alex, squeeze or vgg, `weights` the path of torchvision's file for it, or None for the published one. The
    judged weights of the features are those of version 0.1, as torchmetrics ships them. With `verify`, the published file's
    SHA-256 is checked. A UserError begins with `key`.
    """

    def __init__(self, network: str, weights: str | None = None, key: str = "plugins.lpips", verify: bool = False):
        import torchvision  # deferred, since it is slow to load

        super().__init__()
        self.name, self.key = network, key
        name, self.layers, self.smallest = NETWORKS[network]
        if verify and weights is None:
            fetch_verified(SOURCES[name], key)
        sha256 = SOURCES[name].sha256 if verify else "not checked"
        self.card = {"network": f"LPIPS 0.1 on torchvision's {name}", "sha256": sha256}
        with torch.device("meta"):
            self.backbone = getattr(torchvision.models, name)(weights=None).features[: self.layers[-1] + 1]
        load_published(self.backbone, name, weights, f"{key}.weights", "features.")
        folder = Path(find_spec("torchmetrics").origin).parent  # importing it takes seconds
        heads = torch.load(folder / f"functional/image/lpips_models/{network}.pth", map_location="cpu", weights_only=True)
        for number in range(len(self.layers)):
            self.register_buffer(f"head{number}", heads[f"lin{number}.model.1.weight"])
        for part, value in (("shift", (-0.030, -0.088, -0.188)), ("scale", (0.458, 0.448, 0.450))):
            self.register_buffer(part, torch.tensor(value).view(3, 1, 1))

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < self.smallest:
            raise UserError(f"{self.key}.network: {self.name} needs images of {self.smallest} pixels or more and gets "
                            f"{images.shape[-2]}x{images.shape[-1]}; choose another network or a larger data.resolution")
        with torch.no_grad():
            wanted = self.features(images)
        distances = torch.zeros(len(images), device=images.device)
        for number, (made, aim) in enumerate(zip(self.features(reconstructions), wanted, strict=True)):
            weighted = (made - aim).square() * getattr(self, f"head{number}")[0]
            distances = distances + weighted.sum(1).mean((1, 2))
        return distances

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the chosen layers' outputs [B, C, h, w], of unit length over channels."""
        x, found = (images - self.shift) / self.scale, []
        for number, layer in enumerate(self.backbone):
            x = layer(x)
            if number in self.layers:
                feature = x.float()  # bfloat16 would drown the differences of unit features in its rounding
                # eps inside the root, or a position without any activation would have an infinite gradient
                found.append(feature / (feature.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return found
