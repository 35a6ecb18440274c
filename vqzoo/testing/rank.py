"""One of the processes of `vqzoo.testing.processes`, a script: `python -m vqzoo.testing.rank FOLDER RANK`."""

import importlib
import json
import sys
from contextlib import ExitStack
from datetime import timedelta
from functools import reduce
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vqzoo.ops.collective import differing
from vqzoo.sources import also
from vqzoo.testing.subject import Subject
from vqzoo.testing.surroundings import undisturbed
from vqzoo.testing.training import Training


def main(folder: Path, rank: int) -> None:
    """Train every subject of a request and write what went wrong with each."""
    request = json.loads((folder / "request.json").read_text())
    sys.path[:] = request["path"]
    for number, subject in enumerate(request["subjects"]):
        dist.init_process_group("gloo", f"file://{folder / f'meet_{number}'}", timedelta(seconds=request["patience"]),
                                rank=rank, world_size=request["processes"])
        try:
            problem = _train(subject, rank, request["processes"], request["steps"])
        except Exception as error:  # of whatever the plugin does
            problem = str(error) or repr(error)
        answer = folder / f"{number}_{rank}.json"
        answer.with_suffix(".part").write_text(json.dumps({"problem": problem}))
        answer.with_suffix(".part").rename(answer)
        dist.destroy_process_group()


def _train(about: dict[str, Any], rank: int, processes: int, steps: int) -> str | None:
    """Train a subject on images of this process; say what is not equal on all processes."""
    with undisturbed(), ExitStack() as stack:
        subject = _subject(about, stack)
        training = Training(subject, subject.tokenizer(), rank, processes).begin()
        for step in range(steps + 1):
            parts = {"codebook": training.tokenizer.codebook, "plugins": training.tokenizer.plugins}
            if unequal := differing({f"{part}.{name}": value for part, module in parts.items()
                                     for name, value in (*module.named_parameters(), *module.named_buffers())}):
                where = "when the first stage was entered" if step == 0 else f"after step {step}"
                return f"{', '.join(unequal)}: not the same on {processes} processes {where}"
            if step < steps:
                training.step()
    return None


def _subject(about: dict[str, Any], stack: ExitStack) -> Subject:
    sizes = {"config": about["config"], "size": about["size"], "width": about["width"],
             "resolution": tuple(about["resolution"])}
    if "class" in about:
        subject = Subject(reduce(getattr, about["class"].split("."), _module(about["module"], Path(about["file"]))), **sizes)
    else:
        stack.enter_context(also(files=[about["file"]] if about["file"] else []))
        subject = Subject(about["name"], **sizes)
    stack.enter_context(subject.within())
    return subject


def _module(name: str, file: Path) -> Any:
    """Import a module by its name, if that leads to the same file, else from the file: a test's, or a script's."""
    if name != "__main__":
        try:
            found = importlib.import_module(name)
            if Path(found.__file__ or "").resolve() == file:
                return found
        except ImportError:
            pass
    spec = spec_from_file_location(f"vqzoo_testing_{file.stem}", file)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
