"""Plans on devices: by NCCL's rules in one process, and over gloo with real ones."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.collectives import Layout, Schedule
from trimtab.core.collectives.combine import exchange, folded, ring, staged
from trimtab.hosts.torch.device_runner import (
    CudaStream,
    DevicePlanRunner,
    DeviceWork,
    HostStream,
    device_sum,
)
from trimtab.hosts.torch.plan_runner import Cuts, PlannedRank, adding

pytestmark = pytest.mark.integration

HOST = torch.device("cpu")
WAIT_S = 20.0


def whole(count: int) -> list[Layout]:
    return [Layout.whole(rank) for rank in range(count)]


@st.composite
def plans(draw: st.DrawFn, most: int = 9) -> Schedule:
    """Stages, folds, rings and uneven parts, in chunks."""
    count = draw(st.integers(2, most))
    kind = draw(st.sampled_from(["staged", "one-shot", "folded", "ring", "uneven"]))
    factors = draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))
    if kind == "ring":
        steps = [ring(whole(count))[0]]
    elif kind == "uneven":
        shares = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
        steps = [exchange(whole(count), [float(share) for share in shares])[0]]
    elif kind == "one-shot":
        steps = staged(whole(count), factors[:2], 1)[0]
    elif kind == "folded" and count > 2:
        extras = range(1, 2 * draw(st.integers(1, (count - 1) // 2)), 2)
        steps = folded(whole(count), extras, factors)[0]
    else:
        steps = staged(whole(count), factors)[0]
    return Schedule.of(count, steps, draw(st.integers(1, 5)))


class Recorder:
    """A base group that writes down what each batch of a rank holds, and moves nothing."""

    supports_coalescing = True

    def __init__(self) -> None:
        self.batches: list[list[tuple[str, int, int]]] = []

    def _start_coalescing(self) -> None:
        self.batches.append([])

    def _end_coalescing(self) -> Recorder:
        return self

    def wait(self) -> None:
        pass

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self.batches[-1].append(("send", peer, tensors[0].numel()))

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self.batches[-1].append(("recv", peer, tensors[0].numel()))


@settings(deadline=None, max_examples=60)
@given(plans(), st.integers(0, 300))
def test_batches_meet_without_tags_and_all_end(schedule: Schedule, length: int) -> None:
    """A rank posts a batch once all messages of the one before have met their other side."""
    size, left = schedule.ranks, []
    for rank in range(size):
        base = Recorder()
        DevicePlanRunner(base, HOST).run(
            PlannedRank(schedule, rank).turns,
            torch.zeros(length),
            device_sum(),
            call=1,
            chunks=schedule.chunks,
        )
        left.append(base.batches)

    # By their order alone: the n-th message that is sent on a way meets the n-th that is taken.
    posted: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    over = [-1] * size

    def post(rank: int) -> None:
        """Ends a batch, and posts the next one."""
        over[rank] += 1
        for kind, peer, numel in left[rank][over[rank]] if over[rank] < len(left[rank]) else ():
            posted[_way(kind, rank, peer)].append(numel)

    def met(rank: int) -> bool:
        """Whether every message of the rank's current batch, and so all before, have met."""
        return all(
            len(posted[_way(kind, rank, peer)]) <= len(posted[_way(_OTHER[kind], peer, rank)])
            for kind, peer, _ in left[rank][over[rank]]
        )

    for rank in range(size):
        post(rank)
    while ready := [r for r in range(size) if over[r] < len(left[r]) and met(r)]:
        for rank in ready:
            post(rank)
    assert over == [len(batches) for batches in left]
    for (kind, a, b), numels in posted.items():
        assert numels == posted.get((_OTHER[kind], a, b)), (kind, a, b)


_OTHER = {"send": "recv", "recv": "send"}


def _way(kind: str, rank: int, peer: int) -> tuple[str, int, int]:
    return (kind, rank, peer) if kind == "send" else (kind, peer, rank)


@settings(deadline=None, max_examples=40)
@given(plans(), st.integers(1, 300))
def test_both_sides_of_a_wave_name_its_messages_in_one_order(schedule, length) -> None:
    """By their numbers among all messages of the two ranks, which tags are made of elsewhere."""
    count = min(schedule.chunks, length)
    sent, received = defaultdict(list), defaultdict(list)
    for rank in range(schedule.ranks):
        for wave in Cuts().waves(PlannedRank(schedule, rank).turns, length, count):
            for chunk, turn in wave:
                for m in turn.sends:
                    sent[rank, m.peer].append((chunk, m.slot, m.end - m.begin))
                for m in turn.receives:
                    received[m.peer, rank].append((chunk, m.slot, m.end - m.begin))
    assert sent == received


class Rendezvous:
    """Messages as NCCL moves them: by their order alone, read when the receiver takes them."""

    def __init__(self) -> None:
        self.ways: dict[tuple[int, int], queue.Queue[Any]] = defaultdict(queue.Queue)


