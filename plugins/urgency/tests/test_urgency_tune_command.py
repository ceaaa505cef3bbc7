from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from trimtab.core.cost.step import EngineLimits, EngineProfile, StepCost
from trimtab.core.errors import BadInput
from trimtab.core.workload import Request, Workload
from trimtab.urgency import tuned
from trimtab.urgency.config import TunedOptions
from trimtab.urgency.tune_command import seconds, urgency

app = typer.Typer()
app.command()(urgency)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr("os.nice", lambda more: more)  # the other tests run in this process
    requests = [
        Request(f"r{n}", n / 4, 20, 4 + 40 * (n % 2), workflow=f"w{n}", deadline_s=3.0 + n % 5)
        for n in range(16)
    ]
    Workload(tuple(requests)).to_jsonl(tmp_path / "t.jsonl")
    limits = EngineLimits(
        max_num_seqs=2, max_num_batched_tokens=64, max_model_len=256, kv_blocks=32
    )
    profile = EngineProfile(
        model="m", device="d", engine="e", limits=limits, step=StepCost(base_s=0.05)
    )
    profile.write(tmp_path / "p.json")
    return [
        *("--trace", str(tmp_path / "t.jsonl")),
        *("--out", str(tmp_path / "urgency.yaml")),
        *("--profile", str(tmp_path / "p.json")),
    ]


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_a_search_writes_what_hosts_load(files, tmp_path):
    done = run(*files, "--json")
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    assert said["in_time"]
    assert said["simulations"] > 40
    written = tuned.read(tmp_path / "urgency.yaml")
    assert written.model_dump(exclude_none=True, exclude={"kind", "version"}) == said["options"]


def test_a_watch_tunes_again_and_leaves_the_file_alone_where_nothing_is_better(files, tmp_path):
    assert run(*files).exit_code == 0
    before = (tmp_path / "urgency.yaml").stat()
    done = run(*files, "--every", "0.01s", "--rounds", "2")
    assert done.exit_code == 0
    if "changed" not in done.stdout:
        assert (tmp_path / "urgency.yaml").stat().st_mtime_ns == before.st_mtime_ns
    assert len(done.stdout.splitlines()) == 2


def test_a_search_without_time_keeps_what_there_is(files, tmp_path):
    tuned.write(tmp_path / "urgency.yaml", TunedOptions(order="fcfs"))
    done = run(*files, "--budget", "0.000001s")
    assert "nothing changes" in done.stdout
    assert tuned.read(tmp_path / "urgency.yaml") == TunedOptions(order="fcfs")


def test_an_empty_trace_is_waited_for(files, tmp_path):
    (tmp_path / "t.jsonl").write_text("")
    done = run(*files)
    assert done.exit_code == 0
    assert "no whole workflow yet" in done.stderr
    assert not (tmp_path / "urgency.yaml").exists()


def test_without_a_profile_it_says_for_what_it_tunes(files):
    done = run(*files[:4], "--budget", "0.000001s")
    assert "no --profile" in done.stderr


@pytest.mark.parametrize("text", ["", "0s", "-1s", "nan", "1d", "1e3", "100 parsecs", "inf"])
def test_times_that_are_none_are_refused(text):
    with pytest.raises(BadInput, match="--every"):
        seconds(text, "--every")


@pytest.mark.parametrize(("text", "expected_s"), [("100s", 100), ("2m", 120), ("1.5h", 5400)])
def test_times_have_units(text, expected_s):
    assert seconds(text, "--every") == expected_s
