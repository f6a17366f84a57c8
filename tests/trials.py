"""Random trials: files, folders of images, checkpoints and environments as nobody would think of them.

A trial gets random numbers and an empty folder, and returns if what it tried came out right; an InputError of one line
is a refusal, and anything else a fault. `counted(image_tree, [17])` repeats number 17.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "mlp")]
import model
from common import artifacts, cli, datasets, records
from common.data import IMAGENET, load
from common.errors import InputError

torch.set_num_threads(1)  # and no other threads, so that processes may be forked
TRAIN = "--Dataset DIGITS --Val_size 200 --Epoch 4 --Batch_size 128".split()
HANGS = 900  # seconds that only a process that hangs takes


def counted(trial: Callable[[np.random.Generator, Path], None], numbers: Iterable[int]) -> dict:
    """Make the trials of these numbers, each with random numbers and a folder of its own.

    Returns
    -------
    How many were tried, came out right, were refused in one line, and how many ended otherwise (must be 0); what those
    were is printed.
    """
    found = {"tried": 0, "right": 0, "refused": 0, "other_ends": 0}
    for number in numbers:
        end, said = "right", ""
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of tensors and layers that it means to drop
            try:
                trial(np.random.default_rng(number), Path(folder))
            except InputError as error:
                end, said = ("refused" if str(error).isprintable() else "other_ends"), repr(error)
            except Exception as error:
                end, said = "other_ends", repr(error)
        found["tried"] += 1
        found[end] += 1
        if end == "other_ends":
            print(f"{trial.__name__} {number}: {said[:500]}", flush=True)
    return found


@contextlib.contextmanager
def refusal_only_if(odd, naming: str = "") -> None:
    """Within it an InputError is a fault, unless something odd was there and it names that."""
    try:
        yield
    except InputError as error:
        if not odd or naming not in str(error):
            raise AssertionError(f"refused: {error}") from error
        raise


@contextlib.contextmanager
def at_most(seconds: int):
    """Within it what takes longer is a fault."""

    def stop(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Code:
    """Unpickling it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def forked(script: str, *flags, said: Path | str = os.devnull, environment: dict | None = None) -> int:
    """Start a script of the MLP in a process of its own, without the seconds that imports take.

    What it says on standard error goes to the file `said`.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.alarm(HANGS)
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        os.chdir(ROOT / "mlp")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = [script, *map(str, flags)]
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except Exception as error:
        os.write(2, f"Traceback {error!r}".encode(errors="backslashreplace"))
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def artefacts(folder: Path) -> dict[str, tuple[Path, Path, object]]:
    """By kind: a file, another of its kind, and how a stage reads it."""
    torch.manual_seed(0)
    for name in ("a", "b"):
        state = {"state_dict": torch.nn.Linear(30, 20).state_dict(), "epoch": 1}
        scores, labels = np.random.default_rng(ord(name)).random((6, 8)), np.arange(8) % 4 + (name == "b")
        content = artifacts.checkpoint_bytes(state)
        records.save({folder / f"{name}.pkl": content}, {"stage": 1, "arguments": {"Lr": 0.1}, "name": name})
        files = {folder / f"{name}_scores.npy": scores, folder / f"{name}_labels.npy": labels}
        records.save({path: artifacts.array_bytes(array) for path, array in files.items()}, {"stage": 2})
        artifacts.save_state(folder / f"{name}.state", {"key": name, "total": torch.from_numpy(scores)})

    def own_state(path: Path) -> dict:
        state = artifacts.load_state(path, "remove it")
        if state["key"] != "a":  # a state of another run is not used, which is as good as refused
            raise InputError(f"{path} is of another run")
        return state

    def array(path: Path) -> np.ndarray:
        return artifacts.load_array(path, folder / f"{path.name[0]}_scores.json", "run pruning_1b.py again")

    readers = {
        "checkpoint": (".pkl", artifacts.load_checkpoint),
        "scores": ("_scores.npy", array),
        "labels": ("_labels.npy", array),
        "record": (".json", records.read),
        "state": (".state", own_state),
    }
    return {kind: (folder / f"a{end}", folder / f"b{end}", read) for kind, (end, read) in readers.items()}


@cache
def good_files() -> dict[str, bytes]:
    """By the end of its name: a file of each kind, as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        kinds = {path.suffix: path.read_bytes() for path, *_ in artefacts(Path(folder)).values()}
    return {**kinds, ".png": encoded(Image.new("RGB", (8, 8)), "PNG")}


