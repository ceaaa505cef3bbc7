"""One run of a paper's cluster: who dispatches, in which order calls wait, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trimtab.core.simulate import ServingResult, simulate
from trimtab.core.simulate.result import WorkflowRecord
from trimtab.core.workload import Request
from trimtab.urgency.dispatch import Backlog, Prediction, RoutedCall, rule
from trimtab.urgency.paper.hardware import SEATS, Cluster, Gpu
from trimtab.urgency.paper.orders import order_policies, router_order
from trimtab.urgency.paper.traces import database_of, stage_of
from trimtab.urgency.simulated_router import HoldingRouter

_MARGIN = 0.2
"""Share of the workflows at each end that figures leave out: a cluster that fills or empties."""


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison.

    Attributes:
        name: what reports call it.
        rule: the dispatch rule.
        options: the rule's.
        order: the order of each engine's queue.
        held: the order of the calls held at the router.
    """

    name: str
    rule: str
    order: str = "fcfs"
    held: str = "fcfs"
    options: dict[str, object] = field(default_factory=dict)

    @property
    def knows_deadlines(self) -> bool:
        """Whether what it does depends on the deadlines."""
        known = {"edd", "llf", "urgency"}
        return self.rule == "auto" or self.order in known or self.held in known


def serve(
    side: Side, cluster: Cluster, requests: Sequence[Request], seats: int = SEATS
) -> ServingResult:
    """Serves the calls on the cluster."""
    router = HoldingRouter(
        rule(side.rule, **side.options),
        [Backlog(number, seats, _predictor(gpu)) for number, gpu in enumerate(cluster)],
        _estimate,
        router_order(side.held),
    )
    return simulate(
        requests,
        [gpu.replica(seats) for gpu in cluster],
        router=router,
        policies=order_policies(side.order, cluster),
    )


def middle(result: ServingResult) -> list[WorkflowRecord]:
    """The workflows that arrived neither first nor last."""
    ordered = sorted(result.workflows, key=lambda workflow: workflow.started_s)
    skipped = int(_MARGIN * len(ordered))
    return ordered[skipped : len(ordered) - skipped]


def _predictor(gpu: Gpu) -> Callable[[RoutedCall], Prediction]:
    def predict(call: RoutedCall) -> Prediction:
        return Prediction(gpu.prefill_s(call.prompt_tokens), gpu.decode_s(call.output_tokens))

    return predict


def _estimate(request: Request) -> RoutedCall:
    """What a router expects: the prompt is known, the output is as long as its stage's mostly."""
    workflow = str(request.workflow)
    return RoutedCall(
        prompt_tokens=request.prompt_tokens,
        output_tokens=stage_of(request).output.mean,
        class_=database_of(workflow),
        stage=str(request.stage),
        workflow=workflow,
    )
