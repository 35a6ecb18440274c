"""The nearest code of each latent, as float64 would find it, without the matrix of all distances."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vqzoo.ops.backends import WIDEST, check_widths, exact_float32, resolve, settle

# Latents and codes in one tile of scores; a GPU needs larger tiles to outlast their launches.
TILES = {"cpu": (512, 2048), "cuda": (1024, 16384)}

LEAST = 2.0**-50
"""What a scan takes for the norm of anything smaller, so that the bound exceeds the error of products that underflow."""

BLOCK = 64
"""Groups of codes that are looked at together."""


def nearest_codes(
    latents: Tensor, vectors: Tensor, *, backend: str | None = None, precision: str | None = None
) -> tuple[Tensor, Tensor]:
    """Find the nearest of `vectors` [K, D] to each of `latents` [M, D]: indices [M] and squared distances [M].

    The indices are those of the least distance in float64 between the float32 values, the lowest index among equals, whatever
    the inputs' type, the backend and the autocast; precision "fast" gives the certainty up, but not the float64 comparison of
    the candidates. Memory beyond the inputs is O(M + K·D). A latent that is not finite gets index 0 and distance NaN, a code
    that is not finite is never chosen where another one is. Nothing here has a gradient. See `use` for the two options.
    """
    check_widths(latents, vectors)
    return _nearest_codes(latents.detach(), vectors.detach(), *settle(backend, precision))


def search_disagreement(latents: Tensor, vectors: Tensor) -> float:
    """Return the share of latents [M, D] for which "fast" chooses another of `vectors` [K, D] than "exact": 0 to 1."""
    fast, exact = (nearest_codes(latents, vectors, precision=precision)[0] for precision in ("fast", "exact"))
    return float((fast != exact).float().mean())


@torch.library.custom_op("vqzoo::nearest_codes", mutates_args=())
def _nearest_codes(latents: Tensor, vectors: Tensor, backend: str, exact: bool) -> tuple[Tensor, Tensor]:
    backend = resolve(backend, latents.device, len(latents), *vectors.shape, WIDEST["search"])
    with exact_float32(latents.device):
        latents, vectors = latents.float(), vectors.float()
        if backend == "triton":
            from vqzoo.ops import kernels

            return kernels.nearest(latents, vectors, exact)
        return (_eager if backend == "eager" else _chunked)(latents, vectors, exact)


@_nearest_codes.register_fake
def _(latents: Tensor, vectors: Tensor, backend: str, exact: bool) -> tuple[Tensor, Tensor]:
    return latents.new_empty(len(latents), dtype=torch.int64), latents.new_empty(len(latents), dtype=torch.float32)


def _eager(latents: Tensor, vectors: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Do it by the plain formula, in float64 and M·K·D memory."""
    differences = vectors.double() - latents.double()[:, None]
    everything = torch.arange(len(vectors), device=latents.device).expand(len(latents), -1)
    return _answer(_broken(latents)[0], *_closest(differences, everything))


