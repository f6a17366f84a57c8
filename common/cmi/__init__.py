"""Estimators of the conditional mutual information I(X; Y | Z); depends on nothing else of the project.

`cmi` estimates one quantity, `layer_cmi` those of all pairs of groups of a layer at once. Both take the name of an
estimator; `ESTIMATORS` lists them. Adding one is a function with the signature of `kde.scores` and a line here.
"""

import inspect
from collections.abc import Callable
from numbers import Integral

import numpy as np

from common.cmi import gaussian, gmi, kde, knn
from common.cmi.inputs import Layer, check_choice, check_number, check_samples, one_thread_per_worker

RESUMABLE = ("kde",)  # estimators that report progress and can start from it: options `on_rows` and `start`
ESTIMATORS = {
    "kde": kde.scores,
    "knn": knn.scores,
    "gaussian": gaussian.scores,
    "gmi": gmi.scores,
    "gmi-residual": gmi.residual_scores,
}


def cmi(x, y, z=None, *, estimator: str = "kde", seed: int = 0, **options) -> float:
    """Conditional mutual information I(X; Y | Z) from samples.

    Parameters
    ----------
    x : (n, dx) array_like
    y : (n, dy) array_like
    z : (n, dz) array_like, optional
        Without it the plain mutual information I(X; Y).
    estimator, seed, **options : see `layer_cmi`

    Returns
    -------
    float
        In nats.

    Raises
    ------
    ValueError
        If the arrays are not finite, have unequal or too few rows, or the estimator or an option is not legal.
    """
    x, y = check_samples(x, "x"), check_samples(y, "y")
    z = y[:, :0] if z is None else check_samples(z, "z")
    if not len(x) == len(y) == len(z):
        raise ValueError(f"x, y and z need the same number of rows, not {len(x)}, {len(y)} and {len(z)}")
    groups = np.zeros(x.shape[1], int), np.repeat([0, 1], [y.shape[1], z.shape[1]])
    return float(layer_cmi(x, np.hstack([y, z]), *groups, estimator=estimator, seed=seed, **options)[0, 0])


def layer_cmi(
    children,
    parents,
    child_groups,
    parent_groups,
    *,
    estimator: str = "kde",
    n_jobs: int | Callable = 1,
    seed: int = 0,
    **options,
) -> np.ndarray:
    """Conditional mutual information of every child group with every parent group given all other parents.

    Parameters
    ----------
    children, parents : (n, c) and (n, p) array_like
        Row a of both comes from the same image.
    child_groups, parent_groups : (c,) and (p,) integer array_like
        The group of every unit: any integers, H and G different ones.
    estimator : a key of `ESTIMATORS`
    n_jobs : int, or generator of (function, tasks)
        Parallel workers as joblib counts them, but no more than processors; the result is the same, bit for bit, for
        any number. A generator that yields the function's value of every task, in order, does the work instead.
    seed : for estimators that draw random numbers, at least 0
    **options : passed on to the estimator

    Returns
    -------
    (H, G) float64 ndarray
        In nats (gmi: a share, see there). Element (j, i) is I(C_j; P_i | all other P), with groups in ascending order
        of their labels; exactly 0 for groups whose units are all constant.

    Raises
    ------
    ValueError
        If an array is not finite or not two-dimensional, rows are unequal or fewer than 3, labels are not integers
        or not one per unit, or the estimator or an option is unknown or out of range.
    """
    check_choice(estimator, "estimator", ESTIMATORS)
    estimate = ESTIMATORS[estimator]
    for name in options:
        check_choice(name, f"option of {estimator}", list(inspect.signature(estimate).parameters)[1:])
    check_number(seed, "seed", 0, kind=Integral)
    if not callable(n_jobs):
        check_number(n_jobs, "n_jobs", -np.inf, kind=Integral)
    if n_jobs == 0:
        raise ValueError("n_jobs is 0; legal are all other whole numbers")
    layer = Layer(children, parents, child_groups, parent_groups)
    with one_thread_per_worker():
        return np.where(layer.live, estimate(layer, n_jobs=n_jobs, seed=seed, **options), 0.0)
