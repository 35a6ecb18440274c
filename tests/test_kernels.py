"""The Triton kernels: their results under Triton's interpreter, and their machine code, both without a GPU."""

import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_kernels.py"


def version(package):
    return tuple(int(number) for number in importlib.metadata.version(package).split(".")[:2])


NO_TRITON = importlib.util.find_spec("triton") is None
pytestmark = pytest.mark.skipif(NO_TRITON, reason="triton is not installed")
BROKEN = not NO_TRITON and version("triton") < (3, 7) and version("numpy") >= (2, 4)
interpreter = [
    pytest.mark.interpreter,
    pytest.mark.skipif(BROKEN, reason="triton < 3.7 cannot interpret loops with numpy >= 2.4"),
]


@contextmanager
def process(**environment):
    """Start a process whose environment is set before anything there can import triton; yield a function that runs there."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool, pytest.MonkeyPatch.context() as patch:
        for name, value in ({"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"} | environment).items():
            patch.setenv(name, value)
        pool.submit(os.getpid).result()
        yield lambda check, *arguments: pool.submit(check, *arguments).result()


@pytest.fixture(scope="module")
def interpreted():
    with process(TRITON_INTERPRET="1") as run:
        run(prepare)
        yield run


def prepare():
    """Fill what the launchers allocate with NaN or -7, and speed the interpreter up five times.

    It patches the language anew for each call between functions of a kernel.
    """
    from triton.runtime import interpreter

    patched, new_empty, empty_like = set(), torch.Tensor.new_empty, torch.empty_like

    def call(self, *arguments, **keywords):
        module = self.fn.__globals__["__name__"]
        if module not in patched and not module.startswith("vqzoo"):  # a launch has patched the kernels' own
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*arguments, **keywords)

    def poisoned(tensor):
        return tensor.fill_(math.nan if tensor.is_floating_point() else -7)

    interpreter.InterpretedFunction.__call__ = call
    torch.Tensor.new_empty = lambda self, *shape, **options: poisoned(new_empty(self, *shape, **options))
    torch.empty_like = lambda tensor, **options: poisoned(empty_like(tensor, **options))


def clouds(kind, count, size, width):
    """Return latents [count, width] and vectors [size, width] of one kind."""
    generator = torch.Generator().manual_seed(count * size + width)
    latents, vectors = (torch.randn(n, width, generator=generator) for n in (count, size))
    if kind == "initial":  # a fresh codebook, tiny beside the latents
        vectors = (torch.rand(size, width, generator=generator) * 2 - 1) / size
    if kind == "offset":
        latents, vectors = latents + 1000, vectors + 1000
    if kind == "sphere":
        latents, vectors = torch.nn.functional.normalize(latents), torch.nn.functional.normalize(vectors)
    if kind == "copies":
        vectors = vectors[torch.randperm(size, generator=generator) // 3]
    if kind == "trained":
        latents = vectors[torch.randint(size, (count,), generator=generator)] + latents / 10
    if kind == "astray":  # every rounding to bfloat16 points away from the nearest code, which is in another sub-tile
        vectors = torch.tensor([1.25, -1.25]).repeat(size // 2 + 1)[:size, None].repeat(1, width)  # their mean is 0
        ends = (1 + 2**-8) + torch.tensor([-(2**-14), 2**-14])[:, None].expand(2, width)
        vectors[0], vectors[101], vectors[200], vectors[301] = *ends, *-ends
        vectors[size - size % 2 :] = 0
        latents = torch.full((count, width), 1 + 2**-8 - 2**-16)
    return latents, vectors


def distances64(latents, vectors):
    return torch.stack([(row.double() - vectors.double()).square().sum(1) for row in latents])


KINDS = ("gauss", "initial", "offset", "sphere", "copies", "trained", "astray")


def check_nearest(kind, count, size, width):
    from vqzoo.ops import kernels

    latents, vectors = clouds(kind, count, size, width)
    exact = distances64(latents, vectors)
    indices, distances = kernels.nearest(latents, vectors, exact=True)
    assert indices.dtype == torch.int64 and distances.dtype == torch.float32
    assert indices.tolist() == exact.argmin(1).tolist()
    torch.testing.assert_close(distances, exact.amin(1).float(), rtol=1e-6, atol=0)
    if kind == "astray":
        assert not (kernels.nearest(latents, vectors, exact=False)[0] == indices).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_search_finds_float64s_nearest_code(interpreted, kind):
    interpreted(check_nearest, kind, 33, 333, 8)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 31, 3), (9, 33, 20), (6, 257, 130), (3, 70, 512), (2, 1100, 16)], ids=str)
def test_the_search_takes_any_shape(interpreted, shape):
    interpreted(check_nearest, "gauss", *shape)


def check_split_nearest():
    from vqzoo.ops import kernels

    latents, vectors = clouds("gauss", 130, 390, 4)
    whole = kernels.nearest(latents, vectors, exact=True)
    kernels.MINIMA_BYTES, before = 1, kernels.MINIMA_BYTES  # 128 latents at once
    kernels._share, share = (lambda streamed, *_: 2), kernels._share
    try:
        again = kernels.nearest(latents.t().contiguous().t(), vectors.t().contiguous().t(), exact=True)
    finally:
        kernels.MINIMA_BYTES, kernels._share = before, share
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


def test_the_search_does_not_depend_on_chunks_splits_or_strides(interpreted):
    interpreted(check_split_nearest)


def regret(latents, vectors, indices):
    """Return by which part of the least distance, at the worst, the chosen ones exceed it."""
    exact = distances64(latents, vectors)
    return (exact.gather(1, indices[:, None])[:, 0] / exact.amin(1) - 1).amax()


def check_odd_numbers():
    from vqzoo.ops import kernels

    latents, vectors = clouds("gauss", 12, 100, 8)
    latents[1, 3], latents[2, 0], latents[3, 7] = math.nan, math.inf, -math.inf
    latents[4], latents[5], latents[6] = latents[4] * 1e30, latents[5] * 1e-30, 0.0
    latents[7] = 3e38
    indices, distances = kernels.nearest(latents, vectors, exact=True)
    assert indices[1:4].tolist() == [0, 0, 0] and distances[1:4].isnan().all()
    finite = [0, *range(4, 12)]
    assert regret(latents[finite], vectors, indices[finite]) < 1e-14  # float64 itself cannot tell some apart
    for scale in (1e30, 1e-30, 3e38):  # squares that are not float32 numbers
        codes = vectors / vectors.abs().amax() * scale
        for some in (latents[8:], codes[::25] * 0.99):
            assert regret(some, codes, kernels.nearest(some, codes, exact=True)[0]) < 1e-14, scale
    vectors[40] = math.nan
    assert 40 not in kernels.nearest(latents[8:], vectors, exact=True)[0]
    empty = kernels.nearest(latents[:0], vectors, exact=True)
    assert [list(part.shape) for part in empty] == [[0], [0]]


def test_the_search_survives_numbers_that_are_not_finite_or_overflow(interpreted):
    interpreted(check_odd_numbers)


def check_fast_nearest():
    from vqzoo.ops import kernels

    latents, vectors = clouds("gauss", 40, 640, 16)
    exact = distances64(latents, vectors)
    indices, distances = kernels.nearest(latents, vectors, exact=False)
    chosen = exact.gather(1, indices[:, None])[:, 0]
    torch.testing.assert_close(distances, chosen.float(), rtol=1e-6, atol=0)
    own = torch.nn.functional.pad(exact, (0, 0), value=math.inf).view(40, -1, 32).amin(2).gather(1, indices[:, None] // 32)
    assert torch.equal(chosen, own[:, 0])
    slack = 2 * 2**-7 * latents.norm(dim=1) * vectors.norm(dim=1).amax()
    assert (chosen - exact.amin(1) <= slack).all() and (chosen == exact.amin(1)).double().mean() > 0.8


def test_the_fast_search_is_right_about_the_codes_around_its_choice(interpreted):
    interpreted(check_fast_nearest)


def dense(latents, vectors, indices, temperature, dtype):
    """Return the loss and its gradient by the formula, with the matrix of all weights."""
    latents, vectors = latents.to(dtype), vectors.to(dtype)
    distances = latents.square().sum(1)[:, None] + vectors.square().sum(1) - 2 * latents @ vectors.t()
    if dtype == torch.float64:
        distances = distances64(latents, vectors)
    weights = torch.softmax(-distances / temperature, 1).scatter(1, indices[:, None], 0.0)
    gradient = weights.sum(0)[:, None] * vectors - weights.t() @ latents
    return (weights * distances).sum() / latents.numel(), gradient * (2 / latents.numel())


def assignment(kind, latents, vectors):
    if kind == "nearest":
        return distances64(latents, vectors).argmin(1)
    return torch.randint(len(vectors), (len(latents),), generator=torch.Generator().manual_seed(2))


def errors(found, reference):
    return [float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(found, reference, strict=True)]


def check_loss(kind, winners, count, size, width, temperature):
    from vqzoo.ops import kernels

    latents, vectors = clouds(kind, count, size, width)
    if kind != "initial":
        latents, vectors = latents / width**0.5, vectors / width**0.5
    indices = assignment(winners, latents, vectors)
    reference = dense(latents, vectors, indices, temperature, torch.float64)
    plain = errors(dense(latents, vectors, indices, temperature, torch.float32), reference)
    exact = errors(kernels.nonstationary(latents, vectors, indices, temperature, True, 0.0, True), reference)
    assert all(ours <= theirs + 1e-6 for ours, theirs in zip(exact, plain, strict=True)), (exact, plain)
    fast = errors(kernels.nonstationary(latents, vectors, indices, temperature, True, 0.0, False), reference)
    assert max(fast) < 2e-2, fast
    (loss, gradient) = kernels.nonstationary(latents, vectors, indices, temperature, False, 0.5, True)
    assert gradient is None and errors([loss], reference[:1])[0] == exact[0]


@pytest.mark.parametrize("winners", ["nearest", "any"])
@pytest.mark.parametrize("kind", ["gauss", "initial", "offset", "copies", "trained"])
def test_the_dense_loss_and_its_gradient_are_as_exact_as_float32s(interpreted, kind, winners):
    interpreted(check_loss, kind, winners, 70, 150, 8, 0.35)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (140, 31, 20), (33, 129, 65), (20, 70, 128)], ids=str)
def test_the_dense_loss_takes_any_shape(interpreted, shape):
    interpreted(check_loss, "gauss", "any", *shape, 0.05)


def check_temperatures():
    from vqzoo.ops import kernels

    latents, vectors = clouds("gauss", 40, 100, 8)
    for winners in ("nearest", "any"):
        indices = assignment(winners, latents, vectors)
        for temperature in (1e-3, 0.05, 1.0, 1e3):
            reference = dense(latents, vectors, indices, temperature, torch.float64)
            plain = errors(dense(latents, vectors, indices, temperature, torch.float32), reference)
            found = kernels.nonstationary(latents, vectors, indices, temperature, True, 0.0, True)
            assert all(part.isfinite().all() for part in found)
            # Colder weights multiply the rounding of a score, which is a draw for either formula.
            room = 1e-6 * max(1, 0.35 / temperature)
            pairs = zip(errors(found, reference), plain, strict=True)
            assert all(ours <= 2 * theirs + room for ours, theirs in pairs), (winners, temperature, plain)


def test_the_dense_loss_is_finite_and_right_from_cold_to_hot(interpreted):
    interpreted(check_temperatures)


def check_skip(skip, temperature):
    from vqzoo.ops import kernels

    vectors = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).mul(3).repeat_interleave(64, 0)
    vectors += clouds("gauss", 512, 1, 16)[0] / 10  # eight clusters, each a few tiles of codes and blocks of latents
    latents = vectors[::4] + clouds("trained", 128, 7, 16)[0] / 20
    indices = assignment("any", latents, vectors)
    indices[::2] = distances64(latents[::2], vectors).argmin(1)
    loss, gradient = dense(latents, vectors, indices, temperature, torch.float64)
    shares, masks = [], kernels._Loss._kept

    def watch(self, *arguments):
        kept = masks(self, *arguments)
        shares.append(kept.double().mean().item())
        return kept

    kernels._Loss._kept = watch
    found, rough = kernels.nonstationary(latents, vectors, indices, temperature, True, skip, True)
    kernels._Loss._kept = masks
    bound = 2 * skip / latents.numel() * distances64(latents, vectors).amax(1).sqrt().sum()
    assert shares and max(shares) < 0.9, shares
    assert errors([found], [loss])[0] < 1e-5
    assert (rough - gradient).norm(dim=1).sum() <= bound + 1e-5 * gradient.norm(dim=1).sum()


@pytest.mark.parametrize("skip", [1e-6, 1e-2])
def test_skipped_blocks_cost_the_gradient_no_more_than_their_bound(interpreted, skip):
    interpreted(check_skip, skip, 0.2)


def check_split_loss():
    from vqzoo.ops import kernels

    latents, vectors = clouds("gauss", 300, 200, 8)
    indices = assignment("any", latents, vectors)
    whole = kernels.nonstationary(latents, vectors, indices, 0.35, True, 0.0, True)
    kernels._share, share = (lambda streamed, *_: max(1, streamed // 3)), kernels._share
    kernels.MINIMA_BYTES, before = 1, kernels.MINIMA_BYTES  # 128 latents at once
    try:
        again = kernels.nonstationary(latents.t().contiguous().t(), vectors, indices.int(), 0.35, True, 1e-9, True)
    finally:
        kernels._share, kernels.MINIMA_BYTES = share, before
    assert max(errors(again, [part.double() for part in whole])) < 1e-6


def test_the_dense_loss_does_not_depend_on_chunks_splits_or_strides(interpreted):
    interpreted(check_split_loss)


def check_loss_edges():
    from vqzoo.ops import kernels

    latents, vectors = clouds("gauss", 5, 40, 8)
    indices = assignment("nearest", latents, vectors)
    loss, gradient = kernels.nonstationary(latents[:0], vectors, indices[:0], 0.35, True, 0.0, True)
    assert loss == 0 and gradient.shape == vectors.shape and not gradient.any()
    loss, gradient = kernels.nonstationary(latents, vectors[:1], indices * 0, 0.35, True, 0.0, True)
    assert loss == 0 and not gradient.any()
    latents[2, 1] = math.nan
    for skip in (0.0, 1e-3):
        loss, gradient = kernels.nonstationary(latents, vectors, indices, 0.35, True, skip, True)
        assert loss.isnan() and gradient.isnan().any()


def test_the_dense_loss_at_its_edges(interpreted):
    interpreted(check_loss_edges)


def check_benchmark(target):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpu_kernels.py", str(target), "--device", "cpu", "--toy", "--seed", "0"])
        assert runpy.run_path(str(BENCHMARK))["main"]() == 0


def test_the_benchmark_for_a_gpu_still_runs(interpreted, tmp_path):
    interpreted(check_benchmark, tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["passed"] and content["toy"] and content["check_races"][0]["different"] == 0
    methods = content["time_search"][0]["methods"] | content["time_loss"][0]["methods"]
    assert {name for name, found in methods.items() if "failed" in found} == set()
    assert methods["ours"]["ratio"] == 1 and methods["SimVQ's form"]["ms"] > 0


for name, item in list(globals().items()):
    if name.startswith("test_"):
        globals()[name] = functools.reduce(lambda test, mark: mark(test), interpreter, item)


# Machine code, compiled without a GPU

PIECES = dict.fromkeys(("High", "Middle", "Low", "CodesHigh", "CodesMiddle", "CodesLow", "Latents", "Codes"), "*bf16")
INTEGERS = dict.fromkeys(("Indices", "Chosen", "Blocks", "Counts"), "*i32")
SCALARS = dict.fromkeys(("count", "padded", "width", "size", "tiles", "subtiles", "stride", "share", "blocks"), "i32")
TYPES = PIECES | INTEGERS | SCALARS | {"scale": "fp32", "growth": "fp32"}
ARCHITECTURES = {"hopper": 90, "other": 80}
SHARED = {"hopper": 227 * 1024, "other": 99 * 1024}  # bytes that one program may have


def tools():
    """Return the paths of the assembler and the disassembler that triton uses, or None where one is missing."""
    folder = None if NO_TRITON else importlib.util.find_spec("triton").submodule_search_locations[0]
    found = [shutil.which(tool, path=f"{folder}/backends/nvidia/bin{os.pathsep}{os.environ['PATH']}")
             for tool in ("ptxas", "cuobjdump")]
    return found if all(found) else None


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if tools() is None:
        pytest.skip("ptxas or cuobjdump is missing")
    with process(TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton"))) as run:
        yield run


def compile_ahead(name, kind, options, **types):
    """Compile one kernel for one kind of GPU: bytes on the stack, bytes of shared memory, and each loop's instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vqzoo.ops import kernels

    kernel = getattr(kernels, name)
    launch = {key: options[key] for key in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion") if key in options}
    constants = {key: value for key, value in options.items() if key not in launch}
    names = kernel.arg_names
    types = {key: "constexpr" if key in constants else (TYPES | types).get(key, "*fp32") for key in names}
    # Pointers are multiples of 16, and so are what pads to a multiple of 128 and any common width.
    even = [place for place, key in enumerate(names) if types[key].startswith("*") or key in ("padded", "stride", "width")]
    source = ASTSource(kernel, types, {(names.index(key),): value for key, value in constants.items()},
                       {(place,): [["tt.divisibility", 16]] for place in even})
    done = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURES[kind], 32), options=launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        text = subprocess.run([tools()[1], "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return {"stack": int(re.search(r"STACK:(\d+)", text)[1]), "shared": done.metadata.shared, "loops": loops(text)}


def loops(text):
    """Return the instructions of each loop, innermost first, of a disassembled kernel."""
    code = [(int(place, 16), what) for place, what in re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(.*?);", text, re.MULTILINE)]
    found = []
    for place, what in code:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", what)
        if target and int(target[1], 16) < place:
            found.append([what for where, what in code if int(target[1], 16) <= where <= place])
    return sorted(found, key=len)


def launches(name):
    """Return each launch of a kernel by table: kind of GPU and options, at the greatest width of the table's row."""
    from vqzoo.ops import kernels

    cuda = torch.device("cuda")
    if name == "_scan":
        return [(kind, kernels.launch(table, width, cuda)) for kind, table in kernels.SCAN.items() for width in table]
    extra = {"MINIMA": True} if name == "_weigh" else {"LISTED": True}
    found = []
    for kind, tables in (kernels.WEIGH if name == "_weigh" else kernels.PULL).items():
        for precision, table in tables.items():
            for width, pieces in itertools.product(table, (3,) if precision == "exact" else (1, 2)):
                options = extra | kernels.launch(table, width, cuda) | {"PIECES": pieces, "GATED": pieces < 3}
                found.append((kind, options | ({"PULLED": pieces // 3 * 2 + 1} if name == "_pull" else {})))
    return found


# Instructions of one warp in one turn of the loop over tiles of the scan, by kind and width, with a tenth to spare.
BUDGETS = {("hopper", 128): 323, ("hopper", 256): 261, ("hopper", 512): 362,
           ("other", 128): 700, ("other", 256): 424, ("other", 512): 263}


@pytest.mark.parametrize("name", ["_scan", "_weigh", "_pull"])
def test_the_machine_code_of_every_launch_fits_and_keeps_the_tensor_cores_busy(compiled, name):
    for kind, options in compiled(launches, name):
        code = compiled(compile_ahead, name, kind, options)
        body = next(loop for loop in code["loops"] if any("MMA" in what for what in loop))
        counts = {word: sum(word in what for what in body) for word in ("HGMMA", "HMMA", "LDGSTS", "UTMALDG", "STL", "LDL")}
        seen = (name, kind, options, code["stack"], code["shared"], len(body), counts)
        assert code["stack"] == counts["STL"] == counts["LDL"] == 0, f"registers spill: {seen}"
        assert code["shared"] <= SHARED[kind], f"too much shared memory: {seen}"
        assert counts["HGMMA" if kind == "hopper" else "HMMA"], f"no tensor core: {seen}"
        assert counts["LDGSTS"] + counts["UTMALDG"], f"no loads run ahead: {seen}"
        if name == "_scan":
            assert len(body) <= BUDGETS[kind, options["WIDTH"]], f"more instructions than measured: {seen}"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_machine_code_of_the_kernels_without_products_spills_nothing(compiled, kind):
    assert compiled(check_small, kind) == {"_rank": 0, "_split": 0, "_measure": 0, "_combine": 0, "_differentiate": 0}


def check_small(kind):
    """Return how many bytes the kernels without matrix products keep on the stack."""
    from vqzoo.ops import kernels

    block = {"BLOCK": 16, "WIDTH": 128} | kernels.SIMPLE
    every = {"_rank": (kernels.RANK | {"EXACT": True}, {"Latents": "*fp32", "Indices": "*i64"}),
             "_split": (block | {"PIECES": 3, "EMULATE": False}, {}),
             "_measure": (block, {"Latents": "*fp32", "Indices": "*i64"}),
             "_combine": (kernels.SIMPLE | {"BLOCK": 256}, {"splits": "i32"}),
             "_differentiate": (block, {"splits": "i32", "factor": "fp32"})}
    return {name: compile_ahead(name, kind, options, **types)["stack"] for name, (options, types) in every.items()}
