"""Quantizers with codebooks, gradients and losses of their own: what each computes, against float64 references, and runs."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_plugins import generator, losses_of, normal, pictures, plugin, progress, same, spread_codes, start, state, tokenizer
from test_processes import launch
from test_resume import CHANGED, Stop, assert_same_end, at, crash
from test_training import COMMON, assert_equal_up_to_rounding, checkpoint_at, events, run

from vqzoo import Table, Tokenizer, UserError
from vqzoo.ops import embedding_losses, nearest_codes, straight_through
from vqzoo.trainer import Trainer

SMALL = {"fsq": {"levels": [4, 4]}, "factorized": {"dimension": 4}, "residual": {"depth": 3}}
"""Fields that fit the 16 codes of the tokenizers here."""

METHODS = {
    "ema": ("vq", "ema"), "fsq": ("fsq",), "rotation": ("vq", "rotation"), "residual": ("residual",),
    "entropy": ("vq", "entropy"), "factorized": ("vq", "factorized"), "separate": ("residual",), "symmetric": ("fsq",),
    "sphere": ("vq", "factorized", "rotation", "entropy", "nsvq"), "averaged": ("vq", "ema", "rotation", "entropy"),
}
"""Methods, and combinations of them, by the plugins that make them up."""


def fields(name):
    """Return the plugins' fields of a method."""
    changed = {"separate": {"residual": {"depth": 3, "shared": False}},
               "symmetric": {"fsq": {"levels": [2, 4, 2], "symmetric": True}}}
    return {**SMALL, **changed.get(name, {})}


def method(name, **more):
    return tokenizer(*METHODS[name], **{**fields(name), **more})


def spread(made, images):
    """Put codes where the latents are, if they can be put anywhere, or else spread the latents."""
    if made.codebook.replaceable:
        spread_codes(made, images)
    else:
        with torch.no_grad():
            made.encoder.head.weight.mul_(8)
    return made


def double(tensor):
    return tensor.detach().double()


# ---- ema


def averages(codes, steps, decay, eps):
    """Return the codes after each step of §3 of the appendix of arXiv 1711.00937 in float64, sums kept; N starts at one."""
    counts, sums, found = torch.ones(len(codes), dtype=torch.float64), codes.double(), []
    for latents, indices in steps:
        chosen = F.one_hot(indices, len(codes)).double()
        counts = decay * counts + (1 - decay) * chosen.sum(0)
        sums = decay * sums + (1 - decay) * chosen.T @ latents.double()
        smoothed = (counts + eps) / (counts.sum() + len(codes) * eps) * counts.sum()
        found.append((counts, sums / smoothed[:, None]))
    return found


def averaging(size=5, width=3, **config):
    torch.manual_seed(0)
    ema = plugin("ema", **config)
    return ema, ema.make_codebook(size, width)


def refresh(ema, codebook, latents, indices):
    with torch.no_grad():
        return ema.refresh_codes(codebook, latents, indices)


@pytest.mark.parametrize(("decay", "eps"), [(0.99, 1e-5), (0.5, 0.3), (0.0, 1e-3)])
def test_ema_is_the_published_moving_average(decay, eps):
    ema, codebook = averaging(decay=decay, eps=eps)
    steps = [(normal(40, 3, seed=seed), torch.randint(4, (40,), generator=generator(seed))) for seed in range(8)]  # 4 is dead
    for (latents, indices), (counts, codes) in zip(steps, averages(codebook.table, steps, decay, eps), strict=True):
        assert refresh(ema, codebook, latents, indices) is None
        torch.testing.assert_close(codebook.counts.double(), counts, rtol=1e-6, atol=0)
        torch.testing.assert_close(codebook.vectors().double(), codes, rtol=1e-5, atol=1e-6)
    assert all(smooth for _, smooth in codebook.take_replaced())


def test_two_steps_of_ema_by_hand():
    ema, codebook = averaging(size=2, width=1, decay=0.5, eps=1e-12)
    codebook.replace_(torch.arange(2), torch.tensor([[1.0], [-1.0]]))
    refresh(ema, codebook, torch.tensor([[2.0], [4.0]]), torch.tensor([0, 0]))
    # N = (1 + 2) / 2, m = (1 + 6) / 2; the other has half of both
    torch.testing.assert_close(codebook.vectors(), torch.tensor([[3.5 / 1.5], [-1.0]]))
    torch.testing.assert_close(codebook.counts, torch.tensor([1.5, 0.5]))
    refresh(ema, codebook, torch.tensor([[-5.0], [4.0]]), torch.tensor([1, 0]))
    # N = (1.5 + 1) / 2 and (0.5 + 1) / 2, m = (3.5 + 4) / 2 and (-0.5 - 5) / 2
    torch.testing.assert_close(codebook.vectors(), torch.tensor([[3.75 / 1.25], [-2.75 / 0.75]]))


def test_a_code_of_ema_that_nobody_chooses_stands_still_until_its_count_is_near_eps_and_then_shrinks():
    ema, codebook = averaging(decay=0.9)
    before, steps = codebook.table.clone(), [(normal(8, 3), torch.zeros(8, dtype=torch.int64))] * 200
    reference = averages(before, steps, 0.9, 1e-5)
    for number, (latents, indices) in enumerate(steps):
        refresh(ema, codebook, latents, indices)
        torch.testing.assert_close(codebook.vectors()[1:].double(), reference[number][1][1:], rtol=1e-4, atol=1e-6)
        if number == 50:  # N = 5e-3
            torch.testing.assert_close(codebook.vectors()[1:], before[1:], rtol=1e-2, atol=0)
    assert codebook.vectors()[1:].norm() < 1e-3 * before[1:].norm()
    assert codebook.vectors().isfinite().all()


