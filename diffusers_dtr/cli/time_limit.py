"""How long a command waits for a Hub that does not answer: the client itself would wait forever."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import get_session, set_client_factory
from huggingface_hub.errors import HTTPError


class NoAnswerError(OSError):
    """The Hub has not answered for as long as it may take. Nothing tries again after it."""


@contextmanager
def waiting_at_most(seconds: float) -> Iterator[None]:
    """Give up on a request that has no answer after this time, retries included. Transfers may take longer."""
    session, patience = get_session(), _Patience(seconds)
    before, after = session.event_hooks.get("request", ()), session.event_hooks.get("response", ())

    def client(timeout: float | None, request: list, response: list) -> Any:
        # The client's own transport, of which there have been several packages.
        hooks = {"request": request, "response": response}
        return type(session)(event_hooks=hooks, follow_redirects=True, timeout=timeout)

    set_client_factory(lambda: client(seconds, [*before, patience.asked], [*after, patience.answered]))
    try:
        yield
    except Exception as error:
        if _is_timeout(error):
            raise NoAnswerError(
                f"The Hub has not answered in time. Try again later, or give `--timeout` more seconds. ({error})"
            ) from error
        raise
    finally:
        set_client_factory(lambda: client(None, [*before], [*after]))


def _is_timeout(error: BaseException | None) -> bool:
    while error is not None:
        # The transport's class for it is not always of one package.
        if isinstance(error, HTTPError) and "Timeout" in type(error).__name__:
            return True
        error = error.__cause__ or error.__context__
    return False


class _Patience:
    def __init__(self, seconds: float):
        self.seconds = seconds
        # When each request was made first that has no answer yet.
        self.waiting: dict[tuple[str, str], float] = {}

    def asked(self, request: Any) -> None:
        now = time.monotonic()
        # The answer to an upload comes after it.
        since = now if request.method == "PUT" else self.waiting.setdefault((request.method, str(request.url)), now)
        left = since + self.seconds - now
        if left <= 0:
            raise NoAnswerError(
                f"{request.url.scheme}://{request.url.netloc.decode()} has not answered for {self.seconds:g} s. Try "
                "again later, or give `--timeout` more seconds."
            )
        # Some calls ask for no limit, and some for a shorter one.
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            wait: left if limits.get(wait) is None else min(left, limits[wait])
            for wait in ("connect", "read", "write", "pool")
        }

    def answered(self, response: Any) -> None:
        self.waiting.pop((response.request.method, str(response.request.url)), None)
