"""The plugin's hooks: what trimtab finds under the name ``urgency``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.hooks import PluginInfo, hookimpl
from trimtab.urgency.config import UrgencyConfig
from trimtab.urgency.fields import FIELDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typer import Typer

    from trimtab.core.benchmark import Benchmark, Case, Options, Progress
    from trimtab.core.policy import ServingPolicy


@hookimpl
def trimtab_info() -> PluginInfo:
    """Says what the plugin is, and how it is switched on."""
    return PluginInfo(
        summary="serves multi-stage agent workflows by their deadlines",
        enable='--additional-config \'{"trimtab": {"urgency": {}}}\'',
        config=UrgencyConfig,
        call_fields=FIELDS,
    )


@hookimpl
def trimtab_serving_policy(config: UrgencyConfig) -> ServingPolicy:
    """Makes the policy that orders the waiting calls."""
    from trimtab.urgency.policy import UrgencyPolicy

    return UrgencyPolicy(config)


@hookimpl
def trimtab_benchmarks() -> Sequence[Benchmark]:
    """The comparison with vLLM's own orders; what it needs is imported when it runs."""
    from trimtab.core.benchmark import Benchmark

    def run(options: Options, progress: Progress) -> list[Case]:
        from trimtab.urgency import bench

        return bench.run(options, progress)

    summary = "agent workflows under urgency and its rivals, real and simulated; the router's cost"
    return [Benchmark("urgency", summary, run)]


@hookimpl
def trimtab_commands(app: Typer) -> None:
    """Adds ``trimtab demo``, ``trimtab route``, ``trimtab up`` and ``trimtab tune urgency``."""
    from trimtab.core.command_groups import command_group
    from trimtab.urgency.command import demo
    from trimtab.urgency.route_command import route, up
    from trimtab.urgency.tune_command import urgency

    app.command("demo")(demo)
    app.command("route")(route)
    app.command("up")(up)
    command_group(app, "tune").command("urgency")(urgency)
