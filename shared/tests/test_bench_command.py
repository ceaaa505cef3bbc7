from __future__ import annotations

import json

import pytest

from trimtab.cli import bench
from trimtab.core.errors import BadInput

GROUP = "trimtab.plugins"
PLUGIN = """
    import atexit, os, subprocess
    from trimtab.core.benchmark import Benchmark, Case
    from trimtab.core.hooks import hookimpl

    def case(name, baseline, ours, **more):
        return Case.compare(name, "latency", "s", "lower", "fcfs", [(baseline, ours)], **more)

    def noisy(options, progress):
        progress("half way", 0.5)
        print("PRINTED")
        os.write(1, b"WRITTEN\\n")
        subprocess.run(["echo", "CHILD"], check=True)
        atexit.register(lambda: os.write(1, b"FAREWELL\\n"))
        return [
            case("model/win", 9.0, 3.0, lower_bound=2.5),
            case("model/loss", 1.0, 2.0),
            case(f"seed-{options.seed}-quick-{options.quick}", 1.0, 1.0),
        ]

    def needy(options, progress):
        import a_framework_that_nobody_has.engine

    def faulty(options, progress):
        raise RuntimeError("the engine died")

    @hookimpl
    def trimtab_benchmarks():
        return [
            Benchmark("noisy", "Makes noise.", noisy),
            Benchmark("needy", "Needs much.", needy),
            Benchmark("faulty", "Fails.", faulty),
        ]
"""
NOISE = ("PRINTED", "WRITTEN", "CHILD", "FAREWELL")


@pytest.fixture
def benches(site):
    site.add("trimtab-noise", "1", {GROUP: {"noise": "noise_plugin"}}, {"noise_plugin.py": PLUGIN})
    return site


def test_json_is_alone_on_stdout_whatever_the_benchmark_prints(benches):
    done = benches.trimtab("bench", "noisy", "--json")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert (report["bench"], report["seed"]) == ("noisy", 0)
    assert report["machine"]["cores"] >= 1
    assert report["cases"][0] == {
        "case": "model/win",
        "metric": "latency",
        "unit": "s",
        "better": "lower",
        "baseline": "fcfs",
        "baseline_value": 9.0,
        "value": 3.0,
        "ratio": 3.0,
        "ratio_low": 3.0,
        "ratio_high": 3.0,
        "lower_bound": 2.5,
    }
    for noise in (*NOISE, "half way"):
        assert noise in done.stderr


def test_the_table_has_every_case_the_lost_one_too(benches):
    done = benches.trimtab("bench", "noisy")
    assert done.returncode == 0
    for piece in (
        "model/win",
        "3.00 (3.00–3.00)",
        "2.5",
        "model/loss",
        "0.50 (0.50–0.50)",
        "latency (s)",
        "fcfs",
    ):
        assert piece in done.stdout
    assert not [noise for noise in NOISE if noise in done.stdout]


def test_seed_and_quick_reach_the_benchmark(benches):
    done = benches.trimtab("bench", "noisy", "--json", "--seed", "7", "--quick")
    assert json.loads(done.stdout)["cases"][2]["case"] == "seed-7-quick-True"


def test_out_writes_what_json_prints(benches):
    done = benches.trimtab("bench", "noisy", "--json", "--out", "report.json")
    assert (benches.root / "report.json").read_text() == done.stdout


def test_out_writes_into_a_pipe(benches):
    done = benches.trimtab("bench", "noisy", "--out", "/dev/stdout")
    report, end = json.JSONDecoder().raw_decode(done.stdout)
    assert report["bench"] == "noisy"
    assert "seed-0-quick-False" in done.stdout[end:]


def test_an_out_that_cannot_be_written_is_refused_before_the_run(benches):
    done = benches.trimtab("bench", "noisy", "--out", "nowhere/report.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("trimtab: nowhere/report.json: there is no folder ")
    assert "half way" not in done.stderr


def test_an_unknown_name_is_answered_with_the_known_ones(benches):
    done = benches.trimtab("bench", "nosy")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no benchmark 'nosy'; known are " in done.stderr
    assert {"cost,", "faulty,", "host,", "needy,", "noisy,"} <= set(done.stderr.split())


def test_a_framework_that_is_missing_is_named(benches):
    done = benches.trimtab("bench", "needy", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'needy' needs the package 'a_framework_that_nobody_has'" in done.stderr


def test_a_benchmark_that_fails_prints_no_json(benches):
    done = benches.trimtab("bench", "faulty", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "trimtab: RuntimeError: the engine died" in done.stderr


def test_without_a_name_the_benchmarks_are_listed(benches):
    listed = json.loads(benches.trimtab("bench", "--json").stdout)["benchmarks"]
    names = {row["name"]: row["summary"] for row in listed}
    assert names["noisy"] == "Makes noise."
    assert set(bench.BUILT_IN) <= set(names)
    assert "Makes noise." in benches.trimtab("bench").stdout


def test_completion_knows_the_benchmarks(benches):
    done = benches.trimtab(
        _TRIMTAB_COMPLETE="complete_bash", COMP_WORDS="trimtab bench n", COMP_CWORD="2"
    )
    assert done.stdout.split() == ["needy", "noisy"]


def test_built_in_benchmarks_are_found_by_their_import_path(site, monkeypatch):
    source = """
        from trimtab.core.benchmark import Benchmark
        MINE = Benchmark("mine", "A made-up one.", lambda options, progress: [])
    """
    site.add("mine", files={"mine_bench.py": source})
    monkeypatch.setattr(bench, "BUILT_IN", {"mine": "mine_bench:MINE"})
    assert bench._run("mine", quick=True, seed=3).bench == "mine"
    with pytest.raises(BadInput, match="there is no benchmark 'cost'"):
        bench._run("cost", quick=True, seed=3)


def test_a_plugin_that_cannot_name_its_benchmarks_hides_no_other(benches):
    source = """
        from trimtab.core.hooks import hookimpl
        @hookimpl
        def trimtab_benchmarks():
            raise OSError("no list")
    """
    benches.add("trimtab-odd", "1", {GROUP: {"odd": "odd_plugin"}}, {"odd_plugin.py": source})
    done = benches.trimtab("bench", "noisy", "--json")
    assert json.loads(done.stdout)["bench"] == "noisy"
    assert "'odd' names no benchmarks (OSError: no list)" in done.stderr
