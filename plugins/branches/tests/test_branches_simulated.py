"""The simulated tier: leaps change nothing, and every side answers every question."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from trimtab.branches import simulated_bench
from trimtab.branches.drawn import RIGHT, Kind
from trimtab.branches.rebase import searched
from trimtab.branches.sides import OURS, PAPER, SELF_CONSISTENCY, VANILLA, Side
from trimtab.branches.simulated_bench import REBASE, all_rivals
from trimtab.branches.simulated_serving import RememberingPolicy, policy_of, requests_of, serve
from trimtab.core.benchmark import Options
from trimtab.core.cost.step import EngineLimits, EngineProfile, StepCost
from trimtab.core.simulate import ReplicaSpec, naive, simulate

SMALL = Kind(mean_tokens=60.0, prompt_tokens=20, score_every=8)
ENGINE = EngineProfile(
    model="m",
    device="d",
    engine="e",
    limits=EngineLimits(
        max_num_seqs=12,
        max_num_batched_tokens=64,
        max_model_len=2000,
        block_size=8,
        kv_blocks=130,
    ),
    step=StepCost(base_s=1 / 64, kv_token_s=1 / 2**20),
)


@pytest.mark.parametrize("side", [PAPER, OURS, *all_rivals(0)], ids=lambda side: side.name)
def test_leaping_to_the_next_scoring_changes_nothing(side: Side) -> None:
    crowd = SMALL.draw(10, 1.0, seed=4)
    requests = requests_of(crowd, side)
    leaping, stepping = (policy_of(crowd, side, SMALL.score_every) for _ in range(2))
    result = simulate(requests, [ReplicaSpec(ENGINE)], policies=lambda: [leaping])
    expected = naive.simulate(requests, [ReplicaSpec(ENGINE)], policies=lambda: [stepping])
    assert [
        (call.request_id, call.branch, call.output_tokens, call.finished_s) for call in result.calls
    ] == [(g.request.request_id, g.branch, g.generated, g.finished_s) for g in expected]
    assert leaping.notes == stepping.notes


def test_the_policy_leaps() -> None:
    crowd = SMALL.draw(1, 1.0, seed=4)
    policy = policy_of(crowd, SELF_CONSISTENCY, 30)
    asked = Counter[type]()
    step = RememberingPolicy.on_step

    def counted(self: RememberingPolicy, progressed: object, now_s: float) -> object:
        asked[type(self)] += 1
        return step(self, progressed, now_s)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RememberingPolicy, "on_step", counted)
        simulate(
            requests_of(crowd, SELF_CONSISTENCY), [ReplicaSpec(ENGINE)], policies=lambda: [policy]
        )
    assert 0 < asked[RememberingPolicy] < max(crowd[0].lengths) / 3


@pytest.mark.parametrize("side", [VANILLA, SELF_CONSISTENCY, PAPER, OURS], ids=lambda s: s.name)
def test_every_question_is_answered(side: Side) -> None:
    crowd = SMALL.draw(20, 2.0, seed=1)
    served = serve(crowd, side, SMALL.score_every, ENGINE)
    assert len(served.latencies_s) == len(served.right) == 20
    assert sum(served.ends.values()) == 20 * side.branches
    assert min(served.latencies_s) > 0
    if side in (VANILLA, SELF_CONSISTENCY):
        assert served.tokens == sum(sum(q.lengths[: side.branches]) for q in crowd)


def test_paper_mode_saves_tokens_and_time() -> None:
    crowd = SMALL.draw(20, 2.0, seed=1)
    all_of_them = serve(crowd, SELF_CONSISTENCY, SMALL.score_every, ENGINE)
    paper = serve(crowd, PAPER, SMALL.score_every, ENGINE)
    assert paper.tokens < 0.7 * all_of_them.tokens
    assert sum(paper.latencies_s) < 0.7 * sum(all_of_them.latencies_s)
    assert paper.kv_block_s < all_of_them.kv_block_s


def test_a_tree_search_continues_what_scores_well() -> None:
    crowd = Kind(auroc=0.95).draw(150, 1.0, seed=0)
    leaves = [searched(question, 400, 0) for question in crowd]
    before = sum(answer == 0 for q in crowd for answer in q.answers)
    after = sum(answer == 0 for q in leaves for answer in q.answers)
    assert after > 1.05 * before
    for question, leaf in zip(crowd, leaves, strict=True):
        assert leaf.lengths == question.lengths
        assert [len(r) for r in leaf.rewards] == [len(r) for r in question.rewards]
    assert REBASE.branches == 8


def test_the_tier_compares_with_every_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated_bench, "QUICK_TRACES", (2,))
    monkeypatch.setattr(simulated_bench, "QUICK_OVERLOAD_QUESTIONS", 4)
    monkeypatch.setattr(simulated_bench, "QUICK_STABLE_QUESTIONS", 4)
    told: list[str] = []
    cases = simulated_bench.cases(
        Options(seed=3, quick=True), lambda message, done=None: told.append(message)
    )
    compared = {(case.case, case.baseline) for case in cases}
    everyone = {side.name for side in all_rivals(0)}
    assert len(everyone) == 8
    for ours in (PAPER, OURS, simulated_bench.OURS_WITH_REWARD_MODEL):
        for setting in ("overload-4", "stable"):
            where = f"simulator/{setting}/{ours.name}"
            assert {baseline for case, baseline in compared if case == where} == everyone
        assert (f"simulator/overload-2/{ours.name}", "self-consistency") in compared
    metrics = {"latency_mean", "latency_p50", "latency_p97", "preemptions", "accuracy"}
    assert metrics <= {case.metric for case in cases}
    assert len(told) == 3


@pytest.mark.parametrize("auroc", [0.6, 0.9])
def test_chances_are_how_often_branches_are_right(auroc: float) -> None:
    crowd = Kind(mean_tokens=60.0, score_every=8, auroc=auroc).draw(1500, 1.0, seed=2)
    chances = np.array([chance for question in crowd for chance in question.chances])
    right = np.array([answer == RIGHT for question in crowd for answer in question.answers])
    for low in np.linspace(0, 0.8, 5):
        some = (chances >= low) & (chances < low + 0.2)
        assert right[some].mean() == pytest.approx(chances[some].mean(), abs=0.03)
    said = np.array([rewards[-1] for question in crowd for rewards in question.rewards])
    logarithms = [np.log(shares[right]).mean() for shares in (chances, said)]
    assert logarithms[0] > logarithms[1], "a branch's last reward says less than all that is known"
