"""What could not work is found before training, and leaves nothing behind; what stages route is what is trained and kept."""

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from plugins_for_tests import Probe
from test_training import COMMON, exported, run

from vqzoo import PluginError, Tokenizer, UserError
from vqzoo.data import eval_batches, make_dataset
from vqzoo.evaluation.evaluate import Evaluator
from vqzoo.prepare import build, make_accelerator, prepare
from vqzoo.trainer import Trainer, merge_losses

pytestmark = pytest.mark.usefixtures("listeners")
PLAIN = COMMON + """
epochs: 1
plugins: {vq: {}, pixel: {}, probe: {}}
"""


def refused(made, out, *names):
    """Assert that a run of this recipe is refused by a message with these names, and return the message."""
    with pytest.raises(UserError) as caught:
        Trainer(made, out)
    for name in names:
        assert name in str(caught.value)
    return str(caught.value)


def test_a_folder_that_is_not_a_run_is_left_alone(recipe, tmp_path):
    mine = tmp_path / "mine"
    (mine / "tokenizer").mkdir(parents=True)
    (mine / "tokenizer" / "precious.txt").write_text("kept")
    refused(recipe(PLAIN), mine, str(mine), "not empty")
    assert (mine / "tokenizer" / "precious.txt").read_text() == "kept" and len(list(mine.iterdir())) == 1


def test_resuming_beside_a_recipe_of_ones_own_is_refused_and_leaves_it_as_it_is(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text("# mine\n" + PLAIN.replace("ROOT", "nowhere"))
    before = (tmp_path / "recipe.yaml").read_text()
    with pytest.raises(UserError, match="not written by a run"):
        Trainer(recipe(PLAIN), tmp_path, resume="auto")
    assert (tmp_path / "recipe.yaml").read_text() == before


@pytest.mark.fault(29)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_in_which_nothing_decodes_leaves_no_folder(split, recipe, tmp_path):
    for name in ("train", "val"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(9):
            path = tmp_path / "data" / name / f"{number}.png"
            if name == split:
                path.write_text("not an image")
            else:
                Image.new("RGB", (32, 32), "teal").save(path)
    named = {"train": "bad_files", "val": "data.val"}[split]
    refused(recipe(PLAIN, f"data.root={tmp_path / 'data'}"), tmp_path / "out", named, ".png")
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(32)
def test_a_network_that_cannot_process_the_images_leaves_no_folder(recipe, tmp_path):
    made = recipe(PLAIN, "encoder.name=resnet18", "encoder.stride=4", "encoder.args={in_chans: 1}")
    made.encoder.args = {"in_chans": 1}
    refused(made, tmp_path / "out", "encoder", "resnet18")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("hook", ["make_codebook", "make_discriminator"])
def test_a_hook_that_is_asked_once_cannot_be_routed_by_a_stage(hook, recipe, tmp_path):
    text = PLAIN + f"stages: [{{name: joint, hooks: {{{hook}: []}}}}]\n"
    refused(recipe(text), tmp_path / "out", f"stages[0].hooks.{hook}", "once")


def test_the_key_of_a_mistake_in_the_common_routing_is_the_common_one(recipe):
    text = PLAIN + "hooks: {quantize: [probe]}\nstages: [{name: joint, hooks: {refresh_codes: []}}]\n"
    with pytest.raises(UserError, match=r"^hooks.quantize: probe only wraps"):
        build(recipe(text))


def test_the_key_of_a_freeze_pattern_is_its_stage(recipe):
    with pytest.raises(UserError, match=r"^stages\[0\].freeze: 'nobody.\*'"):
        build(recipe(PLAIN + "stages: [{name: joint, freeze: ['nobody.*']}]\n"))


@pytest.mark.fault(39)
def test_rivals_that_a_stage_routes_train_and_their_export_loads(recipe, tmp_path):
    """Two complete quantizers, each serving a part: what is exported needs no route for what only training asks."""
    text = COMMON + """
epochs: 1
plugins: {simvq: {}, rival: {}, pixel: {}}
hooks: {make_codebook: [simvq]}
stages: [{name: joint, hooks: {quantize: [rival], straight_through: [simvq], embedding_loss: [simvq]}}]
"""
    run(recipe(text), tmp_path / "out")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.hooks.providers("quantize") == ["rival"] and tokenizer.hooks.providers("make_codebook") == ["simvq"]
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), tokenizer(images).reconstructions)


def test_losses_of_one_name_are_refused():
    one = torch.tensor(1.0)
    assert merge_losses({"a": one}, {"b": one}) == {"a": one, "b": one}
    with pytest.raises(PluginError, match="'commitment'"):
        merge_losses({"commitment": one}, {"commitment": one})


