import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from diffusers_dtr.objective import P2, DenoisingLoss, LogitNormal, MinSNR


REFERENCE = load_file(Path(__file__).parents[1] / "fixtures" / "losses.safetensors")
BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def reference(schedule):
    prefix = f"{schedule}."
    return {name.removeprefix(prefix): value for name, value in REFERENCE.items() if name.startswith(prefix)}


def batch(size=3, shape=(3, 4, 4), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(size, *shape, generator=generator, dtype=dtype) for _ in range(3))


@pytest.mark.parametrize("weighting", ["constant", "min_snr"])
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_losses_equal_those_of_the_authors(schedule, weighting):
    values = reference(schedule)
    loss_fn = DenoisingLoss(DDPMScheduler(beta_schedule=BETA_SCHEDULES[schedule]), weighting)
    output = loss_fn(values["model_output"], values["clean"], values["noise"], values["timesteps"])
    key = {"constant": "constant", "min_snr": "min_snr_5"}[weighting]
    # Both are float32 sums; bounds reach 1175 bits in the cosine schedule's last timestep.
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(output.mse, values[f"{key}.mse"], **tolerance)
    torch.testing.assert_close(output.variational_bound, values[f"{key}.vb"], **tolerance)
    torch.testing.assert_close(output.per_sample, values[f"{key}.loss"], **tolerance)
    torch.testing.assert_close(output.loss, values[f"{key}.loss"].mean(), **tolerance)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_schedules_and_noisy_samples_equal_those_of_the_authors(schedule):
    values = reference(schedule)
    levels = DenoisingLoss(DDPMScheduler(beta_schedule=BETA_SCHEDULES[schedule])).levels
    # Theirs are in float64 throughout, the scheduler's betas are rounded to float32 (relative error up to 6e-8, which
    # products over 1000 timesteps accumulate).
    expected, alphas_cumprod = values["alphas_cumprod"], levels.alpha(levels.timesteps) ** 2
    torch.testing.assert_close(alphas_cumprod, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(levels.sigma(levels.timesteps) ** 2, 1 - expected, rtol=1e-6, atol=0)
    noisy = levels.add_noise(values["clean"], values["noise"], values["timesteps"])
    torch.testing.assert_close(noisy, values["x_t"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "timesteps"),
    [
        (DDPMScheduler(prediction_type="v_prediction"), [0, 400, 999]),
        (EulerDiscreteScheduler(), [0.0, 400.5, 999.0]),
        (EDMEulerScheduler(), [-1.5, 0.0, 1.0]),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), [1.0, 400.5, 1000.0]),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 5), (4,), (2, 3, 4, 4)], ids=len)
def test_loss_is_the_mean_squared_error_to_the_target_in_any_layout(scheduler, timesteps, shape):
    loss_fn = DenoisingLoss(scheduler)
    model_output, clean, noise = batch(shape=shape)
    timesteps = torch.tensor(timesteps)
    output = loss_fn(model_output, clean, noise, timesteps)
    target = loss_fn.levels.target(clean, noise, timesteps)
    expected = torch.stack([(a - b).square().mean() for a, b in zip(model_output, target, strict=True)])
    torch.testing.assert_close(output.per_sample, expected)
    torch.testing.assert_close(output.loss, expected.mean())
    assert output.variational_bound is None
    assert loss_fn(target, clean, noise, timesteps).loss.item() == 0


@pytest.mark.parametrize(
    "weighting", [MinSNR(2.0), P2(2.0, 0.5), LogitNormal(0.4, 0.6), lambda levels, timesteps: levels.sigma(timesteps)]
)
def test_squared_errors_are_weighted_by_objects_and_functions(weighting):
    loss_fn = DenoisingLoss(FlowMatchEulerDiscreteScheduler(), weighting)
    samples, timesteps = batch(), torch.tensor([10.0, 400.0, 900.0])
    plain = DenoisingLoss(FlowMatchEulerDiscreteScheduler())(*samples, timesteps)
    weighted = loss_fn(*samples, timesteps)
    torch.testing.assert_close(weighted.mse, plain.mse * weighting(loss_fn.levels, timesteps).float())
    assert torch.equal(weighted.per_sample, weighted.mse)


def test_a_function_must_return_one_weight_per_sample():
    loss_fn = DenoisingLoss(DDPMScheduler(), lambda levels, timesteps: torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"`weighting` must return weights of shape \(3,\), got \(3, 1\)"):
        loss_fn(*batch(), torch.tensor([1, 2, 3]))


def test_weights_leave_the_variational_bound_alone():
    model_output, clean, noise = batch()
    model_output, timesteps = torch.cat([model_output, noise.flip(0)], 1), torch.tensor([0, 400, 999])
    plain = DenoisingLoss(DDPMScheduler())(model_output, clean, noise, timesteps)
    weighted = DenoisingLoss(DDPMScheduler(), lambda levels, t: torch.full((3,), 7.0))(
        model_output, clean, noise, timesteps
    )
    assert torch.equal(weighted.variational_bound, plain.variational_bound)
    torch.testing.assert_close(weighted.mse, 7 * plain.mse)
    torch.testing.assert_close(weighted.per_sample, weighted.mse + weighted.variational_bound)


