"""A real DeepSpeed job on hosts of its own, over a stand-in remote shell that enters them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from trimtab.hosts.testbed import TreeNetwork, obstacle, two_tiers

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(bool(reason := obstacle()), reason=str(reason)),
]

RANK = str(Path(__file__).parent / "deepspeed_rank.py")
CLUSTER = two_tiers([2, 2], host_bytes_per_s=125e6, uplink_bytes_per_s=125e6)
TIMEOUT_S = 300

# Runs the command on each host of -w, %n standing for the host's number, as pdsh does.
PDSH = """#!/bin/sh
"exec" "{python}" "$0" "$@"
import json, subprocess, sys
at = sys.argv.index("-w")
hosts, words = sys.argv[at + 1].split(","), sys.argv[at + 2:]
enter = json.loads({enter!r})
started = [
    subprocess.Popen([*enter[host], "bash", "-c", " ".join(words).replace("%n", str(number))])
    for number, host in enumerate(hosts)
]
sys.exit(max(process.wait() for process in started))
"""


@pytest.fixture(scope="module")
def network():
    with TreeNetwork(CLUSTER) as up:
        yield up


@pytest.fixture
def environment(network, tmp_path) -> dict[str, str]:
    """Variables of a launch whose remote shell enters the network's hosts."""
    enter = json.dumps({host: network.command(host, []) for host in network.addresses})
    pdsh = tmp_path / "bin" / "pdsh"
    pdsh.parent.mkdir()
    pdsh.write_text(PDSH.format(python=sys.executable, enter=enter))
    pdsh.chmod(0o755)
    (tmp_path / "hosts").write_text("".join(f"h{n} slots=1\n" for n in (3, 2, 1, 0)))
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{pdsh.parent}{os.pathsep}{os.environ['PATH']}",
        "TRIMTAB_CACHE": str(tmp_path / "cache"),
    }


def config(tmp_path: Path, **options: object) -> str:
    """A DeepSpeed configuration that orders the hosts of the hostfile by the network."""
    cluster = CLUSTER.model_dump_json(exclude_defaults=True)
    (tmp_path / "cluster.yaml").write_text(cluster)
    job = {"pipeline_parallel": 2, "data_parallel": 2, "gpus_per_node": 1, "alpha": 0.1}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    files = {name: str(tmp_path / f"{name}.yaml") for name in ("cluster", "job")}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"trimtab": {"placement": {**files, **options}}}))
    return str(path)


def launched(words: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
    """Runs a launch in a session of its own, of which nothing is left when it takes too long."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab.cli", "launch", "--", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, stdout, stderr


def test_a_hostfile_is_reordered_and_deepspeeds_groups_lie_as_planned(
    network, environment, tmp_path
) -> None:
    launcher = ["deepspeed", "--hostfile", str(tmp_path / "hosts"), "--no_ssh_check"]
    launcher += ["--master_addr", "h3"]
    job = [RANK, "--deepspeed_config", config(tmp_path, strict=True)]
    status, stdout, stderr = launched([*launcher, *job], environment)
    assert status == 0, stdout[-2000:] + stderr[-2000:]
    shown: dict[str, Any] = json.loads(re.findall(r"shown (.*)$", stdout, re.MULTILINE)[0])
    assert shown["differences"] == []
    hosts = [rank["host"] for rank in shown["ranks"]]
    assert hosts != ["h3", "h2", "h1", "h0"]
    assert sorted(hosts) == ["h0", "h1", "h2", "h3"]
    for rank, groups in enumerate(shown["ranks"]):
        assert groups["pp"] == [rank % 2, rank % 2 + 2]
        assert groups["dp"] == ([0, 1] if rank < 2 else [2, 3])
        assert {hosts[other] for other in groups["pp"]} in ({"h0", "h1"}, {"h2", "h3"})
    assert shown["spreads"]["leaf"]["pipeline"] == 1


def test_a_hostfile_that_the_network_does_not_know_is_refused(environment, tmp_path) -> None:
    (tmp_path / "hosts").write_text("h0 slots=1\nh1 slots=1\nh2 slots=1\nh9 slots=1\n")
    launcher = ["deepspeed", "--hostfile", str(tmp_path / "hosts"), RANK]
    job = ["--deepspeed_config", config(tmp_path)]
    status, stdout, stderr = launched([*launcher, *job], environment)
    assert (status, stdout) == (2, "")
    assert stderr.startswith("trimtab: the host 'h9' is no node of the cluster")
    assert stderr.count("\n") == 1
