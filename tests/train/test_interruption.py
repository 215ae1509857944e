import os
import signal

import pytest

from fastlm.train import interruption
from fastlm.train.interruption import Interruption


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
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
