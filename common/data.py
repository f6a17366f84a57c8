"""Data sets as splits that give batches on the device: small images lie there whole, large ones are read as needed."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor

from common import parallel
from common.datasets import DATASETS, SPLIT_SEED, Source, read_image, shown, torchvision, unreadable
from common.errors import InputError

CROP, RESIZED = 224, 256  # of large photographs
THIN = 32  # times as long as wide
# Called once an epoch with (number of images, generator of random numbers, device), it returns a function of a batch's
# (uint8 images, their rows) that changes them.
Augmentation = Callable[[int, torch.Generator, torch.device], Callable[[Tensor, Tensor], Tensor]]
Batches = Iterator[tuple[Tensor, Tensor, int]]  # images, labels, number of images over all processes
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation by channel, as is customary
EVALUATED_PIXELS = {"cpu": 2**18, "cuda": 2**20}  # in one batch of an evaluation; a CPU's maps stay near its cache


@dataclass(frozen=True)
class Split:
    """Images and their labels, on one device."""

    images: Tensor  # (n, channels, height, width) uint8
    labels: Tensor  # (n,) int64
    mean: Tensor | None = None  # (channels, 1, 1) of images in [0, 1], to normalise by; None: batches are in [0, 1]
    std: Tensor | None = None

    def __post_init__(self) -> None:
        if getattr(self.images, "dtype", torch.uint8) != torch.uint8:  # would be divided by 255 all the same
            raise InputError(f"the images of a split are of {self.images.dtype}; legal: torch.uint8, from 0 to 255")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> "Split":
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def batches(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (float32 images, labels) of every row once, in order; of several processes each gets its part."""
        most = EVALUATED_PIXELS[self.labels.device.type] // self.images[0, 0].numel()
        size = batch_size or max(2 * parallel.size(), most)  # batch norm has no variance of one
        for rows in torch.arange(len(self), device=self.labels.device).split(size):
            rows = parallel.shard(rows)
            yield self._floats(self.images[rows]), self.labels[rows]

    def shuffled(self, batch_size: int, seed: int, augment: Augmentation | None = None) -> Batches:
        """Yield (float32 images, labels, rows of the batch over all processes); `seed` fixes order and augmentation."""
        if isinstance(augment, (list, tuple)):
            raise InputError("these images lie in memory: augment them by a function, such as crop_and_flip()")
        random, device = torch.Generator().manual_seed(seed), self.labels.device
        order = torch.randperm(len(self), generator=random).to(device)
        change = augment(len(self), random, device) if augment else lambda images, rows: images
        for batch in _to_train_on(order, batch_size):
            rows = parallel.shard(batch)
            yield self._floats(change(self.images[rows], rows)), self.labels[rows], len(batch)

    def steps(self, batch_size: int) -> int:
        """Number of batches in an epoch of training."""
        return len(_to_train_on(torch.arange(len(self)), batch_size))

    def _floats(self, images: Tensor) -> Tensor:
        images = _scaled(images)
        return images if self.mean is None else images.sub_(self.mean).div_(self.std)


