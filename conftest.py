"""What every test run shares: profiles, signals, the marker of tests that name none, a browser."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import aiohttp
import pytest
from hypothesis import settings

settings.register_profile("dev", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=100, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


def pytest_configure() -> None:
    """Undoes what nohup or a background job has ignored: the tests' processes would inherit it."""
    for number, usual in (
        (signal.SIGHUP, signal.SIG_DFL),
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGQUIT, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as unit tests those that are not integration tests."""
    for item in items:
        if not item.get_closest_marker("integration"):
            item.add_marker(pytest.mark.unit)


@dataclass(eq=False)
class Page:
    """A page in a headless browser, driven through its debugging protocol."""

    socket: aiohttp.ClientWebSocketResponse
    faults: list[str] = field(default_factory=list)
    _ids: Iterator[int] = field(default_factory=count)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol; collects what the page complains of meanwhile."""
        number = next(self._ids)
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            said = await self.socket.receive_json()
            if said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.faults.append(json.dumps(said["params"]))
            if said.get("id") == number:
                assert "error" not in said, said
                result: dict[str, Any] = said["result"]
                return result

    async def value(self, script: str) -> Any:
        """What an expression is in the page."""
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str) -> None:
        """Returns once an expression is true in the page."""
        while not await self.value(script):
            await asyncio.sleep(0.05)


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[str], AbstractAsyncContextManager[Page]]:
    """Opens an address in headless Chromium; skips where there is none."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is here")

    @asynccontextmanager
    async def opened(url: str) -> AsyncIterator[Page]:
        profile = Path(mkdtemp(dir=tmp_path))
        process = await asyncio.create_subprocess_exec(
            *(chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-dev-shm-usage", "--remote-debugging-port=0", f"--user-data-dir={profile}"),
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            port_file = profile / "DevToolsActivePort"
            while not port_file.exists() or "\n" not in port_file.read_text():
                assert process.returncode is None, "Chromium ended"
                await asyncio.sleep(0.05)
            at = f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}"
            async with aiohttp.ClientSession() as session:
                async with session.get(f"{at}/json") as answer:
                    (tab,) = [t for t in await answer.json() if t["type"] == "page"]
                async with session.ws_connect(tab["webSocketDebuggerUrl"]) as socket:
                    page = Page(socket)
                    for method in ("Runtime.enable", "Log.enable", "Page.enable"):
                        await page.call(method)
                    await page.call("Page.navigate", url=url)
                    here = "location.protocol != 'about:' && document.readyState == 'complete'"
                    await page.until(here)
                    yield page
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    return opened
