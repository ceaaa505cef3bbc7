"""What a client says of a workflow's calls: for OpenAI's client, LangGraph and any other."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from trimtab.core.errors import BadInput
from trimtab.core.policy import FIELD_PREFIX, FieldValue
from trimtab.urgency.fields import FIELDS


@dataclass(frozen=True, slots=True)
class WorkflowHints:
    """What all calls of one workflow say."""

    said: dict[str, FieldValue]

    def extra_body(
        self, stage: str | None = None, *, expected_output: int | None = None
    ) -> dict[str, dict[str, FieldValue]]:
        """The ``extra_body`` of a stage's call.

        Raises:
            BadInput: a value is out of range; the message names it.
        """
        said = self._with(stage, expected_output)
        return {"vllm_xargs": {FIELD_PREFIX + name: value for name, value in said.items()}}

    def default_headers(
        self, stage: str | None = None, *, expected_output: int | None = None
    ) -> dict[str, str]:
        """The same as headers, for clients whose body cannot be changed.

        Raises:
            BadInput: a value is out of range, or cannot stand in a header; the message names it.
        """
        headers = {}
        for name, value in self._with(stage, expected_output).items():
            field = FIELDS[name]
            text = value if isinstance(value, str) else f"{value / field.header_scale:.15g}"
            if not (text.isascii() and text.isprintable() and text == text.strip()):
                fix = "give printable ASCII, or use extra_body"
                raise BadInput(f"{text!r} cannot stand in a header", where=name, fix=fix)
            headers[str(field.header)] = text
        return headers

    def _with(self, stage: str | None, expected_output: int | None) -> dict[str, FieldValue]:
        return {**self.said, **_checked(stage=stage, expected_output=expected_output)}


def workflow(
    *,
    deadline_s: float | None = None,
    class_: str | None = None,
    workflow_id: str | None = None,
    tenant: str | None = None,
) -> WorkflowHints:
    """Begins a workflow; each of its calls then takes `WorkflowHints.extra_body` or its headers.

    Args:
        deadline_s: what the whole workflow may take from its first call's arrival.
        class_: the kind of workflow, whose calls are alike.
        workflow_id: a name that no other workflow has; one is made up by default.
        tenant: who sends it, where no gateway says so.

    Raises:
        BadInput: a value is out of range; the message names it.
    """
    name = workflow_id if workflow_id is not None else uuid.uuid4().hex
    said = {"deadline_s": deadline_s, "class": class_, "tenant": tenant}
    return WorkflowHints(_checked(workflow=name, **said))


def _checked(**said: FieldValue | None) -> dict[str, FieldValue]:
    given = {name: value for name, value in said.items() if value is not None}
    return {name: FIELDS[name].check(name, value) for name, value in given.items()}
