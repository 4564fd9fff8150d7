import pytest
import torch

from diffusers_dtr.analysis.estimators import cosines, gram, reliability


def noisy_features(noise, seed=0, size=4000):
    """Four parts of 12 timesteps' gradients: a slowly turning direction, plus noise that is shared by timesteps."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.linspace(0, 1.5, 12)
    expected = torch.zeros(12, size)
    expected[:, 0], expected[:, 1] = angle.cos(), angle.sin()
    shared = torch.randn(4, 1, size, generator=generator)
    own = torch.randn(4, 12, size, generator=generator)
    return expected + noise * (shared + own) / size**0.5, (angle[:, None] - angle).cos().double()


def test_gram_holds_the_inner_products_of_all_parts():
    features = torch.randn(3, 5, 2500, generator=torch.Generator().manual_seed(0))
    expected = torch.einsum("isd,jtd->ijst", features.double(), features.double())
    torch.testing.assert_close(gram(features), expected)


def test_plain_cosines_are_those_of_the_mean_gradients():
    features, _ = noisy_features(noise=1.0)
    mean = features.double().mean(0)
    expected = torch.nn.functional.cosine_similarity(mean[:, None], mean[None], dim=2)
    torch.testing.assert_close(cosines(gram(features), "plain"), expected)


def test_noise_of_finitely_many_images_leaves_unbiased_cosines_where_they_are():
    features, expected = noisy_features(noise=1.0)
    products = gram(features)
    assert (cosines(products, "unbiased") - expected).abs().max() < 0.06
    assert (cosines(products, "plain") - expected).abs().max() > 0.1


@pytest.mark.parametrize("estimator", ["plain", "unbiased"])
def test_matrices_are_symmetric_with_ones_on_the_diagonal(estimator):
    matrix = cosines(gram(noisy_features(noise=0.5)[0]), estimator)
    assert torch.equal(matrix, matrix.T)
    assert (matrix.diagonal() == 1).all()


def test_timestep_without_gradient_is_not_a_number():
    features, _ = noisy_features(noise=0.1)
    features[:, 3] = 0
    for estimator in ("plain", "unbiased"):
        matrix = cosines(gram(features), estimator)
        assert matrix[3].isnan().all()
        assert matrix[:, 3].isnan().all()
        assert matrix.isnan().sum() == 23


def test_gradients_of_nothing_but_noise_have_no_unbiased_cosine():
    features = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]], [[1.0, 0.0]], [[-1.0, 0.1]]])
    assert cosines(gram(features), "unbiased").isnan().all()


def stated_and_measured(estimator, noise):
    """Mean reliability of single measurements, and mean correlation of two."""
    upper = torch.ones(12, 12, dtype=torch.bool).triu_(1)
    stated, measured = [], []
    for seed in range(20):
        first, second = (gram(noisy_features(noise, seed=2 * seed + i, size=400)[0]) for i in (0, 1))
        matrices = torch.stack([cosines(products, estimator)[upper] for products in (first, second)])
        measured.append(float(torch.corrcoef(matrices)[0, 1]))
        stated.append(reliability([first], estimator))
    return sum(stated) / 20, sum(measured) / 20


@pytest.mark.parametrize(("estimator", "noise"), [("plain", 1.0), ("unbiased", 1.0)])
def test_reliability_is_the_correlation_of_two_measurements(estimator, noise):
    stated, measured = stated_and_measured(estimator, noise)
    assert 0.9 < measured < 0.995
    assert stated == pytest.approx(measured, abs=0.03)


@pytest.mark.parametrize(("estimator", "noise"), [("plain", 3.0), ("unbiased", 1.5)])
def test_reliability_under_large_noise_says_too_little_rather_than_too_much(estimator, noise):
    stated, measured = stated_and_measured(estimator, noise)
    assert 0.3 < stated < measured < 0.96


def test_measurement_without_noise_is_wholly_reliable():
    assert reliability([gram(noisy_features(noise=0.0)[0])], "unbiased") == pytest.approx(1.0)


def test_noise_alone_is_not_reliable():
    features = torch.randn(4, 60, 3000, generator=torch.Generator().manual_seed(0))
    assert abs(reliability([gram(features)], "plain")) < 0.15


def test_halves_that_contradict_each_other_are_no_less_reliable_than_minus_one():
    """In one half the first two of three gradients agree, in the other the first and the last."""
    directions = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    halves = directions, directions[[0, 2, 1]]
    r = reliability([gram(torch.stack([halves[part // 2] for part in range(4)]))], "plain")
    assert -1 <= r < -0.7


def test_several_checkpoints_are_more_reliable_than_one():
    many = [gram(noisy_features(noise=3.0, seed=seed, size=400)[0]) for seed in range(10)]
    single = torch.tensor([reliability([products], "plain") for products in many]).mean()
    assert reliability(many, "plain") > single + 0.05


def test_reliability_of_two_timesteps_is_unknown():
    assert torch.tensor(reliability([gram(torch.randn(4, 2, 9))], "plain")).isnan()
