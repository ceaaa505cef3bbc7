"""The benchmark's real job runs, gives the same loss in every order, and says why it fails."""

from __future__ import annotations

import pytest

from trimtab.core.benchmark import Options
from trimtab.core.errors import TrimtabError
from trimtab.hosts.testbed import obstacle, two_tiers
from trimtab.hosts.testbed.pipeline_job import Task
from trimtab.placement.real_bench import real_cases, run

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(bool(reason := obstacle()), reason=str(reason)),
]


def silent(message: str, done: float | None = None) -> None:
    """Shows nothing."""


def test_one_case_for_each_baseline() -> None:
    cases = real_cases(Options(quick=True), silent)
    assert [case.baseline for case in cases] == [
        "mean of 3 random orders",
        "best of 3 random orders",
        "hostname-order",
    ]
    assert {(case.case, case.metric, case.unit) for case in cases} == {
        ("real/namespaces-2x4/dp4-pp2", "step_time_s", "s")
    }
    assert len({case.value for case in cases}) == 1


def test_a_job_that_fails_says_why() -> None:
    pair = two_tiers([1, 1], host_bytes_per_s=1e7, uplink_bytes_per_s=1e7)
    with pytest.raises(TrimtabError, match=r"the job on namespaced hosts failed: .+"):
        run(pair, Task(orders=(("h0", "h1"),), pipeline=3, timeout_s=20), silent)
