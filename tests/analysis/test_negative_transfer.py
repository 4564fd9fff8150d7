import math

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


def losses(clean=CLEAN, conditions=LABELS, **options):
    options = {"num_samples": 40, **options}
    return HeldOutClusterLosses(DenoisingLoss(SCHEDULER), CLUSTERS, clean, conditions, **options)


def asked_about(model):
    """The clean samples, noise and timesteps of a Recorder's 40 samples."""
    model_input, timesteps = (torch.cat([call[place] for call in model.calls]) for place in (0, 1))
    clean = CLEAN[torch.arange(40) % 6]
    levels = NoiseLevels(SCHEDULER)
    alpha, sigma = (share(timesteps).view(-1, 1, 1, 1).float() for share in (levels.alpha, levels.sigma))
    return clean, (model_input - alpha * clean) / sigma, timesteps


@pytest.mark.parametrize("cluster", range(4))
def test_model_is_asked_about_timesteps_of_the_cluster_alone(cluster):
    model = Recorder()
    values = losses()(model, cluster)
    timesteps = torch.cat([timestep for _, timestep, _ in model.calls])
    assert len(timesteps) == len(values) == 40
    assert (CLUSTERS.assign(timesteps) == cluster).all()
    assert timesteps.unique().numel() > 30
    assert values.dtype == torch.float64


def test_losses_are_squared_errors_of_the_target():
    model, measure = Recorder(), losses()
    values = measure(model, 2)
    clean, noise, timesteps = asked_about(model)
    assert noise.std() == pytest.approx(1, abs=0.05)
    expected = NoiseLevels(SCHEDULER).target(clean, noise, timesteps).square().flatten(1).mean(1)
    torch.testing.assert_close(values.float(), expected, rtol=1e-3, atol=1e-4)


def test_every_clean_sample_takes_its_turn_with_its_conditions():
    model = Recorder()
    losses(conditions={**LABELS, "sizes": {"height": torch.arange(6)}}, batch_size=7)(model, 0)
    labels = torch.cat([call[2]["class_labels"] for call in model.calls])
    assert torch.equal(labels, LABELS["class_labels"][torch.arange(40) % 6])
    heights = torch.cat([call[2]["sizes"]["height"] for call in model.calls])
    assert torch.equal(heights, torch.arange(40) % 6)


def test_models_are_compared_on_the_same_samples():
    one, other, measure = Recorder(), Recorder(), losses()
    measure(one, 1), measure(one, 3), measure(other, 3)
    assert torch.equal(one.calls[1][0], other.calls[0][0])
    assert torch.equal(one.calls[1][1], other.calls[0][1])
    assert not torch.equal(one.calls[0][0], other.calls[0][0])


def test_number_of_samples_in_a_call_changes_nothing():
    model = routed_dit()
    torch.testing.assert_close(losses(batch_size=7)(model, 1), losses()(model, 1), rtol=1e-5, atol=1e-6)
    # Of a size for which a generator that is asked twice for half the noise gives other noise
    clean = CLEAN[:, :1, :3, :3]
    few, all_at_once = (losses(clean, None, batch_size=size)(Recorder(), 1) for size in (1, 256))
    torch.testing.assert_close(few, all_at_once)


@pytest.mark.parametrize("seed", [0, 1])
def test_clusters_have_noise_of_their_own_whatever_the_seed_of_another(seed):
    one, other = Recorder(), Recorder()
    losses(seed=seed)(one, 1), losses()(other, 2)
    correlation = torch.corrcoef(torch.stack([asked_about(model)[1].flatten() for model in (one, other)]))[0, 1]
    assert abs(correlation) < 0.05


def test_seeds_draw_other_samples():
    one, other = (losses(seed=seed)(routed_dit(), 0) for seed in (0, 1))
    assert not torch.isclose(one, other).any()


def test_squared_error_alone_counts_where_a_variance_is_learned():
    model = routed_dit()
    assert model.config.out_channels == 2 * CLEAN.shape[1]

    class Prediction(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *inputs, **options):
            return (self.model(*inputs, **options)[0][:, :4],)

    assert torch.equal(losses()(model, 1), losses()(Prediction(), 1))


def test_model_is_left_in_the_mode_that_it_was_in():
    model = routed_dit().train()
    losses()(model, 0)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "`num_samples` must be an integer >= 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1, got 0"),
        ({"clean": CLEAN[:0], "conditions": None}, r"`len\(clean\)` must be an integer >= 1, got 0"),
        ({"clean": CLEAN[:4]}, "one entry for each of the 4 clean samples, got 6 of 'class_labels'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        losses(**arguments)


def test_clusters_of_another_schedule_are_refused():
    with pytest.raises(ValueError, match="`clusters` must be of the 1000 timesteps of `loss_fn`, got clusters of 10"):
        HeldOutClusterLosses(DenoisingLoss(SCHEDULER), TimestepClusters([0, 10]), CLEAN)


@pytest.mark.parametrize("cluster", [-1, 4])
def test_clusters_that_do_not_exist_are_refused(cluster):
    with pytest.raises(ValueError, match=rf"`cluster` must be in \[0, 4\), got {cluster}"):
        losses()(Recorder(), cluster)


def test_gap_is_negative_where_the_specialist_is_better():
    specialist, joint = torch.tensor([[0.9, 2.2]]), torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(
        negative_transfer_gap(specialist, joint), torch.tensor([[-0.1, 0.2]]).double(), atol=1e-7, rtol=0
    )
    torch.testing.assert_close(
        negative_transfer_gap(specialist, joint, relative=True),
        torch.tensor([[-0.1, 0.1]]).double(),
        atol=1e-6,
        rtol=0,
    )


def test_one_value_of_the_joint_model_serves_all_clusters():
    gap = negative_transfer_gap(torch.tensor([[1.0, 4.0], [2.0, 0.0]]), torch.tensor([[2.0], [1.0]]))
    assert gap.tolist() == [[-1, 2], [1, -1]]


# Tables of Student's t distribution, two-sided
@pytest.mark.parametrize(
    ("count", "confidence", "quantile"),
    [(2, 0.95, 12.706), (3, 0.95, 4.303), (4, 0.99, 5.841), (5, 0.9, 2.132), (11, 0.95, 2.228), (31, 0.95, 2.042)],
)
def test_half_width_is_that_of_the_tables(count, confidence, quantile):
    values = torch.linspace(-1, 3, count)
    mean, low, high = confidence_interval(values, confidence)
    half = quantile * values.std().item() / math.sqrt(count)
    assert mean == pytest.approx(1)
    assert [(mean - low).item(), (high - mean).item()] == pytest.approx([half, half], rel=3e-4)


def test_entries_are_averaged_over_the_first_dimension():
    values = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    ends = confidence_interval(values)
    assert all(end.shape == (2, 3) and end.dtype == torch.float64 for end in ends)
    for end, single in zip(ends, confidence_interval(values[:, 1, 2]), strict=True):
        assert end[1, 2] == single


@pytest.mark.parametrize("values", [torch.tensor(1.0), torch.ones(1), torch.ones(1, 5)])
def test_single_values_have_no_interval(values):
    with pytest.raises(ValueError, match="`values` must have at least two entries"):
        confidence_interval(values)


@pytest.mark.parametrize("confidence", [0, 1, 95, -0.5, math.nan])
def test_shares_that_are_none_are_refused(confidence):
    with pytest.raises(ValueError, match=r"`confidence` must be a number in \(0, 1\)"):
        confidence_interval(torch.ones(3), confidence)
