"""Forward selection: what a parent group tells of a child group beyond the parents that were chosen before it.

I(C_j; P_i | all other parents) is what is lost when P_i alone goes. Where most parents go, it undervalues redundant
ones: each of two that know the same scores nothing, although one should stay. Here the parents of each child group are
chosen one by one, each time the one with the largest I(C_j; P_i | those chosen before); this is its score. By the chain
rule the scores of the first k add up to I(C_j; these k), and those of all to I(C_j; P). All units are taken as jointly
Gaussian: choosing a group is one step of block elimination in the covariance, after which gains are determinants.
"""

import joblib
import numpy as np

from common.cmi.inputs import Layer, one_thread_per_worker


def scores(layer: Layer, covariance: np.ndarray, n_jobs: int = 1) -> np.ndarray:
    """Scores (H, G) in nats, for each child group descending in the order of choice.

    Parameters
    ----------
    layer : the samples and groups
    covariance : (p + c, p + c) of parents and children, positive definite
    n_jobs : parallel workers
    """
    parallel = joblib.Parallel(n_jobs, backend="threading")
    with one_thread_per_worker():
        rows = parallel(joblib.delayed(_row)(layer, covariance, j) for j in range(layer.shape[0]))
    return np.stack(rows)


def _row(layer: Layer, covariance: np.ndarray, j: int) -> np.ndarray:
    """The scores of one child group with all parent groups."""
    n_parents, n_groups = len(layer.parent_groups), layer.shape[1]
    own = n_parents + np.flatnonzero(layer.child_groups == j)
    units = np.r_[:n_parents, own]
    left = np.zeros((len(units) + 1,) * 2)  # given what is chosen so far; the last unit is of no account
    left[:-1, :-1] = covariance[np.ix_(units, units)]
    left[-1, -1] = 1
    child = np.arange(n_parents, len(units))
    members = _members(layer.parent_groups, len(units))
    both = np.hstack([members, np.tile(child, (n_groups, 1))])
    row, lowest, open_ = np.zeros(n_groups), np.inf, np.ones(n_groups, bool)
    for _ in range(n_groups):
        gains = (_log_dets(left, members) + _log_dets(left, child[None]) - _log_dets(left, both)) / 2
        chosen = np.argmax(np.where(open_, gains, -np.inf))
        lowest = min(lowest, gains[chosen])  # a later choice never outranks an earlier one
        row[chosen], open_[chosen] = max(lowest, 0.0), False
        gone = members[chosen][members[chosen] < len(units)]
        left -= left[:, gone] @ np.linalg.solve(left[np.ix_(gone, gone)], left[gone])
        left[gone], left[:, gone] = 0, 0
        left[gone, gone] = 1
    return row


def _members(groups: np.ndarray, filler: int) -> np.ndarray:
    """The units (G, size of the largest) of every group, filled up with one number."""
    members = [np.flatnonzero(groups == g) for g in range(groups.max() + 1)]
    largest = max(map(len, members))
    return np.stack([np.pad(m, (0, largest - len(m)), constant_values=filler) for m in members])


def _log_dets(matrix: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Logarithms (k,) of the determinants of principal submatrices of units (k, d); fillers change nothing."""
    blocks = matrix[units[:, :, None], units[:, None, :]]
    twice = np.triu(units[:, :, None] == units[:, None, :], 1).any(1)  # every filler of a row but its first
    k, place = np.nonzero(twice)
    blocks[k, place], blocks[k, :, place] = 0, 0
    blocks[k, place, place] = 1
    return np.linalg.slogdet(blocks)[1]
