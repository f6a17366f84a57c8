"""Data sets, splits and batches."""

import itertools
import os
import pickle
import shutil

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import model_of
from PIL import Image

from common import parallel, records
from common.data import IMAGENET, Split, crop_and_flip, load, sample_per_class, shift_and_mirror
from common.datasets import DATASETS, Source, torchvision
from common.errors import InputError

CPU = torch.device("cpu")
PADDING = 4


@pytest.fixture(scope="module")
def digits():
    return load("DIGITS", "unused", val_size=200, device=CPU)


def test_digits_are_mnist_shaped(digits):
    assert digits.train.images.shape == (1237, 1, 28, 28)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.max() > 240
    assert (len(digits.val), len(digits.test), digits.classes) == (200, 360, 10)


def test_splits_are_disjoint_stratified_and_always_the_same(digits):
    def rows(split):
        return {image.numpy().tobytes() for image in split.images}

    assert not rows(digits.train) & rows(digits.val)
    assert not rows(digits.train) & rows(digits.test)
    assert torch.bincount(digits.val.labels).min() >= 19
    again = load("DIGITS", "unused", val_size=200, device=CPU)
    assert torch.equal(again.val.images, digits.val.images)
    assert again.fingerprint == digits.fingerprint


def test_holding_none_out_trains_on_all(digits):
    assert len(load("DIGITS", "unused", val_size=0, device=CPU).train) == 1437


@pytest.mark.parametrize("size", [3, 1430])
def test_impossible_validation_sizes_are_refused(size):
    with pytest.raises(InputError, match="`val_size`"):
        load("DIGITS", "unused", val_size=size, device=CPU)


def test_a_validation_size_that_leaves_a_class_without_images_is_refused(tmp_path, rng):
    for part, count in (("train", 60), ("test", 2)):
        for name, of_class in (("few", 2), ("many", count)):
            folder = tmp_path / "cifar10" / part / name
            folder.mkdir(parents=True)
            for k in range(of_class):
                Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    with pytest.raises(InputError, match="`val_size` 58: leaves no image of class 0 to train on"):
        load("CIFAR10", tmp_path, val_size=58, device=CPU)
    assert set(load("CIFAR10", tmp_path, val_size=20, device=CPU).train.labels.tolist()) == {0, 1}


def test_batches_show_every_row_once():
    split = Split(torch.arange(10, dtype=torch.uint8)[:, None, None, None] * 25, torch.arange(10))
    for batches in (split.batches(4), split.shuffled(4, seed=1)):
        seen = [(image, label) for images, labels, *_ in batches for image, label in zip(images, labels, strict=True)]
        assert sorted(int(label) for _, label in seen) == list(range(10))
        assert all(float(image) == pytest.approx(25 * int(label) / 255) for image, label in seen)
    assert [int(label) for _, label in seen] != list(range(10))


def test_sample_per_class_is_exact_without_replacement_and_mixed(digits):
    labels = digits.train.labels
    rows = sample_per_class(labels, 50, seed=3)
    assert len(set(rows.tolist())) == 500
    assert (np.bincount(labels[rows]) == 50).all()
    assert (np.bincount(labels[rows[:250]], minlength=10) > 10).all()
    assert torch.equal(rows, sample_per_class(labels, 50, seed=3))
    assert not torch.equal(rows, sample_per_class(labels, 50, seed=4))


def test_more_samples_than_there_are_name_the_class(digits):
    with pytest.raises(InputError, match=r"`samples_per_class` 650: class \d of the training split has 1\d\d images"):
        sample_per_class(digits.train.labels, 650, seed=0)


