import os
import signal

import pytest

from fastlm.train import interruption
from fastlm.train.interruption import Interruption

pytestmark = pytest.mark.usefixtures("obeyed_signals")

SIGNALS = ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"]


@pytest.mark.parametrize("name", SIGNALS)
def test_signal_that_is_ignored_stays_ignored(name):
    number = getattr(signal, name)
    handler = signal.signal(number, signal.SIG_IGN)
    try:
        with Interruption() as asked:
            os.kill(os.getpid(), number)
            assert asked.requested is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, handler)


def test_handler_that_python_did_not_set_is_left_alone(monkeypatch):
    foreign = {signal.SIGUSR1: None}
    getsignal = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: foreign.get(number, getsignal(number)))
    before = getsignal(signal.SIGUSR1)
    with Interruption():
        assert getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize("name", SIGNALS)
def test_interruption_notes_the_signal_and_puts_the_handlers_back(name):
    number = getattr(signal, name)
    handler = signal.getsignal(number)
    with Interruption() as asked:
        assert asked.requested is None
        os.kill(os.getpid(), number)
        assert asked.requested == name
    assert signal.getsignal(number) is handler


def test_second_ctrl_c_interrupts_at_once(monkeypatch):
    monkeypatch.setattr(interruption, "_ECHO", 0.0)
    with Interruption() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_passed_on_by_torchrun_counts_once():
    with Interruption() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.requested == "SIGINT"
