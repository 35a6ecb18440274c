"""Encoders by timm name and decoders: shapes, gradients, normalisation, weights and the user's mistakes."""

import copy
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vqzoo.errors import UserError
from vqzoo.networks import Encoder, make_decoder

WEIGHTS = Path(__file__).parents[2] / "shared/data/weights/mobilenetv2_100.safetensors"
HALF = [0.5, 0.5, 0.5]
SMALL = {"width": 16, "mult": [1, 2, 2, 4], "blocks": 1}
ENCODERS = [
    ("vqgan_encoder", 8, (64, 64), SMALL),
    ("convnextv2_atto", 16, (64, 96), {"drop_path_rate": 0.0}),
    ("resnet18", 8, (64, 96), {}),
    ("mobilenetv2_100", 4, (64, 64), {"pad_type": "same"}),
    ("vit_tiny_patch16_224", 16, (128, 128), {}),
]


def images(size, batch=2):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def small_encoder(**options):
    defaults = {"name": "vqgan_encoder", "width": 6, "stride": 8, "resolution": (32, 32), "args": SMALL}
    return Encoder(**{**defaults, **options})


@pytest.mark.parametrize("name, stride, resolution, args", ENCODERS, ids=[row[0] for row in ENCODERS])
def test_two_steps_reach_every_parameter(name, stride, resolution, args):
    torch.manual_seed(0)
    encoder = Encoder(name, 6, stride, resolution, args=args)
    decoder = make_decoder("conv", 6, stride, resolution, {"width": 16, "blocks": 1})
    model = nn.Sequential(encoder, decoder).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batch = images(resolution)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        latents = encoder(batch)
        assert latents.shape == (2, 6, resolution[0] // stride, resolution[1] // stride)
        reconstructions = decoder(latents)
        assert reconstructions.shape == batch.shape
        (reconstructions - batch).abs().mean().backward()
        assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        optimizer.step()
    assert [key for key, p in model.named_parameters() if torch.equal(p, before[key])] == []


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_strides_of_encoders_and_decoders_agree(stride):
    mult = {4: [1, 2, 2], 8: [1, 2, 2, 4], 16: [1, 1, 2, 2, 4]}[stride]
    encoder = small_encoder(stride=stride, args={**SMALL, "mult": mult})
    assert encoder.stride == stride and encoder.width == 6
    assert len(encoder.model.stages) == len(mult)
    latents = encoder(images((32, 48)))
    assert latents.shape == (2, 6, 32 // stride, 48 // stride)
    for name, args in (("conv", {"width": 16, "blocks": 1}), ("vit", {"width": 32, "depth": 1, "heads": 2})):
        decoder = make_decoder(name, 6, stride, (32, 32), args)
        assert decoder(latents).shape == (2, 3, 32, 48)


def test_layers_behind_the_feature_are_removed():
    shallow, deep = (Encoder("resnet18", 4, stride, (64, 64)) for stride in (8, 16))
    assert not any(key.startswith(("model.layer3", "model.fc")) for key in shallow.state_dict())
    assert any(key.startswith("model.layer3") for key in deep.state_dict())


def test_vit_takes_its_last_block_and_other_patch_and_image_sizes():
    encoder = Encoder("vit_tiny_patch16_224", 4, 8, (32, 48), args={"patch_size": 8, "dynamic_img_size": True})
    assert encoder.feature == 11 and len(encoder.model.blocks) == 12
    assert encoder(images((32, 48))).shape == (2, 4, 4, 6)
    assert encoder(images((64, 32))).shape == (2, 4, 8, 4)
    fixed = Encoder("vit_tiny_patch16_224", 4, 16, (32, 32))
    with pytest.raises(UserError, match="32x32.*64x32.*dynamic_img_size"):
        fixed(images((64, 32)))


@pytest.mark.parametrize("name", ["convnextv2_atto", "vqgan_encoder"])
def test_images_are_normalised_for_the_model(name):
    encoder = Encoder(name, 4, 8, (32, 32)) if name != "vqgan_encoder" else small_encoder()
    seen = []
    inner = encoder.model.forward_intermediates
    encoder.model.forward_intermediates = lambda x, **options: (seen.append(x), inner(x, **options))[1]
    batch = images((32, 32))
    encoder(batch)
    config = {"mean": HALF, "std": HALF} if name == "vqgan_encoder" else timm.get_pretrained_cfg(name).to_dict()
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(seen[0], (batch * 0.5 + 0.5 - mean) / std)
    assert not {"mean", "std"} & set(encoder.state_dict())


def test_mean_and_std_of_the_arguments_win():
    encoder = Encoder("resnet18", 4, 8, (32, 32), args={"mean": HALF, "std": [0.25] * 3})
    torch.testing.assert_close(encoder.normalise(images((8, 8))), 2 * images((8, 8)))


def test_real_weights_are_loaded():
    if not WEIGHTS.is_file():
        pytest.skip(f"the MobileNetV2 weight file {WEIGHTS.name} is not here")
    args = {"pad_type": "same", "mean": HALF, "std": HALF}
    encoder = Encoder("mobilenetv2_100", 4, 16, (64, 64), str(WEIGHTS), args)
    stored = load_file(WEIGHTS)
    kept = {key: value for key, value in encoder.model.state_dict().items() if "num_batches" not in key}
    assert len(kept) > 100
    for key, value in kept.items():
        torch.testing.assert_close(value, stored[key], rtol=0, atol=0)
    assert encoder(images((64, 64))).isfinite().all()


def test_a_weight_file_of_our_own_encoder_is_loaded_and_a_foreign_one_refused(tmp_path):
    source = small_encoder()
    save_file(source.model.state_dict(), tmp_path / "good.safetensors")
    loaded = small_encoder(pretrained=str(tmp_path / "good.safetensors"))
    for key, value in source.model.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[key])
    save_file({"stranger": torch.zeros(2)}, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=r"encoder\.pretrained.*bad\.safetensors.*vqgan_encoder"):
        small_encoder(pretrained=str(tmp_path / "bad.safetensors"))


@pytest.mark.fault(37)
def test_missing_weights_name_the_way_out(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"encoder\.pretrained.*nowhere\.safetensors"):
        Encoder("resnet18", 4, 8, (32, 32), pretrained=str(tmp_path / "nowhere.safetensors"))

    def unreachable(*_, **__):
        raise OSError("hub out of reach")

    monkeypatch.setattr("timm.models._builder.load_pretrained", unreachable)
    with pytest.raises(UserError, match=r"encoder\.pretrained.*resnet18.*hub out of reach.*path"):
        Encoder("resnet18", 4, 8, (32, 32), pretrained=True)
    with pytest.raises(UserError, match=r"encoder\.args.*resnet18.*wrong_key"):
        Encoder("resnet18", 4, 8, (32, 32), pretrained=True, args={"wrong_key": 1})


def batch_norm_statistics(encoder):
    return {key: value.clone() for key, value in encoder.state_dict().items() if "running" in key}


@pytest.mark.parametrize("mode, moves", [("train", True), ("frozen", False), ("sync", True)])
def test_batch_norm_modes(mode, moves):
    torch.manual_seed(0)
    encoder = Encoder("mobilenetv2_100", 4, 8, (32, 32), batch_norm=mode)
    encoder.eval().train()
    before = batch_norm_statistics(encoder)
    encoder(images((32, 32))).square().mean().backward()
    after = batch_norm_statistics(encoder)
    assert before and all(torch.equal(before[key], after[key]) != moves for key in before)
    layers = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(layer.training == moves and layer.weight.grad is not None for layer in layers)
    assert all(isinstance(layer, nn.SyncBatchNorm) == (mode == "sync") for layer in layers)


def test_sync_batch_norm_computes_what_batch_norm_does():
    torch.manual_seed(0)
    plain, sync = (Encoder("mobilenetv2_100", 4, 8, (32, 32), batch_norm=mode) for mode in ("train", "sync"))
    sync.load_state_dict(plain.state_dict())
    torch.testing.assert_close(sync(images((32, 32))), plain(images((32, 32))))


def test_paper_configuration_has_its_size():
    with torch.device("meta"):
        encoder = Encoder("vqgan_encoder", 128, 8, (128, 128))
        decoder = make_decoder("conv", 128, 8, (128, 128))
    assert sum(p.numel() for p in encoder.parameters()) == 24_282_496
    assert sum(p.numel() for p in decoder.parameters()) == 39_851_907
    biased = [key for key, p in encoder.named_parameters() if key.endswith("bias") and "stem" in key]
    assert biased == [] and encoder.model.stem[1].kernel_size == (3, 3)


def test_patches_multiply_the_stride():
    encoder = small_encoder(args={**SMALL, "mult": [1, 2], "patch": 4})
    decoder = make_decoder("conv", 6, 8, (32, 32), {"width": 16, "mult": [1, 2], "blocks": 1, "patch": 4})
    assert [feature["reduction"] for feature in encoder.model.feature_info] == [4, 8]
    assert decoder(encoder(images((32, 32)))).shape == (2, 3, 32, 32)


def test_our_encoder_serves_timm_itself():
    assert "vqgan_encoder" in timm.list_models("vqgan*")
    model = timm.create_model("vqgan_encoder", features_only=True, out_indices=(1, 3), **SMALL)
    assert model.feature_info.reduction() == [2, 8]
    assert [tuple(f.shape) for f in model(images((32, 32)))] == [(2, 32, 16, 16), (2, 64, 4, 4)]


@pytest.mark.parametrize("name", ["conv", "vit"])
def test_checkpointed_gradients_are_the_same(name):
    sizes = {"conv": {"width": 16, "blocks": 1}, "vit": {"width": 32, "depth": 2, "heads": 2}}[name]
    gradients = []
    for grad_checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = small_encoder(args={**SMALL, "grad_checkpointing": grad_checkpointing})
        decoder = make_decoder(name, 6, 8, (32, 32), {**sizes, "grad_checkpointing": grad_checkpointing})
        decoder(encoder(images((32, 32)))).square().mean().backward()
        gradients.append([p.grad for p in (*encoder.parameters(), *decoder.parameters())])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("name", ["conv", "vit"])
def test_last_layer_reaches_the_output_and_is_stored_once(name, tmp_path):
    args = {"width": 16, "blocks": 1} if name == "conv" else {"width": 32, "depth": 1, "heads": 2}
    decoder = make_decoder(name, 6, 8, (32, 32), args)
    reconstructions = decoder(torch.randn(1, 6, 4, 4))
    (gradient,) = torch.autograd.grad(reconstructions.sum(), decoder.last_layer)
    assert isinstance(decoder.last_layer, nn.Parameter) and gradient.abs().sum() > 0
    save_file(decoder.state_dict(), tmp_path / "decoder.safetensors")  # refuses a tensor with two names
    decoder.last_layer.data.mul_(1e4)
    assert decoder(torch.randn(1, 6, 4, 4)).abs().max() > 1


def test_vit_decoder_trains_every_parameter():
    decoder = make_decoder("vit", 6, 8, (32, 48), {"width": 32, "depth": 2, "heads": 2})
    decoder(torch.randn(1, 6, 4, 6)).square().mean().backward()
    assert [key for key, p in decoder.named_parameters() if p.grad is None] == []


def test_copies_and_state_dicts_compute_the_same():
    encoder = Encoder("mobilenetv2_100", 4, 8, (32, 32), batch_norm="frozen").eval()
    other = Encoder("mobilenetv2_100", 4, 8, (32, 32), batch_norm="frozen").eval()
    batch = images((32, 32))
    assert not torch.equal(encoder(batch), other(batch))
    other.load_state_dict(encoder.state_dict())
    for twin in (other, copy.deepcopy(encoder)):
        assert torch.equal(encoder(batch), twin(batch))
        assert not any(m.training for m in twin.train().modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.fault(32)
@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "resnet81"}, r"encoder\.name.*resnet81.*did you mean 'resnet"),
        ({"name": "vqgan_encodr"}, r"did you mean 'vqgan_encoder'"),
        ({"name": "resnet18.no_such_tag"}, r"encoder\.name.*no_such_tag"),
        ({"stride": 16}, r"encoder\.stride: vqgan_encoder.*16.*1, 2, 4, 8"),
        ({"resolution": (32, 36)}, r"32x36.*stride 8.*32x32"),
        ({"args": {"widht": 8}}, r"encoder\.args: vqgan_encoder.*widht"),
        ({"args": {"mean": 0.5}}, r"encoder\.args\.mean: 0\.5"),
        ({"args": {**SMALL, "in_chans": 1}}, r"encoder\.args\.in_chans: 1 for vqgan_encoder, where images have 3 channels"),
        ({"batch_norm": "freeze"}, r"encoder\.batch_norm: 'freeze'.*'frozen'.*sync"),
        ({"pretrained": True}, r"encoder\.pretrained.*vqgan_encoder.*path"),
    ],
)
def test_mistakes_of_an_encoder_are_explained(options, message):
    with pytest.raises(UserError, match=message):
        small_encoder(**options)


