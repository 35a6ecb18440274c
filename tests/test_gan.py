"""The gan plugin: its losses against plain formulas, its schedule, and what it does in whole runs."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from plugins_for_tests import Probe
from test_training import COMMON, assert_equal_up_to_rounding, checkpoint_at, events, state, unequal

from vqzoo import PatchDiscriminator, PluginError, Progress, UserError, hookimpl, ops
from vqzoo.pictures import Pictures
from vqzoo.prepare import build, enter, make_discriminator
from vqzoo.recipe import load_recipe
from vqzoo.tokenizer import make_plugin
from vqzoo.trainer import Trainer

pytestmark = pytest.mark.usefixtures("listeners")
GAN = "gan: {layers: 1, width: 8, ramp: {'*': 0}}"
PHASES = COMMON + f"""
epochs: 5
plugins: {{probe: {{}}, vq: {{}}, nsvq: {{replace_after: 0}}, pixel: {{}}, {GAN}}}
discriminator_optim: {{lr: 1e-3}}
stages:
  - {{name: joint, epochs: 2}}
  - name: warm-up
    epochs: 1
    freeze: ["encoder.*"]
    hooks: {{embedding_loss: [vq], refresh_codes: [probe], stage_transition: [], reconstruction_loss: [pixel],
            discriminator_loss: []}}
  - {{name: refine, freeze: ["encoder.*"], hooks: {{embedding_loss: [vq], refresh_codes: [probe], stage_transition: []}}}}