def test_prediction_learns_from_the_squared_error_and_variance_from_the_bound():
    model_output, clean, noise = batch()
    timesteps = torch.tensor([0, 400, 999])
    both = torch.cat([model_output, noise.flip(0)], 1).requires_grad_()
    alone = model_output.clone().requires_grad_()
    loss_fn = DenoisingLoss(DDPMScheduler())
    loss_fn(both, clean, noise, timesteps).loss.backward()
    loss_fn(alone, clean, noise, timesteps).loss.backward()
    torch.testing.assert_close(both.grad[:, :3], alone.grad)
    assert both.grad[:, 3:].abs().sum(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("channels", [3, 6])
def test_half_precision_is_reduced_in_float32(channels):
    model_output, clean, noise = batch(shape=(3, 32, 32), dtype=torch.bfloat16)
    model_output = torch.cat([model_output, noise.flip(0)], 1)[:, :channels]
    timesteps, loss_fn = torch.tensor([0, 400, 999]), DenoisingLoss(DDPMScheduler(), "min_snr")
    half = loss_fn(model_output, clean, noise, timesteps)
    full = loss_fn(model_output.float(), clean.float(), noise.float(), timesteps)
    for field in dataclasses.fields(half):
        ours, expected = getattr(half, field.name), getattr(full, field.name)
        assert ours is expected is None or (ours.dtype == torch.float32 and torch.equal(ours, expected))


def test_float64_stays_float64():
    samples = batch(dtype=torch.float64)
    assert DenoisingLoss(DDPMScheduler())(*samples, torch.tensor([1, 2, 3])).loss.dtype == torch.float64


def test_loss_of_a_model_is_that_of_its_output_for_the_scaled_noisy_samples():
    loss_fn = DenoisingLoss(EulerDiscreteScheduler(), weighting="min_snr")
    _, clean, noise = batch()
    timesteps, seen = torch.tensor([0, 400, 999]), {}

    def model(model_input, **arguments):
        seen.update(arguments, model_input=model_input)
        return (model_input * 0.9,)

    out = loss_fn.of_model(model, clean, noise, timesteps, {"class_labels": torch.arange(3)})
    model_input = loss_fn.levels.model_input(loss_fn.levels.add_noise(clean, noise, timesteps), timesteps)
    assert torch.equal(seen["model_input"], model_input)
    assert torch.equal(seen["timestep"], timesteps)
    assert torch.equal(seen["class_labels"], torch.arange(3))
    assert torch.equal(out.per_sample, loss_fn(model_input * 0.9, clean, noise, timesteps).per_sample)


def test_no_value_is_read_back_from_the_device():
    sample = torch.empty(2, 3, 4, 4, device="meta")  # has no values: reading one raises
    timesteps = torch.empty(2, device="meta", dtype=torch.int64)
    output = DenoisingLoss(DDPMScheduler(), "min_snr")(torch.cat([sample, sample], 1), sample, sample, timesteps)
    assert output.per_sample.shape == (2,)
    assert output.loss.shape == ()


def test_loss_can_be_sent_to_another_process():
    loss_fn = DenoisingLoss(DDPMScheduler(), "min_snr")
    samples, timesteps = batch(), torch.tensor([0, 400, 999])
    copy = pickle.loads(pickle.dumps(loss_fn))
    assert torch.equal(copy(*samples, timesteps).loss, loss_fn(*samples, timesteps).loss)


@pytest.mark.parametrize("weighting", ["min_snr_5", "logit_normal", LogitNormal()])
def test_weightings_that_are_unknown_or_not_for_the_scheduler_show_before_training(weighting):
    with pytest.raises(ValueError, match="`weighting"):
        DenoisingLoss(DDPMScheduler(), weighting)


def test_shapes_must_fit_together():
    model_output, clean, noise = batch()
    timesteps, loss_fn = torch.tensor([1, 2, 3]), DenoisingLoss(DDPMScheduler())
    with pytest.raises(ValueError, match=r"`model_output` must .* got \(3, 2, 4, 4\) and \(3, 3, 4, 4\)"):
        loss_fn(model_output[:, :2], clean, noise, timesteps)
    with pytest.raises(ValueError, match="`noise` must have the shape of `clean`"):
        loss_fn(model_output, clean, noise[:2], timesteps)
    with pytest.raises(ValueError, match="one value per sample"):
        loss_fn(model_output, clean, noise, timesteps[:2])
    with pytest.raises(ValueError, match="`model_output` must"):
        loss_fn(torch.ones(3), torch.ones(3), torch.ones(3), timesteps)


def test_variance_channels_need_a_scheduler_with_a_posterior():
    model_output, clean, noise = batch()
    with pytest.raises(ValueError, match="`model_output` has variance channels, but FlowMatch"):
        DenoisingLoss(FlowMatchEulerDiscreteScheduler())(
            torch.cat([model_output, model_output], 1), clean, noise, torch.tensor([1.0, 2.0, 3.0])
        )
