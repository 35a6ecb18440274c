"""Plugins that are there and cannot be used are named with the reason, the others work, and files come in by hand only."""

import importlib.metadata
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from test_cli import RECIPE, call, succeed

from vqzoo import CONTRACT, Plugin, PluginError, Table, Tokenizer, UserError, hookimpl, sources
from vqzoo.instance import make_plugin
from vqzoo.recipe import load_recipe
from vqzoo.sources import also, available, find, misfit, refused

STRANGERS = {
    "sound": "class P(Plugin):\n    '''Sound: works.'''\n    @hookimpl\n    def report(self):\n        return {}\n",
    "raises": "raise RuntimeError('no luck')\n",
    "leaves": "raise SystemExit(3)\n",
    "lacks": "import a_module_that_nobody_has\n",
    "misspells": "class P(Plugin):\n    @hookimpl\n    def quantise(self, latents):\n        return None\n",
    "mistakes": "class P(Plugin):\n    @hookimpl\n    def quantize(self, latent):\n        return None\n",
    "defaults": "class P(Plugin):\n    @hookimpl\n    def quantize(self, latents, grid=None):\n        return None\n",
    "bare": "class P(Plugin):\n    class Config:\n        size: int = 3\n",
    "selfless": "class P(Plugin):\n    @hookimpl\n    def quantize(latents, codebook):\n        return None\n",
    "unclosed": "class P(Plugin:\n",
    "forgets": "class P(Plugin):\n    def quantize(self, latents):\n        return None\n",
    "returns": "class P(Plugin):\n    @hookimpl(wrapper=True)\n    def quantize(self, latents):\n        return None\n",
    "newer": "class P(Plugin):\n    contract = '1.9'\n",
    "older": "class P(Plugin):\n    contract = '0.4'\n",
    "odd": "class P(Plugin):\n    contract = 'new'\n",
    "kmeans": "class P(Plugin):\n    '''Rival: has a built-in's name.'''\n",
}
"""One plugin each, by name; all but the first cannot be used."""

REASONS = {
    "raises": ["cannot be imported: RuntimeError('no luck')"],
    "leaves": ["cannot be imported: SystemExit(3)"],
    "lacks": ["needs the module 'a_module_that_nobody_has', which is not installed", "extra"],
    "misspells": ["it implements 'quantise', and there is no such hook; did you mean 'quantize'?"],
    "mistakes": ["its quantize asks for 'latent'", "did you mean 'latents'?", "codebook"],
    "defaults": ["'grid' of its quantize has a default", "take it away"],
    "bare": ["its Config is no dataclass", "@dataclass"],
    "selfless": ["its quantize is a method, whose first argument is self"],
    "unclosed": ["cannot be imported", "strangers_unclosed.py:4: "],
    "forgets": ["its method quantize has a hook's name; mark it with @hookimpl"],
    "returns": ["marked as a wrapper and does not yield"],
    "newer": [f"needs version 1.9 of the contract with plugins, and this vqzoo has {CONTRACT}; upgrade vqzoo"],
    "older": ["is made for version 0.4 of the contract", "upgrade the plugin"],
    "odd": ["contract = 'new' is no version"],
    "kmeans": ["several have this name", "vqzoo_plugins.kmeans of vqzoo", "strangers_kmeans of vqzoo-strangers 0.7"],
    "nonsense": ["cannot be imported"],
    "absent": ["cannot be imported", "strangers_absent"],
}


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    """Install a distribution of plugins of which one works."""
    info = tmp_path / "site" / "vqzoo_strangers-0.7.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vqzoo-strangers\nVersion: 0.7\n")
    entries = {name: f"strangers_{name}" for name in (*STRANGERS, "absent")} | {"nonsense": "not/a:module:at all"}
    (info / "entry_points.txt").write_text("[vqzoo]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items()))
    for name, text in STRANGERS.items():
        (tmp_path / "site" / f"strangers_{name}.py").write_text(f"from vqzoo import Plugin, hookimpl\n\n\n{text}")
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    yield
    for module in [name for name in sys.modules if name.startswith("strangers_")]:
        del sys.modules[module]


@pytest.mark.fault(34)
def test_plugins_names_each_that_cannot_be_used_with_distribution_and_reason_and_the_others_work(strangers):
    found = {plugin["name"]: plugin for plugin in json.loads(succeed("plugins", "--json").out)}
    for name, fragments in REASONS.items():
        problem = found[name]["problem"]
        assert all(fragment in problem for fragment in fragments), problem
        assert "vqzoo-strangers" in problem and "0.7" in problem
    assert not found["sound"]["problem"] and not found["vq"]["problem"]
    assert found.keys() >= REASONS.keys() | {"sound", "vq", "simvq"}


@pytest.mark.fault(34)
@pytest.mark.parametrize("name", REASONS)
def test_a_recipe_that_needs_a_plugin_which_cannot_be_used_fails_closed(strangers, tmp_path, small_photos, name):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.replace("ROOT", str(small_photos)))
    done = call("check", recipe, f"plugins.{name}={{}}")
    assert done.code == 2 and "Traceback" not in done.err
    assert all(fragment in done.err for fragment in REASONS[name]), done.err


