"""Checks of the search for codes and of evaluation: what is returned, and what it may depend on."""

import random
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vqzoo.answers import check_left, check_vectors
from vqzoo.plugin import Quantized
from vqzoo.testing.check import CODEBOOK, IMAGES, RUN, check, fail
from vqzoo.testing.passage import (
    EARLY,
    LATE,
    ask,
    at_end,
    changed,
    evaluated,
    judge_of,
    not_finite,
    of_step,
    out_of_range,
    passed,
    same,
    state_of,
    weights_of,
)
from vqzoo.testing.subject import Subject
from vqzoo.testing.training import Training, seed
from vqzoo.tokenizer import Tokenizer


@check("A hook raises, or returns something else than vqzoo.hookspecs says: codes and latents are float32 [B, N, D] and losses "
       "0-dim, for any number of images and any grid, in training and in evaluation, where progress is None.", CODEBOOK)
def shapes_and_types_fit(subject: Subject) -> None:
    tokenizer = subject.tokenizer()
    check_vectors(tokenizer.hooks, tokenizer.codebook)
    for count, (height, width) in ((4, subject.resolution), (1, subject.resolution), (2, (16, 8)), (3, (8, 24))):
        images = subject.images(count)[:, :, :height, :width].contiguous()
        for progress in (EARLY, LATE):
            output = tokenizer.train()(images, progress)
        check_left(tokenizer.hooks, tokenizer.codebook.to_decoder(output.codes), output.codes, tokenizer.codebook.decoder_width)
        with torch.inference_mode():
            tokenizer.eval()(images)


@check("An index is not in [0, K): the lookup of a code then fails, on a GPU in words that name no cause. Return int64 indices "
       "of the K codes that the codebook has.", ("make_codebook", "quantize"))
def indices_are_in_range(subject: Subject) -> None:
    tokenizer = subject.tokenizer()
    for scale in (1.0, 1e-3, 100.0):
        features = scale * subject.features(tokenizer)
        trained = passed(tokenizer, features, subject.grid)
        for found in (trained.found, evaluated(tokenizer, trained.latents, subject.grid)):
            if said := out_of_range(found, tokenizer.codebook):
                fail(f"{said} (latents of N(0, 1) times {scale:g})")


@check("Whoever has the indices alone gets other codes: in evaluation, let quantize return exactly codebook.lookup(indices), "
       "bit for bit.", ("make_codebook", "quantize"))
def codes_are_those_of_the_indices(subject: Subject) -> None:
    tokenizer, found = _evaluated(subject)
    if found.indices is None:
        return
    codes = tokenizer.codebook.lookup(found.indices)
    if not same(found.codes, codes):
        fail(f"codes {list(found.codes.shape)} that differ from the lookup's {list(codes.shape)} by as much as "
             f"{_difference(found.codes, codes)}")


@check("Decoding gives another image than the forward from which the indices come: lookup and to_decoder must make of indices "
       "what evaluation shows the decoder, bit for bit.", ("make_codebook", "quantize"))
@torch.no_grad()
def decoding_gives_what_the_forward_gave(subject: Subject) -> None:
    tokenizer, images = subject.tokenizer().eval(), subject.images()
    whole = tokenizer(images)
    if whole.indices is None:
        return
    decoded = tokenizer.decode(tokenizer.encode(images))
    if not same(decoded, whole.reconstructions):
        fail(f"images that differ by as much as {_difference(decoded, whole.reconstructions)}")


@check("Evaluation leaves traces: whatever is measured or shown would change what is trained. Change buffers in training alone "
       "(self.training, or progress is not None), and draw nothing at random in evaluation.", CODEBOOK)
def evaluation_changes_nothing(subject: Subject) -> None:
    tokenizer, images = subject.tokenizer().eval(), subject.images()
    before, drawn = state_of(tokenizer), _random_state()
    with torch.no_grad():
        if tokenizer(images).indices is not None:
            tokenizer.encode(images)
    if moved := changed(before, state_of(tokenizer)):
        fail(f"{', '.join(sorted(moved))} changed")
    for name, one, other in zip(("torch", "numpy", "random"), drawn, _random_state(), strict=True):
        if one != other:
            fail(f"random numbers of {name} were drawn")


@check("The same latents get other codes at another time: in evaluation, quantize depends on latents and codebook alone, not "
       "on chance, on calls before or on whether gradients are recorded.", ("make_codebook", "quantize"))
def evaluation_depends_on_nothing_else(subject: Subject) -> None:
    tokenizer, first = _evaluated(subject)
    latents = tokenizer.codebook.from_encoder(subject.features(tokenizer)).detach()
    seed(1234)
    again = evaluated(tokenizer, latents, subject.grid)
    _compare(first, again, "another state of the random numbers")
    passed(tokenizer, subject.features(tokenizer, seed=5), subject.grid)
    _compare(first, evaluated(tokenizer, latents, subject.grid), "a training forward between")
    tokenizer.eval()
    with_gradient = ask(tokenizer, "quantize", latents=latents.clone().requires_grad_(), codebook=tokenizer.codebook,
                        grid=subject.grid)
    _compare(first, with_gradient, "latents that require a gradient")


@check("An image's codes depend on the others of its batch, so that they are nobody's own: in evaluation, let no statistic of "
       "the batch decide.", ("make_codebook", "quantize"))
def each_image_is_judged_alone(subject: Subject) -> None:
    tokenizer, whole = _evaluated(subject)
    features = subject.features(tokenizer)
    latents = tokenizer.codebook.from_encoder(features).detach()
    for number in range(len(features)):
        one = slice(number, number + 1)
        entered = tokenizer.codebook.from_encoder(features[one]).detach()
        if not torch.allclose(entered, latents[one], rtol=1e-4, atol=1e-5):
            fail(f"from_encoder makes other latents of one image alone; they differ by {_difference(entered, latents[one])}")
        alone = evaluated(tokenizer, latents[one], subject.grid)
        _compare(Quantized(whole.codes[one], None if whole.indices is None else whole.indices[one]), alone, "the image alone")


