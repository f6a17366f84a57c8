"""Estimators against a literal double loop, closed forms and invariances."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import pdist, squareform
from scipy.special import digamma, logsumexp

from common.cmi import ESTIMATORS, backward, cmi, gmi, kde, layer_cmi
from common.cmi.inputs import Layer


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


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory"), torch.OutOfMemoryError()])
def test_tiles_shrink_until_they_fit_into_memory(rng, monkeypatch, error):
    data, sums = layer(rng), kde._Kernels._sum_terms
    expected = layer_cmi(*data)

    def scarce(self, rows):
        if rows.stop - rows.start > limit:
            raise error
        return sums(self, rows)

    monkeypatch.setattr(kde._Kernels, "_sum_terms", scarce)
    limit = 3
    np.testing.assert_allclose(layer_cmi(*data), expected, rtol=1e-12)
    limit = 0
    with pytest.raises(type(error)):
        layer_cmi(*data)


def test_row_whose_products_all_underflow():
    """Row 0's only near neighbour in the child is its farthest in the rest: sums vanish but in the log domain."""
    x = np.r_[0, 0, 1000 + np.arange(30)][:, None].astype(float)
    y = np.random.default_rng(0).normal(size=(32, 1))
    z = np.r_[0, 5000, np.arange(30) / 100][:, None]
    data = (x, np.hstack([y, z]), np.array([0]), np.array([0, 1]))
    np.testing.assert_allclose(layer_cmi(*data, width=0.01), literal_kde(*data, 0.01), rtol=1e-10)
    assert np.isfinite(layer_cmi(*data, width=0.01, precision="single")).all()


@pytest.mark.parametrize("estimator", ["kde", "knn", "gaussian"])
def test_cmi_agrees_with_layer(rng, estimator):
    children, parents, child_groups, parent_groups = layer(rng, n=60)
    scores = layer_cmi(children, parents, child_groups, parent_groups, estimator=estimator)
    for j, i in np.ndindex(scores.shape):
        own = parent_groups == i
        alone = cmi(children[:, child_groups == j], parents[:, own], parents[:, ~own], estimator=estimator)
        assert alone == pytest.approx(scores[j, i], abs=1e-12)


@pytest.mark.parametrize(("information", "tolerance"), [(0.0, 0.03), (0.2, 0.03), (1.0, 0.12)])
def test_mutual_information_of_gaussians(rng, information, tolerance):
    """I(X; Y) = -log(1 - rho^2) / 2 for correlated Gaussians; rho is the sample's, to leave sampling noise out."""
    rho = np.sqrt(1 - np.exp(-2 * information))
    y = rng.normal(size=(2500, 1))
    x = rho * y + np.sqrt(1 - rho**2) * rng.normal(size=(2500, 1))
    expected = -0.5 * np.log(1 - np.corrcoef(x[:, 0], y[:, 0])[0, 1] ** 2)
    assert cmi(x, y) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(("information", "tolerance"), [(0.0, 0.03), (0.2, 0.03), (1.0, 0.10)])
def test_auto_width_finds_the_nats_of_few_units(rng, information, tolerance):
    """I(X; Y | Z) = -log(1 - r^2) / 2 of Gaussians with partial correlation r, here the sample's; Z causes both."""
    r = np.sqrt(-np.expm1(-2 * information))
    own_x, own_y, z = rng.normal(size=(3, 1500, 1))
    x, y = z + r * own_y + np.sqrt(1 - r**2) * own_x, z + own_y
    truth = cmi(x, y, z, estimator="gaussian")
    assert truth == pytest.approx(information, abs=0.1)
    assert cmi(x, y, z, width="auto") == pytest.approx(truth, abs=tolerance)


