"""Signals as a polite request: finish the step, save, leave."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_ECHO = 1.0  # torchrun passes on a Ctrl-C that the terminal already sent to every process


class Interruption:
    """While entered, SIGINT, SIGTERM and SIGUSR1 set `requested` to their name; a second SIGINT interrupts at once.

    Does nothing in a thread other than the main one, where Python allows no handlers.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
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
