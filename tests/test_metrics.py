import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from scipy.signal import convolve2d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure, structural_similarity_index_measure

from vqzoo.codebook import Table
from vqzoo.data import Batch, DataConfig, eval_batches, make_dataset, to_bytes, to_images
from vqzoo.evaluation import EvaluateConfig
from vqzoo.evaluation.evaluate import Evaluator
from vqzoo.evaluation.pixels import ms_ssim, psnr, ssim, ssim_uniform
from vqzoo.evaluation.report import table, to_json
from vqzoo.explain import predict_memory
from vqzoo.plugin import Progress
from vqzoo.prepare import build
from vqzoo.recipe import load_recipe
from vqzoo.tokenizer import Output

CPU = torch.device("cpu")
SIZE = 24


def pairs(kind, count=3, height=40, width=29):
    """Return images and degraded images [B, 3, H, W] with 8-bit values in float32."""
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[:height, :width]
    waves = 128 + 90 * np.sin(rows / 5 + columns / 7 + np.arange(count * 3).reshape(count, 3, 1, 1))
    images = {"waves": waves, "noise": rng.uniform(0, 255, (count, 3, height, width)),
              "white": np.full((count, 3, height, width), 255.0)}[kind]
    degraded = images + rng.normal(0, 12, images.shape) * np.arange(1, count + 1).reshape(-1, 1, 1, 1)
    return [torch.from_numpy(np.clip(x, 0, 255).round().astype(np.float32)) for x in (images, degraded)]


@pytest.fixture(scope="module")
def make_recipe(tmp_path_factory, small_photos):
    network = "{width: 16, mult: [1, 2], blocks: 1, patch: 2}"

    def make(plugin, *overrides):
        path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
        path.write_text(f"""
epochs: 1
data: {{root: {small_photos}, resolution: [32, 32], batch_size: 4, workers: 0}}
encoder: {{stride: 4, args: {network}}}
decoder: {{args: {network}}}
codebook: {{size: 32, width: 8}}
plugins: {{{plugin}: {{}}, pixel: {{}}}}
""")
        return load_recipe(str(path), list(overrides))

    return make


# PSNR and SSIM


@pytest.mark.parametrize("kind", ["waves", "noise", "white"])
def test_psnr_is_scikit_images_of_each_image(kind):
    images, other = pairs(kind)
    wanted = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(images.numpy(), other.numpy(), strict=True)]
    assert psnr(images, other).tolist() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("kind", ["waves", "noise", "white"])
def test_ssim_is_torchmetrics_in_float64(kind):
    images, other = pairs(kind)
    wanted = structural_similarity_index_measure(
        other.double(), images.double(), gaussian_kernel=True, sigma=1.5, data_range=255.0, reduction="none"
    )
    assert ssim(images, other).tolist() == pytest.approx(wanted.tolist(), abs=1e-9)


@pytest.mark.parametrize("kind", ["waves", "noise", "white"])
def test_ssim_is_scikit_images_but_for_the_edges(kind):
    # scikit-image averages over the interior only, where the window lies inside the image; we average over all pixels, with
    # reflected edges. So its mean for the reflected image, whose interior is the original, must be ours. For the original it
    # differs by the 5 pixels at each edge, which are half of these small images.
    images, other = pairs(kind)
    edges = [(0, 0), (5, 5), (5, 5)]
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255, "win_size": 11,
                "channel_axis": 0}
    for one, two, ours in zip(images.double().numpy(), other.double().numpy(), ssim(images, other).tolist(), strict=True):
        reflected = [np.pad(x, edges, mode="reflect") for x in (one, two)]
        assert ours == pytest.approx(structural_similarity(*reflected, **settings), abs=1e-9)
        assert ours == pytest.approx(structural_similarity(one, two, **settings), abs=0.05)


@pytest.mark.fault(36)
def test_identity_is_infinite_psnr_and_ssim_1_also_where_it_is_bright_and_even():
    for kind in ("waves", "noise", "white"):
        images, _ = pairs(kind)
        assert psnr(images, images).isinf().all() and (psnr(images, images) > 0).all()
        assert ssim(images, images).tolist() == pytest.approx([1.0] * len(images), abs=1e-12)


