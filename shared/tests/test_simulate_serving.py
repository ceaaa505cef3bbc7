"""The event-skipping simulator against its obvious twin, and what can be worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.cost.step import EngineLimits, EngineProfile, StepCost
from trimtab.core.errors import BadInput
from trimtab.core.policy import Call, Load, Outcome, ServingPolicy
from trimtab.core.simulate import KvLink, ReplicaSpec, naive, simulate
from trimtab.core.simulate.dispatch import DISPATCHERS, RoundRobin, dispatcher
from trimtab.core.workload import Request

TICK_S = 1 / 1024
"""All times are multiples of powers of two, so that sums are exact and ties are real ties."""


def profile(**changes: object) -> EngineProfile:
    limits = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "max_model_len": 256,
        "block_size": 4,
        "kv_blocks": 64,
    }
    step = {"base_s": 8 * TICK_S}
    for name, value in changes.items():
        (limits if name in EngineLimits.model_fields else step)[name] = value
    return EngineProfile(
        model="m", device="d", engine="e", limits=EngineLimits(**limits), step=StepCost(**step)
    )


ticks = st.integers(0, 6).map(lambda n: n * TICK_S / 64)


@st.composite
def profiles(draw: st.DrawFn) -> EngineProfile:
    return profile(
        max_num_seqs=draw(st.integers(1, 5)),
        max_num_batched_tokens=draw(st.sampled_from([5, 8, 16, 64])),
        kv_blocks=draw(st.sampled_from([16, 20, 30, 100])),
        block_size=draw(st.sampled_from([4, 8])),
        prefix_caching=draw(st.booleans()),
        base_s=draw(st.integers(1, 4)) * TICK_S,
        decode_s=draw(ticks),
        kv_token_s=draw(ticks),
        prefill_s=draw(ticks),
        prefill_token_s=draw(ticks),
        prefill_pair_s=draw(ticks) / 64,
    )


@st.composite
def workloads(draw: st.DrawFn) -> list[Request]:
    requests: list[Request] = []
    for number in range(draw(st.integers(1, 14))):
        prompt = draw(st.integers(1, 40))
        branches = draw(st.lists(st.integers(1, 24), max_size=4))
        depends: tuple[str, ...] = ()
        if requests and draw(st.booleans()):
            chosen = draw(st.sets(st.integers(0, number - 1), min_size=1, max_size=2))
            depends = tuple(str(i) for i in sorted(chosen))
        requests.append(
            Request(
                request_id=str(number),
                arrival_s=draw(st.integers(0, 200)) * TICK_S,
                prompt_tokens=prompt,
                output_tokens=max(branches, default=0) or draw(st.integers(1, 24)),
                branch_tokens=tuple(branches),
                workflow=draw(st.sampled_from([None, "a", "b"])),
                deadline_s=draw(st.sampled_from([None, 0.5])),
                depends_on=depends,
                gap_s=draw(st.sampled_from([0.0, 3 * TICK_S])),
                prefix=None if branches else draw(st.sampled_from([None, "p", "q"])),
                prefix_tokens=draw(st.integers(0, prompt)),
            )
        )
    return requests


class LongestFirst(ServingPolicy):
    """Orders by prompt length and time; an admission changes its mind about those that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[Call, None] = {}
        self.sign = -1

    def on_arrival(self, call: Call, now_s: float) -> None:
        self.waiting[call] = None

    def key(self, call: Call, now_s: float) -> float:
        return self.sign * call.prompt_tokens * (1 + int(now_s / TICK_S) % 3)

    def on_admission(self, call: Call, now_s: float) -> None:
        self.waiting.pop(call, None)
        self.sign = -self.sign
        self.stale.update(self.waiting)

    def on_finish(self, call: Call, outcome: Outcome, now_s: float) -> None:
        self.waiting.pop(call, None)


class Timed(ServingPolicy):
    """Reverses its order every so often."""

    def __init__(self) -> None:
        super().__init__()
        self.due_s = 16 * TICK_S
        self.waiting: dict[Call, None] = {}
        self.sign = 1.0

    def on_arrival(self, call: Call, now_s: float) -> None:
        self.waiting[call] = None

    def on_admission(self, call: Call, now_s: float) -> None:
        self.waiting.pop(call, None)

    def on_finish(self, call: Call, outcome: Outcome, now_s: float) -> None:
        self.waiting.pop(call, None)

    def key(self, call: Call, now_s: float) -> tuple[float, float]:
        return (self.sign * float(call.request_id), now_s)

    def next_timer_s(self) -> float:
        return self.due_s

    def on_timer(self, now_s: float) -> None:
        while self.due_s <= now_s:
            self.due_s += 16 * TICK_S
        self.sign = -self.sign
        self.stale.update(self.waiting)


