"""Files of images as people have them: other sets, other modes, damaged, replaced, linked, oddly named."""

import os
import pickle
import resource
import shutil
import struct
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import parallel
from common.activations import collect_activations
from common.data import CROP, RESIZED, Split, load, middle
from common.datasets import read_image, torchvision
from common.errors import InputError
from common.training import evaluate, train_epoch
from trials import DAMAGE, damaged, encoded

CPU = torch.device("cpu")
LOAD = {"val_size": 0, "device": CPU}
RAMP = np.arange(65536).reshape(256, 256).astype(np.uint16)  # every value of 16 bits once
UPPER = (RAMP >> 8).astype(np.uint8)


def idx(array) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("train-labels-idx1", idx(np.arange(20) % 10), "train-labels-idx1-ubyte: 20 labels for 40 images"),
        ("t10k-images-idx3", idx(np.zeros((40, 28, 28))), "t10k-labels-idx1-ubyte: 20 labels for 40 images"),
        ("train-labels-idx1", idx(np.arange(40) % 11), "train-labels-idx1-ubyte: labels from 0 to 10; legal: 0 to 9"),
        (
            "t10k-images-idx3",
            idx(np.zeros((20, 14, 28))),
            r"t10k-images-idx3-ubyte .*images are \[14, 28\], not \[28, 28\]",
        ),
        ("t10k-images-idx3", idx(np.arange(20)), "t10k-images-idx3-ubyte is no .*has not 3 dimensions"),
        ("train-images-idx3", b"\x1f\x8b\x08" + bytes(50), "train-images-idx3-ubyte.*packed by gzip"),
        ("train-images-idx3", idx(np.zeros((40, 28, 28)))[:-5], r"train-images.*\[40, 28, 28\].*31355"),
        ("train-images-idx3", idx(np.zeros((40, 28, 28))) + b"x", r"train-images.*\[40, 28, 28\].*31361"),
        ("t10k-labels-idx1", idx(np.arange(20))[:5], "t10k-labels-idx1-ubyte is no usable idx file"),
        ("t10k-labels-idx1", b"", "t10k-labels-idx1-ubyte is no usable idx file"),
        ("t10k-labels-idx1", b"\0\0\x0d\x01" + bytes(84), "t10k-labels-idx1-ubyte is no usable idx file"),
        (None, None, r"t10k-images-idx3-ubyte: 40 images, and 20 to train on: they are swapped"),
    ],
)
def test_mnist_files_that_do_not_belong_together(tmp_path, file, content, said):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)) if file else (("train", 20), ("t10k", 40)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(np.zeros((count, 28, 28))))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))
    if file:
        assert len(load("MNIST", tmp_path, **LOAD).train) == 40
        (folder / f"{file}-ubyte").write_bytes(content)
    with pytest.raises(InputError, match=said) as refusal:
        load("MNIST", tmp_path, **LOAD)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("labels", "said"), [(19, "119 labels for 120 images"), (20, "labels from 0 to 77")])
def test_original_cifar_files_that_do_not_belong_together(tmp_path, rng, monkeypatch, labels, said):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{k}" for k in range(2, 6)), "test_batch", "data_batch_1"]:
        count, wrong = (labels, 77) if name == "data_batch_1" else (20, 0)
        content = {
            "data": rng.integers(0, 256, (20 + 20 * bool(wrong), 3072), np.uint8),
            "labels": [0] * count + [wrong],
        }
        content["labels"] = (content["labels"] + [1] * 40)[: 20 + labels if wrong else 20]
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(torchvision().datasets.cifar, "check_integrity", lambda *_: True)
    with pytest.raises(InputError, match=said):
        load("CIFAR10", tmp_path, **LOAD)


def tiff(values: np.ndarray, bits: int, white: int, sample: int = 1) -> bytes:
    """A TIFF of one strip; `white` is 1 where 0 means black, `sample` 1 for unsigned, 2 for signed numbers."""
    height, width = values.shape
    content = values.tobytes()
    if bits == 12:  # two values in three bytes
        pairs = values.reshape(-1, 2).astype(np.uint32)
        packed = pairs[:, 0] << 12 | pairs[:, 1]
        content = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], 1).astype(np.uint8).tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: white, 273: 8, 277: 1, 278: height, 279: len(content)}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted({**tags, 339: sample}.items())]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + directory


