"""The formats of the files that stages hand on: checkpoints, arrays, states. All are checked when they are read.

Beside each lies a record with its SHA-256 (see `records`); a state carries its own. Reading executes nothing.
"""

import hashlib
import io
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from common import files, records
from common.errors import InputError, reason

WRAPPERS = ("state_dict", "model", "net", "model_state_dict")  # under which others keep weights
UNFINISHED = {"running": "is not finished", "diverged": "diverged"}
SAFE_TORCH = "2.10"  # the first whose weights_only holds: CVE-2025-32434 (2.6), CVE-2026-24747 (2.10)


def score_paths(folder: Path, postfix: str) -> tuple[Path, Path, Path]:
    """Scores, labels of parents and labels of children of all layer pairs of one postfix; see `score_path`."""
    return tuple(folder / f"{kind}_{postfix}.npy" for kind in ("I_parent", "Labels", "Labels_children"))


def score_path(family: Path, parent: str, child: str) -> Path:
    """The file of one layer pair in a family."""
    return family.with_name(f"{family.name.removesuffix('.npy')}_{parent}_{child}.npy")


def sibling(scores: Path, kind: str) -> Path:
    """A further file about the scores of one layer pair."""
    return scores.with_name(scores.name.replace("I_parent", kind, 1))


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


def load_checkpoint(path: Path, *, foreign: bool = False) -> dict:
    """Read a checkpoint: a dictionary with `state_dict`; files that hold anything but tensors and plain values fail.

    `foreign` also takes what other programs write: weights alone, or under another name.
    """
    remedy = "run train_stage1.py first, or name another file"
    content = records.read_checked(path, records.found(path), remedy)
    checkpoint = _load(content, path, "a checkpoint of tensors and plain values", remedy)
    if foreign:
        masks = checkpoint.get("masks") if isinstance(checkpoint, dict) else {}
        checkpoint = {"state_dict": _unwrapped(checkpoint), "masks": masks if isinstance(masks, dict) else {}}
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{path} has no 'state_dict' of tensors; {remedy}")
    for key, tensor in state.items():
        try:
            if tensor.nbytes > len(content):
                raise InputError(f"{path}: {key} is larger than the file; {remedy}")
            if tensor.is_complex():
                raise TypeError
            finite = bool((tensor.isfinite() & tensor.float().isfinite()).all())  # networks are of single precision
        except (RuntimeError, TypeError) as error:  # float8, sparse, quantised, without storage
            raise InputError(f"{path}: {key} is {tensor.dtype}, {tensor.layout}; legal: dense real numbers") from error
        if not finite:
            raise InputError(f"{path}: {key} holds values that are not finite in single precision; {remedy}")
    return checkpoint


def _unwrapped(checkpoint):
    """The weights in what another program wrote."""
    for _ in WRAPPERS:  # not without end: a dictionary may hold itself
        if isinstance(checkpoint, dict):
            inside = (checkpoint.get(wrapper) for wrapper in WRAPPERS)
            checkpoint = next((value for value in inside if isinstance(value, dict)), checkpoint)
    return dict(checkpoint) if isinstance(checkpoint, dict) else checkpoint


def _own_names(state: dict, network: torch.nn.Module) -> dict:
    """A state without what other programs write before every name: of a wrapper, or of what holds the network."""
    names = [key for key in state if isinstance(key, str)]
    first = next(iter(network.state_dict()), "")
    prefix = next((key.removesuffix(first) for key in names if key.endswith(f".{first}")), "")
    if len(names) < len(state) or not all(key.startswith(prefix) for key in names):
        return state
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _load(content: bytes, path: Path, what: str, remedy: str):
    """What torch.save wrote: tensors and plain values, and nothing that unpacks to more than the file."""
    if torch.__version__ < SAFE_TORCH:
        raise InputError(f"torch {torch.__version__} may execute code in what it reads; install {SAFE_TORCH} or newer")
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as file:
                if sum(member.file_size for member in file.infolist()) > len(content):
                    raise ValueError("it is compressed, as torch.save never does")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise whatever a broken or hostile file leads them to
        refused = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error))
        why = f"it holds a {refused[1]}" if refused else reason(error).split(". ")[0]
        raise InputError(f"{path} is not {what} ({why}); {remedy}") from error


def load_weights(network: torch.nn.Module, path: Path, *, foreign: bool = False) -> dict:
    """Load a finished run's weights into the network, all of them or none; returns the checkpoint.

    `foreign`: also another program's, whose names may all have a prefix.
    """
    status = records.of(path).get("status")
    if status in UNFINISHED:
        raise InputError(f"{path} is of a run that {UNFINISHED[status]}; run the command that makes it again")
    checkpoint = load_checkpoint(path, foreign=foreign)
    state = checkpoint["state_dict"]
    load_state_dict(network, _own_names(state, network) if foreign else state, path)
    return checkpoint


def load_state_dict(network: torch.nn.Module, state: dict[str, torch.Tensor], source) -> None:
    """Load weights that have exactly the network's names and shapes; counters of batch norm may be absent."""
    own = network.state_dict()
    state = {**{k: v for k, v in own.items() if k.endswith(".num_batches_tracked")}, **state}
    expected, found = ({k: tuple(v.shape) for k, v in tensors.items()} for tensors in (own, state))
    if expected != found:
        key = next(k for k in (*expected, *found) if expected.get(k) != found.get(k))
        there, here = found.get(key, "absent"), expected.get(key, "absent")
        raise InputError(f"{source} is of another network: there {key} is {there}, here {here}")
    network.load_state_dict(state)


def save_state(path: Path, state: dict) -> None:
    """Write what an interrupted run needs to go on, behind its own checksum."""
    content = checkpoint_bytes(state)
    files.write_bytes(path, hashlib.sha256(content).digest() + content)


def load_state(path: Path, remedy: str) -> dict | None:
    """What `save_state` wrote, if the file is there; `remedy` says what to do if it is damaged."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise InputError(f"{path} is damaged; {remedy}")
    state = _load(content[32:], path, "the state of an interrupted run", remedy)
    if not isinstance(state, dict):
        raise InputError(f"{path} is not the state of an interrupted run; {remedy}")
    return state


def load_array(path: Path, record: Path, remedy: str) -> np.ndarray:
    """Read an .npy file of numbers; pickled objects fail."""
    content = records.read_checked(path, record, remedy)
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            raise ValueError("not an array of numbers")
    except Exception as error:  # numpy raises whatever a broken or hostile file leads it to
        raise InputError(f"{path} is not a plain .npy array ({reason(error).split('. ')[0]}); {remedy}") from error
    return array


def _to_cpu(value):
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()  # alone in its storage, in the layout that a resumed optimizer needs
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_cpu(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value  # what weights_only would not read
