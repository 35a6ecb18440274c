"""Plugins that break the contract: whoever raises, lies, or changes what it was given to read is named with its hook."""

import inspect
import re

import pytest
import torch
from test_hooks import recipe as photos
from test_training import VQ
from torch import nn

from vqzoo import NonFiniteError, Plugin, PluginError, Progress, Quantized, Tokenizer, UserError, cli, hookimpl, hookspecs
from vqzoo.codebook import Table
from vqzoo.errors import DataError
from vqzoo.manager import Hooks, all_hooks, make_manager
from vqzoo.trainer import Trainer

pytestmark = [pytest.mark.fault(34), pytest.mark.usefixtures("listeners")]
HOOKS = [hook.name for hook in all_hooks(make_manager({}))]
MANY = [hook.name for hook in all_hooks(make_manager({})) if not hook.spec.opts["firstresult"]]
STEP = Progress(3, 1, "train", 3, 1, 2)
META = torch.device("meta")
SIZE, WIDTH = 16, 8
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
CODES, INDICES, LOSS = torch.zeros(2, 16, WIDTH), torch.zeros(2, 16, dtype=torch.int64), torch.ones(())


class Mistake(Exception):
    """What a plugin's author has not thought of."""


def plugin(**hooks):
    """Make a plugin of functions by the name of their hook; `hookimpl` may mark them already."""
    marked = {name: f if hasattr(f, "vqzoo_impl") else hookimpl(f) for name, f in hooks.items()}
    return type("Made", (Plugin,), marked)(Plugin.Config())


def fail(self):
    raise Mistake("the reason")


def raised(hook, culprit):
    """Return the message that says so of `fail` and its like, but for the line's number."""
    return f"hook {hook}, served by {culprit}, raised Mistake at test_plugin_faults.py:N: the reason"


def wired(**plugins):
    return Hooks(make_manager(plugins), {}, serve=HOOKS, required=())


def arguments(hook, **given):
    """Return all arguments of a hook, and None for those that are not given."""
    return dict.fromkeys(inspect.signature(getattr(hookspecs, hook)).parameters) | given


def blamed(hooks, hook, **given):
    """Call a hook that must fail, and return the message."""
    with pytest.raises(PluginError) as caught:
        getattr(hooks, hook)(**arguments(hook, **given))
    return re.sub(r"\.py:\d+:", ".py:N:", str(caught.value))


# ---- what raises


@pytest.mark.parametrize("hook", HOOKS)
def test_a_plugin_that_raises_is_named_with_its_hook_and_the_error_is_kept(hook):
    with pytest.raises(PluginError) as caught:
        getattr(wired(culprit=plugin(**{hook: fail})), hook)(**arguments(hook))
    line = fail.__code__.co_firstlineno + 1
    assert str(caught.value) == raised(hook, "culprit").replace("N", str(line))
    assert isinstance(caught.value.__cause__, Mistake)


@pytest.mark.parametrize("hook", MANY)
@pytest.mark.parametrize("culprit", ["first", "second"])
def test_of_two_that_serve_a_hook_the_one_that_raises_is_named(hook, culprit):
    answer = {} if hook in ("reconstruction_loss", "report") else None
    sound = plugin(**{hook: lambda self: answer})
    plugins = {name: plugin(**{hook: fail}) if name == culprit else sound for name in ("first", "second")}
    assert blamed(wired(**plugins), hook) == raised(hook, culprit)


def test_of_two_plugins_of_one_class_the_one_that_raises_is_named():
    class Moody(Plugin):
        @hookimpl(wrapper=True)
        def reconstruction_loss(self):
            if self.training:
                raise Mistake("the reason")
            return (yield)

    fine, moody = Moody(Plugin.Config()).eval(), Moody(Plugin.Config())
    base = plugin(reconstruction_loss=lambda self: {})
    for plugins in ({"a": fine, "b": moody, "base": base}, {"b": moody, "a": fine, "base": base}):
        assert blamed(wired(**plugins), "reconstruction_loss") == raised("reconstruction_loss", "b")


def early(self):
    raise Mistake("the reason")
    yield


def late(self):
    yield
    raise Mistake("the reason")


def instead(self):
    try:
        yield
    except PluginError as error:
        raise Mistake("the reason") from error
    raise Mistake("the reason")


