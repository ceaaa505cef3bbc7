"""What a rank sends in a training step, from the model's shape and the job's parallelism.

Arnold (arXiv:2509.15940), appendix C, counts elements in places; here everything is bytes that one
rank sends in one step. A ring collective over k ranks sends (k - 1)/k of its buffer for a gather or
a scatter, and twice that for a reduction that everybody gets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from trimtab.core.documents import Document
from trimtab.core.model import ModelSpec
from trimtab.core.units import Bytes

_StepBytes = Annotated[Bytes, Field(ge=0, le=1e24)]
_Parameters = Annotated[float, Field(ge=0, le=1e18)]
_Size = Annotated[int, Field(gt=0, le=10**9)]


class Volumes(Document):
    """Bytes that one rank sends in one step to its groups of each kind.

    Attributes:
        tensor, context: to its tensor and context groups.
        expert: tokens to the experts of its group and back.
        data: gradients and parameters that all replicas share.
        expert_data: those of its experts, to the replicas of the same experts.
        pipeline: what a stage in the middle sends to both sides, which is what passes between two
            stages there and back.
    """

    tensor: _StepBytes = 0.0
    context: _StepBytes = 0.0
    expert: _StepBytes = 0.0
    data: _StepBytes = 0.0
    expert_data: _StepBytes = 0.0
    pipeline: _StepBytes = 0.0

    @property
    def all_data(self) -> float:
        """Bytes to data parallel groups of both kinds."""
        return self.data + self.expert_data


class Shape(Document):
    """What of a transformer's shape decides its communication.

    Attributes:
        layers, hidden, vocab: as usual.
        layer_parameters: of one layer; None for a GPT's ``12 h^2 + 9 h`` (attention and a
            feed-forward network four times as wide).
        expert_parameters: how many of a layer's are its routed experts'.
        experts: routed experts of a layer; None where a token's work shall count all of them.
        active_experts: routed experts that a token visits.
        positions: rows of a learned position table.
        key_value: width of a layer's keys, and of its values; None for as wide as ``hidden``.
    """

    layers: _Size
    hidden: _Size
    vocab: _Size
    layer_parameters: _Parameters | None = None
    expert_parameters: _Parameters = 0.0
    experts: PositiveInt | None = None
    active_experts: PositiveInt = 1
    positions: NonNegativeInt = 0
    key_value: _Size | None = None

    @classmethod
    def of(cls, spec: ModelSpec) -> Shape:
        """The shape of a model, with the mean of its layers."""
        layers = range(spec.layers)
        whole = sum(spec.layer_parameters(layer) for layer in layers)
        without = sum(spec.layer_parameters(layer, 0) for layer in layers)
        return cls(
            layers=spec.layers,
            hidden=spec.hidden,
            vocab=spec.vocab,
            layer_parameters=whole / spec.layers,
            expert_parameters=(whole - without) / spec.layers,
            experts=spec.experts.count if spec.experts else None,
            active_experts=spec.experts.active if spec.experts else 1,
            key_value=None if spec.latent else spec.kv_heads * spec.head_dim,
        )

    @property
    def parameters_per_layer(self) -> float:
        """All parameters of a layer."""
        if self.layer_parameters is not None:
            return self.layer_parameters
        return 12.0 * self.hidden**2 + 9.0 * self.hidden

    def stage_parameters(self, pipeline_parallel: int) -> float:
        """The parameters of the first pipeline stage, which has the embedding (equation 12)."""
        tables = self.hidden * (self.vocab + self.positions)
        return tables + self.layers / pipeline_parallel * self.parameters_per_layer

    @property
    def active_parameters(self) -> float:
        """Parameters of a layer that a token is multiplied with."""
        idle = 1 - self.active_experts / self.experts if self.experts else 0.0
        return self.parameters_per_layer - self.expert_parameters * max(0.0, idle)


def boundary_bytes(
    shape: Shape, *, micro_batch: int, sequence_length: int, activation_bytes: float = 2.0
) -> float:
    """Activations of one micro-batch between two pipeline stages (equation 13)."""
    return activation_bytes * micro_batch * sequence_length * shape.hidden


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """What happens in one step of a job.

    Attributes:
        tensor_parallel, pipeline_parallel, data_parallel: degrees.
        micro_batch: sequences in a micro-batch.
        micro_batches: of a step, for each pipeline.
        sequence_length: tokens of a sequence.
        expert_parallel, context_parallel: degrees.
        zero_stage: 0 and 1 reduce gradients once a step; from 2 on once a micro-batch; 3 gathers
            parameters twice a micro-batch.
        virtual_stages: chunks of layers on each pipeline rank.
        parameter_bytes, gradient_bytes, activation_bytes: of one element.
        sequence_parallel: whether tensor ranks pass on only their part of activations.
    """

    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    micro_batch: int
    micro_batches: int
    sequence_length: int
    expert_parallel: int = 1
    context_parallel: int = 1
    zero_stage: int = 1
    virtual_stages: int = 1
    parameter_bytes: float = 2.0
    gradient_bytes: float = 2.0
    activation_bytes: float = 2.0
    sequence_parallel: bool = True


def micro_batch_flop(shape: Shape, step: TrainingStep) -> float:
    """FLOP of a rank for one micro-batch, forward and backward; attention is causal.

    Two for each parameter and token forward, twice that backward; tables are left out.
    """
    tokens = step.micro_batch * step.sequence_length / step.context_parallel
    attention = shape.hidden * step.sequence_length
    layers = shape.layers / step.pipeline_parallel / step.tensor_parallel
    return 6 * layers * tokens * (shape.active_parameters + attention)


def step_volumes(shape: Shape, step: TrainingStep) -> Volumes:
    """Bytes that a rank sends in a step, by kind of group.

    Every stage counts as the first, which has the embedding (as in equation 12).
    """
    activations = boundary_bytes(
        shape,
        micro_batch=step.micro_batch,
        sequence_length=math.ceil(step.sequence_length / step.context_parallel),
        activation_bytes=step.activation_bytes,
    )
    layers = shape.layers / step.pipeline_parallel
    own = activations / step.tensor_parallel
    passed_on = own if step.sequence_parallel else activations
    # Forward and backward each reduce the activations after attention and after the network.
    tensor = 4 * layers * activations * 2 * _ring(step.tensor_parallel)
    # Keys and values go round forward; they and their gradients backward.
    keys = (shape.key_value or shape.hidden) / shape.hidden
    context = 6 * layers * own * keys * (step.context_parallel - 1)
    # Tokens go to their experts and come back, forward and backward.
    tokens = 4 * shape.active_experts if shape.expert_parameters else 0
    expert = tokens * layers * passed_on * _ring(step.expert_parallel)
    pipeline = 2 * step.virtual_stages * passed_on if step.pipeline_parallel > 1 else 0.0
    replicas = step.data_parallel * step.context_parallel
    experts = layers * shape.expert_parameters
    shared = max(0.0, shape.stage_parameters(step.pipeline_parallel) - experts)
    own_experts = experts / step.expert_parallel
    per_parameter = _data_bytes(step) / step.tensor_parallel
    return Volumes(
        tensor=step.micro_batches * tensor,
        context=step.micro_batches * context,
        expert=step.micro_batches * expert,
        data=per_parameter * shared * _ring(replicas),
        expert_data=per_parameter * own_experts * _ring(replicas // step.expert_parallel),
        pipeline=step.micro_batches * pipeline,
    )


def _data_bytes(step: TrainingStep) -> float:
    """Bytes of a parameter that are reduced and gathered in a step.

    A plain all-reduce moves gradients twice, ZeRO gathers parameters instead of the second time.
    """
    reductions = step.micro_batches if step.zero_stage >= 2 else 1
    gathered = {0: step.gradient_bytes, 3: 2 * step.micro_batches * step.parameter_bytes}
    return reductions * step.gradient_bytes + gathered.get(step.zero_stage, step.parameter_bytes)


def _ring(ranks: int) -> float:
    """The share of a buffer that each rank of a ring sends in a gather."""
    return (ranks - 1) / ranks
