"""One event for each planned call in PyTorch's profilers, as its own backends have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import _distributed_c10d

_c10d: Any = _distributed_c10d
_autograd: Any = torch.autograd
_profiler: Any = torch.ops.profiler

profiled: Callable[[], bool] = _autograd._profiler_enabled
"""Whether a profiler looks at the thread that asks."""


def begin(name: str, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Begins the event of a call that another thread runs.

    Args:
        name: of the event, where ``torch.distributed.record_comm`` gives none.
        tensors: whose shapes it shows.

    Returns:
        What ends the event, to be called once, in any thread.
    """
    record = _autograd._record_function_with_args_enter(
        _c10d._get_comm_profiling_name() or name, *tensors
    )
    # Only a future brings the profiler's state into the thread where the event ends; without it the
    # event would last as long as the profile.
    over: torch.futures.Future[None] = torch.futures.Future()
    _profiler._call_end_callbacks_on_jit_fut._RecordFunction(record, over)
    return lambda: over.set_result(None)
