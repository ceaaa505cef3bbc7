"""The response of a request that does not stream: held until it is whole, then one answer of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from trimtab.branches.asked import Asked
from trimtab.branches.late_scores import LateScores
from trimtab.branches.settling import BLOCK, Ended, settle, summary
from trimtab.hosts.vllm.middleware import Message, Send

Json = dict[str, Any]


class WholeResponse:
    """Takes the server's response and sends the client's; what is no success passes as it is.

    Args:
        send: to the client.
        asked: what the request asks.
        hide_ids: whether the client did not ask for the token ids that the response has.
        late: asks for scores that the engine still waited for.
    """

    def __init__(
        self, send: Send, asked: Asked, *, hide_ids: bool, late: LateScores | None = None
    ) -> None:
        self._send = send
        self._asked = asked
        self._hide_ids = hide_ids
        self._late = late
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

    async def close(self) -> None:
        """The server says no more."""

    async def _finish(self, start: Message) -> None:
        body = await self._answered(b"".join(self._body))
        headers = [(n, v) for n, v in start["headers"] if n.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def _answered(self, body: bytes) -> bytes:
        """A response with one choice for each prompt; anything but one with choices stays."""
        # The extractors may take a while: they must not hold up the server's other requests.
        read = await asyncio.to_thread(_read, body, self._asked.branches)
        if read is None:
            return body
        response, groups = read
        if self._late is not None:
            groups = await self._late.added(groups)
        return await asyncio.to_thread(_answer, response, groups, self._asked, self._hide_ids)


def _is_answer(start: Message) -> bool:
    kind = dict(start.get("headers", ())).get(b"content-type", b"")
    return bool(start["status"] == 200 and kind.startswith(b"application/json"))


def _read(body: bytes, branches: int) -> tuple[Json, list[list[Ended]]] | None:
    """A response and the branches of each of its prompts; None if it has none."""
    try:
        response = json.loads(body)
        choices = sorted(response["choices"], key=lambda choice: choice["index"])
    except (ValueError, KeyError, TypeError):
        return None
    ended = [_ended(choice, response) for choice in choices]
    return response, [ended[i : i + branches] for i in range(0, len(ended), branches)]


def _ended(choice: Json, response: Json) -> Ended:
    ids = choice.get("token_ids")
    if not isinstance(ids, list):
        return Ended(choice)
    prompt = choice.get("prompt_token_ids") or response.get("prompt_token_ids")
    return Ended(choice, len(ids), ids=(prompt, ids) if isinstance(prompt, list) else None)


def _answer(
    response: Json, groups: Sequence[Sequence[Ended]], asked: Asked, hide_ids: bool
) -> bytes:
    spent = (response.get("usage") or {}).get("completion_tokens")
    settled = [settle(group, asked, spent if len(groups) == 1 else None) for group in groups]
    chosen = [
        {**group[i].choice, "stop_reason": one.stops[i], BLOCK: one.told[i]}
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


def _forget_ids(part: Json) -> None:
    for name in ("token_ids", "prompt_token_ids"):
        if name in part:
            part[name] = None
