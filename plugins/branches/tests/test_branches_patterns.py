from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.branches.patterns import PATTERN_LIMIT, Pattern
from trimtab.core.errors import BadInput

LONG_S = 60.0

atoms = st.sampled_from(
    [
        "a",
        "b",
        "c",
        " ",
        ".",
        r"\d",
        r"\w",
        r"\s",
        r"\S",
        r"\W",
        "[ab]",
        "[^a]",
        "[a-c1]",
        r"[\d\-]",
    ]
)


def _repeat(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    signs = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{0,2}?", "{1,}"])
    return st.builds(lambda part, sign: f"(?:{part}){sign}", inner, signs)


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds(lambda parts: "".join(parts), st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda parts: f"(?:{'|'.join(parts)})", st.lists(inner, min_size=2, max_size=3)),
        st.builds(lambda part: f"({part})", inner),
        _repeat(inner),
    )


patterns = st.builds(
    lambda flags, before, body, after: flags + before + body + after,
    st.sampled_from(["", "(?i)", "(?m)", "(?s)"]),
    st.sampled_from(["", "^", r"\b"]),
    st.recursive(atoms, _larger, max_leaves=6),
    st.sampled_from(["", "$", r"\b", r"\Z"]),
)
texts = st.text(alphabet="abcA1 -\n_", max_size=12)


def understood(pattern: str, refused_for: tuple[str, ...] = ("",)) -> Pattern | None:
    """The pattern; None if it is refused for one of some reasons."""
    try:
        return Pattern(pattern)
    except BadInput as error:
        if not any(why in str(error) for why in refused_for):
            raise
        return None


@given(patterns, texts)
def test_it_finds_what_python_finds(pattern: str, text: str) -> None:
    ours = understood(pattern, refused_for=("may be empty", "written out"))
    if ours is None:
        return
    theirs = list(re.finditer(pattern, text))
    expected = None
    if theirs:
        expected = theirs[-1].group(1 if theirs[-1].re.groups else 0)
    assert ours.last(text, LONG_S) == expected


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@given(st.text(max_size=12) | st.text(alphabet="(){}[]|*+?^$\\-ab,1:", max_size=10), texts)
def test_any_text_is_refused_or_is_a_pattern_to_python_too(pattern: str, text: str) -> None:
    ours = understood(pattern)
    if ours is not None:
        ours.last(text, LONG_S)
        re.compile(pattern)


@pytest.mark.parametrize(
    "pattern", [r"(?:a|a)+$", r"(?:a+)+$", r"(?:a|aa)+b", r"a*a*a*a*a*b", r"(?:.*)x(?:.*)y(?:.*)z"]
)
def test_what_hangs_others_takes_linear_time(pattern: str) -> None:
    if pattern == r"(?:.*)x(?:.*)y(?:.*)z":
        assert Pattern(pattern).last("x" * 300 + "!", LONG_S) is None
    else:
        # Each of these would take Python longer than the age of the universe.
        assert Pattern(pattern).last("a" * 300 + "!", LONG_S) is None


def test_it_gives_up_when_its_time_is_over() -> None:
    assert Pattern("a+b").last("a" * 10_000, within_cpu_s=0.0) is None


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("a" * (PATTERN_LIMIT + 1), "characters"),
        ("((a{99}){99}){99}", "written out"),
        ("a{2,1}", "wrong way round"),
        ("(a", "without its end"),
        ("a)", "unmatched"),
        ("[a", "without its end"),
        ("[b-a]", "wrong way round"),
        ("*a", "repetition of nothing"),
        ("a**", "repetition of a repetition"),
        ("(?:a*)*", "may be empty"),
        ("{", "bare"),
        ("a{x}", "begins no repetition"),
        (r"(a)\1", "escape"),
        ("(?=a)b", "kind"),
        ("(?R)", "kind"),
        ("(?P<x>a)", "kind"),
        (r"\x", "escape"),
        ("\\", "escape"),
        ("(" * 30 + "a" + ")" * 30, "deep"),
    ],
)
def test_what_is_outside_the_subset_is_refused_with_its_place(pattern: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        Pattern(pattern)
