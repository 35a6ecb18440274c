"""What a recipe will do, said without training it."""

import torch

from vqzoo.codebook import Codebook
from vqzoo.hookspecs import DOORS
from vqzoo.manager import all_hooks, make_manager
from vqzoo.memory import gib, predict_memory
from vqzoo.ops import plan, use
from vqzoo.prepare import Prepared, enter, make_accelerator, prepare, tokens
from vqzoo.recipe import Recipe
from vqzoo.tokenizer import Tokenizer


def explain(recipe: Recipe) -> str:
    """Return who serves which hook in each stage, the sizes, the token grid and the predicted memory.

    Everything that `vqzoo run` checks before training is checked here too.
    """
    ready = prepare(recipe, make_accelerator(recipe))
    train, val, steps, tokenizer = ready.train_data, ready.val_data, ready.steps_per_epoch, ready.tokenizer
    memory = predict_memory(tokenizer, recipe, ready.accelerator.num_processes)
    codebook = tokenizer.codebook
    height, width = recipe.data.resolution
    grid = (height // recipe.encoder.stride, width // recipe.encoder.stride)
    lines = [
        f"data        {_length(train)} training and {_length(val)} held-out images, {height}x{width} pixels",
        *(f"            {note}" for note in (*train.notes, *val.notes)),
        f"tokens      {grid[0]}x{grid[1]} = {grid[0] * grid[1]} per image (stride {recipe.encoder.stride})",
        f"codebook    {type(codebook).__name__}, {_codes(codebook)}",
        f"parameters  encoder {_parameters(tokenizer.encoder)}, decoder {_parameters(tokenizer.decoder)}, "
        f"codebook {_parameters(codebook)}",
        f"schedule    {recipe.epochs} epochs of {steps} steps of {recipe.data.batch_size} images",
        *_operations(recipe, ready),
        *_measures(recipe, ready),
        f"kept        {_kept(recipe)}",
        f"memory      {gib(memory.states)} weights, gradients, moments and average + {gib(memory.activations)} activations "
        "per process, without losses' and discriminators' own",
    ]
    return "\n".join(lines + [line for number in range(len(recipe.stages)) for line in _stage(tokenizer, recipe, number)])


def _operations(recipe: Recipe, ready: Prepared) -> list[str]:
    """Say what would do the work of the operations on codes, and in how much memory beside inputs and results."""
    count, codebook = tokens(recipe, ready.accelerator), ready.tokenizer.codebook
    with use(recipe.ops.backend, recipe.ops.precision):
        plans = plan(ready.accelerator.device, count, codebook.rows, codebook.width)
    found = "; ".join(f"{one.operation} {one.backend}, {one.bytes / 2**20:,.0f} MiB" for one in plans)
    lines = [f"operations  of {count:,} latents and {codebook.rows:,} codes, where plugins use them: {found}"]
    if recipe.ops.precision == "fast":
        lines.append("            fast: a search may miss the nearest code; a run shows how often, as search_disagreement")
    return lines


def _measures(recipe: Recipe, ready: Prepared) -> list[str]:
    """Say what is measured, by which protocol, and what will be missing."""
    config, evaluator = recipe.evaluate, ready.evaluator
    lines = [f"evaluation  protocol {config.protocol}: {', '.join(map(evaluator.name_of, config.metrics))}; every "
             f"{config.epochs} epochs on {config.images or 'all'} images, at the end on all"]
    return lines + [f"            {name} will be missing: {why}" for name, why in evaluator.missing.items()]


def _kept(recipe: Recipe) -> str:
    """Say when checkpoints are written, which stay, and what becomes of bad updates."""
    due, guard = recipe.checkpoint, recipe.guard
    steps = f" and every {due.steps} steps" if due.steps else ""
    spike = f" or {guard.spike:g} times the usual" if guard.spike else ""
    stay = f"the last {due.keep}{' and the best' if due.keep_best else ''}"
    return f"a checkpoint every {due.epochs} epochs{steps}, {stay}; updates that are not finite{spike}: {guard.policy}"


def _stage(tokenizer: Tokenizer, recipe: Recipe, number: int) -> list[str]:
    stage = recipe.stages[number]
    enter(tokenizer, recipe, number)
    length = "the rest" if stage.epochs is None else f"at most {stage.epochs} epochs"
    lines = ["", f"stage {stage.name}: {length}; frozen: {', '.join(stage.freeze) or 'nothing'}"]
    for hook in (one for one in all_hooks(make_manager(tokenizer.plugins)) if one.name not in DOORS):
        lines.append(f"  {hook.name:<20} {', '.join(tokenizer.hooks.providers(hook.name)) or '–'}")
    return lines


def _codes(codebook: Codebook) -> str:
    """Say how many codes there are, how wide they are, and how wide it is on both sides."""
    tables = f"{codebook.tables} tables of " if codebook.tables > 1 else ""
    sides = {codebook.encoder_width, codebook.decoder_width} - {codebook.width}
    between = f", between {codebook.encoder_width} channels of the encoder and {codebook.decoder_width} of the decoder"
    return f"{tables}{codebook.size:,} codes of width {codebook.width}{between if sides else ''}"


def _parameters(module: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"


def _length(dataset: object) -> str:
    try:
        return f"{len(dataset):,}"
    except TypeError:
        return "a stream of"


