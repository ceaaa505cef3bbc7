from __future__ import annotations

import random
from dataclasses import replace

import pytest

from trimtab.core.cost.step import EngineLimits, EngineProfile, StepCost
from trimtab.core.errors import BadInput
from trimtab.core.simulate import ReplicaSpec, simulate
from trimtab.core.workload import Request, Workload
from trimtab.urgency import tuning
from trimtab.urgency.config import TunedDispatch, TunedOptions, UrgencyConfig
from trimtab.urgency.policy import UrgencyPolicy

LIMITS = EngineLimits(max_num_seqs=2, max_num_batched_tokens=512, max_model_len=1024, kv_blocks=512)
PROFILE = EngineProfile(
    model="m", device="d", engine="e", limits=LIMITS, step=StepCost(base_s=0.05, decode_s=0.01)
)
SLOW = PROFILE.model_copy(update={"step": PROFILE.step.scaled(4.0)})
ALONE_S = 2.5
"""About what a chain of `chains` takes alone."""


def chains(count: int, load: float, seed: int, start_s: float = 0.0) -> list[Request]:
    """Workflows of three stages; half of them with a tight deadline, half with a loose one."""
    chance = random.Random(seed)
    requests, arrival_s = [], start_s
    for number in range(count):
        arrival_s += chance.expovariate(load * 2 / ALONE_S)
        deadline_s = ALONE_S * (chance.uniform(1.5, 3) if number % 2 else chance.uniform(6, 12))
        name = f"{seed}-{start_s:g}-{number}"
        requests += [
            Request(
                f"{name}/{stage}",
                arrival_s,
                20,
                chance.randint(8, 20),
                workflow=name,
                stage=f"s{stage}",
                deadline_s=deadline_s,
                depends_on=(f"{name}/{stage - 1}",) if stage else (),
            )
            for stage in range(3)
        ]
    return requests


def loss_of(options: TunedOptions, requests: list[Request]) -> float:
    config = options.over(UrgencyConfig())
    return tuning.loss(
        simulate(requests, [ReplicaSpec(PROFILE)], policies=lambda: (UrgencyPolicy(config),))
    )


ORDERS = [TunedOptions(order=order) for order in ("edd", "urgency", "llf", "srpt", "fcfs")]


def test_after_a_load_shift_one_search_finds_hindsights_best_and_stays_with_it():
    """Light load, then twice what the engine can do; a search after each minute or so."""
    current, changes = TunedOptions(order="urgency"), []
    for period, load in enumerate((0.3, 0.3, 2.0, 2.0, 2.0)):
        seen = chains(50, load, seed=period)
        replays = tuning.Replays(seen, [PROFILE], UrgencyConfig(), seed=period)
        found = tuning.tune(replays, current, [ORDERS])
        assert found.in_time
        changes.append(found.changed)
        current = found.options
    assert sum(changes[:2]) <= 1
    assert changes[2]
    assert sum(changes[2:]) <= 2
    unseen = [chains(60, 2.0, seed=100 + number) for number in range(4)]
    hindsight = {o: sum(loss_of(o, trace) for trace in unseen) for o in ORDERS}
    assert hindsight[TunedOptions(order="urgency")] > 1.1 * min(hindsight.values())
    assert sum(loss_of(current, trace) for trace in unseen) <= 1.05 * min(hindsight.values())


def test_nothing_changes_where_nothing_is_better():
    seen = chains(40, 0.2, seed=1)
    replays = tuning.Replays(seen, [PROFILE], UrgencyConfig())
    current = TunedOptions(order="edd")
    found = tuning.tune(replays, current, [ORDERS])
    assert not found.changed
    assert found.options == current


def test_a_search_out_of_time_changes_nothing():
    seen = chains(40, 2.0, seed=1)
    replays = tuning.Replays(seen, [PROFILE], UrgencyConfig(), budget_s=-1.0)
    current = TunedOptions(order="fcfs")
    found = tuning.tune(replays, current, [ORDERS])
    assert (found.options, found.changed, found.in_time) == (current, False, False)
    assert "NaN" not in tuning.summary(found)


def test_a_field_without_time_leaves_the_winner_of_those_before():
    seen = chains(50, 2.0, seed=1)
    replays = tuning.Replays(seen, [PROFILE], UrgencyConfig())
    fields = [[TunedOptions(order="edd")], [TunedOptions(age_cap=float(n)) for n in range(2, 9)]]
    first = replays.loss
    asked = 0

    def stops(options: TunedOptions, window: int) -> float:
        nonlocal asked
        asked += 1
        if replays.spendable < 1 and asked > 20:
            raise tuning.OutOfTime
        return first(options, window)

    replays.loss = stops
    found = tuning.tune(replays, TunedOptions(order="urgency"), fields)
    assert found.changed
    assert found.options.order == "edd"


def test_dispatch_rules_are_searched_where_there_are_several_engines():
    seen = chains(60, 2.5, seed=3)
    replays = tuning.Replays(seen, [PROFILE, SLOW], UrgencyConfig())
    field = [
        TunedOptions(dispatch=TunedDispatch(rule="paper", alpha=alpha)) for alpha in (0.0, 0.5, 1.0)
    ]
    current = TunedOptions(dispatch=TunedDispatch(rule="round-robin"))
    found = tuning.tune(replays, current, [field])
    assert found.changed
    assert found.options.dispatch.rule == "paper"
    assert found.after < found.before