GREY = Image.fromarray(UPPER)
MODES = {  # content of a file, and the grey or coloured values that it is
    "16.png": (encoded(Image.fromarray(RAMP), "PNG"), UPPER),
    "16.tif": (encoded(Image.fromarray(RAMP), "TIFF"), UPPER),
    "12.tif": (tiff(RAMP >> 4, 12, 1), UPPER),
    "16.pgm": (b"P5 256 256 65535\n" + RAMP.astype(">u2").tobytes(), UPPER),
    "8.png": (encoded(GREY, "PNG"), UPPER),
    "LA.png": (encoded(Image.merge("LA", [GREY, Image.new("L", (256, 256), 9)]), "PNG"), UPPER),
    "RGBA.png": (encoded(Image.merge("RGBA", [GREY] * 3 + [Image.new("L", (256, 256), 9)]), "PNG"), UPPER),
    "palette.png": (encoded(GREY.convert("P"), "PNG", transparency=bytes(range(256))), UPPER),
    "1.png": (encoded(Image.fromarray(UPPER > 127), "PNG"), np.where(UPPER > 127, 255, 0)),
    "cmyk.tif": (encoded(Image.merge("CMYK", [Image.new("L", (256, 256))] * 3 + [GREY]), "TIFF"), 255 - UPPER),
    "frames.jpg": (encoded(GREY, "GIF", save_all=True, append_images=[Image.new("L", (256, 256))]), UPPER),
    "turned.png": (
        encoded(GREY, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
        UPPER,
    ),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_is_read_with_its_values(tmp_path, name):
    content, values = MODES[name]
    (tmp_path / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    assert (np.asarray(image) == np.asarray(values)[:, :, None]).all()


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "mode F"),
        (encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "mode I"),
        (tiff(RAMP.astype(np.int16), 16, 1, sample=2), "mode I"),
        (tiff(RAMP, 16, 0), "mode I;16"),
    ],
)
def test_values_without_a_white_are_refused_by_name(tmp_path, content, mode):
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(InputError, match=f"a.tif is no readable image .{mode}: "):
        read_image(tmp_path / "a.tif")


GOOD = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))


def tree(root: Path, test: str, classes, count: int = 4, side: int = 32) -> Path:
    """Image files train/<class>/<k>.png and <test>/<class>/<k>.png; each file is another."""
    content = encoded(GOOD.resize((side, side)), "PNG")
    for part in ("train", test):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                (root / part / name / f"{k}.png").write_bytes(content)
    return root


@pytest.mark.parametrize(
    ("name", "top", "workers"), [("CIFAR10", "cifar10", 0), ("ImageNet", "imagenet", 0), ("ImageNet", "imagenet", 2)]
)
def test_unreadable_files_are_refused_or_left_out(tmp_path, capsys, name, top, workers):
    root = tree(tmp_path / top, "test" if top == "cifar10" else "val", "ab", len(DAMAGE) + 2)
    for k, kind in enumerate(DAMAGE):
        damaged(kind, root / "train" / "a" / f"{k}.png")
    with pytest.raises(InputError, match=r"train/a/\d.png is no readable image .*`skip_unreadable`") as refusal:
        list(load(name, tmp_path, **LOAD, workers=workers).train.batches(100))
    assert "\n" not in str(refusal.value)
    capsys.readouterr()
    batches = list(load(name, tmp_path, **LOAD, workers=workers, skip=True).train.batches(100))
    assert torch.cat([labels for _, labels in batches]).bincount().tolist() == [2, len(DAMAGE) + 2]
    said = capsys.readouterr().err.splitlines()
    assert [line.split("train/")[1].split(" ")[0] for line in said] == [f"a/{k}.png" for k in range(len(DAMAGE))]


