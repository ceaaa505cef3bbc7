"""The backend ``gentree`` under strain: threads, forks, many calls, its store gone, its end."""

from __future__ import annotations

import re
import signal

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_groups_under_strain(job) -> None:
    shown = job("strain_rank.py")
    assert [status for status, _, _ in shown] == [0] * 4, shown
    assert re.findall(r"right: (\w+)", shown[0][1]) == [
        "two_threads",
        "forked",
        "many_at_once",
        "compressed",
        "replicated_and_sharded",
        "destroyed",
    ]


def test_the_store_goes_with_the_rank_that_had_it(job) -> None:
    (status, _, _), *others = job("strain_rank.py", "storeless")
    assert status == -signal.SIGKILL
    told = []
    for rank, (status, printed, errors) in enumerate(others, start=1):
        assert status == 0, (rank, errors)
        first, last = printed.splitlines()
        assert re.search(r"rank \d on h\d failed or did not take part in time", first), printed
        # By the limit of five seconds, not by the minute that the group had before.
        assert float(re.findall(r"after (\S+) s", first)[0]) < 55
        assert last == "destroyed"
        told.append("rank 0 on h0" in first)
    assert any(told), others
