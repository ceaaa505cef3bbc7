"""Headers and ``vllm_xargs`` at the server's door: read, checked, and handed to the engine."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from trimtab.core.errors import BadInput
from trimtab.core.policy import FIELD_PREFIX
from trimtab.hosts.vllm import call_fields, options

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

GENERATING_PATHS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
)
"""The routes whose JSON body takes ``vllm_xargs``."""

BODY_LIMIT_BYTES = 64 * 2**20
"""A longer body passes unread: it is the server's to judge."""

_MARK = FIELD_PREFIX.encode()
_SEEN = "trimtab.checked"


def request_headers(scope: Scope) -> dict[str, str]:
    """The headers of an HTTP scope by lower-case name."""
    return {
        name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
    }


async def read_body(
    receive: Receive, limit_bytes: int = BODY_LIMIT_BYTES
) -> tuple[bytes | None, Receive]:
    """Reads a request's body, and makes a ``receive`` that replays it.

    A body over the limit comes back as None, with a ``receive`` that still yields all of it.
    """
    messages: list[Message] = []
    size = 0
    while True:
        message = await receive()
        messages.append(message)
        size += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body") or size > limit_bytes:
            break
    pending = iter(messages)

    async def replay() -> Message:
        return next(pending, None) or await receive()

    whole = b"".join(message.get("body", b"") for message in messages)
    return (None if size > limit_bytes else whole), replay


def with_body(scope: Scope, receive: Receive, body: bytes) -> tuple[Scope, Receive]:
    """The scope and ``receive`` of the same request with another body."""
    headers = [(n, v) for n, v in scope["headers"] if n.lower() != b"content-length"]
    headers.append((b"content-length", str(len(body)).encode()))
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return {**scope, "headers": headers}, replay


def json_object(body: bytes | None) -> dict[str, Any] | None:
    """The body's JSON object; None for anything else, which is the server's to judge."""
    try:
        content = json.loads(body) if body else None
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def additional_config(scope: Scope) -> object:
    """The server's ``--additional-config``, from what vLLM keeps in its application's state."""
    state = getattr(scope.get("app"), "state", None)
    return getattr(getattr(state, "vllm_config", None), "additional_config", None)


async def refuse(send: Send, error: BadInput) -> None:
    """Answers 400 as the OpenAI API does; ``param`` names the field or header."""
    param = error.where.removeprefix("header ").removeprefix("vllm_xargs, ")
    detail = {"message": str(error), "type": "BadRequestError", "param": param, "code": 400}
    body = json.dumps({"error": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def generates(scope: Scope) -> bool:
    """Whether a request asks for generation, with a JSON body."""
    return (
        scope["type"] == "http"
        and scope["method"] == "POST"
        and scope["path"].rstrip("/") in GENERATING_PATHS
    )


class Middleware:
    """``vllm serve --middleware trimtab.hosts.vllm.Middleware``: checks call fields, reads headers.

    A request that says nothing to trimtab passes unparsed. One with a field of the wrong type is
    answered with 400 and the field's name; headers are written into the body's ``vllm_xargs``,
    and win over what the body says.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not generates(scope) or scope.get(_SEEN):
            await self._app(scope, receive, send)
            return
        scope[_SEEN] = True
        known = options.call_fields()
        try:
            said = call_fields.from_headers(request_headers(scope), known)
        except BadInput as error:
            await refuse(send, error)
            return
        body, receive = await read_body(receive)
        if body is not None and (said or _MARK in body):
            try:
                body = _merged(body, said)
            except BadInput as error:
                await refuse(send, error)
                return
            scope, receive = with_body(scope, receive, body)
        await self._app(scope, receive, send)


def _merged(body: bytes, said: dict[str, Any]) -> bytes:
    """The body with the headers' fields among its ``vllm_xargs``, all of them checked.

    A body that is no JSON object comes back as it is: vLLM has its own answer to it.

    Raises:
        BadInput: a field of the body has the wrong type.
    """
    try:
        content = json.loads(body)
    except ValueError:
        return body
    if not isinstance(content, dict):
        return body
    xargs = content.get("vllm_xargs") or {}
    if not isinstance(xargs, dict):
        return body
    call_fields.from_xargs(xargs, options.call_fields())
    if not said:
        return body
    said = {FIELD_PREFIX + name: value for name, value in said.items()}
    return json.dumps({**content, "vllm_xargs": {**xargs, **said}}).encode()
