"""A server without a model, on a real socket: what tests break, and benchmarks measure against.

It speaks as much of HTTP/1.1 and of the OpenAI API as a router needs, counts what it was asked and
what it has answered, and dies, hangs or breaks off when told to.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

ID_HEADER = "x-request-id"
"""By this header of a request the stub counts it."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that the stub has read."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def streams(self) -> bool:
        """Whether the answer is to come in pieces."""
        with suppress(ValueError):
            content = json.loads(self.body)
            return isinstance(content, dict) and content.get("stream") is True
        return False


class Stub:
    """One server, for the length of an ``async with`` block.

    Attributes:
        tokens: how many tokens an answer has.
        first_s: seconds before the first of them.
        token_s: seconds before each of the others.
        seats: calls that run at once; the others wait inside.
        status: what calls are answered with.
        breaks_after: events after which it aborts the connection; None for never.
        silent: whether it answers nothing at all, though it listens.
        healthy: whether ``/health`` says so.
        asked: the calls it has read, in their order.
        begun: by id, how often a call's first byte was sent.
        completed: by id, how often a call's answer was sent whole.
        aborted: calls whose connection was closed before their answer's end.
    """

    def __init__(
        self,
        *,
        tokens: int = 3,
        first_s: float = 0.0,
        token_s: float = 0.0,
        seats: int = 1000,
        port: int = 0,
    ) -> None:
        self.tokens, self.first_s, self.token_s = tokens, first_s, token_s
        self.status = 200
        self.breaks_after: int | None = None
        self.silent = False
        self.healthy = True
        self.asked: list[Asked] = []
        self.begun: Counter[str] = Counter()
        self.completed: Counter[str] = Counter()
        self.aborted = 0
        self.running = self.waiting = 0
        self.port = port
        self.most_running = 0
        self._seats = asyncio.Semaphore(seats)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.revive()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.die()

    async def revive(self) -> None:
        """Listens, again on the same port."""
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def die(self) -> None:
        """Ends as a killed process does: nobody listens, and every connection is reset."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while (asked := await _read(reader)) is not None:
                await self._answer(asked, reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the connection's end is the task's
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(
        self, asked: Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self.silent:
            await reader.read()
        elif asked.target == "/health":
            await _plain(writer, 200 if self.healthy else 503, b"")
        elif asked.target == "/metrics":
            await _plain(writer, 200, self._metrics())
        elif asked.method == "POST" and self.status == 200:
            await self._answer_call(asked, reader, writer)
        else:
            status = self.status if asked.method == "POST" else 200
            await _plain(writer, status, json.dumps({"target": asked.target}).encode())

    def _metrics(self) -> bytes:
        labels = 'engine="0",model_name="model"'
        return (
            "# HELP vllm:num_requests_running Number of requests in the batch.\n"
            "# TYPE vllm:num_requests_running gauge\n"
            f"vllm:num_requests_running{{{labels}}} {float(self.running)}\n"
            f"vllm:num_requests_waiting{{{labels}}} {float(self.waiting)}\n"
        ).encode()

    async def _answer_call(
        self, asked: Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.asked.append(asked)
        name = asked.headers.get(ID_HEADER, "")
        self.waiting += 1
        try:
            await self._seats.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            whole = await self._generate(asked, name, reader, writer)
        except OSError:
            whole = False
        finally:
            self.running -= 1
            self._seats.release()
        self.completed[name] += whole
        self.aborted += not whole

    async def _generate(
        self, asked: Asked, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answers a call; returns whether the answer was sent whole."""
        pieces = self._events(name) if asked.streams else self._whole(name)
        head = _EVENTS_HEAD if asked.streams else b""
        sent = 0
        async for piece in pieces:
            if reader.at_eof() or writer.is_closing():
                writer.close()
                return False
            if self.breaks_after is not None and sent >= self.breaks_after:
                writer.transport.abort()
                return False
            self.begun[name] += not sent
            writer.write(head + piece)
            await writer.drain()
            head = b""
            sent += 1
        if asked.streams:
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        return True

    async def _events(self, name: str) -> AsyncIterator[bytes]:
        for number in range(self.tokens):
            await _pause(self.token_s if number else self.first_s)
            delta = {"index": 0, "delta": {"content": f"{name}-{number} "}}
            yield _chunk(_event({"object": "chat.completion.chunk", "choices": [delta]}))
        usage = {"completion_tokens": self.tokens}
        yield _chunk(_event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")

    async def _whole(self, name: str) -> AsyncIterator[bytes]:
        await _pause(self.first_s + self.token_s * max(0, self.tokens - 1))
        text = " ".join(f"{name}-{number}" for number in range(self.tokens))
        content = {
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}],
            "usage": {"completion_tokens": self.tokens},
        }
        body = json.dumps(content).encode()
        yield _head(200, "application/json", f"content-length: {len(body)}") + body


async def _pause(seconds: float) -> None:
    if seconds > 0:
        await asyncio.sleep(seconds)


async def _read(reader: asyncio.StreamReader) -> Asked | None:
    """The next request of a connection; None at its end."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    pairs = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Asked(method, target, headers, body)


async def _plain(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
    writer.write(_head(status, "text/plain", f"content-length: {len(body)}") + body)
    with suppress(OSError):
        await writer.drain()


def _head(status: int, kind: str, framing: str) -> bytes:
    lines: Iterable[str] = (f"HTTP/1.1 {status} X", f"content-type: {kind}", framing, "", "")
    return "\r\n".join(lines).encode()


_EVENTS_HEAD = _head(200, "text/event-stream; charset=utf-8", "transfer-encoding: chunked")


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def _chunk(piece: bytes) -> bytes:
    return f"{len(piece):x}\r\n".encode() + piece + b"\r\n"


async def _serve(port: int) -> None:
    async with Stub(port=port) as stub:
        print(stub.url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
