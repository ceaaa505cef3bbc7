"""One rank whose planned collectives go the way of CUDA tensors; rank 0 prints what is right.

On GPUs: `torchrun --nproc-per-node 4 integration_tests/gentree/cuda_rank.py`. Without any, CPU
tensors are taken for a GPU's, and gloo for NCCL.
"""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trimtab.hosts.torch import planned_group
from trimtab.hosts.torch.device_runner import DevicePlanRunner

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if GPU else torch.device("cpu")
Op = dist.ReduceOp
calls: list[int] = []


def main() -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_a_network(rank, size)
    if GPU:
        torch.cuda.set_device(DEVICE)
    else:
        planned_group._is_on_gpu = lambda tensor: True
    run = DevicePlanRunner.run
    DevicePlanRunner.run = lambda *a, **more: (calls.append(1), run(*a, **more))[1]
    dist.init_process_group("gentree", timeout=timedelta(seconds=60))
    for check in (sums, operations, shapes, futures, parts, coalesced, passed_on, unwaited):
        before = len(calls)
        check(rank, size)
        dist.barrier()
        assert (len(calls) > before) == (check is not passed_on), "the device's runner had no part"
        if rank == 0:
            print(f"right: {check.__name__}", flush=True)
    dist.destroy_process_group()
    os.unlink(os.environ["TRIMTAB_GENTREE_TOPOLOGY"])


def on_a_network(rank: int, size: int) -> None:
    """Each rank is a host of its own, in one of two racks."""
    nodes = "".join(f"  - {{name: h{r}, device: cpu}}\n" for r in range(size))
    ends = [(f"h{r}", ("left", "right")[r % 2]) for r in range(size)]
    ends += [("left", "core"), ("right", "core")]
    links = "".join(f"  - {{a: {a}, b: {b}, bandwidth_bytes_per_s: 1 Gb/s}}\n" for a, b in ends)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
        file.write(f"name: racks\nnodes:\n{nodes}switches: [left, right, core]\nlinks:\n{links}")
    os.environ |= {
        "TRIMTAB_GENTREE_TOPOLOGY": file.name,
        "TRIMTAB_GENTREE_ALWAYS": "1",
        "TRIMTAB_GENTREE_CUDA": "1",
        "TRIMTAB_HOST": f"h{rank}",
        "LOCAL_RANK": "0",
    }


def values(rank: int, *shape: int) -> torch.Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(rank))
    return drawn.to(DEVICE)


def exact(size: int, *shape: int) -> torch.Tensor:
    return torch.stack([values(r, *shape).double() for r in range(size)]).sum(0)


def near(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def sums(rank: int, size: int) -> None:
    for length in (0, 1, size - 1, 37, 100_001):
        results = []
        for _ in range(2):
            ours = values(rank, length)
            dist.all_reduce(ours)
            near(ours, exact(size, length))
            results.append(ours)
        everywhere = [torch.empty_like(ours) for _ in range(size)]
        dist.all_gather(everywhere, ours)
        assert all(torch.equal(other, ours) for other in (*everywhere, *results))
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64):
        ours = torch.full((41,), rank + 1, dtype=dtype, device=DEVICE)
        dist.all_reduce(ours)
        assert ours.tolist() == [size * (size + 1) // 2] * 41, dtype


def operations(rank: int, size: int) -> None:
    for op, value in ((Op.AVG, (size + 1) / 2), (Op.MIN, 1), (Op.MAX, size)):
        ours = torch.full((23,), rank + 1.0, device=DEVICE)
        dist.all_reduce(ours, op)
        assert ours.tolist() == [value] * 23, op
    ours = torch.full((9,), rank % 2 + 1.0, device=DEVICE)
    dist.all_reduce(ours, Op.PRODUCT)
    assert ours.tolist() == [2.0 ** (size // 2)] * 9


def shapes(rank: int, size: int) -> None:
    base = values(rank, 12, 14)
    strided = base.t()[::2]
    dist.all_reduce(strided)
    near(strided, exact(size, 12, 14).t()[::2])
    assert torch.equal(base[:, 1], values(rank, 12, 14)[:, 1])


def futures(rank: int, size: int) -> None:
    many = [values(rank + 10 * index, 5000) for index in range(4)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in many]
    halves = [work.get_future().then(lambda f: f.value()[0] / 2) for work in works]
    for index, (work, half) in enumerate(zip(works, halves, strict=True)):
        work.wait()
        expected = torch.stack([values(r + 10 * index, 5000).double() for r in range(size)])
        near(many[index], expected.sum(0))
        near(half.wait(), many[index].double() / 2)


def parts(rank: int, size: int) -> None:
    for length in (0, 1, 6, 1001):
        whole, ours = values(rank, size * length), torch.empty(length, device=DEVICE)
        expected = exact(size, size * length)[rank * length : (rank + 1) * length]
        dist.reduce_scatter_single(ours, whole)
        near(ours, expected)
        dist.reduce_scatter(ours.zero_(), list(whole.view(size, length)), Op.AVG)
        near(ours, expected / size)
        gathered = torch.empty(size * length, device=DEVICE)
        dist.all_gather_single(gathered, values(rank, length))
        assert torch.equal(gathered, torch.cat([values(r, length) for r in range(size)]))


def coalesced(rank: int, size: int) -> None:
    tensors = [values(rank, 7), values(rank + 50, 3, 5), torch.empty(0, device=DEVICE)]
    dist.all_reduce_coalesced(tensors)
    near(tensors[0], exact(size, 7))
    near(tensors[1], torch.stack([values(r + 50, 3, 5).double() for r in range(size)]).sum(0))


def passed_on(rank: int, size: int) -> None:
    """What has no plan, and what NCCL alone knows how to do, is the base group's."""
    ours = torch.full((3,), float(rank), device=DEVICE)
    dist.broadcast(ours, 1)
    assert ours.tolist() == [1.0] * 3
    gathered = torch.empty(size, dtype=torch.bool, device=DEVICE)
    dist.all_gather_single(gathered, torch.tensor([rank == 1], device=DEVICE))
    assert gathered.tolist() == [r == 1 for r in range(size)]


def unwaited(rank: int, size: int) -> None:
    """Memory that the caller frees at once is not written by its next tensors."""
    works: list[Any] = []
    kept = []
    for turn in range(20):
        given = torch.full((50_000,), float(rank + turn), device=DEVICE)
        ours = torch.empty(size * 50_000, device=DEVICE)
        works.append(dist.all_gather_single(ours, given, async_op=True))
        kept.append(ours)
        del given
        torch.full((50_000,), -1.0, device=DEVICE)
    for turn, (work, ours) in enumerate(zip(works, kept, strict=True)):
        work.wait()
        expected = torch.arange(size, device=DEVICE).repeat_interleave(50_000) + turn
        assert torch.equal(ours, expected.float())


if __name__ == "__main__":
    main()
