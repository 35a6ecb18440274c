import json
import math
import re
from configparser import ConfigParser
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torchvision.models import squeezenet1_1

from vqzoo import Plugin, sources
from vqzoo.errors import UserError
from vqzoo.prepare import build, enter
from vqzoo.recipe import difference, differences, find_recipe, load_recipe, plain, shipped, to_yaml
from vqzoo.trainer import Trainer

MINIMAL = "epochs: 3\nplugins: {vq: {}, pixel: {}}\n"
STAGES = MINIMAL + "stages: [{name: joint, epochs: 2}, {name: refine}]\n"


class Odd(Plugin):
    """A stranger's plugin whose error names neither itself nor its field."""

    @dataclass
    class Config:
        number: int = 1

        def __post_init__(self):
            if self.number % 2 == 0:
                raise ValueError("an odd number is wanted")


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def refusal(written):
    """Return what load_recipe says against a text; it must name the file unless an override is to blame."""

    def refuse(text, *overrides):
        path = written(text)
        with pytest.raises(UserError) as caught:
            load_recipe(path, list(overrides))
        message = str(caught.value)
        assert path in message or any(repr(override) in message for override in overrides)
        return message

    return refuse


# Mistakes


@pytest.mark.fault(33)
@pytest.mark.parametrize("text, key, near", [
    ("epoch: 3", "epoch", "epochs"),
    ("optim: {lrr: 1e-3}", "optim.lrr", "lr"),
    ("data: {resolutoin: [32, 32]}", "data.resolutoin", "resolution"),
    ("stages: [{name: a, epochs: 1}, {naem: b}]", "stages[1].naem", "name"),
    ("plugins: {vq: {comitment_weight: 1}}", "plugins.vq.comitment_weight", "commitment_weight"),
    ("plugins: {simqv: {}}", "plugins.simqv", "simvq"),
])
def test_a_misspelt_key_is_named_with_the_nearest_one(refusal, text, key, near):
    message = refusal(text)
    assert f" {key}: " in message
    assert f"did you mean {near!r}?" in message


@pytest.mark.fault(33)
@pytest.mark.parametrize("text, key, value", [
    ("epochs: many", "epochs", "many"),
    ("epochs: 2.5", "epochs", "2.5"),
    ("epochs: true", "epochs", "True"),
    ("seed:", "seed", "None"),
    ("optim: 3", "optim", "3"),
    ("hooks:", "hooks", "None"),
    ("hooks: {quantize: vq}", "hooks.quantize", "vq"),
    ("data: {resolution: 64}", "data.resolution", "64"),
    ("data: {resolution: [64, wide]}", "data.resolution[1]", "wide"),
    ("encoder: {pretrained: 3}", "encoder.pretrained", "3"),
    ("encoder: {args: }", "encoder.args", "None"),
    ("stages: {name: a}", "stages", "a"),
    ("stages: [a]", "stages[0]", "a"),
    ("stages: [{name: a, epochs: 1}, {name: b, epochs: long}]", "stages[1].epochs", "long"),
    ("stages: [{freeze: encoder.*}]", "stages[0].freeze", "encoder.*"),
    ("stages: [{hooks: }]", "stages[0].hooks", "None"),
    ("stages: [{hooks: {quantize: vq}}]", "stages[0].hooks.quantize", "vq"),
    ("plugins: [vq]", "plugins", "vq: {}"),
    ("plugins: {vq: 3}", "plugins.vq", "3"),
    ("plugins: {vq: {codebook_weight: heavy}}", "plugins.vq.codebook_weight", "heavy"),
    ("optim: {scale: {'encoder.*': fast}}", "optim.scale.encoder.*", "fast"),
])
def test_a_wrong_type_is_named_with_its_full_key(refusal, text, key, value):
    message = refusal(text)
    assert f" {key}: " in message
    assert value in message.split(f" {key}: ")[1]


