"""Where images come from: files that lie in a folder or are downloaded, and scikit-learn's digits."""

import contextlib
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor

from common import artifacts, files, records
from common.errors import InputError, reason

SPLIT_SEED = 0  # which images are held out belongs to the data set: the same in every stage, seed and rerun


@dataclass(frozen=True)
class Source:
    """A data set as it lies on disk.

    Attributes
    ----------
    train, test : images and their labels (n,); images are a uint8 tensor (n, channels, height, width), or an array of
        paths of files to be read when they are needed
    classes : names, in the order of the labels
    natural : photographs: normalised by channel, cropped and mirrored at random when trained on
    fingerprint : identifies images that are not in memory
    """

    train: tuple[Tensor | np.ndarray, Tensor]
    test: tuple[Tensor | np.ndarray, Tensor]
    classes: list[str]
    natural: bool = False
    fingerprint: str = ""


def _idx_files(folder: Path, name: str, skip: bool) -> Source:
    """MNIST and its relatives, read (and downloaded, where possible) by torchvision."""
    raw = folder / name / "raw"
    names = "train-images-idx3-ubyte train-labels-idx1-ubyte t10k-images-idx3-ubyte t10k-labels-idx1-ubyte"
    train, test = _downloaded(folder, name, raw, f"put {names} (or their .gz) there")
    parts = ((part.data[:, None], part.targets) for part in (train, test))
    return Source(*parts, [str(digit) for digit in range(10)])


def _cifar10(folder: Path, name: str, skip: bool) -> Source:
    """CIFAR-10: torchvision's files, or cifar10/{train,test}/<class>/*, decoded once; else a download."""
    original, tree = folder / "cifar-10-batches-py", folder / "cifar10"
    if tree.is_dir() and not original.is_dir():
        return _small_images(tree, skip)
    train, test = _downloaded(folder, name, original, f"put it there, or image files into {tree}/{{train,test}}/CLASS/")
    parts = (
        (torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in (train, test)
    )
    return Source(*parts, train.classes, natural=True)


def _digits(folder: Path, name: str, skip: bool) -> Source:
    """scikit-learn's embedded 8x8 digits, enlarged to MNIST's 28x28; a fifth of them is the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    images = torch.nn.functional.interpolate(small, size=28, mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=SPLIT_SEED, stratify=labels)
    return Source((images[train], labels[train]), (images[test], labels[test]), [str(digit) for digit in range(10)])


def _imagenet(folder: Path, name: str, skip: bool) -> Source:
    """The standard folders train/<wnid>/ and val/<wnid>/, here or in imagenet/ below; `val` is the test set."""
    root = folder / "imagenet" if (folder / "imagenet").is_dir() else folder
    train, test = (_image_folder(root / part) for part in ("train", "val"))
    _same_classes(root, train.classes, test.classes)
    listing = "\n".join(str(Path(path).relative_to(root)) for path, _ in train.samples + test.samples)
    parts = ((np.array([path for path, _ in p.samples]), torch.tensor(p.targets)) for p in (train, test))
    return Source(*parts, train.classes, natural=True, fingerprint=hashlib.sha256(listing.encode()).hexdigest())


DATASETS = {
    "MNIST": _idx_files,
    "FashionMNIST": _idx_files,
    "CIFAR10": _cifar10,
    "ImageNet": _imagenet,
    "DIGITS": _digits,
}


def _downloaded(folder: Path, name: str, where: Path, remedy: str):
    """torchvision's training and test set; the files are downloaded if they are absent."""
    dataset = getattr(torchvision().datasets, name)
    new = files.absent(where)
    try:
        return [dataset(folder, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, ValueError) as error:
        files.remove_empty(new)  # one that holds part of a download stays
        raise InputError(
            f"`dataset` {name}: no usable files in {where} and no download ({reason(error)}); {remedy}, "
            "or name another `data_dir`"
        ) from error


def _image_folder(root: Path):
    """The images of one folder per class, as torchvision lists them."""
    try:
        return torchvision().datasets.ImageFolder(root)
    except OSError as error:
        raise InputError(
            f"{root} must hold one folder of images per class ({reason(error)}); see `data_dir`"
        ) from error


def _same_classes(root: Path, train: list[str], test: list[str]) -> None:
    if train != test:
        odd = sorted(set(train) ^ set(test))[0]
        raise InputError(f"{root}: the class folder {odd} is in one of the two splits only")


def _small_images(root: Path, skip: bool) -> Source:
    """Image files of one size below train/<class>/ and test/<class>/, decoded once and then kept as one array.

    The array, decoded.npy, has one row per image, its label and then its pixels; its record holds the checksum, and a
    hash of the names and sizes of the files it was made from: when these change, it is made anew.
    """
    parts = [_image_folder(root / part) for part in ("train", "test")]
    _same_classes(root, *(part.classes for part in parts))
    samples, border = [sample for part in parts for sample in part.samples], len(parts[0].samples)
    names = (f"{Path(path).relative_to(root)} {Path(path).stat().st_size}" for path, _ in samples)
    listing = hashlib.sha256("\n".join(names).encode()).hexdigest()
    cache = root / "decoded.npy"
    record = records.record_path(cache)
    known = records.read(record) if cache.is_file() and record.is_file() else {}
    if known.get("listing") == listing and "files" in known:  # without checksums the run that made it was killed
        rows = artifacts.load_array(cache, record, "remove it")
    else:
        decoded = [_row(path, label) for path, label in samples]
        errors = {k: row for k, row in enumerate(decoded) if isinstance(row, str)}
        rows = np.stack([row for row in decoded if not isinstance(row, str)] or [np.zeros(1, np.uint8)])
        border -= sum(k < border for k in errors)
        if errors:
            unreadable(errors, skip)
        else:
            with contextlib.suppress(OSError):  # a folder that cannot be written to costs the decoding every time
                records.save({cache: artifacts.array_bytes(rows)}, {"listing": listing})
    side = int((rows[0, 1:].size / 3) ** 0.5)
    images, labels = torch.from_numpy(rows[:, 1:]).reshape(-1, 3, side, side), torch.from_numpy(rows[:, 0]).long()
    return Source(
        (images[:border], labels[:border]), (images[border:], labels[border:]), parts[0].classes, natural=True
    )


def _row(path: str, label: int) -> np.ndarray | str:
    """A small image's label and pixels, or what is wrong with it."""
    try:
        pixels = read_image(path)
    except InputError as error:
        return str(error)
    if pixels.size != (32, 32):
        return f"{path} has {pixels.size[0]} x {pixels.size[1]} pixels; 32 x 32 are wanted"
    return np.concatenate([[np.uint8(label)], np.asarray(pixels).transpose(2, 0, 1).ravel()])


def unreadable(errors: dict[int, str], skip: bool) -> None:
    """Say which image files were left out, or refuse them."""
    if not skip:
        raise InputError(f"{next(iter(errors.values()))}; `skip_unreadable` leaves such files out")
    for error in errors.values():
        print(f"left out: {error}", file=sys.stderr)


def read_image(path: str) -> Image.Image:
    """An image file in RGB, decoded whole."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no readable image ({reason(error)}); replace it or remove it") from error


def torchvision():
    """Import torchvision, also beside a CPU-only torch.

    PyPI's Linux wheels of torchvision are linked against CUDA. Beside a CPU build of torch their compiled operators
    do not load and the import fails for want of two operator schemas. Declaring these is enough for everything
    this project uses (data sets, transforms, network definitions); where the two builds match, nothing is changed.
    """
    try:
        import torchvision.transforms.v2
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for partial in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[partial]
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", schema)
        import torchvision.transforms.v2
    return torchvision
