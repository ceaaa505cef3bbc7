"""Branches beside what else vLLM's scheduler does: adapters, grammars, sessions, pauses."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future

import numpy as np
import pytest
from vllm.config import LoRAConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output.request import StructuredOutputRequest

from trimtab.branches.note import Fate

pytestmark = pytest.mark.integration


def test_each_of_several_api_servers_gets_the_ends_of_its_own_branches(bed):
    dry = bed(max_num_seqs=8)

    def of_client(client):
        return lambda request: setattr(request, "client_index", client)

    scores = [[0.9], [0.1], [0.9], [0.9], [0.9]]
    for client, name in enumerate("ab"):
        dry.ask(
            name,
            [20, 60, 30, 80, 90],
            scores=scores,
            change=of_client(client),
            enough=2,
            pruning="paper",
            score_every=10,
        )
    dry.run()
    for client, name in enumerate("ab"):
        assert {Fate.PRUNED, Fate.FINISHED} <= set(dry.fates(name).values())
        assert {Fate.STOPPED, Fate.WITHHELD} & set(dry.fates(name).values())
        ids = [f"{i}_{name}" for i in range(5)]
        assert [dry.told[i] for i in ids] == [{client}] * 5
        assert [len(dry.ends[i]) for i in ids] == [1] * 5


@pytest.mark.parametrize("most", [1, 2])
def test_groups_with_adapters_beside_groups_without(bed, most):
    dry = bed(max_num_seqs=6)
    dry.scheduler.lora_config = LoRAConfig(max_loras=most, max_lora_rank=8)
    before = dry.free_blocks

    def adapted(number):
        def change(request):
            request.lora_request = LoRARequest(f"adapter{number}", number, "/nowhere")
            request.block_hashes = []
            request.update_block_hashes()

        return change

    changes = {"a": adapted(1), "b": adapted(2), "c": adapted(1), "d": None, "e": None}
    for name, change in changes.items():
        lengths = [20, 30, 40, 50]
        dry.ask(name, lengths, token=5, change=change, enough=2, pruning="off")
    used = set()

    def watch(step):
        running = dry.scheduler.running
        adapters = {r.lora_request.lora_int_id for r in running if r.lora_request}
        assert len(adapters) <= most
        used.update(adapters)
        blocks = {0: set(), 1: set(), 2: set()}
        for request in running:
            adapter = request.lora_request.lora_int_id if request.lora_request else 0
            blocks[adapter].update(dry.held(request.request_id))
        assert len(set.union(*blocks.values())) == sum(map(len, blocks.values()))

    dry.run(watch)
    assert used == {1, 2}
    for name in changes:
        assert [len(dry.ends[f"{i}_{name}"]) for i in range(4)] == [1] * 4
        assert set(dry.fates(name)) == {0, 1, 2, 3}
        assert dry.finished(name)
    assert dry.free_blocks == before


def own_logprob(name):
    return -0.5 - int(name[0])


def rows(names):
    """The sampled token's logprob tells the branch."""
    return np.array([[own_logprob(name)] + [-1.0] * 20 for name in names], dtype=np.float32)


class Grammar:
    """One that takes every token, or so many."""

    def __init__(self, takes=10_000):
        self.taken = []
        self.takes = takes

    def accept_tokens(self, request_id, tokens):
        self.taken += tokens
        return len(self.taken) <= self.takes


def under(grammar):
    """Puts a request under a grammar that is compiled, or a future one."""

    def change(request):
        params = StructuredOutputsParams(regex="7*")
        request.structured_output_request = StructuredOutputRequest(params)
        request.structured_output_request.grammar = grammar
        request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR

    return change


@pytest.mark.parametrize("ahead", [True, False])
def test_a_client_keeps_its_logprobs_and_its_grammar_beside_the_plugins_own(bed, ahead):
    dry = bed(
        branches={"signals": {"confidence": 1.0}, "bend": False},
        logprobs=rows,
        async_scheduling=ahead,
    )
    compiled = {f"{i}_asks": Future() for i in range(3)}

    def change(request):
        request.sampling_params.logprobs = 2
        under(compiled[request.request_id])(request)

    dry.ask("asks", [20, 30, 60], change=change, enough=2, pruning="off", score_every=8)
    dry.ask("silent", [20, 30, 60], enough=2, pruning="off", score_every=8)
    alone = dry.add("7_plain", [9] * 20, 12, ends_after=10)
    alone.sampling_params.logprobs = 3
    to_worker = {}
    while dry.scheduler.get_num_unfinished_requests():
        if 2 <= dry.steps < 5:
            compiled[f"{dry.steps - 2}_asks"].set_result(Grammar())
        scheduled, _ = dry.step()
        for new in scheduled.scheduled_new_reqs:
            to_worker[new.req_id] = new.sampling_params.logprobs
        known = [dry.scheduler.requests.get(name) for name in compiled]
        assert {r.sampling_params.logprobs for r in known if r is not None} <= {2}
    dry.drain()
    branches = [f"{i}_{name}" for name in ("asks", "silent") for i in range(3)]
    assert to_worker == {**dict.fromkeys(branches, 20), "7_plain": 3}
    for i in range(3):
        got = np.concatenate([one.logprobs for one in dry.logprobs[f"{i}_asks"]])
        assert len(got) == dry.tokens[f"{i}_asks"]
        assert (got[:, 0] == own_logprob(f"{i}_asks")).all()
    assert set(dry.logprobs) == {*compiled, "7_plain"}
    for name in ("asks", "silent"):
        assert dry.finished(name) == {0, 1}
        assert dry.fates(name)[2] is Fate.STOPPED
    # A grammar has seen each token of its branch; the plugin's score is of the 20 largest.
    for name, future in compiled.items():
        assert len(future.result().taken) == dry.tokens[name]
        assert dry.ends[name][0].score == pytest.approx(0.095, abs=0.001)


