"""What a serving policy is: the interface that an engine host and the simulator both drive.

A policy never sees an engine. It sees calls (one LLM request each), says in which order the
waiting ones are served, which may be admitted now and which must end, and is told what happened.
Every method has a default that leaves the engine's own behaviour, and a host calls only the
methods that a policy overrides, so what a policy does not use costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum

FieldValue = str | int | float


class Outcome(Enum):
    """Why a call left the engine."""

    COMPLETED = "completed"
    ABORTED = "aborted"
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
        output_tokens: tokens generated so far.
        admitted_s: when the call first got a place in the running batch; None while it waits.
    """

    call_id: str
    arrival_s: float
    prompt_tokens: int
    max_output_tokens: int
    fields: Mapping[str, FieldValue] = field(default_factory=dict)
    priority: int = 0
    output_tokens: int = 0
    admitted_s: float | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is when an admission is decided."""

    running: int
    waiting: int
    kv_usage: float
    """Share of the KV cache's blocks in use, 0 to 1."""


SortKey = float | tuple[float, ...]


class ServingPolicy:
    """Base of every serving policy; override only what the policy is about.

    To change the order of calls that wait already, add them to ``stale``: the host asks for their
    keys again before its next step and empties the set. Nothing else re-sorts the queue.
    """

    def __init__(self) -> None:
        self.stale: set[Call] = set()

    def on_arrival(self, call: Call, now_s: float) -> None:
        """A call has entered the engine; its key is asked for right after."""

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
        """The calls that got tokens in this step; returns those the engine must end now."""
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
