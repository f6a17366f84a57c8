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

from common.cmi.inputs import Layer, in_parallel, members

ROWS = 256  # parents removed between two updates of the whole precision matrix
MEMORY = 2**27  # bytes of precision matrices that one worker changes at a time
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
    p, live = len(layer.parent_groups), np.flatnonzero(layer.parent_units)
    signal, noise = (np.ones(len(layer.child_groups)), 0.0) if snr is None else (np.asarray(snr, float), 1.0)
    precision = np.linalg.inv(covariance[:p, :p])
    regression = precision @ covariance[:p, p:] * np.sqrt(signal)
    children = covariance[p:, p:] * np.sqrt(np.outer(signal, signal))
    residual = children - (covariance[p:, :p] * np.sqrt(signal)[:, None]) @ regression + noise * np.eye(len(signal))
    parents, own = members(layer.parent_groups)[live], members(layer.child_groups)
    size, everything = parents.shape[1], parents.ravel()
    precision = _block(precision, everything, everything, np.eye(parents.size))

    def rows(groups: np.ndarray) -> np.ndarray:
        known = np.stack([_block(regression, everything, units, 0.0) for units in own[groups]])
        left = np.stack([_block(residual, units, units, np.eye(own.shape[1])) for units in own[groups]])
        found = np.zeros((len(groups), layer.shape[1]))
        for row, order, losses in zip(found, *_eliminate(precision, known, left, size), strict=True):
            row[live[order]] = isotonic_regression(losses).x * (1 + ORDER * np.arange(len(order)))
        return found

    at_once = max(1, MEMORY // max(1, precision.nbytes))
    chunks = np.split(np.arange(layer.shape[0]), range(at_once, layer.shape[0], at_once))
    return np.vstack(list(in_parallel(rows, chunks, n_jobs))) if len(live) else np.zeros(layer.shape)


def _block(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray, filling) -> np.ndarray:
    """These rows and columns of a matrix; where one of them is -1, the filling."""
    return np.where((rows >= 0)[:, None] & (columns >= 0), matrix[np.ix_(rows, columns)], filling)


def _eliminate(precision: np.ndarray, regression: np.ndarray, residual: np.ndarray, size: int) -> tuple:
    """Remove all parent groups from several child groups, side by side.

    What removals do to the precision matrix is put off: until it is worth one matrix product, only the rows of the
    groups that go and the diagonal blocks are brought up to date.

    Parameters
    ----------
    precision : (p, p) of the parents, `size` of them a group
    regression : (b, p, d) of each child group on the parents
    residual : (b, d, d) covariance of what the parents leave of it

    Returns
    -------
    The groups in the order of removal, and the losses in nats, both (b, p / size).
    """
    each, order, losses = np.arange(len(residual))[:, None], [], []
    left, precision = np.tile(np.arange(len(precision) // size), (len(residual), 1)), [precision] * len(residual)
    while (count := left.shape[1]) > 0:
        blocks = np.arange(count * size).reshape(count, size, 1)
        diagonal = np.stack([matrix[blocks, blocks.swapaxes(1, 2)] for matrix in precision])
        steps = np.zeros((len(each), min(count, max(1, ROWS // size)) * size, count * size))
        stay = np.ones(left.shape, bool)
        for begin in range(0, steps.shape[1], size):  # the matrix is precision - the sum of the steps' outer products
            gains = np.where(stay, _gains(diagonal, regression, residual), np.inf)
            gone = gains.argmin(1)[:, None]
            order.append(left[each, gone])
            losses.append(gains[each, gone])
            stay[each, gone] = False
            units, done, step = _units(gone, size), steps[:, :begin], steps[:, begin : begin + size]
            rows = np.stack([matrix[own] for matrix, own in zip(precision, units, strict=True)])
            rows -= done[each, :, units] @ done
            root = np.linalg.cholesky(np.take_along_axis(rows, units[:, None], 2))
            step[:] = np.linalg.solve(root, rows)
            known = np.linalg.solve(root, regression[each, units])
            residual = residual + known.swapaxes(1, 2) @ known
            regression = regression - step.swapaxes(1, 2) @ known
            own = step.reshape(len(each), size, count, size).transpose(0, 2, 3, 1)
            diagonal -= own @ own.swapaxes(2, 3)
            diagonal[each, gone] = np.eye(size)  # 0 by now, and never looked at again
        places = np.nonzero(stay)[1].reshape(len(each), -1)
        left, units = left[each, places], _units(places, size)
        regression, steps = regression[each, units], [step.take(own, 1) for step, own in zip(steps, units, strict=True)]
        precision = [m[own].take(own, 1) - step.T @ step for m, own, step in zip(precision, units, steps, strict=True)]
    return np.hstack(order), np.hstack(losses)


def _units(groups: np.ndarray, size: int) -> np.ndarray:
    """The units (b, k * size) of groups (b, k) that lie one behind the other."""
    return (groups[:, :, None] * size + np.arange(size)).reshape(len(groups), -1)


def _gains(diagonal: np.ndarray, regression: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """I(C_j; P_i | those left) of all groups (b, G): by how much the child's residual covariance grows without them.

    `diagonal` (b, G, size, size) holds the groups' blocks of the precision matrix.
    """
    own = regression.reshape(*diagonal.shape[:3], -1)
    if own.shape[3] > 2 * own.shape[2]:  # a large child group: det(R + A'A) = det(R) det(1 + A inv(R) A') is smaller
        through = np.linalg.solve(residual, regression.swapaxes(1, 2)).swapaxes(1, 2).reshape(own.shape)
        return (_log_det(diagonal + own @ through.swapaxes(2, 3)) - _log_det(diagonal)) / 2
    solved = own / diagonal if own.shape[2] == 1 else np.linalg.solve(diagonal, own)
    grown = residual[:, None] + own.swapaxes(2, 3) @ solved
    return (_log_det(grown) - _log_det(residual)[:, None]) / 2


def _log_det(matrices: np.ndarray) -> np.ndarray:
    """Of positive definite matrices (..., d, d); numbers are not worth a factorisation each."""
    return np.log(matrices[..., 0, 0]) if matrices.shape[-1] == 1 else np.linalg.slogdet(matrices)[1]
