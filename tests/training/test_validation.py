import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from run_config import run_config

from diffusers_dtr import DenoisingLoss, NoiseLevels, TaskAffinity, cluster_timesteps
from diffusers_dtr.training import HeldOutLoss
from diffusers_dtr.training.validation import ends_epochs, forward_once, log_image, save_sample_grid, try_sampling


LEVELS = NoiseLevels(DDPMScheduler())


def measure(num_images: int = 40, *, num_clusters: int = 4, batch: dict | None = None, **options) -> HeldOutLoss:
    clean = torch.randn(num_images, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    clusters = cluster_timesteps(1000, num_clusters, cost="uniform")
    return HeldOutLoss(LEVELS, clusters, clean, batch, **options)


def zeros(model_input, timesteps, batch):
    return torch.zeros_like(model_input)


def half(model_input, timesteps, batch):
    return model_input / 2


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_loss_of_silence_is_the_noise_and_that_of_who_knows_the_image_nothing(accelerator):
    held_out = measure()

    def knowing(model_input, timesteps, batch):
        clean = held_out.clean[[held_out.timesteps.tolist().index(timestep) for timestep in timesteps.tolist()]]
        alpha, sigma = (values.view(-1, 1, 1, 1) for values in (LEVELS.alpha(timesteps), LEVELS.sigma(timesteps)))
        return (model_input - alpha * clean) / sigma

    silent = held_out(zeros, accelerator)
    assert silent.mean == pytest.approx(1, abs=0.15)
    assert silent.mean == pytest.approx(sum(silent.per_cluster) / 4)
    assert held_out(knowing, accelerator).mean == pytest.approx(0, abs=1e-8)


class CalledWith(torch.nn.Conv2d):
    """A denoiser that remembers the types of its timesteps."""

    def __init__(self):
        super().__init__(1, 1, 1)
        self.dtypes = set()

    def forward(self, model_input, timestep, return_dict):
        self.dtypes.add(timestep.dtype)
        return (super().forward(model_input),)


@pytest.mark.parametrize(
    ("scheduler", "dtype"),
    [
        (DDPMScheduler(), torch.int64),
        (EulerDiscreteScheduler(), torch.int64),
        (FlowMatchEulerDiscreteScheduler(), torch.float32),
        (EDMEulerScheduler(), torch.float32),
    ],
    ids=["DDPM", "Euler", "flow", "EDM"],
)
def test_training_validation_and_analysis_call_a_denoiser_with_timesteps_of_one_type(scheduler, dtype, accelerator):
    loss_fn, denoiser = DenoisingLoss(scheduler), CalledWith()
    clean, noise = torch.randn(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    clusters = cluster_timesteps(scheduler, 4)
    held_out = HeldOutLoss(loss_fn.levels, clusters, clean)
    held_out(lambda inputs, timesteps, _: denoiser(inputs, timesteps, False)[0], accelerator)
    TaskAffinity.measure(denoiser, loss_fn, clean, noise, timesteps=2, estimator="plain")
    assert denoiser.dtypes == {clusters.sample(4).dtype} == {dtype}


def test_timesteps_cover_the_schedule_evenly():
    timesteps = measure(100, num_clusters=8).timesteps
    assert timesteps.sort().values.tolist() == list(range(5, 1000, 10))
    assert not torch.equal(timesteps, timesteps.sort().values)


def test_every_noising_of_every_image_has_noise_of_its_own(accelerator):
    held_out = measure(evaluations_per_image=2)
    held_out.clean = torch.zeros_like(held_out.clean)
    noises = []

    def spy(model_input, timesteps, batch):
        noises.append(model_input / LEVELS.sigma(timesteps).view(-1, 1, 1, 1))
        return model_input

    held_out(spy, accelerator)
    assert len(held_out.timesteps.unique()) == 80
    correlations = torch.corrcoef(torch.cat(noises).flatten(1)) - torch.eye(80)
    assert correlations.abs().max() < 0.95


def test_same_model_has_the_same_loss_in_batches_of_any_size_at_any_time(accelerator):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = measure(batch_size=7)(half, accelerator)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    other = measure(batch_size=64)(half, accelerator)
    assert (one.mean, *one.per_cluster) == pytest.approx((other.mean, *other.per_cluster), rel=1e-5)
    assert measure(batch_size=64)(half, accelerator) == other


def test_processes_share_the_work(accelerator, monkeypatch):
    held_out = measure(batch_size=8)
    whole = held_out(half, accelerator)
    parts = []
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(Accelerator, "reduce", lambda _, totals, how: parts.append(totals) or totals)
    for process in range(2):
        monkeypatch.setattr(Accelerator, "process_index", process)
        held_out(half, accelerator)
    (sums, counts) = parts[0] + parts[1]
    assert counts.sum() == 40
    assert parts[0][1].sum() == 24  # three batches of five
    assert (sums.sum() / counts.sum()).item() == pytest.approx(whole.mean)


def test_every_image_has_its_own_label_and_caption(accelerator):
    batch = {"labels": torch.arange(40), "caption": [str(number) for number in range(40)]}
    seen = []
    measure(batch=batch, batch_size=16)(lambda inputs, _, batch: seen.append(batch) or inputs, accelerator)
    assert torch.equal(torch.cat([batch["labels"] for batch in seen]), batch["labels"])
    assert [caption for part in seen for caption in part["caption"]] == batch["caption"]


def test_only_the_prediction_counts_of_an_output_with_a_variance(accelerator):
    with_variance = measure()(lambda inputs, *_: torch.cat([inputs / 2, inputs * 100], dim=1), accelerator)
    assert with_variance == measure()(half, accelerator)


def test_worse_predictions_at_a_cluster_show_there_alone(accelerator):
    bad_late = measure()(
        lambda inputs, timesteps, _: 10.0 * (timesteps >= 750).view(-1, 1, 1, 1) * inputs, accelerator
    )
    silent = measure()(zeros, accelerator)
    assert bad_late.per_cluster[:3] == silent.per_cluster[:3]
    assert bad_late.per_cluster[3] > 10 * silent.per_cluster[3]


def test_fewer_samples_than_clusters_are_refused():
    with pytest.raises(ValueError, match=r"over 4 clusters needs .* got 3.*`evaluations_per_image`"):
        measure(3)
    assert measure(3, evaluations_per_image=2).num_samples == 6


def test_images_fill_the_grid_row_by_row_and_black_the_rest(tmp_path):
    images = [Image.new("L", (2, 2), 50 * number) for number in range(1, 6)]
    grid = save_sample_grid(images, tmp_path / "samples" / "grid.png")
    assert np.asarray(grid.convert("L"))[::2, ::2].tolist() == [[50, 100, 150], [200, 250, 0]]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "samples" / "grid.png")), np.asarray(grid))


