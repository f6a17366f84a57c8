"""What is asked of the estimators' inputs: any scale and kind of numbers, ties, options, and the caller's settings."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cmi import ESTIMATORS, cmi, inputs, kde, layer_cmi
from common.cmi.inputs import check_samples, standardise
from common.errors import InputError
from common.masks import Blocks
from common.scoring import Estimator, LayerPair

SMOOTH = ("kde", "knn", "gaussian")


def dependent(rng, n=300):
    z = rng.integers(-1000, 1000, (n, 1)).astype(float)
    y = z + rng.integers(-1000, 1000, (n, 1))
    return y + rng.integers(-500, 500, (n, 1)), y, z


@pytest.mark.parametrize("estimator", SMOOTH)
@pytest.mark.parametrize("offset", [1e5, 1e8, 1e9, -1e12, 2.0**51])
def test_shifting_changes_nothing_however_far(rng, estimator, offset):
    """Whole numbers, so that shifting is exact."""
    x, y, z = dependent(rng)
    moved = cmi(x + offset, y + offset, z - offset, estimator=estimator)
    assert moved == pytest.approx(cmi(x, y, z, estimator=estimator), abs=1e-9)


@pytest.mark.parametrize("estimator", SMOOTH)
@pytest.mark.parametrize("factor", [1e300, -1e-300, 1e-9])
def test_scaling_changes_nothing_however_large_or_small(rng, estimator, factor):
    x, y, z = dependent(rng)
    moved = cmi(x * factor, y * factor, z, estimator=estimator)
    assert moved == pytest.approx(cmi(x, y, z, estimator=estimator), abs=1e-9)


def test_what_is_constant():
    tiny, most = 5e-324, sys.float_info.max
    columns = {
        "0.1": (np.full(7, 0.1), False),
        "1e300": (np.full(7, 1e300), False),
        "the least number": (np.full(7, tiny), False),
        "a rounding of 0.3": (np.r_[np.full(6, 0.3), 0.1 + 0.2], False),
        "from end to end": (np.r_[-most, most, np.zeros(5)], True),
        "denormal": (tiny * np.arange(7), True),
        "1e9 and a little": (1e9 + 1e-3 * np.arange(7), True),
        "large and small": (np.r_[1e-300, np.full(6, 1.0)], True),
    }
    scaled, live = standardise(np.stack([values for values, _ in columns.values()], axis=1))
    assert dict(zip(columns, live, strict=True)) == {name: varies for name, (_, varies) in columns.items()}
    np.testing.assert_allclose(scaled.std(0), live, atol=1e-12)
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-12)


def entropy(p):
    return -p * np.log(p) - (1 - p) * np.log(1 - p)


def tied_cases(rng, n):
    """(x, y, z, truth in nats) of discrete, mixed and rectified data."""

    def whole(most):
        return rng.integers(0, most, (n, 1)).astype(float)

    def normal(units=1):
        return rng.normal(size=(n, units))

    def relu(values):
        return np.maximum(values, 0)

    bit, other, five, cause = whole(2), whole(2), whole(5), normal()
    return {
        "independent bits": (bit, other, whole(2), 0),
        "independent bits, nothing given": (bit, other, None, 0),
        "independent 0..4": (five, whole(5), whole(5), 0),
        "more cells than rows": (whole(10), whole(10), whole(10), 0),
        "a bit and its copy": (bit, bit, None, np.log(2)),
        "a copy given another bit": (bit, bit, other, np.log(2)),
        "exclusive or": ((bit + other) % 2, bit, other, np.log(2)),
        "a noisy copy": ((bit + (rng.random((n, 1)) < 0.1)) % 2, bit, None, np.log(2) - entropy(0.1)),
        "whole and real": (five, five + 2 * rng.random((n, 1)), None, np.log(5) - 0.8 * np.log(2)),
        "a bit and a number": (bit, normal(), normal(), 0),
        "rectified": (relu(normal()), relu(normal()), relu(normal()), 0),
        "rectified, several units": (relu(normal(3)), relu(normal(3)), relu(normal(3)), 0),
        "rectified, of one cause": (relu(relu(cause) + normal()), relu(relu(cause) + normal()), relu(cause), 0),
    }


@pytest.mark.parametrize("case", tied_cases(np.random.default_rng(0), 3))
def test_knn_counts_ties(rng, case):
    found, truth = [], tied_cases(rng, 3)[case][3]
    for _ in range(3):
        *data, _ = tied_cases(rng, 600)[case]
        found.append(cmi(*data, estimator="knn"))
    assert np.mean(found) == pytest.approx(truth, abs=0.03)


@pytest.mark.parametrize(("case", "truth"), [("a bit and its copy", 1 / 3), ("independent bits, nothing given", 0)])
def test_gmi_counts_ties(rng, case, truth):
    """1 - 2 * sum of f g / (f + g): of a bit and its copy, f is 1/2 in two cells, where g is 1/4."""
    *data, _ = tied_cases(rng, 1200)[case]
    for estimator in ("gmi", "gmi-residual"):
        found = [cmi(*data, estimator=estimator, seed=seed) for seed in range(4)]
        assert np.mean(found) == pytest.approx(truth, abs=0.05)


def small(rng, n=30):
    return rng.normal(size=(n, 3)), rng.normal(size=(n, 4)), [0, 0, 1], [0, 0, 1, 1]


ILLEGAL = [
    ("gaussian", {"given": "keep"}),
    *(("gaussian", {"given": value}) for value in (["kept"], np.array(["kept", "rest"]))),
    *(("gaussian", {"shrinkage": value}) for value in (2, -1, 0, np.nan, "much")),
    *(("gaussian", {"given": "kept", "snr": value}) for value in ([1, 2], 1.0, [1, -1, 1], [1, np.nan, 1], ["a"] * 3)),
    ("gaussian", {"snr": np.ones(3)}),
    *(("kde", {"width": value}) for value in (-1, 0, np.nan, np.inf, 1e-300, "wide", "Auto", None, np.ones(4))),
    ("kde", {"precision": "half"}),
    *(("kde", {"device": value}) for value in ("abacus", "meta", "cuda:77", 1.5)),
    *(("kde", {"start": value}) for value in ((-1, np.zeros((2, 2))), (31, np.zeros((2, 2))), (0, np.zeros((1, 2))))),
    *(("knn", {"neighbours": value}) for value in (0, -1, 2.5, True, np.nan)),
    *((name, {"seed": value}) for name in ESTIMATORS for value in (-1, 0.5, None)),
    *((name, {"n_jobs": value}) for name in ESTIMATORS for value in (0, 1.5, "all")),
    *((name, {"colour": 1}) for name in ESTIMATORS),
    ("knn", {"width": 1.0}),
    ("gmi", {"neighbours": 3}),
    ("kde", {"shrinkage": 0.1}),
]


@pytest.mark.parametrize(("estimator", "options"), ILLEGAL)
def test_options_out_of_range_are_named(rng, estimator, options):
    with pytest.raises(ValueError, match=list(options)[-1]) as caught:
        layer_cmi(*small(rng), estimator=estimator, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("n_jobs", "tasks", "workers"), [(100_000, 3, 3), (-1, 9, 4), (-100, 9, 1), (3, 9, 3), (2, 0, 1)]
)
def test_no_more_workers_than_work(monkeypatch, n_jobs, tasks, workers):
    monkeypatch.setattr(inputs.joblib, "cpu_count", lambda: 4)
    found, parallel = [], inputs.joblib.Parallel
    monkeypatch.setattr(inputs.joblib, "Parallel", lambda n, **how: found.append(n) or parallel(n, **how))
    assert list(inputs.in_parallel(abs, range(tasks), n_jobs)) == list(range(tasks))
    assert found == [workers]


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_the_callers_settings_stay(rng, flush, estimator, n_jobs):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.set_flush_denormal(flush)
    try:
        layer_cmi(*small(rng), estimator=estimator, n_jobs=n_jobs)
        assert (sys.float_info.min / 2 == 0) == flush
        assert torch.get_num_threads() == 3
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("where", ["rows", "callback"])
def test_the_callers_settings_stay_when_it_fails(rng, monkeypatch, error, where):
    def fail(*_):
        raise error

    before = torch.get_num_threads()
    if where == "rows":
        monkeypatch.setattr(kde._Kernels, "_sum_terms", fail)
    with pytest.raises(error):
        layer_cmi(*small(rng), on_rows=fail)
    assert sys.float_info.min / 2 > 0
    assert torch.get_num_threads() == before


def test_calls_from_several_threads_leave_torchs_threads(rng):
    threads, data, found = torch.get_num_threads(), small(rng, 400), []
    torch.set_num_threads(3)
    try:
        callers = [threading.Thread(target=lambda: found.append(layer_cmi(*data))) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert all((scores == layer_cmi(*data)).all() for scores in found)
    assert len(found) == 4


class Frame:
    """As tables of other libraries: it only knows how to become an array."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return self.values


