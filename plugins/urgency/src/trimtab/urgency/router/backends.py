"""The servers behind the router: what each does now, how it fares, and who gets no calls."""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from trimtab.urgency.dispatch import Backlog, Prediction, RoutedCall
from trimtab.urgency.router.config import BackendOptions, HealthOptions
from trimtab.urgency.router.prefixes import PrefixMemory
from trimtab.urgency.router.requests import BYTES_PER_TOKEN
from trimtab.urgency.router.speeds import Speeds

if TYPE_CHECKING:
    from trimtab.urgency.router.admission import Ticket

logger = logging.getLogger(__name__)

_FIRST_SEATS = 16
_MOST_SEATS = 1024
_SEATS_WITHOUT_METRICS = 64
_GOOD_LOOKS = 3
"""A server back from an outage gets one call at a time until one is answered, or so many looks
were good."""
_GAUGE = rb"^vllm:num_requests_%s(?:\{[^}\n]*\})? ([0-9.eE+]+)"
_RUNNING = re.compile(_GAUGE % b"running", re.MULTILINE)
_WAITING = re.compile(_GAUGE % b"waiting", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Queue:
    """What a server says of itself on ``/metrics``."""

    running: int
    waiting: int


def read_queue(metrics: bytes) -> Queue | None:
    """The queue in vLLM's metrics, summed over its engines; None where they do not tell.

    Only two lines of some thousand are read: to parse the whole text takes many milliseconds, for
    which no call would move.
    """
    running, waiting = _RUNNING.findall(metrics), _WAITING.findall(metrics)
    if not running or not waiting:
        return None
    try:
        return Queue(*(int(sum(map(float, values))) for values in (running, waiting)))
    except (ValueError, OverflowError):
        return None


class State(Enum):
    """Whether a server gets calls."""

    UP = "up"
    TRIAL = "trial"
    DOWN = "down"


class LiveBacklog(Backlog):
    """A backlog that also counts the calls that other clients have sent to the server."""

    foreign = 0

    @property
    def in_flight(self) -> int:
        """Our calls there, and those of others."""
        return self.own + self.foreign

    @property
    def own(self) -> int:
        """Our calls there."""
        return super().in_flight


class Backend:
    """One server.

    Attributes:
        url: its address without a path.
        name: what it is called.
        number: its place in the file.
        api_key: the key that it asks for.
        backlog: what it has before it, for the dispatch rule.
        tickets: the calls that were sent to it.
        queue: what it last said of its queue.
        state: whether it gets calls.
    """

    def __init__(
        self, options: BackendOptions, number: int, health: HealthOptions, speeds: Speeds
    ) -> None:
        self.url, self.name, self.number = options.url, options.label, number
        self.api_key = options.api_key
        self.backlog = LiveBacklog(number, options.seats or _FIRST_SEATS, self._predict)
        self.tickets: dict[Ticket, None] = {}
        self.queue: Queue | None = None
        self.state = State.DOWN
        self.reason = "it was not reached yet"
        self._health, self._speeds = health, speeds
        self._learns_seats = options.seats is None
        self._prefixes = PrefixMemory()
        self._silent: set[asyncio.Timeout] = set()
        self._failures = 0
        self._good_looks = 0
        self._pauses = 0
        self._was_up = False
        self._crowded = 0
        self._strangers = 0

    @property
    def takes_calls(self) -> bool:
        """Whether a call may be sent to it, as far as its health goes."""
        return self.state is State.UP or (self.state is State.TRIAL and not self.backlog.own)

    def _predict(self, call: RoutedCall) -> Prediction:
        blocks = call.blocks if isinstance(call, PromptedCall) else ()
        known = self._prefixes.known_bytes(blocks) / BYTES_PER_TOKEN
        return self._speeds.predict(
            call.stage,
            self.number,
            prompt_tokens=max(1.0, call.prompt_tokens - known),
            output_tokens=call.output_tokens,
        )

    def known_tokens(self, call: PromptedCall) -> float:
        """How much of a call's prompt its prefix cache may hold."""
        return self._prefixes.known_bytes(call.blocks) / BYTES_PER_TOKEN

    def saw_prompt(self, call: PromptedCall) -> None:
        """It has read a call's prompt."""
        self._prefixes.saw(call.blocks)

    @contextmanager
    def silence_watched(self, timeout: asyncio.Timeout) -> Iterator[None]:
        """While a call waits for its first byte: its time is up when the server goes down."""
        self._silent.add(timeout)
        try:
            yield
        finally:
            self._silent.discard(timeout)

    def succeeded(self) -> None:
        """It has answered a call."""
        self._failures = 0
        self._pauses = 0
        if self.state is State.TRIAL:
            self._become(State.UP, "")

    def failed(self, reason: str, *, surely: bool = False) -> None:
        """It has failed a call or a look; ``surely`` where nobody listens at all."""
        self._failures += 1
        self._good_looks = 0
        enough = surely or self.state is State.TRIAL or self._failures >= self._health.failures
        if enough and self.state is not State.DOWN:
            self._become(State.DOWN, reason)
            self._prefixes.forget()
            for timeout in (one for one in self._silent if not one.expired()):
                timeout.reschedule(asyncio.get_running_loop().time())
            self._silent.clear()
        if self.state is State.DOWN:
            self.reason = reason

    def failed_by(self, failure: BackendFailed) -> None:
        """It has failed so; what the router may have missed is not held against it."""
        if not failure.excused:
            self.failed(str(failure), surely=failure.surely)

    def looked_well(self) -> None:
        """A look at it went well."""
        self._good_looks += 1
        if self.state is State.DOWN:
            self._failures = 0
            self._become(State.TRIAL if self._was_up else State.UP, "")
        elif self.state is State.TRIAL and self._good_looks >= _GOOD_LOOKS:
            self._become(State.UP, "")
        elif self.state is State.UP and not self.tickets:
            self._failures = 0
        if self._good_looks >= _GOOD_LOOKS:
            self._pauses = 0

    def heard_queue(self, queue: Queue | None) -> None:
        """Takes in what it says of its queue: the calls of others, and how many seats it has."""
        self.queue = queue
        if queue is None:
            if self._learns_seats:
                self.backlog.seats = _SEATS_WITHOUT_METRICS
            return
        strangers = max(0, queue.running + queue.waiting - self.backlog.own)
        # One look may catch calls that have just ended here; what two looks show is there.
        self.backlog.foreign = min(strangers, self._strangers)
        self._strangers = strangers
        if self._learns_seats:
            self._learn_seats(queue)

    def _learn_seats(self, queue: Queue) -> None:
        """A queue that stays shows that there are no more seats than calls that run."""
        if queue.waiting:
            if self._crowded:
                self.backlog.seats = max(1, queue.running, self._crowded)
            self._crowded = max(1, queue.running)
            return
        self._crowded = 0
        if self.backlog.in_flight >= self.backlog.seats:
            self.backlog.seats = min(_MOST_SEATS, 2 * self.backlog.seats)

    def next_pause_s(self) -> float:
        """Until the next look: longer and longer while it is down, never two servers at once."""
        if self.state is not State.DOWN:
            return self._health.every_s
        pause_s = min(self._health.longest_pause_s, self._health.every_s * 2.0**self._pauses)
        self._pauses = min(self._pauses + 1, 16)
        return pause_s * random.uniform(0.8, 1.2)

    def _become(self, state: State, reason: str) -> None:
        tell = logger.warning if state is State.DOWN else logger.info
        tell("%s is %s%s", self.name, state.value, f": {reason}" if reason else "")
        self.state, self.reason = state, reason
        self._was_up |= state is State.UP


@dataclass(frozen=True, slots=True, eq=False)
class PromptedCall(RoutedCall):
    """A call on its way, with what is needed to know its prompt's beginning again."""

    blocks: Sequence[int] = ()


Look = Callable[[Backend], Awaitable[Queue | None]]
"""Asks a server for its health and its queue; raises `BackendFailed`."""


class BackendFailed(Exception):
    """A server could not be reached, broke off, kept silent, or is not well.

    Args:
        reason: why.
        surely: nobody listens there at all.
        unsent: it never had the request.
        excused: the router stood still meanwhile, so that this says nothing of the server.
    """

    def __init__(
        self, reason: str, *, surely: bool = False, unsent: bool = False, excused: bool = False
    ) -> None:
        super().__init__(reason)
        self.surely, self.unsent, self.excused = surely, unsent, excused


async def look_once(backend: Backend, look: Look) -> None:
    """Looks at a server, and takes in what is seen."""
    try:
        queue = await look(backend)
    except BackendFailed as failure:
        backend.failed_by(failure)
        return
    backend.looked_well()
    backend.heard_queue(queue)


async def keep_looking(backend: Backend, look: Look, changed: Callable[[], None]) -> None:
    """Watches a server for as long as the router runs.

    Args:
        backend: the server.
        look: asks it.
        changed: told after each look.
    """
    while True:
        await asyncio.sleep(backend.next_pause_s())
        await look_once(backend, look)
        changed()
