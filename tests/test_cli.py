import io
import json
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vqzoo import Tokenizer, cli
from vqzoo.cli import main
from vqzoo.data import load_image, to_bytes, to_images
from vqzoo.recipe import shipped

RECIPE = """
seed: 3
epochs: 2
epoch_steps: 2
ema: 0.5
data: {root: ROOT, resolution: [32, 32], batch_size: 4, eval_batch_size: 4, workers: 0}
encoder: {stride: 4, args: {width: 8, mult: [1, 2], blocks: 1, patch: 2}}
decoder: {args: {width: 8, mult: [1, 2], blocks: 1, patch: 2}}
codebook: {size: 16, width: 8}
plugins: {vq: {}, nsvq: {}, pixel: {}}
optim: {lr: 2e-3}
log: {images: 2, drift_images: 4}
stages:
  - {name: joint, epochs: 1}
  - {name: refine, freeze: ["encoder.*"], hooks: {embedding_loss: [vq], refresh_codes: [], stage_transition: []}}
"""


def call(*words):
    """Run a command in this process; whatever would be a traceback fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse's way out
            code = stop.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def succeed(*words):
    done = call(*words)
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_photos):
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(RECIPE.replace("ROOT", str(small_photos)))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, recipe):
    """A finished run, with overrides on both sides of --out."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    done = succeed("run", recipe, "seed=5", "--out", folder, "optim.lr=1e-3", "codebook.size=24")
    return SimpleNamespace(folder=folder, out=done.out, err=done.err)


@pytest.fixture(scope="module")
def tokenizer(trained):
    return Tokenizer.from_pretrained(trained.folder)


@pytest.fixture
def pictures(tmp_path):
    """Pictures of several shapes and formats, two of one stem."""
    paths = [tmp_path / "one" / "cat.png", tmp_path / "two" / "cat.jpg", tmp_path / "dog.webp"]
    for number, (path, size) in enumerate(zip(paths, ((40, 33), (32, 64), (71, 38)), strict=True)):
        path.parent.mkdir(exist_ok=True)
        levels = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC).save(path)
    return paths