def random_file(rng: np.random.Generator, folder: Path) -> None:
    """Random bytes, or a good file with many random changes and no checksum, to its reader."""
    readers = {
        ".pkl": artifacts.load_checkpoint,
        ".npy": lambda path: artifacts.load_array(path, folder / "none", "make it again"),
        ".json": records.read,
        ".state": lambda path: artifacts.load_state(path, "remove it"),
        ".png": datasets.read_image,
    }
    suffix = rng.choice(list(readers))
    content = bytearray(good_files()[suffix])
    for _ in range(rng.integers(1, 20)):
        content[rng.integers(len(content))] = rng.integers(256)
    content = rng.bytes(rng.integers(400)) if rng.random() < 0.2 else content[: rng.integers(1, 2 * len(content))]
    if suffix == ".state":
        content = hashlib.sha256(content).digest() + content
    path = folder / f"fuzz{suffix}"
    path.write_bytes(content)
    readers[suffix](path)


def parsed(stage: int, argv: list[str]) -> tuple[int | None, str]:
    """Exit code (None: the command line was taken) and what was said on standard error."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            cli.parse(__file__, "doc", model, stage, argv)
        return None, said.getvalue()
    except InputError as error:
        return 2, f"{cli.in_flags(str(error))}\n"
    except SystemExit as stop:
        return stop.code, said.getvalue()


def command_line(rng: np.random.Generator, folder: Path) -> None:
    """Legal and senseless flags and values, to the parser of a stage."""
    words = ["", "\0", "é" * 300, *"0 1 -1 0.5 1e400 nan -inf x -- - = ../.. MNIST cmi".split()]
    names = [f"--{name}" for name in cli.FLAGS] + ["--", "--no-Nesterov", "--no-Resume", "--unknown", "-x", "--help=1"]
    argv = [str(rng.choice(names if rng.random() < 0.5 else words)) for _ in range(rng.integers(1, 8))]
    stage = int(rng.integers(1, 4))
    code, said = parsed(stage, [*(["--key_id", "0"] if stage > 1 else []), *argv])
    if code is not None:
        assert code == 2, (argv, code, said)
        assert said.count("\n") == 1, (argv, said)
        raise InputError("one line")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """What Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def damaged(kind: str, path: Path) -> None:
    """Make a file unreadable."""
    content = bytearray(encoded(Image.new("RGB", (32, 32), (9, 99, 200)), "PNG"))
    chunk = content.find(b"IDAT") - 4
    path.unlink(missing_ok=True)
    if kind == "a chunk's length":
        content[chunk : chunk + 4] = (1).to_bytes(4, "big")
        path.write_bytes(content)
    elif kind == "a bomb":
        path.write_bytes(content[:16] + (9500).to_bytes(4, "big") * 2 + content[24:])
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link to nowhere":
        path.symlink_to("nowhere")
    elif kind == "a link to itself":
        path.symlink_to(path)
    else:
        postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
        path.write_bytes({"empty": b"", "cut off": content[:-60], "PostScript": postscript}[kind])


DAMAGE = ("a chunk's length", "a bomb", "a pipe", "a link to nowhere", "a link to itself")
DAMAGE += ("empty", "cut off", "PostScript")
GREYS = [("PNG", mode) for mode in ("L", "RGB", "P", "LA", "RGBA")] + [("TIFF", "CMYK"), ("JPEG", "L"), ("GIF", "L")]
GREYS += [(kind, "RGB") for kind in ("BMP", "TIFF", "PPM", "WEBP", "JPEG")]
STEP = 8  # of two greys, more than any format loses


