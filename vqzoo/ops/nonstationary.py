"""The dense loss that lets every code follow a moving encoder, without the matrix of all weights."""

import torch
from torch import Tensor

from vqzoo.ops.backends import WIDEST, check_widths, exact_float32, resolve, settle

TILES = {"cpu": (256, 2048), "cuda": (2048, 16384)}
"""Latents and codes that are looked at together: what a CPU keeps close, what gives a GPU enough to do per launch."""

MOST = 2**25
"""Weights that are kept at a time, those of a tile of latents and all codes; where there are more, codes are read twice."""

# Vectorised exp slows down several times where it underflows, and products of denormals slow the matrix product after
# it: stop just before and write zeros instead.
LOWEST_EXPONENT = -80.0
LOWEST_WEIGHT = 2e-35  # just above exp(LOWEST_EXPONENT)


def nonstationary_loss(
    latents: Tensor,
    vectors: Tensor,
    indices: Tensor,
    temperature: float,
    *,
    skip: float = 0.0,
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """Return how far the codes that latents [M, D] did not choose are from them, weighted by nearness: a 0-dim loss.

    1/(M·D) Σ_i Σ_{j≠q_i} p_ij d_ij with d_ij = |z_i - c_j|² and p = softmax_j(-d_ij / temperature), a constant, over all
    of `vectors` [K, D]; `indices` [M] holds the winners q, whose share of p is dropped and not redistributed. The
    gradient goes to `vectors` alone, and has none itself. The mean is over this process. `skip` allows to leave tiles of codes
    out that have at most that share of a latent's p between them: it changes the loss by no more than skip · max d / D and
    the gradient's rows by no more than 2 · skip · max √d / D in sum of norms. See `use` for the other options; precision
    "fast" shortens the products on a GPU. Source: NSVQ, arXiv 2606.11363, eq. 9 and 10.
    """
    check_widths(latents, vectors)
    if indices.shape != latents.shape[:1]:
        raise ValueError(f"indices must be [M] = [{len(latents)}], not {list(indices.shape)}")
    if not 1e-30 < temperature < 1e30:
        raise ValueError(f"temperature must be positive, and within what float32 can divide by, not {temperature}")
    if not 0 <= skip < 1:
        raise ValueError(f"skip must be a share of at least 0 and below 1, not {skip}")
    differentiate = vectors.requires_grad and torch.is_grad_enabled()
    return _nonstationary(
        latents.detach(), vectors, indices.detach(), float(temperature), float(skip), *settle(backend, precision), differentiate
    )[0]


@torch.library.custom_op("vqzoo::nonstationary_loss", mutates_args=())
def _nonstationary(
    latents: Tensor, vectors: Tensor, indices: Tensor, temperature: float, skip: float, backend: str, exact: bool,
    differentiate: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient [K, D], which is empty unless asked for."""
    backend = resolve(
        backend, latents.device, len(latents), *vectors.shape, WIDEST["exact loss" if exact else "fast loss"])
    if indices.device.type == "cpu" and len(indices):  # an accelerator would have to wait
        low, high = indices.aminmax()
        if low < 0 or high >= len(vectors):
            raise ValueError(f"indices {int(low)}..{int(high)} are outside {len(vectors)} codes")
    with exact_float32(latents.device):
        codes = vectors.detach().float()
        if backend == "triton":
            from vqzoo.ops import kernels

            loss, gradient = kernels.nonstationary(latents.float(), codes, indices, temperature, differentiate, skip, exact)
        elif backend == "eager":
            loss, gradient = _eager(latents, codes, indices, temperature, differentiate)
        else:
            loss, gradient = _chunked(latents, codes, indices, temperature, differentiate, skip)
    return loss, vectors.new_empty(0) if gradient is None else gradient.to(vectors.dtype)


@_nonstationary.register_fake
def _(latents, vectors, indices, temperature, skip, backend, exact, differentiate):
    return latents.new_empty((), dtype=torch.float32), vectors.new_empty(vectors.shape if differentiate else (0,))


def _keep_gradient(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, scale: Tensor, _):
    (gradient,) = ctx.saved_tensors
    return None, gradient * scale, None, None, None, None, None, None


_nonstationary.register_autograd(_backward, setup_context=_keep_gradient)


def _eager(latents: Tensor, vectors: Tensor, indices: Tensor, temperature: float, differentiate: bool):
    """Do it by the plain formula, in float64 and M·K·D memory."""
    latents, vectors = latents.double(), vectors.double()
    distances = (vectors - latents[:, None]).square().sum(2)
    weights = torch.softmax(distances / -temperature, 1).scatter(1, indices[:, None].long(), 0.0)
    elements = max(1, latents.numel())
    loss = (weights * distances).sum().float() / elements
    if not differentiate:
        return loss, None
    return loss, (vectors * weights.sum(0)[:, None] - weights.t() @ latents).mul_(2 / elements).float()


def _chunked(latents: Tensor, vectors: Tensor, indices: Tensor, temperature: float, differentiate: bool, skip: float):
    """Return the loss [] and, if asked for, its gradient to vectors [K, D], one tile of latents at a time.

    With P the weights p without the winners': gradient = 2/(M·D) (diag(Pᵀ1) C - Pᵀ Z).
    """
    mean = vectors.mean(0)  # distances from it are the same, and keep more digits
    if not len(latents):
        return vectors.new_zeros(()), torch.zeros_like(vectors) if differentiate else None
    sums = _Sums(vectors - mean, len(latents), temperature, differentiate, skip)
    tiles = zip(latents.split(sums.rows), indices.split(sums.rows), strict=True)
    losses = [sums.add(tile.float() - mean, winners.long()[:, None]) for tile, winners in tiles]
    elements = latents.numel()
    loss = (torch.cat(losses).double().sum() / elements).float()
    return loss, sums.gradient().mul_(2 / elements) if differentiate else None


class _Sums:
    """Add up, over tiles of latents, what the gradient needs: each code's weight [K] and weighted latents [K, D].

    A tile of codes has weights relative to its own nearest code, so that they need not be touched again when the sum over
    all codes is known: what scales them is multiplied to the latents.
    """

    def __init__(self, vectors: Tensor, count: int, temperature: float, differentiate: bool, skip: float):
        size = len(vectors)
        rows, columns = TILES.get(vectors.device.type, TILES["cpu"])
        self.rows, columns = max(1, min(rows, count)), min(columns, size)
        self.vectors, self.temperature, self.differentiate, self.skip = vectors, temperature, differentiate, skip
        self.bias = vectors.square().sum(1).div_(-temperature)
        self.masses = vectors.new_zeros(size)
        self.pulls = torch.zeros_like(vectors) if differentiate else None
        self.parts = [slice(start, min(start + columns, size)) for start in range(0, size, columns)]
        self.keep = differentiate and self.rows * columns * len(self.parts) <= MOST
        self.scores = vectors.new_empty(self.rows * columns)
        self.kept = vectors.new_empty(len(self.parts) if self.keep else 1, self.rows * columns)

    def add(self, latents: Tensor, winners: Tensor) -> Tensor:
        """Take in latents [n, D], centred as the codes are, with their winners [n, 1]; return their losses [n]."""
        found = [self.tile(number, latents, winners) for number in range(len(self.parts))]
        tops, sums, owns, products = (torch.stack(part, 1) for part in zip(*found, strict=True))  # [n, tiles]
        scale = (tops - tops.amax(1, keepdim=True)).exp_()
        scale /= ((sums + owns) * scale).sum(1, keepdim=True)
        taken = (sums * scale).amax(0) > self.skip / len(self.parts)
        scale *= taken
        for number in taken.nonzero().flatten().tolist() if self.differentiate else ():
            if not self.keep:
                self.tile(number, latents, winners, tops[:, number])
            codes, weights = self.parts[number], self.weights(number, len(latents))
            self.masses[codes].addmv_(weights.t(), scale[:, number])
            self.pulls[codes].addmm_(weights.t(), latents * scale[:, number, None])
        nearest = (latents.square().sum(1, keepdim=True) - self.temperature * tops).clamp_(min=0)
        return ((nearest * sums - self.temperature * products) * scale).sum(1)

    def tile(self, number: int, latents: Tensor, winners: Tensor, top: Tensor | None = None) -> tuple[Tensor, ...]:
        """Weigh one tile of codes: return for each latent the highest logit, Σ w, the winner's w, and Σ w·(logit - highest).

        The logit is (2 z·c - |c|²) / temperature, since |z|² is the same for every code; w = exp(logit - highest), but zero
        for the winner, since 1 - p of the winner would cancel.
        """
        codes, weights = self.parts[number], self.weights(number, len(latents))
        logits = self.scores[: weights.numel()].view(weights.shape)
        torch.addmm(self.bias[codes], latents, self.vectors[codes].t(), alpha=2 / self.temperature, out=logits)
        top = logits.amax(1) if top is None else top
        logits.sub_(top[:, None])
        torch.clamp(logits, min=LOWEST_EXPONENT, out=weights).exp_()
        torch.threshold_(weights, LOWEST_WEIGHT, 0.0)
        place = (winners - codes.start).clamp(0, weights.shape[1] - 1)
        here, own = place == winners - codes.start, weights.gather(1, place)
        weights.scatter_(1, place, own.masked_fill(here, 0.0))
        return top, weights.sum(1), own.masked_fill(~here, 0.0)[:, 0], logits.mul_(weights).sum(1)

    def weights(self, number: int, count: int) -> Tensor:
        """Return the buffer [n, k] of a tile's weights."""
        codes = self.parts[number]
        width = codes.stop - codes.start
        return self.kept[number if self.keep else 0, : count * width].view(count, width)

    def gradient(self) -> Tensor:
        """Return diag(Pᵀ1) C - Pᵀ Z [K, D]; the codes are overwritten."""
        return self.vectors.mul_(self.masses[:, None]).sub_(self.pulls)
