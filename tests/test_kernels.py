"""The benchmark that compares kernels with the Gaussian form, against closed forms."""

import itertools

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

import kernels


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1, 30])
def test_growth_of_a_few_values_is_the_entropy_of_their_mixture(rng, scale):
    values = scale * rng.normal(size=(3, 7))
    for row, growth in zip(values, kernels.kernel_growth(values), strict=True):

        def term(at, row=row):
            return -norm.pdf(at - row).mean() * np.log(norm.pdf(at - row).mean())

        ends = np.sort(np.r_[row.min() - 9, row, row.max() + 9])
        entropy = sum(quad(term, low, high, epsabs=1e-12)[0] for low, high in itertools.pairwise(ends))
        assert growth == pytest.approx(entropy - norm.entropy(), abs=1e-9)


def test_what_is_gaussian_grows_as_the_closed_form_says(rng):
    sample = rng.normal(size=(1, 4000))
    for scale in (0.01, 0.3, 1, 3):
        exact = kernels.gaussian_growth(scale * sample)
        np.testing.assert_allclose(kernels.kernel_growth(scale * sample), exact, rtol=0.01)


def test_residuals_are_those_of_least_squares_on_what_is_kept(rng):
    parents = rng.normal(size=(60, 6))
    parents[:, 4] = parents[:, 0]  # a copy, and a constant
    parents[:, 5] = 0
    child, groups, order = rng.normal(size=60), np.arange(6) // 2, np.array([1, 2, 0])
    found = kernels.residuals(parents, child, groups, order)
    for gone in range(4):
        kept = parents[:, np.isin(groups, order[gone:])]
        expected = child - kept @ np.linalg.lstsq(kept, child)[0] if kept.size else child
        np.testing.assert_allclose(found[gone], expected, atol=1e-6)
