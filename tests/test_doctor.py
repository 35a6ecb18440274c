"""The doctor names what is wrong with a machine, with images and with a recipe, goes on, and leaves nothing behind."""

import io
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_data import FakeStream

from vqzoo import cli, doctor, prepare, sources, weights
from vqzoo.data import StreamDataset
from vqzoo.doctor import copies, images, installation, machine, recipe, trial
from vqzoo.errors import Interrupted
from vqzoo.trainer import Trainer

RECIPE = """
epochs: 9
ema: 0.5
data: {root: ROOT, resolution: [32, 32], batch_size: 4, eval_batch_size: 4, workers: 0}
encoder: {stride: 4, args: {width: 8, mult: [1, 2], blocks: 1, patch: 2}}
decoder: {args: {width: 8, mult: [1, 2], blocks: 1, patch: 2}}
codebook: {size: 16, width: 8}
plugins: {vq: {}, nsvq: {}, pixel: {}}
evaluate: {metrics: [psnr, usage], epochs: 3}
stages:
  - {name: joint, epochs: 2}
  - {name: refine, freeze: ["encoder.*"], hooks: {embedding_loss: [vq], refresh_codes: [], stage_transition: [], report: []}}
"""

PLUGIN = """
import torch
from vqzoo import Plugin, hookimpl

class Mine(Plugin):
    calls = 0

    @hookimpl(wrapper=True)
    def reconstruction_loss(self, progress):
        losses = yield
        BODY
        return losses
"""


@pytest.fixture
def photos(tmp_path, small_photos):
    """Sound pictures of one's own to spoil: 16 in train, 7 in val."""
    return Path(shutil.copytree(small_photos, tmp_path / "photos"))


@pytest.fixture
def visit(tmp_path, photos, tiny_runs, monkeypatch):
    """Call the doctor with a recipe, in an empty folder, which must be empty afterwards."""
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(doctor, "MACHINE", {})

    def call(*words, text=RECIPE):
        (tmp_path / "tiny.yaml").write_text(text.replace("ROOT", str(photos)))
        seen = consult(tmp_path / "tiny.yaml", *words)
        assert not list((tmp_path / "here").iterdir()) and not list((tmp_path / "temporary").iterdir())
        return seen

    return call


