"""Encoders by timm name, the VQGAN convolutional encoder under its own timm name, and decoders."""

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, get_pretrained_cfg, is_model, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vqzoo.errors import MissingWeights, UserError, suggestion
from vqzoo.weights import refuse_bomb

__all__ = ["Encoder", "drawn_apart", "make_decoder", "make_timm_model", "normalisation"]

BATCH_NORMS = ("train", "frozen", "sync")
CHANNELS = 3  # of every image: red, green, blue


@contextmanager
def drawn_apart() -> Iterator[None]:
    """Draw what is initialised in this block from a seed of its own: what follows it depends on the seed before it alone."""
    seed = int(torch.randint(2**62, (), device="cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class Encoder(nn.Module):
    """Map images [B, 3, H, W] in [-1, 1] to latents [B, width, H/stride, W/stride] with any timm model.

    The deepest feature of the wanted stride is taken, the layers behind it are removed, and a 1x1 convolution
    gives it `width` channels. The images are normalised to the mean and std of the model's pretrained_cfg.
    `pretrained` is True for timm's own weights or the path of a weight file. `args` go to timm, except `mean` and
    `std`, which replace the pretrained_cfg's, and `grad_checkpointing`. `batch_norm` says what BatchNorm layers do:
    "train", "frozen" (statistics fixed, affine parameters trained) or "sync" (statistics over all processes).
    Raise UserError for every name, size, argument or weight file that does not fit.
    """

    def __init__(
        self,
        name: str,
        width: int,
        stride: int,
        resolution: tuple[int, int],
        pretrained: bool | str = False,
        args: dict | None = None,
        batch_norm: str = "train",
    ):
        super().__init__()
        if batch_norm not in BATCH_NORMS:
            raise UserError(f"encoder.batch_norm: {batch_norm!r} is unknown; {suggestion(batch_norm, BATCH_NORMS)}")
        grid_of(resolution, stride, "encoder")
        self.args = dict(args or {})
        args = dict(self.args)
        if args.get("in_chans", CHANNELS) != CHANNELS:
            raise UserError(f"encoder.args.in_chans: {args['in_chans']} for {name}, where images have {CHANNELS} channels")
        checkpointing = args.pop("grad_checkpointing", False)
        self.stride, self.width, self.name, self.frozen_batch_norm = stride, width, name, batch_norm == "frozen"
        self.model = make_timm_model(name, pretrained, args, resolution)
        self.feature, channels = _take_feature(self.model, name, stride)
        if batch_norm == "sync":
            self.model = convert_sync_batchnorm(self.model)
        channels_last(self.model)
        if checkpointing:
            _checkpoint_gradients(self.model, name)
        self.head = nn.Conv2d(channels, width, 1)
        config = self.model.pretrained_cfg
        strict = getattr(getattr(self.model, "patch_embed", None), "strict_img_size", config.get("fixed_input_size"))
        self.fixed_size = tuple(resolution) if strict else None
        for key, value in normalisation(self.model).items():
            self.register_buffer(key, value, persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """Map images in [-1, 1] to the range the model was made for."""
        return (images * 0.5 + 0.5 - self.mean) / self.std

    def portable(self) -> dict:
        """Return name and args that make this network without the hub or the folder that its name may refer to."""
        if ":" not in self.name:
            return {"name": self.name, "args": self.args}
        config = self.model.pretrained_cfg
        args = {part: config[part] for part in ("mean", "std") if config.get(part)}
        if config.get("fixed_input_size"):
            args["img_size"] = config["input_size"][-2:]
        return {"name": config["architecture"], "args": args | getattr(self.model, "_model_args", {}) | self.args}

    def train(self, mode: bool = True) -> "Encoder":
        """Set the training mode, in which frozen BatchNorm layers stay in evaluation."""
        super().train(mode)
        if self.frozen_batch_norm:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != CHANNELS:
            raise UserError(f"encoder: images are [B, {CHANNELS}, H, W] in [-1, 1] and these are {list(images.shape)}")
        size = tuple(images.shape[-2:])
        grid = grid_of(size, self.stride, "encoder")
        if self.fixed_size and size != self.fixed_size:
            raise UserError(
                f"encoder.name: {self.name} was built for {_by(self.fixed_size)} images and got {_by(size)}; "
                "where the model knows it, encoder.args: {dynamic_img_size: true} lifts this"
            )
        (features,) = self.model.forward_intermediates(
            self.normalise(images), indices=[self.feature], output_fmt="NCHW", intermediates_only=True
        )
        if tuple(features.shape[-2:]) != grid:
            raise UserError(
                f"encoder.name: {self.name} makes a {_by(features.shape[-2:])} grid of a {_by(size)} image where "
                f"stride {self.stride} needs {_by(grid)}; choose another encoder or image size"
            )
        return self.head(features)


def grid_of(size: Sequence[int], stride: int, key: str) -> tuple[int, int]:
    """Return the token grid (h, w) of an image size (H, W), or raise UserError naming `key`."""
    height, width = size
    if height % stride or width % stride:
        raise UserError(
            f"{key}.stride: an image of {_by(size)} cannot be divided by stride {stride}; "
            f"the nearest size that can is {_by([max(1, round(side / stride)) * stride for side in size])}"
        )
    return height // stride, width // stride


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _three(values: Sequence[float], key: str) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or len(values) != 3 or not all(isinstance(v, int | float) for v in values):
        raise UserError(f"{key}: {values!r} must be three numbers, one for each colour")
    return tuple(values)


def _weight_file(path: str, key: str) -> str:
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{key}.pretrained: no file {path!r}; give the path of a weight file, true or false")
    refuse_bomb(file, f"{key}.pretrained")
    return str(file)


def make_timm_model(
    name: str,
    pretrained: bool | str,
    args: dict,
    resolution: tuple[int, int] | None = None,
    key: str = "encoder",
    field: str = "name",
) -> nn.Module:
    """Create a timm model with its classifier, so that weights which do not fit are an error and not a warning.

    `args` go to timm, except `mean` and `std`, which replace the pretrained_cfg's. A model of one image size is made for
    `resolution`, if given. The recipe holds the name at `key`.`field`, as a UserError will say.
    """
    overlay = {part: _three(args[part], f"{key}.args.{part}") for part in ("mean", "std") if part in args}
    args = {part: value for part, value in args.items() if part not in overlay}
    if isinstance(pretrained, str):
        overlay["file"] = _weight_file(pretrained, key)
    if ":" not in name and not is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise UserError(
            f"{key}.{field}: timm knows no model {name!r}; {suggestion(name, {*near, vqgan_encoder.__name__})} "
            "and all of timm.list_models()"
        )
    try:
        config = get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(f"{key}.{field}: {name!r}: {error}") from error
    if resolution and config and config.fixed_input_size:
        args = {"img_size": tuple(resolution), **args}
    try:
        return timm.create_model(name, pretrained=bool(pretrained), pretrained_cfg_overlay=overlay, **args)
    except Exception as error:  # timm, its models and the hub raise every kind there is
        if not pretrained:
            raise UserError(f"{key}.args: {name} does not take {args}: {_brief(error)}") from error
        make_timm_model(name, False, args, resolution, key, field)  # blames the arguments if they are at fault
        raise _weights_error(name, pretrained, error, key) from error


def _weights_error(name: str, pretrained: bool | str, error: Exception, key: str) -> UserError:
    if pretrained is True:
        return MissingWeights(
            f"{key}.pretrained: the weights of {name}{_weights_source(name)} could not be had: {_brief(error)}; "
            "give the path of a weight file here, or false"
        )
    return UserError(
        f"{key}.pretrained: {pretrained!r} does not hold the weights of {name}: {_brief(error)}; "
        f"{key}.args: {{num_classes: 0}} ignores the classifier"
    )


def _weights_source(name: str) -> str:
    """Return where timm looks for a model's weights, as a part of a sentence."""
    config = get_pretrained_cfg(name)
    if config and config.hf_hub_id:
        return f" ({config.hf_hub_filename or 'model.safetensors'} of https://huggingface.co/{config.hf_hub_id})"
    return f" ({config.url})" if config and config.url else ""


def normalisation(model: nn.Module) -> dict[str, Tensor]:
    """Return the mean and the std [3, 1, 1] of the images that a timm model was made for."""
    config = model.pretrained_cfg
    return {key: torch.tensor(config.get(key) or (0.5,) * 3).view(3, 1, 1) for key in ("mean", "std")}


def channels_last(network: nn.Module) -> nn.Module:
    """Give a network's convolutions the layout that they prefer, where no GroupNorm would turn each of its maps back."""
    if not any(isinstance(module, nn.GroupNorm) for module in network.modules()):
        network.to(memory_format=torch.channels_last)
    return network


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def _take_feature(model: nn.Module, name: str, stride: int) -> tuple[int, int]:
    """Remove what lies behind the deepest feature of `stride`; return the feature's index and channels."""
    if not hasattr(model, "forward_intermediates"):
        raise UserError(f"encoder.name: {name} of timm {timm.__version__} gives no features; a newer timm may")
    features = list(model.feature_info)
    index = max((i for i, feature in enumerate(features) if feature["reduction"] == stride), default=None)
    if index is None:
        strides = sorted({feature["reduction"] for feature in features})
        raise UserError(
            f"encoder.stride: {name} has no feature of stride {stride}, but of {', '.join(map(str, strides))}; "
            "encoder.args may change them (patch_size of a ViT, mult and patch of vqgan_encoder)"
        )
    channels = features[index]["num_chs"]
    if hasattr(model, "prune_intermediate_layers"):
        (index,) = model.prune_intermediate_layers([index], prune_norm=True)
    return index, channels


def _checkpoint_gradients(model: nn.Module, name: str) -> None:
    try:
        model.set_grad_checkpointing()
    except (AttributeError, AssertionError) as error:
        raise UserError(f"encoder.args.grad_checkpointing: {name} has no gradient checkpointing") from error


# register_model reads the normalisation of a name from its module's variable of this name
default_cfgs = {"vqgan_encoder": {"mean": (0.5,) * 3, "std": (0.5,) * 3, "first_conv": None, "classifier": None}}


@register_model
def vqgan_encoder(pretrained: bool = False, **kwargs) -> nn.Module:
    """Build the convolutional encoder of the VQGAN lineage; timm calls this."""
    return build_model_with_cfg(
        VQGANEncoder,
        "vqgan_encoder",
        pretrained,
        feature_cfg={"feature_cls": "getter"},
        kwargs_filter=("num_classes", "global_pool"),
        **kwargs,
    )


class VQGANEncoder(nn.Module):
    """Halve the image once between levels, as the encoder of Open-MAGVIT2 and SimVQ (arXiv 2411.02038) does.

    Level i has width * mult[i] channels and stride patch * 2**i. The last one carries the middle blocks, the norm and
    the activation; a feature of a smaller stride is the plain output of its level. `patch` folds squares of pixels
    into channels first, which makes cheap encoders; 1 is the paper's.
    """

    def __init__(
        self,
        in_chans: int = 3,
        width: int = 128,
        mult: Sequence[int] = (1, 2, 2, 4),
        blocks: int = 2,
        patch: int = 1,
    ):
        super().__init__()
        widths = [width * m for m in mult]
        self.stem = nn.Sequential(nn.PixelUnshuffle(patch), _conv3(in_chans * patch**2, width, bias=False))
        self.stages = nn.Sequential()
        for level, out in enumerate(widths):
            before = widths[level - 1] if level else width
            down = [nn.Conv2d(before, before, 3, stride=2, padding=1)] if level else []
            self.stages.append(nn.Sequential(*down, *_res_blocks(before, out, blocks)))
        self.stages[-1].extend([*_res_blocks(widths[-1], widths[-1], blocks), *_norm_act(widths[-1])])
        self.feature_info = [
            {"num_chs": out, "reduction": patch * 2**level, "module": f"stages.{level}"}
            for level, out in enumerate(widths)
        ]
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Sequence[int] | int | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        take, last = feature_take_indices(len(self.stages), indices)
        features = []
        x = self.stem(x)
        for index, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = checkpoint(stage, x) if self.grad_checkpointing else stage(x)
            if index in take:
                features.append(x)
        return features if intermediates_only else (x, features)

    def prune_intermediate_layers(
        self, indices: Sequence[int] | int = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        return take

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))


class ResBlock(nn.Module):
    """Add two normalised, activated 3x3 convolutions to the input, without biases."""

    def __init__(self, before: int, out: int):
        super().__init__()
        self.body = nn.Sequential(
            *_norm_act(before), _conv3(before, out, bias=False), *_norm_act(out), _conv3(out, out, bias=False)
        )
        self.shortcut = nn.Identity() if before == out else nn.Conv2d(before, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


def _res_blocks(before: int, out: int, count: int) -> list[nn.Module]:
    return [ResBlock(before if i == 0 else out, out) for i in range(count)]


def _norm_act(channels: int) -> list[nn.Module]:
    return [nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6), nn.SiLU()]


def _conv3(before: int, out: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, out, 3, padding=1, bias=bias)


def make_decoder(
    name: str, width: int, stride: int, resolution: tuple[int, int], args: dict | None = None
) -> nn.Module:
    """Return a module from latents [B, width, h, w] to images [B, 3, h * stride, w * stride], not clamped.

    Its `last_layer` is the weight of its final convolution, which an adaptive GAN weight needs. "conv" mirrors
    vqgan_encoder, "vit" is a transformer; `args` are the arguments of ConvDecoder or ViTDecoder.
    """
    grid = grid_of(resolution, stride, "decoder")
    decoders = {"conv": ConvDecoder, "vit": partial(ViTDecoder, grid=grid)}
    if name not in decoders:
        raise UserError(f"decoder.name: {name!r} is unknown; {suggestion(name, decoders)}")
    try:
        return decoders[name](width, stride, **(args or {}))
    except (TypeError, ValueError, ArithmeticError, AssertionError, RuntimeError) as error:
        raise UserError(f"decoder.args: the {name} decoder does not take {args}: {_brief(error)}") from error


class ConvDecoder(nn.Module):
    """Mirror VQGANEncoder: middle blocks, then levels from deep to shallow with depth-to-space between them.

    Without `mult`, the number of levels follows from `stride`: 1, 2, 2, 4 times the width for stride 8.
    """

    def __init__(
        self,
        latent_width: int,
        stride: int,
        width: int = 128,
        mult: Sequence[int] | None = None,
        blocks: int = 2,
        patch: int = 1,
        grad_checkpointing: bool = False,
    ):
        super().__init__()
        widths = [width * m for m in mult or _default_mult(stride, patch)]
        reach = patch * 2 ** (len(widths) - 1)
        if reach != stride:
            raise UserError(
                f"decoder.args: {len(widths)} levels and patch {patch} enlarge by {reach}, the encoder's stride is "
                f"{stride}; mult needs one entry more than the halvings that remain after patch"
            )
        deepest = widths[-1]
        with drawn_apart():
            first = _conv3(latent_width, deepest)
        self.conv_in = nn.Sequential(first, *_res_blocks(deepest, deepest, blocks))
        self.stages = nn.ModuleList()
        for level in reversed(range(len(widths))):
            before, out = widths[min(level + 1, len(widths) - 1)], widths[level]
            up = [_conv3(out, 4 * out), nn.PixelShuffle(2)] if level else _norm_act(out)
            self.stages.append(nn.Sequential(*_res_blocks(before, out, blocks), *up))
        self.conv_out = _conv3(widths[0], 3 * patch**2)
        self.pixels = nn.PixelShuffle(patch)
        self.grad_checkpointing = grad_checkpointing

    @property
    def last_layer(self) -> nn.Parameter:
        return self.conv_out.weight

    def forward(self, latents: Tensor) -> Tensor:
        x = self.conv_in(latents)
        for stage in self.stages:
            x = checkpoint(stage, x) if self.grad_checkpointing else stage(x)
        return self.pixels(self.conv_out(x))


def _default_mult(stride: int, patch: int) -> tuple[int, ...]:
    levels = int(math.log2(max(1, stride // patch))) + 1
    return (1,) * (levels - 4) + (1, 2, 2, 4)[:levels]


class ViTDecoder(nn.Module):
    """Decode each token to stride x stride pixels by a transformer, and smooth the seams by a 3x3 convolution.

    The position embedding is learned on the recipe's token grid and resized to any other.
    """

    def __init__(
        self,
        latent_width: int,
        stride: int,
        grid: tuple[int, int],
        width: int = 384,
        depth: int = 8,
        heads: int = 6,
        grad_checkpointing: bool = False,
    ):
        super().__init__()
        with drawn_apart():
            self.embed = nn.Conv2d(latent_width, width, 1)
        self.position = nn.Parameter(trunc_normal_(torch.empty(1, width, *grid), std=0.02))
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.to_pixels = nn.Linear(width, 3 * stride**2)
        self.pixels = nn.PixelShuffle(stride)
        self.conv_out = _conv3(3, 3)
        self.grad_checkpointing = grad_checkpointing

    @property
    def last_layer(self) -> nn.Parameter:
        return self.conv_out.weight

    def forward(self, latents: Tensor) -> Tensor:
        grid = latents.shape[-2:]
        position = self.position
        if position.shape[-2:] != grid:
            position = F.interpolate(position, grid, mode="bicubic")
        x = (self.embed(latents) + position).flatten(2).mT
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        x = self.to_pixels(self.norm(x)).mT.unflatten(2, grid)
        return self.conv_out(self.pixels(x))
