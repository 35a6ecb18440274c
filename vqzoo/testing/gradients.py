"""Checks of losses and gradients: what they reach, and that they add up."""

import torch
from torch import Tensor, nn

from vqzoo.plugin import Progress
from vqzoo.testing.check import IMAGES, RUN, check, fail
from vqzoo.testing.passage import EARLY, LATE, Passage, from_latents, judge_of, not_finite, passed
from vqzoo.testing.reference import REFERENCE
from vqzoo.testing.subject import Subject
from vqzoo.testing.training import Training
from vqzoo.tokenizer import Tokenizer

CLOSE, NEAR = 1e-3, 1e-5
"""Relative and absolute differences that rounding explains."""


@check("The decoder trains on something else than evaluation will show it: let straight_through return the value of codes, as "
       "latents + (codes - latents).detach() does.", ("straight_through",))
def decoder_sees_the_codes(subject: Subject) -> None:
    tokenizer = subject.tokenizer()
    whole = passed(tokenizer, subject.features(tokenizer), subject.grid)
    codes, seen = whole.found.codes.detach(), whole.seen.detach()
    scale = float(codes.abs().max() + whole.latents.detach().abs().max())
    if (apart := float((seen - codes).abs().max())) > CLOSE * scale:
        fail(f"what the decoder sees is {apart:.3g} away from the codes, whose elements reach {float(codes.abs().max()):.3g}")


@check("The encoder learns nothing from the reconstruction: let straight_through lead the decoder's gradient to the latents, "
       "finite and not zero.", ("straight_through",))
def latents_get_a_gradient(subject: Subject) -> None:
    tokenizer = subject.tokenizer()
    features = subject.features(tokenizer).requires_grad_()
    whole = passed(tokenizer, features, subject.grid)
    _refuse_bad(_gradient(whole.given.square().sum(), features), "the latents")


@check("A parameter never moves: let a loss or what the decoder sees reach it, or make it a buffer if it is constant.", RUN)
def every_parameter_is_trained(subject: Subject) -> None:
    training = Training(subject, subject.tokenizer()).begin()
    wanted = {f"plugins.{subject.name}.{name}" for name, p in training.tokenizer.plugins[subject.name].named_parameters()
              if p.requires_grad}
    if subject.provides("make_codebook"):
        wanted |= {f"codebook.{name}" for name, p in training.tokenizer.codebook.named_parameters() if p.requires_grad}
    for _ in range(4 if wanted else 0):
        training.step()
    if idle := wanted - training.reached:
        fail(f"no gradient reaches {', '.join(sorted(idle))} in 4 steps")


@check("A stage that freezes encoder or codebook fails or carries dead weight: leave out a loss whose latents or codes require "
       "no gradient (`requires_grad`), and let the others be.", ("embedding_loss",))
def frozen_parts_are_no_obstacle(subject: Subject) -> None:
    tokenizer = subject.tokenizer()
    latents = tokenizer.codebook.from_encoder(subject.features(tokenizer)).detach()
    whole = from_latents(tokenizer, latents, latents, subject.grid)
    _refuse_not_finite(whole, "a frozen encoder")
    if dead := [name for name, loss in whole.losses.items() if not loss.requires_grad]:
        fail(f"with a frozen encoder, the loss {', '.join(dead)} has no gradient: it moves nothing")
    whole.backward()
    for module in (tokenizer.codebook, tokenizer.plugins):
        module.requires_grad_(False)
    features = subject.features(tokenizer).requires_grad_()
    whole = passed(tokenizer, features, subject.grid)
    _refuse_not_finite(whole, "a frozen codebook")
    whole.backward()


@check("A recipe with `accumulate` trains something else than one without: let a loss be a mean over the batch, not a sum, and "
       "keep no batch's statistics in it.", ("embedding_loss", "reconstruction_loss", "discriminator_loss"))
def micro_batches_add_up(subject: Subject) -> None:
    tokenizer = subject.tokenizer()
    features, images = subject.features(tokenizer), subject.images()
    judge, made = judge_of(tokenizer), tokenizer(images, LATE).reconstructions.detach()

    def losses(part: slice) -> dict[str, Tensor]:
        torch.manual_seed(0)
        found = passed(tokenizer, features[part], subject.grid).losses if "embedding_loss" in subject.offered else {}
        return {**found, **_of_images(tokenizer, images[part], made[part].clone().requires_grad_(), judge)}

    whole, halves = losses(slice(None)), [losses(slice(0, 2)), losses(slice(2, 4))]
    for name, value in whole.items():
        mean = sum(float(half[name].detach()) if name in half else torch.nan for half in halves) / 2
        if not abs(float(value.detach()) - mean) <= CLOSE * abs(mean) + NEAR:
            fail(f"the loss {name!r} of 4 images is {float(value.detach()):.6g}, the mean of that of 2 and 2 is {mean:.6g}")


@check("A reconstruction_loss pulls at nothing, or not with finite numbers: let its gradient reach the reconstructions.",
       ("reconstruction_loss",))
