"""Inputs at the edge, half precision, determinism and timing: what must stay finite, equal or in step."""

import itertools
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from test_plugins import pictures, plugin, spread_codes, tokenizer
from test_training import ADVERSARIAL, COMMON, NSVQ, VQ, events, run

from vqzoo.data import make_dataset, train_batches
from vqzoo.hookspecs import REQUIRED
from vqzoo.ops import code_usage
from vqzoo.plugin import Progress
from vqzoo.sources import available, offered_hooks

pytestmark = pytest.mark.usefixtures("listeners", "tiny_runs")


WITHOUT_NSVQ = ("fsq", "residual")  # whose codes do not move, or of which a token has several


def quantizers():
    """Return the plugins that quantize, with and without nsvq, and beside vq those that leave hooks to it."""
    for name, source in available().items():
        if source.module.startswith("vqzoo_plugins.") and "quantize" in (offered := offered_hooks(source.load())):
            alone = (name,) if set(REQUIRED) - {"reconstruction_loss"} <= set(offered) else (name, "vq")
            yield from (alone, (*alone, "nsvq"))[: 1 if name in WITHOUT_NSVQ else 2]


def scalars(out):
    """Return every scalar that a run logged but its speed, by tag and step."""
    found = events(out)
    timed = ("train/images_per_second", "train/peak_mib")
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"] if tag not in timed}


def not_finite(out):
    return {tag for tag, points in scalars(out).items() if not all(math.isfinite(value) for _, value in points)}


# ---- inputs at the edge


def constant(value):
    return lambda made: torch.full((4, 3, 32, 32), value)


def copies(made):
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).expand(4, -1, -1, -1)


def latents_of_zeros(made):
    for parameter in made.encoder.head.parameters():
        torch.nn.init.zeros_(parameter)
    return copies(made)


def codes_of_zeros(made):
    if made.codebook.replaceable:
        made.codebook.replace_(torch.arange(made.codebook.rows), torch.zeros(made.codebook.rows, made.codebook.width))
    return latents_of_zeros(made)


EDGES = {"black": constant(-1.0), "grey": constant(0.0), "white": constant(1.0), "copies": copies,
         "latents of zeros": latents_of_zeros, "codes and latents of zeros": codes_of_zeros}


@pytest.mark.fault(21)
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("names", list(quantizers()), ids="-".join)
def test_no_quantizer_makes_a_nan_of_inputs_without_variety(names, edge):
    made = tokenizer(*names, nsvq={"replace_after": 0, "noise": 0.0}, fsq={"levels": [4, 4]})
    images = EDGES[edge](made)
    kmeans, generator = plugin("kmeans", latents_per_code=4, iterations=2), torch.Generator().manual_seed(0)
    if edge != "codes and latents of zeros" and made.codebook.replaceable:
        with torch.no_grad():
            kmeans.enter_stage(None, "train", made, iter(lambda: images, None), generator)
    optimizer = torch.optim.Adam((p for p in made.parameters() if p.requires_grad), lr=1e-3)
    for step in range(3):
        progress = Progress(step, step, "train", step, step, 1, means={"commitment": 0.0}, ends_epoch=True)
        output = made(images, progress)
        losses = {**output.losses, "pixels": (output.reconstructions - images).square().mean()}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(value.isfinite() for value in losses.values()), losses
        assert not [name for name, p in made.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        optimizer.step()
        indices = None if output.indices is None else output.indices.flatten(0, 1)
        counts = None if indices is None else code_usage(made.codebook.rows_of(indices), made.codebook.rows)
        with torch.no_grad():
            made.hooks.refresh_codes(
                codebook=made.codebook, latents=output.latents.flatten(0, 1), indices=indices, counts=counts, extras={},
                epoch_counts=torch.zeros(16) if counts is None else counts, progress=progress, generator=generator,
            )
        assert not [name for name, value in made.state_dict().items() if value.isnan().any()]
    made.eval()
    assert made(images).reconstructions.isfinite().all()


@pytest.fixture
def one_colour(tmp_path):
    """Make a folder whose images are all of one colour."""
    for split in ("train", "val"):
        (tmp_path / "grey" / split).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (32, 32), "grey").save(tmp_path / "grey" / split / f"{number}.png")
    return tmp_path / "grey"


FULL = COMMON + """
epochs: 3
plugins:
  BASE: {}
  nsvq: {replace_after: 0, noise: 0.0}
  pixel: {}
  kmeans: {latents_per_code: 2}
  gan: {layers: 1, width: 8, norm: group, adaptive: true, lecam: 0.1, r1: 0.1}
"""


@pytest.mark.fault(21)
@pytest.mark.parametrize("base", ["vq", "simvq"])
def test_a_run_on_images_of_one_colour_logs_no_nan(recipe, tmp_path, one_colour, base):
    tiny = recipe(FULL.replace("BASE", base), f"data.root={one_colour}", "log.steps=1", "evaluate.epochs=1")
    result = run(tiny, tmp_path / "run")
    assert not_finite(tmp_path / "run") == set()
    assert all(math.isfinite(value) for value in result["metrics"].values())


