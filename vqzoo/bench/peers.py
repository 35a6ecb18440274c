"""What the operations are timed against: the matrix products that bound them, and how others search and weigh.

Each form is written anew from what is known of it; the packages are called as they are. A maker takes the inputs, does what
need not be timed, and returns the call that is.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqzoo.bench.clock import RATIOS, Conditions, clock, number, paired, summarise, table
from vqzoo.ops import nearest_codes, nonstationary_loss

Call = Callable[[], Tensor | None]
Cell = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """Carry a way to compute something: its maker, its bytes beyond the inputs for (N, K, D), and the package it needs.

    Without bytes it fits always: ours, and what fills a tile at a time.
    """

    make: Callable[..., Callable]
    bytes: Callable[[int, int, int], float] = lambda n, k, d: 0.0
    package: str = ""
    cuda: bool = True

    def missing(self) -> str:
        """Say why the package cannot be used, or nothing."""
        if not self.package:
            return ""
        try:
            importlib.import_module(MODULES[self.package])
        except ImportError as error:
            absent = error.name == MODULES[self.package]
            return f"{self.package} is not installed" if absent else f"{self.package} cannot be imported: {error}"
        return ""


MODULES = {"faiss-cpu": "faiss", "vector-quantize-pytorch": "vector_quantize_pytorch"}
"""Where the packages of the extra `bench` are imported from."""

OURS = "vqzoo"
AGAIN = f"{OURS} again"
TILINGS = {"cpu": ((256, 0), (256, 4096), (512, 1024), (4096, 4096)), "cuda": ((4096, 0), (16384, 16384))}
"""Rows and columns of the scores that a bare matrix product fills at a time; 0 is all of them."""


def search_methods(device: str, **how: str | None) -> dict[str, Method]:
    """Return every search by name; `how` is the backend and the precision of ours."""
    floors = {name: Method(partial(search_gemm, *tiling)) for name, tiling in named_tilings(device).items()}
    return {
        OURS: Method(partial(_search_ours, how)),
        **floors,
        "cdist": Method(_search_cdist, lambda n, k, d: 4.2 * n * k),
        "SimVQ's expansion": Method(_search_expansion, lambda n, k, d: 12 * n * k),
        "lucidrains SimVQ": Method(_search_lucidrains_simvq, lambda n, k, d: 4.4 * n * k, "vector-quantize-pytorch"),
        "lucidrains VQ": Method(_search_lucidrains_vq, lambda n, k, d: 17 * n * k, "vector-quantize-pytorch"),
        "faiss": Method(_search_faiss, package="faiss-cpu", cuda=False),
    }


def loss_methods(device: str, **how: str | None) -> dict[str, Method]:
    """Return every dense loss by name, each to be called for (latents, vectors, indices, temperature)."""
    floors = {name: Method(partial(loss_gemm, *tiling)) for name, tiling in named_tilings(device).items()}
    return {
        OURS: Method(partial(_loss, partial(nonstationary_loss, **_given(how)))),
        **floors,
        "dense autograd": Method(partial(_loss, dense), lambda n, k, d: 13 * n * k),
        "older blocks": Method(partial(_loss, older_blocks), lambda n, k, d: 21 * n * k),
        "older rows x K x D": Method(partial(_loss, older_differences), lambda n, k, d: 10.0 * n * k * d),
        "checkpointed rows": Method(partial(_loss, checkpointed), lambda n, k, d: 20 * min(n, 256) * k),
    }


def named_tilings(device: str) -> dict[str, tuple[int, int]]:
    """Return the tilings by the name of their matrix product; a GPU multiplies in bfloat16."""
    kind = "bf16 GEMM" if device == "cuda" else "GEMM"
    return {f"{kind} {rows} x {columns or 'K'}": (rows, columns) for rows, columns in TILINGS[device]}


def _given(how: dict[str, str | None]) -> dict[str, str]:
    return {key: value for key, value in how.items() if value is not None}


# Searches: maker(latents [N, D], vectors [K, D]) → call() → indices [N], or None of a bare matrix product


def _search_ours(how: dict[str, str | None], latents: Tensor, vectors: Tensor) -> Call:
    return lambda: nearest_codes(latents, vectors, **_given(how))[0]


def search_gemm(rows: int, columns: int, latents: Tensor, vectors: Tensor) -> Call:
    """Fill one buffer with every tile of scores in turn: what any search must multiply, and nothing else."""
    latents, vectors, buffer = _operands(rows, columns, latents, vectors)
    rows, columns = buffer.shape

    def call() -> None:
        for tile in latents.split(rows):
            for codes in vectors.split(columns):
                torch.mm(tile, codes.t(), out=buffer[: len(tile), : len(codes)])

    return call


def _operands(rows: int, columns: int, latents: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the operands in the type to multiply in, and a buffer for a tile of their product."""
    if latents.device.type == "cuda":
        latents, vectors = latents.bfloat16(), vectors.bfloat16()
    return latents, vectors, latents.new_empty(min(rows, len(latents)), min(columns or len(vectors), len(vectors)))


