"""What comes from a stranger is data: weights, tokenizers, checkpoints, recipes and pictures run no code.

A canary is a pickle, a tag, a module that leaves a folder when it is run; none may be there when a test is over.
"""

import ast
import hashlib
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from safetensors.torch import save_file

from vqzoo import Tokenizer, UserError, checkpoint, cli, sources
from vqzoo.data import DataConfig, decode, make_dataset, train_batches
from vqzoo.evaluation import reference
from vqzoo.evaluation.networks import Pooled
from vqzoo.lpips import LPIPSDistance
from vqzoo.networks import Encoder
from vqzoo.prepare import init_from
from vqzoo.recipe import CodebookConfig, DecoderConfig, EncoderConfig, load_recipe
from vqzoo.tokenizer import TokenizerConfig, make_plugin
from vqzoo.weights import SOURCES, read_weights

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"width": 8, "mult": [1, 2], "blocks": 1, "patch": 2}
RECIPE = """
data: {name: photos, resolution: [32, 32]}
encoder: {stride: 4, args: {width: 8, mult: [1, 2], blocks: 1, patch: 2}}
decoder: {args: {width: 8, mult: [1, 2], blocks: 1, patch: 2}}
codebook: {size: 16, width: 8}
plugins: {vq: {}, pixel: {}}
"""


class Canary:
    """A pickle that makes a folder as it is loaded."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)

    def pickled(self, kind):
        """Return the bytes of a file that holds the canary as state dicts of torch are held, or older ones, or none."""
        stream = io.BytesIO()
        if kind == "pickle":
            pickle.dump({"weight": self}, stream, protocol=2)  # as torch does
        elif kind == "tar":  # torch's first format, whose parts are unpacked to disk
            with tarfile.open(fileobj=stream, mode="w") as archive:
                for name in ("sys_info", "pickle", "tensors", "storages"):
                    content = pickle.dumps({"weight": self})
                    about = tarfile.TarInfo(name)
                    about.size = len(content)
                    archive.addfile(about, io.BytesIO(content))
        else:
            torch.save({"weight": self}, stream, _use_new_zipfile_serialization=kind == "zip")
        return stream.getvalue()


KINDS = ("pickle", "zip", "legacy", "tar")
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def canary(tmp_path):
    """A canary that may not sing before the test is over."""
    made = Canary(tmp_path / "canary")
    yield made
    assert not made.place.exists(), "code of a stranger ran"


SEEN: list[tuple[str, str]] | None = None
WATCHED = ("open", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.getaddrinfo", "socket.connect")


def _look(event, arguments):
    if SEEN is not None and event in WATCHED:
        SEEN.append((event, str(arguments[1] if event == "socket.connect" else arguments[0])))


@pytest.fixture(scope="module")
def auditor():
    sys.addaudithook(_look)  # for good, as audit hooks are


@pytest.fixture
def watched(auditor):
    """Note which files are opened by Python, which programs started and which machines asked, within a block."""

    @contextmanager
    def watch():
        global SEEN
        SEEN = found = []
        try:
            yield found
        finally:
            SEEN = None

    return watch


def network(encoder="vqgan_encoder", args=SMALL):
    torch.manual_seed(0)
    parts = EncoderConfig(encoder, 4, args=dict(args)), DecoderConfig("conv", dict(SMALL)), CodebookConfig(16, 8)
    return Tokenizer(TokenizerConfig([32, 32], *parts, {"vq": {}}))


@pytest.fixture
def exported(tmp_path):
    """A stranger's tokenizer folder, and a function that changes its configuration."""
    folder = tmp_path / "exported"
    network().save_pretrained(folder)

    def change(key, value):
        config = json.loads((folder / "config.json").read_text())
        *path, last = key.split(".")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
        (folder / "config.json").write_text(json.dumps(config))

    return folder, change


