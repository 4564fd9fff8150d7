"""The 60-line loop, and the README's block that users paste into theirs."""

import re

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from training_runs import EXAMPLES, load_script

from diffusers_dtr import ClusteredLoss


SCRIPT = EXAMPLES / "clustered_loss" / "train_minimal.py"


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.mark.parametrize("balancing", ["uniform", "uncertainty", "continuous_uncertainty"])
def test_three_steps_train_the_model_and_the_balancing(balancing, script, capsys):
    model, loss_fn = script.main(max_train_steps=3, batch_size=8, balancing=balancing)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    weights = loss_fn.cluster_weights()
    # Plain losses count 1; log variances start at 0, where they count a half, u at 0, where they count 1.
    start = 0.5 if balancing == "uncertainty" else 1.0
    assert (weights == start).all() == (balancing == "uniform")
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step 1: loss per cluster( \d\.\d{3}){8} \| weights( \d\.\d{2}){8}", line)


def test_seed_decides_the_run(script):
    one, same, other = (
        next(script.main(max_train_steps=1, batch_size=8, seed=seed)[0].parameters()) for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_loop_has_sixty_lines_of_which_four_are_marked():
    lines = SCRIPT.read_text().splitlines()
    assert len(lines) <= 60
    assert len([line for line in lines if re.search(r"  # \+", line)]) == 4


@pytest.mark.slow
def test_clusters_with_small_losses_come_to_count_more(script, capsys):
    _, loss_fn = script.main(max_train_steps=150)
    printed = capsys.readouterr().out.splitlines()[-1]
    losses = torch.tensor([float(loss) for loss in re.findall(r"\d\.\d{3}", printed)[:8]])
    weights, order = loss_fn.cluster_weights(), losses.argsort()
    assert weights[order[:4]].min() > weights[order[4:]].max()


def run_block_of_the_main_readme(change=lambda block: block):
    readme = (EXAMPLES.parent / "README.md").read_text()
    section = readme.split("## Cluster and balance timesteps")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    names = {
        "torch": torch,
        "model": UNet2DModel(4, 1, 1, **blocks, norm_num_groups=2, layers_per_block=1),
        "noise_scheduler": DDPMScheduler(),
        "loader": torch.randn(2, 16, 1, 4, 4),
        "generator": torch.Generator().manual_seed(0),
    }
    exec(change(block), names)
    assert isinstance(names["loss_fn"], ClusteredLoss)
    assert names["out"].counts.tolist() == [2] * 8
    assert names["out"].per_sample.shape == (16,)
    return names


def test_block_of_the_main_readme_runs_as_it_is():
    names = run_block_of_the_main_readme()
    assert not names["loss_fn"].parameter_groups()


def test_block_of_the_main_readme_runs_with_the_balancing_that_its_comment_names():
    def balanced(block):
        changed, found = re.subn(r'weighting="min_snr"\)  # (balancing="uncertainty") .*', r"\1)", block)
        assert found == 1
        return changed

    names = run_block_of_the_main_readme(balanced)
    assert [group["lr"] for group in names["optimizer"].param_groups][1:] == [0.025]
    assert (names["loss_fn"].balancing.log_variance != 0).all()
