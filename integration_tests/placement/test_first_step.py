"""A job that was launched with a plan is compared with it by itself, before it learns anything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.core.cluster import Cluster, Node
from trimtab.placement.job import TrainingJob
from trimtab.placement.planner import plan_placement

pytestmark = pytest.mark.integration

RANK = str(Path(__file__).parent / "first_step_rank.py")
DEEPSPEED_RANK = str(Path(__file__).parent / "first_step_deepspeed_rank.py")
LEARNED = ["[0.0, 0.0]"] * 2
JOB = TrainingJob(pipeline_parallel=2, data_parallel=1, gpus_per_node=2, alpha=0.1)


def planned(folder: Path, *, devices: list[int]) -> str:
    """A plan for this machine alone that gives the ranks these devices."""
    cluster = Cluster(nodes=(Node(name="here", device="cpu", count=2),), switches=(), links=())
    plan = plan_placement(cluster, JOB)
    slots = tuple(
        slot.model_copy(update={"device": device})
        for slot, device in zip(plan.ranks, devices, strict=True)
    )
    path = folder / "plan.json"
    plan.model_copy(update={"ranks": slots}).write(path)
    return str(path)


def run(plan: str, rank: str = RANK, names: str = "pp,dp", **more: str) -> tuple[int, str, str]:
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TRIMTAB_HOST": "here",
        "TRIMTAB_PLAN": plan,
        "MESH_NAMES": names,
        **more,
    }
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*words, rank], env=env, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


def test_a_job_that_lies_as_planned_says_nothing(tmp_path) -> None:
    status, stdout, stderr = run(planned(tmp_path, devices=[0, 1]), TRIMTAB_STRICT="1")
    assert status == 0, stderr[:3000]
    assert re.findall(r"learned (.*)", stdout) == LEARNED
    assert "trimtab:" not in stderr


def test_a_job_that_lies_elsewhere_is_told_once_and_goes_on(tmp_path) -> None:
    status, stdout, stderr = run(planned(tmp_path, devices=[1, 0]))
    assert status == 0, stderr[:3000]
    assert re.findall(r"learned (.*)", stdout) == LEARNED
    sentence = "2 of 2 ranks run elsewhere than planned, the first of them rank 0 on here/0"
    assert stderr.count(sentence) == 1


def test_a_strict_job_with_other_groups_never_learns(tmp_path) -> None:
    plan = planned(tmp_path, devices=[0, 1])
    status, stdout, stderr = run(plan, names="dp,pp", TRIMTAB_STRICT="1")
    assert status == 1
    assert "learned" not in stdout
    assert "the framework's pp group [0] is no pipeline group of the plan, such as [0, 1]" in stderr


def test_deepspeeds_engine_is_compared_by_itself(tmp_path) -> None:
    plan = json.loads(Path(planned(tmp_path, devices=[0, 1])).read_text())
    plan["details"]["job"] |= {"pipeline_parallel": 1, "data_parallel": 2}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    more = {"DS_ACCELERATOR": "cpu", "TRIMTAB_STRICT": "1"}
    status, stdout, stderr = run(str(tmp_path / "plan.json"), DEEPSPEED_RANK, **more)
    assert status == 1
    assert "learned" not in stdout
    assert "the framework's pipe group [0, 1] is no pipeline group of the plan" in stderr
