"""Conditional geometric mutual information: a dependence measure in [0, 1] from minimum spanning trees.

Two samples are compared: rows as they are, and rows whose Y is replaced by the Y of a row with nearly the same Z, so
that X and Y are independent given Z. Of the minimum spanning tree over both, R edges join the samples. If these have
the same distribution half of the edges do; the less they overlap, the fewer. With m rows in each,

    GMI = 1 - R / m

estimates the Henze-Penrose divergence between the joint distribution and the conditionally independent one.

Sources: Yasaei Sekeh and Hero, Entropy 21(8):787 (2019), for GMI; Sen et al., NeurIPS 2017, for the bootstrap;
Friedman and Rafsky, Annals of Statistics 7 (1979), for the statistic.
"""

import numpy as np
import torch
from torch import Tensor

from common.cmi.gaussian import regress
from common.cmi.inputs import Layer, in_parallel

DIRECTIONS = 3  # canonical directions that the residual form keeps
RIDGE = 0.1  # share of the identity in its regression's covariance, which has a third of the rows to go by
ROUNDING = 2.0**-42  # of squared distances, as a share of the largest


def scores(layer: Layer, *, n_jobs: int = 1, seed: int = 0) -> np.ndarray:
    """GMI of all pairs given all other parents, with the nearest-neighbour bootstrap.

    Parameters
    ----------
    seed : splits the rows into three disjoint parts: rows as they are, rows whose Y is replaced, donors of Y

    Returns
    -------
    (H, G) float64 ndarray. Its expectation is in [0, 1], where 0 is independence; estimates near 0 can be negative.

    Notes
    -----
    Where the rest has many units a row's nearest donor is far away, X and Y are then independent of Z given too
    little, and pairs are hardly distinguished: with hundreds of units the ranking is at chance.
    """
    joint, replaced, donors = _thirds(layer.n, seed)
    rows = np.r_[joint, replaced]
    parents = torch.from_numpy(layer.parents)
    kids = _stack([torch.from_numpy(layer.children[rows][:, layer.child_groups == j]) for j in range(layer.shape[0])])
    every = torch.cdist(parents[rows], parents[rows]).square_()
    to_donors = torch.cdist(parents[replaced], parents[donors]).square_()

    def of_parent(i: int) -> np.ndarray:
        own = parents[:, torch.from_numpy(layer.parent_groups == i)]
        if own.shape[1] == parents.shape[1]:
            donor = donors  # nothing to be near in: any row will do
        else:
            away = to_donors - torch.cdist(own[replaced], own[donors]).square_()
            donor = donors[_nearest(away, np.random.default_rng([seed, i]))]
        own_given = own[np.r_[joint, donor]]
        shared = every - torch.cdist(own[rows], own[rows]).square_() + torch.cdist(own_given, own_given).square_()
        return _share_separated(shared, kids, len(joint))

    return np.stack(list(in_parallel(of_parent, range(layer.shape[1]), n_jobs)), axis=1)


def residual_scores(layer: Layer, *, n_jobs: int = 1, seed: int = 0) -> np.ndarray:
    """GMI of what linear regression on the rest leaves of both sides, along a few canonical directions.

    Regression and directions are fitted to a third of the rows and applied to the others, so that independent groups
    score 0 on average. Rescues the ranking where the rest is wide and dependence roughly linear; dependence that
    regression does not see does not guide the choice of directions.

    Parameters, returns and sources are those of `scores`.
    """
    joint, replaced, fitted = _thirds(layer.n, seed)
    rows, given = np.r_[joint, replaced], np.r_[joint, np.roll(replaced, 1)]
    data = np.hstack([layer.parents, layer.children])
    covariance = (1 - RIDGE) * data[fitted].T @ data[fitted] / len(fitted) + RIDGE * np.eye(data.shape[1])
    precision, regression, _ = regress(covariance, len(layer.parent_groups))
    unexplained = layer.children - layer.parents @ regression

    def of_parent(i: int) -> np.ndarray:
        own = np.flatnonzero(layer.parent_groups == i)
        left = np.linalg.solve(precision[np.ix_(own, own)], (layer.parents @ precision[:, own]).T).T
        children = unexplained + left @ regression[own]
        pairs = []
        for j in range(layer.shape[0]):
            x, y = _canonical(children[:, layer.child_groups == j], left, fitted)
            pairs.append(torch.from_numpy(np.hstack([x[rows], y[given]])))
        nothing = torch.zeros(1, 1, dtype=torch.float64).expand(len(rows), len(rows))
        return _share_separated(nothing, _stack(pairs), len(joint))

    return np.stack(list(in_parallel(of_parent, range(layer.shape[1]), n_jobs)), axis=1)