@cache
def others_may_look() -> bool:
    """Whether another user than root, who may read everything, can be played; imports what that user may not read."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("train/a", "val/a"):
            (Path(folder) / "imagenet" / name).mkdir(parents=True)
            Image.new("L", (9, 9)).save(Path(folder) / "imagenet" / name / "0.png")
        list(load("ImageNet", folder, val_size=0, device=torch.device("cpu"), workers=1).train.batches(3))
    above = Path(tempfile.gettempdir()).resolve()
    Image.init()
    return not os.geteuid() and all(folder.stat().st_mode & 1 for folder in (above, *above.parents))


@contextlib.contextmanager
def as_another_user():
    """Within it permissions count, if that can be arranged."""
    owner = os.geteuid()
    if others_may_look():
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(owner)


def tree_file(path: Path, rng: np.random.Generator, side: int | None) -> int | str:
    """Write one file; returns the number of its grey, "bad" or, where nobody knows what can be read, "unknown"."""
    if rng.random() < 0.06:
        damaged(str(rng.choice(DAMAGE)), path)
        return "bad"
    grey, (kind, mode) = int(rng.integers(256 // STEP)), GREYS[rng.integers(len(GREYS))]
    size = (side, side) if side else tuple(map(int, rng.choice([1, 7, 40, 300], 2)))
    content = bytearray(encoded(Image.new("L", size, grey * STEP).convert(mode), kind))
    if rng.random() < 0.07:
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(min(len(content), 300))] = rng.integers(256)
        grey = "unknown"
    path.write_bytes(content)
    if rng.random() < 0.02 and others_may_look():
        path.chmod(0)
        grey = "bad"
    return grey


def random_tree(root: Path, test: str, rng: np.random.Generator, side: int | None) -> dict[str, int | str]:
    """Class folders of all kinds; returns what is in every file, see `tree_file`."""
    known, every = {}, ["a", "b", "ж", "new\nline", "\udcff", ".hidden", "x.png"]
    odd = rng.random() < 0.4  # classes that are missing, empty or closed
    root.mkdir()
    root.chmod(rng.choice([0o777, 0o755]))
    names = rng.choice(every, 4, replace=False)
    for part in ("train", test):
        for name in rng.choice(every, rng.integers(4), replace=False) if odd and rng.random() < 0.3 else names:
            folder = root / part / str(name)
            folder.mkdir(parents=True)
            for k in range(rng.integers(not odd or rng.random() < 0.9, 5)):
                below = folder / str(rng.choice(["deep.png", "deep/er", ".deep"])) if rng.random() < 0.15 else folder
                below.mkdir(parents=True, exist_ok=True)
                usual = [".png", ".JPG", ".tif", ".WebP"] * (5 if k else 50)
                end = rng.choice([".txt", "\n.png", "\udcfe.bmp", *usual])
                path = below / f"{'.' * (rng.random() < 0.03)}{k}{end}"
                known[str(path)] = tree_file(path, rng, side)
            if rng.random() < 0.15:
                target = str(rng.choice(["..", ".", "nowhere", "../../train", f"../{names[0]}"]))
                (folder / "up").symlink_to(target)
            folder.chmod(0 if odd and rng.random() < 0.03 and others_may_look() else 0o755)
    return known


def images_in(folder: Path) -> list[str]:
    """Image files of a class: those of every folder below it, through links too, once; what is hidden is not."""
    todo, seen, found = [os.path.realpath(folder)], {os.path.realpath(folder.parent)}, []
    while todo:
        here = todo.pop()
        if here in seen:
            continue
        seen.add(here)
        if not Path(here).stat().st_mode & 0o777:
            return []
        for path in Path(here).glob("[!.]*"):
            if path.is_dir():
                todo.append(os.path.realpath(path))
            elif path.name.lower().endswith(datasets.SUFFIXES):
                found.append(str(path))
    return found


def truth(root: Path, test: str, known: dict) -> dict[str, list[tuple[int, int | str]]] | None:
    """By split the label and the content of every image; None where the folders are no data set."""
    parts = {
        part: sorted(path.name for path in root.glob(f"{part}/*") if path.is_dir() and path.name[0] != ".")
        for part in ("train", test)
    }
    found = {part: [] for part in parts}
    for part, names in parts.items():
        for name in names:
            images = images_in(root / part / name)
            if name not in parts["train"] or not images:
                return None
            found[part] += [(parts["train"].index(name), known[path]) for path in images]
    return found


def image_tree(rng: np.random.Generator, folder: Path) -> None:
    """Folders of images: every image is there once, with its grey and its label, or the reason why not is said."""
    name, top, test, side = [("CIFAR10", "cifar10", "test", 32), ("ImageNet", "imagenet", "val", None)][rng.integers(2)]
    folder.chmod(0o755)
    folder = folder.resolve()
    known = random_tree(folder / top, test, rng, side)
    wanted = truth(folder / top, test, known)
    skip, val_size, said = bool(rng.random() < 0.7), int(rng.choice([0, 0, 0, 4])), io.StringIO()
    options = {"val_size": val_size, "device": torch.device("cpu"), "workers": int(rng.random() < 0.05), "skip": skip}
    nowhere = wanted is None or not all(wanted.values())
    kinds = {} if nowhere else wanted
    lost = {part: Counter(image for _, image in images if isinstance(image, str)) for part, images in kinds.items()}
    greys = {part: Counter(image for image in images if image[1] not in lost[part]) for part, images in kinds.items()}
    classes = [{label for label, _ in images.get("train", ())} for images in (kinds, greys)]
    lacking = side and classes[0] != classes[1]  # a class whose images may all be left out
    odd = nowhere or val_size or lacking or not all(greys.values()) or (not skip and any(lost.values()))
    try:
        for _ in range(2):  # decoded, and from what was decoded before
            with refusal_only_if(odd), as_another_user(), contextlib.redirect_stderr(said):
                data = load(name, folder, **options)
                found = {"train": seen(data.train) + (seen(data.val) if val_size else Counter()), test: seen(data.test)}
            assert not nowhere, "what is no data set was read"
            for part in kinds:
                assert skip or not lost[part]["bad"], "what cannot be read was read"
                assert greys[part] <= found[part], (part, greys[part] - found[part])
                assert (found[part] - greys[part]).total() <= lost[part]["unknown"], (part, found[part] - greys[part])
        assert all(line.startswith("left out: ") for line in said.getvalue().splitlines()), said.getvalue()
    finally:
        for path in folder.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)


def seen(split) -> Counter:
    """How often each label and grey is among the images of a split."""
    found = Counter()
    customary = (torch.tensor(v)[:, None, None] for v in IMAGENET)
    mean, std = (split.mean, split.std) if hasattr(split, "mean") else customary
    for images, labels in split.batches(3):
        assert images.isfinite().all()
        greys = ((images * std + mean).mean((1, 2, 3)) * 255 / STEP).round().int()
        found.update(zip(labels.tolist(), greys.tolist(), strict=True))
    return found


def sliced(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a part of a larger memory."""
    return torch.stack([tensor, tensor + 1], -1)[..., 0]


