"""Continuous batching in closed form, against a step-by-step twin and at its limits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.cost import (
    Shape,
    StepBatch,
    StepCost,
    highest_rate,
    largest_batch,
    prefill_s,
    steady_state,
)
from trimtab.core.errors import BadInput, Infeasible

ENGINE = StepCost(
    base_s=5e-3, decode_s=2e-5, kv_token_s=2e-8, prefill_token_s=4e-5, prefill_pair_s=1e-10
)


def stepped(engine: StepCost, prompt: int, output: int, batch: int, requests: int) -> float:
    """Mean TPOT of a closed loop of ``batch`` clients, one prompt at most in a step."""
    clock, waiting, finished = 0.0, batch, 0
    running: list[tuple[int, float]] = []  # tokens made, time of the first
    tpots: list[float] = []
    while finished < requests:
        take = min(waiting, 1)
        clock += engine.seconds(
            StepBatch(
                decodes=len(running),
                kv_tokens=sum(prompt + made for made, _ in running),
                prefills=take,
                prefill_tokens=take * prompt,
                prefill_pairs=take * prompt**2 / 2,
            )
        )
        running = [(made + 1, first) for made, first in running]
        tpots += [(clock - first) / (made - 1) for made, first in running if made == output]
        finished += sum(made == output for made, _ in running)
        waiting += sum(made == output for made, _ in running) - take
        running = [(made, first) for made, first in running if made < output]
        running += [(1, clock)] * take
    return sum(tpots[batch:]) / len(tpots[batch:])


@pytest.mark.parametrize(
    ("prompt", "output", "batch"), [(200, 100, 4), (1000, 200, 16), (50, 300, 32), (2000, 500, 8)]
)
def test_tpot_is_that_of_stepping_through(prompt: int, output: int, batch: int) -> None:
    closed = steady_state(ENGINE, Shape(prompt, output), batch).tpot_s
    assert closed == pytest.approx(stepped(ENGINE, prompt, output, batch, 12 * batch), rel=0.06)


shapes = st.builds(Shape, st.integers(1, 8000), st.integers(2, 4000))


@settings(max_examples=50)
@given(shape=shapes, concurrency=st.integers(1, 500))
def test_more_requests_are_slower_each_and_faster_together(shape: Shape, concurrency: int) -> None:
    fewer = steady_state(ENGINE, shape, concurrency)
    more = steady_state(ENGINE, shape, concurrency + 1)
    assert more.tpot_s >= fewer.tpot_s
    assert more.ttft_s >= fewer.ttft_s * (1 - 1e-9)
    assert more.requests_per_s >= fewer.requests_per_s * (1 - 1e-9)


@given(shape=shapes, concurrency=st.integers(1, 500), room=st.integers(0, 200_000))
def test_cache_limits_the_batch_and_littles_law_holds(
    shape: Shape, concurrency: int, room: int
) -> None:
    length = shape.prompt_tokens + shape.output_tokens
    if room < length:
        with pytest.raises(Infeasible, match="make room"):
            steady_state(ENGINE, shape, concurrency, kv_capacity_tokens=room)
        return
    state = steady_state(ENGINE, shape, concurrency, kv_capacity_tokens=room)
    assert state.batch * length <= room
    assert state.limited_by_cache == (state.batch < min(concurrency, 1024))
    in_system = state.requests_per_s * (state.ttft_s + (shape.output_tokens - 1) * state.tpot_s)
    assert in_system == pytest.approx(concurrency)


def test_prompts_beyond_a_step_are_chunked() -> None:
    whole = prefill_s(ENGINE, 8000)
    halves = prefill_s(ENGINE, 8000, max_step_tokens=4000)
    # Only the fixed time of one more step: the attention's pairs are the same.
    assert halves - whole == pytest.approx(ENGINE.base_s)


@settings(max_examples=25)
@given(shape=shapes, tpot_ms=st.floats(1, 100), room=st.integers(20_000, 400_000))
def test_highest_rate_is_the_best_of_all_batches(shape: Shape, tpot_ms: float, room: int) -> None:
    limit_s = tpot_ms / 1e3
    allowed = [
        state
        for batch in range(1, largest_batch(shape, room, 64) + 1)
        if (state := steady_state(ENGINE, shape, batch)).tpot_s <= limit_s
    ]
    if not allowed:
        with pytest.raises(Infeasible, match="TPOT"):
            highest_rate(
                ENGINE, shape, kv_capacity_tokens=room, max_tpot_s=limit_s, max_num_seqs=64
            )
        return
    best = highest_rate(ENGINE, shape, kv_capacity_tokens=room, max_tpot_s=limit_s, max_num_seqs=64)
    assert best.requests_per_s == pytest.approx(max(s.requests_per_s for s in allowed))
    assert best.tpot_s <= limit_s


def test_nonsense_is_refused() -> None:
    with pytest.raises(BadInput):
        Shape(0, 10)
    with pytest.raises(BadInput):
        steady_state(ENGINE, Shape(10, 10), 0)
