"""What a user has measured of a job: how much communication is hidden, and what aligning gained."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trimtab.core.documents import Document
from trimtab.core.units import Seconds

_Share = Annotated[float, Field(ge=0, le=1)]
_StepSeconds = Annotated[Seconds, Field(gt=0, le=1e9)]


class Overlap(Document):
    """Shares of communication time that compute hides, as a profile of a step shows them.

    Attributes:
        data, pipeline: of a kind of group; None where that is to be predicted.
    """

    data: _Share | None = None
    pipeline: _Share | None = None


class StepTimes(Document):
    """Times of a step in seconds, the same job measured in three placements.

    Attributes:
        unaligned: with groups of both kinds over several pods.
        data_aligned: with each data parallel group in one pod.
        pipeline_aligned: with each pipeline in one pod.
    """

    unaligned: _StepSeconds
    data_aligned: _StepSeconds
    pipeline_aligned: _StepSeconds

    @property
    def alpha(self) -> float:
        """The weight of data parallel groups that follows from what aligning each kind saved."""
        return weight(self.unaligned - self.data_aligned, self.unaligned - self.pipeline_aligned)


def weight(data_gain: float, pipeline_gain: float) -> float:
    """The data parallel weight of two gains (Arnold, section 5.2); losses count as nothing.

    One half where nothing helped.
    """
    data, pipeline = max(0.0, data_gain), max(0.0, pipeline_gain)
    return data / (data + pipeline) if data + pipeline else 0.5
