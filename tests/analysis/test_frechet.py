import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg

from diffusers_dtr.analysis import frechet_distance


def gaussian(num_features, size, seed=0):
    return torch.randn(num_features, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distance_is_that_of_scipys_matrix_root():
    one, other = gaussian(200, 16) @ gaussian(16, 16, seed=3), gaussian(150, 16, seed=1) + 0.3
    root = linalg.sqrtm((one.T.cov() @ other.T.cov()).numpy()).real.trace()
    mean = (one.mean(0) - other.mean(0)).square().sum()
    expected = mean + one.T.cov().trace() + other.T.cov().trace() - 2 * root
    assert frechet_distance(one, other) == pytest.approx(expected.item(), rel=1e-9)
    # Single numbers
    one, other = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [14.0]])
    assert frechet_distance(one, other) == pytest.approx(11**2 + (2 * math.sqrt(2) - math.sqrt(2)) ** 2)


@given(st.integers(0, 10_000))
def test_distance_is_symmetric_zero_from_itself_and_the_same_for_moved_and_turned_sets(seed):
    one, other = gaussian(30, 5, seed), 2 * gaussian(40, 5, seed + 1) + 1
    distance = frechet_distance(one, other)
    assert distance > 0
    assert frechet_distance(other, one) == pytest.approx(distance)
    assert frechet_distance(one, one[torch.randperm(30)]) == pytest.approx(0, abs=1e-9)
    # In ten dimensions, where these depend on each other
    turn = torch.linalg.qr(gaussian(10, 5, seed + 2))[0].T
    assert frechet_distance(one @ turn + 5, other @ turn + 5) == pytest.approx(distance)


def test_feature_without_variance_adds_its_squared_difference():
    one, other = gaussian(60, 4), gaussian(50, 4, seed=1)
    with_three, with_five = (torch.nn.functional.pad(a, (0, 1), value=b) for a, b in ((one, 3), (other, 5)))
    assert frechet_distance(with_three, with_five) == pytest.approx(frechet_distance(one, other) + 4)


def test_features_in_half_precision_are_compared_in_float64():
    one, other = ((300 + gaussian(500, 3, seed)).half() for seed in (0, 1))
    assert frechet_distance(one, other) == frechet_distance(one.double(), other.double())


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (torch.zeros(4, 4), torch.randn(20, 4), r"`features` must have the shape \(n, d\) with n > d > 0"),
        (torch.zeros(5, 0), torch.randn(20, 0), r"`features` must have the shape \(n, d\)"),
        (torch.randn(20, 4), torch.zeros(10), r"`other` must have the shape \(n, d\)"),
        (torch.randn(9, 3), torch.randn(9, 4), "`other` must have features of as many numbers .* 3, got 4"),
        (torch.randn(9, 1), torch.tensor([[1.0], [math.nan], [math.inf]]), "`other` must be finite, got 2 numbers"),
    ],
)
def test_sets_that_have_no_distance_are_refused(one, other, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(one, other)