@pytest.mark.fault(23)
@pytest.mark.parametrize("base", ["vq", "simvq"])
@pytest.mark.parametrize("batch", [1, 32])  # of 16 images
def test_a_run_with_fewer_latents_than_codes_trains_and_counts_what_there_is(recipe, tmp_path, base, batch):
    sizes = ["codebook.size=4096", f"data.batch_size={batch}", "data.eval_batch_size=4", "epoch_steps=2"]
    result = run(recipe(FULL.replace("BASE", base), *sizes, "log.steps=1"), tmp_path / "run")
    found = scalars(tmp_path / "run")
    assert not_finite(tmp_path / "run") == set() and result["run"]["step"] == 6
    tokens = 2 * batch * 64  # of an epoch
    assert all(value <= tokens / 4096 for _, value in found["codes/usage"])
    assert all(value >= 4096 - tokens for _, value in found["codes/replaced"])
    assert result["metrics"]["images"] == 7  # a batch of four and a last one of three


# ---- half precision


@pytest.mark.fault(25)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vq", "simvq"])
def test_half_precision_chooses_float32s_codes_but_for_near_ties(name, dtype):
    made = tokenizer(name).eval()
    images = pictures(count=8)
    spread_codes(made, images)
    with torch.no_grad():
        single = made(images)
        with torch.autocast("cpu", dtype):
            half = made(images)
    latents, chosen = single.latents.double(), made.codebook.lookup(half.indices).double()
    assert half.latents.dtype == torch.float32 and not torch.equal(half.latents, single.latents)
    assert (half.indices == single.indices).double().mean() > 0.97
    nearest = (latents - made.codebook.lookup(single.indices).double()).norm(dim=-1)
    moved = (half.latents.double() - latents).norm(dim=-1)
    assert ((latents - chosen).norm(dim=-1) <= nearest + 2 * moved + 1e-6).all()
    assert moved.mean() < 0.02 * latents.norm(dim=-1).mean()


@pytest.mark.fault(25)
def test_a_discriminator_that_joins_in_bf16_leaves_200_steps_stable(recipe, tmp_path):
    text = COMMON + """
epochs: 5
epoch_steps: 50
precision: bf16
plugins: {vq: {}, pixel: {}, gan: {layers: 1, width: 8, norm: group, adaptive: true}}
stages:
  - {name: plain, epochs: 1, hooks: {reconstruction_loss: [pixel], discriminator_loss: []}}
  - {name: adversarial}
"""
    AcceleratorState._reset_state(True)
    try:
        run(recipe(text, "data.resolution=[16,16]", "data.batch_size=4", "log.steps=10"), tmp_path / "run")
    finally:
        AcceleratorState._reset_state(True)
    found = scalars(tmp_path / "run")
    assert not_finite(tmp_path / "run") == set()
    assert [step for step, _ in found["loss/discriminator"]] == list(range(60, 251, 10))
    pixels = [value for _, value in found["loss/l1"]]
    assert len(pixels) == 25 and max(pixels[5:]) < 1.2 * pixels[4] < 1.2 * pixels[0]


# ---- determinism and timing


@pytest.mark.fault(26)
def test_a_seed_fixes_every_number_that_is_logged(recipe, tmp_path):
    logs, short = {}, ["log.steps=1", "epochs=3", "stages[0].epochs=1", "data.flip=true"]
    for name, overrides in (("one", []), ("again", []), ("workers", ["data.workers=2"]), ("seed", ["seed=1"])):
        run(recipe(ADVERSARIAL, *short, *overrides), tmp_path / name)
        logs[name] = scalars(tmp_path / name)
    assert len(logs["one"]["loss/l1"]) == 6
    assert logs["one"] == logs["again"] == logs["workers"]
    assert logs["one"]["loss/l1"] != logs["seed"]["loss/l1"]


@pytest.mark.fault(27)
def test_rates_and_stages_come_at_the_same_steps_on_several_processes(recipe, tmp_path, monkeypatch):
    """A process is made to believe in others; two real ones are compared in test_processes."""
    tiny, found = recipe(NSVQ, "log.steps=1", "optim.schedule=cosine", "optim.warmup_steps=3"), {}
    for processes in (1, 2, 4):
        monkeypatch.setattr(Accelerator, "num_processes", processes)
        out = tmp_path / str(processes)
        done = run(tiny, out)["run"]
        found[processes] = [done[key] for key in ("step", "epoch", "stage", "transitions")], scalars(out)["train/learning_rate"]
    assert found[1] == found[2] == found[4] and len(found[1][1]) == 10


@pytest.mark.fault(27)
def test_the_samples_of_a_step_are_the_same_on_one_two_and_four_processes(recipe):
    config = recipe(VQ).data
    dataset = make_dataset(config, "train")
    steps = {}
    for processes in (1, 2, 4):
        ranks = [train_batches(config, dataset, 0, 0, rank, processes) for rank in range(processes)]
        shares = [[batch.positions for batch in itertools.islice(rank, 5)] for rank in ranks]
        steps[processes] = [torch.cat(parts).tolist() for parts in zip(*shares, strict=True)]
    assert steps[1] == steps[2] == steps[4] == [list(range(first, first + 8)) for first in range(0, 40, 8)]