def test_a_row_of_ema_that_is_overwritten_begins_anew_and_no_other_moves():
    ema, codebook = averaging(decay=0.5)
    others = torch.zeros(8, dtype=torch.int64)
    for _ in range(60):
        refresh(ema, codebook, normal(8, 3), others)
    assert codebook.counts[2] < 1e-12
    before, wanted = state(codebook), torch.tensor([[7.0, 8.0, 9.0]])
    codebook.replace_(torch.tensor([2]), wanted)
    assert torch.equal(codebook.vectors()[2:3], wanted) and codebook.counts[2] == 1
    kept = torch.tensor([0, 1, 3, 4])
    assert same({key: value[kept] for key, value in state(codebook).items()}, {key: v[kept] for key, v in before.items()})
    refresh(ema, codebook, normal(8, 3), others)
    torch.testing.assert_close(codebook.vectors()[2:3], wanted, rtol=1e-4, atol=0)  # with its old count, half of it were left
    refresh(ema, codebook, wanted.expand(3, 3) + 3, torch.tensor([2, 2, 2]))
    torch.testing.assert_close(codebook.vectors()[2:3], wanted + 3 * 1.5 / 1.75, rtol=1e-4, atol=0)  # N = 0.5, then n = 3


def test_kmeans_can_start_a_moving_average():
    ema, codebook = averaging(size=2)
    centres = torch.tensor([[3.0, 0, 1], [-3.0, 1, 0]])
    start(codebook, centres.repeat_interleave(40, 0)[None])
    assert torch.cdist(codebook.vectors(), centres).amin(1).max() < 1e-5 and torch.equal(codebook.counts, torch.ones(2))
    refresh(ema, codebook, centres, nearest_codes(centres, codebook.vectors())[0])
    assert torch.cdist(codebook.vectors(), centres).amin(1).max() < 1e-4, "a count of zero would throw the codes away"


def test_ema_leaves_the_commitment_alone_of_the_losses_and_no_parameter_to_train():
    made = spread(method("ema"), pictures())
    output = made(pictures())
    assert set(output.losses) == {"commitment"} and not list(made.codebook.parameters()) and not output.codes.requires_grad
    torch.testing.assert_close(
        output.losses["commitment"].double(), 0.25 * (double(output.latents) - double(output.codes)).square().mean())


def test_ema_moves_nothing_where_nothing_was_quantized_and_refuses_several_codes_per_token():
    ema, codebook = averaging()
    before = state(codebook)
    assert refresh(ema, codebook, normal(8, 3), None) is None and same(state(codebook), before)
    with pytest.raises(UserError, match="plugins.ema: .* gives 2; route hooks.refresh_codes without"):
        refresh(ema, codebook, normal(8, 3), torch.zeros(8, 2, dtype=torch.int64))


def test_ema_needs_its_own_codebook():
    with pytest.raises(UserError, match="refresh_codes of ema needs make_codebook of ema"):
        tokenizer("vq", "ema", hooks={"make_codebook": ["vq"]})


@pytest.mark.parametrize("config", [{"decay": 1.0}, {"decay": -0.1}, {"eps": 0.0}, {"eps": math.inf}, {"init": "zeros"}])
def test_ema_refuses_values_that_cannot_work(config):
    with pytest.raises(ValueError, match=f"^{next(iter(config))}: "):
        plugin("ema", **config)


# ---- fsq

LEVELS = [[8, 5, 5, 5], [3, 4], [5], [7, 6, 4], [3, 3, 3]]
GRIDS = [(levels, symmetric) for symmetric in (False, True) for levels in LEVELS] + [([2], True), ([2, 3, 2], True)]


def grid(levels, symmetric=False, width=None):
    torch.manual_seed(0)
    fsq = plugin("fsq", levels=levels, symmetric=symmetric)
    return fsq, fsq.make_codebook(math.prod(levels), width or len(levels))


def bounded(features, levels, symmetric):
    """Return the bound of arXiv 2309.15505, or of 2411.19842, in levels: [..., D] float64, and its slope."""
    L = torch.tensor(levels, dtype=torch.float64)
    half = (L - 1) / 2 if symmetric else (L - 1) * (1 + 1e-3) / 2
    off = torch.zeros_like(L) if symmetric else torch.where(L % 2 == 0, 0.5, 0.0)
    waves = (features.double() + (off / half).atanh()).tanh()
    return waves * half - off, (1 - waves.square()) * half