class LikeNccl:
    """The base group of one rank: a batch is over when all of its messages are."""

    supports_coalescing = True

    def __init__(self, meeting: Rendezvous, rank: int) -> None:
        self._ways, self._rank = meeting.ways, rank
        self._receives: list[tuple[queue.Queue[Any], torch.Tensor]] = []
        self._taken: list[threading.Event] = []
        self.posts = self.singles = 0

    def allreduce(self, tensors: list[torch.Tensor]) -> LikeNccl:
        self.singles += 1
        return self

    def _start_coalescing(self) -> None:
        assert not self._receives, "the batch before was not waited for"
        assert not self._taken, "the batch before was not waited for"
        self.posts += 1

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        assert tensors[0].is_contiguous()
        taken = threading.Event()
        self._ways[self._rank, peer].put((tensors[0], taken))
        self._taken.append(taken)

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self._receives.append((self._ways[peer, self._rank], tensors[0]))

    def _end_coalescing(self) -> LikeNccl:
        return self

    def wait(self) -> None:
        for way, into in self._receives:
            came, taken = way.get(timeout=WAIT_S)
            assert came.shape == into.shape
            into.copy_(came)
            taken.set()
        assert all(taken.wait(WAIT_S) for taken in self._taken)
        self._receives, self._taken = [], []


def on_threads(size: int, run: Callable[[int, LikeNccl], Any]) -> list[Any]:
    meeting, results = Rendezvous(), [None] * size
    for pair in [(a, b) for a in range(size) for b in range(size)]:
        meeting.ways[pair]  # made here: threads would race for it

    def one(rank: int) -> None:
        results[rank] = run(rank, LikeNccl(meeting, rank))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@settings(deadline=None, max_examples=15)
@given(plans(most=6), st.sampled_from([0, 1, 7, 100]), st.sampled_from(["float32", "bfloat16"]))
def test_what_comes_out_is_the_sum_on_every_rank(schedule, length, name) -> None:
    size, dtype = schedule.ranks, getattr(torch, name)
    given = [
        torch.randn(length, generator=torch.Generator().manual_seed(r)).to(dtype)
        for r in range(size)
    ]

    def run(rank: int, base: LikeNccl) -> torch.Tensor:
        runner, data = DevicePlanRunner(base, HOST), given[rank].clone()
        turns = PlannedRank(schedule, rank).turns
        for _ in range(2):
            data.copy_(given[rank])
            work = runner.submit(
                [data],
                [data],
                lambda: runner.run(turns, data, device_sum(), call=3, chunks=schedule.chunks),
            )
            assert work.wait()
            runner.join()
        assert base.singles == 1
        return data

    results = on_threads(size, run)
    assert all(torch.equal(result, results[0]) for result in results)
    exact = torch.stack([g.double() for g in given]).sum(0)
    bound = torch.stack([g.double().abs() for g in given]).sum(0) * torch.finfo(dtype).eps * size
    assert ((results[0].double() - exact).abs() <= bound).all()


def test_a_sum_adds_in_the_order_of_the_cpu_path() -> None:
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for rows in (1, 2, 4):
            own = torch.randn(33, generator=generator).to(dtype)
            come = torch.randn(rows, 33, generator=generator).to(dtype)
            theirs = own.clone()
            device_sum()(own, come)
            adding(torch.Tensor.add_, fused=True)(theirs, come)
            assert torch.equal(own, theirs)


class Later(HostStream):
    """A stream that is never done until told."""

    def __init__(self) -> None:
        self.done, self.waited = False, 0

    def query(self) -> bool:
        return self.done

    def wait_for(self, end: Any) -> None:
        self.waited += 1


def test_waiting_is_the_streams_and_with_a_timeout_the_hosts_too() -> None:
    stream = Later()
    work = DeviceWork([torch.ones(2)], stream, stream)
    assert work.wait()
    assert stream.waited == 1
    assert not work.is_completed()
    with pytest.raises(RuntimeError, match="not done after"):
        work.wait(timedelta(seconds=0.01))
    assert stream.waited == 1
    stream.done = True
    assert work.wait(timedelta(seconds=5))
    assert work.get_future().wait()[0].tolist() == [1.0, 1.0]
    assert work.get_future() is work.get_future()


class Seen:
    """A stream or a tensor of a GPU there is none of: says what is asked of it."""

    def __init__(self, said: list[str], name: str) -> None:
        self._said, self._name = said, name

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def called(*given: Any) -> Any:
            self._said.append(" ".join([self._name, method, *map(str, given)]))
            return Seen(self._said, "event") if method == "record_event" else None

        return called

    def __str__(self) -> str:
        return self._name


def test_a_call_is_behind_its_caller_and_before_who_waits_and_keeps_its_tensors(monkeypatch):
    said: list[str] = []

    @contextmanager
    def current(stream: Seen) -> Iterator[None]:
        said.append(f"into {stream}")
        yield
        said.append("back")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Seen(said, "own"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Seen(said, "caller"))
    monkeypatch.setattr(torch.cuda, "stream", current)
    stream = CudaStream(torch.device("cuda", 0))
    with stream.behind_caller([Seen(said, "tensor")]):
        said.append("run")
        end = stream.mark()
    stream.wait_for(end)
    assert said == [
        "own wait_stream caller",
        "tensor record_stream own",
        "into own",
        "run",
        "own record_event",
        "back",
        "caller wait_event event",
    ]


def test_the_groups_collectives_go_that_way_where_it_is_switched_on(job) -> None:
    shown = job("cuda_rank.py", told=False)
    assert [status for status, _, _ in shown] == [0] * 4, shown
    assert shown[0][1].splitlines() == [
        f"right: {name}"
        for name in (
            "sums",
            "operations",
            "shapes",
            "futures",
            "parts",
            "coalesced",
            "passed_on",
            "unwaited",
        )
    ]


def test_real_processes_come_to_the_bits_of_the_cpu_path(job) -> None:
    shown = job("device_rank.py", ranks=3, told=False)
    assert [status for status, _, _ in shown] == [0] * 3, shown
    assert shown[0][1].splitlines() == [
        f"right: {name}" for name in ("staged", "folded", "ring", "uneven", "phases")
    ]
