"""What a client sent: its body, read within bounds, and what it says of the call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.core.errors import BadInput
from trimtab.core.policy import FieldValue
from trimtab.hosts.vllm import call_fields, options
from trimtab.hosts.vllm.middleware import Receive, Scope
from trimtab.urgency.router.refusals import Refusal

BYTES_PER_TOKEN = 4
"""About how long a token of a prompt is: the router has no tokeniser."""

_LIGHT = frozenset({"/tokenize", "/detokenize"})
_LENGTHS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


class Disconnected(Exception):
    """The client has gone."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request whose body is here.

    Attributes:
        method: as in HTTP.
        target: path and query as the client wrote them.
        headers: by lower-case name.
        raw_headers: in their order.
        body: as the client sent it.
        is_call: whether it is work that waits for its turn.
        streams: whether the answer is to come in pieces.
        fields: what it says of the call, checked.
        prompt: the text that the model is given, as far as it is text.
        max_output_tokens: the most it may generate; 0 where it does not say.
    """

    method: str
    target: str
    headers: Mapping[str, str]
    raw_headers: list[tuple[bytes, bytes]]
    body: bytes
    is_call: bool = False
    streams: bool = False
    fields: Mapping[str, FieldValue] = field(default_factory=dict)
    prompt: bytes = b""
    max_output_tokens: int = 0


def target_of(scope: Scope) -> str:
    """Path and query, still escaped as the client wrote them."""
    path: str = scope.get("raw_path", scope["path"].encode()).decode("latin-1").partition("?")[0]
    query: str = scope["query_string"].decode("latin-1")
    return f"{path}?{query}" if query else path


async def read_request(
    scope: Scope, headers: Mapping[str, str], receive: Receive, limit_bytes: int
) -> Request:
    """Reads a request whole.

    Raises:
        Refusal: its body is too long, or a field of it cannot be.
        Disconnected: the client went meanwhile.
    """
    body = await _read_body(receive, headers.get("content-length", "0"), limit_bytes)
    method, target, raw = scope["method"], target_of(scope), list(scope["headers"])
    if method != "POST" or scope["path"].rstrip("/") in _LIGHT:
        return Request(method, target, headers, raw, body)
    content = _json_object(body)
    try:
        fields = _fields(content, headers)
    except BadInput as error:
        raise Refusal.of(error) from None
    return Request(
        method,
        target,
        headers,
        raw,
        body,
        is_call=True,
        streams=content.get("stream") is True,
        fields=fields,
        prompt=_prompt(content),
        max_output_tokens=_longest(content),
    )


async def _read_body(receive: Receive, said: str, limit_bytes: int) -> bytes:
    too_long = Refusal(413, f"The request's body is longer than {limit_bytes:,} bytes.")
    if said.isdigit() and int(said[:20]) > limit_bytes:
        raise too_long
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > limit_bytes:
            raise too_long
        chunks.append(chunk)
        if not message.get("more_body"):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _json_object(body: bytes) -> dict[str, Any]:
    """The body's JSON object; an empty one for anything else, which is the server's to judge."""
    try:
        content = json.loads(body) if body else None
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _fields(content: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, FieldValue]:
    """What the body and the headers say of the call; the headers win.

    Raises:
        BadInput: a field has the wrong type or is out of range.
    """
    known = options.call_fields()
    xargs = content.get("vllm_xargs")
    said = call_fields.from_xargs(xargs if isinstance(xargs, dict) else {}, known)
    return {**said, **call_fields.from_headers(headers, known)}


def _prompt(content: Mapping[str, Any]) -> bytes:
    """The prompt's text, in the order in which the model reads it."""
    messages = content.get("messages")
    if not isinstance(messages, list):
        return _text(content.get("prompt", content.get("input", "")))
    return b"".join(
        _text(message.get("role")) + _text(message.get("content"))
        for message in messages
        if isinstance(message, dict)
    )


def _text(value: Any) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "surrogatepass")


def _longest(content: Mapping[str, Any]) -> int:
    limits = (content.get(name) for name in _LENGTHS)
    return next((limit for limit in limits if type(limit) is int and limit > 0), 0)