def _search_cdist(latents: Tensor, vectors: Tensor) -> Call:
    return lambda: torch.cdist(latents, vectors).argmin(1)


def _search_expansion(latents: Tensor, vectors: Tensor) -> Call:
    """Search as SimVQ's code does (arXiv 2411.02038): all of |z|² + |c|² - 2 z·c at once."""
    return lambda: expanded_distances(latents, vectors).argmin(1)


def expanded_distances(latents: Tensor, vectors: Tensor) -> Tensor:
    """Return the squared distances [N, K] as three terms of that size, as SimVQ and VQGAN have them."""
    squares = torch.sum(latents**2, dim=1, keepdim=True) + torch.sum(vectors**2, dim=1)
    return squares - 2 * torch.einsum("nd,dk->nk", latents, vectors.t())


def _search_lucidrains_simvq(latents: Tensor, vectors: Tensor) -> Call:
    """Call the module with the codes as they are: its linear map, which no search has to apply, is the identity."""
    from vector_quantize_pytorch import SimVQ

    size, width = vectors.shape
    module = SimVQ(width, size, nn.Identity(), lambda _: vectors, rotation_trick=False).to(vectors.device)
    return lambda: module(latents[None])[1][0]


def _search_lucidrains_vq(latents: Tensor, vectors: Tensor) -> Call:
    from vector_quantize_pytorch import VectorQuantize

    size, width = vectors.shape
    module = VectorQuantize(width, size, freeze_codebook=True).eval().to(vectors.device)
    module.codebook = vectors
    return lambda: module(latents[None])[1][0]


def _search_faiss(latents: Tensor, vectors: Tensor) -> Call:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return lambda: torch.from_numpy(faiss.knn(latents.numpy(), vectors.numpy(), 1)[1][:, 0])


# Quantizers as modules: maker(features [B, D, h, w], K) → module in training → quantized [B, D, h, w], indices, loss


def quantizers() -> dict[str, Method]:
    """Return quantizers that train, by name, set to the decay, the weights and the estimator that the zoo's plugins have."""
    return {
        "lucidrains VQ, EMA": Method(_lucidrains_ema, lambda n, k, d: 24 * n * k, "vector-quantize-pytorch"),
        "lucidrains SimVQ": Method(_lucidrains_simvq, lambda n, k, d: 4.4 * n * k, "vector-quantize-pytorch"),
    }


def _lucidrains_ema(features: Tensor, size: int) -> nn.Module:
    from vector_quantize_pytorch import VectorQuantize

    module = VectorQuantize(features.shape[1], size, decay=0.99, commitment_weight=0.25, rotation_trick=False,
                            accept_image_fmap=True)
    return module.to(features.device).train()


