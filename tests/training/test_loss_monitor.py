from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from diffusers_dtr.objective.clustered_loss import ClusteredLossOutput
from diffusers_dtr.training.run.losses import LossMonitor


def losses(per_cluster: list[float], counts: list[int], loss: float = 1.0) -> ClusteredLossOutput:
    nothing = torch.empty(0)
    return ClusteredLossOutput(
        loss=torch.tensor(loss, requires_grad=True),
        per_sample=nothing,
        per_cluster=torch.tensor(per_cluster),
        counts=torch.tensor(counts),
        mse=nothing,
        variational_bound=None,
    )


@pytest.fixture
def monitor() -> LossMonitor:
    return LossMonitor(Accelerator(cpu=True), num_clusters=2)


def test_every_sample_counts_alike(monitor):
    monitor.update(losses([1.0, 5.0], [3, 1]), step=1)
    monitor.update(losses([2.0, 0.0], [4, 0]), step=2)
    observed = monitor.read()
    assert observed.mean == pytest.approx((3 * 1 + 5 + 4 * 2) / 8)
    assert observed.per_cluster == pytest.approx(((3 * 1 + 4 * 2) / 7, 5.0))


def test_each_reading_begins_anew(monitor):
    monitor.update(losses([1.0, 1.0], [1, 1]), step=1)
    monitor.read()
    monitor.update(losses([3.0, 3.0], [1, 1]), step=2)
    assert monitor.read().mean == 3.0


def test_cluster_without_samples_has_no_loss(monitor):
    monitor.update(losses([1.0, 0.0], [2, 0]), step=1)
    observed = monitor.read()
    assert observed.mean == 1.0
    assert torch.tensor(observed.per_cluster).isnan().tolist() == [False, True]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_first_loss_that_is_not_finite_is_named_with_the_place_to_go_on_from(value, monitor):
    for step, loss in enumerate([1.0, value, value, 1.0], start=5):
        monitor.update(losses([1.0, 1.0], [1, 1], loss), step)
    message = (
        r"not finite at step 6\. The last good checkpoint is run/checkpoint-4; go on .*`--resume_from_checkpoint`"
    )
    with pytest.raises(FloatingPointError, match=message):
        monitor.read(Path("run/checkpoint-4"))


def test_without_a_checkpoint_the_run_is_to_start_again(monitor):
    monitor.update(losses([1.0, 1.0], [1, 1], float("nan")), step=1)
    with pytest.raises(FloatingPointError, match="There is no checkpoint before it; start again"):
        monitor.read()


def test_watching_keeps_no_graph(monitor):
    out = losses([1.0, 1.0], [1, 1])
    monitor.update(out, step=1)
    assert not any(value.requires_grad for value in vars(monitor).values() if isinstance(value, torch.Tensor))
