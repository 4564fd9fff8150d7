"""Optional dependencies: errors that name the extra that installs them."""

from __future__ import annotations

from importlib import import_module


def require(package: str, extra: str, purpose: str) -> None:
    """Import an optional dependency, or say how to install it.

    Args:
        package: Its name.
        extra: The extra of this package that brings it.
        purpose: What needs it, in the plural, at the beginning of a sentence.

    Raises:
        ImportError: Without it.
    """
    try:
        import_module(package)
    except ImportError as error:
        raise ImportError(f'{purpose} need {package}: pip install "diffusers-dtr[{extra}]".') from error
