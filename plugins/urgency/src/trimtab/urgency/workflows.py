"""The workflows whose calls come and go: when each began, what it may take, where it stands."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field

from trimtab.core.policy import Call


@dataclass(slots=True, eq=False)
class Workflow:
    """One workflow, seen through its calls.

    Attributes:
        class_: the kind of workflow.
        arrival_s: when its first call arrived.
        name: what its clients call it; None for a single call that named no workflow.
        allowed_s: seconds it may take in all; None without a deadline.
        given_up: whether it is set aside so that others can be in time.
        tenant: whose workflow it is.
        calls: those in the engine, in the order of their arrival.
        visits: how often each stage has begun.
        depth: how many stages have begun.
        ended_stage: the visit of a stage that ended last, until a call follows it.
        ended_s: when it ended.
        seems_over: whether it was counted as the workflow's last.
        seen_s: the last time anything happened.
    """

    class_: str
    arrival_s: float
    name: str | None
    allowed_s: float | None = None
    given_up: bool = False
    tenant: str = ""
    calls: dict[Call, None] = field(default_factory=dict)
    visits: dict[str, int] = field(default_factory=dict)
    depth: int = 0
    ended_stage: str | None = None
    ended_s: float = 0.0
    seems_over: bool = False
    seen_s: float = 0.0

    @property
    def deadline_s(self) -> float:
        """The time by which its last call should end; infinite without a deadline."""
        return math.inf if self.allowed_s is None else self.arrival_s + self.allowed_s


class WorkflowTable:
    """The named workflows, the longest idle first.

    Those idle for longer than the time to live, and the longest idle beyond the limit, are
    forgotten; one with calls in the engine never is.

    Args:
        limit: how many workflows are kept.
        ttl_s: for how long an idle workflow is kept.
    """

    def __init__(self, limit: int, ttl_s: float) -> None:
        self._limit, self._ttl_s = limit, ttl_s
        self._workflows: OrderedDict[tuple[str, str], Workflow] = OrderedDict()

    def __len__(self) -> int:
        return len(self._workflows)

    def of(self, name: str | None, class_: str, now_s: float, tenant: str = "") -> Workflow:
        """A tenant's workflow of a name, begun now where it is new; a fresh one for no name."""
        if name is None:
            return Workflow(class_, now_s, None, tenant=tenant, seen_s=now_s)
        self._forget(now_s)
        workflow = self._workflows.get((tenant, name))
        if workflow is None:
            workflow = Workflow(class_, now_s, name, tenant=tenant)
            self._workflows[tenant, name] = workflow
        self.touch(workflow, now_s)
        return workflow

    def touch(self, workflow: Workflow, now_s: float) -> None:
        """Notes that something happened to a workflow."""
        workflow.seen_s = now_s
        if workflow.name is not None:
            self._workflows.move_to_end((workflow.tenant, workflow.name))

    def _forget(self, now_s: float) -> None:
        """Forgets what is too old or too much; amortised, one look for each call that arrives."""
        while self._workflows:
            name, oldest = next(iter(self._workflows.items()))
            if oldest.calls:
                self.touch(oldest, now_s)
                return
            if oldest.seen_s + self._ttl_s > now_s and len(self._workflows) < self._limit:
                return
            del self._workflows[name]
