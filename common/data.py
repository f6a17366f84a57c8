"""Data sets as whole tensors on the device: loaded once, split once, batched without per-image Python work."""

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from common.errors import InputError, reason

SPLIT_SEED = 0  # the validation images belong to the data set: the same in every stage, seed and rerun


@dataclass(frozen=True)
class Split:
    """Images (n, channels, height, width) uint8 and labels (n,) int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> "Split":
        return Split(self.images[rows], self.labels[rows])

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """A data set in three disjoint splits; `fingerprint` identifies the bytes of the images and labels."""

    name: str
    train: Split
    val: Split
    test: Split
    classes: int
    fingerprint: str

    def describe(self) -> dict:
        """What a record says of it."""
        return {"name": self.name, "sha256": self.fingerprint, "train": len(self.train), "val": len(self.val)}


def batches(split: Split, batch_size: int, shuffle: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images in [0, 1] as float32, labels) until every row was seen once, in the generator's order if given."""
    order = None if shuffle is None else torch.randperm(len(split), generator=shuffle).to(split.labels.device)
    for start in range(0, len(split), batch_size):
        rows = slice(start, start + batch_size) if order is None else order[start : start + batch_size]
        yield split.images[rows].float().div_(255), split.labels[rows]


def sample_per_class(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices of `count` rows of every class, drawn without replacement.

    Parameters
    ----------
    labels : (n,) integer tensor
    count : rows per class
    seed : the same seed draws the same rows

    Returns
    -------
    (count * classes,) int64 tensor in random order, so that any cut of it is a mixed sample.

    Raises
    ------
    InputError
        If a class has fewer rows than asked.
    """
    rng = np.random.default_rng(seed)
    values = labels.cpu().numpy()
    sizes = np.bincount(values)
    if count > sizes.min():
        raise InputError(
            f"--samples_per_class {count}: class {sizes.argmin()} of the training split has {sizes.min()} images; "
            f"legal: 1 to {sizes.min()}"
        )
    rows = [rng.choice(np.flatnonzero(values == c), count, replace=False) for c in range(len(sizes))]
    return torch.from_numpy(rng.permutation(np.concatenate(rows)))


def load(name: str, folder: Path, *, val_size: int, device: torch.device) -> Data:
    """Load a data set and hold `val_size` images of its training set out for validation.

    Parameters
    ----------
    name : a key of `DATASETS`
    folder : where downloaded files lie or go
    val_size : images held out, stratified by class; 0 holds none out
    device : where all tensors live

    Raises
    ------
    InputError
        If files are missing and cannot be downloaded, or `val_size` leaves no training or too few validation images.
    """
    (train_x, train_y), (test_x, test_y) = DATASETS[name](Path(folder), name)
    digest = hashlib.sha256()
    for tensor in (train_x, train_y, test_x, test_y):
        digest.update(tensor.contiguous().numpy())
    classes = int(train_y.max()) + 1
    train_rows, val_rows = _hold_out(train_y.numpy(), val_size, classes)
    whole, test = Split(train_x, train_y).to(device), Split(test_x, test_y).to(device)
    return Data(name, whole[train_rows], whole[val_rows], test, classes, digest.hexdigest())


def _hold_out(labels: np.ndarray, val_size: int, classes: int) -> tuple[Tensor, Tensor]:
    rows = np.arange(len(labels))
    if val_size == 0:
        return torch.from_numpy(rows), torch.empty(0, dtype=torch.int64)
    if not classes <= val_size <= len(labels) - classes:
        raise InputError(f"--Val_size {val_size}: legal: 0, or {classes} to {len(labels) - classes}")
    train, val = train_test_split(rows, test_size=val_size, random_state=SPLIT_SEED, stratify=labels)
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(val))


def _idx_files(folder: Path, name: str):
    """MNIST and its relatives, read (and downloaded, where possible) by torchvision."""
    dataset, raw = getattr(torchvision().datasets, name), folder / name / "raw"
    new = [path for path in (raw, *raw.parents) if not path.exists()]
    try:
        train, test = (dataset(folder, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError, ValueError) as error:
        with contextlib.suppress(OSError):  # leave no empty folders; one that holds part of a download stays
            for path in new:
                path.rmdir()
        files = "train-images-idx3-ubyte train-labels-idx1-ubyte t10k-images-idx3-ubyte t10k-labels-idx1-ubyte"
        raise InputError(
            f"--Dataset {name}: no usable files in {raw} and no download "
            f"({reason(error)}); put {files} (or their .gz) there, or name another --Data_dir"
        ) from error
    return (train.data[:, None], train.targets), (test.data[:, None], test.targets)


def _digits(folder: Path, name: str):
    """scikit-learn's embedded 8x8 digits, enlarged to MNIST's 28x28; a fifth of them is the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    images = torch.nn.functional.interpolate(small, size=28, mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=SPLIT_SEED, stratify=labels)
    return (images[train], labels[train]), (images[test], labels[test])


DATASETS = {"MNIST": _idx_files, "FashionMNIST": _idx_files, "DIGITS": _digits}


def torchvision():
    """Import torchvision, also beside a CPU-only torch.

    PyPI's Linux wheels of torchvision are linked against CUDA. Beside a CPU build of torch their compiled operators
    do not load and the import fails for want of two operator schemas. Declaring these is enough for everything
    this project uses (data sets, transforms, network definitions); where the two builds match, nothing is changed.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for partial in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[partial]
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", schema)
        import torchvision
    return torchvision
