"""The options of the plugin, under ``"urgency"`` in the ``"trimtab"`` block."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Order = Literal["edd", "urgency", "llf", "srpt", "fcfs"]


class UrgencyConfig(BaseModel):
    """How the waiting calls of deadline-bound workflows are ordered."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    order: Order = Field(
        "edd",
        description="edd: earliest modified due date, with workflows that are late already set "
        "aside; urgency: the paper's; llf: least slack; srpt: least remaining work; "
        "fcfs: by arrival",
    )
    default_deadline_s: float | None = Field(
        None,
        gt=0,
        le=86_400,
        description="deadline of workflows whose client gives none; without it they are served "
        "by arrival, with min_share",
    )
    min_deadline_s: float = Field(
        0.0,
        ge=0,
        le=86_400,
        description="a shorter deadline of a client counts as this one, "
        "so that none can jump the queue by asking for the impossible",
    )
    min_share: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="share of admissions that calls without a deadline get while they wait",
    )
    age_cap: float = Field(
        1.5,
        ge=1,
        le=100,
        description="a workflow that can no longer meet its deadline is set aside until this many "
        "times its deadline have passed",
    )
    aged_share: float = Field(
        0.67,
        gt=0,
        le=0.9,
        description="share of admissions that workflows past age_cap get while they wait",
    )
    max_workflows: int = Field(
        10_000,
        ge=1,
        le=1_000_000,
        description="workflows remembered between their calls, the longest idle forgotten first",
    )
    workflow_ttl_s: float = Field(
        3600.0, gt=0, le=604_800, description="a workflow idle for this long is forgotten"
    )