KINDS = {
    "list": lambda a: a.tolist(),
    "fortran": np.asfortranarray,
    "reversed": lambda a: a[::-1][::-1],
    "strided": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "big endian": lambda a: a.astype(">f8"),
    "table": Frame,
    "unmasked": np.ma.masked_array,
    "tensor": torch.from_numpy,
    "gradient": lambda a: torch.from_numpy(a).requires_grad_() * 1,
    "half": lambda a: torch.from_numpy(a).half(),
    "bfloat16": lambda a: torch.from_numpy(a).bfloat16(),
    "float16": lambda a: a.astype(np.float16),
    "int8": lambda a: a.astype(np.int8),
    "long double": lambda a: a.astype(np.longdouble),
}


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_any_kind(rng, kind, tmp_path):
    whole = rng.integers(-100, 100, (20, 3)).astype(float)
    whole.flags.writeable = kind in ("tensor", "gradient", "half", "bfloat16")
    np.testing.assert_array_equal(check_samples(KINDS[kind](whole), "x"), whole)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_scores_do_not_depend_on_where_the_numbers_lie(rng, estimator):
    """In another order in memory, or where the caller's new tensors go to a GPU: here to nowhere."""
    children, parents, *groups = small(rng, 60)
    scores = layer_cmi(children, parents, *groups, estimator=estimator)
    other = np.asfortranarray(children), torch.tensor(parents.T.copy()).T
    assert (layer_cmi(*other, *groups, estimator=estimator) == scores).all()
    options = {"width": "auto"} if estimator == "kde" else {}
    auto = layer_cmi(children, parents[:, 1:3], groups[0], [0, 1], estimator=estimator, **options)
    with torch.device("meta"):
        assert (layer_cmi(children, parents, *groups, estimator=estimator) == scores).all()
        again = layer_cmi(children, parents[:, 1:3], groups[0], [0, 1], estimator=estimator, **options)
    assert (again == auto).all()