@pytest.mark.parametrize(("levels", "symmetric"), GRIDS)
def test_the_indices_of_fsq_are_a_bijection_of_its_grid(levels, symmetric):
    fsq, codebook = grid(levels, symmetric)
    everything = torch.arange(codebook.size)
    codes = codebook.lookup(everything)
    found = fsq.quantize(codes[None], codebook)
    assert torch.equal(found.indices[0], everything) and torch.equal(found.codes[0], codes)
    assert torch.equal(codebook.vectors(), codes) and codes.shape == (math.prod(levels), len(levels))
    assert codes.dtype == torch.float32 and found.indices.dtype == torch.int64
    halves = [(L - 1) / 2 if symmetric else L // 2 for L in levels]
    axes = [[(digit - half) / half for digit in range(L)] for L, half in zip(levels, halves, strict=True)]
    product = torch.tensor([row[::-1] for row in itertools.product(*reversed(axes))], dtype=torch.float64)
    torch.testing.assert_close(codes.double(), product, rtol=0, atol=1e-7)  # the first channel runs fastest


@pytest.mark.parametrize("levels", LEVELS)
def test_an_index_of_fsq_is_the_published_number(levels):
    fsq, codebook = grid(levels)
    latents = codebook.from_encoder(3 * normal(2, 200, len(levels)))
    found = fsq.quantize(latents, codebook)
    number = sum((found.codes[..., c].double() * (L // 2) + L // 2) * math.prod(levels[:c]) for c, L in enumerate(levels))
    assert torch.equal(number.round().long(), found.indices)


@pytest.mark.parametrize(("levels", "symmetric"), GRIDS)
def test_fsq_rounds_the_published_bound(levels, symmetric):
    fsq, codebook = grid(levels, symmetric)
    features = 2 * normal(4, 500, len(levels))
    latents = codebook.from_encoder(features)
    wanted, _ = bounded(features, levels, symmetric)
    scale = torch.tensor([(L - 1) / 2 if symmetric else L // 2 for L in levels], dtype=torch.float64)
    torch.testing.assert_close(latents.double(), wanted / scale, rtol=0, atol=1e-6)
    codes = fsq.quantize(latents, codebook).codes.double()
    rounded = ((wanted + scale).round() - scale) / scale if symmetric else wanted.round() / scale
    clear = ((wanted + scale) % 1 - 0.5).abs() > 1e-5
    assert clear.double().mean() > 0.99
    torch.testing.assert_close(codes[clear], rounded[clear], rtol=0, atol=1e-7)


@pytest.mark.parametrize(("levels", "symmetric"), GRIDS)
def test_every_level_of_fsq_is_reached_the_outermost_too(levels, symmetric):
    fsq, codebook = grid(levels, symmetric)
    features = torch.linspace(-9, 9, 20001)[None, :, None].expand(1, -1, len(levels))
    codes = fsq.quantize(codebook.from_encoder(features), codebook).codes[0]
    for channel, L in enumerate(levels):
        assert len(codes[:, channel].unique()) == L
        assert torch.equal(codes[[0, -1], channel], codebook.vectors()[[0, -1], channel])
        assert (codes[1:, channel] >= codes[:-1, channel]).all()
    assert codebook.vectors().min() == -1


@pytest.mark.parametrize(("levels", "symmetric"), [([8, 5], False), ([8, 5], True), ([2, 7], True)])
def test_the_gradient_of_fsq_is_the_slope_of_its_bound(levels, symmetric):
    fsq, codebook = grid(levels, symmetric)
    features, upstream = normal(2, 50, len(levels)).requires_grad_(), normal(2, 50, len(levels), seed=1)
    latents = codebook.from_encoder(features)
    found = fsq.quantize(latents, codebook)
    seen = fsq.straight_through(latents, found.codes)
    torch.testing.assert_close(seen, found.codes, rtol=0, atol=1e-6)
    seen.backward(upstream)
    scale = torch.tensor([(L - 1) / 2 if symmetric else L // 2 for L in levels], dtype=torch.float64)
    slope = bounded(features, levels, symmetric)[1] / scale
    torch.testing.assert_close(features.grad.double(), upstream.double() * slope, rtol=1e-4, atol=1e-6)
    assert fsq.embedding_loss() == {}


def test_the_code_of_fsq_is_the_nearest_one_wherever_a_latent_lies():
    fsq, codebook = grid([5, 4, 3])
    latents = 3 * normal(1, 300, 3)  # beyond what the bound lets through
    found = fsq.quantize(latents, codebook)
    assert torch.equal(found.indices[0], nearest_codes(latents[0], codebook.vectors())[0])


def test_fsq_has_linear_maps_where_widths_differ_and_nothing_to_train_where_they_do_not():
    _, codebook = grid([4, 4], width=8)
    assert (codebook.encoder_width, codebook.width, codebook.decoder_width) == (8, 2, 8)
    assert {name for name, _ in codebook.named_parameters()} == {"enter.weight", "enter.bias", "leave.weight", "leave.bias"}
    assert codebook.from_encoder(normal(2, 5, 8)).shape == (2, 5, 2) and codebook.to_decoder(normal(2, 5, 2)).shape == (2, 5, 8)
    assert not list(grid([4, 4])[1].parameters())
    grids = [grid([4, 2, 2], True), grid([2, 4, 2], True), grid([4, 4]), grid([4, 4], True)]
    assert len({codebook.fingerprint() for _, codebook in grids}) == 4, "tokens of one are none of another"


def test_fsq_refuses_levels_that_do_not_make_the_codebooks_size_and_says_which_would():
    with pytest.raises(UserError, match=r"^codebook: size 16 .* plugins.fsq.levels \[8, 5, 5, 5\], which is 1000; set "
                                        r"codebook.size=1000, .* \[8, 6, 5\], with codebook.size=240$"):
        tokenizer("fsq")


@pytest.mark.parametrize("config", [
    {"levels": [2, 8]}, {"levels": [8, 1]}, {"levels": []}, {"levels": [1], "symmetric": True}, {"levels": [-3, 3]},
])
def test_fsq_refuses_channels_of_too_few_levels(config):
    with pytest.raises(ValueError, match=r"^levels: \["):
        plugin("fsq", **config)


def test_nobody_can_write_to_a_grid():
    with pytest.raises(UserError, match="hooks.refresh_codes: nsvq would overwrite codes, but Grid is implicit"):
        tokenizer("fsq", "nsvq", **SMALL)
    with pytest.raises(UserError, match="plugins.kmeans: Grid computes its codes"):
        start(grid([4, 4])[1], normal(1, 9, 2))


# ---- rotation


def rotation_matrix(source, target):
    """Return R [D, D] of §4 of arXiv 2410.06424 in float64, by the formula for two unit vectors."""
    middle = (source + target) / (source + target).norm()
    return torch.eye(len(source), dtype=torch.float64) - 2 * middle.outer(middle) + 2 * target.outer(source)


def rotated(latents, codes, upstream):
    """Return what the decoder sees and the gradient of latents [..., D]."""
    latents = latents.clone().requires_grad_()
    codes = codes.clone().requires_grad_()
    seen = plugin("rotation").straight_through(latents, codes)
    on_latents, on_codes = torch.autograd.grad(seen, (latents, codes), upstream, allow_unused=True)
    assert on_codes is None and torch.equal(seen, codes)
    return on_latents


@pytest.mark.parametrize("width", [2, 3, 16])
@pytest.mark.parametrize("apart", [1.0, 1e-3])
def test_the_gradient_of_the_rotation_trick_is_that_of_its_matrix(width, apart):
    latents, upstream = normal(2, 20, width), normal(2, 20, width, seed=2)
    codes = latents * 1.5 + apart * normal(2, 20, width, seed=1)
    found = rotated(latents, codes, upstream)
    for e, q, g, mine in zip(*(x.flatten(0, 1).double() for x in (latents, codes, upstream, found)), strict=True):
        turn, scale = rotation_matrix(e / e.norm(), q / q.norm()), q.norm() / e.norm()
        torch.testing.assert_close(turn @ turn.T, torch.eye(width, dtype=torch.float64))
        torch.testing.assert_close(scale * turn @ e, q)
        torch.testing.assert_close(mine, scale * turn.T @ g, rtol=1e-4, atol=1e-4 * float(scale))


def test_a_code_along_its_latent_only_scales_the_gradient():
    latents, upstream = normal(1, 9, 4), normal(1, 9, 4, seed=2)
    torch.testing.assert_close(rotated(latents, 3 * latents, upstream), 3 * upstream, rtol=1e-5, atol=1e-5)


def test_the_rotation_trick_passes_the_gradient_where_a_vector_is_zero():
    vectors, upstream = normal(1, 6, 4), normal(1, 6, 4, seed=2)
    for of_latents, of_codes in ((1, 0), (0, 1), (0, 0), (1e-30, 1)):
        assert torch.equal(rotated(of_latents * vectors, of_codes * vectors, upstream), upstream)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-7, 1e-5, 1e-3])
def test_the_gradient_of_the_rotation_trick_keeps_its_length_where_vectors_are_almost_opposite(angle):
    latents, aside, upstream = normal(1, 50, 4), normal(1, 50, 4, seed=1), normal(1, 50, 4, seed=2)
    found = rotated(latents, -2 * latents + angle * aside, upstream)
    torch.testing.assert_close(found.norm(dim=-1), 2 * upstream.norm(dim=-1), rtol=2e-2, atol=0)
    if angle == 0:  # the reflection that takes the latent to its code
        along = F.normalize(latents, dim=-1)
        wanted = 2 * (upstream - 2 * (upstream * along).sum(-1, keepdim=True) * along)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_rotation_takes_the_place_of_any_straight_through_estimator():
    for name in ("vq", "residual", "fsq"):
        hooks = {} if name == "vq" else {"straight_through": ["rotation"]}
        made = spread(tokenizer(name, "rotation", hooks=hooks, **SMALL), pictures())
        output = made(pictures())
        given = made._leave(output.codes)
        decoded = made.decoder(given.transpose(1, 2).unflatten(2, (8, 8)).contiguous())
        assert torch.equal(decoded, output.reconstructions), "in training, too, the decoder sees the codes themselves"
        output.reconstructions.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in made.encoder.parameters())


# ---- residual


def levels_of(size=6, width=3, depth=4, shared=True, **config):
    torch.manual_seed(0)
    residual = plugin("residual", depth=depth, shared=shared, **config)
    codebook = residual.make_codebook(size, width)
    with torch.no_grad():
        codebook.weight.normal_().mul_(0.7)
    return residual, codebook


@pytest.mark.parametrize("shared", [True, False])
def test_residual_takes_the_nearest_code_of_what_is_left_level_by_level(shared):
    residual, codebook = levels_of(shared=shared)
    latents = normal(2, 30, 3).requires_grad_()
    found = residual.quantize(latents, codebook)
    assert found.indices.shape == (2, 30, 4) and found.indices.dtype == torch.int64
    assert len(codebook.weight) == codebook.rows == (6 if shared else 24) and codebook.row_parameters()[0] is codebook.weight
    left, total = double(latents), torch.zeros(2, 30, 3, dtype=torch.float64)
    for level in range(4):
        table = double(codebook.weight if shared else codebook.weight[6 * level: 6 * level + 6])
        distances = (left[:, :, None] - table).square().sum(-1)
        chosen = found.indices[..., level]
        torch.testing.assert_close(distances.gather(2, chosen[..., None])[..., 0], distances.amin(2), rtol=0, atol=1e-5)
        left, total = left - table[chosen], total + table[chosen]
    torch.testing.assert_close(double(found.codes), total, rtol=0, atol=1e-6)
    assert torch.equal(found.codes, codebook.lookup(found.indices)) and found.indices.unique().numel() > 3
    assert torch.equal(codebook.rows_of(found.indices), found.indices + (0 if shared else torch.arange(0, 24, 6)))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("codebook_weight", "commitment_weight"), [(1.0, 0.25), (0.5, 3.0)])
def test_the_losses_of_residual_are_means_over_its_partial_sums(shared, codebook_weight, commitment_weight):
    residual, codebook = levels_of(shared=shared, codebook_weight=codebook_weight, commitment_weight=commitment_weight)
    latents = normal(2, 30, 3).requires_grad_()
    found = residual.quantize(latents, codebook)
    losses = residual.embedding_loss(latents, found.extras)
    assert losses.keys() == {"codebook", "commitment"}

    z, table = double(latents).requires_grad_(), double(codebook.weight).requires_grad_()
    before, commitment, moving = torch.zeros_like(z), 0, 0
    for level in range(4):
        own = table[codebook.rows_of(found.indices)[..., level]]
        commitment = commitment + F.mse_loss(z, (before + own).detach()) / 4
        moving = moving + F.mse_loss(own, (z - before).detach()) / 4  # each code moves to the residuals that chose it
        before = (before + own).detach()
    torch.testing.assert_close(losses["commitment"].double(), commitment_weight * commitment)
    torch.testing.assert_close(losses["codebook"].double(), codebook_weight * moving)
    both = (latents, codebook.weight)
    on_latents, nothing = torch.autograd.grad(losses["commitment"], both, allow_unused=True)
    torch.testing.assert_close(on_latents.double(), commitment_weight * torch.autograd.grad(commitment, z)[0])
    assert nothing is None
    nothing, on_codes = torch.autograd.grad(losses["codebook"], both, allow_unused=True)
    torch.testing.assert_close(on_codes.double(), codebook_weight * torch.autograd.grad(moving, table)[0])
    assert nothing is None


def test_there_is_no_commitment_of_residual_to_latents_that_take_no_gradient():
    residual, codebook = levels_of()
    found = residual.quantize(normal(2, 9, 3), codebook)
    assert set(residual.embedding_loss(normal(2, 9, 3), found.extras)) == {"codebook"}


def test_kmeans_starts_each_table_at_what_those_before_it_leave_and_the_error_falls_with_depth():
    residual, codebook = levels_of(size=2, width=1, depth=3, shared=False)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)))
    latents = signs @ torch.tensor([[9.0], [1.0], [0.1]]) + 5  # sums of a code out of each of three tables
    start(codebook, latents.repeat(8, 1)[None], latents_per_code=32, iterations=40)
    (rows, smooth), = codebook.take_replaced()
    assert torch.equal(rows, torch.arange(6)) and not smooth
    terms = residual.quantize(latents[None], codebook).extras["terms"].detach()
    errors = [float((latents - sums).square().sum(-1).mean()) for sums in terms[0].cumsum(1).unbind(1)]
    assert errors == pytest.approx([1.01, 0.01, 0], abs=1e-4)


def test_the_error_falls_with_depth_on_what_an_encoder_gives():
    made = spread(method("separate"), pictures(count=4))
    output = made.eval()(pictures(count=4))
    sums = output.extras["terms"].cumsum(2)
    errors = (output.latents[:, :, None] - sums).square().mean((0, 1, 3)).tolist()
    assert sorted(errors, reverse=True) == errors and errors[-1] < 0.8 * errors[0]
    torch.testing.assert_close(sums[:, :, -1], output.codes)


@pytest.mark.parametrize("name", ["residual", "separate"])
@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 2, 3), (1, 2, 2, 2), (1, 2, 2, 4)])
def test_decode_refuses_another_number_of_codes_per_token(name, shape):
    with pytest.raises(ValueError, match="indices|codes per token"):
        method(name).decode(torch.zeros(shape, dtype=torch.int64))


