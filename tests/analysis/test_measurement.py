import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_dit import NUM_CLASSES, routed_dit

from diffusers_dtr import DenoisingLoss
from diffusers_dtr.analysis import Workspace
from diffusers_dtr.analysis.gradient_projections import CountSketch, exact_blocks
from diffusers_dtr.analysis.timestep_gradients import TimestepGradients, checked_samples


TIMESTEPS = torch.tensor([10, 250, 500, 750, 990])


class CountedGradients(TimestepGradients):
    """Gradients that remember what was asked of them, and die when asked for a certain timestep."""

    def __init__(self, die_at=None, parameters=None, **config):
        generator = torch.Generator().manual_seed(0)
        clean, noise = torch.randn(2, 4, 4, 8, 8, generator=generator)
        samples = checked_samples(clean, noise, {"class_labels": torch.arange(4) % NUM_CLASSES})
        super().__init__(routed_dit(**config), DenoisingLoss(DDPMScheduler()), samples, parameters=parameters)
        self.die_at = die_at
        self.asked = []

    def __call__(self, timestep, part, names):
        if timestep == self.die_at:
            raise KeyboardInterrupt
        self.asked.append((int(timestep), part))
        return super().__call__(timestep, part, names)


def sketch(gradients):
    return [CountSketch(gradients.parameters, 64, seed=0)]


def blocks(gradients):
    return exact_blocks(gradients.parameters, 20_000)


def measure(folder, gradients, projections=sketch, **process):
    folder.mkdir(exist_ok=True)
    return Workspace(folder, **process).products(gradients, TIMESTEPS, projections(gradients))


both_projections = pytest.mark.parametrize("projections", [sketch, blocks])


@both_projections
def test_interrupted_measurement_goes_on_without_repeating_work(tmp_path, projections):
    whole, first, second, third = (CountedGradients(die_at) for die_at in (None, 750, None, None))
    expected = measure(tmp_path / "whole", whole, projections)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "cut", first, projections)
    assert torch.equal(measure(tmp_path / "cut", second, projections), expected)
    assert first.asked + second.asked == whole.asked
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("cut", "whole")]
    assert files[0] == files[1]
    assert torch.equal(measure(tmp_path / "cut", third, projections), expected)
    assert third.asked == []


@both_projections
def test_processes_share_the_work_and_find_what_one_does(tmp_path, projections):
    alone, *workers = (CountedGradients() for _ in range(3))
    expected = measure(tmp_path / "alone", alone, projections)
    barrier, gone_through = threading.Barrier(2, timeout=60), []

    def progress(indices):
        for index in indices:
            yield index
            gone_through.append(index)

    def work(index):
        process = {"process_index": index, "num_processes": 2, "wait_for_everyone": barrier.wait, "progress": progress}
        return measure(tmp_path / "shared", workers[index], projections, **process)

    with ThreadPoolExecutor(2) as pool:
        for products in pool.map(work, range(2)):
            torch.testing.assert_close(products, expected)
    assert sorted(workers[0].asked + workers[1].asked) == sorted(alone.asked)
    assert 0 < len(workers[1].asked) < len(workers[0].asked) < len(alone.asked)
    assert {*gone_through} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("measured", "config", "changed"),
    [("", {}, "pos_embed"), ("", {"routing_beta": 0.5}, "nothing"), ("blocks.0", {}, "blocks.1")],
    ids=["other weights", "another model of the same weights", "other weights in the rest"],
)
def test_other_models_are_measured_anew(tmp_path, measured, config, changed):
    def parameters(name):
        return measured in name

    first = measure(tmp_path, CountedGradients(parameters=parameters))
    other = CountedGradients(parameters=parameters, **config)
    with torch.no_grad():
        for name, value in other.model.named_parameters():
            if changed in name:
                value.mul_(1.5)
    assert not torch.allclose(measure(tmp_path, other), first)
    assert len(other.asked) == 4 * len(TIMESTEPS)


def test_changed_settings_are_refused_by_name_once_anything_is_measured(tmp_path):
    workspace = Workspace(tmp_path / "new")
    workspace.claim({"seed": 2})
    workspace.claim({"seed": 0, "timesteps": (1, 2)})
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "new", CountedGradients(die_at=250))
    workspace.claim({"seed": 0, "timesteps": (1, 2)})
    assert json.loads((tmp_path / "new" / "settings.json").read_text()) == {"seed": 0, "timesteps": [1, 2]}
    with pytest.raises(ValueError, match="of other settings: `extra`, `seed` changed"):
        workspace.claim({"seed": 1, "timesteps": (1, 2), "extra": None})
