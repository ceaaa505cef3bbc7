"""The options of the plugin, under ``"branches"`` in the ``"trimtab"`` block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from trimtab.branches.extract import extractor, load_function
from trimtab.branches.fields import MAX_BRANCHES
from trimtab.core.errors import BadInput
from trimtab.core.validation import InvalidValue

Pruning = Literal["safe", "paper", "below", "pressure", "off"]
Answer = Literal["best", "majority", "weighted", "shortest"]
Show = Literal["one", "all"]
Weight = Annotated[float, Field(gt=0, le=1000)]

_CONFIG = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PrmOptions(BaseModel):
    """Where a process-reward model is served, and how it is asked."""

    model_config = _CONFIG

    url: str = Field(description="base URL of a vLLM server of a reward model, without /pooling")
    model: str = Field(description="the model's name, as its server has it")
    step_tag: str = Field("<extra_0>", min_length=1, description="what marks the end of a step")
    step_end: str = Field("\n\n", min_length=1, description="what ends a step of a branch's text")
    context_tokens: int = Field(
        4096, ge=64, le=10_000_000, description="a longer text is scored by its end"
    )
    timeout_s: float = Field(10.0, gt=0, le=600, description="an answer later than this is none")
    in_flight: int = Field(4, ge=1, le=64, description="most questions at once")


class BranchesConfig(BaseModel):
    """How the branches of a request are launched, scored, pruned and answered."""

    model_config = _CONFIG

    n: int | None = Field(
        None,
        ge=1,
        le=MAX_BRANCHES,
        description="branches of each request that says nothing of its own; without it only "
        "requests that ask for branches get them",
    )
    m: int | None = Field(
        None,
        ge=1,
        le=MAX_BRANCHES,
        description="finished branches after which a request is answered; half of them by default",
    )
    max_branches: int = Field(
        64,
        ge=1,
        le=MAX_BRANCHES,
        description="most branches a client may ask for",
    )
    score_every: int = Field(
        400, ge=1, le=10_000_000, description="output tokens between two scorings of a branch"
    )
    pruning: Pruning | None = Field(
        None,
        description="safe: branches that are not expected to give the answer; paper: "
        "the paper's two phases; below: whatever scores under prune_below; pressure: only where "
        "memory is short; off; by default paper with a reward model, else safe",
    )
    prune_below: float | None = Field(
        None,
        ge=0,
        le=1,
        description="score under which a branch is pruned while none has finished; by default .5 "
        "in the modes paper and below; safe mode does without one",
    )
    max_pruned: int | None = Field(
        None,
        ge=0,
        le=MAX_BRANCHES,
        description="most branches pruned while none has finished; half of them by default",
    )
    signals: Mapping[str, Weight] = Field(
        {"confidence": 1.0},
        description="the signals that make up a score, with their weights: probability, "
        "lowest_probability, confidence, lowest_confidence, entropy, shortness, prm, replay, "
        "or another plugin's",
    )
    window: int = Field(
        128, ge=1, le=4096, description="tokens over which token signals are averaged"
    )
    certainty: float | None = Field(
        0.95,
        ge=0.5,
        lt=1,
        description="where answers are voted on: how sure the leading one must be of its majority "
        "for the rest to be stopped; null waits for the others",
    )
    answer: Answer = Field("best", description="which finished branch answers")
    extract: str = Field("none", description="where the answer stands in a branch's text")
    extractor: str | None = Field(
        None,
        pattern=r"^[\w.]+:\w+$",
        description="module:function that takes a text and returns its answer or None; it comes "
        "before extract",
    )
    show: Show = Field("one", description="what a client gets: one answer, or all branches")
    bend: bool = Field(
        True,
        description="whether a request takes no more branches than its share of the seats while "
        "others wait",
    )
    relieve: bool = Field(
        True,
        description="whether, in all modes but off, the branch with the lowest score goes where "
        "vLLM would have to preempt one",
    )
    forget_pruned: bool = Field(
        True,
        description="whether the KV blocks of a branch that was ended leave the prefix cache",
    )
    prm: PrmOptions | None = Field(None, description="the reward model of the signal prm")

    @field_validator("extract", "extractor")
    @classmethod
    def _finds_answers(cls, said: str | None, info: ValidationInfo) -> str | None:
        if said is not None:
            try:
                (extractor if info.field_name == "extract" else load_function)(said)
            except BadInput as error:
                raise ValueError(f"{error.what}; {error.fix}") from None
        return said

    @model_validator(mode="after")
    def _numbers_agree(self) -> Self:
        if self.n is not None and self.n > self.max_branches:
            fix = f"give at most max_branches, {self.max_branches}"
            raise InvalidValue(f"n is {self.n}", fix=fix, at=("n",))
        if self.n is not None and self.m is not None and self.m > self.n:
            raise InvalidValue(f"m is {self.m}", fix=f"give at most n, {self.n}", at=("m",))
        return self
