"""The vLLM host: one scheduler class that trimtab policies plug into, and the HTTP side of it.

Nothing is imported before it is asked for, so `trimtab.hosts.vllm.Middleware` costs no engine.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimtab.hosts.vllm.middleware import Middleware as Middleware
    from trimtab.hosts.vllm.scheduler import Scheduler as Scheduler

_HOME = {
    "Middleware": "trimtab.hosts.vllm.middleware",
    "Scheduler": "trimtab.hosts.vllm.scheduler",
}

__all__ = ["Middleware", "Scheduler"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
