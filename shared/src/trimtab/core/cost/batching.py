"""Continuous batching in closed form: latencies and capacity of a replica in its steady state.

Every request of a batch of ``b`` sees the prompts of the other ``b - 1`` computed while it makes
its ``O`` tokens: ``TPOT = t_dec(b, I + O/2) + (b - 1)/O · (t_pre(I) - t_dec(1)/2)``. The
subtraction is what a prompt saves by sharing its step with the batch. TTFT in closed form is rough:
take its percentiles from the simulator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from trimtab.core.cost.step import StepBatch
from trimtab.core.errors import BadInput, Infeasible


class StepTime(Protocol):
    """Whatever knows how long a step takes: a `Roofline`, or a measured `StepCost`."""

    def seconds(self, batch: StepBatch) -> float:
        """How long a step with this batch takes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Mean lengths of a class of requests."""

    prompt_tokens: float
    output_tokens: float

    def __post_init__(self) -> None:
        if not (self.prompt_tokens >= 1 and self.output_tokens >= 1):
            raise BadInput(
                f"requests have {self.prompt_tokens} prompt and {self.output_tokens} output tokens",
                fix="give at least 1 of each",
            )


@dataclass(frozen=True, slots=True)
class SteadyState:
    """A replica that always has the same number of requests.

    Attributes:
        batch: requests in the batch.
        tpot_s: mean time between a request's tokens.
        ttft_s: mean time to its first token, with the wait for a place in the batch.
        requests_per_s: throughput.
        limited_by_cache: whether the cache holds the batch below the concurrency.
    """

    batch: int
    tpot_s: float
    ttft_s: float
    requests_per_s: float
    limited_by_cache: bool


def prefill_s(engine: StepTime, prompt_tokens: float, max_step_tokens: int = 8192) -> float:
    """Time to compute a prompt alone, in chunks of at most so many tokens."""
    seconds, context, left = 0.0, 0, max(1, round(prompt_tokens))
    while left:
        chunk = min(left, max_step_tokens)
        pairs = chunk * (context + chunk / 2)
        seconds += engine.seconds(StepBatch(prefills=1, prefill_tokens=chunk, prefill_pairs=pairs))
        context, left = context + chunk, left - chunk
    return seconds


def decode_s(engine: StepTime, batch: int, context_tokens: float) -> float:
    """Time of a step in which each of ``batch`` requests gets one token."""
    return engine.seconds(StepBatch(decodes=batch, kv_tokens=round(batch * context_tokens)))


def largest_batch(shape: Shape, kv_capacity_tokens: float, max_num_seqs: int = 1024) -> int:
    """Requests that fit the cache at their full length, so that none is ever preempted.

    Raises:
        Infeasible: not even one fits.
    """
    length = shape.prompt_tokens + shape.output_tokens
    if kv_capacity_tokens < length:
        raise Infeasible(
            f"the cache holds {kv_capacity_tokens:.0f} tokens and a request has {length:.0f}",
            relaxation=f"make room for {length:.0f} tokens or shorten the requests",
        )
    return min(max_num_seqs, int(kv_capacity_tokens // length))


def steady_state(
    engine: StepTime,
    shape: Shape,
    concurrency: int,
    *,
    kv_capacity_tokens: float = float("inf"),
    max_num_seqs: int = 1024,
    max_step_tokens: int = 8192,
) -> SteadyState:
    """Latencies and throughput with a constant number of requests in the system.

    Args:
        engine: step times.
        shape: mean lengths.
        concurrency: requests in the system; those beyond the batch wait.
        kv_capacity_tokens: tokens that the cache holds.
        max_num_seqs: the engine's own limit of the batch.
        max_step_tokens: prompt tokens that one step may compute.

    Raises:
        Infeasible: the cache does not hold one request.
    """
    if concurrency < 1:
        raise BadInput(f"the concurrency is {concurrency}", fix="give at least 1")
    fits = max_num_seqs
    if kv_capacity_tokens != float("inf"):
        fits = largest_batch(shape, kv_capacity_tokens, max_num_seqs)
    batch = min(concurrency, fits)
    prompt_s = prefill_s(engine, shape.prompt_tokens, max_step_tokens)
    step_s = decode_s(engine, batch, shape.prompt_tokens + shape.output_tokens / 2)
    shared_s = max(0.0, prompt_s - decode_s(engine, 1, shape.prompt_tokens) / 2)
    # Pipeline stages compute different requests' prompts at once.
    shared_s /= getattr(engine, "pipeline_stages", 1)
    tpot_s = step_s + (batch - 1) / shape.output_tokens * shared_s
    first_s = prompt_s + _prompt_queue_s(batch, shape, prompt_s, tpot_s) + step_s / 2
    rate = batch / (first_s + (shape.output_tokens - 1) * tpot_s)
    waiting_s = (concurrency - batch) / rate
    return SteadyState(
        batch=batch,
        tpot_s=tpot_s,
        ttft_s=first_s + waiting_s,
        requests_per_s=rate,
        limited_by_cache=fits < min(concurrency, max_num_seqs),
    )


def _prompt_queue_s(batch: int, shape: Shape, prompt_s: float, tpot_s: float) -> float:
    """Mean wait behind other prompts: an M/D/1 queue, at most behind all of the batch."""
    if batch == 1:
        return 0.0
    busy = (batch - 1) * prompt_s / (batch * prompt_s + shape.output_tokens * tpot_s)
    return prompt_s * min(busy / (2 * (1 - busy)), (batch - 1) / 2)


def highest_rate(
    engine: StepTime,
    shape: Shape,
    *,
    kv_capacity_tokens: float,
    max_tpot_s: float = float("inf"),
    max_ttft_s: float = float("inf"),
    max_num_seqs: int = 1024,
) -> SteadyState:
    """The largest batch, and so the highest throughput, whose latencies stay within limits.

    Raises:
        Infeasible: a single request exceeds a limit or the cache.
    """

    def state(batch: int) -> SteadyState:
        return steady_state(engine, shape, batch, max_num_seqs=max_num_seqs)

    def good(batch: int) -> bool:
        reached = state(batch)
        return reached.tpot_s <= max_tpot_s and reached.ttft_s <= max_ttft_s

    if not good(1):
        alone = state(1)
        raise Infeasible(
            f"a request alone has a TPOT of {alone.tpot_s * 1e3:.3g} ms and a TTFT of"
            f" {alone.ttft_s * 1e3:.3g} ms",
            relaxation="allow as much, or take faster devices",
        )
    low, high = 1, largest_batch(shape, kv_capacity_tokens, max_num_seqs) + 1
    while high - low > 1:  # both latencies grow with the batch
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return state(low)
