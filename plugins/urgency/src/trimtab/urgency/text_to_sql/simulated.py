"""The crowd in the simulator: the agent's chains of calls as a workload, and the same policies."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from trimtab.core.cost import EngineLimits, EngineProfile, StepCost
from trimtab.core.policy import Call, ServingPolicy
from trimtab.core.simulate import ReplicaSpec, simulate
from trimtab.core.workload import Request
from trimtab.urgency.config import Order, UrgencyConfig
from trimtab.urgency.policy import UrgencyPolicy
from trimtab.urgency.text_to_sql.agent import FIXES, Answer, Class, StageName
from trimtab.urgency.text_to_sql.crowd import STATIC_PRIORITY, Journey, Pace, Visit, capacity
from trimtab.urgency.text_to_sql.databases import Database

PROFILE = EngineProfile(
    model="SmolLM2-135M-Instruct",
    device="one core of a small virtual machine",
    engine="vLLM 0.32 on CPU, eager",
    limits=EngineLimits(
        max_num_seqs=4, max_num_batched_tokens=2048, max_model_len=1024, kv_blocks=728
    ),
    step=StepCost(base_s=0.030, decode_s=0.004, prefill_s=0.005, prefill_token_s=0.0013),
    request_overhead_s=0.01,
)

# The means over the demo's own calls; the summary of the tables is a prefix that calls share.
_PROMPT_TOKENS = {"schema": 230, "sql": 170, "fix": 240, "check": 150, "report": 150}
_OUTPUT_TOKENS = {
    "schema": (3, 16),
    "sql": (8, 40),
    "fix": (8, 40),
    "check": (2, 4),
    "report": (30, 48),
}
_SUMMARY_TOKENS = 190
_FAILING_SHARE = 0.5
_TOOL_S = 0.005
_PACE_SAMPLES = 40


def pace(databases: Sequence[Database]) -> Pace:
    """How fast the simulated server is; see `Pace`."""
    kinds: tuple[Class, ...] = ("interactive", "report")

    def visit(number: int, kind: Class) -> Visit:
        return Visit(f"w{number}", "", databases[number % len(databases)], kind, 0.0, 1.0)

    alone_s = {
        kind: mean(finished_s([visit(0, kind)], seed)["w0"] for seed in range(_PACE_SAMPLES))
        for kind in kinds
    }
    crowd = [visit(number, kinds[number % 2]) for number in range(_PACE_SAMPLES)]
    ended_s = finished_s(crowd, 0)
    journeys = [Journey(v, ended_s[v.workflow], Answer(), 0) for v in crowd]
    return Pace(alone_s, capacity(journeys, PROFILE.limits.max_num_seqs))


def workload(visits: Sequence[Visit], seed: int) -> list[Request]:
    """The calls of a crowd, with lengths and failing queries drawn by the seed."""
    chance = random.Random(seed)
    return [request for visit in visits for request in _chain(visit, chance)]


def finished_s(
    visits: Sequence[Visit], seed: int, policy: Callable[[], ServingPolicy] | None = None
) -> dict[str, float]:
    """When each workflow ends, by its id, under a policy or in vLLM's own order."""
    result = simulate(
        workload(visits, seed),
        [ReplicaSpec(PROFILE)],
        policies=lambda: () if policy is None else (policy(),),
    )
    return {record.workflow: record.finished_s for record in result.workflows}


def urgency(visits: Sequence[Visit], order: Order) -> Callable[[], ServingPolicy]:
    """The plugin's policy."""
    classes = _classes(visits)
    return lambda: _WithClasses(UrgencyConfig(order=order), classes)


def static_priority(visits: Sequence[Visit]) -> Callable[[], ServingPolicy]:
    """What vLLM's priority scheduling does with `STATIC_PRIORITY`."""
    classes = _classes(visits)
    return lambda: _StaticPriority(classes)


def _classes(visits: Sequence[Visit]) -> dict[str, Class]:
    return {visit.workflow: visit.kind for visit in visits}


def _chain(visit: Visit, chance: random.Random) -> list[Request]:
    stages: list[StageName] = ["schema", "sql"]
    if chance.random() < _FAILING_SHARE:
        stages += [fix.name for fix in FIXES[: chance.randint(1, len(FIXES))]]
    stages += ["check"] if visit.kind == "interactive" else ["check", "report"]
    return [
        Request(
            request_id=f"{visit.workflow}/{number}",
            arrival_s=visit.arrival_s,
            prompt_tokens=_PROMPT_TOKENS[kind],
            output_tokens=chance.randint(*_OUTPUT_TOKENS[kind]),
            workflow=visit.workflow,
            stage=stage,
            deadline_s=visit.deadline_s,
            depends_on=(f"{visit.workflow}/{number - 1}",) if number else (),
            gap_s=_TOOL_S if number else 0.0,
            prefix=visit.database.name if stage == "schema" else None,
            prefix_tokens=_SUMMARY_TOKENS if stage == "schema" else 0,
        )
        for number, stage in enumerate(stages)
        for kind in (stage.partition("-")[0],)
    ]


class _WithClasses(UrgencyPolicy):
    """The policy as clients that name their class meet it; the simulator's requests name none."""

    def __init__(self, config: UrgencyConfig, classes: Mapping[str, Class]) -> None:
        super().__init__(config)
        self._classes = classes

    def on_arrival(self, call: Call, now_s: float) -> None:
        kind = self._classes[str(call.fields["workflow"])]
        call.fields = {**call.fields, "class": kind}
        super().on_arrival(call, now_s)


class _StaticPriority(ServingPolicy):
    def __init__(self, classes: Mapping[str, Class]) -> None:
        super().__init__()
        self._classes = classes

    def key(self, call: Call, now_s: float) -> float:
        return STATIC_PRIORITY[self._classes[str(call.fields["workflow"])]]
