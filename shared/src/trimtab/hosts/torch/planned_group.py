"""A process group of torch.distributed whose AllReduce, reduce-scatter and all-gather go by plans.

It owns a base group for each kind of device and passes on to it whatever has no plan. Plans run on
one thread, in the order of the calls; torch's C++ and Python sides both come here.
"""

from __future__ import annotations

import itertools
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from trimtab.core.collectives import Schedule
from trimtab.hosts.torch import profiled_call
from trimtab.hosts.torch.call_faults import CallFaults, Passed
from trimtab.hosts.torch.device_runner import DevicePlanRunner, DeviceWork, summing
from trimtab.hosts.torch.plan_runner import Combine, PeerLost, PlannedRank, PlanRunner, adding
from trimtab.hosts.torch.planned_call import CallThread, PlannedWork, Several

_options: Any = distributed_c10d
"""Where torch.distributed has the names that it does not export, or that its types lack."""


_Runner = PlanRunner | DevicePlanRunner


class Plans(Protocol):
    """Where a group gets its plans; all ranks must get the same."""

    def schedule(self, payload_bytes: int, *, blocks: bool = False) -> Schedule | None:
        """The plan for a payload; None where the base group shall do it.

        Args:
            payload_bytes: on each rank, all parts together.
            blocks: whether each rank shall own one equal part between the phases, of which then
                only one is run.
        """


class _Plan(PlannedRank):
    """A plan that can be told from others."""

    @cached_property
    def digest(self) -> int:
        """The same on all ranks that have the same plan."""
        return zlib.crc32(self.schedule.model_dump_json().encode())


class _Operation(NamedTuple):
    """A reduce operation.

    Attributes:
        combine: how operands become one.
        name: of the operation.
        divides: whether the result is divided by the number of ranks.
        dtypes: those that it is run on; gloo says what is wrong with any other.
    """

    combine: Combine
    name: str
    divides: bool
    dtypes: frozenset[torch.dtype]


_KINDS: Any = dist.ReduceOp.RedOpType
_REAL = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_WHOLE = frozenset({torch.uint8, torch.int8, torch.int32, torch.int64})


def _sums(kind: Any, dtypes: frozenset[torch.dtype]) -> _Operation:
    return _Operation(summing(), kind.name, kind == _KINDS.AVG, dtypes)


def _chain(
    kind: Any, operands: Callable[[torch.Tensor, torch.Tensor], object], *also: torch.dtype
) -> _Operation:
    return _Operation(adding(operands, fused=False), kind.name, False, _WHOLE.union(also))


_OPERATIONS: Mapping[Any, _Operation] = {
    _KINDS.SUM: _sums(_KINDS.SUM, _REAL | _WHOLE),
    _KINDS.AVG: _sums(_KINDS.AVG, _REAL),
    _KINDS.PRODUCT: _chain(_KINDS.PRODUCT, torch.Tensor.mul_, *_REAL),
    _KINDS.MIN: _chain(_KINDS.MIN, lambda a, b: torch.minimum(a, b, out=a), *_REAL),
    _KINDS.MAX: _chain(_KINDS.MAX, lambda a, b: torch.maximum(a, b, out=a), *_REAL),
    _KINDS.BAND: _chain(_KINDS.BAND, torch.Tensor.bitwise_and_),
    _KINDS.BOR: _chain(_KINDS.BOR, torch.Tensor.bitwise_or_),
    _KINDS.BXOR: _chain(_KINDS.BXOR, torch.Tensor.bitwise_xor_),
}


