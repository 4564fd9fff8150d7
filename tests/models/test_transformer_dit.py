import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from tiny_dit import NUM_CLASSES, TIMESTEPS, inputs, output, routed_dit

from diffusers_dtr import DTRTransformer2DModel, random_routing_mask, routing_mask


REAL_TIMESTEPS = torch.tensor([-3.5, 700.25, 978.05, 1500.0], dtype=torch.float64)


# What is computed.


def layer_norm(x, eps):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()


def reference_block(block, x, conditioning, eps):
    """A DiT block after arXiv 2212.09748, Figure 3, written out."""
    modulation = F.linear(F.silu(conditioning), block.norm1.linear.weight, block.norm1.linear.bias)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].chunk(6, -1)

    normed = layer_norm(x, 1e-6) * (1 + scale1) + shift1
    projections = (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
    q, k, v = (projection(normed).unflatten(-1, (2, 8)).transpose(1, 2) for projection in projections)
    attended = (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
    x = x + gate1 * block.attn1.to_out[0](attended.transpose(1, 2).flatten(2))

    hidden = block.ff.net[0].proj(layer_norm(x, eps) * (1 + scale2) + shift2)
    return x + gate2 * block.ff.net[2](F.gelu(hidden, approximate="tanh"))


def reference_forward(model, hidden_states, timestep, class_labels, mask):
    """The routed model, block by block: Block(m ⊙ x) + (1 − m) ⊙ x."""
    height, width = hidden_states.shape[2] // 2, hidden_states.shape[3] // 2
    mask = mask[:, None].to(hidden_states.dtype)
    x = model.pos_embed(hidden_states)
    conditioning = model.emb(timestep, class_labels, hidden_dtype=x.dtype)
    for block in model.transformer_blocks:
        x = reference_block(block, mask * x, conditioning, model.config.norm_eps) + (1 - mask) * x
    shift, scale = model.proj_out_1(F.silu(conditioning))[:, None].chunk(2, -1)
    tokens = model.proj_out_2(layer_norm(x, 1e-6) * (1 + scale) + shift)
    image = tokens.new_empty(len(tokens), 8, 2 * height, 2 * width)
    for row in range(height):
        for column in range(width):
            patch = tokens[:, row * width + column].reshape(-1, 2, 2, 8).permute(0, 3, 1, 2)
            image[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patch
    return image


@pytest.mark.parametrize("timestep_range", [(0, 999), (0.0, 1.0)])
@pytest.mark.parametrize(("timestep", "size"), [(TIMESTEPS, (8, 8)), (REAL_TIMESTEPS, (4, 12))])
@pytest.mark.parametrize("routing_type", ["dtr", "random"])
def test_the_model_computes_the_routed_block_formula(routing_type, timestep, size, timestep_range):
    routing = {"routing_beta": 0.6, "routing_alpha": 2.0, "routing_seed": 3, "routing_timestep_range": timestep_range}
    model, arguments = routed_dit(routing_type=routing_type, **routing).double(), inputs(timestep, size)
    arguments["hidden_states"] = arguments["hidden_states"].double()
    if routing_type == "dtr":
        mask = routing_mask(timestep, 16, alpha=2.0, beta=0.6, timestep_range=timestep_range)
    else:
        mask = random_routing_mask(timestep, 16, seed=3, beta=0.6, timestep_range=timestep_range)
    with torch.no_grad():
        expected = reference_forward(model, **arguments, mask=mask)
    torch.testing.assert_close(output(model, **arguments), expected, rtol=1e-11, atol=1e-11)


def test_a_share_set_later_is_that_of_the_config_until_taken_back():
    model = routed_dit(routing_beta=0.8)
    configured = output(model)
    model.set_routing_beta(0.5)
    assert torch.equal(output(model), output(routed_dit(routing_beta=0.5)))
    assert model.config.routing_beta == 0.8
    model.set_routing_beta(None)
    assert torch.equal(output(model), configured)


@pytest.mark.parametrize("t", [978, 978.05])
def test_one_timestep_counts_for_the_whole_batch(t):
    model, batch = routed_dit(), inputs()
    expected = output(model, **{**batch, "timestep": torch.tensor([t] * 4)})
    for timestep in (t, torch.tensor(t), torch.tensor([t])):
        torch.testing.assert_close(output(model, **{**batch, "timestep": timestep}), expected)


def test_the_conditioning_is_embedded_once_per_forward():
    model, calls = routed_dit(), []
    model.emb.register_forward_hook(lambda *_: calls.append(1))
    output(model)
    assert len(calls) == 1


@torch.no_grad()
def test_return_dict_chooses_between_tuple_and_output():
    model = routed_dit()
    assert torch.equal(model(**inputs(), return_dict=False)[0], output(model))


# Labels.


def test_a_label_is_dropped_in_all_blocks_or_in_none():
    model = routed_dit(class_dropout_prob=0.5)
    batch = inputs(torch.full((64,), 500))
    conditional = output(model, **batch)
    unconditional = output(model, **{**batch, "class_labels": torch.full((64,), NUM_CLASSES)})
    torch.manual_seed(0)
    trained = output(model.train(), **batch)
    dropped = (trained == unconditional).flatten(1).all(1)
    kept = (trained == conditional).flatten(1).all(1)
    assert (dropped | kept).all()
    assert 16 < (dropped & ~kept).sum() < 48


def test_no_labels_mean_the_null_class_or_the_only_class():
    for model, label in ((routed_dit(), NUM_CLASSES), (routed_dit(num_embeds_ada_norm=1, class_dropout_prob=0.0), 0)):
        batch = inputs()
        expected = output(model, **{**batch, "class_labels": torch.full((4,), label)})
        assert torch.equal(output(model, **{**batch, "class_labels": None}), expected)


def test_without_label_dropout_there_is_no_null_class():
    model = routed_dit(class_dropout_prob=0.0)
    assert model.null_class is None
    assert model.emb.class_embedder.embedding_table.num_embeddings == NUM_CLASSES
    with pytest.raises(ValueError, match=r"`class_labels` must be given: the model has 5 classes and no null class"):
        output(model, **{**inputs(), "class_labels": None})
    batch = {**inputs(), "class_labels": torch.tensor([0, 1, 2, 3])}
    assert torch.equal(output(model.train(), **batch), output(model.eval(), **batch))


def test_an_unconditional_model_needs_no_labels():
    model = routed_dit(num_embeds_ada_norm=None)
    assert model.null_class is None
    assert model.emb.class_embedder is None
    assert output(model, **{**inputs(), "class_labels": None}).shape == (4, 8, 8, 8)
    with pytest.raises(ValueError, match="`class_labels` must be None"):
        output(model, **inputs())


def test_other_classes_keep_the_null_class():
    model = routed_dit().to(torch.bfloat16).train()
    null = model.emb.class_embedder.embedding_table.weight[-1].clone()
    model.replace_classes(3)
    table = model.emb.class_embedder.embedding_table.weight
    assert table.shape == (4, 16)
    assert table.dtype == torch.bfloat16
    assert torch.equal(table[-1], null)
    assert model.emb.class_embedder.training
    assert model.config.num_embeds_ada_norm == model.null_class == 3
    model.replace_classes(None)
    assert model.emb.class_embedder is None
    with pytest.raises(ValueError, match="`num_classes` must be at least 1, or None, got 0"):
        model.replace_classes(0)


def test_more_classes_keep_the_labels_and_embeddings_of_those_that_there_are():
    model = routed_dit()
    table, num_classes = model.emb.class_embedder.embedding_table.weight.clone(), model.config.num_embeds_ada_norm
    model.replace_classes(num_classes + 2, keep=True)
    new = model.emb.class_embedder.embedding_table.weight
    assert torch.equal(new[:num_classes], table[:num_classes])
    assert torch.equal(new[-1], table[-1])
    assert model.null_class == num_classes + 2
    with pytest.raises(ValueError, match=f"must be at least the {num_classes + 2} that are kept, got 2"):
        model.replace_classes(2, keep=True)


# Training.


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_inactive_channels_get_gradients_only_past_the_block(share):
    block = routed_dit(norm_elementwise_affine=True).transformer_blocks[0]
    x = torch.randn(2, 16, 16, requires_grad=True)
    mask = routing_mask(torch.tensor([0, 999]), 16, beta=share)[:, None]
    weight = torch.randn(2, 16, 16)
    (gradient,) = torch.autograd.grad((weight * block(x, torch.randn(2, 16), mask)).sum(), x)
    inactive = ~mask.expand_as(x)
    assert torch.equal(gradient[inactive], weight[inactive])
    assert not torch.isclose(gradient[~inactive], weight[~inactive]).any()


def test_initialisation_is_that_of_the_original_dit():
    torch.manual_seed(0)
    model = DTRTransformer2DModel(4, 32, num_layers=2, sample_size=8, num_embeds_ada_norm=100)
    width = 128

    def xavier(fan_in, fan_out):
        return math.sqrt(6 / (fan_in + fan_out))

    for block in model.transformer_blocks:
        assert not block.norm1.linear.weight.any()
        # One matrix in the original: its fan-out is that of query, key and value together.
        for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            assert_uniform(layer.weight, xavier(width, 3 * width))
        assert_uniform(block.attn1.to_out[0].weight, xavier(width, width))
        assert_uniform(block.ff.net[0].proj.weight, xavier(width, 4 * width))
        assert_uniform(block.ff.net[2].weight, xavier(4 * width, width))
    assert_uniform(model.pos_embed.proj.weight, xavier(4 * 2 * 2, width))
    assert not model.proj_out_1.weight.any()
    assert not model.proj_out_2.weight.any()
    assert not any(parameter.any() for name, parameter in model.named_parameters() if name.endswith(".bias"))
    timestep_embedder, table = model.emb.timestep_embedder, model.emb.class_embedder.embedding_table
    for weight in (timestep_embedder.linear_1.weight, timestep_embedder.linear_2.weight, table.weight):
        assert abs(weight.mean()) < 1e-3
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert weight.abs().max() > 0.05


def assert_uniform(weight, bound):
    assert 0.98 * bound < weight.abs().max() <= bound * (1 + 1e-6)
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_a_new_model_predicts_zero_and_its_blocks_are_the_identity():
    model = DTRTransformer2DModel(2, 8, num_layers=2, sample_size=8)
    tokens = torch.randn(4, 16, 16)
    mask = routing_mask(TIMESTEPS, 16)[:, None]
    assert torch.equal(model.transformer_blocks[1](tokens, torch.randn(4, 16), mask), tokens)
    assert not output(model).any()


# Compilation, precision, attention.


@pytest.mark.parametrize("config", [{}, {"routing_beta": 1.0}, {"num_embeds_ada_norm": None}])
def test_one_graph_serves_all_timesteps_without_labels(config):
    model = routed_dit(**config)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shift in (0.0, 0.05):
            batch = {**inputs(TIMESTEPS + shift), "class_labels": None}
            assert torch.equal(output(compiled, **batch), output(model, **batch))


@pytest.mark.parametrize("timestep", [TIMESTEPS, REAL_TIMESTEPS])
def test_half_precision_routes_the_same_channels(timestep):
    model, batch = routed_dit(), inputs(timestep)
    expected = output(model, **batch)
    half = output(model.bfloat16(), **{**batch, "hidden_states": batch["hidden_states"].bfloat16()})
    assert half.dtype == torch.bfloat16
    assert (half - expected).norm() < 0.05 * expected.norm()


def test_autocast_computes_the_same():
    model = routed_dit()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = output(model)
    assert (half - output(model)).norm() < 0.05 * output(model).norm()


def test_attention_processors_get_their_arguments():
    class Recorder(AttnProcessor):
        def __call__(self, *args, note, **kwargs):
            notes.append(note)
            return super().__call__(*args, **kwargs)

    notes, model = [], routed_dit()
    model.set_attn_processor(Recorder())
    output(model, **inputs(), cross_attention_kwargs={"note": 1})
    assert notes == [1, 1, 1]


# Config and errors.


def test_the_signature_is_the_base_class_with_additions():
    ours, theirs = (inspect.signature(cls).parameters for cls in (DTRTransformer2DModel, DiTTransformer2DModel))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs)


def test_output_channels_default_to_the_input_channels_in_the_config_too():
    model = routed_dit(out_channels=None)
    assert model.config.out_channels == model.out_channels == 4
    assert output(model).shape == (4, 4, 8, 8)


def test_everything_that_is_saved_is_a_parameter_and_routing_saves_nothing():
    expected = {name for name, _ in routed_dit().named_parameters()}
    for routing_type in ("dtr", "random", "none"):
        assert set(routed_dit(routing_type=routing_type).state_dict()) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"routing_beta": 0.0}, r"`routing_beta` must be a number in \(0, 1\], got 0\.0\."),
        ({"routing_beta": 0.05}, r"`routing_beta`=0\.05 leaves none of 16 channels active"),
        ({"routing_alpha": 0}, r"`routing_alpha` must be a number > 0, got 0\."),
        ({"routing_type": "window"}, r"`routing_type` must be one of dtr, random, none, got 'window'\."),
        ({"routing_seed": -1}, r"`routing_seed` must be an integer in .*, got -1\."),
        ({"routing_timestep_range": (1, 1)}, r"`routing_timestep_range` must be .*two different .* got \(1, 1\)\."),
        ({"norm_type": "ada_norm"}, r"`norm_type` must be \"ada_norm_zero\", got 'ada_norm'\."),
        ({"class_dropout_prob": 1.0}, r"`class_dropout_prob` must be in \[0, 1\), got 1\.0\."),
        ({"num_embeds_ada_norm": 0}, r"`num_embeds_ada_norm`.* must be >= 1 or None, got 0\."),
        ({"sample_size": 9}, r"`sample_size` must be a multiple of `patch_size`=2, got 9\."),
    ],
)
def test_a_config_that_describes_no_model_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        routed_dit(**config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timestep": None}, r"`timestep` must be given"),
        ({"timestep": torch.zeros(3)}, r"`timestep` must be .*\(batch,\) with batch = 4, got \(3,\)\."),
        ({"timestep": torch.zeros(4, 1)}, r"`timestep` must be .*\(batch,\) with batch = 4, got \(4, 1\)\."),
        ({"timestep": math.nan}, r"`timestep` must be a number everywhere, got NaN at index 0\."),
        ({"hidden_states": torch.zeros(4, 4, 8, 7)}, r"multiples of `patch_size`=2, got 8x7\."),
    ],
)
def test_inputs_that_cannot_be_denoised_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        output(routed_dit(), **{**inputs(), **arguments})
