"""Plans on hosts of their own: eight below two switches, whose link carries what one host sends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.hosts.testbed import TreeNetwork, obstacle, two_tiers

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(bool(reason := obstacle()), reason=str(reason)),
]

RANK = Path(__file__).parent / "namespace_rank.py"
LENGTHS = ["1", "5", "16384", "250001"]

# Neighbours in the order of the ranks are always below different switches.
HOSTS = ["h0", "h4", "h1", "h5", "h2", "h6", "h3", "h7"]


def test_plans_sum_as_gloo_does_and_name_a_host_that_is_lost(tmp_path: Path) -> None:
    network = two_tiers([4, 4], host_bytes_per_s=25e6, uplink_bytes_per_s=25e6)
    topology = tmp_path / "network.yaml"
    topology.write_text(network.model_dump_json())
    env = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
        "TRIMTAB_GENTREE_TOPOLOGY": str(topology),
        "TRIMTAB_GENTREE_ALWAYS": "1",
    }
    command = [sys.executable, str(RANK), *HOSTS]
    with TreeNetwork(network) as up:
        done = up.run_all(dict.fromkeys(HOSTS, command), env=env, timeout_s=400)
        names = [name for name in namespaces() if name.startswith(stem(up))]
        assert len(names) == 11
    assert not set(names) & set(namespaces())
    for rank, host in enumerate(HOSTS):
        said = done[host].stdout.splitlines()
        assert [line.split()[1] for line in said if "right" in line] == LENGTHS, done[host].stderr
        if rank == 5:
            assert done[host].returncode == -9
        else:
            assert "told: rank 5 on h6 failed or did not take part" in done[host].stdout, said


def namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line.split()[0] for line in listed.stdout.splitlines()]


def stem(network: TreeNetwork) -> str:
    """How the names of a network's namespaces begin."""
    words = network.command("h0", ["true"])
    return words[words.index("exec") + 1].rpartition("-")[0] + "-"
