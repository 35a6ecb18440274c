"""The built-in plugins: what each computes, against float64 references, and whole tokenizers made of them."""

import copy
import json
import re
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from vqzoo import Codebook, Progress, Table, Tokenizer, UserError
from vqzoo.data import DataConfig
from vqzoo.manager import Hooks, make_manager
from vqzoo.ops import code_usage
from vqzoo.recipe import CodebookConfig, DecoderConfig, EncoderConfig, Recipe
from vqzoo.sources import find

QUANTIZERS = ("vq", "simvq")
COMBINATIONS = [("vq",), ("simvq",), ("vq", "nsvq"), ("simvq", "nsvq"), ("vq", "simvq", "nsvq")]


def plugin(name, **config):
    kind = find(name).load()
    return kind(kind.Config(**config))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def progress(epoch=0, ends_epoch=True, **means):
    return Progress(0, epoch, "train", 0, epoch, 1, means=means, ends_epoch=ends_epoch)


def quantized(name, count=24, size=8, width=4):
    """Return a codebook of a method, latents [2, N, D] that require gradients, and their codes and indices."""
    torch.manual_seed(1)
    method = plugin(name)
    codebook = method.make_codebook(size, width)
    latents = normal(2, count, width).mul(0.5).requires_grad_()
    found = method.quantize(latents, codebook)
    return codebook, latents, found.codes, found.indices


def tokenizer(*names, resolution=(32, 32), encoder="vqgan_encoder", seed=0, hooks=None, **configs):
    small = {"width": 8, "mult": [1, 2], "blocks": 1, "patch": 2}
    torch.manual_seed(seed)
    made = Recipe(
        data=DataConfig(name="photos", resolution=list(resolution)),
        encoder=EncoderConfig(encoder, 4, args=small if encoder == "vqgan_encoder" else {}),
        decoder=DecoderConfig("conv", dict(small)), codebook=CodebookConfig(16, 8),
        plugins={name: configs.get(name, {}) for name in dict.fromkeys((*names, "pixel"))}, hooks=hooks or {},
    )
    one = Tokenizer.from_recipe(made)
    one.wire(made.hooks, {})
    return one


def pictures(height=32, width=32, count=2):
    return normal(count, 3, height, width, seed=5).clamp(-1, 1)


