"""The published routine for one pair of groups, defects and all: here to be timed, and to show what it returns.

It is written from the description of what the released code does: geometric mutual information by a nearest-neighbour
bootstrap and a minimum spanning tree, one call per pair of groups. Nothing but the benchmarks uses it.
"""

import numpy as np
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import euclidean
from sklearn.neighbors import NearestNeighbors


def score(x: np.ndarray, y: np.ndarray, z: np.ndarray, seed: int = 0) -> float:
    """What the published routine takes for I(X; Y | Z).

    A third of the rows are joint samples; another third get their Y from the last third, each from the row nearest in
    Z, which would make X and Y independent given Z. Of the edges of the minimum spanning tree of all these N points, R
    join the two samples; the score is 1 - 2 R / N.

    Parameters
    ----------
    x, y, z : (n, d) ndarray
    seed : of the split into thirds
    """
    third = len(x) // 3
    joint, kept, donors = np.random.default_rng(seed).permutation(len(x))[: 3 * third].reshape(3, third)
    # Defect: searched among the rows that need a donor, not among the donors. The indices then mean nothing to the
    # donors, and Y is replaced at random.
    nearest = NearestNeighbors(n_neighbors=1).fit(z[kept]).kneighbors(z[donors], return_distance=False)[:, 0]
    replaced = np.hstack([x[kept], y[donors][nearest], z[kept]])
    tree = minimum_spanning_tree(_distances(np.vstack([np.hstack([x, y, z])[joint], replaced])))
    # Defect: the position of an entry of the sparse matrix stands for its row, which it is not.
    crossing = sum((position < third) != (column < third) for position, column in enumerate(tree.indices))
    return float(1 - crossing / third)


def _distances(points: np.ndarray) -> np.ndarray:
    """All distances, by one call for every ordered pair: nearly all of the cost.

    That the cost is a Python loop over pairs of rows is known, what it calls is a choice made here: with this one a
    pair of groups takes the time that was measured of the released code (0.49, 2.0, 8.5 s at 500, 1,000, 2,000 rows).
    """
    distances = np.zeros((len(points), len(points)))
    for i, a in enumerate(points):
        for j, b in enumerate(points):
            distances[i, j] = euclidean(a, b)
    return distances
