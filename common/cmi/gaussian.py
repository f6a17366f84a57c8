"""Conditional mutual information in closed form, as if all units were jointly Gaussian.

One covariance of a layer holds everything. With K the precision matrix of all parents, P_i given the rest has
covariance V_i = (K_ii)^-1; with B the regression of the children on all parents and S_j the covariance of what it
leaves of C_j, C_j given the rest has covariance S_j + B_ij' V_i B_ij. Hence

    I(C_j; P_i | rest) = 1/2 log det(I + M_ij M_ij'),    M_ij = V_i^(1/2) B_ij S_j^(-1/2):

a block of one whitened regression matrix. Exact and almost free where data are Gaussian; blind to what is not linear.
"""

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.special import digamma
from sklearn.covariance import ledoit_wolf_shrinkage

from common.cmi import backward
from common.cmi.inputs import Layer, as_array, check_choice, check_number, members

DEGENERATE = 1e-6  # variance, of units of variance 1, below which a direction is taken as a function of the others
MOST_SNR = 1e100  # its square is a number, too


def _checked_snr(snr, given: str, units: tuple[int]) -> np.ndarray:
    """The signal-to-noise ratios, if they are one legal number per child unit."""
    snr = as_array(snr, "snr")
    if given != "kept":
        raise ValueError("snr belongs to given='kept'")
    if snr.dtype.kind not in "iuf" or snr.shape != units or not ((snr >= 0) & (snr <= MOST_SNR)).all():
        raise ValueError(f"snr must hold one number from 0 to {MOST_SNR:g} per child unit, shape {units}")
    return snr


def scores(
    layer: Layer, *, n_jobs: int = 1, seed: int = 0, shrinkage: float | None = None, given: str = "rest", snr=None
) -> np.ndarray:
    """Gaussian scores of all pairs; see `common.cmi.layer_cmi` for their meaning. `seed` is not used.

    Parameters
    ----------
    n_jobs : parallel workers, of which only `given` = "kept" has any use
    given : "rest" conditions on all other parents; "kept" on those that are left when the least informative ones go
        one by one: see `common.cmi.backward`
    snr : (c,) only with `given` = "kept": signal-to-noise ratio, from 0 to 1e100, at which each child unit is seen;
        none: without noise
    shrinkage : share of the identity in the covariance, from 1e-6 to 1. By default there is none, and the bias
        is corrected exactly, where that is possible: twice as many rows as units of a pair and no unit a function of
        others. Elsewhere it is the coefficient of Ledoit and Wolf, without correction.

    Returns
    -------
    (H, G) float64 ndarray, in nats; where the bias is corrected, unbiased for Gaussian data, so negative values occur

    Notes
    -----
    The correction is the expectation of a Wishart matrix's log-determinant (Goodman, 1963). Shrinkage: Ledoit and
    Wolf, J. Multivariate Analysis 88 (2004).
    """
    check_choice(given, "given", ("rest", "kept"))
    if shrinkage is not None:
        check_number(shrinkage, "shrinkage", DEGENERATE, 1)
    snr = None if snr is None else _checked_snr(snr, given, layer.child_groups.shape)
    data = np.hstack([layer.parents, layer.children])
    covariance = data.T @ data / layer.n
    constant = np.flatnonzero(np.diag(covariance) == 0)
    covariance[constant, constant] = 1  # independent of everything
    units = layer.parent_units.sum() + layer.child_units.max()
    if given == "rest" and shrinkage is None and layer.n > 2 * units and not _is_degenerate(covariance, layer):
        return _half_log_dets(covariance, layer) - _bias(layer)
    if shrinkage is None:
        varies = np.delete(data, constant, axis=1) if len(constant) < data.shape[1] else data
        shrinkage = max(ledoit_wolf_shrinkage(varies, assume_centered=True), DEGENERATE)
    covariance *= 1 - shrinkage
    covariance[np.diag_indices_from(covariance)] += shrinkage
    return _half_log_dets(covariance, layer) if given == "rest" else backward.scores(layer, covariance, snr, n_jobs)


def regress(covariance: np.ndarray, n_parents: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision (p, p) of the parents, regression (p, c) of the children on them, and covariance (c, c) of the rest."""
    parents, both = covariance[:n_parents, :n_parents], covariance[:n_parents, n_parents:]
    precision = np.linalg.inv(parents)
    regression = np.linalg.solve(parents, both)
    return precision, regression, covariance[n_parents:, n_parents:] - both.T @ regression


def _is_degenerate(covariance: np.ndarray, layer: Layer) -> bool:
    """Whether the parents, or a child group given the parents, have a direction without variance of its own."""
    n_parents = len(layer.parent_groups)
    if np.linalg.eigvalsh(covariance[:n_parents, :n_parents])[0] < DEGENERATE:
        return True
    residual = regress(covariance, n_parents)[2]
    own = (np.flatnonzero(layer.child_groups == j) for j in range(layer.shape[0]))
    return any(np.linalg.eigvalsh(residual[np.ix_(units, units)])[0] < DEGENERATE for units in own)


def _half_log_dets(covariance: np.ndarray, layer: Layer) -> np.ndarray:
    """1/2 log det(I + M_ij M_ij') of every pair (H, G)."""
    precision, matrix, residual = regress(covariance, len(layer.parent_groups))
    for inner, groups, side in ((precision, layer.parent_groups, matrix), (residual, layer.child_groups, matrix.T)):
        for g in range(groups.max() + 1):
            own = np.flatnonzero(groups == g)
            factor = cholesky(inner[np.ix_(own, own)], lower=True)
            side[own] = solve_triangular(factor, side[own], lower=True)
    parents, children = members(layer.parent_groups)[:, :, None], members(layer.child_groups)[:, None, None, :]
    blocks = np.pad(matrix, (0, 1))[parents, children]  # (H, G, largest parent group, largest child group)
    if blocks.shape[2] > blocks.shape[3]:
        blocks = blocks.transpose(0, 1, 3, 2)
    grams = blocks @ blocks.transpose(0, 1, 3, 2)
    return np.linalg.slogdet(grams + np.eye(grams.shape[-1]))[1] / 2


def _bias(layer: Layer) -> np.ndarray:
    """Expectation (H, G) of the plug-in estimate minus the truth, for Gaussian data."""
    total = layer.parent_units.sum()
    terms = digamma((layer.n - 1 - np.arange(total + layer.child_units.max())) / 2) / 2
    log_det = np.r_[0, np.cumsum(terms)]  # by dimension, up to parts that cancel
    child, rest = layer.child_units[:, None], total - layer.parent_units[None]
    return log_det[child + rest] + log_det[total] - log_det[rest] - log_det[child + total]
