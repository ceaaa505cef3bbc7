"""Report pages: one HTML file each, which needs no network, in the style that all plugins share."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib.resources import files
from string import Template


def filled(package: str, **parts: str) -> str:
    """The page of a package's ``report.html``.

    Args:
        package: the plugin's, such as ``trimtab.placement``.
        parts: HTML by the names that the template gives them; ``style`` is the shared one.
    """
    template = Template((files(package) / "report.html").read_text("utf-8"))
    style = (files("trimtab.core") / "report.css").read_text("utf-8").rstrip()
    return template.substitute(parts, style=style)


def fact_boxes(facts: Iterable[tuple[str, str]]) -> str:
    """The figures at a page's head: each a value and what it is, as plain text."""
    return "".join(
        f'<div class="fact"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
        for value, text in facts
    )