def test_a_recipe_that_needs_none_of_them_works(strangers, tmp_path, small_photos):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.replace("ROOT", str(small_photos)).replace("pixel: {}", "sound: {}"))
    text = call("check", recipe).err  # who offers a missing hook is asked of all plugins
    assert "nobody serves reconstruction_loss" in text and "lpips" in text and "Traceback" not in text


@pytest.mark.parametrize("needed, fits", [
    (CONTRACT, True), ("1.0", True), ("1.1", False), ("2.0", False), ("0.9", False), ("1", False)])
def test_a_plugin_says_which_contract_it_needs(needed, fits):
    kind = type("Needing", (Plugin,), {"contract": needed})
    assert (misfit(kind) is None) == fits


class Fragile(Plugin):
    def __init__(self, config):
        raise config_error[0]


config_error = [None]


@pytest.mark.parametrize("error, kind, words", [
    (ModuleNotFoundError("No module named 'faiss'", name="faiss"), UserError, "needs the module 'faiss', which is not in"),
    (KeyError("width"), PluginError, r"cannot be made: KeyError\('width'\)"),
    (UserError("plugins.fragile.size: too small"), UserError, "^plugins.fragile.size: too small"),
])
def test_a_plugin_that_cannot_be_made_is_named(error, kind, words):
    config_error[0] = error
    with also(classes={"fragile": Fragile}), pytest.raises(kind, match=words):
        make_plugin("fragile", {})


# ---- files and classes given by hand