MUST, MAY, NEVER = "must", "may", "never"  # be read; what is read has the same values
TENSORS = {
    "as it is": (MUST, lambda t: t),
    "parameter": (MUST, nn.Parameter),
    "transposed": (MUST, lambda t: t.mT.contiguous().mT if t.ndim > 1 else t),
    "sliced": (MUST, sliced),
    "channels last": (MUST, lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t),
    **{str(dtype): (MUST, lambda t, dtype=dtype: t.to(dtype)) for dtype in (torch.float64, torch.half, torch.bfloat16)},
    **{str(dtype): (MAY, lambda t, dtype=dtype: t.to(dtype)) for dtype in (torch.int8, torch.int64, torch.bool)},
    **{str(d): (MAY, lambda t, d=d: t.abs().to(d)) for d in (torch.uint8, torch.uint16, torch.uint32, torch.uint64)},
    **{d: (MAY, lambda t, d=d: t.to(getattr(torch, d))) for d in dir(torch) if d.startswith("float8_")},
    "expanded": (MAY, lambda t: torch.ones(1).expand(t.shape)),
    "overlapping": (MAY, lambda t: torch.rand(40).as_strided(t.shape, [1] * t.ndim)),
    "coo": (MAY, lambda t: t.to_sparse()),
    "csr": (MAY, lambda t: t.to_sparse_csr() if t.ndim == 2 else t.to_sparse()),
    "bsr": (MAY, lambda t: t.to_sparse_bsr((1, 1)) if t.ndim == 2 else t.to_sparse()),
    "quantised": (MAY, lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
    "complex": (NEVER, lambda t: torch.complex(t, t + 1)),
    "conjugated": (NEVER, lambda t: torch.complex(t, t + 1).conj()),
    "meta": (NEVER, lambda t: t.to("meta")),
    "nested": (NEVER, lambda t: torch.nested.nested_tensor([t, t])),
    "one more": (NEVER, lambda t: torch.stack([t, t])),
    "flat": (NEVER, lambda t: t.flatten()[:3]),
    "nan": (NEVER, lambda t: torch.full_like(t, torch.nan)),
    "infinite": (NEVER, lambda t: torch.full_like(t, -torch.inf, dtype=torch.half)),
    "out of range": (NEVER, lambda t: torch.full_like(t, 1e300, dtype=torch.float64)),
    "huge": (NEVER, lambda t: torch.ones(1).expand(10**6, 10**6)),
    "storage": (NEVER, lambda t: t.untyped_storage()),
    "array": (NEVER, lambda t: t.detach().numpy()),
    "list": (NEVER, lambda t: t.tolist()),
    "none": (NEVER, lambda t: None),
}
ODD_KEYS = ["module", "0", "0.weight.", "\n", "", "é" * 99, 7, None, b"0.weight", ("0", "weight"), 1.5]


def weights_file(rng: np.random.Generator, state: dict) -> tuple[dict, bool, str]:
    """Weights as programs keep them: what they save, whether as an own checkpoint, and what must come of it."""
    fate, saved = MUST, dict(state)
    for key in rng.permutation([k for k, t in state.items() if t.ndim])[: rng.choice([0, 0, 1, 2])]:
        kind = str(rng.choice(list(TENSORS)))
        expected, change = TENSORS[kind]
        saved[key] = change(saved[key])
        fate = max(fate, expected, key=(MUST, MAY, NEVER).index)
        if expected != NEVER:
            dense = {"quantised": "dequantize", **dict.fromkeys(("coo", "csr", "bsr"), "to_dense")}
            state[key] = getattr(saved[key].detach(), dense.get(kind, "clone"))().float()
    if fate == MUST and rng.random() < 0.1:  # all in one memory
        parts = torch.cat([t.flatten() for t in state.values()]).split([t.numel() for t in state.values()])
        saved = {key: part.view(state[key].shape) for key, part in zip(state, parts, strict=True)}
    if rng.random() < 0.3:
        del saved["1.num_batches_tracked"]
    if rng.random() < 0.1:
        saved[ODD_KEYS[rng.integers(len(ODD_KEYS))]], fate = torch.ones(1), NEVER
    if rng.random() < 0.05:
        del saved["0.weight"]
        fate = NEVER
    own = bool(rng.random() < 0.3)
    if not own:
        prefix = "".join(rng.choice(["", "", "module.", "_orig_mod.", *["net."] * (rng.random() < 0.1)], 2))
        saved = {prefix + key if isinstance(key, str) else key: value for key, value in saved.items()}
    if rng.random() < 0.5:
        saved = OrderedDict(saved)
    for wrapper in ["state_dict"] if own else rng.choice([*artifacts.WRAPPERS, "weights"], rng.integers(3)):
        more = {
            "epoch": 3,
            "lr": 0.1,
            "name": "x\ny",
            "best": None,
            "optimizer": {"state": {0: {"step": torch.ones(1)}}},
        }
        saved = {**(more if rng.random() < 0.5 else {}), str(wrapper): saved}
        fate = NEVER if wrapper == "weights" else fate
    return saved, own, fate


def foreign_checkpoint(rng: np.random.Generator, folder: Path) -> None:
    """A file of weights as programs write them: the same values are in the network afterwards, or none."""
    torch.manual_seed(rng.integers(2**31))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    path = folder / "x.pth"
    state = {key: torch.rand_like(value, dtype=torch.float) * 4 + 0.5 for key, value in network.state_dict().items()}
    state["1.num_batches_tracked"] = network.state_dict()["1.num_batches_tracked"]
    content, own, fate = weights_file(rng, state)
    odd = [(content,), [content], Code(folder / "executed"), np.float32(1), {1, 2}, "x", argparse.Namespace(a=1)]
    if rng.random() < 0.1:
        content, fate = odd[rng.integers(len(odd))], NEVER
    elif rng.random() < 0.1:
        content["more"], fate = odd[rng.integers(2, len(odd))], max(fate, MAY, key=(MUST, MAY, NEVER).index)
    elif rng.random() < 0.05:
        content[artifacts.WRAPPERS[0]], fate = content, NEVER  # that holds itself
    torch.save(content, path, _use_new_zipfile_serialization=bool(rng.random() < 0.8))
    before = copy.deepcopy(network.state_dict())
    try:
        with refusal_only_if(fate != MUST, naming=path.name), at_most(HANGS):
            artifacts.load_weights(network, path, foreign=not own)
    except InputError:
        torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
        raise
    finally:
        assert not (folder / "executed").exists()
    assert fate != NEVER, "was read"
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[key].to(value.dtype)) or key.endswith("tracked"), key


