"""Sharding by FSDP2: encoder and decoder lie in pieces over the processes, all else whole on each of them.

Where nothing is sharded, every function is the identity or what torch does anyway. Encoder and decoder are roots of their
own, so that each may be called by anybody and the codebook cannot be sharded by accident.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from vqzoo.ops import all_reduce_sum, broadcast


def make_plugin() -> FullyShardedDataParallelPlugin:
    """Return accelerate's plugin for FSDP2: blocks are gathered one by one, and autocast alone lowers the precision.

    Whatever is not said here, the launcher may say.
    """
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", mixed_precision_policy=MixedPrecisionPolicy(),
        cpu_offload=False, activation_checkpointing=False,  # which would give parameters other names
        cpu_ram_efficient_loading=False,  # which knows neither buffers nor parameters that stay whole
    )


def shard(networks: Iterable[nn.Module], accelerator: Accelerator) -> None:
    """Cut the parameters of networks into pieces, in place; optimizers are made after it, and copies before."""
    for network in networks:
        network.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other
        same_everywhere(network)
        blocks = {type(module).__name__ for module in network.modules() if type(module).__name__.endswith("Block")}
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(blocks)
        # accelerate takes no module without an optimizer; a second time, it would mistake empty pieces for one another
        accelerator.prepare(network, torch.optim.SGD(network.parameters()))
        _keep_gathered(network, blocks=False)


@torch.no_grad()
def same_everywhere(module: nn.Module) -> None:
    """Give every process the first one's parameters, as DDP does, and buffers."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.copy_(broadcast(tensor))


# ---- running what is sharded


def _networks(module: nn.Module) -> list[FSDPModule]:
    """Return the sharded networks of a module; of a block within one of them, the network speaks."""
    if isinstance(module, FSDPModule):
        return [module]
    return [network for child in module.children() for network in _networks(child)]


def _parts(module: nn.Module) -> list[FSDPModule]:
    """Return the sharded networks of a module and the blocks in them."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _keep_gathered(network: FSDPModule, blocks: bool) -> None:
    """Say whether blocks stay gathered after a forward; what lies outside them does, as `last_layer` must for its gradient."""
    network.set_reshard_after_forward(not blocks)
    network.set_reshard_after_forward(False, recurse=False)


def reshard(module: nn.Module) -> None:
    """Free what a forward without backward left gathered, of which optimizers and averages know nothing."""
    for part in _parts(module):
        part.reshard()


@contextmanager
def whole(module: nn.Module) -> Iterator[Any]:
    """Gather a module for a block in which each process runs it as often as it likes; all must enter it.

    What the block writes into the gathered parameters is lost.
    """
    for network in _networks(module):
        _keep_gathered(network, blocks=True)
    for part in _parts(module):
        part.unshard()
    try:
        yield module
    finally:
        reshard(module)
        for network in _networks(module):
            _keep_gathered(network, blocks=False)


@contextmanager
def no_sync(module: nn.Module) -> Iterator[None]:
    """Let gradients add up on each process."""
    for network in _networks(module):
        network.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        for network in _networks(module):
            network.set_requires_gradient_sync(True)


# ---- pieces of tensors


def local(tensor: Tensor) -> Tensor:
    """Return the piece of a tensor that lies here, which is all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, other: Tensor | None) -> Tensor:
    """Cut a whole tensor, the same on every process, as another one is cut."""
    if not isinstance(other, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a module's whole tensors, as `load_state_dict` does."""
    own = module.state_dict()
    module.load_state_dict({name: like(value, own.get(name)) for name, value in tensors.items()})


@torch.no_grad()
def full(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Put tensors together, one after the other and on the host; all must call it, and only those that `keep` get them."""
    found = {}
    for name, tensor in tensors.items():
        value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = value.cpu() if isinstance(tensor, DTensor) else value
    return found


def export(tokenizer: Any, folder: Path, main: bool) -> None:
    """Have the main process write a tokenizer's exported form; all must call it."""
    tensors = full(tokenizer.state_dict(), main)
    if main:
        handle = tokenizer.register_state_dict_post_hook(lambda module, state, *_: state.update(tensors))
        try:
            tokenizer.save_pretrained(folder)
        finally:
            handle.remove()


# ---- gradients, whole ones and pieces


@torch.no_grad()
def average_gradients(gradients: list[Tensor], processes: int) -> None:
    """Average gradients that are whole over all processes; FSDP2 has done so for the others."""
    rest = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    if rest:
        mean = all_reduce_sum(torch.cat([gradient.flatten() for gradient in rest])) / processes
        for gradient, part in zip(rest, mean.split([gradient.numel() for gradient in rest]), strict=True):
            gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def norms(gradients: list[Tensor]) -> list[Tensor]:
    """Return the norm of each gradient, of all its pieces."""
    found = list(torch._foreach_norm([local(gradient) for gradient in gradients]))
    cut = [number for number, gradient in enumerate(gradients) if isinstance(gradient, DTensor)]
    if cut:
        total = all_reduce_sum(torch.stack([found[number] for number in cut]).square()).sqrt()
        for number, value in zip(cut, total.unbind(), strict=True):
            found[number] = value
    return found


@torch.no_grad()
def clip(gradients: list[Tensor], most: float, norm: Tensor) -> None:
    """Scale gradients of a common norm down to at most `most`, as torch's clip_grads_with_norm_ does."""
    torch._foreach_mul_([local(gradient) for gradient in gradients], (most / (norm + 1e-6)).clamp(max=1.0))