@pytest.fixture
def recipe(tmp_path):
    """Load a recipe of a stranger with overrides."""

    def load(*overrides, text=RECIPE):
        (tmp_path / "recipe.yaml").write_text(text)
        return load_recipe(str(tmp_path / "recipe.yaml"), list(overrides))

    return load


def call(*words):
    return cli.main([str(word) for word in words])


# The canary itself


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
def test_the_canary_sings_for_whoever_trusts_it(kind, tmp_path):
    content = Canary(tmp_path / "canary").pickled(kind)
    if kind == "pickle":
        pickle.loads(content)
    else:
        torch.load(io.BytesIO(content), weights_only=False)
    assert (tmp_path / "canary").is_dir()


def test_the_watch_sees_files_and_programs(watched, tmp_path):
    with watched() as seen:
        (tmp_path / "file").touch()
        (tmp_path / "file").read_text()
        os.system("true")
    assert ("open", str(tmp_path / "file")) in seen and "os.system" in dict(seen)


# Tokenizers


@pytest.mark.fault(14)
@every_kind
def test_weights_of_a_tokenizer_that_are_a_pickle_are_refused(kind, exported, canary):
    folder, _ = exported
    (folder / "model.safetensors").write_bytes(canary.pickled(kind))
    with pytest.raises(UserError, match=r"exported.model\.safetensors: "):
        Tokenizer.from_pretrained(folder)


@pytest.mark.fault(14)
def test_pickles_beside_the_weights_of_a_tokenizer_are_not_opened(exported, canary, watched):
    folder, _ = exported
    beside = ("pytorch_model.bin", "model.pth", "model.pt", "optimizer.bin", "random_states_0.pkl", "config.pkl")
    for name in beside:
        (folder / name).write_bytes(canary.pickled("zip"))
    with watched() as seen:
        Tokenizer.from_pretrained(folder)
    assert str(folder / "config.json") in [name for _, name in seen]
    (folder / "model.safetensors").unlink()
    with watched() as more, pytest.raises(UserError, match="neither an exported tokenizer"):
        Tokenizer.from_pretrained(folder)
    assert not [name for _, name in seen + more if Path(name).name in beside]


@pytest.mark.parametrize("key, value", [
    ("encoder.pretrained", True),
    ("encoder.pretrained", "EVIL"),
    ("encoder.args.checkpoint_path", "EVIL"),
    ("encoder.args.pretrained", True),
    ("encoder.args.pretrained_cfg", {"file": "EVIL", "custom_load": True}),
    ("encoder.args.pretrained_cfg", {"url": "http://127.0.0.1:9/evil.pth"}),
    ("encoder.args.pretrained_cfg", {"hf_hub_id": "stranger/evil"}),
    ("encoder.args.pretrained_cfg_overlay", {"file": "EVIL"}),
    ("encoder.name", "hf-hub:stranger/evil"),
    ("encoder.name", "HF_HUB:stranger/evil"),
    ("encoder.name", "local-dir:FOLDER"),
    ("encoder.name", "FOLDER/evil.pth"),
    ("encoder.args.act_layer", "os.system"),
    ("encoder.args.norm_layer", "evil.pth"),
    ("decoder.name", "os.system"),
    ("decoder.args.checkpoint_path", "EVIL"),
    ("plugins.perceptual", {"pretrained": "EVIL"}),
    ("plugins.lpips", {"weights": "EVIL"}),
    ("plugins.gan", {"network": "resnet10t", "pretrained": "EVIL"}),
    ("hooks.make_codebook", ["evil"]),
])
def test_a_strangers_configuration_opens_no_other_file_and_asks_no_machine(key, value, exported, canary, watched, tmp_path):
    folder, change = exported
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "evil.pth").write_bytes(canary.pickled("zip"))
    (strange / "config.json").write_text(json.dumps({"architecture": "resnet10t", "pretrained_cfg": {}}))
    change(key, json.loads(json.dumps(value).replace("EVIL", f"{strange}/evil.pth").replace("FOLDER", str(strange))))
    with watched() as seen:
        try:
            Tokenizer.from_pretrained(folder)
        except UserError:
            pass
    assert not [found for found in seen if found[0] != "open" or str(strange) in found[1]]


