"""The wiring: which plugins are found, which serves a hook in a stage, and what is said when that is unclear."""

import copy
import inspect
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType, SimpleNamespace

import pytest
import torch

import vqzoo.sources
from vqzoo import Codebook, Plugin, PluginError, Progress, Quantized, Table, Tokenizer, UserError, hookimpl, hookspecs
from vqzoo.data import DataConfig
from vqzoo.hookspecs import REQUIRED
from vqzoo.manager import Hooks, all_hooks, make_manager
from vqzoo.prepare import build, enter
from vqzoo.recipe import CodebookConfig, DecoderConfig, EncoderConfig, Recipe, StageConfig
from vqzoo.sources import available, find, offered_hooks


class Plain(Plugin):
    """Serve what every recipe needs: every latent gets code 0."""

    @hookimpl
    def make_codebook(self, size, width):
        return Table(size, width)

    @hookimpl
    def quantize(self, latents, codebook):
        indices = torch.zeros(latents.shape[:2], dtype=torch.int64)
        return Quantized(codebook.lookup(indices), indices)

    @hookimpl
    def straight_through(self, codes):
        return codes

    @hookimpl
    def embedding_loss(self, latents, codes):
        return {"plain": (latents - codes).square().mean()}

    @hookimpl
    def reconstruction_loss(self, images):
        return {"pixels": images.square().mean()}


class Eager(Plugin):
    """Offer one hook; the answer tells which plugin gave it."""

    @hookimpl
    def make_codebook(self, size, width):
        return self


class Modest(Plugin):
    """Offer the same hook as Eager, and yield to it."""

    @hookimpl(trylast=True)
    def make_codebook(self, size, width):
        return self


class Contributor(Plugin):
    """Contribute to hooks of which there may be many; the number of codes tells which plugin answered."""

    @hookimpl
    def refresh_codes(self, latents, generator):
        return id(self)

    @hookimpl
    def stage_transition(self):
        return True


class Wrapper(Plugin):
    """Wrap the embedding loss: append this plugin to the trail of those that the losses have passed."""

    @hookimpl(wrapper=True)
    def embedding_loss(self, indices):
        losses = yield
        return {"trail": [*losses.get("trail", []), self]}


class Watcher(Plugin):
    """Watch a loss that only `vq` and `simvq` return."""

    def watched_losses(self):
        return ("commitment",)

    @hookimpl
    def stage_transition(self, progress):
        return progress.means["commitment"] < 0


def wired(routing=None, required=(), **kinds):
    """Wire plugins given by name and class; return the hooks and the plugins."""
    plugins = {name: kind(kind.Config()) for name, kind in kinds.items()}
    return Hooks(make_manager(plugins), routing or {}, required=required), plugins


def refusal(routing=None, required=(), **kinds):
    with pytest.raises(UserError) as caught:
        wired(routing, required, **kinds)
    return str(caught.value)


def call(hooks, name):
    """Call a hook with None for each of its arguments."""
    return getattr(hooks, name)(**dict.fromkeys(inspect.signature(getattr(hookspecs, name)).parameters))


def entry(name, value, distribution="stranger"):
    real = EntryPoint(name, value, "vqzoo")
    return SimpleNamespace(name=name, value=value, module=real.module, attr=real.attr,
                           dist=SimpleNamespace(name=distribution, version="1.2"))


@pytest.fixture
def install(monkeypatch):
    """Return a function that installs entry points, or plugin classes by name."""
    installed = list(entry_points(group="vqzoo"))
    monkeypatch.setattr(vqzoo.sources, "entry_points", lambda group: list(installed))

    def add(*entries, **kinds):
        vqzoo.sources._entries.cache_clear()
        installed.extend(entries)
        for name, kind in kinds.items():
            monkeypatch.setattr(sys.modules[__name__], kind.__name__, kind, raising=False)
            installed.append(entry(name, f"{__name__}:{kind.__name__}"))

    return add


def recipe(*plugins, hooks=None, stages=None):
    small = {"width": 8, "mult": [1, 2], "blocks": 1, "patch": 2}
    return Recipe(
        epochs=4, data=DataConfig(name="photos", resolution=[16, 16]), plugins={name: {} for name in plugins},
        encoder=EncoderConfig("vqgan_encoder", 4, args=dict(small)), decoder=DecoderConfig("conv", dict(small)),
        codebook=CodebookConfig(16, 8), hooks=hooks or {}, stages=stages or [StageConfig()],
    )