@pytest.mark.fault(33)
@pytest.mark.parametrize("text, key, value", [
    ("seed: -1", "seed", "-1"),
    ("epochs: 0", "epochs", "0"),
    ("epoch_steps: 0", "epoch_steps", "0"),
    ("accumulate: 0", "accumulate", "0"),
    ("ema: 1", "ema", "1.0"),
    ("ema: .nan", "ema", "nan"),
    ("precision: fp61", "precision", "did you mean 'fp16'?"),
    ("ops: {backend: chunky}", "ops.backend", "did you mean 'chunked'?"),
    ("ops: {precision: fats}", "ops.precision", "did you mean 'fast'?"),
    ("codebook: {size: 0}", "codebook.size", "0"),
    ("encoder: {stride: 0}", "encoder.stride", "0"),
    ("data: {batch_size: 0}", "data.batch_size", "0"),
    ("log: {images: 0}", "log.images", "0"),
    ("log: {drift_images: 0}", "log.drift_images", "0"),
    ("checkpoint: {keep: 0}", "checkpoint.keep", "0"),
    ("optim: {name: adamm}", "optim.name", "did you mean 'adam'?"),
    ("optim: {schedule: cosin}", "optim.schedule", "did you mean 'cosine'?"),
    ("optim: {lr: 0}", "optim.lr", "0.0"),
    ("optim: {lr: .inf}", "optim.lr", "inf"),
    ("optim: {betas: [0.9]}", "optim.betas", "[0.9]"),
    ("optim: {betas: [0.9, 1.0]}", "optim.betas", "[0.9, 1.0]"),
    ("optim: {weight_decay: -1}", "optim.weight_decay", "-1.0"),
    ("optim: {clip: 0}", "optim.clip", "0.0"),
    ("optim: {warmup_steps: -1}", "optim.warmup_steps", "-1"),
    ("optim: {scale: {'encoder.*': -1}}", "optim.scale", "encoder.*"),
    ("discriminator_optim: {lr: -1}", "discriminator_optim.lr", "-1.0"),
    ("stages: []", "stages", "[]"),
    ("epochs: 9\nstages: [{name: a, epochs: 1}, {name: a}]", "stages", "['a', 'a']"),
    ("epochs: 9\nstages: [{name: a}, {name: b}]", "stages[0].epochs", "None"),
    ("epochs: 9\nstages: [{name: a, epochs: 0}, {name: b}]", "stages[0].epochs", "0"),
    ("epochs: 9\nstages: [{name: a, epochs: 2}]", "stages[0].epochs", "2"),
    ("epochs: 2\nstages: [{name: a, epochs: 2}, {name: b}]", "epochs", "2"),
])
def test_an_impossible_value_is_named_with_its_full_key(refusal, text, key, value):
    message = refusal(text)
    assert f" {key}: " in message
    assert value in message.split(f" {key}: ")[1]


@pytest.mark.fault(33)
@pytest.mark.parametrize("text, line", [
    ("seed: 1\nplugins: {vq: {}\nepochs: 2\n", "line 3"),
    ("seed: 1\noptim:\n\tlr: 3\n", "line 3"),
    ("seed: 1\nepochs: 2\nseed: 3\n", "line 3"),
])
def test_a_yaml_error_is_told_with_its_line(refusal, text, line):
    assert line in refusal(text)


@pytest.mark.fault(33)
@pytest.mark.parametrize("text", ["- seed: 1", "hello", "null: 3", "seed: ${", "3: 4"])
def test_what_is_no_mapping_of_known_keys_is_refused(refusal, text):
    refusal(text)


@pytest.mark.fault(33)
@pytest.mark.parametrize("where", ["seed: TAG", "data: {root: TAG}", "plugins: {vq: {init: TAG}}", "plugins: {vq: TAG}"])
@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch CANARY']", "!!python/object/new:os.mkdir ['CANARY']"])
def test_a_python_tag_is_never_executed(refusal, tmp_path, where, tag):
    canary = tmp_path / "canary"
    message = refusal(where.replace("TAG", tag.replace("CANARY", str(canary))))
    assert "python/object" in message and "line 1" in message
    assert not canary.exists()


@pytest.mark.fault(33)
def test_a_python_tag_in_an_override_is_never_executed(refusal, tmp_path):
    canary = tmp_path / "canary"
    refusal(MINIMAL, f"seed=!!python/object/apply:os.mkdir ['{canary}']")
    assert not canary.exists()


@pytest.mark.fault(33)
@pytest.mark.parametrize("text, key", [
    ("seed: ${seed}", "seed"),
    ("epochs: ${seed}\nseed: ${epochs}", "seed"),
    ("optim: ${optim}", "optim"),
    ("plugins: ${plugins}", "plugins"),
    ("plugins: {vq: '${plugins.vq}'}", "plugins.vq"),
    ("plugins: {vq: {init: '${plugins.vq.init}'}}", "plugins.vq.init"),
    ("stages: ['${stages[0]}']", "stages[0]"),
    ("seed: ${nowhere}", "seed"),
    ("encoder: {args: {width: '${nowhere}'}}", "encoder.args.width"),
])
def test_an_interpolation_that_leads_nowhere_is_a_user_error(refusal, text, key):
    assert f" {key}: " in refusal(text)


