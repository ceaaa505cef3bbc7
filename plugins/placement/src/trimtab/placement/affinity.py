"""How much data parallel spread weighs against pipeline spread."""

from __future__ import annotations

from trimtab.placement.job import TrainingJob

DEFAULT_ALPHA = 0.3
"""Arnold's weight for a mixture of experts; its dense models had less (section 5.2)."""


def alpha_of(job: TrainingJob) -> float:
    """The job's data parallel weight."""
    return DEFAULT_ALPHA if job.alpha == "auto" else float(job.alpha)