"""
ONE = COMMON.replace("steps: 100", "steps: 1") + f"""
epochs: 3
plugins: {{vq: {{}}, pixel: {{}}, {GAN}}}
"""


def progress(step=0, in_stage=None, stage="refine", steps_per_epoch=10):
    return Progress(step, step // 10, stage, step if in_stage is None else in_stage, 0, steps_per_epoch)


def gan(**config):
    return make_plugin("gan", config)


# ---- the formulas


def plain(kind, real, fake):
    """Return the generator's and the discriminator's loss in float64, written out."""
    real, fake = real.double(), fake.double()
    log_real, log_fake = torch.log(1 / (1 + (-real).exp())), torch.log(1 / (1 + (-fake).exp()))
    not_fake = torch.log(1 - 1 / (1 + (-fake).exp()))
    return {
        "hinge": (-fake.mean(), (torch.clamp(1 - real, 0).mean() + torch.clamp(1 + fake, 0).mean()) / 2),
        "non-saturating": (-log_fake.mean(), -log_real.mean() - not_fake.mean()),
        "vanilla": (not_fake.mean(), (-log_real.mean() - not_fake.mean()) / 2),
    }[kind]


@pytest.mark.parametrize("kind", ["hinge", "non-saturating", "vanilla"])
def test_each_side_has_the_losses_of_the_papers(kind):
    real, fake = 2 * torch.randn(2, 4, 1, 5, 3)
    generator, discriminator = plain(kind, real, fake)
    assert ops.generator_loss(kind, fake).item() == pytest.approx(generator.item(), rel=1e-5)
    assert ops.discriminator_loss(kind, real, fake).item() == pytest.approx(discriminator.item(), rel=1e-5)


def test_every_map_of_a_discriminator_counts_alike():
    maps = [torch.randn(2, 1, 8, 8), torch.randn(2, 1, 2, 2)]
    expected = sum(F.softplus(-x).mean() for x in maps) / 2
    torch.testing.assert_close(ops.generator_loss("non-saturating", maps), expected)
    torch.testing.assert_close(ops.mean_logit(maps), (maps[0].mean() + maps[1].mean()) / 2)


def test_the_gradient_of_an_image_is_that_of_its_mean_logit():
    discriminator = torch.nn.Conv2d(3, 1, 4, 4)
    images = torch.randn(2, 3, 8, 8)
    gradient = ops.input_gradient(discriminator, images)
    expected = discriminator.weight.detach()[0].repeat(1, 2, 2).flatten() / 4  # four patches, each with this weight
    torch.testing.assert_close(gradient.detach(), expected.expand(2, -1))
    gradient.square().sum(1).mean().backward()
    torch.testing.assert_close(discriminator.weight.grad, 2 * 4 * discriminator.weight.detach() / 16)
    assert images.grad is None


def test_penalties_are_weighted_and_reach_the_discriminator():
    discriminator = torch.nn.Conv2d(3, 1, 4, 4)
    images, reconstructions = torch.randn(2, 2, 3, 8, 8)
    losses = gan(r1=6.0, gradient_penalty=5.0).discriminator_loss(images, reconstructions, discriminator, progress())
    length = discriminator.weight.detach().norm() / 2  # the same for every image of a linear D
    torch.testing.assert_close(losses["r1"].detach(), 3 * length**2)
    torch.testing.assert_close(losses["gradient_penalty"].detach(), 5 * (length - 1) ** 2)
    for name in ("r1", "gradient_penalty"):
        discriminator.zero_grad()
        losses[name].backward(retain_graph=True)
        assert discriminator.weight.grad.abs().max() > 0
    assert set(gan().discriminator_loss(images, reconstructions, discriminator, progress())) == {"discriminator"}


def test_lecam_pulls_logits_to_averages_of_the_other_side():
    real, fake = torch.randn(2, 4, 1, 3, 3, dtype=torch.float64)
    expected = (real - 0.2).clamp(0).square().mean() + (0.5 - fake).clamp(0).square().mean()
    assert ops.lecam(real, fake, torch.tensor(0.5), torch.tensor(0.2)).item() == pytest.approx(expected.item(), rel=1e-6)
    plugin, discriminator = gan(lecam=0.3), torch.nn.Conv2d(3, 1, 4, 4)
    averages = torch.zeros(2)
    for step in range(30):
        images, reconstructions = torch.randn(2, 2, 3, 8, 8)
        logits = [discriminator(x).detach() for x in (images, reconstructions)]
        decay = min(0.999, (1 + step) / (10 + step))
        averages = decay * averages + (1 - decay) * torch.stack([x.mean() for x in logits])
        losses = plugin.discriminator_loss(images, reconstructions, discriminator, progress(step))
        assert losses["lecam"].item() == pytest.approx(0.3 * ops.lecam(*logits, *averages).item(), rel=1e-4)
    torch.testing.assert_close(plugin.logit_means, averages)
    assert {"logit_means", "updates"} <= set(plugin.state_dict())  # so that a run resumes with them


def test_only_losses_that_are_returned_may_be_watched():
    assert gan().loss_names() == ("adversarial", "discriminator")
    assert gan(r1=1.0, lecam=0.1).loss_names() == ("adversarial", "discriminator", "lecam", "r1")


# ---- the schedule and the weight


@pytest.mark.parametrize("config, step, in_stage, stage, expected", [
    ({}, 0, 0, "joint", 1 / 10),
    ({}, 9, 9, "joint", 1),
    ({"ramp": {"*": 0}}, 0, 0, "joint", 1),
    ({"start": 5, "ramp": {"*": 0}}, 4, 4, "joint", 0),
    ({"start": 5, "ramp": {"*": 0}}, 5, 5, "joint", 1),
    ({"start": 5, "warmup": 3, "ramp": {"*": 0}}, 7, 7, "joint", 0),
    ({"start": 5, "warmup": 3, "ramp": {"*": 0}}, 8, 8, "joint", 1),
    ({"ramp": {"refine": 2}}, 40, 0, "refine", 1 / 20),
    ({"ramp": {"refine": 2}}, 49, 9, "refine", 1 / 2),
    ({"ramp": {"refine": 2}}, 59, 19, "refine", 1),
    ({"ramp": {"refine": 2}}, 99, 59, "refine", 1),
    ({"ramp": {"*": 0, "refine": 2}}, 0, 0, "joint", 1),
    ({"ramp": {"refine": 2, "*": 0}}, 40, 0, "refine", 1),
    ({"ramp": {"refine": 2}}, 0, 0, "joint", 1 / 10),
    ({"ramp": {"*": 2, "joint": 0}}, 0, 0, "joint", 1),
    ({"ramp": {"*": 2, "joint": 0}}, 0, 0, "refine", 1 / 20),
    ({"ramp": {"*": 1}, "start": 30, "warmup": 2}, 36, 36, "joint", 5 / 10),  # the later of stage and start counts
    ({"ramp": {"*": 1}, "start": 30, "warmup": 2}, 50, 4, "refine", 5 / 10),
])
def test_the_weight_follows_start_warmup_and_ramp(config, step, in_stage, stage, expected):
    assert gan(**config).factor(progress(step, in_stage, stage)) == pytest.approx(expected)


def test_the_discriminator_trains_alone_while_it_warms_up(recipe, tmp_path):
    tiny = recipe(ONE, "plugins.gan.start=2", "plugins.gan.warmup=2", "plugins.gan.ramp={train: 1}")
    job = Trainer(tiny, tmp_path / "run")
    job.run()
    found = events(tmp_path / "run")
    steps = {name: [e.step for e in found.Scalars(f"loss/{name}")] for name in ("l1", "adversarial", "discriminator")}
    assert steps == {"l1": [1, 2, 3, 4, 5, 6], "discriminator": [3, 4, 5, 6], "adversarial": [5, 6]}
    weights = {e.step: e.value for e in found.Scalars("report/adversarial_weight")}
    assert weights == {5: 0.5, 6: 1}  # an epoch has two steps
    assert [e.step for e in found.Scalars("report/logits_real")] == [3, 4, 5, 6]


def parts(recipe, *overrides):
    """Return a tokenizer, a discriminator, images and an output of the first stage of a recipe."""
    tiny = recipe(PHASES, *overrides)
    tokenizer = build(tiny)
    discriminator = make_discriminator(tokenizer, tiny)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    return tiny, tokenizer, discriminator, images


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer(recipe):
    tiny, tokenizer, discriminator, images = parts(recipe, "plugins.gan.adaptive=true", "plugins.gan.weight=0.8")
    output = tokenizer.train()(images, progress())
    pixel, adversarial = tokenizer.reconstruction_losses(images, output.reconstructions, discriminator, progress())
    last = tokenizer.decoder.last_layer
    plain = F.softplus(-discriminator(output.reconstructions)).mean()
    sizes = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (pixel["l1"], plain)]
    weight = 0.8 * (sizes[0] / (sizes[1] + 1e-4))
    torch.testing.assert_close(adversarial["adversarial"], weight * plain)
    torch.testing.assert_close(tokenizer.plugins["gan"].report()["adversarial_weight"], weight)
    assert tokenizer.plugins["gan"].report() == {}  # until there is news
    tokenizer.plugins["gan"].config.max_weight = 0.5
    (_, clamped) = tokenizer.reconstruction_losses(images, output.reconstructions, discriminator, progress())
    torch.testing.assert_close(clamped["adversarial"], 0.8 * 0.5 * plain)


def test_an_adaptive_weight_needs_a_decoder_that_trains(recipe, tmp_path):
    tiny = recipe(PHASES, "plugins.gan.adaptive=true", "stages[2].freeze=['encoder.*','decoder.*']")
    with pytest.raises(UserError, match=r"plugins\.gan\.adaptive: the decoder's last layer is frozen"):
        Trainer(tiny, tmp_path / "run")


# ---- gradients


@pytest.mark.parametrize("stage", [0, 2])
def test_the_generators_gradient_reaches_no_code_and_nothing_frozen(recipe, stage):
    tiny, tokenizer, discriminator, images = parts(recipe)
    enter(tokenizer, tiny, stage)
    discriminator.requires_grad_(False)
    output = tokenizer.train()(images, progress())
    found = tokenizer.reconstruction_losses(images, output.reconstructions, discriminator, progress())
    found[-1]["adversarial"].backward()
    reached = {name.split(".")[0] for name, p in tokenizer.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == ({"encoder", "decoder"} if stage == 0 else {"decoder"})
    assert all(p.grad is None for p in discriminator.parameters())


# ---- discriminators


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_a_patch_discriminator_halves_its_image_once_per_layer(layers, norm):
    network = PatchDiscriminator(layers, 4, norm)
    least = network.smallest
    assert network(torch.randn(2, 3, least, least + 2**layers)).shape == (2, 1, 1, 2)
    with pytest.raises(UserError, match=rf"plugins.gan.layers: .* of {least} pixels or more, and get {least - 1}x64"):
        network(torch.randn(2, 3, least - 1, 64))


def test_the_paper_lineages_discriminator_has_its_size():
    pairs = 2_768_705  # pix2pix's judges pairs of images
    assert sum(p.numel() for p in PatchDiscriminator().parameters()) == pairs - 3 * 64 * 16


@pytest.mark.fault(32)
def test_images_too_small_for_the_discriminator_are_told_before_training(recipe, tmp_path):
    with pytest.raises(UserError, match=r"plugins\.gan\.layers: .* get 32x32"):
        Trainer(recipe(ONE, "plugins.gan.layers=4"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


TIMM = "plugins.gan={network: resnet10t, features: [0, 1], width: 8, norm: group, train_network: TRAIN, pretrained: PATH}"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A file of random weights for resnet10t."""
    import timm
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("weights") / "resnet10t.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t").state_dict(), path)
    return path


