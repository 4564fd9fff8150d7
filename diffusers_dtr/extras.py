"""Optional dependencies: errors that name the extra that installs them."""

from __future__ import annotations

from importlib import import_module


def require(package: str, extra: str, purpose: str) -> None:
    """Import an optional dependency; `purpose`, in the plural, begins the ImportError that names its extra."""
    try:
        import_module(package)
    except ImportError as error:
        raise ImportError(f'{purpose} need {package}: pip install "diffusers-dtr[{extra}]".') from error
