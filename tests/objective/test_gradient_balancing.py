import copy
import io
import sys
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn
from torchjd import aggregation
from two_processes import global_batch, small_denoiser

from diffusers_dtr import DTRTransformer2DModel
from diffusers_dtr.objective import ClusteredLoss, ClusterLosses, GradientBalancer, cluster_timesteps


K = 4
SCHEDULER = DDPMScheduler()
CLUSTERS = cluster_timesteps(SCHEDULER, K)
# Constructors, because some of these remember earlier calls.
WEIGHTINGS = {
    "pcgrad": (lambda: "pcgrad", aggregation.PCGrad),
    "nash_mtl": (lambda: "nash_mtl", partial(aggregation.NashMTL, K)),
    "mgda": (lambda: "mgda", aggregation.MGDA),
    "imtl_g": (lambda: "imtl_g", aggregation.IMTLG),
    "aligned_mtl": (lambda: "aligned_mtl", aggregation.AlignedMTL),
    "CAGrad": (partial(aggregation.CAGrad, 0.5), partial(aggregation.CAGrad, 0.5)),
    "FairGradWeighting": (partial(aggregation.FairGradWeighting, 1.0), partial(aggregation.FairGrad, 1.0)),
}
STATEFUL = {
    # Solved to the end, its weights depend on earlier ones only where the solver fails.
    "NashMTL": partial(aggregation.NashMTL, K, optim_niter=1),
    "GradVac": aggregation.GradVac,
    "PCDWeighting": partial(aggregation.PCDWeighting, 0.5),
    "CRMOGMWeighting": lambda: aggregation.CRMOGMWeighting(aggregation.GradVacWeighting()),
}


@pytest.fixture
def denoiser():
    return small_denoiser(torch.Generator().manual_seed(0))


def clustered_loss(denoiser, seed, **arguments):
    clean, noise, timesteps = global_batch(torch.Generator().manual_seed(seed))
    loss_fn = ClusteredLoss(SCHEDULER, CLUSTERS, **arguments)
    noisy = loss_fn.levels.add_noise(clean, noise, timesteps).to(next(denoiser.parameters()).dtype)
    output = loss_fn.denoise(lambda some, *_: denoiser(some), noisy, timesteps)
    return loss_fn(output, clean, noise, timesteps), CLUSTERS.assign(timesteps)


def balanced_loss(balancer, denoiser, seed=0):
    return clustered_loss(denoiser, seed, balancing=balancer)[0].loss


def weights_of(balancer, denoiser, seeds=(0,)):
    """The weights after each of some steps, `(steps, k)`."""
    return torch.stack([(balanced_loss(balancer, denoiser, seed), balancer.weights)[1] for seed in seeds])


def contributions(denoiser, seed=0):
    out, clusters = clustered_loss(denoiser, seed)
    return ClusterLosses(out.per_sample, clusters, torch.zeros(len(clusters)), K).contributions


def jacobian(denoiser):
    rows = [torch.autograd.grad(one, [*denoiser.parameters()], retain_graph=True) for one in contributions(denoiser)]
    return torch.stack([torch.cat([gradient.flatten().double() for gradient in row]) for row in rows])


def mgda_weights(rows):
    return aggregation.MGDAWeighting()(rows @ rows.T).float()


def gradient(denoiser):
    return torch.cat([parameter.grad.flatten() for parameter in denoiser.parameters()])


