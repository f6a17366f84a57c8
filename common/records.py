"""Records: one JSON file beside what a run writes, with all that made the run and all that it measured.

Two runs are the same if their arguments, the checksums of the files they read, their data and the code of the model's
folder are the same. Entries that an older record lacks are unknown, not different.
"""

import ast
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch

from common import files, parallel
from common.errors import InputError, reason
from common.files import ROOT, display_path

MAKE_AGAIN = "remove it and run what made it again"
DEFAULTS = {"TRAINING", "RETRAINING", "GROUPS", "MAX_SPARSITY", "INNER", "SCORING"}  # compared as arguments
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn")


def record_path(path: Path) -> Path:
    """The record beside a file."""
    return path.with_suffix(".json")


def found(path: Path) -> Path:
    """The record of a file that is read: beside it, or beside what a link leads to."""
    beside = record_path(path)
    return beside if beside.is_file() else record_path(files.real(path))


def of(path: Path) -> dict:
    """What the record of a file that is read says; nothing of a file without one."""
    return read(found(path)) if found(path).is_file() else {}


def write(path: Path, content: dict) -> None:
    """Write a record; its last entry is the SHA-256 of the rest."""
    files.write_bytes(path, sealed(content))


def sealed(content: dict) -> bytes:
    """A record as its file holds it."""
    return _serialised({**content, "sha256": hashlib.sha256(_serialised(content)).hexdigest()})


def read(path: Path) -> dict:
    """What `write` wrote, to the byte."""
    written = path.read_bytes()
    try:
        content = json.loads(written)
        del content["sha256"]
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError) as error:
        raise InputError(f"{path} is damaged ({reason(error)}); {MAKE_AGAIN}") from error
    if sealed(content) != written:
        raise InputError(f"{path} is damaged: it is not as it was written; {MAKE_AGAIN}")
    return content


def _serialised(content: dict) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def save(contents: dict[Path, bytes], record: dict) -> None:
    """Write files and, last, the record beside the first of them, with the checksums of all.

    A first record, of a run at work, comes before them, so that files whose run was killed right here have an owner.
    """
    known = record_path(next(iter(contents)))
    if not known.is_file():
        write(known, {**record, "status": "running"})
    for path, content in contents.items():
        files.write_bytes(path, content)
    checksums = {path.name: hashlib.sha256(content).hexdigest() for path, content in contents.items()}
    write(known, {**record, "files": checksums})


def read_checked(path: Path, record: Path, remedy: str) -> bytes:
    """The content of a file, compared with the checksum in its record; a file from elsewhere has none.

    `remedy` says in error messages what to run to get the file.
    """
    if not path.is_file():
        raise InputError(f"{path} {'is no file' if path.exists() else 'does not exist'}; {remedy}")
    content = path.read_bytes()
    if record.is_file():
        written = read(record).get("files", {})
        expected = written.get(path.name, written.get(files.real(path).name))
        if expected is not None and hashlib.sha256(content).hexdigest() != expected:
            raise InputError(f"{path} is damaged: its checksum is not that of {record.name}; {remedy}")
    return content


def is_complete(path: Path, record: dict, remedy: str, describe=None) -> bool:
    """Whether the run that writes this file is done already; says so, with what `describe` makes of its record.

    Raises
    ------
    InputError
        If the file or its record is there from another run, or damaged, with the remedy: it must not be overwritten.
    """
    if not record_path(path).is_file():
        if path.exists():
            raise InputError(f"{path} exists without a record; {remedy}")
        return False
    there = read(record_path(path))
    check_same(path, there, record, remedy)
    written = [path.with_name(name) for name in there.get("files", [path.name])]
    complete = there.get("status") == "complete" and all(map(Path.is_file, written))  # else what is lost is made again
    for file in written if complete else ():
        read_checked(file, record_path(path), remedy)
    if complete and parallel.rank() == 0:
        print(f"{path} is complete already" + (f": {describe(there)}" if describe else ""))
    return complete