def test_model_answers_inputs_of_the_same_shape_with_what_it_computed_first():
    model = torch.nn.Linear(2, 2)
    own = model(torch.zeros(1, 2))
    with forward_once(model):
        assert torch.equal(model(torch.zeros(1, 2)), own)
        assert torch.equal(model(torch.ones(1, 2)), own)
        assert model(torch.ones(3, 2)).shape == (3, 2)
    assert not torch.equal(model(torch.ones(1, 2)), own)
    assert "forward" not in vars(model)
    model.forward = replacement = lambda x: x + 1
    with pytest.raises(RuntimeError, match="failed"), forward_once(model):
        raise RuntimeError("failed")
    assert model.forward is replacement


@pytest.mark.parametrize(
    ("images_per_step", "epoch", "steps"),
    [(4, 12, [3, 6, 9]), (4, 10, [3, 5, 8, 10]), (10, 4, [*range(1, 11)]), (4, 100, [])],
)
def test_an_epoch_ends_in_the_step_that_sees_its_last_image(images_per_step, epoch, steps):
    assert [step for step in range(1, 11) if ends_epochs(step, images_per_step, epoch)] == steps


def test_what_cannot_be_sampled_names_the_flags_of_validation():
    config = run_config(resolution=8, validation_num_inference_steps=1)
    with pytest.raises(ValueError, match=r"`--resolution 8`.*`--validation_num_inference_steps 1`.*: IndexError"):
        try_sampling(lambda: ()[0], config)
    try_sampling(lambda: [], config)


# ---- pictures for trackers

PICTURE = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_other_trackers_get_colour_pixels_and_the_step(tracker, monkeypatch):
    """What accelerate's trackers of these names take; the packages themselves want an account or a server."""
    logged = {}

    def log(values, step):
        logged.update(values, step=step)

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=lambda pixels: pixels))
    methods = {"log_images": lambda values, step: log({name: images[0] for name, images in values.items()}, step)}
    accelerator = SimpleNamespace(trackers=[SimpleNamespace(name=tracker, log=log, **methods)])
    log_image(accelerator, "samples", PICTURE, 7)
    assert logged["step"] == 7
    assert np.array_equal(logged["samples"], np.asarray(PICTURE.convert("RGB")))