LATE = {  # variables that are read while a script runs, and values, legal and senseless; "-": not set
    "RANK LOCAL_RANK": "- - 0 0 1 -1 x 00 ² 99999999999999999999",
    "WORLD_SIZE": "- - 1 1 0 -1 1.5 x 99999999999999999999",
    "MASTER_ADDR": "- - 127.0.0.1 localhost ::1",
    "MASTER_PORT": "- - free free taken 0 -1 99999 x 99999999999999999999",
    "GROUP_RANK LOCAL_WORLD_SIZE TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT": "- 0 1 x",
    "TORCH_DISTRIBUTED_DEBUG GLOO_SOCKET_IFNAME": "- - - OFF DETAIL lo x",
    "SLURM_PROCID SLURM_NTASKS SLURM_LOCALID SLURM_JOB_ID SLURM_CPUS_PER_TASK SLURM_NODELIST": "- 0 3 x n[1-4]",
    "OMPI_COMM_WORLD_RANK PMI_RANK PMI_SIZE": "- 0 1 x",
    "CUDA_VISIBLE_DEVICES": "- 0 -1 x",
    "COLUMNS LINES": "- 0 1 20 -5 x 99999999999999999999",
    "TERM NO_COLOR FORCE_COLOR": "- dumb xterm-256color x",
    "HOME USER TMPDIR PWD XDG_CACHE_HOME": "- /nowhere /dev/null . x",
    "PATH GIT_DIR GIT_WORK_TREE": "- /nowhere x",
    "TZ LANG LC_ALL LANGUAGE": "- UTC Europe/Berlin C de_DE.UTF-8 x",
}
EARLY = {  # variables that are read when Python and its libraries start
    "PYTHONSAFEPATH PYTHONDONTWRITEBYTECODE PYTHONUNBUFFERED PYTHONNOUSERSITE PYTHONDEVMODE PYTHONFAULTHANDLER": "- 1",
    "PYTHONOPTIMIZE": "1 2 x",
    "PYTHONHASHSEED": "0 1 random",
    "PYTHONIOENCODING": "ascii latin-1 utf-16 utf-8:strict ascii:strict",
    "PYTHONUTF8 PYTHONCOERCECLOCALE": "- 0 1",
    "PYTHONWARNINGS": "- default always x",
    "PYTHONPATH PYTHONPYCACHEPREFIX": "- /nowhere . .. ../vgg16 ../tests",
    "LANG LC_ALL LC_CTYPE": "- C C.UTF-8 POSIX de_DE.ISO-8859-1 x",
    "OMP_NUM_THREADS": "1 1 1 2 0 -1 x",
    "MKL_NUM_THREADS OPENBLAS_NUM_THREADS": "- 1 2 0 x",
    "OMP_DYNAMIC OMP_PROC_BIND KMP_AFFINITY MKL_DYNAMIC MALLOC_ARENA_MAX": "- true false x",
}
OTHER_BITS = {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"}  # numbers of threads order the sums


def settings(table: dict[str, str], rng: np.random.Generator, share: float) -> dict[str, str | None]:
    """Values of a share of the variables in a table; None: not set."""
    chosen = [
        (name, values.split()) for names, values in table.items() for name in names.split() if rng.random() < share
    ]
    return {name: None if (value := str(rng.choice(values))) == "-" else value for name, values in chosen}


@contextlib.contextmanager
def ports():
    """A port that is free, and one that is not."""
    with socket.create_server(("", 0)) as taken:
        with socket.create_server(("", 0)) as free:
            number = free.getsockname()[1]
        yield {"free": str(number), "taken": str(taken.getsockname()[1])}


def one_epoch(folder: Path, environment: dict, fresh: bool, *flags) -> tuple[int, str]:
    """Exit code and what was said on standard error, by a fresh interpreter or a process that has imported all."""
    command, said = ["train_stage1.py", *TRAIN, "--Epoch", "1", "--Save_dir", folder, *flags], folder.parent / "said"
    if not fresh:
        code = finish(forked(*command, said=said, environment=environment))
        return code, said.read_text(errors="replace")
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT / "mlp", env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, check=False, timeout=HANGS,
    )  # fmt: skip
    return done.returncode, done.stderr.decode(errors="replace")