@pytest.mark.parametrize("kind", ["waves", "noise", "white"])
def test_the_uniform_ssim_is_scikit_images_default(kind):
    images, other = pairs(kind)
    wanted = [structural_similarity(one, two, channel_axis=0, data_range=255)
              for one, two in zip(images.double().numpy(), other.double().numpy(), strict=True)]
    assert ssim_uniform(images, other).tolist() == pytest.approx(wanted, abs=1e-9)
    assert ssim_uniform(images[..., :6], other[..., :6]).isnan().all()


@pytest.mark.parametrize("kind", ["waves", "white"])
@pytest.mark.parametrize("size", [(176, 180), (200, 187)])
def test_ms_ssim_is_its_definition(kind, size):
    images, other = pairs(kind, 2, *size)
    taps = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    window, exponents = np.outer(taps, taps) / taps.sum() ** 2, (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    for one, two, found in zip(images.double().numpy(), other.double().numpy(), ms_ssim(images, other).tolist(), strict=True):
        wanted = 1.0
        for number, exponent in enumerate(exponents):
            means = [np.stack([convolve2d(c, window, "valid") for c in x]) for x in (one, two, one * one, two * two, one * two)]
            contrast = (2 * (means[4] - means[0] * means[1]) + 7.65**2) / (
                means[2] - means[0] ** 2 + means[3] - means[1] ** 2 + 7.65**2)
            light = (2 * means[0] * means[1] + 2.55**2) / (means[0] ** 2 + means[1] ** 2 + 2.55**2)
            wanted *= (light * contrast if number == 4 else contrast).mean() ** exponent
            one, two = (x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2] for x in (one, two))
            one, two = (x.reshape(3, x.shape[1] // 2, 2, x.shape[2] // 2, 2).mean((2, 4)) for x in (one, two))
        assert found == pytest.approx(wanted, abs=1e-9)
    peer = multiscale_structural_similarity_index_measure(
        other.double(), images.double(), sigma=1.5, data_range=255.0, reduction="none", normalize="relu")
    assert ms_ssim(images, other).tolist() == pytest.approx(peer.tolist(), abs=0.003)
    assert ms_ssim(images, images).tolist() == pytest.approx([1.0] * 2, abs=1e-9)


def test_ms_ssim_of_anticorrelated_images_is_a_number_and_of_small_ones_is_none():
    images, _ = pairs("noise", 1, 176, 176)
    assert ms_ssim(images, 255 - images).tolist() == [0.0]
    assert ms_ssim(*pairs("noise", 1, 175, 300)).isnan().all()


def test_psnr_and_ssim_are_scikit_images_on_photographs():
    """On the photographs inside scikit-image, and on those of the folder VQZOO_KODAK (24 PNG) where it is set."""
    files = [Path(skimage.__file__).parent / "data" / name for name in ("astronaut.png", "coffee.png", "chelsea.png")]
    files += sorted(Path(os.environ["VQZOO_KODAK"]).glob("*.png")) if "VQZOO_KODAK" in os.environ else []
    edges = [(0, 0), (5, 5), (5, 5)]
    for number, file in enumerate(files):
        image = np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1)[:, :256, :320]
        noise = np.random.default_rng(number).normal(0, 10, image.shape)
        other = np.clip(image + noise, 0, 255).round().astype(np.uint8)
        one, two = (torch.from_numpy(x.astype(np.float32))[None] for x in (image, other))
        reflected = [np.pad(x.astype(np.float64), edges, mode="reflect") for x in (image, other)]
        gaussian = structural_similarity(*reflected, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                         data_range=255, win_size=11, channel_axis=0)
        assert float(psnr(one, two)) == pytest.approx(peak_signal_noise_ratio(image, other), abs=1e-9)
        assert float(ssim(one, two)) == pytest.approx(gaussian, abs=1e-9)
        assert float(ssim_uniform(one, two)) == pytest.approx(structural_similarity(image, other, channel_axis=0), abs=1e-9)


@pytest.mark.parametrize("side", [1, 2, 4, 5, 10, 11])
def test_ssim_takes_images_smaller_than_its_window(side):
    images, other = pairs("noise", height=side, width=17)
    assert ssim(images, images).tolist() == pytest.approx([1.0] * 3, abs=1e-9)
    assert (ssim(images, other) < 1).all() and ssim(images, other).isfinite().all()


def test_bytes_are_those_that_a_file_would_hold():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(to_images(levels, CPU)), levels.float())
    assert to_bytes(torch.tensor([-3.0, 3.0, 0.0])).tolist() == [0, 255, 128]


# Evaluation