def spread_codes(made, images):
    """Put the codes where the latents are, so that more than one is chosen."""
    kmeans = plugin("kmeans", latents_per_code=4, iterations=2)
    with torch.no_grad():
        kmeans.enter_stage(None, "train", made, iter(lambda: images, None), generator())
    assert made.encode(images).unique().numel() > 4


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def reached_parts(made):
    """Name the parts of a tokenizer that a backward pass has reached."""
    return {name.split(".")[0] for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- vq and simvq: codes and losses


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantize_chooses_the_nearest_code(name):
    codebook, latents, codes, indices = quantized(name)
    distances = (latents.double()[:, :, None] - codebook.vectors().double()).square().sum(-1)
    chosen = distances.gather(2, indices[..., None])[..., 0]
    torch.testing.assert_close(chosen, distances.amin(2), rtol=0, atol=1e-6)
    assert indices.shape == (2, 24) and indices.dtype == torch.int64 and indices.unique().numel() > 1
    assert torch.equal(codes, codebook.vectors()[indices]) and torch.equal(codes, codebook.lookup(indices))


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize(("codebook_weight", "commitment_weight"), [(1.0, 0.25), (0.5, 3.0)])
def test_each_embedding_loss_has_its_own_weight_and_moves_its_own_side(name, codebook_weight, commitment_weight):
    _, latents, codes, _ = quantized(name)
    codes = codes.detach().requires_grad_()
    method = plugin(name, codebook_weight=codebook_weight, commitment_weight=commitment_weight)
    losses = method.embedding_loss(latents, codes)
    assert losses.keys() == {"codebook", "commitment"}

    difference = codes.detach().double() - latents.detach().double()
    distance, slope = difference.square().mean(), 2 * difference / difference.numel()
    torch.testing.assert_close(losses["codebook"].double(), codebook_weight * distance)
    torch.testing.assert_close(losses["commitment"].double(), commitment_weight * distance)
    on_codes, on_latents = torch.autograd.grad(losses["codebook"], (codes, latents), allow_unused=True)
    torch.testing.assert_close(on_codes.double(), codebook_weight * slope)
    assert on_latents is None
    on_codes, on_latents = torch.autograd.grad(losses["commitment"], (codes, latents), allow_unused=True)
    torch.testing.assert_close(on_latents.double(), -commitment_weight * slope)
    assert on_codes is None


def test_the_codebook_loss_moves_each_row_of_a_table_by_the_latents_that_chose_it():
    codebook, latents, codes, indices = quantized("vq")
    plugin("vq", codebook_weight=2.0).embedding_loss(latents, codes)["codebook"].backward()
    wanted = torch.zeros(8, 4, dtype=torch.float64)
    for latent, index in zip(latents.detach().double().flatten(0, 1), indices.flatten(), strict=True):
        wanted[index] += 2 * 2.0 * (codebook.weight[index].double() - latent).detach() / latents.numel()
    torch.testing.assert_close(codebook.weight.grad.double(), wanted)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_weight_of_zero_leaves_its_loss_out(name):
    _, latents, codes, _ = quantized(name)
    for weights, kept in (({"codebook_weight": 0.0}, "commitment"), ({"commitment_weight": 0.0}, "codebook")):
        method = plugin(name, **weights)
        assert set(method.embedding_loss(latents, codes)) == {kept}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_there_is_no_commitment_to_latents_that_take_no_gradient(name):
    _, latents, codes, _ = quantized(name)
    assert set(plugin(name).embedding_loss(latents.detach(), codes)) == {"codebook"}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_straight_through_has_the_value_of_the_codes_and_the_gradient_of_the_latents(name):
    _, latents, codes, _ = quantized(name)
    codes = codes.detach().requires_grad_()
    seen = plugin(name).straight_through(latents, codes)
    torch.testing.assert_close(seen, codes, rtol=0, atol=1e-6)
    upstream = normal(*seen.shape, seed=3)
    on_latents, on_codes = torch.autograd.grad(seen, (latents, codes), upstream, allow_unused=True)
    assert torch.equal(on_latents, upstream) and on_codes is None


def test_vq_refuses_an_unknown_initialisation():
    with pytest.raises(ValueError, match="^init: 'unifrom'"):
        plugin("vq", init="unifrom")


# ---- codebooks


def test_a_table_starts_uniform_or_normal():
    torch.manual_seed(0)
    uniform, gaussian = Table(64, 256).weight.detach(), Table(64, 256, "normal").weight.detach()
    assert uniform.abs().max() <= 1 / 64 and uniform.std() == pytest.approx(1 / 64 / 3**0.5, rel=0.02)
    assert gaussian.std() == pytest.approx(1 / 16, rel=0.02) and gaussian.abs().max() > 3 / 16
    with pytest.raises(ValueError, match="choices: normal, uniform"):
        Table(4, 2, "zeros")


def test_replacing_rows_of_a_table_writes_them_and_no_others_and_tells_the_host_once():
    codebook = Table(6, 3)
    before, rows, vectors = codebook.weight.detach().clone(), torch.tensor([4, 1]), normal(2, 3)
    codebook.replace_(rows, vectors)
    codebook.replace_(rows[:1], vectors[:1], smooth=True)
    assert torch.equal(codebook.weight[rows], vectors) and torch.equal(codebook.vectors()[rows], vectors)
    others = torch.tensor([0, 2, 3, 5])
    assert torch.equal(codebook.weight[others], before[others])
    assert isinstance(codebook.weight, torch.nn.Parameter) and codebook.weight.requires_grad
    (first, rough), (second, smooth) = codebook.take_replaced()
    assert torch.equal(first, rows) and not rough and torch.equal(second, rows[:1]) and smooth
    assert codebook.take_replaced() == []


def test_a_table_names_its_weight_as_the_parameter_with_a_row_per_code():
    codebook = Table(6, 3)
    assert len(codebook.row_parameters()) == 1 and codebook.row_parameters()[0] is codebook.weight


class Counted(Codebook):
    calls = 0

    def compute_vectors(self):
        self.calls += 1
        return torch.full((self.size, self.width), float(self.calls), dtype=torch.float64)

    def write(self, rows, vectors):
        pass


def test_vectors_are_float32_and_computed_once_per_forward_and_again_after_a_replacement():
    codebook = Counted(3, 2)
    with codebook.one_forward():
        assert codebook.vectors() is codebook.vectors() and codebook.calls == 1
        codebook.replace_(torch.tensor([0]), torch.zeros(1, 2))
        assert codebook.vectors()[0, 0] == 2
    assert codebook.vectors()[0, 0] == 3 and codebook.vectors()[0, 0] == 4
    assert codebook.vectors().dtype == torch.float32 and codebook.encoder_width == codebook.width == 2


# ---- simvq


def linear_codebook(size=12, width=6, seed=2):
    torch.manual_seed(seed)
    return plugin("simvq").make_codebook(size, width)


def test_the_codes_of_simvq_are_the_linear_image_of_a_constant_table():
    codebook = linear_codebook(4096, 16)
    weight, bias = codebook.linear.weight.double(), codebook.linear.bias.double()
    image = codebook.table.double() @ weight.T + bias
    torch.testing.assert_close(codebook.vectors().double(), image, rtol=0, atol=1e-6)
    assert codebook.table.std() == pytest.approx(16**-0.5, rel=0.02)
    assert "table" in dict(codebook.named_buffers()) and "table" in codebook.state_dict()
    assert {name for name, _ in codebook.named_parameters()} == {"linear.weight", "linear.bias"}
    assert codebook.row_parameters() == ()


def test_training_simvq_moves_its_linear_map_and_never_its_table():
    made = tokenizer("simvq")
    spread_codes(made, pictures())
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    before, codes = state(made.codebook), made.codebook.vectors().detach().clone()
    for _ in range(2):
        output = made(pictures())
        (sum(output.losses.values()) + output.reconstructions.square().mean()).backward()
        assert made.codebook.linear.weight.grad.abs().max() > 0 and made.codebook.linear.bias.grad.abs().max() > 0
        optimizer.step()
    assert torch.equal(made.codebook.table, before["table"])
    assert not torch.equal(made.codebook.linear.weight, before["linear.weight"])
    moved = (made.codebook.vectors() - codes).abs().amax(1)
    assert (moved > 1e-4).all(), "a linear map moves every code, chosen or not"


@pytest.mark.parametrize("width", [6, 32])
def test_replacing_rows_of_simvq_solves_for_its_table(width):
    codebook = linear_codebook(12, width)
    before, rows, wanted = state(codebook), torch.tensor([3, 0, 7]), normal(3, width)
    codebook.replace_(rows, wanted)
    torch.testing.assert_close(codebook.vectors()[rows], wanted, rtol=0, atol=2e-4)
    others = torch.tensor([row for row in range(12) if row not in rows])
    assert torch.equal(codebook.table[others], before["table"][others])
    assert torch.equal(codebook.linear.weight, before["linear.weight"])
    assert torch.equal(codebook.linear.bias, before["linear.bias"])
    assert torch.equal(codebook.take_replaced()[0][0], rows)


def test_replacing_rows_of_a_singular_simvq_comes_as_near_as_it_can():
    codebook = linear_codebook()
    with torch.no_grad():
        codebook.linear.weight[:, 0] = 0
        codebook.linear.weight[5] = codebook.linear.weight[4]
    wanted = normal(2, 6)
    codebook.replace_(torch.tensor([1, 2]), wanted)
    weight, bias = codebook.linear.weight.detach().double(), codebook.linear.bias.detach().double()
    nearest = (wanted.double() - bias) @ torch.linalg.pinv(weight).T @ weight.T + bias
    torch.testing.assert_close(codebook.vectors()[1:3].detach().double(), nearest, rtol=0, atol=1e-4)


def test_replacing_rows_of_simvq_leaves_the_optimizer_alone():
    codebook = linear_codebook()
    optimizer = torch.optim.Adam(codebook.parameters())
    codebook.vectors().square().sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())["state"]
    codebook.replace_(torch.tensor([3]), normal(1, 6))
    after = optimizer.state_dict()["state"]
    assert all(same(before[key], after[key]) for key in before) and len(before) == 2