def tokenizer(*plugins, **options):
    """Make a tokenizer wired for training; `pixel` is added, since nothing trains without a reconstruction loss."""
    made = recipe(*dict.fromkeys((*plugins, "pixel")), **options)
    one = Tokenizer.from_recipe(made)
    one.wire(made.hooks, {})
    return one


IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)


# ---- who serves a hook


def test_the_only_plugin_that_offers_a_hook_serves_it():
    hooks, plugins = wired(one=Eager, other=Contributor)
    assert call(hooks, "make_codebook") is plugins["one"]
    assert hooks.providers("make_codebook") == ["one"] and hooks.plugins("make_codebook") == [plugins["one"]]


def test_a_hook_that_nobody_serves_answers_nothing():
    hooks, _ = wired(one=Eager)
    assert call(hooks, "make_discriminator") is None and call(hooks, "stage_transition") == []
    assert hooks.providers("make_discriminator") == hooks.providers("stage_transition") == []


@pytest.mark.parametrize("order", [("modest", "eager"), ("eager", "modest")])
def test_trylast_yields_wherever_it_stands_in_the_recipe(order):
    kinds = {"modest": Modest, "eager": Eager}
    hooks, plugins = wired(**{name: kinds[name] for name in order})
    assert call(hooks, "make_codebook") is plugins["eager"]
    assert hooks.providers("make_codebook") == ["eager"]


def test_trylast_serves_when_alone_or_named():
    assert wired(modest=Modest)[0].providers("make_codebook") == ["modest"]
    hooks, plugins = wired({"make_codebook": ["modest"]}, modest=Modest, eager=Eager)
    assert call(hooks, "make_codebook") is plugins["modest"]


@pytest.mark.fault(34)
@pytest.mark.parametrize("kind", [Eager, Modest])
def test_rivals_are_refused_with_the_key_and_both_names(kind):
    assert refusal(first=kind, second=kind).startswith("hooks.make_codebook: first and second all offer make_codebook;")
    assert "first and second" in refusal({"make_codebook": ["second", "first"]}, first=kind, second=kind)


@pytest.mark.parametrize("name", ["first", "second"])
def test_routing_decides_between_rivals(name):
    hooks, plugins = wired({"make_codebook": [name]}, first=Eager, second=Eager)
    assert call(hooks, "make_codebook") is plugins[name]
    assert hooks.providers("make_codebook") == [name]


def test_an_unknown_hook_is_refused_with_the_nearest():
    message = refusal({"refresh_code": []}, one=Eager)
    assert message.startswith("hooks.refresh_code: ") and "did you mean 'refresh_codes'?" in message


@pytest.mark.fault(35)
def test_an_unknown_plugin_is_refused_with_the_nearest():
    message = refusal({"make_codebook": ["eagre"]}, eager=Eager)
    assert message.startswith("hooks.make_codebook: 'eagre'") and "did you mean 'eager'?" in message


def test_a_plugin_that_does_not_offer_the_hook_is_refused_with_those_that_do():
    message = refusal({"make_codebook": ["other"]}, other=Contributor, eager=Eager)
    assert message.startswith("hooks.make_codebook: 'other' does not offer")
    assert message.endswith("these offer it: eager")


def test_a_lone_wrapper_says_which_plugin_of_the_recipe_to_name():
    message = refusal({"embedding_loss": ["wrap"]}, wrap=Wrapper, plain=Plain)
    assert message.startswith("hooks.embedding_loss: wrap only wraps") and message.endswith("these offer it: plain")


def test_a_lone_wrapper_says_which_installed_plugin_to_add(install):
    install(spare=Plain, envelope=Wrapper)
    message = refusal(required=["embedding_loss"], wrap=Wrapper)
    assert message.startswith("hooks.embedding_loss: wrap only wraps")
    offered = message.split("add one of these plugins, which offer it: ")[1].split(", ")
    assert {"spare", "vq", "simvq"} <= set(offered) and not {"envelope", "nsvq", "pixel"} & set(offered)


