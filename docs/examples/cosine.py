"""quantize: another search on anyone's codebook."""

import torch.nn.functional as F

from vqzoo import Plugin, Quantized, hookimpl
from vqzoo.ops import nearest_codes


class Cosine(Plugin):
    """Cosine search: choose the code that points the way the latent does."""

    @hookimpl
    def quantize(self, latents, codebook):
        directions = F.normalize(latents.flatten(0, 1), dim=1)
        indices, _ = nearest_codes(directions, F.normalize(codebook.vectors(), dim=1))
        indices = indices.view(latents.shape[:2])
        return Quantized(codebook.lookup(indices), indices)
