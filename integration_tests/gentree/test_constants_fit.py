"""Constants fitted to real runs over gloo on this machine, read back by the planner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.core.cluster import Cluster
from trimtab.core.collectives import NetworkTree
from trimtab.core.cost import Constants
from trimtab.core.cost.model_fit import TERMS
from trimtab.gentree import plan_allreduce
from trimtab.gentree.constants_file import read_constants
from trimtab.hosts.torch.network_profile import NO_LATENCY

pytestmark = pytest.mark.integration

PROFILE = [sys.executable, "-m", "trimtab.cli", "profile", "network", "--out", "m.json"]
SMALL = ["--sizes", "64KiB,256KiB", "--repeats", "2", "--payloads", "1MiB,16MiB"]
"""Of smaller payloads the bandwidth of a loopback does not show."""


def test_constants_of_this_machine_are_fitted_and_planned_with(tmp_path: Path) -> None:
    words = ["--nproc", "4", "--device", "cpu", "--cluster", "c.yaml", "--constants", "k.yaml"]
    done = subprocess.run(
        [*PROFILE, *SMALL, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    constants = read_constants(tmp_path / "k.yaml")
    fit = constants.fitted
    assert fit is not None
    assert fit.runs == 2 * (3 + 1 + 1 + 7)  # direct, 2x2, ring, sums
    for term in TERMS:
        interval = getattr(fit, term)
        assert 0 <= interval.low <= interval.value <= interval.high
        assert f"{term}: " in done.stdout
    cluster = Cluster.read(tmp_path / "c.yaml")
    tree = NetworkTree.of_cluster(cluster, [(node.name, 0) for node in cluster.nodes])
    assert constants == Constants.of_fit(fit, tree)
    # A busy machine's few runs may show no latency; that is said then.
    assert (NO_LATENCY in done.stdout) == (fit.alpha_s.value + fit.message_s.value == 0)
    plan = plan_allreduce(cluster, [2**20], constants=constants)
    assert plan.objective.value > plan_allreduce(cluster, [2**20]).objective.value * 0.01
    assert Constants.model_validate(plan.details["constants"]) == constants


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nproc", "2", "--constants", "k.yaml"], "needs 3 processes"),
        (["--nproc", "4", "--constants", "k.yaml", "--payloads", "1MiB"], "at least two sizes"),
        (["--nproc", "4", "--constants", "k.yaml", "--backend", "nccl"], "fitted over gloo"),
        (["--nproc", "4", "--topology", "c.yaml"], "--topology is for --constants"),
        (["--nproc", "4", "--constants", "k.yaml", "--topology", "no.yaml"], "no such file"),
    ],
)
def test_wrong_options_are_refused_before_the_job(words, message, tmp_path: Path) -> None:
    done = subprocess.run(
        [*PROFILE, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
