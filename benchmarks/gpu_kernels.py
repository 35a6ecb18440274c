"""Check and time the Triton kernels on a GPU against other ways to do the same: python benchmarks/gpu_kernels.py OUT.json

Each cell of a table has fresh inputs; its methods run in random order in each round, the cache flushed before each call;
times are medians of the rounds, in ms, and ratios are to ours in the same round. `--device cpu --toy`, with
TRITON_INTERPRET=1, runs everything at sizes that say nothing, so that a test can tell that it works.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import triton

from vqzoo import ops
from vqzoo.evaluation.report import hardware
from vqzoo.ops import kernels

HEADLINE = (16384, 65536, 128)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", choices=("check", "time"), nargs="+", default=["check", "time"])
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    options = parser.parse_args()
    bench = Bench(options)
    print(f"seed {bench.seed}", flush=True)
    versions = {"torch": str(torch.__version__), "triton": triton.__version__, "seed": bench.seed, "toy": bench.toy}
    content = {"hardware": hardware(bench.device, 1)} | versions
    for part in (check_search, check_loss, check_races, check_headline, time_search, time_loss, time_sizes, time_temperatures):
        if part.__name__.split("_")[0] not in options.parts:
            continue
        started = time.monotonic()
        content[part.__name__] = part(bench)
        print(f"{part.__name__} took {time.monotonic() - started:.0f} s", flush=True)
        bench.target.write_text(json.dumps(content, indent=2) + "\n")
    content["passed"] = all(cell["passed"] for name in content if name.startswith("check_") for cell in content[name])
    bench.target.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content))
    return 0 if content["passed"] else 1


class Bench:
    """The device, its inputs, and a clock that shares its time fairly among methods."""

    def __init__(self, options: argparse.Namespace):
        self.device, self.toy, self.seed, self.target = torch.device(options.device), options.toy, options.seed, options.target
        self.random = random.Random(self.seed)
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        self.rounds = 1 if self.toy else 20
        self.gpu = self.device.type == "cuda"
        self.flush = torch.empty(2**10 if self.toy else 2**28, dtype=torch.uint8, device=self.device)
        self.headline = (9, 40, 8) if self.toy else HEADLINE

    def clouds(self, kind: str, count: int, size: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents and vectors of one kind, about of unit norm."""
        latents, vectors = (torch.randn(n, width, device=self.device, generator=self.generator) / width**0.5
                            for n in (count, size))
        if kind == "initial":
            vectors = (torch.rand(size, width, device=self.device, generator=self.generator) * 2 - 1) / size
        if kind == "offset":
            latents, vectors = latents + 4, vectors + 4
        if kind == "copies":
            vectors = vectors[torch.arange(size, device=self.device) // 3].contiguous()
        if kind == "trained":
            latents = vectors[torch.randint(size, (count,), device=self.device, generator=self.generator)] + latents / 4
        return latents, vectors

    def poison(self) -> None:
        """Leave NaN and -7 in the memory that the next allocations will get."""
        sizes = (2**6, 2**10) if self.toy else (2**9, 2**14, 2**18, 2**22, 2**26, 2**28)
        kept = [torch.full((n,), value, device=self.device) for n in sizes for value in (torch.nan, -7)]
        del kept

    def times(self, methods: dict) -> dict:
        """Return by name the median time, the ratio to the first method, its 5th and 95th per cent, and the peak memory."""
        methods = {next(iter(methods)): next(iter(methods.values())), "ours again": next(iter(methods.values()))} | methods
        found = {name: self.peak(method) for name, method in methods.items()}
        running = [name for name, result in found.items() if "failed" not in result]
        rounds = [{name: self.once(methods[name]) for name in self.random.sample(running, len(running))}
                  for _ in range(self.rounds)]
        for name in running:
            ratios = sorted(each[name] / each[running[0]] for each in rounds)
            spread = ratios[len(ratios) // 20], ratios[-1 - len(ratios) // 20]
            found[name] |= {"ms": statistics.median(each[name] for each in rounds), "ratio": statistics.median(ratios),
                            "ratio_5_95": spread}
        return found

    def peak(self, method) -> dict:
        """Run a method three times, to compile and settle; return its peak memory above what was there, or why it failed."""
        try:
            for _ in range(1 if self.toy else 3):
                before = self.sync()
                result = method()
                del result
                found = {"peak_mib": (self.sync(peak=True) - before) / 2**20}
            return found
        except Exception as error:  # one peer's failure must not hide the others
            self.sync()
            return {"failed": f"{type(error).__name__}: {str(error)[:200]}"}

    def sync(self, peak: bool = False) -> int:
        """Wait for the device; return its allocated bytes, or the most of them since the last call that did not ask so."""
        if not self.gpu:
            return 0
        torch.cuda.synchronize()
        if peak:
            return torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def once(self, method) -> float:
        """Return the ms of one call after the caches were overwritten."""
        self.flush.zero_()
        if not self.gpu:
            started = time.perf_counter()
            method()
            return 1e3 * (time.perf_counter() - started)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        method()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)


# Checks


def distances64(latents, vectors):
    """Yield the squared distances [n, K] in float64, by differences, of a few latents at a time."""
    step = max(1, 2**27 // vectors.numel())
    codes = vectors.double()
    for rows in latents.split(step):
        yield (rows.double()[:, None] - codes).square().sum(2)


def check_search(bench: Bench) -> list[dict]:
    """Compare indices and distances with float64's on every row of the table of launches and every kind of inputs."""
    widths = (8, 130) if bench.toy else (1, 3, 8, 16, 40, 64, 128, 200, 256, 512)
    kinds = ("gauss", "copies") if bench.toy else ("gauss", "initial", "offset", "copies", "trained")
    return [search_cell(bench, kind, width) for width in widths for kind in kinds]


def search_cell(bench: Bench, kind: str, width: int) -> dict:
    count, size = (5, 70) if bench.toy else (bench.random.randint(300, 3000), bench.random.randint(1, 20000))
    latents, vectors = bench.clouds(kind, count, size, width)
    exact = [(rows.argmin(1), rows.amin(1)) for rows in distances64(latents, vectors)]
    indices, least = (torch.cat(parts) for parts in zip(*exact, strict=True))
    bench.poison()
    found, distances = kernels.nearest(latents, vectors, True)
    fast, _ = kernels.nearest(latents, vectors, False)
    wrong = int((found != indices).sum())
    error = float(((distances.double() - least).abs() / least.clamp(min=1e-300)).amax())
    return {"kind": kind, "count": count, "size": size, "width": width, "wrong": wrong, "distance_error": error,
            "wrong_fast": int((fast != indices).sum()), "passed": wrong == 0 and error < 1e-6}


def dense(latents, vectors, indices, temperature, dtype=torch.float64):
    """Return the loss and its gradient by the formula, in chunks of latents."""
    gradient = torch.zeros(vectors.shape, dtype=dtype, device=vectors.device)
    total, step = 0.0, max(1, 2**27 // len(vectors))
    codes = vectors.to(dtype)
    squares = codes.square().sum(1)
    for rows, winners in zip(latents.to(dtype).split(step), indices.split(step), strict=True):
        distances = (rows.square().sum(1)[:, None] + squares - 2 * rows @ codes.t()).clamp_(min=0)
        weights = torch.softmax(distances / -temperature, 1).scatter_(1, winners[:, None], 0.0)
        total += (weights * distances).sum() / latents.numel()
        gradient += (weights.sum(0)[:, None] * codes - weights.t() @ rows) * (2 / latents.numel())
    return total, gradient


def errors(found, reference) -> list[float]:
    return [float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300))
            for a, b in zip(found, reference, strict=True)]


def check_loss(bench: Bench) -> list[dict]:
    """Compare loss and gradient with float64's, and the float32 formula's, on every row of the tables of launches."""
    widths = (8,) if bench.toy else (8, 16, 40, 64, 100, 128, 256)
    cells = [(kind, width, winners, temperature) for width in widths for winners in ("nearest", "any")
             for kind in (("gauss",) if bench.toy else ("gauss", "initial", "trained"))
             for temperature in ((0.35,) if bench.toy else (1e-3, 0.02, 0.35, 1e3))]
    return [loss_cell(bench, *cell) for cell in cells]


def loss_cell(bench: Bench, kind: str, width: int, winners: str, temperature: float) -> dict:
    count, size = (9, 40) if bench.toy else (bench.random.randint(300, 3000), bench.random.randint(2, 9000))
    latents, vectors = bench.clouds(kind, count, size, width)
    indices = kernels.nearest(latents, vectors, True)[0]
    if winners == "any":
        indices = torch.randint(size, (count,), device=bench.device, generator=bench.generator)
    reference = dense(latents, vectors, indices, temperature)
    plain = errors(dense(latents, vectors, indices, temperature, torch.float32), reference)
    found = {"plain_float32": plain}
    for name, skip, exact in (("exact", 0.0, True), ("skip", 1e-3, True), ("fast", 0.0, False)):
        if width <= ops.backends.WIDEST["exact loss" if exact else "fast loss"]:
            bench.poison()
            loss, gradient = kernels.nonstationary(latents, vectors, indices, temperature, True, skip, exact)
            found[name] = [*errors([loss, gradient], reference), float((gradient - reference[1]).norm(dim=1).sum())]
    farthest = torch.cat([rows.amax(1) for rows in distances64(latents, vectors)]).sqrt().sum()
    scale = float(reference[1].norm(dim=1).sum())
    room = 1e-5 + 2 * max(plain) + 1e-6 / temperature  # a score's rounding, in temperatures
    passed = max(found["fast"][:2]) < 0.05 or temperature < 0.01 or float(reference[0]) < 1e-20
    if "exact" in found and float(reference[0]) > 1e-20:
        passed &= max(found["exact"][:2]) <= room
        passed &= found["skip"][2] <= float(2e-3 * farthest / latents.numel()) + room * scale
    finite = all(value == value and value < float("inf") for value in found["fast"])
    return {"kind": kind, "count": count, "size": size, "width": width, "winners": winners, "temperature": temperature,
            "errors": found, "passed": bool(passed and finite)}


def check_races(bench: Bench) -> list[dict]:
    """Run the same inputs 20 times: every bit must be the same."""
    latents, vectors = bench.clouds("gauss", *(bench.headline if bench.toy else (8192, 20000, 128)))
    indices, _ = kernels.nearest(latents, vectors, True)
    cells = []
    for name, work in {
        "search": lambda: kernels.nearest(latents, vectors, True),
        "loss": lambda: kernels.nonstationary(latents, vectors, indices, 0.35, True, 0.0, True),
        "loss, skip": lambda: kernels.nonstationary(latents, vectors, indices, 0.01, True, 1e-4, True),
        "loss, fast": lambda: kernels.nonstationary(latents, vectors, indices, 0.35, True, 0.0, False),
    }.items():
        first = work() if not bench.gpu else without_waiting(work)
        same = []
        for _ in range(1 if bench.toy else 19):
            bench.poison()
            same.append(all(torch.equal(one, other) for one, other in zip(first, work(), strict=True)))
        cells.append({"what": name, "different": same.count(False), "passed": all(same)})
    return cells


def without_waiting(work):
    """Compile, then call; raise if the launcher makes the CPU wait for the GPU."""
    work()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_headline(bench: Bench) -> list[dict]:
    """Compare a sample of the headline's latents with float64, for codebooks up to 1,048,576 codes."""
    count, smallest, width = bench.headline
    cells = []
    for size in (smallest,) if bench.toy else (smallest, 262144, 1048576):
        latents, vectors = bench.clouds("gauss", count, size, width)
        bench.poison()
        indices, _ = kernels.nearest(latents, vectors, True)
        sample = torch.randperm(count, device=bench.device, generator=bench.generator)[: 8 if bench.toy else 128]
        wanted = torch.cat([rows.argmin(1) for rows in distances64(latents[sample], vectors)])
        wrong = int((indices[sample] != wanted).sum())
        cells.append({"count": count, "size": size, "width": width, "wrong": wrong, "passed": wrong == 0})
    return cells


# Times


def search_methods(bench: Bench, latents, vectors) -> dict:
    """Return ours and the other ways to search; those with a matrix of all distances fail where it does not fit."""
    short = [part.bfloat16() for part in (latents, vectors)]
    chunk = max(1, 2**30 // len(vectors))

    def product():
        for rows in short[0].split(chunk):
            rows @ short[1].t()

    def expanded():
        squares = latents.square().sum(1, keepdim=True) + vectors.square().sum(1)
        return (squares - 2 * torch.einsum("bd,dn->bn", latents, vectors.t())).argmin(1)

    def half():
        with torch.autocast(bench.device.type, torch.float16 if bench.gpu else torch.bfloat16):
            return expanded()

    methods = {
        "ours": lambda: ops.nearest_codes(latents, vectors, backend="triton"),
        "ours, fast": lambda: ops.nearest_codes(latents, vectors, backend="triton", precision="fast"),
        "bf16 product": product,
        "ours, chunked": lambda: ops.nearest_codes(latents, vectors, backend="chunked"),
        "cdist, argmin": lambda: torch.cdist(latents, vectors).argmin(1),
        "SimVQ's form": expanded,
        "SimVQ's form, autocast": half,
    }
    if not bench.toy:
        methods["SimVQ's form, compiled"] = torch.compile(expanded)
    return methods


def time_search(bench: Bench) -> list[dict]:
    """Time the search at the headline's size against every other way, with the wrong choices of each."""
    latents, vectors = bench.clouds("gauss", *bench.headline)
    methods = search_methods(bench, latents, vectors)
    true, _ = kernels.nearest(latents, vectors, True)
    cells = bench.times(methods)
    for name, method in methods.items():
        if "product" not in name and "failed" not in cells[name]:
            found = method()
            cells[name]["wrong"] = int(((found[0] if isinstance(found, tuple) else found) != true).sum())
    return [{"size": bench.headline, "methods": cells}]


def loss_methods(bench: Bench, latents, vectors, indices, temperature: float) -> dict:
    """Return ours and the other ways to compute the dense loss and its gradient, and the products that any way needs."""
    codes = vectors.clone().requires_grad_()
    chunk = max(1, 2**30 // len(vectors))

    def ours(**options):
        def run():
            loss = ops.nonstationary_loss(latents, codes, indices, temperature, **options)
            return torch.autograd.grad(loss, codes)
        return run

    def products(kind):
        left, right = (part.to(kind) for part in (latents, vectors))

        def run():
            for rows in left.split(chunk):
                (rows @ right.t()).t() @ rows
        return run

    def tf32():
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        full()
        torch.set_float32_matmul_precision(before)

    def autograd():
        distances = latents.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * latents @ codes.t()
        weights = torch.softmax(distances.detach() / -temperature, 1).scatter(1, indices[:, None], 0.0)
        return torch.autograd.grad((weights * distances).sum() / latents.numel(), codes)

    full = products(torch.float32)
    return {"ours": ours(backend="triton"), "ours, fast": ours(backend="triton", precision="fast"),
            "ours, skip 1e-3": ours(backend="triton", skip=1e-3),
            "ours, fast, skip 1e-3": ours(backend="triton", precision="fast", skip=1e-3),
            "bf16 products": products(torch.bfloat16), "tf32 products": tf32, "float32 products": full,
            "ours, chunked": ours(backend="chunked"), "dense autograd": autograd}


def time_loss(bench: Bench) -> list[dict]:
    """Time the dense loss and its gradient at the headline's size against every other way."""
    latents, vectors = bench.clouds("gauss", *bench.headline)
    indices, _ = kernels.nearest(latents, vectors, True)
    return [{"size": bench.headline, "temperature": 0.35,
             "methods": bench.times(loss_methods(bench, latents, vectors, indices, 0.35))}]


def time_sizes(bench: Bench) -> list[dict]:
    """Time search and loss against their bf16 products along each axis from the headline."""
    count, size, width = bench.headline
    cells = [(1024, size, width), (4096, size, width), (65536, size, width), (count, 1024, width), (count, 8192, width),
             (count, 262144, width), (count, 1048576, width), (count, size, 8), (count, size, 32), (count, size, 64),
             (count, size, 256)]
    found = []
    for cell in cells[:0] if bench.toy else cells:
        latents, vectors = bench.clouds("gauss", *cell)
        indices, _ = kernels.nearest(latents, vectors, True)
        search = search_methods(bench, latents, vectors)
        loss = loss_methods(bench, latents, vectors, indices, 0.35)
        chosen = {name: search[name] for name in ("ours", "ours, fast", "bf16 product")}
        ours = ("ours", "ours, fast") if cell[2] <= ops.backends.WIDEST["exact loss"] else ("ours, fast",)
        dense_ones = {name: loss[name] for name in (*ours, "bf16 products")}
        found.append({"size": cell, "search": bench.times(chosen), "loss": bench.times(dense_ones)})
    return found


def time_temperatures(bench: Bench) -> list[dict]:
    """Time the dense loss from hot to cold, with its errors against float64, on latents near their codes."""
    count, size, width = bench.headline
    latents, vectors = bench.clouds("trained", count, size, width)
    indices, _ = kernels.nearest(latents, vectors, True)
    found = []
    for temperature in (1.0,) if bench.toy else (10.0, 1.0, 0.35, 0.1, 0.03, 0.01, 0.003):
        every = loss_methods(bench, latents, vectors, indices, temperature)
        cells = bench.times({name: method for name, method in every.items() if name.startswith("ours") and "chunk" not in name})
        _, true = dense(latents, vectors, indices, temperature)
        for name in cells:
            if "failed" not in cells[name] and name in every:
                cells[name]["gradient_error"] = errors(every[name](), [true])[0]
        found.append({"temperature": temperature, "methods": cells})
    return found


if __name__ == "__main__":
    sys.exit(main())
