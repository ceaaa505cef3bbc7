from __future__ import annotations

import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from trimtab.core.errors import BadInput
from trimtab.core.hooks import plugin
from trimtab.urgency import UrgencyConfig, UrgencyPolicy
from trimtab.urgency.fields import FIELDS, CallFields, parse


def test_everything_is_optional():
    assert parse({}) == CallFields(None, None, "default", None, None)


def test_all_fields_and_those_of_other_plugins():
    said = {
        "workflow": "w17",
        "stage": "sql",
        "class": "nl2sql",
        "deadline_s": 30,
        "expected_output": 64,
        "branches": 3,
    }
    assert parse(said) == CallFields("w17", "sql", "nl2sql", 30, 64)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("deadline_s", "30", "'30' is a str; give a number"),
        ("deadline_s", True, "True is a bool; give a number"),
        ("deadline_s", math.nan, "'nan' is out of range"),
        ("deadline_s", math.inf, "'inf' is out of range"),
        ("deadline_s", -3.0, "'-3.0' is out of range; it must be between 0.001 and 86400"),
        ("deadline_s", 0, "'0' is out of range"),
        ("deadline_s", 90_000, "'90000' is out of range; it must be between 0.001 and 86400"),
        ("expected_output", 2.5, "2.5 is a float; give a int"),
        ("expected_output", 0, "'0' is out of range"),
        ("expected_output", 2**80, "out of range"),
        ("workflow", 7, "7 is a int; give a str"),
        ("workflow", "", "'' is out of range; its length must be between 1 and 128"),
        ("stage", "s" * 129, "its length must be between 1 and 128"),
        ("class", ["a"], "['a'] is a list; give a str"),
    ],
)
def test_a_bad_value_is_refused_by_name(name, value, message):
    with pytest.raises(BadInput) as error:
        parse({name: value})
    assert f"trimtab.{name}" in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deadline_s", "soon"),
        ("deadline_s", "nan"),
        ("deadline_s", "-5"),
        ("deadline_s", "86400001"),
        ("deadline_s", ""),
        ("expected_output", "1e99"),
        ("expected_output", "many"),
    ],
)
def test_a_bad_header_is_refused_by_its_name(name, text):
    header = FIELDS[name].header
    assert header is not None
    with pytest.raises(BadInput, match=header):
        FIELDS[name].from_header(name, text)


def test_the_deadline_header_is_in_milliseconds():
    assert FIELDS["deadline_s"].from_header("deadline_s", "1500") == 1.5


@pytest.mark.parametrize(
    "options",
    [{"order": "lifo"}, {"min_share": 0.9}, {"age_cap": 0.5}, {"ordr": "edd"}],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        UrgencyConfig(**options)


def test_every_option_and_header_is_described():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for name, field in UrgencyConfig.model_fields.items():
        assert field.description
        assert f"| `{name}` |" in readme
    for name, call_field in FIELDS.items():
        assert f"| `{call_field.header}` | `trimtab.{name}` |" in readme


def test_the_plugin_is_found_and_makes_its_policy():
    urgency = plugin("urgency")
    assert isinstance(urgency.serving_policy({"order": "urgency"}), UrgencyPolicy)
    assert set(urgency.info.call_fields) == set(FIELDS)
    with pytest.raises(BadInput, match="ordr"):
        urgency.configure({"ordr": "edd"})
