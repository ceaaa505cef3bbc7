"""Data-parallel training over gloo and over other backends, a step of each in turns.

Each rank is run as ``python -m trimtab.hosts.testbed.training_job TASK`` with its number in
``RANK``, where TASK is a JSON file (`Task`). A step's time is that of the slowest rank. The first
rank prints one JSON line (`Step`) for each step that is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from trimtab.core.documents import Document
from trimtab.hosts.testbed.ranked_job import GLOO, RankedTask, printed, run_rank

if TYPE_CHECKING:
    import torch

LAYERS = 4
BATCH = 8

Kind = Literal["ddp", "zero1"]
"""torch's DistributedDataParallel with SGD, or DeepSpeed's ZeRO-1 with Adam."""


class Task(RankedTask):
    """What is run.

    Attributes:
        kinds: of training, one after the other.
        width: of the network's layers.
        steps: how many are timed, after one that is not.
    """

    kinds: tuple[Kind, ...]
    width: PositiveInt = 512
    steps: PositiveInt = 4
    timeout_s: PositiveInt = 120


class Step(Document):
    """One step.

    Attributes:
        kind: of training.
        backend: that it went over.
        seconds: of the slowest rank.
        loss: the mean of all ranks.
    """

    kind: Kind
    backend: str
    seconds: float
    loss: float


def _steps(task: Task, rank: int) -> Iterator[Step]:
    import torch
    from torch import distributed

    from trimtab.hosts.torch.timing import timed

    groups: dict[str, Any] = {GLOO: distributed.group.WORLD}
    groups |= {name: distributed.new_group(backend=name) for name in task.backends}
    for kind in task.kinds:
        trained = {name: TRAINERS[kind](task, group) for name, group in groups.items()}
        batches = torch.Generator().manual_seed(rank)
        for number in range(task.steps + 1):
            given = torch.randn(BATCH, task.width, generator=batches)
            for name, step in trained.items():
                took_s, loss = timed(partial(step, given))
                mean = torch.tensor(loss, dtype=torch.float64)
                distributed.all_reduce(mean)
                if number:
                    yield Step(
                        kind=kind,
                        backend=name,
                        seconds=took_s,
                        loss=mean.item() / task.ranks,
                    )


def _network(task: Task) -> torch.nn.Module:
    """The same network on every rank and for every backend."""
    import torch

    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for _ in range(LAYERS):
        layers += [torch.nn.Linear(task.width, task.width), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers)


def _ddp(task: Task, group: Any) -> Callable[[torch.Tensor], float]:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    net = DistributedDataParallel(_network(task), process_group=group)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(given: torch.Tensor) -> float:
        loss = torch.nn.functional.mse_loss(net(given), given.flip(1))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        return loss.item()

    return step


def _zero1(task: Task, group: Any) -> Callable[[torch.Tensor], float]:
    import deepspeed
    import torch

    # Its shared-memory reduction would be compiled first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    net = _network(task)
    engine, *_ = deepspeed.initialize(
        model=net,
        optimizer=torch.optim.Adam(net.parameters(), lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": BATCH,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
        },
        mpu=_DataParallel(group),
    )

    def step(given: torch.Tensor) -> float:
        loss = torch.nn.functional.mse_loss(engine(given), given.flip(1))
        engine.backward(loss)
        engine.step()
        return float(loss.item())

    return step


TRAINERS: dict[Kind, Callable[[Task, Any], Callable[[torch.Tensor], float]]] = {
    "ddp": _ddp,
    "zero1": _zero1,
}


@dataclass(frozen=True)
class _DataParallel:
    """What DeepSpeed asks for its groups: the one of data parallelism, and no other parallelism."""

    group: Any

    def get_data_parallel_group(self) -> Any:
        return self.group

    def get_data_parallel_rank(self) -> int:
        return int(self.group.rank())

    def get_data_parallel_world_size(self) -> int:
        return int(self.group.size())

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1


def steps(lines: Iterable[str]) -> Iterator[Step]:
    """What the job prints, line by line; DeepSpeed logs beside it."""
    return printed((line for line in lines if line.startswith("{")), Step)


if __name__ == "__main__":
    run_rank(Task, _steps)
