"""What a serving policy is: the interface that an engine host and the simulator both drive.

A policy never sees an engine. It sees calls (one LLM request each), says in which order the
waiting ones are served, which may be admitted now and which must end, and is told what happened.
Every method has a default that leaves the engine's own behaviour, and a host calls only the
methods that a policy overrides, so what a policy does not use costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from trimtab.core.errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FieldValue = str | int | float


class Outcome(Enum):
    """Why a call left the engine."""

    COMPLETED = "completed"
    CUT = "cut"
    """By its ``max_output_tokens``, or since the model takes no longer text."""
    REPEATED = "repeated"
    """The engine saw that the call repeats itself, and ended it."""
    ABORTED = "aborted"
    """From outside: the client has gone, or the server found a stop string in the text."""
    ENDED_BY_POLICY = "ended-by-policy"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Call:
    """One LLM call as a policy sees it; compared and hashed by identity.

    Times are seconds on the host's monotonic clock (simulated seconds in the simulator).

    Attributes:
        call_id: unique within the engine.
        arrival_s: when the call reached the engine.
        prompt_tokens: length of the prompt.
        max_output_tokens: the most tokens the call may generate.
        fields: what the client said about the call: the ``trimtab.*`` entries of the request's
            ``vllm_xargs`` without their prefix, e.g. ``{"workflow": "w17", "deadline_s": 30.0}``.
        priority: the request's own integer priority; smaller is served first.
        request_id: the client's request; the calls that it was fanned out to (``n`` > 1) share it.
        branch: which of these calls this one is, from 0.
        output_tokens: tokens generated so far; of a session, in its present turn.
        admitted_s: when the call first got a place in the running batch; None while it waits.
        note: what a policy tells the client's side with the call's last output; the host passes it
            on as the ``stop_reason`` where it is set by the end of `ServingPolicy.on_finish`.
        forget_kv: whether what the KV cache holds for this call alone is dropped when a policy ends
            it, instead of being kept for a later prompt that begins alike.
    """

    call_id: str
    arrival_s: float
    prompt_tokens: int
    max_output_tokens: int
    fields: Mapping[str, FieldValue] = field(default_factory=dict)
    priority: int = 0
    request_id: str = ""
    branch: int = 0
    output_tokens: int = 0
    admitted_s: float | None = None
    note: str | None = None
    forget_kv: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is when an admission is decided."""

    running: int
    waiting: int
    kv_usage: float
    """Share of the KV cache's blocks in use, 0 to 1."""


class Engine(Protocol):
    """What a policy may ask of the engine that it serves, in the engine's own process."""

    @property
    def by_priority(self) -> bool:
        """Whether the engine itself orders calls by their ``priority``."""

    def prompt_ids(self, call: Call) -> Sequence[int]:
        """The tokens of a call's prompt."""

    def output_ids(self, call: Call) -> Sequence[int]:
        """The tokens that a call has generated; also while `ServingPolicy.on_finish` runs."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens."""

    def stop_reason(self, call: Call) -> int | str | None:
        """What the engine itself says of why a call ended, while `on_finish` runs."""


@dataclass(frozen=True, slots=True)
class CallField:
    """Something a client may say about a call: one ``trimtab.NAME`` entry of ``vllm_xargs``.

    A plugin declares its fields in `PluginInfo.call_fields`. Hosts check values before any policy
    sees them, so a policy may trust ``Call.fields``.

    Attributes:
        kind: ``str``, ``int`` or ``float`` (which takes integers too, and must be finite).
        description: one line for ``trimtab plugins``.
        minimum, maximum: inclusive bounds of a number, or of a string's length.
        header: the HTTP header that says the same, for clients that cannot change the body.
        header_scale: what a number in the header is multiplied by to get the field's unit.
    """

    kind: type[str] | type[int] | type[float]
    description: str
    minimum: float = -math.inf
    maximum: float = math.inf
    header: str | None = None
    header_scale: float = 1.0

    def check(self, name: str, value: object) -> FieldValue:
        """The value as ``kind``.

        Raises:
            BadInput: the value has another type or lies outside the bounds.
        """
        where = f"vllm_xargs, {FIELD_PREFIX}{name}"
        accepted = (int, float) if self.kind is float else self.kind
        if isinstance(value, bool) or not isinstance(value, accepted):
            raise BadInput(
                f"{value!r} is a {type(value).__name__}",
                where=where,
                fix=f"give a {'number' if self.kind is float else self.kind.__name__}",
            )
        size = len(value) if isinstance(value, str) else value
        if not self.minimum <= size <= self.maximum or not math.isfinite(size):
            what = "its length" if isinstance(value, str) else "it"
            raise BadInput(
                f"{str(value)[:80]!r} is out of range",
                where=where,
                fix=f"{what} must be between {self.minimum:g} and {self.maximum:g}",
            )
        return value

    def from_header(self, name: str, text: str) -> FieldValue:
        """The field's value as said by its header.

        Raises:
            BadInput: the header does not hold such a value.
        """
        if self.kind is str:
            return self.check(name, text.strip())
        try:
            number = float(text) * self.header_scale
            return self.check(name, int(number) if self.kind is int else number)
        except (BadInput, ValueError, OverflowError):
            low, high = self.minimum / self.header_scale, self.maximum / self.header_scale
            raise BadInput(
                f"{text[:80]!r} is not a usable value",
                where=f"header {self.header}",
                fix=f"give a number between {low:g} and {high:g}",
            ) from None


