"""Training objectives over noise levels: weighting, clusters of timesteps, balancing."""