def passing(self):
    return (yield)


@pytest.mark.parametrize("fault", [early, late, instead])
@pytest.mark.parametrize("hook", ["quantize", "reconstruction_loss"])
def test_a_wrapper_that_raises_before_or_after_its_yield_is_named(hook, fault):
    answer = {} if hook == "reconstruction_loss" else "codes"
    wrappers = {name: plugin(**{hook: hookimpl(f, wrapper=True)}) for name, f in (("outer", passing), ("culprit", fault))}
    for plugins in (wrappers, dict(reversed(wrappers.items()))):
        hooks = wired(**plugins, base=plugin(**{hook: lambda self: answer}))
        assert blamed(hooks, hook) == raised(hook, "culprit")


@pytest.mark.parametrize("hook", ["quantize", "reconstruction_loss"])
def test_who_raises_below_a_wrapper_is_named_and_not_the_wrapper(hook):
    hooks = wired(outer=plugin(**{hook: hookimpl(passing, wrapper=True)}), culprit=plugin(**{hook: fail}))
    assert blamed(hooks, hook) == raised(hook, "culprit")


def never(self):
    yield from ()


def twice(self):
    yield
    yield


@pytest.mark.parametrize("fault", [never, twice])
def test_a_wrapper_that_does_not_yield_once_is_an_error_of_its_hook(fault):
    hooks = wired(culprit=plugin(quantize=hookimpl(fault, wrapper=True)), base=plugin(quantize=lambda self: "codes"))
    assert blamed(hooks, "quantize").startswith("hook quantize, served by culprit and base, raised ")


def test_an_implementation_under_a_decorator_is_named_too():
    decorated = torch.no_grad()(fail)
    plugins = {"outer": plugin(quantize=hookimpl(passing, wrapper=True)), "culprit": plugin(quantize=decorated)}
    assert blamed(wired(**plugins), "quantize") == raised("quantize", "culprit")


def test_a_hook_that_fails_within_another_is_named_itself():
    inner = wired(deep=plugin(quantize=fail))
    outer = plugin(enter_stage=lambda self: inner.quantize(**arguments("quantize")))
    assert blamed(wired(outer=outer), "enter_stage") == raised("quantize", "deep")


@pytest.mark.parametrize("error", [
    UserError("it says whose fault it is"), PluginError("so does this"), NonFiniteError("and this"), DataError("and this"),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: device-side assert triggered"), KeyboardInterrupt(),
    RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"),
])
def test_what_is_no_plugins_fault_passes_unchanged(error):
    def raises(self):
        raise error

    with pytest.raises(type(error)) as caught:
        wired(one=plugin(quantize=raises)).quantize(**arguments("quantize"))
    assert caught.value is error


@pytest.mark.fault(34)
def test_a_plugin_that_leaves_the_process_is_named():
    def leave(self):
        raise SystemExit(0)

    with pytest.raises(PluginError, match="hook quantize, served by one, raised SystemExit at test_plugin_faults.py"):
        wired(one=plugin(quantize=leave)).quantize(**arguments("quantize"))


def test_a_size_that_no_codebook_can_have_is_the_recipes_mistake(monkeypatch):
    def picky(self, size):
        raise ValueError(f"size: {size} is no power of three")

    monkeypatch.setattr("vqzoo.tokenizer.make_plugin", lambda name, config: plugin(make_codebook=picky))
    with pytest.raises(UserError, match="^codebook: size: 16 is no power of three$"):
        Tokenizer.from_recipe(photos("vq"))
    monkeypatch.setattr("vqzoo.tokenizer.make_plugin", lambda name, config: plugin(make_codebook=fail))
    with pytest.raises(PluginError, match="^hook make_codebook, served by vq, raised Mistake at .*: the reason$"):
        Tokenizer.from_recipe(photos("vq"))


# ---- what changes its arguments


def given(hook):
    """Return fresh tensors for the arguments of a hook."""
    values = {
        "latents": CODES.clone(), "codes": CODES.clone(), "indices": INDICES.clone(), "extras": {"scale": torch.ones(2, 3)},
        "images": IMAGES.clone(), "reconstructions": IMAGES.clone(), "discriminator": nn.BatchNorm2d(3),
        "counts": torch.ones(SIZE, dtype=torch.int64), "epoch_counts": torch.ones(SIZE, dtype=torch.int64),
        "codebook": Table(SIZE, WIDTH), "last_layer": nn.Parameter(torch.ones(3)), "progress": STEP,
    }
    return {name: value for name, value in values.items() if name in inspect.signature(getattr(hookspecs, hook)).parameters}


