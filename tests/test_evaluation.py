"""Protocols, networks, distances of sets, and what `vqzoo eval`, `compare` and `weights` make of them."""

import csv
import io
import json
import math
import shutil
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.kid import poly_mmd

from vqzoo.cli import main
from vqzoo.codebook import Table
from vqzoo.data import Batch, DataConfig, crop_val, eval_batches, to_bytes, to_images
from vqzoo.errors import UserError
from vqzoo.evaluation import METRICS, PROTOCOLS, EvaluateConfig, FeaturesConfig, better, check
from vqzoo.evaluation.distances import Moments, frechet_distance, kernel_distance, precision_recall
from vqzoo.evaluation.evaluate import Evaluator
from vqzoo.evaluation.meters import pooled
from vqzoo.evaluation.networks import Inception, Pooled
from vqzoo.evaluation.pictures import sample_folder
from vqzoo.evaluation.pixels import decibels, psnr, squared_error, ssim_uniform
from vqzoo.evaluation.protocols import Pair, crop_halving, crop_unfiltered, signed, truncated
from vqzoo.evaluation.report import compare
from vqzoo.tokenizer import Output
from vqzoo.weights import SOURCES, Source, sha256

CPU = torch.device("cpu")
SIZE = 24
SMALL = FeaturesConfig("resnet10t", False, 32)
RECIPE = """
epochs: 2
epoch_steps: 1
data: {root: ROOT, resolution: [32, 32], batch_size: 4, workers: 0, eval_batch_size: 3}
encoder: {stride: 4, args: {width: 16, mult: [1, 2], blocks: 1, patch: 2}}
decoder: {args: {width: 16, mult: [1, 2], blocks: 1, patch: 2}}
codebook: {size: 32, width: 8}
plugins: {vq: {}, pixel: {}}
log: {images: 2, drift_images: 2}
"""


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Return a file of random weights for the Inception network."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=empty)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture
def inception(inception_file, monkeypatch, tmp_path):
    """Publish random weights in the place of Inception's."""
    monkeypatch.setenv("VQZOO_WEIGHTS", str(inception_file.parent))
    source = Source(f"https://example.org/{inception_file.name}", inception_file.stat().st_size, sha256(inception_file))
    monkeypatch.setitem(SOURCES, "inception", source)
    return source


@pytest.fixture(scope="module")
def levels():
    """Ten smooth pictures as uint8 [10, 3, 48, 40]."""
    rng = np.random.default_rng(3)
    blocks = torch.from_numpy(rng.uniform(0, 255, (10, 3, 6, 5)))
    smooth = nn.functional.interpolate(blocks, (48, 40), mode="bicubic").clamp(0, 255)
    return smooth.round().byte()


