"""Ranks where a plan or a plugin wants them, by the real launchers over stand-in remote shells."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from trimtab.core.emitters import emit
from trimtab.core.folders import write_folder
from trimtab.core.plan import Objective, Plan, Slot

pytestmark = [pytest.mark.integration, pytest.mark.slow]

HERE = Path(__file__).parent
WORKER = str(HERE / "worker.py")
# Two names of this machine, which stand for two machines.
FIRST, SECOND = "127.0.0.1", "127.0.0.2"

PLUGIN = """
    from pydantic import BaseModel
    from trimtab.core.hooks import PluginInfo, hookimpl
    from trimtab.core.launch import LaunchChange

    class Options(BaseModel, extra="forbid"):
        mood: str

    @hookimpl
    def trimtab_info():
        return PluginInfo("lays ranks backwards", 'the "trimtab" block', Options)

    @hookimpl
    def trimtab_launch(config, launch):
        backwards = dict(reversed(launch.hosts.items()))
        return LaunchChange({"MOOD": config.mood}, backwards, ("--no_ssh_check",))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables of a launch with the stand-in pdsh, a private cache, and the plugin installed."""
    info = tmp_path / "site" / "trimtab_backwards-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trimtab-backwards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trimtab.plugins]\nbackwards = backwards_plugin\n")
    (tmp_path / "site" / "backwards_plugin.py").write_text(dedent(PLUGIN))
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{HERE}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path / "site"),
        "TRIMTAB_CACHE": str(tmp_path / "cache"),
    }


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text(f"{FIRST} slots=2\n{SECOND} slots=2\n")
    return str(path)


@pytest.fixture
def plan(tmp_path: Path) -> str:
    slots = tuple(Slot(node=node, device=device) for node in (SECOND, FIRST) for device in (0, 1))
    objective = Objective(metric="spread", unit="1", better="lower", value=1)
    path = tmp_path / "plan.json"
    Plan(planner="placement", objective=objective, ranks=slots).write(path)
    return str(path)


def start(words: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return begin([sys.executable, "-m", "trimtab.cli", "launch", *words], environment)


def begin(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def shown(*processes: subprocess.Popen[str]) -> list[str]:
    """What the ranks printed, in the order of their ranks."""
    texts = [process.communicate(timeout=150)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return sorted(re.findall(r"^(?:\S+: )?(rank .*)$", "\n".join(texts), re.MULTILINE))


def test_deepspeed_numbers_ranks_in_the_plans_order(environment, hostfile, plan) -> None:
    launcher = ["deepspeed", "--hostfile", hostfile, "--no_ssh_check", "--master_addr", FIRST]
    assert shown(start(["--plan", plan, "--", *launcher, WORKER, "show"], environment)) == [
        f"rank 0 of 4 on {SECOND} local 0 None",
        f"rank 1 of 4 on {SECOND} local 1 None",
        f"rank 2 of 4 on {FIRST} local 0 None",
        f"rank 3 of 4 on {FIRST} local 1 None",
    ]


def test_a_plugin_orders_deepspeeds_hosts_and_its_variables_reach_them(
    environment, hostfile, tmp_path
) -> None:
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"trimtab": {"backwards": {"mood": "good and calm"}}}))
    launcher = ["deepspeed", "--hostfile", hostfile, "--master_addr", FIRST]
    job = [WORKER, "show", "--deepspeed_config", str(config)]
    assert shown(start(["--", *launcher, *job], environment)) == [
        f"rank 0 of 4 on {SECOND} local 0 good and calm",
        f"rank 1 of 4 on {SECOND} local 1 good and calm",
        f"rank 2 of 4 on {FIRST} local 0 good and calm",
        f"rank 3 of 4 on {FIRST} local 1 good and calm",
    ]


def test_torchrun_numbers_nodes_in_the_plans_order(environment, plan, free_port) -> None:
    words = ["--plan", plan, "--", "torchrun", "--master-port", free_port, WORKER, "show"]
    nodes = [
        start(words, {**environment, "TRIMTAB_HOST": host, "HOST_NAME": host})
        for host in (FIRST, SECOND)
    ]
    assert shown(*nodes) == [
        f"rank 0 of 4 on {SECOND} local 0 None",
        f"rank 1 of 4 on {SECOND} local 1 None",
        f"rank 2 of 4 on {FIRST} local 0 None",
        f"rank 3 of 4 on {FIRST} local 1 None",
    ]


def emitted(plan: str, target: str, folder: Path) -> str:
    """The script that starts a plan by a launcher alone."""
    write_folder(folder, emit(Plan.read(plan), target))
    return str(folder / "launch.sh")


def test_emitted_scripts_number_ranks_in_the_plans_order(
    environment, plan, free_port, tmp_path
) -> None:
    expected = [
        f"rank 0 of 4 on {SECOND} local 0 None",
        f"rank 1 of 4 on {SECOND} local 1 None",
        f"rank 2 of 4 on {FIRST} local 0 None",
        f"rank 3 of 4 on {FIRST} local 1 None",
    ]
    script = emitted(plan, "torchrun", tmp_path / "torchrun")
    words = [script, "--master-port", free_port, WORKER, "show"]
    nodes = [
        begin(words, {**environment, "TRIMTAB_HOST": host, "HOST_NAME": host})
        for host in (FIRST, SECOND)
    ]
    assert shown(*nodes) == expected
    script = emitted(plan, "deepspeed", tmp_path / "deepspeed")
    assert shown(begin([script, "--no_ssh_check", WORKER, "show"], environment)) == expected


def test_srun_numbers_tasks_in_the_plans_order(environment, plan) -> None:
    words = ["--plan", plan, "--", "srun", "--mpi", "none", sys.executable, WORKER, "show"]
    allocation = {"SLURM_JOB_NODELIST": f"{FIRST},{SECOND}"}
    lines = shown(start(words, {**environment, **allocation}))
    assert lines == [
        f"rank {rank} of 4 on {host} local 0 None"
        for rank, host in enumerate([SECOND, SECOND, FIRST, FIRST])
    ]
