"""A page in a real browser: headless Chromium over its debugging protocol, with nothing but tornado to talk to it."""
import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

from tornado.websocket import websocket_connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    "One tab; `told` gathers what the page complained of and what it asked the network for."

    def __init__(self, socket):
        self.socket, self.count, self.told = socket, 0, []

    async def call(self, method: str, **params) -> dict:
        self.count += 1
        await self.socket.write_message(json.dumps({"id": self.count, "method": method, "params": params}))
        while True:
            message = json.loads(await self.socket.read_message())
            self.listen(message)
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]

    def listen(self, message: dict) -> None:
        method, params = message.get("method", ""), message.get("params", {})
        if method == "Runtime.exceptionThrown" or (method == "Log.entryAdded" and params["entry"]["level"] == "error"):
            self.told.append(str(params))
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.told.append(str(params))
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("data:", "file:")):
            self.told.append("asked for " + params["request"]["url"])

    async def open(self, path: Path, width: int = 1280, dark: bool = False) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=900 if width > 600 else 844, deviceScaleFactor=1, mobile=width < 600)
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        await self.call("Page.navigate", url=path.resolve().as_uri())
        for _ in range(200):
            if await self.value("document.readyState") == "complete" and await self.value("location.href") != "about:blank":
                return
            await asyncio.sleep(0.05)
        raise TimeoutError(f"{path} did not load")

    async def value(self, script: str):
        return (await self.call("Runtime.evaluate", expression=script, returnByValue=True))["result"].get("value")

    async def screenshot(self, path: Path, whole: bool = False) -> None:
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=whole, **({} if not whole else {"clip": await self.whole()}))
        path.write_bytes(base64.b64decode(shot["data"]))

    async def whole(self) -> dict:
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}

    async def pdf(self, path: Path) -> None:
        path.write_bytes(base64.b64decode((await self.call("Page.printToPDF", preferCSSPageSize=True))["data"]))


@contextlib.asynccontextmanager
async def browser(program: str) -> AsyncIterator[Page]:
    "A fresh browser with an empty profile, ended at the end."
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars", "--remote-debugging-port=0", f"--user-data-dir={home}", "about:blank"]
        process = subprocess.Popen([program, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = await _port(Path(home) / "DevToolsActivePort", process)
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}/json", timeout=20) as answer:
                tab = next(t for t in json.load(answer) if t["type"] == "page")
            socket = await websocket_connect(tab["webSocketDebuggerUrl"], max_message_size=2**28)
            yield Page(socket)
            socket.close()
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _port(file: Path, process: subprocess.Popen) -> str:
    for _ in range(600):
        if file.is_file() and (lines := file.read_text().split()):
            return lines[0]
        assert process.poll() is None, f"the browser ended with {process.returncode}"
        await asyncio.sleep(0.1)
    raise TimeoutError("the browser did not open its port")
