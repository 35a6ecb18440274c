"""Feature maps, frozen networks, published weights, and the two losses that need them."""

import copy
import hashlib
import pickle
import socket
from functools import partial

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torchmetrics.functional.image import lpips as reference
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from vqzoo import Features, Frozen, Tokenizer, UserError, weights
from vqzoo.tokenizer import make_plugin
from vqzoo.trainer import Trainer
from vqzoo.weights import SOURCES, Source, fetch, load_published

BACKBONES = {"alex": "alexnet", "squeeze": "squeezenet1_1", "vgg": "vgg16"}
VIT = {"img_size": 32, "patch_size": 8, "depth": 3, "num_classes": 0}


def pair(size=(32, 32), batch=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(batch, 3, *size, generator=generator) * 2 - 1 for _ in range(2)]


def loss(plugin, images, reconstructions):
    ((_, value),) = plugin.reconstruction_loss(images=images, reconstructions=reconstructions).items()
    return value


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """Return a random backbone's features, and the file in which the whole classifier would be saved."""
    folder, made = tmp_path_factory.mktemp("backbones"), {}

    def make(network):
        if network not in made:
            with torch.device("meta"):
                features = getattr(torchvision.models, BACKBONES[network])(weights=None).features
            features = features.to_empty(device="cpu")
            generator = torch.Generator().manual_seed(1)
            for p in features.parameters():
                p.data.normal_(0, (2 / p[0].numel()) ** 0.5 if p.dim() > 1 else 0.1, generator=generator)
            state = {f"features.{name}": value for name, value in features.state_dict().items()}
            state["classifier.1.weight"] = torch.zeros(2, 2)
            file = folder / f"{network}.{'safetensors' if network == 'alex' else 'pth'}"
            save_file(state, file) if network == "alex" else torch.save(state, file)
            made[network] = features, file
        return made[network]

    return make


# ---- features


@pytest.mark.parametrize(
    "name, args, layers, channels, reductions",
    [
        ("resnet10t", {"channels": [8, 16, 24, 32]}, [-3, 0], [64, 16], [2, 8]),
        ("mobilenetv2_100", {"pad_type": "same"}, [2, 1], [24, 32], [4, 8]),
        ("vit_tiny_patch16_224", VIT, [-2, 0], [192, 192], [8, 8]),
    ],
)
def test_features_are_those_of_timm_from_shallow_to_deep(name, args, layers, channels, reductions):
    torch.manual_seed(0)
    features = Features(name, layers, args={**args, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]})
    torch.manual_seed(0)
    model = timm.create_model(name, **args).eval()
    images, _ = pair()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    wanted = model.forward_intermediates(((images + 1) / 2 - mean) / std, intermediates_only=True)
    found = features(images)
    assert features.channels == channels and features.reductions == reductions
    assert [f.shape[1] for f in found] == channels and [32 // f.shape[-1] for f in found] == reductions
    for map, layer in zip(found, sorted(layer % len(wanted) for layer in layers), strict=True):
        torch.testing.assert_close(map, wanted[layer])


def test_all_layers_are_the_default_and_what_lies_behind_the_last_is_removed():
    torch.manual_seed(0)
    assert len(Features("resnet10t").channels) == 5
    shallow = Features("resnet10t", [1])
    assert not any(name.startswith(("model.layer2", "model.fc")) for name in shallow.state_dict())


def test_frozen_features_stay_as_they_are_and_others_train():
    images, _ = pair()
    for frozen in (True, False):
        features = Features("resnet10t", [1], frozen=frozen).train()
        before = copy.deepcopy(features.state_dict())
        images.requires_grad_(True).grad = None
        features(images)[0].square().mean().backward()
        assert any(module.training for module in features.modules()) != frozen
        assert all((p.grad is None) == frozen for p in features.parameters()) and images.grad.abs().sum() > 0
        assert all(torch.equal(before[key], value) for key, value in features.state_dict().items()) == frozen


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "resnet10x"}, r"plugins\.gan\.network: .*'resnet10x'.*did you mean 'resnet10t'"),
        ({"layers": [1, 5]}, r"plugins\.gan\.layers: 5 .*resnet10t.* 0 to 4, or -1 to -5"),
        ({"layers": [-6]}, r"plugins\.gan\.layers: -6"),
        ({"pretrained": "nowhere.safetensors"}, r"plugins\.gan\.pretrained: no file 'nowhere\.safetensors'"),
        ({"args": {"mean": 0.5}}, r"plugins\.gan\.args\.mean: 0\.5"),
        ({"args": {"widht": 5}}, r"plugins\.gan\.args: resnet10t.*widht"),
    ],
)
def test_mistakes_of_features_are_explained(options, message):
    with pytest.raises(UserError, match=message):
        Features(**{"name": "resnet10t", "key": "plugins.gan", **options})


