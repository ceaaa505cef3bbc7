"""Runs plans on tensors of a GPU: each wave's messages are one group call of NCCL.

Nothing here waits on the host. What a call does is enqueued on a stream of its own behind the
caller's, and `DeviceWork.wait` lets the caller's stream wait for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist

from trimtab.core.collectives import Turn
from trimtab.hosts.torch.plan_runner import Combine, Cuts, adding

_TAGS = 1 << 28


class DevicePlanRunner:
    """Runs plans in the order of the calls, in the thread of the caller.

    The messages of a wave are posted together, so that none waits for another: where the base group
    coalesces they are one group call. NCCL knows no tags, so they are told apart by their order
    alone, which is the same on both sides. A batch in which some ranks have no part must not be the
    first call of a communicator, so that one small all-reduce goes before.

    Args:
        base: a process group that sends and receives on the device: NCCL's, or gloo's on a CPU.
        device: of the tensors.
    """

    def __init__(self, base: Any, device: torch.device) -> None:
        self._base, self._cuts = base, Cuts()
        self._stream: Stream = CudaStream(device) if device.type == "cuda" else HostStream()
        self._device, self._connected = device, False

    def submit(
        self, given: Sequence[torch.Tensor], result: list[torch.Tensor], run: Callable[[], None]
    ) -> DeviceWork:
        """Enqueues a call.

        Args:
            given: the tensors that it reads.
            result: those that it fills.
            run: enqueues what it does on the current stream, by `run` of this runner and by torch.
        """
        with self._stream.behind_caller([*given, *result]), torch.no_grad():
            if not self._connected:
                self._base.allreduce([torch.zeros(1, device=self._device)]).wait()
                self._connected = True
            run()
            return DeviceWork(result, self._stream, self._stream.mark())

    def join(self) -> None:
        """Lets the current stream wait for every call so far, also those that nobody waits for."""
        self._stream.wait_for(self._stream.mark())

    def run(
        self,
        turns: Sequence[Turn],
        data: torch.Tensor,
        combine: Combine,
        *,
        call: int,
        chunks: int = 1,
        what: int = 0,
    ) -> None:
        """Goes through the turns of this rank, as `PlanRunner.run`, on the current stream.

        Args:
            turns: what it does.
            data: its payload (L), contiguous, which becomes the result.
            combine: how operands become one.
            call: a number that all ranks give this call.
            chunks: pieces of the payload that follow one another.
            what: a digest of all else that ranks must do alike.

        Raises:
            RuntimeError: of the base group. NCCL tells later, by its watchdog.
        """
        length = data.numel()
        count = max(1, min(chunks, length))
        # Only gloo looks at it: calls that differ do not meet there.
        tag = hash((call, length, data.element_size(), what)) % _TAGS
        pieces = [data[length * c // count : length * (c + 1) // count] for c in range(count)]
        for wave in self._cuts.waves(turns, length, count):
            # Allocated on the stream that waits for the messages, so that nothing else gets the
            # memory before they are over.
            rooms = [data.new_empty(turn.room) for _, turn in wave]
            receives, sends = [], []
            for (chunk, turn), room in zip(wave, rooms, strict=True):
                piece = pieces[chunk]
                sends += [(m.peer, piece[m.begin : m.end]) for m in turn.sends]
                receives += [
                    (m.peer, (room if m.summed else piece)[m.begin : m.end]) for m in turn.receives
                ]
            for work in self._post(receives, sends, tag):
                work.wait()
            for (chunk, turn), room in zip(wave, rooms, strict=True):
                turn.add_up(pieces[chunk], room, combine)

    def _post(self, receives: Sequence[_Part], sends: Sequence[_Part], tag: int) -> list[Any]:
        """One batch; what is waited for to let the current stream wait for all of it."""
        if not receives and not sends:
            return []
        together = self._base.supports_coalescing
        if together:
            self._base._start_coalescing()
        works = [self._base.recv([part], peer, tag) for peer, part in receives]
        works += [self._base.send([part], peer, tag) for peer, part in sends]
        return [self._base._end_coalescing()] if together else works


_Part = tuple[int, torch.Tensor]


class DeviceWork(dist.Work):
    """A call that is enqueued.

    Args:
        result: the tensors that it fills.
        stream: on which it is.
        end: what the stream has reached behind it.
    """

    def __init__(self, result: list[torch.Tensor], stream: Stream, end: Any) -> None:
        super().__init__()
        self._result, self._stream, self._end = result, stream, end
        self._future: Any = None

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Lets the current stream wait; with a timeout, the host too.

        Raises:
            RuntimeError: the call is not done in time.
        """
        limit_s = timeout.total_seconds()
        until_s = time.monotonic() + limit_s
        while limit_s > 0 and not self.is_completed():
            if time.monotonic() > until_s:
                raise RuntimeError(f"the collective is not done after {limit_s:g} s")
            time.sleep(0.001)
        self._stream.wait_for(self._end)
        return True

    def synchronize(self) -> None:
        self.wait()

    def get_future(self) -> Any:
        if self._future is None:
            self._future = self._stream.future(self._result)
        return self._future

    def is_completed(self) -> bool:
        return self._end is None or bool(self._end.query())

    def is_success(self) -> bool:
        return self.is_completed()

    def exception(self) -> None:
        return None

    def result(self) -> list[torch.Tensor]:
        return self._result


class Stream(Protocol):
    """Where calls are enqueued."""

    def behind_caller(self, tensors: Sequence[torch.Tensor]) -> Any:
        """A context whose work is behind what the caller has enqueued, and keeps the tensors."""

    def mark(self) -> Any:
        """An event behind what is enqueued; None where all of it is over."""

    def wait_for(self, end: Any) -> None:
        """Lets the caller's current stream wait for an event."""

    def future(self, result: list[torch.Tensor]) -> Any:
        """A future whose callbacks and waiters are behind what is enqueued."""


class CudaStream:
    """A stream of a GPU.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def behind_caller(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for tensor in tensors:
            # The caller may free it, and its stream write there again, before this one is done.
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Any:
        return self._stream.record_event()

    def wait_for(self, end: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(end)

    def future(self, result: list[torch.Tensor]) -> Any:
        made: Any = torch.futures.Future(devices=[self._device])
        with torch.cuda.stream(self._stream):
            made.set_result(result)
        return made


class HostStream:
    """The CPU, where what is called is over when the call returns."""

    @contextmanager
    def behind_caller(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        del tensors
        yield

    def mark(self) -> None:
        return None

    def wait_for(self, end: Any) -> None:
        del end

    def future(self, result: list[torch.Tensor]) -> Any:
        made: Any = torch.futures.Future()
        made.set_result(result)
        return made


def summing() -> Combine:
    """A sum of operands on either kind of device."""
    on_host = adding(torch.Tensor.add_, fused=True)

    def combine(first: torch.Tensor, others: torch.Tensor) -> None:
        (device_sum() if first.is_cuda else on_host)(first, others)

    return combine


@cache
def device_sum() -> Combine:
    """Sums operands in one pass by trimtab's kernel where it is installed, else one by one."""
    try:
        from trimtab.kernels.sums import add_rows
    except ModuleNotFoundError:
        return adding(torch.Tensor.add_, fused=True)
    return add_rows
