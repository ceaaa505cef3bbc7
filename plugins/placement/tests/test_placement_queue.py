"""The cluster simulator and the reservation queue: hand-computed traces, and what always holds."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.errors import BadInput, TrimtabError
from trimtab.core.simulate.cluster_jobs import (
    ClusterJob,
    FifoBestFit,
    JobRequest,
    Preempt,
    Start,
    best_fit,
    simulate_cluster,
)
from trimtab.core.simulate.cluster_traces import read_jobs, write_jobs
from trimtab.core.simulate.synthetic_jobs import synthetic_jobs
from trimtab.placement.job_time import GroupTimes, KnownTimes, LimitTimes
from trimtab.placement.queue_figures import POLICIES, run_queue
from trimtab.placement.reservation import ReservationOptions, ReservationQueue, best_grid


def job(job_id, arrival_s, nodes, duration_s, **more) -> ClusterJob:
    return ClusterJob(JobRequest(job_id, arrival_s, nodes, **more), duration_s)


def known(jobs):
    return KnownTimes((j.request, j.held_s) for j in jobs)


def starts(result):
    return {key: outcome.started_s for key, outcome in result.outcomes.items()}


def no_node_twice(result):
    uses = defaultdict(list)
    for outcome in result.outcomes.values():
        assert len(set(outcome.nodes)) == outcome.job.request.nodes
        for node in outcome.nodes:
            uses[node].append((outcome.started_s, outcome.ended_s))
    for spans in uses.values():
        spans.sort()
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_fifo_lets_none_overtake_and_best_fit_fills_the_fullest_pod():
    jobs = [job("a", 0, 3, 10), job("b", 1, 3, 10), job("c", 2, 1, 1), job("d", 3, 2, 5)]
    result = simulate_cluster(jobs, [3, 2], FifoBestFit())
    # b waits for a; c and d would fit at once and may not overtake it.
    assert starts(result) == {"a": 0, "b": 10, "c": 10, "d": 11}
    assert set(result.outcomes["c"].nodes) <= {3, 4}
    assert result.allocation(0, 10) == pytest.approx(3 / 5)
    assert result.held_at(10.5) == 4


def test_limits_end_jobs_and_priorities_go_first():
    jobs = [job("a", 0, 1, 100, limit_s=10), job("b", 1, 1, 1), job("c", 2, 1, 1, priority=5)]
    result = simulate_cluster(jobs, [1], FifoBestFit())
    assert result.outcomes["a"].ended_s == 10
    assert starts(result) == {"a": 0, "c": 10, "b": 11}


@pytest.mark.parametrize(
    ("policy", "short_start_s", "long_start_s"),
    [("reserve", 0, 120), ("reserve-no-backfill", 120, 120)],
)
def test_only_what_ends_in_time_starts_in_the_reserved_zone(policy, short_start_s, long_start_s):
    large = job("large", 100, 4, 20, announced_s=0)
    jobs = [large, job("short", 0, 4, 50), job("long", 0, 4, 150)]
    run = run_queue(
        policy,
        jobs,
        [2, 2],
        options=ReservationOptions(margin_s=10),
        learner=lambda _: known(jobs),
    )
    begun = starts(run.result)
    assert begun["large"] == 100
    assert (begun["short"], min(begun["short"], begun["long"])) == (
        short_start_s,
        min(short_start_s, long_start_s),
    )
    assert begun["long"] >= long_start_s
    assert (run.figures[0].retained_nodes, run.figures[0].wait_s) == (0, 0)


def test_fifo_makes_the_large_job_wait():
    jobs = [job("large", 100, 4, 20, announced_s=0), job("long", 0, 4, 150)]
    run = run_queue("fifo-best-fit", jobs, [2, 2], options=ReservationOptions())
    assert (run.figures[0].retained_nodes, run.figures[0].wait_s) == (4, 50)
    assert run.figures[0].allocation == 1


def test_the_margin_and_the_arrival_itself_are_respected():
    large = job("large", 100, 2, 20, announced_s=0)
    exact, late = job("exact", 0, 2, 90), job("late", 0, 2, 91)
    for other, expected_s in ((exact, 0), (late, 120)):
        jobs = [large, other]
        policy = ReservationQueue(
            ReservationOptions(margin_s=10), learner=lambda _, jobs=jobs: known(jobs)
        )
        assert starts(simulate_cluster(jobs, [2], policy))[other.request.job_id] == expected_s


def test_a_long_job_takes_nodes_outside_the_zone():
    jobs = [job("large", 100, 4, 20, announced_s=0), job("long", 0, 2, 500)]
    policy = ReservationQueue(learner=lambda _: known(jobs))
    result = simulate_cluster(jobs, [4, 2], policy)
    assert starts(result) == {"long": 0, "large": 100}
    assert policy.arrivals["large"].retained == 0
    assert policy.arrivals["large"].reserved == 4


def test_the_zone_moves_within_a_pod_when_a_job_is_late():
    # One pod of 4; the zone of 2 takes a's nodes, which seem sure, and a overruns.
    jobs = [
        job("large", 100, 2, 20, announced_s=10),
        job("a", 0, 2, 300, department="x"),
        job("b", 0, 2, 60, department="x"),
    ]

    class Wrong(KnownTimes):
        def exceeds(self, request, time_s, ran_s=0.0):
            return float(request.job_id == "a" and ran_s >= 50)

    wrong = Wrong((j.request, j.held_s) for j in jobs)
    policy = ReservationQueue(ReservationOptions(interval_s=0), learner=lambda _: wrong)
    result = simulate_cluster(jobs, [4], policy)
    assert starts(result)["large"] == 100
    assert set(result.outcomes["large"].nodes).isdisjoint(result.outcomes["a"].nodes)


def test_a_job_that_waited_too_long_is_overtaken_no_more():
    small = [job(f"s{i}", 10.0 * i, 1, 19) for i in range(100)]
    wide = job("wide", 5, 2, 10)
    waits = {}
    for patience_s in (100.0, 10_000.0):
        policy = ReservationQueue(ReservationOptions(patience_s=patience_s))
        result = simulate_cluster([*small, wide], [2], policy)
        waits[patience_s] = result.outcomes["wide"].wait_s
    assert waits[100.0] <= 130
    assert waits[10_000.0] > 900


def test_age_counts_as_priority():
    jobs = [
        job("first", 0, 1, 1000),
        job("old", 10, 1, 5),
        job("new", 500, 1, 5, priority=1),
    ]
    for ageing_s, order in ((100.0, ["old", "new"]), (10_000.0, ["new", "old"])):
        policy = ReservationQueue(ReservationOptions(ageing_s=ageing_s))
        begun = starts(simulate_cluster(jobs, [1], policy))
        assert sorted(("old", "new"), key=begun.__getitem__) == order


def test_preemptible_jobs_give_way_on_arrival_where_asked():
    jobs = [
        job("large", 100, 2, 20, announced_s=50),
        job("spot", 0, 2, 300, preemptible=True),
    ]
    policy = ReservationQueue(ReservationOptions(preempt=True))
    result = simulate_cluster(jobs, [2], policy)
    assert starts(result) == {"large": 100, "spot": 120}
    assert result.outcomes["spot"].lost_s == 100
    assert result.outcomes["spot"].ended_s == 420
    assert policy.arrivals["large"].overdue == ("spot",)


def test_the_large_jobs_nodes_are_in_the_order_of_its_grid():
    jobs = [job("large", 10, 8, 20, announced_s=0, pipeline_stages=2)]
    policy = ReservationQueue(ReservationOptions(alpha=0.0))
    result = simulate_cluster(jobs, [4, 4], policy)
    pods = np.array(result.outcomes["large"].nodes).reshape(4, 2) // 4
    assert (pods[:, 0] == pods[:, 1]).all()  # no pipeline leaves its pod


jobs_of_a_small_cluster = st.lists(
    st.tuples(
        st.integers(0, 50),
        st.integers(1, 6),
        st.integers(1, 40),
        st.one_of(st.none(), st.integers(1, 40)),
        st.booleans(),
        st.integers(0, 30),
    ),
    max_size=25,
)


def trace_of(drawn):
    return [
        job(f"j{i}", arrival, nodes, took, limit_s=limit, priority=i % 3, preemptible=spot)
        if i % 7 != 3
        else job(f"j{i}", arrival + 20, nodes, took, announced_s=arrival, limit_s=limit)
        for i, (arrival, nodes, took, limit, spot, _) in enumerate(drawn)
    ]


@given(jobs_of_a_small_cluster, st.sampled_from(POLICIES), st.booleans())
@settings(max_examples=60)
def test_every_job_runs_once_and_no_node_has_two_jobs(drawn, name, preempt):
    jobs = trace_of(drawn)
    options = ReservationOptions(margin_s=1, patience_s=30, preempt=preempt)
    run = run_queue(name, jobs, [3, 2, 2], options=options)
    assert set(run.result.outcomes) == {j.request.job_id for j in jobs}
    no_node_twice(run.result)
    for outcome in run.result.outcomes.values():
        assert outcome.started_s >= outcome.job.request.arrival_s
        assert outcome.ended_s - outcome.started_s == pytest.approx(outcome.job.held_s)
    again = run_queue(name, jobs, [3, 2, 2], options=options)
    assert again.result.outcomes == run.result.outcomes
    assert again.result.held == run.result.held


@given(jobs_of_a_small_cluster)
@settings(max_examples=60)
def test_the_zone_is_free_when_promised_if_predictions_are_right(drawn):
    others = [j for j in trace_of(drawn) if j.request.announced_s is None]
    # Announced before anything runs, so that nothing already holds the zone.
    jobs = [*others, job("large", 45, 4, 30, announced_s=-1, priority=9)]
    policy = ReservationQueue(ReservationOptions(margin_s=0), learner=lambda _: known(jobs))
    result = simulate_cluster(jobs, [3, 2, 2], policy)
    assert policy.arrivals["large"].retained == 0
    assert result.outcomes["large"].wait_s == 0


@given(st.lists(st.booleans(), min_size=9, max_size=9), st.integers(1, 9))
def test_best_fit_takes_the_fullest_pod_that_holds_the_job(flags, nodes):
    free, pod_of = np.array(flags), np.repeat(np.arange(3), 3)
    found = best_fit(free, pod_of, nodes)
    if free.sum() < nodes:
        assert found is None
        return
    assert free[found].all()
    assert len(set(found.tolist())) == nodes
    holding = [free[pod_of == pod].sum() for pod in range(3) if free[pod_of == pod].sum() >= nodes]
    if holding:
        pods = set(pod_of[found].tolist())
        assert len(pods) == 1
        assert free[pod_of == pods.pop()].sum() == min(holding)


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (Start("a", np.array([0, 0])), "nodes that are not free"),
        (Start("a", np.array([0])), "nodes that are not free"),
        (Start("z", np.array([0, 1])), "'z', which does not wait"),
        (Preempt("a"), "does not run or may not be"),
    ],
)
def test_a_faulty_policy_is_found_out(action, expected):
    class Faulty(FifoBestFit):
        def decide(self, state):
            return [action]

    with pytest.raises(TrimtabError, match=expected):
        simulate_cluster([job("a", 0, 2, 1)], [2], Faulty())


def test_a_policy_that_never_starts_a_job_is_found_out():
    class Idle(FifoBestFit):
        def decide(self, state):
            return []

    with pytest.raises(TrimtabError, match="never starts job 'a'"):
        simulate_cluster([job("a", 0, 2, 1)], [2], Idle())


def test_synthetic_traces_repeat_and_follow_the_day():
    jobs = synthetic_jobs(100, seed=3, days=4)
    assert jobs == synthetic_jobs(100, seed=3, days=4)
    assert jobs != synthetic_jobs(100, seed=4, days=4)
    hours = np.array([j.request.arrival_s for j in jobs]) % 86400 / 3600
    day, night = ((hours > 13) & (hours < 19)).sum(), ((hours > 1) & (hours < 7)).sum()
    assert day > 2 * night
    wanted = sum(j.request.nodes * j.held_s for j in jobs)
    assert wanted == pytest.approx(0.95 * 100 * 4 * 86400, rel=0.05)


def test_group_times_are_careful():
    def request(department="d", **more):
        return JobRequest("r", 0, 1, department=department, **more)

    times = GroupTimes([(request(), float(t)) for t in range(60, 6060, 60)])
    assert times.quantile_s(request(), 0.9) == 5460
    assert times.quantile_s(request(limit_s=100.0), 0.9) == 100
    assert times.exceeds(request(limit_s=100.0), 100) == 0
    assert 0.4 < times.exceeds(request(), 3000) < 0.6
    assert 0 < times.exceeds(request(), 20_000) < 0.01
    # Who ran long runs longer still.
    assert times.exceeds(request(), 6000, 5000) > times.exceeds(request(), 6000)
    # Unseen departments are known by their limit alone.
    assert times.quantile_s(request("new"), 0.9) == np.inf
    assert times.quantile_s(request("new", limit_s=7.0), 0.9) == 7
    assert GroupTimes([]).exceeds(request(), 1e9) == 1


@given(st.lists(st.floats(1, 1e5), min_size=40, max_size=80), st.floats(0, 1e5), st.floats(0, 1e5))
def test_chances_fall_with_time_and_stay_chances(times_s, early_s, more_s):
    request = JobRequest("r", 0, 1, department="d")
    times = GroupTimes([(request, t) for t in times_s])
    early, late = times.exceeds(request, early_s), times.exceeds(request, early_s + more_s)
    assert 0 <= late <= early <= 1


def test_quantiles_hold_on_new_jobs():
    def ended(seed):
        return [(j.request, j.held_s) for j in synthetic_jobs(200, seed=seed, days=3)]

    times = GroupTimes(ended(1))
    fresh = ended(2)
    within = np.mean([held_s <= times.quantile_s(request, 0.9) for request, held_s in fresh])
    assert 0.88 < within < 0.97
    assert all(held_s <= LimitTimes().quantile_s(request, 0.9) for request, held_s in fresh)


def test_boosted_times_hold_too():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from trimtab.placement.job_time import BoostedTimes

    def ended(seed):
        return [(j.request, j.held_s) for j in synthetic_jobs(200, seed=seed, days=2)]

    times = BoostedTimes(ended(1))
    fresh = ended(2)[:200]
    within = np.mean([held_s <= times.quantile_s(request, 0.9) for request, held_s in fresh])
    assert 0.86 < within < 0.99
    unseen = JobRequest("r", 0, 1, department="unheard of")
    assert times.quantile_s(unseen, 0.9) == np.inf


def test_a_grid_is_placed_even_in_pods_smaller_than_a_row():
    request = JobRequest("large", 0, 8, pipeline_stages=8)
    found = best_grid(request, [3, 3, 3], 0.5)
    assert found is not None
    assert found.spread.pipeline == 3
    assert best_grid(request, [3, 3, 1], 0.5) is None


OWN = '{"job_id": "a", "arrival_s": 0, "nodes": 2, "duration_s": 60}'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f'{OWN}\n{{"job_id": "b", "arr', ":2: this is no JSON"),
        (OWN.replace("60", "-60"), ":1: duration_s of job 'a' is -60.0; give a number above 0."),
        (OWN.replace("60", "NaN"), ":1: NaN is no JSON number; give a finite number."),
        (OWN.replace('"nodes": 2', '"nodes": 0'), ":1: nodes of job 'a' is 0; give at least 1."),
        (OWN.replace('"nodes"', '"node"'), "node is an unknown key"),
        (OWN.replace(', "duration_s": 60', ""), ":1: duration_s is missing; add it."),
        (f"{OWN}\n{OWN}", ":2: the job 'a' is given twice; give each job an id of its own."),
        ("[1, 2]", "job 0: this is no job; give jobid, vc, submitted_time and attempts."),
        (
            "hello",
            ":1: 'hello' begins no known format; known are trimtab, csv, philly, helios, slurm.",
        ),
        (
            "job_id,arrival_s,nodes,duration_s\na,0,2",
            ":2: the line has 3 of 4 columns; the file seems",
        ),
        ("job_id,arrival_s,nodes,duration_s\na,nan,2,5", ":2: arrival_s is 'nan'"),
        (
            "JobID|Submit|Start|End|NNodes\n7|yesterday|2024-01-01T00:00:00|2024-01-01T01:00:00|2",
            ":2: Submit is 'yesterday'; write 2017-10-09 07:01:55.",
        ),
    ],
)
def test_a_bad_trace_is_one_sentence(tmp_path, content, expected):
    path = tmp_path / "jobs.txt"
    path.write_text(content + "\n")
    with pytest.raises(BadInput) as caught:
        read_jobs(path)
    sentence = str(caught.value)
    assert expected in sentence
    assert sentence.startswith(str(path))
    assert "\n" not in sentence


def test_a_job_larger_than_the_cluster_is_one_sentence():
    with pytest.raises(BadInput) as caught:
        simulate_cluster([job("a", 0, 5, 1)], [2, 2], FifoBestFit())
    assert str(caught.value) == (
        "job 'a' wants 5 nodes and the cluster has 4; give a larger cluster, or leave the job out."
    )


def test_own_traces_come_back(tmp_path):
    jobs = synthetic_jobs(50, seed=1, days=0.5)
    write_jobs(tmp_path / "jobs.jsonl", jobs)
    assert read_jobs(tmp_path / "jobs.jsonl") == jobs


def test_public_formats(tmp_path):
    slurm = (
        "JobID|Account|Submit|Start|End|NNodes|Timelimit|State\n"
        "7|ml|2024-01-01T00:00:10|2024-01-01T01:00:00|2024-01-01T02:00:00|4|1-02:00:00|COMPLETED\n"
        "7.batch|ml|2024-01-01T00:00:10|2024-01-01T01:00:00|2024-01-01T02:00:00|1||COMPLETED\n"
        "8|ml|2024-01-01T00:00:00|Unknown|Unknown|4|10:00|PENDING\n"
    )
    helios = (
        "job_id,user,vc,gpu_num,cpu_num,node_num,state,submit_time,start_time,end_time,duration\n"
        "1,u,v,16,64,2,COMPLETED,2020-04-01 00:00:05,2020-04-01 00:01:00,2020-04-01 00:02:00,60\n"
        "2,u,v,0,64,1,COMPLETED,2020-04-01 00:00:06,2020-04-01 00:01:00,2020-04-01 00:02:00,60\n"
    )
    philly = json.dumps(
        [
            {
                "status": "Pass",
                "vc": "ee9e8c",
                "jobid": "application_1",
                "submitted_time": "2017-10-09 07:01:55",
                "attempts": [
                    {
                        "start_time": "2017-10-09 07:02:00",
                        "end_time": "2017-10-09 07:03:00",
                        "detail": [{"ip": "m1", "gpus": ["gpu0"]}, {"ip": "m2", "gpus": ["gpu0"]}],
                    }
                ],
            },
            {"jobid": "x", "vc": "v", "submitted_time": "2017-10-09 07:01:55", "attempts": []},
        ]
    )
    found = {}
    for name, content in (("slurm", slurm), ("helios", helios), ("philly", philly)):
        path = tmp_path / name
        path.write_text(content)
        found[name] = read_jobs(path)
    assert found["slurm"] == [job("7", 0, 4, 3600, limit_s=93600.0, department="ml")]
    assert found["helios"] == [job("1", 0, 2, 60, department="v")]
    assert found["philly"] == [job("application_1", 0, 2, 60, department="ee9e8c")]


@pytest.mark.parametrize("preempt", [False, True])
def test_large_jobs_that_want_the_same_nodes_run_one_after_the_other(preempt):
    jobs = [
        job("one", 100, 3, 20, announced_s=10),
        job("two", 101, 3, 20, announced_s=10),
        job("spot", 0, 4, 150, preemptible=True),
    ]
    policy = ReservationQueue(ReservationOptions(preempt=preempt))
    result = simulate_cluster(jobs, [4], policy)
    begun = starts(result)
    assert begun["two"] == begun["one"] + 20
    assert begun["one"] == (100 if preempt else 150)
    assert result.outcomes["spot"].lost_s == (100 if preempt else 0)