def saved(module):
    """The state dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- the gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_gradient_is_what_torchjd_makes_of_the_jacobian(denoiser, name):
    make_weighting, make_aggregator = WEIGHTINGS[name]
    rows = jacobian(denoiser)
    assert (rows @ rows.T < 0).any()  # the clusters conflict here
    torch.manual_seed(3)
    # In float64, as ours solves; and random orders drawn from the same seed.
    expected = make_aggregator()(rows).float()
    balanced_loss(GradientBalancer(denoiser, make_weighting(), K, seed=3), denoiser).backward()
    torch.testing.assert_close(gradient(denoiser), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["pcgrad", "mgda"])
def test_a_call_for_the_batch_and_one_per_cluster_give_the_same_gradient(denoiser, name):
    clean, noise, timesteps = global_batch(torch.Generator().manual_seed(0))
    told = {"rows": torch.arange(16), "names": [str(row) for row in range(16)], "none": None, "more": {"t": timesteps}}
    calls = []

    def call(some, timesteps, conditions):
        assert conditions["names"] == [str(row) for row in conditions["rows"].tolist()]
        assert conditions["none"] is None
        assert torch.equal(conditions["more"]["t"], timesteps)
        calls.append(CLUSTERS.assign(timesteps).unique().tolist())
        return denoiser(some)

    gradients = []
    for by_cluster in (True, False):
        balancer = GradientBalancer(denoiser, name, K, update_every=2)
        loss_fn = ClusteredLoss(SCHEDULER, CLUSTERS, balancing=balancer)
        output = loss_fn.denoise(call, clean, timesteps, told) if by_cluster else denoiser(clean)
        denoiser.zero_grad()
        loss_fn(output, clean, noise, timesteps).loss.backward()
        gradients.append(gradient(denoiser))
    torch.testing.assert_close(*gradients)
    loss_fn.denoise(call, clean, timesteps, told)  # for a loss with the weights of the step before
    assert calls == [[0], [1], [2], [3], [0, 1, 2, 3]]


@pytest.mark.parametrize("balancing", ["uniform", "pcgrad"])
@pytest.mark.parametrize(
    ("conditions", "returned", "message"),
    [
        ({"text": torch.zeros(3, 2)}, 0, r"must have 16 rows, one per sample, got \(3, 2\) in 'text'"),
        ({"more": {"scale": torch.tensor(1.0)}}, 0, r"must have 16 rows, one per sample, got \(\) in 'scale'"),
        ({"names": ["a"]}, 0, "must have 16 rows, one per sample, got a list of 1 in 'names'"),
        ({"return_dict": False}, 0, "must be tensors, lists, dictionaries of them or None, got bool in 'return_dict'"),
        ({}, slice(None), r"must return a tensor with \d+ rows, got tuple: of a model of diffusers it is `.sample`"),
        ({}, (0, slice(1, None)), r"must return a tensor with \d+ rows, got \(\d+, 2, 4, 4\)"),
    ],
)
def test_wrong_conditions_and_outputs_are_refused_in_steps_of_either_kind(
    denoiser, balancing, conditions, returned, message
):
    way = balancing if balancing == "uniform" else GradientBalancer(denoiser, balancing, K)
    loss_fn = ClusteredLoss(SCHEDULER, CLUSTERS, balancing=way)
    clean, _, timesteps = global_batch(torch.Generator().manual_seed(0))

    def call(some, *_):
        output = (denoiser(some),)
        return output[returned[0]][returned[1]] if isinstance(returned, tuple) else output[returned]

    with pytest.raises((TypeError, ValueError), match=message):
        loss_fn.denoise(call, clean, timesteps, conditions)


def test_backward_passes_of_outputs_by_cluster_see_their_own_samples_only(denoiser):
    seen = []
    denoiser.register_full_backward_pre_hook(lambda module, outputs: seen.append(len(outputs[0])))
    _, clusters = clustered_loss(denoiser, 0, balancing=GradientBalancer(denoiser, "mgda", K))
    assert seen == clusters.bincount(minlength=K).tolist()


def test_nothing_reaches_grad_before_backward_and_two_losses_may_wait_for_it(denoiser):
    balancer = GradientBalancer(denoiser, "mgda", K)
    losses = [balanced_loss(balancer, denoiser, seed) for seed in range(2)]
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    total = 0
    for seed, loss in enumerate(losses):
        loss.backward()  # accumulates
        fresh = GradientBalancer(denoiser, "mgda", K)
        own = torch.autograd.grad(balanced_loss(fresh, denoiser, seed), list(denoiser.parameters()))
        total = total + torch.cat([part.flatten() for part in own])
        torch.testing.assert_close(gradient(denoiser), total)


def test_the_gramian_may_be_of_a_part_of_the_denoiser(denoiser):
    balancer = GradientBalancer(denoiser[1], "mgda", K)
    balanced_loss(balancer, denoiser).backward()
    size = sum(parameter.numel() for parameter in denoiser[1].parameters())
    torch.testing.assert_close(balancer.weights, mgda_weights(jacobian(denoiser)[:, -size:]), rtol=1e-4, atol=1e-5)
    assert denoiser[0].weight.grad.abs().max() > 0


def test_frozen_and_unused_parameters_do_no_harm(denoiser):
    expected = weights_of(GradientBalancer(denoiser, "mgda", K), denoiser)
    denoiser.unused = nn.Linear(1, 1)
    denoiser.frozen = nn.Linear(1, 1).requires_grad_(False)
    found = weights_of(GradientBalancer(denoiser, "mgda", K), denoiser[:2])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_checkpointed_blocks_with_routing_give_the_same_gradient():
    torch.manual_seed(0)
    config = {"in_channels": 2, "num_layers": 2, "sample_size": 4, "num_embeds_ada_norm": None, "routing_beta": 0.5}
    denoiser = DTRTransformer2DModel(2, 8, **config).train()
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    clean, noise, timesteps = global_batch(torch.Generator().manual_seed(0))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            denoiser.enable_gradient_checkpointing()
        loss_fn = ClusteredLoss(SCHEDULER, CLUSTERS, balancing=GradientBalancer(denoiser, "mgda", K))
        denoiser.zero_grad()
        output = loss_fn.denoise(lambda some, timesteps, _: denoiser(some, timesteps).sample, clean, timesteps)
        loss_fn(output, clean, noise, timesteps).loss.backward()
        gradients.append(gradient(denoiser))
    torch.testing.assert_close(*gradients)


# --- the weights -----------------------------------------------------------------------------------------------------


def test_weights_are_solved_for_every_few_steps(denoiser):
    weights = weights_of(GradientBalancer(denoiser, "mgda", K, update_every=3), denoiser, range(7))
    assert [step for step in range(1, 7) if not torch.equal(weights[step], weights[step - 1])] == [3, 6]


def test_evaluation_uses_the_last_weights(denoiser):
    balancer = GradientBalancer(denoiser, "mgda", K)
    assert torch.equal(balancer.weights, torch.ones(K))
    (weights,) = weights_of(balancer, denoiser)
    with torch.no_grad():
        loss = balanced_loss(balancer, denoiser, seed=1)
    torch.testing.assert_close(loss, weights @ contributions(denoiser, seed=1))
    assert torch.equal(weights_of(balancer.eval(), denoiser, [1])[0], weights)


def test_a_cluster_without_samples_leaves_weights_as_they_were_and_warns(denoiser):
    balancer = GradientBalancer(denoiser, "mgda", K)
    (weights,) = weights_of(balancer, denoiser)
    losses = ClusterLosses(contributions(denoiser)[:3], torch.tensor([0, 1, 3]), torch.zeros(3), K)
    with pytest.warns(UserWarning, match=r"clusters \[2\] had no samples .* global batches of at least 4"):
        loss = balancer(losses)
    assert torch.equal(balancer.weights, weights)
    torch.testing.assert_close(loss, weights @ losses.contributions)


def test_random_orders_come_from_the_seed_alone(denoiser):
    def weights(seed, global_seed):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        seen = weights_of(GradientBalancer(denoiser, "pcgrad", K, seed=seed), denoiser, [0] * 4)
        assert torch.equal(torch.get_rng_state(), state)
        return seen

    first = weights(seed=0, global_seed=1)
    assert torch.equal(first, weights(seed=0, global_seed=2))
    assert not torch.equal(first, weights(seed=10, global_seed=1))
    assert any(not torch.equal(first[0], row) for row in first[1:])


# --- precision -------------------------------------------------------------------------------------------------------


def scaler(scale):
    return torch.amp.GradScaler("cpu", init_scale=scale)


class HalfPrecisionGradient(torch.autograd.Function):
    """What a backward pass in float16 does to small gradients."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.half().float()


