"""A process group of torch.distributed whose AllReduce, reduce-scatter and all-gather go by plans.

It owns a base group for each kind of device and passes on to it whatever has no plan. Plans run on
one thread, in the order of the calls; torch's C++ and Python sides both come here.
"""

from __future__ import annotations

import atexit
import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from trimtab.core.collectives import Schedule
from trimtab.hosts.torch import profiled_call
from trimtab.hosts.torch.plan_runner import Combine, PeerLost, PlannedRank, PlanRunner, adding

_options: Any = distributed_c10d
"""Where torch.distributed has the names that it does not export, or that its types lack."""

_FAULT = "trimtab/fault"
_FAULT_WAIT_S = 1.0
"""How long a rank that loses a neighbour waits to hear whose fault it was at first."""

_STOP = None


class Plans(Protocol):
    """Where a group gets its plans; all ranks must get the same."""

    def schedule(self, payload_bytes: int, *, blocks: bool = False) -> Schedule | None:
        """The plan for a payload; None where the base group shall do it.

        Args:
            payload_bytes: on each rank, all parts together.
            blocks: whether each rank shall own one equal part between the phases, of which then
                only one is run.
        """


_KINDS: Any = dist.ReduceOp.RedOpType

_COMBINES: Mapping[Any, Combine] = {
    _KINDS.SUM: adding(torch.Tensor.add_, fused=True),
    _KINDS.AVG: adding(torch.Tensor.add_, fused=True),
    _KINDS.PRODUCT: adding(torch.Tensor.mul_, fused=False),
    _KINDS.MIN: adding(lambda a, b: torch.minimum(a, b, out=a), fused=False),
    _KINDS.MAX: adding(lambda a, b: torch.maximum(a, b, out=a), fused=False),
    _KINDS.BAND: adding(torch.Tensor.bitwise_and_, fused=False),
    _KINDS.BOR: adding(torch.Tensor.bitwise_or_, fused=False),
    _KINDS.BXOR: adding(torch.Tensor.bitwise_xor_, fused=False),
}


def _operation(op: Any) -> tuple[Combine, bool] | None:
    """How a reduce operation combines operands, and whether the result is divided; None if not."""
    kind = getattr(op, "op", op)
    found = _COMBINES.get(kind)
    return None if found is None else (found, kind == _KINDS.AVG)


class PlannedWork(dist.Work):
    """A call that runs on the group's thread, or ran on the caller's.

    Args:
        result: the tensors that the call fills.
    """

    def __init__(self, result: list[torch.Tensor]) -> None:
        super().__init__()
        self._result = result
        self._done = False
        # Held until the call is over; most are when anyone waits, and a threading.Event is dear.
        self._running = threading.Lock()
        self._running.acquire()
        self._error: Exception | None = None
        self._future: torch.futures.Future[list[torch.Tensor]] | None = None
        self._settling = threading.Lock()

    def finish(self, error: Exception | None = None) -> None:
        """Says that the call is over."""
        with self._settling:
            self._error, self._done = error, True
            self._running.release()
            future = self._future
        if future is not None:
            self._settle(future)

    def _settle(self, future: torch.futures.Future[list[torch.Tensor]]) -> None:
        if self._error is None:
            future.set_result(self._result)
        else:
            future.set_exception(self._error)  # type: ignore[arg-type]

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if not self._done:
            limit_s = timeout.total_seconds()
            if not self._running.acquire(timeout=limit_s if limit_s > 0 else -1):
                raise RuntimeError(f"the collective is not done after {limit_s:g} s")
            self._running.release()
        if self._error is not None:
            raise self._error
        return True

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        # Made when it is first asked for: most calls are only waited for.
        with self._settling:
            if self._future is not None:
                return self._future
            made = self._future = torch.futures.Future()
            over = self._done
        if over:
            self._settle(made)
        return made

    def is_completed(self) -> bool:
        return self._done

    def is_success(self) -> bool:
        return self._done and self._error is None

    def exception(self) -> Exception | None:
        return self._error

    def result(self) -> list[torch.Tensor]:
        return self._result

    def synchronize(self) -> None:
        self.wait()