def check_same(path: Path, before: dict, now: dict, remedy: str) -> None:
    """Refuse what another run wrote, by its record before and now; where only common/ is another, say so."""
    before, now = ({**record, "processes": {"": record.get("processes", 1)}} for record in (before, now))
    for part, say in DIFFERENCES.items():
        old, new = before.get(part, {}), now.get(part, {})
        keys = (old.keys() | new.keys()) if part in ("arguments", "inputs") else (old.keys() & new.keys()) - MEASURED
        said = [
            say(key, *("by default" if value in (None, {}) else value for value in (old.get(key), new.get(key))))
            for key in sorted(keys)
            if (old.get(key) or None) != (new.get(key) or None)  # off, empty and unknown are the same
        ]
        if said:
            raise InputError(f"{path} is of a run with {', '.join(said)}; {remedy}")
    if before.get("common", now.get("common")) != now.get("common") and parallel.rank() == 0:
        print(f"{path} was begun with other code in common/; it counts all the same")


MEASURED = {"mean", "std"}  # entries of the data that follow from the others
DIFFERENCES = {  # what decides the result, and how a difference is said
    "arguments": lambda flag, old, new: f"`{flag}` {old} (now {new})",
    "inputs": lambda path, _old, _new: f"another {path}",
    "data": lambda key, old, new: f"other data: {key} {old} (now {new})",
    "code": lambda file, _old, _new: f"other code in {file}, which was edited since",
    "processes": lambda _key, old, new: f"{old} processes (now {new})",
}


def code_of(script: Path) -> dict:
    """The code that runs, as entries of a record: common/, the script, and what it imports of its folder or beside it.

    Imports within functions count too, and what was imported from below the folder in any other way.
    """
    modules = {Path(m.__file__).resolve() for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
    folder = script.parent
    there = {file for file in modules if folder in file.parents and "site-packages" not in file.parts}
    new, own = {script} | {file for file in there if file.suffix == ".py" and file.is_file()}, set()
    while new := new - own:
        own |= new
        new = {file for path in new for file in _imports(path, [folder, folder.parent])}
    code = {os.path.relpath(path, folder).replace(os.sep, "/"): syntax_hash(path) for path in sorted(own)}
    return {"code": code, "common": common_hash()}


def _imports(path: Path, places: list[Path]) -> Iterator[Path]:
    """The files in these folders, but for common/, that a file's imports may mean."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            level, package = getattr(node, "level", 0), getattr(node, "module", None) or ""
            for place, alias in product([path.parents[level - 1]] if level else places, node.names):
                parts = f"{package}.{alias.name}".strip(".").split(".")
                for stem in (place.joinpath(*parts[:k]) for k in range(1, len(parts) + 1)):
                    either = stem.with_suffix(".py"), stem / "__init__.py"
                    yield from (file for file in either if (level or parts[0] != "common") and file.is_file())


@cache
def common_hash() -> str:
    """SHA-256 of all code in common/."""
    return hashlib.sha256("".join(map(syntax_hash, sorted((ROOT / "common").rglob("*.py")))).encode()).hexdigest()


def syntax_hash(path: Path) -> str:
    """SHA-256 of the code in a file without comments, docstrings, layout and the tables of flags' defaults."""
    tree = ast.parse(path.read_bytes())
    tree.body = [node for node in tree.body if ast.unparse(node).split(maxsplit=1)[0].rstrip(":") not in DEFAULTS]
    for node in ast.walk(tree):
        match getattr(node, "body", None):
            case [ast.Expr(value=ast.Constant() as docstring), *_]:
                docstring.value = ""
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


def environment(device: torch.device) -> dict:
    """Where and with what a run is made; nothing about who runs it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu()}, {os.cpu_count()} cores"
    return {
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "device": name,
    }


def checksums(*paths: Path) -> dict[str, str]:
    """SHA-256 by path, of those files that exist."""
    return {display_path(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


@cache
def _commit() -> str:
    """The commit of this checkout, with "+" if files that git tracks differ from it; not of one that it lies in."""
    here = {"cwd": ROOT, "env": {**os.environ, "GIT_CEILING_DIRECTORIES": str(ROOT.parent)}}
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, **here)
        commit = commit.stdout.strip()
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py"], check=False, **here).returncode
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
