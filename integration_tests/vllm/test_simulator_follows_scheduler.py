"""The simulator's schedule against vLLM's real scheduler, step for step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.scheduler import Scheduler

from trimtab.core.cost.step import EngineLimits, EngineProfile, StepCost
from trimtab.core.simulate import ReplicaSpec, simulate
from trimtab.core.workload import Request
from trimtab.hosts.vllm.dry_engine import DryEngine

pytestmark = pytest.mark.integration

PREFIX_TOKENS = {"p": 32, "q": 80}


@st.composite
def workloads(draw: st.DrawFn, *, prefixes: bool) -> list[Request]:
    requests = []
    for number in range(draw(st.integers(1, 16))):
        prefix = draw(st.sampled_from([None, "p", "q"])) if prefixes else None
        shared = PREFIX_TOKENS.get(prefix or "", 0)
        requests.append(
            Request(
                request_id=str(number),
                arrival_s=float(draw(st.integers(0, 60))),
                prompt_tokens=shared + draw(st.integers(1, 120)),
                output_tokens=draw(st.integers(1, 80)),
                prefix=prefix,
                prefix_tokens=shared,
            )
        )
    return sorted(requests, key=lambda request: request.arrival_s)


def prompt(request: Request) -> list[int]:
    shared = random.Random(request.prefix).choices(range(10, 900), k=request.prefix_tokens)
    own = random.Random(f"own {request.request_id}")
    return shared + own.choices(range(10, 900), k=request.prompt_tokens - len(shared))


def real_ends(requests: Sequence[Request], limits: EngineLimits) -> dict[str, tuple[float, int]]:
    """When vLLM's scheduler ends each request, a second a step, and how often it preempts it."""
    engine = DryEngine(
        Scheduler,
        blocks=limits.kv_blocks + 1,  # one is vLLM's placeholder
        block_size=limits.block_size,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        prefix_caching=limits.prefix_caching,
    )
    waiting = list(requests)
    added = {}
    ends: dict[str, tuple[float, int]] = {}
    now_s = 0.0
    for _ in count():
        while waiting and waiting[0].arrival_s <= now_s:
            request = waiting.pop(0)
            added[request.request_id] = engine.add(
                request.request_id, prompt(request), request.output_tokens
            )
        if not waiting and len(ends) == len(requests):
            return ends
        scheduled, outputs = engine.step()
        idle = not engine.scheduler.requests and not scheduled.num_scheduled_tokens
        if scheduled.num_scheduled_tokens or idle:
            now_s += 1.0
        for client in outputs.values():
            for output in client.outputs:
                if output.finish_reason is not None:
                    name = output.request_id
                    ends[name] = (now_s, added[name].num_preemptions)
    raise AssertionError


def check(requests: Sequence[Request], limits: EngineLimits) -> None:
    profile = EngineProfile(
        model="m", device="d", engine="e", limits=limits, step=StepCost(base_s=1.0)
    )
    result = simulate(requests, [ReplicaSpec(profile)])
    simulated = {call.request_id: (call.finished_s, call.preemptions) for call in result.calls}
    assert simulated == real_ends(requests, limits)


def engine_limits(*kv_blocks: int, prefix_caching: bool) -> st.SearchStrategy[EngineLimits]:
    return st.builds(
        EngineLimits,
        max_num_seqs=st.integers(1, 8),
        max_num_batched_tokens=st.sampled_from([16, 64, 256]),
        max_model_len=st.just(32768),
        block_size=st.just(16),
        kv_blocks=st.sampled_from(kv_blocks),
        prefix_caching=st.just(prefix_caching),
    )


TIGHT = (18, 24, 40)
AMPLE = (160, 400)


@settings(max_examples=40, deadline=None)
@given(workloads(prefixes=False), engine_limits(*TIGHT, *AMPLE, prefix_caching=False))
def test_every_request_ends_in_the_same_step(requests: list[Request], limits: EngineLimits) -> None:
    check(requests, limits)


@settings(max_examples=40, deadline=None)
@given(workloads(prefixes=False), engine_limits(*TIGHT, prefix_caching=True))
def test_preempted_requests_find_what_is_left_of_their_kv(
    requests: list[Request], limits: EngineLimits
) -> None:
    check(requests, limits)


@settings(max_examples=40, deadline=None)
@given(workloads(prefixes=True), engine_limits(*AMPLE, prefix_caching=True))
def test_shared_prefixes_are_found(requests: list[Request], limits: EngineLimits) -> None:
    check(requests, limits)
