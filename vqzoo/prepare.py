"""Making ready: everything that a run needs, and everything that can be wrong with it, before the first step."""

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import parse_flag_from_env, patch_environment
from torch import nn

from vqzoo.data import ImageDataset, StreamDataset, make_dataset, train_batches
from vqzoo.errors import PluginRaised, UserError, suggestion
from vqzoo.evaluation import CROPS, PROTOCOLS
from vqzoo.evaluation.evaluate import Evaluator
from vqzoo.hookspecs import ONCE
from vqzoo.ops import plan, use
from vqzoo.plugin import Progress
from vqzoo.recipe import Recipe
from vqzoo.sharding import make_plugin
from vqzoo.stage import check_scale, stage_hooks
from vqzoo.tokenizer import Tokenizer

FSDP = "ACCELERATE_USE_FSDP"
"""What `accelerate launch --use_fsdp` sets."""


@dataclass
class Prepared:
    """Carry what a run starts from; `kept` names the tensors that `init_from` did not fill."""

    accelerator: Accelerator
    train_data: ImageDataset | StreamDataset
    val_data: ImageDataset | StreamDataset
    steps_per_epoch: int
    tokenizer: Tokenizer
    discriminator: nn.Module | None
    evaluator: Evaluator
    kept: list[str]


def prepare(recipe: Recipe, accelerator: Accelerator) -> Prepared:
    """Open the data and build the networks of a recipe; a UserError names whatever could not work."""
    with use(recipe.ops.backend, recipe.ops.precision):
        return _prepare(recipe, accelerator)


def _prepare(recipe: Recipe, accelerator: Accelerator) -> Prepared:
    check_backend(recipe, accelerator)
    if recipe.compile:
        check_compiler(accelerator.device)
    train, val = make_dataset(recipe.data, "train"), make_dataset(recipe.data, "val")
    val.crop = CROPS[PROTOCOLS[recipe.evaluate.protocol].crop]
    steps = epoch_length(recipe, train)
    train_batches(recipe.data, train, recipe.seed, 0, 0, accelerator.num_processes, recipe.accumulate).close()
    tokenizer = build(recipe)
    if accelerator.num_processes > 1:
        _check_batch_norm(tokenizer.encoder, recipe.encoder.batch_norm, accelerator.device)
    kept = init_from(tokenizer, recipe.init_from) if recipe.init_from else []
    discriminator = make_discriminator(tokenizer, recipe)
    _rehearse_losses(tokenizer, discriminator, recipe, accelerator)
    evaluator = Evaluator(recipe.evaluate, accelerator.device)
    return Prepared(accelerator, train, val, steps, tokenizer, discriminator, evaluator, kept)


def build(recipe: Recipe) -> Tokenizer:
    """Build a recipe's tokenizer and prove that every one of its stages can be wired; the first stage is left wired."""
    torch.manual_seed(recipe.seed)
    tokenizer = Tokenizer.from_recipe(recipe)
    tokenizer.rehearse_networks()
    check_scale(recipe.optim, [name for name, _ in tokenizer.named_parameters()])
    _check_named_stages(tokenizer, [stage.name for stage in recipe.stages])
    for number in reversed(range(len(recipe.stages))):
        enter(tokenizer, recipe, number)
        _rehearse(tokenizer, recipe, number)
    return tokenizer


def _check_named_stages(tokenizer: Tokenizer, stages: list[str]) -> None:
    for name, plugin in tokenizer.plugins.items():
        for key, pattern in ((key, pattern) for key, patterns in plugin.named_stages().items() for pattern in patterns):
            if not any(fnmatch(stage, pattern) for stage in stages):
                raise UserError(f"plugins.{name}.{key}: there is no stage {pattern!r}; {suggestion(pattern, stages)}")


