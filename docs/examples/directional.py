"""straight_through: another gradient for the encoder (DiVeQ, arXiv 2509.26469, without its noise)."""

import torch.nn.functional as F

from vqzoo import Plugin, hookimpl


class Directional(Plugin):
    """Directional estimator: the code is the latent and an error of a fixed direction, through whose length gradients pass."""

    @hookimpl
    def straight_through(self, latents, codes):
        error = codes - latents
        return latents + error.norm(dim=-1, keepdim=True) * F.normalize(error, dim=-1).detach()