def test_an_interpolation_takes_the_other_keys_value(written):
    recipe = load_recipe(written(MINIMAL + "codebook: {size: '${epochs}', width: '${codebook.size}'}"))
    assert recipe.codebook.size == recipe.codebook.width == 3
    recipe = load_recipe(written(MINIMAL), ["encoder.args={width: '${codebook.${encoder.args.key}}', key: size}"])
    assert recipe.encoder.args["width"] == recipe.codebook.size


@pytest.mark.fault(33, 34)
@pytest.mark.parametrize("text, key", [
    ("plugins: {nsvq: {temperature: 0}}", "plugins.nsvq.temperature"),
    ("plugins: {nsvq: {patience: 0}}", "plugins.nsvq.patience"),
    ("plugins: {vq: {init: zeros}}", "plugins.vq.init"),
    ("plugins: {vq: {codebook_weight: -1}}", "plugins.vq.codebook_weight"),
    ("plugins: {simvq: {commitment_weight: .nan}}", "plugins.simvq.commitment_weight"),
    ("plugins: {nsvq: {noise: .inf}}", "plugins.nsvq.noise"),
    ("plugins: {pixel: {l2: -1}}", "plugins.pixel.l2"),
    ("plugins: {vq: {}, kmeans: {iterations: 0}}", "plugins.kmeans.iterations"),
])
def test_a_plugins_own_check_is_told_with_plugin_and_field(refusal, text, key):
    assert f": {key}: " in refusal(text)


@pytest.mark.fault(34)
def test_a_strangers_check_is_told_with_the_plugins_name(refusal, monkeypatch):
    def with_odd(group):
        return [*entry_points(group=group), EntryPoint("odd", "test_recipes:Odd", group)]

    monkeypatch.setattr(sources, "entry_points", with_odd)
    assert "plugins.odd: an odd number is wanted" in refusal("plugins: {vq: {}, odd: {number: 2}}")
    assert "plugins.odd.number" in refusal("plugins: {vq: {}, odd: {number: two}}")


@pytest.mark.parametrize("name", ["a" * 300, "folder/" + "a" * 5000 + ".yaml", "null\0byte", ""])
def test_a_name_that_no_file_can_have_is_an_unknown_recipe(name):
    with pytest.raises(UserError, match="no such file"):
        load_recipe(name)


RESOLVERS = ["${oc.env:SECRET}", "a ${oc.env:SECRET,b}", "${oc.${seed}:SECRET}", "${oc.env:${seed}}", "${oc.decode:'${seed}'}"]


@pytest.mark.parametrize("value", RESOLVERS)
@pytest.mark.parametrize("text, key", [
    ("data: {root: \"VALUE\"}", "data.root"),
    ("optim: {betas: [0.9, \"VALUE\"]}", "optim.betas[1]"),
    ("stages: [{freeze: [\"VALUE\"]}]", "stages[0].freeze[0]"),
    ("plugins: {vq: {init: \"VALUE\"}}", "plugins.vq.init"),
    ("plugins: \"VALUE\"", "plugins"),
])
def test_a_resolver_is_refused_and_the_environment_never_read(refusal, monkeypatch, text, key, value):
    monkeypatch.setenv("SECRET", "canary")
    message = refusal(text.replace("VALUE", value))
    assert f": {key}: " in message and "canary" not in message


@pytest.mark.parametrize("value", RESOLVERS)
@pytest.mark.parametrize("key", ["data.root", "stages[0].name", "encoder.args.width"])
def test_a_resolver_in_an_override_is_refused(refusal, monkeypatch, key, value):
    monkeypatch.setenv("SECRET", "canary")
    message = refusal(STAGES, f"{key}={value}")
    assert f": {key}: " in message and "canary" not in message


def test_a_resolver_inside_an_overriding_mapping_is_refused_under_its_full_key(refusal):
    assert ": encoder.args.mult[0]: " in refusal(STAGES, "encoder={args: {mult: ['${oc.env:SECRET}']}}")


def test_an_unknown_recipe_lists_the_shipped_ones_that_stand_alone():
    with pytest.raises(UserError) as caught:
        load_recipe("quickstrat")
    assert "did you mean 'quickstart'?" in str(caught.value)
    assert all(name in str(caught.value) for name in shipped() if "/" not in name)


# What a recipe means


@pytest.mark.parametrize("spelling", ["vq:", "vq: {}", "vq: null"])
def test_a_plugin_without_fields_has_its_defaults(written, spelling):
    recipe = load_recipe(written(f"plugins:\n  {spelling}\n"))
    assert plain(recipe.plugins) == {"vq": {"codebook_weight": 1.0, "commitment_weight": 0.25, "init": "uniform"}}


