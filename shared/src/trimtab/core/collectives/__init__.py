"""Collectives as explicit plans: who sends which part of the payload to whom, step by step.

A plan is independent of the network it was made for; `trimtab.core.cost` says what it costs on a
tree, and `trimtab.hosts.torch` runs it.
"""

from trimtab.core.collectives.check import PlanFault, check_plan
from trimtab.core.collectives.network_tree import NetworkTree
from trimtab.core.collectives.programme import Receive, Send, Sum, Turn, programme, waves
from trimtab.core.collectives.schedule import UNIT, Layout, Schedule, Step

__all__ = [
    "UNIT",
    "Layout",
    "NetworkTree",
    "PlanFault",
    "Receive",
    "Schedule",
    "Send",
    "Step",
    "Sum",
    "Turn",
    "check_plan",
    "programme",
    "waves",
]
