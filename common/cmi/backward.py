"""Backward elimination: what a parent group tells of a child group beyond the parents that are still kept when it goes.

I(C_j; P_i | all other parents) is what is lost when P_i alone goes. Where most parents go, it undervalues redundant
ones: each of two that know the same scores nothing, although one should stay. Here the parents of each child group go
one by one, each time the one with the smallest I(C_j; P_i | those left); this is its score. By the chain rule the
scores of all parents add up to I(C_j; P). Where a loss is smaller than the one before it, because two parents say the
more the less else is known, the losses are pooled (isotonic regression), so that scores ascend in the order of removal
and their sum stays. All units are taken as jointly Gaussian: removing a group is one step of a block Cholesky
factorisation of the parents' precision matrix.

Units before an activation are functions of their parents, so without noise the information is infinite and has no
scale. `snr` sets both: child unit u is seen with unit noise, at a signal of variance snr_u. With the share of the
network's output variance that goes through the unit as snr, information that is of no use downstream counts little.
"""

import numpy as np
from scipy.optimize import isotonic_regression

from common.cmi.inputs import Layer, in_parallel

PERIOD = 32  # removals between two updates of the whole precision matrix
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

    return np.stack(list(in_parallel(row, range(layer.shape[0]), n_jobs)))


def _row(
    groups: np.ndarray, live: np.ndarray, precision: np.ndarray, regression: np.ndarray, residual: np.ndarray
) -> np.ndarray:
    """The scores (G,) of one child group with all parent groups; those that are not live score 0.

    What removals do to the precision matrix is put off: until it is worth one matrix product, only the rows of the
    group that goes and the diagonal blocks are brought up to date.
    """
    order, losses, left = [], [], np.flatnonzero(live)
    while len(left):
        stay = np.flatnonzero(np.isin(groups, left))
        groups, precision, regression = groups[stay], precision[np.ix_(stay, stay)], regression[stay]
        members = [np.flatnonzero(groups == g) for g in left]
        sizes, open_ = np.array([len(units) for units in members]), np.ones(len(left), bool)
        by_size = [(sizes == size, np.stack([m for m in members if len(m) == size])) for size in np.unique(sizes)]
        diagonal = [precision[units[:, :, None], units[:, None, :]] for _, units in by_size]
        steps = np.zeros((PERIOD, sizes.max(), len(stay)))  # the matrix is precision - the sum of steps' outer products
        done = steps.reshape(-1, len(stay))  # the same memory
        for step in steps[: len(left)]:
            gains = np.where(open_, _gains(by_size, diagonal, regression, residual), np.inf)
            gone = np.argmin(gains)
            order.append(left[gone])
            losses.append(gains[gone])
            open_[gone] = False
            k = members[gone]
            rows = precision[k] - done[:, k].T @ done
            root = np.linalg.cholesky(rows[:, k])
            step[: len(k)] = np.linalg.solve(root, rows)
            known = np.linalg.solve(root, regression[k])
            residual = residual + known.T @ known
            regression = regression - step[: len(k)].T @ known
            for (which, units), block in zip(by_size, diagonal, strict=True):
                own = step[:, units].transpose(1, 2, 0)
                block -= own @ own.transpose(0, 2, 1)
                block[~open_[which]] = np.eye(units.shape[1])  # 0 by now, and never looked at again
        precision, left = precision - done.T @ done, left[open_]
    row = np.zeros(len(live))
    if order:
        row[order] = isotonic_regression(losses).x * (1 + ORDER * np.arange(len(order)))
    return row


def _gains(
    by_size: list[tuple[np.ndarray, np.ndarray]],
    diagonal: list[np.ndarray],
    regression: np.ndarray,
    residual: np.ndarray,
) -> np.ndarray:
    """I(C_j; P_i | those left) of all groups i: by how much the child's residual covariance grows without them.

    `by_size` holds, for each size of a group, which groups (G,) have it and their units (groups, size); `diagonal`
    their blocks (groups, size, size) of the precision matrix.
    """
    gains = np.empty(len(by_size[0][0]))
    for (which, units), block in zip(by_size, diagonal, strict=True):
        own = regression[units]
        solved = own / block if units.shape[1] == 1 else np.linalg.solve(block, own)
        gains[which] = _log_det(residual + own.transpose(0, 2, 1) @ solved)
    return (gains - _log_det(residual)) / 2


def _log_det(matrices: np.ndarray) -> np.ndarray:
    """Of positive definite matrices (..., d, d); numbers are not worth a factorisation each."""
    return np.log(matrices[..., 0, 0]) if matrices.shape[-1] == 1 else np.linalg.slogdet(matrices)[1]