def test_images_that_the_network_cannot_take_are_explained():
    features = Features("vit_tiny_patch16_224", args=VIT)
    features(pair()[0])
    with pytest.raises(UserError, match=r"plugins\.perceptual\.network: vit_tiny.*48x32.*plugins\.perceptual\.args.*dynamic"):
        features(pair((48, 32))[0])


@pytest.mark.fault(37)
def test_weights_out_of_reach_are_named_with_their_address(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("hub out of reach")

    monkeypatch.setattr("timm.models._builder.load_pretrained", unreachable)
    text = r"plugins\.perceptual\.pretrained.*safetensors of https://huggingface\.co/timm/resnet10t\..*hub out of reach.*path"
    with pytest.raises(UserError, match=text):
        make_plugin("perceptual", {"network": "resnet10t"}).reconstruction_loss(*pair())


# ---- a network that is no part of the tokenizer


def test_a_frozen_network_is_made_once_at_first_use_and_shared_by_copies():
    made = []

    def make():
        made.append(nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 2)))
        return made[-1]

    owner = nn.Module()
    owner.held = Frozen(make)
    twin = copy.deepcopy(owner)
    assert not made and not owner.state_dict() and not list(owner.parameters())
    state = torch.get_rng_state()
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = owner.train().held(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(twin.held(x), y) and torch.equal(copy.deepcopy(owner).held(x), y) and len(made) == 1
    y.sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None and not p.requires_grad for p in made[0].parameters())
    assert not owner.state_dict() and not list(owner.modules())[1:]


