"""What a run shows while it lasts: a progress bar or lines, TensorBoard, and the instruments of encoder drift."""

import resource
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from vqzoo.metrics import to_bytes
from vqzoo.tokenizer import Tokenizer


class Drift:
    """Measure how far the encoder and its assignments move on fixed images between two calls.

    "drift" is the root mean square change of a latent's element, "churn" the share of tokens that changed their code
    (arXiv 2606.11363, eq. 7 and 19).
    """

    def __init__(self, images: Tensor):
        self.images = images
        self.latents: Tensor | None = None
        self.indices: Tensor | None = None

    @torch.no_grad()
    def measure(self, tokenizer: Tokenizer) -> dict[str, float]:
        """Return drift and churn since the last call; {} at the first."""
        mode = tokenizer.training
        tokenizer.eval()
        output = tokenizer(self.images)
        tokenizer.train(mode)
        found = {}
        if self.latents is not None:
            found["encoder_drift"] = float((output.latents - self.latents).square().mean().sqrt())
        if self.indices is not None and output.indices is not None:
            found["assignment_churn"] = float((output.indices != self.indices).float().mean())
        self.latents, self.indices = output.latents, output.indices
        return found


class Monitor:
    """Show one process's run; on every process but the main one it stays silent."""

    def __init__(self, folder: Path, steps: int, step: int, resumed: bool, enabled: bool):
        self.enabled = enabled
        self.bar = self.writer = None
        if not enabled:
            return
        self.writer = SummaryWriter(folder, purge_step=step + 1 if resumed else 0)
        if sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05)
        self.steps, self.first, self.began = steps, step, time.monotonic()

    def say(self, text: str, step: int | None = None) -> None:
        """Print a line without disturbing the bar; with a step, keep it in TensorBoard as an event of the run."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)
        if step is not None:
            self.writer.add_text("events", text, step)

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
            self.writer.add_scalar(f"{group}/{name}" if group else name, value, step)

    def codes(self, counts: Tensor, step: int) -> None:
        """Write an epoch's usage: how many codes have how many assignments, and the number of dead codes."""
        if not self.enabled:
            return
        # A few codes have most of the assignments, so only their logarithm shows the rest; dead codes stand at 0.
        self.writer.add_histogram("codes/log10_of_1_plus_assignments", (1 + counts).double().log10().cpu(), step)
        self.writer.add_scalar("codes/dead", int((counts == 0).sum()), step)

    def picture(self, name: str, panel: Tensor, step: int) -> None:
        """Write a picture [3, H, W] uint8 to TensorBoard."""
        if self.enabled:
            self.writer.add_image(name, panel, step)

    def text(self, name: str, text: str) -> None:
        """Write a text to TensorBoard, as it stands."""
        if self.enabled:
            self.writer.add_text(name, "    " + text.replace("\n", "\n    "))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            self.writer.close()


def panel(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Lay images [B, 3, H, W] in a row above their reconstructions; uint8 [3, 2H, B·W]."""
    rows = [torch.cat(list(to_bytes(x)), dim=2) for x in (images, reconstructions)]
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


