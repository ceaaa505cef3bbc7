from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from trimtab.core.benchmark import Options
from trimtab.core.errors import BadInput, Infeasible, TrimtabError
from trimtab.core.plan import Plan
from trimtab.placement import bench, plugin

EXAMPLES = Path(__file__).parents[3] / "examples" / "placement"


def run(*arguments: str) -> str:
    app = Typer()
    app.callback()(lambda: None)
    plugin.trimtab_commands(app)
    result = CliRunner().invoke(app, ["plan", "placement", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return result.stdout


def example(*arguments: str) -> str:
    cluster, job = EXAMPLES / "cluster.yaml", EXAMPLES / "job.yaml"
    return run("--cluster", str(cluster), "--job", str(job), *arguments)


def test_the_example_is_planned_and_proven(tmp_path: Path) -> None:
    printed = example("--out", str(tmp_path / "plan.json"))
    assert "proven optimal" in printed
    plan = Plan.read(tmp_path / "plan.json")
    assert plan.objective.status == "optimal"
    assert plan.objective.value == pytest.approx(0.3 * 3 + 0.7 * 1)
    assert not {"n05", "n13", "n22"} & {slot.node for slot in plan.ranks}


def test_json_is_the_plan_alone() -> None:
    plan = json.loads(example("--json", "--alpha", "0.5"))
    assert plan["planner"] == "placement"
    assert plan["objective"]["value"] == 2.0
    assert {(p["pipeline"], p["data"]) for p in plan["details"]["front"]} == {(1, 3), (2, 2)}


def test_an_allocation_is_ordered_from_its_hostfile(tmp_path: Path) -> None:
    names = [f"n{i:02d}" for i in (22, 3, 17, 5, 0, 9, 10, 12, 14, 15, 16, 1, 2, 18, 19, 23)]
    (tmp_path / "hosts").write_text("# rank order\n" + "".join(f"{n} slots=8\n" for n in names))
    plan = json.loads(example("--json", "--mode", "reorder", "--hosts", str(tmp_path / "hosts")))
    assert {slot["node"] for slot in plan["ranks"]} == set(names)


def test_quick_effort_leaves_open_what_full_effort_finds(tmp_path: Path) -> None:
    pods = {"a": 2, "b": 14, "c": 5, "d": 8}
    nodes = [(f"{pod}{i}", f"leaf-{pod}") for pod, free in pods.items() for i in range(free)]
    cables = [*nodes, *((f"leaf-{pod}", "core") for pod in pods)]
    cluster = {
        "nodes": [{"name": node, "device": "cpu"} for node, _ in nodes],
        "switches": [*(f"leaf-{pod}" for pod in pods), "core"],
        "links": [{"a": a, "b": b, "bandwidth_bytes_per_s": "1 GB/s"} for a, b in cables],
    }
    job = {"pipeline_parallel": 4, "data_parallel": 7, "gpus_per_node": 1, "alpha": 0.5}
    (tmp_path / "cluster.yaml").write_text(json.dumps(cluster))
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    found = {}
    for effort in ("quick", "full"):
        plan = tmp_path / f"{effort}.json"
        files = ["--cluster", str(tmp_path / "cluster.yaml"), "--job", str(tmp_path / "job.yaml")]
        run(*files, "--effort", effort, "--out", str(plan))
        objective = Plan.read(plan).objective
        found[effort] = objective.value, objective.status
    assert found == {"quick": (2.5, "feasible"), "full": (2.0, "optimal")}


def test_nodes_are_chosen_among_the_hosts_that_are_given(tmp_path: Path) -> None:
    names = {f"n{i:02d}" for i in range(24)} - {"n00", "n05", "n09", "n13", "n22"}
    (tmp_path / "hosts").write_text("".join(f"{n} slots=8\n" for n in sorted(names)))
    plan = json.loads(example("--json", "--hosts", str(tmp_path / "hosts")))
    assert {slot["node"] for slot in plan["ranks"]} < names
    few = sorted(names)[:15]
    (tmp_path / "hosts").write_text("\n".join(few))
    with pytest.raises(Infeasible, match="needs 16 nodes of 8 devices, and 15 of 15 are free"):
        example("--hosts", str(tmp_path / "hosts"))


@pytest.mark.parametrize("mode", ["allocate", "reorder"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("n02 slots=4", r"hosts:17: the host 'n02' has slots=4, and the job 8 ranks .*slots=8"),
        ("n02 slots=many", r"hosts:17: 'slots=many' is no count"),
        ("n03 slots=8", r"hosts:17: the host 'n03' is given twice"),
        ("nobody", r"the host 'nobody' is no node of the cluster"),
    ],
)
def test_hostfiles_that_contradict_the_job_are_refused(
    tmp_path: Path, mode: str, line: str, message: str
) -> None:
    names = [f"n{i:02d}" for i in (3, 17, 6, 0, 9, 10, 12, 14, 15, 16, 1, 4, 18, 19, 23, 20)]
    (tmp_path / "hosts").write_text("".join(f"{n} slots=16\n" for n in names) + line)
    with pytest.raises(BadInput, match=message):
        example("--mode", mode, "--hosts", str(tmp_path / "hosts"))


def test_a_hostfile_without_hosts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# n00 slots=8\n")
    with pytest.raises(BadInput, match="hosts: there is no host"):
        example("--hosts", str(tmp_path / "hosts"))


@pytest.mark.parametrize("before", [None, "an earlier page"])
def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, before: str | None) -> None:
    plan, page = tmp_path / "plan.json", tmp_path / "page.html"
    with pytest.raises(BadInput):
        example("--out", str(plan), "--report", str(tmp_path / "no" / "page.html"))
    assert list(tmp_path.iterdir()) == []
    if before is not None:
        page.write_text(before)
    with pytest.raises(BadInput):
        example("--out", str(tmp_path / "no" / "plan.json"), "--report", str(page))
    assert [path.read_text() for path in tmp_path.iterdir()] == ([before] if before else [])
    example("--out", str(plan), "--report", str(page))
    assert sorted(tmp_path.iterdir()) == [page, plan]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--alpha", "nan"], 2),
        (["--tier", "rack"], 2),
        (["--busy", "nobody"], 2),
        (["--mode", "reorder"], 2),
        ([word for name in range(10) for word in ("--drained", f"n{name:02d}")], 3),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], status: int) -> None:
    with pytest.raises(TrimtabError) as raised:
        example(*arguments)
    assert raised.value.exit_status == status
    assert "\n" not in str(raised.value)


