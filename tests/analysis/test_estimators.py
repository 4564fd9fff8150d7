import pytest
import torch

from diffusers_dtr.analysis.estimators import cosines, gram, reliability


def normals(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


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
    features = normals(3, 5, 2500)
    expected = torch.einsum("isd,jtd->ijst", features.double(), features.double())
    torch.testing.assert_close(gram(features), expected)


def test_plain_cosines_are_of_the_mean_gradients_and_unbiased_ones_free_of_the_noise_of_few_images():
    features, expected = noisy_features(noise=1.0)
    mean, plain = features.double().mean(0), cosines(gram(features), "plain")
    torch.testing.assert_close(plain, torch.nn.functional.cosine_similarity(mean[:, None], mean[None], dim=2))
    assert (plain - expected).abs().max() > 0.1
    assert (cosines(gram(features), "unbiased") - expected).abs().max() < 0.06


@pytest.mark.parametrize("estimator", ["plain", "unbiased"])
def test_matrices_are_symmetric_with_ones_on_the_diagonal_but_where_there_is_no_gradient(estimator):
    features, _ = noisy_features(noise=0.1)
    matrix = cosines(gram(features), estimator)
    assert torch.equal(matrix, matrix.T)
    assert (matrix.diagonal() == 1).all()
    features[:, 3] = 0
    missing = cosines(gram(features), estimator).isnan()
    assert missing[3].all()
    assert missing[:, 3].all()
    assert missing.sum() == 23
    noise = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]], [[1.0, 0.0]], [[-1.0, 0.1]]])
    assert cosines(gram(noise), estimator).isnan().all() == (estimator == "unbiased")


@pytest.mark.parametrize(
    ("estimator", "noise", "says_too_little"),
    [("plain", 1.0, False), ("unbiased", 1.0, False), ("plain", 3.0, True), ("unbiased", 1.5, True)],
)
def test_reliability_is_the_correlation_of_two_measurements_or_says_too_little(estimator, noise, says_too_little):
    upper = torch.ones(12, 12, dtype=torch.bool).triu_(1)
    pairs = []
    for seed in range(20):
        first, second = (gram(noisy_features(noise, seed=2 * seed + i, size=400)[0]) for i in (0, 1))
        matrices = torch.stack([cosines(products, estimator)[upper] for products in (first, second)])
        pairs.append((reliability([first], estimator), float(torch.corrcoef(matrices)[0, 1])))
    stated, measured = torch.tensor(pairs).mean(0).tolist()
    if says_too_little:
        assert 0.3 < stated < measured < 0.96
    else:
        assert 0.9 < measured < 0.995
        assert stated == pytest.approx(measured, abs=0.03)


# In one half the first two of three gradients agree, in the other the first and the last.
DIRECTIONS = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
CONTRADICTION = torch.stack([DIRECTIONS, DIRECTIONS, DIRECTIONS[[0, 2, 1]], DIRECTIONS[[0, 2, 1]]])


@pytest.mark.parametrize(
    ("features", "low", "high"),
    [(noisy_features(0.0)[0], 0.999, 1.001), (normals(4, 60, 3000), -0.15, 0.15), (CONTRADICTION, -1, -0.7)],
    ids=["no noise", "noise alone", "contradiction"],
)
def test_reliability_is_between_minus_one_and_one_and_unknown_for_two_timesteps(features, low, high):
    assert low <= reliability([gram(features)], "plain") <= high
    assert torch.tensor(reliability([gram(features[:, :2])], "plain")).isnan()


def test_several_checkpoints_are_more_reliable_than_one():
    many = [gram(noisy_features(noise=3.0, seed=seed, size=400)[0]) for seed in range(10)]
    single = torch.tensor([reliability([products], "plain") for products in many]).mean()
    assert reliability(many, "plain") > single + 0.05
