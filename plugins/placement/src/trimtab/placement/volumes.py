"""What a rank sends in a training step, from the model's shape and the job's parallelism.

Arnold (arXiv:2509.15940), appendix C, counts elements in places; here everything is bytes that one
rank sends in one step. A ring collective over k ranks sends (k - 1)/k of its buffer for a gather or
a scatter, and twice that for a reduction that everybody gets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from trimtab.core.documents import Document
from trimtab.core.model import ModelSpec


class Volumes(Document):
    """Bytes that one rank sends in one step to its groups of each kind."""

    tensor: NonNegativeFloat = 0.0
    context: NonNegativeFloat = 0.0
    expert: NonNegativeFloat = 0.0
    data: NonNegativeFloat = 0.0
    pipeline: NonNegativeFloat = 0.0


class Shape(Document):
    """What of a transformer's shape decides its communication.

    Attributes:
        layers, hidden, vocab: as usual.
        layer_parameters: of one layer; None for a GPT's ``12 h^2 + 9 h`` (attention and a
            feed-forward network four times as wide).
        expert_parameters: how many of a layer's are its routed experts'.
        active_experts: routed experts that a token visits.
        positions: rows of a learned position table.
    """

    layers: PositiveInt
    hidden: PositiveInt
    vocab: PositiveInt
    layer_parameters: NonNegativeFloat | None = None
    expert_parameters: NonNegativeFloat = 0.0
    active_experts: PositiveInt = 1
    positions: NonNegativeInt = 0

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
            active_experts=spec.experts.active if spec.experts else 1,
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


def step_volumes(shape: Shape, step: TrainingStep) -> Volumes:
    """Bytes that a rank sends in a step, by kind of group."""
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
    context = 6 * layers * own * (step.context_parallel - 1)
    # Tokens go to their experts and come back, forward and backward.
    tokens = 4 * shape.active_experts if shape.expert_parameters else 0
    expert = tokens * layers * passed_on * _ring(step.expert_parallel)
    pipeline = 2 * step.virtual_stages * passed_on if step.pipeline_parallel > 1 else 0.0
    return Volumes(
        tensor=step.micro_batches * tensor,
        context=step.micro_batches * context,
        expert=step.micro_batches * expert,
        data=_data(shape, step),
        pipeline=step.micro_batches * pipeline,
    )


def _data(shape: Shape, step: TrainingStep) -> float:
    """Gradients reduced and parameters gathered.

    A plain all-reduce moves gradients twice, ZeRO gathers parameters instead of the second time.
    Experts have fewer replicas than the rest.
    """
    layers = shape.layers / step.pipeline_parallel
    experts = layers * shape.expert_parameters
    replicas = step.data_parallel * step.context_parallel
    shared = shape.stage_parameters(step.pipeline_parallel) - experts
    parameters = shared * _ring(replicas)
    parameters += experts / step.expert_parallel * _ring(replicas // step.expert_parallel)
    reductions = step.micro_batches if step.zero_stage >= 2 else 1
    gathered = {0: step.gradient_bytes, 3: 2 * step.micro_batches * step.parameter_bytes}
    back = gathered.get(step.zero_stage, step.parameter_bytes)
    return parameters / step.tensor_parallel * (reductions * step.gradient_bytes + back)


def _ring(ranks: int) -> float:
    """The share of a buffer that each rank of a ring sends in a gather."""
    return (ranks - 1) / ranks
