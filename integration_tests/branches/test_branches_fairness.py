"""Nobody waits for ever for a branch, and what a branch's end is said to be is what it was."""

from __future__ import annotations

import pytest

from trimtab.branches.note import Fate

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("bend", [True, False])
def test_a_request_whose_first_branch_is_cut_does_not_wait_for_all_that_come(bed, bend):
    dry = bed(branches={"bend": bend}, max_num_seqs=1)
    dry.ask("a", [60, 15], enough=1, pruning="off", max_tokens=20)

    def more_come(step):
        if step % 10 == 0 and step < 300:
            dry.add(f"plain-{step}", [7] * 20, 30, ends_after=12)

    dry.run(more_come)
    assert dry.fates("a") == {0: Fate.LENGTH, 1: Fate.FINISHED}
    # The first branch, at most two calls that came before its place was free, and its own tokens.
    assert dry.ended_at["1_a"] < 20 + 2 * 13 + 20


def test_a_branch_preempted_under_load_goes_on_before_newcomers(bed):
    dry = bed(branches={"relieve": False}, blocks=24, max_num_seqs=4, prefix_caching=False)
    dry.ask("a", [90, 95, 100], enough=2, pruning="paper", prompt=32)
    came = []

    def more_come(step):
        if dry.preempted and not came:
            came.append(step)
            for number in range(6):
                dry.ask(f"late-{number}", [60, 60], enough=1, prompt=32)

    dry.run(more_come)
    assert dry.preempted
    branch = dry.preempted[0]
    assert branch.endswith("_a")
    firsts = [dry.ended_at[f"0_late-{number}"] for number in range(6)]
    assert dry.ended_at[branch] < max(firsts)


def test_a_branch_that_ends_with_its_last_allowed_token_has_finished(bed):
    dry = bed()
    dry.ask("a", [20, 50], enough=1, pruning="off", max_tokens=20)
    dry.ask("b", [21, 50], enough=1, pruning="off", max_tokens=20)
    dry.run()
    assert dry.fates("a") == {0: Fate.FINISHED, 1: Fate.LENGTH}
    assert dry.fates("b") == {0: Fate.LENGTH, 1: Fate.LENGTH}


@pytest.mark.parametrize("length", [1, 50])
def test_a_sibling_that_comes_too_late_is_no_answer(bed, length):
    dry = bed()
    dry.ask("a", [10, 12, 90], enough=2, pruning="off", branches=4)

    def comes_late(step):
        if step == 30:
            dry.ask("a", [length], first=3, enough=2, pruning="off", branches=4)

    dry.add("long", [5] * 20, 90, ends_after=80)
    dry.run(comes_late)
    assert dry.fates("a") == {
        0: Fate.FINISHED,
        1: Fate.FINISHED,
        2: Fate.STOPPED,
        3: Fate.STOPPED,
    }


@pytest.mark.parametrize("answer", ["best", "majority", "weighted"])
def test_where_all_are_awaited_no_load_and_no_vote_takes_a_branch_away(bed, answer):
    dry = bed(max_num_seqs=4)
    for name in "abc":
        dry.ask(name, [20, 30, 40, 50], enough=4, pruning="off", answer=answer, extract="none")
    dry.run()
    for name in "abc":
        assert dry.count(name) == {Fate.FINISHED: 4}
    assert {i: dry.tokens[f"{i}_a"] for i in range(4)} == {0: 20, 1: 30, 2: 40, 3: 50}


def test_a_client_can_ask_the_plugin_nothing_that_switches_it_off(bed):
    dry = bed()
    hostile = ("[" * 60_000, f"[[{'9' * 400}]]")
    for name, said in zip("ab", hostile, strict=True):
        dry.ask(name, [20, 30], enough=1, replay=said)
    dry.run()
    dry.ask("c", [20, 30], enough=1)
    dry.run()
    assert dry.fates("c") == {0: Fate.FINISHED, 1: Fate.STOPPED}
