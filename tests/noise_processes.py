"""Schedulers of diffusers by their short names, and one of every kind of noise process."""

import diffusers
import pytest
import torch

from diffusers_dtr.noise_levels import NoiseLevels


T = 1000


def make(name, **config):
    return getattr(diffusers, f"{name}Scheduler")(**config)


def noise_pair(batch, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 3, 4, 4, generator=generator, dtype=dtype) for _ in range(2))


PROCESSES = {
    **{f"ddpm-{kind}": ("DDPM", {"prediction_type": kind}) for kind in ("epsilon", "sample", "v_prediction")},
    **{f"euler-{kind}": ("EulerDiscrete", {"prediction_type": kind}) for kind in ("epsilon", "v_prediction")},
    **{f"edm-{kind}": ("EDMEuler", {"prediction_type": kind}) for kind in ("epsilon", "v_prediction")},
    "continuous": ("EulerDiscrete", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    "flow": ("FlowMatchEulerDiscrete", {}),
    "flow-epsilon": ("UniPCMultistep", {"use_flow_sigmas": True, "prediction_type": "epsilon"}),
    "zero-snr-epsilon": ("DDPM", {"rescale_betas_zero_snr": True}),
    "zero-snr-v": ("DDPM", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
}
LEVELS = {key: NoiseLevels(make(name, **config)) for key, (name, config) in PROCESSES.items()}
every_process = pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS.keys())
