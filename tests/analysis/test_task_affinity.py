import json
import math
import sys

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from safetensors.torch import save_file
from tiny_dit import NUM_CLASSES, routed_dit, with_random_weights
from torch import nn

from diffusers_dtr import DenoisingLoss, NoiseLevels, TaskAffinity
from diffusers_dtr.analysis import Workspace, load_task_affinity, noise_distance_correlation, noise_distances


EXACT = {"sketch_size": None, "memory_limit": 2**20}
COSINE = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
ZERO_SNR = DDPMScheduler(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True)
SHIFTED = FlowMatchEulerDiscreteScheduler(shift=3.0)


def samples(count=8):
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, count, 4, 8, 8, generator=generator)
    return clean, noise, {"class_labels": torch.arange(count) % NUM_CLASSES}


def measure(model=None, scheduler=None, count=8, **options):
    options = {"estimator": "plain", "timesteps": 5, **options}
    model = routed_dit(out_channels=4) if model is None else model
    return TaskAffinity.measure(model, DenoisingLoss(scheduler or DDPMScheduler()), *samples(count), **options)


def naive_matrix(model, timesteps):
    """Every gradient stacked whole, and normalised."""
    loss_fn, rows = DenoisingLoss(DDPMScheduler()), []
    clean, noise, conditions = samples()
    for timestep in timesteps:
        model.zero_grad()
        loss_fn.of_model(model, clean, noise, timestep.long().expand(len(clean)), conditions).loss.backward()
        rows.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double())
    unit = nn.functional.normalize(torch.stack(rows))
    return unit @ unit.T


# --- measuring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_limit", [2**30, 2**20], ids=["one block", "many blocks"])
def test_exact_affinity_is_that_of_stacked_and_normalised_gradients(memory_limit):
    """And the model, which is in training mode here, is measured in eval mode and left as it was."""
    model = routed_dit(out_channels=8, class_dropout_prob=0.9)
    found = measure(model.train(), sketch_size=None, memory_limit=memory_limit)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.timesteps.tolist() == [0, 250, 500, 749, 999]
    torch.testing.assert_close(found.matrix, naive_matrix(model.eval(), found.timesteps), rtol=0, atol=1e-5)


def test_sketched_affinity_is_near_the_exact_one_and_unbiased_leaves_out_products_of_the_same_images():
    sketched, plain = (measure(sketch_size=size, count=64).matrix for size in (8192, None))
    assert 0 < (sketched - plain).abs().max() < 0.05
    unbiased = measure(estimator="unbiased", sketch_size=None, count=64).matrix
    assert 1e-4 < (plain - unbiased).abs().max() < 0.2


def test_unets_and_exploding_variance_are_served():
    config = {"block_out_channels": (8, 8), "norm_num_groups": 4, "num_class_embeds": NUM_CLASSES}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = with_random_weights(UNet2DModel(8, in_channels=4, out_channels=4, **config, **blocks))
    assert measure(unet, EulerDiscreteScheduler(), timesteps=4).full_matrix().isfinite().all()


def test_denoiser_is_called_with_integers_on_discrete_schedules_only():
    seen, model = [], routed_dit(out_channels=4)
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True)
    measure(model, timesteps=[3, 900])
    measure(model, timesteps=[3.5, 900])
    measure(model, SHIFTED, timesteps=2)
    assert [seen[i].dtype for i in (0, 8, 16)] == [torch.int64, torch.float32, torch.float32]
    assert (seen[0].tolist(), seen[8].tolist()) == ([3, 3], [3.5, 3.5])


def test_parameters_that_are_left_out_have_no_say():
    model = routed_dit(out_channels=4)
    every, some = (measure(model, **EXACT, parameters=chosen) for chosen in (None, lambda name: "proj_out" in name))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("proj_out" in name)
    assert torch.equal(some.matrix, measure(model, **EXACT).matrix)
    assert not torch.allclose(some.matrix, every.matrix, atol=1e-3)


def test_all_timesteps_are_the_default():
    found = measure(scheduler=DDPMScheduler(num_train_timesteps=6), timesteps=None)
    assert found.timesteps.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(found.full_matrix(), found.matrix)


def test_zero_gradients_are_an_error_that_says_what_to_do():
    model = routed_dit(out_channels=4)
    nn.init.zeros_(model.proj_out_2.weight)
    with pytest.raises(ValueError, match=r"norms are above zero, got none .* choose other `parameters`"):
        measure(model, parameters=lambda name: "transformer_blocks" in name)


