"""Open a page in headless Chromium over its debugging protocol; tornado carries the messages."""
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
    "Return the path of a Chromium, None without one."
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    "One tab; `complaints` gathers its errors and warnings, and what it asks the network for."

    def __init__(self, socket):
        self.socket, self.count, self.complaints = socket, 0, []

    async def call(self, method: str, **params) -> dict:
        "Send a command of the DevTools protocol; return its result."
        self.count += 1
        await self.socket.write_message(json.dumps({"id": self.count, "method": method, "params": params}))
        while True:
            message = json.loads(await self.socket.read_message())
            self.note(message)
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]

    def note(self, message: dict) -> None:
        "Keep what the page complains of."
        method, params = message.get("method", ""), message.get("params", {})
        error = method == "Log.entryAdded" and params["entry"]["level"] == "error"
        if error or method == "Runtime.exceptionThrown":
            self.complaints.append(str(params))
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(params))
        url = params.get("request", {}).get("url", "data:")
        if method == "Network.requestWillBeSent" and not url.startswith(("data:", "file:")):
            self.complaints.append(f"asked for {url}")

    async def open(self, path: Path, width: int = 1280, dark: bool = False) -> None:
        "Load the page at `path` in a window of `width` pixels, in the light or the dark theme."
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        screen = {"width": width, "height": 900 if width > 600 else 844, "deviceScaleFactor": 1}
        await self.call("Emulation.setDeviceMetricsOverride", **screen, mobile=width < 600)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[theme])
        await self.call("Page.navigate", url=path.resolve().as_uri())
        for _ in range(200):
            loaded = await self.evaluate("document.readyState") == "complete"
            if loaded and await self.evaluate("location.href") != "about:blank":
                return
            await asyncio.sleep(0.05)
        raise TimeoutError(f"{path} did not load")

    async def evaluate(self, script: str):
        "Return the value of a JavaScript expression."
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    async def screenshot(self, path: Path, whole: bool = False) -> None:
        "Write the window, or the whole page, as PNG."
        clip = {"clip": await self.measure()} if whole else {}
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=whole, **clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    async def measure(self) -> dict:
        "Return the rectangle of the whole page."
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}


FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--hide-scrollbars", "--remote-debugging-port=0")


@contextlib.asynccontextmanager
async def open_browser(program: str) -> AsyncIterator[Page]:
    "Start a browser with an empty profile; end it at the end."
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        process = subprocess.Popen([program, *FLAGS, f"--user-data-dir={home}", "about:blank"], **quiet)
        try:
            port = await _read_port(Path(home) / "DevToolsActivePort", process)
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"http://127.0.0.1:{port}/json", timeout=20) as answer:
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


async def _read_port(file: Path, process: subprocess.Popen) -> str:
    for _ in range(600):
        if file.is_file() and (lines := file.read_text().split()):
            return lines[0]
        assert process.poll() is None, f"the browser ended with {process.returncode}"
        await asyncio.sleep(0.1)
    raise TimeoutError("the browser did not open its port")