@pytest.mark.parametrize("train", ["false", "true"])
def test_a_timm_network_judges_by_heads_on_its_features(recipe, tmp_path, backbone, train):
    tiny = recipe(ONE, TIMM.replace("TRAIN", train).replace("PATH", str(backbone)), "epochs=1", "checkpoint.epochs=1")
    job = Trainer(tiny, tmp_path / "run")
    before = copy.deepcopy(state(job.discriminator))
    assert [x.shape[0] for x in job.discriminator(torch.zeros(2, 3, 32, 32))] == [2, 2]
    job.run()
    moved = set(unequal(before, state(job.discriminator)))
    assert {name for name in moved if name.startswith("heads.")} == {n for n in before if n.startswith("heads.")}
    if train == "false":
        assert not any(name.startswith("features.") for name in moved)  # nor statistics
        assert not any("features." in name for name in checkpoint_at(job.out, 2)["discriminator_optimizer"])
    else:
        assert any(name.startswith("features.") for name in moved)


# ---- the three phases


class Watched:
    """A run of the three phases with a discriminator, and what stood where at each stage's start and step."""

    def __init__(self, recipe, out, *overrides):
        self.out, self.entered, self.steps, self.losses = out, [], [], []
        self.job = job = Trainer(recipe(PHASES, *overrides), out)
        Probe.listeners.update(enter_stage=self.enter, refresh_codes=self.step, embedding_loss=self.look)
        self.result = job.run()
        Probe.listeners.clear()
        self.entered.append(("end", self.snapshot(job.tokenizer)))

    def enter(self, entering, tokenizer, batches, **_):
        self.fixed = getattr(self, "fixed", None)
        self.fixed = next(batches) if self.fixed is None else self.fixed
        self.entered.append((entering, self.snapshot(tokenizer)))

    def snapshot(self, tokenizer):
        mode = tokenizer.training
        with torch.no_grad():
            latents = tokenizer.eval().latents(self.fixed)[0]
        tokenizer.train(mode)
        return {"encoder": state(tokenizer.encoder), "latents": latents, "decoder": state(tokenizer.decoder),
                "discriminator": state(self.job.discriminator)}

    def look(self, result, progress, **_):
        self.losses.append((progress.stage, *sorted(result)))

    def step(self, progress, **_):
        self.steps.append((progress.stage, state(self.job.discriminator)))


