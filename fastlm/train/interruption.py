"""Signals as a polite request: finish the step, save, leave."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
_ECHO = 1.0  # torchrun passes on a Ctrl-C that the terminal already sent to every process


class Interruption:
    """While entered, SIGINT, SIGTERM, SIGUSR1 and SIGHUP set `requested` to their name; a second SIGINT interrupts.

    A signal that this process was started to ignore, as by nohup, stays ignored. Does nothing in a thread other than
    the main one, where Python allows no handlers.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in SIGNALS):
                # None is a handler that is not Python's, which could not be put back
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and number == signal.SIGINT and now - self._first > _ECHO:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._first = signal.Signals(number).name, now