@torch.no_grad()
def spoil(tensor):
    tensor[0] = 1


@pytest.mark.parametrize(("hook", "argument", "fault"), [
    ("quantize", "latents", lambda self, latents: latents.mul_(2)),
    ("quantize", "latents", lambda self, latents: latents[0, :3].detach().zero_()),
    ("quantize", "latents", lambda self, latents: latents.flatten(0, 1).t().add_(1)),
    ("quantize", "codebook.weight", lambda self, codebook: spoil(codebook.weight)),
    ("quantize", "codebook.weight", lambda self, codebook: codebook.replace_(torch.tensor([0]), torch.ones(1, WIDTH))),
    ("straight_through", "codes", lambda self, codes: codes.clamp_(0)),
    ("straight_through", "extras['scale']", lambda self, extras: extras["scale"].zero_()),
    ("embedding_loss", "indices", lambda self, indices: indices.add_(1)),
    ("embedding_loss", "codebook.weight", lambda self, codebook: spoil(codebook.weight)),
    ("reconstruction_loss", "images", lambda self, images: images.add_(1).div_(2)),
    ("reconstruction_loss", "reconstructions", lambda self, reconstructions: reconstructions.clamp_(-1, 1)),
    ("reconstruction_loss", "last_layer", lambda self, last_layer: spoil(last_layer)),
    ("discriminator_loss", "images", lambda self, images: images.neg_()),
    ("refresh_codes", "counts", lambda self, counts: counts.zero_()),
    ("refresh_codes", "epoch_counts", lambda self, epoch_counts: epoch_counts.zero_()),
    ("refresh_codes", "extras['scale']", lambda self, extras: extras["scale"].zero_()),
])
def test_a_plugin_that_changes_what_it_was_given_is_named_with_it(hook, argument, fault):
    hooks = wired(bystander=plugin(**{hook: hookimpl(passing, wrapper=True)}), culprit=plugin(**{hook: fault}))
    message = blamed(hooks, hook, **given(hook))
    assert message.startswith(f"hook {hook}, served by culprit, changed its argument {argument} in place; ")
    assert message.endswith("by codebook.replace_" if "codebook" in argument else "work on a copy")


@pytest.mark.parametrize("culprit", ["first", "second"])
def test_of_two_that_are_given_the_same_the_one_that_changes_it_is_named(culprit):
    faults = {False: lambda self, counts: int(counts.sum()), True: lambda self, counts: counts.zero_()}
    plugins = {name: plugin(refresh_codes=faults[name == culprit]) for name in ("first", "second")}
    assert blamed(wired(**plugins), "refresh_codes", **given("refresh_codes")).startswith(
        f"hook refresh_codes, served by {culprit}, changed its argument counts in place")


def test_a_constant_table_of_codes_may_not_be_changed_either():
    class Constant(Table):
        def __init__(self):
            super().__init__(SIZE, WIDTH)
            self.register_buffer("table", torch.ones(SIZE, WIDTH))
            self.register_buffer("calls", torch.zeros(()))  # what is no code may follow the calls

    hooks = wired(one=plugin(quantize=lambda self, codebook: codebook.calls.add_(1)))
    assert hooks.quantize(**arguments("quantize", codebook=Constant())) == 1
    hooks = wired(one=plugin(quantize=lambda self, codebook: codebook.table.mul_(2)))
    assert "served by one, changed its argument codebook.table" in blamed(hooks, "quantize", codebook=Constant())


def test_what_may_change_may_change():
    def refresh(self, codebook, latents):
        codebook.replace_(torch.tensor([1]), torch.ones(1, WIDTH))
        return 1

    def judge(self, discriminator, images):
        return {"judged": discriminator(images).mean()}

    def enter(self, tokenizer):
        tokenizer.codebook.replace_(torch.arange(SIZE), torch.ones(SIZE, WIDTH))

    hooks = wired(one=plugin(refresh_codes=refresh, discriminator_loss=judge, enter_stage=enter))
    assert hooks.refresh_codes(**arguments("refresh_codes", **given("refresh_codes"))) == [1]
    assert hooks.discriminator_loss(**arguments("discriminator_loss", **given("discriminator_loss"))).keys() == {"judged"}
    one = tokenizer()
    hooks.enter_stage(**arguments("enter_stage", tokenizer=one))
    assert (one.codebook.weight == 1).all()