def test_a_wrapper_without_anything_to_wrap_is_left_out_where_nothing_is_required():
    hooks, _ = wired(wrap=Wrapper)
    assert hooks.providers("embedding_loss") == [] and call(hooks, "embedding_loss") is None


@pytest.mark.parametrize("name", REQUIRED)
def test_a_required_hook_without_provider_is_refused_with_who_offers_it(name, install):
    install(spare=Plain)
    message = refusal(required=[name], other=Contributor)
    assert message.startswith(f"hooks.{name}: nobody serves {name}; add one of") and "spare" in message


@pytest.mark.fault(34)
def test_a_broken_plugin_of_somebody_else_does_not_hide_the_message(install):
    install(entry("absent", "module_that_is_nowhere"))
    message = refusal(required=["make_codebook"], other=Contributor)
    assert "nobody serves make_codebook" in message and "vq" in message and "absent" not in message


def test_embedding_loss_alone_of_the_required_hooks_may_be_routed_to_nobody():
    hooks, _ = wired({"embedding_loss": []}, REQUIRED, plain=Plain, wrap=Wrapper)
    assert hooks.providers("embedding_loss") == []
    for name in set(REQUIRED) - {"embedding_loss"}:
        assert refusal({name: []}, REQUIRED, plain=Plain).startswith(f"hooks.{name}: nobody serves {name}")


def test_many_hooks_are_called_in_the_order_of_the_recipe():
    hooks, plugins = wired(c=Contributor, a=Contributor, b=Contributor)
    assert call(hooks, "refresh_codes") == [id(plugins[name]) for name in ("c", "a", "b")]
    assert hooks.providers("refresh_codes") == ["c", "a", "b"]


def test_routing_many_hooks_keeps_the_order_of_the_recipe_and_leaves_the_rest_out():
    routing = {"refresh_codes": ["b", "c"], "stage_transition": []}
    hooks, plugins = wired(routing, c=Contributor, a=Contributor, b=Contributor)
    assert call(hooks, "refresh_codes") == [id(plugins[name]) for name in ("c", "b")]
    assert call(hooks, "stage_transition") == []


@pytest.mark.parametrize("order", [("a", "b", "plain"), ("plain", "b", "a"), ("b", "plain", "a")])
def test_of_two_wrappers_the_first_named_is_the_outer(order):
    kinds = {"a": Wrapper, "b": Wrapper, "plain": Eager}
    answering = type("Answering", (Plugin,), {"embedding_loss": hookimpl(lambda self: {})})
    hooks, plugins = wired(**{name: answering if name == "plain" else kinds[name] for name in order})
    inner_first = [plugins[name] for name in reversed(order) if name != "plain"]
    assert call(hooks, "embedding_loss")["trail"] == inner_first


def test_asks_for_tells_whether_a_bound_implementation_names_the_argument():
    hooks, _ = wired(one=Contributor)
    assert hooks.asks_for("refresh_codes", "latents") and not hooks.asks_for("refresh_codes", "counts")
    assert not wired({"refresh_codes": []}, one=Contributor)[0].asks_for("refresh_codes", "latents")


# ---- plugins that do not fit


@pytest.mark.fault(34)
def test_a_misspelt_hook_in_a_plugin_is_a_user_error_that_names_both():
    odd = type("Odd", (Plugin,), {"quantise": hookimpl(lambda self, latents: None)})
    message = refusal(odd=odd)
    assert "plugin 'odd'" in message and "quantise" in message and "quantize" in message.rsplit("hooks: ")[-1]


@pytest.mark.fault(34)
def test_a_misspelt_argument_in_a_plugin_is_a_user_error_that_names_it():
    odd = type("Odd", (Plugin,), {"quantize": hookimpl(lambda self, latent: None)})
    message = refusal(odd=odd)
    assert "plugin 'odd'" in message and "latent" in message


def broken(name, answer):
    """Return a subclass of Plain of which one hook gives a certain answer."""
    return type("Broken", (Plain,), {name: hookimpl(lambda self: answer)})


