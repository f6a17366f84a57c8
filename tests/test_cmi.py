"""Estimators against a literal double loop, closed forms and invariances."""

import numpy as np
import pytest
from scipy.special import logsumexp

from common.cmi import ESTIMATORS, cmi, kde, layer_cmi


def layer(rng, n=40, parents=9, children=6):
    """Children that depend on the first parents, units of different scale, groups of different size."""
    p = rng.normal(size=(n, parents)) * rng.uniform(0.1, 50, parents) + rng.normal(size=parents)
    c = np.tanh(p[:, :children] / 10) + 0.3 * rng.normal(size=(n, children))
    return c, p, np.array([0, 0, 1, 1, 1, 2]), np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])


def literal_kde(children, parents, child_groups, parent_groups, factor=kde.WIDTH):
    """The definition: standardise, then for every pair and row four leave-one-out sums over all other rows."""
    p = (parents - parents.mean(0)) / parents.std(0)
    c = (children - children.mean(0)) / children.std(0)
    parent_width = factor * np.sqrt(p.shape[1])
    n, result = len(p), np.zeros((child_groups.max() + 1, parent_groups.max() + 1))
    for j in range(result.shape[0]):
        x = c[:, child_groups == j]
        child_width = min(parent_width, 1) * np.sqrt(x.shape[1])
        for i in range(result.shape[1]):
            rest = p[:, parent_groups != i]
            for a in range(n):
                others = np.arange(n) != a
                log_x = -((x[a] - x[others]) ** 2).sum(1) / (2 * child_width**2)
                log_p = -((p[a] - p[others]) ** 2).sum(1) / (2 * parent_width**2)
                log_r = -((rest[a] - rest[others]) ** 2).sum(1) / (2 * parent_width**2)
                result[j, i] += (
                    logsumexp(log_x + log_p) + logsumexp(log_r) - logsumexp(log_p) - logsumexp(log_x + log_r)
                )
    return result / n


@pytest.mark.parametrize("factor", [0.02, kde.WIDTH, 2.0])
def test_layer_is_the_literal_double_loop(rng, factor):
    """Also where nearly every kernel underflows."""
    data = layer(rng)
    expected = literal_kde(*data, factor)
    np.testing.assert_allclose(layer_cmi(*data, width=factor), expected, atol=1e-10)
    np.testing.assert_allclose(layer_cmi(*data, width=factor, precision="single"), expected, atol=1e-3)


def test_row_whose_products_all_underflow():
    """Row 0's only near neighbour in the child is its farthest in the rest: sums vanish but in the log domain."""
    x = np.r_[0, 0, 1000 + np.arange(30)][:, None].astype(float)
    y = np.random.default_rng(0).normal(size=(32, 1))
    z = np.r_[0, 5000, np.arange(30) / 100][:, None]
    data = (x, np.hstack([y, z]), np.array([0]), np.array([0, 1]))
    np.testing.assert_allclose(layer_cmi(*data, width=0.01), literal_kde(*data, 0.01), rtol=1e-10)
    assert np.isfinite(layer_cmi(*data, width=0.01, precision="single")).all()


def test_cmi_agrees_with_layer(rng):
    children, parents, child_groups, parent_groups = layer(rng)
    scores = layer_cmi(children, parents, child_groups, parent_groups)
    for j, i in np.ndindex(scores.shape):
        own = parent_groups == i
        assert cmi(children[:, child_groups == j], parents[:, own], parents[:, ~own]) == pytest.approx(
            scores[j, i], abs=1e-12
        )


@pytest.mark.parametrize(("information", "tolerance"), [(0.0, 0.03), (0.2, 0.03), (1.0, 0.12)])
def test_mutual_information_of_gaussians(rng, information, tolerance):
    """I(X; Y) = -log(1 - rho^2) / 2 for correlated Gaussians; rho is the sample's, to leave sampling noise out."""
    rho = np.sqrt(1 - np.exp(-2 * information))
    y = rng.normal(size=(2500, 1))
    x = rho * y + np.sqrt(1 - rho**2) * rng.normal(size=(2500, 1))
    expected = -0.5 * np.log(1 - np.corrcoef(x[:, 0], y[:, 0])[0, 1] ** 2)
    assert cmi(x, y) == pytest.approx(expected, abs=tolerance)


def test_conditioning_on_the_common_cause_removes_dependence(rng):
    """X <- Z -> Y has I(X; Y) > 0 and I(X; Y | Z) = 0."""
    z = rng.normal(size=(2000, 1))
    x, y = z + 0.5 * rng.normal(size=z.shape), z + 0.5 * rng.normal(size=z.shape)
    assert cmi(x, y) > 0.3
    assert abs(cmi(x, y, z)) < 0.05