# ---- nsvq: the dense loss


def dense_reference(latents, vectors, indices, temperature):
    """Return eq. 10 of arXiv 2606.11363 in float64, through the matrix of all distances."""
    distances = (latents[:, None] - vectors[None]).square().sum(-1)
    shares = (-distances / temperature).softmax(1).detach()
    others = 1 - F.one_hot(indices, len(vectors)).double()
    return (others * shares * distances).sum() / latents.numel()


def losses_of(latents, codes, indices, codebook, **plugins):
    hooks = Hooks(make_manager(plugins), {}, required=())
    return hooks.embedding_loss(
        latents=latents, codes=codes, indices=indices, extras={}, codebook=codebook, progress=None
    )


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize(("weight", "temperature"), [(0.1, 0.35), (2.0, 1.5)])
def test_nsvq_adds_the_weighted_dense_loss_to_whatever_it_wraps(name, weight, temperature):
    codebook, latents, codes, indices = quantized(name)
    method, dense = plugin(name), plugin("nsvq", weight=weight, temperature=temperature)
    alone = losses_of(latents, codes, indices, codebook, method=method)
    losses = losses_of(latents, codes, indices, codebook, nsvq=dense, method=method)
    assert losses.keys() == {"codebook", "commitment", "nonstationary"}
    assert all(torch.equal(losses[key], alone[key]) for key in alone)

    vectors = codebook.vectors().detach().double().requires_grad_()
    rows = latents.detach().double().flatten(0, 1)
    reference = weight * dense_reference(rows, vectors, indices.flatten(), temperature)
    torch.testing.assert_close(losses["nonstationary"].double(), reference, rtol=1e-5, atol=1e-8)
    assert reference > 1e-4
    wanted = torch.autograd.grad(reference, vectors)[0]
    parameters = list(codebook.parameters())
    *found, on_latents = torch.autograd.grad(losses["nonstationary"], (*parameters, latents), allow_unused=True)
    assert on_latents is None
    if name == "simvq":
        wanted = (wanted.T @ codebook.table.double(), wanted.sum(0))
        assert not codebook.table.requires_grad
    for one, other in zip(found, wanted if name == "simvq" else (wanted,), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-7)


