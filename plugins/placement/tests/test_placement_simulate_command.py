"""``trimtab simulate cluster``: its figures as JSON, and its sentences."""

from __future__ import annotations

import json

import pytest
from typer import Typer
from typer.testing import CliRunner

from trimtab.core.cluster import Cluster
from trimtab.core.errors import BadInput
from trimtab.core.simulate.cluster_traces import write_jobs
from trimtab.core.simulate.synthetic_jobs import synthetic_jobs
from trimtab.placement.plugin import trimtab_commands


@pytest.fixture
def run(tmp_path):
    nodes = [{"name": f"n{i:02d}", "device": "H100-SXM", "count": 8} for i in range(24)]
    links = [
        {"a": f"n{i:02d}", "b": f"pod{i // 8}", "bandwidth_bytes_per_s": 5e10} for i in range(24)
    ]
    links += [{"a": f"pod{p}", "b": "core", "bandwidth_bytes_per_s": 1e11} for p in range(3)]
    switches = ["pod0", "pod1", "pod2", "core"]
    cluster = {"name": "c", "nodes": nodes, "switches": switches, "links": links}
    (tmp_path / "c.yaml").write_text(Cluster.model_validate(cluster).model_dump_json())
    write_jobs(tmp_path / "jobs.jsonl", synthetic_jobs(24, seed=1, days=1, load=0.8))
    app = Typer()
    trimtab_commands(app)

    def call(*arguments):
        files = ["--trace", str(tmp_path / "jobs.jsonl"), "--cluster", str(tmp_path / "c.yaml")]
        done = CliRunner().invoke(app, ["simulate", "cluster", *files, *arguments])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.stdout

    return call


def test_all_policies_are_compared_on_one_trace(run):
    report = json.loads(run("--announce", "nodes=16,at=18h,ahead=4h,stages=2", "--json"))
    assert report["pods"] == [8, 8, 8]
    names = [policy["policy"] for policy in report["policies"]]
    assert names == ["reserve", "fifo-best-fit", "reserve-no-backfill"]
    for policy in report["policies"]:
        (figures,) = policy["announced"]
        assert figures["nodes"] == 16
        assert 0 <= figures["allocation"] <= 1
        assert figures["pipeline_spread"] >= 1
        assert max(policy["allocation"]["share"]) <= 1
    table = run("--announce", "nodes=16,at=18h", "--policy", "reserve")
    assert "(16 nodes)" in table
    assert "its nodes still held on arrival" in table


def test_a_job_of_the_trace_may_be_the_announced_one(run):
    report = json.loads(run("--announce", "job=j3,ahead=2h", "--policy", "reserve", "--json"))
    assert [figures["job_id"] for figures in report["policies"][0]["announced"]] == ["j3"]


@pytest.mark.parametrize(
    ("announce", "expected"),
    [
        ("job=zz,ahead=4h", "'job=zz,ahead=4h' has no job 'zz'; write job=ID"),
        ("nodes=16,at=18x", "has the time '18x'; write 90m, 4h or seconds."),
        ("nodes=-1,at=18h", "has the count '-1'; give a number from 1."),
        ("nodes=16,at=18h,colour=red", "has the key 'colour'; write job=ID"),
        ("soon", "'soon' announces nothing; write job=ID"),
        ("nodes=99,at=18h", "wants 99 nodes and the cluster has 24; give a larger cluster"),
        ("nodes=16,at=18h,stages=3", "pipeline_stages of job"),
    ],
)
def test_a_bad_announcement_is_one_sentence(run, announce, expected):
    with pytest.raises(BadInput) as caught:
        run("--announce", announce)
    assert expected in str(caught.value)


def test_unknown_policies_and_options_out_of_range_are_refused(run):
    with pytest.raises(BadInput, match="no policy 'lifo'; known are reserve, fifo-best-fit"):
        run("--policy", "lifo")
    with pytest.raises(BadInput, match="quantile is 2"):
        run("--quantile", "2")
