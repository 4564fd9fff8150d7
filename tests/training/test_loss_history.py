import json
import math
import sys
from pathlib import Path

import matplotlib.axes
import pytest
from PIL import Image
from sudden_death import die_before_every_change

from diffusers_dtr.training.run.losses import LossHistory, ObservedLosses


def observed(step: int) -> ObservedLosses:
    return ObservedLosses(mean=1 / step, per_cluster=(0.1 / step, 2 / step, 0.5))


def write(folder: Path, steps: range, global_step: int = 0) -> LossHistory:
    history = LossHistory(folder, global_step)
    for step in steps:
        history.append(step, observed(step), [1.0, step / 3, 2.0])
    return history


def lines(folder: Path) -> list[str]:
    return (folder / "loss_history.jsonl").read_text().splitlines()


def test_every_reading_is_a_line_with_loss_clusters_and_weights_to_the_bit(tmp_path):
    write(tmp_path, range(1, 4))
    assert [json.loads(line) for line in lines(tmp_path)] == [
        {"step": step, "loss": 1 / step, "clusters": [0.1 / step, 2 / step, 0.5], "weights": [1.0, step / 3, 2.0]}
        for step in (1, 2, 3)
    ]


def test_lines_are_there_before_the_run_ends(tmp_path):
    history = LossHistory(tmp_path)
    for step in (1, 2, 3):
        history.append(step, observed(step), [1.0, 1.0, 1.0])
        assert len(lines(tmp_path)) == step


def test_cluster_without_samples_has_no_number_that_json_lacks(tmp_path):
    LossHistory(tmp_path).append(1, ObservedLosses(1.0, (1.0, math.nan)), [1.0, 1.0])
    (line,) = lines(tmp_path)
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name))["clusters"] == [1.0, None]


@pytest.mark.parametrize("killed_at", range(4, 8))
def test_resumed_history_is_that_of_the_unbroken_run(killed_at, tmp_path):
    write(tmp_path, range(1, killed_at))
    write(tmp_path, range(4, 8), global_step=3)
    resumed = lines(tmp_path)
    write(tmp_path, range(1, 8))
    assert resumed == lines(tmp_path)


@pytest.mark.parametrize("written", [1, 20, -2])
def test_half_written_last_line_is_left_out(written, tmp_path):
    write(tmp_path, range(1, 5))
    whole = lines(tmp_path)
    (tmp_path / "loss_history.jsonl").write_text("\n".join([*whole[:3], whole[3][:written]]))
    write(tmp_path, range(4, 5), global_step=3)
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


def test_resuming_changes_nothing_before_the_first_reading(tmp_path):
    write(tmp_path, range(1, 5))
    before = lines(tmp_path)
    LossHistory(tmp_path, global_step=2)
    assert lines(tmp_path) == before


def test_new_run_begins_a_new_history(tmp_path):
    write(tmp_path, range(1, 5))
    write(tmp_path, range(1, 3))
    assert len(lines(tmp_path)) == 2


def test_history_that_was_removed_begins_anew(tmp_path):
    assert len(write(tmp_path, range(4, 6), global_step=3).entries) == len(lines(tmp_path)) == 2


def test_picture_shows_a_line_per_cluster_since_the_beginning(tmp_path, monkeypatch):
    drawn = []
    plot = matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        matplotlib.axes.Axes, "plot", lambda ax, *args, **kwargs: drawn.append(args) or plot(ax, *args, **kwargs)
    )
    write(tmp_path, range(1, 4))
    path = write(tmp_path, range(4, 6), global_step=3).save_picture()
    assert path == tmp_path / "loss_per_cluster.png"
    assert [list(steps) for steps, _ in drawn] == [[1, 2, 3, 4, 5]] * 3
    assert drawn[0][1] == [0.1, 0.1 / 2, 0.1 / 3, 0.1 / 4, 0.1 / 5]
    picture = Image.open(path)
    picture.load()
    assert (picture.format, picture.size) == ("PNG", (840, 540))
    assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_missing_matplotlib_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'need matplotlib: pip install "diffusers-dtr\[training\]"'):
        LossHistory(tmp_path)
