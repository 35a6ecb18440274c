"""Distances of two sets of images, by a network's features."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vqzoo.ops.collective import all_reduce_sum

SUBSETS, SUBSET, NEIGHBOURS = 100, 1000, 3
"""KID's number of random subsets and their greatest size; the neighbour whose distance is a ball's radius."""


@dataclass
class Moments:
    """Hold how many features [n, D] were seen, their sum [D] and the sum of their outer products [D, D], in float64."""

    count: Tensor
    sum: Tensor
    products: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> "Moments":
        kind = {"dtype": torch.float64, "device": device}
        return cls(torch.zeros(1, **kind), torch.zeros(width, **kind), torch.zeros(width, width, **kind))

    @classmethod
    def known(cls, mean: Tensor, covariance: Tensor) -> "Moments":
        """Take a published mean [D] and covariance [D, D], whose number of images is not said."""
        count = torch.full((1,), 2.0**40, dtype=torch.float64)  # so many that the sample's covariance is the set's
        mean = mean.double()
        return cls(count, mean * count, covariance.double() * (count - 1) + count * mean[:, None] * mean)

    def add(self, features: Tensor) -> None:
        """Add features [n, D]."""
        features = features.double()
        self.count += len(features)
        self.sum += features.sum(0)
        self.products += features.T @ features

    def over_processes(self) -> "Moments":
        """Return the moments of all processes' features; called by every process."""
        return Moments(*(all_reduce_sum(part) for part in (self.count, self.sum, self.products)))

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Return the mean [D] and the covariance [D, D] of the sample; NaN of fewer than two features."""
        mean = self.sum / self.count
        return mean, (self.products - self.count * mean[:, None] * mean) / (self.count - 1).clamp(min=0)


def frechet_distance(one: Moments, other: Moments) -> float:
    """Return the Fréchet distance of two Gaussians with these moments; NaN for fewer than two images or features not finite.

    The trace of the root of the covariances' product is the sum of the singular values of the product of their roots, which
    keeps half of float64's digits that the eigenvalues of the product lose where there are fewer images than dimensions.
    """
    if min(one.count, other.count) < 2:
        return float("nan")
    (mean_one, one), (mean_other, other) = (
        [part.cpu() for part in moments.mean_and_covariance()] for moments in (one, other)
    )
    if not (one.isfinite().all() and other.isfinite().all()):
        return float("nan")
    common = torch.linalg.svdvals(_root(one) @ _root(other)).sum()
    return float((mean_one - mean_other).square().sum() + one.trace() + other.trace() - 2 * common)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def kernel_distance(features: Tensor, other: Tensor) -> tuple[float, float]:
    """Return KID (arXiv 1801.01401), mean and standard deviation over subsets, of features [n, D] and [m, D].

    The unbiased estimate by the cubic kernel, on 100 random subsets of 1,000 each, or of all where there are fewer; it may
    be negative. NaN of fewer than two images.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(SUBSET, len(features), len(other))
    if size < 2:
        return float("nan"), float("nan")
    subsets = 1 if size == len(features) == len(other) else SUBSETS  # each would be the whole
    found = kid_features_to_metric(features.double(), other.double(), kid_subsets=subsets, kid_subset_size=size,
                                   rng_seed=2020, verbose=False)
    return float(found[KEY_METRIC_KID_MEAN]), float(found[KEY_METRIC_KID_STD])


def precision_recall(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return improved precision and recall (arXiv 1904.06991) of features [n, D] towards a reference [m, D].

    A point counts where it lies in the ball of any point of the other set, which reaches to that point's third neighbour
    among its own. NaN of fewer than four images.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    if min(len(features), len(reference)) <= NEIGHBOURS:
        return float("nan"), float("nan")
    return calculate_precision_recall_part(features.double(), reference.double(), NEIGHBOURS, batch_size=1000)
