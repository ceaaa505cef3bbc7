"""Deadline-aware serving of multi-stage agent workflows (HexGen-Text2SQL, arXiv:2505.05286)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimtab.urgency.config import UrgencyConfig as UrgencyConfig
    from trimtab.urgency.middleware import PriorityMiddleware as PriorityMiddleware
    from trimtab.urgency.policy import UrgencyPolicy as UrgencyPolicy

_HOME = {
    "PriorityMiddleware": "trimtab.urgency.middleware",
    "UrgencyConfig": "trimtab.urgency.config",
    "UrgencyPolicy": "trimtab.urgency.policy",
}

__all__ = ["PriorityMiddleware", "UrgencyConfig", "UrgencyPolicy"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