def test_nsvq_replaces_the_dead_codes_of_each_table_by_codes_of_that_table():
    _, codebook = levels_of(size=4, depth=3, shared=False)
    with torch.no_grad():
        codebook.weight.mul_(0).add_(torch.tensor([100.0, 10.0, 1.0]).repeat_interleave(4)[:, None])
        codebook.weight[:, 0] += torch.arange(12) / 100
    before = codebook.weight.detach().clone()
    counts = torch.tensor([5, 0, 0, 7, 0, 0, 0, 0, 1, 2, 3, 0])  # of the second table nobody is left to copy
    replaced = plugin("nsvq", noise=0.0).refresh_codes(codebook, counts, progress(epoch=5), generator())
    dead, donors = {1: (0, 3), 2: (0, 3), 11: (8, 9, 10)}, codebook.weight.detach()
    assert replaced == 3 and torch.equal(torch.cat([rows for rows, _ in codebook.take_replaced()]), torch.tensor([1, 2, 11]))
    for row in range(12):
        assert any(torch.equal(donors[row], before[other]) for other in dead.get(row, (row,)))


@pytest.mark.parametrize("name", ["nsvq", "entropy"])
def test_a_loss_that_knows_one_code_per_token_says_so_to_residual(name):
    with pytest.raises(UserError, match=f"plugins.{name}: .* one code per token, and quantize gives 3; route hooks.embed"):
        tokenizer("residual", name, **SMALL)(pictures())
    made = tokenizer("residual", name, hooks={"embedding_loss": ["residual"]}, **SMALL)
    assert set(made(pictures()).losses) == {"codebook", "commitment"}


