"""The plugin's hooks: what trimtab finds under the name ``branches``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.branches.config import BranchesConfig
from trimtab.branches.fields import FIELDS
from trimtab.core.command_groups import command_group
from trimtab.core.hooks import PluginInfo, hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typer import Typer

    from trimtab.core.benchmark import Benchmark, Case, Options, Progress
    from trimtab.core.policy import ServingPolicy


@hookimpl
def trimtab_info() -> PluginInfo:
    """Says what the plugin is, and how it is switched on."""
    return PluginInfo(
        summary="samples several branches of a request, stops early and prunes the bad ones",
        enable='--additional-config \'{"trimtab": {"branches": {}}}\'',
        config=BranchesConfig,
        call_fields=FIELDS,
    )


@hookimpl
def trimtab_serving_policy(config: BranchesConfig) -> ServingPolicy:
    """Makes the policy that ends branches."""
    from trimtab.branches.policy import BranchesPolicy

    return BranchesPolicy(config)


@hookimpl
def trimtab_benchmarks() -> Sequence[Benchmark]:
    """The comparison with other ways to sample; what it needs is imported when it runs."""
    from trimtab.core.benchmark import Benchmark

    def run(options: Options, progress: Progress) -> list[Case]:
        from trimtab.branches import bench

        return bench.run(options, progress)

    summary = (
        "branches and their rivals: simulated, in vLLM's scheduler, and for real; a step's cost"
    )
    return [Benchmark("branches", summary, run)]


@hookimpl
def trimtab_commands(app: Typer) -> None:
    """Adds ``trimtab plan branches``."""
    from trimtab.branches.plan_command import branches

    command_group(app, "plan").command("branches")(branches)
