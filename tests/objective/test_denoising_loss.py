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
TIMESTEPS = torch.tensor([0, 400, 999])


def batch(shape=(3, 4, 4), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, *shape, generator=generator, dtype=dtype) for _ in range(3))


def with_variance(samples):
    """A batch whose denoiser predicts a variance as well."""
    model_output, clean, noise = samples
    return torch.cat([model_output, noise.flip(0)], 1), clean, noise


@pytest.mark.parametrize("weighting", ["constant", "min_snr"])
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_losses_schedules_and_noisy_samples_equal_those_of_the_authors(schedule, weighting):
    values = {name.split(".", 1)[1]: value for name, value in REFERENCE.items() if name.startswith(schedule)}
    loss_fn = DenoisingLoss(DDPMScheduler(beta_schedule=BETA_SCHEDULES[schedule]), weighting)
    output = loss_fn(values["model_output"], values["clean"], values["noise"], values["timesteps"])
    key = {"constant": "constant", "min_snr": "min_snr_5"}[weighting]
    # Both are float32 sums; bounds reach 1175 bits in the cosine schedule's last timestep.
    for ours, theirs in [(output.mse, "mse"), (output.variational_bound, "vb"), (output.per_sample, "loss")]:
        torch.testing.assert_close(ours, values[f"{key}.{theirs}"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.loss, values[f"{key}.loss"].mean(), rtol=1e-6, atol=1e-6)
    # Theirs are in float64 throughout, the scheduler's betas are rounded to float32 (relative error up to 6e-8, which
    # products over 1000 timesteps accumulate).
    levels, expected = loss_fn.levels, values["alphas_cumprod"]
    torch.testing.assert_close(levels.alpha(levels.timesteps) ** 2, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(levels.sigma(levels.timesteps) ** 2, 1 - expected, rtol=1e-6, atol=0)
    noisy = levels.add_noise(values["clean"], values["noise"], values["timesteps"])
    torch.testing.assert_close(noisy, values["x_t"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "timesteps"),
    [
        (DDPMScheduler(prediction_type="v_prediction"), [0, 400, 999]),
        (EulerDiscreteScheduler(), [0.0, 400.5, 999.0]),
        (EDMEulerScheduler(), [-1.5, 0.0, 1.0]),
        (FlowMatchEulerDiscreteScheduler(), [1.0, 400.5, 1000.0]),
    ],
)
@pytest.mark.parametrize("shape", [(7,), (5, 3), (3, 4, 4), (2, 3, 4, 4)], ids=len)
def test_loss_is_the_mean_squared_error_to_the_target_in_any_layout(scheduler, timesteps, shape):
    loss_fn, timesteps = DenoisingLoss(scheduler), torch.tensor(timesteps)
    model_output, clean, noise = batch(shape, torch.float64)
    output, target = loss_fn(model_output, clean, noise, timesteps), loss_fn.levels.target(clean, noise, timesteps)
    expected = torch.stack([(a - b).square().mean() for a, b in zip(model_output, target, strict=True)])
    torch.testing.assert_close(output.per_sample, expected)
    torch.testing.assert_close(output.loss, expected.mean())
    assert output.variational_bound is None
    assert loss_fn(target, clean, noise, timesteps).loss.item() == 0


@pytest.mark.parametrize(
    "weighting", [MinSNR(2.0), P2(2.0, 0.5), LogitNormal(0.4, 0.6), lambda levels, timesteps: levels.sigma(timesteps)]
)
def test_squared_errors_are_weighted_by_objects_and_functions(weighting):
    scheduler, timesteps = FlowMatchEulerDiscreteScheduler(), torch.tensor([10.0, 400.0, 900.0])
    loss_fn, plain = DenoisingLoss(scheduler, weighting), DenoisingLoss(scheduler)(*batch(), timesteps)
    weighted = loss_fn(*batch(), timesteps)
    torch.testing.assert_close(weighted.mse, plain.mse * weighting(loss_fn.levels, timesteps).float())
    assert torch.equal(weighted.per_sample, weighted.mse)


def test_weights_leave_the_variational_bound_alone():
    plain, weighted = (
        DenoisingLoss(DDPMScheduler(), weighting)(*with_variance(batch()), TIMESTEPS)
        for weighting in ("constant", lambda levels, t: torch.full((3,), 7.0))
    )
    assert torch.equal(weighted.variational_bound, plain.variational_bound)
    torch.testing.assert_close(weighted.mse, 7 * plain.mse)
    torch.testing.assert_close(weighted.per_sample, weighted.mse + weighted.variational_bound)


def test_prediction_learns_from_the_squared_error_and_variance_from_the_bound():
    loss_fn, gradients = DenoisingLoss(DDPMScheduler()), []
    for model_output, *rest in (with_variance(batch()), batch()):
        loss_fn(model_output.requires_grad_(), *rest, TIMESTEPS).loss.backward()
        gradients.append(model_output.grad)
    torch.testing.assert_close(gradients[0][:, :3], gradients[1])
    assert gradients[0][:, 3:].abs().sum(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("variant", [lambda samples: samples, with_variance])
def test_half_precision_is_reduced_in_float32(variant):
    samples, loss_fn = variant(batch((3, 32, 32), torch.bfloat16)), DenoisingLoss(DDPMScheduler(), "min_snr")
    half, full = (loss_fn(*values, TIMESTEPS) for values in (samples, [sample.float() for sample in samples]))
    for field in dataclasses.fields(half):
        ours, expected = getattr(half, field.name), getattr(full, field.name)
        assert ours is expected is None or (ours.dtype == torch.float32 and torch.equal(ours, expected))


def test_loss_of_a_model_is_that_of_its_output_for_the_scaled_noisy_samples():
    loss_fn = DenoisingLoss(EulerDiscreteScheduler(), weighting="min_snr")
    _, clean, noise = batch()
    seen = {}

    def model(model_input, **arguments):
        seen.update(arguments, model_input=model_input)
        return (model_input * 0.9,)

    out = loss_fn.of_model(model, clean, noise, TIMESTEPS, {"class_labels": torch.arange(3)})
    model_input = loss_fn.levels.model_input(loss_fn.levels.add_noise(clean, noise, TIMESTEPS), TIMESTEPS)
    assert torch.equal(seen["model_input"], model_input)
    assert torch.equal(seen["timestep"], TIMESTEPS)
    assert torch.equal(seen["class_labels"], torch.arange(3))
    assert torch.equal(out.per_sample, loss_fn(model_input * 0.9, clean, noise, TIMESTEPS).per_sample)


def test_no_value_is_read_back_from_the_device():
    sample = torch.empty(2, 3, 4, 4, device="meta")  # has no values: reading one raises
    timesteps = torch.empty(2, device="meta", dtype=torch.int64)
    output = DenoisingLoss(DDPMScheduler(), "min_snr")(torch.cat([sample, sample], 1), sample, sample, timesteps)
    assert (output.per_sample.shape, output.loss.shape) == ((2,), ())


def test_loss_can_be_sent_to_another_process():
    loss_fn = DenoisingLoss(DDPMScheduler(), "min_snr")
    copy = pickle.loads(pickle.dumps(loss_fn))
    assert torch.equal(copy(*batch(), TIMESTEPS).loss, loss_fn(*batch(), TIMESTEPS).loss)


@pytest.mark.parametrize("weighting", ["min_snr_5", "logit_normal", LogitNormal()])
def test_weightings_that_are_unknown_or_not_for_the_scheduler_show_before_training(weighting):
    with pytest.raises(ValueError, match="`weighting"):
        DenoisingLoss(DDPMScheduler(), weighting)


OUTPUT, CLEAN, NOISE = batch()
DDPM, FLOW = DDPMScheduler(), FlowMatchEulerDiscreteScheduler()


@pytest.mark.parametrize(
    ("scheduler", "weighting", "model_output", "clean", "message"),
    [
        (DDPM, "constant", OUTPUT[:, :2], CLEAN, r"got \(3, 2, 4, 4\) and \(3, 3, 4, 4\)"),
        (DDPM, "constant", TIMESTEPS, TIMESTEPS, "`model_output` must"),
        (
            DDPM,
            lambda levels, t: torch.ones(3, 1),
            OUTPUT,
            CLEAN,
            r"weights of shape \(3,\), got \(3, 1\)",
        ),
        (FLOW, "constant", torch.cat([OUTPUT, OUTPUT], 1), CLEAN, "has variance channels, but FlowMatch"),
    ],
)
def test_shapes_that_do_not_fit_together_are_refused(scheduler, weighting, model_output, clean, message):
    with pytest.raises(ValueError, match=message):
        DenoisingLoss(scheduler, weighting)(model_output, clean, NOISE, TIMESTEPS)
