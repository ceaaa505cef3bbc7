"""The options of the plugin, under ``"sparse"`` in the ``"trimtab"`` block."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_LEAST_BLOCK = 16


def _check_total(top: int, first: int, recent: int) -> None:
    if first + recent > top:
        raise ValueError(
            f"{first} first and {recent} recent blocks are more than top, {top}, which counts them"
        )


class NativeConfig(BaseModel):
    """Native sparse attention in place of a model's own, to train with; sizes in tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    window: int = Field(32, ge=1, description="tokens behind one compressed entry")
    stride: int = Field(16, ge=1, description="tokens between the beginnings of entries")
    block: int = Field(64, ge=_LEAST_BLOCK, description="tokens of a block, a power of two")
    top: int = Field(16, ge=1, description="blocks of each query, forced ones included")
    first: int = Field(1, ge=0, description="blocks at a sequence's beginning, always chosen")
    recent: int = Field(2, ge=0, description="latest blocks, the own included, always chosen")
    sliding: int = Field(512, ge=1, description="latest tokens that the sliding branch sees")
    gate: Literal["token", "head"] = Field(
        "head", description="one gate a branch for all heads, or one for each"
    )
    compress: Literal["mean", "linear", "mlp"] = Field(
        "linear", description="how entries are made of windows"
    )
    kv_per_branch: bool = Field(False, description="keys and values of its own for each branch")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.block & (self.block - 1):
            raise ValueError(f"the block of {self.block} tokens is no power of two")
        _check_total(self.top, self.first, self.recent)
        if self.window % self.stride or self.block % self.stride:
            raise ValueError(
                f"the stride {self.stride} must divide window {self.window} and block {self.block}"
            )
        if self.window > self.block:
            raise ValueError(f"the window {self.window} is longer than the block {self.block}")
        return self


class SparseConfig(BaseModel):
    """Which prompts are filled in sparsely, and which blocks of 64 tokens they keep."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    selector: Literal["mass", "pooled", "antidiagonal", "top", "minmax", "fixed", "oracle"] = Field(
        "mass",
        description="how attention to blocks is estimated: mass looks with every eighth query;"
        " pooled and top at means of 16 keys; minmax at what 16 keys could reach at most;"
        " antidiagonal at squares of 16 by 16; fixed at nothing; oracle at everything, slowly",
    )
    mass: float = Field(
        0.97,
        gt=0,
        le=1,
        description="share of the estimated attention that kept blocks hold, for mass, pooled,"
        " antidiagonal and oracle; 1 keeps all of them",
    )
    top: int = Field(
        16,
        ge=1,
        description="blocks that top and minmax keep, at least first and recent, which it counts",
    )
    first: int = Field(1, ge=0, description="blocks at a prompt's beginning that are always kept")
    recent: int = Field(2, ge=1, description="latest blocks that are always kept, the own included")
    stride: int = Field(
        0, ge=0, description="fixed also keeps blocks whose number is a multiple of it; 0 is none"
    )
    by: Literal["tile", "query"] = Field(
        "tile",
        description="who chooses: 64 queries together, or each query by itself, so that no later"
        " token and no cut of the prompt reaches what it sees, which takes longer",
    )
    dense_layers: int = Field(0, ge=0, description="first layers that attend to all blocks")
    min_prompt: int = Field(
        2048, ge=64, description="tokens from which on a prompt is filled in sparsely"
    )
    least_gain: float = Field(
        1.1,
        ge=0,
        description="predicted speed-up over dense attention from which on a server fills in a"
        " prompt sparsely, if not all blocks are kept; 0 does so always",
    )
    native: NativeConfig = Field(
        default_factory=NativeConfig,
        description="in a DeepSpeed configuration: the native sparse attention to train with",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.by == "query" and self.selector == "antidiagonal":
            raise ValueError(
                "antidiagonals go through 16 queries: give by 'tile', or another selector"
            )
        if self.selector in ("top", "minmax"):
            _check_total(self.top, self.first, self.recent)
        if self.stride and self.selector != "fixed":
            raise ValueError(f"stride {self.stride} is for the selector fixed, not {self.selector}")
        return self
