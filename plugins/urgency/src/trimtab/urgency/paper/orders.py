"""The rival orders of an engine's queue, and the plugin's own over all engines of a cluster."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import mean

from trimtab.core.policy import Call, Outcome, ServingPolicy
from trimtab.urgency.config import Order, UrgencyConfig
from trimtab.urgency.paper.hardware import Cluster, Gpu
from trimtab.urgency.paper.traces import DATABASES, REVISE, TEMPLATE, TEST, database_of, usual_s
from trimtab.urgency.policy import UrgencyPolicy

_STARVING = 4.0
"""A workflow that has waited this many times its service is served as a new one (PLAS)."""


@dataclass(slots=True)
class Program:
    """What is known of a workflow whose calls come.

    Attributes:
        arrival_s: when its first call came, to whatever engine.
        allowed_s: its deadline, relative to that.
        attained_s: service that its ended calls have had.
        waited_s: for how long they waited before.
        rest: the stages that the paper's template expects yet.
    """

    arrival_s: float
    allowed_s: float
    attained_s: float = 0.0
    waited_s: float = 0.0
    rest: list[str] = field(default_factory=lambda: list(TEMPLATE))

    def enter(self, stage: str) -> None:
        """Takes a stage that has come off the template; at the first test no revision is left."""
        if stage == TEST:
            self.rest = [name for name in self.rest if name != REVISE]
        if stage in self.rest:
            self.rest.remove(stage)


class Programs:
    """The workflows of a cluster, which the policies of all its engines share."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._programs: dict[str, Program] = {}
        self._usual_s = {
            (database, name): mean(usual_s(gpu, stage) for gpu in cluster)
            for database, stages in DATABASES.items()
            for name, stage in stages.items()
        }

    def of(self, call: Call) -> Program:
        """The call's workflow."""
        name = str(call.fields["workflow"])
        if name not in self._programs:
            allowed_s = float(call.fields.get("deadline_s", math.inf))
            self._programs[name] = Program(call.arrival_s, allowed_s)
        return self._programs[name]

    def usual_s(self, call: Call, stage: str) -> float:
        """The paper's ``tbar``: the mean over instances of a stage's time."""
        return self._usual_s[database_of(str(call.fields["workflow"])), stage]


OrderKey = Callable[[Call, Program, Programs, Gpu], float]


class ProgramOrder(ServingPolicy):
    """An order whose key is made once, when the call comes."""

    def __init__(self, programs: Programs, gpu: Gpu, order_key: OrderKey) -> None:
        super().__init__()
        self._programs, self._gpu, self._order_key = programs, gpu, order_key
        self._keys: dict[Call, float] = {}

    def on_arrival(self, call: Call, now_s: float) -> None:
        """Makes the call's key."""
        program = self._programs.of(call)
        program.enter(str(call.fields["stage"]))
        self._keys[call] = self._order_key(call, program, self._programs, self._gpu)

    def key(self, call: Call, now_s: float) -> float:
        """What was made of it when it came."""
        return self._keys[call]

    def on_finish(self, call: Call, outcome: Outcome, now_s: float) -> None:
        """Counts its service."""
        del self._keys[call]
        program = self._programs.of(call)
        admitted_s = now_s if call.admitted_s is None else call.admitted_s
        program.attained_s += now_s - admitted_s
        program.waited_s += admitted_s - call.arrival_s


def _priority(call: Call, program: Program, programs: Programs, gpu: Gpu) -> float:
    """Static priority as in vLLM: the classes of tighter deadlines first."""
    return program.allowed_s


def _predicted_s(call: Call, program: Program, programs: Programs, gpu: Gpu) -> float:
    """Shortest predicted job first."""
    stage = DATABASES[database_of(str(call.fields["workflow"]))][str(call.fields["stage"])]
    return gpu.prefill_s(call.prompt_tokens) + gpu.decode_s(stage.output.mean)


def _deadline_s(call: Call, program: Program, programs: Programs, gpu: Gpu) -> float:
    """Plain EDF: by the whole workflow's deadline."""
    return program.arrival_s + program.allowed_s