class Stub(nn.Module):
    """Be as much of a tokenizer as Evaluation uses: darker reconstructions, and indices read off the pixels."""

    def __init__(self, depth=1, discrete=True, factor=0.9):
        super().__init__()
        self.codebook = Table(SIZE, 4)
        self.depth, self.discrete, self.factor = depth, discrete, factor

    def forward(self, images):
        latents = nn.functional.avg_pool2d(images, 8).flatten(2).mT
        indices = (to_bytes(latents)[..., : self.depth] // 7 % SIZE).long()
        indices = indices.squeeze(2) if self.depth == 1 else indices
        return Output(images * self.factor, latents, latents, indices if self.discrete else None, {}, {})


@pytest.fixture(scope="module")
def levels():
    return torch.from_numpy(np.random.default_rng(2).integers(0, 256, (7, 3, 32, 24), dtype=np.uint8))


def evaluate(tokenizer, batches):
    result = Evaluator(EvaluateConfig(), CPU).tokenizer(tokenizer, batches)
    return result.metrics, result.left_out


def batches(levels, size):
    for first in range(0, len(levels), size):
        part = levels[first : first + size]
        yield Batch(part, torch.arange(first, first + len(part)), [])


def test_psnr_and_ssim_are_means_over_images(levels):
    metrics, _ = evaluate(Stub(), batches(levels, 3))
    images = to_images(levels, CPU)
    one, other = to_bytes(images).numpy(), to_bytes(images * 0.9).numpy()
    each = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(one, other, strict=True)]
    assert metrics["psnr"] == pytest.approx(np.mean(each), abs=1e-9)
    assert metrics["ssim"] == pytest.approx(float(ssim(*map(torch.from_numpy, (one, other))).mean()), abs=1e-9)
    assert metrics["images"] == 7 and metrics["tokens_per_image"] == 12


@pytest.mark.fault(36)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_metrics_do_not_depend_on_the_batch_size(levels, depth, size):
    metrics, _ = evaluate(Stub(depth), batches(levels, size))
    whole, _ = evaluate(Stub(depth), batches(levels, 7))
    assert metrics == pytest.approx(whole, abs=1e-9)


@pytest.mark.fault(36)
def test_a_real_tokenizer_and_loader_give_the_same_whatever_the_batch(make_recipe, small_photos):
    tokenizer, found = build(make_recipe("vq")), []
    for size in (1, 3, 7):
        config = DataConfig(root=str(small_photos), resolution=[32, 32], eval_batch_size=size, workers=0)
        found.append(evaluate(tokenizer, eval_batches(config, make_dataset(config, "val")))[0])
    assert found[0]["images"] == 7 and 10 < found[0]["psnr"] < 40
    # An image's reconstruction itself may differ in the last bit with the batch, so a pixel may round the other way.
    assert found[1] == pytest.approx(found[0], abs=1e-3) and found[2] == pytest.approx(found[0], abs=1e-3)


