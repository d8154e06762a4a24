"""Headless Chromium, driven over a pipe by its DevTools protocol."""

import json
import os
import shutil
import subprocess
import time
from base64 import b64decode
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def data_of(path: Path) -> dict:
    """What the page of a report shows."""
    text = path.read_text(encoding="utf-8").split('id="data">')[1]
    return json.loads(text[: text.index("</script>")])


class Page:
    """One page. complaints: errors of its scripts and its console, and every address that it asks for."""

    def __init__(self, path: Path, folder: Path) -> None:
        mine, theirs = os.pipe(), os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        # it reads file 3 and writes file 4
        words = ["bash", "-c", f'exec "$@" 3<&{mine[0]} 4>&{theirs[1]}', "-", str(CHROMIUM), *flags, "about:blank"]
        self._process = subprocess.Popen(words, pass_fds=(mine[0], theirs[1]), stderr=subprocess.DEVNULL)
        self._out, self._in = os.fdopen(mine[1], "wb", buffering=0), os.fdopen(theirs[0], "rb")
        for end in (mine[0], theirs[1]):
            os.close(end)
        self.complaints, self.loaded, self._count, self._session, self._read = [], [], 0, None, b""
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Page.navigate", url=path.resolve().as_uri())
        while self.run("document.readyState") != "complete" or self.run("location.href") == "about:blank":
            time.sleep(0.05)

    def send(self, method: str, **given):
        """The result of a command; what happens meanwhile is noted."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": given}
        message |= {"sessionId": self._session} if self._session else {}
        self._out.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            match answer.get("method"):
                case "Runtime.exceptionThrown" | "Log.entryAdded" | "Runtime.consoleAPICalled":
                    self.complaints.append(answer["params"])
                case "Network.requestWillBeSent":
                    self.loaded.append(answer["params"]["request"]["url"])
        assert "result" in answer, answer
        return answer["result"]

    def _next(self):
        while b"\0" not in self._read:
            part = self._in.read1(1 << 16)
            assert part, "the browser is gone"
            self._read += part
        text, _, self._read = self._read.partition(b"\0")
        return json.loads(text)

    def run(self, script: str):
        """The value of an expression in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def give(self, control: str, value: object) -> None:
        """As a user changes a control, by its id."""
        self.run(
            f"{{const box = document.getElementById({json.dumps(control)}); box.value = {json.dumps(str(value))};"
            "box.dispatchEvent(new Event('input')); box.dispatchEvent(new Event('change'))}"
        )

    def look(self, width: int, dark: bool = False, height: int = 900) -> None:
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=theme)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def picture(self, path: Path) -> None:
        path.write_bytes(b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._out.close()
        self._in.close()
