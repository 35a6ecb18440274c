"""The arithmetic of vqzoo.ops against float64 references written here."""

import math
import socket
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing

from vqzoo.ops import (
    all_reduce_sum,
    backends,
    broadcast,
    code_sums,
    code_usage,
    gather_names,
    gather_rows,
    nearest_codes,
    nonstationary_loss,
    perplexity,
    plan,
    search_disagreement,
    soft_assignments,
    usage,
    use,
)
from vqzoo.ops import nearest as nearest_module
from vqzoo.ops import nonstationary as nonstationary_module

ONCE = pytest.mark.parametrize("backend", ["chunked"], indirect=True)


@pytest.fixture(params=["eager", "chunked"], autouse=True)
def backend(request):
    """Run every test of this file with each backend that works everywhere."""
    with use(request.param):
        yield request.param


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distances64(latents, vectors):
    return torch.cdist(latents.double(), vectors.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


def relative_error(value, reference):
    return ((value.double() - reference).norm() / reference.norm().clamp(min=1e-300)).item()


# nearest_codes

def clouds(kind, count, size, width):
    latents, vectors = normal(count, width), normal(size, width, seed=1)
    if kind == "initial":  # a fresh codebook, tiny beside the latents
        vectors = (torch.rand(size, width, generator=torch.Generator().manual_seed(1)) * 2 - 1) / size
    if kind == "offset":
        latents, vectors = latents + 1000, vectors + 1000
    if kind == "sphere":
        latents, vectors = torch.nn.functional.normalize(latents), torch.nn.functional.normalize(vectors)
    return latents, vectors


@pytest.mark.parametrize("kind", ["gauss", "initial", "offset", "sphere"])
@pytest.mark.parametrize(("count", "size", "width"), [(1025, 4099, 8), (64, 500, 65), (3, 7, 1)])
def test_nearest_codes_have_the_float64_distance(kind, count, size, width):
    latents, vectors = clouds(kind, count, size, width)
    indices, distances = nearest_codes(latents, vectors)
    assert indices.dtype == torch.int64 and distances.dtype == torch.float32
    exact = distances64(latents, vectors)
    chosen = exact.gather(1, indices[:, None])[:, 0]
    torch.testing.assert_close(distances.double(), chosen, rtol=1e-6, atol=1e-10)
    # Only the rounding of z·c about the mean is forgiven, so |z|² in the score or a common offset would fail.
    reach = (vectors - vectors.mean(0)).norm(dim=1).max()
    forgiven = 5e-7 * reach * ((latents - vectors.mean(0)).norm(dim=1) + reach)
    assert (chosen - exact.min(1).values <= forgiven).all()


@pytest.mark.parametrize("count", [1, 4, 5, 8, 9])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 17])
def test_nearest_codes_cross_tile_edges(monkeypatch, count, size):
    monkeypatch.setitem(nearest_module.TILES, "cpu", (4, 16))
    latents, vectors = clouds("gauss", count, size, 3)
    indices, _ = nearest_codes(latents, vectors)
    assert torch.equal(indices, distances64(latents, vectors).argmin(1))


@pytest.mark.parametrize("tile", [(512, 4096), (5, 16)])
@pytest.mark.parametrize("width", [1, 16, 64, 127])
def test_nearest_codes_take_the_first_of_equal_codes(monkeypatch, tile, width):
    monkeypatch.setitem(nearest_module.TILES, "cpu", tile)
    for size in (5, 17, 40):  # at some of these sizes a matrix product rounds equal columns differently
        origin = torch.randint(0, 4, (size,), generator=torch.Generator().manual_seed(size))
        vectors = normal(4, width).sign()[origin] * torch.tensor([1.0, 1.5, 2.0, 0.0])[origin, None]
        vectors[origin == 3] *= normal(size, width).sign()[origin == 3]
        first = (vectors[:, None] == vectors).all(2).long().argmax(1)  # 0.0 and -0.0 are equal
        indices, _ = nearest_codes(normal(33, width, seed=2), vectors)
        assert torch.equal(indices, first[indices])


