"""Vanilla vector quantization: VQ-VAE (arXiv 1711.00937) and VQGAN (arXiv 2012.09841)."""

from dataclasses import dataclass

from vqzoo import Plugin, Quantized, Table, check_weights, hookimpl
from vqzoo.ops import embedding_losses, nearest_codes, straight_through


class VQ(Plugin):
    """Vanilla VQ: the nearest code, the straight-through estimator, a codebook and a commitment loss.

    Every hook yields to another plugin's, so a recipe may keep `vq` for the parts that its method leaves alone.
    """

    @dataclass
    class Config:
        codebook_weight: float = 1.0
        commitment_weight: float = 0.25
        init: str = "uniform"

        def __post_init__(self):
            check_weights(self, "codebook_weight", "commitment_weight")
            if self.init not in ("uniform", "normal"):
                raise ValueError(f"init: {self.init!r} is not an initialisation; choices: normal, uniform")

    @hookimpl(trylast=True)
    def make_codebook(self, size, width):
        return Table(size, width, self.config.init)

    @hookimpl(trylast=True)
    def quantize(self, latents, codebook):
        indices, _ = nearest_codes(latents.flatten(0, 1), codebook.vectors())
        indices = indices.view(latents.shape[:2])
        return Quantized(codebook.lookup(indices), indices)

    @hookimpl(trylast=True)
    def straight_through(self, latents, codes):
        return straight_through(latents, codes)

    @hookimpl(trylast=True)
    def embedding_loss(self, latents, codes):
        return embedding_losses(latents, codes, self.config.codebook_weight, self.config.commitment_weight)