def test_an_empty_plugin_keeps_its_schema(refusal):
    assert "plugins.vq.weight: unknown key" in refusal("plugins:\n  vq:\n", "plugins.vq.weight=3")


@pytest.mark.parametrize("override, key, value", [
    ("seed=7", "seed", 7),
    ("optim.lr=2e-4", "optim.lr", 2e-4),
    ("stages[0].epochs=1", "stages.0.epochs", 1),
    ("stages[1].freeze=['encoder.*']", "stages.1.freeze", ["encoder.*"]),
    ("data.resolution=[32,48]", "data.resolution", [32, 48]),
    ("data.root=/photos/a=b", "data.root", "/photos/a=b"),
    ("optim.scale={'encoder.*': 5}", "optim.scale", {"encoder.*": 5.0}),
    ("hooks.embedding_loss=[]", "hooks.embedding_loss", []),
    ("plugins.vq.codebook_weight=2", "plugins.vq.codebook_weight", 2.0),
    ("plugins.kmeans={}", "plugins.kmeans.iterations", 10),
    ("plugins.kmeans=", "plugins.kmeans.iterations", 10),
    ("plugins.kmeans.iterations=3", "plugins.kmeans.iterations", 3),
])
def test_an_override_changes_that_key_alone(written, override, key, value):
    path = written(STAGES)
    before, found = plain(load_recipe(path)), plain(load_recipe(path, [override]))
    node = found
    for part in key.split("."):
        node = node[int(part) if part.isdigit() else part]
    assert node == value
    (changed,) = (line.split(":")[0] for line in difference(before, found))
    assert key.startswith(changed) or changed.startswith(key)


@pytest.mark.parametrize("override, key, value", [
    ("plugins={pixel: {l2: 1}}", "plugins", {"pixel": {"l1": 1.0, "l2": 1.0}}),
    ("plugins={}", "plugins", {}),
    ("plugins.nsvq={}", "plugins.nsvq.weight", 0.1),
    ("plugins.nsvq=", "plugins.nsvq.weight", 0.1),
    ("encoder.args={}", "encoder.args", {}),
    ("encoder.args={patch: 4}", "encoder.args", {"patch": 4}),
    ("hooks={}", "hooks", {}),
    ("optim.scale={'decoder.*': 2}", "optim.scale", {"decoder.*": 2.0}),
    ("stages=[{}]", "stages", [{"name": "train", "epochs": None, "freeze": [], "hooks": {}}]),
    ("stages[1]={name: last}", "stages.1", {"name": "last", "epochs": None, "freeze": [], "hooks": {}}),
    ("stages[1].hooks={}", "stages.1.hooks", {}),
])
def test_an_override_with_a_mapping_or_a_list_replaces(written, override, key, value):
    node = plain(load_recipe(written("""
epochs: 3
encoder: {args: {width: 8, mult: [1, 2]}}
plugins: {vq: {}, nsvq: {weight: 3}, pixel: {l1: 2}}
hooks: {quantize: [vq]}
optim: {scale: {"encoder.*": 5}}
stages: [{name: joint, epochs: 2}, {name: refine, freeze: ["encoder.*"], hooks: {refresh_codes: []}}]
"""), [override]))
    for part in key.split("."):
        node = node[int(part) if part.isdigit() else part]
    assert node == value


@pytest.mark.parametrize("override, key", [
    ("stages[0].epochs=2", "stages"), ("stages[0]={name: a}", "stages"), ("data.resolution[1]=32", "data.resolution"),
    ("encoder.args.mult[0]=1", "encoder.args.mult"),
])
def test_an_item_of_a_list_that_the_recipe_does_not_set_is_told(refusal, override, key):
    assert f": {key}: the recipe sets no such list; set it whole, as in {key}=[...]" in refusal(MINIMAL, override)


@pytest.mark.parametrize("spelling", ["no", "'no'", "off", "false"])
def test_no_precision_needs_no_quotes(written, spelling):
    assert load_recipe(written(f"precision: {spelling}")).precision == "no"
    assert load_recipe(written("precision: bf16"), [f"precision={spelling}"]).precision == "no"