@cache
def undisturbed() -> bytes:
    """The network of one epoch, trained by a fresh interpreter in an ordinary environment."""
    torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1).step()  # imports what takes processes that are forked seconds
    with tempfile.TemporaryDirectory() as folder:
        code, said = one_epoch(Path(folder) / "out", {**os.environ, "OMP_NUM_THREADS": "1"}, True)
        assert code == 0, said
        return (Path(folder) / "out" / "0" / "logits_best.pkl").read_bytes()


def environment(rng: np.random.Generator, folder: Path) -> None:
    """Stage 1 for an epoch, or its help, in an odd environment: the same bytes, or one line and exit code 2."""
    fresh, wanted = bool(rng.random() < 0.1), undisturbed()
    changed = settings(LATE, rng, 0.1) | (settings(EARLY, rng, 0.2) if fresh else {})
    if rng.random() < 0.5:
        changed |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "::1", "MASTER_PORT": "free"}
        changed |= dict(list(settings(LATE, rng, 0.3).items())[:2])
    help_only, out = bool(rng.random() < 0.3), folder / str(rng.choice(["out", "fôlder", "ж x"]))
    with ports() as port:
        known = {**os.environ, "OMP_NUM_THREADS": "1", **{k: port.get(v, v) for k, v in changed.items()}}
        known = {name: value for name, value in known.items() if value is not None}
        code, said = one_epoch(out, known, fresh, *(["--help"] if help_only else []))
    lines, rank = said.splitlines(), known.get("RANK", "0")  # of several processes the first one speaks
    rank = int(rank) if rank.isdecimal() else 0
    assert code in (0, 2), (changed, code, said[-400:])
    assert "Traceback" not in said, (changed, said[-400:])
    if code == 2:
        assert len(lines) == 1 or (not lines and rank > 0), (changed, said[-400:])
        assert said.startswith("train_stage1.py: error: "[: len(said)]), (changed, said[-400:])
        raise InputError(said.strip())
    same = help_only or (out / "0" / "logits_best.pkl").read_bytes() == wanted
    assert same or (fresh and changed.keys() & OTHER_BITS), changed
