"""What every estimator asks of its inputs."""

import numpy as np

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
