"""The launch hook: which plan a launch follows, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.core.errors import BadInput
from trimtab.core.hooks import plugin
from trimtab.core.launch import LaunchRequest
from trimtab.core.plan import Plan
from trimtab.placement import launching
from trimtab.placement.config import PlacementConfig
from trimtab.placement.launching import launch_change
from trimtab.placement.planner import plan_placement

CLUSTER = """
name: two-leaves
nodes:
  - {name: a, device: cpu, count: 2}
  - {name: b, device: cpu, count: 2}
  - {name: c, device: cpu, count: 2}
  - {name: d, device: cpu, count: 2}
switches: [leaf0, leaf1, core]
links:
  - {a: a, b: leaf0, bandwidth_bytes_per_s: 1 GB/s}
  - {a: b, b: leaf1, bandwidth_bytes_per_s: 1 GB/s}
  - {a: c, b: leaf0, bandwidth_bytes_per_s: 1 GB/s}
  - {a: d, b: leaf1, bandwidth_bytes_per_s: 1 GB/s}
  - {a: leaf0, b: core, bandwidth_bytes_per_s: 1 GB/s}
  - {a: leaf1, b: core, bandwidth_bytes_per_s: 1 GB/s}
"""
JOB = "{pipeline_parallel: 2, data_parallel: 4, gpus_per_node: 2, alpha: 0.9}\n"


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "hosts").write_text("d slots=2\nc slots=2\nb slots=2\na slots=2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def request(hosts: str = "", **environment: str) -> LaunchRequest:
    command = ("deepspeed", "t.py")
    return LaunchRequest("deepspeed", command, environment, dict.fromkeys(hosts, 2))


def planned() -> Plan:
    """The plan that the options make for the hosts of the hostfile, at ``plan.json``."""
    change = launch_change(HERE, request("dcba"))
    assert change is not None
    plan = Plan.read(change.environment["TRIMTAB_PLAN"])
    plan.write("plan.json")
    return plan


HERE = PlacementConfig(cluster="cluster.yaml", job="job.yaml")


def test_the_hosts_of_an_allocation_are_ordered_by_the_network() -> None:
    change = launch_change(HERE, request("dcba"))
    assert change is not None
    hosts = list(change.hosts)
    assert sorted(hosts) == ["a", "b", "c", "d"]
    assert set(change.hosts.values()) == {2}
    stages = [set(hosts[:2]), set(hosts[2:])]
    assert {"a", "c"} in stages  # each stage's data parallel groups below one leaf
    assert {"b", "d"} in stages
    again = launch_change(HERE, request("dcba"))
    assert again == change
    assert change.launcher_arguments == ()


def test_a_launch_looks_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    efforts = []

    def noted(*given: Any, effort: str, **named: Any) -> Plan:
        efforts.append(effort)
        return plan_placement(*given, effort=effort, **named)

    monkeypatch.setattr(launching, "plan_placement", noted)
    for config in (HERE, HERE.model_copy(update={"effort": "quick"})):
        assert launch_change(config, request("dcba")) is not None
    assert efforts == ["full", "quick"]


@pytest.mark.parametrize("source", ["slurm", "options"])
def test_the_allocation_may_be_named_by_slurm_or_the_options(source: str) -> None:
    expected = launch_change(HERE, request("abcd"))
    if source == "slurm":
        change = launch_change(HERE, request(SLURM_JOB_NODELIST="[a,b,c,d]".strip("[]")))
    else:
        change = launch_change(HERE.model_copy(update={"hosts": "hosts"}), request())
    assert change is not None
    assert expected is not None
    assert list(change.hosts) == list(expected.hosts)


def test_a_plan_that_was_made_is_followed() -> None:
    plan = planned()
    change = launch_change(PlacementConfig(plan="plan.json", strict=True), request("abcd"))
    assert change is not None
    assert list(change.hosts) == [slot.node for slot in plan.ranks[::2]]
    path = str(Path("plan.json").absolute())
    assert change.environment == {"TRIMTAB_PLAN": path, "TRIMTAB_STRICT": "1"}


def test_the_check_inside_the_job_can_be_left_out() -> None:
    planned()
    change = launch_change(PlacementConfig(plan="plan.json", check=False), request("abcd"))
    assert change is not None
    assert change.environment["TRIMTAB_CHECK"] == "0"


def test_the_plan_on_the_command_line_goes_before() -> None:
    plan = planned()
    applied = LaunchRequest(
        "deepspeed",
        ("deepspeed", "t.py"),
        {"TRIMTAB_PLAN": "plan.json"},
        {slot.node: 2 for slot in plan.ranks},
    )
    change = launch_change(PlacementConfig(plan="gone.json", strict=True), applied)
    assert change is not None
    assert (change.hosts, change.environment) == ({}, {"TRIMTAB_STRICT": "1"})


def test_a_plan_that_an_outer_job_left_behind_does_not_count() -> None:
    planned()
    change = launch_change(HERE, request("abcd", TRIMTAB_PLAN="plan.json"))
    assert change is not None
    assert change.hosts


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "trimtab.placement: the options name neither a plan nor a cluster; give plan, or"),
        ({"cluster": "cluster.yaml"}, "the options name a cluster and no job"),
        ({"cluster": "cluster.yaml", "job": "job.yaml"}, "no hosts are known that could be"),
        ({"plan": "gone.json"}, "gone.json: there is no such file"),
        ({"plan": "fleet.json"}, "fleet.json: this is a fleet plan; give one that trimtab plan"),
        ({"plan": "other.json"}, "this trimtab reads version 1"),
        ({"plan": "twice.json"}, "device 0 of node 'a' is given out twice"),
        ({"plan": "bare.json"}, "bare.json: a placement plan has no ranks to launch"),
    ],
)
def test_refused_in_one_sentence(options: dict[str, str], sentence: str) -> None:
    plan = planned().model_dump(mode="json")
    slot = {"node": "a", "device": 0}
    for name, change in {
        "fleet": {"planner": "fleet"},
        "other": {"version": 7},
        "twice": {"ranks": [slot, slot]},
        "bare": {"ranks": []},
    }.items():
        Path(f"{name}.json").write_text(json.dumps({**plan, **change}))
    with pytest.raises(BadInput) as caught:
        launch_change(PlacementConfig(**options), request())
    assert sentence in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_a_plan_from_another_cluster() -> None:
    planned()
    both = PlacementConfig(plan="plan.json", cluster="cluster.yaml")
    assert launch_change(both, request("abcd")) is not None
    Path("cluster.yaml").write_text(CLUSTER.replace("two-leaves", "others"))
    with pytest.raises(BadInput, match=r"plan\.json: the plan was made for another cluster than"):
        launch_change(both, request("abcd"))


def test_an_allocation_that_the_cluster_does_not_know() -> None:
    with pytest.raises(BadInput, match="the host 'e' is no node of the cluster"):
        launch_change(HERE, request("abce"))


def test_the_hook_is_found_and_is_about_training() -> None:
    found = plugin("placement")
    assert found.trains
    change = found.launch({"cluster": "cluster.yaml", "job": "job.yaml"}, request("dcba"))
    assert change is not None
    assert len(change.hosts) == 4
    with pytest.raises(BadInput, match="clusterr"):
        found.launch({"clusterr": "x"}, request("dcba"))