@pytest.mark.fault(34)
@pytest.mark.parametrize(
    ("hook", "wanted"),
    [
        ("make_codebook", "Codebook"), ("quantize", "Quantized"), ("straight_through", "Tensor"),
        ("embedding_loss", "dict"),
    ],
)
@pytest.mark.parametrize("answer", [None, "text"])
def test_a_provider_that_returns_something_else_is_named(hook, wanted, answer, install):
    install(culprit=broken(hook, answer))
    with pytest.raises(PluginError) as caught:
        tokenizer("culprit")(IMAGES)
    message = str(caught.value)
    came = "None" if answer is None else "str"
    assert f"hook {hook}, served by culprit, returned {came} where {wanted} is expected" in message


CODES, INDICES = torch.zeros(2, 16, 8), torch.zeros(2, 16, dtype=torch.int64)


@pytest.mark.fault(34)
@pytest.mark.parametrize(
    ("codes", "indices", "said"),
    [
        (CODES[..., :7], INDICES, ("codes [2, 16, 7]", "[2, 16, 8]")),
        (CODES[:, :15], INDICES, ("codes [2, 15, 8]", "[2, 16, 8]")),
        (CODES.view(2, 4, 4, 8), INDICES, ("codes [2, 4, 4, 8]", "[2, 16, 8]")),
        (CODES.double(), INDICES, ("torch.float64", "torch.float32")),
        (CODES.half(), INDICES, ("torch.float16", "torch.float32")),
        (CODES, INDICES[:, :15], ("indices [2, 15]", "[2, 16]")),
        (CODES, INDICES.view(32), ("indices [32]", "[2, 16]")),
        (CODES, INDICES.int(), ("torch.int32", "torch.int64")),
        (CODES, INDICES.float(), ("torch.float32", "torch.int64")),
        (CODES, INDICES[..., None, None], ("indices [2, 16, 1, 1]", "[2, 16]")),
    ],
)
def test_what_quantize_returns_is_checked(codes, indices, said, install):
    install(culprit=broken("quantize", Quantized(codes, indices)))
    with pytest.raises(PluginError) as caught:
        tokenizer("culprit")(IMAGES)
    assert "hook quantize, served by culprit" in str(caught.value) and all(word in str(caught.value) for word in said)


@pytest.mark.parametrize("indices", [INDICES, INDICES[..., None].expand(2, 16, 3), None])
def test_indices_may_be_several_per_token_or_none(indices, install):
    install(fine=broken("quantize", Quantized(CODES, indices)))
    assert tokenizer("fine")(IMAGES).indices is indices


def test_a_tokenizer_without_indices_does_not_encode(install):
    install(smooth=broken("quantize", Quantized(CODES, None)))
    with pytest.raises(UserError, match="not discrete"):
        tokenizer("smooth").encode(IMAGES)


# ---- finding plugins


def module(monkeypatch, name, **content):
    made = ModuleType(name)
    made.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, made)


def test_an_entry_point_may_name_a_class(install):
    install(entry("strange", f"{__name__}:Eager", "stranger"))
    source = find("strange")
    assert source.load() is Eager and (source.distribution, source.version) == ("stranger", "1.2")