def test_residual_needs_its_own_codebook_for_its_search_and_its_own_search_for_its_loss():
    with pytest.raises(UserError, match="quantize of residual needs make_codebook of residual"):
        tokenizer("residual", "vq", hooks={"make_codebook": ["vq"]})
    with pytest.raises(UserError, match="embedding_loss of residual needs quantize of residual"):
        tokenizer("residual", "vq", hooks={"quantize": ["vq"]})
    with pytest.raises(ValueError, match="^depth: 0"):
        plugin("residual", depth=0)


# ---- entropy


def entropy_reference(latents, vectors, weight, sample_weight, batch_weight, temperature):
    """Return the loss in float64, by the matrix of all soft assignments."""
    shares = ((latents[:, None] - vectors).square().sum(-1) / -temperature).softmax(1)
    sample, batch = torch.special.entr(shares).sum(1).mean(), torch.special.entr(shares.mean(0)).sum()
    return weight * (sample_weight * sample - batch_weight * batch)


@pytest.mark.parametrize("name", ["vq", "factorized", "simvq"])
@pytest.mark.parametrize("weights", [(0.1, 1.0, 1.0, 0.5), (2.0, 0.5, 3.0, 2.0)])
def test_entropy_adds_the_published_loss_to_whatever_it_wraps(name, weights):
    torch.manual_seed(1)
    source = plugin(name, **SMALL.get(name, {}))
    codebook, vq = source.make_codebook(12, 4), plugin("vq")
    latents = codebook.from_encoder(normal(2, 30, 4)).detach().requires_grad_()
    found = vq.quantize(latents, codebook)
    entropy = plugin("entropy", **dict(zip(("weight", "sample_weight", "batch_weight", "temperature"), weights, strict=True)))
    alone = losses_of(latents, found.codes, found.indices, codebook, vq=vq)
    losses = losses_of(latents, found.codes, found.indices, codebook, entropy=entropy, vq=vq)
    assert losses.keys() == {"codebook", "commitment", "entropy"} and all(torch.equal(losses[key], alone[key]) for key in alone)
    vectors = codebook.vectors()
    z, c = double(latents).flatten(0, 1).requires_grad_(), double(vectors).requires_grad_()
    wanted = entropy_reference(z, c, *weights)
    torch.testing.assert_close(losses["entropy"].double(), wanted, rtol=1e-5, atol=1e-6)
    on_latents, on_codes = torch.autograd.grad(wanted, (z, c))
    moved = next(codebook.parameters()) if name != "simvq" else codebook.linear.weight
    if name == "factorized":
        moved = codebook.table
    mine, on_moved = torch.autograd.grad(losses["entropy"], (latents, moved), retain_graph=True)
    torch.testing.assert_close(mine.double().flatten(0, 1), on_latents, rtol=1e-4, atol=1e-7)
    through = torch.autograd.grad(vectors if name == "simvq" else codebook.vectors(), moved, on_codes.float())[0]
    torch.testing.assert_close(on_moved, through, rtol=1e-4, atol=1e-6)
    assert mine.abs().max() > 1e-5


