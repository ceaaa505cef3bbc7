"""The response of a request that does not stream: held until it is whole, then one answer of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from trimtab.branches.asked import Asked
from trimtab.branches.settling import BLOCK, Ended, settle, summary
from trimtab.hosts.vllm.middleware import Message, Send


class WholeResponse:
    """Takes the server's response and sends the client's; what is no success passes as it is.

    Args:
        send: to the client.
        asked: what the request asks.
        hide_ids: whether the token ids are there for the count alone.
    """

    def __init__(self, send: Send, asked: Asked, hide_ids: bool) -> None:
        self._send = send
        self._asked = asked
        self._hide_ids = hide_ids
        self._start: Message | None = None
        self._body: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        """Takes a message of the server, as ASGI has it."""
        if message["type"] == "http.response.start" and _is_answer(message):
            self._start = message
        elif message["type"] == "http.response.body" and self._start is not None:
            self._body.append(message.get("body", b""))
            if not message.get("more_body"):
                await self._finish(self._start)
        else:
            await self._send(message)

    async def _finish(self, start: Message) -> None:
        # The extractors may take a while: they must not hold up the server's other requests.
        body = await asyncio.to_thread(_answered, b"".join(self._body), self._asked, self._hide_ids)
        headers = [(n, v) for n, v in start["headers"] if n.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _is_answer(start: Message) -> bool:
    kind = dict(start.get("headers", ())).get(b"content-type", b"")
    return bool(start["status"] == 200 and kind.startswith(b"application/json"))


def _answered(body: bytes, asked: Asked, hide_ids: bool) -> bytes:
    """A response with one choice for each prompt; anything but a response with choices stays."""
    try:
        response = json.loads(body)
        choices = sorted(response["choices"], key=lambda choice: choice["index"])
    except (ValueError, KeyError, TypeError):
        return body
    groups = [choices[i : i + asked.branches] for i in range(0, len(choices), asked.branches)]
    spent = (response.get("usage") or {}).get("completion_tokens")
    known = [[Ended(choice, _ids(choice)) for choice in group] for group in groups]
    settled = [settle(group, asked, spent if len(groups) == 1 else None) for group in known]
    chosen = [
        {**group[i], "stop_reason": one.stops[i], BLOCK: one.told[i]}
        for group, one in zip(groups, settled, strict=True)
        for i in one.shown
    ]
    for index, choice in enumerate(chosen):
        choice["index"] = index
        if hide_ids:
            _forget_ids(choice)
    if hide_ids:
        _forget_ids(response)
    answer = {**response, "choices": chosen, BLOCK: summary(settled, asked)}
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()


def _ids(choice: dict[str, Any]) -> int | None:
    ids = choice.get("token_ids")
    return len(ids) if isinstance(ids, list) else None


def _forget_ids(part: dict[str, Any]) -> None:
    for name in ("token_ids", "prompt_token_ids"):
        if name in part:
            part[name] = None
