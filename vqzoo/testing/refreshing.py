"""Checks of what changes a codebook outside gradient descent, of stages, and of what is reported."""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from vqzoo.errors import UserError
from vqzoo.plugin import Progress
from vqzoo.testing.check import Skipped, check, fail
from vqzoo.testing.passage import EARLY, LATE, ask, at_end, changed, evaluated, not_finite, of_step, state_of
from vqzoo.testing.subject import Subject
from vqzoo.testing.training import Training, seed
from vqzoo.tokenizer import Tokenizer


@check("A code that was overwritten is not there afterwards, or others moved: let write make compute_vectors return the wanted "
       "vectors at these rows alone; name in row_parameters the parameters whose dimension 0 is the row; or say "
       "`replaceable = False`.", ("make_codebook",))
def codes_can_be_overwritten(subject: Subject) -> None:
    codebook = subject.tokenizer().codebook
    if not codebook.replaceable:
        raise Skipped(f"{type(codebook).__name__} says that it is implicit")
    before = codebook.vectors().detach().clone()
    rows = torch.arange(min(3, codebook.rows))
    wanted = before[-len(rows):].flip(0)  # codes that there are, wherever they may lie
    codebook.replace_(rows, wanted)
    after, scale = codebook.vectors().detach(), float(before.abs().max())
    if (apart := float((after[rows] - wanted).abs().max())) > 1e-2 * scale:
        fail(f"after replace_, codes differ by as much as {apart:.3g} from the wanted ones, whose elements reach {scale:.3g}")
    if not torch.allclose(after[len(rows):], before[len(rows):], rtol=1e-4, atol=1e-5 * scale):
        fail("replace_ moved codes at other rows")
    for parameter in codebook.row_parameters():
        if parameter.shape[:1] != (codebook.rows,):
            fail(f"row_parameters has a parameter {list(parameter.shape)} where [{codebook.rows}, ...] is expected")


@check("Two processes, or a run that goes on, make other codes of the same latents: draw at random from the given generator "
       "alone, and let no set's order decide.", ("refresh_codes",))
def refresh_is_repeatable(subject: Subject) -> None:
    one = _trained(subject)
    other = copy.deepcopy(one)
    for progress in _moments(one):
        for number, tokenizer in enumerate((one, other)):
            seed(1000 + number)
            _refresh(subject, tokenizer, progress)
        if apart := changed(state_of(one), state_of(other)):
            fail(f"{', '.join(sorted(apart))}: not the same after two calls with the same arguments")


@check("A code changed without the host's knowledge, so that the optimizer's moments and the average of weights pull it back: "
       "change rows by codebook.replace_ alone, which names them.", ("refresh_codes",))
def refresh_writes_by_replace(subject: Subject) -> None:
    tokenizer = _trained(subject)
    codebook = tokenizer.codebook
    for progress in _moments(tokenizer):
        before = codebook.vectors().detach().clone()
        rows = torch.cat([*_refresh(subject, tokenizer, progress), torch.zeros(0, dtype=torch.int64)])
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < codebook.rows:
            fail(f"rows {int(rows.min())} … {int(rows.max())} of {codebook.rows} were named")
        after = codebook.vectors().detach()
        moved = set((after != before).any(1).nonzero().squeeze(1).tolist())
        if secret := sorted(moved - set(rows.tolist())):
            fail(f"{len(secret)} codes changed, row {secret[0]} for one, that replace_ was not told of")
        if not after.isfinite().all():
            fail("codes are not finite")


@check("Not every epoch uses every code, and a method without indices uses none: let refresh_codes take counts of zero, all "
       "tokens on one code, and indices and counts that are None (or raise a vqzoo.UserError that says it cannot).",
       ("refresh_codes",))
def refresh_takes_any_counts(subject: Subject) -> None:
    tokenizer = _trained(subject)
    codebook, latents = tokenizer.codebook, _latents(subject, tokenizer)
    found = evaluated(tokenizer, latents, subject.grid)
    cases = {"no indices": replace(found, indices=None)}
    if found.indices is not None:
        cases["all tokens on one code"] = replace(found, indices=torch.zeros_like(found.indices))
    for name, case in cases.items():
        for progress in _moments(tokenizer):
            try:
                with torch.no_grad():
                    ask(tokenizer, "refresh_codes", **of_step(tokenizer, latents, case), progress=progress,
                        generator=torch.Generator().manual_seed(0))
            except UserError:
                continue
            if not codebook.vectors().isfinite().all():
                fail(f"codes are not finite after {name}")