@pytest.fixture(scope="module")
def phases(recipe, tmp_path_factory):
    return Watched(recipe, tmp_path_factory.mktemp("phases") / "run", "plugins.gan.ramp={'*': 0, refine: 2}", "log.steps=1")


def test_the_frozen_encoder_stands_still_to_the_bit_with_a_discriminator_too(phases):
    snapshots = dict(phases.entered)
    assert unequal(snapshots["joint"]["encoder"], snapshots["warm-up"]["encoder"])
    for later in ("refine", "end"):
        assert not unequal(snapshots["warm-up"]["encoder"], snapshots[later]["encoder"])
        assert torch.equal(snapshots["warm-up"]["latents"], snapshots[later]["latents"])
        assert unequal(snapshots["warm-up"]["decoder"], snapshots[later]["decoder"])


def test_dense_term_and_commitment_end_with_the_joint_stage(phases):
    assert set(phases.losses) == {("joint", "codebook", "commitment", "nonstationary")}
    found = events(phases.out)
    for name in ("commitment", "nonstationary"):
        assert [e.step for e in found.Scalars(f"loss/{name}")] == [1, 2, 3, 4]


def test_the_discriminator_rests_while_the_decoder_warms_up_and_goes_on(phases):
    snapshots = dict(phases.entered)
    assert unequal(snapshots["joint"]["discriminator"], snapshots["warm-up"]["discriminator"])
    assert not unequal(snapshots["warm-up"]["discriminator"], snapshots["refine"]["discriminator"])
    assert unequal(snapshots["refine"]["discriminator"], snapshots["end"]["discriminator"])
    counts = [{int(v) for n, v in checkpoint_at(phases.out, step)["discriminator_optimizer"].items() if n.endswith("/step")}
              for step in (4, 6, 10)]
    assert counts == [{4}, {4}, {8}]
    assert not unequal(*(checkpoint_at(phases.out, step)["discriminator_optimizer"] for step in (4, 6)))