def test_the_dense_loss_reaches_codes_that_nobody_chose():
    codebook, latents, codes, indices = quantized("vq")
    unused = (code_usage(indices, 8) == 0).nonzero().squeeze(1)
    losses = losses_of(latents, codes, indices, codebook, vq=plugin("vq"), nsvq=plugin("nsvq", temperature=1.0))
    plain = torch.autograd.grad(losses["codebook"], codebook.weight, retain_graph=True)[0]
    dense = torch.autograd.grad(losses["nonstationary"], codebook.weight)[0]
    assert len(unused) and (plain[unused] == 0).all() and (dense[unused].abs().amax(1) > 0).all()


@pytest.mark.parametrize("names", [("vq", "nsvq"), ("nsvq", "vq"), ("simvq", "nsvq"), ("vq", "simvq", "nsvq")])
def test_a_tokenizer_with_nsvq_returns_all_three_losses_in_training_only(names):
    made = tokenizer(*names)
    output = made(pictures())
    assert set(output.losses) == {"codebook", "commitment", "nonstationary"}
    assert all(loss.dim() == 0 and loss.isfinite() for loss in output.losses.values())
    assert made.eval()(pictures()).losses == {}


def test_nsvq_stays_when_the_encoder_is_frozen_and_the_commitment_goes():
    made = tokenizer("vq", "nsvq")
    made.freeze(["encoder.*"])
    assert set(made(pictures()).losses) == {"codebook", "nonstationary"}


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 0.0), ("temperature", -1.0), ("temperature", float("nan")), ("patience", 0)]
)
def test_nsvq_refuses_values_that_cannot_work(field, value):
    with pytest.raises(ValueError, match=f"^{field}: {value}"):
        plugin("nsvq", **{field: value})


WEIGHTS = {"vq": ("codebook_weight", "commitment_weight"), "simvq": ("codebook_weight", "commitment_weight"),
           "nsvq": ("weight", "temperature", "replace_after", "noise"), "pixel": ("l1", "l2")}


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in WEIGHTS.items() for field in fields])
def test_a_weight_that_is_negative_or_not_finite_is_refused(name, field, value):
    with pytest.raises(ValueError, match=f"^{field}: {value} must be a finite number, not negative"):
        plugin(name, **{field: value})


def test_pixel_refuses_to_have_no_loss():
    with pytest.raises(ValueError, match="^l1: 0.0 with l2: 0.0"):
        plugin("pixel", l1=0.0)


@pytest.mark.parametrize("config", [{"codebook_weight": -1.0}, {"codebook_weight": "heavy"}, {"init": "zeros"}])
def test_a_plugins_plain_fields_are_refused_under_their_full_key(config):
    with pytest.raises(UserError, match=rf"^plugins\.vq\.{next(iter(config))}: "):
        tokenizer("vq", vq=config)


# ---- nsvq: replacement


def refresh(codebook, counts, seed=0, epoch=5, ends_epoch=True, **config):
    nsvq = plugin("nsvq", **config)
    return nsvq.refresh_codes(codebook, torch.tensor(counts), progress(epoch, ends_epoch), generator(seed))


COUNTS = [0, 5, 0, 1, 0, 0, 90, 0]
DEAD = torch.tensor([0, 2, 4, 5, 7])
ACTIVE = torch.tensor([1, 3, 6])


@pytest.mark.parametrize(("epoch", "ends_epoch"), [*product(range(5), (False, True))])
def test_replacement_happens_at_the_end_of_an_epoch_after_those_that_only_count(epoch, ends_epoch):
    codebook = Table(8, 4)
    before = codebook.weight.detach().clone()
    replaced = refresh(codebook, COUNTS, epoch=epoch, ends_epoch=ends_epoch, replace_after=3)
    due = ends_epoch and epoch >= 3
    assert (replaced, torch.equal(codebook.weight, before)) == ((5, False) if due else (0, True))
    assert len(codebook.take_replaced()) == due


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("noise", [0.0, 0.001])
def test_dead_codes_become_near_copies_of_active_ones_and_active_ones_stay(name, noise):
    torch.manual_seed(0)
    codebook = plugin(name).make_codebook(8, 4)
    before, vectors = state(codebook), codebook.vectors().detach().clone()
    assert refresh(codebook, COUNTS, noise=noise) == len(DEAD)
    after = codebook.vectors().detach()
    distances = torch.cdist(after[DEAD], vectors[ACTIVE]).amin(1)
    assert (distances <= 6 * noise * 4**0.5 + 1e-5).all()
    if noise:
        assert (distances > noise / 100).all(), "exact copies would never part"
        assert torch.pdist(after).amin() > 0
    for key in ("weight",) if name == "vq" else ("table",):
        assert torch.equal(codebook.state_dict()[key][ACTIVE], before[key][ACTIVE])
    assert torch.equal(codebook.take_replaced()[0][0], DEAD)


