"""What a recipe will do, said without training it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vqzoo.manager import all_hooks, make_manager
from vqzoo.ops import plan, use
from vqzoo.plugin import Progress
from vqzoo.prepare import Prepared, enter, prepare, tokens
from vqzoo.recipe import Recipe
from vqzoo.tokenizer import Tokenizer


@dataclass
class Memory:
    """Predicted bytes of a training step on one process: weights with gradients, moments and average, and activations."""

    states: int
    activations: int


def explain(recipe: Recipe) -> str:
    """Return who serves which hook in each stage, the sizes, the token grid and the predicted memory.

    Everything that `vqzoo run` checks before training is checked here too.
    """
    ready = prepare(recipe)
    train, val, steps, tokenizer = ready.train_data, ready.val_data, ready.steps_per_epoch, ready.tokenizer
    memory = predict_memory(tokenizer, recipe)
    codebook = tokenizer.codebook
    height, width = recipe.data.resolution
    grid = (height // recipe.encoder.stride, width // recipe.encoder.stride)
    lines = [
        f"data        {_length(train)} training and {_length(val)} held-out images, {height}x{width} pixels",
        f"tokens      {grid[0]}x{grid[1]} = {grid[0] * grid[1]} per image (stride {recipe.encoder.stride})",
        f"codebook    {type(codebook).__name__}, {codebook.size:,} codes of width {codebook.width}",
        f"parameters  encoder {_parameters(tokenizer.encoder)}, decoder {_parameters(tokenizer.decoder)}, "
        f"codebook {_parameters(codebook)}",
        f"schedule    {recipe.epochs} epochs of {steps} steps of {recipe.data.batch_size} images",
        *_operations(recipe, ready),
        *_measures(recipe, ready),
        f"memory      {_gib(memory.states)} weights, gradients, moments and average + {_gib(memory.activations)} activations "
        "per process, without losses' and discriminators' own",
    ]
    return "\n".join(lines + [line for number in range(len(recipe.stages)) for line in _stage(tokenizer, recipe, number)])


def _operations(recipe: Recipe, ready: Prepared) -> list[str]:
    """Say what would do the work of the operations on codes, and in how much memory beside inputs and results."""
    count, codebook = tokens(recipe, ready.accelerator), ready.tokenizer.codebook
    with use(recipe.ops.backend, recipe.ops.precision):
        plans = plan(ready.accelerator.device, count, codebook.size, codebook.width)
    found = "; ".join(f"{one.operation} {one.backend}, {one.bytes / 2**20:,.0f} MiB" for one in plans)
    lines = [f"operations  of {count:,} latents and {codebook.size:,} codes, where plugins use them: {found}"]
    if recipe.ops.precision == "fast":
        lines.append("            fast: a search may miss the nearest code; a run shows how often, as search_disagreement")
    return lines


def _measures(recipe: Recipe, ready: Prepared) -> list[str]:
    """Say what is measured, by which protocol, and what will be missing."""
    config, evaluator = recipe.evaluate, ready.evaluator
    lines = [f"evaluation  protocol {config.protocol}: {', '.join(map(evaluator.name_of, config.metrics))}; every "
             f"{config.epochs} epochs on {config.images or 'all'} images, at the end on all"]
    return lines + [f"            {name} will be missing: {why}" for name, why in evaluator.missing.items()]


def _stage(tokenizer: Tokenizer, recipe: Recipe, number: int) -> list[str]:
    stage = recipe.stages[number]
    enter(tokenizer, recipe, number)
    length = "the rest" if stage.epochs is None else f"at most {stage.epochs} epochs"
    lines = ["", f"stage {stage.name}: {length}; frozen: {', '.join(stage.freeze) or 'nothing'}"]
    for hook in all_hooks(make_manager(tokenizer.plugins)):
        lines.append(f"  {hook.name:<20} {', '.join(tokenizer.hooks.providers(hook.name)) or '–'}")
    return lines


def predict_memory(tokenizer: Tokenizer, recipe: Recipe) -> Memory:
    """Predict a step's memory from one forward of one image, by the tensors that its backward would keep."""
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (*tokenizer.parameters(), *tokenizer.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    progress = Progress(0, 0, recipe.stages[0].name, 0, 0, 1)
    image = torch.zeros(1, 3, *recipe.data.resolution, device=next(tokenizer.parameters()).device)
    tokenizer.eval()  # no statistic may move; the graph is the same
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tokenizer(image, progress)
    trained = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad)
    constant = sum(t.numel() for t in (*tokenizer.parameters(), *tokenizer.buffers())) - trained
    average = 1 if recipe.ema else 0
    micro = max(1, recipe.data.batch_size // recipe.accumulate)
    return Memory(4 * (trained * (4 + average) + constant * (1 + average)), sum(kept.values()) * micro)


def _parameters(module: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _length(dataset: object) -> str:
    try:
        return f"{len(dataset):,}"
    except TypeError:
        return "a stream of"


