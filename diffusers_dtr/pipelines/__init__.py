"""Pipelines that sample from routed denoisers."""
