"""Jobs of a few processes on this machine, each of which stands for a host of a small network."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TIMEOUT_S = 400

NETWORK = """
name: two-racks
nodes:
  - {name: h0, device: cpu}
  - {name: h1, device: cpu}
  - {name: h2, device: cpu}
  - {name: h3, device: cpu}
switches: [left, right, core]
links:
  - {a: h0, b: left, bandwidth_bytes_per_s: 1 Gb/s}
  - {a: h2, b: left, bandwidth_bytes_per_s: 1 Gb/s}
  - {a: h1, b: right, bandwidth_bytes_per_s: 1 Gb/s}
  - {a: h3, b: right, bandwidth_bytes_per_s: 1 Gb/s}
  - {a: left, b: core, bandwidth_bytes_per_s: 1 Gb/s}
  - {a: right, b: core, bandwidth_bytes_per_s: 1 Gb/s}
"""

Job = Callable[..., list[tuple[int, str, str]]]


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("network") / "cluster.yaml"
    path.write_text(NETWORK)
    return str(path)


@pytest.fixture(scope="session")
def job(network: str) -> Job:
    """Runs a script on some ranks to the end of the last: status, output and errors of each.

    The ranks know the network from their environment, unless they are not to be told.
    """

    def run(
        script: str, *words: str, ranks: int = 4, told: bool = True
    ) -> list[tuple[int, str, str]]:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            port = str(bound.getsockname()[1])
        base = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": "0",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        if told:
            base |= {"TRIMTAB_GENTREE_TOPOLOGY": network, "TRIMTAB_GENTREE_ALWAYS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, str(HERE / script), *words],
                env={**base, "RANK": str(rank), "TRIMTAB_HOST": f"h{rank}"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for rank in range(ranks)
        ]
        try:
            shown = [process.communicate(timeout=TIMEOUT_S) for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        return [(p.returncode, *texts) for p, texts in zip(processes, shown, strict=True)]

    return run
