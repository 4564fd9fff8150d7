"""The clusters, loss and sampling that flags ask for, over the micro-batches of a step and across checkpoints."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from run_config import run_config
from safetensors.torch import load_file, save_file

from diffusers_dtr import DTRTransformer2DModel, NoiseLevels, TaskAffinity
from diffusers_dtr.objective.adaptive_sampling import AdaptiveTimestepSampler
from diffusers_dtr.objective.clustered_loss import ClusteredLossOutput
from diffusers_dtr.objective.weighting import WEIGHTINGS
from diffusers_dtr.training.objective import build_objective, draw_noise
from diffusers_dtr.training.optimizer import build_optimizer


BATCH = 8


class Setup:
    """An objective with all that it is built from."""

    def __init__(self, scheduler: SchedulerMixin | None = None, **options: object):
        config = run_config(**{"train_batch_size": BATCH, "num_clusters": 4, **options})
        accumulation = config.run.gradient_accumulation_steps or 1
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        torch.manual_seed(0)
        size = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4, "sample_size": 4}
        self.model = DTRTransformer2DModel(**size, in_channels=1, out_channels=1, num_embeds_ada_norm=2)
        scheduler = scheduler or DDPMScheduler()
        self.objective = build_objective(config, scheduler, self.model, self.accelerator)
        self.optimizer = build_optimizer(config.optimizer, [{"params": list(self.model.parameters())}])
        if learned := self.objective.loss_fn.parameter_groups():
            self.objective.optimizer = build_optimizer(config.optimizer, learned)

    def sample(self, step: int, part: int, num_parts: int, batch_size: int = BATCH) -> torch.Tensor:
        return self.objective.sample_timesteps(batch_size, 0, step, part, num_parts, torch.device("cpu"))

    def step(self, number: int) -> ClusteredLossOutput:
        generator = torch.Generator().manual_seed(number)
        clean, noise = torch.randn(2, BATCH, 1, 4, 4, generator=generator)
        timesteps = self.sample(number, 0, 1)
        noisy = self.objective.levels.add_noise(clean, noise, timesteps)
        labels = torch.arange(BATCH) % 2
        output = self.model.eval()(noisy, timesteps, labels).sample
        out = self.objective.loss_fn(output, clean, noise, timesteps, self.objective.sample_weights(timesteps))
        self.objective.observe(self.accelerator, timesteps, out)
        out.loss.backward()
        self.objective.step(self.accelerator.scaler)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return out


@pytest.fixture
def quick_fit(monkeypatch):
    """Timesteps follow the losses after two steps; they do after fifty."""
    monkeypatch.setitem(AdaptiveTimestepSampler.__init__.__kwdefaults__, "interval", 2)


def counts(setup: Setup, timesteps: torch.Tensor) -> list[int]:
    return torch.bincount(setup.objective.clusters.assign(timesteps), minlength=len(setup.objective.clusters)).tolist()


# ---- sampling


def test_without_balancing_clusters_are_drawn_by_their_width():
    setup = Setup()
    drawn = counts(setup, setup.sample(0, 0, 1, batch_size=1000))
    assert drawn == pytest.approx([len(cluster) for cluster in setup.objective.clusters], abs=1)
    assert max(drawn) - min(drawn) > 20


def test_with_balancing_or_on_request_clusters_are_drawn_equally_unless_asked_otherwise():
    for options in ({"balancing": "uncertainty"}, {"timestep_sampling": "clusters"}):
        setup = Setup(**options)
        assert counts(setup, setup.sample(0, 0, 1)) == [2, 2, 2, 2]
    setup = Setup(balancing="uncertainty", timestep_sampling="uniform")
    assert torch.equal(setup.sample(3, 0, 1, batch_size=100), Setup().sample(3, 0, 1, batch_size=100))


def test_a_single_cluster_can_be_trained():
    options = {"num_clusters": 3, "cluster_cost": "uniform", "train_cluster": 1}
    timesteps = Setup(DDPMScheduler(num_train_timesteps=30), **options).sample(0, 0, 1, batch_size=100)
    assert set(timesteps.tolist()) == set(range(10, 20))


@pytest.mark.parametrize(("options", "around"), [({}, (400, 600)), ({"logit_mean": 3}, (900, 1000))])
def test_logit_normal_timesteps_gather_around_the_mean(options, around):
    setup = Setup(timestep_sampling="logit_normal", logit_std=0.1, **options)
    timesteps = setup.sample(0, 0, 1, batch_size=100)
    assert ((timesteps > around[0]) & (timesteps < around[1])).all()


def test_micro_batches_of_a_step_are_parts_of_one_stratified_draw():
    setup = Setup(balancing="uncertainty")
    steps = [torch.cat([setup.sample(step, part, 4, batch_size=1) for part in range(4)]) for step in range(3)]
    assert [counts(setup, step) for step in steps] == [[1, 1, 1, 1]] * 3
    assert len({tuple(step.tolist()) for step in steps}) == 3


@pytest.mark.parametrize("num_processes", [1, 2])
def test_gradients_are_compared_between_all_clusters_in_every_forward_call(num_processes, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", num_processes)
    setup = Setup(balancing="pcgrad", train_batch_size=4 // num_processes)
    num_parts = 3 * num_processes
    parts = [setup.sample(step, part, num_parts, 4 // num_processes) for step in (0, 1) for part in range(num_parts)]
    calls = torch.cat(parts).reshape(6, 4)
    assert all(counts(setup, call) == [1, 1, 1, 1] for call in calls)
    assert len({tuple(call.tolist()) for call in calls}) == 6


def test_gradient_balancing_with_fewer_samples_than_clusters_is_refused():
    message = r"`--balancing pcgrad` compares .* all 4 clusters .* got 3: use a larger `--train_batch_size` or fewer"
    with pytest.raises(ValueError, match=message):
        Setup(balancing="pcgrad", train_batch_size=3)
    Setup(balancing="uncertainty", train_batch_size=3)


def test_gradient_balancing_has_the_seed_of_the_run_and_counts_optimizer_steps():
    """Not forward calls, of which a step may have several."""
    options = {"balancing_update_every": 3, "gradient_accumulation_steps": 2, "seed": 7}
    balancing = Setup(balancing="mgda", **options).objective.loss_fn.balancing
    assert (balancing.update_every, balancing.seed) == (6, 7)


# ---- timesteps that follow the losses


@pytest.mark.parametrize("statistic", ["loss", "variance"])
def test_timesteps_come_to_follow_the_loss_and_weights_correct_for_it(statistic, quick_fit):
    setup = Setup(timestep_sampling=statistic)
    everything = torch.arange(1000)
    assert torch.equal(setup.objective.sample_weights(everything), torch.ones(1000))
    for number in range(2):
        setup.step(number)
    weights = setup.objective.sample_weights(everything)
    assert weights.min() < 0.95 < 1.05 < weights.max()
    assert (1 / weights).mean().item() == pytest.approx(1)
    widths = torch.tensor([len(cluster) for cluster in setup.objective.clusters])
    expected = 800 * widths / 1000 / weights[[cluster.start for cluster in setup.objective.clusters]]
    assert counts(setup, setup.sample(2, 0, 1, batch_size=800)) == pytest.approx(expected.tolist(), abs=1)


@pytest.mark.parametrize(("statistic", "preferred"), [("loss", 0), ("variance", 1)])
def test_timesteps_follow_the_statistic_that_was_asked_for(statistic, preferred, quick_fit):
    """Losses are large and alike in the first cluster, small and scattered in the second."""
    setup = Setup(timestep_sampling=statistic, num_clusters=2, cluster_cost="uniform")
    out = SimpleNamespace(per_sample=torch.tensor([9.0, 9.0, 0.0, 2.0]))
    for _ in range(2):
        setup.objective.observe(setup.accelerator, torch.tensor([10, 20, 510, 520]), out)
    assert setup.objective.sampler.shares.argmax() == preferred


def test_density_stays_as_it_is_in_the_middle_of_a_step(quick_fit):
    """Two forward calls are observed as one of twice as many samples, and only when the step is done."""
    everything = torch.arange(1000)
    timesteps = torch.arange(0, 1000, 1000 // (4 * BATCH))[: 4 * BATCH]

    def observe(setup: Setup, size: int) -> list[torch.Tensor]:
        weights = []
        for part in timesteps.split(size):
            with setup.accelerator.accumulate(setup.model):
                out = SimpleNamespace(per_sample=part / 1000 + 0.1)
                setup.objective.observe(setup.accelerator, part, out)
                weights.append(setup.objective.sample_weights(everything))
        return weights

    whole = Setup(timestep_sampling="loss")
    observe(whole, 2 * BATCH)
    divided = Setup(timestep_sampling="loss", gradient_accumulation_steps=2)
    *before, after = observe(divided, BATCH)
    assert all(torch.equal(weights, torch.ones(1000)) for weights in before)
    assert not torch.equal(after, before[-1])
    torch.testing.assert_close(divided.objective.sampler.shares, whole.objective.sampler.shares)


# ---- flags and state


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler()], ids=["DDPM", "flow"])
def test_every_weighting_is_another_loss(scheduler):
    weightings = {*WEIGHTINGS} - ({"logit_normal"} if isinstance(scheduler, DDPMScheduler) else set())
    losses = {Setup(loss_weighting=name, scheduler=scheduler).step(0).loss.item() for name in weightings}
    assert len(losses) == len(weightings)


def test_weighting_for_flow_matching_is_refused_with_another_schedule():
    with pytest.raises(ValueError, match="`--loss_weighting logit_normal` is for flow matching, got epsilon"):
        Setup(loss_weighting="logit_normal")


@pytest.mark.parametrize(
    "options",
    [
        *({"balancing": name} for name in ("uncertainty", "continuous_uncertainty", "pcgrad", "nash_mtl")),
        *({"timestep_sampling": name} for name in ("loss", "variance")),
    ],
    ids=str,
)
def test_state_goes_on_to_the_bit(options, quick_fit, tmp_path):
    whole, resumed = Setup(**options), Setup(**options)
    for number in range(3):
        whole.step(number)
    save_file(whole.objective.state_dict(), tmp_path / "objective.safetensors")
    resumed.objective.load_state_dict(load_file(tmp_path / "objective.safetensors"))
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.optimizer.load_state_dict(deepcopy(whole.optimizer.state_dict()))
    for number in range(3, 6):
        assert torch.equal(whole.step(number).loss, resumed.step(number).loss)
    one, other = whole.objective.state_dict(), resumed.objective.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clusters": 2}, "must be of clusters with the boundaries"),
        ({"cluster_cost": "uniform"}, "must be of clusters with the boundaries"),
        ({"balancing": "continuous_uncertainty"}, "must be of a loss with this balancing, got another's"),
        ({"timestep_sampling": "loss"}, "must be of the same timestep sampling, got that of another"),
    ],
)
def test_state_of_another_objective_is_refused(options, message):
    states = [Setup(**{"balancing": "uncertainty", **some}).objective.state_dict() for some in ({}, options)]
    with pytest.raises(ValueError, match=message):
        Setup(**{"balancing": "uncertainty", **options}).objective.load_state_dict(states[0])
    with pytest.raises(ValueError, match=message):
        Setup(balancing="uncertainty").objective.load_state_dict(states[1])


def test_clusters_are_those_whose_gradients_get_along(tmp_path):
    boundaries, path = (0, 13, 20, 21, 50), str(tmp_path / "affinity.safetensors")
    levels = NoiseLevels(DDPMScheduler(num_train_timesteps=50))
    grid = levels.timesteps
    # Timesteps get along within these clusters, and not with others.
    cluster = torch.bucketize(grid, torch.tensor(boundaries[1:-1]), right=True)
    matrix, log_snr = (cluster[:, None] == cluster).double(), levels.log_snr(grid)
    TaskAffinity(matrix, grid, grid.clone(), log_snr, reliability=1.0, estimator="unbiased").save(path)

    def clusters(affinity_path: str = path, num_train_timesteps: int = 50, **schedule: str) -> tuple[int, ...]:
        scheduler = DDPMScheduler(num_train_timesteps=num_train_timesteps, **schedule)
        return Setup(scheduler, cluster_cost="affinity", affinity_path=affinity_path).objective.clusters.boundaries

    assert clusters() == boundaries
    with pytest.raises(ValueError, match="another noise schedule: 50 training timesteps, not 60"):
        clusters(num_train_timesteps=60)
    with pytest.raises(ValueError, match="another noise schedule: a log SNR of"):
        clusters(beta_schedule="squaredcos_cap_v2")
    with pytest.raises(ValueError, match="must be a task affinity file"):
        clusters(str(tmp_path / "nothing.safetensors"))


# ---- noise


def noise_of(*shape: int, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
    return draw_noise(torch.Size(shape), torch.Generator().manual_seed(0), **options)


def test_noise_to_learn_is_the_noise_that_is_added():
    noise, added = noise_of(40, 3, 2, 2)
    assert torch.equal(noise, torch.randn(40, 3, 2, 2, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(noise, added)


@pytest.mark.parametrize("shape", [(4000, 3, 2, 2), (4000, 3, 2, 2, 2)])
def test_offset_is_one_number_per_sample_and_channel(shape):
    noise, added = noise_of(*shape, noise_offset=0.5)
    offset = noise - noise_of(*shape)[0]
    assert torch.equal(noise, added)
    assert offset.std().item() == pytest.approx(0.5, rel=0.02)
    assert offset.flatten(1).view(*shape[:2], -1).var(-1, correction=0).max() < 1e-10


def test_perturbation_is_added_but_not_learned():
    plain, _ = noise_of(4000, 3, 2, 2, noise_offset=0.5)
    noise, added = noise_of(4000, 3, 2, 2, noise_offset=0.5, input_perturbation=0.1)
    assert torch.equal(noise, plain)
    assert (added - noise).std().item() == pytest.approx(0.1, rel=0.02)