FIELD_PREFIX = "trimtab."

SortKey = float | tuple[float, ...]


class ServingPolicy:
    """Base of every serving policy; override only what the policy is about.

    To change the order of calls that wait already, add them to ``stale``: the host asks for their
    keys again before its next step and empties the set. Nothing else re-sorts the queue.
    """

    def __init__(self) -> None:
        self.stale: set[Call] = set()

    def attach(self, engine: Engine) -> None:
        """The engine is up; called once, before anything else."""

    def on_arrival(self, call: Call, now_s: float) -> None:
        """A call has entered the engine; its key is asked for right after."""

    def watches(self, call: Call) -> int | None:
        """How many tokens a call must have generated for `on_step` to be told of it next.

        Asked when the call has arrived, and after each `on_step` that was told of it; None for
        never. By default it is told of every token. A call that nobody watches costs nothing.
        """
        return call.output_tokens + 1

    def wants_logprobs(self, call: Call) -> int | None:
        """How many top logprobs of each token the policy needs of a call that has just arrived.

        0 is the sampled token's alone, None nothing at all. The client sees none of them.
        """
        raise NotImplementedError

    def on_logprobs(self, calls: Sequence[Call], logprobs: NDArray[np.float32]) -> None:
        """The logprobs of this step's tokens, before `on_finish` and `on_step`.

        Asked again for the second token and so on, where calls got several in one step.

        Args:
            calls: of each row, the call that it belongs to; none twice.
            logprobs: float32 [len(calls), 1 + k]; first the sampled token's, then the k largest.
                There may be more columns than the policy asked for.
        """

    def key(self, call: Call, now_s: float) -> SortKey:
        """Sort key of a waiting call; smaller is served first, ties by arrival.

        All keys of one policy have the same shape. With several ordering policies enabled, the
        first in the configuration's order decides and the later ones break its ties.
        """
        raise NotImplementedError

    def admits(self, call: Call, load: Load, now_s: float) -> bool:
        """Whether a waiting call may join the batch in this step.

        A refusal lasts for one step and lets the calls behind it pass; it is ignored while the
        engine is idle, so no policy can stop the engine.
        """
        raise NotImplementedError

    def on_step(self, progressed: Collection[Call], now_s: float) -> Collection[Call]:
        """A step has given calls tokens; returns the calls that the engine must end now.

        It comes after the step's `on_finish`.

        Args:
            progressed: of the calls that go on, those that have come as far as `watches` says, and
                maybe others that got tokens.
            now_s: the time.
        """
        raise NotImplementedError

    def quiet_steps(self) -> int:
        """How many steps `on_step` would end nothing in and `admits` would not answer otherwise.

        Each running call gets a token in each of them; it counts while no call comes, starts or
        ends. A simulator leaps over them; an engine host never asks.
        """
        return 1

    def relieve(self, now_s: float) -> Call | None:
        """The KV cache cannot hold the next step: a call to end before the engine preempts one.

        Asked again until there is room, or the answer is None.
        """
        raise NotImplementedError

    def on_admission(self, call: Call, now_s: float) -> None:
        """A waiting call got a place in the batch (again after each preemption)."""

    def on_finish(self, call: Call, outcome: Outcome, now_s: float) -> None:
        """A call has left the engine, whatever the reason; called exactly once for each call."""

    def next_timer_s(self) -> float:
        """When `on_timer` is due next; infinity for never. Asked once a step, so keep it cheap."""
        return math.inf

    def on_timer(self, now_s: float) -> None:
        """The time given by `next_timer_s` has come."""
