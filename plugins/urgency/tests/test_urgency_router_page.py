"""The live page in a real browser: who waits, who is late, which server does what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

from trimtab.urgency.router.application import Router, serving
from trimtab.urgency.router.config import RouterConfig
from trimtab.urgency.router.stub import Stub

CHAT = "/v1/chat/completions"
HOSTILE = "<img src=x onerror=alert(1)>"
Browse = Callable[[str], AbstractAsyncContextManager[Any]]

pytestmark = pytest.mark.timeout(300)


@asynccontextmanager
async def routed(
    *stubs: Stub, seats: int = 1, **options: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, str]]:
    async with AsyncExitStack() as stack:
        for stub in stubs:
            await stack.enter_async_context(stub)
        backends = [{"url": s.url, "name": f"s{i}", "seats": seats} for i, s in enumerate(stubs)]
        config = RouterConfig.model_validate({"backends": backends, **options})
        router = Router(config)
        url, _ = await stack.enter_async_context(serving(router, config, 0))
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=120))
        yield client, url


def rows(table: str) -> str:
    """The cells of a table of the page, as a script."""
    return (
        f"[...document.querySelectorAll('#{table} tr')]"
        ".map(row => [...row.children].map(cell => cell.textContent))"
    )


async def ask(
    client: httpx.AsyncClient, url: str, name: str, deadline_ms: int, **headers: str
) -> None:
    said = {"x-workflow-id": name, "x-workflow-deadline-ms": str(deadline_ms)}
    said |= {"x-workflow-stage": "fix", **headers}
    await client.post(url + CHAT, json={"stream": True}, headers=said)


@asynccontextmanager
async def asking(*calls: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Calls whose answers nobody waits for."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_the_page_shows_who_waits_who_is_late_and_which_server_does_what(browse: Browse) -> None:
    async def scenario() -> None:
        stubs = [Stub(first_s=60.0), Stub(first_s=60.0)]
        async with routed(*stubs) as (client, url):
            calls = (
                *(("runs-1", 900_000), ("runs-2", 900_000)),
                *(("patient", 900_000), (HOSTILE, 1), ("hurried", 300_000)),
            )
            async with (
                asking(*(ask(client, url, name, deadline_ms) for name, deadline_ms in calls)),
                browse(f"{url}/trimtab") as page,
            ):
                await page.until(f"{rows('waiting')}.length == 4")
                summary = "document.getElementById('summary').textContent"
                await page.until(f"{summary} == '3 calls wait, 1 of them late'")
                servers = await page.value(rows("servers"))
                assert [row[:3] for row in servers[1:]] == [["s0", "up", "1"], ["s1", "up", "1"]]
                running = await page.value(rows("running"))
                assert sorted(row[0] for row in running[1:]) == ["s0", "s1"]
                assert {row[1] for row in running[1:]} == {"runs-1", "runs-2"}
                waiting = await page.value(rows("waiting"))
                assert {row[0] for row in waiting[1:]} == {"patient", HOSTILE, "hurried"}
                assert [row[0] for row in waiting[1:] if row[0] != HOSTILE] == [
                    "hurried",
                    "patient",
                ]
                late = "[...document.querySelectorAll('#waiting .late')]"
                assert await page.value(f"{late}.length == 1 && Number({late}[0].textContent) < 0")
                assert await page.value("document.images.length") == 0

                stubs[1].die()
                down = rows("servers") + "[2][1].startsWith('down: ')"
                await page.until(down)
                assert page.faults == []

    asyncio.run(scenario())


def test_the_page_shows_measured_speeds_and_says_when_the_router_has_gone(browse: Browse) -> None:
    async def scenario() -> None:
        async with AsyncExitStack() as router:
            client, url = await router.enter_async_context(routed(Stub(first_s=0.05)))
            async with browse(f"{url}/trimtab") as page:
                for number in range(3):
                    await ask(client, url, f"w{number}", 60_000)
                await page.until(f"{rows('stages')}.length == 2")
                (speed,) = (await page.value(rows("stages")))[1:]
                assert speed[:2] == ["s0", "fix"]
                assert float(speed[2]) > 0
                assert float(speed[4]) == 3
                await router.aclose()
                await page.until(
                    "document.getElementById('fault').textContent.startsWith('No news: ')"
                )

    asyncio.run(scenario())


def test_a_tenant_sees_its_own_calls_with_the_key_behind_the_address(browse: Browse) -> None:
    async def scenario() -> None:
        tenants = [{"name": name, "keys": [f"{name}-key-0"]} for name in ("ours", "theirs")]
        async with routed(Stub(first_s=60.0), tenants=tenants) as (client, url):
            calls = (
                ask(client, url, f"{n}-{i}", 60_000, authorization=f"Bearer {n}-key-0")
                for n in ("ours", "theirs")
                for i in range(3)
            )
            async with asking(*calls):
                async with browse(f"{url}/trimtab") as page:
                    await page.until("document.getElementById('fault').textContent != ''")
                async with browse(f"{url}/trimtab#ours-key-0") as page:
                    shown = f"[...{rows('waiting')}.slice(1), ...{rows('running')}.slice(1)]"
                    await page.until(f"{shown}.length == 3")
                    text = "[...document.querySelectorAll('table, p')].map(e => e.innerText).join()"
                    assert "theirs" not in await page.value(text)

    asyncio.run(scenario())
