"""One rank that goes through every collective; rank 0 prints what it has seen to be right."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import pairwise

import torch
from torch import distributed as dist

from trimtab.core.errors import BadInput

Op = dist.ReduceOp


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gentree", timeout=timedelta(seconds=60))
    everything = (
        sums,
        dtypes,
        operations,
        as_gloo_refuses,
        shapes,
        expanded,
        inference,
        futures,
        calls_in_callbacks,
        scattered,
        gathered,
        passed_on,
        base_errors,
        subgroups,
        coalesced,
        waited_and_not,
        freed,
        identical,
        functional,
        sparse,
        groups_own_calls,
        in_a_profile,
        behind_a_barrier,
        late_but_in_time,
        told_otherwise,
        ends_its_threads,
    )
    for check in [c for c in everything if not sys.argv[1:] or c.__name__ in sys.argv[1:]]:
        check(dist.get_rank(), dist.get_world_size())
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"right: {check.__name__}", flush=True)
    dist.destroy_process_group()


def values(rank: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(*shape, generator=generator)


def exact(size: int, *shape: int) -> torch.Tensor:
    return torch.stack([values(rank, *shape).double() for rank in range(size)]).sum(0)


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except (RuntimeError, ValueError, BadInput) as error:
        return str(error)
    raise AssertionError("what is wrong was taken")


def told_first(call: Callable[[], object]) -> str:
    """The first line of what a call raises; nothing where it does not."""
    try:
        call()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def sums(rank: int, size: int) -> None:
    for length in (0, 1, size - 1, size, 37, 1000, 65536, 300_001):
        ours = values(rank, length)
        dist.all_reduce(ours)
        wide = torch.stack([values(r, length).abs() for r in range(size)]).sum(0)
        wrong = (ours - exact(size, length)).abs()
        assert (wrong <= 3 * size * 2**-24 * wide).all(), (length, wrong.max())


def dtypes(rank: int, size: int) -> None:
    for dtype in (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.uint8,
    ):
        ours = torch.full((41,), rank + 1, dtype=dtype)
        dist.all_reduce(ours)
        assert ours.dtype == dtype
        assert ours.tolist() == [size * (size + 1) // 2] * 41, dtype


def operations(rank: int, size: int) -> None:
    expected = {
        Op.SUM: size * (size + 1) / 2,
        Op.AVG: (size + 1) / 2,
        Op.MIN: 1,
        Op.MAX: size,
        Op.PRODUCT: float(torch.arange(1, size + 1).prod()),
    }
    for op, value in expected.items():
        ours = torch.full((23,), rank + 1.0)
        dist.all_reduce(ours, op)
        assert ours.tolist() == [value] * 23, op
    for op, start in ((Op.BOR, 0), (Op.BAND, -1), (Op.BXOR, 0)):
        ours = torch.full((9,), 1 << rank, dtype=torch.int32)
        dist.all_reduce(ours, op)
        value = start
        for other in range(size):
            one = 1 << other
            value = {Op.BOR: value | one, Op.BAND: value & one, Op.BXOR: value ^ one}[op]
        assert ours.tolist() == [value] * 9, op


def as_gloo_refuses(rank: int, size: int) -> None:
    """Before anything is sent: the group goes on."""
    group, gloo = dist.group.WORLD, dist.new_group(backend="gloo")
    refused = 0
    for dtype in (torch.float32, torch.bfloat16, torch.int16, torch.int32, torch.float8_e5m2):
        for op in (Op.SUM, Op.AVG, Op.MAX, Op.BAND, Op.BXOR):
            said = []
            for of in (gloo, group):
                ours, parts = torch.ones(2 * size).to(dtype), torch.ones(size).to(dtype)
                calls: list[Callable[[], object]] = [
                    lambda ours=ours, op=op, of=of: dist.all_reduce(ours, op, group=of),
                    lambda ours=ours, op=op, of=of, parts=parts: dist.reduce_scatter_single(
                        parts[:2], ours, op, group=of
                    ),
                ]
                said.append([told_first(call) for call in calls])
            assert said[0] == said[1], (dtype, op, said)
            refused += bool(said[0][0])
    assert refused == 2 * 2 + 2 * 5 + 1
    sums(rank, size)


def expanded(rank: int, size: int) -> None:
    """Elements that share memory are summed once; what lies behind them is nobody's."""
    for dense_at in (-1, 0):
        base = values(rank, 2, 3)
        ours = base[:1].expand(4, 3)
        ours = ours.clone() if rank == dense_at else ours
        dist.all_reduce(ours)
        torch.testing.assert_close(ours, exact(size, 2, 3).float()[:1].expand(4, 3))
        assert torch.equal(base[1], values(rank, 2, 3)[1])
    for call in (
        lambda out: dist.all_gather_single(out, torch.ones(3)),
        lambda out: dist.reduce_scatter_single(out, torch.ones(3 * size * size)),
    ):
        assert "share memory" in refusal(lambda call=call: call(torch.ones(1).expand(3 * size)))