def test_auto_width_is_the_likeliest(rng):
    """By the definition: log p(x_a | y_a, z_a) from all other rows, their mean at other widths."""
    parents = rng.normal(size=(150, 2))
    data = Layer(parents.sum(1, keepdims=True) + 0.3 * rng.normal(size=(150, 1)), parents, [0], [0, 1])

    def likelihood(widths):
        logs = [
            -(((side[:, None] - side) / width) ** 2).sum(2) / 2
            for side, width in ((data.parents, widths[:2]), (data.children, widths[2]))
        ]
        np.fill_diagonal(logs[0], -np.inf)
        return (logsumexp(sum(logs), 1) - logsumexp(logs[0], 1)).mean() - np.log(widths[2])

    found = np.append(*kde.auto_widths(data))
    for k, step in np.ndindex(3, 2):
        other = found.copy()
        other[k] *= (0.8, 1.25)[step]
        assert likelihood(other) < likelihood(found)


def test_auto_width_passes_to_the_rule_without_a_jump(rng):
    """What is left of the way from the rule falls steadily; from `kde.MANY` units on scores have the rule's bits."""
    parents = rng.normal(size=(120, kde.MANY + 2))
    children = np.tanh(2 * parents[:, :3]) + 0.1 * rng.normal(size=(120, 3))
    for d in range(1, parents.shape[1] + 1):
        data = children, parents[:, :d], np.array([0, 0, 1]), np.arange(d)
        parent_widths, child_width = kde.auto_widths(Layer(*data))
        rule = kde.widths(d)
        apart = [*np.ravel(np.log(parent_widths / rule[0])), np.log(child_width / rule[1])]
        left = 1 - np.log(max(d, 2) / 2) / np.log(kde.MANY / 2)
        assert np.abs(apart).max() <= max(left, 0) * np.log(16) + 1e-12
        assert (layer_cmi(*data, width="auto") == layer_cmi(*data)).all() == (d >= kde.MANY)


def test_auto_width_of_ties_and_constants(rng):
    """Independent bits: not the narrowest kernel, though all of a row's copies are at distance 0 then."""
    bits, parents = rng.integers(0, 2, (300, 2)), np.hstack([rng.normal(size=(300, 2)), np.ones((300, 2))])
    data = bits, parents, np.arange(2), np.arange(4)
    assert kde.auto_widths(Layer(*data))[1] > kde.widths(2)[1] / 2
    with torch.inference_mode():
        scores = layer_cmi(*data, width="auto")
    assert abs(scores).max() < 0.03
    assert (scores[:, 2:] == 0).all()
    assert (scores == layer_cmi(*data, width="auto", n_jobs=2)).all()
    assert (layer_cmi(0 * bits, parents, np.arange(2), np.arange(4), width="auto") == 0).all()


def test_auto_width_of_values_that_are_tied_but_for_rounding(rng):
    """Independent rectified values, with the noise of single precision: as without it, and near the truth, 0."""
    x, y, z = np.maximum(rng.normal(size=(3, 600, 1)), 0)
    exact = cmi(x, y, z, width="auto")
    noisy = (values + 1e-7 * rng.normal(size=values.shape) for values in (x, y, z))
    assert cmi(*noisy, width="auto") == pytest.approx(exact, abs=1e-3)
    assert abs(exact) < 0.02


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


def gaussian_triple(rng, dims, information, n):
    """Jointly Gaussian x, y, z with Z a cause of both and I(X; Y | Z) = `information` nats in closed form."""
    dx, dy, dz = dims
    pairs = min(dx, dy)
    rho = np.sqrt(1 - np.exp(-2 * information / pairs))
    z, x, y = rng.normal(size=(n, dz)), rng.normal(size=(n, dx)), rng.normal(size=(n, dy))
    x[:, :pairs] = rho * y[:, :pairs] + np.sqrt(1 - rho**2) * x[:, :pairs]
    return x + z @ rng.normal(size=(dz, dx)) / np.sqrt(dz), y + z @ rng.normal(size=(dz, dy)) / np.sqrt(dz), z


@pytest.mark.parametrize("dims", [(1, 1, 1), (5, 5, 20), (30, 50, 450)])
@pytest.mark.parametrize("information", [0.0, 0.2, 1.0])
def test_gaussian_is_the_closed_form_in_any_dimension(rng, dims, information):
    """Mean of ten samples: its standard error is below 0.01 nats."""
    values = [cmi(*gaussian_triple(rng, dims, information, 2500), estimator="gaussian") for _ in range(10)]
    assert np.mean(values) == pytest.approx(information, abs=0.03)


