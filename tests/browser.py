"""A page in headless Chromium, over the DevTools protocol, which a test reads and drives through two pipes."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""Path of the browser; None if no Chromium is installed."""
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
PATIENCE = 240
"""Seconds to wait for an answer."""
LEFT = "Inspected target navigated or closed"
"""Chromium's answer if the page was left during an evaluation."""


class Page:
    """One page. Messages on its console, exceptions and requests are collected while it is open."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        """Errors and warnings on the console, exceptions, and what the security policy refused."""
        self.requests: list[str] = []
        """Addresses of all requests, but not data URLs."""
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        there, self._write = os.pipe()
        self._read, back = os.pipe()
        assert CHROMIUM is not None
        # The browser reads commands from file descriptor 3 and answers on 4.
        start = f'exec "$@" 3<&{there} 4>&{back}'
        options = [*QUIET, f"--user-data-dir={self._profile.name}", "--remote-debugging-pipe"]
        self._browser = subprocess.Popen(
            ["bash", "-c", start, "bash", CHROMIUM, *options], pass_fds=(there, back), stderr=subprocess.DEVNULL
        )
        os.close(there)
        os.close(back)
        self._rest, self._number, self._session = b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_error: object) -> None:
        self._browser.terminate()
        self._browser.wait(timeout=300)
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def open(self, place: Path | str, *, dark: bool = False, width: int = 1280, height: int = 900) -> None:
        """Opens a file or address in a window of this size, dark or light, and waits until it is loaded."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.prefer("dark" if dark else "light")
        self.call("Page.navigate", url=place if isinstance(place, str) else place.absolute().as_uri())
        self.wait_for("document.readyState == 'complete'")

    def prefer(self, scheme: str) -> None:
        """Sets the colour scheme that the browser prefers."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Waits until a JavaScript expression is true, on this page or on the next that a link or address opens."""
        end = time.monotonic() + PATIENCE
        while not self._is_true(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.05)

    def _is_true(self, expression: str) -> bool:
        """False also while one page gives way to the next, which can end an evaluation."""
        try:
            return bool(self.evaluate(expression))
        except AssertionError as error:
            if LEFT in str(error):
                return False
            raise

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        """Writes a PNG of the window, or of the whole page."""
        options: dict[str, Any] = {"format": "png"}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            options |= {"captureBeyondViewport": True, "clip": {**size, "scale": 1}}
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **options)["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the DevTools protocol and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], PATIENCE)
            part = os.read(self._read, 1 << 20) if ready else b""
            assert part, "the browser does not answer"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.errors.append(str(parameters["args"]))
            case "Runtime.exceptionThrown":
                self.errors.append(str(parameters["exceptionDetails"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.errors.append(str(parameters["entry"]))
            case "Network.requestWillBeSent" if not parameters["request"]["url"].startswith("data:"):
                self.requests.append(parameters["request"]["url"])