class Gate(ServingPolicy):
    """Lets long prompts in only at times, and when few run."""

    def admits(self, call: Call, load: Load, now_s: float) -> bool:
        often = int(now_s / TICK_S) % 32 < 16
        return call.prompt_tokens < 20 or (often and load.running < 3)


class Ender(ServingPolicy):
    """Ends calls after ten tokens."""

    def on_step(self, progressed: Collection[Call], now_s: float) -> Collection[Call]:
        return [call for call in progressed if call.output_tokens >= 10]


class Doomed(ServingPolicy):
    """Ends branches at multiples of seven tokens and stops a request's others with its second end.

    It says itself when it must be asked next, and gives up the last branch of the fullest request
    when the cache is full.
    """

    def __init__(self) -> None:
        super().__init__()
        self.groups: dict[str, dict[int, Call]] = {}
        self.ended: dict[str, int] = {}
        self.judged: dict[Call, int] = {}

    def on_arrival(self, call: Call, now_s: float) -> None:
        self.groups.setdefault(call.request_id, {})[call.branch] = call

    def on_finish(self, call: Call, outcome: Outcome, now_s: float) -> None:
        del self.groups[call.request_id][call.branch]
        self.ended[call.request_id] = self.ended.get(call.request_id, 0) + 1

    def on_step(self, progressed: Collection[Call], now_s: float) -> Collection[Call]:
        doomed = []
        for call in progressed:
            due = call.output_tokens // 7
            if due > self.judged.get(call, 0):
                self.judged[call] = due
                if (call.branch + due) % 3 == 0:
                    doomed.append(call)
        for name, group in self.groups.items():
            if self.ended.get(name, 0) >= 2:
                doomed += group.values()
        return doomed

    def quiet_steps(self) -> int:
        if any(group and self.ended.get(name, 0) >= 2 for name, group in self.groups.items()):
            return 1
        calls = [call for group in self.groups.values() for call in group.values()]
        return min((7 - call.output_tokens % 7 for call in calls), default=1)

    def relieve(self, now_s: float) -> Call | None:
        fullest = max(self.groups.values(), key=len, default={})
        return fullest[max(fullest)] if len(fullest) > 1 else None


POLICIES: list[Sequence[type[ServingPolicy]]] = [
    (),
    (LongestFirst,),
    (Timed,),
    (Gate,),
    (Ender,),
    (LongestFirst, Timed, Gate, Ender),
    (Doomed,),
    (Doomed, LongestFirst, Timed, Gate),
]


def maker(classes: Sequence[type[ServingPolicy]]) -> Callable[[], list[ServingPolicy]]:
    return lambda: [policy() for policy in classes]


def check_twins(
    requests: Sequence[Request],
    replicas: Sequence[ReplicaSpec],
    classes: Sequence[type[ServingPolicy]],
    link: KvLink | None,
) -> None:
    expected = naive.simulate(requests, replicas, policies=maker(classes), kv_link=link)
    result = simulate(
        requests, replicas, dispatcher=RoundRobin(), policies=maker(classes), kv_link=link
    )
    # Of calls that finish in one step, which is named first says nothing.
    calls = sorted(result.calls, key=lambda c: (c.finished_s, c.request_id, c.branch))
    sequences = sorted(expected, key=lambda s: (s.finished_s, s.request.request_id, s.branch))
    for call, sequence in zip(calls, sequences, strict=True):
        assert (call.request_id, call.branch) == (sequence.request.request_id, sequence.branch)
        assert call.issued_s == sequence.issued_s
        assert call.first_token_s == sequence.first_s
        assert call.finished_s == sequence.finished_s
        assert call.preemptions == sequence.preemptions
        assert call.output_tokens == sequence.generated
        assert call.outcome == sequence.outcome


@settings(max_examples=300, deadline=None)
@given(profiles(), st.integers(1, 3), workloads(), st.sampled_from(POLICIES))
def test_jumping_equals_stepping(
    engine: EngineProfile,
    count: int,
    requests: list[Request],
    classes: Sequence[type[ServingPolicy]],
) -> None:
    check_twins(requests, [ReplicaSpec(engine)] * count, classes, None)