@check("A stage ends on one process and not on another, or with another reason: let stage_transition depend on its arguments "
       "and buffers alone.", ("stage_transition",))
def stage_transition_answers_alike(subject: Subject) -> None:
    one = subject.tokenizer()
    other = copy.deepcopy(one)
    for epoch in range(4):
        progress = replace(at_end(one, EARLY), step=2 * epoch + 1, epoch=epoch, epoch_in_stage=epoch)
        answers = []
        for number, tokenizer in enumerate((one, other)):
            seed(1000 + number)
            answers.append(ask(tokenizer, "stage_transition", stage=progress.stage, progress=progress))
        if repr(answers[0]) != repr(answers[1]) or changed(state_of(one), state_of(other)):
            fail(f"{answers[0]!r} and {answers[1]!r} at the same epoch")


@check("Two processes enter a stage with unlike codebooks: draw at random from the given generator alone; what each process "
       "finds in its own images must be gathered (vqzoo.ops.gather_rows).", ("enter_stage",))
def enter_stage_is_repeatable(subject: Subject) -> None:
    one, other = (_entered(subject, number)[0] for number in range(2))
    if apart := changed(state_of(one), state_of(other)):
        fail(f"{', '.join(sorted(apart))}: not the same after two calls with the same arguments")


@check("Encoder and decoder may lie in pieces over the processes when a stage begins: let enter_stage change codebook and "
       "plugin alone.", ("enter_stage",))
def enter_stage_leaves_the_networks_alone(subject: Subject) -> None:
    tokenizer, before = _entered(subject, 0)
    moved = [name for name in changed(before, state_of(tokenizer)) if name.startswith(("encoder.", "decoder."))]
    if moved:
        fail(f"{', '.join(sorted(moved))} changed")


@check("What is reported cannot be shown: return a dict from names to finite numbers, floats or 0-dim tensors, also when "
       "nothing has happened since the last report.", ("report",))
def report_gives_numbers(subject: Subject) -> None:
    training = Training(subject, subject.tokenizer()).begin()
    for number in range(3):
        found = training.tokenizer.report(EARLY if not number else LATE)
        if bad := not_finite({name: torch.tensor(value) for name, value in found.items()}):
            fail(f"{', '.join(bad)} {'before any step' if not number else f'after {number} steps'}")
        if not all(isinstance(name, str) for name in found):
            fail(f"names that are no strings: {list(found)}")
        training.step()


def _trained(subject: Subject) -> Tokenizer:
    """Return a tokenizer after an epoch, nothing pending."""
    training = Training(subject, subject.tokenizer()).begin()
    for _ in range(2):
        training.step()
    return training.tokenizer


def _moments(tokenizer: Tokenizer) -> list[Progress]:
    """Return where in a run codes are refreshed: within an epoch, at the end of the first one, and of a late one."""
    return [EARLY, replace(at_end(tokenizer, EARLY), step=1), at_end(tokenizer)]


def _latents(subject: Subject, tokenizer: Tokenizer) -> Tensor:
    return tokenizer.codebook.from_encoder(subject.features(tokenizer)).detach()


@torch.no_grad()
def _refresh(subject: Subject, tokenizer: Tokenizer, progress: Progress) -> list[Tensor]:
    """Ask refresh_codes after a step in which half of the codes were not used; return the rows that replace_ was told."""
    latents = _latents(subject, tokenizer)
    found = evaluated(tokenizer, latents, subject.grid)
    if found.indices is not None:
        found.indices = found.indices % max(1, tokenizer.codebook.size // 2)
    ask(tokenizer, "refresh_codes", **of_step(tokenizer, latents, found), progress=progress,
        generator=torch.Generator().manual_seed(5))
    return [rows for rows, _ in tokenizer.codebook.take_replaced()]


@torch.no_grad()
def _entered(subject: Subject, number: int) -> tuple[Tokenizer, dict[str, Tensor]]:
    """Enter every stage of which the plugin speaks; return the tokenizer, and its state before."""
    tokenizer = subject.tokenizer().eval()
    before, leaving = state_of(tokenizer), None
    for stage in subject.stages:
        seed(1000 + number)
        ask(tokenizer, "enter_stage", leaving=leaving, entering=stage, tokenizer=tokenizer,
            batches=subject.batches(), generator=torch.Generator().manual_seed(5))
        leaving = stage
    return tokenizer, before