class Stub(nn.Module):
    """Darken images, and read indices off the pixels."""

    def __init__(self, factor=0.8):
        super().__init__()
        self.codebook, self.factor = Table(SIZE, 4), factor

    def forward(self, images):
        latents = nn.functional.avg_pool2d(images, 8).flatten(2).mT
        return Output(images * self.factor, latents, latents, (to_bytes(latents)[..., 0] // 9 % SIZE).long(), {}, {})


class Identity(Stub):
    def __init__(self):
        super().__init__(1.0)


def batches(levels, size, first=0):
    for start in range(0, len(levels), size):
        part = levels[start : start + size]
        yield Batch(part, torch.arange(start, start + len(part)) + first, [])


def config(*metrics, **more):
    return EvaluateConfig(metrics=list(metrics), fd=more.pop("fd", SMALL), **more)


# ---- protocols


def test_truncation_takes_a_level_from_95_of_256():
    levels = torch.arange(256, dtype=torch.uint8)
    lost = levels.float() - truncated(signed(levels))
    images = (np.arange(256, dtype=np.uint8) / 127.5 - 1.0).astype(np.float32)
    assert truncated(signed(levels)).tolist() == ((images + 1) / 2 * np.float32(255)).astype(np.uint8).tolist()
    assert set(lost.tolist()) == {0.0, 1.0} and int(lost.sum()) == 95
    assert truncated(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]


@pytest.mark.parametrize("name", ["vqzoo", "taming", "simvq"])
def test_a_pair_is_what_its_protocol_says(name, levels):
    protocol, made = PROTOCOLS[name], to_images(levels, CPU) * 1.3 + 0.01
    pair = Pair(levels, made, protocol)
    rounded = name == "vqzoo"
    wanted = (levels.float(), to_bytes(made)) if rounded else (truncated(signed(levels)), truncated(made))
    assert all(map(torch.equal, pair.levels, wanted))
    images, reconstructions = pair.lpips()
    assert reconstructions.min() >= -1 and reconstructions.max() <= 1
    on_levels = torch.equal(((reconstructions + 1) * 127.5).round(), pair.levels[1])
    assert on_levels is (name != "simvq")
    torch.testing.assert_close(pair.features()[1], made.clamp(-1, 1).add(1).mul(127.5) if name == "simvq" else wanted[1])


def test_files_are_compared_as_they_are_by_every_protocol(levels):
    for protocol in PROTOCOLS.values():
        pair = Pair(levels, levels.clone(), protocol)
        assert torch.equal(*pair.levels) and torch.equal(pair.levels[0], levels.float()) and torch.equal(*pair.features())


def picture(width, height, seed=0):
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def test_the_unfiltered_crop_is_opencvs_bilinear_formula():
    image, (height, width) = picture(96, 60), (20, 20)
    found = np.asarray(crop_unfiltered(image, (height, width)))
    pixels, scale = np.asarray(image).astype(np.float64), 60 / 20
    centers = [(np.arange(count) + 0.5) * scale - 0.5 for count in (20, 32)]
    whole = pixels
    for axis, where in enumerate(centers):
        low = np.floor(where).astype(int).clip(0, whole.shape[axis] - 2)
        share = (where - low).reshape([-1, 1, 1] if axis == 0 else [1, -1, 1])
        whole = np.take(whole, low, axis) * (1 - share) + np.take(whole, low + 1, axis) * share
    assert np.abs(whole[:, 6:26] - found).max() <= 0.501
    assert np.abs(np.asarray(crop_val(image, (20, 20))).astype(float) - found).max() > 20, "the filter makes a difference"


def test_the_halving_crop_is_guided_diffusions():
    image = picture(210, 180)
    halved = image.resize((105, 90), Image.Resampling.BOX)
    scaled = halved.resize((round(105 * 50 / 90), 50), Image.Resampling.BICUBIC)
    left = (scaled.width - 50) // 2
    wanted = scaled.crop((left, 0, left + 50, 50))
    assert np.array_equal(np.asarray(crop_halving(image, (50, 50))), np.asarray(wanted))


@pytest.mark.parametrize("crop", [crop_val, crop_unfiltered, crop_halving])
@pytest.mark.parametrize("size", [(40, 40), (53, 40), (40, 41), (80, 80), (200, 90), (20, 31)])
def test_crops_have_the_resolution_and_leave_alone_what_fits(crop, size):
    image = picture(*size)
    found = crop(image, (40, 40))
    assert found.size == (40, 40)
    if size == (40, 40):
        assert np.array_equal(np.asarray(found), np.asarray(image))


def test_pooling_is_over_batches_of_64_whatever_the_batch():
    values = torch.arange(1.0, 71.0).double()
    first, last = values[:64].mean(), values[64:].mean()
    assert pooled(values, 64) == pytest.approx(float((first + last) / 2))
    assert pooled(values, 64, decibels) == pytest.approx(float((decibels(first) + decibels(last)) / 2))
    assert pooled(values, 1, decibels) == pytest.approx(float(decibels(values).mean())) and math.isnan(pooled(values[:0], 1))


def test_the_simvq_protocol_pools_64_images():
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (70, 3, 16, 16), generator=generator, dtype=torch.uint8)
    found = [Evaluator(config("psnr", "ssim", protocol="simvq"), CPU).tokenizer(Stub(), batches(levels, size))
             for size in (7, 64)]
    one, other = truncated(signed(levels)), truncated(to_images(levels, CPU) * 0.8)
    errors, similar = squared_error(one, other), ssim_uniform(one, other)
    for result in found:
        assert result.metrics["psnr"] == pytest.approx(
            float((decibels(errors[:64].mean()) + decibels(errors[64:].mean())) / 2), abs=1e-9)
        assert result.metrics["ssim"] == pytest.approx(float((similar[:64].mean() + similar[64:].mean()) / 2), abs=1e-9)
    assert found[0].table["psnr"] == pytest.approx(psnr(one, other).tolist())


# ---- distances of sets


def sets(count=60, other=50, width=8):
    rng = np.random.default_rng(4)
    mixing = rng.normal(size=(width, width))
    return rng.normal(size=(count, width)) @ mixing + 1, rng.normal(size=(other, width)) * 1.5


def moments(features):
    found = Moments.empty(features.shape[1])
    for part in torch.from_numpy(features).split(7):
        found.add(part)
    return found


def frechet_by_eigenvalues(one, other):
    covariances = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    roots = np.sqrt(linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0))
    gap = one.mean(0) - other.mean(0)
    return gap @ gap + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots.sum()


def test_the_frechet_distance_is_that_of_float64_eigenvalues():
    one, other = sets()
    assert frechet_distance(moments(one), moments(other)) == pytest.approx(frechet_by_eigenvalues(one, other), rel=1e-9)


@pytest.mark.fault(36)
@pytest.mark.parametrize("count", [2, 5, 300])
def test_the_frechet_distance_of_a_set_to_itself_is_0_also_with_few_images(count):
    one = np.random.default_rng(5).normal(size=(count, 64)) * np.geomspace(1e-3, 30, 64) + 100
    found = moments(one)
    trace = float(found.mean_and_covariance()[1].trace())
    assert abs(frechet_distance(found, moments(one[::-1].copy()))) < 1e-6 * trace


