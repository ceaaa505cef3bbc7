"""The order of the waiting calls: the local queue of HexGen-Text2SQL (arXiv:2505.05286), and more.

The paper serves the call of the largest urgency ``U = t_comp - (b - tau)`` first: ``tau`` is the
time the call has waited, and ``b`` its stage's part of the time its workflow has left. ``U`` grows
at the same rate for every waiting call, so the difference of two never changes: serving by ``U`` is
serving by the constant ``enqueue + b - t_comp``, the latest time at which the call may start, the
earliest first (`latest_start_s`). A heap is exact, and keys change on events only.

Least slack, which this is, does not minimise lateness: of two jobs of lengths 1 and 10 due at 2 and
10 it runs the long one first and is late by 9, where by due date it is late by 1; and once a
workflow is late, its budget is negative and its longest calls come before everybody else's. The
default order is therefore that of modified due dates (`due_s`), which is optimal for chains on one
server (Lawler). A workflow that cannot be in time any more, or that would make others late, is due
anew at a later date: so it gives way to those that can be in time, yet not to all who come. Due
dates also delay whoever has much time, for nothing where all are in time: so they count only within
a horizon, that of the work at hand, and beyond it workflows go by arrival.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from itertools import count, islice
from statistics import NormalDist

from trimtab.core.policy import Call, Outcome, ServingPolicy
from trimtab.urgency.by_time import ByTime
from trimtab.urgency.config import UrgencyConfig
from trimtab.urgency.estimate import END, Estimator, Work, visit_of
from trimtab.urgency.fields import CallFields, parse
from trimtab.urgency.share import Share
from trimtab.urgency.tenants import Tenants
from trimtab.urgency.triage import Triage
from trimtab.urgency.tuned import TunedFile
from trimtab.urgency.workflows import Workflow, WorkflowTable

Key = tuple[float, float]

_SHIFT = 0.2
"""Keys are made anew when the expected work after a stage has moved by more than this share."""


_PATIENCE_S = 60.0

_FEWEST_MOVES, _MOVES_PER_CALL = 8, 0.001
_FEWEST_LOOKS, _LOOKS_PER_CALL = 24, 0.003
"""What is done in one step at most, and how that grows with the calls: places found anew, and
workflows reviewed. The rest is left to the next steps."""

_HORIZON = 1.5
"""By how much the horizon exceeds the time in which all timely work could be done; see `Lane`."""

_LATE_SHARE = 0.05
"""Of the admissions, for the oldest late workflows: so that none waits for ever."""

_SIBLINGS = 32
"""Calls of a workflow that are looked at to know how much of its stage is left."""

_ENDS_AT_ONCE = 64

_LEARNT_FROM = (Outcome.COMPLETED, Outcome.CUT, Outcome.ENDED_BY_POLICY)

_LONGEST_LOOK_S = 2.0
"""A file that was to be looked at later than this from now: the clock was set back."""


class Lane(IntEnum):
    """The first part of a key: smaller lanes are served first."""

    RESUMED = 0
    """Preempted calls, which hold up a workflow that was served already."""
    PROMOTED = 1
    """Calls whose lane has a share of the admissions that is due."""
    DUE = 2
    """Calls of workflows with a deadline, by due date."""
    EASY = 3
    """Calls of workflows that will be in time in any order; by their workflows' arrival."""
    PATIENT = 4
    """Calls without a deadline, by arrival."""


_BOUND = (Lane.DUE, Lane.EASY)