def test_the_ramp_begins_with_the_last_stage(phases):
    found = events(phases.out)
    weights = {e.step: e.value for e in found.Scalars("report/adversarial_weight")}
    assert [weights[step] for step in (1, 4)] == [1, 1] and [weights[step] for step in (7, 8, 9, 10)] == [0.25, 0.5, 0.75, 1]
    assert [e.step for e in found.Scalars("loss/adversarial")] == [1, 2, 3, 4, 7, 8, 9, 10]


def test_a_panel_compares_with_the_pictures_before_the_loss_joined(phases):
    found = events(phases.out)
    panels = found.Images("image_before_now/adversarial")
    assert [e.step for e in panels] == [10] and (panels[0].height, panels[0].width) == (3 * 32, 2 * 32)
    saved = checkpoint_at(phases.out, 8)["pictures_before"]
    assert set(saved) == {"adversarial"} and saved["adversarial"].shape == (2, 3, 32, 32)
    assert not checkpoint_at(phases.out, 4)["pictures_before"]


def interrupt(job, monkeypatch, epoch=4):
    """Run until an epoch has ended, and interrupt there."""
    end = Trainer._end_epoch

    def stop(self):
        end(self)
        if self.counters.epoch == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_end_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        job.run()
    monkeypatch.undo()


def test_pictures_and_moments_survive_an_interruption(recipe, phases, tmp_path, monkeypatch):
    overrides = ["plugins.gan.ramp={'*': 0, refine: 2}", "log.steps=1", "plugins.gan.lecam=0.1"]
    whole, again = (Trainer(recipe(PHASES, *overrides), tmp_path / name) for name in ("whole", "again"))
    whole.run()
    interrupt(again, monkeypatch)
    Trainer(recipe(PHASES, *overrides), tmp_path / "again", resume="auto").run()
    one, other = (checkpoint_at(tmp_path / name, 10) for name in ("whole", "again"))
    for part in ("tokenizer", "average", "discriminator", "discriminator_optimizer", "pictures_before"):
        assert one[part] and not unequal(one[part], other[part]), part


# ---- precision, accumulation, refusals


@pytest.mark.parametrize("overrides", [
    ["accumulate=2"],
    ["precision=bf16"],
    ["precision=bf16", "accumulate=2", "plugins.gan.adaptive=true", "plugins.gan.r1=1", "plugins.gan.gradient_penalty=1",
     "plugins.gan.lecam=0.1"],
    ["plugins.gan.generator_loss=hinge", "plugins.gan.discriminator_loss=vanilla", "plugins.gan.norm=group"],
    ["plugins.gan.generator_loss=vanilla", "plugins.gan.discriminator_loss=non-saturating", "plugins.gan.norm=none"],
])
def test_it_trains_in_every_setting(recipe, tmp_path, overrides):
    AcceleratorState._reset_state(True)  # accelerate holds one precision per process
    try:
        job = Trainer(recipe(ONE, *overrides), tmp_path / "run")
        before = copy.deepcopy(state(job.discriminator))
        result = job.run()
    finally:
        AcceleratorState._reset_state(True)
    assert math.isfinite(result["metrics"]["psnr"])
    moved = unequal(before, state(job.discriminator))
    assert {name for name in before if name.endswith("weight")} <= set(moved)
    found = events(job.out)
    names = {"adversarial", "discriminator"} | {n for n in ("r1", "gradient_penalty", "lecam") if f"gan.{n}=" in str(overrides)}
    for name in names:
        assert all(math.isfinite(e.value) for e in found.Scalars(f"loss/{name}")), name


def test_accumulated_micro_batches_equal_one_batch(recipe, tmp_path):
    ended = []
    for number, overrides in enumerate((["accumulate=2"], [])):
        tiny = recipe(ONE, "plugins.gan.norm=group", "plugins.gan.r1=1", "optim.lr=1e-4", *overrides)
        job = Trainer(tiny, tmp_path / str(number))
        job.run()
        ended.append(checkpoint_at(job.out, 6))
    assert_equal_up_to_rounding(*ended, 6)


