"""The router when servers die, hang and flap, and clients go: nothing is lost or done twice."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from trimtab.urgency.router.application import Router, serving
from trimtab.urgency.router.config import RouterConfig
from trimtab.urgency.router.stub import Stub

CHAT = "/v1/chat/completions"
HEALTH = {"every_s": 0.02, "timeout_s": 0.2, "longest_pause_s": 0.05}


@dataclass
class World:
    """A router, its servers, and a client."""

    router: Router
    stubs: list[Stub]
    client: httpx.AsyncClient
    url: str

    async def ask(self, name: str, **body: Any) -> httpx.Response:
        content = {"messages": [], "stream": True, **body}
        return await self.client.post(self.url + CHAT, json=content, headers={"x-request-id": name})

    def states(self) -> list[str]:
        return [backend.state.value for backend in self.router.backends]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def world(
    *stubs: Stub, seats: int = 4, health: dict[str, Any] = HEALTH, **options: Any
) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        for stub in stubs:
            await stack.enter_async_context(stub)
        backends = [{"url": s.url, "name": f"s{i}", "seats": seats} for i, s in enumerate(stubs)]
        config = RouterConfig.model_validate({"backends": backends, "health": health, **options})
        router = Router(config)
        url, _ = await stack.enter_async_context(serving(router, config, 0))
        limits = httpx.Limits(max_connections=None)
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=60, limits=limits))
        yield World(router, list(stubs), client, url)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 300)

    asyncio.run(bounded())


def is_whole(answer: httpx.Response) -> bool:
    return answer.status_code == 200 and answer.content.endswith(b"data: [DONE]\n\n")


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error in the last event of a stream."""
    last = answer.content.rstrip().rpartition(b"data: ")[2]
    found: dict[str, Any] = json.loads(last)["error"]
    return found


def test_a_router_that_stood_still_blames_no_server() -> None:
    """The answers lie in its sockets; what it did not see in time is not a server's silence."""

    async def scenario() -> None:
        async with world(Stub(first_s=1.0), Stub(first_s=1.0)) as w:
            asking = [asyncio.create_task(w.ask(f"c{n}")) for n in range(8)]
            await w.until(lambda: sum(len(stub.asked) for stub in w.stubs) == 8)
            for _ in range(20):
                time.sleep(HEALTH["timeout_s"] / 2)
                await asyncio.sleep(0)
                assert w.states() == ["up", "up"]
            assert all(is_whole(answer) for answer in await asyncio.gather(*asking))
            assert sum(len(stub.asked) for stub in w.stubs) == 8

    run(scenario)


def test_a_server_killed_before_the_first_byte_loses_the_call_to_another() -> None:
    async def scenario() -> None:
        dying, other = Stub(first_s=60), Stub()
        async with world(dying, other) as w:
            asking = asyncio.create_task(w.ask("a"))
            await w.until(lambda: dying.running == 1)
            dying.die()
            answer = await asking
            assert is_whole(answer)
            assert answer.content.count(b"a-0") == 1
            assert (dying.begun["a"], other.completed["a"]) == (0, 1)

    run(scenario)


def test_a_server_killed_in_mid_stream_ends_the_answer_with_an_error() -> None:
    async def scenario() -> None:
        dying, other = Stub(tokens=4), Stub()
        dying.breaks_after = 2
        async with world(dying, other) as w:
            answer = await w.ask("a")
            assert answer.status_code == 200
            assert [f"a-{n} ".encode() in answer.content for n in range(3)] == [True, True, False]
            assert b"[DONE]" not in answer.content
            assert error_of(answer)["code"] == 502
            assert other.asked == []

    run(scenario)


