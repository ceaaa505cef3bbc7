"""The plugin's hooks: what trimtab finds under the name ``gentree``."""

from __future__ import annotations

from typer import Typer

from trimtab.core.command_groups import command_group
from trimtab.core.hooks import PluginInfo, hookimpl


@hookimpl
def trimtab_info() -> PluginInfo:
    """Says what the plugin is, and how it is switched on."""
    return PluginInfo(
        summary="plans AllReduce on tree networks with a cost model that knows incast and memory",
        enable="trimtab plan allreduce --cluster FILE --size 64MiB --out PLAN",
    )


@hookimpl
def trimtab_commands(app: Typer) -> None:
    """Adds ``trimtab plan allreduce``."""
    from trimtab.gentree.command import allreduce

    command_group(app, "plan").command("allreduce")(allreduce)
