"""How much data parallel spread weighs against pipeline spread, from jobs that were measured.

Arnold (arXiv:2509.15940, section 5.2) keeps, for each job characterised, how much it gained with
its data parallel groups aligned and how much with its pipelines aligned. A new job takes the
weights of the nearest one, by the ratios of its weights' and groups' bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.placement.job import TrainingJob
from trimtab.placement.volumes import Shape, boundary_bytes

DEFAULT_ALPHA = 0.3
"""Arnold's weight for a mixture of experts, for jobs whose model is not known."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A job that was measured.

    Attributes:
        name: which.
        weight_ratio: a micro-batch's weights over the bytes of both groups, ``r1``.
        group_ratio: data parallel over pipeline bytes, ``r2``.
        data_gain: improvement with data parallel groups aligned.
        pipeline_gain: with pipelines aligned.
    """

    name: str
    weight_ratio: float
    group_ratio: float
    data_gain: float
    pipeline_gain: float

    @property
    def alpha(self) -> float:
        """The data parallel weight that follows; even where nothing helped."""
        data, pipeline = max(0.0, self.data_gain), max(0.0, self.pipeline_gain)
        return data / (data + pipeline) if data + pipeline else 0.5


def ratios(shape: Shape, *, pipeline: int, micro_batch: int, sequence: int) -> tuple[float, float]:
    """``r1`` and ``r2`` of a job, in bytes of two-byte elements."""
    data_bytes = 2 * shape.stage_parameters(pipeline)
    pipeline_bytes = boundary_bytes(shape, micro_batch=micro_batch, sequence_length=sequence)
    weights = 2 * shape.layers / pipeline * shape.parameters_per_layer
    return micro_batch * weights / (data_bytes + pipeline_bytes), data_bytes / pipeline_bytes


def _published(
    name: str, shape: Shape, pipeline: int, data_gain: float, pipeline_gain: float
) -> Measured:
    weight_ratio, group_ratio = ratios(shape, pipeline=pipeline, micro_batch=1, sequence=4096)
    return Measured(name, weight_ratio, group_ratio, data_gain, pipeline_gain)


PUBLISHED: tuple[Measured, ...] = (
    _published("H800 24B dense", Shape(layers=48, hidden=6144, vocab=50_257), 8, 0.0, 2.3),
    _published(
        "H800 24B mixture of experts",
        Shape(layers=24, hidden=4096, vocab=50_257, layer_parameters=1e9, expert_parameters=0.93e9),
        8,
        0.77,
        1.8,
    ),
    _published("L20 7B dense", Shape(layers=32, hidden=4096, vocab=50_257), 8, 1.4, 0.0),
    _published("L20 14B dense", Shape(layers=40, hidden=5120, vocab=50_257), 8, 0.0, 0.5),
)
"""Gains in per cent as published (section 4 and appendix E); the models' shapes are assumed, since
the paper gives sizes only, and the data gain of the mixture is what its weight of 0.3 says."""


def alpha_of(job: TrainingJob, measured: Sequence[Measured] = PUBLISHED) -> float:
    """The job's data parallel weight: its own, or that of the nearest measured job.

    Sharded parameters (ZeRO 3, FSDP) travel with every micro-batch, which the measured jobs did not
    do: there the weight is the data parallel groups' share of the bytes of a step.
    """
    if job.alpha != "auto":
        return float(job.alpha)
    volumes = job.step_volumes()
    if job.zero_stage == 3 and volumes is not None and volumes.data + volumes.pipeline > 0:
        return volumes.data / (volumes.data + volumes.pipeline)
    if job.shape is None or not measured:
        return DEFAULT_ALPHA
    own = ratios(
        job.shape,
        pipeline=job.pipeline_parallel,
        micro_batch=job.micro_batch,
        sequence=job.sequence_length,
    )
    return min(measured, key=lambda other: _distance(own, other)).alpha


def _distance(own: tuple[float, float], other: Measured) -> float:
    """Between logarithms: the ratios span decades."""
    theirs = (other.weight_ratio, other.group_ratio)
    return math.hypot(*(math.log10(a / b) for a, b in zip(own, theirs, strict=True)))
