"""Where images come from: files that lie in a folder or are downloaded, and scikit-learn's digits."""

import contextlib
import hashlib
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from common import artifacts, files, records
from common.errors import InputError, reason

SPLIT_SEED = 0  # which images are held out belongs to the data set: the same in every stage, seed and rerun
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # of image files: torchvision's
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # what such a file may hold; none runs other programs
SAMPLED = 1000  # files whose contents are in the fingerprint of a data set too large to be read whole
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what is wrong with a file is in the error that it raises


@dataclass(frozen=True)
class Source:
    """A data set as it lies on disk.

    Images are a uint8 tensor (n, channels, height, width), or an array of paths of files to be read when needed.
    """

    train: tuple[Tensor | np.ndarray, Tensor]  # images and their labels (n,)
    test: tuple[Tensor | np.ndarray, Tensor]
    classes: list[str]  # names, in the order of the labels
    natural: bool = False  # photographs: normalised by channel
    fingerprint: str = ""  # identifies images that are not in memory

    def __post_init__(self) -> None:
        """Refuse what a function of one's own may return."""
        for images, labels in (self.train, self.test):
            paths = isinstance(images, np.ndarray) and images.ndim == 1
            pixels = isinstance(images, Tensor) and images.ndim == 4 and images.dtype == torch.uint8
            if not (paths or (pixels and images.shape[1:] == self.train[0].shape[1:])):
                legal = "a uint8 tensor (n, channels, height, width), of one size, or an array of paths"
                raise InputError(f"images of a data set: {_kind(images)}; legal: {legal}")
            if not (isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.shape == (len(images),)):
                raise InputError(f"labels of a data set: {_kind(labels)}; legal: an int64 tensor ({len(images)},)")
            if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classes):
                span = f"from {labels.min()} to {labels.max()}"
                raise InputError(f"labels of a data set: {span}; legal: 0 to {len(self.classes) - 1}, by its classes")


def _kind(value) -> str:
    return f"a {type(value).__name__} {tuple(getattr(value, 'shape', ()))} of {getattr(value, 'dtype', 'objects')}"


def _mnist(folder: Path, name: str, skip: bool) -> Source:
    """MNIST and its relatives; torchvision downloads and unpacks what is absent."""
    raw = folder / name / "raw"
    paths = [raw / f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    if not all(path.is_file() for path in paths):
        _downloaded(folder, name, raw, f"put {' '.join(path.name for path in paths)} (or their .gz) there")
    train, test = ((_idx(images, 28, 28)[:, None], _idx(labels).long()) for images, labels in (paths[:2], paths[2:]))
    _check(paths[1], *train)
    _check(paths[3], *test)
    if len(test[0]) > len(train[0]):
        raise InputError(f"{paths[2]}: {len(test[0]):,} images, and {len(train[0]):,} to train on: they are swapped")
    return Source(train, test, [str(digit) for digit in range(10)])


def _idx(path: Path, *shape: int) -> Tensor:
    """Bytes in MNIST's format: two zeros, the type 8, the rank, the sizes in four bytes each, the values."""
    try:
        content, rank = path.read_bytes(), 1 + len(shape)
        if content[:2] == b"\x1f\x8b":
            raise ValueError("it is packed by gzip: unpack it")
        if content[:4] != bytes([0, 0, 8, rank]):
            raise ValueError(f"it has not {rank} dimensions of bytes")
        sizes = np.frombuffer(content, ">u4", rank, 4).tolist()
        if sizes[1:] != list(shape):
            raise ValueError(f"its images are {sizes[1:]}, not {list(shape)}")
        return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * rank).reshape(sizes)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is no usable idx file ({reason(error)}); replace it") from error


def _check(path: Path, images: Tensor, labels: Tensor) -> None:
    """Refuse images and labels that do not belong together."""
    if len(labels) != len(images):
        raise InputError(f"{path}: {len(labels):,} labels for {len(images):,} images; replace the wrong ones")
    if not 0 <= labels.min() <= labels.max() <= 9:
        raise InputError(f"{path}: labels from {labels.min()} to {labels.max()}; legal: 0 to 9")


