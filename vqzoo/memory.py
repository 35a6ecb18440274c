"""Memory: what a training step is predicted to need, and what to turn when there is not enough."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from vqzoo.errors import SHORT
from vqzoo.ops import plan, use
from vqzoo.plugin import Progress
from vqzoo.prepare import tokens
from vqzoo.recipe import Recipe
from vqzoo.tokenizer import Tokenizer


@dataclass
class Memory:
    """Predicted bytes of a training step on one process: weights with gradients, moments and average, and activations."""

    states: int
    activations: int


def predict_memory(tokenizer: Tokenizer, recipe: Recipe, processes: int = 1) -> Memory:
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
    micro = max(1, recipe.data.batch_size // (recipe.accumulate * processes))
    return Memory(4 * (trained * (4 + average) + constant * (1 + average)), sum(kept.values()) * micro)


def is_shortage(error: BaseException) -> bool:
    """Tell whether an error says that memory is short, of a GPU or of the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in SHORT)


def advice(recipe: Recipe, tokenizer: Tokenizer, accelerator: Accelerator, error: BaseException) -> str:
    """Return what is predicted to need how much memory, the largest part first, and which keys make it smaller."""
    said = str(error).partition("\n")[0] or type(error).__name__
    parts, codebook = {}, tokenizer.codebook
    try:
        with use(recipe.ops.backend, recipe.ops.precision):
            plans = plan(accelerator.device, tokens(recipe, accelerator), codebook.rows, codebook.width)
        parts |= {f"{one.operation} by ops.backend {one.backend}, where a plugin uses it": one.bytes for one in plans}
        predicted = predict_memory(tokenizer, recipe, accelerator.num_processes)
        parts |= {"activations of a micro-batch": predicted.activations,
                  "weights, gradients, moments and average": predicted.states}
    except (RuntimeError, MemoryError, ValueError):  # not even one image fits beside what is there
        parts |= {"activations of even one image": 0}
    largest = sorted(parts, key=parts.get, reverse=True)
    table = "".join(f"\n  {gib(parts[name]):>10}  {name}" for name in largest)
    return (f"out of memory: {said}\npredicted per process:{table}\nlargest: {largest[0]}. To need less: "
            f"accumulate={2 * recipe.accumulate} (smaller micro-batches, the same step), less data.batch_size, precision=bf16, "
            "ops.backend=chunked or triton (which never build latents × codes; a plugin that does so by itself needs a smaller "
            "codebook.size), more processes, and shard=true on several GPUs (encoder and decoder in pieces)")


def gib(size: int) -> str:
    """Return a number of bytes in GiB."""
    return f"{size / 2**30:.2f} GiB"