def write_idx(path, array):
    """An idx file, MNIST's format: two zero bytes, type, rank, big-endian sizes, values."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.tobytes())


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_mnist_files_are_read_through_torchvision(tmp_path, rng, name):
    images = {
        "train": rng.integers(0, 256, (40, 28, 28), np.uint8),
        "t10k": rng.integers(0, 256, (20, 28, 28), np.uint8),
    }
    for part, values in images.items():
        write_idx(tmp_path / name / "raw" / f"{part}-images-idx3-ubyte", values)
        write_idx(tmp_path / name / "raw" / f"{part}-labels-idx1-ubyte", (np.arange(len(values)) % 10).astype(np.uint8))
    data = load(name, tmp_path, val_size=10, device=CPU)
    assert (len(data.train), len(data.val), len(data.test)) == (30, 10, 20)
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(images["t10k"]))


def test_augmentation_is_torchvisions(rng):
    """Each image is cropped and mirrored as torchvision's functions do with the same numbers."""
    functional = torchvision().transforms.v2.functional
    images = torch.from_numpy(rng.integers(0, 256, (20, 3, 32, 32), np.uint8))
    down, right = (torch.from_numpy(rng.integers(0, 2 * PADDING + 1, 20)) for _ in range(2))
    mirrored = torch.from_numpy(rng.random(20) < 0.5)
    found = shift_and_mirror(images, down, right, mirrored, PADDING)
    for k in range(20):
        expected = functional.crop(functional.pad(images[k], [PADDING] * 4), int(down[k]), int(right[k]), 32, 32)
        assert torch.equal(found[k], functional.horizontal_flip(expected) if mirrored[k] else expected)


@pytest.mark.parametrize("images", [torch.rand(5, 1, 4, 4), torch.randint(0, 9, (5, 1, 4, 4))])
def test_images_of_another_scale_are_refused(images):
    """Numbers from 0 to 1 would be divided by 255, as those from 0 to 255 are."""
    with pytest.raises(InputError, match=f"the images of a split are of {images.dtype}; legal: torch.uint8"):
        Split(images, torch.arange(5))


def test_augmentation_of_another_scale_is_refused(photographs):
    """As torchvision's usual ToTensor and Normalize: their numbers would be scaled once more."""
    transforms = torchvision().transforms.v2
    files = load("ImageNet", photographs, val_size=0, device=CPU)
    kept = [transforms.CenterCrop(20), transforms.ToImage()]
    floats = [*kept, transforms.ToDtype(torch.float32, scale=True), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    images, *_ = next(files.train.shuffled(4, 0, kept))
    assert images.shape == (4, 3, 20, 20)
    split = Split(torch.zeros(5, 1, 4, 4, dtype=torch.uint8), torch.arange(5))
    for batches in (
        files.train.shuffled(4, 0, floats),
        split.shuffled(2, 0, lambda count, random, device: lambda images, rows: images / 255),
    ):
        with pytest.raises(InputError, match=r"augmentation gives torch\.float32; legal: torch\.uint8"):
            next(batches)


GREY, LABELS = torch.zeros(6, 1, 4, 4, dtype=torch.uint8), torch.arange(6) % 3
SOURCES = {  # what a function of one's own may return as its test set
    "floats": (GREY / 255, LABELS, r"images of a data set: a Tensor \(6, 1, 4, 4\) of torch.float32"),
    "array": (GREY.numpy(), LABELS, r"images of a data set: a ndarray \(6, 1, 4, 4\) of uint8"),
    "no channel": (GREY[:, 0], LABELS, r"images of a data set: a Tensor \(6, 4, 4\)"),
    "another size": (GREY[..., :2], LABELS, r"images of a data set: a Tensor \(6, 1, 4, 2\).*of one size"),
    "more images": (GREY, LABELS[:5], r"labels of a data set: a Tensor \(5,\).*int64 tensor \(6,\)"),
    "whole numbers": (GREY, LABELS.int(), r"labels of a data set: a Tensor \(6,\) of torch.int32"),
    "list": (GREY, LABELS.tolist(), r"labels of a data set: a list \(\) of objects"),
    "one-hot": (GREY, torch.eye(3)[LABELS].long(), r"labels of a data set: a Tensor \(6, 3\)"),
    "from 1": (GREY, LABELS + 1, "labels of a data set: from 1 to 3; legal: 0 to 2, by its classes"),
    "negative": (GREY, LABELS - 100, "labels of a data set: from -100 to -98"),
}


@pytest.mark.parametrize("what", SOURCES)
def test_data_sets_of_another_form_are_refused(what):
    images, labels, message = SOURCES[what]
    with pytest.raises(InputError, match=message):
        Source((GREY, LABELS), (images, labels), ["a", "b", "c"])


def test_what_a_data_set_s_function_returns_is_named(monkeypatch):
    monkeypatch.setitem(DATASETS, "PAIRS", lambda folder, name, skip: (GREY, LABELS))
    with pytest.raises(InputError, match="`dataset` PAIRS: its function returns a tuple; legal: a Source"):
        load("PAIRS", ".", val_size=0, device=torch.device("cpu"))


def test_augmentation_is_drawn_uniformly():
    """A single bright pixel shows where each image went: all 81 shifts, mirrored or not, equally often."""
    images = torch.zeros(16200, 1, 16, 16, dtype=torch.uint8)
    images[:, :, 6, 5] = 255
    split = Split(images, torch.arange(len(images)))
    (batch, labels, _), *_ = split.shuffled(len(images), seed=3, augment=crop_and_flip(PADDING))
    rows, cols = np.unravel_index(batch.flatten(1).argmax(1).numpy(), (16, 16))
    counts = np.zeros((16, 16))
    np.add.at(counts, (rows, cols), 1)
    expected = np.zeros((16, 16))
    for shift in range(-PADDING, PADDING + 1):
        expected[2:11, 5 + shift] += 1
        expected[2:11, 10 + shift] += 1
    expected *= len(images) / expected.sum()
    assert (counts[expected == 0] == 0).all()
    assert scipy.stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 0.001
    assert not torch.equal(labels, torch.arange(len(images)))


def test_training_batches_depend_on_the_seed_alone():
    split = Split(torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8), torch.arange(50))

    def batches(seed):
        return torch.cat([images for images, *_ in split.shuffled(16, seed, crop_and_flip())])

    assert torch.equal(batches(1), batches(1))
    assert not torch.equal(batches(1), batches(2))
    assert len(batches(1)) == 50
    assert len(torch.cat([labels for _, labels, _ in split[torch.arange(33)].shuffled(16, 0)])) == 32