def test_a_branch_whose_grammar_does_not_compile_leaves_the_others_alone(bed):
    dry = bed(branches={"bend": False})
    before = dry.free_blocks
    broken = Future()
    broken.set_exception(ValueError("no grammar"))

    def change(request):
        under(broken if request.request_id == "1_a" else Grammar())(request)

    dry.ask("a", [20, 20, 30, 60], change=change, enough=2, pruning="off")
    dry.run()
    assert [len(dry.ends[f"{i}_a"]) for i in range(4)] == [1] * 4
    assert dry.reasons["1_a"] == ["error"]
    assert dry.fates("a") == {0: Fate.FINISHED, 2: Fate.FINISHED, 3: Fate.STOPPED}
    assert dry.free_blocks == before


def resumable(request):
    """Makes a streaming session of a request."""
    request.resumable = True
    request.streaming_queue = deque()


def test_the_turns_of_a_session_end_nothing_beside_it(bed):
    dry = bed()
    before = dry.free_blocks
    resumable(dry.add("session", [9] * 20, 50, ends_after=10))
    dry.ask("a", [20, 30, 60], enough=2, pruning="off")
    dry.run()
    assert dry.fates("a") == {0: Fate.FINISHED, 1: Fate.FINISHED, 2: Fate.STOPPED}
    assert dry.ends["session"] == [None]
    dry.scheduler.finish_requests("session", RequestStatus.FINISHED_ABORTED)
    assert dry.free_blocks == before


def test_a_branch_whose_session_waits_for_input_ends_with_its_group(bed):
    dry = bed()
    before = dry.free_blocks

    def change(request):
        if request.request_id == "0_a":
            resumable(request)

    dry.ask("a", [10, 30, 60], change=change, enough=1, pruning="off")
    dry.run()
    turn, end = dry.ends["0_a"]
    assert turn is None
    assert (end.fate, end.tokens) == (Fate.STOPPED, 10)
    assert dry.finished("a") == {1}
    assert dry.scheduler.num_waiting_for_streaming_input == 0
    assert not dry.scheduler.requests
    assert dry.free_blocks == before


@pytest.mark.parametrize("ahead", [True, False])
def test_a_reset_of_the_prefix_cache_changes_no_fate(bed, ahead):
    outcomes = []
    for reset in (False, True):
        dry = bed(async_scheduling=ahead)
        scores = [[0.9], [0.9, 0.9, 0.1], [0.9], [0.9]]
        lengths = [40, 90, 50, 90]
        dry.ask("a", lengths, scores=scores, enough=2, pruning="paper", score_every=10)
        for _ in range(20):
            dry.step()
        if reset:
            assert dry.scheduler.reset_prefix_cache(reset_running_requests=True)
            assert not dry.running
        dry.run()
        assert [len(dry.ends[f"{i}_a"]) for i in range(4)] == [1] * 4
        outcomes.append((dry.fates("a"), dry.tokens, dry.free_blocks))
    assert outcomes[0] == outcomes[1]
    assert set(outcomes[0][0].values()) == {Fate.FINISHED, Fate.PRUNED, Fate.STOPPED}


def test_branches_that_wait_while_new_ones_are_held_back_end_with_their_group(bed):
    dry = bed(branches={"bend": False}, max_num_seqs=2)
    before = dry.free_blocks
    dry.ask("a", [20, 30, 40, 50], enough=2, pruning="off")
    for _ in range(5):
        dry.step()
    dry.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    dry.run()
    assert dry.count("a") == {Fate.FINISHED: 2, Fate.WITHHELD: 2}
    dry.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert not dry.scheduler.has_unfinished_requests()
    assert dry.free_blocks == before


