import io
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import IterableDataset

from vqzoo.data import (
    DataConfig,
    Folder,
    ImageDataset,
    Key,
    Photos,
    StreamDataset,
    TimmImages,
    crop_val,
    decode,
    eval_batches,
    fingerprint,
    load_image,
    make_dataset,
    to_images,
    train_batches,
)
from vqzoo.errors import UserError

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


@pytest.mark.parametrize("workers, processes, accumulate", [(2, 1, 1), (0, 2, 1), (0, 1, 4), (1, 2, 2)])
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


@pytest.mark.parametrize(
    "end, status, says",
    [
        ("raise SystemExit(7)", 7, ""),  # the batches were forgotten: their workers must not keep the program
        ("os.kill(active_children()[0].pid, 9)\nfor batch in batches: pass", 1, "RuntimeError: .*worker"),
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


def test_cmyk_jpeg_and_tiny_images_are_read(tmp_path):
    Image.new("CMYK", (40, 30), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "dot.png")
    Image.new("RGB", (1, 5000)).save(tmp_path / "line.png")
    red, green, blue = load_image(tmp_path / "cmyk.jpg", (8, 8))[:, 4, 4].tolist()
    assert red > 240 and green < 15 and blue < 15
    dot = torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None]
    assert torch.equal(load_image(tmp_path / "dot.png", (8, 8)), dot.expand(3, 8, 8))
    assert load_image(tmp_path / "line.png", (16, 24)).shape == (3, 16, 24)


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


# Files that do not decode


@pytest.fixture
def spoilt(tmp_path, monkeypatch):
    """Make a folder of 20 images and 6 files that are none, each for its own reason."""
    write_images(tmp_path / "train", 20)
    jpeg = saved(picture(0, 64, 64), "JPEG").getvalue()
    (tmp_path / "train/truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "train/zero.png").touch()
    (tmp_path / "train/text.jpg").write_text("no image")
    Image.new("L", (120, 100)).save(tmp_path / "train/bomb.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "train/float.tif")
    picture(0, 20, 20).save(tmp_path / "train/locked.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    opened = Image.open

    def refuse(file, *rest):  # chmod would not stop root
        if str(file).endswith("locked.png"):
            raise PermissionError(13, "Permission denied")
        return opened(file, *rest)

    monkeypatch.setattr(Image, "open", refuse)
    return DataConfig(root=str(tmp_path), resolution=[16, 16], batch_size=26, eval_batch_size=8, workers=0)


BAD = {f"{name}" for name in ("truncated.jpg", "zero.png", "text.jpg", "bomb.png", "float.tif", "locked.png")}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_training_replaces_bad_files_and_names_each_once(spoilt):
    dataset = make_dataset(spoilt, "train")
    first, second = take(spoilt, dataset, 2)
    assert len(first.images) == len(second.images) == 26
    assert set(first.bad) == BAD == set(dataset.bad) and second.bad == []
    assert "Permission denied" in dataset.bad["locked.png"] and "12000" not in dataset.bad["zero.png"]
    again = take(spoilt, make_dataset(spoilt, "train"), 1, start=26)[0]
    assert torch.equal(again.images, second.images)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_evaluation_leaves_bad_files_out_every_time(spoilt):
    spoilt = replace(spoilt, train="none", val="train")
    dataset = make_dataset(spoilt, "val")
    for _ in range(2):
        batches = list(eval_batches(spoilt, dataset))
        assert {name for batch in batches for name in batch.bad} == BAD
        assert joined(batches)[1].tolist() == [i for i in range(26) if dataset.name(i) not in BAD]
        assert all(len(batch.images) == len(batch.positions) for batch in batches)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_files_are_an_error(spoilt, workers):
    spoilt = replace(spoilt, bad_files=3, workers=workers)
    dataset = make_dataset(spoilt, "train")
    with pytest.raises(UserError, match=r"data.bad_files: [4-6] of 26 .* at most 3.*: .*(jpg|png|tif) \("):
        take(spoilt, dataset, 2)


def test_nothing_but_bad_files_is_an_error(tmp_path):
    (tmp_path / "train").mkdir()
    for name in "ab":
        (tmp_path / "train" / f"{name}.png").touch()
    config = DataConfig(root=str(tmp_path), batch_size=2, workers=0)
    with pytest.raises(UserError, match="2 of 2 files"):
        take(config, make_dataset(config, "train"), 1)


def test_load_image_names_the_file(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match="text.png: not an image"):
        load_image(tmp_path / "text.png", (8, 8))
    with pytest.raises(UserError, match="missing.png.*FileNotFoundError"):
        load_image(tmp_path / "missing.png", (8, 8))


# Folders


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


def test_flat_and_class_folders_hold_the_same_images(tmp_path, config):
    write_images(tmp_path / "flat", 4)
    write_images(tmp_path / "classes/x", 2)
    write_images(tmp_path / "classes/y z", 2, first=2)
    images = []
    for name in ("flat", "classes"):
        config = replace(config, root=str(tmp_path / name), train=".")
        images.append(joined(eval_batches(config, make_dataset(config, "train")))[0])
    assert len(images[0]) == 4 and torch.equal(*images)


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


def test_a_draft_of_what_others_decode_is_refused(config):
    with pytest.raises(UserError, match=r"data.draft: the images of data.name=photos are decoded elsewhere"):
        make_dataset(replace(config, name="photos", draft=True), "train")


def test_a_split_is_never_guessed(tmp_path, config):
    write_images(tmp_path / "train", 2)
    (tmp_path / "empty/class").mkdir(parents=True)
    with pytest.raises(UserError, match="data.val: no folder 'val'.*sub-folders: empty, train"):
        make_dataset(replace(config, root=str(tmp_path)), "val")
    with pytest.raises(UserError, match="data.val: no images below .*empty"):
        make_dataset(replace(config, root=str(tmp_path), val="empty"), "val")


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
    with pytest.raises(UserError, match="wds/fake gives no images"):
        take(config, StreamDataset(FakeStream(0), "wds/fake", config), 1)


def test_the_config_is_a_schema_of_omegaconf(root):
    schema = OmegaConf.structured(DataConfig)
    schema.merge_with_dotlist([f"data.root={root}"[5:], "resolution=[16, 16]", "resize=20"])
    config = OmegaConf.to_object(schema)
    assert config == DataConfig(root=str(root), resolution=[16, 16], resize=20)
    assert make_dataset(schema, "val")[Key(0, 0)][0].shape == (3, 16, 16)
