import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_dit import NUM_CLASSES, routed_dit

from diffusers_dtr import DenoisingLoss
from diffusers_dtr.analysis.gradient_projections import CountSketch, exact_blocks
from diffusers_dtr.analysis.measurement import Workspace
from diffusers_dtr.analysis.timestep_gradients import DenoisingBatch, TimestepGradients


TIMESTEPS = torch.tensor([10, 250, 500, 750, 990])


class CountedGradients(TimestepGradients):
    """Gradients that remember what was asked of them, and die when asked for a certain timestep."""

    def __init__(self, die_at=None, parameters=None, **config):
        generator = torch.Generator().manual_seed(0)
        clean, noise = torch.randn(2, 4, 4, 8, 8, generator=generator)
        batch = DenoisingBatch(clean, noise, {"class_labels": torch.arange(4) % NUM_CLASSES})
        super().__init__(routed_dit(**config), DenoisingLoss(DDPMScheduler()), batch, parameters=parameters)
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


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def measure(folder, gradients, projections=sketch, **process):
    return Workspace(folder, **process).products(gradients, TIMESTEPS, projections(gradients))


@pytest.mark.parametrize("projections", [sketch, blocks])
def test_interrupted_measurement_goes_on_without_repeating_work(tmp_path, projections):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = CountedGradients()
    expected = measure(tmp_path / "whole", whole, projections)
    first, second = CountedGradients(die_at=750), CountedGradients()
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "cut", first, projections)
    assert torch.equal(measure(tmp_path / "cut", second, projections), expected)
    assert first.asked + second.asked == whole.asked
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    third = CountedGradients()
    assert torch.equal(measure(tmp_path / "cut", third, projections), expected)
    assert third.asked == []


def test_death_while_writing_leaves_no_file_that_counts(tmp_path, monkeypatch):
    def die(tensors, path):
        path.write_bytes(b"half a fi")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("diffusers_dtr.analysis.measurement.save_file", die)
        with pytest.raises(KeyboardInterrupt):
            measure(tmp_path, CountedGradients())
    (tmp_path / "whole").mkdir()
    assert torch.equal(measure(tmp_path, CountedGradients()), measure(tmp_path / "whole", CountedGradients()))


@pytest.mark.parametrize("projections", [sketch, blocks])
def test_processes_share_the_work_and_find_what_one_does(tmp_path, projections):
    (tmp_path / "alone").mkdir()
    (tmp_path / "shared").mkdir()
    alone = CountedGradients()
    expected = measure(tmp_path / "alone", alone, projections)
    barrier = threading.Barrier(2, timeout=60)
    workers = [CountedGradients(), CountedGradients()]

    def work(index):
        process = {"process_index": index, "num_processes": 2, "wait_for_everyone": barrier.wait}
        return measure(tmp_path / "shared", workers[index], projections, **process)

    with ThreadPoolExecutor(2) as pool:
        for products in pool.map(work, range(2)):
            torch.testing.assert_close(products, expected)
    assert sorted(workers[0].asked + workers[1].asked) == sorted(alone.asked)
    assert 0 < len(workers[1].asked) < len(workers[0].asked) < len(alone.asked)


def test_blocks_add_up_to_the_inner_products_of_the_gradients(tmp_path):
    gradients = CountedGradients()
    names = list(gradients.parameters)
    flat = torch.stack(
        [
            torch.stack(
                [
                    torch.cat([value.flatten() for value in gradients(timestep, part, names).values()])
                    for timestep in TIMESTEPS
                ]
            )
            for part in range(4)
        ]
    ).double()
    expected = torch.einsum("isd,jtd->ijst", flat, flat)
    assert len(blocks(gradients)) > 1
    torch.testing.assert_close(measure(tmp_path, gradients, blocks), expected, rtol=1e-6, atol=1e-9)


def test_other_weights_are_measured_anew(tmp_path):
    first = measure(tmp_path, CountedGradients())
    other = CountedGradients()
    with torch.no_grad():
        next(iter(other.parameters.values())).mul_(1.5)
    assert not torch.allclose(measure(tmp_path, other), first)
    assert len(other.asked) == 4 * len(TIMESTEPS)


def test_same_weights_in_another_model_are_measured_anew(tmp_path):
    first = measure(tmp_path, CountedGradients())
    other = CountedGradients(routing_beta=0.5)
    assert not torch.allclose(measure(tmp_path, other), first)


def test_part_of_a_model_is_measured_anew_where_the_rest_differs(tmp_path):
    def first_block(name):
        return "blocks.0" in name

    first = measure(tmp_path, CountedGradients(parameters=first_block))
    other = CountedGradients(parameters=first_block)
    with torch.no_grad():
        next(value for name, value in other.model.named_parameters() if "blocks.1" in name).mul_(1.5)
    assert not torch.allclose(measure(tmp_path, other), first)
    assert not torch.allclose(measure(tmp_path, CountedGradients()), first)


def test_progress_goes_through_the_timesteps_of_this_process(tmp_path):
    seen = []

    def progress(indices):
        for index in indices:
            yield index
            seen.append(index)

    measure(tmp_path, CountedGradients(), progress=progress)
    assert seen == [0, 1, 2, 3, 4]


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