def test_loss_scaling_changes_no_weights_and_saves_gradients_from_underflow(denoiser):
    # NashMTL limits the norm of the update, and so knows how large gradients are.
    plain, scaled = (GradientBalancer(denoiser, "nash_mtl", K, scaler=own) for own in (None, scaler(2.0**16)))
    torch.testing.assert_close(weights_of(scaled, denoiser), weights_of(plain, denoiser))

    tiny = HalfPrecisionGradient.apply(contributions(denoiser)) * 2.0**-30
    losses = ClusterLosses(tiny, torch.arange(K), torch.zeros(K), K)
    expected, scaled = (GradientBalancer(denoiser, "mgda", K, scaler=own) for own in (None, scaler(2.0**20)))
    with pytest.warns(UserWarning, match="no samples with a gradient"):
        expected(losses)
    scaled(losses)
    torch.testing.assert_close(scaled.weights, weights_of(expected, denoiser)[0])


def test_gradients_that_overflow_leave_weights_as_they_were(denoiser):
    own = scaler(1.0)
    balancer = GradientBalancer(denoiser, "mgda", K, scaler=own)
    (weights,) = weights_of(balancer, denoiser)
    own.update(2.0**80)
    assert torch.equal(weights_of(balancer, denoiser, [1])[0], weights)


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


