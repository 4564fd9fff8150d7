"""Denoising Task Routing and clustered, balanced timesteps for 🤗 diffusers."""

__version__ = "0.1.0"
