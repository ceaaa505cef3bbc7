"""Talking to the servers: requests as they came, answers byte for byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Set
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from trimtab.urgency.router.backends import Backend, BackendFailed, Queue, read_queue
from trimtab.urgency.router.pulse import Pulse, Span

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",  # codespell:ignore te
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_NOT_SENT = _HOP_BY_HOP | {b"host", b"content-length", b"expect"}
_KEPT_OPEN_S = 4.0
"""Less than the five seconds after which uvicorn closes a connection: none is used as it closes."""
_CONNECT_WITHIN_S = 5.0

Headers = list[tuple[bytes, bytes]]


class Answer:
    """An answer whose headers are here and whose body comes as the server sends it."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status

    def headers(self) -> Headers:
        """The headers that are the client's business, in their order."""
        return [
            (name.lower(), value)
            for name, value in self._response.raw_headers
            if name.lower() not in _HOP_BY_HOP
        ]

    @property
    def is_event_stream(self) -> bool:
        """Whether the body is server-sent events."""
        return self._response.content_type == "text/event-stream"

    @property
    def has_length(self) -> bool:
        """Whether the headers say how long the body is."""
        return self._response.content_length is not None

    async def read(self) -> bytes:
        """What has come of the body, at least a byte; nothing at its end.

        Raises:
            BackendFailed: the server has broken off.
        """
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise _failure(error) from None


class Upstream:
    """The connections to all servers."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._pulse = Pulse()
        self._beating: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Opens a pool of connections, as many as there are calls."""
        self._beating = asyncio.create_task(self._pulse.beat())
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_OPEN_S)
        self._session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("user-agent", "accept", "accept-encoding", "content-type"),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_WITHIN_S),
            read_bufsize=2**18,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._beating is not None:
            self._beating.cancel()
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def open(
        self,
        backend: Backend,
        method: str,
        target: str,
        headers: Iterable[tuple[str, str]],
        body: bytes,
    ) -> AsyncIterator[Answer]:
        """Sends a request; leaving the block before the answer's end cancels it at the server.

        Raises:
            BackendFailed: the server cannot be reached, or breaks off before it answers.
        """
        assert self._session is not None
        span = self._pulse.span()
        try:
            response = await self._session.request(
                method,
                URL(backend.url + target, encoded=True),
                headers=CIMultiDict(headers),
                data=body or None,
                allow_redirects=False,
            )
        except aiohttp.ConnectionTimeoutError:
            raise _too_late(_CONNECT_WITHIN_S, span, unsent=True) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _failure(error) from None
        try:
            yield Answer(response)
        finally:
            # Closes the connection where the answer has not ended, which is what cancels it.
            if response.content.at_eof():
                response.release()
            else:
                response.close()

    async def look(self, backend: Backend, within_s: float) -> Queue | None:
        """Asks a server for its health and its queue.

        Raises:
            BackendFailed: it is not well.
        """
        assert self._session is not None
        limit = aiohttp.ClientTimeout(total=within_s)
        span = self._pulse.span()
        headers = {"authorization": f"Bearer {backend.api_key}"} if backend.api_key else None
        try:
            async with self._session.get(
                f"{backend.url}/health", timeout=limit, headers=headers, allow_redirects=False
            ) as answer:
                if answer.status >= 500:
                    raise BackendFailed(f"/health answers {answer.status}")
            async with self._session.get(
                f"{backend.url}/metrics", timeout=limit, headers=headers, allow_redirects=False
            ) as answer:
                return read_queue(await answer.read()) if answer.status == 200 else None
        except TimeoutError:
            raise _too_late(within_s, span) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _failure(error) from None


def sent_headers(raw: Headers, backend: Backend, drop: Set[bytes]) -> list[tuple[str, str]]:
    """The headers for a server: the client's, less those of its connection and ``drop``."""
    sent = [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in raw
        if name not in _NOT_SENT and name not in drop
    ]
    if backend.api_key:
        sent.append(("authorization", f"Bearer {backend.api_key}"))
    return sent


def _too_late(within_s: float, span: Span, *, unsent: bool = False) -> BackendFailed:
    reason = f"it did not answer within {within_s:g} s"
    return BackendFailed(reason, unsent=unsent, excused=not span.kept)


def _failure(error: Exception) -> BackendFailed:
    nobody = isinstance(error, aiohttp.ClientConnectorError)
    return BackendFailed(str(error) or type(error).__name__, surely=nobody, unsent=nobody)
