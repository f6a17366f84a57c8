"""Every path and file format of the project, in one place.

A file is written under a temporary name and renamed, so that nobody ever sees half of one. Beside each lies a record,
a JSON file that holds the arguments, the circumstances, what was measured and the SHA-256 of the files it speaks of;
that is verified whenever such a file is read, and so is the record's own, its last entry. While a run is at work it
holds a lock on `.<file>.lock`, which the system takes back when the process ends, however it ends.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import platform
import subprocess
import time
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from common import parallel
from common.errors import InputError, reason

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
MAKE_AGAIN = "remove it and run what made it again"
SAFE_TORCH = "2.10"  # the first whose weights_only holds: CVE-2025-32434 (2.6), CVE-2026-24747 (2.10)
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn")


def under_results(path: str | Path) -> Path:
    """Relative paths lie under `results/`; absolute ones are taken as they are."""
    return Path(os.path.normpath(RESULTS / path))


def public(path: Path) -> str:
    """The path as records show it: relative to the repository, or only its name where it lies elsewhere."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def record_of(path: Path) -> Path:
    """The record beside a file."""
    return path.with_suffix(".json")


def score_families(folder: Path, postfix: str) -> tuple[Path, Path, Path]:
    """Scores, labels of parents and labels of children of all layer pairs of one postfix; see `of_pair`."""
    return tuple(folder / f"{kind}_{postfix}.npy" for kind in ("I_parent", "Labels", "Labels_children"))


def of_pair(family: Path, parent: str, child: str) -> Path:
    """The file of one layer pair in a family."""
    return family.with_name(f"{family.name.removesuffix('.npy')}_{parent}_{child}.npy")


def beside(scores: Path, kind: str) -> Path:
    """A further file about the scores of one layer pair."""
    return scores.with_name(scores.name.replace("I_parent", kind, 1))


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Within it no other process writes this file.

    Raises
    ------
    InputError
        At once, if another process is at it, or if nothing can be written there.
    """
    if parallel.rank():
        yield
        return
    lock, new = path.with_name(f".{path.name}.lock"), absent(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(lock)
    except BlockingIOError as error:
        raise InputError(f"{path} is being written by another process; wait, or name another directory") from error
    except OSError as error:
        raise InputError(f"{path.parent} cannot be written to ({error.strerror}); name another directory") from error
    with file:
        for left in path.parent.glob(f".{path.stem}.*.tmp"):  # by a process that was killed
            left.unlink(missing_ok=True)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            remove_empty(new)


def absent(folder: Path) -> list[Path]:
    """The folder and those above it, as far as they do not exist."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made for nothing."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _locked(lock: Path) -> io.TextIOWrapper:
    """The file, locked. The process that had the lock before may have removed it meanwhile: then a new one."""
    while True:
        file = lock.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        except FileNotFoundError:
            pass
        except OSError:
            file.close()
            raise
        file.close()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all; of several processes only the first writes."""
    if parallel.rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def checkpoint_bytes(state: dict) -> bytes:
    """A checkpoint as a file: tensors on the CPU, plain values, no code."""
    buffer = io.BytesIO()
    torch.save(_to_cpu(state), buffer)
    return buffer.getvalue()


def array_bytes(array: np.ndarray) -> bytes:
    """An array as an .npy file without pickled objects."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def save(files: dict[Path, bytes], record: dict) -> None:
    """Write files and, last, the record beside the first of them, with the checksums of all.

    A first record, of a run at work, comes before them, so that files whose run was killed right here have an owner.
    """
    known = record_of(next(iter(files)))
    if not known.is_file():
        write_json(known, {**record, "status": "running"})
    for path, content in files.items():
        write_bytes(path, content)
    checksums = {path.name: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    write_json(known, {**record, "files": checksums})


def write_json(path: Path, content: dict) -> None:
    """Write a record; its last entry is the SHA-256 of the rest."""
    seal = hashlib.sha256(_serialised(content)).hexdigest()
    write_bytes(path, _serialised({**content, "sha256": seal}))


def read_json(path: Path) -> dict:
    """What `write_json` wrote, to the byte."""
    written = path.read_bytes()
    try:
        content = json.loads(written)
        seal = content.pop("sha256")
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError) as error:
        raise InputError(f"{path} is damaged ({reason(error)}); {MAKE_AGAIN}") from error
    if hashlib.sha256(_serialised(content)).hexdigest() != seal or _serialised({**content, "sha256": seal}) != written:
        raise InputError(f"{path} is damaged: it is not as it was written; {MAKE_AGAIN}")
    return content