def test_conditioning_on_the_other_cause_adds_dependence(rng):
    """X = Y + Z: knowing Z, Y explains more of X."""
    y, z = rng.normal(size=(2, 2000, 1))
    x = y + z + 0.1 * rng.normal(size=y.shape)
    assert cmi(x, y, z) > cmi(x, y) + 0.3


def test_independent_groups_score_nothing(rng):
    scores = layer_cmi(rng.normal(size=(1500, 30)), rng.normal(size=(1500, 50)), np.arange(30) // 3, np.arange(50) // 5)
    assert abs(scores.mean()) < 0.01
    assert scores.std() < 0.01


def test_the_true_parents_rank_first(rng):
    parents = rng.normal(size=(800, 100))
    parent_groups, child_groups = np.arange(100) // 10, np.arange(30) // 10
    children = np.hstack([np.abs(parents[:, parent_groups == j] @ rng.normal(size=(10, 10))) for j in range(3)])
    scores = layer_cmi(children, parents, child_groups, parent_groups)
    assert (scores.argmax(1) == [0, 1, 2]).all()


def test_shifting_and_scaling_a_unit_changes_nothing(rng):
    children, parents, *groups = layer(rng)
    moved = layer_cmi(children * rng.uniform(-3, 3, 6) + 7, parents * rng.uniform(0.01, 99, 9) - 3, *groups)
    np.testing.assert_allclose(moved, layer_cmi(children, parents, *groups), atol=1e-10)


def test_permuting_units_rows_and_labels_changes_nothing_else(rng):
    children, parents, child_groups, parent_groups = layer(rng)
    expected = layer_cmi(children, parents, child_groups, parent_groups)
    order, rows = rng.permutation(9), rng.permutation(40)
    permuted = layer_cmi(children[rows], parents[rows][:, order], child_groups, parent_groups[order])
    np.testing.assert_allclose(permuted, expected, atol=1e-10)
    relabelled = layer_cmi(children, parents, 10 * child_groups - 7, 5 - parent_groups)
    np.testing.assert_allclose(relabelled, expected[:, ::-1], atol=1e-10)


def test_constant_units_carry_nothing(rng):
    children, parents, child_groups, parent_groups = layer(rng)
    dead = np.full((40, 1), 3.7)
    scores = layer_cmi(
        np.hstack([children, dead]),
        np.hstack([parents, dead, dead]),
        np.r_[child_groups, 3],
        np.r_[parent_groups, 2, 3],
    )
    np.testing.assert_allclose(scores[:3, :3], layer_cmi(children, parents, child_groups, parent_groups), atol=1e-10)
    assert (scores[3] == 0).all()
    assert (scores[:, 3] == 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_any_number_of_workers_gives_the_same_bits(rng, estimator):
    children, parents, *groups = layer(rng, n=300)
    one = layer_cmi(children, parents, *groups, estimator=estimator)
    assert (one == layer_cmi(children, parents, *groups, estimator=estimator, n_jobs=2)).all()


@pytest.mark.parametrize("precision", kde.PRECISIONS)
def test_interrupted_work_continues_to_the_same_bits(rng, precision):
    data, notes = layer(rng, n=300), []
    whole = layer_cmi(*data, precision=precision, on_rows=lambda done, total: notes.append((done, total.copy())))
    assert [done for done, _ in notes] == [64, 128, 192, 256, 300]
    for note in notes:
        assert (layer_cmi(*data, precision=precision, start=note) == whole).all()


BAD = {
    "children holds nan": {"children": np.full((40, 6), np.nan)},
    "parents holds inf": {"parents": np.full((40, 9), np.inf)},
    "same number of rows": {"parents": np.ones((39, 9))},
    "at least 3": {"children": np.ones((2, 6)), "parents": np.ones((2, 9))},
    "children must have shape": {"children": np.ones(40)},
    "real numbers": {"children": np.ones((40, 6), complex)},
    "one label per unit": {"child_groups": np.zeros(5, int)},
    "must hold integers": {"parent_groups": np.zeros(9)},
    "unknown estimator": {"estimator": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(rng, message):
    names = ("children", "parents", "child_groups", "parent_groups")
    with pytest.raises(ValueError, match=message):
        layer_cmi(**{**dict(zip(names, layer(rng), strict=True)), **BAD[message]})
