"""How much of a step's communication compute leaves exposed, and what leaving a pod adds to that.

Arnold measures it (arXiv:2509.15940, section 4): collectives that leave a pod lose up to 17 % of
their bandwidth and sends between stages up to 70 %, and only what compute does not hide counts. The
schedule here is the usual one, one micro-batch forward and one backward in turn:

* gradients are reduced while the last backward pass of a step runs, and parameters gathered while
  the next forward pass does; ZeRO 2 reduces in every backward pass, ZeRO 3 gathers in every pass.
* stages wait for what they send and receive, in Megatron's plain schedule and in DeepSpeed's: all
  of it is exposed. Interleaved stages (Megatron's) send while they compute, so that only what fills
  and drains the pipeline is exposed: there is nothing else to do in its bubbles.

In eight stages, with the defaults of a job, this predicts in kind what Arnold reports: aligning the
pipelines of the dense 24B model saves 2 % of a step (published: 2.3 %) and its data parallel groups
0.5 % (nothing); the mixture of experts has the weight 0.31 (0.3). It does not predict that the 7B
model on L20 gained from data parallel groups alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import mul
from typing import TYPE_CHECKING, Literal

from trimtab.placement.measurements import Overlap
from trimtab.placement.volumes import TrainingStep, micro_batch_flop

if TYPE_CHECKING:
    from trimtab.placement.job import TrainingJob

COLLECTIVE_LOSS = 0.17
SEND_LOSS = 0.70
"""The largest published shares of bandwidth lost outside a pod."""


@dataclass(frozen=True, slots=True)
class Exposure:
    """The communication of one kind of group in a step of a rank.

    Attributes:
        time_s: on the network, with the groups inside a pod.
        exposed_s: of that, what compute does not hide.
        added_s: how much more is exposed where the groups leave their pod.
        unhidden_s: how much more it would be if nothing were hidden.
    """

    time_s: float
    exposed_s: float
    added_s: float
    unhidden_s: float


Exposures = dict[Literal["data", "pipeline"], Exposure]


def exposures(job: TrainingJob) -> Exposures | None:
    """What data parallel groups and pipelines add to a step; None where no volumes are known.

    Shares that were measured are taken. Without the model's shape nothing is known of compute, and
    all else counts as exposed.

    Raises:
        BadInput: the job leaves its replicas to an allocation.
    """
    volumes = job.step_volumes()
    if volumes is None:
        return None
    step = job.training_step
    compute_s = micro_batch_flop(job.shape, step) / job.flop_per_s if job.shape else 0.0
    window_s = _data_window(step) * compute_s
    filling = _filling(step)

    def data(time_s: float) -> float:
        return max(0.0, time_s - window_s)

    def pipeline(time_s: float) -> float:
        steady_s = max(0.0, time_s - step.micro_batches * compute_s)
        return filling * time_s + (1 - filling) * steady_s

    hidden = job.overlap or Overlap()
    speed = job.bandwidth_bytes_per_s
    return {
        "data": _exposure(volumes.all_data / speed, COLLECTIVE_LOSS, hidden.data, data),
        "pipeline": _exposure(volumes.pipeline / speed, SEND_LOSS, hidden.pipeline, pipeline),
    }


def _exposure(
    time_s: float, loss: float, hidden: float | None, predicted: Callable[[float], float]
) -> Exposure:
    """What is exposed inside a pod and outside of it, by a measured share or as predicted."""
    exposed = predicted if hidden is None else partial(mul, 1 - hidden)
    outside_s = time_s / (1 - loss)
    inside_s = exposed(time_s)
    return Exposure(time_s, inside_s, exposed(outside_s) - inside_s, outside_s - time_s)


def _data_window(step: TrainingStep) -> float:
    """The passes behind which data parallel communication hides, in micro-batches' compute.

    A backward pass takes two thirds of it.
    """
    backward, forward = 2 / 3, 1 / 3
    windows = {
        0: backward,
        1: backward + forward,
        2: step.micro_batches * backward + forward,
        3: float(step.micro_batches),
    }
    return windows[step.zero_stage]


def _filling(step: TrainingStep) -> float:
    """The share of a pipeline's sends behind which no compute is: those that fill and drain it.

    All of them where stages are not interleaved.
    """
    chunks = step.virtual_stages
    if chunks == 1:
        return 1.0
    sends = step.pipeline_parallel * chunks - 1
    return min(1.0, sends / (step.micro_batches * chunks))