@pytest.mark.parametrize("depth", [1, 2])
def test_usage_and_perplexity_are_a_plain_count_over_the_whole_set(levels, depth):
    metrics, _ = evaluate(Stub(depth), batches(levels, 3))
    counts = np.bincount(Stub(depth)(to_images(levels, CPU)).indices.numpy().ravel(), minlength=SIZE)
    shares = counts[counts > 0] / counts.sum()
    assert 0.1 < metrics["usage"] < 1
    assert metrics["usage"] == pytest.approx(np.mean(counts > 0), abs=1e-6)
    assert metrics["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    assert metrics["codebook_size"] == SIZE
    assert metrics["bits_per_token"] == pytest.approx(depth * math.log2(SIZE))


def test_a_tokenizer_without_indices_has_no_usage(levels):
    metrics, _ = evaluate(Stub(discrete=False), batches(levels, 3))
    assert set(metrics) == {"psnr", "ssim", "tokens_per_image", "images"}
    assert "psnr" in table(metrics)


@pytest.mark.fault(29)
def test_files_that_do_not_decode_are_named_and_not_counted(levels):
    empty = Batch(torch.empty(0, 3, 32, 24, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), ["worse.png"])
    partial = Batch(levels[:2], torch.arange(2), ["bad.png"])
    metrics, bad = evaluate(Stub(), [empty, partial])
    alone, _ = evaluate(Stub(), batches(levels[:2], 2))
    assert bad == ["worse.png", "bad.png"]
    assert metrics == alone and metrics["images"] == 2


def test_evaluation_leaves_the_mode_as_it_was(levels):
    for mode in (True, False):
        stub = Stub().train(mode)
        evaluate(stub, batches(levels[:1], 1))
        assert stub.training is mode


@pytest.mark.fault(23)
def test_nothing_evaluated_is_nan_and_not_a_crash():
    metrics, _ = evaluate(Stub(), [])
    assert math.isnan(metrics["psnr"]) and math.isnan(metrics["ssim"]) and metrics["images"] == 0
    assert "usage" not in metrics


# What is shown and written


def test_the_table_shows_every_metric():
    metrics = {"psnr": 23.456, "ssim": 0.87654, "usage": 0.9876, "perplexity": 1234.56, "codebook_size": 8192,
               "bits_per_token": 13.0, "tokens_per_image": 256, "images": 50000}
    rows = dict(line.strip().split(maxsplit=1) if "  " not in line.strip() else line.strip().split("  ", 1)
                for line in table(metrics).splitlines())
    assert {name: value.strip() for name, value in rows.items()} == {
        "psnr": "23.46 dB", "ssim": "0.8765", "usage": "98.8%", "perplexity": "1,234.6", "codebook_size": "8,192",
        "bits_per_token": "13 bits", "tokens_per_image": "256", "images": "50,000",
    }
    assert len({len(line) for line in table(metrics).splitlines()}) == 1


def test_the_table_shows_what_is_infinite_or_undefined():
    shown = table({"psnr": math.inf, "ssim": math.nan, "usage": math.nan, "perplexity": math.nan, "images": 0})
    assert "inf dB" in shown and shown.count("nan") == 3


def refuse(literal):
    raise AssertionError(f"{literal} is not JSON")


def test_json_has_text_for_what_strict_parsers_refuse(levels):
    metrics, _ = evaluate(Stub(factor=1.0), batches(levels, 3))
    assert metrics["psnr"] == math.inf and metrics["ssim"] == pytest.approx(1, abs=1e-12)
    content = {"metrics": metrics, "run": {"transitions": [{"x": -math.inf}, (math.nan, 1.5)], "finished": True}, "none": None}
    read = json.loads(to_json(content), parse_constant=refuse)
    assert read["metrics"]["psnr"] == "inf" and read["metrics"]["images"] == 7
    assert read["run"] == {"transitions": [{"x": "-inf"}, ["nan", 1.5]], "finished": True}
    assert metrics["psnr"] == math.inf, "what is written is not changed in memory"


# Predicted memory


def saved_bytes(tokenizer, images):
    """Return the bytes that a training forward and its losses keep for the backward, parameters left out."""
    kept, own = {}, {x.untyped_storage().data_ptr() for x in (*tokenizer.parameters(), *tokenizer.buffers())}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = tokenizer(images, Progress(0, 0, "train", 0, 0, 1))
        (output.reconstructions - images).abs().mean() + sum(output.losses.values())
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("plugin", ["vq", "simvq"])
@pytest.mark.parametrize("side", [32, 48])
def test_predicted_activations_are_those_of_a_training_batch_within_a_factor_of_2(make_recipe, plugin, side):
    recipe = make_recipe(plugin, f"data.resolution=[{side},32]")
    tokenizer = build(recipe)
    predicted = predict_memory(tokenizer, recipe).activations
    measured = saved_bytes(tokenizer.train(), torch.rand(4, 3, side, 32) * 2 - 1)
    assert measured / 2 < predicted < measured * 2


def test_predicted_activations_shrink_with_accumulation(make_recipe):
    whole, halved = (make_recipe("vq", f"accumulate={number}") for number in (1, 2))
    tokenizer = build(whole)
    assert predict_memory(tokenizer, halved).activations * 2 == predict_memory(tokenizer, whole).activations


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("ema", [0, 0.9])
def test_predicted_states_are_what_an_optimizer_step_leaves(make_recipe, ema, frozen):
    freeze = "stages=[{freeze: ['encoder.*']}]" if frozen else "stages=[{}]"
    recipe = make_recipe("simvq", f"ema={ema}", freeze)
    tokenizer = build(recipe)
    predicted = predict_memory(tokenizer, recipe).states
    trained = [p for p in tokenizer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    everything = [*tokenizer.parameters(), *tokenizer.buffers()]
    kept = [*everything, *(everything if ema else []), *(p.grad for p in trained), *moments]
    assert predicted == sum(x.numel() * x.element_size() for x in kept)
