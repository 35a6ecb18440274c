"""NSVQ (arXiv 2606.11363): a dense non-stationary embedding loss, code replacement, and a plateau that ends the joint stage."""

from dataclasses import dataclass

import torch

from vqzoo import Plugin, UserError, check_weights, hookimpl
from vqzoo.ops import nonstationary_loss


class NSVQ(Plugin):
    """NSVQ: keeps every code near a drifting encoder; wraps anyone's embedding loss, so combine it with `vq` or `simvq`.

    weight is the paper's α and temperature its τ, on squared distances summed over D. Codes that an epoch never used are
    replaced at its end, after `replace_after` epochs, by copies of their table's active codes, drawn in proportion to counts,
    plus noise of standard deviation `noise`. The stage is over when the epoch mean of the commitment loss has had no new
    minimum for `patience` epochs (eq. 13). While codes are far from where the encoder goes, that loss rises first: where
    epochs are short, `plateau_after` leaves out those of the beginning.
    """

    @dataclass
    class Config:
        weight: float = 0.1
        temperature: float = 0.35
        replace_after: int = 5
        noise: float = 0.001
        patience: int = 10
        plateau_after: int = 0

        def __post_init__(self):
            check_weights(self, "weight", "temperature", "replace_after", "noise", "plateau_after")
            if not self.temperature:
                raise ValueError(f"temperature: {self.temperature!r} must be positive")
            if self.patience < 1:
                raise ValueError(f"patience: {self.patience!r} must be at least 1")

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("best_commitment", torch.tensor(torch.inf, dtype=torch.float64))
        self.register_buffer("epochs_since_best", torch.tensor(0))

    def watched_losses(self):
        return ("commitment",)

    @hookimpl(wrapper=True)
    def embedding_loss(self, latents, indices, codebook):
        """Add the pull of every latent on the codes that it did not choose (eq. 9 and 10)."""
        losses = yield
        if indices is None:  # nothing was quantized
            return losses
        if indices.dim() > 2:
            raise UserError(f"plugins.nsvq: its loss knows one code per token, and quantize gives {indices.shape[2]}; route "
                            "hooks.embedding_loss to the other plugins alone")
        dense = nonstationary_loss(
            latents.flatten(0, 1), codebook.vectors(), indices.flatten(), self.config.temperature
        )
        return {**losses, "nonstationary": self.config.weight * dense}

    @hookimpl
    def refresh_codes(self, codebook, epoch_counts, progress, generator):
        """Replace the codes that the epoch never used."""
        if not progress.ends_epoch or progress.epoch_in_stage < self.config.replace_after:
            return 0
        tables = enumerate(epoch_counts.split(codebook.size))
        return sum(self.replace(codebook, number * codebook.size, counts, generator) for number, counts in tables)

    def replace(self, codebook, first, counts, generator):
        """Replace the codes of the table that begins at row `first` whose counts [K] are zero; return how many."""
        dead = (counts < 1).nonzero().squeeze(1)
        if len(dead) in (0, len(counts)):
            return 0
        donors = torch.multinomial(counts.float(), len(dead), replacement=True, generator=generator)
        vectors = codebook.vectors()[first + donors]
        noise = torch.randn(vectors.shape, generator=generator, device=vectors.device)
        codebook.replace_(first + dead, vectors + self.config.noise * noise)
        return len(dead)

    @hookimpl
    def stage_transition(self, progress):
        """End the stage when the commitment loss has stopped falling."""
        if progress.epoch_in_stage < self.config.plateau_after:
            return None
        commitment = progress.means["commitment"]
        if commitment < self.best_commitment:
            self.best_commitment.fill_(commitment)
            self.epochs_since_best.zero_()
        else:
            self.epochs_since_best += 1
        if self.epochs_since_best >= self.config.patience:
            return f"no new minimum of the commitment loss in {self.config.patience} epochs"
        return None
