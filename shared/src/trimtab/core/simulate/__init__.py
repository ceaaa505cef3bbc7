"""Simulators: of serving, engine step by engine step in the time of its events."""

from trimtab.core.simulate.dispatch import Dispatcher, Router, dispatcher
from trimtab.core.simulate.result import ServingResult
from trimtab.core.simulate.serving import KvLink, ReplicaSpec, simulate

__all__ = [
    "Dispatcher",
    "KvLink",
    "ReplicaSpec",
    "Router",
    "ServingResult",
    "dispatcher",
    "simulate",
]
