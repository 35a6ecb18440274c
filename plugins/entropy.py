"""The entropy loss of MAGVIT-v2 (arXiv 2310.05737) on any codebook: decided tokens, evenly used codes."""

from dataclasses import dataclass

import torch

from vqzoo import Plugin, UserError, all_reduce_sum, check_weights, hookimpl
from vqzoo.ops import soft_assignments


class Entropy(Plugin):
    """Entropy loss: few codes come into question for a token and many for a batch; wraps anyone's embedding loss.

    weight · (sample_weight · mean over tokens of H(p) - batch_weight · H(mean of p)), in nats, with a token's soft assignments
    p = softmax(-d / temperature) by squared distances d, summed over D; so never below -weight · batch_weight · log K. The mean
    of p is over a micro-batch on all processes, which must hold tokens enough to tell how codes are used. Latents and codes
    both move.
    """

    @dataclass
    class Config:
        weight: float = 0.1
        sample_weight: float = 1.0
        batch_weight: float = 1.0
        temperature: float = 0.01

        def __post_init__(self):
            check_weights(self, "weight", "sample_weight", "batch_weight", "temperature")
            if not self.temperature:
                raise ValueError(f"temperature: {self.temperature!r} must be positive")

    @hookimpl(wrapper=True)
    def embedding_loss(self, latents, indices, codebook):
        losses = yield
        if indices is None:  # nothing was quantized
            return losses
        if indices.dim() > 2:
            raise UserError(f"plugins.entropy: it weighs one code per token, and quantize gives {indices.shape[2]}; route "
                            "hooks.embedding_loss to the other plugins alone")
        sample, shares = soft_assignments(latents.flatten(0, 1), codebook.vectors(), self.config.temperature)
        shares = all_reduce_sum(shares) / all_reduce_sum(shares.new_ones(()))
        config = self.config
        return {**losses, "entropy": config.weight * (config.sample_weight * sample - config.batch_weight * entropy(shares))}


def entropy(shares):
    """Return -Σ p log p of shares p [K]; the gradient of a share of zero is finite."""
    return -(shares * shares.clamp(min=torch.finfo(shares.dtype).tiny).log()).sum()