def enter(tokenizer: Tokenizer, recipe: Recipe, number: int) -> None:
    """Bind the hooks of a stage and freeze what it freezes."""
    stage = recipe.stages[number]
    keys = {name: f"stages[{number}].hooks.{name}" for name in stage.hooks}
    for name in set(ONCE) & set(keys):
        raise UserError(f"{keys[name]}: this hook is asked once, before the first stage; route it under the recipe's `hooks`")
    tokenizer.wire(stage_hooks(recipe, stage), keys)
    tokenizer.freeze(stage.freeze, f"stages[{number}].freeze")
    if tokenizer.hooks.providers("discriminator_loss") and not tokenizer.hooks.providers("make_discriminator"):
        raise UserError(f"{keys.get('discriminator_loss', 'hooks.discriminator_loss')}: there is no discriminator, since "
                        "nobody serves make_discriminator; take its plugin out, or route make_discriminator to it")
    if not any(parameter.requires_grad for parameter in tokenizer.parameters()):
        raise UserError(f"stages[{number}].freeze: nothing is left to train")


def make_discriminator(tokenizer: Tokenizer, recipe: Recipe) -> nn.Module | None:
    """Make the discriminator of the stage that is wired, if anybody serves one."""
    hooks = tokenizer.hooks
    if not hooks.providers("make_discriminator"):
        return None
    discriminator = hooks.answer("make_discriminator", hooks.make_discriminator(), nn.Module)
    names = [name for name, _ in discriminator.named_parameters()]
    check_scale(recipe.discriminator_optim, names, "discriminator_optim.scale")
    return discriminator


def _rehearse(tokenizer: Tokenizer, recipe: Recipe, number: int) -> None:
    """Refuse a stage in which a plugin watches a loss that nobody returns."""
    hooks, stage = tokenizer.hooks, recipe.stages[number].name
    try:
        returned = tokenizer.rehearse(Progress(0, 0, stage, 0, 0, 1))
    except PluginRaised as error:
        if not isinstance(error.__cause__, ValueError):
            raise
        raise UserError(f"stages[{number}]: these plugins do not go together, or not with these sizes: {error}") from error
    for hook in ("reconstruction_loss", "discriminator_loss"):
        returned |= {name for plugin in hooks.plugins(hook) for name in plugin.loss_names()}
    for name, plugin in zip(hooks.providers("stage_transition"), hooks.plugins("stage_transition"), strict=True):
        for missing in set(plugin.watched_losses()) - returned:
            raise UserError(
                f"stages[{number}].hooks.stage_transition: {name} watches the loss {missing!r}, which nobody returns in stage "
                f"{stage!r} (returned: {', '.join(sorted(returned)) or 'none'}); route it away with stage_transition: []"
            )


