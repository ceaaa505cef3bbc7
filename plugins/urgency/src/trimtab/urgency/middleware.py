"""The level without private surface: workflow headers become vLLM's own integer ``priority``."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from trimtab.core.documents import parse_json, validate
from trimtab.core.errors import BadInput
from trimtab.core.policy import Call, FieldValue, Outcome
from trimtab.hosts.vllm import call_fields, options
from trimtab.hosts.vllm.middleware import (
    App,
    Message,
    Receive,
    Scope,
    Send,
    generates,
    json_object,
    read_body,
    refuse,
    request_headers,
    with_body,
)
from trimtab.urgency.config import UrgencyConfig
from trimtab.urgency.policy import UrgencyPolicy

VARIABLE = "TRIMTAB_URGENCY"
"""The environment variable with the options as JSON: ``--middleware`` takes none."""

PRIORITY_HEADER = "x-vllm-priority"
PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})
"""The routes whose JSON body takes ``priority``."""

_LIMIT = 2**62
_LENGTHS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_USAGE = re.compile(rb'"(?:completion|output)_tokens":\s*(\d{1,9})')


def options_from_environment() -> UrgencyConfig:
    """The options in `VARIABLE`, or the defaults.

    Raises:
        BadInput: they are no JSON, or wrong.
    """
    text = os.environ.get(VARIABLE, "").strip() or "{}"
    return validate(UrgencyConfig, parse_json(text, where=VARIABLE), where=VARIABLE)


class PriorityMiddleware:
    """``vllm serve --scheduling-policy priority --middleware trimtab.urgency.PriorityMiddleware``.

    The priority is the call's key in microseconds of the machine's monotonic clock, so that several
    API servers of one machine agree; it is fixed on arrival. A priority that the client gives,
    in the body or in ``X-Vllm-Priority``, is left alone.

    Args:
        app: the server behind it.
        config: the options; those of the environment by default.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        app: App,
        config: UrgencyConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._clock = clock
        self._policy = UrgencyPolicy(config if config is not None else options_from_environment())
        self._ids = count()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request, as ASGI has it."""
        if not generates(scope) or scope["path"].rstrip("/") not in PATHS:
            await self._app(scope, receive, send)
            return
        headers = request_headers(scope)
        try:
            said = call_fields.from_headers(headers, options.call_fields())
        except BadInput as error:
            await refuse(send, error)
            return
        body, receive = await read_body(receive)
        content = json_object(body)
        if content is None:
            await self._app(scope, receive, send)
            return
        try:
            call = self._arrive(content, said)
        except BadInput as error:
            await refuse(send, error)
            return
        watched = _Response(send)
        try:
            if "priority" not in content and PRIORITY_HEADER not in headers:
                content["priority"] = self._priority(call)
                scope, receive = with_body(scope, receive, json.dumps(content).encode())
            self._policy.on_admission(call, call.arrival_s)
            await self._app(scope, receive, watched)
        finally:
            call.output_tokens = watched.output_tokens
            self._policy.on_finish(call, watched.outcome, self._clock())
            self._policy.stale.clear()

    def _arrive(self, content: Mapping[str, Any], headers: Mapping[str, FieldValue]) -> Call:
        """The request as a call of the policy.

        Raises:
            BadInput: a field of the body has the wrong type or is out of range.
        """
        xargs = content.get("vllm_xargs")
        said = call_fields.from_xargs(
            xargs if isinstance(xargs, dict) else {}, options.call_fields()
        )
        now_s = self._clock()
        call = Call(
            call_id=str(next(self._ids)),
            arrival_s=now_s,
            prompt_tokens=0,
            max_output_tokens=_longest(content),
            fields={**said, **headers},
            # The queue is not seen from here: a call counts as served from its arrival.
            admitted_s=now_s,
        )
        self._policy.on_arrival(call, now_s)
        return call

    def _priority(self, call: Call) -> int:
        return max(-_LIMIT, min(_LIMIT, int(self._policy.fixed_key_s(call) * 1e6)))


class _Response:
    """Passes a response on untouched, and notes how it ended and how long it was."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.outcome = Outcome.ABORTED
        self._status = 0
        self._events = 0
        self._said = 0

    @property
    def output_tokens(self) -> int:
        """The output's length as the response says, or else its number of events."""
        return self._said or self._events

    async def __call__(self, message: Message) -> None:
        """Sends a message, as ASGI has it."""
        await self._send(message)
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif message["type"] == "http.response.body":
            self._note(message.get("body", b""))
            if not message.get("more_body"):
                completed = self._status == 200
                self.outcome = Outcome.COMPLETED if completed else Outcome.FAILED

    def _note(self, chunk: bytes) -> None:
        self._events += chunk.count(b"data:")
        for found in _USAGE.finditer(chunk):
            self._said = int(found[1])


def _longest(content: Mapping[str, Any]) -> int:
    """The most tokens that a request may generate; 0 where it does not say."""
    limits = (content.get(name) for name in _LENGTHS)
    return next((limit for limit in limits if type(limit) is int and limit > 0), 0)
