import sys

import pytest
import torch

from diffusers_dtr.analysis import TaskAffinity, confidence_interval, noise_distance_correlation, noise_distances


def affinity(log_snr, function):
    log_snr = torch.tensor(log_snr, dtype=torch.float64)
    matrix = function((log_snr[:, None] - log_snr).abs().nan_to_num())
    timesteps = torch.arange(len(log_snr), dtype=torch.float64)
    return TaskAffinity(matrix, timesteps, timesteps, log_snr, 1.0, "plain")


def test_every_pair_of_different_timesteps_counts_once_but_for_pure_noise():
    distances, affinities = noise_distances(affinity([4.0, 1.0, -1.0, float("-inf")], lambda distance: -distance))
    assert distances.tolist() == [3.0, 5.0, 2.0]
    assert affinities.tolist() == [-3.0, -5.0, -2.0]


@pytest.mark.parametrize(("function", "expected"), [(lambda d: torch.exp(-d), -1.0), (lambda d: d**3, 1.0)])
def test_correlation_sees_order_alone(function, expected):
    found = affinity([9.0, 4.0, 1.0, -2.5, float("inf")], function)
    assert noise_distance_correlation(found) == pytest.approx(expected)


def test_two_timesteps_are_too_few():
    with pytest.raises(ValueError, match="at least three timesteps"):
        noise_distance_correlation(affinity([1.0, 0.0, float("inf")], lambda distance: -distance))


def test_missing_scipy_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    found = affinity([3.0, 2.0, 0.0], lambda distance: -distance)
    for compute in (lambda: noise_distance_correlation(found), lambda: confidence_interval(torch.ones(3))):
        with pytest.raises(ImportError, match=r'need scipy: pip install "diffusers-dtr\[analysis\]"'):
            compute()
