"""Denoisers whose residual blocks are routed, as subclasses of diffusers' models."""