def test_samples_and_labels_from_a_file(rng, tmp_path):
    children, parents, *groups = small(rng)
    np.save(tmp_path / "x.npy", children)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    labels = [torch.tensor(groups[0], dtype=torch.uint8), np.array(groups[1], np.int8) - 100]
    assert (layer_cmi(mapped, parents, *labels) == layer_cmi(children, parents, *groups)).all()


REFUSED = {
    "masked": np.ma.masked_equal(np.arange(12.0).reshape(4, 3), 5),
    "object": np.full((4, 3), 1, object),
    "complex": np.ones((4, 3), complex),
    "complex tensor": torch.ones(4, 3, dtype=torch.complex64),
    "sparse": torch.eye(4).to_sparse(),
    "nowhere": torch.ones(4, 3, device="meta"),
    "ragged": [[1, 2], [3]],
    "text": [["a", "b"]] * 4,
    "times": np.ones((4, 3), "m8[s]"),
    "none": None,
    "beyond float64": np.full((4, 3), np.longdouble("1e4000")),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_array_of_numbers_is_named(kind):
    with pytest.raises(ValueError, match="children") as caught:
        layer_cmi(REFUSED[kind], np.ones((4, 2)), [0, 0, 0], [0, 1])
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="parent_groups"):
        layer_cmi(np.ones((4, 3)), np.ones((4, 2)), [0, 0, 0], REFUSED[kind])


@pytest.mark.parametrize(
    "labels", [[True, False], [0.0, 1.0], ["0", "1"], [None, 0], np.ma.masked_equal([0, 1], 1), []]
)
def test_labels_are_whole_numbers(labels):
    with pytest.raises(ValueError, match="parent_groups"):
        layer_cmi(np.ones((4, 3)), np.ones((4, 2)), [0, 0, 0], labels)


