"""The options of the plugin, under ``"sparse"`` in the ``"trimtab"`` block."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class SparseConfig(BaseModel):
    """Which prompts are filled in sparsely, and which blocks of 64 tokens they keep."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    selector: Literal["mass", "pooled", "antidiagonal", "top", "oracle"] = Field(
        "mass",
        description="how attention to blocks is estimated: from every eighth query (mass), pooled"
        " keys (pooled, top), antidiagonals, or exactly and slowly (oracle)",
    )
    mass: float = Field(
        0.97,
        gt=0,
        le=1,
        description="share of the estimated attention that kept blocks hold; 1 keeps all of them",
    )
    top: int = Field(16, ge=1, description="blocks that the selector top keeps")
    first: int = Field(1, ge=0, description="blocks at a prompt's beginning that are always kept")
    recent: int = Field(2, ge=1, description="latest blocks that are always kept, the own included")
    min_prompt: int = Field(
        2048, ge=64, description="tokens from which on a prompt is filled in sparsely"
    )
