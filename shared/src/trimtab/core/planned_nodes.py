"""The nodes of a plan's ranks, for tools that start one launcher on each node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from trimtab.core.errors import BadInput, Unsupported
from trimtab.core.plan import Plan, Slot


@dataclass(frozen=True, slots=True)
class PlannedNode:
    """A node and its devices, in rank order."""

    name: str
    devices: tuple[int, ...]


def by_node(slots: Iterable[Slot]) -> Iterator[PlannedNode]:
    """The nodes in the order in which they come first."""
    devices = defaultdict(list)
    for slot in slots:
        devices[slot.node].append(slot.device)
    for name, numbers in devices.items():
        yield PlannedNode(name, tuple(numbers))


def require_ranks(plan: Plan) -> None:
    """Goes on only with the plan of a training job.

    Raises:
        BadInput: the plan has no ranks.
    """
    if not plan.ranks:
        raise BadInput(f"the {plan.planner} plan has no ranks", fix="emit a training plan")


def training_nodes(plan: Plan, tool: str) -> list[PlannedNode]:
    """The nodes in rank order, for a tool that numbers the ranks of one node in a row.

    Raises:
        BadInput: the plan has no ranks.
        Unsupported: it numbers them otherwise.
    """
    require_ranks(plan)
    nodes = list(by_node(plan.ranks))
    in_a_row = [Slot(node=node.name, device=d) for node in nodes for d in node.devices]
    if in_a_row != list(plan.ranks):
        raise Unsupported(
            "the plan numbers ranks across nodes in turn",
            fix=f"{tool} numbers all ranks of a node in a row; emit for slurm instead",
        )
    return nodes


def require_even(nodes: Iterable[PlannedNode], tool: str, instead: str) -> None:
    """Goes on only if all nodes run as many ranks.

    Raises:
        Unsupported: they do not.
    """
    sizes = {len(node.devices) for node in nodes}
    if len(sizes) > 1:
        raise Unsupported(
            f"the nodes run {sorted(sizes)} ranks each",
            fix=f"{tool} needs as many on every node; emit for {instead} instead",
        )
