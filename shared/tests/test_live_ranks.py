"""Where a live rank says it runs, without a framework."""

from __future__ import annotations

import pytest

from trimtab.hosts.torch import job_check
from trimtab.hosts.torch.job_check import LiveRank


@pytest.mark.parametrize(
    ("environment", "device"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "3"}, 3),
        ({"SLURM_LOCALID": "2"}, 2),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,6"}, 6),
        ({"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "5"}, 5),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "5"}, 1),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "GPU-1f,GPU-2e"}, 1),
    ],
)
def test_the_device_is_the_one_that_the_rank_sees(monkeypatch, environment, device) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert job_check._own_device() == device


def test_a_machine_is_known_by_each_of_its_names(monkeypatch) -> None:
    rank = LiveRank(("n7.cluster", "10.0.0.7"), 0)
    assert rank.runs_on("n7")
    assert rank.runs_on("n7.cluster")
    assert rank.runs_on("10.0.0.7")
    assert not rank.runs_on("n77")
    assert not rank.runs_on("10.0.0.77")
    monkeypatch.setenv("TRIMTAB_HOST", "pod-3")
    assert job_check._own_names()[0] == "pod-3"
