"""The options of the plugin, under ``"placement"`` in the ``"trimtab"`` block."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class PlacementConfig(BaseModel):
    """What the launch wrapper does with a plan."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    plan: str | None = Field(
        None, description="plan file whose order of nodes the job gets; made by trimtab plan"
    )
    cluster: str | None = Field(
        None, description="cluster file; without a plan, the hosts are ordered by it"
    )
    job: str | None = Field(None, description="job file, beside cluster")
    verify: bool = Field(True, description="compare the live job with the plan after init")
    strict: bool = Field(False, description="refuse to go on where they differ")
