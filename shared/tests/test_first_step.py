"""When a job looks at itself: with a plan, once, before the first step; torch is a stand-in."""

from __future__ import annotations

import sys
import types

import pytest

from trimtab.hosts.torch import first_step


@pytest.fixture
def torch(monkeypatch):
    """A torch that remembers its hooks; its job is not initialised at first."""
    modules = {
        name: types.ModuleType(name) for name in ("torch", "torch.distributed", "torch.optim")
    }
    optimizer = modules["torch.optim.optimizer"] = types.ModuleType("torch.optim.optimizer")
    hooks: list[object] = []
    optimizer.register_optimizer_step_pre_hook = hooks.append
    distributed = modules["torch.distributed"]
    distributed.is_available, distributed.is_initialized = lambda: True, lambda: False
    modules["torch"].distributed, modules["torch"].hooks = distributed, hooks
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["torch"]


@pytest.fixture
def looks(only):
    """How often an installed plugin was asked to look."""
    source = (
        "from trimtab.core.hooks import hookimpl, PluginInfo\n"
        "looks = []\n"
        "@hookimpl\n"
        "def trimtab_info(): return PluginInfo('looks', 'always')\n"
        "@hookimpl\n"
        "def trimtab_first_step(): looks.append(1)\n"
    )
    only.add(
        "trimtab-onlooker",
        entry_points={"trimtab.plugins": {"onlooker": "onlooker"}},
        files={"onlooker.py": source},
    )
    import onlooker

    return onlooker.looks


@pytest.mark.parametrize(
    "environment", [{}, {"TRIMTAB_PLAN": ""}, {"TRIMTAB_PLAN": "p.json", "TRIMTAB_CHECK": "0"}]
)
def test_without_a_plan_or_switched_off_nothing_is_armed(torch, environment) -> None:
    first_step.arm(environment)
    assert torch.hooks == []


def test_plugins_look_once_and_only_after_initialisation(torch, looks) -> None:
    first_step.arm({"TRIMTAB_PLAN": "plan.json"})
    (hook,) = torch.hooks
    assert hook("optimizer", (), {}) is None
    assert looks == []
    torch.distributed.is_initialized = lambda: True
    assert hook("optimizer", (), {}) is None
    assert hook("optimizer", (), {}) is None
    assert looks == [1]
