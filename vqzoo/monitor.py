"""What a run shows while it lasts: a progress bar or lines, TensorBoard, and the instruments of encoder drift."""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from vqzoo.codebook import Codebook
from vqzoo.data import to_bytes
from vqzoo.ops import code_usage, nearest_codes, search_disagreement
from vqzoo.ops.backends import settle
from vqzoo.tokenizer import Tokenizer

MOST_CODES = 4096
"""Codes whose lag is measured; of a larger codebook, that many at even distances."""


class Drift:
    """Measure on fixed images how far the encoder moves between two calls, and how the codebook follows.

    encoder_drift is the root mean square change of a latent's element and assignment_churn the share of tokens that changed
    their code (arXiv 2606.11363, eq. 7 and 19), both since the last call. usage_fixed is the share of codes that the images
    use. codebook_lag is the mean over codes of the Euclidean distance to the nearest latent, codebook_lag_unused that of the
    codes that the images do not use. Lag has a meaning only where a latent is replaced by one code that could be overwritten.
    Where searches are fast, search_disagreement is the share of tokens whose code is not the nearest.
    """

    def __init__(self, images: Tensor):
        self.images = images
        self.latents: Tensor | None = None
        self.indices: Tensor | None = None

    @torch.no_grad()
    def measure(self, tokenizer: Tokenizer) -> dict[str, float]:
        """Return what can be said; drift and churn not at the first call, and nothing of codes without indices."""
        mode = tokenizer.training
        tokenizer.eval()
        output = tokenizer(self.images)
        tokenizer.train(mode)
        latents, indices, found = output.latents, output.indices, {}
        if self.latents is not None:
            found["encoder_drift"] = float((latents - self.latents).square().mean().sqrt())
        if self.indices is not None and indices is not None and self.indices.shape == indices.shape:
            found["assignment_churn"] = float((indices != self.indices).float().mean())
        if indices is not None:
            found |= self._codes(latents, indices, tokenizer.codebook)
        self.latents, self.indices = latents, indices
        return found

    def _codes(self, latents: Tensor, indices: Tensor, codebook: Codebook) -> dict[str, float]:
        """Return the usage, and the lag where it has a meaning."""
        used = code_usage(codebook.rows_of(indices), codebook.rows) > 0
        found = {"usage_fixed": float(used.float().mean())}
        if indices.dim() == 2 and codebook.replaceable and latents.shape[2] == codebook.width:
            chosen = slice(None, None, -(-codebook.rows // MOST_CODES))
            if not settle(None, None)[1]:
                found["search_disagreement"] = search_disagreement(latents.flatten(0, 1), codebook.vectors())
            distances = nearest_codes(codebook.vectors()[chosen], latents.flatten(0, 1))[1].sqrt()
            found["codebook_lag"] = float(distances.mean())
            if len(unused := distances[~used[chosen]]):
                found["codebook_lag_unused"] = float(unused.mean())
        return found


class Monitor:
    """Show one process's run; on every process but the main one it stays silent.

    What TensorBoard has from step `anew` on, written by a run that did not get farther, is written anew.
    """

    def __init__(self, folder: Path, steps: int, step: int, anew: int, enabled: bool):
        self.enabled, self.folder = enabled, folder
        self.bar = self.writer = None
        if not enabled:
            return
        if sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05)
        self.steps = steps
        self.rewind(step, anew)

    def rewind(self, step: int, anew: int) -> None:
        """Go on from a step; what TensorBoard was told from step `anew` on does not count any more."""
        if not self.enabled:
            return
        self.first, self.began = step, time.monotonic()
        if self.bar is not None:
            self.bar.reset(self.steps)
            self.bar.update(step)
        self._write("close")
        self._attempt(self._open, anew)

    def _open(self, anew: int) -> None:
        _make_older(self.folder)
        self.writer = SummaryWriter(self.folder, purge_step=anew)

    def _attempt(self, write: Callable, *arguments: Any) -> None:
        """Write to TensorBoard; training goes on without, once that has failed: a disk may be full."""
        try:
            write(*arguments)
        except Exception as error:  # of TensorBoard's writing thread, as well
            self.writer = None
            self.say(f"TensorBoard: {self.folder} cannot be written ({error}); the run goes on without")

    def _write(self, kind: str, *arguments: Any) -> None:
        if self.writer is not None:
            self._attempt(getattr(self.writer, kind), *arguments)

    def flush(self) -> None:
        """Have everything on disk that was written so far."""
        self._write("flush")

    def say(self, text: str, step: int | None = None) -> None:
        """Print a line without disturbing the bar; with a step, keep it in TensorBoard as an event of the run."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)
        if step is not None:
            self._write("add_text", "events", text, step)

    def advance(self, step: int) -> None:
        """Move the bar to a step."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def show(self, stage: str, step: int, losses: dict[str, float], usage: float | None) -> None:
        """Name the stage, its losses, the usage of the epoch so far and the time left."""
        if not self.enabled:
            return
        parts = [f"{name} {value:.4g}" for name, value in losses.items()]
        parts += [] if usage is None else [f"usage {usage:.1%}"]
        if self.bar is not None:
            self.bar.set_description_str(stage)
            self.bar.set_postfix_str(", ".join(parts))
            return
        left = (time.monotonic() - self.began) / max(1, step - self.first) * (self.steps - step)
        print(f"{stage} {step}/{self.steps}  {', '.join(parts)}  {left / 60:.1f} min left", file=sys.stderr, flush=True)

    def scalars(self, values: dict[str, float], step: int, group: str = "") -> None:
        """Write scalars to TensorBoard."""
        for name, value in values.items() if self.enabled else ():
            self._write("add_scalar", f"{group}/{name}" if group else name, value, step)

    def codes(self, counts: Tensor, ages: Tensor, step: int) -> None:
        """Write an epoch's usage: how many codes have how many assignments, how many are how old, and how many are dead."""
        if not self.enabled:
            return
        # A few codes have most of the assignments, so only their logarithm shows the rest; dead codes stand at 0.
        self._write("add_histogram", "codes/log10_of_1_plus_assignments", (1 + counts).double().log10().cpu(), step)
        self._write("add_histogram", "codes/age", ages.cpu(), step)
        self._write("add_scalar", "codes/dead", int((counts == 0).sum()), step)

    def curve(self, name: str, points: list[tuple[int, float]]) -> None:
        """Write a curve whose axis is not steps, as a run of its own that begins anew."""
        def write() -> None:
            with SummaryWriter(self.folder / name, purge_step=0) as writer:
                for place, value in points:
                    writer.add_scalar(name, value, place)

        if self.writer is not None:
            self._attempt(write)

    def picture(self, name: str, panel: Tensor, step: int) -> None:
        """Write a picture [3, H, W] uint8 to TensorBoard."""
        self._write("add_image", name, panel, step)

    def text(self, name: str, text: str) -> None:
        """Write a text to TensorBoard, as it stands."""
        self._write("add_text", name, "    " + text.replace("\n", "\n    "))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self._write("close")


def _make_older(folder: Path) -> None:
    """Give files of events that come from the future, of another clock, names from the past: TensorBoard reads by name."""
    now, files = int(time.time()), [(path, path.name.split(".")) for path in folder.glob("events.out.tfevents.*.*")]
    late = sorted((path, parts) for path, parts in files if parts[3].isdigit() and int(parts[3]) >= now)
    for number, (path, parts) in enumerate(late):
        path.rename(path.with_name(".".join([*parts[:3], f"{now - len(late) + number:010d}", *parts[4:]])))


def panel(*images: Tensor) -> Tensor:
    """Lay R sets of images [B, 3, H, W] out as rows, one above the other; uint8 [3, R·H, B·W]."""
    rows = [torch.cat(list(to_bytes(x)), dim=2) for x in images]
    return torch.cat(rows, dim=1).to(torch.uint8).cpu()


def save_picture(picture: Tensor, path: Path) -> None:
    """Write a picture [3, H, W] uint8 as a PNG."""
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)


def memory(device: torch.device) -> dict[str, float]:
    """Return the peak memory of this process in MiB: of the device if it is a GPU, else resident."""
    if device.type == "cuda":
        return {"peak_mib": torch.cuda.max_memory_allocated(device) / 2**20}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_mib": peak / (2**20 if sys.platform == "darwin" else 2**10)}


