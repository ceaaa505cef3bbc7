"""What N and M come to at a load, in closed form.

A decode step lasts ``t0 + tb B + tk K`` for B branches that hold K tokens of KV. A request of token
bill W and KV area ``A' = A + prompt E[X_(M:N)]`` (see `order_statistics`) meets its own branches,
``W / E[X]`` and ``A' / E[X]`` on average, and those of others: ``rate W t`` and ``rate A' t`` by
Little's law, where ``rate`` requests come each second. So its steps last

    t = (t0 + (tb W + tk A') / E[X]) / (1 - rate (tb W + tk A' + prefill))

The wait for room is estimated as in a queue with many servers (Sakasegawa's formula).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from trimtab.branches.demand import Demand
from trimtab.branches.order_statistics import best_of_accuracy, group_cost


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a pair of N and M comes to, in closed form.

    Attributes:
        latency_s: mean latency; infinity where the engine does not keep up.
        tokens: decode tokens of a request.
        kv_tokens: tokens of KV that are held on average.
        accuracy: the share of right answers.
        utilisation: of the KV cache or the seats, whichever is scarcer; 1 and more is too much.
    """

    n: int
    m: int
    latency_s: float
    tokens: float
    kv_tokens: float
    accuracy: float
    utilisation: float


def estimate(demand: Demand, n: int, m: int) -> Estimate:
    """The closed-form estimate of a pair."""
    cost, step, limits = group_cost(demand.within, n, m), demand.profile.step, demand.profile.limits
    scale, square = float(demand.scales.mean()), float((demand.scales**2).mean())
    steps, tokens = cost.latency_tokens * scale, cost.tokens * scale
    prompt, rate = demand.prompt_tokens, demand.rate_per_s
    area = cost.kv_area * square + prompt * steps
    prefill_s = step.prefill_s + step.prefill_token_s * prompt + step.prefill_pair_s * prompt**2 / 2
    accuracy = fmean(best_of_accuracy(p, demand.selection, m) for p in demand.chances)
    decode_s = step.decode_s * tokens + step.kv_token_s * area
    idle = 1 - rate * (decode_s + prefill_s)
    if idle <= 0:
        return Estimate(n, m, math.inf, tokens, math.inf, accuracy, math.inf)
    step_s = (step.base_s + decode_s / steps) / idle
    kv_tokens, branches = rate * area * step_s, rate * tokens * step_s
    capacity = limits.kv_blocks * limits.block_size
    utilisation = max(kv_tokens / capacity, branches / limits.max_num_seqs)
    if utilisation >= 1:
        return Estimate(n, m, math.inf, tokens, kv_tokens, accuracy, utilisation)
    service_s = steps * step_s + prefill_s + step_s
    spread = square / scale**2 * demand.within.order_statistic(m, n, 2) / cost.latency_tokens**2 - 1
    at_once = rate * service_s / utilisation
    wait_s = (
        (1 + spread)
        / 2
        * service_s
        * utilisation ** (math.sqrt(2 * (at_once + 1)) - 1)
        / (at_once * (1 - utilisation))
    )
    return Estimate(n, m, service_s + wait_s, tokens, kv_tokens, accuracy, utilisation)
