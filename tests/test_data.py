"""Data sets, splits and batches."""

import numpy as np
import pytest
import torch

from common.data import Split, load, sample_per_class
from common.errors import InputError

CPU = torch.device("cpu")


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
    with pytest.raises(InputError, match="--Val_size"):
        load("DIGITS", "unused", val_size=size, device=CPU)


def test_batches_show_every_row_once():
    split = Split(torch.arange(10, dtype=torch.uint8)[:, None, None, None] * 25, torch.arange(10))
    for batches in (split.batches(4), split.training_batches(4, seed=1)):
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
    with pytest.raises(InputError, match=r"--samples_per_class 650: class \d of the training split has 1\d\d images"):
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
