"""The plugin's hooks: what trimtab finds under the name ``placement``."""

from __future__ import annotations

from collections.abc import Sequence

from typer import Typer

from trimtab.core.benchmark import Benchmark
from trimtab.core.command_groups import command_group
from trimtab.core.hooks import PluginInfo, hookimpl
from trimtab.core.launch import LaunchChange, LaunchRequest
from trimtab.placement.config import PlacementConfig


@hookimpl
def trimtab_info() -> PluginInfo:
    """Says what the plugin is, and how it is switched on."""
    return PluginInfo(
        summary="lays training ranks onto the network so that their groups stay close",
        enable="trimtab plan placement --cluster FILE --job FILE --out PLAN, then"
        " trimtab launch --plan PLAN -- LAUNCHER …",
        config=PlacementConfig,
    )


@hookimpl
def trimtab_launch(config: PlacementConfig, launch: LaunchRequest) -> LaunchChange | None:
    """Gives the hosts of a training launch the order of a plan."""
    from trimtab.placement.launching import launch_change

    return launch_change(config, launch)


@hookimpl
def trimtab_first_step() -> None:
    """Compares a job that has a plan with it."""
    from trimtab.placement.job_check import check_first_step

    check_first_step()


@hookimpl
def trimtab_commands(app: Typer) -> None:
    """Adds ``trimtab plan placement`` and ``trimtab simulate cluster``."""
    from trimtab.placement.command import placement
    from trimtab.placement.simulate_command import cluster

    command_group(app, "plan").command("placement")(placement)
    command_group(app, "simulate").command("cluster")(cluster)


@hookimpl
def trimtab_benchmarks() -> Sequence[Benchmark]:
    """The benchmark of spreads and planning times."""
    from trimtab.placement.bench import BENCHMARK

    return [BENCHMARK]
