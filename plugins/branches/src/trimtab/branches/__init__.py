"""Redundant reasoning branches with early stop and pruning (SART, arXiv:2505.13326)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimtab.branches.config import BranchesConfig as BranchesConfig
    from trimtab.branches.middleware import Middleware as Middleware
    from trimtab.branches.policy import BranchesPolicy as BranchesPolicy

_HOME = {
    "BranchesConfig": "trimtab.branches.config",
    "BranchesPolicy": "trimtab.branches.policy",
    "Middleware": "trimtab.branches.middleware",
}

__all__ = ["BranchesConfig", "BranchesPolicy", "Middleware"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
