"""A training job: its parallelism, the groups of ranks that follow, and what each group sends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from trimtab.core.documents import Document, InvalidValue, parse_yaml, read_text, validate
from trimtab.core.errors import BadInput
from trimtab.core.model import ModelSpec
from trimtab.core.units import Bytes, BytesPerSecond, FlopPerSecond
from trimtab.placement.measurements import Overlap, StepTimes
from trimtab.placement.volumes import Shape, TrainingStep, Volumes, step_volumes

Order = Literal["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"]
"""How ranks are numbered, the fastest first. The first is the default of DeepSpeed (model inside
data inside pipe) and Megatron; the second is Megatron's ``--use-tp-pp-dp-mapping``."""

GroupKind = Literal["tensor", "context", "expert", "data", "pipeline"]

Ranks = npt.NDArray[np.int64]
"""Groups of ranks, each ascending; shape (groups, ranks of a group)."""

_ElementBytes = Annotated[Bytes, Field(gt=0, le=64)]


def _weight(value: object) -> object:
    """A weight as people write it, so that a wrong one is told all that would be right."""
    number: object = value
    if isinstance(value, str) and value != "auto":
        try:
            number = float(value)
        except ValueError:
            number = None
    known = isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= 1
    if value == "auto" or known:
        return number
    raise ValueError("give a weight from 0 (only pipelines count) to 1, or auto")


@dataclass(frozen=True, slots=True)
class JobGrid:
    """The job as a grid of nodes; rows are node-replicas and columns pipeline stages.

    Attributes:
        rows: ``m`` in the paper.
        columns: ``n``.
        block: rows that belong together, since a tensor, context or expert group spans them.
        stage_major: whether node ranks go down the columns, else along the rows.
    """

    rows: int
    columns: int
    block: int
    stage_major: bool

    @property
    def nodes(self) -> int:
        """Nodes that the job needs."""
        return self.rows * self.columns

    def node_rank(self, row: int, column: int) -> int:
        """The node rank of a cell."""
        if self.stage_major:
            return column * self.rows + row
        # A block's nodes hold one stage after another.
        block, inside = divmod(row, self.block)
        return (block * self.columns + column) * self.block + inside