def _thirds(n: int, seed: int) -> np.ndarray:
    """Three disjoint random parts of the rows, of equal size."""
    return np.random.default_rng(seed).permutation(n)[: n // 3 * 3].reshape(3, -1)


def _stack(parts: list[Tensor]) -> Tensor:
    """Samples (n, d_k) of several groups as one (k, n, largest d), filled up with zeros."""
    width = max(part.shape[1] for part in parts)
    return torch.stack([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def _nearest(distances: Tensor, rng: np.random.Generator) -> np.ndarray:
    """The nearest column of every row; of several equally near ones any."""
    near = distances <= distances.amin(1, keepdim=True) + 1e-9
    return (near * torch.from_numpy(rng.random(distances.shape))).argmax(1).numpy()


def _canonical(x: np.ndarray, y: np.ndarray, fitted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sides along their first canonical directions, of variance 1, as fitted to some of the rows."""
    bases = [_whitener(side[fitted]) for side in (x, y)]
    u, _, v = np.linalg.svd((x[fitted] @ bases[0]).T @ (y[fitted] @ bases[1]))
    return x @ bases[0] @ u[:, :DIRECTIONS], y @ bases[1] @ v[:DIRECTIONS].T


def _whitener(samples: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(samples.T @ samples / len(samples))
    return vectors / np.sqrt(np.maximum(values, 1e-6 * max(values[-1], 1e-300)))


def _share_separated(shared: Tensor, kids: Tensor, m: int) -> np.ndarray:
    """1 - R / m (k,) for the spanning trees of several sets of points at once, by Prim's algorithm.

    All sets have the squared distances `shared` (2 m, 2 m) in common; `kids` (k, 2 m, d) are further coordinates of
    each. The first m rows are one sample, the others the second. An edge is an edge also at length 0; where points are
    equally near, their shares in the samples count.
    """
    k, n, _ = kids.shape
    # any order, so that of equally near points those of neither sample come first
    order = torch.from_numpy(np.random.default_rng(n).permutation(n))
    sets, second, shared, kids = torch.arange(k), (order >= m).double(), shared[order][:, order], kids[:, order]
    norms = kids.square().sum(2)
    rounding = ROUNDING * (norms.max() + shared.max())
    best = torch.full((k, n), torch.inf, dtype=kids.dtype)
    near, near_second = torch.zeros(2, k, n, dtype=kids.dtype)  # how many of the tree are that near; of sample 2
    last, crossing = torch.zeros(k, dtype=torch.int64), torch.zeros(k, dtype=kids.dtype)
    done = torch.zeros(k, n, dtype=torch.bool)
    for _ in range(n - 1):
        done[sets, last] = True
        best[sets, last] = torch.inf
        point = kids[sets, last]
        distances = torch.baddbmm(norms[:, :, None], kids, point[:, :, None], alpha=-2)[:, :, 0]
        distances += norms[sets, last][:, None] + shared[last]
        closer, equal = (distances < best - rounding) & ~done, (distances - best).abs() <= rounding
        best = torch.where(closer, distances, best)
        near = torch.where(closer, 1, near + equal)
        near_second = torch.where(closer, second[last][:, None], near_second + equal * second[last][:, None])
        last = best.argmin(1)
        crossing += (second[last] - near_second[sets, last] / near[sets, last]).abs()
    return 1 - crossing.numpy() / m
