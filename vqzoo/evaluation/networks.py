"""Networks whose features metrics compare: features [B, D] of images [B, 3, H, W] as levels 0 to 255."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqzoo.errors import UserError
from vqzoo.networks import channels_last, make_timm_model, normalisation
from vqzoo.ops.backends import exact_float32
from vqzoo.weights import SOURCES, fetch_verified, read_weights


class Inception(nn.Module):
    """The Inception network of the Fréchet inception distance (arXiv 1706.08500): its last pooled features, D = 2,048.

    The layers are torch-fidelity's, the weights those of 2015-12-05, whose SHA-256 is checked. `resizing` is "tensorflow",
    as in the network's own graph, or "pytorch", half a pixel elsewhere, as in pytorch-fid.
    """

    width, name = 2048, "inception"

    def __init__(self, resizing: str, key: str):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        self.resizing = resizing
        source = SOURCES["inception"]
        # torch-fidelity unpickles whatever a file holds; so it gets a file that was made here, of tensors alone.
        tensors = io.BytesIO()
        torch.save(read_weights(fetch_verified(source, key), key), tensors)
        tensors.seek(0)
        try:
            model = FeatureExtractorInceptionV3(self.name, ["2048"], feature_extractor_weights_path=tensors)
        except RuntimeError as error:
            raise UserError(f"{key}: {source.file}: {error}") from error
        self.layers = channels_last(nn.ModuleList(layer for name, layer in model.named_children() if name != "fc"))
        self.card = {"network": "InceptionV3, 2015-12-05, pooled features (2048)", "sha256": source.sha256,
                     "input": f"299 x 299, bilinear, as {resizing} does it, not antialiased"}
        self.eval().requires_grad_(False)

    def forward(self, levels: Tensor) -> Tensor:
        if self.resizing == "tensorflow":
            from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

            x = interpolate_bilinear_2d_like_tensorflow1x(levels.float(), size=(299, 299), align_corners=False)
            x = (x - 128) / 128
        else:
            x = 2 * F.interpolate(levels.float() / 255, (299, 299), mode="bilinear", align_corners=False) - 1
        for layer in self.layers:
            x = layer(x)
        return x.flatten(1)


class Pooled(nn.Module):
    """Any timm network: its last features, pooled as it pools them before its classifier.

    Images are resized to a square of `size` pixels (bicubic, antialiased, clamped), or keep theirs with None, and are
    normalised as the network's pretrained_cfg says; `args` may hold another `mean` and `std`, the rest goes to timm.
    """

    def __init__(self, name: str, pretrained: bool | str, size: int | None, args: dict[str, Any], key: str):
        super().__init__()
        self.name, self.size, self.key = name, size, key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # where nothing is pretrained, every process and run gets the same network
            square = None if size is None else (size, size)
            self.model = channels_last(make_timm_model(name, pretrained, args, square, key=key))
        for part, value in normalisation(self.model).items():
            self.register_buffer(part, value, persistent=False)
        self.eval().requires_grad_(False)
        self.width = self._pooled(torch.zeros(1, 3, size or 128, size or 128)).shape[1]
        made = f"{size} x {size}, bicubic, antialiased" if size else "the images' own size"
        weights = Path(pretrained).name if isinstance(pretrained, str) else "timm's" if pretrained else "random, seed 0"
        self.card = {"network": f"timm {name}, pooled features ({self.width})", "weights": weights,
                     "sha256": digest(self.model), "input": made, "args": str(dict(sorted(args.items()))),
                     "mean": str(self.mean.flatten().tolist()), "std": str(self.std.flatten().tolist())}

    def forward(self, levels: Tensor) -> Tensor:
        x = levels.float() / 255
        if self.size and x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return self._pooled((x - self.mean) / self.std)

    def _pooled(self, x: Tensor) -> Tensor:
        try:
            return self.model.forward_head(self.model.forward_features(x), pre_logits=True).flatten(1)
        except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:  # of timm's many networks
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(f"{self.key}.name: {self.name} gives no pooled features of {x.shape[2]}x{x.shape[3]} pixels: "
                            f"{error}; choose another {self.key}.size or network") from error


def digest(network: nn.Module) -> str:
    """Return a SHA-256 of all tensors of a network, by name."""
    sha = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy() if tensor.numel() else b"")
    return sha.hexdigest()


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Let networks compute in float32 as it is: no autocast, no TF32."""
    with exact_float32(device), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
