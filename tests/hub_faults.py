"""What goes wrong with the test Hub, on demand."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hub_repositories import Reply


if TYPE_CHECKING:
    from hub_server import Exchange


@dataclass(kw_only=True)
class Fault:
    """Something that goes wrong for the next `times` requests whose method and path match (regular expressions)."""

    method: str
    path: str
    times: int = 1

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and bool(re.fullmatch(self.method, method) and re.search(self.path, path))

    def play(self, exchange: Exchange) -> None:
        """Do instead of `exchange.send(exchange.answer(exchange.read()))` what this fault is about."""
        raise NotImplementedError


@dataclass(kw_only=True)
class AnswerStatus(Fault):
    """The request is not served: `status` comes back, with a `Retry-After` in seconds if one is given."""

    status: int
    retry_after: int | None = None

    def play(self, exchange: Exchange) -> None:
        exchange.read()
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        exchange.send(Reply.json({"error": f"injected {self.status}"}, self.status, headers))


@dataclass(kw_only=True)
class CutUpload(Fault):
    """The connection ends once `after` bytes of the request's body have arrived; nothing is stored."""

    after: int

    def play(self, exchange: Exchange) -> None:
        exchange.read(self.after)
        exchange.cut()


@dataclass(kw_only=True)
class LoseAnswer(Fault):
    """The request is served and takes effect, but the connection ends before its answer."""

    def play(self, exchange: Exchange) -> None:
        exchange.answer(exchange.read())
        exchange.cut()


@dataclass(kw_only=True)
class NeverAnswer(Fault):
    """The request is read, and nothing comes back until the client gives up."""

    def play(self, exchange: Exchange) -> None:
        exchange.read()
        exchange.rfile.read(1)
        exchange.cut()
