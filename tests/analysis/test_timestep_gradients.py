import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from diffusers_dtr import DenoisingLoss
from diffusers_dtr.analysis.timestep_gradients import DenoisingBatch, TimestepGradients


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


def batch(count=8):
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, count, 2, 4, 4, generator=generator)
    return DenoisingBatch(clean, noise, {"shift": torch.randn(count, generator=generator)})


def gradients(samples, model=None, **options):
    model = (Denoiser() if model is None else model).eval()
    return TimestepGradients(model, DenoisingLoss(DDPMScheduler()), samples, **options)


def test_gradient_is_that_of_the_loss_over_the_images_of_the_part():
    samples, left = batch(), Denoiser()
    with torch.no_grad():  # whatever the caller switched off
        found = gradients(samples, left)(torch.tensor(300), 1, ["one", "unused"])
    model, loss_fn, own = Denoiser().eval(), DenoisingLoss(DDPMScheduler()), [1, 5]
    timesteps = torch.tensor([300, 300])
    noisy = loss_fn.levels.add_noise(samples.clean[own], samples.noise[own], timesteps)
    output = model(noisy, timesteps, samples.conditions["shift"][own], False)[0]
    loss_fn(output, samples.clean[own], samples.noise[own], timesteps).loss.backward()
    torch.testing.assert_close(found["one"], model.one.grad)
    assert not found["unused"].any()
    assert all(parameter.grad is None for parameter in left.parameters())


def test_parts_share_no_image_leave_none_out_and_keep_conditions_with_their_images():
    clean, names = torch.arange(12.0).view(12, 1), torch.arange(12)
    samples = DenoisingBatch(clean, clean, {"texts": names, "sizes": {"height": 10 * names}})
    seen = []
    for part in range(4):
        for images, _, conditions in samples.parts(part, 2):
            assert torch.equal(images[:, 0].long(), conditions["texts"])
            assert torch.equal(conditions["sizes"]["height"], 10 * conditions["texts"])
            seen.append(conditions["texts"].tolist())
    assert seen == [[0, 4], [8], [1, 5], [9], [2, 6], [10], [3, 7], [11]]
    others = DenoisingBatch(clean, clean, {"texts": names, "sizes": {"height": names}})
    assert samples.fingerprint() != others.fingerprint()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_gradient_does_not_depend_on_the_batch_size(batch_size):
    whole, small = (
        gradients(batch(20), batch_size=size)(torch.tensor(500), 2, ["one", "other"]) for size in (None, batch_size)
    )
    torch.testing.assert_close(small, whole)
    torch.testing.assert_close(small["one"], small["other"])


def test_frozen_and_unchosen_parameters_are_left_out():
    model = Denoiser()
    model.other.requires_grad_(False)
    assert list(gradients(batch(), model).parameters) == ["one", "unused"]
    assert list(gradients(batch(), model, parameters=lambda name: name != "unused").parameters) == ["one"]
    with pytest.raises(ValueError, match=r"`parameters` must leave at least one .*2 trainable ones of Denoiser"):
        gradients(batch(), model, parameters=lambda name: name == "other")


CLEAN = torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: batch(0), "`clean` must have a multiple of 4 images.* got 0"),
        (lambda: batch(6), "`clean` must have a multiple of 4 images.* got 6"),
        (lambda: DenoisingBatch(CLEAN, torch.zeros(4, 3)), r"must have the shape of `clean`, \(4, 2\), got \(4, 3\)"),
        (lambda: DenoisingBatch(CLEAN, CLEAN, {"labels": torch.zeros(5)}), "the 4 clean samples, got 5 of 'labels'"),
        (lambda: DenoisingBatch(CLEAN, CLEAN, {"sizes": {"height": torch.zeros(2)}}), r"got 2 of 'sizes\.height'"),
        (lambda: gradients(batch(), batch_size=0), "`batch_size` must be an integer >= 1, got 0"),
    ],
)
def test_samples_that_do_not_belong_together_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
