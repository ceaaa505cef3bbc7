"""The options of the plugin, under ``"placement"`` in the ``"trimtab"`` block."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Effort = Literal["quick", "full"]
"""How long is looked for placements: ``quick`` tries strips and packings and a linear bound, a
fraction of a second for a thousand nodes; ``full`` goes on until the bound is met or nothing
helps, which on fragmented pods takes some seconds."""


class PlacementConfig(BaseModel):
    """What the launch wrapper does: it follows a plan, or makes one for the hosts it finds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    plan: str | None = Field(
        None, description="plan file whose order of nodes the job gets; made by trimtab plan"
    )
    cluster: str | None = Field(
        None,
        description="cluster file; without a plan the hosts are ordered by it, and with one it is"
        " checked that the plan was made for it",
    )
    job: str | None = Field(None, description="job file, beside cluster")
    hosts: str | None = Field(
        None,
        description="hostfile of the allocation, where neither DeepSpeed's nor Slurm's names it",
    )
    effort: Effort = Field(
        "full", description="how long a plan made at launch is looked for, as of trimtab plan"
    )
    strict: bool = Field(
        False, description="refuse to go on where the live job differs from the plan"
    )
    check: bool = Field(
        True,
        description="compare the live job with the plan before its first optimizer step; every rank"
        " must then take one",
    )