@st.composite
def tied_layers(draw):
    """Few rows of few values, copies of units and rows, more units than rows, constant units, scales of all sizes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, p, c = draw(st.integers(3, 40)), draw(st.integers(1, 12)), draw(st.integers(1, 8))
    parents, children = rng.integers(0, draw(st.integers(1, 6)), (n, p)).astype(float), rng.normal(size=(n, c))
    parents[:, rng.random(p) < 0.3] = parents[:, :1]
    children[:, rng.random(c) < 0.5] = parents[:, :1]
    if draw(st.booleans()):
        rows = rng.integers(0, max(1, n // 2), n)
        parents, children = parents[rows], children[rows]
    offset, factor = draw(st.sampled_from([0, 1, 1e9])), draw(st.sampled_from([1, 1e-300, 1e290]))
    return (children + offset) * factor, parents + offset, rng.integers(-2, 3, c), rng.integers(-2, 3, p), rng


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("given_", ["rest", "kept"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=tied_layers())
def test_tied_layers_have_finite_scores_whatever_their_order(estimator, given_, data):
    children, parents, child_groups, parent_groups, rng = data
    options = {"given": given_} if estimator == "gaussian" else {}
    scores = layer_cmi(children, parents, child_groups, parent_groups, estimator=estimator, **options)
    assert scores.shape == (len(np.unique(child_groups)), len(np.unique(parent_groups)))
    assert np.isfinite(scores).all()
    dead = [(np.ptp(parents[:, parent_groups == g], axis=0) == 0).all() for g in np.unique(parent_groups)]
    assert (scores[:, dead] == 0).all()
    if estimator in SMOOTH and given_ == "rest":
        rows, units = rng.permutation(len(parents)), rng.permutation(parents.shape[1])
        moved = -2.0 * children[rows], parents[rows][:, units] + 3, child_groups, parent_groups[units]
        np.testing.assert_allclose(layer_cmi(*moved, estimator=estimator), scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", ["kde", "knn", "gaussian"])
def test_the_two_sides_are_alike(rng, estimator):
    """I(X; Y | Z) = I(Y; X | Z), also where all three are rectified."""
    x, y, z = (np.maximum(part + rng.normal(size=(200, 1)), 0) for part in dependent(rng, 200))
    tolerance = 1e-9 if estimator != "kde" else 0.2  # kde gives X and Y kernels of different widths
    assert cmi(x, y, z, estimator=estimator) == pytest.approx(cmi(y, x, z, estimator=estimator), abs=tolerance)


@pytest.mark.parametrize("options", [{}, {"given": "kept"}])
def test_constant_units_do_not_change_what_is_shrunk(rng, options):
    """In as many rows as units, for which the covariance is shrunk: others' scores are as without them."""
    parents = rng.normal(size=(40, 20))
    children, groups = parents[:, :4] + rng.normal(size=(40, 4)), np.arange(20) // 2
    expected = layer_cmi(children, parents, [0, 0, 1, 1], groups, estimator="gaussian", **options)
    dead = np.hstack([parents, np.full((40, 30), 3.0)]), np.r_[groups, np.full(30, 10)]
    found = layer_cmi(children, dead[0], [0, 0, 1, 1], dead[1], estimator="gaussian", **options)
    np.testing.assert_allclose(found[:, :10], expected, rtol=1e-9, atol=1e-12)
    assert (found[:, 10] == 0).all()


@pytest.mark.parametrize(("rows", "options", "advice"), [(2, {}, True), (40, {"shrinkage": 2}, False)])
def test_more_images_are_advised_only_where_they_are_few(rng, rows, options, advice):
    estimate = Estimator(Path("none"), Blocks([0, 1], [0, 0, 1]), {"estimator": "gaussian", **options})
    with pytest.raises(InputError) as error:
        estimate(rng.normal(size=(rows, 2)), rng.normal(size=(rows, 3)))
    assert ("try more `samples_per_class`" in str(error.value)) == advice


@pytest.mark.parametrize("scores", [np.ones((3, 2)), np.full((2, 3), np.nan), np.ones(6)])
def test_an_estimate_of_one_s_own_is_a_number_for_every_block(tmp_path, scores):
    pair = LayerPair("b.weight", Blocks([0, 1], [0, 1, 2]), tuple(tmp_path / f"{k}.npy" for k in range(3)), {})
    with pytest.raises(InputError, match=r"0: .* or not finite; legal: a number for every block, \(2, 3\)"):
        pair.save(pair.estimator(pair.blocks), scores, {}, {})
    assert not list(tmp_path.iterdir())