def _lucidrains_simvq(features: Tensor, size: int) -> nn.Module:
    from vector_quantize_pytorch import SimVQ

    width = features.shape[1]
    return SimVQ(width, size, nn.Linear(width, width), channel_first=True, rotation_trick=False).to(features.device).train()


# Dense losses: maker(latents, vectors, indices [N], temperature) → call() → (loss [], gradient to vectors [K, D])


def _loss(function: Callable, latents: Tensor, vectors: Tensor, indices: Tensor, temperature: float) -> Call:
    """Call a loss forward and backward."""

    def call() -> tuple[Tensor, Tensor]:
        codes = vectors.detach().requires_grad_()
        loss = function(latents, codes, indices, temperature)
        loss.backward()
        return loss.detach(), codes.grad

    return call


def loss_gemm(rows: int, columns: int, latents: Tensor, vectors: Tensor, indices: Tensor, temperature: float) -> Call:
    """Multiply latents by codes and the product by latents, tile by tile: 4NKD operations, and nothing else."""
    latents, vectors, buffer = _operands(rows, columns, latents, vectors)
    rows, columns = buffer.shape
    pulls = torch.zeros_like(vectors)

    def call() -> None:
        for tile in latents.split(rows):
            for codes, pull in zip(vectors.split(columns), pulls.split(columns), strict=True):
                scores = buffer[: len(tile), : len(codes)]
                torch.mm(tile, codes.t(), out=scores)
                pull.addmm_(scores.t(), tile)

    return call