def test_gaussian_is_the_literal_log_determinants(rng):
    """1/2 (log|xz| + log|yz| - log|z| - log|xyz|) of the shrunk correlation matrix, without correction."""
    children, parents, child_groups, parent_groups = layer(rng, n=30)
    scores = layer_cmi(children, parents, child_groups, parent_groups, estimator="gaussian", shrinkage=0.1)
    matrix = 0.9 * np.corrcoef(np.hstack([parents, children]).T) + 0.1 * np.eye(15)

    def log_det(*units):
        units = np.concatenate(units)
        return np.linalg.slogdet(matrix[np.ix_(units, units)])[1]

    for j, i in np.ndindex(scores.shape):
        x, y = 9 + np.flatnonzero(child_groups == j), np.flatnonzero(parent_groups == i)
        z = np.flatnonzero(parent_groups != i)
        expected = (log_det(x, z) + log_det(y, z) - log_det(z) - log_det(x, y, z)) / 2
        assert scores[j, i] == pytest.approx(expected, abs=1e-10)


def test_gaussian_survives_children_that_are_functions_of_the_parents(rng):
    parents = rng.normal(size=(500, 20))
    weights = rng.normal(size=(20, 4)) * (np.arange(20) < 10)[:, None]
    scores = layer_cmi(parents @ weights, parents, [0, 0, 1, 1], np.arange(20) // 5, estimator="gaussian")
    assert np.isfinite(scores).all()
    assert scores[:, :2].min() > 5 * scores[:, 2:].max()


def literal_knn(x, y, z, k):
    """The definition for one triple: count rows closer than the k-th neighbour, block by block."""
    blocks = [(part - part.mean(0)) / part.std(0) for part in (x, y, z)]
    in_x, in_y, in_z = (squareform(pdist(part)) / np.sqrt(part.shape[1]) for part in blocks)
    total = digamma(k)
    for a in range(len(x)):
        others = np.arange(len(x)) != a
        dx, dy, dz = in_x[a, others], in_y[a, others], in_z[a, others]
        reach = np.sort(np.maximum(np.maximum(dx, dy), dz))[k - 1]
        counts = [(d < reach).sum() for d in (dz, np.maximum(dx, dz), np.maximum(dy, dz))]
        total += (digamma(counts[0] + 1) - digamma(counts[1] + 1) - digamma(counts[2] + 1)) / len(x)
    return total


def test_knn_is_the_literal_count(rng):
    children, parents, child_groups, parent_groups = layer(rng)
    scores = layer_cmi(children, parents, child_groups, parent_groups, estimator="knn", neighbours=3)
    for j, i in np.ndindex(scores.shape):
        own = parent_groups == i
        expected = literal_knn(children[:, child_groups == j], parents[:, own], parents[:, ~own], 3)
        assert scores[j, i] == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("information", [0.0, 0.2, 1.0])
def test_knn_is_accurate_in_few_dimensions(rng, information):
    values = [cmi(*gaussian_triple(rng, (1, 1, 1), information, 2500), estimator="knn") for _ in range(4)]
    assert np.mean(values) == pytest.approx(information, abs=0.05)


def literal_tree_share(points, m):
    """1 - R / m with scipy's minimum spanning tree; every distance is raised by 1, since scipy takes 0 for no edge."""
    tree = minimum_spanning_tree(squareform(pdist(points)) + 1).tocoo()
    return 1 - ((tree.row < m) != (tree.col < m)).sum() / m


def test_crossings_are_those_of_a_minimum_spanning_tree(rng):
    shared, kids = rng.normal(size=(80, 5)), rng.normal(size=(3, 80, 2))
    kids[:, 40:] += np.array([0, 1, 4])[:, None, None]
    distances = torch.from_numpy(squareform(pdist(shared, "sqeuclidean")))
    shares = gmi._share_separated(distances, torch.from_numpy(kids), 40)
    expected = [literal_tree_share(np.hstack([shared, kid]), 40) for kid in kids]
    assert shares.tolist() == pytest.approx(expected)


def test_gmi_is_near_0_without_dependence(rng):
    """The remainder is the distance between a row and the donor of its Y: it grows with the dimension of Z."""
    values = [cmi(*gaussian_triple(rng, (2, 2, 5), 0, 2500), estimator="gmi", seed=s) for s in range(3)]
    assert abs(np.mean(values)) < 0.1
    z = rng.normal(size=(2500, 1))
    x, y = z + 0.5 * rng.normal(size=z.shape), z + 0.5 * rng.normal(size=z.shape)
    assert abs(cmi(x, y, z, estimator="gmi")) < 0.12
    assert cmi(x, y, estimator="gmi") > 0.2


def test_gmi_of_one_to_one_dependence_is_near_1(rng):
    y = rng.normal(size=(3000, 1))
    assert cmi(y, y, estimator="gmi") > 0.9


def test_gmi_with_tied_rows(rng):
    """Coarse values: many rows at distance 0, whose donors must not all be the same."""
    x, y, z = (rng.integers(0, 3, (1200, 1)) for _ in range(3))
    assert abs(cmi(x, y, z, estimator="gmi")) < 0.15


def test_residual_gmi_ranks_where_raw_gmi_cannot(rng):
    parents = rng.normal(size=(900, 100))
    parent_groups, child_groups = np.arange(100) // 10, np.arange(30) // 10
    children = np.hstack([parents[:, parent_groups == j] @ rng.normal(size=(10, 10)) for j in range(3)])
    children += 0.5 * rng.normal(size=children.shape)
    scores = layer_cmi(children, parents, child_groups, parent_groups, estimator="gmi-residual")
    assert (scores.argmax(1) == [0, 1, 2]).all()


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


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_fewer_rows_than_units(rng, estimator):
    scores = layer_cmi(
        rng.normal(size=(20, 40)),
        rng.normal(size=(20, 60)),
        np.arange(40) // 10,
        np.arange(60) // 10,
        estimator=estimator,
    )
    assert scores.shape == (4, 6)
    assert np.isfinite(scores).all()


@st.composite
def small_layers(draw):
    """Layers with few rows, groups of any size, labels from anywhere, units of any scale, some of them constant."""
    n, p, c = draw(st.integers(6, 40)), draw(st.integers(1, 8)), draw(st.integers(1, 6))
    labels = st.integers(-5, 5)
    parent_groups, child_groups = (np.array(draw(st.lists(labels, min_size=k, max_size=k))) for k in (p, c))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    parents = rng.normal(size=(n, p)) * 10.0 ** rng.integers(-6, 6, p)
    children = rng.normal(size=(n, c)) + parents[:, rng.integers(0, p, c)]
    parents[:, rng.random(p) < 0.2] = draw(st.sampled_from([0.0, 1e9, -3.3]))
    children[:, rng.random(c) < 0.2] = 1e-9
    return children, parents, child_groups, parent_groups, rng


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=small_layers())
def test_any_layer_has_finite_scores_and_dead_groups_0(estimator, data):
    children, parents, child_groups, parent_groups, _ = data
    scores = layer_cmi(children, parents, child_groups, parent_groups, estimator=estimator)
    assert scores.shape == (len(np.unique(child_groups)), len(np.unique(parent_groups)))
    assert np.isfinite(scores).all()
    for j, label in enumerate(np.unique(child_groups)):
        if (np.ptp(children[:, child_groups == label], axis=0) == 0).all():
            assert (scores[j] == 0).all()
    for i, label in enumerate(np.unique(parent_groups)):
        if (np.ptp(parents[:, parent_groups == label], axis=0) == 0).all():
            assert (scores[:, i] == 0).all()