def _chunked(latents: Tensor, vectors: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Scan tiles of scores for the groups of codes in which the nearest may be; measure only those, in float64."""
    if not len(latents):
        return latents.new_empty(0, dtype=torch.int64), latents.new_empty(0)
    broken, size = _broken(latents)
    lost, size_of_codes = _broken(vectors)
    if lost.all():
        nowhere = torch.full_like(broken, torch.inf, dtype=torch.float64)
        return _answer(broken, torch.zeros_like(broken, dtype=torch.int64), nowhere)
    if broken.any():
        latents = latents.masked_fill(broken[:, None], 0)
    rows, columns = TILES.get(latents.device.type, TILES["cpu"])
    scale = _scale(max(size, size_of_codes))
    search = _Search(vectors.contiguous(), lost, scale, max(1, min(rows, len(latents))), columns, exact)
    found = [search(tile) for tile in latents.split(search.rows)]
    indices, distances = (torch.cat(part) for part in zip(*found, strict=True))
    return _answer(broken, indices, distances)


def _scale(size: float) -> float:
    """Return the power of two by which a scan multiplies numbers of a size: 1 but for those whose squares leave float32."""
    if 2.0**-20 < size < 2.0**55:
        return 1.0
    exponent = 128 if math.isinf(size) else math.frexp(size)[1] if size else -100
    return 2.0 ** max(-120, min(120, 20 - exponent))


def group_of(size: int) -> int:
    """Return how many codes of K share a minimum: many save memory, few are measured sooner."""
    return 2 if size <= 2048 else 8 if size <= 16384 else 16


class _Search:
    """Hold what every tile of latents needs: centred codes, and buffers, since fresh memory costs more than arithmetic.

    The score |c|² - 2 z·c leaves the term |z|² out, which is the same for every code and would only cost digits, and both are
    centred on the codebook's mean, since a common offset would too. A float32 product of D + 2 terms whose inputs are rounded
    once is off by at most (D + 12)·2⁻²⁴ (|c|² + 2|z||c|), in whatever order it sums; 1 % more covers the rounding of the bound
    itself. As one more column of the product, the bound costs nothing. A code that cannot be the answer, since it is not
    finite or repeats an earlier one, gets an infinite score. `scale` keeps squares from overflow; LEAST covers what underflows.
    """

    def __init__(self, vectors: Tensor, broken: Tensor, scale: float, rows: int, columns: int, exact: bool):
        size, width = vectors.shape
        self.vectors, self.scale, self.rows, self.exact = vectors, scale, rows, exact
        self.group = group_of(size)
        self.slack = slack = 1.01 * (width + 12) * 2**-24 if exact else 0.0
        if broken.any():
            vectors = vectors.masked_fill(broken[:, None], 0)
        if scale != 1:
            vectors = vectors * scale
        self.mean = vectors.mean(0)
        padded = size + -size % self.group
        codes = vectors.new_zeros(padded, width + 2)
        centred = torch.sub(vectors, self.mean, out=codes[:size, :width])
        norms = torch.linalg.vector_norm(centred, dim=1)
        squares = norms.square() * (1 - slack)  # before the least is taken, which would raise what must be a lower bound
        norms.clamp_(min=LEAST)
        out = broken | _repeats(self.vectors, norms.masked_fill(broken, 0)) if exact else broken
        codes[:, width] = torch.inf
        codes[:size, width] = torch.where(out, torch.inf, squares)
        codes[:size, width + 1] = -2 * slack * norms
        self.tiles = codes.split(columns)
        everything = torch.arange(padded, device=vectors.device).clamp_(max=size - 1)
        self.members = torch.cat([tile.view(self.group, -1).t() for tile in everything.split(columns)])
        self.radii = norms[self.members].amax(1)
        groups = padded // self.group
        self.scores = vectors.new_empty(rows * min(columns, padded))
        self.lower = vectors.new_full((rows, groups + -groups % BLOCK), torch.inf)
        self.gathered = vectors.new_empty(rows * self.group, width)
        self.differences = vectors.new_empty(rows, self.group, width, dtype=torch.float64)

    def __call__(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest codes [n] of latents [n, D] and their distances [n] in float64."""
        lower, norms = self.bounds(latents)
        blocks = lower.view(len(latents), -1, BLOCK).amin(2)
        block = blocks.min(1, keepdim=True).indices
        within = lower.view(-1, BLOCK)[block[:, 0] + torch.arange(len(latents), device=lower.device) * blocks.shape[1]]
        least = within.min(1)
        group = block[:, 0] * BLOCK + least.indices
        index, distance = self.measure(latents, group)
        if self.exact:
            radius = self.radii[group]
            reached = least.values + 2.02 * self.slack * radius * (radius + 2 * norms)
            lower.scatter_(1, group[:, None], torch.inf)
            for row, others, rivals in self.rivals(latents, lower, blocks, reached[:, None]):
                index, distance = _better(index, distance, row, others, rivals)
        return index, distance

    def bounds(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return a lower bound on the true scores of latents [n, D] in each group, [n, groups], and the latents' norms [n].

        Codes that lie a group's number apart in a tile form a group: its minimum needs no transposition.
        """
        count, done = len(latents), 0
        centred = (latents if self.scale == 1 else latents * self.scale) - self.mean
        norms = torch.linalg.vector_norm(centred, dim=1, keepdim=True).clamp_(min=LEAST)
        augmented = torch.cat([centred.mul_(-2), torch.ones_like(norms), norms], 1)
        lower = self.lower[:count]
        for tile in self.tiles:
            scores = self.scores[: count * len(tile)].view(count, len(tile))
            torch.mm(augmented, tile.t(), out=scores)
            groups = len(tile) // self.group
            torch.amin(scores.view(count, self.group, groups), 1, out=lower[:, done : done + groups])
            done += groups
        return lower, norms[:, 0]

    def measure(self, latents: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest code [n] of one group for each latent [n, D], and its distance [n]."""
        candidates = self.members[groups]
        gathered = torch.index_select(self.vectors, 0, candidates.flatten(), out=self.gathered[: candidates.numel()])
        differences = self.differences[: len(latents)]
        differences.copy_(gathered.view(differences.shape)).sub_(latents.double()[:, None])
        return _closest(differences, candidates)

    def rivals(
        self, latents: Tensor, lower: Tensor, blocks: Tensor, reached: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (rows, codes, distances) of the groups whose lower bound does not exceed the score [n, 1] that is reached."""
        row, block = (~(blocks > reached)).nonzero(as_tuple=True)  # not <=: a NaN excludes nothing
        number, place = (~(lower.view(len(latents), -1, BLOCK)[row, block] > reached[row])).nonzero(as_tuple=True)
        row, group = row[number], block[number] * BLOCK + place
        for some, groups in zip(row.split(self.rows), group.split(self.rows), strict=True):
            yield some, *self.measure(latents[some], groups)


def _closest(differences: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest of each latent's candidates [n, C], the lowest of equals, and its squared distance.

    Overwrites the differences [n, C, D] between the candidates and the latent, in float64.
    """
    distances = differences.square_().sum(2).nan_to_num_(nan=torch.inf, posinf=torch.inf)
    least = distances.amin(1)
    return candidates.masked_fill(distances > least[:, None], torch.iinfo(torch.int64).max).amin(1), least


def _better(index: Tensor, distance: Tensor, row: Tensor, others: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor]:
    """Let each row's best [n] yield to its rivals [p] where they are nearer, or as near with a lower index."""
    none = torch.iinfo(torch.int64).max
    least = distance.scatter_reduce(0, row, rivals, "amin")
    index = index.masked_fill(least < distance, none)
    return index.scatter_reduce(0, row, others.masked_fill(rivals > least[row], none), "amin"), least


def _answer(broken: Tensor, indices: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the caller gets: float32 distances, and the fixed answer for latents that are broken."""
    return indices.masked_fill(broken, 0), distances.float().masked_fill(broken, torch.nan)


def _broken(rows: Tensor) -> tuple[Tensor, float]:
    """Tell which rows [n] of [n, D] are not finite, and the sum of the others' norms, infinite where it overflows."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    broken = ~norms.isfinite()
    if broken.any():  # seldom; looking at each element is slow
        broken = ~rows.isfinite().all(1)
        norms = norms.masked_fill(broken, 0)
    return broken, float(norms.sum())


def _repeats(vectors: Tensor, norms: Tensor) -> Tensor:
    """Tell which rows [K] of `vectors` equal an earlier one; a few may be missed among rows of one norm."""
    sorted_norms, order = norms.sort(stable=True)
    first = order[torch.searchsorted(sorted_norms, sorted_norms)]
    doubtful = (first != order).nonzero().squeeze(1)
    later, earlier = order[doubtful], first[doubtful]
    repeats = torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
    return repeats.index_fill_(0, later[(vectors[later] == vectors[earlier]).all(1)], True)
