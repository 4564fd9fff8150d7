"""The published sizes of DiT (arXiv 2212.09748, Table 1) as config values."""

_SIZES = {
    "S": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},
    "B": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},
    "L": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},
    "XL": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},
}

# 256x256 ImageNet in the latent space of Stable Diffusion's VAE, with a learned variance.
_IMAGENET = {"in_channels": 4, "out_channels": 8, "sample_size": 32, "num_embeds_ada_norm": 1000}

# Where the original code differs from diffusers' defaults.
_ORIGINAL = {"norm_eps": 1e-6, "freq_shift": 0}

DIT_PRESETS = {
    f"DiT-{name}/{patch_size}": {**_IMAGENET, **_ORIGINAL, **size, "patch_size": patch_size}
    for name, size in _SIZES.items()
    for patch_size in (2, 4, 8)
}