def left(folder):
    """Return every file below a folder with its time, to see whether anything was made or touched."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# run


def test_run_prints_the_table_the_paths_and_what_to_try_next(trained):
    metrics = json.loads((trained.folder / "metrics.json").read_text())["metrics"]
    rows = {name: value for name, value in re.findall(r"^  (\S.*?)  +(\S.*)$", trained.out, re.M)}
    assert rows["psnr"] == f"{metrics['psnr']:.2f} dB"
    assert rows["ssim"] == f"{metrics['ssim']:.4f}"
    assert rows["usage"] == f"{metrics['usage']:.1%}"
    assert rows["perplexity"] == f"{metrics['perplexity']:,.1f}"
    assert rows["codebook_size"] == "24" and rows["images"] == "7"
    for name, path in {"reconstructions": "reconstructions.png", "TensorBoard": "tensorboard", "tokenizer": "tokenizer",
                       "all numbers": "metrics.json"}.items():
        assert rows[name] == str(trained.folder / path) and Path(rows[name]).exists()
    for command in ("tensorboard --logdir", "vqzoo encode", "vqzoo decode", "vqzoo eval"):
        assert re.search(rf"^  {command} {trained.folder}", trained.out, re.M)
    assert "stage joint → refine" in trained.err


def test_overrides_work_before_and_after_out(trained):
    kept = yaml.safe_load((trained.folder / "recipe.yaml").read_text())
    assert (kept["seed"], kept["optim"]["lr"], kept["codebook"]["size"]) == (5, 1e-3, 24)


def test_options_may_come_first(recipe, tmp_path):
    done = call("run", "--out", tmp_path / "out", recipe, "sede=1")
    assert done.code == 2 and "sede" in done.err


def test_run_makes_a_folder_named_after_the_recipe(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    succeed("run", recipe, "epochs=1", "epoch_steps=1", "stages=[{}]")
    assert (tmp_path / "runs" / "tiny" / "metrics.json").is_file()


def test_a_run_that_blows_up_exits_with_1_and_names_the_step(recipe, tmp_path):
    done = call("run", recipe, "--out", tmp_path / "out", "optim.lr=1e30")
    assert done.code == 1
    assert re.search(r"NonFiniteError: step [1-3] .*is not finite", done.err)
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("command, target, hint", [
    ("run", "vqzoo.trainer.Trainer.run", "vqzoo: interrupted; continue with --resume auto\n"),
    ("check", "vqzoo.explain.predict_memory", "vqzoo: interrupted\n"),
])
def test_ctrl_c_ends_a_command_without_a_traceback(recipe, tmp_path, monkeypatch, request, command, target, hint):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setattr(target, lambda *_: signal.raise_signal(signal.SIGINT))
    done = call(command, recipe, *(["--out", tmp_path / "out"] if command == "run" else []))
    assert (done.code, done.err) == (130, hint)


# check


def stages_of(text):
    """Read the hooks of each stage off what check prints."""
    found = {}
    for name, body in re.findall(r"^stage (\S+): .*\n((?:  .*\n?)+)", text, re.M):
        found[name] = {line.split()[0]: line.split(maxsplit=1)[1].split(", ") for line in body.splitlines()}
    return found


def test_check_says_who_serves_each_hook_and_leaves_nothing(recipe, tmp_path, monkeypatch, small_photos):
    monkeypatch.chdir(tmp_path)
    before = left(small_photos)
    done = succeed("check", recipe, "data.resolution=[32,48]")
    hooks = stages_of(done.out)
    assert list(hooks) == ["joint", "refine"]
    assert hooks["joint"]["quantize"] == hooks["refine"]["quantize"] == ["vq"]
    assert hooks["joint"]["embedding_loss"] == ["vq", "nsvq"] and hooks["refine"]["embedding_loss"] == ["vq"]
    assert hooks["joint"]["refresh_codes"] == ["nsvq"] and hooks["refine"]["refresh_codes"] == ["–"]
    assert hooks["joint"]["make_discriminator"] == ["–"]
    assert "8x12 = 96 per image (stride 4)" in done.out and "16 codes of width 8" in done.out
    assert "16 training and 7 held-out images" in done.out and "2 epochs of 2 steps of 4 images" in done.out
    assert re.search(r"memory +\d+\.\d\d GiB weights.* \d+\.\d\d GiB activations", done.out)
    assert "frozen: encoder.*" in done.out
    assert not list(tmp_path.iterdir()) and left(small_photos) == before


@pytest.mark.parametrize("backend", ["auto", "eager", "chunked"])
def test_check_says_which_backend_works_in_how_much_memory(recipe, backend):
    done = succeed("check", recipe, f"ops.backend={backend}", "ops.precision=fast")
    name = "chunked" if backend == "auto" else backend
    assert re.search(rf"operations +of 256 latents and 16 codes.*: nearest_codes {name}, \d+ MiB; nonstationary_loss {name}, "
                     r"\d+ MiB\n +fast: .*search_disagreement", done.out)


def test_a_backend_that_cannot_work_is_refused_before_training(recipe, tmp_path):
    done = call("run", recipe, "ops.backend=triton", "--out", tmp_path / "run")
    assert done.code == 2 and "ops.backend: 'triton' cannot work on cpu" in done.err and "auto or chunked" in done.err
    assert not (tmp_path / "run").exists()


def test_check_finds_a_shipped_recipe_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(stages_of(succeed("check", "quickstart").out)) == ["joint", "warm-up", "refine"]
    assert not list(tmp_path.iterdir())


# eval


def test_eval_of_a_run_and_of_its_tokenizer_give_the_runs_own_numbers(trained, small_photos, tmp_path):
    wanted = json.loads((trained.folder / "metrics.json").read_text())["metrics"]
    for number, source in enumerate((trained.folder, trained.folder / "tokenizer")):
        file = tmp_path / "deep" / f"{number}.json"
        done = succeed("eval", source, "--data", small_photos / "val", "--json", file, "--batch-size", 3)
        found = json.loads(file.read_text())
        assert found["metrics"] == pytest.approx(wanted, abs=1e-3)
        assert f"{found['metrics']['psnr']:.2f} dB" in done.out
        assert found["card"]["resolution"] == [32, 32] and found["card"]["files_left_out"] == []


@pytest.mark.fault(29)
def test_eval_names_a_file_that_does_not_decode(trained, small_photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(small_photos / "val", folder)
    (folder / "broken.png").write_text("no picture")
    done = succeed("eval", trained.folder, "--data", folder, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["metrics"]["images"] == 7 and found["card"]["files_left_out"] == ["broken.png"]
    assert "broken.png does not decode" in done.err


# encode and decode


def through_the_forward(tokenizer, path, resolution):
    """Return the bytes [H, W, 3] that the evaluation forward gives for a file."""
    images = to_images(load_image(path, resolution)[None], torch.device("cpu"))
    with torch.no_grad():
        return to_bytes(tokenizer(images).reconstructions)[0].byte().permute(1, 2, 0).numpy()


def test_decoded_pictures_are_the_evaluation_forwards(trained, tokenizer, pictures, tmp_path):
    tokens, folder = tmp_path / "new" / "tokens.safetensors", tmp_path / "decoded"
    said = succeed("encode", trained.folder, *pictures, "--out", tokens).out
    assert all(f"{path}: 8 x 8 tokens" in said for path in pictures)
    assert {name: (tuple(x.shape), x.dtype) for name, x in load_file(tokens).items()} == dict.fromkeys(
        ("cat", "cat_", "dog"), ((8, 8), torch.int32)
    )
    said = succeed("decode", trained.folder / "tokenizer", tokens, "--out", folder).out
    for name, path in zip(("cat", "cat_", "dog"), pictures, strict=True):
        assert str(folder / f"{name}.png") in said
        decoded = np.asarray(Image.open(folder / f"{name}.png"))
        assert np.array_equal(decoded, through_the_forward(tokenizer, path, (32, 32)))
    assert len(list(folder.iterdir())) == 3


def test_whole_keeps_each_images_own_shape(trained, tokenizer, pictures, tmp_path):
    tokens, folder = tmp_path / "tokens.safetensors", tmp_path / "decoded"
    succeed("encode", trained.folder, *pictures, "--whole", "--out", tokens)
    assert [tuple(x.shape) for _, x in sorted(load_file(tokens).items())] == [(8, 10), (16, 8), (9, 17)]
    succeed("decode", trained.folder, tokens, "--out", folder)
    for name, path, size in zip(("cat", "cat_", "dog"), pictures, ((32, 40), (64, 32), (36, 68)), strict=True):
        decoded = np.asarray(Image.open(folder / f"{name}.png"))
        assert np.array_equal(decoded, through_the_forward(tokenizer, path, size))


def test_encode_gives_no_tokens_a_name_that_cannot_be_read_back(trained, pictures, tmp_path):
    tokens, folder = tmp_path / "tokens.safetensors", tmp_path / "decoded"
    names = ["__metadata__.png", "...png", "..png", ".png"]
    for name in names:
        shutil.copy(pictures[0], tmp_path / name)
    succeed("encode", trained.folder, *(tmp_path / name for name in names), "--out", tokens)
    assert len(load_file(tokens)) == 4 and "__metadata___" in load_file(tokens)
    succeed("decode", trained.folder, tokens, "--out", folder)
    assert len(list(folder.iterdir())) == 4


# plugins


def test_plugins_lists_what_is_installed():
    found = {plugin["name"]: plugin for plugin in json.loads(succeed("plugins", "--json").out)}
    assert {"vq", "simvq", "nsvq", "kmeans", "pixel"} <= set(found)
    assert found["vq"]["distribution"] == "vqzoo" and found["vq"]["version"]
    assert found["vq"]["hooks"]["quantize"] == "yields" and found["simvq"]["hooks"]["quantize"] == "provides"
    assert found["nsvq"]["hooks"]["embedding_loss"] == "wraps"
    assert found["kmeans"]["config"] == {"latents_per_code": 32, "iterations": 10, "stage": None}
    text = succeed("plugins").out
    for plugin in found.values():
        assert re.search(rf"^{plugin['name']}  \({plugin['distribution']} ", text, re.M)
        assert plugin["summary"] and plugin["summary"] in text
        assert all(f"{hook} (" in text for hook in plugin["hooks"])


@pytest.fixture
def stranger(tmp_path_factory, monkeypatch):
    """Install a third party's distribution with one plugin that rivals vq, and one that cannot be imported."""
    site = tmp_path_factory.mktemp("site")
    info = site / "vqzoo_rival-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vqzoo-rival\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[vqzoo]\nrival = rival_plugin:Rival\nbroken = rival_plugin_broken\n")
    (site / "rival_plugin_broken.py").write_text("import a_module_that_nobody_has\n")
    (site / "rival_plugin.py").write_text(
        "from vqzoo import Plugin, hookimpl\n\n\nclass Rival(Plugin):\n    '''Another way to quantize.'''\n\n"
        "    @hookimpl\n    def quantize(self, latents, codebook):\n        return None\n"
    )
    monkeypatch.syspath_prepend(site)


