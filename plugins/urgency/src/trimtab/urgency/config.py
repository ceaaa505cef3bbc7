"""The options of the plugin, under ``"urgency"`` in the ``"trimtab"`` block, and tuned ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Order = Literal["edd", "urgency", "llf", "srpt", "fcfs"]
AgeCap = Annotated[float, Field(ge=1.1, le=100)]
BestCase = Annotated[float, Field(gt=0, le=2)]
Quantile = Annotated[float, Field(ge=0.5, le=0.99)]

_CONFIG = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class UrgencyConfig(BaseModel):
    """How the waiting calls of deadline-bound workflows are ordered."""

    model_config = _CONFIG

    order: Order = Field(
        "edd",
        description="edd: earliest modified due date, with later ones for workflows that are late "
        "already; urgency: the paper's; llf: least slack; srpt: least remaining work; "
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
    max_share: float = Field(
        0.7,
        ge=0.5,
        le=1,
        description="most of the admissions that one tenant gets while others wait; 1: no limit",
    )
    age_cap: AgeCap = Field(
        1.1,
        description="a workflow that can no longer meet its deadline, or that would make others "
        "late, is due anew after this many times its deadline",
    )
    best_case: BestCase = Field(
        0.9,
        description="share of the expected remaining work within which a workflow may still end "
        "if all goes well; with less time left it is late",
    )
    work_quantile: Quantile = Field(
        0.5,
        description="due dates leave room for this quantile of the work after a stage",
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
    tuned: Path | None = Field(
        None,
        description="a file of trimtab tune urgency; it is read again whenever it changes, and "
        "what it says comes before the options here",
    )


class TunedDispatch(BaseModel):
    """A dispatch rule of a router, with its alpha where it has one."""

    model_config = _CONFIG

    rule: str = Field(min_length=1, max_length=64)
    alpha: float | None = Field(None, ge=0, le=1)


class TunedOptions(BaseModel):
    """What ``trimtab tune urgency`` writes; what is left out stays as it is configured."""

    model_config = _CONFIG

    kind: Literal["trimtab-urgency-tuned"] = "trimtab-urgency-tuned"
    version: Literal[1] = 1
    order: Order | None = None
    age_cap: AgeCap | None = None
    best_case: BestCase | None = None
    work_quantile: Quantile | None = None
    dispatch: TunedDispatch | None = None

    def over(self, config: UrgencyConfig) -> UrgencyConfig:
        """The options of a queue with these in their places."""
        own = self.model_dump(exclude_none=True, exclude={"kind", "version", "dispatch"})
        return config.model_copy(update=own)