@pytest.mark.fault(21)
def test_equal_codes_of_a_constant_codebook_give_index_zero():
    indices, distances = nearest_codes(normal(50, 12), torch.full((9000, 12), 0.3))
    assert indices.eq(0).all()
    torch.testing.assert_close(distances, (normal(50, 12) - 0.3).square().sum(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_nearest_codes_compute_in_float32(dtype):
    latents, vectors = normal(40, 6).to(dtype), normal(70, 6, seed=1).to(dtype)
    plain = nearest_codes(latents.float(), vectors.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = nearest_codes(latents, vectors)
    assert torch.equal(cast[0], plain[0]) and torch.equal(cast[1], plain[1])


def test_nearest_codes_accept_any_strides_and_return_no_graph():
    latents, vectors = normal(6, 40).t(), normal(6, 70, seed=1).t().requires_grad_()
    indices, distances = nearest_codes(latents, vectors)
    assert torch.equal(indices, nearest_codes(latents.contiguous(), vectors.contiguous())[0])
    assert not distances.requires_grad


def test_nearest_codes_of_no_latents_and_of_broken_latents():
    indices, distances = nearest_codes(torch.empty(0, 4), normal(5, 4))
    assert indices.shape == distances.shape == (0,) and indices.dtype == torch.int64
    broken = torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [0.0, -math.inf], [1.0, 1.0]])
    vectors = normal(9, 2)
    indices, _ = nearest_codes(broken, vectors)
    assert indices.min() >= 0 and indices.max() < 9
    assert indices[3] == distances64(broken[3:], vectors).argmin()


@pytest.mark.parametrize("scale", [1e-15, 1e15, 1e25, 3e37])
def test_sizes_whose_squares_overflow_do_not_matter(scale):
    latents, vectors = normal(40, 7).clamp(-2, 2), normal(90, 7, seed=1).clamp(-2, 2)
    wanted, _ = nearest_codes(latents, vectors)
    scale = 2.0 ** round(math.log2(scale))
    assert torch.equal(nearest_codes(latents * scale, vectors * scale)[0], wanted)
    mixed = torch.cat([vectors * max(scale, 1), vectors])
    exact = distances64(latents, mixed).argmin(1)
    assert torch.equal(nearest_codes(latents, mixed)[0], exact)


@pytest.mark.fault(21)
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-21, 1e-20, 1e-19, 1e-10, 1e9])
@pytest.mark.parametrize("width", [1, 2, 8])
def test_numbers_that_underflow_and_one_that_is_huge_do_not_matter(scale, width):
    latents, vectors = normal(60, width) * scale, normal(3000, width, seed=1) * scale
    wanted = distances64(latents / scale, vectors / scale).argmin(1)
    assert (nearest_codes(latents, vectors)[0] != wanted).sum() <= (3 if scale < 1e-25 else 0)  # as stored, float32 is denormal
    latents[7] = 1e20
    keep = torch.arange(60) != 7
    found, distances = nearest_codes(latents, vectors)
    assert torch.equal(found[keep], nearest_codes(latents[keep], vectors)[0])
    vectors[5] = 1e25
    assert nearest_codes(latents[keep], vectors)[0].ne(5).all()


def test_tiny_codes_beside_large_ones_are_told_apart():
    vectors = torch.cat([normal(40, 3, seed=1) * 2.0 ** -power for power in (0, 20, 45, 48, 50, 52, 60)])
    for power in (20, 45, 50, 55):
        latents = normal(50, 3) * 2.0**-power
        assert torch.equal(nearest_codes(latents, vectors)[0], distances64(latents, vectors).argmin(1))


@pytest.mark.parametrize("wrong", [-1, 9, 99])
def test_winners_that_do_not_exist_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{wrong}.*9 codes"):
        nonstationary_loss(normal(3, 2), normal(9, 2, seed=1), torch.tensor([0, wrong, 1]), 1.0)


def test_codes_that_are_not_finite_are_left_out():
    latents, vectors = normal(30, 5), normal(70, 5, seed=1)
    whole = vectors.clone()
    vectors[3], vectors[40, 2], vectors[69, 0] = math.nan, math.inf, -math.inf
    exact = distances64(latents, whole)
    exact[:, [3, 40, 69]] = math.inf
    assert torch.equal(nearest_codes(latents, vectors)[0], exact.argmin(1))
    zero = torch.tensor([[math.nan, math.nan], [0, 0], [10, 10], [math.inf, 0]])
    assert [x.tolist() for x in nearest_codes(torch.zeros(1, 2), zero)] == [[1], [0]]
    indices, distances = nearest_codes(latents, torch.full((70, 5), math.nan))
    assert indices.eq(0).all() and not distances.isfinite().any()


