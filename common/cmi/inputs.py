"""What every estimator asks of its inputs."""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral, Real

import joblib
import numpy as np
import torch
from threadpoolctl import threadpool_limits

MIN_ROWS = 3
ROUNDING = 2.0**-50  # share of a unit's magnitude that is at most a few roundings: a spread of a constant
OFFSET = 1e-3  # share of a unit's magnitude below which its spread is that of differences from one value
_TURN = threading.RLock()


def check_choice(value, name: str, choices) -> None:
    """Raise a ValueError that names the option unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")


def check_number(value, name: str, low: float, high: float = np.inf, kind: type = Real) -> None:
    """Raise a ValueError that names the option unless the value is a number of its kind from low to high."""
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
        whole = "whole " * (kind is Integral)
        raise ValueError(f"{name} is {value!r}; legal are {whole}numbers from {low:g} to {high:g}")


def as_array(value, name: str) -> np.ndarray:
    """Anything numpy can read, or a tensor of any kind and on any device, as an array; else a ValueError."""
    try:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            value = value.double() if value.is_floating_point() else value  # numpy has no bfloat16
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be read as an array: {str(error).splitlines()[0]}") from error
    if np.ma.is_masked(value):
        raise ValueError(f"{name} has masked values; all must be known")
    return array


def check_samples(array, name: str) -> np.ndarray:
    """Return the samples as a finite (n, d) float64 array or raise a ValueError that names them."""
    array = as_array(array, name)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name} must have shape (samples, units) with at least one unit, not {array.shape}")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold real numbers, not {array.dtype}")
    if len(array) < MIN_ROWS:
        raise ValueError(f"{name} has {len(array)} rows; at least {MIN_ROWS} are needed")
    with np.errstate(over="ignore"):
        samples = array.astype(np.float64, order="C")  # sums have one order, however it lay
    if not np.isfinite(samples).all():
        row, unit = np.argwhere(~np.isfinite(samples))[0]
        raise ValueError(f"{name} holds {array[row, unit]} in row {row}, unit {unit}; all values must be finite")
    return samples


def check_groups(labels, samples: np.ndarray, name: str) -> np.ndarray:
    """Return one group index from 0 per unit, in the order of the labels, or raise a ValueError that names them."""
    labels = as_array(labels, name)
    if labels.shape != samples.shape[1:]:
        raise ValueError(f"{name} must be one label per unit, shape {samples.shape[1:]}, not {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integers, not {labels.dtype}")
    return np.unique(labels, return_inverse=True)[1]


def standardise(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale every unit to mean 0 and variance 1; constant units become 0.

    Differences of values that lie close together are exact: the mean may be any number of times the spread.

    Returns
    -------
    The (n, d) scaled samples and a (d,) boolean array that is False for constant units.
    """
    low, magnitude = samples.min(axis=0), np.abs(samples).max(axis=0)
    with np.errstate(over="ignore"):
        spread = samples.max(axis=0) - low
    live = spread > ROUNDING * magnitude
    samples = samples - np.where(spread < OFFSET * magnitude, low, 0)
    magnitude = np.abs(samples).max(axis=0)
    scaled = samples / np.where(magnitude > 0, magnitude, 1)  # no overflow of squares, whatever the unit
    scaled = scaled - scaled.mean(axis=0)
    deviation = scaled.std(axis=0)
    return np.where(live, scaled / np.where(live, deviation, 1), 0.0), live


def members(groups: np.ndarray) -> np.ndarray:
    """The units of every group (G, size); -1 fills up groups that are smaller than the largest."""
    sizes = np.bincount(groups)
    found = np.full((len(sizes), sizes.max()), -1)
    found[np.arange(sizes.max()) < sizes[:, None]] = np.argsort(groups, kind="stable")
    return found


class Layer:
    """The checked and standardised inputs of an estimator.

    Attributes
    ----------
    children, parents : (n, c) and (n, p) float64 arrays, every unit with mean 0 and variance 1, constant units 0
    child_groups, parent_groups : (c,) and (p,) group indices from 0 without gaps, H and G different ones
    child_units, parent_units : (H,) and (G,) numbers of units that are not constant
    live : (H, G) False where a group of the pair has no such unit and the score is 0
    n, shape : number of rows; (H, G)
    """

    def __init__(self, children, parents, child_groups, parent_groups) -> None:
        children, parents = check_samples(children, "children"), check_samples(parents, "parents")
        if len(children) != len(parents):
            rows = f"{len(children)} and {len(parents)}"
            raise ValueError(f"children and parents need the same number of rows, not {rows}")
        self.child_groups = check_groups(child_groups, children, "child_groups")
        self.parent_groups = check_groups(parent_groups, parents, "parent_groups")
        self.children, live_children = standardise(children)
        self.parents, live_parents = standardise(parents)
        self.child_units = np.bincount(self.child_groups, live_children).astype(int)
        self.parent_units = np.bincount(self.parent_groups, live_parents).astype(int)
        self.live = (self.child_units > 0)[:, None] & (self.parent_units > 0)
        self.n, self.shape = len(parents), self.live.shape


def processors() -> int:
    """How many this process may use; a LOKY_MAX_CPU_COUNT that is no number counts as none, as OpenMP has it."""
    with contextlib.suppress(ValueError):
        return joblib.cpu_count()
    return len(os.sched_getaffinity(0))


def in_parallel(function: Callable, tasks: Sequence, n_jobs: int | Callable) -> Iterator:
    """What the function returns for every task, in order; no more workers than tasks or processors."""
    if callable(n_jobs):
        return n_jobs(function, tasks)
    cores = processors()
    workers = max(1, min(n_jobs if n_jobs > 0 else cores + 1 + n_jobs, cores, len(tasks)))
    calls = (joblib.delayed(function)(task) for task in tasks)
    return joblib.Parallel(workers, backend="threading", return_as="generator")(calls)


@contextlib.contextmanager
def one_thread_per_worker() -> Iterator[None]:
    """Keep torch and numpy from starting threads of their own: the workers are the parallelism.

    It is also what makes results independent of their number, since sums then have one order. The setting is the
    process's: callers in several threads take turns. New tensors lie on the CPU, whatever the caller's default is.
    """
    elsewhere = torch.get_default_device().type != "cpu"
    with _TURN:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with threadpool_limits(1), torch.device("cpu") if elsewhere else contextlib.nullcontext():
                yield
        finally:
            torch.set_num_threads(threads)


def out_of_memory(error: Exception) -> bool:
    """Whether it is for want of memory that numpy, or torch on a GPU or a CPU, gave up."""
    signs = "t allocate memory|out of memory|ALLOC_FAILED|is killed by signal: (Killed|Bus)"
    allocator = isinstance(error, RuntimeError) and re.search(signs, str(error))
    return bool(allocator) or isinstance(error, (MemoryError, torch.OutOfMemoryError))