def test_later_overrides_win(written):
    assert load_recipe(written(MINIMAL), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.fault(33)
@pytest.mark.parametrize("override, fragment", [
    ("fast", "write key=value"),
    ("=3", "write key=value"),
    ("seed=[1", "seed=[1"),
    ("seed=${", "seed=${"),
    ("stages[5].epochs=1", "stages[5].epochs=1"),
    ("stages[x].epochs=1", "stages[x].epochs=1"),
    ("stages.epochs=1", "stages.epochs=1"),
    ("optim=3", "optim: 3"),
    ("optim.lr.x=3", "optim.lr"),
    ("stages[0].nam=a", "stages[0].nam: unknown key; did you mean 'name'?"),
    ("plugins.simqv={}", "did you mean 'simvq'?"),
    ("plugins=3", "plugins: "),
    ("data.resolution[0]=32", "data.resolution: "),
])
def test_a_bad_override_is_named(refusal, override, fragment):
    assert fragment in refusal(STAGES, override)


def test_a_recipe_survives_the_way_through_yaml(written):
    text = STAGES + """
data: {root: '1e3', resolution: [32, 48], resize: null}
encoder: {pretrained: weights.pth, args: {mult: [1, 2], patch: 2}}
hooks: {quantize: [vq], refresh_codes: []}
optim: {lr: 2e-3, scale: {"encoder.*": 5, "*": 0.1}, clip: 1, betas: [0.5, 0.9]}
"""
    recipe = load_recipe(written(text), ["stages[1].hooks={embedding_loss: []}", "plugins.nsvq={}"])
    assert recipe.data.root == "1e3" and recipe.encoder.pretrained == "weights.pth"
    assert load_recipe(written(to_yaml(recipe))) == recipe


def test_null_takes_a_plugin_back(written):
    path = written(STAGES)
    with_simvq = load_recipe(path, ["plugins.simvq={}"])
    assert "simvq" in with_simvq.plugins
    assert load_recipe(path, ["plugins.simvq={}", "plugins.simvq=null"]) == load_recipe(path)


def test_a_recipe_in_plain_has_nothing_that_json_has_not():
    class Kind(Enum):
        SOFT = 1

    @dataclass
    class Config:
        kind: Kind = Kind.SOFT
        place: Path = Path("a/b")
        limits: tuple = (1.0, math.nan)

    assert json.loads(json.dumps(plain(Config())))["kind"] == "SOFT" and plain(Config())["place"] == "a/b"
    assert difference({"x": math.nan}, {"x": math.nan}) == []
    assert difference({"x": math.nan}, {"x": 1.0}) == ["x: nan → 1.0"]


def test_difference_names_each_key_with_both_values(written):
    path = written(STAGES)
    one, other = plain(load_recipe(path)), plain(load_recipe(path, ["seed=4", "optim.lr=1e-3", "plugins.simvq={}"]))
    assert difference(one, one) == []
    assert difference(one, other) == [
        "seed: 0 → 4",
        "plugins.simvq: None → {'codebook_weight': 1.0, 'commitment_weight': 0.25}",
        "optim.lr: 0.0001 → 0.001",
    ]
    assert difference(other, one)[1] == "plugins.simvq: {'codebook_weight': 1.0, 'commitment_weight': 0.25} → None"
    stages = difference(one, plain(load_recipe(path, ["stages[0].epochs=1"])))
    assert len(stages) == 1 and stages[0].startswith("stages: [{'name': 'joint', 'epochs': 2")


def test_changes_leave_out_what_does_not_alter_a_run(written):
    path = written(STAGES)
    then = load_recipe(path)
    harmless = ["log.steps=7", "log.images=2", "checkpoint.keep=9", "checkpoint.epochs=3", "data.workers=0",
                "data.eval_batch_size=3", "versions.torch='9'"]
    assert len(difference(plain(then), plain(load_recipe(path, harmless)))) == len(harmless)
    assert differences(plain(then), plain(load_recipe(path, harmless)))[0] == []
    harmful = ["seed=4", "init_from=elsewhere", "data.batch_size=3", "plugins.kmeans={}"]
    found = differences(plain(then), plain(load_recipe(path, harmless + harmful)))[0]
    assert sorted(line.split(":")[0] for line in found) == ["data.batch_size", "init_from", "plugins.kmeans", "seed"]


# Recipes that extend others

BASE = """
epochs: 3
data: {root: photos, resolution: [32, 32]}
encoder: {args: {width: 8, mult: [1, 2]}}
plugins: {vq: {codebook_weight: 2}, nsvq: {weight: 3}, pixel: }
hooks: {quantize: [vq], refresh_codes: []}
optim: {clip: 1, betas: [0.5, 0.9], scale: {"encoder.*": 5}}
stages: [{name: joint, epochs: 2}, {name: refine, freeze: ["encoder.*"]}]
versions: {torch: '0.1'}
"""


@pytest.fixture
def family(tmp_path):
    """Write files by name and load the one called child.yaml."""

    def load(*overrides, **texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return load_recipe(str(tmp_path / "child.yaml"), list(overrides))

    return load


@pytest.fixture
def family_quarrel(family, tmp_path):
    """Return the name of the file that is to blame, and what is said against it."""

    def quarrel(*overrides, **texts):
        with pytest.raises(UserError) as caught:
            family(*overrides, **texts)
        path, _, message = str(caught.value).partition(": ")
        return path.removeprefix(f"{tmp_path}/").removesuffix(".yaml"), message

    return quarrel


def test_extending_without_a_word_is_the_same_recipe_with_versions_of_its_own(family):
    base = family(child=BASE)
    child = family(base=BASE, child="extends: base.yaml")
    assert base.versions == {"torch": "0.1"} and child.versions == {}
    assert plain(child) == {**plain(base), "versions": {}}
    assert "extends" not in to_yaml(child)


@pytest.mark.parametrize("text, key, value", [
    ("seed: 4", "seed", 4),
    ("data: {flip: true}", "data", {"root": "photos", "resolution": [32, 32], "flip": True}),
    ("data: {resolution: [64, 48]}", "data.resolution", [64, 48]),
    ("data: {root: null}", "data.root", None),
    ("encoder: {args: {width: 16, patch: 2}}", "encoder.args", {"width": 16, "mult": [1, 2], "patch": 2}),
    ("encoder: {args: null}", "encoder.args", {}),
    ("encoder: {args: {mult: null}}", "encoder.args", {"width": 8}),
    ("encoder: {args: {img_size: null}}", "encoder.args.img_size", None),
    ("plugins: {vq: {commitment_weight: 1}}", "plugins.vq",
     {"codebook_weight": 2.0, "commitment_weight": 1.0, "init": "uniform"}),
    ("plugins: {vq: {}}", "plugins.vq.codebook_weight", 2.0),
    ("plugins: {kmeans: {}}", "plugins.kmeans.iterations", 10),
    ("plugins: {nsvq: null}", "plugins", ["vq", "pixel"]),
    ("plugins: {pixel: null}", "plugins", ["vq", "nsvq"]),
    ("plugins: null", "plugins", []),
    ("plugins: {simvq: {}, vq: {}}", "plugins", ["vq", "nsvq", "pixel", "simvq"]),
    ("hooks: {quantize: null, embedding_loss: []}", "hooks", {"refresh_codes": [], "embedding_loss": []}),
    ("optim: {clip: null}", "optim.clip", None),
    ("optim: {scale: {'decoder.*': 2}}", "optim.scale", {"encoder.*": 5.0, "decoder.*": 2.0}),
    ("stages: [{name: joint, epochs: 1}, {}]", "stages", [("joint", 1, []), ("train", None, [])]),
    ("stages: null", "stages", [("train", None, [])]),
    ("discriminator_optim: {betas: '${optim.betas}'}", "discriminator_optim.betas", [0.5, 0.9]),
])
def test_what_a_child_says_is_laid_over_its_base(family, text, key, value):
    base, child = family(child=BASE), family(base=BASE, child=f"{text}\nextends: base.yaml")
    node = plain(child)
    for part in key.split("."):
        node = node[part]
    if key == "plugins":
        node = list(node)
    elif key == "stages":
        node = [(stage["name"], stage["epochs"], stage["freeze"]) for stage in node]
    elif key == "data":
        assert node.items() >= value.items()
        node = value
    assert node == value
    changed = {line.split(": ")[0] for line in difference({**plain(base), "versions": {}}, plain(child))}
    assert all(name.startswith(text.split(":")[0]) for name in changed)


def test_a_plugin_that_the_base_lacks_cannot_be_taken_back(family):
    with pytest.raises(UserError, match=r"child\.yaml: plugins\.kmeans: null would take 'kmeans' back, .* kmeans: \{\}"):
        family(base=BASE, child="plugins: {kmeans: null}\nextends: base.yaml")


def test_a_chain_is_laid_from_the_last_base_to_the_recipe_and_then_the_overrides(family, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "base.yaml").write_text("extends: ../root.yaml\nseed: 2\nema: 0.5\nplugins: {pixel: {}}\n")
    recipe = family("ema=0.7", "plugins.pixel.l2=3", root="seed: 1\nepochs: 9\nema: 0.1\nplugins: {vq: }",
                    child="extends: deep/base.yaml\nseed: 3\nema: 0.6\nplugins: {kmeans: {}}")
    assert (recipe.seed, recipe.epochs, recipe.ema, recipe.plugins["pixel"].l2) == (3, 9, 0.7, 3.0)
    assert list(recipe.plugins) == ["vq", "pixel", "kmeans"]


def test_interpolations_are_read_when_all_files_are_joined(family):
    recipe = family(base="seed: 3\nepochs: ${codebook.size}\ncodebook: {size: '${seed}'}", child="extends: base.yaml\nseed: 5")
    assert recipe.epochs == recipe.codebook.size == 5


def test_a_recipe_may_extend_a_shipped_one_by_name_but_a_file_beside_it_comes_first(family):
    recipe = family(child="extends: quickstart\nseed: 7")
    assert difference(plain(load_recipe("quickstart")), plain(recipe)) == ["seed: 0 → 7"]
    assert family(quickstart="seed: 1\nepochs: 5", child="extends: quickstart.yaml").epochs == 5
    assert family(child=f"extends: {shipped()['quickstart']}") == load_recipe("quickstart")


@pytest.mark.parametrize("said", ["3", "[base.yaml]", "{base: yaml}", "null", "true"])
def test_extends_must_be_a_name(family_quarrel, said):
    culprit, message = family_quarrel(base=BASE, child=f"extends: {said}")
    assert culprit == "child" and message.startswith("extends: ") and "quickstart" in message


@pytest.mark.parametrize("said", ["nowhere.yaml", "quickstrat", "''", ".", "'${seed}'", "a\\0b"])
def test_an_unknown_base_is_told_with_the_choices(family_quarrel, said):
    culprit, message = family_quarrel(base=f'extends: "{said}"' if "\\0" in said else f"extends: {said}",
                                      child="extends: base.yaml")
    assert culprit == "base" and message.startswith("extends: ") and "no such file" in message and "quickstart" in message


@pytest.mark.fault(33)
@pytest.mark.parametrize("texts", [
    {"child": "extends: child.yaml"},
    {"child": "extends: base.yaml", "base": "extends: ./child.yaml"},
    {"child": "extends: middle.yaml", "middle": "extends: base.yaml", "base": "extends: middle.yaml"},
])
def test_a_circle_is_refused(family_quarrel, texts):
    culprit, message = family_quarrel(**texts)
    assert culprit == list(texts)[-1] and message.startswith("extends: ") and "in turn" in message


@pytest.mark.parametrize("text, fragment", [
    ("epoch: 3", "epoch: unknown key"),
    ("extend: other", "did you mean 'extends'?"),
    ("optim: {lr: fast}", "optim.lr: "),
    ("optim: {lr: -1}", "optim.lr: -1.0 will not do"),
    ("plugins: {simqv: {}}", "plugins.simqv: "),
    ("plugins: {nsvq: {patience: 0}}", "plugins.nsvq.patience: "),
    ("data: {root: '${oc.env:HOME}'}", "data.root: "),
    ("seed: [", "cannot be read"),
    ("- 3", "a recipe is a mapping"),
])
def test_a_mistake_is_told_with_the_file_that_makes_it(family_quarrel, text, fragment):
    fine, top = "epochs: 4\n", "extends: base.yaml\n"
    for wrong in ("root", "base", "child"):
        texts = {"root": fine, "base": "extends: root.yaml\n", "child": top}
        texts[wrong] = text if text[0] == "-" else text + "\n" + (fine if wrong == "root" else texts[wrong])
        culprit, message = family_quarrel(**texts)
        assert culprit == wrong and fragment in message


def test_what_only_the_child_makes_wrong_is_the_childs(family_quarrel):
    base = "epochs: 9\nstages: [{name: a, epochs: 4}, {name: b}]"
    assert family_quarrel(base=base, child="extends: base.yaml\nepochs: 4")[0] == "child"
    assert family_quarrel("epochs=4", base=base, child="extends: base.yaml")[0] == "child"
    assert "mapping is expected" in family_quarrel(base=BASE, child="extends: base.yaml\nencoder: {args: 3}")[1]


def test_a_base_need_not_stand_alone(family):
    base = "stages: [{name: a, epochs: 4}, {name: b}]\ndata: {root: '${encoder.name}'}\nplugins: {pixel: {l1: 0}}"
    assert family(base=base, child="extends: base.yaml\nepochs: 5\nplugins: {pixel: {l2: 1}}").plugins["pixel"].l2 == 1


def test_an_override_cannot_extend(family_quarrel):
    assert "extends=" in family_quarrel("extends=quickstart", child=BASE)[0]


# The recipes that come with vqzoo


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    """The file of a random network that LPIPS can compare by."""
    file = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(squeezenet1_1(weights=None).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def seen():
    """What of the shipped recipes was tried already; many are alike once they are shrunk."""
    return {}


as_shipped = cache(load_recipe)


def shrunk(name, photos, squeezenet):
    """Return overrides that make a shipped recipe a matter of a second: two steps in each stage of a tiny network."""
    recipe = as_shipped(name)
    side = max(32, 2 * recipe.encoder.stride)
    overrides = [
        f"data.resolution=[{side},{side}]", "data.resize=null", "data.batch_size=4", "data.eval_batch_size=8",
        "data.workers=0", "epoch_steps=2", "accumulate=1", "precision=no", "log.images=2", "log.drift_images=4",
        f"epochs={len(recipe.stages)}", f"codebook.size={min(32, recipe.codebook.size)}",
        *(f"stages[{number}].epochs=1" for number in range(len(recipe.stages) - 1)),
    ]
    if recipe.encoder.name == "vqgan_encoder":
        overrides += ["encoder.args.width=8", "encoder.args.blocks=1"]
    if recipe.decoder.name == "conv":
        overrides += ["decoder.args.width=8", "decoder.args.blocks=1"]
    if recipe.data.name == "folder":
        overrides.append(f"data.root={photos}")
    if "lpips" in recipe.plugins:
        overrides += ["plugins.lpips.network=squeeze", f"plugins.lpips.weights={squeezenet}"]
    if "gan" in recipe.plugins:
        overrides += ["plugins.gan.width=8", "plugins.gan.weight=0.5"]
    return overrides


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_says_what_to_expect_of_it(name):
    header = re.match(r"(#.*\n)+", shipped()[name].read_text())
    assert header, "the file begins with a comment"
    header = header[0]
    assert re.search(rf"vqzoo run (recipes/)?{re.escape(name)}\b", header), "the command"
    assert re.search(r"\b(CPU|GPUs?|cores?|[AH]\d00)\b", header), "the hardware"
    assert re.search(r"\b(seconds?|minutes?|hours?|days?|not yet measured)\b", header), "the time"
    assert re.search(r"\d dB|not yet measured", header), "the expected numbers"


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_wires_every_stage(name, seen):
    assert find_recipe(name) == shipped()[name]
    recipe = as_shipped(name)
    networks = repr([recipe.data.resolution, recipe.encoder, recipe.decoder])
    if name.startswith("paper/") and seen.setdefault(networks, name) != name:
        return  # its networks were built already, and tests/test_paper_recipes.py wires its stages
    widths = ["encoder.args.width=32", "decoder.args.width=32"]
    recipe = load_recipe(name, ["codebook.size=32", *(widths if recipe.encoder.args["width"] > 96 else [])])
    tokenizer = build(recipe)
    for number in range(len(recipe.stages)):
        enter(tokenizer, recipe, number)
        assert all(len(tokenizer.hooks.providers(hook)) >= 1 for hook in ("make_codebook", "quantize", "reconstruction_loss"))
        assert any(parameter.requires_grad for parameter in tokenizer.parameters())


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_runs_two_steps_in_each_stage_when_shrunk(name, small_photos, squeezenet, seen, tmp_path):
    recipe = load_recipe(name, shrunk(name, small_photos, squeezenet))
    if seen.setdefault(to_yaml(recipe), name) != name:
        return  # this very run was done under another name
    result = Trainer(recipe, tmp_path / "run").run()
    stages = [stage.name for stage in recipe.stages]
    assert result["run"]["step"] == 2 * len(stages)
    assert [stages[0], *(change["to"] for change in result["run"]["transitions"])] == stages
    assert 0 < result["metrics"]["psnr"] < 60 and 0 < result["metrics"]["usage"] <= 1
    left = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    assert {**plain(left), "versions": {}} == plain(recipe)
    assert {"vqzoo", "torch", *(f"plugin {plugin}" for plugin in recipe.plugins)} <= set(left.versions)


def test_shipped_recipes_are_self_contained():
    for name, path in shipped().items():
        raw = OmegaConf.load(path)
        assert ("seed" in raw) != ("extends" in raw) and raw.get("init_from") is None
        if "extends" in raw:
            assert (path.parent / raw.extends).resolve() in [other.resolve() for other in shipped().values()], name


def test_an_installed_package_has_every_recipe():
    config, folder = ConfigParser(), Path(__file__).parents[1] / "recipes"
    config.read(folder.parent / "setup.cfg")
    patterns = config["options.package_data"]["vqzoo_recipes"].split()
    packed = {path for pattern in patterns for path in folder.glob(pattern)}
    assert packed == set(folder.rglob("*.yaml")) and "paper" in {path.parent.name for path in packed}
