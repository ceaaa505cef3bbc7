"""``trimtab plan allreduce`` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from trimtab.core.collectives import check_plan
from trimtab.core.cost import Constants, ModelFit
from trimtab.core.errors import BadInput
from trimtab.core.plan import Plan
from trimtab.gentree import plugin
from trimtab.gentree.planner import planned_sizes

CLUSTER = """
nodes:
  - {name: a0, device: cpu}
  - {name: b0, device: cpu}
  - {name: a1, device: cpu}
  - {name: b1, device: cpu}
switches: [left, right, core]
links:
  - {a: a0, b: left, bandwidth_bytes_per_s: 10 Gb/s}
  - {a: a1, b: left, bandwidth_bytes_per_s: 10 Gb/s}
  - {a: b0, b: right, bandwidth_bytes_per_s: 10 Gb/s}
  - {a: b1, b: right, bandwidth_bytes_per_s: 10 Gb/s}
  - {a: left, b: core, bandwidth_bytes_per_s: 10 Gb/s}
  - {a: right, b: core, bandwidth_bytes_per_s: 10 Gb/s}
"""


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER)
    return str(path)


def run(*arguments: str) -> str:
    app = Typer()
    app.callback()(lambda: None)
    plugin.trimtab_commands(app)
    result = CliRunner().invoke(app, ["plan", "allreduce", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_plan_file_and_a_table(cluster: str, tmp_path: Path) -> None:
    out = str(tmp_path / "plan.json")
    shown = run("--cluster", cluster, "--size", "64MiB", "--size", "4KiB", "--out", out)
    assert "AllReduce of 4 ranks" in shown
    assert "The plan is in" in shown
    plan = Plan.read(out)
    small, large = planned_sizes(plan)
    assert (small.payload_bytes, large.payload_bytes) == (4096, 64 * 2**20)
    for size in (small, large):
        check_plan(size.schedule)
        assert size.seconds >= size.bound_s > 0
    assert plan.objective.value == large.seconds
    assert plan.objective.bound == large.bound_s
    # The ring goes by ranks, which alternate between the switches.
    assert large.baselines_s["ring"] > 1.3 * large.seconds


def test_equal_input_gives_equal_steps(cluster: str) -> None:
    first, second = (json.loads(run("--cluster", cluster, "--json")) for _ in range(2))
    assert first["details"] == second["details"]


def test_the_ranks_of_a_hostfile(cluster: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("b1 slots=1\na0 slots=1\n")
    plan = json.loads(run("--cluster", cluster, "--hosts", str(hosts), "--json"))
    assert [slot["node"] for slot in plan["ranks"]] == ["b1", "a0"]
    assert plan["details"]["sizes"][0]["schedule"]["ranks"] == 2


def test_the_published_method(cluster: str) -> None:
    plan = json.loads(run("--cluster", cluster, "--method", "paper", "--json"))
    (size,) = plan["details"]["sizes"]
    assert size["schedule"]["chunks"] == 1
    assert [choice for _, choice in size["switches"]] == ["2", "2"]


def test_one_plan_for_the_whole_payload(cluster: str, tmp_path: Path) -> None:
    path = tmp_path / "constants.yaml"
    path.write_text("alpha_s: 5 ms\n")
    how = ("--cluster", cluster, "--constants", str(path), "--size", "64MiB", "--json")
    both, single = (
        json.loads(run(*how, "--method", method))["details"]["sizes"][0]
        for method in ("search", "single")
    )
    assert "beside" in both["switches"][-1][1]
    assert "beside" not in single["switches"][-1][1]
    assert both["seconds"] < 0.99 * single["seconds"]


def test_constants_from_a_file(cluster: str, tmp_path: Path) -> None:
    path = tmp_path / "constants.yaml"
    path.write_text("alpha_s: 10 ms\nwidth: sources\n")
    plan = json.loads(run("--cluster", cluster, "--constants", str(path), "--json"))
    assert plan["details"]["constants"]["alpha_s"] == 0.01
    assert plan["objective"]["value"] > 0.02


@pytest.mark.parametrize("size", ["0", "-4MiB", "64 parsecs", "nan", "9e99"])
def test_a_wrong_size_is_refused(cluster: str, size: str) -> None:
    with pytest.raises(BadInput, match="size is"):
        run("--cluster", cluster, "--size", size)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{a: right, b: core, bandwidth_bytes_per_s: 10 Gb/s}", "", "no tree: no way leads from"),
        ("10 Gb/s}\n  - {a: a1", "0}\n  - {a: a1", "bandwidth_bytes_per_s"),
        ("{a: a1, b: left", "{a: a1, b: nowhere", "nowhere"),
    ],
)
def test_a_wrong_network_is_refused(cluster: str, old: str, new: str, message: str) -> None:
    text = CLUSTER.replace(old, new).replace("  - \n", "")
    Path(cluster).write_text(text)
    with pytest.raises(BadInput, match=message):
        run("--cluster", cluster)


@pytest.mark.parametrize(
    ("line", "message"),
    [("c9 slots=1", "no node 'c9'"), ("a0 slots=3", "which has 1"), ("a0", "no entry")],
)
def test_a_job_that_the_network_does_not_hold_is_refused(
    cluster: str, tmp_path: Path, line: str, message: str
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(line + "\n")
    with pytest.raises(BadInput, match=message):
        run("--cluster", cluster, "--hosts", str(hosts))


def test_wrong_constants_are_refused(cluster: str, tmp_path: Path) -> None:
    path = tmp_path / "constants.json"
    path.write_text('{"incast_threshold": 1}')
    with pytest.raises(BadInput, match="incast_threshold"):
        run("--cluster", cluster, "--constants", str(path))


def test_another_planners_plan_has_no_sizes() -> None:
    from trimtab.core.plan import Objective

    objective = Objective(metric="x", unit="1", better="lower", value=1)
    with pytest.raises(BadInput, match="planner 'placement'"):
        planned_sizes(Plan(planner="placement", objective=objective))


def test_breakpoints_and_a_page(cluster: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    shown = run("--cluster", cluster, "--breakpoints", "--report", str(page))
    assert "The best plan by size" in shown
    assert "1 KiB" in shown
    assert "The page is in" in shown
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("size", ["1KiB", "1000B", "4GiB", "3"])
def test_all_sizes_have_a_plan(cluster: str, size: str) -> None:
    plan = json.loads(run("--cluster", cluster, "--size", size, "--json"))
    assert plan["objective"]["value"] >= plan["objective"]["bound"] > 0


def test_one_node_is_planned_too(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("nodes:\n  - {name: a0, device: cpu}\n")
    plan = json.loads(run("--cluster", str(path), "--json"))
    assert plan["objective"]["value"] == 0
    assert plan["details"]["sizes"][0]["schedule"]["steps"] == []
    assert "AllReduce of 1 ranks" in run("--cluster", str(path), "--breakpoints")


def test_fitted_constants_are_planned_with(cluster: str, tmp_path: Path) -> None:
    """As ``trimtab profile network --constants`` writes them."""
    term = {"value": 1e-3, "low": 9e-4, "high": 2e-3}
    names = ("alpha_s", "beta_s_per_byte", "gamma_s_per_byte", "delta_s_per_byte")
    fit = {
        **dict.fromkeys((*names, "epsilon_s_per_byte", "message_s"), term),
        "incast_threshold": 3,
    }
    fitted = ModelFit.model_validate({**fit, "error": 0.04, "plain_error": 0.1, "runs": 60})
    path = tmp_path / "constants.yaml"
    Constants(alpha_s=1e-3, beta_ratio=2.0, incast_threshold=3, fitted=fitted).write(path)
    slow, fast = (
        json.loads(run("--cluster", cluster, *words, "--json"))
        for words in (("--constants", str(path)), ())
    )
    assert slow["details"]["constants"]["fitted"]["runs"] == 60
    assert slow["objective"]["bound"] > 1.9 * fast["objective"]["bound"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha_s: -1\n", "alpha_s"),
        ("alpha_s: .nan\n", "alpha_s"),
        ("beta_ratio: 0\n", "beta_ratio"),
        ("epsilon_ratio: much\n", "epsilon_ratio"),
        ("epsilon: 1\n", "epsilon"),
        ("fitted: {runs: 3}\n", "fitted"),
        ("[1, 2", "constants.yaml"),
        ("", "empty"),
    ],
)
def test_constants_that_are_none_are_refused(
    cluster: str, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "constants.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message) as error:
        run("--cluster", cluster, "--constants", str(path))
    assert "\n" not in str(error.value)
    assert error.value.exit_status == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: []\n", "nodes"),
        (CLUSTER.replace("10 Gb/s}\n  - {a: a1", "-1 Gb/s}\n  - {a: a1"), "bandwidth_bytes_per_s"),
        (CLUSTER.replace("name: b1", "name: a1"), "a1"),
        (
            CLUSTER + "  - {a: left, b: right, bandwidth_bytes_per_s: 1 Gb/s}\n",
            "form no tree: core, left, right are on a loop",
        ),
    ],
)
def test_networks_that_hold_no_plan_are_refused(cluster: str, text: str, message: str) -> None:
    Path(cluster).write_text(text)
    with pytest.raises(BadInput, match=message) as error:
        run("--cluster", cluster)
    assert "\n" not in str(error.value)


def test_no_hosts_are_refused(cluster: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# nobody\n")
    with pytest.raises(BadInput):
        run("--cluster", cluster, "--hosts", str(hosts))


def test_a_page_that_cannot_be_written_is_refused(cluster: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no/such"):
        run("--cluster", cluster, "--report", str(tmp_path / "no" / "such" / "page.html"))
