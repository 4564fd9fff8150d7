import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg

from diffusers_dtr.analysis import frechet_distance


def gaussian(num_features, size, seed=0):
    return torch.randn(num_features, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(features, mean, covariance):
    """The features moved and stretched to have this mean and (unbiased) covariance to rounding."""
    centred = features - features.mean(0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(torch.atleast_2d(centred.T.cov())), centred.T, upper=False
    ).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def covariance(size, seed):
    root = gaussian(size, size, seed)
    return root @ root.T / size + 0.1 * torch.eye(size)


def test_gaussians_with_commuting_covariances_are_as_far_apart_as_their_closed_form():
    scales = torch.tensor([[1.0, 4.0, 9.0], [4.0, 4.0, 1.0]], dtype=torch.float64)
    one = exactly(gaussian(50, 3), torch.zeros(3), scales[0].diag())
    other = exactly(gaussian(70, 3, seed=1), torch.tensor([1.0, 2.0, 0.0]), scales[1].diag())
    # |mean|² and the squared differences of the standard deviations
    assert frechet_distance(one, other) == pytest.approx(5 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2)


def test_single_numbers_are_as_far_apart_as_their_means_and_deviations():
    one, other = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [14.0]])
    assert frechet_distance(one, other) == pytest.approx(11**2 + (2 * math.sqrt(2) - math.sqrt(2)) ** 2)


def test_distance_is_that_of_scipys_matrix_root():
    one, other = gaussian(200, 16) @ covariance(16, 3), gaussian(150, 16, seed=1) + 0.3
    root = linalg.sqrtm((one.T.cov() @ other.T.cov()).numpy()).real.trace()
    mean = (one.mean(0) - other.mean(0)).square().sum()
    expected = mean + one.T.cov().trace() + other.T.cov().trace() - 2 * root
    assert frechet_distance(one, other) == pytest.approx(expected.item(), rel=1e-9)


@given(st.integers(0, 10_000))
def test_distance_is_symmetric_and_zero_from_itself(seed):
    one, other = gaussian(30, 5, seed), 2 * gaussian(40, 5, seed + 1) + 1
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one))
    assert frechet_distance(one, one[torch.randperm(30)]) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, other) > 0


def test_turning_and_moving_both_sets_changes_nothing():
    one, other = gaussian(60, 6) @ covariance(6, 1), gaussian(50, 6, seed=1)
    turn = torch.linalg.qr(gaussian(6, 6, seed=2))[0]
    assert frechet_distance(one @ turn + 5, other @ turn + 5) == pytest.approx(frechet_distance(one, other))


def test_feature_without_variance_adds_its_squared_difference():
    one, other = gaussian(60, 4), gaussian(50, 4, seed=1)
    threes, fives = (torch.full((len(features), 1), value) for features, value in ((one, 3), (other, 5)))
    assert frechet_distance(torch.cat([one, threes], 1), torch.cat([other, fives], 1)) == pytest.approx(
        frechet_distance(one, other) + 4
    )


def test_features_that_depend_on_each_other_are_no_trouble():
    one, other = gaussian(60, 4), gaussian(50, 4, seed=1)
    # An orthonormal combination of them in ten dimensions keeps all distances.
    turn = torch.linalg.qr(gaussian(10, 4, seed=2))[0].T
    assert frechet_distance(one @ turn, other @ turn) == pytest.approx(frechet_distance(one, other))


def test_features_in_half_precision_are_compared_in_float64():
    one, other = ((300 + gaussian(500, 3, seed)).half() for seed in (0, 1))
    assert frechet_distance(one, other) == frechet_distance(one.double(), other.double())


@pytest.mark.parametrize("shape", [(4, 4), (3, 4), (10,), (5, 0), (2, 3, 1)])
def test_sets_of_too_few_features_are_refused(shape):
    one = torch.zeros(shape)
    other = torch.randn(20, shape[-1])
    with pytest.raises(ValueError, match=r"`features` must have the shape \(n, d\) with n > d > 0, got"):
        frechet_distance(one, other)
    with pytest.raises(ValueError, match=r"`(other|features)` must have the shape \(n, d\)"):
        frechet_distance(other, one)


def test_features_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="`other` must have features of as many numbers as `features`, 3, got 4"):
        frechet_distance(torch.randn(9, 3), torch.randn(9, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(value):
    bad = torch.randn(9, 3)
    bad[2, 1] = value
    with pytest.raises(ValueError, match="`other` must be finite, got 1 numbers that are not"):
        frechet_distance(torch.randn(9, 3), bad)