def test_an_entry_point_may_name_a_module_with_one_plugin(tmp_path, monkeypatch, install):
    (tmp_path / "lonely_plugin.py").write_text(
        "from vqzoo import Plugin, Table\n\nclass Lonely(Plugin):\n    pass\n\nclass Helper(Table):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    install(entry("lonely", "lonely_plugin"))
    assert find("lonely").load().__name__ == "Lonely"


def test_an_entry_point_may_name_a_package_whose_modules_are_found_unimported(tmp_path, monkeypatch, install):
    package = tmp_path / "many_plugins"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_shared.py").write_text("raise RuntimeError('a private module is no plugin')\n")
    (package / "sound.py").write_text("from vqzoo import Plugin\n\nclass Sound(Plugin):\n    pass\n")
    (package / "broken.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    install(entry("many", "many_plugins", "bundle"))
    assert {"sound", "broken"} <= available().keys() and not {"many", "_shared"} & available().keys()
    assert "many_plugins.sound" not in sys.modules
    assert find("sound").load().__name__ == "Sound" and find("sound").distribution == "bundle"
    with pytest.raises(UserError, match=r"'broken' \(bundle 1.2\) needs the module 'a_module_that_is_not_there', which is not"):
        find("broken").load()


@pytest.mark.fault(34)
def test_two_installed_plugins_of_one_name_are_refused_with_both_distributions(install):
    install(entry("vq", f"{__name__}:Eager", "vqzoo-rival"))
    with pytest.raises(UserError) as caught:
        find("vq")
    assert "'vq'" in str(caught.value) and "vqzoo_plugins.vq of vqzoo" in str(caught.value)
    assert f"{__name__} of vqzoo-rival" in str(caught.value)
    assert "vq" not in available() and "simvq" in available()  # the others work


def test_one_entry_point_seen_twice_is_no_clash(install):
    install(entry("strange", f"{__name__}:Eager"), entry("strange", f"{__name__}:Eager"))
    assert find("strange").load() is Eager


@pytest.mark.fault(34)
def test_two_classes_of_one_module_under_one_name_are_refused(install):
    install(entry("strange", f"{__name__}:Eager", "one"), entry("strange", f"{__name__}:Modest", "two"))
    with pytest.raises(UserError, match="'strange'"):
        find("strange")


@pytest.mark.parametrize(
    ("value", "count"), [("two_plugins", 2), ("no_plugin", 0), ("no_plugin:Missing", 0), ("no_plugin:NUMBER", 0)]
)
def test_a_module_without_exactly_one_plugin_is_refused_when_used(value, count, monkeypatch, install):
    one, two = (type(name, (Plugin,), {"__module__": "two_plugins"}) for name in ("One", "Two"))
    module(monkeypatch, "two_plugins", One=one, Two=two)
    module(monkeypatch, "no_plugin", Plugin=Plugin, NUMBER=3)
    install(entry("odd", value))
    with pytest.raises(UserError, match=rf"'odd' \(stranger 1.2\).* one subclass of vqzoo.Plugin.* {count}$"):
        find("odd").load()


@pytest.mark.fault(34)
def test_a_failing_import_is_a_user_error_that_names_plugin_and_cause(install):
    install(entry("absent", "module_that_is_nowhere:Thing", "ghost"))
    with pytest.raises(UserError, match=r"'absent' \(ghost 1.2\).*module_that_is_nowhere"):
        find("absent").load()


@pytest.mark.fault(35)
def test_a_plugin_that_is_not_installed_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"plugins.simqv: .*did you mean 'simvq'\?"):
        find("simqv")


def test_a_field_that_the_config_does_not_have_is_refused():
    broken = recipe("vq")
    broken.plugins["vq"] = {"comitment_weight": 1.0}
    with pytest.raises(UserError, match="plugins.vq: .*comitment_weight"):
        Tokenizer.from_recipe(broken)


def test_offered_hooks_tell_how_each_is_offered():
    assert offered_hooks(Modest) == {"make_codebook": "yields"}
    assert offered_hooks(Wrapper) == {"embedding_loss": "wraps"}
    assert offered_hooks(Contributor) == {"refresh_codes": "provides", "stage_transition": "provides"}


def test_all_hooks_are_those_of_hookspecs_in_its_order():
    text = inspect.getsource(hookspecs)
    names = [hook.name for hook in all_hooks(make_manager({}))]
    assert len(names) == text.count("@one\n") + text.count("@many\n")
    assert [text.index(f"def {name}(") for name in names] == sorted(text.index(f"def {name}(") for name in names)


# ---- a tokenizer's own wiring


class Counting(Plugin):
    """Quantize to code 0, counting the calls."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("calls", torch.tensor(0))

    @hookimpl
    def quantize(self, latents, codebook):
        self.calls += 1
        indices = torch.zeros(latents.shape[:2], dtype=torch.int64)
        return Quantized(codebook.lookup(indices), indices)


def test_a_copy_of_a_tokenizer_calls_its_own_plugins(install):
    install(counting=Counting)
    one = tokenizer("vq", "counting", hooks={"refresh_codes": []})
    one(IMAGES)
    other = copy.deepcopy(one)
    other(IMAGES)
    other(IMAGES)
    assert (int(one.plugins["counting"].calls), int(other.plugins["counting"].calls)) == (1, 3)
    assert other.hooks.plugins("quantize") == [other.plugins["counting"]]


def test_a_copy_keeps_the_wiring_of_the_stage():
    one = tokenizer("vq", "nsvq", "pixel")
    one.wire({"embedding_loss": ["vq"], "refresh_codes": []}, {})
    one.freeze(["encoder.*"])
    other = copy.deepcopy(one)
    assert other.hooks.providers("embedding_loss") == ["vq"] and other.hooks.providers("refresh_codes") == []
    assert not any(p.requires_grad for p in other.encoder.parameters())


def test_wiring_again_replaces_the_routing_and_its_key_is_named():
    one = tokenizer("vq", "nsvq", "simvq", "pixel")
    assert one.hooks.providers("embedding_loss") == ["nsvq", "simvq"]
    one.wire({"embedding_loss": ["vq"]}, {})
    assert one.hooks.providers("embedding_loss") == ["vq"] and one.hooks.providers("refresh_codes") == ["nsvq"]
    one.wire({}, {})
    assert one.hooks.providers("embedding_loss") == ["nsvq", "simvq"]
    with pytest.raises(UserError, match=r"^stages\[2\].hooks.quantize: 'nsvq' does not offer quantize"):
        one.wire({"quantize": ["nsvq"]}, {"quantize": "stages[2].hooks.quantize"})


def test_a_stage_overrides_the_recipe_hook_by_hook():
    stages = [StageConfig("joint", 2), StageConfig("refine", hooks={"embedding_loss": ["vq"], "stage_transition": []})]
    made = recipe("vq", "nsvq", "pixel", hooks={"refresh_codes": []}, stages=stages)
    built = build(made)

    def providers():
        return {name: built.hooks.providers(name) for name in ("embedding_loss", "stage_transition", "refresh_codes")}

    assert providers() == {"embedding_loss": ["vq", "nsvq"], "stage_transition": ["nsvq"], "refresh_codes": []}
    enter(built, made, 1)
    assert providers() == {"embedding_loss": ["vq"], "stage_transition": [], "refresh_codes": []}


def test_building_finds_the_mistake_of_a_later_stage():
    stages = [StageConfig("joint", 2), StageConfig("refine", hooks={"quantize": ["nsvq"]})]
    with pytest.raises(UserError, match=r"stages\[1\].hooks.quantize: 'nsvq' does not offer quantize"):
        build(recipe("vq", "nsvq", "pixel", stages=stages))


def test_building_demands_what_training_requires():
    with pytest.raises(UserError, match="hooks.reconstruction_loss: nobody serves .* pixel"):
        build(recipe("vq"))


class ImplicitCodebook(Codebook):
    replaceable = False

    def compute_vectors(self):
        return torch.ones(self.size, self.width)


class Implicit(Plain):
    """Offer a codebook of which no row can be overwritten."""

    @hookimpl
    def make_codebook(self, size, width):
        return ImplicitCodebook(size, width)


def test_refreshing_an_implicit_codebook_is_refused_unless_routed_away(install):
    install(implicit=Implicit)
    with pytest.raises(UserError, match=r"hooks.refresh_codes: nsvq .*refresh_codes: \[\]"):
        build(recipe("implicit", "nsvq"))
    routing = {"refresh_codes": [], "stage_transition": []}
    assert build(recipe("implicit", "nsvq", hooks=routing)).hooks.providers("refresh_codes") == []


def test_refreshing_an_implicit_codebook_is_refused_in_a_later_stage_too(install):
    install(implicit=Implicit)
    stages = [StageConfig("first", 1), StageConfig("second", hooks={"refresh_codes": ["nsvq"]})]
    routing = {"refresh_codes": [], "stage_transition": []}
    with pytest.raises(UserError, match="refresh_codes: nsvq"):
        build(recipe("implicit", "nsvq", hooks=routing, stages=stages))


@pytest.mark.parametrize("pattern", ["codebook.*", "*", "codebook.weight", "*weight"])
def test_freezing_the_codebook_while_it_is_refreshed_is_refused(pattern):
    one = tokenizer("vq", "nsvq", "pixel")
    with pytest.raises(UserError, match="refresh_codes of nsvq"):
        one.freeze([pattern])
    one.wire({"refresh_codes": []}, {})
    one.freeze([pattern])
    assert not one.codebook.weight.requires_grad


def test_freezing_a_buffer_of_the_codebook_counts_as_freezing_it():
    one = tokenizer("vq", "simvq", "nsvq", "pixel")
    with pytest.raises(UserError, match="refresh_codes of nsvq"):
        one.freeze(["codebook.table"])


def test_a_freeze_pattern_that_matches_nothing_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"freeze: 'encodr\.\*' matches no parameter; did you mean 'encoder\.\*'\?"):
        tokenizer("vq").freeze(["encodr.*"])


def test_freezing_stops_exactly_the_parameters_named_and_lets_them_go_again():
    one = tokenizer("vq", "simvq")
    for parameter in one.parameters():
        parameter.grad = torch.ones_like(parameter)
    one.freeze(["encoder.*", "codebook.linear.bias"])
    frozen = {name for name, p in one.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in one.named_parameters() if n.startswith("encoder.") or n == "codebook.linear.bias"}
    assert {name for name, p in one.named_parameters() if p.grad is None} == frozen
    assert not one.encoder.training and one.decoder.training and one.codebook.training
    assert not one.train().encoder.training
    one.freeze([])
    assert all(p.requires_grad for p in one.parameters()) and one.encoder.training
    assert not one.codebook.table.requires_grad


def test_a_watched_loss_that_nobody_returns_is_refused_in_the_stage_where_it_is_missing(install):
    install(watcher=Watcher)
    assert build(recipe("vq", "watcher", "pixel"))
    stages = [StageConfig("joint", 2), StageConfig("refine", hooks={"embedding_loss": []})]
    with pytest.raises(UserError) as caught:
        build(recipe("vq", "watcher", "pixel", stages=stages))
    assert str(caught.value).startswith("stages[1].hooks.stage_transition: watcher watches the loss 'commitment'")
    assert "'refine'" in str(caught.value) and "l1" in str(caught.value)


def test_a_watched_loss_that_a_frozen_encoder_takes_away_is_refused(install):
    install(watcher=Watcher)
    stages = [StageConfig("joint", 2), StageConfig("refine", freeze=["encoder.*"])]
    with pytest.raises(UserError, match=r"stages\[1\].hooks.stage_transition: watcher watches the loss 'commitment'"):
        build(recipe("vq", "watcher", "pixel", stages=stages))


class Noisy(Plugin):
    """Count calls and draw random numbers."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("calls", torch.tensor(0))

    @hookimpl(wrapper=True)
    def quantize(self):
        found = yield
        self.calls += 1
        torch.rand(1)
        return found


def test_the_rehearsal_changes_no_buffer_and_no_random_state(install):
    install(noisy=Noisy)
    one = tokenizer("vq", "noisy", "pixel")
    one.wire({}, {})
    before = torch.random.get_rng_state()
    assert one.rehearse(Progress(0, 0, "joint", 0, 0, 1)) == {"codebook", "commitment"}
    assert torch.equal(torch.random.get_rng_state(), before) and int(one.plugins["noisy"].calls) == 0


def test_a_loss_that_is_weighted_zero_is_not_there_to_be_watched():
    made = recipe("vq", "nsvq", "pixel")
    made.plugins["vq"] = {"commitment_weight": 0.0}
    with pytest.raises(UserError, match="nsvq watches the loss 'commitment'"):
        build(made)


class Judge(Plugin):
    """Offer a discriminator's loss without a discriminator."""

    @hookimpl
    def discriminator_loss(self, images):
        return {"judge": images.mean()}


def test_a_discriminator_loss_without_discriminator_is_refused(install):
    install(judge=Judge)
    with pytest.raises(UserError, match="discriminator_loss: .*make_discriminator"):
        build(recipe("vq", "pixel", "judge"))
    assert build(recipe("vq", "pixel", "judge", hooks={"discriminator_loss": []}))


class Picky(Plugin):
    """Refuse a value of its Config."""

    @dataclass
    class Config:
        share: float = 0.5

        def __post_init__(self):
            if not 0 <= self.share <= 1:
                raise ValueError(f"picky.share: {self.share!r} is no share")


def test_what_a_config_refuses_is_a_user_error(install):
    install(picky=Picky)
    made = recipe("vq", "picky")
    made.plugins["picky"] = {"share": 2.0}
    with pytest.raises(UserError, match="plugins.picky: .*picky.share: 2.0 is no share"):
        Tokenizer.from_recipe(made)
