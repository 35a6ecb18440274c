"""Checkpoints and the folder of a run: damage, full disks, strangers' files, other recipes, and who may write where."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from test_resume import Stop, at, crash
from test_training import VQ, checkpoint_at, exported, run, unequal

from vqzoo import Interrupted, StorageError, UserError, checkpoint, files, folder, sharding, sources
from vqzoo.recipe import differences, load_recipe, plain
from vqzoo.trainer import Trainer

pytestmark = pytest.mark.usefixtures("listeners")
MORE = VQ.replace("epochs: 2", "epochs: 3")


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    run(recipe(MORE), out)
    return out


@pytest.fixture
def stopped(recipe, listeners, tmp_path):
    """A run that died in step 5 of 6, with checkpoints of steps 2 and 4."""
    listeners["quantize"] = at(5, crash)
    with pytest.raises(Stop):
        run(recipe(MORE), tmp_path / "run")
    listeners.clear()
    assert steps(tmp_path / "run") == [4, 2]
    return tmp_path / "run"


def steps(out):
    return [step for step, _ in checkpoint.complete(out / "checkpoints")]


def place(out, step):
    return out / "checkpoints" / f"step_{step:09d}"


def tensors():
    return {"tokenizer": {"a": torch.arange(5.0), "b": torch.zeros(0)}, "optimizer": {}}


def manifest(step=1, **more):
    return {"step": step, "recipe": {}, "versions": {}, "state": {}, **more}


# ---- writing


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = checkpoint.save(tmp_path, tensors(), manifest(7, state={"loss": float("inf"), "text": "ü"}), keep=1)
    assert path == tmp_path / "step_000000007"
    loaded, about = checkpoint.load(path)
    assert not unequal(loaded["tokenizer"], tensors()["tokenizer"]) and loaded["optimizer"] == {}
    assert about["state"] == {"loss": float("inf"), "text": "ü"} and about == checkpoint.verify(path)
    assert {file.name for file in path.iterdir()} == {"manifest.json", "tokenizer.safetensors", "optimizer.safetensors"}


def test_the_last_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4, 5):
        checkpoint.save(tmp_path, tensors(), manifest(step), keep=2, best=2)
    assert [step for step, _ in checkpoint.complete(tmp_path)] == [5, 4, 2]
    checkpoint.save(tmp_path, tensors(), manifest(6), keep=2, best=5)
    assert [step for step, _ in checkpoint.complete(tmp_path)] == [6, 5]


def test_a_run_keeps_the_checkpoint_of_its_best_evaluation(recipe, tmp_path, monkeypatch):
    better = iter([True, False, False, False])
    monkeypatch.setattr("vqzoo.evaluation.evaluate.Evaluator.better", lambda *_: next(better))
    run(recipe(VQ, "epochs=4", "evaluate.epochs=1", "checkpoint.keep=1"), tmp_path / "run")
    assert steps(tmp_path / "run") == [8, 2]


@pytest.mark.fault(3)
def test_old_checkpoints_go_only_when_the_new_one_is_in_its_place(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, tensors(), manifest(1), keep=1)
    seen, remove = [], shutil.rmtree

    def watched(path, **how):
        if Path(path).exists():
            seen.append((Path(path).name, [step for step, _ in checkpoint.complete(tmp_path)]))
        remove(path, **how)

    monkeypatch.setattr(shutil, "rmtree", watched)
    checkpoint.save(tmp_path, tensors(), manifest(2), keep=1)
    assert seen == [(".old_step_000000001", [2])]


def test_every_file_is_flushed_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    order = []
    for module in (checkpoint, files):
        monkeypatch.setattr(module, "flush", lambda path: order.append(path.name))
    monkeypatch.setattr(Path, "rename", lambda self, to: (order.append(f"rename {Path(to).name}"), os.rename(self, to)))
    checkpoint.save(tmp_path / "c", tensors(), manifest(3), keep=1)
    assert order == ["tokenizer.safetensors", "optimizer.safetensors", ".partial_manifest.json", "rename manifest.json",
                     ".partial_step_000000003", "rename step_000000003", "c"]


def test_a_writer_holds_up_the_caller_for_the_copy_alone(tmp_path, monkeypatch):
    go, save = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: (go.wait(10), save(*arguments)))
    writer, value = checkpoint.Writer(tmp_path), torch.zeros(3)
    writer.save({"tokenizer": {"a": value}}, manifest(1), 1, None)  # returns while nothing can be written yet
    value.fill_(1)
    assert not list(checkpoint.complete(tmp_path))
    go.set()
    writer.wait()
    assert torch.equal(checkpoint.load(tmp_path / "step_000000001")[0]["tokenizer"]["a"], torch.zeros(3))


# ---- damage


@pytest.mark.fault(3)
def test_a_process_killed_while_it_writes_leaves_the_one_before(recipe, stopped, capsys):
    script = ("import os, signal, sys, torch\nfrom pathlib import Path\nfrom vqzoo import checkpoint\n"
              "checkpoint._rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
              "tensors = {'tokenizer': {'a': torch.zeros(9)}}\n"
              "about = {'step': 5, 'recipe': {}, 'versions': {}, 'state': {}}\n"
              "checkpoint.save(Path(sys.argv[1]), tensors, about, keep=1)\n")
    done = subprocess.run([sys.executable, "-c", script, str(stopped / "checkpoints")], timeout=120)
    assert done.returncode == -9
    assert (stopped / "checkpoints" / ".partial_step_000000005" / "tokenizer.safetensors").exists()
    assert steps(stopped) == [4, 2]
    run(recipe(MORE), stopped, resume="auto")
    assert ".partial_step_000000005: was never finished; it is passed over" in capsys.readouterr().err
    assert not list((stopped / "checkpoints").glob(".*"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "bit-flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "empty": lambda path: path.write_bytes(b""),
    "missing": os.remove,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.fault(6)
@pytest.mark.parametrize("file", ["optimizer.safetensors", "manifest.json"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_taken(recipe, stopped, whole, kind, file, capsys):
    path = place(stopped, 4) / file
    DAMAGE[kind](path)
    with pytest.raises(UserError, match=str(place(stopped, 4))) as caught:
        checkpoint.verify(place(stopped, 4))
    assert file in str(caught.value)
    run(recipe(MORE), stopped, resume="auto")
    said = capsys.readouterr().err
    assert str(place(stopped, 4)) in said and "passed over" in said and f"resumed from {place(stopped, 2)}" in said
    assert not unequal(exported(stopped), exported(whole)) and steps(stopped)[:2] == [6, 4]


@pytest.mark.fault(6)
def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(recipe, stopped):
    for step in (2, 4):
        flip(place(stopped, step) / "tokenizer.safetensors")
    with pytest.raises(UserError, match="holds no checkpoint that is whole(.|\n)*step_000000004(.|\n)*step_000000002"):
        Trainer(recipe(MORE), stopped, resume="auto")


@pytest.mark.fault(9)
def test_without_a_checkpoint_auto_starts_and_a_path_is_an_error(recipe, tmp_path, whole):
    assert run(recipe(MORE), tmp_path / "run", resume="auto")["run"]["step"] == 6
    for missing in ("nowhere", str(place(whole, 99)), str(whole / "tokenizer")):
        with pytest.raises(UserError, match=f"--resume: {missing} is neither a checkpoint nor a run"):
            Trainer(recipe(MORE), tmp_path / "other", resume=missing)
    assert not (tmp_path / "other").exists()


@pytest.mark.fault(10, 17)
def test_names_clocks_and_strangers_decide_nothing(recipe, stopped, whole):
    checkpoints = stopped / "checkpoints"
    place(stopped, 4).rename(checkpoints / "copy of (my best) ü")
    os.utime(place(stopped, 2), (4e9, 4e9))
    (checkpoints / "step_000000900").write_text("a file, not a folder")
    (checkpoints / "step_latest").touch()
    (checkpoints / "notes.txt").write_text("hello")
    (checkpoints / "epoch" / "manifest").mkdir(parents=True)
    job = Trainer(recipe(MORE), stopped, resume="auto")
    assert job.start.path.name == "copy of (my best) ü" and job.counters.step == 4
    job.run()
    assert not unequal(exported(stopped), exported(whole)) and (checkpoints / "notes.txt").read_text() == "hello"


@pytest.mark.fault(14)
def test_a_strangers_checkpoint_is_data_and_stays_in_its_folder(tmp_path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    path = checkpoint.save(tmp_path / "c", tensors(), manifest(1), keep=1)
    evil = pickle.dumps(Evil())
    (path / "tokenizer.safetensors").write_bytes(evil)
    about = json.loads((path / "manifest.json").read_text())
    about.pop("sha256")
    about["files"]["tokenizer.safetensors"] = {"bytes": len(evil), "sha256": checkpoint._sha256(path / "tokenizer.safetensors")}
    (path / "manifest.json").write_text(json.dumps({**about, "sha256": checkpoint._signature(about)}))
    checkpoint.verify(path)  # it is whole, as its author signed it
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(path)
    for name in ("../outside.safetensors", "/etc/hostname", "a/b.safetensors", "evil.pt"):
        forged = {**about, "files": {name: {"bytes": 1, "sha256": ""}}}
        (path / "manifest.json").write_text(json.dumps({**forged, "sha256": checkpoint._signature(forged)}))
        with pytest.raises(UserError, match="is not the name of a file of tensors"):
            checkpoint.read(path)
    assert not canary.exists()
    for text in ("[1]", "{}", "null", "{" * 5000, '{"format": 1}', '{"format": 2, "sha256": ""}'):
        (path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json"):
            checkpoint.read(path)


# ---- a disk that takes no more


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.fault(7)
def test_a_full_disk_leaves_old_checkpoints_whole_and_does_not_stop_the_run(recipe, small_disk, listeners, capsys):
    out = small_disk / "run"
    filler = small_disk / "filler"

    def fill():
        with pytest.raises(OSError, match="No space left"):
            with filler.open("wb") as file:
                while True:
                    file.write(bytes(1 << 12))

    listeners["refresh_codes"] = at(2, fill)
    job = Trainer(recipe(MORE, "checkpoint.keep=9"), out)
    evaluate = job._evaluate

    def room(*arguments):
        if job.counters.epoch == 2:
            filler.unlink()
        return evaluate(*arguments)

    job._evaluate = room
    result = job.run()
    said = capsys.readouterr().err
    assert "a checkpoint could not be written" in said and "No space left" in said and "those before it are whole" in said
    assert result["run"]["step"] == 6 and steps(out)[-1] == 2
    checkpoint.verify(place(out, 2))
    assert not [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.fault(7)
def test_a_disk_that_is_full_at_the_end_is_told_and_the_results_come_later(recipe, small_disk, whole):
    out, filler = small_disk / "run", small_disk / "filler"
    job = Trainer(recipe(MORE, "evaluate.epochs=1"), out)
    keep_best = job._keep_best

    def full(metrics):
        if job.counters.epoch == 2 and not filler.exists():
            with pytest.raises(OSError, match="No space left"), filler.open("wb") as file:
                while True:
                    file.write(bytes(1 << 12))
        keep_best(metrics)

    job._keep_best = full
    with pytest.raises(StorageError, match="the results cannot be written .*--resume auto makes them"):
        job.run()
    filler.unlink()
    run(recipe(MORE, "evaluate.epochs=1"), out, resume="auto")
    assert not unequal(exported(out), exported(whole))


@pytest.mark.fault(7)
def test_a_best_that_cannot_be_written_is_none(recipe, tmp_path, monkeypatch, capsys):
    export, failing = sharding.export, iter([True, False])

    def fail(tokenizer, folder, main):
        if folder.name == "best" and next(failing):
            raise OSError(errno.ENOSPC, "No space left on device")
        export(tokenizer, folder, main)

    monkeypatch.setattr(sharding, "export", fail)
    monkeypatch.setattr("vqzoo.evaluation.evaluate.Evaluator.better", lambda self, name, value, before: before is None)
    result = run(recipe(VQ, "evaluate.epochs=1"), tmp_path / "run")
    assert "best cannot be written: [Errno 28]" in capsys.readouterr().err
    assert result["run"]["best"]["step"] == 4 and (tmp_path / "run" / "best" / "config.json").exists()


@pytest.mark.fault(7)
def test_the_error_of_one_checkpoint_is_not_taken_for_anothers(recipe, tmp_path, monkeypatch, listeners, capsys):
    save, failing = checkpoint.save, iter([True])

    def fail(*arguments):
        if next(failing, False):
            time.sleep(0.5)  # longer than the next step takes
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", fail)
    listeners["quantize"] = at(2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        run(recipe(MORE), tmp_path / "run")
    assert steps(tmp_path / "run") == [3] and "a checkpoint could not be written" in capsys.readouterr().err


@pytest.mark.fault(3)
def test_a_process_killed_while_it_drops_an_old_checkpoint_leaves_no_damage(tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoint.save(tmp_path, tensors(), manifest(step), keep=2)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: [file.unlink() for file in Path(path).glob("manifest.json")])
    checkpoint.save(tmp_path, tensors(), manifest(3), keep=2)
    monkeypatch.undo()
    assert checkpoint.damaged(tmp_path) == {} and list(tmp_path.glob(".old_*"))
    checkpoint.save(tmp_path, tensors(), manifest(4), keep=2)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.fault(7)
def test_a_run_told_to_stop_that_cannot_save_says_so(recipe, tmp_path, monkeypatch, listeners):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    listeners["quantize"] = at(1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(StorageError, match="the last checkpoint could not be written: .*No space left"):
        run(recipe(MORE), tmp_path / "run")


@pytest.mark.fault(8)
def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(recipe, small_disk, listeners):
    if subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], capture_output=True).returncode:
        pytest.skip("needs the right to remount")
    asked = []
    listeners["refresh_codes"] = lambda **_: asked.append(1)
    with pytest.raises(UserError, match="--out: .* cannot be written: .*Read-only file system"):
        run(recipe(MORE), small_disk / "run")
    assert not asked


@pytest.mark.fault(38)
@pytest.mark.parametrize("spoil", ["a file in its place", "a broken writer", "a corrupt event file"])
def test_training_goes_on_without_tensorboard(recipe, tmp_path, monkeypatch, capsys, spoil):
    job = Trainer(recipe(VQ), tmp_path / "run")
    if spoil == "a file in its place":
        (tmp_path / "run" / "tensorboard").rmdir()
        (tmp_path / "run" / "tensorboard").write_text("")
    elif spoil == "a broken writer":
        def broken(*_, **__):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr("vqzoo.monitor.SummaryWriter.add_scalar", broken)
    else:
        (tmp_path / "run" / "tensorboard" / "events.out.tfevents.1.host").write_bytes(b"\x00garbage" * 9)
    assert job.run()["run"]["finished"]
    said = capsys.readouterr().err.count("TensorBoard: ")
    assert said == (0 if spoil == "a corrupt event file" else 1)


# ---- other recipes, plugins, images


@pytest.mark.fault(12)
@pytest.mark.parametrize("change", ["codebook.size=16", "codebook.width=4", "optim.lr=1", "epochs=1", "seed=1",
                                    "plugins={simvq: {}, pixel: {}, probe: {}}"])
def test_another_recipe_is_refused_field_by_field(recipe, stopped, change):
    with pytest.raises(UserError, match="was begun with another recipe") as caught:
        Trainer(recipe(MORE, change), stopped, resume="auto")
    key = change.partition("=")[0]
    assert any(line.startswith(f"  {key}") and "→" in line for line in str(caught.value).splitlines())
    assert "--insist" in str(caught.value)


@pytest.mark.fault(12)
def test_harmless_changes_are_taken_and_said(recipe, stopped, capsys, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(recipe(MORE).data.root, moved)
    changes = ["epochs=5", "log.steps=1", "checkpoint.keep=1", "accumulate=2", "guard.policy=skip"]
    result = run(recipe(MORE, f"data.root={moved}", *changes), stopped, resume="auto")
    said = capsys.readouterr().err
    assert result["run"]["step"] == 10
    for line in ("epochs: 3 → 5", "log.steps: 100 → 1", "accumulate: 1 → 2"):
        assert f"changed: {line}" in said
    assert load_recipe(str(stopped / "recipe.yaml")).epochs == 5
    for key in ("accumulation", "evaluated", "logs"):  # keys that only begin like harmless ones
        assert differences({key: 1}, {key: 2}) == ([f"{key}: 1 → 2"], [])


@pytest.mark.fault(12)
def test_who_insists_goes_on_as_far_as_the_tensors_fit(recipe, stopped, capsys):
    with pytest.raises(UserError, match=r"does not fit this recipe: (.|\n)*codebook\.weight"):
        Trainer(recipe(MORE, "codebook.size=16"), stopped, resume="auto", insist=True)
    run(recipe(MORE, "optim.lr=1e-4"), stopped, resume="auto", insist=True)
    assert "changed: optim.lr: 0.002 → 0.0001" in capsys.readouterr().err


@pytest.mark.fault(13)
def test_another_version_of_a_plugin_is_refused_and_a_missing_one_named(recipe, stopped, monkeypatch, capsys):
    path = place(stopped, 4) / "manifest.json"
    about = json.loads(path.read_text())
    about.pop("sha256")
    about["versions"]["plugin vq"], about["versions"]["torch"] = "vqzoo 0.0.1", "1.0"
    path.write_text(json.dumps({**about, "sha256": checkpoint._signature(about)}))
    with pytest.raises(UserError, match=r"plugin vq: vqzoo 0\.0\.1 → vqzoo ") as caught:
        Trainer(recipe(MORE), stopped, resume="auto")
    assert "torch" not in str(caught.value)  # which is only said
    run(recipe(MORE), stopped, resume="auto", insist=True)
    assert "changed: torch: 1.0 → " in capsys.readouterr().err
    monkeypatch.setattr(sources, "entry_points", lambda group: [])
    with pytest.raises(UserError, match=r"plugins\.vq: no installed plugin is called 'vq'.*pip"):
        load_recipe(str(stopped / "recipe.yaml"))


def test_other_training_images_are_refused(recipe, stopped, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(recipe(MORE).data.root, root)
    (root / "train" / "00.png").rename(root / "train" / "another.png")
    with pytest.raises(UserError, match="training images: .* → "):
        Trainer(recipe(MORE, f"data.root={root}"), stopped, resume="auto")
    assert Trainer(recipe(MORE, f"data.root={root}"), stopped, resume="auto", insist=True).counters.step == 4


# ---- a named checkpoint


def test_a_run_branches_off_from_a_checkpoint_into_a_folder_of_its_own(recipe, stopped, whole, tmp_path):
    run(recipe(MORE), tmp_path / "branch", resume=str(place(stopped, 2)))
    assert not unequal(exported(tmp_path / "branch"), exported(whole)) and steps(tmp_path / "branch")[0] == 6
    with pytest.raises(UserError, match="is neither a checkpoint nor a run"):
        Trainer(recipe(MORE), tmp_path / "third", resume="x" * 999)
    assert steps(stopped) == [4, 2]
    run(recipe(MORE), tmp_path / "other", resume=str(stopped))  # a run stands for its newest checkpoint
    assert not unequal(exported(tmp_path / "other"), exported(whole))


def test_a_checkpoint_before_the_newest_is_refused_where_later_ones_would_be_lost(recipe, stopped):
    with pytest.raises(UserError, match="is not the newest checkpoint of .* name a new folder"):
        Trainer(recipe(MORE), stopped, resume=str(place(stopped, 2)))
    assert Trainer(recipe(MORE), stopped, resume=str(place(stopped, 4))).counters.step == 4


def test_a_finished_run_trains_more_epochs(recipe, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    longer = run(recipe(MORE, "epochs=5"), tmp_path / "run", resume="auto")
    straight = run(recipe(MORE, "epochs=5"), tmp_path / "straight")
    assert longer["metrics"] == straight["metrics"]
    assert not unequal(checkpoint_at(tmp_path / "run", 10)["optimizer"], checkpoint_at(tmp_path / "straight", 10)["optimizer"])


@pytest.mark.fault(9)
def test_a_branch_goes_on_from_where_it_began_even_if_it_is_killed_at_once(recipe, stopped, tmp_path):
    Trainer(recipe(MORE), tmp_path / "branch", resume=str(place(stopped, 4) / "manifest.json"))  # and no more
    assert steps(tmp_path / "branch") == [4]
    assert Trainer(recipe(MORE), tmp_path / "branch", resume="auto").counters.step == 4
    shutil.rmtree(stopped)
    checkpoint.verify(place(tmp_path / "branch", 4))


@pytest.mark.fault(6)
def test_a_damaged_checkpoint_does_not_push_out_those_that_follow(recipe, stopped, listeners):
    flip(place(stopped, 4) / "tokenizer.safetensors")
    listeners["quantize"] = at(2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        run(recipe(MORE, "checkpoint.keep=1", "checkpoint.keep_best=false"), stopped, resume="auto")
    assert steps(stopped) == [3]
    assert Trainer(recipe(MORE), stopped, resume="auto").counters.step == 3
    assert [path for path in (stopped / "checkpoints").iterdir() if path.name.startswith(".damaged_step_000000004")]


@pytest.mark.fault(10)
def test_a_users_own_copy_is_left_alone(recipe, stopped):
    shutil.copytree(place(stopped, 4), stopped / "checkpoints" / "my_backup")
    run(recipe(MORE, "checkpoint.keep=1"), stopped, resume="auto")
    assert (stopped / "checkpoints" / "my_backup" / "manifest.json").exists() and place(stopped, 6).exists()
    assert not place(stopped, 4).exists()


def test_what_is_measured_may_change_between_two_runs(recipe, stopped, capsys):
    before = checkpoint.verify(place(stopped, 4))["state"]["counters"]["best"]
    assert before == {}
    other = ["evaluate.epochs=1", "evaluate.best=ssim", "log.drift_images=1", "log.images=1", "optim.schedule=cosine"]
    with pytest.raises(UserError, match="optim.schedule: 'constant' → 'cosine'"):
        Trainer(recipe(MORE, *other), stopped, resume="auto")
    result = run(recipe(MORE, *other, "epochs=4"), stopped, resume="auto", insist=True)
    assert result["run"]["best"]["metric"] == "ssim" and result["run"]["best"]["step"] >= 4
    said = capsys.readouterr().err
    assert "changed: epochs: 3 → 4 (the cosine schedule of the learning rate is stretched from here on)" in said


def test_the_best_of_another_measure_is_no_rival(recipe, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("vqzoo.evaluation.evaluate.Evaluator.better",
                        lambda self, name, value, before: (seen.append((name, before)), True)[1])
    run(recipe(VQ, "evaluate.epochs=1"), tmp_path / "run")
    run(recipe(VQ, "evaluate.epochs=1", "epochs=4", "evaluate.best=ssim"), tmp_path / "run", resume="auto")
    names = [name for name, _ in seen]
    assert names == ["psnr", "psnr", "ssim", "ssim", "ssim"] and seen[0][1] is None and seen[1][1] is not None
    assert seen[2][1] is None and seen[3][1] is not None


def test_the_best_evaluation_has_a_checkpoint_even_where_none_is_due(recipe, tmp_path, monkeypatch):
    better = iter([True, False, False, False])
    monkeypatch.setattr("vqzoo.evaluation.evaluate.Evaluator.better", lambda *_: next(better))
    run(recipe(VQ, "epochs=4", "evaluate.epochs=1", "checkpoint.epochs=4", "checkpoint.keep=1"), tmp_path / "run")
    assert steps(tmp_path / "run") == [8, 2]


@pytest.mark.fault(14)
@pytest.mark.parametrize(("key", "value"), [("stage", 7), ("stage", -1), ("best", []), ("epoch", None), ("losses", 5),
                                            ("batches", -5), ("step_in_epoch", "x"), ("unknown", 1)])
def test_counters_that_cannot_be_are_refused(recipe, stopped, key, value):
    path = place(stopped, 4) / "manifest.json"
    about = json.loads(path.read_text())
    about.pop("sha256")
    about["state"]["counters"][key] = value
    path.write_text(json.dumps({**about, "sha256": checkpoint._signature(about)}))
    with pytest.raises(UserError, match=f"step_000000004 does not fit this recipe: .*{key}"):
        Trainer(recipe(MORE), stopped, resume="auto")


@pytest.mark.fault(8)
@pytest.mark.parametrize("due", [["checkpoint.epochs=1"], ["checkpoint.epochs=3", "evaluate.epochs=1"]])
def test_a_folder_that_is_removed_while_its_run_trains_is_made_again(recipe, tmp_path, listeners, capsys, due):
    out = tmp_path / "run"
    # in one go, since the writer may be at work in it
    listeners["refresh_codes"] = at(2, lambda: shutil.rmtree(out.rename(tmp_path / "gone")))
    run(recipe(MORE, *due), out)
    assert f"somebody has removed {out}" in capsys.readouterr().err
    assert steps(out)[0] == 6 and (out / "metrics.json").exists() and list((out / "tensorboard").glob("events.*"))
    assert Trainer(recipe(MORE), out, resume="auto").counters.step == 6


# ---- two runs, one folder


@pytest.mark.fault(16)
def test_who_waited_for_a_new_folder_does_not_begin_anew_in_it(recipe, tmp_path):
    late = folder.RunFolder(tmp_path / "run")
    start = late.find(recipe(MORE))
    run(recipe(MORE), tmp_path / "run")
    with pytest.raises(UserError, match="another run has begun in .* meanwhile"):
        late.claim(recipe(MORE), start)
    assert steps(tmp_path / "run") == [6, 4, 2]



@pytest.mark.fault(16)
def test_a_folder_belongs_to_one_process_at_a_time(recipe, stopped, monkeypatch):
    monkeypatch.setattr(folder, "PATIENCE", 0.2)
    holder = FileLock(stopped / ".lock")
    with holder:
        with pytest.raises(UserError, match=f"another process is writing to {stopped}"):
            Trainer(recipe(MORE), stopped, resume="auto")
    job = Trainer(recipe(MORE), stopped, resume="auto")
    with pytest.raises(UserError, match="another process"):
        Trainer(recipe(MORE), stopped, resume="auto")
    job.run()
    Trainer(recipe(MORE), stopped, resume="auto")  # a run that has ended holds nothing


def test_the_recipe_of_a_checkpoint_is_the_runs(recipe, whole):
    about = checkpoint.verify(place(whole, 6))
    assert differences(about["recipe"], json.loads(json.dumps(plain(recipe(MORE))))) == ([], [])
    assert about["stage"] == "train" and about["epoch"] == 2 and {"plugin vq", "torch"} <= about["versions"].keys()