def test_many_codes_within_rounding_of_each_other():
    """Two far heaps of nearly equal codes: the bound excludes little, and float64 must decide."""
    heaps = torch.tensor([-1.0, 1.0]).repeat(300)[:, None] * normal(1, 9, seed=2)
    vectors = heaps + 1e-6 * normal(600, 9, seed=1)
    vectors[500:] = vectors[:100]
    latents = vectors[torch.randperm(600)[:50]] + 1e-6 * normal(50, 9)
    assert torch.equal(nearest_codes(latents, vectors)[0], distances64(latents, vectors).argmin(1))


def test_the_search_leaves_matmul_precision_as_it_was():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        nearest_codes(normal(4, 3), normal(5, 3))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("function", [nearest_codes, lambda z, c: nonstationary_loss(z, c, torch.zeros(4).long(), 1.0)])
def test_shapes_that_do_not_fit_are_named(function):
    with pytest.raises(ValueError, match=r"\[4, 3\].*\[5, 2\]"):
        function(torch.zeros(4, 3), torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"\[0, 3\]"):
        function(torch.zeros(4, 3), torch.zeros(0, 3))


# nonstationary_loss

def dense(latents, vectors, indices, temperature, dtype):
    """Return loss and gradient by autograd over all pairs; float32 expands the square, as is usual."""
    latents, vectors = latents.to(dtype), vectors.detach().to(dtype).requires_grad_()
    if dtype == torch.float64:
        pairs = (latents[:, None] - vectors).square().sum(2)
    else:
        pairs = latents.square().sum(1, keepdim=True) + vectors.square().sum(1) - 2 * latents @ vectors.t()
    weights = torch.softmax(-pairs / temperature, 1).detach().scatter(1, indices[:, None], 0.0)
    loss = (weights * pairs).sum() / latents.numel()
    (gradient,) = torch.autograd.grad(loss, vectors)
    return loss.detach(), gradient


def errors(latents, vectors, indices, temperature):
    """Return the relative errors of loss and gradient, ours and those of the dense float32 formula: [2, 2]."""
    vectors = vectors.detach().requires_grad_()
    loss = nonstationary_loss(latents, vectors, indices, temperature)
    loss.backward()
    assert loss.isfinite() and vectors.grad.isfinite().all()
    exact = dense(latents, vectors, indices, temperature, torch.float64)
    naive = dense(latents, vectors, indices, temperature, torch.float32)
    return torch.tensor([list(map(relative_error, values, exact)) for values in ((loss, vectors.grad), naive)])


