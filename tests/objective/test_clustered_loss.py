from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import nn

from diffusers_dtr.objective import (
    Balancing,
    ClusteredLoss,
    DenoisingLoss,
    MinSNR,
    TimestepClusters,
    UncertaintyWeighting,
    cluster_timesteps,
)


REFERENCE = load_file(Path(__file__).parents[1] / "fixtures" / "losses.safetensors")
BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def clustered_loss(num_clusters=4, **arguments):
    scheduler = DDPMScheduler()
    return ClusteredLoss(scheduler, cluster_timesteps(scheduler, num_clusters, cost="uniform"), **arguments)


def batch(timesteps):
    samples = torch.randn(3, len(timesteps), 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return *samples, torch.as_tensor(timesteps)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_uncertainty_weighted_loss_equals_that_of_the_authors(schedule):
    reference = {name.split(".", 1)[1]: value for name, value in REFERENCE.items() if name.startswith(schedule)}
    scheduler = DDPMScheduler(beta_schedule=BETA_SCHEDULES[schedule])
    loss_fn = ClusteredLoss(scheduler, cluster_timesteps(scheduler, 8, cost="uniform"), balancing="uncertainty")
    loss_fn.balancing.load_state_dict({"log_variance": reference["uw.log_variance"]})
    out = loss_fn(*(reference[name] for name in ("model_output", "clean", "noise", "timesteps")))
    assert out.counts.tolist() == [2] * 8
    torch.testing.assert_close(out.per_sample, out.mse + out.variational_bound)
    torch.testing.assert_close(out.loss, reference["uw.loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.per_cluster, reference["constant.loss"].reshape(8, 2).mean(1), rtol=1e-5, atol=1e-5)


def test_uniform_balancing_of_stratified_timesteps_is_the_plain_mean_and_learns_nothing():
    loss_fn = clustered_loss(weighting=MinSNR(2.0))
    model_output, *rest = batch(loss_fn.clusters.sample(16, generator=torch.Generator().manual_seed(0)))
    out = loss_fn(model_output.requires_grad_(), *rest)
    plain = DenoisingLoss(DDPMScheduler(), MinSNR(2.0))(model_output, *rest)
    assert out.counts.tolist() == [4] * 4
    torch.testing.assert_close(out.loss, plain.loss)
    torch.testing.assert_close(out.loss, out.per_cluster.mean())
    assert torch.equal(out.per_sample, plain.per_sample)
    assert out.loss.requires_grad
    assert not out.per_cluster.requires_grad  # what is logged keeps no graph
    assert loss_fn.parameter_groups() == []


@pytest.mark.parametrize("balancing", ["uniform", "uncertainty", "continuous_uncertainty"])
def test_clusters_without_samples_poison_nothing(balancing):
    loss_fn = clustered_loss(balancing=balancing)
    model_output, *rest = batch([10, 20, 990])
    out = loss_fn(model_output.requires_grad_(), *rest)
    out.loss.backward()
    assert out.counts.tolist() == [2, 0, 0, 1]
    expected = [out.per_sample[:2].mean().item(), 0, 0, out.per_sample[2].item()]
    assert out.per_cluster.tolist() == pytest.approx(expected)
    for value in (out.loss, model_output.grad, *(parameter.grad for parameter in loss_fn.parameters())):
        assert value.isfinite().all()


def test_sample_weights_enter_the_loss_only():
    loss_fn, samples, weights = clustered_loss(), batch([10, 300, 990]), torch.tensor([0.5, 2.0, 1.0])
    plain, out = loss_fn(*samples), loss_fn(*samples, sample_weights=weights)
    torch.testing.assert_close(out.loss, (weights * plain.per_sample).mean())
    for name in ("per_sample", "per_cluster", "counts", "mse"):
        assert torch.equal(getattr(out, name), getattr(plain, name))
    with pytest.raises(ValueError, match=r"`sample_weights` must have the shape of `timesteps`, \(3,\), got \(1,\)"):
        loss_fn(*samples, sample_weights=torch.ones(1))


class WorstCluster(Balancing):
    """A balancing as a user would write it: a smooth maximum over the clusters, of a learned sharpness."""

    def __init__(self):
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(2.0))

    def forward(self, losses):
        return (losses.means * (losses.means * self.sharpness).softmax(0)).sum()


@pytest.mark.parametrize(
    ("balancing", "name"),
    [("uncertainty", "log_variance"), ("continuous_uncertainty", "weight"), (WorstCluster(), "sharpness")],
)
def test_learned_balancings_and_a_users_own_are_trained_in_a_group_of_their_own(balancing, name):
    loss_fn = clustered_loss(balancing=balancing)
    out = loss_fn(*batch([10, 300, 700, 990]))
    out.loss.backward()
    (group,) = loss_fn.parameter_groups()
    assert (group["lr"], group["weight_decay"]) == (0.025, 0.0)
    (parameter,) = group["params"]
    assert parameter is getattr(loss_fn.balancing, name)
    assert parameter.grad.any()
    assert loss_fn.cluster_weights().tolist() == pytest.approx([0.5 if balancing == "uncertainty" else 1] * 4)
    if isinstance(balancing, WorstCluster):
        assert out.per_cluster.mean() < out.loss < out.per_cluster.max()


@pytest.mark.parametrize("prepared", [False, True])
def test_accelerate_saves_and_restores_what_was_learned(tmp_path, prepared):
    def setup():
        accelerator = Accelerator(cpu=True)
        loss_fn = clustered_loss(balancing="uncertainty")
        optimizer = torch.optim.Adam(loss_fn.parameter_groups())
        if prepared:
            return accelerator, *accelerator.prepare(loss_fn, optimizer)
        accelerator.register_for_checkpointing(loss_fn)
        return accelerator, loss_fn, accelerator.prepare(optimizer)

    def step(accelerator, loss_fn, optimizer):
        accelerator.backward(loss_fn(*batch([10, 300, 700, 990])).loss)
        optimizer.step()
        optimizer.zero_grad()

    uninterrupted = setup()
    step(*uninterrupted)
    uninterrupted[0].save_state(tmp_path)
    step(*uninterrupted)
    resumed = setup()
    resumed[0].load_state(tmp_path)
    step(*resumed)
    assert resumed[1].balancing.log_variance.abs().max() > 0.04
    assert torch.equal(resumed[1].balancing.log_variance, uninterrupted[1].balancing.log_variance)


def test_a_state_of_other_clusters_is_refused():
    one, other = (ClusteredLoss(DDPMScheduler(), TimestepClusters([0, edge, 1000])) for edge in (10, 20))
    with pytest.raises(ValueError, match=r"of clusters with the boundaries \[0, 20, 1000\], got \[0, 10, 1000\]"):
        other.load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("scheduler", "clusters"),
    [
        (DDPMScheduler(), cluster_timesteps(500, 4, cost="uniform")),
        (FlowMatchEulerDiscreteScheduler(), cluster_timesteps(1000, 4, cost="uniform")),
        (DDPMScheduler(), cluster_timesteps(FlowMatchEulerDiscreteScheduler(), 4)),
    ],
)
def test_clusters_of_other_timesteps_are_refused(scheduler, clusters):
    with pytest.raises(ValueError, match="`clusters` must be of the 1000 training timesteps"):
        ClusteredLoss(scheduler, clusters)


def test_balancing_must_be_a_balancing_of_as_many_clusters():
    with pytest.raises(ValueError, match="`balancing` must be for the 4 clusters of `clusters`, got one for 5"):
        clustered_loss(balancing=UncertaintyWeighting(5))
    with pytest.raises(ValueError, match=r"`balancing` must be one of uniform, uncertainty, .* got 'pcgrad'"):
        clustered_loss(balancing="pcgrad")
    with pytest.raises(TypeError, match="`balancing` must be a name or a Balancing, got Linear"):
        clustered_loss(balancing=nn.Linear(1, 1))


def test_flow_matching_and_half_precision_outputs_work():
    scheduler = FlowMatchEulerDiscreteScheduler()
    clusters = cluster_timesteps(scheduler, 4)
    loss_fn = ClusteredLoss(scheduler, clusters, weighting="logit_normal", balancing="continuous_uncertainty")
    timesteps = torch.cat([clusters.sample(7, generator=torch.Generator().manual_seed(0)), torch.tensor([1000.0])])
    model_output, clean, noise, timesteps = batch(timesteps)
    out = loss_fn(model_output.bfloat16(), clean, noise, timesteps)
    assert out.loss.dtype == out.per_cluster.dtype == torch.float32
    assert out.loss.isfinite()
    assert out.counts.sum() == 8
