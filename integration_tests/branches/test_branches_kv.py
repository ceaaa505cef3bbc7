"""The KV blocks of branches: shared by siblings, forgotten when pruned, thrown out when short."""

from __future__ import annotations

import pytest
from vllm.v1.request import RequestStatus

from trimtab.branches.note import Fate

pytestmark = pytest.mark.integration

BLOCK = 16


def test_a_prompt_is_computed_once_and_its_blocks_are_those_of_all_siblings(bed):
    dry = bed()
    dry.ask("a", [30] * 4, prompt=40)
    scheduled, _ = dry.step()
    computed = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
    assert computed == {"0_a": 0, "1_a": 32, "2_a": 32, "3_a": 32}
    assert scheduled.num_scheduled_tokens == {"0_a": 40, "1_a": 8, "2_a": 8, "3_a": 8}
    held = [dry.held(f"{i}_a") for i in range(4)]
    shared = held[0][:2]
    assert [blocks[:2] for blocks in held] == [shared] * 4
    assert [dry.pool.blocks[number].ref_cnt for number in shared] == [4, 4]
    own = [number for blocks in held for number in blocks[2:]]
    assert len(set(own)) == len(own)
    assert all(dry.pool.blocks[number].ref_cnt == 1 for number in own)


def test_when_siblings_end_the_prompts_blocks_are_those_of_the_rest(bed):
    dry = bed()
    dry.ask("a", [30] * 3, scores=[[0.9], [0.1], [0.9]], enough=2, pruning="paper", score_every=8)
    while "1_a" not in dry.ends:
        dry.step()
    assert dry.fates("a") == {1: Fate.PRUNED}
    assert [dry.pool.blocks[number].ref_cnt for number in dry.held("0_a")[:2]] == [2, 2]


@pytest.mark.parametrize("forget", [True, False])
def test_blocks_of_a_pruned_branch_leave_the_prefix_cache_if_they_are_to(bed, forget):
    dry = bed(branches={"forget_pruned": forget})
    scores = [[0.9], [0.1]]
    dry.ask("a", [90, 90], scores=scores, prompt=40, enough=1, pruning="paper", score_every=48)
    held = []
    while "1_a" not in dry.ends:
        if "1_a" in dry.running:
            held = dry.held("1_a")
        dry.step()
    assert dry.fates("a") == {1: Fate.PRUNED}
    # 40 tokens of prompt and 47 of the 48 of output are computed: five full blocks.
    prompt, own = held[:2], held[2:5]
    cached = [dry.pool.blocks[number].block_hash is not None for number in (*prompt, *own)]
    assert cached == [True, True, *[not forget] * 3]
    assert all(dry.pool.blocks[number].ref_cnt == 0 for number in own)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("weak", [1, 2, 3])
def test_preemption_in_the_middle_of_a_group_that_is_pruned(bed, ahead, weak):
    # 40 blocks of 16 hold four branches of 160 tokens: prompts of 32, so outputs of 128.
    dry = bed(
        branches={"relieve": False, "bend": False},
        blocks=41,
        prefix_caching=False,
        async_scheduling=ahead,
    )
    before = dry.free_blocks
    scores = [[0.9]] * 4
    scores[weak] = [0.9] * 8 + [0.1]
    dry.ask(
        "a",
        [140, 170, 175, 180],
        scores=scores,
        prompt=32,
        enough=2,
        pruning="paper",
        score_every=16,
    )
    open_when = []

    def watch(step):
        if dry.preempted and not open_when:
            open_when.append(dict(dry.ends))

    dry.run(watch)
    assert dry.preempted
    assert open_when == [{}]
    assert all(len(dry.ends[f"{i}_a"]) == 1 for i in range(4))
    assert dry.count("a") == {Fate.FINISHED: 2, Fate.PRUNED: 1, Fate.STOPPED: 1}
    assert dry.fates("a")[weak] is Fate.PRUNED
    assert all(dry.tokens[i] == notes[0].tokens for i, notes in dry.ends.items())
    assert dry.free_blocks == before


@pytest.mark.parametrize("ahead", [True, False])
def test_a_branch_that_waits_preempted_ends_with_its_group(bed, ahead):
    dry = bed(
        branches={"relieve": False},
        blocks=41,
        prefix_caching=False,
        async_scheduling=ahead,
    )
    before = dry.free_blocks
    dry.ask("a", [135, 135, 180, 180], prompt=32, enough=2, pruning="off")
    preempted = set()

    def watch(step):
        preempted.clear()
        requests = dry.scheduler.requests.values()
        preempted.update(r.request_id for r in requests if r.status is RequestStatus.PREEMPTED)

    dry.run(watch)
    assert preempted
    assert dry.count("a") == {Fate.FINISHED: 2, Fate.STOPPED: 2}
    for name in preempted:
        (note,) = dry.ends[name]
        assert note.fate is Fate.STOPPED
        assert 120 < note.tokens == dry.tokens[name] < 135
    assert dry.free_blocks == before
