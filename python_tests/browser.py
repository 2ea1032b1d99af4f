# SPDX-License-Identifier: Apache-2.0
"""A real browser for tests of pages: headless Chromium, spoken to in the W3C WebDriver protocol."""

import base64
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key of element references
KEYS = {"left": "\ue012", "right": "\ue014", "tab": "\ue004", "space": " ", "home": "\ue011", "end": "\ue010"}


def missing() -> str | None:
    """Why there is no browser here, or None where there is one."""
    lacking = [name for name in ("chromedriver", "chromium") if shutil.which(name) is None]
    return f"no {' and no '.join(lacking)} (Debian: chromium, chromium-driver)" if lacking else None


class Browser:
    """One window; ``errors`` are its console's."""

    def __init__(self, port: int) -> None:
        self._direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._url = f"http://127.0.0.1:{port}/session"
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1000,760",
        ]
        options = {"binary": shutil.which("chromium"), "args": [*arguments, "--host-resolver-rules=MAP * ~NOTFOUND"]}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._call("", {"capabilities": {"alwaysMatch": capabilities}})
        self._url += f"/{session['sessionId']}"

    def _call(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with self._direct.open(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"].splitlines()[0]) from error

    def open(self, url: str) -> None:
        self._call("/url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """The body of a function, with its arguments in ``arguments``."""
        return self._call("/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector: str) -> dict[str, str]:
        return self._call("/element", {"using": "css selector", "value": selector})

    def text(self, selector: str) -> str:
        return self._call(f"/element/{self.find(selector)[ELEMENT]}/text")

    def click(self, selector: str) -> None:
        self._call(f"/element/{self.find(selector)[ELEMENT]}/click", {})

    def press(self, selector: str, *keys: str) -> None:
        """Focus the element and type."""
        self._call(f"/element/{self.find(selector)[ELEMENT]}/value", {"text": "".join(KEYS[key] for key in keys)})

    def press_keys(self, *keys: str) -> None:
        """Type into whatever has the focus."""
        strokes = [{"type": kind, "value": KEYS[key]} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def hover(self, selector: str) -> None:
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": self.find(selector)}
        self._call("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def screenshot(self) -> bytes:
        return base64.b64decode(self._call("/screenshot"))

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self._call("/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]

    def close(self) -> None:
        self._call("", method="DELETE")


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser of our own, ended afterwards."""
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert driver.stdout is not None
        port = next(
            int(found.group(1)) for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line))
        )
        browser = Browser(port)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        driver.terminate()
        driver.wait(20)
        if driver.stdout is not None:
            driver.stdout.close()
