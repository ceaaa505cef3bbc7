"""Branches in vLLM's real scheduler, with its real pool of blocks and no model."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from vllm.v1.request import RequestStatus

from trimtab.branches.note import Fate

pytestmark = pytest.mark.integration


def test_the_first_to_finish_answer_and_the_rest_end_in_that_step(bed):
    dry = bed()
    before = dry.free_blocks
    dry.ask("a", [30, 50, 90, 120], enough=2, pruning="off")
    dry.run()
    assert dry.fates("a") == {
        0: Fate.FINISHED,
        1: Fate.FINISHED,
        2: Fate.STOPPED,
        3: Fate.STOPPED,
    }
    assert dry.ended_at["2_a"] == dry.ended_at["3_a"] == dry.ended_at["1_a"]
    assert {i: dry.tokens[i] for i in ("0_a", "1_a", "2_a")} == {"0_a": 30, "1_a": 50, "2_a": 50}
    assert dry.free_blocks == before


def test_two_phases(bed):
    dry = bed()
    scores = [[0.9, 0.9], [0.1, 0.1], [0.6, 0.6], [0.95, 0.95]]
    dry.ask(
        "a",
        [24, 90, 90, 40],
        scores=scores,
        enough=2,
        pruning="paper",
        score_every=10,
        max_pruned=1,
    )
    dry.run()
    ends = {i: dry.ends[f"{i}_a"][0] for i in range(4)}
    assert [ends[i].fate for i in range(4)] == [
        Fate.FINISHED,
        Fate.PRUNED,
        Fate.PRUNED,
        Fate.FINISHED,
    ]
    assert (ends[1].phase, ends[1].tokens) == (1, 10)
    # The first has finished with .9 after 24 tokens; the third is under it at its next scoring.
    assert (ends[2].phase, ends[2].tokens) == (2, 30)
    assert ends[3].others == {0: 0.9, 1: 0.1, 2: 0.6}


def test_the_blocks_of_a_pruned_branch_serve_the_next_request_in_the_next_step(bed):
    # 24 blocks of 16: two branches of 10 blocks each leave no room for a prompt of 12 blocks.
    dry = bed(blocks=25, prefix_caching=False)
    dry.ask(
        "a",
        [200, 200],
        prompt=32,
        scores=[[0.9], [0.1]],
        enough=1,
        pruning="paper",
        score_every=96,
        max_tokens=300,
    )
    admitted = {}

    def note(step):
        if step == 90:
            dry.add("waiter", [9] * 190, 4)
        if "waiter" in dry.running:
            admitted.setdefault("waiter", step)

    dry.run(note)
    assert dry.fates("a")[1] is Fate.PRUNED
    assert dry.tokens["1_a"] == 96
    # `note` looks before each step: it runs in the step after the one that pruned.
    assert admitted["waiter"] == dry.ended_at["1_a"] + 2


def test_a_client_that_leaves_ends_all_branches_and_frees_their_blocks_at_once(bed):
    dry = bed()
    before = dry.free_blocks
    dry.ask("a", [150] * 8, enough=4)
    for _ in range(20):
        dry.step()
    assert dry.free_blocks < before
    gone = [f"{i}_a" for i in range(8)]
    dry.scheduler.finish_requests(gone, RequestStatus.FINISHED_ABORTED)
    assert dry.free_blocks == before
    assert not dry.scheduler.has_unfinished_requests()
    dry.ask("b", [10, 20], enough=1)
    assert dry.run().fates("b") == {0: Fate.FINISHED, 1: Fate.STOPPED}


@pytest.mark.parametrize("answer", ["best", "majority"])
def test_a_stop_string_found_by_the_server_counts_as_an_answer(bed, answer):
    dry = bed()
    dry.ask("a", [150] * 4, enough=2, pruning="off", answer=answer)
    dry.ask("b", [150] * 2, enough=2, pruning="off")

    def stop(step):
        if step in (20, 30):
            name = f"{step // 10}_a"
            dry.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)

    dry.run(stop)
    assert dry.fates("a") == {0: Fate.STOPPED, 1: Fate.STOPPED}
    assert dry.ended_at["0_a"] == 30
    assert dry.fates("b") == {0: Fate.FINISHED, 1: Fate.FINISHED}


def test_a_late_sibling_of_an_answered_request_ends_in_its_first_step(bed):
    dry = bed()
    dry.ask("a", [5, 80], enough=1, branches=4)
    for _ in range(10):
        dry.step()
    dry.ask("a", [80, 80], first=2, enough=1, branches=4)
    dry.step()
    assert dry.fates("a") == {0: Fate.FINISHED, **dict.fromkeys((1, 2, 3), Fate.STOPPED)}


def test_siblings_that_come_one_by_one_are_counted_together(bed):
    dry = bed()
    dry.ask("a", [3], enough=2, branches=3)
    for _ in range(6):
        dry.step()
    dry.ask("a", [3], first=1, enough=2, branches=3)
    dry.ask("a", [90], first=2, enough=2, branches=3)
    assert dry.run().fates("a") == {0: Fate.FINISHED, 1: Fate.FINISHED, 2: Fate.STOPPED}


def test_where_memory_is_short_the_weakest_branch_goes_before_anything_is_preempted(bed):
    scores = [[0.9], [0.8], [0.2], [0.7]]
    beds = {}
    for pressed in (True, False):
        dry = beds[pressed] = bed(blocks=41, prefix_caching=False)
        dry.ask(
            "a",
            [150] * 4,
            prompt=32,
            scores=scores,
            enough=4,
            pruning="pressure" if pressed else "off",
            score_every=16,
        )
        dry.run()
    assert beds[False].preempted
    assert not beds[True].preempted
    assert beds[True].fates("a")[2] is Fate.EVICTED
    assert beds[True].finished("a") == {0, 1, 3}


def test_under_load_no_second_branch_is_admitted_before_another_requests_first(bed):
    dry = bed(max_num_seqs=6)
    for name in "abcdef":
        dry.ask(name, [20, 30, 40, 50], enough=2, pruning="off")
    dry.step()
    assert dry.running == {f"0_{name}" for name in "abcdef"}
    dry.run()
    for name in "abcdef":
        assert Fate.FINISHED in dry.fates(name).values()


def test_beside_urgency_a_due_call_passes_branches_that_wait_and_they_still_end_early(bed):
    dry = bed(plugins={"urgency": {}}, max_num_seqs=4)
    for name in "ab":
        dry.ask(name, [30, 40, 50, 60], enough=2, pruning="off")
    dry.step()
    due = {"trimtab.workflow": "w", "trimtab.deadline_s": 5.0}
    dry.add("due", [9] * 20, 8, xargs=due, ends_after=5)
    admitted = []

    def note(step):
        admitted.extend(r.request_id for r in dry.scheduler.running)

    dry.run(note)
    order = list(dict.fromkeys(admitted))
    assert order.index("due") == 4  # the first to get a seat once the four running give one up
    for name in "ab":
        fates = Counter(dry.fates(name).values())
        assert fates[Fate.FINISHED] >= 1
        assert fates[Fate.STOPPED] + fates[Fate.WITHHELD] >= 1


def test_a_certain_vote_ends_the_rest(bed):
    # Without a tokenizer the text is the tokens' numbers; every branch ends with the same one.
    dry = bed(max_num_seqs=20)
    dry.ask("a", [10, 20, 30, 40, 90, 95], enough=6, answer="majority", extract="none")
    dry.ask("b", [10, 10, 10, 10, 90, 95], enough=6, answer="majority", extract="none")
    dry.ask("c", [10, 10, 10, 10, 90, 95], enough=6, answer="best", extract="none")
    dry.run()
    assert Fate.STOPPED not in list(dry.fates("a").values())[:4]
    assert list(dry.fates("b").values()).count(Fate.STOPPED) == 2
    assert Fate.STOPPED not in dry.fates("c").values()


def test_requests_that_do_not_ask_are_none_of_the_plugins(bed):
    dry = bed()
    for index in range(3):
        dry.add(f"{index}_plain", [5] * 20, 30, ends_after=10 + index)
    dry.add("1_lonely", [5] * 20, 30, xargs={"trimtab.branches": 1}, ends_after=12)
    dry.run()
    assert all(notes == [None] for notes in dry.ends.values())
    assert dry.tokens == {"0_plain": 10, "1_plain": 11, "2_plain": 12, "1_lonely": 12}


def test_logprobs_reach_the_signal_and_not_the_client(bed):
    def rows(names):
        own = [-0.1 if name.startswith("0") else -2.0 for name in names]
        return np.array([[value] + [-1.0] * 20 for value in own], dtype=np.float32)

    dry = bed(branches={"signals": {"probability": 1.0}, "window": 4}, logprobs=rows)
    dry.ask("a", [30, 40], enough=2, pruning="off", score_every=8)
    dry.run()
    assert not dry.logprobs
    assert dry.ends["0_a"][0].score == pytest.approx(0.905, abs=0.001)
    assert dry.ends["1_a"][0].score == pytest.approx(0.135, abs=0.001)
