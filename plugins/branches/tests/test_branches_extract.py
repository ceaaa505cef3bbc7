from __future__ import annotations

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.branches import extract
from trimtab.branches.extract import extractor, load_function, normalised
from trimtab.core.errors import BadInput


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"} { \boxed {3} {", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{}", None),
        ("no box", None),
        ("", None),
    ],
)
def test_boxed(text, answer):
    assert extract.boxed(text) == answer


@given(st.recursive(st.text("ab1 \n", max_size=5), lambda s: s.map(lambda t: "{" + t + "}")))
def test_a_balanced_box_is_found_after_anything(inside):
    noise = r"\boxed{ { \boxed{0} } "
    assert extract.boxed(noise + r"\boxed{" + inside + "} { end") == (inside.strip() or None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Final answer: 12", "12"),
        ("The final answer is **12**.", "12"),
        ("**Final Answer**\n\n$3.14$\n", "3.14"),
        ("final answer:\n\\[\\boxed{5}\\]", "5"),
        ("a\n#### 1,000\n", "1,000"),
        ("The answer is 7. I hope this helps.", "7"),
        ("Answer: yes! Really", "yes"),
        ("the answer is 5, so the final answer is 6", "6"),
        ("Final answer: 12\nThis answer is right.", "12"),
        ("The answer is 1\nThe answer is 2", "2"),
        ("I have no idea", None),
        ("Final answer:", None),
    ],
)
def test_final(text, answer):
    assert extract.final(text) == answer


@pytest.mark.parametrize(
    ("path", "text", "answer"),
    [
        ("a", '{"a": 1} {"a": "two"} and {"b": 3}', "two"),
        ("a", 'x \\frac{1}{2} {"a": 1.50} }', "1.5"),
        ("a.b", '{"a": {"b": [1, 2]}}', "[1, 2]"),
        ("a", '{"b": {"a": 2}, "a": true}', "true"),
        ("a", '```json\n{"a": null}\n```', None),
        ("a", '{"a": 1', None),
        ("a", "{" * 50_000, None),
        ("a", '{"a":' * 20_000, None),
        ("a", '{"a": ' + "9" * 6000 + "}", None),
    ],
)
def test_json(path, text, answer):
    assert extractor(f"json:{path}")(text) == answer


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(min_size=1).map(str.strip)))
def test_any_json_object_is_found_in_prose(content):
    content["answer"] = 17
    text = f"It is {{ obvious }}: {json.dumps(content)} }}."
    assert extractor("json:answer")(text) == "17"


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (r"= (-?\d+)", "1 = 1, 2 = -2", "-2"),
        (r"(?i)verdict: \w+", "x VERDICT: guilty", "VERDICT: guilty"),
        (r"x(y)?", "x", None),
        (r"z", "x", None),
    ],
)
def test_regex(pattern, text, answer):
    assert extractor(f"regex:{pattern}")(text) == answer


def test_none_is_the_whole_text():
    assert extractor("none")(" yes\n") == "yes"
    assert extractor("none")(" \n") is None


@given(st.sampled_from(["boxed", "final", "json:a", r"regex:a(.)+b", "none"]), st.text())
def test_no_text_breaks_an_extractor(rule, text):
    found = extractor(rule)(text)
    assert found is None or found.strip()


@pytest.mark.parametrize(
    "rule", ["", "box", "json", "json:", "json:a..b", "regex:", "regex:(", "Boxed"]
)
def test_a_wrong_rule_is_refused_with_its_place(rule):
    with pytest.raises(BadInput) as caught:
        extractor(rule, where="vllm_xargs, trimtab.extract")
    assert caught.value.where == "vllm_xargs, trimtab.extract"


def test_a_function_of_the_owner():
    assert load_function("posixpath:basename")("a/b") == "b"


@pytest.mark.parametrize("path", ["nowhere:f", "json:nothing", "json", "json:__doc__", ""])
def test_a_function_that_is_none_is_refused(path):
    with pytest.raises(BadInput):
        load_function(path)


@pytest.mark.parametrize(
    "same",
    [
        (
            "1,000",
            "1000",
            "1000.0",
            " 1 000".replace(" ", ""),
            "$1,000$",
            "1{,}000",
            "1e3",
            "+1000.",
        ),
        ("0.50", ".5", "0.5", "**.50**"),
        ("-0", "0", "0.00", "00"),
        ("007", "7"),
        ("−3", "-3.0"),
        ("50%", r"50\%", "50.0 %".replace(" ", "")),
        ("Yes.", "yes", " YES ", '"yes"'),
        ("a  b", "A\nb"),
        ("１２", "12"),
    ],
)
def test_answers_that_are_the_same(same):
    assert len({normalised(answer) for answer in same}) == 1


@pytest.mark.parametrize(
    "different",
    [("1,000", "1,00"), ("0.5", "5"), ("-3", "3"), ("50%", "50"), ("1.2.3", "1.23"), ("a b", "ab")],
)
def test_answers_that_differ(different):
    assert len({normalised(answer) for answer in different}) == len(different)


@given(st.text(max_size=40) | st.from_regex(r"[+-]?[0-9,]{0,9}\.?[0-9]{0,4}(e-?[0-9]{1,2})?%?"))
def test_what_is_normalised_stays_so(answer):
    once = normalised(answer)
    assert normalised(once) == once


@given(
    st.decimals(
        allow_nan=False, allow_infinity=False, places=4, min_value=-(10**9), max_value=10**9
    )
)
def test_equal_numbers_have_one_spelling(number: Decimal):
    one, other = normalised(f"{number:,f}"), normalised(f"{number:.6f}")
    assert one == other
    assert Decimal(one) == number