def test_the_frechet_distance_with_fewer_images_than_dimensions():
    one, other = sets(6, 7, 20)
    wanted = frechet_by_eigenvalues(one, other)
    assert frechet_distance(moments(one), moments(other)) == pytest.approx(wanted, rel=1e-6)
    assert math.isnan(frechet_distance(moments(one[:1]), moments(other)))


def test_known_moments_are_those_of_a_set():
    one, other = sets()
    known = Moments.known(torch.from_numpy(one.mean(0)), torch.from_numpy(np.cov(one, rowvar=False)))
    assert frechet_distance(known, moments(other)) == pytest.approx(frechet_by_eigenvalues(one, other), rel=1e-6)


def test_the_kernel_distance_is_that_of_torchmetrics():
    one, other = (torch.from_numpy(x[:40]) for x in sets())
    mean, deviation = kernel_distance(other, one)
    assert mean == pytest.approx(float(poly_mmd(one, other)), rel=1e-9) and deviation == pytest.approx(0, abs=1e-12)
    assert kernel_distance(one, other)[0] == pytest.approx(mean) and all(map(math.isnan, kernel_distance(one[:1], other)))


def test_precision_and_recall_are_those_of_the_definition():
    one, other = sets(30, 25, 3)

    def share(points, centres):
        radii = np.sort(np.linalg.norm(centres[:, None] - centres, axis=2), axis=1)[:, 3]
        return (np.linalg.norm(points[:, None] - centres, axis=2) <= radii).any(1).mean()

    found = precision_recall(torch.from_numpy(other), torch.from_numpy(one))
    assert found == pytest.approx((share(other, one), share(one, other))) and 0 < found[0] < 1
    assert all(map(math.isnan, precision_recall(torch.from_numpy(other[:3]), torch.from_numpy(one))))


# ---- networks


def test_inception_is_torch_fidelitys(inception, levels):
    peer = FeatureExtractorInceptionV3("peer", ["2048"], feature_extractor_weights_path=str(inception.file))
    found = Inception("tensorflow", "rfid")(levels[:2].float())
    assert found.shape == (2, 2048) and float(found.std()) > 0
    torch.testing.assert_close(found, peer(levels[:2])[0], rtol=1e-4, atol=1e-5)


def test_inceptions_other_resizing_is_pytorch_fids(inception, levels):
    network, seen = Inception("pytorch", "rfid"), []
    network.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(levels[:1].float() + 0.3)
    wanted = nn.functional.interpolate((levels[:1].float() + 0.3) / 255, (299, 299), mode="bilinear", align_corners=False)
    torch.testing.assert_close(seen[0], 2 * wanted - 1)


@pytest.mark.fault(37)
def test_inception_of_another_file_is_refused(inception, monkeypatch):
    monkeypatch.setitem(SOURCES, "inception", Source(inception.url, inception.bytes, "0" * 64))
    with pytest.raises(UserError, match="SHA-256 .* was published; delete"):
        Inception("tensorflow", "rfid")
    monkeypatch.setitem(SOURCES, "inception", Source(inception.url, 5, inception.sha256))
    with pytest.raises(UserError, match="5 were published"):
        Inception("tensorflow", "rfid")


