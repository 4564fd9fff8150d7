"""Features of 8x8 digits for Fréchet distances: how a classifier tells every two of them apart."""

from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC


@cache
def _classifier():
    scans = load_digits()
    # In units of the scans' 16 grey levels, as in scikit-learn's digits example.
    return SVC(gamma=0.001, C=10, decision_function_shape="ovo").fit(scans.data, scans.target)


def digit_margins(images):
    """For `--feature_extractor digit_features:digit_margins`.

    Args:
        images: `(n, 1, 8, 8)` in [0, 1].

    Returns:
        float64 `(n, 45)`: the signed margin of each pair of digits.
    """
    return torch.from_numpy(_classifier().decision_function(images.flatten(1).cpu().numpy() * 16))
