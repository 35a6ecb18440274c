"""Checks of what machines differ in: devices, precision, compilers, memory."""

import gc
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vqzoo.testing.check import CODEBOOK, IMAGES, RUN, Skipped, check, fail
from vqzoo.testing.passage import LATE, ask, at_end, evaluated, judge_of, not_finite, of_step, passed
from vqzoo.testing.subject import Subject, place_of
from vqzoo.testing.training import Training
from vqzoo.tokenizer import Tokenizer

FACTORIES = (torch.arange, torch.as_tensor, torch.empty, torch.eye, torch.full, torch.from_numpy, torch.linspace, torch.ones,
             torch.rand, torch.randint, torch.randn, torch.randperm, torch.scalar_tensor, torch.tensor, torch.zeros)
"""What makes a tensor out of none, on the CPU unless it is told where."""

ACROSS = (Tensor.__getitem__, Tensor.__setitem__, Tensor.copy_)
"""What takes tensors of two devices at once."""

FIRST, LAST = 25, 100
"""The steps after which memory is compared."""

HALVES = (torch.bfloat16, torch.float16)


class Strays(TorchFunctionMode):
    """Find tensors that are made without `device=` and meet one that is given: on a GPU they would not fit together."""

    def __init__(self, file: Path | None):
        super().__init__()
        self.file = file
        self.found: list[str] = []

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        tensors = [x for x in _leaves((args, kwargs)) if isinstance(x, Tensor)]
        if function in FACTORIES:
            if kwargs.get("device") is None and not tensors and isinstance(made, Tensor) and made.dim():
                made.stray = f"torch.{function.__name__}{self._place()}"
            return made
        strays = [x.stray for x in tensors if hasattr(x, "stray")]
        if not strays:
            return made
        if _moves(function, args, kwargs):
            return made[...] if hasattr(made, "stray") else made  # on a CPU, it is the same tensor
        if any(x.dim() and not hasattr(x, "stray") for x in tensors):
            if function not in ACROSS:
                self.found += strays
        elif isinstance(made, Tensor) and made.dim():
            made.stray = strays[0]
        return made

    def _place(self) -> str:
        frame = sys._getframe(2)
        while frame is not None and Path(frame.f_code.co_filename) != self.file:
            frame = frame.f_back
        return f" at {self.file.name}:{frame.f_lineno}" if frame is not None else ""


def _moves(function: Callable, args: tuple, kwargs: dict) -> bool:
    """Tell whether a function takes a tensor to where another one is, or to a device that it is told."""
    if function in (Tensor.cuda, Tensor.cpu, Tensor.type_as):
        return True
    told = (*args[1:], *kwargs.values())
    return function is Tensor.to and any(isinstance(value, torch.device | str | Tensor) for value in told)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in _leaves(part)]
    return [leaf for part in value.values() for leaf in _leaves(part)] if isinstance(value, dict) else [value]


@check("A tensor is made on the CPU wherever the others are: give torch.arange, torch.zeros and their like "
       "`device=latents.device`, or register it as a buffer.", RUN)
def tensors_are_made_on_the_device(subject: Subject) -> None:
    tokenizer = subject.tokenizer()
    judge, images = judge_of(tokenizer), subject.images(2)
    features = subject.features(tokenizer, 2)
    with Strays(place_of(subject.kind)) as strays:
        answers = _everything(subject, tokenizer, judge, images, features)
    returned = [value.stray for value in _leaves(answers) if hasattr(value, "stray")]
    if found := list(dict.fromkeys([*strays.found, *returned])):
        fail(f"{', '.join(found)}, without device=")
    if torch.cuda.is_available():
        device = torch.device("cuda")
        judge = judge if judge is None else judge.to(device)
        _everything(subject, tokenizer.to(device), judge, images.to(device), features.to(device))


def _everything(subject: Subject, tokenizer: Tokenizer, judge: nn.Module | None, images: Tensor, features: Tensor) -> Any:
    """Ask every hook of a run once; return the tensors of the answers."""
    grid, device = subject.grid, features.device
    generator = torch.Generator(device).manual_seed(0)
    whole = passed(tokenizer, features.clone().requires_grad_(), grid)
    found = evaluated(tokenizer, whole.latents.detach(), grid)
    made = tokenizer(images, LATE).reconstructions
    losses = tokenizer.reconstruction_losses(images, made, judge, LATE)
    if tokenizer.hooks.providers("discriminator_loss"):
        losses.append(tokenizer.discriminator_losses(images, made.detach(), judge, LATE))
    whole.backward()
    with torch.no_grad():
        told = at_end(tokenizer)
        ask(tokenizer, "refresh_codes", **of_step(tokenizer, whole.latents, found), progress=told, generator=generator)
        ask(tokenizer, "stage_transition", stage=told.stage, progress=told)
        batches = (batch.to(device) for batch in subject.batches())
        ask(tokenizer.eval(), "enter_stage", entering=subject.stages[0], tokenizer=tokenizer, batches=batches,
            generator=generator)
    return [found.codes, found.indices, found.extras, whole.found.extras, whole.given, whole.losses, losses]


@check("Half precision, in which the networks and the losses on images run, makes a loss fail or move: compute in float32 "
       "(`.float()`, or torch.autocast(..., enabled=False)) what cannot bear 8 bits.", (*CODEBOOK, *IMAGES))
