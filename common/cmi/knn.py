"""Conditional mutual information from nearest neighbours, for all pairs of a layer.

The distance of two rows is the largest of their distances in C_j, in P_i and in the rest, each the root mean square
over its units. With eps_a the distance of row a to its k-th neighbour and n_.(a) the number of rows closer than that in
some of the three blocks only,

    I(C_j; P_i | rest) = psi(k) + mean_a [ psi(n_rest + 1) - psi(n_(C_j, rest) + 1) - psi(n_(P_i, rest) + 1) ].

Widths adapt to the data, which makes it the more accurate estimate in a few dimensions; it cannot share sums over rows
between pairs as the kernel estimate does, and costs many times as much.

Sources: Kraskov, Stoegbauer and Grassberger, Physical Review E 69 (2004); Frenzel and Pompe, Physical Review Letters 99
(2007).
"""

import joblib
import numpy as np
import torch
from scipy.special import digamma
from torch import Tensor

from common.cmi.inputs import Layer, one_thread_per_worker

NEIGHBOURS = 5
TILE = 2**24  # distances of one block of rows that are held at once


def scores(layer: Layer, *, n_jobs: int = 1, seed: int = 0, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """Nearest-neighbour scores of all pairs; see `common.cmi.layer_cmi` for their meaning.

    Parameters
    ----------
    n_jobs : parallel workers
    seed : not used; the estimate is deterministic
    neighbours : k; at most one less than there are rows

    Returns
    -------
    (H, G) float64 ndarray, in nats
    """
    parents, children = torch.from_numpy(layer.parents), torch.from_numpy(layer.children)
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
        return np.stack([_sum_over_rows(kid, given, rest, k) for kid in kids])

    with one_thread_per_worker():
        blocks = range(0, layer.n, step)
        parts = joblib.Parallel(n_jobs, backend="threading")(joblib.delayed(block)(first) for first in blocks)
    return sum(parts) / layer.n


def _squared_distances(samples: Tensor, groups: np.ndarray, rows: Tensor) -> Tensor:
    """Squared distances (groups, rows, n) of some rows to all."""
    parts = (samples[:, torch.from_numpy(groups == g)] for g in range(groups.max() + 1))
    return torch.stack([torch.cdist(part[rows], part).square_() for part in parts])


def _sum_over_rows(kid: Tensor, given: Tensor, rest: Tensor, k: int) -> np.ndarray:
    """The sum (G,) of one child's terms over rows, from its distances (rows, n) and the parents' (G, rows, n)."""
    reach = torch.maximum(given, kid).kthvalue(k, dim=2, keepdim=True).values
    counts = ((distances < reach).sum(2).numpy() for distances in (rest, torch.maximum(rest, kid), given))
    in_rest, with_child, with_parent = (digamma(count + 1) for count in counts)
    return (digamma(k) + in_rest - with_child - with_parent).sum(1)
