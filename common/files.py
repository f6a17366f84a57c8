"""Paths and files: nobody ever sees half of one, and of two processes that want the same one only one gets it.

A file is written under a temporary name and renamed. While a run is at work it holds a lock on `.<file>.lock`, which
the system takes back when the process ends, however it ends.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from common import parallel
from common.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"


def under_results(path: str | Path) -> Path:
    """Relative paths lie under `results/`; absolute ones are taken as they are."""
    return Path(os.path.normpath(RESULTS / path))


def real(path: Path) -> Path:
    """Where a path leads through links; unlike `Path.resolve` also of a link to itself."""
    return Path(os.path.realpath(path))


def display_path(path: Path) -> str:
    """The path as records show it: relative to the repository, or only its name where it lies elsewhere."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Within it no other process writes this file.

    Raises
    ------
    InputError
        If another process is at it, or if nothing can be written there.
    """
    if parallel.rank():
        yield
        return
    file, new = path.with_name(f".{path.name}.lock"), absent(path.parent)
    lock = filelock.FileLock(file, timeout=0.2, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise InputError(f"{path} is being written by another process; wait, or name another directory") from error
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise InputError(f"{path.parent} is on a file system without locks (flock); name another one") from error
        where = file if os.access(path.parent, os.W_OK) else path.parent  # another user's lock, or the folder
        raise InputError(f"{where} cannot be written to ({error.strerror}); name another directory") from error
    try:
        for left in path.parent.glob(f".{path.stem}.*.tmp"):  # by a process that was killed
            left.unlink(missing_ok=True)
        yield
    finally:
        file.unlink(missing_ok=True)  # who waits for it makes a new one
        lock.release()
        remove_empty(new)


def absent(folder: Path) -> list[Path]:
    """The folder and those above it, as far as they do not exist."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made for nothing."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


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
    except OSError as error:  # what a full disk raises names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