@dataclass(slots=True, eq=False)
class Waiting:
    """A call in the engine, and what its place in the queue is made of.

    Attributes:
        service_s: expected time from admission to end.
        state: the stage and which visit of it this is; see `estimate.visit_of`.
        after_s: expected service time of the workflow's stages after this one.
        reserve_s: what a due date leaves room for beyond that.
        lane: what kind of call it is.
        late: whether its workflow is due later than it was to be.
        due_s: its due date, in the order of due dates.
        order_s: its place among the calls of its lane.
        key: its place in the queue; that of a promoted call is ahead of its lane.
        timer_s: when the place must be looked at again.
    """

    call: Call
    workflow: Workflow
    stage: str
    service_s: float
    after_s: float = 0.0
    state: str = ""
    reserve_s: float = 0.0
    lane: Lane = Lane.PATIENT
    late: bool = False
    due_s: float = math.inf
    order_s: float = 0.0
    key: Key = (Lane.PATIENT, 0.0)
    timer_s: float = math.inf

    @property
    def remaining_s(self) -> float:
        """Expected service time of this call and all that follow."""
        return self.service_s + self.after_s

    def left_s(self, now_s: float) -> float:
        """What is left of `remaining_s`, some of which a running call has behind it."""
        admitted_s = self.call.admitted_s
        done_s = 0.0 if admitted_s is None else min(max(0.0, now_s - admitted_s), self.service_s)
        return self.remaining_s - done_s


def due_s(waiting: Waiting, deadline_s: float) -> float:
    """Modified due date: when this call must end for the stages after it to end in time."""
    return deadline_s - waiting.after_s - waiting.reserve_s


def extended_s(allowed_s: float, age_cap: float, needed_s: float) -> float:
    """What a workflow is allowed, times ``age_cap`` until it is more than it needs."""
    if needed_s < allowed_s:
        return allowed_s
    return allowed_s * age_cap ** (math.floor(math.log(needed_s / allowed_s, age_cap)) + 1)


def latest_start_s(waiting: Waiting, deadline_s: float) -> float:
    """The paper's urgency as a constant: ``enqueue + b - t_comp`` with the stage budget ``b``.

    ``b = (D - E) t / (t + sum of the remaining stages' t)``, made from the time left when the stage
    became ready. The remaining stages come from what the workflow's class was seen to do, where the
    paper has a template.
    """
    enqueued_s = waiting.call.arrival_s
    share = waiting.service_s / waiting.remaining_s if waiting.remaining_s > 0 else 1.0
    return enqueued_s + (deadline_s - enqueued_s) * share - waiting.service_s


_ORDERS: dict[str, Callable[[Waiting, float], float]] = {
    "edd": due_s,
    "urgency": latest_start_s,
    "llf": lambda waiting, deadline_s: deadline_s - waiting.remaining_s,
    "srpt": lambda waiting, deadline_s: waiting.remaining_s,
    "fcfs": lambda waiting, deadline_s: waiting.call.arrival_s,
}

_IGNORING_DEADLINES = frozenset({"srpt", "fcfs"})


class Group:
    """The waiting calls of one visit of one stage of one class, and the work that follows it."""

    __slots__ = ("members", "work")

    def __init__(self, work: Work) -> None:
        self.work = work
        self.members: dict[Waiting, None] = {}


class ClassGroups:
    """The groups of one class by state, and which solution of its chain they know."""

    __slots__ = ("by_state", "solution")

    def __init__(self, solution: int) -> None:
        self.solution = solution
        self.by_state: dict[str, Group] = {}