@pytest.mark.parametrize("temperature", [1e-3, 0.35, 1.0, 1e3])
@pytest.mark.parametrize("chosen", ["nearest", "random"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", [(37, 53, 5), (64, 129, 16), (9, 2, 1)])
def test_loss_and_gradient_are_as_exact_as_the_dense_formula(shape, offset, chosen, temperature):
    count, size, width = shape
    squares = torch.zeros(2, 2)
    for seed in range(0, 24, 4):  # one draw's rounding is luck
        latents = normal(count, width, seed=seed) * width**-0.5 + offset
        vectors = normal(size, width, seed=seed + 1) * width**-0.5 + offset
        rivals = size - size // 2
        vectors[size // 2 :] = vectors[:rivals] + 1e-3 * normal(rivals, width, seed=seed + 2)
        indices = nearest_codes(latents, vectors)[0]
        if chosen == "random":
            indices = torch.randint(0, size, (count,), generator=torch.Generator().manual_seed(seed + 3))
        squares += errors(latents, vectors, indices, temperature).square() / 6
    ours, naive = squares.sqrt()
    assert (ours <= naive * (1 if offset else 2) + 1e-6).all()


@pytest.mark.fault(21)
@pytest.mark.parametrize("temperature", [1e-3, 0.35, 1e3])
def test_loss_with_equal_codes_and_latents_on_codes(temperature):
    vectors = normal(8, 4, seed=1).repeat(3, 1) + 2
    latents = torch.cat([vectors[:8], normal(20, 4) + 2])
    ours, naive = errors(latents, vectors, nearest_codes(latents, vectors)[0], temperature)
    assert (ours <= naive + 1e-6).all()


def test_loss_far_below_rounding_of_the_winner_is_kept():
    latents, vectors = torch.zeros(1, 1), torch.tensor([[0.0], [1.0]], requires_grad=True)
    loss = nonstationary_loss(latents, vectors, torch.tensor([0]), 1 / 60)
    loss.backward()
    torch.testing.assert_close(loss.item(), math.exp(-60), rtol=1e-5, atol=0)
    torch.testing.assert_close(vectors.grad[:, 0].tolist(), [0.0, 2 * math.exp(-60)], rtol=1e-5, atol=0)
    assert nonstationary_loss(latents, vectors, torch.tensor([0]), 1e-3) == 0


@pytest.mark.parametrize("most", [0, 10**6])
@pytest.mark.parametrize("tile", [(1, 1), (5, 7), (12, 29), (4, 28), (256, 2048)])
def test_loss_is_the_same_in_any_tiles_and_passes(monkeypatch, tile, most):
    monkeypatch.setitem(nonstationary_module.TILES, "cpu", tile)
    monkeypatch.setattr(nonstationary_module, "MOST", most)
    latents, vectors = normal(12, 6), normal(29, 6, seed=1).requires_grad_()
    indices = nearest_codes(latents, vectors)[0]
    loss = nonstationary_loss(latents, vectors, indices, 2.0, backend="chunked")
    loss.backward()
    exact, gradient = dense(latents, vectors, indices, 2.0, torch.float64)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(vectors.grad.double(), gradient, rtol=1e-4, atol=1e-8)
    with torch.no_grad():
        assert nonstationary_loss(latents, vectors, indices, 2.0, backend="chunked") == loss


@pytest.mark.parametrize("skip", [1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_skipped_tiles_change_no_more_than_is_documented(monkeypatch, temperature, skip):
    monkeypatch.setitem(nonstationary_module.TILES, "cpu", (16, 8))
    centres = normal(8, 6, seed=2) * 3
    vectors = (centres.repeat_interleave(8, 0) + 0.1 * normal(64, 6, seed=1)).requires_grad_()
    latents = centres.repeat_interleave(16, 0) + 0.3 * normal(128, 6)
    indices, _ = nearest_codes(latents, vectors)
    exact, gradient = dense(latents, vectors, indices, temperature, torch.float64)
    asked, multiply = [], torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *a, **k: asked.append(1) or multiply(*a, **k))
    loss = nonstationary_loss(latents, vectors, indices, temperature, skip=skip, backend="chunked")
    assert len(asked) < 8 * 8, "no tile was skipped"
    loss.backward()
    distances = distances64(latents, vectors.detach())
    assert abs(loss.double() - exact) <= skip * distances.max() / 6 + 1e-6
    norms = (vectors.grad.double() - gradient).norm(dim=1).sum()
    assert norms <= 2 * skip * distances.max().sqrt() / 6 + 1e-6


def test_the_gradient_reaches_what_vectors_came_from_and_never_latents():
    table, linear = normal(20, 5, seed=1), torch.nn.Linear(5, 5, bias=False)
    latents = normal(11, 5).requires_grad_()
    indices = torch.arange(11)
    vectors = linear(table)
    loss = nonstationary_loss(latents, vectors, indices, 0.35)
    (3 * loss).backward()
    assert latents.grad is None
    _, gradient = dense(latents.detach(), vectors, indices, 0.35, torch.float64)
    torch.testing.assert_close(linear.weight.grad.double(), 3 * gradient.t() @ table.double(), rtol=1e-5, atol=1e-7)


def test_loss_ignores_autocast_and_strides():
    latents, vectors = normal(5, 11).t(), normal(5, 20, seed=1).t().requires_grad_()
    indices = torch.arange(22)[::2] % 20
    plain = nonstationary_loss(latents.contiguous(), vectors.contiguous(), indices.contiguous(), 0.35)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = nonstationary_loss(latents, vectors, indices, 0.35)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=1e-6, atol=0)
    half = vectors.detach().bfloat16().requires_grad_()
    nonstationary_loss(latents.bfloat16(), half, indices, 0.35).backward()
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.fault(23)
def test_loss_without_gradient_and_without_latents():
    latents, vectors, indices = normal(11, 5), normal(20, 5, seed=1).requires_grad_(), torch.arange(11)
    with torch.no_grad():
        loss = nonstationary_loss(latents, vectors, indices, 0.35)
    assert not loss.requires_grad
    assert not nonstationary_loss(latents.requires_grad_(), vectors.detach(), indices, 0.35).requires_grad
    assert loss == nonstationary_loss(latents, vectors, indices, 0.35).detach()
    empty = nonstationary_loss(latents[:0], vectors, indices[:0], 0.35)
    empty.backward()
    assert empty == 0 and vectors.grad.eq(0).all()


def test_gradient_work_is_skipped_where_no_gradient_is_wanted(monkeypatch):
    asked, chunked = [], nonstationary_module._chunked
    monkeypatch.setattr(nonstationary_module, "_chunked", lambda *a: asked.append(a[-2]) or chunked(*a))
    latents, vectors, indices = normal(300, 20), normal(40, 20).requires_grad_(), torch.arange(300) % 40
    nonstationary_loss(latents, vectors, indices, 1.0, backend="chunked")
    nonstationary_loss(latents, vectors.detach(), indices, 1.0, backend="chunked")
    with torch.no_grad():
        nonstationary_loss(latents, vectors, indices, 1.0, backend="chunked")
    assert asked == [True, False, False]


def test_a_single_code_leaves_nothing_to_attract():
    vector = normal(1, 3).requires_grad_()
    loss = nonstationary_loss(normal(7, 3), vector, torch.zeros(7).long(), 0.35)
    loss.backward()
    assert loss == 0 and vector.grad.eq(0).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, 1e-40, math.inf])
def test_loss_refuses_a_temperature_that_is_not_positive(temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        nonstationary_loss(normal(3, 2), normal(4, 2), torch.zeros(3).long(), temperature)


def test_loss_refuses_indices_of_another_shape():
    with pytest.raises(ValueError, match=r"\[3\].*\[3, 2\]"):
        nonstationary_loss(normal(3, 2), normal(4, 2), torch.zeros(3, 2).long(), 1.0)


MEMORY = """
import resource, torch
from vqzoo.ops import nearest_codes, nonstationary_loss
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
latents, vectors = torch.randn(4096, 16), torch.randn(65536, 16).requires_grad_()
indices = nearest_codes(latents[:64], vectors)[0]
nonstationary_loss(latents[:1], vectors, indices[:1], 1.0).backward()
start = peak()
indices, _ = nearest_codes(latents, vectors)
middle = peak()
nonstationary_loss(latents[:1024], vectors, indices[:1024], 1.0).backward()
print(middle - start, peak() - start)
"""


@ONCE
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_stays_far_below_all_pairs():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    search, loss = map(float, run.stdout.split())  # MiB; all pairs are 1024 for the search and 256 for the loss
    assert search < 64
    assert loss < 96


# usage

def test_code_usage_counts_indices_of_any_shape():
    indices = torch.tensor([[[0, 2], [2, 5]], [[5, 5], [0, 2]]])
    assert code_usage(indices, 7).tolist() == [2, 0, 3, 0, 0, 3, 0]
    assert code_usage(indices.int().transpose(0, 2), 7).tolist() == [2, 0, 3, 0, 0, 3, 0]
    empty = code_usage(torch.empty(0, dtype=torch.int64), 3)
    assert empty.tolist() == [0, 0, 0] and empty.dtype == torch.int64


@pytest.mark.parametrize("wrong", [-1, 4])
def test_code_usage_refuses_indices_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"{wrong}.* size 4"):
        code_usage(torch.tensor([wrong, 2]), 4)


def test_perplexity_and_usage():
    assert perplexity(torch.full((4096,), 3)).item() == pytest.approx(4096, rel=1e-5)
    assert perplexity(torch.tensor([0, 9, 0])).item() == pytest.approx(1)
    assert perplexity(torch.tensor([1, 3])).item() == pytest.approx(4 / 3**0.75)
    assert perplexity(torch.tensor([0.1, 0.3])).item() == pytest.approx(4 / 3**0.75)
    assert perplexity(torch.zeros(5, dtype=torch.int64)).item() == 0
    assert usage(torch.tensor([0, 7, 1, 0])).item() == 0.5


# collective

def test_collectives_are_the_identity_on_one_process():
    tensor = normal(3, 2).requires_grad_()
    assert all_reduce_sum(tensor) is tensor
    assert torch.equal(gather_rows(tensor), tensor) and not gather_rows(tensor).requires_grad
    assert torch.equal(broadcast(tensor), tensor) and not broadcast(tensor).requires_grad
    assert gather_names(["zero"]) == ["zero"]


def work(rank, port):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    tensor = (torch.arange(6.0).reshape(3, 2).t() + 10 * rank).requires_grad_()
    total = all_reduce_sum(tensor)
    assert torch.equal(total, 2 * torch.arange(6.0).reshape(3, 2).t() + 10)
    # The sum over processes of (rank + 1)·total² has the derivative Σ_r 2 (r + 1) total = 6 total on every process.
    ((rank + 1) * total.square()).sum().backward()
    assert torch.equal(tensor.grad, 6 * total.detach())
    assert all_reduce_sum(torch.tensor([rank, 5])).tolist() == [1, 10]
    rows = gather_rows(torch.tensor([[rank, 1], [rank, 2]]).t())
    assert rows.tolist() == [[0, 0], [1, 2], [1, 1], [1, 2]]
    assert gather_rows(tensor).shape == (4, 3)
    first = broadcast(tensor)
    assert torch.equal(first, torch.arange(6.0).reshape(3, 2).t()) and not first.requires_grad
    assert gather_names(["zero", "nought"] if rank == 0 else ["one"]) == ["zero", "nought", "one"]
    torch.distributed.destroy_process_group()


@ONCE
def test_collectives_over_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port,), nprocs=2)


