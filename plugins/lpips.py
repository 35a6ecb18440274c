"""The LPIPS loss (arXiv 1801.03924): how unlike two images look to people, by the features of a classifier."""

from dataclasses import dataclass
from functools import partial

import torch

from vqzoo import Frozen, LPIPSDistance, Plugin, check_weights, hookimpl

NETWORKS = ("alex", "squeeze", "vgg")


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
        self._distance = Frozen(partial(LPIPSDistance, config.network, config.weights), config.bf16, config.compile)

    def loss_names(self):
        return ("lpips",)

    @hookimpl
    def reconstruction_loss(self, images, reconstructions):
        with torch.autocast(images.device.type, enabled=False):
            return {"lpips": self.config.weight * self._distance(reconstructions.float(), images.float()).mean()}
