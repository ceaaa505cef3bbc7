"""Many users of the agent at once: who asks what, when, and by when the answer is due.

A crowd is made once from a seed, in multiples of the times that the machine itself needs, so that
it is as busy on a fast machine as on a slow one, and every server is visited by the same crowd.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal, Protocol

import openai
import yaml
from openai.types.chat import ChatCompletionMessageParam

from trimtab.core.errors import TrimtabError
from trimtab.urgency.text_to_sql.agent import Answer, Class, Stage, answer
from trimtab.urgency.text_to_sql.databases import Database

INTERACTIVE_SHARE = 0.6

DEADLINE_FACTORS: dict[Class, tuple[float, float]] = {"interactive": (4, 10), "report": (6, 18)}
"""Deadlines, as multiples of the time of such a workflow on a server with nothing else to do."""

STATIC_PRIORITY: dict[Class, int] = {"interactive": 0, "report": 1}
"""What vLLM's own priority scheduling can be told of a class; smaller is served first."""

Hints = Literal["fields", "priority", "nothing"]
"""What a server is told of a call: its fields, `STATIC_PRIORITY` beside them, or neither."""

LOAD = 4.0
"""Workflows that arrive, by those that the server can serve in the same time."""

IN_TIME_SHARE = 0.5
"""Of a crowd's workflows, those that vLLM's own order finishes in time; see `tighten`."""

_ROUNDING = 1e-9
_CALL_TIMEOUT_S = 600.0
_ALONE = 2
_WATCH_EVERY_S = 0.5
_DYING_S = 2.0


@dataclass(frozen=True, slots=True)
class Visit:
    """A user's question.

    Attributes:
        workflow: its id, which no other crowd's visits have.
        question: in English.
        database: what it is about.
        kind: the workflow's class.
        arrival_s: after the crowd's first moment.
        deadline_s: how long the answer may take.
    """

    workflow: str
    question: str
    database: Database
    kind: Class
    arrival_s: float
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Journey:
    """What became of a visit; times in seconds, output in tokens."""

    visit: Visit
    finished_s: float
    answer: Answer
    output_tokens: int

    @property
    def latency_s(self) -> float:
        """From the question to the answer."""
        return self.finished_s - self.visit.arrival_s

    @property
    def tardiness_s(self) -> float:
        """How much later than due; 0 when in time."""
        return max(0.0, self.latency_s - self.visit.deadline_s)


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a server is.

    Attributes:
        alone_s: a workflow's time, by class, with nothing else to do.
        capacity_per_s: workflows that it finishes when it always has as many as it has seats.
    """

    alone_s: dict[Class, float]
    capacity_per_s: float


class Served(Protocol):
    """A server that is ready, or what stands before several."""

    @property
    def url(self) -> str:
        """Its address, without a path."""

    @property
    def served_name(self) -> str:
        """The model's name in its API."""

    def check(self) -> None:
        """Does nothing while it lives.

        Raises:
            ServerFailed: it has ended.
        """


@cache
def questions() -> dict[str, list[str]]:
    """The questions by database."""
    text = files("trimtab.urgency.text_to_sql").joinpath("questions.yaml").read_text("utf-8")
    found: dict[str, list[str]] = yaml.safe_load(text)
    return found


def assemble(
    databases: Sequence[Database], pace: Pace, *, workflows: int, seed: int, load: float = LOAD
) -> list[Visit]:
    """The crowd: Poisson arrivals, two classes, deadlines uniform within each class's range."""
    chance = random.Random(seed)
    asked = [(d, question) for d in databases for question in questions()[d.name]]
    chance.shuffle(asked)
    visits = []
    arrival_s = 0.0
    for number in range(workflows):
        database, question = asked[number % len(asked)]
        kind: Class = "interactive" if chance.random() < INTERACTIVE_SHARE else "report"
        deadline_s = chance.uniform(*DEADLINE_FACTORS[kind]) * pace.alone_s[kind]
        visits.append(Visit(f"{seed}-w{number}", question, database, kind, arrival_s, deadline_s))
        arrival_s += chance.expovariate(load * pace.capacity_per_s)
    return visits


def tighten(journeys: Sequence[Journey], share: float = IN_TIME_SHARE) -> list[Journey]:
    """The same journeys with all deadlines multiplied by one factor, so that ``share`` are in time.

    Whether a fixed deadline is tight depends on how busy the machine was while its pace was
    measured. vLLM's own order knows no deadlines, so its journeys may say what is tight here.
    """
    used = sorted(journey.latency_s / journey.visit.deadline_s for journey in journeys)
    factor = used[max(1, math.floor(share * len(used))) - 1] * (1 + _ROUNDING)
    return [
        replace(j, visit=replace(j.visit, deadline_s=j.visit.deadline_s * factor)) for j in journeys
    ]