def test_inception_runs_no_code_of_a_file(tmp_path, monkeypatch):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return open, (str(canary), "w")

    file = tmp_path / "evil.pth"
    torch.save({"x": Evil()}, file)
    monkeypatch.setenv("VQZOO_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(SOURCES, "inception", Source("https://example.org/evil.pth", file.stat().st_size, sha256(file)))
    with pytest.raises(UserError, match="cannot be read"):
        Inception("tensorflow", "rfid")
    assert not canary.exists()


def test_any_timm_network_gives_its_pooled_features(levels):
    for name, size in (("resnet10t", None), ("resnet10t", 64), ("vit_tiny_patch16_224", 32)):
        network = Pooled(name, False, size, {}, "evaluate.fd")
        features = network(levels[:2].float())
        assert features.shape == (2, network.width) == (2, 512 if "resnet" in name else 192)
        assert network.card["sha256"] == Pooled(name, False, size, {}, "evaluate.fd").card["sha256"]
    with pytest.raises(UserError, match=r"evaluate\.fd\.name: timm knows no model 'resnet1O'"):
        Pooled("resnet1O", False, 32, {}, "evaluate.fd")


def test_published_inception_is_that_of_torch_fidelity(levels):
    """With the published weights, where they are."""
    if not SOURCES["inception"].file.is_file():
        pytest.skip(f"{SOURCES['inception'].file} is not there: vqzoo weights fetch inception")
    peer = FeatureExtractorInceptionV3("peer", ["2048"], feature_extractor_weights_path=str(SOURCES["inception"].file))
    torch.testing.assert_close(Inception("tensorflow", "rfid")(levels.float()), peer(levels)[0], rtol=1e-4, atol=1e-5)


# ---- the evaluation


EVERYTHING = ("psnr", "ssim", "usage", "perplexity", "entropy", "bits_per_token", "rfid", "kid", "precision", "recall",
              "fd", "fd_kid", "fd_precision", "fd_recall")


@pytest.mark.fault(36)
def test_the_identity_is_perfect(inception, levels):
    result = Evaluator(config(*EVERYTHING), CPU).tokenizer(Identity(), batches(levels, 4))
    metrics = result.metrics
    assert metrics["psnr"] == math.inf and metrics["ssim"] == pytest.approx(1, abs=1e-12)
    assert abs(metrics["rfid"]) < 1e-6 * 2048 and abs(metrics["fd_resnet10t_random"]) < 1e-6
    assert metrics["precision"] == metrics["recall"] == metrics["fd_precision_resnet10t_random"] == 1
    assert not result.missing and result.positions == list(range(10))
    for name in ("rfid", "fd_resnet10t_random"):
        assert len(result.networks[name]["sha256"]) == 64


@pytest.mark.fault(36)
def test_metrics_do_not_depend_on_the_batch(levels):
    metrics = [name for name in EVERYTHING if name not in ("rfid", "kid", "precision", "recall")]
    found = [Evaluator(config(*metrics), CPU).tokenizer(Stub(), batches(levels, size)).metrics for size in (1, 7, 64)]
    assert found[0] == pytest.approx(found[2], rel=1e-4, abs=1e-9) and found[1] == pytest.approx(found[2], rel=1e-4, abs=1e-9)
    assert found[0]["fd_resnet10t_random"] > 0


def test_reconstructions_that_are_not_numbers_give_no_numbers(levels):
    class Broken(Stub):
        def forward(self, images):
            output = super().forward(images)
            output.reconstructions[0] = torch.nan
            return output

    result = Evaluator(config("psnr", "ssim", "fd", "fd_kid", "usage"), CPU).tokenizer(Broken(), batches(levels, 10))
    metrics = result.metrics
    assert all(math.isnan(metrics[name]) for name in ("psnr", "ssim", "fd_resnet10t_random", "fd_kid_resnet10t_random"))
    assert metrics["usage"] > 0 and [math.isnan(x) for x in result.table["psnr"]] == [True] + [False] * 9


def test_the_frechet_distance_of_an_evaluation_is_that_of_its_features(levels):
    result = Evaluator(config("fd"), CPU).tokenizer(Stub(), batches(levels, 4))
    network = Pooled("resnet10t", False, 32, {}, "")
    one, other = (network(x).double().numpy() for x in (levels.float(), to_bytes(to_images(levels, CPU) * 0.8)))
    assert result.metrics["fd_resnet10t_random"] == pytest.approx(frechet_by_eigenvalues(one, other), rel=1e-4)


def test_the_usage_curve_counts_codes_as_images_come(levels):
    result = Evaluator(config("usage"), CPU).tokenizer(Stub(), batches(levels, 3, first=100))
    indices = Stub()(to_images(levels, CPU)).indices
    wanted = [(n, len(indices[:n].unique()) / SIZE) for n in (1, 2, 4, 8, 10)]
    assert [tuple(point) for point in result.usage_curve] == [(n, pytest.approx(share)) for n, share in wanted]
    assert wanted[0][1] < wanted[-1][1] == pytest.approx(result.metrics["usage"])


def test_entropy_is_the_logarithm_of_perplexity(levels):
    metrics = Evaluator(config("entropy", "perplexity", "bits_per_token"), CPU).tokenizer(Stub(), batches(levels, 3)).metrics
    assert 2 ** metrics["entropy"] == pytest.approx(metrics["perplexity"]) and metrics["bits_per_token"] == math.log2(SIZE)


@pytest.mark.fault(37)
def test_what_cannot_be_measured_is_missing_and_the_rest_comes(levels, monkeypatch, tmp_path):
    monkeypatch.setenv("VQZOO_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("VQZOO_OFFLINE", "1")
    names = ("psnr", "ms_ssim", "rfid", "kid", "lpips_vgg")
    result = Evaluator(config(*names), CPU).tokenizer(Stub(), batches(levels, 4))
    assert set(result.missing) == set(names) - {"psnr"} and math.isfinite(result.metrics["psnr"])
    assert "176 pixels or more and gets 48x40" in result.missing["ms_ssim"]
    for name, source in (("rfid", SOURCES["inception"]), ("lpips_vgg", SOURCES["vgg16"])):
        for part in (source.file.name, f"{source.bytes:,} bytes", source.sha256, str(tmp_path), source.url, "weights fetch"):
            assert part in result.missing[name]


@pytest.mark.fault(36)
def test_lpips_is_torchmetrics_with_random_weights(levels, monkeypatch, tmp_path):
    import torchvision
    from torchmetrics.functional.image import lpips as reference

    torch.manual_seed(0)
    features = torchvision.models.squeezenet1_1(weights=None).features
    file = tmp_path / "squeeze.pth"
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, file)
    monkeypatch.setenv("VQZOO_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(SOURCES, "squeezenet1_1", Source("https://x/squeeze.pth", file.stat().st_size, sha256(file)))
    result = Evaluator(config("lpips_squeeze"), CPU).tokenizer(Stub(), batches(levels, 4))
    judge = reference._NoTrainLpips(net="squeeze", pretrained=True, pnet_rand=True, pnet_tune=False)
    judge.net.load_state_dict({name: value for name, value in _as_slices(judge.net, features).items()})
    one, other = (x / 127.5 - 1 for x in (levels.float(), to_bytes(to_images(levels, CPU) * 0.8)))
    with torch.no_grad():
        wanted = judge(one, other).flatten().double()
    assert result.table["lpips_squeeze"] == pytest.approx(wanted.tolist(), rel=1e-4, abs=1e-7)
    assert result.metrics["lpips_squeeze"] == pytest.approx(float(wanted.mean()), rel=1e-4)
    assert Evaluator(config("lpips_squeeze"), CPU).tokenizer(Identity(), batches(levels, 4)).metrics["lpips_squeeze"] == 0


def _as_slices(net, features):
    """Name a backbone's tensors as torchmetrics' slices of it do: same layers, same order."""
    return dict(zip(net.state_dict(), features.state_dict().values(), strict=True))


def test_statistics_of_the_reference_are_computed_once(levels, monkeypatch):
    seen = []
    forward = Pooled.forward
    monkeypatch.setattr(Pooled, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    evaluator = Evaluator(config("fd"), CPU)
    first = evaluator.tokenizer(Stub(), batches(levels, 5), "this set")
    assert sum(seen) == 20
    again = evaluator.tokenizer(Stub(), batches(levels, 5), "this set")
    assert sum(seen) == 30 and again.metrics == first.metrics
    evaluator.tokenizer(Stub(), batches(levels, 5), "another set")
    assert sum(seen) == 50


def test_the_pixels_of_a_set_identify_it_in_any_order(levels):
    def pixels(parts):
        return Evaluator(config("psnr"), CPU).tokenizer(Stub(), parts).pixels

    parts = list(batches(levels, 5))
    changed = levels.clone()
    changed[3, 0, 0, 0] ^= 1
    assert pixels(parts) == pixels(parts[::-1]) == pixels(batches(levels, 3)) != pixels(batches(changed, 5))


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"protocol": "simqv"}, r"evaluate\.protocol: 'simqv'.*simvq"),
        ({"metrics": ["psnr", "fid"]}, r"evaluate\.metrics: 'fid' is no metric.*rfid"),
        ({"metrics": ["fd"], "fd": FeaturesConfig()}, r"evaluate\.fd\.name: fd needs a network"),
        ({"best": "ssim", "metrics": ["psnr"]}, r"evaluate\.best: 'ssim' is not in"),
        ({"epochs": 0}, r"evaluate\.epochs: 0"),
        ({"images": 0}, r"evaluate\.images: 0"),
    ],
)
def test_a_mistake_is_named_by_its_key(fields, text):
    with pytest.raises(UserError, match=text):
        check(EvaluateConfig(**fields))