def test_the_bench_names_every_baseline_and_never_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {name: bench.SETTINGS[name] for name in ("paper-i", "paper-iii")}
    monkeypatch.setattr(bench, "SETTINGS", small)
    monkeypatch.setattr(bench, "SIZES", {"12": small["paper-i"]})
    monkeypatch.setattr(bench, "fragmented", lambda seed, count: [small["paper-iii"]])
    monkeypatch.setattr(bench, "_QUICK_SIZES", ("12",))
    monkeypatch.setattr(bench, "more_cases", lambda options, progress: [])
    cases = bench.run(Options(quick=True), lambda message, done=None: None)
    spreads = [c for c in cases if c.metric == "weighted_spread" and "own-baselines" not in c.case]
    named = {case.baseline for case in spreads}
    for name in ("best-fit", "random-fit", "gpu-packing", "topology-aware", "hostname-order"):
        assert {f"{name} pp", f"{name} dp"} <= named
    assert {"leaf-order pp", "leaf-order dp", "arnold-mip", "arnold-mip dp"} <= named
    assert min(case.ratio_low for case in spreads) >= 1 - 1e-9
    at = {c.case: c for c in spreads if c.baseline == "arnold-mip"}
    assert at["model/paper-iii/alpha-0.5"].ratio == pytest.approx(1.5)
