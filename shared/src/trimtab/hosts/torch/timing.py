"""How long a call takes that all ranks of a job make together."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

R = TypeVar("R")


def timed(call: Callable[[], R]) -> tuple[float, R]:
    """Seconds of the slowest rank of the default group, which begins together, and the result."""
    dist.barrier()
    began_s = time.perf_counter()
    result = call()
    took_s = torch.tensor(time.perf_counter() - began_s, dtype=torch.float64)
    dist.all_reduce(took_s, dist.ReduceOp.MAX)
    return float(took_s), result