def consult(*words):
    """Call the doctor; findings are by mark, a line each."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.main(["doctor", *map(str, words)])
    text = re.sub(r"\n {9}", " ", out.getvalue())
    found = {mark: re.findall(rf"^  {mark} +(.*)$", text, re.M) for mark in ("ok", "note", "WRONG")}
    return SimpleNamespace(code=code, out=text, err=err.getvalue(), **found)


def plugin_file(folder, body):
    (folder / "mine.py").write_text(PLUGIN.replace("BODY", body))
    return "--plugin-file", folder / "mine.py", "plugins.mine={}"


def only(findings, *fragments):
    """Return the one finding that has the fragments."""
    (found,) = [line for line in findings if all(str(fragment) in line for fragment in fragments)]
    return found


# ---- the machine


def test_without_a_recipe_the_machine_the_plugins_the_weights_and_the_environment_are_described(monkeypatch, tmp_path):
    monkeypatch.setenv("VQZOO_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(machine, "check_compiler", lambda device: None)
    seen = consult()
    assert seen.code == 0 and "nothing is wrong" in seen.out
    only(seen.ok, f"torch {torch.__version__.partition('+')[0]}", "timm", "pluggy", "omegaconf", "vqzoo")
    only(seen.ok, "cores", "threads of torch", "GiB of memory")
    only(seen.ok, "disk:", "GiB free")
    only(seen.ok, "of vqzoo", "vq", "simvq", "nsvq")
    only(seen.note, "not in", tmp_path, *weights.SOURCES, "vqzoo weights fetch")
    only(seen.ok, f"VQZOO_WEIGHTS={tmp_path}")


def test_a_compiler_that_does_not_work_is_a_note(monkeypatch):
    def broken(function):
        raise RuntimeError("no compiler is found")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(doctor, "MACHINE", {"machine": machine._compiler})
    seen = consult()
    assert seen.code == 0 and only(seen.note, "compile:", "no compiler is found", "compile=false")


def test_an_examination_that_fails_does_not_keep_the_others(monkeypatch):
    monkeypatch.setattr(doctor, "MACHINE", {"one": lambda found: 1 / 0, "two": lambda found: found.ok("fine")})
    seen = consult()
    assert seen.code == 1 and "ZeroDivisionError" in only(seen.WRONG, "one") and seen.ok == ["fine"]
    assert "1 problem, 0 notes" in seen.out


def test_packages_that_are_out_of_date_or_missing_are_wrong(monkeypatch):
    found = {"timm": "0.9.1"}

    def version(name):
        if name == "pluggy":
            raise machine.PackageNotFoundError(name)
        return found.get(name, "99.0")

    monkeypatch.setattr(machine, "version", version)
    monkeypatch.setattr(doctor, "MACHINE", {"machine": machine._versions})
    seen = consult()
    assert seen.code == 1 and len(seen.WRONG) == 2
    only(seen.WRONG, "timm 0.9.1 is out of date", "timm>=", "pip install")
    only(seen.WRONG, "pluggy is not installed", "pip install")


@pytest.mark.parametrize("content, fragments", [
    ("import a_module_that_nobody_has", ["a_module_that_nobody_has", "not installed"]),
    ("from vqzoo import Plugin\nclass Mine(Plugin):\n    contract = '9.0'", ["contract", "9.0", "upgrade vqzoo"]),
    ("from vqzoo import Plugin\nclass Mine(Plugin):\n    def quantize(self): pass", ["quantize", "@hookimpl"]),
])
def test_a_plugin_that_cannot_be_used_is_wrong_and_the_others_are_listed(content, fragments, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(content)
    monkeypatch.setattr(doctor, "MACHINE", {"plugins": installation.examine_plugins})
    seen = consult("--plugin-file", tmp_path / "mine.py")
    assert seen.code == 1
    only(seen.WRONG, "mine", *fragments, sources.DENY)
    only(seen.ok, "vq", "simvq")


def test_a_plugin_that_the_environment_excludes_is_a_note_and_a_name_that_two_have_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "simvq.py").write_text("")
    monkeypatch.setattr(doctor, "MACHINE", {"plugins": installation.examine_plugins})
    monkeypatch.setenv(sources.DENY, "gan")
    seen = consult("--plugin-file", tmp_path / "simvq.py")
    assert seen.code == 1 and len(seen.WRONG) == 1
    only(seen.WRONG, "'simvq'", "several have this name")
    only(seen.note, "'gan'", sources.DENY)


def test_a_torn_file_of_weights_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("VQZOO_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(doctor, "MACHINE", {"weights": installation.examine_weights})
    weights.SOURCES["alexnet"].file.write_bytes(b"torn")
    seen = consult()
    assert seen.code == 1
    only(seen.WRONG, "alexnet", "4 bytes", "delete it", "vqzoo weights fetch alexnet")


def test_every_variable_that_is_read_is_known_and_one_that_nobody_reads_is_a_note(monkeypatch):
    root = Path(cli.__file__).parent
    read = {name for path in root.rglob("*.py") for name in re.findall(r"\bVQZOO_[A-Z_]+", path.read_text())}
    assert read <= set(installation.VARIABLES)
    monkeypatch.setenv("VQZOO_OFLINE", "1")
    monkeypatch.setattr(doctor, "MACHINE", {"environment": installation.examine_environment})
    seen = consult()
    only(seen.note, "VQZOO_OFLINE=1", "VQZOO_OFFLINE")


def test_a_gpu_that_torch_cannot_use_is_wrong_unless_it_is_hidden(monkeypatch):
    exists = Path.exists
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidiactl" or exists(path))
    monkeypatch.setattr(doctor, "MACHINE", {"machine": machine._devices})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = consult()
    assert seen.code == 1 and only(seen.WRONG, "NVIDIA GPU", "driver")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert consult().code == 0


def test_the_configuration_of_accelerate_is_told(monkeypatch, tmp_path):
    file = tmp_path / "default_config.yaml"
    file.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nmixed_precision: bf16\nnum_processes: 3\n"
                    "use_cpu: true\n")
    monkeypatch.setattr(installation, "default_config_file", str(file))
    monkeypatch.setattr(doctor, "MACHINE", {"processes": installation.examine_processes})
    seen = consult()
    only(seen.ok, "would start 3", file)
    only(seen.note, "bf16", "recipe's precision")


# ---- mistakes


@pytest.mark.parametrize("words, fragment", [
    (["quickstrat"], "did you mean 'quickstart'?"), (["quickstart", "sede=1"], "did you mean 'seed'?"),
])
def test_a_mistake_of_the_user_ends_with_2_before_anything_is_examined(words, fragment, monkeypatch):
    monkeypatch.setattr(doctor, "MACHINE", {"machine": lambda found: found.wrong("never")})
    seen = consult(*words)
    assert seen.code == 2 and fragment in seen.err and not seen.out


def test_one_of_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = consult()
    assert seen.code == 2 and "WORLD_SIZE=2" in seen.err


# ---- a recipe


def test_a_sound_recipe_is_tried_in_every_stage_and_leaves_nothing(visit):
    seen = visit()
    assert seen.code == 0 and not seen.WRONG, seen.out
    only(seen.ok, "vqzoo check")
    only(seen.ok, "train: 16 images", "all decoded", "16 PNG RGB")
    only(seen.ok, "val: 7 images")
    only(seen.ok, "val: ", "from 40x40")
    only(seen.ok, "no two images are the same")
    only(seen.ok, "training images per second")
    only(seen.ok, "2 steps of each stage train", "joint", "refine", "MiB")
    only(seen.ok, "9 epochs of 4 steps", "roughly")


def test_a_dry_run_sees_two_steps_of_each_stage_and_evaluates_a_batch(visit, monkeypatch):
    steps, measured = [], []
    step, evaluate = Trainer._step, trial.eval_batches
    monkeypatch.setattr(Trainer, "_step", lambda self, *words: (steps.append(self.stage), step(self, *words))[1])
    monkeypatch.setattr(trial, "eval_batches", lambda *words, **how: (measured.append(how), evaluate(*words, **how))[1])
    monkeypatch.setattr(Trainer, "_evaluate", None)
    monkeypatch.setattr(Trainer, "_save", None)
    assert visit().code == 0
    assert steps == ["joint", "joint", "refine", "refine"] and measured == [{"limit": 4}]


def test_the_whole_recipe_is_reckoned_from_the_seconds_of_each_stage():
    marks = [("a", 0, 0.0), ("a", 1, 50.0), ("a", 2, 52.0), ("b", 1, 90.0), ("b", 2, 95.0)]
    assert trial._seconds(marks) == {"a": 2.0, "b": 5.0}


def test_the_time_of_the_whole_is_that_of_its_steps_and_evaluations(visit, monkeypatch):
    """2 epochs of 4 steps of 1 s, 7 of 4 steps of 2 s; 7 images every third epoch and at the end, 0.1 s each."""
    monkeypatch.setattr(trial, "_timed", lambda recipe, folder: trial.Speed({"joint": 1.0, "refine": 2.0}, 0.1, 100.0))
    assert only(visit().ok, "roughly 67 s here, 2.80 s of it to evaluate")


def test_a_slow_machine_ends_the_dry_run_after_a_stage(visit, monkeypatch):
    monkeypatch.setattr(trial, "STEP_SECONDS", -1.0)
    seen = visit()
    assert seen.code == 0
    only(seen.note, "stages refine were not tried")
    only(seen.ok, "2 steps of each stage", "joint")


def test_a_loss_that_is_not_finite_is_wrong_with_the_way_out(visit, tmp_path):
    body = "if progress.step == 1: losses[0]['l1'] = losses[0]['l1'] * torch.nan"
    seen = visit(*plugin_file(tmp_path, body))
    assert seen.code == 1 and len(seen.WRONG) == 1
    only(seen.WRONG, "step 1", "'l1'", "not finite", "optim.lr", "optim.clip")


def test_a_run_that_would_skip_bad_updates_is_wrong_all_the_same(visit, tmp_path):
    body = "losses[0]['l1'] = losses[0]['l1'] * torch.nan"
    assert only(visit(*plugin_file(tmp_path, body), "guard.policy=skip").WRONG, "not finite")


def test_a_plugin_that_raises_in_a_step_is_named(visit, tmp_path):
    seen = visit(*plugin_file(tmp_path, "if progress.step == 1: raise RuntimeError('at odds')"))
    assert seen.code == 1
    only(seen.WRONG, "dry run: ", "mine", "reconstruction_loss", "at odds")


def test_a_parameter_without_a_gradient_is_a_note(visit):
    seen = visit("plugins.continuous={}", "plugins.nsvq=null")
    assert seen.code == 0
    only(seen.note, "stage joint: no gradient reaches codebook.weight")


def test_what_check_refuses_is_wrong_and_the_images_are_looked_at_all_the_same(visit, photos):
    (photos / "train" / "00.png").write_text("no picture")
    seen = visit("encoder.stride=5")
    assert seen.code == 1
    only(seen.WRONG, "recipe: encoder.stride", "32x32")
    only(seen.WRONG, "train: 1 of 16", "00.png")
    only(seen.note, "no step can be tried before that is mended")


def test_a_missing_folder_is_told_once(visit):
    seen = visit("data.root=nowhere")
    assert seen.code == 1 and len(seen.WRONG) == 1
    only(seen.WRONG, "data.root: nowhere is not a folder")
    only(seen.ok, "its networks and plugins fit together")
    only(seen.ok, "GiB predicted")
    only(seen.note, "no step can be tried before that is mended")


def test_metrics_without_their_weights_are_wrong_and_the_rest_is_tried(visit, tmp_path, monkeypatch):
    monkeypatch.setenv("VQZOO_WEIGHTS", str(tmp_path / "weights"))
    seen = visit("evaluate.metrics=[psnr,lpips_alex]")
    assert seen.code == 1 and len(seen.WRONG) == 1
    only(seen.WRONG, "lpips_alex will be missing", "vqzoo weights fetch alexnet")
    only(seen.ok, "2 steps of each stage")


def test_a_loss_without_its_weights_is_wrong(visit, tmp_path, monkeypatch):
    monkeypatch.setenv("VQZOO_WEIGHTS", str(tmp_path / "weights"))
    seen = visit("plugins.lpips={}")
    assert seen.code == 1
    only(seen.WRONG, "recipe: ", "vgg16", "vqzoo weights fetch vgg16")


def test_too_little_memory_and_too_little_room_are_wrong_with_what_to_turn(visit, monkeypatch):
    usage = shutil.disk_usage
    monkeypatch.setattr(recipe, "memory_free", lambda: 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    seen = visit()
    assert seen.code == 1
    only(seen.WRONG, "out of memory", "are predicted", "accumulate=2")
    only(seen.WRONG, "4 checkpoints", "checkpoint.keep")


def test_memory_that_runs_short_in_the_dry_run_is_wrong(visit, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Trainer, "_step", exhausted)
    seen = visit()
    assert seen.code == 1
    only(seen.WRONG, "dry run: ", "out of memory", "data.batch_size")


def test_a_signal_ends_the_examination(visit, monkeypatch):
    def stopped(*_):
        raise Interrupted("SIGINT", 2)

    monkeypatch.setattr(Trainer, "_step", stopped)
    seen = visit()
    assert seen.code == 130 and "interrupted by a signal; of a dry run nothing is kept" in seen.err


# ---- images


def test_files_that_do_not_decode_are_named(visit, photos):
    (photos / "train" / "00.png").write_text("no picture")
    whole = (photos / "val" / "01.png").read_bytes()
    (photos / "val" / "01.png").write_bytes(whole[: len(whole) // 2])
    seen = visit()
    assert seen.code == 1 and len(seen.WRONG) == 2
    only(seen.WRONG, "train: 1 of 16", "00.png", "data.bad_files=100")
    only(seen.WRONG, "val: 1 of 7", "01.png", "truncated")


def test_an_image_in_both_splits_is_wrong_and_a_copy_within_one_is_a_note(visit, photos):
    shutil.copy(photos / "train" / "03.png", photos / "val" / "leaked.png")
    shutil.copy(photos / "train" / "05.png", photos / "train" / "again.png")
    seen = visit()
    assert seen.code == 1 and len(seen.WRONG) == 1
    only(seen.WRONG, "1 images are in train and in val", "train/03.png = val/leaked.png")
    only(seen.note, "train: 1 images are there more than once", "train/05.png = train/again.png")


def test_files_of_one_size_and_another_content_are_no_copies(visit, photos):
    for number in range(2):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(photos / "train" / f"flat{number}.bmp")
    assert only(visit().ok, "no two images are the same")


def test_images_that_are_enlarged_are_a_note(visit, photos):
    Image.new("RGB", (64, 20), "teal").save(photos / "train" / "low.png")
    Image.new("RGB", (32, 32), "navy").save(photos / "val" / "exact.png")
    seen = visit()
    assert seen.code == 0
    only(seen.note, "train: 1 of 17 images are smaller than 32x32")
    assert not [line for line in seen.note if line.startswith("val")]
    assert only(visit("data.resize=48").note, "train: 17 of 17", "shorter side of 48")


def test_too_few_images_for_a_batch_or_for_the_codes_are_notes(visit, photos):
    seen = visit("data.batch_size=32", "codebook.size=2000")
    assert seen.code == 0
    only(seen.note, "16 images are less than one batch")
    only(seen.note, "1,024 tokens for 2,000 codes")


def test_of_many_images_a_sample_is_decoded_and_that_is_said(visit, photos, monkeypatch):
    (photos / "train" / "15.png").write_text("no picture")
    monkeypatch.setattr(images, "MOST_DECODED", 8)
    seen = visit()
    assert seen.code == 0  # 15.png is not among 0, 2, 4, ...
    only(seen.ok, "train: 16 images, of which 8 at even distances were decoded")
    only(seen.ok, "val: 7 images, all decoded")


def test_looking_at_images_ends_when_its_time_is_over(visit, monkeypatch):
    monkeypatch.setattr(images, "SCAN_SECONDS", -1.0)
    monkeypatch.setattr(copies, "HASH_SECONDS", -1.0)
    seen = visit()
    assert seen.code == 0
    only(seen.ok, "train: 16 images", "the first 0 of 16")
    only(seen.note, "23 files were not compared")


def test_slow_images_are_a_note(visit, monkeypatch):
    monkeypatch.setattr(images, "_reading_speed", lambda recipe, dataset: 0.5)
    assert only(visit().note, "reading gives 0", "data.workers")


def test_the_built_in_photos_are_looked_at(visit):
    seen = visit("data.name=photos", "data.root=null")
    assert seen.code == 0
    only(seen.ok, "train:", "images, all decoded")
    only(seen.ok, "no two of the images looked at are the same")


def test_the_images_of_a_plugin_are_looked_at(visit, tmp_path):
    (tmp_path / "mine.py").write_text("""