def inference(rank: int, size: int) -> None:
    """Tensors of inference mode, whoever's thread runs the call, between those of every day."""
    expected = size * (size + 1) / 2
    for asynchronous in (True, False):
        with torch.inference_mode():
            ours, whole = torch.full((9_000,), rank + 1.0), torch.empty(4 * size)
            works = [
                dist.all_reduce(ours, async_op=asynchronous),
                dist.all_gather_single(whole, torch.full((4,), 1.0), async_op=asynchronous),
                dist.reduce_scatter_single(whole[:2], ours[: 2 * size], async_op=asynchronous),
            ]
            for work in works if asynchronous else ():
                work.wait()
        assert ours.is_inference()
        assert ours.tolist() == [expected] * 9_000
        assert whole.tolist() == [expected * size] * 2 + [1.0] * (4 * size - 2)
        every_day = torch.full((9_000,), rank + 1.0)
        dist.all_reduce(every_day, async_op=asynchronous)
        dist.barrier()
        assert every_day.tolist() == [expected] * 9_000
        assert not every_day.is_inference()


def shapes(rank: int, size: int) -> None:
    base = values(rank, 12, 14)
    strided, single = base.t()[::2], torch.tensor(float(rank))
    expected = exact(size, 12, 14).t()[::2].float()
    dist.all_reduce(strided)
    dist.all_reduce(single)
    torch.testing.assert_close(strided, expected)
    assert single.item() == size * (size - 1) / 2
    assert torch.equal(base[:, 1], values(rank, 12, 14)[:, 1]), "what is not in the view changed"


