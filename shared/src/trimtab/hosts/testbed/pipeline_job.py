"""A small DP x PP training job over gloo, timed under several orders of its hosts.

Run on each host as ``python -m trimtab.hosts.testbed.pipeline_job TASK``, where TASK is a JSON file
(`Task`). For each order the job starts anew with the ranks numbered in it, as a launcher would
number them. The first host of the first order prints one JSON line (`Timing`) for each.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from trimtab.core.documents import Document, read_json

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

FIRST_PORT = 29600
BATCH = 16
LEARNING_RATE = 0.01


class Task(Document):
    """What is run.

    Attributes:
        orders: hosts by rank, one order for each run of the job.
        pipeline: stages; as many ranks share each stage as there are hosts for it.
        width: of a stage's matrix; its gradient has 4 bytes for each of width x width elements.
        micro_batches: of a step; the activations of each have 4 bytes x 16 x width.
        steps: that are timed, after one that is not.
        timeout_s: of each operation of the job.
    """

    orders: tuple[tuple[str, ...], ...]
    pipeline: PositiveInt = 2
    width: PositiveInt = 512
    micro_batches: PositiveInt = 4
    steps: PositiveInt = 3
    timeout_s: PositiveInt = 60

    @property
    def replicas(self) -> int:
        """Data parallel degree."""
        return len(self.orders[0]) // self.pipeline

    @property
    def gradient_bytes(self) -> int:
        """Bytes that a rank sends in a ring all-reduce of its gradient."""
        return 2 * 4 * self.width**2 * (self.replicas - 1) // self.replicas

    @property
    def activation_bytes(self) -> int:
        """Bytes that a rank sends to a neighbouring stage in a step."""
        return 4 * BATCH * self.width * self.micro_batches


class Timing(Document):
    """What one order took.

    Attributes:
        step_s: median time of a step, of the slowest rank.
        loss: after the last step; the same whatever the order.
    """

    step_s: float
    loss: float


@dataclass(frozen=True)
class Stage:
    """One rank's part of the model, with its neighbours.

    Attributes:
        layer: a square matrix.
        before: the rank of the stage before; None for the first.
        after: the rank of the stage behind; None for the last.
        replica: which part of the data it gets.
    """

    layer: torch.nn.Linear
    before: int | None
    after: int | None
    replica: int


def main() -> None:
    """Runs this host's part of the task."""
    task = read_json(Path(sys.argv[1]), Task)
    own = socket.gethostname()
    for number, order in enumerate(task.orders):
        timing = _run(task, order, order.index(own), FIRST_PORT + number)
        if own == task.orders[0][0]:
            print(timing.model_dump_json(), flush=True)


def _run(task: Task, order: tuple[str, ...], rank: int, port: int) -> Timing:
    """The job from its start to its end, with the ranks in one order."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group(
        "gloo",
        init_method=f"tcp://{order[0]}:{port}",
        rank=rank,
        world_size=len(order),
        timeout=timedelta(seconds=task.timeout_s),
    )
    try:
        mesh = init_device_mesh("cpu", (task.pipeline, task.replicas), mesh_dim_names=("pp", "dp"))
        timing = _timed(task, _stage(task, mesh), mesh)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
    return timing


def _stage(task: Task, mesh: DeviceMesh) -> Stage:
    import torch

    at, replica = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    ranks = mesh.mesh[:, replica].tolist()
    torch.manual_seed(at)  # the replicas of a stage begin alike
    return Stage(
        layer=torch.nn.Linear(task.width, task.width, bias=False),
        before=ranks[at - 1] if at else None,
        after=ranks[at + 1] if at + 1 < task.pipeline else None,
        replica=replica,
    )


def _timed(task: Task, stage: Stage, mesh: DeviceMesh) -> Timing:
    import torch
    from torch import distributed

    seconds: list[float] = []
    loss = 0.0
    for number in range(task.steps + 1):
        distributed.barrier()
        begin = time.perf_counter()
        loss = _step(task, stage, mesh, number)
        seconds.append(time.perf_counter() - begin)
    slowest = torch.tensor(seconds[1:])
    distributed.all_reduce(slowest, op=distributed.ReduceOp.MAX)
    total = torch.tensor(loss, dtype=torch.float64)
    distributed.all_reduce(total)
    return Timing(step_s=median(slowest.tolist()), loss=total.item())


def _step(task: Task, stage: Stage, mesh: DeviceMesh, number: int) -> float:
    """All micro-batches forward, then all backward, then the gradients reduced and applied.

    Returns:
        The loss of this rank's data; 0 where it has not the last stage.
    """
    import torch
    from torch import distributed

    loss = 0.0
    flown = [_forward(task, stage, data) for data in _inputs(task, stage, number)]
    for entered, left in reversed(flown):
        if stage.after is None:
            value = left.square().mean()
            loss += value.item()
            value.backward()  # type: ignore[no-untyped-call]
        else:
            received = torch.empty_like(left)
            distributed.recv(received, stage.after)
            left.backward(received)  # type: ignore[no-untyped-call]
        if stage.before is not None:
            assert entered.grad is not None
            distributed.send(entered.grad, stage.before)
    _descend(task, stage, mesh)
    return loss


def _inputs(task: Task, stage: Stage, number: int) -> Iterator[torch.Tensor]:
    """The first stage's data, the same for a replica and a step in every run; others' buffers."""
    import torch

    generator = torch.Generator().manual_seed(1000 * number + stage.replica)
    for _ in range(task.micro_batches):
        shape = (BATCH, task.width)
        yield (
            torch.randn(shape, generator=generator) if stage.before is None else torch.empty(shape)
        )


def _forward(task: Task, stage: Stage, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One micro-batch through the stage: what came in and what went out."""
    from torch import distributed

    if stage.before is not None:
        distributed.recv(data, stage.before)
    entered = data.requires_grad_()
    left = stage.layer(entered).tanh()
    if stage.after is not None:
        distributed.send(left.detach(), stage.after)
    return entered, left


def _descend(task: Task, stage: Stage, mesh: DeviceMesh) -> None:
    import torch
    from torch import distributed

    gradient = stage.layer.weight.grad
    assert gradient is not None
    distributed.all_reduce(gradient, group=mesh.get_group("dp"))
    with torch.no_grad():
        stage.layer.weight -= LEARNING_RATE / task.replicas * gradient
    stage.layer.weight.grad = None


def timings(lines: Iterator[str]) -> Iterator[Timing]:
    """What the job prints, line by line."""
    return (Timing.model_validate(json.loads(line)) for line in lines)


if __name__ == "__main__":
    main()