def alone(entropy, latents, codebook):
    """Return the losses of entropy around none."""
    indices = torch.zeros(latents.shape[:2], dtype=torch.int64)
    return losses_of(latents, None, indices, codebook, entropy=entropy, none=plugin("continuous"))


@pytest.mark.parametrize("size", [1, 8])
def test_where_all_codes_are_as_near_both_entropies_are_that_of_their_number(size):
    entropy, codebook = plugin("entropy", weight=2.0, sample_weight=3.0, batch_weight=0.5), Table(size, 4)
    with torch.no_grad():
        codebook.weight.fill_(0.3)
    losses = alone(entropy, normal(1, 20, 4), codebook)
    torch.testing.assert_close(losses["entropy"], torch.tensor(2 * 2.5 * math.log(size)), rtol=1e-5, atol=1e-6)


def test_the_entropy_of_codes_out_of_reach_has_a_finite_gradient():
    entropy, codebook = plugin("entropy", temperature=1e-3), Table(8, 4, "normal")
    with torch.no_grad():
        codebook.weight[5:] += 50  # their shares are zero in float32
    latents = (0.1 * normal(1, 40, 4)).requires_grad_()
    losses = alone(entropy, latents, codebook)
    losses["entropy"].backward()
    assert losses["entropy"].isfinite() and latents.grad.isfinite().all() and codebook.weight.grad.isfinite().all()
    assert (codebook.weight.grad[5:] == 0).all() and codebook.weight.grad[:5].abs().max() > 0