@pytest.mark.parametrize("name", ["hf-hub:stranger/evil", "local-dir:FOLDER"])
def test_a_network_in_another_place_is_told(name, exported, tmp_path):
    folder, change = exported
    change("encoder.name", name.replace("FOLDER", str(tmp_path)))
    with pytest.raises(UserError, match=r"config\.json: encoder\.name: '(hf-hub|local-dir):.*not opened"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("about, args", [
    ({"architecture": "resnet10t", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}, "model_args": {"stem_type": "deep"}}, {}),
    ({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"input_size": [3, 32, 32], "fixed_input_size": True}},
     {"depth": 1, "patch_size": 4, "embed_dim": 12}),
])
def test_an_exported_tokenizer_needs_no_other_place_though_its_recipe_named_one(about, args, tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "config.json").write_text(json.dumps(about))
    made = network(f"local-dir:{tmp_path / 'place'}", args)
    made.save_pretrained(tmp_path / "exported")
    (tmp_path / "place" / "config.json").unlink()
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(Tokenizer.from_pretrained(tmp_path / "exported")(images).reconstructions,
                       made.eval()(images).reconstructions)


@pytest.mark.parametrize("key, value, told", [
    ("codebook.size", 10**15, "codebook.size: "), ("codebook.width", 10**30, "codebook.width: "),
    ("codebook", {"size": 2**30, "width": 2**30}, "no tokenizer can be made of it"),
    ("encoder.args.width", 2**30, "encoder.args"),
])
def test_sizes_that_no_memory_holds_are_told(key, value, told, exported):
    folder, change = exported
    change(key, value)
    with pytest.raises(UserError, match=told):
        Tokenizer.from_pretrained(folder)


def test_a_configuration_nested_without_end_is_told(exported):
    folder, _ = exported
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="config.json: not a tokenizer's configuration"):
        Tokenizer.from_pretrained(folder)


# Checkpoints and runs


def manifest_of(folder, **changes):
    """Change a checkpoint's manifest as a stranger would who knows how it is made, checksums and all."""
    content = json.loads((folder / checkpoint.MANIFEST).read_text()) | changes
    del content["sha256"]
    signature = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / checkpoint.MANIFEST).write_text(json.dumps({**content, "sha256": signature}))


@pytest.fixture
def saved(tmp_path):
    manifest = {"step": 3, "recipe": {}, "state": {}, "versions": {}}
    return checkpoint.save(tmp_path / "checkpoints", {"model": {"weight": torch.zeros(2)}}, manifest, keep=1)


@pytest.mark.fault(14)
@every_kind
def test_tensors_of_a_checkpoint_that_are_a_pickle_are_refused_whatever_its_checksums_say(kind, saved, canary):
    content = canary.pickled(kind)
    (saved / "model.safetensors").write_bytes(content)
    about = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest_of(saved, files={"model.safetensors": about})
    assert checkpoint.verify(saved)["step"] == 3
    with pytest.raises(UserError, match="step_000000003: cannot be read"):
        checkpoint.load(saved)


@pytest.mark.parametrize("name", ["../outside.safetensors", "PLACE/outside.safetensors", "a/b.safetensors", "evil.pth", ".."])
def test_a_checkpoint_names_no_file_but_tensors_beside_its_manifest(name, saved, tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "outside.safetensors")
    about = {"bytes": 0, "sha256": ""}
    manifest_of(saved, files={name.replace("PLACE", str(tmp_path)): about})
    with pytest.raises(UserError, match="is not the name of a file of tensors"):
        checkpoint.load(saved)


