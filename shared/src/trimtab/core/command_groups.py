"""Groups of commands that several plugins share, such as ``trimtab plan``."""

from __future__ import annotations

import typer

_HELP = {
    "plan": "Plan who does what where; the plan is a file.",
    "profile": "Measure this machine or network.",
    "simulate": "Simulate what a plan or a policy does.",
    "tune": "Find a plugin's best options by simulation.",
}

SHARED = frozenset({"plan", "simulate", "tune"})
"""Groups that plugins add to, even where the core has commands in them."""


def command_group(app: typer.Typer, name: str) -> typer.Typer:
    """The group of a name, made when the first plugin asks for it."""
    for info in app.registered_groups:
        if info.name == name and info.typer_instance is not None:
            return info.typer_instance
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
    app.add_typer(group, name=name, help=_HELP.get(name))
    return group
