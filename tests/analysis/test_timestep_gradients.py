import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from diffusers_dtr import DenoisingLoss
from diffusers_dtr.analysis.timestep_gradients import (
    DenoisingBatch,
    TimestepGradients,
    chosen_parameters,
)


class Denoiser(nn.Module):
    """Two parameters with one gradient, one that the output does not depend on, and dropout."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.unused = (nn.Parameter(torch.full((2, 1, 1), value)) for value in (0.3, 0.2, 1.0))
        self.dropout = nn.Dropout(0.5)

    def forward(self, sample, timestep, shift, return_dict):
        assert not return_dict
        assert timestep.dtype == torch.int64
        output = self.dropout(sample * (self.one + self.other)) + shift.view(-1, 1, 1, 1)
        return (output,)


def batch(count=8):
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, count, 2, 4, 4, generator=generator)
    return DenoisingBatch(clean, noise, {"shift": torch.randn(count, generator=generator)})


def gradients(samples, model=None, **options):
    model = (Denoiser() if model is None else model).eval()
    return TimestepGradients(model, DenoisingLoss(DDPMScheduler()), samples, **options)


def test_gradient_is_that_of_the_loss_over_the_images_of_the_part():
    samples = batch()
    found = gradients(samples)(torch.tensor(300), 1, ["one"])["one"]
    model, loss_fn = Denoiser().eval(), DenoisingLoss(DDPMScheduler())
    own = [1, 5]
    timesteps = torch.tensor([300, 300])
    noisy = loss_fn.levels.add_noise(samples.clean[own], samples.noise[own], timesteps)
    output = model(noisy, timesteps, samples.conditions["shift"][own], False)[0]
    loss_fn(output, samples.clean[own], samples.noise[own], timesteps).loss.backward()
    torch.testing.assert_close(found, model.one.grad)


def test_parts_share_no_image_and_leave_none_out():
    samples = batch(12)
    seen = [clean for part in range(4) for clean, _, _ in samples.parts(part, None)]
    assert [len(part) for part in seen] == [3] * 4
    assert sorted(torch.cat(seen)[:, 0, 0, 0].tolist()) == sorted(samples.clean[:, 0, 0, 0].tolist())


def test_conditions_in_mappings_go_with_their_images():
    clean, names = torch.zeros(12, 2), torch.arange(12)
    samples = DenoisingBatch(clean, clean, {"texts": names, "sizes": {"height": 10 * names}})
    for _, _, conditions in samples.to(torch.device("cpu")).parts(1, 2):
        assert torch.equal(conditions["sizes"]["height"], 10 * conditions["texts"])
    assert [conditions["texts"].tolist() for _, _, conditions in samples.parts(1, 2)] == [[1, 5], [9]]
    others = DenoisingBatch(clean, clean, {"texts": names, "sizes": {"height": names}})
    assert samples.fingerprint() != others.fingerprint()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_gradient_does_not_depend_on_the_batch_size(batch_size):
    samples = batch(20)
    whole = gradients(samples)(torch.tensor(500), 2, ["one", "other"])
    small = gradients(samples, batch_size=batch_size)(torch.tensor(500), 2, ["one", "other"])
    torch.testing.assert_close(small, whole)
    torch.testing.assert_close(small["one"], small["other"])


def test_parameter_without_influence_has_the_gradient_zero():
    assert (gradients(batch())(torch.tensor(0), 0, ["unused"])["unused"] == 0).all()


def test_gradients_are_there_where_the_caller_switched_them_off():
    with torch.no_grad():
        assert gradients(batch())(torch.tensor(0), 0, ["one"])["one"].any()


def test_no_gradient_is_left_in_the_model():
    model = Denoiser()
    gradients(batch(), model)(torch.tensor(0), 0, ["one"])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_and_unchosen_parameters_are_left_out():
    model = Denoiser()
    model.other.requires_grad_(False)
    assert list(chosen_parameters(model, None)) == ["one", "unused"]
    assert list(chosen_parameters(model, lambda name: name != "unused")) == ["one"]
    with pytest.raises(ValueError, match="`parameters` must leave at least one parameter"):
        chosen_parameters(model, lambda name: name == "other")
    with pytest.raises(ValueError, match="got none of the 0 trainable ones of Denoiser"):
        chosen_parameters(model.requires_grad_(False), None)


@pytest.mark.parametrize("count", [0, 3, 6])
def test_images_that_do_not_make_four_parts_are_refused(count):
    with pytest.raises(ValueError, match=f"`clean` must have a multiple of 4 images.* got {count}"):
        batch(count)


def test_samples_that_do_not_belong_together_are_refused():
    clean = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"`noise` must have the shape of `clean`, \(4, 2\), got \(4, 3\)"):
        DenoisingBatch(clean, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="one entry for each of the 4 clean samples, got 5 of 'labels'"):
        DenoisingBatch(clean, clean, {"labels": torch.zeros(5)})
    with pytest.raises(ValueError, match=r"got 2 of 'sizes\.height'"):
        DenoisingBatch(clean, clean, {"sizes": {"height": torch.zeros(2)}})


def test_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="`batch_size` must be an integer >= 1, got 0"):
        gradients(batch(), batch_size=0)