@pytest.mark.fault(14)
def test_a_run_starts_from_no_pickle(exported, canary):
    folder, _ = exported
    (folder / "model.safetensors").write_bytes(canary.pickled("zip"))
    with pytest.raises(UserError, match=r"init_from: .*model\.safetensors"):
        init_from(network(), str(folder))


# Files of weights


@pytest.mark.fault(14)
@every_kind
def test_an_encoders_weights_that_are_a_pickle_are_refused(kind, recipe, canary, tmp_path):
    (tmp_path / "evil.pth").write_bytes(canary.pickled(kind))
    made = recipe("encoder={name: resnet10t, stride: 4}", f"encoder.pretrained={tmp_path}/evil.pth")
    with pytest.raises(UserError, match=r"encoder\.pretrained: .*evil\.pth"):
        Tokenizer.from_recipe(made)


@pytest.mark.parametrize("pretrained, args", [
    (False, {"checkpoint_path": "EVIL"}), (True, {"pretrained_cfg": {"file": "EVIL"}, "num_classes": 0}),
    (True, {"pretrained_cfg": {"file": "EVIL", "custom_load": True}}), (True, {"pretrained_cfg_overlay": {"file": "EVIL"}}),
])
def test_arguments_of_a_recipes_encoder_load_no_pickle_either(pretrained, args, canary, tmp_path):
    (tmp_path / "evil.pth").write_bytes(canary.pickled("zip"))
    args = json.loads(json.dumps(args).replace("EVIL", str(tmp_path / "evil.pth")))
    with pytest.raises(UserError, match=r"encoder\.(args|pretrained): "):
        Encoder("resnet10t", 8, 4, (32, 32), pretrained, args)


def perceptual(file):
    images = torch.zeros(1, 3, 64, 64)
    make_plugin("perceptual", {"network": "resnet10t", "pretrained": file}).reconstruction_loss(images, images)


def lpips(file):
    images = torch.zeros(1, 3, 64, 64)
    make_plugin("lpips", {"network": "squeeze", "weights": file}).reconstruction_loss(images, images)


def gan(file):
    make_plugin("gan", {"network": "resnet10t", "pretrained": file}).make_discriminator()


def pooled(file):
    Pooled("resnet10t", file, None, {}, "evaluate.fd")


@pytest.mark.fault(14)
@pytest.mark.parametrize("use", [perceptual, lpips, gan, pooled])
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_no_loss_and_no_metric_takes_a_pickle_for_weights(kind, use, canary, tmp_path):
    (tmp_path / "evil.pth").write_bytes(canary.pickled(kind))
    with pytest.raises(UserError, match=r"(plugins|evaluate)\.\w+\.(pretrained|weights): .*evil\.pth"):
        use(str(tmp_path / "evil.pth"))


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_weights_in_the_place_of_published_ones_run_no_code(kind, canary, tmp_path, monkeypatch):
    monkeypatch.setenv("VQZOO_WEIGHTS", str(tmp_path))
    SOURCES["squeezenet1_1"].file.write_bytes(canary.pickled(kind))
    with pytest.raises(UserError, match="cannot be read as"):
        LPIPSDistance("squeeze")


def test_statistics_run_no_code(canary, tmp_path):
    np.savez(tmp_path / "reference.npz", mu=np.array([canary], dtype=object), sigma=np.zeros(1))
    with pytest.raises(UserError, match="reference.npz"):
        reference.published(str(tmp_path / "reference.npz"))
    (tmp_path / "cached.safetensors").write_bytes(canary.pickled("zip"))
    assert reference.load(tmp_path / "cached.safetensors", 4, torch.device("cpu")) is None


def test_compressed_statistics_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "bomb.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 4097)))
    assert (tmp_path / "bomb.npz").stat().st_size < 100_000
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(UserError, match=r"bomb\.npz is no .npz file with mu and sigma: .*decompression bomb"):
        reference.published(str(tmp_path / "bomb.npz"))