def test_the_noise_has_the_standard_deviation_asked_for():
    codebook = Table(400, 32)
    original = codebook.weight.detach()[0].clone()
    refresh(codebook, [1] + [0] * 399, noise=0.25)
    noise = codebook.weight.detach()[1:] - original
    assert noise.std() == pytest.approx(0.25, rel=0.03) and abs(noise.mean()) < 0.01


def test_donors_are_drawn_in_proportion_to_their_counts():
    size, counts = 6000, {0: 1, 1: 3, 2: 6}
    codebook = Table(size, 4)
    vectors = codebook.weight.detach()[:3].clone()
    refresh(codebook, [counts.get(code, 0) for code in range(size)], noise=0.0)
    copies = (codebook.weight.detach()[3:, None] == vectors).all(-1).float().mean(0)
    assert copies.tolist() == pytest.approx([0.1, 0.3, 0.6], abs=0.03)  # over 4 standard deviations


def test_replacement_is_a_function_of_the_generator():
    start = Table(8, 4)
    one, two, three = (copy.deepcopy(start) for _ in range(3))
    torch.manual_seed(0)
    refresh(one, COUNTS, seed=1)
    torch.manual_seed(99)
    refresh(two, COUNTS, seed=1)
    refresh(three, COUNTS, seed=2)
    assert torch.equal(one.weight, two.weight) and not torch.equal(one.weight, three.weight)


@pytest.mark.parametrize("counts", [[1] * 8, [0] * 8])
def test_without_dead_or_without_active_codes_nothing_is_replaced(counts):
    codebook = Table(8, 4)
    before = codebook.weight.detach().clone()
    assert refresh(codebook, counts) == 0
    assert torch.equal(codebook.weight, before) and codebook.take_replaced() == []


def test_nsvq_leaves_the_losses_of_a_method_without_indices_alone():
    method, before = plugin("nsvq"), {"other": torch.tensor(1.0)}
    hook = method.embedding_loss(normal(1, 6, 4), None, Table(5, 4))
    next(hook)
    with pytest.raises(StopIteration) as returned:
        hook.send(before)
    assert returned.value.value == before


# ---- nsvq: the plateau


def plateau_reference(values, patience):
    """Tell eq. 13 of arXiv 2606.11363: no value of the last `patience` is below the least of those before."""
    return len(values) > patience and min(values[-patience:]) >= min(values[:-patience])


@pytest.mark.parametrize("patience", [1, 2, 3, 10])
def test_the_stage_ends_when_the_commitment_has_had_no_new_minimum(patience):
    fired = 0
    for seed in range(20):
        values = normal(40, seed=seed) - 0.02 * torch.arange(40)
        values = [round(value, 1) for value in values.tolist()]  # which makes ties
        method = plugin("nsvq", patience=patience)
        for epoch in range(40):
            answer = method.stage_transition(progress(epoch, commitment=values[epoch]))
            expected = plateau_reference(values[: epoch + 1], patience)
            assert bool(answer) == expected, (seed, epoch)
            assert answer is None or str(patience) in answer
            fired += expected
    assert 0 < fired < 20 * 40


def test_a_falling_commitment_never_ends_the_stage():
    method = plugin("nsvq", patience=1)
    assert not any(method.stage_transition(progress(epoch, commitment=1 - 1e-9 * epoch)) for epoch in range(30))


def test_what_the_commitment_was_before_plateau_after_does_not_count():
    values = [0.1, 0.2, 0.9, 0.8, 0.7, 0.8, 0.7, 0.8]  # as codes lag behind, the loss first rises
    for skipped, expected in ((0, 2), (1, 3), (2, 6), (3, 6), (6, None)):
        method = plugin("nsvq", patience=2, plateau_after=skipped)
        answers = [bool(method.stage_transition(progress(epoch, commitment=value))) for epoch, value in enumerate(values)]
        assert (answers.index(True) if any(answers) else None) == expected, skipped


