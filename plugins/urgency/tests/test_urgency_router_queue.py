"""The router's queue: bounded, by urgency, fair to tenants; and what it learns of the servers."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.errors import BadInput
from trimtab.core.policy import Call, Outcome
from trimtab.urgency import tuned
from trimtab.urgency.config import TunedDispatch, TunedOptions, UrgencyConfig
from trimtab.urgency.dispatch import Paper, rule
from trimtab.urgency.policy import UrgencyPolicy
from trimtab.urgency.router import page
from trimtab.urgency.router.admission import AdmissionQueue, Ticket
from trimtab.urgency.router.application import Router, serving
from trimtab.urgency.router.backends import Backend, PromptedCall, Queue, read_queue
from trimtab.urgency.router.config import (
    BackendOptions,
    HealthOptions,
    Limits,
    RouterConfig,
    TenantOptions,
)
from trimtab.urgency.router.journeys import Journey
from trimtab.urgency.router.prefixes import BLOCK_BYTES, PrefixMemory, blocks_of
from trimtab.urgency.router.refusals import Refusal
from trimtab.urgency.router.speeds import Speeds
from trimtab.urgency.router.stub import Stub
from trimtab.urgency.router.tenants import Tenant, Tenants

CHAT = "/v1/chat/completions"


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 300)

    asyncio.run(bounded())


def backend(number: int = 0, seats: int | None = 1) -> Backend:
    options = BackendOptions(url=f"http://127.0.0.1:{9000 + number}", seats=seats)
    made = Backend(options, number, HealthOptions(), Speeds())
    made.looked_well()
    return made


def tenant(name: str, **options: Any) -> Tenant:
    return Tenant(TenantOptions(name=name, keys=(f"{name}-key-000",), **options))


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Door:
    """A queue before servers that end calls when told to."""

    def __init__(
        self,
        backends: list[Backend],
        tenants: list[Tenant],
        *,
        dispatch: str = "pft",
        **limits: Any,
    ) -> None:
        self.clock, self.backends, self.tenants = Clock(), backends, tenants
        self.queue = AdmissionQueue(
            UrgencyPolicy(UrgencyConfig()),
            rule(dispatch),
            backends,
            tenants,
            Limits(**limits),
            self.clock,
        )

    def ask(self, whose: Tenant, **fields: Any) -> Ticket:
        journey = Journey(whose, None, "default", self.clock())
        call = Call("", self.clock(), 10, 0, fields={**fields, "tenant": whose.name})
        ticket = Ticket(call, PromptedCall(10, 10.0), whose, journey)
        self.queue.enter(ticket)
        return ticket

    def end(self, ticket: Ticket) -> None:
        self.queue.leave(ticket, Outcome.COMPLETED, 10)

    def serve(self, service_s: float, calls: int) -> list[Ticket]:
        """Ends calls one after another, the first sent first; returns them."""
        ended = []
        for _ in range(calls):
            running = [t for b in self.backends for t in b.tickets]
            if not running:
                break
            self.clock.now_s += service_s
            ticket = min(running, key=lambda t: (t.sent_s, t.number))
            self.end(ticket)
            ended.append(ticket)
        return ended


def test_waiting_calls_are_sent_by_their_deadlines() -> None:
    async def scenario() -> None:
        who = tenant("a")
        door = Door([backend()], [who])
        first = door.ask(who)
        deadlines_s = [50.0, 20.0, 90.0, 10.0]
        asked = {door.ask(who, deadline_s=d): d for d in deadlines_s}
        served = door.serve(0.1, 5)
        assert served[0] is first
        assert [asked[ticket] for ticket in served[1:]] == sorted(deadlines_s)

    run(scenario)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def scenario() -> None:
        who = tenant("a")
        door = Door([backend()], [who], queued=3)
        tickets = [door.ask(who) for _ in range(4)]
        with pytest.raises(Refusal) as refused:
            door.ask(who)
        assert refused.value.status == 429
        assert 1 <= (refused.value.retry_after_s or 0) <= 60
        door.end(tickets[0])
        door.ask(who)

    run(scenario)


def test_a_tenant_fills_only_its_part_of_the_queue() -> None:
    async def scenario() -> None:
        greedy, modest = tenant("greedy"), tenant("modest")
        door = Door([backend()], [greedy, modest], queued=10, queued_share=0.5)
        for _ in range(6):
            door.ask(greedy)
        with pytest.raises(Refusal) as refused:
            door.ask(greedy)
        assert refused.value.status == 429
        door.ask(modest)

    run(scenario)


def test_ten_thousand_calls_wait_and_all_are_served_once() -> None:
    async def scenario() -> None:
        who = tenant("a")
        door = Door([backend(n, seats=8) for n in range(3)], [who])
        asked = [door.ask(who, deadline_s=10.0 + n % 977) for n in range(10_000)]
        assert len(door.queue) == 10_000 - 24
        served = door.serve(0.001, 10_000)
        assert len(served) == len(set(served)) == 10_000
        assert set(served) == set(asked)
        assert len(door.queue) == 0
        assert all(b.backlog.own == 0 and not b.tickets for b in door.backends)

    run(scenario)


def test_a_greedy_tenant_that_lies_of_its_deadlines_keeps_nobody_waiting() -> None:
    """Bounded by the lag that is allowed: so many seconds of the service, and no more."""

    async def scenario() -> None:
        greedy, modest = tenant("greedy"), tenant("modest")
        lag_s, service_s = 5.0, 1.0
        door = Door([backend()], [greedy, modest], fair_lag_s=lag_s)
        for _ in range(1000):
            door.ask(greedy, deadline_s=3600.0)
        door.serve(service_s, 20)
        for _ in range(5):
            patient = door.ask(modest, deadline_s=80_000.0)
            asked_s = door.clock()
            while patient.backend is None:
                door.serve(service_s, 1)
                door.ask(greedy, deadline_s=0.001)
            assert door.clock() - asked_s <= lag_s + 3 * service_s
            door.serve(service_s, 2)

    run(scenario)


def test_backlogged_tenants_are_served_by_their_weights() -> None:
    async def scenario() -> None:
        heavy, light = tenant("heavy", weight=3.0), tenant("light")
        door = Door([backend()], [heavy, light], fair_lag_s=1.0)
        for _ in range(400):
            door.ask(heavy, deadline_s=5000.0)
            door.ask(light, deadline_s=0.001)
        served = door.serve(1.0, 400)
        share = sum(ticket.tenant is heavy for ticket in served) / len(served)
        assert 0.65 <= share <= 0.8

    run(scenario)


def test_a_tenants_calls_in_the_servers_are_capped() -> None:
    async def scenario() -> None:
        capped, free = tenant("capped", max_running=2), tenant("free")
        door = Door([backend(seats=8)], [capped, free])
        for _ in range(5):
            door.ask(capped)
            door.ask(free)
        assert (capped.running, free.running) == (2, 5)
        assert capped.waiting == 3

    run(scenario)


def test_a_call_given_back_goes_first_and_elsewhere() -> None:
    async def scenario() -> None:
        who = tenant("a")
        first, second = backend(0), backend(1)
        door = Door([first, second], [who])
        ticket, other = door.ask(who), door.ask(who)
        waiting = door.ask(who)
        assert (ticket.backend, other.backend, waiting.backend) == (first, second, None)
        door.queue.give_back(ticket)
        # The call behind it may have the server that has failed it.
        assert (ticket.backend, waiting.backend) == (None, first)
        late = door.ask(who, deadline_s=0.001)
        door.end(other)
        assert (ticket.backend, late.backend) == (second, None)

    run(scenario)


@given(st.lists(st.tuples(st.sampled_from("aelg"), st.integers(0, 3)), max_size=80))
def test_whatever_comes_and_goes_nothing_is_lost(steps: list[tuple[str, int]]) -> None:
    async def scenario() -> None:
        tenants = [tenant("a"), tenant("b", max_running=2)]
        door = Door([backend(0, 2), backend(1, 1)], tenants, queued=12)
        inside: list[Ticket] = []
        for what, number in steps:
            door.clock.now_s += 0.5
            running = [t for t in inside if t.backend is not None]
            if what == "a":
                try:
                    inside.append(door.ask(tenants[number % 2], deadline_s=1.0 + number))
                except Refusal:
                    continue
            elif what == "e" and running:
                inside.remove(running[0])
                door.end(running[0])
            elif what == "l" and inside:
                gone = inside.pop(number % len(inside))
                door.queue.leave(gone, Outcome.ABORTED, 0)
            elif what == "g" and running:
                door.queue.give_back(running[-1])
            sent = [t for t in inside if t.backend is not None]
            assert len(door.queue) == len(inside) - len(sent)
            assert sum(b.backlog.own for b in door.backends) == len(sent)
            for one in tenants:
                assert one.running == sum(t.tenant is one for t in sent)
                assert one.waiting == sum(t.tenant is one and t.backend is None for t in inside)
            # No seat is idle while a call waits that may have it.
            if any(t.waits and t.tenant.may_run for t in inside):
                assert any(b.backlog.own for b in door.backends)

    asyncio.run(scenario())


def test_a_tenant_without_a_key_is_nobody() -> None:
    tenants = Tenants([TenantOptions(name="a", keys=("a-key-00",))])
    with pytest.raises(Refusal):
        tenants.of({"authorization": "Bearer a-key-0"})
    assert tenants.of({"authorization": "bearer a-key-00"}).name == "a"


def test_seats_are_learnt_from_the_servers_queue() -> None:
    async def scenario() -> None:
        who = tenant("a")
        learning = backend(seats=None)
        before = learning.backlog.seats
        door = Door([learning], [who], dispatch="round-robin")
        for _ in range(before):
            door.ask(who)
        learning.heard_queue(Queue(running=before, waiting=0))
        assert learning.backlog.seats == 2 * before
        for _ in range(2):
            learning.heard_queue(Queue(running=6, waiting=before - 6))
        assert learning.backlog.seats == 6
        given = backend(seats=5)
        for _ in range(3):
            given.heard_queue(Queue(running=2, waiting=9))
        assert given.backlog.seats == 5

    run(scenario)


def test_calls_of_others_count_when_two_looks_show_them() -> None:
    shared = backend(seats=4)
    shared.heard_queue(Queue(running=3, waiting=0))
    assert shared.backlog.in_flight == 0
    shared.heard_queue(Queue(running=2, waiting=0))
    assert (shared.backlog.in_flight, shared.backlog.own) == (2, 0)


def test_vllms_queue_is_read_and_nonsense_is_not() -> None:
    lines = [
        f'vllm:num_requests_{what}{{engine="{engine}",model_name="m"}} {value}'
        for what, value in (("running", 3.0), ("waiting", 1.0))
        for engine in range(2)
    ]
    noise = ["# vllm:num_requests_running 7", 'vllm:num_requests_running_max{engine="0"} 9.0']
    text = "\n".join([*noise, *lines]).encode()
    assert read_queue(text) == Queue(running=6, waiting=2)
    assert read_queue(b"") is None
    assert read_queue(b"vllm:num_requests_running 1e999\nvllm:num_requests_waiting 1\n") is None
    assert read_queue(b"vllm:num_requests_running 1e\nvllm:num_requests_waiting 1\n") is None


def test_speeds_are_learnt_by_stage_and_server() -> None:
    speeds = Speeds()
    for _ in range(5):
        for number, token_s in ((0, 0.01), (1, 0.04)):
            speeds.learn(
                "draft",
                number,
                prompt_tokens=968,
                output_tokens=100,
                first_s=100 * token_s,
                total_s=200 * token_s,
            )
    fast, slow = (
        speeds.predict("draft", number, prompt_tokens=968, output_tokens=100) for number in (0, 1)
    )
    assert fast.total_s == pytest.approx(2.0)
    assert slow.prefill_s == pytest.approx(4.0)
    assert slow.decode_s == pytest.approx(4.0)
    # A new stage on a known server goes by that server's speed.
    unseen = speeds.predict("judge", 1, prompt_tokens=968, output_tokens=100)
    assert unseen.total_s == pytest.approx(slow.total_s)
    assert speeds.output_tokens("draft", said=None, longest=0) == pytest.approx(100)
    assert speeds.output_tokens("draft", said=7, longest=0) == 7
    assert speeds.output_tokens("draft", said=None, longest=10) == 10


def test_speeds_of_many_stages_are_bounded() -> None:
    speeds = Speeds()
    for number in range(3000):
        speeds.learn(f"s{number}", 0, prompt_tokens=1, output_tokens=1, first_s=None, total_s=1.0)
    assert len(speeds.table()) <= 512


@given(st.binary(max_size=4 * BLOCK_BYTES), st.binary(max_size=2000), st.binary(max_size=2000))
def test_a_common_beginning_is_known_again(common: bytes, first: bytes, second: bytes) -> None:
    memory = PrefixMemory()
    memory.saw(blocks_of(common + first))
    known = memory.known_bytes(blocks_of(common + second))
    assert known >= len(common) // BLOCK_BYTES * BLOCK_BYTES - (BLOCK_BYTES - 1)
    shared = len(common) + next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
    assert known <= shared


@asynccontextmanager
async def routed(
    *stubs: Stub, **options: Any
) -> AsyncIterator[tuple[Router, httpx.AsyncClient, str]]:
    async with AsyncExitStack() as stack:
        for stub in stubs:
            await stack.enter_async_context(stub)
        backends = [{"url": s.url, "name": f"s{i}", "seats": 4} for i, s in enumerate(stubs)]
        config = RouterConfig.model_validate({"backends": backends, **options})
        router = Router(config)
        url, _ = await stack.enter_async_context(serving(router, config, 0))
        limits = httpx.Limits(max_connections=None)
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=60, limits=limits))
        yield router, client, url


def test_the_stages_of_a_workflow_stay_where_their_prompt_is_known() -> None:
    async def scenario() -> None:
        stubs = [Stub(first_s=0.02), Stub(first_s=0.02)]
        async with routed(*stubs) as (_, client, url):
            for round_ in range(4):
                for workflow in range(2):
                    text = f"{workflow} " * 4000 + f"stage {round_}"
                    body = {"prompt": text, "stream": True}
                    headers = {"x-request-id": f"w{workflow}", "x-workflow-id": f"w{workflow}"}
                    await client.post(f"{url}/v1/completions", json=body, headers=headers)
            for workflow in range(2):
                name = f"w{workflow}"
                by_server = [
                    sum(a.headers["x-request-id"] == name for a in stub.asked) for stub in stubs
                ]
                assert sorted(by_server) in ([0, 4], [1, 3])

    run(scenario)


def test_a_tuned_rule_is_taken_over_while_the_router_runs(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "tuned.json"
        async with routed(Stub(), urgency={"tuned": str(path)}) as (router, _, _):
            configured = router.queue.rule
            tuned.write(path, TunedOptions(dispatch=TunedDispatch(rule="paper", alpha=0.3)))
            while router.queue.rule is configured:
                await asyncio.sleep(0.02)
            assert isinstance(router.queue.rule, Paper)
            assert router.queue.rule.__dict__["_alpha"] == 0.3

    run(scenario)


def test_calls_wait_at_the_router_and_not_in_the_servers() -> None:
    async def scenario() -> None:
        stub = Stub(first_s=0.02, tokens=2)
        async with routed(stub) as (router, client, url):
            asking = [
                asyncio.create_task(client.post(url + CHAT, json={"stream": True}))
                for _ in range(40)
            ]
            while not len(router.queue):
                await asyncio.sleep(0.002)
            answers = await asyncio.gather(*asking)
            assert all(a.content.endswith(b"[DONE]\n\n") for a in answers)
            assert stub.most_running <= 4

    run(scenario)


async def asgi(app: Any, name: str, key: str, deadline_ms: int) -> bytes:
    """One call straight into the application, without a socket of its own."""
    headers = {
        "x-request-id": name,
        "x-workflow-deadline-ms": str(deadline_ms),
        "authorization": f"Bearer {key}",
    }
    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    request = iter([{"type": "http.request", "body": b'{"stream": true}'}])
    answer: list[bytes] = []
    over = asyncio.Event()

    async def receive() -> dict[str, Any]:
        message: dict[str, Any] | None = next(request, None)
        if message is None:
            await over.wait()
            return {"type": "http.disconnect"}
        return message

    async def send(message: dict[str, Any]) -> None:
        answer.append(message.get("body", b""))

    await app(scope, receive, send)
    over.set()
    return b"".join(answer)


@pytest.mark.slow
def test_ten_thousand_waiting_calls_are_each_answered_once() -> None:
    async def scenario() -> None:
        stubs = [Stub(tokens=1), Stub(tokens=1)]
        async with routed(*stubs) as (router, _, _):
            for stub in stubs:
                stub.first_s = 1.0
            app = router.proxy
            asking = [
                asyncio.create_task(asgi(app, f"n{n}", "", 60_000 + n % 977)) for n in range(10_000)
            ]
            while len(router.queue) < 10_000 - 8:
                await asyncio.sleep(0.05)
            for stub in stubs:
                stub.first_s = 0.0
            answers = await asyncio.gather(*asking)
            for number, answer in enumerate(answers):
                name = f"n{number}"
                assert answer.count(f"{name}-0 ".encode()) == 1
                assert sum(stub.completed[name] for stub in stubs) == 1

    run(scenario)


def test_a_greedy_tenant_keeps_nobody_waiting_on_real_sockets() -> None:
    """Counted in the calls that the server was given in between, which no slow machine changes."""

    async def scenario() -> None:
        tenants = [{"name": n, "keys": [f"{n}-key-000"]} for n in ("greedy", "modest")]
        stub = Stub(tokens=1, first_s=0.01)
        limits = {"fair_lag_s": 0.05}
        async with routed(stub, tenants=tenants, limits=limits) as (router, _, _):
            crowd = [
                asyncio.create_task(asgi(router.proxy, f"g{n}", "greedy-key-000", 1))
                for n in range(600)
            ]
            while len(stub.asked) < 40:
                await asyncio.sleep(0.005)
            overtaken = []
            for number in range(8):
                before = len(stub.asked)
                await asgi(router.proxy, f"m{number}", "modest-key-000", 80_000_000)
                names = [asked.headers["x-request-id"] for asked in stub.asked]
                overtaken.append(names.index(f"m{number}") - before)
            assert len(router.queue) > 100
            # The lag, in calls of ten milliseconds, and what the four seats take meanwhile.
            assert max(overtaken) <= 60
            await asyncio.gather(*crowd)

    run(scenario)


def test_the_state_shows_who_waits_who_is_late_and_what_each_server_does() -> None:
    async def scenario() -> None:
        stub = Stub(first_s=30)
        async with routed(stub) as (router, client, url):
            headers = {
                "x-workflow-id": "<script>alert(1)</script>",
                "x-workflow-stage": "draft",
                "x-workflow-deadline-ms": "1",
            }
            asking = [
                asyncio.create_task(client.post(url + CHAT, json={}, headers=headers))
                for _ in range(6)
            ]
            while len(router.queue) < 2:
                await asyncio.sleep(0.002)
            await asyncio.sleep(0.01)
            shown = (await client.get(f"{url}/trimtab/state")).json()
            assert (shown["waiting_total"], shown["late_total"]) == (2, 2)
            (server,) = shown["servers"]
            assert (server["name"], server["state"], server["in_flight"]) == ("s0", "up", 4)
            assert {row["stage"] for row in server["calls"]} == {"draft"}
            assert all(row["left_s"] < 0 for row in shown["waiting"])
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    run(scenario)


def test_a_tenant_sees_its_own_calls_alone() -> None:
    async def scenario() -> None:
        tenants = [{"name": n, "keys": [f"{n}-key-000"]} for n in ("blue", "red")]
        async with routed(Stub(first_s=30), tenants=tenants) as (router, client, url):
            blue, red = ({"authorization": f"Bearer {n}-key-000"} for n in ("blue", "red"))
            asking = asyncio.create_task(client.post(url + CHAT, json={}, headers=blue))
            while not router.backends[0].tickets:
                await asyncio.sleep(0.002)
            assert (await client.get(f"{url}/trimtab/state")).status_code == 401
            for headers, calls in ((blue, 1), (red, 0)):
                shown = (await client.get(f"{url}/trimtab/state", headers=headers)).json()
                assert len(shown["servers"][0]["calls"]) == calls
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    run(scenario)


def test_the_page_is_whole_and_puts_no_text_into_markup() -> None:
    async def scenario() -> None:
        async with routed(Stub()) as (_, client, url):
            answer = await client.get(f"{url}/trimtab")
            assert answer.headers["content-type"].startswith("text/html")
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert answer.text == page.html()

    run(scenario)
    (script,) = re.findall(r"<script>(.*?)</script>", page.html(), re.DOTALL)
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\b", script)
    for name in re.findall(r'getElementById\("(\w+)"\)|fill\("(\w+)"', script):
        assert f'id="{name[0] or name[1]}"' in page.html()


@pytest.mark.skipif(shutil.which("node") is None, reason="no JavaScript engine is here")
def test_the_pages_script_parses() -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", page.html(), re.DOTALL)
    command = ["node", "--check", "-"]
    subprocess.run(command, input=script.encode(), check=True, capture_output=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backends": [{"url": "127.0.0.1:8000"}]}, "no address"),
        ({"backends": [{"url": "http://a:1/v1"}]}, "no address"),
        ({"backends": [{"url": "http://a:99999"}]}, "no address"),
        ({"backends": [{"url": "http://a:1"}, {"url": "http://a:1/"}]}, "given twice"),
        ({"tenants": [{"name": "a", "keys": ["short"]}]}, "too short"),
        ({"tenants": [{"name": n, "keys": ["same-key-1"]} for n in "ab"]}, "API key is given"),
        ({"dispatch": {"rule": "rounds-robin"}}, "no dispatch rule"),
        ({"dispatch": {"rule": "paper", "options": {"beta": 1}}}, "other options"),
        ({"limits": {"queued": 0}}, "queued"),
        ({"backend": []}, "unknown key"),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence(options: dict[str, Any], said: str) -> None:
    from trimtab.core.documents import validate

    with pytest.raises(BadInput) as refused:
        validate(RouterConfig, options, where="urgency.yaml")
    assert said in str(refused.value)
    assert "same-key-1" not in str(refused.value)


def test_the_state_is_plain_json() -> None:
    shown = page.state(Door([backend()], [tenant("a")]).queue, [backend()], Speeds(), 0.0, None)
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