def test_tensors_that_count_no_changes_are_no_obstacle():
    with torch.inference_mode():
        assert tokenizer().eval()(IMAGES).codes.is_inference()


# ---- what returns something else than is expected


def tokenizer(**hooks):
    """Make a tokenizer of `vq` and `pixel` in which another plugin serves some hooks."""
    one = Tokenizer.from_recipe(photos("vq", "pixel"))
    one.plugins["culprit"] = plugin(**hooks)
    one.wire({hook: ["culprit"] for hook in hooks}, {})
    return one


@pytest.mark.parametrize(("hook", "answer", "said"), [
    ("quantize", Quantized(None, INDICES), "None as codes where a tensor is expected"),
    ("quantize", Quantized(CODES.to(META), INDICES), "codes on meta where cpu is expected"),
    ("quantize", Quantized(CODES, INDICES.to(META)), "indices on meta where cpu is expected"),
    ("quantize", Quantized(CODES, [0, 1]), "list as indices where a tensor is expected"),
    ("quantize", Quantized(CODES, INDICES, {"scale": 2.0}), "as extra 'scale' float where a tensor [2, ...] on cpu is"),
    ("quantize", Quantized(CODES, INDICES, {"scale": LOSS}), "as extra 'scale' a tensor [] of torch.float32 on cpu where"),
    ("straight_through", CODES[:, :9], "a tensor [2, 9, 8] where [2, 16, 8] is expected"),
    ("straight_through", CODES.double(), "a tensor of torch.float64 where torch.float32 is expected"),
    ("straight_through", CODES.to(META), "a tensor on meta where cpu is expected"),
    ("embedding_loss", {"pull": torch.ones(2)}, "as loss 'pull' a tensor [2] of torch.float32 on cpu where a 0-dim"),
    ("embedding_loss", {"pull": torch.ones((), dtype=torch.int64)}, "as loss 'pull' a tensor [] of torch.int64 on cpu where"),
    ("embedding_loss", {"pull": LOSS.to(META)}, "as loss 'pull' a tensor [] of torch.float32 on meta where"),
    ("embedding_loss", {"fine": LOSS, "pull": 0.5}, "as loss 'pull' float where a 0-dim floating-point tensor on cpu is"),
    ("embedding_loss", [LOSS], "list where dict is expected"),
])
def test_a_quantizer_that_returns_something_else_is_named_with_what_is_expected(hook, answer, said):
    with pytest.raises(PluginError) as caught:
        tokenizer(**{hook: lambda self: answer})(IMAGES, STEP)
    assert str(caught.value).startswith(f"hook {hook}, served by culprit, returned {said}")


@pytest.mark.parametrize(("answer", "said"), [
    (None, "None where dict is expected"),
    (LOSS, "a tensor [] of torch.float32 on cpu where dict is expected"),
    ({"l1": torch.ones(2)}, "as loss 'l1' a tensor [2] of torch.float32 on cpu where a 0-dim floating-point tensor on cpu"),
    ({"l1": LOSS.to(META)}, "as loss 'l1' a tensor [] of torch.float32 on meta where a 0-dim floating-point tensor on cpu"),
    ({"l1": 1}, "as loss 'l1' int where a 0-dim floating-point tensor on cpu is expected"),
])
def test_a_loss_that_is_none_is_laid_to_the_plugin_of_several_and_a_discriminators_too(answer, said):
    one = tokenizer()
    for name, value in (("before", {"fine": LOSS}), ("culprit", answer), ("after", {})):
        one.plugins[name] = plugin(reconstruction_loss=lambda self, value=value: value)
    one.wire({}, {})
    with pytest.raises(PluginError) as caught:
        one.reconstruction_losses(IMAGES, IMAGES, None, STEP)
    assert str(caught.value).startswith(f"hook reconstruction_loss, served by culprit, returned {said}")
    judged = tokenizer(discriminator_loss=lambda self: answer)
    with pytest.raises(PluginError) as caught:
        judged.discriminator_losses(IMAGES, IMAGES, None, STEP)
    assert str(caught.value).startswith(f"hook discriminator_loss, served by culprit, returned {said}")


