"""The testbed itself: who reaches whom how fast, what hosts know, and what is left afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from trimtab.core.cluster import Cluster, Link, Node
from trimtab.core.errors import BadInput
from trimtab.hosts.testbed import TreeNetwork, obstacle, two_tiers

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(reason := obstacle()), reason=str(reason)),
]

# Receives what another host sends once it is told to, so that the clock begins before any of it:
# however busy the machine is, no more comes than the wires carry. Prints the bytes per second.
RECEIVE = """
import socket, sys, time
with socket.create_server(("", 4000)) as server:
    print("listening", flush=True)
    connection, _ = server.accept()
    begin, size = time.perf_counter(), 0
    connection.sendall(b"!")
    while part := connection.recv(1 << 16):
        size += len(part)
    print(size / (time.perf_counter() - begin), flush=True)
"""
SEND = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 4000), timeout=60)
connection.recv(1)
connection.sendall(bytes(int(sys.argv[2])))
"""
IDENTITY = "import socket; print(socket.gethostname(), socket.gethostbyname(socket.gethostname()))"


def namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    own = f"trimtab-{os.getpid()}-"
    return [line.split()[0] for line in listed.stdout.splitlines() if line.startswith(own)]


def rate_bytes_per_s(network: TreeNetwork, sender: str, receiver: str, size: int) -> float:
    listening = network.start(receiver, [sys.executable, "-c", RECEIVE])
    assert listening.stdout is not None
    assert listening.stdout.readline() == "listening\n"
    sent = network.run(sender, [sys.executable, "-c", SEND, receiver, str(size)])
    assert sent.returncode == 0, sent.stderr
    return float(listening.communicate(timeout=120)[0])


@pytest.fixture(scope="module")
def network():
    cluster = two_tiers([2, 1], host_bytes_per_s=12.5e6, uplink_bytes_per_s=2.5e6)
    with TreeNetwork(cluster) as up:
        yield up


def test_a_host_has_its_own_name_and_address(network) -> None:
    each = network.run_all({host: [sys.executable, "-c", IDENTITY] for host in network.addresses})
    assert {host: done.stdout.split() for host, done in each.items()} == {
        host: [host, address] for host, address in network.addresses.items()
    }


def test_links_carry_what_they_are_given(network) -> None:
    """The first bucket adds a few percent; a busy machine takes away, though not the most of it."""
    assert 0.25 < rate_bytes_per_s(network, "h0", "h1", 6_000_000) / 12.5e6 < 1.15
    assert 0.25 < rate_bytes_per_s(network, "h0", "h2", 2_000_000) / 2.5e6 < 1.15


def test_status_streams_and_environment_are_the_programs(network) -> None:
    done = network.run("h1", ["sh", "-c", "echo $WORD; echo bad >&2; exit 7"], env={"WORD": "hi"})
    assert (done.returncode, done.stdout, done.stderr) == (7, "hi\n", "bad\n")


def test_a_program_that_takes_too_long_is_killed_with_its_children(network) -> None:
    begin = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        network.run("h0", ["sh", "-c", "sleep 600 & sleep 600"], timeout_s=1)
    assert time.monotonic() - begin < 60


def test_nothing_is_left_after_a_failure() -> None:
    cluster = two_tiers([2], host_bytes_per_s=1e6, uplink_bytes_per_s=1e6)
    before = namespaces()
    started: list[subprocess.Popen[str]] = []
    with pytest.raises(ZeroDivisionError):
        fail_on(cluster, started)
    assert namespaces() == before
    assert started[0].returncode == -9


def fail_on(cluster: Cluster, started: list[subprocess.Popen[str]]) -> None:
    with TreeNetwork(cluster) as up:
        started.append(up.start("h0", ["sh", "-c", "sleep 600 & sleep 600"]))
        assert len(namespaces()) >= 4
        raise ZeroDivisionError


def test_what_a_killed_run_left_is_removed_by_the_next() -> None:
    leaving = """
import os
from trimtab.hosts.testbed import TreeNetwork, two_tiers
network = TreeNetwork(two_tiers([1], host_bytes_per_s=1e6, uplink_bytes_per_s=1e6)).__enter__()
network.start("h0", ["sleep", "600"])
os.kill(os.getpid(), 9)
"""
    left = subprocess.Popen([sys.executable, "-c", leaving])
    left.wait()
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert f"trimtab-{left.pid}-" in listed
    with TreeNetwork(two_tiers([1], host_bytes_per_s=1e6, uplink_bytes_per_s=1e6)):
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert f"trimtab-{left.pid}-" not in listed


def test_only_trees_are_built() -> None:
    nodes = (Node(name="a", device="cpu"), Node(name="b", device="cpu"))
    straight = Cluster(nodes=nodes, links=(Link(a="a", b="b", bandwidth_bytes_per_s=1e6),))
    with pytest.raises(BadInput, match=r"'a' hangs on \['b'\]; hang each node on one switch"):
        TreeNetwork(straight)
    ring = two_tiers([1, 1], host_bytes_per_s=1e6, uplink_bytes_per_s=1e6).model_dump()
    ring["links"] = [*ring["links"], {"a": "leaf0", "b": "leaf1", "bandwidth_bytes_per_s": 1e6}]
    with pytest.raises(BadInput, match="form no tree"):
        TreeNetwork(Cluster.model_validate(ring))


def test_programs_run_on_hosts_of_a_network_that_is_up(network) -> None:
    with pytest.raises(BadInput, match="no host 'leaf0'"):
        network.command("leaf0", ["true"])
    down = TreeNetwork(two_tiers([1], host_bytes_per_s=1e6, uplink_bytes_per_s=1e6))
    with pytest.raises(BadInput, match="not up"):
        down.command("h0", ["true"])