class _Within:
    """What callbacks' calls go by: connections and room of their own.

    Ranks come to them at other times than to the calls around them, but in one order.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        store = _options.PrefixStore("trimtab/callbacks", store)
        self.base = _gloo(store, rank, size, timeout)
        _everyone(store, rank, size, timeout)
        self.runner = PlanRunner(self.base, timeout)


class PlannedGroup(dist.ProcessGroup):
    """A process group that runs plans.

    Args:
        store: of this group alone.
        rank, size: of the group.
        timeout: how long a message may take.
        plans: the plans.
        names: what to call each rank in messages, by its number in the group.
        cuda: whether plans run on CUDA tensors too; they are NCCL's otherwise.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        timeout: timedelta,
        plans: Plans,
        names: Sequence[str],
        *,
        cuda: bool = False,
    ) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._plans = plans
        self._faults = CallFaults(store, rank, names)
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
        self._cuda, self._device_calls = cuda, itertools.count(1)
        self._device_runners: dict[torch.device, DevicePlanRunner] = {}
        self._planned = lru_cache(256)(self._plan)
        self._thread = CallThread()
        self._own_callbacks, self._numbers_within = self._thread.callbacks, itertools.count(1)
        self._making = partial(_Within, store, rank, size)
        self._closing = weakref.finalize(self, self._thread.close)
        self._fault: Exception | None = None

    def getBackendName(self) -> str:  # noqa: N802
        return "gentree"

    @cached_property
    def _within(self) -> _Within:
        """Made by the first call in a callback, which all ranks make."""
        return self._making(self._limit(None))

    def shutdown(self) -> None:
        """Waits for the calls that are under way, and ends the group."""
        self._closing()

    def abort(self) -> None:
        """Ends the group without waiting for its peers."""
        self._fault = self._fault or RuntimeError("the group was aborted")
        inner = [self._within.base] if "_within" in vars(self) else []
        for base in (*self._bases.values(), *inner):
            with suppress(RuntimeError, AttributeError):
                base.abort()
        self._closing()

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:  # type: ignore[override]
        given = _listed(tensors)
        opts = opts if opts is not None else dist.AllreduceOptions()
        planned = self._for(given, _bytes(given)) if len(given) == 1 else None
        how = _operation(opts, given) if planned is not None else None
        if planned is None or how is None:
            return self._base(given).allreduce(given, _as_options(opts, dist.AllreduceOptions))
        return self._submit(
            "all_reduce",
            given,
            given,
            opts,
            partial(self._reduce_all, given, planned, how),
            planned,
        )

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        given = _listed(tensors)
        opts = opts if opts is not None else dist.AllreduceCoalescedOptions()
        how = _operation(opts, given)
        alike = len({(t.dtype, t.device) for t in given}) == 1
        planned = self._for(given, _bytes(given)) if alike and how else None
        if planned is None or how is None:
            return self._base(given).allreduce_coalesced(given, opts)
        return self._submit(
            "all_reduce",
            given,
            given,
            opts,
            partial(self._reduce_all, given, planned, how),
            planned,
        )

    def reduce_scatter_single(self, output: Any, input: Any, opts: Any = None) -> Any:  # noqa: A002
        opts = opts if opts is not None else dist.ReduceScatterOptions()
        how = _operation(opts, [input])
        even = input.numel() == output.numel() * self._own_size and input.dtype == output.dtype
        size = _bytes([input])
        planned = self._for([input, output], size, blocks=True) if even and how else None
        if planned is None or how is None:
            return self._base([input])._reduce_scatter_base(output, input, opts)
        _refuse_shared([output])
        return self._submit(
            "reduce_scatter",
            [input],
            [output],
            opts,
            partial(self._scatter, output, [input], planned, how),
            planned,
        )

    def _reduce_scatter_base(self, output: Any, input: Any, opts: Any = None) -> Any:  # noqa: A002
        return self.reduce_scatter_single(output, input, opts)

    def reduce_scatter(  # type: ignore[override]
        self, outputs: Any, inputs: Any, opts: Any = None
    ) -> Any:
        opts = opts if opts is not None else dist.ReduceScatterOptions()
        given = _listed(outputs)
        how = _operation(opts, given)
        parts = self._shares(given, inputs) if how else None
        planned = None if parts is None else self._for([*given, *parts], _bytes(parts), blocks=True)
        if parts is None or planned is None or how is None:
            return self._base(given).reduce_scatter(given, inputs, opts)
        _refuse_shared(given)
        return self._submit(
            "reduce_scatter",
            parts,
            given,
            opts,
            partial(self._scatter, given[0], parts, planned, how),
            planned,
        )

    def all_gather_single(self, output: Any, input: Any, opts: Any = None) -> Any:  # noqa: A002
        opts = opts if opts is not None else _options.AllgatherOptions()
        even = output.numel() == input.numel() * self._own_size and input.dtype == output.dtype
        planned = self._for([input, output], _bytes([output]), blocks=True) if even else None
        if planned is None:
            return self._base([input])._allgather_base(output, input, opts)
        _refuse_shared([output])
        return self._submit(
            "all_gather",
            [input],
            [output],
            opts,
            partial(self._gather, [output], input, planned),
            planned,
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
        _refuse_shared(parts)
        return self._submit(
            "all_gather",
            given,
            parts,
            opts,
            partial(self._gather, parts, given[0], planned),
            planned,
        )

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        pairs = zip(outputs, inputs, strict=True)
        return Several([self.all_gather_single(output, given, opts) for output, given in pairs])

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        pairs = zip(outputs, inputs, strict=True)
        return Several([self.reduce_scatter_single(out, given, opts) for out, given in pairs])

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
        kind = getattr(opts.device, "type", "cpu")
        base = self._base([]) if kind == "cpu" else self._bases[kind]
        # What was called before a barrier is over behind it.
        before = self._submit(None, [], [], opts, lambda runner, call: None, None)
        for runner in self._device_runners.values():
            runner.join()
        if opts.asyncOp:
            return Several([before, base.barrier(opts)])
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
    ) -> _Plan | None:
        """The plan for a call; None where it is the base group's."""
        on_gpu = _is_on_gpu(tensors[0])
        if not (self._cuda if on_gpu else tensors[0].is_cpu):
            return None
        # Asked first, so that a call without a plan costs little more than the base group's own.
        planned: _Plan | None = self._planned(payload_bytes, blocks)
        if planned is None or (blocks and planned.places is None):
            return None
        plain = partial(_is_plain_on, tensors[0].device) if on_gpu else _is_plain
        return planned if all(map(plain, tensors)) else None

    def _plan(self, payload_bytes: int, blocks: bool) -> _Plan | None:
        if self._own_size == 1:
            return None
        schedule = self._plans.schedule(payload_bytes, blocks=blocks)
        return None if schedule is None else _Plan(schedule, self._own_rank)

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
            return self._within.base if self._own_callbacks.runs_here() else self._bases["cpu"]
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
        run: Callable[[_Runner, int], None],
        planned: _Plan | None,
    ) -> PlannedWork | DeviceWork:
        """Runs a call behind all others.

        Args:
            name: in a profiler; None where it shall not show.
            given: the tensors that the call reads.
            result: those that it fills.
            opts: of the call.
            run: gets what runs it, and its number.
            planned: what it runs.
        """
        if result and _is_on_gpu(result[0]):
            return self._enqueue(given, result, run)
        work, limit = PlannedWork(result, self._own_callbacks), self._limit(opts)
        seen = name is not None and profiled_call.profiled()
        end = profiled_call.begin(f"{self.getBackendName()}:{name}", given) if seen else _nothing

        def call(number: int) -> None:
            error = attempt(number)
            end()
            work.finish(error)

        def attempt(number: int) -> Exception | None:
            if self._fault is not None:
                return self._fault
            try:
                runner = self._runner if number > 0 else self._within.runner
                runner.timeout = limit
                run(runner, abs(number))
            except Exception as error:
                return self._failed(error, _passed(number, name, given, opts, planned))
            return None

        if self._own_callbacks.runs_here():
            # At once: nobody else would settle a future for which the callback waits.
            call(-next(self._numbers_within))
            return work
        # An event is one of communication only if another thread ends it.
        self._thread.submit(call, here=not (seen or getattr(opts, "asyncOp", True)))
        return work

    def _enqueue(
        self,
        given: Sequence[torch.Tensor],
        result: list[torch.Tensor],
        run: Callable[[_Runner, int], None],
    ) -> DeviceWork:
        """Enqueues a call on a GPU, in the caller's thread, as the base group does."""
        if self._fault is not None:
            raise self._fault
        device = result[0].device
        if device not in self._device_runners:
            self._device_runners[device] = DevicePlanRunner(self._bases[device.type], device)
        runner = self._device_runners[device]
        return runner.submit(given, result, partial(run, runner, next(self._device_calls)))

    def _failed(self, error: Exception, passed: Passed) -> Exception:
        """What a failed call raises; all later ones say the same, and so do the other ranks."""
        if isinstance(error, PeerLost):
            self._fault = RuntimeError(self._faults.others(passed, error))
            return self._fault
        self._fault = RuntimeError(self._faults.own(passed, error))
        return error

    def _reduce_all(
        self,
        tensors: Sequence[torch.Tensor],
        planned: _Plan,
        how: _Operation,
        runner: _Runner,
        call: int,
    ) -> None:
        with _writing(tensors):
            alone = len(tensors) == 1 and tensors[0].is_contiguous()
            flat = tensors[0].view(-1) if alone else torch.cat([t.reshape(-1) for t in tensors])
            runner.run(
                planned.turns,
                flat,
                how.combine,
                call=call,
                chunks=planned.schedule.chunks,
                what=planned.digest ^ _code("all_reduce", flat.dtype, how.name),
            )
            if how.divides:
                flat.div_(self._own_size)
            if not alone:
                for tensor, part in zip(
                    tensors, flat.split([t.numel() for t in tensors]), strict=True
                ):
                    _fill(tensor, part.view(tensor.shape))

    def _scatter(
        self,
        output: torch.Tensor,
        inputs: Sequence[torch.Tensor],
        planned: _Plan,
        how: _Operation,
        runner: _Runner,
        call: int,
    ) -> None:
        assert planned.places is not None
        with _writing([output]):
            length = output.numel()
            parts = inputs if len(inputs) > 1 else inputs[0].reshape(-1).split(max(length, 1))
            flat = torch.empty(length * self._own_size, dtype=output.dtype, device=output.device)
            for rank, place in enumerate(planned.places):
                if length:
                    flat[place * length : (place + 1) * length] = parts[rank].reshape(-1)
            what = planned.digest ^ _code("reduce_scatter", flat.dtype, how.name)
            runner.run(planned.reducing, flat, how.combine, call=call, what=what)
            own = planned.places[self._own_rank]
            result = flat[own * length : (own + 1) * length]
            output.copy_(
                (result.div_(self._own_size) if how.divides else result).view(output.shape)
            )

    def _gather(
        self,
        outputs: Sequence[torch.Tensor],
        given: torch.Tensor,
        planned: _Plan,
        runner: _Runner,
        call: int,
    ) -> None:
        assert planned.places is not None
        with _writing(outputs):
            length = given.numel()
            flat = torch.empty(length * self._own_size, dtype=given.dtype, device=given.device)
            own = planned.places[self._own_rank]
            flat[own * length : (own + 1) * length] = given.reshape(-1)
            what = planned.digest ^ _code("all_gather", flat.dtype, "")
            runner.run(planned.gathering, flat, _no_sums, call=call, what=what)
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