class TrainingJob(Document):
    """A training job, and the content of a job file.

    Attributes:
        name: what people call it.
        tensor_parallel, pipeline_parallel, context_parallel: degrees.
        data_parallel: its degree; None for as many replicas as a fixed allocation holds.
        expert_parallel: ranks that share the experts; a part of data times context parallelism.
        gpus_per_node: devices that the job uses on each node.
        order: how ranks are numbered.
        model: a Hugging Face ``config.json`` or its folder, relative to the job file.
        shape: the model's shape, where there is no such file.
        volumes: bytes that each rank sends in a step, where they are known better.
        overlap: measured shares of communication that compute hides, for ``alpha: auto``.
        step_times: measured with groups aligned and not; ``alpha: auto`` follows from them alone.
        flop_per_s: of a rank, as achieved; the default is an H800 at two fifths of its peak.
        bandwidth_bytes_per_s: of a rank to other nodes; the default is the paper's adapter for each
            device, 400 Gb/s.
        micro_batch: sequences in a micro-batch.
        global_batch: sequences in a step; None for as many micro-batches as keep the pipeline busy.
        sequence_length: tokens of a sequence.
        zero_stage: of DeepSpeed's ZeRO; 3 for FSDP.
        virtual_stages: chunks of layers on each pipeline rank.
        parameter_bytes, gradient_bytes, activation_bytes: of one element on the network.
        sequence_parallel: whether tensor ranks send only their part of activations.
        alpha: the weight of data parallel groups; the pipeline's is the rest.
        spares_per_pod: nodes kept free in each pod the job touches.
    """

    name: str = "job"
    tensor_parallel: PositiveInt = 1
    pipeline_parallel: PositiveInt = 1
    data_parallel: PositiveInt | None = None
    expert_parallel: PositiveInt = 1
    context_parallel: PositiveInt = 1
    gpus_per_node: PositiveInt = 8
    order: Order = "tp-cp-ep-dp-pp"
    model: str | None = None
    shape: Shape | None = None
    volumes: Volumes | None = None
    overlap: Overlap | None = None
    step_times: StepTimes | None = None
    flop_per_s: FlopPerSecond = Field(4e14, ge=1, le=1e20)
    bandwidth_bytes_per_s: BytesPerSecond = Field(50e9, ge=1, le=1e15)
    micro_batch: PositiveInt = 1
    global_batch: PositiveInt | None = None
    sequence_length: PositiveInt = 4096
    zero_stage: Literal[0, 1, 2, 3] = 1
    virtual_stages: PositiveInt = 1
    parameter_bytes: _ElementBytes = 2.0
    gradient_bytes: _ElementBytes = 2.0
    activation_bytes: _ElementBytes = 2.0
    sequence_parallel: bool = True
    alpha: Annotated[Literal["auto"] | float, BeforeValidator(_weight)] = "auto"
    spares_per_pod: NonNegativeInt = 0

    @model_validator(mode="after")
    def _consistent(self) -> TrainingJob:
        self._check_parallelism()
        self._check_batch()
        self._check_layers()
        self._check_measurements()
        return self

    def _check_parallelism(self) -> None:
        if not self.stage_major and self.expert_parallel not in (1, self.context_parallel):
            raise InvalidValue(
                f"expert_parallel is {self.expert_parallel} in the order {self.order}",
                at=("expert_parallel",),
                fix="experts need the order tp-cp-ep-dp-pp, as in Megatron",
            )
        if self.data_parallel is None:
            return
        replicas = self.data_parallel * self.context_parallel
        if replicas % self.expert_parallel:
            raise InvalidValue(
                f"expert_parallel is {self.expert_parallel}",
                at=("expert_parallel",),
                fix=f"it must divide data_parallel x context_parallel, {replicas}",
            )
        self._check_nodes()

    def _check_nodes(self) -> None:
        gpus, wide = self.gpus_per_node, self.tensor_parallel
        if self.world_size <= gpus:
            return
        if gpus % wide and wide % gpus:
            raise InvalidValue(
                f"tensor_parallel is {wide} on nodes of {gpus} devices",
                at=("tensor_parallel",),
                fix="one of them must divide the other",
            )
        line = self._line
        if line % gpus and gpus % line:
            what, parts = (
                ("data_parallel", "tensor, context and data")
                if self.stage_major
                else ("pipeline_parallel", "tensor, context and pipeline")
            )
            raise InvalidValue(
                f"{what} is {getattr(self, what)}, and {parts} parallelism make {line} ranks",
                at=(what,),
                fix=f"make that a multiple of the {gpus} devices of a node",
            )
        if self.world_size % gpus:
            raise InvalidValue(
                f"the job has {self.world_size} ranks",
                at=("data_parallel",),
                fix=f"make that a multiple of the {gpus} devices of a node",
            )

    def _check_batch(self) -> None:
        if self.global_batch is None or self.data_parallel is None:
            return
        step = self.micro_batch * self.data_parallel
        if self.global_batch % step:
            raise InvalidValue(
                f"global_batch is {self.global_batch}",
                at=("global_batch",),
                fix=f"make it a multiple of micro_batch x data_parallel, {step}",
            )

    def _check_layers(self) -> None:
        chunks = self.pipeline_parallel * self.virtual_stages
        if self.shape is None or chunks <= self.shape.layers:
            return
        key = "virtual_stages" if self.virtual_stages > 1 else "pipeline_parallel"
        raise InvalidValue(
            f"{key} is {getattr(self, key)}, which makes {chunks} chunks of"
            f" {self.shape.layers} layers",
            at=(key,),
            fix="give each chunk a layer: pipeline_parallel x virtual_stages at most"
            f" {self.shape.layers}",
        )

    def _check_measurements(self) -> None:
        if self.overlap is None:
            return
        if self.step_times is not None:
            raise InvalidValue(
                "overlap is given beside step_times",
                at=("overlap",),
                fix="give one of them: from step_times alone the weight follows",
            )
        if self.volumes is None and self.shape is None and self.model is None:
            raise InvalidValue(
                "overlap is given and the bytes are not known",
                at=("overlap",),
                fix="give model, shape or volumes beside it",
            )

    @classmethod
    def read(cls, path: str | Path) -> TrainingJob:
        """Reads a job file; the shape of its model too.

        Raises:
            BadInput: it names the file, the line, the key, the value and what would be right.
        """
        data, lines = parse_yaml(read_text(path), where=str(path))
        job = validate(cls, data, where=str(path), lines=lines)
        if job.model is None or job.shape is not None:
            return job
        shape = Shape.of(ModelSpec.from_hf(Path(path).parent / job.model))
        return validate(cls, data | {"shape": shape.model_dump()}, where=str(path), lines=lines)

    @property
    def stage_major(self) -> bool:
        """Whether all replicas of a stage are numbered before the next stage."""
        return self.order == "tp-cp-ep-dp-pp"

    @property
    def replicas(self) -> int:
        """Data parallel replicas; one where that is left to the allocation."""
        return self.data_parallel or 1

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.tensor_parallel * self.context_parallel * self.replicas * self.pipeline_parallel

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node."""
        return min(self.gpus_per_node, self.world_size)

    @property
    def _line(self) -> int:
        """Consecutive ranks before the slowest dimension of the order moves on."""
        inner = self.tensor_parallel * self.context_parallel
        return inner * (self.replicas if self.stage_major else self.pipeline_parallel)

    def sized(self, nodes: int) -> TrainingJob:
        """The job with as many replicas as a fixed allocation of nodes holds.

        Raises:
            BadInput: the pipeline does not divide the allocation.
        """
        if self.data_parallel is not None:
            return self
        replica = self.tensor_parallel * self.context_parallel * self.pipeline_parallel
        ranks = nodes * self.gpus_per_node
        if ranks % replica:
            step = replica // math.gcd(replica, self.gpus_per_node)
            below = nodes // step * step
            sizes = f"{below} or {below + step}" if below else f"{step}"
            raise BadInput(
                f"{nodes} nodes of {self.gpus_per_node} devices are no multiple of a replica's"
                f" {replica} ranks",
                fix=f"give {sizes} nodes, or a data_parallel that leaves some free",
            )
        data = self.model_dump() | {"data_parallel": ranks // replica}
        return validate(TrainingJob, data, where="job")

    @cached_property
    def grid(self) -> JobGrid:
        """The job's nodes as rows of replicas and columns of stages."""
        nodes = self.world_size // self.ranks_per_node
        lines = max(1, self._line // self.ranks_per_node)
        block = max(1, self._together // self.ranks_per_node)
        if self.stage_major:
            return JobGrid(lines, nodes // lines, block, stage_major=True)
        columns = max(1, lines // block)
        return JobGrid(nodes // columns, columns, block, stage_major=False)

    @property
    def _together(self) -> int:
        """Consecutive ranks that belong to the same tensor, context or expert groups."""
        tensor = self.tensor_parallel
        degrees = (tensor, tensor * self.context_parallel, tensor * self.expert_parallel)
        return math.lcm(*degrees, self.ranks_per_node)

    def step_volumes(self) -> Volumes | None:
        """Bytes that a rank sends in a step, by kind of group; None where no model is given.

        Raises:
            BadInput: the job leaves its replicas to an allocation, and gives no volumes.
        """
        if self.volumes is not None or self.shape is None:
            return self.volumes
        if self.data_parallel is None:
            raise BadInput(
                "the job has no data_parallel", fix="give it, or order a fixed allocation"
            )
        return step_volumes(self.shape, self.training_step)

    @property
    def training_step(self) -> TrainingStep:
        """What happens in one step."""
        micro_batches = (
            self.global_batch // (self.micro_batch * self.replicas)
            if self.global_batch
            else 4 * self.pipeline_parallel
        )
        return TrainingStep(
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
            data_parallel=self.replicas,
            expert_parallel=self.expert_parallel,
            context_parallel=self.context_parallel,
            micro_batch=self.micro_batch,
            micro_batches=max(1, micro_batches),
            sequence_length=self.sequence_length,
            zero_stage=self.zero_stage,
            virtual_stages=self.virtual_stages,
            parameter_bytes=self.parameter_bytes,
            gradient_bytes=self.gradient_bytes,
            activation_bytes=self.activation_bytes,
            sequence_parallel=self.sequence_parallel,
        )

    def groups(self, kind: GroupKind) -> list[list[int]]:
        """All groups of a kind, each the global ranks in their order.

        Raises:
            BadInput: the kind is unknown.
        """
        if kind not in get_args(GroupKind):
            raise BadInput(
                f"there are no {kind!r} groups", fix=f"known are {', '.join(get_args(GroupKind))}"
            )
        lines = self.expert_lines if kind == "expert" else self.lines(kind)
        found: list[list[int]] = lines.tolist()
        return found

    def lines(self, *dimensions: GroupKind) -> Ranks:
        """All groups of ranks that differ in some of the dimensions but ``expert`` only."""
        sizes = {
            "tensor": self.tensor_parallel,
            "context": self.context_parallel,
            "data": self.replicas,
            "pipeline": self.pipeline_parallel,
        }
        if not self.stage_major:
            sizes["pipeline"], sizes["data"] = sizes.pop("pipeline"), sizes.pop("data")
        # The first dimension is the fastest.
        names = list(sizes)[::-1]
        grid = np.arange(self.world_size).reshape(list(sizes.values())[::-1])
        axes = [axis for axis, name in enumerate(names) if name in dimensions]
        moved = np.moveaxis(grid, axes, range(-len(axes), 0))
        return moved.reshape(-1, math.prod(grid.shape[axis] for axis in axes))

    @property
    def expert_lines(self) -> Ranks:
        """The expert groups: consecutive ones of the ranks with the same stage and tensor part."""
        found = self.lines("context", "data").reshape(-1, self.expert_parallel)
        return found[np.argsort(found[:, 0])]

    @property
    def expert_replica_lines(self) -> Ranks:
        """The groups of ranks that have the same experts."""
        replicas = self.lines("context", "data")
        held = replicas.reshape(len(replicas), -1, self.expert_parallel)
        return held.transpose(0, 2, 1).reshape(-1, held.shape[1])