def _attained_level(call: Call, program: Program, programs: Programs, gpu: Gpu) -> float:
    """Autellix's PLAS (arXiv:2502.13965): least service attained by the program first, in levels.

    Levels double; a program whose waiting outgrows its service is served as a new one. Running
    calls are not preempted, as in all orders here.
    """
    if program.attained_s <= 0 or program.waited_s / program.attained_s > _STARVING:
        return 0.0
    return max(0.0, math.floor(math.log2(program.attained_s)) + 1.0)


def _latest_start_s(call: Call, program: Program, programs: Programs, gpu: Gpu) -> float:
    """The paper's urgency, which is the order of latest starts, with its own template."""
    own_s = programs.usual_s(call, str(call.fields["stage"]))
    rest_s = sum(programs.usual_s(call, stage) for stage in program.rest)
    left_s = program.arrival_s + program.allowed_s - call.arrival_s
    budget_s = left_s * own_s / (own_s + rest_s)
    return call.arrival_s + budget_s - _predicted_s(call, program, programs, gpu)


_KEYS: Mapping[str, OrderKey] = {
    "priority": _priority,
    "sjf": _predicted_s,
    "edf": _deadline_s,
    "plas": _attained_level,
    "urgency": _latest_start_s,
}


class ClusterUrgency(UrgencyPolicy):
    """The plugin's policy with one memory for all engines; workflows' classes are databases."""

    def __init__(self, order: Order) -> None:
        super().__init__(UrgencyConfig(order=order))

    def on_arrival(self, call: Call, now_s: float) -> None:
        """Names the class and passes on."""
        call.fields = {**call.fields, "class": database_of(str(call.fields["workflow"]))}
        super().on_arrival(call, now_s)


class EngineShare(ServingPolicy):
    """One engine's part of a policy that orders the queues of all engines."""

    def __init__(self, whole: ServingPolicy, owners: dict[Call, EngineShare]) -> None:
        super().__init__()
        self._whole, self._owners = whole, owners

    def on_arrival(self, call: Call, now_s: float) -> None:
        """Passes on."""
        self._owners[call] = self
        self._whole.on_arrival(call, now_s)
        self._share()

    def key(self, call: Call, now_s: float) -> float | tuple[float, ...]:
        """The whole's key."""
        return self._whole.key(call, now_s)

    def on_admission(self, call: Call, now_s: float) -> None:
        """Passes on."""
        self._whole.on_admission(call, now_s)
        self._share()

    def on_finish(self, call: Call, outcome: Outcome, now_s: float) -> None:
        """Passes on."""
        self._whole.on_finish(call, outcome, now_s)
        del self._owners[call]
        self._share()

    def next_timer_s(self) -> float:
        """The whole's timer."""
        return self._whole.next_timer_s()

    def on_timer(self, now_s: float) -> None:
        """Runs the whole's timer, if no other engine has."""
        if self._whole.next_timer_s() <= now_s:
            self._whole.on_timer(now_s)
            self._share()

    def _share(self) -> None:
        """Tells each engine of its own calls whose keys have changed."""
        for call in self._whole.stale:
            owner = self._owners.get(call)
            if owner is not None:
                owner.stale.add(call)
        self._whole.stale.clear()


_OURS: Mapping[str, Order] = {"edd": "edd", "llf": "llf"}
"""The plugin's orders by the names that sides use."""


def order_policies(name: str, cluster: Cluster) -> Callable[[], tuple[ServingPolicy, ...]]:
    """What makes the policies of each engine in turn; ``fcfs`` has none."""
    if name == "fcfs":
        return tuple
    gpus = iter(cluster)
    if name in _OURS:
        whole, owners = ClusterUrgency(_OURS[name]), dict[Call, EngineShare]()
        return lambda: (EngineShare(whole, owners),)
    programs = Programs(cluster)
    return lambda: (ProgramOrder(programs, next(gpus), _KEYS[name]),)


def router_order(name: str) -> ServingPolicy | None:
    """The order of the calls that a router holds: one of the plugin's, or ``fcfs`` by arrival."""
    return ClusterUrgency(_OURS[name]) if name in _OURS else None
