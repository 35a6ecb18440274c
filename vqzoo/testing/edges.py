"""Checks of inputs and sizes at the edge."""

import torch
from torch import Tensor

from vqzoo.testing.check import CODEBOOK, Skipped, check, fail
from vqzoo.testing.passage import Passage, evaluated, from_latents, not_finite, out_of_range, passed
from vqzoo.testing.subject import Subject
from vqzoo.testing.training import Training
from vqzoo.tokenizer import Tokenizer


@check("One image of one token is a batch, too: look for a squeeze() that takes a dimension of 1 away, or a statistic that "
       "needs two.", CODEBOOK)
def one_token_is_enough(subject: Subject) -> None:
    tokenizer = subject.tokenizer()
    features = subject.features(tokenizer)[:1, :1].requires_grad_()
    whole = passed(tokenizer, features, (1, 1))
    _refuse_not_finite(tokenizer, whole, "one token")
    evaluated(tokenizer, whole.latents.detach(), (1, 1))


@check("Latents without variety, or on a code, make a value or a gradient that is not finite: bound what is divided by, "
       "and keep eps inside of roots, whose gradient at zero is not finite.", CODEBOOK)
def constant_latents_are_no_obstacle(subject: Subject) -> None:
    tokenizer = subject.tokenizer()
    features = subject.features(tokenizer)
    for name, given in (("features of 0", torch.zeros_like(features)), ("features of 1", torch.ones_like(features))):
        _refuse_not_finite(tokenizer, passed(tokenizer, given.requires_grad_(), subject.grid), name)
    codebook = tokenizer.codebook
    if codebook.tables == 1:
        rows = torch.arange(features.shape[0] * features.shape[1]) % codebook.rows
        latents = codebook.vectors()[rows].detach().view(*features.shape[:2], codebook.width).clone().requires_grad_()
        _refuse_not_finite(tokenizer, from_latents(tokenizer, latents, latents, subject.grid), "latents that are codes")
    if codebook.replaceable:
        codebook.replace_(torch.arange(codebook.rows), torch.zeros(codebook.rows, codebook.width))
        given = torch.zeros_like(features).requires_grad_()
        _refuse_not_finite(tokenizer, passed(tokenizer, given, subject.grid), "codes and features of 0")


@check("Large latents, as a diverging encoder makes, leave the range of indices or overflow: subtract the largest before exp, "
       "and clamp before a number becomes an index.", CODEBOOK)
def large_latents_are_no_obstacle(subject: Subject) -> None:
    for scale, finite in ((1e4, True), (1e8, False)):
        tokenizer = subject.tokenizer()
        features = (scale * subject.features(tokenizer)).requires_grad_()
        whole = passed(tokenizer, features, subject.grid)
        found = evaluated(tokenizer, whole.latents.detach(), subject.grid)
        if said := out_of_range(whole.found, tokenizer.codebook) or out_of_range(found, tokenizer.codebook):
            fail(f"{said} (features times {scale:g})")
        if finite:
            _refuse_not_finite(tokenizer, whole, f"features times {scale:g}")


@check("NaN in one image's latents must end in the host's own words, not in an IndexError, a hang, or other images' codes: the "
       "host finds it in the latents, so let quantize return any index in [0, K) for it, and leave the others alone.",
       ("make_codebook", "quantize"))
def nan_latents_crash_nothing(subject: Subject) -> None:
    tokenizer = subject.tokenizer()
    latents = tokenizer.codebook.from_encoder(subject.features(tokenizer)).detach()
    spoilt = latents.clone()
    spoilt[0, 0] = torch.nan
    found, fine = evaluated(tokenizer, spoilt, subject.grid), evaluated(tokenizer, latents, subject.grid)
    if said := out_of_range(found, tokenizer.codebook):
        fail(said)
    if not torch.allclose(found.codes[1:], fine.codes[1:], rtol=1e-4, atol=1e-5):
        fail("the codes of the other images are others")
    spoilt.requires_grad_()
    if said := out_of_range(from_latents(tokenizer, spoilt, spoilt, subject.grid).found, tokenizer.codebook):
        fail(f"{said} in training")


@check("A codebook of one code trains nothing, and a codebook that cannot be so small says so by a ValueError of "
       "make_codebook: look for log K or K - 1 in a denominator.", CODEBOOK)
def one_code_is_enough(subject: Subject) -> None:
    _train(subject.of(size=1), "one code")


@check("Codes may be single numbers, and a codebook that cannot be so narrow says so by a ValueError of make_codebook: look "
       "for a squeeze(), or D - 1 in a denominator.", CODEBOOK)
def one_channel_is_enough(subject: Subject) -> None:
    _train(subject.of(width=1), "one channel")


def _train(small: Subject, what: str) -> None:
    if refusal := small.refusal:
        raise Skipped(f"make_codebook refuses {what}: {refusal}")
    tokenizer = small.tokenizer()
    training = Training(small, tokenizer).begin()
    for _ in range(2):
        if bad := not_finite(training.step()):
            fail(f"the loss {', '.join(bad)} with {what}")
    tokenizer.eval()(small.images())


def _refuse_not_finite(tokenizer: Tokenizer, whole: Passage, what: str) -> None:
    """Fail if codes, losses or gradients of a passage are not finite."""
    values = {"codes": whole.found.codes, "what straight_through returns": whole.seen,
              **{f"the loss {name!r}": loss for name, loss in whole.losses.items()}}
    if bad := not_finite({name: value.detach() for name, value in values.items()}):
        fail(f"{', '.join(bad)} with {what}")
    tokenizer.zero_grad()
    whole.backward()
    gradients: dict[str, Tensor] = {name: p.grad for name, p in tokenizer.named_parameters() if p.grad is not None}
    if whole.features.grad is not None:
        gradients["the latents"] = whole.features.grad
    if bad := not_finite(gradients):
        fail(f"the gradient of {', '.join(bad)} with {what}")
