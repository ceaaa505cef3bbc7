"""Real torchrun jobs on hosts of their own: ranks and groups lie where the plan says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from trimtab.core.plan import Plan
from trimtab.hosts.testbed import TreeNetwork, obstacle, two_tiers
from trimtab.placement.job import TrainingJob
from trimtab.placement.planner import plan_placement

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(bool(reason := obstacle()), reason=str(reason)),
]

RANK = str(Path(__file__).parent / "mesh_rank.py")
LAUNCH = [sys.executable, "-m", "trimtab.cli", "launch", "--plan"]
CLUSTER = two_tiers([2, 2], host_bytes_per_s=125e6, uplink_bytes_per_s=125e6, devices_per_host=2)
# Pipelines weigh more, so each lies below one leaf: h0 and h1, h2 and h3.
JOB = TrainingJob(
    tensor_parallel=2, pipeline_parallel=2, data_parallel=2, gpus_per_node=2, alpha=0.1
)
ORDER = ["h0", "h2", "h1", "h3"]
BY_RANK = [host for host in ORDER for _ in range(2)]


@pytest.fixture(scope="module")
def network():
    with TreeNetwork(CLUSTER) as up:
        yield up


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    made = plan_placement(CLUSTER, JOB)
    assert [slot.node for slot in made.ranks] == BY_RANK
    made.write(path)
    return str(path)


def launched(network: TreeNetwork, plan: str, tmp_path: Path, *options: str) -> dict[str, Any]:
    """What the first rank showed of a job that torchrun starts on every host."""
    words = [*LAUNCH, plan, "--", "torchrun", *options, RANK]
    env = {"OMP_NUM_THREADS": "1", "TRIMTAB_CACHE": str(tmp_path)}
    done = network.run_all(dict.fromkeys(network.addresses, words), env=env, timeout_s=240)
    assert {host: run.returncode for host, run in done.items()} == dict.fromkeys(done, 0), [
        run.stderr[-2000:] for run in done.values()
    ]
    text = "".join(run.stdout for run in done.values())
    shown: dict[str, Any] = json.loads(re.findall(r"^shown (.*)$", text, re.MULTILINE)[0])
    return shown


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="static"),
        pytest.param(["--rdzv-backend", "c10d", "--rdzv-endpoint", "h3:29400"], id="c10d"),
    ],
)
def test_ranks_and_groups_lie_where_the_plan_says(network, plan, tmp_path, options) -> None:
    shown = launched(network, plan, tmp_path, *options)
    assert shown["hosts"] == BY_RANK
    assert shown["plan"] == "plan.json"
    assert shown["differences"] == []
    for rank, groups in enumerate(shown["groups"]):
        assert groups == {
            name: next(group for group in JOB.groups(kind) if rank in group)
            for name, kind in (("pp", "pipeline"), ("dp", "data"))
        }
        pipeline = {shown["hosts"][other] for other in groups["pp"]}
        assert pipeline in ({"h0", "h1"}, {"h2", "h3"})
    assert shown["spreads"]["leaf"]["pipeline"] == 1
    assert shown["spreads"]["leaf"] == {
        kind: spread["widest"] for kind, spread in Plan.read(plan).details["tiers"]["leaf"].items()
    }


def test_a_job_in_another_order_is_refused_by_every_rank(network, plan) -> None:
    words = ["torchrun", "--nnodes", "4", "--nproc-per-node", "2", "--master-addr", "h0"]
    commands = {host: [*words, "--node-rank", host[1:], RANK] for host in network.addresses}
    env = {"OMP_NUM_THREADS": "1", "TRIMTAB_PLAN": plan, "TRIMTAB_STRICT": "1"}
    done = network.run_all(commands, env=env, timeout_s=240)
    for run in done.values():
        assert run.returncode == 1
        assert "shown" not in run.stdout
        # h1 and h2 have each other's ranks, so that pipelines cross the leaves.
        sentence = (
            "4 of 8 ranks run elsewhere than planned, the first of them rank 2 on h1/0 instead of"
            " h2/0; the widest pipeline group touches 2 of the tier leaf, where the plan has 1"
        )
        assert run.stderr.count(sentence) >= 1