MINE = """
from vqzoo import Plugin, Quantized, hookimpl
from vqzoo.ops import nearest_codes

class Mine(Plugin):
    '''Mine: a search of one file.'''

    @hookimpl
    def quantize(self, latents, codebook):
        indices, _ = nearest_codes(latents.flatten(0, 1), codebook.vectors())
        indices = indices.view(latents.shape[:2])
        return Quantized(codebook.lookup(indices), indices)
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "my_vq.py"
    path.write_text(MINE)
    yield path
    for module in [name for name in sys.modules if name.endswith("my_vq")]:
        del sys.modules[module]


@pytest.fixture
def recipe(tmp_path, small_photos):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("ROOT", str(small_photos)).replace("vq: {}, nsvq: {}", "vq: {}, nsvq: {}, my_vq: {}"))
    return path


def test_a_plugin_of_one_file_trains_resumes_and_decodes_as_long_as_it_is_given(recipe, mine, tmp_path):
    out, picture = tmp_path / "run", next((Path(load_recipe(recipe, ["plugins.my_vq=null"]).data.root) / "val").iterdir())
    succeed("run", recipe, "--plugin-file", mine, "--out", out)
    said = (out / "recipe.yaml").read_text()
    assert f"plugin my_vq: my_vq.py {find_in(mine).version}" in said
    succeed("run", recipe, "epochs=3", "--plugin-file", mine, "--out", out, "--resume", "auto")
    tokens = tmp_path / "tokens.safetensors"
    succeed("encode", out, picture, "--out", tokens, "--plugin-file", mine)
    again = ["run", recipe, "--out", out, "--resume", "auto"]
    for words in (["check", recipe], again, ["encode", out, picture, "--out", tokens]):
        done = call(*words)
        assert done.code == 2 and "plugins.my_vq: no installed plugin is called 'my_vq'" in done.err
        assert "--plugin-file" in done.err


def find_in(path):
    with also([str(path)]):
        return find(path.stem)


def test_a_changed_file_is_another_plugin_to_a_run_that_goes_on(recipe, mine, tmp_path):
    out = tmp_path / "run"
    succeed("run", recipe, "--plugin-file", mine, "--out", out)
    mine.write_text(MINE + "\n# changed\n")
    done = call("run", recipe, "epochs=3", "--plugin-file", mine, "--out", out, "--resume", "auto")
    assert done.code == 2 and "plugin my_vq" in done.err and "--insist" in done.err


def test_a_recipe_cannot_name_a_file(recipe, mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my_vq.py", "./my_vq.py", str(mine)):
        recipe.write_text(recipe.read_text().replace("my_vq: {}", f"{name}: {{}}"))
        assert call("check", recipe).code == 2
    assert not any("my_vq" in name for name in sys.modules)


def test_a_file_hides_no_module_and_is_gone_after_the_command(tmp_path):
    path = tmp_path / "json.py"
    path.write_text(MINE)
    succeed("plugins", "--plugin-file", path)
    assert sys.modules["json"] is json and "json" not in available()


@pytest.mark.parametrize("name, text, fragments", [
    ("my-vq.py", MINE, ["must be one of a Python module", "my-vq.py"]),
    ("my_vq.txt", MINE, ["my_vq.txt"]),
    ("two.py", MINE + MINE.replace("class Mine", "class Other"), ["must define one subclass of vqzoo.Plugin, and has 2"]),
    ("broken.py", "import (", ["plugin 'broken'", "broken.py:1: "]),
    ("vq.py", MINE, ["plugins.vq", "several have this name", "vq.py"]),
])
def test_a_file_that_will_not_do_is_told(recipe, tmp_path, name, text, fragments):
    path = tmp_path / name
    path.write_text(text)
    done = call("check", recipe, f"plugins.my_vq=null plugins.{path.stem}={{}}".split()[0], f"plugins.{path.stem}={{}}",
                "--plugin-file", path)
    assert done.code == 2 and "Traceback" not in done.err
    assert all(fragment in done.err for fragment in fragments), done.err


def test_a_file_that_is_not_there_is_told(recipe, tmp_path):
    done = call("check", recipe, "--plugin-file", tmp_path / "nowhere.py")
    assert done.code == 2 and "--plugin-file" in done.err and "nowhere.py" in done.err and "No such file" in done.err


@pytest.mark.parametrize("variable, value", [(sources.DENY, "my_vq"), (sources.ALLOW, "vqzoo")])
def test_the_environment_excludes_a_file_too(recipe, mine, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    done = call("check", recipe, "--plugin-file", mine)
    assert done.code == 2 and variable in done.err
    assert not any("my_vq" in name for name in sys.modules)


def test_classes_are_available_inside_the_block_alone():
    class Own(Plugin):
        @hookimpl
        def report(self):
            return {"own": 1.0}

    with also(classes={"own": Own}):
        assert find("own").load() is Own and make_plugin("own", {}).report() == {"own": 1.0} and "own" not in refused()
    with pytest.raises(UserError, match="no installed plugin is called 'own'"):
        find("own")


# ---- companions


class Needy(Plugin):
    """Needy: a loss that needs its own search."""

    def companions(self):
        return {"embedding_loss": ("quantize",)}

    @hookimpl
    def quantize(self, latents, codebook):
        raise NotImplementedError

    @hookimpl
    def embedding_loss(self, latents):
        return {}


@pytest.mark.parametrize("hooks, told", [
    ({"quantize": ["vq"]}, "hooks.embedding_loss: embedding_loss of needy needs quantize of needy, which vq serves here"),
    ({"quantize": ["vq"], "embedding_loss": ["vq"]}, None),
    ({"embedding_loss": ["vq"]}, None),
    ({}, None),
])
def test_a_hook_is_refused_without_the_one_that_it_needs(hooks, told, small_photos, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("ROOT", str(small_photos)).replace("nsvq: {}", "needy: {}").partition("stages:")[0])
    with also(classes={"needy": Needy}):
        recipe = load_recipe(str(path))
        recipe.hooks = hooks
        tokenizer = Tokenizer.from_recipe(recipe)
        if told:
            with pytest.raises(UserError, match=told):
                tokenizer.wire(hooks, {})
        else:
            tokenizer.wire(hooks, {})


# ---- a codebook's own space


def test_hooks_see_the_codebooks_space_and_networks_their_own(small_photos, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("ROOT", str(small_photos)).replace("nsvq: {}", "narrow: {}").partition("stages:")[0])
    with also(classes={"narrow": Narrow}):
        tokenizer = Tokenizer.from_recipe(load_recipe(str(path)))
        tokenizer.wire({}, {})
        images = torch.rand(2, 3, 32, 32) * 2 - 1
        output = tokenizer.train()(images)
        assert output.latents.shape == output.codes.shape == (2, 64, 3) and output.reconstructions.shape == images.shape
        assert tokenizer.encoder.width == tokenizer.codebook.encoder_width == 8
        output.reconstructions.sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (tokenizer.codebook.enter.weight,
                                                                           tokenizer.codebook.leave.weight))
        indices = tokenizer.encode(images)
        assert torch.equal(tokenizer.decode(indices), tokenizer.eval()(images).reconstructions)
        tokenizer.save_pretrained(tmp_path / "kept")
        assert torch.equal(Tokenizer.from_pretrained(tmp_path / "kept").encode(images), indices)


class Narrow(Plugin):
    """Narrow: three dimensions between two linear maps."""

    @hookimpl
    def make_codebook(self, size, width):
        return NarrowBook(size, width)


class NarrowBook(Table):
    def __init__(self, size, width):
        super().__init__(size, 3, "normal")
        self.encoder_width = self.decoder_width = width
        self.enter, self.leave = torch.nn.Linear(width, 3), torch.nn.Linear(3, width)

    def from_encoder(self, features):
        return self.enter(features)

    def to_decoder(self, codes):
        return self.leave(codes)


@pytest.mark.parametrize("method, answer, told", [
    ("from_encoder", lambda x: x[..., 0], "returned from_encoder"),
    ("from_encoder", lambda x: x * torch.nan, "returned from_encoder with NaN"),
    ("to_decoder", lambda x: x, r"returned to_decoder \[1, 64, 3\] where \[1, 64, 8\] is expected"),
    ("to_decoder", lambda x: None, "returned None as to_decoder"),
])
def test_a_codebook_that_leads_nowhere_is_named(method, answer, told, small_photos, tmp_path, monkeypatch):
    monkeypatch.setattr(NarrowBook, method, lambda self, x: answer(x))
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("ROOT", str(small_photos)).replace("nsvq: {}", "narrow: {}").partition("stages:")[0])
    with also(classes={"narrow": Narrow}):
        done = call("check", path)
    assert done.code == 1 and "hook make_codebook, served by narrow" in done.err and re.search(told, done.err), done.err


class Marking(Plugin):
    """Marking: gives anyone's codebook a buffer."""

    @hookimpl(wrapper=True)
    def make_codebook(self):
        codebook = yield
        codebook.register_buffer("marks", torch.arange(codebook.size))
        return codebook