def test_processes_share_every_batch(monkeypatch):
    """Together they see what one sees, in the same order within a batch."""
    split = Split(torch.arange(41, dtype=torch.uint8)[:, None, None, None], torch.arange(41))
    whole = [labels for _, labels, _ in split.shuffled(8, 5)]
    parts = []
    for rank in (0, 1, 2):
        monkeypatch.setattr(parallel, "size", lambda: 3)
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        parts.append([labels for _, labels, _ in split.shuffled(8, 5)])
    for batch, *shares in zip(whole, *parts, strict=False):
        assert torch.equal(batch, torch.cat(shares))
    assert [len(part) for part in parts] == [5, 5, 5]  # the last batch, one image, is left out


def test_cifar_tree_is_decoded_once(photographs, tmp_path, monkeypatch):
    """And again when a file changes; a damaged cache is refused."""
    shutil.copytree(photographs / "cifar10", tmp_path / "cifar10")
    (tmp_path / "cifar10" / "decoded.npy").unlink(missing_ok=True)
    data = load("CIFAR10", tmp_path, val_size=8, device=CPU)
    assert (len(data.train), len(data.val), len(data.test), data.classes) == (40, 8, 20, 2)
    with Image.open(tmp_path / "cifar10/test/flower/3.jpg") as image:
        assert torch.equal(data.test.images[13], torch.from_numpy(np.array(image)).permute(2, 0, 1))
    monkeypatch.setattr("common.datasets.read_image", None)
    assert load("CIFAR10", tmp_path, val_size=8, device=CPU).fingerprint == data.fingerprint
    monkeypatch.undo()
    cache = tmp_path / "cifar10" / "decoded.npy"
    cache.write_bytes(cache.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"decoded.npy is damaged.*remove it"):
        load("CIFAR10", tmp_path, val_size=8, device=CPU)
    record = records.read(records.record_path(cache))
    records.write(records.record_path(cache), {"listing": record["listing"], "status": "running"})
    again = load("CIFAR10", tmp_path, val_size=8, device=CPU)  # as if the run that decodes had been killed
    assert again.fingerprint == data.fingerprint
    changed = tmp_path / "cifar10/train/china/1.jpg"
    there = changed.stat()
    changed.write_bytes(changed.read_bytes()[:-2] + b"\xff\xd9")  # of the same size, and as old
    os.utime(changed, ns=(there.st_atime_ns, there.st_mtime_ns))
    monkeypatch.setattr("common.datasets.read_image", lambda _: Image.new("RGB", (32, 32)))
    assert not load("CIFAR10", tmp_path, val_size=0, device=CPU).train.images.any()
    monkeypatch.undo()
    (tmp_path / "cifar10/train/china/0.jpg").unlink()
    assert len(load("CIFAR10", tmp_path, val_size=8, device=CPU).train) == 39


