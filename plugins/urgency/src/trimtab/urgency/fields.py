"""What clients may say about a call: the fields of ``vllm_xargs`` and their headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.core.policy import CallField, FieldValue

_LABEL_LIMIT = 128
_MIN_DEADLINE_S = 0.001
_MAX_DEADLINE_S = 86_400.0
_MAX_OUTPUT_TOKENS = 10_000_000

FIELDS: Mapping[str, CallField] = {
    "workflow": CallField(
        str,
        "id of the workflow the call belongs to; without it the call is a workflow of its own",
        minimum=1,
        maximum=_LABEL_LIMIT,
        header="X-Workflow-ID",
    ),
    "stage": CallField(
        str,
        "name of the workflow's stage; without it the stage is counted",
        minimum=1,
        maximum=_LABEL_LIMIT,
        header="X-Workflow-Stage",
    ),
    "class": CallField(
        str,
        "the kind of workflow, whose calls are alike",
        minimum=1,
        maximum=_LABEL_LIMIT,
        header="X-Workflow-Class",
    ),
    "deadline_s": CallField(
        float,
        "seconds the whole workflow may take from the arrival of its first call; at most one day",
        minimum=_MIN_DEADLINE_S,
        maximum=_MAX_DEADLINE_S,
        header="X-Workflow-Deadline-Ms",
        header_scale=0.001,
    ),
    "tenant": CallField(
        str,
        "who sends the call; workflow ids are kept apart by it, and max_share is each tenant's",
        minimum=1,
        maximum=_LABEL_LIMIT,
        header="X-Workflow-Tenant",
    ),
    "expected_output": CallField(
        int,
        "output tokens that the client expects of the call",
        minimum=1,
        maximum=_MAX_OUTPUT_TOKENS,
        header="X-Workflow-Expected-Output",
    ),
}
"""By the name behind ``trimtab.`` in ``vllm_xargs``."""


@dataclass(frozen=True, slots=True)
class CallFields:
    """A call's fields, checked; None for what the client did not say."""

    workflow: str | None = None
    stage: str | None = None
    class_: str = "default"
    deadline_s: float | None = None
    expected_output: int | None = None
    tenant: str = ""


def parse(fields: Mapping[str, FieldValue]) -> CallFields:
    """The fields of a call; names of other plugins are passed over.

    Raises:
        BadInput: a value has the wrong type or is out of range; the message names its key.
    """
    said = {name: FIELDS[name].check(name, fields[name]) for name in FIELDS.keys() & fields.keys()}
    return CallFields(**{"class_" if name == "class" else name: said[name] for name in said})  # type: ignore[arg-type]
