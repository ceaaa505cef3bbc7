from __future__ import annotations

import pytest

from trimtab.placement.bench import SETTINGS
from trimtab.placement.grid import Demand
from trimtab.placement.launch_bench import names
from trimtab.placement.step_bench import step_cases


def test_a_modelled_step_names_every_baseline_and_scattered_hosts_lose() -> None:
    cases = {case.baseline: case for case in step_cases([SETTINGS["paper-i"]], seed=0)}
    for name in ("best-fit", "random-fit", "gpu-packing", "topology-aware", "hostname-order"):
        assert {f"{name} pp", f"{name} dp"} <= set(cases)
    assert {case.case for case in cases.values()} == {"model/step"}
    assert len({case.value for case in cases.values()}) == 1
    assert cases["random-fit pp"].ratio > 1


def test_a_step_inside_one_pod_needs_the_nodes_links_alone() -> None:
    """All placements are alike, and take what one node sends over its own link."""
    cases = list(step_cases([Demand(4, 2, (8,))], seed=0))
    assert [case.ratio for case in cases] == pytest.approx([1.0] * len(cases))


def test_hosts_come_in_a_seeded_order() -> None:
    assert names(9, 1) == names(9, 1) != names(9, 2)
    assert sorted(names(9, 1)) == [f"node{number:04d}" for number in range(9)]