def test_the_batch_of_entropy_is_that_of_all_processes(monkeypatch):
    latents, others, codebook = normal(1, 20, 4), normal(1, 20, 4, seed=1), Table(8, 4, "normal")
    entropy = plugin("entropy", temperature=1.0, sample_weight=0.0, weight=1.0)

    def by_two(tensor):
        if tensor.dim() == 0:
            return 2 * tensor
        return tensor + (torch.cdist(others[0], codebook.weight).square() / -1.0).softmax(1).mean(0)

    monkeypatch.setattr(sys.modules[type(entropy).__module__], "all_reduce_sum", by_two)
    losses = alone(entropy, latents, codebook)
    together = entropy_reference(double(torch.cat([latents[0], others[0]])), double(codebook.weight), 1.0, 0.0, 1.0, 1.0)
    torch.testing.assert_close(losses["entropy"].double(), together, rtol=1e-5, atol=1e-6)


def test_entropy_leaves_the_losses_of_a_method_without_indices_alone():
    assert set(tokenizer("vq", "entropy", "continuous")(pictures()).losses) == set()
    with pytest.raises(ValueError, match="^temperature: 0.0"):
        plugin("entropy", temperature=0.0)


# ---- factorized


def test_latents_and_codes_of_factorized_lie_on_the_unit_sphere():
    made = method("factorized")
    codebook, output = made.codebook, made(pictures())
    assert (codebook.encoder_width, codebook.width, codebook.decoder_width) == (8, 4, 8)
    assert output.latents.shape[2] == output.codes.shape[2] == 4
    for vectors in (output.latents, output.codes, codebook.vectors()):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(vectors.shape[:-1]))
    torch.testing.assert_close(codebook.vectors(), F.normalize(codebook.table, dim=1))
    assert plugin("factorized").make_codebook(4000, 32).table.detach().std() == pytest.approx(1, rel=0.02)
    output.losses["codebook"].backward()
    assert codebook.table.grad.abs().max() > 0 and codebook.enter.weight.grad is None


def test_the_gradient_of_factorized_is_tangent_to_the_sphere():
    codebook = plugin("factorized", dimension=4).make_codebook(16, 6)
    features = normal(2, 30, 6).requires_grad_()
    entered = codebook.enter(features)
    entered.retain_grad()
    latents = codebook.unit(entered)
    assert torch.equal(latents, codebook.from_encoder(features))
    upstream = normal(2, 30, 4, seed=1)
    latents.backward(upstream)
    unit, length = F.normalize(double(entered), dim=-1), double(entered).norm(dim=-1, keepdim=True)
    wanted = (upstream - (upstream * unit).sum(-1, keepdim=True) * unit) / length
    torch.testing.assert_close(entered.grad.double(), wanted, rtol=1e-4, atol=1e-5)
    assert (entered.grad * entered).sum(-1).abs().max() < 1e-5


def test_what_is_written_to_factorized_lies_on_the_sphere():
    codebook = plugin("factorized", dimension=4).make_codebook(16, 6)
    before, rows, vectors = state(codebook), torch.tensor([3, 0]), 5 * normal(2, 4)
    codebook.replace_(rows, vectors)
    torch.testing.assert_close(codebook.table[rows], F.normalize(vectors, dim=1))
    torch.testing.assert_close(codebook.vectors()[rows], F.normalize(vectors, dim=1))
    others = torch.tensor([row for row in range(16) if row not in rows])
    assert torch.equal(codebook.table[others], before["table"][others]) and codebook.row_parameters()[0] is codebook.table


def test_factorized_may_leave_lengths_as_they_are():
    codebook = plugin("factorized", dimension=1, normalize=False).make_codebook(16, 6)
    features = normal(2, 5, 6)
    assert torch.equal(codebook.from_encoder(features), codebook.enter(features))
    assert torch.equal(codebook.vectors(), codebook.table)
    codebook.replace_(torch.tensor([2]), torch.tensor([[5.0]]))
    assert codebook.vectors()[2] == 5
    with pytest.raises(ValueError, match="^dimension: 1 must be at least 2"):
        plugin("factorized", dimension=1)