def test_a_frozen_part_of_an_encoder_keeps_its_statistics(recipe):
    made = recipe(PLAIN + "stages: [{name: joint, freeze: ['encoder.model.*']}]\n", "encoder.name=resnet18")
    made.encoder.args = {}
    tokenizer = build(made).train()
    before = {name: buffer.clone() for name, buffer in tokenizer.encoder.named_buffers()}
    tokenizer(torch.rand(4, 3, 32, 32))
    assert all(torch.equal(before[name], buffer) for name, buffer in tokenizer.encoder.named_buffers())
    assert tokenizer.encoder.head.weight.requires_grad and tokenizer.decoder.training


def test_the_launchers_accumulation_does_not_scale_the_loss(recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = make_accelerator(recipe(PLAIN))
    weight = torch.ones(1, requires_grad=True)
    accelerator.backward((3 * weight).sum())
    assert weight.grad.item() == 3


def test_bf16_takes_the_quantizers_gradients_in_float32(recipe, tmp_path, listeners):
    """A product in float32, made where autocast is off, gets a gradient that bf16 could not hold."""
    weight = torch.nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    factor = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    found = []

    def embedding_loss(result, **arguments):
        if arguments["latents"].shape[0] == 1:  # the rehearsal
            return result
        weight.grad = None
        product = factor @ weight
        product.register_hook(found.append)
        return {**result, "product": (product**2).mean() * 1e-3}

    Probe.listeners["embedding_loss"] = embedding_loss
    AcceleratorState._reset_state(True)
    try:
        run(recipe(PLAIN, "precision=bf16", "epoch_steps=1"), tmp_path / "out")
    finally:
        AcceleratorState._reset_state(True)
    wanted = torch.autograd.grad(((factor @ weight) ** 2).mean() * 1e-3, weight)[0]
    assert len(found) == 1
    torch.testing.assert_close(weight.grad, wanted, rtol=1e-5, atol=0)


def test_bf16_without_an_average_scores_the_tokenizer_that_it_exports(recipe, tmp_path):
    made = recipe(PLAIN, "precision=bf16", "ema=0")
    AcceleratorState._reset_state(True)
    try:
        result = run(made, tmp_path / "out")
    finally:
        AcceleratorState._reset_state(True)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out")
    batches = eval_batches(made.data, make_dataset(made.data, "val"))
    found = Evaluator(made.evaluate, torch.device("cpu")).tokenizer(tokenizer, batches)
    assert found.metrics == result["metrics"]


def test_a_resumed_run_needs_no_weights_from_elsewhere(recipe, tmp_path):
    text = PLAIN.replace("epochs: 1", "epochs: 2")
    run(recipe(PLAIN), tmp_path / "first")
    made = recipe(text, f"init_from={tmp_path / 'first'}")
    run(made, tmp_path / "out")
    (tmp_path / "first").rename(tmp_path / "gone")
    run(made, tmp_path / "out", resume="auto")
    assert exported(tmp_path / "out")


def test_where_init_from_leads_nowhere_the_key_is_named(recipe, tmp_path):
    refused(recipe(PLAIN, f"init_from={tmp_path / 'nowhere'}"), tmp_path / "out", "init_from: ", "nowhere")


def test_a_stage_that_a_plugin_names_and_nobody_has_is_told(recipe, tmp_path):
    kmeans = PLAIN.replace("probe: {}", "kmeans: {stage: trian}")
    refused(recipe(kmeans), tmp_path / "out", "plugins.kmeans.stage: there is no stage 'trian'; did you mean 'train'?")
    assert not (tmp_path / "out").exists()


def test_the_rehearsal_of_losses_leaves_no_trace(recipe, tmp_path):
    text = PLAIN.replace("probe: {}", "gan: {layers: 1, width: 8, lecam: 1}")
    accelerator = make_accelerator(recipe(text))
    ready, torch_state = prepare(recipe(text), accelerator), torch.get_rng_state()
    again = prepare(recipe(text), accelerator)
    for one, other in ((ready.tokenizer, again.tokenizer), (ready.discriminator, again.discriminator)):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
        assert all(parameter.grad is None for parameter in one.parameters())
    assert int(ready.tokenizer.plugins["gan"].updates) == 0 and not ready.tokenizer.plugins["gan"].report()
    assert all(int(b) == 0 for name, b in ready.discriminator.named_buffers() if name.endswith("num_batches_tracked"))
    assert torch.equal(torch_state, torch.get_rng_state())