@pytest.mark.parametrize("ahead", [True, False])
def test_a_pause_changes_no_fate(bed, ahead):
    outcomes = []
    for pauses in (False, True):
        # Outputs of 128 fill the 40 blocks: it pauses where memory is short.
        dry = bed(blocks=41, prefix_caching=False, async_scheduling=ahead)
        scores = [[0.9], [0.8], [0.2], [0.7]]
        lengths = [150, 151, 152, 153]
        dry.ask("a", lengths, scores=scores, prompt=32, enough=3, pruning="pressure", score_every=9)
        for _ in range(129):
            dry.step()
        if pauses:
            dry.scheduler.set_pause_state(PauseState.PAUSED_ALL)
            for _ in range(5):
                scheduled, _ = dry.step()
                assert not scheduled.num_scheduled_tokens
            dry.scheduler.set_pause_state(PauseState.UNPAUSED)
        dry.run()
        outcomes.append((dry.fates("a"), dry.tokens, dry.free_blocks))
    assert outcomes[0] == outcomes[1]
    assert Fate.EVICTED in outcomes[0][0].values()


def test_by_priority_the_pressing_request_gets_all_its_branches_first(bed):
    dry = bed(policy="priority", max_num_seqs=4)
    before = dry.free_blocks
    dry.ask("first", [20, 30, 40, 50], enough=4, pruning="off", priority=1)
    dry.step()
    dry.ask("low", [20, 30, 40, 50], enough=4, pruning="off", priority=5)
    dry.ask("high", [20, 30, 40, 50], enough=4, pruning="off", priority=0)
    admitted = {}

    def watch(step):
        for name in dry.running:
            admitted.setdefault(name, step)

    dry.run(watch)
    assert max(admitted[f"{i}_high"] for i in range(4)) < min(
        admitted[f"{i}_low"] for i in range(4)
    )
    for name in ("first", "low", "high"):
        assert dry.finished(name) == {0, 1, 2, 3}
    assert dry.free_blocks == before


@pytest.mark.parametrize("ahead", [True, False])
def test_by_priority_a_branch_that_gave_its_memory_up_still_ends_once(bed, ahead):
    dry = bed(
        branches={"relieve": False},
        policy="priority",
        blocks=41,
        prefix_caching=False,
        async_scheduling=ahead,
    )
    before = dry.free_blocks
    dry.ask("low", [90] * 4, prompt=32, enough=2, pruning="off", priority=5)
    for _ in range(10):
        dry.step()
    dry.ask("high", [140] * 4, prompt=32, enough=3, pruning="off", priority=0)
    dry.run()
    assert dry.preempted
    assert all(name.endswith("_low") for name in dry.preempted[:1])
    for name in ("low", "high"):
        assert [len(dry.ends[f"{i}_{name}"]) for i in range(4)] == [1] * 4
        assert dry.finished(name)
    assert dry.free_blocks == before


def test_a_due_workflow_passes_the_questions_that_a_silent_one_waits_for(bed):
    answered_before = {}
    for says_deadline in (False, True):
        dry = bed(plugins={"urgency": {}}, max_num_seqs=6)
        questions = [f"q{number}" for number in range(4)]
        for name in questions:
            dry.ask(name, [40, 50, 60, 70, 80, 90], enough=2, pruning="off")
        dry.step()
        said = {"trimtab.workflow": "w", **({"trimtab.deadline_s": 15.0} if says_deadline else {})}
        dry.add("call", [9] * 20, 8, xargs=said)
        dry.run()
        ended = {name: max(dry.ended_at[f"{i}_{name}"] for i in range(6)) for name in questions}
        answered = [name for name in questions if ended[name] < dry.ended_at["call"]]
        answered_before[says_deadline] = len(answered)
        for name in questions:
            assert sum(dry.count(name).values()) == 6
            assert dry.count(name)[Fate.FINISHED] < 6
    assert answered_before[True] < answered_before[False]


def test_a_branch_that_the_engine_ends_with_an_error_is_no_answer(bed):
    dry = bed()

    def change(request):
        under(Grammar(5 if request.request_id == "0_a" else 10_000))(request)

    dry.ask("a", [90, 20, 30, 60], change=change, enough=2, pruning="off")
    dry.run()
    assert dry.reasons["0_a"] == ["error"]
    assert dry.finished("a") == {1, 2}
    assert dry.fates("a")[3] is Fate.STOPPED


def test_a_branch_that_failed_before_it_ran_does_not_count_as_one_that_waits(bed):
    dry = bed()
    broken = Future()
    broken.set_exception(ValueError("no grammar"))

    def change(request):
        under(broken if request.request_id == "1_a" else Grammar())(request)

    dry.ask("a", [20, 20, 30, 60], change=change, enough=2, pruning="off")
    dry.run()
    assert dry.finished("a") == {0, 2}
