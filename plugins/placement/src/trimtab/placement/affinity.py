"""How much data parallel spread weighs against pipeline spread.

Arnold (arXiv:2509.15940, section 5.2) keeps, for each job characterised, how much it gained with
its data parallel groups aligned and how much with its pipelines aligned; the weight of data
parallel groups is their part of both gains. A new job takes the weights of the nearest one, by the
ratios of its weights' and groups' bytes.

Four jobs are published, all run in much the same way, so that is right only near them. Elsewhere
the gains are predicted from the job's volumes (`trimtab.placement.overlap`). The two are joined by
distance: a job that is one of the measured has its weight, one a factor of ten away has the
predicted weight, and in between they are mixed. The distance is taken between logarithms of three
ratios: the paper's two, and how far the job's data bytes over its pipeline bytes are from what they
would be in the usual way (ZeRO 1, elements of two bytes, sequence parallel, four micro-batches for
each stage, no interleaving), which the paper's ratios do not see. Those jobs ran on two kinds of
device; that is no part of the distance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trimtab.placement.job import TrainingJob
from trimtab.placement.measurements import weight
from trimtab.placement.overlap import Exposures, exposures
from trimtab.placement.volumes import Shape, TrainingStep, boundary_bytes, step_volumes

DEFAULT_ALPHA = 0.3
"""Arnold's weight for a mixture of experts, for jobs whose model is not known."""

_REACH = 1.0
"""Decades of distance beyond which a measured job says nothing about another; our choice."""


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
        return weight(self.data_gain, self.pipeline_gain)


@dataclass(frozen=True, slots=True)
class Weight:
    """The weight of data parallel groups.

    Attributes:
        alpha: from 0, where only pipelines count, to 1.
        source: where it comes from, for people.
    """

    alpha: float
    source: str


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
    """The job's data parallel weight; see `weight_of`."""
    return weight_of(job, measured).alpha


def weight_of(job: TrainingJob, measured: Sequence[Measured] = PUBLISHED) -> Weight:
    """The job's data parallel weight, by the first of these that is given.

    Its own ``alpha``; its ``step_times``; the prediction from its ``volumes`` or ``overlap``; and
    else the nearest measured job and the prediction from its model, mixed by distance.

    Args:
        job: the job.
        measured: jobs that were measured.

    Raises:
        BadInput: the job leaves its replicas to an allocation.
    """
    if job.alpha != "auto":
        return Weight(float(job.alpha), "given")
    if job.step_times is not None:
        return Weight(job.step_times.alpha, "measured step times")
    found = exposures(job)
    if found is None:
        return Weight(DEFAULT_ALPHA, "no model is given: Arnold's mixture of experts")
    predicted = _predicted(found)
    shared = job.shape is not None and job.volumes is None and job.overlap is None
    if not shared or not measured:
        return Weight(predicted, f"volumes and {_hidden(job)}")
    nearest, distance = _nearest(job, measured)
    trust = max(0.0, 1 - distance / _REACH)
    if not trust:
        return Weight(predicted, "volumes and predicted overlap")
    return Weight(
        trust * nearest.alpha + (1 - trust) * predicted,
        f"{trust:.0%} of {nearest.name}, the rest volumes and predicted overlap",
    )


def _hidden(job: TrainingJob) -> str:
    """What the prediction knows of the communication that compute hides."""
    if job.overlap is not None:
        return "measured overlap"
    return "predicted overlap" if job.shape else "no overlap, since no model is given"


def _predicted(found: Exposures) -> float:
    """The data parallel part of what misaligned groups add to a step.

    Where compute hides all of it, of what they would add if it did not.
    """
    data, pipeline = found["data"], found["pipeline"]
    if data.added_s + pipeline.added_s > 0:
        return data.added_s / (data.added_s + pipeline.added_s)
    if data.unhidden_s + pipeline.unhidden_s > 0:
        return data.unhidden_s / (data.unhidden_s + pipeline.unhidden_s)
    return DEFAULT_ALPHA


def _nearest(job: TrainingJob, measured: Sequence[Measured]) -> tuple[Measured, float]:
    """The nearest measured job, and its distance in decades."""
    assert job.shape is not None
    own = ratios(
        job.shape,
        pipeline=job.pipeline_parallel,
        micro_batch=job.micro_batch,
        sequence=job.sequence_length,
    )
    nearest = min(measured, key=lambda other: _distance(own, other))
    return nearest, math.hypot(_distance(own, nearest), _unusual(job.shape, job.training_step))


def _unusual(shape: Shape, step: TrainingStep) -> float:
    """How far the step's data over pipeline bytes are from those of the usual way, in decades.

    Infinite where one of them is nothing: no measured job was so.
    """
    usual = replace(
        step,
        micro_batches=4 * step.pipeline_parallel,
        zero_stage=1,
        virtual_stages=1,
        parameter_bytes=2.0,
        gradient_bytes=2.0,
        activation_bytes=2.0,
        sequence_parallel=True,
    )
    found, as_usual = step_volumes(shape, step), step_volumes(shape, usual)
    if not found.all_data or not found.pipeline:
        return math.inf
    data, pipeline = found.all_data / as_usual.all_data, found.pipeline / as_usual.pipeline
    return abs(math.log10(data / pipeline))


def _distance(own: tuple[float, float], other: Measured) -> float:
    """Between logarithms: the ratios span decades."""
    theirs = (other.weight_ratio, other.group_ratio)
    return math.hypot(*(math.log10(a / b) for a, b in zip(own, theirs, strict=True)))
