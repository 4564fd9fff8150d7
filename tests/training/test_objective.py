"""The clusters, loss and sampling that flags ask for, over the micro-batches of a step and across checkpoints."""

from __future__ import annotations

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
STATEFUL = [
    {"balancing": "uncertainty"},
    {"balancing": "continuous_uncertainty"},
    {"balancing": "pcgrad"},
    {"balancing": "nash_mtl"},
    {"timestep_sampling": "loss"},
    {"timestep_sampling": "variance"},
]


class Setup:
    """An objective with all that it is built from."""

    def __init__(self, scheduler: SchedulerMixin | None = None, **options: object):
        config = run_config(**{"train_batch_size": BATCH, "num_clusters": 4, **options})
        accumulation = config.run.gradient_accumulation_steps or 1
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        torch.manual_seed(0)
        self.model = DTRTransformer2DModel(
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=1,
            out_channels=1,
            sample_size=4,
            num_embeds_ada_norm=2,
        )
        scheduler = scheduler or DDPMScheduler()
        self.objective = build_objective(config, scheduler, self.model, self.accelerator)
        self.optimizer = build_optimizer(config.optimizer, self.model, self.objective.loss_fn)

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


@pytest.mark.parametrize("options", [{"balancing": "uncertainty"}, {"timestep_sampling": "clusters"}])
def test_with_balancing_or_on_request_clusters_are_drawn_equally(options):
    setup = Setup(**options)
    assert counts(setup, setup.sample(0, 0, 1)) == [2, 2, 2, 2]


def test_balanced_clusters_are_drawn_uniformly_on_request():
    setup = Setup(balancing="uncertainty", timestep_sampling="uniform")
    assert torch.equal(setup.sample(3, 0, 1, batch_size=100), Setup().sample(3, 0, 1, batch_size=100))


@pytest.mark.parametrize("step", range(3))
def test_micro_batches_of_a_step_are_parts_of_one_stratified_draw(step):
    setup = Setup(balancing="uncertainty")
    parts = [setup.sample(step, part, 4, batch_size=1) for part in range(4)]
    assert counts(setup, torch.cat(parts)) == [1, 1, 1, 1]
    assert not torch.equal(torch.cat(parts), torch.cat([setup.sample(step + 1, part, 4, 1) for part in range(4)]))


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


def test_gradient_weights_are_used_for_as_many_optimizer_steps_as_asked_for():
    """Not for as many forward calls, of which a step may have several."""
    options = {"balancing_update_every": 3, "gradient_accumulation_steps": 2}
    assert Setup(balancing="mgda", **options).objective.loss_fn.balancing.update_every == 6
    assert Setup(balancing="mgda").objective.loss_fn.balancing.update_every == 1


def test_order_of_projections_is_drawn_from_the_seed_of_the_run():
    assert Setup(balancing="pcgrad", seed=7).objective.loss_fn.balancing.seed == 7


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
    timesteps = torch.arange(0, 1000, 1000 // (4 * BATCH))[: 4 * BATCH].reshape(4, BATCH)
    per_sample = timesteps / 1000 + 0.1

    def observe(setup: Setup, rows: range, size: int) -> None:
        for row in rows:
            with setup.accelerator.accumulate(setup.model):
                part = slice(row * size, row * size + size)
                out = SimpleNamespace(per_sample=per_sample.flatten()[part])
                setup.objective.observe(setup.accelerator, timesteps.flatten()[part], out)

    whole = Setup(timestep_sampling="loss")
    observe(whole, range(2), 2 * BATCH)
    divided = Setup(timestep_sampling="loss", gradient_accumulation_steps=2)
    observe(divided, range(3), BATCH)
    before = divided.objective.sample_weights(torch.arange(1000))
    assert torch.equal(before, torch.ones(1000))
    observe(divided, range(3, 4), BATCH)
    torch.testing.assert_close(divided.objective.sampler.shares, whole.objective.sampler.shares)
    assert not torch.equal(divided.objective.sample_weights(torch.arange(1000)), before)


# ---- flags and state


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler()], ids=["DDPM", "flow"])
def test_every_weighting_is_another_loss(scheduler):
    weightings = {*WEIGHTINGS} - ({"logit_normal"} if isinstance(scheduler, DDPMScheduler) else set())
    losses = {Setup(loss_weighting=name, scheduler=scheduler).step(0).loss.item() for name in weightings}
    assert len(losses) == len(weightings)