def test_an_answer_in_one_piece_is_never_taken_for_whole_when_it_is_not() -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        kind = b"text/plain" if head.startswith(b"GET") else b"application/json"
        writer.write(b"HTTP/1.1 200 X\r\ncontent-type: %s\r\ncontent-length: 9\r\n\r\n" % kind)
        writer.write(b"123456789" if head.startswith(b"GET") else b"1234")
        await writer.drain()
        writer.close()

    async def scenario() -> None:
        server = await asyncio.start_server(cut, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with world(backends=[{"url": f"http://127.0.0.1:{port}"}]) as w:
            with pytest.raises(httpx.RemoteProtocolError):
                await w.ask("a", stream=False)
        server.close()

    run(scenario)


def test_a_hanging_server_loses_the_call_to_another_when_its_health_shows_it() -> None:
    async def scenario() -> None:
        hanging, other = Stub(first_s=60), Stub()
        async with world(hanging, other) as w:
            asking = asyncio.create_task(w.ask("a"))
            await w.until(lambda: hanging.running == 1)
            hanging.silent = True
            assert is_whole(await asking)
            assert other.completed["a"] == 1
            assert w.states() == ["down", "up"]
            await w.until(lambda: hanging.aborted == 1 or hanging.running == 1)

    run(scenario)


def test_a_server_silent_for_too_long_loses_the_call_to_another() -> None:
    async def scenario() -> None:
        hanging, other = Stub(first_s=60), Stub()
        async with world(hanging, other, limits={"first_byte_s": 0.1}) as w:
            assert is_whole(await w.ask("a"))
            assert (len(hanging.asked), other.completed["a"]) == (1, 1)

    run(scenario)


def test_an_answer_that_stalls_is_ended() -> None:
    async def scenario() -> None:
        async with world(Stub(tokens=3, token_s=60), limits={"stall_s": 0.1}) as w:
            answer = await w.ask("a")
            assert b"a-0" in answer.content
            assert error_of(answer)["code"] == 502

    run(scenario)


def test_retries_end() -> None:
    async def scenario() -> None:
        stubs = [Stub() for _ in range(5)]
        for stub in stubs:
            stub.breaks_after = 0
        async with world(*stubs, limits={"retries": 2}) as w:
            answer = await w.ask("a")
            assert answer.status_code == 502
            assert sum(len(stub.asked) for stub in stubs) == 3

    run(scenario)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_servers_call_goes_to_another(status: int) -> None:
    async def scenario() -> None:
        busy, other = Stub(), Stub()
        async with world(busy, other) as w:
            busy.status = status
            assert is_whole(await w.ask("a"))
            assert other.completed["a"] == 1

    run(scenario)


@pytest.mark.parametrize("status", [400, 404, 422, 500])
def test_a_servers_own_refusal_is_the_answer(status: int) -> None:
    async def scenario() -> None:
        refusing, other = Stub(), Stub()
        async with world(refusing, other) as w:
            refusing.status = status
            assert (await w.ask("a")).status_code == status
            assert other.asked == []
            assert w.states() == ["up", "up"]

    run(scenario)


def test_when_all_are_busy_the_last_ones_answer_passes() -> None:
    async def scenario() -> None:
        stubs = [Stub(), Stub()]
        async with world(*stubs) as w:
            for stub in stubs:
                stub.status = 503
            assert (await w.ask("a")).status_code == 503

    run(scenario)


@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_goes_cancels_its_call(begun: bool) -> None:
    async def scenario() -> None:
        stub = Stub(first_s=0 if begun else 0.3, tokens=400, token_s=0.02)
        async with world(stub, seats=1) as w:
            asking = asyncio.create_task(w.ask("a"))
            await w.until(lambda: stub.begun["a"] == 1 if begun else stub.running == 1)
            asking.cancel()
            await w.until(lambda: stub.aborted == 1)
            assert stub.completed["a"] == 0
            await w.until(lambda: w.router.backends[0].backlog.own == 0)

    run(scenario)


def test_a_client_that_goes_while_it_waits_frees_its_place() -> None:
    async def scenario() -> None:
        stub = Stub(first_s=0.3)
        async with world(stub, seats=1) as w:
            first = asyncio.create_task(w.ask("a"))
            await w.until(lambda: stub.running == 1)
            gone = asyncio.create_task(w.ask("b"))
            await w.until(lambda: len(w.router.queue) == 1)
            gone.cancel()
            await w.until(lambda: len(w.router.queue) == 0)
            assert is_whole(await first)
            assert is_whole(await w.ask("c"))
            assert [a.headers["x-request-id"] for a in stub.asked] == ["a", "c"]

    run(scenario)


def test_calls_wait_out_a_short_outage_and_are_refused_in_a_long_one() -> None:
    async def scenario() -> None:
        stub = Stub()
        async with world(stub, limits={"outage_s": 1.0}) as w:
            stub.die()
            asking = asyncio.create_task(w.ask("a"))
            await w.until(lambda: len(w.router.queue) == 1)
            await stub.revive()
            assert is_whole(await asking)
            stub.die()
            refused = await w.ask("b")
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1

    run(scenario)


def test_a_server_that_comes_back_is_tried_with_one_call_first() -> None:
    async def scenario() -> None:
        stub = Stub()
        slow = HEALTH | {"longest_pause_s": 0.02}
        async with world(stub, health=slow) as w:
            stub.die()
            await w.until(lambda: w.states() == ["down"])
            stub.first_s = 0.05
            await stub.revive()
            answers = await asyncio.gather(*(w.ask(str(n)) for n in range(6)))
            assert all(map(is_whole, answers))
            assert w.states() == ["up"]

    run(scenario)


def test_nothing_is_lost_or_answered_twice_while_servers_flap() -> None:
    async def scenario() -> None:
        chance = random.Random(1)
        stubs = [Stub(tokens=4, first_s=0.01, token_s=0.003) for _ in range(3)]
        async with world(*stubs, limits={"retries": 10, "outage_s": 30}) as w:
            flaps = 0

            async def answered(more: int) -> None:
                """Waits by answers, not by the clock: a slow machine has as many between flaps."""
                until = more + sum(stub.completed.total() for stub in stubs)
                await w.until(lambda: sum(stub.completed.total() for stub in stubs) >= until)

            async def flap() -> None:
                nonlocal flaps
                while True:
                    await answered(8)
                    stub = chance.choice(stubs[1:])
                    stub.die()
                    flaps += 1
                    await answered(4)
                    await stub.revive()

            flapping = asyncio.create_task(flap())
            asking = []
            for number in range(300):
                asking.append(asyncio.create_task(w.ask(f"n{number}")))
                await asyncio.sleep(0.003)
            answers = await asyncio.gather(*asking)
            flapping.cancel()
            with suppress(asyncio.CancelledError):
                await flapping
            for number, answer in enumerate(answers):
                name = f"n{number}"
                whole = is_whole(answer)
                # Answered whole, or begun and ended with an error: never both, never neither.
                assert whole or error_of(answer)["code"] == 502
                assert answer.content.count(f"{name}-0 ".encode()) == 1
                assert sum(stub.completed[name] for stub in stubs) == whole
                assert sum(stub.begun[name] for stub in stubs) >= 1
            # A flap cuts no more than the four that a server has at a time, of sixteen at least.
            assert sum(map(is_whole, answers)) >= 200
            assert flaps >= 10
            assert len(w.router.queue) == 0
            assert all(backend.backlog.own == 0 for backend in w.router.backends)

    run(scenario)


def test_a_wall_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stub = Stub(first_s=0.02)
        async with world(stub, seats=1) as w:
            jumps = iter([-1e9, 1e9] * 100_000)
            monkeypatch.setattr(time, "time", lambda: next(jumps))
            asking = [asyncio.create_task(w.ask(str(n))) for n in range(10)]
            answers = await asyncio.gather(*asking)
            assert all(map(is_whole, answers))
            assert w.states() == ["up"]

    run(scenario)