def _serialised(content: dict) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def read_checked(path: Path, record: Path, remedy: str) -> bytes:
    """The content of a file after comparing its checksum with its record, where there is one.

    Parameters
    ----------
    path : the file
    record : the JSON file that may hold the file's checksum; a file from elsewhere has none and is read unchecked
    remedy : what to run to get the file, for error messages
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; {remedy}")
    content = path.read_bytes()
    if record.is_file():
        expected = read_json(record).get("files", {}).get(path.name)
        if expected is not None and hashlib.sha256(content).hexdigest() != expected:
            raise InputError(f"{path} is damaged: its checksum is not that of {record.name}; {remedy}")
    return content


def load_checkpoint(path: Path, *, plain: bool = False) -> dict:
    """Read a checkpoint: a dictionary with `state_dict`; files that hold anything but tensors and plain values fail.

    Parameters
    ----------
    path : the file
    plain : also take a file that holds the `state_dict` alone
    """
    remedy = "run train_stage1.py first, or name another file"
    content = read_checked(path, record_of(path), remedy)
    checkpoint = _load(content, path, "a checkpoint of tensors and plain values", remedy)
    if plain and isinstance(checkpoint, dict) and "state_dict" not in checkpoint:
        checkpoint = {"state_dict": dict(checkpoint)}
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{path} has no 'state_dict' of tensors; {remedy}")
    for key, tensor in state.items():
        if tensor.nbytes > len(content):
            raise InputError(f"{path}: {key} is larger than the file; {remedy}")
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {key} holds values that are not finite; {remedy}")
    return checkpoint


def _load(content: bytes, path: Path, what: str, remedy: str):
    """What torch.save wrote: tensors and plain values, and nothing that unpacks to more than the file."""
    if torch.__version__ < SAFE_TORCH:
        raise InputError(
            f"torch {torch.__version__} may execute code in files that it reads; install {SAFE_TORCH} or newer"
        )
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as file:
                if sum(member.file_size for member in file.infolist()) > len(content):
                    raise ValueError("it is compressed, as torch.save never does")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise whatever a broken or hostile file leads them to
        raise InputError(f"{path} is not {what} ({reason(error).split('. ')[0]}); {remedy}") from error


def load_weights(network: torch.nn.Module, path: Path) -> dict:
    """Load a checkpoint's weights into the network, all of them or none; returns the checkpoint."""
    checkpoint = load_checkpoint(path)
    load_state_dict(network, checkpoint["state_dict"], path)
    return checkpoint


def load_state_dict(network: torch.nn.Module, state: dict[str, torch.Tensor], source) -> None:
    """Load weights that have exactly the network's names and shapes."""
    expected = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in state.items()}
    if expected != found:
        key = next(k for k in (*expected, *found) if expected.get(k) != found.get(k))
        there, here = found.get(key, "absent"), expected.get(key, "absent")
        raise InputError(f"{source} is of another network: there {key} is {there}, here {here}")
    network.load_state_dict(state)


def save_state(path: Path, state: dict) -> None:
    """Write what an interrupted run needs to go on, behind its own checksum."""
    content = checkpoint_bytes(state)
    write_bytes(path, hashlib.sha256(content).digest() + content)


def load_state(path: Path, key: str, remedy: str) -> dict | None:
    """What `save_state` wrote, if the file is there and of the run that `key` names; `remedy`, if it is damaged."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise InputError(f"{path} is damaged; {remedy}")
    state = _load(content[32:], path, "the state of an interrupted run", remedy)
    return state if isinstance(state, dict) and state.get("key") == key else None


def load_array(path: Path, record: Path, remedy: str) -> np.ndarray:
    """Read an .npy file of numbers; pickled objects fail."""
    content = read_checked(path, record, remedy)
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            raise ValueError("not an array of numbers")
    except Exception as error:  # numpy raises whatever a broken or hostile file leads it to
        raise InputError(f"{path} is not a plain .npy array ({reason(error).split('. ')[0]}); {remedy}") from error
    return array


def is_complete(path: Path, record: dict) -> bool:
    """Whether the run that writes this file is done already and the file is here.

    A record without its file, as in a fresh clone, does not count: the run of the same arguments is made again, from
    inputs that another machine or version may have made a little different.

    Parameters
    ----------
    path : the first file that the run writes
    record : of the run; its "arguments" and the checksums of its "inputs", by path, decide the result

    Raises
    ------
    InputError
        If the file or its record is there from another run: it must not be overwritten.
    """
    if not record_of(path).is_file():
        if path.exists():
            raise InputError(f"{path} exists without a record; name another directory or remove it")
        return False
    there = read_json(record_of(path))
    for part in ("arguments", "inputs") if path.is_file() else ("arguments",):
        before, now = (
            {k: v for k, v in r.get(part, {}).items() if v is not None and v is not False} for r in (there, record)
        )
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                what = f"--{key} {before.get(key)} (now {now.get(key)})" if part == "arguments" else f"another {key}"
                raise InputError(
                    f"{path} is from a run with {what}; name another directory (stage 2: --name_postfix), or remove it"
                )
    complete = there.get("status") == "complete" and path.is_file()
    if complete:
        print(f"{path} is complete already")
    return complete


def checksums(*paths: Path) -> dict[str, str]:
    """SHA-256 by path, of those files that exist."""
    return {public(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


def circumstances(device: torch.device) -> dict:
    """Where and with what a run was made; nothing about who ran it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu()}, {os.cpu_count()} cores"
    return {
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "device": name,
    }


@cache
def _commit() -> str:
    """The commit of this checkout, with "+" if files that git tracks differ from it."""
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


@cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _to_cpu(value):
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()  # alone in its storage, in the layout that a resumed optimizer needs
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    return value