def half_precision_changes_little(subject: Subject) -> None:
    whole = _losses_under(subject, None)
    for kind in HALVES:
        half = _losses_under(subject, kind)
        if bad := not_finite(half):
            fail(f"the loss {', '.join(bad)} in {kind}")
        for name, value in whole.items():
            one, other = float(value), float(half.get(name, torch.nan))
            if not abs(one - other) <= 0.1 * abs(one) + 0.02:
                fail(f"the loss {name!r} is {other:.4g} in {kind} and {one:.4g} in float32")


def _losses_under(subject: Subject, kind: torch.dtype | None) -> dict[str, Tensor]:
    """Return the losses of a training step's forward under autocast; its gradients must be finite, too."""
    torch.manual_seed(0)
    tokenizer, images = subject.tokenizer(), subject.images()
    judge = judge_of(tokenizer)
    with torch.autocast("cpu", kind, enabled=kind is not None):
        output = tokenizer(images, LATE)
        found = [output.losses, *tokenizer.reconstruction_losses(images, output.reconstructions, judge, LATE)]
        if judge is not None and tokenizer.hooks.providers("discriminator_loss"):
            found.append(tokenizer.discriminator_losses(images, output.reconstructions.detach(), judge, LATE))
    losses = {name: loss for part in found for name, loss in part.items()}
    sum(losses.values()).backward()
    bad = not_finite({name: p.grad for name, p in tokenizer.named_parameters() if p.grad is not None})
    if bad and kind is not torch.float16:  # whose gradients a scaler would scale
        fail(f"the gradient of {', '.join(bad)} in {kind or 'float32'}")
    return {name: loss.detach() for name, loss in losses.items()}


@check("`compile: true` does not work with the plugin: take no second gradient through encoder or decoder (create_graph=True), "
       "which torch.compile does not have.", (*CODEBOOK, *IMAGES))
def compiled_networks_train_alike(subject: Subject) -> None:
    import torch._dynamo  # deferred, since it is slow to load

    if not torch._dynamo.is_dynamo_supported():
        raise Skipped("this Python or machine has no torch.compile")
    results = []
    for compiled in (False, True):
        tokenizer = subject.tokenizer()
        if compiled:  # traced as for the compiler, which would take a minute to write its code
            tokenizer._compiled = {name: torch.compile(getattr(tokenizer, name), dynamic=False, backend="aot_eager")
                                   for name in ("encoder", "decoder")}
        training = Training(subject, tokenizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append({name: loss.detach() for name, loss in training.step().items()})
    torch._dynamo.reset()
    for name, value in results[0].items():
        if not torch.allclose(value, results[1][name], rtol=1e-3, atol=1e-5):
            fail(f"the loss {name!r} is {float(results[1][name]):.5g}, and {float(value):.5g} where nothing is compiled")


@check("Memory grows from step to step: keep no list of what was seen, and detach() what a buffer or an attribute takes from a "
       "loss, or its whole graph stays.", RUN)
def memory_stays_flat(subject: Subject) -> None:
    tokenizer = subject.tokenizer()
    judge, images = judge_of(tokenizer), subject.images(1)
    features = subject.features(tokenizer, 1).requires_grad_()
    made = tokenizer(images, LATE).reconstructions.detach()
    sizes = []
    for step in range(1, LAST + 1):
        _pass(subject, tokenizer, judge, images, made, features)
        if step in (FIRST, LAST):
            gc.collect()
            sizes.append(_alive())
    if sizes[1]["tensors"] >= sizes[0]["tensors"] + (LAST - FIRST) // 2 or sizes[1]["bytes"] > 1.5 * sizes[0]["bytes"] + 2**20:
        fail(f"{sizes[0]['tensors']} tensors of {sizes[0]['bytes']:,} bytes after {FIRST} steps, {sizes[1]['tensors']} of "
             f"{sizes[1]['bytes']:,} after {LAST}")
    if sizes[1]["nodes"] > sizes[0]["nodes"] + LAST - FIRST:
        fail(f"a graph of {sizes[0]['nodes']} operations is held after {FIRST} steps, of {sizes[1]['nodes']} after {LAST}")


def _pass(subject: Subject, tokenizer: Tokenizer, judge: nn.Module | None, images: Tensor, made: Tensor,
          features: Tensor) -> None:
    """Ask the hooks of a training step, without the networks, and go backward."""
    tokenizer.zero_grad()
    whole = passed(tokenizer, features, subject.grid)
    total = whole.given.mean() + sum(whole.losses.values())
    if "reconstruction_loss" in subject.offered or "discriminator_loss" in subject.offered:
        shown = made + 0 * tokenizer.decoder.last_layer.sum()
        found = tokenizer.reconstruction_losses(images, shown, judge, LATE)
        if judge is not None and tokenizer.hooks.providers("discriminator_loss"):
            found.append(tokenizer.discriminator_losses(images, made, judge, LATE))
        total = total + sum(loss for losses in found for loss in losses.values())
    total.backward()
    if "refresh_codes" in subject.offered:
        with torch.no_grad():
            ask(tokenizer, "refresh_codes", **of_step(tokenizer, whole.latents, whole.found), progress=LATE,
                generator=torch.Generator().manual_seed(0))
        tokenizer.codebook.take_replaced()


def _alive() -> dict[str, int]:
    """Count the tensors that are alive, their bytes, and the operations of the graphs that they hold."""
    tensors = [value for value in gc.get_objects() if issubclass(type(value), Tensor)]
    seen, waiting = set(), [value.grad_fn for value in tensors if value.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    sizes = (value.numel() * value.element_size() for value in tensors)
    return {"tensors": len(tensors), "bytes": sum(sizes), "nodes": len(seen)}