@pytest.mark.parametrize("estimator", ["kde", "knn", "gaussian"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=small_layers())
def test_scores_do_not_depend_on_order_or_scale(estimator, data):
    children, parents, child_groups, parent_groups, rng = data
    expected = layer_cmi(children, parents, child_groups, parent_groups, estimator=estimator)
    rows, units, kids = (rng.permutation(k) for k in (*parents.shape, children.shape[1]))
    moved = layer_cmi(
        -3 * children[rows][:, kids] + 1,
        parents[rows][:, units] * rng.uniform(0.5, 2, parents.shape[1]),
        child_groups[kids],
        parent_groups[units],
        estimator=estimator,
    )
    np.testing.assert_allclose(moved, expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=small_layers())
def test_kde_does_not_count_copies_of_a_layers_units(data):
    """Every unit twice is the same layer: a group's distances and the width grow together."""
    children, parents, child_groups, parent_groups, _ = data
    twice = layer_cmi(np.tile(children, 2), np.tile(parents, 2), np.tile(child_groups, 2), np.tile(parent_groups, 2))
    once = layer_cmi(children, parents, child_groups, parent_groups)
    live = 0.25 * np.sqrt((np.ptp(parents, axis=0) > 0).sum())
    if live >= 1:  # below, the child's width follows the number of parents
        np.testing.assert_allclose(twice, once, atol=1e-8)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=small_layers())
