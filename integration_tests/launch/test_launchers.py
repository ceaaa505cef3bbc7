"""Real torchrun and DeepSpeed launchers, alone and behind ``trimtab launch``: what a user sees."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "launch"
LAUNCH = [sys.executable, "-m", "trimtab.cli", "launch", "--"]
TIMEOUT_S = 150


def torchrun(port: str, *job: str) -> list[str]:
    return ["torchrun", "--nproc-per-node", "4", "--master-port", port, *job]


def deepspeed(port: str, *job: str) -> list[str]:
    return ["deepspeed", "--num_gpus", "4", "--master_port", port, *job]


ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command in a session of its own, of which nothing is left when it takes too long."""
    with started(command) as process:
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=EXAMPLE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def steps(stdout: str) -> list[str]:
    """What the job itself printed: DeepSpeed's launcher logs on stdout too."""
    return [line for line in stdout.splitlines() if line.startswith("step ")]


def without_numbers(stderr: str) -> list[str]:
    """Times, processes, ports and ids differ between any two runs."""
    return [re.sub(r"[\da-f]*\d[\da-f]*", "#", line) for line in stderr.splitlines()]


def test_torchrun_trains_as_alone(free_port) -> None:
    job = torchrun(free_port, "train.py", "--steps", "5")
    alone, launched = run(job), run([*LAUNCH, *job])
    assert launched.returncode == alone.returncode == 0, launched.stderr
    assert launched.stdout == alone.stdout
    assert len(steps(launched.stdout)) == 5
    assert without_numbers(launched.stderr) == without_numbers(alone.stderr)


def test_deepspeed_trains_as_alone_and_keeps_the_block(free_port) -> None:
    script = ["train_deepspeed.py", "--steps", "5", "--deepspeed_config", "deepspeed.json"]
    job = deepspeed(free_port, *script)
    alone, launched = run(job), run([*LAUNCH, *job])
    assert launched.returncode == alone.returncode == 0, launched.stderr
    assert steps(launched.stdout) == steps(alone.stdout)
    assert len(steps(launched.stdout)) == 5


# DeepSpeed looks once a second, and gives the status of the first rank that it finds dead: the
# killed one, or one before it that has lost its peer.
@pytest.mark.parametrize(
    ("launcher", "statuses"), [(torchrun, {1}), (deepspeed, {1, 256 - signal.SIGKILL})]
)
def test_a_killed_rank_ends_the_job_as_alone(launcher, statuses, free_port) -> None:
    job = launcher(free_port, str(HERE / "rank_2_dies.py"))
    alone, launched = run(job), run([*LAUNCH, *job])
    assert {launched.returncode, alone.returncode} <= statuses
    assert steps(launched.stdout) == steps(alone.stdout)
    assert steps(launched.stdout)[0] == "step 0 sum 6"


@pytest.mark.parametrize(("launcher", "status"), [(torchrun, 1), (deepspeed, 7)])
def test_a_rank_that_fails_gives_the_status_it_gives_alone(launcher, status, free_port) -> None:
    job = launcher(free_port, str(HERE / "worker.py"), "exit", "7")
    alone, launched = run(job), run([*LAUNCH, *job])
    assert launched.returncode == alone.returncode == status


@pytest.mark.parametrize(
    ("launcher", "number", "to_group"),
    [
        (torchrun, signal.SIGTERM, False),
        (torchrun, signal.SIGHUP, False),
        (torchrun, signal.SIGINT, True),
        (deepspeed, signal.SIGINT, True),
    ],
)
def test_a_signal_ends_the_job_as_alone(launcher, number, to_group, free_port) -> None:
    job = launcher(free_port, str(HERE / "worker.py"), "wait")
    alone = status_after_signal(job, number, to_group)
    assert status_after_signal([*LAUNCH, *job], number, to_group) == alone != 0


def status_after_signal(command: list[str], number: int, to_group: bool) -> int:
    """The status of a job that gets a signal once its four ranks are there, and leaves none."""
    with started(command) as process:
        assert process.stdout is not None
        ranks: list[int] = []
        for line in process.stdout:
            ranks += [int(word) for word in re.findall(r"^process (\d+)$", line)]
            if len(ranks) == 4:
                break
        # A terminal's Ctrl-C goes to the whole group, a batch system's signal to its child.
        (os.killpg if to_group else os.kill)(process.pid, number)
        process.communicate(timeout=TIMEOUT_S)
        wait_until_gone(ranks)
    return process.returncode


def wait_until_gone(ranks: list[int]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline_s, f"ranks {ranks} outlive their launcher"
        time.sleep(0.1)
