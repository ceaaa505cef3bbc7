"""Carrying a request to a server and its answer back, whatever happens on either side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from trimtab.core.policy import Call, Outcome
from trimtab.hosts.vllm.middleware import Message, Receive, Scope, Send, request_headers
from trimtab.urgency.fields import parse
from trimtab.urgency.router.admission import AdmissionQueue, Ticket
from trimtab.urgency.router.backends import Backend, BackendFailed, PromptedCall
from trimtab.urgency.router.config import Limits
from trimtab.urgency.router.journeys import Journey, Journeys
from trimtab.urgency.router.metrics import Metrics
from trimtab.urgency.router.prefixes import blocks_of
from trimtab.urgency.router.refusals import Refusal
from trimtab.urgency.router.requests import BYTES_PER_TOKEN, Disconnected, Request, read_request
from trimtab.urgency.router.speeds import Speeds
from trimtab.urgency.router.tally import Tally
from trimtab.urgency.router.tenants import Tenant, Tenants
from trimtab.urgency.router.upstream import Answer, Headers, Upstream, sent_headers

_BUSY = frozenset({429, 502, 503, 504})
"""Answers of a server that cannot take the call now; another one may."""
_FAILING = frozenset({502, 503, 504})
_DEADLINE = b"x-workflow-deadline-ms"
_TENANT = b"x-workflow-tenant"
_KEYS = frozenset({b"authorization", b"x-api-key"})
_LEAST_DEADLINE_S = 0.001
_MOST_DEADLINE_S = 86_400.0


class _TryAnother(Exception):
    """A server failed a request before its client had a byte of an answer.

    Args:
        cause: one word, for the metrics.
        refusal: the answer if no other server is tried.
        unsent: whether the server never had the request.
    """

    def __init__(self, cause: str, refusal: Refusal, *, unsent: bool = False) -> None:
        super().__init__(cause)
        self.cause, self.refusal, self.unsent = cause, refusal, unsent


@dataclass(slots=True)
class _Reply:
    """The answer to the client; it begins once and ends once."""

    send: Send
    complete: bool = False

    async def start(self, status: int, headers: Headers) -> None:
        message: Message = {"type": "http.response.start", "status": status, "headers": headers}
        await self.send(message)

    async def body(self, chunk: bytes) -> None:
        await self.send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def end(self) -> None:
        self.complete = True
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def refuse(self, refusal: Refusal) -> None:
        self.complete = True
        await refusal.send(self.send)


@dataclass(slots=True)
class _Exchange:
    """A request, its client, and what was seen of the answer; ``ticket`` is a call's."""

    request: Request
    reply: _Reply
    tally: Tally
    read_s: float
    ticket: Ticket | None = None
    status: int = 0
    attempts: int = 0
    lost: int = 0
    tried: set[Backend] = field(default_factory=set)
    new_tokens: float = 0.0
    first_s: float = 0.0


