import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dtr.analysis.gradient_projections import CountSketch, exact_blocks


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sketch(gradients, size, seed=0):
    return CountSketch(gradients, size, seed)(gradients)


def structured_gradients(count):
    """Gradients as layers have them: sums of outer products, with channels a hundred times the others, and sparse.

    They share a part each with the next ones, so that their cosines cover [0, 1].
    """
    rows = normals(count, 128) * torch.where(torch.arange(128) % 32 == 0, 10.0, 1.0)
    columns = normals(count, 256, seed=1) * torch.where(torch.arange(256) == 64, 10.0, 1.0)
    matrices = torch.einsum("tr,tc->trc", rows, columns)
    sparse = normals(count, 50_000, seed=2) * (normals(count, 50_000, seed=3) > 2)
    own = torch.cat([matrices.flatten(1), sparse], dim=1)
    own = own / own.norm(dim=1, keepdim=True)
    return torch.stack([own[max(0, t - 10) : t + 1].sum(0) for t in range(count)])


def test_error_of_a_cosine_is_at_most_a_twentieth_with_99_percent_confidence():
    gradients = structured_gradients(150)
    projection = CountSketch({"weight": gradients[0]}, 8192, seed=0)
    sketched = torch.stack([projection({"weight": gradient}) for gradient in gradients])
    above = torch.ones(150, 150, dtype=torch.bool).triu_(1)
    units = [torch.nn.functional.normalize(rows.double()) for rows in (gradients, sketched)]
    exact, estimate = ((rows @ rows.T)[above] for rows in units)
    errors = (estimate - exact).abs()
    assert exact.min() < 0.05
    assert exact.max() > 0.8
    # Even less than a twentieth for gradients that are spread over enough coordinates: one standard error is 0.011.
    assert errors.quantile(0.99) <= 2.576 / 8192**0.5 * 1.1


def test_gradients_of_a_few_coordinates_of_a_small_parameter_are_no_worse():
    """Without copies, this is what errors are largest for: one collision in 39 coordinates of two flat gradients."""
    first = torch.zeros(64)
    first[:39] = 1 / 39**0.5
    second = first * torch.tensor([1.0, -1.0]).repeat(32)
    sketches = [CountSketch({"bias": first}, 8192, seed) for seed in range(1000)]
    errors = torch.stack([one({"bias": first}) @ one({"bias": second}) for one in sketches]) - first @ second
    assert (errors.abs() > 0.05).float().mean() <= 0.01


def test_sketch_is_linear_and_adds_up_over_parameters():
    shapes = {"matrix": torch.empty(300, 7), "bias": torch.empty(11)}
    projection = CountSketch(shapes, 128, seed=3)
    one, other = ({name: normals(*value.shape, seed=seed) for name, value in shapes.items()} for seed in (1, 2))
    both = {name: 2 * one[name] - other[name] for name in shapes}
    torch.testing.assert_close(projection(both), 2 * projection(one) - projection(other))
    alone = [sketch({name: one[name]}, 128, seed=3) for name in shapes]
    torch.testing.assert_close(projection(one), sum(alone))


def test_sketch_is_a_function_of_the_seed_and_the_parameters_name_in_single_precision():
    values = normals(1000)
    one = sketch({"query": values}, 100)
    assert torch.equal(sketch({"query": values}, 100), one)
    assert not torch.allclose(sketch({"query": values}, 100, seed=1), one)
    assert not torch.allclose(sketch({"key": values}, 100), one)
    half = values.bfloat16()
    torch.testing.assert_close(sketch({"query": half}, 8), sketch({"query": half.float()}, 8))


@pytest.mark.parametrize("size", [16384, 16385])
def test_largest_sketches_of_either_code_type_keep_norms(size):
    values = normals(200_000).abs()  # without random signs, these would pile up
    assert sketch({"weight": values}, size).square().sum() == pytest.approx(values.square().sum().item(), rel=0.05)


@pytest.mark.parametrize("size", [0, 2**30 + 1])
def test_sketch_sizes_out_of_range_are_refused(size):
    with pytest.raises(ValueError, match="`sketch_size` must be an integer in"):
        sketch({"weight": normals(3)}, size)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(1, 25))
def test_blocks_hold_every_coordinate_once_and_in_order(sizes, block_size):
    sizes = [*sizes, 1]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    gradients = {f"layer{i}": torch.arange(offsets[i], offsets[i + 1]) for i in range(len(sizes))}
    contents = [block(gradients) for block in exact_blocks(gradients, block_size)]
    assert torch.cat(contents).tolist() == list(range(sum(sizes)))
    assert all(len(content) == block_size for content in contents[:-1])
    assert 0 < len(contents[-1]) <= block_size