def test_halving_keeps_the_best_and_looks_little_at_the_rest():
    field = [TunedOptions(age_cap=2.0 + number) for number in range(16)]
    asked = []

    def loss_of(options: TunedOptions, window: int) -> float:
        asked.append((options, window))
        return abs(options.age_cap - 7.0) + 0.1 * window

    assert tuning.halve(field, loss_of, 8) == field[5]
    assert len(set(asked)) <= 16 + 16 + 16 + 16
    assert tuning.halve(field[:1], loss_of, 8) == field[0]


def test_halving_cut_short_takes_the_best_of_the_last_whole_round():
    field = [TunedOptions(age_cap=2.0 + number) for number in range(8)]
    asked = 0

    def loss_of(options: TunedOptions, window: int) -> float:
        nonlocal asked
        asked += 1
        if asked > most:
            raise tuning.OutOfTime
        return abs(options.age_cap - 7.0)

    most = 10
    assert tuning.halve(field, loss_of, 8) == field[5]
    asked, most = 0, 7
    with pytest.raises(tuning.OutOfTime):
        tuning.halve(field, loss_of, 8)


def test_only_sure_gains_count():
    before = [0.5, 0.6, 0.4, 0.5, 0.55, 0.45, 0.5, 0.6]
    assert tuning.surely_better(before, [loss - 0.1 for loss in before])
    assert not tuning.surely_better(before, before)
    assert not tuning.surely_better(before, [loss * 0.99 for loss in before])
    noisy = [loss + (0.3 if i % 2 else -0.31) for i, loss in enumerate(before)]
    assert not tuning.surely_better(before, noisy)


def test_the_fields_of_candidates_are_whole():
    assert len(tuning.alpha_candidates()) == 2 * 11
    assert len(set(tuning.queue_candidates())) == 22
    for options in tuning.dispatch_candidates() + tuning.alpha_candidates():
        seen = chains(4, 1.0, seed=0)
        assert tuning.Replays(seen, [PROFILE, SLOW], UrgencyConfig()).loss(options, 0) >= 0


def test_windows_have_the_traces_arrivals_and_whole_workflows():
    trace = chains(30, 1.0, seed=5)
    first = min(request.arrival_s for request in trace)
    arrivals = sorted({round(request.arrival_s - first, 6) for request in trace})
    for window in tuning.windows(trace, 3, seed=0):
        workload = Workload(window)
        assert len(workload.workflows) == 30
        assert sorted({round(r.arrival_s, 6) for r in window}) == arrivals
        assert all(len(group) == 3 for group in workload.workflows.values())
    again = tuning.windows(trace, 3, seed=0)
    assert again == tuning.windows(trace, 3, seed=0)
    assert again[0] != again[1]


def test_singles_without_a_workflow_are_windows_too():
    trace = [Request(f"r{n}", float(n), 10, 5) for n in range(20)]
    (window,) = tuning.windows(trace, 1, seed=0)
    assert len(Workload(window)) == 20
    assert tuning.loss(simulate(window, [ReplicaSpec(PROFILE)])) < 0.01


def test_a_missed_deadline_weighs_more_than_any_latency():
    def loss_at(deadline_s: float, gap_s: float) -> float:
        trace = [
            Request("a", 0.0, 10, 5, workflow="w", deadline_s=deadline_s),
            Request("b", 0.0, 10, 5, workflow="w", depends_on=("a",), gap_s=gap_s),
        ]
        return tuning.loss(simulate(trace, [ReplicaSpec(PROFILE)]))

    assert loss_at(5000.0, 4000.0) < 0.02 < 1.0 < loss_at(1.0, 1.0)


def test_the_recent_part_of_a_growing_trace(tmp_path):
    path = tmp_path / "t.jsonl"
    old, new = chains(5, 1.0, seed=1), chains(6, 1.0, seed=2, start_s=1000.0)
    Workload(tuple(old + new)).to_jsonl(path)
    assert len(tuning.recent(path)) == 33
    assert {r.workflow for r in tuning.recent(path, 500.0)} == {r.workflow for r in new}
    with path.open("a") as file:
        file.write('{"request_id": "half a li')
    assert len(tuning.recent(path)) == 33
    with path.open("a") as file:
        file.write('ne", "arrival_s": 1e4, "prompt_tokens": 3, "output_tokens": 1}\n')
    assert len(tuning.recent(path)) == 34
    orphan = replace(new[1], request_id="o", workflow="orphan", depends_on=("gone",))
    with path.open("a") as file:
        file.write(
            '{"request_id": "o", "arrival_s": 1e4, "prompt_tokens": 3, "output_tokens": 1, '
            '"depends_on": ["gone"]}\n'
        )
    assert orphan.request_id not in {r.request_id for r in tuning.recent(path)}


@pytest.mark.parametrize(
    "line", ["{}", "[]", "nothing", '{"request_id": "a", "arrival_s": NaN}', "\xff"]
)
def test_a_trace_that_is_none_is_refused_with_its_line(tmp_path, line):
    path = tmp_path / "t.jsonl"
    path.write_text(line + "\n", encoding="latin-1")
    with pytest.raises(BadInput, match=r"t\.jsonl:1"):
        tuning.recent(path)
    with pytest.raises(BadInput, match="no such file"):
        tuning.recent(tmp_path / "none")
