"""What every estimator asks of its inputs."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

MIN_ROWS = 3


def check_samples(array, name: str) -> np.ndarray:
    """Return the samples as a finite (n, d) float64 array or raise a ValueError that names them."""
    array = np.asarray(array)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name} must have shape (samples, units) with at least one unit, not {array.shape}")
    if not (np.issubdtype(array.dtype, np.number) and np.isrealobj(array)):
        raise ValueError(f"{name} must hold real numbers, not {array.dtype}")
    if len(array) < MIN_ROWS:
        raise ValueError(f"{name} has {len(array)} rows; at least {MIN_ROWS} are needed")
    if not np.isfinite(array).all():
        row, unit = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(f"{name} holds {array[row, unit]} in row {row}, unit {unit}; all values must be finite")
    return array.astype(np.float64)


def check_groups(labels, samples: np.ndarray, name: str) -> np.ndarray:
    """Return one group index from 0 per unit, in the order of the labels, or raise a ValueError that names them."""
    labels = np.asarray(labels)
    if labels.shape != samples.shape[1:]:
        raise ValueError(f"{name} must be one label per unit, shape {samples.shape[1:]}, not {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, not {labels.dtype}")
    return np.unique(labels, return_inverse=True)[1]


def standardise(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale every unit to mean 0 and variance 1; constant units become 0.

    Returns
    -------
    The (n, d) scaled samples and a (d,) boolean array that is False for constant units.
    """
    magnitude = np.abs(samples).max(axis=0)
    scaled = samples / np.where(magnitude > 0, magnitude, 1)  # no overflow of squares, whatever the unit
    scaled = scaled - scaled.mean(axis=0)
    deviation = scaled.std(axis=0)
    live = deviation > 1e-9
    return np.where(live, scaled / np.where(live, deviation, 1), 0.0), live


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


@contextlib.contextmanager
def one_thread_per_worker() -> Iterator[None]:
    """Keep torch from starting threads of its own: the workers are the parallelism.

    It is also what makes results independent of their number, since sums then have one order.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def out_of_memory(error: Exception) -> bool:
    """Whether it is for want of memory that numpy, or torch on a GPU or a CPU, gave up."""
    allocator = isinstance(error, RuntimeError) and "t allocate memory" in str(error)
    return allocator or isinstance(error, (MemoryError, torch.OutOfMemoryError))
