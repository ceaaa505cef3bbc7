"""Lets plugins look at a launched job from inside, once its groups exist and before it learns.

torch calls a hook before each step of any optimizer. The first of them is the earliest moment that
every framework and every training loop have in common.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from trimtab.hosts.job_variables import CHECK_VARIABLE, PLAN_VARIABLE


def arm(environment: Mapping[str, str] = os.environ) -> None:
    """Has the plugins look before the first step, in a process of a job that has a plan."""
    if not environment.get(PLAN_VARIABLE) or environment.get(CHECK_VARIABLE) == "0":
        return
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    register_optimizer_step_pre_hook(_Look())


class _Look:
    """The hook; it stays registered, since torch is walking over its hooks when it calls one."""

    def __init__(self) -> None:
        self._looked = False

    def __call__(self, optimizer: object, args: Any, kwargs: Any) -> None:
        from torch import distributed

        if self._looked or not (distributed.is_available() and distributed.is_initialized()):
            return
        self._looked = True
        from trimtab.core.hooks import discover

        for plugin in discover()[0]:
            plugin.look_inside()