@pytest.mark.fault(32)
@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 4, 32, 32), (3, 32, 32)])
def test_images_of_another_number_of_channels_are_refused(shape):
    with pytest.raises(UserError, match=rf"encoder: images are \[B, 3, H, W\].*these are {re.escape(str(list(shape)))}$"):
        small_encoder()(torch.zeros(shape))


@pytest.mark.fault(32)
def test_images_that_do_not_fit_are_explained():
    with pytest.raises(UserError, match="36x32.*stride 8"):
        small_encoder()(images((36, 32)))
    with pytest.raises(UserError, match=r"inception_v3.*grid.*stride 8"):
        Encoder("inception_v3", 4, 8, (96, 96))(images((96, 96)))


@pytest.mark.fault(32)
@pytest.mark.parametrize(
    "name, stride, args, message",
    [
        ("conf", 8, {}, r"decoder\.name: 'conf'.*did you mean 'conv'.*vit"),
        ("conv", 8, {"mult": [1, 2]}, r"decoder\.args: 2 levels and patch 1 enlarge by 2.*stride is 8"),
        ("conv", 12, {}, r"decoder\.args.*stride is 12"),
        ("conv", 8, {"depth": 2}, r"decoder\.args: the conv decoder.*depth"),
        ("vit", 8, {"width": 32, "heads": 5}, r"decoder\.args: the vit decoder"),
        ("vit", 10, {}, r"decoder\.stride: an image of 48x48.*stride 10.*50x50"),
    ],
)
def test_mistakes_of_a_decoder_are_explained(name, stride, args, message):
    with pytest.raises(UserError, match=message):
        make_decoder(name, 6, stride, (48, 48), args)