@check("The order in which numbers lie in memory changes the result, or is refused: use reshape or flatten instead of view, "
       "and let no stride decide.", CODEBOOK)
def layout_of_memory_makes_no_difference(subject: Subject) -> None:
    tokenizer = subject.tokenizer()
    features = subject.features(tokenizer)
    latents = tokenizer.codebook.from_encoder(features).detach()
    plain, whole = evaluated(tokenizer, latents, subject.grid), passed(tokenizer, features.clone(), subject.grid)
    layouts = {"transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
               "a slice of more": lambda x: torch.stack([x, x], -1)[..., 0]}
    for name, laid in layouts.items():
        _compare(plain, evaluated(tokenizer, laid(latents), subject.grid), f"{name} latents")
        losses = passed(tokenizer, laid(features), subject.grid).losses
        for key, value in losses.items():
            if not torch.allclose(value, whole.losses[key], rtol=1e-4, atol=1e-6):
                fail(f"the loss {key!r} is another one where latents are {name}")


@check("What a hook is given belongs to others, who read it afterwards: work on a copy, without `.data`, and change codes in "
       "refresh_codes and enter_stage alone, by codebook.replace_.", RUN)
def what_is_given_is_only_read(subject: Subject) -> None:
    tokenizer = subject.tokenizer()
    for hook, arguments in _arguments(subject, tokenizer).items():
        if hook not in subject.offered:
            continue
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        tensors |= {f"extras[{name!r}]": value for name, value in arguments.get("extras", {}).items()}
        before, codes = {name: value.detach().clone() for name, value in tensors.items()}, state_of(tokenizer.codebook)
        ask(tokenizer, hook, **arguments)
        if moved := [name for name, value in tensors.items() if not same(value.detach(), before[name])]:
            fail(f"{hook} changed {', '.join(moved)}")
        learned = {name for name, value in codes.items() if value.shape[:1] == (tokenizer.codebook.rows,)}
        moved = learned & set(changed(codes, state_of(tokenizer.codebook)))
        if moved and hook != "refresh_codes":
            fail(f"{hook} changed codebook.{', codebook.'.join(moved)}")


@check("A loss or a code is not finite although images and weights are usual ones: look for a division by zero, a root or a "
       "logarithm of it, or an overflow of exp.", (*CODEBOOK, *IMAGES))
def losses_are_finite(subject: Subject) -> None:
    training = Training(subject, subject.tokenizer()).begin()
    for step in range(4):
        if bad := not_finite(training.step()):
            fail(f"the loss {', '.join(bad)} at step {step}")
    if bad := not_finite(weights_of(training.tokenizer)):
        fail(f"{', '.join(bad)} after 4 steps of plain gradient descent")


def _evaluated(subject: Subject) -> tuple[Tokenizer, Quantized]:
    """Return a tokenizer and what it quantizes the usual latents to."""
    tokenizer = subject.tokenizer()
    latents = tokenizer.codebook.from_encoder(subject.features(tokenizer)).detach()
    return tokenizer, evaluated(tokenizer, latents, subject.grid)


def _compare(one: Quantized, other: Quantized, what: str) -> None:
    if one.indices is not None and other.indices is not None and not same(one.indices, other.indices):
        share = float((one.indices != other.indices).float().mean())
        fail(f"{share:.1%} of the indices are others with {what}")
    if not torch.allclose(one.codes, other.codes.detach(), rtol=1e-4, atol=1e-5):
        fail(f"codes differ by as much as {_difference(one.codes, other.codes)} with {what}")


def _difference(one: Tensor, other: Tensor) -> str:
    return f"{float((one.detach() - other.detach()).abs().max()):.2g}" if one.shape == other.shape else "their shape"


def _random_state() -> tuple[bytes, bytes, str]:
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), keys.tobytes() + repr((kind, rest)).encode(), repr(random.getstate())


def _arguments(subject: Subject, tokenizer: Tokenizer) -> dict[str, dict]:
    """Return the arguments of each hook that only reads, such as one training step gives.

    They are new to the hook: what one clamps is not clamped already, since it was asked before.
    """
    codebook, images, judge = tokenizer.codebook, subject.images(2), judge_of(tokenizer)
    whole = passed(tokenizer, subject.features(tokenizer, 2).requires_grad_(), subject.grid)
    latents, codes, made = map(_shaken, (whole.latents, whole.found.codes, tokenizer(images, LATE).reconstructions))
    found = replace(whole.found, codes=codes, extras={name: _shaken(value) for name, value in whole.found.extras.items()})
    both = {"latents": latents, "codes": codes, "extras": found.extras}
    return {
        "quantize": {"latents": latents, "codebook": codebook, "grid": subject.grid, "progress": LATE},
        "straight_through": both,
        "embedding_loss": {**both, "indices": found.indices, "codebook": codebook, "progress": LATE},
        "reconstruction_loss": {"images": images, "reconstructions": made, "discriminator": judge, "progress": LATE,
                                "last_layer": tokenizer.decoder.last_layer},
        "discriminator_loss": {"images": images, "reconstructions": made.detach(), "discriminator": judge, "progress": LATE},
        "refresh_codes": of_step(tokenizer, latents, found) | {"progress": at_end(tokenizer),
                                                               "generator": torch.Generator().manual_seed(0)},
    }


def _shaken(value: Tensor) -> Tensor:
    """Return other numbers of the same kind, in their graph."""
    return 3 * value + torch.randn_like(value) if value.is_floating_point() else value.clone()