def reconstructions_get_a_gradient(subject: Subject) -> None:
    tokenizer, images = subject.tokenizer(), subject.images()
    own, made = _own_losses(subject, tokenizer, images, tokenizer(images, LATE).reconstructions)
    if own:
        _refuse_bad(_gradient(sum(own.values()), made), "the reconstructions")


@check("A perfect reconstruction, or images of one colour, end the run: keep eps inside of roots and logarithms, whose "
       "gradient at zero is not finite.", ("reconstruction_loss",))
def perfect_reconstructions_are_no_obstacle(subject: Subject) -> None:
    tokenizer, images = subject.tokenizer(), subject.images()
    for name, shown in (("perfect reconstructions", images), ("images of one colour", torch.full_like(images, 0.5))):
        # through the last layer, which adaptive weights ask for
        made = shown + 0 * tokenizer(shown, LATE).reconstructions
        own, made = _own_losses(subject, tokenizer, shown, made)
        if bad := not_finite(own):
            fail(f"the loss {', '.join(bad)} of {name}")
        if own and not _gradient(sum(own.values()), made).isfinite().all():
            fail(f"the gradient of {', '.join(own)} at {name}")


@check("Training the discriminator moves something else, or not all of it: let discriminator_loss lead a gradient to each of "
       "the discriminator's parameters, and to none of the tokenizer's or the plugin's.",
       ("make_discriminator", "discriminator_loss"))
def discriminator_alone_is_trained(subject: Subject) -> None:
    tokenizer, images = subject.tokenizer(), subject.images()
    judge = judge_of(tokenizer)
    wanted = {name for name, p in judge.named_parameters() if p.requires_grad} if judge is not None else set()
    for number in range(3):
        made = tokenizer(images, LATE).reconstructions.detach() + 0.1 * number
        sum(tokenizer.discriminator_losses(images, made, judge, LATE).values()).backward()
    idle = {name for name, p in judge.named_parameters() if name in wanted and p.grad is None}
    if idle:
        fail(f"no gradient reaches {', '.join(sorted(idle))} of the discriminator")
    if moved := [name for name, p in tokenizer.named_parameters() if p.grad is not None]:
        fail(f"a gradient reaches {', '.join(moved)}")


@check("A hook that judges images takes no other number or layout of them: let it take any batch, channels-last ones too.",
       IMAGES)
def any_batch_of_images_will_do(subject: Subject) -> None:
    tokenizer = subject.tokenizer()
    judge = judge_of(tokenizer)
    for count in (1, 3):
        images = subject.images(count)
        made = tokenizer(images, LATE).reconstructions
        plain = _of_images(tokenizer, images, made, judge)
        last = {"memory_format": torch.channels_last}
        other = _of_images(tokenizer, images.contiguous(**last), made.contiguous(**last), judge)
        for name, value in plain.items():
            if name not in other or not torch.allclose(value, other[name], rtol=CLOSE, atol=NEAR):
                fail(f"the loss {name!r} of {count} images is another one where they are channels-last")


def _of_images(tokenizer: Tokenizer, images: Tensor, made: Tensor, judge: nn.Module | None,
               progress: Progress = LATE) -> dict[str, Tensor]:
    """Return the losses on images and reconstructions, each plugin's, and those of the discriminator."""
    if not made.requires_grad or made.is_leaf:  # as the decoder's last layer makes them
        made = made + 0 * tokenizer.decoder.last_layer.sum()
    found = {name: loss for losses in tokenizer.reconstruction_losses(images, made, judge, progress)
             for name, loss in losses.items()}
    if judge is not None and tokenizer.hooks.providers("discriminator_loss"):
        found |= tokenizer.discriminator_losses(images, made.detach(), judge, progress)
    return found


def _own_losses(
    subject: Subject, tokenizer: Tokenizer, images: Tensor, made: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Return what the plugin, not the reference, makes of reconstructions, and these; a discriminator takes no gradient."""
    judge = judge_of(tokenizer)
    if judge is not None:
        judge.requires_grad_(False)
    found = [losses for progress in (EARLY, LATE)
             for losses in tokenizer.reconstruction_losses(images, made, judge, progress)]
    return {name: loss for losses in found for name, loss in losses.items() if name != REFERENCE}, made


def _gradient(value: Tensor, of: Tensor) -> Tensor:
    """Return the gradient of a 0-dim value, zeros where there is none."""
    if not value.requires_grad:
        return torch.zeros_like(of)
    (found,) = torch.autograd.grad(value, of, allow_unused=True)
    return torch.zeros_like(of) if found is None else found


def _refuse_bad(gradient: Tensor, what: str) -> None:
    if not gradient.isfinite().all():
        fail(f"the gradient that reaches {what} is not finite")
    if not gradient.any():
        fail(f"no gradient reaches {what}")


def _refuse_not_finite(whole: Passage, where: str) -> None:
    if bad := not_finite(whole.losses):
        fail(f"the loss {', '.join(bad)} with {where}")