def test_a_pickled_frozen_network_is_made_again():
    again = pickle.loads(pickle.dumps(Frozen(partial(nn.PixelShuffle, 2))))
    assert again(torch.zeros(1, 4, 1, 1)).shape == (1, 1, 2, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_frozen_network_follows_its_argument():
    frozen = Frozen(partial(nn.Linear, 2, 2))
    for device in ("cpu", "cuda", "cpu"):
        assert frozen(torch.zeros(1, 2, device=device)).device.type == device


# ---- published weights


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Publish a small file, under the name "net", for a hub cache that is empty."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv("VQZOO_OFFLINE")
    file = tmp_path / "net-00000000.pth"
    torch.save({"features.weight": torch.ones(1, 2, dtype=torch.float16), "features.bias": torch.zeros(1)}, file)
    made = Source(file.as_uri(), file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setitem(SOURCES, "net", made)
    return made


@pytest.mark.fault(37)
def test_a_missing_file_is_downloaded_once_and_fills_a_module(source, monkeypatch):
    before = socket.getdefaulttimeout()
    module = nn.Linear(2, 1)
    load_published(module, "net", None, "plugins.x.weights", "features.")
    assert torch.equal(module.weight, torch.ones(1, 2)) and module.weight.dtype == torch.float32
    assert source.file.is_file() and socket.getdefaulttimeout() == before
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    load_published(module, "net", None, "plugins.x.weights", "features.")


@pytest.mark.fault(37)
def test_a_download_of_another_hash_is_refused_and_leaves_nothing(source):
    wrong = Source(source.url, 1, "abcdef01")
    with pytest.raises(UserError, match="abcdef01.*invalid hash"):
        fetch(wrong, "plugins.x.weights")
    assert not list(wrong.file.parent.glob("*.pth*partial")) and not wrong.file.exists()


@pytest.mark.fault(37)
def test_a_server_that_does_not_answer_is_given_up(source, monkeypatch):
    monkeypatch.setattr(weights, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/silent-12345678.pth"
        with pytest.raises(UserError) as refused:
            fetch(Source(url, 7, "12345678"), "plugins.x.weights")
    folder = torch.hub.get_dir() + "/checkpoints"
    for part in ("plugins.x.weights: silent-12345678.pth", "7 bytes", "SHA-256 12345678", "timed out", url, folder,
                 "vqzoo weights fetch"):
        assert part in str(refused.value)


def test_the_sources_are_those_that_torchvision_names():
    for name, kind in (("vgg16", "VGG16"), ("alexnet", "AlexNet"), ("squeezenet1_1", "SqueezeNet1_1")):
        published = torchvision.models.get_weight(f"{kind}_Weights.IMAGENET1K_V1")
        assert SOURCES[name].url == published.url and SOURCES[name].sha256[:8] == published.url[-12:-4]
        assert len(SOURCES[name].sha256) == 64
        assert SOURCES[name].bytes / 2**20 == pytest.approx(published.meta["_file_size"], abs=1e-3)


def test_files_that_do_not_fit_are_refused(tmp_path):
    module, key = nn.Linear(2, 1), "plugins.lpips.weights"
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save(module, tmp_path / "module.pth")
    torch.save({"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, tmp_path / "shape.pth")
    for name, text in (
        ("nowhere.pth", "no file .*nowhere.*vgg16.*https"), ("text.pth", "cannot be read"),
        ("text.safetensors", "cannot be read"),
        ("module.pth", "cannot be read"), ("list.pth", "no state dict"), ("shape.pth", "torchvision's vgg16: 1 of 2.*weight"),
    ):
        with pytest.raises(UserError, match=rf"plugins\.lpips\.weights: .*{text}"):
            load_published(module, "vgg16", str(tmp_path / name), key)


# ---- LPIPS


@pytest.mark.parametrize("network", BACKBONES)
def test_lpips_is_that_of_torchmetrics(network, backbone, monkeypatch):
    features, file = backbone(network)
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda *_: features)
    metric = LearnedPerceptualImagePatchSimilarity(network)
    images, reconstructions = pair((40, 33), 3)
    plugin = make_plugin("lpips", {"network": network, "weights": str(file), "weight": 0.5})
    assert plugin.loss_names() == ("lpips",)
    wanted = metric(reconstructions, images)
    assert wanted > 1e-3
    torch.testing.assert_close(loss(plugin, images, reconstructions), 0.5 * wanted, rtol=1e-5, atol=1e-7)
    assert loss(plugin, images, images) == 0


def test_lpips_is_float32_and_its_gradient_reaches_reconstructions_only(backbone):
    plugin = make_plugin("lpips", {"network": "squeeze", "weights": str(backbone("squeeze")[1])}).train()
    images, reconstructions = (x.requires_grad_(True) for x in pair())
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(plugin, images, 2 * reconstructions)
    assert found.dtype == torch.float32 and found == loss(plugin, images, 2 * reconstructions)
    found.backward()
    assert (reconstructions.grad.flatten(1).abs().amax(1) > 0).all() and images.grad is None
    outside = reconstructions.grad[(2 * reconstructions).abs() > 1]
    assert (outside != 0).float().mean() > 0.8  # nothing is clamped; SqueezeNet does not see the last row and column
    network = plugin._distance.network
    assert not list(plugin.parameters()) and not plugin.state_dict()
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("network, least", [("alex", 31), ("squeeze", 17), ("vgg", 16)])
def test_lpips_says_how_large_an_image_must_be(network, least, backbone):
    plugin = make_plugin("lpips", {"network": network, "weights": str(backbone(network)[1])})
    assert loss(plugin, *pair((least, least))) > 0
    with pytest.raises(UserError, match=rf"plugins\.lpips\.network: {network} .*{least} pixels.*64x{least - 1}.*data\.res"):
        loss(plugin, *pair((64, least - 1)))
    with pytest.raises(RuntimeError):  # so the limit is no larger than it must be
        plugin._distance.network.backbone(torch.zeros(1, 3, least - 1, least - 1))


def test_lpips_refuses_fields_that_cannot_work_and_weights_of_another_network(backbone):
    for fields, text in (({"network": "vgg19"}, r"plugins\.lpips\.network: 'vgg19'.*squeeze"), ({"weight": -1}, "weight: -1")):
        with pytest.raises(UserError, match=text):
            make_plugin("lpips", fields)
    plugin = make_plugin("lpips", {"network": "squeeze", "weights": str(backbone("alex")[1])})
    with pytest.raises(UserError, match=r"plugins\.lpips\.weights: .*alex\.safetensors.*torchvision's squeezenet1_1"):
        loss(plugin, *pair())


def test_lpips_of_published_weights_has_its_known_value():
    if not SOURCES["squeezenet1_1"].file.is_file():
        pytest.skip(f"{SOURCES['squeezenet1_1'].file} is not there")
    generator = torch.Generator().manual_seed(42)
    images, reconstructions = (torch.rand(2, 3, 100, 100, generator=generator) * 2 - 1 for _ in range(2))
    plugin = make_plugin("lpips", {"network": "squeeze"})
    found = plugin._distance(reconstructions, images)
    torch.testing.assert_close(found, torch.tensor([0.1024, 0.0938]), rtol=0, atol=1e-4)  # as torchmetrics documents


# ---- the perceptual loss


@pytest.mark.parametrize(
    "name, layers, args", [("resnet10t", [0, 2], {}), ("vit_tiny_patch16_224", [0, -1], VIT)], ids=["resnet", "vit"]
)
def test_the_perceptual_loss_is_its_formula(name, layers, args, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, **args).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    fields = {"network": name, "layers": layers, "args": args, "weight": 3.0,
              "pretrained": str(tmp_path / "weights.safetensors")}
    plugin = make_plugin("perceptual", fields)
    assert plugin.loss_names() == ("perceptual",)
    images, reconstructions = pair()
    mean, std = (torch.tensor(model.pretrained_cfg[key]).double().view(3, 1, 1) for key in ("mean", "std"))
    model.double()
    x, y = (model.forward_intermediates(((i.double() + 1) / 2 - mean) / std, intermediates_only=True)
            for i in (images, reconstructions))
    terms = []
    for layer in layers:
        cosine = nn.functional.cosine_similarity(x[layer], y[layer], dim=1)
        terms.append((2 - 2 * cosine).mean())  # the squared distance of two unit vectors
    torch.testing.assert_close(loss(plugin, images, reconstructions).double(), 3 * sum(terms) / 2, rtol=1e-4, atol=1e-5)
    assert loss(plugin, images, images) == 0


def test_the_perceptual_loss_is_float32_and_its_gradient_reaches_reconstructions_only():
    plugin = make_plugin("perceptual", {"network": "resnet10t", "layers": [0, 1], "pretrained": False}).train()
    images, reconstructions = (x.requires_grad_(True) for x in pair())
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(plugin, images, 2 * reconstructions)
    assert found.dtype == torch.float32 and found == loss(plugin, images, 2 * reconstructions)
    found.backward()
    assert reconstructions.grad.abs().min() > 0 and images.grad is None and not plugin.state_dict()
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    loss(plugin, images[:1], flat).backward()
    assert flat.grad.isfinite().all()


@pytest.fixture
def of_plugin(backbone):
    """Make one of the two losses with further fields, always with the same weights."""
    fields = {"lpips": {"network": "squeeze", "weights": str(backbone("squeeze")[1])},
              "perceptual": {"network": "resnet10t", "layers": [0, 1], "pretrained": False}}

    def make(name, **more):
        torch.manual_seed(0)
        plugin = make_plugin(name, {**fields[name], **more})
        return plugin, getattr(plugin, {"lpips": "_distance", "perceptual": "_features"}[name])

    return make


@pytest.mark.parametrize("name", ["lpips", "perceptual"])
def test_bf16_runs_the_convolutions_alone(of_plugin, name):
    images, (plain, _), (plugin, frozen), dtypes = pair(), of_plugin(name), of_plugin(name, bf16=True), set()
    loss(plugin, *images)
    for module in (m for m in frozen.network.modules() if isinstance(m, nn.Conv2d)):
        module.register_forward_hook(lambda module, inputs, output: dtypes.add((output.dtype, module.weight.dtype)))
    found, expected = loss(plugin, *images), loss(plain, *images)
    assert dtypes == {(torch.bfloat16, torch.float32)} and found.dtype == torch.float32
    assert found != expected and abs(found / expected - 1) < 0.01
    near = images[0] + 1e-3 * images[1]  # differences below what bfloat16 could tell from 1
    assert 0 < loss(plugin, images[0], near) < 0.01 * found and loss(plugin, images[0], images[0]) == 0


@pytest.mark.parametrize("name", ["lpips", "perceptual"])
def test_a_compiled_loss_is_the_same(of_plugin, name, monkeypatch):
    original, compiled, gradients = torch.compile, [], []

    def trace(what, **options):  # without generating code
        compiled.append(what)
        return original(what, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", trace)
    made = [of_plugin(name), of_plugin(name, compile=True)]
    for plugin, _ in made:
        images, reconstructions = pair()
        value = loss(plugin, images, reconstructions.requires_grad_())
        torch.autograd.grad(value, reconstructions, retain_graph=True)  # as an adaptive weight does
        value.backward()
        gradients.append((value.detach(), reconstructions.grad))
        assert pickle.loads(pickle.dumps(Frozen(nn.Identity, compile=True))).compile
    assert compiled == [made[1][1].network]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    torch.compiler.reset()


def test_convolutions_are_laid_out_as_they_run_best_unless_group_norms_turn_them_back():
    frozen = Frozen(partial(nn.Conv2d, 4, 4, 3))
    frozen(torch.zeros(1, 4, 8, 8))
    assert frozen.network.weight.is_contiguous(memory_format=torch.channels_last)
    frozen = Frozen(lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)))
    frozen(torch.zeros(1, 4, 8, 8))
    assert frozen.network[0].weight.is_contiguous()


# ---- a run


RUN = """
epochs: 2
ema: 0.9
precision: bf16
data: {root: ROOT, resolution: [32, 32], batch_size: 8, eval_batch_size: 4, workers: 0}
encoder: {name: vqgan_encoder, stride: 4, args: {width: 8, mult: [1, 2], blocks: 1, patch: 2}}
decoder: {name: conv, args: {width: 8, mult: [1, 2], blocks: 1, patch: 2}}
codebook: {size: 32, width: 8}
log: {steps: 1, images: 2, drift_images: 2}
evaluate: {epochs: 100}
plugins:
  vq: {}
  pixel: {}
  lpips: {network: squeeze, weights: WEIGHTS}
  perceptual: {network: resnet10t, layers: [0, 1], pretrained: false}
stages:
  - {name: joint, epochs: 1}
  - {name: refine, freeze: ["encoder.*"], hooks: {reconstruction_loss: [pixel, perceptual, lpips]}}
"""


def test_a_run_trains_with_both_and_its_tokenizer_needs_neither(recipe, backbone, tmp_path, capsys):
    file = tmp_path / "squeeze.pth"
    file.write_bytes(backbone("squeeze")[1].read_bytes())
    trainer = Trainer(recipe(RUN.replace("WEIGHTS", str(file))), tmp_path / "run")
    names = {plugin: trainer.tokenizer.plugins[plugin] for plugin in ("lpips", "perceptual")}
    assert not any(name.startswith("plugins.") for name in trainer.tokenizer.state_dict())
    assert trainer.ema.plugins["lpips"] is not names["lpips"]
    assert trainer.ema.plugins["lpips"]._distance is names["lpips"]._distance
    before = copy.deepcopy(trainer.tokenizer.decoder.state_dict())
    trainer.run()
    assert "lpips" in capsys.readouterr().err
    assert any(not torch.equal(before[key], value) for key, value in trainer.tokenizer.decoder.state_dict().items())
    network = names["lpips"]._distance.network
    wanted = backbone("squeeze")[0].state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in network.backbone.state_dict().items())
    file.unlink()
    assert not any(name.startswith("plugins.") for name in load_file(tmp_path / "run/tokenizer/model.safetensors"))
    tokenizer = Tokenizer.from_pretrained(tmp_path / "run")
    assert set(tokenizer.plugins) == {"vq"} and tokenizer.encode(pair()[0]).shape == (2, 8, 8)


@pytest.mark.fault(37)
def test_missing_weights_end_a_run_before_its_folder_is_made(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    monkeypatch.delenv("VQZOO_OFFLINE")
    with pytest.raises(UserError, match=r"plugins\.lpips\.weights: squeezenet1_1-b8a52dc0\.pth.*no route.*hub/checkpoints"):
        Trainer(recipe(RUN.replace("WEIGHTS", "null")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