def _rehearse_losses(tokenizer: Tokenizer, discriminator: nn.Module | None, recipe: Recipe, accelerator: Accelerator) -> None:
    """Ask for each stage's losses on images once, as late in a run as can be: weights that are missing are found before it.

    Leaves the modules on the device that trains them, since collectives of plugins may know no other.
    """
    count = min(2, max(1, recipe.data.batch_size // (recipe.accumulate * accelerator.num_processes)))
    images = torch.zeros(count, 3, *recipe.data.resolution, device=accelerator.device)
    modules = [module.to(images.device) for module in (tokenizer, discriminator) if module is not None]
    buffers = [buffer for module in modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    rehearsed = []
    for number in reversed(range(len(recipe.stages))):
        enter(tokenizer, recipe, number)
        served = [tokenizer.hooks.providers(hook) for hook in ("reconstruction_loss", "discriminator_loss")]
        served.append(tokenizer.decoder.last_layer.requires_grad)
        if served not in rehearsed:
            rehearsed.append(served)
            try:
                _rehearse_stage(tokenizer, discriminator, images, recipe.stages[number].name)
            except (PluginRaised, RuntimeError, ValueError) as error:
                if isinstance(error, PluginRaised) and not isinstance(error.__cause__, RuntimeError | ValueError):
                    raise
                servers = ", ".join(dict.fromkeys([*served[0], *served[1]]))
                raise UserError(f"stages[{number}]: the losses of {servers} cannot be had for {count} image(s) of "
                                f"{images.shape[2]}x{images.shape[3]} per process and micro-batch: {error}") from error
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


def _rehearse_stage(tokenizer: Tokenizer, discriminator: nn.Module | None, images: torch.Tensor, stage: str) -> None:
    progress, device = Progress(2**40, 2**40, stage, 2**40, 2**40, 1), images.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        tokenizer.train()
        codes = torch.zeros(len(images), tokenizer.codebook.decoder_width, *tokenizer.grid, device=device)
        reconstructions = tokenizer.decoder(codes)
        tokenizer.reconstruction_losses(images, reconstructions, discriminator, progress)
        if discriminator is not None and tokenizer.hooks.providers("discriminator_loss"):
            tokenizer.discriminator_losses(images, reconstructions.detach(), discriminator, progress)
    tokenizer.report(progress)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Make the Accelerator of a recipe; a UserError where the hardware lacks its precision or does not shard."""
    if recipe.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision: 'fp16' needs a GPU; use bf16 or no on this machine")
    if parse_flag_from_env(FSDP) and not recipe.shard:
        raise UserError(f"shard: false, but the launcher chose FSDP ({FSDP}); set shard=true, or launch without it")
    # Every process refreshes the codebook alike, so DDP must not broadcast buffers over it.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    fsdp = make_plugin() if recipe.shard else None
    with patch_environment(**{FSDP: recipe.shard}):  # which accelerate would set for all later runs, too
        accelerator = Accelerator(mixed_precision=recipe.precision, kwargs_handlers=[ddp], fsdp_plugin=fsdp,
                                  cpu=not torch.cuda.is_available())
    if accelerator.is_fsdp2 != recipe.shard:
        raise UserError(f"shard: {str(recipe.shard).lower()} will not do here; accelerate shards between processes on GPUs, "
                        "as torchrun or `accelerate launch` start them, and in one process all runs or none")
    accelerator.gradient_accumulation_steps = 1  # the recipe's `accumulate` counts, not the launcher's environment
    return accelerator


def check_backend(recipe: Recipe, accelerator: Accelerator) -> None:
    """Refuse a backend that the device or the codes' width rules out."""
    try:
        plan(accelerator.device, tokens(recipe, accelerator), recipe.codebook.size, recipe.codebook.width)
    except ValueError as error:
        raise UserError(f"ops.{error}") from error


def tokens(recipe: Recipe, accelerator: Accelerator) -> int:
    """Return how many latents a process quantizes at a time."""
    images = max(1, recipe.data.batch_size // (recipe.accumulate * accelerator.num_processes))
    height, width = recipe.data.resolution
    return images * max(1, height // recipe.encoder.stride) * max(1, width // recipe.encoder.stride)


def check_compiler(device: torch.device) -> None:
    """Compile a trifle; a UserError where torch.compile finds no compiler or no Python of its own."""
    try:
        torch.compile(lambda x: (x * 2).sin())(torch.ones(4, device=device))
    except Exception as error:  # each of its parts fails in its own way
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        needs = "Triton" if device.type == "cuda" else "a C++ compiler and Python's headers"
        raise UserError(f"compile: torch.compile does not work here: {lines[0]}; it needs {needs}; or set "
                        "compile=false") from error


def epoch_length(recipe: Recipe, dataset: Any) -> int:
    """Return the optimizer steps of an epoch: `epoch_steps`, or one pass over the data."""
    if recipe.epoch_steps:
        return recipe.epoch_steps
    if not hasattr(dataset, "__len__"):
        raise UserError(f"epoch_steps: {recipe.data.name} is a stream without a length; set the steps of an epoch")
    return max(1, len(dataset) // recipe.data.batch_size)


def init_from(tokenizer: Tokenizer, folder: str) -> list[str]:
    """Start from another run's weights: every tensor of the same name and shape is taken; return the names of the rest."""
    try:
        source = Tokenizer.from_pretrained(folder).state_dict()
    except UserError as error:
        raise UserError(f"init_from: {error}") from error
    own = tokenizer.state_dict()
    fitting = {name: value for name, value in source.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise UserError(f"init_from: {folder}: no tensor has the name and shape of one of this recipe's")
    tokenizer.load_state_dict(fitting, strict=False)
    return [name for name in own if name not in fitting]


def _check_batch_norm(encoder: nn.Module, choice: str, device: torch.device) -> None:
    """Refuse, for several processes, statistics that each would gather alone or that CPUs cannot share."""
    present = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules())
    if present and choice == "train":
        raise UserError("encoder.batch_norm: 'train' would give each process statistics of its own; use 'sync' on GPUs or "
                        "'frozen'")
    if present and choice == "sync" and device.type == "cpu":
        raise UserError("encoder.batch_norm: 'sync' works on GPUs only; use 'frozen' with several processes on CPU")