def test_photographs_are_normalised_by_the_training_split(photographs):
    data = load("CIFAR10", photographs, val_size=8, device=CPU)
    images = torch.cat([images for images, _ in data.train.batches(7)]).double()
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3).double(), atol=1e-4, rtol=0)
    assert torch.equal(data.test.mean, data.train.mean)
    assert data.describe()["mean"] == pytest.approx(data.train.images.double().mean((0, 2, 3)) / 255)


def test_original_cifar_files_are_read_through_torchvision(tmp_path, rng, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = rng.integers(0, 256, (6, 20, 3072), np.uint8)
    for name, rows in zip([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"], pixels, strict=True):
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [k % 10 for k in range(20)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(torchvision().datasets.cifar, "check_integrity", lambda *_: True)  # these are not the real ones
    data = load("CIFAR10", tmp_path, val_size=0, device=CPU, classes=["b", "d"])
    assert (len(data.train), len(data.test), data.classes) == (20, 4, 10)
    assert data.test.labels.tolist() == [1, 3, 1, 3]
    assert torch.equal(data.test.images[1].flatten(), torch.from_numpy(pixels[5, 3]))


def test_imagenet_folders(photographs, tmp_path):
    """Images are read as needed, the same whatever the number of workers."""
    first, second = (load("ImageNet", photographs, val_size=4, device=CPU, workers=w) for w in (0, 2))
    assert (len(first.train), len(first.val), len(first.test), first.classes) == (8, 4, 8, 2)
    for a, b in zip(
        *(data.train.shuffled(4, 7, model_of("resnet50").augment()) for data in (first, second)), strict=True
    ):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    images, labels = next(first.test.batches(5))
    assert images.shape == (5, 3, 224, 224)
    transforms = torchvision().transforms
    usual = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(*IMAGENET)]
    )
    with Image.open(photographs / "imagenet/val/china/2.jpg") as image:
        torch.testing.assert_close(images[2], usual(image), rtol=1e-4, atol=1e-4)
    assert labels.tolist() == [0, 0, 0, 0, 1]
    chosen = load("ImageNet", photographs, val_size=0, device=CPU, classes=["flower"])
    assert chosen.train.labels.unique().tolist() == [1]
    assert sample_per_class(chosen.train.labels, 3, seed=0).shape == (3,)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *itertools.product(["CIFAR10", "ImageNet"], ["no image", "cut off", "missing class"]),
        ("CIFAR10", "wrong size"),  # ImageNet's images have any size
    ],
)
def test_damaged_image_folders_are_named(photographs, tmp_path, name, damage):
    tree, other = {"CIFAR10": ("cifar10", "test"), "ImageNet": ("imagenet", "val")}[name]
    shutil.copytree(photographs / tree, tmp_path / tree, ignore=shutil.ignore_patterns("decoded.*"))
    victim = tmp_path / tree / "train" / "china" / "1.jpg"
    if damage == "no image":
        victim.write_bytes(b"no image")
    elif damage == "cut off":
        victim.write_bytes(victim.read_bytes()[:200])
    elif damage == "missing class":
        shutil.rmtree(tmp_path / tree / "train" / "flower")
    else:
        Image.new("RGB", (32, 31)).save(victim)
    expected = rf"{other}: the class folder flower is not in" if damage == "missing class" else r"1\.jpg"
    with pytest.raises(InputError, match=expected):
        list(load(name, tmp_path, val_size=0, device=CPU).train.batches(4))