def test_losses_replacement_and_rotation_of_others_work_on_the_sphere():
    made = spread(method("sphere"), pictures())
    output = made(pictures())
    assert set(output.losses) == {"codebook", "commitment", "entropy", "nonstationary"}
    (sum(output.losses.values()) + output.reconstructions.square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
    counts = torch.tensor([3] + 15 * [0])
    made.plugins["nsvq"].refresh_codes(made.codebook, counts, progress(epoch=5), generator())
    torch.testing.assert_close(made.codebook.vectors().norm(dim=1), torch.ones(16))
    assert torch.cdist(made.codebook.vectors()[1:], made.codebook.vectors()[:1]).max() < 0.02


# ---- what they share


@pytest.mark.parametrize("operation", [straight_through, lambda *both: embedding_losses(*both, 1.0, 1.0)])
def test_latents_and_codes_of_two_widths_are_refused_in_words(operation):
    with pytest.raises(ValueError, match=r"latents \[2, 9, 8\] and codes \[2, 9, 1\] must have one shape; .* from_encoder"):
        operation(normal(2, 9, 8), normal(2, 9, 1))


@pytest.mark.parametrize("name", METHODS)
def test_decoding_what_was_encoded_equals_the_evaluation_forward_bit_for_bit(name):
    made, images = method(name), pictures(24, 40)
    spread(made, images)
    made.eval()
    before, indices = state(made), made.encode(images)
    with torch.no_grad():
        output = made(images)
    depth = (3,) if name in ("residual", "separate") else ()
    assert indices.shape == (2, 6, 10, *depth) and indices.unique().numel() > 4
    assert torch.equal(indices.flatten(1, 2), output.indices)
    assert torch.equal(output.codes, made.codebook.lookup(output.indices))
    assert torch.equal(made.decode(indices), output.reconstructions)
    assert same(before, state(made)), "evaluation changes nothing"


@pytest.mark.parametrize("name", METHODS)
def test_an_exported_tokenizer_of_the_zoo_loads_bit_for_bit(name, tmp_path):
    made, images = method(name), pictures()
    spread(made, images)
    made.save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    indices = made.encode(images)
    assert torch.equal(loaded.encode(images), indices) and torch.equal(loaded.decode(indices), made.decode(indices))
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert loaded.codebook.fingerprint() == made.codebook.fingerprint()
    assert not {"rotation", "entropy", "nsvq"} & set(loaded.plugins)


RUNS = {
    "ema": "{vq: {}, ema: {decay: 0.9}, pixel: {}, probe: {}, kmeans: {latents_per_code: 2}}",
    "fsq": "{fsq: {levels: [4, 8]}, pixel: {}, probe: {}}",
    "rotation": "{vq: {}, rotation: {}, pixel: {}, probe: {}}",
    "residual": "{residual: {depth: 3, shared: false}, pixel: {}, probe: {}, kmeans: {latents_per_code: 2}}",
    "entropy": "{vq: {}, entropy: {temperature: 0.1}, pixel: {}, probe: {}}",
    "factorized": "{vq: {}, factorized: {dimension: 4}, nsvq: {replace_after: 0}, pixel: {}, probe: {}}",
}
RESUMED = {
    "ema": ("ema: {decay: 0.9}\n  vq: {}", "[vq]"),
    "residual": ("residual: {depth: 3, shared: false}", "[residual]"),
}
ENDING = """
epochs: 4
epoch_steps: 3
accumulate: 2
plugins:
  probe: {}
  METHOD
  nsvq: {replace_after: 0, noise: 0.05}
  pixel: {}
  kmeans: {latents_per_code: 2, iterations: 1}
hooks: {embedding_loss: LOSS}
stages:
  - {name: joint, epochs: 2}
  - {name: refine, freeze: ["encoder.*"], hooks: {stage_transition: []}}
"""


@pytest.mark.parametrize("name", RUNS)
def test_a_short_run_trains_and_its_export_is_sound(name, recipe, listeners, tmp_path):
    losses = []
    listeners["reconstruction_loss"] = lambda result, **_: losses.append(result[0]["l1"].item()) or None
    watching = ["hooks.refresh_codes=[]"] if name == "fsq" else []
    result = run(recipe(COMMON + f"epochs: 6\nplugins: {RUNS[name]}", "log.steps=1", *watching), tmp_path / "run")
    assert losses[-1] < losses[2], "it learns"  # the first two are the rehearsal's
    assert all(math.isfinite(value) for value in result["metrics"].values())
    found = events(tmp_path / "run")
    assert all(math.isfinite(e.value) for tag in found.Tags()["scalars"] for e in found.Scalars(tag))
    saved = load_file(tmp_path / "run" / "tokenizer" / "model.safetensors")
    assert all(value.isfinite().all() for value in saved.values() if value.is_floating_point())
    if name == "ema":
        first, last = (checkpoint_at(tmp_path / "run", step)["tokenizer"]["codebook.table"] for step in (2, 12))
        assert not torch.equal(first, last)
        assert torch.equal(checkpoint_at(tmp_path / "run", 12)["average"]["codebook.table"], last)


@pytest.mark.fault(1, 2)
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_of_the_zoo_that_died_ends_like_one_that_did_not(name, recipe, listeners, tmp_path):
    text = COMMON
    for change in (*CHANGED.items(), ("size: 32", "size: 256")):  # so that some codes die
        text = text.replace(*change)
    text += ENDING.replace("METHOD", RESUMED[name][0]).replace("LOSS", RESUMED[name][1])
    run(recipe(text), tmp_path / "whole")
    job = Trainer(recipe(text), tmp_path / "run")
    listeners["quantize"] = at(4, crash)
    with pytest.raises(Stop):
        job.run()
    listeners.clear()
    run(recipe(text), tmp_path / "run", resume="auto")
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    replaced = [e.value for e in events(tmp_path / "whole").Scalars("codes/replaced")]
    assert sum(replaced) > 0, "something beside the gradient moved the codes"


TWO = COMMON + """
epochs: 4
epoch_steps: 1
plugins: {vq: {}, ema: {decay: 0.9}, entropy: {temperature: 0.5}, pixel: {}, kmeans: {latents_per_code: 2, iterations: 1}}
"""


def test_two_processes_average_and_weigh_as_one_does(recipe, tiny_runs, small_photos, tmp_path):
    overrides = ["optim.lr=2e-4", "optim.clip=1.0", "log.steps=1"]
    file = tmp_path / "two.yaml"
    file.write_text(TWO.replace("ROOT", str(small_photos)))
    launch(["run", str(file), *overrides, "--out", str(tmp_path / "two")])
    run(recipe(TWO, *overrides), tmp_path / "one")
    assert_equal_up_to_rounding(checkpoint_at(tmp_path / "one", 4), checkpoint_at(tmp_path / "two", 4), 4)
    one, two = ([e.value for e in events(tmp_path / name).Scalars("loss/entropy")] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-3) and len(one) == 4
