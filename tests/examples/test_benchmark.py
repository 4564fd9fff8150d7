"""The benchmarks' one command: every comparison runs, at its smallest size."""

import json
from importlib import import_module

import pytest
import torch
from training_runs import EXAMPLES

from diffusers_dtr import GradientBalancer


SMALL = "--shrink 8 --batch_size 2 --num_images 1 --num_inference_steps 1 --num_clusters 2 --rounds 1 --repeats 1"
SMALL += " --warmup 0 --resolution 16 --vae_width 8"


@pytest.fixture
def script(monkeypatch):
    # By name, as the processes that it starts import it.
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    return import_module("benchmark")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")
def test_every_comparison_is_made_once_and_written_down(script, tmp_path, monkeypatch):
    models = [f"{name}:1:8" for name in script.DENOISERS]
    monkeypatch.setattr(
        "sys.argv", ["benchmark.py", *SMALL.split(), "--models", *models, "--output", str(tmp_path / "found")]
    )
    script.main()
    report, table = json.loads((tmp_path / "found.json").read_text()), (tmp_path / "found.md").read_text()
    assert {cell["group"] for cell in report["cells"]} == set(script.GROUPS)
    routed = [cell["name"] for cell in report["cells"] if cell["group"] == "routing"]
    assert routed == [f"{name}, {run}, eager" for name in models for run in ("forward", "train step")]
    for cell in report["cells"]:
        assert cell["turns"] == 1
        assert min(cell["median_seconds"].values()) > 0
        assert cell["name"] in table
        for name, ratio in cell["ratios"].items():
            seconds = cell["median_seconds"]
            assert ratio["of_medians"] == pytest.approx(seconds[name] / seconds[cell["base"]], rel=1e-2)


def test_a_turn_of_balancing_has_one_update_of_the_weights(script, monkeypatch):
    argv = [*SMALL.split(), "--preset", "DiT-S/4:1:4", "--balancing_update_every", "3"]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *argv])
    ((name, items, runs),) = script.balancing(script.parse_args())
    assert name == "DiT-S/4:1:4, 2 clusters, 3 train steps, one of which updates the weights"
    assert items == 3 * 2
    updates, steps = [], []
    monkeypatch.setattr(GradientBalancer, "_update", lambda balancer, losses: updates.append(balancer))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: steps.append(optimizer))
    for name, run in runs.items():
        steps.clear()
        run()
        assert len(steps) == 3 * (2 if name == "uncertainty" else 1)  # which has an optimizer of its own
    assert len(updates) == len(set(updates)) == 3


@pytest.mark.parametrize(
    ("preset", "message"), [("SD3", "`--preset` must be one of .*, got 'SD3'"), ("DiT-S/4:x", "DEPTH")]
)
def test_preset_is_a_dit_that_may_be_cut(script, preset, message, monkeypatch):
    cut = script.dit("DiT-S/2:2:4", shrink=3)
    assert [cut[name] for name in ("num_layers", "num_attention_heads", "sample_size", "patch_size")] == [2, 2, 8, 2]
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--preset", preset])
    monkeypatch.setattr(script, "seconds_by_turns", None)  # told before anything is measured
    with pytest.raises(ValueError, match=message):
        script.main()