@pytest.mark.parametrize(("hook", "answer", "said"), [
    ("refresh_codes", 0.5, "float where an integer or None"),
    ("refresh_codes", torch.tensor(0.5), "a tensor [] of torch.float32 on cpu where an integer or None"),
    ("refresh_codes", torch.ones(2, dtype=torch.int64), "a tensor [2] of torch.int64 on cpu where an integer or None"),
    ("stage_transition", {"ends": True}, "dict where True, a reason in words or None"),
    ("stage_transition", torch.ones(2) > 0, "a tensor [2] of torch.bool on cpu where True, a reason in words or None"),
    ("report", None, "None where dict"),
    ("report", [("usage", 1.0)], "list where dict"),
])
def test_of_several_the_one_that_answers_something_else_is_named(hook, answer, said):
    answers = {"first": {} if hook == "report" else None, "culprit": answer, "last": {} if hook == "report" else None}
    hooks = wired(**{name: plugin(**{hook: lambda self, value=value: value}) for name, value in answers.items()})
    assert blamed(hooks, hook) == f"hook {hook}, served by culprit, returned {said} is expected"


@pytest.mark.parametrize("answer", [None, 0, 3, True, torch.tensor(2)])
def test_how_many_codes_were_replaced_may_be_a_number_in_any_form(answer):
    assert wired(one=plugin(refresh_codes=lambda self: answer)).refresh_codes(**arguments("refresh_codes")) == (
        [] if answer is None else [answer])


@pytest.mark.parametrize(("answer", "said"), [
    (None, "None where list is expected"), ({}, "dict where list is expected"), ([None], "None where dict is expected"),
])
def test_a_wrapper_that_spoils_the_answers_of_all_is_named_among_those_that_serve(answer, said):
    def wrapper(self):
        yield
        return answer

    base = plugin(reconstruction_loss=lambda self: {})
    hooks = wired(culprit=plugin(reconstruction_loss=hookimpl(wrapper, wrapper=True)), base=base)
    assert blamed(hooks, "reconstruction_loss").startswith(
        f"hook reconstruction_loss, served by culprit and base, returned {said}")


# ---- what the rehearsal finds, before training


def nan(tensor):
    return tensor * torch.nan


def random_codes(self, latents, codebook):
    indices = torch.randint(SIZE, latents.shape[:2])
    return Quantized(codebook.lookup(indices), indices)


def shifted(by):
    def quantize(self, latents, codebook):
        indices = torch.zeros(latents.shape[:2], dtype=torch.int64)
        return Quantized(codebook.lookup(indices), indices + by)

    return quantize


def codes_of(change, evaluation_alone=False):
    def quantize(self, latents, codebook, progress):
        codes = codebook.lookup(torch.zeros(latents.shape[:2], dtype=torch.int64))
        return Quantized(codes if evaluation_alone and progress else change(codes), None)

    return quantize


@pytest.mark.parametrize(("hook", "fault", "said"), [
    ("quantize", codes_of(nan), "returned codes with NaN or infinity where finite numbers are expected"),
    ("quantize", codes_of(nan, evaluation_alone=True), "returned codes with NaN or infinity where finite"),
    ("quantize", shifted(SIZE), f"returned indices 16 … 16 where [0, {SIZE}) is expected"),
    ("quantize", shifted(-1), "returned indices -1 … -1 where [0, 16) is expected"),
    ("quantize", random_codes, "returned two answers for the same latents in evaluation, where it must depend on"),
    ("quantize", lambda self, latents, progress: Quantized(latents * (progress.step + 1), None), "raised AttributeError at "),
    ("straight_through", lambda self, codes: nan(codes), "returned a tensor with NaN or infinity where finite"),
    ("embedding_loss", lambda self: {"pull": nan(LOSS)}, "returned loss 'pull' with NaN or infinity where finite"),
])
def test_a_quantizer_that_cannot_work_is_told_before_training(hook, fault, said):
    with pytest.raises(PluginError) as caught:
        tokenizer(**{hook: fault}).rehearse(Progress(0, 0, "train", 0, 0, 1))
    assert str(caught.value).startswith(f"hook {hook}, served by culprit, {said}")