def test_better_knows_the_direction_of_every_metric():
    lower = {"lpips_alex", "lpips_squeeze", "lpips_vgg", "rfid", "kid", "fd", "fd_kid", "gfid"}
    for name in METRICS:
        assert better(name, 1.0, 2.0) is (name in lower), name
        assert better(name, 2.0, 1.0) is (name not in lower), name
        assert better(name, 1.0, None) and not better(name, math.nan, None)


# ---- the command


def call(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return SimpleNamespace(status=status or 0, out=out.getvalue(), err=err.getvalue())


def succeed(*arguments):
    done = call(*arguments)
    assert done.status == 0, done.err
    return done


def refused(text, *arguments):
    done = call(*arguments)
    assert done.status == 2 and "Traceback" not in done.err, done.err
    assert text in done.err, done.err


@pytest.fixture(scope="module")
def trained(tiny_runs, small_photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "tiny.yaml").write_text(RECIPE.replace("ROOT", str(small_photos)))
    succeed("run", folder / "tiny.yaml", "--out", folder / "run")
    return folder / "run"


def read(file):
    return json.loads(file.read_text())


def test_saved_reconstructions_score_as_the_tokenizer_does(trained, small_photos, tmp_path):
    data, names = small_photos / "val", "metrics=[psnr,ssim,fd]"
    fd = ["fd.name=resnet10t", "fd.pretrained=false", "fd.size=32"]
    cropped = tmp_path / "cropped"
    cropped.mkdir()
    for file in data.iterdir():
        crop_val(Image.open(file), (32, 32)).save(cropped / file.name)
    succeed("eval", trained, names, *fd, "--data", cropped, "--json", tmp_path / "a.json", "--save-images", tmp_path / "made")
    succeed("eval", tmp_path / "made", names, *fd, "--data", cropped, "--json", tmp_path / "b.json")
    one, other = read(tmp_path / "a.json"), read(tmp_path / "b.json")
    for name in ("psnr", "ssim", "fd_resnet10t_random", "images"):
        assert other["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-6)
    assert other["card"]["fingerprint"] == one["card"]["fingerprint"]
    assert other["card"]["pixels_sha256"] == one["card"]["pixels_sha256"]
    assert "pictures has no tokens" in call("eval", tmp_path / "made", "--data", cropped, "--metrics", "psnr,usage").out
    # the same pictures, against images that are larger: cropped as the protocol crops
    succeed("eval", tmp_path / "made", names, *fd, "--data", data, "--json", tmp_path / "c.json")
    assert read(tmp_path / "c.json")["metrics"]["psnr"] == pytest.approx(one["metrics"]["psnr"])
    assert read(tmp_path / "c.json")["card"]["images_fitted_to_reconstructions"] == 7


def test_pairs_are_matched_by_name_each_at_its_own_size(tmp_path):
    for folder in ("images/deep", "made/deep"):
        (tmp_path / folder).mkdir(parents=True)
    for number, (name, size) in enumerate((("a", (40, 24)), ("deep/b", (24, 40)), ("c", (40, 24)))):
        picture(*size, seed=number).save(tmp_path / "images" / f"{name}.bmp")
        picture(*size, seed=number).save(tmp_path / "made" / f"{name}.png")
    command = ["eval", tmp_path / "made", "--data", tmp_path / "images", "--json", tmp_path / "x.json"]
    assert "inf dB" in succeed(*command, "--metrics", "psnr").out
    assert read(tmp_path / "x.json")["metrics"] == {"psnr": "inf", "images": 3}
    (tmp_path / "made" / "c.png").unlink()
    refused("1 (c) of the 3 images", "eval", tmp_path / "made", "--data", tmp_path / "images")
    succeed("eval", tmp_path / "made", "--data", tmp_path / "images", "--partial", "--json", tmp_path / "x.json")
    assert read(tmp_path / "x.json")["card"]["images_without_reconstruction"] == 1
    picture(8, 8).save(tmp_path / "made" / "z.png")
    refused("1 (z) of its 3 pictures have no image of that name", "eval", tmp_path / "made", "--data", tmp_path / "images")
    (tmp_path / "made" / "z.png").rename(tmp_path / "made" / "a.bmp")
    refused("would both be a; keep one", "eval", tmp_path / "made", "--data", tmp_path / "images")


@pytest.mark.fault(30)
def test_no_reconstruction_is_written_over_another(trained, small_photos, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("a.png", "a.jpg", "b.png"):
        shutil.copy(small_photos / "val" / "00.png", tmp_path / "data" / name)
    succeed("eval", trained, "--data", tmp_path / "data", "--metrics", "psnr")
    refused("--save-images: what is made of a.jpg and of a.png would be one file", "eval", trained, "--data", tmp_path / "data",
            "--metrics", "psnr", "--save-images", tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.fault(29)
def test_samples_that_do_not_decode_are_left_out(small_photos, tmp_path):
    samples = shutil.copytree(small_photos / "val", tmp_path / "samples")
    (samples / "0 bad.png").touch()
    dataset = sample_folder(samples, "SAMPLES", None, PROTOCOLS["adm-gfid"], 4)
    found = list(eval_batches(DataConfig(eval_batch_size=4, workers=0), dataset))
    assert dataset.resolution == (40, 40) and [len(batch.images) for batch in found] == [3, 4]
    assert [batch.bad for batch in found] == [["0 bad.png"], []]
    for file in samples.iterdir():
        file.write_text("no picture")
    with pytest.raises(UserError, match="samples: none of its 8 pictures can be read"):
        sample_folder(samples, "SAMPLES", None, PROTOCOLS["adm-gfid"], 4)


@pytest.mark.fault(29)
def test_a_pair_that_does_not_decode_is_named_and_left_out(tmp_path):
    for folder in ("images", "made"):
        (tmp_path / folder).mkdir()
        for name in "ab":
            picture(16, 16).save(tmp_path / folder / f"{name}.png")
    (tmp_path / "made" / "b.png").write_text("no picture")
    done = succeed("eval", tmp_path / "made", "--data", tmp_path / "images", "--json", tmp_path / "x.json")
    assert "b does not decode" in done.err and read(tmp_path / "x.json")["metrics"]["images"] == 1


def test_the_table_of_images_and_the_worst(trained, small_photos, tmp_path):
    written = ["--csv", tmp_path / "each.csv", "--json", tmp_path / "x.json"]
    done = succeed("eval", trained, "--data", small_photos / "val", *written)
    with (tmp_path / "each.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"{n:02}.png" for n in range(7)] and list(rows[0]) == ["image", "psnr", "ssim"]
    mean = np.mean([float(row["psnr"]) for row in rows])
    assert mean == pytest.approx(read(tmp_path / "x.json")["metrics"]["psnr"], abs=1e-4)
    with Image.open(tmp_path / "each_worst.png") as worst:
        assert worst.size == (7 * 32, 64)
        first = np.asarray(worst.crop((0, 0, 32, 32)))
    lowest = min(rows, key=lambda row: float(row["psnr"]))["image"]
    assert np.array_equal(first, np.asarray(crop_val(Image.open(small_photos / "val" / lowest), (32, 32))))
    assert f"by psnr, the worst first: {lowest}," in done.out


def test_samples_against_a_folder_and_against_published_statistics(inception, small_photos, tmp_path):
    arguments = ["eval", small_photos / "train", "--protocol", "adm-gfid", "--metrics", "gfid,kid"]
    done = succeed(*arguments, "--data", small_photos / "val", "--json", tmp_path / "a.json")
    found = read(tmp_path / "a.json")
    assert set(found["metrics"]) == {"gfid", "kid", "images"} and found["metrics"]["images"] == 16
    assert "gfid: 16 images are fewer than the 2048 features" in done.err and found["card"]["notes"]
    network = Inception("tensorflow", "x")
    features = network(torch.stack([torch.from_numpy(np.array(Image.open(f).convert("RGB"))).permute(2, 0, 1)
                                    for f in sorted((small_photos / "val").iterdir())]).float()).double().numpy()
    np.savez(tmp_path / "known.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    succeed(*arguments, "--data", tmp_path / "known.npz", "--json", tmp_path / "b.json")
    other = read(tmp_path / "b.json")
    assert other["metrics"]["gfid"] == pytest.approx(found["metrics"]["gfid"], rel=1e-4) and "kid" in other["missing"]
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3))
    refused("no .npz file with mu and sigma", *arguments, "--data", tmp_path / "wrong.npz")
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.eye(3))
    refused("moments of Inception's features", *arguments, "--data", tmp_path / "wrong.npz")
    refused("'psnr' cannot be measured by protocol 'adm-gfid'", *arguments[:4], "--metrics", "psnr", "--data", tmp_path)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    picture(16, 16).save(mixed / "a.png")
    picture(16, 20).save(mixed / "b.png")
    refused("samples are of 2 sizes (a.png 16x16, b.png 16x20)", "eval", mixed, *arguments[2:], "--data", mixed)


def test_mistakes_of_the_command_are_named(trained, small_photos, tmp_path):
    val = small_photos / "val"
    refused("neither an exported tokenizer", "eval", tmp_path / "nowhere", "--data", val)
    refused("--data: ", "eval", trained, "--data", tmp_path / "nowhere")
    refused("metrics: 'fid' is no metric", "eval", trained, "--data", val, "--metrics", "fid")
    refused("protocol: 'adm'", "eval", trained, "--data", val, "--protocol", "adm")
    refused("fd.nam: unknown key", "eval", trained, "fd.nam=resnet18", "--data", val)
    refused("fd.size", "eval", trained, "fd.size=big", "--data", val)
    refused("--batch-size: 0", "eval", trained, "--data", val, "--batch-size", 0)
    refused("adm-gfid compares a folder of samples", "eval", trained, "--data", val, "--protocol", "adm-gfid")
    (tmp_path / "file").write_text("")
    refused("--json: ", "eval", trained, "--data", val, "--json", tmp_path / "file" / "x.json")
    refused("--save-images: ", "eval", trained, "--data", val, "--save-images", val / "made")
    refused("--csv: ", "eval", trained, "--data", val, "--csv", val / "x.csv")
    refused("--csv: ", "eval", small_photos / "train", "--data", val, "--csv", small_photos / "train" / "x.csv")
    succeed("eval", trained, "--data", val, "--csv", trained / "each.csv", "--save-images", trained / "made")
    refused("images: is a matter of training", "eval", trained, "--data", val, "images=5")
    refused("say the same thing", "eval", trained, "--data", val, "--protocol", "simvq", "protocol=vqzoo")
    refused("'resnet500'", "eval", trained, "--data", val, "--metrics", "fd", "fd.name=resnet500")
    refused("nothing that was asked for", "eval", trained, "--data", val, "--metrics", "lpips_vgg")
    refused("'gfid' cannot be measured by protocol 'vqzoo'", "eval", trained, "--data", val, "--metrics", "gfid")
    assert "ssim" in succeed("eval", trained, "--data", val, "--metrics", "[psnr,ssim]").out
    refused("--csv: none of the metrics", "eval", trained, "--data", val, "--metrics", "usage", "--csv", tmp_path / "x.csv")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("neither an exported tokenizer", "eval", empty, "--data", val)


def test_results_side_by_side_and_what_must_not_stand_there(trained, small_photos, tmp_path):
    files = {}
    for name, arguments in (("a", []), ("b", ["--metrics", "psnr,usage"]), ("c", ["--protocol", "simvq"])):
        files[name] = tmp_path / f"{name}.json"
        succeed("eval", trained, *arguments, "--data", small_photos / "val", "--json", files[name])
    shown = succeed("compare", files["a"], files["b"], trained / "metrics.json").out.splitlines()
    assert len(shown) == 5 and shown[0].startswith("| results | psnr | ssim |") and "–" in shown[3]
    assert len({row.count("|") for row in shown}) == 1
    refused("cannot be compared: protocol: vqzoo, simvq", "compare", files["a"], files["c"])
    mixed = compare([str(files["a"]), str(files["c"])], mixed=True)
    assert "| results | protocol |" in mixed and "Not comparable: the rows differ in protocol" in mixed
    other = tmp_path / "other"
    shutil.copytree(small_photos / "val", other)
    (other / "00.png").unlink()
    succeed("eval", trained, "--data", other, "--json", tmp_path / "d.json")
    refused("fingerprint", "compare", files["a"], tmp_path / "d.json")
    refused("not what `vqzoo eval --json` or a run", "compare", files["a"], trained / "recipe.yaml")
    assert succeed("compare", files["a"], trained).out.splitlines()[2].startswith(f"| {files['a']} |")
    fd = ["--metrics", "fd", "fd.name=resnet10t", "fd.pretrained=false", "fd.size=32", "--data", small_photos / "val"]
    succeed("eval", trained, *fd, "--json", tmp_path / "e.json")
    succeed("eval", trained, *fd, "fd.args.mean=[0.1,0.2,0.3]", "--json", tmp_path / "f.json")
    refused("network of fd_resnet10t_random", "compare", tmp_path / "e.json", tmp_path / "f.json")


@pytest.mark.fault(37)
def test_weights_are_listed_fetched_and_verified(tmp_path, monkeypatch):
    file = tmp_path / "published" / "net.pth"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    for name in list(SOURCES):
        monkeypatch.delitem(SOURCES, name)
    monkeypatch.setitem(SOURCES, "net", Source(file.as_uri(), 7, sha256(file), "a test"))
    monkeypatch.setenv("VQZOO_WEIGHTS", str(tmp_path / "elsewhere"))
    monkeypatch.delenv("VQZOO_OFFLINE")
    place = ["--dir", tmp_path / "here"]
    assert "net: not here" in succeed("weights", "list", *place).out
    succeed("weights", "verify", *place)
    refused("net: missing", "weights", "verify", "net", *place)
    refused("name what to fetch: net", "weights", "fetch", *place)
    refused("'nett' is unknown", "weights", "fetch", "nett", *place)
    assert str(tmp_path / "here" / "net.pth") in succeed("weights", "fetch", "net", *place).out
    assert "net: verified" in succeed("weights", "verify", *place).out
    (tmp_path / "here" / "net.pth").write_bytes(b"weighty")
    refused("missing or not what was published", "weights", "verify", *place)
    refused("delete the file and fetch it again", "weights", "fetch", "net", *place)


@pytest.mark.fault(37)
def test_offline_an_evaluation_asks_for_no_download(trained, small_photos, tmp_path, monkeypatch):
    asked = []

    def unreachable(url, *rest, **how):
        asked.append(url)
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setenv("VQZOO_WEIGHTS", str(tmp_path))
    for name in ("VQZOO_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "0")
    command = ["eval", trained, "--data", small_photos / "val", "--metrics", "psnr,rfid,lpips_vgg"]
    assert "no route" in succeed(*command).out and len(asked) == 2
    said = succeed(*command, "--offline").out
    assert len(asked) == 2 and said.count("this is offline") == 2
    for source in (SOURCES["inception"], SOURCES["vgg16"]):
        assert all(part in said for part in (source.file.name, f"{source.bytes:,} bytes", source.sha256))
    assert said.count("vqzoo weights fetch") == 2


# ---- in training


def test_a_run_measures_what_its_recipe_says_and_keeps_the_best(tiny_runs, small_photos, tmp_path):
    text = RECIPE.replace("ROOT", str(small_photos)).replace("epochs: 2", "epochs: 4", 1)
    (tmp_path / "r.yaml").write_text(text + "evaluate: {metrics: [fd, psnr, rfid], images: 5, protocol: simvq, best: fd, "
                                     "fd: {name: resnet10t, pretrained: false, size: 32}}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VQZOO_OFFLINE", "1")
        patch.setenv("VQZOO_WEIGHTS", str(tmp_path))
        done = succeed("run", tmp_path / "r.yaml", "--out", tmp_path / "run")
        checked = succeed("check", tmp_path / "r.yaml").out
    assert "protocol simvq: fd_resnet10t_random, psnr, rfid; every 1 epochs on 5 images" in checked
    assert "rfid will be missing" in checked and "rfid will be missing" in done.err and "missing: rfid: " in done.out
    found = read(tmp_path / "run" / "metrics.json")
    assert set(found["metrics"]) == {"fd_resnet10t_random", "psnr", "tokens_per_image", "codebook_size", "images"}
    assert found["card"]["protocol"] == "simvq" and found["card"]["networks"]["fd_resnet10t_random"]["sha256"]
    best = found["run"]["best"]
    assert best["metric"] == "fd_resnet10t_random" and 1 <= best["epoch"] <= 4 and best["images"] == 5
    assert f"the best         {tmp_path / 'run' / 'best'}: fd_resnet10t_random" in done.out
    succeed("eval", tmp_path / "run" / "best", "--data", small_photos / "val")
    succeed("eval", tmp_path / "run", "--protocol", "simvq", "--metrics", "psnr", "--data", small_photos / "val", "--json",
            tmp_path / "x.json")
    assert read(tmp_path / "x.json")["metrics"]["psnr"] == pytest.approx(found["metrics"]["psnr"], abs=1e-3)