async def measure_pace(server: Served, databases: Sequence[Database], seats: int) -> Pace:
    """Warms a server up, and measures how fast it is when it is full and when it is idle.

    Args:
        server: a server that is ready and has nothing else to do.
        databases: whose questions are asked.
        seats: the calls that the server runs at once.
    """
    kinds: tuple[Class, ...] = ("interactive", "report")

    def visit(number: int, kind: Class, label: str) -> Visit:
        database = databases[number % len(databases)]
        question = questions()[database.name][0]
        return Visit(f"{label}{number}", question, database, kind, 0.0, _CALL_TIMEOUT_S)

    crowd = [visit(n, kinds[n % 2], "full") for n in range(2 * len(databases))]
    capacity_per_s = capacity(await visit_all(server, crowd), seats)
    alone_s = dict.fromkeys(kinds, 0.0)
    for kind in kinds:
        for number in range(_ALONE):
            (journey,) = await visit_all(server, [visit(number, kind, f"alone-{kind}")])
            alone_s[kind] += journey.latency_s / _ALONE
    return Pace(alone_s, capacity_per_s)


def capacity(journeys: Sequence[Journey], seats: int) -> float:
    """Workflows per second of a full server, from a crowd that came all at once.

    The time counts in which no seat was free; the workflows that it left are taken as half done.
    """
    finished_s = sorted(journey.finished_s for journey in journeys)
    full = max(1, len(finished_s) - seats)
    return (full + (len(finished_s) - full) / 2) / finished_s[full - 1]


async def visit_all(
    server: Served,
    visits: Sequence[Visit],
    *,
    hints: Hints = "fields",
    finished: Callable[[], None] = lambda: None,
) -> list[Journey]:
    """Lets a crowd ask a server, each user at their time; returns what became of each visit.

    Args:
        server: a server that is ready.
        visits: the crowd.
        hints: what the server is told of each call; see `Hints`.
        finished: called after each answer.

    Raises:
        ServerFailed: the server ended meanwhile.
        TrimtabError: the server refused a call.
    """
    client = openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=_CALL_TIMEOUT_S
    )
    start_s = time.monotonic()

    async def one(visit: Visit) -> Journey:
        await asyncio.sleep(start_s + visit.arrival_s - time.monotonic())
        caller = _Caller(client, server.served_name, visit, hints)
        found = await answer(visit.question, visit.database, visit.kind, caller)
        finished()
        return Journey(visit, time.monotonic() - start_s, found, caller.output_tokens)

    async with client:
        users = [asyncio.create_task(one(visit)) for visit in visits]
        watch = asyncio.create_task(_watch(server))
        everybody = asyncio.gather(*users)
        try:
            await asyncio.wait((everybody, watch), return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
            return await everybody
        except openai.OpenAIError as error:
            # A server that dies refuses connections before its process has ended.
            await asyncio.sleep(_DYING_S)
            server.check()
            raise TrimtabError(f"the server refused a call: {error}") from error
        finally:
            for task in (*users, watch):
                task.cancel()
            await asyncio.gather(everybody, watch, *users, return_exceptions=True)


async def _watch(server: Served) -> None:
    while True:
        server.check()
        await asyncio.sleep(_WATCH_EVERY_S)


@dataclass(slots=True)
class _Caller:
    """A workflow's access to the model: tells the server what it needs to order the calls."""

    client: openai.AsyncOpenAI
    model: str
    visit: Visit
    hints: Hints
    output_tokens: int = 0

    async def ask(self, stage: Stage, prompt: str) -> str:
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": prompt}]
        if stage.opening:
            messages.append({"role": "assistant", "content": stage.opening})
        said = await self.client.chat.completions.create(
            model=self.model,
            messages=messages,
            max_tokens=stage.max_tokens,
            stop=list(stage.stop) or None,
            temperature=0.0,
            extra_body=self._body(stage),
        )
        self.output_tokens += said.usage.completion_tokens if said.usage else 0
        return said.choices[0].message.content or ""

    def _body(self, stage: Stage) -> dict[str, Any]:
        continued = bool(stage.opening)
        body: dict[str, Any] = {
            "add_generation_prompt": not continued,
            "continue_final_message": continued,
        }
        if self.hints == "priority":
            body["priority"] = STATIC_PRIORITY[self.visit.kind]
        if self.hints != "nothing":
            body["vllm_xargs"] = {
                "trimtab.workflow": self.visit.workflow,
                "trimtab.stage": stage.name,
                "trimtab.class": self.visit.kind,
                "trimtab.deadline_s": self.visit.deadline_s,
            }
        return body