def _is_on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def _is_plain_on(device: torch.device, tensor: torch.Tensor) -> bool:
    """Whether plans can run on a tensor of a GPU."""
    known = tensor.device == device and tensor.dtype in _REAL | _WHOLE
    return known and tensor.layout == torch.strided


def _op_of(opts: Any) -> Any:
    return getattr(opts, "reduceOp", opts)


def _as_options(opts: Any, kind: Any) -> Any:
    """Options for the base group, where a bare reduce operation was given."""
    if isinstance(opts, kind):
        return opts
    made = kind()
    made.reduceOp = opts
    return made


def _operation(opts: Any, tensors: Sequence[torch.Tensor]) -> _Operation | None:
    """The operation of a call; None where the base group has it, or says what is wrong."""
    op = _op_of(opts)
    found = _OPERATIONS.get(getattr(op, "op", op))
    return found if found is not None and tensors and tensors[0].dtype in found.dtypes else None


@lru_cache(256)
def _code(name: str, dtype: torch.dtype, op: str) -> int:
    """The same on all ranks that make such a call."""
    return zlib.crc32(f"{name} {dtype} {op}".encode())


def _passed(
    call: int, name: str | None, given: Sequence[torch.Tensor], opts: Any, planned: _Plan | None
) -> Passed:
    op = _op_of(opts)
    words = [str(getattr(getattr(op, "op", op), "name", ""))]
    if given:
        count = sum(tensor.numel() for tensor in given)
        words.insert(0, f"{count} {str(given[0].dtype).removeprefix('torch.')}")
    what = f"{name or 'barrier'}({', '.join(filter(None, words))})"
    if call < 0:
        what += " in a callback"
    return Passed(call, what, 0 if planned is None else planned.digest)


def _writing(tensors: Sequence[torch.Tensor]) -> Any:
    """Lets another thread than the caller's write into tensors, as the caller might."""
    for tensor in tensors:
        if tensor.is_inference():
            return torch.inference_mode()
    return torch.no_grad()


def _fill(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Writes values (of its shape) into a tensor; where its elements share memory, the first."""
    if not tensor.is_contiguous():
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if stride == 0 and size > 1:
                tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    tensor.copy_(values)


def _refuse_shared(outputs: Sequence[torch.Tensor]) -> None:
    """Before anything is sent, and without harm to the group."""
    for tensor in outputs:
        if not tensor.is_contiguous() and 0 in tensor.stride():
            raise RuntimeError(
                "elements of an output share memory; pass one that was not expanded, such as its"
                " clone()"
            )


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
