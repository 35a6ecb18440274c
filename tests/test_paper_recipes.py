"""NSVQ's paper (arXiv 2606.11363) as recipes: each row differs from its neighbour in what it says, and in nothing else."""

import re
from functools import cache

import pytest

from vqzoo import prepare
from vqzoo.errors import UserError
from vqzoo.prepare import build, enter
from vqzoo.recipe import difference, load_recipe, plain, shipped
from vqzoo.trainer import Trainer

RAMP = "plugins.gan.ramp.refine"
NSVQ = {"plugins.nsvq", RAMP, "stages"}
SIMVQ = {"plugins.vq", "plugins.simvq"}
F16 = {"data.resolution", "encoder.stride", "encoder.args.mult", "decoder.args.mult"}
CELEBA = {"epochs", "epoch_steps"}

NEIGHBOURS = {
    "simvq_imagenet128": ("vq_imagenet128", SIMVQ),
    "nsvq_imagenet128": ("vq_imagenet128", NSVQ),
    "paper/table1_vq": ("vq_imagenet128", set()),
    "paper/table1_simvq": ("simvq_imagenet128", set()),
    "paper/table1_simvq_nsvq": ("nsvq_imagenet128", SIMVQ | {"hooks.refresh_codes", "stages"}),
    "paper/table1_nsvq": ("nsvq_imagenet128", set()),
    "paper/table2_simvq": ("paper/table1_simvq", F16),
    "paper/table2_nsvq": ("paper/table1_nsvq", F16),
    "paper/table3_no_ns_no_replacement": ("paper/table1_vq", set()),
    "paper/table3_no_replacement": ("paper/table3_stage1", {"hooks.refresh_codes"}),
    "paper/table3_stage1": ("paper/table3_full", {"stages", RAMP}),
    "paper/table3_no_refine": ("paper/table3_full", {"stages", RAMP}),
    "paper/table3_no_warm_up": ("paper/table3_full", {"stages"}),
    "paper/table3_full": ("nsvq_imagenet128", set()),
    "paper/table4_freeze_only": ("paper/table4_full", {"hooks.embedding_loss", "hooks.refresh_codes"}),
    "paper/table4_replacement_only": ("paper/table4_no_freezing", {"hooks.embedding_loss"}),
    "paper/table4_ns_only": ("paper/table3_no_replacement", CELEBA),
    "paper/table4_no_warm_up": ("paper/table3_no_warm_up", CELEBA),
    "paper/table4_no_refine": ("paper/table3_no_refine", CELEBA),
    "paper/table4_no_freezing": ("paper/table3_stage1", CELEBA),
    "paper/table4_full": ("paper/table3_full", CELEBA),
}
"""The keys in which each recipe differs from another one."""

ALL, FROZEN = ("encoder", "decoder", "codebook"), ("decoder", "codebook")
VQ = ("train", None, ALL, ["vq"], [], ["pixel", "lpips", "gan"], ["gan"])
JOINT = ("joint", 50, ALL, ["vq", "nsvq"], ["nsvq"], ["pixel", "lpips", "gan"], ["gan"])
ONLY_JOINT = ("joint", None, *JOINT[2:])
WARM_UP = ("warm-up", 3, FROZEN, ["vq"], [], ["pixel", "lpips"], [])
REFINE = ("refine", None, FROZEN, ["vq"], [], ["pixel", "lpips", "gan"], ["gan"])


def but(stage, loss=None, refresh=None):
    """Return a stage with other providers of embedding_loss and refresh_codes."""
    return (*stage[:3], stage[3] if loss is None else loss, stage[4] if refresh is None else refresh, *stage[5:])


STAGES = {
    "paper/table1_vq": [VQ],
    "paper/table1_simvq": [but(VQ, ["simvq"])],
    "paper/table1_simvq_nsvq": [but(JOINT, ["nsvq", "simvq"], []), but(WARM_UP, ["simvq"]), but(REFINE, ["simvq"])],
    "paper/table1_nsvq": [JOINT, WARM_UP, REFINE],
    "paper/table2_simvq": [but(VQ, ["simvq"])],
    "paper/table2_nsvq": [JOINT, WARM_UP, REFINE],
    "paper/table3_no_ns_no_replacement": [VQ],
    "paper/table3_no_replacement": [but(ONLY_JOINT, refresh=[])],
    "paper/table3_stage1": [ONLY_JOINT],
    "paper/table3_no_refine": [JOINT, ("warm-up", None, *WARM_UP[2:])],
    "paper/table3_no_warm_up": [JOINT, REFINE],
    "paper/table3_full": [JOINT, WARM_UP, REFINE],
    "paper/table4_freeze_only": [but(JOINT, ["vq"], []), WARM_UP, REFINE],
    "paper/table4_replacement_only": [but(ONLY_JOINT, ["vq"])],
    "paper/table4_ns_only": [but(ONLY_JOINT, refresh=[])],
    "paper/table4_no_warm_up": [JOINT, REFINE],
    "paper/table4_no_refine": [JOINT, ("warm-up", None, *WARM_UP[2:])],
    "paper/table4_no_freezing": [ONLY_JOINT],
    "paper/table4_full": [JOINT, WARM_UP, REFINE],
}
"""The stages of each row: name, greatest length, trained parts, and who serves the losses, the refresh and the adversary."""

