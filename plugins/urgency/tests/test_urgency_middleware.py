from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from trimtab.core.errors import BadInput
from trimtab.hosts.vllm.middleware import BODY_LIMIT_BYTES
from trimtab.urgency import PriorityMiddleware, UrgencyConfig
from trimtab.urgency.middleware import VARIABLE

CHAT = {"model": "m", "messages": [{"role": "user", "content": "héllo"}], "max_tokens": 9}


class Clock:
    """A clock that tests turn."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Backend:
    """An ASGI server that notes what it got and answers as it is told."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.bodies: list[bytes] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.takes_s = 0.0
        self.status = 200
        self.breaks = False
        self.chunks = [b'{"usage":{"prompt_tokens":3,"completion_tokens":7}}']

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        self.headers.append(dict(scope["headers"]))
        if self.breaks:
            raise ConnectionError
        self.clock.now_s += self.takes_s
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        for chunk in self.chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Door:
    """The middleware before a backend, with a client."""

    def __init__(self, config: UrgencyConfig) -> None:
        self.clock = Clock()
        self.backend = Backend(self.clock)
        self.middleware = PriorityMiddleware(self.backend, config, self.clock)

    def post(self, body=CHAT, headers=None, path="/v1/chat/completions"):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def send():
            transport = httpx.ASGITransport(self.middleware)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                return await client.post(path, content=content, headers=headers)

        return asyncio.run(send())

    def priority(self, body=CHAT, headers=None, path="/v1/chat/completions"):
        assert self.post(body, headers, path).status_code == 200
        return json.loads(self.backend.bodies[-1])["priority"]


@pytest.fixture
def door():
    return Door(UrgencyConfig())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_headers_become_a_priority_in_microseconds(door, path):
    headers = {"X-Workflow-ID": "w", "X-Workflow-Deadline-Ms": "2500", "X-Workflow-Stage": "sql"}
    assert door.priority(headers=headers, path=path) == 1_002_500_000
    assert json.loads(door.backend.bodies[0]) == {**CHAT, "priority": 1_002_500_000}


def test_the_body_says_the_same_and_headers_win(door):
    body = {**CHAT, "vllm_xargs": {"trimtab.deadline_s": 4}}
    assert door.priority(body) == 1_004_000_000
    assert door.priority(body, {"X-Workflow-Deadline-Ms": "1000"}) == 1_001_000_000


def test_the_length_of_the_changed_body_is_right(door):
    door.post()
    body, headers = door.backend.bodies[0], door.backend.headers[0]
    assert int(headers[b"content-length"]) == len(body)


def test_an_earlier_deadline_has_a_smaller_priority_and_no_deadline_means_a_minute(door):
    soon = door.priority(headers={"X-Workflow-Deadline-Ms": "1000"})
    later = door.priority(headers={"X-Workflow-Deadline-Ms": "90000"})
    assert soon < door.priority() == 1_060_000_000 < later


