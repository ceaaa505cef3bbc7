"""The plugin's hooks: what trimtab finds under the name ``gentree``."""

from __future__ import annotations

from collections.abc import Sequence

from typer import Typer

from trimtab.core.benchmark import Benchmark
from trimtab.core.command_groups import command_group
from trimtab.core.hooks import PluginInfo, hookimpl
from trimtab.core.launch import LaunchChange, LaunchRequest
from trimtab.gentree.config import GentreeConfig


@hookimpl
def trimtab_info() -> PluginInfo:
    """Says what the plugin is, and how it is switched on."""
    return PluginInfo(
        summary="plans AllReduce on tree networks with a cost model that knows incast and memory",
        enable='{"trimtab": {"gentree": {"topology": FILE}}} in the DeepSpeed configuration, or'
        ' init_process_group("gentree") with TRIMTAB_GENTREE_TOPOLOGY=FILE',
        config=GentreeConfig,
    )


@hookimpl
def trimtab_launch(config: GentreeConfig, launch: LaunchRequest) -> LaunchChange | None:
    """Tells the ranks of a training launch the network."""
    from trimtab.gentree.launching import launch_change

    return launch_change(config, launch)


@hookimpl
def trimtab_commands(app: Typer) -> None:
    """Adds ``trimtab plan allreduce``."""
    from trimtab.gentree.command import allreduce

    command_group(app, "plan").command("allreduce")(allreduce)


@hookimpl
def trimtab_benchmarks() -> Sequence[Benchmark]:
    """The benchmark of plans by the model and on real hosts."""
    from trimtab.gentree.bench import BENCHMARK

    return [BENCHMARK]
