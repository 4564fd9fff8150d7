"""A process that dies at every moment at which it changes the file system."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch


_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def die_before_every_change(action: Callable[[], None], inspect: Callable[[], None]) -> int:
    """Runs an action in child processes, each of which ends, as by SIGKILL, before its n-th change to the file system.

    Emptying a file is such a change, and so is what comes after it: writing to the file. The action begins with what
    earlier children left behind; `inspect` is called in this process after every death. Returns the number of deaths.
    """
    deaths = 0
    while not _survives(action, deaths):
        deaths += 1
        inspect()
        assert deaths < 1000
    return deaths


def _survives(action: Callable[[], None], changes: int) -> bool:
    child = os.fork()
    if child == 0:
        left = changes

        def die(event: str, arguments: tuple) -> None:
            nonlocal left
            is_open = event == "open" and arguments[2]
            # A file that is opened to be written anew is emptied, after the event: a change of its own.
            empties = is_open and arguments[2] & os.O_TRUNC and os.path.exists(arguments[0])
            if (is_open and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or event in _CHANGES:
                if left == 0:
                    os._exit(9)
                left -= 1
            if empties:
                if left == 0:
                    os.truncate(arguments[0], 0)
                    os._exit(9)
                left -= 1

        status = 1
        try:
            torch.set_num_threads(1)  # a fork has none of its parent's threads
            sys.addaudithook(die)
            action()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9), "the action failed by itself"
    return code == 0
