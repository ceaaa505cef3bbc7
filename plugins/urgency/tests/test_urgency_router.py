"""The router on real sockets: what passes through it unchanged, and what it answers itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from trimtab.urgency.router.application import Router, serving
from trimtab.urgency.router.config import RouterConfig
from trimtab.urgency.router.stub import Stub

CHAT = "/v1/chat/completions"


@dataclass
class World:
    """A router, its servers, and a client."""

    router: Router
    stubs: list[Stub]
    client: httpx.AsyncClient
    url: str

    async def ask(
        self, name: str = "q", *, headers: dict[str, str] | None = None, **body: Any
    ) -> httpx.Response:
        content = {"messages": [{"role": "user", "content": "hi"}], **body}
        sent = {"x-request-id": name, **(headers or {})}
        return await self.client.post(f"{self.url}{CHAT}", json=content, headers=sent)


@asynccontextmanager
async def world(*stubs: Stub, **options: Any) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        for stub in stubs:
            await stack.enter_async_context(stub)
        backends = [{"url": s.url, "name": f"s{i}", "seats": 4} for i, s in enumerate(stubs)]
        config = RouterConfig.model_validate({"backends": backends, **options})
        router = Router(config)
        url, _ = await stack.enter_async_context(serving(router, config, 0))
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=30))
        yield World(router, list(stubs), client, url)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 60)

    asyncio.run(bounded())


async def raw(url: str, request: bytes) -> bytes:
    """All bytes that a server sends on one connection, less its head."""
    host, port = httpx.URL(url).host, httpx.URL(url).port
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(request)
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        piece = await reader.read(65536)
        if not piece:
            break
        data += piece
    writer.close()
    return data.partition(b"\r\n\r\n")[2]


def unchunked(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        count = int(size, 16)
        whole += rest[:count]
        body = rest[count + 2 :]
    return whole


def test_streamed_answers_pass_byte_for_byte() -> None:
    async def scenario() -> None:
        async with world(Stub(tokens=40, token_s=0.001)) as w:
            body = json.dumps(
                {"messages": [{"role": "user", "content": "é\u2603"}], "stream": True}
            )
            request = (
                f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nx-request-id: same\r\n"
                f"content-length: {len(body)}\r\n\r\n{body}"
            ).encode()
            direct = unchunked(await raw(w.stubs[0].url, request))
            routed = unchunked(await raw(w.url, request))
            assert direct.count(b"data:") == 42
            assert routed == direct

    run(scenario)


def test_pieces_pass_as_they_come() -> None:
    async def scenario() -> None:
        async with world(Stub(tokens=2, token_s=30)) as w:
            body = {"messages": [], "stream": True}
            async with w.client.stream("POST", w.url + CHAT, json=body) as answer:
                first = await anext(answer.aiter_raw())
            assert first.count(b"data:") == 1

    run(scenario)


def test_any_path_and_query_and_the_body_pass_unchanged() -> None:
    async def scenario() -> None:
        async with world(Stub()) as w:
            answer = await w.client.get(f"{w.url}/v1/a%2Fb/%C3%A9?x=1&y=%20")
            assert answer.json() == {"target": "/v1/a%2Fb/%C3%A9?x=1&y=%20"}
            body = b'{"messages":  [] , "x": "\xc3\xa9"}'
            headers = {"x-own": "1", "x-request-id": "b"}
            await w.client.post(w.url + CHAT, content=body, headers=headers)
            (asked,) = w.stubs[0].asked
            assert asked.body == body
            assert asked.headers["x-own"] == "1"
            assert asked.headers["host"] == httpx.URL(w.stubs[0].url).netloc.decode()

    run(scenario)


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 5000, b'{"stream": 3}'])
def test_a_body_that_is_no_call_is_the_servers_to_judge(body: bytes) -> None:
    async def scenario() -> None:
        async with world(Stub()) as w:
            w.stubs[0].status = 422
            answer = await w.client.post(w.url + CHAT, content=body)
            assert answer.status_code == 422

    run(scenario)


@pytest.mark.parametrize(
    ("headers", "xargs", "param"),
    [
        ({"x-workflow-deadline-ms": value}, {}, "X-Workflow-Deadline-Ms")
        for value in ("-1", "0", "nan", "inf", "-inf", "1e15", "soon", "")
    ]
    + [
        ({}, {"trimtab.deadline_s": value}, "trimtab.deadline_s")
        for value in (-1, 0, 10**12, float("nan"), "5", True, None)
    ],
)
def test_deadlines_that_cannot_be_are_refused_by_name(
    headers: dict[str, str], xargs: dict[str, Any], param: str
) -> None:
    async def scenario() -> None:
        async with world(Stub()) as w:
            content = json.dumps({"messages": [], "vllm_xargs": xargs})
            answer = await w.client.post(w.url + CHAT, content=content, headers=headers)
            assert answer.status_code == 400
            assert param in answer.json()["error"]["message"]
            assert param in answer.json()["error"]["param"]
            assert not w.stubs[0].asked

    run(scenario)


def test_a_body_over_the_limit_is_refused_with_or_without_a_length() -> None:
    async def giant() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b"x" * 4096

    async def scenario() -> None:
        async with world(Stub(), limits={"body_bytes": 65_536}) as w:
            known = await w.client.post(w.url + CHAT, content=b"x" * 262_144)
            unknown = await w.client.post(w.url + CHAT, content=giant())
            assert (known.status_code, unknown.status_code) == (413, 413)
            assert "65,536 bytes" in known.json()["error"]["message"]
            fits = await w.client.post(w.url + CHAT, content=b"x" * 65_536)
            assert fits.status_code == 200
            assert len(w.stubs[0].asked) == 1

    run(scenario)


TENANTS = [
    {"name": "blue", "keys": ["blue-key-1", "blue-key-2"], "min_deadline_s": 5},
    {"name": "red", "keys": ["red-key-1"]},
]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_keys_are_asked_for_and_stay_here() -> None:
    async def scenario() -> None:
        async with world(Stub(), tenants=TENANTS) as w:
            for headers in ({}, bearer("wrong-key"), {"authorization": "Basic eA=="}):
                answer = await w.ask(headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
            assert (await w.client.get(f"{w.url}/v1/models")).status_code == 401
            assert not w.stubs[0].asked
            assert (await w.ask(headers=bearer("blue-key-2"))).status_code == 200
            assert (await w.ask(headers={"x-api-key": "red-key-1"})).status_code == 200
            for asked in w.stubs[0].asked:
                assert not {"authorization", "x-api-key"} & asked.headers.keys()
            assert [a.headers["x-workflow-tenant"] for a in w.stubs[0].asked] == ["blue", "red"]

    run(scenario)


def test_without_tenants_the_clients_key_is_the_servers() -> None:
    async def scenario() -> None:
        async with world(Stub()) as w:
            await w.ask(headers=bearer("whatever"))
            assert w.stubs[0].asked[0].headers["authorization"] == "Bearer whatever"

    run(scenario)


def test_a_servers_own_key_takes_the_place_of_the_clients() -> None:
    async def scenario() -> None:
        async with Stub() as stub:
            backends = [{"url": stub.url, "api_key": "inner-key"}]
            async with world(backends=backends) as w:
                await w.ask(headers=bearer("whatever"))
            assert stub.asked[0].headers["authorization"] == "Bearer inner-key"

    run(scenario)


def test_deadlines_reach_the_server_as_from_when_it_first_heard_of_the_workflow() -> None:
    async def scenario() -> None:
        async with world(Stub(first_s=0.2), dispatch={"rule": "round-robin"}) as w:
            headers = {"x-workflow-id": "w", "x-workflow-deadline-ms": "9000"}
            for _ in range(2):
                await w.ask(headers=headers)
            first, second = (float(a.headers["x-workflow-deadline-ms"]) for a in w.stubs[0].asked)
            assert first == second
            assert 8000 < first <= 9000

    run(scenario)


def test_a_server_that_hears_late_of_a_workflow_is_told_what_is_left() -> None:
    async def scenario() -> None:
        slow, other = Stub(first_s=0.3), Stub(first_s=0.3)
        async with world(slow, other, dispatch={"rule": "round-robin"}) as w:
            headers = {"x-workflow-id": "w", "x-workflow-deadline-ms": "9000"}
            for _ in range(2):
                await w.ask(headers=headers)
            told = [float(s.asked[0].headers["x-workflow-deadline-ms"]) for s in (slow, other)]
            assert told[0] - told[1] >= 290

    run(scenario)


def test_a_tenants_deadline_is_no_shorter_than_it_may_ask_for() -> None:
    async def scenario() -> None:
        async with world(Stub(), tenants=TENANTS) as w:
            lie = {"x-workflow-deadline-ms": "1"}
            await w.ask(headers=bearer("blue-key-1") | lie)
            await w.ask(headers=bearer("red-key-1") | lie)
            told = [float(a.headers["x-workflow-deadline-ms"]) for a in w.stubs[0].asked]
            assert 4000 < told[0] <= 5000
            assert told[1] <= 1

    run(scenario)


def test_health_follows_the_servers() -> None:
    async def scenario() -> None:
        async with world(Stub(), health={"every_s": 0.02}) as w:
            assert (await w.client.get(f"{w.url}/health")).status_code == 200
            w.stubs[0].die()
            while (await w.client.get(f"{w.url}/health")).status_code == 200:
                await asyncio.sleep(0.02)
            await w.stubs[0].revive()
            while (await w.client.get(f"{w.url}/health")).status_code == 503:
                await asyncio.sleep(0.02)

    run(scenario)


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (s.name.removeprefix("trimtab_router_"), tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_metrics_count_what_happened_and_stay_bounded() -> None:
    async def scenario() -> None:
        async with world(Stub(tokens=2)) as w:
            for number in range(60):
                headers = {"x-workflow-class": f"c{number}", "x-workflow-deadline-ms": "60000"}
                await w.ask(headers=headers)
            late = {"x-workflow-deadline-ms": "1"}
            w.stubs[0].first_s = 0.02
            await w.ask(headers=late)
            await w.client.post(w.url + CHAT, headers={"x-workflow-deadline-ms": "-1"})
            found = samples((await w.client.get(f"{w.url}/metrics")).text)
            sent = (("instance", "s0"), ("reason", "immediate"))
            assert found["dispatch_total", sent] == 61
            assert found["refused_total", (("status", "400"),)] == 1
            assert found["queue_seconds_count", (("tenant", "everybody"),)] == 61
            assert found["overhead_seconds_count", ()] == 61
            assert found["up", (("instance", "s0"),)] == 1
            workflows = {key: n for key, n in found.items() if key[0] == "workflows_total"}
            assert sum(workflows.values()) == 61
            assert len(workflows) == 33
            misses = {key: n for key, n in found.items() if key[0] == "deadline_misses_total"}
            assert sum(misses.values()) == 1

    run(scenario)


def test_a_websocket_is_turned_away() -> None:
    async def scenario() -> None:
        async with world(Stub()) as w:
            url = httpx.URL(w.url)
            reader, writer = await asyncio.open_connection(url.host, url.port)
            writer.write(
                b"GET /v1/realtime HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\n"
                b"connection: upgrade\r\nsec-websocket-version: 13\r\n"
                b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            )
            status = (await reader.readline()).split()[1]
            writer.close()
            # Where uvicorn has no package for websockets, it takes the request for a plain one.
            assert status in (b"403", b"200")

    run(scenario)
