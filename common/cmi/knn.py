"""Conditional mutual information from nearest neighbours, for all pairs of a layer.

The distance of two rows is the largest of their distances in C_j, in P_i and in the rest, each the root mean square
over its units. With eps_a the distance of row a to its k-th neighbour and n_.(a) the number of rows closer than that in
some of the three blocks only,

    I(C_j; P_i | rest) = psi(k) + mean_a [ psi(n_rest + 1) - psi(n_(C_j, rest) + 1) - psi(n_(P_i, rest) + 1) ].

Widths adapt to the data, which makes it the more accurate estimate in a few dimensions; it cannot share sums over rows
between pairs as the kernel estimate does, and costs many times as much.

Of rows as far away as the k-th neighbour, as many count as closer as would on average if all ties were broken at
random. Where the k-th neighbour is at distance 0, the values are discrete there: all rows at distance 0 count, and the
row itself, in the joint space as in the others.

Sources: Kraskov, Stoegbauer and Grassberger, Physical Review E 69 (2004); Frenzel and Pompe, Physical Review Letters 99
(2007); Mesner and Shalizi, IEEE Transactions on Information Theory 67 (2021), for distance 0.
"""

from numbers import Integral

import numpy as np
import torch
from scipy.special import digamma
from torch import Tensor

from common.cmi.inputs import Layer, check_number, in_parallel

NEIGHBOURS = 5
TILE = 2**24  # distances of one block of rows that are held at once
ROUNDING = 2.0**-42  # of squared distances, as a share of the largest squared norm


def scores(layer: Layer, *, n_jobs: int = 1, seed: int = 0, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """Nearest-neighbour scores of all pairs; see `common.cmi.layer_cmi`. Nothing is random: `seed` is not used.

    Parameters
    ----------
    neighbours : k, at least 1; with fewer other rows than that, all of them

    Returns
    -------
    (H, G) float64 ndarray, in nats
    """
    check_number(neighbours, "neighbours", 1, kind=Integral)
    parents, children = torch.from_numpy(layer.parents), torch.from_numpy(layer.children)
    rounding = ROUNDING * max((units**2).sum(1).max() for units in (layer.parents, layer.children))
    k = min(neighbours, layer.n - 1)
    step = max(1, TILE // (layer.n * (3 * layer.shape[1] + layer.shape[0])))

    def block(first: int) -> np.ndarray:
        rows = torch.arange(first, min(first + step, layer.n))
        own = _squared_distances(parents, layer.parent_groups, rows)
        total, units = own.sum(0), torch.from_numpy(layer.parent_units)[:, None, None]
        rest = (total - own).clamp_min_(0) / (units.sum() - units).clamp_min(1)
        own /= units.clamp_min(1)
        children_units = torch.from_numpy(layer.child_units)[:, None, None]
        kids = _squared_distances(children, layer.child_groups, rows) / children_units.clamp_min(1)
        for distances in (own, rest, kids):
            distances[:, torch.arange(len(rows)), rows] = torch.inf  # a row is no neighbour of its own
        given = torch.maximum(own, rest)
        return np.stack([_sum_over_rows(kid, given, rest, k, rounding) for kid in kids])

    return sum(in_parallel(block, range(0, layer.n, step), n_jobs)) / layer.n


def _squared_distances(samples: Tensor, groups: np.ndarray, rows: Tensor) -> Tensor:
    """Squared distances (groups, rows, n) of some rows to all."""
    parts = (samples[:, torch.from_numpy(groups == g)] for g in range(groups.max() + 1))
    return torch.stack([torch.cdist(part[rows], part).square_() for part in parts])


def _sum_over_rows(kid: Tensor, given: Tensor, rest: Tensor, k: int, rounding: float) -> np.ndarray:
    """The sum (G,) of one child's terms over rows, from its distances (rows, n) and the parents' (G, rows, n)."""
    joint = torch.maximum(given, kid)
    reach = joint.kthvalue(k, dim=2, keepdim=True).values
    closer, tied = _count(joint, reach, rounding)
    place = np.where(reach[..., 0] <= rounding, tied + 1, k - closer)  # of the k-th neighbour among the tied
    blocks = (_count(distances, reach, rounding) for distances in (rest, torch.maximum(rest, kid), given))
    in_rest, with_child, with_parent = (digamma(_expected(*block, tied, place) + 1) for block in blocks)
    return (digamma(closer + place) + in_rest - with_child - with_parent).sum(1)


def _count(distances: Tensor, reach: Tensor, rounding: float) -> tuple[np.ndarray, np.ndarray]:
    """How many distances (G, rows, n) are below and how many are at the reach (G, rows, 1)."""
    pair = distances < reach - rounding, distances <= reach + rounding
    closer, within = (near.sum(2, dtype=torch.int32).numpy().astype(int) for near in pair)  # 3 times as fast as int64
    return closer, within - closer


def _expected(closer: np.ndarray, at: np.ndarray, tied: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Rows of a block closer than the neighbour at a place among the tied, on average over the orders of ties."""
    return closer + np.minimum(at, tied) * (place - 1) / tied + np.maximum(at - tied, 0) * place / (tied + 1)