def test_the_plateau_survives_a_state_dict():
    values = [3.0, 2.0, 2.5, 2.2, 2.0, 2.1, 1.9, 2.0, 2.0, 2.0, 2.0]
    through = plugin("nsvq", patience=4)
    whole = [bool(through.stage_transition(progress(commitment=value))) for value in values]
    assert whole.index(True) == 5
    for stop in range(len(values)):
        first, second = plugin("nsvq", patience=4), plugin("nsvq", patience=4)
        answers = [bool(first.stage_transition(progress(commitment=value))) for value in values[:stop]]
        second.load_state_dict(state(first))
        assert answers + [bool(second.stage_transition(progress(commitment=v))) for v in values[stop:]] == whole
    assert all(buffer.dim() == 0 for buffer in through.buffers())


# ---- pixel


@pytest.mark.parametrize(("l1", "l2"), [(1.0, 0.0), (0.0, 0.5), (2.0, 3.0)])
def test_pixel_losses_are_weighted_means_over_all_elements(l1, l2):
    images, reconstructions = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1).requires_grad_()
    method = plugin("pixel", l1=l1, l2=l2)
    losses = method.reconstruction_loss(images, reconstructions)
    difference = reconstructions.double() - images.double()
    wanted = {"l1": l1 * difference.abs().mean(), "l2": l2 * difference.square().mean()}
    wanted = {name: value for name, value in wanted.items() if value}
    assert losses.keys() == wanted.keys() == set(method.loss_names())
    for name, value in wanted.items():
        torch.testing.assert_close(losses[name].double(), value, rtol=1e-6, atol=0)
    slope = torch.autograd.grad(sum(wanted.values()), reconstructions)[0]
    torch.testing.assert_close(torch.autograd.grad(sum(losses.values()), reconstructions)[0], slope.float())


# ---- kmeans


def blobs(centres, each=40, spread=0.01, seed=3):
    """Return latents [1, M, D] around centres, shuffled."""
    latents = centres.repeat_interleave(each, 0)
    latents = latents + spread * normal(*latents.shape, seed=seed)
    return latents[torch.randperm(len(latents), generator=generator(seed))][None]


def start(codebook, latents, leaving=None, entering="train", seed=0, **config):
    """Let kmeans prepare a stage for an encoder that gives these latents for any images."""
    encoder = SimpleNamespace(codebook=codebook, latents=lambda images: (images, None))
    with torch.no_grad():
        plugin("kmeans", **config).enter_stage(leaving, entering, encoder, iter(lambda: latents, None), generator(seed))
    return codebook


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("seed", range(4))
def test_kmeans_finds_separable_clusters(name, seed):
    centres = torch.tensor([[3.0, 0, 1], [-3.0, 1, 0]])
    torch.manual_seed(0)
    codebook = start(plugin(name).make_codebook(2, 3), blobs(centres), seed=seed)
    found = codebook.vectors().detach()
    torch.testing.assert_close(found[found[:, 0].argsort(descending=True)], centres, rtol=0, atol=0.01)


def test_kmeans_uses_every_code_and_ends_at_the_means_of_its_clusters():
    latents = blobs(normal(8, 4, seed=1), spread=0.3)
    codebook = start(Table(16, 4), latents, iterations=60)
    vectors, rows = codebook.weight.detach().double(), latents[0].double()
    indices = torch.cdist(rows, vectors).argmin(1)
    assert (code_usage(indices, 16) > 0).all()
    means = torch.stack([rows[indices == code].mean(0) for code in range(16)])
    torch.testing.assert_close(vectors, means, rtol=0, atol=1e-5)


def test_more_iterations_lower_the_distortion():
    latents = blobs(normal(8, 4, seed=1), spread=0.3)

    def distortion(iterations):
        codebook = start(Table(16, 4), latents, iterations=iterations)
        return float(torch.cdist(latents[0], codebook.weight.detach()).amin(1).square().mean())

    assert distortion(20) < distortion(3) < distortion(1)


def test_kmeans_uses_every_code_even_where_it_had_to_restart_empty_clusters():
    latents = torch.cat([torch.zeros(60, 2), normal(20, 2)])[None]  # most starts fall on one and the same latent
    codebook = start(Table(8, 2), latents, iterations=30)
    assert (code_usage(torch.cdist(latents[0], codebook.weight.detach()).argmin(1), 8) > 0).all()


def test_kmeans_works_before_the_first_stage_only():
    codebook = Table(2, 3)
    before = codebook.weight.detach().clone()
    start(codebook, blobs(normal(2, 3)), leaving="joint")
    assert torch.equal(codebook.weight, before) and codebook.take_replaced() == []
    start(codebook, blobs(normal(2, 3)))
    assert not torch.equal(codebook.weight, before) and len(codebook.take_replaced()) == 1


