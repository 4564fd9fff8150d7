from itertools import chain, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from diffusers_dtr.training.data.batches import TrainingBatches
from diffusers_dtr.training.randomness import Draw, generator_for


def stream(batches: TrainingBatches, steps: int) -> list[tuple[int, int]]:
    return list(chain.from_iterable(islice(batches, steps)))


class Echo(Dataset):
    def __getitem__(self, item):
        epoch, index = item
        noise = torch.rand(3, generator=generator_for(Draw.AUGMENTATION, 0, epoch, index))
        return {"item": torch.tensor(item), "noise": noise}


@given(num_samples=st.integers(1, 20), batch_size=st.integers(1, 50), seed=st.integers(0, 2**40))
def test_every_epoch_has_every_sample_once(num_samples, batch_size, seed):
    steps = -(-3 * num_samples // batch_size)
    items = stream(TrainingBatches(num_samples, batch_size, seed=seed), steps)
    for epoch in range(3):
        assert sorted(items[epoch * num_samples : (epoch + 1) * num_samples]) == [
            (epoch, index) for index in range(num_samples)
        ]


@given(num_samples=st.integers(1, 20), batch_size=st.integers(1, 9), start_step=st.integers(0, 30))
def test_resuming_at_a_step_continues_the_uninterrupted_stream(num_samples, batch_size, start_step):
    uninterrupted = islice(TrainingBatches(num_samples, batch_size, seed=3), start_step, start_step + 4)
    resumed = TrainingBatches(num_samples, batch_size, seed=3, start_step=start_step)
    assert list(islice(resumed, 4)) == list(uninterrupted)


@given(num_samples=st.integers(1, 20), num_processes=st.sampled_from([1, 2, 3, 6]))
def test_the_global_order_does_not_depend_on_the_number_of_processes(num_samples, num_processes):
    processes = [
        TrainingBatches(num_samples, 6 // num_processes, seed=3, num_processes=num_processes, process_index=index)
        for index in range(num_processes)
    ]
    together = [item for step in range(7) for process in processes for item in process.batch(step)]
    assert together == stream(TrainingBatches(num_samples, 6, seed=3), 7)


def test_resuming_far_into_training_takes_no_detour(monkeypatch):
    batches = TrainingBatches(1000, 8, seed=0, start_step=10**12)
    asked = []
    order = batches._order
    monkeypatch.setattr(batches, "_order", lambda epoch: asked.append(epoch) or order(epoch))
    assert next(iter(batches))[0][0] == 8 * 10**12 // 1000
    assert len(asked) == 1


def test_orders_differ_between_epochs_and_between_neighbouring_seeds():
    orders = {
        tuple(index for _, index in TrainingBatches(50, 50, seed=seed).batch(epoch))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_workers_do_not_change_the_batches():
    def first_batches(num_workers):
        loader = DataLoader(Echo(), batch_sampler=TrainingBatches(5, 4, seed=1), num_workers=num_workers)
        return list(islice(loader, 5))

    for alone, by_workers in zip(first_batches(0), first_batches(2), strict=True):
        assert torch.equal(alone["item"], by_workers["item"])
        assert torch.equal(alone["noise"], by_workers["noise"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_samples": 0},
        {"batch_size": 0},
        {"seed": -1},
        {"num_processes": 0},
        {"start_step": -1},
        {"process_index": 1},
        {"process_index": -1},
    ],
)
def test_arguments_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
        TrainingBatches(**{"num_samples": 4, "batch_size": 2, "seed": 0} | wrong)