class _Several(dist.Work):
    """Calls that are one to the caller."""

    def __init__(self, works: Sequence[Any]) -> None:
        super().__init__()
        self._works = list(works)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        limit = [timeout] if timeout > timedelta(0) else []
        done = [work.wait(*limit) for work in self._works]
        return all(done)

    def get_future(self) -> Any:
        together = torch.futures.collect_all([work.get_future() for work in self._works])
        return together.then(lambda done: [t for each in done.value() for t in each.value() or ()])

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


class _Thread:
    """Runs calls one after the other, each with its number."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._given = itertools.count(1)
        self._ahead = 0
        self._order, self._running = threading.Lock(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="trimtab-plans", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, call: Callable[[int], None], *, here: bool) -> None:
        """Runs a call behind all others.

        Args:
            call: gets a number of its own, in the order of the calls.
            here: whether it may run at once in the caller's thread, which waits for it anyway; it
                does where no call is ahead of it.
        """
        with self._order:
            number = next(self._given)
            at_once = here and self._ahead == 0 and self._running.acquire(blocking=False)
            if not at_once:
                self._ahead += 1
                self._calls.put(partial(call, number))
        if at_once:
            try:
                call(number)
            finally:
                self._running.release()

    def close(self) -> None:
        """Ends the thread behind the calls that were given; it holds no tensor after that."""
        atexit.unregister(self.close)
        self._calls.put(_STOP)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not _STOP:
            with self._running:
                call()
            del call
            with self._order:
                self._ahead -= 1


class PlannedGroup(dist.ProcessGroup):
    """A process group that runs plans.

    Args:
        store: of this group alone.
        rank, size: of the group.
        timeout: how long a message may take.
        plans: the plans.
        names: what to call each rank in messages, by its number in the group.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        timeout: timedelta,
        plans: Plans,
        names: Sequence[str],
    ) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._store, self._plans, self._names = store, plans, list(names)
        self._own_rank, self._own_size = rank, size
        self._bases = {"cpu": _gloo(store, rank, size, timeout)}
        self._register_backend(
            torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, self._bases["cpu"]
        )
        if torch.cuda.is_available() and dist.is_nccl_available():
            self._bases["cuda"] = _nccl(store, rank, size, timeout)
            self._register_backend(
                torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, self._bases["cuda"]
            )
        _everyone(store, rank, size, timeout)
        self._runner = PlanRunner(self._bases["cpu"], timeout)
        self._planned = lru_cache(256)(self._plan)
        self._thread = _Thread()
        self._closing = weakref.finalize(self, self._thread.close)
        self._fault: Exception | None = None

    def getBackendName(self) -> str:  # noqa: N802
        return "gentree"

    def shutdown(self) -> None:
        """Waits for the calls that are under way, and ends the group."""
        self._closing()

    def abort(self) -> None:
        """Ends the group without waiting for its peers."""
        self._fault = self._fault or RuntimeError("the group was aborted")
        for base in self._bases.values():
            with suppress(RuntimeError, AttributeError):
                base.abort()
        self._closing()

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:  # type: ignore[override]
        given = _listed(tensors)
        opts = opts if opts is not None else dist.AllreduceOptions()
        planned = self._for(given, _bytes(given)) if len(given) == 1 else None
        how = _operation(_op_of(opts)) if planned is not None else None
        if planned is None or how is None or not _fits(given[0], how):
            return self._base(given).allreduce(given, _as_options(opts, dist.AllreduceOptions))
        return self._submit(
            "all_reduce", given, given, opts, partial(self._reduce_all, given, planned, how)
        )

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        given = _listed(tensors)
        opts = opts if opts is not None else dist.AllreduceCoalescedOptions()
        how = _operation(_op_of(opts))
        alike = len({(t.dtype, t.device) for t in given}) == 1
        planned = self._for(given, _bytes(given)) if alike and how else None
        if planned is None or how is None or not _fits(given[0], how):
            return self._base(given).allreduce_coalesced(given, opts)
        return self._submit(
            "all_reduce", given, given, opts, partial(self._reduce_all, given, planned, how)
        )

    def reduce_scatter_single(self, output: Any, input: Any, opts: Any = None) -> Any:  # noqa: A002
        opts = opts if opts is not None else dist.ReduceScatterOptions()
        how = _operation(_op_of(opts))
        even = input.numel() == output.numel() * self._own_size and input.dtype == output.dtype
        size = _bytes([input])
        planned = self._for([input, output], size, blocks=True) if even and how else None
        if planned is None or how is None or not _fits(input, how):
            return self._base([input])._reduce_scatter_base(output, input, opts)
        return self._submit(
            "reduce_scatter",
            [input],
            [output],
            opts,
            partial(self._scatter, output, [input], planned, how),
        )

    def _reduce_scatter_base(self, output: Any, input: Any, opts: Any = None) -> Any:  # noqa: A002
        return self.reduce_scatter_single(output, input, opts)

    def reduce_scatter(  # type: ignore[override]
        self, outputs: Any, inputs: Any, opts: Any = None
    ) -> Any:
        opts = opts if opts is not None else dist.ReduceScatterOptions()
        given, how = _listed(outputs), _operation(_op_of(opts))
        parts = self._shares(given, inputs) if how else None
        planned = None if parts is None else self._for([*given, *parts], _bytes(parts), blocks=True)
        if parts is None or planned is None or how is None or not _fits(given[0], how):
            return self._base(given).reduce_scatter(given, inputs, opts)
        return self._submit(
            "reduce_scatter",
            parts,
            given,
            opts,
            partial(self._scatter, given[0], parts, planned, how),
        )

    def all_gather_single(self, output: Any, input: Any, opts: Any = None) -> Any:  # noqa: A002
        opts = opts if opts is not None else _options.AllgatherOptions()
        even = output.numel() == input.numel() * self._own_size and input.dtype == output.dtype
        planned = self._for([input, output], _bytes([output]), blocks=True) if even else None
        if planned is None:
            return self._base([input])._allgather_base(output, input, opts)
        return self._submit(
            "all_gather", [input], [output], opts, partial(self._gather, [output], input, planned)
        )

    def _allgather_base(self, output: Any, input: Any, opts: Any = None) -> Any:  # noqa: A002
        return self.all_gather_single(output, input, opts)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else _options.AllgatherOptions()
        given = _listed(inputs)
        parts = self._shares(given, outputs)
        planned = None if parts is None else self._for([*given, *parts], _bytes(parts), blocks=True)
        if parts is None or planned is None:
            return self._base(given).allgather(outputs, given, opts)
        return self._submit(
            "all_gather", given, parts, opts, partial(self._gather, parts, given[0], planned)
        )

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        pairs = zip(outputs, inputs, strict=True)
        return _Several([self.all_gather_single(output, given, opts) for output, given in pairs])

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        pairs = zip(outputs, inputs, strict=True)
        return _Several([self.reduce_scatter_single(out, given, opts) for out, given in pairs])

    # What follows has no plan. torch's own passing on holds the GIL until gloo has taken the call,
    # while gloo's thread may wait for the GIL to free a tensor: both would stand still for ever.

    def broadcast(  # type: ignore[override]
        self, tensors: Any, *rest: Any, **more: Any
    ) -> Any:
        return self._base(_listed(tensors)).broadcast(tensors, *rest, **more)

    def barrier(  # type: ignore[override]
        self, opts: Any = None, timeout: timedelta | None = None
    ) -> Any:
        opts = opts if opts is not None else dist.BarrierOptions()
        if timeout is not None:
            opts.timeout = timeout
        base = self._bases[getattr(opts.device, "type", "cpu")]
        # What was called before a barrier is over behind it.
        before = self._submit(None, [], [], opts, lambda call: None)
        if opts.asyncOp:
            return _Several([before, base.barrier(opts)])
        before.wait()
        return base.barrier(opts)

    def send(self, tensors: Any, peer: int, tag: int) -> Any:
        return self._base(tensors).send(tensors, peer, tag)

    def recv(self, tensors: Any, peer: int, tag: int) -> Any:
        return self._base(tensors).recv(tensors, peer, tag)

    # Torch's own passing on of these two looks for a tensor in each list, and says so itself where
    # there is none.

    def gather(  # type: ignore[override]
        self, outputs: Any, inputs: Any, *rest: Any, **more: Any
    ) -> Any:
        return self._base(_listed(inputs)).gather(outputs, inputs, *rest, **_given(more))

    def scatter(  # type: ignore[override]
        self, outputs: Any, inputs: Any, *rest: Any, **more: Any
    ) -> Any:
        return self._base(_listed(outputs)).scatter(outputs, inputs, *rest, **_given(more))

    def all_to_all_single(  # type: ignore[override]
        self, output: Any, given: Any, *rest: Any, **more: Any
    ) -> Any:
        return self._base([given]).alltoall_base(output, given, *rest, **more)

    def alltoall_base(  # type: ignore[override]
        self, output: Any, given: Any, *rest: Any, **more: Any
    ) -> Any:
        return self.all_to_all_single(output, given, *rest, **more)

    def _for(
        self, tensors: Sequence[torch.Tensor], payload_bytes: int, *, blocks: bool = False
    ) -> PlannedRank | None:
        """The plan for a call; None where it is the base group's."""
        if not tensors[0].is_cpu:
            return None
        # Asked first, so that a call without a plan costs little more than the base group's own.
        planned: PlannedRank | None = self._planned(payload_bytes, blocks)
        if planned is None or (blocks and planned.places is None):
            return None
        return planned if all(map(_is_plain, tensors)) else None

    def _plan(self, payload_bytes: int, blocks: bool) -> PlannedRank | None:
        if self._own_size == 1:
            return None
        schedule = self._plans.schedule(payload_bytes, blocks=blocks)
        return None if schedule is None else PlannedRank(schedule, self._own_rank)

    def _shares(
        self, wholes: Sequence[torch.Tensor], lists: Sequence[Sequence[torch.Tensor]]
    ) -> list[torch.Tensor] | None:
        """One tensor for each rank, all like the only whole; None where it is otherwise."""
        if len(wholes) != 1 or len(lists) != 1 or len(lists[0]) != self._own_size:
            return None
        like = (wholes[0].numel(), wholes[0].dtype)
        even = all((part.numel(), part.dtype) == like for part in lists[0])
        return list(lists[0]) if even else None

    def _limit(self, opts: Any) -> timedelta:
        """How long a message of a call may take: what it says, or what the group does now."""
        own: timedelta | None = getattr(opts, "timeout", None)
        if own is not None and own > timedelta(0):
            return own
        now: timedelta = self._bases["cpu"].options._timeout
        return now

    def _base(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The group of the tensors' device."""
        if not tensors or tensors[0].is_cpu:
            return self._bases["cpu"]
        kind = tensors[0].device.type
        if kind not in self._bases:
            raise RuntimeError(f"the backend has no group for tensors on {kind!r}")
        return self._bases[kind]

    def _submit(
        self,
        name: str | None,
        given: Sequence[torch.Tensor],
        result: list[torch.Tensor],
        opts: Any,
        run: Callable[[int], None],
    ) -> PlannedWork:
        """Runs a call behind all others.

        Args:
            name: in a profiler; None where it shall not show.
            given: the tensors that the call reads.
            result: those that it fills.
            opts: of the call.
            run: gets the number of the call.
        """
        work, limit = PlannedWork(result), self._limit(opts)
        seen = name is not None and profiled_call.profiled()
        end = profiled_call.begin(f"{self.getBackendName()}:{name}", given) if seen else _nothing

        def call(number: int) -> None:
            error = attempt(number)
            end()
            work.finish(error)

        def attempt(number: int) -> Exception | None:
            try:
                if self._fault is not None:
                    raise self._fault
                self._runner.timeout = limit
                run(number)
            except PeerLost as lost:
                own_bytes = sum(tensor.nbytes for tensor in result)
                self._fault = RuntimeError(self._told(lost, own_bytes))
                return self._fault
            except Exception as error:
                return error
            return None

        # An event is one of communication only if another thread ends it.
        self._thread.submit(call, here=not (seen or getattr(opts, "asyncOp", True)))
        return work

    def _told(self, lost: PeerLost, own_bytes: int) -> str:
        """Whose fault it is, as far as the ranks that noticed have said it in the store.

        A rank that was lost may itself have lost another, which is then the one to name.
        """
        seen, blamed, until_s = {self._own_rank}, lost.rank, time.monotonic() + _FAULT_WAIT_S
        with suppress(Exception):  # the store may be gone with the rank that had it
            self._store.set(f"{_FAULT}/{self._own_rank}", f"{lost.rank} {own_bytes}")
            while blamed not in seen and time.monotonic() < until_s:
                if not self._store.check([f"{_FAULT}/{blamed}"]):
                    time.sleep(0.02)
                    continue
                said = self._store.get(f"{_FAULT}/{blamed}").decode().split()
                if int(said[1]) != own_bytes:
                    return (
                        f"{self._names[blamed]} passed {said[1]} bytes to a collective to which"
                        f" {self._names[self._own_rank]} passed {own_bytes}"
                    )
                seen.add(blamed)
                blamed = int(said[0])
        return f"{self._names[blamed]} failed or did not take part in time ({lost.reason})"

    def _reduce_all(
        self,
        tensors: Sequence[torch.Tensor],
        planned: PlannedRank,
        how: tuple[Combine, bool],
        call: int,
    ) -> None:
        combine, divide = how
        with torch.no_grad():
            alone = len(tensors) == 1 and tensors[0].is_contiguous()
            flat = tensors[0].view(-1) if alone else torch.cat([t.reshape(-1) for t in tensors])
            chunks = planned.schedule.chunks
            self._runner.run(planned.turns, flat, combine, call=call, chunks=chunks)
            if divide:
                flat.div_(self._own_size)
            if not alone:
                for tensor, part in zip(
                    tensors, flat.split([t.numel() for t in tensors]), strict=True
                ):
                    tensor.copy_(part.view(tensor.shape))

    def _scatter(
        self,
        output: torch.Tensor,
        inputs: Sequence[torch.Tensor],
        planned: PlannedRank,
        how: tuple[Combine, bool],
        call: int,
    ) -> None:
        combine, divide = how
        assert planned.places is not None
        with torch.no_grad():
            length = output.numel()
            parts = inputs if len(inputs) > 1 else inputs[0].reshape(-1).split(max(length, 1))
            flat = torch.empty(length * self._own_size, dtype=output.dtype)
            for rank, place in enumerate(planned.places):
                if length:
                    flat[place * length : (place + 1) * length] = parts[rank].reshape(-1)
            self._runner.run(planned.reducing, flat, combine, call=call)
            own = planned.places[self._own_rank]
            result = flat[own * length : (own + 1) * length]
            output.copy_((result.div_(self._own_size) if divide else result).view(output.shape))

    def _gather(
        self,
        outputs: Sequence[torch.Tensor],
        given: torch.Tensor,
        planned: PlannedRank,
        call: int,
    ) -> None:
        assert planned.places is not None
        with torch.no_grad():
            length = given.numel()
            flat = torch.empty(length * self._own_size, dtype=given.dtype)
            own = planned.places[self._own_rank]
            flat[own * length : (own + 1) * length] = given.reshape(-1)
            self._runner.run(planned.gathering, flat, _no_sums, call=call)
            blocks = [flat[place * length : (place + 1) * length] for place in planned.places]
            if len(outputs) == 1 and self._own_size > 1:
                outputs[0].copy_(torch.cat(blocks).view(outputs[0].shape))
                return
            for output, block in zip(outputs, blocks, strict=True):
                output.copy_(block.view(output.shape))


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that are None, which a base group does not take."""
    return {name: value for name, value in options.items() if value is not None}


def _nothing() -> None:
    pass


def _no_sums(first: torch.Tensor, others: torch.Tensor) -> None:
    raise AssertionError("an all-gather has no sums")


def _listed(tensors: Any) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Their size as dense ones; a sparse one has no ``nbytes``."""
    size_bytes = 0
    for tensor in tensors:
        size_bytes += tensor.numel() * tensor.itemsize
    return size_bytes


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether plans can run on a tensor."""
    return tensor.is_cpu and tensor.layout == torch.strided and not tensor.is_complex()


def _op_of(opts: Any) -> Any:
    return getattr(opts, "reduceOp", opts)


def _as_options(opts: Any, kind: Any) -> Any:
    """Options for the base group, where a bare reduce operation was given."""
    if isinstance(opts, kind):
        return opts
    made = kind()
    made.reduceOp = opts
    return made


def _fits(tensor: torch.Tensor, how: tuple[Combine, bool]) -> bool:
    """Whether the operation is one of this dtype; the base group says what is wrong if not."""
    _, divide = how
    return tensor.dtype != torch.bool and (tensor.is_floating_point() or not divide)


def _gloo(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    return dist.ProcessGroupGloo(_options.PrefixStore("trimtab/gloo", store), rank, size, timeout)


def _nccl(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(_options.PrefixStore("trimtab/nccl", store), rank, size, options)


def _everyone(store: Any, rank: int, size: int, timeout: timedelta) -> None:
    """Waits until every rank has its base groups: gloo's own rendezvous is no barrier."""
    store.set(f"trimtab/up/{rank}", "1")
    store.wait([f"trimtab/up/{other}" for other in range(size)], timeout)