@settings(max_examples=200, deadline=None)
@given(
    profiles(),
    profiles(),
    st.integers(1, 2),
    st.integers(1, 2),
    workloads(),
    st.sampled_from(POLICIES[:4]),
    st.integers(0, 40).map(lambda n: n * TICK_S),
)
def test_jumping_equals_stepping_with_prefill_and_decode_apart(
    prefill: EngineProfile,
    decode: EngineProfile,
    prefills: int,
    decodes: int,
    requests: list[Request],
    classes: Sequence[type[ServingPolicy]],
    latency_s: float,
) -> None:
    replicas = [ReplicaSpec(prefill, "prefill")] * prefills
    replicas += [ReplicaSpec(decode, "decode")] * decodes
    check_twins(requests, replicas, classes, KvLink(2.0**20, 2.0**9, latency_s))


def request(name: str, prompt: int = 8, output: int = 3, **fields: object) -> Request:
    return Request(name, fields.pop("arrival_s", 0.0), prompt, output, **fields)


def spec(**changes: object) -> ReplicaSpec:
    return ReplicaSpec(profile(**changes))


def test_one_request_takes_its_steps() -> None:
    engine = spec(base_s=1.0, decode_s=0.5, kv_token_s=0.25, prefill_s=2.0, prefill_token_s=0.125)
    result = simulate([request("a", prompt=8, output=3)], [engine])
    (call,) = result.calls
    assert call.first_token_s == 1.0 + 2.0 + 8 * 0.125
    decode_s = (1.0 + 0.5 + 9 * 0.25) + (1.0 + 0.5 + 10 * 0.25)
    assert call.finished_s == call.first_token_s + decode_s
    assert result.replicas[0].busy_s == call.finished_s
    assert result.output_tokens_per_s == 3 / call.finished_s


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks() -> None:
    engine = spec(base_s=1.0, prefill_token_s=0.5, max_num_batched_tokens=16)
    (call,) = simulate([request("a", prompt=40, output=1)], [engine]).calls
    assert call.finished_s == 3 * 1.0 + 40 * 0.5


def test_a_request_that_cannot_be_seated_waits_for_a_seat() -> None:
    engine = spec(base_s=1.0, max_num_seqs=1)
    result = simulate([request("a"), request("b", arrival_s=0.5)], [engine])
    a, b = result.calls
    assert (a.finished_s, b.admitted_s, b.finished_s) == (3.0, 3.0, 6.0)


def test_the_last_admitted_is_preempted_when_the_cache_overflows() -> None:
    engine = spec(base_s=1.0, kv_blocks=8, block_size=4, prefix_caching=False)
    result = simulate([request("a", 12, 16), request("b", 12, 16)], [engine])
    assert [(c.request_id, c.preemptions) for c in result.calls] == [("a", 0), ("b", 1)]
    assert result.replicas[0].peak_kv_usage == 1.0


def test_a_shared_prefix_is_computed_once() -> None:
    engine = spec(base_s=1.0, prefill_token_s=1.0, max_num_batched_tokens=64)
    shared = {"prefix": "system", "prefix_tokens": 16}
    requests = [request("a", 20, 1, **shared), request("b", 20, 1, arrival_s=50.0, **shared)]
    a, b = simulate(requests, [engine]).calls
    assert (a.cached_tokens, b.cached_tokens) == (0, 16)
    assert a.latency_s == 1.0 + 20
    assert b.latency_s == 1.0 + 4


def test_branches_share_their_prompt_and_end_the_request_together() -> None:
    engine = spec(base_s=1.0, prefill_token_s=1.0, max_num_batched_tokens=64)
    asked = request("a", 20, 5, branch_tokens=(2, 5, 3))
    after = request("b", 4, 1, depends_on=("a",))
    result = simulate([asked, after], [engine])
    branches = {call.branch: call for call in result.calls if call.request_id == "a"}
    # The first step computes the prompt, and each sibling's last block, which cannot be shared.
    first_s = 1.0 + 20 + 4 + 4
    assert [branches[b].cached_tokens for b in range(3)] == [0, 16, 16]
    assert [branches[b].finished_s for b in range(3)] == [first_s + 1, first_s + 4, first_s + 2]
    assert result.workflows[0].latency_s == first_s + 4
    assert result.calls[-1].issued_s == first_s + 4
    assert result.calls[-1].request_id == "b"


def test_held_blocks_are_summed_over_time() -> None:
    engine = spec(base_s=1.0, block_size=4, max_num_batched_tokens=32)
    (replica,) = simulate([request("a", 8, 9)], [engine]).replicas
    # Two blocks for the prompt; the third from the first decode step on, the fourth from the fifth:
    # the jump over these eight steps counts the mean of its ends.
    assert replica.kv_block_s == 1 * 2 + 8 * (3 + 4) / 2


