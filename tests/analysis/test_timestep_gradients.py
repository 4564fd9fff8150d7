import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from diffusers_dtr import DenoisingLoss
from diffusers_dtr.analysis.timestep_gradients import TimestepGradients, checked_samples


class Denoiser(nn.Module):
    """Two parameters with one gradient, one that the output does not depend on, and dropout."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.unused = (nn.Parameter(torch.full((2, 1, 1), value)) for value in (0.3, 0.2, 1.0))
        self.dropout = nn.Dropout(0.5)

    def forward(self, sample, timestep, shift, return_dict):
        assert not return_dict
        assert timestep.dtype == torch.int64
        return (self.dropout(sample * (self.one + self.other)) + shift.view(-1, 1, 1, 1),)


def samples(count=8):
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, count, 2, 4, 4, generator=generator)
    return checked_samples(clean, noise, {"shift": torch.randn(count, generator=generator)})


def gradients(count=8, model=None, **options):
    model = (Denoiser() if model is None else model).eval()
    return TimestepGradients(model, DenoisingLoss(DDPMScheduler()), samples(count), **options)


@pytest.mark.parametrize("part", range(4))
def test_gradient_is_that_of_the_loss_over_the_images_of_the_part(part):
    left, own = Denoiser(), [part, part + 4]
    with torch.no_grad():  # whatever the caller switched off
        found = gradients(model=left)(torch.tensor(300), part, ["one", "unused"])
    model, loss_fn, timesteps = Denoiser().eval(), DenoisingLoss(DDPMScheduler()), torch.tensor([300, 300])
    clean, noise, conditions = samples()
    noisy = loss_fn.levels.add_noise(clean[own], noise[own], timesteps)
    output = model(noisy, timesteps, conditions["shift"][own], False)[0]
    loss_fn(output, clean[own], noise[own], timesteps).loss.backward()
    torch.testing.assert_close(found["one"], model.one.grad)
    assert not found["unused"].any()
    assert all(parameter.grad is None for parameter in left.parameters())


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_gradient_does_not_depend_on_the_batch_size(batch_size):
    whole, small = (
        gradients(20, batch_size=size)(torch.tensor(500), 2, ["one", "other"]) for size in (None, batch_size)
    )
    torch.testing.assert_close(small, whole)
    torch.testing.assert_close(small["one"], small["other"])


def test_frozen_and_unchosen_parameters_are_left_out():
    model = Denoiser()
    model.other.requires_grad_(False)
    assert list(gradients(model=model).parameters) == ["one", "unused"]
    assert list(gradients(model=model, parameters=lambda name: name != "unused").parameters) == ["one"]
    with pytest.raises(ValueError, match=r"`parameters` must leave at least one .*2 trainable ones of Denoiser"):
        gradients(model=model, parameters=lambda name: name == "other")


CLEAN = torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: samples(0), "`clean` must have a multiple of 4 images.* got 0"),
        (lambda: samples(6), "`clean` must have a multiple of 4 images.* got 6"),
        (lambda: checked_samples(CLEAN, torch.zeros(4, 3)), r"must have the shape of `clean`, \(4, 2\), got \(4, 3\)"),
        (lambda: checked_samples(CLEAN, CLEAN, {"labels": torch.zeros(5)}), "the 4 clean samples, got 5 of 'labels'"),
        (lambda: checked_samples(CLEAN, CLEAN, {"sizes": {"height": torch.zeros(2)}}), r"got 2 of 'sizes\.height'"),
        (lambda: gradients(batch_size=0), "`batch_size` must be an integer >= 1, got 0"),
    ],
)
def test_samples_that_do_not_belong_together_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
