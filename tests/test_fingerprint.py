import torch
from torch import nn

from diffusers_dtr.fingerprint import fingerprint


def test_fingerprint_tells_values_names_types_and_shapes_apart():
    values = torch.arange(6.0)
    variants = [
        [("a", values)],
        [("b", values)],
        [("a", values.view(2, 3))],
        [("a", values.bfloat16())],
        [("a", values.int())],
        [("a", values + 1e-6)],
        [("a", values), ("b", values)],
    ]
    assert len({fingerprint(variant) for variant in variants}) == len(variants)
    assert fingerprint([("a", torch.stack([values, values], 1)[:, 0])]) == fingerprint([("a", values)])
    assert fingerprint([("a", nn.Parameter(torch.tensor(1.0)))]) == fingerprint([("a", torch.tensor(1.0))])
