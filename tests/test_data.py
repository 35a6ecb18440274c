import io
import multiprocessing
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import ExifTags, Image
from test_training import VQ, exported, run, unequal
from torch.utils.data import IterableDataset

from vqzoo import data
from vqzoo.data import (
    DataConfig,
    Folder,
    ImageDataset,
    Key,
    Photos,
    StreamDataset,
    TimmImages,
    content,
    crop_val,
    decode,
    eval_batches,
    fingerprint,
    load_image,
    make_dataset,
    to_images,
    train_batches,
)
from vqzoo.errors import DataError, UserError
from vqzoo.trainer import Trainer

COUNT = 21
SIZES = ((40, 48), (24, 70), (16, 24), (50, 20))


def picture(number, height, width):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_images(folder, count, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        picture(number, *SIZES[number % len(SIZES)]).save(folder / f"{number:03}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", COUNT)
    write_images(root / "val", 7, first=100)
    return root


@pytest.fixture
def config(root):
    return DataConfig(root=str(root), resolution=[16, 24], flip=True, batch_size=8, eval_batch_size=3, workers=0)


def take(config, dataset, batches, **where):
    iterator = train_batches(config, dataset, seed=5, **where)
    taken = list(islice(iterator, batches))
    iterator.close()
    return taken


def joined(batches):
    batches = list(batches)
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.positions for batch in batches])


# The order