TINY = ["data.resolution=[32,32]", "codebook.size=8", "codebook.width=4", "encoder.args.width=8", "encoder.args.blocks=1",
        "decoder.args.width=8", "decoder.args.blocks=1", "plugins.gan.width=8"]


shipped_recipe = cache(load_recipe)


def lines(one, other):
    return difference(plain(shipped_recipe(one)), plain(shipped_recipe(other)))


def test_every_row_of_the_paper_is_listed_here():
    rows = {name for name in shipped() if re.fullmatch(r"paper/[^/]+", name)}
    assert rows == set(STAGES) == {name for name in NEIGHBOURS if "/" in name}
    assert {f"paper/adv0.1/{name.removeprefix('paper/')}" for name in rows} == {
        name for name in shipped() if name.startswith("paper/") and name not in rows
    }


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_row_differs_from_its_neighbour_in_what_it_says_alone(name):
    neighbour, wanted = NEIGHBOURS[name]
    assert {line.split(": ")[0] for line in lines(neighbour, name)} == wanted


@pytest.mark.parametrize("name", STAGES)
def test_the_rows_with_the_weight_of_simvqs_code_differ_in_that_weight_alone(name):
    adv = name.replace("paper/", "paper/adv0.1/")
    assert lines(name, adv) == ["plugins.gan.weight: 1.0 → 0.1"]


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_trains_and_asks_what_the_row_says(name):
    recipe = load_recipe(name, TINY)
    tokenizer = build(recipe)
    found = []
    for number, stage in enumerate(recipe.stages):
        enter(tokenizer, recipe, number)
        trained = {parameter.split(".")[0] for parameter, p in tokenizer.named_parameters() if p.requires_grad}
        wholly = {part for part in trained if all(p.requires_grad for p in getattr(tokenizer, part).parameters())}
        assert trained == wholly
        served = tokenizer.hooks.providers
        found.append((stage.name, stage.epochs, tuple(part for part in ALL if part in trained), served("embedding_loss"),
                      served("refresh_codes"), served("reconstruction_loss"), served("discriminator_loss")))
        assert served("quantize") == served("straight_through") == (["simvq"] if "simvq" in recipe.plugins else ["vq"])
        assert served("stage_transition") == (["nsvq"] if stage.name == "joint" else [])
        assert served("make_discriminator") == ["gan"]
    assert found == STAGES[name]


@pytest.mark.parametrize("name", STAGES)
def test_what_all_rows_share(name):
    recipe = shipped_recipe(name)
    assert (recipe.codebook.size, recipe.codebook.width) == (65536, 128)
    assert [side // recipe.encoder.stride for side in recipe.data.resolution] == [16, 16]
    assert recipe.data.batch_size == 128 and recipe.accumulate == 1 and recipe.precision != "no"
    assert recipe.epochs * recipe.epoch_steps == (90_700 if "table4" in name else 700_700)
    for optim in (recipe.optim, recipe.discriminator_optim):
        assert (optim.name, optim.lr, optim.schedule, optim.weight_decay) == ("adam", 1e-4, "constant", 0)
    for network in (recipe.encoder, recipe.decoder):
        assert network.args["width"] == 128 and network.args["blocks"] == 2
        assert len(network.args["mult"]) == len(f"{recipe.encoder.stride:b}")
    assert recipe.plugins["lpips"].weight == recipe.plugins["gan"].weight == 1 and not recipe.plugins["gan"].adaptive
    quantizer = recipe.plugins["simvq" if "simvq" in recipe.plugins else "vq"]
    assert (quantizer.codebook_weight, quantizer.commitment_weight) == (1, 0.25)


@pytest.mark.parametrize("name", [name for name in STAGES if len(STAGES[name]) > 1 or "joint" in STAGES[name][0]])
def test_nsvqs_constants_are_the_papers(name):
    nsvq = shipped_recipe(name).plugins["nsvq"]
    assert (nsvq.weight, nsvq.temperature) == (0.1, 0.35)
    assert (nsvq.replace_after, nsvq.noise, nsvq.patience) == (5, 0.001, 10)
    refines = any(stage[0] == "refine" for stage in STAGES[name])
    assert shipped_recipe(name).plugins["gan"].ramp == ({"*": 0, "refine": 2} if refines else {"*": 0})


@pytest.mark.parametrize("key", [
    "precision", "ema", "resize", "flip", "init", "pixel", "lpips", "adaptive", "network", "layers", "norm", "generator_loss",
    "discriminator_loss", "optim", "discriminator_optim",
])
def test_what_the_paper_does_not_state_is_marked_at_its_line(key):
    found = re.findall(rf"^ *{key}: .*$", shipped()["vq_imagenet128"].read_text(), flags=re.MULTILINE)
    assert found and all("reconstructed" in line for line in found)


@pytest.mark.fault(30)
@pytest.mark.parametrize("name", ["vq_imagenet128", "nsvq_imagenet128", "paper/table4_full"])
def test_a_missing_folder_is_told_before_anything_is_built_or_fetched(name, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "build", lambda recipe: pytest.fail("built before the data were looked at"))
    for overrides, key in (([], "data.root"), ([f"data.root={tmp_path}"], "data.train"), (["data.root=/nowhere"], "data.root")):
        with pytest.raises(UserError, match=f"^{key}: "):
            Trainer(load_recipe(name, ["precision=no", *overrides]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