@pytest.fixture
def bomb(tmp_path):
    """A file of weights of a few kilobytes that would unpack to 4 MB."""
    torch.save({"weight": torch.zeros(1_000_000)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as packed:
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pth").stat().st_size < 10_000
    assert read_weights(tmp_path / "plain.pth", "key")["weight"].shape == (1_000_000,)
    return tmp_path / "bomb.pth"


def test_compressed_weights_are_refused_before_they_are_unpacked(bomb, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(UserError, match=r"key: .*bomb\.pth has .* bytes and would unpack to 4,0"):
        read_weights(bomb, "key")
    with pytest.raises(UserError, match=r"encoder\.pretrained: .*bomb\.pth has .* bytes and would unpack to 4,0"):
        Encoder("resnet10t", 8, 4, (32, 32), str(bomb))


# Recipes


TAGS = ("!!python/object/apply:os.mkdir ['CANARY']", "!!python/object/new:os.mkdir ['CANARY']", "!!python/name:os.system",
        "!!python/module:os", "!!python/object:vqzoo.Plugin {}")


@pytest.mark.fault(33)
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("where", ["recipe", "base", "override"])
def test_a_python_tag_is_refused_wherever_it_stands(where, tag, recipe, canary, tmp_path, watched):
    tag = tag.replace("CANARY", str(canary.place))
    (tmp_path / "base.yaml").write_text(f"seed: {tag}\n" if where == "base" else "seed: 1\n")
    text = "extends: base.yaml\n" + RECIPE + (f"epochs: {tag}\n" if where == "recipe" else "")
    with watched() as seen, pytest.raises(UserError, match="python/"):
        recipe(*([f"epochs={tag}"] if where == "override" else []), text=text)
    assert {event for event, _ in seen} <= {"open"}


def test_a_resolver_in_what_a_recipe_extends_is_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "canary")
    (tmp_path / "base.yaml").write_text("data: {root: '${oc.env:SECRET}'}\n")
    with pytest.raises(UserError, match=r"base\.yaml: data\.root: ") as caught:
        recipe(text="extends: base.yaml\n" + RECIPE)
    assert "canary" not in str(caught.value)


def test_a_recipe_that_expands_without_end_is_refused(recipe):
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    with pytest.raises(UserError, match=r"recipe\.yaml: cannot be read as plain YAML"):
        recipe(text="\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]", *levels]))


# Plugins that are not installed


