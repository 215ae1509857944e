"""A page in a headless Chromium, spoken to over a pipe by its own protocol: no driver and no port are needed.

https://chromedevtools.github.io/devtools-protocol
"""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
ARGUMENTS += ["--no-first-run", "--disable-background-networking", "--disable-extensions", "--hide-scrollbars"]


class Page:
    """A tab: what was requested and what went wrong in it since it was opened."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._unread, self._last_id, self._is_loaded = b"", 0, False
        self._session: str | None = None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in "Page", "Network", "Runtime", "Log":
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol; events that come before it are noted."""
        self._last_id += 1
        command = {"id": self._last_id, "method": method, "params": parameters}
        command |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while (message := self._read()).get("id") != self._last_id:
            self._note(message)
        assert "error" not in message, f"{method}: {message['error']}"
        return message["result"]

    def open(self, url: str) -> None:
        self.requests.clear()
        self.complaints.clear()
        self._is_loaded = False
        self.call("Page.navigate", url=url)
        while not self._is_loaded:
            self._note(self._read())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON has it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path, width: int = 1280) -> None:
        height = self.evaluate("document.documentElement.scrollHeight")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            received = os.read(self._answers, 1 << 20)
            assert received, "Chromium ended"
            self._unread += received
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._is_loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(parameters))


@contextlib.contextmanager
def open_page() -> Iterator[Page]:
    """A blank page of a browser that ends with the block."""
    assert PROGRAM is not None
    command_in, command_out = os.pipe()
    answer_in, answer_out = os.pipe()
    high = [
        fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 10) for number in (command_in, answer_out)
    ]  # 3 and 4 may be taken
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = os.posix_spawn(
            PROGRAM,
            [PROGRAM, *ARGUMENTS, f"--user-data-dir={profile}"],
            os.environ | {"HOME": profile},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, high[0], 3),
                (os.POSIX_SPAWN_DUP2, high[1], 4),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),  # it complains that there is no desktop
            ],
            setpgroup=0,
        )
        for number in (command_in, answer_out, *high):
            os.close(number)
        try:
            yield Page(command_out, answer_in)
        finally:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            os.close(command_out)
            os.close(answer_in)
