"""Agents that come together in a plan's order, timed against torchrun's own rendezvous."""

from __future__ import annotations

import pytest

from trimtab.core.errors import TrimtabError
from trimtab.placement import launch_bench
from trimtab.placement.launch_bench import come_together, names

pytestmark = pytest.mark.integration


def test_agents_get_the_plans_ranks() -> None:
    hosts = names(4, 3)
    (timing,) = come_together(hosts, rounds=1)
    assert [hosts[rank] for rank in timing.ranks] == sorted(hosts)
    assert min(timing.c10d_s, timing.planned_s) > 0


def test_what_agents_fail_of_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_bench.rendezvous_agents, "__name__", "trimtab.hosts.nowhere")
    with pytest.raises(TrimtabError, match=r"did not come together: .*No module named"):
        come_together(["a"], rounds=1)
