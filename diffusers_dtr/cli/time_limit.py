"""How long a command waits for a Hub that does not answer: the client itself would wait forever."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from huggingface_hub import get_session, set_client_factory
from huggingface_hub.errors import HTTPError


_ADVICE = "Try again later, or give `--timeout` more seconds."


@contextmanager
def waiting_at_most(seconds: float) -> Iterator[None]:
    """Give up on a request that has no answer after this time, retries included. Transfers may take longer."""
    session, patience = get_session(), _Patience(seconds)
    hooks = session.event_hooks
    limited = {"request": [*hooks["request"], patience.asked], "response": [*hooks["response"], patience.answered]}
    # The client's own transport, of which there have been several packages.
    client = partial(type(session), follow_redirects=True, timeout=None)
    set_client_factory(partial(client, event_hooks=limited))
    try:
        yield
    except Exception as error:  # a timeout may be wrapped in any class of the client's; others are raised again
        cause: BaseException | None = error
        while cause is not None:
            # The transport's class for it is not always of one package.
            if isinstance(cause, HTTPError) and "Timeout" in type(cause).__name__:
                raise TimeoutError(f"The Hub has not answered in time. {_ADVICE} ({error})") from error
            cause = cause.__cause__ or cause.__context__
        raise
    finally:
        set_client_factory(partial(client, event_hooks=hooks))


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
        if left <= 0:  # Python's own error is not one that the client tries again after
            host = f"{request.url.scheme}://{request.url.netloc.decode()}"
            raise TimeoutError(f"{host} has not answered for {self.seconds:g} s. {_ADVICE}")
        # Some calls ask for no limit, and some for a shorter one.
        limits = request.extensions["timeout"]
        request.extensions["timeout"] = {kind: min(left, limit or left) for kind, limit in limits.items()}

    def answered(self, response: Any) -> None:
        self.waiting.pop((response.request.method, str(response.request.url)), None)