@pytest.mark.parametrize(("vectors", "said"), [
    (nan(torch.ones(SIZE, WIDTH)), "vectors with NaN or infinity"), (torch.ones(SIZE, 3), "vectors [16, 3] where [16, 8]"),
])
def test_a_codebook_that_is_no_table_of_finite_codes_is_told_before_training(vectors, said):
    one = tokenizer()
    one.codebook.compute_vectors = lambda: vectors
    with pytest.raises(PluginError) as caught:
        one.rehearse(STEP)
    assert str(caught.value).startswith(f"hook make_codebook, served by vq, returned {said}")


# ---- what is not finite in training


@pytest.mark.parametrize(("hook", "first"), [
    ("quantize", "codes of quantize (vq, culprit)"), ("straight_through", "answer of straight_through (vq, culprit)"),
])
def test_a_training_forward_tells_what_of_it_is_finite(hook, first):
    def wrapper(self):
        result = yield
        return Quantized(result.codes / 0, result.indices) if hook == "quantize" else result - torch.inf

    one = Tokenizer.from_recipe(photos("vq", "pixel"))
    one.wire({}, {})
    checks = {name: bool(fine) for name, fine in one(IMAGES, STEP).checks.items()}
    assert list(checks) == ["latents of the encoder", "codes of quantize (vq)", "answer of straight_through (vq)",
                            "reconstructions of the decoder"] and all(checks.values())
    one.plugins["culprit"] = plugin(**{hook: hookimpl(wrapper, wrapper=True)})
    one.wire({}, {})
    checks = one(IMAGES, STEP).checks
    assert all(fine.dim() == 0 and fine.dtype == torch.bool for fine in checks.values())
    assert [name for name, fine in checks.items() if not fine][0] == first and bool(checks["latents of the encoder"])
    assert list(one.eval()(IMAGES).checks) == []


# ---- in a run


def at_step(number, act):
    return lambda progress, **given: act(**given) if progress and progress.step == number else None


def mistaken(**_):
    raise Mistake("the reason")


RUNS = [
    ("quantize", mistaken, PluginError, "hook quantize, served by probe, raised Mistake at plugins_for_tests.py:"),
    ("quantize", lambda latents, **_: latents.mul_(2).sum() * 0, PluginError,
     "hook quantize, served by vq and probe, changed its argument latents in place; work on a copy"),
    ("quantize", lambda result, **_: Quantized(nan(result.codes), result.indices), NonFiniteError,
     "codes of quantize (vq, probe)"),
    ("refresh_codes", lambda counts, **_: counts.zero_(), PluginError,
     "hook refresh_codes, served by probe, changed its argument counts in place; work on a copy"),
    ("reconstruction_loss", lambda result, **_: [{"l1": result[0]["l1"].to(META)}], PluginError,
     "hook reconstruction_loss, served by pixel and probe, returned as loss 'l1' a tensor [] of torch.float32 on meta where"),
]


@pytest.mark.parametrize(("hook", "fault", "kind", "said"), RUNS)
def test_a_run_names_the_step_at_which_a_plugin_failed(recipe, tmp_path, listeners, hook, fault, kind, said):
    job = Trainer(recipe(VQ), tmp_path / "run")
    listeners[hook] = at_step(3, fault)
    with pytest.raises(kind) as caught:
        job.run()
    assert str(caught.value).startswith(f"step 3 (epoch 1, stage 'train'): {said}")
    assert job.counters.step == 3


def test_what_a_plugin_breaks_at_once_leaves_no_folder(recipe, tmp_path, listeners):
    listeners["quantize"] = lambda result, **_: Quantized(result.codes.to(META), result.indices)
    with pytest.raises(PluginError, match="hook quantize, served by vq and probe, returned codes on meta where cpu is"):
        Trainer(recipe(VQ), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_reports_a_plugin_that_fails(small_photos, recipe, tmp_path, listeners, capsys):
    listeners["refresh_codes"] = at_step(3, mistaken)
    (tmp_path / "recipe.yaml").write_text(VQ.replace("ROOT", str(small_photos)))
    assert cli.main(["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 1
    said = "PluginError: step 3 (epoch 1, stage 'train'): hook refresh_codes, served by probe, raised Mistake at plugins_"
    assert said in capsys.readouterr().err