def test_weighting_for_flow_matching_is_refused_with_another_schedule():
    with pytest.raises(
        ValueError, match="`--loss_weighting logit_normal` is for flow matching, got epsilon prediction"
    ):
        Setup(loss_weighting="logit_normal")


@pytest.mark.parametrize("options", STATEFUL, ids=str)
def test_state_goes_on_to_the_bit(options, quick_fit, tmp_path):
    whole = Setup(**options)
    for number in range(3):
        whole.step(number)
    save_file(whole.objective.state_dict(), tmp_path / "objective.safetensors")
    torch.save([whole.model.state_dict(), whole.optimizer.state_dict()], tmp_path / "others.pt")
    resumed = Setup(**options)
    resumed.objective.load_state_dict(load_file(tmp_path / "objective.safetensors"))
    model, optimizer = torch.load(tmp_path / "others.pt")
    resumed.model.load_state_dict(model)
    resumed.optimizer.load_state_dict(optimizer)
    for number in range(3, 6):
        assert torch.equal(whole.step(number).loss, resumed.step(number).loss)
    assert_equal_state(whole.objective.state_dict(), resumed.objective.state_dict())


def assert_equal_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
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


def planted_affinity(path, boundaries: tuple[int, ...]) -> str:
    """A file that says: timesteps get along within these clusters, and not with others."""
    levels = NoiseLevels(DDPMScheduler(num_train_timesteps=boundaries[-1]))
    grid = levels.timesteps
    cluster = torch.bucketize(grid, torch.tensor(boundaries[1:-1]), right=True)
    TaskAffinity(
        matrix=(cluster[:, None] == cluster).double(),
        timesteps=grid,
        training_timesteps=grid.clone(),
        log_snr=levels.log_snr(grid),
        reliability=1.0,
        estimator="unbiased",
    ).save(path)
    return str(path)


def test_clusters_are_those_whose_gradients_get_along(tmp_path):
    path = planted_affinity(tmp_path / "affinity.safetensors", (0, 13, 20, 21, 50))
    options = {"cluster_cost": "affinity", "affinity_path": path}
    assert Setup(DDPMScheduler(num_train_timesteps=50), **options).objective.clusters.boundaries == (0, 13, 20, 21, 50)
    with pytest.raises(ValueError, match="another noise schedule: 50 training timesteps, not 60"):
        Setup(DDPMScheduler(num_train_timesteps=60), **options)
    with pytest.raises(ValueError, match="another noise schedule: a log SNR of"):
        Setup(DDPMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2"), **options)
    with pytest.raises(ValueError, match="must be a task affinity file"):
        Setup(cluster_cost="affinity", affinity_path=str(tmp_path / "nothing.safetensors"))


# ---- noise


SHAPE = torch.Size((4000, 3, 2, 2))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_noise_to_learn_is_the_noise_that_is_added():
    noise, added = draw_noise(SHAPE, seeded())
    assert torch.equal(noise, torch.randn(SHAPE, generator=seeded()))
    assert torch.equal(noise, added)


@pytest.mark.parametrize("shape", [(4000, 3, 2, 2), (4000, 3, 2, 2, 2)])
def test_offset_is_one_number_per_sample_and_channel(shape):
    noise, added = draw_noise(torch.Size(shape), seeded(), noise_offset=0.5)
    offset = noise - draw_noise(torch.Size(shape), seeded())[0]
    assert torch.equal(noise, added)
    assert offset.std().item() == pytest.approx(0.5, rel=0.02)
    assert offset.flatten(1).view(*shape[:2], -1).var(-1, correction=0).max() < 1e-10


def test_perturbation_is_added_but_not_learned():
    plain, _ = draw_noise(SHAPE, seeded(), noise_offset=0.5)
    noise, added = draw_noise(SHAPE, seeded(), noise_offset=0.5, input_perturbation=0.1)
    assert torch.equal(noise, plain)
    assert (added - noise).std().item() == pytest.approx(0.1, rel=0.02)