def test_priorities_fit_64_bits(door):
    door.clock.now_s = 1e15
    priority = door.priority(headers={"X-Workflow-Deadline-Ms": "86400000"})
    assert -(2**63) <= priority < 2**63


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({**CHAT, "priority": 0}, None),
        ({**CHAT, "priority": -5}, None),
        (CHAT, {"X-Vllm-Priority": "3"}),
    ],
)
def test_a_priority_of_the_client_is_left_alone(door, body, headers):
    door.post(body, headers)
    assert json.loads(door.backend.bodies[0]) == body


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b"not json", "/v1/chat/completions"),
        (b"", "/v1/chat/completions"),
        (b"[1]", "/v1/completions"),
        (b"[" * 200_000, "/v1/completions"),
        (b"\xff\xfe{", "/v1/completions"),
        (b'{"priority_free": 1}', "/v1/embeddings"),
        (b'{"max_tokens": 4}', "/v1/messages"),
        (b'{"model": "' + b"m" * BODY_LIMIT_BYTES + b'"}', "/v1/completions"),
    ],
    ids=[
        "text",
        "empty",
        "list",
        "nested",
        "binary",
        "other path",
        "no priority there",
        "too long",
    ],
)
def test_what_is_not_ours_passes_untouched(door, body, path):
    assert door.post(body, {"X-Workflow-ID": "w"}, path).status_code == 200
    assert door.backend.bodies == [body]


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"X-Workflow-Deadline-Ms": "soon"}, "X-Workflow-Deadline-Ms"),
        ({"X-Workflow-Deadline-Ms": "-1"}, "X-Workflow-Deadline-Ms"),
        ({"X-Workflow-Deadline-Ms": "99999999999"}, "X-Workflow-Deadline-Ms"),
        ({"X-Workflow-Expected-Output": "nan"}, "X-Workflow-Expected-Output"),
        ({"X-Workflow-ID": "w" * 500}, "trimtab.workflow"),
    ],
)
def test_a_bad_header_is_answered_with_its_name(door, headers, name):
    answer = door.post(headers=headers)
    assert answer.status_code == 400
    assert name in answer.json()["error"]["message"]
    assert door.backend.bodies == []


def test_a_bad_field_of_the_body_is_answered_with_its_name(door):
    answer = door.post({**CHAT, "vllm_xargs": {"trimtab.deadline_s": "soon"}})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert "trimtab.deadline_s" in error["message"]
    assert error["type"] == "BadRequestError"


def test_the_response_streams_through_untouched_and_teaches_the_estimator(door):
    door.backend.chunks = [b'data: {"a":1}\n\n', b"data: [DONE]\n\n"]
    door.backend.takes_s = 5.0
    headers = {"X-Workflow-ID": "w", "X-Workflow-Deadline-Ms": "60000"}
    for stage in ("plan", "write"):
        answer = door.post(headers={**headers, "X-Workflow-Stage": stage})
        assert answer.content == b"".join(door.backend.chunks)
    due = door.priority(
        headers={
            "X-Workflow-ID": "v",
            "X-Workflow-Deadline-Ms": "60000",
            "X-Workflow-Stage": "plan",
        }
    )
    # 5 s of writing follow a plan, but for the weight of the prior.
    assert due == pytest.approx((1010 + 60 - 5) * 1e6, abs=0.6e6)


def test_each_chunk_is_passed_on_when_it_comes(door):
    events = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(3):
            events.append(f"made {number}")
            await send({"type": "http.response.body", "body": b"x", "more_body": number < 2})

    async def send(message):
        if message["type"] == "http.response.body":
            events.append("sent")

    async def receive():
        return {"type": "http.request", "body": b"{}", "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(PriorityMiddleware(app, UrgencyConfig())(scope, receive, send))
    assert events == ["made 0", "sent", "made 1", "sent", "made 2", "sent"]


@pytest.mark.parametrize("fault", ["status", "exception"])
def test_nothing_is_learnt_or_kept_of_a_request_that_failed(door, fault):
    door.backend.takes_s, door.backend.status = 50.0, 503
    if fault == "exception":
        door.backend.breaks = True
        with pytest.raises(ConnectionError):
            door.post()
    else:
        assert door.post().status_code == 503
    assert not door.middleware._policy._calls
    assert door.middleware._policy._estimator.service_s("default", "#1") == 0.0


def test_other_kinds_of_connection_pass():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(PriorityMiddleware(app, UrgencyConfig())({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]


def test_options_come_from_the_environment(monkeypatch):
    monkeypatch.setenv(VARIABLE, '{"default_deadline_s": 5}')
    clock = Clock()
    backend = Backend(clock)
    PriorityMiddleware(backend, clock=clock)
    for wrong, word in (("{", "JSON"), ('{"ordr": "edd"}', "ordr"), ("[]", VARIABLE)):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(BadInput, match=word):
            PriorityMiddleware(backend)