@pytest.fixture
def beside(tmp_path, monkeypatch, canary):
    """Stand in a folder with Python files that sing when they are imported."""
    folder = tmp_path / "strangers"
    song = f"import os\nos.mkdir({str(canary.place)!r})\nfrom vqzoo import Plugin\n\nclass Evil(Plugin):\n    pass\n"
    for name in ("evil.py", "vqzoo_evil/__init__.py", "plugins/evil.py", "pixel.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(song)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.fault(35)
@pytest.mark.parametrize("name", [
    "os", "evil", "evil.py", "./evil.py", "../evil", "plugins.evil", "vqzoo_evil", "vqzoo-evil", "evil:Evil", "__main__",
    "vqzoo_plugins.vq", "vqzoo_plugins", "builtin", "git+https://example.org/evil",
])
def test_a_plugin_that_is_not_installed_is_neither_imported_nor_installed(name, beside, watched, capsys):
    Path("recipe.yaml").write_text(RECIPE.replace("vq: {}", f"vq: {{}}, {name!r}: {{}}"))
    before, path = set(sys.modules), list(sys.path)
    with watched() as seen:
        assert call("check", "recipe.yaml") == 2
    told = capsys.readouterr().err
    assert f"recipe.yaml: plugins.{name}: no installed plugin is called {name!r}" in told and "pip" in told
    assert sys.path == path and not {"evil", "vqzoo_evil", "plugins.evil"} & (set(sys.modules) - before)
    assert {event for event, _ in seen} <= {"open"}


@pytest.mark.fault(35)
def test_a_tokenizer_and_a_route_import_no_plugin_either(exported, beside, recipe):
    folder, change = exported
    change("plugins.evil", {})
    with pytest.raises(UserError, match="plugins.evil: no installed plugin"):
        Tokenizer.from_pretrained(folder)
    with pytest.raises(UserError, match="hooks.make_codebook: 'evil' is not among this recipe's plugins"):
        Tokenizer.from_recipe(recipe("hooks.make_codebook=[evil]"))
    assert "evil" not in sys.modules


# Plugins that the environment lets in


@pytest.fixture
def strangers(tmp_path, monkeypatch, canary):
    """Install two distributions whose every module sings as it is imported."""
    site = tmp_path / "site"
    song = f"import os\nos.mkdir({str(canary.place)!r})\n"
    for file in ("strange/__init__.py", "strange/deep/__init__.py", "strange/deep/inner.py", "strange/one.py", "other_song.py"):
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(song)
    entries = {"VQZoo_Strange": "whole = strange\ninner = strange.deep\nclassy = strange.one:One\nplain = strange.one",
               "vqzoo-other": "other-song = other_song:Song"}
    for name, lines in entries.items():
        info = site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[vqzoo]\n{lines}\n")
    monkeypatch.syspath_prepend(site)
    for variable in (sources.ALLOW, sources.DENY):
        monkeypatch.delenv(variable, raising=False)
    yield
    assert not [name for name in sys.modules if name.partition(".")[0] in ("strange", "other_song")]


STRANGE = {"one", "deep", "inner", "classy", "plain"}
BUILT_IN = {path.stem for path in (ROOT / "plugins").glob("*.py")} - {"__init__"}


def test_finding_plugins_imports_none_and_no_package_around_one(strangers):
    found = sources.available()
    assert STRANGE | BUILT_IN | {"other-song"} <= set(found) and not sources.refused()
    assert found["inner"].module == "strange.deep.inner" and found["inner"].distribution == "VQZoo_Strange"


@pytest.mark.parametrize("allow, deny, left", [
    (None, "vqzoo-strange", BUILT_IN | {"other-song"}),
    (None, "VQZOO.STRANGE , other_song", BUILT_IN),
    (None, "vqzoo-*", BUILT_IN),
    (None, "vqzoo*", set()),
    (None, "", BUILT_IN | STRANGE | {"other-song"}),
    (None, "pixel,[a-d]*,plain", BUILT_IN - {"pixel", "continuous"} | {"one", "inner", "other-song"}),
    ("", None, set()),
    (" , ", None, set()),
    ("vqzoo", None, BUILT_IN),
    ("vq,pixel", None, {"vq", "pixel"}),
    ("vqzoo,vqzoo_strange", "classy,plain", BUILT_IN | {"one", "deep", "inner"}),
    ("*", "vqzoo-strange", BUILT_IN | {"other-song"}),
    ("pixel", "*", set()),
])
def test_the_environment_says_which_plugins_there_are(allow, deny, left, strangers, monkeypatch):
    for variable, value in ((sources.ALLOW, allow), (sources.DENY, deny)):
        if value is not None:
            monkeypatch.setenv(variable, value)
    assert set(sources.available()) == left
    everything = BUILT_IN | STRANGE | {"other-song"}
    assert set(sources.refused()) == everything - left
    for name, reason in sources.refused().items():
        variable = reason.partition("=")[0]
        assert variable in (sources.ALLOW, sources.DENY)
        with pytest.raises(UserError, match=f"plugins.{name}: {name!r} is installed, but {variable}=.* excludes it"):
            sources.find(name)


def test_deny_is_what_excludes_where_both_would(strangers, monkeypatch):
    monkeypatch.setenv(sources.ALLOW, "vqzoo")
    monkeypatch.setenv(sources.DENY, "simvq,classy")
    assert {name: sources.refused()[name].partition("=")[0] for name in ("simvq", "classy", "plain")} == {
        "simvq": sources.DENY, "classy": sources.DENY, "plain": sources.ALLOW}


@pytest.mark.parametrize("variable, value, way_out", [
    (sources.DENY, "classy", "take it off that list"), (sources.ALLOW, "vqzoo", "add its name there"),
])
def test_an_excluded_plugin_is_told_and_never_imported(variable, value, way_out, strangers, beside, monkeypatch, capsys):
    monkeypatch.setenv(sources.DENY, "one,plain,deep,inner,other-song")
    monkeypatch.setenv(variable, value if variable == sources.ALLOW else f"{os.environ[variable]},{value}")
    Path("recipe.yaml").write_text(RECIPE)
    assert call("check", "recipe.yaml", "plugins.classy={}") == 2
    told = capsys.readouterr().err
    assert f"plugins.classy: 'classy' is installed, but {variable}='" in told and way_out in told
    assert call("check", "recipe.yaml", "plugins={pixel: {}}") == 2  # asks all plugins that it may who offers a hook
    assert "vq" in capsys.readouterr().err
    assert call("plugins", "--json") == 0
    assert {plugin["name"] for plugin in json.loads(capsys.readouterr().out)} >= BUILT_IN


def test_an_excluded_plugin_does_not_clash_with_another_of_its_name(strangers, monkeypatch, tmp_path):
    info = tmp_path / "site" / "vqzoo_other-1.0.dist-info"
    (info / "entry_points.txt").write_text("[vqzoo]\nvq = other_song:Song\n")
    sources._entries.cache_clear()
    assert "vq" not in sources.available() and "simvq" in sources.available()  # the others work
    with pytest.raises(UserError, match="plugins.vq: .*several have this name.*vqzoo-other.*VQZOO_DENY_PLUGINS"):
        sources.find("vq")
    monkeypatch.setenv(sources.DENY, "vqzoo-other")
    assert sources.find("vq").distribution == "vqzoo" and sources.refused()["vq"].startswith(sources.DENY)


# Pictures


def picture_of(width, height):
    """Return a PNG of a hundred bytes that claims to have so many pixels."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 16)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [20_000, 10_000])  # Pillow refuses the one and warns of the other
def test_a_picture_that_would_fill_the_memory_is_refused_unread(side, tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(picture_of(side, side))
    assert (tmp_path / "bomb.png").stat().st_size < 100
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises((ValueError, Image.DecompressionBombError), match="decompression bomb|exceeds limit"):
        decode(tmp_path / "bomb.png")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_bomb_among_the_pictures_is_left_out_of_training(tmp_path):
    (tmp_path / "train").mkdir()
    for number in range(7):
        Image.new("RGB", (20, 20), (number * 30, 0, 0)).save(tmp_path / "train" / f"{number}.png")
    (tmp_path / "train" / "bomb.png").write_bytes(picture_of(20_000, 20_000))
    config = DataConfig(root=str(tmp_path), resolution=[16, 16], batch_size=8, workers=0)
    dataset = make_dataset(config, "train")
    batches = train_batches(config, dataset, 0)
    batch = next(batches)
    batches.close()
    assert len(batch.images) == 8 and list(batch.bad) == ["bomb.png"] == list(dataset.bad)


@pytest.fixture
def ghostscript(tmp_path, monkeypatch, canary):
    """A Ghostscript that sings when it is started."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\nmkdir {canary.place}\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


def test_postscript_that_calls_itself_a_photo_is_not_run(ghostscript, tmp_path):
    program = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\nshowpage\n%%EOF\n"
    for role in ("train", "val"):
        (tmp_path / role / "class").mkdir(parents=True)
        (tmp_path / role / "class" / "photo.png").write_text(program)
    with pytest.raises(OSError, match="Ghostscript"):
        decode(tmp_path / "train" / "class" / "photo.png")
    dataset = make_dataset(DataConfig("torch/image_folder", str(tmp_path), resolution=[16, 16], workers=0), "train")
    with pytest.raises(OSError, match="Ghostscript"):
        dataset.source.image(0)


@pytest.mark.parametrize("name, root, split, told", [
    ("wds/x", "pipe:mkdir CANARY; echo ", "train", "data.root: 'pipe:"),
    ("wds/x", "", "pipe:mkdir CANARY #.tar|5", "data.root: ''"),
    ("wds/x", None, "pipe:mkdir CANARY #.tar|5", "data.root: None"),
    ("WDS/x", "https://example.org/shards", "train", "data.root: 'https:"),
    ("tfds/stranger:evil", "FOLDER", "train", "data.name: 'tfds/stranger:evil'"),
])
def test_a_data_set_of_a_recipe_runs_no_program(name, root, split, told, canary, tmp_path, monkeypatch, watched):
    monkeypatch.setattr("vqzoo.data.importlib.util.find_spec", lambda _: True)  # as if the packages were here
    root = root and root.replace("CANARY", str(canary.place)).replace("FOLDER", str(tmp_path))
    split = split.replace("CANARY", str(canary.place))
    with watched() as seen, pytest.raises(UserError, match=told):
        make_dataset(DataConfig(name, root, train=split), "train")
    assert not seen


def test_shards_have_a_path_that_no_url_can_have(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("vqzoo.data.importlib.util.find_spec", lambda _: True)
    monkeypatch.setattr("timm.data.create_dataset", lambda name, root, *_, **__: given.append(root))
    monkeypatch.chdir(tmp_path)
    Path("pipe:mkdir canary;").mkdir()
    with pytest.raises(TypeError):  # of None, in place of a dataset
        make_dataset(DataConfig("wds/x", "pipe:mkdir canary;"), "train")
    assert given == [str(tmp_path / "pipe:mkdir canary;")]


# What the sources may not do


HOST = sorted([*(ROOT / "vqzoo").rglob("*.py"), *(ROOT / "plugins").glob("*.py")])
FORBIDDEN = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "subprocess", "tarfile", "pip", "site")
RUNNING = ("eval", "exec", "compile", "__import__")
METHODS = ("extract", "extractall", "unpack_archive", "system", "popen", "load_state_dict_from_url", "unsafe_load",
           "register_for_checkpointing")
MAY_IMPORT = {"sources.py", "__init__.py", "rank.py", "peers.py"}
"""Where modules are imported by a name that is not written there: of plugins, installed or under test, of vqzoo, of peers."""

EXCEPTIONS = {"vqzoo/sources.py": {"sys.path"}, "vqzoo/bench/workers.py": {"subprocess"}, "vqzoo/testing/doors.py": {"pickle"},
              "vqzoo/testing/processes.py": {"subprocess", "sys.path"}, "vqzoo/testing/rank.py": {"sys.path"}}
"""What reads the path, to see whether a distribution has come; suites, since they start vqzoo; and the tests of plugins, that
pickle and start what they made themselves, with the path that they have."""


@pytest.mark.parametrize("path", HOST, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_line_can_run_what_a_file_holds(path):
    tree, allowed = ast.parse(path.read_text()), EXCEPTIONS.get(str(path.relative_to(ROOT)), set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not [name for name in names if name.partition(".")[0] in set(FORBIDDEN) - allowed], names
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in {"sys.path", "torch.hub.load"} - allowed, node.lineno
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in RUNNING and called.rpartition(".")[2] not in METHODS, f"{called}, line {node.lineno}"
            assert called != "torch.load" or keywords.get("weights_only") == "True", node.lineno
            assert called != "np.load" or keywords.get("allow_pickle") == "False", node.lineno
            assert called != "importlib.import_module" or path.name in MAY_IMPORT, node.lineno
