"""A run's folder: who may write there, and from which checkpoint the run goes on."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vqzoo import checkpoint
from vqzoo.errors import UserError
from vqzoo.files import write_text
from vqzoo.ops.collective import from_main
from vqzoo.recipe import Recipe, differences, load_recipe, plain, to_yaml, versions

LOCK, RECIPE, CHECKPOINTS = ".lock", "recipe.yaml", "checkpoints"

PATIENCE = 5.0
"""Seconds for which a run waits until the one before has left the folder."""


@dataclass
class Start:
    """Say from which checkpoint a run goes on, if any, and what the user should know of it."""

    path: Path | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class RunFolder:
    """The folder of one run, locked for it as soon as it exists.

    `resume` is "never", "auto" (continue what the folder holds, else start) or the path of a checkpoint or of a run. What
    differs from the recipe, plugins or images of the checkpoint is refused unless it is harmless or `insist` says so.
    """

    def __init__(self, path: Path, resume: str | Path = "never", insist: bool = False):
        self.path, self.resume, self.insist = path, resume, insist
        self.checkpoints = path / CHECKPOINTS
        self._lock: FileLock | None = None

    def find(self, recipe: Recipe) -> Start:
        """Return where the run starts; a UserError, on every process, if the folder cannot be this run's."""
        return from_main(lambda: self._find(recipe))

    def _find(self, recipe: Recipe) -> Start:
        begun = self._begun()
        if begun:
            self._acquire()
        source = self._source()
        if source is None and self.resume not in ("never", "auto"):
            raise UserError(f"--resume: {self.resume} is neither a checkpoint nor a run that has one")
        if begun and self.resume == "never":
            raise UserError(f"{self.path} already holds a run; name another folder with --out, or continue it with "
                            "--resume auto")
        start = self._newest() if self.resume == "auto" else self._exactly(source)
        if start.path is not None:
            start.notes += self._changes(start.manifest, recipe)
        elif begun:
            then = plain(load_recipe(str(self.path / RECIPE)))
            self._refuse(differences(then, plain(recipe))[0])
            start.notes.append(f"{self.path} holds no checkpoint to resume from: starting afresh")
        return start

    def _begun(self) -> bool:
        """Tell whether the folder holds a run; a UserError if it holds anything else."""
        try:
            if (self.path / RECIPE).exists():
                if not load_recipe(str(self.path / RECIPE)).versions:
                    raise UserError(f"--out: {self.path / RECIPE} was not written by a run; name a new folder")
                return True
            if self.path.is_dir() and any(not path.name.startswith(".") for path in self.path.iterdir()):
                raise UserError(f"--out: {self.path} is not empty and holds no run; name a new folder")
        except OSError as error:
            raise UserError(f"--out: {self.path} cannot be used: {error}") from error
        return False

    def _source(self) -> Path | None:
        """Return the checkpoint that the user named, itself or by its run."""
        path = Path(self.resume)
        if self.resume in ("never", "auto") or (path / checkpoint.MANIFEST).is_file():
            return None if self.resume in ("never", "auto") else path
        return next((found for _, found in checkpoint.complete(path / CHECKPOINTS)), None)

    def _exactly(self, source: Path | None) -> Start:
        """Go on from the checkpoint that the user named; in the run's own folder, it must be the newest."""
        if source is None:
            return Start()
        manifest = checkpoint.verify(source)
        later = [path for step, path in checkpoint.complete(self.checkpoints) if step > manifest["step"]]
        if later:
            raise UserError(f"--resume: {source} is not the newest checkpoint of {self.path}, which would lose {later[0]}; "
                            "name a new folder with --out to branch off from it")
        return Start(source, manifest)

    def newest(self) -> Start:
        """Return the newest checkpoint of the folder that is whole, the same on every process."""
        return from_main(self._newest)

    def _newest(self) -> Start:
        """Go on from the newest checkpoint that is whole; a UserError if there are some and none is."""
        problems = checkpoint.damaged(self.checkpoints)
        cut_off = [f"{path}: was never finished; it is passed over" for path in checkpoint.unfinished(self.checkpoints)]
        for path in (path for _, path in checkpoint.complete(self.checkpoints)):
            try:
                manifest = checkpoint.verify(path)
                return Start(path, manifest, [*(f"{problem}; it is passed over" for problem in problems), *cut_off])
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError(f"--resume: {self.checkpoints} holds no checkpoint that is whole:\n  " + "\n  ".join(problems)
                            + "\nmend one, or begin anew in another folder")
        return Start(notes=cut_off)

    def _changes(self, manifest: dict[str, Any], recipe: Recipe) -> list[str]:
        """Return what differs from a checkpoint's recipe and plugins, in words; a UserError if that may matter."""
        matters, harmless = differences(manifest["recipe"], plain(replace(recipe, versions={})))
        now = versions(list(recipe.plugins))
        for name, then in manifest["versions"].items():
            if name in now and now[name] != then:
                (matters if name.startswith("plugin ") else harmless).append(f"{name}: {then} → {now[name]}")
        self._refuse(matters)
        return [f"changed: {line}" for line in matters + harmless]

    def _refuse(self, changed: list[str]) -> None:
        if changed and not self.insist:
            raise UserError(f"{self.path} was begun with another recipe and cannot be resumed with this one:\n  "
                            + "\n  ".join(changed) + "\ntake that back, name another folder with --out, or say --insist")

    def check_images(self, start: Start, content: dict[str, Any]) -> None:
        """Refuse training images other than those with which the run began."""
        then = start.manifest.get("images", content)
        if then != content:
            line = f"training images: {then} → {content}"
            self._refuse([line])
            start.notes.append(f"changed: {line}")

    def holds(self, path: Path) -> bool:
        """Tell whether a checkpoint lies in this folder."""
        return path.parent.resolve() == self.checkpoints.resolve()

    # ---- writing

    def claim(self, recipe: Recipe) -> None:
        """Make the folder this run's and write its resolved recipe; a UserError on every process if that is impossible."""
        from_main(lambda: self._claim(recipe))

    def _claim(self, recipe: Recipe) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            whole = to_yaml(replace(recipe, versions=versions(list(recipe.plugins))))
            write_text(self.path / RECIPE, whole)  # first: it is what makes the folder a run's
            for name in (CHECKPOINTS, "tensorboard"):
                (self.path / name).mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: {self.path} cannot be written: {error}") from error

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
        self._lock = lock

    def release(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
