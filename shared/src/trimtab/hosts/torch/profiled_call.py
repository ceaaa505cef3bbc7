"""One event for each planned call in PyTorch's profilers, as its own backends have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import _distributed_c10d
from torch.autograd import profiler

_c10d: Any = _distributed_c10d
_autograd: Any = torch.autograd
_operators: Any = torch.ops.profiler

profiled: Callable[[], bool] = _autograd._profiler_enabled
"""Whether a profiler looks at the thread that asks."""


def _nothing() -> None:
    pass


def begin(name: str, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Begins the event of a call that another thread runs.

    Args:
        name: of the event.
        tensors: whose shapes it shows.

    Returns:
        What ends the event, to be called once, in the other thread.
    """
    if _c10d._get_comm_profiling_name():
        return _nothing  # within record_comm each Work has an event by itself
    record = _autograd._record_function_with_args_enter(name, *tensors)
    # Only a future brings the profiler's state into the thread where the event ends; without it the
    # event would last as long as the profile.
    over: torch.futures.Future[None] = torch.futures.Future()
    _operators._call_end_callbacks_on_jit_fut._RecordFunction(record, over)

    def end() -> None:
        # The end of an event is written into the profile, which is gone once that has stopped.
        if profiler._is_profiler_enabled:
            over.set_result(None)

    return end