# backends


@pytest.mark.parametrize("kind", ["gauss", "initial", "offset", "sphere", "trained", "repeated"])
@pytest.mark.parametrize(("count", "size", "width"), [(150, 3001, 8), (90, 700, 64), (40, 20000, 5)])
def test_the_nearest_code_is_float64s_on_every_distribution(kind, count, size, width):
    latents, vectors = clouds(kind, count, size, width)
    if kind == "trained":
        latents = vectors[torch.arange(count) * 3] + 0.3 * latents * width**-0.5
    if kind == "repeated":
        vectors = vectors[torch.arange(size) % (size // 3)]
        latents = vectors[torch.arange(count)] + 1e-3 * latents
    exact = torch.cat([(z - vectors.double()).square().sum(1).argmin()[None] for z in latents.double()])
    assert torch.equal(nearest_codes(latents, vectors)[0], exact)


def test_fast_searches_say_how_often_they_differ():
    latents, vectors = clouds("initial", 200, 5000, 16)
    assert 0 <= search_disagreement(latents, vectors) < 0.05
    first = torch.tensor([[1.0, 0.0]]).repeat(300, 1)
    assert search_disagreement(first + 1, first) in (0.0, 1.0)  # equal codes: any of them is as near


def test_a_backend_is_chosen_by_size_and_device():
    assert backends.resolve("auto", torch.device("cpu"), 4, 8, 16, 512) == "eager"
    assert backends.resolve("auto", torch.device("cpu"), 4096, 8192, 64, 512) == "chunked"
    assert backends.resolve("eager", torch.device("cpu"), 4096, 8192, 64, 512) == "eager"
    with pytest.raises(ValueError, match="backend: 'triton' cannot work on cpu: .*choose auto or chunked"):
        backends.resolve("triton", torch.device("cpu"), 4, 8, 16, 512)


def test_defaults_hold_inside_a_block_and_a_call_may_differ(monkeypatch, backend):
    assert backends.settle(None, None) == (backend, True)
    with pytest.raises(RuntimeError), use("auto", "fast"):
        assert backends.settle(None, None) == ("auto", False)
        assert backends.settle("chunked", "exact") == ("chunked", True)
        raise RuntimeError
    assert backends.settle(None, None) == (backend, True)


@pytest.mark.parametrize(("options", "named"), [({"backend": "chunky"}, "chunked"), ({"precision": "exakt"}, "exact")])
def test_unknown_options_are_refused_with_the_nearest(options, named):
    with pytest.raises(ValueError, match=named):
        nearest_codes(normal(3, 2), normal(4, 2), **options)
    with pytest.raises(ValueError, match=named), use(**options):
        pass


@pytest.mark.parametrize("sizes", [(16384, 65536, 128), (8192, 1024, 64), (4, 8, 16)])
def test_the_plan_names_backends_and_memory(sizes):
    with use():
        search, loss = plan(torch.device("cpu"), *sizes)
    assert (search.operation, loss.operation) == ("nearest_codes", "nonstationary_loss")
    assert search.backend == loss.backend == ("eager" if sizes[1] == 8 else "chunked")
    assert 0 < search.bytes < 128e6 and 0 < loss.bytes < 300e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_keep_torchs_contract(dtype, backend):
    latents, vectors = normal(9, 4).to(dtype), normal(20, 4, seed=1).to(dtype).requires_grad_()
    torch.library.opcheck(nearest_module._nearest_codes, (latents, vectors.detach(), backend, True))
    for differentiate in (True, False):
        codes = vectors if differentiate else vectors.detach()
        arguments = (latents, codes, torch.arange(9), 0.35, 0.0, backend, True, differentiate)
        torch.library.opcheck(nonstationary_module._nonstationary, arguments)


def test_operations_compile_without_a_break(backend):
    def step(latents, weight):
        vectors = weight * 2
        indices, distances = nearest_codes(latents, vectors)
        return nonstationary_loss(latents, vectors, indices, 0.35), indices, distances

    latents, weight = normal(33, 5), normal(70, 5, seed=1).requires_grad_()
    wanted = step(latents, weight)
    (gradient,) = torch.autograd.grad(wanted[0], weight)
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(latents, weight)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(torch.autograd.grad(found[0], weight)[0], gradient)


# soft assignments and sums


@ONCE
@pytest.mark.parametrize("temperature", [0.1, 1.0, 100.0])
def test_soft_assignments_and_their_gradients_are_the_dense_formulas(monkeypatch, temperature):
    from vqzoo.ops import assignment

    monkeypatch.setattr(assignment, "ROWS", 7 * 40)
    found = []
    for dtype in (torch.float32, torch.float64):
        latents, vectors = (x.to(dtype).requires_grad_() for x in (normal(23, 5) + 1, normal(40, 5, seed=1) + 1))
        if dtype == torch.float32:
            with torch.autocast("cpu", torch.bfloat16):
                entropy, mean = soft_assignments(latents, vectors, temperature)
        else:
            shares = (torch.cdist(latents, vectors).square() / -temperature).softmax(1)
            entropy, mean = torch.special.entr(shares).sum(1).mean(), shares.mean(0)
        loss = entropy - 0.7 * torch.special.entr(mean.clamp(min=1e-30)).sum()
        found.append((entropy, mean, *torch.autograd.grad(loss, (latents, vectors))))
    for ours, exact in zip(*found, strict=True):
        assert relative_error(ours.detach(), exact.detach()) < 1e-5 * max(1, 0.1 / temperature)


@pytest.mark.fault(21)
@ONCE
def test_soft_assignments_are_finite_where_they_are_hard():
    latents, vectors = (x.requires_grad_() for x in (normal(23, 5) * 100, normal(40, 5, seed=1) * 100))
    entropy, mean = soft_assignments(latents, vectors, 1e-3)
    gradients = torch.autograd.grad(entropy + mean.square().sum(), (latents, vectors))
    assert entropy == 0 and abs(mean.sum().item() - 1) < 1e-6 and all(x.isfinite().all() for x in gradients)


@ONCE
def test_soft_assignments_refuse_what_has_no_mean():
    with pytest.raises(ValueError, match="no latents"):
        soft_assignments(torch.zeros(0, 3), torch.zeros(4, 3), 1.0)
    with pytest.raises(ValueError, match="temperature"):
        soft_assignments(torch.zeros(2, 3), torch.zeros(4, 3), 0.0)


@ONCE
def test_code_sums_add_up_what_chose_a_code():
    latents, indices = normal(50, 3), torch.arange(50) % 7
    sums, counts = code_sums(latents, indices, 9)
    assert counts.tolist() == [8] + [7] * 6 + [0, 0] and sums[7:].eq(0).all()
    torch.testing.assert_close(sums[3], latents[3::7].sum(0))