def test_a_wrapper_gives_anyones_codebook_a_buffer_which_is_exported(small_photos, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("ROOT", str(small_photos)).replace("nsvq: {}", "marking: {}").partition("stages:")[0])
    with also(classes={"marking": Marking}):
        tokenizer = Tokenizer.from_recipe(load_recipe(str(path)))
        tokenizer.wire({}, {})
        tokenizer.codebook.marks += 7
        tokenizer.save_pretrained(tmp_path / "kept")
        assert torch.equal(Tokenizer.from_pretrained(tmp_path / "kept").codebook.marks, torch.arange(16) + 7)


NEEDY = """
from dataclasses import dataclass

from vqzoo import Plugin, hookimpl


class Needy(Plugin):
    @dataclass
    class Config:
        root: str

    @hookimpl
    def report(self):
        return {}
"""


def test_a_field_without_a_default_is_asked_for_and_may_be_set(recipe, mine, tmp_path):
    path = tmp_path / "needy.py"
    path.write_text(NEEDY)
    given = ("--plugin-file", mine, "--plugin-file", path)
    assert "config: root='???'" in succeed("plugins", *given).out
    done = call("check", recipe, "plugins.needy={}", *given)
    assert done.code == 2 and "plugins.needy.root" in done.err
    succeed("check", recipe, "plugins.needy.root=here", *given)


def test_a_file_that_cannot_be_given_leaves_none_behind(mine, tmp_path):
    with pytest.raises(UserError, match="nowhere"), also(files=[str(mine), str(tmp_path / "nowhere.py")]):
        pass
    assert "my_vq" not in available()


def test_a_file_is_loaded_as_it_stands_whatever_bytecode_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "quick.py"
    for value in (1, 2):  # of one length, within one second
        path.write_text(f"from vqzoo import Plugin\n\n\nclass Quick(Plugin):\n    value = {value}\n")
        with also(files=[str(path)]):
            assert find("quick").load().value == value


@pytest.mark.parametrize("metadata", [None, "Metadata-Version: 2.1\n"])
def test_a_distribution_whose_metadata_are_damaged_leaves_the_others_alone(metadata, tmp_path, monkeypatch):
    info = tmp_path / "site" / "damaged-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "entry_points.txt").write_text("[vqzoo]\nfoo = textwrap\n")
    if metadata:
        (info / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert "vq" in available() and available()["foo"].place == "unknown"
