"""DeepSpeed's ZeRO over plans, switched on by its configuration alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.core.cluster import Cluster, Node
from trimtab.placement.job import TrainingJob
from trimtab.placement.planner import plan_placement

HERE = Path(__file__).parent

pytestmark = [pytest.mark.integration, pytest.mark.slow]

STAGES = "0123"


def losses(shown: list[tuple[int, str, str]], backend: str) -> dict[tuple[str, str], list[float]]:
    """The losses of a job by stage and run, where every rank has the backend."""
    assert [status for status, _, _ in shown] == [0] * len(shown), shown
    assert all(f"backend {backend}" in printed.splitlines() for _, printed, _ in shown)
    lines = [line.split() for line in shown[0][1].splitlines() if line[:1].isdigit()]
    return {(stage, run): list(map(float, values)) for stage, run, *values in lines}


def test_every_stage_loses_as_over_gloo(job, network: str) -> None:
    gloo = losses(job("zero_rank.py", "none", STAGES, told=False), "gloo")
    ours = losses(job("zero_rank.py", network, STAGES, "2", told=False), "gentree")
    for stage in STAGES:
        assert gloo[stage, "0"][-1] < 0.9 * gloo[stage, "0"][0]
        assert ours[stage, "0"] == pytest.approx(gloo[stage, "0"], rel=1e-6)
        assert ours[stage, "0"] == ours[stage, "1"]


def test_a_configuration_in_the_arguments_is_found_before_it_is_read(
    job, network: str, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"trimtab": {"gentree": {"topology": network}}}))
    words = ("none", "", "--deepspeed_config", str(path))
    losses(job("zero_rank.py", *words, ranks=2, told=False), "gentree")


def test_both_blocks_of_one_configuration_apply(tmp_path: Path) -> None:
    """The hosts get the plan's order, the job is compared with it, and it runs over plans."""
    cluster = Cluster(nodes=(Node(name="here", device="cpu", count=2),), switches=(), links=())
    job = TrainingJob(pipeline_parallel=1, data_parallel=2, gpus_per_node=2, alpha=0.1)
    plan_placement(cluster, job).write(tmp_path / "plan.json")
    (tmp_path / "cluster.yaml").write_text(cluster.model_dump_json())
    blocks = {
        "placement": {"plan": str(tmp_path / "plan.json"), "strict": True},
        "gentree": {"topology": str(tmp_path / "cluster.yaml"), "always": True},
    }
    (tmp_path / "both.json").write_text(json.dumps({"trimtab": blocks}))
    launch = ["-m", "trimtab.cli", "launch", "--config", str(tmp_path / "both.json"), "--"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(HERE / "zero_rank.py"), "none", "1"]
    done = subprocess.run(
        [sys.executable, *launch, sys.executable, *torchrun, *script],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRIMTAB_HOST": "here"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("backend gentree") == 2
    assert "not compared with its plan" not in done.stderr
