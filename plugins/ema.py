"""Moving averages instead of a codebook loss: VQ-VAE's appendix (arXiv 1711.00937) and VQ-VAE-2 (arXiv 1906.00446)."""

from dataclasses import dataclass
from math import isfinite

import torch

from vqzoo import Codebook, Plugin, Table, UserError, hookimpl
from vqzoo.ops import broadcast, code_sums


class AveragedTable(Codebook):
    """Hold the codes c [K, D] and N [K], the moving average of how often a step chooses each; neither takes a gradient.

    The third quantity of the published update, the sums m [K, D], is c · N̂ by definition and kept nowhere: whoever writes a
    row has thereby written its sum.
    """

    def __init__(self, size: int, width: int, init: str):
        super().__init__(size, width)
        self.register_buffer("table", Table(size, width, init).weight.detach())
        self.register_buffer("counts", torch.ones(size))

    def compute_vectors(self):
        return self.table

    def write(self, rows, vectors):
        """Overwrite rows as if each had been chosen once per step: they follow their latents soon and do not shrink before."""
        self.table[rows] = vectors.to(self.table)
        self.counts[rows] = 1


class EMA(Plugin):
    """EMA codebook: each code is the moving average of the latents that choose it; for the rest, list it beside `vq`.

    With n_j latents that choose code j in a step, and m_j their sum: N ← decay · N + (1 - decay) · n, likewise the sums, and
    c = m / N̂ with N̂ = (N + eps) / (ΣN + K · eps) · ΣN. The codes take no gradient, so of `vq`'s losses the commitment alone is
    left, and NSVQ's dense loss moves nothing. A code that no latent chooses stands still while its N is far above eps, and then
    shrinks to the origin (at decay 0.99 after a thousand steps); `nsvq` replaces such codes sooner, with its `embedding_loss`
    routed away. As N starts at 1, a start from data (`kmeans`) needs no counts.
    """

    @dataclass
    class Config:
        decay: float = 0.99
        eps: float = 1e-5
        init: str = "normal"

        def __post_init__(self):
            if not 0 <= self.decay < 1:
                raise ValueError(f"decay: {self.decay!r} must be at least 0 and below 1")
            if not (isfinite(self.eps) and self.eps > 0):
                raise ValueError(f"eps: {self.eps!r} must be a positive number")
            if self.init not in ("uniform", "normal"):
                raise ValueError(f"init: {self.init!r} is not an initialisation; choices: normal, uniform")

    def companions(self):
        return {"refresh_codes": ("make_codebook",)}

    @hookimpl
    def make_codebook(self, size, width):
        return AveragedTable(size, width, self.config.init)

    @hookimpl
    def refresh_codes(self, codebook, latents, indices):
        """Move every code by the latents of the step, which were assigned by the codes before."""
        if indices is None:  # nothing was quantized
            return None
        if indices.dim() > 1:
            raise UserError(f"plugins.ema: it averages one code per token, and quantize gives {indices.shape[1]}; route "
                            "hooks.refresh_codes without ema")
        sums, chosen = code_sums(latents, indices, codebook.size)
        decay, before = self.config.decay, codebook.counts
        counts = decay * before + (1 - decay) * chosen
        kept = decay * self.smoothed(before)[:, None] * codebook.vectors()
        vectors = (kept + (1 - decay) * sums) / self.smoothed(counts)[:, None]
        # GPUs round sums as they come, and each process would have others
        codebook.replace_(torch.arange(codebook.size, device=sums.device), broadcast(vectors), smooth=True)
        codebook.counts.copy_(counts)  # which `write` has set to those of a foreign hand
        return None

    def smoothed(self, counts):
        """Return N̂ [K] of N [K]: Laplace smoothing, which keeps the sum and never gives zero."""
        total = counts.sum()
        return (counts + self.config.eps) / (total + len(counts) * self.config.eps) * total