class UrgencyPolicy(ServingPolicy):
    """Orders the calls of deadline-bound workflows.

    Keys are made when a call arrives, and made anew on events alone: the estimate of its stage has
    shifted, its workflow's deadline was changed, the time has come after which it cannot be in
    time, a review gave its workflow up or took it back, or its lane's or tenant's share is due. A
    step in which nothing of this happens costs nothing; where many keys must be made anew, or many
    workflows reviewed, each step does a part.

    Args:
        config: the plugin's options.
        estimator: what is known of stages' lengths; a fresh one knows nothing.
    """

    def __init__(self, config: UrgencyConfig, estimator: Estimator | None = None) -> None:
        super().__init__()
        self._given = config
        self._estimator = estimator if estimator is not None else Estimator()
        self._workflows = WorkflowTable(config.max_workflows, config.workflow_ttl_s)
        self._calls: dict[Call, Waiting] = {}
        self._groups: dict[str, ClassGroups] = {}
        self._quiet: list[tuple[float, int, float, Workflow]] = []
        self._timers: ByTime[Waiting] = ByTime()
        self._numbers = count()
        self._triage: Triage[Workflow] = Triage()
        self._bound = 0
        self._horizon_s = math.inf
        self._moving: dict[object, list[Waiting]] = {}
        self._resume_s = math.inf
        self._tenants: Tenants[Waiting] = Tenants(config.max_share)
        self._courtesy: Waiting | None = None
        self._patient, self._late = Share(config.min_share), Share(_LATE_SHARE)
        self._configure(config)
        self._tuned = None if config.tuned is None else TunedFile(config.tuned)

    def _configure(self, config: UrgencyConfig) -> None:
        self._config = config
        self._order = _ORDERS[config.order]
        self._deviations = NormalDist().inv_cdf(config.work_quantile)

    def key(self, call: Call, now_s: float) -> Key:
        """``(lane, order within the lane)``."""
        return self._calls[call].key

    def fixed_key_s(self, call: Call) -> float:
        """The place of a call that has just arrived, for an engine that takes one number once.

        All lanes share one time scale, so that nobody starves although no key will change: a call
        without a deadline counts as due in a minute.
        """
        waiting = self._calls[call]
        return waiting.order_s + (_PATIENCE_S if waiting.lane is Lane.PATIENT else 0.0)

    def on_arrival(self, call: Call, now_s: float) -> None:
        """Finds the call's workflow and stage, and its place in the queue."""
        if self._tuned is not None:
            self._take_tuned(self._tuned, now_s)
        said = parse(call.fields)
        self._count_ends(now_s)
        workflow = self._workflows.of(said.workflow, said.class_, now_s, said.tenant)
        self._set_deadline(workflow, said.deadline_s, now_s)
        stage, state = self._enter_stage(workflow, said, now_s)
        service_s = self._estimator.service_s(
            workflow.class_,
            stage,
            output_tokens=said.expected_output,
            longest=call.max_output_tokens,
        )
        waiting = Waiting(call, workflow, stage, service_s, state=state)
        workflow.calls[call] = None
        self._calls[call] = waiting
        self._tenants.join(workflow.tenant, waiting)
        self._join_group(waiting)
        self._place(waiting, now_s)

    def on_admission(self, call: Call, now_s: float) -> None:
        """Counts the admission towards the shares of those who may have to wait for long."""
        waiting = self._calls[call]
        if waiting.key[0] == Lane.RESUMED:
            return
        if waiting.key[0] > Lane.EASY:
            self._triage.note_spare()
        self._withdraw(waiting, now_s)
        if waiting.lane is not Lane.PATIENT:
            self._patient.note_other()
        if not waiting.late:
            self._late.note_other()
        self._promote_due()
        self._promote_deprived(waiting.workflow.tenant)

    def on_finish(self, call: Call, outcome: Outcome, now_s: float) -> None:
        """Learns from the call, and asks for new keys where the estimates have shifted."""
        waiting = self._calls.pop(call)
        workflow = waiting.workflow
        self._withdraw(waiting, now_s)
        del workflow.calls[call]
        if not workflow.calls:
            self._triage.workflows.discard(workflow)
        self._workflows.touch(workflow, now_s)
        if call.admitted_s is not None and outcome in _LEARNT_FROM:
            service_s = max(0.0, now_s - call.admitted_s)
            self._estimator.learn_service(
                workflow.class_, waiting.stage, service_s, call.output_tokens
            )
            if waiting.lane in _BOUND and not workflow.calls:
                # As long as such a stage is now believed to be: so is the work that is left.
                self._triage.note_stage(self._estimator.service_s(workflow.class_, waiting.stage))
            self._leave_stage(workflow, waiting.state, now_s)
            self._follow_estimates(workflow.class_, now_s)

    def next_timer_s(self) -> float:
        """When a call is late, or something that was begun goes on; cheap."""
        due_s = min(self._triage.due_s, self._resume_s)
        if self._tuned is not None:
            due_s = min(due_s, self._tuned.due_s)
        return min(self._timers.first_s, due_s)

    def on_timer(self, now_s: float) -> None:
        """Finds new places for the calls whose time has come, as many as fit a step."""
        if self._tuned is not None:
            self._take_tuned(self._tuned, now_s)
        moves = _FEWEST_MOVES + int(_MOVES_PER_CALL * len(self._calls))
        while moves and len(self._timers) and self._timers.first_s <= now_s:
            self._replace(self._timers.pop(), now_s)
            moves -= 1
        self._go_on_moving(moves, now_s)
        if self._triage.due_s <= now_s:
            self._review(now_s)

    def _review(self, now_s: float) -> None:
        """Gives up the workflows that would make others late, and takes back those that fit.

        In the same round calls follow the horizon, which is another after each.
        """
        verdicts = self._triage.review(
            now_s,
            _FEWEST_LOOKS + int(_LOOKS_PER_CALL * len(self._calls)),
            queued=self._bound > 0,
            rest_s=lambda workflow: self._rest_s(workflow, now_s),
        )
        self._horizon_s = _HORIZON * self._triage.drain_s
        for workflow, saved in verdicts:
            if workflow.given_up is saved or self._misplaced(workflow, now_s):
                workflow.given_up = not saved
                self._move(workflow, [self._calls[call] for call in workflow.calls], now_s)

    def _misplaced(self, workflow: Workflow, now_s: float) -> bool:
        """Whether a call of it waits in a lane in which the horizon does not put it now."""
        for call in islice(workflow.calls, _SIBLINGS):
            one = self._calls[call]
            lane = one.key[0]
            if lane in _BOUND and (lane is Lane.EASY) != (now_s < self._urgent_s(one)):
                return True
        return False

    def _urgent_s(self, waiting: Waiting) -> float:
        """When its due date comes within the horizon."""
        return waiting.due_s - waiting.service_s - self._horizon_s

    def _rest_s(self, workflow: Workflow, now_s: float) -> float:
        """Expected rest of a workflow that has calls here."""
        rest_s = 0.0
        for call in islice(workflow.calls, _SIBLINGS):
            rest_s = max(rest_s, self._calls[call].left_s(now_s))
        return rest_s

    def _take_tuned(self, tuned: TunedFile, now_s: float) -> None:
        """Takes over what a tuned file says since it changed."""
        if now_s < tuned.due_s < now_s + _LONGEST_LOOK_S:
            return
        options = tuned.changed(now_s)
        if options is None:
            return
        before = self._config
        self._configure(options.over(self._given))
        if self._config != before:
            self._move(self, list(self._calls.values()), now_s)

    def _set_deadline(self, workflow: Workflow, said_s: float | None, now_s: float) -> None:
        allowed_s = said_s if said_s is not None else workflow.allowed_s
        if allowed_s is None:
            allowed_s = self._config.default_deadline_s
        if allowed_s is None:
            return
        allowed_s = max(allowed_s, self._config.min_deadline_s)
        if allowed_s != workflow.allowed_s:
            workflow.allowed_s = allowed_s
            if workflow in self._triage.workflows:
                self._triage.workflows.put(workflow, workflow.deadline_s)
            self._replace_all(workflow, now_s)

    def _enter_stage(self, workflow: Workflow, said: CallFields, now_s: float) -> tuple[str, str]:
        """The stage a call belongs to, and the visit of it.

        A call that follows one that ended begins a new stage.
        """
        follows = workflow.ended_stage
        begins = follows is not None or workflow.depth == 0
        if begins:
            workflow.depth += 1
        label = said.stage if said.stage is not None else f"#{workflow.depth}"
        stage = self._estimator.stage_of(workflow.class_, label)
        visit = workflow.visits.get(stage, 0)
        if begins or not visit:
            visit += 1
            workflow.visits[stage] = visit
        state = visit_of(stage, visit)
        if follows is not None:
            if workflow.seems_over:
                self._estimator.learn_step(workflow.class_, follows, END, -1.0)
            self._estimator.learn_step(workflow.class_, follows, state)
            self._estimator.learn_gap(workflow.class_, max(0.0, now_s - workflow.ended_s))
        workflow.ended_stage, workflow.seems_over = None, False
        return stage, state

    def _leave_stage(self, workflow: Workflow, state: str, now_s: float) -> None:
        """Notes the stage that a next call may follow; one call alone is no workflow."""
        if workflow.name is None:
            return
        workflow.ended_stage, workflow.ended_s = state, now_s
        if not workflow.calls:
            due_s = now_s + self._estimator.quiet_s(workflow.class_)
            heapq.heappush(self._quiet, (due_s, next(self._numbers), now_s, workflow))

    def _count_ends(self, now_s: float) -> None:
        """Counts workflows that have been quiet for long as over, until another call comes."""
        for _ in range(_ENDS_AT_ONCE):
            if not self._quiet or self._quiet[0][0] > now_s:
                return
            _, _, ended_s, workflow = heapq.heappop(self._quiet)
            state = workflow.ended_stage
            if state is not None and workflow.ended_s == ended_s and not workflow.seems_over:
                workflow.seems_over = True
                self._estimator.learn_step(workflow.class_, state, END)

    def _place(self, waiting: Waiting, now_s: float) -> None:
        """Decides a call's lane and key, and when they must be looked at again."""
        workflow = waiting.workflow
        deadline_s = workflow.deadline_s
        if self._config.order in _IGNORING_DEADLINES:
            self._assign(waiting, Lane.DUE, self._order(waiting, deadline_s))
        elif workflow.allowed_s is None:
            self._assign(waiting, Lane.PATIENT, waiting.call.arrival_s)
        elif self._config.order == "edd":
            self._place_by_hope(waiting, workflow.allowed_s, now_s)
        else:
            self._assign(waiting, Lane.DUE, self._order(waiting, deadline_s))

    def _place_by_hope(self, waiting: Waiting, allowed_s: float, now_s: float) -> None:
        """By due date; while the workflow is late or given up, by a later one."""
        workflow, age_cap = waiting.workflow, self._config.age_cap
        least_s = self._config.best_case * waiting.remaining_s
        allowed_s = extended_s(allowed_s, age_cap, now_s + least_s - workflow.arrival_s)
        late_s = workflow.arrival_s + allowed_s - least_s
        self._triage.workflows.put(workflow, workflow.arrival_s + allowed_s)
        self._triage.expect(now_s)
        if workflow.given_up:
            allowed_s *= age_cap
        waiting.late = allowed_s > (workflow.allowed_s or 0.0)
        waiting.due_s = self._order(waiting, workflow.arrival_s + allowed_s)
        urgent_s = self._urgent_s(waiting)
        if now_s < urgent_s:
            self._assign(waiting, Lane.EASY, workflow.arrival_s, min(urgent_s, late_s))
        else:
            self._assign(waiting, Lane.DUE, waiting.due_s, late_s)
        if waiting.late:
            self._late.join(waiting.call, workflow.arrival_s)
            self._promote_due()

    def _assign(
        self, waiting: Waiting, lane: Lane, order_s: float, timer_s: float = math.inf
    ) -> None:
        waiting.lane, waiting.order_s, waiting.timer_s = lane, order_s, timer_s
        self._set_key(waiting, (lane, order_s))
        if timer_s < math.inf:
            self._timers.put(waiting, timer_s)
        else:
            self._timers.discard(waiting)
        if lane is Lane.PATIENT:
            self._patient.join(waiting.call, order_s)
            self._promote_due()

    def _replace(self, waiting: Waiting, now_s: float) -> None:
        """Finds a new place for a call that waits; one that runs or was promoted keeps its own."""
        if waiting.key[0] in (Lane.RESUMED, Lane.PROMOTED):
            return
        self._leave_shares(waiting)
        self._foresee(waiting, self._groups[waiting.workflow.class_].by_state[waiting.state].work)
        self._place(waiting, now_s)
        self.stale.add(waiting.call)

    def _replace_all(self, workflow: Workflow, now_s: float) -> None:
        waiting = [self._calls[call] for call in workflow.calls]
        for one in waiting[:_FEWEST_MOVES]:
            self._replace(one, now_s)
        self._move(workflow, waiting[_FEWEST_MOVES:], now_s)

    def _move(self, whose: object, waiting: list[Waiting], now_s: float) -> None:
        """Finds new places for calls in the next steps, a part in each."""
        if waiting:
            self._moving[whose] = waiting[::-1]
            self._resume_s = math.nextafter(now_s, math.inf)

    def _go_on_moving(self, moves: int, now_s: float) -> None:
        while moves > 0 and self._moving:
            whose, waiting = next(iter(self._moving.items()))
            if waiting:
                self._replace(waiting.pop(), now_s)
                moves -= 1
            else:
                del self._moving[whose]
        self._resume_s = math.nextafter(now_s, math.inf) if self._moving else math.inf

    def _set_key(self, waiting: Waiting, key: Key) -> None:
        self._bound += (key[0] in _BOUND) - (waiting.key[0] in _BOUND)
        waiting.key = key

    def _withdraw(self, waiting: Waiting, now_s: float) -> None:
        """Takes a call that was admitted or has left out of everything that waits."""
        self._timers.discard(waiting)
        self._set_key(waiting, (Lane.RESUMED, now_s))
        if waiting is self._courtesy:
            self._courtesy = None
        self._leave_shares(waiting)
        self._tenants.leave(waiting.workflow.tenant, waiting)
        groups = self._groups.get(waiting.workflow.class_)
        group = groups.by_state.get(waiting.state) if groups is not None else None
        if groups is None or group is None:
            return
        if group.members.pop(waiting, waiting) is None and not group.members:
            del groups.by_state[waiting.state]
            if not groups.by_state:
                del self._groups[waiting.workflow.class_]

    def _leave_shares(self, waiting: Waiting) -> None:
        self._patient.leave(waiting.call)
        self._late.leave(waiting.call)

    def _promote_due(self) -> None:
        for share in (self._patient, self._late):
            call = share.take_due()
            if call is not None:
                self._promote(self._calls[call])

    def _promote_deprived(self, tenant: str) -> None:
        """Lets one call of another tenant pass, if the one that was admitted has had its share."""
        others = self._tenants.admitted(tenant)
        if others and self._courtesy is None:
            first = min(others, key=lambda waiting: waiting.key)
            self._courtesy = first
            if first.key[0] > Lane.PROMOTED:
                self._leave_shares(first)
                self._promote(first)

    def _promote(self, waiting: Waiting) -> None:
        self._set_key(waiting, (Lane.PROMOTED, next(self._numbers)))
        self._timers.discard(waiting)
        self.stale.add(waiting.call)

    def _join_group(self, waiting: Waiting) -> None:
        class_, state = waiting.workflow.class_, waiting.state
        work = self._estimator.work_after(class_, state)
        groups = self._groups.get(class_)
        if groups is None:
            groups = self._groups[class_] = ClassGroups(self._estimator.solutions(class_))
        group = groups.by_state.get(state)
        if group is None:
            group = groups.by_state[state] = Group(work)
        group.members[waiting] = None
        self._foresee(waiting, group.work)

    def _foresee(self, waiting: Waiting, work: Work) -> None:
        waiting.after_s = work.mean_s
        waiting.reserve_s = work.quantile_s(self._deviations) - work.mean_s

    def _follow_estimates(self, class_: str, now_s: float) -> None:
        """Makes the keys anew of a class's calls whose work to come has shifted."""
        groups = self._groups.get(class_)
        solution = self._estimator.solutions(class_)
        if groups is None or groups.solution == solution:
            return
        groups.solution = solution
        for state, group in groups.by_state.items():
            work = self._estimator.work_after(class_, state)
            if abs(work.mean_s - group.work.mean_s) <= _SHIFT * group.work.mean_s:
                continue
            group.work = work
            self._move(group, list(group.members), now_s)