def futures(rank: int, size: int) -> None:
    many = [values(rank + 10 * index, 5000) for index in range(8)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in many]
    halves = [work.get_future().then(lambda f: f.value()[0] / 2) for work in works]
    for index, (work, half) in enumerate(zip(works, halves, strict=True)):
        work.wait()
        assert work.is_completed()
        expected = torch.stack([values(r + 10 * index, 5000) for r in range(size)]).sum(0)
        torch.testing.assert_close(many[index], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(half.wait(), many[index] / 2)


def calls_in_callbacks(rank: int, size: int) -> None:
    """They come in one order, whatever is called around them and whenever they begin."""
    length, many = 5_000, 6
    firsts = [values(rank + 10 * index, length) for index in range(many)]
    seconds, thirds = ([t.clone() for t in firsts] for _ in range(2))
    told = torch.full((many,), float(rank))

    def second(index: int, future: object) -> int:
        dist.all_reduce(seconds[index])
        dist.broadcast(told[index], 1)
        dist.barrier()
        return index

    def third(future: torch.futures.Future[int]) -> torch.Tensor:
        work = dist.all_reduce(thirds[future.value()], async_op=True)
        return work.get_future().wait()[0]

    ends = []
    for index, first in enumerate(firsts):
        future = dist.all_reduce(first, async_op=True).get_future()
        if (index + rank) % 2:  # what follows is added when the call is over, or before
            future.wait()
        ends.append(future.then(partial(second, index)).then(third))
        dist.all_reduce(values(rank, length))  # as large as those in callbacks
    works = [dist.all_reduce(values(rank, length), async_op=True) for _ in range(3)]
    early, *later = [work.get_future() for work in works]
    together = early.then(lambda f: torch.stack([f.value()[0], *(o.wait()[0] for o in later)]))
    torch.testing.assert_close(together.wait(), exact(size, length).float().expand(3, length))
    over = threading.Event()
    last = dist.all_reduce(told.clone(), async_op=True)
    last.get_future().add_done_callback(lambda _: over.set())
    for index, end in enumerate(ends):
        assert end.wait() is thirds[index]
        for ours in (firsts, seconds, thirds):
            expected = torch.stack([values(r + 10 * index, length) for r in range(size)]).sum(0)
            torch.testing.assert_close(ours[index], expected, rtol=1e-5, atol=1e-5)
    assert told.tolist() == [1.0] * many
    assert over.wait(30)


def scattered(rank: int, size: int) -> None:
    for length in (0, 1, 6, 1001):
        whole, ours = values(rank, size * length), torch.empty(length)
        expected = exact(size, size * length)[rank * length : (rank + 1) * length].float()
        dist.reduce_scatter_single(ours, whole.clone())
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        parts = [whole[r * length : (r + 1) * length] for r in range(size)]
        dist.reduce_scatter(ours.zero_(), parts, Op.AVG)
        torch.testing.assert_close(ours, expected / size, rtol=1e-5, atol=1e-5)


def gathered(rank: int, size: int) -> None:
    for length in (0, 1, 6, 1001):
        whole = torch.empty(size * length)
        dist.all_gather_single(whole, values(rank, length))
        assert torch.equal(whole, torch.cat([values(r, length) for r in range(size)]))
        parts = [torch.empty(length) for _ in range(size)]
        dist.all_gather(parts, values(rank, length))
        assert all(torch.equal(part, values(r, length)) for r, part in enumerate(parts))


def passed_on(rank: int, size: int) -> None:
    tensor = torch.full((3,), float(rank))
    dist.broadcast(tensor, 1)
    assert tensor.tolist() == [1.0] * 3
    said = [None] * size
    dist.all_gather_object(said, f"rank {rank}")
    assert said == [f"rank {r}" for r in range(size)]
    out = torch.empty(size)
    dist.all_to_all_single(out, torch.full((size,), float(rank)))
    assert out.tolist() == [float(r) for r in range(size)]
    total = torch.tensor([1.0])
    dist.reduce(total, 0)
    assert rank or total.item() == size
    yes = torch.tensor([rank == 0])
    dist.all_reduce(yes, Op.MAX)
    assert yes.item()
    parts = [torch.empty(1) for _ in range(size)] if rank == 1 else None
    dist.gather(torch.tensor([float(rank)]), parts, dst=1)
    if parts is not None:
        assert torch.cat(parts).tolist() == [float(r) for r in range(size)]
    part = torch.empty(1)
    dist.scatter(part, [r + parts[0] for r in range(size)] if parts else None, src=1)
    assert part.item() == rank


def base_errors(rank: int, size: int) -> None:
    """Wrong arguments of a call that is passed on are told as the base group tells them."""
    group = dist.group.WORLD
    assert group is not None
    base = group._get_backend(torch.device("cpu"))
    one, gather, scatter = torch.zeros(1), dist.GatherOptions(), dist.ScatterOptions()
    gather.rootRank = scatter.rootRank = rank
    wrong: list[Callable[[dist.ProcessGroup | dist.Backend], object]] = [
        lambda it: it.gather([], [one], gather),
        lambda it: it.gather([], [], gather),
        lambda it: it.gather([[one] * (size + 1)], [one], gather),
        lambda it: it.gather([[one.double()] * size], [one], gather),
        lambda it: it.scatter([], [[one] * size], scatter),
        lambda it: it.scatter([one], [], scatter),
        lambda it: it.scatter([one], [[torch.zeros(2)] * size], scatter),
    ]
    for call in wrong:
        said = []
        for it in (base, group):
            try:
                call(it)
            except (RuntimeError, ValueError) as error:
                said.append((type(error), str(error).splitlines()[0]))
        assert len(said) == 2, said
        assert said[0] == said[1], said


def subgroups(rank: int, size: int) -> None:
    pair = [rank, (rank + size // 2) % size]
    groups = {first: dist.new_group([first, first + size // 2]) for first in range(size // 2)}
    ours = torch.full((100,), rank + 1.0)
    dist.all_reduce(ours, group=groups[min(pair)])
    assert ours.tolist() == [sum(pair) + 2.0] * 100
    alone = [dist.new_group([r]) for r in range(size)][rank]
    dist.all_reduce(ours, group=alone)
    assert ours.tolist() == [sum(pair) + 2.0] * 100
    for group in (*groups.values(), alone):
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


def coalesced(rank: int, size: int) -> None:
    expected = torch.stack([values(r + 50, 3, 5) for r in range(size)]).sum(0)
    for by_one_call in (True, False):
        tensors = [values(rank, 7), values(rank + 50, 3, 5), torch.empty(0)]
        if by_one_call:
            dist.all_reduce_coalesced(tensors)
        else:
            with dist.distributed_c10d._coalescing_manager(dist.group.WORLD):
                for tensor in tensors:
                    dist.all_reduce(tensor)
        torch.testing.assert_close(tensors[0], exact(size, 7).float())
        torch.testing.assert_close(tensors[1], expected)


def waited_and_not(rank: int, size: int) -> None:
    """Calls that run in the caller's thread and on the group's keep their order."""
    total = torch.full((3,), float(rank))
    for turn in range(30):
        work = dist.all_reduce(total, Op.AVG, async_op=turn % 3 > 0)
        if turn % 3 == 2:
            assert torch.equal(work.get_future().wait()[0], total)
            work.wait()
            assert torch.equal(work.get_future().wait()[0], total)
            assert total.tolist() == [(size - 1) / 2] * 3
            total.fill_(rank)


def freed(rank: int, size: int) -> None:
    """Gloo's thread frees what nobody holds any more while further calls are made."""
    for turn in range(300):
        dist.broadcast(torch.full((10,), float(turn)), turn % size)
    dist.barrier()


def identical(rank: int, size: int) -> None:
    results = []
    for _ in range(3):
        ours = values(rank, 10_007)
        dist.all_reduce(ours)
        results.append(ours)
    everywhere = [torch.empty(10_007) for _ in range(size)]
    dist.all_gather(everywhere, results[0])
    assert all(torch.equal(other, results[0]) for other in (*everywhere, *results))


def functional(rank: int, size: int) -> None:
    from torch.distributed import _functional_collectives as collectives

    total = collectives.all_reduce(values(rank, 11), "sum", dist.group.WORLD)
    torch.testing.assert_close(collectives.wait_tensor(total), exact(size, 11).float())
    given = [torch.full((3,), float(rank)), torch.full((2,), rank + 0.5)]
    parts = collectives.all_gather_into_tensor_coalesced(given, dist.group.WORLD)
    for part, own in zip(parts, (0.0, 0.5), strict=True):
        expected = torch.arange(size).repeat_interleave(len(part) // size) + own
        assert torch.equal(collectives.wait_tensor(part), expected)
    whole = [values(rank, 2 * size), values(rank + 9, size)]
    kept = collectives.reduce_scatter_tensor_coalesced(whole, "sum", [0, 0], dist.group.WORLD)
    expected = exact(size, 2 * size).float()[2 * rank : 2 * rank + 2]
    torch.testing.assert_close(collectives.wait_tensor(kept[0]), expected)


def sparse(rank: int, size: int) -> None:
    """The base group's, as gradients of embeddings are."""
    ours = torch.sparse_coo_tensor([[rank % 2, 2]], [1.0, float(rank)], (4,))
    dist.all_reduce(ours)
    even = (size + 1) // 2
    assert ours.to_dense().tolist() == [even, size - even, size * (size - 1) / 2, 0]


def groups_own_calls(rank: int, size: int) -> None:
    """What a group is asked by its methods, without options, and with what gloo has or refuses."""
    group, ones = dist.group.WORLD, torch.ones(3)
    parts = [torch.empty(3) for _ in range(size)]
    group.allgather([parts], [ones * rank]).wait()
    assert [part[0].item() for part in parts] == list(range(size))
    group.reduce_scatter([ones], [[torch.full((3,), float(r)) for r in range(size)]]).wait()
    assert ones.tolist() == [rank * size] * 3
    whole = torch.empty(3 * size)
    group._allgather_base(whole, ones).wait()
    assert whole[::3].tolist() == [r * size for r in range(size)]
    many = group.all_gather_single_coalesced([whole, torch.empty(size)], [ones, ones[:1].clone()])
    assert [len(tensor) for tensor in many.get_future().wait()] == [3 * size, size]
    assert many.is_completed()
    group.monitored_barrier(timedelta(seconds=30), False)
    group.barrier().wait()
    for wrong in (
        lambda: group.allreduce([]),
        lambda: group.allgather([parts], []),
        lambda: group.allgather([parts[1:]], [ones]),
        lambda: group.allgather([parts], [ones[:2]]),
        lambda: group.reduce_scatter([], [parts]),
        lambda: group.allreduce_coalesced([ones, ones.double()]),
    ):
        refusal(wrong)


def in_a_profile(rank: int, size: int) -> None:
    """A call is one event, which ends with it; the end of the profile waits for none."""
    data, parts = values(rank, 8, size), [torch.empty(8, size) for _ in range(size)]
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        dist.all_reduce(data)
        dist.all_reduce(data, async_op=True).wait()
        dist.reduce_scatter_single(torch.empty(8), data.view(-1))
        dist.all_gather(parts, data)
        with dist.record_comm("gradients: all"):
            dist.all_reduce(data)
        dist.broadcast(data, 0)
        dist.barrier()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    events = [event for event in events if ":" in event.name and "::" not in event.name]
    assert [(event.name, event.input_shapes) for event in events] == [
        ("gentree:all_reduce", [[8, size]]),
        ("gentree:all_reduce", [[8, size]]),
        ("gentree:reduce_scatter", [[8 * size]]),
        ("gentree:all_gather", [[8, size]]),
        ("gradients: all", []),
        ("gloo:broadcast", [[8, size]]),
        ("gloo:barrier", []),
    ], [(event.name, event.input_shapes) for event in events]
    assert all(event.is_async for event in events)
    for event, following in pairwise(events[:4]):
        assert event.time_range.end <= following.time_range.start
    ours = torch.full((9,), float(rank))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        if rank == 0:
            time.sleep(0.2)
        work = dist.all_reduce(ours, async_op=True)
    work.wait()
    assert ours.tolist() == [size * (size - 1) / 2] * 9
    assert [e.name for e in profile.events() if "gentree" in e.name] == ["gentree:all_reduce"]


def behind_a_barrier(rank: int, size: int) -> None:
    for both_wait in (False, True):
        many = [torch.full((200_000,), rank + 1.0) for _ in range(8)]
        works = [dist.all_reduce(tensor, async_op=True) for tensor in many]
        met = dist.barrier(async_op=both_wait)
        if met is not None:
            met.wait()
        assert all(work.is_completed() for work in works)
        assert {tensor[-1].item() for tensor in many} == {size * (size + 1) / 2}


def late_but_in_time(rank: int, size: int) -> None:
    if rank == 1:
        time.sleep(1)
    sums(rank, size)


def told_otherwise(rank: int, size: int) -> None:
    """No group is made where one rank is told otherwise than the others."""
    for variable, value, told in (
        ("TRIMTAB_HOST", "h9", "rank 1 runs on 'h9', which is no node of two-racks"),
        ("TRIMTAB_GENTREE_ALWAYS", "0", "rank 1 on h1 plans for another network"),
        ("TRIMTAB_GENTREE_TOPOLOGY", "", "rank 1 on h1 plans for another network"),
    ):
        kept = os.environ[variable]
        if rank == 1:
            os.environ[variable] = value
        refused = refusal(dist.new_group)
        os.environ[variable] = kept
        assert told in refused, refused


def ends_its_threads(rank: int, size: int) -> None:
    before = set(threading.enumerate())
    group, seen = dist.new_group(), []
    future = dist.all_reduce(torch.ones(3), group=group, async_op=True).get_future()

    def later(future: object) -> None:
        time.sleep(0.3)
        total = torch.ones(3)
        dist.all_reduce(total, group=group)
        seen.append(total[0].item())

    future.add_done_callback(later)
    group_threads = set(threading.enumerate()) - before
    assert {thread.name for thread in group_threads} >= {"trimtab-plans"}
    dist.destroy_process_group(group)
    assert seen == [size], "a callback was cut off"
    assert not any(thread.is_alive() for thread in group_threads)
    assert set(threading.enumerate()) <= before
    assert "destroyed" in refusal(lambda: group.allreduce(torch.ones(3)))


if __name__ == "__main__":
    main()
