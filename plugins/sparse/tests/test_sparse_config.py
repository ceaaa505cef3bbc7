from __future__ import annotations

import pytest

from trimtab.core.errors import BadInput
from trimtab.core.hooks import plugin


def test_the_plugin_is_found_with_its_defaults() -> None:
    options = plugin("sparse").configure({}).model_dump()
    assert options["selector"] == "mass"
    assert options["min_prompt"] == 2048


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"selector": "best"}, "selector"),
        ({"mass": 0}, "mass"),
        ({"mass": 1.5}, "mass"),
        ({"recent": 0}, "recent"),
        ({"min_prompt": 1}, "min_prompt"),
        ({"blocks": 3}, "blocks"),
        ({"dense_layers": -1}, "dense_layers"),
        ({"least_gain": -0.1}, "least_gain"),
        ({"by": "head"}, "by"),
        ({"by": "query", "selector": "antidiagonal"}, "antidiagonals go through 16 queries"),
        (
            {"selector": "top", "top": 4, "first": 2, "recent": 3},
            "2 first and 3 recent blocks are more than top, 4",
        ),
        ({"native": {"top": 2}}, "1 first and 2 recent blocks are more than top, 2"),
        ({"stride": 4}, "stride 4 is for the selector fixed, not mass"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(BadInput, match=rf"trimtab\.sparse.*{named}"):
        plugin("sparse").configure(options)


@pytest.mark.parametrize(
    "options",
    [
        {"selector": "minmax", "top": 8, "by": "query"},
        {"selector": "fixed", "recent": 16, "stride": 8, "dense_layers": 2},
        {"selector": "antidiagonal", "mass": 0.9},
    ],
)
def test_each_selector_takes_its_options(options: dict[str, object]) -> None:
    made = plugin("sparse").configure(options).model_dump()
    assert {key: made[key] for key in options} == options


def test_a_rule_over_several_options_speaks_of_them_alone() -> None:
    with pytest.raises(BadInput) as caught:
        plugin("sparse").configure({"stride": 4})
    assert caught.value.what.startswith("stride 4 is for the selector fixed")
