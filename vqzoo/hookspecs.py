"""The hooks: every place at which vqzoo asks plugins, in the order in which a run meets them. This is the plugin manual.

Letters: B images on this process, N tokens per image on a grid (h, w), M tokens of one optimizer step over all processes
and micro-batches, D code width, K codebook size, Q codes per token. Images are [B, 3, H, W] in [-1, 1]. Losses are 0-dim
and already weighted. An implementation names the arguments that it wants, without defaults, and leaves out the rest.

Latents are what `codebook.from_encoder` makes of the encoder's output, which is that output itself unless the codebook says
otherwise, and codes are what `codebook.to_decoder` leads on to the decoder: all hooks work in the codebook's own space.
Where a codebook keeps several tables, K stands for the rows of them all wherever codes are counted or overwritten, and
`codebook.rows_of(indices)` for the rows that indices name.

`one(...)` hooks have exactly one provider per stage, bound by the recipe's `hooks:` or because there is no other; an
implementation marked `@hookimpl(trylast=True)` yields to another. `many` hooks call every contributor, in the order of
the recipe's `plugins:`, whatever the order of a list under `hooks:`. A `@hookimpl(wrapper=True)` implementation receives what
was returned (`result = yield`) and returns what it makes of it; of two wrappers the one named first under `plugins:` is the
outer.

Tensors that an implementation is given are there to be read: it works on a copy, and only `refresh_codes` and `enter_stage`
change codes. One that writes to them, raises, or returns another type, shape, dtype or device than is said here ends the run
with a `vqzoo.PluginError` that names it; a `vqzoo.UserError` passes as it is. Before training, each stage's quantizer is tried
on latents of N(0, 1): codes and losses must be finite, indices in [0, K), and evaluation must answer alike twice.
"""

from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("vqzoo")
one = hookspec(firstresult=True)
many = hookspec

REQUIRED = ("make_codebook", "quantize", "straight_through", "embedding_loss", "reconstruction_loss")
"""The hooks without whose provider nothing can be trained."""

DOORS = ("make_dataset", "make_metric")
"""The hooks by which a recipe's `data.name` or `evaluate.metrics` reaches a plugin; no stage asks or routes them."""

ONCE = ("make_codebook", "make_discriminator")
"""The hooks that are asked once, before the first stage, and so are routed for the whole run."""


@one
def make_codebook(size: int, width: int) -> Any:
    """Return a `vqzoo.Codebook` of K = size codes; width is what the recipe says of it, D unless the method has its own.

    Called once, before the networks exist: `encoder_width` and `decoder_width` of the codebook decide how wide they are on its
    sides. A method of its own D leads from width to D in `from_encoder` and back in `to_decoder`. A wrapper may give anyone's
    codebook a buffer. A ValueError says that there can be no such codebook.
    """


@one
def quantize(latents: Any, codebook: Any, grid: tuple[int, int], progress: Any) -> Any:
    """Choose a code for each latent and return `vqzoo.Quantized`.

    latents [B, N, D] float32, N = h·w in row-major order of grid. Called in each forward, with autocast off. In evaluation
    progress is None, the result must depend on latents and codebook only, and no process may wait for another.
    """


@one
def straight_through(latents: Any, codes: Any, extras: dict) -> Any:
    """Return what the decoder sees [B, N, D]: the value of codes with a gradient for latents.

    Called in each training forward, with autocast off; in evaluation the decoder sees the codes themselves.
    """


@one
def embedding_loss(latents: Any, codes: Any, indices: Any, extras: dict, codebook: Any, progress: Any) -> dict:
    """Return the losses that tie latents and codebook together, by name; {} for none.

    latents [B, N, D] and codes [B, N, D] are those before the straight-through estimator. Called in each training forward, with
    autocast off. A term that only moves the encoder is left out when latents do not require a gradient.
    """


@many
def reconstruction_loss(images: Any, reconstructions: Any, discriminator: Any, last_layer: Any, progress: Any) -> dict:
    """Return the losses on what the decoder made, by name.

    discriminator is None without one; its parameters take no gradient here. last_layer is the decoder's last weight, for
    adaptive weights. A wrapper receives the list of all dicts and returns such a list. Called in each training step.
    """


@one
def make_discriminator() -> Any:
    """Return the discriminator, an `nn.Module`. Called once, before training; it gets an optimizer of its own."""


@one
def discriminator_loss(images: Any, reconstructions: Any, discriminator: Any, progress: Any) -> dict:
    """Return the discriminator's losses by name.

    reconstructions [B, 3, H, W] are detached. Called in each training step, after the tokenizer's own optimizer step.
    """


@many
def refresh_codes(
    codebook: Any,
    latents: Any,
    indices: Any,
    counts: Any,
    epoch_counts: Any,
    extras: dict,
    progress: Any,
    generator: Any,
) -> Any:
    """Change the codebook outside gradient descent and return how many codes were replaced (or None).

    Called without grad after each optimizer step, on every process with the same generator state; it must do the same on all.
    latents [M, D] and indices [M] or [M, Q] are those of the whole step in sample order, gathered only if somebody asks;
    counts [K] int64 are its assignments over all processes and epoch_counts [K] those since the epoch's start; extras are this
    process's, joined over micro-batches. Without indices, indices and counts are None, and epoch_counts zeros. Rows are only
    ever changed through `codebook.replace_`, which also clears what the optimizer knows of them; with smooth=True, for a small
    step from what was there, it does not. The number is shown as codes/replaced. The latents are from before the optimizer's
    step, the codes from after it.
    """


@many
def stage_transition(stage: str, progress: Any) -> Any:
    """Return True, or a reason in words, when the stage has done its work.

    Called at each epoch's end after refresh_codes, on every process with the same arguments; any such answer ends the stage.
    """


@many
def enter_stage(leaving: Any, entering: str, tokenizer: Any, batches: Any, generator: Any) -> None:
    """Prepare for a stage: start the codebook from data, for example.

    leaving is None before the first stage. The codebook may be changed, encoder and decoder not, which may lie in pieces.
    batches iterates over training images [B, 3, H, W] of this process, endlessly. Called without grad before the entering
    stage's optimizer exists; not when a run resumes.
    """


@many
def report(progress: Any) -> dict:
    """Return numbers to show beside the losses, by name: floats or 0-dim tensors, of this process.

    Called without grad on every process, whenever losses are logged; the main process's numbers are written to TensorBoard.
    """


@one
def make_dataset(split: str) -> Any:
    """Return the images of a split, "train" or "val": a sequence of Pillow images, or of paths of image files.

    Called for each split when `data.name` is the plugin's name; `data.args` are its fields. The sequence has a length and is
    indexed from 0, in any order and by several worker processes. An item that raises, or that is no image, is left out as a
    file that does not decode is. A method `name(index)`, if there is one, names an item in messages, the same in each run.
    The host crops, resizes and shuffles.
    """


@one
def make_metric() -> Any:
    """Return a `torchmetrics.Metric` whose update takes reconstructions and images, both [B, 3, H, W] in [0, 1].

    Called once per run when `evaluate.metrics` has the plugin's name; `evaluate.args.NAME` are its fields. Images are as the
    protocol has them, rounded to 8 bits. compute gives a number, which the result has under the plugin's name, or a dict of
    them, each under NAME_KEY; higher_is_better says which value is better, if the best tokenizer is chosen by it.
    """