def _cifar10(folder: Path, name: str, skip: bool) -> Source:
    """CIFAR-10: torchvision's files, or cifar10/{train,test}/<class>/*, decoded once; else a download."""
    original, tree = folder / "cifar-10-batches-py", folder / "cifar10"
    if tree.is_dir() and not original.is_dir():
        return _small_images(tree, skip)
    train, test = _downloaded(folder, name, original, f"put it there, or image files into {tree}/{{train,test}}/CLASS/")
    parts = []
    for part in (train, test):
        parts.append((torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)))
        _check(original, *parts[-1])
    return Source(*parts, train.classes, natural=True)


def _digits(folder: Path, name: str, skip: bool) -> Source:
    """scikit-learn's embedded 8x8 digits, enlarged to MNIST's 28x28; a fifth of them is the test set."""
    pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    small = pixels.float().reshape(-1, 1, 8, 8) * (255 / 16)
    images = torch.nn.functional.interpolate(small, size=28, mode="bilinear").round().to(torch.uint8)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=SPLIT_SEED, stratify=labels)
    return Source((images[train], labels[train]), (images[test], labels[test]), [str(digit) for digit in range(10)])


def _imagenet(folder: Path, name: str, skip: bool) -> Source:
    """The standard folders train/<wnid>/ and val/<wnid>/, here or in imagenet/ below; `val` is the test set.

    Its fingerprint is of all names and sizes and some contents: reading all takes hours, times are not those of a copy.
    """
    root = folder / "imagenet" if (folder / "imagenet").is_dir() else folder
    classes, *parts = _tree(root, "val")
    paths = [path for part in parts for path in part[0]]
    digest = _listing(root, paths, "st_size")
    for path in paths[:: -(-len(paths) // SAMPLED)]:
        with contextlib.suppress(OSError):
            if Path(path).is_file():  # a pipe would keep its reader waiting
                with Path(path).open("rb") as file:
                    digest.update(file.read(2**20))
    parts = ((np.array(files), labels) for files, labels in parts)
    return Source(*parts, classes, natural=True, fingerprint=digest.hexdigest())


DATASETS = {"MNIST": _mnist, "FashionMNIST": _mnist, "CIFAR10": _cifar10, "ImageNet": _imagenet, "DIGITS": _digits}


def _downloaded(folder: Path, name: str, where: Path, remedy: str):
    """torchvision's training and test set; the files are downloaded if they are absent."""
    dataset = getattr(torchvision().datasets, name)
    new = files.absent(where)
    try:
        return [dataset(folder, train=train, download=True) for train in (True, False)]
    except Exception as error:  # torchvision raises whatever a damaged file leads it to
        files.remove_empty(new)  # one that holds part of a download stays
        what = f"`dataset` {name}: no usable files in {where} and no download ({reason(error)})"
        raise InputError(f"{what}; {remedy}, or name another `data_dir`") from error


def _tree(root: Path, test: str) -> tuple[list[str], tuple[list[str], Tensor], tuple[list[str], Tensor]]:
    """The classes, which are the folders in train/, and both splits' files and labels; `test` may lack classes."""
    try:
        classes, tested = (
            sorted(path.name for path in (root / part).iterdir() if path.is_dir() and path.name[0] != ".")
            for part in ("train", test)
        )
    except OSError as error:
        what = f"{root}: train/ and {test}/ must hold one folder of images per class"
        raise InputError(f"{what} ({reason(error)}); see `data_dir`") from error
    odd = [name for name in tested if name not in classes]
    if odd or not tested:
        what = f"the class folder {shown(odd[0])} is not in {root / 'train'}" if odd else "it has no class folders"
        raise InputError(f"{root / test}: {what}")
    splits = []
    for part, names in (("train", classes), (test, tested)):
        found = {classes.index(name): _images_below(root / part / name) for name in names}
        labels = torch.tensor([label for label, paths in found.items() for _ in paths])
        splits.append(([path for paths in found.values() for path in paths], labels))
    return classes, *splits


def _images_below(folder: Path) -> list[str]:
    """The image files of a class, at any depth, in the order in which torchvision has them; hidden ones are none."""
    walked, errors, seen = [], [], {os.path.realpath(folder.parent), os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=errors.append):
        within = {os.path.realpath(f"{parent}/{name}"): name for name in folders if name[0] != "."}
        folders[:] = [name for real, name in within.items() if real not in seen]  # links may lead back
        seen |= within.keys()
        walked.append((parent, sorted(n for n in names if n[0] != "." and n.lower().endswith(SUFFIXES))))
    found = [f"{parent}/{name}" for parent, names in sorted(walked) for name in names]
    if errors or not found:
        raise InputError(f"{shown(folder)}: {reason(errors[0]) if errors else 'no image files'}; see `data_dir`")
    return found


def _listing(root: Path, paths: list[str], *fields: str):
    """SHA-256, to be continued, of files' names below the root and of these fields of their status."""

    def line(path: str) -> bytes:
        status = None  # of a link to nowhere
        with contextlib.suppress(OSError):
            status = os.stat(path)  # noqa: PTH116, a Path would take longer than the call
        return os.fsencode(f"{path.removeprefix(str(root))} {[getattr(status, field, None) for field in fields]}")

    return hashlib.sha256(b"\0".join(map(line, paths)))


def _small_images(root: Path, skip: bool) -> Source:
    """Image files of 32 x 32 pixels below train/<class>/ and test/<class>/, decoded once and then kept as one array.

    The record of decoded.npy holds its checksum and a hash of the files' names, sizes and times of change of status,
    which no program can set back: when these differ, it is made anew. To read all files at every start takes longer.
    """
    classes, (train, train_labels), (test, test_labels) = _tree(root, "test")
    paths, labels, border = train + test, torch.cat([train_labels, test_labels]), len(train)
    listing = _listing(root, paths, "st_size", "st_ctime_ns").hexdigest()
    cache = root / "decoded.npy"
    record = records.record_path(cache)
    known = records.read(record) if cache.is_file() and record.is_file() else {}
    if known.get("listing") == listing and "files" in known:  # without checksums the run that made it was killed
        pixels = artifacts.load_array(cache, record, "remove it")
    else:
        decoded = [_pixels(path) for path in paths]
        errors = {k: image for k, image in enumerate(decoded) if isinstance(image, str)}
        read = [k for k in range(len(paths)) if k not in errors]
        pixels = np.array([decoded[k] for k in read], np.uint8).reshape(-1, 3, 32, 32)
        labels, border = labels[read], sum(k < border for k in read)
        unreadable(errors, skip)
        if lacking := set(range(len(classes))) - set(labels[:border].tolist()):
            raise InputError(f"{shown(root / 'train' / classes[min(lacking)])}: no image file can be read")
        if not errors:
            with contextlib.suppress(OSError):  # a folder that cannot be written to costs the decoding every time
                records.save({cache: artifacts.array_bytes(pixels)}, {"listing": listing})
    images = torch.from_numpy(pixels)
    return Source((images[:border], labels[:border]), (images[border:], labels[border:]), classes, natural=True)


def _pixels(path: str) -> np.ndarray | str:
    """A small image (3, 32, 32), or what is wrong with it."""
    try:
        image = read_image(path)
    except InputError as error:
        return str(error)
    if image.size != (32, 32):
        return f"{shown(path)} has {image.size[0]} x {image.size[1]} pixels; 32 x 32 are wanted"
    return np.asarray(image).transpose(2, 0, 1)


def unreadable(errors: dict[int, str], skip: bool) -> None:
    """Say which image files were left out, or refuse them."""
    for error in errors.values():
        if not skip:
            raise InputError(f"{error}; `skip_unreadable` leaves such files out")
        print(f"left out: {error}", file=sys.stderr)


def read_image(path: str) -> Image.Image:
    """An image file's first frame in RGB; alpha is dropped and EXIF's orientation not applied, as torchvision does."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("it is no file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow thinks of metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(str(path), formats=FORMATS) as image:
                return _eight_bits(image).convert("RGB")
    except Exception as error:  # Pillow raises whatever a damaged file leads it to
        raise InputError(f"{shown(path)} is no readable image ({reason(error)}); replace it or remove it") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of more bits by their upper 8, as Pillow itself does with colours; others as they are."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF: 258 is the number of bits, 262 is 0 where 0 means white
    if image.mode == "F" or (image.mode == "I" and tags) or (image.mode[0] == "I" and tags.get(262) == 0):
        raise ValueError(f"mode {image.mode}: which values are black and white is not known; save it with 8 bits")
    if image.mode[0] != "I":
        return image
    return Image.fromarray((np.asarray(image) >> tags.get(258, (16,))[0] - 8).astype(np.uint8))


def shown(path) -> str:
    """A file's name in one line, whatever is in it."""
    return str(path) if str(path).isprintable() else ascii(str(path))


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
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", schema)
        import torchvision.transforms.v2
    return torchvision
