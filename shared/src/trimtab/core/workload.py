"""Workloads: requests with arrival times, lengths, workflows and deadlines."""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict

from trimtab.core.documents import write_atomic
from trimtab.core.errors import BadInput


@dataclass(frozen=True, slots=True)
class Request:
    """One LLM request of a workload.

    Attributes:
        request_id: unique within the workload.
        arrival_s: seconds after the workload's start; for a request with ``depends_on`` the
            earliest time it may be issued (it is issued ``gap_s`` after its last dependency).
        prompt_tokens: length of the prompt.
        output_tokens: tokens that are generated (realised, hidden from policies).
        model: which model serves it; None where there is one.
        workflow: the workflow it is a stage of.
        stage: the name of that stage.
        deadline_s: the whole workflow's deadline, relative to the workflow's arrival.
        depends_on: ids of the requests that must finish first.
        gap_s: seconds between the last dependency's end and the issue (a tool call, say).
        prefix: the name of the prompt's shared prefix.
        prefix_tokens: the length of that prefix.
        branch_tokens: the realised length of each of the ``n`` branches that a request asks for,
            whose longest is ``output_tokens``; empty for one that asks for a single answer.
        fields: what the client says to policies, as in `trimtab.core.policy.Call.fields`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    request_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    model: str | None = None
    workflow: str | None = None
    stage: str | None = None
    deadline_s: float | None = None
    depends_on: tuple[str, ...] = ()
    gap_s: float = 0.0
    prefix: str | None = None
    prefix_tokens: int = 0
    branch_tokens: tuple[int, ...] = ()
    fields: Mapping[str, str | int | float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Workload:
    """Requests in the order of their arrival; it cannot hold an invalid one.

    Attributes:
        requests: sorted by ``arrival_s``, ties as given.
        name: what people call it.

    Raises:
        BadInput: a number is negative, an id is given twice, a dependency is unknown or goes in a
            circle.
    """

    requests: tuple[Request, ...]
    name: str = "workload"

    def __post_init__(self) -> None:
        found = fault(self.requests)
        if found is not None:
            request = self.requests[found.index]
            raise BadInput(found.what, where=f"request {request.request_id!r}", fix=found.fix)
        ordered = sorted(self.requests, key=lambda request: request.arrival_s)
        object.__setattr__(self, "requests", tuple(ordered))

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of the requests."""
        return hashlib.sha256(self._lines().encode()).hexdigest()

    @property
    def duration_s(self) -> float:
        """From the workload's start to the last arrival."""
        return self.requests[-1].arrival_s if self.requests else 0.0

    @cached_property
    def workflows(self) -> Mapping[str, tuple[Request, ...]]:
        """The requests of each workflow, in the order of its first arrival."""
        groups: dict[str, list[Request]] = {}
        for request in self.requests:
            if request.workflow is not None:
                groups.setdefault(request.workflow, []).append(request)
        return {workflow: tuple(requests) for workflow, requests in groups.items()}

    def to_jsonl(self, path: str | Path) -> None:
        """Writes one JSON object a line, without the fields that have their defaults.

        Raises:
            BadInput: the file cannot be written.
        """
        write_atomic(path, self._lines())

    def _lines(self) -> str:
        return "".join(json.dumps(_stated(request)) + "\n" for request in self.requests)


def _stated(request: Request) -> dict[str, object]:
    return {
        each.name: value
        for each in fields(request)
        if (value := getattr(request, each.name)) != _default(each)
    }


def _default(each: Field[object]) -> object:
    """A field's default; for a field that has none, what equals no value."""
    return each.default if each.default_factory is MISSING else each.default_factory()


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a list of requests: with which, and what would be right."""

    index: int
    what: str
    fix: str


def fault(requests: Sequence[Request]) -> Fault | None:
    """The first thing wrong with a list of requests; None when it is sound."""
    seen: set[str] = set()
    for index, request in enumerate(requests):
        if request.request_id in seen:
            return Fault(
                index,
                f"request_id {request.request_id!r} is given twice",
                "give each request an id of its own",
            )
        seen.add(request.request_id)
        wrong = _wrong_number(request)
        if wrong is not None:
            return Fault(index, *wrong)
    return _unknown_dependency(requests, seen) or _circle(requests)


def _wrong_number(request: Request) -> tuple[str, str] | None:
    """What is wrong with a request's numbers, and what would be right."""
    at_least = {
        "arrival_s": 0,
        "prompt_tokens": 1,
        "output_tokens": 1,
        "gap_s": 0,
        "prefix_tokens": 0,
    }
    for name, least in at_least.items():
        value = getattr(request, name)
        if not least <= value < math.inf:
            return f"{name} is {value}", f"give at least {least}"
    if request.deadline_s is not None and not 0 < request.deadline_s < math.inf:
        return f"deadline_s is {request.deadline_s}", "give a number above 0"
    if request.prefix_tokens > request.prompt_tokens:
        return (
            f"prefix_tokens is {request.prefix_tokens}",
            f"the whole prompt has {request.prompt_tokens}",
        )
    return _wrong_branches(request) if request.branch_tokens else None


def _wrong_branches(request: Request) -> tuple[str, str] | None:
    """What is wrong with a request's branches, and what would be right."""
    shortest, longest = min(request.branch_tokens), max(request.branch_tokens)
    if shortest < 1:
        return f"a branch has {shortest} tokens", "give each at least 1"
    if longest != request.output_tokens:
        return (
            f"output_tokens is {request.output_tokens}",
            f"its longest branch has {longest}",
        )
    if request.prefix is not None:
        return (
            f"it has branches and the prefix {request.prefix!r}",
            "leave the prefix out: branches share their whole prompt",
        )
    return None


def _unknown_dependency(requests: Sequence[Request], known: set[str]) -> Fault | None:
    for index, request in enumerate(requests):
        for dependency in request.depends_on:
            if dependency not in known:
                return Fault(
                    index,
                    f"depends_on names {dependency!r}, which is no request",
                    "name a request_id of this workload",
                )
    return None


def _circle(requests: Sequence[Request]) -> Fault | None:
    """Peels off requests whose dependencies are done (Kahn's algorithm); a circle stays."""
    waits = {request.request_id: len(set(request.depends_on)) for request in requests}
    followers: dict[str, list[str]] = {}
    for request in requests:
        for dependency in set(request.depends_on):
            followers.setdefault(dependency, []).append(request.request_id)
    ready = deque(request_id for request_id, count in waits.items() if count == 0)
    while ready:
        done = ready.popleft()
        del waits[done]
        for follower in followers.get(done, ()):
            waits[follower] -= 1
            if waits[follower] == 0:
                ready.append(follower)
    if not waits:
        return None
    circle = _walk(requests, waits)
    index = next(i for i, request in enumerate(requests) if request.request_id == circle[0])
    return Fault(
        index,
        f"depends_on goes in a circle: {' -> '.join([*circle, circle[0]])}",
        "remove one of these dependencies",
    )


def _walk(requests: Sequence[Request], stuck: Mapping[str, int]) -> list[str]:
    """A circle among the requests that cannot be peeled off, each of which waits for another."""
    waits_for = {
        request.request_id: next(d for d in request.depends_on if d in stuck)
        for request in requests
        if request.request_id in stuck
    }
    path = [next(iter(waits_for))]
    while waits_for[path[-1]] not in path:
        path.append(waits_for[path[-1]])
    return path[path.index(waits_for[path[-1]]) :]