class Proxy:
    """The ASGI application behind all paths that are not the router's own.

    Args:
        queue: where calls wait.
        backends: all servers.
        upstream: the connections to them.
        tenants: who may send.
        journeys: the workflows.
        speeds: learns from the answers.
        metrics: counts.
        limits: what is bounded.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        queue: AdmissionQueue,
        backends: Sequence[Backend],
        upstream: Upstream,
        tenants: Tenants,
        journeys: Journeys,
        speeds: Speeds,
        metrics: Metrics,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue, self._backends, self._upstream = queue, backends, upstream
        self._tenants, self._journeys, self._speeds = tenants, journeys, speeds
        self._metrics, self._limits, self._clock = metrics, limits, clock
        self._ids = count()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request, as ASGI has it."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003, "reason": "not routed"})
            return
        reply = _Reply(send)
        try:
            headers = request_headers(scope)
            tenant = self._tenants.of(headers)
            request = await read_request(scope, headers, receive, self._limits.body_bytes)
            exchange = _Exchange(request, reply, Tally(), self._clock())
            serve = self._serve_call if request.is_call else self._serve_light
            await _while_connected(receive, reply, serve(exchange, tenant))
        except Refusal as refusal:
            self._metrics.refused(refusal.status)
            await reply.refuse(refusal)
        except Disconnected:
            self._metrics.abandoned()

    async def _serve_call(self, exchange: _Exchange, tenant: Tenant) -> None:
        """Work: it waits for its turn, and its workflow is followed."""
        fields = tenant.fields_of(exchange.request.fields, known=self._tenants.have_keys)
        said = parse(fields)
        journey = self._journeys.of(tenant, said, exchange.read_s)
        stage = journey.enter(said)
        if journey.scoped_name is not None:
            fields = {**fields, "workflow": journey.scoped_name}
        ticket = self._ticket(exchange.request, fields, stage, journey, exchange.read_s)
        try:
            self._queue.enter(ticket)
            exchange.ticket = ticket
            outcome = Outcome.ABORTED
            try:
                outcome = await self._answer_call(ticket, exchange)
            except Refusal:
                outcome = Outcome.FAILED
                raise
            finally:
                backend = ticket.backend
                self._queue.leave(ticket, outcome, exchange.tally.output_tokens)
            if outcome is Outcome.COMPLETED and backend is not None:
                journey.answered += 1
                self._learn(ticket, backend, exchange)
        finally:
            self._journeys.leave(journey, self._clock())

    def _ticket(
        self,
        request: Request,
        fields: Any,
        stage: str,
        journey: Journey,
        now_s: float,
    ) -> Ticket:
        prompt_tokens = len(request.prompt) // BYTES_PER_TOKEN
        call = Call(
            call_id=str(next(self._ids)),
            arrival_s=now_s,
            prompt_tokens=prompt_tokens,
            max_output_tokens=request.max_output_tokens,
            fields=fields,
        )
        routed = PromptedCall(
            prompt_tokens=prompt_tokens,
            output_tokens=self._speeds.output_tokens(
                stage, said=fields.get("expected_output"), longest=request.max_output_tokens
            ),
            class_=journey.class_,
            stage=stage,
            workflow=journey.scoped_name,
            due_s=journey.deadline_s,
            blocks=blocks_of(request.prompt),
        )
        return Ticket(call, routed, journey.tenant, journey)

    async def _answer_call(self, ticket: Ticket, exchange: _Exchange) -> Outcome:
        """Sends a call to a server, and to another one for as long as its client has no byte."""
        while True:
            immediate = ticket.place is not None and ticket.place.done()
            backend = await self._queue.place(ticket)
            why = "retry" if exchange.attempts else "immediate" if immediate else "held"
            self._metrics.dispatched(backend.name, why)
            if not exchange.attempts:
                waited_s = ticket.sent_s - ticket.call.arrival_s
                self._metrics.admitted(ticket.tenant.name, waited_s)
                overhead_s = self._clock() - exchange.read_s - (0.0 if immediate else waited_s)
                self._metrics.took(max(0.0, overhead_s))
            exchange.new_tokens = ticket.routed.prompt_tokens - backend.known_tokens(ticket.routed)
            try:
                return await self._attempt(backend, exchange)
            except _TryAnother as failure:
                self._count_failure(backend, exchange, failure)
                self._queue.give_back(ticket)

    async def _serve_light(self, exchange: _Exchange, tenant: Tenant) -> None:
        """A question that is no work: any server that is up answers it at once."""
        while True:
            able = [b for b in self._backends if b.takes_calls]
            able = [b for b in able if b not in exchange.tried] or able
            if not able:
                raise Refusal(503, "No server is up.", retry_after_s=1.0)
            backend = min(able, key=lambda b: (b.backlog.in_flight, b.number))
            try:
                await self._attempt(backend, exchange)
                return
            except _TryAnother as failure:
                self._count_failure(backend, exchange, failure)

    def _count_failure(self, backend: Backend, exchange: _Exchange, failure: _TryAnother) -> None:
        """Counts a failure against the retries.

        Raises:
            Refusal: none is left. A request that no server ever had may be tried for longer: it
                cannot be what makes them fail.
        """
        self._metrics.retried(backend.name, failure.cause)
        exchange.tried.add(backend)
        exchange.attempts += 1
        exchange.lost += not failure.unsent
        if exchange.lost > self._limits.retries:
            raise failure.refusal from None

    async def _attempt(self, backend: Backend, exchange: _Exchange) -> Outcome:
        """Sends a request to a server, and passes its answer on.

        Raises:
            _TryAnother: the server has failed it, and the client knows nothing of it yet.
        """
        request = exchange.request
        headers = self._headers(backend, exchange)
        async with AsyncExitStack() as connection:
            answer, first = await self._begin(
                backend,
                connection,
                exchange,
                self._upstream.open(backend, request.method, request.target, headers, request.body),
            )
            if answer.status in _FAILING:
                backend.failed(f"it answers {answer.status}")
            else:
                backend.succeeded()
            if answer.status in _BUSY and self._another(backend, exchange):
                refusal = Refusal(answer.status, "The server is busy.", retry_after_s=1.0)
                raise _TryAnother("busy", refusal)
            return await self._pass_on(backend, answer, first, exchange)

    async def _begin(
        self, backend: Backend, connection: AsyncExitStack, exchange: _Exchange, opening: Any
    ) -> tuple[Answer, bytes]:
        """The answer of a server with the first piece of its body.

        Raises:
            _TryAnother: it was not to be had.
        """
        prompted = self._expect_prompt_read(exchange)
        silence = asyncio.timeout(self._limits.first_byte_s)
        try:
            async with silence:
                with backend.silence_watched(silence):
                    answer: Answer = await connection.enter_async_context(opening)
                    return answer, await answer.read()
        except TimeoutError:
            backend.failed("it kept silent")
            raise _TryAnother("silent", Refusal(504, "The server kept silent.")) from None
        except BackendFailed as failure:
            backend.failed_by(failure)
            refusal = Refusal(502, "The server broke off.")
            raise _TryAnother("lost", refusal, unsent=failure.unsent) from None
        finally:
            if prompted is not None:
                prompted.cancel()

    def _expect_prompt_read(self, exchange: _Exchange) -> asyncio.TimerHandle | None:
        """An answer in one piece does not show when its prompt was read: when predicted."""
        ticket = exchange.ticket
        if ticket is None or ticket.backend is None or exchange.request.streams:
            return None
        read_s = ticket.backend.backlog.predict(ticket.routed).prefill_s
        return asyncio.get_running_loop().call_later(read_s, self._queue.started, ticket)

    def _another(self, backend: Backend, exchange: _Exchange) -> bool:
        """Whether another server may be asked."""
        return exchange.lost < self._limits.retries and any(
            other.takes_calls and other is not backend and other not in exchange.tried
            for other in self._backends
        )

    async def _pass_on(
        self, backend: Backend, answer: Answer, chunk: bytes, exchange: _Exchange
    ) -> Outcome:
        """Passes an answer on as it comes; from here on there is no other."""
        exchange.status, exchange.first_s = answer.status, self._clock()
        if exchange.ticket is not None:
            self._queue.started(exchange.ticket)
        await exchange.reply.start(answer.status, answer.headers())
        try:
            while chunk:
                exchange.tally.note(chunk)
                await exchange.reply.body(chunk)
                async with asyncio.timeout(self._limits.stall_s):
                    chunk = await answer.read()
        except (TimeoutError, BackendFailed) as error:
            reason = str(error) or f"it paused for more than {self._limits.stall_s:g} s"
            backend.failed(reason)
            self._metrics.broke_off(backend.name)
            await self._break_off(answer, exchange)
            return Outcome.FAILED
        await exchange.reply.end()
        return Outcome.COMPLETED if answer.status == 200 else Outcome.FAILED

    async def _break_off(self, answer: Answer, exchange: _Exchange) -> None:
        """Ends an answer that cannot be completed: in its own terms, or by hanging up.

        Server-sent events end with an event that says so, which clients of the API raise as an
        error. Any other body is left without its end, so that nobody takes it for whole.
        """
        if answer.is_event_stream and not answer.has_length:
            separator = b"" if exchange.tally.between_events else b"\n\n"
            detail = Refusal(502, "The server broke off in the middle of its answer.").detail()
            await exchange.reply.body(separator + b"data: " + detail + b"\n\n")
            await exchange.reply.end()

    def _headers(self, backend: Backend, exchange: _Exchange) -> list[tuple[str, str]]:
        """The client's headers; a call's deadline as from when the server first heard of it."""
        drop = set(_KEYS) if self._tenants.have_keys or backend.api_key else set()
        added: list[tuple[str, str]] = []
        ticket = exchange.ticket
        if ticket is not None:
            journey = ticket.journey
            allowed_s = journey.allowed_at_s(backend.number, self._clock())
            if allowed_s is not None:
                drop.add(_DEADLINE)
                told_s = min(_MOST_DEADLINE_S, max(_LEAST_DEADLINE_S, allowed_s))
                added.append((_DEADLINE.decode(), f"{1000 * told_s:.3f}"))
        if self._tenants.have_keys:
            drop.add(_TENANT)
            if ticket is not None:
                added.append((_TENANT.decode(), ticket.tenant.name))
        return sent_headers(exchange.request.raw_headers, backend, drop) + added

    def _learn(self, ticket: Ticket, backend: Backend, exchange: _Exchange) -> None:
        streams = exchange.request.streams
        self._speeds.learn(
            ticket.routed.stage,
            backend.number,
            prompt_tokens=max(1.0, exchange.new_tokens),
            output_tokens=exchange.tally.output_tokens,
            first_s=exchange.first_s - ticket.sent_s if streams else None,
            total_s=self._clock() - ticket.sent_s,
        )


async def _while_connected(
    receive: Receive, reply: _Reply, work: Coroutine[Any, Any, None]
) -> None:
    """Does the work for as long as its client is there.

    Raises:
        Disconnected: it has gone; the work was cancelled.
    """
    worker = asyncio.current_task()
    assert worker is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        if not reply.complete:
            gone = True
            worker.cancel()

    watcher = asyncio.create_task(watch())
    try:
        await work
    except asyncio.CancelledError:
        if not gone or worker.uncancel():
            raise
        raise Disconnected from None
    finally:
        watcher.cancel()
