"""The report page of a plan of AllReduce: one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from trimtab.core.cluster import Cluster
from trimtab.core.collectives import NetworkTree, Step
from trimtab.core.cost import Constants, PlanEvaluator
from trimtab.core.cost.plan_cost import total
from trimtab.core.documents import validate, write_atomic
from trimtab.core.plan import Plan
from trimtab.core.report_page import fact_boxes, filled
from trimtab.gentree.plan_pictures import links_picture, messages_picture, sizes_picture
from trimtab.gentree.planner import PlannedSize, leaf_order, planned_sizes
from trimtab.gentree.table import shown_bytes, shown_seconds

MOST_DRAWN = 1024
"""Networks of more ranks are not drawn."""


def write_report(plan: Plan, cluster: Cluster, path: str | Path) -> None:
    """Writes the page of a plan, whole or not at all.

    Args:
        plan: of the planner ``allreduce``.
        cluster: the network it was made for.
        path: of the HTML file.

    Raises:
        BadInput: the plan is another planner's, its ranks are not the cluster's, or the file cannot
            be written.
    """
    write_atomic(path, report_page(plan, cluster))


def report_page(plan: Plan, cluster: Cluster) -> str:
    """The page of a plan as HTML; the arguments and errors are those of `write_report`."""
    sizes = planned_sizes(plan)
    slots = [(slot.node, slot.device) for slot in plan.ranks]
    tree = NetworkTree.of_cluster(cluster, slots)
    constants = validate(Constants, plan.details.get("constants"), where="details.constants")
    drawn = _Drawn(tree, constants, leaf_order(tree, slots))
    # Sizes with the same steps are drawn once, for the largest of them.
    different = {size.schedule.steps: size for size in sizes}
    return filled(
        "trimtab.gentree",
        title=escape(f"AllReduce of {len(slots):,} ranks on {cluster.name}"),
        subtitle=escape(f"Made {plan.created:%Y-%m-%d %H:%M} UTC by trimtab plan allreduce."),
        facts=_facts(sizes[-1]),
        table=_table(sizes),
        sizes=_sizes(sizes),
        plans="".join(drawn.section(size) for size in different.values()),
    )


def _facts(size: PlannedSize) -> str:
    best = min(size.baselines_s.values(), default=size.seconds)
    facts = [
        (shown_seconds(size.seconds), f"for {shown_bytes(size.payload_bytes)} on each rank"),
        (f"{size.bound_s / size.seconds:.0%}" if size.seconds else "–", "of what can be reached"),
        (f"{best / size.seconds:.2f}×" if size.seconds else "–", "the best algorithm of libraries"),
        (str(size.rounds), f"rounds, in {size.schedule.chunks} chunks"),
        (str(size.width), "meet in the widest incast, the receiver included"),
    ]
    return fact_boxes(facts)


def _table(sizes: Sequence[PlannedSize]) -> str:
    names = list(sizes[-1].baselines_s)
    head = "".join(f"<th>{escape(name)}</th>" for name in ("size", "planned", "bound", *names))
    rows = []
    for size in sizes:
        times = [size.baselines_s.get(name, float("nan")) for name in names]
        cells = "".join(f"<td>{shown_seconds(time_s)}</td>" for time_s in times)
        rows.append(
            f"<tr><td>{shown_bytes(size.payload_bytes)}</td>"
            f'<td class="best">{shown_seconds(size.seconds)}</td>'
            f"<td>{shown_seconds(size.bound_s)}</td>{cells}</tr>"
        )
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _sizes(sizes: Sequence[PlannedSize]) -> str:
    """All times as multiples of the planned one."""
    planned = [size for size in sizes if size.seconds > 0]
    lines = {
        "planned": [(s.payload_bytes, 1.0) for s in planned],
        "bound": [(s.payload_bytes, s.bound_s / s.seconds) for s in planned],
    }
    for name in sizes[-1].baselines_s:
        lines[name] = [
            (s.payload_bytes, s.baselines_s[name] / s.seconds)
            for s in planned
            if name in s.baselines_s
        ]
    return sizes_picture(lines)


class _Drawn:
    """Draws plans on one network."""

    def __init__(self, tree: NetworkTree, constants: Constants, order: Sequence[int]) -> None:
        self._tree = tree
        self._leaf_of = np.array(order, dtype=np.int64)
        self._evaluator, self._constants = PlanEvaluator(tree, constants), constants

    def section(self, size: PlannedSize) -> str:
        """The steps of one size side by side."""
        switches = "; ".join(f"below {name}: {choice}" for name, choice in size.switches[:12])
        head = f"<h2>{shown_bytes(size.payload_bytes)}: {escape(switches)}</h2>"
        if self._tree.size > MOST_DRAWN:
            return f"<section>{head}<p>The network is too large to be drawn.</p></section>"
        steps = [step.renumbered(self._leaf_of) for step in size.schedule.arrays]
        figures = "".join(self._figure(n, step, size) for n, step in enumerate(steps, 1))
        return (
            f"<section>{head}<p>The steps of the reduce-scatter; the all-gather mirrors all but "
            "those in one shot. Left: who (row) sends how much to whom (column), in the order of "
            "the network. Right: how long each link is busy; the busiest is red.</p>"
            f'<div class="steps">{figures}</div></section>'
        )

    def _figure(self, number: int, step: Step, size: PlannedSize) -> str:
        cost = self._evaluator.step(step)
        seconds = total([cost], self._constants).seconds(size.payload_bytes)
        rounds = "1 round" if cost.rounds == 1 else f"{cost.rounds} rounds"
        caption = (
            f"<b>Step {number}</b>: {rounds}, {shown_seconds(seconds)}, incast of {cost.width}"
            f"{', in one shot' if step.one_shot.all() else ''}"
        )
        return (
            f"<figure><figcaption>{caption}</figcaption>"
            f'<div class="both">{messages_picture(step, self._tree.size)}'
            f"{links_picture(self._tree, cost)}</div></figure>"
        )