def test_one_parent_group_is_plain_mutual_information(data):
    children, parents, *_ = data
    alone = layer_cmi(children, parents, np.zeros(children.shape[1], int), np.full(parents.shape[1], 7))
    assert alone[0, 0] == pytest.approx(cmi(children, parents), abs=1e-12)


class TestBackwardElimination:
    """--given kept: I(C_j; P_i | the parents that are left when P_i goes)."""

    @pytest.fixture
    def layer(self, rng):
        parents = rng.normal(size=(4000, 12)) @ rng.normal(size=(12, 12))
        children = parents @ rng.normal(size=(12, 6)) * (rng.random(6) < 0.9) + 3 * rng.normal(size=(4000, 6))
        return children, parents, np.repeat([0, 1, 2], 2), np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4])

    @pytest.mark.parametrize("snr", [None, np.array([1, 2, 0, 0.1, 1e3, 1e-3])])
    def test_literally(self, layer, snr):
        """The same order and the same values as one closed-form CMI per candidate and step."""
        children, parents, child_groups, parent_groups = layer
        found = layer_cmi(*layer, estimator="gaussian", given="kept", shrinkage=1e-6, snr=snr)
        covariance = np.corrcoef(np.hstack([children, parents]).T)
        if snr is not None:
            scale = np.r_[np.sqrt(snr), np.ones(12)]
            covariance = covariance * np.outer(scale, scale)
            covariance[:6, :6] += np.eye(6)

        def information(x, y, z):
            def log_det(*parts):
                units = np.concatenate(parts)
                return np.linalg.slogdet(covariance[np.ix_(units, units)])[1]

            return (log_det(x, z) + log_det(y, z) - log_det(z) - log_det(x, y, z)) / 2

        for j in range(3):
            child, left, order, lost = np.flatnonzero(child_groups == j), set(range(5)), [], []
            while left:
                units = {i: 6 + np.flatnonzero(parent_groups == i) for i in left}
                losses = {
                    i: information(child, units[i], np.concatenate([np.empty(0, int), *(units[k] for k in left - {i})]))
                    for i in left
                }
                least = min(losses, key=losses.get)
                order.append(least)
                lost.append(losses[least])
                left.remove(least)
            pooled = [max(min(np.mean(lost[a : b + 1]) for b in range(k, 5)) for a in range(k + 1)) for k in range(5)]
            assert np.argsort(found[j]).tolist() == order
            assert found[j, order] == pytest.approx(pooled, abs=1e-4)

    @pytest.mark.parametrize(("groups", "child_groups"), [(70, [0, 1, 1]), (45, [0, 1, 1]), (70, [0, 0, 0])])
    def test_many_groups_literally(self, rng, groups, child_groups, monkeypatch):
        """More removals than the precision matrix waits for, against one inverse of what is left per step.

        The last: a child group of more than twice as many units as a parent group has.
        """
        monkeypatch.setattr(backward, "ROWS", 8)
        monkeypatch.setattr(backward, "MEMORY", 2 * 8 * 70**2)  # one or two child groups at a time
        parents = rng.normal(size=(2000, 70)) @ rng.normal(size=(70, 70))
        children, child_groups = parents @ rng.normal(size=(70, 3)), np.array(child_groups)
        parent_groups = np.arange(70) * groups // 70
        inputs = (children, parents, child_groups, parent_groups)
        found = layer_cmi(*inputs, estimator="gaussian", given="kept", shrinkage=1e-6, snr=np.ones(3))
        covariance = np.corrcoef(np.hstack([parents, children]).T) + 1e-6 * np.eye(73)
        covariance[70:, 70:] += np.eye(3)

        def unexplained(left, child):
            units = np.flatnonzero(np.isin(parent_groups, left))
            own, across = covariance[np.ix_(child, child)], covariance[np.ix_(units, child)]
            known = np.linalg.solve(covariance[np.ix_(units, units)], across)
            return np.linalg.slogdet(own - across.T @ known)[1] / 2

        for j in np.unique(child_groups):
            child, left, order = 70 + np.flatnonzero(child_groups == j), list(range(groups)), []
            while left:
                order.append(min(left, key=lambda i: unexplained([k for k in left if k != i], child)))
                left.remove(order[-1])
            assert np.argsort(found[j]).tolist() == order
            assert found[j].sum() == pytest.approx(unexplained([], child) - unexplained(range(groups), child), rel=1e-4)

    def test_of_two_that_know_the_same_one_is_kept(self, rng):
        """Given all others either twin is worth nothing; when they go one by one, exactly one of them is."""
        parents = rng.normal(size=(3000, 5))
        parents[:, 1] = parents[:, 0] + 1e-3 * rng.normal(size=3000)
        children = parents[:, :1] + rng.normal(size=(3000, 1))
        groups = np.zeros(1, int), np.arange(5)
        rest, kept = (layer_cmi(children, parents, *groups, estimator="gaussian", given=g) for g in ("rest", "kept"))
        assert np.abs(rest[0, :2]).max() < 0.01
        assert kept[0, :2].max() == pytest.approx(np.log(2) / 2, abs=0.05)
        assert kept[0, :2].min() < 0.01

    def test_sums_to_the_mutual_information(self, rng):
        parents = rng.normal(size=(5000, 6))
        children = parents @ np.array([[1], [0.8], [0.6], [0.4], [0.2], [0.1]]) + rng.normal(size=(5000, 1))
        groups = np.zeros(1, int), np.arange(6)
        found = layer_cmi(children, parents, *groups, estimator="gaussian", given="kept", shrinkage=1e-6)
        whole = layer_cmi(children, parents, np.zeros(1, int), np.zeros(6, int), estimator="gaussian", shrinkage=1e-6)
        assert found.sum() == pytest.approx(whole[0, 0], abs=2e-3)

    def test_noise_makes_information_of_a_function_finite(self, rng):
        """A child that is a sum of its parents, seen at a signal-to-noise ratio of 1: 1/2 log 2 in all."""
        parents = rng.normal(size=(5000, 40))
        children = parents.sum(1, keepdims=True)
        groups = np.zeros(1, int), np.arange(40) // 4
        found = layer_cmi(children, parents, *groups, estimator="gaussian", given="kept", shrinkage=1e-6, snr=[1.0])
        assert found.sum() == pytest.approx(np.log(2) / 2, rel=0.01)
        assert found.min() == pytest.approx(found.mean())  # parents that are worth the same

    def test_any_number_of_workers_and_dead_units(self, layer):
        children, parents, *groups = layer
        parents[:, [3, 4, 9]] = 7
        one, two = (layer_cmi(children, parents, *groups, estimator="gaussian", given="kept", n_jobs=n) for n in (1, 2))
        assert np.array_equal(one, two)
        assert (one[:, [1, 3]] == 0).all()
        assert (one[:, 0] > 0).any()
