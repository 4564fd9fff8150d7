import math
import sys

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_dit import NUM_CLASSES, routed_dit

from diffusers_dtr import DenoisingLoss, NoiseLevels, TimestepClusters, cluster_timesteps
from diffusers_dtr.analysis import HeldOutClusterLosses, confidence_interval, negative_transfer_gap


SCHEDULER = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
CLUSTERS = cluster_timesteps(SCHEDULER, num_clusters=4, cost="snr")
CLEAN = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = {"class_labels": torch.arange(6) % NUM_CLASSES}


class Recorder(torch.nn.Module):
    """Answers zero, and remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))
        self.calls = []

    def forward(self, model_input, timestep, return_dict=True, **conditions):
        assert not return_dict
        assert not self.training
        self.calls.append((model_input, timestep, conditions))
        return (self.scale * model_input,)

    def asked_about(self):
        """The clean samples, noise and timesteps of 40 samples."""
        model_input, timesteps = (torch.cat([call[place] for call in self.calls]) for place in (0, 1))
        clean, levels = CLEAN[torch.arange(40) % 6], NoiseLevels(SCHEDULER)
        alpha, sigma = (share(timesteps).view(-1, 1, 1, 1).float() for share in (levels.alpha, levels.sigma))
        return clean, (model_input - alpha * clean) / sigma, timesteps


def losses(clean=CLEAN, conditions=LABELS, clusters=CLUSTERS, **options):
    return HeldOutClusterLosses(
        DenoisingLoss(SCHEDULER), clusters, clean, conditions, **{"num_samples": 40, **options}
    )


@pytest.mark.parametrize("cluster", [0, 3])
def test_losses_are_squared_errors_of_the_target_at_timesteps_of_the_cluster(cluster):
    model = Recorder()
    values = losses()(model, cluster)
    clean, noise, timesteps = model.asked_about()
    assert (values.shape, values.dtype) == ((40,), torch.float64)
    assert (CLUSTERS.assign(timesteps) == cluster).all()
    assert timesteps.unique().numel() > 30
    assert noise.std() == pytest.approx(1, abs=0.05)
    expected = NoiseLevels(SCHEDULER).target(clean, noise, timesteps).square().flatten(1).mean(1)
    torch.testing.assert_close(values.float(), expected, rtol=1e-2, atol=1e-3)


def test_every_clean_sample_takes_its_turn_with_its_conditions():
    model = Recorder()
    losses(conditions={**LABELS, "sizes": {"height": torch.arange(6)}}, batch_size=7)(model, 0)
    conditions = [call[2] for call in model.calls]
    labels = torch.cat([of_call["class_labels"] for of_call in conditions])
    assert torch.equal(labels, LABELS["class_labels"][torch.arange(40) % 6])
    assert torch.equal(torch.cat([of_call["sizes"]["height"] for of_call in conditions]), torch.arange(40) % 6)


def test_models_are_compared_on_the_same_samples():
    one, other, measure = Recorder(), Recorder(), losses()
    measure(one, 1), measure(one, 3), measure(other, 3)
    assert torch.equal(one.calls[1][0], other.calls[0][0])
    assert torch.equal(one.calls[1][1], other.calls[0][1])
    assert not torch.equal(one.calls[0][0], other.calls[0][0])


def test_number_of_samples_in_a_call_changes_nothing():
    # Of a size for which a generator that is asked twice for half the noise gives other noise
    clean = CLEAN[:, :1, :3, :3]
    few, all_at_once = (losses(clean, None, batch_size=size)(Recorder(), 1) for size in (1, 256))
    torch.testing.assert_close(few, all_at_once)


def test_clusters_and_seeds_have_noise_of_their_own():
    one, other, again = Recorder(), Recorder(), Recorder()
    losses()(one, 1), losses()(other, 2), losses(seed=1)(again, 1)
    noises = torch.stack([model.asked_about()[1].flatten() for model in (one, other, again)])
    assert torch.corrcoef(noises).triu(1).abs().max() < 0.05


def test_squared_error_alone_counts_where_a_variance_is_learned_and_the_model_keeps_its_mode():
    model = routed_dit().train()
    assert model.config.out_channels == 2 * CLEAN.shape[1]

    class Prediction(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *inputs, **options):
            return (self.model(*inputs, **options)[0][:, :4],)

    assert torch.equal(losses()(model, 1), losses()(Prediction(), 1))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "cluster", "message"),
    [
        *(({name: 0}, 0, f"`{name}` must be an integer >= 1, got 0") for name in ("num_samples", "batch_size")),
        ({"clean": CLEAN[:0], "conditions": None}, 0, r"`len\(clean\)` must be an integer >= 1, got 0"),
        ({"clean": CLEAN[:4]}, 0, "one entry for each of the 4 clean samples, got 6 of 'class_labels'"),
        ({"clusters": TimestepClusters([0, 10])}, 0, "`clusters` must be of the 1000 timesteps .* of 10"),
        ({}, -1, r"`cluster` must be in \[0, 4\), got -1"),
        ({}, 4, r"`cluster` must be in \[0, 4\), got 4"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, cluster, message):
    with pytest.raises(ValueError, match=message):
        losses(**arguments)(Recorder(), cluster)


@pytest.mark.parametrize(
    ("joint", "relative", "gap"),
    [
        ([[1.0, 2.0], [3.0, 1.0]], False, [[-0.1, 2], [-1, -1]]),  # negative where the specialist is better
        ([[1.0, 2.0], [4.0, 1.0]], True, [[-0.1, 1], [-0.5, -1]]),
        ([[2.0], [1.0]], False, [[-1.1, 2], [1, -1]]),  # one value for all clusters
    ],
)
def test_gap_is_the_specialists_metric_less_the_joint_models(joint, relative, gap):
    found = negative_transfer_gap(torch.tensor([[0.9, 4.0], [2.0, 0.0]]), torch.tensor(joint), relative=relative)
    torch.testing.assert_close(found, torch.tensor(gap).double(), atol=1e-6, rtol=0)


# Tables of Student's t distribution, two-sided
@pytest.mark.parametrize(("count", "confidence", "quantile"), [(2, 0.95, 12.706), (4, 0.99, 5.841)])
def test_half_width_is_that_of_the_tables_over_the_first_dimension(count, confidence, quantile):
    values = torch.linspace(-1, 3, count)
    mean, low, high = confidence_interval(torch.stack([values, 7 * values], 1)[:, None], confidence)
    half = quantile * values.std().item() / math.sqrt(count)
    assert mean.dtype == torch.float64
    assert mean.tolist() == [[pytest.approx(1), pytest.approx(7)]]
    for found in (mean - low, high - mean):
        assert found.tolist() == [pytest.approx([half, 7 * half], rel=3e-4)]


@pytest.mark.parametrize(
    ("values", "confidence", "message"),
    [
        *((values, 0.95, "`values` must have at least two") for values in (torch.tensor(1.0), torch.ones(1, 5))),
        *((torch.ones(3), share, r"`confidence` must be a number in \(0, 1\)") for share in (0, 1, math.nan)),
    ],
)
def test_values_without_an_interval_are_refused(values, confidence, message):
    with pytest.raises(ValueError, match=message):
        confidence_interval(values, confidence)


def test_missing_scipy_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r'need scipy: pip install "diffusers-dtr\[analysis\]"'):
        confidence_interval(torch.ones(3))
