"""Signals let a step finish, and are what they were afterwards."""

import os
import signal
import threading

import pytest

from diffusers_dtr.training import interruption
from diffusers_dtr.training.interruption import Interruption


@pytest.fixture(autouse=True)
def _signals_as_a_terminal_has_them():
    """A runner in the background may ignore some."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {signum: signal.signal(signum, handler) for signum, handler in defaults.items()}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_is_remembered_and_said(signum, capfd):
    before = signal.getsignal(signum)
    with Interruption() as stop:
        assert stop.received() is None
        send(signum)
        assert stop.received() == signum
    assert signal.getsignal(signum) is before
    assert f"{signum.name}: finishing this step, then saving" in capfd.readouterr().err


def test_second_interrupt_stops_at_once_unless_it_is_one_that_a_launcher_repeats(monkeypatch):
    with Interruption() as stop:
        send(signal.SIGINT)
        send(signal.SIGINT)
        assert stop.received() == signal.SIGINT
        monkeypatch.setattr(interruption, "_SAME_CTRL_C", 0.0)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_termination_that_is_repeated_still_lets_the_step_finish(monkeypatch):
    monkeypatch.setattr(interruption, "_SAME_CTRL_C", 0.0)
    with Interruption() as stop:
        for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            send(signum)
        assert stop.received() == signal.SIGTERM


def test_what_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the fixture puts it back
    with Interruption() as stop:
        send(signal.SIGHUP)
        assert stop.received() is None
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_threads_other_than_the_main_one_change_no_signals():
    received = []

    def enter():
        with Interruption() as stop:
            received.append(stop.received())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert received == [None]
