"""Push to the Hub, once and whole, and notice what was damaged on the way back."""

from .background import BackgroundPush, PushReport
from .run import create_run_repo, push_run


__all__ = [
    "BackgroundPush",
    "PushReport",
    "create_run_repo",
    "push_run",
]