@pytest.mark.parametrize("config, text", [
    ("generator_loss: hinged", "plugins.gan.generator_loss: 'hinged' is unknown; choices: hinge, non-saturating, vanilla"),
    ("discriminator_loss: l2", "plugins.gan.discriminator_loss: 'l2' is unknown"),
    ("norm: layer", "plugins.gan.norm: 'layer' is unknown; choices: batch, group, none"),
    ("weight: -1", "plugins.gan.weight: -1.0 must be a finite number, not negative"),
    ("start: -1", "plugins.gan.start: -1 must be"),
    ("layers: 0", "plugins.gan.layers: 0 must be at least 1"),
    ("ramp: {refine: -1}", "plugins.gan.ramp: {'refine': -1.0} must map stage names to epochs"),
    ("network: resnet10t", "plugins.gan.network: 'resnet10t' would be frozen at random; set pretrained or train_network"),
    ("wieght: 1", "plugins.gan.wieght: unknown key; did you mean 'weight'?"),
])
def test_bad_values_are_refused_with_their_key(tmp_path, config, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"plugins: {{vq: {{}}, pixel: {{}}, gan: {{{config}}}}}")
    with pytest.raises(UserError) as refused:
        load_recipe(str(path))
    assert text in str(refused.value)


@pytest.mark.parametrize("config, text", [
    ("network: resnet10, train_network: true", "plugins.gan.network: timm knows no model 'resnet10'"),
    ("network: resnet10t, pretrained: nowhere.pth", "plugins.gan.pretrained: no file 'nowhere.pth'"),
    ("network: resnet10t, train_network: true, features: [9]", "plugins.gan.features: 9 is none of resnet10t's features"),
])
def test_a_network_that_cannot_be_had_is_told_before_training(recipe, tmp_path, config, text):
    with pytest.raises(UserError) as refused:
        Trainer(recipe(ONE, f"plugins.gan={{{config}}}"), tmp_path / "run")
    assert text in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.fault(23)
def test_a_discriminator_that_needs_more_images_is_told_before_training(recipe, tmp_path, backbone):
    wanted = TIMM.replace("TRAIN", "true").replace("PATH", str(backbone)).replace("[0, 1]", "[4]")
    with pytest.raises(UserError, match=r"plugins\.gan\.network: .* batches of 1 and 32x32: Expected more than 1 value"):
        Trainer(recipe(ONE, wanted, "accumulate=8"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_steps_of_the_two_sides_leave_each_other_no_gradient(recipe, tmp_path):
    job = Trainer(recipe(PHASES, "epochs=5"), tmp_path / "run")
    seen = []

    def look(**_):
        seen.append([n for m in (job.tokenizer, job.discriminator) for n, p in m.named_parameters() if p.grad is not None])

    Probe.listeners["refresh_codes"] = look
    job.run()
    assert len(seen) == 10 and not list(itertools.chain(*seen))


# ---- what plugins report


@pytest.mark.parametrize("numbers, text", [
    ({"logits_real": 1.0}, "gan, returned the number 'logits_real', as another plugin does;"),
    ({"a": torch.zeros(2)}, "probe, returned as number 'a' a tensor [2] of torch.float32 on cpu"),
    ([1], "probe, returned list where dict is expected"),
])
def test_reports_that_cannot_be_shown_are_told_before_training(recipe, tmp_path, monkeypatch, numbers, text):
    monkeypatch.setattr(Probe, "report", hookimpl(lambda self: numbers), raising=False)
    with pytest.raises(PluginError) as refused:
        Trainer(recipe(PHASES), tmp_path / "run")
    assert f"hook report, served by {text}" in str(refused.value)


def test_a_loss_that_rests_now_and_then_joins_once(recipe, tmp_path):
    job = Trainer(recipe(ONE), tmp_path / "run")
    job.pictures, job.counters.losses = Pictures(job.fixed[:2]), ["l1"]
    job.counters.step_in_stage = 3
    for names in (["l1", "lazy"], ["l1"], ["l1", "lazy"]):
        job._note_losses(names)
        first = job.pictures.before["lazy"]
    assert job.pictures.before["lazy"] is first and job.counters.losses == ["l1", "lazy"]


def test_another_number_of_pictures_resumes(recipe, tmp_path, monkeypatch):
    interrupt(Trainer(recipe(PHASES), tmp_path / "run"), monkeypatch)
    result = Trainer(recipe(PHASES, "log.images=3"), tmp_path / "run", resume="auto").run()
    assert result["run"]["step"] == 10


def test_a_ramp_in_a_stage_that_does_not_exist_is_told(recipe, tmp_path):
    with pytest.raises(UserError, match=r"plugins\.gan\.ramp: there is no stage 'refnie'; did you mean 'refine'\?"):
        Trainer(recipe(PHASES, "plugins.gan.ramp={refnie: 2}"), tmp_path / "run")