from PIL import Image
from vqzoo import Plugin, hookimpl

class Mine(Plugin):
    @hookimpl
    def make_dataset(self, split):
        pictures = [Image.new("RGB", (32, 32), (number, 0, 0)) for number in range(5)]
        return pictures + ["nowhere.png"] + [pictures[1]] * (split == "val")
""")
    seen = visit("--plugin-file", tmp_path / "mine.py", "data.name=mine", "data.root=null")
    assert seen.code == 1
    only(seen.WRONG, "train: 1 of 6", "mine/train[5]", "FileNotFoundError")
    only(seen.WRONG, "val: 1 of 7")
    only(seen.WRONG, "5 images are in train and in val", "train/mine/train[0] = val/mine/val[0]")


def test_a_stream_is_tried_and_what_was_not_looked_at_is_said(visit, monkeypatch):
    def stream(config, split):
        return StreamDataset(FakeStream(12), f"wds/fake/{split}", config)

    for module in (images, prepare):
        monkeypatch.setattr(module, "make_dataset", stream)
    seen = visit("epoch_steps=5")
    assert seen.code == 0, seen.out
    only(seen.note, "wds/fake/train is a stream", "nobody has looked")
    only(seen.ok, "2 steps of each stage")
    only(seen.ok, "9 epochs of 5 steps")
