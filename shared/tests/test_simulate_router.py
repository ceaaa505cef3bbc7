from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.cost.step import EngineLimits, EngineProfile, StepCost
from trimtab.core.simulate import ReplicaSpec, naive, simulate
from trimtab.core.workload import Request

ENGINE = ReplicaSpec(
    EngineProfile(
        model="m",
        device="d",
        engine="e",
        limits=EngineLimits(
            max_num_seqs=2, max_num_batched_tokens=16, max_model_len=64, block_size=4, kv_blocks=24
        ),
        step=StepCost(base_s=1.0, prefill_token_s=0.125),
    )
)
CLUSTER = [ENGINE, ENGINE]

WORKLOADS = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 30), st.integers(1, 8), st.booleans()),
    min_size=1,
    max_size=10,
).map(
    lambda shapes: [
        Request(
            f"r{number}",
            float(arrival_s),
            prompt,
            output,
            depends_on=(f"r{number - 1}",) if follows and number else (),
        )
        for number, (arrival_s, prompt, output, follows) in enumerate(shapes)
    ]
)


class InTurn:
    """Sends at once, to each replica in turn."""

    def __init__(self) -> None:
        self.turn = -1

    def on_arrival(self, request, now_s):
        self.turn += 1
        return [(request, self.turn % len(CLUSTER))]

    def on_first_token(self, request, now_s):
        return ()

    def on_end(self, request, now_s):
        return ()


class OneByOne:
    """Lets one request at a time into each replica, and notes what it is told."""

    def __init__(self) -> None:
        self.held: list[Request] = []
        self.busy: dict[str, int] = {}
        self.told: list[tuple[str, str, float]] = []

    def on_arrival(self, request, now_s):
        self.held.append(request)
        return self.sends()

    def on_first_token(self, request, now_s):
        self.told.append(("first", request.request_id, now_s))
        return self.sends()

    def on_end(self, request, now_s):
        self.told.append(("end", request.request_id, now_s))
        del self.busy[request.request_id]
        return self.sends()

    def sends(self):
        free = sorted({0, 1} - set(self.busy.values()))
        sent = list(zip(self.held, free, strict=False))
        self.busy.update({request.request_id: number for request, number in sent})
        self.held = self.held[len(sent) :]
        return sent


@given(WORKLOADS)
@settings(deadline=None)
def test_router_that_holds_nothing_is_a_dispatcher(requests):
    routed = simulate(requests, CLUSTER, router=InTurn())
    assert routed.log() == simulate(requests, CLUSTER).log()
    ends = {g.request.request_id: g.finished_s for g in naive.simulate(requests, CLUSTER)}
    assert {c.request_id: c.finished_s for c in routed.calls} == ends


@given(WORKLOADS)
@settings(deadline=None)
def test_held_requests_wait_at_the_router_and_all_are_served(requests):
    router = OneByOne()
    result = simulate(requests, CLUSTER, router=router)
    assert {c.request_id for c in result.calls} == {r.request_id for r in requests}
    assert max(record.peak_running for record in result.replicas) == 1
    for call in result.calls:
        assert call.issued_s <= call.admitted_s
        assert ("end", call.request_id, call.finished_s) in router.told
        first = ("first", call.request_id, call.first_token_s)
        assert (first in router.told) is (call.output_tokens > 1)


def test_hold_counts_as_latency():
    requests = [Request("a", 0.0, 8, 4), Request("b", 0.0, 8, 4), Request("c", 0.0, 8, 4)]
    calls = {c.request_id: c for c in simulate(requests, CLUSTER, router=OneByOne()).calls}
    assert calls["c"].issued_s == 0.0
    assert calls["c"].admitted_s == calls["a"].finished_s
    assert calls["c"].latency_s == 2 * calls["a"].latency_s
