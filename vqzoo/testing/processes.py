"""The check of a plugin on two processes, as on two GPUs, and the launch of these."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vqzoo.sources import find
from vqzoo.testing.check import RUN, Skipped, check, fail
from vqzoo.testing.subject import Subject, place_of
from vqzoo.testing.training import Training

PROCESSES, STEPS = 2, 4

PATIENCE = 60
"""Seconds that one process waits for another."""

GRACE = 3
"""Seconds that the others have when one process has ended in the middle."""


@check("Two processes that train together end up with unlike codebooks or plugins, or wait for each other for ever: draw at "
       "random from the given generator alone, gather statistics (vqzoo.all_reduce_sum, vqzoo.ops.gather_rows), and let every "
       "process do so as often as the others.", RUN)
def processes_stay_equal(subject: Subject) -> None:
    Training(subject, subject.tokenizer()).begin().step()  # what fails with one process is no matter of two
    (said,) = launch([subject])
    if said:
        fail(said)


def launch(subjects: list[Subject], patience: int = PATIENCE) -> list[str | None]:
    """Train subjects on two processes, one after the other; return what went wrong with each, or None.

    One launch does for all; where one subject takes a process down, another launch does the rest.
    """
    outcomes: list[str | None] = []
    while len(outcomes) < len(subjects):
        outcomes += _launch(subjects[len(outcomes):], patience)
    return outcomes


def _launch(subjects: list[Subject], patience: int) -> list[str | None]:
    """Return the outcomes of subjects up to the first that takes a process down."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = {"path": sys.path, "patience": patience, "processes": PROCESSES, "steps": STEPS,
                   "subjects": [_request(subject) for subject in subjects]}
        (folder / "request.json").write_text(json.dumps(request))
        said = _run(folder, 120 + 2 * patience * len(subjects))
        whole = [number for number in range(len(subjects)) if len(_answers(folder, number)) == PROCESSES]
        return [_outcome(folder, number, said) for number in range(min(len(whole) + 1, len(subjects)))]


def _request(subject: Subject) -> dict[str, Any]:
    """Say how another process finds a subject."""
    sizes = {"size": subject.size, "width": subject.width, "resolution": list(subject.resolution), "config": subject.fields}
    if isinstance(subject.plugin, str):
        given = find(subject.plugin).given
        if given is None or isinstance(given, Path):
            return {"name": subject.plugin, "file": str(given) if given else None, **sizes}
    kind = subject.kind
    if "<locals>" in kind.__qualname__ or place_of(kind) is None:
        raise Skipped(f"{kind.__qualname__} is made inside of a function, where no other process finds it; define it at the "
                      "top of its module")
    return {"module": kind.__module__, "class": kind.__qualname__, "file": str(place_of(kind)), **sizes}


def _run(folder: Path, seconds: int) -> list[str]:
    """Run all processes to their end, or kill them after so many seconds; return what each has said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    logs = [folder / f"log_{rank}" for rank in range(PROCESSES)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("wb") as file:
            command = [sys.executable, "-m", "vqzoo.testing.rank", str(folder), str(rank)]
            processes.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=os.getcwd()))
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end and any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):  # the others may still find out and say so
                end = min(end, time.monotonic() + GRACE)
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [log.read_text(errors="replace") for log in logs]


def _answers(folder: Path, number: int) -> dict[int, str | None]:
    """Return what the processes have left of a subject, by their rank."""
    files = {rank: folder / f"{number}_{rank}.json" for rank in range(PROCESSES)}
    return {rank: json.loads(file.read_text())["problem"] for rank, file in files.items() if file.exists()}


def _outcome(folder: Path, number: int, said: list[str]) -> str | None:
    """Return what went wrong with one subject, as the processes have left it or as their silence tells."""
    answers = _answers(folder, number)
    if len(set(answers.values())) == 1 and len(answers) == PROCESSES:
        return answers[0]
    for rank in range(PROCESSES):
        last = (said[rank].strip().splitlines() or ["nothing"])[-1].strip()
        answers.setdefault(rank, f"hung or was ended, and said last: {last}")
    return "; ".join(f"process {rank}: {problem}" for rank, problem in sorted(answers.items()) if problem)
