"""Metrics of sets against second implementations, and the networks that the features come from."""

import sys

import numpy as np
import pytest
import torch
from torch import nn
from training_runs import EXAMPLES
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from diffusers_dtr.analysis import frechet_distance


pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
sys.path.append(str(EXAMPLES / "evaluation"))

import set_metrics as metrics
from feature_networks import load_network


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=generator)
    return torch.randn(80, 6, generator=generator) @ mix, torch.randn(90, 6, generator=generator) + 0.5


def test_frechet_distance_is_that_of_an_independent_computation_and_zero_to_itself(sets):
    assert metrics.set_metrics(*sets)["frechet_distance"] == pytest.approx(frechet_distance(*sets), rel=1e-3)
    assert metrics.set_metrics(sets[0], sets[0])["frechet_distance"] == pytest.approx(0, abs=1e-6)


def test_precision_and_recall_are_those_of_their_definition(sets):
    samples, reference = (features.double().numpy() for features in sets)

    def share_inside(points, manifold):
        radii = [np.sort(np.linalg.norm(manifold - center, axis=1))[3] for center in manifold]
        return np.mean([(np.linalg.norm(manifold - point, axis=1) <= radii).any() for point in points])

    expected = share_inside(samples, reference), share_inside(reference, samples)
    assert metrics.precision_and_recall(*sets) == pytest.approx(expected)
    assert 0 < expected[1] < 1
    assert metrics.precision_and_recall(sets[0], sets[0]) == (1, 1)


def test_kid_is_the_unbiased_mmd_of_a_cubic_kernel(sets):
    # As many as there are, so that every subset is the whole set
    x, y = (features[:80].double().numpy() for features in sets)
    kernel = lambda a, b: (a @ b.T / 6 + 1) ** 3  # noqa: E731
    within = sum((kernel(a, a).sum() - np.trace(kernel(a, a))) / (80 * 79) for a in (x, y))
    found = metrics.set_metrics(sets[0][:80], sets[1][:80])
    assert found["kid"] == pytest.approx(within - 2 * kernel(x, y).mean())
    assert found["kid_std"] == pytest.approx(0, abs=1e-9)


def test_inception_score_is_that_of_its_definition(sets, monkeypatch):
    monkeypatch.setattr(metrics, "INCEPTION_SPLITS", 1)  # whose order does not matter
    logits = sets[0].double()
    p = logits.softmax(1).numpy()
    expected = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    assert metrics.set_metrics(*sets, logits)["inception_score"] == pytest.approx(expected)
    assert metrics.set_metrics(*sets)["inception_score"] is None


def test_metrics_need_four_images_are_the_same_every_time_and_leave_the_global_generator_alone(sets):
    before = torch.get_rng_state()
    assert metrics.set_metrics(*sets, sets[0]) == metrics.set_metrics(*sets, sets[0])
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="At least 4 samples and images are needed, got 80, 3"):
        metrics.set_metrics(sets[0], sets[1][:3])


IMAGES = torch.randint(256, (3, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_network_of_transformers_sees_the_whole_image(tmp_path):
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**config)).eval()
    model.save_pretrained(tmp_path / "dino")
    size = {"size": {"shortest_edge": 40}, "crop_size": {"height": 28, "width": 28}, "do_convert_rgb": True}
    BitImageProcessor(**size).save_pretrained(tmp_path / "dino")
    network = load_network(str(tmp_path / "dino"), None, CPU)
    assert network.name == "dino"
    output = network(IMAGES)
    assert (output["features"].shape, len(output["logits"])) == ((3, 8), 0)
    corner = IMAGES.clone()
    corner[:, :, 0, 0] += 100  # which a crop would not have
    assert not np.allclose(network(corner)["features"], output["features"], atol=1e-5)
    again = load_network(str(tmp_path / "dino"), None, CPU)
    assert again.identity == network.identity
    Dinov2Model(Dinov2Config(**config)).save_pretrained(tmp_path / "dino")
    assert load_network(str(tmp_path / "dino"), None, CPU).sha256 != network.sha256


class LikeNVIDIAs(nn.Module):
    """Called as the TorchScript file of Inception that StyleGAN and EDM are measured with."""

    def forward(self, images: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        features = images.float().mean([2, 3])
        return features if return_features else (features / 50 + (0.0 if no_output_bias else 1.0)).softmax(1)


def test_file_of_nvidia_gives_features_and_logits(tmp_path):
    torch.jit.script(LikeNVIDIAs()).save(tmp_path / "inception.pt")
    output = load_network(str(tmp_path / "inception.pt"), None, CPU)(IMAGES)
    means = IMAGES.float().mean([2, 3])
    assert np.allclose(output["features"], means)
    assert np.allclose(torch.from_numpy(output["logits"]).softmax(1), (means / 50).softmax(1))


def test_inception_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"needs torch-fidelity and a torchvision of this build .*: pip install"):
        load_network("inception", None, CPU)
