from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from trimtab.core.benchmark import Options
from trimtab.core.errors import TrimtabError
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
