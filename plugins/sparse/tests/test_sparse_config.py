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
    ],
)
def test_wrong_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(BadInput, match=rf"trimtab\.sparse.*{named}"):
        plugin("sparse").configure(options)