def test_a_class_without_an_image_that_can_be_read_is_refused(tmp_path):
    """The network was trained without it; where only the test set lacks it, that is as with an absent folder."""
    root = tree(tmp_path / "cifar10", "test", "ab")
    for part, found in (("test", [0, 4]), ("train", None)):
        for path in (root / part / "a").iterdir():
            path.write_bytes(b"no image")
        if found:
            assert load("CIFAR10", tmp_path, **LOAD, skip=True).test.labels.bincount(minlength=2).tolist() == found
    with pytest.raises(InputError, match=r"train/a: no image file can be read"):
        load("CIFAR10", tmp_path, **LOAD, skip=True)


def test_odd_names_are_files_and_messages_keep_to_a_line(tmp_path, capsys):
    root = tree(tmp_path / "cifar10", "test", "ab")
    for name in ("\udcff.png", "new\nline.png", "ж é.png"):  # the first is the byte 255, which is no text
        shutil.copy(root / "train/a/0.png", root / "train/a" / name)
    (root / "train/a/x.png").mkdir()
    (root / "train/a/._hidden.png").write_bytes(b"")
    (root / "train/.hidden").mkdir()
    (root / "train/readme.txt").write_text("")
    assert load("CIFAR10", tmp_path, **LOAD).train.labels.bincount().tolist() == [7, 4]
    Path(root / "train/a/new\nline.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"new\\nline.png' is no readable image"):
        load("CIFAR10", tmp_path, **LOAD)
    load("CIFAR10", tmp_path, **LOAD, skip=True)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_replaced_image_is_another_data_set(tmp_path):
    """Of the same size, and uncompressed; wherever the folder lies."""
    before = load("ImageNet", tree(tmp_path / "a" / "imagenet", "val", "xy").parent, **LOAD).fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert load("ImageNet", tmp_path / "b", **LOAD).fingerprint == before
    assert load("ImageNet", os.path.relpath(tmp_path / "b"), **LOAD).fingerprint == before
    image = tmp_path / "b/imagenet/val/y/3.png"
    image.write_bytes(image.read_bytes()[:-1] + b"x")
    assert load("ImageNet", tmp_path / "b", **LOAD).fingerprint != before


def evaluated(image: Image.Image) -> torch.Tensor:
    transforms = torchvision().transforms.v2
    usual = [transforms.Resize(RESIZED), transforms.CenterCrop(CROP), transforms.PILToTensor()]
    return transforms.Compose(usual)(image)


@pytest.mark.parametrize("size", [(500, 375), (40, 1280), (33, 32), (224, 7000), (5, 160), (256, 256)])
def test_ordinary_pictures_are_evaluated_as_torchvision_does(rng, size):
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
    for turned in (image, image.transpose(Image.Transpose.TRANSPOSE)):
        assert torch.equal(evaluated(middle(turned)), evaluated(turned))


@pytest.mark.parametrize("size", [(40, 1601), (40, 1600), (41, 1601), (1, 35)])
def test_thin_pictures_show_their_middle(rng, size):
    """To half a pixel."""
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8))
    for turned in (image, image.transpose(Image.Transpose.TRANSPOSE)):
        assert middle(turned).size != turned.size
        difference = evaluated(middle(turned)).float() - evaluated(turned).float()
        assert difference.abs().mean() < 6


@pytest.mark.parametrize("size", [(4_000_000, 1), (1, 4_000_000)])
def test_a_thin_picture_takes_no_more_memory_than_another(tmp_path, size):
    root = tree(tmp_path / "imagenet", "val", "ab", 1, 256)
    for part in ("train", "val"):
        Image.new("L", size).save(root / part / "a" / "0.png")
    data = load("ImageNet", tmp_path, **LOAD)
    transforms = torchvision().transforms.v2
    child = os.fork()  # the peak of a process is never taken back
    if not child:
        grown = 255
        try:
            torch.set_num_threads(1)  # others did not survive the fork
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            list(data.test.batches(2))
            list(data.train.shuffled(2, 0, [transforms.RandomResizedCrop(CROP)]))
            grown = min(grown, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
        finally:
            os._exit(grown)
    assert (
        os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) < 250
    )  # MiB, with what is loaded meanwhile; scaled whole it is a gigabyte


