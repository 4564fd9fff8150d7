"""The losses of a run: averaged, read, written down and drawn."""

import json
import math
import sys
from pathlib import Path

import matplotlib.axes
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from sudden_death import die_before_every_change

from diffusers_dtr.objective.clustered_loss import ClusteredLossOutput
from diffusers_dtr.training.run.losses import LossHistory, LossMonitor, MeanLosses


def out_of(per_cluster: list[float], counts: list[int], loss: float = 1.0) -> ClusteredLossOutput:
    by_cluster = {"per_cluster": torch.tensor(per_cluster), "counts": torch.tensor(counts)}
    loss, nothing = torch.tensor(loss, requires_grad=True), torch.empty(0)
    return ClusteredLossOutput(loss, per_sample=nothing, mse=nothing, variational_bound=None, **by_cluster)


@pytest.fixture
def monitor() -> LossMonitor:
    return LossMonitor(Accelerator(cpu=True), num_clusters=2)


def test_every_sample_counts_alike_and_a_cluster_without_any_has_no_loss(monitor):
    monitor.update(out_of([1.0, 5.0], [3, 1]), step=1)
    monitor.update(out_of([2.0, 0.0], [4, 0]), step=2)
    observed = monitor.read()
    assert observed.mean == pytest.approx((3 * 1 + 5 + 4 * 2) / 8)
    assert observed.per_cluster == pytest.approx(((3 * 1 + 4 * 2) / 7, 5.0))
    monitor.update(out_of([3.0, 0.0], [1, 0]), step=3)
    observed = monitor.read()
    assert observed.values("loss", "cluster") == pytest.approx(
        {"loss": 3.0, "loss/cluster_0": 3.0, "loss/cluster_1": math.nan}, nan_ok=True
    )


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_first_loss_that_is_not_finite_is_named_with_the_place_to_go_on_from(value, monitor):
    for step, loss in enumerate([1.0, value, value, 1.0], start=5):
        monitor.update(out_of([1.0, 1.0], [1, 1], loss), step)
    for checkpoint, message in (
        (Path("run/checkpoint-4"), "The last good checkpoint is run/checkpoint-4; go on .*`--resume_from_checkpoint`"),
        (None, "There is no checkpoint before it; start again"),
    ):
        with pytest.raises(FloatingPointError, match=rf"not finite at step 6\. {message}"):
            monitor.read(checkpoint)


def test_watching_keeps_no_graph(monitor):
    out = out_of([1.0, 1.0], [1, 1])
    monitor.update(out, step=1)
    assert not any(value.requires_grad for value in vars(monitor).values() if isinstance(value, torch.Tensor))


# ---- the history


def observed(step: int) -> MeanLosses:
    return MeanLosses(mean=1 / step, per_cluster=(0.1 / step, 2 / step, 0.5))


def write(folder: Path, steps: range, global_step: int = 0) -> LossHistory:
    history = LossHistory(folder, global_step)
    for step in steps:
        history.append(step, observed(step), [1.0, step / 3, 2.0])
    return history


def lines(folder: Path) -> list[str]:
    return (folder / "loss_history.jsonl").read_text().splitlines()


def test_every_reading_of_a_new_run_is_a_line_with_loss_clusters_and_weights_to_the_bit(tmp_path):
    for last in (5, 4):  # a history that is there already is that of another run
        write(tmp_path, range(1, last))
    assert [json.loads(line) for line in lines(tmp_path)] == [
        {"step": step, "loss": 1 / step, "clusters": [0.1 / step, 2 / step, 0.5], "weights": [1.0, step / 3, 2.0]}
        for step in (1, 2, 3)
    ]


def test_cluster_without_samples_has_no_number_that_json_lacks(tmp_path):
    LossHistory(tmp_path).append(1, MeanLosses(1.0, (1.0, math.nan)), [1.0, 1.0])
    (line,) = lines(tmp_path)
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name))["clusters"] == [1.0, None]


@pytest.mark.parametrize(("killed_at", "written"), [(4, 0), (7, 0), (4, 1), (4, -2)])
def test_resumed_history_is_that_of_the_unbroken_run(killed_at, written, tmp_path):
    """A process that was killed may have left a part of a line."""
    write(tmp_path, range(1, 8))
    whole = lines(tmp_path)
    part = whole[killed_at - 1][:written]
    (tmp_path / "loss_history.jsonl").write_text("\n".join([*whole[: killed_at - 1], part]))
    write(tmp_path, range(4, 8), global_step=3)
    assert lines(tmp_path) == whole


def test_readings_before_a_resumption_outlive_a_process_that_dies_while_it_goes_on(tmp_path):
    write(tmp_path, range(1, 5))
    before = lines(tmp_path)
    found = []
    die_before_every_change(
        lambda: write(tmp_path, range(4, 5), global_step=3), lambda: found.append(lines(tmp_path)[:3])
    )
    assert found == [before[:3]] * len(found)
    assert lines(tmp_path) == before


def test_picture_shows_a_line_per_cluster_since_the_beginning(tmp_path, monkeypatch):
    drawn, plot = [], matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        matplotlib.axes.Axes, "plot", lambda ax, *args, **kwargs: drawn.append(args) or plot(ax, *args, **kwargs)
    )
    write(tmp_path, range(1, 4))
    path = write(tmp_path, range(4, 6), global_step=3).save_picture()
    assert [list(steps) for steps, _ in drawn] == [[1, 2, 3, 4, 5]] * 3
    assert drawn[0][1] == [0.1, 0.1 / 2, 0.1 / 3, 0.1 / 4, 0.1 / 5]
    picture = Image.open(path)
    assert (path.name, picture.format, picture.size) == ("loss_per_cluster.png", "PNG", (840, 540))
    assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_missing_matplotlib_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'need matplotlib: pip install "diffusers-dtr\[training\]"'):
        LossHistory(tmp_path)
