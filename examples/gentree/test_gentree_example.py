"""The example is planned, and trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_its_network_is_planned() -> None:
    from trimtab.core.collectives import check_plan
    from trimtab.core.topology import read_topology
    from trimtab.gentree.planner import plan_allreduce, planned_sizes

    plan = plan_allreduce(read_topology(HERE / "cluster.yaml"), [2.0**20])
    (size,) = planned_sizes(plan)
    assert len(plan.ranks) == 4
    check_plan(size.schedule)


def assert_trains(words: list[str], steps: int, folder: Path, **environment: str) -> None:
    """Four ranks train for so many steps, and their loss falls."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = subprocess.run(
        [sys.executable, *torchrun, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRIMTAB_HOST": "localhost", **environment},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if "loss" in line]
    assert len(losses) == steps
    assert losses[-1] < losses[0]


@pytest.mark.integration
def test_it_trains() -> None:
    assert_trains(
        ["train.py"],
        20,
        HERE,
        TRIMTAB_GENTREE_TOPOLOGY=str(HERE / "cluster.yaml"),
        TRIMTAB_GENTREE_ALWAYS="1",
    )


@pytest.mark.integration
def test_another_examples_training_takes_it_from_its_configuration_alone() -> None:
    script = ["train_deepspeed.py", "--steps", "8", "--deepspeed_config"]
    assert_trains(
        [*script, "../gentree/deepspeed.json"], 8, HERE.parent / "launch", DS_ACCELERATOR="cpu"
    )
