"""The operations on a CUDA GPU, in Triton; imported only where that backend is used.

Matrix products take bfloat16 pieces of float32 operands: one piece keeps 8 bits of each number, two 16, three all 24,
and the products of pieces that matter (1, 3 or 6) add up in float32. Under TRITON_INTERPRET=1 the same kernels run on CPU.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

MINIMA_BYTES = 2**26  # of the buffer between the two kernels of a search
SUBTILE = tl.constexpr(32)  # codes that share one stored minimum
FAR = tl.constexpr(1e36)  # the score of a code that pads the last tile
FLUSHED = tl.constexpr(1e-30)  # smaller numbers become 0 here, where their error is measured, not in the tensor cores


@triton.jit
def _rounded(values, EMULATE: tl.constexpr):
    """Round float32 to bfloat16: to nearest even, which the interpreter's own cast does not do."""
    if EMULATE:
        bits = values.to(tl.int32, bitcast=True)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return values.to(tl.bfloat16)


@triton.jit
def _product(left, right, total, EMULATE: tl.constexpr):
    """Return total + left @ right of bfloat16 blocks.

    The interpreter cannot multiply those. In float64 a product does not depend on which operand is transposed, as in the
    tensor cores, and the weights of a latent then sum to 1 although two kernels compute them.
    """
    if EMULATE:
        return tl.dot(left.to(tl.float64), right.to(tl.float64), total.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    return tl.dot(left, right, total)


@triton.jit(do_not_specialize=["count"])
def _split(Rows, Mean, High, Middle, Low, Halves, Norms, Errors, count, padded, width,
           PIECES: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, EMULATE: tl.constexpr):
    """Centre rows [count, width] on the mean and cut them into bfloat16 pieces [padded, WIDTH] that add up to them.

    Also half their squared norm, and upper bounds of their norm (NaN where a row is not finite; above that of the high
    piece too) and of the norm of what the high piece leaves.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)
    inside = (rows[:, None] < count) & (columns[None, :] < width)
    mean = tl.load(Mean + columns, mask=columns < width, other=0.0).to(tl.float64)
    values = tl.load(Rows + rows[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float64)
    values = tl.where(inside, values - mean[None, :], 0.0)
    rest = values.to(tl.float32)
    high = _rounded(tl.where(tl.abs(rest) < FLUSHED, 0.0, rest), EMULATE)
    where = rows[:, None] * WIDTH + columns[None, :]
    kept = (rows < padded)[:, None]
    tl.store(High + where, high, mask=kept)
    if PIECES > 1:
        rest -= high.to(tl.float32)
        middle = _rounded(rest, EMULATE)
        tl.store(Middle + where, middle, mask=kept)
        if PIECES > 2:
            tl.store(Low + where, _rounded(rest - middle.to(tl.float32), EMULATE), mask=kept)
    squares = tl.sum(values * values, axis=1)
    left = values - high.to(tl.float32).to(tl.float64)
    errors = tl.sqrt(tl.sum(left * left, axis=1)) * (1 + 1e-6)
    norms = tl.sqrt(squares) * (1 + 1e-6) + errors
    norms = tl.where(squares < float("inf"), norms, float("nan"))
    tl.store(Halves + rows, tl.where(rows < count, squares * 0.5, FAR).to(tl.float32), mask=rows < padded)
    tl.store(Norms + rows, norms.to(tl.float32), mask=rows < padded)
    tl.store(Errors + rows, errors.to(tl.float32), mask=rows < padded)


@triton.jit(do_not_specialize=["count", "tiles", "share"])
def _scan(Latents, Codes, Halves, Minima, count, tiles, share,
          ROWS: tl.constexpr, CODES: tl.constexpr, WIDTH: tl.constexpr, EMULATE: tl.constexpr):
    """Store the least score ½|c|² - z·c of each latent [count] among each 32 codes: [count, tiles · CODES / 32].

    One program meets its latents, which stay in shared memory, with `share` tiles of codes. It keeps no index, which
    would cost more instructions than the score.
    """
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    codes, groups = tl.arange(0, CODES), tl.arange(0, CODES // SUBTILE)
    latents = tl.load(Latents + rows[:, None] * WIDTH + columns[None, :])
    first = tl.program_id(1) * share
    here = Codes + first.to(tl.int64) * CODES * WIDTH + (codes[:, None] * WIDTH + columns[None, :])
    for tile in range(first, tl.minimum(first + share, tiles)):
        zeros = tl.zeros((ROWS, CODES), tl.float32)
        scores = tl.load(Halves + tile * CODES + codes)[None, :] - _product(latents, tl.trans(tl.load(here)), zeros, EMULATE)
        minima = tl.min(tl.reshape(scores, (ROWS, CODES // SUBTILE, SUBTILE)), axis=2)
        there = rows[:, None] * (tiles * (CODES // SUBTILE)) + tile * (CODES // SUBTILE) + groups[None, :]
        tl.store(Minima + there, minima, mask=(rows < count)[:, None])
        here += CODES * WIDTH


@triton.jit
def _bounds(Minima, TileNorms, TileErrors, at, subtiles, norm, error, growth, EXACT: tl.constexpr):
    """Return minima of a latent's scores and how far the true minima may be from them; infinity where that is unknown.

    With z̃ and c̃ the rounded operands, z·c - z̃·c̃ = z̃·(c - c̃) + (z - z̃)·c, and both differences were measured. A tensor
    core aligns at least 4 products to the largest term and truncates: 6 units of 2⁻²³|z̃||c̃| per 4 columns at the worst,
    2⁻²² (WIDTH + 1) |z̃||c̃| with room for the rest of float32's rounding, as is 2⁻²²|c|². Small products may vanish.
    """
    inside = at < subtiles
    lowest = tl.load(Minima + at, mask=inside, other=float("inf"))
    size = tl.load(TileNorms + at, mask=inside, other=0.0)
    known = size * (norm + size) < FAR / 8
    slack = tl.zeros_like(lowest)
    if EXACT:
        slack += norm * tl.load(TileErrors + at, mask=inside, other=0.0) + error * size
        slack += size * (growth * norm + size) * 2.384185791015625e-07 + 1e-33
    return lowest, tl.where(known, slack, float("inf"))


@triton.jit(do_not_specialize=["size", "subtiles"])
def _rank(Latents, Vectors, Norms, Errors, Minima, TileNorms, TileErrors, Indices, Distances,
          size, width, subtiles, stride, growth, EXACT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Measure one latent's distances in float64 to the codes of every sub-tile that may hold the nearest."""
    row, lanes, columns = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    norm, error = tl.load(Norms + row), tl.load(Errors + row)
    minima = Minima + row * stride
    limit = float("inf")
    for first in range(0, subtiles, BLOCK):
        lowest, slack = _bounds(minima, TileNorms, TileErrors, first + lanes, subtiles, norm, error, growth, EXACT)
        upper = lowest + slack
        limit = tl.minimum(limit, tl.min(tl.where(upper == upper, upper, float("inf"))))
    best, index = tl.full((), float("inf"), tl.float64), tl.full((), 0, tl.int64)
    for first in range(0, tl.where(norm == norm, subtiles, 0), BLOCK):
        lowest, slack = _bounds(minima, TileNorms, TileErrors, first + lanes, subtiles, norm, error, growth, EXACT)
        # A comparison with NaN is false and keeps its sub-tile.
        live = tl.where(lowest - slack > limit, 0, (first + lanes < subtiles).to(tl.int32))
        while tl.max(live) > 0:
            lane = tl.min(tl.where(live > 0, lanes, BLOCK))
            live = tl.where(lanes == lane, 0, live)
            codes = (first + lane).to(tl.int64) * SUBTILE + tl.arange(0, SUBTILE)
            squares = tl.zeros((SUBTILE, WIDTH), tl.float64)
            for start in range(0, width, WIDTH):
                inside = start + columns < width
                latent = tl.load(Latents + row.to(tl.int64) * width + start + columns, mask=inside, other=0.0)
                there = codes[:, None] * width + start + columns[None, :]
                tile = tl.load(Vectors + there, mask=(codes < size)[:, None] & inside[None, :], other=0.0)
                away = latent.to(tl.float64)[None, :] - tile.to(tl.float64)
                squares += away * away
            total = tl.sum(squares, axis=1)
            total = tl.where((codes < size) & (total == total), total, float("inf"))
            nearest = tl.min(total)
            index = tl.where(nearest < best, tl.min(tl.where(total == nearest, codes, size)), index)
            best = tl.minimum(best, nearest)
    tl.store(Indices + row, index)
    tl.store(Distances + row, tl.where(best < float("inf"), best, float("nan")).to(tl.float32))


@triton.jit
def _products(left, left1, left2, right, right1, right2, total, PIECES: tl.constexpr, EMULATE: tl.constexpr):
    """Return total plus the products of pieces that matter, smallest first, in an order that swapped operands keep."""
    if PIECES > 2:
        total = _product(left1, right1, total, EMULATE)
        total = _product(left2, right, total, EMULATE)
        total = _product(left, right2, total, EMULATE)
    if PIECES > 1:
        total = _product(left1, right, total, EMULATE)
        total = _product(left, right1, total, EMULATE)
    return _product(left, right, total, EMULATE)


@triton.jit
def _load(High, Middle, Low, at, PIECES: tl.constexpr):
    """Return three pieces; those that do not exist repeat the first and are not used."""
    high = tl.load(High + at)
    middle, low = high, high
    if PIECES > 1:
        middle = tl.load(Middle + at)
    if PIECES > 2:
        low = tl.load(Low + at)
    return high, middle, low


@triton.jit(do_not_specialize=["count"])
def _measure(Latents, Vectors, Mean, Indices, Scores, Distances, count, padded, width,
             BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Compute in float64 each latent's centred score and squared distance to the code that it chose."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)
    inside = (rows[:, None] < count) & (columns[None, :] < width)
    winners = tl.load(Indices + rows, mask=rows < count, other=0).to(tl.int64)
    mean = tl.load(Mean + columns, mask=columns < width, other=0.0).to(tl.float64)[None, :]
    latents = tl.load(Latents + rows[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float64)
    codes = tl.load(Vectors + winners[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float64)
    scores = tl.where(inside, (codes - mean) * ((codes - mean) * 0.5 - (latents - mean)), 0.0)
    away = latents - codes
    tl.store(Scores + rows, tl.sum(scores, axis=1).to(tl.float32), mask=rows < padded)
    tl.store(Distances + rows, tl.sum(away * away, axis=1).to(tl.float32), mask=rows < padded)


@triton.jit(do_not_specialize=["tiles", "share"])
def _weigh(High, Middle, Low, CodesHigh, CodesMiddle, CodesLow, Halves, Indices, Scores, Chosen, Lowest, Others, Excess,
           Minima, padded, tiles, share, scale, PIECES: tl.constexpr, GATED: tl.constexpr, MINIMA: tl.constexpr,
           ROWS: tl.constexpr, CODES: tl.constexpr, WIDTH: tl.constexpr, EMULATE: tl.constexpr):
    """Sum over `share` tiles of codes, the winner left out, each latent's weights w = 2^(scale (lowest - score)).

    Others is Σ w, Excess Σ w (score - lowest), Lowest the least score so far, which starts at the winner's: [splits,
    padded]. Minima [padded, tiles] gets each tile's least score. A gated launch works only where Chosen says PIECES.
    """
    rows, columns, codes = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, CODES)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tiles)
    if GATED:
        last = tl.where(tl.load(Chosen) == PIECES, last, first)
    latents, latents1, latents2 = _load(High, Middle, Low, rows.to(tl.int64)[:, None] * WIDTH + columns[None, :], PIECES)
    winners = tl.load(Indices + rows)
    lowest = tl.load(Scores + rows)
    others, excess = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    here = first.to(tl.int64) * CODES * WIDTH + (codes[:, None] * WIDTH + columns[None, :])
    for tile in range(first, last):
        vectors, vectors1, vectors2 = _load(CodesHigh, CodesMiddle, CodesLow, here, PIECES)
        dots = _products(latents, latents1, latents2, tl.trans(vectors), tl.trans(vectors1), tl.trans(vectors2),
                         tl.zeros((ROWS, CODES), tl.float32), PIECES, EMULATE)
        scores = tl.load(Halves + tile * CODES + codes)[None, :] - dots
        scores = tl.where((tile * CODES + codes)[None, :] == winners[:, None], FAR, scores)
        least = tl.min(scores, axis=1)
        if MINIMA:
            tl.store(Minima + rows.to(tl.int64) * tiles + tile, least)
        least = tl.minimum(least, lowest)
        below = least[:, None] - scores
        weights = tl.exp2(below * scale)
        fade = tl.exp2((least - lowest) * scale)
        excess = (excess + (lowest - least) * others) * fade - tl.sum(weights * below, axis=1)
        others = others * fade + tl.sum(weights, axis=1)
        lowest = least
        here += CODES * WIDTH
    there = tl.program_id(1).to(tl.int64) * padded + rows
    kept = rows < tl.where(last > first, padded, 0)
    tl.store(Lowest + there, lowest, mask=kept)
    tl.store(Others + there, others, mask=kept)
    tl.store(Excess + there, excess, mask=kept)


@triton.jit(do_not_specialize=["count", "splits"])
def _combine(Scores, Distances, Lowest, Others, Excess, Least, Logs, Losses, count, padded, splits, scale,
             BLOCK: tl.constexpr):
    """Join the splits of _weigh: least score, log2 of the softmax's denominator relative to it, and loss, per latent."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < count
    own = tl.load(Scores + rows, mask=inside, other=0.0)
    least = own
    for split in range(0, splits):
        least = tl.minimum(least, tl.load(Lowest + split * padded + rows, mask=inside, other=0.0))
    others, excess = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        lowest = tl.load(Lowest + split * padded + rows, mask=inside, other=0.0)
        sums = tl.load(Others + split * padded + rows, mask=inside, other=0.0)
        fade = tl.exp2((least - lowest) * scale)
        excess += (tl.load(Excess + split * padded + rows, mask=inside, other=0.0) + (lowest - least) * sums) * fade
        others += sums * fade
    total = others + tl.exp2((least - own) * scale)
    nearest = tl.load(Distances + rows, mask=inside, other=0.0) + 2 * (least - own)
    losses = (2 * excess + tl.where(nearest < 0, 0.0, nearest) * others) / total
    tl.store(Least + rows, tl.where(inside, least, 0.0), mask=rows < padded)
    tl.store(Logs + rows, tl.where(inside, tl.log2(total), FAR), mask=rows < padded)
    tl.store(Losses + rows, tl.where(inside, losses, 0.0), mask=rows < padded)


@triton.jit(do_not_specialize=["blocks"])
def _pull(High, Middle, Low, CodesHigh, CodesMiddle, CodesLow, Halves, Indices, Least, Logs, Chosen, Blocks, Counts,
          Masses, Pulls, padded, blocks, scale, PIECES: tl.constexpr, PULLED: tl.constexpr, GATED: tl.constexpr,
          LISTED: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, WIDTH: tl.constexpr, EMULATE: tl.constexpr):
    """Sum the weights of each code, and the latents by weight, over a share of the latents: [splits, padded (, WIDTH)].

    One program keeps its codes and recomputes their weights for one block of latents after the other. That puts the
    weights where the second product wants them, in registers, and needs no atomics. Where LISTED, a row of Blocks names
    the Counts blocks worth visiting: a branch in the loop would stop its loads from running ahead.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    columns, latents_at = tl.arange(0, WIDTH), tl.arange(0, ROWS)
    codes = tile * CODES + tl.arange(0, CODES)
    where = codes.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    vectors, vectors1, vectors2 = _load(CodesHigh, CodesMiddle, CodesLow, where, PIECES)
    halves = tl.load(Halves + codes)
    masses, pulls = tl.zeros((CODES,), tl.float32), tl.zeros((CODES, WIDTH), tl.float32)
    last = blocks
    if LISTED:
        last = tl.load(Counts + tile)
        Blocks += tile.to(tl.int64) * blocks
    share = (last + tl.num_programs(1) - 1) // tl.num_programs(1)
    first = split * share
    last = tl.minimum(first + share, last)
    if GATED:
        last = tl.where(tl.load(Chosen) == PIECES, last, first)
    for step in range(first, last):
        block = step
        if LISTED:
            block = tl.load(Blocks + step)
        rows = block * ROWS + latents_at
        latents, latents1, latents2 = _load(High, Middle, Low, rows[:, None] * WIDTH + columns[None, :], PIECES)
        dots = _products(vectors, vectors1, vectors2, tl.trans(latents), tl.trans(latents1), tl.trans(latents2),
                         tl.zeros((CODES, ROWS), tl.float32), PIECES, EMULATE)
        below = tl.load(Least + rows)[None, :] - (halves[:, None] - dots)
        weights = tl.exp2(below * scale - tl.load(Logs + rows)[None, :])
        weights = tl.where(tl.load(Indices + rows)[None, :] == codes[:, None], 0.0, weights)
        high = _rounded(weights, EMULATE)
        middle, low = high, high
        if PULLED > 1:
            masses += tl.sum(weights, axis=1)
            rest = weights - high.to(tl.float32)
            middle = _rounded(rest, EMULATE)
            if PULLED > 2:
                low = _rounded(rest - middle.to(tl.float32), EMULATE)
            # Tensor cores truncate: a sum over all latents would drift, so each block's is added outside.
            zeros = tl.zeros((CODES, WIDTH), tl.float32)
            pulls += _products(high, middle, low, latents, latents1, latents2, zeros, PULLED, EMULATE)
        else:
            masses += tl.sum(high.to(tl.float32), axis=1)  # the same weights as below: their error then multiplies z - c
            pulls = _product(high, latents, pulls, EMULATE)
    there = split.to(tl.int64) * padded + codes
    if GATED:
        padded = tl.where(tl.load(Chosen) == PIECES, padded, 0)
    tl.store(Masses + there, masses, mask=codes < padded)
    tl.store(Pulls + there[:, None] * WIDTH + columns[None, :], pulls, mask=(codes < padded)[:, None])


@triton.jit(do_not_specialize=["size", "splits"])
def _differentiate(Vectors, Mean, Masses, Pulls, Gradient, size, padded, width, splits, factor,
                   BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Write factor (Σ w c - Σ w z) for each code, both centred, from the splits' sums."""
    rows, columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = (rows[:, None] < size) & (columns[None, :] < width)
    mean = tl.load(Mean + columns, mask=columns < width, other=0.0)
    vectors = tl.load(Vectors + rows[:, None] * width + columns[None, :], mask=inside, other=0.0) - mean[None, :]
    masses, pulls = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK, WIDTH), tl.float32)
    for split in range(0, splits):
        there = tl.zeros((BLOCK,), tl.int64) + split * padded + rows
        masses += tl.load(Masses + there, mask=rows < size, other=0.0)
        pulls += tl.load(Pulls + there[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)
    tl.store(Gradient + rows[:, None] * width + columns[None, :], (masses[:, None] * vectors - pulls) * factor, mask=inside)


# Launches: tiles that keep the tensor cores busy and spill no registers, by the greatest width of the pieces that they
# serve, for Hopper and for all others (at most 99 KiB of shared memory): ROWS, CODES, warps, stages, registers a thread
# (128 lets two programs of 8 warps share a processor). The tests compile every one.
SCAN = {"hopper": {128: (128, 128, 8, 2, 128), 256: (128, 64, 8, 2, 128), 512: (64, 32, 4, 2, None)},
        "other": {128: (128, 128, 8, 2, 128), 256: (64, 64, 4, 2, None), 512: (32, 32, 4, 2, None)}}
WEIGH = {"hopper": {"exact": {128: (128, 64, 8, 2, None)}, "fast": {128: (128, 64, 8, 2, 128), 256: (64, 64, 4, 2, None)}},
         "other": {"exact": {128: (64, 16, 4, 2, None)}, "fast": {128: (128, 64, 8, 2, None), 256: (64, 16, 8, 2, None)}}}
PULL = {"hopper": {"exact": {64: (64, 64, 4, 2, None), 128: (32, 128, 8, 2, None)},
                   "fast": {128: (64, 64, 4, 2, None), 256: (32, 64, 4, 2, None)}},
        "other": {"exact": {64: (32, 64, 4, 2, None), 128: (32, 32, 4, 2, None)},
                  "fast": {128: (64, 32, 4, 2, None), 256: (32, 16, 4, 2, None)}}}
RANK = {"BLOCK": 512, "WIDTH": 32, "num_warps": 2, "enable_fp_fusion": True}
SIMPLE = {"num_warps": 4, "enable_fp_fusion": True}  # for kernels that only read and write
PADDING = 128  # a multiple of every tile


def padded_width(width: int) -> int:
    """Return the number of columns of the pieces: a power of two, as the tensor cores want them."""
    return max(16, triton.next_power_of_2(width))


def launch(table: dict, width: int, device: torch.device) -> dict:
    """Return the tile and options of a kernel for codes of this width, from one of the tables by architecture."""
    if width > max(table):
        raise ValueError(f"triton has no tile for codes of width {width}, only up to {max(table)}: choose backend chunked")
    rows, codes, warps, stages, registers = table[next(most for most in table if width <= most)]
    return {"ROWS": rows, "CODES": codes, "WIDTH": padded_width(width), "EMULATE": device.type == "cpu",
            "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True} | ({"maxnreg": registers} if registers else {})


def architecture(device: torch.device) -> str:
    """Return the name under which the tables know a device."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return "hopper" if hopper else "other"


def _share(streamed: int, programs: int, waves: int, device: torch.device) -> int:
    """Return how many streamed tiles one program takes so that `waves` programs come on a processor, or else at least 8."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return min(streamed, max(8, streamed * programs // (waves * processors)))


@torch.no_grad()
def nearest(latents: Tensor, vectors: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Find the nearest of `vectors` [K, D] to each of `latents` [M, D]: indices [M], squared distances [M] float32.

    Exact means float64's choice, the lowest index on a tie; else only the 32 codes around bfloat16's choice are ranked.
    A latent that is not finite gets index 0 and distance NaN. Both inputs are float32 on one device.
    """
    latents, vectors = latents.contiguous(), vectors.contiguous()
    (count, width), size = latents.shape, len(vectors)
    indices, distances = latents.new_empty(count, dtype=torch.int64), latents.new_empty(count)
    scan = launch(SCAN[architecture(latents.device)], width, latents.device)
    tiles = triton.cdiv(size, scan["CODES"])
    stride = tiles * scan["CODES"] // 32
    with torch.cuda.device_of(latents):
        mean = vectors.mean(0).nan_to_num_(0, 0, 0)
        codes = Pieces(vectors, mean, 1, tiles * scan["CODES"])
        whole = Pieces(latents, mean, 1, _padded(count))
        norms, errors = codes.norms.view(-1, 32).amax(1), codes.errors.view(-1, 32).amax(1)
        rows = _rows_at_once(stride)
        minima = latents.new_empty(min(rows, count), stride)
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            blocks = triton.cdiv(stop - start, scan["ROWS"])
            share = _share(tiles, blocks, 8, latents.device)
            _scan[blocks, triton.cdiv(tiles, share)](
                whole.high[start:stop], codes.high, codes.halves, minima, stop - start, tiles, share, **scan)
            _rank[(stop - start,)](
                latents[start:stop], vectors, whole.norms[start:stop], whole.errors[start:stop], minima, norms, errors,
                indices[start:stop], distances[start:stop], size, width, triton.cdiv(size, 32), stride, codes.width + 1.0,
                EXACT=exact, **RANK)
    return indices, distances


def _padded(count: int) -> int:
    """Return the number of rows to allocate, so that no tile needs a mask and pointers into a buffer stay aligned."""
    return triton.cdiv(count, PADDING) * PADDING


def _rows_at_once(columns: int) -> int:
    """Return how many latents have minima that fit their buffer: a multiple of PADDING."""
    return max(PADDING, min(MINIMA_BYTES // (4 * columns), 2**16) // PADDING * PADDING)


class Pieces:
    """Rows [n, D] centred and cut into bfloat16 pieces [padded, width], with what the kernels need to know of each row."""

    def __init__(self, rows: Tensor, mean: Tensor, pieces: int, padded: int):
        self.width, self.padded = padded_width(rows.shape[1]), padded
        parts = rows.new_empty(pieces, padded, self.width, dtype=torch.bfloat16)
        self.high, self.middle, self.low = (parts[min(piece, pieces - 1)] for piece in range(3))
        self.halves, self.norms, self.errors = rows.new_empty(3, padded)
        block = max(1, 2048 // self.width)
        if padded:
            _split[(triton.cdiv(padded, block),)](
                rows, mean, self.high, self.middle, self.low, self.halves, self.norms, self.errors, len(rows), padded,
                rows.shape[1], PIECES=pieces, BLOCK=block, WIDTH=self.width, EMULATE=not rows.is_cuda, **SIMPLE)

    def of(self, start: int = 0, stop: int | None = None) -> list[Tensor]:
        """Return the three pieces of some rows, as the kernels take them."""
        return [part[start:stop] for part in (self.high, self.middle, self.low)]


@torch.no_grad()
def nonstationary(latents: Tensor, vectors: Tensor, indices: Tensor, temperature: float, differentiate: bool, skip: float,
                  exact: bool) -> tuple[Tensor, Tensor | None]:
    """Return the dense loss [] of latents [M, D] that chose `indices` [M], any of `vectors` [K, D], and its gradient [K, D].

    1/(MD) Σ_i Σ_{j≠q_i} p_ij |z_i - c_j|², p = softmax_j(-|z_i - c_j|² / temperature) constant. Exact means three bfloat16
    pieces of each number, about float32's precision; else one, or two for scores where the weights' error would pass 1 %.
    With skip > 0 the gradient, not the loss, leaves out blocks of weights below skip / K each, so that a latent loses
    at most `skip` of its weight, and the gradient at most 2 skip / (MD) Σ_i max_j |z_i - c_j| in the sum of its codes' norms.
    """
    (count, width), precision = latents.shape, "exact" if exact else "fast"
    if not count:
        return latents.new_zeros(()), torch.zeros_like(vectors) if differentiate else None
    latents, vectors = latents.contiguous(), vectors.contiguous()
    with torch.cuda.device_of(latents):
        job = _Loss(latents, vectors, indices, temperature, precision)
        skip = skip if differentiate else 0.0
        rows = _rows_at_once(job.codes.padded // job.weigh["CODES"]) if skip > 0 else job.latents.padded
        kept = [job.weights(start, min(start + rows, job.latents.padded), skip) for start in range(0, job.latents.padded, rows)]
        loss = (job.losses.sum(dtype=torch.float64) / (count * width)).float()
        return loss, job.gradient(torch.cat(kept) if skip > 0 else None) if differentiate else None


class _Loss:
    """The operands of one dense loss and its two passes: over the codes for each latent, over the latents for each code."""

    def __init__(self, latents: Tensor, vectors: Tensor, indices: Tensor, temperature: float, precision: str):
        self.rows, self.vectors, self.mean = latents, vectors, vectors.mean(0)
        (count, self.width), device, kind = latents.shape, latents.device, architecture(latents.device)
        self.weigh = launch(WEIGH[kind][precision], self.width, device)
        self.pull = launch(PULL[kind][precision], self.width, device)
        self.tiers = (3,) if precision == "exact" else (1, 2)
        self.scale = 2 * math.log2(math.e) / temperature
        self.latents = Pieces(latents, self.mean, self.tiers[-1], _padded(count))
        self.codes = Pieces(vectors, self.mean, self.tiers[-1], _padded(len(vectors)))
        self.chosen = self._choose(temperature) if len(self.tiers) > 1 else self.codes.halves
        self.winners = indices.new_full((self.latents.padded,), -1, dtype=torch.int32)
        self.winners[:count] = indices
        self.scores, self.distances, self.least, self.logs, self.losses = latents.new_empty(5, self.latents.padded)
        block = max(1, 2048 // self.latents.width)
        _measure[(triton.cdiv(self.latents.padded, block),)](
            latents, vectors, self.mean, indices.contiguous(), self.scores, self.distances, count, self.latents.padded,
            self.width, BLOCK=block, WIDTH=self.latents.width, **SIMPLE)

    def _choose(self, temperature: float) -> Tensor:
        """Return on the device how many pieces the scores need: one where it puts the weights about 1 % off, or less."""
        (norms, errors), codes = (x[: len(self.rows)].mean() for x in (self.latents.norms, self.latents.errors)), self.codes
        size = len(self.vectors)
        error = (norms * codes.errors[:size].mean() + errors * codes.norms[:size].mean()) * self.width**-0.5
        return torch.where(error * (2 / temperature) < 1e-2, 1, 2).int()

    def weights(self, start: int, stop: int, skip: float) -> Tensor | None:
        """Fill least scores, denominators and losses of these latents; return which blocks of weights count [blocks, tiles]."""
        rows, columns = stop - start, self.codes.padded // self.weigh["CODES"]
        blocks = rows // self.weigh["ROWS"]
        share = _share(columns, blocks, 8, self.rows.device)
        splits = triton.cdiv(columns, share)
        parts = self.losses.new_empty(3, splits, rows)
        minima = self.losses.new_empty(rows, columns) if skip > 0 else parts
        own = [x[start:stop] for x in (self.winners, self.scores)]
        for pieces in self.tiers:
            _weigh[blocks, splits](
                *self.latents.of(start, stop), *self.codes.of(), self.codes.halves, *own, self.chosen, *parts, minima, rows,
                columns, share, self.scale, PIECES=pieces, GATED=len(self.tiers) > 1, MINIMA=skip > 0, **self.weigh)
        least, logs, losses = (x[start:stop] for x in (self.least, self.logs, self.losses))
        _combine[(triton.cdiv(rows, 256),)](own[1], self.distances[start:stop], *parts, least, logs, losses,
                                            len(self.rows) - start, rows, splits, self.scale, BLOCK=256, **SIMPLE)
        if skip > 0:
            return self._kept(minima.neg_().add_(least[:, None]).mul_(self.scale).sub_(logs[:, None]), skip)

    def _kept(self, exponents: Tensor, skip: float) -> Tensor:
        """Return the blocks [blocks, tiles of _pull] that hold a weight above the bound; exponents [rows, tiles of _weigh]."""
        peaks = exponents.view(-1, self.pull["ROWS"], exponents.shape[1]).amax(1)
        kept = ~(peaks <= math.log2(skip / self.codes.padded))
        ours, theirs = self.pull["CODES"], self.weigh["CODES"]
        if ours > theirs:
            return kept.view(len(kept), -1, ours // theirs).any(2)
        return kept.repeat_interleave(theirs // ours, 1)

    def gradient(self, kept: Tensor | None) -> Tensor:
        """Return the loss's gradient [K, D] from all weights, or from the blocks [blocks, tiles] that are kept."""
        blocks, tiles = self.latents.padded // self.pull["ROWS"], self.codes.padded // self.pull["CODES"]
        splits = triton.cdiv(blocks, _share(blocks, tiles, 2, self.rows.device))
        masses = self.losses.new_empty(splits, self.codes.padded)
        pulls = self.losses.new_empty(splits, self.codes.padded, self.codes.width)
        lists = counts = self.winners
        if kept is not None:
            counts = kept.sum(0, dtype=torch.int32)
            lists = kept.t().sort(dim=1, descending=True, stable=True).indices.int().contiguous()
        for pieces in self.tiers:
            _pull[tiles, splits](
                *self.latents.of(), *self.codes.of(), self.codes.halves, self.winners, self.least, self.logs, self.chosen,
                lists, counts, masses, pulls, self.codes.padded, blocks, self.scale, PIECES=pieces, PULLED=pieces // 3 * 2 + 1,
                GATED=len(self.tiers) > 1, LISTED=kept is not None, **self.pull)
        gradient = torch.empty_like(self.vectors)
        block = max(1, 2048 // self.codes.width)
        _differentiate[(triton.cdiv(len(gradient), block),)](
            self.vectors, self.mean, masses, pulls, gradient, len(gradient), self.codes.padded, self.width, splits,
            2 / self.rows.numel(), BLOCK=block, WIDTH=self.codes.width, **SIMPLE)
        return gradient
