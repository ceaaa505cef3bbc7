"""The backend ``gentree`` with real processes: every collective, training, and faults."""

from __future__ import annotations

import re

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def right(shown: list[tuple[int, str, str]]) -> list[str]:
    assert [status for status, _, _ in shown] == [0] * len(shown), shown
    return re.findall(r"right: (\w+)", shown[0][1])


def test_every_collective(job) -> None:
    assert right(job("collectives_rank.py")) == [
        "sums",
        "dtypes",
        "operations",
        "as_gloo_refuses",
        "shapes",
        "expanded",
        "inference",
        "futures",
        "calls_in_callbacks",
        "scattered",
        "gathered",
        "passed_on",
        "base_errors",
        "subgroups",
        "coalesced",
        "waited_and_not",
        "freed",
        "identical",
        "functional",
        "sparse",
        "groups_own_calls",
        "in_a_profile",
        "behind_a_barrier",
        "late_but_in_time",
        "told_otherwise",
        "ends_its_threads",
    ]


def test_a_rank_alone(job) -> None:
    ((status, _, errors),) = job("collectives_rank.py", "sums", ranks=1)
    assert status == 0, errors


def test_training_loses_as_over_gloo(job) -> None:
    shown = job("train_rank.py")
    assert [status for status, _, _ in shown] == [0] * 4, shown
    lines = [line.split() for line in shown[0][1].splitlines()]
    losses = {(kind, group): list(map(float, values)) for kind, group, *values in lines}
    for kind in ("sgd", "hook", "zero1", "fsdp2"):
        gloo, ours = losses[kind, "gloo"], losses[kind, "gentree"]
        assert len(gloo) == 12
        assert gloo[-1] < 0.9 * gloo[0]
        assert ours == pytest.approx(gloo, rel=1e-6)
        assert ours == losses[kind, "again"]


FAULTS = {
    "size": "rank 2 on h2 called all_reduce(50000 float32, SUM) where {} called all_reduce(100000",
    "gathered": "rank 2 on h2 called all_gather(50000 float32) where {} called all_gather(100000",
    "dtype": "rank 2 on h2 called all_reduce(100000 int32, SUM) where {} called all_reduce(100000",
    "operation": "rank 2 on h2 called all_reduce(100000 float32, MAX) where {} called all_reduce",
    "plan": "rank 2 on h2 has another plan for all_reduce(100000 float32, SUM) than {}",
    "memory": "rank 2 on h2 failed in all_reduce(100000 float32, SUM): MemoryError: 400000 bytes",
    "late": "rank 2 on h2 failed or did not take part",
    "killed": "rank 2 on h2 failed or did not take part",
}


def test_each_fault_names_the_rank_within_the_timeout(job) -> None:
    shown = job("faults_rank.py", *FAULTS)
    for rank in (0, 1, 3):
        status, printed, errors = shown[rank]
        assert status == 0, errors
        for (fault, told), line in zip(FAULTS.items(), printed.splitlines(), strict=True):
            assert line.startswith(f"{fault}, after ")
            assert told.format(f"rank {rank} on h{rank}") in line, (rank, shown)
            # By the limit of five seconds, not by the minute that the group had before.
            assert float(re.findall(r"after (\S+) s", line)[0]) < 55
