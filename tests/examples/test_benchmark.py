"""The benchmarks' one command: every comparison runs, at its smallest size."""

import json
from importlib import import_module

import pytest
from training_runs import EXAMPLES


SMALL = "--shrink 8 --batch_size 2 --num_images 1 --num_inference_steps 1 --num_clusters 2 --rounds 1 --repeats 1"
SMALL += " --warmup 0 --resolution 16 --vae_width 8"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")
def test_every_comparison_is_made_once_and_written_down(tmp_path, monkeypatch):
    # By name, as the processes that it starts import it.
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    script = import_module("benchmark")
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
