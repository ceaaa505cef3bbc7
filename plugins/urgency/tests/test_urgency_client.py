from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.errors import BadInput
from trimtab.urgency.client import workflow
from trimtab.urgency.fields import FIELDS, CallFields, parse


def test_a_stage_is_said_in_the_body():
    hints = workflow(deadline_s=30, class_="report", workflow_id="w17", tenant="acme")
    body = hints.extra_body("plan", expected_output=40)
    assert body == {
        "vllm_xargs": {
            "trimtab.workflow": "w17",
            "trimtab.deadline_s": 30,
            "trimtab.class": "report",
            "trimtab.tenant": "acme",
            "trimtab.stage": "plan",
            "trimtab.expected_output": 40,
        }
    }


def test_workflows_without_a_name_are_told_apart():
    first, second = workflow(), workflow()
    assert first.extra_body() != second.extra_body()
    assert first.extra_body() == first.extra_body()


@given(
    deadline_s=st.floats(0.001, 86_400.0),
    stage=st.text("abc-#_ ", min_size=1, max_size=20).filter(lambda text: text == text.strip()),
    output=st.integers(1, 10_000_000),
)
def test_headers_say_what_the_body_says(deadline_s, stage, output):
    hints = workflow(deadline_s=deadline_s, workflow_id="w")
    headers = hints.default_headers(stage, expected_output=output)
    read = {
        name: field.from_header(name, headers[field.header])
        for name, field in FIELDS.items()
        if field.header in headers
    }
    heard = parse(read)
    assert heard == CallFields("w", stage, "default", pytest.approx(deadline_s), output)


@pytest.mark.parametrize(
    "deadline_s", [0.0, -1.0, 1e12, math.nan, math.inf, -math.inf, "30", True, 86_401]
)
def test_deadlines_that_are_none_are_refused(deadline_s):
    with pytest.raises(BadInput, match="deadline_s"):
        workflow(deadline_s=deadline_s)


def test_what_cannot_stand_in_a_header_is_refused_there():
    hints = workflow(workflow_id="für mich")
    assert hints.extra_body()
    with pytest.raises(BadInput, match="cannot stand in a header"):
        hints.default_headers()
    with pytest.raises(BadInput, match="cannot stand in a header"):
        workflow(workflow_id="w").default_headers("a\nX-Other: 1")


def test_wrong_stages_are_refused():
    with pytest.raises(BadInput, match="stage"):
        workflow().extra_body("")
    with pytest.raises(BadInput, match="expected_output"):
        workflow().extra_body("plan", expected_output=0)