def test_kv_travels_over_the_link_one_job_at_a_time() -> None:
    replicas = [
        ReplicaSpec(profile(base_s=1.0), "prefill"),
        ReplicaSpec(profile(base_s=1.0), "decode"),
    ]
    link = KvLink(bandwidth_bytes_per_s=4.0, kv_bytes_per_token=1.0, latency_s=0.5)
    result = simulate([request("a", 8, 2), request("b", 8, 2)], replicas, kv_link=link)
    a, b = result.calls
    assert a.first_token_s == b.first_token_s == 1.0
    assert a.finished_s == 1.0 + 8 / 4 + 0.5 + 1.0
    assert b.finished_s == 1.0 + 16 / 4 + 0.5 + 1.0
    assert {a.replica, b.replica} == {1}


def test_workflows_follow_their_stages() -> None:
    requests = [
        request("plan", output=1, workflow="w", stage="plan", deadline_s=10.0),
        request("x", output=2, workflow="w", depends_on=("plan",)),
        request("y", output=4, workflow="w", depends_on=("plan",)),
        request("join", output=1, workflow="w", depends_on=("x", "y"), gap_s=3.0),
    ]
    result = simulate(requests, [spec(base_s=1.0)])
    (workflow,) = result.workflows
    assert workflow.latency_s == 1 + 4 + 3 + 1
    assert workflow.met
    assert not simulate(requests, [spec(base_s=2.0)]).workflows[0].met


def test_requests_go_to_the_replicas_of_their_model() -> None:
    small = profile().model_copy(update={"model": "small"})
    large = profile().model_copy(update={"model": "large"})
    requests = [request(str(n), model="large" if n % 2 else "small") for n in range(6)]
    result = simulate(requests, [ReplicaSpec(large), ReplicaSpec(small)])
    assert all(int(c.request_id) % 2 == 1 - c.replica for c in result.calls)


@given(workloads())
@settings(max_examples=25, deadline=None)
def test_the_log_is_the_same_byte_for_byte(requests: list[Request]) -> None:
    def log() -> str:
        return simulate(
            requests, [spec(max_num_seqs=2)] * 3, policies=lambda: [LongestFirst(), Ender()]
        ).log()

    assert log() == log()


@pytest.mark.parametrize("name", DISPATCHERS)
def test_every_dispatcher_serves_everything(name: str) -> None:
    requests = [request(str(n), prompt=4 + n, arrival_s=n / 8) for n in range(40)]
    result = simulate(requests, [spec(base_s=1.0)] * 3, dispatcher=dispatcher(name))
    assert len(result.calls) == 40
    assert {call.replica for call in result.calls} == {0, 1, 2}


def test_the_trace_shows_each_call_from_issue_to_end() -> None:
    result = simulate([request("a"), request("b")], [spec(base_s=1.0, max_num_seqs=1)])
    trace = json.loads(json.dumps(result.chrome_trace()))["traceEvents"]
    spans = [e for e in trace if e["args"]["request"] == "b"]
    assert [e["name"] for e in spans] == ["waits", "prefill", "decode"]
    assert spans[0]["ts"] == 0.0
    assert sum(e["dur"] for e in spans) == result.calls[1].finished_s * 1e6


@pytest.mark.parametrize(
    ("requests", "replicas", "fault"),
    [
        ([request("a"), request("a")], [spec()], "given twice"),
        ([request("a", depends_on=("b",))], [spec()], "names 'b', which is no request"),
        (
            [request("a", depends_on=("b",)), request("b", depends_on=("a",))],
            [spec()],
            "in a circle",
        ),
        ([request("a", prompt=250, output=100)], [spec()], "350 tokens"),
        ([request("a", output=0)], [spec()], "output_tokens is 0"),
        ([request("a")], [], "no replica"),
        ([request("a")], [ReplicaSpec(profile(), "prefill")], "no decode replica"),
        (
            [request("a")],
            [ReplicaSpec(profile(), "prefill"), ReplicaSpec(profile(), "decode")],
            "no link",
        ),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    requests: list[Request], replicas: list[ReplicaSpec], fault: str
) -> None:
    with pytest.raises(BadInput, match=fault):
        simulate(requests, replicas)


def test_an_unknown_dispatcher_is_refused() -> None:
    with pytest.raises(BadInput, match="'round-robin'"):
        dispatcher("round_robin")