@dataclass(frozen=True)
class FileSplit:
    """Image files and their labels; worker processes decode ahead of the training."""

    paths: np.ndarray  # (n,)
    labels: Tensor  # (n,) int64, on the device
    workers: int
    skip: bool = False  # leave files that cannot be read out of their batches, where they are otherwise an InputError

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> "FileSplit":
        return replace(self, paths=self.paths[rows.cpu().numpy()], labels=self.labels[rows])

    def batches(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Split.batches`: the short side scaled to 256, the middle 224 x 224."""
        transforms = torchvision().transforms.v2
        batches = torch.arange(len(self)).split(batch_size or EVALUATED_PIXELS[self.labels.device.type] // CROP**2)
        for images, labels, _ in self._read(batches, [middle, transforms.Resize(RESIZED), transforms.CenterCrop(CROP)]):
            yield images, labels

    def shuffled(self, batch_size: int, seed: int, augment: list) -> Batches:
        """As `Split.shuffled`; the images are changed by a list of torchvision's transforms to one size."""
        if not isinstance(augment, (list, tuple)):
            raise InputError("these images are read from files: augment them by a list of torchvision's transforms")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        yield from self._read(_to_train_on(order, batch_size), augment, seed)

    steps = Split.steps

    def _read(self, batches, steps, seed: int | None = None) -> Batches:
        """As `shuffled`, which has a seed; leaves out what cannot be read, and batches of which too little can."""
        device, seen = self.labels.device, 0
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in IMAGENET)
        transforms, parts = torchvision().transforms.v2, [parallel.shard(batch) for batch in batches]
        loader = torch.utils.data.DataLoader(
            _Decoded(self.paths, transforms.Compose([*steps, transforms.PILToTensor()]), seed),
            batch_sampler=[part.tolist() for part in parts],
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
        )
        for batch, rows, (images, errors) in zip(batches, parts, loader, strict=True):
            together = len(batch)
            unreadable(errors, self.skip)
            rows = rows[[k for k in range(len(rows)) if k not in errors]]
            if self.skip:  # all processes leave out the same batches, so that none waits for another
                enough = seed is None or len(rows) >= min(2, together // parallel.size())
                together, able = map(int, parallel.total(*torch.tensor([len(rows), enough], device=device)))
                together *= able == parallel.size()
            seen += together
            if together:
                images = _scaled(images.to(device, non_blocking=True)).sub_(mean).div_(std)
                yield images, self.labels[rows.to(device)], together
        if not seen:
            raise InputError(f"no batch of {len(self)} images has enough that can be read; see `data_dir`")


class _Decoded(torch.utils.data.Dataset):
    """Decoded and transformed images; what is random in one depends on the seed and its row, not on the worker."""

    def __init__(self, paths: np.ndarray, transform, seed: int | None) -> None:
        self.paths, self.transform, self.seed = paths, transform, seed

    def __getitem__(self, row: int) -> Tensor | str:
        try:
            image = read_image(self.paths[row])
        except InputError as error:
            return str(error)
        with torch.random.fork_rng(devices=[]):
            if self.seed is not None:
                torch.manual_seed(derived_seed(self.seed, row))
            return self.transform(image)


def _collate(images: list[Tensor | str]) -> tuple[Tensor, dict[int, str]]:
    """The images that could be read, and by place in the batch what is wrong with the others."""
    errors = {k: image for k, image in enumerate(images) if isinstance(image, str)}
    read = [image for image in images if not isinstance(image, str)]
    return torch.stack(read) if read else torch.empty(0, 3, CROP, CROP, dtype=torch.uint8), errors


def middle(image: Image.Image) -> Image.Image:
    """The middle of a thin picture, which would be huge once scaled; of others the whole."""
    (width, height), short = image.size, min(image.size)
    if max(width, height) <= THIN * short:
        return image
    left, top = ((side - 2 * short) // 2 if side > 2 * short else 0 for side in (width, height))
    return image.crop((left, top, width - left, height - top))


def _scaled(images: Tensor) -> Tensor:
    """Bytes as numbers in [0, 1]."""
    if images.dtype != torch.uint8:  # would be divided by 255 all the same
        raise InputError(f"augmentation gives {images.dtype}; legal: torch.uint8, without ToTensor and Normalize")
    return images.float().div_(255)


def _to_train_on(order: Tensor, batch_size: int) -> list[Tensor]:
    """The batches; a last one that has fewer than two images per process, as batch norm needs, only if all are such."""
    least = max(parallel.size(), min(batch_size, 2 * parallel.size()))
    batches = [batch for batch in order.split(batch_size) if len(batch) >= least]
    if not batches:
        raise InputError(f"`batch_size` {batch_size}: no batch of {len(order)} images has {least}, as training needs")
    return batches


@dataclass(frozen=True)
class Data:
    """A data set in three disjoint splits."""

    name: str
    train: Split | FileSplit
    val: Split | FileSplit
    test: Split | FileSplit
    classes: int  # of the whole data set, so of a network's outputs
    chosen: tuple[str, ...] | None  # names of the classes whose images are used, if not all
    fingerprint: str  # SHA-256 of all images and labels; of images that are read as needed, see `datasets`
    selection: Split | FileSplit | None = None  # chooses the epoch that is kept; None: nothing, it is the last one

    @property
    def device(self) -> torch.device:
        """Where images and labels go."""
        return self.train.labels.device

    def describe(self) -> dict:
        """What a record says of it."""
        known = {"name": self.name, "sha256": self.fingerprint, "train": len(self.train), "val": len(self.val)}
        if getattr(self.train, "mean", None) is not None:
            known |= {"mean": self.train.mean.flatten().tolist(), "std": self.train.std.flatten().tolist()}
        return known | ({"classes": list(self.chosen)} if self.chosen else {})


def derived_seed(seed: int, number: int) -> int:
    """A seed for one of many things that are random, so that each can be repeated on its own."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)


def crop_and_flip(padding: int = 4) -> Augmentation:
    """The usual augmentation of small photographs: shifted by up to `padding` pixels, mirrored left to right or not."""

    def draw(count: int, random: torch.Generator, device: torch.device):
        shifts = torch.randint(2 * padding + 1, (2, count), generator=random).to(device)
        mirrored = (torch.rand(count, generator=random) < 0.5).to(device)
        return lambda images, rows: shift_and_mirror(images, *shifts[:, rows], mirrored[rows], padding)

    return draw


def shift_and_mirror(images: Tensor, down: Tensor, right: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """Crop every image (b, c, h, w) from itself padded with black, and mirror some.

    Parameters
    ----------
    down, right : (b,) where the crop starts in the padded image, 0 to 2 * `padding`
    mirrored : (b,) boolean, which are mirrored left to right
    """
    height, width = images.shape[2:]
    rows, cols = (torch.arange(n, device=images.device) for n in (height, width))
    cols = torch.where(mirrored[:, None], cols.flip(0), cols) + right[:, None]
    rows = rows + down[:, None]
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[image, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def sample_per_class(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices of `count` rows of every class that occurs in `labels` (n,), drawn by `seed` without replacement.

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
    classes, sizes = np.unique(values, return_counts=True)
    if count > sizes.min():
        has = f"class {classes[sizes.argmin()]} of the training split has {sizes.min()} images"
        raise InputError(f"`samples_per_class` {count}: {has}; legal: 1 to {sizes.min()}")
    rows = [rng.choice(np.flatnonzero(values == c), count, replace=False) for c in classes]
    return torch.from_numpy(rng.permutation(np.concatenate(rows)))


def load(
    name: str,
    folder: Path,
    *,
    val_size: int,
    device: torch.device,
    classes: list[str] | None = None,
    workers: int = 0,
    skip: bool = False,
) -> Data:
    """Load a data set and hold `val_size` images of its training set out for validation.

    Parameters
    ----------
    name : a key of `DATASETS`
    folder : where files lie or are downloaded to
    val_size : images held out, stratified by class; 0 holds none out
    device : where all tensors live
    classes : use images of these classes only; labels stay as they are
    workers : processes that read images that do not fit into memory
    skip : leave out image files that cannot be read, and say so, instead of raising

    Raises
    ------
    InputError
        If files are missing or damaged, a class is unknown, or `val_size` leaves too few images of some class.
    """
    source = DATASETS[name](Path(folder).absolute(), name, skip)
    if not isinstance(source, Source):
        raise InputError(f"`dataset` {name}: its function returns a {type(source).__name__}; legal: a Source")
    digest = source.fingerprint or _fingerprint(source)
    parts = [_only(part, source.classes, classes) for part in (source.train, source.test)]
    (images, labels), (_, tested) = parts
    if not len(labels) or not len(tested):
        raise InputError(f"`dataset` {name}: the {'test' if len(labels) else 'training'} set has no images")
    train_rows, val_rows = _hold_out(labels.numpy(), val_size)
    if isinstance(images, np.ndarray):
        whole, test = (FileSplit(x, y.to(device), workers, skip) for x, y in parts)
    else:
        scale = _mean_and_std(images[train_rows], device) if source.natural else (None, None)
        whole, test = (Split(x.to(device), y.to(device), *scale) for x, y in parts)
    chosen = tuple(classes) if classes else None
    return Data(name, whole[train_rows], whole[val_rows], test, len(source.classes), chosen, digest)


def _fingerprint(source: Source) -> str:
    digest = hashlib.sha256()
    for tensor in (*source.train, *source.test):
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def _only(part: tuple, names: list[str], chosen: list[str] | None) -> tuple:
    """The images and labels of the chosen classes."""
    if chosen is None:
        return part
    if unknown := [name for name in chosen if name not in names]:
        some = ", ".join(map(shown, names[:10])) + (", ..." if len(names) > 10 else "")
        raise InputError(f"`classes` {unknown[0]}: no such class; legal: {some}")
    images, labels = part
    rows = torch.isin(labels, torch.tensor([names.index(name) for name in chosen])).numpy()
    return images[rows], labels[rows]


def _mean_and_std(images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (channels, 1, 1) by channel of uint8 images, in [0, 1]; exact sums."""
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    shares /= shares.sum(1, keepdim=True)
    mean = shares @ values
    std = (shares @ values**2 - mean**2).clamp(min=0).sqrt()
    std[std < 1 / 255] = 1  # a channel that is the same everywhere
    return tuple(value.float().to(device)[:, None, None] for value in (mean, std))


def _hold_out(labels: np.ndarray, val_size: int) -> tuple[Tensor, Tensor]:
    rows = np.arange(len(labels))
    if val_size == 0:
        return torch.from_numpy(rows), torch.empty(0, dtype=torch.int64)
    classes, sizes = np.unique(labels, return_counts=True)
    if sizes.min() < 2:
        raise InputError(f"`val_size` {val_size}: class {classes[sizes.argmin()]} has one image; legal: 0")
    if not len(classes) <= val_size <= len(labels) - len(classes):
        raise InputError(f"`val_size` {val_size}: legal: 0, or {len(classes)} to {len(labels) - len(classes)}")
    train, val = train_test_split(rows, test_size=val_size, random_state=SPLIT_SEED, stratify=labels)
    if lacking := set(classes.tolist()) - set(labels[train].tolist()):
        raise InputError(f"`val_size` {val_size}: leaves no image of class {min(lacking)} to train on; legal: fewer")
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(val))
