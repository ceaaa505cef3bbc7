"""Real pairs of hosts, measured over gloo: each pair is, and a network is drafted from them.

Which tiers follow from which bandwidths is for unit tests to say: here the times are real.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.core.cluster import Cluster
from trimtab.core.topology import read_topology
from trimtab.core.topology.measured import Measurement
from trimtab.hosts.testbed import TreeNetwork, obstacle, two_tiers
from trimtab.hosts.torch.network_profile import summary

pytestmark = [pytest.mark.integration, pytest.mark.slow]

MODULE = [sys.executable, "-m", "trimtab.hosts.torch.network_profile"]
HOST_BYTES_PER_S = 12.5e6
UPLINK_BYTES_PER_S = 4e6


@pytest.mark.skipif(bool(reason := obstacle()), reason=str(reason))
@pytest.mark.parametrize("pairs", ["alone", "at-once"])
def test_each_pair_of_a_shaped_tree_is_measured(tmp_path: Path, pairs: str) -> None:
    true = two_tiers(
        [4, 4], host_bytes_per_s=HOST_BYTES_PER_S, uplink_bytes_per_s=UPLINK_BYTES_PER_S
    )
    # Ranks alternate between the leaves, so that their order tells nothing.
    order = [f"h{n}" for pair in zip(range(4), range(4, 8), strict=True) for n in pair]
    arguments = ["--out", "matrix.json", "--cluster", "cluster.yaml", "--pairs", pairs]
    arguments += ["--sizes", "64KiB,256KiB", "--repeats", "3", "--device", "cpu"]
    job = {"WORLD_SIZE": "8", "MASTER_ADDR": order[0], "MASTER_PORT": "29500"}
    commands = {
        host: ["env", f"RANK={rank}", *MODULE, *arguments] for rank, host in enumerate(order)
    }
    with TreeNetwork(true) as network:
        done = network.run_all(
            commands, env={**job, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, timeout_s=400
        )
    assert {host: each.returncode for host, each in done.items()} == dict.fromkeys(order, 0), done
    measured = Measurement.model_validate_json((tmp_path / "matrix.json").read_text())
    assert list(measured.hosts) == order
    assert measured.at_once == (pairs == "at-once")
    apart = [(a, b) for a in range(8) for b in range(8) if a != b]
    # How much a pair gets, and so which tiers are found, is for a quiet machine to say.
    assert all((measured.bandwidth_bytes_per_s[a][b] or 0) > 0 for a, b in apart)
    assert all((measured.latency_s[a][b] or 0) > 0 for a, b in apart)
    found = read_topology(tmp_path / "matrix.json")
    assert {node.name for node in found.nodes} == set(order)
    assert set(Cluster.read(tmp_path / "cluster.yaml").links) == set(found.links)
    assert done[order[0]].stdout.rstrip() == summary(measured)
    assert summary(measured).startswith("8 hosts\ntier 1: ")


COMMANDS = {
    "command": ["trimtab.cli", "profile", "network", "--nproc", "3"],
    "launched": [
        *("trimtab.cli", "launch", "--", "torchrun", "--nproc-per-node", "3", "--standalone"),
        *("-m", "trimtab.hosts.torch.network_profile"),
    ],
}


@pytest.mark.parametrize("started", COMMANDS)
def test_processes_of_one_machine(tmp_path: Path, started: str) -> None:
    more = ["--sizes", "64KiB,1MiB", "--repeats", "1", "--out", "m.json", "--cluster", "c.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", *COMMANDS[started], *more, "--device", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 hosts\ntier 1: ")
    cluster = Cluster.read(tmp_path / "c.yaml", connected=True)
    assert [node.device for node in cluster.nodes] == ["cpu"] * 3
