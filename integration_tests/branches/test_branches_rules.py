"""What ends a branch, at work in vLLM's scheduler: load, votes, scores and length."""

from __future__ import annotations

import pytest
from vllm.v1.request import RequestStatus

from trimtab.branches.note import Fate

pytestmark = pytest.mark.integration

LENGTHS = [20, 30, 40, 50, 60, 70]
WAITERS = [f"waiter{number}" for number in range(5)]


def wait_in_line(dry):
    for number, name in enumerate(WAITERS):
        dry.add(name, [900 + number] * 40, 10, ends_after=5)


def test_while_others_wait_fewer_finished_branches_answer(bed):
    dry = bed(max_num_seqs=6)
    dry.ask("a", LENGTHS, enough=4, pruning="off")
    dry.run(lambda step: wait_in_line(dry) if step == 5 else None)
    assert dry.fates("a") == {0: Fate.FINISHED, **dict.fromkeys(range(1, 6), Fate.STOPPED)}
    assert all(len(dry.ends[name]) == 1 for name in WAITERS)

    dry.ask("b", LENGTHS, enough=4, pruning="off")
    dry.run()
    assert dry.finished("b") == {0, 1, 2, 3}


def test_once_those_who_waited_have_gone_the_request_needs_all_it_asked_for(bed):
    dry = bed(max_num_seqs=6)
    dry.ask("a", LENGTHS, enough=4, pruning="off")

    def come_and_go(step):
        if step == 5:
            wait_in_line(dry)
        if step == 15:
            dry.scheduler.finish_requests(WAITERS, RequestStatus.FINISHED_ABORTED)

    dry.run(come_and_go)
    assert dry.finished("a") == {0, 1, 2, 3}


def test_a_server_that_does_not_bend_lets_them_wait(bed):
    dry = bed(branches={"bend": False}, max_num_seqs=6)
    dry.ask("a", LENGTHS, enough=4, pruning="off")
    dry.run(lambda step: wait_in_line(dry) if step == 5 else None)
    assert dry.finished("a") == {0, 1, 2, 3}


@pytest.mark.parametrize(("certainty", "finished"), [(0.95, 4), (0.9, 3), (None, 10)])
def test_a_vote_that_is_certain_though_not_decided_ends_the_rest(bed, certainty, finished):
    # Of k equal votes the certainty is 1 - 2^-(k + 1): .938 of three, .969 of four. Without a
    # tokenizer a text is its tokens' numbers, and all branches have the same one before their end.
    options = {"certainty": certainty, "extract": r"regex:(\d+) \d+$", "answer": "majority"}
    dry = bed(branches=options)
    dry.ask("a", [*range(10, 28, 2), 40, 90, 90], enough=10)
    dry.run()
    assert dry.count("a") == {Fate.FINISHED: finished, Fate.STOPPED: 12 - finished}


@pytest.mark.parametrize("history", [True, False])
def test_safe_mode_prunes_what_scores_badly_among_branches_that_were_as_far(bed, history):
    dry = bed(branches={"score_every": 8})
    if history:
        for name in ("x", "y", "z"):
            dry.ask(name, [60] * 8, scores=[[0.5]] * 8)
        dry.run()
        assert not any(Fate.PRUNED in dry.fates(name).values() for name in "xyz")
    dry.ask("a", [50] * 4, scores=[[0.6], [0.6], [0.05], [0.6]], enough=2)
    dry.run()
    if not history:
        assert Fate.PRUNED not in dry.fates("a").values()
        return
    (note,) = dry.ends["2_a"]
    assert (note.fate, note.phase, note.score) == (Fate.PRUNED, 1, 0.05)
    assert note.tokens < 50
    assert dry.count("a")[Fate.PRUNED] == 1
    assert len(dry.finished("a")) >= 2


def test_a_branch_cut_by_its_length_is_no_answer(bed):
    dry = bed(branches={"bend": False}, max_num_seqs=2)
    dry.ask("a", [100, 100, 10, 15], enough=1, max_tokens=20)
    dry.run()
    assert dry.fates("a") == {
        0: Fate.LENGTH,
        1: Fate.LENGTH,
        2: Fate.FINISHED,
        3: Fate.STOPPED,
    }


@pytest.mark.parametrize("pruning", ["off", "paper"])
def test_a_request_whose_branches_are_all_cut_ends_too(bed, pruning):
    dry = bed(max_num_seqs=3)
    before = dry.free_blocks
    scores = [[0.9], [0.1], [0.1], [0.1]]
    dry.ask("a", [100] * 4, scores=scores, pruning=pruning, score_every=8, max_tokens=20)
    dry.run()
    assert set(dry.fates("a")) == {0, 1, 2, 3}
    assert dry.count("a")[Fate.LENGTH] == (4 if pruning == "off" else 2)
    assert dry.tokens["0_a"] == 20
    assert dry.free_blocks == before