def dense(latents: Tensor, vectors: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """Return NSVQ's dense loss (arXiv 2606.11363, eq. 9 and 10) by its plain formula, for autograd to differentiate."""
    squares = latents.square().sum(1, keepdim=True) + vectors.square().sum(1)
    distances = squares - 2 * latents @ vectors.t()
    with torch.no_grad():
        weights = torch.softmax(-distances / temperature, 1).scatter_(1, indices[:, None], 0.0)
    return (weights * distances).sum() / latents.numel()


def checkpointed(latents: Tensor, vectors: Tensor, indices: Tensor, temperature: float, rows: int = 256) -> Tensor:
    """Return the plain formula's loss of a chunk of rows at a time; its backward computes each chunk anew."""
    parts = [checkpoint(dense, tile, vectors, winners, temperature, use_reentrant=False) * (len(tile) / len(latents))
             for tile, winners in zip(latents.split(rows), indices.split(rows), strict=True)]
    return torch.stack(parts).sum()


def older_weights(latents: Tensor, vectors: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """Return NSVQ's weights [N, K] in the older code's way (arXiv 2602.18896): distances, one-hot and softmax, each N x K."""
    with torch.no_grad():
        distances = expanded_distances(latents, vectors)
        chosen = torch.zeros_like(distances).scatter_(1, indices[:, None], 1.0)
        return torch.softmax(-distances / temperature, 1) * (1 - chosen)


def older_blocks(latents: Tensor, vectors: Tensor, indices: Tensor, temperature: float, block=(1024, 8912)) -> Tensor:
    """Return the loss as the older code for faces does: weighted expanded squared errors, block by block, by autograd."""
    weights = older_weights(latents, vectors, indices, temperature)
    loss = latents.new_zeros(())
    for tile, rows in zip(latents.split(block[0]), weights.split(block[0]), strict=True):
        for codes, part in zip(vectors.split(block[1]), rows.split(block[1], 1), strict=True):
            loss = loss + (part * expanded_distances(tile, codes)).sum()
    return loss / latents.numel()


def older_differences(latents: Tensor, vectors: Tensor, indices: Tensor, temperature: float, rows: int = 1024) -> Tensor:
    """Return the loss as the older code for ImageNet does: differences [rows, K, D], chunk by chunk, by autograd."""
    weights = older_weights(latents, vectors, indices, temperature)
    loss = latents.new_zeros(())
    for tile, part in zip(latents.split(rows), weights.split(rows), strict=True):
        loss = loss + (part * (tile[:, None] - vectors).pow(2).mean(2)).sum()
    return loss / len(latents)


# Inputs, and the truth about them in float64

DATA = ("gauss", "trained", "unit", "vqgan", "offset")


def inputs(data: str, n: int, k: int, d: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Draw latents [N, D] and vectors [K, D] as they are at some point of a training.

    gauss: both N(0, 1/D); trained: latents scatter around codes; unit: both on the sphere; vqgan: codes as VQGAN draws them,
    U(-1/K, 1/K), and latents N(0, 1); offset: gauss with a common mean four times as large.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = d**-0.5
    vectors, latents, mean = (torch.randn(rows, d, generator=generator) * scale for rows in (k, n, 1))
    if data == "trained":
        latents = vectors[torch.randint(k, (n,), generator=generator)] + 0.3 * latents
    elif data == "unit":
        latents, vectors = F.normalize(latents), F.normalize(vectors)
    elif data == "vqgan":
        latents, vectors = latents / scale, (torch.rand(k, d, generator=generator) * 2 - 1) / k
    elif data == "offset":
        latents, vectors = latents + 4 * mean, vectors + 4 * mean
    return latents.to(device), vectors.to(device)


@torch.no_grad()
def nearest_in_float64(latents: Tensor, vectors: Tensor, rows: int = 256) -> Tensor:
    """Return the index of the nearest code of each latent [N], computed in float64."""
    vectors = vectors.double()
    norms = vectors.square().sum(1)
    return torch.cat([torch.addmm(norms, tile.double(), vectors.t(), alpha=-2).min(1).indices for tile in latents.split(rows)])


def flips(indices: Tensor, nearest: Tensor, latents: Tensor, vectors: Tensor) -> int:
    """Count the latents whose code is farther than the nearest one, by distances in float64."""
    rows = (indices != nearest).nonzero().squeeze(1)
    chosen, least = ((latents[rows].double() - vectors[which[rows]].double()).square().sum(1) for which in (indices, nearest))
    return int((chosen > least).sum())


@torch.no_grad()
def loss_in_float64(
    latents: Tensor, vectors: Tensor, indices: Tensor, temperature: float, rows: int = 256
) -> tuple[Tensor, Tensor]:
    """Return the loss [] and its gradient to vectors [K, D], computed in float64 from 2/(N·D) Σ_i w_ij (c_j - z_i)."""
    vectors = vectors.double()
    loss, masses, pulls = vectors.new_zeros(()), vectors.new_zeros(len(vectors)), torch.zeros_like(vectors)
    for tile, winners in zip(latents.double().split(rows), indices.split(rows), strict=True):
        distances = expanded_distances(tile, vectors)
        weights = torch.softmax(-distances / temperature, 1).scatter_(1, winners[:, None], 0.0)
        loss += (weights * distances).sum()
        masses += weights.sum(0)
        pulls.addmm_(weights.t(), tile)
    return loss / latents.numel(), (vectors * masses[:, None]).sub_(pulls).mul_(2 / latents.numel())


def relative_error(found: Tensor, true: Tensor) -> float:
    """Return ‖found - true‖ / ‖true‖."""
    return float((found.double() - true).norm() / true.norm())


# All of them at one size


@torch.no_grad()
def search_cell(how: Conditions, methods: dict[str, Method], n: int, k: int, d: int, data: str) -> Cell:
    """Time searches at one size and count their flips."""
    latents, vectors = inputs(data, n, k, d, how.seed, how.device)
    nearest = nearest_in_float64(latents, vectors)

    def judge(indices: Tensor) -> dict[str, float]:
        return {"flips": flips(indices, nearest, latents, vectors)}

    return _cell(how, methods, (n, k, d, data), judge, latents, vectors)


def loss_cell(how: Conditions, methods: dict[str, Method], temperature: float, n: int, k: int, d: int, data: str) -> Cell:
    """Time dense losses with their gradients at one size, and measure both errors."""
    latents, vectors = inputs(data, n, k, d, how.seed, how.device)
    indices = nearest_in_float64(latents, vectors)
    true = loss_in_float64(latents, vectors, indices, temperature)

    def judge(found: tuple[Tensor, Tensor]) -> dict[str, float]:
        errors = (relative_error(one, other) for one, other in zip(found, true, strict=True))
        return dict(zip(("loss_error", "gradient_error"), errors, strict=True))

    return _cell(how, methods, (n, k, d, data), judge, latents, vectors, indices, temperature)


def _cell(how: Conditions, methods: dict[str, Method], size: tuple, judge: Callable, *arguments: Any) -> Cell:
    """Time all methods that are there and fit, and judge what the first call of each returns."""
    n, k, d, data = size
    found = {name: {why: what} for name, method in methods.items() for why, what in obstacle(how, method, (n, k, d))}
    calls = {name: method.make(*arguments) for name, method in methods.items() if name not in found}
    judged = {name: judge(result) for name, call in calls.items() if (result := call()) is not None}
    calls[AGAIN] = calls[OURS]
    seconds = paired(calls, how.rounds, how.seed, partial(clock, how.device))
    for name, figures in summarise(seconds, OURS, how.kind).items():
        found[name] = {**figures, **judged.get(name, {})}
    floor = min((name for name in seconds if "GEMM" in name), key=lambda name: found[name]["ms"], default=None)
    own = None if floor is None else summarise(seconds, floor, how.kind)[OURS]
    return {"n": n, "k": k, "d": d, "data": data, "rounds": len(seconds[OURS]), "floor": floor,
            "to_floor": own and [own[key] for key in RATIOS],
            "methods": {name: found[name] for name in (*methods, AGAIN)}}


def obstacle(how: Conditions, method: Method, size: tuple[int, int, int]) -> Iterable[tuple[str, str]]:
    """Yield why a method cannot run here, if so."""
    if said := method.missing():
        yield "missing", said
    elif how.device == "cuda" and not method.cuda:
        yield "skipped", "it has no GPU"
    elif (needs := method.bytes(*size)) > (free := how.available()):
        yield "skipped", f"needs {needs / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"


def rivals(cell: Cell) -> list[tuple[str, dict]]:
    """Return the timed methods of a cell that are neither ours nor a bare matrix product."""
    return [(name, found) for name, found in cell["methods"].items()
            if "ms" in found and name not in (OURS, AGAIN) and "GEMM" not in name]


def describe(cell: Cell, *judged: str) -> str:
    """Lay one size out as a table, mark who is fast but not exact, and say how ours stands to its own matrix product."""
    rows = []
    for name, found in cell["methods"].items():
        if "ms" not in found:
            rows.append([name, *found.values()])
            continue
        spread = f"{found['ratio']:.3f} ({found['ratio_low']:.3f}-{found['ratio_high']:.3f})"
        errors = [number(found.get(key), 0 if key == "flips" else None) for key in judged]
        mark = "not exact" if found.get("flips") and found["ratio"] < 1 else ""
        rows.append([name, number(found["cpu_ms"], 1), number(found["wall_ms"], 1), number(found["system_ms"], 1), spread,
                     *errors, mark])
    judged_by = (key.replace("_", " ") for key in judged)
    head = ["method", "cpu ms", "wall ms", "system ms", "time / ours (5-95 %)", *judged_by, ""]
    text = f"\nN={cell['n']} K={cell['k']} D={cell['d']} {cell['data']}\n{table(head, rows)}"
    if cell["floor"]:
        ratio, low, high = cell["to_floor"]
        text += f"\nours / {cell['floor']}: {ratio:.3f} ({low:.3f}-{high:.3f})"
    return text
