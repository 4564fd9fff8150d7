"""Pushing a run's folder, a model or a pipeline to the Hub."""

from .pushing import create_run_repo, push_run


__all__ = ["create_run_repo", "push_run"]
