"""The heavy arithmetic of quantizers: one public function per operation, on any device."""

from vqzoo.ops.adversarial import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    discriminator_loss,
    generator_loss,
    gradient_ratio,
    input_gradient,
    lecam,
    mean_logit,
)
from vqzoo.ops.assignment import soft_assignments
from vqzoo.ops.backends import BACKENDS, PRECISIONS, use
from vqzoo.ops.collective import all_reduce_sum, broadcast, gather_names, gather_ragged, gather_rows
from vqzoo.ops.embedding import embedding_losses, straight_through
from vqzoo.ops.nearest import nearest_codes, search_disagreement
from vqzoo.ops.nonstationary import nonstationary_loss
from vqzoo.ops.plan import plan
from vqzoo.ops.usage import code_sums, code_usage, perplexity, usage

__all__ = [
    "BACKENDS",
    "DISCRIMINATOR_LOSSES",
    "GENERATOR_LOSSES",
    "PRECISIONS",
    "all_reduce_sum",
    "broadcast",
    "code_sums",
    "code_usage",
    "discriminator_loss",
    "embedding_losses",
    "gather_names",
    "gather_ragged",
    "gather_rows",
    "generator_loss",
    "gradient_ratio",
    "input_gradient",
    "lecam",
    "mean_logit",
    "nearest_codes",
    "nonstationary_loss",
    "perplexity",
    "plan",
    "search_disagreement",
    "soft_assignments",
    "straight_through",
    "usage",
    "use",
]
