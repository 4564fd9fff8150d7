"""A plain diffusers training loop, with clustered and balanced timesteps added in the four lines marked `# +`.

python train_minimal.py --max_train_steps 200
"""

import argparse

import torch
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits

from diffusers_dtr import ClusteredLoss, cluster_timesteps
from diffusers_dtr.objective import BALANCINGS
from diffusers_dtr.ranges import COUNT, SEED


def main(max_train_steps=200, batch_size=64, balancing="uncertainty", seed=0):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1  # (1797, 1, 8, 8) in [-1, 1]

    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    noise_scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    clusters = cluster_timesteps(noise_scheduler, num_clusters=8, cost="snr")  # +
    loss_fn = ClusteredLoss(noise_scheduler, clusters, weighting="min_snr", balancing=balancing)  # +
    optimizer = torch.optim.AdamW([{"params": model.parameters()}, *loss_fn.parameter_groups()], lr=1e-3)  # +

    for step in range(max_train_steps):
        clean = images[torch.randint(len(images), (batch_size,), generator=generator)]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = clusters.sample(batch_size, generator=generator)  # + (was torch.randint)
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)

        out = loss_fn(model(noisy, timesteps).sample, clean, noise, timesteps)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

        if (step + 1) % 50 == 0 or step == 0:
            per_cluster = " ".join(f"{loss:.3f}" for loss in out.per_cluster)
            weights = " ".join(f"{weight:.2f}" for weight in loss_fn.cluster_weights())
            print(f"step {step + 1}: loss per cluster {per_cluster} | weights {weights}")
    return model, loss_fn


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_train_steps", type=COUNT, default=200)
    parser.add_argument("--batch_size", type=COUNT, default=64)
    parser.add_argument("--balancing", choices=BALANCINGS, default="uncertainty")
    parser.add_argument("--seed", type=SEED, default=0)
    main(**vars(parser.parse_args()))
