"""``trimtab simulate serving``: its figures, its files and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from trimtab.cli.simulate_serving import serving
from trimtab.core.cost.step import EngineLimits, EngineProfile, StepCost
from trimtab.core.errors import BadInput
from trimtab.core.workload import Request, Workload

app = typer.Typer()
app.command()(serving)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    requests = [Request(str(n), float(n), 20, 5, deadline_s=30.0) for n in range(12)]
    Workload(tuple(requests)).to_jsonl(tmp_path / "w.jsonl")
    limits = EngineLimits(
        max_num_seqs=2, max_num_batched_tokens=64, max_model_len=256, kv_blocks=32
    )
    EngineProfile(
        model="m", device="d", engine="e", limits=limits, step=StepCost(base_s=1.0)
    ).write(tmp_path / "p.json")
    return ["--workload", str(tmp_path / "w.jsonl"), "--profile", str(tmp_path / "p.json")]


def figures(arguments: list[str]) -> dict[str, float]:
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    found: dict[str, float] = json.loads(done.stdout)
    return found


def test_more_replicas_serve_faster(files: list[str]) -> None:
    one, three = figures(files), figures([*files, "--replicas", "3"])
    assert one["requests"] == three["requests"] == 12
    assert one["mean_latency_s"] > three["mean_latency_s"] == 5.0
    assert (one["workload_sha256"], one["profile_sha256"]) == (
        three["workload_sha256"],
        three["profile_sha256"],
    )


def test_the_table_shows_the_same_figures(files: list[str]) -> None:
    done = CliRunner().invoke(app, files, catch_exceptions=False)
    assert f"{figures(files)['mean_latency_s']:.4g}" in done.stdout


def test_log_and_trace_are_written(files: list[str], tmp_path: Path) -> None:
    log, trace = tmp_path / "log.jsonl", tmp_path / "trace.json"
    figures([*files, "--log", str(log), "--trace", str(trace)])
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum("request_id" in record for record in records) == 12
    assert len(json.loads(trace.read_text())["traceEvents"]) >= 24


@pytest.mark.parametrize(
    ("further", "fault"),
    [
        (["--policy", "nothing-of-this-name"], "no plugin 'nothing-of-this-name'"),
        (["--policy", "urgency={"], "this is no JSON"),
        (["--dispatch", "round_robin"], "'round-robin'"),
        (["--profile", "missing.json"], "no such file"),
    ],
)
def test_bad_input_is_refused(files: list[str], further: list[str], fault: str) -> None:
    with pytest.raises(BadInput, match=fault):
        CliRunner().invoke(app, [*files, *further], catch_exceptions=False)
