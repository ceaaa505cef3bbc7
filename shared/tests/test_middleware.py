"""The middleware at vLLM's door: which requests it reads, what it writes, what it refuses."""

from __future__ import annotations

import asyncio
import json

import pytest

from trimtab.core.policy import CallField
from trimtab.hosts.vllm import call_fields, options
from trimtab.hosts.vllm.middleware import BODY_LIMIT_BYTES, Middleware

FIELDS = {
    "workflow": CallField(str, "id", minimum=1, maximum=20, header="X-Workflow-ID"),
    "deadline_s": CallField(
        float,
        "seconds",
        minimum=0,
        maximum=86400,
        header="X-Workflow-Deadline-Ms",
        header_scale=0.001,
    ),
    "expected_output": CallField(int, "tokens", minimum=1, maximum=1e6),
}


@pytest.fixture(autouse=True)
def known_fields(monkeypatch):
    monkeypatch.setattr(options, "call_fields", lambda: FIELDS)


def post(body, headers=(), path="/v1/chat/completions", chunks=1, method="POST"):
    """What the app behind the middleware received, and what the client was answered."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = -(-len(raw) // chunks) or 1
    parts = [raw[i : i + size] for i in range(0, len(raw), size)] or [b""]
    messages = [
        {"type": "http.request", "body": part, "more_body": i < len(parts) - 1}
        for i, part in enumerate(parts)
    ]
    pending = iter(messages)
    received, sent = {}, []

    async def receive():
        return next(pending, {"type": "http.disconnect"})

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        content = b""
        more = True
        while more:
            message = await receive()
            content += message.get("body", b"")
            more = message.get("more_body", False)
        received.update(scope=scope, body=content, after=(await receive())["type"])

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(raw))]
        + [(name.lower().encode(), value.encode()) for name, value in headers],
    }
    asyncio.run(Middleware(app)(scope, receive, send))
    return received, sent


def refusal(sent):
    assert sent[0]["status"] == 400
    return json.loads(sent[1]["body"])["error"]


def test_a_request_that_says_nothing_passes_byte_for_byte():
    raw = b'{"model": "m",   "messages": []}'
    received, sent = post(raw, chunks=3)
    assert received["body"] == raw
    assert received["after"] == "http.disconnect"
    assert not sent


def test_headers_become_xargs_and_the_length_is_right():
    headers = [("X-Workflow-ID", "w1"), ("X-Workflow-Deadline-Ms", "1500")]
    received, _ = post({"model": "m", "vllm_xargs": {"a": 1, "trimtab.workflow": "body"}}, headers)
    content = json.loads(received["body"])
    assert content["vllm_xargs"] == {"a": 1, "trimtab.workflow": "w1", "trimtab.deadline_s": 1.5}
    lengths = [v for n, v in received["scope"]["headers"] if n == b"content-length"]
    assert lengths == [str(len(received["body"])).encode()]


@pytest.mark.parametrize(
    ("xargs", "named"),
    [
        ({"trimtab.deadline_s": "soon"}, "trimtab.deadline_s"),
        ({"trimtab.deadline_s": -1}, "trimtab.deadline_s"),
        ({"trimtab.deadline_s": 1e12}, "trimtab.deadline_s"),
        ({"trimtab.deadline_s": True}, "trimtab.deadline_s"),
        ({"trimtab.deadline_s": [1]}, "trimtab.deadline_s"),
        ({"trimtab.workflow": 7}, "trimtab.workflow"),
        ({"trimtab.workflow": ""}, "trimtab.workflow"),
        ({"trimtab.workflow": "w" * 21}, "trimtab.workflow"),
        ({"trimtab.expected_output": 1.5}, "trimtab.expected_output"),
    ],
)
def test_a_wrong_field_is_400_and_named(xargs, named):
    received, sent = post({"vllm_xargs": xargs})
    assert not received
    error = refusal(sent)
    assert named in error["message"]
    assert named in error["param"]


def test_nan_is_refused():
    _, sent = post(b'{"vllm_xargs": {"trimtab.deadline_s": NaN}}')
    assert "trimtab.deadline_s" in refusal(sent)["message"]


@pytest.mark.parametrize("value", ["soon", "nan", "inf", "-5", "1e300"])
def test_a_wrong_header_is_400_and_named(value):
    received, sent = post({}, [("X-Workflow-Deadline-Ms", value)])
    assert not received
    assert "X-Workflow-Deadline-Ms" in refusal(sent)["message"]


def test_an_unknown_key_is_ignored_with_one_warning(caplog, monkeypatch):
    monkeypatch.setattr(call_fields, "_warned", set())
    body = {"vllm_xargs": {"trimtab.deadline": 1, "trimtab.workflow": "w"}}
    for _ in range(3):
        received, sent = post(body)
        assert json.loads(received["body"]) == body
        assert not sent
    assert len(caplog.records) == 1
    assert "trimtab.deadline_s?" in caplog.text


@pytest.mark.parametrize("raw", [b"{", b"[]", b'"trimtab."', b'{"vllm_xargs": ["trimtab."]}', b""])
def test_what_is_no_request_is_left_to_vllm(raw):
    received, sent = post(raw, [("X-Workflow-ID", "w1")])
    assert not sent
    assert received["body"] == raw


@pytest.mark.parametrize(
    ("path", "method"), [("/metrics", "GET"), ("/v1/models", "GET"), ("/tokenize", "POST")]
)
def test_other_routes_pass(path, method):
    raw = b'{"vllm_xargs": {"trimtab.deadline_s": "soon"}}'
    received, sent = post(raw, path=path, method=method)
    assert received["body"] == raw
    assert not sent


def test_a_huge_body_passes_whole():
    raw = b" " * (BODY_LIMIT_BYTES + 1)
    received, _ = post(raw, [("X-Workflow-ID", "w1")], chunks=7)
    assert len(received["body"]) == len(raw)


def test_twice_in_a_row_is_once():
    calls = []

    async def app(scope, receive, send):
        calls.append(json.loads((await receive())["body"]))

    async def receive():
        return {"type": "http.request", "body": b'{"a": 1}', "more_body": False}

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"x-workflow-id", b"w")],
    }
    asyncio.run(Middleware(Middleware(app))(scope, receive, None))
    assert calls == [{"a": 1, "vllm_xargs": {"trimtab.workflow": "w"}}]