@pytest.mark.fault(34)
def test_plugins_shows_strangers_and_survives_a_broken_one(stranger):
    found = {plugin["name"]: plugin for plugin in json.loads(succeed("plugins", "--json").out)}
    assert found["rival"] == {"name": "rival", "distribution": "vqzoo-rival", "version": "0.3", "config": {}, "problem": None,
                              "summary": "Another way to quantize.", "hooks": {"quantize": "provides"}, "contract": "1.0"}
    assert "a_module_that_nobody_has" in found["broken"]["problem"] and found["vq"]["hooks"] and not found["vq"]["problem"]
    listed = succeed("plugins").out
    assert "broken  (cannot be used)\n  plugin 'broken' (vqzoo-rival 0.3) needs the module" in listed and "\nvq  (" in listed


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "vqzoo", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("run", "check", "eval", "encode", "decode", "plugins"))
    assert done.stderr == ""


# A user's mistakes


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Expect a command to be refused with a message of these fragments, and nothing to be made or touched by it."""
    monkeypatch.chdir(tmp_path)

    def refuse(words, *fragments):
        before = left(tmp_path)
        done = call(*words)
        assert done.code == 2, done.err
        assert "Traceback" not in done.err and done.err.startswith(("vqzoo: ", "usage: "))
        for fragment in fragments:
            assert str(fragment) in done.err
        assert left(tmp_path) == before

    return refuse


@pytest.fixture(params=["run", "check"])
def command(request):
    """The two commands that must find the same mistakes in a recipe."""
    return request.param


@pytest.mark.fault(30, 32, 33)
@pytest.mark.parametrize("overrides, fragments", [
    (["optm.lr=1"], ["tiny.yaml: optm: unknown key", "did you mean 'optim'?"]),
    (["stages[1].frezze=[]"], ["stages[1].frezze", "did you mean 'freeze'?"]),
    (["plugins.vq.codebook_wieght=1"], ["plugins.vq.codebook_wieght", "did you mean 'codebook_weight'?"]),
    (["epochs=many"], ["tiny.yaml: epochs: ", "many"]),
    (["data.resolution=32"], ["data.resolution: 32 where a list"]),
    (["plugins.simqv={}"], ["plugins.simqv", "did you mean 'simvq'?", "nsvq"]),
    (["hooks.quantise=[vq]"], ["hooks.quantise", "did you mean 'quantize'?"]),
    (["stages[1].hooks.embeding_loss=[vq]"], ["stages[1].hooks.embeding_loss", "did you mean 'embedding_loss'?"]),
    (["hooks.quantize=[simvq]"], ["hooks.quantize", "'simvq' is not among this recipe's plugins", "vq"]),
    (["hooks.quantize=[pixel]"], ["hooks.quantize", "'pixel' does not offer quantize", "vq"]),
    (["hooks.reconstruction_loss=[]"], ["hooks.reconstruction_loss: nobody serves", "pixel"]),
    (["hooks.make_codebook=[]"], ["hooks.make_codebook: nobody serves", "vq"]),
    (["seed=${seed}"], ["seed: ", "ecursive"]),
    (["fast"], ["'fast' is not an override", "key=value"]),
    (["stages[9].epochs=1"], ["stages[9].epochs=1"]),
    (["data.root=nowhere"], ["data.root: nowhere is not a folder"]),
    (["data.root=null"], ["data.root: not set"]),
    (["data.val=valid"], ["data.val: no folder 'valid'", "train, val"]),
    (["data.name=fotos"], ["data.name: 'fotos'", "did you mean 'photos'?"]),
    (["data.resolution=[30,32]"], ["encoder.stride: an image of 30x32", "stride 4", "32x32"]),
    (["encoder.stride=5"], ["encoder.stride", "32x32", "5"]),
    (["encoder.name=resnet1"], ["encoder.name", "'resnet1'", "resnet18"]),
    (["encoder.args.widht=8"], ["encoder.args", "widht"]),
    (["decoder.name=convv"], ["decoder.name: 'convv'", "did you mean 'conv'?"]),
    (["decoder.args.mult=[1]"], ["decoder.args", "stride is 4"]),
    (["stages[1].freeze=['encodr.*']"], ["freeze: 'encodr.*'", "did you mean 'encoder.*'?"]),
    (["stages[0].freeze=['codebook.*']"], ["codebook is to be frozen", "nsvq", "refresh_codes"]),
    (["stages[0].freeze=['*']", "hooks.refresh_codes=[]"], ["stages[0].freeze: nothing is left to train"]),
    (["optim.scale={'encodr.*': 5}"], ["optim.scale: 'encodr.*'", "did you mean 'encoder.*'?"]),
    (["accumulate=3"], ["data.batch_size: 4", "3 accumulated"]),
    (["init_from=nowhere"], ["nowhere", "neither an exported tokenizer"]),
    (["hooks.embedding_loss=[]"], ["stage_transition: nsvq watches the loss 'commitment'"]),
])
def test_a_mistake_in_a_recipe_is_told_before_anything_is_made(refused, command, recipe, overrides, fragments):
    refused([command, recipe, *overrides], *fragments)


@pytest.mark.fault(34)
def test_two_rivals_for_a_hook_are_told_and_naming_one_helps(refused, command, recipe, stranger):
    refused([command, recipe, "plugins.simvq={}", "plugins.rival={}"], "hooks.quantize: simvq and rival", "name one here")
    assert stages_of(succeed("check", recipe, "plugins.simvq={}", "plugins.rival={}", "hooks.quantize=[simvq]").out)


def test_a_hook_that_no_plugin_serves_is_told_with_those_that_would(refused, command, tmp_path):
    (tmp_path / "bare.yaml").write_text("data: {name: photos}\nplugins: {pixel: {}}\n")
    refused([command, "bare.yaml"], "hooks.make_codebook: nobody serves", "add one of these plugins", "simvq", "vq")


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on a GPU")
def test_a_precision_that_the_machine_lacks_is_told(refused, command, recipe):
    refused([command, recipe, "precision=fp16"], "precision: 'fp16' needs a GPU", "bf16")


@pytest.mark.fault(34)
def test_a_plugin_that_cannot_be_imported_is_told(refused, command, recipe, stranger):
    refused([command, recipe, "plugins.broken={}"], "'broken' (vqzoo-rival 0.3)", "a_module_that_nobody_has")


@pytest.mark.fault(33)
@pytest.mark.parametrize("text, fragments", [
    ("seed: 1\nplugins: {vq: {}\nepochs: 2\n", ["bad.yaml", "line 3"]),
    ("plugins: !!python/object/apply:os.mkdir ['canary']\n", ["bad.yaml", "python/object/apply:os.mkdir", "line 1"]),
    ("- vq\n", ["bad.yaml", "mapping"]),
])
def test_a_file_that_is_no_recipe_is_told(refused, command, tmp_path, text, fragments):
    (tmp_path / "bad.yaml").write_text(text)
    refused([command, "bad.yaml"], *fragments)


@pytest.mark.fault(33)
def test_an_unknown_recipe_is_told_with_the_shipped_ones(refused, command):
    refused([command, "quickstrat"], "'quickstrat'", "did you mean 'quickstart'?", "more",
            *(name for name in shipped() if "/" not in name))


@pytest.mark.fault(30)
def test_an_empty_folder_is_told(refused, command, recipe, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "empty" / split).mkdir(parents=True)
    refused([command, recipe, "data.root=empty"], "data.train: no images below empty/train")


def test_a_folder_that_cannot_be_written_is_told(refused, recipe):
    for out in (recipe, recipe / "below"):
        refused(["run", recipe, "--out", out], f"--out: {out} cannot be written")
    assert recipe.is_file()


def test_a_used_folder_is_refused_and_left_alone(refused, recipe, trained):
    before = left(trained.folder)
    refused(["run", recipe, "--out", trained.folder], trained.folder, "already holds a run", "--resume auto")
    refused(["run", recipe, "--out", trained.folder, "--resume", "auto"], "another recipe", "seed: 5 → 3",
            "optim.lr: 0.001 → 0.002")
    assert left(trained.folder) == before


@pytest.mark.parametrize("words", [
    ["--fast"], [], ["train", "quickstart"], ["run"], ["run", "quickstart", "--ot", "x"], ["run", "quickstart", "--json", "x"],
    ["check", "quickstart", "--out", "x"], ["eval", "x"], ["encode", "x", "y"], ["decode", "x", "y", "z", "--out", "w"],
    ["plugins", "vq"], ["plugins", "--jsn"],
])
def test_unknown_and_missing_options_are_refused(refused, words):
    refused(words, "usage: ")


# Mistakes with a tokenizer and its files


def test_what_is_no_tokenizer_is_told(refused, tmp_path, small_photos, pictures):
    (tmp_path / "folder").mkdir()
    for folder in ("folder", "nowhere", pictures[0], "a" * 300):
        for words in (["eval", folder, "--data", small_photos / "val"], ["encode", folder, pictures[0], "--out", "t"],
                      ["decode", folder, "t", "--out", "d"]):
            refused(words, folder, "neither an exported tokenizer")


@pytest.mark.fault(39)
@pytest.mark.parametrize("spoil, fragment", [
    (lambda config: "{", "config.json"),
    (lambda config: "[]", "config.json"),
    (lambda config: config.replace('"width": 8', '"width": 16', 1), "does not fit"),
    (lambda config: config.replace('"vq"', '"vqq"'), "did you mean 'vq'?"),
    (lambda config: config.replace('"resolution"', '"resolutoin"'), "resolutoin"),
])
def test_a_damaged_tokenizer_is_told(refused, trained, tmp_path, pictures, spoil, fragment):
    shutil.copytree(trained.folder / "tokenizer", tmp_path / "damaged")
    config = tmp_path / "damaged" / "config.json"
    config.write_text(spoil(config.read_text()))
    refused(["encode", "damaged", pictures[0], "--out", "tokens.safetensors"], fragment)


@pytest.mark.fault(39)
def test_truncated_weights_are_told(refused, trained, tmp_path, pictures):
    shutil.copytree(trained.folder / "tokenizer", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(["encode", "damaged", pictures[0], "--out", "tokens.safetensors"], "damaged/model.safetensors")


@pytest.mark.fault(30)
def test_a_wrong_folder_for_eval_is_told(refused, trained, tmp_path, small_photos, recipe):
    (tmp_path / "empty").mkdir()
    (tmp_path / "spoilt").mkdir()
    (tmp_path / "spoilt" / "a.png").write_text("no picture")
    for data, fragment in (("nowhere", "--data: nowhere is not a folder"), ("empty", "--data: no images below empty"),
                           ("spoilt", "a.png")):
        refused(["eval", trained.folder, "--data", data, "--json", "found.json"], fragment)
    refused(["eval", trained.folder, "--data", small_photos / "val", "--batch-size", "0"], "--batch-size: 0")
    refused(["eval", trained.folder, "--data", small_photos / "val", "--json", recipe / "found.json"], "--json: ", recipe)


@pytest.mark.fault(29)
def test_a_wrong_image_for_encode_is_told(refused, trained, tmp_path, pictures, recipe):
    (tmp_path / "broken.png").write_text("no picture")
    Image.new("RGB", (3, 40)).save(tmp_path / "thin.png")
    for path in ("broken.png", "nowhere.png", "one"):
        for more in ([], ["--whole"]):
            words = ["encode", trained.folder, pictures[0], path, "--out", "tokens.safetensors", *more]
            refused(words, f"{path}: not an image that can be read")
    refused(["encode", trained.folder, "thin.png", "--whole", "--out", "t"], "thin.png: 3x40", "4x4")
    refused(["encode", trained.folder, pictures[0], "--out", recipe / "t"], f"--out: {recipe / 't'} cannot be written")


@pytest.mark.parametrize("content, fragment", [
    (torch.full((4, 4), 24), "[0, 24), not 24"),
    (torch.full((4, 4), -1), "[0, 24), not -1"),
    (torch.ones(4, 4), "float32"),
    (torch.ones(4, dtype=torch.int32), "[B, h, w]"),
    (torch.ones(4, 4, 2, dtype=torch.int32), "codes per token"),
    (torch.ones(4, 4, 2, 2, dtype=torch.int32), "[B, h, w]"),
    (torch.ones(0, 4, dtype=torch.int32), "[1, 0, 4]"),
    (torch.ones(4, 0, dtype=torch.int32), "[1, 4, 0]"),
])
def test_wrong_tokens_are_told(refused, trained, tmp_path, content, fragment):
    save_file({"photo": content}, tmp_path / "tokens.safetensors")
    (tmp_path / "decoded").mkdir()
    refused(["decode", trained.folder, "tokens.safetensors", "--out", "decoded"], "tokens.safetensors: photo: ", fragment)


def test_tokens_of_another_tokenizer_are_told(refused, trained, tmp_path, pictures):
    tokens = tmp_path / "tokens.safetensors"
    succeed("encode", trained.folder, pictures[0], "--out", tokens)
    with safe_open(tokens, "pt") as file:
        assert file.metadata()["codebook_size"] == "24"
    save_file(load_file(tokens), tokens, {"codebook_size": "4096"})
    refused(["decode", trained.folder, tokens, "--out", "decoded"], tokens, "4096", "24")
    save_file(load_file(tokens), tokens, {"codebook_size": "24", "codebook": "0123456789abcdef"})
    refused(["decode", trained.folder, tokens, "--out", "decoded"], tokens, "another tokenizer")


@pytest.mark.parametrize("content", [b"", b"no tokens at all", (1 << 60).to_bytes(8, "little") + b"{}"])
def test_what_is_no_file_of_tokens_is_told(refused, trained, tmp_path, content):
    (tmp_path / "tokens").write_bytes(content)
    refused(["decode", trained.folder, "tokens", "--out", "decoded"], "tokens: not a file of tokens")
    refused(["decode", trained.folder, "nowhere", "--out", "decoded"], "nowhere: not a file of tokens")


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/b", "", ".", "..", "a/.."])
def test_tokens_cannot_place_a_picture_outside_the_folder(refused, trained, tmp_path, name):
    save_file({name: torch.zeros(4, 4, dtype=torch.int32)}, tmp_path / "tokens.safetensors")
    refused(["decode", trained.folder, "tokens.safetensors", "--out", "decoded"], repr(name), "tokens.safetensors")


@pytest.mark.parametrize("name", ["a" * 300, "nul\0l", "taken"])
def test_a_picture_that_cannot_be_written_is_told(refused, trained, tmp_path, name):
    (tmp_path / "decoded" / "taken.png").mkdir(parents=True)
    save_file({name: torch.zeros(4, 4, dtype=torch.int32)}, tmp_path / "tokens.safetensors")
    refused(["decode", trained.folder, "tokens.safetensors", "--out", "decoded"], "tokens.safetensors: ", repr(name),
            "cannot be written")


def test_a_folder_that_cannot_be_written_is_told_by_decode(refused, trained, tmp_path, recipe):
    save_file({"photo": torch.zeros(4, 4, dtype=torch.int32)}, tmp_path / "tokens.safetensors")
    refused(["decode", trained.folder, "tokens.safetensors", "--out", recipe / "d"], f"--out: {recipe / 'd'} cannot be written")


def test_without_out_a_run_never_lands_in_another_runs_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli._default_folder("quickstart", resume=False) == cli._default_folder("quickstart", resume=True)
    for name, following in (("quickstart", "quickstart-2"), ("quickstart-2", "quickstart-3")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "recipe.yaml").touch()
        assert cli._default_folder("quickstart", resume=False) == Path("runs") / following
        assert cli._default_folder("quickstart", resume=True) == Path("runs") / name
