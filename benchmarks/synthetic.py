"""Samples of which the truth is known: the CMI in closed form, or which parents of a layer matter."""

import numpy as np

FACTORS = 5  # common factors of a layer's parents
COMMON = 0.5  # share of a parent unit's variance that comes from them
NOISE = 0.1  # standard deviation of what a child unit adds of its own
RESPONSES = {"near-linear": lambda a: np.tanh(a / 2), "non-monotone": np.abs, "oscillating": lambda a: np.cos(2 * a)}


def gaussian_triple(
    dims: tuple[int, int, int], information: float, n: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Jointly Gaussian X, Y, Z with I(X; Y | Z) = `information` exactly.

    Some directions of Z act on both X and Y, so that these depend on each other beyond what is asked for unless Z is
    conditioned on. Given Z, min(dx, dy) pairs of coordinates have one correlation r, which makes -log(1 - r^2) / 2 per
    pair. Rotations, which leave the information unchanged, spread the pairs over all coordinates.

    Parameters
    ----------
    dims : (dx, dy, dz)
    information : in nats
    n : number of samples
    seed : of everything random; the same seed with another `information` changes nothing else

    Returns
    -------
    x : (n, dx) ndarray
    y : (n, dy) ndarray
    z : (n, dz) ndarray
    """
    rng = np.random.default_rng(seed)
    pairs = min(dims[:2])
    correlation = np.sqrt(-np.expm1(-2 * information / pairs))
    own_x, own_y, z = (rng.normal(size=(n, d)) for d in dims)
    own_y[:, :pairs] *= np.sqrt(1 - correlation**2)
    own_y[:, :pairs] += correlation * own_x[:, :pairs]
    shared = z @ _rotation(dims[2], rng)[:, :pairs]
    x, y = (
        (shared @ _directions(shared.shape[1], own.shape[1], rng) + own) @ _rotation(own.shape[1], rng)
        for own in (own_x, own_y)
    )
    return x, y, z


def independent_triple(dims: tuple[int, int, int], n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standard normal X, Y and Z that have nothing to do with each other."""
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(n, d)) for d in dims)


def chain(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """X <- Z -> Y, one-dimensional: X and Y are strongly dependent, and independent given Z."""
    own_x, own_y, z = independent_triple((1, 1, 1), n, seed)
    return z + own_x / 2, z + own_y / 2, z


def layer(
    kind: str,
    n: int,
    seed: int,
    *,
    groups: int = 10,
    children: int = 10,
    parent_units: int = 50,
    child_units: int = 30,
    true_parents: int = 3,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A layer in which every child group depends on a few parent groups and on no others.

    Parents share common factors, so that the groups that do not matter are correlated with those that do. A child unit
    is a response to a random mix, of variance 1, of all units of its true parents.

    Parameters
    ----------
    kind : the response, a key of `RESPONSES`
    n : number of samples
    seed : of everything random
    groups, children : number of parent groups and of child groups
    parent_units, child_units : units per group
    true_parents : parent groups that a child group depends on

    Returns
    -------
    children : (n, children * child_units) ndarray
    parents : (n, groups * parent_units) ndarray
    child_groups, parent_groups : the group of every unit
    truth : (children, groups) boolean ndarray
    """
    rng = np.random.default_rng(seed)
    child_groups, parent_groups = (
        np.repeat(np.arange(children), child_units),
        np.repeat(np.arange(groups), parent_units),
    )
    truth = rng.permuted(np.tile(np.arange(groups) < true_parents, (children, 1)), axis=1)
    common = rng.normal(size=(n, FACTORS)) @ _directions(FACTORS, len(parent_groups), rng)
    parents = np.sqrt(COMMON) * common + np.sqrt(1 - COMMON) * rng.normal(size=common.shape)
    mixes = parents @ (
        rng.normal(size=(len(parent_groups), len(child_groups))) * truth[child_groups][:, parent_groups].T
    )
    responses = RESPONSES[kind](mixes / mixes.std(axis=0))
    return responses + NOISE * rng.normal(size=mixes.shape), parents, child_groups, parent_groups, truth


def _rotation(d: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def _directions(d: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """k random columns (d, k) of length 1."""
    columns = rng.normal(size=(d, k))
    return columns / np.linalg.norm(columns, axis=0)
