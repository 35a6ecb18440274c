"""A run's folder: who may write there, and from which checkpoint the run goes on."""

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vqzoo import checkpoint
from vqzoo.errors import UserError
from vqzoo.files import write_text
from vqzoo.ops.collective import from_main
from vqzoo.recipe import Recipe, differences, load_recipe, named_plugins, plain, to_yaml, versions

LOCK, RECIPE, CHECKPOINTS = ".lock", "recipe.yaml", "checkpoints"

PATIENCE = 5.0
"""Seconds for which a run waits until the one before has left the folder."""


@dataclass
class Start:
    """Say from which checkpoint a run goes on, if any, and what the user should know of it."""

    path: Path | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)


class RunFolder:
    """The folder of one run, locked for it as soon as it exists.

    `resume` is "never", "auto" (continue what the folder holds, else start) or the path of a checkpoint or of a run. What
    differs from the recipe, plugins or images of the checkpoint is refused unless it is harmless or `insist` says so.
    """

    def __init__(self, path: Path, resume: str | Path = "never", insist: bool = False):
        self.path, self.resume, self.insist = path, resume, insist
        self.checkpoints = path / CHECKPOINTS
        self._lock: FileLock | None = None
        self._was_begun = False

    def find(self, recipe: Recipe) -> Start:
        """Return where the run starts; a UserError, on every process, if the folder cannot be this run's."""
        return from_main(lambda: self._find(recipe))

    def _find(self, recipe: Recipe) -> Start:
        self._was_begun = self._begun()
        if self._was_begun:
            self._acquire()
        if self._was_begun and self.resume == "never":
            raise UserError(f"{self.path} already holds a run; name another folder with --out, or continue it with "
                            "--resume auto")
        if self.resume in ("never", "auto"):
            start = self._newest(self.checkpoints) if self.resume == "auto" else Start()
        else:
            start = self._named(Path(self.resume))
        if start.path is not None:
            start.notes += self._changes(start, recipe)
        elif self._was_begun:
            then = plain(load_recipe(str(self.path / RECIPE)))
            self._refuse(self.path, differences(then, plain(recipe))[0])
            start.notes.append(f"{self.path} holds no checkpoint to resume from: starting afresh")
        return start

    def _begun(self) -> bool:
        """Tell whether the folder holds a run; a UserError if it holds anything else."""
        try:
            if (self.path / RECIPE).exists():
                if not load_recipe(str(self.path / RECIPE)).versions:
                    raise UserError(f"--out: {self.path / RECIPE} was not written by a run, or is damaged; name a new folder, "
                                    f"into which --resume {self.path} goes on if there are checkpoints")
                return True
            if self.path.is_dir() and any(not path.name.startswith(".") for path in self.path.iterdir()):
                raise UserError(f"--out: {self.path} is not empty and holds no run; name a new folder")
        except OSError as error:
            raise UserError(f"--out: {self.path} cannot be used: {error}") from error
        return False

    def _named(self, path: Path) -> Start:
        """Go on from the checkpoint that the user named, itself or by its run; here, it must be the newest."""
        path = path.parent if path.name == checkpoint.MANIFEST else path
        checkpoints = path if path.name == CHECKPOINTS else path / CHECKPOINTS
        if os.path.isfile(path / checkpoint.MANIFEST):  # unlike Path.is_file, also for a name that is too long
            start = Start(path, checkpoint.verify(path))
        else:
            start = self._newest(checkpoints) if os.path.isdir(checkpoints) else Start()
        if start.path is None:
            raise UserError(f"--resume: {self.resume} is neither a checkpoint nor a run that has one")
        later = [found for step, found in checkpoint.complete(self.checkpoints) if step > start.manifest["step"]]
        if later:
            raise UserError(f"--resume: {start.path} is not the newest checkpoint of {self.path}, which would lose {later[0]}; "
                            "say --resume auto to go on from the newest, or name a new folder with --out to branch off")
        return start

    def newest(self) -> Start:
        """Return the newest checkpoint of the folder that is whole, the same on every process."""
        return from_main(lambda: self._newest(self.checkpoints))

    def _newest(self, checkpoints: Path) -> Start:
        """Go on from the newest checkpoint that is whole; a UserError if there are some and none is."""
        problems, start = checkpoint.damaged(checkpoints), Start()
        for path in (path for _, path in checkpoint.complete(checkpoints)):
            try:
                start.path, start.manifest = path, checkpoint.verify(path)
                break
            except UserError as error:
                problems[path] = str(error)
        else:
            if problems:
                said = "\n  ".join(problems.values())
                raise UserError(f"--resume: {checkpoints} holds no checkpoint that is whole:\n  {said}\nmend one, or begin "
                                "anew in another folder")
        start.damaged = list(problems)
        start.notes = [f"{problem}; it is passed over" for problem in problems.values()]
        start.notes += [f"{path}: was never finished; it is passed over" for path in checkpoint.unfinished(checkpoints)]
        return start

    def _changes(self, start: Start, recipe: Recipe) -> list[str]:
        """Return what differs from a checkpoint's recipe and plugins, in words; a UserError if that may matter."""
        then, now = start.manifest["recipe"], versions(named_plugins(recipe))
        try:
            matters, harmless = differences(then, plain(replace(recipe, versions={})))
        except (TypeError, KeyError, AttributeError) as error:  # a stranger's
            raise UserError(f"--resume: {start.path}: its recipe is none of this version: {error!r}") from error
        for name, version in start.manifest["versions"].items():
            if name in now and now[name] != version:
                (matters if name.startswith("plugin ") else harmless).append(f"{name}: {version} → {now[name]}")
        self._refuse(start.path, matters)
        return [f"changed: {line}{_consequence(line, recipe)}" for line in matters + harmless]

    def _refuse(self, whose: Path, changed: list[str]) -> None:
        if changed and not self.insist:
            raise UserError(f"{whose} was begun with another recipe and cannot be resumed with this one:\n  "
                            + "\n  ".join(changed) + "\ntake that back, begin anew in another folder, or say --insist")

    def check_images(self, start: Start, content: dict[str, Any]) -> None:
        """Refuse training images other than those with which the run began."""
        then = start.manifest.get("images", content)
        if then != content:
            line = f"training images: {then} → {content}"
            self._refuse(start.path, [line])
            start.notes.append(f"changed: {line}")

    # ---- writing

    def claim(self, recipe: Recipe, start: Start) -> None:
        """Make the folder this run's, with its resolved recipe and the checkpoint that it goes on from.

        A UserError on every process if that is impossible.
        """
        from_main(lambda: self._claim(recipe, start))

    def _claim(self, recipe: Recipe, start: Start) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            if not self._was_begun and self._begun():
                raise UserError(f"--out: another run has begun in {self.path} meanwhile; name another folder, or continue it "
                                "with --resume auto")
            whole = to_yaml(replace(recipe, versions=versions(named_plugins(recipe))))
            write_text(self.path / RECIPE, whole)  # first: it is what makes the folder a run's
            for name in (CHECKPOINTS, "tensorboard"):
                (self.path / name).mkdir(exist_ok=True)
            self._take(start)
            self._was_begun = True
        except OSError as error:
            raise UserError(f"--out: {self.path} cannot be written: {error}") from error

    def _take(self, start: Start) -> None:
        """Set damaged checkpoints aside, so that they are in nobody's way, and copy one that comes from another run."""
        for path in start.damaged:
            if path.parent == self.checkpoints:
                path.rename(path.with_name(f".damaged_{path.name}_{time.time_ns()}"))
        if start.path is not None and start.path.parent.resolve() != self.checkpoints.resolve():
            checkpoint.copy(start.path, self.checkpoints)

    def mend(self, recipe: Recipe) -> bool:
        """Make the folder again if somebody has removed it, and tell so; a UserError if another run is there now."""
        lock = self.path / LOCK
        if (self.path / RECIPE).exists() and lock.exists() and lock.stat().st_ino == self._inode:
            return False
        self.release()
        self._claim(recipe, Start())
        return True

    def _acquire(self) -> None:
        """Hold the folder's lock, which the system takes back however the process ends."""
        if self._lock is not None:
            return
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout as error:
            raise UserError(f"--out: another process is writing to {self.path}; wait for its end, or name another "
                            "folder") from error
        except OSError as error:
            raise UserError(f"--out: {self.path} cannot be written: {error}") from error
        self._lock, self._inode = lock, os.stat(self.path / LOCK).st_ino

    def release(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _consequence(line: str, recipe: Recipe) -> str:
    """Return what a user should know of a change that is let pass."""
    if line.startswith("epochs: ") and recipe.optim.schedule != "constant":
        return f" (the {recipe.optim.schedule} schedule of the learning rate is stretched from here on)"
    if line.startswith("accumulate: "):
        return " (what plugins compute of a micro-batch, an adaptive weight for one, is of other images)"
    return ""
