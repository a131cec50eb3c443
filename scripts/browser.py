"""A headless Chromium, driven by the DevTools protocol over a pipe; and pictures of the page of a server."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 30.0
"""What an answer, or a condition on the page, is waited for."""


class BrowserError(Exception):
    """The browser refused, or what was waited for did not come."""


def find_chromium() -> str | None:
    """Return the program, None if there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """A page in a browser.

    Attributes:
        complaints: what it wrote to the console as an error or a warning, and exceptions that nobody caught.
        asked: the URLs that it asked for, in order.
    """

    def __init__(self, browser: "Browser", session: str, target: str) -> None:
        self._browser = browser
        self._session = session
        self._target = target
        self.complaints: list[str] = []
        self.asked: list[str] = []

    def call(self, method: str, **parameters: object) -> Any:
        """Call a method of the DevTools protocol and return its result."""
        return self._browser.call(method, self._session, **parameters)

    def look(self, width: int, height: int, *, dark: bool = False, scale: float = 1) -> None:
        """Choose a size in CSS pixels, device pixels for each, and what prefers-color-scheme says."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Go to a URL."""
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in JavaScript, of a promise what it comes to."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise BrowserError(f"{expression}: {result['exceptionDetails']['exception'].get('description')}")
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until an expression in JavaScript is true."""
        end = time.monotonic() + SECONDS
        while not self.evaluate(condition):
            if time.monotonic() > end:
                raise BrowserError(f"still not so: {condition}")
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press a key that has a name and no text."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def picture(self, *, whole: bool = True) -> bytes:
        """Return a PNG of the page, of all its height or as much as fits."""
        size = self.evaluate("({width: innerWidth, height: document.documentElement.scrollHeight})")
        clip = {"clip": {"x": 0, "y": 0, **size, "scale": 1}, "captureBeyondViewport": True} if whole else {}
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", **clip)["data"])

    def close(self) -> None:
        """Close the page."""
        self._browser.call("Target.closeTarget", targetId=self._target)

    def notice(self, method: str, parameters: dict[str, Any]) -> None:
        """Take note of an event."""
        if method == "Network.requestWillBeSent":
            self.asked.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(parameters["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(parameters["args"]))


class Browser:
    """A Chromium process, with a profile of its own that is removed afterwards."""

    def __init__(self, program: str, profile: str) -> None:
        (commands, self._to), (self._from, answers) = os.pipe(), os.pipe()
        # The browser reads commands from descriptor 3 and writes answers to 4, each ended by a NUL.
        given = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]
        arrange = f'exec 3<&{given[0]} 4>&{given[1]} {given[0]}<&- {given[1]}>&-; exec "$@"'
        options = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"]
        options += ["--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")
        self.process = subprocess.Popen(
            ["bash", "-c", arrange, "bash", program, *options],
            pass_fds=given,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (commands, answers, *given):
            os.close(end)
        self._pending = b""
        self._last = 0
        self._pages: dict[str, Page] = {}

    def call(self, method: str, session: str | None = None, **parameters: object) -> Any:
        """Call a method and return its result, taking note of the events that come meanwhile."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        os.write(self._to, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            if page := self._pages.get(answer.get("sessionId", "")):
                page.notice(answer["method"], answer["params"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            received = os.read(self._from, 1 << 20)
            if not received:
                raise BrowserError("the browser has ended")
            self._pending += received
        message, _, self._pending = self._pending.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def page(self) -> Page:
        """Open an empty page."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._pages[session] = page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        return page

    def close(self) -> None:
        """End the process."""
        os.close(self._to)
        try:
            self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._from)


@contextmanager
def browse(program: str) -> Iterator[Browser]:
    """Start a browser, and end it afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(program, profile)
        try:
            yield browser
        finally:
            browser.close()