def test_kmeans_is_a_function_of_the_generator():
    latents = blobs(normal(8, 4, seed=1), spread=0.3)
    torch.manual_seed(0)
    one = start(Table(16, 4), latents, seed=1).weight
    torch.manual_seed(99)
    two, three = start(Table(16, 4), latents, seed=1).weight, start(Table(16, 4), latents, seed=2).weight
    assert torch.equal(one, two) and not torch.equal(one, three)


@pytest.mark.fault(23)
def test_kmeans_collects_as_many_latents_per_code_as_asked():
    taken = []

    def batches():
        while True:
            taken.append(1)
            yield normal(1, 10, 4, seed=len(taken))

    made = SimpleNamespace(codebook=Table(4, 4), latents=lambda images: (images, None))
    plugin("kmeans", latents_per_code=16).enter_stage(None, "train", made, batches(), generator())
    assert len(taken) == 7  # 64 latents wanted, 10 at a time


@pytest.mark.parametrize("config", [{"latents_per_code": 0}, {"iterations": 0}])
def test_kmeans_refuses_values_that_cannot_work(config):
    with pytest.raises(ValueError, match=f"^{next(iter(config))}: 0 "):
        plugin("kmeans", **config)


# ---- whole tokenizers


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("names", COMBINATIONS)
def test_decoding_what_was_encoded_equals_the_evaluation_forward_bit_for_bit(names, size):
    made, images = tokenizer(*names), pictures(*size)
    spread_codes(made, images)
    made.eval()
    indices = made.encode(images)
    with torch.no_grad():
        output = made(images)
    assert indices.shape == (2, size[0] // 4, size[1] // 4) and indices.dtype == torch.int64
    assert torch.equal(indices.flatten(1), output.indices)
    assert output.reconstructions.shape == images.shape and torch.equal(made.decode(indices), output.reconstructions)
    assert torch.equal(made.decode(indices.int()), output.reconstructions)


@pytest.mark.fault(39)
@pytest.mark.parametrize("names", COMBINATIONS)
def test_an_exported_tokenizer_loads_bit_for_bit(names, tmp_path):
    made, images = tokenizer(*names), pictures()
    spread_codes(made, images)
    made.save_pretrained(tmp_path / "tokenizer")
    for folder in (tmp_path / "tokenizer", str(tmp_path)):
        loaded = Tokenizer.from_pretrained(folder)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        assert "nsvq" not in loaded.plugins and loaded.hooks.providers("quantize") == made.hooks.providers("quantize")
        indices = made.encode(images)
        assert torch.equal(loaded.encode(images), indices) and torch.equal(loaded.decode(indices), made.decode(indices))
        assert all(torch.equal(value, made.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_exporting_again_writes_the_same_tensors(tmp_path):
    made = tokenizer("simvq", "nsvq")
    made.save_pretrained(tmp_path / "one")
    Tokenizer.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two"))
    assert same(one, two) and not any(name.startswith("plugins.nsvq") for name in one)
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "two" / "config.json").read_text()


def test_exporting_over_a_tokenizer_replaces_its_two_files_and_no_others(tmp_path):
    tokenizer("vq").save_pretrained(tmp_path / "kept")
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    other = tokenizer("simvq", seed=1)
    other.save_pretrained(tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    assert same(Tokenizer.from_pretrained(tmp_path / "kept").state_dict(), other.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("file", ["thesis.txt", "config.json", "model.safetensors"])
def test_exporting_into_a_strangers_folder_is_refused_and_changes_nothing(file, tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / file).write_text('{"model_type": "bert"}')
    for target in (folder, folder / file):
        with pytest.raises(UserError, match=str(target)):
            tokenizer("vq").save_pretrained(target)
    assert [path.read_text() for path in folder.iterdir()] == ['{"model_type": "bert"}']
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.fault(39)
def test_an_export_that_fails_half_way_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    made = tokenizer("vq")
    made.save_pretrained(tmp_path / "kept")

    def fail(path, tensors, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("vqzoo.tokenizer.write_tensors", fail)
    for name in ("kept", "new"):
        with pytest.raises(OSError, match="no space left"):
            tokenizer("vq", seed=1).save_pretrained(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert same(Tokenizer.from_pretrained(tmp_path / "kept").state_dict(), made.state_dict())


@pytest.mark.fault(39)
def test_tied_tensors_can_be_exported(tmp_path):
    made = tokenizer("vq")
    made.decoder.tied = made.decoder.conv_out.weight
    made.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["decoder.tied"], tensors["decoder.conv_out.weight"])
    assert torch.equal(tensors["decoder.tied"], made.decoder.tied)


def edit(folder, key, value):
    """Set a key of an exported tokenizer's config.json."""
    config = json.loads((folder / "config.json").read_text())
    *path, last = key.split(".")
    node = config
    for part in path:
        node = node[part]
    node[last] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("key", "value"), [
    ("resolution", []), ("resolution", [32]), ("resolution", [0, 32]), ("resolution", [32, -32]), ("resolution", [32, 32, 32]),
    ("codebook.size", 0), ("codebook.width", -1), ("encoder.stride", 0),
])
def test_an_impossible_number_in_a_strangers_export_is_a_user_error(key, value, tmp_path):
    tokenizer("vq").save_pretrained(tmp_path)
    edit(tmp_path, key, value)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'config.json'}: {key}: {value!r}")):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["encoder.pretrained", "encoder.args.checkpoint_path"])
def test_no_file_that_an_export_names_is_opened(key, tmp_path):
    made, canary = tokenizer("vq"), tmp_path / "canary.pth"
    made.save_pretrained(tmp_path / "export")
    edit(tmp_path / "export", key, str(canary))
    canary.write_bytes(b"not weights: whoever opens this fails")
    loaded = Tokenizer.from_pretrained(tmp_path / "export")
    assert same(loaded.state_dict(), made.state_dict())


def test_the_environment_is_not_read_into_an_export(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "canary")
    tokenizer("vq").save_pretrained(tmp_path)
    edit(tmp_path, "encoder.name", "${oc.env:SECRET}")
    with pytest.raises(UserError, match=r"config.json: encoder.name: ") as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "canary" not in str(caught.value)


@pytest.mark.fault(39)
@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_an_exported_tokenizer_must_fit_its_configuration_tensor_by_tensor(damage, tmp_path):
    tokenizer("simvq").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if damage == "missing":
        del tensors["codebook.table"]
    elif damage == "extra":
        tensors["codebook.spare"] = torch.zeros(1)
    else:
        tensors["codebook.table"] = tensors["codebook.table"][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"(?s)model.safetensors: does not fit config.json: .*codebook\.") as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert ("codebook.spare" if damage == "extra" else "codebook.table") in str(caught.value)


@pytest.mark.fault(39)
def test_no_tensor_of_an_export_may_be_missing(tmp_path):
    tokenizer("simvq").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for missing in tensors:
        save_file({name: value for name, value in tensors.items() if name != missing}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=rf"(?s)does not fit config.json: .*{re.escape(missing)}"):
            Tokenizer.from_pretrained(tmp_path)


@pytest.mark.fault(39)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, "{", "[1]", '{"encodr": {}}'])
def test_a_damaged_export_is_a_user_error_that_names_the_file(file, content, tmp_path):
    tokenizer("vq").save_pretrained(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert file in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("names", "encoder"), [(("vq", "nsvq"), "vqgan_encoder"), (("simvq", "nsvq"), "resnet18")])
def test_evaluation_changes_nothing(names, encoder):
    made, images = tokenizer(*names, encoder=encoder), pictures()
    made.train()
    before = state(made)
    made.decode(made.encode(images))
    assert made.training and made.encoder.training, "the mode is given back"
    made.eval()
    with torch.no_grad():
        one, two = made(images), made(images)
    assert torch.equal(one.reconstructions, two.reconstructions)
    assert same(before, state(made)) and made.codebook.take_replaced() == []


@pytest.mark.fault(36)
def test_evaluation_does_not_depend_on_the_rest_of_the_batch():
    made, images = tokenizer("vq"), pictures(count=3)
    spread_codes(made, images)
    whole = made.encode(images)
    single = torch.cat([made.encode(image[None]) for image in images])
    assert (whole == single).float().mean() > 0.99  # a near-tie may fall otherwise by rounding


@pytest.mark.parametrize("indices", [
    torch.full((1, 2, 2), 16), torch.full((1, 2, 2), -1), torch.zeros(4, dtype=torch.int64),
    torch.zeros(1, 0, 2).long(), torch.zeros(1, 2, 0).long(), torch.zeros(1, 2, 2, 0).long(),
    torch.full((1, 2, 2), 2**64 - 1, dtype=torch.uint64), torch.zeros(1, 2, 2, dtype=torch.complex64),
])
def test_decode_refuses_what_is_not_indices_of_its_codebook(indices):
    with pytest.raises(ValueError, match="indices must be"):
        tokenizer("vq").decode(indices)


def test_one_sided_losses_reach_the_networks_they_are_meant_for():
    made = tokenizer("vq", "nsvq")
    losses = made(pictures()).losses
    for name, moved in (("codebook", "codebook"), ("commitment", "encoder"), ("nonstationary", "codebook")):
        made.zero_grad()
        losses[name].backward(retain_graph=True)
        assert reached_parts(made) == {moved}


def test_the_reconstruction_reaches_the_encoder_past_the_codebook():
    made = tokenizer("vq", "nsvq")
    made(pictures()).reconstructions.square().mean().backward()
    assert reached_parts(made) == {"encoder", "decoder"}
