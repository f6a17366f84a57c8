"""Backward elimination: what a parent group tells of a child group beyond the parents that are still kept when it goes.

I(C_j; P_i | all other parents) is what is lost when P_i alone goes. Where most parents go, it undervalues redundant
ones: each of two that know the same scores nothing, although one should stay. Here the parents of each child group go
one by one, each time the one with the smallest I(C_j; P_i | those left); this is its score. By the chain rule the
scores of all parents add up to I(C_j; P). Where a loss is smaller than the one before it, because two parents say the
more the less else is known, the losses are pooled (isotonic regression), so that scores ascend in the order of removal
and their sum stays. All units are taken as jointly Gaussian: removing a group is one step of block elimination in the
parents' precision matrix.

Units before an activation are functions of their parents, so without noise the information is infinite and has no
scale. `snr` sets both: child unit u is seen with unit noise, at a signal of variance snr_u. With the share of the
network's output variance that goes through the unit as snr, information that is of no use downstream counts little.
"""

import joblib
import numpy as np
from scipy.optimize import isotonic_regression

from common.cmi.inputs import Layer, one_thread_per_worker

ORDER = 1e-12  # relative difference by which equal scores keep their order


def scores(layer: Layer, covariance: np.ndarray, snr: np.ndarray | None = None, n_jobs: int = 1) -> np.ndarray:
    """Scores (H, G) in nats, for each child group ascending in the order of removal.

    Parameters
    ----------
    layer : the samples and groups
    covariance : (p + c, p + c) of parents and children, positive definite
    snr : (c,) signal-to-noise ratio (of variances) at which each child unit is seen; none: without noise
    n_jobs : parallel workers
    """
    p = len(layer.parent_groups)
    signal, noise = (np.ones(len(layer.child_groups)), 0.0) if snr is None else (np.asarray(snr, float), 1.0)
    precision = np.linalg.inv(covariance[:p, :p])
    regression = precision @ covariance[:p, p:] * np.sqrt(signal)
    children = covariance[p:, p:] * np.sqrt(np.outer(signal, signal))
    residual = children - (covariance[p:, :p] * np.sqrt(signal)[:, None]) @ regression + noise * np.eye(len(signal))

    def row(j: int) -> np.ndarray:
        own = layer.child_groups == j
        return _row(layer.parent_groups, layer.parent_units > 0, precision, regression[:, own], residual[own][:, own])

    with one_thread_per_worker():
        return np.stack(joblib.Parallel(n_jobs, backend="threading")(map(joblib.delayed(row), range(layer.shape[0]))))


def _row(
    groups: np.ndarray, live: np.ndarray, precision: np.ndarray, regression: np.ndarray, residual: np.ndarray
) -> np.ndarray:
    """The scores (G,) of one child group with all parent groups; those that are not live score 0."""
    order, losses, left = [], [], np.flatnonzero(live)
    while len(left):
        stay = np.flatnonzero(np.isin(groups, left))  # from time to time the matrices shrink to what is left
        groups, precision, regression = groups[stay], precision[np.ix_(stay, stay)], regression[stay]
        members = [np.flatnonzero(groups == g) for g in left]
        sizes, open_ = np.array([len(units) for units in members]), np.ones(len(left), bool)
        by_size = [(sizes == size, np.stack([m for m in members if len(m) == size])) for size in np.unique(sizes)]
        for _ in range(-(-len(left) // 4)):
            gains = np.where(open_, _gains(by_size, precision, regression, residual), np.inf)
            gone = np.argmin(gains)
            order.append(left[gone])
            losses.append(gains[gone])
            open_[gone] = False
            k = members[gone]
            solved = np.linalg.solve(precision[np.ix_(k, k)], np.hstack([precision[k], regression[k]]))
            across, onto = np.split(solved, [len(precision)], axis=1)
            residual = residual + regression[k].T @ onto
            regression = regression - across.T @ regression[k]
            precision -= across.T @ precision[k]
            precision[k, k] = 1  # the rest of these rows and columns is 0 by now, up to rounding
        left = left[open_]
    row = np.zeros(len(live))
    if order:
        row[order] = isotonic_regression(losses).x * (1 + ORDER * np.arange(len(order)))
    return row


def _gains(
    by_size: list[tuple[np.ndarray, np.ndarray]], precision: np.ndarray, regression: np.ndarray, residual: np.ndarray
) -> np.ndarray:
    """I(C_j; P_i | those left) of all groups i: by how much the child's residual covariance grows without them.

    `by_size` holds, for each size of a group, which groups (G,) have it and their units (groups, size).
    """
    gains = np.empty(len(by_size[0][0]))
    for which, units in by_size:
        own = regression[units]
        lost = own.transpose(0, 2, 1) @ np.linalg.solve(precision[units[:, :, None], units[:, None, :]], own)
        gains[which] = np.linalg.slogdet(residual + lost)[1]
    return (gains - np.linalg.slogdet(residual)[1]) / 2