# Autocast rounds products of matrices and vectors on a GPU only.
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])])
def test_autocast_does_not_round_the_gramian(denoiser, device):
    per_sample = contributions(denoiser).to(device).detach()
    factors = nn.Linear(1, K, bias=False, device=device)

    def balance():
        balancer = GradientBalancer(factors, "nash_mtl", K).to(device)
        losses = per_sample * (factors.weight[:, 0] + factors.weight.sum())
        loss = balancer(ClusterLosses(losses, torch.arange(K, device=device), per_sample, K))
        assert loss.dtype == torch.float32
        return balancer.weights

    expected = balance()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(balance(), expected)


def test_bfloat16_denoisers_have_a_float32_gramian(denoiser):
    (weights,) = weights_of(GradientBalancer(denoiser.bfloat16(), "mgda", K), denoiser)
    torch.testing.assert_close(weights, mgda_weights(jacobian(denoiser)), rtol=1e-4, atol=1e-5)


# --- the state -------------------------------------------------------------------------------------------------------


def test_the_denoiser_is_no_part_of_the_balancer(denoiser):
    balancer = GradientBalancer(denoiser, "pcgrad", K)
    assert list(balancer.parameters()) == []
    assert set(balancer.state_dict()) == {"weights", "step"}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_resumed_run_has_the_weights_of_the_uninterrupted_one(denoiser, name):
    def loss_fn():
        balancer = GradientBalancer(denoiser, STATEFUL[name](), K, update_every=2)
        return ClusteredLoss(SCHEDULER, CLUSTERS, balancing=balancer)

    uninterrupted, resumed, used = loss_fn(), loss_fn(), loss_fn()
    weights_of(uninterrupted.balancing, denoiser, range(5))
    state = saved(uninterrupted)
    before = copy.deepcopy(state)
    expected = weights_of(uninterrupted.balancing, denoiser, range(5, 10))
    weights_of(used.balancing, denoiser, range(7, 10))
    for other in (resumed, used):
        other.load_state_dict(state)
        assert torch.equal(weights_of(other.balancing, denoiser, range(5, 10)), expected)
    assert all(torch.equal(state[key], before[key]) for key in before)


@pytest.mark.parametrize("name", STATEFUL)
def test_an_untouched_state_makes_a_used_weighting_forget(denoiser, name):
    used, fresh = (GradientBalancer(denoiser, STATEFUL[name](), K) for _ in range(2))
    untouched = saved(fresh)
    (expected,) = weights_of(fresh, denoiser)
    assert not torch.equal(weights_of(used, denoiser, [5, 0])[1], expected)  # earlier Gramians matter
    used.load_state_dict(untouched)
    assert torch.equal(weights_of(used, denoiser)[0], expected)


def test_states_with_other_keys_are_refused(denoiser):
    nash = GradientBalancer(denoiser, "nash_mtl", K).state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*memory.weighting.prvs_alpha"):
        GradientBalancer(denoiser, "pcgrad", K).load_state_dict(nash)
    with pytest.raises(RuntimeError, match=r"Missing key.*step"):
        GradientBalancer(denoiser, "pcgrad", K).load_state_dict({"weights": torch.ones(K)})


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        (aggregation.ExcessMTL(), "a function of the Gramian.*got ExcessMTLWeighting"),
        (aggregation.CRMOGMWeighting(aggregation.SDMGradWeighting()), "got SDMGradWeighting"),
        (aggregation.GradDrop(), "must be a name, or a weighting.*got GradDrop"),
    ],
)
def test_weightings_that_are_no_function_of_the_gramian_are_refused(denoiser, weighting, message):
    with pytest.raises(TypeError, match=message):
        GradientBalancer(denoiser, weighting, K)


@pytest.mark.parametrize(
    ("trainable", "arguments", "message"),
    [
        (True, {"weighting": "pc_grad"}, r"`weighting` must be one of aligned_mtl, .* got 'pc_grad'"),
        (True, {"update_every": 0}, "`update_every` must be an integer >= 1, got 0"),
        (True, {"num_clusters": 2.0}, r"`num_clusters` must be an integer >= 1, got 2\.0"),
        (False, {}, "`module` must have trainable parameters"),
    ],
)
def test_arguments_out_of_range_are_refused(denoiser, trainable, arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientBalancer(denoiser.requires_grad_(trainable), **arguments)


@pytest.mark.parametrize(("package", "weighting"), [("ecos", "nash_mtl"), ("torchjd", "pcgrad")])
def test_missing_packages_are_named_with_our_extra(denoiser, monkeypatch, package, weighting):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'(nash_mtl|torchjd).*pip install "diffusers-dtr\[balancing\]"'):
        GradientBalancer(denoiser, weighting, K)