@pytest.fixture
def gaps(tmp_path):
    """A data set of large images of which 0 to 11 of class a cannot be read."""
    root = tree(tmp_path / "imagenet", "val", "ab", 16, CROP)
    for k in range(12):
        (root / "train" / "a" / f"{k}.png").write_bytes(b"")
    return load("ImageNet", tmp_path, **LOAD, skip=True)


class Always(torch.nn.Module):
    """Says class 1 whatever it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor([0.0, 1.0]))

    def forward(self, images):
        return self.bias.expand(len(images), 2)


def test_images_that_were_left_out_do_not_count(gaps):
    """Right on the 16 images of class b, wrong on the 4 of a that are left; the gradient is the mean over all 20."""
    seen, network = evaluate(Always(), gaps.train, 5), Always()
    expected = torch.nn.functional.cross_entropy(torch.tensor([[0.0, 1.0]] * 20), torch.tensor([0] * 4 + [1] * 16))
    assert seen.accuracy == 80
    assert seen.loss == pytest.approx(float(expected))
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    loss = torch.nn.CrossEntropyLoss(reduction="sum")
    trained = train_epoch(network, optimizer, schedule, gaps.train.shuffled(32, 0, []), loss)
    assert trained.accuracy == 80
    assert trained.loss == pytest.approx(float(expected))
    gradient = torch.tensor([0.0, 1.0]).softmax(0) - torch.tensor([0.2, 0.8])
    torch.testing.assert_close(network.bias.detach(), torch.tensor([0.0, 1.0]) - gradient)


@pytest.mark.parametrize("positions", [None, 3])
def test_activations_are_of_the_images_that_could_be_read(gaps, positions):
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 5, 9), torch.nn.Flatten(), torch.nn.LazyLinear(2)).eval()
    layers(torch.zeros(1, 3, 224, 224))
    seen = collect_activations(layers, ["0.weight", "2.weight"], gaps.train, 5, positions=positions)
    images = torch.cat([images for images, _ in gaps.train.batches(5)])
    assert len(images) == 20
    with torch.no_grad():
        expected = layers(images)
    assert [len(values) for values in seen["0.weight"]] == [20 * (positions or 1)] * 2
    torch.testing.assert_close(seen["2.weight"][1], expected)


def test_batches_without_images_are_left_out(gaps):
    sizes = [len(images) for images, _ in gaps.train.batches(4)]
    assert sizes == [4] * 5
    assert all(len(images) == len(labels) == rows >= 2 for images, labels, rows in gaps.train.shuffled(4, 0, []))
    assert sum(rows for *_, rows in gaps.train.shuffled(1, 0, [])) == 20
    for path in gaps.train.paths:
        Path(path).write_bytes(b"")
    for batches in (gaps.train.batches(4), gaps.train.shuffled(4, 0, [])):
        with pytest.raises(InputError, match="no batch of 32 images has enough that can be read"):
            list(batches)


def in_processes(monkeypatch, count: int, work) -> list:
    """What `work` returns in each of several processes; threads stand in for them."""
    here, barrier, sent = threading.local(), threading.Barrier(count, timeout=60), [None] * count
    found = [None] * count

    def total(*values):
        sent[here.rank] = [float(value) for value in values]
        barrier.wait()
        sums = [sum(column) for column in zip(*sent, strict=True)]
        barrier.wait()
        return sums

    def start(rank):
        here.rank = rank
        found[rank] = work()

    monkeypatch.setattr(parallel, "size", lambda: count)
    monkeypatch.setattr(parallel, "rank", lambda: here.rank)
    monkeypatch.setattr(parallel, "total", total)
    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("batch_size", [4, 5, 8, 32])
def test_processes_make_the_same_steps_whatever_each_can_read(gaps, monkeypatch, batch_size):
    paths = list(gaps.train.paths)

    def work():
        seen = [(labels.tolist(), rows) for _, labels, rows in gaps.train.shuffled(batch_size, 1, [])]
        return seen, [len(labels) for _, labels in gaps.train.batches(batch_size)]

    (first, tested), (second, others) = in_processes(monkeypatch, 2, work)
    assert len(first) == len(second)
    assert len(tested) == len(others)
    assert sum(tested) + sum(others) == sum(Path(path).stat().st_size > 0 for path in paths)
    for (mine, rows), (theirs, same) in zip(first, second, strict=True):
        assert rows == same == len(mine) + len(theirs)
        assert min(len(mine), len(theirs)) >= 2


@pytest.mark.parametrize(
    ("rows", "size", "processes", "batches"),
    [(5, 1, 1, 5), (5, 2, 1, 2), (9, 2, 2, 4), (9, 3, 2, 3), (9, 4, 2, 2), (9, 1, 2, 0)],
)
def test_batches_are_as_small_as_was_asked_for(monkeypatch, rows, size, processes, batches):
    """One image at a time, or one for each process; else a rest with fewer than two for each is left out."""
    monkeypatch.setattr(parallel, "size", lambda: processes)
    split = Split(torch.zeros(rows, 1, 2, 2, dtype=torch.uint8), torch.zeros(rows, dtype=torch.int64))
    if not batches:
        with pytest.raises(InputError, match=f"`batch_size` {size}: no batch of {rows} images has {processes}"):
            split.steps(size)
        return
    assert split.steps(size) == batches == len(list(split.shuffled(size, 0)))


def test_more_classes_than_a_byte_counts(tmp_path):
    tree(tmp_path / "cifar10", "test", [f"{k:03}" for k in range(300)], 1)
    for _ in range(2):  # decoded, and from decoded.npy
        data = load("CIFAR10", tmp_path, **LOAD)
        assert data.train.labels.tolist() == data.test.labels.tolist() == list(range(300))
    with pytest.raises(InputError, match="`val_size` 300: class 0 has one image"):
        load("CIFAR10", tmp_path, val_size=300, device=CPU)


def test_labels_are_those_of_the_training_classes(tmp_path):
    """A test set that holds some of the classes; a class that is there only; classes without images."""
    root = tree(tmp_path / "imagenet", "val", "abcd")
    shutil.rmtree(root / "val" / "a")
    shutil.rmtree(root / "val" / "c")
    data = load("ImageNet", tmp_path, **LOAD)
    assert (data.classes, data.test.labels.unique().tolist()) == (4, [1, 3])
    with pytest.raises(InputError, match="the test set has no images"):
        load("ImageNet", tmp_path, **LOAD, classes=["c"])
    (root / "val" / "e").mkdir()
    with pytest.raises(InputError, match=r"val: the class folder e is not in .*train"):
        load("ImageNet", tmp_path, **LOAD)
    (root / "train" / "e").mkdir()
    with pytest.raises(InputError, match="train/e: no image files"):
        load("ImageNet", tmp_path, **LOAD)
    shutil.rmtree(root / "val")
    with pytest.raises(InputError, match="train/ and val/ must hold one folder"):
        load("ImageNet", tmp_path, **LOAD)
    (root / "val").mkdir()
    with pytest.raises(InputError, match="val: it has no class folders"):
        load("ImageNet", tmp_path, **LOAD)


def test_folders_may_be_links_and_links_may_lead_back(tmp_path):
    root = tree(tmp_path / "elsewhere", "val", "ab")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "imagenet").symlink_to(root)
    (root / "train" / "c").symlink_to(root / "val" / "a")
    for name in "ab":  # both lead to both: without end if they are followed
        (root / "train" / name / "up").symlink_to(root / "train")
        (root / "train" / name / "here").symlink_to(root / "train" / name)
    data = load("ImageNet", tmp_path / "data", **LOAD)
    assert data.train.labels.bincount().tolist() == [4, 4, 4]
    assert len(next(data.train.batches(12))[1]) == 12