class Constant(nn.Module):
    """Predicts the same noise always; its gradient is how far the mean noise is from that."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep, return_dict):
        return (self.value.expand_as(sample),)


def test_gradients_that_are_all_noise_are_an_error_that_says_what_to_do():
    noise = torch.tensor([1.0, -1.0, 1.0, -1.1]).view(4, 1)
    arguments = (Constant(), DenoisingLoss(DDPMScheduler()), torch.zeros(4, 1), noise)
    with pytest.raises(ValueError, match=r"zero and noise, got none .* 0, 999 \(2 of 2\); .*`estimator='plain'`"):
        TaskAffinity.measure(*arguments, timesteps=2)
    assert TaskAffinity.measure(*arguments, timesteps=2, estimator="plain").matrix.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": 1}, r"`timesteps`, as a number of timesteps, must be in \[2, 1000\], got 1"),
        ({"timesteps": [5, 5]}, "at least two increasing numbers"),
        ({"timesteps": [5, 1000]}, r"numbers in \[0, 999\]"),
        ({"estimator": "exact"}, "`estimator` must be one of unbiased, plain"),
        ({"sketch_size": 0}, "`sketch_size` must be an integer in"),
        ({"sketch_size": None, "memory_limit": 79}, "`memory_limit` must be at least 80 bytes"),
        ({"model": []}, "`models` must have at least one model"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        measure(**options)


@pytest.mark.parametrize(
    ("options", "change", "named"),
    [
        ({}, {"seed": 1}, "`seed`"),
        ({}, {"timesteps": 4, "settings": {"parameters": "attn"}}, "`parameters`, `timesteps`"),
        ({}, {"count": 4}, "`images`, `samples_sha256`"),
        (EXACT, {"memory_limit": 2**21}, "`memory_limit`"),
    ],
)
def test_workspace_of_other_settings_is_refused(options, change, named, tmp_path):
    """Inner products of two sketches, or of two ways to cut the parameters into blocks, would be added up."""
    measure(workspace=Workspace(tmp_path), **options)
    with pytest.raises(ValueError, match=f"other settings: {named} changed"):
        measure(workspace=Workspace(tmp_path), **{**options, **change})


def test_workspace_is_gone_on_with_for_another_estimator_or_memory(tmp_path):
    workspace, calls, model = Workspace(tmp_path), [], routed_dit(out_channels=4)
    plain = measure(workspace=workspace)
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(measure(model, workspace=workspace, memory_limit=2**20).matrix, plain.matrix)
    assert not torch.equal(measure(model, workspace=workspace, estimator="unbiased").matrix, plain.matrix)
    assert not calls


# --- the full matrix -------------------------------------------------------------------------------------------------


def affinity(matrix, timesteps, grid=range(10), log_snr=None, reliability=0.9):
    log_snr = [-timestep for timestep in timesteps] if log_snr is None else log_snr
    values = (torch.as_tensor(value, dtype=torch.float64) for value in (matrix, timesteps, [*grid], log_snr))
    return TaskAffinity(*values, reliability, "plain")


def test_interpolation_keeps_what_was_measured_and_the_ridge_of_ones():
    found = affinity([[1.0, 0.5, 0.1], [0.5, 1.0, 0.3], [0.1, 0.3, 1.0]], [0, 4, 9])
    full = found.full_matrix()
    assert torch.equal(full, full.T)
    assert full.diagonal().tolist() == [1.0] * 10
    torch.testing.assert_close(full[[0, 4, 9]][:, [0, 4, 9]], found.matrix)
    torch.testing.assert_close(full[0, :5], torch.linspace(1, 0.5, 5).double())
    torch.testing.assert_close(full[2, 9], torch.tensor(0.2).double())
    assert full[1, 3] == pytest.approx(0.75)


def test_interpolation_is_exact_where_affinity_is_linear_in_the_distance():
    number, places = torch.arange(10.0, dtype=torch.float64), [0, 3, 4, 9]
    expected = 1 - (number[:, None] - number).abs() / 20
    torch.testing.assert_close(affinity(expected[places][:, places], places).full_matrix(), expected)


def test_interpolation_goes_by_numbers_on_uneven_grids_and_beyond_the_measured_timesteps_stays_as_it_is():
    full = affinity([[1.0, 0.4], [0.4, 1.0]], [2.0, 1000.0], grid=[1.0, 2.0, 100.0, 1000.0, 2000.0]).full_matrix()
    torch.testing.assert_close(full[0], torch.tensor([1.0, 1.0, 0.7, 0.4, 0.4]).double())
    assert torch.equal(full[3], full[4])


# --- affinity and the distance of noise levels -----------------------------------------------------------------------


def by_distance(log_snr, function):
    distances = (torch.tensor(log_snr)[:, None] - torch.tensor(log_snr)).abs().nan_to_num()
    return affinity(function(distances), range(len(log_snr)), log_snr=log_snr)


def test_every_pair_of_different_timesteps_counts_once_but_for_pure_noise():
    distances, affinities = noise_distances(by_distance([4.0, 1.0, -1.0, -math.inf], torch.neg))
    assert distances.tolist() == [3.0, 5.0, 2.0]
    assert affinities.tolist() == [-3.0, -5.0, -2.0]


@pytest.mark.parametrize(("function", "expected"), [(lambda d: torch.exp(-d), -1.0), (lambda d: d**3, 1.0)])
def test_correlation_sees_order_alone_and_needs_three_timesteps_and_scipy(function, expected, monkeypatch):
    found = by_distance([9.0, 4.0, 1.0, -2.5, math.inf], function)
    assert noise_distance_correlation(found) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least three timesteps"):
        noise_distance_correlation(by_distance([1.0, 0.0, math.inf], function))
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r'need scipy: pip install "diffusers-dtr\[analysis\]"'):
        noise_distance_correlation(found)


# --- the file --------------------------------------------------------------------------------------------------------


def test_file_holds_everything(tmp_path):
    path = tmp_path / "affinity.safetensors"
    found = measure().with_provenance(command="measure", versions={"torch": "2"})
    found.save(path)
    loaded = TaskAffinity.load(path)
    for name in ("matrix", "timesteps", "training_timesteps", "log_snr"):
        assert torch.equal(getattr(loaded, name), getattr(found, name))
    assert (loaded.reliability, loaded.estimator) == (found.reliability, found.estimator)
    assert loaded.provenance == json.loads(json.dumps(found.provenance))
    assert (loaded.provenance["command"], loaded.provenance["checkpoints"]) == ("measure", 1)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    for levels in (None, NoiseLevels(DDPMScheduler())):
        assert torch.equal(load_task_affinity(path, levels), found.full_matrix())
    affinity(torch.eye(2), [0, 9], reliability=float("nan")).save(path)  # JSON proper has no NaN
    assert torch.tensor(TaskAffinity.load(path).reliability).isnan()


@pytest.mark.parametrize(
    ("measured", "trained", "difference"),
    [
        (DDPMScheduler(num_train_timesteps=10), DDPMScheduler(), "10 training timesteps, not 1000"),
        (SHIFTED, FlowMatchEulerDiscreteScheduler(), "training timesteps that lie up to 267.9 elsewhere"),
        (DDPMScheduler(), COSINE, "a log SNR of -10.12 at timestep 999, not -19.84"),
        (ZERO_SNR, COSINE, "a log SNR of -inf at timestep 999, not"),
        (DDPMScheduler(), EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02), None),
        (DDPMScheduler(beta_end=0.02), DDPMScheduler(beta_end=0.020001), None),
        (ZERO_SNR, ZERO_SNR, None),
        (SHIFTED, SHIFTED, None),
    ],
    ids=["length", "shift", "betas", "zero terminal SNR", "another solver", "rounding", "pure noise", "flow matching"],
)
def test_affinity_is_taken_for_the_same_noise_levels_alone(measured, trained, difference, tmp_path):
    levels, path = NoiseLevels(measured), tmp_path / "affinity.safetensors"
    timesteps = levels.timesteps[[0, len(levels.timesteps) // 2, -1]]
    affinity(torch.eye(3), timesteps, levels.timesteps, levels.log_snr(timesteps)).save(path)
    if difference is None:
        assert len(load_task_affinity(path, NoiseLevels(trained))) == 1000
    else:
        with pytest.raises(ValueError, match=f"another noise schedule: {difference}.* Measure it with the noise"):
            load_task_affinity(path, NoiseLevels(trained))


def test_files_of_something_else_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    for write in (lambda: None, lambda: path.write_text("not safetensors")):
        write()
        with pytest.raises(ValueError, match="`path` must be a task affinity file, cannot read"):
            load_task_affinity(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="of the format None"):
        load_task_affinity(path)