@pytest.mark.fault(26, 27)
@pytest.mark.parametrize("workers, processes, accumulate", [
    (1, 1, 1), (2, 1, 1), (0, 2, 1), (0, 4, 1), (0, 1, 4), (1, 2, 2), (0, 4, 2),
])
def test_the_sequence_of_samples_is_one_whatever_reads_it(config, workers, processes, accumulate):
    dataset, steps = make_dataset(config, "train"), 5  # two and a half passes
    images, positions = joined(take(config, dataset, steps))
    assert positions.tolist() == list(range(steps * 8))

    config = replace(config, workers=workers)
    where = dict(processes=processes, accumulate=accumulate)
    ranks = [take(config, dataset, steps * accumulate, process=rank, **where) for rank in range(processes)]
    split_images, split_positions = joined([batch for together in zip(*ranks, strict=True) for batch in together])
    assert torch.equal(split_positions, positions)
    assert torch.equal(split_images, images)
    assert all(len(batch.images) == 8 // (processes * accumulate) for rank in ranks for batch in rank)


def test_start_continues_where_the_samples_ended(config):
    dataset = make_dataset(config, "train")
    images, positions = joined(take(config, dataset, 6)[3:])
    again, same = joined(take(config, dataset, 3, start=24))
    assert torch.equal(same, positions) and torch.equal(again, images)


def test_each_pass_has_its_own_order_and_no_sample_twice(config, monkeypatch):
    dataset = make_dataset(config, "train")
    seen = []
    monkeypatch.setattr(dataset.source, "image", lambda index, cover: seen.append(index) or picture(index, 16, 24))
    take(config, dataset, 4)
    first, second = seen[:16], seen[16:]
    assert len(set(first)) == len(set(second)) == 16 and first != second  # 21 files, batches of 8
    assert first != sorted(first)


def test_crops_follow_the_seed_and_the_position(config):
    dataset = make_dataset(replace(config, resize=30), "train")
    crop = lambda position, seed: dataset[Key(0, position, seed)][0]  # noqa: E731
    assert torch.equal(crop(3, 1), crop(3, 1))
    assert len({crop(position, seed).numpy().tobytes() for position in range(3) for seed in range(3)}) > 6


def test_flip_mirrors_about_half_and_moves_no_crop(config):
    flipped, plain = make_dataset(config, "train"), make_dataset(replace(config, flip=False), "train")
    mirrored = 0
    for position in range(40):
        ours, theirs = flipped[Key(0, position, 1)][0], plain[Key(0, position, 1)][0]
        assert torch.equal(ours, theirs) or torch.equal(ours, theirs.flip(-1))
        mirrored += not torch.equal(ours, theirs)
    assert 8 < mirrored < 32


@pytest.mark.fault(23)
def test_a_dataset_smaller_than_a_batch_is_repeated(config):
    config = replace(config, train="val", val="train", batch_size=16)
    dataset = make_dataset(config, "train")
    assert len(dataset) == 7
    assert joined(take(config, dataset, 2))[1].tolist() == list(range(32))


def test_reading_leaves_the_global_generator_alone(config):
    dataset = make_dataset(config, "train")
    before = torch.get_rng_state()
    take(config, dataset, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "where, says", [(dict(processes=3), "8 is not divisible by 3"), (dict(start=12), "does not divide the 12 samples")]
)
def test_sizes_that_do_not_fit_are_named_at_once(config, where, says):
    with pytest.raises(UserError, match=f"data.batch_size: .*{says}"):
        train_batches(config, make_dataset(config, "train"), 0, **where)


@pytest.mark.fault(23, 36)
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_sees_every_sample_once_with_the_tail(config, processes):
    dataset = make_dataset(config, "val")
    shares = [list(eval_batches(config, dataset, rank, processes)) for rank in range(processes)]
    seen = {}
    for share in shares:
        positions = [int(position) for batch in share for position in batch.positions]
        assert positions == sorted(positions)
        seen |= {int(p): image for batch in share for p, image in zip(batch.positions, batch.images, strict=True)}
        assert sum(len(batch.images) for batch in share) == len(positions)
    assert sorted(seen) == list(range(7)) and sum(len(batch.images) for share in shares for batch in share) == 7
    for index, image in seen.items():
        assert torch.equal(image, load_image(dataset.source.root / dataset.name(index), (16, 24)))


def test_evaluation_limit_is_spread_over_the_dataset(config):
    dataset = make_dataset(config, "val")
    assert joined(eval_batches(config, dataset, limit=3))[1].tolist() == [0, 2, 4]
    assert joined(eval_batches(config, dataset, limit=99))[1].tolist() == list(range(7))
    assert list(eval_batches(config, dataset, limit=0)) == []


def test_evaluation_with_workers_gives_the_same(config):
    dataset = make_dataset(config, "val")
    ours, theirs = (joined(eval_batches(replace(config, workers=n), dataset)) for n in (0, 2))
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


# Workers


def test_closing_ends_the_workers_and_a_signal_does_not(config):
    config = replace(config, workers=1)
    iterator = train_batches(config, make_dataset(config, "train"), seed=0)
    next(iterator)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert [next(iterator).positions[0].item() for _ in range(4)] == [8, 16, 24, 32]
    iterator.close()
    worker.join(5)
    assert not multiprocessing.active_children()


@pytest.mark.fault(31)
@pytest.mark.parametrize(
    "end, status, says",
    [
        ("raise SystemExit(7)", 7, ""),  # the batches were forgotten: their workers must not keep the program
        ("os.kill(active_children()[0].pid, 9)\nfor batch in batches: pass", 1, r"DataError: images .* signal 9 \(Killed\)"),
    ],
)
def test_a_program_ends_with_its_workers(config, end, status, says):
    program = (
        "import os\nfrom multiprocessing import active_children\nfrom vqzoo.data import *\n"
        f"config = DataConfig(root={config.root!r}, batch_size=2, workers=1)\n"
        "batches = train_batches(config, make_dataset(config, 'train'), 0)\n"
        f"print(len(next(batches).images), flush=True)\n{end}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, "2\n"), done.stderr
    assert re.search(says, done.stderr)


@pytest.fixture
def watched(config, monkeypatch):
    """Watch workers closely; give batches of one worker, and the worker."""
    monkeypatch.setattr(data, "WATCH", 0.1)
    config = replace(config, workers=1)
    batches = train_batches(config, make_dataset(config, "train"), seed=0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    yield batches, worker
    batches.close()
    assert not multiprocessing.active_children()


@pytest.mark.fault(31)
def test_a_killed_worker_is_told_when_the_next_batch_is_wanted_and_not_before(watched):
    batches, worker = watched
    handler = signal.getsignal(signal.SIGCHLD)
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.3)  # what the program does meanwhile, as half of an update, is not broken off
    began = time.monotonic()
    with pytest.raises(DataError, match=r"^images can no longer be read: .*signal 9 \(Killed\).*memory.*data.workers, now 1$"):
        list(batches)
    assert time.monotonic() - began < 5 and signal.getsignal(signal.SIGCHLD) == handler
    assert not multiprocessing.active_children()


def hang(index, cover):
    time.sleep(1000)


@pytest.mark.fault(31)
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_hang_are_told_in_time_and_end(config, monkeypatch, workers):
    monkeypatch.setattr(data, "WATCH", 0.1)
    monkeypatch.setattr(data, "STUCK", 0.5)
    dataset = make_dataset(replace(config, workers=workers), "train")
    monkeypatch.setattr(dataset.source, "image", hang)
    began = time.monotonic()
    with pytest.raises(DataError, match="images can no longer be read: no worker gave any for 0.5 seconds; .*disk"):
        take(replace(config, workers=workers), dataset, 1)
    assert 0.5 < time.monotonic() - began < 10 and not multiprocessing.active_children()


@pytest.mark.fault(31)
def test_closing_ends_even_a_worker_that_hangs(config, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # how long torch waits for it
    config = replace(config, workers=1)
    batches = train_batches(config, make_dataset(config, "train"), seed=0)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGSTOP)
    batches.close()
    assert not multiprocessing.active_children()


@pytest.mark.fault(31)
def test_a_worker_that_is_only_slow_is_waited_for(config, monkeypatch):
    monkeypatch.setattr(data, "WATCH", 0.05)
    config = replace(config, workers=1, batch_size=2)
    dataset = make_dataset(config, "train")
    image = dataset.source.image
    monkeypatch.setattr(dataset.source, "image", lambda index, cover: time.sleep(0.1) or image(index, cover))
    assert joined(take(config, dataset, 3))[1].tolist() == list(range(6))


def test_a_dataset_can_be_sent_to_a_spawned_worker(config):
    for name in ("folder", "photos"):
        dataset = make_dataset(replace(config, name=name), "train")
        copy = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(copy[Key(2, 9, 1)][0], dataset[Key(2, 9, 1)][0])


# Pixels


def test_all_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 2, 256)
    images = to_images(levels, "cpu")
    assert images.dtype == torch.float32 and images.min() == -1 and images.max() == 1
    assert torch.equal(((images + 1) * 127.5).round().to(torch.uint8), levels)


@pytest.mark.parametrize("height, width", [(40, 48), (24, 70), (33, 47), (9, 5), (200, 61), (16, 25)])
def test_crop_val_is_resize_then_centre_crop(height, width):
    image = picture(1, height, width)
    scale = max(16 / height, 24 / width)
    high, wide = max(16, round(height * scale)), max(24, round(width * scale))
    top, left = (high - 16) // 2, (wide - 24) // 2
    whole = image.resize((wide, high), Image.Resampling.BICUBIC)
    expected = np.asarray(whole.crop((left, top, left + 24, top + 16)), dtype=int)
    ours = np.asarray(crop_val(image, (16, 24)), dtype=int)
    assert ours.shape == (16, 24, 3) and np.abs(ours - expected).max() <= 1


def test_an_image_that_fits_is_not_resampled(tmp_path):
    fits, wide = picture(1, 16, 24), picture(2, 16, 60)
    assert crop_val(fits, (16, 24)).tobytes() == fits.tobytes()
    assert crop_val(wide, (16, 24)).tobytes() == wide.crop((18, 0, 42, 16)).tobytes()


def test_training_crops_stay_inside_and_reach_the_edges(config):
    config = replace(config, resolution=[4, 4], resize=6, flip=False)
    gradient = np.arange(36, dtype=np.uint8).reshape(6, 6)
    dataset = ImageDataset(FakeSource([Image.fromarray(gradient).convert("RGB")]), config, config.resize)
    corners = {int(dataset[Key(0, position, 0)][0][0, 0, 0]) for position in range(100)}
    assert corners == {row * 6 + column for row in range(3) for column in range(3)}


class FakeSource:
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return f"image {index}"

    def image(self, index, cover=None):
        return self.images[index]


def saved(image, kind, **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    file.seek(0)
    return file


@pytest.mark.fault(29)
def test_odd_modes_become_rgb():
    red = Image.new("RGB", (6, 4), (255, 0, 0))
    cases = {
        "grey": (saved(Image.new("L", (6, 4), 77), "PNG"), (77,) * 3),
        "one bit": (saved(Image.new("1", (6, 4), 1), "PNG"), (255,) * 3),
        "palette": (saved(red.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), (255, 0, 0)),
        "cmyk": (saved(Image.new("CMYK", (6, 4), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        "16 bit": (saved(Image.fromarray(np.full((4, 6), 40000, np.uint16)), "PNG"), (156,) * 3),
        "transparent": (saved(Image.new("RGBA", (6, 4), (255, 0, 0, 0)), "PNG"), (255, 255, 255)),
        "half transparent": (saved(Image.new("RGBA", (6, 4), (255, 0, 0, 51)), "PNG"), (255, 204, 204)),
        "grey with alpha": (saved(Image.new("LA", (6, 4), (0, 0)), "PNG"), (255,) * 3),
        "transparent colour": (saved(red, "PNG", transparency=(255, 0, 0)), (255, 255, 255)),
        "animation": (saved(red, "GIF", save_all=True, append_images=[Image.new("RGB", (6, 4))] * 2), (255, 0, 0)),
    }
    for case, (file, colour) in cases.items():
        image = decode(file)
        assert (image.mode, image.size) == ("RGB", (6, 4)), case
        assert image.getpixel((2, 2)) == colour, case


@pytest.mark.fault(29)
def test_cmyk_jpeg_and_tiny_images_are_read(tmp_path):
    Image.new("CMYK", (40, 30), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "dot.png")
    Image.new("RGB", (1, 5000)).save(tmp_path / "line.png")
    red, green, blue = load_image(tmp_path / "cmyk.jpg", (8, 8))[:, 4, 4].tolist()
    assert red > 240 and green < 15 and blue < 15
    dot = torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None]
    assert torch.equal(load_image(tmp_path / "dot.png", (8, 8)), dot.expand(3, 8, 8))
    assert load_image(tmp_path / "line.png", (16, 24)).shape == (3, 16, 24)


@pytest.mark.fault(29)
def test_exif_orientation_is_applied():
    image, exif = picture(3, 4, 6), Image.Exif()
    exif[0x0112] = 6
    upright = decode(saved(image, "PNG", exif=exif))
    assert upright.tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()


def smooth(height, width):
    """Return a picture that is nearly the same at any scale."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows * 255 // height, columns * 255 // width, rows * 0 + 128], 2).astype(np.uint8))


@pytest.mark.parametrize(("size", "resolution", "shorter", "reduced"), [
    ((300, 400), (32, 32), None, 8),
    ((300, 400), (32, 32), 64, 4),
    ((300, 400), (160, 32), None, 1),
    ((256, 256), (128, 128), 128, 2),
    ((255, 255), (128, 128), None, 1),
    ((40, 30), (64, 64), None, 1),
])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_draft_is_the_smallest_scale_that_needs_no_enlarging(size, resolution, shorter, reduced, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = smooth(*(size if orientation == 1 else size[::-1]))
    made = decode(saved(image, "JPEG", quality=95, exif=exif), (resolution, shorter))
    assert made.size == (-(-size[1] // reduced), -(-size[0] // reduced))


def test_drafts_are_for_training_alone_and_show_the_same_crops(tmp_path, config):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for number in range(8):
            smooth(200 + number, 180).save(tmp_path / split / f"{number}.jpg", quality=95)
    found = {}
    for draft in (False, True):
        config = replace(config, root=str(tmp_path), draft=draft, resize=40)
        train = take(config, make_dataset(config, "train"), 2)
        val = joined(eval_batches(config, make_dataset(config, "val")))
        found[draft] = (*joined(train), *val)
    assert torch.equal(found[False][2], found[True][2]) and torch.equal(found[False][1], found[True][1])
    difference = (found[False][0].float() - found[True][0].float()).abs()
    assert 0 < difference.max() < 12 and difference.mean() < 2  # levels of 255


# Odd files


def png(side):
    """Return a black PNG of side x side pixels in one bit each: far smaller as a file than as an image."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows, press = bytes(1 + (side + 7) // 8), zlib.compressobj()
    pixels = b"".join([*(press.compress(rows) for _ in range(side)), press.flush()])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def levels(value, dtype):
    return Image.fromarray(np.full((20, 20), value, dtype))


@cache
def odd_files():
    """Return files that are converted, each with the image that is meant, and files that are left out, with the reason."""
    red, exif = Image.new("RGB", (20, 20), "red"), Image.Exif()
    photo = {kind: saved(picture(0, 64, 64), kind).getvalue() for kind in ("JPEG", "PNG")}
    exif[ExifTags.Base.Orientation] = 6
    clear = Image.new("P", (20, 20))
    clear.putpalette([255, 0, 0])
    frames = dict(save_all=True, append_images=[Image.new("RGB", (20, 20))] * 2)
    white, grey = Image.new("RGB", (20, 20), "white"), Image.new("RGB", (20, 20), (156, 156, 156))
    converted = {
        "cmyk.jpg": (saved(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG").getvalue(), red),
        "sixteen_bit.png": (saved(levels(40000, np.uint16), "PNG").getvalue(), grey),
        "sixteen_bit.tiff": (saved(levels(40000, np.uint16), "TIFF").getvalue(), grey),
        "rgba.png": (saved(Image.new("RGBA", (20, 20), (255, 0, 0, 0)), "PNG").getvalue(), white),
        "palette.png": (saved(clear, "PNG", transparency=0).getvalue(), white),
        "palette.gif": (saved(red.convert("P", palette=Image.Palette.ADAPTIVE), "GIF").getvalue(), red),
        "rotated.jpg": (saved(smooth(20, 40), "JPEG", quality=95, exif=exif).getvalue(),
                        smooth(20, 40).transpose(Image.Transpose.ROTATE_270)),
        "animation.gif": (saved(red, "GIF", **frames).getvalue(), red),
        "animation.png": (saved(red, "PNG", **frames).getvalue(), red),
        "dot.png": (saved(Image.new("RGB", (1, 1), "red"), "PNG").getvalue(), red),
    }
    left_out = {
        "truncated.jpg": (photo["JPEG"][:2000], "runcated"),
        "truncated.png": (photo["PNG"][:2000], "runcated"),
        "zero.png": (b"", "cannot identify"),
        "text.jpg": (b"no image", "cannot identify"),
        "bomb.png": (png(20_000), "decompression bomb"),
        "large.png": (png(9_500), "9500x9500 pixels exceed the limit"),
        "float.tiff": (saved(levels(0.5, np.float32), "TIFF").getvalue(), "floating-point"),
        "beyond.tiff": (saved(levels(70_000, np.int32), "TIFF").getvalue(), "beyond 16 bits"),
        "locked.png": (photo["PNG"], "Permission denied"),
    }
    return converted, left_out


CONVERTED, LEFT_OUT = 10, 9


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """Make a folder of 20 images and of every odd file; return how to read it as either split."""
    write_images(tmp_path / "train", 20)
    for files in odd_files():
        for name, (written, _) in files.items():
            (tmp_path / "train" / name).write_bytes(written)
    opened = Image.open

    def refuse(file, *rest):  # chmod would not stop root
        if str(file).endswith("locked.png"):
            raise PermissionError(13, "Permission denied")
        return opened(file, *rest)

    monkeypatch.setattr(Image, "open", refuse)
    (tmp_path / "val").symlink_to(tmp_path / "nowhere")
    config = DataConfig(root=str(tmp_path), resolution=[16, 16], eval_batch_size=8, workers=0)
    return {"train": replace(config, batch_size=20 + CONVERTED + LEFT_OUT), "val": replace(config, train="none", val="train")}


bombs_warn = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@bombs_warn
@pytest.mark.fault(29)
def test_odd_files_are_converted_and_bad_ones_left_out_of_every_evaluation(odd):
    converted, left_out = odd_files()
    assert (len(converted), len(left_out)) == (CONVERTED, LEFT_OUT)
    dataset = make_dataset(odd["val"], "val")
    for _ in range(2):
        batches = list(eval_batches(odd["val"], dataset))
        named = [name for batch in batches for name in batch.bad]
        assert sorted(named) == sorted(left_out)
        images, positions = joined(batches)
        assert positions.tolist() == [i for i in range(len(dataset)) if dataset.name(i) not in left_out]
        assert all(len(batch.images) == len(batch.positions) for batch in batches)
        for image, position in zip(images, positions.tolist(), strict=True):
            if (name := dataset.name(position)) in converted:
                meant = torch.from_numpy(np.array(crop_val(converted[name][1], (16, 16)))).permute(2, 0, 1)
                assert (image.float() - meant.float()).abs().max() < 12, name  # JPEG's, of 255
    for name, (_, reason) in left_out.items():
        assert reason in dataset.bad[name], dataset.bad[name]


@bombs_warn
@pytest.mark.fault(29)
def test_training_replaces_bad_files_and_names_each_once(odd):
    dataset = make_dataset(odd["train"], "train")
    first, second = take(odd["train"], dataset, 2)
    assert len(first.images) == len(second.images) == odd["train"].batch_size
    assert set(first.bad) == set(odd_files()[1]) == set(dataset.bad) and second.bad == []
    again = take(odd["train"], make_dataset(odd["train"], "train"), 1, start=odd["train"].batch_size)[0]
    assert torch.equal(again.images, second.images)


@bombs_warn
@pytest.mark.fault(29)
@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_files_are_an_error_in_training_and_in_evaluation(odd, workers):
    for split, batches in (("train", lambda config, dataset: take(config, dataset, 1)),
                           ("val", lambda config, dataset: list(eval_batches(config, dataset)))):
        config = replace(odd[split], bad_files=LEFT_OUT, workers=workers)
        batches(config, make_dataset(config, split))
        config = replace(config, bad_files=LEFT_OUT - 1)
        with pytest.raises(UserError, match=r"data.bad_files: 9 of 39 files .* at most 8.*: .*(jpg|png|tiff) \("):
            batches(config, make_dataset(config, split))


@pytest.mark.fault(29)
def test_files_that_a_run_left_out_before_are_not_named_again_and_count(config):
    config = replace(config, bad_files=3)
    dataset = make_dataset(config, "train")
    dataset.recall(["003.png", "long gone.png", "005.png"])
    assert set(dataset.bad) == {"003.png", "005.png"}
    assert dataset.remember({"003.png": "ValueError: x", "007.png": "ValueError: y"}) == ["007.png"]
    with pytest.raises(UserError, match=r"data.bad_files: 4 of 21 .* at most 3"):
        dataset.remember({"009.png": "ValueError: z"})
    with pytest.raises(UserError, match=r"data.bad_files: 4 of 21 .*005.png \(did not decode before\)"):
        make_dataset(config, "train").recall([f"{number:03}.png" for number in (3, 5, 7, 9)])


@pytest.mark.fault(29)
def test_nothing_but_bad_files_is_an_error(tmp_path):
    (tmp_path / "train").mkdir()
    for name in "ab":
        (tmp_path / "train" / f"{name}.png").touch()
    config = DataConfig(root=str(tmp_path), batch_size=2, workers=0)
    with pytest.raises(UserError, match="2 of 2 files"):
        take(config, make_dataset(config, "train"), 1)


@pytest.mark.fault(29)
def test_load_image_names_the_file(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match="text.png: not an image"):
        load_image(tmp_path / "text.png", (8, 8))
    with pytest.raises(UserError, match="missing.png.*FileNotFoundError"):
        load_image(tmp_path / "missing.png", (8, 8))


# Folders


@pytest.mark.fault(30)
def test_a_listing_is_sorted_recursive_and_clean(tmp_path):
    for name in ("b/1.PNG", "a/ü b/2.JpEg", "a/1.PNG", "c.webp", ".hidden.png", ".cache/x.png", "notes.txt", "d.tiff"):
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / name).touch()
    (tmp_path / "all/dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "all/self.png").symlink_to(tmp_path / "all/self.png")
    (tmp_path / "all/loop").symlink_to(tmp_path / "all")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/e.gif").touch()
    (tmp_path / "all/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "all/folder.png").mkdir()
    expected = ["a/1.PNG", "a/ü b/2.JpEg", "b/1.PNG", "c.webp", "d.tiff", "linked/e.gif"]
    assert Folder(tmp_path / "all", "data.train").names == expected


@pytest.mark.fault(30)
def test_flat_and_class_folders_hold_the_same_images(tmp_path, config):
    write_images(tmp_path / "flat", 4)
    write_images(tmp_path / "classes/x", 2)
    write_images(tmp_path / "classes/y z", 2, first=2)
    images = []
    for name in ("flat", "classes"):
        config = replace(config, root=str(tmp_path / name), train=".")
        images.append(joined(eval_batches(config, make_dataset(config, "train")))[0])
    assert len(images[0]) == 4 and torch.equal(*images)


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    "change, says",
    [
        (dict(root=None), "data.root: not set"),
        (dict(root="/no/such/place"), "data.root: /no/such/place is not a folder"),
        (dict(train="trian"), "no folder 'trian'.*sub-folders: train, val; name one with data.train=NAME"),
        (dict(train="val"), "training on the evaluation images"),
        (dict(train="./val"), "training on the evaluation images"),
        (dict(train="."), "training on the evaluation images"),
        (dict(resolution=[128]), r"data.resolution: \[128\]"),
        (dict(resolution=[0, 8]), "data.resolution"),
        (dict(resize=10), "data.resize: 10 is smaller"),
        (dict(workers=-1), "data.workers: -1"),
        (dict(batch_size=0), "data.batch_size: 0"),
        (dict(name="foldr"), "data.name: 'foldr' is unknown; did you mean 'folder'"),
        (dict(name="cifar/10"), "data.name: 'cifar/10' is unknown"),
        (dict(name="photos", train="test"), "data.train: photos has no split 'test'"),
        (dict(name="torch/cifar10", root=None), "data.root"),
        (dict(name="torch/cifar10", train="trian"), "no split 'trian'; did you mean 'train'"),
        (dict(name="torch/cifar10", train="test"), "training on the evaluation images"),
        (dict(name="torch/cifar10"), "data.name: timm cannot open 'torch/cifar10'.*not found"),
        (dict(name="torch/nothing"), "data.name: timm cannot open 'torch/nothing'"),
        (dict(name="torch/image_folder", train="trian"), "data.train: no folder 'trian'"),
    ],
)
def test_a_mistake_is_named_with_its_key(config, change, says):
    with pytest.raises(UserError, match=says):
        make_dataset(replace(config, **change), "train")


@pytest.mark.fault(30)
def test_a_root_with_another_shape_than_expected_says_what_it_holds(tmp_path, config):
    def refusal(**change):
        with pytest.raises(UserError) as caught:
            make_dataset(replace(config, **{"root": str(tmp_path), **change}), "train")
        return str(caught.value)

    assert refusal().endswith("sub-folders: none; name one with data.train=NAME, or make one: training and evaluation need "
                              "images of their own")
    write_images(tmp_path / "photos" / "train", 1)
    said = refusal()
    assert f"no folder 'train' in {tmp_path}; sub-folders: photos; " in said and f"data.root={tmp_path / 'photos'}" in said
    write_images(tmp_path, 3)
    assert f"; 3 images lie in {tmp_path} itself; " in refusal()
    (tmp_path / "train").symlink_to(tmp_path / "unmounted")
    assert "; train is a link that leads nowhere; " in refusal()
    assert refusal(root=str(tmp_path / "train")) == f"data.root: {tmp_path / 'train'} is a link that leads nowhere"


@pytest.mark.fault(30)
@pytest.mark.parametrize("at", ["", "train", "train/cats"])
def test_a_folder_that_may_not_be_read_is_named(tmp_path, config, monkeypatch, at):
    write_images(tmp_path / "train/cats", 2)
    closed, scandir, stat = tmp_path / at, os.scandir, os.stat

    def refuse(path):
        if Path(path) == closed:  # chmod would not stop root
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) or scandir(path))
    monkeypatch.setattr(os, "listdir", lambda path: refuse(path))  # of which old versions of pathlib make use
    monkeypatch.setattr(os, "stat", lambda path, **how: (refuse(path) if not at else None) or stat(path, **how))
    # pathlib of Python 3.14 no longer tells what it may not look at from what is no folder
    said = "the folder cannot be read .Permission denied." if at else "(cannot be read .Permission denied.|is not a folder)"
    with pytest.raises(UserError, match=f"^{'' if at else 'data.root: '}{closed}:? {said}$"):
        make_dataset(replace(config, root=str(tmp_path)), "train")


@pytest.mark.fault(30)
def test_what_can_be_used_but_may_not_be_meant_is_noted(tmp_path, config):
    config = replace(config, root=str(tmp_path))
    write_images(tmp_path / "train/cats", 5)
    assert make_dataset(config, "train").notes == []
    for name in ("dogs", "cows/old", "cats/.hidden"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "train/dogs/notes.txt").touch()
    write_images(tmp_path / "train/birds", 2)
    for one, other in (("000.png", "000.jpg"), ("001.png", "001.PNG")):
        (tmp_path / "train/birds" / other).write_bytes((tmp_path / "train/birds" / one).read_bytes())
    for number in range(4):
        (tmp_path / f"train/{number}.png").symlink_to("/no/such/disk/0.png")
    dataset = make_dataset(config, "train")
    assert dataset.notes == [
        f"data.train: {tmp_path / 'train'} has {note}" for note in (
            "links that lead nowhere, which are left out (4): 0.png, 1.png, 2.png, ...",
            "folders without an image (2): cows, dogs",
            "names that differ in ending or case alone (4): birds/000.jpg, birds/000.png, birds/001.PNG, ...",
        )
    ]
    assert len(dataset) == 9


@pytest.mark.fault(30)
def test_a_folder_in_which_nothing_can_be_used_says_what_it_has_instead(tmp_path, config):
    for name in ("cats", "dogs"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").symlink_to("/no/such/disk/0.png")
        (tmp_path / "train" / name / "0.heic").touch()
    with pytest.raises(UserError) as caught:
        make_dataset(replace(config, root=str(tmp_path)), "train")
    for part in (f"data.train: no images below {tmp_path / 'train'}; looked for .bmp, .gif", "at any depth",
                 "links that lead nowhere, which are left out (2): cats/0.png, dogs/0.png",
                 "folders without an image (2): cats, dogs"):
        assert part in str(caught.value)


@pytest.mark.fault(30)
@pytest.mark.parametrize("name", ["ein Bild mit ü und 猫", os.fsdecode(b"no text \xff")], ids=["unicode", "bytes"])
def test_any_name_that_a_file_can_have_is_read_named_and_fingerprinted(tmp_path, config, name):
    folder = tmp_path / f"{name} root" / f"{name} train"
    try:
        write_images(folder / name, 3)
    except OSError:
        pytest.skip("this file system refuses the name")
    (folder / name / "000.png").rename(folder / name / f"{name}.png")
    (folder / name / f"{name} bad.png").touch()
    dataset = make_dataset(replace(config, root=str(tmp_path / f"{name} root"), train=f"{name} train"), "train")
    (batch,) = eval_batches(replace(config, eval_batch_size=9), dataset)
    said = name.encode("utf-8", "backslashreplace").decode()  # text, so that any log takes it
    assert len(batch.images) == 3 and batch.bad == [f"{said}/{said} bad.png"]
    assert len(fingerprint(dataset)) == 12 and content(dataset)["images"] == 4


def test_a_draft_of_what_others_decode_is_refused(config):
    with pytest.raises(UserError, match=r"data.draft: the images of data.name=photos are decoded elsewhere"):
        make_dataset(replace(config, name="photos", draft=True), "train")


@pytest.mark.fault(30)
def test_a_split_is_never_guessed(tmp_path, config):
    write_images(tmp_path / "train", 2)
    (tmp_path / "empty/class").mkdir(parents=True)
    with pytest.raises(UserError, match="data.val: no folder 'val'.*sub-folders: empty, train"):
        make_dataset(replace(config, root=str(tmp_path)), "val")
    with pytest.raises(UserError, match="data.val: no images below .*empty"):
        make_dataset(replace(config, root=str(tmp_path), val="empty"), "val")


@pytest.mark.fault(30)
def test_linked_splits_are_one_folder(tmp_path, config):
    write_images(tmp_path / "train", 2)
    (tmp_path / "val").symlink_to(tmp_path / "train")
    with pytest.raises(UserError, match="share images"):
        make_dataset(replace(config, root=str(tmp_path)), "val")


def test_fingerprint_follows_names_and_sizes(tmp_path, config):
    write_images(tmp_path / "train", 3)
    print_of = lambda: fingerprint(make_dataset(replace(config, root=str(tmp_path)), "train"))  # noqa: E731
    first = print_of()
    assert first == print_of() and len(first) == 12
    (tmp_path / "train/000.png").rename(tmp_path / "train/zzz.png")
    second = print_of()
    with (tmp_path / "train/zzz.png").open("ab") as file:
        file.write(b"x")
    assert len({first, second, print_of()}) == 3


def test_content_follows_the_names_and_their_order_and_opens_nothing(tmp_path, config, monkeypatch):
    write_images(tmp_path / "train", 3)
    config = replace(config, root=str(tmp_path))
    first = content(make_dataset(config, "train"))
    with (tmp_path / "train/001.png").open("ab") as file:
        file.write(b"x")
    dataset = make_dataset(config, "train")
    monkeypatch.setattr(os, "stat", None)
    assert content(dataset) == first and first["images"] == 3 and re.fullmatch("[0-9a-f]{16}", first["names"])
    dataset.source.names = dataset.source.names[::-1]
    assert content(dataset)["images"] == 3 and content(dataset)["names"] != first["names"]
    monkeypatch.undo()
    (tmp_path / "train/001.png").rename(tmp_path / "train/1.png")
    assert content(make_dataset(config, "train"))["names"] != first["names"]
    photos = [content(make_dataset(replace(config, name="photos"), split)) for split in ("train", "val", "train")]
    assert photos[0] == photos[2] != photos[1]
    assert content(StreamDataset(FakeStream(5), "wds/fake", config)) == {"images": None, "names": None}


def test_content_of_a_dataset_of_timms_is_its_name_and_length(config):
    def of(count, name):
        return content(ImageDataset(TimmImages([None] * count, name), config))

    assert of(3, "hfds/x/train") == of(3, "hfds/x/train") != of(4, "hfds/x/train")
    assert of(3, "hfds/x/train")["names"] != of(3, "hfds/y/train")["names"]


# Photos


@pytest.mark.parametrize("resolution", [(32, 32), (96, 96), (100, 128), (512, 512)])
def test_photo_splits_share_no_pixel(resolution):
    covered = {}
    for held_out in (False, True):
        source = Photos(held_out, resolution, centred=False)
        assert len(source) > 0
        for photo, _, (left, top, right, bottom) in source.tiles:
            canvas = covered.setdefault(photo, np.zeros((1500, 1500), int))
            canvas[top:bottom, left:right] += 1
    assert len(covered) == 8 and max(canvas.max() for canvas in covered.values()) == 1


def test_photos_are_cropped_at_their_own_scale(config):
    config = replace(config, name="photos", root=None, resolution=[64, 64], flip=False)
    train, val = make_dataset(config, "train"), make_dataset(config, "val")
    assert len(train) + len(val) > 150 and len(val) == (len(train) + len(val)) // 5
    assert train.name(0) == "astronaut[0,0]"
    tile = torch.from_numpy(np.array(train.source.image(3))).permute(2, 0, 1)
    assert tile.shape == (3, 96, 96)
    windows = tile.unfold(1, 64, 1).unfold(2, 64, 1)  # every 64x64 crop of the tile
    crops = [train[Key(3, position, 0)][0] for position in range(4)]
    for crop in crops:
        assert (windows == crop[:, None, None]).all(-1).all(-1).all(0).any()
    assert not torch.equal(crops[0], crops[1])
    assert val.source.image(0).size == (64, 64)
    assert val[Key(0, 0)][0].shape == (3, 64, 64)


def test_photos_serve_a_resolution_above_their_tiles(config):
    config = replace(config, name="photos", resolution=[512, 640])
    assert make_dataset(config, "val")[Key(0, 0)][0].shape == (3, 512, 640)


# timm


@pytest.mark.parametrize(
    "name, package", [("hfds/a/b", "datasets"), ("tfds/x", "tensorflow-datasets"), ("WDS/x", "webdataset")]
)
def test_a_missing_package_is_named(config, monkeypatch, name, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        make_dataset(replace(config, name=name), "train")


@pytest.mark.fault(29)
def test_torchvision_folders_are_read_by_timm(tmp_path, config):
    write_images(tmp_path / "train/a", 4)
    write_images(tmp_path / "train/b", 3, first=4)
    jpeg = saved(picture(0, 64, 64), "JPEG").getvalue()
    (tmp_path / "train/b/cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    config = replace(config, root=str(tmp_path))
    dataset = make_dataset(replace(config, name="torch/image_folder"), "train")
    batches = list(eval_batches(config, dataset))
    plain = joined(eval_batches(config, make_dataset(config, "train")))
    assert torch.equal(joined(batches)[0], plain[0])
    assert [name for batch in batches for name in batch.bad] == ["torch/image_folder/train[7]"]
    assert isinstance(fingerprint(dataset), str)


@pytest.mark.fault(29)
def test_a_bad_file_behind_a_timm_reader_is_not_replaced(tmp_path, config):
    import timm.data

    write_images(tmp_path, 3)
    (tmp_path / "001.png").write_bytes((tmp_path / "001.png").read_bytes()[:200])
    source = TimmImages(timm.data.ImageDataset(str(tmp_path)), "fake")
    (batch,) = eval_batches(config, ImageDataset(source, config))
    assert batch.positions.tolist() == [0, 2] and batch.bad == ["fake[1]"]


class FakeStream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def set_epoch(self, number):
        self.epoch = number

    def set_loader_cfg(self, num_workers):
        self.workers = num_workers

    def __iter__(self):
        return ((picture(number, 20, 30), 0) for number in range(self.count))


def test_a_stream_is_endless_in_training_and_ends_in_evaluation(config):
    stream = StreamDataset(FakeStream(5), "wds/fake", config)
    first, second = take(config, stream, 2, start=8)
    assert first.images.shape == (8, 3, 16, 24) and second.positions.tolist() == list(range(16, 24))
    assert stream.stream.epoch == 3
    images, positions = joined(eval_batches(config, stream))
    assert positions.tolist() == list(range(5))
    assert torch.equal(images[1], torch.from_numpy(np.array(crop_val(picture(1, 20, 30), (16, 24)))).permute(2, 0, 1))
    assert joined(eval_batches(config, stream, limit=4))[1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_gives_nothing_is_told(config, workers):
    config = replace(config, workers=workers)
    with pytest.raises(UserError, match="^data.name: wds/fake gives no images$"):
        take(config, StreamDataset(FakeStream(0), "wds/fake", config), 1)


class BrokenStream(FakeStream):
    error = OSError("the archive ends too early")

    def __iter__(self):
        yield from super().__iter__()
        raise self.error


@pytest.mark.fault(31)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_breaks_is_told_without_a_traceback(config, workers):
    config = replace(config, workers=workers, batch_size=2)
    batches = train_batches(config, StreamDataset(BrokenStream(5), "wds/fake", config), seed=0)
    assert [len(next(batches).images) for _ in range(2)] == [2, 2]
    with pytest.raises(DataError) as caught:
        next(batches)
    assert str(caught.value) == "images can no longer be read: OSError: the archive ends too early"


def test_a_lost_gpu_is_no_matter_of_images(config, monkeypatch):
    monkeypatch.setattr(BrokenStream, "error", RuntimeError("Caught RuntimeError in pin memory thread: CUDA error: lost"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        take(config, StreamDataset(BrokenStream(5), "wds/fake", config), 1)


def test_the_config_is_a_schema_of_omegaconf(root):
    schema = OmegaConf.structured(DataConfig)
    schema.merge_with_dotlist([f"data.root={root}"[5:], "resolution=[16, 16]", "resize=20"])
    config = OmegaConf.to_object(schema)
    assert config == DataConfig(root=str(root), resolution=[16, 16], resize=20)
    assert make_dataset(schema, "val")[Key(0, 0)][0].shape == (3, 16, 16)


# Whole runs


@bombs_warn
@pytest.mark.fault(29)
def test_a_run_names_and_counts_what_it_left_out(recipe, odd, tmp_path, capsys):
    (tmp_path / "val").unlink()
    write_images(tmp_path / "val", 5)
    for path in (tmp_path / "val/zero.png", tmp_path / "train" / os.fsdecode(b"no text \xff.png")):
        path.touch()
    result = run(recipe(VQ, f"data.root={tmp_path}", "data.batch_size=1", "epochs=1"), tmp_path / "run")
    left_out = [*odd_files()[1], r"no text \udcff.png"]
    assert sorted(result["run"]["files_left_out"]) == sorted(left_out)
    assert result["card"]["files_left_out"] == ["zero.png"] and result["metrics"]["images"] == 5
    said = capsys.readouterr().err
    assert all(said.count(f"{name} does not decode") == 1 for name in left_out)


@bombs_warn
@pytest.mark.fault(29)
def test_a_run_that_meets_too_many_bad_files_ends_with_their_names(recipe, odd, tmp_path):
    (tmp_path / "val").unlink()
    write_images(tmp_path / "val", 5)
    with pytest.raises(UserError, match=r"data.bad_files: \d+ of 39 files do not decode, but at most 5, "):
        Trainer(recipe(VQ, f"data.root={tmp_path}", "data.batch_size=13", "data.bad_files=5"), tmp_path / "run").run()


@pytest.mark.fault(31)
def test_a_run_whose_worker_is_killed_is_saved_and_goes_on(recipe, listeners, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "WATCH", 0.1)
    tiny = recipe(VQ, "data.workers=1", "epoch_steps=6")
    run(tiny, tmp_path / "whole")

    def kill(progress, **_):
        if progress.step == 1:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    listeners["refresh_codes"] = kill
    with pytest.raises(DataError, match="images can no longer be read: a worker process was ended by signal 9"):
        run(tiny, tmp_path / "run")
    (saved,) = (tmp_path / "run/checkpoints").glob("step_*")
    assert 2 <= int(saved.name.removeprefix("step_")) < 6
    listeners.clear()
    run(tiny, tmp_path / "run", resume="auto")
    assert not unequal(exported(tmp_path / "run"), exported(tmp_path / "whole"))
